"""From an image to normalized tiles, and from image tokens to the mask that says which text sees which image."""

import sys
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastfuse.data.images import find_supported_resolutions, get_canvas_best_fit, resample_mode, resize_with_pad, tile_crop
from fastfuse.data.photos import rgb_on_white
from fastfuse.errors import InvalidArgument


class CLIPImageTransform:
    """Turn one image into normalized tiles [t, 3, tile_size, tile_size] and the aspect ratio of the canvas they tile.

    The image is resized to fit the best canvas, padded below and to the right, normalized and cut.
    image_mean, image_std: one value a channel, both or none; normalization reaches the padding too.
    possible_resolutions: canvases (height, width) in pixels; where None, every canvas of 1 to max_num_tiles tiles.
    tile_size: pixels.  dtype: of the result and of all arithmetic, the resize included.
    resample: as in `resize_with_pad`.  resize_to_max_canvas: enlarge as much as the canvases allow, not up to one tile.
    Raises InvalidArgument (a ValueError and an AssertionError) for arguments that do not fit together.
    """

    def __init__(
        self,
        *,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        possible_resolutions: Sequence[tuple[int, int]] | None = None,
        tile_size: int = 224,
        max_num_tiles: int | None = 4,
        dtype: torch.dtype = torch.bfloat16,
        resample: object = "bilinear",
        resize_to_max_canvas: bool = False,
    ):
        if possible_resolutions is None and max_num_tiles is None:
            raise InvalidArgument(
                f"CLIPImageTransform: needs possible_resolutions or max_num_tiles, has possible_resolutions={possible_resolutions}, max_num_tiles={max_num_tiles}"
            )
        if not dtype.is_floating_point:
            raise InvalidArgument(f"CLIPImageTransform: dtype is {dtype}, not a floating point one")
        if (image_mean is None) != (image_std is None):
            raise InvalidArgument(f"CLIPImageTransform: needs both image_mean and image_std or none, has image_mean={image_mean}, image_std={image_std}")
        for name, values in (("image_mean", image_mean), ("image_std", image_std)):
            if values is not None and len(values) != 3:
                raise InvalidArgument(f"CLIPImageTransform: {name} is {values}, not one value for each of 3 channels")
        if image_std is not None and 0 in torch.tensor(image_std).to(dtype):
            raise InvalidArgument(f"CLIPImageTransform: image_std is {image_std}, which divides by zero in {dtype}")
        if possible_resolutions is None:
            possible_resolutions = find_supported_resolutions(max_num_tiles, tile_size)
        self.possible_resolutions = torch.as_tensor(possible_resolutions)
        if self.possible_resolutions.ndim != 2 or self.possible_resolutions.shape[1] != 2 or not len(self.possible_resolutions):
            raise InvalidArgument(f"CLIPImageTransform: possible_resolutions is {possible_resolutions}, not one or more pairs (height, width)")
        for h, w in self.possible_resolutions.tolist():
            if h < 1 or w < 1 or h % tile_size or w % tile_size:
                raise InvalidArgument(f"CLIPImageTransform: possible_resolutions has {h, w}, not a multiple of tile_size {tile_size}")
        self.mean, self.std = image_mean, image_std
        self.tile_size, self.dtype = tile_size, dtype
        self.resample = resample_mode(resample)
        self.resize_to_max_canvas = resize_to_max_canvas
        self.max_size = None if resize_to_max_canvas else tile_size

    def __call__(self, sample: MutableMapping[str, Any], inference: bool = False) -> MutableMapping[str, Any]:
        """Replace sample["image"] by its tiles and add "aspect_ratio", int64 [2]: rows and columns of tiles.

        The image is a PIL image or a tensor, see `image_to_tensor`.
        """
        image = image_to_tensor(sample["image"], self.dtype)
        canvas = get_canvas_best_fit(image, self.possible_resolutions, self.resize_to_max_canvas)
        image = resize_with_pad(image, canvas, self.resample, self.max_size)
        if self.mean is not None:
            mean, std = (torch.tensor(values, dtype=self.dtype, device=image.device).view(3, 1, 1) for values in (self.mean, self.std))
            image = (image - mean) / std
        sample["image"] = tile_crop(image, self.tile_size)
        sample["aspect_ratio"] = torch.tensor(canvas) // self.tile_size
        return sample


