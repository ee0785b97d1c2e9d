"""Cross-attention of Llama-3.2-Vision between its projections, and the ways it is run."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from operator import attrgetter
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from bench.harness import Tensors, words
from fastfuse import ops

BLIND = 0.02  # of the text stands before the first image and sees nothing


@dataclass(frozen=True)
class Size:
    tokens: int  # of text, of a sequence; 1: a step of decoding
    images: int = 1
    shown: tuple[int, ...] = (4,)  # tiles of an image that are no padding, for the sequences of the batch in turn
    tiles: int = 4  # of an image, padding included
    tile: int = 1601  # tokens of a tile
    batch: int = 1
    in_turn: bool = False  # text between the images sees the last one alone; else all images come first, and all are seen
    masked: bool = True  # else no mask is given: every row sees everything
    hq: int = 32
    hkv: int = 8
    d: int = 128

    @property
    def s_e(self) -> int:
        return self.images * self.tiles * self.tile

    @property
    def group(self) -> int:
        return self.hq // self.hkv

    @property
    def decode(self) -> bool:
        return self.tokens == 1

    @property
    def blind(self) -> int:
        return 0 if self.decode or not self.masked else max(1, round(BLIND * self.tokens))

    def segments(self) -> Iterator[tuple[int, int, slice]]:
        """First and last row + 1 of what sees the same, and the images seen."""
        n = self.images if self.in_turn else 1
        ends = [self.blind + (self.tokens - self.blind) * part // n for part in range(n + 1)]
        for part in range(n):
            yield ends[part], ends[part + 1], slice(part, part + 1) if self.in_turn else slice(None)

    def seen_tiles(self, device: str) -> Tensor:
        """bool [batch, tokens, images, tiles]."""
        seen = torch.zeros(self.batch, self.tokens, self.images, self.tiles, dtype=torch.bool, device=device)
        for n in range(self.batch):
            for start, stop, images in self.segments():
                seen[n, start:stop, images, : self.shown_of(n)] = True
        return seen

    def shown_of(self, sequence: int) -> int:
        return self.shown[sequence % len(self.shown)] if self.masked else self.tiles

    @property
    def shown_tokens(self) -> int:
        """Encoder tokens that are no padding, over the batch."""
        return sum(self.shown_of(n) for n in range(self.batch)) * self.images * self.tile

    @property
    def visible(self) -> float:
        """Share of the pairs of text and encoder tokens that see each other; rows that see nothing count as hidden."""
        seen_at_once = 1 / self.images if self.in_turn else 1
        rows = (self.tokens - self.blind) / self.tokens
        return rows * seen_at_once * self.shown_tokens / (self.batch * self.s_e)

    @property
    def intervals(self) -> bool:
        """Whether what a row sees lies together."""
        return self.images == 1 or self.in_turn or set(self.shown) == {self.tiles}

    def __str__(self) -> str:
        low, high = min(self.shown), max(self.shown)
        seen = f"{low if low == high else f'{low}..{high}'}/{self.tiles} tiles" if self.masked else "no mask"
        batch, text = (self.batch > 1 or self.decode) and f"b{self.batch}", not self.decode and f"s{self.tokens}"
        return words(batch, text, f"s_e{self.s_e} H{self.hq}/{self.hkv} d{self.d} {seen}", self.in_turn and "in turn")


class Call:
    """What one layer is given, and the mask in each form that a provider takes. A form is made at its first use, which is not timed."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str, requires_grad: bool = False):
        def heads(n, h):
            """[batch, h, n, d] as a projection leaves it; a cache has its heads apart."""
            if size.decode and n != 1:
                return torch.randn(size.batch, h, n, size.d, dtype=dtype, device=device)
            return torch.randn(size.batch, n, h, size.d, dtype=dtype, device=device).transpose(1, 2)

        self.size, self.dtype, self.device = size, dtype, device
        self.q, self.k, self.v = (heads(n, h).requires_grad_(requires_grad) for n, h in ((size.tokens, size.hq), (size.s_e, size.hkv), (size.s_e, size.hkv)))

    @property
    def nbytes(self) -> int:
        """What the leanest provider reads: with padding counted as well, fewer sets of inputs would be made, and fit in the L2."""
        return self.q.nbytes + 2 * self.size.shown_tokens * self.size.hkv * self.size.d * self.k.element_size()

    @cached_property
    def seen_tiles(self) -> Tensor:
        return self.size.seen_tiles(self.device)

    @cached_property
    def dense(self) -> Tensor | None:
        """bool [batch, tokens, s_e], as torchtune gives it to its layers."""
        return self.seen_tiles.repeat_interleave(self.size.tile, 3).flatten(2) if self.size.masked else None

    @cached_property
    def bias(self) -> Tensor | None:
        """[batch, 1, tokens, s_e], added to the scores, as transformers makes it of the tiles: a row that sees nothing is open to everything."""
        if self.dense is None:
            return None
        hidden = ~self.dense & self.dense.any(-1, keepdim=True)
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, torch.finfo(self.dtype).min)[:, None]

    def opened(self) -> "Call":
        """By transformers' rule: rows that see nothing see everything."""
        call = copy.copy(self)
        call.dense = self.dense | ~self.dense.any(-1, keepdim=True)
        return call

    @cached_property
    def encoder_mask(self) -> "ops.EncoderMask | None":
        return self.mask_from_tiles() if self.size.masked else None

    def mask_from_tiles(self, kind: str = "auto") -> "ops.EncoderMask":
        return ops.EncoderMask.from_tiles(self.seen_tiles, self.size.tile, kind=kind)

    @cached_property
    def interval_mask(self) -> "ops.EncoderMask":
        return self.mask_from_tiles("interval")

    @cached_property
    def block_mask(self) -> BlockMask | None:
        return block_mask(self.seen_tiles.flatten(2), self.size) if self.size.masked else None

    @cached_property
    def compacted(self) -> "ops.StaticKVCache":
        return self._cache(compact=True)

    @cached_property
    def in_place(self) -> "ops.StaticKVCache":
        return self._cache(compact=False)

    def _cache(self, compact: bool) -> "ops.StaticKVCache":
        cache = self.empty_cache()
        cache.fill(self.k, self.v, self.encoder_mask, compact=compact)
        return cache

    def empty_cache(self) -> "ops.StaticKVCache":
        return ops.StaticKVCache(self.size.batch, self.size.hkv, self.size.d, self.size.s_e, self.dtype, device=self.device)

    @cached_property
    def shown_cache(self) -> tuple[Tensor, Tensor]:
        return self.shown(slice(None))

    def shown(self, images: slice) -> tuple[Tensor, Tensor]:
        """Keys and values of these images' tiles without padding: a view where they lie together."""
        n = self.size.shown_of(0) * self.size.tile
        return tuple(t.unflatten(2, (self.size.images, -1))[:, :, images, :n].flatten(2, 3) for t in (self.k, self.v))


