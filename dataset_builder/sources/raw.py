"""What the readers share: records to rows, text fields and image folders, with one clear error for each thing that can
be wrong. Tables and lists too large for memory are read by records.py, images in archives by archives.py.
"""

import json
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..images import BadImageError, ImageFile, read_image
from ..report import BadRowError, Report, SourceError
from ..schema import Row

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
ANSWER_TYPES = {"OPEN": "open", "CLOSED": "closed"}

RECENT_BYTES = 16 * 2**20  # images that stay in memory because the next rows may ask about them too

RowMaker = Callable[[Mapping[str, Any]], Row | None]
NumberedRowMaker = Callable[[int, Mapping[str, Any]], Row | None]


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
    """The rows of a file that holds one JSON list; see `rows_of`."""
    records = enumerate(read_json_list(path, report))
    yield from rows_of(source, path, records, report, lambda _, record: make_row(record), seen_ids, id_field="qid")


def rows_of(
    source: str,
    path: Path,
    records: Iterable[tuple[int, Any]],
    report: Report,
    make_row: NumberedRowMaker,
    seen_ids: set[str],
    *,
    id_field: str | None,
) -> Iterator[Row]:
    """Apply `make_row` to each numbered record of `path`; what it refuses goes into the report, as does an error in the
    place of a record; what it returns None for is left out.

    `seen_ids` holds the ids of the source's earlier rows, so that no id comes twice, across files as well; a row whose
    id does is reported under `id_field`, or as a whole where ids follow from the rows' content (None).
    """
    for number, record in records:
        try:
            if isinstance(record, BadRowError):
                raise record
            if not isinstance(record, dict):
                raise BadRowError("row", record, "an object with named fields", "mend the row in the file")
            row = make_row(number, record)
            if row is None:
                continue
            if row["id"] in seen_ids:
                if id_field is None:
                    raise BadRowError("row", row["id"], "a row that differs from all before it", "take one of them out")
                found = record.get(id_field)
                raise BadRowError(id_field, found, "an id that no earlier row has", "give the row its own id")
        except BadRowError as error:
            report.skip(source, path, number, error)
            continue
        seen_ids.add(row["id"])
        yield row


def require_english(source: str, languages: Sequence[str]) -> None:
    """SourceError if a source that is all English is read without it."""
    if "en" not in languages:
        raise SourceError(f"{source}: languages {list(languages)} asked for, but {source} has English rows only")


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
    if not_unicode(value) or "\0" in value:
        raise BadRowError(field, value, "a text in UTF-8 without zero bytes", "mend the row in the file")
    mended = mend_blanks(value)
    if mended != value:
        report.quirks[f"{field}: blanks or tabs mended"] += 1
    return mended


def not_unicode(value: str) -> bool:
    """Whether a text holds half a character pair: bytes that were not UTF-8 (read with "surrogateescape"), or a JSON
    escape cut in two. Arrow can write neither.
    """
    return not value.isascii() and re.search("[\ud800-\udfff]", value) is not None


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


class Images:
    """Images of a source by their names in its rows, each read and verified once while its rows follow each other.

    The last RECENT_BYTES of images, and what was wrong with the last broken ones, stay in memory; no more, however many
    images pass.
    """

    def __init__(self, field: str) -> None:
        """`field` is the rows' field that names the image, for the errors."""
        self.field = field
        self._recent: OrderedDict[str, ImageFile | BadRowError] = OrderedDict()
        self._recent_bytes = 0

    def read(self, name: str) -> ImageFile:
        """The image; BadRowError if it is missing, outside its place or does not decode."""
        if name in self._recent:
            self._recent.move_to_end(name)
        else:
            self._remember(name, self._load(name))
        image = self._recent[name]
        if isinstance(image, BadRowError):
            raise image.with_traceback(None)  # else each time raised adds its frames, and what they hold
        return image

    def find(self, name: str) -> bytes:
        """The file's bytes; BadRowError if there are none to be had."""
        raise NotImplementedError

    def bad(self, name: str, expected: str, what_to_do: str = "fetch the image again") -> BadRowError:
        """The error of a row whose image cannot be used."""
        return BadRowError(self.field, name, expected, what_to_do)

    def _load(self, name: str) -> ImageFile | BadRowError:
        try:
            return read_image(self.find(name))
        except BadRowError as error:
            return error
        except BadImageError as error:
            return self.bad(name, f"an image that decodes ({error})")

    def _remember(self, name: str, image: ImageFile | BadRowError) -> None:
        self._recent[name] = image
        self._recent_bytes += _size(image)
        while self._recent_bytes > RECENT_BYTES and len(self._recent) > 1:
            self._recent_bytes -= _size(self._recent.popitem(last=False)[1])


def reason(error: Exception) -> str:
    """What an error says, without the paths in it, which differ from machine to machine."""
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _size(image: ImageFile | BadRowError) -> int:
    """About how many bytes it holds in memory."""
    return 1000 + (len(image.data) if isinstance(image, ImageFile) else 0)


class ImageFolder(Images):
    """Images in a folder, by their names relative to it."""

    def __init__(self, root: Path, field: str) -> None:
        """SourceError if the folder is not there."""
        super().__init__(field)
        if not root.is_dir():
            raise SourceError(f"{root}: no such folder; expected the source's images in it")
        self.root = root
        self._names: set[str] = set()

    def names(self) -> set[str]:
        """The names that rows asked for so far."""
        return self._names

    def find(self, name: str) -> bytes:
        """The file's bytes; BadRowError if it is missing or its name leads out of the folder."""
        self._names.add(name)
        path = self.root / name
        try:
            if not path.resolve().is_relative_to(self.root.resolve()):
                raise self.bad(name, f"a name inside {self.root.name}/", "mend the row in the file")
            if not path.is_file():
                raise self.bad(name, f"an image file in {self.root.name}/")
            return path.read_bytes()
        except OSError as error:  # a name that is too long, a file that may not be read
            raise self.bad(name, f"an image file in {self.root.name}/ that can be read ({reason(error)})") from error


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
