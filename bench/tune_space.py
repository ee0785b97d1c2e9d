"""What bench.tune sweeps: for every tuned op the calls that stand for its rows, and the tiles that are tried there."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor

from bench import attention_peers, codegen
from bench.attention_peers import Call
from bench.attention_peers import Size as Text
from bench.bench_cross_attention import attention_case
from bench.bench_nf4_lora import DROPOUT_P, LINEAR, LINEARS, QKV, RANK, SQUARE, layers_case
from bench.bench_patch_embed import CLIP, embed_case
from bench.harness import EAGER, OURS, Case
from bench.nf4_peers import Layer, random_layer, short
from bench.patch_peers import Size as Images
from fastfuse import ops
from fastfuse.ops import nf4_dequantize_ref
from fastfuse.ops._attention_ref import AttentionGradArgs
from fastfuse.ops._linear_group import Projection, linear_args
from fastfuse.ops._op import Cost, nbytes
from fastfuse.ops.cross_attention import EVERYTHING, _attention_grad, attend, listed_tokens
from fastfuse.ops.lora_row_norms import lora_row_norms_cost, lora_row_norms_ref
from fastfuse.ops.low_rank import LoRAGradArgs, _kind, drop, lora_down, lora_grad, lora_up, scaled_product
from fastfuse.ops.nf4_linear_dx import LinearDxArgs, linear_dx
from fastfuse.quant.nf4 import NF4View

OPS = codegen.OPS
SCHEDULE = ("SPLIT_K", "PROGRAMS")  # how a launch is divided: one program's code is the same, as are its registers
SCALING = 2.0
LARGEST_BLOCK = 128  # of attention: what a mask's lists hold in columns, and in rows


@dataclass(frozen=True, eq=False)
class Point:
    """One call of an op: what is run, what it asks tune.pick for, and what bench.codegen's builder takes to compile it."""

    case: Case
    shape: Mapping
    variant: tuple


@dataclass(frozen=True)
class Series:
    """Calls that differ in their number of tokens (or images) alone."""

    at: Callable[[int], Point]
    counts: tuple[int, ...]
    bounds: tuple[int, ...] = ()  # where a boundary between two rows may be put


def series(op: str, arch: str) -> list[Series]:
    """An op's calls, at the shapes of Llama-3.2-Vision 11B and of SmolVLM, whose widths are odd multiples of 64."""
    if op == "nf4_linear":
        return list(_linears(arch))
    if op == "nf4_linear_dx":
        return list(_dxs(arch))
    if op == "lora_row_norms":
        sizes = ((SQUARE, torch.bfloat16), ((14336, 4096), torch.bfloat16), ((1280, 1280), torch.bfloat16), (SQUARE, torch.float32))
        return [Series(lambda _n, size=size, dtype=dtype: norms_point(arch, size, dtype), (0,)) for size, dtype in sizes]
    if op in LOW_RANK:
        return [Series(partial(low_rank_point, op, *of), counts, LOW_RANK_BOUNDS) for of, counts in LOW_RANK[op]]
    if op == "patch_embed":
        return list(_images())
    return list(_texts(op))


# Where the boundary between few tokens and many may be put.
BOUNDS = (4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 500, 512, 700, 768, 1024, 1536, 2048)
LOW_RANK_BOUNDS = (64, 128, 256, 512, 1024, 2048, 4096)


def _linears(arch: str) -> Iterator[Series]:
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
        yield Series(partial(linear_point, arch, sizes), counts, BOUNDS if 64 in counts or len(counts) == 3 else ())
    yield Series(partial(linear_point, arch, [SQUARE], dtype=torch.float32), (16, 4096))


def _dxs(arch: str) -> Iterator[Series]:
    for size, counts in ((SQUARE, (16, 64, 256, 500, 1024, 4096)), ((14336, 4096), (64, 256, 4096)), ((4096, 14336), (64, 256, 4096))):
        yield Series(partial(dx_point, arch, size), counts, BOUNDS)
    yield Series(partial(dx_point, arch, SQUARE, dtype=torch.float32), (16, 4096))


