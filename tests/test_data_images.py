"""Images to tiles: by hand, against Pillow's own resampling, transformers' image processor, and values torchtune 0.6.1 gives."""

import importlib
import io
import math
import random
import struct
import sys
import zlib
from fractions import Fraction

import numpy as np
import pytest
import skimage.data
import torch
from numerics import assert_rounding_apart
from PIL import ExifTags, Image
from transformers.models.mllama import image_processing_pil_mllama as mllama

from fastfuse.data.images import _resize, find_supported_resolutions, get_canvas_best_fit, get_inscribed_size, pad_dim_to_size, resize_with_pad, tile_crop
from fastfuse.data.transforms import CLIPImageTransform, VisionCrossAttentionMask, image_to_tensor
from fastfuse.errors import InvalidArgument

EPS = torch.finfo(torch.float32).eps
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
CANVASES_4_560 = [(560, 2240), (1120, 1120), (560, 560), (2240, 560), (560, 1680), (1680, 560), (560, 1120), (1120, 560)]
PHOTOS = {"astronaut": skimage.data.astronaut, "coffee": skimage.data.coffee, "chelsea": skimage.data.chelsea}


def some_side(rng):
    """Small, middling and large sides alike."""
    return rng.randint(1, rng.choice([10, 100, 700, 5000]))


def pattern(h, w):
    """A picture without symmetry, the same everywhere."""
    r, c, k = np.ogrid[:h, :w, :3]
    return ((7 * r + 13 * c + 29 * k + r * c) % 256).astype(np.uint8)


def size_only(h, w):
    return torch.empty(3, h, w, device="meta")


def test_tile_crop_by_hand():
    image = torch.arange(2 * 4 * 6).view(2, 4, 6)
    tiles = tile_crop(image, 2)
    assert tiles.shape == (6, 2, 2, 2) and tiles.is_contiguous()
    assert tiles[0].tolist() == [[[0, 1], [6, 7]], [[24, 25], [30, 31]]]
    assert tiles[2].tolist() == [[[4, 5], [10, 11]], [[28, 29], [34, 35]]]
    assert tiles[3].tolist() == [[[12, 13], [18, 19]], [[36, 37], [42, 43]]]
    assert torch.equal(tile_crop(image.transpose(1, 2), 2)[1, 0], torch.tensor([[12, 18], [13, 19]]))  # no contiguous input needed


