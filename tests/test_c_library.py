"""The C library builds, its launches reach a driver as its kernels expect them and compute what the ops do, and a server builds against what is installed."""

import ast
import re
import shutil
import struct
import sys

import pytest
from processes import ROOT, python, run

from fastfuse import tune

pytest.importorskip("triton", reason="Triton ships for Linux alone")
if missing := [name for name in ("cmake", "make", "cc", "c++") if shutil.which(name) is None]:
    pytest.skip(f"{' and '.join(missing)} not found: the C library is not built", allow_module_level=True)


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    path = tmp_path_factory.mktemp("c")
    options = {"Python_EXECUTABLE": sys.executable, "FASTFUSE_VARIANTS": "small", "FASTFUSE_ARCHS": "90", "FASTFUSE_JOBS": "2"}
    run("cmake", "-S", ROOT, "-B", path, *(f"-D{name}={value}" for name, value in options.items()))
    run("cmake", "--build", path)
    return path


@pytest.mark.parametrize("test", ["launches_nf4", "launches_patch_embed", "launches_attention", "consumer"])
def test_ctest(build, test):
    assert "100% tests passed, 0 tests failed out of 1" in run("ctest", "--test-dir", build, "-R", f"^{test}$").stdout


def test_launches_compute_what_the_ops_do(build):
    """Pointers, sizes, grids and workspaces as C has them, through the interpreter, against the references."""
    assert python("-m", "tests.c_launches", build, TRITON_INTERPRET="1", OMP_NUM_THREADS="1").stdout.endswith("ok\n")


@pytest.mark.gpu
def test_numbers_on_a_gpu(build):
    assert "Passed" in run("ctest", "--test-dir", build, "-R", "^gpu$").stdout


def test_without_a_driver_every_call_says_so(build):
    code = f"import ctypes; lib = ctypes.CDLL('{build}/libfastfuse.so'); n = ctypes.c_size_t(); lib.ffs_last_error.restype = ctypes.c_char_p; "
    code += "print(lib.ffs_nf4_linear_workspace(1, ctypes.c_int64(1), None, None, ctypes.byref(n)), lib.ffs_last_error().decode())"
    out = python("-c", code).stdout
    if not shutil.which("nvidia-smi"):
        assert out.startswith("3 libcuda.so.1: ")


def test_only_the_interface_is_exported_and_no_path_of_the_build_is_in_it(build):
    library = (build / "libfastfuse.so").read_bytes()
    declared = set(re.findall(r"\b(ffs_\w+)\(", (ROOT / "c/fastfuse.h").read_text()))
    assert len(declared) == 12
    assert dynamic_functions(library) == declared
    assert str(ROOT).encode() not in library and str(build).encode() not in library


def dynamic_functions(elf):
    """Names of the functions that a shared library defines for others."""
    offset, count = struct.unpack_from("<Q", elf, 0x28)[0], struct.unpack_from("<H", elf, 0x3C)[0]
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, offset + 64 * i) for i in range(count)]
    symbols = next(h for h in headers if h[1] == 11)
    strings = headers[symbols[6]][4]
    found = set()
    for at in range(symbols[4], symbols[4] + symbols[5], 24):
        name, info, _, section = struct.unpack_from("<IBBH", elf, at)
        if info & 15 == 2 and section:
            found.add(elf[strings + name : elf.index(b"\0", strings + name)].decode())
    return found


def drifted(change):
    """Compiles one kernel as variants.py has it after `change` to its Variant v."""
    code = f"""
import sys, dataclasses
sys.path.insert(0, "c")
import compile
v = next(v for v in compile.variants(90, ["bf16"], True) if v.id == "NF4_DEQUANTIZE")
{change}
print(compile.build(v, 90).parameters)
"""
    return python("-c", code, fails=True)


def test_every_kernel_says_whether_products_and_sums_become_fmas():
    """As at every launch from Python: Triton 3.9 warns where it is not said, and 3.10 turns them off."""
    done = drifted("print({(x.id, x.options.get('enable_fp_fusion')) for x in compile.variants(90, ['bf16'], False)}); sys.exit()")
    found = dict(ast.literal_eval(done.stdout))
    assert len(found) == 15 and found == {id: id != "NF4_DEQUANTIZE" for id in found}


def test_rows_are_those_of_the_triton_that_compiles():
    row = {"arch": "sm_90", "when": {}, "tile": {"num_warps": 4}, "since": {"3.10": {"tile": {"num_warps": 2}}, "3.9": {"tile": {"num_warps": 8}}}}
    versions = ("3.7.1", "3.9.0", "3.10.0+git1")
    done = drifted(f"import variants; print([variants._served({row}, v)['tile'] for v in {versions}]); sys.exit()")
    assert ast.literal_eval(done.stdout) == [tune.served(row, v)["tile"] for v in versions] == [{"num_warps": w} for w in (4, 8, 2)]


@pytest.mark.parametrize(
    "change, said",
    [
        ("compile.SCRATCH = 1", "the cubin takes parameters of"),  # another Triton that passes another number of pointers of its own
        ("compile.SIZES['i64'] = 4", "the signature says"),
        ("v.signature['n_items'] = v.signature.pop('n_elements')", "n_elements"),  # a kernel's argument was renamed
        ("v.signature['more'] = 'more i32'", "has no argument more"),
    ],
    ids=["scratch", "width", "renamed", "unknown"],
)
def test_a_drift_stops_the_build(change, said):
    done = drifted(change)
    assert done.returncode != 0 and said in done.stderr, done.stdout + done.stderr[-2000:]
