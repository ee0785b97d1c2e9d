"""Which kernels the C library carries: every variant of every kernel, described as its launch in C will call it.

A signature names a C field for every argument that reaches the device: "field type", a tuple of kernels/arguments.py where the kernel takes one, None or a
number where the value is a constant of the code (Triton then drops the parameter). "/16" after an integer says that it is a multiple of 16,
"/1" after a pointer that it need not be aligned to 16 bytes as all others are. fastfuse.c checks both.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from triton import __version__ as TRITON

from fastfuse.kernels.arguments import (
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
)
from fastfuse.kernels.cross_attention import cross_attention_fwd_kernel, cross_attention_merge_kernel
from fastfuse.kernels.encoder_mask import block_list_kernel, block_states_kernel, pack_tiles_kernel
from fastfuse.kernels.lora import lora_down_kernel
from fastfuse.kernels.nf4 import nf4_dequantize_kernel
from fastfuse.kernels.nf4_linear import nf4_linear_fwd_kernel, nf4_skinny_kernel, nf4_skinny_reduce_kernel
from fastfuse.kernels.patch_embed import patch_embed_fwd_kernel, patchify_kernel, place_kernel, tile_rows_kernel

TUNE = Path(__file__).parents[1] / "fastfuse" / "tune"
BLOCK_SIZE, SCALE_BLOCK = 64, 256  # elements of a scale, scales of a nested absmax: bitsandbytes' own
IDS = {"bf16": "FFS_BF16", "fp16": "FFS_FP16", "fp32": "FFS_FP32", "u8": "FFS_U8"}


# As fastfuse.tune.OPTIONS, which is out of reach: that imports torch.
OPTIONS = {"enable_fp_fusion": True}


@dataclass(frozen=True)
class Variant:
    """A row of the library's table: the first one with the kernel's id and key whose conditions hold is launched."""

    id: str  # enum kernel_id of launch.h
    key: tuple  # C expressions, up to four small numbers
    arguments: str  # the struct of launch.h that holds the fields
    kernel: object
    signature: dict
    constants: dict
    options: dict  # OPTIONS, unless it says otherwise, and num_warps, num_stages
    when: dict = field(default_factory=dict)  # M_max, N_max, K_multiple, K_min


def variants(arch: int, dtypes: list[str], small: bool) -> Iterator[Variant]:
    """All of one architecture. small: what the tests need, one dtype, storage, group and patch size."""
    for v in _variants(arch, dtypes[:1] if small else dtypes, small):
        yield replace(v, options=OPTIONS | v.options)


def _variants(arch: int, dtypes: list[str], small: bool) -> Iterator[Variant]:
    for dtype in dtypes:
        yield from _nf4(arch, dtype, small)
        yield from _patch_embed(arch, dtype, small)
        yield from _attention(arch, dtype, small)
    yield from _masks()


def _rows(op: str, arch: int, **fixed) -> Iterator[tuple[dict, dict, dict]]:
    """(conditions left for run time, constants, options) of an op's rows that agree with what is fixed; as fastfuse.tune.pick, null rows left out."""
    table = [_served(row) for row in json.loads((TUNE / f"{op}.json").read_text())]
    below = [int(r["arch"][3:]) for r in table if r["arch"].startswith("sm_") and int(r["arch"][3:]) <= arch]
    if not below:
        raise SystemExit(f"FASTFUSE_ARCHS: no rows of tune/{op}.json cover sm_{arch}")
    for row in (r for r in table if r["arch"] == f"sm_{max(below)}" and r["tile"]):
        when = {}
        for name, want in row["when"].items():
            have = fixed.get(name.removesuffix("_max").removesuffix("_multiple"))
            if have is None:
                when[name] = want
            elif not (have <= want if name.endswith("_max") else have % want == 0 if name.endswith("_multiple") else have == want):
                break
        else:
            tile = row["tile"]
            yield when, dict(tile["constants"]), {k: tile[k] for k in ("num_warps", "num_stages")}
            if not when:
                return  # the others are for what is fixed otherwise


def _served(row: dict, triton: str = TRITON) -> dict:
    """As fastfuse.tune.served."""
    release = lambda version: tuple(int(v) for v in version.split(".")[:2])  # noqa: E731
    latest = max((r for r in row.get("since", ()) if release(r) <= release(triton)), key=release, default=None)
    return row | row["since"][latest] if latest else row


def _named(**types: str) -> dict:
    """Arguments that the struct's fields are named like."""
    return {name: f"{name} {kind}" for name, kind in types.items()}


