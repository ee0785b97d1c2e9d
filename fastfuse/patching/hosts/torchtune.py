"""torchtune's LoRA, DoRA and frozen layers over NF4 weights, the front of its vision transformer, and its cross-attention layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.modules.attention_utils import serves_cross_attention
from fastfuse.modules.low_precision.nf4_linear import bias_fits
from fastfuse.ops import EncoderMask, cross_attention, lora_row_norms, nf4_linear, nf4_lora_linear, patch_embed
from fastfuse.ops._patch_tokens import tile_rows
from fastfuse.ops.nf4_linear import DTYPES
from fastfuse.patching.hosts._host import (
    Host,
    Options,
    Probe,
    Reason,
    Rehearsed,
    Sizes,
    attention_refuses,
    autocast_dtype,
    device_of,
    hooked,
    named,
    on_device,
    patches_side_by_side,
    plain,
    plain_tensors,
    rebound,
    rehearse_attention,
)
from fastfuse.patching.hosts._nf4 import nf4_host
from fastfuse.quant.nf4 import NF4View, holds_torchao

_FROM = "torchtune."


def _known(name: str, *parts: str) -> Callable[[nn.Module], bool]:
    """Recognises torchtune's class by its name, so that a part it lacks is reported, and the same class under another name by its parts."""
    by_name = named(name, _FROM)
    return lambda module: by_name(module) or all(hasattr(module, part) for part in parts)


def _over_nf4(known: Callable[[nn.Module], bool]) -> Callable[[nn.Module], bool]:
    """Recognises the module where it holds an NF4 weight, whole or in shards, whatever the weight's name."""

    def matches(module: nn.Module) -> bool:
        held = module.__dict__.get("_parameters")
        return isinstance(held, dict) and any(holds_torchao(p) for p in held.values()) and known(module)

    return matches


def _child(child: nn.Module, *kinds: str) -> Reason | None:
    """`plain` for a child of torchtune's: why it has to be called instead of computed; None where it is of one of these classes."""
    kind = type(child)
    if kind.__name__ not in kinds or not kind.__module__.startswith(_FROM) or rebound(child):
        return Reason("CHILD_TYPE", f"{kind.__name__} in place of torchtune's {' or '.join(kinds)}")
    for part in _CHILD_PARTS[kind.__name__]:
        if not hasattr(child, part):
            return Reason("STRUCTURE", f"{kind.__name__} has no {part}: a version that fastfuse does not know")
    if hooked(child):
        return Reason("HOOKED", f"a hook on a {kind.__name__} inside must run")
    return plain_tensors(*child.parameters(recurse=False))


_CHILD_PARTS = {
    "CLSEmbedding": ("weight", "append_cls_token"),
    "Fp32LayerNorm": ("weight", "bias", "eps", "normalized_shape"),
    "TokenPositionalEmbedding": ("positional_embedding",),
    "TiledTokenPositionalEmbedding": ("local_token_positional_embedding", "global_token_positional_embedding", "gate"),
    "TilePositionalEmbedding": ("embedding", "gate"),
    "MultiHeadAttention": (
        "q_proj", "k_proj", "v_proj", "output_proj", "q_norm", "k_norm", "num_heads", "num_kv_heads", "head_dim", "embed_dim", "kv_cache", "cache_enabled",
        "attn_dropout", "is_causal", "pos_embeddings", "_attention_call",
    ),
}  # fmt: skip


# LoRALinear, DoRALinear and FrozenNF4Linear


def _frozen_obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    if found := plain_tensors(self.bias):
        return found
    return None if x is None or x.dtype in DTYPES else Reason("DTYPE", f"the input is {x.dtype}")


