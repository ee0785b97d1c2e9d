"""Compile every kernel for every target ahead of time and read what the compiler made of it. Needs no GPU.

    python -m bench.codegen                  a table: registers, stack, shared memory, occupancy, instructions by pipe, bound
    python -m bench.codegen --only "sm_90 dq"   the same of some kernels, to compare two variants
    python -m bench.codegen --json FILE      the reports as JSON, for the tests
    python -m bench.codegen --diff           exits 1 where a figure is worse than the stored one by more than 5%
    python -m bench.codegen --store          rewrites the stored figures, bench/results/codegen_<target>.txt
    python -m bench.codegen --versions       of another Triton: its differences from them, into bench/results/codegen_versions.md

A kernel is specimen x tune row x target. Every one must have stack 0 (nothing spilled) and fit the chip's shared memory.
"""

import argparse
import collections
import concurrent.futures
import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from bench import codegen_store as store
from bench import sass
from bench.sass import Work
from fastfuse import tune
from fastfuse.kernels.arguments import (
    CacheStrides,
    DkDvStrides,
    DqStrides,
    FlatScales,
    ForwardStrides,
    Geometry,
    Image,
    Lengths,
    Mask,
    NestedScales,
    NF4Weight,
    Operand,
    Placed,
    Strides,
    TorchaoScales,
)
from fastfuse.kernels.cross_attention import (
    cross_attention_delta_kernel,
    cross_attention_dkdv_kernel,
    cross_attention_dq_kernel,
    cross_attention_fwd_kernel,
    cross_attention_merge_kernel,
)
from fastfuse.kernels.encoder_mask import block_list_kernel, block_states_kernel, pack_mask_kernel, pack_tiles_kernel
from fastfuse.kernels.kv_cache import kv_cache_write_kernel
from fastfuse.kernels.lora import lora_down_kernel, lora_grad_kernel, lora_up_kernel
from fastfuse.kernels.nf4 import nf4_dequantize_kernel
from fastfuse.kernels.nf4_linear import (
    nf4_linear_dx_kernel,
    nf4_linear_fwd_kernel,
    nf4_row_norms_kernel,
    nf4_skinny_kernel,
    nf4_skinny_reduce_kernel,
)
from fastfuse.kernels.patch_embed import (
    norm_bwd_kernel,
    patch_embed_fwd_kernel,
    patchify_kernel,
    place_bwd_kernel,
    place_kernel,
    tile_rows_kernel,
)
from fastfuse.kernels.swiglu import swiglu_bwd_kernel, swiglu_fwd_kernel
from fastfuse.ops._mask_ops import _LIST_BLOCK, _PACK_ROWS, _PACK_WORDS, _STATE_BLOCKS, _STATE_ROWS, _TILES_ROWS, _TILES_WORDS
from fastfuse.ops._patch_tokens import _BLOCK_K, _BLOCK_M, triton_block
from fastfuse.ops.cross_attention import merge_warps
from fastfuse.ops.nf4_dequantize import _BYTES
from fastfuse.ops.patch_embed_bwd import _BLOCK_N, _BLOCK_T, _TILES, norm_warps
from fastfuse.ops.static_kv_cache import _ELEMENTS

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
LAYOUTS = ("flat", "nested", "torchao", "torchao/200")
# Bytes of a weight with its scales. The scales of scales, 0.05% of that, are left out.
PACKED = {"flat": 0.5 + 4 / 64, "nested": 0.5 + 1 / 64, "torchao": 0.5 + 1 / 64, "torchao/200": 0.5 + 1 / 64}
SIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "u8": 1}
# What a product of 16-bit operands is worth on the matrix unit; of fp32 ones it is three of tf32, each at half the rate.
PRODUCT = {"bf16": 1, "fp16": 1, "fp32": 6}
# Blocks that share one factor: QLoRA of the vision encoder asks for 200, which is no shift.
SCALE_BLOCKS = {"torchao/200": 200}


@dataclass(frozen=True)
class Specimen:
    """One kernel with everything a launch would tell the compiler."""

    op: str
    name: str
    arch: str
    kernel: object
    signature: dict  # argument -> type, a tuple of types, or "constexpr"
    constants: dict
    options: dict
    work: sass.Work


