"""The queue's promises: related texts of the training split, never the answer, nothing twice, always the same."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from biod2c.dataset_builder.queue import (
    KnowledgeBase,
    QueueOptions,
    caption_texts,
    fill_queues,
    n_grams,
    queue_of,
    split_phrases,
)

CAPTION = (
    "A CT of the abdomen. It shows the liver and the left kidney. The liver is at the left, about 12 % of the image."
)


def row(number, question="Where is the liver?", answer="Left", caption=None, group=None):
    return {
        "id": f"row-{number}",
        "question": question,
        "answer": answer,
        "caption": caption,
        "group": group or f"image-{number}",
        "modality": "CT",
        "organ": "Abdomen",
        "queue": [],
    }


def test_texts_of_a_caption_by_hand():
    assert caption_texts("A CT of the abdomen. The left kidney is small.") == [
        "A CT of the abdomen. The left kidney is small.",
        "A CT of the abdomen.",
        "The left kidney is small.",
        "CT of the abdomen",
        "left kidney",
        "small",
        "CT",
        "abdomen",
        "left",
        "kidney",
    ]
    assert split_phrases("The liver is at the left, about 12 % of the image.") == ["liver", "left"]
    assert n_grams("left lower lobe", 2) == ["left lower", "lower lobe"]


def test_own_caption_first_then_texts_of_other_images():
    rows = [
        row(1, caption=CAPTION),
        row(2, caption="The liver is at the upper left, about 20 % of the image. The heart is large."),
        row(3, caption="The brain is at the center."),
    ]
    fill_queues(rows, {"row-1", "row-2", "row-3"}, QueueOptions(size=30, from_caption=5))
    queue = rows[0]["queue"]
    assert queue[:2] == [CAPTION, "A CT of the abdomen."]
    assert queue[5] == "The liver is at the upper left, about 20 % of the image."
    assert "The heart is large." not in queue  # shares no word with the row


def test_only_training_texts_enter_a_queue():
    rows = [
        row(1, caption="The liver is at the left."),
        row(2, caption="The liver is at the top. The secret liver."),
        row(3, question="Is the liver secret?", answer="secret answer"),
    ]
    fill_queues(rows, {"row-1"}, QueueOptions())
    assert rows[0]["queue"][0] == "The liver is at the left."
    assert rows[1]["queue"] == rows[2]["queue"] == ["The liver is at the left."]
    assert not any("secret" in text for r in rows for text in r["queue"])


def test_a_row_retrieves_nothing_said_of_its_own_image():
    rows = [
        row(n, question=f"Is the liver {w}?", answer="Yes", group="same") for n, w in enumerate(("big", "enlarged"))
    ]
    other = row(9, question="Is the liver fatty?", answer="No")
    fill_queues([*rows, other], {r["id"] for r in [*rows, other]}, QueueOptions())
    assert rows[0]["queue"] == rows[1]["queue"] == ["Is the liver fatty? No"]
    assert set(other["queue"]) == {"Is the liver big? Yes", "Is the liver enlarged? Yes"}
    twins = [row(n, question="How many livers?", answer=str(n)) for n in (1, 2)]  # one entry, said of both images
    fill_queues([*twins, other], {r["id"] for r in [*twins, other]}, QueueOptions())
    assert twins[0]["queue"] == twins[1]["queue"] == []


def test_texts_that_differ_in_numbers_only_are_one():
    knowledge = KnowledgeBase([("The liver, about 12 %.", "a"), ("The liver, about 13 %.", "b"), ("A T2 MRI.", "a")])
    assert [(entry.text, entry.groups) for entry in knowledge.entries] == [
        ("The liver, about 12 %.", {"a", "b"}),
        ("A T2 MRI.", {"a"}),
    ]
    assert KnowledgeBase([]).nearest(["liver"], 3) == [[]]
    assert knowledge.nearest(["of the", "unheard"], 3) == [[], []]


@given(
    st.text("abAB. ", max_size=4),
    st.lists(st.text("abAB. 1", max_size=4), max_size=20),
    st.lists(st.text("abAB. 1", max_size=4), max_size=20),
    st.integers(0, 8),
)
def test_no_queue_has_empty_or_double_texts_or_the_answer(answer, own, others, from_caption):
    options = QueueOptions(size=8, from_caption=from_caption)
    queue = queue_of(answer, own, others, options)
    lowered = [text.lower().strip() for text in queue]
    assert len(queue) <= options.size
    assert all(lowered) and len(set(lowered)) == len(lowered)
    assert answer.lower().strip() not in lowered
    assert queue == queue_of(answer, own, others, options)


def test_the_answer_is_left_out_whatever_its_letter_case():
    assert queue_of("ct", ["CT", "CT.", "MRI"], [], QueueOptions()) == ["MRI"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_real_queues(demo, split):
    from datasets import load_dataset

    rows = load_dataset(str(demo.output), split=split).remove_columns("image")
    for r in rows:
        lowered = [text.casefold() for text in r["queue"]]
        assert len(lowered) == len(set(lowered)) == 30
        assert all(text.strip() for text in lowered)
        assert r["answer"].casefold() not in lowered
        if r["caption"] and ". " in r["caption"]:  # one sentence alone may be said of a training image too
            assert (r["caption"] in r["queue"]) == (split == "train")
