"""Images to tiles: by hand, against Pillow's filters, transformers' image processor, and values torchtune 0.6.1 gives."""

import base64
import importlib
import io
import itertools
import math
import random
import sys
from enum import Enum

import numpy as np
import pytest
import skimage.data
import torch
from PIL import ExifTags, Image
from torch import ones, zeros
from transformers.models.mllama import image_processing_pil_mllama as mllama

from fastfuse.data.images import _resize, find_supported_resolutions, get_canvas_best_fit, get_inscribed_size, pad_dim_to_size, resize_with_pad, tile_crop
from fastfuse.data.transforms import CLIPImageTransform, image_to_tensor
from fastfuse.errors import InvalidArgument
from fastfuse.models.llama3_2_vision._transform import IMAGE_MEAN as MEAN
from fastfuse.models.llama3_2_vision._transform import IMAGE_STD as STD

EPS, F32 = torch.finfo(torch.float32).eps, torch.float32
CANVASES_4_560 = [(560, 2240), (1120, 1120), (560, 560), (2240, 560), (560, 1680), (1680, 560), (560, 1120), (1120, 560)]
SMOOTH = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def some_side(rng):
    """Small, middling and large sides alike."""
    return rng.randint(1, rng.choice([10, 100, 700, 5000]))


def pattern(h, w):
    """A picture without symmetry, the same everywhere."""
    r, c, k = np.ogrid[:h, :w, :3]
    return ((7 * r + 13 * c + 29 * k + r * c) % 256).astype(np.uint8)


def pixels(array):
    """[H, W, C] as a tensor [C, H, W]."""
    return torch.from_numpy(array).permute(2, 0, 1)


def size_only(h, w):
    return torch.empty(3, h, w, device="meta")


def test_tile_crop_puts_every_pixel_where_it_was():
    for image in (torch.arange(48).view(2, 4, 6), torch.arange(48).view(2, 6, 4).mT):  # no contiguous input needed
        tiles = tile_crop(image, 2)
        want = [image[:, y : y + 2, x : x + 2] for y in (0, 2) for x in (0, 2, 4)]
        assert tiles.is_contiguous() and torch.equal(tiles, torch.stack(want))


