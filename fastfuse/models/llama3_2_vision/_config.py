"""Model sizes as rows of data, and a model from a row."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from fastfuse.models.llama3_2_vision._component_builders import (
    ASPECT_RATIOS,
    llama3_2_vision_decoder,
    llama3_2_vision_encoder,
    lora_llama3_2_vision_decoder,
    lora_llama3_2_vision_encoder,
)
from fastfuse.models.llama3_2_vision._profiles import Profile
from fastfuse.modules.model_fusion import DeepFusionModel


@dataclass(frozen=True)
class Llama3VisionConfig:
    """Everything that makes one Llama-3.2-Vision-shaped model different from another. Names as the builders' keywords."""

    tile_size: int = 560
    patch_size: int = 14
    max_num_tiles: int = 4
    in_channels: int = 3
    aspect_ratios: tuple[tuple[int, int], ...] = tuple(ASPECT_RATIOS)
    clip_embed_dim: int = 1280
    clip_num_heads: int = 16
    clip_num_layers: int = 32
    clip_hidden_dim: int = 5120
    clip_hidden_states: tuple[int, ...] = (3, 7, 15, 23, 30)
    num_layers_projection: int = 8
    clip_norm_eps: float = 1e-5
    vocab_size: int = 128_256
    num_special_tokens: int = 8
    num_layers: int = 32  # self-attention layers
    fusion_interval: int = 4
    cross_attention_layers: tuple[int, ...] | None = None  # counted among all layers; None: by fusion_interval
    num_heads: int = 32
    num_kv_heads: int = 8
    embed_dim: int = 4096
    intermediate_dim: int = 14_336
    max_seq_len: int = 131_072
    encoder_max_seq_len: int = 128_080  # 20 images of 4 tiles of 1601 tokens
    rope_base: float = 500_000.0
    rope_scaling: dict[str, float] | None = field(default_factory=dict)  # Llama3ScaledRoPE's keywords; None: not scaled
    norm_eps: float = 1e-5
    image_token_id: int = 128_256

    @property
    def tokens_per_tile(self) -> int:
        return (self.tile_size // self.patch_size) ** 2 + 1

    def replace(self, **changes: Any) -> "Llama3VisionConfig":
        """The same with other values."""
        return dataclasses.replace(self, **changes)

    def encoder_arguments(self) -> dict[str, Any]:
        """Keywords of llama3_2_vision_encoder."""
        same = (
            "patch_size", "clip_embed_dim", "clip_num_layers", "num_layers_projection", "tile_size", "max_num_tiles", "in_channels", "clip_hidden_dim",
        )  # fmt: skip
        return {name: getattr(self, name) for name in same} | {
            "num_heads": self.clip_num_heads,
            "clip_hidden_states": list(self.clip_hidden_states),
            "decoder_embed_dim": self.embed_dim,
            "norm_eps": self.clip_norm_eps,
            "aspect_ratios": list(self.aspect_ratios),
        }

    def decoder_arguments(self) -> dict[str, Any]:
        """Keywords of llama3_2_vision_decoder."""
        same = (
            "vocab_size", "num_layers", "fusion_interval", "num_special_tokens", "num_heads", "num_kv_heads", "embed_dim", "max_seq_len",
            "encoder_max_seq_len", "rope_base", "intermediate_dim", "norm_eps", "rope_scaling", "cross_attention_layers",
        )  # fmt: skip
        return {name: getattr(self, name) for name in same}

    def to_hf(self) -> dict[str, Any]:
        """The dict for transformers' config.json, of version 5 and, by the older names of the rotary embedding, of 4.45 to 4.57."""
        cross = self.cross_attention_layers
        if cross is None:
            fused = [i for i in range(self.num_layers) if (i + 1) % self.fusion_interval == 0]
            cross = tuple(i + before for before, i in enumerate(fused))
        published = self.vocab_size > 128_004  # the vocabulary that has Llama 3's special tokens
        rope: dict[str, Any] = {"rope_type": "default"}
        if self.rope_scaling is not None:
            scaling = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192} | self.rope_scaling
            rope = {"rope_type": "llama3"} | {theirs: scaling[ours] for ours, theirs in _ROPE_SCALING.items()}
        return {
            "architectures": ["MllamaForConditionalGeneration"],
            "model_type": "mllama",
            "image_token_index": self.image_token_id,
            "vision_config": {
                "model_type": "mllama_vision_model",
                **{theirs: _with(list, getattr(self, ours)) for ours, theirs in _VISION.items()},
                "hidden_act": "gelu",
                "vision_output_dim": self.clip_embed_dim * (len(self.clip_hidden_states) + 1),
            },
            "text_config": {
                "model_type": "mllama_text_model",
                **{theirs: getattr(self, ours) for ours, theirs in _TEXT.items()},
                "num_hidden_layers": self.num_layers + len(cross),
                "cross_attention_layers": list(cross),
                "rope_theta": self.rope_base,
                "rope_scaling": rope,
                "rope_parameters": {**rope, "rope_theta": self.rope_base},
                "hidden_act": "silu",
                "bos_token_id": 128_000 if published else 0,
                "eos_token_id": 128_001 if published else None,
                "pad_token_id": 128_004 if published else None,
            },
        }

    @staticmethod
    def from_meta(params: dict[str, Any]) -> "Llama3VisionConfig":
        """From the dict in Meta's params.json, which leaves the vision encoder's sizes to the code: they are 11B's and 90B's.

        Raises ValueError where a key is missing.
        """
        missing = [k for k in ("dim", "n_layers", "n_heads", "vocab_size", "vision_chunk_size", "vision_num_cross_attention_layers") if k not in params]
        if missing:
            raise ValueError(f"params: {', '.join(missing)} missing, these are not the parameters of a Llama 3.2 Vision model")
        hidden = int((params.get("ffn_dim_multiplier") or 1) * int(2 * 4 * params["dim"] / 3))
        multiple = params.get("multiple_of", 256)
        tile, tiles = params["vision_chunk_size"], params.get("vision_max_num_chunks", 4)
        return Llama3VisionConfig(
            tile_size=tile,
            max_num_tiles=tiles,
            vocab_size=params["vocab_size"],
            num_layers=params["n_layers"],
            fusion_interval=-(-params["n_layers"] // params["vision_num_cross_attention_layers"]),
            num_heads=params["n_heads"],
            num_kv_heads=params.get("n_kv_heads") or params["n_heads"],
            embed_dim=params["dim"],
            intermediate_dim=multiple * -(-hidden // multiple),
            encoder_max_seq_len=20 * tiles * ((tile // 14) ** 2 + 1),
            rope_base=params.get("rope_theta", 500_000.0),
            rope_scaling={} if params.get("use_scaled_rope") else None,
            norm_eps=params.get("norm_eps", 1e-5),
            image_token_id=params["vocab_size"],
        )

    @staticmethod
    def from_hf(config: Any) -> "Llama3VisionConfig":
        """From transformers' MllamaConfig, as an object or as the dict in config.json.

        Keys that are left out have transformers' defaults: its versions 4.45 to 4.49 wrote only what differs from them.
        Raises ValueError for another model_type, for a null, and for what the architecture here has no place for: another
        activation, another rope scaling than llama3's, tiles that are not square.
        """
        whole = hf_config(config)
        vision, text = whole["vision_config"], whole["text_config"]
        _expect(vision, "hidden_act", ("gelu",), "gelu")
        _expect(text, "hidden_act", ("silu",), "silu")
        _expect(text, "head_dim", (None, text["hidden_size"] // text["num_attention_heads"]), None)
        cross = tuple(text["cross_attention_layers"])
        rope = _rope(text)
        tile, patch = _square(vision, "image_size"), _square(vision, "patch_size")
        return Llama3VisionConfig(
            tile_size=tile,
            patch_size=patch,
            **{ours: _with(tuple, vision[theirs]) for ours, theirs in _VISION.items() if theirs not in _SIDES},
            **{ours: text[theirs] for ours, theirs in _TEXT.items()},
            num_layers=text["num_hidden_layers"] - len(cross),
            cross_attention_layers=cross,
            encoder_max_seq_len=20 * vision["max_num_tiles"] * ((tile // patch) ** 2 + 1),
            rope_base=rope["rope_theta"],
            rope_scaling=_rope_scaling(rope),
            image_token_id=whole["image_token_index"],
        )


# Our fields and the keys of transformers' vision_config and text_config that hold the same.
_VISION = {
    "tile_size": "image_size",
    "patch_size": "patch_size",
    "max_num_tiles": "max_num_tiles",
    "in_channels": "num_channels",
    "aspect_ratios": "supported_aspect_ratios",
    "clip_embed_dim": "hidden_size",
    "clip_num_heads": "attention_heads",
    "clip_num_layers": "num_hidden_layers",
    "clip_hidden_dim": "intermediate_size",
    "clip_hidden_states": "intermediate_layers_indices",
    "num_layers_projection": "num_global_layers",
    "clip_norm_eps": "norm_eps",
}
_TEXT = {
    "vocab_size": "vocab_size",
    "embed_dim": "hidden_size",
    "intermediate_dim": "intermediate_size",
    "num_heads": "num_attention_heads",
    "num_kv_heads": "num_key_value_heads",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
}


def _with(kind: type, value: Any) -> Any:
    """A value whose lists and tuples are all of one kind."""
    return kind(_with(kind, item) for item in value) if isinstance(value, (list, tuple)) else value


CONFIGS = {
    "11b": Llama3VisionConfig(),
    "90b": Llama3VisionConfig(num_layers=80, num_heads=64, embed_dim=8192, intermediate_dim=28_672),
}
# What transformers takes where a config.json of model_type "mllama" leaves a key out: the 11B base model, but for the rope scaling.
HF_DEFAULTS = {
    "image_token_index": CONFIGS["11b"].image_token_id,
    "vision_config": {theirs: _with(list, getattr(CONFIGS["11b"], ours)) for ours, theirs in _VISION.items()} | {"image_size": 448, "hidden_act": "gelu"},
    "text_config": {theirs: getattr(CONFIGS["11b"], ours) for ours, theirs in _TEXT.items()}
    | {"num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "rope_theta": 500_000.0, "hidden_act": "silu"},
}
_HF_ALIASES = {"image_token_id": "image_token_index", "num_attention_heads": "attention_heads"}  # of the whole and of vision_config
_SIDES = ("image_size", "patch_size")
_NULL_IS_DEFAULT = ("supported_aspect_ratios", "intermediate_layers_indices", "cross_attention_layers", "rope_theta")


def hf_config(config: Any) -> dict[str, Any]:
    """transformers' MllamaConfig, an object or the dict in config.json, as a dict with every key of HF_DEFAULTS.

    Raises ValueError for another model_type, for a null where transformers has no default for one, and for a part or a size of another kind.
    """
    whole = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(whole, Mapping):
        raise ValueError(f"config is {config!r}, expected transformers' MllamaConfig or the dict in config.json")
    parts = [name for name in ("vision_config", "text_config") if name in whole]
    if whole.get("model_type", "mllama" if len(parts) == 2 else None) != "mllama":
        raise ValueError(f"config has model_type {whole.get('model_type')!r}, expected 'mllama'")
    full = _completed("", whole, {"image_token_index": HF_DEFAULTS["image_token_index"]}, _HF_ALIASES)
    for name, aliases in (("vision_config", _HF_ALIASES), ("text_config", {})):
        if not isinstance(part := whole.get(name) or {}, Mapping):
            raise ValueError(f"config: {name} is {part!r}, expected a dict")
        full[name] = _completed(f"{name}.", part, HF_DEFAULTS[name], aliases)
    vision = full["vision_config"]
    if vision["supported_aspect_ratios"] == HF_DEFAULTS["vision_config"]["supported_aspect_ratios"] and vision["max_num_tiles"] != 4:
        raise ValueError(f"config: vision_config.max_num_tiles is {vision['max_num_tiles']}, the default supported_aspect_ratios are for 4")
    return full


def _completed(where: str, given: Mapping[str, Any], defaults: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    full = {key: value for key, value in given.items() if key not in aliases}
    full |= {name: given[alias] for alias, name in aliases.items() if alias in given and full.get(name) is None}
    full = {key: value for key, value in full.items() if value is not None or key not in _NULL_IS_DEFAULT}
    if nulls := [key for key in defaults if key in full and full[key] is None]:
        raise ValueError(f"config: {where}{nulls[0]} is null, the default is {defaults[nulls[0]]!r}: leave it out or give a value")
    full = {**defaults, **full}
    for key, default in defaults.items():
        least = 0 if key.endswith("layers") or key.startswith("image_token") else 1
        if isinstance(default, int) and key not in _SIDES and not _is_whole(full[key], least):
            raise ValueError(f"config: {where}{key} is {full[key]!r}, expected a whole number, at least {least}")
    return full


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and value >= least


def _expect(config: dict, key: str, covered: tuple, default: Any) -> None:
    if config.get(key, default) not in covered:
        raise ValueError(f"config: {key} is {config[key]!r}, covered: {', '.join(map(repr, covered))}")


def _square(config: dict, key: str) -> int:
    """One of _SIDES, which is a number or a list of two."""
    value = config[key]
    sides = value if isinstance(value, (list, tuple)) else [value]
    if not all(_is_whole(side, 1) for side in sides):
        raise ValueError(f"config: vision_config.{key} is {value!r}, expected a whole number, at least 1")
    if len(set(sides)) != 1:
        raise ValueError(f"config: {key} is {value}, tiles and patches are square here")
    return sides[0]


_ROPE_SCALING = {
    "scale_factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "old_context_len": "original_max_position_embeddings",
}


def _rope(text: dict) -> dict[str, Any]:
    """rope_parameters of transformers 5, from the names of any version; where a file has both, rope_scaling counts there too."""
    defaults = {"rope_theta": text["rope_theta"], "original_max_position_embeddings": text["max_position_embeddings"]}
    given = text.get("rope_scaling") or text.get("rope_parameters") or {}
    return defaults | {key: value for key, value in given.items() if value is not None}


def _rope_scaling(rope: dict) -> dict[str, float] | None:
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"config: rope_type is {kind!r}, covered: 'default', 'llama3'")
    if missing := [name for name in _ROPE_SCALING.values() if name not in rope]:
        raise ValueError(f"config: rope_type is 'llama3', {', '.join(missing)} missing")
    return {ours: rope[theirs] for ours, theirs in _ROPE_SCALING.items()}


def build(
    config: Llama3VisionConfig,
    *,
    profile: str | Profile = "torchtune",
    decoder_trainable: bool = False,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
) -> DeepFusionModel:
    """The model of a config, with random weights; its attribute `config` is the config."""
    encoder = llama3_2_vision_encoder(**config.encoder_arguments(), profile=profile)
    decoder = llama3_2_vision_decoder(**config.decoder_arguments(), profile=profile)
    trainable = {"decoder_trainable": decoder_trainable, "encoder_trainable": encoder_trainable, "fusion_trainable": fusion_trainable}
    return _fused(config, decoder, encoder, trainable)


def build_lora(
    config: Llama3VisionConfig,
    lora_attn_modules: list[str],
    *,
    profile: str | Profile = "torchtune",
    decoder_lora: bool = False,
    encoder_lora: bool = True,
    fusion_lora: bool = True,
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    causal_attention: bool = False,
    **quantization_kwargs: Any,
) -> DeepFusionModel:
    """The model of a config with adapters in the parts that are chosen. quantization_kwargs are for the encoder's NF4 weights."""
    arguments = locals()
    for own in ("config", "decoder_lora", "encoder_lora", "causal_attention", "quantization_kwargs"):
        del arguments[own]
    encoder = lora_llama3_2_vision_encoder(encoder_lora, **arguments, **config.encoder_arguments(), causal_attention=causal_attention, **quantization_kwargs)
    decoder = lora_llama3_2_vision_decoder(decoder_lora, **arguments, **config.decoder_arguments())
    return _fused(config, decoder, encoder, {"decoder_trainable": decoder_lora, "encoder_trainable": encoder_lora, "fusion_trainable": fusion_lora})


def _fused(config: Llama3VisionConfig, decoder: nn.Module, encoder: nn.Module, trainable: dict[str, bool]) -> DeepFusionModel:
    model = DeepFusionModel(decoder=decoder, encoder=encoder, **trainable)
    model.config = config  # what save_checkpoint writes as config.json
    return model
