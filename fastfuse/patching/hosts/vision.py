"""Generic ViT front ends: what transformers' CLIP, SigLIP and DINOv2 families do to pixels, and timm's PatchEmbed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastfuse.ops.patch_embed import DTYPES, patch_embed
from fastfuse.patching.hosts._host import (
    Host,
    Options,
    Probe,
    Reason,
    Rehearsed,
    Sizes,
    autocast_dtype,
    device_of,
    hooked,
    on_device,
    only_asks_for_grad,
    patches_side_by_side,
    plain,
    plain_tensors,
    rebound,
)


class _Kind(NamedTuple):
    """In what forwards of modules with the same parts differ."""

    casts: bool  # pixels to the convolution's dtype; elsewhere another dtype is the forward's own error
    size: str  # "any", "own": another image size is the forward's own error, "square": for any other image positions are interpolated


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


_UNKNOWN = Reason("UNKNOWN_FORWARD", "built like a front end that fastfuse knows, with another forward")
_ELSEWHERE = Reason("INTERPOLATE", "the image has not the size that the positions are for")


def _convolution(conv: nn.Module) -> Reason | None:
    """Why its product cannot be the op's; None where it maps patches that lie side by side by one matrix."""
    found = plain(conv, nn.Conv2d, only_asks_for_grad(conv))
    if found is not None:
        return found
    return patches_side_by_side(conv)


def _patches(pixels: Tensor, conv: nn.Conv2d) -> int:
    return pixels.shape[2] // conv.weight.shape[2] * (pixels.shape[3] // conv.weight.shape[3])


def _unfit(pixels: Any, conv: nn.Conv2d, casts: bool, cls: Tensor | None = None, positions: Tensor | None = None) -> Reason | None:
    """Why the op would not give what the module's own forward makes of these pixels, be it an error."""
    if not isinstance(pixels, Tensor):
        return Reason("ARGUMENTS", "called with something else than one tensor")
    if pixels.dim() != 4 or pixels.shape[1] != conv.weight.shape[1] or _patches(pixels, conv) == 0:
        return Reason("SHAPE", "the pixels are not (images, channels, height, width) with room for a patch")
    if any(t is not None and t.device != pixels.device for t in (conv.weight, cls, positions)):
        return Reason("DEVICE", "pixels and weights are on several devices")
    autocast, weight = autocast_dtype(pixels), conv.weight.dtype
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


