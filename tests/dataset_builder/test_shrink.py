"""examples/shrink.py on small raw folders: layout kept, boxes and masks in the shrunk pixels, no row that must not be
there.
"""

import json
import subprocess
import sys

import numpy as np
from PIL import Image


def test_shrinking_keeps_the_layout_and_scales_boxes_and_masks(
    examples, tmp_path, make_slake, slake_row, make_rad, rad_row
):
    chinese = slake_row(2, image=2, q_lang="zh")
    slake = make_slake(
        {"train.json": [slake_row(1), chinese], "validate.json": []}, {1: [{"Liver": [100, 40, 80, 60]}]}
    )
    folder = slake / "imgs" / "xmlab1"
    Image.new("RGB", (512, 256)).save(folder / "source.jpg")
    mask = np.zeros((256, 512), dtype=np.uint8)
    mask[40:100, 100:180] = 70
    Image.fromarray(mask).save(folder / "mask.png")
    (slake / "mask.txt").write_text("70:Liver")
    (slake / "KG").mkdir()
    (slake / "KG" / "en_organ.csv").write_text("organ#attribute#value")
    rad = make_rad([rad_row(1), rad_row(2, image=2, phrase_type="test_freeform")])
    command = [sys.executable, examples / "shrink.py", "--slake", slake, "--vqa_rad", rad, "--output", tmp_path / "out"]
    subprocess.run(command, check=True)

    out = tmp_path / "out" / "slake"
    assert [row["qid"] for row in json.loads((out / "train.json").read_text("utf-8"))] == [1]
    assert [path.name for path in (out / "imgs").iterdir()] == ["xmlab1"]
    assert Image.open(out / "imgs/xmlab1/source.jpg").size == (256, 128)
    assert json.loads((out / "imgs/xmlab1/detection.json").read_text()) == [{"Liver": [50, 20, 40, 30]}]
    shrunk = np.array(Image.open(out / "imgs/xmlab1/mask.png"))
    assert set(np.unique(shrunk)) == {0, 70} and (shrunk == 70).sum() == 40 * 30
    assert (out / "KG" / "en_organ.csv").is_file() and (out / "mask.txt").is_file()

    small = tmp_path / "out" / "vqa_rad"
    assert [row["qid"] for row in json.loads((small / "VQA_RAD Dataset Public.json").read_text())] == [1]
    [image] = (small / "VQA_RAD Image Folder").iterdir()
    assert image.read_bytes() == (rad / "VQA_RAD Image Folder" / image.name).read_bytes()  # small enough: untouched
