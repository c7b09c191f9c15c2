"""SLAKE (Liu et al., ISBI 2021; CC BY 4.0): train.json, validate.json, test.json and imgs/xmlabN/{source.jpg,
detection.json}.

English and Chinese rows lie in the same files, and their splits were drawn independently: 72 of the 96 images of the
English test are in the Chinese training split. So only English is read unless `languages` says otherwise. A mirror
calls validate.json validation.json. detection.json is a list of one-entry objects {label: [x, y, width, height]}, in
pixels from the upper left corner; a label can come several times.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..regions import Box
from ..report import BadRowError, Report, SourceError
from ..schema import Row, new_row
from .raw import ImageFolder, answer, answer_type, image_columns, make_rows, optional_text, read_json_list, text

SPLIT_FILES = {
    "train": ("train.json",),
    "validation": ("validate.json", "validation.json"),
    "test": ("test.json",),
}
LANGUAGES = ("en", "zh")
LICENSE = "CC-BY-4.0"


def read_slake(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield SLAKE's rows in the order of its files, only those in `languages` ("en", "zh").

    A split file that is not there is noted in `report`; SourceError if none is there. `organ` is the row's `location`,
    `question_type` its `content_type`, `image_id` its `img_name`.
    """
    if not set(languages) <= set(LANGUAGES):
        raise SourceError(f"slake: languages {list(languages)} asked for, but SLAKE has only {list(LANGUAGES)}")
    splits = find_splits(root, report)
    images = ImageFolder(root / "imgs", "img_name")
    seen_ids: set[str] = set()
    for split, path in splits.items():
        make_row = partial(slake_row, split=split, images=images, languages=languages, report=report)
        yield from make_rows("slake", path, report, make_row, seen_ids)


def find_splits(root: Path, report: Report) -> dict[str, Path]:
    """The split files that are there, by split."""
    found: dict[str, Path] = {}
    for split, names in SPLIT_FILES.items():
        paths = [root / name for name in names if (root / name).is_file()]
        if paths:
            found[split] = paths[0]
        else:
            report.notes.append(f"slake: no {' or '.join(names)}, so no {split} split")
    if not found:
        raise SourceError(
            f"{root}: no SLAKE split file; expected train.json, validate.json or test.json in this folder"
        )
    return found


def slake_row(
    record: Mapping[str, Any], *, split: str, images: ImageFolder, languages: Sequence[str], report: Report
) -> Row | None:
    """One row in the schema; None if it is in another language. BadRowError if a field cannot be used."""
    language = record.get("q_lang")
    if language not in LANGUAGES:
        raise BadRowError("q_lang", language, f"one of {', '.join(LANGUAGES)}", "mend the row in the file")
    if language not in languages:
        report.quirks[f"slake: row in language {language} left out"] += 1
        return None
    name = text(record, "img_name", report)
    return new_row(
        id=f"slake-{record_id(record)}",
        question=text(record, "question", report),
        answer=answer(record, report),
        answer_type=answer_type(record, report),
        question_type=optional_text(record, "content_type", report),
        organ=optional_text(record, "location", report),
        modality=optional_text(record, "modality", report),
        language=language,
        source="slake",
        source_split=split,
        license=LICENSE,
        **image_columns(name, images.read(name)),
    )


def record_id(record: Mapping[str, Any]) -> int:
    """The row's `qid`; BadRowError if it has none."""
    qid = record.get("qid")
    if not isinstance(qid, int):
        raise BadRowError("qid", qid, "a whole number", "mend the row in the file")
    return qid


def read_boxes(root: Path, image_id: str, report: Report) -> list[Box]:
    """The organs and findings that detection.json marks in an image (`image_id` is the row's, "xmlab1/source.jpg").

    A missing file means no box; a broken file or box is put into the report and left out.
    """
    path = (root / "imgs" / image_id).with_name("detection.json")
    if not path.is_file():
        report.quirks["slake: image without detection.json"] += 1
        return []
    try:
        entries = read_json_list(path, report)
    except SourceError as error:
        report.skip("slake", path, None, BadRowError("file", str(error), "a JSON list", "fetch the file again"))
        return []
    boxes: list[Box] = []
    for entry in entries:
        try:
            boxes.extend(boxes_of(entry))
        except BadRowError as error:
            report.skip("slake", path, None, error)
    return boxes


def boxes_of(entry: Any) -> list[Box]:
    """The boxes of one entry; BadRowError unless each has four finite numbers, the last two above 0."""
    if not isinstance(entry, dict):
        raise BadRowError("entry", entry, "an object {label: [x, y, width, height]}", "mend the file")
    for label, numbers in entry.items():
        four = isinstance(numbers, list) and len(numbers) == 4 and all(isinstance(n, int | float) for n in numbers)
        if not four or not all(map(math.isfinite, numbers)) or min(numbers[2:]) <= 0:
            raise BadRowError(label, numbers, "[x, y, width, height], the last two above 0", "mend the file")
    return [Box(label, *numbers) for label, numbers in entry.items()]
