"""Builders of the published models."""

from functools import partial
from typing import Any

from fastfuse.errors import InvalidArgument
from fastfuse.models.llama3_2_vision._config import CONFIGS, build, build_lora
from fastfuse.models.llama3_2_vision._profiles import Profile
from fastfuse.modules.model_fusion import DeepFusionModel
from fastfuse.modules.peft import LORA_ATTN_MODULES, TrainableParams


def llama3_2_vision_11b(
    decoder_trainable: bool = False,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
    image_size: int = 560,
    *,
    profile: str | Profile = "torchtune",
) -> DeepFusionModel:
    """Llama 3.2 Vision 11B, with random weights. image_size: tile side in pixels, 560 for Instruct, 448 for the base model."""
    return _full("11b", **locals())


def llama3_2_vision_90b(
    decoder_trainable: bool = False,
    encoder_trainable: bool = True,
    fusion_trainable: bool = True,
    image_size: int = 560,
    *,
    profile: str | Profile = "torchtune",
) -> DeepFusionModel:
    """Llama 3.2 Vision 90B, with random weights. Arguments as llama3_2_vision_11b."""
    return _full("90b", **locals())


def _full(size: str, image_size: int, **options: Any) -> DeepFusionModel:
    return build(CONFIGS[size].replace(tile_size=image_size), **options)


def lora_llama3_2_vision_11b(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    decoder_trainable: str = "frozen",
    encoder_trainable: str = "lora",
    fusion_trainable: str = "lora",
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    image_size: int = 560,
    *,
    profile: str | Profile = "torchtune",
) -> DeepFusionModel:
    """Llama 3.2 Vision 11B with adapters in the parts whose X_trainable is "lora"; "frozen" parts have none.

    quantize_base: NF4 weights under and beside the adapters; torchao's scaler blocks are of 200 in the encoder, 256 in the decoder.
    Raises ValueError for another word, and for "full", which torchtune has taken out.
    """
    return _lora("11b", **locals())


def lora_llama3_2_vision_90b(
    lora_attn_modules: list[LORA_ATTN_MODULES],
    decoder_trainable: str = "frozen",
    encoder_trainable: str = "lora",
    fusion_trainable: str = "lora",
    apply_lora_to_mlp: bool = False,
    apply_lora_to_output: bool = False,
    lora_rank: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    quantize_base: bool = False,
    image_size: int = 560,
    *,
    profile: str | Profile = "torchtune",
) -> DeepFusionModel:
    """Llama 3.2 Vision 90B with adapters. Arguments as lora_llama3_2_vision_11b."""
    return _lora("90b", **locals())


def _lora(size: str, image_size: int, **adapters: Any) -> DeepFusionModel:
    names = ("decoder_trainable", "encoder_trainable", "fusion_trainable")
    parts = {name: TrainableParams(adapters.pop(name).lower()) for name in names}
    full = [name for name, part in parts.items() if part is TrainableParams.FULL]
    if full:
        raise InvalidArgument(
            f"We've temporarily removed support for mixed LoRA + Full Finetuning yet, {', '.join(full)} must be 'lora' or 'frozen', not 'full'"
        )
    lora = {name.replace("trainable", "lora"): part is TrainableParams.LORA for name, part in parts.items()}
    # 25,600 blocks of a 1280 x 1280 weight are no multiple of 256.
    scaler = {"scaler_block_size": 200 if adapters["quantize_base"] else None}
    return build_lora(CONFIGS[size].replace(tile_size=image_size), **adapters, **lora, **scaler)


qlora_llama3_2_vision_11b = partial(lora_llama3_2_vision_11b, quantize_base=True)
qlora_llama3_2_vision_90b = partial(lora_llama3_2_vision_90b, quantize_base=True)
