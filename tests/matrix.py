"""Try fastfuse with other releases of what it stands on, one environment a row, and write docs/compatibility.md.

    python -m tests.matrix                    runs every row of this Python
    python -m tests.matrix --row triton-3.9   runs one row; what is known of the others is kept
    python -m tests.matrix --python 3.12      runs the rows of another Python, found as python3.12
    python -m tests.matrix --envs DIR         keeps the environments there, and uses those that are there already
    python -m tests.matrix --page             writes the page from docs/compatibility.json again, and runs nothing

An environment is two: a base with one torch and the tested set of constraints.txt, shared by all rows of that torch, and before it on
the path the row's own releases. What a row shows is read from inside it: versions as imported, counts as pytest reports them.
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "docs/compatibility.json", ROOT / "docs/compatibility.md"
SHOWN = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao")


class Row(NamedTuple):
    name: str
    about: str
    pins: dict[str, str]  # package -> version, where it differs from constraints.txt
    tiers: tuple[str, ...]
    python: str = "3.11"


class Tier(NamedTuple):
    about: str
    args: tuple[str, ...]  # of pytest, or of bench.codegen where kernels are compiled
    compiles: bool = False


TIERS = {
    "hosts": Tier(
        "tiny real models of transformers, PEFT, bitsandbytes and torchao, patched and unpatched, and their files",
        (
            "tests/test_patch.py", "tests/test_patch_hosts.py", "tests/test_patch_mllama.py", "tests/test_patch_smollm.py", "tests/test_patch_torchtune.py",
            "tests/test_patch_vision.py", "tests/test_patch_works_with.py", "tests/test_peft.py", "tests/test_dora.py", "tests/test_transformers_parity.py",
            "tests/test_checkpoints.py", "tests/test_load_model.py", "tests/test_nf4_view.py", "tests/test_nf4_dequantize.py",
        ),
    ),
    "reference": Tier(
        "modules and models against float64 and fixed expectations, without a host library",
        (
            "tests/test_attention.py", "tests/test_clip_builders.py", "tests/test_decoder.py", "tests/test_fusion.py", "tests/test_fusion_attention.py",
            "tests/test_fusion_graphs.py", "tests/test_kv_cache.py", "tests/test_loss.py", "tests/test_modules.py", "tests/test_op_results.py",
            "tests/test_rope.py", "tests/test_small_modules.py", "tests/test_vision_transformer.py",
        ),
    ),
    "kernels": Tier("the kernels themselves through Triton's interpreter", ("tests/test_ops.py", "tests/test_nf4_dequantize.py", "tests/test_low_rank.py")),
    "launches": Tier("every launch of every kernel bound and compiled as a GPU would be asked to", ("tests/test_codegen.py::test_every_launch_binds_and_compiles",)),
    "quick codegen": Tier("kernels of one layout and dtype compiled for sm_90: nothing spilled, shared memory within the chip's", ("--only", "sm_90 nested bf16"), True),
    "codegen": Tier("every kernel and launch row compiled for sm_90: nothing spilled, shared memory within the chip's", ("--only", "sm_90"), True),
}  # fmt: skip

_HOSTS, _TRITON = ("hosts", "quick codegen"), ("kernels", "launches", "codegen")
ROWS = (
    Row("tested", "the tested set, constraints.txt", {}, ("hosts", "launches", "quick codegen")),
    Row(
        "oldest",
        "the oldest that pyproject.toml allows, on torch 2.13, not 2.11",
        {"transformers": "5.18.0", "peft": "0.19.0", "bitsandbytes": "0.50.0", "torchao": "0.16.0", "accelerate": "1.3.0", "triton": "3.6.0", "numpy": "2.3.5"},
        _HOSTS,
    ),
    Row("transformers-5.18", "the oldest transformers alone", {"transformers": "5.18.0"}, _HOSTS),
    Row("transformers-5.23", "before past_key_values became cache", {"transformers": "5.23.0"}, _HOSTS),
    Row("triton-3.6", "what torch 2.11 asks for; its interpreter needs numpy before 2.4", {"triton": "3.6.0", "numpy": "2.3.5"}, _TRITON),
    Row("triton-3.7", "what torch 2.12 and 2.13 ask for", {"triton": "3.7.1"}, _TRITON),
    Row("triton-3.8", "what torch 2.14 asks for", {"triton": "3.8.0"}, _TRITON),
    Row("triton-3.9", "what torch 2.15 asks for", {"triton": "3.9.0"}, _TRITON),
    Row("torch-2.14", "a newer torch, with its own Triton", {"torch": "2.14.1", "triton": "3.8.0"}, ("reference", "launches")),
    Row("newest", "the newest of everything", {"torch": "2.15.0", "triton": "3.9.0"}, ("hosts", "reference", "launches", "quick codegen")),
    Row("python-3.10", "the tested set, with the last releases for this Python", {}, _HOSTS, "3.10"),
    Row("python-3.12", "the tested set", {}, _HOSTS, "3.12"),
    Row("python-3.13", "the tested set", {}, _HOSTS, "3.13"),
)

# The last releases of packages that have left a Python.
LAST = {
    "3.10": {
        "transformers": "5.20.2", "numpy": "2.2.6", "scipy": "1.15.3", "scikit-image": "0.25.2", "pillow": "12.3.0", "matplotlib": "3.10.9",
    },
}  # fmt: skip


class NotRun(Exception):
    """Why nothing of a row ran, in one line."""


def tested_set(python=""):
    """package -> version, as constraints.txt pins them; older where a package has left this Python."""
    lines = (re.match(r"([\w-]+)==([\w.]+)", line) for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {m[1]: m[2] for m in lines if m} | LAST.get(python, {})


# Environments


def base_requirements(row):
    """What the rows of one torch share. Another torch than the tested one brings its own Triton."""
    tested = tested_set(row.python)
    wanted = tested | {"torch": row.pins.get("torch", tested["torch"])}
    if wanted["torch"] != tested["torch"]:
        del wanted["triton"]
    return sorted(f"{package}=={version}" for package, version in wanted.items())


def environment(row, folder):
    """The row's Python, its environment made first where `folder` has none that fits."""
    torch = (tested_set() | row.pins)["torch"]
    base = _made(folder / f"base-torch-{torch}-py{row.python}", row.python, base_requirements(row))
    pins = {package: version for package, version in row.pins.items() if package != "torch"}
    layer = _made(folder / f"{row.name}-py{row.python}", row.python, sorted(f"{p}=={v}" for p, v in pins.items()), base)
    return layer / "bin/python"