def test_tile_crop_of_a_photo_puts_every_pixel_where_it_was():
    photo = torch.from_numpy(skimage.data.astronaut()).permute(2, 0, 1)
    tiles = tile_crop(photo, 128)
    for row in range(4):
        for column in range(4):
            assert torch.equal(tiles[4 * row + column], photo[:, 128 * row : 128 * row + 128, 128 * column : 128 * column + 128])


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: tile_crop(torch.ones(3, 250, 250), 500), "Image size 250x250 is not divisible by tile size 500"),
        (lambda: tile_crop(torch.ones(3, 250, 200), 100), "Image size 250x200 is not divisible by tile size 100"),
        (lambda: tile_crop(torch.ones(3, 4, 4), 0), "Image size 4x4 is not divisible by tile size 0"),
        (lambda: tile_crop(torch.ones(4, 4), 2), "tile_crop: image has shape (4, 4), not (c, H, W) with pixels"),
        (lambda: find_supported_resolutions(0, 560), "find_supported_resolutions: max_num_tiles is 0 and tile_size 560, both must be at least 1"),
        (lambda: get_canvas_best_fit(torch.ones(3, 4, 4), [], False), "get_canvas_best_fit: possible_resolutions has shape (0,), not (N, 2) with N at least 1"),
        (lambda: get_canvas_best_fit(torch.ones(3, 0, 4), [(4, 4)], False), "get_canvas_best_fit: image has shape (3, 0, 4), not (..., H, W) with pixels"),
        (lambda: get_inscribed_size((0, 3), (4, 4), None), "get_inscribed_size: image_size (0, 3), target_size (4, 4) and max_size None must be at least 1"),
        (lambda: get_inscribed_size((3, 3), (4, 4), 0), "get_inscribed_size: image_size (3, 3), target_size (4, 4) and max_size 0 must be at least 1"),
        (lambda: pad_dim_to_size(torch.ones(2, 3), 2, 1), "pad_dim_to_size: dimension 1 of input is 3 long, size is 2"),
        (lambda: pad_dim_to_size(torch.ones(2, 3), 5, 2), "pad_dim_to_size: dim is 2, input has 2 dimensions"),
        (lambda: resize_with_pad(torch.ones(3, 4, 0), (4, 4), "bilinear"), "resize_with_pad: image has shape (3, 4, 0), not (c, H, W) with pixels"),
        (lambda: resize_with_pad(torch.ones(3, 4, 4), (4, 4), "lanczos"), "resample is 'lanczos', not one of nearest, nearest_exact, bilinear, bicubic"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(InvalidArgument) as error:
        call()
    assert str(error.value) == message
    assert isinstance(error.value, ValueError) and isinstance(error.value, AssertionError)


def test_resolutions_and_their_order():
    assert find_supported_resolutions(4, 560) == CANVASES_4_560
    assert find_supported_resolutions(1, 14) == [(14, 14)]
    assert find_supported_resolutions(6, 1)[:6] == [(1, 6), (2, 3), (3, 2), (6, 1), (1, 5), (5, 1)]
    for n in range(1, 20):
        found = find_supported_resolutions(n, 10)
        assert sorted(found) == sorted((10 * h, 10 * w) for h in range(1, n + 1) for w in range(1, n + 1) if h * w <= n)


# (height, width): canvas and size of the image on it, when enlarged up to one tile, and as far as canvases allow.
FROM_TORCHTUNE = {
    (1, 1): [((560, 560), (560, 560)), ((1120, 1120), (1120, 1120))],
    (300, 800): [((560, 1120), (300, 800)), ((560, 1680), (560, 1493))],
    (800, 300): [((1120, 560), (800, 300)), ((1680, 560), (1493, 560))],
    (561, 560): [((1120, 560), (561, 560)), ((1120, 1120), (1120, 1118))],
    (560, 561): [((560, 1120), (560, 561)), ((1120, 1120), (1118, 1120))],
    (1000, 1000): [((1120, 1120), (1000, 1000)), ((1120, 1120), (1120, 1120))],
    (559, 1121): [((560, 1680), (559, 1121)), ((560, 1680), (560, 1123))],
    (2000, 2000): [((1120, 1120), (1120, 1120)), ((1120, 1120), (1120, 1120))],
    (100, 399): [((560, 560), (140, 560)), ((560, 2240), (560, 2234))],
    (1500, 500): [((1680, 560), (1500, 500)), ((1680, 560), (1680, 560))],
    (5000, 1): [((2240, 560), (2240, 1)), ((2240, 560), (2240, 1))],  # torchtune gives a width of 0 here
    (1, 5000): [((560, 2240), (1, 2240)), ((560, 2240), (1, 2240))],
}


@pytest.mark.parametrize("size", FROM_TORCHTUNE)
@pytest.mark.parametrize("resize_to_max_canvas", [False, True])
def test_canvas_and_inscribed_size(size, resize_to_max_canvas):
    canvas, inscribed = FROM_TORCHTUNE[size][resize_to_max_canvas]
    assert get_canvas_best_fit(size_only(*size), torch.tensor(CANVASES_4_560), resize_to_max_canvas) == canvas
    assert get_inscribed_size(size, canvas, None if resize_to_max_canvas else 560) == inscribed


def test_the_default_dtype_does_not_choose_the_canvas():
    """Models are built under bf16, in which 561 is 560 and nearly every two scales are equal."""
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = {size: get_canvas_best_fit(size_only(*size), CANVASES_4_560, False) for size in FROM_TORCHTUNE}
        tiles = CLIPImageTransform(tile_size=28, image_mean=MEAN, image_std=STD, dtype=torch.float32)({"image": Image.fromarray(pattern(40, 70))})["image"]
    finally:
        torch.set_default_dtype(torch.float32)
    assert found == {size: rows[0][0] for size, rows in FROM_TORCHTUNE.items()}
    assert tiles[0, 0, 0, 0].item() == pytest.approx(-1.718358039855957, rel=1e-6)


def test_ties_go_to_the_smaller_area_then_to_the_first():
    assert get_canvas_best_fit(size_only(10, 10), [(20, 40), (40, 20), (20, 20), (20, 60)], False) == (20, 20)
    assert get_canvas_best_fit(size_only(10, 10), [(20, 40), (40, 20)], False) == (20, 40)
    assert get_canvas_best_fit(size_only(10, 10), [(40, 20), (20, 40)], True) == (40, 20)
    assert get_canvas_best_fit(size_only(10, 10), [(5, 9), (8, 5), (4, 9)], False) == (8, 5)


def test_canvas_and_size_are_those_of_transformers():
    """transformers computes scales in float64, we in float32 as torchtune does: no size tried tells them apart."""
    rng = random.Random(0)
    for _ in range(1500):
        h, w, max_num_tiles, tile_size = some_side(rng), some_side(rng), rng.randint(1, 9), rng.choice([14, 224, 560])
        canvas = get_canvas_best_fit(size_only(h, w), find_supported_resolutions(max_num_tiles, tile_size), False)
        case = f"{h} x {w}, {max_num_tiles} tiles of {tile_size}"
        assert canvas == tuple(int(x) for x in mllama.get_optimal_tiled_canvas(h, w, max_num_tiles, tile_size)), case
        assert get_inscribed_size((h, w), canvas, tile_size) == mllama.get_image_size_fit_to_canvas(h, w, *canvas, tile_size), case


def test_inscribed_size_by_exact_arithmetic():
    """One side fills its limit, the other is its share rounded down, or one less where the share is whole: floats lose there."""
    rng = random.Random(0)
    for _ in range(3000):
        h, w, target_h, target_w = (some_side(rng) for _ in range(4))
        max_size = rng.choice([None, some_side(rng)])
        limit_h = target_h if max_size is None else min(target_h, max(h, max_size))
        limit_w = target_w if max_size is None else min(target_w, max(w, max_size))
        scale = min(Fraction(limit_h, h), Fraction(limit_w, w))
        got = get_inscribed_size((h, w), (target_h, target_w), max_size)
        for new, side, limit in zip(got, (h, w), (limit_h, limit_w), strict=True):
            share = scale * side
            assert new == max(1, math.floor(share)) or (new == share - 1 and share < limit), f"{h, w} in {target_h, target_w}, {max_size}: {got}"
        assert got[0] == limit_h or got[1] == limit_w


def test_pad_dim_to_size():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert pad_dim_to_size(x, 3, 0).tolist() == [[1, 2], [3, 4], [0, 0]]
    assert pad_dim_to_size(x, 4, -1, fill=7).tolist() == [[1, 2, 7, 7], [3, 4, 7, 7]]
    assert torch.equal(pad_dim_to_size(x, 2, 1), x)
    assert pad_dim_to_size(torch.ones(2, 1, 3, dtype=torch.bool), 2, 1).tolist() == [[[True] * 3, [False] * 3]] * 2


def test_resize_by_hand():
    up = resize_with_pad(torch.tensor([[[0.0, 4.0]]]), (2, 4), "bilinear")
    assert up.tolist() == [[[0, 1, 3, 4], [0, 1, 3, 4]]]
    # halving: a triangle 4 pixels wide around each new pixel, weights 3/4, 3/4, 1/4 of 7/4 at the border
    down = resize_with_pad(torch.tensor([[[0.0, 0.0, 7.0, 7.0]]]), (1, 2), "bilinear")
    torch.testing.assert_close(down, torch.tensor([[[1.0, 6.0]]]))
    nearest = resize_with_pad(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), (1, 2), "nearest")
    exact = resize_with_pad(torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]]), (1, 2), "nearest-exact")
    assert nearest.tolist() == [[[1, 3]]] and exact.tolist() == [[[2, 4]]]


