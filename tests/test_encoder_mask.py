"""What is EncoderMask's own: any mask against the dense one, and what is made of it; test_ops.py has the ops, test_encoder_mask_calls.py the rest."""

import contextlib
import copy
import io
import pickle
import random
from functools import partial
from unittest import mock

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import fastfuse
from cases.encoder_mask import SMALL, between, blocks_of, from_tiles, intervals_of, words_of
from fastfuse.data import VisionCrossAttentionMask
from fastfuse.ops import _mask_ops
from fastfuse.ops._mask_ops import COLUMNS
from fastfuse.ops.encoder_mask import EncoderMask

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
IMAGE = 7  # the image token
KINDS = pytest.mark.parametrize("kind", ["interval", "bits"])


@contextlib.contextmanager
def routed(route, blocks=None):
    with fastfuse.backend(route), mock.patch.multiple(_mask_ops, **blocks) if blocks else contextlib.nullcontext():
        yield


def check(em, dense, kind, tokens=4):
    """Everything a mask says against the dense one."""
    dense = dense.cpu()
    assert (em.kind, em.shape) == (kind, tuple(dense.shape))
    made = em.rows, em.rows_empty, *em.blocks(tokens)
    want = (words_of if kind == "bits" else intervals_of)(dense), ~dense.any(-1), *blocks_of(dense, tokens)
    assert_close([t.cpu() for t in (*made, em.to_dense())], [*want, dense])  # exactly: these are no floats
    assert all(t.is_contiguous() for t in made)
    assert em.visible_fraction == (dense.sum().item() / dense.numel() if dense.numel() else 0)


LAYOUTS = ("plain", "plain", "transposed", "same rows", "same columns", "same batch", "crop", "every other", "bytes")
KINDS_OF_ROWS = ((0,), (1, 0), ("interval", 0), ("interval",), ("mosaic", 0), ("mosaic",), ("mosaic", 0.5, 1, 0))  # numbers: the share that is seen


def dense_mask(rng):
    """from_dense of a mask, the mask, and its name: rows that are empty, full, noise, intervals or mosaics of column blocks, in any layout."""
    b, s = rng.choice([1, 2, 2, 0]), rng.choice([*range(10), 8, 9])
    s_e = rng.choice([0, 1, 5, 31, 32, 33, 127, 128, 129, 256, 260, 300, 384])
    kinds, whole = rng.choice(KINDS_OF_ROWS), torch.rand(3) < 0.5  # which column blocks every mosaic sees
    rows = torch.zeros(b, s, s_e, dtype=torch.bool)
    for row in rows.flatten(0, 1):
        kind = rng.choice(kinds)
        if kind == "interval":
            lo, hi = sorted(rng.choices(range(s_e + 1), k=2))
            row[lo:hi] = True
        elif kind == "mosaic":
            row[:] = (whole | (torch.rand(3) < 0.2)).repeat_interleave(COLUMNS)[:s_e]
        else:
            row[:] = torch.rand(s_e) < kind
    mask = laid_out(rows.to(DEVICE), rng.choice(LAYOUTS))
    return partial(EncoderMask.from_dense, mask), (mask.cpu().contiguous().view(torch.uint8) != 0) if mask.numel() else mask.cpu(), "mask"


def laid_out(rows, layout):
    if layout == "transposed":
        return rows.mT.contiguous().mT
    if layout == "same rows":
        return rows[:, :1].expand_as(rows)
    if layout == "same columns":  # as VisionCrossAttentionMask has it
        return rows[..., :1].expand_as(rows)
    if layout == "same batch":
        return rows[:1].expand_as(rows)
    if layout == "crop":
        return F.pad(rows, (2, 1, 1, 0, 1, 0), value=True)[1:, 1:, 2:-1]
    if layout == "every other":
        return rows.repeat_interleave(2, 2)[..., ::2]
    if layout == "bytes":  # true, but not 1
        return (rows.to(torch.uint8) * torch.arange(1, 256, dtype=torch.uint8, device=rows.device).repeat(2)[: rows.shape[2]]).view(torch.bool)
    return rows


def tile_mask(rng):
    """Mllama's mask, in its dtypes and as a view."""
    b, s, n_img, n_tiles = rng.randint(0, 2), rng.randint(0, 6), rng.randint(0, 3), rng.randint(1, 4)
    tokens_per_tile = rng.choice([1, 2, 5, 29, 30, 31, 32, 33, 64, 100, 128, 161])
    visible = torch.rand(b, s, n_img, n_tiles) < rng.choice([0, 0.3, 0.7, 1])
    if rng.random() < 0.5:  # one image a row, its first tiles
        seen = torch.randint(n_img + 1, (b, s, 1, 1)) == torch.arange(n_img)[:, None]
        visible = seen & (torch.arange(n_tiles) < torch.randint(n_tiles + 1, (b, 1, n_img, 1)))
    visible = visible.to(DEVICE, rng.choice([torch.bool, torch.int64, torch.int32, torch.uint8]))
    visible = rng.choice([visible, laid_out(visible, "transposed")])
    return partial(EncoderMask.from_tiles, visible, tokens_per_tile), from_tiles(visible, tokens_per_tile).cpu(), "visible"


