"""Patch embedding of tiled images: pixels to tokens in their final place."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import Placed
from fastfuse.ops._device_checks import values_are_at_hand
from fastfuse.ops._fused_op import fused_op, remember, signature
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, Cost, Plan, autocast_dtype, kernel_dtype, nbytes, precision, route
from fastfuse.ops._patch_tokens import (
    PatchEmbedArgs,
    Tables,
    TokenLayout,
    find_pixels,
    find_rows,
    formula,
    kernel_numbers,
    on_cpu,
    padded,
    patchify,
    result_dtype,
    tile_rows,
    triton_block,
)
from fastfuse.ops.patch_embed_bwd import PatchEmbedBwdArgs, in_places, patch_embed_bwd

if HAS_TRITON:
    from fastfuse.kernels.patch_embed import patch_embed_fwd_kernel, place_kernel

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_NUMBERS = (int, float)
_new = tuple.__new__  # a NamedTuple's own constructor is a Python call more
served: dict[tuple, Callable] = {}  # calls that have passed the checks: see signature()


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
    eps, norm_weight, norm_bias = (None, None, None) if norm is None else _norm("patch_embed", norm)
    tables = _new(Tables, (bias, cls, local_pos, global_pos, gate, pre_pos, pre_gate, norm_weight, norm_bias))
    args, run, key = _prepared(images, weight, aspect_ratio, tables, eps, append_cls, scale, shift, pad_tokens_to, backend)
    y = run(args)[0]
    if key is not None:
        remember(served, key, patch_embed_op, args)
    return y if images.ndim == 5 else y.view(*images.shape[:-3], *y.shape[2:])


def _prepared(
    images, weight, aspect_ratio, tables: Tables, eps, append_cls, scale, shift, pad_tokens_to, backend
) -> tuple[PatchEmbedArgs, Callable, tuple | None]:
    """The op's arguments, checked, what runs them, and the signature to keep that by, where it is not kept yet."""
    op, append_cls = "patch_embed", bool(append_cls)
    scale = scale if scale is None else _numbers(op, "scale", scale)
    shift = shift if shift is None else _numbers(op, "shift", shift)
    tensors, there = [], []
    for t in (images, weight, aspect_ratio, *tables):
        there += (t is not None,)
        if t is not None:
            tensors += (t,)
    key, interpret = None, False
    if type(pad_tokens_to) is int:  # 1.0 equals 1
        key = signature(tensors, (op, backend, eps, append_cls, pad_tokens_to, *there, *(scale or ()), "shift", *(shift or ())))
    run = served.get(key)
    if run is not None:
        needs_grad, key = key[0], None
    else:
        _check(op, images, weight, aspect_ratio, tables, scale, shift, pad_tokens_to)
        needs_grad = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
        if (dtype := autocast_dtype(images.device)) is not None:
            weight = weight.to(dtype)
        chosen = route(op, images, backend)
        interpret = chosen == "interpreter"
        if interpret or (chosen == "op" and images.device.type == "cuda"):
            _check_kernels(op, images, weight, tables)
        run, key = (formula, None) if chosen == "reference" else (patch_embed_op, key)
    if tables.global_pos is None and tables.pre_pos is None:
        aspect_ratio = None
    else:
        aspect_ratio = _ratios(images, aspect_ratio, tables)
    keep = eps is not None and needs_grad
    tiles = images if images.ndim == 5 else images.reshape(math.prod(images.shape[:-4]), *images.shape[-4:])
    return _new(PatchEmbedArgs, (tiles, weight, aspect_ratio, tables, eps, append_cls, scale, shift, pad_tokens_to, keep, interpret)), run, key


def _ratios(images: Tensor, aspect_ratio: Tensor | None, tables: Tables) -> Tensor:
    """[images, 2] of (h, w) or [images] of ids, where the images are."""
    lead = images.ndim - 4
    if aspect_ratio is None:
        aspect_ratio = torch.ones((*images.shape[:lead], 2), dtype=torch.int64, device=images.device)
    if lead != 1:
        aspect_ratio = aspect_ratio.reshape(-1) if aspect_ratio.ndim == lead else aspect_ratio.reshape(-1, 2)
    if aspect_ratio.device != images.device:
        if values_are_at_hand(aspect_ratio):
            tile_rows(aspect_ratio, images.shape[-4], *tables.grid())  # a ValueError is better than an assertion on the device
        aspect_ratio = aspect_ratio.to(images.device, non_blocking=True)
    return aspect_ratio


