"""nf4_linear, nf4_lora_linear and nf4_lora_linears: every storage, dtype and shape of tiles, adapters, dropout, magnitudes, groups."""

from functools import partial

import torch
from torch import Tensor, nn

from cases import Call, Op, Refusal
from cases.linear import ADAPTERS, BF16, F16, F32, KERNELS, ROUTES, Layer, call, layer, linear, weight
from fastfuse import Unsupported
from fastfuse.ops import Projection, lora_row_norms, nf4_linear, nf4_lora_linear, nf4_lora_linears


def make(device, *, layers, K=128, **options) -> Call:
    return call(device, _run, _formula, [(layer, K) for layer in layers], **options)


def _run(x: Tensor, layers: list[Projection], backend=None, **dropout) -> tuple[Tensor, ...]:
    if len(layers) > 1:
        return tuple(nf4_lora_linears(x, layers, backend=backend, **dropout))
    w, a, b, scaling, bias, magnitude, norms = layers[0]
    if a is None:
        return (nf4_linear(x, w, bias, backend=backend),)
    return (nf4_lora_linear(x, w, a, b, scaling, bias=bias, magnitude=magnitude, norms=norms, backend=backend, **dropout),)


def _formula(x: Tensor, layers: list[Projection], dropouts: list) -> tuple[Tensor, ...]:
    return tuple(map(linear, [x] * len(layers), layers, dropouts))


def one(M, N, K, R=8, storage="nested", dtype=F32, low=None, bias=True, **options) -> dict:
    """A layer alone. M: the number of tokens, or x's leading dims."""
    return {"layers": (Layer(N, R, bias, low=low),), "lead": M if isinstance(M, tuple) else (M,), "K": K, "storage": storage, "dtype": dtype, **options}


# Each is run on the reference and on one of the four routes by kernels, in their order: of four in a row the first is row-major, the last dense.
CASES = {
    "whole tiles": one(17, 128, 128, 8, "flat"),
    "leading dims": one((2, 3, 4), 128, 128, 8, "nested", F16),
    "fewer steps than splits, R of a tile": one(3, 64, 64, 64, "torchao", BF16),
    "any K": one(40, 96, 100, 8, "flat", BF16),
    "fp16 under fp32 adapters": one(20, 65, 192, 20, "nested", F16, F32),
    "bf16 under fp32 adapters": one(3, 65, 192, 16, "torchao", BF16, F32),
    "fp32 under bf16 adapters": one(1, 65, 192, 20, "flat", F32, BF16),
    "one row for all": one(33, 48, 256, 8, "torchao", layout="expanded"),
    "rank 1": one(64, 127, 64, 1, "torchao", F32, BF16),
    "many tokens": one(100, 33, 128, 64, "flat", BF16, F32),
    "splits of unequal length": one(16, 100, 320, 8, "nested", F16),
    "a row alone": one((), 64, 64, 20, "nested", F16, F32),
    "the last dX tile cut": one(33, 65, 320, 20, "torchao", BF16, (BF16, F32)),
    "turned leading dims": one((3, 4), 130, 128, 64, "torchao", F16, layout="turned"),
    "wide adapters": one(5, 100, 512, 40, "nested", F16, F32),
    "rows apart": one(17, 100, 192, 16, "nested", F32, BF16, layout="rows apart"),
    "by 200": one(17, 100, 256, 8, "by 200", F16),  # as QLoRA of the vision encoder has it: two groups, the border inside a row
    "by 200, fp32": one(17, 100, 256, 8, "by 200"),
    "by 200, few tokens": one(3, 100, 256, 8, "by 200", BF16),
    "by 200, dense": one(17, 100, 256, 8, "by 200", BF16),
    "blocks across rows under a cut tile": one(5, 66, 192, block=128),
    "several scales a step": one(5, 66, 384, 8, "flat", F16, block=32),
    "blocks of 256 across rows": one(5, 66, 384, 8, "nested", BF16, block=256),
    "blocks across rows, dense": one(5, 66, 384, block=256),
    "several scales a step, row-major": one(17, 64, 384, 8, "flat", F16, block=32),
    "blocks of 128": one(5, 66, 384, block=128),
    "every second feature": one(7, 64, 128, 8, "torchao", layout="every second"),
    "one token": one(1, 64, 64, 20, "flat", F16),
}
QKV = Layer(130, 20), Layer(64, 0, bias=True), Layer(32, 8, magnitude=True)  # other widths and ranks; an adapter, a bias, a magnitude on some alone
ON_EVERY_ROUTE = {
    "no adapter": one(9, 64, 128, 0),
    "neither adapter nor bias": one((5, 1), 100, 512, 0, bias=False),
    "dropout": one(33, 68, 192, 20, p=0.1),
    "dropout of few tokens under fp32 adapters": one((3, 1), 68, 192, 20, low=F32, p=0.5),
    "all is dropped": one(3, 64, 64, p=1.0),
    "magnitude": {"layers": (Layer(100, bias=True, magnitude=True),), "lead": (9,)},
    "magnitude without bias": {"layers": (Layer(100, magnitude=True),), "lead": (9,)},
    "group": {"layers": QKV},
    "group with dropout": {"layers": (Layer(64, 4), Layer(96, 8)), "lead": (12,), "K": 64, "p": 0.4},
    "no tokens": {"layers": (Layer(64, magnitude=True, bias=True), Layer(32)), "lead": (2, 0), "K": 64, "p": 0.5},
}
KINDS = {"fp32": (F32, "flat"), "fp16": (F16, "by 2"), "bf16": (BF16, "nested"), "torchao": (F32, "by 4")}
CASES |= {f"{name}, {kind}": given | {"dtype": dtype, "storage": storage} for name, given in ON_EVERY_ROUTE.items() for kind, (dtype, storage) in KINDS.items()}
CASES |= {
    "q, k and v": {"layers": (Layer(65, 4), Layer(48, 0, bias=True), Layer(32, 8, magnitude=True, norms=True)), "lead": (2, 3), "K": 64},
    "two with dropout": {"layers": (Layer(64, 4, bias=True), Layer(33, 8)), "lead": (7,), "K": 64, "p": 0.3, "storage": "flat"},
    "an adapter": one((2, 3), 65, 128),
}


