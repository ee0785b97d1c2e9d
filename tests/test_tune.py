"""The rows of fastfuse/tune, and bench.tune, which rewrites them: with a clock that is told the times, and once with the real one in the interpreter."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastfuse import Unsupported, info, tune
from fastfuse.tune import Tile, pick, pin

ROOT = Path(__file__).parents[1]
OPS = info.tuned_ops()


@pytest.mark.parametrize("op", OPS)
def test_last_row_of_each_architecture_is_unconditional(op):
    rows = tune.table(op)
    for arch in {r["arch"] for r in rows}:
        assert [r for r in rows if r["arch"] == arch][-1]["when"] == {}, arch


def test_first_match_wins_and_bounds_hold():
    def m(M, K=4096, decode="prmt", arch="sm_90"):
        return pick("nf4_linear", arch, dtype="16-bit", decode=decode, M=M, N=4096, K=K)

    assert m(1)["BLOCK_M"] == 16 and m(16) == m(1) and m(17) != m(16)
    assert m(1)["BLOCK_K"] == 128 and m(1, K=576)["BLOCK_K"] == 64  # 576 is no multiple of 128
    assert m(701) is None and m(700)["TRANSPOSED"]
    assert m(1, K=100) is None  # rows cut inside a step: decode once, then the library's GEMM
    assert m(1, decode="gather") is None  # the table look-up spills there


@pytest.mark.parametrize(
    "arch, rows_of", [("sm_86", "sm_80"), ("sm_89", "sm_80"), ("sm_103", "sm_100"), ("sm_121", "sm_120"), ("gfx950", "gfx942"), ("sm_90", "sm_90")]
)
def test_an_architecture_without_rows_uses_the_one_below(arch, rows_of):
    assert tune.covering_arch("nf4_linear", arch) == rows_of


@pytest.mark.parametrize("arch", ["sm_75", "gfx906", "gfx1100", "xpu"])
def test_an_uncovered_architecture_is_refused(arch):
    with pytest.raises(Unsupported, match=f"nf4_linear: no kernel covers {arch}, only gfx942, "):
        pick("nf4_linear", arch, dtype="16-bit", decode="prmt", M=1, N=64, K=64)


def test_pin_is_undone():
    tile = Tile({"BLOCK_M": 16})
    before = pick("nf4_linear", "sm_90", dtype="16-bit", decode="prmt", M=1, N=64, K=64)
    with pin("nf4_linear", tile):
        assert pick("nf4_linear", "sm_90", M=1) is tile
        with pin("nf4_linear", None):
            assert pick("nf4_linear", "sm_90", M=1) is None
    assert pick("nf4_linear", "sm_90", dtype="16-bit", decode="prmt", M=1, N=64, K=64) == before


OLD, NEW, NEWER = ({"constants": {"BLOCK_M": 16}, "num_warps": 4, "num_stages": stages} for stages in (2, 3, 4))
SINCE = {"arch": "sm_90", "when": {"M_max": 8}, "tile": OLD, "us": [1.0], "since": {"3.10": {"tile": NEWER}, "3.9": {"tile": NEW, "us": [2.0]}}}


@pytest.mark.parametrize(
    "triton, tile, us", [("3.8.1", OLD, [1.0]), ("3.9.0", NEW, [2.0]), ("3.10.0+git1", NEWER, None), ("4.0", NEWER, None), ("0.0", OLD, [1.0])]
)
def test_a_row_holds_another_tile_since_a_triton(triton, tile, us):
    row = tune.served(SINCE, triton)
    assert (row["arch"], row["when"], row["tile"], row.get("us")) == ("sm_90", {"M_max": 8}, tile, us)


@pytest.mark.parametrize("release, tile", [("3.0", NEW), ("99.0", OLD)])
def test_tables_are_as_the_installed_triton_takes_them(release, tile, tmp_path, monkeypatch):
    (tmp_path / "lora_up.json").write_text(json.dumps([{"arch": "sm_90", "when": {}, "tile": OLD, "since": {release: {"tile": NEW}}}]))
    monkeypatch.setattr(tune, "__file__", str(tmp_path / "__init__.py"))
    assert [row["tile"] for row in tune.table.__wrapped__("lora_up")] == [tile]


pytest.importorskip("triton", reason="Triton ships for Linux alone")

from bench import codegen  # noqa: E402
from bench import tune as sweep  # noqa: E402
from bench import tune_space as space  # noqa: E402
from bench.codegen import ARCHS, Report  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPUS = [pytest.param(op, arch, id=f"{op}-{arch}") for op in space.OPS for arch in ARCHS]


def test_every_tuned_op_is_swept():
    assert sorted(space.OPS) == OPS


def test_one_tile_for_both_kinds_of_adapters_is_compiled_for_both(monkeypatch):
    rows = [{"arch": "sm_90", "when": when, "tile": OLD} for when in ({"low": "fp32"}, {"low": "fp32", "R_max": 8}, {"R_max": 16}, {})]
    monkeypatch.setattr(tune, "table", lambda op: rows)
    assert [row["when"] for row in codegen._rows("lora_grad", "sm_90")] == [{"low": "fp32"}, {"R_max": 16}]


@pytest.mark.parametrize("op", OPS)
def test_every_table_is_one_that_a_sweep_could_write(op, tmp_path):
    path = ROOT / f"fastfuse/tune/{op}.json"
    rows = sweep.read(path)
    assert sweep.problems(op, rows) == []
    (tmp_path / path.name).touch()
    sweep.write(tmp_path / path.name, [dict(row) for row in rows])  # written anew, not line by line
    assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("op, arch", GPUS)
def test_every_row_has_its_own_tile_among_legal_candidates_and_a_case(op, arch):
    rows = [row for row in tune.table(op) if row["arch"] == arch]
    for row, points in sweep._regimes(rows, arch, space.series(op, arch)):
        assert points, row["when"]
        every, quick = space.candidates(op, rows, row, False), space.candidates(op, rows, row, True)
        assert every[0] == quick[0] == row["tile"] and len(every) > len(quick) > 1
        assert len(every) == len({json.dumps(t, sort_keys=True) for t in every})
        assert all(space.illegal(op, row["when"], t) is None for t in every)
        assert (None in every) == (not op.startswith("cross_attention"))
        for tile in (t for t in every if t):
            for s in (s for p in points for s in space.specimens(arch, op, row | {"tile": tile}, p.variant)):
                assert {n for n in s.kernel.arg_names if n not in s.constants and n not in s.signature} == set(), s.name
                given = {k: v for k, v in tile["constants"].items() if k in s.kernel.arg_names}
                assert given.items() <= s.constants.items() and s.options.get("num_stages", tile["num_stages"]) == tile["num_stages"]


@pytest.mark.parametrize(
    "op, when, changed, reason",
    [
        ("nf4_linear", {"K_multiple": 64}, {"BLOCK_K": 128}, "BLOCK_K is 128, K a multiple of 64"),
        ("nf4_linear", {"M_max": 64, "K_multiple": 64}, {}, "SPLIT_K with BLOCK_M 16, M up to 64"),
        ("nf4_linear", {"M_max": 16, "K_multiple": 64}, {"TRANSPOSED": True}, "SPLIT_K or TRANSPOSED"),
        ("nf4_linear", {"M_max": 16, "K_multiple": 64}, {"BLOCK_N": 48}, "BLOCK_N is 48, not a power of two"),
        ("cross_attention", {"D_max": 128}, {"TMA": True}, "TMA where no row asks for it"),
        ("cross_attention", {"tma": 1}, {"BLOCK_N": 256}, "a mask's are 128"),
    ],
)
def test_what_a_launcher_cannot_take_is_named(op, when, changed, reason):
    base = next(row["tile"] for row in tune.table(op) if row["arch"] == "sm_90" and row["when"].get("M_max") == 16)
    tile = base | {"constants": {**base["constants"], "BLOCK_K": 64} if "SPLIT_K" in base["constants"] else base["constants"]}
    tile = tile | {"constants": tile["constants"] | changed}
    assert reason in space.illegal(op, when, tile)


def tile_of(block_m, splits=None, stages=3):
    own = {"SPLIT_K": splits} if splits else {"TRANSPOSED": False}
    return {"constants": {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 64} | own, "num_warps": 4, "num_stages": stages}


FEW, MANY = tile_of(16, 8), tile_of(64)
TABLE = [
    {"arch": "sm_80", "when": {}, "tile": MANY},
    {"arch": "sm_90", "when": {"M_max": 16, "K_multiple": 64}, "tile": FEW},
    {"arch": "sm_90", "when": {"M_max": 64, "K_multiple": 64}, "tile": MANY},
    {"arch": "sm_90", "when": {}, "tile": None},
    {"arch": "sm_120", "when": {}, "tile": None},
]
COUNTS = (1, 16, 64, 256)


def point(M):
    case = SimpleNamespace(op="nf4_linear", shape=f"M{M}", dtype=torch.bfloat16)
    return space.Point(case, {"dtype": "16-bit", "decode": "prmt", "M": M, "N": 4096, "K": 4096, "R": 16}, ("nested", "bf16", "bf16", 1, False))


CALLS = [space.Series(point, COUNTS, (8, 16, 24, 32, 48, 64, 96, 128))]


def clean(jobs):
    return {job: [Report(job[1], "kernel", job[0], registers=64, stack=0, shared=1024, warps=4, blocks=4)] for job in jobs}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "nf4_linear.json").write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in TABLE) + "\n]\n")
    return tmp_path


def tuned(folder, clock, arch="sm_90", **setting):
    """(rows of the table afterwards, what was said)."""
    said = []
    made = sweep.Setting(clock, lambda point: 1.0, setting.pop("compiled", clean), {"device": "a GPU", "commit": "c0ffee"}, say=said.append, **setting)
    sweep.tune_op("nf4_linear", arch, CALLS, made, folder)
    assert [p.name for p in folder.iterdir()] == ["nf4_linear.json"]  # nothing left lying about
    return json.loads((folder / "nf4_linear.json").read_text()), "\n".join(said)


def times(faster, others=10.0):
    """A clock: us of `faster` = {tile's name: us}, all others alike."""
    return lambda op, point, tile: faster.get(sweep.name(tile), others)


def test_a_faster_tile_takes_its_rows_place_and_the_other_lines_stay(folder):
    path = folder / "nf4_linear.json"
    before = path.read_text().splitlines()
    rows, said = tuned(folder, times({"16x64x64 SPLIT_K=4 w4 s4": 9.0}))
    assert rows[1]["tile"] == tile_of(16, 4, 4) and rows[1]["when"] == TABLE[1]["when"]
    assert {k: v for k, v in rows[1].items() if k not in ("arch", "when", "tile")} == {
        "us": [9.0, 9.0], "floor_us": [1.0, 1.0], "shape": ["M1 bfloat16", "M16 bfloat16"], "device": "a GPU", "commit": "c0ffee",
    }  # fmt: skip
    assert [row["tile"] for row in rows[2:4]] == [MANY, None]  # they stay, and say what they took
    assert rows[2]["us"] == [10.0] and rows[3]["us"] == [10.0]
    after = path.read_text().splitlines()
    assert [after[i] for i in (0, 1, 5, 6)] == [before[i] for i in (0, 1, 5, 6)]
    assert "16x64x64 SPLIT_K=8 w4 s3 -> 16x64x64 SPLIT_K=4 w4 s4: 11.1% faster" in said
    assert sum("us" in row for row in rows) == 3  # what fastfuse.info counts as measured


def test_within_the_margin_a_row_stays(folder):
    rows, _ = tuned(folder, times({"16x64x64 SPLIT_K=4 w4 s4": 9.9}))
    assert rows[1]["tile"] == FEW and rows[1]["us"] == [10.0, 10.0]
    rows, _ = tuned(folder, times({"16x64x64 SPLIT_K=4 w4 s4": 9.9}), margin=0.005)
    assert rows[1]["tile"] == tile_of(16, 4, 4)


def test_a_lucky_time_is_found_out_in_turns(folder):
    lucky, calls = "16x64x64 SPLIT_K=4 w4 s4", []

    def clock(op, point, tile):
        calls.append((point.case.shape, sweep.name(tile)))
        return 5.0 if sweep.name(tile) == lucky and calls.count(calls[-1]) == 1 else 10.0

    rows, said = tuned(folder, clock)
    assert rows[1]["tile"] == FEW and f"{lucky} in turns with the row's own: +0.0%, not enough" in said
    at_16 = [name for shape, name in calls if shape == "M16"]
    assert at_16[-6:] == [sweep.name(FEW), lucky] * 3


def test_the_mean_over_a_rows_cases_decides(folder):
    """Half the time at one of two cases, three times it at the other."""
    rows, _ = tuned(folder, lambda op, point, tile: {"M1": 5.0, "M16": 30.0}.get(point.case.shape, 10) if tile == tile_of(16, 4, 4) else 10.0)
    assert rows[1]["tile"] == FEW


def test_a_wrong_tile_is_refused_however_fast(folder):
    wrong, right = "16x64x64 SPLIT_K=4 w4 s4", "16x128x64 SPLIT_K=8 w4 s3"

    def clock(op, point, tile):
        if sweep.name(tile) == wrong and point.case.shape == "M16":  # right at the other case
            raise sweep.Refused("wrong: its error is 3.2 times the limit")
        return {wrong: 1.0, right: 9.0}.get(sweep.name(tile), 10.0)

    rows, said = tuned(folder, clock)
    assert sweep.name(rows[1]["tile"]) == right and f"{wrong} refused at M16: wrong" in said


def test_a_rows_own_tile_that_is_wrong_gives_way(folder):
    def clock(op, point, tile):
        if tile == FEW:
            raise sweep.Refused("wrong")
        return 20.0 if tile else 30.0

    rows, said = tuned(folder, clock)
    assert rows[1]["tile"] not in (FEW, None) and "the row's own tile is refused" in said


def test_a_case_that_cannot_be_made_is_left_out(folder):
    def clock(op, point, tile):
        if point.case.shape in ("M1", "M64"):
            raise sweep.Unprepared("out of memory")
        return 10.0

    rows, said = tuned(folder, clock)
    assert rows[1]["shape"] == ["M16 bfloat16"] and "us" not in rows[2] and "M1 left out: out of memory" in said


def reported(faults, bound=None):
    """As the compiler: `faults` = {words of a tile's name: what is wrong with it}, of all variants alone where they start with "gate "."""

    def compiled(jobs):
        made = {}
        for job in jobs:
            name, gate = sweep.name(json.loads(job[2])["tile"]), job[3] is None
            report = clean([job])[job][0]
            report.loops = {"loop": {"bound": (bound or {}).get(name, 50.0), "by": "issue"}}
            made[job] = [report]
            for words, fault in faults.items():
                if words in name and fault.startswith("gate ") <= gate:
                    report.stack = 8 if fault.endswith("spill") else 0
                    report.shared = 1 << 20 if fault.endswith("shared") else 1024
                    made[job] = "RuntimeError: no" if fault.endswith("error") else [report]
        return made

    return compiled


@pytest.mark.parametrize("fault, said", [("spill", "spilled"), ("shared", "shared memory"), ("error", "did not compile")])
def test_what_the_compiler_shows_is_not_timed(folder, fault, said):
    timed = []

    def clock(op, point, tile):
        timed.append(sweep.name(tile))
        return 1.0 if "16x128" in timed[-1] else 10.0

    rows, text = tuned(folder, clock, compiled=reported({"16x128": fault}))
    assert rows[1]["tile"] == FEW and not any("16x128" in name for name in timed) and f" {said}, " in text


def test_a_rows_own_tile_must_compile(folder):
    with pytest.raises(ValueError, match="nf4_linear M_max=16 K_multiple=64: the row's own tile did not compile: RuntimeError: no"):
        tuned(folder, times({}), compiled=reported({sweep.name(FEW): "error"}))


def test_a_low_bound_is_not_timed_but_never_the_rows_own(folder):
    names = [sweep.name(t) for t in space.candidates("nf4_linear", TABLE[1:4], TABLE[1], False)]
    low = [name for name in names if name.startswith("16x64x64 ") and name.endswith("s4")]
    timed = []

    def clock(op, point, tile):
        timed.append(sweep.name(tile))
        return 10.0

    _, text = tuned(folder, clock, compiled=reported({}, dict.fromkeys(low, 29.0)))
    assert len(low) == 5 and not set(low) & set(timed) and "5 low bound, " in text
    timed.clear()
    own = {sweep.name(FEW): 10.0}  # all that differ in SPLIT_K are its code
    tuned(folder, clock, compiled=reported({}, own))
    assert sweep.name(FEW) in timed and "16x64x64 SPLIT_K=4 w4 s3" not in timed


def test_a_tile_that_the_gate_of_all_variants_stops_is_refused(folder):
    rows, said = tuned(
        folder, times({"16x64x64 SPLIT_K=4 w4 s4": 8.0, "16x128x64 SPLIT_K=4 w4 s4": 9.0}), compiled=reported({"16x64x64 SPLIT_K=4": "gate spill"})
    )
    assert rows[1]["tile"]["constants"]["BLOCK_N"] == 128 and "refused: nf4_linear kernel: 8 bytes of stack" in said


def test_an_interrupted_run_writes_nothing(folder, monkeypatch):
    before = (folder / "nf4_linear.json").read_bytes()

    def clock(op, point, tile):
        if point.case.shape == "M256":
            raise KeyboardInterrupt
        return 9.0 if tile == tile_of(16, 4, 4) else 10.0

    with pytest.raises(KeyboardInterrupt):
        tuned(folder, clock)
    assert (folder / "nf4_linear.json").read_bytes() == before

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tuned(folder, times({}))
    assert (folder / "nf4_linear.json").read_bytes() == before and len(list(folder.iterdir())) == 1


def test_when_the_time_is_up_finished_rows_are_written_and_the_others_stay(folder, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])

    def clock(op, point, tile):
        now[0] = {"M1": 1.0, "M16": 1.0, "M64": 3.0}[point.case.shape]
        return 9.0 if tile == tile_of(16, 4, 4) else 10.0

    rows, said = tuned(folder, clock, deadline=2.0)
    assert rows[1]["tile"] == tile_of(16, 4, 4) and rows[2:] == TABLE[2:] and "the time is up" in said
    before = (folder / "nf4_linear.json").read_bytes()
    assert "no time is left" in tuned(folder, clock, deadline=2.0)[1]
    now[0] = 0.0
    tuned(folder, lambda *_: now.__setitem__(0, 3.0) or 1.0, deadline=2.0)  # no row done: nothing written
    assert (folder / "nf4_linear.json").read_bytes() == before