def linear_point(arch: str, sizes: list[tuple[int, int]], M: int, dtype: torch.dtype = torch.bfloat16) -> Point:
    case = layers_case(LINEARS if len(sizes) > 1 else LINEAR, M, sizes, dtype=dtype)
    shape = _linear_shape(arch, dtype, M, sum(N for N, _ in sizes), sizes[0][1])
    return Point(case, shape, ("nested", short(dtype), short(dtype), len(sizes), False))


def _linear_shape(arch: str, dtype: torch.dtype, M: int, N: int, K: int) -> dict:
    return {"dtype": _width(dtype), "decode": codegen._branch(arch, "nested", short(dtype)), "M": M, "N": N, "K": K, "R": RANK}


def _width(dtype: torch.dtype) -> str:
    return "fp32" if dtype == torch.float32 else "16-bit"


def dx_point(arch: str, size: tuple[int, int], M: int, dtype: torch.dtype = torch.bfloat16) -> Point:
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
    return Point(case, _linear_shape(arch, dtype, M, N, K), ("nested", short(dtype), short(dtype), 1, False, False))


def _case(op: str, shape: str, dtype: torch.dtype, make: Callable, ours: Callable, eager: Callable, truth: Callable, cost: Callable) -> Case:
    return Case(op, shape, dtype, make, {OURS: torch.no_grad()(ours), EAGER: eager}, truth, cost)


def norms_point(arch: str, size: tuple[int, int], dtype: torch.dtype) -> Point:
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
    shape = {"decode": codegen._branch(arch, "nested", short(dtype)), "N": N, "K": K, "R": RANK}
    return Point(case, shape, ("nested", short(dtype), short(dtype)))


# (activations, adapters, dropout, rank, products), counts of tokens
_BF16, _FP32, _C = torch.bfloat16, torch.float32, SQUARE[1]
_PASSES = [((_BF16, _BF16, False, 16), (256, 4096)), ((_BF16, _BF16, True, 16), (256, 512, 4096)), ((_BF16, _FP32, False, 16), (256, 512, 4096))]
_PASSES += [((_BF16, _BF16, True, 64), (4096,))]
_GRADS = [(_BF16, _BF16, False, 16, 1), (_BF16, _BF16, False, 16, 2), (_FP32, _FP32, False, 16, 2), (_BF16, _BF16, False, 64, 2)]
_GRADS += [(_BF16, _FP32, False, 16, 1), (_BF16, _FP32, False, 16, 2), (_BF16, _FP32, False, 64, 2)] + [(_BF16, _BF16, True, R, 1) for R in (16, 32, 64)]
LOW_RANK = {"lora_down": _PASSES, "lora_up": _PASSES, "lora_grad": [(of, (256, 4096)) for of in _GRADS]}


def low_rank_point(op: str, x: torch.dtype, low: torch.dtype, dropout: bool, R: int, *rest: int, C: int = _C) -> Point:
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
            return (lora_down(i["tall"], i["thin"], seed, p),)
        if op == "lora_up":
            return (lora_up(i["low"], i["thin"], SCALING, x, seed, p),)
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
    variant = (short(x), short(low), dropout, *(["both" if both else "outer"] if op == "lora_grad" else []))
    return Point(case, shape, variant)


def _images() -> Iterator[Series]:
    # A quarter of a tile's pixels, so that one image has fewer rows than 4096.
    yield Series(partial(images_point, Images(1, pixels=280)), (1, 2, 8), (1, 2, 3, 4, 6, 8, 16))
    yield Series(partial(images_point, Images(1)), (1, 4, 16))
    yield Series(partial(images_point, Images(1), dtype=torch.float32), (4,))
    yield Series(partial(images_point, Images(1), tables=torch.float32), (4, 16))
    yield Series(partial(images_point, Images(1, norm=True)), (4, 16))
    for clip in CLIP:
        yield Series(partial(images_point, clip), (clip.images,))


