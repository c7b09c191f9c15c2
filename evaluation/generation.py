"""Greedy answers from a model, with each image encoded once for all of its questions.

A batch holds whole images: the images go in once and `image_index` says which one each question asks about. Batches
are sorted by question length, longest first, so that little is padded and a batch too big for the memory fails at once.
What a row shows may be something else than its own image: a grey or another row's image measures what a model answers
from the question alone. A row whose image does not decode fails alone, with its reason kept.
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from datasets import Dataset
from PIL import Image

from ..image_processing_biod2c import open_image

ImageMode = Literal["normal", "blank", "shuffled"]

SHUFFLE_SEED = 0
MAX_NEW_TOKENS = 96  # SLAKE's longest answers take about 60 in a small vocabulary; cut ones would count as wrong
GREY = (127, 127, 127)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back for a row of the data set; `error` says why it could not be asked, its prediction is "" then."""

    row: int
    prediction: str = ""
    error: str | None = None


def answer_rows(
    model: Any,
    processor: Any,
    dataset: Dataset,
    rows: Sequence[int],
    shown: Sequence[int],
    *,
    batch_size: int,
    max_new_tokens: int,
    blank: bool = False,
) -> Iterator[list[Answer]]:
    """Ask the given row indices of `dataset`, a batch at a time.

    `dataset` has the columns question and image, the latter undecoded (bytes and path), and may have history.
    `shown[row]` is the row whose image is shown for `row` (`shown_rows`); where `blank`, a grey one of its size is.
    """
    questions = dataset["question"][:]
    lengths = [len(questions[row]) for row in rows]
    for batch in plan_batches([shown[row] for row in rows], lengths, batch_size):
        batch_rows = [rows[position] for position in batch]
        images, errors = _load_images(dataset, {shown[row] for row in batch_rows}, blank)
        failed = {row: errors[shown[row]] for row in batch_rows if shown[row] in errors}
        failed |= {row: "the question is empty" for row in batch_rows if not questions[row].strip()}
        asked = [row for row in batch_rows if row not in failed]
        prompts = [(_prompt(processor, dataset[row]), shown[row]) for row in asked]
        predictions = _generate(model, processor, images, prompts, max_new_tokens)
        answers = [Answer(row=row, prediction=text) for row, text in zip(asked, predictions, strict=True)]
        yield answers + [Answer(row=row, error=error) for row, error in failed.items()]


def plan_batches(images: Sequence[Hashable], lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Positions in batches of at most `batch_size`, longest questions first, an image's questions always together.

    An image with more questions than that gets a batch of its own: encoding it twice would cost more than it saves.
    """
    positions = defaultdict(list)
    for position, image in enumerate(images):
        positions[image].append(position)
    groups = [sorted(group, key=lambda position: -lengths[position]) for group in positions.values()]
    batches: list[list[int]] = []
    for group in sorted(groups, key=lambda group: -lengths[group[0]]):
        if batches and len(batches[-1]) + len(group) <= batch_size:
            batches[-1].extend(group)
        else:
            batches.append(list(group))
    return batches


def shown_rows(images: Sequence[str], mode: ImageMode) -> list[int]:
    """For each row the index of the row whose image is shown with its question: the first one that has the image.

    "shuffled" shows another image of the data set, the same one for all questions of an image, never its own. Raises
    ValueError where there is no other.
    """
    first_row: dict[str, int] = {}
    for row, image in enumerate(images):
        first_row.setdefault(image, row)
    if mode != "shuffled":
        return [first_row[image] for image in images]
    if len(first_row) < 2:
        raise ValueError("shuffled images need at least two different images")
    order = sorted(first_row)
    random.Random(SHUFFLE_SEED).shuffle(order)
    successor = dict(zip(order, order[1:] + order[:1], strict=True))
    return [first_row[successor[image]] for image in images]


def decode_image(encoded: Mapping[str, Any] | None) -> Image.Image:
    """The picture in an undecoded image column's {bytes, path}, completely decoded.

    Raises ValueError where there is none, or a damaged one.
    """
    if encoded is None:
        raise ValueError("the row has no image")
    return open_image(encoded["path"] if encoded["bytes"] is None else encoded["bytes"])


def _load_images(dataset: Dataset, rows: set[int], blank: bool) -> tuple[dict[int, Image.Image], dict[int, str]]:
    """The rows' images, and for those that do not decode the reason; grey ones of the same size where `blank`."""
    images, errors = {}, {}
    for row in sorted(rows):
        try:
            image = decode_image(dataset[row]["image"])
        except ValueError as error:
            errors[row] = str(error)
        else:
            images[row] = Image.new("RGB", image.size, GREY) if blank else image
    return images, errors


def _prompt(processor: Any, row: Mapping[str, Any]) -> str:
    """The question alone, which the processor puts into its prompt; after earlier turns the whole dialogue."""
    if not row.get("history"):
        return row["question"]
    turns = [*row["history"], {"role": "user", "content": row["question"]}]
    messages = [{"role": turn["role"], "content": [{"type": "text", "text": turn["content"]}]} for turn in turns]
    first = next(message for message in messages if message["role"] == "user")
    first["content"].insert(0, {"type": "image"})
    return processor.apply_chat_template(messages, add_generation_prompt=True)


def _generate(
    model: Any,
    processor: Any,
    images: Mapping[int, Image.Image],
    prompts: Sequence[tuple[str, int]],
    max_new_tokens: int,
) -> list[str]:
    """Greedy answers to (prompt, image) pairs through the model's public interface, white space stripped."""
    if not prompts:
        return []
    place = {image: position for position, image in enumerate(images)}
    inputs = processor(
        images=list(images.values()),
        text=[prompt for prompt, _ in prompts],
        image_index=[place[image] for _, image in prompts],
        return_tensors="pt",
    ).to(model.device, model.dtype)
    sequences = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1)
    answers = processor.batch_decode(sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return [answer.strip() for answer in answers]
