"""The byte-permute decode, executed instruction by instruction on the CPU: the interpreter cannot run inline assembly."""

import re
from operator import and_, mul, rshift

import numpy as np
import pytest
import torch
from numerics import assert_no_worse

from cases.weights import quantize, random_weight
from fastfuse.kernels.nf4 import codebook_values, exact_asm, scaled_asm
from fastfuse.ops import nf4_dequantize_ref
from fastfuse.ops.nf4_dequantize import block_scales
from fastfuse.quant import NF4View

STORED = [(False, "fp32", "bf16"), (False, "fp32", "fp16"), (True, "bf16", "bf16")]
TORCH = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def prmt(a, b, select):
    """PTX prmt.b32: four bytes of the eight in {b, a}; selector bit 3 would replicate a sign."""
    both = a.astype(np.uint64) | b.astype(np.uint64) << np.uint64(32)
    out = np.zeros_like(both)
    for i in range(4):
        nibble = select >> np.uint64(4 * i) & np.uint64(15)
        assert not (nibble & np.uint64(8)).any(), "a selector's sign bit is set"
        out |= (both >> nibble * np.uint64(8) & np.uint64(255)) << np.uint64(8 * i)
    return out


PLAIN = {"prmt.b32": prmt, "and.b32": and_, "shr.b32": rshift, "mul.rn.f32": mul}


def halves(word, dtype):
    """Both 16-bit halves of a word as fp32 numbers, low first."""
    pair = torch.from_numpy(np.stack([word & 0xFFFF, word >> np.uint64(16)], -1).astype(np.uint16).view(np.int16))
    return pair.view(TORCH[dtype]).float()


def packed(low, high, dtype):
    bits = [t.to(TORCH[dtype]).view(torch.int16).numpy().view(np.uint16).astype(np.uint64) for t in (low, high)]
    return bits[0] | bits[1] << np.uint64(16)


def execute(asm, words, scales, dtype):
    """Run the block on many packed words at once. scales: four of one or of every word's fp32 scales, one per byte, as the block's $5..$8 hold them."""
    exact = ".f32 f0" in asm
    r = {"$4": words.astype(np.uint64)} | {f"${5 + i}": s if exact else packed(s, s, dtype) for i, s in enumerate(scales)}

    def get(x):
        return np.uint64(int(x, 0)) * np.ones_like(r["$4"]) if re.match(r"\d", x) else r[x]

    for line in asm.splitlines():
        line = line.strip().rstrip(";")
        if not line or line in "{}" or line.startswith(".reg"):
            continue
        op, operands = line.split(None, 1)
        dst, *args = [a.strip() for a in operands.split(",")]
        a = [get(x) for x in args]
        if op in PLAIN:
            r[dst] = PLAIN[op](*a)
        elif op == "lop3.b32":
            assert args[3] == "0xEA"  # (a & b) | c
            r[dst] = a[0] & a[1] | a[2]
        elif op == "mov.b32":
            r[dst] = torch.from_numpy(a[0].astype(np.uint32).view(np.float32)) if dst.startswith("f") else a[0]
        elif op.startswith("cvt.rn."):
            r[dst] = packed(a[1], a[0], dtype)  # the first source goes to the high half
        elif op.startswith("fma.rn."):
            product = halves(a[0], dtype) * halves(a[1], dtype) + halves(a[2], dtype)  # exact in fp32 before the one rounding
            r[dst] = packed(product[:, 0], product[:, 1], dtype)
        else:
            raise AssertionError(f"no meaning for {line}")
    return torch.stack([halves(r[f"${i}"], dtype) for i in range(4)], 1).flatten(1)  # [words, 8], in memory order


def words_and_codes():
    """Every pair of bytes in the low and in the high half of a word: 131,072 words."""
    pair = np.arange(65536, dtype=np.uint64)
    words = np.concatenate([pair | (pair * 40503 % 65536) << 16, (pair * 40503 % 65536) | pair << 16])
    per_byte = np.stack([words >> 8 * i & 255 for i in range(4)], 1)
    codes = np.stack([per_byte >> 4, per_byte & 15], -1).reshape(len(words), 8)
    return words, torch.from_numpy(codes.astype(np.int64))


@pytest.mark.parametrize("torchao, w_dtype, out", STORED)
def test_decode_of_every_byte_pair(torchao, w_dtype, out):
    """The exact decode multiplies in fp32, the scaled one takes table and scale in the result's dtype."""
    words, codes = words_and_codes()
    table = torch.tensor(codebook_values(torchao, w_dtype))
    for asm, scale_dtype, values in ((exact_asm, w_dtype, table), (scaled_asm, out, table.to(TORCH[out]).float())):
        scales = torch.tensor([0.0123, 1.7, 3e-5, 250.0]).to(TORCH[scale_dtype]).float()
        got = execute(asm(torchao, w_dtype, out), words, scales[:, None], out)
        assert torch.equal(got, (values[codes] * scales.repeat_interleave(2)).to(TORCH[out]).float()), asm.__name__


@pytest.mark.parametrize("storage, out", [("nested", "bf16"), ("nested", "fp16"), ("torchao", "bf16")])
def test_scaled_decode_keeps_the_tolerance(storage, out):
    """Its 16-bit table and scale stay within the rule: y = x W^T no worse than twice eager's error."""
    N, K = 256, 1024
    weight = NF4View.of(quantize(random_weight(N, K, TORCH[out]), storage))
    torchao = storage == "torchao"
    asm = scaled_asm(torchao, out if torchao else "fp32", out)
    scale = block_scales(weight).float().repeat_interleave(8)  # words of a block
    w = execute(asm, weight.packed.numpy().view(np.uint32), [scale] * 4, out).view(N, K)
    x = torch.randn(16, K, dtype=TORCH[out])
    exact = x.double() @ nf4_dequantize_ref(weight, torch.float64).T
    eager = x @ nf4_dequantize_ref(weight, TORCH[out]).T
    assert_no_worse((x.float() @ w.T).to(TORCH[out]), eager, exact)
    if torchao:
        assert torch.equal(w, nf4_dequantize_ref(weight, TORCH[out]).float())