def test_resize_pads_below_and_right_and_bounds_growth():
    image = torch.full((1, 2, 4), 3.0)
    padded = resize_with_pad(image, (6, 8), "bilinear")
    assert padded[0, :4].eq(3).all() and padded[0, 4:].eq(0).all()
    kept = resize_with_pad(image, (6, 8), "bilinear", max_size=1)
    assert kept[0, :2, :4].eq(3).all() and kept.sum() == 24
    some = resize_with_pad(image, (6, 8), "bilinear", max_size=6)
    assert some[0, :3, :6].eq(3).all() and some.sum() == 54


@pytest.mark.parametrize("mode, pillow", [("bilinear", Image.Resampling.BILINEAR), ("bicubic", Image.Resampling.BICUBIC)])
@pytest.mark.parametrize("size", [(64, 90), (500, 640), (17, 3), (301, 200)])
def test_resize_against_pillow(size, mode, pillow):
    """Pillow resamples float pictures on its own code path, with the same filters."""
    grey = skimage.data.chelsea()[:200, :300, 1].astype(np.float32)
    h, w = get_inscribed_size((200, 300), size, None)
    want = torch.from_numpy(np.array(Image.fromarray(grey).resize((w, h), pillow)))
    got = resize_with_pad(torch.from_numpy(grey)[None], size, mode)
    taps = 4 * max(200 // h, 1) * 4 * max(300 // w, 1)  # bicubic, widened where it reduces
    assert_rounding_apart(got[0, :h, :w].contiguous(), want, K=taps, products=2)  # rows, then columns
    assert got[0, h:].eq(0).all() and got[0, :, w:].eq(0).all()


def filter_weights(old, new, mode):
    """[new, old] in float64: the antialiasing filter as Pillow states it, a triangle or Keys' cubic, widened where it reduces."""
    step = max(old / new, 1)
    t = (torch.arange(old, dtype=torch.float64) + 0.5 - (torch.arange(new, dtype=torch.float64)[:, None] + 0.5) * (old / new)).abs() / step
    if mode == "bilinear":
        weights = (1 - t).clamp(min=0)
    else:
        weights = torch.where(t < 1, (1.5 * t - 2.5) * t * t + 1, torch.where(t < 2, ((-0.5 * t + 2.5) * t - 4) * t + 2, 0))
    return weights / weights.sum(1, keepdim=True)


NARROW = [((400, 1), (300, 1)), ((400, 1), (1, 1)), ((400, 3), (300, 1)), ((5000, 2), (2240, 1)), ((1, 1), (30, 1)), ((1, 1), (3, 5)), ((2, 1), (560, 1)), ((1, 400), (1, 300)), ((2, 1), (1, 2))]  # fmt: skip


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size, new", NARROW)
def test_a_side_of_one_pixel(size, new, mode):
    """PyTorch 2.13's own antialiasing makes every row of a one pixel wide result from the first row's pixels."""
    bytes_ = torch.randint(0, 256, (*size, 3), dtype=torch.uint8).permute(2, 0, 1)
    rows, columns = (filter_weights(old, to, mode) for old, to in zip(size, new, strict=True))
    exact = rows @ bytes_.double() @ columns.T / 255
    for image in (bytes_, bytes_.contiguous()):
        for dtype in (torch.float64, torch.float32):
            # a pixel's place is rounded to the dtype, and neighbours are up to 1 apart
            allowed = 4 * max(size) * torch.finfo(dtype).eps
            assert (_resize(image.to(dtype) / 255, new, mode).double() - exact).abs().max() <= allowed
        assert (_resize(image, new, mode).double() - (exact * 255).clamp(0, 255)).abs().max() <= 0.51


@pytest.mark.parametrize("size", [(400, 1), (1, 400), (1, 1), (2, 1), (5000, 1), (1, 5000), (5000, 3), (3, 5000), (30000, 2), (2, 30000), (2000, 4)])
def test_long_and_thin_photos_against_transformers(size):
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3)).astype(np.uint8))
    theirs = mllama.MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=4, do_normalize=False)
    want = theirs(photo, return_tensors="pt")["pixel_values"][0, 0]
    ours = CLIPImageTransform(tile_size=56, max_num_tiles=4, dtype=torch.float32)({"image": photo})["image"]
    assert (ours - want[: len(ours)]).abs().max() <= 1 / 255 and not want[len(ours) :].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_resize_of_16_bits_is_computed_in_float32(dtype):
    image = torch.from_numpy(skimage.data.coffee()[:100, :150]).permute(2, 0, 1).to(dtype) / 255
    for mode in ("bilinear", "bicubic"):
        assert torch.equal(resize_with_pad(image, (60, 300), mode), resize_with_pad(image.float(), (60, 300), mode).to(dtype))


