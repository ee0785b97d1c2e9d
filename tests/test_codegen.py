"""What the compiler makes of every kernel, for every target, without a GPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROMISED = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")

pytest.importorskip("triton", reason="Triton ships for Linux alone")


def compiled(*args: str) -> subprocess.CompletedProcess:
    """A process of its own: here kernels were loaded for the interpreter, which cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    path = tmp_path_factory.mktemp("codegen") / "reports.json"
    done = compiled("-m", "bench.codegen", "--json", str(path))
    assert path.exists(), done.stderr[-2000:]
    return json.loads(path.read_text())


@pytest.mark.parametrize("arch", PROMISED)
def test_every_kernel_and_row_compiles_without_spills_within_shared_memory(reports, arch):
    mine = [r for r in reports if r["arch"] == arch]
    assert sum(r["op"] == "nf4_dequantize" for r in mine) == 13
    for op, kernels in (("nf4_linear", ("nf4_linear", "nf4_skinny")), ("nf4_linear_dx", ("nf4_linear_dx",)), ("lora_row_norms", ("lora_row_norms",))):
        tiles = [r["tile"] for r in json.loads((ROOT / f"fastfuse/tune/{op}.json").read_text()) if r["arch"] == arch and r["tile"]]
        assert tiles
        for tile in tiles:
            size = "x".join(str(tile["constants"][f"BLOCK_{d}"]) for d in "MNK" if f"BLOCK_{d}" in tile["constants"])
            size += f" w{tile['num_warps']} s{tile['num_stages']}"
            assert sum(r["op"] in kernels and size in r["name"] for r in mine) >= 3, (op, size)
    for op in ("nf4_skinny_reduce", "lora_down", "lora_up", "lora_grad", "swiglu"):
        assert sum(r["op"] == op for r in mine) >= 2, op
    assert {f"{r['op']} {r['name']}": r["found"] for r in mine if r["found"]} == {}


def test_sm_90_feeds_wgmma_from_registers(reports):
    """The decoded weight never goes through shared memory: a table or scale the compiler sees as a splat would undo it."""
    transposed = [r for r in reports if r["arch"] == "sm_90" and r["op"] == "nf4_linear" and " 16x" not in r["name"]]
    assert len(transposed) == 18
    for r in transposed:
        assert r["counts"].get("HGMMA from registers", 0) >= 4, r["name"]
        assert r["counts"].get("STS", 0) <= 24, f"{r['name']}: {r['counts']}"
        # A wait for all after each would leave the matrix unit idle while the next weights are decoded.
        assert r["counts"]["full waits in loop"] < r["counts"]["HGMMA in loop"] / 2, f"{r['name']}: {r['counts']}"


