"""The checks on generated pairs, each on pairs that a person would reject and on neighbours that must stay."""

import random

import pytest

from biod2c.dataset_builder.generate_checks import (
    NearDuplicates,
    answerable_blind,
    content_words,
    copied,
    leaks,
    overlap,
    several_questions,
)
from biod2c.dataset_builder.generate_prompt import Pair

CAPTION = (
    "Axial contrast-enhanced CT of the abdomen shows a 3.5 cm hypodense lesion in segment VII of the liver (arrow), "
    "with washout in the portal venous phase."
)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (CAPTION, True),
        ("A 3.5 cm hypodense lesion in segment VII of the liver is what one sees.", True),  # a run of eight words
        ("It is a Lesion: in segment vii of the LIVER, it seems.", False),  # a run of seven
        ("washout in the portal venous phase", True),  # six words, all of them the caption's
        ("the portal venous phase", False),  # a term
        ("Liver.", False),
        ("It darkens in the late phase, as hepatocellular carcinoma does.", False),
        ("", False),
    ],
)
def test_copied(answer, expected):
    assert copied(answer, CAPTION) is expected


@pytest.mark.parametrize(
    "text",
    [
        "What does the caption say about the liver?",
        "According to the caption, it is 3 cm.",
        "As stated in the figure legend, it is benign.",
        "According to the text, what is shown?",
        "Based on the provided description, it is a cyst.",
        "The text mentions a lesion.",
        "The accompanying text states that it grew.",
        "It is benign, as described in the legend.",
        "According to the figure, what is marked?",
    ],
)
def test_leaking_words(text):
    assert leaks(Pair(question=text, answer="Yes, here.")) and leaks(Pair(question="Where?", answer=text))


@pytest.mark.parametrize(
    "text",
    [
        "The figure-of-eight fracture is at the left.",
        "What does the arrow indicate?",
        "The lesion extends from the liver to the texture change.",
        "How would you describe the lesion's margin?",
        "According to its position, it is the spleen.",
        "Which contextual finding is reported by its colour?",
    ],
)
def test_words_that_do_not_leak(text):
    assert not leaks(Pair(question=text, answer=text))


def test_several_questions():
    assert several_questions("Where is it? How large?") and not several_questions("Where is the 3.5 cm lesion?")


@pytest.mark.parametrize(
    ("answer", "guess", "expected"),
    [
        ("It shows a pleural effusion on the left.", "A left pleural effusion.", True),
        ("Computed tomography", "computed tomography (CT)", True),
        ("No", "No", True),
        ("It shows a pleural effusion on the left.", "unknown", False),
        ("It shows a pleural effusion on the left.", "A right-sided pneumothorax.", False),
        ("It shows a pleural effusion on the left.", "", False),
    ],
)
def test_answerable_blind(answer, guess, expected):
    assert answerable_blind(answer, guess) is expected


def test_near_duplicates_within_an_image_and_against_earlier_ones():
    kept = NearDuplicates()
    lesion = Pair(question="Where is the hypodense liver lesion?", answer="In segment VII, near the dome.")
    again = Pair(question="In which place is the hypodense liver lesion?", answer="At the upper right.")
    reworded = Pair(question="Where's the hypodense liver lesion seen?", answer="Near the dome in segment VII!")
    elsewhere = Pair(question="Where is the hypodense liver lesion?", answer="In the left lobe, by the stomach.")
    larger = Pair(
        question="How large is the hypodense liver lesion?", answer="In segment VII it spans two centimetres."
    )
    assert kept.fault(lesion, "one") is None
    assert kept.fault(Pair(question=lesion.question, answer="Elsewhere."), "one").endswith("the same image")
    assert kept.fault(again, "one") == kept.fault(larger, "one") is None
    assert kept.fault(reworded, "two") == "near-duplicate of an earlier pair"
    assert kept.fault(elsewhere, "two") is None


def test_near_duplicates_are_those_that_a_comparison_of_all_with_all_finds():
    """Against a quadratic search over random pairs, a third of which repeat an earlier one with a word changed."""
    chooser = random.Random(0)
    vocabulary = [f"word{number}" for number in range(300)]
    texts = []
    for _ in range(600):
        text = chooser.sample(vocabulary, 14)
        if texts and chooser.random() < 0.33:
            text = chooser.choice(texts).copy()
            text[chooser.randrange(14)] = chooser.choice(vocabulary)
        texts.append(text)
    kept, found, expected, earlier = NearDuplicates(), [], [], []
    for number, text in enumerate(texts):
        pair = Pair(question=" ".join(text[:7]), answer=" ".join(text[7:]))
        found.append(kept.fault(pair, str(number)) is not None)
        meaning = content_words(" ".join(text))
        expected.append(any(overlap(meaning, other) >= 0.8 for other in earlier))
        if not found[-1]:
            earlier.append(meaning)
    assert not any(f and not e for f, e in zip(found, expected, strict=True))  # never without a near-duplicate
    assert sum(expected) > 130 and sum(found) >= 0.95 * sum(expected)
