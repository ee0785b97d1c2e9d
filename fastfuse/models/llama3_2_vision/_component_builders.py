"""Builders of Llama 3.2 Vision's encoder, projection head and decoder, plain and with LoRA.

`profile` chooses whose numerics to follow: "torchtune", "meta" or "transformers" (see Profile). With LoRA the encoder and the
projection head are bidirectional, as without; torchtune's are causal there, which causal_attention=True gives back.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

from torch import nn

from fastfuse.models._linear import Adapters, attention, dense
from fastfuse.models.clip._component_builders import clip_attention, clip_mlp, clip_vision_encoder, lora_clip_attention, lora_clip_mlp, lora_clip_vision_encoder
from fastfuse.models.llama3_1._component_builders import llama3_mlp, lora_llama3_attention, lora_llama3_mlp, scale_hidden_dim_for_mlp
from fastfuse.models.llama3_2_vision._encoder import Llama3VisionEncoder, Llama3VisionProjectionHead
from fastfuse.models.llama3_2_vision._layer_plan import layer_plan
from fastfuse.models.llama3_2_vision._profiles import Profile, profile_of
from fastfuse.modules import (
    Fp32LayerNorm,
    Llama3ScaledRoPE,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TanhGate,
    TransformerCrossAttentionLayer,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
)
from fastfuse.modules.attention import head_dim_of
from fastfuse.modules.low_precision import _state_dict_hooks as nf4_hooks
from fastfuse.modules.model_fusion import FusionEmbedding, FusionLayer
from fastfuse.modules.peft import LORA_ATTN_MODULES

ASPECT_RATIOS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]  # (h, w), in transformers' order for 4 tiles


def llama3_2_vision_encoder(
    *,
    patch_size: int,
    num_heads: int,
    clip_embed_dim: int,
    clip_num_layers: int,
    clip_hidden_states: list[int] | None,
    num_layers_projection: int,
    decoder_embed_dim: int,
    tile_size: int,
    max_num_tiles: int = 4,
    in_channels: int = 3,
    profile: str | Profile = "torchtune",
    clip_hidden_dim: int | None = None,
    norm_eps: float = 1e-5,
    aspect_ratios: Sequence[Sequence[int]] | None = None,
) -> Llama3VisionEncoder:
    """CLIP over tiles, without attention biases, and a projection head over its output and its clip_hidden_states.

    clip_hidden_dim: width of the MLPs, 4 * clip_embed_dim where None. aspect_ratios: (h, w) of the rows of the tile tables,
    for profiles with tile_tables="ratios"; those of transformers for 4 tiles where None.
    """
    return lora_llama3_2_vision_encoder(
        False, False, [],
        patch_size=patch_size, num_heads=num_heads, clip_embed_dim=clip_embed_dim, clip_num_layers=clip_num_layers, clip_hidden_states=clip_hidden_states,
        num_layers_projection=num_layers_projection, decoder_embed_dim=decoder_embed_dim, tile_size=tile_size, max_num_tiles=max_num_tiles,
        in_channels=in_channels, profile=profile, clip_hidden_dim=clip_hidden_dim, norm_eps=norm_eps, aspect_ratios=aspect_ratios,
    )  # fmt: skip


def lora_llama3_2_vision_encoder(
    encoder_lora: bool,
    fusion_lora: bool,
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    patch_size: int,
    num_heads: int,
    clip_embed_dim: int,
    clip_num_layers: int,
    clip_hidden_states: list[int] | None,
    num_layers_projection: int,
    decoder_embed_dim: int,
    tile_size: int,
    max_num_tiles: int = 4,
    in_channels: int = 3,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    profile: str | Profile = "torchtune",
    clip_hidden_dim: int | None = None,
    norm_eps: float = 1e-5,
    aspect_ratios: Sequence[Sequence[int]] | None = None,
    causal_attention: bool = False,
    **quantization_kwargs: Any,
) -> Llama3VisionEncoder:
    """llama3_2_vision_encoder with adapters in CLIP (encoder_lora) and in the projection head (fusion_lora).

    A part without LoRA is not quantized either. apply_lora_to_output is for the projection head's last linear layer, which is
    never quantized. With quantize_base the state dict holds bf16 in place of NF4.
    """
    profile = profile_of(profile)
    if profile.tile_tables == "grid":
        aspect_ratios = None
    elif aspect_ratios is None:
        aspect_ratios = ASPECT_RATIOS
    make_clip, make_head = clip_vision_encoder, llama3_2_vision_projection_head
    lora = {
        "lora_modules": lora_attn_modules, "apply_lora_to_mlp": apply_lora_to_mlp, "lora_rank": lora_rank, "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout, "use_dora": use_dora, "quantize_base": quantize_base, "causal_attention": causal_attention, **quantization_kwargs,
    }  # fmt: skip
    if encoder_lora:
        make_clip = partial(lora_clip_vision_encoder, **lora)
    if fusion_lora:
        make_head = partial(lora_llama3_2_vision_projection_head, apply_lora_to_output=apply_lora_to_output, **lora)
    clip = make_clip(
        tile_size=tile_size,
        patch_size=patch_size,
        embed_dim=clip_embed_dim,
        num_layers=clip_num_layers,
        num_heads=num_heads,
        activation=nn.GELU,
        attn_bias=False,
        out_indices=clip_hidden_states,
        max_num_tiles=max_num_tiles,
        in_channels=in_channels,
        hidden_dim=clip_hidden_dim,
        norm_eps=norm_eps,
        pad_tokens_to=profile.pad_tokens_to,
        states_after_layer=profile.states_after_layer,
        aspect_ratios=aspect_ratios,
    )
    head = make_head(
        num_layers=num_layers_projection,
        num_heads=num_heads,
        decoder_embed_dim=decoder_embed_dim,
        clip_embed_dim=clip_embed_dim,
        num_hidden_inputs=len(clip_hidden_states or []),
        hidden_dim=clip_hidden_dim,
        norm_eps=norm_eps,
    )
    encoder = Llama3VisionEncoder(clip=clip, projection_head=head)
    if quantize_base:
        nf4_hooks._register_reparametrize_state_dict_hooks(encoder)
    return encoder


def llama3_2_vision_projection_head(
    *,
    num_layers: int,
    num_heads: int,
    decoder_embed_dim: int,
    clip_embed_dim: int,
    num_hidden_inputs: int,
    hidden_dim: int | None = None,
    norm_eps: float = 1e-5,
) -> Llama3VisionProjectionHead:
    """num_layers gated transformer layers in CLIP's width, then a linear layer from (num_hidden_inputs + 1) times that width."""
    layers = []
    for _ in range(num_layers):
        attn = clip_attention(embed_dim=clip_embed_dim, num_heads=num_heads)
        mlp = clip_mlp(clip_embed_dim, clip_embed_dim, hidden_dim or 4 * clip_embed_dim, nn.GELU())
        layers.append(_gated_layer(attn, mlp, clip_embed_dim, norm_eps))
    output = nn.Linear(clip_embed_dim * (num_hidden_inputs + 1), decoder_embed_dim)
    return Llama3VisionProjectionHead(layers, output, num_hidden_inputs)


