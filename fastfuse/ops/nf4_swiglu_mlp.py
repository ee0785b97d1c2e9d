"""The gated MLP of a Llama layer over NF4 weights, down(silu(gate(x)) * up(x)), keeping nothing of its width for the backward."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops._op import HAS_TRITON, Cost, fused_op, kernel_dtype
from fastfuse.ops.nf4_linear import (
    Group,
    Projection,
    _nf4_linear,
    each,
    gradients,
    nf4_linear_bwd_cost,
    nf4_linear_cost,
    nf4_linear_ref,
    prepare,
    projection_of,
    save_group,
    saved_group,
)
from fastfuse.quant.nf4 import NF4View

if HAS_TRITON:
    from fastfuse.kernels.swiglu import swiglu_bwd_kernel, swiglu_fwd_kernel

_BLOCK = 1024


def nf4_swiglu_mlp(
    x: Tensor,
    gate: Projection | tuple,
    up: Projection | tuple,
    down: Projection | tuple,
    *,
    dropout_p: float = 0.0,
    training: bool = False,
    backend: str | None = None,
) -> Tensor:
    """y = down(silu(gate(x)) * up(x)), each a linear layer in NF4 with or without a LoRA delta (https://arxiv.org/abs/2002.05202).

    x: (..., K); gate, up: [H, K], down: [N, H], each a Projection or a tuple (weight, lora_a, lora_b, scaling, bias), stored alike
    -> (..., N); gradients for x, every A, B and bias. The backward computes gate(x) and up(x) again: of width H nothing is kept.
    dropout_p, training: on the way into every A, a mask each. Otherwise as nf4_lora_linear.
    Raises as nf4_lora_linears; Unsupported with a magnitude (DoRA): nf4_lora_linears and nf4_lora_linear compose to the same.
    """
    op = "nf4_swiglu_mlp"
    gate, up, down = (projection_of(op, p) for p in (gate, up, down))
    if any(p.magnitude is not None for p in (gate, up, down)):
        raise Unsupported(f"{op}: a projection has a magnitude; DoRA is covered by nf4_lora_linears and nf4_lora_linear", "DORA")
    if gate.weight.shape != up.weight.shape or down.weight.shape[1] != gate.weight.shape[0]:
        shapes = ", ".join(str(tuple(p.weight.shape)) for p in (gate, up, down))
        raise ValueError(f"{op}: gate, up and down are {shapes}, expected [H, K], [H, K] and [N, H]")
    if not training:
        dropout_p = 0.0
    cast, (gate, up), seeds, chosen = prepare(op, x, [gate, up], dropout_p, backend)
    _, (down,), seed, _ = prepare(op, cast.new_empty((0, down.weight.shape[1])), [down], dropout_p, backend)
    if seeds is not None or seed is not None:
        fill = torch.zeros(2, dtype=torch.int64, device=x.device)
        seeds = torch.cat([fill if seeds is None else seeds, fill[:1] if seed is None else seed])
    if chosen == "reference":
        return nf4_swiglu_mlp_ref(cast, gate, up, down, seeds, dropout_p)
    group = Group.of(op, cast, [gate, up, down], seeds, dropout_p)
    return _nf4_swiglu_mlp(cast, *group.args(), chosen == "interpreter")[0]


def nf4_swiglu_mlp_ref(x: Tensor, gate: Projection, up: Projection, down: Projection, seeds: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """The formula, eager."""

    def run(i: int, x: Tensor, p: Projection) -> Tensor:
        seed = None if seeds is None or p.lora_a is None else seeds[i]
        return nf4_linear_ref(x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, seed=seed, dropout_p=dropout_p)

    return run(2, _swiglu_ref(run(0, x, gate), run(1, x, up), False), down)


def nf4_swiglu_mlp_cost(x: Tensor, gate: tuple, up: tuple, down: tuple) -> Cost:
    """Forward: x and every weight once, y written once; gate(x), up(x) and their product never leave the chip."""
    return _sum_of_costs(nf4_linear_cost, x, gate, up, down, times_x=1, times_hidden=3)


def nf4_swiglu_mlp_bwd_cost(x: Tensor, gate: tuple, up: tuple, down: tuple) -> Cost:
    """Backward: x read and dx written once, as every weight and adapter; no flops for what is computed again."""
    return _sum_of_costs(nf4_linear_bwd_cost, x, gate, up, down, times_x=2, times_hidden=4)


def _sum_of_costs(cost, x: Tensor, gate: tuple, up: tuple, down: tuple, times_x: int, times_hidden: int) -> Cost:
    """The three layers' costs without what they share: so many times x, so many times a tensor of the MLP's width."""
    hidden = torch.empty((x.numel() // x.shape[-1], NF4View.of(gate[0]).shape[0]), dtype=x.dtype, device="meta")
    each = [cost(x, *gate[:4]), cost(x, *up[:4]), cost(hidden, *down[:4])]
    shared = (times_x * x.numel() + times_hidden * hidden.numel()) * x.element_size()
    return Cost(sum(c.bytes for c in each) - shared, sum(c.flops for c in each))


def _swiglu_ref(e: Tensor, g: Tensor, interpret: bool) -> Tensor:
    wide = torch.promote_types(e.dtype, torch.float32)
    return (F.silu(e.to(wide)) * g.to(wide)).to(e.dtype)


@fused_op("swiglu", reference=_swiglu_ref)
def _swiglu(e: Tensor, g: Tensor, interpret: bool) -> Tensor:
    dtype, work = e.dtype, kernel_dtype(e.dtype)
    e, g = e.to(work).contiguous(), g.to(work).contiguous()
    h = torch.empty_like(e)
    if h.numel():
        swiglu_fwd_kernel[(-(-h.numel() // _BLOCK),)](e, g, h, h.numel(), BLOCK=_BLOCK, **tune.OPTIONS)
    return h.to(dtype)


def _swiglu_bwd_ref(dh: Tensor, e: Tensor, g: Tensor, interpret: bool) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(e.dtype, torch.float32)
    dh, e32, g32 = (t.to(wide) for t in (dh, e, g))
    s = e32.sigmoid()
    return (dh * g32 * (s + e32 * s * (1 - s))).to(e.dtype), (dh * e32 * s).to(e.dtype)


@fused_op("swiglu_bwd", reference=_swiglu_bwd_ref)
def _swiglu_bwd(dh: Tensor, e: Tensor, g: Tensor, interpret: bool) -> tuple[Tensor, Tensor]:
    dtype, work = e.dtype, kernel_dtype(e.dtype)
    dh, e, g = (t.to(work).contiguous() for t in (dh, e, g))
    de, dg = torch.empty_like(e), torch.empty_like(e)
    if e.numel():
        swiglu_bwd_kernel[(-(-e.numel() // _BLOCK),)](dh, e, g, de, dg, e.numel(), BLOCK=_BLOCK, **tune.OPTIONS)
    return de.to(dtype), dg.to(dtype)


def _swiglu_setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.interpret = inputs
    ctx.save_for_backward(*tensors)


def _swiglu_backward(ctx, dh: Tensor):
    e, g = ctx.saved_tensors
    return *_swiglu_bwd(dh, e, g, ctx.interpret), None


def _swiglu_bwd_backward(ctx, d_de: Tensor, d_dg: Tensor):
    """For a gradient of a gradient: with s = sigmoid(e) and f = e s, de = dh g f' and dg = dh f."""
    dh, e, g = ctx.saved_tensors
    s = e.sigmoid()
    f, f1 = e * s, s + e * s * (1 - s)
    f2 = s * (1 - s) * (2 + e * (1 - 2 * s))
    return d_de * g * f1 + d_dg * f, d_de * dh * g * f2 + d_dg * dh * f1, d_de * dh * f1, None


_swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_setup_context)
_swiglu_bwd.register_autograd(_swiglu_bwd_backward, setup_context=_swiglu_setup_context)