NOT_PIXELS = "Input image has shape {}, not (3, H, W), (4, H, W), (1, H, W) or (H, W) with pixels"
FLOATS = np.array([[0.0, 100.0, 255.0]], np.float32)
CLIP = "CLIPImageTransform: "
REFUSED = [
    (lambda: tile_crop(ones(3, 250, 200), 100), "Image size 250x200 is not divisible by tile size 100"),
    (lambda: tile_crop(ones(3, 200, 250), 100), "Image size 200x250 is not divisible by tile size 100"),
    (lambda: tile_crop(ones(3, 4, 4), 0), "Image size 4x4 is not divisible by tile size 0"),
    (lambda: tile_crop(ones(4, 4), 2), "tile_crop: image has shape (4, 4), not (c, H, W) with pixels"),
    (lambda: find_supported_resolutions(0, 560), "find_supported_resolutions: max_num_tiles is 0 and tile_size 560, both must be at least 1"),
    (lambda: get_canvas_best_fit(ones(3, 4, 4), [], False), "get_canvas_best_fit: possible_resolutions has shape (0,), not (N, 2) with N at least 1"),
    (lambda: get_canvas_best_fit(ones(3, 0, 4), [(4, 4)], False), "get_canvas_best_fit: image has shape (3, 0, 4), not (..., H, W) with pixels"),
    (lambda: get_inscribed_size((0, 3), (4, 4), None), "get_inscribed_size: image_size (0, 3), target_size (4, 4) and max_size None must be at least 1"),
    (lambda: get_inscribed_size((3, 3), (4, 4), 0), "get_inscribed_size: image_size (3, 3), target_size (4, 4) and max_size 0 must be at least 1"),
    (lambda: pad_dim_to_size(ones(2, 3), 2, 1), "pad_dim_to_size: dimension 1 of input is 3 long, size is 2"),
    (lambda: pad_dim_to_size(ones(2, 3), 5, 2), "pad_dim_to_size: dim is 2, input has 2 dimensions"),
    (lambda: resize_with_pad(ones(3, 4, 0), (4, 4), "bilinear"), "resize_with_pad: image has shape (3, 4, 0), not (c, H, W) with pixels"),
    (lambda: resize_with_pad(ones(3, 4, 4), (4, 4), "lanczos"), "resample is 'lanczos', not one of nearest, nearest_exact, bilinear, bicubic"),
]
NO_IMAGES = [
    ("photo.jpg", "Input image must be a PIL image or a torch.Tensor. Got str."),
    (np.zeros((4, 4, 3)), "Input image must be a PIL image or a torch.Tensor. Got ndarray."),
    (Image.new("RGB", (0, 5)), "Input image is 0 x 5 pixels."),
    (Image.new("I;16", (0, 3)), "Input image is 0 x 3 pixels."),
    (Image.fromarray(FLOATS * 2), "Input image has mode F and values from 0 to 510: scale them to 0..255"),
    (Image.fromarray(FLOATS / 255), "Input image has mode F and values from 0 to 1: scale them to 0..255"),
    (Image.fromarray(FLOATS - 255), "Input image has mode F and values from -255 to 0: scale them to 0..255"),
    (Image.fromarray((FLOATS * 257).astype(np.int32)), "Input image has mode I and values from 0 to 65535: scale them to 0..255"),
    (zeros(8, 9, 3), NOT_PIXELS.format((8, 9, 3)) + ": move the channels first"),
    (zeros(2, 8, 9), NOT_PIXELS.format((2, 8, 9))),
    (zeros(3, 0, 9), NOT_PIXELS.format((3, 0, 9))),
    (zeros(2, 3, 4, 4), NOT_PIXELS.format((2, 3, 4, 4))),
    (255 * ones(3, 4, 4), "Input image is torch.float32 with values up to 255, not in 0..1: divide by 255 or pass uint8"),
    (math.nan * ones(3, 4, 4), "Input image is torch.float32 with values up to nan, not in 0..1: divide by 255 or pass uint8"),
    (zeros(3, 4, 4, dtype=torch.int64), "Input image is torch.int64, neither uint8 nor floating point"),
]
OPTIONS = [
    ({"max_num_tiles": None}, f"{CLIP}needs possible_resolutions or max_num_tiles, has possible_resolutions=None, max_num_tiles=None"),
    ({"image_mean": (0.5, 0.5, 0.5)}, f"{CLIP}needs both image_mean and image_std or none, has image_mean=(0.5, 0.5, 0.5), image_std=None"),
    ({"image_mean": (0.5,), "image_std": (0.5, 0.5, 0.5)}, f"{CLIP}image_mean is (0.5,), not one value for each of 3 channels"),
    ({"image_mean": (0, 0, 0), "image_std": (1, 0, 1)}, f"{CLIP}image_std is (1, 0, 1), which divides by zero in torch.bfloat16"),
    ({"possible_resolutions": [(224, 300)]}, f"{CLIP}possible_resolutions has (224, 300), not a multiple of tile_size 224"),
    ({"possible_resolutions": []}, f"{CLIP}possible_resolutions is [], not one or more pairs (height, width)"),
    ({"max_num_tiles": 0}, "find_supported_resolutions: max_num_tiles is 0 and tile_size 224, both must be at least 1"),
    ({"dtype": torch.uint8}, f"{CLIP}dtype is torch.uint8, not a floating point one"),
]
REFUSED += [(lambda image=image: CLIPImageTransform(tile_size=4)({"image": image}), message) for image, message in NO_IMAGES]
REFUSED += [(lambda options=options: CLIPImageTransform(**options), message) for options, message in OPTIONS]


@pytest.mark.parametrize("call, message", REFUSED)
def test_refusals(call, message):
    with pytest.raises(InvalidArgument) as error:
        call()
    assert str(error.value) == message