def _norm(op: str, norm) -> tuple[float, Tensor | None, Tensor | None]:
    """(eps, weight, bias)."""
    if not (isinstance(norm, (tuple, list)) and len(norm) == 3 and isinstance(norm[2], _NUMBERS)):
        kinds = f"({', '.join(type(v).__name__ for v in norm)})" if isinstance(norm, (tuple, list)) else type(norm).__name__
        raise TypeError(f"{op}: norm is {kinds}, expected (weight, bias, eps) with a number for eps")
    return float(norm[2]), norm[0], norm[1]


def _numbers(op: str, name: str, value) -> tuple[float, ...] | None:
    """One number for all channels, one for each, or none."""
    if isinstance(value, Tensor):
        raise TypeError(f"{op}: {name} is a tensor, expected a number or one for each channel: reading it would wait for the device")
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if not all(isinstance(v, _NUMBERS) for v in values):
        raise TypeError(f"{op}: {name} is {value!r}, expected a number or one for each channel")
    return tuple([float(v) for v in values]) or None


def _check(op: str, images, weight, aspect_ratio, tables: Tables, scale, shift, pad_tokens_to: int) -> None:
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
    for name, shape in {"bias": (D,), "cls": (D,), "local_pos": (n, D), "norm_weight": (D,), "norm_bias": (D,)}.items():
        t = getattr(tables, name)
        if t is not None and t.shape != shape:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected {shape}")
    for name, gate_name, tokens in (("global_pos", "gate", n), ("pre_pos", "pre_gate", 1)):
        t, gate = getattr(tables, name), getattr(tables, gate_name)
        if t is not None and (t.dim() != 4 or t.shape[2:] != (tokens, D)):
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected [T, T, {tokens}, {D}] or [ids, T, {tokens}, {D}]")
        if gate is not None and gate.numel() != 1:
            raise ValueError(f"{op}: {gate_name} has shape {tuple(gate.shape)}, expected one number")
        if gate is not None and t is None:
            raise ValueError(f"{op}: {gate_name} is given, {name} is None: there is nothing to gate")
    if tables.global_pos is not None and tables.pre_pos is not None and tables.global_pos.shape[:2] != tables.pre_pos.shape[:2]:
        raise ValueError(f"{op}: global_pos is for {tuple(tables.global_pos.shape[:2])} tiles, pre_pos for {tuple(tables.pre_pos.shape[:2])}")
    _check_ratio(op, lead, n_tiles, aspect_ratio, tables)
    for name, values in (("scale", scale), ("shift", shift)):
        if values is not None and len(values) not in (1, C):
            raise ValueError(f"{op}: {name} has {len(values)} numbers, images have {C} channels")
    if not isinstance(pad_tokens_to, int) or pad_tokens_to < 1:
        raise ValueError(f"{op}: pad_tokens_to is {pad_tokens_to!r}, expected a whole number >= 1")
    for name, t in (("weight", weight), *tables._asdict().items()):
        if t is None:
            continue
        if t.device != images.device:
            raise ValueError(f"{op}: images is on {images.device}, {name} on {t.device}")
        if not t.is_floating_point():
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


def patch_embed_ref(images: Tensor, weight: Tensor, *tables: Tensor | None, **options) -> Tensor:
    """The formula, eager: patch_embed with backend="torch"."""
    return patch_embed(images, weight, *tables, **options, backend="torch")


def patch_embed_cost(
    images: Tensor, weight: Tensor, cls: Tensor | None = None, *_, local_pos=None, global_pos=None, pre_pos=None, pad_tokens_to: int = 1
) -> Cost:
    """Forward: pixels, weight and the tables' rows that tiles can take read once, tokens written once."""
    layout = TokenLayout.of(PatchEmbedArgs(images, weight, None, Tables(cls=cls), pad_tokens_to=pad_tokens_to))
    tiles = math.prod(images.shape[:-3])
    out = layout.rows * weight.shape[0] * result_dtype(weight, Tables(local_pos=local_pos, global_pos=global_pos)).itemsize
    taken = sum(nbytes(t[0, 0]) * min(tiles, _reachable(*t.shape[:2], images.shape[-4])) for t in (global_pos, pre_pos) if t is not None)
    return Cost(nbytes(images, weight, cls, local_pos) + taken + out, 2 * tiles * layout.patches * weight.numel())