def test_a_table_that_pick_cannot_serve_is_not_written(folder):
    path = folder / "nf4_linear.json"
    for broken in (TABLE[:3], [*TABLE[:2], TABLE[3], TABLE[2]]):
        path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in broken) + "\n]\n")
        before = path.read_bytes()
        with pytest.raises(ValueError, match="sm_90: the last row, and no other, must be unconditional"):
            tuned(folder, times({}))
        assert path.read_bytes() == before
    path.write_text(json.dumps(TABLE, indent=1))
    with pytest.raises(ValueError, match="not one row a line"):
        tuned(folder, times({}))


def test_an_architecture_without_rows_gets_a_copy_of_its_familys(folder):
    path = folder / "nf4_linear.json"
    family = [row | {"arch": "sm_100", "us": [1.0]} if row["arch"] == "sm_90" else row for row in TABLE]
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in family) + "\n]\n")
    before = path.read_text().splitlines()

    def clock(op, point, tile):
        if point.case.shape == "M256":
            raise sweep.Unprepared("out of memory")
        return 9.0 if tile == tile_of(16, 4, 4) else 10.0

    rows, _ = tuned(folder, clock, arch="sm_103")
    after = path.read_text().splitlines()
    assert after[:5] == before[:5] and after[8:] == before[5:]
    mine = [row for row in rows if row["arch"] == "sm_103"]
    assert [(row["when"], row["tile"]) for row in mine] == [(TABLE[1]["when"], tile_of(16, 4, 4)), (TABLE[2]["when"], MANY), ({}, None)]
    assert ["us" in row for row in mine] == [True, True, False]  # nothing of the family's figures: another chip's


