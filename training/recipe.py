"""A run is one YAML file and command-line overrides; both together are saved beside what they made.

Unusual here: a recipe is flat. Its keys are the fields of `Recipe` and of transformers' `TrainingArguments`, side by
side; a key that is neither is an error that names the nearest one. `--field value` on the command line reads its value
as YAML, and `--config.field value` reaches into a nested field.
"""

import difflib
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser, TrainingArguments

from .launch import for_this_machine


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads 5e-5, without a dot, as a string; a learning rate is a number."""


_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+[eE][-+]?\d+$"), list("-+0123456789"))

# As the Hub makes them, and the keys that could hold one
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{16,}")
_TOKEN_KEY = re.compile(r"^[\s-]*((hub|hf|push_to_hub)_)?token:", re.MULTILINE)
# Trainer's own way of pushing, which is not used (see hub.py)
_NO_PUSH_FIELDS = ("hub_strategy", "hub_always_push", "hub_revision")

PARTS = ("vision", "fusion", "language_model", "embeddings", "lora")


@dataclass
class Recipe:
    """What is trained, from what, on what.

    Args:
        model: folder or Hub name of a BioD2C checkpoint to start from.
        vision, language_model: instead of `model`: the folders or Hub names of the two components; what joins them
            starts new.
        tokenizer: with components, the tokenizer's folder or Hub name (default: the language model's).
        vocab_size: with neither: everything starts new, with a byte-level BPE tokenizer of this size that is trained on
            the training texts.
        config: fields of `BioD2CConfig`; with `model`, what to change in its configuration.
        train: the parts that learn, of: vision, fusion (text MLP, decoder, queries, projections, gate), language_model,
            embeddings (the language model's), lora (adapters in the language model).
        lora: fields of peft's `LoraConfig`.
        quantization: QLoRA: fields of transformers' `BitsAndBytesConfig`, such as {load_in_4bit: true}; the frozen
            language model is held so, in NF4 with double quantization unless a field says otherwise.
        dataset: folder or Hub name that `load_dataset` opens, with the columns of docs/dataset.md; image, question and
            answer are enough. Or a list of several, each a mapping of `load_dataset`'s own arguments (path, name,
            data_files, revision ...), of `weight` (how often its rows stand in an epoch; 1), and of a `train_split` or
            `eval_split` of its own (null: it has none).
        dataset_config: the configuration of each that names none: "pretrain" for stage 1, "default" for stage 2.
        sources: keep only the rows of these sources, such as [slake] (empty: all); {slake: 2, vqa_rad: 0.5} trains on
            each of SLAKE's rows twice an epoch and on a random half of VQA-RAD's, drawn once.
        train_split, eval_split: split names; no `eval_split`, no evaluation.
        eval_questions: at each evaluation, so many held-out questions are answered and scored (eval_accuracy,
            eval_closed_acc ...; `metric_for_best_model` may name one).
        early_stopping_patience: end the run after so many evaluations without a better `metric_for_best_model`.
        streaming: read training rows as they are needed; needs `max_steps`. Held-out rows are still read at once.
        shuffle_buffer: of a stream, shuffle among so many rows (0: train in the order in which they come).
        rows_per_image: up to so many rows of one image stand in a batch together, and encode it once.
        image_cache: decoded, resized images to keep in memory, a process.
        bad_sample_limit: the share of rows with an unreadable image past which the run ends in error (of a stream, the
            share of the rows so far); below it they are left out and recorded in bad_samples.jsonl.
    """

    dataset: str | list[dict[str, Any]]
    train: list[str]
    model: str | None = None
    vision: str | None = None
    language_model: str | None = None
    tokenizer: str | None = None
    vocab_size: int | None = None
    config: dict[str, Any] = field(default_factory=dict)
    lora: dict[str, Any] = field(default_factory=dict)
    quantization: dict[str, Any] = field(default_factory=dict)
    dataset_config: str = "default"
    sources: dict[str, float] = field(default_factory=dict)
    train_split: str = "train"
    eval_split: str | None = None
    eval_questions: int = 0
    early_stopping_patience: int | None = None
    streaming: bool = False
    shuffle_buffer: int = 0
    rows_per_image: int = 1
    image_cache: int = 0
    bad_sample_limit: float = 0.01

    def __post_init__(self) -> None:
        if isinstance(self.sources, list):
            self.sources = dict.fromkeys(self.sources, 1.0)
        starts = {
            "model": bool(self.model),
            "vision + language_model": bool(self.vision or self.language_model),
            "vocab_size": self.vocab_size is not None,
        }
        if sum(starts.values()) != 1:
            given = [name for name, is_given in starts.items() if is_given] or "none"
            raise ValueError(f"a recipe starts from exactly one of {', '.join(starts)}; given: {given}")
        if unknown := sorted(set(self.train) - set(PARTS)) or ([] if self.train else ["nothing"]):
            raise ValueError(f"train: {', '.join(unknown)}: choose from {', '.join(PARTS)}")
        if {"lora", "language_model"} <= set(self.train):
            raise ValueError("train: lora adapts a frozen language model; name either lora or language_model")
        if "lora" in self.train and not self.model:
            raise ValueError(
                "train: lora needs `model`, a saved checkpoint: adapters are stored without what they adapt. Train "
                "[fusion] from the components first (stage 1)"
            )
        if self.quantization and "lora" not in self.train:
            raise ValueError("quantization: weights of 4 or 8 bits cannot learn: add lora to `train`")
        for one in self.datasets:
            _check_dataset(one)

    @property
    def datasets(self) -> list[dict[str, Any]]:
        """`load_dataset`'s arguments for each dataset, with its weight, train_split and eval_split."""
        defaults = {"name": self.dataset_config, "train_split": self.train_split, "eval_split": self.eval_split}
        given = [{"path": self.dataset}] if isinstance(self.dataset, str) else self.dataset
        if not isinstance(given, list) or not given or not all(isinstance(one, dict) for one in given):
            raise ValueError(f"dataset: {self.dataset}: expected a folder, a name or a list of mappings with a path")
        return [{**defaults, "weight": 1, **one} for one in given]


