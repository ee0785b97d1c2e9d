"""Compile for every target what launchers launch, without a GPU, and read what the compiler made of it.

    python -m bench.codegen                  a table: registers, stack, shared memory, occupancy, instructions by pipe, bound
    python -m bench.codegen --only "sm_90 dq"   the same of some kernels, to compare two variants
    python -m bench.codegen --all            compiles every kernel; else those that are not stored as they are, and the stored figures serve for the rest
    python -m bench.codegen --json FILE      the reports as JSON, for the tests
    python -m bench.codegen --diff           exits 1 where a figure is worse than the stored one by more than 5%
    python -m bench.codegen --store          rewrites the stored figures, bench/results/codegen_<target>.txt
    python -m bench.codegen --versions       of another Triton: its differences from them, into bench/results/codegen_versions.md

The calls are those of cases/launches.py. Every kernel must have stack 0 (nothing spilled) and fit the chip's shared memory.
"""

import ast
import concurrent.futures
import functools
import hashlib
import inspect
import json
import multiprocessing
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import count, islice
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITCallable

from bench import arguments, sass
from bench import codegen_store as store
from bench.sass import Report
from bench.work import TUNED, Compiled, work_of
from cases.launches import launches
from fastfuse.ops._collect import collecting
from fastfuse.ops._launch import _settle_cache_keys

PROCESSORS = {"sm_80": 108, "sm_90": 132, "sm_100": 148, "sm_120": 188, "gfx942": 304}  # of the chips that bench/sass.py describes
ARCHS = tuple(PROCESSORS)
SPILLS = Path(__file__).with_name("spills.json")


@dataclass(frozen=True)
class KernelBuild:
    """A kernel as a launch asks for it."""

    arch: str
    op: str
    name: str
    key: str
    source: ASTSource
    options: dict
    work: sass.Work

    @property
    def constants(self) -> dict:
        return {self.source.fn.arg_names[path[0]]: value for path, value in self.source.constants.items() if len(path) == 1}


def collect(arch: str, calls: Iterable[tuple[str, Callable[[], object]]]) -> list[KernelBuild]:
    """The kernels that calls launch on this target, named after the first call that does: (its words, call)."""
    _settle_cache_keys()
    builds: dict[tuple[str, str], KernelBuild] = {}
    with collecting(target(arch), arch, PROCESSORS[arch]) as found:
        for words, call in calls:
            before = len(found)
            call()
            for compile_kernel in islice(found.values(), before, None):
                build = _build(arch, words, compile_kernel)
                if first := builds.get((build.op, build.name)):
                    name = f"{build.name} {_difference(build, first)}".strip()
                    taken = (f"{name} #{n}" if n > 1 else name for n in count(1))
                    build = replace(build, name=next(name for name in taken if (build.op, name) not in builds))
                builds[build.op, build.name] = build
    return list(builds.values())


def all_builds(arch: str) -> list[KernelBuild]:
    return collect(arch, ((each.words, functools.partial(each.run, n)) for each in launches(arch) for n in each.counts))


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def _build(arch: str, words: str, compile_kernel: Callable) -> KernelBuild:
    held = inspect.getclosurevars(compile_kernel).nonlocals  # Triton's own, of which it makes a compilation
    made = KernelBuild(arch, held["src"].name.removesuffix("_kernel"), "", "", held["src"], held["options"].__dict__, None)
    made = replace(made, work=work_of(made.op, Compiled(made.source.signature, made.constants)))
    return replace(made, name=f"{words} {_tile(made)}".strip(), key=key_of(made))


def key_of(build: KernelBuild) -> str:
    """Of all that the figures depend on: it is the same wherever fastfuse and Triton are installed."""
    source, options = build.source, {k: v for k, v in build.options.items() if k != "extern_libs"}  # paths
    parts = triton.__version__, _code(source.fn), source.signature, source.constants, source.attrs, build.arch, options, build.work, _reader()
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:12]


def _tile(build: KernelBuild) -> str:
    blocks = "x".join(str(v) for k, v in build.constants.items() if k.startswith("BLOCK_") and k not in ("BLOCK_D", "BLOCK_SIZE"))
    flags = [k.lower() for k, v in build.constants.items() if v is True]
    schedule = [f"w{build.options['num_warps']} s{build.options['num_stages']}"] if build.op in TUNED else []
    return " ".join(filter(None, [blocks, *schedule, *flags]))


def _difference(one: KernelBuild, other: KernelBuild) -> str:
    mine, theirs = one.constants, other.constants
    parts = [f"{k}={v}" for k, v in mine.items() if v != theirs.get(k) and v is not None and not isinstance(v, bool)]
    parts += [f"no {k.removesuffix('_ptr')}" for k, v in mine.items() if v is None and k not in theirs]
    return " ".join(parts + [f"with {k.removesuffix('_ptr')}" for k, v in theirs.items() if v is None and k not in mine])


