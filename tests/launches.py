"""Every launch through Triton's own argument binder and compiler, for a GPU that is not there. Run by test_codegen.py, without the interpreter."""

import collections
import json
import sys
import warnings
from types import SimpleNamespace

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastfuse import tune
from fastfuse.kernels.nf4 import BITSANDBYTES
from fastfuse.ops.cross_attention import _cross_attention, _cross_attention_bwd, listed_tokens
from fastfuse.ops.encoder_mask import _mask_blocks, _pack_mask, _pack_tiles
from fastfuse.ops.lora_row_norms import _nf4_row_norms
from fastfuse.ops.low_rank import lora_grad
from fastfuse.ops.nf4_linear import Group, Projection, _launch, _nf4_linear_dx
from fastfuse.ops.nf4_swiglu_mlp import _swiglu, _swiglu_bwd
from fastfuse.ops.patch_embed import _GRADIENTS, Tables, _patch_embed, _patch_embed_bwd
from fastfuse.ops.static_kv_cache import _kv_cache_write
from fastfuse.quant.nf4 import NF4View

K = 256
launched: collections.Counter = collections.Counter()
compiled: set = set()
fused: dict[str, list[bool]] = {}
unnamed: set = set()


class NoDevice:
    """A driver that says sm_90 and has nothing to launch on."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_device_interface = staticmethod(lambda: SimpleNamespace(current_device=lambda: 0, set_device=lambda device: None))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def compile_only(self, *args, grid, warmup=False, **options):
    assert all(0 < n < 2**31 for n in grid), grid
    kernel = real(self, *args, grid=grid, warmup=True, **options)
    launched[self.__name__] += 1
    compiled.add(kernel.hash)
    fused.setdefault(self.__name__, []).append(kernel.metadata.enable_fp_fusion)
    if "enable_fp_fusion" not in options:
        unnamed.add(self.__name__)


def weight(N: int) -> NF4View:
    blocks = N * K // 64
    scales = (torch.zeros(blocks, dtype=torch.uint8), torch.zeros(256), torch.zeros(-(-blocks // 256)), torch.zeros(()))
    return NF4View(torch.zeros(N * K // 2, dtype=torch.uint8), torch.tensor(BITSANDBYTES), scales, 64, (N, K), torch.bfloat16)


def body(op):
    """The op's launcher without the switch of the current device."""
    return op._init_fn.__wrapped__.__wrapped__


def step(M: int, N: int, ranks: tuple, low: torch.dtype, everything: bool) -> None:
    """Forward and backward of one group, in the launches that an H200 would see."""
    dtype = torch.bfloat16
    vector = torch.ones(N) if everything else None
    projections = [
        Projection(
            weight(N), torch.zeros(R, K, dtype=low), torch.zeros(N, R, dtype=low), 2.0, torch.zeros(N, dtype=dtype) if everything else None, vector, vector
        )
        if R
        else Projection(weight(N))
        for R in ranks
    ]
    x, n = torch.zeros(M, K, dtype=dtype), len(ranks)
    group = Group.of("op", x, projections, torch.zeros(n, dtype=torch.int64) if everything else None, 0.1)
    xa = _launch(x, group, everything)[n]
    dy = [torch.zeros(M, N, dtype=dtype) for _ in ranks]
    dxa = xa if group.a else None
    body(_nf4_linear_dx)(dy, *group.args()[:8], group.factor, group.seeds, 0.1, dxa, K, False)
    for i in range(n if group.a else 0):
        columns, factor = xa[:, group.columns(i)], group.factor[i] if group.factor else None
        body(lora_grad)(dy[i], columns, group.b[i], factor, None, 0.0, 2.0, True, False)
        body(lora_grad)(x, columns, None, None, group.seed(i), 0.1, 1.0, True, False)
        body(_nf4_row_norms)(*group.weight(i, K).parts(), dtype, group.a[i], group.b[i], 2.0, False)


def embed(images: int, patch: int, norm: bool, ids: bool, tiled: bool, dtype: torch.dtype, pixels: torch.dtype = torch.bfloat16, pad_to: int = 1) -> None:
    """Forward and backward of patch_embed with everything that goes with it."""
    D, n_tiles, n = 64, 4, 5
    like = {"dtype": dtype}
    x, w = torch.zeros(images, n_tiles, 3, 2 * patch, 2 * patch, dtype=pixels), torch.zeros(D, 3, patch, patch, dtype=torch.bfloat16)
    ratio = None if not tiled else torch.zeros(images, dtype=torch.int64) if ids else torch.ones(images, 2, dtype=torch.int32)
    vector, gate = torch.zeros(D, **like), torch.zeros(1, **like)
    rows = (7, 4) if ids else (4, 4)
    of_tiles = (torch.zeros(*rows, n, D, **like), gate, torch.zeros(*rows, 1, D, **like), gate) if tiled else (None,) * 4
    tables = Tables(vector, vector, torch.zeros(n, D, **like), *of_tiles, *((vector, vector) if norm else (None, None)))
    numbers = ([0.5], [1.0, 2.0, 3.0]) if pixels == torch.uint8 else ([], [])
    eps = 1e-5 if norm else None
    y, kept, stats = body(_patch_embed)(x, w, ratio, *tables, eps, False, *numbers, pad_to, norm, False)
    wanted = [name != "images" and getattr(tables, name, w) is not None for name in _GRADIENTS]
    body(_patch_embed_bwd)(y, x, w, ratio, *tables, eps, False, *numbers, kept, stats, wanted, False)