def lora_llama3_2_vision_projection_head(
    lora_modules: list[LORA_ATTN_MODULES],
    *,
    num_layers: int,
    num_heads: int,
    decoder_embed_dim: int,
    clip_embed_dim: int,
    num_hidden_inputs: int,
    apply_lora_to_mlp: bool,
    apply_lora_to_output: bool,
    lora_rank: int,
    lora_alpha: float,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    hidden_dim: int | None = None,
    norm_eps: float = 1e-5,
    causal_attention: bool = False,
    **quantization_kwargs: Any,
) -> Llama3VisionProjectionHead:
    """llama3_2_vision_projection_head with adapters."""
    hidden_dim = hidden_dim or 4 * clip_embed_dim
    adapters = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "use_dora": use_dora}
    quantized = {"quantize_base": quantize_base, **quantization_kwargs}
    layers = []
    for _ in range(num_layers):
        attn = lora_clip_attention(
            lora_modules, embed_dim=clip_embed_dim, head_dim=head_dim_of(clip_embed_dim, num_heads), num_heads=num_heads, num_kv_heads=num_heads,
            is_causal=causal_attention, **adapters, **quantized,
        )  # fmt: skip
        if apply_lora_to_mlp:
            mlp = lora_clip_mlp(in_dim=clip_embed_dim, out_dim=clip_embed_dim, hidden_dim=hidden_dim, activation=nn.GELU(), **adapters, **quantized)
        else:
            mlp = clip_mlp(clip_embed_dim, clip_embed_dim, hidden_dim, nn.GELU(), **quantized)
        layers.append(_gated_layer(attn, mlp, clip_embed_dim, norm_eps))
    in_dim = clip_embed_dim * (num_hidden_inputs + 1)
    if apply_lora_to_output:
        output = Adapters(lora_rank, lora_alpha, lora_dropout, use_dora).linear(in_dim, decoder_embed_dim, bias=True)
    else:
        output = nn.Linear(in_dim, decoder_embed_dim)
    return Llama3VisionProjectionHead(layers, output, num_hidden_inputs)