@pytest.mark.parametrize("arch, instruction", [("sm_80", "HMMA"), ("sm_90", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")])
def test_matrix_units_are_used(reports, arch, instruction):
    linear = [r for r in reports if r["arch"] == arch and r["op"] == "nf4_linear"]
    used = [r for r in linear if any(k.startswith(instruction) for k in r["counts"])]
    products = [
        r
        for r in reports
        if r["arch"] == arch
        and r["op"] not in ("nf4_dequantize", "swiglu", "patch_embed", "encoder_mask", "kv_cache_write", "cross_attention")
        and " lora - " not in r["name"]
    ]
    assert used and all(any("MMA" in k or "mfma" in k for k in r["counts"]) for r in products)


# op -> (what the name says, most instructions a weight on sm_90). The first that fits counts; behind it what was measured when written.
BOUNDS = {
    "nf4_linear": [(" 16x64x128", 6.5), (" 16x64x64", 7.7), ("", 10.0)],  # 6.25 .. 6.42; 7.38 .. 7.59; 8.47 .. 9.81
    "nf4_skinny": [("torchao", 8.5), (" 16x64x128", 6.5), ("", 7.7)],  # 7.58 .. 8.47 (a division a scale); 6.22 .. 6.50; 6.94 .. 7.69
    "nf4_linear_dx": [("factor", 13.0), ("", 8.6)],  # 12.72 .. 12.94 (dy goes through registers); 8.25 .. 8.59
    "nf4_dequantize": [("cut", 18.0), ("", 12.0)],  # 17.3 where n is no multiple of 8192; 11.4 .. 11.7 exact
}


@pytest.mark.parametrize("op", BOUNDS)
def test_decode_stays_cheap(reports, op):
    """Instructions a weight on sm_90, of the main loop; of the whole kernel where it has none. A select tree takes 22."""
    mine = [r for r in reports if r["arch"] == "sm_90" and r["op"] == op]
    assert mine
    for r in mine:
        bound = next(most for words, most in BOUNDS[op] if words in r["name"])
        assert r["per_weight"] is not None and 4 < r["per_weight"] <= bound, (r["name"], r["per_weight"], bound)


def test_patch_embedding_multiplies_on_the_matrix_units_and_stores_16_bytes(reports):
    mine = [r for r in reports if r["op"] == "patch_embed"]
    products = [r for r in mine if r["name"].startswith(("gemm", "gather"))]
    assert {r["name"].split()[0] for r in products if r["arch"] == "sm_90"} == {"gemm", "gather"}
    for r in products:
        unit = {"sm_90": "HGMMA", "sm_100": "UTCHMMA", "gfx942": "v_mfma"}.get(r["arch"], "HMMA")
        assert any(k.startswith(unit) for k in r["counts"]), (r["arch"], r["name"], r["counts"])
        if r["arch"].startswith("sm_"):  # pixels too come straight to shared memory, or through the registers that convert them
            assert r["counts"].get("LDGSTS.128"), (r["arch"], r["name"])
    for r in mine:
        if r["arch"].startswith("sm_") and not r["name"].startswith("tile rows"):
            narrow = 3 if "backward" in r["name"] or "kept" in r["name"] else 0  # a row's statistics, a program's sums
            assert r["counts"].get("STG.128", 0) >= 3 and r["counts"].get("STG", 0) <= narrow, (r["arch"], r["name"], r["counts"])


def test_cross_attention_keeps_the_tensor_cores_fed(reports):
    """On sm_90 wgmma, with the softmax's weights from registers, and K and V by TMA; 16-byte copies where there is none."""
    products = [r for r in reports if r["op"].startswith("cross_attention") and not r["name"].startswith(("merge", "delta"))]
    assert {r["op"] for r in products} == {"cross_attention", "cross_attention_dq", "cross_attention_dkdv"}
    for r in products:
        few = " 16x" in r["name"]  # rows: too few for wgmma and tcgen05
        unit = "v_mfma" if r["arch"] == "gfx942" else "HMMA" if few or " 32x" in r["name"] else {"sm_90": "HGMMA", "sm_100": "UTCHMMA"}.get(r["arch"], "HMMA")
        assert any(k.startswith(unit) or k.startswith("HGMMA") or k.startswith("UTCHMMA") for k in r["counts"]), (r["arch"], r["name"], r["counts"])
        if " tma" in r["name"]:
            assert r["counts"].get("UTMALDG"), (r["arch"], r["name"])
            assert r["arch"] != "sm_90" or r["counts"].get("HGMMA from registers"), r["name"]
        elif r["arch"].startswith("sm_"):
            assert r["counts"].get("LDGSTS.128") or r["counts"].get("LDG.128"), (r["arch"], r["name"])
    base = [r for r in products if r["arch"] == "sm_90" and " tma" in r["name"] and " d128 " in r["name"]]
    assert {r["op"] for r in base} == {r["op"] for r in products}


def test_wide_stores(reports):
    for r in reports:
        if r["op"] == "nf4_dequantize" and r["arch"].startswith("sm_"):
            assert r["counts"].get("STG.128", 0) >= 4 and "STG" not in r["counts"], (r["arch"], r["name"])


@pytest.mark.parametrize(
    "tile, found",
    [((256, 256, 64, 4, 3), "registers were spilled"), ((128, 256, 64, 8, 12), "bytes of shared memory, sm_90 has 232448")],
    ids=["spill", "oversize"],
)
def test_the_gate_catches(tile, found):
    code = f"""
from bench.codegen import linear_specimens, report
m, n, k, warps, stages = {tile}
tile = {{"constants": {{"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TRANSPOSED": True}}, "num_warps": warps, "num_stages": stages}}
print([report(s).problems() for s in linear_specimens("sm_90", tile, "nested", "bf16", "bf16")])
"""
    done = compiled("-c", code)
    assert found in done.stdout, done.stdout + done.stderr[-2000:]


def test_every_launch_binds_and_compiles():
    """What a launch hands to Triton (nested tuples, None, a rank of 1, unaligned rows) must suit its binder, not the interpreter alone.

    A new number of tokens, or of images, must compile nothing.
    """
    done = compiled("-m", "tests.launches")
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    kernels = {line.split("(")[0].removeprefix("def ") for f in ROOT.glob("kernels/*.py") for line in f.read_text().splitlines() if line.startswith("def ")}
    assert {k for k in kernels if k.endswith("_kernel")} == set(found["launched"])
    assert found["compiled by other token counts"] == 0
    assert found["compiled by other image counts"] == 0
    assert found["compiled by other texts and encoder tokens"] == 0
