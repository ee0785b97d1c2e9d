"""The MLP of a transformer layer."""

from torch import Tensor, nn


class FeedForward(nn.Module):
    """w2(activation(w1 x) * w3 x), or w2(activation(w1 x)) without up_proj.

    gate_proj, down_proj, up_proj become w1, w2, w3: the names in Meta's checkpoints (SwiGLU, https://arxiv.org/abs/2002.05202).
    """

    def __init__(self, *, gate_proj: nn.Module, down_proj: nn.Module, up_proj: nn.Module | None = None, activation: nn.Module = nn.SiLU()):  # noqa: B008
        super().__init__()
        self.w1 = gate_proj
        self.w2 = down_proj
        self.w3 = up_proj
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_dim) -> (..., out_dim)"""
        h = self.activation(self.w1(x))
        if self.w3 is not None:
            h = h * self.w3(x)
        return self.w2(h)
