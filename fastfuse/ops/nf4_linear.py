"""Linear layers with a LoRA delta over NF4 weights or dense ones, one or several that share x, forward and backward."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import Operand
from fastfuse.ops import _cpu_library, _nf4_cpu
from fastfuse.ops._device_checks import assert_on_device
from fastfuse.ops._fused_op import fused_op
from fastfuse.ops._linear_group import (
    LinearArgs,
    Projection,
    add_delta,
    columns_of,
    decoded,
    factor_of,
    linear_args,
    needs_no_cast,
    rescale,
    scaled,
    seed_of,
    shaped,
    tile_of,
    weight_of,
    xa_dtype,
    xa_of,
    xa_ref,
)
from fastfuse.ops._linear_launch import Kind, by_tiles, few_tokens
from fastfuse.ops._op import Cost, autocast_dtype, is_symbol, kernel_dtype, nbytes, number, route, rows
from fastfuse.ops.lora_row_norms import lora_row_norms, lora_row_norms_ref
from fastfuse.ops.low_rank import drop, lora_up
from fastfuse.ops.nf4_dequantize import DTYPES, nf4_dequantize_ref
from fastfuse.ops.nf4_linear_dx import LinearDxArgs, gradients, linear_dx
from fastfuse.quant.nf4 import Layout, NF4View, is_dense, is_torchao


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
    elif is_symbol(dropout_p):
        return _with_symbolic_dropout(op, x, projections, dropout_p, backend)
    x, projections, seeds, chosen = prepare(op, x, projections, dropout_p, backend)
    if chosen == "reference":
        return [
            nf4_linear_ref(
                x, p.weight, p.lora_a, p.lora_b, p.scaling, p.bias, p.magnitude, p.norms, None if seeds is None or p.lora_a is None else seeds[i], dropout_p
            )
            for i, p in enumerate(projections)
        ]
    return list(linear(linear_args(op, x, projections, seeds, dropout_p, chosen == "interpreter"))[: len(projections)])


def _with_symbolic_dropout(op: str, x, projections: list[Projection], dropout_p: float, backend: str | None) -> list[Tensor]:
    """Under torch.compile, with a probability that changes from call to call: kernels take a number, so the low-rank half is the compiler's own."""
    x, projections, _, chosen = prepare(op, x, projections, 0.0, backend)
    p, outs = torch.ones((), dtype=torch.float64, device=x.device) * dropout_p, []
    assert_on_device((p >= 0) & (p <= 1), f"{op}: dropout_p is not a number from 0 to 1")
    kept = torch.where(p < 1, 1 / (1 - p), 0).float()
    for q in projections:
        if chosen == "reference":
            z = nf4_linear_ref(x, q.weight)
        else:
            z = linear(linear_args(op, x, [Projection(q.weight, None, None, 1.0)], None, 0.0, chosen == "interpreter"))[0]
        if q.lora_a is not None:
            seed = torch.randint(2**62, (), device=x.device)
            dtype = torch.promote_types(torch.promote_types(x.dtype, q.lora_a.dtype), q.lora_b.dtype)
            x2 = drop(x.reshape(-1, x.shape[-1]), seed, p).view(x.shape)
            z = add_delta(z, F.linear(x2.to(dtype), q.lora_a.to(dtype)), q.lora_b, q.scaling * kept)
        factor = None if q.magnitude is None else factor_of(q.magnitude, q.norms)
        bias = None if q.bias is None else q.bias.to(x.dtype)
        outs.append(scaled(z, factor, bias) if factor is not None else z if bias is None else z + bias)
    return outs