def test_resolutions_and_their_order():
    assert find_supported_resolutions(4, 560) == CANVASES_4_560
    assert find_supported_resolutions(6, 1)[:6] == [(1, 6), (2, 3), (3, 2), (6, 1), (1, 5), (5, 1)]
    for n in range(1, 20):
        found = find_supported_resolutions(n, 10)
        assert sorted(found) == sorted((10 * h, 10 * w) for h in range(1, n + 1) for w in range(1, n + 1) if h * w <= n)


@pytest.fixture(params=[F32, torch.bfloat16], ids=str)
def default_dtype(request):
    """Models are built under bf16, in which 561 is 560 and nearly every two scales are equal."""
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(F32)


def test_the_largest_canvas_then_the_smaller_area_then_the_first(default_dtype):
    sizes = {(1, 1): (1120, 1120), (300, 800): (560, 1680), (561, 560): (1120, 1120), (2000, 2000): (1120, 1120), (100, 399): (560, 2240)}
    for size, canvas in sizes.items():  # torchtune's choices
        assert get_canvas_best_fit(size_only(*size), torch.tensor(CANVASES_4_560), True) == canvas
    square = size_only(10, 10)
    assert get_canvas_best_fit(square, [(20, 40), (40, 20), (20, 20), (20, 60)], False) == (20, 20)
    assert get_canvas_best_fit(square, [(40, 20), (20, 40)], True) == (40, 20)
    assert get_canvas_best_fit(square, [(5, 9), (8, 5), (4, 9)], False) == (8, 5)
    assert get_inscribed_size((5000, 1), (2240, 560), None) == (2240, 1)  # torchtune gives a width of 0 here


def test_canvas_and_size_are_those_of_transformers(default_dtype):
    """transformers computes scales in float64, we in float32 as torchtune does: no size tried tells them apart."""
    rng = random.Random(0)
    for _ in range(1000):
        h, w, max_num_tiles, tile_size = some_side(rng), some_side(rng), rng.randint(1, 9), rng.choice([14, 224, 560])
        canvas = get_canvas_best_fit(size_only(h, w), find_supported_resolutions(max_num_tiles, tile_size), False)
        case = f"{h} x {w}, {max_num_tiles} tiles of {tile_size}"
        assert canvas == tuple(int(x) for x in mllama.get_optimal_tiled_canvas(h, w, max_num_tiles, tile_size)), case
        for target in (canvas, (some_side(rng), some_side(rng))):
            for max_size in (tile_size, some_side(rng), None):
                want = mllama.get_image_size_fit_to_canvas(h, w, *target, max_size or 10**6)
                assert get_inscribed_size((h, w), target, max_size) == want, f"{case}, {target}, {max_size}"


def test_pad_dim_to_size():
    assert pad_dim_to_size(ones(2, 2), 3, 0).tolist() == [[1, 1], [1, 1], [0, 0]]
    assert pad_dim_to_size(ones(2, 2), 4, -1, fill=7).tolist() == [[1, 1, 7, 7]] * 2
    assert pad_dim_to_size(ones(2, 1, dtype=torch.bool), 2, 1).tolist() == [[True, False]] * 2


def test_nearest_pixels_by_hand():
    for mode, want in (("nearest", [1, 3, 0]), ("nearest-exact", [2, 4, 0])):
        assert resize_with_pad(torch.tensor([[[1, 2, 3, 4, 5], [1, 2, 3, 4, 5]]]), (1, 3), mode).tolist() == [[want]]


def filter_weights(old, new, mode):
    """[new, old] in float64: the antialiasing filter as Pillow states it, a triangle or Keys' cubic, widened where it reduces."""
    step = max(old / new, 1)
    t = (torch.arange(old, dtype=torch.float64) + 0.5 - (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * (old / new)).abs() / step
    if mode == "bilinear":
        weights = (1 - t).clamp(min=0)
    else:
        weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, torch.where(t < 2, ((-0.5 * t + 2.5) * t - 4) * t + 2, 0))
    return weights / weights.sum(1, keepdim=True)


SIZES = [
    *(((200, 300), new) for new in ((60, 90), (426, 640), (2, 3), (133, 200))),
    ((400, 1), (300, 1)),
    ((400, 1), (1, 1)),
    ((400, 3), (300, 1)),
    ((5000, 2), (2240, 1)),
    ((1, 1), (3, 5)),
    ((2, 1), (560, 1)),
    ((1, 400), (1, 300)),
    ((2, 1), (1, 2)),
]


