"""The NF4 ops on a CPU: the C library in every instruction set this CPU has, how it comes to be there, and the way without it."""

import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from processes import ROOT, python, run
from suite import check

from cases import nf4_linear as nf4_cases
from cases.linear import Layer, weight
from cases.weights import STORAGES, quantize
from fastfuse.info import info
from fastfuse.ops import _cpu_library, _nf4_cpu, nf4_dequantize, nf4_dequantize_ref, nf4_lora_linear
from fastfuse.quant import NF4View

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
# N, K, block: whole groups, blocks over several rows, rows that begin within a block, an odd byte, a last block cut short, 16 elements past the blocks' ends
SHAPES = [(30, 256, 32), (37, 1024, 256), (17, 96, 64), (9, 33, 64), (4, 4096, 4096), (5, 4304, 64), (3, 1100, 64), (7, 2, 32), (25, 2600, 128)]
EXPECTED = os.name == "posix" and os.environ.get("FASTFUSE_CPU") != "torch" and any(map(shutil.which, ("gcc", "clang", "cc")))
made = pytest.mark.skipif(not EXPECTED, reason="FASTFUSE_CPU is torch, or there is no compiler")


@made
def test_it_is_made_where_there_is_a_compiler():
    """Else a source that does not compile would skip what follows."""
    assert _cpu_library.library() is not None and available()


def available():
    return [n for i, n in enumerate(_cpu_library.INSTRUCTIONS) if _cpu_library.library() and _cpu_library.library().ffs_cpu_isa(i) == i]


@pytest.fixture(params=available())
def instructions(request):
    library = _cpu_library.library()
    library.ffs_cpu_isa(_cpu_library.INSTRUCTIONS.index(request.param))
    yield request.param
    library.ffs_cpu_isa(_cpu_library.INSTRUCTIONS.index(library.instructions))


def shapes(storage):
    """torchao has whole blocks alone."""
    return [(N, K, block) for N, K, block in SHAPES if storage != "torchao" or N * K % block == 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_decoded_values_are_the_reference_to_the_bit(instructions, storage, dtype):
    for N, K, block in shapes(storage):
        view = weight(0, N, K, storage, dtype, block)
        for wanted in DTYPES:
            assert torch.equal(_cpu_library.dequantize(view, view, view.shape, wanted), nf4_dequantize_ref(view, wanted)), (view.shape, view.layout, wanted)


def test_decoding_keeps_denormals_infinities_and_nan(instructions):
    absmax = torch.tensor([1e-39, 3e38, torch.inf, torch.nan, 6e-8, 7e4])
    view = NF4View(torch.arange(192, dtype=torch.int32).to(torch.uint8), weight(0, 64, 128).code, (absmax,), 64, (6, 64), torch.float32)
    for wanted in DTYPES:
        got, want = _cpu_library.dequantize(view, view, view.shape, wanted), nf4_dequantize_ref(view, wanted)
        assert torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(7), want.nan_to_num(7))


KINDS = [(STORAGES[i], DTYPES[j], (None, torch.float32, "as x")[(i + j) % 3]) for i in range(3) for j in range(3)]


@pytest.mark.parametrize("storage, dtype, adapter", KINDS, ids=str)
def test_products(instructions, storage, dtype, adapter, monkeypatch):
    """x W^T alone, and with a bias and an adapter of x's dtype and of PEFT's fp32; dY W; few tokens, many, more than a slice."""
    monkeypatch.setattr(_cpu_library, "is_for_gemm", lambda *_: False)
    for i, (N, K, block) in enumerate([*shapes(storage), (131, 832, 64)]):
        layer = Layer(N, *((16, True) if adapter == "as x" else (5, True) if adapter else (0, False)), low=adapter if adapter == torch.float32 else None)
        for M in (1 + i % 3, 4 + i % 3, 130 if K < 800 else 7):
            check(nf4_cases.make("cpu", layers=(layer,), K=K, lead=(M,), storage=storage, dtype=dtype, block=block), small_gradients=N < 10)


