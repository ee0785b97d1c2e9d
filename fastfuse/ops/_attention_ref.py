"""Cross-attention without kernels of ours: the formula, its gradients, and both over PyTorch's CPU kernels."""

import math
from collections.abc import Iterator
from itertools import accumulate, groupby, pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.kernels.arguments import Lengths
from fastfuse.ops.encoder_mask import AttentionMask, EncoderMask

LOG2E = math.log2(math.e)
# With them PyTorch's backward takes 0.8x as long in bf16 as in fp32; without, 2x to 5x, as it multiplies bf16 in scalar code. False where nobody can tell.
BF16_PRODUCTS = getattr(torch.cpu, "_is_avx512_bf16_supported", bool)()
ALL = slice(None)


class AttentionArgs(NamedTuple):
    """q: [b, hq, s, d]; k, v: [b, hkv, s_e, d]. A mask of Lengths(None) shows everything."""

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Lengths | AttentionMask
    scale: float
    interpret: bool


class AttentionGradArgs(NamedTuple):
    """Of a forward's o and lse the gradients do and dlse (None: zeros), with what the forward had. needs_grad: whether q, k and v need theirs."""

    do: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    lse: Tensor
    dlse: Tensor | None
    mask: Lengths | AttentionMask
    scale: float
    needs_grad: tuple[bool, bool, bool]
    interpret: bool


def group_of(q: Tensor, k: Tensor) -> tuple[int, int]:
    """(query heads of a key head, that rounded up to a power of two)"""
    G = q.shape[1] // k.shape[1]
    return G, 1 << (G - 1).bit_length()


def formula(q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    hkv, (G, GP), wide = k.shape[1], group_of(q, k), torch.promote_types(q.dtype, torch.float32)
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


def dense(mask: Lengths | AttentionMask, s: int, s_e: int) -> Tensor | None:
    """What a mask shows, bool [b or 1, s, s_e]; None: everything."""
    if isinstance(mask, AttentionMask):
        return _shown(mask.rows, s_e)
    if mask.lengths is None:
        return None
    return (torch.arange(s_e, device=mask.lengths.device) < mask.lengths[:, None])[:, None].expand(-1, s, -1)


def _shown(rows: Tensor, s_e: int) -> Tensor:
    return EncoderMask("interval" if rows.shape[-1] == 2 else "bits", rows, rows[..., 0], s_e).to_dense()


def _like(q: Tensor, x: Tensor) -> Tensor:
    """x in the layout that kernels give a result."""
    return empty_like(q, x.dtype).copy_(x)


def empty_like(q: Tensor, dtype: torch.dtype) -> Tensor:
    """A result in q's layout, without its gaps; contiguous where that would put another dim than the last one innermost."""
    made = torch.empty_like(q, dtype=dtype)
    return made if made.stride(-1) == 1 else torch.empty(q.shape, dtype=dtype, device=q.device)


def forward(args: AttentionArgs | AttentionGradArgs) -> tuple[Tensor, Tensor]:
    return formula(args.q, args.k, args.v, dense(args.mask, args.q.shape[2], args.k.shape[2]), args.scale)


def backward(args: AttentionGradArgs) -> tuple[Tensor, ...]:
    do, q, k, v, scale = args.do, args.q, args.k, args.v, args.scale
    (_, hkv, s_e, _), (G, _), wide = k.shape, group_of(q, k), torch.promote_types(q.dtype, torch.float32)
    grouped_q, grouped_do, grouped_o = (t.to(wide).unflatten(1, (hkv, G)) for t in (q, do, args.o))
    wide_k, wide_v = (t.to(wide)[:, :, None] for t in (k, v))
    sums = args.lse[..., :G].transpose(2, 3)[..., None] / LOG2E
    p = (grouped_q @ wide_k.mT * scale - sums).exp()
    visible = dense(args.mask, q.shape[2], s_e)
    if visible is not None:
        p = p.masked_fill(~visible[:, None, None], 0)
    delta = (grouped_o * grouped_do).sum(-1, keepdim=True)
    if args.dlse is not None:
        delta = delta - args.dlse[..., :G].transpose(2, 3)[..., None] * LOG2E
    ds = p * (grouped_do @ wide_v.mT - delta) * scale
    grads = (ds @ wide_k).flatten(1, 2), (ds.mT @ grouped_q).sum(2), (p.mT @ grouped_do).sum(2)
    return tuple([_like(t, g.to(t.dtype)) for t, g, needed in zip((q, k, v), grads, args.needs_grad, strict=True) if needed])


def forward_on_cpu(args: AttentionArgs) -> tuple[Tensor, Tensor]:
    """PyTorch's CPU kernel over what each run of tokens sees, without a copy of k or v for every query head and without scores."""
    (b, hkv, s_e, _), (G, GP), s, dtype, o = args.k.shape, group_of(args.q, args.k), args.q.shape[2], args.q.dtype, None
    q, k, v = map(_apart, args[:3])
    for row, tokens, columns, seen in _pieces(args.mask, b, s, s_e):
        if columns is not None:
            part = _cut(q, row, tokens)
            packed = _packed(part, G, G * s)
            out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                packed, _cut(k, row, columns), _cut(v, row, columns), 0.0, False, attn_mask=_bias(seen, packed), scale=args.scale
            )
            out, sums = _unpacked(out, part), sums.mul_(LOG2E).reshape(-1, hkv, G, part.shape[2]).mT
            if G < GP:
                sums = F.pad(sums, (0, GP - G), value=torch.inf)
            if part is q:
                o, lse = _laid_out(args.q, out), sums.contiguous()
                continue
        else:
            out, sums = 0, torch.inf
        if o is None:
            o, lse = empty_like(args.q, dtype), torch.empty((b, hkv, s, GP), dtype=torch.promote_types(dtype, torch.float32))
        o[row, :, tokens], lse[row, :, tokens] = out, sums
    return o, lse