@pytest.mark.parametrize("mode", SMOOTH)
@pytest.mark.parametrize("size, new", SIZES)
def test_resize_by_the_filter(size, new, mode, device):
    """A side of one pixel too: PyTorch 2.13's own antialiasing makes every row of a one pixel wide result from the first row's pixels."""
    bytes_ = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).permute(2, 0, 1)
    rows, columns = (filter_weights(old, to, mode) for old, to in zip(size, new, strict=True))
    exact = rows @ bytes_.double() @ columns.T / 255
    for image in (bytes_, bytes_.contiguous(), bytes_.repeat_interleave(2, 2)[..., ::2]):
        for dtype in (torch.float64, F32):
            # a pixel's place is rounded to the dtype, and neighbours are up to 1 apart
            allowed = 4 * max(size) * torch.finfo(dtype).eps
            assert (_resize(image.to(dtype) / 255, new, mode).double() - exact).abs().max() <= allowed
        for there in {"cpu", device} if 1 in (*size, *new) else ():  # else bytes are rounded between rows and columns too
            assert (_resize(image.to(there), new, mode).cpu().double() - (exact * 255).clamp(0, 255)).abs().max() <= 0.51


def test_other_dtypes_are_computed_in_float32():
    array = skimage.data.coffee()[:100, :150]
    image, size = pixels(array), (60, 90)
    for mode in SMOOTH:
        for narrow in (image.bfloat16() / 255, image.half() / 255):
            assert torch.equal(_resize(narrow, size, mode), _resize(narrow.float(), size, mode).to(narrow.dtype))
        pillow = pixels(np.array(Image.fromarray(array).resize(size[::-1], SMOOTH[mode])))
        assert (_resize(image, size, mode).int() - pillow.int()).abs().max() <= 1
    assert torch.equal(_resize(image.int(), size, "bilinear"), _resize(image.float(), size, "bilinear").round().int())


def test_extreme_sizes():
    """An even picture stays even where it lies, and the rest is padding. Each size by each way of resampling, every other on the largest canvas."""
    sizes, ways, to_max_canvas = [(1, 1), (5000, 1), (1, 5000), (1, 2), (3, 2999)], ("nearest", *SMOOTH), itertools.cycle((False, True))
    for (size, resample), largest in zip(itertools.product(sizes, ways), to_max_canvas, strict=False):
        transform = CLIPImageTransform(tile_size=28, dtype=F32, resample=resample, resize_to_max_canvas=largest)
        sample = transform({"image": 0.5 * ones(3, *size)})
        rows, columns = sample["aspect_ratio"].tolist()
        h, w = get_inscribed_size(size, (28 * rows, 28 * columns), None if largest else 28)
        canvas = sample["image"].view(rows, columns, 3, 28, 28).permute(2, 0, 3, 1, 4).reshape(3, 28 * rows, 28 * columns)
        torch.testing.assert_close(canvas[:, :h, :w], 0.5 * ones(3, h, w))
        assert canvas.count_nonzero() == 3 * h * w


# tiles, aspect ratio, then pixels (0, 0, 0, 0), (0, 1, 5, 7), (-1, 2, 3, 4), (-1, 0, -1, -1), sum and sum of squares
TORCHTUNE_VALUES = [
    ((40, 70), {"tile_size": 28, "image_mean": MEAN, "image_std": STD, "dtype": torch.bfloat16}, 4, [2, 2],
     [-1.71875, 0.5390625, -0.01416015625, -1.7890625], -5719.3380, 14506.8240),
    ((40, 70), {"tile_size": 28, "image_mean": MEAN, "image_std": STD, "dtype": F32}, 4, [2, 2],
     [-1.718358039855957, 0.5312002897262573, -0.012544815428555012, -1.7922625541687012], -5732.7499, 14512.1317),
    ((100, 33), {"tile_size": 28, "dtype": F32, "resample": "bicubic", "resize_to_max_canvas": True}, 4, [4, 1],
     [0.007787287700921297, 0.9157371520996094, 0.0, 0.0], 3541.8869, 2144.8197),
    ((9, 150), {"tile_size": 14, "max_num_tiles": 6, "dtype": F32, "resample": "nearest"}, 6, [1, 6],
     [0.0, 0.0, 0.6470588445663452, 0.0], 625.2942, 414.0286),
]  # fmt: skip