def test_resize_of_integers():
    image = torch.from_numpy(skimage.data.coffee()[:100, :150]).permute(2, 0, 1)
    want = resize_with_pad(image.float(), (60, 300), "bilinear")
    pillow = Image.fromarray(skimage.data.coffee()[:100, :150]).resize((90, 60), Image.Resampling.BILINEAR)
    bytes_ = resize_with_pad(image, (60, 300), "bilinear")[:, :, :90]
    assert (bytes_.int() - torch.from_numpy(np.array(pillow)).permute(2, 0, 1).int()).abs().max() <= 1
    assert torch.equal(resize_with_pad(image.int(), (60, 300), "bilinear"), want.round().int())
    edges = torch.tensor([[[0, 255, 0, 0, 255, 255]]], dtype=torch.uint8)
    assert resize_with_pad(edges, (4, 24), "bicubic").amax() == 255


@pytest.mark.gpu
def test_bytes_on_a_gpu():
    """Computed in float32 there, and bicubic overshoots must not wrap around."""
    edges = torch.tensor([[[0, 255, 0, 0, 255, 255]]], dtype=torch.uint8)
    want = resize_with_pad(edges.float(), (4, 24), "bicubic").round().clamp(0, 255)
    assert (resize_with_pad(edges.cuda(), (4, 24), "bicubic").cpu().float() - want).abs().max() <= 1


def test_layouts_give_the_same_numbers():
    rows = torch.rand(50, 70, 3)
    want = resize_with_pad(rows.permute(2, 0, 1).contiguous(), (90, 40), "bicubic")
    assert_rounding_apart(resize_with_pad(rows.permute(2, 0, 1), (90, 40), "bicubic"), want, K=16, products=2)
    wide = torch.rand(3, 50, 140)
    assert torch.equal(resize_with_pad(wide[:, :, ::2], (90, 40), "bilinear"), resize_with_pad(wide[:, :, ::2].contiguous(), (90, 40), "bilinear"))


@pytest.mark.parametrize("size", [(1, 1), (5000, 1), (1, 5000), (1, 2), (3, 2999)])
@pytest.mark.parametrize("resize_to_max_canvas", [False, True])
@pytest.mark.parametrize("resample", ["nearest", "bilinear", "bicubic"])
def test_extreme_sizes(size, resize_to_max_canvas, resample):
    """An even picture stays even where it lies, and the rest is padding."""
    transform = CLIPImageTransform(tile_size=28, dtype=torch.float32, resample=resample, resize_to_max_canvas=resize_to_max_canvas)
    sample = transform({"image": torch.full((3, *size), 0.5)})
    rows, columns = sample["aspect_ratio"].tolist()
    h, w = get_inscribed_size(size, (28 * rows, 28 * columns), None if resize_to_max_canvas else 28)
    canvas = sample["image"].view(rows, columns, 3, 28, 28).permute(2, 0, 3, 1, 4).reshape(3, 28 * rows, 28 * columns)
    torch.testing.assert_close(canvas[:, :h, :w], torch.full((3, h, w), 0.5))
    assert canvas.count_nonzero() == 3 * h * w


# tiles, aspect ratio, then pixels (0, 0, 0, 0), (0, 1, 5, 7), (-1, 2, 3, 4), (-1, 0, -1, -1), sum and sum of squares
TORCHTUNE_VALUES = [
    ((40, 70), {"tile_size": 28, "image_mean": MEAN, "image_std": STD, "dtype": torch.bfloat16}, 4, [2, 2],
     [-1.71875, 0.5390625, -0.01416015625, -1.7890625], -5719.3380, 14506.8240),
    ((40, 70), {"tile_size": 28, "image_mean": MEAN, "image_std": STD, "dtype": torch.float32}, 4, [2, 2],
     [-1.718358039855957, 0.5312002897262573, -0.012544815428555012, -1.7922625541687012], -5732.7499, 14512.1317),
    ((100, 33), {"tile_size": 28, "dtype": torch.float32, "resample": "bicubic", "resize_to_max_canvas": True}, 4, [4, 1],
     [0.007787287700921297, 0.9157371520996094, 0.0, 0.0], 3541.8869, 2144.8197),
    ((9, 150), {"tile_size": 14, "max_num_tiles": 6, "dtype": torch.float32, "resample": "nearest"}, 6, [1, 6],
     [0.0, 0.0, 0.6470588445663452, 0.0], 625.2942, 414.0286),
]  # fmt: skip


