"""Linear layers over NF4 weights, with or without a LoRA delta, forward and backward; and dequantization."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops._op import HAS_TRITON, INTERPRET, Cost, fused_op, nbytes, route, rows
from fastfuse.quant.nf4 import NF4View

if HAS_TRITON:
    from fastfuse.kernels.nf4 import nf4_dequantize_kernel
    from fastfuse.kernels.nf4_linear import nf4_linear_fwd_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def nf4_dequantize(weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """The weight [N, K] as numbers, equal to the bit to what bitsandbytes or torchao gives.

    weight: Params4bit, NF4Tensor or NF4View.  dtype: bf16, fp16 or fp32; the weight's own where None.
    backend: as fastfuse.backend, for this call.
    Raises TypeError, ValueError or Unsupported as NF4View.of, and Unsupported for another dtype.
    """
    weight = NF4View.of(weight)
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise Unsupported(f"nf4_dequantize: dtype is {dtype}, covered are bf16, fp16 and fp32")
    chosen = route("nf4_dequantize", weight.packed, backend)
    if chosen == "reference":
        return nf4_dequantize_ref(weight, dtype)
    return _nf4_dequantize(*weight.parts(), dtype, chosen == "interpreter")


def nf4_linear(x: Tensor, weight, bias: Tensor | None = None, *, backend: str | None = None) -> Tensor:
    """y = x W^T + bias, W in NF4.

    x: (..., K), weight: [N, K] as NF4View.of takes it, bias: (N,)  ->  (..., N) in x's dtype; gradients for x and bias.
    x may be bf16, fp16 or fp32 with any strides; a last dim that is not contiguous is copied. Under autocast x follows
    its dtype. backend: as fastfuse.backend, for this call.
    Raises TypeError or ValueError naming both facts where arguments disagree, Unsupported for a dtype, a chip or a
    transform (forward-mode differentiation) that no kernel covers.
    """
    return _public("nf4_linear", x, weight, None, None, 1.0, bias, backend)


def nf4_lora_linear(x: Tensor, weight, lora_a: Tensor, lora_b: Tensor, scaling: float, *, bias: Tensor | None = None, backend: str | None = None) -> Tensor:
    """y = x W^T + scaling * (x A^T) B^T + bias, W in NF4 (QLoRA, https://arxiv.org/abs/2305.14314).

    x: (..., K), weight: [N, K], lora_a: A (R, K), lora_b: B (N, R), bias: (N,)  ->  (..., N) in x's dtype;
    gradients for x, A, B and bias. A and B may have another dtype than x (PEFT keeps them in fp32): the low-rank
    path then runs in the wider of the two. scaling is a number, not a tensor. Otherwise as nf4_linear.
    """
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"nf4_lora_linear: {name} is a {type(t).__name__}, not a tensor")
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"nf4_lora_linear: scaling is a {type(scaling).__name__}, not a number")
    return _public("nf4_lora_linear", x, weight, lora_a, lora_b, scaling, bias, backend)


def _public(op: str, x, weight, lora_a, lora_b, scaling, bias, backend) -> Tensor:
    weight = NF4View.of(weight)
    _check(op, x, weight, lora_a, lora_b, bias)
    if x.device.type != "meta" and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, lora_a, lora_b, bias = (t if t is None else t.to(dtype) for t in (x, lora_a, lora_b, bias))
    chosen = route(op, x, backend)
    if chosen == "reference":
        return nf4_linear_ref(x, weight, lora_a, lora_b, scaling, bias)
    return _nf4_linear(x, *weight.parts(), lora_a, lora_b, float(scaling), bias, chosen == "interpreter")[0]


def _check(op: str, x: Tensor, weight: NF4View, lora_a: Tensor | None, lora_b: Tensor | None, bias: Tensor | None) -> None:
    # Messages are built only where they are raised: formatting a symbolic size would break torch.compile's graph.
    for name, t in (("x", x), ("bias", bias)):
        if not isinstance(t, Tensor) and (t is not None or name == "x"):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
    if x.layout != torch.strided:
        raise Unsupported(f"{op}: x has layout {x.layout}, torch.strided is covered")
    N, K = weight.shape
    if x.dim() == 0 or x.shape[-1] != K:
        raise ValueError(f"{op}: x has shape {tuple(x.shape)}, weight takes {K} features (N, K = {N}, {K})")
    if lora_a is not None:
        if lora_a.dim() != 2 or lora_a.shape[1] != K or lora_a.shape[0] == 0:
            raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}, expected (R, {K}) with R >= 1")
        if lora_b.shape != (N, lora_a.shape[0]):
            raise ValueError(f"{op}: lora_b has shape {tuple(lora_b.shape)}, expected ({N}, {lora_a.shape[0]})")
    if bias is not None and bias.shape != (N,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}, expected ({N},)")
    for name, t in (("x", x), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if t is not None and t.dtype not in DTYPES:
            raise Unsupported(f"{op}: {name} is {t.dtype}, covered are bf16, fp16 and fp32")
    for name, t in (("weight", weight), ("lora_a", lora_a), ("lora_b", lora_b), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: x is on {x.device}, {name} on {t.device}")


def nf4_dequantize_ref(weight: NF4View, dtype: torch.dtype) -> Tensor:
    """round(code[nibble] * scale). float64 gives the exact product, which the tests measure against."""
    n, size = weight.shape[0] * weight.shape[1], weight.block_size
    torchao = len(weight.scales) == 3
    exact = weight.dtype if torchao else torch.promote_types(torch.float32, dtype)
    code = weight.code.to(exact)
    both = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # [256, 2]: the two elements of a byte
    w = both.index_select(0, weight.packed.int()).view(-1)
    scale = _block_scales(weight).to(exact)
    if n % size:  # the last block is cut short
        w = w[:n] * scale.repeat_interleave(size)[:n]
    else:
        w.view(-1, size).mul_(scale[:, None])  # in place: a second tensor of this size costs a CPU more than the product
    return w.to(dtype).view(weight.shape)


def _block_scales(weight: NF4View) -> Tensor:
    """One scale per block, [ceil(N K / block_size)]."""
    if len(weight.scales) == 1:
        return weight.scales[0]
    if len(weight.scales) == 4:
        index, code, absmax, offset = weight.scales
        return code.index_select(0, index.int()) * absmax.repeat_interleave(weight.scale_block)[: index.numel()] + offset
    scaler, factor, mean = weight.scales  # each step rounds to the weight's dtype
    return scaler / factor.repeat_interleave(weight.scale_block)[: scaler.numel()] + mean


def nf4_linear_ref(
    x: Tensor, weight: NF4View, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """The formula, eager. The delta is added before the one rounding to x's dtype."""
    y = F.linear(x, nf4_dequantize_ref(weight, x.dtype), None if bias is None else bias.to(x.dtype))
    return y if lora_a is None else _add_delta(y, _low_rank(x, lora_a), lora_b, scaling)


def _low_rank(x: Tensor, lora_a: Tensor | None) -> Tensor:
    """x A^T, (..., R), in the wider of the two dtypes; (..., 0) without an adapter."""
    if lora_a is None:
        return x.new_empty((*x.shape[:-1], 0))
    dtype = torch.promote_types(x.dtype, lora_a.dtype)
    return F.linear(x.to(dtype), lora_a.to(dtype))


def _add_delta(y: Tensor, xa: Tensor, lora_b: Tensor, scaling: float) -> Tensor:
    return (y + F.linear(xa, lora_b.to(xa.dtype)) * scaling).to(y.dtype)


def nf4_dequantize_cost(weight, dtype: torch.dtype) -> Cost:
    weight = NF4View.of(weight)
    return Cost(weight.nbytes + weight.shape[0] * weight.shape[1] * dtype.itemsize)


def nf4_linear_cost(x: Tensor, weight, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0, bias: Tensor | None = None) -> Cost:
    """Forward. The low-rank path counts its own flops and the adapters' bytes; x A^T never leaves the chip."""
    weight = NF4View.of(weight)
    N, K = weight.shape
    M, R = x.numel() // K, 0 if lora_a is None else lora_a.shape[0]
    out = M * N * x.element_size()
    return Cost(nbytes(x, lora_a, lora_b, bias) + weight.nbytes + out, 2 * M * N * K + 2 * M * R * (N + K))


def nf4_linear_bwd_cost(
    x: Tensor, weight, lora_a: Tensor | None = None, lora_b: Tensor | None = None, scaling: float = 1.0, bias: Tensor | None = None
) -> Cost:
    """dX, dA and dB from dY: x, dY, W and the adapters read once, each gradient written once."""
    weight = NF4View.of(weight)
    N, K = weight.shape
    M, R = x.numel() // K, 0 if lora_a is None else lora_a.shape[0]
    return Cost(2 * nbytes(x, lora_a, lora_b, bias) + weight.nbytes + M * N * x.element_size(), 2 * M * N * K + 4 * M * R * (N + K))


def _dequantize_reference(
    packed: Tensor,
    code: Tensor,
    scales: Sequence[Tensor],
    block_size: int,
    shape: Sequence[int],
    w_dtype: torch.dtype,
    scale_block: int,
    dtype: torch.dtype,
    interpret: bool,
) -> Tensor:
    return nf4_dequantize_ref(NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block), dtype)