@pytest.mark.parametrize("size, options, tiles, ratio, values, total, squares", TORCHTUNE_VALUES)
def test_values_of_torchtune(size, options, tiles, ratio, values, total, squares, default_dtype):
    array = pattern(*size)
    for image in (Image.fromarray(array), pixels(array), pixels(array).contiguous()):
        sample = CLIPImageTransform(**options)({"image": image, "id": 3})
        got, found = sample["image"], sample["aspect_ratio"]
        assert (len(got), got.dtype, found.tolist(), found.dtype, sample["id"]) == (tiles, options["dtype"], ratio, torch.int64, 3)
        # Rounded by the resize twice, by the mean and by the deviation, each relative to values up to 2.
        found = torch.stack([got[0, 0, 0, 0], got[0, 1, 5, 7], got[-1, 2, 3, 4], got[-1, 0, -1, -1]]).float()
        torch.testing.assert_close(found, torch.tensor(values, dtype=F32), rtol=8 * EPS, atol=8 * EPS)
        assert [got.double().sum().item(), got.double().square().sum().item()] == pytest.approx([total, squares], abs=2e-2)


THIN = [(1, 400), (1, 1), (2, 1), (5000, 1), (3, 5000), (30000, 2), (2, 30000), (2000, 4)]
PHOTOS = {f"{h} x {w}": lambda h=h, w=w: np.random.default_rng(0).integers(0, 256, (h, w, 3)).astype(np.uint8) for h, w in THIN} | {
    "astronaut": skimage.data.astronaut,
    "coffee": skimage.data.coffee,
    "tall": lambda: skimage.data.chelsea()[:300, :90],
    "wide": lambda: skimage.data.coffee()[:110, :400],
    "small": lambda: skimage.data.astronaut()[:20, :30],
}


@pytest.mark.parametrize("name", PHOTOS)
def test_photos_against_transformers(name):
    """Same canvas, place and padding. Pixels differ by half a grey level of rounding: it resizes uint8, we resize floats."""
    photo, options = Image.fromarray(PHOTOS[name]()), {} if " x " in name else {"image_mean": MEAN, "image_std": STD}
    theirs = mllama.MllamaImageProcessorPil(
        size={"height": 56, "width": 56}, max_image_tiles=4, resample=SMOOTH["bilinear"], do_normalize=bool(options), **options
    )
    want = theirs(photo, return_tensors="pt")
    ours = CLIPImageTransform(tile_size=56, max_num_tiles=4, dtype=F32, **options)({"image": photo})
    rows, columns = ours["aspect_ratio"].tolist()
    assert mllama.get_all_supported_aspect_ratios(4)[want["aspect_ratio_ids"].item() - 1] == (rows, columns)
    assert ours["image"].shape[0] == want["aspect_ratio_mask"].sum() == rows * columns
    tiles = want["pixel_values"][0, 0]
    apart = (ours["image"] - tiles[: rows * columns]).abs().amax((0, 2, 3))
    level = 1.01 / 255 / torch.tensor(STD) if options else 1 / 255
    assert (apart <= level).all() and not tiles[rows * columns :].any(), apart / level