@pytest.mark.parametrize("size, options, tiles, ratio, pixels, total, squares", TORCHTUNE_VALUES)
@pytest.mark.parametrize("form", ["pil", "tensor", "channels last"])
def test_values_of_torchtune(form, size, options, tiles, ratio, pixels, total, squares):
    array = pattern(*size)
    image = Image.fromarray(array) if form == "pil" else torch.from_numpy(array).permute(2, 0, 1)
    sample = CLIPImageTransform(**options)({"image": image.contiguous() if form == "tensor" else image, "id": 3})
    got = sample["image"]
    assert got.shape[0] == tiles and sample["aspect_ratio"].tolist() == ratio and sample["id"] == 3
    assert got.dtype == options["dtype"] and sample["aspect_ratio"].dtype == torch.int64
    values = [got[0, 0, 0, 0], got[0, 1, 5, 7], got[-1, 2, 3, 4], got[-1, 0, -1, -1]]
    # Rounded by the resize twice, by the mean and by the deviation, each relative to values up to 2.
    torch.testing.assert_close(torch.stack(values).float(), torch.tensor(pixels), rtol=8 * EPS, atol=8 * EPS)
    assert got.double().sum().item() == pytest.approx(total, abs=2e-2) and got.double().square().sum().item() == pytest.approx(squares, abs=2e-2)


@pytest.mark.parametrize("name", PHOTOS)
@pytest.mark.parametrize("shape", [None, (300, 90), (110, 400), (20, 30)])
def test_photos_against_transformers(name, shape):
    """Same canvas, place and padding. Pixels differ by half a grey level of rounding: it resizes uint8, we resize floats."""
    photo = PHOTOS[name]()
    photo = photo if shape is None else photo[: shape[0], : shape[1]]
    options = {"image_mean": MEAN, "image_std": STD}
    theirs = mllama.MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=4, resample=Image.Resampling.BILINEAR, **options)
    want = theirs(Image.fromarray(photo), return_tensors="pt")
    ours = CLIPImageTransform(tile_size=56, max_num_tiles=4, dtype=torch.float32, **options)({"image": Image.fromarray(photo)})
    rows, columns = ours["aspect_ratio"].tolist()
    assert mllama.get_all_supported_aspect_ratios(4)[want["aspect_ratio_ids"].item() - 1] == (rows, columns)
    assert ours["image"].shape[0] == want["aspect_ratio_mask"].sum() == rows * columns
    apart = (ours["image"] - want["pixel_values"][0, 0, : rows * columns]).abs().amax((0, 2, 3))
    level = 1 / 255 / torch.tensor(STD)
    assert (apart <= 1.01 * level).all(), apart / level


def test_normalization_reaches_the_padding():
    sample = CLIPImageTransform(image_mean=(0.5,) * 3, image_std=(0.5,) * 3, tile_size=4, dtype=torch.float32)({"image": torch.ones(3, 2, 4)})
    assert sample["image"][0, :, :2].eq(1).all() and sample["image"][0, :, 2:].eq(-1).all()


def eight_bits(tensor):
    """[3, H, W] in 0..1 as the bytes [H, W, 3] it came from."""
    return (tensor * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()


def by_transformers(picture):
    return mllama.MllamaImageProcessorPil().process_image(picture, do_convert_rgb=True).transpose(1, 2, 0)


def png(depth, kind, row, transparent):
    """A PNG file of one row of pixels, kind 0 grey or 2 RGB, with one transparent colour."""
    chunk = lambda name, data: struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))  # noqa: E731
    width = len(row) * 8 // depth // (3 if kind == 2 else 1)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, kind, 0, 0, 0)), (b"tRNS", transparent), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return Image.open(io.BytesIO(b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)))


