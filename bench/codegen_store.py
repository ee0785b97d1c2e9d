"""The stored figures of bench/codegen.py, one line a kernel and one file a target, and what got worse since. Needs no Triton.

    kernel name | key=8d1f0c93ab52 registers=168 stack=0 shared=98304 warps=8 blocks=1 code=1184 | loop of weight: total=6.4 ... bound=66 by=alu | counts: STG.128=4

A key is of all that a kernel is compiled from: while it stays, so do the figures. Compilation is deterministic for one Triton and differs between two, so
figures of another Triton are not compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
TOLERANCE = 0.05
GENERAL = ("registers", "stack", "shared", "warps", "blocks", "code")


def holds(name: str, words: str) -> bool:
    return all(word in name for word in words.split())


def line(report: Mapping) -> str:
    """A report's stored line. Zeros are left out."""
    parts = [f"{report['op']} {report['name']}", f"key={report['key']} " + _pairs({k: report[k] for k in GENERAL})]
    parts += [f"{loop} of {report['unit']}: {_pairs(figures)}" for loop, figures in report["loops"].items()]
    return " | ".join(parts + ([f"counts: {_pairs(report['counts'])}"] if report["counts"] else []))


def _pairs(figures: Mapping) -> str:
    return " ".join(f"{k.replace(' ', '-')}={v if isinstance(v, (str, int)) else _short(v)}" for k, v in figures.items())


def _short(figure: float) -> str:
    return f"{figure:.4g}" if figure < 10_000 else f"{figure:.0f}"


def parse(text: str, arch: str) -> dict:
    """The report that a line is of."""
    kernel, general, *rest = text.split(" | ")
    op, _, name = kernel.partition(" ")
    found = {"arch": arch, "op": op, "name": name, "unit": "", "loops": {}, "counts": {}} | _read(general)
    for part in rest:
        title, pairs = part.split(": ", 1)
        loop, _, unit = title.partition(" of ")
        if unit:
            found["loops"][loop], found["unit"] = _read(pairs), unit
        else:
            found["counts"] = _read(pairs)
    return found


def _read(pairs: str) -> dict:
    split = (pair.split("=") for pair in pairs.split())
    return {k.replace("-", " "): v if k in ("key", "by") else int(v) if v.isdecimal() else float(v) for k, v in split}


def figures(report: Mapping) -> dict[str, float]:
    """What is compared, as it is stored; of a loop under "loop figure"."""
    report = parse(line(report), report["arch"])
    return {k: report[k] for k in GENERAL if k != "warps"} | {
        f"{loop} {k}": v for loop, of_loop in report["loops"].items() for k, v in of_loop.items() if k != "by"
    }


def _kernel(report: Mapping) -> str:
    return f"{report['arch']} {report['op']} {report['name']}"


def save(reports: Iterable[Mapping], triton: str, folder: Path = FOLDER) -> None:
    reports = list(reports)
    folder.mkdir(exist_ok=True)
    for arch in sorted({r["arch"] for r in reports}):
        lines = sorted(line(r) for r in reports if r["arch"] == arch)
        (folder / f"codegen_{arch}.txt").write_text("\n".join([f"triton {triton}", *lines]) + "\n")


def load(folder: Path = FOLDER) -> tuple[set, list]:
    """(Tritons, reports)."""
    versions, reports = set(), []
    for path in sorted(folder.glob("codegen_*.txt")):
        first, *lines = path.read_text().splitlines()
        versions.add(first.removeprefix("triton "))
        reports += [parse(text, path.stem.removeprefix("codegen_")) for text in lines]
    return versions, reports


def compare(reports: Iterable[Mapping], triton: str, words: str = "", folder: Path = FOLDER) -> tuple[list[str], list[str]]:
    """(what to say, what got worse)."""
    versions, kept = load(folder)
    if versions != {triton}:
        return [f"nothing compared: this is Triton {triton}, the stored figures are of {', '.join(sorted(versions)) or 'none'}"], []
    stored = {_kernel(r): r for r in kept if holds(_kernel(r), words)}
    fresh = {_kernel(r): r for r in reports}
    common = sorted(fresh.keys() & stored.keys())
    found = [f"{k}: not stored" for k in sorted(fresh.keys() - stored.keys())]
    found += [f"{k}: stored, but not compiled" for k in sorted(stored.keys() - fresh.keys())]
    found += [f"{k}: {why}" for k in common for why in worse(figures(stored[k]), figures(fresh[k]))]
    better = sum(any(worse(figures(fresh[k]), figures(stored[k]))) for k in common)
    said = [f"{len(fresh)} kernels compared with the stored figures, {len(found)} differences for the worse, {better} kernels better somewhere"]
    if changed := sum(fresh[k]["key"] != stored[k]["key"] for k in common):
        said.append(f"{changed} kernels have changed: until python -m bench.codegen --store they are compiled each time")
    return said + (["where that is meant: python -m bench.codegen --store, in the same commit"] if found else []), found


