"""Captions for SLAKE's images, and the instruction-caption pairs of stage 1, out of the source's own labels and
boxes.

SLAKE has no captions. What is said here comes from the labels of an image (modality, body part), from the answers of
its rows that name the scanning plane or the MR weighting, and from its boxes: which organs and findings are marked,
where, and how much of the image they cover. Nothing is said about what is not there, because the boxes are not
complete. Each image gives several pairs, from the whole caption down to one organ, so that a model trained from
scratch has to look at places in the image and not only at the kind of scan. The choice of wordings is random but
fixed by the image's name: same input, same pairs.
"""

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeAlias

from .images import decode
from .regions import Box, covered_share, position, relation
from .schema import Row, new_row

Pair: TypeAlias = tuple[str, str, str]  # kind, instruction, text

BODY_PARTS = {
    "Lung": "the lungs, in the chest",
    "Chest_lung": "the lungs, in the chest",
    "Chest_heart": "the heart, in the chest",
    "Chest_mediastinal": "the mediastinum, in the chest",
    "Brain": "the brain, in the head",
    "Brain_Tissue": "the brain, in the head",
    "Brain_Face": "the face, in the head",
}
FINDINGS = {  # every other label is an organ
    *("brain edema", "brain enhancing tumor", "brain non-enhancing tumor"),
    *("kidney cancer", "liver cancer", "lung cancer", "mass", "nodule"),
    *("atelectasis", "cardiomegaly", "effusion", "infiltrate", "pneumonia", "pneumothorax"),
}
INSTRUCTIONS = {
    "caption": ("Describe this image.", "What does this image show?", "Write a caption for this image."),
    "scan": ("What kind of scan is this?", "Say how this image was taken, and of what.", "Name the kind of image."),
    "organs": ("Name the organs that you see.", "Which organs are shown here?", "List the organs in view."),
    "findings": ("Name the findings.", "Which findings are shown here?", "List the findings in this image."),
    "location": ("Describe where {the} is.", "Where is {the}, and how large is it?", "Locate {the}."),
    "region": (
        "What lies at the {place}?",
        "Name what is at the {place} of the image.",
        "Look at the {place}: what is it?",
    ),
    "size": ("Which covers more of the image, {the} or {other}?", "Compare the size of {the} and {other}."),
    "relation": ("How does {the} lie to {other}?", "Where is {the} as seen from {other}?"),
}
MAX_COMPARED = 2  # pairs of labels compared per image; with ten labels there are 45


@dataclass(frozen=True)
class ImageFacts:
    """What is known of one image: its labels, its boxes grouped by lower-case label, and its (width, height) in
    pixels.
    """

    modality: str | None
    location: str | None
    plane: str | None
    weighting: str | None
    boxes: dict[str, list[Box]]
    size: tuple[int, int]


def image_facts(rows: Sequence[Row], boxes: Sequence[Box]) -> ImageFacts:
    """The facts of the image that all `rows` ask about."""
    first = rows[0]
    by_label: dict[str, list[Box]] = defaultdict(list)
    for box in boxes:
        by_label[box.label.lower()].append(box)
    return ImageFacts(
        modality=first["modality"],
        location=first["organ"],
        plane=_stated(rows, "Plane", r"(transverse|coronal|sagittal) plane"),
        weighting=_stated(rows, "Modality", r"(t[12])"),
        boxes=dict(sorted(by_label.items())),
        size=decode(first["image"]["bytes"]).size,
    )


def _stated(rows: Sequence[Row], question_type: str, pattern: str) -> str | None:
    """The first answer among an image's rows of that type that is nothing but `pattern`."""
    answers = (row["answer"].lower() for row in rows if row["question_type"] == question_type)
    return next((match[1] for match in (re.fullmatch(pattern, answer) for answer in answers) if match), None)


def caption(facts: ImageFacts) -> str:
    """The whole caption: the scan, what is marked, and where each marked thing is."""
    sentences = [scan_sentence(facts), *contents_sentences(facts)]
    return " ".join(sentences + [location_sentence(label, facts) for label in facts.boxes])


def scan_sentence(facts: ImageFacts) -> str:
    """ "A T2-weighted MRI of the brain, in the head, in the transverse plane." """
    weighting = f"{facts.weighting.upper()}-weighted " if facts.weighting else ""
    kind = f"{weighting}{facts.modality or 'medical image'}"
    article = "An" if kind.startswith(("MRI", "X-")) else "A"
    part = f" of {body_part(facts.location)}" if facts.location else ""
    plane = f", in the {facts.plane} plane" if facts.plane else ""
    return f"{article} {kind}{part}{plane}."


def body_part(location: str) -> str:
    """SLAKE's `location` in words."""
    return BODY_PARTS.get(location, "the " + location.replace("_", " ").lower())


def contents_sentences(facts: ImageFacts) -> list[str]:
    """One sentence on the marked organs and one on the marked findings, each only where there are any."""
    organs, findings = split_labels(facts)
    sentences = [f"It shows {enumerated([f'the {organ}' for organ in organs])}."] if organs else []
    verb = "finding is" if len(findings) == 1 else "findings are"
    return sentences + ([f"The {verb} {enumerated(findings)}."] if findings else [])


def split_labels(facts: ImageFacts) -> tuple[list[str], list[str]]:
    """The marked labels as (organs, findings), each in alphabetical order."""
    labels = list(facts.boxes)
    return [label for label in labels if label not in FINDINGS], [label for label in labels if label in FINDINGS]


