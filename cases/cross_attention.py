"""cross_attention and cross_attention_decode: masks of images, holes and rows that see nothing; dense attention as torchtune calls it as the formula."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import Call, Op, Refusal, Tensors, route
from fastfuse import Unsupported, tune
from fastfuse.ops import EncoderMask, StaticKVCache, cross_attention, cross_attention_decode

MODULE = cross_attention.__globals__  # fastfuse.ops.cross_attention names the function


def tiles(s: int, tokens: int, *images: tuple[int, int, int]) -> Tensor:
    """bool [1, s, s_e] of images (first token, end, real tiles) of two tiles of `tokens` columns."""
    mask = torch.zeros(1, s, len(images) * 2 * tokens, dtype=torch.bool)
    for i, (start, end, real) in enumerate(images):
        mask[:, start:end, i * 2 * tokens : (i * 2 + real) * tokens] = True
    return mask


def scattered(b: int, s: int, s_e: int, blind=()) -> Tensor:
    mask = torch.rand(b, s, s_e, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, list(blind)] = False
    return mask


def front(lengths: tuple[int, ...], s_e: int) -> Tensor:
    """bool [b, 1, s_e]: sequence i sees lengths[i] tokens."""
    return (torch.arange(s_e) < torch.tensor(lengths)[:, None])[:, None]


def laid_out(b: int, heads: int, n: int, d: int, dtype: torch.dtype, device: str, layout: str) -> Tensor:
    """[b, heads, n tokens, d]; "tokens first" in memory is what modules give."""
    shape = {"tokens first": (b, n, heads, d), "last dim apart": (b, heads, d, n), "same batch": (1, heads, n, d), "gaps": (b, heads + 1, 2 * n, d + 5)}
    x = torch.randn(shape.get(layout, (b, heads, n, d)), device=device).to(dtype)
    if layout == "tokens first":
        return x.transpose(1, 2)
    if layout == "gaps":
        return x[:, 1:, 1::2, 3:-2]
    return x.mT if layout == "last dim apart" else x.expand(b, -1, -1, -1)


def make(device, shape=None, heads=(1, 4, 16), *, mask=None, b=None, dtype=torch.float32, layout="tokens first", kind=None, **options) -> Call:
    """shape: (b, s, s_e), the mask's where there is one, b its batch unless given. heads: (key heads, query heads of each, head_dim). kind: of the
    EncoderMask that the mask becomes, None for a dense one. options: cross_attention's own."""
    batch, s, s_e = mask.shape if shape is None else shape
    (hkv, G, d), b = heads, b or batch
    tensors = {name: laid_out(b, h, n, d, dtype, device, layout).requires_grad_() for name, h, n in (("q", hkv * G, s), ("k", hkv, s_e), ("v", hkv, s_e))}
    tensors["mask"] = None if mask is None else mask.to(device)

    def run(t: Tensors, **more):
        mask = t["mask"] if kind is None else EncoderMask.from_dense(t["mask"], kind=kind)
        results = cross_attention(t["q"], t["k"], t["v"], mask, **options | more)
        return _finite(*results) if options.get("return_lse") else results

    return Call(run, partial(dense, **options), tensors)


NOTHING_SEEN = -7.0  # in the place of inf, of which no error can be measured


def _finite(o: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    return o, torch.where(lse == torch.inf, NOTHING_SEEN, lse)


def dense(t: Tensors, scale=None, empty_rows="zero", return_lse=False):
    """As torchtune: keys and values for every head, rows without a column unmasked and cleared afterwards."""
    q, k, v, mask = t["q"], t["k"], t["v"], t["mask"]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    if mask is None:
        mask = torch.ones(1, q.shape[2], k.shape[2], dtype=torch.bool, device=k.device)
    blind = ~mask.any(-1, keepdim=True)
    seen = mask | blind
    # By the one of PyTorch's kernels that is right for every mask on a GPU, and that has a second derivative; in fp32 by a CPU's own, too.
    own = [SDPBackend.FLASH_ATTENTION] if q.dtype != torch.float64 and not q.is_cuda else []
    with sdpa_kernel([*own, SDPBackend.MATH]):
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], scale=scale)
    if empty_rows != "uniform":
        o = o.masked_fill(blind[:, None], 0)
    if not return_lse:
        return o
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).to(torch.promote_types(q.dtype, torch.float32))
    lse = scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)
    return o, lse.masked_fill(blind[..., 0][:, None], NOTHING_SEEN)