def _own_positions(self: nn.Module, kind: _Kind, pixels: Tensor, interpolate: bool) -> bool:
    """Whether an image with as many patches as there are positions gets these as they are."""
    size = tuple(pixels.shape[2:])
    if interpolate or kind.size == "square":
        elsewhere = "interpolate_pos_encoding" in self.__dict__ or type(self).interpolate_pos_encoding.__module__ != type(self).forward.__module__
        return size[0] == size[1] and not elsewhere
    return kind.size == "any" or size == _pair(self.image_size)


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _embed(pixels: Tensor, conv: nn.Conv2d, options: Options, asked: bool, cls: Tensor | None = None, positions: Tensor | None = None, norm=None) -> Tensor:
    """pixels (images, C, H, W)  ->  tokens (images, n, D), which require grad where a hook on what the op swallows `asked` for it."""
    (ph, pw), (H, W) = conv.weight.shape[2:], pixels.shape[2:]
    if H % ph or W % pw:  # SigLIP's 384 pixels are 27 patches of 14 and a rest, which a convolution leaves out
        pixels = pixels[..., : H // ph * ph, : W // pw * pw]
    if pixels.dtype != torch.uint8 and pixels.dtype not in DTYPES:
        pixels = pixels.to(conv.weight.dtype)
    tokens = patch_embed(pixels, conv.weight, cls, local_pos=positions, bias=conv.bias, norm=norm, backend=options.named())
    if asked and torch.is_grad_enabled() and not tokens.requires_grad:
        tokens.requires_grad_(True)
    return tokens


def _clip_obstacle(self: nn.Module, options: Options) -> Reason | None:
    return _convolution(self.patch_embedding)


def _clip(self: nn.Module, given: dict[str, Any], options: Options) -> Tensor | Reason:
    """CLIP, and SigLIP, which has no CLS token."""
    kind, pixels = _KINDS.get(_forward_of(type(self))), given.get("pixel_values")
    conv, cls = self.patch_embedding, getattr(self, "class_embedding", None)
    if kind is None:
        return _UNKNOWN
    if found := _convolution(conv) or _unfit(pixels, conv, kind.casts, cls, self.position_embedding.weight):
        return found
    n = _patches(pixels, conv) + (cls is not None)
    if self.position_ids.shape != (1, n) or not _own_positions(self, kind, pixels, given.get("interpolate_pos_encoding")):
        return _ELSEWHERE
    # Called, not read: it may be wrapped or hooked, and the order is that of its ids.
    positions = self.position_embedding(self.position_ids)[0]
    return _embed(pixels, conv, options, only_asks_for_grad(conv), cls, positions)


def _clip_probe(self: nn.Module) -> Probe | None:
    conv, n = self.patch_embedding, self.position_ids.shape[-1] - hasattr(self, "class_embedding")
    return _probe(conv, "pixel_values", _pair(getattr(self, "image_size", math.isqrt(n) * conv.weight.shape[2])), n)


def _vit_obstacle(self: nn.Module, options: Options) -> Reason | None:
    child = self.patch_embeddings
    expected = _forward_of(type(self)).replace("Embeddings", "PatchEmbeddings")
    if rebound(child) or _forward_of(type(child)) != expected or not type(child).forward.__module__.startswith("transformers."):
        return Reason("CHILD_TYPE", f"{type(child).__name__} in place of transformers' own")
    if hooked(child) and not only_asks_for_grad(child):
        return Reason("HOOKED", f"a hook on {type(child).__name__} must run")
    return _convolution(child.projection)


def _vit(self: nn.Module, given: dict[str, Any], options: Options) -> Tensor | Reason:
    """ViT and DINOv2, which has register tokens or not."""
    kind, pixels = _KINDS.get(_forward_of(type(self))), given.get("pixel_values")
    child, cls, positions = self.patch_embeddings, self.cls_token, self.position_embeddings
    if kind is None:
        return _UNKNOWN
    if found := _vit_obstacle(self, options) or _unfit(pixels, child.projection, kind.casts, cls, positions):
        return found
    conv = child.projection
    D = conv.weight.shape[0]
    if cls.shape != (1, 1, D) or pixels.shape[1] != child.num_channels:
        return Reason("SHAPE", "the CLS token or the channels are not what the configuration says")
    if positions is not None:  # BEiT may have none
        if positions.shape != (1, _patches(pixels, conv) + 1, D) or not _own_positions(self, kind, pixels, given.get("interpolate_pos_encoding")):
            return _ELSEWHERE
        positions = positions[0]
    tokens = _embed(pixels, conv, options, only_asks_for_grad(conv) or only_asks_for_grad(child), cls[0, 0], positions)
    if hasattr(self, "register_tokens"):
        tokens = torch.cat([tokens[:, :1], self.register_tokens.expand(tokens.shape[0], -1, -1), tokens[:, 1:]], 1)
    return self.dropout(tokens)


def _vit_probe(self: nn.Module) -> Probe | None:
    child, positions = self.patch_embeddings, self.position_embeddings
    if child.image_size[0] != child.image_size[1] and _KINDS[_forward_of(type(self))].size == "square":
        return None
    return _probe(child.projection, "pixel_values", _pair(child.image_size), None if positions is None else positions.shape[1] - 1)


def _timm_layout(self: nn.Module) -> Reason | None:
    if self.flatten or self.output_fmt == "NLC":
        return None
    layout = getattr(self.output_fmt, "value", self.output_fmt)
    return Reason("LAYOUT", f"its patches stay {layout}, as with flatten=False or dynamic_img_size: the op gives (images, patches, channels)")


def _timm_obstacle(self: nn.Module, options: Options) -> Reason | None:
    return _timm_layout(self) or _convolution(self.proj)


def _timm(self: nn.Module, given: dict[str, Any], options: Options) -> Tensor | Reason:
    kind, conv, norm, pixels = _KINDS.get(_forward_of(type(self))), self.proj, self.norm, given.get("x")
    if kind is None:
        return _UNKNOWN
    if found := _timm_obstacle(self, options) or _unfit(pixels, conv, kind.casts):
        return found
    size, (ph, pw) = tuple(pixels.shape[2:]), conv.weight.shape[2:]
    strict = self.img_size is not None and self.strict_img_size
    if strict and size != tuple(self.img_size):
        return Reason("SIZE", "the image has not the size that is checked for")
    if (size[0] % ph or size[1] % pw) and (self.dynamic_img_pad or not (strict or self.img_size is None)):
        return Reason("SIZE", "the image is padded to whole patches, or refused")
    affine = _affine(norm, pixels, conv)
    tokens = _embed(pixels, conv, options, only_asks_for_grad(conv), norm=affine)
    return tokens if affine is not None else norm(tokens)


def _affine(norm: nn.Module, pixels: Tensor, conv: nn.Conv2d) -> tuple[Tensor | None, Tensor | None, float] | None:
    """What the op needs of the norm to swallow it; None where it is called after the op."""
    if type(norm) is not nn.LayerNorm or plain(norm, nn.LayerNorm) is not None or autocast_dtype(pixels) is not None:
        return None
    alike = all(t is None or (t.dtype == conv.weight.dtype and t.device == pixels.device) for t in (norm.weight, norm.bias))
    return (norm.weight, norm.bias, norm.eps) if alike and norm.normalized_shape == (conv.weight.shape[0],) else None


def _timm_probe(self: nn.Module) -> Probe | None:
    ph, pw = self.proj.weight.shape[2:]
    return _probe(self.proj, "x", (2 * ph, 2 * pw) if self.img_size is None else tuple(self.img_size), steps=3)


def _probe(conv: nn.Conv2d, x: str, size: tuple[int, int], n: int | None = None, steps: int = 2) -> Probe | None:
    """Two random images; None where such images have not n patches, or no values."""
    weight = conv.weight
    made = torch.randn(2, weight.shape[1], *size, generator=torch.Generator().manual_seed(0))
    if weight.device.type == "meta" or n not in (None, _patches(made, conv)):
        return None
    return Probe({x: made.to(weight.device, weight.dtype)}, weight.dtype, weight[0].numel(), steps)


def _made_of(children: set[str], parameters: set[str], optional: tuple[str, ...] = (), attributes: tuple[str, ...] = ()) -> Callable[[nn.Module], bool]:
    """Recognises a module with just these parts: with another one it would be another formula."""

    def matches(module: nn.Module) -> bool:
        made = set(module._modules.get("parametrizations", ()))  # parameters all the same, made of others
        given = made.union(module._parameters).difference(optional)
        return set(module._modules) - {"parametrizations"} == children and given == parameters and all(hasattr(module, name) for name in attributes)

    return matches


def _front(kinds: dict[str, _Kind], conv: Callable[[nn.Module], nn.Conv2d], unfit: Callable[[nn.Module], Reason | None] = lambda module: None, **how) -> Host:
    """unfit: why no call of the module would be fused."""

    def refuses(module: nn.Module, options: Options) -> Reason | None:
        found = _UNKNOWN if _forward_of(type(module)) not in kinds else unfit(module)
        return found or on_device("patch_embed", device_of(conv(module)), options)

    def rehearse(module: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason | None:
        probe = how["probe"](module)
        if probe is None:
            return None
        ((name, two),) = probe.given.items()
        images = -(-sizes.tokens // _patches(two, conv(module)))
        out = how["fused"](module, {name: two.new_zeros(images, *two.shape[1:])}, options)
        return out if type(out) is Reason else (out, [])

    names = tuple(key.removesuffix(".forward") for key in kinds)
    return Host(op="patch_embed", classes=names, refuses=refuses, rehearse=rehearse, device=lambda module: device_of(conv(module)), **how)


def _listed(kinds: dict[str, _Kind]) -> str:
    """The models whose front ends these are."""
    return "front ends of " + ", ".join(sorted({key.removesuffix("Embeddings.forward").removesuffix("Vision") for key in kinds}))


_HF = {"written_by": "transformers.", "takes": ("pixel_values",), "ignores": ("interpolate_pos_encoding",)}
_CLIP_PARTS = ("patch_embedding.weight", "position_embedding.weight", "position_ids", "interpolate_pos_encoding")
_VIT_CHILD = tuple(f"patch_embeddings.{name}" for name in ("projection.weight", "num_channels", "image_size"))
_VIT_PARTS = (*_VIT_CHILD, "cls_token", "position_embeddings", "dropout", "interpolate_pos_encoding")
_TIMM_PARTS = ("proj.weight", "norm", "img_size", "strict_img_size", "dynamic_img_pad", "flatten", "output_fmt")

HOSTS = (
    _front(
        _CLIP, name="transformers CLIP", parts=(*_CLIP_PARTS, "class_embedding"), conv=lambda module: module.patch_embedding,
        matches=_made_of({"patch_embedding", "position_embedding"}, {"class_embedding"}, attributes=("position_ids",)),
        fused=_clip, obstacle=_clip_obstacle, probe=_clip_probe, modules=_listed(_CLIP), covers="images of the model's own size", **_HF,
    ),
    _front(
        _SIGLIP, name="transformers SigLIP", parts=_CLIP_PARTS, conv=lambda module: module.patch_embedding,
        matches=_made_of({"patch_embedding", "position_embedding"}, set(), attributes=("position_ids",)),
        fused=_clip, obstacle=_clip_obstacle, probe=_clip_probe, modules=_listed(_SIGLIP), covers="images of the model's own size", **_HF,
    ),
    _front(
        _VIT, name="transformers ViT", parts=_VIT_PARTS, conv=lambda module: module.patch_embeddings.projection,
        matches=_made_of({"patch_embeddings", "dropout"}, {"cls_token"}, ("position_embeddings", "mask_token", "register_tokens")),
        fused=_vit, obstacle=_vit_obstacle, probe=_vit_probe, modules=_listed(_VIT), covers="images of the model's own size, no masked patches", **_HF,
    ),
    _front(
        _TIMM, name="timm", written_by="timm.", parts=_TIMM_PARTS, takes=("x",), conv=lambda module: module.proj,
        matches=_made_of({"proj", "norm"}, set(), attributes=_TIMM_PARTS[2:]), unfit=_timm_layout, fused=_timm, obstacle=_timm_obstacle,
        probe=_timm_probe,
        modules="`PatchEmbed`", covers="patches as rows, with its norm; not padded ones",
    ),
)  # fmt: skip
