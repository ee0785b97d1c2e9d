"""torchtune's LoRA, DoRA and frozen layers over NF4 weights, the front of its vision transformer, and its cross-attention layer."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse.modules.attention import project
from fastfuse.modules.low_precision.nf4_linear import bias_fits
from fastfuse.modules.transformer import add_attended, masks_scores
from fastfuse.modules.vision_transformer import place_tokens, run_layers
from fastfuse.ops import EncoderMask, cross_attention, lora_row_norms, nf4_linear, nf4_lora_linear
from fastfuse.ops._op import autocast_dtype
from fastfuse.ops._patch_tokens import tile_rows
from fastfuse.ops.nf4_linear import DTYPES
from fastfuse.patching.hosts._attention import Heads, attention_host
from fastfuse.patching.hosts._host import (
    Arguments,
    Host,
    Options,
    Probe,
    Reason,
    Rehearsed,
    Sizes,
    asking_for_grad,
    convolution,
    hooked,
    is_named,
    patches_in,
    plain_tensors,
    random_like,
    rebound,
)
from fastfuse.patching.hosts._nf4 import NF4Layer, adapter_obstacle, drops_now, nf4_host
from fastfuse.quant.nf4 import NF4View, holds_torchao

_FROM = "torchtune."


def _known(name: str, *parts: str) -> Callable[[nn.Module], bool]:
    """Recognises torchtune's class by its name, so that a part it lacks is reported, and the same class under another name by its parts."""
    return lambda module: is_named(module, (name,), _FROM) or all(hasattr(module, part) for part in parts)


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
    if reason := plain_tensors(self.bias):
        return reason
    return None if x is None or x.dtype in DTYPES else Reason("DTYPE", f"the input is {x.dtype}")


