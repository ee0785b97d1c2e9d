"""What patch_embed and its backward share: their arguments, the formula, and the launches that both begin with."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.kernels.arguments import Geometry, Image
from fastfuse.ops._device_checks import assert_on_device, values_are_at_hand
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, kernel_dtype

if HAS_TRITON:
    from fastfuse.kernels.patch_embed import patchify_kernel, tile_rows_kernel

_BLOCK_M, _BLOCK_K = 32, 128  # of patchify_kernel: 16 elements a thread


class Tables(NamedTuple):
    """Everything but pixels and weight that a token is made of; None for what is absent."""

    bias: Tensor | None = None
    cls: Tensor | None = None
    local_pos: Tensor | None = None
    global_pos: Tensor | None = None
    gate: Tensor | None = None
    pre_pos: Tensor | None = None
    pre_gate: Tensor | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None

    def grid(self) -> tuple[int, int]:
        """(entries, tiles of each) of the tables that hold a row per tile; (0, 0) without."""
        return next((tuple(t.shape[:2]) for t in (self.global_pos, self.pre_pos) if t is not None), (0, 0))


class PatchEmbedArgs(NamedTuple):
    """images: [images, n_tiles, C, H, W]. aspect_ratio: [images, 2] of (h, w) or [images] of ids, where there are tables with a row for each tile.
    eps: None without a norm. scale, shift: a number for all channels, one for each, or None. keep: whether to return what a backward through the norm reads.
    """

    images: Tensor
    weight: Tensor
    aspect_ratio: Tensor | None
    tables: Tables
    eps: float | None = None
    append_cls: bool = False
    scale: tuple[float, ...] | None = None
    shift: tuple[float, ...] | None = None
    pad_tokens_to: int = 1
    keep: bool = False
    interpret: bool = False


class TokenLayout(NamedTuple):
    """Where patches and CLS stand among the rows of a tile, and how many rows the result has."""

    padded: int
    tokens: int
    patches: int
    first: int  # the first patch's token
    cls_at: int  # CLS's token, -1 without
    across: int  # patches in a line of them
    rows: int

    @staticmethod
    def of(args: PatchEmbedArgs) -> "TokenLayout":
        images, (ph, pw), has_cls = args.images, args.weight.shape[2:], args.tables.cls is not None
        down, across = images.shape[-2] // ph, images.shape[-1] // pw
        tokens = down * across + has_cls
        cls_at = -1 if not has_cls else tokens - 1 if args.append_cls else 0
        padded = -(-tokens // args.pad_tokens_to) * args.pad_tokens_to
        return TokenLayout(padded, tokens, down * across, int(has_cls and not args.append_cls), cls_at, across, math.prod(images.shape[:-3]) * padded)

    def geometry(self) -> Geometry:
        return Geometry(*self[:5])


def tile_rows(aspect_ratio: Tensor, n_tiles: int, entries: int, side: int) -> Tensor:
    """Which row of a table [entries * side, ...] each tile takes, int64 [images * n_tiles]; -1 for none.

    aspect_ratio: [images, 2] of (h, w), or [images] of ids. Raises ValueError for one that has no place, where its values are at hand.
    """
    ratio, tile = aspect_ratio.long(), torch.arange(n_tiles, device=aspect_ratio.device)
    if ratio.dim() == 1:
        fits = (ratio >= 0) & (ratio < entries)
        rows = torch.where(fits[:, None], ratio[:, None] * side + tile, -1)
        limits = f"tables have ids 0 to {entries - 1}"
    else:
        h, w = ratio[:, :1], ratio[:, 1:]
        fits = ((h >= 0) & (w >= 0) & (h <= side) & (w <= side) & (h * w <= n_tiles))[:, 0]
        across = w.clamp(min=1)
        rows = torch.where(fits[:, None] & (tile < h * w), tile // across * side + tile % across, -1)
        limits = f"images have {n_tiles} tiles and max_num_tiles is {side}"
    if not values_are_at_hand(aspect_ratio):
        assert_on_device(fits.all(), f"aspect_ratio: {limits}")
    elif not fits.all():
        raise ValueError(f"patch_embed: aspect_ratio has {aspect_ratio[~fits][0].tolist()}{'' if ratio.dim() == 1 else ' (h, w)'}, {limits}")
    return rows.flatten()


def formula(args: PatchEmbedArgs) -> tuple[Tensor, Tensor, Tensor | None]:
    """(result [images, n_tiles, padded, D], what the norm was given [images * n_tiles, tokens, D], its mean and 1 / deviation [2, rows])."""
    images, weight = args.images, args.weight
    dtype = result_dtype(weight, args.tables)
    wide = torch.promote_types(dtype, torch.float32)
    tables = Tables(*[t if t is None else t.to(wide) for t in args.tables])
    x = normalised(images.flatten(0, 1), args.scale, args.shift).to(weight.dtype)
    x = F.conv2d(x, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2).to(wide)
    if tables.bias is not None:
        x = x + tables.bias
    rows = None if args.aspect_ratio is None else tile_rows(args.aspect_ratio, images.shape[1], *tables.grid())
    if tables.pre_pos is not None:
        x = x + _of_tiles(tables.pre_pos, tables.pre_gate, rows)
    if tables.cls is not None:
        token = tables.cls.expand(x.shape[0], 1, -1)
        x = torch.cat([x, token] if args.append_cls else [token, x], 1)
    if tables.local_pos is not None:
        x = x + (tables.local_pos if tables.gate is None else tables.local_pos * (1 - tables.gate.tanh()))
    if tables.global_pos is not None:
        x = x + _of_tiles(tables.global_pos, tables.gate, rows)
    padding, stats, before_norm = -x.shape[1] % args.pad_tokens_to, None, x
    if args.eps is not None:
        x, *stats = torch.native_layer_norm(x, x.shape[-1:], tables.norm_weight, tables.norm_bias, args.eps)
        stats = torch.stack([padded(t, padding).flatten() for t in stats])
    x = padded(x.to(dtype), padding).contiguous()
    # Not a view: autograd forbids to change one of several views that a function returns in place.
    return torch.ops.aten._unsafe_view(x, (*images.shape[:2], *x.shape[1:])), before_norm, stats


_ROWS_ON_CPU = 1024  # of a product: at 256 it is 5% slower, and beyond nothing is gained


def on_cpu(args: PatchEmbedArgs) -> tuple[Tensor, ...]:
    """The op as patch_embed registers it. A few tiles at a time, whose tokens are still in the cache when tables are added: in memory of its own, a copy of all
    tokens or of a large table costs as much as a tenth of the product."""
    layout, tables, tiles, weight = TokenLayout.of(args), args.tables, args.images.flatten(0, 1), args.weight
    dtype, D, first, last = result_dtype(weight, tables), len(weight), layout.first, layout.first + layout.patches
    wide = torch.promote_types(dtype, torch.float32)
    made = torch.empty((*args.images.shape[:2], layout.padded, D), dtype=dtype)
    made[:, :, layout.tokens :] = 0
    out, kept, stats = made.flatten(0, 1), None, torch.zeros((2, len(tiles), layout.padded, 1), dtype=wide)
    if args.keep:
        kept = torch.zeros_like(out)
    rows = None if args.aspect_ratio is None else tile_rows(args.aspect_ratio, args.images.shape[1], *tables.grid())
    opened, pre_opened = (torch.ones((), dtype=wide) if gate is None else gate.to(wide).tanh().view(()) for gate in (tables.gate, tables.pre_gate))
    bias, cls, local, norm_weight, norm_bias = (t if t is None else t.to(wide) for t in (*tables[:3], *tables[7:]))
    if tables.gate is not None and local is not None:
        local = local * (1 - opened)
    by_row = (tables.pre_pos, pre_opened, slice(first, last)), (tables.global_pos, opened, slice(layout.tokens))
    step = max(1, _ROWS_ON_CPU // layout.patches)
    for part in map(slice, range(0, len(tiles), step), range(step, len(tiles) + step, step)):
        pixels = patch_rows(normalised(tiles[part], args.scale, args.shift).to(weight.dtype), weight)
        y = out[part, : layout.tokens]
        x = y if dtype == wide else torch.empty(y.shape, dtype=wide)
        x[:, first:last] = (pixels @ weight.flatten(1).T).view(len(x), -1, D)
        if bias is not None:
            x[:, first:last] += bias
        if cls is not None:
            x[:, layout.cls_at] = cls
        if local is not None:
            x += local
        for table, factor, tokens in by_row:
            if table is not None:
                # Row 0 stands in for none: the first tile of every image has it anyway.
                taken, row = table.flatten(0, 1)[rows[part].clamp(0)].to(wide), rows[part, None, None]
                x[:, tokens].addcmul_(taken, torch.where(row < 0, 0, factor))
        if args.eps is not None:
            if args.keep:
                kept[part, : layout.tokens] = x
            x, *found = torch.native_layer_norm(x, (D,), norm_weight, norm_bias, args.eps)
            stats[:, part, : layout.tokens] = torch.stack(found)
        if x is not y:
            y.copy_(x)
    return (made, kept, stats.flatten(1)) if args.keep else (made,)


def padded(x: Tensor, n: int) -> Tensor:
    """x [tiles, tokens, ...] with n rows of zeros behind each tile's tokens."""
    return F.pad(x, (0, 0, 0, n)) if n else x