def patch_embed_bwd_cost(images: Tensor, weight: Tensor, cls: Tensor | None = None, *_, **options) -> Cost:
    """The gradients of weight, CLS, tables and gates: pixels, dY and the tables' rows read once, every gradient written once, the whole of each table's."""
    forward = patch_embed_cost(images, weight, cls, **options)
    return Cost(forward.bytes + nbytes(cls, *map(options.get, ("local_pos", "global_pos", "pre_pos"))), forward.flops)


def _reachable(entries: int, side: int, n_tiles: int) -> int:
    """Rows of a table that some image of n_tiles tiles can take. In a grid, tile (i, j) needs an image of (i + 1) x (j + 1) tiles at least."""
    if entries != side:
        return entries * min(side, n_tiles)
    return sum((i + 1) * (j + 1) <= n_tiles for i in range(side) for j in range(side))


def _reference(args: PatchEmbedArgs) -> tuple[Tensor, ...]:
    y, before_norm, stats = formula(args)
    if not args.keep:
        return (y,)
    return y, padded(before_norm.to(y.dtype), y.shape[2] - before_norm.shape[1]).contiguous(), stats


def _launch(args: PatchEmbedArgs) -> Plan:
    layout, dtype, keep, norm = TokenLayout.of(args), result_dtype(args.weight, args.tables), args.keep, args.eps is not None
    work, M, (D, *inner) = kernel_dtype(dtype), layout.rows, args.weight.shape
    if not M:
        return _reference
    shape = *args.images.shape[:2], layout.padded, D
    kept_shape = math.prod(shape[:2]), layout.padded, D
    kinds = {name: "fp32" if t == torch.float32 else "16-bit" for name, t in (("dtype", args.weight.dtype), ("out", dtype))}
    tile = tune.pick("patch_embed", tune.arch_of(args.images.device), **kinds, norm=int(norm), M=M, N=D, K=math.prod(inner), PW=inner[2])
    multiply = _unfused(args, layout) if tile is None else _fused(tile, args, layout)
    place = _place(args, layout) if tile is None or norm else None
    rows_of, place_now = find_rows(args), Placed() if tile is not None else None
    packed = all(t is None or t.is_contiguous() for t in (args.weight, *args.tables))

    def run(args):
        if not packed:
            tables = [t if t is None else t.contiguous() for t in args.tables]
            args = args._replace(weight=args.weight.contiguous(), tables=Tables(*tables))
        device = args.images.device
        out, kept, stats = torch.empty(shape, dtype=work, device=device), None, None
        if keep:
            kept, stats = torch.empty(kept_shape, dtype=work, device=device), torch.empty((2, M), dtype=torch.float32, device=device)
        t = args.tables
        placed = _new(Placed, (t.cls, t.bias, t.local_pos, t.global_pos, t.pre_pos, *rows_of(args)))
        x = multiply(args, placed, out)
        if place is not None:
            place(t, x, out, kept, stats, placed if place_now is None else place_now)
        if work != dtype:
            out, kept = out.to(dtype), kept if kept is None else kept.to(dtype)
        return (out, kept, stats) if keep else (out,)

    return run


def _weight_rows(w: Tensor, dtype: torch.dtype, line: int, columns: int) -> Tensor:
    """[D, columns]: every line of a patch made `line` long by zeros, then every row."""
    if w.dtype != dtype:
        w = w.to(dtype)
    if w.shape[3] != line:
        w = torch.constant_pad_nd(w, (0, line - w.shape[3]))
    w = w.flatten(1)
    if w.shape[1] != columns:
        w = torch.constant_pad_nd(w, (0, columns - w.shape[1]))
    return w


