"""What the hosts of linear layers over NF4 weights share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import Unsupported
from fastfuse.modules._prepared import PreparedLinear
from fastfuse.ops._op import route
from fastfuse.patching.hosts._host import Given, Host, Options, Probe, Reason, Rehearsed, Sizes, hooked, plain, plain_tensors, rebound, whole_in_calls
from fastfuse.quant.nf4 import NF4View


def nf4_host(
    *,
    view: Callable[[nn.Module], NF4View] = lambda module: NF4View.of(module.weight),
    obstacle: Callable[[nn.Module, Tensor | None], Reason | None],
    fused: Callable[[nn.Module, Tensor, NF4View, str | None], Tensor],
    probe_dtype: Callable[[nn.Module], torch.dtype] = lambda module: module.weight.dtype,
    watched: Callable[[nn.Module, Tensor, NF4View], PreparedLinear | None] = lambda *_: None,
    x: str = "x",
    **how: Any,
) -> Host:
    """A Host of a module that maps its one argument, named x, by the NF4 weight that `view` reads anew at every call.

    watched: (module, x, view), after a fused call -> its next call prepared, None where that is not covered.
    """

    def run(module: nn.Module, given: Given, options: Options) -> Tensor | Reason:
        tensor = given.get(x)
        if not isinstance(tensor, Tensor):
            return Reason("ARGUMENTS", "called with something else than one tensor")
        found = in_the_way(module, tensor) or read(module)
        if type(found) is Reason:
            return found
        if tensor.shape[-1:] != found.shape[1:]:
            return Reason("SHAPE", "the input's last dim is not the weight's K")
        return fused(module, tensor, found, options.named())

    def prepare(module: nn.Module, given: Given, options: Options) -> PreparedLinear | None:
        tensor = given[x]
        if type(tensor) is not Tensor or tensor.is_meta or route("nf4_linear", tensor, options.named()) != "op":
            return None
        found = read(module)
        return None if type(found) is Reason else watched(module, tensor, found)

    def in_the_way(module: nn.Module, tensor: Tensor | None) -> Reason | None:
        return obstacle(module, tensor) or plain_tensors(*(t for t in (tensor, getattr(module, "bias", None)) if hasattr(t, "device_mesh")))

    def read(module: nn.Module) -> NF4View | Reason:
        try:
            return view(module)
        except (Unsupported, AttributeError, TypeError, ValueError) as e:
            return Reason(getattr(e, "code", "NOT_NF4"), str(e).removeprefix("NF4View: "))

    def refuses(module: nn.Module, options: Options) -> Reason | None:
        found = read(module)
        return found if type(found) is Reason and not (found.code == "DTENSOR" and whole_in_calls(module)) else None

    def layout(module: nn.Module) -> str:
        found = read(module)
        return "" if type(found) is Reason else found.layout

    def probe(module: nn.Module) -> Probe:
        found, dtype = view(module), probe_dtype(module)
        K = found.shape[1]
        # On a CPU bitsandbytes repacks its weight for good when the input needs no gradient.
        made = torch.randn(4, K, generator=torch.Generator().manual_seed(0)).to(found.device, dtype).requires_grad_()
        return Probe({x: made}, dtype, K)

    def rehearse(module: nn.Module, sizes: Sizes, options: Options) -> Rehearsed | Reason:
        found = read(module)
        if type(found) is Reason:
            return found
        made = probe(module).given[x].new_zeros(sizes.batch, sizes.tokens, found.shape[1], requires_grad=torch.is_grad_enabled())
        out = run(module, {x: made}, options)
        return out if type(out) is Reason else (out, [made])

    return Host(
        kernels="nf4_linear", takes=(x,), refuses=refuses, obstacle=lambda module: in_the_way(module, None), fused=run, probe=probe, rehearse=rehearse,
        layout=layout, prepare=prepare, **how,
    )  # fmt: skip


def adapter_obstacle(a: nn.Module, b: nn.Module, dropout: nn.Module) -> Reason | None:
    """Why the parts of a LoRA adapter have to be called."""
    if found := plain(a, nn.Linear) or plain(b, nn.Linear):
        return found
    if a.bias is not None:
        return Reason("LORA_BIAS", "the adapter's A has a bias")
    if hooked(dropout) or type(dropout) not in (nn.Identity, nn.Dropout) or rebound(dropout) or getattr(dropout, "inplace", False):
        return Reason("DROPOUT", f"the adapter's dropout is a {type(dropout).__name__}, hooked, or works in place")
    return None


def drops_now(dropout: nn.Module) -> float:
    """The probability with which the adapter's input is zeroed now."""
    return dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
