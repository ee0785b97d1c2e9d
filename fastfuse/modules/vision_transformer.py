"""A vision transformer over tiles of images (https://arxiv.org/abs/2010.11929)."""

import copy
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn import functional as F

from fastfuse.modules._hooks import is_hooked
from fastfuse.modules.layer_norm import Fp32LayerNorm
from fastfuse.modules.position_embeddings import patch_grid
from fastfuse.modules.tile_position_embeddings import TiledTokenPositionalEmbedding, TilePositionalEmbedding, TokenPositionalEmbedding
from fastfuse.ops import patch_embed
from fastfuse.ops._device_checks import values_are_at_hand
from fastfuse.ops._op import forward_mode, transformed


class CLSEmbedding(nn.Module):
    """Puts a learned token, weight (embed_dim,), before the tokens of every tile, or after them."""

    def __init__(self, embed_dim: int, append_cls_token: bool = False):
        super().__init__()
        self.weight = nn.Parameter(embed_dim**-0.5 * torch.randn(embed_dim))
        self.append_cls_token = append_cls_token

    def forward(self, x: Tensor) -> Tensor:
        """[images, n_tiles, n_tokens, embed_dim] -> [images, n_tiles, n_tokens + 1, embed_dim]"""
        cls = self.weight.to(x.dtype).expand(*x.shape[:2], 1, -1)
        return torch.cat([x, cls] if self.append_cls_token else [cls, x], 2)


class CLSProjection(nn.Module):
    """token 0 @ weight, weight (embed_dim, cls_output_dim). It reads token 0 also where the CLS token is the last."""

    def __init__(self, embed_dim: int, cls_output_dim: int):
        super().__init__()
        self.cls_output_dim = cls_output_dim
        self.weight = nn.Parameter(embed_dim**-0.5 * torch.randn(embed_dim, cls_output_dim))

    def forward(self, x: Tensor) -> Tensor:
        """[b, n_imgs, n_tiles, n_tokens, embed_dim] -> [b, n_imgs, n_tiles, 1, cls_output_dim]"""
        return x[:, :, :, :1] @ self.weight


class Encoded(NamedTuple):
    """What VisionTransformer.encode gives: x still padded to pad_tokens_to, hidden states without padding, the attention mask."""

    x: Tensor
    hidden_states: list[Tensor]
    mask: Tensor | None


