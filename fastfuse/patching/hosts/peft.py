"""PEFT's LoRA layers over an NF4 base: lora.bnb.Linear4bit, and lora.Linear over torchao's NF4Tensor."""

import copy

import torch
from torch import Tensor, nn

from fastfuse.modules._prepared import PreparedLinear, Watch, dora_factor
from fastfuse.ops import lora_row_norms
from fastfuse.ops._op import autocast_dtype
from fastfuse.ops.nf4_linear import DTYPES, nf4_lora_linear
from fastfuse.patching.hosts import bitsandbytes, torchao
from fastfuse.patching.hosts._host import Arguments, Reason, foreign_forward, hooked, own_forward, plain_tensors, rebound
from fastfuse.patching.hosts._nf4 import NF4Layer, adapter_obstacle, drops_now, nf4_host
from fastfuse.quant.nf4 import NF4View, holds_torchao

_PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "active_adapters", "disable_adapters", "merged")


def matches(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in _PARTS) and isinstance(module.lora_A, nn.ModuleDict) and _base(module) is not None


def _base(module: nn.Module):
    """The host of the base layer."""
    base = module.base_layer
    return bitsandbytes if bitsandbytes.matches(base) else torchao if torchao.matches(base) else None


def _view(module: nn.Module) -> NF4View:
    base = module.base_layer
    return NF4View.of(base.weight) if holds_torchao(base.weight) else bitsandbytes.view(base)


def _active(self: nn.Module) -> list[str]:
    """The active adapters that touch this layer."""
    return [name for name in self.active_adapters if name in self.lora_A]


def obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    if self.disable_adapters:
        return Reason("ADAPTERS_DISABLED", "adapters are disabled")
    if self.merged:
        return Reason("MERGED", "the adapter is merged into the base weight")
    names, base = _active(self), self.base_layer
    if not names:
        return Reason("NO_ADAPTER", "the active adapter does not touch this layer")
    for name in names:
        if reason := _adapter_obstacle(self, name, alone=len(names) == 1):
            return reason
    if hooked(base):
        return Reason("HOOKED", "a hook on the base layer must run")
    if reason := plain_tensors(base.bias):
        return reason
    host = _base(self)
    if host is None:
        return Reason("NOT_NF4", "the base layer's weight is not NF4 any more")
    if reason := foreign_forward(host.HOST, base) or host.obstacle(base, x):
        return reason
    if x is None:
        return None
    if x.dim() == 1 and names[0] in self.lora_variant:
        return Reason("SHAPE", "PEFT's DoRA gives a vector another dimension")
    adapters = {self.lora_A[name].weight.dtype for name in names}
    if (autocast := autocast_dtype(x.device)) is not None:
        # bitsandbytes' layer gives back the dtype it was given, and the adapter's product is added to that, DoRA's scaled with it: of an fp32 x the
        # result is fp32 that holds what was computed in autocast's dtype.
        widened = host is bitsandbytes and x.dtype == torch.float32
        if x.dtype != autocast and not widened:
            return Reason("AUTOCAST", f"the input is {x.dtype} under autocast to another dtype")
    elif adapters != {x.dtype} and not getattr(self, "cast_input_dtype_enabled", True):
        return Reason("DTYPE", "casting the input to the adapter's dtype is switched off")
    elif host is bitsandbytes and bitsandbytes.compute_dtype(base, x) != x.dtype:
        return Reason("COMPUTE_DTYPE", f"the input is {x.dtype}, the base layer computes in {base.compute_dtype}")
    return None if adapters <= set(DTYPES) else Reason("DTYPE", f"the adapter is {adapters.difference(DTYPES).pop()}")


def _adapter_obstacle(self: nn.Module, name: str, alone: bool) -> Reason | None:
    a, b, dropout = self.lora_A[name], self.lora_B[name], self.lora_dropout[name]
    if reason := adapter_obstacle(a, b, dropout):
        return reason
    drops = drops_now(dropout) > 0
    if drops and not alone:
        return Reason("DROPOUT", "several adapters with dropout draw a mask each")
    if name not in self.lora_variant:
        return None
    variant = self.lora_variant[name]
    if type(variant).__name__ != "DoraLinearVariant":
        return Reason("VARIANT", f"{type(variant).__name__} is not covered")
    # With dropout in training PEFT's DoRA passes the base weight's second product a dropped x: another formula.
    if drops or (self.training and not isinstance(dropout, nn.Identity)):
        return Reason("DORA_DROPOUT", "DoRA with dropout is another formula in PEFT")
    if not alone or b.bias is not None:
        return Reason("VARIANT", "DoRA together with another adapter, or with a bias of its own")
    magnitude = self.lora_magnitude_vector[name]
    if hooked(magnitude) or rebound(magnitude):
        return Reason("HOOKED", "a hook on DoRA's magnitude must run")
    if not type(magnitude).forward.__module__.startswith("peft."):
        return Reason("CHILD_TYPE", f"{type(magnitude).__name__} in place of PEFT's own magnitude")
    return plain_tensors(magnitude.weight)


