"""A linear layer whose weight is torchao's NF4Tensor, by itself or as the base layer of an adapter."""

import torch
from torch import Tensor, nn

from fastfuse.ops.nf4_linear import DTYPES, nf4_linear
from fastfuse.patching.hosts._host import Host, run
from fastfuse.quant.nf4 import NF4View, is_torchao


def matches(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and is_torchao(module.weight)


def obstacle(self: nn.Module, x: Tensor | None, args: tuple, kwargs: dict) -> tuple[str, str] | None:
    if args or kwargs:
        return "ARGUMENTS", "called with more than the input"
    if x is not None and x.dtype not in DTYPES:
        return "DTYPE", f"the input is {x.dtype}"
    return None


def fused(self: nn.Module, x: Tensor, weight: NF4View) -> Tensor:
    return nf4_linear(x, weight, self.bias)


def forward(self: nn.Module, x: Tensor, *args, **kwargs) -> Tensor:
    return run(HOST, self, x, args, kwargs)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return module.weight.dtype


HOST = Host("torchao", "nf4_linear", matches, ("torch",), lambda m: NF4View.of(m.weight), obstacle, fused, forward, probe_dtype)
