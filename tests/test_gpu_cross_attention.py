"""On a GPU: cross-attention at Llama-3.2-Vision's shapes, every row of this chip, CUDA graphs, compile, decode, no waiting."""

import pytest
import torch
from numerics import assert_no_worse, in_several_orders
from reference import assert_results_no_worse
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastfuse import tune
from fastfuse.ops import EncoderMask, StaticKVCache, cross_attention, cross_attention_decode

pytestmark = pytest.mark.gpu
TOKENS = 1601  # of a tile


def visible(b: int, s: int, images: int = 1) -> torch.Tensor:
    """Tiles [b, s, images, 4] as a chat has them: text before the first image is blind, every image has other tiles."""
    tiles = torch.zeros(b, s, images, 4, dtype=torch.bool, device="cuda")
    for row in range(b):
        for i in range(images):
            first, end = 5 + i * s // images, s if i == images - 1 else 5 + (i + 1) * s // images
            tiles[row, first:end, i, : 1 + (row + i + 2) % 4] = True
    return tiles


def leaves(b: int, s: int, s_e: int, d: int, dtype: torch.dtype, hkv: int = 2, G: int = 4) -> tuple[torch.Tensor, ...]:
    def leaf(heads, n):
        return torch.randn(b, n, heads, d, device="cuda").to(dtype).transpose(1, 2).requires_grad_()

    return leaf(hkv * G, s), leaf(hkv, s_e), leaf(hkv, s_e)


def dense(q, k, v, mask: torch.Tensor | None):
    """One batch row and all its heads at a time, by the one kernel of PyTorch that is right for every mask."""
    outs = []
    for row in range(q.shape[0]):
        seen = None if mask is None else mask[row % mask.shape[0]]
        blind = None if seen is None else ~seen.any(-1, keepdim=True)
        with sdpa_kernel(SDPBackend.MATH):
            G = q.shape[1] // k.shape[1]
            rest = (t[row : row + 1].repeat_interleave(G, 1) for t in (k, v))
            o = F.scaled_dot_product_attention(q[row : row + 1], *rest, attn_mask=None if seen is None else (seen | blind)[None, None])
        outs.append(o if blind is None else o.masked_fill(blind, 0))
    return torch.cat(outs)


def check(q, k, v, mask: EncoderMask | None) -> None:
    seen = None if mask is None else mask.to_dense()
    dy = torch.randn(q.shape, device="cuda", dtype=torch.float64)
    wide = [t.detach().double().requires_grad_() for t in (q, k, v)]

    def results(y, *given):
        return y.detach(), {n: (g,) for n, g in zip("qkv", torch.autograd.grad(y, given, dy.to(y.dtype)), strict=True)}

    got = results(cross_attention(q, k, v, mask), q, k, v)
    assert_results_no_worse(got, in_several_orders(lambda: results(dense(q, k, v, seen), q, k, v)), results(dense(*wide, seen), *wide))
    if seen is not None:
        blind = ~seen.any(-1).expand(q.shape[0], -1)
        assert not got[0].transpose(1, 2)[blind].any() and not got[1]["q"][0].transpose(1, 2)[blind].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("b, s, images", [(1, 300, 1), (2, 1024, 1), (1, 257, 2)])
@pytest.mark.parametrize("kind", ["bits", "interval"])
def test_chats_with_images(kind, b, s, images, dtype):
    if kind == "interval" and images > 1:
        images = 1
    q, k, v = leaves(b, s, images * 4 * TOKENS, 128, dtype)
    check(q, k, v, EncoderMask.from_tiles(visible(b, s, images), TOKENS, kind=kind))


@pytest.mark.parametrize("d, G", [(64, 1), (80, 3), (96, 8), (256, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_of_other_sizes(masked, d, G):
    q, k, v = leaves(1, 173, 1601, d, torch.bfloat16, 2, G)
    mask = torch.rand(1, 173, 1601, device="cuda") < 0.3
    mask[:, [0, 1, 90]] = False
    check(q, k, v, EncoderMask.from_dense(mask) if masked else None)


def test_fp32():
    q, k, v = leaves(1, 100, 1601, 128, torch.float32)
    check(q, k, v, EncoderMask.from_dense(torch.rand(1, 100, 1601, device="cuda") < 0.5))


def rows(op: str) -> list:
    if not torch.cuda.is_available():
        return [None]
    chip = tune.covering_arch(op, tune.arch_of(torch.device("cuda", 0)))
    mine = [r for r in tune.table(op) if r["arch"] == chip and r["when"].get("dtype") != "fp32"]
    return [tune.Tile(r["tile"]["constants"], r["tile"]["num_warps"], r["tile"]["num_stages"]) for r in mine]


@pytest.mark.parametrize("op", ["cross_attention", "cross_attention_dq", "cross_attention_dkdv"])
@pytest.mark.parametrize("kind", ["bits", "interval"])
def test_every_row_of_this_chip(kind, op):
    for tile in rows(op):
        with tune.pin(op, tile):
            q, k, v = leaves(1, 261, 4 * TOKENS, 128, torch.bfloat16)
            check(q, k, v, EncoderMask.from_tiles(visible(1, 261), TOKENS, kind=kind))


def test_nothing_waits_and_a_graph_replays_with_other_values():
    q, k, v = (t.detach() for t in leaves(2, 64, 4 * TOKENS, 128, torch.bfloat16))
    tiles = visible(2, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for shift in (1, 7):
        q.copy_(torch.randn_like(q))
        tiles.copy_(tiles.roll(shift, 1))
        graph.replay()
        assert torch.equal(y, cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS)))


@pytest.mark.parametrize("b", [1, 16])
def test_decode_is_the_last_row_of_the_prefill(b):
    q, k, v = (t.detach() for t in leaves(b, 33, 4 * TOKENS, 128, torch.bfloat16, 8))
    mask = EncoderMask.from_tiles(visible(b, 33), TOKENS)
    cache = StaticKVCache(b, 8, 128, 4 * TOKENS, torch.bfloat16, "cuda")
    cache.fill(k, v, mask)
    want = dense(q[:, :, -1:].double(), k.double(), v.double(), mask.last_row().to_dense())
    eager = dense(q[:, :, -1:], k, v, mask.last_row().to_dense())
    assert_no_worse(cross_attention_decode(q[:, :, -1:], cache), eager, want)
    graph, x = torch.cuda.CUDAGraph(), q[:, :, -1:].clone()
    with torch.cuda.graph(graph):
        y = cross_attention_decode(x, cache)
    for lengths in (1, 129, 4 * TOKENS, 0):  # one graph for whatever the cache holds
        cache.lengths.fill_(lengths)
        graph.replay()
        assert torch.equal(y, cross_attention_decode(x, cache)) and (lengths or not y.any())


def test_compiled():
    q, k, v = leaves(1, 100, 4 * TOKENS, 128, torch.bfloat16)
    tiles = visible(1, 100)
    run = torch.compile(lambda q, k, v, tiles: cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS)), fullgraph=True)
    y, want = run(q, k, v, tiles), cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS))
    assert torch.equal(y, want)
    for a, b in zip(torch.autograd.grad(y.sum(), (q, k, v)), torch.autograd.grad(want.sum(), (q, k, v)), strict=True):
        assert torch.equal(a, b)
