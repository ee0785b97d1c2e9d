"""Attention of text over encoder tokens where a mask lets it, forward and backward."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import DkDvStrides, DqStrides, ForwardStrides, Lengths, Mask, Strides
from fastfuse.ops._op import HAS_TRITON, Cost, fused_op, kernel_dtype, nbytes, no_autocast, precision, route
from fastfuse.ops.encoder_mask import EncoderMask

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

    from fastfuse.kernels.cross_attention import (
        cross_attention_delta_kernel,
        cross_attention_dkdv_kernel,
        cross_attention_dq_kernel,
        cross_attention_fwd_kernel,
        cross_attention_merge_kernel,
    )

# Beyond 128 in fp32 every tile spills: three tf32 products of 256 columns unroll into 240 HMMA and their operands.
MAX_HEAD_DIM = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 128}
MAX_GROUP = 32  # rows of 64 heads and more need more shared memory than the smaller chips have
MAX_KEY_HEADS = 65535  # of a grid's second dimension
LOG2E = math.log2(math.e)


def cross_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | EncoderMask | None = None,
    *,
    scale: float | None = None,
    empty_rows: str = "zero",
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v over the encoder tokens that each text token may see (https://arxiv.org/abs/1706.03762).

    q: (b, hq, s, d), k, v: (b, hkv, s_e, d), hkv dividing hq: key head j serves query heads j * hq / hkv and on (https://arxiv.org/abs/2305.13245).
    Any strides of the first three dims.  ->  (b, hq, s, d) in q's layout, with return_lse also log(sum(exp(scores))), fp32 (b, hq, s).
    mask: bool (b or 1, s, s_e), True where attention is allowed, an EncoderMask of that shape, or None. A model prepares an
    EncoderMask once for all its layers. scale: 1 / sqrt(d) where None.
    empty_rows: what a token gets that may see nothing, "zero" (0, and no gradient to anything; its lse is inf) or "uniform", the softmax over every encoder token.

    Scores and sums are fp32, weights round to v's dtype before they meet it. Deterministic. k and v of hidden tokens must be finite.
    Gradients for q, k, v, of the lse too. Under autocast all three follow its dtype. Nothing waits for the device.
    Raises TypeError, ValueError or Unsupported before any launch.
    """
    op = "cross_attention"
    _check(op, q, k, v, mask, empty_rows)
    o, lse = attend(op, q, k, v, mask, None, scale, backend, empty_rows == "uniform")
    return (o, _public_lse(lse, q)) if return_lse else o


