"""What bench.tune sweeps: for every tuned op the calls that stand for its rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from bench.attention_peers import Size as Text
from bench.bench_cross_attention import attention_case
from bench.bench_nf4_lora import DROPOUT_P, LINEAR, LINEARS, QKV, RANK, SQUARE, layers_case
from bench.bench_patch_embed import CLIP, embed_case
from bench.harness import BF16, EAGER, FP32, OURS, Case, DType, Run, in_double, words
from bench.nf4_peers import Layer, random_layer, short
from bench.work import TUNED
from cases.embedding import Size as Images
from fastfuse import ops
from fastfuse.ops import nf4_dequantize_ref
from fastfuse.ops._attention_ref import AttentionGradArgs
from fastfuse.ops._linear_group import Projection, linear_args
from fastfuse.ops._op import Cost, nbytes, replaceable
from fastfuse.ops.cross_attention import EVERYTHING, _attention_grad, attend, listed_tokens
from fastfuse.ops.lora_row_norms import lora_row_norms_cost, lora_row_norms_ref
from fastfuse.ops.low_rank import LoRAGradArgs, _kind, drop, lora_down, lora_grad, lora_up, scaled_product
from fastfuse.ops.nf4_linear_dx import LinearDxArgs, linear_dx
from fastfuse.quant.nf4 import NF4View

OPS = tuple(dict.fromkeys(TUNED.values()))
SCALING = 2.0


@dataclass(frozen=True, eq=False)
class TuneCase:
    """One call of an op: what is run, what it asks tune.pick for, and in words which kernels it launches: with one tile the same ones as every call of these."""

    bench: Case
    shape: Mapping
    words: str


@dataclass(frozen=True)
class Sweep:
    """Calls that differ in their number of tokens (or images) alone."""

    at: Callable[[int], TuneCase]
    counts: tuple[int, ...]
    bounds: tuple[int, ...] = ()  # where a boundary between two rows may be put


def sweeps(op: str, arch: str) -> list[Sweep]:
    """An op's calls, at the shapes of Llama-3.2-Vision 11B and of SmolVLM, whose widths are odd multiples of 64."""
    if op in LOW_RANK:
        unaligned = [Sweep(partial(low_rank_case, op, BF16, FP32, False, 64, 2, C=_C + 8), (4096,))] if op == "lora_grad" else []
        return [Sweep(partial(low_rank_case, op, *of), counts, LOW_RANK_BOUNDS) for of, counts in LOW_RANK[op]] + unaligned
    of_arch = {"nf4_linear": _linears, "nf4_linear_dx": _dxs, "lora_row_norms": _norms, "patch_embed": _images}
    return list(of_arch[op](arch) if op in of_arch else _texts(op))


# Where the boundary between few tokens and many may be put.
BOUNDS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 500, 512, 700, 768, 1024, 1536, 2048)
LOW_RANK_BOUNDS = (64, 128, 256, 512, 1024, 2048, 4096)


def _linears(arch: str) -> Iterator[Sweep]:
    few = (1, 16)
    for sizes, counts in (
        ([SQUARE], (*few, 32, 64, 256, 512, 1024, 4096)),
        ([(14336, 4096)], (*few, 64, 256, 1024, 4096)),
        ([(4096, 14336)], (*few, 64, 256, 4096)),
        ([(1024, 4096)], (*few, 256)),
        ([(1280, 1280)], (*few, 6404)),
        (list(QKV), few),
        ([(576, 576)], few),
        ([(2560, 960)], (*few, 64)),
        ([(49152, 576)], few),
    ):
        yield Sweep(partial(linear_case, arch, sizes), counts, BOUNDS if 64 in counts or len(counts) == 3 else ())
    yield Sweep(partial(linear_case, arch, [SQUARE], dtype=FP32), (16, 4096))


def _dxs(arch: str) -> Iterator[Sweep]:
    for size, counts in ((SQUARE, (16, 64, 256, 500, 1024, 4096)), ((14336, 4096), (64, 256, 4096)), ((4096, 14336), (64, 256, 4096))):
        yield Sweep(partial(dx_case, arch, size), counts, BOUNDS)
    yield Sweep(partial(dx_case, arch, SQUARE, dtype=FP32), (16, 4096))


def _norms(arch: str) -> Iterator[Sweep]:
    for size, dtype in ((SQUARE, BF16), ((14336, 4096), BF16), ((1280, 1280), BF16), (SQUARE, FP32)):
        yield Sweep(lambda _n, size=size, dtype=dtype: norms_case(arch, size, dtype), (0,))


