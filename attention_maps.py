"""Where the model looked: the fusion decoder's attention to the image, drawn over the image (paper Fig. 3).

Unusual here: the question attends to cells of every scale at once, and a coarse cell covers many cells of the finest
grid. Each cell's weight is spread evenly over the block that it pooled, so that the map on the N×N grid still sums to
the attention it came from. The processor squashes every image to a square, so the map is simply stretched back over it.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from transformers import PreTrainedModel


def multiscale_to_grid(weights: Tensor, num_scales: int, side: int) -> Tensor:
    """Spread the weights of the multi-scale cells [..., M] over the N×N grid they were pooled from: [..., N, N].

    The cells are ordered as `MultiScaleFeatureEnhancement` makes them: scales coarse to fine, row-major inside a scale.
    The sum over the grid equals the sum over the cells, also where blocks overlap (sides that 2^(S-1) does not divide).
    """
    cells_per_scale = [4**s for s in range(num_scales)]
    if weights.shape[-1] != sum(cells_per_scale):
        raise ValueError(
            f"weights of {weights.shape[-1]} cells: {num_scales} scales have {sum(cells_per_scale)} (1 + 4 + 16 + ...)"
        )
    grid = weights.new_zeros(*weights.shape[:-1], side, side)
    for s, scale_weights in enumerate(weights.split(cells_per_scale, dim=-1)):
        spread = _block_spread(2**s, side).to(weights)  # [b, N]
        blocks = scale_weights.unflatten(-1, (2**s, 2**s))  # [..., b, b]
        grid = grid + spread.T @ blocks @ spread
    return grid


def _block_spread(blocks: int, side: int) -> Tensor:
    """Row i shares a weight of 1 evenly among the grid rows of block i: [blocks, side], each row summing to 1."""
    rows = torch.zeros(blocks, side)
    for i in range(blocks):
        # start and end as in torch's adaptive pooling, which the model uses for these sides
        start, end = i * side // blocks, math.ceil((i + 1) * side / blocks)
        rows[i, start:end] = 1 / (end - start)
    return rows


def question_heat_map(attention: Tensor, question_mask: Tensor, num_scales: int, side: int) -> Tensor:
    """One row's attention [layers, heads, Q, M] → [N, N]: the mean over layers, heads and the question's real tokens.

    Slice `attention` to look at chosen layers or heads. The map sums to 1 (each token's attention does).
    """
    token_maps = multiscale_to_grid(attention.float().mean(dim=(0, 1)), num_scales, side)  # [Q, N, N]
    real = question_mask.bool()
    if not real.any():
        raise ValueError("question_mask is all padding: there is no question token to average over")
    return token_maps[real].mean(dim=0)


@torch.no_grad()
def heat_maps(model: "PreTrainedModel", inputs: Mapping[str, Tensor]) -> Tensor:
    """Where `model` looked for each row of the processor's `inputs`: [B, N, N], each map summing to 1.

    Raises:
        ValueError: for a model of the ablation without fusion, whose question does not attend to the image.
    """
    if not model.config.use_fusion:
        raise ValueError("the model has use_fusion=False: its question does not attend to the image")
    grid_attention, attention = model(**inputs, output_fusion_attentions=True).fusion_attentions
    side = math.isqrt(grid_attention.shape[-1])
    num_scales = model.config.num_scales
    masks = inputs["question_attention_mask"]
    return torch.stack(
        [question_heat_map(row, mask, num_scales, side) for row, mask in zip(attention, masks, strict=True)]
    )


def save_overlay(
    image: Image.Image,
    heat: Tensor,
    path: str | Path,
    *,
    question: str,
    answer: str,
    reference_mask: np.ndarray | None = None,
) -> None:
    """Draw the image, the heat map over it and, where one is given, the true mask beside them, into the file `path`.

    `heat` [N, N] is shown in multiples of evenly spread attention. `reference_mask` [height, width] is true inside the
    organ or lesion asked about; it may have another size than the image.
    """
    from matplotlib.figure import Figure  # no pyplot: it would pick a display and keep every figure in memory

    panels = 2 if reference_mask is None else 3
    figure = Figure(figsize=(4.2 * panels, 4.8), layout="constrained")
    axes = figure.subplots(1, panels)
    extent = (0, image.width, image.height, 0)  # every layer is stretched over the image, whatever its own resolution
    for axis in axes:
        axis.imshow(image.convert("RGB"), extent=extent)
        axis.set_axis_off()
    axes[0].set_title("image")
    _draw_heat(axes[1], heat, extent)
    if reference_mask is not None:
        _draw_mask(axes[2], reference_mask, extent)
    figure.suptitle(f"{question}\n→ {answer}", wrap=True, parse_math=False)  # a dollar sign is a dollar sign
    figure.savefig(path, dpi=120)


def _draw_heat(axis: "Axes", heat: Tensor, extent: tuple[int, int, int, int]) -> None:
    relative = (heat * heat.numel() / heat.sum()).float().cpu().numpy()
    # nearest, not bilinear: a grid cell is the finest thing the model can weigh, and a smooth map would claim more
    layer = axis.imshow(relative, extent=extent, cmap="inferno", alpha=0.55, interpolation="nearest")
    axis.set_title("attention")
    axis.figure.colorbar(layer, ax=axis, shrink=0.8, label="times evenly spread attention")


def _draw_mask(axis: "Axes", mask: np.ndarray, extent: tuple[int, int, int, int]) -> None:
    if mask.ndim != 2:
        raise ValueError(f"reference_mask has shape {mask.shape}, must be [height, width]")
    inside = np.where(mask, 1.0, np.nan)  # nan is left transparent
    axis.imshow(inside, extent=extent, cmap="summer", vmin=0, vmax=1.2, alpha=0.5, interpolation="nearest")
    axis.set_title("true mask")
