"""The output folder of an evaluation: run.json says what was asked of what, predictions.jsonl grows while it runs.

The same command again continues: rows that already have a line are not asked again. So a folder belongs to one model,
one data set and one way of asking, told apart by content and not by path. Predictions find their rows by id, never by
order, and each line is complete in itself: other tools can score the file alone.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoConfig

# COLUMNS are what a prediction's line repeats of its row; beyond the required ones they may be absent: null then.
REQUIRED_COLUMNS = ("id", "question", "answer", "image_id")
COLUMNS = (*REQUIRED_COLUMNS, "answer_type", "question_type", "organ", "modality", "language", "source")

_MODEL_FILES = (".safetensors", ".json", ".jinja", ".model", ".py")


def read_rows(dataset: Dataset) -> list[dict[str, Any]]:
    """The text columns of each row, in a fixed order, null for absent labels.

    Raises ValueError for an empty data set or a missing required column.
    """
    missing = sorted({*REQUIRED_COLUMNS, "image"} - set(dataset.column_names))
    if missing:
        raise ValueError(f"the data set has no column {', '.join(missing)}; it has {', '.join(dataset.column_names)}")
    if not len(dataset):
        raise ValueError("the data set has no rows")
    present = [name for name in COLUMNS if name in dataset.column_names]
    return [{name: row.get(name) for name in COLUMNS} for row in dataset.select_columns(present)]


def check_ids(rows: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError where two rows have one id: their predictions could not be told apart."""
    repeated = [name for name, times in Counter(row["id"] for row in rows).items() if times > 1]
    if repeated:
        raise ValueError(f"{len(repeated)} ids stand on several rows (such as {repeated[0]!r}); each row needs its own")


def image_keys(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """What identifies each row's image: its source and its name there."""
    return [f"{row['source']}/{row['image_id']}" for row in rows]


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 over what is asked and answered in all rows, in order, and over their image files (undecoded images)."""
    digest = hashlib.sha256()
    for row in dataset:
        image = row["image"] or {"bytes": None, "path": None}
        asked = [row["id"], image["path"], row.get("history"), row["question"], row["answer"]]
        digest.update(json.dumps(asked).encode() + (image["bytes"] or b""))
    return digest.hexdigest()


def model_fingerprint(model: str) -> str:
    """SHA-256 of a model folder's weights, settings and code (an adapter's alone); of a Hub model its commit."""
    folder = Path(model)
    if not folder.is_dir():
        return str(AutoConfig.from_pretrained(model, trust_remote_code=True)._commit_hash)
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.iterdir() if path.suffix in _MODEL_FILES):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def claim_output(output: Path, identity: Mapping[str, Any], notes: Mapping[str, Any]) -> None:
    """Make `output` this run's folder, or continue in it if its run.json has the same `identity`.

    `notes` (paths, versions) are kept beside it and may change. Raises ValueError naming what differs.
    """
    path = output / "run.json"
    if path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))["identity"]
        changed = [
            f"{key} was {str(before.get(key))[:12]}, now {str(value)[:12]}"
            for key, value in identity.items()
            if before.get(key) != value
        ]
        if changed:
            raise ValueError(f"{output} holds another run ({'; '.join(changed)}): choose another --output")
    elif (output / "predictions.jsonl").exists():
        raise ValueError(
            f"{output} holds predictions but no run.json that says what made them: choose another --output"
        )
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"identity": identity, **notes}, indent=2) + "\n", encoding="utf-8")


def read_predictions(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of predictions.jsonl by id, empty without a file; a last line cut short by a kill is removed."""
    if not path.exists():
        return {}
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        path.write_bytes(whole)
    lines = (json.loads(line) for line in whole.decode("utf-8").split("\n") if line)
    return {line["id"]: line for line in lines}


def append_predictions(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Add one line a record and hand them to the operating system at once."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
