"""Llama 3.2 Vision in a size for tests, what it is called with, and what its state dict's keys say of a layer."""

import copy
import re

import torch
from dense_vision import rope_frequencies

from fastfuse.models.llama3_2_vision import (
    Llama3VisionConfig,
    llama3_2_vision_decoder,
    llama3_2_vision_encoder,
    lora_llama3_2_vision_decoder,
    lora_llama3_2_vision_encoder,
)
from fastfuse.modules import Llama3ScaledRoPE, RotaryPositionalEmbeddings
from fastfuse.modules.model_fusion import DeepFusionModel

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
PARTS = ("decoder", "encoder", "fusion")
ENCODER = {"patch_size": 4, "num_heads": 2, "clip_embed_dim": 16, "clip_num_layers": 3, "clip_hidden_states": [0, 2], "num_layers_projection": 2}
ENCODER |= {"decoder_embed_dim": 32, "tile_size": 12}
DECODER = {"vocab_size": 24, "num_layers": 4, "fusion_interval": 2, "num_special_tokens": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
DECODER |= {"max_seq_len": 32, "encoder_max_seq_len": 80, "intermediate_dim": 48}
SMALL = Llama3VisionConfig(
    **{name: size for name, size in ENCODER.items() if name not in ("num_heads", "clip_hidden_states", "decoder_embed_dim")}, **DECODER,
    clip_num_heads=2, clip_hidden_dim=64, clip_hidden_states=(0, 2),
)  # fmt: skip
N = 10
SUPPORTED = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
RATIOS = torch.tensor([[[2, 2], [1, 3]], [[4, 1], [1, 1]]])
KNOWN = {"clip_heads": 2, "heads": 4, "kv_heads": 2, "out_indices": (0, 2)}
LORA = {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": True, "lora_rank": 2, "lora_alpha": 3}


def small(**kwargs):
    return DeepFusionModel(llama3_2_vision_decoder(**DECODER, **kwargs), llama3_2_vision_encoder(**ENCODER, **kwargs), encoder_trainable=True)


def small_lora(decoder=True, encoder=True, fusion=True, encoder_kwargs=None, **kwargs):
    made_encoder = lora_llama3_2_vision_encoder(encoder, fusion, **{**LORA, **kwargs}, **ENCODER, **(encoder_kwargs or {}))
    return DeepFusionModel(lora_llama3_2_vision_decoder(decoder, fusion, **{**LORA, **kwargs}, **DECODER), made_encoder)


def inputs(s=7):
    images = torch.randn(2, 2, 4, 3, 12, 12)
    tokens = torch.randint(0, 26, (2, s))
    mask = torch.rand(2, s, 2 * 4 * N) > 0.5
    mask[0, :3] = False
    mask[1, 4] = False
    return tokens, images, mask


def call(model, tokens, images, encoder_mask, **given):
    return model(tokens, encoder_input={"images": images, "aspect_ratio": RATIOS}, encoder_mask=encoder_mask, **given)


def rope_table(length, dim, base, **scaling):
    """cos and sin in float64."""
    angle = torch.outer(torch.arange(length).double(), torch.tensor(rope_frequencies(dim, base, **scaling), dtype=torch.float64))
    return torch.stack([angle.cos(), angle.sin()], -1)


def in_float64(model):
    """A copy whose rotary tables, which stay fp32 in any model, hold the exact angles too."""
    model = copy.deepcopy(model).double()
    for m in model.modules():
        if isinstance(m, RotaryPositionalEmbeddings):
            exact = rope_table(m.cache.shape[0], m.dim, m.base, scale=8 if isinstance(m, Llama3ScaledRoPE) else 1)
            assert torch.allclose(m.cache.double(), exact, rtol=0, atol=(m.cache.shape[0] - 1) * 2**-22)
            m.cache = exact
    return model


def shapes(model):
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


def state_dict_key(name):
    """Of a parameter: FusionLayer and FusionEmbedding leave parts of its name out."""
    return name.replace(".layer.", ".").replace("tok_embeddings.embedding.", "tok_embeddings.")


def part_of(key):
    if ".fusion_layer." in key or ".fusion_embedding." in key or key.startswith("encoder.projection."):
        return "fusion"
    return key.split(".")[0]


def is_linear(key):
    return bool(re.search(r"(attn\.\w+_proj|mlp\.w[123]|(decoder|projection)\.output)\.weight$", key))


def is_adapted(key, modules, parts, mlp, output):
    if not is_linear(key) or part_of(key) not in parts:
        return False
    name = key.split(".")[-2]
    return name in modules or (mlp and ".mlp." in key) or (output and name == "output")


def is_nf4(key, parts):
    """Of a QLoRA model: what is linear in adapted parts, and every MLP of the decoder, but no last layer."""
    return is_linear(key) and "output.weight" not in key and (part_of(key) in parts or (key.startswith("decoder") and ".mlp." in key))


def with_adapters(keys, modules, parts, mlp, output, rank, dora):
    """The plain keys with a layer's adapter after its own parameters."""
    out, names = [], list(keys)
    for at, name in enumerate(names):
        out.append((name, keys[name]))
        layer = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
        ends = at + 1 == len(names) or names[at + 1] != name.removesuffix("weight") + "bias"
        if ends and is_adapted(layer, modules, parts, mlp, output):
            (n, k), layer = keys[layer], layer.removesuffix("weight")
            out += [(layer + "magnitude", (n,))] if dora else []
            out += [(layer + "lora_a.weight", (rank, k)), (layer + "lora_b.weight", (n, rank))]
    return out


def trained(model):
    return {state_dict_key(name) for name, p in model.named_parameters() if p.requires_grad}
