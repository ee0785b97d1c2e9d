"""Calls of every op in its variants, forward and backward, at the sizes of Llama-3.2-Vision 11B and of SmolVLM: what bench.codegen collects kernels of.

They run on meta tensors, where nothing is computed and no memory is needed.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from cases.embedding import SCALE, SHIFT, Embedding
from cases.embedding import Size as Images
from fastfuse import ops, tune
from fastfuse.ops._linear_group import Projection
from fastfuse.quant.nf4 import NF4View

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DTYPES = {"bf16": BF16, "fp16": FP16, "fp32": FP32, "u8": torch.uint8}
SQUARE, QKV, NARROW = ((4096, 4096),), ((4096, 4096), (1024, 4096), (1024, 4096)), ((2560, 960),)  # N, K; SmolVLM's widths are odd multiples of 64
# Blocks that share one factor: QLoRA of the vision encoder asks torchao for 200, which is no shift.
SCALE_BLOCKS = {"torchao/200": 200}


class Launch(NamedTuple):
    """A call in one variant. `words` tell it from the others of its op, and so a kernel that it launches first."""

    op: str
    words: str
    run: Callable[[int], object]  # with so many tokens, or images
    counts: tuple[int, ...]  # of the base variant those of all sizes
    arch: str = ""  # compiled for this one alone; empty: for all


def launches(arch: str) -> Iterator[Launch]:
    """In the order by which kernels that several calls launch are named."""
    for each in (*_dequantize(), *_norms(), *_adapters(), *_linears(arch), *_masks(), *_attention(arch), *_caches(), *_patches(), *_odd()):
        if each.arch in ("", arch):
            yield each


def boundaries(arch: str, *names: str) -> tuple[int, ...]:
    """Numbers of rows on either side of each boundary that these ops' rows draw."""
    most = [row["when"]["M_max"] for op in names for row in tune.table(op) if row["arch"] == arch and "M_max" in row["when"]]
    return tuple(sorted({*most, max(most, default=0) + 1}))


def empty(*shape: int, dtype: torch.dtype = BF16, grad: bool = False, device: str = "meta") -> Tensor:
    return torch.zeros(shape, dtype=dtype, device=device, requires_grad=grad)


def differentiate(*outs: Tensor, wrt: list[Tensor]) -> None:
    torch.autograd.grad(outs, wrt, [torch.empty_like(y) for y in outs])


