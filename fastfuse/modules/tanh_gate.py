"""A learned gate that starts closed."""

import torch
from torch import Tensor, nn


class TanhGate(nn.Module):
    """x * tanh(scale), scale (1,) and zero in a fresh module; the result has the wider dtype of the two."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale.tanh()
