"""What counts as the same image, and that the mixture holds none of them on two sides."""

import io
import json
import random

import pytest
from datasets import load_dataset
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from biod2c.dataset_builder.build import build, default_splits
from biod2c.dataset_builder.leakage import NEAR, joined_groups, leaking_images, near_pairs
from biod2c.dataset_builder.recipe import Recipe, SourceOptions


def image_row(number, phash, group=None, **fields):
    names = {"image_sha256": f"sha{number}", "image_id": f"{number}.png", "group": group or f"g{number}"}
    return {**names, "image_phash": phash, "question": "?", "answer": "yes", **fields}


def flipped(phash, bits, seed=0):
    """The hash with so many of its bits changed."""
    value = int(phash, 16)
    for bit in random.Random(seed).sample(range(256), bits):
        value ^= 1 << bit
    return f"{value:064x}"


@given(st.integers(0, 2**32), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=25, deadline=None)
def test_near_pairs_are_those_of_counting_bits(seed, left, right):
    chance = random.Random(seed)
    base = f"{chance.getrandbits(256):064x}"
    hashes = [flipped(base, chance.randint(0, 40), chance.random()) for _ in range(left + right)]
    sides = hashes[:left], hashes[left:]
    wanted = [
        (i, j)
        for i, a in enumerate(sides[0])
        for j, b in enumerate(sides[1])
        if (int(a, 16) ^ int(b, 16)).bit_count() <= NEAR
    ]
    assert near_pairs(*sides) == wanted


def test_groups_join_over_near_duplicates_and_over_papers():
    base = "0" * 64
    rows = [
        image_row(1, base, "c"),
        image_row(2, flipped(base, NEAR), "b"),  # like 1
        image_row(3, "f" * 64, "b"),  # of the paper of 2
        image_row(4, flipped("f" * 64, NEAR + 1), "a"),  # like none
        image_row(3, "f" * 64, "d"),  # the very image of 3
    ]
    assert joined_groups(rows) == {"a": "a", "b": "b", "c": "b", "d": "b"}
    assert joined_groups(rows[::-1]) == joined_groups(rows)
    assert joined_groups([]) == {}


def test_leaking_images_name_what_they_are_like():
    held_out = [image_row(1, "0" * 64), image_row(2, "f" * 64)]
    training = [
        image_row(2, "f" * 64),
        image_row(3, flipped("0" * 64, NEAR)),
        image_row(4, flipped("0" * 64, NEAR + 1)),
    ]
    assert leaking_images(training, held_out) == {"sha2": "2.png", "sha3": "1.png"}


def test_eight_one_one_keeps_groups_together():
    rows = [{"source_split": "train", "answer": "a", "group": f"paper{n // 3}", "id": n} for n in range(3000)]
    splits = default_splits(rows, "8:1:1")
    shares = [len(splits[split]) / len(rows) for split in ("train", "validation", "test")]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.03)
    groups = [{row["group"] for row in members} for members in splits.values()]
    assert sum(map(len, groups)) == 1000 == len(set.union(*groups))


def smaller_copy(path, into):
    """A re-encoded, resized copy: other bytes, nearly the same hash."""
    stream = io.BytesIO()
    with Image.open(path) as image:
        image.resize((200, 200)).save(stream, "PNG")
    into.write_bytes(stream.getvalue())


def test_a_test_image_is_in_no_training_split(examples, make_slake, slake_row, make_rad, rad_row, tmp_path):
    """SLAKE's test image comes again, re-encoded, in VQA-RAD's training rows and in SLAKE's validation."""
    slake = make_slake(
        {
            "train.json": [slake_row(1), slake_row(2, image=2)],
            "validate.json": [slake_row(3, image=3), slake_row(4, image=4)],
            "test.json": [slake_row(5, image=5)],
        }
    )
    rad = make_rad([rad_row(n, image=n) for n in range(6)])
    real = sorted((examples / "slake" / "imgs").glob("*/source.jpg"))[7]
    (slake / "imgs" / "xmlab5" / "source.jpg").write_bytes(real.read_bytes())
    smaller_copy(real, slake / "imgs" / "xmlab4" / "source.jpg")
    smaller_copy(real, rad / "VQA_RAD Image Folder" / "synpic3.jpg")
    recipe = Recipe(
        sources={"slake": SourceOptions(slake), "vqa_rad": SourceOptions(rad)},
        default={"slake": "official", "vqa_rad": 0.01},
    )
    output = tmp_path / "out"
    result = build(recipe, output)
    default = {split: set(rows["image_id"]) for split, rows in load_dataset(str(output)).items()}
    assert default["test"] == {"xmlab5/source.jpg"} and default["validation"] == {"xmlab3/source.jpg"}
    assert "synpic3.jpg" not in default["train"] and "synpic2.jpg" in default["train"]
    dropped = [json.loads(line) for line in (output / "dropped_rows.jsonl").read_text().splitlines()]
    assert {(row["image_id"], row["split"]) for row in dropped} == {
        ("synpic3.jpg", "train"),
        ("xmlab4/source.jpg", "validation"),
    }
    assert "1 train rows dropped, their images being held out elsewhere (dropped_rows.jsonl)" in result.report
    # the sources themselves keep what they are, and the report says what they share
    assert result.rows["slake"] == {"train": 2, "validation": 2, "test": 1} and result.rows["vqa_rad"] == {"train": 6}
    found = {
        (o["first"], o["second"]): o["near_images"]
        for o in json.loads((output / "leakage.json").read_text())["overlaps"]
    }
    assert found[("slake/validation", "slake/test")] == found[("slake/test", "vqa_rad/train")] == 1
    assert "| slake/validation | slake/test | 0 | 1 | 1 | 1 |" in (output / "leakage.md").read_text()


def test_slakes_neighbouring_slices_are_found_across_its_splits(demo):
    """86 of the 450 training images are like one of the 96 for validation; the mixture does without their 880 rows."""
    found = json.loads((demo.output / "leakage.json").read_text())["overlaps"]
    (slices,) = [o for o in found if (o["first"], o["second"]) == ("slake/train", "slake/validation")]
    assert (slices["exact_images"], slices["near_images"]) == (0, 86)
    assert (slices["first_rows"], slices["second_rows"]) == (880, 333)
    assert not [o for o in found if o["first"].startswith("default") and o["near_images"] + o["exact_images"]]
