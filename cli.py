"""The `biod2c` console script: one short function a verb.

Unusual here: a verb imports its module only when it runs, so that `biod2c --help` answers at once, without torch. What
the user got wrong (a missing file, a value out of range, an extra that is not installed) is one line on stderr and exit
code 2; with `BIOD2C_TRACEBACK=1` in the environment, the traceback shows where such an error came from.
"""

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from . import __version__


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose errors are one line; the usage is a `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def train(argv: list[str]) -> None:
    """train a model from a recipe: stage 1, stage 2 or an ablation"""
    from .train_hf import main

    main(argv)


def build(argv: list[str]) -> None:
    """build the BioVGQ data set from its sources' raw files"""
    from .dataset_builder.__main__ import main

    main(argv)


def evaluate(argv: list[str]) -> int | None:
    """score a model's answers to a benchmark"""
    from .evaluate_hf import main

    return main(argv)


def convert(argv: list[str]) -> None:
    """turn the authors' or PMC-CLIP's weights into this format"""
    from .convert_checkpoint import main

    main(argv)


def merge(argv: list[str]) -> None:
    """make one full checkpoint of a run that trained LoRA adapters"""
    from .training.merge import main

    main(argv)


def ask(argv: list[str]) -> int | None:
    """ask a model a question about an image"""
    from .ask import main

    return main(argv)


def demo(argv: list[str]) -> None:
    """train, score and show a tiny model on real data (CPU, minutes)"""
    description = "From raw files to an answer and a picture of where the model looked; results in out/demo."
    ArgumentParser(prog="biod2c demo", description=description).parse_args(argv)
    from .demo import main

    main()


VERBS: dict[str, Callable[[list[str]], int | None]] = {
    verb.__name__: verb for verb in (train, build, evaluate, convert, merge, ask, demo)
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the verb that `argv` (default: the command line) names; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = ArgumentParser(prog="biod2c", description="Biomedical visual question answering with BioD2C.")
    parser.add_argument("--version", action="version", version=f"biod2c {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for name, verb in VERBS.items():
        verbs.add_parser(name, help=verb.__doc__, add_help=False)
    # only the verb is parsed here: everything after it, --help included, belongs to the verb
    arguments = parser.parse_args(argv[:1])
    return run(arguments.verb, argv[1:])


def run(verb: str, argv: list[str]) -> int:
    """Run one verb, turning a user's mistake into one line on stderr and exit code 2."""
    try:
        return VERBS[verb](argv) or 0
    except (OSError, ValueError, ModuleNotFoundError) as error:
        if os.environ.get("BIOD2C_TRACEBACK"):
            raise
        print(f"biod2c {verb}: {_one_line(error)}", file=sys.stderr)
        return 2


def _one_line(error: Exception) -> str:
    if isinstance(error, ModuleNotFoundError):
        extras = "biod2c[train,data,eval,app,generate]"
        return f"{error.name} is not installed; pip install '{extras}' brings what every verb needs"
    return " ".join(str(error).split()) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