def _check_dataset(one: dict[str, Any]) -> None:
    if not isinstance(one.get("path"), str):
        raise ValueError(f"dataset: {one}: a mapping needs a path, such as path: biovgq")
    if not isinstance(one["weight"], int | float) or not one["weight"] > 0:
        raise ValueError(f"dataset {one['path']}: weight {one['weight']}, must be a number above 0")
    own = {"split": "train_split and eval_split name splits", "streaming": "it holds for all, beside dataset"}
    for name in own.keys() & one:
        raise ValueError(f"dataset {one['path']}: {name} does not belong there: {own[name]}")


def _check_sampling(recipe: Recipe, arguments: TrainingArguments) -> None:
    """What a stream cannot do, and orders that exclude each other."""
    strategy = arguments.train_sampling_strategy
    if not recipe.streaming:
        if recipe.shuffle_buffer:
            raise ValueError("shuffle_buffer is a stream's; without streaming: true all rows are shuffled")
        if strategy not in ("random", "group_by_length") and recipe.rows_per_image > 1:
            raise ValueError(f"train_sampling_strategy {strategy}: rows_per_image has its own; take one out")
        return
    weights = [one["weight"] for one in recipe.datasets] + list(recipe.sources.values())
    reasons = {
        "max_steps is missing: nobody knows how many rows there are": arguments.max_steps <= 0,
        "vocab_size trains a tokenizer on all texts: start from a model or components": recipe.vocab_size is not None,
        "weights need all rows at hand: take them out": set(weights) != {1},
        "rows_per_image needs all rows at hand: take it out (neighbours share an image anyway)": (
            recipe.rows_per_image > 1
        ),
        f"train_sampling_strategy {strategy} needs all rows at hand: take it out": strategy != "random",
    }
    for reason, applies in reasons.items():
        if applies:
            raise ValueError(f"streaming: {reason}")


def load_recipe(path: Path, overrides: list[str]) -> tuple[Recipe, TrainingArguments, dict[str, Any]]:
    """Read a recipe, apply `--field value` overrides.

    Returns:
        The recipe, the Trainer's arguments, and the merged keys as they should be saved.

    Raises:
        ValueError: for a file that is not a mapping, an unknown key (naming the nearest), a missing or impossible
            value.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such recipe")
    try:
        values = yaml.load(path.read_text(), _Loader)
    except (OSError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: cannot be read as YAML: {_TOKEN.sub('hf_...', str(error))}") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of field: value")
    for name, value in _parse_overrides(overrides):
        _set(values, name, value)
    _refuse_secrets(path, values)
    _check_names(path, values)
    try:
        fields_given = {"report_to": "tensorboard", **for_this_machine(values)}
        recipe, arguments = HfArgumentParser((Recipe, TrainingArguments)).parse_dict(fields_given)
    except TypeError as error:  # a required field is missing
        raise ValueError(f"{path}: {error}") from error
    _check_sampling(recipe, arguments)
    return recipe, arguments, values


def _parse_overrides(words: list[str]) -> list[tuple[str, Any]]:
    """`--a 1 --b=2` -> [("a", 1), ("b", 2)], values read as YAML."""
    pairs, rest = [], list(words)
    while rest:
        word = rest.pop(0)
        name, equals, value = word.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"{word}: expected --field value")
        if not equals:
            if not rest:
                raise ValueError(f"{word}: a value is missing")
            value = rest.pop(0)
        try:
            pairs.append((name.removeprefix("--"), yaml.load(value, _Loader)))
        except yaml.YAMLError as error:
            reason = getattr(error, "problem", None) or "not YAML"
            raise ValueError(f"{name} {_TOKEN.sub('hf_...', value)}: the value is not YAML ({reason})") from None
    return pairs


def _set(values: dict[str, Any], name: str, value: Any) -> None:
    *parents, last = name.split(".")
    for parent in parents:
        values[parent] = values.get(parent) or {}
        values = values[parent]
        if not isinstance(values, dict):
            raise ValueError(f"--{name}: {parent} is {values!r}, which has no fields")
    values[last] = value


def _refuse_secrets(path: Path, values: dict[str, Any]) -> None:
    """A recipe is saved beside the run and repeated in its card. The error must not repeat the secret."""
    text = yaml.safe_dump(values)
    if _TOKEN_KEY.search(text) or _TOKEN.search(text):
        raise ValueError(f"{path}: a recipe is published with its model and must hold no token: set HF_TOKEN instead")
    if given := [name for name in _NO_PUSH_FIELDS if name in values]:
        raise ValueError(f"{path}: {given[0]} does not apply: a run is pushed once, at its end, to the main branch")


def _check_names(path: Path, values: dict[str, Any]) -> None:
    known = [f.name for cls in (Recipe, TrainingArguments) for f in fields(cls) if f.init]
    for name in values:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; the nearest is {nearest[0]}" if nearest else ""
            raise ValueError(f"{path}: unknown field {name}{hint}")