@made
@pytest.mark.parametrize("M", [1, 3, 33])
def test_any_number_of_threads(M):
    view, before = weight(0, 500, 640), torch.get_num_threads()
    x, dy, (a, b) = torch.randn(M, 640), torch.randn(M, 500), (torch.randn(16, 640), torch.randn(500, 16))
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append((*_cpu_library.linear(x, view, view, 500, 640, None, a, b, 0.5), _cpu_library.linear_dx(dy, view), nf4_dequantize(view)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for more in results[1:] for one, other in zip(results[0], more, strict=True))
    assert torch.equal(nf4_lora_linear(x, view, a, b, 0.5), results[0][0])  # the public op comes here


def _in_child(queue, x, view):
    torch.set_num_threads(4)  # in spite of DataLoader, which asks for one; PyTorch's own operations may not run in parallel now
    queue.put(_cpu_library.linear(x, view, view, 1024, 1024)[0].sum().item())


@made
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_forked_child_runs_alone():
    """OpenMP's threads are not copied: a parallel region in the child would wait for them for ever."""
    before, context = torch.get_num_threads(), multiprocessing.get_context("fork")
    torch.set_num_threads(2)
    view, x, queue = NF4View.of(quantize(torch.ones(1024, 1024), "flat")), torch.ones(8, 1024), context.Queue()
    _cpu_library.linear(x, view, view, 1024, 1024)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads: that is the point
        child = context.Process(target=_in_child, args=(queue, x, view))
        child.start()
    try:
        assert queue.get(timeout=60) == 8 * 1024 * 1024
    finally:
        child.kill()
        torch.set_num_threads(before)


@made
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="no /proc")
def test_one_thread_stays_one():
    code = """
import os, torch
from fastfuse.ops import _cpu_library
from fastfuse.quant import NF4View
view = NF4View(torch.zeros(1 << 19, dtype=torch.uint8), torch.linspace(-1, 1, 16), (torch.ones(1 << 14),), 64, (1024, 1024), torch.float32)
_cpu_library.library()
before = len(os.listdir("/proc/self/task"))
_cpu_library.linear(torch.ones(64, 1024), view, view, 1024, 1024)
assert torch.get_num_threads() == 1 and len(os.listdir("/proc/self/task")) == before
"""
    python("-c", code, OMP_NUM_THREADS="1")


@pytest.fixture
def anew(monkeypatch):
    """The library is looked for again, in this test and after it."""
    _cpu_library.library.cache_clear()
    yield monkeypatch
    _cpu_library.library.cache_clear()


def _falls_back(reason):
    with pytest.warns(UserWarning, match=f"NF4 runs through PyTorch.*{reason}") as said:
        check(nf4_cases.make("cpu", layers=(Layer(64, 0),), K=128))
        nf4_dequantize(weight(0, 64, 128))
    assert len(said) == 1 and "\n" not in str(said[0].message)
    assert "PyTorch, no C library" in info()


@pytest.mark.parametrize("compiler", ["/nowhere/cc", "false"])
def test_without_a_compiler(anew, tmp_path, compiler):
    anew.setenv("TRITON_CACHE_DIR", str(tmp_path))
    anew.setenv("CC", compiler)
    _falls_back(re.escape(compiler))


COMPILER = """#!/bin/sh
if [ "$2" = --version ]; then echo 1; exit; fi
for last; do test "$before" = -o && out=$last; before=$last; done
echo x >> "{runs}"
for word in {writes}; do printf $word >> "$out"; sleep {pause}; done
"""


def _stand_in(tmp_path, monkeypatch, writes="a library", slowly=False):
    """A compiler that is asked as gcc is, and writes a few bytes, one word after the other."""
    script = tmp_path / "cc"
    script.write_text(COMPILER.format(runs=tmp_path / "runs", writes=writes, pause=int(slowly)))
    script.chmod(0o755)
    monkeypatch.setenv("CC", f"'{script}' -m64")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))