def backward_on_cpu(args: AttentionGradArgs) -> tuple[Tensor, ...]:
    if args.dlse is not None:
        # PyTorch's kernel knows no gradient of the sums: that of o would have to be one whose product with o is less by it
        return backward(args)
    (b, _, s_e, _), (G, _), s, dtype = args.k.shape, group_of(args.q, args.k), args.q.shape[2], args.q.dtype
    wide = torch.promote_types(dtype, torch.float32)  # several runs may see a column: their parts add up in fp32
    work = dtype if BF16_PRODUCTS and dtype == torch.bfloat16 else wide
    do, q, k, v, o = (_apart(t.to(work)) for t in args[:5])
    sums, dq, dk = args.lse[..., :G].mT / LOG2E, None, None
    for row, tokens, columns, seen in _pieces(args.mask, b, s, s_e):
        if columns is not None:
            packed = [_packed(_cut(t, row, tokens), G, G * s if work == wide else 0) for t in (do, q, o)]
            of_q, of_k, of_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                *packed[:2], _cut(k, row, columns), _cut(v, row, columns), packed[2], sums[row, :, :, tokens].reshape(packed[1].shape[:3]),
                0.0, False, attn_mask=_bias(seen, packed[1]), scale=args.scale,
            )  # fmt: skip
            part = _cut(args.q, row, tokens)
            of_q = _unpacked(of_q, part).to(dtype)
            if dk is None and of_k.shape == k.shape:
                dk, dv = of_k.to(wide), of_v.to(wide)
            else:
                if dk is None:
                    dk, dv = torch.zeros_like(args.k, dtype=wide), torch.zeros_like(args.v, dtype=wide)
                dk[row, :, columns] += of_k
                dv[row, :, columns] += of_v
            if part is args.q:
                dq = of_q
                continue
        else:
            of_q = 0
        if dq is None:
            dq = empty_like(args.q, dtype)
        dq[row, :, tokens] = of_q
    if dk is None:
        dk, dv = torch.zeros_like(k), torch.zeros_like(v)
    return tuple([_laid_out(t, d.to(dtype)) for t, d, needed in zip(args[1:4], (dq, dk, dv), args.needs_grad, strict=True) if needed])


def _laid_out(q: Tensor, x: Tensor) -> Tensor:
    """_like(q, x), x itself where it is that. No view: autograd forbids to change one of several views that a function returns in place."""
    fits = (x.stride() == q.stride() and q.stride(-1) == 1) or (x.is_contiguous() and q.is_contiguous())
    return x if fits and not x._is_view() else _like(q, x)