# A peer takes a Call and gives [batch, tokens, hq * d], what the output projection takes.
Peer = Callable[[Call], Tensor]


def tokens_first(y: Tensor) -> Tensor:
    return y.transpose(1, 2).flatten(2)


def fused(c: Call, mask: Callable[[Call], object] = attrgetter("encoder_mask")) -> Tensor:
    return tokens_first(ops.cross_attention(c.q, c.k, c.v, mask(c)))


def fused_decode(c: Call, cache: Callable[[Call], object] = attrgetter("compacted")) -> Tensor:
    return tokens_first(ops.cross_attention_decode(c.q, cache(c)))


def _expanded(t: Tensor, group: int) -> Tensor:
    b, heads, n, d = t.shape
    return t.unsqueeze(2).expand(b, heads, group, n, d).flatten(1, 2)


def eager(c: Call) -> Tensor:
    """torchtune's layer: the blind rows found and opened in every layer, keys and values copied to every query head, the rows zeroed after."""
    return _torchtune(c.q, c.k, c.v, c.dense)


def _torchtune(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    skip = None
    if mask is not None:
        skip = (~mask).all(-1, keepdim=True)
        mask = mask.masked_fill(skip, True)[:, None]
    group = q.shape[1] // k.shape[1]
    y = tokens_first(F.scaled_dot_product_attention(q, _expanded(k, group), _expanded(v, group), attn_mask=mask))
    return y if skip is None else y.masked_fill(skip, 0)


def transformers(c: Call) -> Tensor:
    """What Mllama calls with attn_implementation="sdpa", as the installed version has it."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    layer = SimpleNamespace(num_key_value_groups=c.size.group)
    y, _ = sdpa_attention_forward(layer, c.q, c.k, c.v, c.bias, scaling=c.size.d**-0.5, is_causal=False)
    return y.flatten(2)


# Backend and whether it takes fewer key heads than query heads.
SDPA = {
    "sdpa_flash": (SDPBackend.FLASH_ATTENTION, True),
    "sdpa_cudnn": (SDPBackend.CUDNN_ATTENTION, True),
    "sdpa_efficient": (SDPBackend.EFFICIENT_ATTENTION, False),
    "sdpa_math": (SDPBackend.MATH, True),
}


def sdpa(name: str, c: Call) -> Tensor:
    """One backend of PyTorch with the bool mask as it is. What it makes of rows that see nothing is its own affair: NaN is a wrong result."""
    return tokens_first(_sdpa(name, c.size, c.q, c.k, c.v, None if c.dense is None else c.dense[:, None]))


def _sdpa(name: str, size: Size, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    backend, grouped = SDPA[name]
    # One token: the query heads of a group as the rows of one head, so that nothing of the cache is copied.
    rows = q.reshape(size.batch, size.hkv, size.group, size.d) if size.decode else q
    if not grouped and not size.decode:
        k, v = _expanded(k, size.group), _expanded(v, size.group)
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, enable_gqa=grouped and not size.decode)
    return y.reshape(q.shape) if size.decode else y


def sliced(c: Call) -> Tensor:
    """Flash attention without a mask, over the rows that see something and the keys they see: for who knows on the host where they lie."""
    if c.size.decode:
        return tokens_first(_sdpa("sdpa_flash", c.size, c.q, *c.shown_cache))
    parts = [tokens_first(_sdpa("sdpa_flash", c.size, c.q[:, :, start:stop], *c.shown(images))) for start, stop, images in c.size.segments()]
    if c.size.blind:
        parts.insert(0, parts[0].new_zeros(c.size.batch, c.size.blind, parts[0].shape[2]))
    return torch.cat(parts, 1) if len(parts) > 1 else parts[0]


def block_mask(seen_tiles: Tensor, size: Size) -> BlockMask:
    """seen_tiles: bool [batch, tokens, images * tiles]. Of a tile's flag, which stays in the L1 where a whole bool mask would not."""
    tile = size.tile

    def mask_mod(b, _h, row, token):
        return seen_tiles[b, row, token // tile]

    return create_block_mask(mask_mod, size.batch, None, size.tokens, size.s_e, device=seen_tiles.device)


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask | None) -> Tensor:
    return tokens_first(flex_attention(q, k, v, block_mask=mask, enable_gqa=True))


def exact(c: Call, dy: Tensor | None = None) -> Tensors:
    """The formula in float64, and with dy its gradients: a key head at a time, since all scores of a long text would not fit."""
    size, parts = c.size, []
    for head in range(size.hkv):
        own = slice(head * size.group, (head + 1) * size.group)
        q, k, v = (t.detach().double().requires_grad_(dy is not None) for t in (c.q[:, own], c.k[:, head : head + 1], c.v[:, head : head + 1]))
        scores = q @ k.transpose(2, 3) * size.d**-0.5
        if c.dense is not None:
            seeing = c.dense.any(-1)[:, None, :, None]
            scores = scores.masked_fill(~c.dense[:, None] & seeing, -torch.inf)
        y = scores.softmax(-1) @ v
        if c.dense is not None:
            y = y.masked_fill(~seeing, 0)
        if dy is None:
            parts.append((y,))
            continue
        grad = dy.double().unflatten(2, (size.hq, size.d)).transpose(1, 2)[:, own]
        parts.append((y.detach(), *torch.autograd.grad(y, (q, k, v), grad)))
    y, *grads = (torch.cat(of_heads, 1) for of_heads in zip(*parts, strict=True))
    return tokens_first(y), *grads
