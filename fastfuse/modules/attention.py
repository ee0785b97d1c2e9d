"""Multi-head attention with grouped keys, rotary positions, a static cache, and cross-attention."""

import logging

import torch
from torch import Tensor, nn

from fastfuse.errors import InvalidArgument
from fastfuse.modules.attention_utils import sdpa_or_flex_attention
from fastfuse.modules.kv_cache import KVCache
from fastfuse.ops import EncoderMask

log = logging.getLogger(__name__)


def head_dim_of(embed_dim: int, num_heads: int, num_kv_heads: int | None = None) -> int:
    """The width of a head. Raises InvalidArgument, a ValueError, where num_kv_heads does not divide num_heads, or num_heads does not divide embed_dim."""
    if num_kv_heads is not None and (num_kv_heads < 1 or num_heads % num_kv_heads):
        raise InvalidArgument(f"num_heads ({num_heads}) must be divisible by num_kv_heads ({num_kv_heads})")
    if embed_dim < 1 or num_heads < 1 or embed_dim % num_heads:
        raise InvalidArgument(f"embed_dim ({embed_dim}) must be divisible by num_heads ({num_heads})")
    return embed_dim // num_heads


class MultiHeadAttention(nn.Module):
    """Attention of x over itself, over y, or over a cache, with num_kv_heads <= num_heads (https://arxiv.org/abs/2305.13245).

    q_proj, k_proj, v_proj, output_proj: modules over the last dim. pos_embeddings rotates queries and keys before
    q_norm and k_norm, which normalise each head. is_causal applies where neither a mask nor an enabled cache is there.
    Raises ValueError where num_kv_heads does not divide num_heads, num_heads does not divide embed_dim, attn_dropout
    is outside 0..1, or only one of q_norm and k_norm is given.
    """

    def __init__(
        self,
        *,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        pos_embeddings: nn.Module | None = None,
        q_norm: nn.Module | None = None,
        k_norm: nn.Module | None = None,
        kv_cache: KVCache | None = None,
        max_seq_len: int = 4096,
        is_causal: bool = True,
        attn_dropout: float = 0.0,
    ):
        super().__init__()
        head_dim_of(embed_dim, num_heads, num_kv_heads)
        if not 0.0 <= attn_dropout <= 1.0:
            raise ValueError(f"attn_dropout ({attn_dropout}) must be between 0.0 and 1.0")
        if (q_norm is None) != (k_norm is None):
            raise ValueError(f"q and k norm must be set together: {'q_norm' if q_norm is None else 'k_norm'} is None")
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads
        self.embed_dim = embed_dim
        self.attn_dropout = attn_dropout
        self.head_dim = head_dim
        self.max_seq_len = max_seq_len
        self.is_causal = is_causal
        self.kv_cache = kv_cache
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.q_norm = q_norm
        self.k_norm = k_norm
        self.pos_embeddings = pos_embeddings
        self.cache_enabled = False
        self._attention_call = sdpa_or_flex_attention

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Give the layer an enabled cache, beside its key projection; a cache that is there already stays, with a warning."""
        if self.kv_cache is not None:
            log.warning("Key value caches are already setup. You cannot call ``setup_caches()`` twice. Skipping.")
            return
        weight = getattr(self.k_proj, "weight", None)
        device = weight.device if isinstance(weight, Tensor) else None
        with torch.device(device or torch.get_default_device()):
            self.kv_cache = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype)
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Raises RuntimeError without a cache."""
        if self.kv_cache is None:
            raise RuntimeError("Key value caches are not setup. Call ``setup_caches()`` first.")
        self.kv_cache.reset()

    def forward(self, x: Tensor, y: Tensor | None = None, *, mask: Tensor | EncoderMask | None = None, input_pos: Tensor | None = None) -> Tensor:
        """x: [b, s_x, embed_dim], y: [b, s_y, embed_dim], the source of keys and values (x itself for self-attention), or None
        to attend to the cache alone  ->  [b, s_x, embed_dim].

        mask: [b or 1, s_x, s_k], bool (True may attend), float (added to the scores) or an EncoderMask; s_k is s_y, or the cache's
        length where one is enabled. input_pos: int [b or 1, s_x] or [s_x], the positions of the tokens; their indices where None.
        Raises ValueError without y and without an enabled cache.
        """
        cache = self.kv_cache if self.cache_enabled else None
        if y is None and cache is None:
            raise ValueError("Must provide y input or use kv_cache to enable streaming decoding")
        q, k, v = project(self, x, y, cache, input_pos)
        if isinstance(mask, EncoderMask) and self._attention_call is not sdpa_or_flex_attention:
            mask = mask.to_dense()
        out = self._attention_call(
            q, k, v,
            mask=mask,
            dropout_p=self.attn_dropout if self.training else 0.0,
            is_causal=cache is None and mask is None and self.is_causal,
        )  # fmt: skip
        return self.output_proj(out.transpose(1, 2).flatten(2))


def project(attn: nn.Module, x: Tensor, y: Tensor | None, cache: KVCache | None, input_pos: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of x, and keys and values of y or, without y, of the cache, for a MultiHeadAttention or torchtune's: each [b, heads, s, head_dim]."""
    q = _heads(attn, attn.q_proj(x), attn.num_heads, input_pos, attn.q_norm)
    if y is None:
        return q, cache.k_cache, cache.v_cache
    k = _heads(attn, attn.k_proj(y), attn.num_kv_heads, input_pos, attn.k_norm)
    v = attn.v_proj(y).unflatten(-1, (attn.num_kv_heads, attn.head_dim)).transpose(1, 2)
    if cache is None:
        return q, k, v
    if torch.is_autocast_enabled(x.device.type):  # norms leave another dtype than projections do
        k, v = k.to(cache.k_cache.dtype), v.to(cache.v_cache.dtype)
    return q, *cache.update(k, v)


def _heads(attn: nn.Module, projected: Tensor, heads: int, input_pos: Tensor | None, norm: nn.Module | None) -> Tensor:
    """[b, s, heads * head_dim] -> [b, heads, s, head_dim], rotated, then normalised."""
    h = projected.unflatten(-1, (heads, attn.head_dim))
    if attn.pos_embeddings is not None:
        h = attn.pos_embeddings(h, input_pos=input_pos)
    h = h.transpose(1, 2)
    return h if norm is None else norm(h)