def linear_case(arch: str, sizes: list[tuple[int, int]], M: int, dtype: DType = BF16) -> TuneCase:
    case = layers_case(LINEARS if len(sizes) > 1 else LINEAR, M, sizes, dtype=dtype)
    shape = _linear_shape(arch, dtype, M, sum(N for N, _ in sizes), sizes[0][1])
    return TuneCase(case, shape, f"{short(dtype)} x{len(sizes)}")


def _linear_shape(arch: str, dtype: DType, M: int, N: int, K: int) -> dict:
    return {"dtype": _width(dtype), "decode": _decode(arch, dtype), "M": M, "N": N, "K": K, "R": RANK}


def _decode(arch: str, dtype: DType) -> str:
    return "prmt" if arch.startswith("sm_") and dtype != FP32 else "gather"


def _width(dtype: DType) -> str:
    return "fp32" if dtype == FP32 else "16-bit"


def dx_case(arch: str, size: tuple[int, int], M: int, dtype: DType = BF16) -> TuneCase:
    """dX of one layer with an adapter, alone."""
    N, K = size

    def make(device, seed):
        torch.manual_seed(seed)
        dy, dxa = (torch.randn(M, n, dtype=dtype, device=device) for n in (N, RANK))
        return {"layer": random_layer(N, K, RANK, "bitsandbytes", dtype, device), "dy": dy, "dxa": dxa}

    def run(i, op=linear_dx):
        layer, dy = i["layer"], i["dy"]
        args = linear_args("nf4_linear_dx", dy, [Projection(NF4View.of(layer.weight), layer.lora_a, None)], None, 0.0, False)
        return op(LinearDxArgs((dy,), args.operands, args.layout, K, None, 0.0, i["dxa"], not dy.is_cuda))

    def cost(i):
        layer = i["layer"]
        return Cost(nbytes(i["dy"], i["dxa"], layer.lora_a) + layer.weight.nbytes + M * K * dtype.itemsize, 2 * M * K * (N + RANK))

    case = _case("nf4_linear_dx", f"M{M} N{N} K{K} R{RANK}", dtype, make, run, partial(run, op=linear_dx.reference), cost)
    return TuneCase(case, _linear_shape(arch, dtype, M, N, K), short(dtype))


def _case(op: str, shape: str, dtype: DType, make: Callable, ours: Run, eager: Run, cost: Callable, truth: Run | None = None) -> Case:
    return Case(op, shape, dtype, make, {OURS: torch.no_grad()(ours), EAGER: eager}, truth or in_double(eager), cost)


def norms_case(arch: str, size: tuple[int, int], dtype: DType) -> TuneCase:
    N, K = size

    def make(device, seed):
        torch.manual_seed(seed)
        return {"layer": random_layer(N, K, RANK, "bitsandbytes", dtype, device)}

    def ours(i):
        return (ops.lora_row_norms(*parts(i), SCALING, dtype),)

    def parts(i):
        layer: Layer = i["layer"]
        return layer.weight, layer.lora_a, layer.lora_b

    def formula(i):
        weight, a, b = parts(i)
        return (lora_row_norms_ref(nf4_dequantize_ref(weight, a.dtype), a, b, SCALING),)

    case = _case("lora_row_norms", f"N{N} K{K} R{RANK}", dtype, make, ours, formula, lambda i: lora_row_norms_cost(*parts(i)))
    shape = {"decode": _decode(arch, dtype), "N": N, "K": K, "R": RANK}
    return TuneCase(case, shape, short(dtype))


# (activations, adapters, dropout, rank, products), counts of tokens
_C = SQUARE[1]
_PASSES = [((BF16, BF16, False, 16), (256, 4096)), ((BF16, BF16, True, 16), (256, 512, 4096)), ((BF16, FP32, False, 16), (256, 512, 4096))]
_PASSES += [((BF16, BF16, True, 64), (4096,))]
_GRADS = [(BF16, BF16, False, 16, 1), (BF16, BF16, False, 16, 2), (FP32, FP32, False, 16, 2), (BF16, BF16, False, 64, 2)]
_GRADS += [(BF16, FP32, False, 16, 1), (BF16, FP32, False, 16, 2), (BF16, FP32, False, 64, 2)] + [(BF16, BF16, True, R, 1) for R in (16, 32, 64)]
LOW_RANK = {"lora_down": _PASSES, "lora_up": _PASSES, "lora_grad": [(of, (256, 4096)) for of in _GRADS]}