def _gated_layer(attn: MultiHeadAttention, mlp: nn.Module, dim: int, norm_eps: float) -> TransformerSelfAttentionLayer:
    norms = {"sa_norm": Fp32LayerNorm(dim, eps=norm_eps), "mlp_norm": Fp32LayerNorm(dim, eps=norm_eps)}
    return TransformerSelfAttentionLayer(attn, mlp, **norms, sa_scale=TanhGate(), mlp_scale=TanhGate())


def llama3_2_vision_decoder(
    *,
    vocab_size: int,
    num_layers: int,
    fusion_interval: int,
    num_special_tokens: int,
    num_heads: int,
    num_kv_heads: int | None,
    embed_dim: int,
    max_seq_len: int,
    encoder_max_seq_len: int,
    rope_base: float = 500000.0,
    intermediate_dim: int | None = None,
    profile: str | Profile = "torchtune",
    norm_eps: float = 1e-5,
    rope_scaling: dict[str, float] | None = {},  # noqa: B006
    cross_attention_layers: Sequence[int] | None = None,
) -> TransformerDecoder:
    """Llama 3's decoder of num_layers self-attention layers, cross-attention before every fusion_interval-th.

    num_kv_heads: num_heads where None or 0. intermediate_dim: scale_hidden_dim_for_mlp(embed_dim) where None or 0.
    rope_scaling: keywords of Llama3ScaledRoPE that differ from its defaults, None for unscaled rotary embeddings.
    cross_attention_layers: places of the cross-attention layers counted among all layers, as transformers counts, in place
    of fusion_interval.
    """
    return lora_llama3_2_vision_decoder(
        False, False, [],
        vocab_size=vocab_size, num_layers=num_layers, fusion_interval=fusion_interval, num_special_tokens=num_special_tokens, num_heads=num_heads,
        num_kv_heads=num_kv_heads, embed_dim=embed_dim, max_seq_len=max_seq_len, encoder_max_seq_len=encoder_max_seq_len, rope_base=rope_base,
        intermediate_dim=intermediate_dim, profile=profile, norm_eps=norm_eps, rope_scaling=rope_scaling, cross_attention_layers=cross_attention_layers,
    )  # fmt: skip


