"""What a conversion needs to know of a model, read from its own modules."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from fastfuse.checkpoints.files import Checkpoint
from fastfuse.models.llama3_2_vision._config import hf_config
from fastfuse.models.llama3_2_vision._convert_weights import Layout, all_aspect_ratios, tune_plan
from fastfuse.models.llama3_2_vision._layer_plan import LayerEntry

_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # torch.compile's and activation checkpointing's names for the module inside


@dataclass(frozen=True)
class Owned:
    """A parameter or persistent buffer, and the module it belongs to with that module's prefix in the state dict."""

    module: nn.Module
    prefix: str
    tensor: torch.Tensor


def tensors_of(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, Owned]]:
    """State-dict names and tensors without calling state_dict, whose hooks dequantize a whole model at once."""
    for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if tensor is not None and name not in module._non_persistent_buffers_set:
            yield prefix + name, Owned(module, prefix, tensor)
    children = module._modules
    unnamed = {*_WRAPPERS}  # by structure: what FusionLayer and FusionEmbedding leave out of their keys
    unnamed |= {"layer"} if {"layer", "fusion_layer"} <= children.keys() else set()
    unnamed |= {"embedding"} if {"embedding", "fusion_embedding"} <= children.keys() else set()
    for name, child in children.items():
        if child is not None:
            yield from tensors_of(child, prefix if name in unnamed else f"{prefix}{name}.")


def inner(module: nn.Module) -> nn.Module:
    while (inner := next((module._modules[w] for w in _WRAPPERS if w in module._modules), None)) is not None:
        module = inner
    return module


def layout_of(model: nn.Module) -> Layout:
    """What a conversion needs to know, read from a model's own modules: fastfuse's or torchtune's, matched by structure."""
    model = inner(model)
    layers = getattr(getattr(model, "decoder", None), "layers", None)
    if layers is None:
        raise ValueError(f"{type(model).__name__} is no Llama-3.2-Vision model: it has no decoder.layers")
    plan, position, attention = [], 0, None
    for layer in map(inner, layers):
        if hasattr(layer, "fusion_layer"):
            if not layer.fusion_first:
                raise ValueError("fusion layers that run after their layer have no place in transformers' or Meta's checkpoints")
            plan.append(LayerEntry(position, position + 1))
        else:
            plan.append(LayerEntry(position) if hasattr(layer, "ca_norm") else LayerEntry(None, position))
        position += 2 if plan[-1].kind == "fusion" else 1
        if attention is None and plan[-1].kind != "cross":
            attention = inner(layer.layer if plan[-1].kind == "fusion" else layer).attn
    attention = inner(layers[0]).attn if attention is None else attention
    tokens = inner(model.decoder.tok_embeddings)
    vocab_size = getattr(tokens, "embedding", tokens).weight.shape[0]
    clip = getattr(getattr(model, "encoder", None), "clip", None)
    table = getattr(getattr(clip, "token_pos_embedding", None), "global_token_positional_embedding", None)
    special = tokens.fusion_embedding.weight.shape[0] if hasattr(tokens, "fusion_embedding") else None
    layout = Layout(plan, attention.num_heads, attention.num_kv_heads, attention.head_dim, vocab_size, num_special_tokens=special)
    if table is None:
        return layout
    ratios = getattr(clip.token_pos_embedding, "aspect_ratios", None)
    tiles = table.shape[1]
    return replace(
        layout,
        encoder_dim=table.shape[-1],
        num_tiles=tiles,
        aspect_ratios=all_aspect_ratios(tiles) if ratios is None else tuple(ratios),
        tile_tables="grid" if ratios is None else "ratios",
    )


def layout_to_load(model: nn.Module, checkpoint: Checkpoint, form: str, tied: bool | None, ratios: Iterable | None) -> Layout:
    layout = replace(layout_of(model), check=True)
    config = checkpoint.config or {}
    if tied is None:
        tied = bool(config.get("tie_word_embeddings") or (config.get("text_config") or {}).get("tie_word_embeddings"))
    if form == "meta":
        return layout
    shapes = {name.removeprefix("model."): checkpoint.shape(name) for name in checkpoint if "class_embedding" in name or "pre_tile" in name}
    width = shapes.get("vision_model.class_embedding", (layout.encoder_dim,))[0]
    tiles = shapes.get("vision_model.pre_tile_positional_embedding.embedding.weight", (0, layout.num_tiles * width))[1] // width
    ratios = tuple((h, w) for h, w in ratios) if ratios is not None else ratios_in(config)
    if layout.tile_tables == "ratios":
        if ratios is not None and ratios != layout.aspect_ratios:
            raise ValueError(f"{checkpoint.path}: its aspect ratios {ratios} are not the model's {layout.aspect_ratios}")
        ratios = layout.aspect_ratios
    return replace(layout, encoder_dim=width, num_tiles=max(tiles, 1), aspect_ratios=ratios or all_aspect_ratios(tiles), tie_word_embeddings=tied)


def ratios_in(config: Mapping[str, Any] | None) -> tuple[tuple[int, int], ...] | None:
    found = ((config or {}).get("vision_config") or {}).get("supported_aspect_ratios")
    return None if found is None else tuple((h, w) for h, w in found)


def layout_from_config(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any] | None, form: str) -> Layout:
    """For a state dict: the layers and tables as its keys and shapes tell, the heads as config does."""
    if form == "hf" and config is None:
        raise ValueError("save_checkpoint: a state dict does not tell the attention heads: give config, or the model itself")
    layout = Layout(tune_plan(tensors))
    table = tensors.get("encoder.clip.token_pos_embedding.global_token_positional_embedding")
    if table is not None:
        tiles = table.shape[1]
        ratios = ratios_in(config) or all_aspect_ratios(tiles)
        layout = replace(layout, num_tiles=tiles, aspect_ratios=ratios, tile_tables="grid" if table.shape[0] == tiles else "ratios")
    if form == "meta":
        return layout
    text = hf_config(config)["text_config"]
    heads = text["num_attention_heads"]
    return replace(
        layout,
        plan=tune_plan(tensors, text["cross_attention_layers"], text["num_hidden_layers"]),
        num_heads=heads,
        num_kv_heads=text["num_key_value_heads"],
        head_dim=text.get("head_dim") or text["hidden_size"] // heads,
    )


def is_sharded(t: torch.Tensor) -> bool:
    return type(t.data).__name__ == "DTensor"
