"""Linear layers of every kind that prepares its next call, and what tests ask of them."""

import copy
from functools import partial

import torch
from accelerate.hooks import add_hook_to_module
from qlora import HOSTS, Doubling, lora, quantized
from torch import nn

import fastfuse
from cases.weights import quantize
from fastfuse.modules._prepared import PreparedLinear
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear

P, F32 = nn.Parameter, torch.float32


def own(kind, dtype=F32, training=True, **options):
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
    return layer.train(training)


def patched(model):
    fastfuse.patch(model)
    return layer_of(model)


def layer_of(model):
    return model.base_model.model.up if hasattr(model, "base_model") else getattr(model, "up", model)


def bare(host, dtype=F32, storage="nested"):
    return patched(quantized(host, dtype, storage))


def adapted(host, dtype=F32, *, bias=True, flat=False, training=True, **config):
    model = lora(host, dtype, **config).train(training)
    base = layer_of(model).base_layer
    if not bias:
        base.bias = None
    if flat:
        base.weight = quantize(weights(256, 128).to(base.compute_dtype), "flat")
    return patched(model)


BNB = "bitsandbytes"
LAYERS = {  # name: dtype -> the layer
    **{f"PEFT over {host}": partial(adapted, host) for host in HOSTS},
    **{f"{host} without a bias": partial(adapted, host, bias=False) for host in HOSTS},
    "DoRA": partial(adapted, BNB, use_dora=True),
    **{f"bare {host}": partial(bare, host) for host in HOSTS},
    "rsLoRA": partial(adapted, BNB, use_rslora=True),
    "dropout in eval": partial(adapted, BNB, lora_dropout=0.3, training=False),
    "PEFT over flat scales": partial(adapted, BNB, flat=True),
    "flat scales": partial(bare, BNB, storage="flat"),
    "LoRALinear": partial(own, LoRALinear),
    "LoRALinear, bias, dropout in eval": partial(own, LoRALinear, use_bias=True, dropout=0.3, training=False),
    "DoRALinear": partial(own, DoRALinear),
    "FrozenNF4Linear": partial(own, FrozenNF4Linear),
    "FrozenNF4Linear with a bias": partial(own, FrozenNF4Linear, bias=True),
}


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


X = weights(3, 128)


def plan_of(layer):
    record = layer.__dict__.get("_fastfuse")
    return layer._prepared if record is None else record.prepared


def forget(layer) -> None:
    record = layer.__dict__.get("_fastfuse")
    if record is None:
        layer._prepared, layer._unprepared = None, 0
    else:
        record.prepared, record.unprepared = None, 0


def prepared(layer, x=X):
    with torch.no_grad():
        layer(x)
    assert isinstance(plan_of(layer), PreparedLinear)
    return layer


def served(layer, x=X) -> bool:
    """Whether the plan, asked itself, takes the call."""
    return plan_of(layer) is not None and plan_of(layer)(x) is not None


def results(layer, grad=True, x=X):
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


def twice_the_adapter(up):
    for held in (up.lora_A, up.lora_B, up.lora_dropout, up.scaling):
        held.update({"other": copy.deepcopy(held["default"])})
    up.lora_A["other"].weight.data.mul_(2)


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
# what is done to an adapted layer, so that no call of it is fused: the code, and what does it
IN_THE_WAY = {
    "a bias on A": ("LORA_BIAS", lambda up: setattr(a_of(up), "bias", P(weights(8)))),
    "a dropout of another kind": ("DROPOUT", lambda up: up.lora_dropout.update({"default": nn.AlphaDropout(0.5)})),
    "a subclass as A": ("CHILD_TYPE", lambda up: setattr(a_of(up), "__class__", Another)),
    "a hook on B": ("HOOKED", lambda up: HOOKS["forward hook"](b_of(up))),
}