def images_point(size: Images, images: int, dtype: torch.dtype = torch.bfloat16, tables: torch.dtype | None = None) -> Point:
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
    return Point(case, shape, (short(dtype), short(tables), short(dtype), False, bool(size.tables), size.patch))


def _texts(op: str) -> Iterator[Series]:
    wide = {"hq": 16, "hkv": 4, "d": 256}
    if op == "cross_attention":
        for text, counts in ((Text(1), (1024, 4096)), (Text(1, shown=(1,)), (4096,)), (Text(1, masked=False), (4096,)), (Text(1, **wide), (1024, 4096))):
            yield Series(partial(text_point, text), counts)
        yield Series(partial(text_point, Text(1), dtype=torch.float32), (256, 1024))
        for text in (Text(1, batch=1), Text(1, batch=16, shown=(1, 2, 3, 4)), Text(1, batch=64, shown=(1,))):
            yield Series(partial(step_point, text), (1,))
        for text in (Text(1, batch=4), Text(1, batch=4, **wide)):
            yield Series(partial(step_point, text), (32,), (1, 2, 4, 8, 16, 32))
        return
    point = partial(gradient_point, op)
    for text, counts in ((Text(1), (1024, 4096)), (Text(1, shown=(1,)), (4096,)), (Text(1, **wide), (1024, 4096))):
        yield Series(partial(point, text), counts)
    yield Series(partial(point, Text(1), dtype=torch.float32), (256, 1024))
    for text in (Text(1), Text(1, **wide)):  # what TMA does not take
        text = replace(text, hq=3 * text.hkv) if op == "cross_attention_dkdv" else text
        yield Series(partial(point, text, aligned=op == "cross_attention_dkdv"), (4096,))