def _unfused(args: PatchEmbedArgs, layout: TokenLayout) -> Callable[[PatchEmbedArgs, Placed, Tensor], Tensor]:
    """The plan of patches times weight, [rows, D], by the library: into out where it has the dtype."""
    (pixels_of, columns), M, (D, *_, pw) = patchify(args, layout), layout.rows, args.weight.shape
    work = kernel_dtype(args.weight.dtype)
    in_place = work == kernel_dtype(result_dtype(args.weight, args.tables))

    def run(args, placed, out):
        w, pixels = _weight_rows(args.weight, work, pw, columns), pixels_of(args.images)
        return torch.mm(pixels, w.T, out=out.view(M, D)) if in_place else torch.mm(pixels, w.T)

    return run


def _fused(tile: tune.Tile, args: PatchEmbedArgs, layout: TokenLayout) -> Callable[[PatchEmbedArgs, Placed, Tensor], Tensor]:
    """The plan of one GEMM with everything placed in its epilogue, over patchified rows or, with DIRECT, over the images themselves."""
    M, geometry, (D, C, ph, pw), step = layout.rows, layout.geometry(), args.weight.shape, tile["BLOCK_K"]
    work = kernel_dtype(args.weight.dtype)
    if tile["DIRECT"]:
        # Whole sectors of W for each line of a patch, so that pixels of one line stay together: 14 become 16.
        line, (pixels_of, image), numbers = -(-pw // 8) * 8, find_pixels(args.images, layout), kernel_numbers(args)
    else:
        line, (pixels_of, _), image, numbers = pw, patchify(args, layout, step), None, (None, None)
    K = -(-C * ph * line // step) * step
    blocks = -(-M // tile["BLOCK_M"]) * -(-D // tile["BLOCK_N"])
    # Of a persistent kernel as many as there are multiprocessors, each of which a tile fills.
    grid = min(blocks, tune.processors_of(args.images.device)) if tile["FLATTEN"] else blocks, 1, 1
    multiply = Launch(patch_embed_fwd_kernel, CHANNELS=C, PATCH_H=ph, PATCH_W=pw, LINE=line, PRECISION=precision(), **tile.launch())

    def run(args, placed, out):
        x = args.images if pixels_of is None else pixels_of(args.images)
        multiply(grid, x, _weight_rows(args.weight, work, line, K), out, placed, image, geometry, *numbers, M, D, K)
        return out

    return run


def _place(args: PatchEmbedArgs, layout: TokenLayout) -> Callable:
    """The plan of place_kernel, which adds the tables and has the norm."""
    M, D, geometry, eps = layout.rows, args.weight.shape[0], layout.geometry(), args.eps or 0.0
    rows, columns = triton_block(D)
    grid = -(-M // rows), 1, 1
    place = Launch(place_kernel, NORM=args.eps is not None, BLOCK_M=rows, BLOCK_N=columns, **tune.OPTIONS)

    def run(tables, x, out, kept, stats, placed):
        place(grid, x, out, kept, stats, placed, tables.norm_weight, tables.norm_bias, geometry, M, D, eps)

    return run


patch_embed_op = fused_op("patch_embed", PatchEmbedArgs, Tables, reference=_reference, launch=_launch, cpu=on_cpu)
"""(args) -> (tokens,), with keep (tokens, what the norm was given, its mean and 1 / deviation): the backward needs them."""


def _saved(args: PatchEmbedArgs, outs: tuple, needs: PatchEmbedArgs) -> tuple[PatchEmbedArgs, tuple]:
    if args.eps is None and not needs.images and not needs.weight:
        # Of pixels only the shape is asked then: the op is linear in everything else. Past a norm a second derivative reads them.
        args = args._replace(images=args.images.new_empty(()).expand(args.images.shape))
    return args, outs[1:]


def _backward(args: PatchEmbedArgs, outs: tuple, grads: Sequence[Tensor | None], needs: PatchEmbedArgs) -> PatchEmbedArgs | None:
    if grads[0] is None:
        return None
    kept, stats = [t.detach() for t in outs] or (None, None)
    return in_places(needs, iter(patch_embed_bwd(PatchEmbedBwdArgs(grads[0], args, kept, stats, needs, args.interpret))))


patch_embed_op.register_backward(_backward, _saved)
