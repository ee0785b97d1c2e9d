"""transformers' Mllama (Llama 3.2 Vision): the front of its vision model, and cross-attention without a dense mask.

MllamaModel would turn the mask of tiles [b, s, images, tiles] into one of image tokens, tiles * 1601 times the size, for every forward. Instead
it hands the tiles' mask on as an EncoderMask: MllamaModel passes it to MllamaTextModel, that to its layers in the place
of the dense one, and MllamaTextCrossAttention attends by it. All three have to be patched; where one is not, a forward makes the dense mask.
"""

from collections.abc import Callable
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from fastfuse.errors import Unsupported
from fastfuse.ops import EncoderMask, _op, cross_attention, patch_embed
from fastfuse.ops._op import autocast_dtype
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
    bound_host,
    call_own,
    convolution,
    is_named,
    library_module,
    parameter,
    patches_in,
    plain,
    plain_tensors,
    random_like,
    whole_patches,
)

_FROM = "transformers.models.mllama."
_RENAMED = (("cache", "past_key_values"),)  # 5.24; the old name until 5.40
# What transformers hands to every attention layer, and eager and sdpa attention without a paged cache or a bias do not look at.
_IGNORED = (
    "use_cache", "position_ids", "cache_position", "output_hidden_states", "return_dict", "num_items_in_batch", "logits_to_keep", "labels",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx", "position_embeddings", "token_type_ids",
)  # fmt: skip


def _wants(self: nn.Module, arguments: Arguments, *names: str) -> bool:
    """Whether one of these flags is set, by the call or by the model's config."""
    return any(arguments[name] if arguments.get(name) is not None else getattr(self.config, name, False) for name in names)


def _attention(self: nn.Module) -> Reason | None:
    name = self.config._attn_implementation
    return None if name in ("eager", "sdpa") else Reason("ATTENTION", f"its attention is {name!r}, fastfuse stands in for 'eager' and 'sdpa'")


# MllamaModel


class _HandedOn:
    """The mask on its way from MllamaModel to MllamaTextModel, as one of the keywords that the one passes to the other."""

    def __init__(self, mask: EncoderMask, dtype: torch.dtype):
        self.mask, self.dtype, self.taken = mask, dtype, False

    def to(self, device: torch.device, non_blocking: bool = False) -> "_HandedOn":
        """accelerate moves what it finds between devices."""
        self.mask = self.mask.to(device, non_blocking)
        return self


def _hands_on(self: nn.Module) -> Reason | None:
    """Why the language model, or somebody who looks at what it and its layers are called with, would not understand an EncoderMask."""
    text = self.language_model
    attentions = [layer.cross_attn for layer in text.layers if hasattr(layer, "cross_attn")]
    if not all(_is_ours(m) for m in (text, *attentions)):
        return Reason("HALF_PATCHED", "its language_model or a cross-attention layer of it is not patched")
    for layer in text.layers:
        theirs = "forward" in layer.__dict__ and "_hf_hook" not in layer.__dict__
        if theirs or not type(layer).forward.__module__.startswith((_FROM, "torch.")):  # PyTorch's wrappers pass on what they get
            return Reason("FOREIGN_FORWARD", "somebody else's layer may look at the mask")
    if any(_sees_keywords(m) for m in (text, *text.layers, *attentions)):
        return Reason("HOOKED", "a hook of the language model or of a layer may look at the mask")
    return _attention(text)


def _sees_keywords(module: nn.Module) -> bool:
    """Whether a hook is given the keywords; FSDP's casts tensors among them and passes the rest on."""
    if not (module._forward_pre_hooks_with_kwargs or module._forward_hooks_with_kwargs):
        return False
    hooks = [module._forward_pre_hooks[k] for k in module._forward_pre_hooks_with_kwargs]
    hooks += [module._forward_hooks[k] for k in module._forward_hooks_with_kwargs]
    return not all((getattr(hook, "__module__", None) or "").startswith("torch.distributed.") for hook in hooks)


def _is_ours(module: nn.Module) -> bool:
    """Whether a call reaches our forward, through accelerate's hook or not."""
    return bound_host(module) is not None and module.__dict__.get("_fastfuse") is not None


def _whole_model_obstacle(self: nn.Module) -> Reason | None:
    return _hands_on(self) if _is_ours(self) else None  # its layers are patched after it has been asked


