"""The builder's commands.

    python -m biod2c.dataset_builder ingest --source slake --data RAW --output OUT
    python -m biod2c.dataset_builder all RECIPE.yaml [--output OUT]
    python -m biod2c.dataset_builder annotate DATASET --labels labels.jsonl --annotator NAME
    python -m biod2c.dataset_builder train-filter DATASET --labels labels.jsonl --encoder FOLDER --output FILTER
    python -m biod2c.dataset_builder filter DATASET --filter FILTER --output OUT

`ingest` turns one raw source into a dataset with its official splits; `all` runs every step of a recipe. The last three
find out which figures are clean.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..cli import ArgumentParser
from .build import BuildResult, build
from .filter import commands as filter_commands
from .recipe import Recipe, RecipeError, SourceOptions, read_recipe
from .sources import READERS


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    commands = ArgumentParser(prog="biod2c build", description="Build a BioVGQ dataset.")
    verbs = commands.add_subparsers(dest="verb", required=True)
    ingest = verbs.add_parser("ingest", help="one raw source to a dataset, its official splits kept")
    ingest.add_argument("--source", choices=sorted(READERS), required=True)
    ingest.add_argument("--data", type=Path, required=True, help="the source's raw folder")
    ingest.add_argument("--output", type=Path, required=True, help="the folder to write")
    ingest.add_argument("--languages", nargs="+", default=["en"], help="SLAKE: en, zh or both (default: en)")
    every = verbs.add_parser("all", help="every step of a recipe")
    every.add_argument("recipe", type=Path, help="a YAML file such as recipes/demo/dataset.yaml")
    every.add_argument("--output", type=Path, help="the folder to write (default: the recipe's `output`)")
    filter_commands.add_verbs(verbs)
    return commands


def run(arguments: argparse.Namespace) -> BuildResult:
    """Carry out one command."""
    if arguments.verb == "ingest":
        source = SourceOptions(arguments.data, tuple(arguments.languages))
        return build(Recipe(sources={arguments.source: source}), arguments.output)
    recipe = read_recipe(arguments.recipe)
    output = arguments.output or recipe.output
    if output is None:
        raise RecipeError(f"{arguments.recipe}: output is not set; set it or give --output")
    return build(recipe, output)


def summary(result: BuildResult) -> str:
    """What a build did, for the terminal."""
    state = "nothing has changed since the last build of" if result.unchanged else "built"
    lines = [f"{state} {result.output} (content {result.content})"]
    for config, splits in result.rows.items():
        lines.append(f"  {config:<10}" + "".join(f" {split} {count:>6}" for split, count in splits.items()))
    return "\n".join(lines + [f"  {line}" for line in result.report])


def main(argv: Sequence[str] | None = None) -> None:
    """Run one command and print what it built.

    Raises:
        ValueError, OSError: what is wrong with the command, recipe or source; `biod2c.cli` prints it as one line.
    """
    arguments = parser().parse_args(argv)
    if "command" in arguments:
        arguments.command(arguments)
    else:
        print(summary(run(arguments)))


if __name__ == "__main__":
    from biod2c.cli import run as run_verb

    sys.exit(run_verb("build", sys.argv[1:]))
