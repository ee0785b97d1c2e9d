"""What the cases of the linear ops share: layers over NF4 or dense weights, their tensors by name, and the formula as PEFT writes it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from cases import Call, Tensors, route
from cases.weights import quantize, random_weight, to_nf4
from fastfuse import tune
from fastfuse.ops import Projection, lora_row_norms_ref, nf4_dequantize_ref
from fastfuse.ops.low_rank import keep_mask
from fastfuse.quant import NF4View

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SEED = 3  # of what draws the seeds of dropout
GRAD = tune.Tile({"BLOCK_M": 32, "BLOCK_C": 64, "BLOCK_R": 16, "PROGRAMS": 6})
SQUARE = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}
KERNELS = {
    f"{name}_kernel" for name in ("nf4_linear_fwd", "nf4_skinny", "nf4_skinny_reduce", "nf4_linear_dx", "nf4_dequantize", "lora_down", "lora_up", "lora_grad")
}


def through(forward: dict | None, dx: dict | None) -> Callable:
    """A route by kernels with these tiles; None: the library's product over a decoded weight."""
    tiles = {"nf4_linear": forward, "nf4_linear_dx": dx}
    return partial(route, "triton", {op: None if tile is None else tune.Tile(tile) for op, tile in tiles.items()} | {"lora_grad": GRAD})


ROUTES = {
    "reference": partial(route, "auto"),
    "row-major": through({**SQUARE, "TRANSPOSED": False}, {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}),
    "transposed": through({**SQUARE, "TRANSPOSED": True}, SQUARE),
    "skinny": through({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 3}, SQUARE),
    "dense": through(None, None),
    "torch": partial(route, "torch"),
}


@dataclass(frozen=True)
class Layer:
    """R: 0 without an adapter. low: the adapter's dtype, or A's and B's; x's where None. norms: given, else computed from the magnitude's layer."""

    N: int
    R: int = 8
    bias: bool = False
    magnitude: bool = False
    norms: bool = False
    low: torch.dtype | tuple | None = None

    def tensors(self, i: int, K: int, dtype: torch.dtype, device: str) -> Tensors:
        def leaf(there, *shape, dtype=dtype):
            return torch.randn(shape, dtype=dtype, device=device).requires_grad_() if there else None

        a, b = self.low if isinstance(self.low, tuple) else (self.low or dtype,) * 2
        lengths = torch.rand(2, self.N, device=device) + 0.5
        found = leaf(self.R, self.R, K, dtype=a), leaf(self.R, self.N, self.R, dtype=b), leaf(self.bias, self.N)
        found += lengths[0].requires_grad_() if self.magnitude else None, lengths[1] if self.norms else None
        return {name + str(i): t for name, t in zip(NAMES, found, strict=True)}


NAMES = "a", "b", "bias", "magnitude", "norms"
ADAPTERS = {name + str(i) for name in "ab" for i in range(3)}


def projection(i: int, tensors: Tensors, weight, scaling: float = 1.5) -> Projection:
    a, b, *rest = (tensors[name + str(i)] for name in NAMES)
    return Projection(weight, a, b, scaling, *rest)


@cache
def weight(i: int, N: int, K: int, storage: str = "nested", dtype: torch.dtype = F32, block: int = 64, device: str = "cpu") -> NF4View:
    """Always the same numbers, so that a compiled call serves others. storage "by 200": torchao's, 200 blocks sharing a factor."""
    with torch.random.fork_rng():
        torch.manual_seed(i)
        w = random_weight(N, K, dtype, device)
    return NF4View.of(to_nf4(w, block, int(storage[3:])) if storage.startswith("by ") else quantize(w, storage, block))


def layer(N: int, K: int, R: int = 8, *, storage="nested", dtype=F32, device="cpu", **options) -> Projection:
    """A projection by itself; options: Layer's."""
    return projection(0, Layer(N, R, **options).tensors(0, K, dtype, device), weight(0, N, K, storage, dtype, 64, device))


def leaves(*projections: Projection) -> list[Tensor]:
    return [t for p in projections for t in (p.lora_a, p.lora_b, p.bias, p.magnitude) if t is not None]


