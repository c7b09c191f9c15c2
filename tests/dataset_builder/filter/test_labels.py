"""Labelling without the page: the order, going back, resuming after a kill, two annotators and how far they agree."""

import json

import pytest

from biod2c.cli import main
from biod2c.dataset_builder.filter.labels import Session, agreed, read_labels, seeded_order

SHAS = [f"{number:064x}" for number in range(6)]


def write_labels(path, **labels):
    """One line a label; each annotator's labels as a word of first letters, "cpu" for clean, polluted, unsure."""
    names = {"c": "clean", "p": "polluted", "u": "unsure"}
    with path.open("a") as stream:
        for annotator, word in labels.items():
            for sha, letter in zip(SHAS, word, strict=False):
                line = {"image_sha256": sha, "label": names[letter], "annotator": annotator, "time": "2026-01-01"}
                stream.write(json.dumps(line) + "\n")
    return path


def test_the_order_depends_on_the_seed_and_not_on_the_datasets_order():
    assert seeded_order(SHAS, 0) == seeded_order(reversed(SHAS), 0)
    assert seeded_order(SHAS, 0) != seeded_order(SHAS, 1)
    assert sorted(seeded_order(SHAS, 0)) == SHAS


def test_a_session_goes_on_where_it_was_even_after_a_torn_line(tmp_path):
    path = tmp_path / "labels.jsonl"
    session = Session(SHAS, path, "ann")
    session.label(SHAS[0], "clean")
    session.label(SHAS[1], "polluted")
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"image_sha256": "00')  # killed while it wrote
    again = Session(SHAS, path, "ann")
    assert (again.current, again.done) == (SHAS[2], 2)
    again.label(SHAS[2], "unsure")
    assert path.read_bytes().startswith(whole)
    assert read_labels(path) == {"ann": {SHAS[0]: "clean", SHAS[1]: "polluted", SHAS[2]: "unsure"}}


def test_back_and_another_label_add_a_line_and_the_last_one_counts(tmp_path):
    session = Session(SHAS, tmp_path / "labels.jsonl", "ann")
    session.back()  # nothing lies before the first
    for sha in SHAS[:3]:
        session.label(sha, "clean")
    session.back()
    session.back()
    assert session.current == SHAS[1]
    session.label(SHAS[1], "polluted")
    assert session.current == SHAS[3]
    assert len((tmp_path / "labels.jsonl").read_text().splitlines()) == 4
    assert read_labels(tmp_path / "labels.jsonl")["ann"][SHAS[1]] == "polluted"


def test_a_key_pressed_twice_does_not_label_the_next_figure(tmp_path):
    session = Session(SHAS, tmp_path / "labels.jsonl", "ann")
    session.label(SHAS[0], "clean")
    session.label(SHAS[0], "clean")
    assert (session.current, session.done) == (SHAS[1], 1)


def test_the_second_annotator_starts_afresh_with_the_same_figures(tmp_path):
    first = Session(SHAS, tmp_path / "labels.jsonl", "ann")
    for sha in SHAS:
        first.label(sha, "clean")
    assert first.current is None
    second = Session(SHAS, tmp_path / "labels.jsonl", "bob")
    assert (second.current, second.done, second.labels) == (SHAS[0], 0, {})


def test_more_than_half_of_the_annotators_decide(tmp_path):
    path = write_labels(tmp_path / "labels.jsonl", ann="cccup", bob="cpuup", eve="cp")
    decided, left_out = agreed(read_labels(path))
    assert decided == {SHAS[0]: "clean", SHAS[1]: "polluted", SHAS[4]: "polluted"}
    assert left_out == {"disagreed": 1, "unsure": 1}


def test_agreement_of_a_worked_example(tmp_path, capsys):
    """The often printed example of two readers of 50 proposals: both yes 20, both no 15, 5 and 10 apart; kappa 0.4."""
    shas = [f"{number:064x}" for number in range(50)]
    labels = {"ann": ["clean"] * 25 + ["polluted"] * 25, "bob": ["clean"] * 20 + ["polluted"] * 5}
    labels["bob"] += ["clean"] * 10 + ["polluted"] * 15
    lines = [
        json.dumps({"image_sha256": sha, "label": label, "annotator": name, "time": "2026-01-01"})
        for name, given in labels.items()
        for sha, label in zip(shas, given, strict=True)
    ]
    (tmp_path / "labels.jsonl").write_text("\n".join(lines) + "\n")
    assert main(["build", "annotate", "--agreement", "--labels", str(tmp_path / "labels.jsonl")]) == 0
    title, *disagreements = capsys.readouterr().out.splitlines()
    assert title.startswith("ann and bob, 50 figures: Cohen's kappa 0.400 (95 % interval 0.1")
    assert len(disagreements) == 15
    assert disagreements[0] == f"  {shas[20]}  ann: clean, bob: polluted"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no two labelled the same figures"),
        ('{"image_sha256": "0", "label": "dirty", "annotator": "a"}\n', "line 1: expected image_sha256, annotator"),
        ("{}\nnot json\n{}\n", "line 2 is not JSON"),
        (None, "no such file"),
    ],
)
def test_labels_that_cannot_be_used_are_one_line(tmp_path, capsys, content, message):
    path = tmp_path / "labels.jsonl"
    if content is not None:
        path.write_text(content)
    assert main(["build", "annotate", "--agreement", "--labels", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
