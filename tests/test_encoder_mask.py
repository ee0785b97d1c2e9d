"""EncoderMask against loops over single rows and blocks; what it allocates, waits for and refuses."""

import contextlib
import copy
import io
import pickle
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from numerics import opcheck
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from waiting import OPS, Launched, NoReading

import fastfuse
from fastfuse.data import VisionCrossAttentionMask
from fastfuse.ops import _mask_ops, encoder_mask
from fastfuse.ops._mask_ops import COLUMNS, MaskBlocksArgs, PackMaskArgs, PackTilesArgs, mask_blocks, pack_mask, pack_tiles
from fastfuse.ops.encoder_mask import Blocks, EncoderMask

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUTES = ("auto", "torch", "triton")
IMAGE = 7  # the image token
# Blocks so small that every loop of a kernel is taken, and its carried counts matter, at sizes a loop in Python can check.
SMALL = {"_PACK_ROWS": 4, "_PACK_WORDS": 4, "_TILES_ROWS": 4, "_TILES_WORDS": 4, "_STATE_ROWS": 2, "_STATE_BLOCKS": 2, "_LIST_BLOCK": 2}


def examples(n: int, shrink: bool = True):
    phases = set(Phase) if shrink else set(Phase) - {Phase.shrink}  # with the interpreter that takes minutes
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def routed(route: str, blocks: dict | None = None):
    with fastfuse.backend(route), mock.patch.multiple(_mask_ops, **blocks) if blocks else contextlib.nullcontext():
        yield


# The truth, one row, word or block at a time.


def words_by_loop(dense: Tensor) -> Tensor:
    b, s, s_e = dense.shape
    n_words = 4 * -(-s_e // 128)
    rows = []
    for row in dense.flatten(0, 1).tolist():
        words = [sum(1 << (n % 32) for n in range(32 * w, min(32 * w + 32, s_e)) if row[n]) for w in range(n_words)]
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32).view(b, s, n_words)


def intervals_by_loop(dense: Tensor) -> Tensor | None:
    """[b, s, 2]; None where a row has a hole."""
    b, s, _ = dense.shape
    rows = []
    for row in dense.flatten(0, 1).tolist():
        seen = [n for n, visible in enumerate(row) if visible]
        if seen and seen != list(range(seen[0], seen[-1] + 1)):
            return None
        rows.append([seen[0], seen[-1] + 1] if seen else [0, 0])
    return torch.tensor(rows, dtype=torch.int32).view(b, s, 2)


