"""Dialogues out of single questions: which rows, in which order, and that nothing is lost."""

from biod2c.dataset_builder.dialogues import MAX_TURNS, join_dialogues


def rows_of(images, questions):
    return [
        {
            "id": f"{image}-{number}",
            "image_sha256": str(image),
            "language": "en",
            "question": f"Question {number}?",
            "answer": f"answer {number}",
            "history": [],
        }
        for image in range(images)
        for number in range(questions)
    ]


def test_earlier_questions_of_the_image_become_turns_in_their_order():
    rows = rows_of(2, 5)
    joined = join_dialogues(rows, 1.0)
    assert [row["id"] for row in joined] == [row["id"] for row in rows]
    assert [bool(row["history"]) for row in joined[:5]] == [False, True, True, True, True]  # the first has none before
    last = joined[4]
    assert len(last["history"]) in range(2, 2 * MAX_TURNS, 2)
    turn = last["history"][-2:]
    assert [(message["role"], message["content"]) for message in turn] == [
        ("user", "Question 3?"),
        ("assistant", "answer 3"),
    ]
    assert all(not row["history"] for row in rows)  # the rows of the single source stay single


def test_the_share_and_the_same_rows_each_time():
    rows = rows_of(300, 4)
    joined = join_dialogues(rows, 0.2)
    dialogues = [row["id"] for row in joined if row["history"]]
    assert 0.16 < len(dialogues) / (300 * 3) < 0.24
    assert dialogues == [row["id"] for row in join_dialogues(rows, 0.2) if row["history"]]
    assert join_dialogues(rows, 0.0) == rows


def test_what_stays_single():
    """A row that has turns of its own, and one that would hear its own answer or question."""
    first, second, third = rows_of(1, 3)
    own = {**second, "history": [{"role": "user", "content": "So?"}, {"role": "assistant", "content": "Yes"}]}
    assert join_dialogues([first, own], 1.0)[1] == own
    assert join_dialogues([first, {**second, "answer": "ANSWER 0"}], 1.0)[1]["history"] == []
    assert join_dialogues([first, {**second, "question": "question 0?"}], 1.0)[1]["history"] == []
    other = {**third, "language": "zh"}
    assert join_dialogues([first, other], 1.0)[1]["history"] == []
