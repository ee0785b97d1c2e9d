"""A patch embedding as a vision transformer's modules hold it, and the ways it is run."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastfuse import ops
from fastfuse.models.llama3_2_vision._component_builders import ASPECT_RATIOS
from fastfuse.modules import CLSEmbedding, Fp32LayerNorm, TiledTokenPositionalEmbedding, TilePositionalEmbedding, TokenPositionalEmbedding
from fastfuse.ops._op import nbytes

MAX_NUM_TILES = 4
# CLIP's normalisation of bytes, as numbers that fp32 holds: op and modules then compute with the same.
_MEAN, _STD = torch.tensor([0.48145466, 0.4578275, 0.40821073]), torch.tensor([0.26862954, 0.26130258, 0.27577711])
SCALE, SHIFT = (1 / (255 * _STD)).tolist(), (-_MEAN / _STD).tolist()


@dataclass(frozen=True)
class Size:
    images: int
    tiles: int = MAX_NUM_TILES  # of an image
    pixels: int = 560  # of a tile's side
    patch: int = 14
    D: int = 1280
    tables: str | None = "grid"  # [T, T, ...] as torchtune has them, "ids" as transformers' Mllama, or none: positions in a tile alone
    norm: bool = False
    pad_tokens_to: int = 1

    @property
    def tokens(self) -> int:
        n = (self.pixels // self.patch) ** 2 + 1
        return -(-n // self.pad_tokens_to) * self.pad_tokens_to

    def __str__(self) -> str:
        notes = [*(["ids"] if self.tables == "ids" else []), *([] if self.tables else ["no tables"]), *(["norm"] if self.norm else [])]
        padded = [f"to {self.tokens}"] if self.pad_tokens_to > 1 else []
        return " ".join([f"{self.images}x{self.tiles} {self.pixels}px P{self.patch} D{self.D}", *notes, *padded])


class Embedding(nn.Module):
    """VisionTransformer from its pixels to its first layer, without ln_pre unless size.norm, of the modules it has for that."""

    def __init__(self, size: Size, dtype: torch.dtype, device: str):
        super().__init__()
        with torch.device(device):
            ratios = ASPECT_RATIOS if size.tables == "ids" else None
            self.conv = nn.Conv2d(3, size.D, size.patch, stride=size.patch, bias=False)
            self.cls = CLSEmbedding(size.D)
            if size.tables:
                self.positions = TiledTokenPositionalEmbedding(MAX_NUM_TILES, size.D, size.pixels, size.patch, aspect_ratios=ratios)
                self.pre = TilePositionalEmbedding(MAX_NUM_TILES, size.D, aspect_ratios=ratios)
                nn.init.constant_(self.positions.gate, 0.5)
                nn.init.constant_(self.pre.gate, -0.75)
            else:
                self.positions, self.pre = TokenPositionalEmbedding(size.D, size.pixels, size.patch), None
            self.norm = Fp32LayerNorm(size.D) if size.norm else None
            self.to(dtype)
            # Not rounded to dtype: pixels are normalised in fp32.
            for name, values in (("scale", SCALE), ("shift", SHIFT)):
                self.register_buffer(name, torch.tensor(values).view(-1, 1, 1))
        self.pad_tokens_to = size.pad_tokens_to

    @property
    def nbytes(self) -> int:
        return nbytes(*self.parameters())

    def double_copy(self) -> "Embedding":
        return copy.deepcopy(self).double()

    def tables(self) -> dict[str, Tensor]:
        """Those of local_pos, global_pos, gate, pre_pos, pre_gate that there are."""
        if self.pre is None:
            return {"local_pos": self.positions.positional_embedding}
        p, pre = self.positions, self.pre
        local, table = p.local_token_positional_embedding, p.global_token_positional_embedding
        return {"local_pos": local, "global_pos": table, "gate": p.gate, "pre_pos": pre.embedding, "pre_gate": pre.gate}

    def patches(self, images: Tensor) -> Tensor:
        """[images, tiles, C, H, W] -> [images, tiles, patches, D]; bytes are normalised."""
        if images.dtype == torch.uint8:
            images = images.to(self.scale.dtype) * self.scale + self.shift
        x = self.conv(images.flatten(0, 1).to(self.conv.weight.dtype))
        return x.flatten(2).transpose(1, 2).unflatten(0, images.shape[:2])

    def finished(self, x: Tensor) -> Tensor:
        x = x if self.norm is None else self.norm(x)
        return F.pad(x, (0, 0, 0, -x.shape[2] % self.pad_tokens_to)) if self.pad_tokens_to > 1 else x


def fused(e: Embedding, images: Tensor, aspect_ratio: Tensor, ids: Tensor | None) -> Tensor:
    norm = None if e.norm is None else (e.norm.weight, e.norm.bias, e.norm.eps)
    numbers = {"scale": SCALE, "shift": SHIFT} if images.dtype == torch.uint8 else {}
    places = aspect_ratio if ids is None else ids
    return ops.patch_embed(images, e.conv.weight, e.cls.weight, places, **e.tables(), norm=norm, pad_tokens_to=e.pad_tokens_to, **numbers)


def eager(e: Embedding, images: Tensor, aspect_ratio: Tensor, ids: Tensor | None) -> Tensor:
    """As VisionTransformer composes its modules."""
    x = e.patches(images)
    if e.pre is not None:
        x = e.pre(x, aspect_ratio)
    return e.finished(e.positions(e.cls(x), aspect_ratio))


def torchtune(e: Embedding, images: Tensor, aspect_ratio: Tensor, ids: Tensor | None) -> Tensor:
    """torchtune's scheme: each image's ratio read on the host, its part of the table added in place to its slice of x.

    The backward of every such slice copies the gradient of all of x: quadratic in the number of images.
    """
    t = e.tables()
    x = e.patches(images)
    _add_to_slices(x, t["pre_pos"], t["pre_gate"], aspect_ratio)
    x = e.cls(x)
    x = x + t["local_pos"] * (1 - t["gate"].tanh())
    _add_to_slices(x, t["global_pos"], t["gate"], aspect_ratio)
    return e.finished(x)


def _add_to_slices(x: Tensor, table: Tensor, gate: Tensor, aspect_ratio: Tensor) -> None:
    for image, (h, w) in enumerate(aspect_ratio):
        x[image, : h * w] += table[:h, :w].reshape(int(h * w), *table.shape[2:]) * gate.tanh()
