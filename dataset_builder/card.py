"""The dataset card: README.md with the YAML block that `load_dataset` and the Hub read, and the text that people
read.

The block names the files of each configuration (`configs`) and their sizes (`dataset_info`); without the sizes
`load_dataset` could not tell a cut file from a whole one.
"""

from collections.abc import Mapping
from typing import Any

from datasets import DatasetInfo, SplitDict, SplitInfo
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCardData

from .assemble import SplitFiles, WrittenSplits
from .recipe import SourceOptions
from .report import Report
from .schema import FEATURES

CONFIGURATIONS = {
    "default": "the mixture to train on",
    "pretrain": "stage 1: an instruction and a caption or a part of it, made from an image's labels and boxes",
    "biovgq": "BioVGQ as its authors released it",
    "dicom": "questions about DICOM images",
    "folder": "questions about a folder of images",
    "path_vqa": "Path-VQA with its own splits",
    "llava_med": "LLaVA-Med's alignment set: figures and their captions",
    "pmc_oa": "PMC-OA: sub-figures and their captions",
    "pmc_vqa": "PMC-VQA with its own splits",
    "slake": "SLAKE with its own splits",
    "vqa_rad": "VQA-RAD with its own splits",
}
SOURCES = {
    "biovgq": (
        "BioVGQ",
        "other",
        "Ji et al., *BioD2C: A Dual-level Semantic Consistency Constraint Framework for Biomedical VQA*, 2025. Its "
        "images come from PubMed Central, SLAKE, VQA-RAD and Path-VQA, which keep their terms.",
    ),
    "dicom": ("DICOM images", "unknown", "As the owner of the images says; see the column `license`."),
    "folder": ("a folder of images", "unknown", "As the owner of the images says; see the column `license`."),
    "path_vqa": (
        "Path-VQA",
        "other",
        "He et al., *PathVQA: 30000+ Questions for Medical Visual Question Answering*, 2020. Code and questions MIT; "
        "the images stay with their publishers.",
    ),
    "llava_med": (
        "LLaVA-Med",
        "CC BY-NC 4.0",
        "Li et al., *LLaVA-Med: Training a Large Language-and-Vision Assistant for Biomedicine in One Day*, NeurIPS "
        "2023. The figures keep the terms of their articles.",
    ),
    "pmc_oa": (
        "PMC-OA",
        "other",
        "Lin et al., *PMC-CLIP: Contrastive Language-Image Pre-training using Biomedical Documents*, MICCAI 2023. Each "
        "figure has its article's licence; see the column `license`.",
    ),
    "pmc_vqa": (
        "PMC-VQA",
        "CC BY-SA 4.0",
        "Zhang et al., *PMC-VQA: Visual Instruction Tuning for Medical Visual Question Answering*, arXiv:2305.10415, "
        "2023. The figures keep the terms of their articles.",
    ),
    "slake": (
        "SLAKE",
        "CC BY 4.0",
        "Liu et al., *SLAKE: A Semantically-Labeled Knowledge-Enhanced Dataset for Medical Visual Question "
        "Answering*, ISBI 2021. Its images come from MSD, CHAOS and NIH ChestX-ray8, which keep their terms.",
    ),
    "vqa_rad": (
        "VQA-RAD",
        "CC0 1.0",
        "Lau et al., *A dataset of clinically generated visual questions and answers about radiology images*, "
        "Scientific Data 2018.",
    ),
}
TEXT = """# BioVGQ, as built from {names}

Biomedical visual question answering, for the two training stages of BioD2C. Open it with

```python
from datasets import load_dataset

dataset = load_dataset("PATH_OF_THIS_FOLDER")
```

| configuration | what | rows |
|---|---|---|
{configurations}

Every row says where it came from (`source`, `source_split`, `license`); `queue` holds up to 30 texts related to its
image, of the training split only and never its own answer; `group` must stay on one side of a split. Images are the
bytes of the sources' files (of DICOM, a PNG of the pixels). Captions made from boxes speak of the viewer's left and
right, not the patient's, and say nothing about what is not marked in the source. For research; not for diagnosis.

[statistics.md](statistics.md) says what it holds, [leakage.md](leakage.md) what its splits share.

![samples](figures/samples.jpg)

## Sources
| source | licence | citation |
|---|---|---|
{sources}

## What the build met
{report}

Content {fingerprint}.
"""


def dataset_card(written: WrittenSplits, sources: Mapping[str, SourceOptions], report: Report, fingerprint: str) -> str:
    """The text of README.md."""
    names = list(sources)
    body = TEXT.format(
        names=" and ".join(SOURCES[name][0] for name in names),
        configurations="\n".join(_configuration_line(config, splits) for config, splits in written.items()),
        sources="\n".join(_source_line(name, sources[name]) for name in names),
        report="\n".join(f"- {line}" for line in report.lines()) or "- nothing out of the ordinary",
        fingerprint=fingerprint,
    )
    return f"---\n{_metadata(written, sources).to_yaml()}\n---\n\n{body}"


def _licence(name: str, source: SourceOptions) -> str:
    """The source's, or what the owner of the images says."""
    return source.own.get("license", SOURCES[name][1])


def _source_line(name: str, source: SourceOptions) -> str:
    title, _, citation = SOURCES[name]
    return f"| {title} | {_licence(name, source)} | {citation} |"


def _configuration_line(config: str, splits: dict[str, SplitFiles]) -> str:
    counts = ", ".join(f"{split} {files.num_examples}" for split, files in splits.items())
    return f"| `{config}` | {CONFIGURATIONS[config]} | {counts} |"


def _metadata(written: WrittenSplits, sources: Mapping[str, SourceOptions]) -> DatasetCardData:
    data = DatasetCardData(
        license=sorted({_licence(*item).lower().replace(" ", "-") for item in sources.items()}),
        language=sorted({language for source in sources.values() for language in source.languages}),
        task_categories=["visual-question-answering"],
        pretty_name="BioVGQ",
        configs=[_files_of(config, splits) for config, splits in written.items()],
    )
    DatasetInfosDict({config: _info(splits) for config, splits in written.items()}).to_dataset_card_data(data)
    return data


def _files_of(config: str, splits: dict[str, SplitFiles]) -> dict[str, Any]:
    return {
        "config_name": config,
        "data_files": [{"split": split, "path": list(files.files)} for split, files in splits.items()],
    }


def _info(splits: dict[str, SplitFiles]) -> DatasetInfo:
    sizes = SplitDict({split: SplitInfo(split, files.num_bytes, files.num_examples) for split, files in splits.items()})
    return DatasetInfo(
        features=FEATURES,
        splits=sizes,
        download_size=sum(files.download_bytes for files in splits.values()),
        dataset_size=sum(files.num_bytes for files in splits.values()),
    )