def test_folder_that_cannot_be_written(anew, tmp_path):
    _stand_in(tmp_path, anew)
    (tmp_path / "cache").write_text("a file")
    _falls_back("cache")


def test_folder_that_others_can_write_to(anew, tmp_path):
    _stand_in(tmp_path, anew)
    folder = _cpu_library._compiled().parent
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    _falls_back("others can write to")


def test_compiled_once_and_again_when_broken(anew, tmp_path):
    _stand_in(tmp_path, anew)
    path = _cpu_library._compiled()
    assert _cpu_library._compiled() == path and path.read_text() == "alibrary" and (tmp_path / "runs").read_text() == "x\n"
    path.write_text("something else")
    assert _cpu_library._compiled() == path and path.read_text() == "alibrary" and (tmp_path / "runs").read_text() == "x\nx\n"
    _stand_in(tmp_path, anew, "another")
    anew.setattr(_cpu_library, "FLAGS", ("-O2",))
    assert _cpu_library._compiled().parent != path.parent


def test_two_processes_at_once(tmp_path, monkeypatch):
    _stand_in(tmp_path, monkeypatch, slowly=True)
    code = "from fastfuse.ops import _cpu_library; print(_cpu_library._compiled().read_text())"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0].split() for p in started] == [["alibrary"]] * 2
    assert len([*tmp_path.glob("cache/fastfuse-*/*.so")]) == 1 == len([*tmp_path.glob("cache/fastfuse-*/*")])


@pytest.mark.skipif(not all(map(shutil.which, ("cmake", "make", "cc"))), reason="needs cmake, make and cc")
def test_cmake_builds_it_alone(tmp_path):
    for command in (("cmake", "-S", ROOT, "-B", tmp_path, "-DFASTFUSE_GPU=OFF"), ("cmake", "--build", tmp_path), ("ctest", "--test-dir", tmp_path)):
        run(*command)


@made
def test_asked_for(anew):
    anew.setenv("FASTFUSE_CPU", "torch")
    assert _cpu_library.library() is None and "PyTorch, no C library" in info()
    _cpu_library.library.cache_clear()
    anew.setenv("FASTFUSE_CPU", "portable")
    assert _cpu_library.library().instructions == "portable"
    _cpu_library.library.cache_clear()
    anew.setenv("FASTFUSE_CPU", "sse9")
    with pytest.raises(ValueError, match="FASTFUSE_CPU is 'sse9', expected torch, portable, avx2"):
        _cpu_library.library()


# The way without it: some rows decoded at a time, equal to the bit to decoding all at once, wherever the chunks end


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("storage, block_size", [*((s, 64) for s in STORAGES), ("nested", 32), ("nested", 256), ("flat", 4096)])
def test_chunks_equal_the_whole(storage, block_size, library, monkeypatch):
    """Blocks within rows, and such that reach over several (256 and 4096 against K = 192)."""
    if not library:
        monkeypatch.setattr(_cpu_library, "library", lambda: None)
    for w_dtype in DTYPES:
        view = weight(0, 133, 192, storage, w_dtype, block_size)
        for dtype in DTYPES if storage == "torchao" else [w_dtype]:
            whole = nf4_dequantize_ref(view, dtype).float()
            for chunk in (1, 64 * 40, 1 << 20):
                monkeypatch.setattr(_nf4_cpu, "CHUNK", chunk)
                got = [(row, w.clone()) for row, w in _nf4_cpu.decoded_rows(view, dtype)]
                assert [row for row, _ in got] == [sum(len(w) for _, w in got[:i]) for i in range(len(got))]
                assert torch.equal(torch.cat([w for _, w in got]), whole), (w_dtype, dtype, chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_over_several_chunks(dtype, monkeypatch):
    monkeypatch.setattr(_nf4_cpu, "CHUNK", 192 * 16)
    monkeypatch.setattr(_cpu_library, "library", lambda: None)
    check(nf4_cases.make("cpu", layers=(Layer(100, 0, bias=True),), K=192, lead=(7,), dtype=dtype))
