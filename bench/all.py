"""Everything that needs a GPU, in one command: its tests, its peaks, and every case while the time lasts.

python -m bench.all --out DIR [--minutes 8.5] [--compile] [--resume]

Writes gpu_tests.log, results.jsonl (a row as soon as it is measured), summary.txt and environment.json.
An interrupted run leaves what it has; --resume goes on from there.
"""

import argparse
import contextlib
import gc
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch

from bench import arguments, harness, peaks

CASE_SECONDS, NEXT_PROVIDER_SECONDS = 60, 20  # a case is abandoned after that long: one slow compilation must not cost the rest
TEST_SHARE, TEST_SECONDS = 0.35, 180


class Stopped(BaseException):
    """SIGINT or SIGTERM."""


def main() -> int:
    p = arguments(__doc__, compile="time torch.compile at every shape, not at a few", quick="fewer shapes", resume="keep what DIR has: no tests, no case twice")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--minutes", type=float, default=8.5, help="time for everything")
    p.add_argument("--commit", help="recorded where the tree has no git folder")
    p.add_argument("--device", choices=("cuda", "cpu"), help=argparse.SUPPRESS)
    a = p.parse_args()
    a.out, a.alone = a.out.resolve(), False
    a.deadline = time.monotonic() + 60 * a.minutes
    a.out.mkdir(parents=True, exist_ok=True)
    if (a.out / "results.jsonl").exists() and not a.resume:
        p.error(f"{a.out} holds results: --resume goes on from them")
    device = a.device or ("cuda" if torch.cuda.is_available() else None)
    if device is None:
        line = "no GPU found: nothing was measured"
        _write_environment(a.out, harness.environment("cpu", a.commit) | {"gpu": False})
        (a.out / "summary.txt").write_text(line + "\n")
        print(line)
        return 0
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    return run(a, device, harness.all_cases(device, a.quick, a.compile))


def _stop(number: int, _frame) -> None:
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN)  # the files are being finished
    raise Stopped(signal.Signals(number).name)


def run(a: argparse.Namespace, device: str, cases: list[harness.Case]) -> int:
    """Measure the cases into the folder a.out; the exit status. a.alone: without tests, and without a new process where the device is lost."""
    results = a.out / "results.jsonl"
    before = harness.read(results) if results.exists() else []
    results.write_text("".join(json.dumps(row) + "\n" for row in before))  # without a last line cut short
    environment = harness.environment(device, a.commit)
    record = environment | {"gpu": device == "cuda", "python": platform.python_version(), "tests": None, "stopped": None}
    with contextlib.suppress(OSError, ValueError):
        if a.resume:
            record["tests"] = json.loads((a.out / "environment.json").read_text())["tests"]
    ceilings = None
    try:
        _write_environment(a.out, record)
        if not (a.resume or a.alone) and device == "cuda":
            record["tests"] = _gpu_tests(a.out / "gpu_tests.log", min(TEST_SECONDS, TEST_SHARE * 60 * a.minutes))
            print(f"GPU tests: {record['tests']}", flush=True)
        ceilings = peaks.measure(device)
        record["peaks"] = asdict(ceilings)
        _write_environment(a.out, record)
        print(peaks.describe(ceilings), flush=True)
        _measure_all(a, device, cases, {_key(row) for row in before}, ceilings, environment, results)
    except Stopped as signal_name:
        record["stopped"] = str(signal_name)
    finally:
        rows = harness.read(results)
        record["finished"] = harness.now()
        _write_environment(a.out, record)
        text = _summary(record, ceilings, rows, cases)
        (a.out / "summary.txt").write_text(text)
        print(text, end="", flush=True)
    wrong = any(harness.is_ours(row["provider"]) and not row["parity"] for row in rows)
    red = record["tests"] is not None and not record["tests"].startswith("passed")
    return 130 if record["stopped"] else int(wrong or red)


def _measure_all(a: argparse.Namespace, device: str, cases: list[harness.Case], done: set, ceilings: peaks.Peaks, environment: dict, results: Path) -> None:
    longest = 10.0
    with open(results, "a") as f:
        for case in cases:
            if case.key in done:
                continue
            start = time.monotonic()
            if case.seconds and a.deadline - start < case.seconds:
                continue
            if a.deadline - start < longest + 3:
                return
            failed = False
            try:
                with _time_limit(case.seconds or CASE_SECONDS):
                    for row in harness.measure(case, device, ceilings, environment):
                        print(json.dumps(row), file=f, flush=True)
                        failed |= "error" in row
                        print(harness.table([row]).splitlines()[-1], flush=True)
            except TimeoutError:
                failed = True
            if not case.seconds:
                # A slow case foretells slow ones, but a single first compilation should not end the run early.
                longest = max(time.monotonic() - start, 0.7 * longest)
            if device == "cuda":
                gc.collect()
                if failed and not (a.alone or _context_alive()):
                    _restart(a)
                torch.cuda.empty_cache()


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TimeoutError after that long, and again every NEXT_PROVIDER_SECONDS for later providers; harness.measure makes a row of it."""

    def late(_number, _frame):
        raise TimeoutError("took too long")

    signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds, NEXT_PROVIDER_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)


def _context_alive() -> bool:
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def _restart(a: argparse.Namespace) -> None:
    """An illegal access leaves every later CUDA call of the process failing: go on in a new one, after the case that did it."""
    print("the CUDA context is lost: going on in a new process", flush=True)
    left = max(0.0, a.deadline - time.monotonic()) / 60
    flags = [f"--{name}" for name in ("compile", "quick") if getattr(a, name)]
    commit = ["--commit", a.commit] if a.commit else []
    os.execv(sys.executable, [sys.executable, "-m", "bench.all", "--out", str(a.out), "--minutes", f"{left:.3f}", "--resume", *flags, *commit])


def _gpu_tests(log: Path, seconds: float) -> str:
    """Run the tests that need a GPU; in words, how they ended."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with open(log, "w") as f:
        command = [sys.executable, "-m", "pytest", "-o", "addopts=--strict-markers", "tests", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
        tests = subprocess.Popen(command, cwd=harness.ROOT, env=env, stdout=f, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = tests.wait(seconds)
        except BaseException as error:
            os.killpg(tests.pid, signal.SIGKILL)
            tests.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return f"stopped after {seconds:.0f} s, see {log.name}"
            raise
    last = (log.read_text().strip().splitlines() or [""])[-1]
    return f"{'passed' if code == 0 else f'exit status {code}'}: {last}"


def _key(row: dict) -> tuple[str, str, str]:
    return row["op"], row["shape"], row["dtype"]


def _write_environment(out: Path, record: dict) -> None:
    (out / "environment.json").write_text(json.dumps(record, indent=1) + "\n")


def _summary(record: dict, ceilings: peaks.Peaks | None, rows: list[dict], cases: list[harness.Case]) -> str:
    done = {_key(row) for row in rows}
    left_out = [" ".join(case.key) for case in cases if case.key not in done]
    parts = [
        f"{record['device']}, commit {record['commit']}{' with changes' if record['dirty'] else ''}, torch {record['torch']}, triton {record['triton']}",
        f"GPU tests: {record['tests'] or 'not run'}",
        peaks.describe(ceilings) if ceilings else "peaks: not measured",
        harness.table(rows),
    ]
    if record["stopped"]:
        parts.append(f"stopped by {record['stopped']}")
    if left_out:
        parts.append(f"left out, {len(left_out)} of {len(cases)} cases:\n  " + "\n  ".join(left_out))
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    sys.exit(main())
