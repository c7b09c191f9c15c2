"""scores.json and the table on the terminal: a model's scores beside what two blind baselines reach on the same rows.

Each value stands with its 95 % interval, and the margin over the question-only lookup is a paired difference: the part
of the accuracy that sight, and not the question, can explain.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .baselines import majority, question_only
from .metrics import CONVENTION, MEASURES, answer_kind, measure, summarize
from .records import image_keys
from .statistics import interval, mean_interval, paired_difference, resampled_sums

BASELINES = {"majority": majority, "question_only": question_only}
COLUMNS = {"closed_acc": "closed", "open_acc": "open", "accuracy": "all", "bleu1": "BLEU-1", "rouge1": "ROUGE-1"}

Record = Mapping[str, Any]


def build_scores(records: Sequence[Record], train: Sequence[Record]) -> dict[str, Any]:
    """Everything in scores.json for the lines of predictions.jsonl, with baselines fitted on the rows of `train`.

    Values are 0 to 1 and intervals [low, high], null where no row counts. An empty `train` leaves the baselines out.
    """
    clusters = image_keys(records)
    measures = {"model": _measure([record["prediction"] for record in records], records)}
    if train:
        measures |= {name: _measure(answer(train, records), records) for name, answer in BASELINES.items()}
    scores = {name: _with_intervals(rows, clusters) for name, rows in measures.items()}
    hits = {name: _hits(rows) for name, rows in measures.items()}
    n_closed = int(measures["model"][:, MEASURES.index("closed_rows")].sum())
    return {
        **scores.pop("model"),
        "n_closed": n_closed,
        "n_open": len(records) - n_closed,
        "n_failed": sum(record["error"] is not None for record in records),
        "n_images": len(set(clusters)),
        "convention": CONVENTION,
        "baselines": scores or None,
        "margin_over_question_only": _margin(hits, clusters) if train else None,
        "by_question_type": _by_question_type(records, hits, clusters),
    }


def format_table(scores: Mapping[str, Any]) -> str:
    """Scores as lines of text: percent, with the interval of each value."""
    n_rows = scores["n_closed"] + scores["n_open"]
    lines = [
        f"{n_rows} questions ({scores['n_closed']} closed, {scores['n_open']} open) on {scores['n_images']} images, "
        f"{scores['n_failed']} failed; convention {scores['convention']}",
        "",
        " " * 16 + "".join(f"{title:>20}" for title in COLUMNS.values()),
        _score_line("model", scores),
        *(_score_line(name.replace("_", "-"), row) for name, row in (scores["baselines"] or {}).items()),
    ]
    if margin := scores["margin_over_question_only"]:
        low, high = (100 * bound for bound in margin["interval"])
        lines += ["", f"over question-only: {100 * margin['value']:+.1f} points ({low:+.1f} to {high:+.1f})"]
    if scores["by_question_type"]:
        lines += ["", f"{'question type':<16}{'n':>8}{'model':>20}{'question-only':>20}"]
        lines += [_type_line(name, row) for name, row in scores["by_question_type"].items()]
    return "\n".join([*lines, "", "Percent; in brackets 95 % bootstrap intervals, clustered by image."])


def _measure(predictions: Sequence[str], records: Sequence[Record]) -> np.ndarray:
    answers = [record["answer"] for record in records]
    kinds = [answer_kind(record["answer"], record["answer_type"]) for record in records]
    return measure(predictions, answers, kinds)


def _hits(measures: np.ndarray) -> np.ndarray:
    """Which rows are correct, closed or open: 0 or 1, [rows]."""
    return measures[:, MEASURES.index("closed_hits")] + measures[:, MEASURES.index("open_hits")]


def _with_intervals(measures: np.ndarray, clusters: Sequence[str]) -> dict[str, Any]:
    values = {name: float(value) for name, value in summarize(measures.sum(axis=0)).items()}
    samples = summarize(resampled_sums(measures, clusters))
    defined = [name for name, value in values.items() if not math.isnan(value)]
    return {
        **{name: value if name in defined else None for name, value in values.items()},
        "intervals": {name: interval(samples[name]) if name in defined else None for name in values},
    }


def _margin(hits: Mapping[str, np.ndarray], clusters: Sequence[str]) -> dict[str, Any]:
    value, bounds = paired_difference(hits["model"], hits["question_only"], clusters)
    return {"value": value, "interval": bounds}


def _by_question_type(
    records: Sequence[Record], hits: Mapping[str, np.ndarray], clusters: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Accuracy per question type, most rows first; rows without a type are in the totals only."""
    rows_of = defaultdict(list)
    for row, record in enumerate(records):
        if record["question_type"] is not None:
            rows_of[record["question_type"]].append(row)
    table = {}
    for name, rows in sorted(rows_of.items(), key=lambda item: (-len(item[1]), item[0])):
        model, blind = hits["model"][rows], hits.get("question_only")
        table[name] = {
            "n": len(rows),
            "accuracy": float(model.mean()),
            "interval": mean_interval(model, [clusters[row] for row in rows]),
            "question_only": None if blind is None else float(blind[rows].mean()),
        }
    return table


def _score_line(name: str, scores: Mapping[str, Any]) -> str:
    return f"{name:<16}" + "".join(_cell(scores[metric], scores["intervals"][metric]) for metric in COLUMNS)


def _type_line(name: str, row: Mapping[str, Any]) -> str:
    return f"{name:<16}{row['n']:>8}" + _cell(row["accuracy"], row["interval"]) + _cell(row["question_only"])


def _cell(value: float | None, bounds: Sequence[float] | None = None) -> str:
    if value is None:
        return f"{'-':>20}"
    spread = f" ({100 * bounds[0]:.1f}-{100 * bounds[1]:.1f})" if bounds else ""
    return f"{100 * value:.1f}{spread}".rjust(20)
