"""What a model in training does on held-out rows: its answers scored as evaluation scores them, and its losses
drawn."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel

from ..evaluation import MAX_NEW_TOKENS, answer_rows, image_keys, read_rows, score, shown_rows
from ..processing_biod2c import BioD2CProcessor


def score_answers(
    model: PreTrainedModel, processor: BioD2CProcessor, dataset: Dataset, limit: int, batch_size: int
) -> dict[str, float]:
    """closed_acc, open_acc, accuracy, bleu1 and rouge1 (0 to 1) of greedy answers to the first `limit` rows.

    Every process answers all of them: under ZeRO-3 none could do so alone.
    """
    rows = read_rows(dataset)
    asked = range(min(limit, len(rows)))
    predictions = dict.fromkeys(asked, "")
    shown = shown_rows(image_keys(rows), "normal")
    batches = answer_rows(model, processor, dataset, asked, shown, batch_size=batch_size, max_new_tokens=MAX_NEW_TOKENS)
    for batch in batches:
        predictions |= {answer.row: answer.prediction for answer in batch}
    answers, types = ([rows[row][column] for row in asked] for column in ("answer", "answer_type"))
    return score(list(predictions.values()), answers, types)


def draw_losses(history: Sequence[dict[str, Any]], path: Path) -> None:
    """The logged losses over the steps, training and held out, as a picture."""
    from matplotlib.figure import Figure  # no pyplot: it would pick a display and keep every figure in memory

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axis = figure.subplots()
    for name in ("loss", "nll_loss", "semantic_loss", "eval_loss", "eval_nll_loss", "eval_semantic_loss"):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            line = "o--" if name.startswith("eval_") else "-"
            axis.plot(*zip(*points, strict=True), line, label=name.replace("eval_", "held out: "))
    axis.set(xlabel="step", ylabel="loss", yscale="log")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
