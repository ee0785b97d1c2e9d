"""What the compiler makes of every kernel, for every target, without a GPU."""

import json
from importlib.metadata import version

import pytest
from processes import ROOT, python

from bench import codegen_store as store
from bench import sass
from fastfuse import tune

PROMISED = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
MATRIX = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}  # the best that a chip has; HMMA for the rest and for few rows

pytest.importorskip("triton", reason="Triton ships for Linux alone")


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "reports.json"
    done = python("-m", "bench.codegen", "--json", path, fails=True)
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text())


def of(reports, *ops, arch="", words="", without="-"):
    found = [r for r in reports if r["op"] in ops and arch in r["arch"] and store.holds(r["name"], words) and without not in r["name"]]
    assert found
    return found


def told(r):
    return f"{r['arch']} {r['op']} {r['name']}: {r['counts']}"


def counts(r, start):
    return sum(n for name, n in r["counts"].items() if name.startswith(start))


def test_every_kernel_and_row_compiles_without_spills_within_shared_memory(reports):
    from bench.work import TUNED

    assert {f"{r['arch']} {r['op']} {r['name']}": r["found"] for r in reports if r["found"]} == {}
    kernels = {line.split("(")[0].removeprefix("def ") for f in ROOT.glob("kernels/*.py") for line in f.read_text().splitlines() if line.startswith("def ")}
    kernels = {k.removesuffix("_kernel") for k in kernels if k.endswith("_kernel")}
    assert {(r["arch"], r["op"]) for r in reports} == {(arch, kernel) for arch in PROMISED for kernel in kernels}
    assert len(of(reports, "nf4_dequantize")) >= 13 * len(PROMISED)
    for op in set(TUNED.values()):
        for row in (row for row in tune.table(op) if row["arch"] in PROMISED and row["tile"]):
            tile = row["tile"]
            size = "x".join(str(v) for k, v in tile["constants"].items() if k.startswith("BLOCK_")) + f" w{tile['num_warps']} s{tile['num_stages']}"
            assert any(r["arch"] == row["arch"] and TUNED.get(r["op"]) == op and size in r["name"] for r in reports), (op, row["arch"], row["when"], size)


def test_sm_90_feeds_wgmma_from_registers(reports):
    """The decoded weight never goes through shared memory: a table or scale the compiler sees as a splat would undo it."""
    transposed = of(reports, "nf4_linear_fwd", arch="sm_90", words="transposed")
    assert len(transposed) >= 18
    for r in transposed:
        assert r["counts"].get("HGMMA from registers", 0) >= 4, r["name"]
        assert r["counts"].get("STS", 0) <= 24, told(r)
        # A wait for all after each would leave the matrix unit idle while the next weights are decoded.
        assert r["counts"].get("full waits in loop", 0) < r["counts"]["HGMMA in loop"] / 2, told(r)