@dataclass
class Report:
    op: str
    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    warps: int
    blocks: int = 0  # resident on an SM
    code: int = 0  # instructions of the whole kernel
    unit: str = ""  # of work, by which the figures of the loops are counted
    counts: dict = field(default_factory=dict)  # instruction -> how often, in the whole kernel
    loops: dict = field(default_factory=dict)  # main loop -> its figures: sass.figures; AMD: counts of the whole kernel

    def problems(self) -> list[str]:
        """Why this kernel must not ship: empty where it may."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers were spilled")
        limit = sass.CHIPS[self.arch].shared - sass.CHIPS[self.arch].reserved
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {self.arch} has {limit}")
        return found


def specimens() -> Iterator[Specimen]:
    for arch in ARCHS:
        yield from _dequantize(arch)
        for op in OPS:
            seen = {}
            for row in _rows(op, arch):
                for specimen in row_specimens(arch, op, row):
                    first = seen.setdefault((specimen.op, specimen.name), specimen)
                    if first is specimen:
                        yield specimen
                    elif difference := _difference(specimen, first):  # another tile of the same blocks
                        yield replace(specimen, name=f"{specimen.name} {difference}")
        yield from _swiglu(arch)
        yield from _patch_passes(arch)
        yield from _attention_passes(arch)
        yield from _masks(arch)
        yield from _kv_cache(arch)


OPS = (
    "nf4_linear", "nf4_linear_dx", "lora_row_norms", "lora_down", "lora_up", "lora_grad",
    "patch_embed", "cross_attention", "cross_attention_dq", "cross_attention_dkdv",
)  # fmt: skip


def row_specimens(arch: str, op: str, row: dict) -> Iterator[Specimen]:
    """The kernels of one row of an op's launch rows, in every variant that a caller may ask of it."""
    tile, when = row["tile"], row["when"]
    if op == "nf4_linear":
        for variant in LINEAR_VARIANTS:
            for specimen in linear_specimens(arch, tile, *variant):
                unsplit = "SPLIT_K" in tile["constants"] and specimen.op == "nf4_linear" and variant not in FEW_VARIANTS
                fewer = specimen.op == "nf4_skinny_reduce" and (variant not in FEW_VARIANTS or specimen.constants["SPLIT_K"] < 16)
                if not unsplit and not fewer:
                    yield specimen
    elif op == "nf4_linear_dx":
        yield from (dx_specimen(arch, tile, *variant) for variant in DX_VARIANTS)
    elif op == "lora_row_norms":
        covered = (v for v in NORM_VARIANTS if _branch(arch, *v[:2]) == "prmt" or not arch.startswith("sm_"))
        yield from (row_norms_specimen(arch, tile, *variant) for variant in covered)
    elif op == "patch_embed":
        yield from (patch_specimen(arch, tile, *variant) for variant in PATCH_VARIANTS if _serves(when, *variant[:2]))
    elif op.startswith("lora_"):
        yield from (low_rank_specimen(arch, op, tile, *variant) for variant in LOW_RANK_VARIANTS[op] if op != "lora_grad" or _fits(when, variant[1]))
    else:
        variants = ATTENTION_VARIANTS + MORE_ATTENTION[: {"sm_90": None, "sm_100": 1}.get(arch, 0)]
        yield from filter(None, (attention_specimen(arch, op, row, *variant) for variant in variants))


def _difference(one: Specimen, other: Specimen) -> str:
    """Without the number of splits: what a program does is the same."""
    theirs = other.constants | other.options
    return " ".join(f"{k}={v}" for k, v in (one.constants | one.options).items() if k != "SPLIT_K" and v != theirs.get(k))


def _rows(op: str, arch: str) -> list[dict]:
    """The different tiles of an op's rows; of adapters in fp32 and in 16 bits each, of which lora_grad's variants are compiled apart."""
    rows = [r for r in tune.table(op) if r["arch"] == arch and r["tile"]]
    tiles = [(r["tile"], r["when"].get("low")) for r in rows]
    return [r for i, r in enumerate(rows) if tiles[i] not in tiles[:i]]


