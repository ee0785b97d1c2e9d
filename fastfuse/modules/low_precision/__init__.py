"""Frozen layers over NF4 weights, and the state-dict hook that saves such weights as numbers."""

from fastfuse.modules.low_precision._state_dict_hooks import (
    _register_reparametrize_state_dict_hooks as _register_reparametrize_state_dict_hooks,
)
from fastfuse.modules.low_precision._state_dict_hooks import (
    reparametrize_as_dtype_state_dict_post_hook as reparametrize_as_dtype_state_dict_post_hook,
)
from fastfuse.modules.low_precision.nf4_linear import FrozenNF4Linear as FrozenNF4Linear
