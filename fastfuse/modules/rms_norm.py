"""Root-mean-square normalisation (https://arxiv.org/abs/1910.07467)."""

import torch
from torch import Tensor, nn


def rms_norm(x: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x^2) + eps) over the last dim, computed in fp32 (fp64 for fp64), in x's dtype."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """rms_norm(x) * scale.

    The normalised value is rounded to x's dtype before the product, so bf16 rounds twice, as in Meta's models; the
    result has the wider dtype of x and scale.  scale: (dim,).
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__()
        self.normalized_shape = (dim,)
        self.eps = eps
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) -> (..., dim)"""
        return rms_norm(x, self.eps) * self.scale

    def extra_repr(self) -> str:
        return f"{self.normalized_shape[0]}, eps={self.eps}"