class VisionTransformer(nn.Module):
    """Patches of all tiles of an image as one sequence, through num_layers copies of `layer`.

    A convolution makes patches, pre_tile_pos_embed, a CLS token per tile and token_pos_embedding place them; after the
    layers come ln_post, post_tile_pos_embed and cls_projection. Without tile embeddings every tile is placed alike.
    patch_size, tile_size: pixels. layer: called with x [images, tokens, embed_dim] (and mask=, see below), copied, so that
    all layers start equal. out_indices: hidden states to return, k for the input of layer k, num_layers for the last
    output. append_cls_token: CLS after the patches.
    pad_tokens_to: zero tokens fill each tile up to a multiple, and layers get a mask that hides padding tokens and
    tiles from each other alone, as Meta and transformers do; 1 (torchtune) neither fills nor masks. states_after_layer:
    index k stands for the output of layer k, as in transformers 5.
    Raises ValueError for sizes that are not positive, or more out_indices than layers.
    """

    def __init__(
        self,
        patch_size: int,
        tile_size: int,
        num_layers: int,
        embed_dim: int,
        layer: nn.Module,
        token_pos_embedding: nn.Module,
        pre_tile_pos_embed: nn.Module | None = None,
        post_tile_pos_embed: nn.Module | None = None,
        cls_projection: nn.Module | None = None,
        out_indices: list[int] | None = None,
        in_channels: int = 3,
        append_cls_token: bool = False,
        *,
        pad_tokens_to: int = 1,
        states_after_layer: bool = False,
    ):
        super().__init__()
        self.patches_per_tile = patch_grid(tile_size, patch_size) ** 2
        if out_indices and len(out_indices) > num_layers:
            raise ValueError(f"len(out_indices) must be <= num_layers. Got out_indices={out_indices} and num_layers={num_layers}")
        if pad_tokens_to < 1:
            raise ValueError(f"pad_tokens_to must be >= 1. Got pad_tokens_to={pad_tokens_to}")
        self.tile_size = tile_size
        self.in_channels = in_channels
        self.out_indices = out_indices or []
        self.pad_tokens_to = pad_tokens_to
        self.states_after_layer = states_after_layer
        self.pre_tile_pos_embed = pre_tile_pos_embed
        self.post_tile_pos_embed = post_tile_pos_embed
        self.token_pos_embedding = token_pos_embedding
        self.cls_projection = cls_projection
        self.layers = nn.ModuleList([copy.deepcopy(layer) for _ in range(num_layers)])
        self.conv = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size, bias=False)
        self.ln_post = Fp32LayerNorm(embed_dim)
        self.ln_pre = Fp32LayerNorm(embed_dim)
        self.cls_token_embedding = CLSEmbedding(embed_dim, append_cls_token)

    def get_image_tokens_per_tile(self) -> int:
        """Patches and the CLS token."""
        return self.patches_per_tile + 1

    def forward(self, images: Tensor, aspect_ratio: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """images: [b, n_imgs, n_tiles, c, tile_size, tile_size], aspect_ratio: int [b, n_imgs, 2], or [b, 2] of one
        image each, tiles (h, w); padding tiles come last.

        Returns (x, hidden_states), each [b, n_imgs, n_tiles, n_tokens, embed_dim]; x is [b, n_imgs, n_tiles, 1, cls_output_dim]
        with cls_projection. Without tile embeddings aspect_ratio may be None; with them None stands for (1, 1).
        Raises ValueError where aspect_ratio is None, n_tiles > 1 and tiles are to be placed, or where shapes disagree.
        """
        x, hidden_states, _ = self.encode(images, aspect_ratio)
        x = x[:, :, :, : self.get_image_tokens_per_tile()]
        if self.cls_projection is not None:
            x = self.cls_projection(x)
        return x, hidden_states

    def encode(self, images: Tensor, aspect_ratio: Tensor | None = None) -> Encoded:
        """forward without cls_projection and with the padding tokens of pad_tokens_to, for an encoder that goes on from there."""
        if images.dim() != 6 or images.shape[3:] != (self.in_channels, self.tile_size, self.tile_size):
            tile = f"{self.in_channels}, {self.tile_size}, {self.tile_size}"
            raise ValueError(f"images has shape {tuple(images.shape)}, expected (b, n_imgs, n_tiles, {tile})")
        b, n_imgs = images.shape[:2]
        aspect_ratio = self._ratios(images, aspect_ratio)
        images = images.flatten(0, 1)
        x = self._fused_embedding(images, aspect_ratio) if self._is_plain() else self._embedding(images, aspect_ratio)
        n_tokens = self.get_image_tokens_per_tile()
        mask = None if self.pad_tokens_to == 1 else self._mask(x, n_tokens, aspect_ratio)
        x, hidden_states = run_layers(self, x, mask, self.states_after_layer)
        if self.post_tile_pos_embed is not None:
            x = self.post_tile_pos_embed(x, aspect_ratio)
        hidden_states = [h.unflatten(0, (b, n_imgs))[:, :, :, :n_tokens] for h in hidden_states]
        return Encoded(x.unflatten(0, (b, n_imgs)), hidden_states, mask)

    def _ratios(self, images: Tensor, aspect_ratio: Tensor | None) -> Tensor | None:
        """int [b * n_imgs, 2], or None where nothing depends on it."""
        b, n_imgs, n_tiles = images.shape[:3]
        tiled = self.pre_tile_pos_embed is not None or self.post_tile_pos_embed is not None or hasattr(self.token_pos_embedding, "max_num_tiles")
        if aspect_ratio is not None:
            if aspect_ratio.shape != (b, n_imgs, 2) and not (n_imgs == 1 and aspect_ratio.shape == (b, 2)):
                raise ValueError(f"aspect_ratio has shape {tuple(aspect_ratio.shape)}, images {tuple(images.shape)} need {(b, n_imgs, 2)}")
            aspect_ratio = aspect_ratio.reshape(-1, 2)
            if aspect_ratio.device != images.device and values_are_at_hand(aspect_ratio):
                for table in (self.pre_tile_pos_embed, self.token_pos_embedding, self.post_tile_pos_embed):
                    if isinstance(table, (TilePositionalEmbedding, TiledTokenPositionalEmbedding)):
                        table._check(aspect_ratio, n_tiles)  # a ValueError now is better than an assertion on the device
            return aspect_ratio.to(images.device, non_blocking=True)
        if not tiled:
            return None
        if n_tiles > 1:
            raise ValueError(f"aspect_ratio was not provided, but found n_tiles>1 for images.shape={tuple(images.shape)}. Please provide aspect_ratio.")
        return torch.ones(b * n_imgs, 2, dtype=torch.int64, device=images.device)

    def _embedding(self, images: Tensor, aspect_ratio: Tensor | None) -> Tensor:
        """Placed tokens [images, n_tiles, n_tokens, embed_dim], padded to a multiple of pad_tokens_to, one module after another."""
        x = self.conv(images.flatten(0, 1).to(self.conv.weight.dtype)).flatten(2).transpose(1, 2)
        x = x.unflatten(0, images.shape[:2])
        if self.pre_tile_pos_embed is not None:
            x = self.pre_tile_pos_embed(x, aspect_ratio)
        x = self.ln_pre(self.token_pos_embedding(self.cls_token_embedding(x), aspect_ratio))
        padding = -x.shape[2] % self.pad_tokens_to
        return F.pad(x, (0, 0, 0, padding)) if padding else x

    def _fused_embedding(self, images: Tensor, aspect_ratio: Tensor | None) -> Tensor:
        """_embedding as one op."""
        pre, pos = self.pre_tile_pos_embed, self.token_pos_embedding
        table = pre if pre is not None else pos if isinstance(pos, TiledTokenPositionalEmbedding) else None
        if table is not None and table.aspect_ratios is not None:
            aspect_ratio = table.ids_of(aspect_ratio, images.shape[1])
        if images.dtype not in (torch.uint8, torch.bfloat16, torch.float16, torch.float32):
            images = images.to(self.conv.weight.dtype)
        return place_tokens(self, images, aspect_ratio, self.pad_tokens_to)

    def _is_plain(self) -> bool:
        """Whether the modules in front of the layers are what the op computes: of these classes, without hooks, forwards or sharded weights of their own."""
        conv, pre, pos, norm = self.conv, self.pre_tile_pos_embed, self.token_pos_embedding, self.ln_pre
        parts = [conv, self.cls_token_embedding, norm, pos, *([] if pre is None else [pre])]
        if [type(m) for m in parts[:3]] != [nn.Conv2d, CLSEmbedding, Fp32LayerNorm]:
            return False
        if type(pos) not in (TokenPositionalEmbedding, TiledTokenPositionalEmbedding) or type(pre) not in (type(None), TilePositionalEmbedding):
            return False
        tables = {(m.max_num_tiles, str(m.aspect_ratios)) for m in parts[3:] if not isinstance(m, TokenPositionalEmbedding)}
        if len(tables) > 1 or norm.normalized_shape != (conv.out_channels,):
            return False
        if conv.bias is not None or conv.kernel_size != conv.stride or conv.padding != (0, 0) or conv.dilation != (1, 1) or conv.groups != 1:
            return False
        if any({"forward", "_conv_forward"} & m.__dict__.keys() or is_hooked(m) for m in parts):
            return False
        weights = [p for m in parts for p in m.parameters(recurse=False)]
        if any(type(p) not in (Tensor, nn.Parameter, FakeTensor) or (p.is_cuda and p.dtype == torch.float64) for p in weights):
            return False
        return not forward_mode() and not transformed()

    def _mask(self, x: Tensor, n_tokens: int, aspect_ratio: Tensor | None) -> Tensor:
        """[images, tokens, tokens] over all tiles, 0 or -inf in x's dtype.

        Two tokens that are both padding (of a tile, or in a padding tile) do not see each other; every other pair does.
        """
        n_tiles = x.shape[1]
        real = torch.arange(x.shape[2], device=x.device) < n_tokens
        if aspect_ratio is None:
            valid = real.expand(x.shape[0], n_tiles, -1)
        else:
            # The first tile of a padding image, ratio (0, 0), counts as real: a row of nothing has no softmax.
            tiles = aspect_ratio.prod(-1).clamp(min=1)
            valid = (torch.arange(n_tiles, device=x.device) < tiles[:, None])[:, :, None] & real
        valid = valid.flatten(1)
        # Added to the scores, in their dtype: of a bool mask every layer would make such a tensor for itself, and keep it for its backward.
        mask = torch.zeros(x.shape[0], valid.shape[1], valid.shape[1], dtype=x.dtype, device=x.device)
        return mask.masked_fill_(~(valid[:, :, None] | valid[:, None, :]), -torch.inf)


def place_tokens(front: nn.Module, images: Tensor, aspect_ratio: Tensor | None, pad_tokens_to: int = 1, backend: str | None = None) -> Tensor:
    """What the modules in front of the layers of a vision transformer, torchtune's too, make of images [images, n_tiles, c, h, w], as one op: placed and
    normalised tokens [images, n_tiles, n_tokens, embed_dim]."""
    conv, cls, pre, pos, norm = front.conv, front.cls_token_embedding, front.pre_tile_pos_embed, front.token_pos_embedding, front.ln_pre
    tiled = hasattr(pos, "global_token_positional_embedding")
    h, w = conv.kernel_size
    return patch_embed(
        images[..., : images.shape[-2] // h * h, : images.shape[-1] // w * w],  # as the convolution, which drops what is left over
        conv.weight,
        cls.weight,
        aspect_ratio if tiled or pre is not None else None,
        pos.local_token_positional_embedding if tiled else pos.positional_embedding,
        pos.global_token_positional_embedding if tiled else None,
        pos.gate if tiled else None,
        None if pre is None else pre.embedding,
        None if pre is None else pre.gate,
        norm=(norm.weight, norm.bias, norm.eps),
        append_cls=cls.append_cls_token,
        pad_tokens_to=pad_tokens_to,
        backend=backend,
    )


def run_layers(vit: nn.Module, x: Tensor, mask: Tensor | None = None, after: bool = False) -> tuple[Tensor, list[Tensor]]:
    """x [images, n_tiles, n_tokens, embed_dim] through the layers and ln_post of a vision transformer, torchtune's too, and its hidden states, all of that
    shape. mask: of all tokens of an image, for the layers.  after: whether index k of out_indices stands for the output of layer k."""
    shape, hidden_states = x.shape[1:3], []
    x = x.flatten(1, 2)
    for i, layer in enumerate(vit.layers):
        if i in vit.out_indices and not after:
            hidden_states.append(x)
        x = layer(x) if mask is None else layer(x, mask=mask)
        if i in vit.out_indices and after:
            hidden_states.append(x)
    if len(vit.layers) in vit.out_indices:
        hidden_states.append(x)
    return vit.ln_post(x).unflatten(1, shape), [h.unflatten(1, shape) for h in hidden_states]
