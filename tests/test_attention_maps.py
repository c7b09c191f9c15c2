"""The map drawn over an image: every cell's weight lands on the block that the model pooled, and nothing is lost."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.nn.functional import adaptive_avg_pool2d

from biod2c.attention_maps import heat_maps, multiscale_to_grid, question_heat_map, save_overlay
from biod2c.modeling_biod2c import MultiScaleFeatureEnhancement


def num_cells(num_scales: int) -> int:
    return sum(4**s for s in range(num_scales))


def spread_by_hand(weights: list[float], num_scales: int, side: int) -> np.ndarray:
    """Cell by cell, as the definition says."""
    grid = np.zeros((side, side))
    cells = iter(weights)
    for blocks in (2**s for s in range(num_scales)):
        for row in range(blocks):
            for column in range(blocks):
                ys = range(math.floor(row * side / blocks), math.ceil((row + 1) * side / blocks))
                xs = range(math.floor(column * side / blocks), math.ceil((column + 1) * side / blocks))
                weight = next(cells)
                for y in ys:
                    for x in xs:
                        grid[y, x] += weight / (len(ys) * len(xs))
    return grid


@pytest.mark.parametrize(("num_scales", "side"), [(1, 1), (1, 3), (3, 4), (3, 8), (4, 8), (3, 6), (3, 5), (4, 9)])
def test_equals_a_loop_over_cells(num_scales: int, side: int) -> None:
    weights = torch.rand(num_cells(num_scales), dtype=torch.float64, generator=torch.Generator().manual_seed(side))
    expected = spread_by_hand(weights.tolist(), num_scales, side)
    np.testing.assert_allclose(multiscale_to_grid(weights, num_scales, side), expected, rtol=1e-6)


@given(num_scales=st.integers(1, 4), extra=st.integers(0, 9), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mass_is_conserved(num_scales: int, extra: int, seed: int) -> None:
    side = 2 ** (num_scales - 1) + extra
    weights = torch.rand(2, 3, num_cells(num_scales), generator=torch.Generator().manual_seed(seed))
    grid = multiscale_to_grid(weights, num_scales, side)
    assert grid.shape == (2, 3, side, side)
    torch.testing.assert_close(grid.sum(dim=(-2, -1)), weights.sum(dim=-1))


@pytest.mark.parametrize(("num_scales", "side"), [(3, 8), (3, 5), (4, 10)])
def test_is_the_transpose_of_mean_pooling(num_scales: int, side: int) -> None:
    """<weights, pooled grid> = <spread weights, grid>: the same blocks as torch's own pooling, in the same order."""
    generator = torch.Generator().manual_seed(0)
    grid = torch.rand(side, side, dtype=torch.float64, generator=generator)
    weights = torch.rand(num_cells(num_scales), dtype=torch.float64, generator=generator)
    pooled = torch.cat([adaptive_avg_pool2d(grid[None], 2**s).flatten() for s in range(num_scales)])
    spread = multiscale_to_grid(weights, num_scales, side)
    torch.testing.assert_close((weights * pooled).sum(), (spread * grid).sum())


@pytest.mark.parametrize(("num_scales", "side"), [(3, 4), (4, 8), (3, 6)])
def test_cells_are_those_of_the_model(num_scales: int, side: int) -> None:
    """Lighting one grid cell changes exactly the multi-scale cells whose weight is spread over it."""
    basis = multiscale_to_grid(torch.eye(num_cells(num_scales)), num_scales, side)  # [M, N, N]
    enhance = MultiScaleFeatureEnhancement(num_scales)
    for y in range(side):
        for x in range(side):
            grid = torch.zeros(1, 1, side, side)
            grid[..., y, x] = 1
            assert torch.equal(enhance(grid)[0, :, 0] > 0, basis[:, y, x] > 0)


def test_a_wrong_number_of_cells_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"weights of 20 cells: 3 scales have 21"):
        multiscale_to_grid(torch.rand(20), num_scales=3, side=8)


