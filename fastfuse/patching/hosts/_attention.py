"""What the hosts of attention to images share."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfuse.modules.attention_utils import serves_cross_attention
from fastfuse.ops import EncoderMask, cross_attention
from fastfuse.ops._op import autocast_dtype
from fastfuse.ops.cross_attention import uncovered
from fastfuse.patching.hosts._host import Host, Options, Reason, Rehearsed, Sizes, device_of


class Heads(NamedTuple):
    """What a kernel has to know of an attention. tiled: whether its masks are of tiles, else they are of image tokens."""

    dtype: torch.dtype
    queries: int
    keys: int
    dim: int
    tiled: bool = False

    def uncovered(self) -> Reason | None:
        why = uncovered(self.dtype, self.dim, self.queries // self.keys)
        return None if why is None else Reason("UNCOVERED", why)

    def unserved(self, x: Tensor, options: Options) -> Reason | None:
        """Why a call with such queries is not fused."""
        if options.backend == "torch" or serves_cross_attention(x, self.dim, self.queries // self.keys):
            return None
        return Reason("UNCOVERED", "no kernel serves such a call: its dtype, head_dim, device or a transform around it")


def attention_host(heads: Callable[[nn.Module], Heads], obstacle: Callable[[nn.Module], Reason | None], **how: Any) -> Host:
    def refuses(module: nn.Module, options: Options) -> Reason | None:
        device = device_of(module)
        return None if device is None or device.type != "cuda" or options.backend == "torch" else heads(module).uncovered()

    def rehearse(module: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
        return obstacle(module) or rehearse_attention(module, heads(module), sizes, options)

    def layout(module: nn.Module) -> str:
        of = heads(module)
        return f"{of.queries} heads over {of.keys} of {of.dim}"

    return Host(op="cross_attention", kernels="cross_attention", refuses=refuses, obstacle=obstacle, rehearse=rehearse, layout=layout, **how)


def rehearse_attention(module: nn.Module, heads: Heads, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    """On the meta device: kernels depend on neither values nor, with head_dim a multiple of 16, on strides."""
    (b, s, tiles, n), device = sizes, device_of(module)
    if device is not None and (dtype := autocast_dtype(device)):
        heads = heads._replace(dtype=dtype)
    if reason := heads.uncovered():
        return reason
    meta = {"dtype": heads.dtype, "device": "meta", "requires_grad": torch.is_grad_enabled()}
    qkv = [torch.empty(b, length, count, heads.dim, **meta) for length, count in ((s, heads.queries), *[(tiles * n, heads.keys)] * 2)]
    flags = torch.empty((b, s, 1, tiles) if heads.tiled else (b, s, tiles * n), dtype=torch.bool, device="meta")
    mask = EncoderMask.from_tiles(flags, n) if heads.tiled else EncoderMask.from_dense(flags)
    q, k, v = (t.transpose(1, 2) for t in qkv)
    return sum(cross_attention(q, k, v, seen, backend=options.named()) for seen in (mask, None)), qkv
