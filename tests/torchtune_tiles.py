"""torchtune's scheme of placing tiles: a Python loop over the images, each read on the host and added in place to its slice of x.

It is the eager side of patch_embed's tests, in whatever dtype it is given, and what grows with the square of the number of
images: the backward of every slice add copies the gradient of all of x.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def place_images(x: Tensor, table: Tensor, gate: Tensor | None, aspect_ratio: Tensor) -> Tensor:
    """x [images, tiles, n, d], written: tile r * w + c of an image of h x w tiles += tanh(gate) * table[r, c]."""
    for image, (h, w) in enumerate(aspect_ratio):
        tiles = h * w
        if tiles:
            entry = table[:h, :w].reshape(tiles, *table.shape[2:])
            x[image, :tiles] += entry if gate is None else entry * gate.tanh()
    return x


def place_ids(x: Tensor, table: Tensor, gate: Tensor | None, ids: Tensor) -> Tensor:
    """x, written: tile i of an image += tanh(gate) * table[its id, i], whether the image reaches so far or not."""
    for image, row in enumerate(ids):
        entry = table[row, : x.shape[1]]
        x[image] += entry if gate is None else entry * gate.tanh()
    return x


def pixels_as(images: Tensor, weight: Tensor, scale, shift) -> Tensor:
    """pixel * scale + shift, in fp32 at least, then weight's dtype."""
    if scale is not None or shift is not None:
        images = images.to(torch.promote_types(weight.dtype, torch.float32))
        for values, combine in ((scale, torch.mul), (shift, torch.add)):
            if values is not None:
                images = combine(images, torch.tensor(values, dtype=images.dtype, device=images.device).view(-1, 1, 1))
    return images.to(weight.dtype)


def patch_embed(
    images, weight, cls=None, aspect_ratio=None, local_pos=None, global_pos=None, gate=None, pre_pos=None, pre_gate=None,
    *, bias=None, norm=None, append_cls=False, scale=None, shift=None, pad_tokens_to=1,
):  # fmt: skip
    """The arguments of fastfuse.ops.patch_embed; every step rounds to the dtype it is in."""
    lead, (n_tiles, *_) = images.shape[:-4], images.shape[-4:]
    x = pixels_as(images, weight, scale, shift).reshape(-1, *images.shape[-3:])
    x = F.conv2d(x, weight, None if bias is None else bias.to(weight.dtype), stride=weight.shape[2:])
    x = x.flatten(2).transpose(1, 2).unflatten(0, (lead.numel(), n_tiles)).clone()
    place = place_images
    if aspect_ratio is None:
        aspect_ratio = torch.ones(lead.numel(), 2, dtype=torch.int64, device=images.device)
    elif aspect_ratio.dim() == len(lead):
        aspect_ratio, place = aspect_ratio.reshape(-1), place_ids
    aspect_ratio = aspect_ratio.reshape(lead.numel(), -1) if place is place_images else aspect_ratio
    if pre_pos is not None:
        x = place(x, pre_pos, pre_gate, aspect_ratio)
    if cls is not None:
        token = cls.to(x.dtype).expand(*x.shape[:2], 1, -1)
        x = torch.cat([x, token] if append_cls else [token, x], 2)
    if local_pos is not None:
        x = x + (local_pos if gate is None else local_pos * (1 - gate.tanh()))
    if global_pos is not None:
        x = place(x.to(torch.promote_types(x.dtype, global_pos.dtype), copy=True), global_pos, gate, aspect_ratio)
    if norm is not None:
        dtype, wide = x.dtype, torch.promote_types(x.dtype, torch.float32)
        w, b = (None if t is None else t.to(wide) for t in norm[:2])
        x = F.layer_norm(x.to(wide), x.shape[-1:], w, b, norm[2]).to(dtype)
    x = F.pad(x, (0, 0, 0, -x.shape[2] % pad_tokens_to))
    return x.view(*lead, *x.shape[1:])
