"""A dataset with the filter's verdict in it: columns `filter_score` (probability of clean) and `filter_keep`.

Every row stays. A figure that cannot be read has neither score nor verdict, and a line in unreadable.jsonl. A figure is
scored once, however many rows show it, and a batch's scores are on disk before the next batch: the same command after a
kill goes on where it was. Then the dataset's files are written again under the same names, with the two columns filled;
the card comes last, and names the filter, so that `datasets` does not answer from what it cached for another one.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import DatasetInfo, get_dataset_config_names, load_dataset_builder
from datasets.info import DatasetInfosDict
from huggingface_hub import DatasetCard
from huggingface_hub.utils import tqdm
from torch import Tensor

from ..assemble import DICTIONARY_BYTES, ROWS_PER_GROUP, write_atomically
from .encoder import BATCH_SIZE, Encoder, encode_figures
from .figures import Figures
from .head import load_head
from .journal import Journal
from .train import filter_digest, report_lines

HEADING = "## Figure filter"

Scores = Mapping[str, float | None]  # image_sha256 -> probability of clean; None: the figure cannot be read


class FigureFilter:
    """A trained filter with its encoder. ValueError where files of either were changed since the training."""

    def __init__(self, folder: Path, encoder_folder: Path | None = None) -> None:
        """`encoder_folder`: where the encoder lies now, if it was moved."""
        path = folder / "filter.json"
        if not path.is_file():
            raise ValueError(f"{folder}: no filter.json; give a folder that `biod2c build train-filter` wrote")
        self.record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if filter_digest(folder, self.record) != self.record["sha256"]:
            raise ValueError(
                f"{folder}: head.safetensors and filter.json do not belong together; train the filter again"
            )
        self.head = load_head(folder / "head.safetensors")
        self.threshold: float = self.record["threshold"]
        self.encoder = Encoder(encoder_folder or Path(self.record["encoder"]["folder"]))
        if self.encoder.sha256 != self.record["encoder"]["sha256"]:
            raise ValueError(
                f"{self.encoder.folder}: not the encoder that {folder} was trained on; give it by --encoder"
            )

    def keeps(self, score: float | None) -> bool | None:
        """The verdict; None for a figure without a score."""
        return None if score is None else score >= self.threshold


@dataclass(frozen=True)
class FilterResult:
    """How many figures and rows fell on each side: "clean", "polluted", "unreadable"."""

    output: Path
    figures: dict[str, int]
    rows: dict[str, int]


def filter_dataset(
    dataset: Path, filter_folder: Path, output: Path, encoder_folder: Path | None = None, workers: int = 0
) -> FilterResult:
    """Score the dataset's figures and write it to `output` with both columns filled.

    Raises:
        ValueError: a folder that is no dataset or no filter, or an `output` that holds something else.
    """
    if output.exists() and any(output.iterdir()) and not any(output.glob("scores-*.jsonl")):
        raise ValueError(f"{output}: not empty and not written by this command; give another --output")
    figure_filter, figures = FigureFilter(filter_folder, encoder_folder), Figures(dataset)
    scores = score_figures(figure_filter, figures, output, workers)
    rows: Counter[str] = Counter()
    sizes = {
        config: {split: _write_split(dataset, files, output, scores, figure_filter, rows) for split, files in splits}
        for config, splits in _files_of(dataset)
    }
    counts = Counter(_side(figure_filter.keeps(scores[sha])) for sha in figures.groups)
    result = FilterResult(output, *({side: n[side] for side in _SIDES} for n in (counts, rows)))
    write_atomically(output / "README.md", _card(dataset, sizes, figure_filter, result))
    return result


def score_figures(figure_filter: FigureFilter, figures: Figures, output: Path, workers: int = 0) -> Scores:
    """The score of every figure; those that an earlier run wrote to output/scores-*.jsonl are not computed again."""
    name = f"scores-{figure_filter.record['sha256'][:16]}.jsonl"
    with Journal(output / name) as journal:
        records = {record["image_sha256"]: record for record in journal.records}
        missing = [sha for sha in figures.groups if sha not in records]
        batches = encode_figures(figure_filter.encoder, figures, missing, workers)
        for batch in tqdm(batches, total=-(-len(missing) // BATCH_SIZE), unit="batch", disable=None):
            scored = list(_scored(figure_filter, batch))
            journal.append(scored)
            records |= {record["image_sha256"]: record for record in scored}
    unreadable = [records[sha] for sha in figures.groups if records[sha]["filter_score"] is None]
    write_atomically(output / "unreadable.jsonl", "".join(json.dumps(record) + "\n" for record in unreadable))
    return {sha: records[sha]["filter_score"] for sha in figures.groups}


def _scored(figure_filter: FigureFilter, batch: list[tuple[str, Tensor | str]]) -> Iterator[dict[str, Any]]:
    readable = [features for _, features in batch if isinstance(features, Tensor)]
    scores = iter(figure_filter.head.score(torch.stack(readable)).tolist() if readable else [])
    for sha, features in batch:
        if isinstance(features, str):
            yield {"image_sha256": sha, "filter_score": None, "error": features}
        else:
            yield {"image_sha256": sha, "filter_score": next(scores)}


_SIDES = ("clean", "polluted", "unreadable")


def _side(keep: bool | None) -> str:
    return "unreadable" if keep is None else "clean" if keep else "polluted"


def _files_of(dataset: Path) -> Iterator[tuple[str, list[tuple[str, list[Path]]]]]:
    """(configuration, [(split, its files)]), files relative to the dataset's folder."""
    root = dataset.resolve()
    for config in get_dataset_config_names(str(dataset)):
        files = load_dataset_builder(str(dataset), config).config.data_files
        yield (
            config,
            [(str(split), [Path(p).resolve().relative_to(root) for p in paths]) for split, paths in files.items()],
        )


