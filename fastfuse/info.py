"""What is installed, what it runs on, and which kernels cover it."""

import importlib.metadata
import importlib.util
import platform
from pathlib import Path

import torch

import fastfuse
from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops._cpu_library import library
from fastfuse.ops._op import HAS_TRITON, INTERPRET, backend_for

PACKAGES = ("torch", "triton", "torchao", "transformers", "peft", "bitsandbytes", "accelerate")


def info() -> str:
    lines = [f"fastfuse {fastfuse.__version__}, Python {platform.python_version()} on {platform.system()} {platform.machine()}"]
    lines += [f"  {name:13} {_version(name)}" for name in PACKAGES]
    if torch.cuda.is_available():
        devices = [(torch.device("cuda", i), torch.cuda.get_device_name(i)) for i in range(torch.cuda.device_count())]
    else:
        devices = [(torch.device("cpu"), "CPU, no GPU found")]
    for device, name in devices:
        lines.append(f"{device}: {name}: backend {backend_for(device)}{' (kernels by request, TRITON_INTERPRET is set)' if INTERPRET else ''}")
        lines += [f"  {op:20} {_coverage(op, device)}" for op in tuned_ops()]
    lines.append(f"NF4 on the CPU: {f'the C library, {library().instructions}' if library() else 'PyTorch, no C library'}")
    return "\n".join(lines)


def tuned_ops() -> list[str]:
    """Ops that have launch rows."""
    return sorted(path.stem for path in Path(tune.__file__).parent.glob("*.json"))


def _coverage(op: str, device: torch.device) -> str:
    rows = tune.table(op)
    have = ", ".join(f"{arch} {sum(r['arch'] == arch for r in rows)}" for arch in sorted({r["arch"] for r in rows} - {"interpreter"}))
    if device.type != "cuda":
        return f"launch rows for {have}"
    if not HAS_TRITON:
        return "not covered: the triton package is not installed"
    arch = tune.arch_of(device)
    try:
        family = tune.covering_arch(op, arch)
    except Unsupported as e:
        return f"not covered: {e}"
    measured = sum(r["arch"] == family and "us" in r for r in rows)
    return f"covered: {arch} uses {sum(r['arch'] == family for r in rows)} rows of {family}, {measured} of them measured; rows for {have}"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
