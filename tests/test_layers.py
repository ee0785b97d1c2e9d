"""Imports point one way: kernels -> ops -> modules -> models -> checkpoints, generation -> patching; left never imports right; device code knows no torch."""

import ast
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = ["kernels", "ops", "modules", "models", "checkpoints", "generation", "patching"]
LEAVES = {
    "errors": set(),
    "quant": {"errors", "quant", "kernels"},
    "tune": {"errors", "tune"},
    "data": {"errors", "data"},
}  # beside ops: what each may import of fastfuse


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(path: Path, room: str) -> list[str]:
    found = []
    for name in imported(path):
        parts = name.split(".")
        if parts[0] in ("tests", "bench", "kernels"):
            found.append(f"{path}: the library must not import {name}")
        if room == "kernels" and (parts[0] not in ("triton", "math", "struct", "typing") and parts[:2] != ["fastfuse", "kernels"]):
            found.append(f"{path}: device code must not import {name}")
        if parts[0] != "fastfuse":
            continue
        target = parts[1] if len(parts) > 1 else ""
        if room in LAYERS and target in LAYERS and LAYERS.index(target) > LAYERS.index(room):
            found.append(f"{path}: {room} must not import {name}")
        if room in LEAVES and target not in LEAVES[room]:
            found.append(f"{path}: {room} must not import {name}")
    return found


def room_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def test_imports_point_one_way():
    files = [*(ROOT / "kernels").rglob("*.py"), *(p for p in (ROOT / "fastfuse").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)]
    assert len(files) > 10
    assert [v for path in files for v in violations(path, room_of(path))] == []


def test_no_room_imports_itself_where_nobody_sees_it():
    """A circle is an import inside of a function; only the command line's subcommands are imported late."""
    functions = [
        (path, node) for path in (ROOT / "fastfuse").rglob("*.py") for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]
    inner = {(path, node.module) for path, f in functions for node in ast.walk(f) if isinstance(node, ast.ImportFrom) and node.module}
    rooms = ("ops", "modules", "models", "checkpoints", "generation", "patching", "quant", "tune", "data")
    assert [(path, name) for path, name in inner if room_of(path) in rooms and name.startswith(f"fastfuse.{room_of(path)}")] == []


def test_a_wrong_import_is_found(tmp_path):
    bad = tmp_path / "bad.py"
    for line, room in [
        ("import torch", "kernels"),
        ("from fastfuse.ops import _op", "kernels"),
        ("from fastfuse.patching import patch", "ops"),
        ("from fastfuse.ops._op import check", "quant"),
        ("import kernels.nf4", "ops"),
        ("from fastfuse import patching", "models"),
    ]:
        bad.write_text(line)
        assert violations(bad, room), line


def module_constexprs(source: str) -> list[str]:
    assigned = [node for node in ast.parse(source).body if isinstance(node, (ast.Assign, ast.AnnAssign))]
    return [ast.unparse(node) for node in assigned if any(isinstance(n, ast.Attribute) and n.attr == "constexpr" for n in ast.walk(node))]


def test_no_kernel_reads_a_constexpr_of_its_module():
    """Triton compares each at every launch, in about 11 Python calls."""
    assert module_constexprs("import triton.language as tl\nA, B = (tl.constexpr(i) for i in range(2))\nC: tl.constexpr = 3")[0].startswith("A, B")
    assert {path.name: found for path in (ROOT / "kernels").glob("*.py") if (found := module_constexprs(path.read_text()))} == {}


def test_kernels_is_no_package_of_its_own():
    """A top-level package called kernels would shadow Hugging Face's and break transformers."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "fastfuse" / "kernels").is_symlink()
