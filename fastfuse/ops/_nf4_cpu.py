"""x W^T and dY W over an NF4 weight on a CPU: by the C library, without one W is decoded a few rows at a time and multiplied while still in cache."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.ops import _cpu_library
from fastfuse.ops.nf4_dequantize import block_scales, nf4_dequantize_ref
from fastfuse.quant.nf4 import NF4View

CHUNK = 1 << 20  # elements decoded at once
_BYTES = torch.arange(256, dtype=torch.int32, device="cpu")
_NIBBLES = torch.stack([_BYTES >> 4, _BYTES & 15], dim=1).view(-1)  # of both elements of every byte


def linear(x: Tensor, weight: NF4View, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x [M, K] -> [M, N] in x's dtype, summed in fp32 and rounded once."""
    if _cpu_library.library():
        if not _cpu_library.is_for_gemm(len(x), weight.shape[1], x.dtype):
            return _cpu_library.linear(x, weight, weight, *weight.shape, bias)[0]
        return F.linear(x, _cpu_library.dequantize(weight, weight, weight.shape, x.dtype), bias if bias is None else bias.to(x.dtype))
    wide, bias = x.float(), bias if bias is None else bias.float()
    out = None
    for row, w in decoded_rows(weight, x.dtype):
        if len(w) == weight.shape[0]:
            return F.linear(wide, w, bias).to(x.dtype)
        out = x.new_empty(len(x), weight.shape[0]) if out is None else out
        # w first: 5% faster than F.linear at 64 tokens
        y = w @ wide.T if bias is None else torch.addmm(bias[row : row + len(w), None], w, wide.T)
        out[:, row : row + len(w)] = y.T
    return out


def linear_dx(dy: Tensor, weight: NF4View) -> Tensor:
    """dY W: dY [M, N] -> [M, K] in dY's dtype, summed in fp32 and rounded once."""
    if _cpu_library.library():
        gemm = _cpu_library.is_for_gemm(len(dy), weight.shape[1], dy.dtype)
        return dy @ _cpu_library.dequantize(weight, weight, weight.shape, dy.dtype) if gemm else _cpu_library.linear_dx(dy, weight)
    wide, out = dy.float(), None
    for row, w in decoded_rows(weight, dy.dtype):
        part = wide[:, row : row + len(w)]
        out = part @ w if out is None else out.addmm_(part, w)
    return out.to(dy.dtype)


def decoded_rows(weight: NF4View, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of W) over all of W: nf4_dequantize_ref's values in `dtype`, held in fp32. Rows live until the next step."""
    (N, K), size = weight.shape, weight.block_size
    if _cpu_library.library():
        rows = max(CHUNK // K, 1)
        for row in range(0, N, rows):
            yield row, _cpu_library.dequantize(weight, weight, weight.shape, dtype, row, min(rows, N - row)).float()
        return
    if N * K % size:
        yield 0, nf4_dequantize_ref(weight, dtype).float()
        return
    # torchao's product rounds to the weight's dtype first. Two 16-bit factors are exact in fp32: rounding that is the same.
    steps = [d for d in ((weight.dtype, dtype) if len(weight.scales) == 3 else (dtype,)) if d != torch.float32]
    pairs = weight.code.float().index_select(0, _NIBBLES).view(torch.int64)  # both elements of a byte as one
    least = max(size // math.gcd(size, K), 16)  # a chunk ends where a block ends
    rows = min(max(CHUNK // K // least, 1) * least, N)
    scale = block_scales(weight).float()[:, None]
    if rows == N:
        w = pairs.index_select(0, weight.packed.int()).view(torch.float32)
        w.view(-1, size).mul_(scale)
        for narrow in steps:
            w.copy_(w.to(narrow))
        yield 0, w.view(N, K)
        return
    # The buffers serve every chunk: fresh ones cost 5% in page faults, but a small weight pays for cutting them to size.
    index, decoded = torch.empty(rows * K // 2, dtype=torch.int32, device="cpu"), torch.empty(rows * K, dtype=torch.float32, device="cpu")
    rounded = [torch.empty(rows * K, dtype=d, device="cpu") for d in steps]
    for row in range(0, N, rows):
        count = min(rows, N - row) * K
        w = decoded[:count]
        torch.index_select(pairs, 0, index[: count // 2].copy_(weight.packed[row * K // 2 :][: count // 2]), out=w.view(torch.int64))
        w.view(-1, size).mul_(scale[row * K // size :][: count // size])
        for narrow in rounded:
            w.copy_(narrow[:count].copy_(w))
        yield row, w.view(-1, K)
