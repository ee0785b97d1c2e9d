"""The tiles that bench.tune tries in a row's place, and what a launcher takes."""

import itertools
from collections.abc import Iterator, Mapping

Tile = dict | None  # as a row writes it; None: the unfused route
LARGEST_BLOCK = 128  # of attention: what a mask's lists hold in columns, and in rows


def candidates(op: str, rows: list[dict], row: Mapping, quick: bool) -> list[Tile]:
    """The tiles tried in a row's place: its own first, the unfused route where there is one, those of the other rows, and the space of the op.

    quick: of the space those that differ from the row's own tile, or from another row's, in one value.
    """
    known = [row["tile"], *([] if op.startswith("cross") else [None]), *(r["tile"] for r in rows if r["tile"])]
    spread = _space(op, rows, row["when"])
    if quick:
        near = [row["tile"]] if row["tile"] else [t for t in known if t]
        spread = (t for t in spread if any(_apart(t, other) <= 1 for other in near))
    found = []
    for tile in [*known, *spread]:
        if tile not in found and illegal(op, row["when"], tile) is None:
            found.append(tile)
    return found


def _apart(one: dict, other: dict) -> int:
    flat = [{**t["constants"], "num_warps": t["num_warps"], "num_stages": t["num_stages"]} for t in (one, other)]
    return sum(flat[0].get(k) != flat[1].get(k) for k in flat[0].keys() | flat[1].keys())


def illegal(op: str, when: Mapping, tile: Tile) -> str | None:
    """Why the launcher could not use this tile for every shape of a row, or would pass it over; None where it can."""
    if tile is None:
        return "there is no unfused route" if op.startswith("cross") else None
    c, most = tile["constants"], when.get("M_max", float("inf"))
    blocks = {k: v for k, v in c.items() if k.startswith("BLOCK_")}
    for name, size in blocks.items():
        if size < 16 or size & (size - 1):
            return f"{name} is {size}, not a power of two from 16 on"
    if tile["num_warps"] not in (1, 2, 4, 8, 16) or tile["num_stages"] < 1:
        return f"{tile['num_warps']} warps, {tile['num_stages']} stages"
    if op in ("nf4_linear", "nf4_linear_dx", "lora_row_norms") and c["BLOCK_K"] % 32:
        return f"BLOCK_K is {c['BLOCK_K']}, no multiple of 32"
    if op == "nf4_linear":
        if when.get("K_multiple", 64) % c["BLOCK_K"]:
            return f"BLOCK_K is {c['BLOCK_K']}, K a multiple of {when.get('K_multiple', 64)}"
        if ("SPLIT_K" in c) == ("TRANSPOSED" in c):
            return "SPLIT_K or TRANSPOSED, one of them"
        if "SPLIT_K" in c and most > c["BLOCK_M"]:
            return f"SPLIT_K with BLOCK_M {c['BLOCK_M']}, M up to {most}"
    if op.startswith("cross"):
        if max(c["BLOCK_M"], c["BLOCK_N"]) > LARGEST_BLOCK:
            return f"blocks of {c['BLOCK_M']} x {c['BLOCK_N']}, a mask's are {LARGEST_BLOCK}"
        if c["TMA"] and when.get("tma") != 1:
            return "TMA where no row asks for it"
    if op == "patch_embed" and c["BLOCK_N"] // c["SUBTILES"] < 16:
        return f"BLOCK_N {c['BLOCK_N']} in {c['SUBTILES']}"
    return None


def _space(op: str, rows: list[dict], when: Mapping) -> Iterator[dict]:
    """A small grid for each op. What does not compile, spills or does not fit is no concern here."""
    fp32, tma, narrow, wide = when.get("dtype") == "fp32", when.get("tma") == 1, (32, 64), (64, 128)
    every = (*narrow, 128)
    if op == "nf4_linear" and when.get("M_max", 64) <= 32:
        yield from _grid(4, (3, 4), BLOCK_M=_rows((16, 32), when)[-1], BLOCK_N=wide, BLOCK_K=wide, SPLIT_K=(2, 4, 8, 16, 32))
    elif op == "nf4_linear":
        yield from _grid(stages=(2, 3, 4), BLOCK_M=_rows((16, *every), when), BLOCK_N=wide, BLOCK_K=64, TRANSPOSED=(False, True))
    elif op == "nf4_linear_dx":
        yield from _grid(stages=(2, 3, 4), BLOCK_M=_rows(every, when), BLOCK_N=narrow, BLOCK_K=wide)
    elif op == "lora_row_norms":
        yield from _grid((2, 4, 8), (2, 3, 4), BLOCK_N=(16, *narrow), BLOCK_K=wide)
    elif op == "lora_down":
        yield from _grid(4, (2, 3, 4), BLOCK_M=_rows((16, *every), when), BLOCK_R=16, BLOCK_K=wide, SPLIT_K=(2, 4, 8, 16))
    elif op == "lora_up":
        yield from _grid(stages=2, BLOCK_M=every, BLOCK_C=wide)
    elif op == "lora_grad":
        programs = next(r["tile"]["constants"]["PROGRAMS"] for r in rows if r["tile"])
        rank = max(16, min(64, when.get("R_max", 64)))
        yield from _grid(BLOCK_M=narrow, BLOCK_C=wide, BLOCK_R=rank, PROGRAMS=(programs // 2, programs, 2 * programs))
    elif op == "patch_embed" and fp32:
        yield from _grid(BLOCK_M=wide, BLOCK_N=wide, BLOCK_K=32, SUBTILES=(2, 4), DIRECT=False, FLATTEN=False)
    elif op == "patch_embed":
        gather = "PW_multiple" in when
        yield from _grid(stages=(3, 4), BLOCK_M=wide, BLOCK_N=(128, 256), BLOCK_K=64, SUBTILES=(2, 4), DIRECT=gather, FLATTEN=(False, True))
    elif fp32:
        yield from _grid(stages=(1, 2), BLOCK_M=(16, 32), BLOCK_N=(16, 32), TMA=tma)
    elif "M_max" in when:
        yield from _grid(stages=(2, 3, 4), BLOCK_M=_rows((16, *narrow), when), BLOCK_N=every, TMA=tma)
    elif op == "cross_attention_dkdv":
        yield from _grid(stages=(1, 2, 3), BLOCK_M=every, BLOCK_N=wide if "D_max" in when else every, TMA=tma)
    else:
        yield from _grid(BLOCK_M=wide, BLOCK_N=every, TMA=tma)


def _rows(sizes: tuple[int, ...], when: Mapping) -> tuple[int, ...]:
    """The two largest blocks that M_max fills."""
    most = when.get("M_max", sizes[-1])
    return tuple(s for s in sizes if s == sizes[0] or s < 2 * most)[-2:]


def _grid(warps: int | tuple = (4, 8), stages: int | tuple = (2, 3), **constants: int | tuple) -> Iterator[dict]:
    """Every combination. What is no tuple is alike in all."""
    spread = [values if isinstance(values, tuple) else (values,) for values in (*constants.values(), warps, stages)]
    for *values, w, s in itertools.product(*spread):
        yield {"constants": dict(zip(constants, values, strict=True)), "num_warps": w, "num_stages": s}
