"""lora_linear: the same over an unquantized weight, whose gradient is there where it is asked for."""

import torch
from torch import Tensor

from cases import Call, Op
from cases.linear import BF16, F16, F32, KERNELS, ROUTES, Layer, call, linear
from cases.weights import quantize, random_weight
from fastfuse.ops import Projection, lora_linear


def make(device, *, layer, lead=(3, 7), **options) -> Call:
    return call(device, _run, lambda x, layers, dropouts: linear(x, *layers, *dropouts), [(layer, 64)], lead=lead, storage="dense", **options)


def _run(x: Tensor, layers: list[Projection], **more) -> Tensor:
    w, a, b, scaling, bias, magnitude, norms = layers[0]
    return lora_linear(x, w, a, b, scaling, bias=bias, magnitude=magnitude, norms=norms, **more)


DORA, PLAIN = Layer(96, bias=True, magnitude=True), Layer(96, bias=True)
KINDS = {"fp32": (DORA, F32), "fp16 under fp32 adapters": (Layer(96, bias=True, magnitude=True, low=F32), F16), "bf16": (DORA, BF16)}
CASES = {f"{name}, dropout of {p}": {"layer": layer, "dtype": dtype, "p": p} for name, (layer, dtype) in KINDS.items() for p in (0.0, 0.3)}
CASES |= {
    "plain": {"layer": PLAIN, "lead": (5,)},
    "norms that were kept": {"layer": Layer(40, magnitude=True, norms=True), "lead": (5,)},
    "plain with dropout": {"layer": PLAIN, "lead": (2, 3), "p": 0.5},
    "no tokens": {"layer": DORA, "lead": (0,)},
}
X, W, A, B = torch.randn(2, 64), torch.randn(64, 64), torch.randn(8, 64), torch.randn(64, 8)
OPS = [
    Op(
        "lora_linear", make, CASES, ("plain", "norms that were kept", "plain with dropout"), ("no tokens",), {name: ROUTES[name] for name in ("reference", "dense", "torch")},
        KERNELS,
        backwards={"lora_grad_kernel": {"x", "a0", "b0"}},
        autocast=("x", "weight0", "a0", "b0", "bias0"),
        dynamic=({"x": (0,)}, [{"layer": PLAIN, "lead": (M,)} for M in (5, 9, 33)]),
        second_gradients=(12, 128),
        in_float64=False,
        refusals=[
            (lambda: lora_linear(X, quantize(random_weight(64, 64), "nested"), A, B, 1.0), TypeError, "weight is a Params4bit"),
            (lambda: lora_linear(X, W.half(), A, B, 1.0), ValueError, "x is torch.float32, weight torch.float16"),
        ],
    )
]  # fmt: skip
