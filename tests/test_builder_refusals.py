"""Every builder that takes an argument refuses what no model can be built from, in the same words, and before it builds half of it."""

import inspect
import re

import pytest
import torch
from torch import nn

from fastfuse.models import clip, llama3_1
from fastfuse.models import llama3_2_vision as vision
from fastfuse.models.clip import _component_builders as clip_parts
from fastfuse.modules import (
    MultiHeadAttention,
    TiledTokenPositionalEmbedding,
    TokenPositionalEmbedding,
    VisionRotaryPositionalEmbeddings,
    VisionTransformer,
)

CLIP = {"tile_size": 28, "patch_size": 14, "embed_dim": 32, "num_layers": 2, "num_heads": 4}
ENCODER = {"patch_size": 14, "num_heads": 4, "clip_embed_dim": 32, "clip_num_layers": 2, "clip_hidden_states": [0], "num_layers_projection": 1}
ENCODER |= {"decoder_embed_dim": 64, "tile_size": 28}
HEAD = {"num_layers": 1, "num_heads": 4, "decoder_embed_dim": 64, "clip_embed_dim": 32, "num_hidden_inputs": 1}
DECODER = {"vocab_size": 40, "num_layers": 2, "fusion_interval": 2, "num_special_tokens": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 64}
DECODER |= {"max_seq_len": 16, "encoder_max_seq_len": 20}
RANK = {"lora_rank": 4, "lora_alpha": 8}
ADAPT = {"lora_modules": ["q_proj"], **RANK}
PARTS = {"lora_attn_modules": ["q_proj"], "fusion_lora": True}
MLP = {"in_dim": 32, "out_dim": 32, "hidden_dim": 64, "activation": nn.GELU()}
SMALL = vision.Llama3VisionConfig(
    tile_size=28, clip_embed_dim=32, clip_num_heads=4, clip_num_layers=2, clip_hidden_dim=64, clip_hidden_states=(0,), num_layers_projection=1, vocab_size=40,
    num_layers=2, fusion_interval=2, num_heads=4, num_kv_heads=2, embed_dim=64, intermediate_dim=128, max_seq_len=16, encoder_max_seq_len=20,
)  # fmt: skip


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
    "11b": (vision.llama3_2_vision_11b, {}),
    "90b": (vision.llama3_2_vision_90b, {}),
    "lora_11b": (vision.lora_llama3_2_vision_11b, {"lora_attn_modules": ["q_proj"]}),
    "lora_90b": (vision.lora_llama3_2_vision_90b, {"lora_attn_modules": ["q_proj"]}),
    "qlora_11b": (vision.qlora_llama3_2_vision_11b, {"lora_attn_modules": ["q_proj"]}),
    "qlora_90b": (vision.qlora_llama3_2_vision_90b, {"lora_attn_modules": ["q_proj"]}),
    "VisionTransformer": (
        VisionTransformer,
        {name: CLIP[name] for name in CLIP if name != "num_heads"} | {"layer": nn.Identity(), "token_pos_embedding": nn.Identity()},
    ),
    "TokenPositionalEmbedding": (TokenPositionalEmbedding, {"embed_dim": 32, "tile_size": 28, "patch_size": 14}),
    "TiledTokenPositionalEmbedding": (TiledTokenPositionalEmbedding, {"max_num_tiles": 4, "embed_dim": 32, "tile_size": 28, "patch_size": 14}),
    "VisionRotaryPositionalEmbeddings": (VisionRotaryPositionalEmbeddings, {"patch_size": 14, "tile_size": 28, "dim": 8}),
    "MultiHeadAttention": (
        MultiHeadAttention,
        {"embed_dim": 32, "num_heads": 4, "num_kv_heads": 2, "head_dim": 8} | dict.fromkeys(["q_proj", "k_proj", "v_proj", "output_proj"], nn.Identity()),
    ),
}
HEADS = r"must be divisible by (num_kv_heads|num_heads)"
UNKNOWN = "expected a list of q_proj, k_proj, v_proj, output_proj"
BAD = [
    ("patch_size", 0, "patch_size must be > 0. Got patch_size=0"),
    ("patch_size", -14, "patch_size must be > 0. Got patch_size=-14"),
    ("tile_size", 0, "tile_size must be > 0. Got tile_size=0"),
    ("image_size", -560, "tile_size must be > 0. Got tile_size=-560"),
    *((name, bad, HEADS) for name in ("num_heads", "clip_num_heads") for bad in (0, -4, 5)),
    *(("num_kv_heads", bad, HEADS) for bad in (-2, 3)),
    *((name, 0, HEADS) for name in ("embed_dim", "clip_embed_dim")),
    ("fusion_interval", 0, "fusion_interval is 0, expected at least 1"),
    ("cross_attention_layers", [9], r"cross_attention_layers has \[9\]"),
    ("out_indices", [0, 1, 2], r"len\(out_indices\) must be <= num_layers. Got out_indices=\[0, 1, 2\] and num_layers=2"),
    ("clip_hidden_states", [0, 1, 2], r"len\(out_indices\) must be <= num_layers. Got out_indices=\[0, 1, 2\] and num_layers=2"),
    ("pad_tokens_to", 0, "pad_tokens_to must be >= 1. Got pad_tokens_to=0"),
    ("aspect_ratios", [(3, 3)], r"aspect_ratios has \(3, 3\), which is not 1 to max_num_tiles=4 tiles"),
    ("attn_dropout", 2.0, r"attn_dropout \(2.0\) must be between 0.0 and 1.0"),
    ("lora_rank", 0, "rank is 0, expected at least 1"),
    ("lora_dropout", 1.5, "dropout is 1.5, expected 0 to 1"),
    ("lora_modules", ["qproj"], UNKNOWN),
    ("lora_attn_modules", ["qproj"], UNKNOWN),
    ("lora_attn_modules", "q_proj", UNKNOWN),
    ("profile", "hf", "profile is 'hf', expected one of"),
    ("decoder_trainable", "all", "'all' is not a valid TrainableParams"),
    ("encoder_trainable", "full", "removed support for mixed LoRA"),
]