def fused(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    names, bias, magnitude = _active(self), self.base_layer.bias, None
    first = names[0]
    if len(names) == 1:
        a, b, scaling = self.lora_A[first].weight, self.lora_B[first].weight, self.scaling[first]
        if isinstance(scaling, Tensor):  # PEFT's hot swapping of adapters under torch.compile
            b, scaling = b.float() * scaling, 1.0
        if first in self.lora_variant:
            magnitude = self.lora_magnitude_vector[first].weight
    else:  # the sum of several is one of all their ranks
        a, scaling = torch.cat([self.lora_A[name].weight for name in names]), 1.0
        b = torch.cat([self.lora_B[name].weight.float() * self.scaling[name] for name in names], 1)  # a small fp16 B would lose its digits
    for name in names:
        if (own := self.lora_B[name].bias) is not None:
            own = own * self.scaling[name]
            bias = own if bias is None else bias + own
    computed, dtype = autocast_dtype(x.device), x.dtype
    if magnitude is not None and computed is not None and torch.is_autocast_enabled():  # a GPU's: PEFT then leaves DoRA's sum in the widest dtype
        dtype = torch.promote_types(dtype, magnitude.dtype)
    if magnitude is not None and computed not in (None, dtype):
        return _widened_dora(x, weight, a, b, scaling, bias, magnitude, backend).to(dtype)
    y = nf4_lora_linear(x, weight, a, b, scaling, bias=bias, magnitude=magnitude, dropout_p=drops_now(self.lora_dropout[first]), training=True, backend=backend)
    return y.to(x.dtype)  # under autocast the base layer's result is the input's dtype


def _prepared(self: nn.Module, x: Tensor, view: NF4View) -> PreparedLinear | None:
    """One adapter without dropout; several, and scalings that are tensors, go the whole way."""
    names, base = _active(self), self.base_layer
    if len(names) != 1 or self.active_adapters != names or isinstance(self.scaling[name := names[0]], Tensor) or drops_now(self.lora_dropout[name]) > 0:
        return None
    a, b, dropout, variant = self.lora_A[name], self.lora_B[name], self.lora_dropout[name], self.lora_variant.get(name)
    if b.bias is not None:  # its product with the scaling, and the sum with the base's, are made at every call
        return None
    state, children, watch = self.__dict__, self._modules, Watch()
    weight = _base(self).watched(base, x, view, watch)
    if weight is None or not isinstance(self.scaling[name], float | int):
        return None
    watch.same(state, "_disable_adapters", "merged_adapters", "cast_input_dtype_enabled", "lora_variant", "scaling", "training")
    watch.same(self.scaling, name)
    watch.same(self.lora_variant, name)
    watch.same(children, "base_layer", "lora_A", "lora_B", "lora_dropout")
    watch.empty.append(self.merged_adapters)
    for holder, child in ((self.lora_A, a), (self.lora_B, b), (self.lora_dropout, dropout)):
        watch.same(holder._modules, name)
        watch.same(child.__dict__, "training", "p")
    for child in (base, a, b, dropout):
        watch.child(child)
    for child in (a, b):
        watch.same(child._parameters, "weight", "bias")
    factor, bias = None, base.bias
    if variant is not None:
        magnitude = self.lora_magnitude_vector[name]
        watch.same(children, "lora_magnitude_vector")
        watch.same(self.lora_magnitude_vector._modules, name)
        watch.child(magnitude)
        watch.same(magnitude._parameters, "weight")
        factor = dora_factor(magnitude.weight, a.weight, b.weight, self.scaling[name], view)
    active = state, copy.copy(state["_active_adapter"])
    return PreparedLinear(watch, x, view, weight, a.weight, b.weight, float(self.scaling[name]), bias, factor, active)


def _widened_dora(x: Tensor, weight: NF4View, a: Tensor, b: Tensor, scaling: float, bias: Tensor | None, magnitude: Tensor, backend: str | None) -> Tensor:
    """DoRA under autocast with a result in fp32: scaled in fp32, as there. The op would round once more, to autocast's dtype."""
    z = nf4_lora_linear(x, weight, a, b, scaling, backend=backend)
    y = z * (magnitude / lora_row_norms(weight, a, b, scaling, z.dtype, backend=backend))
    return y if bias is None else y + bias


def corrected(self: nn.Module, arguments: Arguments) -> Tensor:
    """PEFT's own forward over a dense base layer, where bitsandbytes decodes the weight wrongly: DoRA's norms take it from there as well."""
    base = self.base_layer
    if _base(self) is not bitsandbytes or torch.equal(*(decoded := bitsandbytes.decodes(base, bitsandbytes.compute_dtype(base, arguments["x"])))):
        return own_forward(self)(**arguments)
    dense = nn.Linear(1, 1)
    dense.weight, dense.bias = nn.Parameter(decoded[1], requires_grad=False), base.bias
    self.base_layer = dense
    try:
        return own_forward(self)(**arguments)
    finally:
        self.base_layer = base


HOST = nf4_host(
    NF4Layer(
        view=_view, obstacle=obstacle, fused=fused, watched=_prepared, probe_dtype=lambda module: _base(module).probe_dtype(module.base_layer),
    ),
    name="PEFT LoRA", op="nf4_lora_linear", matches=matches, classes=("Linear4bit",), written_by="peft.tuners.lora.", parts=_PARTS, corrected=corrected,
    modules="`lora.bnb.Linear4bit`, `lora.Linear` over NF4",
    covers="LoRA, rsLoRA, DoRA without dropout, several adapters, dropout, bias of B; merged, disabled and mixed-batch adapters run PEFT's own forward",
)  # fmt: skip
