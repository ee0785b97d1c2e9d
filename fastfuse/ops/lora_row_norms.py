"""The lengths that DoRA divides by."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import NF4Weight
from fastfuse.ops._fused_op import fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._nf4_cpu import decoded_rows
from fastfuse.ops._op import HAS_TRITON, Cost, Plan, kernel_dtype, nbytes, no_autocast, number, route, triton_dtype
from fastfuse.ops.nf4_dequantize import DTYPES, decode_branch, nf4_dequantize_ref
from fastfuse.quant.nf4 import Layout, NF4View, is_dense, view_of

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
    scaling = number(scaling, view.packed if isinstance(view, NF4View) else view)
    if dense:
        return lora_row_norms_ref(weight.to(dtype), lora_a, lora_b, scaling)
    chosen = route("lora_row_norms", view.packed, backend)
    args = RowNormsArgs(view.tensors(), Layout.of(view), view.shape, dtype, lora_a, lora_b, scaling, chosen == "interpreter")
    return (_reference if chosen == "reference" else row_norms)(args)[0]


def _check(weight, lora_a, lora_b, scaling, dtype: torch.dtype) -> None:
    op = "lora_row_norms"
    dtypes = DTYPES if isinstance(weight, NF4View) else (*DTYPES, torch.float64)
    if dtype not in dtypes:
        raise Unsupported(f"{op}: dtype is {dtype}, covered are bf16, fp16 and fp32")
    if len(weight.shape) != 2:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected [N, K]")
    if (lora_a is None) != (lora_b is None):
        raise ValueError(f"{op}: lora_{'a' if lora_a is None else 'b'} is None while the other is given: an adapter has both")
    if not isinstance(scaling, (int, float)) and not torch.compiler.is_dynamo_compiling():
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
    b, scaling = (b * scaling, 1.0) if isinstance(scaling, Tensor) else (b, scaling)
    rows = max(_CHUNK // w.shape[1], 1)
    chunks = zip(w.split(rows), b.split(rows), strict=True)
    with no_autocast(w.device):
        return torch.cat([torch.linalg.vector_norm(torch.addmm(part.to(dtype), factor, a, alpha=scaling), dim=1) for part, factor in chunks])


def lora_row_norms_cost(weight, lora_a: Tensor | None, lora_b: Tensor | None) -> Cost:
    weight = weight if is_dense(weight) else NF4View.of(weight)
    (N, K), R = weight.shape, 0 if lora_a is None else lora_a.shape[0]
    return Cost(weight.nbytes + nbytes(lora_a, lora_b) + 4 * N, 2 * N * K * (R + 1))


class RowNormsArgs(NamedTuple):
    weight: NF4Weight
    layout: Layout
    shape: tuple[int, int]
    dtype: torch.dtype
    a: Tensor | None
    b: Tensor | None
    scaling: float | Tensor
    interpret: bool


def _reference(args: RowNormsArgs) -> tuple[Tensor]:
    w = nf4_dequantize_ref(view_of(args.weight, args.layout, args.shape), args.dtype)
    return (lora_row_norms_ref(w, args.a, args.b, args.scaling),)


def _on_cpu(args: RowNormsArgs) -> tuple[Tensor]:
    a, b, chunks = args.a, args.b, decoded_rows(view_of(args.weight, args.layout, args.shape), args.dtype)
    return (torch.cat([lora_row_norms_ref(w, a, b if b is None else b[row : row + len(w)], args.scaling) for row, w in chunks]),)


def _launch(args: RowNormsArgs) -> Plan:
    (N, K), R, size = args.shape, 0 if args.a is None else args.a.shape[0], args.layout.block_size
    decode = decode_branch(args.weight, args.layout, args.dtype)
    tile = tune.pick("lora_row_norms", tune.arch_of(args.weight.packed.device), decode=decode, N=N, K=K, R=R)
    if tile is None or K % 64 or (K % tile["BLOCK_K"] and K % size):
        return _reference
    grid = -(-N // tile["BLOCK_N"]), 1, 1
    measure = Launch(
        nf4_row_norms_kernel, DTYPE=triton_dtype(kernel_dtype(args.dtype)), BLOCK_SIZE=size, SCALE_BLOCK=args.layout.scale_block, DECODE=decode,
        CUT_K=K % tile["BLOCK_K"] != 0, **tile.launch(),
    )  # fmt: skip

    def run(args):
        a, b, scaling = args.a, args.b, args.scaling
        if isinstance(scaling, Tensor):
            b, scaling = None if b is None else b.float() * scaling, 1.0
        norms = torch.empty(N, dtype=torch.float32, device=args.weight.packed.device)
        a, b = (t if t is None else t.to(kernel_dtype(t.dtype)).contiguous() for t in (a, b))
        measure(grid, args.weight, a, b, norms, N, K, R, scaling)
        return (norms,)

    return run


row_norms = fused_op("nf4_row_norms", RowNormsArgs, Layout, reference=_reference, launch=_launch, cpu=_on_cpu)