def prepare(op: str, x, projections: list[Projection], dropout_p: float, backend: str | None):
    """(x, projections, seeds, route): checked, in autocast's dtype, with the norms that a magnitude needs."""
    K = [p.weight.shape[1] for p in projections]
    if len(set(K)) > 1:
        raise ValueError(f"{op}: the weights take {' and '.join(map(str, K))} features: a group shares one x")
    for p in projections:
        _check(op, x, p)
    if not isinstance(dropout_p, (int, float)) or not 0 <= dropout_p <= 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p!r}, expected a number from 0 to 1")
    given = projections = [p._replace(scaling=number(p.scaling, x)) for p in projections]
    if (dtype := autocast_dtype(x.device)) is not None:
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
    if (p.lora_a is None) != (p.lora_b is None):
        raise ValueError(f"{op}: lora_{'a' if p.lora_a is None else 'b'} is None while the other is given: an adapter has both")
    N, K = p.weight.shape
    R = (p.lora_a.shape[0] if isinstance(p.lora_a, Tensor) and p.lora_a.dim() == 2 else 0) or "R"
    vector, given = (N,), {"x": (x, None), "lora_a": (p.lora_a, (R, K)), "lora_b": (p.lora_b, (N, R))}
    for name, (t, shape) in (given | {"bias": (p.bias, vector), "magnitude": (p.magnitude, vector), "norms": (p.norms, vector)}).items():
        if t is None and shape is not None:
            continue
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
        if t.layout != torch.strided or t.is_nested or is_torchao(t):
            kind = type(t).__name__ if t.layout == torch.strided else t.layout
            raise Unsupported(f"{op}: {name} has layout {kind}, torch.strided is covered")
        if shape is None and (t.dim() == 0 or t.shape[-1] != K):
            raise ValueError(f"{op}: x has shape {tuple(x.shape)}, weight takes {K} features (N, K = {N}, {K})")
        if shape is not None and t.shape != shape:
            expected = f"({N},)" if shape is vector else f"({shape[0]}, {shape[1]})" if name == "lora_b" else f"(R, {K}) with R >= 1"
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {expected}")
        if t.dtype not in DTYPES:
            raise Unsupported(f"{op}: {name} is {t.dtype}, covered are bf16, fp16 and fp32")
        if t.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, {name} on {t.device}")
    if not isinstance(p.scaling, (int, float)):
        raise TypeError(f"{op}: scaling is a {type(p.scaling).__name__}, not a number")
    if p.norms is not None and p.magnitude is None:
        raise ValueError(f"{op}: norms is given, magnitude is None: norms only serve a magnitude")
    if p.weight.device != x.device:
        raise ValueError(f"{op}: x is on {x.device}, weight on {p.weight.device}")


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
        xa = xa_ref(x, [lora_a], dtype, None if seed is None else seed.view(1), dropout_p)
        y = add_delta(y, xa, lora_b, scaling * rescale(seed, dropout_p))
    if magnitude is None:
        return y
    norms = lora_row_norms_ref(w.detach(), lora_a, lora_b, scaling) if norms is None else norms
    return scaled(y, factor_of(magnitude, norms), bias)


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


def _reference(args: LinearArgs) -> tuple[Tensor, ...]:
    return _finished(args, [nf4_linear_ref(args.x, weight_of(args, p), bias=_inner_bias(p)) for p in args.operands])


