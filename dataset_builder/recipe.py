"""A build as data: which sources, from where, and what goes into the mixture, in one YAML file. Paths are relative to
it.

    output: ../../out/demo/biovgq
    sources:
      slake: {data: ../../examples/slake, languages: [en]}
      vqa_rad: {data: ../../examples/vqa_rad}
    captions: [slake]              # sources whose boxes become captions: column `caption`, configuration `pretrain`
    queue: {size: 30, from_caption: 15}    # without this block no queue is made
    default:                       # the mixture; a source that is not named stays out of it
      slake: official              # its own splits
      vqa_rad: 0.2                 # this share of its training images becomes validation
      pmc_vqa: 8:1:1               # train, validation and test, by paper and image
    dialogues: 0.1                 # this share of the training rows gets earlier questions on its image as turns
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from .queue import QueueOptions
from .sources import OPTIONS, READERS

OFFICIAL, EIGHT_ONE_ONE = "official", "8:1:1"
CAPTIONED = ("slake",)  # the sources whose raw files hold boxes


class RecipeError(ValueError):
    """A recipe that cannot be run: which file and field, what stands there, what is allowed."""


@dataclass(frozen=True)
class SourceOptions:
    """Where a source's raw folder lies, which of its languages are read, and the options that it has of its own."""

    data: Path
    languages: tuple[str, ...] = ("en",)
    own: Mapping[str, str] = dataclasses.field(default_factory=dict)  # names from sources.OPTIONS


@dataclass(frozen=True)
class Recipe:
    """One build. `default` maps a source to "official", "8:1:1" or the held-out share of its training images."""

    sources: dict[str, SourceOptions]
    captions: tuple[str, ...] = ()
    queue: QueueOptions | None = None
    default: Mapping[str, str | float] = dataclasses.field(default_factory=dict)
    dialogues: float = 0.0  # the share of the mixture's training rows that get earlier questions as turns
    output: Path | None = None


def read_recipe(path: Path) -> Recipe:
    """The recipe in a YAML file, checked. RecipeError names the field that is wrong."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}); give the path of a recipe") from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML ({' '.join(str(error).split())})") from error
    fields = _mapping(path, "recipe", content, {"sources", "captions", "queue", "default", "dialogues", "output"})
    sources = _sources(path, fields.get("sources"))
    output = fields.get("output")
    return Recipe(
        sources=sources,
        captions=_captions(path, fields.get("captions") or [], sources),
        queue=_queue(path, fields["queue"]) if "queue" in fields else None,
        default=_default(path, fields.get("default") or {}, sources),
        dialogues=_share(path, "dialogues", fields.get("dialogues", 0.0)),
        output=_beside(path, output) if output else None,
    )


def _beside(path: Path, name: str) -> Path:
    """A path that the recipe gives relative to its own folder, without "..", as messages show it."""
    return Path(os.path.normpath(path.parent / name))


def _mapping(path: Path, field: str, value: Any, allowed: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise RecipeError(f"{path}: {field} is {value!r}, expected a mapping with keys among {sorted(allowed)}")
    unknown = sorted(str(key) for key in value if key not in allowed)
    if unknown:
        raise RecipeError(f"{path}: {field} has unknown keys {unknown}, allowed are {sorted(allowed)}")
    return value


def _sources(path: Path, value: Any) -> dict[str, SourceOptions]:
    sources = {}
    for name, options in _mapping(path, "sources", value, set(READERS)).items():
        fields = _mapping(path, f"sources.{name}", options, {"data", "languages", *OPTIONS.get(name, ())})
        languages = fields.get("languages", ["en"])
        if not isinstance(fields.get("data"), str):
            raise RecipeError(f"{path}: sources.{name}.data is {fields.get('data')!r}, expected a folder")
        if not isinstance(languages, list) or not languages:
            raise RecipeError(f"{path}: sources.{name}.languages is {languages!r}, expected a list such as [en]")
        own = {option: fields[option] for option in OPTIONS.get(name, ()) if option in fields}
        for option, text in own.items():
            if not isinstance(text, str) or not text.strip():
                raise RecipeError(f"{path}: sources.{name}.{option} is {text!r}, expected a text")
        sources[name] = SourceOptions(_beside(path, fields["data"]), tuple(languages), own)
    return sources


def _share(path: Path, field: str, value: Any) -> float:
    if not isinstance(value, int | float) or not 0 <= value <= 1:
        raise RecipeError(f"{path}: {field} is {value!r}, expected a share from 0 to 1")
    return float(value)


def _captions(path: Path, value: Any, sources: Mapping[str, SourceOptions]) -> tuple[str, ...]:
    allowed = [name for name in CAPTIONED if name in sources]
    if not isinstance(value, list) or not set(value) <= set(allowed):
        raise RecipeError(f"{path}: captions is {value!r}, expected a list of sources among {allowed}")
    return tuple(value)


def _queue(path: Path, value: Any) -> QueueOptions:
    names = {field.name for field in dataclasses.fields(QueueOptions)}
    options = QueueOptions(**_mapping(path, "queue", value, names))
    for name in sorted(names):
        number = getattr(options, name)
        if not isinstance(number, int) or not 0 <= number <= 30:
            raise RecipeError(f"{path}: queue.{name} is {number!r}, expected a whole number from 0 to 30")
    return options


def _default(path: Path, value: Any, sources: Mapping[str, SourceOptions]) -> dict[str, str | float]:
    choices: dict[str, str | float] = _mapping(path, "default", value, set(sources))
    for name, share in choices.items():
        is_share = isinstance(share, float) and 0 < share < 1
        if share not in (OFFICIAL, EIGHT_ONE_ONE) and not is_share:
            raise RecipeError(
                f"{path}: default.{name} is {share!r}, expected official, 8:1:1 or a share between 0 and 1"
            )
    return choices