IMAGES = tiles(35, 67, (3, 17, 1), (17, 35, 2))  # two, of padded tiles
HOLES = tiles(20, 80, (5, 20, 1), (6, 20, 1))
RANDOM = scattered(2, 19, 173, (0, 1, 17))
NOTHING, EVERYTHING = torch.zeros(1, 11, 70, dtype=torch.bool), torch.ones(1, 11, 256, dtype=torch.bool)
BLIND = {"mask": tiles(33, 150, (7, 33, 1)), "heads": (1, 4, 32)}
CASES = {
    "a few tokens": {"mask": scattered(2, 5, 67, (0,))},
    "a few tokens, no mask": {"shape": (1, 5, 67), "heads": (2, 2, 16)},
    "holes": {"mask": HOLES, "heads": (1, 3, 16)},
    "random": {"mask": RANDOM, "heads": (1, 4, 32)},
    "no mask": {"shape": (2, 13, 173), "heads": (1, 4, 24)},
    "one image, blind rows": BLIND,
    "one image of two tiles": {"mask": tiles(9, 67, (2, 9, 2)), "heads": (2, 4, 16)},
    "two images, padded tiles": {"mask": IMAGES, "heads": (1, 4, 32)},
    "interleaved images": {"mask": tiles(29, 67, (1, 10, 2), (10, 20, 1), (20, 29, 2))},
    "random, one key head": {"mask": scattered(1, 17, 129), "heads": (1, 8, 20)},
    "nothing is seen": {"mask": NOTHING},
    "everything is seen": {"mask": EVERYTHING},
    "the last columns": {"mask": torch.arange(130).ge(128).expand(1, 5, 130), "heads": (1, 1, 16)},
    "a batch shares one mask": {"mask": tiles(9, 67, (2, 9, 1)), "heads": (1, 2, 16), "b": 3},
    "no mask, whole blocks": {"shape": (1, 33, 128), "heads": (2, 1, 16)},
    "no mask, groups of three": {"shape": (1, 21, 67), "heads": (1, 3, 32)},
    "one token": {"mask": scattered(2, 1, 201), "heads": (1, 4, 32)},
    "head_dim 80": {"mask": tiles(9, 67, (2, 9, 1)), "heads": (1, 4, 80)},
    "head_dim 256": {"mask": tiles(5, 40, (1, 5, 1)), "heads": (1, 2, 256), "dtype": torch.float16},  # what no kernel takes in fp32
    "head_dim 7": {"mask": tiles(5, 40, (1, 5, 1)), "heads": (1, 2, 7)},
    "intervals, blind rows": {**BLIND, "kind": "interval"},
    "bits, blind rows": {**BLIND, "kind": "bits"},
    "intervals, nothing is seen": {"mask": NOTHING, "kind": "interval"},
    "intervals, everything is seen": {"mask": EVERYTHING, "kind": "interval"},
    "uniform, one image": {**BLIND, "empty_rows": "uniform"},
    "uniform, random": {"mask": RANDOM, "heads": (1, 4, 32), "empty_rows": "uniform"},
    "uniform, nothing is seen": {"mask": NOTHING, "empty_rows": "uniform"},
    "lse of a few tokens": {"mask": scattered(2, 5, 67, (0,)), "return_lse": True},
    "lse, two images": {"mask": IMAGES, "heads": (1, 4, 32), "return_lse": True},
    "lse, random": {"mask": RANDOM, "heads": (1, 4, 32), "return_lse": True},
    "lse, no mask, groups of three": {"shape": (1, 21, 67), "heads": (1, 3, 32), "return_lse": True},
    "scale": {"mask": HOLES, "heads": (1, 3, 16), "scale": 0.7},
    "scale below 0": {"mask": HOLES, "heads": (1, 3, 16), "scale": -0.4},
    "scale 0": {"mask": HOLES, "heads": (1, 3, 16), "scale": 0.0},
    "large scores": {"mask": IMAGES, "heads": (1, 4, 32), "scale": 40.0},  # exp would overflow in fp32 from 88 on; a row's largest score is taken off first
    "heads first": {"mask": IMAGES, "heads": (1, 4, 32), "layout": "plain"},
    "gaps": {"mask": IMAGES, "heads": (1, 4, 32), "layout": "gaps"},
    "last dim apart": {"mask": IMAGES, "heads": (1, 4, 32), "layout": "last dim apart"},
    "no batch": {"shape": (0, 5, 9), "heads": (1, 2, 16)},
    "no tokens": {"mask": torch.ones(1, 0, 9, dtype=torch.bool), "heads": (1, 2, 16)},
    "no columns": {"mask": torch.ones(1, 5, 0, dtype=torch.bool), "heads": (1, 2, 16), "return_lse": True},
}