def low_rank_case(op: str, x: DType, lora: DType, dropout: bool, R: int, *rest: int, C: int = _C) -> TuneCase:
    """lora: the adapters' dtype. rest: the number of lora_grad's products, and that of tokens. C: features of the activation."""
    *products, M = rest
    p, both = DROPOUT_P if dropout else 0.0, products == [2]

    def make(device, seed):
        torch.manual_seed(seed)
        made = {"xa": torch.randn(M, R, dtype=lora, device=device)}
        made["lora"] = torch.randn((C, R) if op == "lora_grad" else (R, C), dtype=lora, device=device) * C**-0.5
        if op != "lora_up":
            made["activation"] = torch.randn(M, C, dtype=x, device=device)
        return made | ({"seed": torch.randint(2**62, (), device=device)} if dropout else {})

    def grad_args(i, interpret=False):
        return LoRAGradArgs(i["activation"], i["xa"], i["lora"] if both else None, None, i.get("seed"), p, SCALING, True, interpret)

    def ours(i):
        if op == "lora_down":
            return (replaceable(lora_down)(i["activation"], i["lora"], i.get("seed"), p),)
        if op == "lora_up":
            return (replaceable(lora_up)(i["xa"], i["lora"], SCALING, x, i.get("seed"), p),)
        return lora_grad(grad_args(i, not i["xa"].is_cuda))

    def formula(i):
        if op == "lora_down":
            return (drop(i["activation"], i.get("seed"), p).to(i["lora"].dtype) @ i["lora"].T,)
        if op == "lora_up":
            out = torch.float64 if i["xa"].dtype == torch.float64 else x
            return (drop(scaled_product(i["xa"], i["lora"], SCALING), i.get("seed"), p).to(out),)
        return lora_grad.reference(grad_args(i))

    def cost(i):
        moved = nbytes(i["lora"], i["xa"]) * (2 if both else 1)  # B read and dB written, or dA alone
        return Cost(M * C * x.itemsize + moved, 2 * M * C * R * (products[0] if products else 1))

    shape: dict = {"kind": _kind(x, lora, True if dropout else None), "M": M, ("K" if op == "lora_down" else "C"): C, "R": R}
    if op == "lora_grad":
        shape |= {"products": products[0], "lora": _width(lora)}
    notes = products and f"{products[0]} products", lora != x and f"{short(lora)} A,B", dropout and f"dropout {p}"
    case = _case(op, words(f"M{M} C{C} R{R}", *notes), x, make, ours, formula, cost)
    return TuneCase(case, shape, words(short(x), short(lora), f"R{R}", *notes, C % 16 and "not aligned"))


def _images(_arch: str) -> Iterator[Sweep]:
    # A quarter of a tile's pixels, so that one image has fewer rows than 4096.
    yield Sweep(partial(images_case, Images(1, pixels=280)), (1, 2, 8), (1, 2, 3, 4, 6, 8, 16))
    yield Sweep(partial(images_case, Images(1)), (1, 4, 16))
    yield Sweep(partial(images_case, Images(1), dtype=FP32), (4,))
    yield Sweep(partial(images_case, Images(1), tables=FP32), (4, 16))
    yield Sweep(partial(images_case, Images(1, norm=True)), (4, 16))
    for clip in CLIP:
        yield Sweep(partial(images_case, clip), (clip.images,))


def images_case(size: Images, images: int, dtype: DType = BF16, tables: DType | None = None) -> TuneCase:
    """tables: dtype of the positions where it is another one than the weight's: it is the result's then."""
    size, tables = replace(size, images=images), tables or dtype
    own = embed_case(size, dtype)

    def make(device, seed):
        inputs = own.make(device, seed)
        inputs["embedding"].positions.to(tables)
        return inputs

    case = replace(own, shape=words(own.shape, tables != dtype and f"{short(tables)} positions"), make=make)
    shape = {"dtype": _width(dtype), "out": _width(tables), "norm": int(size.norm)}
    shape |= {"M": images * size.tiles * size.tokens, "N": size.D, "K": 3 * size.patch**2, "PW": size.patch}
    return TuneCase(case, shape, f"{short(dtype)} {short(tables)} patch {size.patch}{'' if size.tables else ' untiled'}")


