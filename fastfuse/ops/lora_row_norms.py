"""The lengths that DoRA divides by."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.ops._nf4_cpu import decoded_rows
from fastfuse.ops._op import HAS_TRITON, Cost, fused_op, kernel_dtype, nbytes, route, triton_dtype
from fastfuse.ops.nf4_dequantize import decode_branch, nf4_dequantize_ref
from fastfuse.quant.nf4 import NF4View

if HAS_TRITON:
    from fastfuse.kernels.nf4_linear import nf4_row_norms_kernel

# Elements of W + s B A in memory at a time: 8 MiB in bf16, where all of it is 117 MB for 14336 x 4096.
_CHUNK = 1 << 22


@torch.no_grad()
def lora_row_norms(
    weight, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float, dtype: torch.dtype | None = None, *, backend: str | None = None
) -> Tensor:
    """||W + scaling B A|| of every row, (N,) in fp32 (or in a wider dtype of W or A): nothing of W's size is stored, no gradient is recorded.

    weight: [N, K], dense or as NF4View.of takes it; dtype: what it is decoded in, its own where None. lora_a: A (R, K), lora_b: B (N, R),
    or neither. A caller may keep the result while W, A, B and scaling stand still, and hand it to nf4_lora_linear as `norms`.
    """
    if isinstance(weight, Tensor) and type(weight) in (Tensor, torch.nn.Parameter) and not hasattr(weight, "quant_state"):
        return lora_row_norms_ref(weight if dtype is None else weight.to(dtype), lora_a, lora_b, scaling)
    view = NF4View.of(weight)
    dtype = dtype or view.dtype
    chosen = route("lora_row_norms", view.packed, backend)
    if chosen == "reference":
        return lora_row_norms_ref(nf4_dequantize_ref(view, dtype), lora_a, lora_b, scaling)
    return _nf4_row_norms(*view.parts(), dtype, lora_a, lora_b, float(scaling), chosen == "interpreter")


def lora_row_norms_ref(w: Tensor, lora_a: Tensor | None, lora_b: Tensor | None, scaling: float) -> Tensor:
    """The formula, some rows at a time, summed in fp32 at least."""
    dtype = torch.promote_types(w.dtype, torch.float32)
    if lora_a is None:
        return torch.linalg.vector_norm(w, dim=1, dtype=dtype)
    dtype = torch.promote_types(dtype, lora_a.dtype)
    a, b = lora_a.to(dtype), lora_b.to(dtype)
    rows = max(_CHUNK // w.shape[1], 1)
    chunks = zip(w.split(rows), b.split(rows), strict=True)
    return torch.cat([torch.linalg.vector_norm(torch.addmm(part.to(dtype), factor, a, alpha=scaling), dim=1) for part, factor in chunks])


def lora_row_norms_cost(weight, lora_a: Tensor, lora_b: Tensor) -> Cost:
    weight = weight if type(weight) is Tensor else NF4View.of(weight)
    (N, K), R = weight.shape, lora_a.shape[0]
    return Cost(weight.nbytes + nbytes(lora_a, lora_b) + 4 * N, 2 * N * K * (R + 1))


def _reference(
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    dtype: torch.dtype, a: Tensor | None, b: Tensor | None, scaling: float, interpret: bool,
) -> Tensor:  # fmt: skip
    view = NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block)
    return lora_row_norms_ref(nf4_dequantize_ref(view, dtype), a, b, scaling)


def _cpu(
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    dtype: torch.dtype, a: Tensor | None, b: Tensor | None, scaling: float, interpret: bool,
) -> Tensor:  # fmt: skip
    view = NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block)
    parts = [lora_row_norms_ref(w, a, b if b is None else b[row : row + len(w)], scaling) for row, w in decoded_rows(view, dtype)]
    return torch.cat(parts)


@fused_op("nf4_row_norms", reference=_reference, cpu=_cpu)
def _nf4_row_norms(
    packed: Tensor, code: Tensor, scales: Sequence[Tensor], block_size: int, shape: Sequence[int], w_dtype: torch.dtype, scale_block: int,
    dtype: torch.dtype, a: Tensor | None, b: Tensor | None, scaling: float, interpret: bool,
) -> Tensor:  # fmt: skip
    view = NF4View(packed, code, tuple(scales), block_size, tuple(shape), w_dtype, scale_block)
    (N, K), R = shape, 0 if a is None else a.shape[0]
    decode = decode_branch(view, dtype)
    tile = tune.pick("lora_row_norms", tune.arch_of(packed.device), decode=decode, N=N, K=K, R=R)
    if tile is None or K % 64 or (K % tile["BLOCK_K"] and K % block_size):
        return _reference(packed, code, scales, block_size, shape, w_dtype, scale_block, dtype, a, b, scaling, interpret)
    norms = torch.empty(N, dtype=torch.float32, device=packed.device)
    a, b = (t if t is None else t.to(kernel_dtype(t.dtype)).contiguous() for t in (a, b))
    nf4_row_norms_kernel[(-(-N // tile["BLOCK_N"]),)](
        view.packed, view.code, view.scales, a, b, norms, N, K, R, scaling,
        DTYPE=triton_dtype(kernel_dtype(dtype)), BLOCK_SIZE=block_size, SCALE_BLOCK=scale_block, DECODE=decode, CUT_K=K % tile["BLOCK_K"] != 0, **tile.launch(),
    )  # fmt: skip
    return norms
