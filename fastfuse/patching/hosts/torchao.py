"""A linear layer whose weight is torchao's NF4Tensor, by itself or as the base layer of an adapter."""

import torch
from torch import Tensor, nn

from fastfuse.ops.nf4_linear import DTYPES, nf4_linear
from fastfuse.patching.hosts._host import Host, run
from fastfuse.quant.nf4 import NF4View, is_torchao


def matches(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and is_torchao(module.weight)


def obstacle(self: nn.Module, x: Tensor | None, args: tuple = (), kwargs: dict | None = None) -> tuple[str, str] | None:
    if args or kwargs:
        return "ARGUMENTS", "called with more than the input"
    if not is_torchao(self.weight):
        return "NOT_QUANTIZED", "the weight is no NF4Tensor any more"
    if x is None:
        return None
    if x.shape[-1] != self.weight.shape[1]:
        return "SHAPE", "the input's last dim is not the weight's K"
    return None if x.dtype in DTYPES else ("DTYPE", f"the input is {x.dtype}")


def fused(self: nn.Module, x: Tensor) -> Tensor:
    return nf4_linear(x, self.weight, self.bias)


def forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    return run(self, obstacle, fused, x, args, kwargs)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return module.weight.dtype


HOST = Host("torchao", "nf4_linear", matches, ("torch",), lambda m: NF4View.of(m.weight), obstacle, forward, probe_dtype)
