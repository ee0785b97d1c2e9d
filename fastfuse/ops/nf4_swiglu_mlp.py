"""The gated MLP of a Llama layer over NF4 weights, down(silu(gate(x)) * up(x)), keeping nothing of its width for the backward."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops._fused_op import fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._linear_group import LinearArgs, Projection, linear_args, subset
from fastfuse.ops._op import HAS_TRITON, Cost, Plan, constant, kernel_dtype
from fastfuse.ops.nf4_linear import linear, nf4_linear_bwd_cost, nf4_linear_cost, nf4_linear_ref, prepare, projection_of
from fastfuse.ops.nf4_linear_dx import gradients
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
    dropout_p = constant(dropout_p) if training and isinstance(dropout_p, (int, float)) else dropout_p if training else 0.0
    cast, (gate, up), seeds, chosen = prepare(op, x, [gate, up], dropout_p, backend)
    _, (down,), seed, _ = prepare(op, cast.new_empty((0, down.weight.shape[1])), [down], dropout_p, backend)
    if seeds is not None or seed is not None:
        fill = torch.zeros(2, dtype=torch.int64, device=x.device)
        seeds = torch.cat([fill if seeds is None else seeds, fill[:1] if seed is None else seed])
    if chosen == "reference":
        return nf4_swiglu_mlp_ref(cast, gate, up, down, seeds, dropout_p)
    return _mlp(linear_args(op, cast, [gate, up, down], seeds, dropout_p, chosen == "interpreter"))[0]


def nf4_swiglu_mlp_ref(x: Tensor, gate: Projection, up: Projection, down: Projection, seeds: Tensor | None = None, dropout_p: float = 0.0) -> Tensor:
    """The formula, eager."""

    def run(i: int, x: Tensor, p: Projection) -> Tensor:
        seed = None if seeds is None or p.lora_a is None else seeds[i]
        return nf4_linear_ref(x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, seed=seed, dropout_p=dropout_p)

    return run(2, _swiglu_ref(run(0, x, gate), run(1, x, up)), down)


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


class SwiGLUArgs(NamedTuple):
    """h = silu(e) g; with dh, its gradients."""

    e: Tensor
    g: Tensor
    dh: Tensor | None
    interpret: bool


def _swiglu_ref(e: Tensor, g: Tensor) -> Tensor:
    wide = torch.promote_types(e.dtype, torch.float32)
    return (F.silu(e.to(wide)) * g.to(wide)).to(e.dtype)


def _swiglu_bwd_ref(args: SwiGLUArgs) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(args.e.dtype, torch.float32)
    e, g, dh = (t.to(wide) for t in args[:3])
    s = e.sigmoid()
    return (dh * g * (s + e * s * (1 - s))).to(args.e.dtype), (dh * e * s).to(args.e.dtype)


def _swiglu_launch(args: SwiGLUArgs) -> Plan:
    """Of both directions: without dh h, with it de and dg."""
    dtype, n = args.e.dtype, args.e.numel()
    kernel, results = (swiglu_fwd_kernel, 1) if args.dh is None else (swiglu_bwd_kernel, 2)
    launch = Launch(kernel, BLOCK=_BLOCK, **tune.OPTIONS)

    def run(args):
        given = [t.to(kernel_dtype(dtype)).contiguous() for t in (args.dh, args.e, args.g) if t is not None]
        made = [torch.empty_like(given[0]) for _ in range(results)]
        if n:
            launch((-(-n // _BLOCK), 1, 1), *given, *made, n)
        return tuple([t.to(dtype) for t in made])

    return run


_swiglu = fused_op("swiglu", SwiGLUArgs, reference=lambda args: (_swiglu_ref(args.e, args.g),), launch=_swiglu_launch)
_swiglu_bwd = fused_op("swiglu_bwd", SwiGLUArgs, reference=_swiglu_bwd_ref, launch=_swiglu_launch)


def _swiglu_backward(args: SwiGLUArgs, outs: tuple, grads: Sequence[Tensor], needs: SwiGLUArgs) -> SwiGLUArgs:
    return SwiGLUArgs(*_swiglu_bwd(args._replace(dh=grads[0])), None, None)


def _swiglu_bwd_backward(args: SwiGLUArgs, outs: tuple, grads: Sequence[Tensor | None], needs: SwiGLUArgs) -> SwiGLUArgs:
    """For a gradient of a gradient: with s = sigmoid(e) and f = e s, de = dh g f' and dg = dh f."""
    e, g, dh = args[:3]
    d_de, d_dg = (torch.zeros_like(e) if t is None else t for t in grads)
    s = e.sigmoid()
    f, f1 = e * s, s + e * s * (1 - s)
    f2 = s * (1 - s) * (2 + e * (1 - 2 * s))
    return SwiGLUArgs(d_de * dh * g * f2 + d_dg * dh * f1, d_de * dh * f1, d_de * g * f1 + d_dg * f, None)


_swiglu.register_backward(_swiglu_backward, lambda args, outs, needs: (args, ()))
_swiglu_bwd.register_backward(_swiglu_bwd_backward, lambda args, outs, needs: (args, ()))


def _forward(args: LinearArgs) -> tuple[Tensor, Tensor, Tensor]:
    """(y, x A^T of gate and up, h A^T of down): the second and third are kept for the backward."""
    e, g, xa = linear(subset(args, [0, 1]))
    (h,) = _swiglu(SwiGLUArgs(e, g, None, args.interpret))
    y, ha = linear(_down(args, h))
    return y, xa, ha


def _down(args: LinearArgs, h: Tensor | None) -> LinearArgs:
    return subset(args, [2])._replace(x=h, K=args.operands[0].N)


_mlp = fused_op("nf4_swiglu_mlp", LinearArgs, reference=_forward, launch=lambda args: _forward)


def _backward(args: LinearArgs, outs: tuple, grads: Sequence[Tensor | None], needs: LinearArgs) -> LinearArgs:
    (dy, d_xa, d_ha), (xa, ha), x = grads, outs, args.x
    inner, parts = subset(args, [0, 1]), needs.operands
    if dy is None:
        dy = x.new_zeros((*x.shape[:-1], args.operands[2].N))
    first = needs.x or any(p.a or p.b or p.factor or p.bias for p in parts[:2])
    e, g, _ = linear(inner)
    (h,) = _swiglu(SwiGLUArgs(e, g, None, args.interpret))
    of_down = gradients(_down(args, h), ha, [None], [dy], d_ha, [None], needs._replace(x=first, operands=parts[2:]))
    if not first:
        return of_down._replace(operands=[None, None, *of_down.operands], x=None)
    de, dg = _swiglu_bwd(SwiGLUArgs(e, g, of_down.x, args.interpret))
    of_inner = gradients(inner, xa, [None] * 2, [de, dg], d_xa, [None] * 2, needs._replace(operands=parts[:2]))
    return of_inner._replace(operands=[*of_inner.operands, *of_down.operands])


_mlp.register_backward(_backward, lambda args, outs, needs: (args, outs[1:]))
