"""PMC-VQA (Zhang et al., 2023; CC BY-SA): multiple-choice questions about figures of PMC papers.

Version 1 is train.csv, test.csv, test_clean.csv (2000 rows of the test, checked by hand) and images.zip, whole figures;
version 2 is train_2.csv, test_2.csv and images_2.zip, figures cut into sub-figures; either can be there alone. Only
version 2 has captions. Version 1's are those of PMC-OA, where pmc_oa_beta.jsonl or pmc_oa.jsonl is copied or linked
into this folder: the caption of the image of that name or, if it is a whole figure, the captions of its sub-figures.
Quirks: an older version 1 spells "Anwser" and may have no Answer_label; choices carry their letter (" A:CT"); version
2's Answer is the letter alone. A row's answer is the right choice's text; the choices themselves stay out, so a model
answers freely. No row says whether it is open or closed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..report import BadRowError, Report, SourceError
from ..schema import Row, new_row
from .archives import open_images
from .pmc import caption_text, figure, figure_columns, paper, stem
from .raw import Images, optional_text, require_english, rows_of, text
from .records import Lookup, read_csv, read_jsonl

LICENSE = "CC-BY-SA-4.0"
CHOICES = {letter: f"Choice {letter}" for letter in "ABCD"}
COLUMNS = ("Figure_path", "Question", *CHOICES.values())
PMC_OA_FILES = ("pmc_oa_beta.jsonl", "pmc_oa.jsonl")  # the first keeps whole captions, as whole figures need


@dataclass(frozen=True)
class Version:
    """One of the two releases: its tables with the split each holds, where its images lie, whether it has captions."""

    tables: dict[str, str]
    folders: tuple[str, ...]
    archive: str
    has_captions: bool


VERSIONS = (
    # The checked rows come first: test.csv, which holds them too, then gives only the others.
    Version(
        {"train.csv": "train", "test_clean.csv": "test", "test.csv": "test"},
        ("images/images", "images"),
        "images.zip",
        False,
    ),
    Version(
        {"train_2.csv": "train", "test_2.csv": "test"},
        ("images_2/figures", "images_2", "figures"),
        "images_2.zip",
        True,
    ),
)


def read_pmc_vqa(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield PMC-VQA's rows, version 1's first, each table in the order of its file.

    `id` names the table and the row in it, `group` is the paper. A table that is not there is noted; SourceError if
    none is there, or without its version's images.
    """
    require_english("pmc_vqa", languages)
    if not any((root / name).is_file() for version in VERSIONS for name in version.tables):
        names = [name for version in VERSIONS for name in version.tables]
        raise SourceError(f"{root}: no PMC-VQA table; expected some of {', '.join(names)} in this folder")
    for version in VERSIONS:
        yield from _read_version(root, version, report)


def _read_version(root: Path, version: Version, report: Report) -> Iterator[Row]:
    tables = {name: split for name, split in version.tables.items() if (root / name).is_file()}
    if not tables:
        return
    report.notes.extend(f"pmc_vqa: no {name}" for name in version.tables if name not in tables)
    images = open_images(root, version.folders, version.archive, "Figure_path")
    captions = None if version.has_captions else captions_of_pmc_oa(root, report)
    checked: set[tuple[str, str]] = set()
    seen_ids: set[str] = set()
    for name, split in tables.items():
        path = root / name
        make_row = partial(
            pmc_vqa_row, table=path.stem, split=split, images=images, captions=captions, checked=checked, report=report
        )
        records = read_csv("pmc_vqa", path, report, COLUMNS)
        yield from rows_of("pmc_vqa", path, records, report, make_row, seen_ids, id_field="index")