def attend(
    op: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | None, lengths: Tensor | None, scale: float | None, backend: str | None,
    uniform: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse [b, hkv, s, GP], base 2) of checked arguments; lengths: int32 [b], how many of the columns there are, in place of a mask."""
    if q.device.type != "meta" and torch.is_autocast_enabled(q.device.type):
        q, k, v = (t.to(torch.get_autocast_dtype(q.device.type)) for t in (q, k, v))
    chosen = route(op, q, backend)
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    if chosen == "reference":
        visible = mask.to_dense() if isinstance(mask, EncoderMask) else mask
        if uniform and visible is not None:
            visible = visible | ~visible.any(-1, keepdim=True)
        return no_autocast(_formula)(q, k, v, visible if lengths is None else _dense(lengths, None, q.shape[2], k.shape[2]), scale)
    by_kernels = chosen == "interpreter" or q.device.type == "cuda"
    if by_kernels and (reason := uncovered(q.dtype, q.shape[-1], q.shape[1] // k.shape[1], q.shape[0] * k.shape[1])):
        raise Unsupported(f"{op}: {reason}")
    visible, blocks = (None, None), (None,) * 4
    if mask is not None:
        mask = mask if isinstance(mask, EncoderMask) else EncoderMask.from_dense(mask)
        mask = mask.filled() if uniform else mask
        visible = mask.rows, mask.rows_empty
        if by_kernels:
            blocks = mask.blocks(listed_tokens(q.shape[1] // k.shape[1]))
    return _cross_attention(q, k, v, lengths, *visible, *blocks, scale, chosen == "interpreter")


def _check(op: str, q, k, v, mask, empty_rows: str) -> None:
    for name, t in (("q", q), ("k", k), ("v", v)):
        if not isinstance(t, Tensor):
            raise TypeError(f"{op}: {name} is a {type(t).__name__}, not a tensor")
        if t.dim() != 4:
            raise ValueError(f"{op}: {name} has shape {tuple(t.shape)}, expected (b, heads, tokens, head_dim)")
        if not t.is_floating_point():
            raise ValueError(f"{op}: {name} is {t.dtype}, expected floating point")
    if k.shape != v.shape:
        raise ValueError(f"{op}: k has shape {tuple(k.shape)}, v {tuple(v.shape)}")
    for name, t in (("k", k), ("v", v)):
        if t.device != q.device:
            raise ValueError(f"{op}: q is on {q.device}, {name} on {t.device}")
        if t.dtype != q.dtype and not (q.device.type != "meta" and torch.is_autocast_enabled(q.device.type)):
            raise ValueError(f"{op}: q is {q.dtype}, {name} {t.dtype}")
    (b, hq, s, d), (b_k, hkv, s_e, d_k) = q.shape, k.shape
    if b != b_k:
        raise ValueError(f"{op}: q has a batch of {b}, k of {b_k}")
    if d != d_k or d == 0:
        raise ValueError(f"{op}: q has head_dim {d}, k {d_k}" if d else f"{op}: head_dim is 0")
    if hkv == 0 or hq == 0 or hq % hkv:
        raise ValueError(f"{op}: q has {hq} heads, k {hkv}, which does not divide them")
    if mask is not None:
        if not isinstance(mask, (Tensor, EncoderMask)):
            raise TypeError(f"{op}: mask is a {type(mask).__name__}, expected a bool tensor or an EncoderMask")
        if isinstance(mask, Tensor) and mask.dtype != torch.bool:
            raise ValueError(f"{op}: mask is {mask.dtype}, expected torch.bool, True where attention is allowed")
        # Compared one by one: torch.compile answers `n in (1, b)` with no for a b that is a symbol.
        if len(mask.shape) != 3 or (mask.shape[0] != 1 and mask.shape[0] != b) or mask.shape[1] != s or mask.shape[2] != s_e:
            raise ValueError(f"{op}: mask has shape {tuple(mask.shape)}, q and k need ({b} or 1, {s}, {s_e})")
        if mask.device != q.device:
            raise ValueError(f"{op}: q is on {q.device}, mask on {mask.device}")
    if empty_rows not in ("zero", "uniform"):
        raise ValueError(f"{op}: empty_rows is {empty_rows!r}, expected 'zero' or 'uniform'")


def uncovered(dtype: torch.dtype, head_dim: int, group: int, key_heads: int = 1) -> str | None:
    """Why no kernel takes queries like these, `group` of whose heads share a key head, `key_heads` of them in the batch; None where one does."""
    if dtype not in MAX_HEAD_DIM:
        return f"q is {dtype}, covered are bf16, fp16 and fp32"
    if head_dim > MAX_HEAD_DIM[dtype]:
        return f"head_dim is {head_dim}, covered are up to {MAX_HEAD_DIM[dtype]} in {dtype}"
    if group > MAX_GROUP:
        return f"{group} query heads share a key head, covered are up to {MAX_GROUP}"
    return f"the batch has {key_heads} key heads in all, covered are up to {MAX_KEY_HEADS}" if key_heads > MAX_KEY_HEADS else None


def _group(q: Tensor, k: Tensor) -> tuple[int, int]:
    """(query heads of a key head, that rounded up to a power of two)"""
    G = q.shape[1] // k.shape[1]
    return G, 1 << (G - 1).bit_length()


def listed_tokens(G: int) -> int:
    """Tokens of a block in the mask's lists: 128 rows."""
    return max(1, 128 // (1 << (G - 1).bit_length()))


def _public_lse(lse: Tensor, q: Tensor) -> Tensor:
    G = q.shape[1] // lse.shape[1]
    return lse[..., :G].transpose(2, 3).reshape(q.shape[:3]) / LOG2E


def cross_attention_ref(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | EncoderMask | None = None, **options) -> Tensor | tuple[Tensor, Tensor]:
    """The formula, eager: cross_attention with backend="torch"."""
    return cross_attention(q, k, v, mask, **options, backend="torch")


def _formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    hkv, (G, GP), wide = k.shape[1], _group(q, k), torch.promote_types(q.dtype, torch.float32)
    scores = q.to(wide).unflatten(1, (hkv, G)) @ k.to(wide).mT[:, :, None] * scale
    if visible is not None:
        scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    # The softmax of nothing is NaN, and so is its gradient: such rows get scores of zero and then weights of zero.
    empty = (lse == -torch.inf)[..., None]
    weights = scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)
    o = (weights.to(v.dtype) @ v[:, :, None]).flatten(1, 2)
    lse = (lse * LOG2E).masked_fill(empty[..., 0], torch.inf)
    return _like(q, o), F.pad(lse.transpose(2, 3), (0, GP - G), value=torch.inf).contiguous()


