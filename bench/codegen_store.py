"""The stored figures of bench/codegen.py, one line a kernel and one file a target, and what got worse since. Needs no Triton.

    op name | registers=168 stack=0 shared=98304 blocks=1 code=1184 | loop weight total=6.4 alu=2.9 ... HMMA=0.25 bound=66 by=alu | ...

Compilation is deterministic for one Triton and differs between two, so figures of another Triton are not compared.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

FOLDER = Path(__file__).parent / "results"
TOLERANCE = 0.05


def holds(name: str, words: str) -> bool:
    return all(word in name for word in words.split())


def line(report: Mapping) -> str:
    """A report's stored line. Zeros are left out."""
    parts = [f"{report['op']} {report['name']}", " ".join(f"{k}={report[k]}" for k in ("registers", "stack", "shared", "blocks", "code"))]
    for loop, figures in report["loops"].items():
        parts.append(f"{loop} of {report['unit']}: " + " ".join(f"{k}={v if isinstance(v, str) else _short(v)}" for k, v in figures.items()))
    return " | ".join(parts)


def _short(figure: float) -> str:
    return f"{figure:.4g}" if figure < 10_000 else f"{figure:.0f}"


def parse(text: str) -> tuple[str, dict[str, float]]:
    """(kernel, its figures), those of a loop under "loop figure"."""
    kernel, general, *loops = text.split(" | ")
    figures = {k: float(v) for k, v in (pair.split("=") for pair in general.split())}
    for loop in loops:
        name, pairs = loop.split(": ", 1)
        figures |= {f"{name.split(' of ')[0]} {k}": float(v) for k, v in (pair.split("=") for pair in pairs.split()) if k != "by"}
    return kernel, figures


def save(reports: Iterable[Mapping], triton: str, folder: Path = FOLDER) -> None:
    reports = list(reports)
    folder.mkdir(exist_ok=True)
    for arch in sorted({r["arch"] for r in reports}):
        lines = sorted(line(r) for r in reports if r["arch"] == arch)
        (folder / f"codegen_{arch}.txt").write_text("\n".join([f"triton {triton}", *lines]) + "\n")


def load(folder: Path = FOLDER) -> tuple[set[str], dict[str, dict[str, float]]]:
    """(Tritons, "target kernel" -> figures)."""
    versions, kernels = set(), {}
    for path in sorted(folder.glob("codegen_*.txt")):
        first, *lines = path.read_text().splitlines()
        versions.add(first.removeprefix("triton "))
        for text in lines:
            kernel, figures = parse(text)
            kernels[f"{path.stem.removeprefix('codegen_')} {kernel}"] = figures
    return versions, kernels


def compare(reports: Iterable[Mapping], triton: str, words: str = "", folder: Path = FOLDER) -> tuple[list[str], list[str]]:
    """(what to say, what got worse)."""
    versions, stored = load(folder)
    if versions != {triton}:
        return [f"nothing compared: this is Triton {triton}, the stored figures are of {', '.join(sorted(versions)) or 'none'}"], []
    stored = {k: v for k, v in stored.items() if holds(k, words)}
    fresh = {}
    for r in reports:
        kernel, figures = parse(line(r))
        fresh[f"{r['arch']} {kernel}"] = figures
    found = [f"{k}: not stored" for k in sorted(fresh.keys() - stored.keys())] + [
        f"{k}: stored, but not compiled" for k in sorted(stored.keys() - fresh.keys())
    ]
    found += [f"{k}: {why}" for k in sorted(fresh.keys() & stored.keys()) for why in worse(stored[k], fresh[k])]
    better = sum(any(worse(fresh[k], stored[k])) for k in fresh.keys() & stored.keys())
    said = [f"{len(fresh)} kernels compared with the stored figures, {len(found)} differences for the worse, {better} kernels better somewhere"]
    return said + (["where that is meant: python -m bench.codegen --store, in the same commit"] if found else []), found


def worse(old: Mapping[str, float], new: Mapping[str, float]) -> Iterator[str]:
    """Each figure that got worse by more than TOLERANCE.

    Registers and shared memory count where fewer blocks fit, and a matrix instruction counts both ways: for the same work fewer of
    them mean that some of it is done elsewhere.
    """
    if new["stack"]:
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
    stored = load(folder)[1]
    for r in reports:
        kernel, new = parse(line(r))
        old = stored.get(f"{r['arch']} {kernel}", {})
        for name in [n for n in new if n.endswith(" total")] or ["code"]:
            if name in old:
                yield r["arch"], f"{kernel}: {name.removesuffix(' total')}", old[name], new[name]


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
