"""Scaled dot-product attention over PyTorch's own kernels."""

from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, flex_attention


def sdpa_or_flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: "Tensor | BlockMask | None", dropout_p: float, is_causal: bool) -> Tensor:
    """softmax(q k^T / sqrt(d) + mask) v.

    q: [b, hq, s, d], k, v: [b, hkv, s_k, d], hkv dividing hq (key head j serves hq / hkv consecutive query heads).
    mask: bool [b or 1, s, s_k], True where attention is allowed (a row of False gives 0); a float mask is added to the
    scores; a flex-attention BlockMask (CUDA alone); or None.  ->  [b, hq, s, d]
    Raises ValueError for dropout with a BlockMask.
    """
    if isinstance(mask, BlockMask):
        if dropout_p > 0.0:
            raise ValueError(f"Flex attention does not support dropout. Please set dropout to 0.0. It is {dropout_p}.")
        return _compiled_flex_attention()(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
    if mask is not None:
        mask = mask[:, None, :, :]
    grouped = q.shape[1] != k.shape[1]
    if grouped and mask is not None and q.is_cuda:
        # Of PyTorch's CUDA kernels the one that takes a mask and does not materialise the scores knows no grouped heads.
        k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], dim=1) for t in (k, v))
        grouped = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout_p, is_causal=is_causal, enable_gqa=grouped)


@cache
def _compiled_flex_attention():
    return torch.compile(flex_attention, dynamic=False)