def fill(s_e: int, compacted: bool, b: int = 2) -> None:
    cache, new = torch.zeros(b, 2, 2048, 128, dtype=torch.bfloat16), torch.zeros(b, s_e, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    lengths = torch.zeros(b, dtype=torch.int32)
    places = torch.zeros(b, s_e, dtype=torch.int32) if compacted else None
    body(_kv_cache_write)(cache, cache.clone(), lengths, new, new, places, lengths, False, False)


def attend(s: int, s_e: int, G: int = 4, d: int = 128, dtype: torch.dtype = torch.bfloat16, mask: str = "bits", b: int = 2, masks: int = 2) -> None:
    """A mask, forward and backward; with lengths the forward alone, as in decoding."""
    hkv = 2
    q, k = torch.zeros(b, s, hkv * G, d, dtype=dtype).transpose(1, 2), torch.zeros(b, hkv, s_e, d, dtype=dtype)
    lengths, visible, blocks = None, (None, None), (None,) * 4
    if mask == "lengths":
        lengths = torch.zeros(b, dtype=torch.int32)
    elif mask:
        packed = body(_pack_tiles)(torch.zeros(masks, s, 2, dtype=torch.bool), s_e // 2, False) if mask == "tiles" else None
        bits, empty = packed or body(_pack_mask)(torch.zeros(masks, s, s_e, dtype=torch.bool), False)
        visible = torch.zeros(masks, s, 2, dtype=torch.int32) if mask == "interval" else bits, empty
        blocks = body(_mask_blocks)(*visible, s_e, listed_tokens(G), mask != "interval", False)
    o, lse = body(_cross_attention)(q, k, k, lengths, *visible, *blocks, 0.1, False)
    if lengths is None:
        for dlse, wanted in ((None, [True, True, True]), (lse, [False, False, True])):
            body(_cross_attention_bwd)(o, q, k, k, o, lse, dlse, None, *visible, *blocks, 0.1, wanted, False)


if __name__ == "__main__":
    real, JITFunction.run = JITFunction.run, compile_only
    triton.knobs.language.default_fp_fusion = False  # as from Triton 3.10 on: what a launch does not name is off
    warned = warnings.catch_warnings(record=True).__enter__()
    warnings.simplefilter("always")
    triton.runtime.driver.set_active(NoDevice())
    tune.arch_of = lambda device: "sm_90"
    for M in (1, 64, 300, 2000):  # split, mid, mid with a whole tile, dense
        step(M, 256, (16,), torch.bfloat16, False)
        step(M, 33, (16, 0, 20), torch.float32, True)
    step(1, 256, (0,), torch.bfloat16, False)
    step(1, 256, (1,), torch.bfloat16, False)
    before = len(compiled)
    for M in (2, 15, 16):  # other token counts, the same kernels
        step(M, 256, (16,), torch.bfloat16, False)
    again = len(compiled)
    for patch in (14, 16):  # patchified, gathered
        for dtype in (torch.bfloat16, torch.float32):
            embed(2, patch, True, False, True, dtype)
            embed(2, patch, False, True, True, dtype, torch.uint8, 8)
            embed(2, patch, False, False, False, dtype, torch.float32)
            embed(1, patch, False, True, True, dtype, torch.float32)
    images = len(compiled)
    for n in (3, 4, 16, 100):
        embed(n, 14, False, True, True, torch.bfloat16, torch.uint8, 8)
        embed(n, 14, True, False, True, torch.bfloat16)
    images = len(compiled) - images
    for dtype in (torch.bfloat16, torch.float32):
        for mask in ("bits", "interval", "tiles", "", "lengths"):
            attend(37, 300, dtype=dtype, mask=mask)
        attend(1, 300, dtype=dtype, mask="lengths")
        attend(19, 130, 3, 80, dtype=dtype, masks=1)  # no descriptor holds three heads
    attend(19, 130, 1, 7)  # nor rows of 14 bytes
    attend(37, 300, d=256)
    attend(700, 6404, mask="tiles")
    attend(9, 1601)
    attend(1, 4096, mask="lengths")  # in splits
    for compacted in (False, True):
        fill(1601, compacted)
    texts = len(compiled)
    for s_e in (1, 16, 333):
        fill(s_e, True, 3)
        fill(s_e, False, 16)
    for s, s_e in ((38, 300), (64, 512), (33, 1601)):
        for mask in ("bits", "interval", "lengths", "tiles"):
            attend(s, s_e, mask=mask, b=3, masks=3)
    attend(1, 5120, mask="lengths", b=3)
    texts = len(compiled) - texts
    e = torch.zeros(3, 5, dtype=torch.bfloat16)
    body(_swiglu)(e, e, False)
    body(_swiglu_bwd)(e, e, e, False)
    counts = {"token counts": again - before, "image counts": images, "texts and encoder tokens": texts}
    said = {str(w.message) for w in warned if "triton" in w.filename}
    found = {"launched": launched, "unnamed": sorted(unnamed), "fused": fused, "Triton warned": sorted(said)}
    json.dump(found | {f"compiled by other {what}": n for what, n in counts.items()}, sys.stdout)
