"""The MLP on the encoder's features (paper section 2), and how it is fitted: full batches, a fixed number of steps.

Features are standardised by the training figures' mean and deviation, which are part of the head. Nothing is stopped
early: that would take labels away from the threshold or from the report.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

HIDDEN = 128
STEPS = 200


class Head(nn.Module):
    """Features [n, D] -> logits [n] of clean."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))
        self.mlp = nn.Sequential(nn.Linear(width, HIDDEN), nn.GELU(), nn.Dropout(0.3), nn.Linear(HIDDEN, 1))

    def forward(self, features: Tensor) -> Tensor:
        return self.mlp((features - self.mean) / self.deviation).squeeze(-1)

    @torch.inference_mode()
    def score(self, features: Tensor) -> Tensor:
        """The probability [n] that each figure is clean."""
        return self.eval()(features).sigmoid()


def fit_head(features: Tensor, is_clean: Tensor) -> Head:
    """Fit on features [n, D] and labels [n] of 0 or 1; the same inputs give the same head."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        head = Head(features.shape[1])
        head.mean = features.mean(0)
        head.deviation = features.std(0).clamp_min(1e-6)
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.1)
        for _ in range(STEPS):
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(head(features), is_clean).backward()
            optimizer.step()
    return head


def save_head(head: Head, path: Path) -> None:
    """Write the weights and the standardisation."""
    save_file(head.state_dict(), path)


def load_head(path: Path) -> Head:
    """Read what `save_head` wrote."""
    tensors = load_file(path)
    head = Head(tensors["mean"].numel())
    head.load_state_dict(tensors)
    return head