@pytest.mark.parametrize("release, in_force", [("3.0", True), ("99.0", False)])
def test_what_another_triton_takes_of_a_row_is_kept(folder, release, in_force):
    """Measured, the row's own tile or that of the installed Triton changes, and its boundary for both."""
    path = folder / "nf4_linear.json"
    own, other = (tile_of(16, 8), tile_of(16, 2)) if not in_force else (tile_of(16, 2), tile_of(16, 8))
    held = TABLE[1] | {"tile": own, "since": {release: {"tile": other}}}
    path.write_text("[\n" + ",\n".join(f"  {json.dumps(row)}" for row in (TABLE[0], held, *TABLE[2:])) + "\n]\n")
    before = path.read_text().splitlines()
    rows, _ = tuned(folder, crossing_at(8, 64), bounds=True, margin=10.0)
    assert rows[1]["when"] == {"M_max": 8, "K_multiple": 64}
    measured, kept = (rows[1]["since"][release], rows[1]) if in_force else (rows[1], rows[1]["since"][release])
    assert measured["tile"] == tile_of(16, 8) and measured["us"] and kept["tile"] == tile_of(16, 2) and "us" not in kept
    assert path.read_text().splitlines()[:2] == before[:2]
    path.write_text("\n".join([*before, ""]).replace('"BLOCK_K": 64, "SPLIT_K": 2', '"BLOCK_K": 128, "SPLIT_K": 2'))
    with pytest.raises(ValueError, match=r"sm_90 .*BLOCK_K is 128, K a multiple of 64"):
        tuned(folder, times({}))