def _texts(op: str) -> Iterator[Sweep]:
    wide, forward = {"hq": 16, "hkv": 4, "d": 256}, op == "cross_attention"
    case = text_case if forward else partial(gradient_case, op)
    few = (Text(1, shown=(1,)), Text(1, masked=False)) if forward else (Text(1, shown=(1,)),)
    for text, counts in ((Text(1), (1024, 4096)), *((text, (4096,)) for text in few), (Text(1, **wide), (1024, 4096))):
        yield Sweep(partial(case, text), counts)
    yield Sweep(partial(case, Text(1), dtype=FP32), (256, 1024))
    if forward:
        for text in (Text(1, batch=1), Text(1, batch=16, shown=(1, 2, 3, 4)), Text(1, batch=64, shown=(1,))):
            yield Sweep(partial(step_case, text), (1,))
        for text in (Text(1, batch=4), Text(1, batch=4, **wide)):
            yield Sweep(partial(step_case, text), (32,), (1, 2, 4, 8, 16, 32))
        return
    for text in (Text(1), Text(1, **wide)):  # what TMA does not take
        text = replace(text, hq=3 * text.hkv) if op == "cross_attention_dkdv" else text
        yield Sweep(partial(case, text, aligned=op == "cross_attention_dkdv"), (4096,))


def text_case(text: Text, tokens: int, dtype: DType = BF16, device: str = "cuda") -> TuneCase:
    text = replace(text, tokens=tokens)
    return TuneCase(attention_case(text, dtype, device), _text_shape(text, tokens, dtype, tma=1), _text_words(text, dtype, "bits" if text.masked else "none"))


def _text_shape(text: Text, tokens: int, dtype: DType, tma: int) -> dict:
    return {"dtype": _width(dtype), "D": text.d, "M": tokens * _padded_group(text), "N": text.s_e, "tma": tma}


def _padded_group(text: Text) -> int:
    return 1 << (text.group - 1).bit_length()


def _text_words(text: Text, dtype: DType, mask: str) -> str:
    return f"{mask} {short(dtype)} d{text.d} group {text.group}"


def step_case(text: Text, tokens: int, dtype: DType = BF16, device: str = "cuda") -> TuneCase:
    """Some new tokens of every sequence over a cache, which TMA would read beyond its lengths."""
    case = attention_case(text, dtype, device)

    def make(device, seed):
        inputs = case.make(device, seed)
        inputs["call"].q = torch.randn(text.batch, tokens, text.hq, text.d, dtype=dtype, device=device).transpose(1, 2)
        return inputs

    named = replace(case, shape=f"{case.shape} {tokens} new", make=make)
    return TuneCase(named, _text_shape(text, tokens, dtype, tma=0), _text_words(text, dtype, "lengths"))


def _shifted(t: Tensor) -> Tensor:
    """The same 8 bytes off: no address that TMA takes."""
    off = 8 // t.element_size()
    room = torch.empty(t.numel() + off, dtype=t.dtype, device=t.device)[off:]
    return room.as_strided(t.shape, t.stride(), off).copy_(t.detach())


def gradient_case(op: str, text: Text, tokens: int, dtype: DType = BF16, aligned: bool = True) -> TuneCase:
    """One of the two kernels of the backward alone, with the small pass before it that both need."""
    text, of_q = replace(text, tokens=tokens), op == "cross_attention_dq"
    whole = attention_case(text, dtype, backward=True)

    def mine(run):
        return lambda i: run(i)[1:2] if of_q else run(i)[2:]

    def make(device, seed):
        inputs = whole.make(device, seed)
        if not aligned:
            c = inputs["call"]
            c.k, c.v = (_shifted(t).requires_grad_() for t in (c.k, c.v))
        return inputs

    def ours(i):
        c = i["call"]
        if "kept" not in i:  # of the forward, by the first call, which is not timed
            with torch.no_grad():
                i["kept"] = attend("cross_attention", c.q, c.k, c.v, c.encoder_mask, None, None)
        mask = EVERYTHING if c.encoder_mask is None else c.encoder_mask.for_op(listed_tokens(text.group), False)
        dy, needs_grad, interpret = i["dy"].unflatten(2, (text.hq, text.d)).transpose(1, 2), (of_q, not of_q, not of_q), not c.q.is_cuda
        return _attention_grad(AttentionGradArgs(dy, c.q, c.k, c.v, *i["kept"], None, mask, text.d**-0.5, needs_grad, interpret))

    def cost(i):
        c = i["call"]
        visible, kv = text.visible, nbytes(c.k, c.v)
        moved = (4 if of_q else 3) * nbytes(c.q) + round((visible if of_q else 1 + visible) * kv)  # q, o, dO and dQ, or the first three
        return Cost(moved, round((6 if of_q else 8) * c.q.numel() * text.s_e * visible))

    case = _case(op, f"{text}{'' if aligned else ' not aligned'}", dtype, make, ours, mine(whole.providers[EAGER]), cost, mine(whole.truth))
    tma = int(aligned and (of_q or text.group == _padded_group(text)))
    return TuneCase(case, _text_shape(text, tokens, dtype, tma), _text_words(text, dtype, "bits" if text.masked else "none"))