def lora_llama3_2_vision_decoder(
    decoder_lora: bool,
    fusion_lora: bool,
    lora_attn_modules: list[LORA_ATTN_MODULES],
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    *,
    vocab_size: int,
    num_layers: int,
    fusion_interval: int,
    num_special_tokens: int,
    num_heads: int,
    num_kv_heads: int | None,
    embed_dim: int,
    max_seq_len: int,
    encoder_max_seq_len: int,
    rope_base: float = 500000.0,
    intermediate_dim: int | None = None,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    profile: str | Profile = "torchtune",
    norm_eps: float = 1e-5,
    rope_scaling: dict[str, float] | None = {},  # noqa: B006
    cross_attention_layers: Sequence[int] | None = None,
) -> TransformerDecoder:
    """llama3_2_vision_decoder with adapters in the self-attention layers (decoder_lora) and in cross-attention (fusion_lora).

    With quantize_base linear layers without adapters are in NF4 in parts with LoRA, and so are the MLPs of parts without,
    whose attention stays as it is. The output projection has an adapter with apply_lora_to_output and decoder_lora, and is
    never quantized. The state dict holds bf16 in place of NF4.
    """
    profile = profile_of(profile)
    num_kv_heads = num_kv_heads or num_heads
    head_dim = head_dim_of(embed_dim, num_heads)
    hidden_dim = intermediate_dim or scale_hidden_dim_for_mlp(embed_dim)
    cross_eps = profile.cross_norm_eps or norm_eps
    adapters = {"lora_rank": lora_rank, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, "use_dora": use_dora, "quantize_base": quantize_base}
    if rope_scaling is None:
        rope = RotaryPositionalEmbeddings(head_dim, max_seq_len=max_seq_len, base=rope_base)
    else:
        rope = Llama3ScaledRoPE(head_dim, max_seq_len=max_seq_len, base=rope_base, **rope_scaling)

    def attn(lora: bool, **kwargs: Any) -> MultiHeadAttention:
        kwargs |= {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
        if lora:
            return lora_llama3_attention(lora_attn_modules, **kwargs, **adapters)
        return attention(dense, head_dim=head_dim, **kwargs)

    def mlp(lora: bool) -> nn.Module:
        if lora and apply_lora_to_mlp:
            return lora_llama3_mlp(dim=embed_dim, hidden_dim=hidden_dim, **adapters)
        return llama3_mlp(embed_dim, hidden_dim, quantize_base)

    def self_layer() -> TransformerSelfAttentionLayer:
        return TransformerSelfAttentionLayer(
            attn(decoder_lora, pos_embeddings=rope, max_seq_len=max_seq_len),
            mlp(decoder_lora),
            sa_norm=RMSNorm(embed_dim, eps=norm_eps),
            mlp_norm=RMSNorm(embed_dim, eps=norm_eps),
        )

    def cross_layer() -> TransformerCrossAttentionLayer:
        head_norms = {"q_norm": RMSNorm(head_dim, eps=norm_eps), "k_norm": RMSNorm(head_dim, eps=norm_eps)}
        return TransformerCrossAttentionLayer(
            attn(fusion_lora, **head_norms, is_causal=False, max_seq_len=encoder_max_seq_len),
            mlp(fusion_lora),
            ca_norm=RMSNorm(embed_dim, eps=cross_eps),
            mlp_norm=RMSNorm(embed_dim, eps=cross_eps),
            ca_scale=TanhGate(),
            mlp_scale=TanhGate(),
            empty_rows=profile.empty_rows,
        )

    def layer(kind: str) -> nn.Module:
        if kind == "fusion":
            return FusionLayer(layer=self_layer(), fusion_layer=cross_layer())
        return self_layer() if kind == "self" else cross_layer()

    if cross_attention_layers is None:
        if fusion_interval < 1:
            raise ValueError(f"fusion_interval is {fusion_interval}, expected at least 1")
        kinds = ["fusion" if (i + 1) % fusion_interval == 0 else "self" for i in range(num_layers)]
    else:
        kinds = [entry.kind for entry in layer_plan(num_layers + len(cross_attention_layers), cross_attention_layers)]
    layers = nn.ModuleList([layer(kind) for kind in kinds])
    tok_embeddings = FusionEmbedding(vocab_size, num_special_tokens, embed_dim)
    if apply_lora_to_output and decoder_lora:
        output = Adapters(lora_rank, lora_alpha, lora_dropout, use_dora).linear(embed_dim, vocab_size)
    else:
        output = nn.Linear(embed_dim, vocab_size, bias=False)
    decoder = TransformerDecoder(
        tok_embeddings=tok_embeddings,
        layers=layers,
        max_seq_len=max_seq_len,
        num_heads=num_heads,
        head_dim=head_dim,
        norm=RMSNorm(embed_dim, eps=norm_eps),
        output=output,
    )
    if quantize_base:
        nf4_hooks._register_reparametrize_state_dict_hooks(decoder)
    return decoder
