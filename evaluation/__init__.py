"""Scoring of biomedical VQA: metrics with their convention, blind baselines, intervals, and answers from a model."""

from .baselines import majority, question_only
from .generation import MAX_NEW_TOKENS, ImageMode, answer_rows, shown_rows
from .metrics import answer_kind, is_correct, normalize, score
from .records import (
    append_predictions,
    check_ids,
    claim_output,
    data_fingerprint,
    image_keys,
    model_fingerprint,
    read_predictions,
    read_rows,
)
from .report import build_scores, format_table
from .statistics import mean_interval, paired_difference

__all__ = [
    "MAX_NEW_TOKENS",
    "ImageMode",
    "answer_kind",
    "answer_rows",
    "append_predictions",
    "build_scores",
    "check_ids",
    "claim_output",
    "data_fingerprint",
    "format_table",
    "image_keys",
    "is_correct",
    "majority",
    "mean_interval",
    "model_fingerprint",
    "normalize",
    "paired_difference",
    "question_only",
    "read_predictions",
    "read_rows",
    "score",
    "shown_rows",
]
