"""Patch embedding of Llama-3.2-Vision's tiles, and of a CLIP's images, against the modules it is made of.

pytest bench/bench_patch_embed.py
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import BF16, EAGER, FP32, OURS, Case, DType, Run, by_device, compile_once, cost_of, in_double, timed, with_backward, words
from bench.nf4_peers import short
from cases.embedding import Embedding, Size, eager, fused, torchtune
from fastfuse import tune
from fastfuse.models.llama3_2_vision._component_builders import ASPECT_RATIOS
from fastfuse.ops import patch_embed_bwd_cost, patch_embed_cost
from fastfuse.ops._op import Cost, nbytes

RATIOS = ((2, 2), (1, 3), (1, 1), (4, 1))  # (h, w), in turn: 12 of 16 tiles are no padding
CLIP = (Size(64, 1, 224, 32, 768, tables=None, norm=True), Size(64, 1, 224, 16, 768, tables=None, norm=True))

# What pick() chooses from, whatever it chooses: timed as providers of their own.
_CONSTANTS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "SUBTILES": 4, "FLATTEN": True}
ROUTES = {
    "library": None,
    "gemm": tune.Tile(_CONSTANTS | {"DIRECT": False}, num_warps=8, num_stages=3),
    "gather": tune.Tile(_CONSTANTS | {"DIRECT": True}, num_warps=8, num_stages=3),
}


test_patch_embed = timed


def _gpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    make = partial(embed_case, routes=True)
    for images, backward in product((16,) if quick else (1, 4, 16), (False, True)):
        few = images == 16
        yield make(Size(images), backward=backward, compiled=compile_all or few, priority=0 if few else 2)
    for backward in (False, True):
        yield make(Size(16, norm=True), backward=backward, compiled=compile_all, priority=1)
        if quick:
            continue
        yield make(Size(4, tables="ids", norm=True, pad_tokens_to=8), backward=backward, compiled=compile_all, priority=2)
        for size in CLIP:
            yield make(size, backward=backward, compiled=compile_all, priority=3)
    if not quick:
        for pixels in (FP32, torch.uint8):
            yield make(Size(16), pixels=pixels, compiled=compile_all, priority=2)
    for backward in (False, True):
        yield conv_case(Size(16), BF16, backward, priority=1)


def _cpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    for backward in (False, True):
        # 17 and 257 tokens a tile: in the cache, and far beyond it as 1601 are. There torchtune's scheme takes seconds a call.
        for pixels in (56,) if quick else (56, 224):
            yield embed_case(Size(16, pixels=pixels), FP32, backward=backward, compiled=compile_all, priority=int(pixels > 56))
        if not quick:
            yield embed_case(Size(16, pixels=56), BF16, backward=backward, compiled=compile_all)
            yield conv_case(Size(16, pixels=56), FP32, backward)


cases = by_device(_gpu_cases, _cpu_cases)


def embed_case(
    size: Size,
    dtype: DType = BF16,
    pixels: DType | None = None,
    backward: bool = False,
    compiled: bool = False,
    routes: bool = False,
    priority: int = 0,
) -> Case:
    """pixels: their dtype where it is another one. With backward=True the gradients of all parameters as well, timed together with the forward."""
    pixels = pixels or dtype
    finish = _with_backward if backward else torch.no_grad()
    providers = {OURS: finish(_provider(fused)), EAGER: finish(_provider(eager))}
    if routes:
        providers |= {f"fastfuse {name}": finish(tune.pin("patch_embed", tile)(_provider(fused))) for name, tile in ROUTES.items()}
    if size.tables == "grid":
        providers["torchtune"] = finish(_provider(torchtune))
    if compiled:
        providers["torch.compile"] = finish(_provider(compile_once(eager)))

    def make(device, seed):
        torch.manual_seed(seed)
        ratios = [RATIOS[n % len(RATIOS)] if size.tables else (1, 1) for n in range(size.images)]
        with torch.device(device):
            images = _pixels((size.images, size.tiles, 3, size.pixels, size.pixels), pixels)
            inputs = {"embedding": Embedding(size, dtype, device), "images": images, "aspect_ratio": torch.tensor(ratios)}
            if size.tables == "ids":
                inputs["ids"] = torch.tensor([1 + ASPECT_RATIOS.index(ratio) for ratio in ratios])
            if backward:
                inputs["dy"] = torch.randn(size.images, size.tiles, size.tokens, size.D, dtype=dtype)
        return inputs

    name = words(str(size), pixels != dtype and f"{short(pixels)} pixels")
    op = "patch_embed" + (" fwd+bwd" if backward else "")
    return Case(op, name, dtype, make, providers, in_double(finish(_provider(eager))), partial(_cost, backward), priority)


def conv_case(size: Size, dtype: DType, backward: bool, priority: int = 0) -> Case:
    """The convolution alone, which patch_embed contains: no provider of a whole embedding is compared with it, and there is no fastfuse in it."""

    def forward(i):
        return (F.conv2d(i["images"], i["weight"], stride=size.patch),)

    run = with_backward(forward, lambda i: [i["weight"]]) if backward else forward

    def make(device, seed):
        torch.manual_seed(seed)
        tiles, side = size.images * size.tiles, size.pixels // size.patch
        with torch.device(device):
            weight = torch.randn(size.D, 3, size.patch, size.patch, dtype=dtype) * (3 * size.patch**2) ** -0.5
            inputs = {"images": _pixels((tiles, 3, size.pixels, size.pixels), dtype), "weight": weight.requires_grad_(backward)}
            return inputs | ({"dy": torch.randn(tiles, size.D, side, side, dtype=dtype)} if backward else {})

    def cost(i):
        out = i["images"].shape[0] * (size.pixels // size.patch) ** 2
        passes = 1 + backward
        n_bytes = passes * (nbytes(i["images"], i["weight"]) + out * size.D * dtype.itemsize)
        return Cost(n_bytes, passes * 2 * out * i["weight"].numel())

    name = f"{size.images * size.tiles} tiles {size.pixels}px P{size.patch} D{size.D}"
    return Case("conv2d alone" + (" fwd+bwd" if backward else ""), name, dtype, make, {EAGER: run}, in_double(run), cost, priority)


def _pixels(shape: tuple[int, ...], dtype: DType) -> Tensor:
    return torch.randint(256, shape, dtype=dtype) if dtype == torch.uint8 else torch.randn(shape, dtype=dtype)


def _provider(run: Callable[..., Tensor]) -> Run:
    return lambda i: (run(i["embedding"], i["images"], i["aspect_ratio"], i.get("ids")),)


def _with_backward(forward: Run) -> Run:
    both = with_backward(forward, lambda i: list(i["embedding"].parameters()))

    def run(i):
        made = both(i)
        # The gates are judged together: of one number alone either side may be right by luck.
        gates = [t for t in made if t.numel() == 1]
        return *(t for t in made if t.numel() > 1), *([torch.cat(gates)] if gates else [])

    return run


def _cost(backward: bool, inputs: dict) -> Cost:
    e, places = inputs["embedding"], ("local_pos", "global_pos", "pre_pos")
    tables = {name: t for name, t in e.tables().items() if name in places}
    passes = (patch_embed_cost, patch_embed_bwd_cost)[: 1 + backward]
    return cost_of(passes, inputs["images"], e.conv.weight, e.cls.weight, **tables, pad_tokens_to=e.pad_tokens_to)
