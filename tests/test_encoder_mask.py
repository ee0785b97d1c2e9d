"""What is EncoderMask's own: any mask against the dense one, what is made of it, what it allocates, waits for and refuses; test_ops.py has the ops."""

import contextlib
import copy
import io
import pickle
from unittest import mock

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastfuse
from cases.encoder_mask import SMALL, between, blocks_of, from_tiles, intervals_of, words_of
from fastfuse.data import VisionCrossAttentionMask
from fastfuse.ops import _mask_ops, encoder_mask
from fastfuse.ops._mask_ops import COLUMNS
from fastfuse.ops.encoder_mask import Blocks, EncoderMask

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUTES = ("auto", "torch", "triton")
IMAGE = 7  # the image token


def examples(n: int, shrink: bool = True):
    phases = set(Phase) if shrink else set(Phase) - {Phase.shrink}  # with the interpreter that takes minutes
    return settings(max_examples=n, deadline=None, derandomize=True, database=None, phases=phases, suppress_health_check=list(HealthCheck))


@contextlib.contextmanager
def routed(route: str, blocks: dict | None = None):
    with fastfuse.backend(route), mock.patch.multiple(_mask_ops, **blocks) if blocks else contextlib.nullcontext():
        yield


def same(got: Tensor, want: Tensor, what: str = "") -> None:
    got = got.cpu()
    assert got.dtype == want.dtype and got.shape == want.shape, f"{what}: {got.dtype} {tuple(got.shape)}, expected {want.dtype} {tuple(want.shape)}"
    assert torch.equal(got, want), f"{what}: {got} is not {want}"


def check(em: EncoderMask, dense: Tensor, kind: str, tokens: int | None = None) -> None:
    """Everything a mask says against the dense one."""
    dense = dense.cpu()
    assert em.kind == kind and em.shape == tuple(dense.shape)
    assert em.rows.is_contiguous() and em.rows_empty.is_contiguous()
    same(em.rows, words_of(dense) if kind == "bits" else intervals_of(dense), "rows")
    same(em.rows_empty, ~dense.any(-1), "rows_empty")
    same(em.to_dense(), dense, "to_dense")
    assert em.visible_fraction == (dense.sum().item() / dense.numel() if dense.numel() else 0)
    if tokens is not None:
        blocks = em.blocks(tokens)
        for name, g, w in zip(Blocks._fields, blocks, blocks_of(dense, tokens), strict=True):
            same(g, w, name)
            assert g.is_contiguous(), name


def auto(dense: Tensor) -> str:
    """What kind="auto" takes: it looks on a CPU alone."""
    return "interval" if not CUDA and intervals_of(dense) is not None else "bits"


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
    if intervals_of(dense) is not None:
        check(EncoderMask.from_dense(mask, kind="interval"), dense, "interval", tokens)
    elif not CUDA:
        with pytest.raises(ValueError, match=r"row .* of mask is not one interval"):
            EncoderMask.from_dense(mask, kind="interval")


@examples(120)
@given(mask=masks(), tokens=st.sampled_from([1, 2, 3, 4, 16]), route=st.sampled_from(["auto", "torch"]))
def test_bits_intervals_lists_and_dense_agree(mask, tokens, route):
    with routed(route):
        from_dense_agrees(mask, tokens)


@examples(10, shrink=False)
@given(mask=masks(), tokens=st.sampled_from([3, 4, 16]), blocks=st.sampled_from([{}, SMALL]))
def test_kernels_agree(mask, tokens, blocks):
    with routed("triton", blocks):
        from_dense_agrees(mask, tokens)


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


@pytest.mark.parametrize("shape, block, directions", [((2, 2, 1000), 256, 1), ((1, 5, 16), 16, 2), ((1, 3, 17), 16, 2)])  # 1000 lists would take 10 s
def test_lists_longer_than_a_block_of_the_kernel(shape, block, directions):
    """Along the rows of [b, NQ, NK] states, and along the columns."""
    states = torch.randint(0, 3, shape, dtype=torch.int8, device=DEVICE)
    states[:, 0] = 2
    b, nq, nk = shape
    for lists, n, strides, of in ((nq, nk, (nk, 1), states), (nk, nq, (1, nk), states.mT))[:directions]:
        listed, counts = (torch.empty(size, dtype=torch.int32, device=DEVICE) for size in ((b, lists, n), (b, lists, 2)))
        _mask_ops.block_list_kernel[(lists, b)](states, listed, counts, nq * nk, *strides, n, BLOCK=block)
        for got, count, row in zip(listed.flatten(0, 1).tolist(), counts.flatten(0, 1).tolist(), of.flatten(0, 1).tolist(), strict=True):
            full, partial = ([i for i, state in enumerate(row) if state == which] for which in (2, 1))
            assert got == full + partial + [0] * (len(row) - len(full) - len(partial)) and count == [len(full), len(full) + len(partial)]


