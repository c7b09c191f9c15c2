"""The one schema of a row, which every source yields and which training and evaluation read.

Images stay the bytes of the source's file: decoding and re-encoding a JPEG would change pixels, and with them the
exact identity (sha256) that splits and leakage checks rely on. A row is a plain dictionary in Arrow's own shape, so
that writing it needs no encoding step.
"""

from typing import Any, TypeAlias

from datasets import Features, Image, List, Value

Row: TypeAlias = dict[str, Any]

CAPTION = "caption"  # the question_type of an image-caption pair, which is for stage 1: an instruction and the caption

FEATURES = Features(
    {
        "id": Value("string"),
        "image": Image(),
        "image_id": Value("string"),
        "image_sha256": Value("string"),
        "image_phash": Value("string"),
        "question": Value("string"),
        "answer": Value("string"),
        "history": List({"role": Value("string"), "content": Value("string")}),
        "answer_type": Value("string"),
        "question_type": Value("string"),
        "organ": Value("string"),
        "modality": Value("string"),
        "language": Value("string"),
        "queue": List(Value("string")),
        "caption": Value("string"),
        "source": Value("string"),
        "source_split": Value("string"),
        "license": Value("string"),
        "group": Value("string"),
        "filter_score": Value("float32"),
        "filter_keep": Value("bool"),
        "generator": {"model": Value("string"), "prompt_sha256": Value("string"), "created": Value("string")},
    }
)

_MAY_BE_NULL = {
    *("answer_type", "question_type", "organ", "modality", "language"),
    *("history", "queue", "caption", "filter_score", "filter_keep", "generator"),
}


def new_row(**columns: Any) -> Row:
    """A row with every column of FEATURES: those given, empty lists for `history` and `queue`, null for the others.

    Raises TypeError for a column that the schema does not know, and for a missing one that must not be null.
    """
    unknown = sorted(columns.keys() - FEATURES.keys())
    missing = [name for name in FEATURES if name not in _MAY_BE_NULL and columns.get(name) is None]
    if unknown or missing:
        raise TypeError(f"row of the dataset: unknown columns {unknown}, missing columns {missing}")
    empty: Row = dict.fromkeys(FEATURES) | {"history": [], "queue": []}
    return empty | columns
