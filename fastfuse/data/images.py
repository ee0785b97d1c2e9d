"""The geometry of tiled images: which canvas an image goes on, how it is resized and padded, and how it is cut into tiles."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.errors import InvalidArgument

RESAMPLE = {"nearest": "nearest", "nearest_exact": "nearest-exact", "bilinear": "bilinear", "bicubic": "bicubic"}


def tile_crop(image: Tensor, tile_size: int) -> Tensor:
    """Cut an image [c, H, W] into [H / tile_size * W / tile_size, c, tile_size, tile_size], row by row.

    Raises InvalidArgument where a side is no multiple of tile_size (pixels).
    """
    c, H, W = _check_image("tile_crop", image)
    if tile_size < 1 or H % tile_size or W % tile_size:
        raise InvalidArgument(f"Image size {H}x{W} is not divisible by tile size {tile_size}")
    tiles = image.reshape(c, H // tile_size, tile_size, W // tile_size, tile_size)
    return tiles.permute(1, 3, 0, 2, 4).reshape(-1, c, tile_size, tile_size)


def find_supported_resolutions(max_num_tiles: int, tile_size: int) -> list[tuple[int, int]]:
    """Every canvas (height, width) in pixels made of 1 to max_num_tiles square tiles.

    Canvases of one aspect ratio follow each other, and the ratios come in the order in which counting tiles down from
    max_num_tiles meets them: the order breaks ties in `get_canvas_best_fit`.
    """
    if max_num_tiles < 1 or tile_size < 1:
        raise InvalidArgument(f"find_supported_resolutions: max_num_tiles is {max_num_tiles} and tile_size {tile_size}, both must be at least 1")
    by_ratio: dict[float, list[tuple[int, int]]] = {}
    for n in range(max_num_tiles, 0, -1):
        for rows in (r for r in range(1, n + 1) if n % r == 0):
            columns = n // rows
            by_ratio.setdefault(rows / columns, []).append((rows * tile_size, columns * tile_size))
    return [canvas for canvases in by_ratio.values() for canvas in canvases]


def get_canvas_best_fit(image: Tensor, possible_resolutions: Tensor | Sequence[tuple[int, int]], resize_to_max_canvas: bool) -> tuple[int, int]:
    """The canvas (height, width) of possible_resolutions [N, 2] that suits an image [..., H, W] best.

    Where a canvas holds the image without shrinking it: the one that enlarges it least, or most if
    resize_to_max_canvas. Else the one that shrinks it least. Of equals, the one of the smallest area, then the first.
    """
    canvases = torch.as_tensor(possible_resolutions)
    if canvases.ndim != 2 or canvases.shape[0] == 0 or canvases.shape[1] != 2:
        raise InvalidArgument(f"get_canvas_best_fit: possible_resolutions has shape {tuple(canvases.shape)}, not (N, 2) with N at least 1")
    if image.ndim < 2 or 0 in image.shape[-2:]:
        raise InvalidArgument(f"get_canvas_best_fit: image has shape {tuple(image.shape)}, not (..., H, W) with pixels")
    size = torch.tensor(image.shape[-2:], dtype=torch.float32, device=canvases.device)
    scales = (canvases.float() / size).amin(1)  # not the default dtype: models are built under bf16
    enlarging = scales[scales >= 1]
    if enlarging.numel() == 0:
        best = scales.max()
    else:
        best = enlarging.max() if resize_to_max_canvas else enlarging.min()
    h, w = min(canvases[scales == best].tolist(), key=lambda canvas: canvas[0] * canvas[1])
    return h, w


def get_inscribed_size(image_size: tuple[int, int], target_size: tuple[int, int], max_size: int | None) -> tuple[int, int]:
    """The largest (height, width) of image_size's aspect ratio within target_size, each side rounded down but at least 1.

    With max_size (pixels) an image grows up to max_size only: no side of the target counts for more than
    the larger of max_size and the image's own side.
    """
    h, w = image_size
    target_h, target_w = target_size
    if min(h, w, target_h, target_w) < 1 or (max_size is not None and max_size < 1):
        raise InvalidArgument(f"get_inscribed_size: image_size {h, w}, target_size {target_h, target_w} and max_size {max_size} must be at least 1")
    if max_size is not None:
        target_h, target_w = min(max(h, max_size), target_h), min(max(w, max_size), target_w)
    scale_h, scale_w = target_h / h, target_w / w
    if scale_w < scale_h:
        return max(1, min(int(h * scale_w), target_h)), target_w
    return target_h, max(1, min(int(w * scale_h), target_w))


def pad_dim_to_size(input: Tensor, size: int, dim: int, *, fill: float = 0.0) -> Tensor:
    """Lengthen dimension `dim` to `size` with `fill` at its end. Raises InvalidArgument where it is longer already."""
    if not -input.ndim <= dim < input.ndim:
        raise InvalidArgument(f"pad_dim_to_size: dim is {dim}, input has {input.ndim} dimensions")
    missing = size - input.shape[dim]
    if missing < 0:
        raise InvalidArgument(f"pad_dim_to_size: dimension {dim} of input is {input.shape[dim]} long, size is {size}")
    after = input.ndim - 1 - dim % input.ndim
    return F.pad(input, [0, 0] * after + [0, missing], value=fill)


def resize_with_pad(image: Tensor, target_size: tuple[int, int], resample: object, max_size: int | None = None) -> Tensor:
    """Resize an image [c, H, W] to the largest size inscribed in target_size, and pad it with 0 below and to the right.

    resample: "nearest", "nearest_exact", "bilinear" or "bicubic" (the last two antialiased), or an enum with such a value.
    max_size: pixels beyond which an image is not enlarged, see `get_inscribed_size`.  Returns [c, *target_size].
    """
    h, w = _check_image("resize_with_pad", image)[1:]
    mode = resample_mode(resample)
    target_h, target_w = target_size
    new_h, new_w = get_inscribed_size((h, w), (target_h, target_w), max_size)
    return F.pad(_resize(image, (new_h, new_w), mode), [0, target_w - new_w, 0, target_h - new_h])


def resample_mode(resample: object) -> str:
    """The name torch.nn.functional.interpolate has for `resample`. Raises InvalidArgument for one it has not."""
    name = getattr(resample, "value", resample)
    mode = RESAMPLE.get(name.lower().replace("-", "_")) if isinstance(name, str) else None
    if mode is None:
        raise InvalidArgument(f"resample is {resample!r}, not one of {', '.join(RESAMPLE)}")
    return mode


def _resize(image: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """torchvision's resize to the bit: 16-bit floats and integers are computed in float32, but uint8 on a CPU as it is.

    But not where a side is one pixel: there PyTorch 2.13 mixes the channels of uint8, and where the result is one pixel
    wide, makes every row from the first one's pixels. In floats, and lying on its side, such an image comes out right.
    """
    if tuple(image.shape[-2:]) == size:
        return image
    smooth = mode in ("bilinear", "bicubic")
    if smooth and size[1] == 1 and size[0] > 1:
        return _resize(image.mT, (1, size[0]), mode).mT
    in_bytes = image.dtype == torch.uint8 and image.device.type == "cpu" and 1 not in (*image.shape[-2:], *size)
    as_it_is = image.dtype in (torch.float32, torch.float64) or in_bytes
    x = (image if as_it_is else image.float())[None]
    x = F.interpolate(x, size, mode=mode, align_corners=False, antialias=True) if smooth else F.interpolate(x, size, mode=mode)
    if not as_it_is and not image.dtype.is_floating_point:
        x = x.round()
        if image.dtype == torch.uint8:
            x = x.clamp(0, 255)  # bicubic overshoots at edges
    return x[0].to(image.dtype)


def _check_image(where: str, image: Tensor) -> tuple[int, int, int]:
    if image.ndim != 3 or 0 in image.shape:
        raise InvalidArgument(f"{where}: image has shape {tuple(image.shape)}, not (c, H, W) with pixels")
    c, h, w = image.shape
    return c, h, w
