"""The readers on the real files and on every quirk of the raw formats, in small folders of the same layout."""

import json
from collections import Counter

import pytest

from biod2c.dataset_builder.regions import Box
from biod2c.dataset_builder.report import Report, SourceError
from biod2c.dataset_builder.schema import FEATURES
from biod2c.dataset_builder.sources import READERS
from biod2c.dataset_builder.sources.slake import read_boxes, read_slake
from biod2c.dataset_builder.sources.vqa_rad import read_vqa_rad


def splits_and_images(rows):
    """{split: (rows, images)}"""
    counts = Counter(row["source_split"] for row in rows)
    return {s: (n, len({row["image_id"] for row in rows if row["source_split"] == s})) for s, n in counts.items()}


def test_real_slake_reads_whole(examples):
    report = Report()
    rows = list(read_slake(examples / "slake", report))
    assert splits_and_images(rows) == {"train": (4919, 450), "validation": (1053, 96)}
    assert report.bad_rows == []
    assert report.notes == ["slake: no test.json, so no test split"]
    assert Counter(row["answer_type"] for row in rows if row["source_split"] == "validation") == {
        "open": 631,
        "closed": 422,
    }
    assert [row["id"] for row in rows if not row["answer"]] == ["slake-1622"]
    assert {row["license"] for row in rows} == {"CC-BY-4.0"}


def test_real_vqa_rad_reads_whole_and_counts_its_quirks(examples):
    report = Report()
    rows = list(read_vqa_rad(examples / "vqa_rad", report))
    assert splits_and_images(rows) == {"train": (1797, 313)}
    assert report.bad_rows == []
    assert report.quirks["answer: a number, read as text"] == 5
    assert report.quirks["qid: a text, read as a number"] == 1
    assert report.quirks["answer_type: blanks removed"] == 2
    assert report.quirks["question_type: typing error mended"] == 4
    assert Counter(row["answer_type"] for row in rows) == {"closed": 1027, "open": 770}
    assert all(isinstance(row["answer"], str) and "\t" not in row["answer"] for row in rows)


@pytest.mark.parametrize("source", ["slake", "vqa_rad"])
def test_rows_have_the_schemas_columns_and_the_files_own_bytes(examples, source):
    row = next(READERS[source](examples / source, Report(), ["en"]))
    assert row.keys() == FEATURES.keys()
    folder = "imgs" if source == "slake" else "VQA_RAD Image Folder"
    assert row["image"]["bytes"] == (examples / source / folder / row["image_id"]).read_bytes()


def test_slake_reads_the_languages_asked_for(make_slake, slake_row):
    chinese = slake_row(2, q_lang="zh", question="图中有肝脏吗?", answer="有")
    root = make_slake({"train.json": [slake_row(1), chinese]})
    report = Report()
    assert [row["id"] for row in read_slake(root, report)] == ["slake-1"]
    assert report.quirks["slake: row in language zh left out"] == 1
    both = list(read_slake(root, Report(), ["en", "zh"]))
    assert [(row["language"], row["answer"]) for row in both] == [("en", "Liver"), ("zh", "有")]
    with pytest.raises(SourceError, match="fr"):
        list(read_slake(root, Report(), ["fr"]))


def test_slake_takes_the_mirrors_file_name_and_any_key_order(make_slake, slake_row):
    reordered = dict(reversed(slake_row(3).items()))
    root = make_slake({"validation.json": [reordered], "test.json": [slake_row(4, image=2)]})
    report = Report()
    assert [row["source_split"] for row in read_slake(root, report)] == ["validation", "test"]
    assert report.notes == ["slake: no train.json, so no train split"]


@pytest.mark.parametrize("source", READERS)
def test_a_folder_without_split_files_is_one_clear_error(source, tmp_path):
    with pytest.raises(SourceError, match=r"no .*expected"):
        list(READERS[source](tmp_path, Report(), ["en"]))