@functools.cache
def _code(function: JITCallable) -> str:
    """The source of a kernel and of all that it calls, without comments: it is the same wherever the files lie."""
    found, todo = {}, [function]
    while todo:
        one = todo.pop()
        if (name := f"{one.fn.__module__}.{one.__name__}") not in found:
            found[name] = text = source_of(inspect.getsource(one.fn))
            used = {node.id: one.fn.__globals__.get(node.id) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)}
            found |= {f"{name} {of}": repr(value) for of, value in used.items() if isinstance(value, (int, float, str, tuple))}
            todo += [value for value in used.values() if isinstance(value, JITCallable)]
    return str(sorted(found.items()))


def source_of(text: str) -> str:
    """Python without comments, docstrings and layout."""
    tree = ast.parse(textwrap.dedent(text))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


@functools.cache
def _reader() -> str:
    """What reads the figures: where it changes, they are read again."""
    return source_of(Path(sass.__file__).read_text())


def problems(report: Report) -> list[str]:
    """Why a kernel must not ship. spills.json has the launches that spill, as what does not is modelled slower there: they may not get worse."""
    known = json.loads(SPILLS.read_text()).get(f"{report.arch} {report.op} {report.name}", 0)
    return report.problems() if report.stack > known else replace(report, stack=0).problems()


def report(build: KernelBuild) -> Report:
    compiled = triton.compile(build.source, target=target(build.arch), options=build.options)
    made = Report(build.arch, build.op, build.name, build.key, compiled.metadata.shared, build.options["num_warps"], build.work.unit)
    if "cubin" in compiled.asm:
        made.read_nvidia(*disassemble(compiled.asm["cubin"]), build.work)
    else:
        made.read_amd(compiled.asm["amdgcn"])
    made.blocks = sass.blocks(made.arch, made.registers, made.shared, made.warps, getattr(compiled.metadata, "tmem_size", 0) or 0)
    return made


def disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, listing)."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        # nvdisasm without its analysis of the branch stack, of which nothing is read: 0.4 s a kernel for 0.7
        commands = ("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c", "-ndf")
        return tuple(subprocess.run([tools / name, *options, f.name], capture_output=True, text=True, check=True).stdout for name, *options in commands)


def reports(words: str = "", everything: bool = False, workers: int = 2) -> list[Report]:
    """Of the kernels whose target, op or name hold all the words; of those that are stored as they are, the stored ones."""
    archs = [arch for arch in ARCHS if arch in words.split()] or ARCHS
    builds = [b for arch in archs for b in all_builds(arch) if store.holds(f"{b.arch} {b.op} {b.name}", words)]
    stored = {} if everything else {(r["arch"], r["key"]): r for r in store.load()[1]}
    fresh = [b for b in builds if (b.arch, b.key) not in stored]
    print(f"bench.codegen: {len(fresh)} of {len(builds)} kernels are compiled", file=sys.stderr, flush=True)
    made = stored | {(r.arch, r.key): asdict(r) for r in compile_all(fresh, workers)}
    return [Report(**made[b.arch, b.key] | {"op": b.op, "name": b.name}) for b in builds]


_builds: list[KernelBuild] = []  # that processes made now are born with: a compilation cannot be sent to one


def compile_all(builds: list[KernelBuild], workers: int) -> Iterator[Report]:
    if not builds:
        return iter(())
    _builds[:] = builds
    with concurrent.futures.ProcessPoolExecutor(workers, multiprocessing.get_context("fork")) as pool:
        return iter(list(pool.map(_nth, range(len(builds)))))


def _nth(i: int) -> Report:
    return report(_builds[i])


def table(made: list[Report]) -> str:
    lines = ["thread instructions a unit of work, by pipe; bound: percent of the floor that the busiest pipe allows at most"]
    lines += [f"{r.arch:7} {store.line(asdict(r))} | warps={r.blocks * r.warps} {'; '.join(problems(r))}".rstrip() for r in made]
    return "\n".join(lines)


def main() -> None:
    p = arguments(
        __doc__,
        all="compile what is stored as it is too",
        diff="against the stored figures instead of the table; exits 1 where one got worse by more than 5%%",
        store="rewrite the stored figures",
        versions="write what differs with this Triton into bench/results/codegen_versions.md",
    )
    p.add_argument("--json", type=Path, help="write the reports there instead of the table")
    p.add_argument("--only", default="", metavar="WORDS", help="of the kernels whose target, op or name hold all of these words")
    p.add_argument("--workers", type=int, default=2)
    a = p.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.codegen: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if (a.store or a.versions) and a.only:
        sys.exit("bench.codegen: --store and --versions write of all kernels, without --only")
    made = reports(a.only, a.all, a.workers)
    found, worse = [asdict(r) for r in made], []
    if a.json:
        a.json.write_text(json.dumps([{**asdict(r), "found": problems(r)} for r in made]))
    if a.diff:
        said, worse = store.compare(found, triton.__version__, a.only)
        print("\n".join(said + worse))
    if a.store:
        store.save(found, triton.__version__)
    if a.versions:
        store.save_section(store.section(found, triton.__version__))
    if not (a.json or a.diff or a.store or a.versions):
        print(table(made))
    if worse or any(map(problems, made)):
        sys.exit(1)


if __name__ == "__main__":
    main()
