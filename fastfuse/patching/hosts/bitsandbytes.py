"""bitsandbytes' Linear4bit, by itself or as the base layer of an adapter."""

import torch
from torch import Tensor, nn

from fastfuse.ops.nf4_linear import DTYPES, nf4_linear
from fastfuse.patching.hosts._host import Host, run
from fastfuse.quant.nf4 import NF4View


def matches(module: nn.Module) -> bool:
    weight = module.__dict__.get("_parameters", {}).get("weight")
    return hasattr(weight, "quant_state") and hasattr(module, "compute_dtype") and hasattr(module, "set_compute_type")


def obstacle(self: nn.Module, x: Tensor | None) -> tuple[str, str] | None:
    if x is None:
        return None
    if x.dtype not in DTYPES or compute_dtype(self, x) not in DTYPES:
        return "DTYPE", f"the input is {x.dtype}, the layer computes in {self.compute_dtype}"
    if torch.is_autocast_enabled(x.device.type) and torch.get_autocast_dtype(x.device.type) != compute_dtype(self, x):
        return "AUTOCAST", "autocast's dtype is not the layer's compute_dtype"
    return None


def compute_dtype(self: nn.Module, x: Tensor) -> torch.dtype:
    """What the layer computes in: settled, as in its own forward, by its first input."""
    if not self.compute_type_is_set:
        self.set_compute_type(x)
        self.compute_type_is_set = True
    return self.compute_dtype or x.dtype


def fused(self: nn.Module, x: Tensor, weight: NF4View, backend: str) -> Tensor:
    return nf4_linear(x.to(compute_dtype(self, x)), weight, self.bias, backend=backend).to(x.dtype)


def forward(self: nn.Module, *args, **kwargs) -> Tensor:
    return run(HOST, self, args, kwargs)


def probe_dtype(module: nn.Module) -> torch.dtype:
    return module.compute_dtype or module.weight.quant_state.dtype


HOST = Host("bitsandbytes", "nf4_linear", matches, "bitsandbytes.nn.", lambda m: NF4View.of(m.weight), obstacle, fused, forward, probe_dtype)
