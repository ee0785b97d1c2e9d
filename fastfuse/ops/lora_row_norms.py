"""The lengths that DoRA divides by."""

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops._nf4_cpu import decoded_rows
from fastfuse.ops._op import HAS_TRITON, Cost, fused_op, kernel_dtype, nbytes, route, triton_dtype
from fastfuse.ops.nf4_dequantize import DTYPES, decode_branch, kernel_weight, nf4_dequantize_ref
from fastfuse.quant.nf4 import NF4View, is_dense

if HAS_TRITON:
    from fastfuse.kernels.nf4_linear import nf4_row_norms_kernel

# Elements of W + s B A in memory at a time: 8 MiB in bf16, where all of it is 117 MB for 14336 x 4096.
_CHUNK = 1 << 22


@torch.no_grad()
def lora_row_norms(
    weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """||W + scaling B A|| of every row, (N,) in fp32 (fp64 where W is): nothing of W's size is stored, no gradient is recorded.

    weight: [N, K], dense or as NF4View.of takes it; dtype: what it is decoded in, its own where None. lora_a: A (R, K), lora_b: B (N, R),
    or neither. A caller may keep the result while W, A, B and scaling stand still, and hand it to nf4_lora_linear as `norms`.
    Raises TypeError or ValueError naming both facts where arguments disagree, Unsupported for a dtype that is not covered.
    """
    dense = is_dense(weight)
    view = weight if dense else NF4View.of(weight)
    dtype = dtype or view.dtype
    _check(view, lora_a, lora_b, scaling, dtype)
    if dense:
        return lora_row_norms_ref(weight.to(dtype), lora_a, lora_b, scaling)
    chosen = route("lora_row_norms", view.packed, backend)
    if chosen == "reference":
        return lora_row_norms_ref(nf4_dequantize_ref(view, dtype), lora_a, lora_b, scaling)
    return _nf4_row_norms(*view.parts(), dtype, lora_a, lora_b, float(scaling), chosen == "interpreter")


def _check(weight, lora_a, lora_b, scaling, dtype: torch.dtype) -> None:
    op = "lora_row_norms"
    dtypes = DTYPES if isinstance(weight, NF4View) else (*DTYPES, torch.float64)
    if dtype not in dtypes:
        raise Unsupported(f"{op}: dtype is {dtype}, covered are bf16, fp16 and fp32")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected [N, K]")
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: lora_{'a' if lora_a is None else 'b'} is None while the other is given: an adapter has both")
    if not isinstance(scaling, (int, float)):
        raise TypeError(f"{op}: scaling is a {type(scaling).__name__}, not a number")
    if lora_a is None:
        return
    N, K = weight.shape
    for name, t in (("lora_a", lora_a), ("lora_b", lora_b)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
        if t.dtype not in dtypes:
            raise Unsupported(f"{op}: {name} is {t.dtype}, covered are bf16, fp16 and fp32")
        if t.device != weight.device:
            raise ValueError(f"{op}: weight is on {weight.device}, {name} on {t.device}")
    if lora_a.dim() != 2 or lora_a.shape[1] != K or lora_a.shape[0] == 0:
        raise ValueError(f"{op}: lora_a has shape {tuple(lora_a.shape)}, expected (R, {K}) with R >= 1")
    if lora_b.shape != (N, lora_a.shape[0]):
        raise ValueError(f"{op}: lora_b has shape {tuple(lora_b.shape)}, expected ({N}, {lora_a.shape[0]})")


def lora_row_norms_ref(w: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """The formula, some rows at a time, summed in fp32 at least."""
    dtype = torch.promote_types(w.dtype, torch.float32)
    if lora_a is None:
        return torch.linalg.vector_norm(w, dim=1, dtype=dtype)
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    rows = max(_CHUNK // w.shape[1], 1)
    chunks = zip(w.split(rows), b.split(rows), strict=True)
    with contextlib.nullcontext() if w.is_meta else torch.autocast(w.device.type, enabled=False):
        return torch.cat([torch.linalg.vector_norm(torch.addmm(part.to(dtype), factor, a, alpha=scaling), dim=1) for part, factor in chunks])


def lora_row_norms_cost(weight, lora_a: Tensor | None, lora_b: Tensor | None) -> Cost:
    weight = weight if is_dense(weight) else NF4View.of(weight)
    (N, K), R = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    return Cost(weight.nbytes + nbytes(lora_a, lora_b) + 4 * N, 2 * N * K * (R + 1))


def _reference(packed: Tensor, *args) -> Tensor:
    *parts, dtype, a, b, scaling, _interpret = args
    return lora_row_norms_ref(nf4_dequantize_ref(NF4View.from_parts(packed, *parts), dtype), a, b, scaling)


def _cpu(packed: Tensor, *args) -> Tensor:
    *parts, dtype, a, b, scaling, _interpret = args
    chunks = decoded_rows(NF4View.from_parts(packed, *parts), dtype)
    return torch.cat([lora_row_norms_ref(w, a, b if b is None else b[row : row + len(w)], scaling) for row, w in chunks])


@fused_op("nf4_row_norms", reference=_reference, cpu=_cpu)
def _nf4_row_norms(
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    dtype: torch.dtype, a: Tensor | None, b: Tensor | None, scaling: float, interpret: bool,
) -> Tensor:  # fmt: skip
    view = NF4View.from_parts(packed, code, scales, block_size, shape, w_dtype, scale_block)
    (N, K), R = shape, 0 if a is None else a.shape[0]
    decode = decode_branch(view, dtype)
    tile = tune.pick("lora_row_norms", tune.arch_of(packed.device), decode=decode, N=N, K=K, R=R)
    if tile is None or K % 64 or (K % tile["BLOCK_K"] and K % block_size):
        return _reference(packed, code, scales, block_size, shape, w_dtype, scale_block, dtype, a, b, scaling, interpret)
    norms = torch.empty(N, dtype=torch.float32, device=packed.device)
    a, b = (t if t is None else t.to(kernel_dtype(t.dtype)).contiguous() for t in (a, b))
    nf4_row_norms_kernel[(-(-N // tile["BLOCK_N"]),)](
        kernel_weight(view), a, b, norms, N, K, R, scaling,
        DTYPE=triton_dtype(kernel_dtype(dtype)), BLOCK_SIZE=block_size, SCALE_BLOCK=scale_block, DECODE=decode, CUT_K=K % tile["BLOCK_K"] != 0, **tile.launch(),
    )  # fmt: skip
    return norms
