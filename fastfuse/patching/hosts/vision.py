"""Generic ViT front ends: what transformers' CLIP, SigLIP and DINOv2 families do to pixels, and timm's PatchEmbed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfuse.ops._op import autocast_dtype
from fastfuse.ops.patch_embed import DTYPES, patch_embed
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
    nothing,
    only_asks_for_grad,
    patches_in,
    plain,
    plain_tensors,
    random_like,
    rebound,
    whole_patches,
)


class _Kind(NamedTuple):
    """In what forwards of modules with the same parts differ."""

    casts: bool  # pixels to the convolution's dtype; elsewhere another dtype is the forward's own error
    size: str  # "any", "own": another image size is the forward's own error, "square": for any other image positions are interpolated


class _Parts(NamedTuple):
    """What a front end computes with, read anew at every call."""

    conv: nn.Conv2d
    size: tuple[int, int]  # of the images that its positions are for
    n: int | None = None  # patches that there are positions for, None without
    cls: Tensor | None = None
    positions: Tensor | None = None


def _kinds(casts: bool, size: str, *names: str) -> dict[str, _Kind]:
    return {f"{name}Embeddings.forward": _Kind(casts, size) for name in names}


_CLIP = _kinds(True, "own", "CLIPVision", "AltCLIPVision", "BridgeTowerVision", "ChineseCLIPVision", "CLIPSegVision", "GitVision", "Kosmos2Vision")
_CLIP |= _kinds(True, "own", "MetaClip2Vision", "XCLIPVision") | _kinds(False, "any", "OwlViTVision", "Owlv2Vision")
_SIGLIP = _kinds(True, "any", "SiglipVision", "GraniteDoclingVision", "JanusVision")
_VIT = _kinds(False, "own", "ViT", "ViTMSN") | _kinds(False, "square", "Beit")
_VIT |= _kinds(True, "square", "Dinov2", "Dinov2WithRegisters", "InternVLVision", "QianfanOCRVision", "Tipsv2Vision")
_TIMM = {"PatchEmbed.forward": _Kind(False, "any")}
_KINDS = _CLIP | _SIGLIP | _VIT | _TIMM


@torch.compiler.assume_constant_result
def _forward_of(cls: type[nn.Module]) -> str:
    """The name of its forward with that of the class that wrote it: a subclass that writes its own is another kind."""
    return cls.forward.__qualname__


def _unfit(pixels: Any, casts: bool, parts: _Parts) -> Reason | None:
    """Why the op would not give what the module's own forward makes of these pixels, be it an error."""
    conv, cls, positions = parts.conv, parts.cls, parts.positions
    if not isinstance(pixels, Tensor):
        return Reason("ARGUMENTS", "called with something else than one tensor")
    if pixels.dim() != 4 or pixels.shape[1] != conv.weight.shape[1] or patches_in(pixels, conv) == 0:
        return Reason("SHAPE", "the pixels are not (images, channels, height, width) with room for a patch")
    if any(t is not None and t.device != pixels.device for t in (conv.weight, cls, positions)):
        return Reason("DEVICE", "pixels and weights are on several devices")
    autocast, weight = autocast_dtype(pixels.device), conv.weight.dtype
    dtype = weight if autocast is None else autocast
    if weight not in DTYPES or dtype not in DTYPES:
        return Reason("DTYPE", f"the convolution's weight is {weight}, it computes in {dtype}")
    if not casts and not (pixels.dtype == weight or (autocast is not None and pixels.dtype in DTYPES)):
        return Reason("DTYPE", f"the pixels are {pixels.dtype}, the convolution's weight is {weight}")
    if conv.bias is not None and autocast is None and conv.bias.dtype != weight:
        return Reason("DTYPE", f"the convolution's weight is {weight}, its bias {conv.bias.dtype}")
    wide = dtype if positions is None else torch.promote_types(dtype, positions.dtype)
    if cls is not None and torch.promote_types(wide, cls.dtype) != wide:
        return Reason("DTYPE", f"the CLS token is {cls.dtype}, everything else is narrower")
    return plain_tensors(pixels, cls, positions)


def _own_positions(self: nn.Module, kind: _Kind, parts: _Parts, pixels: Tensor, interpolate: bool = False) -> bool:
    """Whether the image gets the positions as they are, if there are some."""
    size = tuple(pixels.shape[2:])
    if parts.n is None:
        return True
    if patches_in(pixels, parts.conv) != parts.n:
        return False
    if interpolate or kind.size == "square":
        elsewhere = "interpolate_pos_encoding" in self.__dict__ or type(self).interpolate_pos_encoding.__module__ != type(self).forward.__module__
        return size[0] == size[1] and not elsewhere
    return kind.size == "any" or size == parts.size


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _embed(pixels: Tensor, conv: nn.Conv2d, options: Options, cls: Tensor | None = None, positions: Tensor | None = None, norm=None) -> Tensor:
    """pixels (images, C, H, W)  ->  tokens (images, n, D)."""
    if pixels.dtype != torch.uint8 and pixels.dtype not in DTYPES:
        pixels = pixels.to(conv.weight.dtype)
    tokens = patch_embed(whole_patches(pixels, conv), conv.weight, cls, local_pos=positions, bias=conv.bias, norm=norm, backend=options.named())
    return asking_for_grad(tokens, conv)