def _made(folder, version, requirements, base=None):
    """A virtual environment with the requirements, and with those of `base` behind them."""
    stamp, wanted = folder / "requirements.json", {"asked": requirements, "base": json.loads((base / "requirements.json").read_text()) if base else {}}
    if stamp.exists() and json.loads(stamp.read_text()) == wanted:
        return folder
    python = sys.executable if version == f"{sys.version_info.major}.{sys.version_info.minor}" else shutil.which(f"python{version}")
    if not python:
        raise NotRun(f"there is no python{version} here")
    if base:  # cheap to make, and what an earlier row left would be imported
        shutil.rmtree(folder, ignore_errors=True)
    if not (folder / "bin/python").exists():
        _run([python, "-m", "venv", str(folder)])
    packages = f"lib/python{version}/site-packages"
    pip = [str(folder / "bin/python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    # torch pins one Triton, and the point of a row is another: it comes last and without a word about that
    triton = [r for r in requirements if base and r.startswith("triton==")]
    others = [r for r in requirements if r not in triton]
    if base:
        (folder / packages / "base.pth").write_text(f"{base / packages}\n")  # behind the row's own packages
    for asked in filter(None, (others, ["--no-deps", *triton] if triton else [])):
        _run([*pip, *asked])
    stamp.write_text(json.dumps(wanted))
    return folder


def _run(command):
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        print(done.stderr, file=sys.stderr, end="")  # not for the page: it may be about this machine alone
        raise NotRun("its environment could not be made")


_VERSIONS = f"""
import importlib, json, platform
found = {{name: importlib.import_module(name).__version__ for name in {SHOWN}}}
print(json.dumps({{"python": platform.python_version()}} | found))
"""


def imported_versions(python, row):
    """What the row's Python really imports; a row that imports something else than it names is no row."""
    done = subprocess.run([str(python), "-c", _VERSIONS], cwd=ROOT, env=_environ(), capture_output=True, text=True)
    if done.returncode:
        raise NotRun(f"its packages do not import: {done.stderr.strip().splitlines()[-1]}")
    found = json.loads(done.stdout.splitlines()[-1])
    wanted = tested_set(row.python) | row.pins
    for package in SHOWN:
        if found[package].split("+")[0] != wanted[package]:
            raise NotRun(f"it imports {package} {found[package]}, {wanted[package]} was asked for")
    return found


def _environ():
    """Nothing of the caller's own Python, and one thread each, as in CI."""
    left = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "PYTEST", "TRITON", "VIRTUAL_ENV"))}
    return left | {"PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


# Tiers


def run_tier(python, tier, workers):
    """{"passed", "failed": [names], "skipped", "seconds"}; also "broke", one line, where the run itself did not come to its end."""
    began = datetime.datetime.now()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / ("report.json" if tier.compiles else "report.xml")
        if tier.compiles:
            command = ["-m", "bench.codegen", "--all", *tier.args, "--workers", str(workers), "--json", str(report)]
        else:
            spread = ["-n", str(workers), "--dist", "loadfile"] if workers > 1 and len(tier.args) > 1 else []
            command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", *spread, f"--junitxml={report}", *tier.args]
        done = subprocess.run([str(python), *command], cwd=ROOT, env=_environ(), capture_output=True, text=True)
        counted = (read_codegen if tier.compiles else read_junit)(report.read_text()) if report.exists() else {"passed": 0, "failed": [], "skipped": 0}
    if done.returncode not in (0, 1) or not (counted["passed"] or counted["failed"]):
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        counted["broke"] = f"ended with {done.returncode}: {said}"[:300]
    elif done.returncode and not counted["failed"]:
        counted["broke"] = "ended with 1 and named no failure"
    return counted | {"seconds": round((datetime.datetime.now() - began).total_seconds())}


def read_junit(text):
    """pytest's own counts: a test that failed and whose teardown failed as well is one failure, an error while collecting is one too."""
    passed, failed, skipped = 0, [], 0
    for case in ET.fromstring(text).iter("testcase"):
        kinds = {child.tag for child in case}
        name = "::".join(filter(None, (case.get("classname", "").replace(".", "/") and f"{case.get('classname').replace('.', '/')}.py", case.get("name"))))
        if kinds & {"failure", "error"}:
            failed += [] if name in failed else [name]
        elif "skipped" in kinds:
            skipped += 1
        else:
            passed += 1
    return {"passed": passed, "failed": failed, "skipped": skipped}


def read_codegen(text):
    reports = json.loads(text)
    failed = [f"{r['arch']} {r['op']} {r['name']}: {'; '.join(r['found'])}" for r in reports if r["found"]]
    return {"passed": len(reports) - len(failed), "failed": failed, "skipped": 0}


def run_row(row, envs, workers):
    """The row's entry in docs/compatibility.json."""
    made = {"date": datetime.date.today().isoformat(), "commit": _commit()}
    try:
        python = environment(row, envs)
        made["versions"] = imported_versions(python, row)
    except NotRun as why:
        return made | {"not run": str(why)}
    made["tiers"] = {}
    for name in row.tiers:
        made["tiers"][name] = found = run_tier(python, TIERS[name], workers)
        print(f"{row.name}: {name}: {cell(found)}, {found['seconds']} s", flush=True)
    return made


def _commit():
    git = ["git", "-C", str(ROOT)]
    commit = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "fastfuse", "kernels", "tests", "bench", "cases"], capture_output=True).returncode
    return commit + ("+" if dirty else "")


