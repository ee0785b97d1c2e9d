"""PEFT's LoRA layers over an NF4 base: lora.bnb.Linear4bit, and lora.Linear over torchao's NF4Tensor."""

import torch
from torch import Tensor, nn

from fastfuse.ops.nf4_linear import DTYPES, nf4_lora_linear
from fastfuse.patching.hosts import bitsandbytes, torchao
from fastfuse.patching.hosts._host import Host, foreign_forward, hooked, run
from fastfuse.quant.nf4 import NF4View

_PARTS = ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_variant", "scaling", "active_adapters", "disable_adapters", "merged")


def matches(module: nn.Module) -> bool:
    return all(hasattr(module, part) for part in _PARTS) and isinstance(module.lora_A, nn.ModuleDict) and _base(module) is not None


def _base(module: nn.Module):
    """The host of the base layer."""
    return next((host for host in (bitsandbytes, torchao) if host.matches(module.base_layer)), None)


def obstacle(self: nn.Module, x: Tensor | None) -> tuple[str, str] | None:
    if self.disable_adapters:
        return "ADAPTERS_DISABLED", "adapters are disabled"
    if self.merged:
        return "MERGED", "the adapter is merged into the base weight"
    active = self.active_adapters
    if len(active) != 1:
        return "ADAPTERS", f"{len(active)} adapters are active, one is covered"
    name = active[0]
    if name not in self.lora_A:
        return "NO_ADAPTER", "the active adapter does not touch this layer"
    if name in self.lora_variant:
        return "VARIANT", f"{type(self.lora_variant[name]).__name__} (DoRA and the like) is not covered"
    a, b, dropout, base = self.lora_A[name], self.lora_B[name], self.lora_dropout[name], self.base_layer
    if b.bias is not None or a.bias is not None:
        return "LORA_BIAS", "the adapter has a bias"
    if dropout.training and not isinstance(dropout, nn.Identity) and getattr(dropout, "p", 1.0) > 0:
        return "DROPOUT", "dropout on the adapter is active"
    if hooked(base) or hooked(a) or hooked(b) or hooked(dropout):
        return "HOOKED", "a hook on the base layer or the adapter must run"
    if not all(type(m) is nn.Linear and "forward" not in m.__dict__ for m in (a, b)):
        return "ADAPTER_TYPE", "the adapter is no plain nn.Linear"
    if not all(type(w) in (nn.Parameter, Tensor) for w in (a.weight, b.weight)):
        return "ADAPTER_TYPE", f"the adapter's weight is a {type(a.weight).__name__}"
    host = _base(self)
    if host is None:
        return "NOT_NF4", "the base layer's weight is not NF4 any more"
    if (author := foreign_forward(host.HOST, base)) is not None:
        return "FOREIGN_FORWARD", f"the base layer's forward comes from {author}"
    if found := host.obstacle(base, x):
        return found
    if x is None:
        return None
    if torch.is_autocast_enabled(x.device.type):
        if x.dtype != torch.get_autocast_dtype(x.device.type):
            return "AUTOCAST", f"the input is {x.dtype} under autocast to another dtype"
    elif x.dtype != a.weight.dtype and not getattr(self, "cast_input_dtype_enabled", True):
        return "DTYPE", "casting the input to the adapter's dtype is switched off"
    if host is bitsandbytes and bitsandbytes.compute_dtype(base, x) != x.dtype:
        return "COMPUTE_DTYPE", f"the input is {x.dtype}, the base layer computes in {base.compute_dtype}"
    return None if a.weight.dtype in DTYPES else ("DTYPE", f"the adapter is {a.weight.dtype}")


def fused(self: nn.Module, x: Tensor, weight: NF4View, backend: str) -> Tensor:
    name = self.active_adapters[0]
    return nf4_lora_linear(x, weight, self.lora_A[name].weight, self.lora_B[name].weight, self.scaling[name], bias=self.base_layer.bias, backend=backend)


def forward(self: nn.Module, *args, **kwargs) -> Tensor:
    return run(HOST, self, args, kwargs)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return _base(module).probe_dtype(module.base_layer)


HOST = Host("PEFT LoRA", "nf4_lora_linear", matches, "peft.tuners.lora.", lambda m: NF4View.of(m.base_layer.weight), obstacle, fused, forward, probe_dtype)
