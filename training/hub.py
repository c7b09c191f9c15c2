"""A run on the Hugging Face Hub: the model card that says what it is, and the push.

Unusual here: not Trainer's own push, which sends what happens to lie in the folder, checkpoints and all, while it
trains. A run is pushed once, whole, at its end and in one commit, so that the Hub never shows half of one; what is sent
is a list of names, because the folder also holds what must not leave the machine (ids of patients' files in
bad_samples.jsonl, logs, optimizer states). The token is read by huggingface_hub alone, from HF_TOKEN or its own login.
"""

import hashlib
import json
import re
import sys
from collections.abc import Mapping
from fnmatch import fnmatch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from datasets import Dataset, IterableDataset
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
)
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from transformers import TrainerState, TrainingArguments

from .. import __version__
from ..hub_retries import reason, with_retries
from .recipe import Recipe

PUSHED = (
    *("model*.safetensors", "model.safetensors.index.json", "config.json", "generation_config.json"),
    *("adapter_model.safetensors", "adapter_config.json", "*_biod2c.py"),
    *("processor_config.json", "chat_template.jinja", "tokenizer*", "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "recipe.yaml", "README.md", "losses.png"),
)
RECORD = "hub.json"  # beside a run that was pushed: where to, and which commit
VERSIONS = ("torch", "transformers", "peft", "accelerate", "deepspeed", "datasets", "huggingface_hub", "safetensors")

_COMMIT = re.compile("[0-9a-f]{40}")

# --------------------------------------------------------------------------------------------------------------- push


def open_repository(recipe: Recipe, arguments: TrainingArguments) -> str:
    """Make the run's Hub repo, unless it is there, and return its full name. Called before training: a wrong token or
    name should cost no hours.

    Raises:
        ValueError: without a token, for a name that cannot be, a repo that this token may not make, and adapters to a
            base that nobody else could load.
    """
    if get_token() is None:
        raise ValueError("push_to_hub needs a token: set HF_TOKEN or run `hf auth login`")
    if "lora" in recipe.train and recipe.model and Path(recipe.model).exists() and hub_name(recipe.model) is None:
        raise ValueError(
            f"push_to_hub: the adapters would name the local folder {recipe.model} as their base. Push that run first "
            "(its command again, with --push_to_hub true), or train without pushing and `biod2c merge`"
        )
    name = arguments.hub_model_id or Path(arguments.output_dir).resolve().name
    try:
        made = with_retries(lambda: HfApi().create_repo(name, private=arguments.hub_private_repo, exist_ok=True))
    except (HTTPError, OSError, ValueError) as error:
        raise ValueError(f"the Hub repo {name} cannot be made, nothing was trained: {reason(error)}") from error
    return made.repo_id


def push_run(output: Path, repo: str) -> str:
    """Push what a finished run made to the Hub, in one commit, and return the commit's address.

    Raises:
        ValueError: if the Hub refuses it, or does not answer after several tries. The run stays as it is.
    """
    (output / RECORD).unlink(missing_ok=True)  # until it is there, no other run should build upon it
    try:
        commit = with_retries(
            lambda: HfApi().create_commit(repo, _changes(output, repo), commit_message="Trained model")
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: of a file's upload
        raise ValueError(
            f"push to {repo} failed: {reason(error)}. The run is whole in {output}; push it with "
            f"`python -m biod2c.training.hub {output} {repo}`"
        ) from error
    (output / RECORD).write_text(json.dumps({"repo": repo, "commit": commit.oid}) + "\n")
    return str(commit.commit_url)


def pushed_files(output: Path) -> list[Path]:
    """The files of a run that are for the Hub; nothing in a folder of its own is."""
    return sorted(path for path in output.iterdir() if path.is_file() and _is_pushed(path.name))


def _is_pushed(name: str) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in PUSHED)


def _changes(output: Path, repo: str) -> list[CommitOperationAdd | CommitOperationDelete]:
    """Every file of the run, and the removal of those that an earlier push to the same repo left, such as weights in
    more shards."""
    files = pushed_files(output)
    stale = {name for name in HfApi().list_repo_files(repo) if _is_pushed(name)} - {path.name for path in files}
    changes: list[CommitOperationAdd | CommitOperationDelete] = [CommitOperationDelete(name) for name in sorted(stale)]
    for path in files:
        content = _with_base_on_hub(path) if path.name == "adapter_config.json" else path
        changes.append(CommitOperationAdd(path.name, content))
    return changes


def _with_base_on_hub(path: Path) -> bytes:
    """adapter_config.json with the base's Hub name instead of its folder, which is on this machine alone."""
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = hub_name(config["base_model_name_or_path"]) or config["base_model_name_or_path"]
    return json.dumps(config, indent=2).encode()


# --------------------------------------------------------------------------------------------------------------- card


def hub_name(name: str) -> str | None:
    """The Hub's name for a model or data set: itself, or what its local folder was pushed as; None if neither."""
    folder = Path(name)
    if folder.exists():
        record = folder / RECORD
        return json.loads(record.read_text())["repo"] if record.is_file() else None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def rows_fingerprint(rows: Dataset) -> str:
    """SHA-256 over what is learned from rows, in order; of their images, the hashes that the data set gives."""
    columns = ["id", "image_sha256", "history", "question", "answer", "queue"]
    digest = hashlib.sha256()
    for row in rows.select_columns(columns):
        digest.update(json.dumps([row[column] for column in columns]).encode() + b"\n")
    return digest.hexdigest()


def write_card(
    output: Path,
    recipe: Recipe,
    values: Mapping[str, Any],
    splits: Mapping[str, Dataset | IterableDataset],
    state: TrainerState,
    repo: str | None,
) -> None:
    """Write the run's README.md: metadata for the Hub, then for people what it is, its results, data, recipe and
    versions.

    Args:
        values: the recipe's keys as they are saved beside the run.
        splits: the rows that it used, by split name.
        repo: where it will be pushed, if anywhere.
    """
    name = repo or output.resolve().name
    text = "\n\n".join(
        [
            f"# {name}",
            "A BioD2C model ([paper](https://arxiv.org/abs/2503.02476)): it answers questions about biomedical images. "
            f"Trained parts: {', '.join(recipe.train)}. Started from: {_start(recipe)}.",
            "**Not a medical device.** For research only: its answers can be wrong, and no decision about a person's "
            "health may rest on them.",
            f"## Use\n\n{_usage(repo or str(output))}",
            f"## Results\n\n{_results(state)}",
            f"## Data\n\n{_data(recipe, splits)}",
            f"## Recipe\n\n```yaml\n{yaml.safe_dump(dict(values), sort_keys=False)}```",
            f"## Versions\n\n{_versions()}",
        ]
    )
    ModelCard(f"---\n{_metadata(recipe).to_yaml()}\n---\n\n{text}\n").save(output / "README.md")


def _metadata(recipe: Recipe) -> ModelCardData:
    bases = [name for base in _bases(recipe) if (name := hub_name(base))]
    datasets = [name for one in recipe.datasets if (name := hub_name(one["path"]))]
    license_id, license_name = _license(recipe)
    return ModelCardData(
        license=license_id,
        license_name=license_name,
        library_name="transformers",  # adapters too: AutoModelForImageTextToText loads them with their base
        pipeline_tag="image-text-to-text",
        language="en",
        tags=["biod2c", "medical", "visual-question-answering"] + ["lora"] * ("lora" in recipe.train),
        base_model=bases or None,  # the Hub refuses local paths here
        datasets=list(dict.fromkeys(datasets)) or None,
    )


def _bases(recipe: Recipe) -> list[str]:
    return [base for base in (recipe.model, recipe.vision, recipe.language_model) if base]


def _license(recipe: Recipe) -> tuple[str, str | None]:
    """This code's for a model that started from nothing; else the base's, which only a local base's card tells."""
    if not _bases(recipe):
        return "apache-2.0", None
    card = Path(recipe.model or "", "README.md")
    card_data = ModelCard.load(card).data if recipe.model and card.is_file() else ModelCardData()
    if known := card_data.get("license"):
        return known, card_data.get("license_name")
    return "other", "license-of-the-base-model"


def _start(recipe: Recipe) -> str:
    return ", ".join(f"`{hub_name(base) or base}`" for base in _bases(recipe)) or "random weights"


def _usage(model: str) -> str:
    return f"""```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("{model}", trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained("{model}", trust_remote_code=True)
inputs = processor(images="scan.png", text="Is there a fracture?")
output = model.generate(**inputs, max_new_tokens=96, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))
```"""


def _results(state: TrainerState) -> str:
    """The evaluation of the weights that were saved: the best ones' if the run went back to them, else the last."""
    evaluations = [entry for entry in state.log_history if "eval_loss" in entry]
    best = [entry for entry in evaluations if entry["step"] == state.best_global_step]
    if not evaluations:
        return f"{state.global_step} steps. Not evaluated while it trained."
    (entry,) = best[-1:] or evaluations[-1:]
    timing = ("runtime", "per_second", "compilation_time")
    shown = [name for name in entry if name.startswith("eval_") and not name.endswith(timing)]
    lines = [f"| {name.removeprefix('eval_')} | {entry[name]:.4g} |" for name in shown]
    title = f"On held-out rows, after {entry['step']} of {state.global_step} steps (losses, or shares from 0 to 1):"
    return "\n".join([title, "", "| measure | value |", "|---|---|", *lines])


def _data(recipe: Recipe, splits: Mapping[str, Dataset | IterableDataset]) -> str:
    lines = [_dataset_line(one, next(iter(splits.values()))) for one in recipe.datasets]
    if recipe.sources:
        lines.append(f"- of these the sources {', '.join(recipe.sources)}")
    lines += ["", "| split | rows | SHA-256 of the rows | licenses |", "|---|---|---|---|"]
    for name, rows in splits.items():
        if isinstance(rows, IterableDataset):
            lines.append(f"| {name} | streamed, not counted | - | - |")
            continue
        licenses = sorted({license_ or "-" for license_ in rows["license"]})
        lines.append(f"| {name} | {len(rows)} | `{rows_fingerprint(rows)}` | {', '.join(licenses) or '-'} |")
    return "\n".join(lines)


def _dataset_line(one: Mapping[str, Any], rows: Dataset | IterableDataset) -> str:
    line = f"- `{one['path']}`, configuration `{one['name']}`"
    if one["weight"] != 1:
        line += f", weight {one['weight']}"
    revision = one.get("revision") or (_revision(rows, one["path"]) if isinstance(rows, Dataset) else None)
    return f"{line}, Hub revision `{revision}`" if revision else line


def _revision(rows: Dataset, path: str) -> str | None:
    """The commit of the Hub's data set that rows came from: `load_dataset` names their folder in its cache by it."""
    folders = [Path(file["filename"]).parent for file in rows.cache_files]
    return next((f.name for f in folders if path.replace("/", "___") in f.parts and _COMMIT.fullmatch(f.name)), None)


def _versions() -> str:
    lines = [f"- biod2c {__version__}", f"- Python {sys.version.split()[0]}"]
    for package in VERSIONS:
        try:
            lines.append(f"- {package} {version(package)}")
        except PackageNotFoundError:
            continue
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python -m biod2c.training.hub RUN_FOLDER ORG/NAME")
    try:
        print(f"pushed {push_run(Path(sys.argv[1]), sys.argv[2])}")
    except (OSError, ValueError) as failure:
        sys.exit(str(failure))
