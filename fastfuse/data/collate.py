"""From samples to a batch: text padded to one length, images to one number and one number of tiles, masks to match."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastfuse.errors import InvalidArgument

CROSS_ENTROPY_IGNORE_IDX = -100  # the label of tokens that are not trained on


def left_pad_sequence(sequences: Sequence[Tensor], batch_first: bool = False, padding_value: float = 0) -> Tensor:
    """Stack sequences [s_i, ...] padded at their start into [s, b, ...], or [b, s, ...] if batch_first."""
    return pad_sequence(list(sequences), batch_first=batch_first, padding_value=padding_value, padding_side="left")


def padded_collate_sft(batch: Sequence[Mapping[str, Any]], padding_idx: int = 0, ignore_idx: int = -100, *, pad_to_multiple_of: int = 1) -> dict[str, Tensor]:
    """Stack the "tokens" and "labels" of a batch into int64 [b, s], padded at the end with padding_idx and ignore_idx."""
    where = "padded_collate_sft"
    tokens, labels = _text(where, batch, "tokens"), _text(where, batch, "labels")
    length = _padded_length(where, [*tokens, *labels], pad_to_multiple_of)
    return {"tokens": _stack(tokens, length, padding_idx), "labels": _stack(labels, length, ignore_idx)}


def padded_collate_tiled_images_and_mask(
    batch: Sequence[Mapping[str, Any]],
    padding_idx: int = 0,
    ignore_idx: int = -100,
    pad_direction: str = "right",
    pad_max_tiles: int | None = None,
    pad_max_images: int | None = None,
    pad_to_multiple_of: int = 1,
    *,
    pad_aspect_ratio: tuple[int, int] = (1, 1),
) -> dict[str, Any]:
    """Collate text with tiled images: what fastfuse's vision models take, `model(**batch)` without the labels.

    Each sample has "tokens", "labels" unless it is for inference, and where it has images "encoder_input":
    {"images": [[t, c, h, w], ...], "aspect_ratio": [[2], ...]} and "encoder_mask": [[s, t * n], ...],
    bool, or numbers of which those that are not zero are visible.

    tokens, labels: int64 [b, s], padded with padding_idx and ignore_idx, s rounded up to pad_to_multiple_of.
    encoder_input: images [b, I, t, c, h, w], padded with zeros; aspect_ratio int64 [b, I, 2], with pad_aspect_ratio.
    encoder_mask: bool [b, s, I * t * n]; image i has the columns from i * t * n on, and nobody sees padding.
    t, I: the largest of the batch, or pad_max_tiles and pad_max_images.

    pad_direction "right" is for training. "left" is for inference: no labels, and pad_max_images widens the mask alone,
    to the width of the cache that the images' keys and values are written into: no blank image is encoded.
    A batch without any image has neither encoder_input nor encoder_mask. Raises InvalidArgument, a ValueError.
    """
    where = "padded_collate_tiled_images_and_mask"
    if pad_direction not in ("left", "right"):
        raise InvalidArgument(f"{where}: pad_direction is {pad_direction!r}, neither 'left' nor 'right'")
    left = pad_direction == "left"
    if left and pad_to_multiple_of != 1:
        raise InvalidArgument(f"{where}: pad_to_multiple_of={pad_to_multiple_of} is not supported for pad_direction='left', only 1 is")

    tokens = _text(where, batch, "tokens")
    have_labels = [sample.get("labels") is not None for sample in batch]
    if not left and any(have_labels) and not all(have_labels):
        raise InvalidArgument(f"{where}: {sum(have_labels)} of {len(batch)} samples have labels, all or none must")
    labels = _text(where, batch, "labels") if all(have_labels) and not left else []
    length = _padded_length(where, [*tokens, *labels], pad_to_multiple_of)

    collated: dict[str, Any] = {"tokens": _stack(tokens, length, padding_idx, left)}
    if any(_images(sample) for sample in batch):
        vision = _collate_images(where, batch, [len(t) for t in tokens], length, left, pad_max_tiles, pad_max_images, pad_aspect_ratio)
        collated["encoder_input"], collated["encoder_mask"] = vision
    if labels:
        collated["labels"] = _stack(labels, length, ignore_idx)
    return collated


def _collate_images(
    where: str,
    batch: Sequence[Mapping[str, Any]],
    lengths: list[int],
    length: int,
    left: bool,
    pad_max_tiles: int | None,
    pad_max_images: int | None,
    pad_aspect_ratio: tuple[int, int],
) -> tuple[dict[str, Tensor], Tensor]:
    for index, sample in enumerate(batch):
        _check_sample(f"{where}: sample {index}", sample, lengths[index])
    every = [image for sample in batch for image in _images(sample)]
    if len(shapes := {tuple(image.shape[1:]) for image in every}) > 1:
        raise InvalidArgument(f"{where}: the tiles of the batch differ in shape: {sorted(shapes)}")
    widths = {mask.shape[1] // image.shape[0] for sample in batch for image, mask in zip(_images(sample), sample.get("encoder_mask") or (), strict=True)}
    if len(widths) > 1:
        raise InvalidArgument(f"{where}: the masks of the batch have {sorted(widths)} columns a tile, one number is needed")
    (n,) = widths
    tiles = _at_least(where, "pad_max_tiles", pad_max_tiles, max(image.shape[0] for image in every), "tiles in an image")
    most = max(len(_images(sample)) for sample in batch)
    slots = _at_least(where, "pad_max_images", pad_max_images, most, "images in a sample")

    for index, sample in enumerate(batch):
        for image, ratio, m in zip(
            _images(sample), sample["encoder_input"]["aspect_ratio"] if _images(sample) else (), sample.get("encoder_mask") or (), strict=True
        ):
            h, w = torch.as_tensor(ratio).tolist()
            if h * w != image.shape[0]:
                raise InvalidArgument(f"{where}: sample {index}: an image has {image.shape[0]} tiles and aspect_ratio {(h, w)}")
            if m.dtype != torch.bool and not (m >= 0).all():
                raise InvalidArgument(
                    f"{where}: sample {index}: encoder_mask is {m.dtype} with negative values or NaN: it says what is visible, bool or nonzero"
                )

    b = len(batch)
    images = every[0].new_zeros(b, most if left else slots, tiles, *every[0].shape[1:])
    ratios = torch.tensor(pad_aspect_ratio, device=images.device).repeat(b, images.shape[1], 1)
    mask = torch.zeros(b, length, slots, tiles, n, dtype=torch.bool, device=images.device)
    for row, (sample, s) in enumerate(zip(batch, lengths, strict=True)):
        text = slice(length - s, length) if left else slice(s)
        for i, image in enumerate(_images(sample)):
            t = image.shape[0]
            images[row, i, :t] = image
            ratios[row, i] = torch.as_tensor(sample["encoder_input"]["aspect_ratio"][i])
            mask[row, text, i, :t] = sample["encoder_mask"][i].reshape(s, t, n)
    return {"images": images, "aspect_ratio": ratios}, mask.flatten(2)


def _images(sample: Mapping[str, Any]) -> Sequence[Tensor]:
    return (sample.get("encoder_input") or {}).get("images") or ()


def _check_sample(where: str, sample: Mapping[str, Any], s: int) -> None:
    images, masks = _images(sample), sample.get("encoder_mask") or ()
    ratios = (sample.get("encoder_input") or {}).get("aspect_ratio") or ()
    if not len(images) == len(masks) == len(ratios):
        raise InvalidArgument(f"{where} has {len(images)} images, {len(ratios)} in aspect_ratio and {len(masks)} in encoder_mask")
    for image, mask in zip(images, masks, strict=True):
        if image.ndim != 4 or image.shape[0] == 0:
            raise InvalidArgument(f"{where} has an image of shape {tuple(image.shape)}, not (t, c, h, w) with tiles")
        if mask.ndim != 2 or mask.shape[0] != s or mask.shape[1] % image.shape[0]:
            raise InvalidArgument(f"{where} has an encoder_mask of shape {tuple(mask.shape)} for {s} tokens and an image of {image.shape[0]} tiles")


def _at_least(where: str, name: str, asked: int | None, needed: int, what: str) -> int:
    if asked is not None and asked < needed:
        raise InvalidArgument(f"{where}: {name} is {asked}, there are {needed} {what}")
    return needed if asked is None else asked


def _text(where: str, batch: Sequence[Mapping[str, Any]], key: str) -> list[Tensor]:
    if not batch:
        raise InvalidArgument(f"{where}: batch is empty")
    return [torch.as_tensor(sample[key], dtype=torch.int64) for sample in batch]


def _padded_length(where: str, sequences: list[Tensor], multiple: int) -> int:
    if multiple < 1:
        raise InvalidArgument(f"{where}: pad_to_multiple_of is {multiple}, not at least 1")
    longest = max(len(sequence) for sequence in sequences)
    return -(-longest // multiple) * multiple


def _stack(sequences: list[Tensor], length: int, fill: int, left: bool = False) -> Tensor:
    stacked = sequences[0].new_full((len(sequences), length), fill)
    for row, sequence in zip(stacked, sequences, strict=True):
        row[length - len(sequence) if left else 0 :][: len(sequence)] = sequence
    return stacked