def taken(picture):
    """What is made of a picture, as bytes [H, W, 3]."""
    return (image_to_tensor(picture, F32) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def by_transformers(picture):
    return mllama.MllamaImageProcessorPil().process_image(picture, do_convert_rgb=True).transpose(1, 2, 0)


def reopened(picture, format="PNG", **options):
    saved = io.BytesIO()
    picture.save(saved, format, **options)
    return Image.open(saved)


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_pictures_of_other_modes_are_converted_as_pillow_does(mode):
    picture = Image.fromarray(pattern(20, 30)).convert(mode)
    for want in (picture.convert("RGB"), by_transformers(picture)):
        assert np.array_equal(taken(picture), want)


GREYS = np.array([[0, 40, 80, 255]], np.uint8)
COLOURS = np.stack([GREYS, 255 - GREYS, GREYS // 2], -1)
ALPHA = np.array([[0, 255, 128, 51]], np.uint8)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_an_alpha_channel_is_laid_over_white(mode):
    """(a c + (255 - a) 255) / 255 by hand; Pillow rounds once where alpha is stored beside the colour, twice where it is multiplied into it."""
    grey, multiplied = mode in ("LA", "La"), mode in ("RGBa", "La")
    picture = Image.fromarray(GREYS if grey else COLOURS)
    picture.putalpha(Image.fromarray(ALPHA))
    picture = picture.convert(mode)
    a, colours = ALPHA[..., None].astype(float), np.repeat(GREYS[..., None], 3, -1) if grey else COLOURS
    got = taken(picture).astype(int)
    assert got[0, 0].tolist() == [255] * 3
    assert np.abs(got - (a * colours + (255 - a) * 255) / 255).max() <= (2 if multiplied else 1)
    assert multiplied or np.array_equal(got, by_transformers(picture))  # of these transformers 5.24 shows what is hidden, or raises


def palette_with(colours, mode="RGB", **info):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette(colours, mode)
    picture.info.update(info)
    return picture


def row(values, transparency, dtype=np.uint8):
    """A PNG file of one row of pixels with one transparent colour."""
    return reopened(Image.fromarray(np.array([values], dtype)), transparency=transparency)


def sixteen_bit_rgb(encoded):
    """A PNG file of two pixels, the first of the transparent colour: Pillow opens such files, but writes none."""
    return Image.open(io.BytesIO(base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAIAAAABEAIAAAAr0DSeAAAABnRSTlM" + encoded)))


WHITE, PALETTE, THREE = [255] * 3, [9, 9, 9, 100, 0, 50, 0, 0, 255], [[255] * 3, [100, 0, 50], [0, 0, 255]]
HIGH = "SNFZ4mryJ5E7mAAAAE0lEQVR4nGMQMgmrmLUHRM7eAwAaywTWAWA1bAAAAABJRU5ErkJggg=="  # 1234 5678 9ABC, 1234 5678 9BBC
LOW = "ANFZ4AACOg3BBAAAAEklEQVR4nGNgMAmrYGAwYQCRAA3VAgUCyHQzAAAAAElFTkSuQmCC"  # 0034 5678 0000, 3400 5678 0000
TRANSPARENT_COLOURS = {
    "palette, one entry": (palette_with(PALETTE, transparency=0), THREE),
    "palette, an alpha for each": (palette_with(PALETTE, transparency=bytes([0, 255])), THREE),
    "palette of RGBA": (palette_with([9, 9, 9, 0, 100, 0, 50, 255, 0, 0, 255, 255], "RGBA"), THREE),
    "GIF": (reopened(palette_with(PALETTE), "GIF", transparency=0), THREE),
    "RGB": (row([[1, 2, 3], [1, 2, 4]], (1, 2, 3)), [WHITE, [1, 2, 4]]),
    "16-bit RGB": (sixteen_bit_rgb(HIGH), [WHITE, [0x12, 0x56, 0x9B]]),
    "16-bit RGB with a small value": (sixteen_bit_rgb(LOW), [WHITE, [0x34, 0x56, 0]]),
    "grey": (row([0, 5, 6], 5), [[0] * 3, WHITE, [6] * 3]),
    "one bit": (row([0, 1] * 4, 0, bool), [WHITE] * 8),
    "one bit, white": (row([0, 0, 1, 1], 1, bool), [[0] * 3] * 2 + [WHITE] * 2),
    "16-bit grey": (row([514, 513, 515, 65535], 514, np.uint16), [WHITE, [2] * 3, [2] * 3, WHITE]),
}


@pytest.mark.parametrize("kind", TRANSPARENT_COLOURS)
def test_a_transparent_colour_is_white(kind):
    picture, want = TRANSPARENT_COLOURS[kind]
    assert taken(picture).tolist() == [want]
    if kind != "palette of RGBA" and "16-bit" not in kind:  # transformers 5.24 overlooks these, and all 16-bit grey is white there
        assert by_transformers(picture).tolist() == [want]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_keep_their_range(mode):
    """Pillow and transformers clip them at 255: a photo would be all white."""
    values = np.array([[0, 128, 129, 257, 32896, 65535]])
    stored = values.astype(">u2" if mode == "I;16B" or (mode == "I;16N" and sys.byteorder == "big") else "<u2")
    assert taken(Image.frombytes(mode, (6, 1), stored.tobytes()))[..., 0].tolist() == np.round(values / 257).tolist()


def test_modes_without_a_range_are_taken_in_bytes():
    for array in (FLOATS, FLOATS.astype(np.int32)):
        assert taken(Image.fromarray(array))[..., 0].tolist() == FLOATS.tolist()


def test_the_alpha_of_a_tensor_is_laid_over_white():
    image, a = pixels(np.dstack([COLOURS, ALPHA])), ALPHA[..., None] / 255
    for given in (image, image / 255):
        torch.testing.assert_close(image_to_tensor(given, F32), pixels(a * (COLOURS / 255) + 1 - a).float(), rtol=4 * EPS, atol=4 * EPS)


def test_a_pil_image_is_taken_as_stored():
    """As transformers does: who opens the file turns it upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    opened = reopened(Image.fromarray(pattern(20, 30)), exif=exif)
    assert opened.getexif()[ExifTags.Base.Orientation] == 6 and np.array_equal(taken(opened), pattern(20, 30))


def test_kinds_of_tensors():
    grey = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8)
    want = torch.tensor([[0.0, 0.2], [0.4, 1.0]]).expand(3, 2, 2)
    for image in (grey, grey[None], grey.expand(3, 2, 2), grey.float() / 255, grey[None].double() / 255):
        torch.testing.assert_close(image_to_tensor(image, F32), want)
    assert image_to_tensor(grey, torch.bfloat16)[1, 0, 1] == torch.tensor(0.2, dtype=torch.bfloat16)


def test_possible_resolutions_come_before_max_num_tiles():
    sample = CLIPImageTransform(possible_resolutions=[(4, 8)], tile_size=4, max_num_tiles=1, dtype=F32)({"image": ones(3, 4, 4)})
    assert sample["aspect_ratio"].tolist() == [1, 2] and sample["image"].mean((1, 2, 3)).tolist() == [1, 0]


def test_resample_takes_an_enum():
    mode = Enum("InterpolationMode", {"NEAREST_EXACT": "nearest-exact", "LANCZOS": "lanczos"})
    assert CLIPImageTransform(resample=mode.NEAREST_EXACT).resample == "nearest-exact"
    with pytest.raises(InvalidArgument, match="not one of nearest"):
        CLIPImageTransform(resample=mode.LANCZOS)


def test_pillow_is_optional(monkeypatch):
    picture = Image.new("RGB", (4, 4))
    monkeypatch.delitem(sys.modules, "PIL.Image")
    assert CLIPImageTransform(tile_size=4, dtype=F32)({"image": ones(3, 4, 4)})["image"].eq(1).all()
    with pytest.raises(InvalidArgument, match=r"must be a PIL image or a torch\.Tensor\. Got Image\."):
        CLIPImageTransform(tile_size=4)({"image": picture})


UTILS = "modules.transforms.vision_utils."
NAMES = [(UTILS + name, name) for name in ("tile_crop", "get_canvas_best_fit", "get_inscribed_size", "pad_dim_to_size", "resize_with_pad")]
NAMES += [(UTILS + "get_canvas_best_fit", "find_supported_resolutions"), ("modules.transforms", "VisionCrossAttentionMask")]
NAMES += [("data", name) for name in ("padded_collate_tiled_images_and_mask", "padded_collate_sft", "left_pad_sequence", "Message")]


def test_import_paths_of_torchtune():
    for path, name in NAMES:
        found = getattr(importlib.import_module(f"fastfuse.{path}"), name)
        assert found.__name__ == name and found.__module__.startswith("fastfuse.data")
