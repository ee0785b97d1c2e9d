"""Batches: every column of the mask must belong to the image and the text it says, and padding to nobody."""

import random

import pytest
import torch
from torch import ones, zeros

from fastfuse.data import left_pad_sequence, padded_collate_sft
from fastfuse.data import padded_collate_tiled_images_and_mask as collate
from fastfuse.data.transforms import VisionCrossAttentionMask
from fastfuse.errors import InvalidArgument

N = 2  # columns a tile


def sample(s, tiles=(), labels=True, start=1, **parts):
    """s tokens from `start` on, and images whose pixels and masks tell them apart: image i is i + 1, mask row r sees image i if r >= i.
    parts: what it has in place of its own images, aspect_ratio or encoder_mask."""
    made = {"tokens": list(range(start, start + s))}
    if tiles:
        masks = [(torch.arange(s) >= i)[:, None].repeat(1, t * N) for i, t in enumerate(tiles)]
        images = {"images": [(i + 1) * ones(t, 1, 2, 2) for i, t in enumerate(tiles)], "aspect_ratio": [torch.tensor([t, 1]) for t in tiles]}
        mask = parts.pop("encoder_mask", masks)
        made |= {"encoder_input": images | parts, "encoder_mask": mask}
    return made | ({"labels": [10 * token for token in made["tokens"]]} if labels else {})


def said(batch):
    """What it holds, in numbers; of images the first pixel of each tile, of masks a text for each row."""
    inputs = batch.get("encoder_input", {})
    found = {key: value.tolist() for key, value in (batch | inputs).items() if key in ("tokens", "labels", "aspect_ratio")}
    if inputs:
        found["images"] = inputs["images"][..., 0, 0, 0].tolist()
        found["masks"] = [["".join("01"[value] for value in row) for row in mask] for mask in batch["encoder_mask"].int().tolist()]
    return found


def test_samples_of_different_lengths_and_images():
    """Image i has the columns from i * t * n on, which torchtune scrambles (D8). The images' dtype stays, and the samples as they are."""
    one, none = [1, 1], "0" * 12
    samples = [sample(3, [1]), sample(4, [2, 1, 1], start=5), sample(2, start=20)]
    for made in samples[:2]:
        made["encoder_input"]["images"] = [image.bfloat16() for image in made["encoder_input"]["images"]]
    batch = collate(samples, padding_idx=99, ignore_idx=-1)
    assert list(batch) == ["tokens", "encoder_input", "encoder_mask", "labels"]
    assert said(batch) == {
        "tokens": [[1, 2, 3, 99], [5, 6, 7, 8], [20, 21, 99, 99]],
        "labels": [[10, 20, 30, -1], [50, 60, 70, 80], [200, 210, -1, -1]],
        "aspect_ratio": [[one] * 3, [[2, 1], one, one], [one] * 3],
        "images": [[[1, 0], [0, 0], [0, 0]], [[1, 1], [2, 0], [3, 0]], [[0, 0]] * 3],
        "masks": [["110000000000"] * 3 + [none], ["111100000000", "111111000000", "111111001100", "111111001100"], [none] * 4],
    }
    assert batch["encoder_mask"].dtype == torch.bool and batch["tokens"].dtype == batch["labels"].dtype == torch.int64
    assert batch["encoder_input"]["images"].shape == (3, 3, 2, 1, 2, 2) and batch["encoder_input"]["images"].dtype == torch.bfloat16
    assert samples[0]["tokens"] == [1, 2, 3] and samples[0]["encoder_mask"][0].shape == (3, 2)