def normalised(images: Tensor, scale: Sequence[float] | None, shift: Sequence[float] | None) -> Tensor:
    """pixel * scale + shift in fp32 at least, a number for all channels or one for each."""
    if not scale and not shift:
        return images
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    for values, combine in ((scale, torch.mul), (shift, torch.add)):
        if values:
            # one number at a time: a tensor made of a list would be copied from the host
            x = combine(x, values[0]) if len(values) == 1 else torch.stack([combine(x[:, c], v) for c, v in enumerate(values)], 1)
    return x


def patch_rows(tiles: Tensor, weight: Tensor) -> Tensor:
    """[tiles, C, H, W] -> [tiles * patches, C * ph * pw]"""
    ph, pw = weight.shape[2:]
    cut = tiles.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, weight[0].numel())


def _of_tiles(table: Tensor, gate: Tensor | None, rows: Tensor) -> Tensor:
    """tanh(gate) * table [entries, side, n, D]  ->  [tiles, n, D], zero for a row of -1."""
    shape = table.shape[2:]
    table = table.flatten(2).flatten(0, 1)
    table = F.pad(table if gate is None else table * gate.tanh(), (0, 0, 0, 1))  # small beside what a batch takes of it
    rows = torch.where(rows < 0, table.shape[0] - 1, rows)
    # Its backward has a deterministic kernel, linear in the number of tiles.
    return F.embedding(rows, table).unflatten(1, shape)