@pytest.mark.parametrize("mode", ["L", "P", "1", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_pictures_of_other_modes_are_converted_as_pillow_does(mode):
    picture = Image.fromarray(pattern(20, 30)).convert(mode)
    assert np.array_equal(eight_bits(image_to_tensor(picture, torch.float32)), np.array(picture.convert("RGB")))
    assert np.array_equal(eight_bits(image_to_tensor(picture, torch.float32)), by_transformers(picture))


GREYS = np.array([[0, 40, 80, 255]], np.uint8)
COLOURS = np.stack([GREYS, 255 - GREYS, GREYS // 2], -1)
ALPHA = np.array([[0, 255, 128, 51]], np.uint8)


def with_alpha(mode):
    picture = Image.fromarray(GREYS if mode in ("LA", "La") else COLOURS)
    picture.putalpha(Image.fromarray(ALPHA))
    return picture.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "RGBa", "La"])
def test_an_alpha_channel_is_laid_over_white(mode):
    """(a c + (255 - a) 255) / 255 by hand; Pillow rounds once where alpha is stored beside the colour, twice where it is multiplied into it."""
    a = ALPHA[..., None].astype(float)
    colours = np.repeat(GREYS[..., None], 3, -1) if mode in ("LA", "La") else COLOURS
    got = eight_bits(image_to_tensor(with_alpha(mode), torch.float32)).astype(int)
    assert got[0, 0].tolist() == [255] * 3
    assert np.abs(got - (a * colours + (255 - a) * 255) / 255).max() <= (2 if mode in ("RGBa", "La") else 1)
    if mode not in ("RGBa", "La"):  # of these transformers 5.24 shows what is hidden, or raises
        assert np.array_equal(got, by_transformers(with_alpha(mode)))


def palette_with(transparency):
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([9, 9, 9, 100, 0, 50, 0, 0, 255])
    picture.info["transparency"] = transparency
    return picture


def palette_of_rgba():
    picture = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "P")
    picture.putpalette([9, 9, 9, 0, 100, 0, 50, 255, 0, 0, 255, 255], "RGBA")
    return picture


def gif():
    saved = io.BytesIO()
    palette_with(0).save(saved, "GIF", transparency=0)
    return Image.open(saved)


WHITE = [255, 255, 255]
TRANSPARENT_COLOURS = {
    "palette, one entry": (lambda: palette_with(0), [WHITE, [100, 0, 50], [0, 0, 255]]),
    "palette, an alpha for each": (lambda: palette_with(bytes([0, 255])), [WHITE, [100, 0, 50], [0, 0, 255]]),
    "palette of RGBA": (palette_of_rgba, [WHITE, [100, 0, 50], [0, 0, 255]]),
    "GIF": (gif, [WHITE, [100, 0, 50], [0, 0, 255]]),
    "RGB": (lambda: png(8, 2, bytes([1, 2, 3, 1, 2, 4]), struct.pack(">3H", 1, 2, 3)), [WHITE, [1, 2, 4]]),
    "16-bit RGB": (
        lambda: png(16, 2, struct.pack(">6H", 0x1234, 0x5678, 0x9ABC, 0x1234, 0x5678, 0x9BBC), struct.pack(">3H", 0x1234, 0x5678, 0x9ABC)),
        [WHITE, [0x12, 0x56, 0x9B]],
    ),
    "16-bit RGB with a small value": (
        lambda: png(16, 2, struct.pack(">6H", 0x0034, 0x5678, 0, 0x3400, 0x5678, 0), struct.pack(">3H", 0x0034, 0x5678, 0)),
        [WHITE, [0x34, 0x56, 0]],
    ),
    "grey": (lambda: png(8, 0, bytes([0, 5, 6]), struct.pack(">H", 5)), [[0] * 3, WHITE, [6] * 3]),
    "one bit": (lambda: png(1, 0, bytes([0b01010101]), struct.pack(">H", 0)), [WHITE] * 8),
    "one bit, white": (lambda: png(1, 0, bytes([0b00001111]), struct.pack(">H", 1)), [[0] * 3] * 4 + [WHITE] * 4),
    "16-bit grey": (lambda: png(16, 0, struct.pack(">4H", 514, 513, 515, 65535), struct.pack(">H", 514)), [WHITE, [2] * 3, [2] * 3, WHITE]),
}


@pytest.mark.parametrize("kind", TRANSPARENT_COLOURS)
def test_a_transparent_colour_is_white(kind):
    make, want = TRANSPARENT_COLOURS[kind]
    assert eight_bits(image_to_tensor(make(), torch.float32)).tolist() == [want]
    if kind != "palette of RGBA" and "16-bit" not in kind:  # transformers 5.24 overlooks these, and all 16-bit grey is white there
        assert by_transformers(make()).tolist() == [want]


@pytest.mark.parametrize("mode", ["I;16", "I;16L", "I;16B", "I;16N"])
def test_sixteen_bits_keep_their_range(mode):
    """Pillow and transformers clip them at 255: a photo would be all white."""
    values = np.array([[0, 128, 129, 257, 32896, 65535]])
    stored = values.astype(">u2" if mode == "I;16B" or (mode == "I;16N" and sys.byteorder == "big") else "<u2")
    picture = Image.frombytes(mode, (6, 1), stored.tobytes())
    want = np.round(values / 257)
    assert eight_bits(image_to_tensor(picture, torch.float32))[..., 0].tolist() == want.tolist()


def test_modes_without_a_range():
    floats = np.array([[0.0, 100.0, 255.0]], np.float32)
    for picture in (Image.fromarray(floats), Image.fromarray(floats.astype(np.int32))):
        assert eight_bits(image_to_tensor(picture, torch.float32))[..., 0].tolist() == [[0, 100, 255]]
    for array, mode, span in (
        (floats * 2, "F", "0 to 510"),
        (floats / 255, "F", "0 to 1"),
        (floats - 255, "F", "-255 to 0"),
        ((floats * 257).astype(np.int32), "I", "0 to 65535"),
    ):
        with pytest.raises(InvalidArgument, match=f"^Input image has mode {mode} and values from {span}: scale them to 0..255$"):
            image_to_tensor(Image.fromarray(array), torch.float32)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32], ids=str)
def test_the_alpha_of_a_tensor_is_laid_over_white(dtype):
    image = torch.from_numpy(np.dstack([COLOURS, ALPHA])).permute(2, 0, 1)
    a, colours = ALPHA[..., None] / 255, COLOURS / 255
    got = image_to_tensor(image if dtype == torch.uint8 else image / 255, torch.float32).permute(1, 2, 0)
    torch.testing.assert_close(got, torch.from_numpy(a * colours + 1 - a).float(), rtol=4 * EPS, atol=4 * EPS)


