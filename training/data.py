"""Rows of a dataset to batches: prompts with only the answers to learn, each image once for all its questions.

Unusual here: a batch is not a row's image and a row's text. The rows of one image stand together, the image is decoded
and encoded once, and `image_index` says which row asks which image.
"""

import json
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from PIL import Image as PILImage
from torch.utils.data import Sampler
from transformers import TrainerCallback

from ..image_processing_biod2c import open_image, upright_rgb
from ..processing_biod2c import BioD2CProcessor
from .recipe import Recipe


def load_rows(recipe: Recipe, split: str, seed: int | None = None) -> Dataset:
    """The recipe's rows of one split, their images still encoded; with a seed, weighted as the recipe's sources say.

    Raises:
        ValueError: if the dataset lacks the split or one of the recipe's sources.
    """
    rows = load_dataset(recipe.dataset, recipe.dataset_config, split=split)
    rows = rows.cast_column("image", Image(decode=False))  # decoded once an image, in the collator
    if not recipe.sources:
        return rows
    weights = dict.fromkeys(recipe.sources, 1.0) if seed is None else recipe.sources
    return rows.select(weigh(rows["source"], weights, seed or 0))


def weigh(sources: Sequence[str], weights: Mapping[str, float], seed: int) -> list[int]:
    """Row numbers in which each source's rows stand `weight` times: of 2.5, twice all and once a random half.

    Raises:
        ValueError: for a source that is not there or a weight that is not above 0.
    """
    numbers, random, chosen = np.asarray(sources), np.random.default_rng(seed), []
    for source, weight in weights.items():
        own = np.flatnonzero(numbers == source)
        if not len(own):
            raise ValueError(f"sources: no row of {source}; there are {', '.join(sorted(set(sources)))}")
        if not weight > 0:
            raise ValueError(f"sources: {source} has weight {weight}, must be above 0")
        whole, part = divmod(weight, 1)
        chosen += [own] * int(whole) + [random.choice(own, round(part * len(own)), replace=False)]
    return sorted(np.concatenate(chosen).tolist())


class AnswerCollator:
    """Rows -> a batch with labels: -100 everywhere but on the answers and their end tokens.

    A row whose image cannot be read is left out, and its id and the reason are written to the file `bad_samples`.
    """

    def __init__(
        self, processor: BioD2CProcessor, queue_size: int, image_cache: int = 0, bad_samples: Path | None = None
    ) -> None:
        self.processor, self.queue_size, self.bad_samples = processor, queue_size, bad_samples
        self.images = ImageCache(processor, image_cache)

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Raises ValueError if none of the rows has an image that can be read."""
        images: dict[str, PILImage.Image] = {}  # decoded once, in the order in which they are met
        rows = [row for row in rows if self._read_image(row, images)]
        if not rows:
            raise ValueError(f"no row of a batch has an image that can be read; the reasons are in {self.bad_samples}")
        position = {sha256: number for number, sha256 in enumerate(images)}
        batch = self.processor.apply_chat_template(
            [self._conversation(row) for row in rows],
            tokenize=True,
            return_dict=True,
            return_assistant_tokens_mask=True,
            return_tensors=None,  # lists until the end: transformers walks over the offsets in Python
            processor_kwargs={
                "images": [[image] for image in images.values()],
                "image_index": [position[row["image_sha256"]] for row in rows],
                "queue": [row["queue"][: self.queue_size] for row in rows],
            },
        )
        batch = batch.convert_to_tensors("pt")
        answers = batch.pop("assistant_masks").bool()
        batch["labels"] = batch["input_ids"].masked_fill(~answers, -100)
        if "queue_input_ids" not in batch:
            # an absent queue rather than none: under ZeRO-3 all processes must use the same weights in the same order
            absent = torch.zeros_like(batch["question_input_ids"])[:, None]
            batch |= {"queue_input_ids": absent, "queue_attention_mask": absent}
        return dict(batch)

    def _read_image(self, row: dict[str, Any], images: dict[str, PILImage.Image]) -> bool:
        """Add the row's image to `images` unless it is there; False, and a record, if it cannot be read."""
        try:
            if row["image_sha256"] not in images:
                images[row["image_sha256"]] = self.images.get(row)
        except ValueError as error:
            if self.bad_samples is None:
                raise ValueError(f"row {row['id']}: {error}") from error
            record = {"id": row["id"], "image_id": row["image_id"], "source": row["source"], "error": str(error)}
            with self.bad_samples.open("a") as stream:  # one write a line: data loader processes share the file
                stream.write(json.dumps(record) + "\n")
            return False
        return True

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
            source = row["image"]["path"] if row["image"]["bytes"] is None else row["image"]["bytes"]
            image = upright_rgb(open_image(source)).resize(self.size, self.resample)
        self.kept[row["image_sha256"]] = image
        if len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return image


class ImageGroupedSampler(Sampler[int]):
    """Shuffled rows in groups of up to `rows_per_image` of one image, neighbours of like length.

    A batch is a run of neighbours: its rows share images, each encoded once, and few are padded far. Which rows of an
    image meet, and which groups, changes from epoch to epoch; both depend on `seed` and the epoch alone.
    """

    GROUPS_SORTED = 64  # sorted by length among so many: batches are even, yet an epoch is mixed

    def __init__(self, images: Sequence[str], lengths: Sequence[int], rows_per_image: int, seed: int) -> None:
        self.lengths, self.rows_per_image, self.seed, self.epoch = lengths, rows_per_image, seed, 0
        self.rows_of: dict[str, list[int]] = {}
        for row, image in enumerate(images):
            self.rows_of.setdefault(image, []).append(row)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        jittered = np.asarray(self.lengths) * random.uniform(0.7, 1.3, len(self))
        groups = []
        for rows in self.rows_of.values():
            ordered = sorted(rows, key=jittered.__getitem__)
            groups += [ordered[i : i + self.rows_per_image] for i in range(0, len(rows), self.rows_per_image)]
        random.shuffle(groups)
        for i in range(0, len(groups), self.GROUPS_SORTED):
            for group in sorted(groups[i : i + self.GROUPS_SORTED], key=lambda group: jittered[group].max()):
                yield from group


class BadSampleLimit(TrainerCallback):
    """Ends the run in error when more than `limit` (a share) of `num_rows` could not be read."""

    def __init__(self, bad_samples: Path, num_rows: int, limit: float) -> None:
        self.bad_samples, self.num_rows, self.limit = bad_samples, num_rows, limit

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        if not self.bad_samples.exists():
            return
        count = len({json.loads(line)["id"] for line in self.bad_samples.read_text().splitlines()})
        if count > self.limit * self.num_rows:
            raise ValueError(
                f"{count} of {self.num_rows} rows could not be read, more than the limit of {self.limit:.1%}; the "
                f"reasons are in {self.bad_samples}. Mend them, or raise bad_sample_limit"
            )


def text_lengths(rows: Dataset) -> list[int]:
    """Characters of each row's question, answer and earlier turns: near enough to order rows by their tokens."""
    turns = [sum(len(turn["content"]) for turn in history) for history in rows["history"]]
    return [sum(map(len, texts)) + n for *texts, n in zip(rows["question"], rows["answer"], turns, strict=True)]