def _whole_model(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    tiles = arguments.get("cross_attention_mask")
    if tiles is None:
        return call_own(self, arguments)
    text = arguments["input_ids"] if arguments.get("input_ids") is not None else arguments.get("inputs_embeds")
    if text is None or not isinstance(tiles, Tensor) or tiles.dim() != 4:
        return Reason("MASK", "the mask is no tensor [batch, text, images, tiles], or there is no text")
    outputs = Reason("OUTPUTS", "attention weights are asked for") if _wants(self.language_model, arguments, "output_attentions") else None
    if reason := outputs or _hands_on(self):
        # transformers' own mask does not tell text that sees nothing from text that sees everything
        return Reason("MASKED_ROWS", f"masked_rows='zero' does not hold: {reason.words}") if options.masked_rows == "zero" else reason
    seen = _rows_of_call(tiles, text.shape[1], arguments.get("cache")) == 1
    handed = _HandedOn(EncoderMask.from_tiles(seen, self.vision_model.num_patches), self.dtype)
    out = call_own(self, arguments | {"cross_attention_mask": None, "fastfuse_mask": handed})
    if not handed.taken:  # a wrong answer, and no way to know it before: a signature does not tell
        raise Unsupported("MllamaModel does not pass its keywords on, a version that fastfuse does not know: unpatch with ops='cross_attention'", "SIGNATURE")
    return out


def _rows_of_call(tiles: Tensor, s: int, cache: Any) -> Tensor:
    """The rows of the s tokens that this call is given, where the mask has those of the cache before them."""
    if tiles.shape[1] == s:
        return tiles
    seen = 0 if cache is None else int(cache.get_seq_length())
    return tiles[:, seen : seen + s]


# MllamaTextModel


def _text_model(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    handed = arguments.pop("fastfuse_mask", None)
    if handed is not None:
        handed.taken, mask = True, handed.mask
        arguments |= {"cross_attention_mask": mask, "full_text_row_masked_out_mask": (~mask.rows_empty)[:, None, :, None].to(handed.dtype)}
    return call_own(self, arguments)


# MllamaTextCrossAttention

_TAKEN = ("hidden_states", "cross_attention_states", "cache", "attention_mask")


def _cross_attention_obstacle(self: nn.Module) -> Reason | None:
    if self.training and self.dropout > 0:
        return Reason("DROPOUT", "dropout of attention weights is active")
    return _attention(self)


def _heads(self: nn.Module) -> Heads:
    return Heads(self.q_norm.weight.dtype, self.num_heads, self.num_key_value_heads, self.head_dim, tiled=True)


def _cross_attention(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    x, states, mask = arguments.get("hidden_states"), arguments.get("cross_attention_states"), arguments.get("attention_mask")
    cache = arguments.get("cache")
    if x is None or (states is None and cache is None):
        return Reason("ARGUMENTS", "called without text, or with neither image states nor a cache")
    if reason := _cross_attention_obstacle(self):
        return reason
    if isinstance(mask, Tensor):
        return Reason("DENSE_MASK", "called with a dense mask")
    if mask is None and self.config._attn_implementation == "sdpa" and x.shape[1] > 1:
        return Reason("NO_MASK", "without a mask transformers' sdpa lets text token i see image tokens 0 to i alone, which the op does not")
    if arguments.get("output_attentions"):
        return Reason("OUTPUTS", "attention weights are asked for")
    return _heads(self).unserved(x, options) or _attend(self, arguments, options.masked_rows, options.named())


def _attend(self: nn.Module, arguments: Arguments, masked_rows: str, backend: str | None) -> tuple[Tensor, None]:
    x, states, cache, parts = arguments["hidden_states"], arguments.get("cross_attention_states"), arguments.get("cache"), self._modules
    b, s, _ = x.shape
    q = parts["q_norm"](parts["q_proj"](x).view(b, s, -1, self.head_dim).transpose(1, 2))
    if states is None:
        k, v = cache.layers[self.layer_idx].keys, cache.layers[self.layer_idx].values
    else:
        k, v = (project(states).view(b, -1, self.num_key_value_heads, self.head_dim).transpose(1, 2) for project in (self.k_proj, self.v_proj))
        k = self.k_norm(k)
        if cache is not None:
            k, v = cache.update(k, v, self.layer_idx, **_beside(self, arguments))
    empty = "zero" if masked_rows == "zero" else "uniform"  # the host's own rule
    out = cross_attention(q, k, v, arguments.get("attention_mask"), scale=self.scaling, empty_rows=empty, backend=backend)
    return parts["o_proj"](out.transpose(1, 2).reshape(b, s, -1)), None


def _prepare_attention(self: nn.Module, arguments: Arguments, options: Options) -> Callable[..., tuple[Tensor, None] | None] | None:
    """A call by the keywords of the last one, with a mask of its kind, of an x of its dtype and device, while nothing stands in the way that did not then.

    Its projections and norms are called, and whoever hooks into them is seen; the op makes its own checks.
    """
    x, backend, state, config = arguments["hidden_states"], options.named(), self.__dict__, self.config.__dict__
    covered = backend != "torch" and type(x) is Tensor and autocast_dtype(x.device) is None and arguments.keys() <= {*_TAKEN, *_IGNORED, "output_attentions"}
    if not covered or _op.route("cross_attention", x, backend) != "op":
        return None
    renamed, names, kinds, device = state["_fastfuse"].names.hosts, {*arguments}, _kinds(arguments), x.device.type
    holders, keys = [state] * 4 + [config], ["training", "dropout", "config", "_modules", "_attn_implementation_internal"]
    values = [*map(dict.get, holders, keys)]

    def prepared(*args, **arguments) -> tuple[Tensor, None] | None:
        if forward_ad._current_level >= 0 or torch._C._functorch.peek_interpreter_stack() is not None or torch._C._get_tracing_state() is not None:
            return None
        if _op.launch_interceptor is not None or _op._backend != "auto" or torch.compiler._is_compiling_flag or args[1:]:
            return None
        for own, host in renamed.items():
            if own in arguments:
                arguments[host] = arguments.pop(own)
        if args:
            arguments["hidden_states"] = args[0]
        if (
            arguments.keys() != names
            or _kinds(arguments) != kinds
            or not all(map(is_, map(dict.get, holders, keys), values))
            or torch.is_autocast_enabled(device)
        ):
            return None
        prepared.served = True
        return _attend(self, arguments, options.masked_rows, backend)

    prepared.served = False
    return prepared


def _kinds(arguments: Arguments) -> tuple:
    x, states, mask = arguments["hidden_states"], arguments.get("cross_attention_states"), arguments.get("attention_mask")
    several = x.shape[1] > 1 if x.dim() == 3 else None
    return type(x), x.dtype, x.device, several, type(mask), states is None, arguments.get("cache") is None, arguments.get("output_attentions")


def _beside(self: nn.Module, arguments: Arguments) -> Arguments:
    """What the module's own forward hands to its cache with the keys and values: since 5.24 the keywords that it does not name."""
    names = self.__dict__["_fastfuse"].names
    return {} if "cache" in names.own else {"kwargs": {name: value for name, value in arguments.items() if name not in names.positional}}


def _cross_attention_by_dense_mask(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    mask = arguments.get("attention_mask")
    if not isinstance(mask, EncoderMask):
        return call_own(self, arguments)
    dtype = arguments["hidden_states"].dtype
    seen = mask.to_dense() | mask.rows_empty[..., None]
    additive = torch.zeros((), dtype=dtype, device=mask.device).where(seen, torch.finfo(dtype).min)[:, None]
    out, weights = call_own(self, arguments | {"attention_mask": additive})
    return out.masked_fill(mask.rows_empty[..., None], 0) if options.masked_rows == "zero" else out, weights


def _cross_attention_probe(self: nn.Module) -> Probe:
    weight, dim = self.q_norm.weight, self.hidden_size
    x, states, tiles = random_like(weight, (2, 7, dim), (2, 24, dim), (2, 7, 2, 4))
    visible = tiles < 0
    visible[:, 0] = False
    arguments = {"hidden_states": x.requires_grad_(), "cross_attention_states": states.requires_grad_(), "attention_mask": EncoderMask.from_tiles(visible, 3)}
    return Probe(arguments, weight.dtype, dim, steps=8)  # four projections, two norms, scores and weights


# MllamaVisionModel


def _vision_obstacle(self: nn.Module) -> Reason | None:
    conv, positions, pre = self.patch_embedding, self.gated_positional_embedding, self.pre_tile_positional_embedding
    reason = convolution(conv)
    for child in (positions, pre):
        if not (reason or type(child).forward.__module__.startswith(_FROM)):
            return Reason("CHILD_TYPE", f"{type(child).__name__} has a forward of its own")
        reason = reason or plain(child, type(child))
    reason = reason or plain(positions.tile_embedding, nn.Embedding) or plain(pre.embedding, nn.Embedding)
    return reason or plain_tensors(parameter(self, "class_embedding"))


def _vision_model(self: nn.Module, arguments: Arguments, options: Options) -> Any:
    if reason := _vision_obstacle(self):
        return reason
    as_tuple = arguments.get("return_dict") is False or getattr(self.config, "return_dict", True) is False
    if _wants(self, arguments, "output_hidden_states", "output_attentions") or as_tuple:
        return Reason("OUTPUTS", "hidden states, attention weights or a tuple are asked for")
    pixels, ids, tile_mask = (arguments.get(name) for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
    if any(t is None for t in (pixels, ids, tile_mask)) or pixels.dim() != 6:
        return Reason("ARGUMENTS", "called without pixels, ids and mask of its tiles")
    if patches_in(pixels, self.patch_embedding) + 1 != self.num_patches or pixels.shape[2] != self.max_num_tiles:
        return Reason("SHAPE", f"the tiles are not {self.max_num_tiles} of {self.num_patches - 1} patches")
    b, images, tiles = pixels.shape[:3]
    x = _placed_tokens(self, whole_patches(pixels, self.patch_embedding).flatten(0, 1), ids.reshape(-1), options)
    per_tile, n = x.shape[2], self.num_patches
    prepare = library_module(self, _FROM)._prepare_aspect_ratio_attention_mask
    mask = prepare(aspect_ratio_mask=tile_mask.reshape(b * images, -1), num_patches=n, target_length=per_tile, dtype=self.dtype)
    encoded = self.transformer(x.flatten(1, 2), attention_mask=mask)
    x = self.layernorm_post(encoded.last_hidden_state).unflatten(1, (tiles, per_tile))
    x = self.post_tile_positional_embedding(x, ids.reshape(b * images, -1)).flatten(1, 2)
    x = self.global_transformer(x, attention_mask=mask).last_hidden_state
    taken = torch.stack([encoded.hidden_states[i] for i in self.intermediate_layers_indices], -1).flatten(2)
    x = torch.cat([t.reshape(b, images, tiles, per_tile, -1)[..., :n, :] for t in (x, taken)], -1)
    return type(encoded)(last_hidden_state=x)


def _placed_tokens(self: nn.Module, pixels: Tensor, ids: Tensor, options: Options) -> Tensor:
    """[images, tiles, tokens padded to a multiple of 8, dim], normalised."""
    conv, positions, pre, norm = self.patch_embedding, self.gated_positional_embedding, self.pre_tile_positional_embedding, self.layernorm_pre
    # Under autocast PyTorch's norm gives fp32 on a GPU, whatever goes in.
    by_op = plain(norm, nn.LayerNorm) is None and norm.elementwise_affine and autocast_dtype(pixels.device) is None
    rows = positions.max_aspect_ratio_id + 1
    x = patch_embed(
        pixels.to(conv.weight.device, conv.weight.dtype),
        conv.weight,
        self.class_embedding,
        ids.to(conv.weight.device),
        positions.embedding,
        positions.tile_embedding.weight.view(rows, self.max_num_tiles, self.num_patches, -1),
        positions.gate,
        pre.embedding.weight.view(rows, self.max_num_tiles, 1, -1),
        pre.gate if pre.is_gated else None,
        bias=conv.bias,
        norm=(norm.weight, norm.bias, norm.eps) if by_op else None,
        pad_tokens_to=8 if by_op else 1,
        backend=options.named(),
    )
    if not by_op:  # another library's norm, a hook: called as it is
        x = norm(x)
        x = F.pad(x, (0, 0, 0, -x.shape[2] % 8))
    return asking_for_grad(x, conv)


def _vision_refuses(self: nn.Module, options: Options) -> Reason | None:
    if not hasattr(library_module(self, _FROM), "_prepare_aspect_ratio_attention_mask"):
        return Reason("STRUCTURE", "transformers has no _prepare_aspect_ratio_attention_mask: a version that fastfuse does not know")
    return None


def _rehearse_vision(self: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
    weight, size, images = self.patch_embedding.weight, self.image_size, -(-sizes.tokens // (self.max_num_tiles * self.num_patches))
    pixels = weight.new_zeros(images, self.max_num_tiles, weight.shape[1], size, size)
    return _vision_obstacle(self) or (_placed_tokens(self, pixels, pixels.new_ones(images, dtype=torch.int64), options), [])


def _vision_probe(self: nn.Module) -> Probe:
    weight, tiles, size = self.patch_embedding.weight, self.max_num_tiles, self.image_size
    (pixels,) = random_like(weight, (1, 1, tiles, self.num_channels, size, size))
    ids, mask = (pixels.new_ones(shape, dtype=torch.int64) for shape in ((1, 1), (1, 1, tiles)))
    arguments = {"pixel_values": pixels, "aspect_ratio_ids": ids, "aspect_ratio_mask": mask}
    # Every layer rounds twice what the one before has left it.
    return Probe(arguments, weight.dtype, self.hidden_size, steps=2 * (len(self.transformer.layers) + len(self.global_transformer.layers)) + 4)


def _geometry(self: nn.Module) -> str:
    return f"{self.patch_size} px patches, {self.max_num_tiles} tiles of {self.image_size} px"


def _host(cls: str, make: Callable[..., Host] = Host, **how: Any) -> Host:
    return make(name="transformers Mllama", matches=lambda module: is_named(module, (cls,), _FROM), written_by=_FROM, renamed=_RENAMED, **how)


HOSTS = (
    _host(
        "MllamaModel", op="cross_attention", fused=_whole_model, obstacle=_whole_model_obstacle, layout=lambda m: "mask of tiles",
        parts=("vision_model.num_patches", "language_model.layers", "language_model.config", "dtype"),
        needs=("input_ids", "inputs_embeds", "cache", "cross_attention_mask", "kwargs"),
        modules="`MllamaModel`, `MllamaTextModel`, `MllamaTextCrossAttention`",
        covers="masks of tiles, never made dense; dynamic and static caches, compiled decoding; not attention weights as outputs",
    ),
    _host(
        "MllamaTextModel", op="cross_attention", fused=_text_model, parts=("layers", "config._attn_implementation"), layout=lambda m: "mask of tiles",
        needs=("cross_attention_mask", "full_text_row_masked_out_mask", "kwargs"),
    ),
    _host(
        "MllamaTextCrossAttention", attention_host, heads=_heads, obstacle=_cross_attention_obstacle, fused=_cross_attention,
        parts=("q_proj", "k_proj", "v_proj", "o_proj", "q_norm.weight", "k_norm", "num_heads", "num_key_value_heads", "head_dim", "hidden_size", "layer_idx",
               "scaling", "dropout", "config._attn_implementation"),
        takes=_TAKEN, ignores=(*_IGNORED, "output_attentions"), prepare=_prepare_attention, fallback=_cross_attention_by_dense_mask,
        probe=_cross_attention_probe,
    ),
    _host(
        "MllamaVisionModel", op="patch_embed", kernels="patch_embed",
        parts=("patch_embedding.weight", "class_embedding", "gated_positional_embedding.embedding", "gated_positional_embedding.tile_embedding.weight",
               "gated_positional_embedding.gate", "gated_positional_embedding.max_aspect_ratio_id", "pre_tile_positional_embedding.embedding.weight",
               "pre_tile_positional_embedding.is_gated", "post_tile_positional_embedding", "layernorm_pre", "layernorm_post", "transformer", "global_transformer",
               "intermediate_layers_indices", "num_patches", "max_num_tiles", "hidden_size"),
        takes=("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"), ignores=("return_dict", "output_hidden_states", "output_attentions"),
        refuses=_vision_refuses, obstacle=_vision_obstacle, fused=_vision_model, probe=_vision_probe, rehearse=_rehearse_vision, layout=_geometry,
        image=lambda module: (module.max_num_tiles, module.num_patches), modules="`MllamaVisionModel`",
        covers="convolution, class token, both position tables, norm and padding in one; the layers run as they are",
    ),
)  # fmt: skip