@pytest.mark.parametrize("direction", ["left", "right"])
def test_mask_against_its_definition(direction):
    """Random batches: an entry of the batch is the entry of the sample's own mask, wherever there is one. A mask may be of numbers, as in torchtune's tests."""
    rng = random.Random(0)
    for _ in range(20):
        samples = [sample(rng.randint(1, 8), [rng.randint(1, 4) for _ in range(rng.randint(0, 3))]) for _ in range(rng.randint(1, 3))]
        for made in samples:
            seen = [torch.rand(mask.shape) < 0.5 for mask in made.get("encoder_mask", [])]
            made["encoder_mask"] = [mask * 0.25 for mask in seen] if rng.random() < 0.5 else seen
        batch = collate(samples, pad_direction=direction)
        assert ("encoder_mask" in batch) == any(made["encoder_mask"] for made in samples)
        if "encoder_mask" in batch:
            mask = batch["encoder_mask"].unflatten(2, (*batch["encoder_input"]["images"].shape[1:3], N))
            for row, made in enumerate(samples):
                s = len(made["tokens"])
                first = mask.shape[1] - s if direction == "left" else 0
                for i, own in enumerate(made["encoder_mask"]):
                    assert torch.equal(mask[row, first : first + s, i, : own.shape[1] // N], own.bool().view(s, -1, N))
            assert mask.sum() == sum(own.bool().sum() for made in samples for own in made["encoder_mask"])  # nothing but what the samples said


def test_pad_max_tiles_and_images():
    found = said(collate([sample(2, [1, 2])], pad_max_tiles=3, pad_max_images=3, pad_aspect_ratio=(0, 0)))
    assert found["images"] == [[[1, 0, 0], [2, 2, 0], [0, 0, 0]]] and found["aspect_ratio"] == [[[1, 1], [2, 1], [0, 0]]]
    assert found["masks"] == [["110000000000000000", "110000111100000000"]]


def test_left_is_for_inference():
    """A cache of three images' width is filled with two: the mask is as wide as the cache, and no third image is encoded."""
    batch = collate([sample(1), sample(2, [1, 2], labels=False)], pad_direction="left", pad_max_tiles=3, pad_max_images=3)
    assert said(batch) == {
        "tokens": [[0, 1], [1, 2]],
        "aspect_ratio": [[[1, 1], [1, 1]], [[1, 1], [2, 1]]],
        "images": [[[0] * 3] * 2, [[1, 0, 0], [2, 2, 0]]],
        "masks": [["0" * 18] * 2, ["110000000000000000", "110000111100000000"]],
    }


def test_pad_to_multiple_of():
    found = said(collate([sample(3, [1]), sample(5, [1])], pad_to_multiple_of=4))
    assert found["tokens"] == [[1, 2, 3, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 0, 0, 0]] and found["labels"][0] == [10, 20, 30] + [-100] * 5
    assert found["masks"][0] == ["11"] * 3 + ["00"] * 5
    assert collate([sample(8)], pad_to_multiple_of=4)["tokens"].shape == (1, 8)


def test_text_alone():
    """A batch without images is what a model without encoder input takes, whether the keys are missing or empty; labels may be missing too, or tensors."""
    empty = sample(2) | {"encoder_input": {"images": [], "aspect_ratio": []}, "encoder_mask": []}
    for samples, want in (
        ([sample(3), empty], {"tokens": [[1, 2, 3], [1, 2, 0]], "labels": [[10, 20, 30], [10, 20, -100]]}),
        ([{"tokens": torch.tensor([1, 2])}, {"tokens": [3]}], {"tokens": [[1, 2], [3, 0]]}),
        ([{"tokens": torch.tensor([1]), "labels": torch.tensor([4, 5])}], {"tokens": [[1, 0]], "labels": [[4, 5]]}),
    ):
        batch = collate(samples, pad_max_images=2, pad_max_tiles=4)
        assert batch.keys() == want.keys() and said(batch) == want


def visible(tokens, tiles):
    """Of VisionCrossAttentionMask's masks of a text, 9 being an image: the positions that see each image, all of its columns checked to agree."""
    sample = {"tokens": tokens, "encoder_input": {"images": [zeros(t, 3, 4, 4) for t in tiles]}}
    assert VisionCrossAttentionMask(tile_size=4, patch_size=2, image_token_id=9)(sample) is sample
    for mask, t in zip(sample["encoder_mask"], tiles, strict=True):
        assert mask.dtype == torch.bool and torch.equal(mask, mask[:, :1].repeat(1, 5 * t)) and len(mask) == len(tokens)
    return [mask[:, 0].nonzero().flatten().tolist() for mask in sample["encoder_mask"]]


def test_which_text_sees_which_image():
    """A token sees an image that is not after it, unless an image token that follows text stands in between."""
    tokens = [9, 1, 9, 9, 2, 2]
    assert visible(tokens, [1, 2, 1]) == visible(torch.tensor(tokens), [1, 2, 1]) == [[0, 1], [2, 3, 4, 5], [3, 4, 5]]
    rng = random.Random(0)
    for _ in range(300):
        tokens = [rng.choice([9, 9, 1, 2]) for _ in range(rng.randint(0, 30))]
        starts = [i for i, token in enumerate(tokens) if token == 9]
        want = [[p for p in range(i, len(tokens)) if not any(tokens[j] == 9 and tokens[j - 1] != 9 for j in range(i + 1, p + 1))] for i in starts]
        assert visible(tokens, [1 + i % 4 for i in range(len(starts))]) == want


def test_the_masks_of_a_text_take_no_memory_of_their_own():
    long = {"tokens": [9] + [1] * 8191, "encoder_input": {"images": [torch.empty(4, 3, 560, 560, device="meta")]}}
    (mask,) = VisionCrossAttentionMask(tile_size=560, patch_size=14, image_token_id=9)(long)["encoder_mask"]
    assert mask.shape == (8192, 6404) and mask.untyped_storage().nbytes() == 8192
    assert VisionCrossAttentionMask(4, 2, 9)({"tokens": [1, 2]})["encoder_mask"] == []  # a text without images


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
        ([sample(2, [1, 1], encoder_mask=[])], {}, "sample 0 has 2 images, 2 in aspect_ratio and 0 in encoder_mask"),
        ([sample(1), sample(2, [1, 1], aspect_ratio=[[1, 1]])], {}, "sample 1 has 2 images, 1 in aspect_ratio and 2 in encoder_mask"),
        ([sample(2, [1], images=[ones(3, 4, 4)])], {}, "sample 0 has an image of shape (3, 4, 4), not (t, c, h, w) with tiles"),
        ([sample(2, [1, 1], images=[ones(1, 1, 2, 2), ones(1, 1, 2, 3)])], {}, "the tiles of the batch differ in shape: [(1, 2, 2), (1, 2, 3)]"),
        ([sample(2, [1], encoder_mask=[ones(3, 2)])], {}, "sample 0 has an encoder_mask of shape (3, 2) for 2 tokens and an image of 1 tiles"),
        ([sample(2, [1, 1], encoder_mask=[ones(2, 2), ones(2, 3)])], {}, "the masks of the batch have [2, 3] columns a tile, one number is needed"),
        ([sample(3), sample(3, [4], images=[ones(1, 1, 2, 2)])], {}, "sample 1: an image has 1 tiles and aspect_ratio (4, 1)"),
        # There 0 is visible: taken as numbers such masks would show what they hide, and hide what they show.
        *(
            (
                [sample(3, [1], encoder_mask=[torch.tensor([[hidden, 0]] * 3)])],
                {},
                "sample 0: encoder_mask is torch.float32 with negative values or NaN: it says what is visible, bool or nonzero",
            )
            for hidden in (-torch.inf, -1e9, torch.nan)
        ),
    ],
)
def test_refusals(batch, options, message):
    with pytest.raises(InvalidArgument) as error:
        collate(batch, **options)
    assert str(error.value).replace("padded_collate_tiled_images_and_mask: ", "") == message


