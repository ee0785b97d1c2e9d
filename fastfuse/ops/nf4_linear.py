"""Linear layers with a LoRA delta over NF4 weights or dense ones, one or several that share x, forward and backward."""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import Operand
from fastfuse.ops import _nf4_cpu
from fastfuse.ops._op import HAS_TRITON, Cost, fused_op, kernel_dtype, nbytes, route, rows
from fastfuse.ops._scratch import scratch
from fastfuse.ops.lora_row_norms import lora_row_norms, lora_row_norms_ref
from fastfuse.ops.low_rank import drop, lora_down, lora_grad, lora_up, scaled_product, threshold
from fastfuse.ops.nf4_dequantize import DTYPES, decode_branch, dequantize_into, kernel_weight, nf4_dequantize_ref
from fastfuse.quant.nf4 import NF4View, is_dense, is_torchao

if HAS_TRITON:
    from fastfuse.kernels.nf4_linear import nf4_linear_dx_kernel, nf4_linear_fwd_kernel, nf4_skinny_kernel, nf4_skinny_reduce_kernel


class Projection(NamedTuple):
    """One linear layer of a group. A plain tuple of its first entries serves as well.

    weight: [N, K] as NF4View.of takes it. lora_a (R, K), lora_b (N, R): the adapter, or neither. bias: (N,). magnitude: (N,), DoRA's.
    norms: (N,), lora_row_norms of the four, where the caller has them; computed where None.
    """

    weight: object
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    norms: Tensor | None = None


def nf4_linear(x: Tensor, weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x W^T + bias, W in NF4.

    x: (..., K), weight: [N, K] as NF4View.of takes it, bias: (N,)  ->  (..., N) in x's dtype; gradients for x and bias.
    x may be bf16, fp16 or fp32 with any strides; a last dim that is not contiguous is copied. Under autocast x follows
    its dtype. backend: as fastfuse.backend, for this call.
    Raises TypeError or ValueError naming both facts where arguments disagree, Unsupported for a dtype, a chip or a
    transform (forward-mode differentiation) that no kernel covers.
    """
    return _public("nf4_linear", x, [Projection(NF4View.of(weight), bias=bias)], 0.0, False, backend)[0]


def nf4_lora_linear(
    x: Tensor,
    weight,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norms: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = x W^T + scaling * (dropout(x) A^T) B^T + bias, W in NF4 (QLoRA, https://arxiv.org/abs/2305.14314).

    x: (..., K), weight: [N, K], lora_a: A (R, K), lora_b: B (N, R), bias: (N,)  ->  (..., N) in x's dtype;
    gradients for x, A, B, bias and magnitude. A and B may have another dtype than x (PEFT keeps them in fp32): the low-rank
    path then runs in the widest of the three. scaling is a number, not a tensor: alpha / R, or alpha / sqrt(R) for rsLoRA.
    magnitude: (N,), DoRA's (https://arxiv.org/abs/2402.09353): all but the bias is multiplied by magnitude / ||W + scaling B A||
    per output feature; no gradient flows through the norm. norms: lora_row_norms of the same, where the caller has kept them.
    dropout_p: in training, the probability of zeroing an element of x on its way into A. The mask is drawn from PyTorch's generator
    of x's device through one seed and never stored: the backward draws it again. Otherwise as nf4_linear.
    """
    _check_adapter("nf4_lora_linear", lora_a, lora_b)
    projection = Projection(NF4View.of(weight), lora_a, lora_b, scaling, bias, magnitude, norms)
    return _public("nf4_lora_linear", x, [projection], dropout_p, training, backend)[0]


def nf4_lora_linears(
    x: Tensor, projections: Sequence[Projection | tuple], *, dropout_p: float = 0.0, training: bool = False, backend: str | None = None
) -> list[Tensor]:
    """nf4_lora_linear of one x by several weights (q, k and v; gate and up) in one launch: a result for each.

    projections: Projection, or tuples (weight, lora_a, lora_b, scaling, bias, magnitude); all but the weight may be left out, also
    of some alone. N and R may differ, K and the storage (library, block sizes, dtype) may not. Each has a dropout mask of its own.
    Raises as nf4_lora_linear, and ValueError where the group is empty or its weights cannot share a launch.
    """
    if not isinstance(projections, (list, tuple)) or isinstance(projections, Projection):
        raise TypeError(f"nf4_lora_linears: projections is a {type(projections).__name__}, not a list of them")
    if not projections:
        raise ValueError("nf4_lora_linears: projections is empty, expected at least one")
    op = "nf4_lora_linears"
    return _public(op, x, [projection_of(op, p) for p in projections], dropout_p, training, backend)


def projection_of(op: str, given) -> Projection:
    """Projection of what a caller may hand over, its weight as a view."""
    if not isinstance(given, tuple) or not 1 <= len(given) <= len(Projection._fields):
        raise TypeError(f"{op}: a projection is a {type(given).__name__}, not a tuple of {' , '.join(Projection._fields[:4])} and so on".replace(" ,", ","))
    p = Projection(*given)
    return p._replace(weight=NF4View.of(p.weight))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    *,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norms: Tensor | None = None,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """nf4_lora_linear over an unquantized weight [N, K] of x's dtype, which may be trained too (LoRA, https://arxiv.org/abs/2106.09685)."""
    _check_adapter("lora_linear", lora_a, lora_b)
    if not is_dense(weight) or weight.dim() != 2:
        raise TypeError(f"lora_linear: weight is a {type(weight).__name__} of shape {tuple(getattr(weight, 'shape', ()))}, expected a dense tensor [N, K]")
    projection = Projection(weight, lora_a, lora_b, scaling, bias, magnitude, norms)
    return _public("lora_linear", x, [projection], dropout_p, training, backend)[0]


def _check_adapter(op: str, lora_a, lora_b) -> None:
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")


def _public(op: str, x, projections: list[Projection], dropout_p: float, training: bool, backend: str | None) -> list[Tensor]:
    if not training:
        dropout_p = 0.0  # torch.compile makes a symbol of the argument, and starts over, as soon as anything reads it
    x, projections, seeds, chosen = prepare(op, x, projections, dropout_p, backend)
    if chosen == "reference":
        return [
            nf4_linear_ref(
                x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.magnitude, p.norms, None if seeds is None or p.lora_a is None else seeds[i], dropout_p
            )
            for i, p in enumerate(projections)
        ]
    group = Group.of(op, x, projections, seeds, dropout_p)
    raw = torch.is_grad_enabled() and any(f.requires_grad for f in group.factor)
    return _nf4_linear(x, *group.args(), raw, chosen == "interpreter")[: len(projections)]


def prepare(op: str, x, projections: list[Projection], dropout_p: float, backend: str | None):
    """(x, projections, seeds, route): checked, in autocast's dtype, with the norms that a magnitude needs."""
    K = [p.weight.shape[1] for p in projections]
    if len(set(K)) > 1:
        raise ValueError(f"{op}: the weights take {' and '.join(map(str, K))} features: a group shares one x")
    for p in projections:
        _check(op, x, p)
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p!r}, expected a number from 0 to 1")
    given = projections
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, projections = x.to(dtype), [_cast(p, dtype) for p in projections]
    for p in projections:
        if isinstance(p.weight, Tensor) and p.weight.dtype != x.dtype:
            raise ValueError(f"{op}: x is {x.dtype}, weight {p.weight.dtype}: they must be the same")
    chosen = route(op, x, backend)
    projections = [
        p._replace(norms=lora_row_norms(p.weight, own.lora_a, own.lora_b, p.scaling, x.dtype, backend=backend))  # of the adapter as it is kept
        if p.magnitude is not None and p.norms is None
        else p
        for p, own in zip(projections, given, strict=True)
    ]
    drops = dropout_p > 0 and any(p.lora_a is not None for p in projections)
    seeds = torch.randint(2**62, (len(projections),), device=x.device) if drops else None
    return x, projections, seeds, chosen