def _dequantize(arch: str) -> Iterator[Specimen]:
    for layout in LAYOUTS:
        for out in ("bf16", "fp16", "fp32"):
            signature = {"weight": _weight(layout, out), "out_ptr": f"*{out}", "n_elements": "i32"}
            weights = _BYTES // SIZE[out]
            constants = {"BLOCK_SIZE": 64, "SCALE_BLOCK": SCALE_BLOCKS.get(layout, 256), "BLOCKS": weights // 64, "DECODE": _branch(arch, layout, out)}
            options = {"num_warps": 4, "enable_fp_fusion": False}
            for cut in (False, True) if (layout, out) == ("nested", "bf16") else (False,):
                name = f"{layout} {out}" + (" cut" if cut else "")
                work = Work("weight", weights, bytes=weights * (PACKED[layout] + SIZE[out]), loops=())
                yield Specimen("nf4_dequantize", name, arch, nf4_dequantize_kernel, signature, constants | {"CUT": cut}, options, work)


# (storage, x, adapters, projections in the group, factor): PEFT keeps adapters in fp32; "-" is a plain linear with a bias
LINEAR_VARIANTS = [
    ("flat", "bf16", "bf16", 1, False),
    ("nested", "bf16", "fp32", 1, False),
    ("nested", "bf16", "-", 1, False),
    ("nested", "bf16", "bf16", 3, False),
    ("nested", "bf16", "bf16", 1, True),
    ("torchao", "bf16", "fp32", 1, False),
    ("torchao", "bf16", "bf16", 1, False),
    ("torchao/200", "bf16", "bf16", 1, False),
    ("flat", "fp16", "fp16", 1, False),
]
# of the kernels that the storage hardly reaches
FEW_VARIANTS = [LINEAR_VARIANTS[1], LINEAR_VARIANTS[3]]
DX_VARIANTS = [
    ("flat", "bf16", "bf16", 1, False, False),
    ("nested", "bf16", "fp32", 1, False, True),
    ("nested", "bf16", "bf16", 3, False, False),
    ("torchao", "bf16", "bf16", 1, True, False),
    ("nested", "fp16", "-", 1, False, False),
]


def linear_specimens(arch: str, tile: dict, layout: str, x: str, adapter: str, projections: int = 1, factor: bool = False) -> Iterator[Specimen]:
    """The kernels of one row of nf4_linear: the split ones, and the one without a split that dropout and pinned tiles take."""
    constants = dict(tile["constants"])
    splits = constants.pop("SPLIT_K", 0)
    common = {"PROJECTIONS": projections, "BLOCK_SIZE": 64, "SCALE_BLOCK": SCALE_BLOCKS.get(layout, 256), "DECODE": _branch(arch, layout, x)}
    options = {k: tile[k] for k in ("num_warps", "num_stages")}
    low = x if adapter == "-" else adapter
    group = (_operand(layout, x, adapter, factor, bias=adapter == "-"),) * projections
    name = _name(tile, layout, x, adapter) + (f" x{projections}" if projections > 1 else "") + (" factor" if factor else "")
    work = _decoding(layout, constants)
    base = {"x_ptr": f"*{x}", "group": group, "xa_ptr": f"*{low}", "M": "i32", "K": "i32"}
    if splits:
        signature = base | {"part_ptr": "*fp32"} | dict.fromkeys(("stride_xm", "columns"), "i32")
        yield Specimen("nf4_skinny", name, arch, nf4_skinny_kernel, signature, constants | common | {"SPLIT_K": splits}, options, work)
        signature = base | {"part_ptr": "*fp32"} | dict.fromkeys(("stride_xam", "columns"), "i32")
        own = {k: constants[k] for k in ("BLOCK_M", "BLOCK_N")} | {"PROJECTIONS": projections, "SPLIT_K": splits, "DECODE": common["DECODE"]}
        sums = Work("element", constants["BLOCK_M"] * constants["BLOCK_N"], loops=())
        reduced = name.removeprefix(f"{layout} ") + f" k{splits}"  # nothing of the storage reaches this one
        yield Specimen("nf4_skinny_reduce", reduced, arch, nf4_skinny_reduce_kernel, signature, own, {"num_warps": 4}, sums)
        constants["TRANSPOSED"] = False
    signature = base | dict.fromkeys(("stride_xm", "stride_xam"), "i32")
    yield Specimen("nf4_linear", name, arch, nf4_linear_fwd_kernel, signature, constants | common, options, work)


def _decoding(layout: str, constants: dict) -> Work:
    weights = constants["BLOCK_N"] * constants["BLOCK_K"]
    return Work("weight", weights, weights * constants.get("BLOCK_M", 0), weights * PACKED[layout], decodes=True)


def dx_specimen(arch: str, tile: dict, layout: str, x: str, adapter: str, projections: int, factor: bool, dropout: bool) -> Specimen:
    constants = dict(tile["constants"]) | {"PROJECTIONS": projections, "BLOCK_SIZE": 64, "SCALE_BLOCK": 256, "DECODE": _branch(arch, layout, x), "CUT_K": False}
    low = x if adapter == "-" else adapter
    signature = {"group": (_operand(layout, x, adapter, factor),) * projections, "dxa_ptr": f"*{low}", "dx_ptr": f"*{x}"}
    signature |= dict.fromkeys(("stride_dxam", "M", "K", "threshold"), "i32") | {"rescale": "fp32"}
    if dropout:
        signature["seeds_ptr"] = "*i64"
    else:
        constants["seeds_ptr"] = None
    name = _name(tile, layout, x, adapter) + "".join(
        f" {word}" for word, there in ((f"x{projections}", projections > 1), ("factor", factor), ("dropout", dropout)) if there
    )
    options = {k: tile[k] for k in ("num_warps", "num_stages")}
    return Specimen("nf4_linear_dx", name, arch, nf4_linear_dx_kernel, signature, constants, options, _decoding(layout, constants))


NORM_VARIANTS = [("nested", "bf16", "bf16"), ("torchao", "bf16", "fp32"), ("flat", "fp16", "fp16"), ("nested", "bf16", "-")]


def row_norms_specimen(arch: str, tile: dict, layout: str, out: str, adapter: str) -> Specimen:
    signature = {"weight": _weight(layout, out), "norms_ptr": "*fp32", "scaling": "fp32"}
    signature |= {"a_ptr": f"*{adapter}", "b_ptr": f"*{adapter}"} | dict.fromkeys(("N", "K", "R"), "i32")
    dtype = {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[out]
    constants = {"a_ptr": None, "b_ptr": None} if adapter == "-" else {}
    constants |= tile["constants"] | {"DTYPE": dtype, "BLOCK_SIZE": 64, "SCALE_BLOCK": 256, "DECODE": _branch(arch, layout, out), "CUT_K": False}
    options = {k: tile[k] for k in ("num_warps", "num_stages")}
    name, work = _name(tile, layout, out, adapter), _decoding(layout, constants)
    return Specimen("lora_row_norms", name, arch, nf4_row_norms_kernel, signature, constants, options, work)


# (x, adapters, dropout); of the gradients also which products. Without dropout and of one dtype the first two are the library's product,
# and dropout is on the way to dA, the outer product alone; dB comes with d(x A^T).
_KINDS = [(x, low, dropout) for x, low in (("bf16", "bf16"), ("bf16", "fp32"), ("fp32", "fp32")) for dropout in (False, True)]
_THIN = [(x, low, dropout) for x, low, dropout in _KINDS if dropout or x != low]
_HALVES = [(*kind, half) for kind in _KINDS for half in (("outer",) if kind[2] else ("both", "outer") if kind[0] != kind[1] else ("both",))]
LOW_RANK_VARIANTS = {"lora_down": _THIN, "lora_up": _THIN, "lora_grad": _HALVES}
_LOW_RANK_KERNELS = {"lora_down": lora_down_kernel, "lora_up": lora_up_kernel, "lora_grad": lora_grad_kernel}


def _fits(when: dict, low: str) -> bool:
    return (when.get("low") == "fp32") == (low == "fp32")


def low_rank_specimen(arch: str, op: str, tile: dict, x: str, low: str, dropout: bool, half: str = "") -> Specimen:
    """half: of lora_grad, "both" products or the "outer" one."""
    ints = ("M", "K", "C", "R", "stride_xm", "stride_xa", "stride_am", "stride_lr", "stride_lc", "rows_per_split", "threshold")
    types = dict.fromkeys(("x_ptr", "out_ptr", "activation_ptr"), f"*{x}") | dict.fromkeys(("a_ptr", "xa_ptr", "lora_ptr"), f"*{low}")
    types |= dict.fromkeys(("part_ptr", "outer_ptr", "d_xa_ptr"), "*fp32") | {"scaling": "fp32"} | dict.fromkeys(ints, "i32")
    constants = {k: v for k, v in tile["constants"].items() if k != "PROGRAMS"} | {"PRECISION": _precision(arch)}
    if dropout:
        types["seed_ptr"] = "*i64"
    else:
        constants["seed_ptr"] = None
    options = {k: tile[k] for k in ("num_warps", "num_stages")}
    elements = constants["BLOCK_M"] * constants.get("BLOCK_K", constants.get("BLOCK_C"))
    products = elements * constants.get("BLOCK_R", 16) * PRODUCT[low]  # up: as of rank 16
    name = f"{x} {low}" + (" dropout" if dropout else "")
    if op == "lora_grad":
        constants |= {"factor_ptr": None} | ({} if half == "both" else {"lora_ptr": None, "d_xa_ptr": None})
        name, products = f"{name} R{constants['BLOCK_R']} {half}", products * (2 if half == "both" else 1)
    else:
        name += f" {'x'.join(str(constants[f'BLOCK_{d}']) for d in 'MRKC' if f'BLOCK_{d}' in constants)} w{options['num_warps']}"
    work = Work("element", elements, products, elements * SIZE[x], () if op == "lora_up" else ("loop",))
    return Specimen(op, name, arch, _LOW_RANK_KERNELS[op], types, constants, options, work)


def _swiglu(arch: str) -> Iterator[Specimen]:
    for kernel in (swiglu_fwd_kernel, swiglu_bwd_kernel):
        types = {name: "i32" if name == "n" else "*bf16" for name in kernel.arg_names if name != "BLOCK"}
        work = Work("element", 1024, bytes=1024 * 2 * (len(types) - 1), loops=())
        yield Specimen("swiglu", "fwd" if kernel is swiglu_fwd_kernel else "bwd", arch, kernel, types, {"BLOCK": 1024}, {"num_warps": 4}, work)


# (weight, tables and result, images, pixels normalised, tables of tiles): an image may be in another dtype only where it is gathered
PATCH_VARIANTS = [
    ("bf16", "bf16", "bf16", False, True),
    ("bf16", "fp32", "bf16", False, True),
    ("bf16", "bf16", "fp32", False, False),
    ("fp16", "fp16", "u8", True, True),
    ("fp32", "fp32", "fp32", False, True),
]
# As of 560 x 560 pixels in patches of 14 (16 where they are gathered), channels first.
_IMAGE = Image(stride_tile="i32/16", stride_channel="i32/16", stride_line="i32/16", stride_pixel=1, across="i32")
_GEOMETRY = Geometry(padded="i32", tokens="i32", patches="i32/16", first=1, cls_at=0)


def _serves(when: dict, weight: str, table: str) -> bool:
    """Whether a row of patch_embed is for these dtypes. Tiles are told apart, not rows: that of fp32 results also serves few rows."""
    if "fp32" in (weight, when.get("dtype")):
        return weight == when.get("dtype")
    return table != "fp32" if when.get("out", "16-bit") == "16-bit" else True


def _placed(dtype: str, tiled: bool, bias: bool = False) -> Placed:
    t = f"*{dtype}"
    placed = Placed(cls=t, bias=t if bias else None, local_pos=t)
    return placed._replace(global_pos=t, pre_pos=t, rows="*i32", factors="*fp32") if tiled else placed


def patch_specimen(arch: str, tile: dict, weight: str, table: str, images: str, normalised: bool, tiled: bool, patch: int = 0) -> Specimen:
    """patch: pixels of a side, 14 where 0, and 16 where they are gathered."""
    direct = tile["constants"]["DIRECT"]
    size = patch or (16 if direct else 14)
    line = -(-size // 8) * 8 if direct else size
    constants = dict(tile["constants"]) | {"CHANNELS": 3, "PATCH_H": size, "PATCH_W": size, "LINE": line, "PRECISION": _precision(arch)}
    signature = {"x_ptr": f"*{images if direct else weight}", "w_ptr": f"*{weight}", "out_ptr": f"*{table}"}
    signature |= {"tables": _placed(table, tiled, not tiled), "image": _IMAGE, "shape": _GEOMETRY} | dict.fromkeys("MNK", "i32")
    if direct and normalised:
        signature |= {"scale": ("fp32",) * 3, "shift": ("fp32",) * 3}
    else:
        constants |= {"scale": None, "shift": None}
    if not direct:
        constants["image"] = None
    blocks = "x".join(str(constants[f"BLOCK_{d}"]) for d in "MNK")
    source = f"gather {images}{' normalised' if normalised else ''}" if direct else "gemm"
    name = f"{source} w {weight} tables {table}{'' if tiled else ' untiled'} {blocks} w{tile['num_warps']} s{tile['num_stages']}"
    options = {k: tile[k] for k in ("num_warps", "num_stages")}
    products = math.prod(constants[f"BLOCK_{d}"] for d in "MNK")
    # Where the loop over K is one with that over tiles, a step holds what comes after a tile: no step's floor.
    work = Work("1024 products", products / 1024, 0 if constants["FLATTEN"] else products * PRODUCT[weight])
    return Specimen("patch_embed", name, arch, patch_embed_fwd_kernel, signature, constants, options, work)


def _patch_passes(arch: str) -> Iterator[Specimen]:
    """What surrounds the GEMM, forward and backward."""
    rows, columns = triton_block(1280)
    for images, out in (("bf16", "bf16"), ("fp32", "bf16"), ("u8", "bf16"), ("fp32", "fp32")):
        signature = {"images_ptr": f"*{images}", "a_ptr": f"*{out}", "image": _IMAGE, "shape": _GEOMETRY} | dict.fromkeys("MK", "i32")
        constants = {"CHANNELS": 3, "PATCH_H": 14, "PATCH_W": 14, "BLOCK_M": _BLOCK_M, "BLOCK_K": _BLOCK_K}
        if images == "u8":
            signature |= {"scale": ("fp32",) * 3, "shift": ("fp32",) * 3}
        else:
            constants |= {"scale": None, "shift": None}
        pixels = _BLOCK_M * _BLOCK_K
        work = Work("element", pixels, bytes=pixels * (SIZE[images] + SIZE[out]), loops=())
        yield Specimen("patch_embed", f"patchify {images} to {out}", arch, patchify_kernel, signature, constants, {"num_warps": 4}, work)
    for dtype, norm, keep in (("bf16", False, False), ("bf16", True, False), ("bf16", True, True), ("fp32", True, True)):
        t = f"*{dtype}"
        signature = {"x_ptr": t, "y_ptr": t, "tables": _placed(dtype, True), "shape": _GEOMETRY, "M": "i32", "N": "i32", "eps": "fp32"}
        signature |= {"norm_w_ptr": t, "norm_b_ptr": t, "kept_ptr": t, "stats_ptr": "*fp32"}
        constants = {"NORM": norm, "BLOCK_M": rows, "BLOCK_N": columns}
        constants |= {} if norm else {"norm_w_ptr": None, "norm_b_ptr": None}
        constants |= {} if keep else {"kept_ptr": None, "stats_ptr": None}
        name = f"place {dtype}{' norm' if norm else ''}{' kept' if keep else ''}"
        work = Work("element", rows * 1280, bytes=rows * 1280 * SIZE[dtype] * (3 if keep else 2), loops=())
        yield Specimen("patch_embed", name, arch, place_kernel, signature, constants, {"num_warps": 4}, work)
    for dtype in ("bf16", "fp32"):
        t = f"*{dtype}"
        signature = {"dy_ptr": t, "x_ptr": t, "stats_ptr": "*fp32", "w_ptr": t, "dx_ptr": t, "dw_ptr": "*fp32", "db_ptr": "*fp32", "shape": _GEOMETRY}
        signature |= dict.fromkeys(("M", "N", "rows"), "i32")
        options, work = {"num_warps": norm_warps(columns)}, Work("element", 1280, bytes=1280 * SIZE[dtype] * 3)
        yield Specimen("patch_embed", f"norm backward {dtype}", arch, norm_bwd_kernel, signature, {"BLOCK_N": columns}, options, work)
        signature = {"dy_ptr": t, "order_ptr": "*i32", "starts_ptr": "*i32", "table_ptr": t, "local_ptr": t, "factors_ptr": "*fp32", "total_ptr": "*fp32"}
        signature |= {"dtable_ptr": t, "pre_ptr": "*fp32", "dots_ptr": "*fp32", "shape": _GEOMETRY, "N": "i32", "rows": "i32"}
        constants = {"BLOCK_T": _BLOCK_T, "BLOCK_N": _BLOCK_N, "TILES": _TILES}
        work = Work("element", _BLOCK_T * _BLOCK_N)
        yield Specimen("patch_embed", f"place backward {dtype}", arch, place_bwd_kernel, signature, constants, {"num_warps": 4}, work)
    for ids in (False, True):
        signature = {"aspect_ptr": "*i64", "gate_ptr": "*bf16", "pre_gate_ptr": "*bf16", "rows_ptr": "*i32", "factors_ptr": "*fp32", "fits_ptr": "*i1"}
        signature |= dict.fromkeys(("n", "n_tiles", "side", "entries"), "i32")
        constants, name = {"IDS": ids, "BLOCK": 1024}, f"tile rows{' of ids' if ids else ''}"
        yield Specimen("patch_embed", name, arch, tile_rows_kernel, signature, constants, {"num_warps": 4}, Work("tile", 1024))


def _precision(arch: str) -> str:
    return "tf32x3" if arch.startswith("sm_") else "ieee"


def _operand(layout: str, x: str, adapter: str, factor: bool, bias: bool = False) -> Operand:
    """The type of one linear layer of a group; None for what is absent."""
    low = None if adapter == "-" else f"*{adapter}"
    return Operand(
        weight=_weight(layout, x), a=low, b=low, factor="*fp32" if factor else None, bias=f"*{x}" if bias else None,
        out=f"*{x}", pre_scale=f"*{x}" if factor else None, N="i32/16", R="i32", scaling="fp32",
    )  # fmt: skip


def _weight(layout: str, w: str) -> NF4Weight:
    """The type of a weight stored so; torchao keeps its table and scales in the weight's dtype."""
    if layout == "flat":
        return NF4Weight("*u8", "*fp32", FlatScales("*fp32"))
    if layout == "nested":
        return NF4Weight("*u8", "*fp32", NestedScales(index="*u8", code="*fp32", absmax="*fp32", offset="*fp32"))
    return NF4Weight("*u8", f"*{w}", TorchaoScales(scaler="*i8", factor=f"*{w}", mean=f"*{w}"))


def _name(tile: dict, layout: str, x: str, adapter: str) -> str:
    size = "x".join(str(tile["constants"][f"BLOCK_{d}"]) for d in "MNK" if f"BLOCK_{d}" in tile["constants"])
    return f"{layout} {x} lora {adapter} {size} w{tile['num_warps']} s{tile['num_stages']}"


def _branch(arch: str, layout: str, out: str) -> str:
    return "prmt" if arch.startswith("sm_") and (out == "bf16" or (out == "fp16" and not layout.startswith("torchao"))) else "gather"


# (dtype, query heads of a key head, mask, head_dim where the row is for any up to 128). Lengths are the forward's, which is then split.
ATTENTION_VARIANTS = [("bf16", 4, "interval", 128), ("bf16", 4, "bits", 128), ("bf16", 4, "lengths", 128), ("fp32", 4, "bits", 128)]
MORE_ATTENTION = [("bf16", 4, "none", 128), ("bf16", 3, "bits", 96), ("fp16", 1, "bits", 64), ("fp32", 4, "interval", 128)]
_ATTENTION_SHAPE = dict.fromkeys(("s", "s_e", "key_heads", "masks"), "i32")
_STRIDES = Strides(batch="i32/16", head="i32/16", token="i32/16")
_PACKED_MASK = Mask(rows="*i32", rows_empty="*i1", blocks="*i32", counts="*i32")
_MASKS = {"none": Lengths(None), "lengths": Lengths("*i32"), "interval": _PACKED_MASK, "bits": _PACKED_MASK}


def attention_specimen(arch: str, op: str, row: dict, dtype: str, G: int, mask: str, D: int) -> Specimen | None:
    """None where the row is not for these operands."""
    tile, when, kind = row["tile"], row["when"], {"none": 0, "lengths": 0, "interval": 1, "bits": 2}[mask]
    if (dtype == "fp32") != (when.get("dtype") == "fp32") or (mask == "lengths" and (op != "cross_attention" or tile["constants"]["TMA"])):
        return None
    if tile["constants"]["TMA"] and op == "cross_attention_dkdv" and G == 3:
        return None  # descriptors hold a power of two of heads
    wide = not when.get("D_max") and not when.get("M_max") and dtype != "fp32"
    D, t, block, split = 256 if wide else D, f"*{dtype}", dict(tile["constants"]), mask == "lengths"
    GP, columns, tma = 1 << (G - 1).bit_length(), 1 << (D - 1).bit_length(), block["TMA"]
    block |= {"G": G, "GP": GP, "D": D, "KIND": kind, "TOKENS_PER_BLOCK": max(1, 128 // GP), "PRECISION": _precision(arch), "BLOCK_D": columns}
    shared = {"mask": _MASKS[mask], "scale": "fp32"} | _ATTENTION_SHAPE
    side = f"tensordesc<{dtype}[1,1,{block['BLOCK_N']},{columns}]>" if tma else t
    if op == "cross_attention":
        signature = {
            "q_ptr": t,
            "k": side,
            "v": side,
            "o_ptr": "*fp32" if split else t,
            "lse_ptr": "*fp32",
            "splits": "i32",
            "strides": ForwardStrides(*[_STRIDES] * 4),
        }
        kernel, block = cross_attention_fwd_kernel, block | {"SPLIT": split}
    elif op == "cross_attention_dq":
        signature = {
            "q_ptr": t,
            "k": side,
            "v": side,
            "do_ptr": t,
            "lse_ptr": "*fp32",
            "delta_ptr": "*fp32",
            "dq_ptr": t,
            "strides": DqStrides(*[_STRIDES] * 5),
        }
        kernel = cross_attention_dq_kernel
    else:
        side = f"tensordesc<{dtype}[1,{block['BLOCK_M'] // GP},{G},{columns}]>" if tma else t
        signature = {"q": side, "do": side} | dict.fromkeys(("k_ptr", "v_ptr", "dk_ptr", "dv_ptr"), t) | dict.fromkeys(("lse_ptr", "delta_ptr"), "*fp32")
        signature |= {"strides": DkDvStrides(*[_STRIDES] * 6)}
        kernel, block = cross_attention_dkdv_kernel, block | {"DK": True, "DV": True}
    name = f"{mask} {dtype} d{D} group {G} {block['BLOCK_M']}x{block['BLOCK_N']} w{tile['num_warps']} s{tile['num_stages']}{' tma' if tma else ''}"
    scores = block["BLOCK_M"] * block["BLOCK_N"]
    products = scores * D * {"cross_attention": 2, "cross_attention_dq": 3, "cross_attention_dkdv": 4}[op] * PRODUCT[dtype]
    # Few rows have one block of them, and a head's keys and values one reader.
    unshared = 2 * block["BLOCK_N"] * D * SIZE[dtype] if when.get("M_max") else 0
    work = Work("score", scores, products, unshared, ("loop",) if op == "cross_attention_dkdv" else ("full", "masked"))
    return Specimen(op, name, arch, kernel, signature | shared, block, {k: tile[k] for k in ("num_warps", "num_stages")}, work)


def _attention_passes(arch: str) -> Iterator[Specimen]:
    """What puts the forward's splits together, and what the backward begins with."""
    for dtype, D in (("bf16", 128), ("bf16", 256), ("fp32", 128)):
        t, heads = f"*{dtype}", {"G": 4, "GP": 4, "D": D, "BLOCK_D": D}
        signature = {"parts_ptr": "*fp32", "part_lse_ptr": "*fp32", "o_ptr": t, "lse_ptr": "*fp32", "o_stride": _STRIDES, "splits": "i32"}
        yield Specimen(
            "cross_attention",
            f"merge {dtype} d{D}",
            arch,
            cross_attention_merge_kernel,
            signature | _ATTENTION_SHAPE,
            heads | {"BLOCK_M": 16},
            {"num_warps": merge_warps(D)},
            Work("element", 16 * D, bytes=16 * D * 4),
        )
        signature = {"o_ptr": t, "do_ptr": t, "dlse_ptr": "*fp32", "delta_ptr": "*fp32", "o_stride": _STRIDES, "do_stride": _STRIDES}
        yield Specimen(
            "cross_attention",
            f"delta {dtype} d{D}",
            arch,
            cross_attention_delta_kernel,
            signature | _ATTENTION_SHAPE,
            heads | {"BLOCK_M": 32},
            {"num_warps": 4},
            Work("element", 32 * D, bytes=32 * D * SIZE[dtype] * 2, loops=()),
        )


def _masks(arch: str) -> Iterator[Specimen]:
    """A mask made: flags one at a time or in fours, words of tiles, and the lists of blocks."""
    made, four, seen = {"bits_ptr": "*i32", "empty_ptr": "*i1"}, {"num_warps": 4}, _PACK_ROWS * _PACK_WORDS * 32
    for flags, row in ((1, "i32"), (4, "i32/16")):
        signature = {"mask_ptr": "*i32" if flags == 4 else "*u8", "stride_b": "i32", "stride_s": row} | made | dict.fromkeys(("s", "width", "NK"), "i32")
        constants = {"stride_n": 1, "FLAGS": flags, "BLOCK_S": _PACK_ROWS, "BLOCK_W": _PACK_WORDS}
        yield Specimen("encoder_mask", f"pack mask by {flags}", arch, pack_mask_kernel, signature, constants, four, Work("flag", seen, bytes=seen * 9 / 8))
    signature = {"visible_ptr": "*u8"} | made | dict.fromkeys(("s", "n_tiles", "tokens_per_tile", "NK"), "i32")
    constants = {"TILES_IN_A_WORD": 2, "BLOCK_S": _TILES_ROWS, "BLOCK_W": _TILES_WORDS}
    yield Specimen("encoder_mask", "pack tiles", arch, pack_tiles_kernel, signature, constants, four, Work("word", _TILES_ROWS * _TILES_WORDS))
    for bits in (False, True):
        signature = {"rows_ptr": "*i32", "empty_ptr": "*i1", "states_ptr": "*i8"} | dict.fromkeys(("s", "tokens", "NK"), "i32")
        constants = {"BITS": bits, "BLOCK_S": _STATE_ROWS, "BLOCK_K": _STATE_BLOCKS}
        name, work = f"states of {'bits' if bits else 'intervals'}", Work("row's block", _STATE_ROWS * _STATE_BLOCKS)
        yield Specimen("encoder_mask", name, arch, block_states_kernel, signature, constants, four, work)
    signature = {"states_ptr": "*i8", "list_ptr": "*i32", "counts_ptr": "*i32"} | dict.fromkeys(("stride_b", "stride_l", "stride_n", "length"), "i32")
    yield Specimen("encoder_mask", "list", arch, block_list_kernel, signature, {"BLOCK": _LIST_BLOCK}, four, Work("block", _LIST_BLOCK))


def _kv_cache(arch: str) -> Iterator[Specimen]:
    """Tokens into the cache, compacted or in their columns."""
    for dtype, D, compacted in (("bf16", 128, True), ("bf16", 80, False), ("fp32", 128, True)):
        signature = dict.fromkeys(("k_ptr", "v_ptr", "k_cache_ptr", "v_cache_ptr"), f"*{dtype}") | {"places_ptr": "*i32", "held_ptr": "*i32"}
        signature |= {"strides": CacheStrides(_STRIDES, _STRIDES)} | dict.fromkeys(("s_e", "max_len", "heads"), "i32")
        columns = 1 << (D - 1).bit_length()
        constants = {"D": D, "BLOCK_N": _ELEMENTS // columns, "BLOCK_D": columns} | ({} if compacted else {"places_ptr": None})
        name = f"{dtype} d{D}{' compacted' if compacted else ''}"
        copied = 2 * _ELEMENTS // columns * D
        work = Work("element", copied, bytes=copied * 2 * SIZE[dtype], loops=())
        yield Specimen("kv_cache_write", name, arch, kv_cache_write_kernel, signature, constants, {"num_warps": 8}, work)


def compile_specimen(s: Specimen):
    """Triton's compiled kernel. Pointers and row strides are marked divisible by 16, as the launcher marks aligned ones."""
    signature, constants, attrs = {}, dict(s.constants), {}
    for i, name in enumerate(s.kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        else:
            signature[name] = _describe(s.signature[name], (i,), name, constants, attrs)
    source = ASTSource(fn=s.kernel, signature=signature, constexprs=constants, attrs=attrs)
    return triton.compile(source, target=target(s.arch), options=tune.OPTIONS | s.options)


def _describe(kind, path: tuple, name: str, constants: dict, attrs: dict):
    """An argument's type for the compiler; None inside a tuple is a constant of its own, pointers and row lengths are aligned."""
    if isinstance(kind, tuple):
        kinds = [_describe(k, (*path, j), name, constants, attrs) for j, k in enumerate(kind)]
        return kind._make(kinds) if hasattr(kind, "_make") else tuple(kinds)
    if kind is None or isinstance(kind, int):  # a stride of 1 is a constant too
        constants[path] = kind
        return "constexpr"
    if kind.startswith("*") or kind.endswith("/16") or name in _ALIGNED:
        attrs[path] = [["tt.divisibility", 16]]
    return kind.removesuffix("/16")


_ALIGNED = ("stride_xm", "stride_am", "stride_xam", "stride_dxam", "K", "C", "N", "columns", "n_elements", "n")


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def report(s: Specimen) -> Report:
    compiled = compile_specimen(s)
    made = Report(s.op, s.name, s.arch, 0, 0, compiled.metadata.shared, s.options["num_warps"], unit=s.work.unit)
    if "cubin" in compiled.asm:
        _read_sass(*disassemble(compiled.asm["cubin"]), made, s.work)
    else:
        _read_amdgcn(compiled.asm["amdgcn"], made)
    made.blocks = sass.blocks(s.arch, made.registers, made.shared, made.warps, getattr(compiled.metadata, "tmem_size", 0) or 0)
    return made


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, listing)."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
        # without its analysis of the branch stack, of which nothing is read: 0.4 s a kernel for 0.7
        return usage, subprocess.run([_tool("nvdisasm"), "-c", "-ndf", f.name], capture_output=True, text=True, check=True).stdout


def _read_sass(usage: str, text: str, made: Report, work: Work) -> None:
    made.registers = int(re.search(r"REG:(\d+)", usage).group(1))
    made.stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    code, labels = sass.parse(text)
    made.code = sum(c.family != "NOP" for c in code)
    for c in code:
        # HGMMA with a register as its first source is what feeds a decoded weight to wgmma without shared memory.
        from_registers = c.family == "HGMMA" and re.match(r"\s*R\d+", c.operands.split(",")[1])
        name = _family(c.op) + (" from registers" if from_registers else "")
        made.counts[name] = made.counts.get(name, 0) + 1
    main = sass.main_loops(code, labels, work)
    made.loops = {name: sass.figures(loop, work, made.arch, made.warps) for name, loop in main.items()}
    if loop := main.get("loop"):
        made.counts["HGMMA in loop"] = sum(c.family == "HGMMA" for c in loop)
        made.counts["full waits in loop"] = sum(c.op.startswith("WARPGROUP.DEPBAR") and "0x0" in c.operands for c in loop)


def _family(op: str) -> str:
    base = op.split(".")[0]
    return f"{base}.128" if base in ("LDG", "STG", "LDGSTS") and ".128" in op else base


# AMD's instructions by what executes them; a name's first match counts.
_AMD = {"mfma": r"v_mfma", "valu": r"v_", "salu": r"s_", "lds": r"ds_", "memory": r"(global|buffer|flat|scratch)_"}


def _read_amdgcn(text: str, made: Report) -> None:
    made.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
    made.stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1))
    made.counts = dict(collections.Counter(m for m in re.findall(r"^\s+(v_mfma|global_load_dwordx4|ds_read|ds_write)", text, re.M)))
    ops = [op for op in re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.M) if op != "s_nop"]
    kinds = collections.Counter(next((kind for kind, start in _AMD.items() if re.match(start, op)), "other") for op in ops)
    made.code, made.unit, made.loops = kinds.total(), "kernel", {"whole": dict(sorted(kinds.items()))}


def all_reports(words: str = "", workers: int = 2) -> list[Report]:
    """Of the kernels whose target, op or name hold all the words."""
    chosen = [i for i, s in enumerate(specimens()) if store.holds(f"{s.arch} {s.op} {s.name}", words)]
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_nth, chosen, chunksize=4))


def _nth(i: int) -> Report:
    return report(list(specimens())[i])


def table(reports: list[Report]) -> str:
    lines = ["thread instructions a unit of work, by pipe; bound: percent of the floor that the busiest pipe allows at most"]
    for r in reports:
        shown = {k: v for k, v in r.counts.items() if k.endswith((".128", "x4", "registers"))}
        made = " ".join(f"{k}:{v}" for k, v in sorted(shown.items()))
        lines.append(f"{r.arch:7} {store.line(asdict(r))} | warps={r.blocks * r.warps} {made} {'; '.join(r.problems())}".rstrip())
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, help="write the reports there instead of the table")
    p.add_argument("--only", default="", metavar="WORDS", help="of the kernels whose target, op or name hold all of these words")
    p.add_argument("--workers", type=int, default=2)
    p.add_argument("--diff", action="store_true", help="against the stored figures instead of the table; exits 1 where one got worse by more than 5%%")
    p.add_argument("--store", action="store_true", help="rewrite the stored figures")
    p.add_argument("--versions", action="store_true", help="write what differs with this Triton into bench/results/codegen_versions.md")
    a = p.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.codegen: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if (a.store or a.versions) and a.only:
        sys.exit("bench.codegen: --store and --versions write of all kernels, without --only")
    reports = all_reports(a.only, a.workers)
    found = [asdict(r) for r in reports]
    worse = []
    if a.json:
        a.json.write_text(json.dumps([{**asdict(r), "found": r.problems()} for r in reports]))
    if a.diff:
        said, worse = store.compare(found, triton.__version__, a.only)
        print("\n".join(said + worse))
    if a.store:
        store.save(found, triton.__version__)
    if a.versions:
        store.save_section(store.section(found, triton.__version__))
    if not (a.json or a.diff or a.store or a.versions):
        print(table(reports))
    if worse or any(r.problems() for r in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