def location_sentence(label: str, facts: ImageFacts) -> str:
    """ "The liver is at the upper left, about 12 % of the image."; several boxes of a label share one sentence."""
    boxes = facts.boxes[label]
    places = list(dict.fromkeys(f"at the {position(box, facts.size)}" for box in boxes))
    count = f" in {len(boxes)} places," if len(boxes) > 1 else ""
    total = " in all" if len(boxes) > 1 else ""
    share = share_words(covered_share(boxes, facts.size))
    return f"The {label} is{count} {enumerated(places)}, {share} of the image{total}."


def share_words(share: float) -> str:
    """A share between 0 and 1 in words: "about 12 %", "less than 1 %"."""
    return f"about {round(100 * share)} %" if share >= 0.01 else "less than 1 %"


def enumerated(words: Sequence[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def pairs(facts: ImageFacts, name: str) -> Iterator[Pair]:
    """The instruction-caption pairs of one image; `name` fixes the choice among the wordings."""
    chooser = random.Random(name)
    yield "caption", chooser.choice(INSTRUCTIONS["caption"]), caption(facts)
    yield "scan", chooser.choice(INSTRUCTIONS["scan"]), scan_sentence(facts)
    organs, findings = split_labels(facts)
    if organs:
        yield "organs", chooser.choice(INSTRUCTIONS["organs"]), sentence(enumerated([f"the {name}" for name in organs]))
    if findings:
        yield "findings", chooser.choice(INSTRUCTIONS["findings"]), sentence(enumerated(findings))
    for label in facts.boxes:
        yield "location", _worded(chooser, "location", the=f"the {label}"), location_sentence(label, facts)
    for place, labels in places_in_use(facts).items():
        yield (
            "region",
            _worded(chooser, "region", place=place),
            sentence(enumerated([f"the {label}" for label in labels])),
        )
    yield from comparisons(facts, chooser)


def places_in_use(facts: ImageFacts) -> dict[str, list[str]]:
    """Which labels lie at which position, in the order of the labels."""
    labels_at: dict[str, list[str]] = defaultdict(list)
    for label, boxes in facts.boxes.items():
        for place in dict.fromkeys(position(box, facts.size) for box in boxes):
            labels_at[place].append(label)
    return labels_at


def comparisons(facts: ImageFacts, chooser: random.Random) -> Iterator[Pair]:
    """Sizes and relative places of a few pairs of labels, only where the boxes leave no doubt."""
    couples = list(combinations(facts.boxes, 2))
    for labels in chooser.sample(couples, min(MAX_COMPARED, len(couples))):
        one, other = chooser.sample(labels, 2)
        for kind, compare in (("size", larger_label), ("relation", relation_sentence)):
            text = compare(facts, one, other)
            if text:
                yield kind, _worded(chooser, kind, the=f"the {one}", other=f"the {other}"), text


def larger_label(facts: ImageFacts, one: str, other: str) -> str | None:
    """ "The liver.": the label that covers more of the image; None unless it covers at least a quarter more."""
    shares = {label: covered_share(facts.boxes[label], facts.size) for label in (one, other)}
    small, large = sorted(shares, key=lambda label: shares[label])
    return f"The {large}." if shares[large] >= 1.25 * shares[small] else None


def relation_sentence(facts: ImageFacts, one: str, other: str) -> str | None:
    """ "The liver is to the left of the spleen."; None where a label has several boxes or the two lie together."""
    if len(facts.boxes[one]) > 1 or len(facts.boxes[other]) > 1:
        return None
    words = relation(facts.boxes[one][0], facts.boxes[other][0], facts.size)
    return f"The {one} is {words} the {other}." if words else None


def sentence(words: str) -> str:
    """With a capital letter and a full stop."""
    return f"{words[0].upper()}{words[1:]}."


def _worded(chooser: random.Random, kind: str, **words: str) -> str:
    return chooser.choice(INSTRUCTIONS[kind]).format(**words)


def caption_images(rows: Sequence[Row], boxes_of: Callable[[str], list[Box]]) -> list[Row]:
    """Fill `caption` of `rows` (all rows of one source) and return the rows of the `pretrain` configuration.

    `boxes_of` gives an image's boxes by its `image_id`. A pretrain row keeps its image's split; its `question` is an
    instruction, its `answer` the caption or a part of it, its `question_type` the kind of pair.
    """
    by_image: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_image[row["image_id"]].append(row)
    pretrain: list[Row] = []
    for image_id, image_rows in by_image.items():
        facts = image_facts(image_rows, boxes_of(image_id))
        whole = caption(facts)
        for row in image_rows:
            row["caption"] = whole
        pretrain.extend(_pretrain_row(image_rows[0], n, pair) for n, pair in enumerate(pairs(facts, image_id)))
    return pretrain


def _pretrain_row(image_row: Row, number: int, pair: Pair) -> Row:
    """A row about the image of `image_row`."""
    kind, instruction, text = pair
    kept = {name: image_row[name] for name in image_row if name.startswith("image")}
    kept |= {
        name: image_row[name] for name in ("organ", "modality", "caption", "source", "source_split", "license", "group")
    }
    return new_row(
        id=f"{image_row['source']}-{image_row['image_id']}-{number}",
        question=instruction,
        answer=text,
        question_type=kind,
        language="en",
        **kept,
    )
