"""Bugs planted one at a time, to see that the tests notice: python -m tests.mutate [--only NAME] [--json FILE].

tests/mutations.json has a row for each bug: `old`, which stands once in `file`, becomes `new` in a copy of the repository, where pytest then runs
`tests`, its arguments. A bug is caught where they fail. Without a bug they have to pass: that is asked once for every row of arguments.
Not part of the suite: it takes half an hour.
"""

import argparse
import fnmatch
import importlib
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
SKIPPED = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", "build", "site", "*.egg-info")
HEAVY = ("triton.language", "torchao", "transformers", "peft", "bitsandbytes", "accelerate")  # imported once, not in every run
TIMEOUT = 600  # seconds


def pytest_in(copy: Path, arguments: str) -> tuple[int, float, str]:
    """(exit status, seconds, the last words) of pytest in a process of its own, which imports fastfuse and the tests from the copy."""
    start, log = time.monotonic(), copy.parent / "log"
    if (child := os.fork()) == 0:
        os.chdir(copy)
        os.setpgid(0, 0)  # with what the tests start, so that all of it can be ended
        os.environ["PYTHONPATH"] = str(copy)
        sys.path[:] = [str(copy), *(path for path in sys.path if Path(path or ".").resolve() != ROOT)]
        for name in [n for n in sys.modules if n.split(".")[0] in ("tests", "fastfuse")]:
            del sys.modules[name]
        for stream in (1, 2):
            os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND), stream)
        signal.alarm(TIMEOUT)
        status = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *shlex.split(arguments)])
        sys.stdout.flush()
        os._exit(int(status))
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    lines = log.read_text(errors="replace").splitlines() or [""]
    return status, time.monotonic() - start, ([line for line in lines if line.startswith(("FAILED", "ERROR"))] or lines)[-1][:200]


def planted(copy: Path, bug: dict) -> tuple[Path, str]:
    """Plants it; (the file, what it was)."""
    file = copy / bug["file"]
    before = file.read_text()
    if (count := before.count(bug["old"])) != 1:
        raise SystemExit(f"{bug['name']}: {bug['old']!r} stands {count} times in {bug['file']}")
    file.write_text(before.replace(bug["old"], bug["new"]))
    return file, before


def tried(copy: Path, bug: dict, passes: dict[str, tuple]) -> dict:
    """What became of a bug. passes: of the runs without one, by their arguments."""
    if bug["tests"] not in passes:
        passes[bug["tests"]] = pytest_in(copy, bug["tests"])
    status, seconds, words = passes[bug["tests"]]
    if status:
        return {"name": bug["name"], "caught": False, "seconds": round(seconds, 1), "by": f"without the bug, status {status}: {words}"}
    file, before = planted(copy, bug)
    try:
        status, seconds, words = pytest_in(copy, bug["tests"])
    finally:
        file.write_text(before)
    # A failing test, a crash and an import that fails are catches; an empty selection and a wrong argument are not.
    caught = status not in (pytest.ExitCode.OK, pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
    return {"name": bug["name"], "caught": caught, "seconds": round(seconds, 1), "by": words}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="*", help="a glob over names")
    parser.add_argument("--json", type=Path, help="where the results go")
    options = parser.parse_args()
    rows, results, passes = json.loads((ROOT / "tests" / "mutations.json").read_text()), [], {}
    bugs = [bug for bug in rows if fnmatch.fnmatchcase(bug["name"], options.only)]
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"  # as conftest.py, which comes after the imports here
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    for name in HEAVY:
        importlib.import_module(name)
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(ROOT, copy, symlinks=True, ignore=SKIPPED)
        for bug in bugs:  # all of them before the first run: it is long
            file, before = planted(copy, bug)
            file.write_text(before)
        for bug in bugs:
            results.append(tried(copy, bug, passes) | {"tests": bug["tests"], "passes in": round(passes[bug["tests"]][1], 1)})
            print("{} {seconds:7.1f} s  {name}  ({by})".format("caught    " if results[-1]["caught"] else "NOT CAUGHT", **results[-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    missed = [result["name"] for result in results if not result["caught"]]
    print("\n  not caught: ".join([f"{len(results) - len(missed)} of {len(results)} caught", *missed]))
    raise SystemExit(bool(missed))


if __name__ == "__main__":
    main()
