"""Boxes in an image, as words and shares of the image.

Left and right are the viewer's: "left" is the image's own left edge. Radiological images usually show the patient's
right side there, so a label like "Left Kidney" (the patient's) belongs at the "right". The image is cut into a 3 x 3
grid whose middle band is the middle fifth, not the middle third: organs crowd round the centre, and SLAKE's own
answers call a liver at 38 % "left".
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MIDDLE = (
    0.4,
    0.6,
)  # what lies between, as a share of the image's width or height, is neither left nor right, neither upper nor lower


@dataclass(frozen=True)
class Box:
    """A labelled rectangle in pixels; x and y are its upper left corner, y grows downwards."""

    label: str
    x: float
    y: float
    width: float
    height: float

    def centre(self) -> tuple[float, float]:
        """The middle of the box, in pixels."""
        return self.x + self.width / 2, self.y + self.height / 2


def position(box: Box, size: tuple[int, int]) -> str:
    """Where the box's centre lies in an image of `size` (width, height): "upper left", "top", "center", "right", …"""
    across, down = (centre / side for centre, side in zip(box.centre(), size, strict=True))
    side = _band(across, "left", "", "right")
    if not side:
        return _band(down, "top", "center", "bottom")
    return f"{_band(down, 'upper', '', 'lower')} {side}".strip()


def _band(share: float, low: str, middle: str, high: str) -> str:
    if share < MIDDLE[0]:
        return low
    return high if share > MIDDLE[1] else middle


def covered_share(boxes: Sequence[Box], size: tuple[int, int]) -> float:
    """The share (0 to 1) of an image of `size` (width, height) that the boxes cover together, overlaps counted once."""
    width, height = size
    covered = np.zeros((height, width), dtype=bool)
    for box in boxes:
        left, right = np.clip(np.rint([box.x, box.x + box.width]), 0, width).astype(int)
        top, bottom = np.clip(np.rint([box.y, box.y + box.height]), 0, height).astype(int)
        covered[top:bottom, left:right] = True
    return float(covered.mean())


def relation(first: Box, second: Box, size: tuple[int, int]) -> str | None:
    """How the first box lies to the second: "to the left of", "to the right of", "above", "below".

    The axis along which their centres are further apart decides; None if they are less than a tenth of the image apart.
    """
    across, down = (
        (one - other) / side for one, other, side in zip(first.centre(), second.centre(), size, strict=True)
    )
    if max(abs(across), abs(down)) < 0.1:
        return None
    if abs(across) >= abs(down):
        return "to the left of" if across < 0 else "to the right of"
    return "above" if down < 0 else "below"