def crossing_at(few, many):
    """FEW is faster up to `few` tokens, MANY up to `many`; in a sweep all are alike."""

    def clock(op, point, tile):
        M = point.shape["M"]
        return {sweep.name(FEW): 1 + (M > few), sweep.name(MANY): 1.5 + (M > many)}.get(sweep.name(tile), 2.0) * 10

    return clock


@pytest.mark.parametrize(
    "few, many, want",
    [
        (16, 64, (16, 64)),
        (20, 64, (16, 64)),
        (8, 64, (8, 64)),
        (16, 100, (16, 96)),
        (16, 1000, (16, 128)),  # as far as is tried
        (16, 24, (16, 24)),
        (16, 17, (16, 64)),  # slower at once: the row needs another tile, not another boundary
    ],
)
def test_boundaries_move_to_the_crossing(folder, few, many, want):
    rows, said = tuned(folder, crossing_at(few, many), bounds=True, margin=10.0)
    assert tuple(row["when"]["M_max"] for row in rows[1:3]) == want
    assert [list(row["when"]) for row in rows[1:3]] == [["M_max", "K_multiple"]] * 2 and rows[3]["when"] == {}
    assert ("M_max 64 -> " in said) == (want[1] != 64)


@pytest.mark.parametrize("many, want", [(50, 50), (48, 50), (63, 50), (40, 32), (64, 64)])
def test_a_boundary_between_two_Ms_that_are_tried_stays_where_the_crossing_is_too(folder, many, want):
    path = folder / "nf4_linear.json"
    path.write_text(path.read_text().replace('"M_max": 64', '"M_max": 50'))
    rows, _ = tuned(folder, crossing_at(16, many), bounds=True, margin=10.0)
    assert rows[2]["when"]["M_max"] == want


