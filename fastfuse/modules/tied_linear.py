"""An output projection that shares its weight with an embedding."""

from torch import Tensor, nn
from torch.nn import functional as F


class TiedLinear:
    """x W^T with the weight of another module, read at every call.

    Not an nn.Module, so that the weight has one name in the state dict and is owned once.
    Raises AttributeError where tied_module has no weight.
    """

    def __init__(self, tied_module: nn.Module):
        if not hasattr(tied_module, "weight"):
            raise AttributeError(f"TiedLinear: tied_module is a {type(tied_module).__name__}, which has no attribute 'weight'")
        self.tied_module = tied_module

    def __call__(self, x: Tensor) -> Tensor:
        """(..., embed_dim) -> (..., vocab_size)"""
        return F.linear(x, self.tied_module.weight)
