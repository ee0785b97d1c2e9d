"""The gradients of patch_embed."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.ops._fused_op import fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, Plan, differentiated_twice, kernel_dtype
from fastfuse.ops._patch_tokens import PatchEmbedArgs, Tables, TokenLayout, find_rows, formula, normalised, patch_rows, patchify, tile_rows, triton_block

if HAS_TRITON:
    from fastfuse.kernels.patch_embed import norm_bwd_kernel, place_bwd_kernel

_NORM_PROGRAMS = 1024
_BLOCK_T, _BLOCK_N, _TILES = 16, 64, 2  # of place_bwd_kernel: 16 elements a thread
_BY_ROW = ("global_pos", "gate", "pre_pos", "pre_gate")


class PatchEmbedBwdArgs(NamedTuple):
    """dy: [images, n_tiles, padded, D]; forward: what the forward was given. kept: what its norm was given, stats: mean and 1 / deviation, where there is one.
    needs: forward with a bool in the place of each tensor."""

    dy: Tensor
    forward: PatchEmbedArgs
    kept: Tensor | None
    stats: Tensor | None
    needs: PatchEmbedArgs
    interpret: bool


def _by_name(args: PatchEmbedArgs) -> dict[str, Any]:
    """What may have a gradient, in the order of the tree."""
    return {"images": args.images, "weight": args.weight, **args.tables._asdict()}


def in_places(needs: tuple, grads: Iterator[Tensor]) -> tuple:
    """The tree of `needs` with the next of grads where it says True, else None."""
    tree = []
    for n in needs:
        tree += (next(grads) if n is True else in_places(n, grads) if n else None,)
    return tuple.__new__(type(needs), tree)


def _in_order(grads: dict[str, Tensor | None], need: dict[str, bool], forward: PatchEmbedArgs) -> tuple[Tensor, ...]:
    """The gradients that are needed, in their tensors' shape and dtype."""
    return tuple([grads[name].to(t.dtype).reshape(t.shape).contiguous() for name, t in _by_name(forward).items() if need[name]])


def _add_sums(grads: dict[str, Tensor], total: Tensor, factor: Tensor | None, layout: TokenLayout, need: dict[str, bool]) -> None:
    """The gradients of what is the same in every tile. total: the sum over all tiles, factor: of local_pos."""
    if need["local_pos"]:
        grads["local_pos"] = total if factor is None else total * factor
    if need["cls"]:
        grads["cls"] = total[layout.cls_at].clone()
    if need["bias"]:
        grads["bias"] = total[layout.first : layout.first + layout.patches].sum(0)


def _reference(args: PatchEmbedBwdArgs) -> tuple[Tensor, ...]:
    forward, kept, need = args.forward, args.kept, _by_name(args.needs)
    images, weight, tables, layout = forward.images, forward.weight, forward.tables, TokenLayout.of(forward)
    wide = torch.promote_types(args.dy.dtype, torch.float32)
    dz, grads = args.dy.flatten(0, 1)[:, : layout.tokens], {}
    if kept is not None:
        stats = [s.view(*kept.shape[:2], 1)[:, : layout.tokens].contiguous() for s in args.stats]
        values = [t.to(wide).contiguous() for t in (dz, kept[:, : layout.tokens])]
        norm = [t if t is None else t.to(wide) for t in (tables.norm_weight, tables.norm_bias)]
        mask = True, need["norm_weight"], need["norm_bias"]
        dz, grads["norm_weight"], grads["norm_bias"] = torch.ops.aten.native_layer_norm_backward(*values, kept.shape[-1:], *stats, *norm, mask)
        dz = dz.to(args.dy.dtype)
    first, last = layout.first, layout.first + layout.patches
    if need["weight"]:
        pixels = patch_rows(normalised(images.flatten(0, 1), forward.scale, forward.shift).to(weight.dtype), weight)
        # CLS gets pixels of zero: cheaper than a copy of dz without it
        pixels = F.pad(pixels.unflatten(0, (-1, layout.patches)), (0, 0, first, layout.tokens - last)).flatten(0, 1)
        grads["weight"] = (pixels.T @ dz.reshape(-1, dz.shape[-1]).to(weight.dtype)).T
    if need["images"]:
        grads["images"] = _image_gradient(dz[:, first:last], images, weight, forward.scale)
    if any(need[name] for name in _BY_ROW):
        entries, side = tables.grid()
        rows, n_rows = tile_rows(forward.aspect_ratio, images.shape[1], entries, side), entries * side
        # dz by row in one pass; tiles without a row go to one behind the last
        sums = torch.zeros((n_rows + 1, *dz.shape[1:]), dtype=wide, device=args.dy.device).index_add_(0, torch.where(rows < 0, n_rows, rows), dz.to(wide))
        total = sums.sum(0)
        sums = sums[:-1].unflatten(0, (entries, side))
    else:
        total = dz.sum(0, dtype=wide)
    opened, pre_opened = (1 if t is None else t.to(wide).tanh() for t in (tables.gate, tables.pre_gate))
    _add_sums(grads, total, None if tables.gate is None else 1 - opened, layout, need)
    if need["global_pos"]:
        grads["global_pos"] = sums * opened
    if need["gate"]:
        along = (sums * tables.global_pos).sum() - (0 if tables.local_pos is None else (total * tables.local_pos).sum())
        grads["gate"] = along * (1 - opened**2)
    if need["pre_pos"] or need["pre_gate"]:
        of_patches = sums[:, :, first:last].sum(2, keepdim=True)
        grads["pre_pos"] = of_patches * pre_opened
        if need["pre_gate"]:
            grads["pre_gate"] = (of_patches * tables.pre_pos).sum() * (1 - pre_opened**2)
    return _in_order(grads, need, forward)


