"""The JSONL that BioVGQ's authors released."""

import json

import pytest

from biod2c.dataset_builder.report import Report
from biod2c.dataset_builder.sources.biovgq import read_biovgq


@pytest.fixture
def released(tmp_path, make_jpeg):
    """train.jsonl and val.jsonl, one image beside them and one in images/."""
    (tmp_path / "images").mkdir()
    (tmp_path / "one.jpg").write_bytes(make_jpeg(1))
    (tmp_path / "images" / "two.jpg").write_bytes(make_jpeg(2))
    rows = [
        {
            "image": "one.jpg",
            "question": "Q1?",
            "answer": "The liver",
            "queue": "a CT scan, the liver ,,lesion, lesion",
        },
        {"image": "two.jpg", "question": "Q2?", "answer": "No", "queue": None},
        {"image": "two.jpg", "question": "Q3?", "answer": "No", "queue": ["a", "b"]},
        {"image": "three.jpg", "question": "Q4?", "answer": "No", "queue": "a"},
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"image": "one.jpg", "ques')
    (tmp_path / "val.jsonl").write_text(json.dumps({"image": "images/two.jpg", "question": "Q5?", "answer": "Yes"}))
    return tmp_path


def test_rows_splits_and_queues(released, make_jpeg):
    report = Report()
    first, second, third = read_biovgq(released, report)
    assert first["queue"] == ["a CT scan", "lesion"]  # each text once, and never the row's own answer
    assert (second["queue"], second["image"]["bytes"]) == ([], make_jpeg(2))
    assert (third["id"], third["source_split"], third["image_sha256"]) == (
        *("biovgq-val-0", "validation", second["image_sha256"]),
    )
    assert report.quirks["biovgq: the row's own answer taken out of its queue"] == 1
    assert [(bad["row"], bad["field"]) for bad in report.bad_rows] == [(2, "queue"), (3, "image"), (4, "row")]


def test_ids_stay_with_their_lines_when_a_row_is_bad(released):
    rows = list(read_biovgq(released, Report()))
    assert [row["id"] for row in rows] == ["biovgq-train-0", "biovgq-train-1", "biovgq-val-0"]