def call(
    device: str, run: Callable, formula: Callable, layers: Sequence[tuple[Layer, int]], *,
    lead=(5,), storage="nested", dtype=F32, block=64, p=0.0, layout="plain", scaling=1.5,
) -> Call:  # fmt: skip
    """run: (x, projections, dropout_p=, training=, and so on) -> results; formula: (x, projections, dropouts of what goes into each A).
    layers: with the features that each takes. storage: weight's, or dense, the weights being leaves. layout: of x."""
    tensors, weights = {"x": activations((*lead, layers[0][1]), dtype, layout, device).requires_grad_()}, []
    for i, (made, K) in enumerate(layers):
        tensors |= made.tensors(i, K, dtype, device)
        if storage == "dense":
            tensors[f"weight{i}"] = random_weight(made.N, K, dtype, device).requires_grad_()
        weights.append(None if storage == "dense" else weight(i, made.N, K, storage, dtype, block, device))

    def projections(tensors: Tensors) -> list[Projection]:
        return [projection(i, tensors, tensors[f"weight{i}"] if w is None else beside(w, tensors["x"]), scaling) for i, w in enumerate(weights)]

    def by_op(tensors: Tensors, **more):
        if p:
            torch.manual_seed(SEED)
        return run(tensors["x"], projections(tensors), dropout_p=p, training=True, **more)

    return Call(by_op, lambda tensors: formula(tensors["x"], projections(tensors), [partial(dropped, len(layers), i, p) for i in range(len(layers))]), tensors)


def activations(shape: Sequence[int], dtype: torch.dtype, layout: str, device: str) -> Tensor:
    if layout == "every second":
        return torch.randn(*shape, 2, device=device).to(dtype)[..., 0]
    if layout == "rows apart":
        return torch.randn(*shape[:-1], shape[-1] + 8, device=device).to(dtype)[..., : shape[-1]]
    if layout == "expanded":
        return torch.randn(shape[-1], device=device).to(dtype).expand(shape)
    if layout == "turned":
        return torch.randn(shape[1], shape[0], *shape[2:], device=device).to(dtype).transpose(0, 1)
    return torch.randn(shape, device=device).to(dtype)


def beside(view: NF4View, x: Tensor) -> NF4View:
    """The weight where x is: on meta, or without memory."""
    if x.device == view.device and not isinstance(x, FakeTensor):
        return view
    change = x.fake_mode.from_tensor if isinstance(x, FakeTensor) else partial(Tensor.to, device=x.device)
    return replace(view, packed=change(view.packed), code=change(view.code), scales=tuple(map(change, view.scales)))


@cache
def mask(n: int, i: int, p: float, M: int, K: int, device: torch.device) -> Tensor:
    """Of what an op drops after manual_seed(SEED) on the way into the i-th of n adapters."""
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        return keep_mask(torch.randint(2**62, (n,), device=device)[i], p, M, K)


def dropped(n: int, i: int, p: float, x: Tensor) -> Tensor:
    return x * mask(n, i, p, x.numel() // x.shape[-1], x.shape[-1], x.device).view(x.shape) / (1 - p) if 0 < p < 1 else x * (1 - p)


decoded = cache(nf4_dequantize_ref)


def linear(x: Tensor, p: Projection, dropout: Callable[[Tensor], Tensor]) -> Tensor:
    """One projection in eager PyTorch, base, update and magnitude each in its own rounding."""
    w = p.weight if isinstance(p.weight, Tensor) else decoded(p.weight, x.dtype)
    bias = p.bias if p.bias is None else p.bias.to(x.dtype)
    y = F.linear(x, w, bias if p.magnitude is None else None)
    if p.lora_a is not None:
        low = torch.promote_types(torch.promote_types(x.dtype, p.lora_a.dtype), p.lora_b.dtype)
        y = (y + F.linear(F.linear(dropout(x).to(low), p.lora_a.to(low)), p.lora_b.to(low)) * p.scaling).to(x.dtype)
    if p.magnitude is None:
        return y
    norms = lora_row_norms_ref(w.detach(), p.lora_a.detach(), p.lora_b.detach(), p.scaling) if p.norms is None else p.norms
    y = y * (p.magnitude / norms)
    return (y if bias is None else y + bias).to(x.dtype)
