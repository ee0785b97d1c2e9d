"""The harness itself: what it must refuse, and what it must keep."""

import argparse
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

import bench.all
from bench import harness
from bench.bench_nf4_lora import LINEAR, layers_case
from bench.peaks import Peaks
from fastfuse.ops._op import Cost

PEAKS = Peaks("chip", "measured", 1e12, {"bfloat16": 1e14, "float32": 1e13}, 2.0)
ENVIRONMENT = {"device": "a chip, 2 threads", "device_type": "cpu", "commit": "0" * 40}


def case_with(**providers):
    case = layers_case(LINEAR, 2, [(128, 128)])
    return replace(case, providers={name: case.providers[name] for name in (harness.OURS, harness.EAGER)} | providers)


def rows_of(case):
    return {row["provider"]: row for row in harness.measure(case, "cpu", PEAKS, ENVIRONMENT)}


@pytest.mark.parametrize(
    ("cost", "floor"),
    [(Cost(10**8, 1), 100.0), (Cost(1, 10**10), 100.0), (Cost(1, 1), 2.0)],  # of memory, of the matrix unit, of a launch
)
def test_floor_is_the_largest_of_three(cost, floor):
    assert harness.floor_us(cost, PEAKS, torch.bfloat16) == pytest.approx(floor)


@pytest.mark.parametrize("wrong", [lambda y: y + y.abs().max() / 16, lambda y: y * torch.nan, lambda y: y[:1], lambda y: y.float()])
def test_a_wrong_peer_gets_no_speed_up(wrong):
    eager = case_with().providers[harness.EAGER]
    rows = rows_of(case_with(peer=lambda i: (wrong(eager(i)[0]),)))
    assert rows["peer"]["parity"] is False and rows[harness.OURS]["parity"] is True
    lines = {line.split()[7]: line for line in harness.table(rows.values()).splitlines()[1:]}
    assert "WRONG" in lines["peer"] and "as fast" not in lines["peer"] and "as fast" in lines["eager"]


def test_no_speed_up_at_all_where_fastfuse_is_wrong():
    eager = case_with().providers[harness.EAGER]
    rows = rows_of(replace(case_with(), providers={harness.OURS: lambda i: (2 * eager(i)[0],), harness.EAGER: eager}))
    assert rows[harness.OURS]["parity"] is False
    assert "as fast" not in harness.table(rows.values())


def test_what_raises_or_is_absent_is_a_row():
    def broken(_inputs):
        raise RuntimeError("no such kernel")

    rows = rows_of(case_with(broken=broken, absent=None))
    assert "no such kernel" in rows["broken"]["error"] and rows["broken"]["us"] is None
    assert rows["absent"]["note"] == "not installed"
    assert rows[harness.OURS]["us"] > 0


def test_results_are_only_ever_added_to(tmp_path):
    for n in range(2):
        harness.append([ENVIRONMENT | {"n": n}], tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name == "a_chip_2_threads.jsonl"
    with open(file, "a") as f:
        f.write('{"n": 2, "cut sho')
    assert [row["n"] for row in harness.read(file)] == [0, 1]


def test_host_libraries_are_imported_only_when_timed():
    check = "import sys, bench.harness as h; h.all_cases('cuda'); print([m for m in ('bitsandbytes', 'peft', 'torchao') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], cwd=harness.ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_an_interrupted_run_keeps_its_rows_and_resumes(tmp_path):
    command = [sys.executable, "-m", "bench.all", "--out", str(tmp_path), "--device", "cpu", "--quick", "--minutes", "3"]
    run = subprocess.Popen(command, cwd=harness.ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    results = tmp_path / "results.jsonl"
    deadline = time.monotonic() + 120
    while run.poll() is None and time.monotonic() < deadline and not (results.exists() and results.read_text().count("\n") >= 2):
        time.sleep(0.05)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 130
    kept = harness.read(results)
    assert kept and "stopped by SIGTERM" in (tmp_path / "summary.txt").read_text()
    assert json.loads((tmp_path / "environment.json").read_text())["stopped"] == "SIGTERM"

    assert subprocess.run(command, cwd=harness.ROOT, capture_output=True).returncode == 2  # would mix two runs
    assert subprocess.run([*command, "--resume"], cwd=harness.ROOT, capture_output=True).returncode == 0
    rows = harness.read(results)
    assert rows[: len(kept)] == kept
    assert {(r["op"], r["shape"], r["dtype"]) for r in rows} == {case.key for case in harness.all_cases("cpu", quick=True)}
    assert "left out" not in (tmp_path / "summary.txt").read_text()
    assert len(list(tmp_path.iterdir())) <= 8


def test_of_a_whole_model_patched_is_ours():
    base = {"op": "decode", "shape": "tiny", "dtype": "bfloat16", "device": "chip", "date": "", "floor_us": 100.0, "parity": True, "tokens": 8}
    rows = [base | {"provider": "unpatched", "us": 600.0, "peak_bytes": 2**31}, base | {"provider": "patched", "us": 200.0, "peak_bytes": None}]
    unpatched, patched = harness.table(rows).splitlines()[1:]
    assert "3.00x as fast  1.333e+04 tokens/s, 2.00 GiB" in unpatched and "as fast" not in patched and "4e+04 tokens/s" in patched
    rows[1] |= {"parity": False, "error_over_limit": 1.5}
    assert "as fast" not in harness.table(rows)


def test_a_long_case_that_no_longer_fits_costs_no_other(tmp_path):
    short = case_with()
    run = argparse.Namespace(deadline=time.monotonic() + 50)
    bench.all._measure_all(run, "cpu", [replace(short, op="long", seconds=100), short], set(), PEAKS, ENVIRONMENT, tmp_path / "results.jsonl")
    assert {row["op"] for row in harness.read(tmp_path / "results.jsonl")} == {short.op}


def test_a_case_may_bring_its_own_inputs_and_clock():
    seen = []

    def timer(fn, sets):
        seen.append(sets)
        return 5.0, "own clock", {"peak_bytes": 3}

    rows = rows_of(replace(case_with(), timed_on=lambda device: [{"device": device}], timer=timer, tokens=7))
    assert seen == [[{"device": "cpu"}]] * 2
    assert {(r["us"], r["timing"], r["peak_bytes"], r["tokens"], r["parity"]) for r in rows.values()} == {(5.0, "own clock", 3, 7, True)}
    assert "peak_bytes" not in rows_of(case_with())[harness.OURS]