def test_a_file_cut_in_the_middle_is_named(make_slake, slake_row):
    root = make_slake({"train.json": [slake_row(1), slake_row(2)]})
    whole = (root / "train.json").read_text()
    (root / "train.json").write_text(whole[: len(whole) // 2])
    with pytest.raises(SourceError, match=r"train\.json: not readable as JSON .*fetch the file again"):
        list(read_slake(root, Report()))


BAD_FIELDS = [
    ("answer", None),
    ("answer", ["Liver"]),
    ("question", "  "),
    ("qid", "one"),
    ("qid", 1),  # the first row's
    ("q_lang", "de"),
    ("answer_type", "MAYBE"),
    ("img_name", "xmlab99/source.jpg"),
    ("img_name", "../../../etc/passwd"),
    ("modality", ["CT"]),
]


@pytest.mark.parametrize(("field", "value"), BAD_FIELDS)
def test_a_bad_row_is_recorded_and_the_others_stay(make_slake, slake_row, field, value):
    root = make_slake({"train.json": [slake_row(1), {**slake_row(2), field: value}, slake_row(3)]})
    report = Report()
    assert [row["id"] for row in read_slake(root, report)] == ["slake-1", "slake-3"]
    [bad] = report.bad_rows
    assert (bad["source"], bad["file"], bad["row"], bad["field"]) == ("slake", "train.json", 1, field)
    assert bad["expected"] and bad["what_to_do"]


def test_a_row_that_is_no_object_is_recorded(make_slake, slake_row):
    root = make_slake({"train.json": [slake_row(1), "row"]})
    report = Report()
    assert len(list(read_slake(root, report))) == 1
    assert report.bad_rows[0]["field"] == "row"


def test_a_truncated_image_is_recorded_for_each_of_its_rows(make_slake, slake_row, make_jpeg):
    root = make_slake({"train.json": [slake_row(1), slake_row(2, image=2), slake_row(3, image=2)]})
    (root / "imgs/xmlab2/source.jpg").write_bytes(make_jpeg(2)[:-300])
    report = Report()
    assert [row["id"] for row in read_slake(root, report)] == ["slake-1"]
    assert [(bad["row"], bad["field"]) for bad in report.bad_rows] == [(1, "img_name"), (2, "img_name")]
    assert "truncated" in report.bad_rows[0]["expected"]


def test_boxes_are_read_and_broken_ones_recorded(make_slake, slake_row):
    good = {"Liver": [1.0, 2.0, 3.0, 4.0]}
    boxes = {1: [good, {"Heart": [1, 2, 0, 4]}, {"Lung": "wide"}, ["Spleen"], {"Colon": [5, 5, 5, 5]}]}
    root = make_slake({"train.json": [slake_row(1), slake_row(2, image=2)]}, boxes)
    report = Report()
    assert read_boxes(root, "xmlab1/source.jpg", report) == [Box("Liver", 1, 2, 3, 4), Box("Colon", 5, 5, 5, 5)]
    assert [bad["field"] for bad in report.bad_rows] == ["Heart", "Lung", "entry"]
    assert report.bad_rows[0]["file"] == "xmlab1/detection.json"
    (root / "imgs/xmlab2/detection.json").write_text("[{")
    assert read_boxes(root, "xmlab2/source.jpg", report) == []
    (root / "imgs/xmlab2/detection.json").unlink()
    assert read_boxes(root, "xmlab2/source.jpg", report) == []
    assert report.quirks["slake: image without detection.json"] == 1


def test_vqa_rads_quirks(make_rad, rad_row):
    rows = [
        rad_row("7", answer=12, answer_type="CLOSED "),
        rad_row(8, question_type="ATRIB, PRSE", question="Are the liver \tsplee n\tand colon seen?"),
        rad_row(9, phrase_type="test_para"),
        rad_row(10, phrase_type="para", answer=" Heart \tlungs "),
    ]
    del rows[3]["question_rephrase"]
    report = Report()
    read = list(read_vqa_rad(make_rad(rows, prefix=b"\xef\xbb\xbf"), report))
    assert [row["id"] for row in read] == ["vqa_rad-7", "vqa_rad-8", "vqa_rad-9", "vqa_rad-10"]
    assert [row["source_split"] for row in read] == ["train", "train", "test", "train"]
    assert (read[0]["answer"], read[0]["answer_type"]) == ("12", "closed")
    assert (read[1]["question_type"], read[1]["question"]) == (
        "ATTRIB, PRES",
        "Are the liver, spleen, and colon seen?",
    )
    assert read[3]["answer"] == "Heart, lungs"
    assert report.quirks["VQA_RAD Dataset Public.json: byte order mark removed"] == 1
    assert report.bad_rows == []


def test_vqa_rad_counts_images_without_rows_and_names_missing_ones(make_rad, rad_row):
    root = make_rad([rad_row(1), rad_row(2, image=2)])
    folder = root / "VQA_RAD Image Folder"
    (folder / "synpic2.jpg").rename(folder / "synpic3.jpg")
    report = Report()
    assert [row["id"] for row in read_vqa_rad(root, report)] == ["vqa_rad-1"]
    assert report.bad_rows[0]["found"] == "'synpic2.jpg'"
    assert report.quirks["vqa_rad: image that no row asks about"] == 1


def test_examples_hold_no_test_rows_and_no_chinese(examples):
    assert {path.name for path in (examples / "slake").glob("*.json")} == {"train.json", "validate.json"}
    rows = [r for s in ("train", "validate") for r in json.loads((examples / "slake" / f"{s}.json").read_text("utf-8"))]
    assert {row["q_lang"] for row in rows} == {"en"}
    rad = json.loads((examples / "vqa_rad" / "VQA_RAD Dataset Public.json").read_text("utf-8"))
    assert {row["phrase_type"] for row in rad} == {"freeform", "para"}