def worse(old: Mapping[str, float], new: Mapping[str, float]) -> Iterator[str]:
    """Each figure that got worse by more than TOLERANCE.

    Registers and shared memory count where fewer blocks fit, and a matrix instruction counts both ways: for the same work fewer of
    them mean that some of it is done elsewhere.
    """
    if new["stack"] > old["stack"]:
        yield f"stack {old['stack']:g} -> {new['stack']:g}"
    if new["blocks"] < old["blocks"]:
        grew = ", ".join(f"{k} {old[k]:g} -> {new[k]:g}" for k in ("registers", "shared") if new[k] > old[k])
        yield f"blocks {old['blocks']:g} -> {new['blocks']:g} ({grew})"
    for name in sorted((old.keys() | new.keys()) - {"registers", "stack", "shared", "blocks"}):
        before, after = old.get(name, 0), new.get(name, 0)
        more, fewer = after > before * (1 + TOLERANCE), after < before * (1 - TOLERANCE)
        if name.endswith(" bound"):
            more, fewer = fewer, False
        if more or (fewer and ("MMA" in name or "mfma" in name)):
            yield f"{name} {before:g} -> {after:g}"


def changes(reports: Iterable[Mapping], folder: Path = FOLDER) -> Iterator[tuple[str, str, float, float]]:
    """(target, kernel and loop, stored, now) of each loop's instructions a unit of work; AMD's, of which no loops are read, of the whole kernel."""
    stored = {_kernel(r): figures(r) for r in load(folder)[1]}
    for r in reports:
        new, old = figures(r), stored.get(_kernel(r), {})
        for name in [n for n in new if n.endswith(" total")] or ["code"]:
            if name in old:
                yield r["arch"], f"{r['op']} {r['name']}: {name.removesuffix(' total')}", old[name], new[name]


def section(reports: Iterable[Mapping], triton: str, folder: Path = FOLDER) -> str:
    """What another Triton makes of the kernels, in Markdown: what spills, how many loops grew and shrank, and the ten that grew most."""
    reports = list(reports)
    moved = [(new / old, arch, name, old, new) for arch, name, old, new in changes(reports, folder)]
    text = [f"## Triton {triton}", "", "| target | kernels | spill | loops longer by more than 5% | shorter |", "|---|---|---|---|---|"]
    for arch in sorted({r["arch"] for r in reports}):
        mine, ratios = [r for r in reports if r["arch"] == arch], [ratio for ratio, a, *_ in moved if a == arch]
        longer, shorter = sum(r > 1 + TOLERANCE for r in ratios), sum(r < 1 - TOLERANCE for r in ratios)
        text.append(f"| {arch} | {len(mine)} | {sum(r['stack'] > 0 for r in mine)} | {longer} | {shorter} |")
    spilled = [f"| {r['arch']} | {r['op']} {r['name']} | {r['stack']} |" for r in reports if r["stack"]]
    if spilled:
        text += ["", "| target | kernel | bytes of stack a thread |", "|---|---|---|", *spilled]
    worst = [m for m in sorted(moved, reverse=True)[:10] if m[0] > 1 + TOLERANCE]
    if worst:
        text += ["", "| target | loop, worst first | instructions, stored | now |", "|---|---|---|---|"]
        text += [f"| {arch} | {name} | {_short(old)} | {_short(new)} |" for _, arch, name, old, new in worst]
    return "\n".join(text) + "\n"


def save_section(text: str, path: Path = FOLDER / "codegen_versions.md") -> None:
    """Put a Triton's section into the table of all, in place of its last one."""
    head = "# Other Tritons against the stored figures\n\nWritten by `python -m bench.codegen --versions`, run with each.\n"
    old = path.read_text().split("\n## ")[1:] if path.exists() else []
    kept = {s.splitlines()[0]: s.rstrip("\n") + "\n" for s in (*old, text.removeprefix("## "))}
    path.write_text(head + "".join(f"\n## {kept[name]}" for name in sorted(kept, key=lambda n: [int(v) for v in n.split()[1].split(".")])))
