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


def imported(path):
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def violations(path, room):
    found = []
    for name in imported(path):
        top, inner = [*name.split("."), ""][:2]
        outside = top in ("tests", "bench", "kernels")
        not_device_code = room == "kernels" and top not in ("triton", "math", "struct", "typing") and (top, inner) != ("fastfuse", "kernels")
        to_the_right = top == "fastfuse" and room in LAYERS and inner in LAYERS[LAYERS.index(room) + 1 :]
        beside = top == "fastfuse" and room in LEAVES and inner not in LEAVES[room]
        if outside or not_device_code or to_the_right or beside:
            found.append(f"{path}: {room} must not import {name}")
    return found


def room_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "kernels" if parts[0] == "kernels" else parts[1]


def test_imports_point_one_way():
    files = [*(ROOT / "kernels").rglob("*.py"), *(p for p in (ROOT / "fastfuse").rglob("*.py") if "kernels" not in p.relative_to(ROOT).parts)]
    assert len(files) > 10
    assert [v for path in files for v in violations(path, room_of(path))] == []


def test_no_room_imports_itself_where_nobody_sees_it():
    """A circle is an import inside of a function; only the command line's subcommands are imported late."""
    rooms, found = ("ops", "modules", "models", "checkpoints", "generation", "patching", "quant", "tune", "data"), []
    for path in (p for p in (ROOT / "fastfuse").rglob("*.py") if room_of(p) in rooms):
        functions = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]
        inner = {node.module for f in functions for node in ast.walk(f) if isinstance(node, ast.ImportFrom) and node.module}
        found += [(path, name) for name in inner if name.startswith(f"fastfuse.{room_of(path)}")]
    assert found == []


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


def module_constexprs(source):
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