def _clip_parts(self: nn.Module) -> _Parts:
    """CLIP's, and SigLIP's, which has no CLS token."""
    conv, cls = self.patch_embedding, getattr(self, "class_embedding", None)
    n = self.position_ids.numel() - (cls is not None)
    size = getattr(self, "image_size", math.isqrt(n) * conv.weight.shape[2])
    return _Parts(conv, _pair(size), n, cls, self.position_embedding.weight)


def _clip(self: nn.Module, parts: _Parts, pixels: Tensor, options: Options) -> Tensor:
    # Called, not read: it may be wrapped or hooked, and the order is that of its ids.
    return _embed(pixels, parts.conv, options, parts.cls, self.position_embedding(self.position_ids).flatten(0, -2))


def _vit_child(self: nn.Module) -> Reason | None:
    child = self.patch_embeddings
    expected = _forward_of(type(self)).replace("Embeddings", "PatchEmbeddings")
    if rebound(child) or _forward_of(type(child)) != expected or not type(child).forward.__module__.startswith("transformers."):
        return Reason("CHILD_TYPE", f"{type(child).__name__} in place of transformers' own")
    if hooked(child) and not only_asks_for_grad(child):
        return Reason("HOOKED", f"a hook on {type(child).__name__} must run")
    return None


def _vit_parts(self: nn.Module) -> _Parts:
    child, positions = self.patch_embeddings, self.position_embeddings  # BEiT may have no positions
    size = _pair(getattr(self, "image_size", child.image_size))
    return _Parts(child.projection, size, None if positions is None else positions.shape[1] - 1, self.cls_token, positions)


def _vit(self: nn.Module, parts: _Parts, pixels: Tensor, options: Options) -> Tensor | Reason:
    """ViT and DINOv2, which has register tokens or not."""
    child, (conv, _, _, cls, positions) = self.patch_embeddings, parts
    if cls.shape != (1, 1, conv.out_channels) or pixels.shape[1] != child.num_channels:
        return Reason("SHAPE", "the CLS token or the channels are not what the configuration says")
    tokens = asking_for_grad(_embed(pixels, conv, options, cls[0, 0], None if positions is None else positions[0]), child)
    if hasattr(self, "register_tokens"):
        tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(tokens.shape[0], -1, -1), tokens[:, 1:]], 1)
    return self.dropout(tokens)


def _timm_layout(self: nn.Module) -> Reason | None:
    if self.flatten or self.output_fmt == "NLC":
        return None
    layout = getattr(self.output_fmt, "value", self.output_fmt)
    return Reason("LAYOUT", f"its patches stay {layout}, as with flatten=False or dynamic_img_size: the op gives (images, patches, channels)")


def _timm_parts(self: nn.Module) -> _Parts:
    ph, pw = self.proj.weight.shape[2:]
    return _Parts(self.proj, (2 * ph, 2 * pw) if self.img_size is None else tuple(self.img_size))


def _timm(self: nn.Module, parts: _Parts, pixels: Tensor, options: Options) -> Tensor | Reason:
    conv, norm = parts.conv, self.norm
    size, (ph, pw) = tuple(pixels.shape[2:]), conv.weight.shape[2:]
    strict = self.img_size is not None and self.strict_img_size
    if strict and size != tuple(self.img_size):
        return Reason("SIZE", "the image has not the size that is checked for")
    if (size[0] % ph or size[1] % pw) and (self.dynamic_img_pad or not (strict or self.img_size is None)):
        return Reason("SIZE", "the image is padded to whole patches, or refused")
    affine = _affine(norm, pixels, conv)
    tokens = _embed(pixels, conv, options, norm=affine)
    return norm(tokens) if affine is None else tokens


def _affine(norm: nn.Module, pixels: Tensor, conv: nn.Conv2d) -> tuple[Tensor | None, Tensor | None, float] | None:
    """What the op needs of the norm to swallow it; None where it is called after the op."""
    if plain(norm, nn.LayerNorm) is not None or norm.normalized_shape != (conv.out_channels,) or autocast_dtype(pixels.device) is not None:
        return None
    alike = all(t is None or (t.dtype == conv.weight.dtype and t.device == pixels.device) for t in (norm.weight, norm.bias))
    return (norm.weight, norm.bias, norm.eps) if alike else None


def _made_of(children: set[str], parameters: set[str], optional: tuple[str, ...] = (), attributes: tuple[str, ...] = ()) -> Callable[[nn.Module], bool]:
    """Recognises a module with just these parts: with another one it would be another formula."""

    def matches(module: nn.Module) -> bool:
        parametrized = set(module._modules.get("parametrizations", ()))  # parameters all the same, made of others
        names = parametrized.union(module._parameters).difference(optional)
        return set(module._modules) - {"parametrizations"} == children and names == parameters and all(hasattr(module, name) for name in attributes)

    return matches


