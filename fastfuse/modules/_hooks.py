"""Whether a module may be replaced by what it computes."""

from torch import nn
from torch.nn.modules import module as _nn


def is_hooked(module: nn.Module) -> bool:
    """Whether calling the module runs a hook, its own or a global one."""
    own = module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return bool(own) or _nn._has_any_global_hook()
