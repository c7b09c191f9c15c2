"""Multi-scale features and fusion decoder beside the direct way of computing them, in one run, as ratios.

    python benchmarks/fusion.py [--threads 1] [--batch 4] [--repeats 5]

The direct way follows the paper's definitions: a loop over every block of every scale, and cross-attention that
projects all 1365 cells to keys and values (torch's own MultiheadAttention). Sizes are the paper's: 32 x 32 cells of
1024 channels, six scales, 32 queries, eight heads. Both ways have the same weights, and their outputs are compared
before they are timed.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from biod2c.configuration_biod2c import BioD2CConfig
from biod2c.modeling_biod2c import CrossAttention, FusionDecoder, MultiScaleFeatureEnhancement

SIDE, WIDTH, SCALES, QUERIES, HEADS, CELLS = 32, 1024, 6, 32, 8, 1365


def multi_scale_loop(grid: Tensor) -> Tensor:
    """[B, D, N, N] -> [B, M, D], block by block (paper section 3.1)."""
    rows, cells = grid.permute(0, 2, 3, 1), []
    for scale in range(SCALES):
        block = SIDE // 2**scale
        for y in range(0, SIDE, block):
            for x in range(0, SIDE, block):
                part = rows[:, y : y + block, x : x + block]
                cells.append(part.mean((1, 2)) + part.flatten(1, 2).max(1).values)
    return torch.stack(cells, 1)


class DirectCrossAttention(nn.MultiheadAttention):
    """Keys and values of all cells, as the authors' decoder computes them; called like `CrossAttention`."""

    def forward(self, x: Tensor, cells: Tensor, cell_positions: None) -> tuple[Tensor, None]:  # type: ignore[override]
        return super().forward(x, cells, cells, need_weights=False)


def direct(attention: CrossAttention) -> DirectCrossAttention:
    copy = DirectCrossAttention(WIDTH, HEADS, dropout=attention.dropout, batch_first=True)
    copy.load_state_dict(attention.state_dict())
    return copy


def randomize(module: nn.Module) -> None:
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.02)


def time_both(
    ours: Callable[[], object], theirs: Callable[[], object], repeats: int
) -> tuple[list[float], list[float]]:
    """Seconds of each, taken in turns, so that a noisy neighbour hits both."""
    seconds: tuple[list[float], list[float]] = ([], [])
    for round_ in range(repeats + 1):
        for which, call in enumerate((ours, theirs)):
            start = time.perf_counter()
            call()
            if round_:  # the first one warms up
                seconds[which].append(time.perf_counter() - start)
    return seconds


def report(name: str, ours: list[float], theirs: list[float]) -> None:
    ratios = sorted(their / our for our, their in zip(ours, theirs, strict=True))
    print(
        f"{name:<46}{statistics.median(theirs):>10.4f}{statistics.median(ours):>10.4f}"
        f"{statistics.median(ratios):>9.1f}x   ({ratios[0]:.1f} to {ratios[-1]:.1f})"
    )


def backward(module: nn.Module, *inputs: Tensor | None) -> Callable[[], None]:
    def call() -> None:
        module.zero_grad()
        module(*inputs)[0].square().mean().backward()

    return call


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)

    machine = f"{platform.machine()}, {arguments.threads} thread(s)"
    print(f"torch {torch.__version__}, {machine}, batch {arguments.batch}, float32")
    print(f"{'':<46}{'direct s':>10}{'ours s':>10}{'ratio':>10}   (lowest to highest)")
    enhance = MultiScaleFeatureEnhancement(SCALES)
    for batch in sorted({1, arguments.batch}):
        # each gets the memory layout that its own trunk makes
        grid = torch.randn(batch, WIDTH, SIDE, SIDE)
        cells_last = grid.contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(enhance(cells_last), multi_scale_loop(grid), atol=2e-5, rtol=0)
        both = time_both(partial(enhance, cells_last), partial(multi_scale_loop, grid), arguments.repeats)
        report(f"MFE, forward, batch {batch}", *both)

    queries = torch.randn(arguments.batch, QUERIES, WIDTH, requires_grad=True)
    cells = torch.randn(arguments.batch, CELLS, WIDTH, requires_grad=True)
    absorbed = CrossAttention(WIDTH, HEADS, dropout=0.0)
    randomize(absorbed)
    their_attention = direct(absorbed)
    torch.testing.assert_close(
        absorbed(queries, cells, None)[0], their_attention(queries, cells, None)[0], atol=2e-5, rtol=0
    )
    report(
        "cross-attention, forward + backward",
        *time_both(
            backward(absorbed, queries, cells, None), backward(their_attention, queries, cells, None), arguments.repeats
        ),
    )

    config = BioD2CConfig(fusion_dropout=0.0)
    decoder, their_decoder = FusionDecoder(config), FusionDecoder(config)
    randomize(decoder)
    their_decoder.load_state_dict(decoder.state_dict())
    for layer in their_decoder.layers:
        layer.cross_attn = direct(layer.cross_attn)
    torch.testing.assert_close(decoder(queries, cells)[0], their_decoder(queries, cells)[0], atol=2e-5, rtol=0)
    report(
        "fusion pass, 12 layers, forward + backward",
        *time_both(backward(decoder, queries, cells), backward(their_decoder, queries, cells), 2),
    )


if __name__ == "__main__":
    main()