def test_a_boundary_stays_within_what_the_launcher_takes(folder):
    """SPLIT_K computes BLOCK_M tokens at most, however fast it would be with more."""
    rows, _ = tuned(folder, crossing_at(1000, 64), bounds=True, margin=10.0)
    assert rows[1]["when"]["M_max"] == 16


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are interpreted only where there is no GPU")
def test_the_true_clock_in_the_interpreter(folder, monkeypatch):
    """The op itself, pinned, judged and timed; a tile whose result is wrong, and one that fails, are refused by name."""
    tile = {"constants": {"BLOCK_M": 64, "BLOCK_C": 64}, "num_warps": 4, "num_stages": 2}
    path = folder / "lora_up.json"
    path.write_text("[\n" + ",\n".join(f"  {json.dumps({'arch': a, 'when': {}, 'tile': tile})}" for a in ("sm_90", "interpreter")) + "\n]\n")
    before, said, real = path.read_text().splitlines(), [], space.lora_up

    def spoilt(*args):
        pinned = tune._pinned["lora_up"]
        if pinned and pinned["BLOCK_M"] == 32:
            return real(*args) * 1.01
        if pinned and pinned["BLOCK_M"] == 128:
            raise RuntimeError("out of resources")
        return real(*args)

    monkeypatch.setattr(space, "lora_up", spoilt)
    calls = [space.Series(lambda M: space.low_rank_point("lora_up", torch.float16, torch.float32, False, 8, M, C=96), (17, 33))]
    setting = sweep.Setting(
        sweep.Clock("cpu"), lambda point: 1.0, lambda jobs: {job: [] for job in jobs}, {"device": "interpreter"}, quick=True, say=said.append
    )
    sweep.tune_op("lora_up", "interpreter", calls, setting, folder)
    rows, said = json.loads(path.read_text()), "\n".join(said)
    assert rows[1]["tile"] is None and "-> unfused" in said  # the library's product is faster than any interpreted kernel
    assert len(rows[1]["us"]) == 2 and all(0 < us < math.inf for us in rows[1]["us"]) and rows[1]["device"] == "interpreter"
    assert path.read_text().splitlines()[:2] == before[:2]
    assert "32x64 w4 s2 refused at M17 C96 R8 fp32 A,B: wrong: its error is " in said
    assert "128x64 w4 s2 refused at M17 C96 R8 fp32 A,B: RuntimeError: out of resources" in said