def weight(storage: str, N: int, K: int, dtype: torch.dtype = BF16) -> NF4View:
    n, each = N * K, SCALE_BLOCKS.get(storage, 256)
    blocks = -(-n // 64)
    groups, packed, byte = -(-blocks // each), empty(-(-n // 2), dtype=torch.uint8), torch.uint8
    if storage.startswith("torchao"):
        scales = (empty(blocks, dtype=torch.int8), empty(groups, dtype=dtype), empty(dtype=dtype))
        return NF4View(packed, empty(16, dtype=dtype), scales, 64, (N, K), dtype, each)
    nested = (empty(blocks, dtype=byte), empty(256, dtype=FP32), empty(groups, dtype=FP32), empty(dtype=FP32))
    return NF4View(packed, empty(16, dtype=FP32), (empty(blocks, dtype=FP32),) if storage == "flat" else nested, 64, (N, K), dtype)


def _dequantize() -> Iterator[Launch]:
    for storage in ("nested", "flat", "torchao", "torchao/200"):
        for short in ("bf16", "fp16", "fp32"):
            yield Launch("nf4_dequantize", f"{storage} {short}", lambda _, s=storage, t=DTYPES[short]: ops.nf4_dequantize(weight(s, 4096, 4096, t), t), (1,))
    yield Launch("nf4_dequantize", "nested bf16", lambda _: ops.nf4_dequantize(weight("nested", 33, 64), BF16), (1,))  # the last program's part is cut


def _norms() -> Iterator[Launch]:
    for storage, short, low in (("nested", "bf16", "bf16"), ("torchao", "bf16", "fp32"), ("flat", "fp16", "fp16"), ("nested", "bf16", "-")):

        def run(_: int, storage: str = storage, dtype: torch.dtype = DTYPES[short], low: str = low) -> None:
            pair = (None, None) if low == "-" else (empty(16, 4096, dtype=DTYPES[low]), empty(4096, 16, dtype=DTYPES[low]))
            ops.lora_row_norms(weight(storage, 4096, 4096, dtype), *pair, 2.0, dtype)

        yield Launch("lora_row_norms", f"{storage} {short} lora {low}", run, (1,))


def projection(base: NF4View | Tensor, R: int, low: torch.dtype, dora: bool = False, bias: bool = False) -> Projection:
    N, K = base.shape
    dtype = base.dtype
    a, b = (empty(R, K, dtype=low, grad=True), empty(N, R, dtype=low, grad=True)) if R else (None, None)
    return Projection(base, a, b, 2.0, empty(N, dtype=dtype, grad=True) if bias else None, empty(N, dtype=FP32, grad=True) if dora else None)


def step(x: Tensor, projections: list[Projection], dropout: float = 0.0, backward: bool = True) -> None:
    """Linear layers that share x, and the gradients of x and of all that is trained."""
    ys = ops.nf4_lora_linears(x, projections, dropout_p=dropout, training=True)
    if backward:
        differentiate(*ys, wrt=[x, *(t for p in projections for t in p[1:] if isinstance(t, Tensor))])


def _adapters() -> Iterator[Launch]:
    """Over a dense weight, which launches nothing of its own."""
    for short, low in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")):
        for dropout, R in ((False, 16), (True, 16), (True, 32), (True, 64)):

            def run(M: int, dtype=DTYPES[short], low=DTYPES[low], dropout=dropout, R=R) -> None:
                x, p = empty(M, 4096, dtype=dtype, grad=True), projection(empty(4096, 4096, dtype=dtype), R, low)
                differentiate(ops.lora_linear(x, *p[:4], dropout_p=0.05, training=dropout), wrt=[x, p.lora_a, p.lora_b])

            yield Launch("lora_grad", f"{short} {low}{' dropout' if dropout else ''} R{R}", run, (512, 4096) if R == 16 else (4096,))


def _linears(arch: str) -> Iterator[Launch]:
    """PEFT keeps adapters in fp32, "-" is a plain linear with a bias. Tiles that differ in the number of splits alone are one kernel's, but for that
    which adds them up: of those the one with most."""
    counts, few = boundaries(arch, "nf4_linear", "nf4_linear_dx"), (16,)

    def one(words: str, sizes: tuple = SQUARE, at: tuple[int, ...] = counts, dropout: float = 0.0, dora: bool = False, backward: bool = True) -> Launch:
        storage, x, _, low, *_ = words.split()
        R, dtype = 0 if low == "-" else 16, DTYPES[x]

        def run(M: int) -> None:
            made = [projection(weight(storage, N, K, dtype), R, DTYPES.get(low, dtype), dora, bias=not R) for N, K in sizes]
            step(empty(M, sizes[0][1], dtype=dtype, grad=True), made, dropout, backward)

        return Launch("nf4_linear", words, run, at)

    yield one("nested bf16 lora bf16")
    yield one("nested bf16 lora bf16", ((1024, 4096),), few)
    for words in ("nested bf16 lora bf16", "nested bf16 lora fp32", "nested bf16 lora -", "torchao bf16 lora bf16"):
        yield one(words, NARROW, few, backward=False)
    for words in ("flat bf16 lora bf16", "torchao bf16 lora bf16", "nested fp16 lora -"):
        yield one(words)
    for words in ("nested bf16 lora fp32", "nested bf16 lora -", "torchao bf16 lora fp32", "torchao/200 bf16 lora bf16", "flat fp16 lora fp16"):
        yield one(words, backward=False)
    yield one("nested bf16 lora bf16 x3", QKV)
    yield one("nested bf16 lora bf16 factor", dora=True, backward=False)
    yield one("torchao bf16 lora bf16 factor", at=counts[1:], dora=True)
    yield one("nested bf16 lora fp32 dropout", dropout=0.05)
    yield one("nested fp32 lora fp32", at=counts[-1:])

    def mlp(M: int) -> None:
        x, layers = empty(M, 4096, grad=True), [projection(weight("nested", N, K), 16, BF16) for N, K in ((14336, 4096), (14336, 4096), (4096, 14336))]
        differentiate(ops.nf4_swiglu_mlp(x, *layers), wrt=[x, *(t for p in layers for t in p[1:3])])

    yield Launch("nf4_swiglu_mlp", "nested bf16 lora bf16 of an MLP", mlp, few)


def mask_of(kind: str, s: int, s_e: int, masks: int = 1, device: str = "meta") -> ops.EncoderMask | None:
    if kind == "none":
        return None
    words = (2,) if kind == "interval" else (4 * -(-s_e // 128),)
    return ops.EncoderMask(kind, empty(masks, s, *words, dtype=torch.int32, device=device), empty(masks, s, dtype=torch.bool, device=device), s_e)


def _masks() -> Iterator[Launch]:
    # By flags in fours where the mask's rows allow it, or one at a time.
    yield Launch("encoder_mask", "dense by 4", lambda s: ops.EncoderMask.from_dense(empty(1, s, 6404, dtype=torch.bool)), (4096,))
    yield Launch("encoder_mask", "dense by 1", lambda s: ops.EncoderMask.from_dense(empty(1, s, 1601, dtype=torch.bool)), (4096,))
    yield Launch("encoder_mask", "tiles", lambda s: ops.EncoderMask.from_tiles(empty(1, s, 1, 4, dtype=torch.bool), 1601), (4096,))


def attend(
    tokens: int, kind: str, hq: int = 32, hkv: int = 8, d: int = 128, dtype: torch.dtype = BF16, s_e: int = 6404, b: int = 1,
    aligned: bool = True, of_lse: bool = False,
) -> None:  # fmt: skip
    """Forward and backward, of v alone too. aligned: so that TMA takes it; 8 bytes off it does not. of_lse: with a gradient of the log-sum-exp as well."""
    off = 0 if aligned else 8 // dtype.itemsize

    def heads(n: int, h: int) -> Tensor:
        return empty(off + b * n * h * d, dtype=dtype)[off:].view(b, n, h, d).transpose(1, 2).requires_grad_()

    q, k, v = heads(tokens, hq), heads(s_e, hkv), heads(s_e, hkv)
    o, lse = ops.cross_attention(q, k, v, mask_of(kind, tokens, s_e), return_lse=True)
    for outs, wrt in (((o,), (q, k, v)), ((o,), (v,)), *([((o, lse), (q, k, v))] if of_lse else [])):
        torch.autograd.grad(outs, wrt, [torch.empty_like(y) for y in outs], retain_graph=True)


def decode(batch: int, s_e: int, d: int = 128, heads: int = 8, dtype: torch.dtype = BF16, new: int = 1, compact: bool = True, device: str = "meta") -> None:
    """Tokens into a cache, and a step of decoding over it: lengths are its mask, or bits where hidden tokens stay in their columns. The op that writes into
    the cache changes its arguments: of meta tensors it launches nothing."""
    cache = ops.StaticKVCache(batch, heads, d, s_e, dtype, device=device)
    new_k = empty(batch, s_e, heads, d, dtype=dtype, device=device).transpose(1, 2)
    cache.fill(new_k, new_k, mask_of("bits", 4, s_e, batch, device), compact=compact)
    ops.cross_attention_decode(empty(batch, new, 4 * heads, d, dtype=dtype, device=device).transpose(1, 2), cache)


def _attention(arch: str) -> Iterator[Launch]:
    def one(words: str, G: int = 4, counts: tuple[int, ...] = (4096,), only: str = "", **more: bool) -> Launch:
        kind, short, d, *_ = words.split()
        heads = {"hq": 8 * G, "hkv": 8, "d": int(d[1:]), "dtype": DTYPES[short]}
        return Launch("cross_attention", words, partial(attend, kind=kind, **heads, **more), counts, only)

    yield one("bits bf16 d128 group 4", counts=(4, 4096), of_lse=True)
    yield from (one(words) for words in ("interval bf16 d128 group 4", "bits bf16 d256 group 4", "interval bf16 d256 group 4"))
    yield from (one(f"{kind} fp32 d128 group 4") for kind in ("bits", "interval"))
    for only in ("sm_90", "sm_100"):  # whose rows ask for TMA
        yield from (one(f"bits bf16 d{d} group 4 not aligned", only=only, aligned=False) for d in (128, 256))
        yield one("none bf16 d128 group 4", counts=(4, 4096), only=only)
    yield one("bits bf16 d96 group 3", 3, (4, 4096), "sm_90")
    yield one("bits fp16 d64 group 1", 1, (4, 4096), "sm_90")
    for short, d, batch in (("bf16", 128, 1), ("bf16", 256, 1), ("fp32", 128, 1), ("bf16", 128, 256)):
        words = f"lengths {short} d{d} group 4" + (" unsplit" if batch > 1 else "")
        yield Launch("cross_attention", words, lambda new, t=DTYPES[short], d=d, b=batch: decode(b, 6404, d, dtype=t, new=new), (1, 32) if batch == 1 else (1,))


def _caches() -> Iterator[Launch]:
    for short, d, compact in (("bf16", 128, True), ("bf16", 80, False), ("fp32", 128, True)):
        words = f"{short} d{d}{' compacted' if compact else ''}"
        run = partial(decode, s_e=1601, d=d, dtype=DTYPES[short], compact=compact, device="cpu")
        yield Launch("kv_cache_write", words, run, (1,))


def embed(
    size: Images, dtype: torch.dtype = BF16, pixels: torch.dtype | None = None, positions: torch.dtype | None = None, bias: bool = False, trained: bool = True
) -> None:
    """Forward, and backward of everything unless nothing is trained. positions: the dtype of all tables where it is another one than the weight's."""
    e, tables = Embedding(size, dtype, "meta"), positions or dtype
    for name in ("cls", "positions", "pre"):
        if (module := getattr(e, name)) is not None:
            module.to(tables)
    images, ratio = empty(size.images, size.tiles, 3, size.pixels, size.pixels, dtype=pixels or dtype), (size.images, *([] if size.tables == "ids" else [2]))
    more = {"norm": (e.norm.weight, e.norm.bias, 1e-5)} if size.norm else {}
    more |= {"bias": empty(size.D, dtype=tables, grad=True)} if bias else {}
    more |= {"scale": SCALE, "shift": SHIFT} if pixels == torch.uint8 else {}
    with torch.set_grad_enabled(trained):
        y = ops.patch_embed(images, e.conv.weight, e.cls.weight, empty(*ratio, dtype=torch.int64), **e.tables(), pad_tokens_to=size.pad_tokens_to, **more)
    if trained:
        differentiate(y, wrt=[*e.parameters(), *([more["bias"]] if bias else [])])


def _patches() -> Iterator[Launch]:
    def one(words: str, size: Images, counts: tuple[int, ...] = (16,), **given) -> Launch:
        return Launch("patch_embed", words, lambda n: embed(replace(size, images=n), **given), counts)

    few, square, ids = Images(1, pixels=224), Images(1), Images(1, norm=True, tables="ids", pad_tokens_to=8)
    yield one("bf16 tables bf16", few, (1,))  # of so few pixels, an image has fewer rows than 4096
    yield one("bf16 tables bf16", square)
    yield one("bf16 tables fp32", square, positions=FP32)
    for size, counts in ((few, (1,)), (square, (16,))):
        yield one("fp32 pixels w bf16 untiled", replace(size, tables=None), counts, pixels=FP32, bias=True)
        yield one("u8 pixels w fp16", size, counts, dtype=FP16, pixels=torch.uint8)
    yield one("fp32 w fp32", square, dtype=FP32)
    yield one("bf16 norm", replace(square, norm=True), trained=False)
    yield one("bf16 norm kept", replace(square, norm=True))
    yield one("u8 pixels w bf16 norm kept ids", ids, pixels=torch.uint8)
    yield one("fp32 norm kept", replace(square, norm=True), dtype=FP32)
    for words, given in (("bf16", {}), ("fp32 pixels w bf16", {"pixels": FP32}), ("u8 pixels w fp16", {"dtype": FP16, "pixels": torch.uint8})):
        yield one(f"{words} gathered", Images(1, pixels=448, patch=16), **given)
    yield one("bf16 untiled gathered", Images(64, 1, 224, 16, 768, tables=None), (64,))


def odd_step(M: int, ranks: tuple[int, ...], everything: bool, N: int = 33, K: int = 256) -> None:
    """Of layers whose widths are aligned to nothing; everything: bias, DoRA, dropout and adapters in fp32."""
    low = FP32 if everything else BF16
    made = [projection(weight("nested", N, K), R, low, everything and R > 0, everything and R > 0) for R in ranks]
    step(empty(M, K, grad=True), made, 0.1 if everything else 0.0)


def _odd() -> Iterator[Launch]:
    """What a launch has to bind as well: a rank of 1, none beside others, rows and widths that are aligned to nothing."""
    for words, counts, run in (
        ("odd ranks 16 0 20", (1, 64, 300, 2000), lambda M: odd_step(M, (16, 0, 20), True)),
        ("odd rank 1", (1,), lambda M: odd_step(M, (1,), False, 256)),
        ("odd rank 0", (1,), lambda M: odd_step(M, (0,), False, 256)),
    ):
        yield Launch("nf4_linear", words, run, counts, "sm_90")
    for words, given in (
        ("odd d80 group 3", {"kind": "bits", "hq": 6, "hkv": 2, "d": 80, "s_e": 130}),  # no descriptor holds three heads
        ("odd d80 group 3 fp32", {"kind": "interval", "hq": 6, "hkv": 2, "d": 80, "s_e": 130, "dtype": FP32}),
        ("odd d7", {"kind": "bits", "hq": 2, "hkv": 2, "d": 7, "s_e": 130}),  # nor rows of 14 bytes
        ("odd d128", {"kind": "bits", "hq": 8, "hkv": 2, "s_e": 1601, "b": 2}),
    ):
        yield Launch("cross_attention", words, lambda s, given=given: attend(s, **given), (19,), "sm_90")
    for words, patch, given in (
        ("odd", 14, {}),
        ("odd u8 ids", 14, {"pixels": torch.uint8}),
        ("odd gathered fp32 tables", 16, {"pixels": FP32, "positions": FP32}),
    ):
        size = Images(1, pixels=2 * patch, patch=patch, D=64, norm=not given, tables="ids" if "ids" in words else "grid", pad_tokens_to=8 if given else 1)
        yield Launch("patch_embed", words, lambda n, size=size, given=given: embed(replace(size, images=n), **given), (2,), "sm_90")