def _forward(x: Tensor, group: Group, interpret: bool) -> list[Tensor]:
    e, g, xa = _nf4_linear(x, *group.pick([0, 1]).args(), False, interpret)
    y, ha = _nf4_linear(_swiglu(e, g, interpret), *group.pick([2]).args(), False, interpret)
    return [y, xa, ha]


def _mlp_reference(x: Tensor, *args) -> list[Tensor]:
    *args, interpret = args
    return _forward(x, Group(*args), interpret)


@fused_op("nf4_swiglu_mlp", reference=_mlp_reference)
def _nf4_swiglu_mlp(
    x: Tensor,
    packed: Sequence[Tensor], code: Sequence[Tensor], scales: Sequence[Tensor],
    block_size: int, rows: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    a: Sequence[Tensor], b: Sequence[Tensor], scaling: Sequence[float], factor: Sequence[Tensor], bias: Sequence[Tensor],
    seeds: Tensor | None, dropout_p: float, interpret: bool,
) -> list[Tensor]:  # fmt: skip
    """[y, x A^T of gate and up, h A^T of down]: the second and third are kept for the backward."""
    group = Group(packed, code, scales, block_size, rows, w_dtype, scale_block, a, b, scaling, factor, bias, seeds, dropout_p)
    return _forward(x, group, interpret)


def _setup_context(ctx, inputs, output) -> None:
    x, *args, ctx.interpret = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*save_group(ctx, Group(*args)), x, *output[1:])


def _backward(ctx, grads):
    dy, d_xa, d_ha = grads
    group, (x, xa, ha) = saved_group(ctx)
    inner, outer = group.pick([0, 1]), group.pick([2])
    if dy is None:
        dy = x.new_zeros((*x.shape[:-1], group.rows[2]))
    need, K = ctx.needs_input_grad, x.shape[-1]
    wanted = {name: each(need[i], 3) for name, i in (("a", 8), ("b", 9), ("factor", 11), ("bias", 12))}
    first = any(any(wants[:2]) for wants in wanted.values()) or need[0]
    e, g, _ = _nf4_linear(x, *inner.args(), False, ctx.interpret)
    h = _swiglu(e, g, ctx.interpret)
    needs = {"x": first, "w": [False]} | {name: wants[2:] for name, wants in wanted.items()}
    dh, _, da2, db2, _, dbias2 = gradients(outer, h, ha, [dy], d_ha, [], [None], needs, group.rows[0], ctx.interpret)
    dx, da, db, dbias = None, [None] * 2 * bool(da2), [None] * 2 * bool(db2), [None] * 2 * bool(dbias2)
    if first:
        de, dg = _swiglu_bwd(dh, e, g, ctx.interpret)
        needs = {"x": need[0], "w": [False] * 2} | {name: wants[:2] for name, wants in wanted.items()}
        dx, _, da, db, _, dbias = gradients(inner, x, xa, [de, dg], d_xa, [], [None] * 2, needs, K, ctx.interpret)
    nothing = [None] * len(group.packed), [None] * len(group.code), [None] * len(group.scales)
    return dx, *nothing, None, None, None, None, da + da2, db + db2, None, [None] * len(group.factor), dbias + dbias2, None, None, None


_nf4_swiglu_mlp.register_autograd(_backward, setup_context=_setup_context)
