"""x W^T and dY W over an NF4 weight on a CPU: W is decoded a few rows at a time and multiplied while still in cache."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from fastfuse.ops.nf4_dequantize import block_scales, nf4_dequantize_ref
from fastfuse.quant.nf4 import NF4View

CHUNK = 1 << 20  # elements decoded at once


def linear(x: Tensor, weight: NF4View, bias: Tensor | None = None) -> Tensor:
    """x W^T + bias: x [M, K] -> [M, N] in x's dtype, summed in fp32 and rounded once."""
    out = x.new_empty(len(x), weight.shape[0])
    xt = x.float().T
    for row, w in decoded_rows(weight, x.dtype):
        y = w @ xt if bias is None else torch.addmm(bias[row : row + len(w), None].float(), w, xt)
        out[:, row : row + len(w)] = y.T
    return out


def linear_dx(dy: Tensor, weight: NF4View) -> Tensor:
    """dY W: dY [M, N] -> [M, K] in dY's dtype, summed in fp32 and rounded once."""
    out = dy.new_zeros(len(dy), weight.shape[1], dtype=torch.float32)
    wide = dy.float()
    for row, w in decoded_rows(weight, dy.dtype):
        out.addmm_(wide[:, row : row + len(w)], w)
    return out.to(dy.dtype)


def decoded_rows(weight: NF4View, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
    """(first row, rows of W) over all of W: nf4_dequantize_ref's values in `dtype`, held in fp32. Rows live until the next step."""
    (N, K), size = weight.shape, weight.block_size
    if N * K % size:
        yield 0, nf4_dequantize_ref(weight, dtype).float()
        return
    # torchao's product rounds to the weight's dtype first. Two 16-bit factors are exact in fp32: rounding that is the same.
    steps = [d for d in ((weight.dtype, dtype) if len(weight.scales) == 3 else (dtype,)) if d != torch.float32]
    code = weight.code.float()
    pairs = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1).view(torch.int64).view(-1)  # both elements of a byte as one
    scale = block_scales(weight).float()
    least = max(size // math.gcd(size, K), 16)  # a chunk ends where a block ends
    rows = min(max(CHUNK // K // least, 1) * least, N)
    index, decoded = torch.empty(rows * K // 2, dtype=torch.int32, device="cpu"), torch.empty(rows * K, dtype=torch.float32, device="cpu")
    rounded = [torch.empty(rows * K, dtype=d, device="cpu") for d in steps]
    for row in range(0, N, rows):
        count = min(rows, N - row) * K
        w = decoded[:count]
        torch.index_select(pairs, 0, index[: count // 2].copy_(weight.packed[row * K // 2 :][: count // 2]), out=w.view(torch.int64))
        w.view(-1, size).mul_(scale[row * K // size :][: count // size, None])
        for narrow in rounded:
            w.copy_(narrow[:count].copy_(w))
        yield row, w.view(-1, K)