def _front(
    kinds: dict[str, _Kind],
    conv: str,
    read: Callable[[nn.Module], _Parts],
    embed: Callable[[nn.Module, _Parts, Tensor, Options], Tensor | Reason],
    unfit: Callable[[nn.Module], Reason | None] = nothing,
    child: Callable[[nn.Module], Reason | None] = nothing,
    steps: int = 2,
    **how: Any,
) -> Host:
    """conv: the name of its convolution.  read: its parts.  embed: what it makes of pixels that are fit for it.  unfit: why no call of the module would be
    fused.  child: why one has to be called, beside the convolution.  steps: as Probe's."""
    x = how["takes"][0]

    def refuses(module: nn.Module, options: Options) -> Reason | None:
        if _forward_of(type(module)) not in kinds:
            return Reason("UNKNOWN_FORWARD", "built like a front end that fastfuse knows, with another forward")
        return unfit(module)

    def obstacle(module: nn.Module) -> Reason | None:
        return child(module) or convolution(module.get_submodule(conv))  # no parts are read, which may be parametrized: for a report

    def fused(module: nn.Module, arguments: Arguments, options: Options) -> Tensor | Reason:
        if reason := refuses(module, options) or child(module):
            return reason
        kind, parts, pixels = kinds[_forward_of(type(module))], read(module), arguments.get(x)
        if reason := convolution(parts.conv) or _unfit(pixels, kind.casts, parts):
            return reason
        if not _own_positions(module, kind, parts, pixels, arguments.get("interpolate_pos_encoding")):
            return Reason("INTERPOLATE", "the image has not the size that the positions are for")
        return embed(module, parts, pixels, options)

    def probe(module: nn.Module) -> Probe | None:
        """Two random images; None where such images have no positions of their own, or no values."""
        parts = read(module)
        weight = parts.conv.weight
        (pixels,) = random_like(weight, (2, weight.shape[1], *parts.size))
        fits = not weight.is_meta and _own_positions(module, kinds[_forward_of(type(module))], parts, pixels)
        return Probe({x: pixels}, weight.dtype, weight[0].numel(), steps) if fits else None

    def rehearse(module: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason | None:
        if (probed := probe(module)) is None:
            return None
        two = probed.arguments[x]
        images = -(-sizes.tokens // patches_in(two, read(module).conv))
        out = fused(module, {x: two.new_zeros(images, *two.shape[1:])}, options)
        return out if type(out) is Reason else (out, [])

    names = tuple(key.removesuffix(".forward") for key in kinds)
    how |= {"refuses": refuses, "obstacle": obstacle, "fused": fused, "probe": probe, "rehearse": rehearse}
    return Host(op="patch_embed", kernels="patch_embed", classes=names, **how)


def _listed(kinds: dict[str, _Kind]) -> str:
    """The models whose front ends these are."""
    return "front ends of " + ", ".join(sorted({key.removesuffix("Embeddings.forward").removesuffix("Vision") for key in kinds}))


_HF = {"written_by": "transformers.", "takes": ("pixel_values",), "ignores": ("interpolate_pos_encoding",)}
_CLIP_PARTS = ("patch_embedding.weight", "position_embedding.weight", "position_ids", "interpolate_pos_encoding")
_TIMM_PARTS = ("proj.weight", "norm", "img_size", "strict_img_size", "dynamic_img_pad", "flatten", "output_fmt")

HOSTS = (
    *(
        _front(
            kinds, "patch_embedding", _clip_parts, _clip, name=f"transformers {name}", parts=(*_CLIP_PARTS, *cls), modules=_listed(kinds),
            matches=_made_of({"patch_embedding", "position_embedding"}, set(cls), attributes=("position_ids",)), covers="images of the model's own size", **_HF,
        )
        for name, kinds, cls in (("CLIP", _CLIP, ("class_embedding",)), ("SigLIP", _SIGLIP, ()))
    ),
    _front(
        _VIT, "patch_embeddings.projection", _vit_parts, _vit, child=_vit_child, name="transformers ViT", modules=_listed(_VIT),
        parts=("patch_embeddings.projection.weight", "patch_embeddings.num_channels", "patch_embeddings.image_size", "cls_token", "position_embeddings",
               "dropout", "interpolate_pos_encoding"),
        matches=_made_of({"patch_embeddings", "dropout"}, {"cls_token"}, ("position_embeddings", "mask_token", "register_tokens")),
        covers="images of the model's own size, no masked patches", **_HF,
    ),
    _front(
        _TIMM, "proj", _timm_parts, _timm, _timm_layout, steps=3, name="timm", written_by="timm.", parts=_TIMM_PARTS, takes=("x",), modules="`PatchEmbed`",
        matches=_made_of({"proj", "norm"}, set(), attributes=_TIMM_PARTS[2:]), covers="patches as rows, with its norm; not padded ones",
    ),
)  # fmt: skip
