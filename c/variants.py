"""Which kernels the C library carries: every variant of every kernel, described as its launch in C will call it.

A signature names a C field for every argument that reaches the device: "field type", a nested tuple where the kernel takes one, None or a
number where the value is a constant of the code (Triton then drops the parameter). "/16" after an integer says that it is a multiple of 16,
"/1" after a pointer that it need not be aligned to 16 bytes as all others are. fastfuse.c checks both.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastfuse.kernels.cross_attention import cross_attention_fwd_kernel, cross_attention_merge_kernel
from fastfuse.kernels.encoder_mask import block_list_kernel, block_states_kernel, pack_tiles_kernel
from fastfuse.kernels.lora import lora_down_kernel
from fastfuse.kernels.nf4 import nf4_dequantize_kernel
from fastfuse.kernels.nf4_linear import nf4_linear_fwd_kernel, nf4_skinny_kernel, nf4_skinny_reduce_kernel
from fastfuse.kernels.patch_embed import patch_embed_fwd_kernel, patchify_kernel, place_kernel, tile_rows_kernel

TUNE = Path(__file__).parents[1] / "fastfuse" / "tune"
BLOCK_SIZE, SCALE_BLOCK = 64, 256  # elements of a scale, scales of a nested absmax: bitsandbytes' own
IDS = {"bf16": "FFS_BF16", "fp16": "FFS_FP16", "fp32": "FFS_FP32", "u8": "FFS_U8"}


@dataclass(frozen=True)
class Variant:
    """A row of the library's table: the first one with the kernel's id and key whose conditions hold is launched."""

    id: str  # enum kernel_id of launch.h
    key: tuple  # C expressions, up to four small numbers
    arguments: str  # the struct of launch.h that holds the fields
    kernel: object
    signature: dict
    constants: dict
    options: dict
    when: dict = field(default_factory=dict)  # M_max, N_max, K_multiple, K_min


def variants(arch: int, dtypes: list[str], small: bool) -> Iterator[Variant]:
    """All of one architecture. small: what the tests need, one dtype, storage, group and patch size."""
    for dtype in dtypes[:1] if small else dtypes:
        yield from _nf4(arch, dtype, small)
        yield from _patch_embed(arch, dtype, small)
        yield from _attention(arch, dtype, small)
    yield from _masks()


def _rows(op: str, arch: int, **fixed) -> Iterator[tuple[dict, dict, dict]]:
    """(conditions left for run time, constants, options) of an op's rows that agree with what is fixed; as fastfuse.tune.pick, null rows left out."""
    table = json.loads((TUNE / f"{op}.json").read_text())
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


