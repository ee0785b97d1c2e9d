"""A linear layer whose weight is torchao's NF4Tensor, by itself or as the base layer of an adapter."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastfuse.modules._prepared import PreparedLinear, Watch, read_torchao
from fastfuse.ops._op import autocast_dtype
from fastfuse.ops.nf4_linear import DTYPES, nf4_linear
from fastfuse.patching.hosts._host import Reason, parameter
from fastfuse.patching.hosts._nf4 import NF4Layer, nf4_host
from fastfuse.quant.nf4 import NF4View, holds_torchao


def matches(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and holds_torchao(parameter(module, "weight"))


def obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    if x is None:
        return None
    if autocast_dtype(x.device) not in (None, x.dtype):
        return Reason("AUTOCAST", f"the input is {x.dtype} under autocast to another dtype")
    if self.bias is not None and self.bias.dtype != x.dtype:  # added as it is: the result takes the wider dtype
        return Reason("DTYPE", f"the input is {x.dtype}, the bias {self.bias.dtype}")
    return None if x.dtype in DTYPES else Reason("DTYPE", f"the input is {x.dtype}")


def fused(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    return nf4_linear(x, weight, self.bias, backend=backend)


def watched(module: nn.Module, x: Tensor, view: NF4View, watch: Watch) -> Callable[[], list[Tensor] | None] | None:
    """As bitsandbytes.watched. All of an NF4Tensor is read anew at every call."""
    watch.same(module._parameters, "bias")
    return read_torchao(module._parameters, view)


def prepared(module: nn.Module, x: Tensor, view: NF4View) -> PreparedLinear | None:
    watch = Watch()
    return PreparedLinear(watch, x, view, watched(module, x, view, watch), bias=module.bias)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return module.weight.dtype


HOST = nf4_host(
    NF4Layer(obstacle=obstacle, fused=fused, watched=prepared, x="input"),
    name="torchao", op="nf4_linear", matches=matches, written_by="torch.nn.modules.linear", modules="`nn.Linear` with an `NF4Tensor`",
    covers="every block size that is a power of two; bf16, fp16, fp32",
)  # fmt: skip
