"""A linear layer whose weight is torchao's NF4Tensor, by itself or as the base layer of an adapter."""

import torch
from torch import Tensor, nn

from fastfuse.ops.nf4_linear import DTYPES, nf4_linear
from fastfuse.patching.hosts._host import Host, run
from fastfuse.quant.nf4 import NF4View, is_torchao


def matches(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and is_torchao(module.weight)


def obstacle(self: nn.Module, x: Tensor | None) -> tuple[str, str] | None:
    if x is None:
        return None
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.get_autocast_dtype(x.device.type):
        return "AUTOCAST", f"the input is {x.dtype} under autocast to another dtype"
    if self.bias is not None and self.bias.dtype != x.dtype:  # added as it is: the result takes the wider dtype
        return "DTYPE", f"the input is {x.dtype}, the bias {self.bias.dtype}"
    return None if x.dtype in DTYPES else ("DTYPE", f"the input is {x.dtype}")


def fused(self: nn.Module, x: Tensor, weight: NF4View, backend: str) -> Tensor:
    return nf4_linear(x, weight, self.bias, backend=backend)


def forward(self: nn.Module, *args, **kwargs) -> Tensor:
    return run(HOST, self, args, kwargs)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return module.weight.dtype


HOST = Host("torchao", "nf4_linear", matches, "torch.nn.modules.linear", lambda m: NF4View.of(m.weight), obstacle, fused, forward, probe_dtype)
