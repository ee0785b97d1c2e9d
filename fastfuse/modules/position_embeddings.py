"""Rotary position embeddings (https://arxiv.org/abs/2104.09864) in Meta's layout: adjacent pairs rotate."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def rotate_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the pairs (2k, 2k+1) of x's last dim by the angles whose cos and sin are cos_sin[..., k, :], in fp32."""
    pairs = x.to(torch.promote_types(x.dtype, torch.float32)).unflatten(-1, (-1, 2))
    a, b = pairs.unbind(-1)
    cos, sin = cos_sin.unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).type_as(x)


class _Rotary(nn.Module):
    """Keeps `theta` and `cache` (cos, sin) in fp32 whatever the model is cast to, and builds them when it leaves the meta device."""

    def rope_init(self) -> None:
        self.register_buffer("theta", self._theta(), persistent=False)
        self.build_rope_cache()

    def _apply(self, fn, recurse=True):
        theta, cache = self.theta, self.cache
        super()._apply(fn, recurse)
        device = self.cache.device
        if cache.is_meta and not self.cache.is_meta:
            with torch.device(device):
                self.rope_init()
        elif not cache.is_meta:  # moved, not cast (bf16 factors are up to 4e-3 off) and not emptied by to_empty
            self.theta, self.cache = theta.to(device), cache.to(device)
        return self


class RotaryPositionalEmbeddings(_Rotary):
    """Rotation by position * base^(-2k / dim).

    dim: head width. The factors of positions 0..max_seq_len-1 are precomputed in fp32 and are not in the state dict.
    """

    def __init__(self, dim: int, max_seq_len: int = 4096, base: int = 10_000):
        super().__init__()
        self.dim = dim
        self.max_seq_len = max_seq_len
        self.base = base
        self.rope_init()

    def _theta(self) -> Tensor:
        return 1.0 / self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32)[: self.dim // 2] / self.dim)

    def build_rope_cache(self, max_seq_len: int | None = None) -> None:
        """Precompute cos and sin, fp32 [max_seq_len, dim / 2, 2]."""
        positions = torch.arange(max_seq_len or self.max_seq_len, dtype=torch.float32, device=self.theta.device)
        angles = torch.outer(positions, self.theta)
        self.register_buffer("cache", torch.stack([angles.cos(), angles.sin()], -1), persistent=False)

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """x: [b, s, heads, dim]  ->  the same, rotated, in x's dtype.

        input_pos: int [b, s], [s], or [b] for one token each; 0..s-1 where None. A position the cache does not hold
        raises IndexError on a CPU (on a GPU it is an assertion on the device), another number of positions than tokens RuntimeError.
        """
        s = x.shape[1]
        # embedding rather than indexing, which takes a negative position from the table's end
        factors = self.cache[:s] if input_pos is None else F.embedding(input_pos, self.cache.flatten(1))
        factors = factors.view(-1, s, 1, x.shape[3] // 2, 2)
        if factors.shape[0] not in (1, x.shape[0]):
            n, b = factors.shape[0], x.shape[0]
            raise RuntimeError(f"The size of tensor a ({b}) must match the size of tensor b ({n}) at non-singleton dimension 0: x has {b} rows, input_pos {n}")
        return rotate_pairs(x, factors)


class Llama3ScaledRoPE(RotaryPositionalEmbeddings):
    """Rotary embeddings with Llama 3.1's stretched low frequencies.

    A frequency with a wavelength above old_context_len / low_freq_factor is divided by scale_factor, one below
    old_context_len / high_freq_factor stays, between them the two are blended. On the meta device nothing is built
    until rope_init() runs on a real one.
    """

    def __init__(
        self,
        dim: int,
        max_seq_len: int = 4096,
        base: int = 10_000,
        scale_factor: int = 8,
        low_freq_factor: int = 1,
        high_freq_factor: int = 4,
        old_context_len: int = 8192,
    ):
        self.scale_factor = scale_factor
        self.low_freq_factor = low_freq_factor
        self.high_freq_factor = high_freq_factor
        self.old_context_len = old_context_len
        super().__init__(dim, max_seq_len, base)

    @property
    def is_cache_built(self) -> bool:
        return not self.cache.is_meta

    def _theta(self) -> Tensor:
        freqs = super()._theta()
        wavelength = 2 * math.pi / freqs
        blend = (self.old_context_len / wavelength - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        blend = blend.clamp(0, 1)
        return (1 - blend) * freqs / self.scale_factor + blend * freqs

    def forward(self, x: Tensor, *, input_pos: Tensor | None = None) -> Tensor:
        """As RotaryPositionalEmbeddings. Raises RuntimeError before rope_init() has run on a real device."""
        if not self.is_cache_built:
            raise RuntimeError("RoPE cache is not built. Please call rope_init() first.")
        return super().forward(x, input_pos=input_pos)


def patch_grid(tile_size: int, patch_size: int) -> int:
    """Patches along a tile's side. Raises ValueError for sizes that are not positive."""
    if tile_size <= 0:
        raise ValueError(f"tile_size must be > 0. Got tile_size={tile_size}")
    if patch_size <= 0:
        raise ValueError(f"patch_size must be > 0. Got patch_size={patch_size}")
    return tile_size // patch_size


class VisionRotaryPositionalEmbeddings(_Rotary):
    """Axial rotation for the patches of a tile: half of each head by column + 1, half by row + 1, the CLS token not at all.

    dim: head width. Every tile of (tile_size / patch_size)^2 patches and one CLS token is rotated alike.
    """

    def __init__(self, patch_size: int, tile_size: int, dim: int, base: int = 10_000, append_cls_token: bool = True):
        super().__init__()
        self.patch_grid_size = patch_grid(tile_size, patch_size)
        self.dim = dim
        self.base = base
        self.append_cls_token = append_cls_token
        self.rope_init()

    def _theta(self) -> Tensor:
        dim = self.dim // 2
        return 1.0 / self.base ** (torch.arange(0, dim, 2, dtype=torch.float32)[: dim // 2] / dim)

    def build_rope_cache(self) -> None:
        """Precompute cos and sin, fp32 [patches + 1, dim / 2, 2]."""
        grid = self.patch_grid_size
        patch = torch.arange(grid * grid, device=self.theta.device)
        angles = torch.cat([torch.outer(p + 1.0, self.theta) for p in (patch % grid, patch // grid)], -1)
        cls = angles.new_zeros(1, angles.shape[1])
        angles = torch.cat([angles, cls] if self.append_cls_token else [cls, angles])
        self.register_buffer("cache", torch.stack([angles.cos(), angles.sin()], -1), persistent=False)

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        """x: [b, tiles * (patches + 1), heads, dim]  ->  the same, rotated. Keyword arguments are ignored."""
        tiles = x.unflatten(1, (-1, self.cache.shape[0]))
        return rotate_pairs(tiles, self.cache[:, None]).flatten(1, 2)
