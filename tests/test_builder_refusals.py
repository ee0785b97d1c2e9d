"""Every builder has torchtune's signature, and refuses what no model can be built from, in the same words, before it builds half of it.

What VisionTransformer and MultiHeadAttention refuse by themselves: test_vision_transformer.py, test_modules.py."""

import inspect
import re

import pytest
import torch
from small_vision import DECODER, ENCODER, SMALL
from torch import nn

from fastfuse.models import clip, llama3_1
from fastfuse.models import llama3_2_vision as vision
from fastfuse.models.clip import _component_builders as clip_parts
from fastfuse.modules import TiledTokenPositionalEmbedding, TokenPositionalEmbedding, VisionRotaryPositionalEmbeddings

CLIP = {"tile_size": 28, "patch_size": 14, "embed_dim": 32, "num_layers": 2, "num_heads": 4}
HEAD = {"num_layers": 1, "num_heads": 4, "decoder_embed_dim": 64, "clip_embed_dim": 32, "num_hidden_inputs": 1}
TOKENS = {"embed_dim": 32, "tile_size": 28, "patch_size": 14}
RANK = {"lora_rank": 4, "lora_alpha": 8}
ADAPT = {"lora_modules": ["q_proj"], **RANK}
PARTS = {"lora_attn_modules": ["q_proj"], "fusion_lora": True}
MLP = {"in_dim": 32, "out_dim": 32, "hidden_dim": 64, "activation": nn.GELU()}


def _of_config(make, **fixed):
    """`make` with a configuration's fields as keywords of its own."""

    def build(**changed):
        fields = {name: value for name, value in changed.items() if name in SMALL.__dataclass_fields__}
        return make(SMALL.replace(**fields), **fixed, **{name: value for name, value in changed.items() if name not in fields})

    build.takes = {*SMALL.__dataclass_fields__, *inspect.signature(make).parameters}
    return build


