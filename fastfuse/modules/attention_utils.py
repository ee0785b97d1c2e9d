"""Scaled dot-product attention over PyTorch's own kernels, and masks of packed sequences."""

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops import EncoderMask, cross_attention
from fastfuse.ops._op import HAS_TRITON, autocast_dtype, forward_mode, route, transformed
from fastfuse.ops.cross_attention import listed_tokens, uncovered


def sdpa_or_flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | EncoderMask | BlockMask | None", dropout_p: float, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v.

    q: [b, hq, s, d], k, v: [b, hkv, s_k, d], hkv dividing hq (key head j serves hq / hkv consecutive query heads).
    mask: bool [b or 1, s, s_k], True where attention is allowed (a row of False gives 0), or an EncoderMask of that shape, which goes to
    cross_attention where that serves; a float mask is added to the scores; a flex-attention BlockMask (CUDA alone); or None.  ->  [b, hq, s, d]
    Raises ValueError for dropout with a BlockMask.
    """
    if isinstance(mask, EncoderMask):
        if not (dropout_p or is_causal) and all(serves_cross_attention(t, q.shape[3], q.shape[1] // k.shape[1]) for t in (q, k, v)):
            return cross_attention(q, k, v, mask)
        # Left alone, an empty softmax is NaN in some attention kernels.
        out = sdpa_or_flex_attention(q, k, v, mask.to_dense() | mask.rows_empty[..., None], dropout_p, is_causal)
        return out.masked_fill(mask.rows_empty[:, None, :, None], 0)
    if isinstance(mask, BlockMask):
        if dropout_p > 0.0:
            raise ValueError(f"Flex attention does not support dropout. Please set dropout to 0.0. It is {dropout_p}.")
        return _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:
        mask = mask[:, None, :, :]
    grouped = q.shape[1] != k.shape[1]
    if grouped and q.shape[2] == 1 and not is_causal:
        # One token each: the query heads of a group become rows of one head, and nothing of a long cache is copied.
        rows = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, dropout_p=dropout_p).reshape(q.shape)
    if grouped and q.is_cuda and (mask is not None or q.dtype == torch.float32):
        # Of PyTorch's CUDA kernels the one that takes a mask or fp32 and does not materialise the scores knows no grouped heads.
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=grouped)


def serves_cross_attention(x: Tensor, head_dim: int, group: int) -> bool:
    """Whether the fused op does for queries like x, `group` of whose heads share a key head.

    It does not inside of torch.func or of forward-mode differentiation, for sharded tensors, and on a GPU for what no kernel covers.
    """
    device, dtype = x.device, x.dtype
    if forward_mode() or transformed() or hasattr(x, "device_mesh") or (device.type == "cuda" and not _has_kernels(device)):
        return False
    if (computed := autocast_dtype(device)) is not None:
        if dtype == torch.float64:  # which autocast leaves as it is, and the op does not
            return False
        dtype = computed
    if route("cross_attention", x, None) == "reference":  # which makes all scores: PyTorch's own attention is better there
        return False
    return not _by_kernels(x) or uncovered(dtype, head_dim, group) is None


def list_blocks(mask: EncoderMask, x: Tensor, group: int) -> None:
    """Has the mask make now what cross_attention of queries like x would have it make at its first call."""
    if _by_kernels(x):
        mask.blocks(listed_tokens(group))


def _by_kernels(x: Tensor) -> bool:
    chosen = route("cross_attention", x, None)
    return chosen == "interpreter" or (chosen == "op" and x.device.type == "cuda")


@torch.compiler.assume_constant_result
def _has_kernels(device: torch.device) -> bool:
    """Whether this GPU is one that the kernels are written for."""
    try:
        return HAS_TRITON and bool(tune.covering_arch("cross_attention", tune.arch_of(device)))
    except Unsupported:
        return False


@cache
def _compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=False)


def create_block_causal_mask(seq_lens: Sequence[Tensor]) -> Tensor:
    """seq_lens: for each row the lengths of the sequences packed in it, int [n], of one sum s  ->  bool [b, s, s].

    A token sees the tokens of its own sequence up to itself. Raises ValueError where the rows' sums differ.
    """
    ids = _sequence_ids(seq_lens)
    causal = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).tril()
    return (ids[:, :, None] == ids[:, None, :]) & causal


def packed_block_causal_mask(seq_lens: Sequence[Tensor]) -> "Tensor | BlockMask":
    """create_block_causal_mask, on a GPU as a flex-attention BlockMask, which skips the blocks that nobody sees."""
    ids = _sequence_ids(seq_lens)
    if not ids.is_cuda:
        return create_block_causal_mask(seq_lens)
    b, s = ids.shape
    return create_block_mask(lambda row, head, q, k: (q >= k) & (ids[row, q] == ids[row, k]), b, None, s, s, device=ids.device)


def _sequence_ids(seq_lens: Sequence[Tensor]) -> Tensor:
    """int64 [b, s]: which sequence of its row each token belongs to."""
    rows = [torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths) for lengths in seq_lens]
    if len({len(row) for row in rows}) != 1:
        raise ValueError(f"seq_lens has rows of {sorted({len(row) for row in rows})} tokens, packed rows have one length")
    return torch.stack(rows)
