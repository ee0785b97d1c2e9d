"""What bench.tune sweeps: for every tuned op the calls that stand for its rows."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from bench import attention_peers
from bench.attention_peers import Call
from bench.attention_peers import Size as Text
from bench.bench_cross_attention import attention_case
from bench.bench_nf4_lora import DROPOUT_P, LINEAR, LINEARS, QKV, RANK, SQUARE, layers_case
from bench.bench_patch_embed import CLIP, embed_case
from bench.harness import EAGER, OURS, Case
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
    if op == "nf4_linear":
        return list(_linears(arch))
    if op == "nf4_linear_dx":
        return list(_dxs(arch))
    if op == "lora_row_norms":
        sizes = ((SQUARE, torch.bfloat16), ((14336, 4096), torch.bfloat16), ((1280, 1280), torch.bfloat16), (SQUARE, torch.float32))
        return [Sweep(lambda _n, size=size, dtype=dtype: norms_case(arch, size, dtype), (0,)) for size, dtype in sizes]
    if op in LOW_RANK:
        return [Sweep(partial(low_rank_case, op, *of), counts, LOW_RANK_BOUNDS) for of, counts in LOW_RANK[op]]
    if op == "patch_embed":
        return list(_images())
    return list(_texts(op))


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
    yield Sweep(partial(linear_case, arch, [SQUARE], dtype=torch.float32), (16, 4096))


def _dxs(arch: str) -> Iterator[Sweep]:
    for size, counts in ((SQUARE, (16, 64, 256, 500, 1024, 4096)), ((14336, 4096), (64, 256, 4096)), ((4096, 14336), (64, 256, 4096))):
        yield Sweep(partial(dx_case, arch, size), counts, BOUNDS)
    yield Sweep(partial(dx_case, arch, SQUARE, dtype=torch.float32), (16, 4096))


def linear_case(arch: str, sizes: list[tuple[int, int]], M: int, dtype: torch.dtype = torch.bfloat16) -> TuneCase:
    case = layers_case(LINEARS if len(sizes) > 1 else LINEAR, M, sizes, dtype=dtype)
    shape = _linear_shape(arch, dtype, M, sum(N for N, _ in sizes), sizes[0][1])
    return TuneCase(case, shape, f"{short(dtype)} x{len(sizes)}")


def _linear_shape(arch: str, dtype: torch.dtype, M: int, N: int, K: int) -> dict:
    return {"dtype": _width(dtype), "decode": _decode(arch, dtype), "M": M, "N": N, "K": K, "R": RANK}


def _decode(arch: str, dtype: torch.dtype) -> str:
    return "prmt" if arch.startswith("sm_") and dtype != torch.float32 else "gather"


def _width(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "16-bit"


def dx_case(arch: str, size: tuple[int, int], M: int, dtype: torch.dtype = torch.bfloat16) -> TuneCase:
    """dX of one layer with an adapter, alone."""
    N, K = size

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        dy, dxa = (torch.randn(M, n, dtype=dtype, device=device) for n in (N, RANK))
        return {"layer": random_layer(N, K, RANK, "bitsandbytes", dtype, device), "dy": dy, "dxa": dxa}

    def run(i: dict, op: Callable = linear_dx) -> tuple[Tensor, ...]:
        layer, dy = i["layer"], i["dy"]
        args = linear_args("nf4_linear_dx", dy, [Projection(NF4View.of(layer.weight), layer.lora_a, layer.lora_b)], None, 0.0, False)
        operands = tuple(p._replace(b=None) for p in args.operands)
        return op(LinearDxArgs((dy,), operands, args.layout, K, None, 0.0, i["dxa"], not dy.is_cuda))

    def truth(i: dict) -> tuple[Tensor, ...]:
        return run({"layer": i["layer"].with_double_adapters(), "dy": i["dy"].double(), "dxa": i["dxa"].double()}, linear_dx.reference)

    def cost(i: dict) -> Cost:
        layer = i["layer"]
        return Cost(nbytes(i["dy"], i["dxa"], layer.lora_a) + layer.weight.nbytes + M * K * dtype.itemsize, 2 * M * K * (N + RANK))

    case = _case("nf4_linear_dx", f"M{M} N{N} K{K} R{RANK}", dtype, make, run, partial(run, op=linear_dx.reference), truth, cost)
    return TuneCase(case, _linear_shape(arch, dtype, M, N, K), short(dtype))


def _case(op: str, shape: str, dtype: torch.dtype, make: Callable, ours: Callable, eager: Callable, truth: Callable, cost: Callable) -> Case:
    return Case(op, shape, dtype, make, {OURS: torch.no_grad()(ours), EAGER: eager}, truth, cost)


def norms_case(arch: str, size: tuple[int, int], dtype: torch.dtype) -> TuneCase:
    N, K = size

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        return {"layer": random_layer(N, K, RANK, "bitsandbytes", dtype, device)}

    def ours(i: dict) -> tuple[Tensor]:
        layer: Layer = i["layer"]
        return (ops.lora_row_norms(layer.weight, layer.lora_a, layer.lora_b, SCALING, dtype),)

    def formula(i: dict, layer: Callable = lambda layer: layer, dtype: torch.dtype = dtype) -> tuple[Tensor]:
        layer = layer(i["layer"])
        return (lora_row_norms_ref(nf4_dequantize_ref(layer.weight, dtype), layer.lora_a, layer.lora_b, SCALING),)

    truth = partial(formula, layer=Layer.with_double_adapters, dtype=torch.float64)
    cost = lambda i: lora_row_norms_cost(i["layer"].weight, i["layer"].lora_a, i["layer"].lora_b)  # noqa: E731
    case = _case("lora_row_norms", f"N{N} K{K} R{RANK}", dtype, make, ours, formula, truth, cost)
    shape = {"decode": _decode(arch, dtype), "N": N, "K": K, "R": RANK}
    return TuneCase(case, shape, short(dtype))


# (activations, adapters, dropout, rank, products), counts of tokens
_BF16, _FP32, _C = torch.bfloat16, torch.float32, SQUARE[1]
_PASSES = [((_BF16, _BF16, False, 16), (256, 4096)), ((_BF16, _BF16, True, 16), (256, 512, 4096)), ((_BF16, _FP32, False, 16), (256, 512, 4096))]
_PASSES += [((_BF16, _BF16, True, 64), (4096,))]
_GRADS = [(_BF16, _BF16, False, 16, 1), (_BF16, _BF16, False, 16, 2), (_FP32, _FP32, False, 16, 2), (_BF16, _BF16, False, 64, 2)]
_GRADS += [(_BF16, _FP32, False, 16, 1), (_BF16, _FP32, False, 16, 2), (_BF16, _FP32, False, 64, 2)] + [(_BF16, _BF16, True, R, 1) for R in (16, 32, 64)]
LOW_RANK = {"lora_down": _PASSES, "lora_up": _PASSES, "lora_grad": [(of, (256, 4096)) for of in _GRADS]}


def low_rank_case(op: str, x: torch.dtype, low: torch.dtype, dropout: bool, R: int, *rest: int, C: int = _C) -> TuneCase:
    """rest: the number of lora_grad's products, and that of tokens. C: features of the tall side."""
    *products, M = rest
    p = DROPOUT_P if dropout else 0.0
    both = products == [2]

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        sizes = {"low": (M, R), "thin": (C, R) if op == "lora_grad" else (R, C)}
        made = {name: torch.randn(size, dtype=low, device=device) for name, size in sizes.items()}
        made["thin"] *= C**-0.5
        if op != "lora_up":
            made["tall"] = torch.randn(M, C, dtype=x, device=device)
        return made | ({"seed": torch.randint(2**62, (), device=device)} if dropout else {})

    def ours(i: dict) -> tuple[Tensor, ...]:
        seed = i.get("seed")
        if op == "lora_down":
            return (replaceable(lora_down)(i["tall"], i["thin"], seed, p),)
        if op == "lora_up":
            return (replaceable(lora_up)(i["low"], i["thin"], SCALING, x, seed, p),)
        return lora_grad(LoRAGradArgs(i["tall"], i["low"], i["thin"] if both else None, None, seed, p, SCALING, True, not i["low"].is_cuda))

    def formula(i: dict, wide: bool = False) -> tuple[Tensor, ...]:
        seed, i = i.get("seed"), {k: t.double() if wide else t for k, t in i.items() if k != "seed"}
        if op == "lora_down":
            return (drop(i["tall"], seed, p).to(i["thin"].dtype) @ i["thin"].T,)
        if op == "lora_up":
            return (drop(scaled_product(i["low"], i["thin"], SCALING), seed, p).to(i["low"].dtype if wide else x),)
        return lora_grad.reference(LoRAGradArgs(i["tall"], i["low"], i["thin"] if both else None, None, seed, p, SCALING, True, False))

    def cost(i: dict) -> Cost:
        large = M * C * x.itemsize
        thin = nbytes(i["thin"]) * (2 if both else 1)  # B read and dB written, or dA alone
        return Cost(large + nbytes(i["low"]) * (2 if both else 1) + thin, 2 * M * C * R * (products[0] if products else 1))

    shape: dict = {"kind": _kind(x, low, True if dropout else None), "M": M, ("K" if op == "lora_down" else "C"): C, "R": R}
    if op == "lora_grad":
        shape |= {"products": products[0], "low": _width(low)}
    notes = [f"{products[0]} products"] if products else []
    notes += ([f"{short(low)} A,B"] if low != x else []) + ([f"dropout {p}"] if dropout else [])
    case = _case(op, " ".join([f"M{M} C{C} R{R}", *notes]), x, make, ours, formula, partial(formula, wide=True), cost)
    return TuneCase(case, shape, " ".join([short(x), short(low), f"R{R}", *notes]))


