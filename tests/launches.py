"""Every launch through Triton's own argument binder and compiler, for a GPU that is not there. Run by test_codegen.py, without the interpreter."""

import collections
import json
import sys
import warnings
from types import SimpleNamespace

import torch
import triton
from torch.utils._pytree import tree_map_only
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastfuse import tune
from fastfuse.kernels.arguments import Lengths
from fastfuse.kernels.nf4 import BITSANDBYTES
from fastfuse.ops._attention_ref import AttentionArgs, AttentionGradArgs
from fastfuse.ops._linear_group import Projection, columns_of, linear_args, seed_of
from fastfuse.ops._mask_ops import Blocks, MaskBlocksArgs, PackMaskArgs, PackTilesArgs, mask_blocks, pack_mask, pack_tiles
from fastfuse.ops._patch_tokens import PatchEmbedArgs, Tables
from fastfuse.ops.cross_attention import _attention, _attention_grad, listed_tokens
from fastfuse.ops.encoder_mask import AttentionMask
from fastfuse.ops.lora_row_norms import RowNormsArgs, row_norms
from fastfuse.ops.low_rank import LoRAGradArgs, lora_grad
from fastfuse.ops.nf4_linear import linear
from fastfuse.ops.nf4_linear_dx import LinearDxArgs, linear_dx
from fastfuse.ops.nf4_swiglu_mlp import SwiGLUArgs, _swiglu, _swiglu_bwd
from fastfuse.ops.patch_embed import patch_embed_op
from fastfuse.ops.patch_embed_bwd import PatchEmbedBwdArgs, patch_embed_bwd
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


def launched_once(op, args: tuple) -> tuple:
    return op.launch.plan(args)(args)


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
    seeds = torch.zeros(n, dtype=torch.int64) if everything else None
    args = linear_args("op", x, projections, seeds, 0.1, False)._replace(keep_pre_scale=everything)
    xa = launched_once(linear, args)[n]
    dy = tuple(torch.zeros(M, N, dtype=dtype) for _ in ranks)
    has_adapter = args.operands[0].a is not None
    operands = tuple(p._replace(b=None, bias=None) for p in args.operands)
    launched_once(linear_dx, LinearDxArgs(dy, operands, args.layout, K, seeds, args.dropout_p, xa if has_adapter else None, False))
    for i, p in enumerate(args.operands if has_adapter else ()):
        columns, seed = xa[:, columns_of(args.operands, i)], seed_of(args, i)
        launched_once(lora_grad, LoRAGradArgs(dy[i], columns, p.b, p.factor, None, 0.0, 2.0, True, False))
        launched_once(lora_grad, LoRAGradArgs(x, columns, None, None, seed, 0.1, 1.0, True, False))
        launched_once(row_norms, RowNormsArgs(p.weight, args.layout, (p.N, K), dtype, p.a, p.b, 2.0, False))


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
    numbers = ((0.5,), (1.0, 2.0, 3.0)) if pixels == torch.uint8 else (None, None)
    eps = 1e-5 if norm else None
    args = PatchEmbedArgs(x, w, ratio, tables, eps, False, *numbers, pad_to, keep=norm)
    y, *kept = patch_embed_op.launch.plan(args)(args)
    needs = tree_map_only(torch.Tensor, lambda t: t is not x and t is not ratio, args)
    args = PatchEmbedBwdArgs(y, args, *(kept or (None, None)), needs, False)
    patch_embed_bwd.launch.plan(args)(args)


def fill(s_e: int, compacted: bool, b: int = 2) -> None:
    cache, new = torch.zeros(b, 2, 2048, 128, dtype=torch.bfloat16), torch.zeros(b, s_e, 2, 128, dtype=torch.bfloat16).transpose(1, 2)
    lengths = torch.zeros(b, dtype=torch.int32)
    places = torch.zeros(b, s_e, dtype=torch.int32) if compacted else None
    _kv_cache_write._init_fn(cache, cache.clone(), new, new, places, lengths, False)


def attend(s: int, s_e: int, G: int = 4, d: int = 128, dtype: torch.dtype = torch.bfloat16, mask: str = "bits", b: int = 2, masks: int = 2) -> None:
    """A mask, forward and backward; with lengths the forward alone, as in decoding."""
    hkv = 2
    q, k = torch.zeros(b, s, hkv * G, d, dtype=dtype).transpose(1, 2), torch.zeros(b, hkv, s_e, d, dtype=dtype)
    seen = Lengths(torch.zeros(b, dtype=torch.int32) if mask == "lengths" else None)
    if mask and mask != "lengths":
        if mask == "tiles":
            rows, empty = launched_once(pack_tiles, PackTilesArgs(torch.zeros(masks, s, 2, dtype=torch.bool), s_e // 2, False))
        else:
            rows, empty = launched_once(pack_mask, PackMaskArgs(torch.zeros(masks, s, s_e, dtype=torch.bool), False))
        rows = torch.zeros(masks, s, 2, dtype=torch.int32) if mask == "interval" else rows
        blocks = launched_once(mask_blocks, MaskBlocksArgs(rows, empty, s_e, listed_tokens(G), mask != "interval", False))
        seen = AttentionMask(rows, empty, Blocks(*blocks))
    o, lse = launched_once(_attention, AttentionArgs(q, k, k, seen, 0.1, False))
    if mask != "lengths":
        for dlse, needs_grad in ((None, (True, True, True)), (lse, (False, False, True))):
            launched_once(_attention_grad, AttentionGradArgs(o, q, k, k, o, lse, dlse, seen, 0.1, needs_grad, False))


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
    launched_once(_swiglu, SwiGLUArgs(e, e, None, False))
    launched_once(_swiglu_bwd, SwiGLUArgs(e, e, e, False))
    counts = {"token counts": again - before, "image counts": images, "texts and encoder tokens": texts}
    said = {str(w.message) for w in warned if "triton" in w.filename}
    found = {"launched": launched, "unnamed": sorted(unnamed), "fused": fused, "Triton warned": sorted(said)}
    json.dump(found | {f"compiled by other {what}": n for what, n in counts.items()}, sys.stdout)
