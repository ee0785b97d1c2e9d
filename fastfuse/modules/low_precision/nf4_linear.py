"""A frozen linear layer with its weight in NF4."""

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.modules._prepared import Prepares
from fastfuse.ops import nf4_linear
from fastfuse.ops._op import autocast_dtype
from fastfuse.quant.nf4 import is_torchao


class KeepsNF4(Prepares, nn.Module):
    """A module with a `weight` whose deepcopy has the same codes and block sizes. A clone of torchao's is quantized anew, with default sizes."""

    def __deepcopy__(self, memo: dict):
        if is_torchao(self.weight) and id(self.weight) not in memo:
            parts, context = self.weight.__tensor_flatten__()
            parts = {name: getattr(self.weight, name).detach().clone() for name in parts}
            twin = type(self.weight).__tensor_unflatten__(parts, context, self.weight.shape, self.weight.stride())
            memo[id(self.weight)] = nn.Parameter(twin, requires_grad=self.weight.requires_grad)
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return twin


class FrozenNF4Linear(KeepsNF4, nn.Linear):
    """y = x W^T + bias with W in NF4 and nothing trainable (torchtune.modules.low_precision.FrozenNF4Linear).

    in_dim, out_dim: K, N. bias: False by default, unlike nn.Linear's. device, dtype: of the weight before it is quantized, and of
    the bias. quantization_kwargs: block_size (64) and scaler_block_size (256) in elements and blocks, the default where None.
    Raises InvalidArgument (a ValueError) where the block sizes do not divide the weight, TypeError for another keyword.
    """

    def __init__(
        self,
        in_dim: int,
        out_dim: int,
        bias: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
        **quantization_kwargs,
    ):
        from fastfuse.quant.torchao import to_nf4

        super().__init__(in_dim, out_dim, bias=bias, device=device, dtype=dtype)
        self.weight = nn.Parameter(to_nf4(self.weight, **quantization_kwargs))
        self.requires_grad_(False)

    def forward(self, input: Tensor) -> Tensor:
        """x: (..., K)  ->  (..., N) in x's dtype; in the wider of x's and the bias's where they differ."""
        if not torch.compiler.is_dynamo_compiling() and self._prepared is not None and (y := self._prepared(input)) is not None:
            return y
        y = base_linear(input, self.weight, self.bias)
        if is_torchao(self.weight) and bias_fits(input, self.bias):
            self._prepare(input)
        return y


def base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """y = x W^T + bias, W dense or in NF4. Over NF4 a bias of another dtype promotes the result, as adding it to x W^T does."""
    if type(weight).__name__ == "DTensor" and is_torchao(weight._local_tensor):  # shards are torchao's to gather: no kernel reads them
        from fastfuse.quant.torchao import linear_nf4

        y = linear_nf4(x, weight)
    elif not is_torchao(weight):
        return F.linear(x, weight, bias)
    elif bias_fits(x, bias):
        return nf4_linear(x, weight, bias)
    else:
        y = nf4_linear(x, weight)
    return y if bias is None else y + bias


def bias_fits(x: Tensor, bias: Tensor | None) -> bool:
    """Whether adding the bias leaves the dtype that x W^T has, so that it may be added inside the kernel."""
    if bias is None:
        return True
    return bias.dtype == (autocast_dtype(x.device) or x.dtype)
