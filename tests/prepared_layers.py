"""Linear layers of every kind that prepares its next call, and what tests ask of them."""

import torch
from accelerate.hooks import add_hook_to_module
from qlora import HOSTS, Doubling, lora, quantized
from torch import nn
from weights import quantize

import fastfuse
from fastfuse.modules._prepared import PreparedLinear
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear

P, F32 = nn.Parameter, torch.float32


def own(kind, dtype=F32, **options):
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        layer = kind(128, 256, **options) if kind is FrozenNF4Linear else kind(128, 256, rank=8, alpha=16, quantize_base=True, **options)
    finally:
        torch.set_default_dtype(before)
    if kind is not FrozenNF4Linear:
        nn.init.normal_(layer.lora_b.weight)
    if kind is DoRALinear:
        layer.initialize_dora_magnitude()
        layer.magnitude.data.mul_(torch.linspace(0.5, 1.5, 256))
    return layer


def patched(model):
    fastfuse.patch(model)
    return layer_of(model)


def layer_of(model):
    return model.base_model.model.up if hasattr(model, "base_model") else getattr(model, "up", model)


LAYERS = {
    **{f"PEFT over {host}": lambda dtype=F32, host=host: patched(lora(host, dtype)) for host in HOSTS},
    **{f"{host} without a bias": lambda dtype=F32, host=host: patched(without_bias(lora(host, dtype))) for host in HOSTS},
    "DoRA": lambda dtype=F32: patched(lora("bitsandbytes", dtype, use_dora=True)),
    **{f"bare {host}": lambda dtype=F32, host=host: patched(quantized(host, dtype)) for host in HOSTS},
    "rsLoRA": lambda dtype=F32: patched(lora("bitsandbytes", dtype, use_rslora=True)),
    "dropout in eval": lambda dtype=F32: patched(lora("bitsandbytes", dtype, lora_dropout=0.3).eval()),
    "PEFT over flat scales": lambda dtype=F32: patched(with_flat_scales(lora("bitsandbytes", dtype))),
    "flat scales": lambda dtype=F32: patched(quantized("bitsandbytes", dtype, storage="flat")),
    "LoRALinear": lambda dtype=F32: own(LoRALinear, dtype),
    "LoRALinear, bias, dropout in eval": lambda dtype=F32: own(LoRALinear, dtype, use_bias=True, dropout=0.3).eval(),
    "DoRALinear": lambda dtype=F32: own(DoRALinear, dtype),
    "FrozenNF4Linear": lambda dtype=F32: own(FrozenNF4Linear, dtype),
    "FrozenNF4Linear with a bias": lambda dtype=F32: own(FrozenNF4Linear, dtype, bias=True),
}


def without_bias(model):
    layer_of(model).base_layer.bias = None
    return model


def with_flat_scales(model):
    base = layer_of(model).base_layer
    base.weight = quantize(weights(256, 128).to(base.compute_dtype), "flat")
    return model


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def plan_of(layer):
    record = layer.__dict__.get("_fastfuse")
    return layer._prepared if record is None else record.prepared


def forget(layer) -> None:
    record = layer.__dict__.get("_fastfuse")
    if record is None:
        layer._prepared, layer._unprepared = None, 0
    else:
        record.prepared, record.unprepared = None, 0


def prepared(layer, x):
    with torch.no_grad():
        layer(x)
    assert isinstance(plan_of(layer), PreparedLinear)
    return layer


def served(layer, x) -> bool:
    """Whether the plan, asked itself, takes the call."""
    return plan_of(layer) is not None and plan_of(layer)(x) is not None


def results(layer, x, grad=True):
    """y, and with `grad` its gradients for x and all that is trained."""
    if not grad:
        with torch.no_grad():
            return [layer(x)]
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    leaves = [x, *(p for p in layer.parameters() if p.requires_grad and type(p).__name__ != "NF4Tensor")]
    return [y.detach(), *torch.autograd.grad(y, leaves, torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y), allow_unused=True)]


def same(got, want) -> bool:
    return len(got) == len(want) and all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in zip(got, want, strict=True))


class Another(nn.Linear):
    def forward(self, x):
        return 3 * super().forward(x)


def other_base(host):
    torch.manual_seed(9)
    return lora(host).base_model.model.up.base_layer.weight


def a_of(up):
    return up.lora_A["default"]


def b_of(up):
    return up.lora_B["default"]


def children(up):
    return {"A": a_of(up), "B": b_of(up), "dropout": up.lora_dropout["default"], "base": up.base_layer}


HOOKS = {
    "forward hook": lambda child: child.register_forward_hook(lambda module, given, out: 2 * out),
    "pre-hook": lambda child: child.register_forward_pre_hook(lambda module, given: (2 * given[0],)),
    "backward hook": lambda child: child.register_full_backward_hook(lambda module, given, wanted: (2 * given[0],)),
    "backward pre-hook": lambda child: child.register_full_backward_pre_hook(lambda module, wanted: (2 * wanted[0],)),
    "accelerate": lambda child: add_hook_to_module(child, Doubling()),
    "rebound": lambda child: setattr(child, "forward", lambda x: 2 * type(child).forward(child, x)),
    "hooks replaced": lambda child: setattr(child, "_forward_hooks", {0: lambda module, given, out: 2 * out}),
}
