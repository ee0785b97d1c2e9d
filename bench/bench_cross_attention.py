"""Cross-attention of Llama-3.2-Vision 11B with an encoder mask, a long text and a step of decoding, against what runs it today.

pytest bench/bench_cross_attention.py
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from operator import attrgetter

import torch

from bench import attention_peers as peers
from bench.attention_peers import Call, Peer, Size
from bench.harness import BF16, EAGER, FP32, OURS, Case, DType, Run, by_device, compile_once, cost_of, installed, timed, with_backward
from fastfuse import ops
from fastfuse.ops._op import Cost

ONE_TILE = Size(1, tiles=1, shown=(1,))
SMALL = {"hq": 8, "hkv": 2, "d": 64, "tile": 401}
SCORES = 2**30  # bytes of fp32 scores up to which PyTorch's math backend is timed


test_cross_attention = timed


def _gpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    for size, backward in product(_texts(quick), (False, True)):
        first = (size.tokens, size.s_e) == (4096, 6404) and size.masked
        few = first and size.shown != (4,)
        yield attention_case(size, backward=backward, compiled=compile_all or few, priority=_priority(size))
    for size in _steps(quick):
        few = size.batch == 16 and size.s_e == 6404 and size.shown == (1,)
        yield attention_case(size, compiled=compile_all or few, priority=_priority(size))


def _texts(quick: bool) -> Iterator[Size]:
    if quick:
        yield from (Size(tokens, shown=(shown,)) for tokens, shown in ((4096, 4), (4096, 3), (4096, 1), (1024, 1)))
        yield Size(4096, masked=False)
        return
    for tokens in (256, 1024, 4096):
        yield replace(ONE_TILE, tokens=tokens)
        for images, shown in product((1, 2), (4, 3, 1)):
            yield Size(tokens, images, (shown,))
        yield Size(tokens, 2, in_turn=True)
        for size in (ONE_TILE, Size(1)):
            yield replace(size, tokens=tokens, masked=False)


def _steps(quick: bool) -> Iterator[Size]:
    for batch in (1, 16) if quick else (1, 4, 16, 64):
        for size in (Size(1),) if quick else (Size(1), ONE_TILE, Size(1, 2)):
            for shown in (1, 4) if size.tiles == 4 else (1,):
                yield replace(size, batch=batch, shown=(shown,))
        if batch > 1:
            yield Size(1, batch=batch, shown=(1, 2, 3, 4))


def _priority(size: Size) -> int:
    """A run may be cut off by its time limit: first one image of four tiles, a long text over it, and a few sequences decoding."""
    if size.s_e != 6404 or size.tokens == 256:
        return 4 if size.in_turn or size.s_e == 1601 else 3
    if size.decode:
        return 0 if size.batch in (1, 16) and len(size.shown) == 1 else 2
    return 0 if size.tokens == 4096 and size.shown != (4,) else 1


def _cpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    make = partial(attention_case, device="cpu")
    for dtype in (FP32,) if quick else (FP32, BF16):
        for backward in (False, True):
            yield make(Size(64, shown=(1,), **SMALL), dtype, backward=backward, compiled=compile_all)
            if quick:
                continue
            for size in (Size(256, shown=(3,), **SMALL), replace(ONE_TILE, tokens=256, **SMALL), Size(256, masked=False, **SMALL)):
                # FlexAttention knows no backward on a CPU.
                few = size.shown == (3,) and dtype == FP32 and not backward
                yield make(size, dtype, backward=backward, compiled=compile_all or few, priority=1)
        for batch, shown in ((4, 1),) if quick else product((1, 4, 16), (1, 4)):
            yield make(Size(1, batch=batch, shown=(shown,), **SMALL), dtype, compiled=compile_all)


cases = by_device(_gpu_cases, _cpu_cases)


def attention_case(
    size: Size,
    dtype: DType = BF16,
    device: str = "cuda",
    backward: bool = False,
    compiled: bool = False,
    priority: int = 0,
) -> Case:
    """device: whose peers are timed. With backward=True the gradients of q, k and v as well, timed together with the forward."""
    finish = partial(with_backward, leaves=lambda i: attrgetter("q", "k", "v")(i["call"])) if backward else torch.no_grad()
    found = _peers(size, device, backward, compiled)
    providers = {name: finish(_provider(peer)) if peer else None for name, peer in found.items()}
    judged_on = {"transformers": lambda i: i | {"call": i["call"].opened()}} if size.blind else {}  # its rule for rows that see nothing

    def make(device, seed):
        torch.manual_seed(seed)
        call = Call(size, dtype, device, backward)
        return {"call": call} | ({"dy": torch.randn(size.batch, size.tokens, size.hq * size.d, dtype=dtype, device=device)} if backward else {})

    op = "cross_attention_decode" if size.decode else "cross_attention" + (" fwd+bwd" if backward else "")
    return Case(op, str(size), dtype, make, providers, lambda i: peers.exact(i["call"], i.get("dy")), partial(_cost, backward), priority, judged_on)


def _peers(size: Size, device: str, backward: bool, compiled: bool) -> dict[str, Peer | None]:
    """In the order they are timed: what takes long to compile comes last."""
    found: dict[str, Peer | None] = {OURS: peers.fused_decode if size.decode else peers.fused, EAGER: peers.eager}
    if size.decode and set(size.shown) != {size.tiles}:
        found["fastfuse in place"] = partial(peers.fused_decode, cache=attrgetter("in_place"))
    if size.masked and not size.decode:
        if device == "cuda" and size.intervals:  # which a mask on a GPU is not asked for, as finding out would wait for it
            found["fastfuse interval"] = partial(peers.fused, mask=attrgetter("interval_mask"))
        found["fastfuse from_tiles"] = partial(peers.fused, mask=Call.mask_from_tiles)
        found["fastfuse from_dense"] = partial(peers.fused, mask=lambda c: ops.EncoderMask.from_dense(c.dense))
    found["transformers"] = peers.transformers if installed("transformers") else None
    if len({size.shown_of(n) for n in range(size.batch)}) == 1:
        found["sliced flash"] = peers.sliced
    found |= {name: partial(peers.sdpa, name) for name in _backends(size, device)}
    if compiled:
        eager = compile_once(peers._torchtune)
        found["torch.compile"] = lambda c: eager(c.q, c.k, c.v, c.dense)
    if compiled and not (backward and device == "cpu"):
        flex = compile_once(peers.flex)
        found["FlexAttention"] = lambda c: flex(c.q, c.k, c.v, c.block_mask)
        if size.masked and not size.decode:
            mask_and_flex = compile_once(lambda q, k, v, seen: peers.flex(q, k, v, peers.block_mask(seen, size)))
            found["FlexAttention +mask"] = lambda c: mask_and_flex(c.q, c.k, c.v, c.seen_tiles.flatten(2))
    return found


def _backends(size: Size, device: str) -> Iterator[str]:
    """PyTorch's own that take this call: on a GPU flash attention refuses every mask."""
    if device == "cpu" or not size.masked:
        yield "sdpa_flash"
    if device == "cuda":
        yield from ("sdpa_cudnn", "sdpa_efficient")
    if 4 * size.batch * size.hq * size.tokens * size.s_e <= SCORES:
        yield "sdpa_math"


def _provider(run: Peer) -> Run:
    return lambda i: (run(i["call"]),)


def _cost(backward: bool, inputs: dict) -> Cost:
    """A mask is no part of it: what the tiles' flags say in full is a few bytes a row."""
    c = inputs["call"]
    if c.size.decode:
        return ops.cross_attention_decode_cost(c.q, c.empty_cache(), tokens=c.size.shown_tokens)
    return cost_of((ops.cross_attention_cost, ops.cross_attention_bwd_cost)[: 1 + backward], c.q, c.k, c.v, visible=c.size.visible)