# The page


def cell(found):
    """A tier's result in a few words: no number of passed tests stands alone where something failed or broke."""
    if found is None:
        return "-"
    parts = [f"{found['passed']} passed"]
    parts += [f"**{len(found['failed'])} failed**"] if found["failed"] else []
    parts += [f"{found['skipped']} skipped"] if found["skipped"] else []
    return ", ".join(parts + (["**did not finish**"] if "broke" in found else []))


def page(results, rows=ROWS):
    """docs/compatibility.md of docs/compatibility.json."""
    tiers = [name for name in TIERS if any(name in row.tiers for row in rows)]
    lines = [
        "# What fastfuse was run with",
        "",
        "Written by `python -m tests.matrix`, which makes an environment for each row, reads the versions from inside it and counts what ran there.",
        "CI runs the tested set alone. `-` is not part of the row, `tested` the version in constraints.txt. A `+` behind a commit: with changes that were not committed yet. No row used a GPU.",
        "",
        _line(["row", "Python", *SHOWN, *tiers, "date", "commit"]),
        _line(["---"] * (len(SHOWN) + len(tiers) + 4)),
    ]
    lines += [_line(_cells(row, results.get(row.name), tiers)) for row in rows]
    lines += ["", "## The rows", "", *(f"- **{row.name}**: {row.about}." for row in rows)]
    lines += ["", "## The tiers", "", *(f"- **{name}**: {TIERS[name].about}." for name in tiers)]
    failures = [line for row in rows for line in _failures(row, results.get(row.name) or {})]
    return "\n".join([*lines, *(["", "## What failed, and what did not run", "", *failures] if failures else []), ""])


