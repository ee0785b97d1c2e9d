"""nf4_swiglu_mlp: adapters on all three layers or on some, dropout with a mask each, biases."""

import torch
from torch import Tensor
from torch.nn import functional as F

from cases import Call, Op
from cases import linear as linears
from cases.linear import ADAPTERS, BF16, F16, F32, KERNELS, ROUTES, Layer, call
from fastfuse import Unsupported
from fastfuse.ops import Projection, nf4_swiglu_mlp


def make(device, *, ranks=(8, 8, 8), bias=False, K=64, H=128, lead=(17,), **options) -> Call:
    """ranks: of gate, up and down, 0 without an adapter. lead: of 3 tokens, x A^T would be 24 numbers, whose rounding would decide everything."""
    layers = [(Layer(N, R, bias), taken) for R, N, taken in zip(ranks, (H, H, K), (K, K, H), strict=True)]
    return call(device, _run, _formula, layers, lead=lead, **options)


def _run(x: Tensor, layers: list[Projection], **more) -> Tensor:
    return nf4_swiglu_mlp(x, *layers, **more)


def _formula(x: Tensor, layers: list[Projection], dropouts: list) -> Tensor:
    gate, up, down = zip(layers, dropouts, strict=True)
    return linears.linear(F.silu(linears.linear(x, *gate)) * linears.linear(x, *up), *down)


# Each is run on the reference and by kernels or densely, in turn. 17 tokens are too many for the skinny kernel: its tile then serves the other one.
CASES = {
    f"{name}, {kind}": given | {"dtype": dtype}
    for name, given in {
        "gate and down": {"ranks": (8, 0, 16), "bias": True, "lead": (6,)},
        "dropout": {"ranks": (8, 0, 16), "bias": True, "lead": (6,), "p": 0.25},
    }.items()
    for kind, dtype in (("fp32", F32), ("fp16", F16), ("bf16", BF16))
}
SOME = {"no adapter": (0, 0, 0), "gate": (8, 0, 0), "up": (0, 8, 0), "down": (0, 0, 8), "gate and up": (8, 8, 0), "up and down": (0, 8, 8)}
CASES |= {name: {"ranks": ranks} for name, ranks in SOME.items()} | {
    "torchao": {"storage": "torchao", "H": 64},
    "no tokens": {"lead": (2, 0), "H": 96},
    "all": {"lead": (2, 3)},
    "all, with dropout": {"lead": (7,), "p": 0.3, "storage": "flat"},
}
WIDE, NARROW = (linears.layer(N, 64) for N in (64, 32))
OPS = [
    Op(
        "nf4_swiglu_mlp", make, CASES, ("all", "all, with dropout"), ("torchao", "up", "no tokens"), {name: ROUTES[name] for name in ("reference", "skinny", "dense", "torch")},
        KERNELS | {"swiglu_fwd_kernel", "swiglu_bwd_kernel"},
        backwards={"lora_grad_kernel": {"x", *ADAPTERS}},
        autocast=("x", *ADAPTERS),
        dynamic=({"x": (0,)}, [{"lead": (M,)} for M in (5, 9, 33)]),
        second_gradients=(12, 128),
        in_float64=False,
        refusals=[
            (lambda: nf4_swiglu_mlp(torch.randn(2, 64), WIDE, NARROW, WIDE), ValueError, r"gate, up and down are \(64, 64\), \(32, 64\), \(64, 64\)"),
            (lambda: nf4_swiglu_mlp(torch.randn(2, 64), linears.layer(64, 64, magnitude=True), WIDE, WIDE), Unsupported, "DoRA is covered by nf4_lora_linears"),
        ],
    )
]  # fmt: skip
