"""The NF4 ops in C: c/cpu/cpu_nf4.c, compiled at first use into Triton's cache folder, as Triton keeps its launchers."""

import ctypes
import functools
import hashlib
import os
import shlex
import shutil
import struct
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from fastfuse.ops._op import rows

SOURCE = Path(__file__).parent / "cpu" / "cpu_nf4.c"
FLAGS = ("-O3", "-ffp-contract=off", "-fno-math-errno", "-shared", "-fPIC", "-w")
INSTRUCTIONS = ("portable", "avx2", "avx512", "avx512_bf16")  # as ffs_cpu_isa numbers them
_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_pack = struct.Struct("6P6q2P3q4P5qdq").pack  # ffs_cpu_nf4
_NONE = {n: (0,) * (4 - n) for n in (1, 3, 4)}
_threads = torch.get_num_threads


def _alone() -> None:
    """In a forked child: the threads that OpenMP counts on are the parent's."""
    global _threads
    _threads = (1).__int__


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_alone)


@functools.cache
def library() -> ctypes.CDLL | None:
    """None where FASTFUSE_CPU is "torch", and where there is no library, of which is said why. Raises ValueError for another FASTFUSE_CPU than INSTRUCTIONS."""
    chosen = os.environ.get("FASTFUSE_CPU", "")
    if chosen and chosen not in ("torch", *INSTRUCTIONS):
        raise ValueError(f"FASTFUSE_CPU is {chosen!r}, expected torch, {', '.join(INSTRUCTIONS)}")
    if chosen == "torch" or os.name != "posix":
        return None
    try:
        made = ctypes.CDLL(str(_compiled()))
    except (OSError, subprocess.SubprocessError, ValueError) as e:
        reason = (getattr(e, "stderr", None) or str(e)).strip().split("\n")[0]
        warnings.warn(f"fastfuse: NF4 runs through PyTorch, the faster C library could not be made: {reason}", stacklevel=2)
        return None
    for name in ("linear", "linear_dx", "dequantize"):
        getattr(made, f"ffs_cpu_nf4_{name}").argtypes = [ctypes.c_char_p]
    made.instructions = INSTRUCTIONS[made.ffs_cpu_isa(INSTRUCTIONS.index(chosen) if chosen else -1)]
    return made


def _compiled() -> Path:
    """The library, named by its own hash: a broken file is made anew, and of processes that start together the last one's replaces an equal one."""
    compiler = shlex.split(os.environ.get("CC", "")) or [next(filter(None, map(shutil.which, ("gcc", "clang", "cc"))), "cc")]
    version = subprocess.run([*compiler, "--version"], capture_output=True, check=True, text=True).stdout
    sources = [path.read_bytes() for path in sorted(SOURCE.parent.glob("*.[ch]"))]
    key = hashlib.sha256(repr((sources, FLAGS, compiler, version)).encode()).hexdigest()
    home = Path(os.environ.get("TRITON_HOME") or Path.home()) / ".triton" / "cache"
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or home) / f"fastfuse-{key[:32]}"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    held = folder.stat()
    if held.st_uid != os.getuid() or held.st_mode & 0o022:
        raise ValueError(f"others can write to {folder}")
    for path in folder.glob("*.so"):
        if path.stem == hashlib.sha256(path.read_bytes()).hexdigest():
            return path
    with tempfile.TemporaryDirectory(dir=folder) as made:
        out, command = Path(made) / "out", [*compiler, *FLAGS, str(SOURCE), "-o"]
        if subprocess.run([*command, str(out), "-fopenmp"], capture_output=True).returncode:  # Apple's compiler has no OpenMP
            subprocess.run([*command, str(out)], capture_output=True, check=True, text=True)
        path = folder / f"{hashlib.sha256(out.read_bytes()).hexdigest()}.so"
        return out.replace(path)


