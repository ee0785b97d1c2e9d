"""Layer normalisation in fp32."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Fp32LayerNorm(nn.LayerNorm):
    """nn.LayerNorm that computes in fp32 (fp64 for fp64) and returns x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., *normalized_shape) -> the same"""
        wide = torch.promote_types(x.dtype, torch.float32)
        weight, bias = (p if p is None else p.to(wide) for p in (self.weight, self.bias))
        return F.layer_norm(x.to(wide), self.normalized_shape, weight, bias, self.eps).to(x.dtype)