def test_bits_and_intervals_list_the_same_blocks_at_real_sizes():
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
    assert (em.visible_fraction, em.rows_empty.tolist()) == (bits.visible_fraction, bits.rows_empty.tolist())
    assert bits.kind == "bits" and EncoderMask.from_tiles(visible.view(b, s, 4, 4), 1601).kind == ("bits" if CUDA else "interval")
    for tokens in (32, 100):
        blocks = em.blocks(tokens)
        assert (-(-s // tokens), -(-s_e // 128)) == blocks.column_blocks.shape[1:]
        assert all(torch.equal(x, y) for x, y in zip(blocks, bits.blocks(tokens), strict=True))
        n = blocks.column_block_counts[0, 1500 // tokens].tolist()  # 2 tiles of the first image: 25 whole column blocks and a cut one
        assert n == [25, 26] and blocks.column_blocks[0, 1500 // tokens, :26].tolist() == list(range(26))


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
    dense = from_tiles(visible, tokens_per_tile)
    check(EncoderMask.from_tiles(visible, tokens_per_tile, kind="bits"), dense, "bits")
    check(EncoderMask.from_tiles(visible, tokens_per_tile), dense, auto(dense))
    if intervals_of(dense) is not None:
        check(EncoderMask.from_tiles(visible, tokens_per_tile, kind="interval"), dense, "interval")
    elif not CUDA:
        with pytest.raises(ValueError, match=r"row .* of visible is not one interval"):
            EncoderMask.from_tiles(visible, tokens_per_tile, kind="interval")


@examples(80)
@given(tiled=tile_masks(), route=st.sampled_from(["auto", "torch"]))
def test_from_tiles(tiled, route):
    with routed(route):
        from_tiles_agrees(*tiled)


@examples(16, shrink=False)
@given(tiled=tile_masks(), blocks=st.sampled_from([{}, SMALL]))
def test_from_tiles_by_the_kernel(tiled, blocks):
    with routed("triton", blocks):
        from_tiles_agrees(*tiled)


@examples(80)
@given(
    bounds=st.lists(st.tuples(st.integers(0, 300), st.integers(0, 300)), min_size=1, max_size=8),
    dtype=st.sampled_from([torch.int64, torch.int32, torch.int16]),
    tokens=st.sampled_from([1, 3, 16]),
)
def test_from_intervals(bounds, dtype, tokens):
    dense = torch.tensor([[[lo <= n < hi for n in range(300)] for lo, hi in bounds]])
    check(EncoderMask.from_intervals(torch.tensor([bounds], dtype=dtype, device=DEVICE), 300), dense, "interval", tokens)


def by_the_data_pipeline(tokens: Tensor, tiles: Tensor, n_tiles: int, tokens_per_tile: int) -> Tensor:
    """[b, s, s_e]: image by image the mask that a data set's transform attaches to its samples, for the real tiles."""
    transform = VisionCrossAttentionMask(tile_size=4, patch_size=4, image_token_id=IMAGE)
    dense = torch.zeros(*tokens.shape, tiles.shape[1], n_tiles, tokens_per_tile, dtype=torch.bool)
    for row, counts, seen in zip(tokens.tolist(), tiles.tolist(), dense, strict=True):
        images = [torch.zeros(1, 3, 4, 4)] * row.count(IMAGE)
        for i, mask in enumerate(transform({"tokens": row, "encoder_input": {"images": images}})["encoder_mask"]):
            seen[:, i, : counts[i]] = mask[:, :1, None]  # every column of a mask is the same
    return dense.flatten(2)


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
    dense = by_the_data_pipeline(*text)
    with routed(route):
        check(EncoderMask.from_tokens(tokens, IMAGE, tiles, n_tiles, tokens_per_tile), dense, auto(dense))
        check(EncoderMask.from_tokens(tokens, IMAGE, tiles, n_tiles, tokens_per_tile, kind="bits"), dense, "bits")


def some_masks(b: int = 2, s: int = 7, s_e: int = 300) -> dict[str, tuple[EncoderMask, Tensor]]:
    """A mask of each kind with rows that see nothing, and the dense one."""
    intervals = torch.randint(0, s_e + 1, (b, s, 2)).sort(-1).values
    intervals[:, 2] = 0
    dense = {"interval": between(intervals, s_e), "bits": torch.rand(b, s, s_e) < 0.5}
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
