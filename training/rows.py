"""The rows that a recipe names: its datasets opened, completed to one schema, weighed and joined; or streamed.

Unusual here: a dataset needs no more than an image, a question and an answer. What else the schema has is filled in, so
that any dataset can stand beside the builder's. And a stream is as long as the run, not as the dataset: Trainer then
counts steps, continues and stops as it does with rows at hand.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Features, Image, IterableDataset, concatenate_datasets, interleave_datasets, load_dataset

from ..dataset_builder.schema import FEATURES
from .recipe import Recipe

NEEDED = ("image", "question", "answer")
_SCHEMA = Features({**FEATURES, "image": Image(decode=False)})  # decoded once an image, in the collator


def load_rows(recipe: Recipe, split: str, seed: int | None = None) -> Dataset | IterableDataset:
    """The rows of the recipe's datasets, their images still encoded, in the columns of docs/dataset.md.

    Args:
        split: "train" or "eval": whose `train_split` or `eval_split` is read.
        seed: of the training rows, which are weighed, or as a stream shuffled, by it.

    Returns:
        A stream, if the recipe asks for one and a seed is given; held-out rows are always at hand.

    Raises:
        ValueError: for a dataset that cannot be opened, or lacks the split, a needed column or one of the sources.
    """
    loaded, weights = [], []
    for number, arguments in enumerate(recipe.datasets):
        splits = {name: arguments.pop(f"{name}_split") for name in ("train", "eval")}
        weight = arguments.pop("weight")
        if splits[split] is not None:
            rows = _open(arguments, splits[split], recipe.streaming)
            loaded.append(_complete(rows, arguments["path"], f"{splits[split]}-{number}"))
            weights.append(weight)
    if not loaded:
        raise ValueError(f"dataset: none has {split}_split")
    if recipe.streaming:
        return _join_streams(loaded, recipe, seed)
    rows = loaded[0] if len(loaded) == 1 else concatenate_datasets(loaded)
    if seed is not None and set(weights) != {1}:
        owners = np.repeat(range(len(loaded)), [len(part) for part in loaded]).tolist()
        rows = rows.select(weigh(owners, dict(enumerate(weights)), seed))
    if recipe.sources:
        own = recipe.sources if seed is not None else dict.fromkeys(recipe.sources, 1.0)
        rows = rows.select(weigh(rows["source"], own, seed or 0))
    return rows


def _open(arguments: Mapping[str, Any], split: str, streaming: bool) -> Dataset | IterableDataset:
    path = str(arguments["path"])
    try:
        return load_dataset(**arguments, split=split, streaming=streaming)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        if isinstance(error, ValueError) or Path(path).exists():
            raise ValueError(f"dataset {path}: {reason}") from error
        if path.startswith((".", "/", "~")) or path.count("/") > 1:
            reason = "a path is taken from the folder in which the command runs"
        raise ValueError(
            f"dataset {path}: no folder {Path(path).absolute()} ({reason}). Build it with `biod2c build all "
            "DATASET.yaml` (the demo's: recipes/demo/dataset.yaml), or name a folder or a dataset of the Hub"
        ) from error


def _complete(rows: Dataset | IterableDataset, path: str, part: str) -> Dataset | IterableDataset:
    """The schema's columns and no other; `part` tells apart the ids of rows that have none."""
    columns = rows.column_names or list(next(iter(rows)))  # of some streams only the rows know
    if missing := [name for name in NEEDED if name not in columns]:
        raise ValueError(
            f"dataset {path} has no column {', '.join(missing)}; it has {', '.join(columns)}. Rename its columns to "
            f"{', '.join(NEEDED)}"
        )
    rows = rows.select_columns([name for name in FEATURES if name in columns])
    rows = rows.cast_column("image", Image(decode=False))
    absent = [name for name in FEATURES if name not in columns]
    if absent:
        rows = rows.map(partial(_fill, absent=absent, source=Path(path).name, part=part), with_indices=True)
    return rows if rows.features == _SCHEMA else rows.select_columns(list(FEATURES)).cast(_SCHEMA)