def _apart(t: Tensor) -> Tensor:
    """Rows that share no memory: of windows over one another PyTorch's kernel makes results that are partly uninitialised."""
    if t.is_contiguous():
        return t
    own = t.stride(-1) == 1 and all(n == 1 or stride >= t.shape[-1] for n, stride in zip(t.shape[:3], t.stride()[:3], strict=True))
    return t if own else t.contiguous()


def _cut(t: Tensor, row: slice, at: slice | Tensor) -> Tensor:
    return t if row is at is ALL else t[row, :, at]


def _packed(q: Tensor, G: int, rows: int) -> Tensor:
    """[b, hq, s, d] -> [b, hkv, G * s, d], the heads of a group as rows of one: for fewer rows than PyTorch's kernel takes at a time, which reads k and v for each
    head anew. For more it only takes time to copy them."""
    return q if rows >= 64 else q.reshape(len(q), q.shape[1] // G, -1, q.shape[3])


def _unpacked(x: Tensor, like: Tensor) -> Tensor:
    return x if x.shape == like.shape else x.reshape(like.shape)


def _bias(seen: Tensor | None, packed: Tensor) -> Tensor | None:
    """[s or 1, columns] -> [1, 1, rows of packed, columns]; one row for all is not copied."""
    if seen is None:
        return None
    bias, rows = torch.zeros((), dtype=packed.dtype).where(seen, -torch.inf), packed.shape[2]
    return (bias.expand(rows, -1) if len(bias) == 1 else bias.repeat(rows // len(bias), 1))[None, None]


def _pieces(mask: Lengths | AttentionMask, b: int, s: int, s_e: int) -> Iterator[tuple]:
    """(batch rows, tokens, columns, what of them is seen or None for all): tokens that see the same go together; columns None for those that see nothing."""
    if not (b and s and s_e):
        yield ALL, ALL, None, None
        return
    if isinstance(mask, Lengths):
        lengths, past = [s_e] * b if mask.lengths is None else mask.lengths.tolist(), 0
        for length, run in groupby(lengths):
            start, past = past, past + len([*run])
            yield ALL if past - start == b else slice(start, past), ALL, (ALL if length == s_e else slice(0, length)) if length else None, None
        return
    for i, rows in enumerate(mask.rows.tolist()):
        batch = ALL if len(mask.rows) < b or b == 1 else slice(i, i + 1)
        ends = [*accumulate(len([*run]) for _, run in groupby(rows))]
        alike = len(ends) <= max(4, s // 8)
        if not alike:  # every token its own: 64 at a time
            ends = [*range(64, s, 64), s]
        # A text mostly begins with a few words that see nothing: to take them along and throw them away costs less than to put the rest where it belongs.
        blind = slice(0, ends.pop(0)) if alike and len(ends) > 1 and ends[0] < 64 and not any(rows[0]) else None
        for start, end in pairwise([0, *ends]):
            tokens = ALL if end - start == s else slice(start, end)
            if alike and len(rows[0]) == 2:
                first, last = rows[end - 1]
                yield batch, tokens, slice(first, last) if first < last else None, None
                continue
            seen = _shown(mask.rows[i : i + 1, end - 1 if alike else start : end], s_e)[0]
            if not alike:
                empty = ~seen.any(1)
                yield batch, start + empty.nonzero().flatten(), None, None
                tokens, seen = start + (~empty).nonzero().flatten(), seen[~empty]
            columns = seen.any(0).nonzero().flatten().tolist()
            if not columns:
                yield batch, tokens, None, None
                continue
            first, last = columns[0], columns[-1] + 1
            if not alike:
                # PyTorch's kernel sums 512 columns at a time: whole ones, so that no row's rounding depends on what its neighbours see
                first, last = first // 512 * 512, min(-(-last // 512) * 512, s_e)
            seen = seen[:, first:last]
            # Columns that nobody sees between others are read and thrown away: a copy without them would cost more.
            yield batch, tokens, slice(first, last), None if seen.all() else seen
        if blind:
            yield batch, blind, None, None