def blocks_by_loop(dense: Tensor, tokens: int) -> Blocks:
    b, s, s_e = dense.shape
    nq, nk = -(-s // tokens), -(-s_e // COLUMNS)

    def state(i: int, q: int, k: int) -> str:
        rows = dense[i, q * tokens : (q + 1) * tokens]
        seeing = [row[k * COLUMNS : (k + 1) * COLUMNS] for row in rows if row.any()]
        if not any(part.any() for part in seeing):
            return "empty"
        return "full" if all(len(part) == COLUMNS and part.all() for part in seeing) else "partial"

    def lists(outer: int, inner: int, at: Callable) -> tuple[Tensor, Tensor]:
        listed, counts = [], []
        for i in range(b):
            for o in range(outer):
                states = [at(i, o, n) for n in range(inner)]
                full, partial = ([n for n in range(inner) if states[n] == what] for what in ("full", "partial"))
                listed.append(full + partial + [0] * (inner - len(full) - len(partial)))
                counts.append([len(full), len(full) + len(partial)])
        return torch.tensor(listed, dtype=torch.int32).view(b, outer, inner), torch.tensor(counts, dtype=torch.int32).view(b, outer, 2)

    return Blocks(*lists(nq, nk, state), *lists(nk, nq, lambda i, k, q: state(i, q, k)))


def same(got: Tensor, want: Tensor, what: str = "") -> None:
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    assert torch.equal(got, want), f"{what}: {got} is not {want}"


def check(em: EncoderMask, dense: Tensor, kind: str, tokens: int | None = None) -> None:
    """Everything a mask says against the dense one."""
    dense = dense.cpu()
    assert em.kind == kind and em.shape == tuple(dense.shape)
    assert em.rows.is_contiguous() and em.rows_empty.is_contiguous()
    same(em.rows, words_by_loop(dense) if kind == "bits" else intervals_by_loop(dense), "rows")
    same(em.rows_empty, torch.tensor([not any(row) for row in dense.flatten(0, 1).tolist()], dtype=torch.bool).view(dense.shape[:2]), "rows_empty")
    same(em.to_dense(), dense, "to_dense")
    assert em.visible_fraction == (dense.sum().item() / dense.numel() if dense.numel() else 0)
    if tokens is not None:
        blocks = em.blocks(tokens)
        for name, g, w in zip(Blocks._fields, blocks, blocks_by_loop(dense, tokens), strict=True):
            same(g, w, name)
            assert g.is_contiguous(), name


def auto(dense: Tensor) -> str:
    """What kind="auto" takes: it looks on a CPU alone."""
    return "interval" if not CUDA and intervals_by_loop(dense) is not None else "bits"


LAYOUTS = ("plain", "plain", "transposed", "same rows", "same columns", "same batch", "crop", "every other", "bytes")


KINDS_OF_ROWS = (("empty",), ("full", "empty"), ("interval", "empty"), ("interval",), ("mosaic", "empty"), ("mosaic",), ("mosaic", "noise", "full", "empty"))


@st.composite
def masks(draw) -> Tensor:
    """bool [b, s, s_e]: rows that are empty, full, intervals, mosaics of column blocks or noise, in any layout."""
    b, s = draw(st.sampled_from([1, 2, 2, 0])), draw(st.sampled_from([*range(10), 8, 9]))
    s_e = draw(st.sampled_from([0, 1, 5, 31, 32, 33, 127, 128, 129]) | st.sampled_from([256, 260, 300, 384]))
    kinds = draw(st.sampled_from(KINDS_OF_ROWS))
    bound = st.integers(0, s_e)
    whole = draw(st.integers(0, 7))  # which column blocks every mosaic sees
    rows = torch.zeros(b, s, s_e, dtype=torch.bool)
    for row in rows.flatten(0, 1):
        kind = draw(st.sampled_from(kinds))
        if kind == "full":
            row[:] = True
        elif kind == "interval":
            lo, hi = sorted((draw(bound), draw(bound)))
            row[lo:hi] = True
        elif kind == "mosaic":
            for k in range(3):
                row[k * COLUMNS : (k + 1) * COLUMNS] = bool((whole | draw(st.sampled_from([0, 0, 1, 2, 4]))) >> k & 1)
        elif kind == "noise":
            row[:] = torch.rand(s_e, generator=torch.Generator().manual_seed(draw(st.integers(0, 99)))) < 0.5
    return laid_out(rows.to(DEVICE), draw(st.sampled_from(LAYOUTS)))


def laid_out(rows: Tensor, layout: str) -> Tensor:
    b, s, s_e = rows.shape
    if layout == "transposed":
        return rows.mT.contiguous().mT
    if layout == "same rows":
        return rows[:, :1].expand(b, s, s_e) if s else rows
    if layout == "same columns":  # as VisionCrossAttentionMask has it
        return rows[..., :1].expand(b, s, s_e)
    if layout == "same batch":
        return rows[:1].expand(b, s, s_e)
    if layout == "crop":
        padded = torch.ones(b + 1, s + 1, s_e + 3, dtype=torch.bool, device=rows.device)
        padded[1:, 1:, 2:-1] = rows
        return padded[1:, 1:, 2:-1]
    if layout == "every other":
        return rows.repeat_interleave(2, 2)[..., ::2]
    if layout == "bytes":  # true, but not 1
        return (rows.to(torch.uint8) * torch.arange(1, 256, dtype=torch.uint8, device=rows.device).repeat(2)[:s_e]).view(torch.bool)
    return rows


def from_dense_agrees(mask: Tensor, tokens: int) -> None:
    dense = (mask.cpu().contiguous().view(torch.uint8) != 0) if mask.numel() else mask.cpu()
    check(EncoderMask.from_dense(mask, kind="bits"), dense, "bits", tokens)
    check(EncoderMask.from_dense(mask), dense, auto(dense))
    if intervals_by_loop(dense) is not None:
        check(EncoderMask.from_dense(mask, kind="interval"), dense, "interval", tokens)
    elif not CUDA:
        with pytest.raises(ValueError, match=r"row .* of mask is not one interval"):
            EncoderMask.from_dense(mask, kind="interval")


@examples(120)
@given(mask=masks(), tokens=st.sampled_from([1, 2, 3, 4, 16]), route=st.sampled_from(["auto", "torch"]))
def test_bits_intervals_lists_and_dense_agree(mask, tokens, route):
    with routed(route):
        from_dense_agrees(mask, tokens)


@examples(16, shrink=False)
@given(mask=masks(), tokens=st.sampled_from([3, 4, 16]), blocks=st.sampled_from([{}, SMALL]))
def test_kernels_agree(mask, tokens, blocks):
    with routed("triton", blocks):
        from_dense_agrees(mask, tokens)


def test_the_strategy_draws_every_state_and_kind():
    """That the property tests compare what they are for: every state of a block, intervals and masks with holes, empty ones."""
    found = set()

    @examples(120)
    @given(mask=masks())
    def draw(mask):
        dense = (mask.cpu().contiguous().view(torch.uint8) != 0) if mask.numel() else mask.cpu()
        found.add("interval" if intervals_by_loop(dense) is not None else "holes")
        full, seen = blocks_by_loop(dense, 4).column_block_counts.unbind(-1)
        found.update(
            name for name, there in {"full": full > 0, "partial": seen > full, "both": (full > 0) & (seen > full), "none": seen == 0}.items() if there.any()
        )
        found.add("batch" if dense.shape[0] else "no batch")
        found.add("rows" if dense.shape[1] else "no rows")

    draw()
    assert found == {"interval", "holes", "full", "partial", "both", "none", "batch", "no batch", "rows", "no rows"}


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
    same(em.rows, want.rows)
    same(em.rows_empty, want.rows_empty)
    assert read == [WHOLE_WORDS[layout]] and want.rows.any()


EDGES = (
    (0, 128),
    (0, 127),
    (1, 128),
    (0, 129),
    (127, 129),
    (127, 128),
    (128, 129),
    (0, 1),
    (128, 256),
    (129, 256),
    (0, 255),
    (255, 260),
    (256, 260),
    (0, 260),
    (9, 9),
)


@pytest.mark.parametrize("route, blocks", [("auto", {}), ("torch", {}), ("triton", {}), ("triton", SMALL)])
def test_edges_of_column_blocks(route, blocks):
    """A column more or less than a block, each in a token block of its own."""
    n = torch.arange(260, device=DEVICE)
    dense = torch.stack([(lo <= n) & (n < hi) for lo, hi in EDGES])[None]
    with routed(route, blocks):
        for kind in ("interval", "bits"):
            check(EncoderMask.from_dense(dense, kind=kind), dense, kind, 1)


def test_rows_that_see_nothing_have_no_say_in_what_is_full():
    dense = torch.zeros(1, 8, 260, dtype=torch.bool, device=DEVICE)
    dense[0, 1:4, :128] = True  # 0 and 4 to 7 see nothing
    dense[0, 2, 128:256] = True
    dense[0, 3, 256:] = True
    for route in ROUTES:
        with routed(route):
            for em in (EncoderMask.from_dense(dense, kind="bits"), EncoderMask.from_dense(dense[:, :3], kind="interval")):
                b = em.blocks(4)
                s = em.shape[1]
                assert b.column_block_counts[0, 0].tolist() == [1, 3 if s == 8 else 2], route
                assert b.column_blocks[0, 0].tolist() == ([0, 1, 2] if s == 8 else [0, 1, 0])
                assert b.token_block_counts[0].tolist() == [[1, 1], [0, 1], [0, 1 if s == 8 else 0]]
            last = EncoderMask.from_dense(torch.ones(1, 1, 130, dtype=torch.bool, device=DEVICE), kind="bits").blocks(4)
            assert last.column_block_counts.tolist() == [[[1, 2]]] and last.column_blocks.tolist() == [[[0, 1]]]  # s_e cuts the second


def direct_lists(states: Tensor, block: int) -> list[tuple[Tensor, Tensor]]:
    """block_list_kernel along both dims of states [b, NQ, NK]."""
    b, nq, nk = states.shape
    found = []
    for lists, n, strides in ((nq, nk, (nk, 1)), (nk, nq, (1, nk))):
        listed, counts = (torch.empty(shape, dtype=torch.int32, device=DEVICE) for shape in ((b, lists, n), (b, lists, 2)))
        _mask_ops.block_list_kernel[(lists, b)](states, listed, counts, nq * nk, *strides, n, BLOCK=block)
        found.append((listed, counts))
    return found


@pytest.mark.parametrize("shape, block", [((2, 2, 1000), 256), ((1, 40, 3), 16), ((1, 5, 16), 16), ((1, 3, 17), 16)])
def test_lists_longer_than_a_block_of_the_kernel(shape, block):
    states = torch.randint(0, 3, shape, dtype=torch.int8, device=DEVICE)
    states[:, 0] = 2
    directions = direct_lists(states, block) if shape[2] < 100 else direct_lists(states, block)[:1] if CUDA else None
    if directions is None:  # 1000 lists of the other direction would take the interpreter 10 s
        states = states[:, :, :1000]
        listed, counts = (torch.empty(s, dtype=torch.int32) for s in ((2, 2, 1000), (2, 2, 2)))
        _mask_ops.block_list_kernel[(2, 2)](states, listed, counts, 2000, 1000, 1, 1000, BLOCK=block)
        directions = [(listed, counts)]
    for (listed, counts), of in zip(directions, (states, states.mT), strict=False):
        for got, n, row in zip(listed.flatten(0, 1).tolist(), counts.flatten(0, 1).tolist(), of.flatten(0, 1).tolist(), strict=True):
            full, partial = ([i for i, state in enumerate(row) if state == which] for which in (2, 1))
            assert got == full + partial + [0] * (len(row) - len(full) - len(partial)) and n == [len(full), len(full) + len(partial)]


@pytest.mark.parametrize("tokens", [32, 100])
def test_bits_and_intervals_list_the_same_blocks_at_real_sizes(tokens):
    """Four images of 4 tiles, text before, between and after them: NQ and NK in the hundreds."""
    b, s, s_e = 2, 6001, 4 * 4 * 1601
    t = torch.arange(s, device=DEVICE)
    image = (t // 1400).clamp(max=4)
    lo, hi = (image - 1) * 6404, (image - 1) * 6404 + 1601 * (1 + image % 4)
    intervals = torch.stack([torch.where(image == 0, 0, lo), torch.where(image == 0, 0, hi)], -1).expand(b, s, 2).clone()
    intervals[1, ::7] = 0
    em = EncoderMask.from_intervals(intervals, s_e)
    tiles = torch.arange(16, device=DEVICE) * 1601
    visible = (em.rows[..., :1] <= tiles) & (tiles < em.rows[..., 1:])
    bits = EncoderMask.from_tiles(visible.view(b, s, 4, 4), 1601, kind="bits")
    blocks = em.blocks(tokens)
    assert (-(-s // tokens), -(-s_e // 128)) == blocks.column_blocks.shape[1:]
    assert all(torch.equal(x, y) for x, y in zip(blocks, bits.blocks(tokens), strict=True))
    assert (em.visible_fraction, em.rows_empty.tolist()) == (bits.visible_fraction, bits.rows_empty.tolist())
    assert bits.kind == "bits" and EncoderMask.from_tiles(visible.view(b, s, 4, 4), 1601).kind == ("bits" if CUDA else "interval")
    n = blocks.column_block_counts[0, 1500 // tokens].tolist()  # 2 tiles of the first image: 25 whole column blocks and a cut one
    assert n == [25, 26] and blocks.column_blocks[0, 1500 // tokens, :26].tolist() == list(range(26))


def tiles_by_loop(visible: Tensor, tokens_per_tile: int) -> Tensor:
    b, s, n_img, n_tiles = visible.shape
    dense = torch.zeros(b, s, n_img * n_tiles * tokens_per_tile, dtype=torch.bool)
    for image in range(n_img):
        for tile in range(n_tiles):
            first = (image * n_tiles + tile) * tokens_per_tile
            dense[:, :, first : first + tokens_per_tile] = visible[:, :, image, tile].cpu()[..., None] != 0
    return dense


@st.composite
def tile_masks(draw) -> tuple[Tensor, int]:
    """Mllama's mask, in its dtypes and as a view, and the tokens of a tile."""
    b, s, n_img, n_tiles = (draw(st.integers(low, high)) for low, high in ((0, 2), (0, 6), (0, 3), (1, 4)))
    tokens_per_tile = draw(st.sampled_from([1, 2, 5, 29, 30, 31, 32, 33, 64, 100, 128, 161]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    visible = torch.rand(b, s, n_img, n_tiles, generator=generator) < draw(st.sampled_from([0, 0.3, 0.7, 1]))
    if draw(st.booleans()):  # one image a row, its first tiles
        seen = torch.randint(0, n_img + 1, (b, s, 1, 1), generator=generator) == torch.arange(n_img)[:, None]
        visible = seen & (torch.arange(n_tiles) < torch.randint(0, n_tiles + 1, (b, 1, n_img, 1), generator=generator))
    visible = visible.to(draw(st.sampled_from([torch.bool, torch.int64, torch.int32, torch.uint8]))).to(DEVICE)
    return (visible.mT.contiguous().mT if draw(st.booleans()) else visible), tokens_per_tile


def from_tiles_agrees(visible: Tensor, tokens_per_tile: int) -> None:
    dense = tiles_by_loop(visible, tokens_per_tile)
    check(EncoderMask.from_tiles(visible, tokens_per_tile, kind="bits"), dense, "bits")
    check(EncoderMask.from_tiles(visible, tokens_per_tile), dense, auto(dense))
    if intervals_by_loop(dense) is not None:
        check(EncoderMask.from_tiles(visible, tokens_per_tile, kind="interval"), dense, "interval")
    elif not CUDA:
        with pytest.raises(ValueError, match=r"row .* of visible is not one interval"):
            EncoderMask.from_tiles(visible, tokens_per_tile, kind="interval")


@examples(80)
@given(tiled=tile_masks(), route=st.sampled_from(["auto", "torch"]))
def test_from_tiles(tiled, route):
    with routed(route):
        from_tiles_agrees(*tiled)


@examples(24, shrink=False)
@given(tiled=tile_masks(), blocks=st.sampled_from([{}, SMALL]))
def test_from_tiles_by_the_kernel(tiled, blocks):
    with routed("triton", blocks):
        from_tiles_agrees(*tiled)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("n_img", [1, 3])
def test_tiles_of_1601_tokens(n_img, route):
    visible = torch.rand(2, 3, n_img, 4, device=DEVICE) < 0.5
    with routed(route):
        em = EncoderMask.from_tiles(visible, 1601, kind="bits")
        assert em.rows.shape[2] == 4 * -(-n_img * 6404 // 128)
        same(em.to_dense(), tiles_by_loop(visible, 1601))
        same(EncoderMask.from_dense(em.to_dense(), kind="bits").rows, em.rows.cpu())


@examples(80)
@given(
    bounds=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    tokens=st.sampled_from([1, 3, 16]),
)
def test_from_intervals(bounds, dtype, tokens):
    dense = torch.tensor([[[lo <= n < hi for n in range(300)] for lo, hi in bounds]])
    check(EncoderMask.from_intervals(torch.tensor([bounds], dtype=dtype, device=DEVICE), 300), dense, "interval", tokens)


def tokens_by_loop(tokens: list[int], tiles: list[int], n_tiles: int, tokens_per_tile: int) -> Tensor:
    """[s, s_e] of one row: each image from its token up to the next one that does not follow directly on an image token."""
    starts = [t for t, token in enumerate(tokens) if token == IMAGE]
    dense = torch.zeros(len(tokens), len(tiles) * n_tiles * tokens_per_tile, dtype=torch.bool)
    for i, start in enumerate(starts):
        end = start + 1
        while end < len(tokens) and tokens[end] == IMAGE:
            end += 1
        while end < len(tokens) and tokens[end] != IMAGE:
            end += 1
        column = i * n_tiles * tokens_per_tile
        dense[start:end, column : column + tiles[i] * tokens_per_tile] = True
    return dense


@st.composite
def texts(draw) -> tuple[Tensor, Tensor, int, int]:
    b, s, n_tiles, tokens_per_tile = (draw(st.integers(low, high)) for low, high in ((1, 3), (0, 12), (1, 4), (1, 40)))
    tokens = torch.tensor([[draw(st.sampled_from([IMAGE, 1, 2])) for _ in range(s)] for _ in range(b)], dtype=torch.int64).view(b, s)
    n_img = int((tokens == IMAGE).sum(1).max()) + draw(st.integers(0, 1))
    tiles = torch.tensor([[draw(st.integers(0, n_tiles)) for _ in range(n_img)] for _ in range(b)], dtype=torch.int64).view(b, n_img)
    dtype = draw(st.sampled_from([torch.int64, torch.int32]))
    return tokens.to(DEVICE, dtype), tiles.to(DEVICE, dtype), n_tiles, tokens_per_tile


@examples(100)
@given(text=texts(), route=st.sampled_from(["auto", "torch"]))
def test_from_tokens(text, route):
    tokens, tiles, n_tiles, tokens_per_tile = text
    dense = torch.stack([tokens_by_loop(*row, n_tiles, tokens_per_tile) for row in zip(tokens.tolist(), tiles.tolist(), strict=True)])
    with routed(route):
        check(EncoderMask.from_tokens(tokens, IMAGE, tiles, n_tiles, tokens_per_tile), dense, auto(dense))
        check(EncoderMask.from_tokens(tokens, IMAGE, tiles, n_tiles, tokens_per_tile, kind="bits"), dense, "bits")


@pytest.mark.parametrize("route", ROUTES)
def test_from_tokens_is_the_data_pipelines_rule(route):
    """Image by image against the masks that a data set's transform attaches to its samples."""
    transform, n = VisionCrossAttentionMask(tile_size=4, patch_size=2, image_token_id=IMAGE), 5
    tokens = [
        [IMAGE, 1, 2, IMAGE, IMAGE, 3, 4, IMAGE, 5],  # a run of two between single ones
        [1, 2, IMAGE, 3, 3, 3, 3, 3, 3],  # text before the image
        [1, 2, 3, 4, 5, 6, 8, 9, 9],  # none
        [1, IMAGE, IMAGE, IMAGE, 5, IMAGE, 2, 3, 3],  # a run of three
        [IMAGE, 1, IMAGE, 2, IMAGE, 3, 4, 5, IMAGE],  # the last token of all
    ]
    tiles = [[2, 1, 3, 3], [3, 0, 0, 0], [0, 0, 0, 0], [1, 2, 3, 2], [1, 3, 2, 3]]
    with routed(route):
        em = EncoderMask.from_tokens(torch.tensor(tokens, device=DEVICE), IMAGE, torch.tensor(tiles, device=DEVICE), 3, n)
        dense = em.to_dense().cpu().unflatten(2, (4, 3, n))
    for row, counts, got in zip(tokens, tiles, dense, strict=True):
        images = [torch.zeros(t, 3, 4, 4) for t in counts if t]
        masks = transform({"tokens": row, "encoder_input": {"images": images}})["encoder_mask"]
        want = torch.zeros_like(got)
        for i, mask in enumerate(masks):
            want[:, i, : counts[i]] = mask.unflatten(1, (counts[i], n))
        assert torch.equal(got, want) and bool(want.any()) == bool(images)


def some_masks(b: int = 2, s: int = 7, s_e: int = 300) -> dict[str, tuple[EncoderMask, Tensor]]:
    """A mask of each kind with rows that see nothing, and the dense one."""
    intervals = torch.randint(0, s_e + 1, (b, s, 2)).sort(-1).values
    intervals[:, 2] = 0
    n = torch.arange(s_e)
    dense = {"interval": (intervals[..., :1] <= n) & (n < intervals[..., 1:]), "bits": torch.rand(b, s, s_e) < 0.5}
    dense["bits"][:, 3] = False
    found = {kind: EncoderMask.from_dense(d.to(DEVICE), kind=kind) for kind, d in dense.items()}
    return {kind: (em, dense[kind]) for kind, em in found.items()}


@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_parts_and_extensions(kind):
    em, dense = some_masks()[kind]
    b, s, s_e = em.shape
    check(em.narrow(2, 3), dense[:, 2:5], kind, 2)
    check(em.narrow(s, 0), dense[:, :0], kind, 2)
    check(em.last_row(), dense[:, -1:], kind, 1)
    check(em.extended(s + 4), torch.cat([dense, dense[:, -1:].expand(b, 4, s_e)], 1), kind, 4)
    check(em.extended(s), dense, kind)
    check(em.last_row().extended(5), dense[:, -1:].expand(b, 5, s_e), kind)
    for more in (0, 1, 84, 85, 300):  # 84: up to a whole column block
        check(em.widened(s_e + more), torch.cat([dense, torch.zeros(b, s, more, dtype=torch.bool)], 2), kind, 3)
    assert EncoderMask.from_dense(torch.zeros(2, 0, 9, dtype=torch.bool, device=DEVICE)).extended(0).shape == (2, 0, 9)
    # a part in memory of its own: neither all rows kept alive, nor an address that wide loads cannot read
    one, _ = some_masks(1)[kind]
    for part in (one.narrow(3, 2), one.last_row()):
        assert part.rows.untyped_storage().nbytes() == part.rows.numel() * 4 and part.rows.data_ptr() % 16 == 0


def filled_by_loop(dense: Tensor, lengths: list[int]) -> Tensor:
    dense = dense.clone()
    for rows, length in zip(dense, lengths, strict=True):
        for row in rows:
            if not row.any():
                row[:length] = True
    return dense


@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_rows_that_see_nothing_filled(kind):
    em, dense = some_masks()[kind]
    s_e = em.shape[2]
    before = em.rows.clone()
    check(em.filled(), filled_by_loop(dense, [s_e, s_e]), kind, 3)
    assert em.filled() is em.filled() and not em.filled().rows_empty.any()
    for length in (0, 1, 32, 150, s_e):
        check(em.filled(length), filled_by_loop(dense, [length] * 2), kind, 3)
    for dtype in (torch.int64, torch.int32, torch.uint8):
        check(em.filled(torch.tensor(77, dtype=dtype, device=DEVICE)), filled_by_loop(dense, [77, 77]), kind)
        check(em.filled(torch.tensor([0, 129], dtype=dtype, device=DEVICE)), filled_by_loop(dense, [0, 129]), kind, 4)
    assert em.filled(0).rows_empty.any() and em.filled(torch.tensor([9, 5, 1], device=DEVICE)[::2]).to_dense()[0].any(1).all()
    assert torch.equal(em.rows, before) and em.rows_empty.any()  # the mask itself stays
    nothing = EncoderMask.from_dense(torch.zeros(1, 2, 0, dtype=torch.bool, device=DEVICE), kind=kind)
    assert nothing.filled().rows_empty.all() and nothing.filled().shape == (1, 2, 0)


def test_concatenated_along_the_batch():
    (i, i_dense), (b, b_dense) = some_masks(2)["interval"], some_masks(1)["bits"]
    check(EncoderMask.cat([i, i]), torch.cat([i_dense, i_dense]), "interval", 4)
    check(EncoderMask.cat([b]), b_dense, "bits", 4)
    check(EncoderMask.cat([b, i, b]), torch.cat([b_dense, i_dense, b_dense]), "bits", 4)
    check(EncoderMask.cat(iter([i, b])), torch.cat([i_dense, b_dense]), "bits")


@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_pickled_copied_and_moved(kind):
    em, dense = some_masks()[kind]
    em.blocks(4), em.filled(), em.blocks(2)
    alone = len(pickle.dumps(EncoderMask.from_dense(dense.to(DEVICE), kind=kind)))
    assert len(pickle.dumps(em)) == alone, "caches are pickled"
    saved = io.BytesIO()
    torch.save({"mask": em}, saved)
    loaded = torch.load(io.BytesIO(saved.getvalue()), weights_only=False)["mask"]
    for other in (pickle.loads(pickle.dumps(em)), copy.copy(em), copy.deepcopy(em), loaded):
        assert other is not em and type(other) is EncoderMask
        check(other, dense, kind, 4)
        assert list(other._blocks) == [4] and list(em._blocks) == [4, 2]
    assert copy.deepcopy(em).rows.data_ptr() != em.rows.data_ptr()
    assert em.to(DEVICE) is em and em.to(em.device, non_blocking=True) is em
    meta = em.to("meta")
    assert (meta.device.type, meta.rows_empty.device.type, meta.kind, meta.shape) == ("meta", "meta", kind, em.shape)
    assert meta.blocks(4).column_blocks.device.type == "meta" and meta.blocks(4).column_blocks.shape == em.blocks(4).column_blocks.shape
    assert repr(em) == f"EncoderMask({kind}, shape=(2, 7, 300), device='{em.device}')"


def test_lists_are_made_once_for_each_size(monkeypatch):
    calls = []
    run = encoder_mask._run
    monkeypatch.setattr(encoder_mask, "_run", lambda op, *args: calls.append(op.name) or run(op, *args))
    em = EncoderMask.from_dense(torch.ones(1, 9, 200, dtype=torch.bool, device=DEVICE), kind="bits")
    assert em.blocks(4) is em.blocks(4) and em.blocks(2) is not em.blocks(4)
    assert calls == ["pack_mask", "mask_blocks", "mask_blocks"]


DENSE = torch.ones(2, 3, 4, dtype=torch.bool)
TILES = torch.ones(2, 3, 1, 4, dtype=torch.bool)
TOKENS = torch.tensor([[IMAGE, IMAGE, 1], [1, 1, 1]])


def mask_of(s: int = 3, s_e: int = 4) -> EncoderMask:
    return EncoderMask.from_dense(torch.ones(2, s, s_e, dtype=torch.bool))


REFUSED = {
    "float mask": (ValueError, "from_dense: mask is torch.float32, expected torch.bool", lambda: EncoderMask.from_dense(DENSE.float())),
    "integer mask": (ValueError, "from_dense: mask is torch.int64, expected torch.bool", lambda: EncoderMask.from_dense(DENSE.long())),
    "4-D mask": (ValueError, r"from_dense: mask has shape \(2, 1, 3, 4\), expected \[b, s, s_e\]", lambda: EncoderMask.from_dense(DENSE[:, None])),
    "kind": (ValueError, "from_dense: kind is 'dense', not one of auto, interval, bits", lambda: EncoderMask.from_dense(DENSE, kind="dense")),
    "kind of tiles": (ValueError, "from_tiles: kind is 'dense', not one of", lambda: EncoderMask.from_tiles(TILES, 5, kind="dense")),
    "kind of tokens": (ValueError, "from_tokens: kind is 'x', not one of", lambda: EncoderMask.from_tokens(TOKENS, IMAGE, TOKENS, 9, 5, kind="x")),
    "a hole": (
        ValueError,
        r"from_dense: kind is 'interval', row \(1, 2\) of mask is not one interval",
        lambda: EncoderMask.from_dense(DENSE & ~torch.eye(24)[21].view(2, 3, 4).bool(), kind="interval"),
    ),
    "a hole of tiles": (
        ValueError,
        r"from_tiles: kind is 'interval', row \(0, 1\) of visible is not one interval",
        lambda: EncoderMask.from_tiles(TILES & ~torch.eye(24)[5].view(2, 3, 1, 4).bool(), 5, kind="interval"),
    ),
    "float tiles": (ValueError, "from_tiles: visible is torch.float32, expected bool or integers", lambda: EncoderMask.from_tiles(TILES.float(), 5)),
    "3-D tiles": (ValueError, r"from_tiles: visible has shape \(2, 3, 4\), expected \[b, s, n_img, n_tiles\]", lambda: EncoderMask.from_tiles(DENSE, 5)),
    "tokens_per_tile": (ValueError, "from_tiles: tokens_per_tile is 0, expected 1 or more", lambda: EncoderMask.from_tiles(TILES, 0)),
    "tokens_per_tile's type": (TypeError, "from_tiles: tokens_per_tile is a float, expected a whole number", lambda: EncoderMask.from_tiles(TILES, 5.0)),
    "float intervals": (
        ValueError,
        "from_intervals: intervals is torch.float32, expected integers",
        lambda: EncoderMask.from_intervals(torch.ones(1, 2, 2), 4),
    ),
    "bool intervals": (ValueError, "from_intervals: intervals is torch.bool, expected integers", lambda: EncoderMask.from_intervals(DENSE[..., :2], 4)),
    "2-D intervals": (ValueError, r"intervals has shape \(2, 3\), expected \[b, s, 2\]", lambda: EncoderMask.from_intervals(TOKENS, 4)),
    "three bounds": (ValueError, r"intervals has shape \(2, 3, 4\), expected \[b, s, 2\]", lambda: EncoderMask.from_intervals(DENSE.long(), 4)),
    "a bound past s_e": (ValueError, "intervals has 5, expected 0 to s_e, which is 4", lambda: EncoderMask.from_intervals(torch.tensor([[[0, 5]]]), 4)),
    "a bound below 0": (ValueError, "intervals has -1, expected 0 to s_e, which is 4", lambda: EncoderMask.from_intervals(torch.tensor([[[-1, 2]]]), 4)),
    "a small dtype": (
        ValueError,
        "intervals has -1, expected 0 to s_e, which is 70000",
        lambda: EncoderMask.from_intervals(torch.tensor([[[-1, 2]]], dtype=torch.int16), 70000),
    ),
    "s_e": (ValueError, "from_intervals: s_e is -1, expected 0 or more", lambda: EncoderMask.from_intervals(torch.zeros(1, 1, 2, dtype=torch.int64), -1)),
    "more image tokens": (
        ValueError,
        "from_tokens: tokens has 2 image tokens in a row, tiles has 1 images",
        lambda: EncoderMask.from_tokens(TOKENS, IMAGE, torch.ones(2, 1, dtype=torch.int64), 4, 5),
    ),
    "more tiles": (ValueError, "from_tokens: tiles has 7, expected 0 to n_tiles, which is 4", lambda: EncoderMask.from_tokens(TOKENS, IMAGE, TOKENS, 4, 5)),
    "float tokens": (ValueError, "from_tokens: tokens is torch.float32, expected integers", lambda: EncoderMask.from_tokens(TOKENS.float(), 7, TOKENS, 9, 5)),
    "3-D tokens": (ValueError, r"from_tokens: tokens has shape \(2, 3, 4\), expected \[b, s\]", lambda: EncoderMask.from_tokens(DENSE.long(), 7, TOKENS, 9, 5)),
    "1-D tile counts": (ValueError, r"from_tokens: tiles has shape \(3,\), expected \[b, n_img\]", lambda: EncoderMask.from_tokens(TOKENS, 7, TOKENS[0], 9, 5)),
    "batches": (ValueError, "from_tokens: tokens has 2 rows, tiles 1", lambda: EncoderMask.from_tokens(TOKENS, IMAGE, TOKENS[:1], 9, 5)),
    "devices": (ValueError, "from_tokens: tokens is on cpu, tiles on meta", lambda: EncoderMask.from_tokens(TOKENS, IMAGE, TOKENS.to("meta"), 9, 5)),
    "n_tiles": (ValueError, "from_tokens: n_tiles is 0, expected 1 or more", lambda: EncoderMask.from_tokens(TOKENS, IMAGE, TOKENS, 0, 5)),
    "a token block": (ValueError, "blocks: tokens is 0, expected 1 or more", lambda: mask_of().blocks(0)),
    "a token block's type": (TypeError, "blocks: tokens is a str, expected a whole number", lambda: mask_of().blocks("4")),
    "a length past s_e": (ValueError, "filled: length is 5, the mask has 4 columns", lambda: mask_of().filled(5)),
    "a length below 0": (ValueError, "filled: length is -1, expected 0 or more", lambda: mask_of().filled(-1)),
    "a tensor's length past s_e": (ValueError, "filled: length has 5, expected 0 to s_e, which is 4", lambda: mask_of().filled(torch.tensor([1, 5]))),
    "a float length": (ValueError, "filled: length is torch.float32, expected integers", lambda: mask_of().filled(torch.ones(2))),
    "lengths": (ValueError, r"filled: length has shape \(3,\), expected \(\) or \(2,\)", lambda: mask_of().filled(torch.ones(3, dtype=torch.int64))),
    "a length elsewhere": (ValueError, "filled: length is on meta, the mask on cpu", lambda: mask_of().filled(torch.ones(2, dtype=torch.int64, device="meta"))),
    "no last row": (ValueError, r"last_row: the mask has shape \(2, 0, 4\), no row", lambda: mask_of(0).last_row()),
    "rows past the end": (ValueError, "narrow: rows 2 to 4 of a mask of 3", lambda: mask_of().narrow(2, 2)),
    "rows before the start": (ValueError, "narrow: rows -1 to 0 of a mask of 3", lambda: mask_of().narrow(-1, 1)),
    "fewer rows": (ValueError, "extended: s is 2, the mask has 3 rows", lambda: mask_of().extended(2)),
    "no row to repeat": (ValueError, "extended: s is 2, the mask has 0 rows", lambda: mask_of(0).extended(2)),
    "fewer columns": (ValueError, "widened: s_e is 3, the mask has 4 columns", lambda: mask_of().widened(3)),
    "nothing to concatenate": (ValueError, "cat: masks is empty, expected one or more", lambda: EncoderMask.cat([])),
    "rows differ": (ValueError, r"cat: masks have \(s, s_e\) \(3, 4\) and \(2, 4\)", lambda: EncoderMask.cat([mask_of(), mask_of(2)])),
    "columns differ": (ValueError, r"cat: masks have \(s, s_e\) \(3, 4\) and \(3, 5\)", lambda: EncoderMask.cat([mask_of(), mask_of(3, 5)])),
    "devices differ": (ValueError, "cat: masks are on cpu and meta", lambda: EncoderMask.cat([mask_of(), mask_of().to("meta")])),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    error, message, call = REFUSED[name]
    with pytest.raises(error, match=message) as e:
        call()
    assert type(e.value) is error and "\n" not in str(e.value)


ON_DEVICE = (
    "a hole",
    "a hole of tiles",
    "a bound past s_e",
    "a bound below 0",
    "a small dtype",
    "more image tokens",
    "more tiles",
    "a tensor's length past s_e",
)


@pytest.mark.skipif(CUDA, reason="an assertion on the device ends its context")
@pytest.mark.parametrize("name", ON_DEVICE)
def test_what_the_host_cannot_see_fails_an_assertion_of_the_device(name, monkeypatch):
    """A CPU's assertions are at once."""
    _, message, call = REFUSED[name]
    monkeypatch.setattr(encoder_mask, "values_are_at_hand", lambda t: False)
    with pytest.raises(RuntimeError, match=message.split(":")[0] if ":" in message else "EncoderMask"):
        call()


class Largest(TorchDispatchMode):
    """The most elements that any op's result has, inside of fastfuse's ops too. Views have no memory."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastfuse":
            with self:
                return OPS[func.overloadpacket.__name__]._backend_fns[DEVICE](*args)
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.elements = max([self.elements, *(t.numel() for t in tree_leaves(out) if isinstance(t, Tensor))])
        return out


class NoWaiting(Largest):
    """Fails where a result's size or a value of a tensor has to reach the host."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1])
        )
        assert name not in self.WAITING and not by_mask, f"{func} waits for the device"
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that were launched. What the interpreter does inside of one is out of every mode's sight."""
    names = []

    for name in [n for n in vars(_mask_ops) if n.endswith("_kernel")]:
        monkeypatch.setattr(_mask_ops, name, Launched(getattr(_mask_ops, name), name, lambda name, grid: names.append(name)))
    return names


def sources(s: int, n_img: int, tokens_per_tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(visible, intervals, tokens, tiles) of a batch of two."""
    tokens = torch.ones(2, s, dtype=torch.int64)
    tokens[:, ::8] = IMAGE
    tokens[:, (8 * n_img) :] = 1
    n_tiles, b = 4, 2
    visible = torch.zeros(b, s, n_img, n_tiles, dtype=torch.int64)
    for image in range(n_img):
        visible[:, 8 * image : 8 * image + 8, image] = 1
    intervals = torch.randint(0, n_img * n_tiles * tokens_per_tile, (b, s, 2))
    tiles = torch.full((b, n_img), n_tiles)
    return tuple(t.to(DEVICE) for t in (visible, intervals, tokens, tiles))


def build_all(visible: Tensor, intervals: Tensor, tokens: Tensor, tiles: Tensor, tokens_per_tile: int, length: Tensor) -> dict[str, Callable[[], EncoderMask]]:
    """Every way to a mask that sees no dense one."""
    s_e = visible.shape[2] * visible.shape[3] * tokens_per_tile
    return {
        "bits": lambda: EncoderMask.from_tiles(visible, tokens_per_tile, kind="bits"),
        "tiles": lambda: EncoderMask.from_tiles(visible, tokens_per_tile, kind="interval"),
        "intervals": lambda: EncoderMask.from_intervals(intervals, s_e),
        "tokens": lambda: EncoderMask.from_tokens(tokens, IMAGE, tiles, visible.shape[3], tokens_per_tile),
        "filled": lambda: EncoderMask.from_tiles(visible, tokens_per_tile, kind="bits").filled(),
        "filled to": lambda: EncoderMask.from_tokens(tokens, IMAGE, tiles, visible.shape[3], tokens_per_tile, kind="bits").filled(length),
        "cat": lambda: EncoderMask.cat([EncoderMask.from_intervals(intervals, s_e), EncoderMask.from_tiles(visible, tokens_per_tile, kind="bits")]),
    }


@pytest.mark.parametrize("tokens_per_tile, route", [(1601, "auto"), (1601, "torch"), (100, "auto"), (100, "triton")])  # 200 lists are 4 s to the interpreter
def test_nothing_of_the_dense_masks_size_is_made(tokens_per_tile, route, launches):
    s, n_img = 32, 2
    given, length = sources(s, n_img, tokens_per_tile), torch.tensor([3, 700], device=DEVICE)
    dense = 2 * s * n_img * 4 * tokens_per_tile
    made = []
    with routed(route):
        for name, build in build_all(*given, tokens_per_tile, length).items():
            with Largest() as mode:
                em = build()
                made.append(em)
                em.blocks(16)
                em.last_row().extended(4).widened(em.shape[2] + 1)
            assert 0 < mode.elements <= dense // 8, name
            assert torch.equal(em.rows_empty, ~em.to_dense().any(-1)), name  # it is a mask
        if route != "torch" and (CUDA or route == "triton"):
            assert {"pack_tiles_kernel", "block_states_kernel", "block_list_kernel"} <= set(launches)
        for em in made[:2]:
            with Largest() as mode:
                mask = em.to_dense()
            assert mode.elements >= dense  # the count finds one out
        with Largest() as mode:
            EncoderMask.from_dense(mask, kind="bits")
        assert mode.elements >= (dense if route == "torch" or (route == "auto" and not CUDA) else 1)


@pytest.mark.parametrize("route", ROUTES)
def test_nothing_waits_for_the_device(route, launches, monkeypatch):
    """Without the look at the values that a CPU allows."""
    monkeypatch.setattr(encoder_mask, "values_are_at_hand", lambda t: False)
    given, length = sources(8, 1, 100), torch.tensor([3, 300], device=DEVICE)
    dense = torch.ones(2, 8, 200, dtype=torch.bool, device=DEVICE)
    builds = build_all(*given, 100, length) | {f"dense {kind}": lambda kind=kind: EncoderMask.from_dense(dense, kind=kind) for kind in encoder_mask.KINDS}
    if route == "triton" and not CUDA:  # what surrounds the kernels is the same for all
        builds = {name: builds[name] for name in ("bits", "intervals", "dense bits", "dense interval")}
    kinds = {}
    with routed(route), NoReading():
        for name, build in builds.items():
            with NoWaiting():
                em = build()
                em.blocks(4)
                em.filled(length.clamp(max=200)[:1].expand(em.shape[0])).filled(5).filled().blocks(4)
                EncoderMask.cat([em.last_row().extended(3).widened(900), em.narrow(1, 3).widened(900)]).to_dense()
                em.to(DEVICE), repr(em)
            kinds[name] = em.kind
    assert [name for name, kind in kinds.items() if kind == "interval"] == [n for n in ("tiles", "intervals", "dense interval") if n in builds]
    assert (len(launches) > 0) == (CUDA or route == "triton") or route == "torch"


def test_waiting_is_found_out(monkeypatch):
    dense = torch.ones(2, 8, 200, dtype=torch.bool, device=DEVICE)
    em = EncoderMask.from_dense(dense)
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        em.visible_fraction  # noqa: B018
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        dense[em.rows_empty]
    monkeypatch.setattr(encoder_mask, "values_are_at_hand", lambda t: True)
    for mode in (NoWaiting, NoReading):
        with pytest.raises(AssertionError, match="waits"), mode():
            EncoderMask.from_dense(dense)


SAMPLES = {"rows": (2, 7, 300), "whole blocks": (1, 4, 256), "no batch": (0, 3, 130), "no rows": (2, 0, 130), "no columns": (1, 3, 0)}


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("sample", SAMPLES)
def test_ops(sample, interpret):
    """Schemas, strides of what is faked, symbolic sizes."""
    b, s, s_e = SAMPLES[sample]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", *(("test_aot_dispatch_dynamic",) if sample == "rows" and not interpret else ()))
    mask = torch.rand(b, s, s_e, device=DEVICE) < 0.5
    opcheck(pack_mask, PackMaskArgs(mask, interpret), tests)
    for layout in ("transposed", "same rows") if b else ():  # opcheck cannot copy an expanded tensor of nothing
        opcheck(pack_mask, PackMaskArgs(laid_out(mask, layout), interpret), tests[:3])
    visible = torch.rand(b, s, 2 if s_e else 0, device=DEVICE) < 0.5
    opcheck(pack_tiles, PackTilesArgs(visible, 150, interpret), tests)
    for em in (EncoderMask.from_dense(mask, kind="bits"), EncoderMask.from_intervals(torch.zeros(b, s, 2, dtype=torch.int64, device=DEVICE), s_e)):
        opcheck(mask_blocks, MaskBlocksArgs(em.rows, em.rows_empty, s_e, 4, em.kind == "bits", interpret), tests)


def everything(em: EncoderMask) -> list[Tensor]:
    blocks, again, filled = em.blocks(32), em.blocks(32), em.filled()
    return [em.rows, em.rows_empty, *blocks, *again, filled.rows, filled.rows_empty, *filled.blocks(16), em.narrow(1, 3).rows]


def all_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want) and all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_compiled_one_graph_for_every_size():
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda mask: everything(EncoderMask.from_dense(mask)), fullgraph=True, backend=counter)
    for shape in ((2, 40, 300), (4, 96, 1024)):
        mask = torch.rand(shape, device=DEVICE) < 0.5
        mask[:, ::3] = False
        for dim in range(3):
            torch._dynamo.mark_dynamic(mask, dim)
        all_equal(run(mask), everything(EncoderMask.from_dense(mask, kind="bits")))
    assert counter.frame_count == 1


@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_a_mask_made_outside_of_what_is_compiled(kind):
    run = torch.compile(lambda em, x: [x + em.rows_empty.sum(), *everything(em)], fullgraph=True, backend="aot_eager")
    x = torch.ones(3, dtype=torch.int64, device=DEVICE)
    em, dense = some_masks(2, 40)[kind]
    fresh = EncoderMask.from_dense(dense.to(DEVICE), kind=kind)
    for _ in range(2):  # the second time with the lists that the first one left
        first, *rest = run(em, x)
        assert torch.equal(first, x + em.rows_empty.sum()) and first[0] > 1
        all_equal(rest, everything(fresh))
    assert list(em._blocks) == [32] and type(em.blocks(32)) is Blocks and em.filled().rows is rest[10]


def test_compiled_from_tokens_tiles_and_intervals():
    visible, intervals, tokens, tiles = sources(32, 2, 100)

    def build(visible, intervals, tokens, tiles):
        made = (EncoderMask.from_tiles(visible, 100), EncoderMask.from_tokens(tokens, IMAGE, tiles, 4, 100), EncoderMask.from_intervals(intervals, 800))
        return made, [t for em in made for t in everything(em)]

    made, got = torch.compile(build, fullgraph=True, backend="aot_eager")(visible, intervals, tokens, tiles)
    assert [em.kind for em in made] == ["bits", "bits", "interval"] and all(type(em) is EncoderMask for em in made)
    want = (EncoderMask.from_tiles(visible, 100, kind="bits"), EncoderMask.from_tokens(tokens, IMAGE, tiles, 4, 100, kind="bits"), made[2])
    all_equal(got, [t for em in want for t in everything(em)])


@pytest.mark.skipif(CUDA, reason="an assertion on the device ends its context")
def test_compiled_a_bound_out_of_range_is_an_error_too():
    run = torch.compile(lambda x: EncoderMask.from_intervals(x, 4).rows, fullgraph=True, backend="eager")
    assert run(torch.tensor([[[1, 4]]])).tolist() == [[[1, 4]]]
    with pytest.raises(RuntimeError, match="intervals has a value outside 0 to s_e"):
        run(torch.tensor([[[1, 5]]]))


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_shapes_without_memory(backend):
    given = sources(32, 2, 100)
    length = torch.tensor([3, 700], device=DEVICE)
    dense = torch.ones(2, 32, 800, dtype=torch.bool, device=DEVICE)

    def build(visible, intervals, tokens, tiles, length, dense):
        builds = build_all(visible, intervals, tokens, tiles, 100, length).values()
        made = [build() for build in builds] + [EncoderMask.from_dense(dense, kind="bits"), EncoderMask.from_dense(dense, kind="interval")]
        return [t for em in made for t in (*everything(em), em.to_dense(), em.last_row().rows, em.filled(length.max()).rows)]

    def described(tensors):
        return [(tuple(t.shape), t.dtype, t.stride()) for t in tensors]

    with fastfuse.backend(backend):
        # from_tokens looks where it can, and takes intervals
        with mock.patch.object(encoder_mask, "values_are_at_hand", lambda t: False):
            want = described(build(*given, length, dense))
        assert described(build(*(t.to("meta") for t in (*given, length, dense)))) == want
        mode = FakeTensorMode()
        fakes = [mode.from_tensor(t) for t in (*given, length, dense)]
        with mode:
            assert described(build(*fakes)) == want


def test_two_runs_are_equal():
    mask = torch.rand(2, 40, 500, device=DEVICE) < 0.5
    all_equal(*(everything(EncoderMask.from_dense(mask)) for _ in range(2)))