def _refusals() -> list[Refusal]:
    x, ones, (q, k, wide, ao) = torch.randn(2, 64), torch.ones, (layer(N, K) for N, K in ((64, 64), (32, 64), (64, 128), (256, 64)))
    ao, by_32 = (ao._replace(weight=weight(0, 256, 64, storage)) for storage in ("torchao", "by 32"))
    of_one = {  # an argument in the place of one of q's
        (ValueError, r"nf4_lora_linear: x has shape \(2, 63\), weight takes 64 features"): {"x": ones(2, 63)},
        (ValueError, r"lora_a has shape \(4, 65\), expected \(R, 64\)"): {"lora_a": ones(4, 65)},
        (ValueError, r"lora_a has shape \(0, 64\), expected \(R, 64\) with R >= 1"): {"lora_a": ones(0, 64), "lora_b": ones(64, 0)},
        (ValueError, r"lora_b has shape \(64, 5\), expected \(64, 8\)"): {"lora_b": ones(64, 5)},
        (ValueError, r"bias has shape \(95,\), expected \(64,\)"): {"bias": ones(95)},
        (ValueError, r"magnitude has shape \(3,\), expected \(64,\)"): {"magnitude": ones(3)},
        (ValueError, "norms is given, magnitude is None"): {"norms": ones(64)},
        (ValueError, "dropout_p is 1.5, expected a number from 0 to 1"): {"dropout_p": 1.5, "training": True},
        (ValueError, "x is on meta, lora_a on cpu"): {"x": x.to("meta")},
        (ValueError, "nf4_lora_linear: backend is 'cuda', not one of auto, triton, torch"): {"backend": "cuda"},
        (Unsupported, "x is torch.float64, covered are bf16, fp16 and fp32"): {"x": x.double()},
        (Unsupported, "lora_a is torch.float64"): {"lora_a": ones(8, 64).double()},
        (Unsupported, "x has layout torch.sparse_coo"): {"x": x.to_sparse()},
        (Unsupported, "bias has layout torch.sparse_coo"): {"bias": ones(64).to_sparse()},
        (TypeError, "x is a list"): {"x": [1.0]},
        (TypeError, "nf4_lora_linear: bias is a list"): {"bias": [1.0]},
        (TypeError, "lora_a is a NoneType"): {"lora_a": None},
        (TypeError, "scaling is a Tensor, not a number"): {"scaling": ones(1)},
        (TypeError, "neither NF4View, Params4bit nor NF4Tensor"): {"weight": nn.Linear(64, 64).weight},
    }
    given = {"x": x, **dict(zip(Projection._fields[:4], q[:4], strict=True))}
    of_group = {
        (ValueError, "projections is empty"): [],
        (ValueError, "the weights take 64 and 128 features: a group shares one x"): [q, wide],
        (ValueError, r"one weight is bitsandbytes nested.* another torchao.*: a group is stored alike"): [q, ao],
        (ValueError, r"scales by 256\), .* \(scales by 32\)"): [ao, by_32],
        (ValueError, "lora_b is None while the other is given"): [k, (q.weight, q.lora_a)],
        (ValueError, r"lora_b has shape \(64, 8\), expected \(32, 8\)"): [q, (k.weight, k.lora_a, q.lora_b, 1.0)],
        (TypeError, "projections is a Projection, not a list"): q,
        (TypeError, r"a projection is a Tensor, not a tuple of weight, lora_a"): [x],
    }
    of_norms = {
        (ValueError, r"lora_row_norms: lora_b has shape \(32, 8\), expected \(64, 8\)"): (*q[:2], k.lora_b, 1.0),
        (ValueError, r"lora_a has shape \(8, 128\), expected \(R, 64\)"): (q.weight, wide.lora_a, q.lora_b, 1.0),
        (ValueError, "weight is on cpu, lora_a on meta"): (q.weight, q.lora_a.to("meta"), q.lora_b, 1.0),
        (Unsupported, "dtype is torch.int32, covered are"): (*q[:4], torch.int32),
    }
    return [
        *((partial(nf4_lora_linear, **given | wrong), *raised) for raised, wrong in of_one.items()),
        *((partial(nf4_lora_linears, x, group), *raised) for raised, group in of_group.items()),
        *((partial(lora_row_norms, *args), *raised) for raised, args in of_norms.items()),
        (lambda: nf4_linear(x.to("meta"), q.weight), ValueError, "x is on meta, weight on cpu"),
        (lambda: torch.func.grad(lambda x: nf4_linear(x, q.weight).sum())(x), Unsupported, r"torch.func transforms \(grad, vmap, ...\) are not covered"),
    ]


OPS = [
    Op(
        "nf4_linear", make, CASES, ("q, k and v", "two with dropout", "an adapter"), ("turned leading dims", "one row for all", "fp16 under fp32 adapters", "no tokens, fp32"),
        ROUTES, KERNELS,
        backwards={"lora_grad_kernel": {"x", *ADAPTERS}},
        autocast=("x", *ADAPTERS, "bias0", "bias1"),
        dynamic=({"x": (0,)}, [CASES["q, k and v"] | {"lead": (M,)} for M in (5, 9, 33)]),
        second_gradients=(12, 128),
        in_float64=False,
        refusals=_refusals(),
    )
]  # fmt: skip
