"""On a GPU: cross-attention at Llama-3.2-Vision's shapes, every row of this chip, CUDA graphs, compile, decode, no waiting."""

import functools

import pytest
import torch
from numerics import assert_no_worse
from suite import captured, check, rows_of_this_chip

from cases.cross_attention import dense, make, make_decode
from fastfuse import tune
from fastfuse.ops import EncoderMask, StaticKVCache, cross_attention, cross_attention_decode

pytestmark = pytest.mark.gpu
TOKENS = 1601  # of a tile


def visible(b, s, images=1):
    """Tiles [b, s, images, 4] as a chat has them: text before the first image is blind, every image has other tiles."""
    tiles = torch.zeros(b, s, images, 4, dtype=torch.bool, device="cuda")
    for row in range(b):
        for i in range(images):
            first, end = 5 + i * s // images, s if i == images - 1 else 5 + (i + 1) * s // images
            tiles[row, first:end, i, : 1 + (row + i + 2) % 4] = True
    return tiles


def chat(b, s, images=1, **options):
    mask = visible(b, s, images).flatten(2).repeat_interleave(TOKENS, 2)
    return make("cuda", heads=(2, 4, 128), mask=mask, **{"dtype": torch.bfloat16} | options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("b, s, images, kind", [(1, 300, 1, "bits"), (2, 1024, 1, "interval"), (1, 257, 2, "bits"), (1, 257, 1, "interval")])
def test_chats_with_images(b, s, images, kind, dtype):
    check(chat(b, s, images, kind=kind, dtype=dtype), small_gradients=True)


@pytest.mark.parametrize("heads", [(2, 1, 64), (2, 3, 80), (2, 8, 96), (2, 4, 256)])
def test_heads_of_other_sizes(heads):
    mask = torch.rand(1, 173, 1601, device="cuda") < 0.3
    mask[:, [0, 1, 90]] = False
    for shape in ({"mask": mask, "kind": "bits"}, {"shape": mask.shape}):
        check(make("cuda", heads=heads, dtype=torch.bfloat16, **shape), small_gradients=True)


def test_fp32():
    check(make("cuda", heads=(2, 4, 128), mask=torch.rand(1, 100, 1601, device="cuda") < 0.5), small_gradients=True)


@pytest.mark.parametrize("op", ["cross_attention", "cross_attention_dq", "cross_attention_dkdv"])
@pytest.mark.parametrize("kind", ["bits", "interval"])
def test_every_row_of_this_chip(kind, op):
    for tile in rows_of_this_chip(op):
        with tune.pin(op, tile):
            check(chat(1, 261, kind=kind), small_gradients=True)


def test_nothing_waits_and_a_graph_replays_with_other_values():
    q, k, v = (chat(2, 64).only().tensors[name] for name in "qkv")
    tiles = visible(2, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        graph, y = captured(lambda: cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for shift in (1, 7):
        q.copy_(torch.randn_like(q))
        tiles.copy_(tiles.roll(shift, 1))
        graph.replay()
        assert torch.equal(y, cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS)))


@pytest.mark.parametrize("b, dtype", [(1, torch.bfloat16), (2, torch.float16), (16, torch.bfloat16)], ids=str)
def test_one_graph_serves_every_decode_step_and_fill(b, dtype):
    max_len = 4 * TOKENS
    call = make_decode("cuda", max_len, torch.ones(b, 1, max_len, dtype=torch.bool), (8, 4, 128), dtype=dtype).only()
    q, k, v = (call.tensors[name] for name in "qkv")
    cache = StaticKVCache(b, 8, 128, max_len, dtype, "cuda")
    cache.fill(k, v)
    graph, o = captured(functools.partial(cross_attention_decode, q, cache))
    for lengths in ((TOKENS, max_len), (0, 1), (129, 300)):
        torch.cuda.set_sync_debug_mode("error")
        try:
            held = torch.stack([torch.full((), n, device="cuda") for n in (lengths * b)[:b]])
            mask = (torch.arange(max_len, device="cuda") < held[:, None])[:, None]
            cache.fill(k, v, mask)
            q.mul_(-1)
            graph.replay()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        given = call.replaced(mask=mask)
        assert_no_worse(o, dense(given.tensors), dense(given.double().tensors))


def test_compiled():
    call, tiles = chat(1, 100), visible(1, 100)
    q, k, v = (call.tensors[name] for name in "qkv")
    run = torch.compile(lambda q, k, v, tiles: cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS)), fullgraph=True)
    y, want = run(q, k, v, tiles), cross_attention(q, k, v, EncoderMask.from_tiles(tiles, TOKENS))
    assert torch.equal(y, want)
    assert all(map(torch.equal, call.grads((y,)).values(), call.grads((want,)).values()))