def tiled(BLOCK_M: int, BLOCK_N: int, TMA: bool = False, splits: int | None = None):
    """The three kernels' tiles, pinned, and how many splits of the columns a forward makes."""
    tile = tune.Tile({"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "TMA": TMA}, 4, 1)
    constants = [(MODULE, {"_splits": lambda *_: splits})] if splits else ()
    return partial(route, "triton", dict.fromkeys(("cross_attention", "cross_attention_dq", "cross_attention_dkdv"), tile), constants)


ROUTES = {
    "reference": partial(route, "auto"),  # on a CPU: PyTorch's kernel run by run
    "kernels": partial(route, "triton"),
    "small tiles, 3 splits": tiled(32, 64, splits=3),
    "wide tiles, 5 splits": tiled(128, 64, splits=5),
    "large tiles": tiled(128, 128),
    "torch": partial(route, "torch"),
}


def _refusals() -> list[Refusal]:
    q, k = torch.zeros(2, 8, 5, 16), torch.zeros(2, 2, 9, 16)
    mask = torch.ones(2, 5, 9, dtype=torch.bool)

    def refused(error, message, q=q, k=k, v=None, mask=None, **options):
        return lambda: cross_attention(q, k, k if v is None else v, mask, **options), error, message

    value, kind, uncovered = partial(refused, ValueError), partial(refused, TypeError), partial(refused, Unsupported, backend="triton")
    return [
        kind("q is a list, not a tensor", [1.0]),
        value(r"q has shape \(8, 5, 16\), expected \(b, heads, tokens, head_dim\)", q[0]),
        value("k is torch.int32, expected floating point", k=k.int()),
        value(r"k has shape \(2, 2, 9, 16\), v \(2, 2, 8, 16\)", v=k[:, :, :8]),
        value("q has a batch of 2, k of 1", k=k[:1]),
        value("q has 7 heads, k 2, which does not divide them", q[:, :7]),
        value("q has 8 heads, k 0, which does not divide them", k=k[:, :0]),
        value("q has head_dim 8, k 16", q[..., :8]),
        value("head_dim is 0", q[..., :0], k[..., :0]),
        value("q is torch.float32, k torch.float16", k=k.half()),
        value("q is on cpu, k on meta", k=k.to("meta")),
        value("mask is torch.float32, expected torch.bool", mask=mask.float()),
        value("mask is torch.int32, expected torch.bool", mask=mask.int()),
        kind("mask is a list, expected a bool tensor or an EncoderMask", mask=[[True]]),
        value(r"mask has shape \(2, 4, 9\), q and k need \(2 or 1, 5, 9\)", mask=mask[:, :4]),
        value(r"mask has shape \(2, 5, 8\), q and k need \(2 or 1, 5, 9\)", mask=mask[..., :8]),
        value(r"mask has shape \(3, 5, 9\)", mask=mask[:1].expand(3, -1, -1)),
        value(r"mask has shape \(2, 1, 5, 9\)", mask=mask[:, None]),
        value(r"mask has shape \(2, 4, 9\)", mask=EncoderMask.from_dense(mask[:, :4])),
        value("q is on cpu, mask on meta", mask=mask.to("meta")),
        value("empty_rows is 'mean', expected 'zero' or 'uniform'", mask=mask, empty_rows="mean"),
        value("backend is 'cuda', not one of", backend="cuda"),
        uncovered("q is torch.float64, covered are bf16, fp16 and fp32", q.double(), k.double()),
        uncovered("head_dim is 144, covered are up to 128 in torch.float32", q.repeat(1, 1, 1, 9), k.repeat(1, 1, 1, 9)),
        uncovered("head_dim is 272, covered are up to 256", q.half().repeat(1, 1, 1, 17), k.half().repeat(1, 1, 1, 17)),
        uncovered("264 query heads share a key head, covered are up to 32", q.repeat(1, 33, 1, 1), k[:, :1]),
    ]


def make_decode(device, s_e, seen, heads=(1, 4, 16), *, s=1, dtype=torch.float32, layout="tokens first", max_len=None, compact=True, slack=torch.nan,
                lse=True, **options) -> Call:  # fmt: skip
    """q of s tokens over a cache that k and v of s_e tokens fill by the mask `seen`, bool [b, 1, s_e]. slack: what lies in the cache where nothing is held."""
    (hkv, G, d), b = heads, len(seen)
    q, k, v = (laid_out(b, h, n, d, dtype, device, layout) for h, n in ((hkv * G, s), (hkv, s_e), (hkv, s_e)))

    def run(t: Tensors, **more):
        k, v = t["k"], t["v"]
        cache = StaticKVCache(len(k), hkv, d, max_len or s_e, k.dtype, device=k.device)
        cache.k.fill_(slack)
        cache.v.fill_(slack)
        cache.fill(k, v, t["mask"], compact=compact)
        return _finite(*cross_attention_decode(t["q"], cache, return_lse=True, **options | more))

    def formula(t: Tensors):
        return dense(t | {"mask": t["mask"].expand(-1, t["q"].shape[2], -1)}, return_lse=True, **options)

    return Call(run, formula, {"q": q.requires_grad_(), "k": k, "v": v, "mask": seen.to(device)})


LENGTHS = front((0, 1, 129, 300), 300)
DECODE_CASES = {
    "lengths": {"s_e": 70, "seen": front((0, 1, 70), 70), "max_len": 75},
    "three tokens": {"s_e": 67, "seen": scattered(2, 1, 67), "s": 3, "max_len": 140},
    "two key heads, d 20": {"s_e": 300, "seen": LENGTHS, "heads": (2, 1, 20), "max_len": 301},
    "groups of three": {"s_e": 300, "seen": LENGTHS, "heads": (1, 3, 16), "s": 2, "scale": 0.3},
    "scale below 0": {"s_e": 300, "seen": LENGTHS, "heads": (2, 4, 64), "scale": -0.2},
    "groups of eight": {"s_e": 300, "seen": LENGTHS, "heads": (1, 8, 128), "s": 3},
    "slack at every edge of a block": {"s_e": 256, "seen": front((63, 64, 65, 128, 255), 256), "heads": (1, 2, 16), "max_len": 400},
    "a batch of 64": {"s_e": 130, "seen": front((129, 3, 0, 64, 1, 0, 0, 0) * 8, 130), "heads": (1, 2, 16)},
    "a mask in place of lengths": {"s_e": 40, "seen": scattered(2, 1, 40), "s": 2, "max_len": 50, "compact": False},
    "intervals in place of lengths": {"s_e": 67, "seen": front((67, 30), 67), "heads": (2, 2, 16), "max_len": 140, "compact": False},
}
_KERNELS = {"pack_mask_kernel", "block_states_kernel", "block_list_kernel"} | {n for n in MODULE if n.endswith("_kernel")}
_BACKWARDS = {"cross_attention_dq_kernel": {"q"}, "cross_attention_dkdv_kernel": {"k", "v"}}
OPS = [
    Op(
        "cross_attention", make, CASES, ("a few tokens", "a few tokens, no mask"), ("holes", "lse of a few tokens", "head_dim 256"), ROUTES, _KERNELS, _BACKWARDS,
        autocast=("q", "k", "v"),
        dynamic=(
            {"q": (0, 2), "k": (0,), "v": (0,), "mask": (0, 1)},
            [{"mask": scattered(b, s, 173, (0,)), "heads": (1, 4, 32)} for b, s in ((2, 19), (3, 23), (4, 31))],
        ),
        second_gradients=(20, 160),
        small_gradients=True,
        result_is_read_again=True,
        reads_on_cpu=True,
        refusals=_refusals(),
    ),
    Op(
        "cross_attention_decode", make_decode, DECODE_CASES, ("lengths", "three tokens"), ("a mask in place of lengths",), ROUTES, _KERNELS | {"kv_cache_write_kernel"},
        {"cross_attention_dq_kernel": {"q"}},
        autocast=("q", "k", "v"),
        second_gradients=(20, 160),
        small_gradients=True,
        result_is_read_again=True,
        reads_on_cpu=True,
    ),
]  # fmt: skip
