"""Path-VQA (He et al., 2020): pvqa/qas/{train,val,test}/*_qa.pkl and pvqa/images/{train,val,test}/*.jpg.

A *_qa.pkl is a pickled list of {image, question, answer}, the image without ".jpg". Unpickling can run any program, so
PlainUnpickler knows only the instructions that make lists, dictionaries and strings: it has no way to import or call.
The questions and their code are under MIT, the images belong to the publishers of the books they come from. There is
no answer_type.
"""

import io
import pickle
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..report import BadRowError, Report, SourceError
from ..schema import Row, new_row
from .raw import ImageFolder, image_columns, text
from .tables import Record, file_name, make_rows

SPLITS = {"train": "train", "val": "validation", "test": "test"}  # the folders' names, and ours
LICENSE = "LicenseRef-publishers"
FIELDS = {"image", "question", "answer"}
# pickletools.dis shows them; none imports, calls or builds an object of a class.
INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS),
    *(pickle.EMPTY_DICT, pickle.DICT, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.UNICODE, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINUNICODE8),
    *(pickle.PUT, pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE),
    *(pickle.GET, pickle.BINGET, pickle.LONG_BINGET),
)
# What the unpickler raises for bytes that are no pickle, or cut.
PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, LookupError, AttributeError, TypeError, ValueError, struct.error)


class PlainUnpickler(pickle._Unpickler):
    """Python's own unpickler without the instructions that reach beyond lists, dictionaries and strings."""

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in INSTRUCTIONS}


def load_plain_pickle(path: Path) -> list[Any]:
    """The list in a pickle of lists, dictionaries and strings; SourceError, and nothing run, if it holds anything
    else or is cut.
    """
    data = path.read_bytes()
    try:
        rows = PlainUnpickler(io.BytesIO(data)).load()
    except PICKLE_ERRORS as error:
        raise SourceError(
            f"{path}: not a whole pickle of lists, dictionaries and strings only ({type(error).__name__} {error}); "
            "nothing in it was run; fetch the file again from where Path-VQA is published"
        ) from error
    if not isinstance(rows, list):
        raise SourceError(f"{path}: holds a {type(rows).__name__}, expected one list of rows")
    return rows


def read_path_vqa(root: Path, report: Report, languages: Sequence[str] = ("en",)) -> Iterator[Row]:
    """Yield Path-VQA's rows in the order of its files, all of them English; `root` is `pvqa` or the folder around it.

    A split that is not there is noted; SourceError if none is there, or without "en". `image_id` is "train/NAME.jpg".
    """
    if "en" not in languages:
        raise SourceError(f"path_vqa: languages {list(languages)} asked for, but Path-VQA has English rows only")
    folder = root / "pvqa" if (root / "pvqa").is_dir() else root
    paths = {split: folder / "qas" / split / f"{split}_qa.pkl" for split in SPLITS}
    if not any(path.is_file() for path in paths.values()):
        raise SourceError(f"{root}: no Path-VQA split file; expected pvqa/qas/train/train_qa.pkl and pvqa/images/")
    images = ImageFolder(folder / "images", "image")
    for split, path in paths.items():
        if not path.is_file():
            report.notes.append(f"path_vqa: no {path.name}, so no {SPLITS[split]} split")
            continue
        numbered = enumerate(load_plain_pickle(path))
        records = (_record(number, row) for number, row in numbered)

        def path_vqa_row(record: Record, split: str = split) -> Row:
            name = f"{split}/{file_name(record, 'image', report)}.jpg"
            return new_row(
                id=f"path_vqa-{split}-{record['number']}",
                question=text(record, "question", report),
                answer=text(record, "answer", report),
                language="en",
                source="path_vqa",
                source_split=SPLITS[split],
                license=LICENSE,
                **image_columns(name, images.read(name)),
            )

        yield from make_rows("path_vqa", path, report, records, path_vqa_row, set())


def _record(number: int, row: Any) -> Record | BadRowError:
    """A row with its place in the file, which is all the id that it has."""
    if not isinstance(row, dict) or not row.keys() >= FIELDS or not all(isinstance(row[name], str) for name in FIELDS):
        return BadRowError("row", type(row).__name__, f"a dictionary of the texts {sorted(FIELDS)}", "mend the file")
    return {name: row[name] for name in FIELDS} | {"number": number}