def result_dtype(weight: Tensor, tables: Tables) -> torch.dtype:
    dtype = weight.dtype
    for t in (tables.local_pos, tables.global_pos):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def find_rows(args: PatchEmbedArgs) -> Callable[[PatchEmbedArgs], tuple[Tensor | None, Tensor | None]]:
    """The plan of a launch that gives each tile's row and the gates' factors, where there is a ratio. Asserts on the device that every ratio has its place."""
    if args.aspect_ratio is None:
        return lambda args: (None, None)
    (entries, side), n_tiles, n = args.tables.grid(), args.images.shape[1], math.prod(args.images.shape[:2])
    find, packed = Launch(tile_rows_kernel, IDS=args.aspect_ratio.dim() == 1, BLOCK=1024, **tune.OPTIONS), args.aspect_ratio.is_contiguous()

    def run(args):
        tables, ratio = args.tables, args.aspect_ratio
        device = ratio.device
        rows = torch.empty(n, dtype=torch.int32, device=device)
        factors = torch.empty(3, dtype=torch.float32, device=device)
        fits = torch.empty((), dtype=torch.bool, device=device)
        find((1, 1, 1), ratio if packed else ratio.contiguous(), tables.gate, tables.pre_gate, rows, factors, fits, n, n_tiles, side, entries)
        if device.type == "cpu":  # in the interpreter: the ValueError
            tile_rows(ratio, n_tiles, entries, side)
        else:
            assert_on_device(fits, "patch_embed: an aspect_ratio has no place in the tables")
        return rows, factors

    return run


def find_pixels(images: Tensor, layout: TokenLayout) -> tuple[Callable[[Tensor], Tensor] | None, Image]:
    """(what makes [tiles, C, H, W] of images, None where they are that already; how the kernels find a pixel). Any strides do, of a pixel too, where a
    tile's offsets fit 32 bits."""
    tiles = images.flatten(0, 1)
    strides = tiles.stride()
    if sum([(size - 1) * stride for size, stride in zip(tiles.shape[1:], strides[1:], strict=True)]) >= 2**31:
        strides = torch.empty(tiles.shape, device="meta").stride()
        return lambda images: images.flatten(0, 1).contiguous(), Image(*strides, layout.across)
    return None if images.is_contiguous() else lambda images: images.flatten(0, 1), Image(*strides, layout.across)


def kernel_numbers(args: PatchEmbedArgs) -> tuple[tuple | None, tuple | None]:
    if args.scale is None and args.shift is None:
        return None, None
    return args.scale or (1.0,), args.shift or (0.0,)


def patchify(args: PatchEmbedArgs, layout: TokenLayout, multiple: int = 16) -> tuple[Callable[[Tensor], Tensor], int]:
    """(images -> the pixels of every patch as a row (C, ph, pw) in weight's dtype, zeros up to a multiple of columns; how many columns). CLS and padding get
    zero rows.

    16 columns make cuBLAS's rows whole sectors: 3 * 14 * 14 = 588 alone is no multiple of 8, which its fast kernels ask for.
    """
    _, C, ph, pw = args.weight.shape
    M, K = layout.rows, -(-C * ph * pw // multiple) * multiple
    tiles_of, image = find_pixels(args.images, layout)
    grid, dtype, geometry, (scale, shift) = (-(-M // _BLOCK_M), -(-K // _BLOCK_K), 1), kernel_dtype(args.weight.dtype), layout.geometry(), kernel_numbers(args)
    fill = Launch(patchify_kernel, CHANNELS=C, PATCH_H=ph, PATCH_W=pw, BLOCK_M=_BLOCK_M, BLOCK_K=_BLOCK_K, **tune.OPTIONS)

    def run(images):
        a = torch.empty((M, K), dtype=dtype, device=images.device)
        fill(grid, images if tiles_of is None else tiles_of(images), a, image, geometry, scale, shift, M, K)
        return a

    return run, K


def triton_block(D: int) -> tuple[int, int]:
    """(rows, columns) of a program that holds whole rows of D: about 4096 elements."""
    columns = 1 << (D - 1).bit_length()
    return max(1, 4096 // columns), columns