def _line(cells):
    return f"| {' | '.join(cells)} |"


def _cells(row, result, tiers):
    if not result or "not run" in result:
        date, commit = (result["date"], result["commit"]) if result else ("", "")
        return [row.name, row.python, *(row.pins.get(p, "tested") for p in SHOWN), *("not run" if t in row.tiers else "-" for t in tiers), date, commit]
    found, versions = result["tiers"], result["versions"]
    cells = [cell(found[t]) if t in found else "not run" if t in row.tiers else "-" for t in tiers]
    return [row.name, versions["python"], *(versions[p] for p in SHOWN), *cells, result["date"], result["commit"]]


def _failures(row, result):
    if not result or "not run" in result:
        return [f"- **{row.name}** did not run: {result.get('not run', 'not tried yet')}."]
    lines = []
    for name, found in result["tiers"].items():
        lines += [f"- **{row.name}**, {name}: {found['broke']}"] if "broke" in found else []
        lines += [f"- **{row.name}**, {name}: `{failure}`" for failure in found["failed"]]
    return lines


def load():
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else {}


def store(results):
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    PAGE.write_text(page(results))


def main():
    p = argparse.ArgumentParser(prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--row", action="append", default=[], choices=[row.name for row in ROWS], metavar="NAME")
    p.add_argument("--python", default=f"{sys.version_info.major}.{sys.version_info.minor}", metavar="X.Y")
    p.add_argument("--envs", type=Path, help="folder that keeps the environments; without it they are made anew and removed")
    p.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes of a tier")
    p.add_argument("--page", action="store_true")
    a = p.parse_args()
    chosen = [row for row in ROWS if row.name in a.row or (not a.row and row.python == a.python)]
    if a.page:
        store(load())
        return
    with tempfile.TemporaryDirectory() as temporary:
        envs = (a.envs or Path(temporary)).resolve()
        for row in chosen:
            results = load()
            results[row.name] = run_row(row, envs, a.workers)
            store(results)
            print(f"{row.name}: {results[row.name].get('not run', 'done')}", flush=True)


if __name__ == "__main__":
    main()
