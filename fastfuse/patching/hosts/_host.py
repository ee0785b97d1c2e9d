"""What a host file provides, and what all of their forwards share."""

import collections
import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MethodType

import torch
from torch import Tensor, nn

from fastfuse.errors import Unsupported
from fastfuse.modules._hooks import is_hooked
from fastfuse.ops._op import check_device
from fastfuse.quant.nf4 import NF4View

# Reasons a user asked for: counted, but not worth a warning. The base layer underneath is patched by itself.
EXPECTED = ("ADAPTERS_DISABLED", "MERGED", "NO_ADAPTER")


@dataclass(frozen=True)
class Host:
    """How one kind of module is recognised and what replaces its forward.

    matches: recognises the module by its parts. written_by: prefix of the modules whose forward this host knows; a
    subclass with a forward of its own is left alone. view: the NF4 weight, read anew at every call; raises where there is
    none. obstacle: (module, input or None) -> (code, reason) that makes a call run the module's own forward, None where
    nothing is in the way; without an input it answers for the module alone. fused: (module, input, weight, backend) -> output.
    forward: what is bound in place of the module's. probe_dtype: what the module computes in.
    """

    name: str
    op: str
    matches: Callable[[nn.Module], bool]
    written_by: str
    view: Callable[[nn.Module], NF4View]
    obstacle: Callable[[nn.Module, Tensor | None], tuple[str, str] | None]
    fused: Callable[[nn.Module, Tensor, NF4View, str], Tensor]
    forward: Callable
    probe_dtype: Callable[[nn.Module], torch.dtype]


@dataclass
class Record:
    """Kept as `_fastfuse` on a patched module. Pickles as None, so that a saved module loads unpatched, without fastfuse."""

    host: str
    op: str
    backend: str
    slot: str  # the attribute the forward was bound to: "forward", or accelerate's "_old_forward"
    original: Callable | None  # what the instance had there; None where it used its class's forward
    fallbacks: collections.Counter = field(default_factory=collections.Counter)

    def __deepcopy__(self, memo) -> "Record":
        return Record(self.host, self.op, self.backend, self.slot, copy.deepcopy(self.original, memo))

    def __reduce__(self):
        return type(None), ()


def readable(host: Host, module: nn.Module, backend: str) -> tuple[NF4View | None, tuple[str, str] | None]:
    """The module's NF4 weight, or (code, reason) why `backend` cannot read it where it is."""
    try:
        weight = host.view(module)
        check_device("nf4_linear", weight.device, backend)
        return weight, None
    except Unsupported as e:
        return None, (e.code, str(e).removeprefix("NF4View: "))
    except (AttributeError, TypeError, ValueError) as e:
        return None, ("NOT_NF4", str(e).removeprefix("NF4View: "))


def run(host: Host, self: nn.Module, args: tuple, kwargs: dict) -> Tensor:
    """The body of every patched forward: fused where nothing is in the way, else the module's own forward."""
    record = self.__dict__.get("_fastfuse")
    if record is None:  # unpatched while another wrapper still holds this forward
        return type(self).forward(self, *args, **kwargs)
    if len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        found = "ARGUMENTS", "called with something else than one tensor"
    elif torch.autograd.forward_ad._current_level >= 0:
        found = "FORWARD_AD", "forward-mode differentiation is not covered"
    elif (found := host.obstacle(self, args[0])) is None:
        weight, found = readable(host, self, record.backend)
        if found is None and args[0].shape[-1:] != weight.shape[1:]:
            found = "SHAPE", "the input's last dim is not the weight's K"
        if found is None:
            return host.fused(self, args[0], weight, record.backend)
    if not torch.compiler.is_compiling():
        code, reason = found
        if not record.fallbacks[code] and code not in EXPECTED:
            warnings.warn(f"fastfuse: {type(self).__name__} runs its own forward: {code}: {reason}", stacklevel=3)
        record.fallbacks[code] += 1
    return own_forward(self)(*args, **kwargs)


def own_forward(module: nn.Module) -> Callable:
    """What the module would run had it not been patched."""
    record = module.__dict__.get("_fastfuse")
    if record is not None and record.original is not None:
        return record.original
    return MethodType(type(module).forward, module)


def forward_slot(module: nn.Module) -> str:
    """Where the module's own forward is. accelerate's hook wraps what it finds in _old_forward: binding there keeps the hook running."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def foreign_forward(host: Host, module: nn.Module) -> str | None:
    """Who wrote the forward that a call would run, where it is neither the host library's own class nor this host."""
    own = type(module).forward
    current = module.__dict__.get(forward_slot(module), own)
    current = getattr(current, "__func__", current)
    if current is host.forward or (current is own and own.__module__.startswith(host.written_by)):
        return None
    return getattr(current, "__module__", None) or "an unknown place"


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, so that it must be called: accelerate's hooks are forwards of the instance."""
    return is_hooked(module) or "_hf_hook" in module.__dict__