class VisionCrossAttentionMask:
    """Say which text tokens see which image: those from its image token up to the next image token.

    Image tokens that follow each other directly share the text after the last of them.  tile_size, patch_size: pixels.
    """

    def __init__(self, tile_size: int, patch_size: int, image_token_id: int):
        if not 1 <= patch_size <= tile_size:
            raise InvalidArgument(f"VisionCrossAttentionMask: patch_size is {patch_size} and tile_size {tile_size}, not 1 <= patch_size <= tile_size")
        self.patches_per_tile = (tile_size // patch_size) ** 2
        self.image_token_id = image_token_id

    def __call__(self, sample: MutableMapping[str, Any], inference: bool = False) -> MutableMapping[str, Any]:
        """Add "encoder_mask": for each image [t, c, H, W] of `sample["encoder_input"]["images"]` a bool [s, t * n].

        s = `len(sample["tokens"])`, n = patches of a tile + 1 for its class token. Every column of a mask is the same
        memory. Raises RuntimeError where image tokens and images differ in number.
        """
        tokens = torch.as_tensor(sample["tokens"])
        images = (sample.get("encoder_input") or {}).get("images", ())
        starts = (tokens == self.image_token_id).nonzero().flatten().tolist()
        if len(starts) != len(images):
            raise RuntimeError(f"The number of image tokens ({len(starts)}) does not match the number of images ({len(images)}).")
        position = torch.arange(len(tokens))
        masks, end = [], len(tokens)
        for i in reversed(range(len(images))):
            seen = (starts[i] <= position) & (position < end)
            # 8192 tokens that see 4 tiles of 560 pixels are 52 MB when every column is stored
            masks.append(seen[:, None].expand(-1, images[i].shape[0] * (self.patches_per_tile + 1)))
            if i > 0 and starts[i - 1] + 1 < starts[i]:
                end = starts[i]
        sample["encoder_mask"] = masks[::-1]
        return sample


def image_to_tensor(image: object, dtype: torch.dtype) -> Tensor:
    """A PIL image or a tensor as [3, H, W] in 0..1 of a float dtype. Raises InvalidArgument for what is no image.

    A tensor is [3, H, W], [1, H, W] or [H, W] (grey) or [4, H, W] (RGB and alpha): uint8, or float in 0..1.
    Transparency is laid over white, as transformers does, so what is hidden under it never shows.
    A PIL image is taken as it is stored. Turn a camera's photo upright first, with PIL.ImageOps.exif_transpose.
    """
    if _is_pil(image):
        rgb = rgb_on_white(image)
        width, height = rgb.size
        image = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(height, width, 3).permute(2, 0, 1)
    if not isinstance(image, Tensor):
        raise InvalidArgument(f"Input image must be a PIL image or a torch.Tensor. Got {type(image).__name__}.")
    if image.ndim == 2:
        image = image[None]
    if image.ndim != 3 or image.shape[0] not in (1, 3, 4) or 0 in image.shape:
        hint = ": move the channels first" if image.ndim == 3 and image.shape[2] in (1, 3, 4) else ""
        raise InvalidArgument(f"Input image has shape {tuple(image.shape)}, not (3, H, W), (4, H, W), (1, H, W) or (H, W) with pixels{hint}")
    if image.dtype == torch.uint8:
        image = image.to(dtype) * (1 / 255)
    elif image.dtype.is_floating_point:
        # resized photos overshoot 1 a little, normalized ones reach about 3: only 0..255 data is beyond this
        if not image.isfinite().all() or image.max() > 16:
            raise InvalidArgument(f"Input image is {image.dtype} with values up to {image.max().item():g}, not in 0..1: divide by 255 or pass uint8")
        image = image.to(dtype)
    else:
        raise InvalidArgument(f"Input image is {image.dtype}, neither uint8 nor floating point")
    if image.shape[0] == 4:
        colour, alpha = image[:3], image[3:]
        image = colour * alpha + (1 - alpha)
    return image.expand(3, -1, -1)


def _is_pil(image: object) -> bool:
    """Whoever has a PIL image has imported PIL already, so PIL stays optional."""
    pil = sys.modules.get("PIL.Image")
    return pil is not None and isinstance(image, pil.Image)