def _write_split(
    dataset: Path, files: list[Path], output: Path, scores: Scores, figure_filter: FigureFilter, rows: Counter[str]
) -> tuple[int, int]:
    """Write a split's files; returns its bytes as Arrow and as Parquet, and counts its rows into `rows`."""
    num_bytes = 0
    for name in files:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        partial = output / f"{name}.partial"
        with pq.ParquetFile(dataset / name) as source:
            writer = pq.ParquetWriter(partial, source.schema_arrow, dictionary_pagesize_limit=DICTIONARY_BYTES)
            with writer:
                for group in range(source.num_row_groups):
                    table = _judged(source.read_row_group(group), scores, figure_filter)
                    rows.update(_side(keep) for keep in table["filter_keep"].to_pylist())
                    writer.write_table(table, row_group_size=ROWS_PER_GROUP)
                    num_bytes += table.nbytes
        partial.rename(output / name)
    return num_bytes, sum((output / name).stat().st_size for name in files)


def _judged(table: pa.Table, scores: Scores, figure_filter: FigureFilter) -> pa.Table:
    found = [scores[sha] for sha in table["image_sha256"].to_pylist()]
    columns = {"filter_score": found, "filter_keep": [figure_filter.keeps(score) for score in found]}
    for name, values in columns.items():
        place = table.schema.get_field_index(name)
        field = table.schema.field(place)
        table = table.set_column(place, field, pa.array(values, field.type))
    return table


def _card(
    dataset: Path, sizes: Mapping[str, Mapping[str, tuple[int, int]]], figure_filter: FigureFilter, result: FilterResult
) -> str:
    """The dataset's card with the new sizes and what the filter did."""
    card = DatasetCard.load(dataset / "README.md")
    infos = DatasetInfosDict.from_dataset_card_data(card.data)
    for config, splits in sizes.items():
        _set_sizes(infos[config], splits)
    infos.to_dataset_card_data(card.data)
    lines = [
        "`filter_score` is the probability that the figure is clean, `filter_keep` whether it reaches the threshold.",
        *summary_lines(result),
        *report_lines(figure_filter.record),
        f"filter {figure_filter.record['sha256']}",
    ]
    card.text = card.text.partition(HEADING)[0].rstrip() + f"\n\n{HEADING}\n" + "".join(f"- {line}\n" for line in lines)
    return str(card)


def _set_sizes(info: DatasetInfo, splits: Mapping[str, tuple[int, int]]) -> None:
    for split, (num_bytes, _) in splits.items():
        info.splits[split].num_bytes = num_bytes
    info.dataset_size = sum(num_bytes for num_bytes, _ in splits.values())
    info.download_size = sum(download for _, download in splits.values())


def summary_lines(result: FilterResult) -> list[str]:
    """How many figures and rows are on each side."""
    return [
        f"{what}: " + ", ".join(f"{count} {side}" for side, count in counts.items())
        for what, counts in (("figures", result.figures), ("rows", result.rows))
    ]