def test_refused_masks():
    for tokens, tiles, counts in (([1, 2], [1], (0, 1)), ([9, 9], [1], (2, 1))):
        with pytest.raises(RuntimeError) as error:
            visible(tokens, tiles)
        assert str(error.value) == "The number of image tokens ({}) does not match the number of images ({}).".format(*counts)
    with pytest.raises(InvalidArgument, match=r"^VisionCrossAttentionMask: patch_size is 5 and tile_size 4, not 1 <= patch_size <= tile_size$"):
        VisionCrossAttentionMask(tile_size=4, patch_size=5, image_token_id=9)


def test_sft():
    """Images are not its business, whether they are there or not."""
    batch = [sample(3, [1]), {"tokens": [1], "labels": [4, 3, 2, 1], "id": 7}]
    made = padded_collate_sft(batch)
    assert made.keys() == {"tokens", "labels"}
    assert said(made) == {"tokens": [[1, 2, 3, 0], [1, 0, 0, 0]], "labels": [[10, 20, 30, -100], [4, 3, 2, 1]]}
    found = said(padded_collate_sft(batch[:1], padding_idx=8, ignore_idx=-8, pad_to_multiple_of=2))
    assert found == {"tokens": [[1, 2, 3, 8]], "labels": [[10, 20, 30, -8]]}
    with pytest.raises(InvalidArgument, match="padded_collate_sft: batch is empty"):
        padded_collate_sft([])


def test_left_pad_sequence():
    rows = [torch.tensor([1, 2]), torch.tensor([3, 4, 5])]
    assert left_pad_sequence(rows, batch_first=True, padding_value=9).tolist() == [[9, 1, 2], [3, 4, 5]]
    assert left_pad_sequence(rows).tolist() == [[0, 3], [1, 4], [2, 5]]
