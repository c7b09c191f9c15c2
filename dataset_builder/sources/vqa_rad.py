"""VQA-RAD (Lau et al., Scientific Data 2018; CC0 1.0), as OSF gives it: one JSON list and a folder of images.

There is no split field: a row is a test row if its phrase_type starts with "test" (test_freeform, test_para). Almost
every test image is a training image too, so to hold images out one must split the training rows by image. Quirks that
are mended and counted: a byte order mark, one id that is a string, five answers that are numbers, "CLOSED " with a
blank, question types with typing errors or several values, tabs where commas were, and rows without question_rephrase
(which is not read at all).
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..report import BadRowError, Report, SourceError
from ..schema import Row, new_row
from .raw import ImageFolder, answer, answer_type, image_columns, make_rows, optional_text, text

JSON_FILE = "VQA_RAD Dataset Public.json"
IMAGE_FOLDER = "VQA_RAD Image Folder"
LICENSE = "CC0-1.0"
TYPING_ERRORS = {"ATRIB": "ATTRIB", "PRSE": "PRES", "Other": "OTHER"}


def read_vqa_rad(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield VQA-RAD's rows in the order of its file, all of them English; SourceError without the file or without "en".

    `organ` is the row's `image_organ` (HEAD, CHEST, ABD), `image_id` its `image_name`; there is no modality.
    """
    path = root / JSON_FILE
    if not path.is_file():
        raise SourceError(f"{root}: no '{JSON_FILE}'; expected this file and '{IMAGE_FOLDER}/' in this folder")
    if "en" not in languages:
        raise SourceError(f"vqa_rad: languages {list(languages)} asked for, but VQA-RAD has English rows only")
    images = ImageFolder(root / IMAGE_FOLDER, "image_name")
    splits = set()
    for row in make_rows("vqa_rad", path, report, lambda record: vqa_rad_row(record, images, report), set()):
        splits.add(row["source_split"])
        yield row
    report.notes.extend(f"vqa_rad: no rows of the {split} split" for split in ("train", "test") if split not in splits)
    unused = {file.name for file in images.root.iterdir()} - images.names()
    if unused:
        report.quirks["vqa_rad: image that no row asks about"] += len(unused)


def vqa_rad_row(record: Mapping[str, Any], images: ImageFolder, report: Report) -> Row:
    """One row in the schema. BadRowError if a field cannot be used."""
    name = text(record, "image_name", report)
    phrase_type = text(record, "phrase_type", report)
    return new_row(
        id=f"vqa_rad-{record_id(record, report)}",
        question=text(record, "question", report),
        answer=answer(record, report),
        answer_type=answer_type(record, report),
        question_type=question_type(optional_text(record, "question_type", report), report),
        organ=optional_text(record, "image_organ", report),
        language="en",
        source="vqa_rad",
        source_split="test" if phrase_type.startswith("test") else "train",
        license=LICENSE,
        **image_columns(name, images.read(name)),
    )


def record_id(record: Mapping[str, Any], report: Report) -> int:
    """The row's `qid` as a number; BadRowError if it is none."""
    qid = record.get("qid")
    if isinstance(qid, str) and qid.strip().isdecimal():
        report.quirks["qid: a text, read as a number"] += 1
        return int(qid)
    if not isinstance(qid, int):
        raise BadRowError("qid", qid, "a whole number", "mend the row in the file")
    return qid


def question_type(value: str | None, report: Report) -> str | None:
    """The type with known typing errors mended; several types stay one text, "PRES, POS", in the source's order."""
    if value is None:
        return None
    types = [part.strip() for part in value.split(",")]
    mended = [TYPING_ERRORS.get(part, part) for part in types]
    if mended != types:
        report.quirks["question_type: typing error mended"] += 1
    if len(mended) > 1:
        report.quirks["question_type: several types in one field, kept"] += 1
    return ", ".join(mended)