def _call(name: str, weight, layout, N: int, K: int, x: int, y: Tensor, M: int, stride: int, dtype: torch.dtype, *adapter) -> None:
    scales = weight.scales
    n = len(scales)
    described = _pack(
        weight.packed.data_ptr(), weight.code.data_ptr(), *[t.data_ptr() for t in scales], *_NONE[n], n, _CODES.get(layout.dtype, 0), N, K, layout.block_size,
        layout.scale_block, x, y.data_ptr(), M, stride, _CODES[dtype], *(adapter or _NO_ADAPTER), _threads(),
    )  # fmt: skip
    if getattr(library(), name)(described):
        raise MemoryError(f"{name}: no memory for {M} rows of {K}")


_NO_ADAPTER = (0,) * 9 + (0.0,)


def is_for_gemm(M: int, K: int, dtype: torch.dtype) -> bool:
    """Whether PyTorch's product over a decoded copy of W is faster: short rows, where tiles of sums end too soon, and many bf16 tokens (10.5 against 11.7 ms)."""
    bf16 = dtype == torch.bfloat16 and library().instructions == "avx512_bf16"
    return (bf16 or dtype == torch.float32) and ((M >= 512 and (bf16 or K < 1024)) or (M >= 64 and K <= 256))


def linear(
    x: Tensor, weight, layout, N: int, K: int, bias: Tensor | None = None, a: Tensor | None = None, b: Tensor | None = None, scaling: float = 1.0
) -> tuple[Tensor, Tensor]:
    """(x W^T + scaling (x A^T) B^T + bias, x A^T), each rounded once.

    x: (..., K); the second result is in the widest dtype of x, A and B. weight and layout: NF4Weight and Layout, or an NF4View as both.
    """
    lead, dtype, xa_dtype = x.shape[:-1], x.dtype, x.dtype
    M, stride, R = x.numel() // K, K, 0
    if not x.is_contiguous():
        x = rows(x)
        stride = x.stride(0)
    y = x.new_empty((*lead, N))
    at_bias = at_a = at_b = of_bias = of_a = of_b = 0
    if bias is not None:
        bias = bias.contiguous()
        at_bias, of_bias = bias.data_ptr(), _CODES[bias.dtype]
    if a is not None:
        R, a, b = a.shape[0], a.contiguous(), b.contiguous()
        at_a, at_b, of_a, of_b = a.data_ptr(), b.data_ptr(), _CODES[a.dtype], _CODES[b.dtype]
        if not of_a == of_b == _CODES[dtype]:
            xa_dtype = torch.promote_types(torch.promote_types(dtype, a.dtype), b.dtype)
    xa = x.new_empty((*lead, R)) if xa_dtype is dtype else x.new_empty((*lead, R), dtype=xa_dtype)
    adapter = (at_bias, at_a, at_b, xa.data_ptr(), of_bias, of_a, of_b, _CODES[xa_dtype], R, scaling)
    _call("ffs_cpu_nf4_linear", weight, layout, N, K, x.data_ptr(), y, M, stride, dtype, *adapter)
    return y, xa


def linear_dx(dy: Tensor, weight) -> Tensor:
    """dY W of an NF4View: dy [M, N] -> [M, K]."""
    dy, (N, K) = rows(dy), weight.shape
    dx = dy.new_empty((len(dy), K))
    _call("ffs_cpu_nf4_linear_dx", weight, weight, N, K, dy.data_ptr(), dx, len(dy), dy.stride(0), dy.dtype)
    return dx


def dequantize(weight, layout, shape: tuple[int, int], dtype: torch.dtype, first: int = 0, rows: int | None = None) -> Tensor:
    """W [N, K] in dtype, or some rows of it."""
    out = torch.empty((shape[0] if rows is None else rows, shape[1]), dtype=dtype, device="cpu")
    _call("ffs_cpu_nf4_dequantize", weight, layout, *shape, 0, out, len(out), first, dtype)
    return out
