"""Batches: every column of the mask must belong to the image and the text it says, and padding to nobody."""

import pytest
import torch

from fastfuse.data import left_pad_sequence, padded_collate_sft, padded_collate_tiled_images_and_mask
from fastfuse.data.transforms import VisionCrossAttentionMask
from fastfuse.errors import InvalidArgument

N = 2  # columns a tile


def sample(s, tiles=(), labels=True, start=1):
    """s tokens from `start` on, and images whose pixels and masks tell them apart: image i is i + 1, mask row r sees image i if r >= i."""
    made = {"tokens": list(range(start, start + s))}
    if tiles:
        masks = [(torch.arange(s) >= i)[:, None].repeat(1, t * N) for i, t in enumerate(tiles)]
        images = [torch.full((t, 1, 2, 2), i + 1.0) for i, t in enumerate(tiles)]
        made |= {"encoder_input": {"images": images, "aspect_ratio": [torch.tensor([t, 1]) for t in tiles]}, "encoder_mask": masks}
    return made | ({"labels": [10 * token for token in made["tokens"]]} if labels else {})


def ones_and_zeros(mask):
    return ["".join("01"[value] for value in row) for row in mask.int().tolist()]


def test_two_images_of_different_tiles():
    """What torchtune scrambles (D8): image i has the columns from i * t * n on."""
    batch = padded_collate_tiled_images_and_mask([sample(3, [1, 2])])
    assert list(batch) == ["tokens", "encoder_input", "encoder_mask", "labels"]
    assert batch["encoder_mask"].dtype == torch.bool
    assert ones_and_zeros(batch["encoder_mask"][0]) == ["11000000", "11001111", "11001111"]
    images = batch["encoder_input"]["images"]
    assert images.shape == (1, 2, 2, 1, 2, 2) and images[0, :, :, 0, 0, 0].tolist() == [[1, 0], [2, 2]]
    assert batch["encoder_input"]["aspect_ratio"].tolist() == [[[1, 1], [2, 1]]]


def test_samples_of_different_lengths_and_images():
    batch = padded_collate_tiled_images_and_mask([sample(3, [1]), sample(4, [2, 1, 1], start=5), sample(2, start=20)], padding_idx=99, ignore_idx=-1)
    assert batch["tokens"].tolist() == [[1, 2, 3, 99], [5, 6, 7, 8], [20, 21, 99, 99]]
    assert batch["labels"].tolist() == [[10, 20, 30, -1], [50, 60, 70, 80], [200, 210, -1, -1]]
    assert batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert batch["encoder_input"]["images"][..., 0, 0, 0].tolist() == [[[1, 0], [0, 0], [0, 0]], [[1, 1], [2, 0], [3, 0]], [[0, 0], [0, 0], [0, 0]]]
    assert batch["encoder_input"]["aspect_ratio"].tolist() == [[[1, 1], [1, 1], [1, 1]], [[2, 1], [1, 1], [1, 1]], [[1, 1], [1, 1], [1, 1]]]
    assert ones_and_zeros(batch["encoder_mask"][0]) == ["110000000000"] * 3 + ["0" * 12]
    assert ones_and_zeros(batch["encoder_mask"][1]) == ["111100000000", "111111000000", "111111001100", "111111001100"]
    assert ones_and_zeros(batch["encoder_mask"][2]) == ["0" * 12] * 4