def _all(kind: type, of: str, prefix: str = "") -> tuple:
    """A NamedTuple of kernels/arguments.py whose fields, all of one type, the struct's are named like."""
    return kind(*(f"{prefix}{name} {of}" for name in kind._fields))


_NOTHING = Operand(NF4Weight(None, None, FlatScales(None)), *[None] * 9)
_LAYER = _NOTHING._replace(**_named(N="i32/16", R="i32", scaling="fp32"))
_ONE = {"PROJECTIONS": 1, "DECODE": "prmt"}
_STORED = _ONE | {"BLOCK_SIZE": BLOCK_SIZE, "SCALE_BLOCK": SCALE_BLOCK}
_SIZES = _named(M="i32", K="i32/16", stride_xm="i32/16")


def _nf4(arch: int, dtype: str, small: bool) -> Iterator[Variant]:
    storages = {"FLAT": _all(FlatScales, "*fp32"), "NESTED": NestedScales("index *u8", "code *fp32", "absmax *fp32", "offset *fp32/1")}
    rows = list(_rows("nf4_linear", arch, dtype="16-bit", decode="prmt"))
    rows[-1][0].pop("M_max")  # where Python goes over to the library's product, the last fused kernel goes on
    adapters = [dtype] if small else [dtype, "fp32"]
    for storage in ("NESTED",) if small else storages:
        weight = NF4Weight("packed *u8", None, storages[storage])  # the table of codes is a constant of the decode
        yield Variant(
            "NF4_DEQUANTIZE", (IDS[dtype], storage), "nf4_arguments", nf4_dequantize_kernel,
            {"weight": weight, "out_ptr": f"out *{dtype}", "n_elements": "n i64/16"},
            {"BLOCK_SIZE": BLOCK_SIZE, "SCALE_BLOCK": SCALE_BLOCK, "BLOCKS": 128, "DECODE": "prmt", "CUT": True},
            {"num_warps": 4, "enable_fp_fusion": False},
        )  # fmt: skip
        for row in rows:
            for low in adapters:
                yield from _products(dtype, storage, _LAYER._replace(weight=weight), low, *row)
    reduced = {(t["SPLIT_K"], t["BLOCK_M"], t["BLOCK_N"]) for _, t, _ in rows if "SPLIT_K" in t}
    for low in adapters:
        for splits, block_m, block_n in sorted(reduced):
            for biased in (False, True):
                layer = _LAYER._replace(b=f"b *{low}", bias=f"bias *{dtype}" if biased else None, out=f"out *{dtype}")
                yield Variant(
                    "NF4_REDUCE", (IDS[dtype], IDS[low], int(biased), splits), "nf4_arguments", nf4_skinny_reduce_kernel,
                    {"part_ptr": "part *fp32", "group": (layer,), "xa_ptr": f"xa *{low}"} | _named(stride_xam="i32/16", M="i32", columns="i32/16"),
                    _ONE | {"SPLIT_K": splits, "BLOCK_M": block_m, "BLOCK_N": block_n}, {"num_warps": 4},
                )  # fmt: skip
        yield from _down(arch, dtype, low)


def _products(dtype: str, storage: str, layer: Operand, low: str, when: dict, tile: dict, options: dict) -> Iterator[Variant]:
    """By a row of nf4_linear: of few tokens, in splits, or of many."""
    if splits := tile.get("SPLIT_K"):
        yield Variant(
            "NF4_SKINNY", (IDS[dtype], storage, IDS[low]), "nf4_arguments", nf4_skinny_kernel,
            _SIZES | {"x_ptr": f"x *{dtype}", "group": (layer._replace(a=f"a *{low}"),), "part_ptr": "part *fp32"} | _named(columns="i32/16"),
            _STORED | tile, options, when | {"K_min": splits * tile["BLOCK_K"]},
        )  # fmt: skip
        return
    for biased in (False, True):
        of_many = layer._replace(b=f"b *{low}", bias=f"bias *{dtype}" if biased else None, out=f"out *{dtype}")
        yield Variant(
            "NF4_LINEAR", (IDS[dtype], storage, IDS[low], int(biased)), "nf4_arguments", nf4_linear_fwd_kernel,
            _SIZES | {"x_ptr": f"x *{dtype}", "xa_ptr": f"xa *{low}", "group": (of_many,)} | _named(stride_xam="i32"),
            _STORED | {"TRANSPOSED": False} | tile, options, when,
        )  # fmt: skip


