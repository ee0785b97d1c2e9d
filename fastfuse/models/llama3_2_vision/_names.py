"""What Llama-3.2-Vision's tensors are called in torchtune's, transformers' and Meta's checkpoints: one table for all conversions."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

# How the values of a row differ between the layouts. SAME: not at all. Q, K: transformers rotates halves of a head, Meta
# and torchtune adjacent pairs. TEXT, SPECIAL: the first and last rows of transformers' one embedding. CONV: flat in Meta's.
# TILES: one table of tile positions (a grid), or a row per aspect ratio.
SAME, Q, K, TEXT, SPECIAL, CONV, TILES = "same", "q", "k", "text", "special", "conv", "tiles"


def _attention(hf: str, meta: str, q: str = SAME, k: str = SAME) -> list[tuple[str, ...]]:
    rows = [("q_proj", "q_proj", "wq", q), ("k_proj", "k_proj", "wk", k), ("v_proj", "v_proj", "wv", SAME), ("output_proj", "o_proj", "wo", SAME)]
    return [(f"attn.{tune}.weight", f"{hf}.{theirs}.weight", f"{meta}.{short}.weight", kind) for tune, theirs, short, kind in rows]


def _with_bias(*rows: tuple[str, ...]) -> list[tuple[str, ...]]:
    return [tuple(f"{name}.{tensor}" for name in row) for row in rows for tensor in ("weight", "bias")]


_TEXT_MLP = [
    ("mlp.w1.weight", "mlp.gate_proj.weight", "feed_forward.w1.weight"),
    ("mlp.w2.weight", "mlp.down_proj.weight", "feed_forward.w2.weight"),
    ("mlp.w3.weight", "mlp.up_proj.weight", "feed_forward.w3.weight"),
    ("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight"),
]
_CLIP_LAYER = _attention("self_attn", "attn") + _with_bias(
    ("mlp.w1", "mlp.fc1", "mlp.c_fc"),
    ("mlp.w2", "mlp.fc2", "mlp.c_proj"),
    ("sa_norm", "input_layernorm", "ln_1"),
    ("mlp_norm", "post_attention_layernorm", "ln_2"),
)
# (tune, transformers on disk, meta): prefixes, then rows of suffixes and what differs, SAME where left out. {} is the layer.
_TABLE = {
    ("decoder.", "language_model.", "text_model."): [
        ("tok_embeddings.weight", "model.embed_tokens.weight", "tok_embeddings.weight", TEXT),
        ("tok_embeddings.fusion_embedding.weight", "model.embed_tokens.weight", "learnable_embedding.weight", SPECIAL),
        ("norm.scale", "model.norm.weight", "norm.weight"),
        ("output.weight", "lm_head.weight", "output.weight"),
    ],
    ("decoder.layers.{}.", "language_model.model.layers.{}.", "text_model.layers.{}."): [
        *_attention("self_attn", "attention", Q, K),
        ("sa_norm.scale", "input_layernorm.weight", "attention_norm.weight"),
        *_TEXT_MLP,
    ],
    ("decoder.layers.{}.fusion_layer.", "language_model.model.layers.{}.", "text_model.cross_attention_layers.{}."): [
        *_attention("cross_attn", "attention"),
        ("attn.q_norm.scale", "cross_attn.q_norm.weight", "attention.q_norm.weight"),
        ("attn.k_norm.scale", "cross_attn.k_norm.weight", "attention.k_norm.weight"),
        ("ca_norm.scale", "input_layernorm.weight", "attention_norm.weight"),
        ("ca_scale.scale", "cross_attn_attn_gate", "gate_attn"),
        ("mlp_scale.scale", "cross_attn_mlp_gate", "gate_ffwd"),
        *_TEXT_MLP,
    ],
    ("encoder.clip.", "vision_model.", "vision_model.vision_encoder."): [
        ("conv.weight", "patch_embedding.weight", "conv1._linear.weight", CONV),
        ("cls_token_embedding.weight", "class_embedding", "class_embedding"),
        *_with_bias(("ln_pre", "layernorm_pre", "ln_pre"), ("ln_post", "layernorm_post", "ln_post")),
        ("pre_tile_pos_embed.embedding", "pre_tile_positional_embedding.embedding.weight", "pre_tile_pos_embed.embedding", TILES),
        ("pre_tile_pos_embed.gate", "pre_tile_positional_embedding.gate", "pre_tile_pos_embed.gate"),
        ("post_tile_pos_embed.embedding", "post_tile_positional_embedding.embedding.weight", "post_tile_pos_embed.embedding", TILES),
        ("post_tile_pos_embed.gate", "post_tile_positional_embedding.gate", "post_tile_pos_embed.gate"),
        ("token_pos_embedding.local_token_positional_embedding", "gated_positional_embedding.embedding", "positional_embedding"),
        (
            "token_pos_embedding.global_token_positional_embedding",
            "gated_positional_embedding.tile_embedding.weight",
            "gated_positional_embedding",
            TILES,
        ),
        ("token_pos_embedding.gate", "gated_positional_embedding.gate", "gated_positional_embedding_gate"),
    ],
    ("encoder.clip.layers.{}.", "vision_model.transformer.layers.{}.", "vision_model.vision_encoder.transformer.resblocks.{}."): _CLIP_LAYER,
    ("encoder.projection.layers.{}.", "vision_model.global_transformer.layers.{}.", "vision_model.vision_encoder.global_transformer.resblocks.{}."): [
        *_CLIP_LAYER,
        ("sa_scale.scale", "gate_attn", "gate_attn"),
        ("mlp_scale.scale", "gate_ffn", "gate_ffn"),
    ],
    ("encoder.projection.output.", "multi_modal_projector.", "vision_model.vision_projection."): [("weight",) * 3, ("bias",) * 3],
}
_IN_MEMORY = [  # transformers since version 5 in memory -> on disk, where all versions agree
    ("model.language_model.", "language_model.model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
]
_PARTS = {"decoder.layers.{}.": "self", "decoder.layers.{}.fusion_layer.": "cross"}


@dataclass(frozen=True)
class Row:
    """A line of the table: one tensor's name in each layout, with {} for the layer, and how its values differ.

    part: whose layer number {} is. "self", "cross": of a self-attention layer of the decoder and of the cross-attention in front of one.
    "lone": of a cross-attention layer that no self-attention layer follows. "": all layouts count alike.
    """

    tune: str
    hf: str
    meta: str
    kind: str = SAME
    part: str = ""


ROWS = [
    Row(*(p + s for p, s in zip(prefixes, row[:3], strict=True)), *row[3:], part=_PARTS.get(prefixes[0], ""))
    for prefixes, rows in _TABLE.items()
    for row in rows
]
ROWS += [replace(row, tune=row.tune.replace(".fusion_layer.", "."), part="lone") for row in ROWS if row.part == "cross"]
TEXT_ROW, SPECIAL_ROW = (next(row for row in ROWS if row.kind == kind) for kind in (TEXT, SPECIAL))
FORMS = ("tune", "hf", "meta")
_BY_NAME = {form: {} for form in FORMS}
for _row in ROWS:
    for _form, _rows in _BY_NAME.items():
        _rows.setdefault(getattr(_row, _form), []).append(_row)
_PREFIXES = {form: tuple(prefix.split("{}")[0] for prefix in column) for form, column in zip(FORMS, zip(*_TABLE, strict=True), strict=True)}
_PREFIXES["hf"] += tuple(memory for memory, _ in _IN_MEMORY)


def form_of(name: str) -> str | None:
    """The format a name is of; a Meta file's vision_model. is told from transformers' by what follows."""
    return next((form for form in ("meta", "tune", "hf") if name.startswith(_PREFIXES[form])), None)


def find_row(form: str, name: str, numbers: Iterable[tuple[str, int]]) -> tuple[Row, int | None] | None:
    """The row of a name and its number, None where there is none. numbers: the parts and layers that are in the decoder."""
    number = re.search(r"\.(\d+)\.", name)
    pattern = name if number is None else f"{name[: number.start()]}.{{}}.{name[number.end() :]}"
    number = None if number is None else int(number[1])
    rows = _BY_NAME[form].get(pattern, ())
    return next(((row, number) for row in rows if not row.part or (row.part, number) in numbers), None)


def numbers_in(names: Iterable[str], prefix: str) -> set[int]:
    """The numbers that follow the prefix."""
    return {int(name[len(prefix) :].split(".", 1)[0]) for name in names if re.match(re.escape(prefix) + r"\d+\.", name)}


def on_disk(name: str) -> str:
    """transformers' name of a tensor or module as files have it, from the one in memory or on disk."""
    return _renamed(name, _IN_MEMORY)


def in_memory(name: str) -> str:
    """The inverse of on_disk."""
    return _renamed(name, [(disk, memory) for memory, disk in _IN_MEMORY])


def _renamed(name: str, prefixes: Iterable[tuple[str, str]]) -> str:
    return next((new + name[len(old) :] for old, new in prefixes if name.startswith(old)), name)
