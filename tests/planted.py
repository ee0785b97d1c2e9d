"""Kernels made worse on purpose, against themselves: what bench.codegen's diff says. Run by test_codegen.py, without the interpreter."""

import json
import tempfile
from dataclasses import asdict, replace
from pathlib import Path

import triton
import triton.language as tl
from triton.compiler import ASTSource

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


def build_of(op: str, words: str, of_name: str = "") -> codegen.KernelBuild:
    """The kernel that calls of these words launch on sm_90."""
    calls = [(each.words, lambda each=each, n=n: each.run(n)) for each in codegen.launches("sm_90") if each.words == words for n in each.counts]
    return next(b for b in codegen.collect("sm_90", calls) if b.op == op and store.holds(b.name, of_name))


def changed(build: codegen.KernelBuild, kernel: triton.JITFunction | None = None, **constants) -> codegen.KernelBuild:
    source, kernel = build.source, kernel or build.source.fn
    by_place = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    return replace(build, source=ASTSource(kernel, source.signature, source.constants | by_place, source.attrs))


def main() -> None:
    decode = build_of("nf4_skinny", "nested bf16 lora -", "16x64x128")
    masked = build_of("cross_attention_fwd", "bits bf16 d128 group 4", " tma")
    product = build_of("patch_embed_fwd", "fp32 w fp32")
    found, keys = {}, {decode.key, masked.key, product.key}
    with tempfile.TemporaryDirectory() as folder:
        store.save([asdict(codegen.report(build)) for build in (decode, masked, product)], "here", Path(folder))

        def compare(name: str, build: codegen.KernelBuild) -> None:
            found[name] = store.compare([asdict(codegen.report(build))], "here", f"{build.op} {build.name}", Path(folder))[1]
            keys.add(codegen.key_of(build))

        compare("as it is", masked)
        compare("registers withheld", replace(decode, options=decode.options | {"maxnreg": 64}))
        compare("products off the matrix unit", changed(product, PRECISION="ieee"))
        cross_attention._visible = _visible_per_head
        codegen._code.cache_clear()
        compare("a mask read for each head", changed(masked, triton.jit(masked.source.fn.fn)))  # a new one: the old one's hash is kept
        fault = codegen.report(replace(decode, options=decode.options | {"num_stages": 48})).problems()
    print(json.dumps({"found": found, "keys": len(keys), "shared": fault}))


if __name__ == "__main__":
    main()
