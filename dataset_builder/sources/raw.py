"""What the readers share: JSON lists, text fields and image folders, with one clear error for each thing that can be
wrong.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..images import BadImageError, ImageFile, read_image
from ..report import BadRowError, Report, SourceError
from ..schema import Row

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ANSWER_TYPES = {"OPEN": "open", "CLOSED": "closed"}

RowMaker = Callable[[Mapping[str, Any]], Row | None]


def read_json_list(path: Path, report: Report) -> list[Any]:
    """The rows of a file that holds one JSON list, with or without a byte order mark. SourceError if it does not."""
    data = path.read_bytes()
    if data.startswith(BYTE_ORDER_MARK):
        report.quirks[f"{path.name}: byte order mark removed"] += 1
    try:
        rows = json.loads(data.decode("utf-8-sig"))
    except ValueError as error:  # both not UTF-8 and not JSON
        raise SourceError(f"{path}: not readable as JSON ({error}); fetch the file again") from error
    if not isinstance(rows, list):
        raise SourceError(f"{path}: holds a {type(rows).__name__}, expected one list of rows")
    return rows


def make_rows(source: str, path: Path, report: Report, make_row: RowMaker, seen_ids: set[str]) -> Iterator[Row]:
    """Apply `make_row` to each record of a JSON list; what it refuses goes into the report, what it returns None for
    is left out.

    `seen_ids` holds the ids of the source's earlier rows, so that no id comes twice, across files as well.
    """
    for number, record in enumerate(read_json_list(path, report)):
        try:
            if not isinstance(record, dict):
                raise BadRowError("row", record, "an object with named fields", "mend the row in the file")
            row = make_row(record)
            if row is None:
                continue
            if row["id"] in seen_ids:
                raise BadRowError("qid", record["qid"], "an id that no earlier row has", "give the row its own id")
        except BadRowError as error:
            report.skip(source, path, number, error)
            continue
        seen_ids.add(row["id"])
        yield row


def text(record: Mapping[str, Any], field: str, report: Report) -> str:
    """A field as a clean string: numbers become digits, tabs and runs of blanks are mended. BadRowError if there is
    no text.
    """
    value = record.get(field)
    if isinstance(value, int | float) and not isinstance(value, bool):
        report.quirks[f"{field}: a number, read as text"] += 1
        value = str(value)
    if not isinstance(value, str) or not value.strip():
        raise BadRowError(field, value, "a text that is not empty", "mend the row in the file")
    if any("\ud800" <= character <= "\udfff" for character in value):  # JSON and pickle hold them, Arrow cannot
        raise BadRowError(field, value, "a text of whole characters", "mend the row in the file")
    mended = mend_blanks(value)
    if mended != value:
        report.quirks[f"{field}: blanks or tabs mended"] += 1
    return mended


def answer(record: Mapping[str, Any], report: Report) -> str:
    """The answer as a clean string. SLAKE has one that is empty: it is kept, so that the row counts as published."""
    value = record.get("answer")
    if isinstance(value, str) and not value.strip():
        report.quirks["answer: empty, kept (the mixture's training split leaves it out)"] += 1
        return ""
    return text(record, "answer", report)


def optional_text(record: Mapping[str, Any], field: str, report: Report) -> str | None:
    """As `text`, but None where the row has no such field or an empty one."""
    if record.get(field) in (None, ""):
        return None
    return text(record, field, report)


def mend_blanks(value: str) -> str:
    """One blank between words, none at the ends; VQA-RAD's tabs become the commas that they once were.

    In its export "kidneys, bladder, or ureters" became "kidneys <tab>bladde r<tab>or ureters": a tab for each comma,
    and a word's last letter cut off before it.
    """
    value = re.sub(r"(?<=\w\w) (\w)\t", r"\1\t", value)
    return re.sub(r"\s+", " ", re.sub(r" *\t *", ", ", value.strip())).strip()


def answer_type(record: Mapping[str, Any], report: Report) -> str:
    """ "open" or "closed"; the label's stray blanks are counted."""
    value = record.get("answer_type")
    label = value.strip() if isinstance(value, str) else ""
    if label not in ANSWER_TYPES:
        raise BadRowError("answer_type", value, "OPEN or CLOSED", "mend the row in the file")
    if label != value:
        report.quirks["answer_type: blanks removed"] += 1
    return ANSWER_TYPES[label]


class ImageFolder:
    """Images of a source by their names in its rows; each is read and verified once, however many rows ask about it."""

    def __init__(self, root: Path, field: str) -> None:
        """`field` is the rows' field that names the image, for the errors. SourceError if the folder is not there."""
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder; expected the source's images in it")
        self.root, self.field = root, field
        self._images: dict[str, ImageFile | BadRowError] = {}

    def read(self, name: str) -> ImageFile:
        """The image; BadRowError if it is missing, outside the folder or does not decode."""
        if name not in self._images:
            self._images[name] = self._load(name)
        image = self._images[name]
        if isinstance(image, BadRowError):
            raise image
        return image

    def names(self) -> set[str]:
        """The names that rows asked for so far."""
        return set(self._images)

    def _load(self, name: str) -> ImageFile | BadRowError:
        path = self.root / name
        if not path.resolve().is_relative_to(self.root.resolve()):
            return BadRowError(self.field, name, f"a name inside {self.root.name}/", "mend the row in the file")
        if not path.is_file():
            return BadRowError(self.field, name, f"an image file in {self.root.name}/", "fetch the image again")
        try:
            return read_image(path.read_bytes())
        except BadImageError as error:
            return BadRowError(self.field, name, f"an image that decodes ({error})", "fetch the image again")


def image_columns(name: str, image: ImageFile) -> Row:
    """The columns of a row that say which image it asks about. An image's rows stay on one side of every split
    (`group`).
    """
    return {
        "image": {"bytes": image.data, "path": name},
        "image_id": name,
        "image_sha256": image.sha256,
        "image_phash": image.phash,
        "group": image.sha256,
    }