def token_mask(rng):
    """Image by image the mask that a data set's transform attaches to its samples, for the real tiles."""
    b, s, n_tiles, tokens_per_tile = rng.randint(1, 3), rng.randint(0, 12), rng.randint(1, 4), rng.randint(1, 40)
    tokens = torch.randint(IMAGE - 2, IMAGE + 1, (b, s))
    tiles = torch.randint(n_tiles + 1, (b, int((tokens == IMAGE).sum(1).max()) + rng.randint(0, 1)))
    dense = torch.zeros(b, s, tiles.shape[1], n_tiles, tokens_per_tile, dtype=torch.bool)
    for row, counts, seen in zip(tokens.tolist(), tiles.tolist(), dense, strict=True):
        sample = {"tokens": row, "encoder_input": {"images": [torch.zeros(1, 3, 4, 4)] * row.count(IMAGE)}}
        for i, mask in enumerate(VisionCrossAttentionMask(tile_size=4, patch_size=4, image_token_id=IMAGE)(sample)["encoder_mask"]):
            seen[:, i, : counts[i]] = mask[:, :1, None]  # every column of a mask is the same
    tokens, tiles = (t.to(DEVICE, rng.choice([torch.int64, torch.int32])) for t in (tokens, tiles))
    return partial(EncoderMask.from_tokens, tokens, IMAGE, tiles, n_tiles, tokens_per_tile), dense.flatten(2), "visible"


def agree(drawn, runs):
    """Masks of every kind that they can have against the dense ones; "auto" looks on a CPU alone."""
    for seed in range(runs):
        rng = random.Random(seed)
        make, dense, name = drawn(rng)
        tokens, single = rng.choice([1, 2, 3, 4, 16]), intervals_of(dense) is not None
        check(make(kind="bits"), dense, "bits", tokens)
        check(make(), dense, "interval" if single and not CUDA else "bits", tokens)
        if single:
            check(make(kind="interval"), dense, "interval", tokens)
        elif not CUDA:
            with pytest.raises(ValueError, match=f"row .* of {name} is not one interval"):
                make(kind="interval")


@pytest.mark.parametrize("drawn", [dense_mask, tile_mask])
@pytest.mark.parametrize("route, blocks, runs", [("auto", {}, 80), ("torch", {}, 80), ("triton", {}, 3), ("triton", SMALL, 2)])
def test_bits_intervals_lists_and_dense_agree(drawn, route, blocks, runs):
    with routed(route, blocks):
        agree(drawn, runs)


@pytest.mark.parametrize("route", ["auto", "torch"])
def test_from_tokens(route):
    with routed(route):
        agree(token_mask, 60)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16], ids=str)
def test_from_intervals(dtype):
    bounds = torch.randint(-50, 350, (2, 40, 2)).clamp(0, 300)  # in any order
    check(EncoderMask.from_intervals(bounds.to(DEVICE, dtype), 300), between(bounds, 300), "interval", 3)


WHOLE_WORDS = {  # layout: flags the kernel reads at once
    "plain": 4, "same rows": 4, "same batch": 4, "bytes": 4, "transposed": 1, "same columns": 1, "every other": 1, "crop": 1, "from column 2": 1, "from column 4": 4,
}  # fmt: skip


@pytest.mark.parametrize("layout", WHOLE_WORDS)
def test_flags_are_read_four_at_a_time_where_they_lie_so(layout, monkeypatch):
    kernel, read = _mask_ops.pack_mask_kernel, []

    class Spy:
        def __getitem__(self, grid):
            return lambda *args, **options: (read.append(options["FLAGS"]), kernel[grid](*args, **options))

    monkeypatch.setattr(_mask_ops, "pack_mask_kernel", Spy())
    rows = torch.rand(2, 3, 132, device=DEVICE) < 0.5
    rows[1] = rows[0] = rows[0, :1]  # so that every layout holds the same
    mask = laid_out(rows, layout)
    if layout.startswith("from"):
        mask = torch.cat([rows[..., :4], rows], 2)[..., int(layout[-1]) :][..., :132]
    want = EncoderMask.from_dense(mask.cpu().contiguous(), kind="bits")
    with routed("triton"):
        em = EncoderMask.from_dense(mask, kind="bits")
    assert_close([em.rows.cpu(), em.rows_empty.cpu()], [want.rows, want.rows_empty])
    assert read == [WHOLE_WORDS[layout]] and want.rows.any()