def _frozen(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    return _with_bias(self.bias, nf4_linear, x, weight, backend=backend)


def _with_bias(bias: Tensor | None, op: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> Tensor:
    """A bias of another dtype promotes the result, as adding it afterwards does."""
    return op(x, *args, bias=bias, **options) if bias_fits(x, bias) else op(x, *args, **options) + bias


def _lora_obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    a, b = self.lora_a, self.lora_b
    if reason := adapter_obstacle(a, b, self.dropout):
        return reason
    if b.bias is not None:
        return Reason("LORA_BIAS", "the adapter's B has a bias")
    factors = {a.weight.dtype, b.weight.dtype}
    if not factors <= set(DTYPES):
        return Reason("DTYPE", f"the adapter is {factors.difference(DTYPES).pop()}")
    if x is None or autocast_dtype(x.device) is not None or factors == {x.dtype}:
        return None
    return Reason("DTYPE", f"the input is {x.dtype}, the adapter {' and '.join(map(str, factors))}")


def _lora(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    return _adapted(self, x, weight, self.bias, self.alpha / self.rank, backend=backend)


def _adapted(self: nn.Module, x: Tensor, weight: NF4View, bias: Tensor | None, scaling: float, **options: Any) -> Tensor:
    a, b, p = self.lora_a.weight, self.lora_b.weight, drops_now(self.dropout)
    return _with_bias(bias, nf4_lora_linear, x, weight, a, b, scaling, dropout_p=p, training=True, **options)


def _dora_obstacle(self: nn.Module, x: Tensor | None) -> Reason | None:
    reason = _lora_obstacle(self, x) or plain_tensors(self.magnitude)
    if reason or x is None:
        return reason
    if autocast_dtype(x.device) not in (None, x.dtype):
        return Reason("AUTOCAST", f"the input is {x.dtype} under autocast to another dtype")
    if self.magnitude.dtype != x.dtype:  # the result takes the wider dtype
        return Reason("DTYPE", f"the input is {x.dtype}, the magnitude {self.magnitude.dtype}")
    return None


def _dora(self: nn.Module, x: Tensor, weight: NF4View, backend: str | None) -> Tensor:
    magnitude, bias = self.magnitude, self.bias
    norms = lora_row_norms(weight, self.lora_a.weight, self.lora_b.weight, self.scaling, x.dtype, backend=backend)
    if bias is not None:  # part of what the magnitude scales, unlike the op's
        bias = bias * (magnitude / norms).to(bias.dtype)
    return _adapted(self, x, weight, bias, self.scaling, magnitude=magnitude, norms=norms, backend=backend)


def _adapter_host(cls: str, scale: tuple[str, str], obstacle: Callable[..., Reason | None], fused: Callable[..., Tensor], covers: str) -> Host:
    """obstacle, fused: of an adapter that is not disabled.  scale: the attributes that its product is multiplied by."""
    adapter = ("lora_a", "lora_b", "dropout", "disabled")
    layer = NF4Layer(
        obstacle=lambda module, x: _frozen_obstacle(module, x) or (None if module.disabled else obstacle(module, x)),
        fused=lambda module, *arguments: (_frozen if module.disabled else fused)(module, *arguments),
        probe_dtype=lambda module: module.lora_a.weight.dtype,
    )
    return nf4_host(
        layer, name="torchtune", op="nf4_lora_linear", matches=_over_nf4(_known(cls, *adapter, scale[1])), written_by=_FROM,
        parts=("weight", "bias", *adapter, *scale), modules=f"`{cls}` over NF4", covers=covers,
    )  # fmt: skip


# VisionTransformer


def _front_obstacle(self: nn.Module) -> Reason | None:
    """Why the modules in front of the layers are not what the op computes."""
    conv, cls, pre, pos, norm = self.conv, self.cls_token_embedding, self.pre_tile_pos_embed, self.token_pos_embedding, self.ln_pre
    reason = convolution(conv) or _child(cls, "CLSEmbedding") or _child(norm, "Fp32LayerNorm")
    reason = reason or _child(pos, "TiledTokenPositionalEmbedding", "TokenPositionalEmbedding")
    if reason := reason or (None if pre is None else _child(pre, "TilePositionalEmbedding")):
        return reason
    if conv.bias is not None:
        return Reason("GEOMETRY", "its convolution has a bias")
    if tuple(norm.normalized_shape) != (conv.out_channels,):
        return Reason("GEOMETRY", f"its norm is over {tuple(norm.normalized_shape)}, a token has {conv.out_channels} features")
    grids = {tuple(t.shape[:2]) for t in _tables(self)}
    if len(grids) > 1 or any(h != w for h, w in grids):
        return Reason("GEOMETRY", f"its tables are for {' and '.join(map(str, grids))} tiles")
    dtypes = {p.dtype for child in (conv, cls, norm, pos, pre) if child is not None for p in child.parameters(recurse=False)}
    if len(dtypes) > 1 or not dtypes <= set(DTYPES):
        return Reason("DTYPE", f"its weights are {' and '.join(map(str, dtypes))}")
    if len(self.layers) in self.out_indices:
        return Reason("OUT_INDICES", "what the index after the last layer stands for depends on torchtune's version")
    return None


def _tables(self: nn.Module) -> list[Tensor]:
    """The tables with a row for each tile."""
    tables = (getattr(self.pre_tile_pos_embed, "embedding", None), getattr(self.token_pos_embedding, "global_token_positional_embedding", None))
    return [t for t in tables if t is not None]


def _call_obstacle(self: nn.Module, images: Any, aspect_ratio: Any) -> Reason | None:
    weight = self.conv.weight
    if not isinstance(images, Tensor) or images.dim() != 6 or not (aspect_ratio is None or isinstance(aspect_ratio, Tensor)):
        return Reason("ARGUMENTS", "called with something else than images of 6 dims and a tensor of aspect ratios")
    if aspect_ratio is None and images.shape[2] > 1:
        return Reason("ARGUMENTS", "called without aspect ratios for several tiles")
    if images.shape[3] != self.conv.in_channels or patches_in(images, self.conv) != self.patches_per_tile:
        return Reason(
            "SHAPE", f"tiles of {images.shape[3]} channels, {images.shape[4]} x {images.shape[5]} pixels, do not have {self.patches_per_tile} patches"
        )
    if (autocast := autocast_dtype(images.device)) is not None:
        if images.dtype not in DTYPES or weight.dtype not in (torch.float32, autocast):
            return Reason("AUTOCAST", f"images are {images.dtype}, weights {weight.dtype} under autocast to another dtype")
    elif images.dtype != weight.dtype:
        return Reason("DTYPE", f"images are {images.dtype}, weights {weight.dtype}")
    return None


def _vision(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    images, ratio = arguments.get("images"), arguments.get("aspect_ratio")
    if reason := _front_obstacle(self) or _call_obstacle(self, images, ratio):
        return reason
    b, n_imgs = images.shape[:2]
    if ratio is None:
        ratio = torch.ones(b * n_imgs, 2, dtype=torch.int64, device=images.device)
    ratio = ratio.reshape(b * n_imgs, 2)
    x = asking_for_grad(place_tokens(self, images.flatten(0, 1), ratio, backend=options.named()), self.conv)
    x, hidden = run_layers(self, x)
    if self.post_tile_pos_embed is not None:
        x = _placed_tiles(self.post_tile_pos_embed, x, ratio)
    x, *hidden = (t.unflatten(0, (b, n_imgs)) for t in (x, *hidden))
    return (x if self.cls_projection is None else self.cls_projection(x)), hidden


def _placed_tiles(post: nn.Module, x: Tensor, ratio: Tensor) -> Tensor:
    """post(x, ratio), where it is plain without its loop over the images, which reads every ratio on the host."""
    table = getattr(post, "embedding", None)
    if _child(post, "TilePositionalEmbedding") is not None or table.dim() != 4 or table.shape[0] != table.shape[1]:
        return post(x, ratio)
    rows = tile_rows(ratio.to(x.device, non_blocking=True), x.shape[1], *table.shape[:2])
    tiles = F.embedding(rows.clamp(min=0), (table * post.gate.tanh()).flatten(0, 2))
    tiles = torch.where(rows[:, None] < 0, 0, tiles).view(*x.shape[:2], 1, -1)
    return (x + tiles).to(x.dtype)


def _rehearse_vision(self: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    return _front_obstacle(self) or (place_tokens(self, *zero_images(self, sizes), backend=options.named()), [])


def image_of(self: nn.Module) -> tuple[int, int]:
    """(tiles, tokens of a tile) of a vision transformer, fastfuse's own too, whose tables may have a row for each aspect ratio."""
    return next((t.shape[1] for t in _tables(self)), 1), self.patches_per_tile + 1


def zero_images(self: nn.Module, sizes: Sizes) -> tuple[Tensor, Tensor]:
    """([images, tiles, channels, height, width], aspect ratios [images, 2]), as many images as make so many tokens."""
    weight, (ph, pw), side, (tiles, n) = self.conv.weight, self.conv.kernel_size, math.isqrt(self.patches_per_tile), image_of(self)
    zeros = weight.new_zeros(-(-sizes.tokens // (tiles * n)), tiles, weight.shape[1], side * ph, side * pw)
    return zeros, zeros.new_ones(zeros.shape[0], 2, dtype=torch.int64)


def _vision_probe(self: nn.Module) -> Probe:
    tiles, n = image_of(self)
    zeros, ratio = zero_images(self, Sizes(1, 1, tiles, n))
    (images,) = random_like(zeros, (1, *zeros.shape))
    ratio[:, 1] = max(tiles - 1, 1)  # the last tile is padding
    # Every layer rounds twice what the one before has left it.
    return Probe({"images": images, "aspect_ratio": ratio[None]}, zeros.dtype, self.conv.out_channels, steps=2 * len(self.layers) + 4)


# TransformerCrossAttentionLayer


def _attention_obstacle(self: nn.Module) -> Reason | None:
    attn = self.attn
    if reason := _child(attn, "MultiHeadAttention"):
        return reason
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


def _heads(self: nn.Module) -> Heads:
    return Heads(next(self.parameters()).dtype, self.attn.num_heads, self.attn.num_kv_heads, self.attn.head_dim)


def _mask_obstacle(attn: nn.Module, x: Any, encoder_input: Any, mask: Any, cache: nn.Module | None) -> Reason | None:
    """Why the op does not attend as torchtune would with these arguments."""
    if not isinstance(x, Tensor) or x.dim() != 3 or not (encoder_input is None or (isinstance(encoder_input, Tensor) and encoder_input.dim() == 3)):
        return Reason("ARGUMENTS", "called with something else than tensors of 3 dims")
    b, held = x.shape[0], encoder_input if cache is None else cache.k_cache
    if held.shape[0] != b or (encoder_input is not None and encoder_input.shape[0] != b):
        return Reason("SHAPE", "text and images, or their cache, have batches of different size")
    if mask is None:
        causal = attn.kv_cache is None and attn.is_causal
        return Reason("CAUSAL", "without a mask its attention is causal") if causal else None
    if masks_scores(mask, x, held.shape[1] if cache is None else held.shape[2]):
        return None
    return Reason("MASK", "the mask is not a bool tensor beside the input, with a row for each text token and a column for each image token")


def _cross_attention(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    x, encoder_input, mask = arguments.get("x"), arguments.get("encoder_input"), arguments.get("encoder_mask")
    attn = self.attn
    cache = attn.kv_cache if attn.cache_enabled else None
    if encoder_input is None and cache is None:
        return x
    if reason := _attention_obstacle(self) or _mask_obstacle(attn, x, encoder_input, mask, cache) or _heads(self).unserved(x, options):
        return reason
    from_cache, compiling, skip, uniform = encoder_input is None, torch.compiler.is_compiling(), None, options.masked_rows == "uniform"
    if from_cache and not compiling and cache.size == 0:  # waits for the device, as the layer itself does
        return x
    q, k, v = project(attn, self.ca_norm(x), encoder_input, cache)
    if mask is not None:
        mask = EncoderMask.from_dense(mask)
        skip = mask.rows_empty[..., None]
        mask = mask.filled(None if cache is None else cache.cache_pos[0]) if uniform else mask
    attended = cross_attention(q, k, v, mask, backend=options.named())
    out = add_attended(self, x, attn.output_proj(attended.transpose(1, 2).flatten(2)), skip, uniform)
    # A graph cannot ask how much the cache holds.
    return torch.where(cache.cache_pos[0] == 0, x, out) if from_cache and compiling else out


def _attention_probe(self: nn.Module) -> Probe | None:
    if self.attn.cache_enabled:  # which a call would write to
        return None
    p, dim = next(self.parameters()), self.attn.embed_dim
    x, encoded, mask = random_like(p, (2, 5, dim), (2, 12, dim), (2, 5, 12))
    mask = mask < 0
    mask[..., 0] = True  # without rows that see nothing, whose result is an option
    arguments = {"x": x.requires_grad_(), "encoder_input": encoded.requires_grad_(), "encoder_mask": mask}
    return Probe(arguments, p.dtype, dim, steps=10)  # four projections, three norms, scores and weights, an MLP


HOSTS = (
    _adapter_host("DoRALinear", ("scaling", "magnitude"), _dora_obstacle, _dora, "bias scaled as there, dropout, disabled adapters"),
    _adapter_host("LoRALinear", ("rank", "alpha"), _lora_obstacle, _lora, "dropout, disabled adapters"),
    nf4_host(
        NF4Layer(obstacle=_frozen_obstacle, fused=_frozen, x="input"), name="torchtune", op="nf4_linear", written_by=_FROM, parts=("weight", "bias"),
        # Beside its forward it is what torchao's quantize_ makes of a Linear.
        matches=_over_nf4(lambda module: isinstance(module, nn.Linear) and type(module).forward.__module__.startswith(_FROM)),
        modules="`FrozenNF4Linear`", covers="bf16, fp16, fp32",
    ),
    Host(
        name="torchtune", op="patch_embed", matches=_known("VisionTransformer", "cls_token_embedding", "token_pos_embedding", "pre_tile_pos_embed", "ln_pre"),
        parts=("conv.weight", "cls_token_embedding.weight", "token_pos_embedding", "pre_tile_pos_embed", "post_tile_pos_embed", "ln_pre", "ln_post", "layers",
               "out_indices", "cls_projection", "patches_per_tile"),
        written_by=_FROM, takes=("images", "aspect_ratio"), kernels="patch_embed",
        obstacle=_front_obstacle, fused=_vision, probe=_vision_probe, rehearse=_rehearse_vision, image=image_of,
        layout=lambda module: f"{module.conv.kernel_size[0]} px patches, {module.patches_per_tile} to a tile", modules="`VisionTransformer`",
        covers="everything before the layers, and the positions of tiles behind them, without a loop over the images",
    ),
    attention_host(
        _heads, _attention_obstacle, name="torchtune", matches=_known("TransformerCrossAttentionLayer", "ca_norm", "ca_scale", "mlp_scale", "attn", "mlp"),
        parts=("attn", *(f"attn.{part}" for part in _CHILD_PARTS["MultiHeadAttention"]), "ca_norm", "ca_scale", "mlp", "mlp_norm", "mlp_scale"),
        written_by=_FROM, takes=("x", "encoder_input", "encoder_mask"), ignores=("mask", "input_pos"), fused=_cross_attention, probe=_attention_probe,
        modules="`TransformerCrossAttentionLayer`", covers="bool masks, caches; keys and values are not copied for every query head",
    ),
)  # fmt: skip