def test_a_pil_image_is_taken_as_stored():
    """As transformers does: who opens the file turns it upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    saved = io.BytesIO()
    Image.fromarray(pattern(20, 30)).save(saved, "PNG", exif=exif)
    opened = Image.open(saved)
    assert opened.getexif()[ExifTags.Base.Orientation] == 6
    assert np.array_equal(eight_bits(image_to_tensor(opened, torch.float32)), pattern(20, 30))


def test_kinds_of_tensors():
    grey = torch.tensor([[0, 51], [102, 255]], dtype=torch.uint8)
    want = torch.tensor([[0.0, 0.2], [0.4, 1.0]]).expand(3, 2, 2)
    for image in (grey, grey[None], grey.expand(3, 2, 2), grey.float() / 255, grey[None].double() / 255):
        torch.testing.assert_close(image_to_tensor(image, torch.float32), want)
    assert image_to_tensor(grey, torch.bfloat16)[1, 0, 1] == torch.tensor(0.2, dtype=torch.bfloat16)


@pytest.mark.parametrize(
    "image, message",
    [
        ("photo.jpg", "Input image must be a PIL image or a torch.Tensor. Got str."),
        (np.zeros((4, 4, 3)), "Input image must be a PIL image or a torch.Tensor. Got ndarray."),
        (None, "Input image must be a PIL image or a torch.Tensor. Got NoneType."),
        (Image.new("RGB", (0, 5)), "Input image is 0 x 5 pixels."),
        (Image.new("I", (0, 3)), "Input image is 0 x 3 pixels."),
        (Image.new("F", (3, 0)), "Input image is 3 x 0 pixels."),
        (Image.new("I;16", (0, 3)), "Input image is 0 x 3 pixels."),
        (torch.zeros(8, 9, 3), "Input image has shape (8, 9, 3), not (3, H, W), (4, H, W), (1, H, W) or (H, W) with pixels: move the channels first"),
        (torch.zeros(2, 8, 9), "Input image has shape (2, 8, 9), not (3, H, W), (4, H, W), (1, H, W) or (H, W) with pixels"),
        (torch.zeros(3, 0, 9), "Input image has shape (3, 0, 9), not (3, H, W), (4, H, W), (1, H, W) or (H, W) with pixels"),
        (torch.zeros(2, 3, 4, 4), "Input image has shape (2, 3, 4, 4), not (3, H, W), (4, H, W), (1, H, W) or (H, W) with pixels"),
        (torch.full((3, 4, 4), 255.0), "Input image is torch.float32 with values up to 255, not in 0..1: divide by 255 or pass uint8"),
        (torch.full((3, 4, 4), torch.nan), "Input image is torch.float32 with values up to nan, not in 0..1: divide by 255 or pass uint8"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "Input image is torch.int64, neither uint8 nor floating point"),
    ],
)
def test_what_is_no_image(image, message):
    with pytest.raises(InvalidArgument) as error:
        CLIPImageTransform(tile_size=4)({"image": image})
    assert str(error.value) == message


@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_num_tiles": None}, "CLIPImageTransform: needs possible_resolutions or max_num_tiles, has possible_resolutions=None, max_num_tiles=None"),
        ({"image_mean": (0.5, 0.5, 0.5)}, "CLIPImageTransform: needs both image_mean and image_std or none, has image_mean=(0.5, 0.5, 0.5), image_std=None"),
        ({"image_mean": (0.5,), "image_std": (0.5, 0.5, 0.5)}, "CLIPImageTransform: image_mean is (0.5,), not one value for each of 3 channels"),
        ({"image_mean": (0, 0, 0), "image_std": (1, 0, 1)}, "CLIPImageTransform: image_std is (1, 0, 1), which divides by zero in torch.bfloat16"),
        ({"possible_resolutions": [(224, 300)]}, "CLIPImageTransform: possible_resolutions has (224, 300), not a multiple of tile_size 224"),
        ({"possible_resolutions": []}, "CLIPImageTransform: possible_resolutions is [], not one or more pairs (height, width)"),
        ({"max_num_tiles": 0}, "find_supported_resolutions: max_num_tiles is 0 and tile_size 224, both must be at least 1"),
        ({"resample": "sharp"}, "resample is 'sharp', not one of nearest, nearest_exact, bilinear, bicubic"),
        ({"dtype": torch.uint8}, "CLIPImageTransform: dtype is torch.uint8, not a floating point one"),
    ],
)
def test_refused_options(options, message):
    with pytest.raises(InvalidArgument) as error:
        CLIPImageTransform(**options)
    assert str(error.value) == message


def test_possible_resolutions_come_before_max_num_tiles():
    options = {"possible_resolutions": [(4, 8)], "tile_size": 4, "max_num_tiles": 1, "dtype": torch.float32}
    sample = CLIPImageTransform(**options)({"image": torch.ones(3, 4, 4)})
    assert sample["aspect_ratio"].tolist() == [1, 2]
    assert sample["image"][0].eq(1).all() and sample["image"][1].eq(0).all()


def test_resample_takes_an_enum():
    enum = importlib.import_module("enum").Enum("InterpolationMode", {"NEAREST_EXACT": "nearest-exact", "LANCZOS": "lanczos"})
    assert CLIPImageTransform(resample=enum.NEAREST_EXACT).resample == "nearest-exact"
    with pytest.raises(InvalidArgument, match="not one of nearest"):
        CLIPImageTransform(resample=enum.LANCZOS)


def test_pillow_is_optional(monkeypatch):
    picture = Image.new("RGB", (4, 4))
    monkeypatch.delitem(sys.modules, "PIL.Image")
    assert CLIPImageTransform(tile_size=4, dtype=torch.float32)({"image": torch.ones(3, 4, 4)})["image"].eq(1).all()
    with pytest.raises(InvalidArgument, match=r"must be a PIL image or a torch\.Tensor\. Got Image\."):
        CLIPImageTransform(tile_size=4)({"image": picture})


def visible(tokens, tiles, n=5, as_tensor=False):
    """For each image the text positions that see it, all of its columns checked to agree."""
    sample = {"tokens": torch.tensor(tokens) if as_tensor else tokens, "encoder_input": {"images": [torch.zeros(t, 3, 4, 4) for t in tiles]}}
    masks = VisionCrossAttentionMask(tile_size=4, patch_size=2, image_token_id=9)(sample)["encoder_mask"]
    assert sample["encoder_mask"] is masks
    for mask, t in zip(masks, tiles, strict=True):
        assert mask.dtype == torch.bool and mask.shape == (len(tokens), t * n)
        assert torch.equal(mask, mask[:, :1].repeat(1, t * n))
    return [mask[:, 0].nonzero().flatten().tolist() for mask in masks]


@pytest.mark.parametrize(
    "tokens, tiles, positions",
    [
        ([1, 9, 2, 3], [1], [[1, 2, 3]]),
        ([9, 1, 1, 9], [1, 4], [[0, 1, 2], [3]]),
        ([9, 9, 9], [1, 2, 1], [[0, 1, 2], [1, 2], [2]]),
        ([9, 1, 9, 9, 2, 2], [1, 2, 1], [[0, 1], [2, 3, 4, 5], [3, 4, 5]]),
        ([9, 9, 1, 9, 9, 9, 5, 9], [1, 1, 2, 1, 3, 4], [[0, 1, 2], [1, 2], [3, 4, 5, 6], [4, 5, 6], [5, 6], [7]]),
        ([1, 2], [], []),
        ([], [], []),
    ],
)
@pytest.mark.parametrize("as_tensor", [False, True])
def test_which_text_sees_which_image(tokens, tiles, positions, as_tensor):
    assert visible(tokens, tiles, as_tensor=as_tensor) == positions


def test_which_text_sees_which_image_by_definition():
    """A token sees an image that is not after it, unless an image token that follows text stands in between."""
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.choice([9, 9, 1, 2]) for _ in range(rng.randint(0, 30))]
        starts = [i for i, token in enumerate(tokens) if token == 9]
        want = [[p for p in range(i, len(tokens)) if not any(tokens[j] == 9 and tokens[j - 1] != 9 for j in range(i + 1, p + 1))] for i in starts]
        assert visible(tokens, [1 + i % 4 for i in range(len(starts))]) == want


@pytest.mark.parametrize("tokens, tiles, counts", [([1, 2], [1], (0, 1)), ([1, 9], [], (1, 0)), ([9, 9], [1], (2, 1))])
def test_image_tokens_without_images(tokens, tiles, counts):
    with pytest.raises(RuntimeError) as error:
        visible(tokens, tiles)
    assert str(error.value) == "The number of image tokens ({}) does not match the number of images ({}).".format(*counts)


def test_masks_take_no_memory_of_their_own():
    sample = {"tokens": [9] + [1] * 8191, "encoder_input": {"images": [torch.empty(4, 3, 560, 560, device="meta")]}}
    (mask,) = VisionCrossAttentionMask(tile_size=560, patch_size=14, image_token_id=9)(sample)["encoder_mask"]
    assert mask.shape == (8192, 6404) and mask.untyped_storage().nbytes() == 8192


def test_text_without_images_has_no_masks():
    assert VisionCrossAttentionMask(4, 2, 9)({"tokens": [1, 2]})["encoder_mask"] == []
    with pytest.raises(InvalidArgument) as error:
        VisionCrossAttentionMask(tile_size=4, patch_size=5, image_token_id=9)
    assert str(error.value) == "VisionCrossAttentionMask: patch_size is 5 and tile_size 4, not 1 <= patch_size <= tile_size"


@pytest.mark.parametrize(
    "path, name",
    [
        ("modules.transforms.vision_utils.tile_crop", "tile_crop"),
        ("modules.transforms.vision_utils.get_canvas_best_fit", "get_canvas_best_fit"),
        ("modules.transforms.vision_utils.get_canvas_best_fit", "find_supported_resolutions"),
        ("modules.transforms.vision_utils.get_inscribed_size", "get_inscribed_size"),
        ("modules.transforms.vision_utils.pad_dim_to_size", "pad_dim_to_size"),
        ("modules.transforms.vision_utils.resize_with_pad", "resize_with_pad"),
        ("modules.transforms", "VisionCrossAttentionMask"),
        ("data", "padded_collate_tiled_images_and_mask"),
        ("data", "padded_collate_sft"),
        ("data", "left_pad_sequence"),
        ("data", "Message"),
    ],
)
def test_import_paths_of_torchtune(path, name):
    found = getattr(importlib.import_module(f"fastfuse.{path}"), name)
    assert found.__name__ == name and found.__module__.startswith("fastfuse.data")