def _images() -> Iterator[Sweep]:
    # A quarter of a tile's pixels, so that one image has fewer rows than 4096.
    yield Sweep(partial(images_case, Images(1, pixels=280)), (1, 2, 8), (1, 2, 3, 4, 6, 8, 16))
    yield Sweep(partial(images_case, Images(1)), (1, 4, 16))
    yield Sweep(partial(images_case, Images(1), dtype=torch.float32), (4,))
    yield Sweep(partial(images_case, Images(1), tables=torch.float32), (4, 16))
    yield Sweep(partial(images_case, Images(1, norm=True)), (4, 16))
    for clip in CLIP:
        yield Sweep(partial(images_case, clip), (clip.images,))


def images_case(size: Images, images: int, dtype: torch.dtype = torch.bfloat16, tables: torch.dtype | None = None) -> TuneCase:
    """tables: dtype of the positions where it is another one than the weight's: it is the result's then."""
    size, tables = replace(size, images=images), tables or dtype
    case = own = embed_case(size, dtype)

    def make(device: str, seed: int) -> dict:
        inputs = own.make(device, seed)
        inputs["embedding"].positions.to(tables)
        return inputs

    if tables != dtype:
        case = replace(own, shape=f"{own.shape} {short(tables)} positions", make=make)
    shape = {"dtype": _width(dtype), "out": _width(tables), "norm": int(size.norm)}
    shape |= {"M": images * size.tiles * size.tokens, "N": size.D, "K": 3 * size.patch**2, "PW": size.patch}
    return TuneCase(case, shape, f"{short(dtype)} {short(tables)} patch {size.patch}{'' if size.tables else ' untiled'}")


