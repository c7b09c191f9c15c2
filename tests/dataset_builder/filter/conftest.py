"""Figures like those of papers, composed from real medical images, and tables and plots drawn here.

Clean: single images and figures of two to six panels. Polluted: figures of seven to sixteen panels, tables, charts and
flow charts. The images of examples/slake are dealt out to groups first and a figure draws on its group alone, so what
is held out by group shares no image with what is learned from.
"""

import hashlib
import io
import json
import math

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

GROUPS = 34  # of 16 images each


def panels(rng, images, count):
    """A figure of `count` images in a grid, lettered or not, on white or black."""
    columns = int(rng.integers(math.ceil(count / 4), min(count, 4) + 1))
    cell, gap = (int(size) for size in rng.integers((50, 1), (100, 8)))
    size = (columns * (cell + gap) + gap, math.ceil(count / columns) * (cell + gap) + gap)
    figure = Image.new("RGB", size, str(rng.choice(["white", "white", "black"])))
    lettered = rng.random() < 0.6
    for place, image in enumerate(rng.permutation(len(images))[:count]):
        corner = [gap + step * (cell + gap) for step in (place % columns, place // columns)]
        figure.paste(images[image].resize((cell, cell)), corner)
        if lettered:
            ImageDraw.Draw(figure).text(corner, chr(ord("A") + place), "white", ImageFont.load_default(14))
    return figure


def table(rng, images):
    """Rules, a header and cells of numbers."""
    rows, columns = (int(n) for n in rng.integers((4, 3), (12, 7)))
    figure = Image.new("RGB", (70 * columns + 20, 24 * rows + 20), "white")
    draw = ImageDraw.Draw(figure)
    for row in range(rows + 1):
        if row < 2 or row == rows or rows % 2:
            draw.line((10, 10 + 24 * row, figure.width - 10, 10 + 24 * row), "black")
        for column in range(columns if row < rows else 0):
            text = f"Group {column}" if row == 0 else f"{rng.normal(50, 20):.1f}"
            draw.text((14 + 70 * column, 14 + 24 * row), text, "black", ImageFont.load_default(12))
    return figure


def chart(rng, images):
    """Bars, lines or points, as matplotlib draws them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=rng.uniform((3, 2), (6, 4)), dpi=60)
    axes = figure.subplots()
    x = np.arange(int(rng.integers(4, 10)))
    kind = rng.choice(["bars", "o", "-"])
    for series in range(int(rng.integers(1, 4))):
        y = rng.uniform(1, 9, len(x))
        if kind == "bars":
            axes.bar(x + 0.25 * series, y, 0.25)
        else:
            axes.plot(x, y, kind)
    axes.set(xlabel="weeks", ylabel="score")
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return Image.open(stream).convert("RGB")


def flow_chart(rng, images):
    """Boxes with text, joined by arrows."""
    steps = int(rng.integers(3, 7))
    figure = Image.new("RGB", (int(rng.integers(200, 320)), 60 * steps), "white")
    draw = ImageDraw.Draw(figure)
    for step in range(steps):
        left = int(rng.integers(10, 80))
        draw.rectangle(
            (left, 60 * step + 10, left + 110, 60 * step + 45), str(rng.choice(["white", "lightblue"])), "black"
        )
        draw.text((left + 8, 60 * step + 18), f"n = {rng.integers(10, 900)}", "black", ImageFont.load_default(13))
        if step:
            draw.line((left + 55, 60 * step - 15, left + 55, 60 * step + 10), "black", 2)
    return figure


def clean(rng, images):
    count = int(rng.choice([1, 1, 2, 3, 4, 5, 6]))
    return images[int(rng.integers(len(images)))] if count == 1 else panels(rng, images, count)


def polluted(rng, images):
    draw = rng.choice([panels, panels, table, chart, flow_chart])
    return panels(rng, images, int(rng.integers(7, 17))) if draw is panels else draw(rng, images)


def encoded(image):
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=90)
    return stream.getvalue()


@pytest.fixture(scope="session")
def figures(examples):
    """[(bytes, label, group)]: four clean and four polluted figures of each group."""
    paths = sorted((examples / "slake" / "imgs").glob("*/source.jpg"))
    order = np.random.default_rng(0).permutation(len(paths))
    made = []
    for group, members in enumerate(np.array_split(order, GROUPS)):
        rng = np.random.default_rng(group)
        images = [Image.open(paths[member]).convert("RGB").resize((160, 160)) for member in members]
        for label, draw in (("clean", clean), ("polluted", polluted)):
            made += [(encoded(draw(rng, images)), label, f"article{group}") for _ in range(4)]
    return made


@pytest.fixture(scope="session")
def make_dataset(tmp_path_factory):
    """A dataset's folder with the rows [(bytes, group, caption)], as load_dataset opens it: half of them in `default`,
    all of them, twice, in `other`."""
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo
    from datasets.info import DatasetInfosDict
    from huggingface_hub import DatasetCard, DatasetCardData

    from biod2c.dataset_builder.schema import FEATURES, new_row

    def write(path, rows):
        path.parent.mkdir(parents=True, exist_ok=True)
        columns = [
            new_row(
                id=f"{path.stem} {number}",
                image={"bytes": data, "path": f"{number}.jpg"},
                image_id=f"{number}.jpg",
                image_sha256=hashlib.sha256(data).hexdigest(),
                image_phash="0" * 64,
                question=f"Question {number}?",
                answer="Yes",
                caption=caption,
                source="pmc",
                source_split="train",
                license="CC-BY-4.0",
                group=group,
            )
            for number, (data, group, caption) in enumerate(rows)
        ]
        Dataset.from_list(columns, features=FEATURES).to_parquet(path)

    def make(rows):
        folder = tmp_path_factory.mktemp("figures") / "dataset"
        half = len(rows) // 2
        splits = {
            ("default", "train"): rows[:half],
            ("other", "train"): rows[half:] + rows,
            ("other", "test"): rows[:half],
        }
        data, configs, infos = DatasetCardData(), {}, {}
        for (config, split), members in splits.items():
            write(folder / "data" / config / f"{split}-00000.parquet", members)
            files = {"split": split, "path": [f"data/{config}/{split}-00000.parquet"]}
            configs.setdefault(config, []).append(files)
            infos.setdefault(config, DatasetInfo(features=FEATURES, splits=SplitDict()))
            infos[config].splits.add(SplitInfo(split, 0, len(members)))
        data["configs"] = [{"config_name": name, "data_files": files} for name, files in configs.items()]
        DatasetInfosDict(infos).to_dataset_card_data(data)
        (folder / "README.md").write_text(str(DatasetCard(f"---\n{data.to_yaml()}\n---\n\n# Figures\n")))
        return folder

    return make


@pytest.fixture(scope="session")
def dataset(make_dataset, figures):
    """A dataset of the figures and one that does not decode."""
    rows = [(data, group, f"A {label} figure.") for data, label, group in figures]
    return make_dataset([*rows, (figures[0][0][:600], "broken", None)])


@pytest.fixture(scope="session")
def label_lines(figures):
    """Lines of labels.jsonl that are all true."""
    return [
        {
            "image_sha256": hashlib.sha256(data).hexdigest(),
            "label": label,
            "annotator": "a",
            "time": "2026-01-01T00:00Z",
        }
        for data, label, _ in figures
    ]


@pytest.fixture(scope="session")
def encoder(tmp_path_factory):
    """A tiny image encoder with random weights and PMC-CLIP's attention pool."""
    import torch

    from biod2c import BioD2CVisionConfig
    from biod2c.modeling_biod2c import BioD2CVisionModel

    torch.manual_seed(0)
    config = BioD2CVisionConfig(
        layers=(1, 1, 1, 1), width=8, image_size=64, attention_pool=True, attention_pool_heads=4, projection_dim=128
    )
    folder = tmp_path_factory.mktemp("encoder") / "tiny"
    BioD2CVisionModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory, dataset, label_lines, encoder):
    """(the filter's folder, its record), trained on every label."""
    from biod2c.dataset_builder.filter.train import train_filter

    folder = tmp_path_factory.mktemp("filter")
    (folder / "labels.jsonl").write_text("".join(json.dumps(line) + "\n" for line in label_lines))
    return folder / "filter", train_filter(dataset, folder / "labels.jsonl", encoder, folder / "filter", precision=0.9)
