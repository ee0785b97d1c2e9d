"""What EncoderMask is made by: masks packed into bits, and lists of the blocks that are visible."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.ops._fused_op import fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, Plan

if HAS_TRITON:
    from fastfuse.kernels.encoder_mask import block_list_kernel, block_states_kernel, pack_mask_kernel, pack_tiles_kernel

COLUMNS = 128  # of a column block
WORD = 32


def words(s_e: int) -> int:
    """Words of a row of bits: whole column blocks of them."""
    return COLUMNS // WORD * ((s_e + COLUMNS - 1) // COLUMNS)


def _word_starts(s_e: int, device: torch.device) -> Tensor:
    return torch.arange(words(s_e), device=device) * WORD


def _span(lo: Tensor, hi: Tensor, start: Tensor) -> Tensor:
    """Words whose first column is `start`, with the bits of columns lo <= n < hi: int64 [...] -> int32."""
    past, before = (torch.bitwise_left_shift(1, (bound - start).clamp(0, WORD)) for bound in (hi, lo))
    return (past - before).to(torch.int32)


def bits_of_intervals(lo: Tensor, hi: Tensor, s_e: int) -> Tensor:
    """int [...] twice -> int32 [..., W]"""
    return _span(lo[..., None], hi[..., None], _word_starts(s_e, lo.device))


def padded(t: Tensor, dim: int, size: int) -> Tensor:
    """t in memory of its own, zeros behind it. Assigned to a part of zeros, a t of that size already would need a graph of its own."""
    shape = list(t.shape)
    shape[dim] = size - shape[dim]
    return torch.cat([t, t.new_zeros(shape)], dim)


class PackMaskArgs(NamedTuple):
    """mask: bool [b, s, s_e], any strides."""

    mask: Tensor
    interpret: bool


def _pack_mask_ref(args: PackMaskArgs) -> tuple[Tensor, Tensor]:
    b, s, s_e = args.mask.shape
    flags = padded(args.mask.view(torch.uint8) != 0, 2, words(s_e) * WORD)  # a byte that was made a bool need not be 1
    flags = flags.view(torch.uint8).view(b, s, words(s_e), WORD)
    # Eight flags at a time: the product adds flag i of each eight, bit 8 i, at bit 56 + i, and no two of the others meet.
    octets = flags.view(torch.int64).mul_(0x0102040810204080).bitwise_right_shift_(56)
    bits = octets.to(torch.uint8).view(torch.int32).squeeze(-1)
    return bits, ~(bits != 0).any(-1)


_PACK_ROWS, _PACK_WORDS = 8, 16  # of pack_mask_kernel: 32 flags a thread


def _pack_mask_launch(args: PackMaskArgs) -> Plan:
    (b, s, s_e), strides, at = args.mask.shape, args.mask.stride(), args.mask.storage_offset()
    together = b * s and strides[2] == 1 and all(n % 4 == 0 for n in (s_e, *strides[:2], at))
    flags = args.mask.view(torch.int32 if together else torch.uint8)
    pack, dtype = Launch(pack_mask_kernel, FLAGS=flags.element_size(), BLOCK_S=_PACK_ROWS, BLOCK_W=_PACK_WORDS, **tune.OPTIONS), flags.dtype
    return _packing(pack, _PACK_ROWS, b, s, words(s_e), lambda args: args.mask.view(dtype), *flags.stride(), s, flags.shape[2])


def _packing(pack: Launch, block: int, b: int, s: int, W: int, flags: Callable[[tuple], Tensor], *numbers: int) -> Plan:
    """The plan of a kernel that packs `block` rows in a program. flags: (args) -> what it reads; numbers: what it takes behind its tensors."""
    grid = -(-s // block), b, 1

    def run(args):
        bits = torch.empty((b, s, W), dtype=torch.int32, device=args[0].device)
        rows_empty = torch.empty((b, s), dtype=torch.bool, device=args[0].device)
        if b * s:
            pack(grid, flags(args), bits, rows_empty, *numbers, W // 4)
        return bits, rows_empty

    return run


pack_mask = fused_op("pack_mask", PackMaskArgs, reference=_pack_mask_ref, launch=_pack_mask_launch)
"""(args) -> bits int32 [b, s, W], rows that see nothing, bool [b, s]."""


class PackTilesArgs(NamedTuple):
    """visible: bool [b, s, tiles]."""

    visible: Tensor
    tokens_per_tile: int
    interpret: bool


def _tiles_in_a_word(tokens_per_tile: int) -> int:
    """How many tiles a word's 32 columns can touch."""
    return (WORD - 2) // tokens_per_tile + 2


def _pack_tiles_ref(args: PackTilesArgs) -> tuple[Tensor, Tensor]:
    visible, tokens_per_tile = args.visible, args.tokens_per_tile
    b, s, n_tiles = visible.shape
    s_e = n_tiles * tokens_per_tile
    start = _word_starts(s_e, visible.device)
    bits = torch.zeros((b, s, words(s_e)), dtype=torch.int32, device=visible.device)
    for i in range(_tiles_in_a_word(tokens_per_tile) if n_tiles else 0):
        tile = start // tokens_per_tile + i
        lo, hi = (tile * tokens_per_tile).clamp(max=s_e), ((tile + 1) * tokens_per_tile).clamp(max=s_e)
        bits |= torch.where(visible[..., tile.clamp(max=n_tiles - 1)], _span(lo, hi, start), 0)
    return bits, ~visible.any(-1)


_TILES_ROWS, _TILES_WORDS = 16, 128  # of pack_tiles_kernel: 16 words a thread


