"""Boxes to words: hand-worked cases, and the viewer's sides checked on the real data."""

import json

import pytest

from biod2c.dataset_builder.captions import ImageFacts, caption, caption_images, enumerated, image_facts, pairs
from biod2c.dataset_builder.regions import Box, covered_share, position, relation
from biod2c.dataset_builder.report import Report
from biod2c.dataset_builder.sources.slake import read_boxes, read_slake

# Boxes of 20 x 20 pixels in an image 100 wide and 200 high: the centre is 10 pixels right of and below the corner.
POSITIONS = [
    ((0, 0), "upper left"),
    ((40, 0), "top"),
    ((80, 0), "upper right"),
    ((0, 90), "left"),
    ((40, 90), "center"),
    ((80, 90), "right"),
    ((0, 180), "lower left"),
    ((40, 180), "bottom"),
    ((80, 180), "lower right"),
    ((29, 90), "left"),  # centre at 39 % of the width
    ((30, 90), "center"),  # 40 %: the middle fifth begins
    ((50, 90), "center"),  # 60 %
    ((51, 90), "right"),  # 61 %
    ((40, 69), "top"),  # 39.5 % of the height
    ((40, 111), "bottom"),  # 60.5 %
]


@pytest.mark.parametrize(("corner", "words"), POSITIONS)
def test_positions_by_hand(corner, words):
    assert position(Box("Liver", *corner, 20, 20), (100, 200)) == words


def test_covered_share_counts_overlaps_once_and_clips():
    assert covered_share([Box("a", 0, 0, 50, 100)], (100, 100)) == 0.5
    assert covered_share([Box("a", 0, 0, 50, 50), Box("a", 25, 0, 50, 50)], (100, 100)) == 0.375
    assert covered_share([Box("a", 90, 90, 50, 50)], (100, 100)) == 0.01
    assert covered_share([], (100, 100)) == 0


@pytest.mark.parametrize(
    ("x", "y", "words"),
    [(50, 0, "to the left of"), (-50, 10, "to the right of"), (10, 50, "above"), (0, -50, "below"), (5, 5, None)],
)
def test_relation_of_a_box_to_one_moved_by_x_and_y(x, y, words):
    assert relation(Box("a", 50, 50, 10, 10), Box("b", 50 + x, 50 + y, 10, 10), (100, 100)) == words


def facts(**fields):
    boxes = {
        "liver": [Box("Liver", 10, 30, 30, 40)],
        "mass": [Box("Mass", 70, 70, 10, 10), Box("Mass", 5, 75, 5, 5)],
        "spleen": [Box("Spleen", 70, 45, 5, 10)],
    }
    known = {"modality": "MRI", "location": "Abdomen", "plane": "transverse", "weighting": "t2", "boxes": boxes}
    return ImageFacts(**{**known, "size": (100, 100), **fields})


def test_a_whole_caption_by_hand():
    assert caption(facts()) == (
        "A T2-weighted MRI of the abdomen, in the transverse plane. It shows the liver and the spleen. "
        "The finding is mass. The liver is at the left, about 12 % of the image. "
        "The mass is in 2 places, at the lower right and at the lower left, about 1 % of the image in all. "
        "The spleen is at the right, less than 1 % of the image."
    )


def test_a_caption_says_nothing_that_is_not_known():
    bare = facts(boxes={}, plane=None, weighting=None)
    assert caption(bare) == "An MRI of the abdomen."
    assert caption(facts(boxes={}, modality=None, location=None, plane=None, weighting=None)) == "A medical image."
    assert [kind for kind, _, _ in pairs(bare, "xmlab1")] == ["caption", "scan"]


def test_pairs_of_one_image():
    made = list(pairs(facts(), "xmlab1"))
    texts = {kind: [text for k, _, text in made if k == kind] for kind, _, _ in made}
    assert texts["organs"] == ["The liver and the spleen."]
    assert texts["findings"] == ["Mass."]
    assert "The spleen is at the right, less than 1 % of the image." in texts["location"]
    assert sorted(texts["region"]) == ["The liver.", "The mass.", "The mass.", "The spleen."]
    assert set(texts["size"]) <= {"The liver.", "The mass."}  # the spleen is the smallest
    asked = {instruction for _, instruction, _ in made}
    assert len(asked) == len(made) and not any("{" in instruction for instruction in asked)
    assert made == list(pairs(facts(), "xmlab1"))
    assert made != list(pairs(facts(), "xmlab2"))


def test_regions_name_all_that_lies_there():
    two = {"heart": [Box("Heart", 70, 70, 10, 10)], "liver": [Box("Liver", 80, 80, 10, 10)]}
    [(_, instruction, text)] = [pair for pair in pairs(facts(boxes=two), "xmlab1") if pair[0] == "region"]
    assert "lower right" in instruction and text == "The heart and the liver."


def test_enumerated():
    assert [enumerated(words) for words in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]


def test_plane_and_weighting_come_from_rows_that_state_them(make_slake, slake_row):
    rows = [
        slake_row(1, content_type="Plane", answer="No"),
        slake_row(2, content_type="Plane", answer="Transverse  Plane"),
        slake_row(3, content_type="Modality", answer="T1"),
        slake_row(4, content_type="Organ", answer="Coronal Plane"),
    ]
    read = list(read_slake(make_slake({"train.json": rows}), Report()))
    known = image_facts(read, [Box("Liver", 0, 0, 4, 3)])
    assert (known.plane, known.weighting, known.size) == ("transverse", "t1", (40, 30))


def test_real_captions_agree_with_the_patients_sides(examples):
    """In a radiological image the patient's left is at the viewer's right, so the labels check the words."""
    root, report = examples / "slake", Report()
    rows = list(read_slake(root, report))
    sides = {"left": "right", "right": "left"}
    checked = 0
    for row in caption_images(rows, lambda image_id: read_boxes(root, image_id, report)):
        labelled = [side for side in sides if f"the {side} lung is" in row["answer"].lower()]
        if row["question_type"] == "location" and labelled:
            assert sides[labelled[0]] in row["answer"].split(" at the ")[1]
            checked += 1
    assert checked > 40
    assert report.bad_rows == []
    assert {row["source_split"] for row in rows if row["caption"]} == {"train", "validation"}


def test_real_boxes_lie_inside_the_shrunk_images(examples):
    from PIL import Image

    for path in (examples / "slake" / "imgs").glob("*/detection.json"):
        width, height = Image.open(path.with_name("source.jpg")).size
        for entry in json.loads(path.read_text()):
            for x, y, w, h in entry.values():
                assert 0 <= x <= x + w <= width + 0.5 and 0 <= y <= y + h <= height + 0.5, path