def test_a_case_that_asks_for_another_shape_is_no_case(monkeypatch):
    declared = space.low_rank_point("lora_up", torch.float16, torch.float32, False, 8, 17, C=96)
    other = space.Point(declared.case, {**declared.shape, "M": 18}, declared.variant)
    with pytest.raises(sweep.Unprepared, match=r"it asks for \[.*'M': 17.*the case is declared as .*'M': 18"):
        sweep.Clock(DEVICE)("lora_up", other, None)


FP16, FP32 = torch.float16, torch.float32
TEXT = {"hq": 4, "hkv": 2, "d": 32, "tile": 61, "shown": (3,)}


def tiny_points():
    """A call of every kind, small."""
    arch, image, text = tune.arch_of(torch.device(DEVICE)), space.Images(1, 4, 24, 8, 64), space.Text(1, **TEXT)
    yield "nf4_linear", space.linear_point(arch, [(64, 128), (64, 128)], 5, FP16)
    yield "nf4_linear_dx", space.dx_point(arch, (64, 128), 5, FP16)
    yield "lora_row_norms", space.norms_point(arch, (64, 128), FP16)
    yield "patch_embed", space.images_point(image, 1, FP16, FP32)
    yield "patch_embed", space.images_point(space.replace(image, norm=True), 1, FP16)
    yield "cross_attention", space.text_point(text, 8, FP16, DEVICE)
    yield "cross_attention", space.step_point(text, 3, FP16, DEVICE)
    yield "cross_attention_dq", space.gradient_point("cross_attention_dq", text, 8, FP16, aligned=False)
    yield "cross_attention_dkdv", space.gradient_point("cross_attention_dkdv", space.replace(text, hq=3, hkv=1), 4, FP16)
    for op in ("lora_down", "lora_up"):
        yield op, space.low_rank_point(op, FP16, FP16, True, 8, 17, C=96)
    yield "lora_grad", space.low_rank_point("lora_grad", FP16, FP32, False, 8, 2, 17, C=96)
    yield "lora_grad", space.low_rank_point("lora_grad", FP16, FP16, True, 8, 1, 17, C=96)


