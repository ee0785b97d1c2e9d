"""A static key-value cache."""

import torch
from torch import Tensor, nn

from fastfuse.errors import InvalidArgument
from fastfuse.ops._device_checks import assert_on_device, values_are_at_hand


class KVCache(nn.Module):
    """Keys and values of past tokens in tensors of fixed size, written in place.

    k_cache, v_cache: [batch_size, num_kv_heads, max_seq_len, head_dim] in dtype.  cache_pos: int64 [max_seq_len], the
    positions the next tokens take. None of them is in the state dict. is_empty is the host's own knowledge: set it to False
    after filling the tensors by other means than update, a replayed CUDA graph say.
    """

    def __init__(self, batch_size: int, max_seq_len: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype):
        super().__init__()
        shape = (batch_size, num_kv_heads, max_seq_len, head_dim)
        self.register_buffer("k_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("v_cache", torch.zeros(shape, dtype=dtype), persistent=False)
        self.register_buffer("cache_pos", torch.arange(max_seq_len), persistent=False)
        self.batch_size = batch_size
        # Known to the host, so that cross-attention can skip an empty cache without reading cache_pos from the device.
        self.is_empty = True

    @property
    def size(self) -> int:
        """Number of tokens held. Waits for the device."""
        return self.cache_pos[0].item()

    def reset(self) -> None:
        """Forget all tokens; the tensors stay where they are."""
        for cache in (self.k_cache, self.v_cache):
            cache.detach_().zero_()  # a forward with gradients has left its graph in it
        self.cache_pos -= self.cache_pos[0].clone()
        self.is_empty = True

    def update(self, k_val: Tensor, v_val: Tensor) -> tuple[Tensor, Tensor]:
        """Write the next tokens and return the whole cache: (k_cache, v_cache), the tensors themselves, no copies.

        k_val, v_val: [b, num_kv_heads, s, head_dim] in the cache's dtype, b the cache's batch size (1 fills every row).
        Raises ValueError for a larger batch and where the tokens do not fit; on a GPU and under torch.compile the
        second is an assertion on the device.
        """
        b, _, s, _ = k_val.shape
        if b > self.batch_size:
            raise ValueError(f"The current cache has been setup with a batch size of {self.batch_size}, but found new key tensors with batch size {b}!")
        max_seq_len = self.k_cache.shape[2]
        if values_are_at_hand(self.cache_pos):
            if self.size + s > max_seq_len:
                raise InvalidArgument(f"KVCache: k_val has {s} tokens, the cache holds {self.size} of max_seq_len={max_seq_len}")
        else:
            assert_on_device(self.cache_pos[0] + s <= max_seq_len, f"KVCache: more tokens than max_seq_len={max_seq_len}")
        if v_val.shape != k_val.shape:
            raise ValueError(f"KVCache: v_val has shape {tuple(v_val.shape)}, k_val {tuple(k_val.shape)}")
        positions = self.cache_pos[:s].clone()  # a view would change under autograd, which has kept it
        self.k_cache[:, :, positions] = k_val
        self.v_cache[:, :, positions] = v_val
        self.cache_pos.add_(s)
        self.is_empty = False
        return self.k_cache, self.v_cache