def _down(arch: int, dtype: str, low: str) -> Iterator[Variant]:
    splits = set()
    for when, tile, options in _rows("lora_down", arch, kind="kernel"):
        splits.add(tile["SPLIT_K"])
        yield Variant(
            "LORA_DOWN", (IDS[dtype], IDS[low]), "nf4_arguments", lora_down_kernel,
            _SIZES | {"x_ptr": f"x *{dtype}", "a_ptr": f"a *{low}", "seed_ptr": None, "part_ptr": "part *fp32", "R": "R i32", "threshold": 0},
            {"PRECISION": "tf32x3"} | tile, options, when,
        )  # fmt: skip
    # The splits' sums [M, R] are added up by the kernel that adds up few tokens' splits: as one token of M R features.
    for count in sorted(splits):
        yield Variant(
            "LORA_SUM", (IDS[low], count), "nf4_arguments", nf4_skinny_reduce_kernel,
            {"part_ptr": "part *fp32", "group": (_NOTHING._replace(out=f"xa *{low}", N="columns i32"),),
             "xa_ptr": None, "stride_xam": None, "M": 1, "columns": "columns i32"},
            _ONE | {"SPLIT_K": count, "BLOCK_M": 1, "BLOCK_N": 1024}, {"num_warps": 4},
        )  # fmt: skip


# What a patch embedding adds: of tiled images, and of a ViT without and with a bias.
_PLACED = {
    "NO_TABLES": lambda t: Placed(),
    "TILED": lambda t: _all(Placed, t)._replace(bias=None, rows="rows *i32", factors="factors *fp32"),
    "PLAIN": lambda t: Placed(**_named(cls=t, local_pos=t)),
    "BIASED": lambda t: Placed(**_named(cls=t, bias=t, local_pos=t)),
}
_GEOMETRY = _all(Geometry, "i32")