def _image_gradient(patches: Tensor, images: Tensor, weight: Tensor, scale: tuple[float, ...] | None) -> Tensor:
    """patches: the gradient of every patch, [tiles, patches, D]  ->  of the pixels, as images."""
    C, ph, pw = weight.shape[1:]
    pixels = patches.to(weight.dtype) @ weight.flatten(1)
    pixels = pixels.view(pixels.shape[0], images.shape[-2] // ph, images.shape[-1] // pw, C, ph, pw)
    pixels = pixels.permute(0, 3, 1, 4, 2, 5).reshape(images.shape)
    if scale is not None and len(scale) > 1:
        return torch.stack([pixels[:, :, c] * s for c, s in enumerate(scale)], 2)
    return pixels * scale[0] if scale else pixels


def _launch(args: PatchEmbedBwdArgs) -> Plan:
    forward, need, layout = args.forward, _by_name(args.needs), TokenLayout.of(args.forward)
    M, D, work, first, tokens = layout.rows, args.dy.shape[3], kernel_dtype(args.dy.dtype), layout.first, layout.tokens
    if not M:
        return _reference
    multiplied, gap, K = need["weight"] or need["images"], layout.padded - tokens, forward.weight[0].numel()
    norm = None if args.kept is None else _norm_bwd(args, layout)
    pixels_of = patchify(forward, layout)[0] if need["weight"] else None
    added, by_row = (any(need[name] for name in names) for names in (Tables._fields[:7], _BY_ROW))
    rows_of = find_rows(forward) if by_row or (added and forward.tables.gate is not None) else None
    sums_of = _sums_by_row(forward, need, layout) if by_row else None

    def run(args):
        forward = args.forward
        dz, grads, narrow = args.dy.to(work).contiguous().view(M, D), {}, None
        if norm is not None:
            dz, grads["norm_weight"], grads["norm_bias"] = norm(args, dz)
        elif gap and multiplied:
            # What comes back to padding rows must go nowhere, and NaN times their pixels of zero would. The norm's backward stops it by itself.
            dz = torch.constant_pad_nd(dz.view(-1, layout.padded, D)[:, :tokens], (0, 0, 0, gap)).view(M, D)
        if multiplied:
            narrow = dz.to(kernel_dtype(forward.weight.dtype))
        if pixels_of is not None:
            grads["weight"] = (narrow.T @ pixels_of(forward.images))[:, :K]
        if need["images"]:
            patches = narrow.view(-1, layout.padded, D)[:, first : first + layout.patches]
            grads["images"] = _image_gradient(patches, forward.images, forward.weight.to(narrow.dtype), forward.scale)
        if added:
            rows, factors = (None, None) if rows_of is None else rows_of(forward)
            if sums_of is None:
                total = dz.view(-1, layout.padded, D)[:, :tokens].sum(0, dtype=torch.float32)
            else:
                total = sums_of(forward.tables, dz, rows, factors, grads)
            _add_sums(grads, total, None if factors is None else factors[0], layout, need)
        return _in_order(grads, need, forward)

    return run


def _norm_bwd(args: PatchEmbedBwdArgs, layout: TokenLayout) -> Callable[[PatchEmbedBwdArgs, Tensor], tuple[Tensor, Tensor | None, Tensor | None]]:
    """The plan of (args, dy) -> (dx, dw, db), dx zero in padding rows; dw and db where they are needed."""
    M, D, geometry, work = layout.rows, args.dy.shape[3], layout.geometry(), kernel_dtype(args.dy.dtype)
    rows = -(-M // _NORM_PROGRAMS)
    programs, columns = -(-M // rows), triton_block(D)[1]
    need_weight, need_bias = args.needs.tables.norm_weight, args.needs.tables.norm_bias
    differentiate = Launch(norm_bwd_kernel, BLOCK_N=columns, num_warps=norm_warps(columns), **tune.OPTIONS)

    def run(args, dy):
        dx, weight = torch.empty_like(dy), args.forward.tables.norm_weight
        dw, db = (torch.empty((programs, D), dtype=torch.float32, device=dy.device) for _ in range(2))
        x, weight = args.kept.to(work), None if weight is None else weight.contiguous()
        differentiate((programs, 1, 1), dy, x, args.stats, weight, dx, dw, db, geometry, M, D, rows)
        return dx, dw.sum(0) if need_weight else None, db.sum(0) if need_bias else None

    return run


def _sums_by_row(forward: PatchEmbedArgs, need: dict[str, bool], layout: TokenLayout) -> Callable[[Tables, Tensor, Tensor, Tensor, dict], Tensor]:
    """The plan of place_bwd_kernel, whose sums give the gradients of the tables with a row for each tile and of their gates; it returns the sum over all tiles."""
    (entries, side), D, tokens, geometry = forward.tables.grid(), forward.weight.shape[0], layout.tokens, layout.geometry()
    n_rows = entries * side
    grid = -(-tokens // _BLOCK_T), -(-D // _BLOCK_N), 1
    differentiate = Launch(place_bwd_kernel, BLOCK_T=_BLOCK_T, BLOCK_N=_BLOCK_N, TILES=_TILES, **tune.OPTIONS)
    has_pre = need["pre_pos"] or need["pre_gate"]

    def run(tables, dz, rows, factors, grads):
        like = {"dtype": torch.float32, "device": dz.device}
        # The tiles in the order of their rows, those without one first, and where each row's tiles start.
        ranked, order = torch.sort(rows, stable=True)
        starts = torch.searchsorted(ranked, torch.arange(n_rows + 1, dtype=torch.int32, device=dz.device), out_int32=True)
        table, local = (t if t is None else t.contiguous() for t in (tables.global_pos, tables.local_pos))
        total = torch.empty((tokens, D), **like)
        dtable = table.new_empty((n_rows, tokens, D), dtype=kernel_dtype(table.dtype)) if need["global_pos"] else None
        pre = torch.empty((grid[0], n_rows, D), **like) if has_pre else None
        dots = torch.empty((*grid[:2], 2), **like) if need["gate"] else None
        differentiate(grid, dz, order.to(torch.int32), starts, table, local, factors, total, dtable, pre, dots, geometry, D, n_rows)
        grads["global_pos"] = dtable
        if dots is not None:
            along = dots.sum((0, 1))
            grads["gate"] = (along[0] - (along[1] if local is not None else 0)) * (1 - factors[1] ** 2)
        if pre is not None:
            sums = pre.sum(0)
            grads["pre_pos"] = sums * factors[2]
            if need["pre_gate"]:
                grads["pre_gate"] = (sums * tables.pre_pos.reshape(n_rows, D)).sum() * (1 - factors[2] ** 2)
        return total

    return run


def norm_warps(columns: int) -> int:
    """Warps of norm_bwd_kernel, whose programs hold six rows at once: 16 elements of each a thread."""
    return min(16, max(4, columns // 512))


patch_embed_bwd = fused_op("patch_embed_bwd", PatchEmbedBwdArgs, PatchEmbedArgs, Tables, reference=_reference, launch=_launch)
"""(args) -> the gradients that `needs` asks for, in the order of the tree. Deterministic, and linear in the number of tiles."""


def _backward(args: PatchEmbedBwdArgs, outs: tuple, grads: Sequence[Tensor | None], needs: PatchEmbedBwdArgs) -> PatchEmbedBwdArgs:
    def first(args):
        y, forward = formula(args.forward)[0], _by_name(args.forward).values()
        return y, args.dy[:, :, : y.shape[2]], [t for t, needed in zip(forward, _by_name(args.needs).values(), strict=True) if needed]

    return differentiated_twice(args._replace(forward=args.forward._replace(pad_tokens_to=1)), first, grads)


patch_embed_bwd.register_backward(_backward, lambda args, outs, needs: (args._replace(kept=None, stats=None), ()))
