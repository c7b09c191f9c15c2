"""Images that are the same, exactly or nearly, and so must not stand on two sides of a split.

Two images count as one if their bytes are equal or if their perceptual hashes (256 bits of brightness differences, see
images.py) differ in at most NEAR bits: re-encoded, resized or slightly cropped copies, and neighbouring slices of one
scan. An image's rows, its near-duplicates' and its paper's or patient's (`group`) belong together.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations

import faiss
import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from .schema import Row

NEAR = 24  # bits of 256
EXAMPLES = 5  # pairs of near-duplicates that the report names for each pair of splits


def near_pairs(left: Sequence[str], right: Sequence[str], near: int = NEAR) -> list[tuple[int, int]]:
    """Positions (l, r) of all perceptual hashes that differ in at most `near` bits, in order."""
    if not left or not right:
        return []
    index = faiss.IndexBinaryFlat(_bits(right).shape[1] * 8)
    index.add(_bits(right))
    starts, _, found = index.range_search(_bits(left), near + 1)  # it takes what is nearer than that
    owners = np.repeat(np.arange(len(left)), (starts[1:] - starts[:-1]).astype(int))
    return sorted(zip(owners.tolist(), found.tolist(), strict=True))


def _bits(hashes: Sequence[str]) -> np.ndarray:
    return np.array([list(bytes.fromhex(digits)) for digits in hashes], dtype=np.uint8)


def joined_groups(rows: Sequence[Row]) -> dict[str, str]:
    """For each `group` of `rows`, the one that it is joined with: near-duplicates carry over from group to group.

    Named by the first of its members in alphabetical order, so that the order of rows changes nothing.
    """
    groups = sorted({row["group"] for row in rows})
    number = {group: position for position, group in enumerate(groups)}
    images = _images(rows)
    first = [number[row["group"]] for row in images.values()]
    hashes = [row["image_phash"] for row in images.values()]
    pairs = near_pairs(hashes, hashes)
    edges = [(first[left], first[right]) for left, right in pairs]
    edges += [(number[images[row["image_sha256"]]["group"]], number[row["group"]]) for row in rows]
    left, right = np.array(edges).T if edges else np.zeros((2, 0), dtype=int)
    graph = coo_array((np.ones(len(edges)), (left, right)), shape=(len(groups), len(groups)))
    _, labels = connected_components(graph, directed=False)
    names = dict(zip(labels[::-1].tolist(), groups[::-1], strict=True))  # the first one of each is written last
    return {group: names[label] for group, label in zip(groups, labels.tolist(), strict=True)}


def _images(rows: Iterable[Row]) -> dict[str, Row]:
    """The first row of each image, by its sha256."""
    images: dict[str, Row] = {}
    for row in rows:
        images.setdefault(row["image_sha256"], row)
    return images


def leaking_images(training: Sequence[Row], held_out: Sequence[Row]) -> dict[str, str]:
    """sha256 of the training images that equal or nearly equal a held-out one, with that one's `image_id`."""
    others = _images(held_out)
    return {own: others[other]["image_id"] for own, other in _same_images(_images(training), others)}


def _same_images(left: Mapping[str, Row], right: Mapping[str, Row]) -> list[tuple[str, str]]:
    """Pairs of sha256 of images that are nearly equal, then of those that are equal."""
    names, others = list(left), list(right)
    hashes = [[row["image_phash"] for row in images.values()] for images in (left, right)]
    near = [(names[a], others[b]) for a, b in near_pairs(hashes[0], hashes[1])]
    return near + [(sha256, sha256) for sha256 in left if sha256 in right]


@dataclass(frozen=True)
class Overlap:
    """What two splits have in common; images are counted in the first one, rows in both."""

    first: str
    second: str
    exact_images: int
    near_images: int  # and not exact
    first_rows: int  # rows of the first split about an image that the second one has too, exactly or nearly
    second_rows: int
    questions: int  # rows of the first split whose question and answer the second one has too, about any image
    examples: tuple[tuple[str, str], ...]


def overlaps(configs: Mapping[str, Mapping[str, Sequence[Row]]], mixtures: Collection[str]) -> list[Overlap]:
    """Every pair of splits that share an image, exactly or nearly, or a question with its answer.

    Compared are the splits of a configuration, and those of different sources; not a mixture with what it is made of.
    """
    splits = {(config, split): rows for config, splits in configs.items() for split, rows in splits.items()}
    pairs = [(a, b) for a, b in combinations(splits, 2) if a[0] == b[0] or not {a[0], b[0]}.intersection(mixtures)]
    found = [_overlap("/".join(a), splits[a], "/".join(b), splits[b]) for a, b in pairs]
    return [overlap for overlap in found if overlap.exact_images or overlap.near_images or overlap.questions]


def _overlap(first: str, rows: Sequence[Row], second: str, other_rows: Sequence[Row]) -> Overlap:
    own, others = _images(rows), _images(other_rows)
    pairs = _same_images(own, others)
    like = dict(pairs)  # of several that an image is like, the last: its equal, if there is one
    shared = {other for _, other in pairs}
    asked = {_asked(row) for row in other_rows}
    near = [(own[sha256]["image_id"], others[other]["image_id"]) for sha256, other in like.items() if sha256 != other]
    return Overlap(
        first,
        second,
        exact_images=len(like) - len(near),
        near_images=len(near),
        first_rows=_count(rows, like),
        second_rows=_count(other_rows, shared),
        questions=sum(_asked(row) in asked for row in rows),
        examples=tuple(sorted(near)[:EXAMPLES]),
    )


def _asked(row: Row) -> tuple[str, str]:
    return row["question"].casefold().strip(), row["answer"].casefold().strip()


def _count(rows: Iterable[Row], images: Collection[str]) -> int:
    return sum(row["image_sha256"] in images for row in rows)


def leakage_json(found: Sequence[Overlap]) -> dict[str, object]:
    """The report as data."""
    return {"near_bits": NEAR, "hash_bits": 256, "overlaps": [asdict(overlap) for overlap in found]}


def leakage_markdown(found: Sequence[Overlap]) -> str:
    """The report as a page."""
    lines = [
        "# What the splits share",
        "",
        f"Images are near-duplicates if their perceptual hashes differ in at most {NEAR} of 256 bits. Single sources",
        "keep their official splits, shared images included; from `default` and `pretrain`, training rows about an",
        "image of another split or of a benchmark's test split have been dropped.",
        "",
        "| first | second | same images | near-duplicates | rows of first | rows of second | same Q and A |",
        "|---|---|---|---|---|---|---|",
    ]
    for o in found:
        numbers = (o.exact_images, o.near_images, o.first_rows, o.second_rows, o.questions)
        lines.append(f"| {o.first} | {o.second} | {' | '.join(map(str, numbers))} |")
    if not found:
        lines.append("| nothing | | | | | | |")
    pairs = [f"- {o.first}: `{a}`, {o.second}: `{b}`" for o in found for a, b in o.examples]
    return "\n".join([*lines, *(["", "Near-duplicates, for example:", "", *pairs] if pairs else [])]) + "\n"
