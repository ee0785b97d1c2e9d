"""The one place that decides what kind of linear layer a builder puts where."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from typing import Any, get_args

from torch import nn

from fastfuse.modules import MultiHeadAttention
from fastfuse.modules.attention import head_dim_of
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import LORA_ATTN_MODULES, DoRALinear, LoRALinear


@dataclass(frozen=True)
class Adapters:
    """What builders are told about adapters and NF4 weights: the fields are their keyword arguments. By default nothing."""

    lora_rank: int = 8
    lora_alpha: float = 16
    lora_dropout: float = 0.0
    use_dora: bool = False
    quantize_base: bool = False
    quantization_kwargs: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> "Adapters":
        """What a builder's arguments say, which are taken out of the dict."""
        return cls(**{f.name: arguments.pop(f.name) for f in fields(cls) if f.name in arguments})

    def linear(self, in_dim: int, out_dim: int, *, bias: bool = False) -> nn.Module:
        """A linear layer with an adapter, over an NF4 weight with quantize_base."""
        kind = DoRALinear if self.use_dora else LoRALinear
        adapter = {"rank": self.lora_rank, "alpha": self.lora_alpha, "dropout": self.lora_dropout}
        return kind(in_dim, out_dim, **adapter, use_bias=bias, quantize_base=self.quantize_base, **self.quantization_kwargs)

    def plain(self, in_dim: int, out_dim: int, *, bias: bool = False) -> nn.Module:
        """A linear layer without an adapter, in NF4 with quantize_base."""
        if self.quantize_base:
            return FrozenNF4Linear(in_dim, out_dim, bias=bias, **self.quantization_kwargs)
        return nn.Linear(in_dim, out_dim, bias=bias)

    def layers(self, adapted: bool) -> Callable[..., nn.Module]:
        """make(in_dim, out_dim, bias=): with an adapter or without."""
        return self.linear if adapted else self.plain

    def output(self, adapted: bool, in_dim: int, out_dim: int, *, bias: bool = False) -> nn.Module:
        """A model's or a head's last layer, which is never quantized."""
        return replace(self, quantize_base=False, quantization_kwargs={}).layers(adapted)(in_dim, out_dim, bias=bias)

    def chosen(self, names: list[str]) -> Callable[..., nn.Module]:
        """make(name, in_dim, out_dim, bias=): with an adapter where the name is among `names`.

        Raises ValueError for a name that no attention projection has.
        """
        known = get_args(LORA_ATTN_MODULES)
        if isinstance(names, str) or not set(names) <= set(known):
            raise ValueError(f"lora_modules is {names!r}, expected a list of {', '.join(known)}")
        return lambda name, in_dim, out_dim, bias=False: self.layers(name in names)(in_dim, out_dim, bias=bias)


PLAIN = Adapters()


def attention(
    make: Callable[..., nn.Module], *, embed_dim: int, num_heads: int, num_kv_heads: int, head_dim: int, bias: bool = False, **kwargs: Any
) -> MultiHeadAttention:
    """Attention whose projections make(name, in_dim, out_dim, bias=) builds, in the order that seeds depend on. Raises as MultiHeadAttention."""
    head_dim_of(embed_dim, num_heads, num_kv_heads)  # before projections of impossible sizes
    return MultiHeadAttention(
        embed_dim=embed_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        q_proj=make("q_proj", embed_dim, num_heads * head_dim, bias=bias),
        k_proj=make("k_proj", embed_dim, num_kv_heads * head_dim, bias=bias),
        v_proj=make("v_proj", embed_dim, num_kv_heads * head_dim, bias=bias),
        output_proj=make("output_proj", num_heads * head_dim, embed_dim, bias=bias),
        **kwargs,
    )
