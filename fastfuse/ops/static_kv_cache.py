"""Keys and values of encoder tokens in tensors that stay where they are, and attention of new tokens over them."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.kernels.arguments import CacheStrides, Lengths, Strides
from fastfuse.ops._attention_ref import AttentionArgs
from fastfuse.ops._device_checks import assert_on_device, values_are_at_hand
from fastfuse.ops._fused_op import Planned, signature
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, Cost, nbytes, replaceable, route
from fastfuse.ops.cross_attention import _public_lse, attend, check_alike, check_heads, check_mask, check_tensor, served
from fastfuse.ops.encoder_mask import EncoderMask, _check_count

if HAS_TRITON:
    from fastfuse.kernels.kv_cache import kv_cache_write_kernel


class StaticKVCache:
    """Keys and values of encoder tokens for decoding, of fixed size, written in place.

    k, v: [batch_size, n_kv_heads, max_len, head_dim] in dtype.  lengths: int32 [batch_size], how many tokens each sequence holds, at the front; what
    lies behind them is never looked at.  mask: what a new token sees, [batch_size, 1, max_len], after fill(compact=False) with a mask; else None.
    is_filled is the host's own knowledge: set it to True after filling the tensors by other means, a replayed CUDA graph say.

    Nothing waits for the device. k, v and lengths are the same memory for ever, so that a CUDA graph of a decode step serves every step and
    every later fill; after fill(compact=False) with a mask it reads that mask, and holds until the next fill only.
    For inference: keys and values are kept without their graph, no gradient reaches them. Raises TypeError or ValueError for sizes and dtypes
    that make no cache.
    """

    def __init__(self, batch_size: int, n_kv_heads: int, head_dim: int, max_len: int, dtype: torch.dtype, device: torch.device | str | None = None):
        for name, n, least in (("batch_size", batch_size, 0), ("n_kv_heads", n_kv_heads, 1), ("head_dim", head_dim, 1), ("max_len", max_len, 0)):
            _check_count("StaticKVCache", name, n, least)
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"StaticKVCache: dtype is {dtype!r}, expected one of floating point")
        with torch.inference_mode(False):  # what is made in inference mode could be written in inference mode alone
            shape = (batch_size, n_kv_heads, max_len, head_dim)
            self.k, self.v = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
            self.lengths = torch.zeros(batch_size, dtype=torch.int32, device=device)
        self._held = Lengths(self.lengths)
        self.mask: EncoderMask | None = None
        self.is_filled = False

    def fill(self, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | None = None, *, compact: bool = True) -> None:
        """Replace what is held by the tokens that the mask's last row sees, which are those that every generated token sees; by all without a mask.

        k, v: [batch_size, n_kv_heads, s_e, head_dim] in the cache's dtype, any strides; under autocast any dtype, they are cast.
        mask: bool (batch_size or 1, s, s_e), True where attention is allowed, or an EncoderMask of that shape.
        compact: visible tokens move to the front, in order, and lengths says how many there are, 0 for a sequence that sees nothing. Without it
        all tokens stay in their columns, and decoding attends by `mask`; hidden ones must be finite then.
        Raises ValueError for more tokens than max_len (of those that a mask selects on a GPU or under torch.compile, an assertion of the
        device, and what is too much is left out), and for shapes, dtypes and devices other than the cache's. Nothing is written before.
        """
        self._write("StaticKVCache.fill", k, v, mask, compact, append=False)

    def append(self, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | None = None) -> None:
        """Put the tokens of a later image, those that the mask's last row sees, behind what is held; an empty cache is filled.

        Arguments and errors as of fill; ValueError also after fill(compact=False) with a mask, when there is no behind.
        """
        if self.mask is not None:
            raise ValueError("StaticKVCache.append: the cache was filled with compact=False and a mask, tokens can follow compacted ones alone")
        self._write("StaticKVCache.append", k, v, mask, True, append=True)

    def reset(self) -> None:
        """Hold nothing; the tensors stay where they are."""
        self.lengths.zero_()
        self.mask, self.is_filled = None, False

    def _write(self, op: str, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | None, compact: bool, append: bool) -> None:
        self._check_tokens(op, k, v)
        check_mask(op, mask, k)
        (b, _, max_len, _), s_e = self.k.shape, k.shape[2]
        if s_e > max_len and (mask is None or not compact):
            raise ValueError(f"{op}: k has {s_e} tokens, max_len is {max_len}")
        k, v = (t.detach().to(self.k.dtype) for t in (k, v))
        start = self.lengths if append else torch.zeros_like(self.lengths)
        places, held = None, start + s_e
        if mask is not None:
            mask = (mask if isinstance(mask, EncoderMask) else EncoderMask.from_dense(mask[:, -1:])).last_row()
            if compact:
                places, held = _places(mask.to_dense()[:, 0], start)
                mask = None
            else:
                mask = mask.widened(max_len)
                mask = mask if mask.shape[0] == b else EncoderMask.cat([mask] * b)
        if append or places is not None:
            _check_room(op, held, max_len)
        chosen = route(op, self.k, None)
        if chosen == "reference":
            _kv_cache_write_ref(self.k, self.v, k, v, places, held)
        else:
            _kv_cache_write(self.k, self.v, k, v, places, held, chosen == "interpreter")
        if mask is not None:  # hidden tokens must be finite
            for cache in (self.k, self.v):
                cache[:, :, s_e:].zero_()
        self.lengths.copy_(held.clamp(max=max_len))
        self.mask, self.is_filled = mask, True

    def _check_tokens(self, op: str, k: Tensor, v: Tensor) -> None:
        for name, t in (("k", k), ("v", v)):
            check_tensor(op, name, t, "b, n_kv_heads, s_e, head_dim")
            for dim, what in ((0, "a batch of"), (1, "heads:"), (3, "head_dim")):
                if t.shape[dim] != self.k.shape[dim]:
                    raise ValueError(f"{op}: {name} has {what} {t.shape[dim]}, the cache {self.k.shape[dim]}")
            check_alike(op, name, t, "the cache", self.k)
            if not torch.compiler.is_compiling() and any(torch._C._is_alias_of(t, own) for own in (self.k, self.v)):
                raise ValueError(f"{op}: {name} is memory of the cache, which is written while {name} is read: pass a clone")
        if k.shape != v.shape:
            raise ValueError(f"{op}: k has {k.shape[2]} tokens, v {v.shape[2]}")

    def __repr__(self) -> str:
        return f"StaticKVCache(shape={tuple(self.k.shape)}, dtype={self.k.dtype}, device={str(self.k.device)!r}, is_filled={self.is_filled})"


def _places(visible: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """(where each token goes, -1 for one that is left out: int32 [b, s_e], what is held then: int32 [b]). visible: bool [b or 1, s_e]."""
    upto = visible.cumsum(1, dtype=torch.int32)
    return torch.where(visible, start[:, None] + upto - 1, -1), start + visible.sum(1, dtype=torch.int32)


def _check_room(op: str, held: Tensor, max_len: int) -> None:
    fits = held <= max_len
    if not values_are_at_hand(held):
        assert_on_device(fits.all(), f"{op}: a sequence has more tokens than max_len={max_len}")
    elif not fits.all():
        i = int((~fits).nonzero()[0])
        raise ValueError(f"{op}: sequence {i} would hold {int(held[i])} tokens, max_len is {max_len}")


def _kv_cache_write_ref(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, places: Tensor | None, held: Tensor) -> None:
    (_, heads, max_len, d), s_e = k_cache.shape, k.shape[2]
    if not s_e:
        return
    n = torch.arange(s_e, device=k.device)
    if places is None:
        places = held[:, None] - s_e + n
    # A token that is left out goes to a place too many; then each place takes its token.
    index = torch.where((places >= 0) & (places < max_len), places, max_len).long()
    token = index.new_full((len(index), max_len + 1), -1).scatter_(1, index, n.expand_as(index))[:, :max_len, None]
    for cache, x in ((k_cache, k), (v_cache, v)):
        taken = x.gather(2, token.clamp(min=0)[:, None].expand(-1, heads, -1, d))
        cache.copy_(torch.where(token[:, None] >= 0, taken, cache))


def _on_cpu(k_cache, v_cache, k, v, places, held, _) -> None:
    """Sequence by sequence, as values are at hand: nothing but the tokens themselves is touched."""
    max_len, s_e = k_cache.shape[2], k.shape[2]
    for i, past in enumerate(held.tolist()):
        if places is None:
            n = max(0, min(s_e, max_len - past + s_e))  # as many as there is room for
            for cache, x in ((k_cache, k), (v_cache, v)):
                cache[i, :, past - s_e : past] = x[i, :, :n]
        else:
            n = ((places[i] >= 0) & (places[i] < max_len)).nonzero().flatten()
            for cache, x in ((k_cache, k), (v_cache, v)):
                cache[i].index_copy_(1, places[i, n].long(), x[i].index_select(1, n))


_ELEMENTS = 8192  # of k that a program copies, and as many of v


@Planned
def _copy(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, places: Tensor | None, held: Tensor) -> Callable[..., None]:
    """places, held: as _places gives them; places None: the tokens are the last that are held."""
    (b, heads, max_len, d), s_e = k_cache.shape, k.shape[2]
    BLOCK_D = max(16, 1 << (d - 1).bit_length())
    BLOCK_N = max(1, _ELEMENTS // BLOCK_D)
    strides = CacheStrides(*(Strides(*t.stride()[:3]) for t in (k, v)))
    write, grid = Launch(kv_cache_write_kernel, D=d, BLOCK_N=BLOCK_N, BLOCK_D=BLOCK_D, num_warps=8, **tune.OPTIONS), (-(-s_e // BLOCK_N), b * heads, 1)

    def run(k_cache, v_cache, k, v, places, held):
        write(grid, k, v, k_cache, v_cache, places, held, strides, s_e, max_len, heads)

    return run


@replaceable
def _launch(k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, places: Tensor | None, held: Tensor, interpret: bool) -> None:
    if k.numel() and k_cache.shape[2]:
        k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (k, v))
        _copy(k_cache, v_cache, k, v, None if places is None else places.contiguous(), held)


_kv_cache_write = torch.library.custom_op("fastfuse::kv_cache_write", _launch, mutates_args=("k_cache", "v_cache"), device_types="cuda")
_kv_cache_write.register_kernel("cpu")(lambda *args: (_launch if args[-1] else _on_cpu)(*args))
_kv_cache_write.register_fake(lambda *args: None)


def cross_attention_decode(
    q: Tensor, cache: StaticKVCache, *, scale: float | None = None, return_lse: bool = False, backend: str | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v of new tokens over the encoder tokens that a cache holds; each of them sees all (the cache's mask shows, where it has one).

    q: (b, hq, s, d), s mostly 1, in the cache's dtype, hq a multiple of its key heads, any strides of the first three dims.
    ->  (b, hq, s, d) in q's layout, with return_lse also log(sum(exp(scores))), fp32 (b, hq, s): 0 and inf for a sequence that holds nothing.
    scale: 1 / sqrt(d) where None. Only what is held is read, by the lengths on the device: every step is the same launches.
    Under autocast q and the cache follow its dtype; a cache of another dtype is then copied at every step.
    q alone gets a gradient, for which the cache is copied. Raises TypeError, ValueError or Unsupported before any launch.
    """
    op, key = "cross_attention_decode", None
    if type(cache) is StaticKVCache and cache.is_filled and cache.mask is None and cache._held.lengths is cache.lengths:
        key = signature((q, cache.k, cache.v, cache.lengths), (op, scale, backend))
    if key is not None and key in served:
        o, lse = served[key](_new(AttentionArgs, (q, cache.k, cache.v, cache._held, q.shape[3] ** -0.5 if scale is None else float(scale), False)))
        return (o, _public_lse(lse, q)) if return_lse else o
    _check_decode(op, q, cache)
    k, v, mask, s = cache.k, cache.v, cache.mask, q.shape[2]
    if mask is not None:
        mask = mask if s == 1 else mask.extended(s) if s else mask.narrow(0, 0)
    else:
        mask, differentiated = Lengths(cache.lengths), torch.is_grad_enabled() and q.requires_grad
        if differentiated or route(op, q, backend) == "reference":
            # These look past the lengths too, and give what they find there a weight of 0: it must not be NaN.
            held = torch.arange(k.shape[2], device=k.device) < cache.lengths[:, None]
            k, v = (torch.where(held[:, None, :, None], t, 0) for t in (k, v))
        if differentiated:
            intervals = torch.stack([torch.zeros_like(cache.lengths), cache.lengths], -1)[:, None].expand(-1, s, -1)
            mask, key = EncoderMask.from_intervals(intervals, k.shape[2]), None
    o, lse = attend(op, q, k, v, mask, scale, backend, key=key)
    return (o, _public_lse(lse, q)) if return_lse else o