def _fill(row: dict[str, Any], number: int, absent: Sequence[str], source: str, part: str) -> dict[str, Any]:
    filled: dict[str, Any] = dict.fromkeys(absent)
    known = {"id": f"{source}-{part}-{number}", "source": source, "history": [], "queue": []}
    filled |= {name: value for name, value in known.items() if name in absent}
    if "image_sha256" in absent:
        filled["image_sha256"] = _sha256(row["image"])
    if "image_id" in absent:
        filled["image_id"] = row.get("image_sha256") or filled["image_sha256"]
    return filled


def _sha256(image: Mapping[str, Any] | None) -> str:
    """Of the image's file; of one that cannot be read, which is a bad sample when its turn comes, of its name."""
    content, path = (image or {}).get("bytes"), (image or {}).get("path") or ""
    if content is None:
        content = Path(path).read_bytes() if Path(path).is_file() else path.encode()
    return hashlib.sha256(content).hexdigest()


def _join_streams(streams: list[IterableDataset], recipe: Recipe, seed: int | None) -> Dataset | IterableDataset:
    """Rows of the datasets in turn, each row once; held out, whole in memory."""
    rows = streams[0]
    if len(streams) > 1:
        rows = interleave_datasets(streams, stopping_strategy="all_exhausted_without_replacement")
    if recipe.sources:
        rows = rows.filter(lambda row: row["source"] in recipe.sources)
    if seed is None:
        return Dataset.from_list(list(rows), features=_SCHEMA)
    return rows.shuffle(seed=seed, buffer_size=recipe.shuffle_buffer) if recipe.shuffle_buffer else rows


def weigh(owners: Sequence[Any], weights: Mapping[Any, float], seed: int) -> list[int]:
    """Row numbers in which each owner's rows stand `weight` times: of 2.5, twice all and once a random half.

    Args:
        owners: for each row its source, or the number of its dataset.

    Raises:
        ValueError: for an owner without rows or a weight that is not above 0.
    """
    numbers, random, chosen = np.asarray(owners), np.random.default_rng(seed), []
    for owner, weight in weights.items():
        own = np.flatnonzero(numbers == owner)
        if not len(own):
            raise ValueError(f"sources: no row of {owner}; there are {', '.join(sorted(map(str, set(owners))))}")
        if not weight > 0:
            raise ValueError(f"sources: {owner} has weight {weight}, must be above 0")
        whole, part = divmod(weight, 1)
        chosen += [own] * int(whole) + [random.choice(own, round(part * len(own)), replace=False)]
    return sorted(np.concatenate(chosen).tolist())


class RowStream(torch.utils.data.IterableDataset):
    """All the rows that a run takes from a stream, pass after pass.

    A round is one batch for each process. Every process and every worker of its loader reads all rows; a worker gives
    out each so-many-th round, so that batches come in the order in which one worker would give them.

    Args:
        rows: what is passed through; if `shuffled`, in another order each time, which the pass alone determines.
        round_size: rows of a round.
        rounds: how many the run takes.
        done: so many first rounds were trained on before the run was continued: they are read, but given out as None,
            since Trainer counts through them and nothing should be decoded for that.
    """

    def __init__(self, rows: IterableDataset, round_size: int, rounds: int, done: int, shuffled: bool) -> None:
        self.rows, self.round_size, self.rounds, self.done, self.shuffled = rows, round_size, rounds, done, shuffled

    def __len__(self) -> int:
        return self.rounds * self.round_size

    def __iter__(self) -> Iterator[dict[str, Any] | None]:
        """Raises ValueError if the stream has no rows."""
        worker = torch.utils.data.get_worker_info()
        index, workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for number, row in enumerate(islice(chain.from_iterable(map(self._pass, count())), len(self))):
            round_number = number // self.round_size
            if round_number % workers == index:
                yield row if round_number >= self.done else None

    def _pass(self, number: int) -> Iterator[dict[str, Any]]:
        if self.shuffled:
            self.rows.set_epoch(number)
        is_empty = True
        for batch in self.rows.iter(self.round_size):  # iter(self.rows) would give a worker some of the files only
            is_empty = False
            yield from (dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True))
        if is_empty:
            raise ValueError("dataset: the stream has no rows (of the recipe's sources, if it names some)")