def some_masks(b=2, s=7, s_e=300):
    """A mask of each kind with rows that see nothing, and the dense one."""
    intervals = torch.randint(0, s_e + 1, (b, s, 2)).sort(-1).values
    dense = {"interval": between(intervals, s_e), "bits": torch.rand(b, s, s_e) < 0.5}
    for mask in dense.values():
        mask[:, 2] = False
    return {kind: (EncoderMask.from_dense(mask.to(DEVICE), kind=kind), mask) for kind, mask in dense.items()}


@KINDS
def test_parts_and_extensions(kind):
    em, dense = some_masks()[kind]
    b, s, s_e = em.shape
    last = dense[:, -1:]
    for part, want in (
        (em.narrow(2, 3), dense[:, 2:5]),
        (em.narrow(s, 0), dense[:, :0]),
        (em.last_row(), last),
        (em.extended(s + 4), torch.cat([dense, last.expand(b, 4, s_e)], 1)),
        (em.extended(s), dense),
        (em.last_row().extended(5), last.expand(b, 5, s_e)),
        (em.narrow(0, 0).extended(0), dense[:, :0]),
        *((em.widened(s_e + more), F.pad(dense, (0, more))) for more in (0, 1, 84, 85, 300)),  # 84: up to a whole column block
    ):
        check(part, want, kind, 3)
    # a part in memory of its own: neither all rows kept alive, nor an address that wide loads cannot read
    one, _ = some_masks(1)[kind]
    for part in (one.narrow(3, 2), one.last_row()):
        assert part.rows.untyped_storage().nbytes() == part.rows.numel() * 4 and part.rows.data_ptr() % 16 == 0


@KINDS
def test_rows_that_see_nothing_filled(kind):
    em, dense = some_masks()[kind]
    before, s_e = em.rows.clone(), em.shape[2]
    tensors = [torch.tensor(n, dtype=dtype, device=DEVICE) for n in (77, [0, 129]) for dtype in (torch.int64, torch.int32, torch.uint8)]
    for length in (None, 0, 1, 32, 150, s_e, *tensors, torch.tensor([9, 5, 1], device=DEVICE)[::2]):
        some = torch.arange(s_e) < torch.as_tensor(s_e if length is None else length).cpu().view(-1, 1, 1)
        check(em.filled(length), dense | ~dense.any(-1, keepdim=True) & some, kind, 3)
    assert torch.equal(em.rows, before) and em.rows_empty.any()  # the mask itself stays
    check(EncoderMask.from_dense(dense[..., :0].to(DEVICE), kind=kind).filled(), dense[..., :0], kind)


def test_concatenated_along_the_batch():
    (i, i_dense), (b, b_dense) = some_masks(2)["interval"], some_masks(1)["bits"]
    check(EncoderMask.cat([i, i]), torch.cat([i_dense, i_dense]), "interval", 4)
    check(EncoderMask.cat([b]), b_dense, "bits", 4)
    check(EncoderMask.cat([b, i, b]), torch.cat([b_dense, i_dense, b_dense]), "bits", 4)
    check(EncoderMask.cat(iter([i, b])), torch.cat([i_dense, b_dense]), "bits")


@KINDS
def test_pickled_copied_and_moved(kind):
    em, dense = some_masks()[kind]
    alone, saved = len(pickle.dumps(em)), io.BytesIO()
    assert em.blocks(4) is em.blocks(4) and em.blocks(2) is not em.blocks(4) and em.filled() is em.filled()
    assert len(pickle.dumps(em)) == alone, "caches are pickled"
    torch.save({"mask": em}, saved)
    saved.seek(0)
    for other in (pickle.loads(pickle.dumps(em)), copy.copy(em), copy.deepcopy(em), torch.load(saved, weights_only=False)["mask"]):
        assert other is not em and type(other) is EncoderMask
        check(other, dense, kind)
        assert list(other._blocks) == [4] and list(em._blocks) == [4, 2]
    assert copy.deepcopy(em).rows.data_ptr() != em.rows.data_ptr()
    assert em.to(DEVICE) is em and em.to(em.device, non_blocking=True) is em
    meta = em.to("meta")
    blocks = meta.blocks(4).column_blocks
    assert {t.device.type for t in (meta, meta.rows_empty, blocks)} == {"meta"} and (meta.kind, meta.shape) == (kind, em.shape)
    assert blocks.shape == em.blocks(4).column_blocks.shape
    assert repr(em) == f"EncoderMask({kind}, shape=(2, 7, 300), device='{em.device}')"