BUILDERS = {
    "clip_vision_encoder": (clip.clip_vision_encoder, CLIP),
    "clip_vision_encoder, rope": (clip.clip_vision_encoder, CLIP | {"use_rope": True}),
    "clip_vision_encoder, one tile": (clip.clip_vision_encoder, CLIP | {"use_tile_pos_embed": False}),
    "lora_clip_vision_encoder": (clip.lora_clip_vision_encoder, CLIP | ADAPT),
    "clip_attention": (clip_parts.clip_attention, {"embed_dim": 32, "num_heads": 4}),
    "lora_clip_attention": (clip.lora_clip_attention, {"embed_dim": 32, "head_dim": 8, "num_heads": 4, "num_kv_heads": 4} | ADAPT),
    "clip_mlp": (clip.clip_mlp, MLP),
    "lora_clip_mlp": (clip.lora_clip_mlp, MLP | RANK),
    "llama3_mlp": (llama3_1.llama3_mlp, {"dim": 32, "hidden_dim": 64}),
    "lora_llama3_mlp": (llama3_1.lora_llama3_mlp, {"dim": 32, "hidden_dim": 64} | RANK),
    "lora_llama3_attention": (llama3_1.lora_llama3_attention, {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 8} | ADAPT),
    "encoder": (vision.llama3_2_vision_encoder, ENCODER),
    "lora_encoder": (vision.lora_llama3_2_vision_encoder, ENCODER | PARTS | {"encoder_lora": True}),
    "head": (vision.llama3_2_vision_projection_head, HEAD),
    "lora_head": (vision.lora_llama3_2_vision_projection_head, HEAD | ADAPT | {"apply_lora_to_mlp": True, "apply_lora_to_output": True}),
    "decoder": (vision.llama3_2_vision_decoder, DECODER),
    "lora_decoder": (vision.lora_llama3_2_vision_decoder, DECODER | PARTS | {"decoder_lora": True}),
    "build": (_of_config(vision.build), {}),
    "build_lora": (_of_config(vision.build_lora, decoder_lora=True), {"lora_attn_modules": ["q_proj"]}),
    **{
        kind + size: (getattr(vision, f"{kind}llama3_2_vision_{size}"), {"lora_attn_modules": ["q_proj"]} if kind else {})
        for kind in ("", "lora_", "qlora_")
        for size in ("11b", "90b")
    },
    "TokenPositionalEmbedding": (TokenPositionalEmbedding, TOKENS),
    "TiledTokenPositionalEmbedding": (TiledTokenPositionalEmbedding, TOKENS | {"max_num_tiles": 4}),
    "VisionRotaryPositionalEmbeddings": (VisionRotaryPositionalEmbeddings, {"patch_size": 14, "tile_size": 28, "dim": 8}),
}
HEADS = r"must be divisible by (num_kv_heads|num_heads)"
FULL = r"We've temporarily removed support for mixed LoRA \+ Full Finetuning yet"
UNKNOWN = "expected a list of q_proj, k_proj, v_proj, output_proj"
BAD = [
    ("patch_size", 0, "patch_size must be > 0. Got patch_size=0"),
    ("tile_size", 0, "tile_size must be > 0. Got tile_size=0"),
    ("image_size", -560, "tile_size must be > 0. Got tile_size=-560"),
    *((name, bad, HEADS) for name in ("num_heads", "clip_num_heads") for bad in (0, -4, 5)),
    *(("num_kv_heads", bad, HEADS) for bad in (-2, 3)),
    *((name, 0, HEADS) for name in ("embed_dim", "clip_embed_dim")),
    ("fusion_interval", 0, "fusion_interval is 0, expected at least 1"),
    ("cross_attention_layers", [9, -1], r"cross_attention_layers has \[-1, 9\], the layers are 0 to 5"),
    ("out_indices", [0, 1, 2], r"len\(out_indices\) must be <= num_layers. Got out_indices=\[0, 1, 2\] and num_layers=2"),
    ("clip_hidden_states", [0, 1, 2, 3], r"len\(out_indices\) must be <= num_layers. Got out_indices=\[0, 1, 2, 3\] and num_layers=3"),
    ("pad_tokens_to", 0, "pad_tokens_to must be >= 1. Got pad_tokens_to=0"),
    ("aspect_ratios", [(3, 3)], r"aspect_ratios has \(3, 3\), which is not 1 to max_num_tiles=4 tiles"),
    ("attn_dropout", 2.0, r"attn_dropout \(2.0\) must be between 0.0 and 1.0"),
    ("lora_rank", 0, "rank is 0, expected at least 1"),
    ("lora_dropout", 1.5, "dropout is 1.5, expected 0 to 1"),
    ("lora_modules", ["q_proj", "w1"], UNKNOWN),
    ("lora_modules", [], r"Must pass one or more of typing\.Literal\['q_proj', 'k_proj', 'v_proj', 'output_proj'\]"),
    ("lora_attn_modules", ["qproj"], UNKNOWN),
    ("lora_attn_modules", "q_proj", UNKNOWN),
    ("profile", "hf", r"profile is 'hf', expected one of \['torchtune', 'meta', 'transformers'\]"),
    ("decoder_trainable", "all", "'all' is not a valid TrainableParams"),
    ("encoder_trainable", "full", FULL),
    ("fusion_trainable", "Full", FULL),
    ("scaler_block_size", 16, "``quantize_base`` is False, but received the following quantization arguments"),
    ("quantize_base", True, r"to_nf4: a weight of shape \(\d+, \d+\) has \d+ scale blocks of 64, .* would do$"),
]


def takes(build):
    return getattr(build, "takes", None) or set(inspect.signature(build).parameters)


def applies(name, argument, bad):
    build, given = BUILDERS[name]
    if argument == "scaler_block_size":
        return "quantization_kwargs" in takes(build) and name != "clip_mlp"  # which ignores them
    if argument not in takes(build) or (argument == "aspect_ratios" and given.get("use_tile_pos_embed") is False):
        return False
    if argument.endswith("_trainable"):
        return re.match("q?lora_", name) is not None  # the plain builders take bools
    if argument == "embed_dim":
        return "num_heads" in takes(build)
    if argument == "quantize_base":
        return not name.endswith("b")  # the published sizes are covered
    return bad != [] or not name.startswith("lora_llama")


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of embed_dim=0
@pytest.mark.parametrize("name", BUILDERS)
def test_a_value_no_model_can_have_is_a_value_error(name):
    """On the meta device: a published model that built a part of itself first would take no memory, but most of a test's time."""
    build, given = BUILDERS[name]
    with torch.device("meta"):
        assert name.endswith("b") or isinstance(build(**given), nn.Module)
        for argument, bad, message in BAD:
            if applies(name, argument, bad):
                # the tile tables of other profiles are grids of all ratios
                profile = {"profile": "transformers"} if argument == "aspect_ratios" and "profile" in takes(build) else {}
                with pytest.raises(ValueError) as error:
                    build(**given | profile | {argument: bad})
                assert re.search(message, str(error.value)) and "\n" not in str(error.value), f"{argument}={bad}: {error.value}"
                assert isinstance(error.value, AssertionError) or message != FULL


