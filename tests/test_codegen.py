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
    rows = [r for r in json.loads((ROOT / "fastfuse/tune/nf4_linear.json").read_text()) if r["arch"] == arch and r["tile"]]
    assert sum(r["op"] == "nf4_dequantize" for r in mine) == 12
    assert sum(r["op"] == "nf4_linear" for r in mine) == 7 * len(rows) > 0
    assert {r["name"]: r["found"] for r in mine if r["found"]} == {}


def test_sm_90_feeds_wgmma_from_registers(reports):
    """The decoded weight never goes through shared memory: a table or scale the compiler sees as a splat would undo it."""
    transposed = [r for r in reports if r["arch"] == "sm_90" and r["op"] == "nf4_linear" and " 16x" not in r["name"]]
    assert len(transposed) == 14
    for r in transposed:
        assert r["counts"].get("HGMMA from registers", 0) >= 4, r["name"]
        assert r["counts"].get("STS", 0) <= 24, f"{r['name']}: {r['counts']}"


@pytest.mark.parametrize("arch, instruction", [("sm_80", "HMMA"), ("sm_90", "HMMA"), ("sm_90", "HGMMA"), ("sm_100", "UTCHMMA"), ("gfx942", "v_mfma")])
def test_matrix_units_are_used(reports, arch, instruction):
    linear = [r for r in reports if r["arch"] == arch and r["op"] == "nf4_linear"]
    used = [r for r in linear if any(k.startswith(instruction) for k in r["counts"])]
    assert used and all(any("MMA" in k or "mfma" in k for k in r["counts"]) for r in linear)


def test_decode_stays_cheap(reports):
    """At most 10.5 instructions a weight in the main loop on sm_90 (6.3 to 10.1 when written): a select tree takes 22.

    One more where the scales' groups are no power of two (7.9 to 11.0): a division by 200 for every 64 weights.
    """
    per = {r["name"]: r["per_weight"] for r in reports if r["arch"] == "sm_90" and r["op"] == "nf4_linear"}
    assert all(p is not None and 5 < p < 10.5 + ("torchao/200" in name) for name, p in per.items()), per


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
from bench.codegen import linear_specimen, report
m, n, k, warps, stages = {tile}
tile = {{"constants": {{"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": k, "TRANSPOSED": True}}, "num_warps": warps, "num_stages": stages}}
print(report(linear_specimen("sm_90", tile, "nested", "bf16", "bf16")).problems())
"""
    done = compiled("-c", code)
    assert found in done.stdout, done.stdout + done.stderr[-2000:]