def test_mask_against_its_definition():
    """Random batches: an entry of the batch is the entry of the sample's own mask, wherever there is one."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda low, high: int(torch.randint(low, high, (), generator=generator))  # noqa: E731
    for _ in range(20):
        samples = []
        for _ in range(draw(1, 4)):
            made = sample(draw(1, 9), [draw(1, 5) for _ in range(draw(0, 4))])
            if "encoder_mask" in made:
                made["encoder_mask"] = [torch.rand(mask.shape, generator=generator) < 0.5 for mask in made["encoder_mask"]]
            samples.append(made)
        for direction in ("left", "right"):
            batch = padded_collate_tiled_images_and_mask(samples, pad_direction=direction)
            if not any("encoder_mask" in made for made in samples):
                assert "encoder_mask" not in batch
                continue
            b, slots, t = batch["encoder_input"]["images"].shape[:3]
            mask = batch["encoder_mask"].view(b, -1, slots, t, N)
            left = mask.shape[1] if direction == "left" else 0
            seen = 0
            for row, made in enumerate(samples):
                first = left - len(made["tokens"]) if left else 0
                for i, own in enumerate(made.get("encoder_mask", [])):
                    own = own.view(own.shape[0], -1, N)
                    assert torch.equal(mask[row, first : first + own.shape[0], i, : own.shape[1]], own)
                    seen += int(own.sum())
            assert mask.sum() == seen  # nothing but what the samples said


def test_left_is_for_inference():
    batch = padded_collate_tiled_images_and_mask([sample(3, [1]), sample(2, [2], labels=False)], pad_direction="left")
    assert list(batch) == ["tokens", "encoder_input", "encoder_mask"]
    assert batch["tokens"].tolist() == [[1, 2, 3], [0, 1, 2]]
    assert ones_and_zeros(batch["encoder_mask"][0]) == ["1100"] * 3
    assert ones_and_zeros(batch["encoder_mask"][1]) == ["0000", "1111", "1111"]


def test_pad_max_tiles_and_images():
    training = padded_collate_tiled_images_and_mask([sample(2, [1, 2])], pad_max_tiles=3, pad_max_images=3, pad_aspect_ratio=(0, 0))
    assert training["encoder_input"]["images"][..., 0, 0, 0].tolist() == [[[1, 0, 0], [2, 2, 0], [0, 0, 0]]]
    assert training["encoder_input"]["aspect_ratio"].tolist() == [[[1, 1], [2, 1], [0, 0]]]
    assert ones_and_zeros(training["encoder_mask"][0]) == ["110000000000000000", "110000111100000000"]
    # a cache of three images' width is filled with two: the mask is as wide as the cache, and no third image is encoded
    inference = padded_collate_tiled_images_and_mask([sample(2, [1, 2])], pad_direction="left", pad_max_tiles=3, pad_max_images=3)
    assert torch.equal(inference["encoder_mask"], training["encoder_mask"])
    assert inference["encoder_input"]["images"].shape == (1, 2, 3, 1, 2, 2)
    assert torch.equal(inference["encoder_input"]["images"], training["encoder_input"]["images"][:, :2])
    assert inference["encoder_input"]["aspect_ratio"].tolist() == [[[1, 1], [2, 1]]]


def test_pad_to_multiple_of():
    batch = padded_collate_tiled_images_and_mask([sample(3, [1]), sample(5, [1])], pad_to_multiple_of=4)
    assert batch["tokens"].tolist() == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]]
    assert batch["labels"].tolist() == [[10, 20, 30] + [-100] * 5, [10, 20, 30, 40, 50] + [-100] * 3]
    assert ones_and_zeros(batch["encoder_mask"][0]) == ["11"] * 3 + ["00"] * 5
    assert padded_collate_tiled_images_and_mask([sample(8)], pad_to_multiple_of=4)["tokens"].shape == (1, 8)


def test_text_alone():
    """A batch without images is what a model without encoder input takes, whether the keys are missing or empty."""
    empty = sample(2) | {"encoder_input": {"images": [], "aspect_ratio": []}, "encoder_mask": []}
    batch = padded_collate_tiled_images_and_mask([sample(3), empty], pad_max_images=2, pad_max_tiles=4)
    assert {key: value.tolist() for key, value in batch.items()} == {"tokens": [[1, 2, 3], [1, 2, 0]], "labels": [[10, 20, 30], [10, 20, -100]]}


def test_labels_are_optional_and_may_be_tensors():
    batch = padded_collate_tiled_images_and_mask([{"tokens": torch.tensor([1, 2])}, {"tokens": [3]}])
    assert {key: value.tolist() for key, value in batch.items()} == {"tokens": [[1, 2], [3, 0]]}
    batch = padded_collate_tiled_images_and_mask([{"tokens": torch.tensor([1]), "labels": torch.tensor([4, 5])}])
    assert {key: value.tolist() for key, value in batch.items()} == {"tokens": [[1, 0]], "labels": [[4, 5]]}


def test_dtype_of_the_images_stays_and_samples_are_not_changed():
    made = sample(2, [1])
    made["encoder_input"]["images"] = [made["encoder_input"]["images"][0].bfloat16()]
    batch = padded_collate_tiled_images_and_mask([made, sample(4)])
    assert batch["encoder_input"]["images"].dtype == torch.bfloat16
    assert made["tokens"] == [1, 2] and made["encoder_mask"][0].shape == (2, 2)


def test_masks_of_the_transform_fit():
    """The masks VisionCrossAttentionMask makes are views without columns of their own."""
    made = {"tokens": [9, 1, 9, 9, 1], "labels": [0] * 5, "encoder_input": {"images": [torch.ones(t, 3, 4, 4) for t in (1, 2, 1)]}}
    made["encoder_input"]["aspect_ratio"] = [torch.tensor([1, t]) for t in (1, 2, 1)]
    batch = padded_collate_tiled_images_and_mask([VisionCrossAttentionMask(4, 2, image_token_id=9)(made)])
    seen, hidden = "11111", "00000"
    want = [seen + hidden * 5, seen + hidden * 5, hidden * 2 + seen * 2 + hidden * 2, hidden * 2 + seen * 2 + seen + hidden, hidden * 2 + seen * 3 + hidden]
    assert ones_and_zeros(batch["encoder_mask"][0]) == want


def with_parts(**parts):
    made = sample(2, [1, 1])
    made["encoder_input"] = made["encoder_input"] | {key: value for key, value in parts.items() if key != "encoder_mask"}
    return made | {key: value for key, value in parts.items() if key == "encoder_mask"}


@pytest.mark.parametrize(
    "batch, options, message",
    [
        ([], {}, "batch is empty"),
        ([sample(2)], {"pad_direction": "up"}, "pad_direction is 'up', neither 'left' nor 'right'"),
        ([sample(2)], {"pad_direction": "left", "pad_to_multiple_of": 8}, "pad_to_multiple_of=8 is not supported for pad_direction='left', only 1 is"),
        ([sample(2)], {"pad_to_multiple_of": 0}, "pad_to_multiple_of is 0, not at least 1"),
        ([sample(2, [1]), sample(2, [3])], {"pad_max_tiles": 2}, "pad_max_tiles is 2, there are 3 tiles in an image"),
        ([sample(2, [1]), sample(2, [1, 1])], {"pad_max_images": 1}, "pad_max_images is 1, there are 2 images in a sample"),
        ([sample(2), sample(2, labels=False)], {}, "1 of 2 samples have labels, all or none must"),
        ([with_parts(encoder_mask=[])], {}, "sample 0 has 2 images, 2 in aspect_ratio and 0 in encoder_mask"),
        ([sample(1), with_parts(aspect_ratio=[torch.tensor([1, 1])])], {}, "sample 1 has 2 images, 1 in aspect_ratio and 2 in encoder_mask"),
        ([with_parts(images=[torch.ones(1, 1, 2, 2), torch.ones(3, 4, 4)])], {}, "sample 0 has an image of shape (3, 4, 4), not (t, c, h, w) with tiles"),
        (
            [with_parts(images=[torch.ones(1, 1, 2, 2), torch.ones(1, 1, 2, 3)])],
            {},
            "the tiles of the batch differ in shape: [(1, 2, 2), (1, 2, 3)]",
        ),
        (
            [with_parts(encoder_mask=[torch.ones(2, 2, dtype=torch.bool), torch.ones(3, 2, dtype=torch.bool)])],
            {},
            "sample 0 has an encoder_mask of shape (3, 2) for 2 tokens and an image of 1 tiles",
        ),
        (
            [with_parts(encoder_mask=[torch.ones(2, 2, dtype=torch.bool), torch.ones(2, 3, dtype=torch.bool)])],
            {},
            "the masks of the batch have [2, 3] columns a tile, one number is needed",
        ),
    ],
)
def test_refusals(batch, options, message):
    with pytest.raises(InvalidArgument) as error:
        padded_collate_tiled_images_and_mask(batch, **options)
    assert str(error.value).replace("padded_collate_tiled_images_and_mask: ", "") == message


def test_sft():
    batch = padded_collate_sft([{"tokens": [1, 2, 3], "labels": [4, 5, 6]}, {"tokens": [1], "labels": [4, 3, 2, 1], "id": 7}])
    assert {key: value.tolist() for key, value in batch.items()} == {"tokens": [[1, 2, 3, 0], [1, 0, 0, 0]], "labels": [[4, 5, 6, -100], [4, 3, 2, 1]]}
    batch = padded_collate_sft([{"tokens": [1, 2, 3], "labels": [4, 5, 6]}], padding_idx=8, ignore_idx=-8, pad_to_multiple_of=2)
    assert {key: value.tolist() for key, value in batch.items()} == {"tokens": [[1, 2, 3, 8]], "labels": [[4, 5, 6, -8]]}
    batch = padded_collate_sft([sample(2, [1]), sample(1)])  # images are not its business, whether they are there or not
    assert {key: value.tolist() for key, value in batch.items()} == {"tokens": [[1, 2], [1, 0]], "labels": [[10, 20], [10, -100]]}
    with pytest.raises(InvalidArgument, match="padded_collate_sft: batch is empty"):
        padded_collate_sft([])


def test_left_pad_sequence():
    rows = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    assert left_pad_sequence(rows, batch_first=True, padding_value=9).tolist() == [[9, 1, 2], [3, 4, 5]]
    assert left_pad_sequence(rows).tolist() == [[0, 3], [1, 4], [2, 5]]
    assert left_pad_sequence([torch.ones(2, 3), torch.ones(1, 3)], True).tolist() == [[[1] * 3] * 2, [[0] * 3, [1] * 3]]


def test_contradictions_between_an_image_and_what_is_said_of_it_are_refused():
    cut = sample(3, [4])
    cut["encoder_input"]["images"][0] = cut["encoder_input"]["images"][0][:1]
    with pytest.raises(InvalidArgument, match=r"sample 1: an image has 1 tiles and aspect_ratio \(4, 1\)"):
        padded_collate_tiled_images_and_mask([sample(3), cut])


@pytest.mark.parametrize("direction", ["right", "left"])
def test_a_mask_of_numbers_says_what_is_visible(direction):
    """As in torchtune's own tests, which make it of torch.ones."""
    bools, numbers = sample(3, [1, 2]), sample(3, [1, 2])
    numbers["encoder_mask"] = [mask.float() * weight for mask, weight in zip(numbers["encoder_mask"], (1.0, 0.25), strict=True)]
    want, got = (padded_collate_tiled_images_and_mask([made, sample(4)], pad_direction=direction)["encoder_mask"] for made in (bools, numbers))
    assert got.dtype == torch.bool and want.any() and not want.all() and torch.equal(got, want)


@pytest.mark.parametrize("hidden", [-torch.inf, -1e9, torch.nan])
def test_a_mask_to_be_added_to_scores_is_refused(hidden):
    """There 0 is visible: taken as numbers it would show what it hides, and hide what it shows."""
    added = sample(3, [1])
    added["encoder_mask"] = [torch.zeros(3, N).masked_fill(~added["encoder_mask"][0], hidden)]
    added["encoder_mask"][0][0, 0] = hidden
    with pytest.raises(InvalidArgument, match=r"sample 0: encoder_mask is torch\.float32 with negative values or NaN: it says what is visible"):
        padded_collate_tiled_images_and_mask([added])
