"""One buffer per device for what a call decodes and no call keeps: it grows to the largest weight and is shared by all layers."""

import contextlib
import threading
from collections.abc import Iterator
from math import prod

import torch
from torch import Tensor

_lock = threading.RLock()
_buffers: dict[torch.device, Tensor] = {}
_last_stream: dict[torch.device, "torch.cuda.Stream"] = {}


@contextlib.contextmanager
def scratch(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Iterator[Tensor]:
    """An uninitialised tensor for the block; everything that reads it must be launched inside.

    The lock orders the launches of several threads, a wait orders those of several streams. Inside a CUDA graph capture the
    memory comes from the graph's own pool, which lives as long as the graph: the shared buffer may grow and be replaced.
    """
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        yield torch.empty(shape, dtype=dtype, device=device)
        return
    size = prod(shape) * dtype.itemsize
    with _lock:
        if device.type == "cuda":
            stream, last = torch.cuda.current_stream(device), _last_stream.get(device)
            if last is not None and last != stream:
                stream.wait_stream(last)
            _last_stream[device] = stream
        buffer = _buffers.get(device)
        if buffer is None or buffer.numel() < size:
            _buffers.pop(device, None)
            buffer = None  # freed before the larger one is asked for
            buffer = torch.empty(size, dtype=torch.uint8, device=device)
            if not _in_private_pool(buffer):
                _buffers[device] = buffer
        elif device.type == "cuda":
            buffer.record_stream(stream)  # when it is freed, not before this stream is done with it
        yield buffer[:size].view(dtype).view(shape)


def _in_private_pool(buffer: Tensor) -> bool:
    """Whether a CUDA graph's pool holds it, as in the warm-up of torch.compile(mode="reduce-overhead"), which is no capture yet."""
    if buffer.device.type != "cuda":
        return False
    address = buffer.data_ptr()
    for segment in torch.cuda.memory_snapshot():
        if segment["address"] <= address < segment["address"] + segment["total_size"]:
            return tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
    return False


def scratch_bytes(device: str | torch.device) -> int:
    """How much the device's buffer holds."""
    return next((b.numel() for d, b in _buffers.items() if d == torch.empty(0, device=device).device), 0)


@contextlib.contextmanager
def freeing_scratch() -> Iterator[None]:
    """Free the buffers of decoded weights on the way out: 117 MB per device after a 14336 x 4096 weight in 16 bits.

    They are otherwise kept for the process, since the next layer needs one again. CUDA graphs captured inside stay valid.
    """
    try:
        yield
    finally:
        with _lock:
            _buffers.clear()
            _last_stream.clear()
