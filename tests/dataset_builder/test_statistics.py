"""The statistics page: its numbers, and pictures that show something."""

import numpy as np
from PIL import Image

from biod2c.dataset_builder.statistics import SAMPLES


def test_the_page_counts_what_the_dataset_holds(demo):
    page = (demo.output / "statistics.md").read_text()
    line = next(line for line in page.splitlines() if line.startswith("| slake | validation |"))
    rows, images, _, closed, captions, queues, dialogues = map(int, line.strip("| ").split(" | ")[2:])
    assert (rows, images, closed, captions, queues, dialogues) == (1053, 96, 422, 1053, 1053, 0)
    card = (demo.output / "README.md").read_text()
    for name in ("statistics.md", "leakage.md", "figures/samples.jpg"):
        assert f"({name})" in card and (demo.output / name).is_file()


def test_the_sheet_of_samples_shows_them(demo):
    """Each of its cells is an image, not a blank."""
    with Image.open(demo.output / "figures" / "samples.jpg") as sheet:
        pixels = np.asarray(sheet.convert("L"))
    cells = [cell for band in np.array_split(pixels, 3) for cell in np.array_split(band, 4, axis=1)]
    assert len(cells) == SAMPLES and all((cell < 100).mean() > 0.2 for cell in cells)
