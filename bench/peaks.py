"""What the device at hand can do at most: bandwidth, matrix rate, launch time. Floors are drawn from these.

python -m bench.peaks     measure and print
"""

import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import triton
from torch.nn import functional as F

from bench import arguments


@dataclass(frozen=True)
class Peaks:
    """Ceilings of one device."""

    device: str
    source: str  # "measured" or "data sheet"
    bytes_per_s: float  # device memory, read + written
    flops_per_s: Mapping[str, float]  # dtype -> dense matrix rate
    launch_us: float  # one empty kernel in a CUDA graph; 0 where a launch costs no floor or is not known


# NVIDIA's data sheets of the SXM modules, dense rates. They give no launch time.
DATA_SHEET = {
    "H200": Peaks("H200 SXM", "data sheet", 4.8e12, {"bfloat16": 989e12, "float16": 989e12, "float32": 67e12}, 0.0),
}


def measure(device: str) -> Peaks:
    """Peaks of "cuda" or "cpu". A few seconds."""
    gpu = device == "cuda"
    seconds = _cuda_seconds if gpu else _cpu_seconds
    n_bytes, sizes, half = (2**31, (4096, 8192, 16384), ("float16",)) if gpu else (2**27, (1024, 2048), ())
    bandwidth = _copy_rate(n_bytes, device, seconds)
    # The best of several sizes: a library is not fastest at its largest.
    rates = {
        name: max(_matmul_rate(n, getattr(torch, name), device, seconds) for n in (sizes[:2] if name == "float32" else sizes))
        for name in ("bfloat16", *half, "float32")
    }
    # Narrow numbers are exact in fp32: a CPU without bf16 products takes 20 times longer for them than after widening both sides.
    rates = {name: max(rate, rates["float32"]) for name, rate in rates.items()}
    return Peaks(device_name(device), "measured", bandwidth, rates, _launch_us() if gpu else 0.0)


def _copy_rate(n_bytes: int, device: str, seconds: Callable) -> float:
    source = torch.empty(n_bytes, dtype=torch.uint8, device=device).random_()
    target = torch.empty_like(source)
    return 2 * n_bytes / seconds(lambda: target.copy_(source))


def _matmul_rate(n: int, dtype: torch.dtype, device: str, seconds: Callable) -> float:
    # Random data: zeros switch fewer transistors and run faster than any real product.
    a, b = (torch.randn(n, n, dtype=dtype, device=device) for _ in range(2))
    return 2 * n**3 / seconds(lambda: F.linear(a, b))


def _cuda_seconds(fn: Callable, repeats: int = 10) -> float:
    for _ in range(3):
        fn()
    return statistics.median(event_ms(fn, repeats)) * 1e-3


def event_ms(fn: Callable, n: int, before: Callable = lambda: None) -> list[float]:
    """Of each of n calls, between two CUDA events; `before` each is no part of it. Returns when the device is done."""
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(n)]
    for start, end in events:
        before()
        start.record()
        fn()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def _cpu_seconds(fn: Callable, repeats: int = 5) -> float:
    fn()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        fn()
        times.append(time.perf_counter() - start)
    return min(times)  # a CPU is shared with other processes: what they take is not part of its peak


@triton.jit
def _empty_kernel(x_ptr):
    pass


def _launch_us(launches: int = 200) -> float:
    """Time from one kernel to the next inside a graph: no call made of one kernel takes less."""
    x = torch.zeros(16, device="cuda")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        _empty_kernel[(1,)](x)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(launches):
            _empty_kernel[(1,)](x)
    return _cuda_seconds(graph.replay) / launches * 1e6


def device_name(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    try:
        with open("/proc/cpuinfo") as f:
            name = next(line.split(":", 1)[1].strip() for line in f if line.startswith("model name"))
    except (OSError, StopIteration):
        name = "CPU"
    return f"{name}, {torch.get_num_threads()} threads"


def clocks(device: str) -> str | None:
    """SM and memory clocks as they stand, read only."""
    if device != "cuda":
        return None
    uuid = getattr(torch.cuda.get_device_properties(), "uuid", None)
    query = ["nvidia-smi", "--query-gpu=clocks.sm,clocks.mem", "--format=csv,noheader"]
    return output_of([*query, f"--id=GPU-{uuid}"]) or output_of(query)


def output_of(command: list[str]) -> str | None:
    try:
        return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def describe(peaks: Peaks) -> str:
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in peaks.flops_per_s.items())
    return f"{peaks.device} ({peaks.source}): {peaks.bytes_per_s / 1e12:.3f} TB/s, {rates}, launch {peaks.launch_us:.2f} us"


def main() -> None:
    arguments(__doc__).parse_args()
    peaks = measure("cuda" if torch.cuda.is_available() else "cpu")
    print(describe(peaks))
    print(json.dumps(asdict(peaks)))


if __name__ == "__main__":
    main()