def text_point(text: Text, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Point:
    text = replace(text, tokens=tokens)
    return Point(attention_case(text, dtype, device), _text_shape(text, tokens, dtype, tma=1), _text_variant(text, dtype, "bits" if text.masked else "none"))


def _text_shape(text: Text, tokens: int, dtype: torch.dtype, tma: int) -> dict:
    return {"dtype": _width(dtype), "D": text.d, "M": tokens * _padded_group(text), "N": text.s_e, "tma": tma}


def _padded_group(text: Text) -> int:
    return 1 << (text.group - 1).bit_length()


def _text_variant(text: Text, dtype: torch.dtype, mask: str) -> tuple:
    return short(dtype), text.group, mask, text.d


def step_point(text: Text, tokens: int, dtype: torch.dtype = torch.bfloat16, device: str = "cuda") -> Point:
    """Some new tokens of every sequence over a cache, which TMA would read beyond its lengths."""
    case = attention_case(text, dtype, device)

    def make(device: str, seed: int) -> dict:
        inputs = case.make(device, seed)
        inputs["call"].q = torch.randn(text.batch, tokens, text.hq, text.d, dtype=dtype, device=device).transpose(1, 2)
        return inputs

    named = replace(case, shape=f"{case.shape} {tokens} new", make=make)
    return Point(named, _text_shape(text, tokens, dtype, tma=0), _text_variant(text, dtype, "lengths"))


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


def gradient_point(op: str, text: Text, tokens: int, dtype: torch.dtype = torch.bfloat16, aligned: bool = True) -> Point:
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
    return Point(case, _text_shape(text, tokens, dtype, tma), _text_variant(text, dtype, "bits" if text.masked else "none"))


def specimens(arch: str, op: str, row: Mapping, variant: tuple) -> Iterator[codegen.Specimen]:
    """The kernels that a point of this variant launches with the row's tile."""
    tile = row["tile"]
    if op == "nf4_linear":
        # A tile with splits has a kernel without them too, which dropout alone takes.
        yield from (s for s in codegen.linear_specimens(arch, tile, *variant) if "SPLIT_K" not in tile["constants"] or s.op != "nf4_linear")
    elif op == "nf4_linear_dx":
        yield codegen.dx_specimen(arch, tile, *variant)
    elif op == "lora_row_norms":
        yield codegen.row_norms_specimen(arch, tile, *variant)
    elif op == "patch_embed":
        yield codegen.patch_specimen(arch, tile, *variant)
    elif op in LOW_RANK:
        yield codegen.low_rank_specimen(arch, op, tile, *variant)
    else:
        # A row that is for any head_dim is compiled for its own; "lengths" are the forward's alone.
        yield codegen.attention_specimen(arch, op, row, *variant)


def candidates(op: str, rows: list[dict], row: Mapping, quick: bool) -> list[dict | None]:
    """The tiles tried in a row's place: its own first, the unfused route where there is one, those of the other rows, and the space of the op.

    quick: of the space those that differ from the row's own tile, or from another row's, in one value.
    """
    known = [row["tile"], *([] if op.startswith("cross") else [None]), *(r["tile"] for r in rows if r["tile"])]
    spread = _space(op, rows, row["when"])
    if quick:
        near = [row["tile"]] if row["tile"] else [t for t in known if t]
        spread = (t for t in spread if any(_apart(t, other) <= 1 for other in near))
    found = []
    for tile in [*known, *spread]:
        if tile not in found and illegal(op, row["when"], tile) is None:
            found.append(tile)
    return found


def _apart(one: dict, other: dict) -> int:
    flat = [{**t["constants"], "num_warps": t["num_warps"], "num_stages": t["num_stages"]} for t in (one, other)]
    return sum(flat[0].get(k) != flat[1].get(k) for k in flat[0].keys() | flat[1].keys())


def illegal(op: str, when: Mapping, tile: dict | None) -> str | None:
    """Why the launcher could not use this tile for every shape of a row, or would pass it over; None where it can."""
    if tile is None:
        return "there is no unfused route" if op.startswith("cross") else None
    c, most = tile["constants"], when.get("M_max", float("inf"))
    blocks = {k: v for k, v in c.items() if k.startswith("BLOCK_")}
    for name, size in blocks.items():
        if size < 16 or size & (size - 1):
            return f"{name} is {size}, not a power of two from 16 on"
    if tile["num_warps"] not in (1, 2, 4, 8, 16) or tile["num_stages"] < 1:
        return f"{tile['num_warps']} warps, {tile['num_stages']} stages"
    if op in ("nf4_linear", "nf4_linear_dx", "lora_row_norms") and c["BLOCK_K"] % 32:
        return f"BLOCK_K is {c['BLOCK_K']}, no multiple of 32"
    if op == "nf4_linear":
        if when.get("K_multiple", 64) % c["BLOCK_K"]:
            return f"BLOCK_K is {c['BLOCK_K']}, K a multiple of {when.get('K_multiple', 64)}"
        if ("SPLIT_K" in c) == ("TRANSPOSED" in c):
            return "SPLIT_K or TRANSPOSED, one of them"
        if "SPLIT_K" in c and most > c["BLOCK_M"]:
            return f"SPLIT_K with BLOCK_M {c['BLOCK_M']}, M up to {most}"
    if op.startswith("cross"):
        if max(c["BLOCK_M"], c["BLOCK_N"]) > LARGEST_BLOCK:
            return f"blocks of {c['BLOCK_M']} x {c['BLOCK_N']}, a mask's are {LARGEST_BLOCK}"
        if c["TMA"] and when.get("tma") != 1:
            return "TMA where no row asks for it"
    if op == "patch_embed" and c["BLOCK_N"] // c["SUBTILES"] < 16:
        return f"BLOCK_N {c['BLOCK_N']} in {c['SUBTILES']}"
    return None


def _space(op: str, rows: list[dict], when: Mapping) -> Iterator[dict]:
    """A small grid for each op. What does not compile, spills or does not fit is no concern here."""
    fp32, tma = when.get("dtype") == "fp32", (when.get("tma") == 1,)
    four, both = (4,), (4, 8)
    if op == "nf4_linear" and when.get("M_max", 64) <= 32:
        yield from _grid(four, (3, 4), BLOCK_M=_rows((16, 32), when)[-1:], BLOCK_N=(64, 128), BLOCK_K=(64, 128), SPLIT_K=(2, 4, 8, 16, 32))
    elif op == "nf4_linear":
        yield from _grid(both, (2, 3, 4), BLOCK_M=_rows((16, 32, 64, 128), when), BLOCK_N=(64, 128), BLOCK_K=(64,), TRANSPOSED=(False, True))
    elif op == "nf4_linear_dx":
        yield from _grid(both, (2, 3, 4), BLOCK_M=_rows((32, 64, 128), when), BLOCK_N=(32, 64), BLOCK_K=(64, 128))
    elif op == "lora_row_norms":
        yield from _grid((2, 4, 8), (2, 3, 4), BLOCK_N=(16, 32, 64), BLOCK_K=(64, 128))
    elif op == "lora_down":
        yield from _grid(four, (2, 3, 4), BLOCK_M=_rows((16, 32, 64, 128), when), BLOCK_R=(16,), BLOCK_K=(64, 128), SPLIT_K=(2, 4, 8, 16))
    elif op == "lora_up":
        yield from _grid(both, (2,), BLOCK_M=(32, 64, 128), BLOCK_C=(64, 128))
    elif op == "lora_grad":
        programs = next(r["tile"]["constants"]["PROGRAMS"] for r in rows if r["tile"])
        rank = max(16, min(64, when.get("R_max", 64)))
        yield from _grid(both, (2, 3), BLOCK_M=(32, 64), BLOCK_C=(64, 128), BLOCK_R=(rank,), PROGRAMS=(programs // 2, programs, 2 * programs))
    elif op == "patch_embed" and fp32:
        yield from _grid(both, (2, 3), BLOCK_M=(64, 128), BLOCK_N=(64, 128), BLOCK_K=(32,), SUBTILES=(2, 4), DIRECT=(False,), FLATTEN=(False,))
    elif op == "patch_embed":
        gather = ("PW_multiple" in when,)
        yield from _grid(both, (3, 4), BLOCK_M=(64, 128), BLOCK_N=(128, 256), BLOCK_K=(64,), SUBTILES=(2, 4), DIRECT=gather, FLATTEN=(False, True))
    elif fp32:
        yield from _grid(both, (1, 2), BLOCK_M=(16, 32), BLOCK_N=(16, 32), TMA=tma)
    elif "M_max" in when:
        yield from _grid(both, (2, 3, 4), BLOCK_M=_rows((16, 32, 64), when), BLOCK_N=(32, 64, 128), TMA=tma)
    elif op == "cross_attention_dkdv":
        narrow = "D_max" in when
        yield from _grid(both, (1, 2, 3), BLOCK_M=(32, 64, 128), BLOCK_N=(64, 128) if narrow else (32, 64, 128), TMA=tma)
    else:
        yield from _grid(both, (2, 3), BLOCK_M=(64, 128), BLOCK_N=(32, 64, 128), TMA=tma)


def _rows(sizes: tuple[int, ...], when: Mapping) -> tuple[int, ...]:
    """The two largest blocks that M_max fills."""
    most = when.get("M_max", sizes[-1])
    return tuple(s for s in sizes if s == sizes[0] or s < 2 * most)[-2:]


def _grid(warps: tuple[int, ...], stages: tuple[int, ...], **constants: tuple) -> Iterator[dict]:
    for *values, w, s in itertools.product(*constants.values(), warps, stages):
        yield {"constants": dict(zip(constants, values, strict=True)), "num_warps": w, "num_stages": s}