_new = tuple.__new__


def _check_decode(op: str, q: Tensor, cache: StaticKVCache) -> None:
    if not isinstance(cache, StaticKVCache):
        raise TypeError(f"{op}: cache is a {type(cache).__name__}, expected a StaticKVCache")
    check_tensor(op, "q", q, "b, heads, tokens, head_dim")
    check_alike(op, "q", q, "the cache", cache.k)
    check_heads(op, q, "the cache", cache.k)
    if not cache.is_filled:
        raise ValueError(f"{op}: the cache holds nothing: fill it first, or set is_filled where a CUDA graph has")


def cross_attention_decode_ref(q: Tensor, cache: StaticKVCache, **options) -> Tensor | tuple[Tensor, Tensor]:
    """The formula, eager: cross_attention_decode with backend="torch"."""
    return cross_attention_decode(q, cache, **options, backend="torch")


def cross_attention_decode_cost(q: Tensor, cache: StaticKVCache, *, tokens: int | None = None) -> Cost:
    """q, and of k and v the `tokens` that are visible, over the whole batch (all there is room for where None), read once; o written once."""
    b, heads, max_len, d = cache.k.shape
    tokens = b * max_len if tokens is None else tokens
    return Cost(2 * nbytes(q) + 2 * tokens * heads * d * cache.k.element_size(), 4 * tokens * q.shape[1] * q.shape[2] * d)