def pmc_vqa_row(
    number: int,
    record: Mapping[str, Any],
    *,
    table: str,
    split: str,
    images: Images,
    captions: Lookup | None,
    checked: set[tuple[str, str]],
    report: Report,
) -> Row | None:
    """One row in the schema; None for a row of test.csv that test_clean.csv has given. BadRowError if a field cannot
    be used.

    `checked` collects (figure, question) of test_clean.csv.
    """
    name = text(record, "Figure_path", report)
    question = text(record, "Question", report)
    if table == "test_clean":
        checked.add((name, question))
    elif table == "test" and (name, question) in checked:
        report.quirks["pmc_vqa: row of test.csv left out, test_clean.csv has it"] += 1
        return None
    if record.get("split", split).strip() != split:
        report.quirks[f"pmc_vqa: row of {table}.csv that names another split, its file's kept"] += 1
    return new_row(
        id=f"pmc_vqa-{table}-{record.get('index') or number}",
        question=question,
        answer=right_answer(record, report),
        caption=own_caption(record, report) if captions is None else caption_of(name, captions, report),
        language="en",
        source="pmc_vqa",
        source_split=split,
        license=LICENSE,
        **figure_columns(name, images.read(name), paper(name), report),
    )


def right_answer(record: Mapping[str, Any], report: Report) -> str:
    """The right choice's text, or the answer as the row words it where it has no letter. BadRowError without either."""
    field = "Answer" if "Answer" in record else "Anwser"
    if field == "Anwser":
        report.quirks["pmc_vqa: the answer's column is spelt Anwser"] += 1
    worded = optional_text(record, field, report)
    letter = (record.get("Answer_label") or worded or "").strip().upper()
    if letter not in CHOICES:
        report.quirks["pmc_vqa: row without the right choice's letter, its answer kept as worded"] += 1
        return text(record, field, report)
    right = choice(record, letter, report)
    if worded and worded.upper() != letter and without_letter(worded, letter).casefold() != right.casefold():
        report.quirks["pmc_vqa: answer differs from the choice that its letter names, the choice kept"] += 1
    return right


def choice(record: Mapping[str, Any], letter: str, report: Report) -> str:
    """One of the choices, without its letter."""
    words = without_letter(text(record, CHOICES[letter], report), letter)
    if not words:
        raise BadRowError(
            CHOICES[letter], record[CHOICES[letter]], "a text after its letter", "mend the row in the file"
        )
    return words


def without_letter(words: str, letter: str) -> str:
    """ "CT" for "A:CT"."""
    return re.sub(rf"^\s*{letter}\s*:", "", words).strip()


def own_caption(record: Mapping[str, Any], report: Report) -> str | None:
    """A version-2 row's caption, if it has one."""
    if not record.get("Caption", "").strip():
        report.quirks["pmc_vqa: row of version 2 without a caption"] += 1
        return None
    return caption_text(record, "Caption", report)


def captions_of_pmc_oa(root: Path, report: Report) -> Lookup:
    """PMC-OA's (sub-figure, caption) pairs by figure; none, and a note, where its table does not lie in `root`."""
    path = next((root / name for name in PMC_OA_FILES if (root / name).is_file()), None)
    if path is None:
        report.notes.append(f"pmc_vqa: no {' or '.join(PMC_OA_FILES)} in this folder, so version 1 has no captions")
        return Lookup([])
    return Lookup(_captions(path, report))


def _captions(path: Path, report: Report) -> Iterator[tuple[str, str, str]]:
    for number, record in read_jsonl("pmc_vqa", path, report):
        try:
            name = stem(text(record, "image", report))
            yield figure(name), name, caption_text(record, "caption", report)
        except BadRowError as error:
            report.skip("pmc_vqa", path, number, error)


def caption_of(name: str, captions: Lookup, report: Report) -> str | None:
    """A version-1 image's caption: its own or, for a whole figure, those of its sub-figures, each once."""
    image = stem(name)
    own = [caption for subfigure, caption in captions.find(figure(image)) if subfigure == image]
    parts = own or list(dict.fromkeys(caption for _, caption in captions.find(image)))
    if not parts:
        report.quirks["pmc_vqa: row of version 1 without a caption, its figure is not in PMC-OA"] += 1
        return None
    report.quirks["pmc_vqa: row of version 1 whose caption is PMC-OA's"] += 1
    return " ".join(parts)