def test_matrix_units_are_used(reports):
    """By every product, and by the best unit where there are rows for it."""
    products = ("nf4_linear_fwd", "nf4_skinny", "nf4_linear_dx", "lora_down", "lora_up", "lora_grad", "patch_embed_fwd")
    for r in of(reports, *products, "cross_attention_fwd", "cross_attention_dq", "cross_attention_dkdv"):
        assert counts(r, "v_mfma") if r["arch"] == "gfx942" else any("MMA" in name for name in r["counts"]), told(r)
    for arch, instruction in (("sm_80", "HMMA"), ("sm_90", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")):
        assert any(counts(r, instruction) for r in of(reports, "nf4_linear_fwd", "nf4_skinny", arch=arch)), (arch, instruction)
    for r in of(reports, "patch_embed_fwd"):
        assert counts(r, MATRIX.get(r["arch"], "HMMA")), told(r)


def test_patch_embedding_stores_16_bytes(reports):
    assert of(reports, "patch_embed_fwd", arch="sm_90", words="direct") and of(reports, "patch_embed_fwd", arch="sm_90", without="direct")
    for r in of(reports, "patch_embed_fwd", "patchify", "place", "norm_bwd", "place_bwd", arch="sm_", without="odd"):
        if r["op"] == "patch_embed_fwd":  # pixels too come straight to shared memory, or through the registers that convert them
            assert r["counts"].get("LDGSTS.128"), told(r)
        narrow = 3 if r["op"].endswith("bwd") or "kept" in r["name"] else 0  # a row's statistics, a program's sums
        assert r["counts"].get("STG.128", 0) >= 3 and r["counts"].get("STG", 0) <= narrow, told(r)


def test_cross_attention_keeps_the_tensor_cores_fed(reports):
    """On sm_90 wgmma, with the softmax's weights from registers, and K and V by TMA; 16-byte copies where there is none."""
    ops = ("cross_attention_fwd", "cross_attention_dq", "cross_attention_dkdv")
    for r in of(reports, *ops, without="odd"):
        few = " 16x" in r["name"] or " 32x" in r["name"]  # rows: too few for wgmma and tcgen05
        assert few or counts(r, MATRIX.get(r["arch"], "HMMA")) or counts(r, "HGMMA") or counts(r, "UTCHMMA"), told(r)
        if " tma" in r["name"]:
            assert r["counts"].get("UTMALDG"), told(r)
            assert r["arch"] != "sm_90" or r["counts"].get("HGMMA from registers"), r["name"]
        elif r["arch"].startswith("sm_") and "not aligned" not in r["name"]:
            assert r["counts"].get("LDGSTS.128") or r["counts"].get("LDG.128"), told(r)
    assert {r["op"] for r in of(reports, *ops, arch="sm_90", words=" tma d128 ")} == set(ops)


def test_wide_stores(reports):
    for r in of(reports, "nf4_dequantize", arch="sm_", without="odd"):
        assert r["counts"].get("STG.128", 0) >= 4 and "STG" not in r["counts"], told(r)


def test_no_kernel_is_worse_than_its_stored_figures(reports):
    said, worse = store.compare(reports, version("triton"))
    if not worse and said[0].startswith("nothing compared"):
        pytest.skip(said[0])
    assert worse == [], "\n".join(said + worse)


def test_every_nvidia_kernel_has_a_main_loop_and_a_bound_where_there_is_a_floor(reports):
    """Of sm_90 the bounds that were counted by hand: 2.9 .. 3.4 ALU instructions a weight, 55 .. 58% of what the memory allows."""
    for r in (r for r in reports if r["arch"].startswith("sm_")):
        assert r["blocks"] >= 1 and r["loops"] and all(0 < figures.get("bound", 100) <= 100 for figures in r["loops"].values()), r
        if r["op"] in ("cross_attention_dq", "cross_attention_dkdv", "nf4_linear_fwd", "nf4_linear_dx"):
            assert all(figures["bound"] and any("MMA" in k for k in figures) for figures in r["loops"].values()), r
            assert list(r["loops"]) == (["full", "masked"] if r["op"] == "cross_attention_dq" else ["loop"]), r
    skinny = [r["loops"]["loop"] for r in of(reports, "nf4_skinny", arch="sm_90", words="nested 16x64x128")]
    assert all(2.9 < f["alu"] < 3.4 and 54 < f["bound"] < 59 and f["by"] == "issue" for f in skinny), skinny


LISTING = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 BRA `(.L_x_2) ;
.L_x_0:
        /*0020*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0030*/                   PRMT R8, R4, 0x5410, R5 ;
        /*0040*/                   IMAD.MOV.U32 R9, RZ, RZ, R8 ;
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R10 ;
        /*0060*/              @!P1 BRA `(.L_x_1) ;
.L_x_3:
        /*0070*/                   HMMA.16816.F32.BF16 R12, R8, R16, R12 ;
        /*0080*/                   MUFU.EX2 R20, R12 ;
        /*0090*/                   UIADD3 UR5, UR5, 0x1, URZ ;
        /*00a0*/                   BRA.U !UP0, `(.L_x_0) ;
.L_x_2:
        /*00b0*/                   STG.E.128 desc[UR4][R2.64], R12 ;
        /*00c0*/                   EXIT ;
.L_x_1:
        /*00d0*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR9], R10 ;
        /*00e0*/              @!P1 BRA `(.L_x_1) ;
        /*00f0*/                   BRA `(.L_x_3) ;
.L_x_4:
        /*0100*/                   BRA `(.L_x_4);
        /*0110*/                   NOP;
"""


def test_loops_are_found_and_counted_by_pipe():
    """The wait behind the end jumps back into the loop, and is none itself."""
    code, labels = sass.parse(LISTING)
    assert sorted(len(loop) for loop in sass.loops(code, labels)) == [2, 10]
    work = sass.Work("weight", 64, products=16 * 8 * 16, bytes=64)
    (name, loop), *more = sass.main_loops(code, labels, work).items()
    assert name == "loop" and not more
    found = sass.figures(loop, work, "sm_90", warps=4)
    assert {k: found[k] for k in ("total", "alu", "imad", "mufu", "lsu", "other", "HMMA")} == {
        "total": 20.0, "alu": 2.0, "imad": 2.0, "mufu": 2.0, "lsu": 2.0, "other": 10.0, "HMMA": 2.0,
    }  # fmt: skip
    # 64 bytes at 18.4 a cycle, against 4 warps x 10 instructions at 4 a cycle
    assert found["by"] == "issue" and found["bound"] == pytest.approx(100 * 64 / (4.8e12 / 132 / 1.98e9) / 10)
    whole = sass.main_loops(code, labels, sass.Work("element", 64, loops=()))
    assert list(whole) == ["whole"] and sum(c.family == "NOP" for c in whole["whole"]) == 1


def test_occupancy():
    for arch, registers, shared, warps, blocks in (
        ("sm_90", 168, 229_432, 8, 1),  # shared memory: 227 KB and the 1 KB a block costs
        ("sm_90", 255, 1024, 4, 2),  # registers
        ("sm_90", 32, 0, 4, 16),  # warps: 64
        ("sm_120", 32, 0, 4, 12),  # 48
        ("sm_90", 16, 0, 1, 32),  # blocks
        ("sm_80", 97, 0, 4, 4),  # registers go by eights: 104
    ):
        assert sass.blocks(arch, registers, shared, warps) == blocks, (arch, registers)
    assert sass.blocks("sm_100", 64, 1024, 4, tmem=256) == 2


FIGURES = {"total": 14.56, "alu": 6.828, "fma": 4.094, "mufu": 1.031, "lsu": 0.4375, "HGMMA": 0.25, "bound": 95.0, "by": "issue"}
REPORT = {"op": "cross_attention", "name": "bits", "arch": "sm_90", "key": "0a1b", "unit": "score", "counts": {"STG.128": 2, "HGMMA from registers": 4}}
REPORT |= {"registers": 168, "stack": 0, "shared": 98_304, "warps": 8, "blocks": 2, "code": 1000}


def a_report(**other):
    """What is no field of a report is a figure of its loop."""
    loop = FIGURES | {k: v for k, v in other.items() if k not in REPORT}
    return REPORT | {k: v for k, v in other.items() if k in REPORT} | {"loops": {"masked": {k: v for k, v in loop.items() if v}}}


@pytest.mark.parametrize(
    "changed, found",
    [
        ({}, []),
        ({"stack": 8}, ["stack 0 -> 8"]),
        ({"lsu": 0.875}, ["masked lsu 0.4375 -> 0.875"]),  # a mask read per head
        ({"HGMMA": 0}, ["masked HGMMA 0.25 -> 0"]),
        ({"HGMMA": 0.125}, ["masked HGMMA 0.25 -> 0.125"]),
        ({"HGMMA": 0, "HMMA": 4.0}, ["masked HGMMA 0.25 -> 0", "masked HMMA 0 -> 4"]),
        ({"bound": 80.0}, ["masked bound 95 -> 80"]),
        ({"blocks": 1, "registers": 176}, ["blocks 2 -> 1 (registers 168 -> 176)"]),
        ({"registers": 176, "shared": 110_000}, []),  # as many blocks fit
        ({"total": 15.2, "bound": 91.0}, []),  # within 5%
        ({"total": 10.0, "alu": 3.0, "bound": 100.0}, []),
        ({"code": 1100}, ["code 1000 -> 1100"]),
        ({"name": "other"}, ["not stored", "stored, but not compiled"]),
    ],
    ids=str,
)
def test_the_diff_names_what_got_worse(tmp_path, changed, found):
    store.save([a_report(), a_report(arch="sm_80")], "3.7.1", tmp_path)
    said, worse = store.compare([a_report(**changed), a_report(arch="sm_80")], "3.7.1", folder=tmp_path)
    assert [w.split(": ", 1)[1] for w in worse] == found and all(w.startswith("sm_90 cross_attention ") for w in worse)
    assert ("--store" in said[-1]) == bool(found)
    said, worse = store.compare([a_report(**changed)], "3.8.0", folder=tmp_path)
    assert worse == [] and said == ["nothing compared: this is Triton 3.8.0, the stored figures are of 3.7.1"]


def test_what_is_stored_comes_back_with_its_key(tmp_path):
    store.save([a_report()], "3.7.1", tmp_path)
    assert store.load(tmp_path) == ({"3.7.1"}, [a_report()])
    said, worse = store.compare([a_report(key="9")], "3.7.1", folder=tmp_path)
    assert worse == [] and said[1] == "1 kernels have changed: until python -m bench.codegen --store they are compiled each time"


def test_the_table_of_other_tritons_names_spills_and_longer_loops(tmp_path):
    store.save([a_report(), a_report(name="lengths"), a_report(arch="gfx942")], "3.7.1", tmp_path)
    path = tmp_path / "codegen_versions.md"
    other = [a_report(total=29.12, stack=64), a_report(name="lengths", total=10.0), a_report(arch="gfx942")]
    for triton, reports in (("3.10.0", other), ("3.9.0", [a_report()]), ("3.9.0", other[:1])):
        store.save_section(store.section(reports, triton, tmp_path), path)
    nine, ten = path.read_text().split("## Triton ")[1:]
    assert nine.startswith("3.9.0\n") and "| sm_90 | 1 | 1 | 1 | 0 |" in nine  # its newest, before 3.10
    assert "| sm_90 | 2 | 1 | 1 | 1 |" in ten and "| gfx942 | 1 | 0 | 0 | 0 |" in ten
    assert "| sm_90 | cross_attention bits | 64 |" in ten and "| sm_90 | cross_attention bits: masked | 14.56 | 29.12 |" in ten
    assert "lengths" not in ten


def test_planted_regressions_turn_the_diff_red():
    """Real kernels with registers withheld, with a mask read for each head, with their products off the matrix unit, and with too many stages: each has a
    key of its own, or a stored figure would hide it."""
    made = json.loads(python("-m", "tests.planted").stdout)
    found = made["found"]
    assert found.pop("as it is") == []
    for case, figure in (("registers withheld", "stack 0 -> "), ("a mask read for each head", "masked lsu "), ("products off the matrix unit", "loop HGMMA ")):
        worse = found.pop(case)
        assert any(f": {figure}" in w for w in worse), (case, worse)
    assert not found and made["keys"] == 6
    assert "bytes of shared memory, sm_90 has 232448" in made["shared"][0]


def test_a_key_holds_of_the_code_what_the_compiler_sees():
    from bench.codegen import source_of

    one = 'def f(x):\n    """Doc."""\n    return x + 1  # a comment\n'
    assert source_of(one) == source_of("    # moved\n    def f(x):\n        return x + 1") != source_of(one.replace("1", "2"))


def test_every_launch_binds_and_compiles(tmp_path):
    """What a launch hands to Triton (nested tuples, None, a rank of 1, unaligned rows) must suit its binder, not the interpreter alone. A new number of tokens,
    or of images, must compile nothing.

    Every launch says whether products and sums become fmas: Triton 3.9 warns where one does not, and 3.10 turns them off. Off in nf4_dequantize: bitsandbytes
    rounds a nested scale's product, then its sum.
    """
    path = tmp_path / "reports.json"
    python("-m", "bench.codegen", "--only", "sm_90", "--json", path)
    found = json.loads(python("-m", "tests.launches").stdout)
    assert found["unnamed"] == [] and found["Triton warned"] == [] and found["compiled by others"] == []
    assert found["cases without a kernel"] == []
    assert found["fused"] == {op: [op != "nf4_dequantize"] for op in {r["op"] for r in json.loads(path.read_text())}}