def test_padding_of_the_question_is_left_out() -> None:
    attention = torch.rand(2, 4, 5, 21).softmax(dim=-1)  # [layers, heads, Q, M]
    mask = torch.tensor([1, 1, 1, 0, 0])
    heat = question_heat_map(attention, mask, num_scales=3, side=8)
    changed = attention.clone()
    changed[:, :, 3:] = 0
    torch.testing.assert_close(question_heat_map(changed, mask, num_scales=3, side=8), heat)
    torch.testing.assert_close(heat.sum(), torch.tensor(1.0))


def test_a_question_of_padding_only_is_an_error() -> None:
    with pytest.raises(ValueError, match="all padding"):
        question_heat_map(torch.rand(1, 1, 4, 5), torch.zeros(4), num_scales=2, side=4)


class RecordedModel:
    """Answers as the model does, with attention that was chosen beforehand."""

    class config:
        use_fusion = True
        num_scales = 3

    def __init__(self, attention: torch.Tensor) -> None:
        self.attention = attention

    def __call__(self, output_fusion_attentions: bool, **inputs: torch.Tensor):
        grid = torch.zeros(*self.attention.shape[:-1], 8 * 8)
        return type("Output", (), {"fusion_attentions": (grid, self.attention)})


def test_heat_maps_find_the_block_that_was_attended_to() -> None:
    attention = torch.zeros(2, 1, 2, 4, 21)  # [B, layers, heads, Q, M]
    attention[0, ..., 5 + 6] = 1  # finest scale, second row, third column
    attention[1, ..., 0] = 1  # the whole image
    maps = heat_maps(RecordedModel(attention), {"question_attention_mask": torch.ones(2, 4)})
    lit = torch.zeros(8, 8)
    lit[2:4, 4:6] = 0.25
    torch.testing.assert_close(maps, torch.stack([lit, torch.full((8, 8), 1 / 64)]))


def test_heat_maps_of_the_real_model_sum_to_one(make_model, processor, make_image) -> None:
    questions = ["Where is the liver?", "Is it?"]  # of two lengths: the second is padded
    inputs = processor(images=[make_image(0), make_image(1)], text=questions, return_tensors="pt")
    maps = heat_maps(make_model(), inputs)
    assert maps.shape == (2, 4, 4)
    torch.testing.assert_close(maps.sum(dim=(1, 2)), torch.ones(2))


def test_a_model_without_fusion_has_no_map(make_model, processor, make_image) -> None:
    inputs = processor(images=make_image(), text="Where?", return_tensors="pt")
    with pytest.raises(ValueError, match="use_fusion=False"):
        heat_maps(make_model(use_fusion=False), inputs)


@pytest.mark.parametrize("with_mask", [False, True])
def test_overlay_is_a_picture_of_the_right_form(tmp_path, with_mask: bool) -> None:
    image = Image.fromarray(np.full((60, 90), 128, dtype=np.uint8))
    mask = np.zeros((30, 45)) if with_mask else None
    save_overlay(image, torch.rand(8, 8), tmp_path / "a.png", question="Where?", answer="left", reference_mask=mask)
    with Image.open(tmp_path / "a.png") as picture:
        panels = 3 if with_mask else 2
        assert picture.format == "PNG"
        assert picture.width == pytest.approx(panels * 4.2 * 120, abs=2)


def test_overlay_is_hot_where_the_heat_is(tmp_path) -> None:
    heat = torch.full((4, 4), 0.01)
    heat[:, 3] = 1.0  # the right edge
    save_overlay(Image.new("L", (80, 80)), heat, tmp_path / "a.png", question="Where?", answer="right")
    pixels = np.asarray(Image.open(tmp_path / "a.png").convert("RGB")).astype(int)
    height, width, _ = pixels.shape
    row = pixels[height // 2, width // 2 : int(width * 0.88)]  # through the second panel, left of its colour bar
    warm = np.flatnonzero((row[:, 0] > 100) & (row[:, 2] < 110))
    cold = np.flatnonzero(row.sum(axis=1) < 60)
    assert len(warm) > 30
    assert cold.max() < warm.min()
