"""Cross-attention without kernels of ours: the formula, its gradients, and both over PyTorch's CPU kernels."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse.kernels.arguments import Lengths
from fastfuse.ops.encoder_mask import AttentionMask, EncoderMask

LOG2E = math.log2(math.e)


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
    (b, hkv, s_e, _), (G, GP), s, dtype = args.k.shape, group_of(args.q, args.k), args.q.shape[2], args.q.dtype
    o = empty_like(args.q, dtype).zero_()
    q, k, v = (_apart(t) for t in args[:3])
    lse = torch.full((b, hkv, s, GP), torch.inf, dtype=torch.promote_types(dtype, torch.float32))
    for row, tokens, columns, bias in _pieces(args.mask, b, s, s_e, dtype):
        packed = _packed(q[row][:, :, tokens], hkv)
        out, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            packed, k[row][:, :, columns], v[row][:, :, columns], 0.0, False, attn_mask=_repeated(bias, G, packed.shape[2]), scale=args.scale
        )
        o[row, :, tokens] = _unpacked(out, G)
        lse[row, :, tokens, :G] = (sums * LOG2E).unflatten(-1, (G, -1)).transpose(2, 3)
    return o, lse


def backward_on_cpu(args: AttentionGradArgs) -> tuple[Tensor, ...]:
    if args.dlse is not None:
        # PyTorch's kernel knows no gradient of the sums: that of o would have to be one whose product with o is less by it
        return backward(args)
    (b, hkv, s_e, _), (G, _), s, dtype = args.k.shape, group_of(args.q, args.k), args.q.shape[2], args.q.dtype
    wide = torch.promote_types(args.k.dtype, torch.float32)  # several runs may see a column: their parts add up in fp32
    dq, dk, dv = (empty_like(t, of).zero_() for t, of in ((args.q, dtype), (args.k, wide), (args.v, wide)))
    do, q, k, v, o = (_apart(t) for t in args[:5])
    for row, tokens, columns, bias in _pieces(args.mask, b, s, s_e, dtype):
        packed_do, packed_q, packed_o = (_packed(t[row][:, :, tokens], hkv) for t in (do, q, o))
        sums = args.lse[row, :, tokens, :G].transpose(2, 3).flatten(2, 3) / LOG2E
        of_k, of_v = (t[row][:, :, columns] for t in (k, v))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            packed_do, packed_q, of_k, of_v, packed_o, sums, 0.0, False, attn_mask=_repeated(bias, G, packed_do.shape[2]), scale=args.scale
        )
        dq[row, :, tokens] = _unpacked(grads[0], G)
        dk[row, :, columns] += grads[1]
        dv[row, :, columns] += grads[2]
    return tuple([t.to(dtype) for t, needed in zip((dq, dk, dv), args.needs_grad, strict=True) if needed])


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


def _pieces(mask: Lengths | AttentionMask, b: int, s: int, s_e: int, dtype: torch.dtype) -> Iterator[tuple]:
    """(batch rows, tokens, slice of columns, bias or None) of everything that is visible: tokens that see the same go together."""
    if not (b and s and s_e):
        return
    if isinstance(mask, Lengths):
        if mask.lengths is None:
            yield slice(0, b), slice(0, s), slice(0, s_e), None
            return
        for i, length in enumerate(mask.lengths.tolist()):
            if length:
                yield slice(i, i + 1), slice(0, s), slice(0, length), None
        return
    for i, one in enumerate(mask.rows):
        batch = slice(i, i + 1) if mask.rows.shape[0] == b else slice(0, b)
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