def _nf4(arch: int, dtype: str, small: bool) -> Iterator[Variant]:
    x, one = f"*{dtype}", {"PROJECTIONS": 1, "DECODE": "prmt"}
    stored = one | {"BLOCK_SIZE": BLOCK_SIZE, "SCALE_BLOCK": SCALE_BLOCK}
    storages = {"FLAT": ("absmax *fp32",), "NESTED": ("index *u8", "code *fp32", "absmax *fp32", "offset *fp32/1")}
    storages = {"NESTED": storages["NESTED"]} if small else storages
    adapters = [dtype] if small else [dtype, "fp32"]
    rows = list(_rows("nf4_linear", arch, dtype="16-bit", decode="prmt"))
    rows[-1][0].pop("M_max")  # where Python goes over to the library's product, the last fused kernel goes on
    sizes = {"M": "M i32", "K": "K i32/16", "stride_xm": "stride_xm i32/16"}

    def group(storage: tuple, a=None, b=None, bias=None, out=None, N="N i32/16") -> tuple:
        """One projection; the table of codes is a constant of the decode."""
        packed = None if storage == (None,) else "packed *u8"
        return ((packed, None, storage, a, b, None, bias, out, None, N, "R i32", "scaling fp32"),)

    for storage, scales in storages.items():
        yield Variant(
            "NF4_DEQUANTIZE", (IDS[dtype], storage), "nf4_arguments", nf4_dequantize_kernel,
            {"packed_ptr": "packed *u8", "code_ptr": None, "scales": scales, "out_ptr": f"out {x}", "n_elements": "n i64/16"},
            {"BLOCK_SIZE": BLOCK_SIZE, "SCALE_BLOCK": SCALE_BLOCK, "BLOCKS": 128, "DECODE": "prmt", "CUT": True},
            {"num_warps": 4, "enable_fp_fusion": False},
        )  # fmt: skip
        for when, tile, options in rows:
            for low in adapters:
                a, b = f"a *{low}", f"b *{low}"
                if splits := tile.get("SPLIT_K"):
                    yield Variant(
                        "NF4_SKINNY", (IDS[dtype], storage, IDS[low]), "nf4_arguments", nf4_skinny_kernel,
                        sizes | {"x_ptr": f"x {x}", "group": group(scales, a), "part_ptr": "part *fp32", "columns": "columns i32/16"},
                        stored | tile, options, when | {"K_min": splits * tile["BLOCK_K"]},
                    )  # fmt: skip
                    continue
                for biased in (False, True):
                    yield Variant(
                        "NF4_LINEAR", (IDS[dtype], storage, IDS[low], int(biased)), "nf4_arguments", nf4_linear_fwd_kernel,
                        sizes | {"x_ptr": f"x {x}", "group": group(scales, None, b, f"bias {x}" if biased else None, f"out {x}"),
                                 "xa_ptr": f"xa *{low}", "stride_xam": "stride_xam i32"},
                        stored | {"TRANSPOSED": False} | tile, options, when,
                    )  # fmt: skip
    reduced = {(t["SPLIT_K"], t["BLOCK_M"], t["BLOCK_N"]) for _, t, _ in rows if "SPLIT_K" in t}
    for splits, block_m, block_n in sorted(reduced):
        for low in adapters:
            for biased in (False, True):
                yield Variant(
                    "NF4_REDUCE", (IDS[dtype], IDS[low], int(biased), splits), "nf4_arguments", nf4_skinny_reduce_kernel,
                    {"part_ptr": "part *fp32", "group": group((None,), None, f"b *{low}", f"bias {x}" if biased else None, f"out {x}"),
                     "xa_ptr": f"xa *{low}", "stride_xam": "stride_xam i32/16", "M": "M i32", "columns": "columns i32/16"},
                    one | {"SPLIT_K": splits, "BLOCK_M": block_m, "BLOCK_N": block_n}, {"num_warps": 4},
                )  # fmt: skip
    for low in adapters:
        splits = set()
        for when, tile, options in _rows("lora_down", arch, kind="kernel"):
            splits.add(tile["SPLIT_K"])
            yield Variant(
                "LORA_DOWN", (IDS[dtype], IDS[low]), "nf4_arguments", lora_down_kernel,
                sizes | {"x_ptr": f"x {x}", "a_ptr": f"a *{low}", "seed_ptr": None, "part_ptr": "part *fp32", "R": "R i32", "threshold": 0},
                {"PRECISION": "tf32x3"} | tile, options, when,
            )  # fmt: skip
        # The splits' sums [M, R] are added up by the kernel that adds up few tokens' splits: as one token of M R features.
        for count in sorted(splits):
            yield Variant(
                "LORA_SUM", (IDS[low], count), "nf4_arguments", nf4_skinny_reduce_kernel,
                {"part_ptr": "part *fp32", "group": ((None, None, (None,), None, None, None, None, f"xa *{low}", None, "columns i32", None, None),),
                 "xa_ptr": None, "stride_xam": None, "M": 1, "columns": "columns i32"},
                one | {"SPLIT_K": count, "BLOCK_M": 1, "BLOCK_N": 1024}, {"num_warps": 4},
            )  # fmt: skip


def _patch_embed(arch: int, dtype: str, small: bool) -> Iterator[Variant]:
    return iter(())


def _attention(arch: int, dtype: str, small: bool) -> Iterator[Variant]:
    return iter(())


def _masks() -> Iterator[Variant]:
    return iter(())
