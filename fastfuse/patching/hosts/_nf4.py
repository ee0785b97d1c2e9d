"""What the hosts of linear layers over NF4 weights share."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import Unsupported
from fastfuse.modules._prepared import PreparedLinear
from fastfuse.ops._op import route
from fastfuse.patching.hosts._host import Arguments, Host, Options, Probe, Reason, Rehearsed, Sizes, hooked, plain, plain_tensors, rebound, whole_in_calls
from fastfuse.quant.nf4 import NF4View


@dataclass(frozen=True, kw_only=True)
class NF4Layer:
    """What a host file says of a module that maps its one argument, named x, by an NF4 weight; and the parts of a Host that follow from it.

    view: the weight, read anew at every call.  obstacle: (module, the argument or None) -> why a call would run the module's own forward.
    fused: (module, the argument, view, backend) -> what forward returns.  probe_dtype: of the argument that verify draws.
    watched: (module, the argument, view), after a fused call -> its next call prepared, None where that is not covered.
    """

    view: Callable[[nn.Module], NF4View] = lambda module: NF4View.of(module.weight)
    obstacle: Callable[[nn.Module, Tensor | None], Reason | None]
    fused: Callable[[nn.Module, Tensor, NF4View, str | None], Tensor]
    probe_dtype: Callable[[nn.Module], torch.dtype] = lambda module: module.weight.dtype
    watched: Callable[[nn.Module, Tensor, NF4View], PreparedLinear | None] = lambda *_: None
    x: str = "x"

    def read(self, module: nn.Module) -> NF4View | Reason:
        try:
            return self.view(module)
        except (Unsupported, AttributeError, TypeError, ValueError) as e:
            return Reason(getattr(e, "code", "NOT_NF4"), str(e).removeprefix("NF4View: "))

    def in_the_way(self, module: nn.Module, x: Tensor | None = None) -> Reason | None:
        return self.obstacle(module, x) or plain_tensors(*(t for t in (x, getattr(module, "bias", None)) if hasattr(t, "device_mesh")))

    def run(self, module: nn.Module, arguments: Arguments, options: Options) -> Tensor | Reason:
        x = arguments.get(self.x)
        if not isinstance(x, Tensor):
            return Reason("ARGUMENTS", "called with something else than one tensor")
        view = self.in_the_way(module, x) or self.read(module)
        if type(view) is Reason:
            return view
        if x.shape[-1:] != view.shape[1:]:
            return Reason("SHAPE", "the input's last dim is not the weight's K")
        return self.fused(module, x, view, options.named())

    def prepare(self, module: nn.Module, arguments: Arguments, options: Options) -> PreparedLinear | None:
        x = arguments[self.x]
        if type(x) is not Tensor or x.is_meta or route("nf4_linear", x, options.named()) != "op":
            return None
        view = self.read(module)
        return None if type(view) is Reason else self.watched(module, x, view)

    def refuses(self, module: nn.Module, options: Options) -> Reason | None:
        view = self.read(module)
        return view if type(view) is Reason and not (view.code == "DTENSOR" and whole_in_calls(module)) else None

    def layout(self, module: nn.Module) -> str:
        view = self.read(module)
        return "" if type(view) is Reason else view.layout

    def probe(self, module: nn.Module) -> Probe:
        view, dtype = self.view(module), self.probe_dtype(module)
        K = view.shape[1]
        # On a CPU bitsandbytes repacks its weight for good when the input needs no gradient.
        x = torch.randn(4, K, generator=torch.Generator().manual_seed(0)).to(view.device, dtype).requires_grad_()
        return Probe({self.x: x}, dtype, K)

    def rehearse(self, module: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
        view = self.read(module)
        if type(view) is Reason:
            return view
        x = self.probe(module).arguments[self.x].new_zeros(sizes.batch, sizes.tokens, view.shape[1], requires_grad=torch.is_grad_enabled())
        out = self.run(module, {self.x: x}, options)
        return out if type(out) is Reason else (out, [x])


def nf4_host(layer: NF4Layer, **how: Any) -> Host:
    """A Host of such modules."""
    return Host(
        kernels="nf4_linear", takes=(layer.x,), refuses=layer.refuses, obstacle=layer.in_the_way, fused=layer.run, probe=layer.probe,
        rehearse=layer.rehearse, layout=layer.layout, prepare=layer.prepare, **how,
    )  # fmt: skip


def adapter_obstacle(a: nn.Module, b: nn.Module, dropout: nn.Module) -> Reason | None:
    """Why the parts of a LoRA adapter have to be called."""
    if reason := plain(a, nn.Linear) or plain(b, nn.Linear):
        return reason
    if a.bias is not None:
        return Reason("LORA_BIAS", "the adapter's A has a bias")
    if hooked(dropout) or type(dropout) not in (nn.Identity, nn.Dropout) or rebound(dropout) or getattr(dropout, "inplace", False):
        return Reason("DROPOUT", f"the adapter's dropout is a {type(dropout).__name__}, hooked, or works in place")
    return None


def drops_now(dropout: nn.Module) -> float:
    """The probability with which the adapter's input is zeroed now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