@pytest.mark.parametrize("op, point", [pytest.param(op, p, id=f"{op} {p.case.shape}".replace(" ", "-")) for op, p in tiny_points()])
def test_every_case_is_right_and_asks_for_what_it_declares(op, point):
    family = tune.covering_arch(op, tune.arch_of(torch.device(DEVICE)))
    assert sweep.Clock(DEVICE)(op, point, tune.match(tune.table(op), family, point.shape)["tile"]) > 0
    assert point.case.cost(point.case.make("meta", 0)).bytes > 0


def test_launches_are_compiled_before_they_are_timed(tmp_path):
    """Those of every tile that is left, for the GPU at hand: here one that is not."""
    code = """
import json
import triton
from triton.backends.compiler import GPUTarget
from bench import tune as sweep, tune_space as space
def tile(m, n):
    return {"constants": {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "TRANSPOSED": True}, "num_warps": 4, "num_stages": 2}
hits = []
triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: hits.append((src.name, cache_hit))
point, clock = space.linear_point("sm_90", [(64, 128)], 40), sweep.Clock("cpu")
for _ in range(2):
    clock.compile_launches("nf4_linear", point, [tile(64, 64), None, tile(64, 32)], (GPUTarget("cuda", 90, 32), "sm_90", 132), 2)
print(json.dumps(hits))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    hits = json.loads(done.stdout.splitlines()[-1])
    names = sorted(name for name, hit in hits if not hit)
    assert names.count("nf4_linear_fwd_kernel") == 2 and "nf4_dequantize_kernel" in names
    assert sorted(name for name, hit in hits if hit) == names  # the second time all of them are there


def test_real_kernels_are_pruned():
    """By the compiler, without a GPU: one that fits, one that spills, one with too many stages, one that is no kernel."""
    code = """
import json
from bench import tune as sweep, tune_space as space
row = {"arch": "sm_90", "when": {"K_multiple": 64}, "tile": None}
def tile(m, n, warps, stages):
    return {"constants": {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "TRANSPOSED": True}, "num_warps": warps, "num_stages": stages}
tiles = [None, tile(64, 64, 4, 3), tile(128, 256, 4, 2), tile(128, 128, 8, 12), tile(64, 64, 3, 3)]
points = [space.linear_point("sm_90", [(4096, 4096)], 64)]
if __name__ == "__main__":
    jobs = [job for t in tiles for job in sweep._jobs("sm_90", "nf4_linear", row, t, points)]
    reports = sweep._of_codes(jobs, lambda jobs: sweep.compile_all(jobs, 1))
    kept, pruned = sweep.prune("nf4_linear", "sm_90", row, points, tiles, reports)
    print(json.dumps([[sweep.name(c.tile) for c in kept], {why: [sweep.name(t) for t in ts] for why, ts in pruned.items()}, kept[1].bound, kept[1].resident]))
