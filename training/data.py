"""Rows of a dataset to batches: prompts with only the answers to learn, each image once for all its questions.

Unusual here: a batch is not a row's image and a row's text. The rows of one image stand together, the image is decoded
and encoded once, and `image_index` says which row asks which image.
"""

import io
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import Sampler

from ..image_processing_biod2c import upright_rgb
from ..processing_biod2c import BioD2CProcessor
from .recipe import Recipe


def load_rows(recipe: Recipe, split: str) -> Dataset:
    """The recipe's rows of one split, their images still encoded.

    Raises:
        ValueError: if the dataset lacks the split or the recipe's sources leave no row.
    """
    rows = load_dataset(recipe.dataset, recipe.dataset_config, split=split)
    rows = rows.cast_column("image", Image(decode=False))  # decoded once an image, in the collator
    if recipe.sources:
        wanted = set(recipe.sources)
        rows = rows.select([i for i, source in enumerate(rows["source"]) if source in wanted])
    if len(rows) == 0:
        raise ValueError(f"{recipe.dataset}, {recipe.dataset_config}/{split}: no row of the sources {recipe.sources}")
    return rows


class AnswerCollator:
    """Rows -> a batch with labels: -100 everywhere but on the answers and their end tokens."""

    def __init__(self, processor: BioD2CProcessor, queue_size: int, image_cache: int = 0) -> None:
        self.processor, self.queue_size = processor, queue_size
        self.images = ImageCache(processor, image_cache)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        positions: dict[str, int] = {}
        image_index = [positions.setdefault(row["image_sha256"], len(positions)) for row in rows]
        first = {row["image_sha256"]: row for row in reversed(rows)}
        images = [[self.images.get(first[sha256])] for sha256 in positions]
        batch = self.processor.apply_chat_template(
            [self._conversation(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=None,  # lists until the end: transformers walks over the offsets in Python
            processor_kwargs={
                "images": images,
                "image_index": image_index,
                "queue": [row["queue"][: self.queue_size] for row in rows],
            },
        )
        batch = batch.convert_to_tensors("pt")
        answers = batch.pop("assistant_masks").bool()
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
        return dict(batch)

    def _conversation(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        question = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        return [
            *row["history"],
            {"role": "user", "content": question},
            {"role": "assistant", "content": row["answer"]},
        ]


class ImageCache:
    """Decoded images at the model's size, the least recently used forgotten beyond `capacity`."""

    def __init__(self, processor: BioD2CProcessor, capacity: int) -> None:
        size = processor.image_processor.size
        self.size, self.resample = (size["width"], size["height"]), processor.image_processor.resample
        self.capacity = capacity
        self.kept: OrderedDict[str, PILImage.Image] = OrderedDict()

    def get(self, row: dict[str, Any]) -> PILImage.Image:
        image = self.kept.pop(row["image_sha256"], None)
        if image is None:
            image = upright_rgb(PILImage.open(io.BytesIO(row["image"]["bytes"]))).resize(self.size, self.resample)
        self.kept[row["image_sha256"]] = image
        if len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return image


class ImageGroupedSampler(Sampler[int]):
    """Shuffled rows in groups of up to `rows_per_image` of one image, so that neighbours in a batch share their
    image."""

    def __init__(self, images: list[str], rows_per_image: int, seed: int) -> None:
        self.rows_per_image, self.seed, self.epoch = rows_per_image, seed, 0
        self.rows_of: dict[str, list[int]] = {}
        for row, image in enumerate(images):
            self.rows_of.setdefault(image, []).append(row)
        self.length = len(images)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        groups = []
        for rows in self.rows_of.values():
            shuffled = [rows[i] for i in torch.randperm(len(rows), generator=generator)]
            groups += [shuffled[i : i + self.rows_per_image] for i in range(0, len(rows), self.rows_per_image)]
        for i in torch.randperm(len(groups), generator=generator).tolist():
            yield from groups[i]
