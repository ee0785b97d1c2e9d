"""Builders of Llama 3's MLP and attention."""

from collections.abc import Callable

from torch import nn

from fastfuse.models._linear import Adapters, attention
from fastfuse.modules import FeedForward, MultiHeadAttention
from fastfuse.modules.attention import head_dim_of


def scale_hidden_dim_for_mlp(dim: int, multiple_of: int = 256) -> int:
    """4 * floor(2 dim / 3), rounded up to a multiple: the width of Llama's MLP where none is given."""
    hidden_dim = 4 * int(2 * dim / 3)
    return multiple_of * -(-hidden_dim // multiple_of)


def swiglu(linear: Callable[..., nn.Module], dim: int, hidden_dim: int) -> FeedForward:
    """Llama's MLP of layers that linear(in_dim, out_dim) makes, in the order that seeds depend on."""
    return FeedForward(gate_proj=linear(dim, hidden_dim), down_proj=linear(hidden_dim, dim), up_proj=linear(dim, hidden_dim))


def llama3_mlp(dim: int, hidden_dim: int, quantize_base: bool = False) -> FeedForward:
    """SwiGLU without biases; its three linear layers are FrozenNF4Linear with quantize_base."""
    return swiglu(Adapters(quantize_base=quantize_base).plain, dim, hidden_dim)


def lora_llama3_mlp(
    *, dim: int, hidden_dim: int, lora_rank: int, lora_alpha: float, lora_dropout: float = 0.0, use_dora: bool = False, quantize_base: bool = False
) -> FeedForward:
    """SwiGLU without biases, an adapter on each of its three linear layers."""
    return swiglu(Adapters(lora_rank, lora_alpha, lora_dropout, use_dora, quantize_base).linear, dim, hidden_dim)


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
    arguments = locals()
    make = Adapters.taken_from(arguments).chosen(arguments.pop("lora_modules"))
    return attention(make, head_dim=head_dim_of(embed_dim, num_heads), **arguments)
