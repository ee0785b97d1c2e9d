"""Cross-attention of Llama-3.2-Vision 11B with an encoder mask, a long text and a step of decoding, against what runs it today.

pytest bench/bench_cross_attention.py
"""

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from bench import attention_peers as peers
from bench.attention_peers import Call, Peer, Size
from bench.harness import EAGER, OURS, Case, compile_once, installed
from fastfuse import ops
from fastfuse.ops._op import Cost

TEXT = (256, 1024, 4096)
BATCHES = (1, 4, 16, 64)
ONE_TILE = Size(1, tiles=1, shown=(1,))
SMALL = {"hq": 8, "hkv": 2, "d": 64, "tile": 401}
SCORES = 2**30  # bytes of fp32 scores up to which PyTorch's math backend is timed


def test_cross_attention(case: Case, provider: str, time_case: Callable) -> None:
    time_case(case, provider)


def cases(device: str, quick: bool, compile_all: bool) -> Iterator[Case]:
    yield from _gpu_cases(quick, compile_all) if device == "cuda" else _cpu_cases(quick, compile_all)


def _gpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    make = functools.partial(attention_case, dtype=torch.bfloat16, device="cuda")
    for size, backward in itertools.product(_quick_texts() if quick else _texts(), (False, True)):
        first = (size.tokens, size.s_e) == (4096, 6404) and size.masked
        few = first and size.shown != (4,)
        yield make(size, backward=backward, compiled=compile_all or few, priority=_priority(size))
    for size in _steps(quick):
        few = size.batch == 16 and size.s_e == 6404 and size.shown == (1,)
        yield make(size, compiled=compile_all or few, priority=_priority(size))


def _texts() -> Iterator[Size]:
    for tokens in TEXT:
        yield replace(ONE_TILE, tokens=tokens)
        for images, shown in itertools.product((1, 2), (4, 3, 1)):
            yield Size(tokens, images, (shown,))
        yield Size(tokens, 2, in_turn=True)
        for size in (ONE_TILE, Size(1)):
            yield replace(size, tokens=tokens, masked=False)


def _quick_texts() -> Iterator[Size]:
    for tokens, shown in ((4096, 4), (4096, 3), (4096, 1), (1024, 1)):
        yield Size(tokens, shown=(shown,))
    yield Size(4096, masked=False)


def _steps(quick: bool) -> Iterator[Size]:
    for batch in (1, 16) if quick else BATCHES:
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
    make = functools.partial(attention_case, device="cpu")
    for dtype in (torch.float32,) if quick else (torch.float32, torch.bfloat16):
        for backward in (False, True):
            yield make(Size(64, shown=(1,), **SMALL), dtype, backward=backward, compiled=compile_all)
            if quick:
                continue
            for size in (Size(256, shown=(3,), **SMALL), replace(ONE_TILE, tokens=256, **SMALL), Size(256, masked=False, **SMALL)):
                # FlexAttention knows no backward on a CPU.
                few = size.shown == (3,) and dtype == torch.float32 and not backward
                yield make(size, dtype, backward=backward, compiled=compile_all or few, priority=1)
        for batch, shown in ((4, 1),) if quick else itertools.product((1, 4, 16), (1, 4)):
            yield make(Size(1, batch=batch, shown=(shown,), **SMALL), dtype, compiled=compile_all)


def attention_case(
    size: Size,
    dtype: torch.dtype = torch.bfloat16,
    device: str = "cuda",
    backward: bool = False,
    compiled: bool = False,
    priority: int = 0,
) -> Case:
    """device: whose peers are timed. With backward=True the gradients of q, k and v as well, timed together with the forward."""
    finish = _with_backward if backward else torch.no_grad()
    found = _peers(size, device, backward, compiled)
    providers = {name: finish(_provider(peer)) if peer else None for name, peer in found.items()}
    judged_on = {"transformers": _opened} if size.blind else {}  # its rule for rows that see nothing

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        call = Call(size, dtype, device, backward)
        return {"call": call} | ({"dy": torch.randn(size.batch, size.tokens, size.hq * size.d, dtype=dtype, device=device)} if backward else {})

    def truth(i: dict) -> tuple[Tensor, ...]:
        return peers.exact(i["call"], i.get("dy"))

    op = "cross_attention_decode" if size.decode else "cross_attention" + (" fwd+bwd" if backward else "")
    return Case(op, str(size), dtype, make, providers, truth, functools.partial(_cost, backward), priority, judged_on)


def _peers(size: Size, device: str, backward: bool, compiled: bool) -> dict[str, Peer | None]:
    """In the order they are timed: what takes long to compile comes last."""
    found: dict[str, Peer | None] = {OURS: peers.fused_decode if size.decode else peers.fused, EAGER: peers.eager}
    if size.decode and set(size.shown) != {size.tiles}:
        found["fastfuse in place"] = peers.fused_decode_in_place
    if size.masked and not size.decode:
        if device == "cuda" and size.intervals:  # which a mask on a GPU is not asked for, as finding out would wait for it
            found["fastfuse interval"] = peers.fused_interval
        found |= {"fastfuse from_tiles": peers.fused_from_tiles, "fastfuse from_dense": peers.fused_from_dense}
    found["transformers"] = peers.transformers if installed("transformers") else None
    if len({size.shown_of(n) for n in range(size.batch)}) == 1:
        found["sliced flash"] = peers.sliced
    for name in _backends(size, device):
        found[name] = functools.partial(peers.sdpa, name)
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


def _provider(run: Peer) -> Callable[[dict], tuple[Tensor, ...]]:
    return lambda i: (run(i["call"]),)


def _opened(inputs: dict) -> dict:
    return inputs | {"call": inputs["call"].opened()}


def _with_backward(forward: Callable[[dict], tuple[Tensor, ...]]) -> Callable[[dict], tuple[Tensor, ...]]:
    def run(i: dict) -> tuple[Tensor, ...]:
        (y,) = forward(i)
        c = i["call"]
        return y.detach(), *torch.autograd.grad(y, (c.q, c.k, c.v), i["dy"])

    return run


def _cost(backward: bool, inputs: dict) -> Cost:
    """A mask is no part of it: what the tiles' flags say in full is a few bytes a row."""
    c = inputs["call"]
    if c.size.decode:
        return ops.cross_attention_decode_cost(c.q, c.empty_cache(), tokens=c.size.shown_tokens)
    costs = [cost(c.q, c.k, c.v, visible=c.size.visible) for cost in (ops.cross_attention_cost, ops.cross_attention_bwd_cost)]
    return Cost(sum(c.bytes for c in costs[: 1 + backward]), sum(c.flops for c in costs[: 1 + backward]))