def _texts(op: str) -> Iterator[Sweep]:
    wide = {"hq": 16, "hkv": 4, "d": 256}
    if op == "cross_attention":
        for text, counts in ((Text(1), (1024, 4096)), (Text(1, shown=(1,)), (4096,)), (Text(1, masked=False), (4096,)), (Text(1, **wide), (1024, 4096))):
            yield Sweep(partial(text_case, text), counts)
        yield Sweep(partial(text_case, Text(1), dtype=torch.float32), (256, 1024))
        for text in (Text(1, batch=1), Text(1, batch=16, shown=(1, 2, 3, 4)), Text(1, batch=64, shown=(1,))):
            yield Sweep(partial(step_case, text), (1,))
        for text in (Text(1, batch=4), Text(1, batch=4, **wide)):
            yield Sweep(partial(step_case, text), (32,), (1, 2, 4, 8, 16, 32))
        return
    case = partial(gradient_case, op)
    for text, counts in ((Text(1), (1024, 4096)), (Text(1, shown=(1,)), (4096,)), (Text(1, **wide), (1024, 4096))):
        yield Sweep(partial(case, text), counts)
    yield Sweep(partial(case, Text(1), dtype=torch.float32), (256, 1024))
    for text in (Text(1), Text(1, **wide)):  # what TMA does not take
        text = replace(text, hq=3 * text.hkv) if op == "cross_attention_dkdv" else text
        yield Sweep(partial(case, text, aligned=op == "cross_attention_dkdv"), (4096,))