def _patch_embed(arch: int, dtype: str, small: bool) -> Iterator[Variant]:
    t, four = f"*{dtype}", {"num_warps": 4}
    for ids in (False, True):
        yield Variant(
            "TILE_ROWS", (IDS[dtype], int(ids)), "patch_arguments", tile_rows_kernel,
            {"aspect_ptr": "aspect *i64", "gate_ptr": f"gate {t}/1", "pre_gate_ptr": f"pre_gate {t}/1", "rows_ptr": "rows *i32", "factors_ptr": "factors *fp32",
             "fits_ptr": "fits *i1/1"} | _named(n="i32", n_tiles="i32", side="i32", entries="i32"),
            {"IDS": ids, "BLOCK": 1024}, four,
        )  # fmt: skip
    for patch in (14,) if small else (14, 16):
        for images in (dtype, "u8") if small else (dtype, "fp32", "u8"):
            numbers = {name: tuple(f"{name}{c} fp32" for c in range(3)) if images == "u8" else None for name in ("scale", "shift")}
            yield Variant(
                "PATCHIFY", (IDS[dtype], IDS[images], patch), "patch_arguments", patchify_kernel,
                {"images_ptr": f"images *{images}/1", "a_ptr": f"a {t}", "image": _all(Image, "i32")._replace(stride_pixel=1),
                 "shape": _GEOMETRY} | _named(M="i32", K="i32/16") | numbers,
                {"CHANNELS": 3, "PATCH_H": patch, "PATCH_W": patch, "BLOCK_M": 32, "BLOCK_K": 128}, four,
            )  # fmt: skip
    # norm=0, as the product rounds to the result's dtype before a norm anyway; PW=1: pixels are gathered by a kernel of their own
    for when, tile, options in _rows("patch_embed", arch, dtype="16-bit", out="16-bit", norm=0, PW=1):
        for tables, kinds in _PLACED.items():
            if small and tables == "PLAIN":
                continue
            yield Variant(
                "PATCH_EMBED", (IDS[dtype], tables), "patch_arguments", patch_embed_fwd_kernel,
                {"x_ptr": f"a {t}", "w_ptr": f"weight {t}", "out_ptr": f"out {t}", "tables": kinds(t), "image": None, "shape": _GEOMETRY, "scale": None, "shift": None} | _named(M="i32", N="i32/16", K="i32/16"),
                {"CHANNELS": 3, "PATCH_H": 1, "PATCH_W": 1, "LINE": 1, "PRECISION": "tf32x3"} | tile, options, when,
            )  # fmt: skip
    for columns in (2048,) if small else (1024, 2048):
        for tables in ("TILED",) if small else ("TILED", "PLAIN", "BIASED"):
            yield Variant(
                "PLACE", (IDS[dtype], tables), "patch_arguments", place_kernel,
                {"x_ptr": f"out {t}", "y_ptr": f"out {t}", "kept_ptr": None, "stats_ptr": None, "tables": _PLACED[tables](t), "norm_w_ptr": f"norm_weight {t}",
                 "norm_b_ptr": f"norm_bias {t}", "shape": _GEOMETRY} | _named(M="i32", N="i32/16", eps="fp32"),
                {"NORM": True, "BLOCK_M": 4096 // columns, "BLOCK_N": columns}, four, {"N_max": columns},
            )  # fmt: skip


def _attention(arch: int, dtype: str, small: bool) -> Iterator[Variant]:
    t = f"*{dtype}"
    sizes = _named(**dict.fromkeys(("s", "s_e", "key_heads", "masks"), "i32"))
    masks = {"LENGTHS": Lengths("lengths *i32"), "INTERVALS": Mask("visible *i32", "empty *i1", "blocks *i32", "counts *i32")}
    masks["BITS"] = masks["INTERVALS"]
    strides = ForwardStrides(*(_all(Strides, "i32/16", f"{x}_") for x in ForwardStrides._fields))
    for D in (128,) if small else (64, 128):
        rows = list(_rows("cross_attention", arch, dtype="16-bit", tma=0, D=D))
        for G in (4,) if small else (1, 4, 8):
            heads = {"G": G, "GP": G, "D": D, "BLOCK_D": D}
            for when, tile, options in rows:
                few = "M_max" in when
                for kind, (mask, parts) in enumerate(masks.items()):
                    # Few rows are decoding: over what a cache holds, and in splits. Masks of so few take the rows for many.
                    for split in () if few and kind else (True,) if few else (False, True):
                        yield Variant(
                            "ATTENTION", (IDS[dtype], f"HEADS({G}, {D})", mask, int(split)), "attention_arguments", cross_attention_fwd_kernel,
                            {"q_ptr": f"q {t}", "k": f"k {t}", "v": f"v {t}", "o_ptr": "parts *fp32" if split else f"o {t}",
                             "lse_ptr": "part_lse *fp32" if split else "lse *fp32", "mask": parts, "strides": strides, "scale": "scale fp32",
                             "splits": "splits i32"} | sizes,
                            heads | {"KIND": kind, "SPLIT": split, "TOKENS_PER_BLOCK": 128 // G, "PRECISION": "tf32x3"} | tile, options, when,
                        )  # fmt: skip
            yield Variant(
                "ATTENTION_MERGE", (IDS[dtype], f"HEADS({G}, {D})"), "attention_arguments", cross_attention_merge_kernel,
                {"parts_ptr": "parts *fp32", "part_lse_ptr": "part_lse *fp32", "o_ptr": f"o {t}", "lse_ptr": "lse *fp32", "o_stride": strides.o,
                 "splits": "splits i32"} | sizes,
                heads | {"BLOCK_M": 16}, {"num_warps": 4},
            )  # fmt: skip


def _masks() -> Iterator[Variant]:
    four, made = {"num_warps": 4}, {"empty_ptr": "empty *i1"}
    yield Variant(
        "PACK_TILES", (), "mask_arguments", pack_tiles_kernel,
        made | {"visible_ptr": "tiles *u8", "bits_ptr": "visible *i32"} | _named(s="i32", n_tiles="i32", tokens_per_tile="i32", NK="i32"),
        {"TILES_IN_A_WORD": 2, "BLOCK_S": 16, "BLOCK_W": 128}, four,
    )  # fmt: skip
    for bits in (False, True):
        yield Variant(
            "BLOCK_STATES", ("BITS" if bits else "INTERVALS",), "mask_arguments", block_states_kernel,
            made | {"rows_ptr": "visible *i32", "states_ptr": "states *i8"} | _named(s="i32", tokens="i32", NK="i32"),
            {"BITS": bits, "BLOCK_S": 32, "BLOCK_K": 32}, four,
        )  # fmt: skip
    yield Variant(
        "BLOCK_LIST", (), "mask_arguments", block_list_kernel,
        {"states_ptr": "states *i8", "list_ptr": "blocks *i32", "counts_ptr": "counts *i32", "stride_b": "stride_b i32", "stride_l": "NK i32", "stride_n": 1, "length": "NK i32"},
        {"BLOCK": 256}, four,
    )  # fmt: skip