CLIP_SIZES = "tile_size, patch_size, embed_dim, num_layers, num_heads, activation=SiLU, cls_output_dim=512, "
CLIP_REST = "output_cls_projection=False, max_num_tiles=4, in_channels=3, "
ADAPTERS = "lora_rank=8, lora_alpha=16, lora_dropout=0.0, use_dora=False, quantize_base=False"
CHOICES = "lora_attn_modules, apply_lora_to_mlp=False, apply_lora_to_output=False, "
ENCODER_SIZES = "patch_size, num_heads, clip_embed_dim, clip_num_layers, clip_hidden_states, num_layers_projection, decoder_embed_dim, tile_size, "
DECODER_SIZES = "vocab_size, num_layers, fusion_interval, num_special_tokens, num_heads, num_kv_heads, embed_dim, max_seq_len, encoder_max_seq_len, "
PUBLISHED = "decoder_trainable=False, encoder_trainable=True, fusion_trainable=True, image_size=560, *"
PUBLISHED_LORA = "lora_attn_modules, decoder_trainable=frozen, encoder_trainable=lora, fusion_trainable=lora, apply_lora_to_mlp=False, "
PUBLISHED_LORA += f"apply_lora_to_output=False, {ADAPTERS}, image_size=560, *"
SIGNATURES = {  # as far as torchtune's go
    "clip_vision_encoder": f"{CLIP_SIZES}attn_bias=True, use_rope=False, out_indices=None, {CLIP_REST}append_cls_token=False, use_tile_pos_embed=True, *",
    "lora_clip_vision_encoder": f"lora_modules, apply_lora_to_mlp=False, *, {CLIP_SIZES}attn_bias=False, out_indices=None, {CLIP_REST}{ADAPTERS}",
    "lora_clip_attention": "lora_modules, *, embed_dim, head_dim, num_heads, num_kv_heads, attn_dropout=0.0, attn_bias=False, lora_rank, lora_alpha, "
    "lora_dropout=0.0, use_dora=False, quantize_base=False",
    "clip_mlp": "in_dim, out_dim, hidden_dim, activation, quantize_base=False",
    "lora_clip_mlp": "*, in_dim, out_dim, hidden_dim, activation, lora_rank, lora_alpha, lora_dropout=0.0, use_dora=False, quantize_base=False",
    "encoder": f"*, {ENCODER_SIZES}max_num_tiles=4, in_channels=3",
    "lora_encoder": f"encoder_lora, fusion_lora, {CHOICES}*, {ENCODER_SIZES}max_num_tiles=4, in_channels=3, {ADAPTERS}",
    "decoder": f"*, {DECODER_SIZES}rope_base=500000.0, intermediate_dim=None",
    "lora_decoder": f"decoder_lora, fusion_lora, {CHOICES}*, {DECODER_SIZES}rope_base=500000.0, intermediate_dim=None, {ADAPTERS}",
    **dict.fromkeys(["11b", "90b"], PUBLISHED),
    **dict.fromkeys(["lora_11b", "lora_90b"], PUBLISHED_LORA),
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_signatures_are_torchtune_s(name):
    shown = []
    for p in inspect.signature(BUILDERS[name][0]).parameters.values():
        if p.kind is p.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        shown.append(p.name if p.default is p.empty else f"{p.name}={getattr(p.default, '__name__', p.default)}")
    assert ", ".join(shown).startswith(SIGNATURES[name])
