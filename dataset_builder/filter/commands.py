"""The filter's verbs: annotate, train-filter, filter."""

import argparse
from pathlib import Path

from ...cli import ArgumentParser
from .labels import Session, agreement, read_labels, seeded_order


def add_verbs(verbs: "argparse._SubParsersAction[ArgumentParser]") -> None:
    """Add the three verbs to the builder's command line; each sets `command` to the function that carries it out."""
    annotate = verbs.add_parser("annotate", help="label figures clean or polluted on a local page, or compare labels")
    annotate.add_argument("dataset", type=Path, nargs="?", help="the dataset's folder")
    annotate.add_argument("--labels", type=Path, required=True, help="the file of labels, appended to (JSON lines)")
    annotate.add_argument("--annotator", help="who labels; each works through the same figures, blind to the others")
    annotate.add_argument("--figures", type=int, default=3000, help="how many to label (default: the paper's 3000)")
    annotate.add_argument("--seed", type=int, default=0, help="of the order, the same for all annotators (default: 0)")
    annotate.add_argument("--port", type=int, help="of the page (default: the first free from 7860)")
    annotate.add_argument("--agreement", action="store_true", help="only print how far the annotators agree")
    annotate.set_defaults(command=run_annotate)
    train = verbs.add_parser("train-filter", help="a figure classifier from labels")
    train.add_argument("dataset", type=Path, help="the folder of the dataset that was labelled")
    train.add_argument("--labels", type=Path, required=True, help="what `annotate` wrote")
    train.add_argument("--encoder", type=Path, required=True, help="folder of PMC-CLIP's or another image encoder")
    train.add_argument("--output", type=Path, required=True, help="the filter's folder")
    train.add_argument("--precision", type=float, default=0.95, help="wanted among the figures kept (default: 0.95)")
    _add_workers(train)
    train.set_defaults(command=run_train)
    apply = verbs.add_parser("filter", help="score a dataset's figures: columns filter_score and filter_keep")
    apply.add_argument("dataset", type=Path, help="the dataset's folder")
    apply.add_argument("--filter", type=Path, required=True, help="what `train-filter` wrote")
    apply.add_argument("--output", type=Path, required=True, help="the folder to write; no row is left out")
    apply.add_argument("--encoder", type=Path, help="the encoder's folder, if it was moved since the training")
    _add_workers(apply)
    apply.set_defaults(command=run_filter)


def _add_workers(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workers", type=int, default=0, help="processes that decode ahead (default: 0, none)")


def run_annotate(arguments: argparse.Namespace) -> None:
    """Serve the page until Ctrl-C, or print the agreement."""
    if arguments.agreement:
        print("\n".join(agreement_lines(arguments.labels)))
        return
    if arguments.dataset is None or not arguments.annotator:
        raise ValueError("annotate: DATASET and --annotator NAME are needed to label, --agreement to compare labels")
    from .figures import Figures
    from .page import make_page, serve

    figures = Figures(arguments.dataset)
    order = seeded_order(figures.groups, arguments.seed)[: arguments.figures]
    session = Session(order, arguments.labels, arguments.annotator)
    print(f"{session.done} of {len(order)} figures labelled by {arguments.annotator}; Ctrl-C ends, nothing is lost")
    serve(make_page(figures, session), arguments.port)


def agreement_lines(labels: Path) -> list[str]:
    """Cohen's kappa of each pair of annotators, and the figures on which they disagree."""
    lines = []
    for pair in agreement(read_labels(labels)):
        first, second = pair["annotators"]
        estimate = "undefined: both gave one label only"
        if pair["kappa"] is not None:
            low, high = pair["interval"]
            estimate = f"{pair['kappa']:.3f} (95 % interval {low:.3f} to {high:.3f})"
        lines.append(f"{first} and {second}, {pair['figures']} figures: Cohen's kappa {estimate}")
        lines += [f"  {sha}  {first}: {a}, {second}: {b}" for sha, a, b in pair["disagreements"]]
    return lines


def run_train(arguments: argparse.Namespace) -> None:
    """Train a filter and print its report."""
    from .train import report_lines, train_filter

    record = train_filter(
        arguments.dataset,
        arguments.labels,
        arguments.encoder,
        arguments.output,
        precision=arguments.precision,
        workers=arguments.workers,
    )
    labels = ", ".join(f"{count} {name}" for name, count in record["labels"].items() if name != "sha256")
    print("\n  ".join([f"trained {arguments.output}", f"labels: {labels}", *report_lines(record)]))


def run_filter(arguments: argparse.Namespace) -> None:
    """Filter a dataset and print how many figures and rows are on each side."""
    from .apply import filter_dataset, summary_lines

    result = filter_dataset(
        arguments.dataset, arguments.filter, arguments.output, arguments.encoder, workers=arguments.workers
    )
    print("\n  ".join([f"filtered {arguments.dataset} into {result.output}", *summary_lines(result)]))
