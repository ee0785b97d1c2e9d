"""Builders of CLIP's vision transformer over tiled images (https://arxiv.org/abs/2103.00020), plain and with LoRA.

With LoRA attention is bidirectional, as it is without: torchtune's builders leave it causal there. causal_attention=True
gives that back, for adapters that were trained with it.
"""

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fastfuse.models._linear import PLAIN, Adapters, attention
from fastfuse.modules import (
    CLSProjection,
    FeedForward,
    Fp32LayerNorm,
    MultiHeadAttention,
    TiledTokenPositionalEmbedding,
    TilePositionalEmbedding,
    TokenPositionalEmbedding,
    TransformerSelfAttentionLayer,
    VisionRotaryPositionalEmbeddings,
    VisionTransformer,
)
from fastfuse.modules.attention import head_dim_of
from fastfuse.modules.low_precision import _state_dict_hooks as nf4_hooks
from fastfuse.modules.peft import LORA_ATTN_MODULES


def clip_vision_encoder(
    tile_size: int,
    patch_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    activation: Callable[[], nn.Module] = nn.SiLU,
    cls_output_dim: int = 512,
    attn_bias: bool = True,
    use_rope: bool = False,
    out_indices: list[int] | None = None,
    output_cls_projection: bool = False,
    max_num_tiles: int = 4,
    in_channels: int = 3,
    append_cls_token: bool = False,
    use_tile_pos_embed: bool = True,
    *,
    hidden_dim: int | None = None,
    norm_eps: float = 1e-5,
    pad_tokens_to: int = 1,
    states_after_layer: bool = False,
    aspect_ratios: Sequence[Sequence[int]] | None = None,
) -> VisionTransformer:
    """A VisionTransformer with CLIP's layers; tile embeddings where use_tile_pos_embed and max_num_tiles > 1.

    activation: a class called without arguments. hidden_dim: width of the MLP, 4 * embed_dim where None. use_rope adds
    VisionRotaryPositionalEmbeddings. pad_tokens_to, states_after_layer: as VisionTransformer; aspect_ratios: as
    TilePositionalEmbedding.
    Raises ValueError where num_heads does not divide embed_dim.
    """
    return _vision_transformer(PLAIN, [], False, **locals())


def lora_clip_vision_encoder(
    lora_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    *,
    tile_size: int,
    patch_size: int,
    embed_dim: int,
    num_layers: int,
    num_heads: int,
    activation: Callable[[], nn.Module] = nn.SiLU,
    cls_output_dim: int = 512,
    attn_bias: bool = False,
    out_indices: list[int] | None = None,
    output_cls_projection: bool = False,
    max_num_tiles: int = 4,
    in_channels: int = 3,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    hidden_dim: int | None = None,
    norm_eps: float = 1e-5,
    pad_tokens_to: int = 1,
    states_after_layer: bool = False,
    aspect_ratios: Sequence[Sequence[int]] | None = None,
    causal_attention: bool = False,
    **quantization_kwargs: Any,
) -> VisionTransformer:
    """clip_vision_encoder with adapters on the attention projections that lora_modules names, and on the MLP.

    attn_bias is False where left out, other than in clip_vision_encoder. With quantize_base its state dict holds bf16 in
    place of NF4. quantization_kwargs: block_size, scaler_block_size.
    Raises ValueError where num_heads does not divide embed_dim, or lora_modules is empty.
    """
    arguments = locals()
    vision = _vision_transformer(Adapters.taken_from(arguments), append_cls_token=False, **arguments)
    if quantize_base:
        nf4_hooks._register_reparametrize_state_dict_hooks(vision)
    return vision


def _vision_transformer(
    adapters: Adapters, lora_modules: list[str], apply_lora_to_mlp: bool, *, num_heads, activation, cls_output_dim, attn_bias, output_cls_projection,
    max_num_tiles, hidden_dim, norm_eps, aspect_ratios, use_rope=False, use_tile_pos_embed=True, causal_attention=False, **sizes: Any,
) -> VisionTransformer:  # fmt: skip
    embed_dim, tile_size, patch_size = (sizes[name] for name in ("embed_dim", "tile_size", "patch_size"))
    head_dim = head_dim_of(embed_dim, num_heads)
    cls_projection = CLSProjection(embed_dim=embed_dim, cls_output_dim=cls_output_dim) if output_cls_projection else None
    rope = VisionRotaryPositionalEmbeddings(patch_size, tile_size, head_dim, append_cls_token=sizes["append_cls_token"]) if use_rope else None
    layer = clip_layer(
        adapters, lora_modules, apply_lora_to_mlp, embed_dim=embed_dim, num_heads=num_heads, hidden_dim=hidden_dim, activation=activation, norm_eps=norm_eps,
        attn_bias=attn_bias, pos_embeddings=rope, is_causal=causal_attention,
    )  # fmt: skip
    pre = post = None
    if use_tile_pos_embed and max_num_tiles > 1:
        pre = TilePositionalEmbedding(max_num_tiles, embed_dim, aspect_ratios=aspect_ratios)
        post = TilePositionalEmbedding(max_num_tiles, embed_dim, aspect_ratios=aspect_ratios)
        token = TiledTokenPositionalEmbedding(max_num_tiles, embed_dim, tile_size, patch_size, aspect_ratios=aspect_ratios)
    else:
        token = TokenPositionalEmbedding(embed_dim, tile_size, patch_size)
    return VisionTransformer(layer=layer, token_pos_embedding=token, pre_tile_pos_embed=pre, post_tile_pos_embed=post, cls_projection=cls_projection, **sizes)


