"""bench.tune, which rewrites the rows of fastfuse/tune: with a clock that is told the times, and once with the real one in the interpreter."""

import json
import os
import sys
from types import SimpleNamespace

import pytest
import torch
from processes import ROOT, python

from fastfuse import info, tune

OPS = info.tuned_ops()
SHAPE = {"dtype": "16-bit", "decode": "prmt", "N": 4096, "K": 4096}


pytest.importorskip("triton", reason="Triton ships for Linux alone")

from bench import harness  # noqa: E402
from bench import tune as sweep  # noqa: E402
from bench import tune_space as space  # noqa: E402
from bench import tune_table as tables  # noqa: E402
from bench import tune_tiles as tiles  # noqa: E402
from bench.codegen import ARCHS  # noqa: E402
from bench.sass import Report  # noqa: E402
from bench.tune_clock import Clock, Refused, Unprepared  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def text_of(rows):
    return "[\n" + ",\n".join(f"  {json.dumps(row)}" for row in rows) + "\n]\n"


@pytest.mark.parametrize("op", OPS)
def test_every_table_is_one_that_a_sweep_could_write(op):
    """Each row has its own tile among legal candidates, and a case."""
    assert sorted(space.OPS) == OPS
    path = ROOT / f"fastfuse/tune/{op}.json"
    rows = tables.read(path)
    assert tables.problems(op, rows) == [] and text_of([dict(row) for row in rows]) == path.read_text()
    for arch in ARCHS:
        rows = [row for row in tune.table(op) if row["arch"] == arch]
        for row, cases in sweep._regimes(rows, arch, space.sweeps(op, arch)):
            assert cases, (arch, row["when"])
            every, quick = tiles.candidates(op, rows, row, False), tiles.candidates(op, rows, row, True)
            assert every[0] == quick[0] == row["tile"] and len(every) > len(quick) > 1
            assert len(every) == len({json.dumps(t, sort_keys=True) for t in every})
            assert all(tiles.illegal(op, row["when"], t) is None for t in every)
            assert (None in every) == (not op.startswith("cross_attention"))


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
    tile = next(row["tile"] for row in tune.table(op) if row["arch"] == "sm_90" and row["when"].get("M_max") == 16)
    constants = tile["constants"] | ({"BLOCK_K": 64} if op == "nf4_linear" else {}) | changed
    assert reason in tiles.illegal(op, when, tile | {"constants": constants})


