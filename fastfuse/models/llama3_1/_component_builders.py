"""Builders of Llama 3's MLP and attention."""

from torch import nn

from fastfuse.models._linear import Adapters, attention
from fastfuse.modules import FeedForward, MultiHeadAttention
from fastfuse.modules.attention import head_dim_of
from fastfuse.modules.low_precision import FrozenNF4Linear


def scale_hidden_dim_for_mlp(dim: int, multiple_of: int = 256) -> int:
    """4 * floor(2 dim / 3), rounded up to a multiple: the width of Llama's MLP where none is given."""
    hidden_dim = 4 * int(2 * dim / 3)
    return multiple_of * -(-hidden_dim // multiple_of)


def llama3_mlp(dim: int, hidden_dim: int, quantize_base: bool = False) -> FeedForward:
    """SwiGLU without biases; its three linear layers are FrozenNF4Linear with quantize_base."""
    linear = FrozenNF4Linear if quantize_base else nn.Linear
    gate, down, up = linear(dim, hidden_dim, bias=False), linear(hidden_dim, dim, bias=False), linear(dim, hidden_dim, bias=False)
    return FeedForward(gate_proj=gate, down_proj=down, up_proj=up)


def lora_llama3_mlp(
    *, dim: int, hidden_dim: int, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0, use_dora: bool = False, quantize_base: bool = False
) -> FeedForward:
    """SwiGLU without biases, an adapter on each of its three linear layers."""
    make = Adapters(lora_rank, lora_alpha, lora_dropout, use_dora, quantize_base).linear
    gate, down, up = make(dim, hidden_dim), make(hidden_dim, dim), make(dim, hidden_dim)
    return FeedForward(gate_proj=gate, down_proj=down, up_proj=up)


def lora_llama3_attention(
    lora_modules: list[str],
    pos_embeddings: nn.Module | None = None,
    *,
    embed_dim: int,
    num_heads: int,
    num_kv_heads: int,
    max_seq_len: int,
    attn_dropout: float = 0.0,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    is_causal: bool = True,
    q_norm: nn.Module | None = None,
    k_norm: nn.Module | None = None,
) -> MultiHeadAttention:
    """Attention without biases, an adapter on the projections that lora_modules names."""
    head_dim = head_dim_of(embed_dim, num_heads)
    make = Adapters(lora_rank, lora_alpha, lora_dropout, use_dora, quantize_base).chosen(lora_modules)
    return attention(
        make, embed_dim=embed_dim, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim, pos_embeddings=pos_embeddings,
        q_norm=q_norm, k_norm=k_norm, max_seq_len=max_seq_len, is_causal=is_causal, attn_dropout=attn_dropout,
    )  # fmt: skip