def _dense(lengths: Tensor | None, rows: Tensor | None, s: int, s_e: int) -> Tensor | None:
    """What a mask's rows show, bool [b or 1, s, s_e]."""
    n = None if lengths is None and rows is None else torch.arange(s_e, device=(rows if lengths is None else lengths).device)
    if lengths is not None:
        return (n < lengths[:, None])[:, None].expand(-1, s, -1)
    return None if rows is None else _shown(rows, s_e)


def _shown(rows: Tensor, s_e: int) -> Tensor:
    return EncoderMask("interval" if rows.shape[-1] == 2 else "bits", rows, rows[..., 0], s_e).to_dense()


def _like(q: Tensor, x: Tensor) -> Tensor:
    """x in the layout that kernels give a result."""
    return _empty_like(q, x.dtype).copy_(x)


def _empty_like(q: Tensor, dtype: torch.dtype) -> Tensor:
    """A result in q's layout, without its gaps; contiguous where that would put another dim than the last one innermost."""
    made = torch.empty_like(q, dtype=dtype)
    return made if made.stride(-1) == 1 else torch.empty(q.shape, dtype=dtype, device=q.device)


def cross_attention_cost(q: Tensor, k: Tensor, v: Tensor, mask: object = None, *, visible: float = 1.0) -> Cost:
    """Forward: q, and of k and v the visible fraction, read once; o written once. Two products over what is visible."""
    return Cost(2 * nbytes(q) + round(visible * nbytes(k, v)), round(4 * q.numel() * k.shape[2] * visible))


def cross_attention_bwd_cost(q: Tensor, k: Tensor, v: Tensor, mask: object = None, *, visible: float = 1.0) -> Cost:
    """All three gradients: q, o, dO read and dQ written once, k and v as far as visible, dK and dV whole. Five products."""
    return Cost(4 * nbytes(q) + round((1 + visible) * nbytes(k, v)), round(10 * q.numel() * k.shape[2] * visible))


def _reference(q, k, v, lengths, rows, rows_empty, cols, cols_n, toks, toks_n, scale, interpret) -> tuple[Tensor, Tensor]:
    return _formula(q, k, v, _dense(lengths, rows, q.shape[2], k.shape[2]), scale)


def _on_cpu(q, k, v, lengths, rows, rows_empty, cols, cols_n, toks, toks_n, scale, interpret) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU kernel over what each run of tokens sees, without a copy of k or v for every query head and without scores."""
    (b, hkv, s_e, _), (G, GP), s = k.shape, _group(q, k), q.shape[2]
    o = _empty_like(q, q.dtype).zero_()
    q, k, v = (_apart(t) for t in (q, k, v))
    lse = torch.full((b, hkv, s, GP), torch.inf, dtype=torch.promote_types(q.dtype, torch.float32))
    for row, tokens, columns, bias in _pieces(lengths, rows, b, s, s_e, q.dtype):
        packed = _packed(q[row][:, :, tokens], hkv)
        found, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            packed, k[row][:, :, columns], v[row][:, :, columns], 0.0, False, attn_mask=_repeated(bias, G, packed.shape[2]), scale=scale
        )
        o[row, :, tokens] = _unpacked(found, G)
        lse[row, :, tokens, :G] = (sums * LOG2E).unflatten(-1, (G, -1)).transpose(2, 3)
    return o, lse


def _apart(t: Tensor) -> Tensor:
    """Rows that share no memory: of windows over one another PyTorch's kernel makes results that are partly uninitialised."""
    own = t.stride(-1) == 1 and all(n == 1 or stride >= t.shape[-1] for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True))
    return t if own else t.contiguous()


def _packed(q: Tensor, hkv: int) -> Tensor:
    """[b, hq, s, d] -> [b, hkv, G * s, d]: the heads of a group as rows of one."""
    return q.unflatten(1, (hkv, -1)).flatten(2, 3)