def tile_of(block_m, splits=None, stages=3, block_n=64):
    own = {"SPLIT_K": splits} if splits else {"TRANSPOSED": False}
    return {"constants": {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": 64} | own, "num_warps": 4, "num_stages": stages}


FEW, MANY, OTHER, WIDE = tile_of(16, 8), tile_of(64), tile_of(16, 4, 4), tile_of(16, 8, 3, 128)
FEW_NAME, MANY_NAME, OTHER_NAME, WIDE_NAME = map(tables.name, (FEW, MANY, OTHER, WIDE))
TABLE = [
    {"arch": "sm_80", "when": {}, "tile": MANY},
    {"arch": "sm_90", "when": {"M_max": 16, "K_multiple": 64}, "tile": FEW},
    {"arch": "sm_90", "when": {"M_max": 64, "K_multiple": 64}, "tile": MANY},
    {"arch": "sm_90", "when": {}, "tile": None},
    {"arch": "sm_120", "when": {}, "tile": None},
]


def case_of(M):
    return space.TuneCase(SimpleNamespace(op="nf4_linear", shape=f"M{M}", dtype=torch.bfloat16), SHAPE | {"M": M, "R": 16}, "bf16")


CALLS = [space.Sweep(case_of, (1, 16, 64, 256), (8, 16, 24, 32, 48, 64, 96, 128))]


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "nf4_linear.json"
    path.write_text(text_of(TABLE))
    return path


def told(answers, others=10.0):
    """A clock: us, or what it raises, of a tile's name at a shape, of a name, or of a shape."""

    def clock(op, case, tile):
        name, shape = tables.name(tile), case.bench.shape
        answer = next((answers[key] for key in ((name, shape), name, shape) if key in answers), others)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    return clock


def reported(faults, bounds=None):
    """As the compiler: `faults` = {words of a tile's name: what is wrong with it}, of all variants alone where they start with "gate "."""

    def compiled(jobs):
        made = {}
        for job in jobs:
            name, gate = tables.name(json.loads(job[2])["tile"]), not job[3]
            fault = next((fault for words, fault in faults.items() if words in name and fault.startswith("gate ") <= gate), "")
            figures = {"loop": {"bound": (bounds or {}).get(name, 50.0), "by": "issue"}}
            stack, shared = 8 * fault.endswith("spill"), 1 << 20 if fault == "shared" else 1024
            report = Report(job[0], job[1], "kernel", "", shared, 4, "weight", 64, stack, 4, loops=figures)
            made[job] = "RuntimeError: no" if fault == "error" else [report]
        return made

    return compiled


def tuned(path, clock, arch="sm_90", compiled=None, **config):
    """(rows of the table afterwards, what was said)."""
    said = []
    made = sweep.TuneConfig(clock, lambda case: 1.0, compiled or reported({}), {"device": "a GPU", "commit": "c0ffee"}, say=said.append, **config)
    sweep.tune_op("nf4_linear", arch, CALLS, made, path.parent)
    assert [p.name for p in path.parent.iterdir()] == ["nf4_linear.json"]  # nothing left lying about
    return json.loads(path.read_text()), "\n".join(said)


def test_a_faster_tile_takes_its_rows_place_and_the_other_lines_stay(path):
    before = path.read_text().splitlines()
    rows, said = tuned(path, told({OTHER_NAME: 9.0}))
    assert rows[1]["tile"] == OTHER and rows[1]["when"] == TABLE[1]["when"]
    assert {k: v for k, v in rows[1].items() if k not in ("arch", "when", "tile")} == {
        "us": [9.0, 9.0], "floor_us": [1.0, 1.0], "shape": ["M1 bfloat16", "M16 bfloat16"], "device": "a GPU", "commit": "c0ffee",
    }  # fmt: skip
    assert [row["tile"] for row in rows[2:4]] == [MANY, None]  # they stay, and say what they took
    assert rows[2]["us"] == [10.0] and rows[3]["us"] == [10.0]
    after = path.read_text().splitlines()
    assert [after[i] for i in (0, 1, 5, 6)] == [before[i] for i in (0, 1, 5, 6)]
    assert f"{FEW_NAME} -> {OTHER_NAME}: 11.1% faster" in said
    assert sum("us" in row for row in rows) == 3  # what fastfuse.info counts as measured


WHICH = {
    "within the margin": ({OTHER_NAME: 9.9}, {}, FEW, "stays"),
    "of a smaller margin": ({OTHER_NAME: 9.9}, {"margin": 0.005}, OTHER, "faster"),
    "the mean over a row's cases decides": ({(OTHER_NAME, "M1"): 5.0, (OTHER_NAME, "M16"): 30.0}, {}, FEW, "stays"),
    "wrong at one case, however fast": (
        {OTHER_NAME: 1.0, (OTHER_NAME, "M16"): Refused("wrong: 3.2 times the limit"), WIDE_NAME: 9.0}, {}, WIDE, f"{OTHER_NAME} refused at M16: wrong",
    ),
    "the row's own is wrong": ({FEW_NAME: Refused("wrong"), WIDE_NAME: 9.0}, {}, WIDE, "the row's own tile is refused"),
    "stopped by the gate of all variants": (
        {OTHER_NAME: 8.0, WIDE_NAME: 9.0}, {"compiled": reported({"16x64x64 SPLIT_K=4": "gate spill"})}, WIDE,
        "refused: nf4_linear kernel: 8 bytes of stack",
    ),
    **{
        said: ({WIDE_NAME: 1.0}, {"compiled": reported({"16x128": fault})}, FEW, f" {said}, ")
        for fault, said in (("spill", "spilled"), ("shared", "shared memory"), ("error", "did not compile"))
    },
}  # fmt: skip


@pytest.mark.parametrize("what", WHICH)
def test_which_tile_a_row_gets(path, what):
    answers, config, tile, words = WHICH[what]
    rows, said = tuned(path, told(answers), **config)
    assert rows[1]["tile"] == tile and words in said
    assert "us" in rows[1] and (tile != FEW or rows[1]["us"] == [10.0, 10.0])


def test_a_lucky_time_is_found_out_in_turns(path):
    calls = []

    def clock(op, case, tile):
        calls.append((case.bench.shape, tables.name(tile)))
        return 5.0 if tables.name(tile) == OTHER_NAME and calls.count(calls[-1]) == 1 else 10.0

    rows, said = tuned(path, clock)
    assert rows[1]["tile"] == FEW and f"{OTHER_NAME} in turns with the row's own: +0.0%, not enough" in said
    assert [name for shape, name in calls if shape == "M16"][-6:] == [FEW_NAME, OTHER_NAME] * 3


def test_a_case_that_cannot_be_made_is_left_out(path):
    lost = Unprepared("out of memory")
    rows, said = tuned(path, told({"M1": lost, "M64": lost}))
    assert rows[1]["shape"] == ["M16 bfloat16"] and "us" not in rows[2] and "M1 left out: out of memory" in said


def test_what_the_compiler_rules_out_is_not_timed(path):
    """Low bounds too, but never the row's own tile, which must compile."""
    names = [tables.name(t) for t in tiles.candidates("nf4_linear", TABLE[1:4], TABLE[1], False)]
    low, timed = [name for name in names if name.startswith("16x64x64 ") and name.endswith("s4")], []

    def clock(op, case, tile):
        timed.append(tables.name(tile))
        return 10.0

    _, text = tuned(path, clock, compiled=reported({"16x128": "spill"}, dict.fromkeys(low, 29.0)))
    assert len(low) == 5 and not set(low) & set(timed) and "5 low bound, " in text and not any("16x128" in name for name in timed)
    timed.clear()
    tuned(path, clock, compiled=reported({}, {FEW_NAME: 10.0}))  # all that differ in SPLIT_K are its code
    assert FEW_NAME in timed and "16x64x64 SPLIT_K=4 w4 s3" not in timed
    with pytest.raises(ValueError, match="nf4_linear M_max=16 K_multiple=64: the row's own tile did not compile: RuntimeError: no"):
        tuned(path, clock, compiled=reported({FEW_NAME: "error"}))


def test_an_interrupted_run_writes_nothing(path, monkeypatch):
    before = path.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        tuned(path, told({OTHER_NAME: 9.0, "M256": KeyboardInterrupt()}))
    assert path.read_bytes() == before

    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tuned(path, told({}))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_when_the_time_is_up_finished_rows_are_written_and_the_others_stay(path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])

    def clock(op, case, tile):
        now[0] = {"M1": 1.0, "M16": 1.0, "M64": 3.0}[case.bench.shape]
        return 9.0 if tile == OTHER else 10.0

    rows, said = tuned(path, clock, deadline=2.0)
    assert rows[1]["tile"] == OTHER and rows[2:] == TABLE[2:] and "the time is up" in said
    before = path.read_bytes()
    assert "no time is left" in tuned(path, clock, deadline=2.0)[1]
    now[0] = 0.0
    tuned(path, lambda *_: now.__setitem__(0, 3.0) or 1.0, deadline=2.0)  # no row done: nothing written
    assert path.read_bytes() == before


def test_a_table_that_pick_cannot_serve_is_not_written(path):
    for text, reason in (
        (text_of(TABLE[:3]), "sm_90: the last row, and no other, must be unconditional"),
        (text_of([*TABLE[:2], TABLE[3], TABLE[2]]), "sm_90: the last row, and no other, must be unconditional"),
        (text_of([TABLE[0], TABLE[1] | {"since": {"99.0": {"tile": tile_of(16, 8) | {"num_warps": 3}}}}, *TABLE[2:]]), "3 warps"),
        (json.dumps(TABLE, indent=1), "not one row a line"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=reason):
            tuned(path, told({}))
        assert path.read_text() == text


def test_an_architecture_without_rows_gets_a_copy_of_its_familys(path):
    path.write_text(text_of([row | {"arch": "sm_100", "us": [1.0]} if row["arch"] == "sm_90" else row for row in TABLE]))
    before = path.read_text().splitlines()
    rows, _ = tuned(path, told({"M256": Unprepared("out of memory"), OTHER_NAME: 9.0}), arch="sm_103")
    after = path.read_text().splitlines()
    assert after[:5] == before[:5] and after[8:] == before[5:]
    mine = [row for row in rows if row["arch"] == "sm_103"]
    assert [(row["when"], row["tile"]) for row in mine] == [(TABLE[1]["when"], OTHER), (TABLE[2]["when"], MANY), ({}, None)]
    assert ["us" in row for row in mine] == [True, True, False]  # nothing of the family's figures: another chip's


def crossing_at(few, many):
    """FEW is faster up to `few` tokens, MANY up to `many`; in a sweep all are alike."""

    def clock(op, case, tile):
        M = case.shape["M"]
        return {FEW_NAME: 1 + (M > few), MANY_NAME: 1.5 + (M > many)}.get(tables.name(tile), 2.0) * 10

    return clock


@pytest.mark.parametrize("release, in_force", [("3.0", True), ("99.0", False)])
def test_what_another_triton_takes_of_a_row_is_kept(path, release, in_force):
    """Measured, the row's own tile or that of the installed Triton changes, and its boundary for both."""
    own, other = (tile_of(16, 2), FEW) if in_force else (FEW, tile_of(16, 2))
    path.write_text(text_of([TABLE[0], TABLE[1] | {"tile": own, "since": {release: {"tile": other}}}, *TABLE[2:]]))
    before = path.read_text().splitlines()
    rows, _ = tuned(path, crossing_at(8, 64), bounds=True, margin=10.0)
    assert rows[1]["when"] == {"M_max": 8, "K_multiple": 64}
    measured, kept = (rows[1]["since"][release], rows[1]) if in_force else (rows[1], rows[1]["since"][release])
    assert measured["tile"] == FEW and measured["us"] and kept["tile"] == tile_of(16, 2) and "us" not in kept
    assert path.read_text().splitlines()[:2] == before[:2]


@pytest.mark.parametrize(
    "few, many, now, want",
    [
        (16, 64, 64, (16, 64)),
        (20, 64, 64, (16, 64)),
        (8, 64, 64, (8, 64)),
        (16, 100, 64, (16, 96)),
        (16, 1000, 64, (16, 128)),  # as far as is tried
        (16, 24, 64, (16, 24)),
        (16, 17, 64, (16, 64)),  # slower at once: the row needs another tile, not another boundary
        (1000, 64, 64, (16, 64)),  # SPLIT_K computes BLOCK_M tokens at most, however fast it would be with more
        (16, 50, 50, (16, 50)),  # between two that are tried, where the crossing is too
        (16, 48, 50, (16, 50)),
        (16, 63, 50, (16, 50)),
        (16, 40, 50, (16, 32)),
        (16, 64, 50, (16, 64)),
    ],
)
def test_boundaries_move_to_the_crossing(path, few, many, now, want):
    path.write_text(path.read_text().replace('"M_max": 64', f'"M_max": {now}'))
    rows, said = tuned(path, crossing_at(few, many), bounds=True, margin=10.0)
    assert tuple(row["when"]["M_max"] for row in rows[1:3]) == want
    assert [list(row["when"]) for row in rows[1:3]] == [["M_max", "K_multiple"]] * 2 and rows[3]["when"] == {}
    assert (f"M_max {now} -> " in said) == (want[1] != now)


FP16, FP32 = torch.float16, torch.float32
TEXT = {"hq": 4, "hkv": 2, "d": 32, "tile": 61, "shown": (3,)}


def tiny_cases():
    """A call of every kind, small."""
    arch, image, text = tune.arch_of(torch.device(DEVICE)), space.Images(1, 4, 24, 8, 64), space.Text(1, **TEXT)
    yield "nf4_linear", space.linear_case(arch, [(64, 128), (64, 128)], 5, FP16)
    yield "nf4_linear_dx", space.dx_case(arch, (64, 128), 5, FP16)
    yield "lora_row_norms", space.norms_case(arch, (64, 128), FP16)
    yield "patch_embed", space.images_case(image, 1, FP16, FP32)
    yield "patch_embed", space.images_case(space.replace(image, norm=True), 1, FP16)
    yield "cross_attention", space.text_case(text, 8, FP16, DEVICE)
    yield "cross_attention", space.step_case(text, 3, FP16, DEVICE)
    yield "cross_attention_dq", space.gradient_case("cross_attention_dq", text, 8, FP16, aligned=False)
    yield "cross_attention_dkdv", space.gradient_case("cross_attention_dkdv", space.replace(text, hq=3, hkv=1), 4, FP16)
    for op in ("lora_down", "lora_up"):
        yield op, space.low_rank_case(op, FP16, FP16, True, 8, 17, C=96)
    yield "lora_grad", space.low_rank_case("lora_grad", FP16, FP32, False, 8, 2, 17, C=96)
    yield "lora_grad", space.low_rank_case("lora_grad", FP16, FP16, True, 8, 1, 17, C=96)


@pytest.mark.parametrize("op, case", [pytest.param(op, c, id=f"{op} {c.bench.shape}".replace(" ", "-")) for op, c in tiny_cases()])
def test_every_case_is_right_and_asks_for_what_it_declares(op, case, monkeypatch):
    monkeypatch.setattr(harness, "cpu_repeats", lambda *_: 1)
    family = tune.covering_arch(op, tune.arch_of(torch.device(DEVICE)))
    assert Clock(DEVICE)(op, case, tune.match(tune.table(op), family, case.shape)["tile"]) > 0
    assert case.bench.cost(case.bench.make("meta", 0)).bytes > 0


def test_a_case_that_asks_for_another_shape_is_no_case():
    case = space.low_rank_case("lora_up", FP16, FP32, False, 8, 17, C=96)
    with pytest.raises(Unprepared, match=r"it asks for \[.*'M': 17.*the case is declared as .*'M': 18"):
        Clock(DEVICE)("lora_up", space.replace(case, shape={**case.shape, "M": 18}), None)


def test_real_kernels_are_pruned_and_compiled_before_they_are_timed(tmp_path):
    """By the compiler, without a GPU: one that fits, one that spills, one with too many stages, one that is no kernel. Then the launches of what is left."""
    code = """
import json
import triton
from bench import tune_clock, tune_compile, tune_space as space
from bench.codegen import target
from bench.tune_table import name
row = {"arch": "sm_90", "when": {"K_multiple": 64}, "tile": None}
def tile(m, n, warps, stages):
    return {"constants": {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "TRANSPOSED": True}, "num_warps": warps, "num_stages": stages}
tiles = [None, tile(64, 64, 4, 3), tile(128, 256, 4, 2), tile(128, 128, 8, 12), tile(64, 64, 3, 3)]
case, hits = space.linear_case("sm_90", [(4096, 4096)], 64), []
if __name__ == "__main__":
    jobs = [job for t in tiles for job in tune_compile.jobs_of("sm_90", "nf4_linear", row, t, [case])]
    reports = tune_compile.compiled_by_code(jobs, lambda jobs: tune_compile.compile_all(jobs, 1))
    kept, pruned = tune_compile.prune("nf4_linear", "sm_90", row, [case], tiles, reports)
    names = [[name(c.tile) for c in kept], {why: [name(t) for t in ts] for why, ts in pruned.items()}]
    triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: hits.append((src.name, cache_hit))
    case, clock = space.linear_case("sm_90", [(64, 128)], 40), tune_clock.Clock("cpu")
    for _ in range(2):
        clock.compile_launches("nf4_linear", case, [tile(64, 64, 4, 2), None, tile(64, 32, 4, 2)], (target("sm_90"), "sm_90", 132), 2)
    print(json.dumps([*names, kept[1].bound, kept[1].resident, hits]))
"""
    done = python("-W", "ignore", "-c", code, TRITON_CACHE_DIR=str(tmp_path))
    kept, pruned, bound, resident, hits = json.loads(done.stdout.splitlines()[-1])
    assert kept == ["unfused", "64x64x64 TRANSPOSED w4 s3"] and 20 < bound <= 100 and resident >= 8
    assert pruned == {
        "spilled": ["128x256x64 TRANSPOSED w4 s2"],
        "shared memory": ["128x128x64 TRANSPOSED w8 s12"],
        "did not compile": ["64x64x64 TRANSPOSED w3 s3"],
    }
    names = sorted(name for name, hit in hits if not hit)
    assert names.count("nf4_linear_fwd_kernel") == 2 and "nf4_dequantize_kernel" in names
    assert sorted(name for name, hit in hits if hit) == names  # the second time all of them are there


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
    assert lines[3].startswith(f"  * 64x64 w4 s2: {figures}; {figures}") and len(lines) == 3 + 12  # the best bound first, dropout and fp32 adapters
    assert lines[-1] == "    unfused: no code of ours"
    assert before == {path: path.read_bytes() for path in ROOT.glob("fastfuse/tune/*.json")}


@pytest.mark.skipif(DEVICE == "cuda", reason="kernels are interpreted only where there is no GPU")
def test_the_command_from_its_arguments_to_the_file(tmp_path, monkeypatch, capsys):
    """All of it but the GPU: the op itself, pinned, judged and timed; floors, log and marks. Refused by name are a tile that is wrong and one that fails."""
    import triton.experimental.gluon.nvidia  # noqa: F401  the interpreter's first launch does, and Triton's switch must then be on, which main() finds off

    path, log, tune_op, lora_up = tmp_path / "lora_up.json", tmp_path / "log.jsonl", sweep.tune_op, space.lora_up
    tile = {"constants": {"BLOCK_M": 64, "BLOCK_C": 64}, "num_warps": 4, "num_stages": 2}
    path.write_text(text_of([{"arch": arch, "when": {}, "tile": tile} for arch in ("sm_90", "interpreter")]))
    before = path.read_text().splitlines()
    calls = [space.Sweep(lambda M: space.low_rank_case("lora_up", FP16, FP32, False, 8, M, C=96), (17,))]
    where = {"device": "a CPU", "commit": "c0ffee", "dirty": True, "triton": "3"}

    def spoilt(*args):
        pinned = tune._pinned["lora_up"]
        if pinned and pinned["BLOCK_M"] == 128:
            raise RuntimeError("out of resources")
        return lora_up(*args) * (1.01 if pinned and pinned["BLOCK_M"] == 32 else 1)

    for target, name, value in (
        (torch.cuda, "is_available", lambda: True),
        (tune, "arch_of", lambda device: "interpreter"),
        (sweep.peaks, "measure", lambda device: sweep.peaks.DATA_SHEET["H200"]),
        (harness, "environment", lambda device, commit: where),
        (sweep, "_chip", lambda: None),
        (sweep.Clock, "compile_launches", lambda self, op, case, tiles, chip, workers: None),  # there is nothing to compile for
        (sweep, "Clock", lambda device, clock=sweep.Clock: clock("cpu")),
        (sweep, "sweeps", lambda op, arch: calls),
        (sweep, "compile_all", lambda jobs, workers: {job: [] for job in jobs}),
        (sweep, "tune_op", lambda *args: tune_op(*args, folder=tmp_path)),
        (space, "lora_up", spoilt),
    ):
        monkeypatch.setattr(target, name, value)
    main(monkeypatch, "lora_up", "--quick", "--minutes", "5", "--out", str(log))
    out = capsys.readouterr().out
    assert "H200 SXM (data sheet)" in out and "written: fastfuse/tune/lora_up.json; in the same commit: python -m bench.codegen --store" in out
    assert "32x64 w4 s2 refused at M17 C96 R8 fp32 A,B: wrong: its error is " in out
    assert "128x64 w4 s2 refused at M17 C96 R8 fp32 A,B: RuntimeError: out of resources" in out
    made = json.loads(path.read_text())[1]
    assert made["tile"] is None and "-> unfused" in out  # the library's product is faster than any interpreted kernel
    assert made["shape"] == ["M17 C96 R8 fp32 A,B float16"] and made["us"][0] > 0 < made["floor_us"][0] and path.read_text().splitlines()[:2] == before[:2]
    assert (made["device"], made["commit"], made["triton"]) == ("a CPU", "c0ffee with changes", "3") and made["date"].startswith("20")
    swept = [entry for entry in map(json.loads, log.read_text().splitlines()) if entry["for"] == "sweep"]
    assert len(swept) == 6 and all("refused" in e or e["us"] > 0 for e in swept)
    main(monkeypatch, "lora_up", "--minutes", "0")
    assert "lora_up: no time is left for it" in capsys.readouterr().out


NO_GPU = "bench.tune: no GPU found, nothing can be timed: --arch sm_90 --dry-run shows what would be"


@pytest.mark.parametrize(
    "args, said",
    [
        ([], NO_GPU),
        (["--dry-run"], NO_GPU),
        (["--arch", "sm_90"], "bench.tune: --arch sm_90 without --dry-run: rows are measured for the GPU at hand alone"),
        (["--arch", "sm_75", "--dry-run"], "bench.tune: lora_up: no kernel covers sm_75, only gfx942, interpreter, sm_100, sm_120, sm_80, sm_90"),
        (["--arch", "interpreter", "--dry-run"], "bench.tune: lora_up: the compiler has no target interpreter, only sm_80, sm_90, sm_100, sm_120, gfx942"),
        (["--arch", "sm_90", "--dry-run", "interpret"], "bench.tune: unset TRITON_INTERPRET: interpreted kernels cannot be compiled"),
    ],
)
def test_what_cannot_be_run_is_said_in_a_line(args, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        main(monkeypatch, "lora_up", *(a for a in args if a != "interpret"), interpret="interpret" in args)
    assert stopped.value.code == said  # to stderr, with exit status 1