def _cast(p: Projection, dtype: torch.dtype) -> Projection:
    a, b, bias = (t if t is None else t.to(dtype) for t in (p.lora_a, p.lora_b, p.bias))
    return p._replace(weight=p.weight.to(dtype) if isinstance(p.weight, Tensor) else p.weight, lora_a=a, lora_b=b, bias=bias)


def _check(op: str, x: Tensor, p: Projection) -> None:
    # Messages are built only where they are raised: formatting a symbolic size would break torch.compile's graph.
    vectors = (("bias", p.bias), ("magnitude", p.magnitude), ("norms", p.norms))
    for name, t in (("x", x), ("lora_a", p.lora_a), ("lora_b", p.lora_b), *vectors):
        if not isinstance(t, Tensor) and (t is not None or name == "x"):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
    if not isinstance(p.scaling, (int, float)):
        raise TypeError(f"{op}: scaling is a {type(p.scaling).__name__}, not a number")
    for name, t in (("x", x), ("lora_a", p.lora_a), ("lora_b", p.lora_b), *vectors):
        if t is not None and (t.layout != torch.strided or t.is_nested or is_torchao(t)):
            kind = type(t).__name__ if t.layout == torch.strided else t.layout
            raise Unsupported(f"{op}: {name} has layout {kind}, torch.strided is covered")
    N, K = p.weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, weight takes {K} features (N, K = {N}, {K})")
    if (p.lora_a is None) != (p.lora_b is None):
        raise ValueError(f"{op}: lora_{'a' if p.lora_a is None else 'b'} is None while the other is given: an adapter has both")
    if p.lora_a is not None:
        if p.lora_a.dim() != 2 or p.lora_a.shape[1] != K or p.lora_a.shape[0] == 0:
            raise ValueError(f"{op}: lora_a has shape {tuple(p.lora_a.shape)}, expected (R, {K}) with R >= 1")
        if p.lora_b.shape != (N, p.lora_a.shape[0]):
            raise ValueError(f"{op}: lora_b has shape {tuple(p.lora_b.shape)}, expected ({N}, {p.lora_a.shape[0]})")
    for name, t in vectors:
        if t is not None and t.shape != (N,):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected ({N},)")
    if p.norms is not None and p.magnitude is None:
        raise ValueError(f"{op}: norms is given, magnitude is None: norms only serve a magnitude")
    for name, t in (("x", x), ("lora_a", p.lora_a), ("lora_b", p.lora_b), *vectors):
        if t is not None and t.dtype not in DTYPES:
            raise Unsupported(f"{op}: {name} is {t.dtype}, covered are bf16, fp16 and fp32")
    for name, t in (("weight", p.weight), ("lora_a", p.lora_a), ("lora_b", p.lora_b), *vectors):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, {name} on {t.device}")