def _unpacked(x: Tensor, G: int) -> Tensor:
    return x.unflatten(2, (G, -1)).flatten(1, 2)


def _repeated(bias: Tensor | None, G: int, rows: int) -> Tensor | None:
    """[s or 1, columns] -> [1, 1, rows, columns], rows = G * s; one row for all is not copied."""
    if bias is None:
        return None
    return (bias.expand(rows, -1) if bias.shape[0] == 1 else bias.expand(G, -1, -1).flatten(0, 1))[None, None]


def _pieces(lengths: Tensor | None, rows: Tensor | None, b: int, s: int, s_e: int, dtype: torch.dtype) -> Iterator[tuple]:
    """(batch rows, tokens, slice of columns, bias or None) of everything that is visible: tokens that see the same go together."""
    if not (b and s and s_e):
        return
    if lengths is not None:
        for i, length in enumerate(lengths.tolist()):
            if length:
                yield slice(i, i + 1), slice(0, s), slice(0, length), None
        return
    if rows is None:
        yield slice(0, b), slice(0, s), slice(0, s_e), None
        return
    for i, one in enumerate(rows):
        batch = slice(i, i + 1) if rows.shape[0] == b else slice(0, b)
        runs, counts = torch.unique_consecutive(one, dim=0, return_counts=True)
        if len(runs) <= max(4, s // 8):
            ends = counts.cumsum(0).tolist()
            chunks = [(slice(start, end), _shown(run[None, None], s_e)[0]) for start, end, run in zip([0, *ends], ends, runs, strict=False)]
        else:  # every token its own: 64 at a time
            chunks = ((slice(t, t + 64), _shown(one[None, t : t + 64], s_e)[0]) for t in range(0, s, 64))
        for tokens, seen in chunks:
            columns = seen.any(0).nonzero().flatten()
            if not len(columns):
                continue
            first, last = columns[0].item(), columns[-1].item() + 1
            if len(seen) > 1:
                # PyTorch's kernel sums 512 columns at a time: whole ones, so that no row's rounding depends on what its neighbours see
                first, last = first // 512 * 512, min(-(-last // 512) * 512, s_e)
                rows_seen = seen.any(1).nonzero().flatten()
                tokens, seen = tokens.start + rows_seen, seen[rows_seen]
            seen = seen[:, first:last]
            # Columns that nobody sees between others are read and thrown away: a copy without them would cost more.
            bias = None if seen.all() else torch.zeros((), dtype=dtype).where(seen, -torch.inf)
            yield batch, tokens, slice(first, last), bias


@fused_op("cross_attention", reference=_reference, cpu=_on_cpu)
def _cross_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, rows: Tensor | None, rows_empty: Tensor | None,
    cols: Tensor | None, cols_n: Tensor | None, toks: Tensor | None, toks_n: Tensor | None, scale: float, interpret: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(o, lse [b, hkv, s, GP], base 2); the lists of blocks are the kernels' alone."""
    (b, hkv, s_e, d), (G, GP), s, dtype = k.shape, _group(q, k), q.shape[2], q.dtype
    o = _empty_like(q, kernel_dtype(dtype))
    lse = torch.empty((b, hkv, s, GP), dtype=torch.float32, device=q.device)
    if not (o.numel() and s_e):
        return o.zero_().to(dtype), lse.fill_(torch.inf)
    q, k, v = (_operand(t.to(kernel_dtype(dtype))) for t in (q, k, v))
    q, scale = (_operand(-q), -scale) if scale < 0 else (q, scale)  # the largest score is the largest product only then
    mask, kind = _kernel_mask(lengths, rows, rows_empty, cols, cols_n)
    tile = _tile("cross_attention", q, k, s * GP, *(() if lengths is not None else (k, v)))  # TMA reads what lies beyond lengths
    BLOCK_M, BLOCK_N = max(tile["BLOCK_M"], GP), tile["BLOCK_N"]
    grid = -(-s * GP // BLOCK_M), b * hkv
    splits = _splits(grid[0] * grid[1], s_e, q.device)
    parts, part_lse = (o, lse) if splits == 1 else (_fp32(q, splits, b * hkv, s * GP, d), _fp32(q, splits, b * hkv, s * GP))
    heads = {"G": G, "GP": GP, "D": d}
    block_d = {"BLOCK_D": max(16, 1 << (d - 1).bit_length())}
    sides = [_descriptor(t, (1, 1, BLOCK_N, block_d["BLOCK_D"])) if tile["TMA"] else t for t in (k, v)]
    strides = ForwardStrides(*(_strides(t) for t in (q, k, v, o)))
    cross_attention_fwd_kernel[(*grid, splits)](
        q, *sides, parts, part_lse, mask, strides, *_shape(q, k, rows), scale * LOG2E, splits, **heads, KIND=kind, SPLIT=splits > 1,
        TOKENS_PER_BLOCK=listed_tokens(G), PRECISION=precision(), **tile.launch() | {"BLOCK_M": BLOCK_M}, **block_d,
    )  # fmt: skip
    if splits > 1:
        rows_each, warps = max(GP, 16), merge_warps(d)
        cross_attention_merge_kernel[(-(-s * GP // rows_each), b * hkv)](
            parts, part_lse, o, lse, _strides(o), *_shape(q, k, rows), splits, **heads, BLOCK_M=rows_each, **block_d, num_warps=warps, **tune.OPTIONS
        )
    return o.to(dtype), lse


def merge_warps(head_dim: int) -> int:
    """Of cross_attention_merge_kernel: four spill 256 columns with Triton 3.9 on sm_100."""
    return 8 if head_dim > 128 else 4


def _operand(t: Tensor) -> Tensor:
    """As kernels read it: any strides, but of the last dim."""
    return t if t.stride(-1) == 1 else t.contiguous()


def _strides(t: Tensor) -> Strides:
    return Strides(*t.stride()[:3])


def _fp32(like: Tensor, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=like.device)


def _shape(q: Tensor, k: Tensor, rows: Tensor | None) -> tuple[int, int, int, int]:
    return q.shape[2], k.shape[2], k.shape[1], 1 if rows is None else rows.shape[0]


def _kernel_mask(lengths: Tensor | None, rows: Tensor | None, rows_empty: Tensor | None, blocks: Tensor | None, counts: Tensor | None) -> tuple[tuple, int]:
    """The kernels' tuple and its KIND."""
    if rows is None:
        return Lengths(lengths), 0
    return Mask(rows, rows_empty, blocks, counts), 1 if rows.shape[-1] == 2 else 2


def _tile(op: str, q: Tensor, k: Tensor, rows: int, *descriptors: Tensor) -> tune.Tile:
    """descriptors: the tensors that TMA would read, if it may."""
    kind = "fp32" if q.dtype == torch.float32 else "16-bit"
    tma = int(bool(descriptors) and all(_has_descriptor(t) for t in descriptors))
    return tune.pick(op, tune.arch_of(q.device), dtype=kind, D=q.shape[-1], M=rows, N=k.shape[2], tma=tma)


def _has_descriptor(t: Tensor) -> bool:
    """TMA asks for 16 bytes everywhere."""
    return not t.data_ptr() % 16 and all(stride * t.element_size() % 16 == 0 and stride > 0 for stride in t.stride()[:3])


def _descriptor(t: Tensor, block: tuple[int, ...]) -> "TensorDescriptor":
    return TensorDescriptor(t, list(t.shape), list(t.stride()), list(block))


def _splits(programs: int, columns: int, device: torch.device) -> int:
    """How many programs share the columns of a block: two for every multiprocessor, of 256 columns at least. Of shapes alone: a graph keeps it."""
    return max(1, min(2 * tune.processors_of(device, 8) // programs, columns // 256))


def _bwd_reference(do, q, k, v, o, lse, dlse, lengths, rows, rows_empty, cols, cols_n, toks, toks_n, scale, wanted, interpret) -> list[Tensor]:
    (_, hkv, s_e, _), (G, _), wide = k.shape, _group(q, k), torch.promote_types(q.dtype, torch.float32)
    grouped_q, grouped_do, grouped_o = (t.to(wide).unflatten(1, (hkv, G)) for t in (q, do, o))
    wide_k, wide_v = (t.to(wide)[:, :, None] for t in (k, v))
    sums = lse[..., :G].transpose(2, 3)[..., None] / LOG2E
    p = (grouped_q @ wide_k.mT * scale - sums).exp()
    visible = _dense(lengths, rows, q.shape[2], s_e)
    if visible is not None:
        p = p.masked_fill(~visible[:, None, None], 0)
    delta = (grouped_o * grouped_do).sum(-1, keepdim=True)
    if dlse is not None:
        delta = delta - dlse[..., :G].transpose(2, 3)[..., None] * LOG2E
    ds = p * (grouped_do @ wide_v.mT - delta) * scale
    made = (ds @ wide_k).flatten(1, 2), (ds.mT @ grouped_q).sum(2), (p.mT @ grouped_do).sum(2)
    return [_like(t, g.to(t.dtype)) if wants else q.new_empty(0) for t, g, wants in zip((q, k, v), made, wanted, strict=True)]


def _bwd_on_cpu(do, q, k, v, o, lse, dlse, lengths, rows, rows_empty, cols, cols_n, toks, toks_n, scale, wanted, interpret) -> list[Tensor]:
    if dlse is not None:
        # PyTorch's kernel knows no gradient of the sums: that of o would have to be one whose product with o is less by it
        return _bwd_reference(do, q, k, v, o, lse, dlse, lengths, rows, rows_empty, cols, cols_n, toks, toks_n, scale, wanted, interpret)
    (b, hkv, s_e, _), (G, _), s = k.shape, _group(q, k), q.shape[2]
    wide = torch.promote_types(k.dtype, torch.float32)
    dq, dk, dv = (
        _empty_like(t, dtype).zero_() for t, dtype in ((q, q.dtype), (k, wide), (v, wide))
    )  # several runs may see a column: their parts add up in fp32
    do, q, k, v, o = (_apart(t) for t in (do, q, k, v, o))
    for row, tokens, columns, bias in _pieces(lengths, rows, b, s, s_e, q.dtype):
        packed = [_packed(t[row][:, :, tokens], hkv) for t in (do, q, o)]
        sums = lse[row, :, tokens, :G].transpose(2, 3).flatten(2, 3) / LOG2E
        of_k, of_v = (t[row][:, :, columns] for t in (k, v))
        found = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            packed[0], packed[1], of_k, of_v, packed[2], sums, 0.0, False, attn_mask=_repeated(bias, G, packed[0].shape[2]), scale=scale
        )
        dq[row, :, tokens] = _unpacked(found[0], G)
        dk[row, :, columns] += found[1]
        dv[row, :, columns] += found[2]
    return [t.to(q.dtype) if wants else q.new_empty(0) for t, wants in zip((dq, dk, dv), wanted, strict=True)]


@fused_op("cross_attention_bwd", reference=_bwd_reference, cpu=_bwd_on_cpu)
def _cross_attention_bwd(
    do: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, dlse: Tensor | None, lengths: Tensor | None, rows: Tensor | None,
    rows_empty: Tensor | None, cols: Tensor | None, cols_n: Tensor | None, toks: Tensor | None, toks_n: Tensor | None,
    scale: float, wanted: Sequence[bool], interpret: bool,
) -> list[Tensor]:  # fmt: skip
    """[dq, dk, dv], as far as `wanted`, the others empty. Without atomics: every sum has one owner and one order."""
    (b, hkv, s_e, d), (G, GP), s, dtype = k.shape, _group(q, k), q.shape[2], q.dtype
    made = [_empty_like(t, kernel_dtype(dtype)) if wants else t.new_empty(0) for t, wants in zip((q, k, v), wanted, strict=True)]
    if not (q.numel() and k.numel()):
        return [t.zero_().to(dtype) for t in made]
    q, k, v, o, do = (_operand(t.to(kernel_dtype(dtype))) for t in (q, k, v, o, do))
    negative = scale < 0
    q, scale = (_operand(-q), -scale) if negative else (q, scale)
    delta = torch.empty_like(lse)
    heads, block_d, shape = {"G": G, "GP": GP, "D": d}, {"BLOCK_D": max(16, 1 << (d - 1).bit_length())}, _shape(q, k, rows)
    rows_each = max(GP, 32)
    dlse = None if dlse is None else dlse.contiguous()
    cross_attention_delta_kernel[(-(-s * GP // rows_each), b * hkv)](
        o, do, dlse, delta, _strides(o), _strides(do), *shape, **heads, BLOCK_M=rows_each, **block_d, **tune.OPTIONS
    )
    common = heads | {"TOKENS_PER_BLOCK": listed_tokens(G), "PRECISION": precision()} | block_d
    strides = [_strides(t) for t in (q, k, v, do)]
    if wanted[0]:
        mask, kind = _kernel_mask(lengths, rows, rows_empty, cols, cols_n)
        tile = _tile("cross_attention_dq", q, k, s * GP, *(() if lengths is not None else (k, v)))
        BLOCK_M = max(tile["BLOCK_M"], GP)
        sides = [_descriptor(t, (1, 1, tile["BLOCK_N"], block_d["BLOCK_D"])) if tile["TMA"] else t for t in (k, v)]
        cross_attention_dq_kernel[(-(-s * GP // BLOCK_M), b * hkv)](
            q, *sides, do, lse, delta, made[0], mask, DqStrides(*strides, _strides(made[0])), *shape, scale * LOG2E, **common, KIND=kind,
            **tile.launch() | {"BLOCK_M": BLOCK_M},
        )  # fmt: skip
        made[0] = made[0].neg_() if negative else made[0]
    if wanted[1] or wanted[2]:
        mask, kind = _kernel_mask(lengths, rows, rows_empty, toks, toks_n)
        by_token = [t.transpose(1, 2) for t in (q, do)]
        tile = _tile("cross_attention_dkdv", q, k, s * GP, *(by_token if G == GP else ()))
        BLOCK_M = max(tile["BLOCK_M"], GP)
        sides = [_descriptor(t, (1, BLOCK_M // GP, G, block_d["BLOCK_D"])) for t in by_token] if tile["TMA"] else [q, do]
        columns = [_strides(made[i]) if wanted[i] else strides[i] for i in (1, 2)]
        cross_attention_dkdv_kernel[(-(-s_e // tile["BLOCK_N"]), b * hkv)](
            sides[0], k, v, sides[1], lse, delta, made[1], made[2], mask, DkDvStrides(*strides, *columns), *shape, scale * LOG2E, **common, KIND=kind,
            DK=wanted[1], DV=wanted[2], **tile.launch() | {"BLOCK_M": BLOCK_M},
        )  # fmt: skip
    return [t.to(dtype) for t in made]


def _setup_context(ctx, inputs, output) -> None:
    *tensors, ctx.scale, ctx.interpret = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, *output)


def _backward(ctx, do: Tensor | None, dlse: Tensor | None):
    nothing = (None,) * 9
    if do is None and dlse is None:
        return None, None, None, *nothing
    q, k, v, *mask, o, lse = ctx.saved_tensors
    do = torch.zeros_like(o) if do is None else do
    wanted = list(ctx.needs_input_grad[:3])
    found = _cross_attention_bwd(do, q, k, v, o, lse, dlse, *mask, ctx.scale, wanted, ctx.interpret)
    return *(g if wants else None for g, wants in zip(found, wanted, strict=True)), *nothing


def _bwd_setup_context(ctx, inputs, output) -> None:
    do, q, k, v, _o, _lse, dlse, lengths, rows, *_, ctx.scale, ctx.wanted, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(do, q, k, v, dlse, lengths, rows)


def _bwd_backward(ctx, grads: list[Tensor | None]):
    """The gradient of a gradient is rare enough to be left to autograd: the formula, differentiated twice."""
    if all(g is None for g in grads):
        return (None,) * 17
    *leaves, lengths, rows = ctx.saved_tensors
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    do, q, k, v, dlse = leaves
    with torch.enable_grad():
        y, lse = _formula(q, k, v, _dense(lengths, rows, q.shape[2], k.shape[2]), ctx.scale)
        asked = [(t, g) for t, g, wanted in zip((q, k, v), grads, ctx.wanted, strict=True) if wanted and g is not None]
        ups = [do] if dlse is None else [do, dlse]
        first = torch.autograd.grad([y, lse][: len(ups)], [t for t, _ in asked], ups, create_graph=True)
        second = iter(torch.autograd.grad(first, [t for t in leaves if t is not None], [g for _, g in asked], allow_unused=True))
    do, q, k, v, dlse = (None if t is None else next(second) for t in leaves)
    # What o and lse are to q, k and v is in the formula already.
    return do, q, k, v, None, None, dlse, *(None,) * 10


_cross_attention.register_autograd(_backward, setup_context=_setup_context)
_cross_attention_bwd.register_autograd(_bwd_backward, setup_context=_bwd_setup_context)
