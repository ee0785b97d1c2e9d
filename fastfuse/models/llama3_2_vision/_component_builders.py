"""Builders of Llama 3.2 Vision's encoder, projection head and decoder, plain and with LoRA.

`profile` chooses whose numerics to follow: "torchtune", "meta" or "transformers" (see Profile). With LoRA the encoder and the
projection head are bidirectional, as without; torchtune's are causal there, which causal_attention=True gives back.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from fastfuse.models._linear import PLAIN, Adapters, attention
from fastfuse.models.clip._component_builders import clip_layer, clip_vision_encoder, lora_clip_vision_encoder
from fastfuse.models.llama3_1._component_builders import scale_hidden_dim_for_mlp, swiglu
from fastfuse.models.llama3_2_vision._encoder import Llama3VisionEncoder, Llama3VisionProjectionHead
from fastfuse.models.llama3_2_vision._layer_plan import layer_plan
from fastfuse.models.llama3_2_vision._profiles import Profile, profile_of
from fastfuse.modules import (
    Llama3ScaledRoPE,
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
    return lora_llama3_2_vision_encoder(False, False, [], **locals())


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
    shared = {"num_heads": num_heads, "hidden_dim": clip_hidden_dim, "norm_eps": norm_eps}
    clip = make_clip(
        tile_size=tile_size, patch_size=patch_size, embed_dim=clip_embed_dim, num_layers=clip_num_layers, activation=nn.GELU, attn_bias=False,
        out_indices=clip_hidden_states, max_num_tiles=max_num_tiles, in_channels=in_channels, pad_tokens_to=profile.pad_tokens_to,
        states_after_layer=profile.states_after_layer, aspect_ratios=aspect_ratios, **shared,
    )  # fmt: skip
    sizes = {"num_layers": num_layers_projection, "decoder_embed_dim": decoder_embed_dim, "clip_embed_dim": clip_embed_dim}
    head = make_head(**sizes, num_hidden_inputs=len(clip_hidden_states or []), **shared)
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
    return _projection_head(PLAIN, [], False, False, **locals())


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
    arguments = locals()
    return _projection_head(Adapters.taken_from(arguments), **arguments)


def _projection_head(
    adapters: Adapters, lora_modules: list[str], apply_lora_to_mlp: bool, apply_lora_to_output: bool, *, num_layers: int, clip_embed_dim: int,
    decoder_embed_dim: int, num_hidden_inputs: int, causal_attention: bool = False, **sizes: Any,
) -> Llama3VisionProjectionHead:  # fmt: skip
    sizes |= {"embed_dim": clip_embed_dim, "activation": nn.GELU, "is_causal": causal_attention}
    layers = [clip_layer(adapters, lora_modules, apply_lora_to_mlp, **sizes, sa_scale=TanhGate(), mlp_scale=TanhGate()) for _ in range(num_layers)]
    output = adapters.output(apply_lora_to_output, clip_embed_dim * (num_hidden_inputs + 1), decoder_embed_dim, bias=True)
    return Llama3VisionProjectionHead(layers, output, num_hidden_inputs)


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
    return lora_llama3_2_vision_decoder(False, False, [], **locals())


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
    arguments = locals()
    adapters = Adapters.taken_from(arguments)
    head_dim = head_dim_of(embed_dim, num_heads)
    if rope_scaling is None:
        rope = RotaryPositionalEmbeddings(head_dim, max_seq_len=max_seq_len, base=rope_base)
    else:
        rope = Llama3ScaledRoPE(head_dim, max_seq_len=max_seq_len, base=rope_base, **rope_scaling)
    layer = _layer_maker(adapters, rope, **arguments)
    layers = nn.ModuleList([layer(kind) for kind in _kinds_of_layers(num_layers, fusion_interval, cross_attention_layers)])
    tok_embeddings = FusionEmbedding(vocab_size, num_special_tokens, embed_dim)
    output = adapters.output(apply_lora_to_output and decoder_lora, embed_dim, vocab_size)
    sizes = {"max_seq_len": max_seq_len, "num_heads": num_heads, "head_dim": head_dim}
    decoder = TransformerDecoder(tok_embeddings=tok_embeddings, layers=layers, **sizes, norm=RMSNorm(embed_dim, eps=norm_eps), output=output)
    if quantize_base:
        nf4_hooks._register_reparametrize_state_dict_hooks(decoder)
    return decoder


def _kinds_of_layers(num_layers: int, fusion_interval: int, cross_attention_layers: Sequence[int] | None) -> list[str]:
    if cross_attention_layers is not None:
        return [entry.kind for entry in layer_plan(num_layers + len(cross_attention_layers), cross_attention_layers)]
    if fusion_interval < 1:
        raise ValueError(f"fusion_interval is {fusion_interval}, expected at least 1")
    return ["fusion" if (i + 1) % fusion_interval == 0 else "self" for i in range(num_layers)]


def _layer_maker(
    adapters: Adapters, rope: nn.Module, *, decoder_lora, fusion_lora, lora_attn_modules, apply_lora_to_mlp, embed_dim, num_heads, num_kv_heads,
    intermediate_dim, max_seq_len, encoder_max_seq_len, profile, norm_eps, **others: Any,
) -> Callable[[str], nn.Module]:  # fmt: skip
    """layer(kind) of the decoder: "self", "cross", or "fusion" of one each."""
    profile, head_dim = profile_of(profile), head_dim_of(embed_dim, num_heads)
    heads = {"embed_dim": embed_dim, "num_heads": num_heads, "num_kv_heads": num_kv_heads or num_heads, "head_dim": head_dim}

    def parts(lora: bool, eps: float, norm: str, **options: Any) -> dict[str, nn.Module]:
        make = adapters.chosen(lora_attn_modules) if lora else PLAIN.chosen([])
        attn = attention(make, **heads, **options)
        mlp = swiglu(adapters.layers(lora and apply_lora_to_mlp), embed_dim, intermediate_dim or scale_hidden_dim_for_mlp(embed_dim))
        return {"attn": attn, "mlp": mlp, norm: RMSNorm(embed_dim, eps=eps), "mlp_norm": RMSNorm(embed_dim, eps=eps)}

    def self_layer() -> TransformerSelfAttentionLayer:
        return TransformerSelfAttentionLayer(**parts(decoder_lora, norm_eps, "sa_norm", pos_embeddings=rope, max_seq_len=max_seq_len))

    def cross_layer() -> TransformerCrossAttentionLayer:
        norms = {name: RMSNorm(head_dim, eps=norm_eps) for name in ("q_norm", "k_norm")}
        made = parts(fusion_lora, profile.cross_norm_eps or norm_eps, "ca_norm", **norms, is_causal=False, max_seq_len=encoder_max_seq_len)
        return TransformerCrossAttentionLayer(**made, ca_scale=TanhGate(), mlp_scale=TanhGate(), empty_rows=profile.empty_rows)

    def layer(kind: str) -> nn.Module:
        if kind == "fusion":
            return FusionLayer(layer=self_layer(), fusion_layer=cross_layer())
        return self_layer() if kind == "self" else cross_layer()

    return layer
