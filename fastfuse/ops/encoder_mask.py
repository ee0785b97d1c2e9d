"""Which encoder tokens each text token may see: built once for a forward, shared by its cross-attention layers and by their backward."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastfuse.ops import _op
from fastfuse.ops._device_checks import assert_on_device, values_are_at_hand
from fastfuse.ops._fused_op import FusedOp
from fastfuse.ops._mask_ops import (
    WORD,
    Blocks,
    MaskBlocksArgs,
    PackMaskArgs,
    PackTilesArgs,
    bits_of_intervals,
    mask_blocks,
    pack_mask,
    pack_tiles,
    padded,
    words,
)
from fastfuse.ops._op import route, transformed

KINDS = ("auto", "interval", "bits")


class AttentionMask(NamedTuple):
    """An EncoderMask as cross-attention's ops take it. blocks: those of listed_tokens(...), for kernels alone; else None."""

    rows: Tensor
    rows_empty: Tensor
    blocks: Blocks | None


class EncoderMask:
    """The mask [b, s, s_e] of cross-attention, as an interval of columns for each row or as a bit for each column.

    kind "interval": rows int32 [b, s, 2], row t sees columns lo <= n < hi, (0, 0) where it sees nothing.
    kind "bits": rows int32 [b, s, W], W = 4 * ceil(s_e / 128), column n is bit n % 32 of word n // 32; bits past s_e are 0.
    rows_empty: bool [b, s], the rows that see nothing. Both are contiguous. Made by the from_ constructors; never changed afterwards.

    Constructors with kind="auto" look where that costs nothing, on a CPU, and take intervals where every row is one; else bits, without a wait.
    """

    def __init__(self, kind: str, rows: Tensor, rows_empty: Tensor, s_e: int):
        self.kind, self.rows, self.rows_empty, self.s_e = kind, rows, rows_empty, s_e
        self._blocks: dict[int, Blocks] = {}
        self._filled: dict[int | None, EncoderMask] = {}
        self.served: dict[tuple[int, bool], AttentionMask] = {}  # cross_attention's own

    @classmethod
    def from_dense(cls, mask: Tensor, *, kind: str = "auto") -> "EncoderMask":
        """mask: bool [b, s, s_e], True where text token t sees encoder token n; any strides. Reads it once.

        Raises ValueError for another dtype or shape, and with kind="interval" for a row that is not one interval, which on a GPU fails an
        assertion of the device instead.
        """
        op = "EncoderMask.from_dense"
        _check_kind(op, kind)
        if mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask is {mask.dtype}, expected torch.bool, True where a token is seen")
        if mask.dim() != 3:
            raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, expected [b, s, s_e]")
        bits, rows_empty = _run(pack_mask, PackMaskArgs, mask)
        if kind == "interval" or (kind == "auto" and values_are_at_hand(mask)):
            rows, single = _intervals_of_bits(bits)
            if _all_single(op, "mask", kind, single):
                return cls("interval", rows, rows_empty, mask.shape[2])
        return cls("bits", bits, rows_empty, mask.shape[2])

    @classmethod
    def from_tiles(cls, visible: Tensor, tokens_per_tile: int, *, kind: str = "auto") -> "EncoderMask":
        """visible: bool or integer [b, s, n_img, n_tiles], nonzero where text token t sees a tile, as transformers' Mllama has it.

        Tile j of image i is columns (i * n_tiles + j) * tokens_per_tile onwards. Raises as from_dense.
        """
        op = "EncoderMask.from_tiles"
        _check_kind(op, kind)
        _check_integers(op, "visible", visible, 4, "[b, s, n_img, n_tiles]", allow_bool=True)
        _check_count(op, "tokens_per_tile", tokens_per_tile, 1)
        flags = visible.flatten(2) != 0
        s_e = flags.shape[2] * tokens_per_tile
        if kind == "interval" or (kind == "auto" and values_are_at_hand(visible)):
            first = torch.arange(flags.shape[2], dtype=torch.int32, device=flags.device) * tokens_per_tile
            rows, single = _intervals(flags, first, first + tokens_per_tile, tokens_per_tile)
            if _all_single(op, "visible", kind, single):
                return cls("interval", rows, ~flags.any(-1), s_e)
        bits, rows_empty = _run(pack_tiles, PackTilesArgs, flags, tokens_per_tile)
        return cls("bits", bits, rows_empty, s_e)

    @classmethod
    def from_intervals(cls, intervals: Tensor, s_e: int) -> "EncoderMask":
        """intervals: integer [b, s, 2], text token t sees columns lo <= n < hi; nothing where lo >= hi.

        Raises ValueError for a bound outside 0 to s_e, which on a GPU fails an assertion of the device instead.
        """
        op = "EncoderMask.from_intervals"
        _check_integers(op, "intervals", intervals, 3, "[b, s, 2]")
        if intervals.shape[2] != 2:
            raise ValueError(f"{op}: intervals has shape {tuple(intervals.shape)}, expected [b, s, 2]")
        _check_count(op, "s_e", s_e, 0)
        _check_range(op, "intervals", intervals, s_e, "s_e")
        rows_empty = intervals[..., 0] >= intervals[..., 1]
        rows = torch.where(rows_empty[..., None], 0, intervals).to(torch.int32)
        return cls("interval", rows.contiguous(), rows_empty.contiguous(), s_e)

    @classmethod
    def from_tokens(cls, tokens: Tensor, image_token_id: int, tiles: Tensor, n_tiles: int, tokens_per_tile: int, *, kind: str = "auto") -> "EncoderMask":
        """The rule of torchtune and Meta: text sees the images whose tokens come right before it (https://arxiv.org/abs/2407.21783).

        tokens: integer [b, s], the i-th image_token_id of a row is image i; tiles: integer [b, n_img], how many tiles of each image are real,
        0 for no image. Image i has columns i * n_tiles * tokens_per_tile onwards and is seen, its real tiles alone, from its token up to the
        next image token that does not follow directly on one. Raises as from_dense, and ValueError for a row with more image tokens than
        n_img and for tiles outside 0 to n_tiles; on a GPU these fail an assertion of the device instead.
        """
        op = "EncoderMask.from_tokens"
        _check_kind(op, kind)
        _check_integers(op, "tokens", tokens, 2, "[b, s]")
        _check_integers(op, "tiles", tiles, 2, "[b, n_img]")
        _check_count(op, "n_tiles", n_tiles, 1)
        _check_count(op, "tokens_per_tile", tokens_per_tile, 1)
        if tiles.shape[0] != tokens.shape[0]:
            raise ValueError(f"{op}: tokens has {tokens.shape[0]} rows, tiles {tiles.shape[0]}")
        if tiles.device != tokens.device:
            raise ValueError(f"{op}: tokens is on {tokens.device}, tiles on {tiles.device}")
        _check_range(op, "tiles", tiles, n_tiles, "n_tiles")
        is_image = tokens == image_token_id
        n, n_img = is_image.sum(1), tiles.shape[1]
        if not values_are_at_hand(tokens):
            assert_on_device((n <= n_img).all(), f"{op}: tokens has more image tokens in a row than the {n_img} images of tiles")
        elif (n > n_img).any():
            raise ValueError(f"{op}: tokens has {int(n.max())} image tokens in a row, tiles has {n_img} images")
        past = is_image.cumsum(1)  # one past the last image that has begun
        begins = is_image.clone()
        begins[:, 1:] &= ~is_image[:, :-1]
        first = torch.where(begins, past - 1, 0).cummax(1).values if tokens.shape[1] else past
        image = torch.arange(n_img, device=tokens.device)
        seen = (first[..., None] <= image) & (image < past[..., None])
        real = torch.arange(n_tiles, device=tokens.device) < tiles[..., None]
        return cls.from_tiles(seen[..., None] & real[:, None], tokens_per_tile, kind=kind)

    @staticmethod
    def cat(masks: Sequence["EncoderMask"]) -> "EncoderMask":
        """The masks one after the other along the batch; bits where their kinds differ. Raises ValueError where s, s_e or devices do."""
        op = "EncoderMask.cat"
        masks = list(masks)
        if not masks:
            raise ValueError(f"{op}: masks is empty, expected one or more")
        head = masks[0]
        for m in masks[1:]:
            if m.shape[1:] != head.shape[1:]:
                raise ValueError(f"{op}: masks have (s, s_e) {head.shape[1:]} and {m.shape[1:]}")
            if m.device != head.device:
                raise ValueError(f"{op}: masks are on {head.device} and {m.device}")
        kind = head.kind if all(m.kind == head.kind for m in masks) else "bits"
        rows = torch.cat([m.rows if m.kind == kind else bits_of_intervals(m.rows[..., 0], m.rows[..., 1], m.s_e) for m in masks])
        return EncoderMask(kind, rows, torch.cat([m.rows_empty for m in masks]), head.s_e)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(b, s, s_e)"""
        return self.rows.shape[0], self.rows.shape[1], self.s_e

    @property
    def device(self) -> torch.device:
        return self.rows.device

    def blocks(self, tokens: int) -> Blocks:
        """The block lists for token blocks of `tokens` rows, made at the first call. NQ = ceil(s / tokens), NK = ceil(s_e / 128)."""

        def make() -> Blocks:
            _check_count("EncoderMask.blocks", "tokens", tokens, 1)
            return Blocks(*_run(mask_blocks, MaskBlocksArgs, self.rows, self.rows_empty, self.s_e, tokens, self.kind == "bits"))

        return self._once(self._blocks, tokens, make)

    def _once(self, kept: dict, key: int | None, make: Callable) -> Any:
        """What make() gives, made at the first call where it is fit for later ones."""
        made = kept.get(key)
        if made is None:
            # Fit for a later backward, which tensors made in inference mode are not.
            inference = not torch.compiler.is_compiling() and torch.is_inference_mode_enabled()
            with torch.inference_mode(False) if inference else contextlib.nullcontext():
                made = make()
            if _will_last(self.device):
                kept[key] = made
        return made

    def for_op(self, tokens: int | None, uniform: bool) -> AttentionMask:
        """As cross-attention's ops take it, with the lists for token blocks of `tokens` rows where that is a number; uniform: filled()."""
        mask = self.filled() if uniform else self
        return AttentionMask(mask.rows, mask.rows_empty, None if tokens is None else mask.blocks(tokens))

    def serves(self, for_op: AttentionMask) -> bool:
        """Whether what for_op() made serves other calls too, of which nobody will look at it."""
        rows_empty = for_op.rows_empty
        return _will_last(self.device) and rows_empty.is_contiguous() and rows_empty.data_ptr() % 16 == 0

    def filled(self, length: int | Tensor | None = None) -> "EncoderMask":
        """Rows that see nothing see columns < length instead, all of them where None. length: a number, or an integer tensor () or [b].

        Made once for each number. Raises ValueError for a length outside 0 to s_e; a tensor on a GPU fails an assertion of the device instead.
        """
        op = "EncoderMask.filled"
        if length is None:
            return self._once(self._filled, None, lambda: self._fill(self.s_e))
        if isinstance(length, Tensor):
            _check_integers(op, "length", length, length.dim(), "() or [b]")
            if length.shape not in ((), (self.shape[0],)):
                raise ValueError(f"{op}: length has shape {tuple(length.shape)}, expected () or {(self.shape[0],)}")
            if length.device != self.device:
                raise ValueError(f"{op}: length is on {length.device}, the mask on {self.device}")
            _check_range(op, "length", length, self.s_e, "s_e")
        else:
            _check_count(op, "length", length, 0)
            if length > self.s_e:
                raise ValueError(f"{op}: length is {length}, the mask has {self.s_e} columns")
            if not torch.compiler.is_compiling():  # a symbolic number as a key would become a constant of the graph
                return self._once(self._filled, length, lambda: self._fill(length))
        return self._fill(length)

    def _fill(self, length: int | Tensor) -> "EncoderMask":
        if not isinstance(length, Tensor):  # made on the device, not copied there
            length = torch.full((), length, dtype=torch.int32, device=self.device)
        length = length.view(-1, 1)
        low = torch.zeros_like(length)
        row = torch.stack([low, length], -1) if self.kind == "interval" else bits_of_intervals(low, length, self.s_e)
        rows = torch.where(self.rows_empty[..., None], row.to(torch.int32), self.rows)
        return EncoderMask(self.kind, rows, self.rows_empty & (length == 0), self.s_e)

    def last_row(self) -> "EncoderMask":
        """[b, 1, s_e]: what the tokens that are generated next see. Raises ValueError where there is no row."""
        if self.shape[1] == 0:
            raise ValueError(f"EncoderMask.last_row: the mask has shape {self.shape}, no row")
        return self.narrow(self.shape[1] - 1, 1)

    def narrow(self, start: int, length: int) -> "EncoderMask":
        """Rows start to start + length, in memory of their own. Raises ValueError where there are fewer."""
        if start < 0 or length < 0 or start + length > self.shape[1]:
            raise ValueError(f"EncoderMask.narrow: rows {start} to {start + length} of a mask of {self.shape[1]}")
        # A view would keep all rows alive, and where b is 1 start at an address that no wide load can read.
        rows, rows_empty = (t.narrow(1, start, length).clone(memory_format=torch.contiguous_format) for t in (self.rows, self.rows_empty))
        return EncoderMask(self.kind, rows, rows_empty, self.s_e)

    def extended(self, s: int) -> "EncoderMask":
        """s rows, the last one repeated. Raises ValueError where there are more already, or none."""
        b, have, _ = self.shape
        if s < have or (have == 0 and s > 0):
            raise ValueError(f"EncoderMask.extended: s is {s}, the mask has {have} rows")
        rows, rows_empty = (torch.cat([t, t[:, -1:].expand(b, s - have, *t.shape[2:])], 1) for t in (self.rows, self.rows_empty))
        return EncoderMask(self.kind, rows, rows_empty, self.s_e)

    def widened(self, s_e: int) -> "EncoderMask":
        """s_e columns, nobody sees the new ones. Raises ValueError where there are more already."""
        if s_e < self.s_e:
            raise ValueError(f"EncoderMask.widened: s_e is {s_e}, the mask has {self.s_e} columns")
        rows = padded(self.rows, 2, words(s_e)) if self.kind == "bits" else self.rows
        return EncoderMask(self.kind, rows, self.rows_empty, s_e)

    @property
    def visible_fraction(self) -> float:
        """Visible pairs of all b * s * s_e, 0 where there are none. Waits for the device."""
        pairs = self.rows_empty.numel() * self.s_e
        n = _ones(self.rows).sum() if self.kind == "bits" else (self.rows[..., 1] - self.rows[..., 0]).sum()
        return n.item() / pairs if pairs else 0.0

    def to_dense(self) -> Tensor:
        """bool [b, s, s_e], True where text token t sees encoder token n."""
        n = torch.arange(self.s_e, dtype=torch.int32, device=self.device)
        if self.kind == "interval":
            return (self.rows[..., :1] <= n) & (n < self.rows[..., 1:])
        return (self.rows[..., n // WORD] >> (n % WORD)) & 1 != 0

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "EncoderMask":
        """The mask on a device; itself where it is there already."""
        rows = self.rows.to(device, non_blocking=non_blocking)
        return self if rows is self.rows else EncoderMask(self.kind, rows, self.rows_empty.to(device, non_blocking=non_blocking), self.s_e)

    def __reduce__(self) -> tuple:
        """Without what is kept of it."""
        return EncoderMask, (self.kind, self.rows, self.rows_empty, self.s_e)

    def __repr__(self) -> str:
        return f"EncoderMask({self.kind}, shape={self.shape}, device={str(self.device)!r})"


def _will_last(device: torch.device) -> bool:
    """Whether what is made now may be used later: what a CUDA graph records or a warm-up collects has no values, what torch.func sees is of its level alone."""
    if _op.launch_interceptor is not None:
        return False
    if torch.compiler.is_compiling():
        return True
    return not (transformed() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()))


def _run(op: FusedOp, Args: type, x: Tensor, *others) -> tuple[Tensor, ...]:
    """The op by the backend in force."""
    chosen = route(op.name, x, None)
    args = Args(x, *others, chosen == "interpreter")
    return op.reference(args) if chosen == "reference" else op(args)


def _check_kind(op: str, kind: str) -> None:
    if kind not in KINDS:
        raise ValueError(f"{op}: kind is {kind!r}, not one of {', '.join(KINDS)}")


def _check_integers(op: str, name: str, t: Tensor, dims: int, shape: str, allow_bool: bool = False) -> None:
    if t.is_floating_point() or t.is_complex() or (t.dtype == torch.bool and not allow_bool):
        raise ValueError(f"{op}: {name} is {t.dtype}, expected {'bool or integers' if allow_bool else 'integers'}")
    if t.dim() != dims:
        raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")


def _check_count(op: str, name: str, n: int, least: int) -> None:
    if isinstance(n, bool) or not isinstance(n, (int, torch.SymInt)):
        raise TypeError(f"{op}: {name} is a {type(n).__name__}, expected a whole number")
    if n < least:
        raise ValueError(f"{op}: {name} is {n}, expected {least} or more")


def _check_range(op: str, name: str, t: Tensor, most: int, what: str) -> None:
    """ValueError for a value outside 0 to most, where values are at hand; an assertion on the device where they are not."""
    t = t.long()  # most may be more than t's dtype holds
    fits = (t >= 0) & (t <= most)
    if not values_are_at_hand(t):
        assert_on_device(fits.all(), f"{op}: {name} has a value outside 0 to {what}")
    elif not fits.all():
        raise ValueError(f"{op}: {name} has {t[~fits][0].item()}, expected 0 to {what}, which is {most}")


def _all_single(op: str, name: str, kind: str, single: Tensor) -> bool:
    """Whether rows may be held as intervals; with kind="interval" an error where they may not."""
    if not values_are_at_hand(single):
        assert_on_device(single.all(), f"{op}: kind is 'interval', a row of {name} is not one interval")
        return True
    if single.all():
        return True
    if kind == "interval":
        raise ValueError(f"{op}: kind is 'interval', row {tuple((~single).nonzero()[0].tolist())} of {name} is not one interval")
    return False


def _ones(words: Tensor) -> Tensor:
    """How many bits of each int32 are set."""
    x = words - ((words >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    return (((x + (x >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


def _intervals(seen: Tensor, first: Tensor, past: Tensor, n: Tensor | int) -> tuple[Tensor, Tensor]:
    """Each row's interval int32 [b, s, 2], and whether it has no hole, bool [b, s].

    seen: bool [b, s, parts], which parts of a row hold visible columns: n of them, from column `first` up to `past`.
    """
    if seen.shape[2] == 0:
        return torch.zeros((*seen.shape[:2], 2), dtype=torch.int32, device=seen.device), torch.ones(seen.shape[:2], dtype=torch.bool, device=seen.device)
    hi = torch.where(seen, past, 0).amax(-1)
    lo = torch.minimum(torch.where(seen, first, torch.iinfo(torch.int32).max).amin(-1), hi)
    return torch.stack([lo, hi], -1).to(torch.int32), torch.where(seen, n, 0).sum(-1) == hi - lo


def _intervals_of_bits(bits: Tensor) -> tuple[Tensor, Tensor]:
    start = torch.arange(bits.shape[2], dtype=torch.int32, device=bits.device) * WORD
    filled = bits  # every bit up to the highest one that is set
    for shift in (1, 2, 4, 8, 16):
        filled = filled | (filled >> shift)
    return _intervals(bits != 0, start + _ones((bits & -bits) - 1), start + _ones(filled), _ones(bits))
