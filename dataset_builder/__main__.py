"""The builder's commands.

    python -m biod2c.dataset_builder ingest --source slake --data RAW --output OUT
    python -m biod2c.dataset_builder annotate DATASET --labels labels.jsonl --annotator NAME
    python -m biod2c.dataset_builder train-filter DATASET --labels labels.jsonl --encoder FOLDER --output FILTER
    python -m biod2c.dataset_builder filter DATASET --filter FILTER --output OUT
    python -m biod2c.dataset_builder generate DATASET --model NAME --output OUT
    python -m biod2c.dataset_builder all RECIPE.yaml [--output OUT]
    python -m biod2c.dataset_builder push FOLDER ORG/NAME [--private]

`ingest` turns one raw source into a dataset with its official splits. `annotate`, `train-filter` and `filter` find out
which figures are clean. `generate` has a vision-language model write question-answer pairs about images and captions.
`all` runs every step of a recipe; `push` puts what they built on the Hub.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import ArgumentParser
from .build import BuildResult, build
from .filter import commands as filter_commands
from .generate_arguments import add_arguments as add_generate_arguments
from .push import push_dataset
from .recipe import Recipe, RecipeError, SourceOptions, read_recipe
from .sources import OPTIONS, READERS


def parser() -> argparse.ArgumentParser:
    """The command line's arguments; each verb sets `command` to the function that carries it out."""
    commands = ArgumentParser(prog="biod2c build", description="Build a BioVGQ dataset.")
    verbs = commands.add_subparsers(dest="verb", required=True)
    ingest = verbs.add_parser("ingest", help="one raw source to a dataset, its official splits kept")
    ingest.add_argument("--source", choices=sorted(READERS), required=True)
    ingest.add_argument("--data", type=Path, required=True, help="the source's raw folder")
    ingest.add_argument("--output", type=Path, required=True, help="the folder to write")
    ingest.add_argument("--languages", nargs="+", default=["en"], help="SLAKE: en, zh or both (default: en)")
    ingest.add_argument(
        "--license", help="folder, dicom: the licence of your data, as SPDX names it (default: unknown)"
    )
    ingest.set_defaults(command=run_ingest)
    filter_commands.add_verbs(verbs)
    generate = verbs.add_parser("generate", help="question-answer pairs from images and captions")
    add_generate_arguments(generate)
    generate.set_defaults(command=run_generate)
    every = verbs.add_parser("all", help="every step of a recipe")
    every.add_argument("recipe", type=Path, help="a YAML file such as recipes/demo/dataset.yaml")
    every.add_argument("--output", type=Path, help="the folder to write (default: the recipe's `output`)")
    every.set_defaults(command=run_all)
    push = verbs.add_parser("push", help="a built dataset to the Hugging Face Hub")
    push.add_argument("folder", type=Path, help="what `ingest` or `all` wrote")
    push.add_argument("name", help="the dataset repo, ORG/NAME; made if it is not there")
    push.add_argument("--private", action="store_true", help="make the repo private")
    push.set_defaults(command=run_push)
    return commands


def run_ingest(arguments: argparse.Namespace) -> None:
    """One source, with nothing but its rows."""
    own = {"license": arguments.license} if arguments.license else {}
    if not own.keys() <= set(OPTIONS.get(arguments.source, ())):
        raise RecipeError(f"--license: {arguments.source} has its own licence; leave it out")
    source = SourceOptions(arguments.data, tuple(arguments.languages), own)
    print(summary(build(Recipe(sources={arguments.source: source}), arguments.output)))


def run_generate(arguments: argparse.Namespace) -> None:
    """Ask for pairs and build what came back; a dry run builds nothing."""
    from .generate_folder import run as generate  # needs the extra `generate`

    if result := generate(arguments):
        print(summary(result))


def run_all(arguments: argparse.Namespace) -> None:
    """A recipe."""
    recipe = read_recipe(arguments.recipe)
    output = arguments.output or recipe.output
    if output is None:
        raise RecipeError(f"{arguments.recipe}: output is not set; set it or give --output")
    print(summary(build(recipe, output)))


def run_push(arguments: argparse.Namespace) -> None:
    """To the Hub."""
    print(f"pushed {push_dataset(arguments.folder, arguments.name, arguments.private)}")


def summary(result: BuildResult) -> str:
    """What a build did, for the terminal."""
    state = "nothing has changed since the last build of" if result.unchanged else "built"
    lines = [f"{state} {result.output} (content {result.content})"]
    for config, splits in result.rows.items():
        lines.append(f"  {config:<10}" + "".join(f" {split} {count:>6}" for split, count in splits.items()))
    return "\n".join(lines + [f"  {line}" for line in result.report])


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command; it prints what it did.

    Raises:
        ValueError, OSError: what is wrong with the command, recipe or source; `biod2c.cli` prints it as one line.
    """
    arguments = parser().parse_args(argv)
    arguments.command(arguments)


if __name__ == "__main__":
    from biod2c.cli import run as run_verb

    sys.exit(run_verb("build", sys.argv[1:]))