def nf4_linear_ref(
    x: Tensor,
    weight: NF4View | Tensor,
    lora_a: Tensor | None = None,
    lora_b: Tensor | None = None,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    magnitude: Tensor | None = None,
    norms: Tensor | None = None,
    seed: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The formula, eager: the product rounds to x's dtype, and so does the sum with the update. seed: of the dropout mask, none where None."""
    w = weight if isinstance(weight, Tensor) else nf4_dequantize_ref(weight, x.dtype)
    bias = None if bias is None else bias.to(x.dtype)
    y = F.linear(x, w, bias if magnitude is None else None)
    if lora_a is not None:
        dtype = torch.promote_types(torch.promote_types(x.dtype, lora_a.dtype), lora_b.dtype)
        xa = low_rank(x, [lora_a], dtype, None if seed is None else seed.view(1), dropout_p)
        y = _add_delta(y, xa, lora_b, scaling * _rescale(dropout_p, seed))
    if magnitude is None:
        return y
    norms = lora_row_norms_ref(w.detach(), lora_a, lora_b, scaling) if norms is None else norms
    return _scale(y, _factor(magnitude, norms), bias)


def _factor(magnitude: Tensor, norms: Tensor) -> Tensor:
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(wide) / norms.detach().to(wide)


def _scale(z: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
    y = z * factor
    return (y if bias is None else y + bias).to(z.dtype)


def _rescale(p: float, seed: Tensor | None) -> float:
    """Dropout's 1 / (1 - p). It goes onto fp32 sums, so that no element of x is rounded again."""
    return 1.0 if seed is None else 1 / (1 - p) if p < 1 else 0.0


def low_rank(x: Tensor, a: Sequence[Tensor], dtype: torch.dtype, seeds: Tensor | None, p: float) -> Tensor:
    """dropout(x) A^T without the division by 1 - p, (..., sum of R), for each A in dtype; (..., 0) without an adapter."""
    if seeds is None:
        return x.new_empty((*x.shape[:-1], 0)) if not a else F.linear(x.to(dtype), torch.cat([t.to(dtype) for t in a]) if len(a) > 1 else a[0].to(dtype))
    x2 = x.reshape(-1, x.shape[-1])
    return torch.cat([drop(x2, seeds[i], p).to(dtype) @ t.to(dtype).T for i, t in enumerate(a)], 1).view(*x.shape[:-1], sum(t.shape[0] for t in a))


def _add_delta(y: Tensor, xa: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return (y + F.linear(xa, lora_b.to(xa.dtype)) * scaling).to(y.dtype)


def nf4_linear_cost(x: Tensor, weight, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0, bias: Tensor | None = None) -> Cost:
    """Forward. The low-rank path counts its own flops and the adapters' bytes; x A^T never leaves the chip."""
    weight = weight if is_dense(weight) else NF4View.of(weight)
    N, K = weight.shape
    M, R = x.numel() // K, 0 if lora_a is None else lora_a.shape[0]
    out = M * N * x.element_size()
    return Cost(nbytes(x, lora_a, lora_b, bias) + weight.nbytes + out, 2 * M * N * K + 2 * M * R * (N + K))


def nf4_linear_bwd_cost(
    x: Tensor, weight, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0, bias: Tensor | None = None
) -> Cost:
    """dX, dA and dB from dY: x, dY, W and the adapters read once, each gradient written once."""
    weight = weight if is_dense(weight) else NF4View.of(weight)
    N, K = weight.shape
    M, R = x.numel() // K, 0 if lora_a is None else lora_a.shape[0]
    return Cost(2 * nbytes(x, lora_a, lora_b, bias) + weight.nbytes + M * N * x.element_size(), 2 * M * N * K + 4 * M * R * (N + K))


@dataclass(frozen=True)
class Group:
    """Projections that share x, as an op's schema takes them: an entry for each in every list, empty lists for what none has.

    scales holds those of the first, then those of the second ...  block_size 0 says that the weights are dense: `packed` then holds
    them, code and scales nothing. rows: N of each. factor: magnitude / norms.
    """

    packed: list[Tensor]
    code: list[Tensor] = field(default_factory=list)
    scales: list[Tensor] = field(default_factory=list)
    block_size: int = 0
    rows: list[int] = field(default_factory=list)
    w_dtype: torch.dtype = torch.float32
    scale_block: int = 256
    a: list[Tensor] = field(default_factory=list)
    b: list[Tensor] = field(default_factory=list)
    scaling: list[float] = field(default_factory=list)
    factor: list[Tensor] = field(default_factory=list)
    bias: list[Tensor] = field(default_factory=list)
    seeds: Tensor | None = None
    dropout_p: float = 0.0

    @staticmethod
    def of(op: str, x: Tensor, projections: list[Projection], seeds: Tensor | None, dropout_p: float) -> "Group":
        """Raises ValueError where the weights are stored differently. What only some have is filled up: ranks of 0, zeros, ones."""
        weights = [p.weight for p in projections]
        N = [w.shape[0] for w in weights]
        parts: dict = {"packed": weights}
        if not isinstance(weights[0], Tensor):
            first = weights[0]
            for w in weights[1:]:
                if (w.layout, w.dtype, w.scale_block) != (first.layout, first.dtype, first.scale_block):
                    one, other = (f"{v.layout} (scales by {v.scale_block}), {v.dtype}" for v in (first, w))
                    raise ValueError(f"{op}: one weight is {one}, another {other}: a group is stored alike")
            parts = {
                "packed": [w.packed for w in weights],
                "code": [w.code for w in weights],
                "scales": [s for w in weights for s in w.scales],
                "block_size": first.block_size,
                "w_dtype": first.dtype,
                "scale_block": first.scale_block,
            }

        def fill(tensors: list, make) -> list[Tensor]:
            if all(t is None for t in tensors):
                return []
            return [make(i) if t is None else t for i, t in enumerate(tensors)]

        return Group(
            **parts,
            rows=N,
            a=fill([p.lora_a for p in projections], lambda i: x.new_empty(0, weights[i].shape[1])),
            b=fill([p.lora_b for p in projections], lambda i: x.new_empty(N[i], 0)),
            scaling=[float(p.scaling) for p in projections],
            factor=fill(
                [None if p.magnitude is None else _factor(p.magnitude, p.norms) for p in projections],
                lambda i: torch.ones(N[i], dtype=torch.float32, device=x.device),
            ),
            bias=fill([p.bias for p in projections], lambda i: x.new_zeros(N[i])),
            seeds=seeds,
            dropout_p=0.0 if seeds is None else float(dropout_p),
        )

    def args(self) -> tuple:
        """The fields in order; Group(*args) undoes it."""
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    def __len__(self) -> int:
        return len(self.packed)

    def pick(self, indices: Sequence[int]) -> "Group":
        """Some of the projections alone."""
        n = len(self.scales) // len(self)
        names = ("packed", "code", "rows", "a", "b", "scaling", "factor", "bias")
        lists = {name: [getattr(self, name)[i] for i in indices] if getattr(self, name) else [] for name in names}
        seeds = None if self.seeds is None else torch.stack([self.seeds[i] for i in indices])
        return replace(self, **lists, scales=[s for i in indices for s in self.scales[i * n : i * n + n]], seeds=seeds)

    def weight(self, i: int, K: int) -> NF4View | Tensor:
        if not self.block_size:
            return self.packed[i]
        n = len(self.scales) // len(self)
        scales = self.scales[i * n : i * n + n]
        return NF4View.from_parts(self.packed[i], self.code[i], scales, self.block_size, (self.rows[i], K), self.w_dtype, self.scale_block)

    def columns(self, i: int) -> slice:
        """Where projection i's x A^T lies among all."""
        ranks = [a.shape[0] for a in self.a]
        return slice(sum(ranks[:i]), sum(ranks[: i + 1]))

    @property
    def rescale(self) -> float:
        return _rescale(self.dropout_p, self.seeds)

    def low_dtype(self, x_dtype: torch.dtype) -> torch.dtype:
        """The widest dtype of x and all adapters."""
        for t in (*self.a, *self.b):
            x_dtype = torch.promote_types(x_dtype, t.dtype)
        return x_dtype

    def seed(self, i: int) -> Tensor | None:
        return None if self.seeds is None else self.seeds[i]

    def kernel_args(self, K: int, x_dtype: torch.dtype, low: torch.dtype, out: list[Tensor], raw: list[Tensor]) -> tuple:
        """The group as kernels/nf4_linear.py describes it."""

        def each(tensors: list, dtype: torch.dtype) -> list:
            return [t.to(dtype).contiguous() for t in tensors] if tensors else [None] * len(self)

        views = [self.weight(i, K) for i in range(len(self))]
        a, b, bias = each(self.a, low), each(self.b, low), each(self.bias, x_dtype)
        factor, raw = each(self.factor, torch.float32), raw or [None] * len(self)
        ranks = [0 if t is None else t.shape[0] for t in a]
        return tuple(
            Operand(kernel_weight(v), a[i], b[i], factor[i], bias[i], out[i], raw[i], self.rows[i], ranks[i], self.scaling[i] * self.rescale)
            for i, v in enumerate(views)
        )


def _linear_reference(x: Tensor, *args) -> list[Tensor]:
    *args, raw, _interpret = args
    group = Group(*args)
    return _finish(group, x, [nf4_linear_ref(x, group.weight(i, x.shape[-1]), bias=_inner_bias(group, i)) for i in range(len(group))], raw)


def _finish(group: Group, x: Tensor, base: list[Tensor], raw: bool) -> list[Tensor]:
    """From each x W^T (with the inner bias) what the op returns, eagerly."""
    xa = low_rank(x, group.a, group.low_dtype(x.dtype), group.seeds, group.dropout_p)
    outs, raws = [], []
    for i, z in enumerate(base):
        bias = group.bias[i].to(x.dtype) if group.bias else None
        if group.a:
            z = _add_delta(z, xa[..., group.columns(i)], group.b[i], group.scaling[i] * group.rescale)
        raws.append(z)
        outs.append(_scale(z, group.factor[i], bias) if group.factor else z)
    return [*outs, xa, *(raws if raw else [])]


def _linear_cpu(x: Tensor, *args) -> list[Tensor]:
    *args, raw, _interpret = args
    group, x2 = Group(*args), rows(x)
    base = []
    for i in range(len(group)):
        weight, bias = group.weight(i, x.shape[-1]), _inner_bias(group, i)
        y = F.linear(x2, weight, bias if bias is None else bias.to(x.dtype)) if isinstance(weight, Tensor) else _nf4_cpu.linear(x2, weight, bias)
        base.append(_shaped(y, x.shape[:-1]))
    return _finish(group, x, base, raw)


def _inner_bias(group: Group, i: int) -> Tensor | None:
    """The bias that the product itself adds: with a factor it comes after that."""
    return group.bias[i] if group.bias and not group.factor else None


@fused_op("nf4_linear", reference=_linear_reference, cpu=_linear_cpu)
def _nf4_linear(
    x: Tensor,
    packed: Sequence[Tensor], code: Sequence[Tensor], scales: Sequence[Tensor],
    block_size: int, rows: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float], factor: Sequence[Tensor], bias: Sequence[Tensor],
    seeds: Tensor | None, dropout_p: float,
    raw: bool, interpret: bool,
) -> list[Tensor]:  # fmt: skip
    """[y of each projection, x A^T of all, and with `raw` each y before factor and bias]: what follows y is kept for the backward."""
    return _launch(x, Group(packed, code, scales, block_size, rows, w_dtype, scale_block, a, b, scaling, factor, bias, seeds, dropout_p), raw)


def _launch(x: Tensor, group: Group, raw: bool) -> list[Tensor]:
    x2, lead = rows(x), x.shape[:-1]
    M, K = x2.shape
    low = group.low_dtype(x.dtype)
    ranks = sum(t.shape[0] for t in group.a)
    tile, decode = _tile(group, "nf4_linear", x, M, K)
    work = kernel_dtype(x.dtype)
    if tile is None or M == 0:
        outs, xa, raws = _dense(x2, group, low, raw)
    else:
        outs = [torch.empty((M, N), dtype=work, device=x.device) for N in group.rows]
        raws = [torch.empty_like(t) for t in outs] if raw else []
        constants = dict(tile.launch())
        splits = min(constants.pop("SPLIT_K", 0), K // tile["BLOCK_K"])
        args = group.kernel_args(K, work, kernel_dtype(low), outs, raws)
        common = {"PROJECTIONS": len(group), "BLOCK_SIZE": group.block_size, "SCALE_BLOCK": group.scale_block, "DECODE": decode}
        tiles = sum(-(-N // tile["BLOCK_N"]) for N in group.rows)
        if splits and M <= tile["BLOCK_M"] and group.seeds is None:
            xa = torch.empty((M, ranks), dtype=kernel_dtype(low), device=x.device)
            columns = sum(group.rows) + ranks
            part = torch.empty((splits, M, columns), dtype=torch.float32, device=x.device)
            tiles_a = sum(-(-t.shape[0] // tile["BLOCK_N"]) for t in group.a)
            x2 = x2.to(work)
            nf4_skinny_kernel[(tiles + tiles_a, splits)](x2, args, part, x2.stride(0), M, K, columns, SPLIT_K=splits, **common, **constants)
            nf4_skinny_reduce_kernel[(tiles,)](
                part, args, xa, ranks, M, columns,
                PROJECTIONS=len(group), SPLIT_K=splits, DECODE=decode, BLOCK_M=tile["BLOCK_M"], BLOCK_N=tile["BLOCK_N"], num_warps=4, **tune.OPTIONS,
            )  # fmt: skip
        else:
            constants.setdefault("TRANSPOSED", False)
            xa = _low_ranks(x2, group, low).to(kernel_dtype(low))
            x2 = x2.to(work)
            grid = (-(-M // tile["BLOCK_M"]) * tiles,)
            nf4_linear_fwd_kernel[grid](x2, args, xa, x2.stride(0), ranks, M, K, **common, **constants)
    return [_shaped(t, lead) for t in (*(t.to(x.dtype) for t in outs), xa.to(low), *(t.to(x.dtype) for t in raws))]


def _shaped(t: Tensor, lead: Sequence[int]) -> Tensor:
    """[M, n] as [*lead, n], not a view: autograd forbids to change one of several views that a function returns in place."""
    return torch.ops.aten._unsafe_view(t, (*lead, t.shape[1]))


def _tile(group: Group, op: str, x: Tensor, M: int, K: int) -> tuple[tune.Tile | None, str]:
    """The launch configuration, None for the library's matrix product over a decoded weight; and how the kernel decodes."""
    if not group.block_size:
        return None, ""
    dtype, decode = "fp32" if x.dtype == torch.float32 else "16-bit", decode_branch(group.weight(0, K), x.dtype)
    R = max((t.shape[0] for t in group.a), default=0)
    tile = tune.pick(op, tune.arch_of(x.device), dtype=dtype, decode=decode, M=M, N=sum(group.rows), K=K, R=R)
    # The forward's loop takes whole steps of K. dX may cut the last tile, if no scale block then reaches from one row into the next.
    cut = op == "nf4_linear_dx" and K % 64 == 0 and K % group.block_size == 0
    return (tile if tile is not None and (cut or K % tile["BLOCK_K"] == 0) else None), decode


def _low_ranks(x: Tensor, group: Group, low: torch.dtype) -> Tensor:
    """x A^T for all projections, [M, sum of R]. One product reads x once; with dropout each has its own x."""
    if not group.a:
        return x.new_empty((x.shape[0], 0))
    if group.seeds is None:
        return lora_down(x, group.a[0].to(low) if len(group) == 1 else torch.cat([t.to(low) for t in group.a]))
    parts = [lora_down(x, t.to(low), group.seed(i), group.dropout_p) for i, t in enumerate(group.a)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


@contextlib.contextmanager
def _decoded(group: Group, i: int, K: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """Projection i's weight [N, K] in dtype, for as long as the block: in the device's scratch, or the dense weight itself."""
    weight = group.weight(i, K)
    if isinstance(weight, Tensor):
        yield weight
        return
    with scratch((group.rows[i], K), kernel_dtype(dtype), weight.device) as w:
        dequantize_into(w, weight, dtype)
        yield w.to(dtype)


def _dense(x: Tensor, group: Group, low: torch.dtype, raw: bool) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Many tokens: each weight is decoded once and the library's GEMM does the rest.

    The delta goes first and the large product accumulates onto it: y is read and written once more, not twice.
    """
    xa = _low_ranks(x, group, low)
    outs, raws = [], []
    for i in range(len(group)):
        bias = group.bias[i].to(x.dtype) if group.bias else None
        inner = None if group.factor else bias  # with a factor the bias comes after it
        with _decoded(group, i, x.shape[1], x.dtype) as w:
            if not group.a or group.a[i].shape[0] == 0:
                z = F.linear(x, w, inner)
            else:
                delta = lora_up(xa[:, group.columns(i)], group.b[i].T, group.scaling[i] * group.rescale, x.dtype)
                z = (delta if inner is None else delta.add_(inner)).addmm_(x, w.T)
        raws.append(z)
        outs.append(_scale(z, group.factor[i], bias) if group.factor else z)
    return outs, xa, raws if raw else []


def _dx_reference(dy: Sequence[Tensor], *args) -> Tensor:
    *args, factor, seeds, dropout_p, dxa, K, _interpret = args
    group = Group(*args, factor=factor, seeds=seeds, dropout_p=dropout_p)

    def product(i: int, dz: Tensor) -> Tensor:
        weight = group.weight(i, K)
        return dz @ (weight if isinstance(weight, Tensor) else nf4_dequantize_ref(weight, dz.dtype))

    return _dx_eager(dy, group, dxa, product)


def _dx_eager(dy: Sequence[Tensor], group: Group, dxa: Tensor | None, product) -> Tensor:
    total = None
    for i, dz in enumerate(dy):
        part = product(i, (dz * group.factor[i]).to(dz.dtype) if group.factor else dz)
        if group.a and group.a[i].shape[0]:
            low = scaled_product(dxa[:, group.columns(i)], group.a[i].to(dxa.dtype), group.rescale)
            part = (part + drop(low, group.seed(i), group.dropout_p)).to(dz.dtype)
        total = part if total is None else total + part
    return total


def _dx_cpu(dy: Sequence[Tensor], *args) -> Tensor:
    *args, factor, seeds, dropout_p, dxa, K, _interpret = args
    group = Group(*args, factor=factor, seeds=seeds, dropout_p=dropout_p)

    def product(i: int, dz: Tensor) -> Tensor:
        weight = group.weight(i, K)
        return dz @ weight if isinstance(weight, Tensor) else _nf4_cpu.linear_dx(dz, weight)

    return _dx_eager(dy, group, dxa, product)


@fused_op("nf4_linear_dx", reference=_dx_reference, cpu=_dx_cpu)
def _nf4_linear_dx(
    dy: Sequence[Tensor],
    packed: Sequence[Tensor], code: Sequence[Tensor], scales: Sequence[Tensor],
    block_size: int, rows: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    a: Sequence[Tensor], factor: Sequence[Tensor], seeds: Tensor | None, dropout_p: float,
    dxa: Tensor | None, K: int, interpret: bool,
) -> Tensor:  # fmt: skip
    """dX = sum over projections of (dY * factor) W + drop(d(x A^T) A), [M, K]. Nothing dequantized outlives the call.

    dy: [M, N] of each, without gaps. dxa: [M, sum of R] where there are adapters.
    """
    group = Group(packed, code, scales, block_size, rows, w_dtype, scale_block, a, factor=factor, seeds=seeds, dropout_p=dropout_p)
    M, dtype = dy[0].shape[0], dy[0].dtype
    tile, decode = _tile(group, "nf4_linear_dx", dy[0], M, K)
    if tile is None or M == 0:
        return _dx_dense(dy, group, dxa, K)
    work, low = kernel_dtype(dtype), dtype if dxa is None else kernel_dtype(dxa.dtype)
    args = replace(group, scaling=[1.0] * len(group)).kernel_args(K, work, low, [t.to(work).contiguous() for t in dy], [])
    dx = torch.empty((M, K), dtype=work, device=dy[0].device)
    grid = (-(-M // tile["BLOCK_M"]) * -(-K // tile["BLOCK_K"]),)
    nf4_linear_dx_kernel[grid](
        args, None if dxa is None else dxa.to(low), seeds, dx, 0 if dxa is None else dxa.shape[1], M, K, group.rescale, threshold(dropout_p),
        PROJECTIONS=len(group), BLOCK_SIZE=block_size, SCALE_BLOCK=scale_block, DECODE=decode, CUT_K=K % tile["BLOCK_K"] != 0, **tile.launch(),
    )  # fmt: skip
    return dx.to(dtype)


def _dx_dense(dy: Sequence[Tensor], group: Group, dxa: Tensor | None, K: int) -> Tensor:
    """As _dense: the low-rank part first, the large product onto it."""
    dx = None
    for i, dz in enumerate(dy):
        if group.factor:
            dz = (dz * group.factor[i]).to(dz.dtype)
        if group.a and group.a[i].shape[0]:
            low = lora_up(dxa[:, group.columns(i)], group.a[i], group.rescale, dz.dtype, group.seed(i), group.dropout_p)
            dx = low if dx is None else dx.add_(low)
        with _decoded(group, i, K, dz.dtype) as w:
            dx = dz @ w if dx is None else dx.addmm_(dz, w)
    return dx


def _of_used(group: Group, x, xa, dy, raws, draws, needs, K: int, interpret: bool, used: list[int]):
    """gradients of the projections whose result took part in the loss: the others' tensors get None, as in eager PyTorch, not zeros."""
    parts = [xa[..., group.columns(i)] for i in used] if xa is not None else None
    sub = {name: wants if name == "x" else [wants[i] for i in used] if len(wants) == len(group) else wants for name, wants in needs.items()}
    pick = lambda values: [values[i] for i in used] if values else values  # noqa: E731
    dx, *lists = gradients(group.pick(used), x, parts and torch.cat(parts, -1), pick(dy), None, pick(raws), pick(draws), sub, K, interpret)
    full = []
    for values, everything in zip(lists, (group.packed, group.a, group.b, group.factor, group.bias), strict=True):
        found = dict(zip(used, values, strict=False))
        full.append([found.get(i) for i in range(len(everything))])
    return dx, *full


def gradients(group: Group, x: Tensor | None, xa: Tensor | None, dy: list[Tensor | None], dxa: Tensor | None, raws, draws, needs, K: int, interpret: bool):
    """dx, and lists of dW, da, db, dfactor and dbias, from the gradients of what the op returned; each only where `needs` asks for it.

    x: (..., K), xa: (..., sum of R): only read with adapters or where dW is asked for. dy: (..., N), None where it
    did not take part. dxa, draws: of
    the values kept for the backward, which have a gradient only where a gradient is differentiated again.
    needs: {"x": bool, "w" | "a" | "b" | "factor" | "bias": list[bool]}.
    """
    n = len(group)
    used = [i for i in range(n) if dy[i] is not None or draws[i] is not None]
    if dxa is None and len(used) < n:
        return _of_used(group, x, xa, dy, raws, draws, needs, K, interpret, used)
    lead = next(t for t in (*dy, *draws, dxa) if t is not None).shape[:-1]
    M = math.prod(lead)  # lead.numel() would make a constant of it under torch.compile
    like = next((t for t in (*dy, *draws) if t is not None), x)
    dW, da, db, dfactor, dbias = ([None] * len(t) for t in (group.packed, group.a, group.b, group.factor, group.bias))
    dy2 = [like.new_zeros(M, group.rows[i]) if t is None else t.reshape(-1, group.rows[i]).contiguous() for i, t in enumerate(dy)]
    factor, dz = group.factor, dy2
    for i in range(n):
        if dfactor and needs["factor"][i]:
            wide = torch.promote_types(dy2[i].dtype, torch.float32)
            dfactor[i] = (dy2[i].to(wide) * raws[i].reshape(dy2[i].shape)).sum(0).to(group.factor[i].dtype)
        if dbias and needs["bias"][i]:
            dbias[i] = dy2[i].sum(0, dtype=torch.float32).to(group.bias[i].dtype)
    if any(t is not None for t in draws):
        dz = [(t * f).to(t.dtype) + (0 if r is None else r.reshape(t.shape)) for t, f, r in zip(dy2, group.factor, draws, strict=True)]
        factor = []
    through: list[Tensor] = []  # d(x A^T) without dropout's 1 / (1 - p), which comes onto what is made of it
    for i in range(n if group.a else 0):
        columns = group.columns(i)
        low = xa.reshape(M, xa.shape[-1])[:, columns]
        onward = needs["x"] or needs["a"][i]
        if onward or needs["b"][i]:
            outer, low = lora_grad(
                dz[i], low, group.b[i] if onward else None, factor[i] if factor else None, None, 0.0, group.scaling[i], needs["b"][i], interpret
            )
            if needs["b"][i]:
                db[i] = (outer if group.seeds is None else outer * group.rescale).to(group.b[i].dtype)
        if onward and dxa is not None and group.rescale:
            low = low + dxa.reshape(M, xa.shape[-1])[:, columns] / group.rescale
        if needs["a"][i]:
            outer = lora_grad(x.reshape(M, K), low, None, None, group.seed(i), group.dropout_p, group.rescale, True, interpret)[0]
            da[i] = outer.T.to(group.a[i].dtype)
        through.append(low)
    for i in range(n):
        if needs["w"][i]:
            dW[i] = ((dz[i] * factor[i]).to(dz[i].dtype) if factor else dz[i]).T @ x.reshape(M, K)
    dx = None
    if needs["x"]:
        low = torch.cat(through, 1) if len(through) > 1 else through[0].contiguous() if through else None
        dx = _nf4_linear_dx(dz, *group.args()[:8], factor, group.seeds, group.dropout_p, low, K, interpret).view(*lead, K)
    return dx, dW, da, db, dfactor, dbias


def _setup_context(ctx, inputs, output) -> None:
    x, *args, _raw, ctx.interpret = inputs
    group = Group(*args)
    ctx.set_materialize_grads(False)
    ctx.K = x.shape[-1]
    xa, raws = output[len(group)], output[len(group) + 1 :]
    keep_x = group.a or any(each(ctx.needs_input_grad[1], len(group)))  # dX alone needs neither x nor xa
    ctx.save_for_backward(*save_group(ctx, group), x if keep_x else None, xa if group.a else None, *raws)


def save_group(ctx, group: Group) -> list[Tensor | None]:
    """The group's tensors for ctx.save_for_backward; the rest stays on ctx."""
    fields = ("packed", "code", "scales", "a", "b", "factor", "bias")
    ctx.group = replace(group, **{name: [] for name in fields}, seeds=None)
    ctx.counts = {name: len(getattr(group, name)) for name in fields}
    return [*(t for name in fields for t in getattr(group, name)), group.seeds]


def saved_group(ctx) -> tuple[Group, list[Tensor | None]]:
    """The group, and what was saved after it."""
    saved = list(ctx.saved_tensors)
    lists = {}
    for name, count in ctx.counts.items():
        lists[name], saved = saved[:count], saved[count:]
    return replace(ctx.group, **lists, seeds=saved[0]), saved[1:]


def each(needed: bool | list[bool], n: int) -> list[bool]:
    """needs_input_grad of a list of tensors, which is False alone where none of them is differentiated."""
    return list(needed) if isinstance(needed, (list, tuple)) and needed else [False] * n


def _backward(ctx, grads):
    group, (x, xa, *raws) = saved_group(ctx)
    n = len(group)
    need = ctx.needs_input_grad
    needs = {"x": need[0]} | {name: each(need[i], n) for name, i in (("w", 1), ("a", 8), ("b", 9), ("factor", 11), ("bias", 12))}
    draws = grads[n + 1 :] or [None] * n
    dx, dW, da, db, dfactor, dbias = gradients(group, x, xa, list(grads[:n]), grads[n], raws, draws, needs, ctx.K, ctx.interpret)
    nothing = [None] * len(group.scales)
    return dx, dW, [None] * len(group.code), nothing, None, None, None, None, da, db, None, dfactor, dbias, None, None, None, None


def _dx_setup_context(ctx, inputs, output) -> None:
    dy, *args, factor, seeds, dropout_p, dxa, ctx.K, ctx.interpret = inputs
    group = Group(*args, factor=factor, seeds=seeds, dropout_p=dropout_p)
    ctx.save_for_backward(*save_group(ctx, group), dxa, *dy)


def _dx_backward(ctx, grad: Tensor):
    """dX is linear in dY, in factor, in W, in dxa and in A: so is the way back."""
    group, (dxa, *dy) = saved_group(ctx)
    grad = grad.contiguous()
    n = len(group)
    wanted = each(ctx.needs_input_grad[1], n)
    plain = replace(group, a=[], factor=[], seeds=None, scaling=[1.0] * n)
    products = _nf4_linear(grad, *plain.args(), False, ctx.interpret)[:n]  # grad W^T
    d_dy = [(g * f).to(g.dtype) for g, f in zip(products, group.factor, strict=True)] if group.factor else products
    d_factor = [(g.float() * t).sum(0).to(f.dtype) for g, t, f in zip(products, dy, group.factor, strict=False)]
    dW = [((t * group.factor[i]).to(t.dtype) if group.factor else t).T @ grad if wanted[i] else None for i, t in enumerate(dy)]
    d_dxa, d_a = None, []
    if dxa is not None:
        dropped = [drop(grad, group.seed(i), group.dropout_p).to(dxa.dtype) * group.rescale for i in range(n)]
        d_dxa = torch.cat([g @ t.to(dxa.dtype).T for g, t in zip(dropped, group.a, strict=True)], 1)
        d_a = [(dxa[:, group.columns(i)].T @ dropped[i]).to(group.a[i].dtype) for i in range(n)]
    nothing = [None] * len(group.scales)
    return d_dy, dW, [None] * len(group.code), nothing, None, None, None, None, d_a, d_factor, None, None, d_dxa, None, None


_nf4_linear.register_autograd(_backward, setup_context=_setup_context)
_nf4_linear_dx.register_autograd(_dx_backward, setup_context=_dx_setup_context)
