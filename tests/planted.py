"""Kernels made worse on purpose, against themselves: what bench.codegen's diff says. Run by test_codegen.py, without the interpreter."""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import triton
import triton.language as tl

from bench import codegen
from bench import codegen_store as store
from fastfuse.kernels import cross_attention


@triton.jit
def _visible_per_head(mask, b, t, ok, lo, hi, n0, end, shape, BLOCK_N: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr):
    """As _visible of a mask with a row of bits for each of two heads."""
    n = tl.arange(0, BLOCK_N)[None, :]
    words = shape[1] // 32
    seen = tl.full([1, BLOCK_N], 1, tl.int32)
    for head in tl.static_range(2):
        at = mask[0] + ((b * 2 + head).to(tl.int64) * shape[0] + t) * words + n0 // 32
        word = tl.load(at, mask=ok, other=0)[:, None]
        for i in tl.static_range(1, BLOCK_N // 32):
            word = tl.where(n >= 32 * i, tl.load(at + i, mask=ok, other=0)[:, None], word)
        seen = seen & (word >> (n % 32))
    return (seen & 1) != 0


def _specimen(op: str, words: str) -> codegen.Specimen:
    return next(s for s in codegen.specimens() if s.arch == "sm_90" and s.op == op and store.holds(s.name, words))


def _report(specimen: codegen.Specimen) -> dict:
    return asdict(codegen.report(specimen))


def main() -> None:
    decode = _specimen("nf4_skinny", "nested bf16 lora - 16x64x128")
    masked = _specimen("cross_attention", "bits bf16 d128 tma")
    product = _specimen("patch_embed", "gemm w fp32")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        store.save([_report(s) for s in (decode, masked, product)], "here", Path(folder))

        def compare(name: str, specimen: codegen.Specimen) -> None:
            found[name] = store.compare([_report(specimen)], "here", f"{specimen.op} {specimen.name}", Path(folder))[1]

        compare("as it is", masked)
        compare("registers withheld", replace(decode, options=decode.options | {"maxnreg": 64}))
        compare("products off the matrix unit", replace(product, constants=product.constants | {"PRECISION": "ieee"}))
        cross_attention._visible = _visible_per_head
        compare("a mask read for each head", replace(masked, kernel=triton.jit(masked.kernel.fn)))  # a new one: the old one's hash is kept
    print(json.dumps(found))


if __name__ == "__main__":
    main()
