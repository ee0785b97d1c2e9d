"""Key-value caches of a whole model: delete, disable for a while, have for a while."""

import contextlib
import logging
from collections.abc import Generator

import torch
from torch import nn

from fastfuse.modules.low_precision._state_dict_hooks import (
    _register_reparametrize_state_dict_hooks as _register_reparametrize_state_dict_hooks,
)
from fastfuse.modules.low_precision._state_dict_hooks import (
    reparametrize_as_dtype_state_dict_post_hook as reparametrize_as_dtype_state_dict_post_hook,
)
from fastfuse.modules.transformer import TransformerDecoder

log = logging.getLogger(__name__)


def _cached_modules(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if callable(getattr(m, "kv_cache", None))]


def delete_kv_caches(model: nn.Module) -> None:
    """Remove the model's caches. Raises ValueError where none are set up."""
    if not model.caches_are_setup():
        raise ValueError("You have tried to delete model caches, but model.caches_are_setup() is False! Please setup caches with model.setup_caches() first.")
    for module in _cached_modules(model):
        module.cache_enabled = False
        module.kv_cache = None
    for module in model.modules():
        if isinstance(module, TransformerDecoder):
            module.encoder_max_cache_seq_len = module.decoder_max_cache_seq_len = None


@contextlib.contextmanager
def disable_kv_cache(model: nn.Module) -> Generator[None, None, None]:
    """Inside, forward neither reads nor writes the caches; their contents stay. Enabled again afterwards.

    Attention without a mask is causal inside, as it is in a model that has no caches.
    Raises ValueError where no caches are set up.
    """
    if not model.caches_are_setup():
        raise ValueError("Model caches must be setup before calling disable_kv_cache! Please use model.setup_caches() to setup model caches.")
    if not model.caches_are_enabled():
        log.warning("disable_kv_cache: the caches are disabled already; they are enabled on leaving")
    modules = _cached_modules(model)
    for module in modules:
        module.cache_enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.cache_enabled = True


@contextlib.contextmanager
def local_kv_cache(
    model: nn.Module,
    *,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    encoder_max_seq_len: int | None = None,
    decoder_max_seq_len: int | None = None,
) -> Generator[None, None, None]:
    """Inside, the model has caches on `device`; they are deleted on leaving. Raises ValueError where it has caches already."""
    if model.caches_are_setup():
        raise ValueError("Model caches must be not setup prior to entering this context manager! Please use delete_kv_caches(model) to delete model caches.")
    with torch.device(device):
        model.setup_caches(batch_size, dtype, encoder_max_seq_len=encoder_max_seq_len, decoder_max_seq_len=decoder_max_seq_len)
    try:
        for module in _cached_modules(model):
            module.kv_cache.to(device)
        yield
    finally:
        delete_kv_caches(model)
