"""Labels to a figure filter: head.safetensors, filter.json, curves.png.

The groups (papers, patients) are dealt into five parts by their hash, no group in two. Part 0 is held out: it is only
reported on. On the other four, each part is scored by a head fitted on the other three;
the threshold for the wanted precision is chosen on these cross-validated scores. The head that is kept is then fitted
on all four. So neither the head nor the threshold has seen what the report is about.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..assemble import write_atomically
from .encoder import Encoder, cached_features
from .figures import Figures
from .head import fit_head, save_head
from .labels import agreed, read_labels
from .measures import classification, curves, threshold_for

PARTS = 5
MIN_FIGURES = 2 * PARTS  # of either label: two a part


def train_filter(
    dataset: Path, labels: Path, encoder_folder: Path, output: Path, precision: float = 0.95, workers: int = 0
) -> dict[str, Any]:
    """Fit, report and write a filter; returns filter.json's content.

    Raises:
        ValueError: too few labels to learn and report, or a precision that no threshold reaches.
    """
    if not 0 < precision <= 1:
        raise ValueError(f"--precision {precision}: expected a share above 0, up to 1")
    encoder, figures = Encoder(encoder_folder), Figures(dataset)
    decided, left_out = agreed(read_labels(labels))
    features, counts = _labelled_features(encoder, figures, decided, output / "features", workers)
    shas = sorted(features)
    groups = [figures.groups[sha] for sha in shas]
    is_clean = np.array([decided[sha] == "clean" for sha in shas], dtype=np.float64)
    parts = deal(groups)
    if too_few := _too_few(parts, is_clean):
        raise ValueError(f"{labels}: {too_few}; label more figures, of more groups")
    x, y = torch.stack([features[sha] for sha in shas]), torch.tensor(is_clean, dtype=torch.float32)
    learned = parts != 0
    threshold = threshold_for(precision, is_clean[learned], cross_validated(x, y, parts)[learned])
    head = fit_head(x[learned], y[learned])
    scores = head.score(x[~learned]).numpy().astype(np.float64)
    held_out = [group for group, part in zip(groups, parts, strict=True) if part == 0]
    output.mkdir(parents=True, exist_ok=True)
    save_head(head, output / "head.safetensors")
    draw_curves(output / "curves.png", is_clean[~learned], scores, threshold)
    record = {
        "threshold": threshold,
        "wanted_precision": precision,
        "encoder": {
            "folder": str(encoder_folder.resolve()),
            "model_type": encoder.model_type,
            "features": x.shape[1],
            "sha256": encoder.sha256,
        },
        "labels": {**counts, **left_out, "sha256": hashlib.sha256(labels.read_bytes()).hexdigest()},
        "training": _part_counts(is_clean[learned], [g for g, part in zip(groups, parts, strict=True) if part]),
        "held_out": _part_counts(is_clean[~learned], held_out),
        "metrics": classification(is_clean[~learned], scores, threshold, held_out),
    }
    record["sha256"] = filter_digest(output, record)
    write_atomically(output / "filter.json", json.dumps(record, indent=1) + "\n")
    return record


def filter_digest(folder: Path, record: Mapping[str, Any]) -> str:
    """What decides a figure's fate: the encoder, the head and the threshold."""
    head = hashlib.sha256((folder / "head.safetensors").read_bytes()).hexdigest()
    return hashlib.sha256(f"{record['encoder']['sha256']} {head} {record['threshold']!r}".encode()).hexdigest()


def _labelled_features(
    encoder: Encoder, figures: Figures, decided: Mapping[str, str], cache: Path, workers: int
) -> tuple[dict[str, Tensor], Counter[str]]:
    """Features of the labelled figures that can be read, and how many figures there are of each kind."""
    present = sorted(decided.keys() & figures.groups.keys())
    encoded = cached_features(encoder, figures, present, cache, workers)
    features = {sha: values for sha, values in encoded.items() if isinstance(values, Tensor)}
    counts = Counter(decided[sha] for sha in features)
    counts["not_in_dataset"] = len(decided) - len(present)
    counts["unreadable"] = len(present) - len(features)
    return features, counts


def deal(groups: Sequence[str]) -> np.ndarray:
    """The part [n] (0 to PARTS - 1) of each figure, by its group's hash: labels added later move no group."""
    return np.array([int(hashlib.sha256(group.encode()).hexdigest(), 16) % PARTS for group in groups])


def _too_few(parts: np.ndarray, is_clean: np.ndarray) -> str:
    """What is missing: figures of a label at all, or in a part; "" where nothing is."""
    counts = {name: (is_clean == value).sum() for name, value in (("clean", 1), ("polluted", 0))}
    if min(counts.values()) < MIN_FIGURES:
        found = " and ".join(f"{count} {name}" for name, count in counts.items())
        return f"{found} figures of the dataset are labelled, at least {MIN_FIGURES} of each are needed"
    if any(len(set(is_clean[parts == part])) < 2 for part in range(PARTS)):
        return "too few groups: one of five parts without a common group would lack a label"
    return ""


def cross_validated(features: Tensor, is_clean: Tensor, parts: np.ndarray) -> np.ndarray:
    """Scores [n] of parts 1 to 4, each by a head fitted on the other three; NaN for the held-out part 0."""
    scores = np.full(len(parts), np.nan)
    for part in range(1, PARTS):
        others = torch.tensor((parts != 0) & (parts != part))
        scores[parts == part] = fit_head(features[others], is_clean[others]).score(features[parts == part]).numpy()
    return scores


def _part_counts(is_clean: np.ndarray, groups: Sequence[str]) -> dict[str, int]:
    clean = int(is_clean.sum())
    return {"clean": clean, "polluted": len(is_clean) - clean, "groups": len(set(groups))}


def draw_curves(path: Path, is_clean: np.ndarray, scores: np.ndarray, threshold: float) -> None:
    """ROC and precision-recall of the held-out figures, with the point that the threshold chose."""
    from matplotlib.figure import Figure

    points = curves(is_clean, scores)
    kept = int((points["threshold"] >= threshold).sum())
    chosen = slice(kept - 1, kept)  # empty where the threshold keeps none
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, x, y in zip(
        figure.subplots(1, 2), ("false_positive_rate", "recall"), ("recall", "precision"), strict=True
    ):
        start = [0.0] if x == "false_positive_rate" else []
        axes.plot([*start, *points[x]], [*start, *points[y]], drawstyle="steps-post")
        axes.plot(points[x][chosen], points[y][chosen], "o", color="black", label=f"threshold {threshold:.3f}")
        axes.set(xlabel=x.replace("_", " "), ylabel=y, xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
        axes.legend(loc="lower right" if start else "lower left")
    figure.suptitle(f"{len(is_clean)} held-out figures; clean is positive")
    figure.savefig(path, dpi=110)


def report_lines(record: Mapping[str, Any]) -> list[str]:
    """A filter's report for the terminal and the dataset card."""
    held_out = record["held_out"]
    lines = [
        f"threshold {record['threshold']:.4f}, for precision {record['wanted_precision']} by cross-validation on "
        f"{record['training']['clean'] + record['training']['polluted']} labelled figures",
        f"held out: {held_out['clean']} clean, {held_out['polluted']} polluted figures of {held_out['groups']} groups",
    ]
    for name, metric in record["metrics"].items():
        if metric["value"] is None:
            lines.append(f"{name}: undefined")
        else:
            low, high = metric["interval"]
            lines.append(f"{name}: {metric['value']:.3f} ({low:.3f} to {high:.3f})")
    return lines