def _frozen(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    # A bias of another dtype promotes the result, as adding it afterwards does.
    fits = bias_fits(x, self.bias)
    y = nf4_linear(x, weight, self.bias if fits else None, backend=backend)
    return y if fits else y + self.bias


def _adapter_obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    if self.disabled:
        return _frozen_obstacle(self, x)
    for child in (self.lora_a, self.lora_b):
        if found := plain(child, nn.Linear):
            return found
        if child.bias is not None:
            return Reason("LORA_BIAS", "a factor of the adapter has a bias")
    dropout = self.dropout
    if hooked(dropout) or type(dropout) not in (nn.Identity, nn.Dropout) or rebound(dropout) or getattr(dropout, "inplace", False):
        return Reason("DROPOUT", f"the adapter's dropout is a {type(dropout).__name__}, hooked, or works in place")
    if found := _frozen_obstacle(self, x):
        return found
    factors = {self.lora_a.weight.dtype, self.lora_b.weight.dtype}
    if not factors <= set(DTYPES):
        return Reason("DTYPE", f"the adapter is {factors.difference(DTYPES).pop()}")
    if x is None or autocast_dtype(x) is not None or factors == {x.dtype}:
        return None
    return Reason("DTYPE", f"the input is {x.dtype}, the adapter {' and '.join(map(str, factors))}")


def _drops(self: nn.Module) -> dict[str, Any]:
    return {"dropout_p": self.dropout.p, "training": self.dropout.training} if type(self.dropout) is nn.Dropout else {}


def _lora(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    if self.disabled:
        return _frozen(self, x, weight, backend)
    a, b, fits = self.lora_a.weight, self.lora_b.weight, bias_fits(x, self.bias)
    y = nf4_lora_linear(x, weight, a, b, self.alpha / self.rank, bias=self.bias if fits else None, **_drops(self), backend=backend)
    return y if fits else y + self.bias


def _dora_obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    if (found := _adapter_obstacle(self, x)) or self.disabled:
        return found
    if found := plain_tensors(self.magnitude):
        return found
    if x is None:
        return None
    if autocast_dtype(x) not in (None, x.dtype):
        return Reason("AUTOCAST", f"the input is {x.dtype} under autocast to another dtype")
    if self.magnitude.dtype != x.dtype:  # the result takes the wider dtype
        return Reason("DTYPE", f"the input is {x.dtype}, the magnitude {self.magnitude.dtype}")
    return None


def _dora(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    if self.disabled:
        return _frozen(self, x, weight, backend)
    a, b, magnitude, bias = self.lora_a.weight, self.lora_b.weight, self.magnitude, self.bias
    norms = lora_row_norms(weight, a, b, self.scaling, x.dtype, backend=backend)
    if bias is not None:  # part of what the magnitude scales, unlike the op's
        bias = bias * (magnitude / norms).to(bias.dtype)
    fits = bias_fits(x, bias)
    y = nf4_lora_linear(
        x, weight, a, b, self.scaling, bias=bias if fits else None, magnitude=magnitude, norms=norms, **_drops(self), backend=backend
    )  # fmt: skip
    return y if fits else y + bias


def _adapter_dtype(module: nn.Module) -> torch.dtype:
    return module.lora_a.weight.dtype


_ADAPTER = ("lora_a", "lora_b", "dropout", "disabled")


# VisionTransformer


def _front_obstacle(self: nn.Module, options: Options) -> Reason | None:
    """Why the modules in front of the layers are not what the op computes."""
    conv, pre, pos, norm = self.conv, self.pre_tile_pos_embed, self.token_pos_embedding, self.ln_pre
    if found := plain(conv, nn.Conv2d):
        return found
    if conv.bias is not None:
        return Reason("GEOMETRY", "its convolution has a bias")
    if found := patches_side_by_side(conv):
        return found
    if found := _child(self.cls_token_embedding, "CLSEmbedding") or _child(norm, "Fp32LayerNorm"):
        return found
    if found := _child(pos, "TiledTokenPositionalEmbedding", "TokenPositionalEmbedding") or (None if pre is None else _child(pre, "TilePositionalEmbedding")):
        return found
    if tuple(norm.normalized_shape) != (conv.out_channels,):
        return Reason("GEOMETRY", f"its norm is over {tuple(norm.normalized_shape)}, a token has {conv.out_channels} features")
    grids = {tuple(t.shape[:2]) for t in _tables(self) if t is not None}
    if len(grids) > 1 or any(h != w for h, w in grids):
        return Reason("GEOMETRY", f"its tables are for {' and '.join(map(str, grids))} tiles")
    dtypes = {p.dtype for child in (conv, self.cls_token_embedding, norm, pos, pre) if child is not None for p in child.parameters(recurse=False)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return Reason("DTYPE", f"its weights are {' and '.join(map(str, dtypes))}")
    if len(self.layers) in self.out_indices:
        return Reason("OUT_INDICES", "what the index after the last layer stands for depends on torchtune's version")
    return None


def _tables(self: nn.Module) -> tuple[Tensor | None, Tensor | None]:
    """The tables with a row for each tile."""
    pre, pos = self.pre_tile_pos_embed, self.token_pos_embedding
    return None if pre is None else pre.embedding, getattr(pos, "global_token_positional_embedding", None)


def _call_obstacle(self: nn.Module, images: Any, aspect_ratio: Any) -> Reason | None:
    weight = self.conv.weight
    if not isinstance(images, Tensor) or images.dim() != 6 or not (aspect_ratio is None or isinstance(aspect_ratio, Tensor)):
        return Reason("ARGUMENTS", "called with something else than images of 6 dims and a tensor of aspect ratios")
    if aspect_ratio is None and images.shape[2] > 1:
        return Reason("ARGUMENTS", "called without aspect ratios for several tiles")
    (h, w), (ph, pw) = images.shape[-2:], self.conv.kernel_size
    if images.shape[3] != self.conv.in_channels or (h // ph) * (w // pw) != self.patches_per_tile:
        return Reason("SHAPE", f"tiles of {h} x {w} pixels do not have {self.patches_per_tile} patches")
    if (autocast := autocast_dtype(images)) is not None:
        if images.dtype not in DTYPES or weight.dtype not in (torch.float32, autocast):
            return Reason("AUTOCAST", f"images are {images.dtype}, weights {weight.dtype} under autocast to another dtype")
    elif images.dtype != weight.dtype:
        return Reason("DTYPE", f"images are {images.dtype}, weights {weight.dtype}")
    return None


def _vision(self: nn.Module, given: dict[str, Any], options: Options) -> Any:
    images, ratio = given.get("images"), given.get("aspect_ratio")
    if found := _front_obstacle(self, options) or _call_obstacle(self, images, ratio):
        return found
    b, n_imgs, n_tiles = images.shape[:3]
    if ratio is None:
        ratio = torch.ones(b * n_imgs, 2, dtype=torch.int64, device=images.device)
    ratio = ratio.reshape(b * n_imgs, 2)
    x = _placed_tokens(self, images.flatten(0, 1), ratio, options)
    n_tokens, dim = x.shape[2:]
    x, hidden = x.flatten(1, 2), []
    for i, layer in enumerate(self.layers):
        if i in self.out_indices:
            hidden.append(x.reshape(b, n_imgs, n_tiles, n_tokens, dim))
        x = layer(x)
    x = self.ln_post(x)
    if self.post_tile_pos_embed is not None:
        x = _placed_tiles(self.post_tile_pos_embed, x.reshape(b * n_imgs, n_tiles, n_tokens, dim), ratio)
    x = x.reshape(b, n_imgs, n_tiles, n_tokens, dim)
    return (x if self.cls_projection is None else self.cls_projection(x)), hidden


def _placed_tokens(self: nn.Module, images: Tensor, ratio: Tensor, options: Options) -> Tensor:
    """[images, tiles, tokens, dim], normalised."""
    conv, cls, pre, pos, norm = self.conv, self.cls_token_embedding, self.pre_tile_pos_embed, self.token_pos_embedding, self.ln_pre
    tiled = hasattr(pos, "global_token_positional_embedding")
    ph, pw = conv.kernel_size
    return patch_embed(
        images[..., : images.shape[-2] // ph * ph, : images.shape[-1] // pw * pw],  # as the convolution, which drops what is left over
        conv.weight,
        cls.weight,
        ratio if tiled or pre is not None else None,
        pos.local_token_positional_embedding if tiled else pos.positional_embedding,
        pos.global_token_positional_embedding if tiled else None,
        pos.gate if tiled else None,
        None if pre is None else pre.embedding,
        None if pre is None else pre.gate,
        norm=(norm.weight, norm.bias, norm.eps),
        append_cls=cls.append_cls_token,
        backend=options.named(),
    )


def _placed_tiles(post: nn.Module, x: Tensor, ratio: Tensor) -> Tensor:
    """post(x, ratio), where it is plain without its loop over the images, which reads every ratio on the host."""
    if _child(post, "TilePositionalEmbedding") is not None:
        return post(x, ratio)
    table = post.embedding
    if table.dim() != 4 or table.shape[0] != table.shape[1]:
        return post(x, ratio)
    rows = tile_rows(ratio.to(x.device, non_blocking=True), x.shape[1], *table.shape[:2])
    tiles = F.embedding(rows.clamp(min=0), (table * post.gate.tanh()).flatten(0, 2))
    tiles = torch.where(rows[:, None] < 0, 0, tiles).view(*x.shape[:2], 1, -1)
    return (x + tiles).to(x.dtype)


def _rehearse_vision(self: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    if found := _front_obstacle(self, options):
        return found
    images, ratio = zero_images(self, sizes)
    return _placed_tokens(self, images, ratio, options), []


def image_of(self: nn.Module) -> tuple[int, int]:
    """(tiles, tokens of a tile) of a vision transformer, fastfuse's own too, whose tables may have a row for each aspect ratio."""
    tables = (getattr(self.pre_tile_pos_embed, "embedding", None), getattr(self.token_pos_embedding, "global_token_positional_embedding", None))
    return next((t.shape[1] for t in tables if t is not None), 1), self.patches_per_tile + 1


def zero_images(self: nn.Module, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """([images, tiles, channels, height, width], aspect ratios [images, 2]), as many images as make so many tokens."""
    weight, (ph, pw), side, (tiles, n) = self.conv.weight, self.conv.kernel_size, math.isqrt(self.patches_per_tile), image_of(self)
    images = -(-sizes.tokens // (tiles * n))
    shape = (images, tiles, weight.shape[1], side * ph, side * pw)
    return torch.zeros(shape, dtype=weight.dtype, device=weight.device), torch.ones(images, 2, dtype=torch.int64, device=weight.device)


def _vision_probe(self: nn.Module) -> Probe:
    weight, (ph, pw) = self.conv.weight, self.conv.kernel_size
    tiles = next((t.shape[0] for t in _tables(self) if t is not None), 1)
    side = math.isqrt(self.patches_per_tile)
    shape = (1, 1, tiles, self.conv.in_channels, side * ph, side * pw)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(weight.device, weight.dtype)
    ratio = torch.tensor([[[1, max(tiles - 1, 1)]]], device=weight.device)  # the last tile is padding
    # Every layer rounds twice what the one before has left it.
    return Probe({"images": images, "aspect_ratio": ratio}, weight.dtype, weight.shape[0], steps=2 * len(self.layers) + 4)


# TransformerCrossAttentionLayer


def _attention_obstacle(self: nn.Module, options: Options) -> Reason | None:
    attn = self.attn
    if found := _child(attn, "MultiHeadAttention"):
        return found
    cache = attn.kv_cache
    if cache is not None and hooked(cache):
        return Reason("HOOKED", "a hook on a cache inside must run")
    if attn.cache_enabled and cache is None:
        return Reason("CACHE", "its cache is enabled and missing")
    if attn.pos_embeddings is not None:
        return Reason("POSITIONS", "its queries and keys have positions")
    if not getattr(attn._attention_call, "__module__", "").startswith(_FROM):
        return Reason("ATTENTION", "its _attention_call is not torchtune's")
    if attn.training and attn.attn_dropout > 0:
        return Reason("DROPOUT", "dropout of attention weights is active")
    return None


def _attention_refuses(self: nn.Module, options: Options) -> Reason | None:
    return attention_refuses(self, next(self.parameters()).dtype, self.attn.head_dim, self.attn.num_heads // self.attn.num_kv_heads, options)


def _mask_obstacle(attn: nn.Module, x: Any, encoder_input: Any, mask: Any, cache: nn.Module | None) -> Reason | None:
    """Why the op does not attend as torchtune would with these arguments."""
    if not isinstance(x, Tensor) or x.dim() != 3 or not (encoder_input is None or (isinstance(encoder_input, Tensor) and encoder_input.dim() == 3)):
        return Reason("ARGUMENTS", "called with something else than tensors of 3 dims")
    (b, s, _), held = x.shape, encoder_input if cache is None else cache.k_cache
    if held.shape[0] != b or (encoder_input is not None and encoder_input.shape[0] != b):
        return Reason("SHAPE", "text and images, or their cache, have batches of different size")
    if mask is None:
        causal = attn.kv_cache is None and attn.is_causal
        return Reason("CAUSAL", "without a mask its attention is causal") if causal else None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool or hasattr(mask, "device_mesh") or mask.device != x.device:
        return Reason("MASK", "the mask is not a bool tensor beside the input")
    width = held.shape[1] if cache is None else held.shape[2]
    # No `in (1, b)`: under torch.compile a number is not found among symbols.
    if mask.dim() != 3 or (mask.shape[0] != 1 and mask.shape[0] != b) or mask.shape[1] != s or mask.shape[2] != width:
        return Reason("MASK", "the mask does not have a column for each image token and a row for each text token")
    return None


def _cross_attention(self: nn.Module, given: dict[str, Any], options: Options) -> Any:
    x, encoder_input, mask = given.get("x"), given.get("encoder_input"), given.get("encoder_mask")
    attn = self.attn
    cache = attn.kv_cache if attn.cache_enabled else None
    if encoder_input is None and cache is None:
        return x
    if found := _attention_obstacle(self, options) or _mask_obstacle(attn, x, encoder_input, mask, cache):
        return found
    served = options.backend == "torch" or serves_cross_attention(x, attn.head_dim, attn.num_heads // attn.num_kv_heads)
    if not served:
        return Reason("UNCOVERED", "no kernel serves such a call: its dtype, head_dim, device or a transform around it")
    from_cache = encoder_input is None
    if from_cache and not torch.compiler.is_compiling() and cache.size == 0:  # waits for the device, as the layer itself does
        return x
    mask = None if mask is None else EncoderMask.from_dense(mask)
    skip = None if mask is None else mask.rows_empty[..., None]
    q = _heads(attn.q_proj(self.ca_norm(x)), attn.head_dim, attn.q_norm)
    if from_cache:
        k, v = cache.k_cache, cache.v_cache
    else:
        k, v = attn.k_proj(encoder_input), attn.v_proj(encoder_input)
        k, v = _heads(k, attn.head_dim, attn.k_norm), _heads(v, attn.head_dim, None)
        if cache is not None:
            k, v = cache.update(k, v)
    uniform = options.masked_rows == "uniform"
    if mask is not None and uniform:
        mask = mask.filled() if cache is None else mask.filled(cache.cache_pos[0])
    attended = cross_attention(q, k, v, mask, backend=options.named())
    attended = attn.output_proj(attended.transpose(1, 2).flatten(2))
    if skip is not None and not uniform:
        attended = attended.masked_fill(skip, 0)
    h = self.ca_scale(attended) + x
    mlp = self.mlp(self.mlp_norm(h))
    if skip is not None:
        mlp = mlp.masked_fill(skip, 0)
    out = h + self.mlp_scale(mlp)
    # A graph cannot ask how much the cache holds.
    return torch.where(cache.cache_pos[0] == 0, x, out) if from_cache and torch.compiler.is_compiling() else out


def _heads(projected: Tensor, head_dim: int, norm: nn.Module | None) -> Tensor:
    """[b, s, heads * head_dim] -> [b, heads, s, head_dim], normalised."""
    heads = projected.unflatten(-1, (-1, head_dim)).transpose(1, 2)
    return heads if norm is None else norm(heads)


def _rehearse_attention(self: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    if found := _attention_obstacle(self, options):
        return found
    attn = self.attn
    return rehearse_attention(self, next(self.parameters()).dtype, attn.num_heads, attn.num_kv_heads, attn.head_dim, False, sizes, options)


def _attention_probe(self: nn.Module) -> Probe | None:
    if self.attn.cache_enabled:  # which a call would write to
        return None
    p, made, dim = next(self.parameters()), torch.Generator().manual_seed(0), self.attn.embed_dim
    x, encoded = (torch.randn(2, n, dim, generator=made).to(p.device, p.dtype).requires_grad_() for n in (5, 12))
    mask = torch.rand(2, 5, 12, generator=made) < 0.5
    mask[..., 0] = True  # without rows that see nothing, whose result is an option
    given = {"x": x, "encoder_input": encoded, "encoder_mask": mask.to(p.device)}
    return Probe(given, p.dtype, dim, steps=10)  # four projections, three norms, scores and weights, an MLP


HOSTS = (
    nf4_host(
        name="torchtune", op="nf4_lora_linear", matches=_over_nf4(_known("DoRALinear", *_ADAPTER, "magnitude")), written_by=_FROM,
        parts=("weight", "bias", *_ADAPTER, "scaling", "magnitude"), weight=lambda module: module.weight, obstacle=_dora_obstacle, fused=_dora,
        probe_dtype=_adapter_dtype, modules="`DoRALinear` over NF4", covers="bias scaled as there, dropout, disabled adapters",
    ),
    nf4_host(
        name="torchtune", op="nf4_lora_linear", matches=_over_nf4(_known("LoRALinear", *_ADAPTER, "alpha")), written_by=_FROM,
        parts=("weight", "bias", *_ADAPTER, "alpha", "rank"), weight=lambda module: module.weight, obstacle=_adapter_obstacle, fused=_lora,
        probe_dtype=_adapter_dtype, modules="`LoRALinear` over NF4", covers="dropout, disabled adapters",
    ),
    nf4_host(
        name="torchtune", op="nf4_linear", written_by=_FROM, parts=("weight", "bias"), x="input",
        # Beside its forward it is what torchao's quantize_ makes of a Linear.
        matches=_over_nf4(lambda module: isinstance(module, nn.Linear) and type(module).forward.__module__.startswith(_FROM)),
        weight=lambda module: module.weight, obstacle=_frozen_obstacle, fused=_frozen, probe_dtype=lambda module: module.weight.dtype,
        modules="`FrozenNF4Linear`", covers="bf16, fp16, fp32",
    ),
    Host(
        name="torchtune", op="patch_embed", matches=_known("VisionTransformer", "cls_token_embedding", "token_pos_embedding", "pre_tile_pos_embed", "ln_pre"),
        parts=("conv.weight", "cls_token_embedding.weight", "token_pos_embedding", "pre_tile_pos_embed", "post_tile_pos_embed", "ln_pre", "ln_post", "layers",
               "out_indices", "cls_projection", "patches_per_tile"),
        written_by=_FROM, takes=("images", "aspect_ratio"), refuses=lambda module, options: on_device("patch_embed", device_of(module.conv), options),
        obstacle=_front_obstacle, fused=_vision, probe=_vision_probe, rehearse=_rehearse_vision, image=image_of, device=lambda module: device_of(module.conv),
        layout=lambda module: f"{module.conv.kernel_size[0]} px patches, {module.patches_per_tile} to a tile", modules="`VisionTransformer`",
        covers="everything before the layers, and the positions of tiles behind them, without a loop over the images",
    ),
    Host(
        name="torchtune", op="cross_attention", matches=_known("TransformerCrossAttentionLayer", "ca_norm", "ca_scale", "mlp_scale", "attn", "mlp"),
        parts=("attn", *(f"attn.{part}" for part in _CHILD_PARTS["MultiHeadAttention"]), "ca_norm", "ca_scale", "mlp", "mlp_norm", "mlp_scale"),
        written_by=_FROM, takes=("x", "encoder_input", "encoder_mask"), ignores=("mask", "input_pos"), refuses=_attention_refuses,
        obstacle=_attention_obstacle, fused=_cross_attention, probe=_attention_probe, rehearse=_rehearse_attention, device=device_of,
        layout=lambda module: f"{module.attn.num_heads} heads over {module.attn.num_kv_heads} of {module.attn.head_dim}",
        modules="`TransformerCrossAttentionLayer`", covers="bool masks, caches; keys and values are not copied for every query head",
    ),
)  # fmt: skip
