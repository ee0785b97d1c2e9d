"""Checkpoints of Llama-3.2-Vision between Meta's, transformers' and torchtune's names and layouts.

One table says which tensor is which; a conversion is a list of `Step`s built from it, each from the few source tensors
it needs to its targets, so that a checkpoint can be converted a tensor at a time and, with meta tensors, by shape alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from fastfuse.errors import InvalidArgument
from fastfuse.models.llama3_2_vision._layer_plan import LayerEntry, layer_plan
from fastfuse.ops import lora_row_norms, nf4_dequantize
from fastfuse.quant.nf4 import is_torchao

# How the values of a row differ between the layouts. SAME: not at all. Q, K: transformers rotates halves of a head, Meta
# and torchtune adjacent pairs. TEXT, SPECIAL: the first and last rows of transformers' one embedding. CONV: flat in Meta's.
# TILES: one table of tile positions (a grid), or a row per aspect ratio.
SAME, Q, K, TEXT, SPECIAL, CONV, TILES = "same", "q", "k", "text", "special", "conv", "tiles"

_TEXT_MLP = [
    ("mlp.w1.weight", "mlp.gate_proj.weight", "feed_forward.w1.weight", SAME),
    ("mlp.w2.weight", "mlp.down_proj.weight", "feed_forward.w2.weight", SAME),
    ("mlp.w3.weight", "mlp.up_proj.weight", "feed_forward.w3.weight", SAME),
    ("mlp_norm.scale", "post_attention_layernorm.weight", "ffn_norm.weight", SAME),
]
_CLIP_LAYER = [
    ("attn.q_proj.weight", "self_attn.q_proj.weight", "attn.wq.weight", SAME),
    ("attn.k_proj.weight", "self_attn.k_proj.weight", "attn.wk.weight", SAME),
    ("attn.v_proj.weight", "self_attn.v_proj.weight", "attn.wv.weight", SAME),
    ("attn.output_proj.weight", "self_attn.o_proj.weight", "attn.wo.weight", SAME),
    ("mlp.w1.weight", "mlp.fc1.weight", "mlp.c_fc.weight", SAME),
    ("mlp.w1.bias", "mlp.fc1.bias", "mlp.c_fc.bias", SAME),
    ("mlp.w2.weight", "mlp.fc2.weight", "mlp.c_proj.weight", SAME),
    ("mlp.w2.bias", "mlp.fc2.bias", "mlp.c_proj.bias", SAME),
    ("sa_norm.weight", "input_layernorm.weight", "ln_1.weight", SAME),
    ("sa_norm.bias", "input_layernorm.bias", "ln_1.bias", SAME),
    ("mlp_norm.weight", "post_attention_layernorm.weight", "ln_2.weight", SAME),
    ("mlp_norm.bias", "post_attention_layernorm.bias", "ln_2.bias", SAME),
]
# (tune, transformers on disk, meta): prefixes, then rows of suffixes. {} is the layer.
_TABLE = {
    ("decoder.", "language_model.", "text_model."): [
        ("tok_embeddings.weight", "model.embed_tokens.weight", "tok_embeddings.weight", TEXT),
        ("tok_embeddings.fusion_embedding.weight", "model.embed_tokens.weight", "learnable_embedding.weight", SPECIAL),
        ("norm.scale", "model.norm.weight", "norm.weight", SAME),
        ("output.weight", "lm_head.weight", "output.weight", SAME),
    ],
    ("decoder.layers.{}.", "language_model.model.layers.{}.", "text_model.layers.{}."): [
        ("attn.q_proj.weight", "self_attn.q_proj.weight", "attention.wq.weight", Q),
        ("attn.k_proj.weight", "self_attn.k_proj.weight", "attention.wk.weight", K),
        ("attn.v_proj.weight", "self_attn.v_proj.weight", "attention.wv.weight", SAME),
        ("attn.output_proj.weight", "self_attn.o_proj.weight", "attention.wo.weight", SAME),
        ("sa_norm.scale", "input_layernorm.weight", "attention_norm.weight", SAME),
        *_TEXT_MLP,
    ],
    ("decoder.layers.{}.fusion_layer.", "language_model.model.layers.{}.", "text_model.cross_attention_layers.{}."): [
        ("attn.q_proj.weight", "cross_attn.q_proj.weight", "attention.wq.weight", SAME),
        ("attn.k_proj.weight", "cross_attn.k_proj.weight", "attention.wk.weight", SAME),
        ("attn.v_proj.weight", "cross_attn.v_proj.weight", "attention.wv.weight", SAME),
        ("attn.output_proj.weight", "cross_attn.o_proj.weight", "attention.wo.weight", SAME),
        ("attn.q_norm.scale", "cross_attn.q_norm.weight", "attention.q_norm.weight", SAME),
        ("attn.k_norm.scale", "cross_attn.k_norm.weight", "attention.k_norm.weight", SAME),
        ("ca_norm.scale", "input_layernorm.weight", "attention_norm.weight", SAME),
        ("ca_scale.scale", "cross_attn_attn_gate", "gate_attn", SAME),
        ("mlp_scale.scale", "cross_attn_mlp_gate", "gate_ffwd", SAME),
        *_TEXT_MLP,
    ],
    ("encoder.clip.", "vision_model.", "vision_model.vision_encoder."): [
        ("conv.weight", "patch_embedding.weight", "conv1._linear.weight", CONV),
        ("cls_token_embedding.weight", "class_embedding", "class_embedding", SAME),
        ("ln_pre.weight", "layernorm_pre.weight", "ln_pre.weight", SAME),
        ("ln_pre.bias", "layernorm_pre.bias", "ln_pre.bias", SAME),
        ("ln_post.weight", "layernorm_post.weight", "ln_post.weight", SAME),
        ("ln_post.bias", "layernorm_post.bias", "ln_post.bias", SAME),
        ("pre_tile_pos_embed.embedding", "pre_tile_positional_embedding.embedding.weight", "pre_tile_pos_embed.embedding", TILES),
        ("pre_tile_pos_embed.gate", "pre_tile_positional_embedding.gate", "pre_tile_pos_embed.gate", SAME),
        ("post_tile_pos_embed.embedding", "post_tile_positional_embedding.embedding.weight", "post_tile_pos_embed.embedding", TILES),
        ("post_tile_pos_embed.gate", "post_tile_positional_embedding.gate", "post_tile_pos_embed.gate", SAME),
        ("token_pos_embedding.local_token_positional_embedding", "gated_positional_embedding.embedding", "positional_embedding", SAME),
        (
            "token_pos_embedding.global_token_positional_embedding",
            "gated_positional_embedding.tile_embedding.weight",
            "gated_positional_embedding",
            TILES,
        ),
        ("token_pos_embedding.gate", "gated_positional_embedding.gate", "gated_positional_embedding_gate", SAME),
    ],
    ("encoder.clip.layers.{}.", "vision_model.transformer.layers.{}.", "vision_model.vision_encoder.transformer.resblocks.{}."): _CLIP_LAYER,
    ("encoder.projection.layers.{}.", "vision_model.global_transformer.layers.{}.", "vision_model.vision_encoder.global_transformer.resblocks.{}."): [
        *_CLIP_LAYER,
        ("sa_scale.scale", "gate_attn", "gate_attn", SAME),
        ("mlp_scale.scale", "gate_ffn", "gate_ffn", SAME),
    ],
    ("encoder.projection.output.", "multi_modal_projector.", "vision_model.vision_projection."): [
        ("weight", "weight", "weight", SAME),
        ("bias", "bias", "bias", SAME),
    ],
}


@dataclass(frozen=True)
class Row:
    """A line of the table: one tensor's name in each layout, with {} for the layer, and how its values differ."""

    tune: str
    hf: str
    meta: str
    kind: str

    @property
    def part(self) -> str:
        """Whose layer number {} is: of a "self" or "cross" attention layer of the decoder, or "" where all layouts count alike."""
        if not self.tune.startswith("decoder.layers."):
            return ""
        return "cross" if ".fusion_layer." in self.tune else "self"