def _on_cpu(args: LinearArgs) -> tuple[Tensor, ...]:
    x, p = args.x, args.operands[0]
    alone = args.operands[1:] == () and args.layout is not None and p.factor is None and args.seeds is None and type(p.scaling) is float
    if alone and _cpu_library.library() and not _cpu_library.is_for_gemm(x.numel() // args.K, args.K, x.dtype):
        return _cpu_library.linear(x, p.weight, args.layout, p.N, args.K, p.bias, p.a, p.b, p.scaling)
    x, base = rows(x), []
    for p in args.operands:
        weight, bias = weight_of(args, p), _inner_bias(p)
        y = F.linear(x, weight, bias if bias is None else bias.to(x.dtype)) if args.layout is None else _nf4_cpu.linear(x, weight, bias)
        base.append(shaped(y, args.x.shape[:-1]))
    return _finished(args, base)


def _inner_bias(p: Operand) -> Tensor | None:
    """The bias that the product itself adds: with a factor it comes after that."""
    return p.bias if p.factor is None else None


def _finished(args: LinearArgs, base: list[Tensor]) -> tuple[Tensor, ...]:
    """From each x W^T (with the inner bias) what the op returns, eagerly."""
    x = args.x
    xa = xa_ref(x, [p.a for p in args.operands if p.a is not None], xa_dtype(args), args.seeds, args.dropout_p)
    outs, pre_scale = [], []
    for i, (p, z) in enumerate(zip(args.operands, base, strict=True)):
        if p.a is not None:
            z = add_delta(z, xa[..., columns_of(args.operands, i)], p.b, p.scaling * rescale(args.seeds, args.dropout_p))
        pre_scale.append(z)
        outs.append(scaled(z, p.factor, None if p.bias is None else p.bias.to(x.dtype)))
    return *outs, xa, *(pre_scale if args.keep_pre_scale else ())


def _launch(args: LinearArgs) -> Callable[[LinearArgs], tuple[Tensor, ...]]:
    x = args.x
    M = x.numel() // args.K
    tile, decode = tile_of(args, "nf4_linear", M, x.dtype, x.device)
    if tile is None or M == 0:
        return _dense
    work, lora_dtype = kernel_dtype(x.dtype), kernel_dtype(xa_dtype(args))
    as_it_is = x.dtype == work and lora_dtype == xa_dtype(args) and x.is_contiguous() and all(needs_no_cast(p, work, lora_dtype) for p in args.operands)
    kind = Kind(tile, decode, M, work, lora_dtype, as_it_is and not any(isinstance(p.scaling, Tensor) for p in args.operands))
    splits = min(tile.launch().get("SPLIT_K", 0), args.K // tile["BLOCK_K"])
    return few_tokens(args, kind, splits) if splits and M <= tile["BLOCK_M"] and args.seeds is None else by_tiles(args, kind)


def _dense(args: LinearArgs) -> tuple[Tensor, ...]:
    """Many tokens: each weight is decoded once and the library's GEMM does the rest.

    The delta goes first and the large product accumulates onto it: y is read and written once more, not twice.
    """
    x, lead = rows(args.x), args.x.shape[:-1]
    xa = xa_of(x, args, xa_dtype(args))
    outs, pre_scale, kept = [], [], rescale(args.seeds, args.dropout_p)
    for i, p in enumerate(args.operands):
        bias = None if p.bias is None else p.bias.to(x.dtype)
        inner = bias if p.factor is None else None  # with a factor the bias comes after it
        with decoded(args, p, x.dtype) as w:
            if p.R == 0:
                z = F.linear(x, w, inner)
            else:
                number, tensor = (kept, p.scaling) if isinstance(p.scaling, Tensor) else (p.scaling * kept, None)
                delta = lora_up(xa[:, columns_of(args.operands, i)], p.b.T, number, x.dtype, None, 0.0)
                delta = delta if tensor is None else (delta * tensor).to(x.dtype)
                z = (delta if inner is None else delta.add_(inner)).addmm_(x, w.T)
        pre_scale.append(z)
        outs.append(scaled(z, p.factor, bias))
    return tuple([shaped(t, lead) for t in (*outs, xa, *(pre_scale if args.keep_pre_scale else ()))])


linear = fused_op("nf4_linear", LinearArgs, Layout, reference=_reference, launch=_launch, cpu=_on_cpu)
"""(args) -> y of each operand, x A^T of all, and with keep_pre_scale each y before factor and bias: what follows the y is kept for the backward."""


def _saved(args: LinearArgs, outs: tuple[Tensor, ...], needs: LinearArgs) -> tuple[LinearArgs, tuple]:
    """dX alone needs neither x nor x A^T."""
    n, has_adapter = len(args.operands), args.operands[0].a is not None
    keeps_x = has_adapter or (args.layout is None and any(p.weight for p in needs.operands))
    return args._replace(x=args.x if keeps_x else None), (outs[n] if has_adapter else None, outs[n + 1 :])


def _backward(args: LinearArgs, outs: tuple, grads: Sequence[Tensor | None], needs: LinearArgs) -> LinearArgs:
    n, (xa, pre_scale) = len(args.operands), outs
    return gradients(args, xa, pre_scale or [None] * n, grads[:n], grads[n], grads[n + 1 :] or [None] * n, needs)


linear.register_backward(_backward, _saved)


def _dx_backward(args: LinearDxArgs, outs: tuple, grads: Sequence[Tensor | None], needs: LinearDxArgs) -> LinearDxArgs:
    """dX is linear in dY, in factor, in W, in d_xa and in A: so is the way back."""
    grad = grads[0].contiguous()
    plain = tuple([p._replace(a=None, factor=None, R=0, scaling=1.0) for p in args.operands])
    products = linear(LinearArgs(grad, plain, args.layout, args.K, None, 0.0, False, args.interpret))  # grad W^T
    d_dy, made, d_xa = [], [], []
    for i, (p, wanted, dy) in enumerate(zip(args.operands, needs.operands, args.dy, strict=True)):
        g, f, dW, da, d_factor = products[i], p.factor, None, None, None
        if args.layout is None and wanted.weight:
            dW = (dy if f is None else (dy * f).to(dy.dtype)).T @ grad
        if f is not None:
            d_factor = (g.float() * dy).sum(0).to(f.dtype)
        if p.a is not None:
            dropped = drop(grad, seed_of(args, i), args.dropout_p).to(args.d_xa.dtype) * rescale(args.seeds, args.dropout_p)
            d_xa.append(dropped @ p.a.to(args.d_xa.dtype).T)
            da = (args.d_xa[:, columns_of(args.operands, i)].T @ dropped).to(p.a.dtype)
        d_dy.append(g if f is None else (g * f).to(g.dtype))
        made.append(Operand(dW, da, None, d_factor, *(None,) * 6))
    return LinearDxArgs(tuple(d_dy), made, None, None, None, None, torch.cat(d_xa, 1) if d_xa else None, None)


linear_dx.register_backward(_dx_backward, lambda args, outs, needs: (args, ()))