def text_case(text: Text, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> TuneCase:
    text = replace(text, tokens=tokens)
    return TuneCase(attention_case(text, dtype, device), _text_shape(text, tokens, dtype, tma=1), _text_words(text, dtype, "bits" if text.masked else "none"))


def _text_shape(text: Text, tokens: int, dtype: torch.dtype, tma: int) -> dict:
    return {"dtype": _width(dtype), "D": text.d, "M": tokens * _padded_group(text), "N": text.s_e, "tma": tma}


def _padded_group(text: Text) -> int:
    return 1 << (text.group - 1).bit_length()


def _text_words(text: Text, dtype: torch.dtype, mask: str) -> str:
    return f"{mask} {short(dtype)} d{text.d} group {text.group}"


def step_case(text: Text, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> TuneCase:
    """Some new tokens of every sequence over a cache, which TMA would read beyond its lengths."""
    case = attention_case(text, dtype, device)

    def make(device: str, seed: int) -> dict:
        inputs = case.make(device, seed)
        inputs["call"].q = torch.randn(text.batch, tokens, text.hq, text.d, dtype=dtype, device=device).transpose(1, 2)
        return inputs

    named = replace(case, shape=f"{case.shape} {tokens} new", make=make)
    return TuneCase(named, _text_shape(text, tokens, dtype, tma=0), _text_words(text, dtype, "lengths"))


class Gradient:
    """What a backward of cross_attention is given: a call, its result's gradient, and what its forward kept."""

    def __init__(self, text: Text, dtype: torch.dtype, device: str, aligned: bool):
        self.call = Call(text, dtype, device, requires_grad=True)
        if not aligned:
            self.call.k, self.call.v = (_shifted(t).requires_grad_() for t in (self.call.k, self.call.v))
        self.dy = torch.randn(text.batch, text.tokens, text.hq * text.d, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        return self.call.nbytes + 3 * self.dy.nbytes

    @cached_property
    def kept(self) -> tuple[Tensor, Tensor]:
        c = self.call
        with torch.no_grad():
            return attend("cross_attention", c.q, c.k, c.v, c.encoder_mask, None, None)

    @property
    def heads(self) -> Tensor:
        return self.dy.unflatten(2, (self.call.size.hq, -1)).transpose(1, 2)


def _shifted(t: Tensor) -> Tensor:
    """The same 8 bytes off: no address that TMA takes."""
    off = 8 // t.element_size()
    room = torch.empty(t.numel() + off, dtype=t.dtype, device=t.device)[off:]
    return room.as_strided(t.shape, t.stride(), off).copy_(t.detach())


def gradient_case(op: str, text: Text, tokens: int, dtype: torch.dtype = torch.bfloat16, aligned: bool = True) -> TuneCase:
    """One of the two kernels of the backward alone, with the small pass before it that both need."""
    text, of_q = replace(text, tokens=tokens), op == "cross_attention_dq"
    mine = slice(0, 1) if of_q else slice(1, 3)

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        return {"of": Gradient(text, dtype, device, aligned)}

    def ours(i: dict) -> tuple[Tensor, ...]:
        g, c = i["of"], i["of"].call
        mask = EVERYTHING if c.encoder_mask is None else c.encoder_mask.for_op(listed_tokens(text.group), False)
        needs_grad, interpret = (of_q, not of_q, not of_q), not c.q.is_cuda
        return _attention_grad(AttentionGradArgs(g.heads, c.q, c.k, c.v, *g.kept, None, mask, text.d**-0.5, needs_grad, interpret))

    def eager(i: dict) -> tuple[Tensor, ...]:
        c = i["of"].call
        return torch.autograd.grad(attention_peers.eager(c), (c.q, c.k, c.v)[mine], i["of"].dy)

    def truth(i: dict) -> tuple[Tensor, ...]:
        return attention_peers.exact(i["of"].call, i["of"].dy)[1:][mine]

    def cost(i: dict) -> Cost:
        c = i["of"].call
        visible, kv = text.visible, nbytes(c.k, c.v)
        moved = (4 if of_q else 3) * nbytes(c.q) + round((visible if of_q else 1 + visible) * kv)  # q, o, dO and dQ, or the first three
        return Cost(moved, round((6 if of_q else 8) * c.q.numel() * text.s_e * visible))

    case = _case(op, f"{text}{'' if aligned else ' not aligned'}", dtype, make, ours, eager, truth, cost)
    tma = int(aligned and (of_q or text.group == _padded_group(text)))
    return TuneCase(case, _text_shape(text, tokens, dtype, tma), _text_words(text, dtype, "bits" if text.masked else "none"))