"""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # interpreted kernels cannot be compiled
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    kept, pruned, bound, resident = json.loads(done.stdout)
    assert kept == ["unfused", "64x64x64 TRANSPOSED w4 s3"] and 20 < bound <= 100 and resident >= 8
    assert pruned == {
        "spilled": ["128x256x64 TRANSPOSED w4 s2"],
        "shared memory": ["128x128x64 TRANSPOSED w8 s12"],
        "did not compile": ["64x64x64 TRANSPOSED w3 s3"],
    }


def main(monkeypatch, *args, interpret=False):
    monkeypatch.setattr(sweep.triton.knobs.runtime, "interpret", interpret)
    monkeypatch.setattr(sys, "argv", ["bench.tune", *args])
    sweep.main()


def test_a_dry_run_says_what_it_would_try_and_writes_nothing(monkeypatch, capsys):
    def compiled(jobs, workers):
        assert workers == 3
        return reported({"128x128 w4": "spill"}, {"64x64 w4 s2": 80.0})(jobs)

    before = {path: path.read_bytes() for path in ROOT.glob("fastfuse/tune/*.json")}
    monkeypatch.setattr(sweep, "compile_all", compiled)
    main(monkeypatch, "lora_up", "--arch", "sm_90", "--dry-run", "--workers", "3")
    plain, rest = capsys.readouterr().out.split("\nall else: ")
    assert plain.startswith("lora_up on sm_90: 2 rows of sm_90") and "kind=plain: unfused, 2 cases: M256 C4096 R16, M4096 C4096 R16" in plain
    assert rest.startswith("64x64 w4 s2, 7 cases: ")
    lines = rest.splitlines()
    assert lines[1:3] == ["  13 candidates: 1 spilled, 12 left", "    spilled: 128x128 w4 s2"]
    figures = "lora_up kernel: 64 registers, 1024 B, 16 warps, bound: loop 80% by issue"
    assert lines[3] == f"  * 64x64 w4 s2: {figures}; {figures}" and len(lines) == 3 + 12  # the best bound first, dropout and fp32 adapters
    assert lines[-1] == "    unfused: no code of ours"
    assert before == {path: path.read_bytes() for path in ROOT.glob("fastfuse/tune/*.json")}


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are interpreted only where there is no GPU")
def test_the_command_from_its_arguments_to_the_file(folder, monkeypatch, capsys):
    """All of it but the GPU: the clock, floors, log and marks are the true ones."""
    import triton.experimental.gluon.nvidia  # noqa: F401  the interpreter's first launch does, and Triton's switch must then be on, which main() finds off

    path, log, real = folder / "lora_up.json", folder / "log.jsonl", sweep.tune_op
    row = {"arch": "interpreter", "when": {}, "tile": {"constants": {"BLOCK_M": 64, "BLOCK_C": 64}, "num_warps": 4, "num_stages": 2}}
    path.write_text(f"[\n  {json.dumps(row)}\n]\n")
    calls = [space.Series(lambda M: space.low_rank_point("lora_up", torch.float16, torch.float16, True, 8, M, C=96), (17,))]
    where = {"device": "a CPU", "commit": "c0ffee", "dirty": True, "triton": "3"}
    for target, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (tune, "arch_of", lambda device: "interpreter"),
        (sweep.peaks, "measure", lambda device: sweep.peaks.DATA_SHEET["H200"]),
        (sweep.harness, "environment", lambda device, commit: where),
        (sweep, "_chip", lambda: None),
        (sweep.Clock, "compile_launches", lambda self, op, point, tiles, chip, workers: None),  # there is nothing to compile for
        (sweep, "Clock", lambda device, clock=sweep.Clock: clock("cpu")),
        (sweep, "series", lambda op, arch: calls),
        (sweep, "compile_all", lambda jobs, workers: {job: [] for job in jobs}),
        (sweep, "tune_op", lambda *args: real(*args, folder=folder)),
    ):
        monkeypatch.setattr(target, name, value)
    main(monkeypatch, "lora_up", "--quick", "--minutes", "5", "--out", str(log))
    out = capsys.readouterr().out
    assert "H200 SXM (data sheet)" in out and "written: fastfuse/tune/lora_up.json; in the same commit: python -m bench.codegen --store" in out
    (made,) = json.loads(path.read_text())
    assert made["shape"] == ["M17 C96 R8 dropout 0.05 float16"] and made["us"][0] > 0 < made["floor_us"][0]
    assert (made["device"], made["commit"], made["triton"]) == ("a CPU", "c0ffee with changes", "3") and made["date"].startswith("20")
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert {e["for"] for e in entries} >= {"sweep"} and len([e for e in entries if e["for"] == "sweep"]) == 6 and all(e["us"] > 0 for e in entries)
    main(monkeypatch, "lora_up", "--minutes", "0")
    assert "lora_up: no time is left for it" in capsys.readouterr().out


NO_KERNEL = "bench.tune: lora_up: no kernel covers sm_75, only gfx942, interpreter, sm_100, sm_120, sm_80, sm_90"


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "bench.tune: no GPU found, nothing can be timed: --arch sm_90 --dry-run shows what would be"),
        (["--dry-run"], "bench.tune: no GPU found, nothing can be timed: --arch sm_90 --dry-run shows what would be"),
        (["--arch", "sm_90"], "bench.tune: --arch sm_90 without --dry-run: rows are measured for the GPU at hand alone"),
        (["--arch", "sm_75", "--dry-run"], NO_KERNEL),
        (["--arch", "interpreter", "--dry-run"], "bench.tune: lora_up: the compiler has no target interpreter, only sm_80, sm_90, sm_100, sm_120, gfx942"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(args, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "lora_up", *args)
    assert stopped.value.code == said  # to stderr, with exit status 1


def test_the_interpreter_is_no_compiler(monkeypatch):
    with pytest.raises(SystemExit, match=r"^bench\.tune: unset TRITON_INTERPRET: interpreted kernels cannot be compiled$"):
        main(monkeypatch, "lora_up", "--arch", "sm_90", "--dry-run", interpret=True)
