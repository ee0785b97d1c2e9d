"""bitsandbytes' Linear4bit, by itself or as the base layer of an adapter."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.modules._prepared import PreparedLinear, Watch
from fastfuse.ops._op import autocast_dtype
from fastfuse.ops.nf4_linear import DTYPES, nf4_linear
from fastfuse.patching.hosts._host import Arguments, Reason, own_forward, parameter
from fastfuse.patching.hosts._nf4 import NF4Layer, nf4_host
from fastfuse.quant.nf4 import NF4View, of_bitsandbytes

_PARTS = ("compute_dtype", "compute_type_is_set", "set_compute_type", "bias")


def matches(module: nn.Module) -> bool:
    if parameter(module, "weight") is None:
        return False
    # One by one, and not all(...) over _PARTS: every call of an adapter asks it, and a generator is slow.
    return hasattr(module, "compute_dtype") and hasattr(module, "compute_type_is_set") and hasattr(module, "set_compute_type") and hasattr(module, "bias")


def view(module: nn.Module) -> NF4View:
    """The weight as the layer's own product reads it: where something has taken its quant_state (FSDP2, export, functional_call), the layer's own serves."""
    weight = module.weight
    state = getattr(weight, "quant_state", None)
    if state is None and tuple(weight.shape[1:]) == (1,):  # codes are a column
        state = getattr(module, "quant_state", None)
    if state is None and not hasattr(weight, "quant_state"):
        raise TypeError(f"NF4View: its weight is a plain {str(weight.dtype).removeprefix('torch.')} Parameter")
    return of_bitsandbytes(weight, state, as_linear=True)


def obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    if x is None:
        return None
    if x.dtype not in DTYPES or compute_dtype(self, x) not in DTYPES:
        return Reason("DTYPE", f"the input is {x.dtype}, the layer computes in {self.compute_dtype}")
    if autocast_dtype(x.device) not in (None, compute_dtype(self, x)):
        return Reason("AUTOCAST", "autocast's dtype is not the layer's compute_dtype")
    return None


def compute_dtype(self: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer computes in: settled, as in its own forward, by its first input."""
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    return self.compute_dtype or x.dtype


def fused(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    return nf4_linear(x.to(compute_dtype(self, x)), weight, self.bias, backend=backend).to(x.dtype)


def watched(module: nn.Module, x: Tensor, view: NF4View, watch: Watch) -> Callable[[], list[Tensor] | None] | None:
    """Watches what the layer's own product depends on beside its weight; how to read the weight, None where its tensors are not the layer's own."""
    state = getattr(module.weight, "quant_state", None)
    _, code, scales = view.tensors()
    if state is None or compute_dtype(module, x) != x.dtype:
        return None
    if view.scales[0] is not state.absmax or (state.nested and view.scales[3] is not state.offset):  # 16-bit ones are copied to fp32
        return None
    parameters, kind = module._parameters, type(module.weight)
    watch.same(parameters, "bias")
    watch.same(module.__dict__, "compute_dtype", "compute_type_is_set")
    watch.same(state.__dict__, "absmax", "code", "offset", "state2", "blocksize", "shape", "dtype", "quant_type", "packing_format_for_cpu")
    if state.nested:
        watch.same(state.state2.__dict__, "absmax", "code", "blocksize", "dtype")

    def weight() -> list[Tensor] | None:
        held = parameters["weight"]
        return None if type(held) is not kind or held.quant_state is not state else [held, code, *scales]

    return weight


def prepared(module: nn.Module, x: Tensor, view: NF4View) -> PreparedLinear | None:
    watch = Watch()
    weight = watched(module, x, view, watch)
    return None if weight is None else PreparedLinear(watch, x, view, weight, bias=module.bias)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return module.compute_dtype or view(module).dtype


def decodes(self: nn.Module, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The weight as bitsandbytes decodes it by rows, and as one flat row.

    The second is always right. With AVX-512 its CPU decode (0.50.2) begins a new block of scales in every row, which is wrong wherever K is a
    multiple of 16 but not of the block size.
    """
    from bitsandbytes.functional import dequantize_4bit

    state = copy.copy(getattr(self.weight, "quant_state", None) or self.quant_state)
    state.dtype = dtype
    rows = dequantize_4bit(self.weight.detach(), state)
    state.shape = torch.Size((1, rows.numel()))
    return rows, dequantize_4bit(self.weight.detach(), state).view(rows.shape)


def corrected(self: nn.Module, arguments: Arguments) -> Tensor:
    """The layer's own forward, with what its decode by rows gets wrong put right."""
    x = arguments["x"].to(compute_dtype(self, arguments["x"]))
    rows, flat = decodes(self, x.dtype)
    return (own_forward(self)(arguments["x"]) + F.linear(x, flat - rows)).to(arguments["x"].dtype)


HOST = nf4_host(
    NF4Layer(view=view, obstacle=obstacle, fused=fused, probe_dtype=probe_dtype, watched=prepared),
    name="bitsandbytes", op="nf4_linear", matches=matches, classes=("Linear4bit",), written_by="bitsandbytes.nn.", parts=("weight", *_PARTS),
    corrected=corrected, modules="`nn.Linear4bit`",
    covers="NF4, nested and flat, any quant_storage; bf16, fp16, fp32; not weights packed for AVX512 or flat ones unpacked again, FP4",
)  # fmt: skip
