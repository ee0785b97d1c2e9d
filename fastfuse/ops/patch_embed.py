"""Patch embedding of tiled images: pixels to tokens in their final place, forward and backward."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import Geometry, Image, Placed
from fastfuse.ops._device_checks import assert_on_device, values_are_at_hand
from fastfuse.ops._op import HAS_TRITON, Cost, fused_op, kernel_dtype, nbytes, precision, route, transformed

if HAS_TRITON:
    from fastfuse.kernels.patch_embed import norm_bwd_kernel, patch_embed_fwd_kernel, patchify_kernel, place_bwd_kernel, place_kernel, tile_rows_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def patch_embed(
    images: Tensor,
    weight: Tensor,
    cls: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
    local_pos: Tensor | None = None,
    global_pos: Tensor | None = None,
    gate: Tensor | None = None,
    pre_pos: Tensor | None = None,
    pre_gate: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    norm: tuple[Tensor | None, Tensor | None, float] | None = None,
    append_cls: bool = False,
    scale: float | Sequence[float] | None = None,
    shift: float | Sequence[float] | None = None,
    pad_tokens_to: int = 1,
    backend: str | None = None,
) -> Tensor:
    """Patches of every tile through one linear layer, with a CLS token, at their positions (https://arxiv.org/abs/2010.11929).

    images: (..., n_tiles, C, H, W), uint8, fp16, bf16 or fp32, any strides; weight: a convolution's (D, C, ph, pw) whose stride is its kernel;
    bias, cls: (D,)  ->  (..., n_tiles, n, D), n = patches + CLS, CLS last with append_cls, then zeros up to a multiple of pad_tokens_to.
    With the gates' tanh, t = tanh(gate) and u = tanh(pre_gate), or t = u = 1 and a factor of 1 on local_pos where there is none:

        token = patch + u * pre_pos[row] | cls,  then + (1 - t) * local_pos + t * global_pos[row],  then norm

    local_pos: (n, D), the same in every tile. global_pos, pre_pos: tables with a row for each (image, tile), in one of two forms:
    [T, T, n, D] and [T, T, 1, D] with aspect_ratio int (..., 2), tiles (h, w) of each image: tile i takes entry (i // w, i % w), tiles from
    h * w on are padding and take none (https://arxiv.org/abs/2407.21783, as torchtune holds it);
    [ids, T, n, D] and [ids, T, 1, D] with aspect_ratio int (...), the id of each image's ratio: tile i takes entry (id, i), padding too
    (transformers' Mllama). aspect_ratio may be None where there are no tables, or one tile: then (1, 1).
    norm: layer norm's (weight, bias, eps), in fp32. scale, shift: numbers, or one per channel: pixels become pixel * scale + shift in fp32.

    Pixels round to weight's dtype, sums are fp32; where the library multiplies, its product rounds to weight's dtype before positions are
    added. The result has the widest dtype of weight, local_pos and global_pos. Gradients for every tensor,
    images too where they are of floating point. Under autocast weight follows its dtype. Nothing waits for the device.
    Raises TypeError, ValueError or Unsupported before any launch; a ratio that fits no table is a ValueError on a CPU and fails an assertion on a
    GPU, whose values the host does not see.
    """
    op = "patch_embed"
    if norm is not None and not (isinstance(norm, (tuple, list)) and len(norm) == 3 and isinstance(norm[2], (int, float))):
        kinds = f"({', '.join(type(v).__name__ for v in norm)})" if isinstance(norm, (tuple, list)) else type(norm).__name__
        raise TypeError(f"{op}: norm is {kinds}, expected (weight, bias, eps) with a number for eps")
    tables = Tables(bias, cls, local_pos, global_pos, gate, pre_pos, pre_gate, *(norm or (None, None))[:2])
    scale, shift = _numbers(op, "scale", scale), _numbers(op, "shift", shift)
    _check(op, images, weight, aspect_ratio, tables, scale, shift, pad_tokens_to)
    if images.device.type != "meta" and torch.is_autocast_enabled(images.device.type):
        weight = weight.to(torch.get_autocast_dtype(images.device.type))
    chosen = route(op, images, backend)
    lead, n_tiles = images.shape[:-4], images.shape[-4]
    if tables.global_pos is None and tables.pre_pos is None:
        aspect_ratio = None
    elif aspect_ratio is None:
        aspect_ratio = torch.ones((*lead, 2), dtype=torch.int64, device=images.device)
    if aspect_ratio is not None:
        aspect_ratio = aspect_ratio.reshape(-1) if aspect_ratio.dim() == len(lead) else aspect_ratio.reshape(-1, 2)
        if aspect_ratio.device != images.device:
            if values_are_at_hand(aspect_ratio):
                tile_rows(aspect_ratio, n_tiles, *tables.grid())  # a ValueError is better than an assertion on the device
            aspect_ratio = aspect_ratio.to(images.device, non_blocking=True)
    tiles = images.reshape(math.prod(lead), n_tiles, *images.shape[-3:])
    eps = None if norm is None else float(norm[2])
    args = (tiles, weight, aspect_ratio, *tables, eps, append_cls, scale, shift, pad_tokens_to)
    if chosen == "reference":
        y = _eager(*args)[0]
    else:
        if chosen == "interpreter" or images.device.type == "cuda":
            _check_kernels(op, images, weight, tables)
        keep = norm is not None and torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (images, weight, *tables))
        y = _patch_embed(*args, keep, chosen == "interpreter")[0]
    return y.view(*lead, n_tiles, *y.shape[-2:])


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


def _numbers(op: str, name: str, value) -> list[float]:
    """One number for all channels, one for each, or none."""
    if value is None:
        return []
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a tensor, expected a number or one for each channel: reading it would wait for the device")
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, (int, float)) for v in values):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number or one for each channel")
    return [float(v) for v in values]


def _check(op: str, images, weight, aspect_ratio, tables: Tables, scale: list[float], shift: list[float], pad_tokens_to: int) -> None:
    # Messages are built only where they are raised: formatting a symbolic size would break torch.compile's graph.
    for name, t in (("images", images), ("weight", weight), ("aspect_ratio", aspect_ratio), *tables._asdict().items()):
        if not isinstance(t, Tensor) and (t is not None or name in ("images", "weight")):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
    if images.dim() < 4:
        raise ValueError(f"{op}: images has shape {tuple(images.shape)}, expected (..., n_tiles, C, H, W)")
    if weight.dim() != 4 or 0 in weight.shape:
        raise ValueError(f"{op}: weight has shape {tuple(weight.shape)}, expected (D, C, ph, pw), none of them 0")
    n_tiles, C, H, W = images.shape[-4:]
    D, channels, ph, pw = weight.shape
    if C != channels:
        raise ValueError(f"{op}: images have {C} channels, weight takes {channels}")
    if H % ph or W % pw or 0 in (H, W):
        raise ValueError(f"{op}: tiles are {H} x {W} pixels, patches {ph} x {pw}: patches must divide tiles")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise ValueError(f"{op}: images is {images.dtype}, expected uint8 or floating point")
    lead, n = images.shape[:-4], H // ph * (W // pw) + (tables.cls is not None)
    for name, t, shape in (
        ("bias", tables.bias, (D,)),
        ("cls", tables.cls, (D,)),
        ("local_pos", tables.local_pos, (n, D)),
        ("norm_weight", tables.norm_weight, (D,)),
        ("norm_bias", tables.norm_bias, (D,)),
    ):
        if t is not None and t.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")
    for name, t, tokens in (("global_pos", tables.global_pos, n), ("pre_pos", tables.pre_pos, 1)):
        if t is not None and (t.dim() != 4 or t.shape[2:] != (tokens, D)):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected [T, T, {tokens}, {D}] or [ids, T, {tokens}, {D}]")
    if tables.global_pos is not None and tables.pre_pos is not None and tables.global_pos.shape[:2] != tables.pre_pos.shape[:2]:
        raise ValueError(f"{op}: global_pos is for {tuple(tables.global_pos.shape[:2])} tiles, pre_pos for {tuple(tables.pre_pos.shape[:2])}")
    for name, t, owner in (("gate", tables.gate, tables.global_pos), ("pre_gate", tables.pre_gate, tables.pre_pos)):
        if t is not None and t.numel() != 1:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected one number")
        if t is not None and owner is None:
            raise ValueError(f"{op}: {name} is given, {'global_pos' if name == 'gate' else 'pre_pos'} is None: there is nothing to gate")
    _check_ratio(op, lead, n_tiles, aspect_ratio, tables)
    for name, values in (("scale", scale), ("shift", shift)):
        if len(values) not in (0, 1, C):
            raise ValueError(f"{op}: {name} has {len(values)} numbers, images have {C} channels")
    if not isinstance(pad_tokens_to, int) or pad_tokens_to < 1:
        raise ValueError(f"{op}: pad_tokens_to is {pad_tokens_to!r}, expected a whole number >= 1")
    for name, t in (("weight", weight), *tables._asdict().items()):
        if t is not None and t.device != images.device:
            raise ValueError(f"{op}: images is on {images.device}, {name} on {t.device}")
        if t is not None and not t.is_floating_point():
            raise ValueError(f"{op}: {name} is {t.dtype}, expected floating point")


def _check_ratio(op: str, lead: tuple[int, ...], n_tiles: int, aspect_ratio: Tensor | None, tables: Tables) -> None:
    (entries, side), tabled = tables.grid(), tables.global_pos is not None or tables.pre_pos is not None
    if aspect_ratio is None:
        if tabled and n_tiles > 1:
            raise ValueError(f"{op}: aspect_ratio is None, images have {n_tiles} tiles that {'global_pos' if tables.pre_pos is None else 'pre_pos'} places")
    else:
        if aspect_ratio.is_floating_point() or aspect_ratio.dtype == torch.bool:
            raise ValueError(f"{op}: aspect_ratio is {aspect_ratio.dtype}, expected integers")
        if aspect_ratio.shape not in (lead, (*lead, 2)):
            raise ValueError(f"{op}: aspect_ratio has shape {tuple(aspect_ratio.shape)}, images need {(*lead, 2)} of (h, w), or {tuple(lead)} of ids")
    if tabled and (aspect_ratio is None or aspect_ratio.dim() > len(lead)):
        if entries != side:
            raise ValueError(f"{op}: tables are for [{entries}, {side}] tiles, aspect_ratio in (h, w) needs [T, T]")
    elif tabled and n_tiles > side:
        raise ValueError(f"{op}: images have {n_tiles} tiles, tables for ids hold {side}")


def _check_kernels(op: str, images: Tensor, weight: Tensor, tables: Tables) -> None:
    if images.dtype not in (torch.uint8, *DTYPES):
        raise Unsupported(f"{op}: images is {images.dtype}, covered are uint8, bf16, fp16 and fp32")
    for name, t in (("weight", weight), *tables._asdict().items()):
        if t is not None and t.dtype not in DTYPES:
            raise Unsupported(f"{op}: {name} is {t.dtype}, covered are bf16, fp16 and fp32")


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


def patch_embed_ref(
    images: Tensor,
    weight: Tensor,
    cls: Tensor | None = None,
    aspect_ratio: Tensor | None = None,
    local_pos: Tensor | None = None,
    global_pos: Tensor | None = None,
    gate: Tensor | None = None,
    pre_pos: Tensor | None = None,
    pre_gate: Tensor | None = None,
    **options,
) -> Tensor:
    """The formula, eager: patch_embed with backend="torch"."""
    return patch_embed(images, weight, cls, aspect_ratio, local_pos, global_pos, gate, pre_pos, pre_gate, **options, backend="torch")


def _eager(images: Tensor, weight: Tensor, aspect_ratio: Tensor | None, *rest) -> tuple[Tensor, Tensor, Tensor]:
    """(result [images, n_tiles, padded, D], what the norm was given [images * n_tiles, tokens, D], its mean and 1 / deviation [2, rows])."""
    tables, (eps, append_cls, scale, shift, pad_tokens_to) = Tables(*rest[:9]), rest[9:14]
    dtype = _result_dtype(weight, tables)
    wide = torch.promote_types(dtype, torch.float32)
    bias, cls, local, table, gate, pre, pre_gate, norm_weight, norm_bias = (t if t is None else t.to(wide) for t in tables)
    n_tiles = images.shape[1]
    x = _normalised(images.flatten(0, 1), scale, shift).to(weight.dtype)
    x = F.conv2d(x, weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2).to(wide)
    if bias is not None:
        x = x + bias
    rows = None if aspect_ratio is None else tile_rows(aspect_ratio, n_tiles, *tables.grid())
    if pre is not None:
        x = x + _of_tiles(pre, pre_gate, rows)
    if cls is not None:
        token = cls.expand(x.shape[0], 1, -1)
        x = torch.cat([x, token] if append_cls else [token, x], 1)
    # In place from here on: x is nobody's input, and a copy of it costs as much as a table's addition. vmap may have to make x larger.
    add = torch.add if transformed() else Tensor.add_
    if local is not None:
        x = add(x, local if gate is None else local * (1 - gate.tanh()))
    if table is not None:
        x = add(x, _of_tiles(table, gate, rows))
    padding, stats = -x.shape[1] % pad_tokens_to, x.new_empty(0)
    kept = x
    if eps is not None:
        x, *stats = torch.native_layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
        stats = torch.stack([_padded(t, padding).flatten() for t in stats])
    x = _padded(x.to(dtype), padding).contiguous()
    # Not a view: autograd forbids to change one of several views that a function returns in place.
    return torch.ops.aten._unsafe_view(x, (images.shape[0], n_tiles, *x.shape[1:])), kept, stats


def _padded(x: Tensor, n: int) -> Tensor:
    """x [tiles, tokens, ...] with n rows of zeros behind each tile's tokens."""
    return F.pad(x, (0, 0, 0, n)) if n else x


def _reference(*args) -> tuple[Tensor, Tensor, Tensor]:
    *args, keep, _interpret = args
    y, kept, stats = _eager(*args)
    if not keep:
        return y, y.new_empty(0), stats.new_empty(0)
    return y, _padded(kept.to(y.dtype), y.shape[2] - kept.shape[1]).contiguous(), stats


def _normalised(images: Tensor, scale: list[float], shift: list[float]) -> Tensor:
    """pixel * scale + shift in fp32 at least, a number for all channels or one for each."""
    if not scale and not shift:
        return images
    x = images.to(torch.promote_types(images.dtype, torch.float32))
    for values, combine in ((scale, torch.mul), (shift, torch.add)):
        if values:
            # one number at a time: a tensor made of a list would be copied from the host
            x = combine(x, values[0]) if len(values) == 1 else torch.stack([combine(x[:, c], v) for c, v in enumerate(values)], 1)
    return x


def _of_tiles(table: Tensor, gate: Tensor | None, rows: Tensor) -> Tensor:
    """tanh(gate) * table [entries, side, n, D]  ->  [tiles, n, D], zero for a row of -1."""
    shape = table.shape[2:]
    table = table.flatten(2).flatten(0, 1)
    table = F.pad(table if gate is None else table * gate.tanh(), (0, 0, 0, 1))  # small beside what a batch takes of it
    rows = torch.where(rows < 0, table.shape[0] - 1, rows)
    # embedding where there is a gradient: its backward has a deterministic kernel, linear in the number of tiles. On a CPU it gathers 4 times slower.
    found = F.embedding(rows, table) if table.requires_grad else table[rows]
    return found.unflatten(1, shape)


def _result_dtype(weight: Tensor, tables: Tables) -> torch.dtype:
    dtype = weight.dtype
    for t in (tables.local_pos, tables.global_pos):
        dtype = dtype if t is None else torch.promote_types(dtype, t.dtype)
    return dtype


def patch_embed_cost(
    images: Tensor, weight: Tensor, cls: Tensor | None = None, *_, local_pos=None, global_pos=None, pre_pos=None, pad_tokens_to: int = 1
) -> Cost:
    """Forward: pixels, weight and the tables' rows that tiles can take read once, tokens written once."""
    geometry = _Geometry.of(images, weight, cls is not None, False, pad_tokens_to)
    tiles = math.prod(images.shape[:-3])
    out = tiles * geometry.padded * weight.shape[0] * _result_dtype(weight, Tables(local_pos=local_pos, global_pos=global_pos)).itemsize
    taken = sum(nbytes(t[0, 0]) * min(tiles, _reachable(*t.shape[:2], images.shape[-4])) for t in (global_pos, pre_pos) if t is not None)
    return Cost(nbytes(images, weight, cls, local_pos) + taken + out, 2 * tiles * geometry.patches * weight.numel())


def patch_embed_bwd_cost(
    images: Tensor, weight: Tensor, cls: Tensor | None = None, *_, local_pos=None, global_pos=None, pre_pos=None, pad_tokens_to: int = 1
) -> Cost:
    """The gradients of weight, CLS, tables and gates: pixels, dY and the tables' rows read once, every gradient written once, the whole of each table's."""
    forward = patch_embed_cost(images, weight, cls, local_pos=local_pos, global_pos=global_pos, pre_pos=pre_pos, pad_tokens_to=pad_tokens_to)
    return Cost(forward.bytes + nbytes(cls, local_pos, global_pos, pre_pos), forward.flops)


def _reachable(entries: int, side: int, n_tiles: int) -> int:
    """Rows of a table that some image of n_tiles tiles can take. In a grid, tile (i, j) needs an image of (i + 1) x (j + 1) tiles at least."""
    if entries != side:
        return entries * min(side, n_tiles)
    return sum((i + 1) * (j + 1) <= n_tiles for i in range(side) for j in range(side))


class _Geometry(NamedTuple):
    """Where patches and CLS stand among the rows of a tile."""

    padded: int
    tokens: int
    patches: int
    first: int  # the first patch's token
    cls_at: int  # CLS's token, -1 without
    across: int  # patches in a line of them

    @staticmethod
    def of(images: Tensor, weight: Tensor, has_cls: bool, append_cls: bool, pad_tokens_to: int) -> "_Geometry":
        down, across = images.shape[-2] // weight.shape[2], images.shape[-1] // weight.shape[3]
        tokens = down * across + has_cls
        cls_at = -1 if not has_cls else tokens - 1 if append_cls else 0
        return _Geometry(-(-tokens // pad_tokens_to) * pad_tokens_to, tokens, down * across, int(has_cls and not append_cls), cls_at, across)

    def shape(self) -> Geometry:
        return Geometry(*self[:5])


_BLOCK_M, _BLOCK_K = 32, 128  # of patchify_kernel: 16 elements a thread
_NORM_PROGRAMS = 1024
_BLOCK_T, _BLOCK_N, _TILES = 16, 64, 2  # of place_bwd_kernel: 16 elements a thread


@fused_op("patch_embed", reference=_reference)
def _patch_embed(
    images: Tensor, weight: Tensor, aspect_ratio: Tensor | None,
    bias: Tensor | None, cls: Tensor | None, local_pos: Tensor | None, global_pos: Tensor | None, gate: Tensor | None,
    pre_pos: Tensor | None, pre_gate: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float | None, append_cls: bool, scale: Sequence[float], shift: Sequence[float], pad_tokens_to: int, keep: bool, interpret: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As _eager. What the norm was given and its statistics are there only with `keep`: the backward needs them."""
    tables = Tables(bias, cls, local_pos, global_pos, gate, pre_pos, pre_gate, norm_weight, norm_bias)
    geometry = _Geometry.of(images, weight, cls is not None, append_cls, pad_tokens_to)
    (n_images, n_tiles), D, dtype = images.shape[:2], weight.shape[0], _result_dtype(weight, tables)
    M, work, norm = n_images * n_tiles * geometry.padded, kernel_dtype(dtype), eps is not None
    out = torch.empty((M, D), dtype=work, device=images.device)
    kept = torch.empty((n_images * n_tiles, geometry.padded, D) if keep else 0, dtype=work, device=images.device)
    stats = torch.empty((2, M) if keep else 0, dtype=torch.float32, device=images.device)
    if M:
        placed = _kernel_tables(tables, aspect_ratio, n_tiles)
        K = math.prod(weight.shape[1:])
        kinds = {name: "fp32" if t == torch.float32 else "16-bit" for name, t in (("dtype", weight.dtype), ("out", dtype))}
        tile = tune.pick("patch_embed", tune.arch_of(images.device), **kinds, norm=int(norm), M=M, N=D, K=K, PW=weight.shape[3])
        if tile is None:
            pixels = patchify(images, weight, geometry, scale, shift)
            w = _columns(weight.to(pixels.dtype).flatten(1), pixels.shape[1] - K)
            x = torch.mm(pixels, w.T, out=out) if out.dtype == pixels.dtype else torch.mm(pixels, w.T)
        else:
            _launch(tile, images, weight, geometry, placed, scale, shift, out)
            x, placed = out, Placed()
        if tile is None or norm:
            block = triton_block(D)
            affine = (None if t is None else t.contiguous() for t in (norm_weight, norm_bias))
            place_kernel[(-(-M // block[0]),)](
                x, out, kept if keep else None, stats if keep else None, placed, *affine, geometry.shape(), M, D, eps or 0.0,
                NORM=norm, BLOCK_M=block[0], BLOCK_N=block[1], **tune.OPTIONS,
            )  # fmt: skip
    return out.to(dtype).view(n_images, n_tiles, geometry.padded, D), kept.to(dtype), stats


def triton_block(D: int) -> tuple[int, int]:
    """(rows, columns) of a program that holds whole rows of D: about 4096 elements."""
    columns = 1 << (D - 1).bit_length()
    return max(1, 4096 // columns), columns


def norm_warps(columns: int) -> int:
    """Warps of norm_bwd_kernel, whose programs hold six rows at once: 16 elements of each a thread."""
    return min(16, max(4, columns // 512))


def _kernel_tables(tables: Tables, aspect_ratio: Tensor | None, n_tiles: int) -> Placed:
    """What kernels add, with each tile's row and the gates' factors. Asserts on the device that every ratio has its place."""
    rows = factors = None
    if aspect_ratio is not None:
        (entries, side), device = tables.grid(), aspect_ratio.device
        n = aspect_ratio.shape[0] * n_tiles
        rows = torch.empty(n, dtype=torch.int32, device=device)
        factors = torch.empty(3, dtype=torch.float32, device=device)
        fits = torch.empty((), dtype=torch.bool, device=device)
        tile_rows_kernel[(1,)](
            aspect_ratio.contiguous(), tables.gate, tables.pre_gate, rows, factors, fits, n, n_tiles, side, entries,
            IDS=aspect_ratio.dim() == 1, BLOCK=1024, **tune.OPTIONS,
        )  # fmt: skip
        if device.type == "cpu":  # in the interpreter: the ValueError
            tile_rows(aspect_ratio, n_tiles, entries, side)
        else:
            assert_on_device(fits, "patch_embed: an aspect_ratio has no place in the tables")
    read = (None if t is None else t.contiguous() for t in (tables.cls, tables.bias, tables.local_pos, tables.global_pos, tables.pre_pos))
    return Placed(*read, rows, factors)


def _kernel_image(images: Tensor, geometry: _Geometry) -> tuple[Tensor, Image]:
    """Pixels as [tiles, C, H, W], and how the kernels find them. Any strides do, of a pixel too, where a tile's offsets fit 32 bits."""
    tiles = images.flatten(0, 1)
    if sum((size - 1) * stride for size, stride in zip(tiles.shape[1:], tiles.stride()[1:], strict=True)) >= 2**31:
        tiles = tiles.contiguous()
    return tiles, Image(*tiles.stride(), geometry.across)


def _kernel_numbers(scale: Sequence[float], shift: Sequence[float]) -> tuple[tuple | None, tuple | None]:
    if not scale and not shift:
        return None, None
    return tuple(scale) or (1.0,), tuple(shift) or (0.0,)


def patchify(images: Tensor, weight: Tensor, geometry: _Geometry, scale: Sequence[float], shift: Sequence[float], multiple: int = 16) -> Tensor:
    """The pixels of every patch as a row (C, ph, pw) in weight's dtype, zeros up to a multiple of columns; zero rows for CLS and padding.

    16 columns make cuBLAS's rows whole sectors: 3 * 14 * 14 = 588 alone is no multiple of 8, which its fast kernels ask for.
    """
    (_, C, ph, pw), M = weight.shape, math.prod(images.shape[:2]) * geometry.padded
    K = -(-C * ph * pw // multiple) * multiple
    a = torch.empty((M, K), dtype=kernel_dtype(weight.dtype), device=images.device)
    tiles, image = _kernel_image(images, geometry)
    patchify_kernel[(-(-M // _BLOCK_M), -(-K // _BLOCK_K))](
        tiles, a, image, geometry.shape(), *_kernel_numbers(scale, shift), M, K,
        CHANNELS=C, PATCH_H=ph, PATCH_W=pw, BLOCK_M=_BLOCK_M, BLOCK_K=_BLOCK_K, **tune.OPTIONS,
    )  # fmt: skip
    return a


def _launch(tile: tune.Tile, images: Tensor, weight: Tensor, geometry: _Geometry, placed: Placed, scale, shift, out: Tensor) -> None:
    """One GEMM with everything placed in its epilogue, over patchified rows or, with DIRECT, over the images themselves."""
    D, C, ph, pw = weight.shape
    direct, step, work = tile["DIRECT"], tile["BLOCK_K"], kernel_dtype(weight.dtype)
    # Whole sectors of W for each line of a patch, so that pixels of one line stay together: 14 become 16.
    line = -(-pw // 8) * 8 if direct else pw
    K = -(-C * ph * line // step) * step
    w = _columns(_columns(weight.to(work), line - pw).flatten(1), K - C * ph * line).contiguous()
    if direct:
        x, image = _kernel_image(images, geometry)
        numbers = _kernel_numbers(scale, shift)
    else:
        x, image, numbers = patchify(images, weight, geometry, scale, shift, step), None, (None, None)
    blocks = -(-out.shape[0] // tile["BLOCK_M"]) * -(-D // tile["BLOCK_N"])
    # Of a persistent kernel as many as there are multiprocessors, each of which a tile fills.
    programs = min(blocks, tune.processors_of(out.device)) if tile["FLATTEN"] else blocks
    patch_embed_fwd_kernel[(programs,)](
        x, w, out, placed, image, geometry.shape(), *numbers, out.shape[0], D, K,
        CHANNELS=C, PATCH_H=ph, PATCH_W=pw, LINE=line, PRECISION=precision(), **tile.launch(),
    )  # fmt: skip


def _columns(w: Tensor, n: int) -> Tensor:
    """w with n columns of zeros behind its own."""
    return F.pad(w, (0, n)) if n else w


# What patch_embed's backward can give, in the order of its results.
_GRADIENTS = ("images", "weight", *Tables._fields)


def _bwd_reference(dy: Tensor, images: Tensor, weight: Tensor, aspect_ratio: Tensor | None, *rest) -> list[Tensor]:
    tables, (eps, append_cls, scale, shift, kept, stats, wanted, _interpret) = Tables(*rest[:9]), rest[9:]
    geometry, want = _Geometry.of(images, weight, tables.cls is not None, append_cls, 1), dict(zip(_GRADIENTS, wanted, strict=True))
    wide = torch.promote_types(dy.dtype, torch.float32)
    n_tiles, (entries, side) = images.shape[1], tables.grid()
    dz, grads = dy.flatten(0, 1)[:, : geometry.tokens], {}
    if eps is not None:
        mean, rstd = (s.view(*kept.shape[:2], 1)[:, : geometry.tokens] for s in stats)
        kept = kept[:, : geometry.tokens]
        norm = None if tables.norm_weight is None else tables.norm_weight.to(wide)
        mask = want["norm_weight"], want["norm_bias"]
        bias = None if tables.norm_bias is None else tables.norm_bias.to(wide)
        values = (t.to(wide).contiguous() for t in (dz, kept))
        dz, *found = torch.ops.aten.native_layer_norm_backward(*values, kept.shape[-1:], mean.contiguous(), rstd.contiguous(), norm, bias, [True, *mask])
        grads |= dict(zip(("norm_weight", "norm_bias"), found, strict=True))
        dz = dz.to(dy.dtype)
    first, last = geometry.first, geometry.first + geometry.patches
    if want["weight"]:
        pixels = _patch_rows(_normalised(images.flatten(0, 1), scale, shift).to(weight.dtype), weight)
        # CLS gets pixels of zero: cheaper than a copy of dz without it
        pixels = F.pad(pixels.unflatten(0, (-1, geometry.patches)), (0, 0, first, geometry.tokens - last)).flatten(0, 1)
        grads["weight"] = (pixels.T @ dz.reshape(-1, dz.shape[-1]).to(weight.dtype)).T
    if want["images"]:
        grads["images"] = _image_gradient(dz[:, first:last], images, weight, scale)
    if any(want[name] for name in ("global_pos", "gate", "pre_pos", "pre_gate")):
        rows, n_rows = tile_rows(aspect_ratio, n_tiles, entries, side), entries * side
        # dz by row in one pass; tiles without a row go to one behind the last
        sums = torch.zeros((n_rows + 1, *dz.shape[1:]), dtype=wide, device=dy.device).index_add_(0, torch.where(rows < 0, n_rows, rows), dz.to(wide))
        total = sums.sum(0)
        sums = sums[:-1].unflatten(0, (entries, side))
    else:
        total = dz.sum(0, dtype=wide)
    opened, pre_opened = (1 if t is None else t.to(wide).tanh() for t in (tables.gate, tables.pre_gate))
    if want["bias"]:
        grads["bias"] = total[first:last].sum(0)
    if want["cls"]:
        grads["cls"] = total[geometry.cls_at]
    if want["local_pos"]:
        grads["local_pos"] = total * (1 if tables.gate is None else 1 - opened)
    if want["global_pos"]:
        grads["global_pos"] = sums * opened
    if want["gate"]:
        along = (sums * tables.global_pos).sum() - (0 if tables.local_pos is None else (total * tables.local_pos).sum())
        grads["gate"] = along * (1 - opened**2)
    if want["pre_pos"] or want["pre_gate"]:
        of_patches = sums[:, :, first:last].sum(2, keepdim=True)
        grads["pre_pos"] = of_patches * pre_opened
        if want["pre_gate"]:
            grads["pre_gate"] = (of_patches * tables.pre_pos).sum() * (1 - pre_opened**2)
    return _in_order(grads, want, {"images": images, "weight": weight, **tables._asdict()})


def _in_order(grads: dict[str, Tensor | None], want: dict[str, bool], like: dict[str, Tensor | None]) -> list[Tensor]:
    """The gradients in _GRADIENTS' order, in their tensors' shape and dtype; empty where none is wanted."""
    found = []
    for name in _GRADIENTS:
        t = like[name]
        found.append(grads[name].to(t.dtype).reshape(t.shape).contiguous() if want[name] else like["weight"].new_empty(0))
    return found


def _patch_rows(tiles: Tensor, weight: Tensor) -> Tensor:
    """[tiles, C, H, W] -> [tiles * patches, C * ph * pw]"""
    ph, pw = weight.shape[2:]
    cut = tiles.unflatten(3, (-1, pw)).unflatten(2, (-1, ph))
    return cut.permute(0, 2, 4, 1, 3, 5).reshape(-1, weight[0].numel())


def _image_gradient(patches: Tensor, images: Tensor, weight: Tensor, scale: Sequence[float]) -> Tensor:
    """patches: the gradient of every patch, [tiles, patches, D]  ->  of the pixels, as images."""
    C, ph, pw = weight.shape[1:]
    pixels = patches.to(weight.dtype) @ weight.flatten(1)
    pixels = pixels.view(pixels.shape[0], images.shape[-2] // ph, images.shape[-1] // pw, C, ph, pw)
    pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    if len(scale) > 1:
        return torch.stack([pixels[:, :, c] * s for c, s in enumerate(scale)], 2)
    return pixels * scale[0] if scale else pixels


@fused_op("patch_embed_bwd", reference=_bwd_reference)
def _patch_embed_bwd(
    dy: Tensor, images: Tensor, weight: Tensor, aspect_ratio: Tensor | None,
    bias: Tensor | None, cls: Tensor | None, local_pos: Tensor | None, global_pos: Tensor | None, gate: Tensor | None,
    pre_pos: Tensor | None, pre_gate: Tensor | None, norm_weight: Tensor | None, norm_bias: Tensor | None,
    eps: float | None, append_cls: bool, scale: Sequence[float], shift: Sequence[float], kept: Tensor, stats: Tensor, wanted: Sequence[bool], interpret: bool,
) -> list[Tensor]:  # fmt: skip
    """The gradients that `wanted` asks for, in _GRADIENTS' order; the others are empty. Deterministic, and linear in the number of tiles."""
    tables = Tables(bias, cls, local_pos, global_pos, gate, pre_pos, pre_gate, norm_weight, norm_bias)
    n_images, n_tiles, padded, D = dy.shape
    geometry = _Geometry.of(images, weight, cls is not None, append_cls, 1)._replace(padded=padded)
    want, grads = dict(zip(_GRADIENTS, wanted, strict=True)), {}
    M = n_images * n_tiles * padded
    if not M:
        return _bwd_reference(dy, images, weight, aspect_ratio, *tables, eps, append_cls, scale, shift, kept, stats, wanted, interpret)
    dz = dy.to(kernel_dtype(dy.dtype)).contiguous().view(M, D)
    if eps is not None:
        dz, grads["norm_weight"], grads["norm_bias"] = _norm_bwd(dz, kept.to(dz.dtype), stats, norm_weight, geometry)
    elif padded > geometry.tokens and (want["weight"] or want["images"]):
        # What comes back to padding rows must go nowhere, and NaN times their pixels of zero would. The norm's backward stops it by itself.
        dz = F.pad(dz.view(-1, padded, D)[:, : geometry.tokens], (0, 0, 0, padded - geometry.tokens)).view(M, D)
    narrow = dz.to(kernel_dtype(weight.dtype)) if want["weight"] or want["images"] else None
    if want["weight"]:
        pixels = patchify(images, weight, geometry, scale, shift)
        grads["weight"] = (narrow.T @ pixels)[:, : weight[0].numel()]
    if want["images"]:
        patches = narrow.view(-1, padded, D)[:, geometry.first : geometry.first + geometry.patches]
        grads["images"] = _image_gradient(patches, images, weight.to(narrow.dtype), scale)
    if any(want[name] for name in Tables._fields[:7]):
        grads |= _place_bwd(dz, tables, aspect_ratio, n_tiles, geometry, want)
    return _in_order(grads, want, {"images": images, "weight": weight, **tables._asdict()})


def _norm_bwd(dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor | None, geometry: _Geometry) -> tuple[Tensor, Tensor, Tensor]:
    """(dx, dw, db), zero in padding rows."""
    M, D = dy.shape
    rows = -(-M // _NORM_PROGRAMS)
    programs = -(-M // rows)
    dx, columns = torch.empty_like(dy), triton_block(D)[1]
    dw, db = (torch.empty((programs, D), dtype=torch.float32, device=dy.device) for _ in range(2))
    weight = None if weight is None else weight.contiguous()
    norm_bwd_kernel[(programs,)](dy, x, stats, weight, dx, dw, db, geometry.shape(), M, D, rows, BLOCK_N=columns, num_warps=norm_warps(columns), **tune.OPTIONS)
    return dx, dw.sum(0), db.sum(0)


def _place_bwd(dz: Tensor, tables: Tables, aspect_ratio: Tensor | None, n_tiles: int, geometry: _Geometry, want: dict[str, bool]) -> dict[str, Tensor]:
    """What is added to the patches: their gradients are sums of dz over tiles, by the row that each tile takes."""
    D, tokens, device = dz.shape[1], geometry.tokens, dz.device
    first, last = geometry.first, geometry.first + geometry.patches
    by_row = aspect_ratio is not None and any(want[name] for name in ("global_pos", "gate", "pre_pos", "pre_gate"))
    factors, grads = None, {}
    if aspect_ratio is not None and (by_row or tables.gate is not None):
        *_, placed, factors = _kernel_tables(tables, aspect_ratio, n_tiles)
    if by_row:
        entries, side = tables.grid()
        n_rows = entries * side
        order, starts = _by_row(placed, n_rows)
        grid = (-(-tokens // _BLOCK_T), -(-D // _BLOCK_N))
        total = torch.empty((tokens, D), dtype=torch.float32, device=device)
        table = None if tables.global_pos is None else tables.global_pos.contiguous()
        dtable = torch.empty((n_rows, tokens, D), dtype=kernel_dtype(table.dtype), device=device) if want["global_pos"] else None
        pre = torch.empty((grid[0], n_rows, D), dtype=torch.float32, device=device) if want["pre_pos"] or want["pre_gate"] else None
        dots = torch.empty((*grid, 2), dtype=torch.float32, device=device) if want["gate"] else None
        local = None if tables.local_pos is None else tables.local_pos.contiguous()
        place_bwd_kernel[grid](
            dz, order, starts, table, local, factors, total, dtable, pre, dots, geometry.shape(), D, n_rows,
            BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, TILES=_TILES, **tune.OPTIONS,
        )  # fmt: skip
        if want["global_pos"]:
            grads["global_pos"] = dtable
        if want["gate"]:
            along, off = dots.sum((0, 1))
            grads["gate"] = (along - (off if local is not None else 0)) * (1 - factors[1] ** 2)
        if pre is not None:
            sums = pre.sum(0)
            grads["pre_pos"] = sums * factors[2]
            if want["pre_gate"]:
                grads["pre_gate"] = (sums * tables.pre_pos.view(n_rows, D)).sum() * (1 - factors[2] ** 2)
    else:
        total = dz.view(-1, geometry.padded, D)[:, :tokens].sum(0, dtype=torch.float32)
    grads["local_pos"] = total if factors is None else total * factors[0]
    if want["cls"]:
        grads["cls"] = total[geometry.cls_at].clone()
    if want["bias"]:
        grads["bias"] = total[first:last].sum(0)
    return grads


def _by_row(rows: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The tiles in the order of their rows, and where each row's tiles start: int32 [tiles], [n_rows + 1]. Tiles without a row come first."""
    ranked, order = torch.sort(rows, stable=True)
    starts = torch.searchsorted(ranked, torch.arange(n_rows + 1, dtype=torch.int32, device=rows.device), out_int32=True)
    return order.to(torch.int32), starts


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.eps, ctx.append_cls, ctx.scale, ctx.shift, _pad, _keep, ctx.interpret = inputs
    _, kept, stats = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(kept, stats)
    if ctx.eps is None and not ctx.needs_input_grad[0] and not ctx.needs_input_grad[1]:
        # Of pixels only the shape is asked then: the op is linear in everything else. Past a norm a second derivative reads them.
        tensors[0] = tensors[0].new_empty(()).expand(tensors[0].shape)
    ctx.save_for_backward(*tensors, kept, stats)


def _backward(ctx, dy: Tensor | None, *_):
    need, nothing = ctx.needs_input_grad, (None,) * 7
    if dy is None:
        return (None,) * 19
    *tensors, kept, stats = ctx.saved_tensors
    wanted = [need[0], need[1], *need[3:12]]
    found = _patch_embed_bwd(dy, *tensors, ctx.eps, ctx.append_cls, ctx.scale, ctx.shift, kept, stats, wanted, ctx.interpret)
    given = [g if wants else None for g, wants in zip(found, wanted, strict=True)]
    return *given[:2], None, *given[2:], *nothing


def _bwd_setup_context(ctx, inputs, output) -> None:
    dy, *tensors, ctx.eps, ctx.append_cls, ctx.scale, ctx.shift, _, _, ctx.wanted, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(dy, *tensors)


def _bwd_backward(ctx, grads: list[Tensor | None]):
    """The gradient of a gradient is rare enough to be left to autograd: the eager formula, differentiated twice."""
    given = [t if t is None or not t.is_floating_point() else t.detach().requires_grad_() for t in ctx.saved_tensors]
    if all(g is None for g in grads):
        return (None,) * 21
    with torch.enable_grad():
        dy, images, weight, aspect_ratio, *tables = given
        y = _eager(images, weight, aspect_ratio, *tables, ctx.eps, ctx.append_cls, ctx.scale, ctx.shift, 1)[0]
        asked = [(t, g) for t, g, wanted in zip((images, weight, *tables), grads, ctx.wanted, strict=True) if wanted and g is not None]
        first = torch.autograd.grad(y, [t for t, _ in asked], dy[:, :, : y.shape[2]], create_graph=True)
        leaves = [t for t in given if t is not None and t.requires_grad]
        second = iter(torch.autograd.grad(first, leaves, [g for _, g in asked], allow_unused=True))
    found = [None if t is None or not t.requires_grad else next(second) for t in given]
    # PyTorch takes an empty list for one of tensors, whose gradient is a list.
    scale, shift = (None if values else [] for values in (ctx.scale, ctx.shift))
    return *found, None, None, scale, shift, None, None, None, None


_patch_embed.register_autograd(_backward, setup_context=_setup_context)
_patch_embed_bwd.register_autograd(_bwd_backward, setup_context=_bwd_setup_context)
