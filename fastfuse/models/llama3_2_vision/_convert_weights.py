"""Checkpoints of Llama-3.2-Vision between Meta's, transformers' and torchtune's names and layouts.

A conversion is a list of `Step`s built from the table of names, each from the few source tensors it needs to its targets,
so that a checkpoint can be converted a tensor at a time and, with meta tensors, by shape alone.
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from fastfuse.errors import InvalidArgument
from fastfuse.models.llama3_2_vision._layer_plan import LayerEntry, layer_plan
from fastfuse.models.llama3_2_vision._names import CONV, SAME, SPECIAL, SPECIAL_ROW, TEXT, TEXT_ROW, TILES, K, Q, find_row, in_memory, numbers_in, on_disk
from fastfuse.ops import lora_row_norms, nf4_dequantize
from fastfuse.quant.nf4 import is_torchao

_OUTPUT = "decoder.output.weight"


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
        parts = {"self": ["self"], "fusion": ["self", "cross"], "cross": ["lone"]}
        found = [(part, i, entry) for i, entry in enumerate(self.plan) for part in parts[entry.kind]]
        if form == "tune":
            return {(part, i): i for part, i, _ in found}
        if form == "hf":
            return {(part, i): entry.hf_self if part == "self" else entry.hf_cross for part, i, entry in found}
        if any(part == "lone" for part, *_ in found):
            raise InvalidArgument("Meta's layout holds cross-attention in front of self-attention layers only, this model has one that stands alone")
        fusion = [i for part, i, _ in found if part == "cross"]
        return {(part, i): i if part == "self" else fusion.index(i) for part, i, _ in found}


def all_aspect_ratios(num_tiles: int) -> tuple[tuple[int, int], ...]:
    """(height, width) in tiles of every canvas of at most `num_tiles`, in the order of transformers' default config."""
    return tuple((h, w) for h in range(1, num_tiles + 1) for w in range(1, num_tiles // h + 1))


def steps_to_tune(form: str, names: Iterable[str], layout: Layout) -> tuple[list[Step], list[str]]:
    """The steps from `form` ("hf" or "meta") to torchtune's names, and the names the table does not know."""
    names = [name for name in names if "rotary_emb.inv_freq" not in name and name != "text_model.rope.freqs"]  # RoPE tables are computed, not loaded
    steps, unknown = _steps(form, "tune", names, layout)
    if form == "hf" and layout.tie_word_embeddings and not any(_OUTPUT in step.targets for step in steps):
        steps = [replace(s, targets=(*s.targets, _OUTPUT), convert=partial(_tied, s.convert)) if s.kind == TEXT else s for s in steps]
    return steps, unknown


def steps_from_tune(form: str, names: Iterable[str], layout: Layout) -> tuple[list[Step], list[str]]:
    """The steps from torchtune's names to `form` ("hf", with the names transformers writes, or "meta"), and the unknown names."""
    return _steps("tune", form, list(names), layout)


def _steps(source: str, target: str, names: list[str], layout: Layout) -> tuple[list[Step], list[str]]:
    positions = {(part, number): i for (part, i), number in layout.numbers(source).items()}
    numbers = layout.numbers(target)
    steps, unknown, seen = [], [], {}
    for name in names:
        found = find_row(source, on_disk(name) if source == "hf" else name, positions)
        if found is None:
            unknown.append(name)
            continue
        row, number = found
        number = numbers[row.part, positions[row.part, number]] if row.part else number
        new = getattr(row, target).replace("{}", str(number))
        joined = target == "hf" and row.kind in (TEXT, SPECIAL)
        if joined and not {TEXT_ROW.tune, SPECIAL_ROW.tune} <= set(names):
            raise InvalidArgument(f"{new} needs both {TEXT_ROW.tune} and {SPECIAL_ROW.tune}, only {name} is there")
        if joined and row.kind == SPECIAL:
            continue
        steps.append(_step(source, target, row.kind, name, new, layout))
        for t in steps[-1].targets:
            if t in seen:
                raise InvalidArgument(f"{seen[t]} and {name} are both {t}")
            seen[t] = name
    return steps, unknown


def _step(source: str, target: str, kind: str, name: str, new: str, layout: Layout) -> Step:
    to_tune = target == "tune"
    form, given = source if to_tune else target, (name, layout, to_tune)
    convert = {
        ("hf", TEXT): partial(_embedding, *given),
        ("hf", Q): partial(_permute, layout.num_heads, *given),
        ("hf", K): partial(_permute, layout.num_kv_heads, *given),
        ("hf", TILES): partial(_tile_rows, *given),
        ("meta", TILES): partial(_tile_grid, *given),
        ("meta", CONV): partial(_patches, *given),
    }.get((form, kind), Step.convert)
    if (form, kind) == ("hf", TEXT):
        both = (TEXT_ROW.tune, SPECIAL_ROW.tune)
        return Step((name,), both, convert, kind) if to_tune else Step(both, (new,), convert, kind)
    return Step((name,), (new,), convert, kind)


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
    ratios = _checked_ratios(name, None, _square(name, grid).shape[0], aspect_ratios)
    rows = grid.new_zeros(len(ratios) + 1, *grid.shape[1:])
    for i, (h, w) in enumerate(ratios, 1):
        rows[i, : h * w] = grid[:h, :w].flatten(0, 1)
    return rows


def _tied(split: Callable, embedding: torch.Tensor) -> tuple[torch.Tensor, ...]:
    text, special = split(embedding)
    return text, special, text.clone()


def _permute(heads: int, name: str, layout: Layout, to_tune: bool, t: torch.Tensor) -> tuple[torch.Tensor]:
    """Rows of each head from halves (all first members, then all second) to adjacent pairs, or back; [heads * head_dim, ...]."""
    head_dim = layout.head_dim
    if t.shape[0] != heads * head_dim:
        raise InvalidArgument(f"{name} has {t.shape[0]} rows, {heads} heads of {head_dim} have {heads * head_dim}")
    sizes = (heads, 2, head_dim // 2) if to_tune else (heads, head_dim // 2, 2)
    return (t.unflatten(0, sizes).transpose(1, 2).flatten(0, 2),)


def _embedding(name: str, layout: Layout, to_tune: bool, *tables: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """One table into the rows of text and the special ones, or back."""
    if not to_tune:
        return (torch.cat(tables),)
    rows, text, special = tables[0].shape[0], layout.vocab_size, layout.num_special_tokens
    if rows <= text if special is None else rows != text + special:
        special = 8 if special is None else special  # transformers' number
        hint = " (resize_token_embeddings drops the last)" if rows == text else ""
        raise InvalidArgument(f"{name} has {rows} rows, vocab_size + {special} = {text + special} are needed{hint}")
    return tables[0][:text], tables[0][text:]


def _patches(name: str, layout: Layout, to_tune: bool, t: torch.Tensor) -> tuple[torch.Tensor]:
    if not to_tune:
        return (t.flatten(1),)
    patch = math.isqrt(t.shape[1] // 3)
    if 3 * patch**2 != t.shape[1]:
        raise InvalidArgument(f"Conversion assumes 3 channel inputs and square patch size, {name} is {tuple(t.shape)}")
    return (t.unflatten(1, (3, patch, patch)),)


def _tile_rows(name: str, layout: Layout, to_tune: bool, t: torch.Tensor) -> tuple[torch.Tensor]:
    """transformers' rows of ratios, [ratios + 1, T * n * d], into the model's own form, or back."""
    ratios = layout.tile_tables == "ratios"
    if not to_tune:
        return ((t if ratios else grid_to_rows(t, layout.aspect_ratios, name)).flatten(1),)
    if t.shape[1] % (layout.num_tiles * layout.encoder_dim):
        raise InvalidArgument(f"{name} has {t.shape[1]} columns, not a multiple of {layout.num_tiles} tiles x encoder_dim {layout.encoder_dim}")
    rows = t.unflatten(1, (layout.num_tiles, -1, layout.encoder_dim))
    return (rows if ratios else rows_to_grid(rows, layout.aspect_ratios, name, layout.check),)


def _tile_grid(name: str, layout: Layout, to_tune: bool, t: torch.Tensor) -> tuple[torch.Tensor]:
    """Meta's grid into the model's own form, or back."""
    if layout.tile_tables == "grid":
        return (t if to_tune else _square(name, t),)
    return (grid_to_rows(t, layout.aspect_ratios, name) if to_tune else rows_to_grid(t, layout.aspect_ratios, name, layout.check),)


def _square(name: str, grid: torch.Tensor) -> torch.Tensor:
    if grid.shape[0] != grid.shape[1]:
        raise InvalidArgument(f"{name} is {tuple(grid.shape)}, no grid of tiles: for rows of ratios the form is tile_tables='ratios'")
    return grid


def _checked_ratios(name: str, count: int | None, num_tiles: int, aspect_ratios: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    ratios = [(h, w) for h, w in aspect_ratios]
    if count is not None and len(ratios) != count:
        raise InvalidArgument(f"{name} has rows for {count} aspect ratios and one for padding, supported_aspect_ratios has {len(ratios)}")
    if bad := [r for r in ratios if min(r) < 1 or math.prod(r) > num_tiles]:
        raise InvalidArgument(f"{name} has {num_tiles} tiles, too few for the aspect ratio {bad[0]}")
    return ratios


def hf_plan(names: Iterable[str], cross_attention_layers: Iterable[int] | None = None, num_hidden_layers: int | None = None) -> list[LayerEntry]:
    """layer_plan of a transformers state dict; what is None is read from the keys, which must then be complete."""
    names = [on_disk(name) for name in names]
    prefix = "language_model.model.layers."
    if cross_attention_layers is None:
        cross_attention_layers = numbers_in((n for n in names if ".cross_attn" in n), prefix)
    cross = sorted(cross_attention_layers)
    if num_hidden_layers is None:
        num_hidden_layers = max([*numbers_in(names, prefix), *cross], default=-1) + 1
    return layer_plan(num_hidden_layers, cross)


def tune_plan(names: Iterable[str], cross_attention_layers: Iterable[int] | None = None, num_hidden_layers: int | None = None) -> list[LayerEntry]:
    """layer_plan of a torchtune state dict; what is None is read from the keys, which must then be complete."""
    names = list(names)
    prefix = "decoder.layers."
    found = numbers_in(names, prefix)
    fusion = numbers_in((n for n in names if ".fusion_layer." in n), prefix)
    lone = numbers_in((n for n in names if re.match(r"decoder\.layers\.\d+\.ca_(norm|scale)\.", n)), prefix)
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


def _converted(source: str, target: str, state_dict: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    steps, unknown = steps_to_tune(source, state_dict, layout) if target == "tune" else steps_from_tune(target, state_dict, layout)
    _all_known(unknown)
    return convert(steps, state_dict)


def _all_known(unknown: list[str]) -> None:
    if unknown:
        raise InvalidArgument(
            f'Error converting the state dict. Found unexpected key: "{unknown[0]}". Please make sure you\'re loading a checkpoint with the right format. '
        )


def llama3_vision_meta_to_tune(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict of Meta's reference model with torchtune's names; RoPE tables are left out.

    Cross-attention must be at regular intervals, images have 3 channels and patches are square: InvalidArgument otherwise,
    and for an unexpected key.
    """
    counts = [max(numbers_in(state_dict, f"text_model.{name}."), default=-1) + 1 for name in ("layers", "cross_attention_layers")]
    return _converted("meta", "tune", state_dict, Layout(meta_plan(*counts)))


def llama3_vision_tune_to_meta(state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The inverse of llama3_vision_meta_to_tune."""
    plan = tune_plan(state_dict)
    if plan != (regular := meta_plan(len(plan), sum(entry.kind == "fusion" for entry in plan))):
        at = [[i for i, entry in enumerate(p) if entry.kind != "self"] for p in (plan, regular)]
        raise InvalidArgument(f"Conversion assumes cross attention is added at regular intervals: it is at {at[0]}, not {at[1]}")
    return _converted("tune", "meta", state_dict, Layout(plan))


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
    return _with_sizes("hf", "tune", **locals())


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
    return _with_sizes("tune", "hf", **locals())


def _with_sizes(
    source: str, target: str, state_dict, dim, head_dim, num_tiles, tile_size, supported_aspect_ratios, cross_attention_layers, num_hidden_layers, **sizes: Any
) -> dict[str, torch.Tensor]:
    plan = (hf_plan if source == "hf" else tune_plan)(state_dict, cross_attention_layers, num_hidden_layers)
    if sizes["tile_tables"] not in ("grid", "ratios"):
        raise InvalidArgument(f"tile_tables is {sizes['tile_tables']!r}, not 'grid' or 'ratios'")
    ratios = all_aspect_ratios(num_tiles) if supported_aspect_ratios is None else tuple((h, w) for h, w in supported_aspect_ratios)
    head_dim = head_dim or dim // sizes["num_heads"]
    return _converted(source, target, state_dict, Layout(plan, head_dim=head_dim, num_tiles=num_tiles, aspect_ratios=ratios, **sizes))


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
        target = in_memory(steps[0].targets[0]).removesuffix(".weight")
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