@fused_op("nf4_dequantize", reference=_dequantize_reference)
def _nf4_dequantize(
    packed: Tensor,
    code: Tensor,
    scales: Sequence[Tensor],
    block_size: int,
    shape: Sequence[int],
    w_dtype: torch.dtype,
    scale_block: int,
    dtype: torch.dtype,
    interpret: bool,
) -> Tensor:
    return _dequantize(NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block), dtype)


def _dequantize(weight: NF4View, dtype: torch.dtype) -> Tensor:
    n = weight.shape[0] * weight.shape[1]
    # bf16 arithmetic is wrong in the interpreter: fp32 there, rounded to bf16 afterwards, is the same by definition.
    out = torch.empty(weight.shape, dtype=_kernel_dtype(dtype), device=weight.device)
    blocks = max(4096 // weight.block_size, 1)
    grid = (-(-n // (blocks * weight.block_size)),)
    decode = _decode_branch(weight, dtype) if n % 2 == 0 else "gather"
    nf4_dequantize_kernel[grid](
        weight.packed, weight.code, weight.scales, out, n,
        weight.block_size, weight.scale_block, blocks, decode, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out.to(dtype)


def _kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


def _decode_branch(weight: NF4View, dtype: torch.dtype) -> str:
    """Byte permutes on NVIDIA for 16-bit results; of torchao's weights for those kernels/nf4.py holds the table of."""
    if INTERPRET or torch.version.hip or dtype == torch.float32:
        return "gather"
    return "prmt" if len(weight.scales) != 3 or weight.dtype == dtype == torch.bfloat16 else "gather"


def _linear_reference(
    x: Tensor,
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, bias: Tensor | None, interpret: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    y = nf4_linear_ref(x, NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block), bias=bias)
    xa = _low_rank(x, lora_a)
    return y if lora_a is None else _add_delta(y, xa, lora_b, scaling), xa


@fused_op("nf4_linear", reference=_linear_reference)
def _nf4_linear(
    x: Tensor,
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, bias: Tensor | None, interpret: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(y, x A^T): the second is kept for the backward."""
    weight = NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block)
    N, K = weight.shape
    xa = _low_rank(x, lora_a)
    x2, xa2 = rows(x), xa.flatten(0, -2) if xa.dim() > 1 else xa[None]
    M, R = xa2.shape
    dtype, decode = "fp32" if x.dtype == torch.float32 else "16-bit", _decode_branch(weight, x.dtype)
    tile = tune.pick("nf4_linear", tune.arch_of(x.device), dtype=dtype, decode=decode, M=M, N=N, K=K)
    if M == 0:
        return x.new_empty((*x.shape[:-1], N)), xa
    if tile is None or K % tile["BLOCK_K"]:
        return _dense(x2, _dequantize(weight, x.dtype), xa2, lora_b, scaling, bias).view(*x.shape[:-1], N), xa
    work = _kernel_dtype(x.dtype)
    x2 = x2.to(work)
    out = torch.empty((M, N), dtype=work, device=x.device)
    lora = None
    if R:
        low = _kernel_dtype(xa.dtype)
        lora = (xa2.to(low).contiguous(), lora_b.to(low).contiguous())
    grid = (-(-M // tile["BLOCK_M"]) * -(-N // tile["BLOCK_N"]),)
    nf4_linear_fwd_kernel[grid](
        x2, weight.packed, weight.code, weight.scales, lora, None if bias is None else bias.to(work).contiguous(), out,
        x2.stride(0), M, N, K, R, scaling,
        BLOCK_SIZE=block_size, SCALE_BLOCK=scale_block, DECODE=decode, **tile.launch(),
    )  # fmt: skip
    return out.to(x.dtype).view(*x.shape[:-1], N), xa


def _dense(x: Tensor, w: Tensor, xa: Tensor, lora_b: Tensor | None, scaling: float, bias: Tensor | None) -> Tensor:
    """Many tokens: the weight is decoded once and the library's GEMM does the rest.

    With adapters in x's dtype the delta goes first and the large product accumulates onto it: y is read and written
    once more, not twice. Wider adapters stay wide until the one rounding at the end.
    """
    bias = None if bias is None else bias.to(x.dtype)
    if lora_b is None:
        return F.linear(x, w, bias)
    if xa.dtype != x.dtype:
        return _add_delta(F.linear(x, w, bias), xa, lora_b, scaling)
    b = lora_b.to(xa.dtype) * scaling
    y = xa @ b.T if bias is None else torch.addmm(bias, xa, b.T)
    return y.addmm_(x, w.T)


def _dx_reference(
    dy: Tensor,
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    dxa: Tensor | None, lora_a: Tensor | None, interpret: bool,
) -> Tensor:  # fmt: skip
    dx = dy @ nf4_dequantize_ref(NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block), dy.dtype)
    return dx if lora_a is None else (dx + dxa @ lora_a.to(dxa.dtype)).to(dy.dtype)


@fused_op("nf4_linear_dx", reference=_dx_reference)
def _nf4_linear_dx(
    dy: Tensor,
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    dxa: Tensor | None, lora_a: Tensor | None, interpret: bool,
) -> Tensor:  # fmt: skip
    """dX = dY W + d(x A^T) A, all 2-D. The weight is decoded again: nothing dequantized outlives a call."""
    w = _dequantize(NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block), dy.dtype)
    if lora_a is None:
        return dy @ w
    if dxa.dtype != dy.dtype:
        return (dy @ w + dxa @ lora_a.to(dxa.dtype)).to(dy.dtype)
    return (dxa @ lora_a.to(dy.dtype)).addmm_(dy, w)


def _setup_context(ctx, inputs, output) -> None:
    x, packed, code, scales, ctx.block_size, ctx.shape, ctx.w_dtype, ctx.scale_block, lora_a, lora_b, ctx.scaling, bias, ctx.interpret = inputs
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.set_materialize_grads(False)
    low_rank = (None, None) if lora_a is None else (x, output[1])  # dX alone needs neither
    ctx.save_for_backward(packed, code, lora_a, lora_b, *low_rank, *scales)


def _backward(ctx, dy: Tensor | None, dxa: Tensor | None):
    """dx, da, db and dbias, each only where asked for. dxa arrives only where a gradient is differentiated again."""
    packed, code, lora_a, lora_b, x, xa, *scales = ctx.saved_tensors
    needs_x, needs_a, needs_b, needs_bias = (ctx.needs_input_grad[i] for i in (0, 8, 9, 11))
    N, K = ctx.shape
    dx = da = db = dbias = None
    if dy is None:
        dy = x.new_zeros((*x.shape[:-1], N))
    lead = dy.shape[:-1]
    dy = dy.reshape(-1, N).contiguous()  # a gradient of .sum() is expanded, with strides of 0
    if lora_a is not None:
        xa = xa.reshape(-1, xa.shape[-1])
        wide = dy.to(xa.dtype)
        if needs_x or needs_a:
            through_b = wide @ (lora_b.to(xa.dtype) * ctx.scaling)
            dxa = through_b if dxa is None else through_b + dxa.reshape(xa.shape)
        if needs_a:
            da = (dxa.T @ x.reshape(-1, K).to(xa.dtype)).to(lora_a.dtype)
        if needs_b:
            db = ((wide.T @ xa) * ctx.scaling).to(lora_b.dtype)
    if needs_x:
        dx = _nf4_linear_dx(dy, packed, code, scales, ctx.block_size, ctx.shape, ctx.w_dtype, ctx.scale_block, dxa, lora_a, ctx.interpret).view(*lead, K)
    if needs_bias:
        dbias = dy.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return dx, None, None, [None] * len(scales), None, None, None, None, da, db, None, dbias, None


def _dx_setup_context(ctx, inputs, output) -> None:
    _dy, packed, code, scales, ctx.block_size, ctx.shape, ctx.w_dtype, ctx.scale_block, dxa, lora_a, ctx.interpret = inputs
    ctx.save_for_backward(dxa, lora_a, packed, code, *scales)


def _dx_backward(ctx, grad: Tensor):
    """dX is linear in dY, in dxa and in A: so is the way back."""
    dxa, lora_a, packed, code, *scales = ctx.saved_tensors
    grad = grad.contiguous()
    d_dy = _nf4_linear(grad, packed, code, scales, ctx.block_size, ctx.shape, ctx.w_dtype, ctx.scale_block, None, None, 1.0, None, ctx.interpret)[0]
    d_dxa = d_a = None
    if lora_a is not None:
        d_dxa = (grad @ lora_a.to(grad.dtype).T).to(dxa.dtype)
        d_a = (dxa.to(grad.dtype).T @ grad).to(lora_a.dtype)
    return d_dy, None, None, [None] * len(scales), None, None, None, None, d_dxa, d_a, None


_nf4_linear.register_autograd(_backward, setup_context=_setup_context)
_nf4_linear_dx.register_autograd(_dx_backward, setup_context=_dx_setup_context)