def _pack_tiles_launch(args: PackTilesArgs) -> Plan:
    (b, s, n_tiles), n = args.visible.shape, args.tokens_per_tile
    pack = Launch(pack_tiles_kernel, TILES_IN_A_WORD=_tiles_in_a_word(n), BLOCK_S=_TILES_ROWS, BLOCK_W=_TILES_WORDS, **tune.OPTIONS)
    return _packing(pack, _TILES_ROWS, b, s, words(n_tiles * n), lambda args: args.visible.contiguous().view(torch.uint8), s, n_tiles, n)


pack_tiles = fused_op("pack_tiles", PackTilesArgs, reference=_pack_tiles_ref, launch=_pack_tiles_launch)
"""(args) -> as pack_mask, with s_e = tiles * tokens_per_tile. Nothing of [b, s, s_e] is made."""


class Blocks(NamedTuple):
    """Which blocks of COLUMNS columns and of `tokens` text tokens meet, listed both ways, int32.

    A pair is full where every row that sees anything at all sees all of the columns, and some row does: no mask is needed inside of it, as
    what is computed for rows that see nothing is thrown away. Lists have the full ones first, each group ascending; 0 follows.
    """

    column_blocks: Tensor  # [b, NQ, NK]: those that some row of a token block sees
    column_block_counts: Tensor  # [b, NQ, 2]: how many of them are full, how many there are
    token_blocks: Tensor  # [b, NK, NQ]: those that see some column of a column block
    token_block_counts: Tensor  # [b, NK, 2]


class MaskBlocksArgs(NamedTuple):
    """rows, rows_empty, s_e: those of an EncoderMask, is_bits: whether that is its kind; tokens: of a token block."""

    rows: Tensor
    rows_empty: Tensor
    s_e: int
    tokens: int
    is_bits: bool
    interpret: bool


def _mask_blocks_ref(args: MaskBlocksArgs) -> Blocks:
    rows, rows_empty, tokens = args.rows, args.rows_empty, args.tokens
    b, s = rows_empty.shape
    nq, nk = _block_counts(s, args.s_e, tokens)
    if args.is_bits:
        of_blocks = rows.reshape(b, s, nk, COLUMNS // WORD)
        some, every = (of_blocks != 0).any(-1), (of_blocks == -1).all(-1)
    else:
        start, (lo, hi) = torch.arange(nk, device=rows.device) * COLUMNS, (rows[..., i, None] for i in range(2))
        some, every = (lo < start + COLUMNS) & (hi > start), (lo <= start) & (hi >= start + COLUMNS)
    # Rows past s see nothing. Those that do have no say in what is full.
    of_rows = padded(torch.stack([some, ~(every | rows_empty[..., None])]), 2, nq * tokens)
    some, cut = of_rows.view(2, b, nq, tokens, nk).any(3)
    states = some.to(torch.uint8) + (some & ~cut).to(torch.uint8)
    return Blocks(*_listed(states), *_listed(states.mT.clone(memory_format=torch.contiguous_format)))


def _listed(states: Tensor) -> tuple[Tensor, Tensor]:
    """states [b, lists, N], 0 none, 1 partial, 2 full -> (list int32 [b, lists, N], counts [b, lists, 2])."""
    order = states.sort(dim=-1, descending=True, stable=True).indices
    n = torch.stack([(states == 2).sum(-1), (states != 0).sum(-1)], -1)
    listed = torch.where(torch.arange(states.shape[-1], device=states.device) < n[..., 1:], order, 0)
    return listed.to(torch.int32), n.to(torch.int32)


def _block_counts(s: int, s_e: int, tokens: int) -> tuple[int, int]:
    """(NQ, NK)"""
    return (s + tokens - 1) // tokens, (s_e + COLUMNS - 1) // COLUMNS


_STATE_ROWS, _STATE_BLOCKS = 32, 32  # of block_states_kernel: 32 words a thread
_LIST_BLOCK = 256  # of block_list_kernel


def _mask_blocks_launch(args: MaskBlocksArgs) -> Plan:
    (b, s), tokens, like = args.rows_empty.shape, args.tokens, {"dtype": torch.int32, "device": args.rows.device}
    nq, nk = _block_counts(s, args.s_e, tokens)
    shapes = (b, nq, nk), (b, nq, 2), (b, nk, nq), (b, nk, 2)
    if not b * nq * nk:
        return lambda args: Blocks(*(torch.zeros(shape, **like) for shape in shapes))
    block = min(_STATE_ROWS, 1 << (tokens - 1).bit_length())
    find_states = Launch(block_states_kernel, BITS=args.is_bits, BLOCK_S=block, BLOCK_K=_STATE_BLOCKS, **tune.OPTIONS)
    list_columns, list_tokens = (Launch(block_list_kernel, BLOCK=_LIST_BLOCK, **tune.OPTIONS) for _ in range(2))
    grid = nq, -(-nk // _STATE_BLOCKS), b

    def run(args):
        states = torch.empty((b, nq, nk), dtype=torch.int8, device=args.rows.device)
        find_states(grid, args.rows.contiguous(), args.rows_empty.contiguous(), states, s, tokens, nk)
        blocks = Blocks(*[torch.empty(shape, **like) for shape in shapes])
        list_columns((nq, b, 1), states, blocks.column_blocks, blocks.column_block_counts, nq * nk, nk, 1, nk)
        list_tokens((nk, b, 1), states, blocks.token_blocks, blocks.token_block_counts, nq * nk, 1, nk, nq)
        return blocks

    return run


mask_blocks = fused_op("mask_blocks", MaskBlocksArgs, reference=_mask_blocks_ref, launch=_mask_blocks_launch)
"""(args) -> the fields of Blocks."""