def takes(build) -> set[str]:
    return getattr(build, "takes", None) or set(inspect.signature(build).parameters)


def applies(name: str, build, argument: str) -> bool:
    if argument not in takes(build):
        return False
    if argument.endswith("_trainable"):
        return re.match("q?lora_", name) is not None  # the plain builders take bools
    if argument == "embed_dim":
        return "num_heads" in takes(build)
    return True


CASES = [
    pytest.param(build, given, argument, bad, message, id=f"{name}({argument}={bad})")
    for name, (build, given) in BUILDERS.items()
    for argument, bad, message in BAD
    if applies(name, build, argument)
]


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # of embed_dim=0
@pytest.mark.parametrize("build, given, argument, bad, message", CASES)
def test_a_value_no_model_can_have_is_a_value_error(build, given, argument, bad, message):
    """On the meta device: a published model that built a part of itself first would take no memory, but most of a test's time."""
    if argument == "aspect_ratios":
        if "profile" in takes(build):
            given = given | {"profile": "transformers"}  # the tables of others are grids of all ratios
        elif given.get("use_tile_pos_embed") is False:
            pytest.skip("without tile embeddings the ratios are not looked at")
    with torch.device("meta"), pytest.raises(ValueError) as error:
        build(**given | {argument: bad})
    assert re.search(message, str(error.value)) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in BUILDERS if not name.endswith("b")])
def test_what_the_table_starts_from_is_fine(name):
    build, given = BUILDERS[name]
    with torch.device("meta"):
        assert isinstance(build(**given), nn.Module)


@pytest.mark.parametrize("name", [name for name, (build, _) in BUILDERS.items() if "quantize_base" in takes(build) and not name.endswith("b")])
def test_block_sizes_that_do_not_divide_a_weight(name):
    """32 x 32 has 16 blocks, 64 x 64 has 64: no multiple of 256."""
    build, given = BUILDERS[name]
    with torch.device("meta"), pytest.raises(ValueError, match=r"to_nf4: a weight of shape \(\d+, \d+\) has \d+ scale blocks of 64, .* would do$"):
        build(**given, quantize_base=True)


@pytest.mark.parametrize("name", [name for name, (build, _) in BUILDERS.items() if "quantization_kwargs" in takes(build) and name != "clip_mlp"])
def test_block_sizes_need_quantize_base(name):
    build, given = BUILDERS[name]
    with torch.device("meta"), pytest.raises(ValueError, match="``quantize_base`` is False, but received the following quantization arguments"):
        build(**given, scaler_block_size=16)