def clip_layer(
    adapters: Adapters, lora_modules: list[str], apply_lora_to_mlp: bool, *, embed_dim: int, num_heads: int, hidden_dim: int | None,
    activation: Callable[[], nn.Module], norm_eps: float, attn_bias: bool = False, pos_embeddings: nn.Module | None = None, is_causal: bool = False,
    **scales: nn.Module,
) -> TransformerSelfAttentionLayer:  # fmt: skip
    """A layer of CLIP or of the projection head over it."""
    heads = {"num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": head_dim_of(embed_dim, num_heads)}
    attn = attention(_projections(adapters, lora_modules), embed_dim=embed_dim, **heads, bias=attn_bias, pos_embeddings=pos_embeddings, is_causal=is_causal)
    mlp = _mlp(adapters.layers(apply_lora_to_mlp), embed_dim, embed_dim, hidden_dim or 4 * embed_dim, activation())
    norms = {name: Fp32LayerNorm(embed_dim, eps=norm_eps) for name in ("sa_norm", "mlp_norm")}
    return TransformerSelfAttentionLayer(attn, mlp, **norms, **scales)


def _projections(adapters: Adapters, lora_modules: list[str]) -> Callable[..., nn.Module]:
    if not lora_modules and adapters is not PLAIN:
        raise ValueError(f"Must pass one or more of {LORA_ATTN_MODULES} as lora_modules, got {lora_modules}")
    return adapters.chosen(lora_modules)


def _mlp(linear: Callable[..., nn.Module], in_dim: int, out_dim: int, hidden_dim: int, activation: nn.Module) -> FeedForward:
    return FeedForward(gate_proj=linear(in_dim, hidden_dim, bias=True), down_proj=linear(hidden_dim, out_dim, bias=True), activation=activation)


def clip_attention(*, embed_dim: int, num_heads: int, attn_bias: bool = False, pos_embeddings: nn.Module | None = None) -> MultiHeadAttention:
    """Bidirectional attention."""
    heads = {"num_heads": num_heads, "num_kv_heads": num_heads, "head_dim": head_dim_of(embed_dim, num_heads)}
    return attention(PLAIN.chosen([]), embed_dim=embed_dim, **heads, bias=attn_bias, pos_embeddings=pos_embeddings, is_causal=False)


def lora_clip_attention(
    lora_modules: list[LORA_ATTN_MODULES],
    *,
    embed_dim: int,
    head_dim: int,
    num_heads: int,
    num_kv_heads: int,
    attn_dropout: float = 0.0,
    attn_bias: bool = False,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    is_causal: bool = False,
    **quantization_kwargs: Any,
) -> MultiHeadAttention:
    """Attention, bidirectional unless is_causal, with an adapter on the projections that lora_modules names.

    Raises ValueError where lora_modules is empty.
    """
    arguments = locals()
    make = _projections(Adapters.taken_from(arguments), arguments.pop("lora_modules"))
    return attention(make, bias=arguments.pop("attn_bias"), **arguments)


def clip_mlp(in_dim: int, out_dim: int, hidden_dim: int, activation: nn.Module, quantize_base: bool = False, **quantization_kwargs: Any) -> FeedForward:
    """Two linear layers with biases; FrozenNF4Linear with quantize_base."""
    adapters = Adapters(quantize_base=quantize_base, quantization_kwargs=quantization_kwargs)
    return _mlp(adapters.plain, in_dim, out_dim, hidden_dim, activation)


def lora_clip_mlp(
    *,
    in_dim: int,
    out_dim: int,
    hidden_dim: int,
    activation: nn.Module,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    **quantization_kwargs: Any,
) -> FeedForward:
    """Two linear layers with biases, an adapter on each."""
    arguments = locals()
    return _mlp(Adapters.taken_from(arguments).linear, **arguments)
