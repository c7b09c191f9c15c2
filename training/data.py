"""Rows of a dataset to batches: prompts with only the answers to learn, each image once for all its questions.

Unusual here: a batch is not a row's image and a row's text. The rows of one image stand together, the image is decoded
and encoded once, and `image_index` says which row asks which image.
"""

import fcntl
import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from PIL import Image as PILImage
from torch.utils.data import Sampler
from transformers import TrainerCallback, TrainerState, TrainingArguments

from ..image_processing_biod2c import open_image, upright_rgb
from ..processing_biod2c import BioD2CProcessor


class AnswerCollator:
    """Rows -> a batch with labels: -100 everywhere but on the answers and their end tokens.

    A row whose image cannot be read is left out, and its id and the reason are written to the file `bad_samples`, once.
    A batch without any other is a blank row, which counts for nothing. Rows that are None, which Trainer passes over
    (see `RowStream`), make an empty batch.
    """

    def __init__(
        self, processor: BioD2CProcessor, queue_size: int, image_cache: int = 0, bad_samples: Path | None = None
    ) -> None:
        self.processor, self.queue_size, self.bad_samples = processor, queue_size, bad_samples
        self.images = ImageCache(processor, image_cache)

    def __call__(self, rows: list[Any]) -> dict[str, torch.Tensor]:
        if rows[0] is None:
            return {}
        images: dict[str, PILImage.Image] = {}  # decoded once, in the order in which they are met
        rows = [row for row in rows if self._read_image(row, images)]
        if not rows:
            rows = [blank_row()]
            self._read_image(rows[0], images)
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
                "queue": [(row["queue"] or [])[: self.queue_size] for row in rows],
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
            add_once(record, self.bad_samples)
            return False
        return True

    def _conversation(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        question = [{"type": "image"}, {"type": "text", "text": row["question"]}]
        turns = [*(row["history"] or []), {"role": "user", "content": question}]
        return turns if row["answer"] is None else [*turns, {"role": "assistant", "content": row["answer"]}]


def add_once(record: dict[str, str], path: Path) -> None:
    """Add a line to a file that several processes write, unless an earlier epoch, or the run that this one continues,
    has left one with its id there."""
    with path.open("a+") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)  # until it is closed
        stream.seek(0)
        if all(json.loads(line)["id"] != record["id"] for line in stream):
            stream.write(json.dumps(record) + "\n")


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
            if row["image"] is None:
                raise ValueError("the row has no image")
            source = row["image"]["path"] if row["image"]["bytes"] is None else row["image"]["bytes"]
            image = upright_rgb(open_image(source)).resize(self.size, self.resample)
        self.kept[row["image_sha256"]] = image
        if len(self.kept) > self.capacity:
            self.kept.popitem(last=False)
        return image


class GroupedSampler(Sampler[int]):
    """Shuffled rows in groups of up to `rows_per_image` of one image, neighbours of like length.

    A batch is a run of neighbours: its rows share images, each encoded once, and few are padded far. Which rows of an
    image meet, and which groups, changes from epoch to epoch; both depend on `seed` and the epoch alone.

    Args:
        images: what tells apart the rows' images; with rows_per_image=1, only lengths bring rows together.
        sorted_groups: sorted by length among so many: batches are even, yet an epoch is mixed.
    """

    def __init__(
        self,
        images: Sequence[Any],
        lengths: Sequence[int],
        rows_per_image: int,
        seed: int,
        sorted_groups: int = 64,
    ) -> None:
        self.lengths, self.rows_per_image, self.sorted_groups = lengths, rows_per_image, sorted_groups
        self.seed, self.epoch = seed, 0
        self.rows_of: dict[Any, list[int]] = {}
        for row, image in enumerate(images):
            self.rows_of.setdefault(image, []).append(row)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        random = np.random.default_rng((self.seed, self.epoch))
        lengths = np.asarray(self.lengths)
        if self.rows_per_image > 1:  # else the same rows of an image would meet in every epoch
            lengths = lengths * random.uniform(0.7, 1.3, len(self))
        groups = []
        for rows in self.rows_of.values():
            ordered = sorted(rows, key=lengths.__getitem__)
            groups += [ordered[i : i + self.rows_per_image] for i in range(0, len(rows), self.rows_per_image)]
        random.shuffle(groups)
        for i in range(0, len(groups), self.sorted_groups):
            for group in sorted(groups[i : i + self.sorted_groups], key=lambda group: lengths[group].max()):
                yield from group


def blank_row() -> dict[str, Any]:
    """A row with an image and a question, but no answer to learn and no queue: it adds nothing to any loss."""
    buffer = BytesIO()
    PILImage.new("RGB", (1, 1)).save(buffer, "PNG")
    image = {"bytes": buffer.getvalue(), "path": None}
    return {"image": image, "image_sha256": "", "history": [], "question": "?", "answer": None, "queue": []}


class EvenRows(torch.utils.data.Dataset):
    """Held-out rows, and after them as many blank ones as make the last batches of all processes full.

    accelerate would repeat the first rows, and the held-out losses would count these twice. No process may go without:
    under ZeRO-3 the others would wait for it.
    """

    def __init__(self, rows: Dataset, round_size: int) -> None:
        self.rows, self.round_size = rows, round_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.round_size) * self.round_size

    def __getitem__(self, number: int) -> dict[str, Any]:
        return self.rows[number] if number < len(self.rows) else blank_row()


class BadSampleLimit(TrainerCallback):
    """Ends the run in error when more than `limit` (a share) of `num_rows` could not be read.

    Of a stream, whose rows nobody has counted (None), it is a share of the rows trained on so far, or of the first
    FIRST_ROWS.
    """

    FIRST_ROWS = 1000

    def __init__(self, bad_samples: Path, num_rows: int | None, limit: float) -> None:
        self.bad_samples, self.num_rows, self.limit = bad_samples, num_rows, limit

    def on_step_end(self, args: TrainingArguments, state: TrainerState, *_: Any, **kwargs: Any) -> None:
        if not self.bad_samples.exists():
            return
        count = len(self.bad_samples.read_text().splitlines())
        step_rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
        num_rows = self.num_rows or max(self.FIRST_ROWS, state.global_step * step_rows)
        if count > self.limit * num_rows:
            raise ValueError(
                f"{count} of {num_rows} rows could not be read, more than the limit of {self.limit:.1%}; the reasons "
                f"are in {self.bad_samples}. Mend them and remove that file, or raise bad_sample_limit"
            )


def text_lengths(rows: Dataset) -> list[int]:
    """Characters of each row's question, answer and earlier turns: near enough to order rows by their tokens."""
    turns = [sum(len(turn["content"]) for turn in history or []) for history in rows["history"]]
    return [sum(map(len, texts)) + n for *texts, n in zip(rows["question"], rows["answer"], turns, strict=True)]