ROWS = [Row(*(p + s for p, s in zip(prefixes, row[:3], strict=True)), row[3]) for prefixes, rows in _TABLE.items() for row in rows]
_BY_NAME = {form: {(getattr(row, form), row.part): row for row in ROWS if (form, row.kind) != ("hf", SPECIAL)} for form in ("tune", "hf", "meta")}
_SPECIAL_ROW = next(row for row in ROWS if row.kind == SPECIAL)
_TEXT_ROW = next(row for row in ROWS if row.kind == TEXT)
_OUTPUT = "decoder.output.weight"
_IN_MEMORY = [  # transformers since version 5 in memory -> on disk, where all versions agree
    ("model.language_model.", "language_model.model."),
    ("model.vision_model.", "vision_model."),
    ("model.multi_modal_projector.", "multi_modal_projector."),
    ("lm_head.", "language_model.lm_head."),
]


@dataclass(frozen=True)
class Step:
    """Some source tensors and the targets they give: `convert(*sources)` returns one tensor a target, views where it can.

    Every source belongs to one step and every target too. One source gives several targets (transformers' embedding), or
    several give one (the way back); most steps are one to one. On meta tensors convert gives the shapes.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    convert: Callable[..., tuple[torch.Tensor, ...]] = lambda *tensors: tensors
    kind: str = SAME


@dataclass(frozen=True)
class Layout:
    """What a conversion has to know of a model beside the names.

    plan: layer_plan's entries.  head_dim: of the decoder.  vocab_size: rows of the text embedding, the rest are special:
    num_special_tokens, or any number but none where that is None.
    encoder_dim, num_tiles, aspect_ratios: of the tile tables.  tile_tables: "grid" for torchtune's [T, T, n, d], "ratios"
    for [ratios + 1, T, n, d].  tie_word_embeddings: give a copy of the text embedding as the output where a file has none.
    check: raise ValueError where a grid cannot hold a table of rows per ratio exactly.
    """

    plan: list[LayerEntry] = field(default_factory=list)
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    vocab_size: int = 128256
    encoder_dim: int = 1280
    num_tiles: int = 4
    aspect_ratios: tuple[tuple[int, int], ...] = ()
    tile_tables: str = "grid"
    tie_word_embeddings: bool = False
    check: bool = False
    num_special_tokens: int | None = None

    def numbers(self, form: str) -> dict[tuple[str, int], int]:
        """(part, position in the decoder's layers) -> the layer's number in `form`."""
        if form == "hf":
            return {(part, i): n for i, entry in enumerate(self.plan) for part, n in (("self", entry.hf_self), ("cross", entry.hf_cross)) if n is not None}
        if any(entry.kind == "cross" for entry in self.plan):
            raise InvalidArgument("Meta's layout holds cross-attention in front of self-attention layers only, this model has one that stands alone")
        fusion = [i for i, entry in enumerate(self.plan) if entry.kind == "fusion"]
        return {("self", i): i for i in range(len(self.plan))} | {("cross", i): j for j, i in enumerate(fusion)}


def all_aspect_ratios(num_tiles: int) -> tuple[tuple[int, int], ...]:
    """(height, width) in tiles of every canvas of at most `num_tiles`, in the order of transformers' default config."""
    return tuple((h, w) for h in range(1, num_tiles + 1) for w in range(1, num_tiles // h + 1))


def steps_to_tune(form: str, names: Iterable[str], layout: Layout) -> tuple[list[Step], list[str]]:
    """The steps from `form` ("hf" or "meta") to torchtune's names, and the names the table does not know."""
    entry_of = {(part, n): i for (part, i), n in layout.numbers(form).items()}
    steps, unknown, seen = [], [], {}
    for name in names:
        if "rotary_emb.inv_freq" in name or name == "text_model.rope.freqs":
            continue  # RoPE tables are computed, not loaded
        pattern, number = _pattern(_on_disk(name) if form == "hf" else name)
        for part in ("", "self", "cross"):
            row = _BY_NAME[form].get((pattern, part))
            if row is not None and (not part or (part, number) in entry_of):
                break
        else:
            unknown.append(name)
            continue
        index = entry_of[part, number] if part else number
        target = _numbered(row.tune, index)
        if part == "cross" and layout.plan[index].kind == "cross":
            target = target.replace(".fusion_layer.", ".")
        steps.append(_step_to_tune(form, row, name, target, layout))
        for t in steps[-1].targets:
            if t in seen:
                raise InvalidArgument(f"{seen[t]} and {name} are both {t}")
            seen[t] = name
    if form == "hf" and layout.tie_word_embeddings and _OUTPUT not in seen:
        steps = [_tied(step, layout) if step.kind == TEXT else step for step in steps]
    return steps, unknown


def steps_from_tune(form: str, names: Iterable[str], layout: Layout) -> tuple[list[Step], list[str]]:
    """The steps from torchtune's names to `form` ("hf", with the names transformers writes, or "meta"), and the unknown names."""
    numbers = layout.numbers(form)
    names = list(names)
    steps, unknown = [], []
    for name in names:
        pattern, index = _pattern(name)
        lone = name.startswith("decoder.layers.") and index < len(layout.plan) and layout.plan[index].kind == "cross"
        if lone:
            pattern = pattern.replace("decoder.layers.{}.", "decoder.layers.{}.fusion_layer.")
        row = next((r for part in ("", "self", "cross") if (r := _BY_NAME["tune"].get((pattern, part)))), None)
        if row is None or (row.part and (row.part, index) not in numbers):
            unknown.append(name)
            continue
        target = _numbered(getattr(row, form), numbers[row.part, index] if row.part else index)
        if form == "hf" and row.kind in (TEXT, SPECIAL):
            if not {_TEXT_ROW.tune, _SPECIAL_ROW.tune} <= set(names):
                raise InvalidArgument(f"{target} needs both {_TEXT_ROW.tune} and {_SPECIAL_ROW.tune}, only {name} is there")
            if row.kind == TEXT:
                steps.append(Step((_TEXT_ROW.tune, _SPECIAL_ROW.tune), (target,), lambda text, special: (torch.cat([text, special]),), TEXT))
            continue
        steps.append(_step_from_tune(form, row, name, target, layout))
    return steps, unknown


def convert(steps: Iterable[Step], tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Run every step: a whole state dict at once, sharing storage with `tensors` where nothing had to move."""
    return {t: value for step in steps for t, value in zip(step.targets, step.convert(*(tensors[s] for s in step.sources)), strict=True)}


def rows_to_grid(rows: torch.Tensor, aspect_ratios: Iterable[tuple[int, int]], name: str = "tile table", check: bool = False) -> torch.Tensor:
    """transformers' [ratios + 1, T, n, d] as torchtune's grid [T, T, n, d]: cell (y, x) from the largest canvas that has it.

    Cells no canvas uses are 0. With check, raises ValueError where a row or its padding would not come back from the grid:
    training the rows apart has that effect, as transformers does.
    """
    ratios = _checked_ratios(name, rows.shape[0] - 1, rows.shape[1], aspect_ratios)
    grid = rows.new_zeros(rows.shape[1], *rows.shape[1:])
    for i, (h, w) in sorted(enumerate(ratios, 1), key=lambda item: math.prod(item[1])):
        grid[:h, :w] = rows[i, : h * w].unflatten(0, (h, w))
    if check and not rows.is_meta:
        hint = 'tile_tables="ratios" (the `transformers` profile) holds it exactly'
        if rows[0].count_nonzero():
            raise ValueError(f"{name}: row 0, for padding images, is not zero: {hint}")
        for i, (h, w) in enumerate(ratios, 1):
            if not torch.equal(rows[i, : h * w], grid[:h, :w].flatten(0, 1)):
                raise ValueError(f"{name}: aspect ratio ({h}, {w}) disagrees with a larger one, one grid cannot hold both: {hint}")
            if rows[i, h * w :].count_nonzero():
                raise ValueError(f"{name}: aspect ratio ({h}, {w}) has padding tiles that are not zero: {hint}")
    return grid


def grid_to_rows(grid: torch.Tensor, aspect_ratios: Iterable[tuple[int, int]], name: str = "tile table") -> torch.Tensor:
    """torchtune's grid [T, T, n, d] as transformers' rows [ratios + 1, T, n, d], with zeros for padding."""
    ratios = _checked_ratios(name, None, _square(name, grid)[0].shape[0], aspect_ratios)
    rows = grid.new_zeros(len(ratios) + 1, *grid.shape[1:])
    for i, (h, w) in enumerate(ratios, 1):
        rows[i, : h * w] = grid[:h, :w].flatten(0, 1)
    return rows


def _step_to_tune(form: str, row: Row, name: str, target: str, layout: Layout) -> Step:
    if form == "hf" and row.kind in (Q, K):
        return Step((name,), (target,), partial(_permute, name, _heads(row, layout), layout.head_dim, True), row.kind)
    if form == "hf" and row.kind == TEXT:
        return Step((name,), (target, _SPECIAL_ROW.tune), partial(_split, name, layout), TEXT)
    if form == "meta" and row.kind == CONV:
        return Step((name,), (target,), partial(_patches, name), CONV)
    if row.kind == TILES and form == "hf":
        return Step((name,), (target,), partial(_tiles_from_hf, name, layout), TILES)
    if row.kind == TILES and layout.tile_tables == "ratios":
        return Step((name,), (target,), lambda t: (grid_to_rows(t, layout.aspect_ratios, name),), TILES)
    return Step((name,), (target,), kind=row.kind)


def _step_from_tune(form: str, row: Row, name: str, target: str, layout: Layout) -> Step:
    if form == "hf" and row.kind in (Q, K):
        return Step((name,), (target,), partial(_permute, name, _heads(row, layout), layout.head_dim, False), row.kind)
    if form == "meta" and row.kind == CONV:
        return Step((name,), (target,), lambda t: (t.flatten(1),), CONV)
    if row.kind == TILES and form == "hf":
        if layout.tile_tables == "ratios":
            return Step((name,), (target,), lambda t: (t.flatten(1),), TILES)
        return Step((name,), (target,), lambda t: (grid_to_rows(t, layout.aspect_ratios, name).flatten(1),), TILES)
    if row.kind == TILES and layout.tile_tables == "ratios":
        return Step((name,), (target,), lambda t: (rows_to_grid(t, layout.aspect_ratios, name, layout.check),), TILES)
    if row.kind == TILES:
        return Step((name,), (target,), partial(_square, name), TILES)
    return Step((name,), (target,), kind=row.kind)


def _tied(step: Step, layout: Layout) -> Step:
    def text_special_and_output(embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
        text, special = _split(step.sources[0], layout, embedding)
        return text, special, text.clone()

    return Step(step.sources, (*step.targets, _OUTPUT), text_special_and_output, TEXT)


def _heads(row: Row, layout: Layout) -> int:
    return layout.num_heads if row.kind == Q else layout.num_kv_heads


def _permute(name: str, heads: int, head_dim: int, to_pairs: bool, t: torch.Tensor) -> tuple[torch.Tensor]:
    """Rows of each head from halves (all first members, then all second) to adjacent pairs, or back; [heads * head_dim, ...]."""
    if t.shape[0] != heads * head_dim:
        raise InvalidArgument(f"{name} has {t.shape[0]} rows, {heads} heads of {head_dim} have {heads * head_dim}")
    sizes = (heads, 2, head_dim // 2) if to_pairs else (heads, head_dim // 2, 2)
    return (t.unflatten(0, sizes).transpose(1, 2).flatten(0, 2),)


def _split(name: str, layout: Layout, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows, text, special = t.shape[0], layout.vocab_size, layout.num_special_tokens
    if rows <= text if special is None else rows != text + special:
        special = 8 if special is None else special  # transformers' number
        hint = " (resize_token_embeddings drops the last)" if rows == text else ""
        raise InvalidArgument(f"{name} has {rows} rows, vocab_size + {special} = {text + special} are needed{hint}")
    return t[:text], t[text:]


def _patches(name: str, t: torch.Tensor) -> tuple[torch.Tensor]:
    patch = math.isqrt(t.shape[1] // 3)
    if 3 * patch**2 != t.shape[1]:
        raise InvalidArgument(f"Conversion assumes 3 channel inputs and square patch size, {name} is {tuple(t.shape)}")
    return (t.unflatten(1, (3, patch, patch)),)


def _square(name: str, grid: torch.Tensor) -> tuple[torch.Tensor]:
    if grid.shape[0] != grid.shape[1]:
        raise InvalidArgument(f"{name} is {tuple(grid.shape)}, no grid of tiles: for rows of ratios the form is tile_tables='ratios'")
    return (grid,)


def _tiles_from_hf(name: str, layout: Layout, t: torch.Tensor) -> tuple[torch.Tensor]:
    if t.shape[1] % (layout.num_tiles * layout.encoder_dim):
        raise InvalidArgument(f"{name} has {t.shape[1]} columns, not a multiple of {layout.num_tiles} tiles x encoder_dim {layout.encoder_dim}")
    rows = t.unflatten(1, (layout.num_tiles, -1, layout.encoder_dim))
    return (rows if layout.tile_tables == "ratios" else rows_to_grid(rows, layout.aspect_ratios, name, layout.check),)


def _checked_ratios(name: str, count: int | None, num_tiles: int, aspect_ratios: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    ratios = [(h, w) for h, w in aspect_ratios]
    if count is not None and len(ratios) != count:
        raise InvalidArgument(f"{name} has rows for {count} aspect ratios and one for padding, supported_aspect_ratios has {len(ratios)}")
    if bad := [r for r in ratios if min(r) < 1 or math.prod(r) > num_tiles]:
        raise InvalidArgument(f"{name} has {num_tiles} tiles, too few for the aspect ratio {bad[0]}")
    return ratios


def _pattern(name: str) -> tuple[str, int | None]:
    """The name with {} for its first number, and that number."""
    found = re.search(r"\.(\d+)\.", name)
    return (name, None) if found is None else (f"{name[: found.start()]}.{{}}.{name[found.end() :]}", int(found[1]))


def _numbered(pattern: str, number: int | None) -> str:
    return pattern.replace("{}", str(number))


def _on_disk(name: str) -> str:
    for memory, disk in _IN_MEMORY:
        if name.startswith(memory):
            return disk + name[len(memory) :]
    return name


def _numbers_in(names: Iterable[str], prefix: str) -> set[int]:
    return {int(name[len(prefix) :].split(".", 1)[0]) for name in names if re.match(re.escape(prefix) + r"\d+\.", name)}


def hf_plan(names: Iterable[str], cross_attention_layers: Iterable[int] | None = None, num_hidden_layers: int | None = None) -> list[LayerEntry]:
    """layer_plan of a transformers state dict; what is None is read from the keys, which must then be complete."""
    names = [_on_disk(name) for name in names]
    prefix = "language_model.model.layers."
    if cross_attention_layers is None:
        cross_attention_layers = _numbers_in((n for n in names if ".cross_attn" in n), prefix)
    cross = sorted(cross_attention_layers)
    if num_hidden_layers is None:
        num_hidden_layers = max([*_numbers_in(names, prefix), *cross], default=-1) + 1
    return layer_plan(num_hidden_layers, cross)


def tune_plan(names: Iterable[str], cross_attention_layers: Iterable[int] | None = None, num_hidden_layers: int | None = None) -> list[LayerEntry]:
    """layer_plan of a torchtune state dict; what is None is read from the keys, which must then be complete."""
    names = list(names)
    prefix = "decoder.layers."
    found = _numbers_in(names, prefix)
    fusion = _numbers_in((n for n in names if ".fusion_layer." in n), prefix)
    lone = _numbers_in((n for n in names if re.match(r"decoder\.layers\.\d+\.ca_(norm|scale)\.", n)), prefix)
    if cross_attention_layers is None:
        plan, position = [], 0
        for i in range(max(found, default=-1) + 1):
            cross = position if i in fusion | lone else None
            position += cross is not None
            plan.append(LayerEntry(cross, None if i in lone else position))
            position += i not in lone
        return plan
    cross = sorted(cross_attention_layers)
    if num_hidden_layers is None:  # after the last cross-attention layer come the self-attention layers the keys name, if any
        shortest = layer_plan(max(cross, default=-1) + 1, cross)
        extra = max(found, default=-1) + 1 - len(shortest)
        fused = bool(cross) and (extra > 0 or len(shortest) - 1 not in lone)
        num_hidden_layers = max(cross, default=-1) + 1 + max(extra, 0) + fused
    plan = layer_plan(num_hidden_layers, cross)
    kinds = dict.fromkeys(fusion, "fusion") | dict.fromkeys(lone, "cross")
    for i, kind in sorted(kinds.items()):
        if i >= len(plan) or plan[i].kind != kind:
            raise InvalidArgument(f"decoder.layers.{i} is a {kind} layer, cross_attention_layers {cross} make it {plan[i].kind if i < len(plan) else 'none'}")
    return plan


def meta_plan(num_layers: int, num_fusion_layers: int) -> list[LayerEntry]:
    """Meta's own placement: every (num_layers / num_fusion_layers)-th layer has cross-attention in front."""
    if num_fusion_layers == 0:
        return layer_plan(num_layers, [])
    if num_layers % num_fusion_layers:
        raise InvalidArgument(
            f"Conversion assumes cross attention is added at regular intervals, {num_layers} layers are no multiple of {num_fusion_layers} cross-attention layers"
        )
    interval = num_layers // num_fusion_layers
    return layer_plan(num_layers + num_fusion_layers, [(j + 1) * interval - 1 + j for j in range(num_fusion_layers)])


def _all_known(unknown: list[str]) -> None:
    if unknown:
        raise InvalidArgument(
            f'Error converting the state dict. Found unexpected key: "{unknown[0]}". Please make sure you\'re loading a checkpoint with the right format. '
        )


def _layout(plan, num_heads, num_kv_heads, dim, head_dim, vocab_size, encoder_dim, num_tiles, supported_aspect_ratios, tile_tables, **options) -> Layout:
    if tile_tables not in ("grid", "ratios"):
        raise InvalidArgument(f"tile_tables is {tile_tables!r}, not 'grid' or 'ratios'")
    ratios = all_aspect_ratios(num_tiles) if supported_aspect_ratios is None else tuple((h, w) for h, w in supported_aspect_ratios)
    return Layout(plan, num_heads, num_kv_heads, head_dim or dim // num_heads, vocab_size, encoder_dim, num_tiles, ratios, tile_tables, **options)


def llama3_vision_meta_to_tune(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of Meta's reference model with torchtune's names; RoPE tables are left out.

    Cross-attention must be at regular intervals, images have 3 channels and patches are square: InvalidArgument otherwise,
    and for an unexpected key.
    """
    layers, cross = (_numbers_in(state_dict, f"text_model.{name}.") for name in ("layers", "cross_attention_layers"))
    steps, unknown = steps_to_tune("meta", state_dict, Layout(meta_plan(max(layers, default=-1) + 1, max(cross, default=-1) + 1)))
    _all_known(unknown)
    return convert(steps, state_dict)


def llama3_vision_tune_to_meta(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of llama3_vision_meta_to_tune."""
    plan = tune_plan(state_dict)
    if plan != (regular := meta_plan(len(plan), sum(entry.kind == "fusion" for entry in plan))):
        at = [[i for i, entry in enumerate(p) if entry.kind != "self"] for p in (plan, regular)]
        raise InvalidArgument(f"Conversion assumes cross attention is added at regular intervals: it is at {at[0]}, not {at[1]}")
    steps, unknown = steps_from_tune("meta", state_dict, Layout(plan))
    _all_known(unknown)
    return convert(steps, state_dict)


def llama3_vision_hf_to_tune(
    state_dict: Mapping[str, torch.Tensor],
    num_heads: int = 32,
    num_kv_heads: int = 32,
    dim: int = 4096,
    head_dim: int | None = None,
    vocab_size: int = 128256,
    cross_attention_layers: list[int] | None = None,
    encoder_dim: int = 1280,
    tile_size: int = 448,
    num_tiles: int = 4,
    supported_aspect_ratios: list[tuple[int, int]] | None = None,
    *,
    num_hidden_layers: int | None = None,
    tile_tables: str = "grid",
    tie_word_embeddings: bool = False,
    check: bool = False,
) -> dict[str, torch.Tensor]:
    """A state dict of transformers' Mllama (names as saved or as in memory) with torchtune's names and layouts.

    cross_attention_layers, num_hidden_layers: counted as in transformers' config, cross-attention layers included; read
    from the keys where None, so a partial dict needs both.  supported_aspect_ratios: (height, width); every ratio of
    num_tiles where None.  tile_tables: "grid" gives torchtune's [T, T, n, d], "ratios" keeps transformers' rows as
    [ratios + 1, T, n, d].  check: raise ValueError where the rows do not fit one grid.  tie_word_embeddings: a dict without
    lm_head gets a copy of the text embedding as `decoder.output.weight`; otherwise that key is left out.  tile_size is not used.
    Raises InvalidArgument for an unexpected key or a shape that contradicts the arguments.
    """
    plan = hf_plan(state_dict, cross_attention_layers, num_hidden_layers)
    sizes = (num_heads, num_kv_heads, dim, head_dim, vocab_size, encoder_dim, num_tiles, supported_aspect_ratios, tile_tables)
    steps, unknown = steps_to_tune("hf", state_dict, _layout(plan, *sizes, tie_word_embeddings=tie_word_embeddings, check=check))
    _all_known(unknown)
    return convert(steps, state_dict)


def llama3_vision_tune_to_hf(
    state_dict: Mapping[str, torch.Tensor],
    num_heads: int = 32,
    num_kv_heads: int = 32,
    dim: int = 4096,
    head_dim: int | None = None,
    vocab_size: int = 128256,
    cross_attention_layers: list[int] | None = None,
    encoder_dim: int = 1280,
    tile_size: int = 448,
    num_tiles: int = 4,
    supported_aspect_ratios: list[tuple[int, int]] | None = None,
    *,
    num_hidden_layers: int | None = None,
    tile_tables: str = "grid",
) -> dict[str, torch.Tensor]:
    """The inverse of llama3_vision_hf_to_tune, with the names transformers saves; tile_tables says which form the dict holds.

    Exact both ways, but for grid cells that no aspect ratio uses, which transformers has no place for. Adapters are
    unexpected keys: merge them first, or see llama3_vision_tune_to_peft_adapter_weights.
    """
    plan = tune_plan(state_dict, cross_attention_layers, num_hidden_layers)
    sizes = (num_heads, num_kv_heads, dim, head_dim, vocab_size, encoder_dim, num_tiles, supported_aspect_ratios, tile_tables)
    steps, unknown = steps_from_tune("hf", state_dict, _layout(plan, *sizes))
    _all_known(unknown)
    return convert(steps, state_dict)


_PEFT = {"lora_a.weight": "lora_A.weight", "lora_b.weight": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


def llama3_vision_tune_to_peft_adapter_weights(
    state_dict: Mapping[str, torch.Tensor],
    num_heads: int = 32,
    num_kv_heads: int = 32,
    dim: int = 4096,
    head_dim: int | None = None,
    cross_attention_layers: Iterable[int] = (),
    num_hidden_layers: int = 40,
    *,
    base: Mapping[str, torch.Tensor] | None = None,
    lora_alpha: float | None = None,
) -> dict[str, torch.Tensor]:
    """torchtune's adapter tensors (lora_a [r, in], lora_b [out, r], magnitude [out]) under the names PEFT gives transformers' Mllama.

    The rows of q and k adapters are reordered as their weights are.  base, lora_alpha: the model's state dict with torchtune's names,
    and its adapters' alpha; needed for DoRA over layers with a bias (the vision encoder's MLPs, the projection), whose bias torchtune
    scales and PEFT does not: the scaled one is written as `base_layer.bias`. PEFT loads it in place of the base model's.
    Raises InvalidArgument for a key that is no adapter's, and for DoRA over a bias where base or lora_alpha is missing.
    """
    layout = Layout(layer_plan(num_hidden_layers, cross_attention_layers), num_heads, num_kv_heads, head_dim or dim // num_heads)
    converted = {}
    for name, value in state_dict.items():
        kind = next((k for k in _PEFT if name.endswith("." + k)), None)
        _all_known([name] if kind is None else [])
        module = name[: -len(kind) - 1]
        steps, unknown = steps_from_tune("hf", [module + ".weight"], layout)
        _all_known([name] if unknown else [])
        target = steps[0].targets[0].removesuffix(".weight")
        for memory, disk in _IN_MEMORY:
            if target.startswith(disk.removesuffix(".")):
                target = memory.removesuffix(".") + target[len(disk) - 1 :]
                break
        converted[f"base_model.model.{target}.{_PEFT[kind]}"] = value if kind == "lora_a.weight" else steps[0].convert(value)[0]
        if kind == "magnitude" and not steps_from_tune("hf", [module + ".bias"], layout)[1]:
            converted[f"base_model.model.{target}.base_layer.bias"] = _scaled_bias(module, state_dict, base, lora_alpha)
    return converted


def _scaled_bias(module: str, adapters: Mapping[str, torch.Tensor], base: Mapping[str, torch.Tensor] | None, alpha: float | None) -> torch.Tensor:
    """bias * magnitude / ||W + s B A||: what torchtune's DoRA adds to the product."""
    if base is None or alpha is None:
        raise InvalidArgument(f"{module}.magnitude: torchtune's DoRA scales the layer's bias and PEFT's does not: base and lora_alpha are needed to write it")
    needed = ((base, f"base lacks {module}.", ("weight", "bias")), (adapters, f"the adapter lacks {module}.", _PEFT))
    if missing := [what + name for tensors, what, names in needed for name in names if f"{module}.{name}" not in tensors]:
        raise InvalidArgument(f"{module}.magnitude: {missing[0]}, which the bias of the layer follows from")
    weight, bias = base[module + ".weight"], base[module + ".bias"]
    a, b, magnitude = (adapters[f"{module}.{kind}"] for kind in _PEFT)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    weight = nf4_dequantize(weight, weight.dtype) if is_torchao(weight) else weight
    norms = lora_row_norms(weight.to(dtype), a.to(dtype), b.to(dtype), alpha / a.shape[0])
    return (bias * (magnitude.to(dtype) / norms)).to(bias.dtype)
