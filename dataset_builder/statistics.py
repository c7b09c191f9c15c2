"""What a built dataset holds, for people: statistics.md with plots, and a sheet of samples.

Drawn from the mixture, or where there is none from the sources. Pictures are made without a date or a random choice:
the same rows give the same bytes.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .images import decode
from .schema import Row

SAMPLES = 12
THUMBNAIL = 220  # pixels
TOP = 15


def write_statistics(folder: Path, configs: Mapping[str, Mapping[str, Sequence[Row]]]) -> None:
    """Write statistics.md, figures/counts.png, figures/lengths.png and figures/samples.jpg."""
    shown = {"default": configs["default"]} if "default" in configs else configs
    splits = {f"{config}/{split}": rows for config, splits in shown.items() for split, rows in splits.items()}
    rows = [row for members in splits.values() for row in members]
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    _draw_counts(rows, figures / "counts.png")
    _draw_lengths(rows, figures / "lengths.png")
    _draw_samples(rows, figures / "samples.jpg")
    (folder / "statistics.md").write_text(_page(configs, rows), encoding="utf-8")


def _page(configs: Mapping[str, Mapping[str, Sequence[Row]]], rows: Sequence[Row]) -> str:
    table = [
        "| configuration | split | rows | images | groups | closed | with a caption | with a queue | dialogues |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for config, splits in configs.items():
        for split, members in splits.items():
            table.append(f"| {config} | {split} | {' | '.join(map(str, _numbers(members)))} |")
    answers = Counter(row["answer"].lower() for row in rows).most_common(TOP)
    return "\n".join(
        [
            "# What the dataset holds",
            "",
            *table,
            "",
            "![rows by source, modality, organ and answer type](figures/counts.png)",
            "",
            "![words of questions, answers and captions](figures/lengths.png)",
            "",
            f"The {len(answers)} most frequent answers: "
            + ", ".join(f"{text} ({count})" for text, count in answers)
            + ".",
            "",
            "![samples with their questions and answers](figures/samples.jpg)",
            "",
        ]
    )


def _numbers(rows: Sequence[Row]) -> tuple[int, ...]:
    return (
        len(rows),
        len({row["image_sha256"] for row in rows}),
        len({row["group"] for row in rows}),
        sum(row["answer_type"] == "closed" for row in rows),
        *(sum(bool(row[column]) for row in rows) for column in ("caption", "queue", "history")),
    )


def _draw_counts(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(12, 7), layout="constrained")
    for axis, column in zip(figure.subplots(2, 2).flat, ("source", "modality", "organ", "answer_type"), strict=True):
        counts = Counter(row[column] or "not given" for row in rows).most_common(TOP)[::-1]
        axis.barh([name for name, _ in counts], [count for _, count in counts])
        axis.set(title=column.replace("_", " "), xlabel="rows")
    figure.savefig(path, dpi=90)


def _draw_lengths(rows: Sequence[Row], path: Path) -> None:
    figure = Figure(figsize=(12, 3.5), layout="constrained")
    axes: Iterable[Axes] = figure.subplots(1, 3)
    for axis, column in zip(axes, ("question", "answer", "caption"), strict=True):
        lengths = [len(row[column].split()) for row in rows if row[column]]
        axis.hist(lengths, bins=range(max(lengths, default=1) + 2), log=bool(lengths))
        axis.set(title=column, xlabel="words", ylabel="rows")
    figure.savefig(path, dpi=90)


def _draw_samples(rows: Sequence[Row], path: Path) -> None:
    """So many rows of different images, those whose ids have the smallest hashes."""
    shuffled = sorted(rows, key=lambda row: hashlib.sha256(row["id"].encode()).hexdigest())
    chosen = list({row["image_sha256"]: row for row in reversed(shuffled)}.values())[: -SAMPLES - 1 : -1]
    figure = Figure(figsize=(12, 10), layout="constrained")
    axes = list(figure.subplots(3, 4).flat)
    for axis in axes:
        axis.axis("off")
    for axis, row in zip(axes, chosen, strict=False):
        axis.imshow(_thumbnail(row["image"]["bytes"]))
        lines = (f"{row['source']}, {row['source_split']}", row["question"], row["answer"])
        axis.set_title("\n".join(_shortened(line) for line in lines), fontsize=8)
    figure.savefig(path, dpi=90)


def _thumbnail(data: bytes) -> Image.Image:
    image = decode(data).convert("RGB")
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    return image


def _shortened(text: str, length: int = 48) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"
