"""What a host file provides, and what every patched forward does."""

import collections
import contextlib
import copy
import functools
import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor
from torch.nn.modules import module as _nn
from torch.nn.utils.parametrize import is_parametrized

from fastfuse.errors import Unsupported
from fastfuse.modules._hooks import is_hooked
from fastfuse.modules._prepared import PreparedLinear, is_due, is_special
from fastfuse.ops._op import backend_for, check_device, forward_mode, transformed
from fastfuse.quant.nf4 import holds_torchao

Arguments = dict[str, Any]  # the arguments of a call, by the host's names


class Reason(NamedTuple):
    """Why a module, or one call of it, is left to its own forward."""

    code: str  # stable: programs may compare it
    words: str


# Reasons a user asked for, or that follow from one which another module has given: counted, no warning, no error with FASTFUSE_STRICT=1.
EXPECTED = ("ADAPTERS_DISABLED", "MERGED", "NO_ADAPTER", "OUTPUTS", "DENSE_MASK")


class Options(NamedTuple):
    """What patch was asked for, as far as a call needs to know."""

    backend: str = "auto"
    masked_rows: str = "host"
    strict: bool = False

    def named(self) -> str | None:
        """The backend as ops take it: None leaves the choice to fastfuse.backend."""
        return None if self.backend == "auto" else self.backend


class Probe(NamedTuple):
    """Random arguments for verify, and how far two correct results may lie apart: dtype's rounding or fp32 sums of `depth` terms, `steps` times."""

    arguments: Arguments
    dtype: torch.dtype
    depth: int
    steps: int = 1


class Sizes(NamedTuple):
    """Of a call that a warm-up rehearses: text tokens or rows of a linear layer, and what they see."""

    batch: int
    tokens: int
    tiles: int
    tokens_per_tile: int


Rehearsed = tuple[Any, list[Tensor]]  # what came out, and the activations that went in, for their gradients


def nothing(module: nn.Module, *_) -> None:
    return None


def device_of(module: nn.Module) -> torch.device | None:
    return next((p.device for p in module.parameters()), None)


@dataclass(frozen=True, kw_only=True, eq=False)
class Host:
    """How one kind of module is recognised, and what is bound in place of its forward.

    matches: recognises the module by its parts.
    classes: names by which it is recognised even where a part is missing, so that the report can say which.
    written_by: prefix of the modules whose forward this host knows, "" for any; a subclass with a forward of its own is left alone.
    parts: attributes that `fused` reads, dotted.  needs: arguments that its forward must have.
    takes: the arguments that `fused` knows, () for all; another one makes a call run the module's own forward, unless it is None or among `ignores`.
    renamed: a row for each argument whose name the library has changed: all its names, the newest first. Everything else here has the newest one.
    refuses: why the module is not patched at all.  kernels: the op that must have some for the module's device, "" for none.
    obstacle: why its calls would run its own forward as things stand, for the report.
    fused: (module, arguments by name, options) -> what forward returns, or a Reason, before anything has happened, to have the own forward run.
    fallback: (module, arguments by name, options) -> the same by the module's own forward, where that needs more than its arguments.
    as_called: `fused` gets {"args", "kwargs"} in place of names.
    prepare: after a fused call, (module, arguments by name, options) -> what may stand in for the next call of this kind, see modules/_prepared.py; or None.
    layout: of what the op reads.  modules, covers: what it is for, in words, for the table of hosts.
    probe: None where verify has nothing to compare.  corrected: (module, arguments by name) -> its own forward, without a known fault of the host library.
    rehearse: calls the fused ops as a forward of such sizes does, with zeros, for warmup; None where it has none of its own, or nobody knows.
    image: of a vision encoder, how many tiles an image has at most and how many tokens one becomes.  native: the module is fastfuse's own, and fused as it is.
    """

    name: str
    op: str
    matches: Callable[[nn.Module], bool]
    fused: Callable[[nn.Module, Arguments, Options], Any]
    classes: tuple[str, ...] = ()
    written_by: str = ""
    parts: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    renamed: tuple[tuple[str, ...], ...] = ()
    refuses: Callable[[nn.Module, Options], Reason | None] = nothing
    obstacle: Callable[[nn.Module], Reason | None] = nothing
    fallback: Callable[[nn.Module, Arguments, Options], Any] | None = None
    kernels: str = ""
    layout: Callable[[nn.Module], str] = lambda module: ""
    probe: Callable[[nn.Module], Probe | None] = nothing
    corrected: Callable[[nn.Module, Arguments], Any] | None = None
    rehearse: Callable[[nn.Module, Sizes, Options], Rehearsed | Reason | None] = nothing
    image: Callable[[nn.Module], tuple[int, int] | None] = nothing
    modules: str = ""
    covers: str = ""
    native: bool = False
    as_called: bool = False
    prepare: Callable[[nn.Module, Arguments, Options], PreparedLinear | None] | None = None
    _forwards: dict[type, Callable] = field(init=False, repr=False, default_factory=dict)

    def bound(self, module: nn.Module) -> MethodType:
        """What takes the place of the module's forward, under its signature. One function for all modules of a class, so that torch.compile shares graphs."""
        kind = type(module)
        if kind not in self._forwards:

            @functools.wraps(kind.forward)
            def forward(self_, *args, **kwargs):
                if torch.compiler.is_dynamo_compiling():  # torch.compile never sees a prepared call
                    return run(self, self_, args, kwargs)
                try:
                    prepared = self_.__dict__["_fastfuse"].prepared
                except (KeyError, AttributeError):  # unpatched while another wrapper still holds this forward
                    prepared = None
                out = None if prepared is None else prepared(*args, **kwargs)
                return run(self, self_, args, kwargs) if out is None else out

            forward.__name__ = "forward"  # by which a bound method is pickled
            # Code of its own: torch.compile keeps its graphs by code object, eight of them at most.
            forward.__code__ = forward.__code__.replace(co_name=f"forward_of_{kind.__name__}")
            forward._fastfuse = self, forward  # functools.wraps hands marks on: this one is good on its own function alone
            self._forwards[kind] = forward
        return MethodType(self._forwards[kind], module)

    def recognises(self, module: nn.Module) -> bool:
        return self.matches(module) or is_named(module, self.classes, self.written_by)

    def drift(self, module: nn.Module) -> Reason | None:
        """What this host expects of the module's class and does not find."""
        for path in self.parts:
            if _lacks(module, path.split(".")):
                return Reason("STRUCTURE", f"{type(module).__name__} has no {path}: a version that fastfuse does not know")
        accepted, names = inspect.signature(type(module).forward).parameters.keys(), {row[0]: row for row in self.renamed}
        for name in (*self.needs, *self.takes):
            row = names.get(name, (name,))
            if accepted.isdisjoint(row):
                return Reason("SIGNATURE", f"{type(module).__name__}.forward takes no {' or '.join(row)}: a version that fastfuse does not know")
        if self.matches(module):
            return None
        changed = module.__dict__.get("_fastfuse") is not None
        return Reason("CHANGED", "it is not what it was when it was patched") if changed else Reason("STRUCTURE", "it is not built as fastfuse knows it")

    def refused(self, module: nn.Module, options: Options) -> Reason | None:
        """Why the module is not patched."""
        if reason := self.drift(module) or self.refuses(module, options):
            return reason
        device = device_of(module) if self.kernels else None
        if device is not None:
            try:
                check_device(self.kernels, device, options.backend)
            except Unsupported as e:
                return Reason(e.code, str(e))
        return None

    def in_the_way(self, module: nn.Module, options: Options) -> Reason | None:
        """Why the next call of the module would run its own forward."""
        reason = self.refused(module, options) or self.obstacle(module)
        if reason is None or reason.code != "DTENSOR" or not whole_in_calls(module):
            return reason
        with _without_shards(module):
            return self.obstacle(module)


class Names(NamedTuple):
    """How a module's own forward names its arguments, and how its host does: looked up once, when it is patched."""

    positional: tuple[str, ...]  # where positional arguments go, by the host's names
    hosts: dict[str, str]  # a name that a call may use: the host's, where it is another
    own: dict[str, str]  # the host's name: the one that forward has, where it is another
    unknown: tuple[str, ...]  # names of a later version, which this forward does not understand

    @classmethod
    def of(cls, module: nn.Module, renamed: tuple[tuple[str, ...], ...]) -> "Names":
        """A forward is called by the name in its signature and, as libraries rename, by the older ones of the same row."""
        parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
        positional = tuple(p.name for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD)
        known = {p.name for p in parameters}
        hosts, own, unknown = {}, {}, ()
        for row in renamed:
            at = next((i for i, name in enumerate(row) if name in known), 0)
            hosts |= dict.fromkeys(row[max(at, 1) :], row[0])
            own |= {row[0]: row[at]} if at else {}
            unknown += row[:at]
        return cls(tuple(hosts.get(name, name) for name in positional), hosts, own, unknown)

    def read(self, args: tuple, kwargs: Mapping[str, Any]) -> Arguments | Reason:
        """The arguments of a call by the host's names; a Reason where nobody can say which they are."""
        if self.unknown and (later := [name for name in self.unknown if name in kwargs]):
            return Reason("ARGUMENTS", f"called with {later[0]}, which its forward does not know")
        if self.hosts:  # given by two names, the newer one counts, even if it is None
            kwargs = {self.hosts.get(name, name): value for name, value in kwargs.items() if name not in self.hosts or self.hosts[name] not in kwargs}
        named = dict(zip(self.positional, args, strict=False))
        arguments = named | kwargs
        if len(args) > len(self.positional) or len(arguments) < len(named) + len(kwargs):
            return Reason("ARGUMENTS", "called with more arguments than its forward names, or with one twice")
        return arguments


@dataclass
class Record:
    """Kept as `_fastfuse` on a patched module. Pickles as None, so that a saved module loads unpatched, without fastfuse."""

    host: str
    op: str
    options: Options
    slot: str  # the attribute the forward was bound to: "forward", or accelerate's "_old_forward"
    original: Callable | None  # what the instance had there; None where it used its class's forward
    names: Names
    module: nn.Module  # the one that keeps this
    fallbacks: collections.Counter = field(default_factory=collections.Counter)
    prepared: PreparedLinear | None = None
    unprepared: int = 0  # fused calls that went the whole way since a prepared one served

    def prepare(self, host: "Host", module: nn.Module, arguments: Arguments) -> None:
        """After a call that was fused."""
        self.unprepared = 1 if self.prepared is not None and self.prepared.served else self.unprepared + 1
        if is_due(self.unprepared):
            self.prepared = host.prepare(module, arguments, self.options)

    def __deepcopy__(self, memo) -> "Record":
        return Record(self.host, self.op, self.options, self.slot, copy.deepcopy(self.original, memo), self.names, copy.deepcopy(self.module, memo))

    def __reduce__(self):
        return type(None), ()


def _lacks(part: Any, names: list[str]) -> bool:
    """Whether there is no attribute under these names. A parametrization is not run to see what it gives."""
    if is_parametrized(part, names[0]):
        return False
    return not hasattr(part, names[0]) or (len(names) > 1 and _lacks(getattr(part, names[0]), names[1:]))


def run(host: Host, self: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """The body of every patched forward: fused where nothing is in the way, else the module's own forward."""
    record = self.__dict__.get("_fastfuse")
    if record is None:  # unpatched while another wrapper still holds this forward
        return type(self).forward(self, *args, **kwargs)
    if torch.compiler.is_exporting() and record.module is self:
        # A strict export names the modules inside by its way to this one. By the bound method that is "forward.__self__", and torch.export
        # can neither run a program with a constant made below it nor unflatten one; by the record it is a name like any other.
        self = record.module
    read = record.names.read(args, kwargs)
    arguments = {"args": args, "kwargs": kwargs} if host.as_called else read
    out = read if type(read) is Reason else _uncovered(host, record, read)
    if out is None:
        out = host.fused(self, arguments, record.options)
    if type(out) is not Reason:
        if host.prepare is not None and not is_special():
            record.prepare(host, self, arguments)
        return out
    if out.code == "MERGED":  # what is prepared holds the scales of the weight before: an eighth of its bytes
        record.prepared, record.unprepared = None, 0
    fell_back(self, record, out)
    if host.fallback is not None and type(read) is not Reason:
        return host.fallback(self, read, record.options)
    return own_forward(self)(*args, **kwargs)


def _uncovered(host: Host, record: Record, arguments: Arguments) -> Reason | None:
    """What no fused op covers, whatever the module."""
    for name, value in arguments.items() if host.takes else ():
        if not (name in host.takes or name in host.ignores or (value is None and name in record.names.positional)):
            return Reason("ARGUMENTS", f"called with {name}, which the fused op does not know")
    if forward_mode():
        return Reason("FORWARD_AD", "forward-mode differentiation is not covered")
    if transformed():
        return Reason("FUNCTORCH", "torch.func transforms are not covered")
    return Reason("TRACING", "torch.jit.trace is not covered") if torch.jit.is_tracing() else None


def fell_back(self: nn.Module, record: Record, why: Reason) -> None:
    """Count, and say so at the first call of this module for this reason. Raises Unsupported with FASTFUSE_STRICT=1."""
    code, reason = why
    if record.options.strict and code not in EXPECTED:
        raise Unsupported(f"{type(self).__name__} would run its own forward, and FASTFUSE_STRICT is set: {code}: {reason}", code)
    if not torch.compiler.is_compiling():
        if not record.fallbacks[code] and code not in EXPECTED:
            warnings.warn(f"fastfuse: {type(self).__name__} runs its own forward: {code}: {reason}", stacklevel=4)
        record.fallbacks[code] += 1


def own_forward(module: nn.Module) -> Callable:
    """What the module would run had it not been patched."""
    record = module.__dict__.get("_fastfuse")
    if record is not None and record.original is not None:
        return record.original
    return functools.partial(type(module).forward, module)  # torch.compile makes no bound method inside of a graph


def call_own(module: nn.Module, arguments: Mapping[str, Any]) -> Any:
    """own_forward with arguments by the host's names."""
    own = module.__dict__["_fastfuse"].names.own
    return own_forward(module)(**{own.get(name, name): value for name, value in arguments.items()})


def forward_slot(module: nn.Module) -> str:
    """Where the module's own forward is. accelerate's hook wraps what it finds in _old_forward: binding there keeps the hook running."""
    return "_old_forward" if "_hf_hook" in module.__dict__ and "_old_forward" in module.__dict__ else "forward"


def host_of(bound: Any) -> Host | None:
    """The host whose forward this is, None for a forward of anybody else."""
    function = getattr(bound, "__func__", None)
    host, marked = getattr(function, "_fastfuse", (None, None))
    return host if marked is function else None


def bound_host(module: nn.Module) -> Host | None:
    """The host whose forward a call of the module reaches, through accelerate's hook or not."""
    return host_of(module.__dict__.get("forward")) or host_of(module.__dict__.get("_old_forward"))


def foreign_forward(host: Host, module: nn.Module) -> Reason | None:
    """Whether a call would run a forward that neither the host library's own class nor fastfuse has written."""
    own = type(module).forward
    current = module.__dict__.get(forward_slot(module), own)
    if host_of(current) is not None:
        return None
    current = getattr(current, "__func__", current)
    author = getattr(current, "__module__", None) or "an unknown place"
    if current is own and author.startswith(host.written_by):
        return None
    return Reason("FOREIGN_FORWARD", f"the forward of {type(module).__name__} comes from {author}")


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its forward, so that it must be called: accelerate's hooks are forwards of the instance.

    Not where accelerate's does no more than to move the input to the module's device, where the module around it has it already: of a model spread over
    several GPUs every module with weights has such a hook.
    """
    hook = module.__dict__.get("_hf_hook")
    return is_hooked(module) or (hook is not None and (type(hook).__name__ != "AlignDevicesHook" or hook.offload or hook.io_same_device))


def only_asks_for_grad(module: nn.Module) -> bool:
    """Whether all that calling the module does beside its forward is transformers' enable_input_require_grads: its output is made to require a gradient."""
    if not hooked(module) or _nn._has_any_global_hook() or "_hf_hook" in module.__dict__:
        return False
    others = module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    return not others and all(getattr(hook, "__name__", "") == "make_inputs_require_grads" for hook in module._forward_hooks.values())


def plain(module: nn.Module, kind: type[nn.Module], harmless: bool = False) -> Reason | None:
    """Why a child that the op would swallow has to be called instead; None where it is a `kind`, computes as that does, and holds ordinary tensors.

    harmless: its hooks, if any, need not run.
    """
    if hooked(module) and not harmless:
        return Reason("HOOKED", f"a hook on a {kind.__name__} inside must run")
    if type(module) is not kind or rebound(module):
        return Reason("CHILD_TYPE", f"{type(module).__name__} in place of a plain {kind.__name__}")
    return plain_tensors(*module._parameters.values())


def rebound(module: nn.Module) -> bool:
    """Whether the instance has a forward of its own, or under accelerate's hook had one before it."""
    own = module.__dict__.get(forward_slot(module))
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


def convolution(conv: nn.Module) -> Reason | None:
    """Why its product cannot be the op's; None where it maps patches that lie side by side by one matrix."""
    if reason := plain(conv, nn.Conv2d, only_asks_for_grad(conv)):
        return reason
    if conv.stride != tuple(conv.weight.shape[2:]) or conv.padding not in ("valid", (0, 0)) or conv.dilation != (1, 1) or conv.groups != 1:
        return Reason("GEOMETRY", f"its patches overlap or leave gaps: kernel {conv.kernel_size}, stride {conv.stride}, padding {conv.padding}")
    return None


def asking_for_grad(out: Tensor, *swallowed: nn.Module) -> Tensor:
    """out, made to require a gradient where a hook on what the op swallows does no more than that."""
    if any(map(only_asks_for_grad, swallowed)) and torch.is_grad_enabled() and not out.requires_grad:
        out.requires_grad_()
    return out


def patches_in(pixels: Tensor, conv: nn.Conv2d) -> int:
    (h, w), (H, W) = conv.weight.shape[2:], pixels.shape[-2:]
    return H // h * (W // w)


def whole_patches(pixels: Tensor, conv: nn.Conv2d) -> Tensor:
    """Without what is left over at the edges, as the convolution: SigLIP's 384 pixels are 27 patches of 14 and a rest."""
    (h, w), (H, W) = conv.weight.shape[2:], pixels.shape[-2:]
    return pixels[..., : H // h * h, : W // w * w]


def parameter(module: nn.Module, name: str) -> Tensor | None:
    """The parameter itself: not what a parametrization, or a scripted module, makes of the attribute."""
    held = module.__dict__.get("_parameters")
    return held.get(name) if isinstance(held, dict) else None


def library_module(module: nn.Module, written_by: str) -> ModuleType:
    """Where the library has written the class: a subclass, a parametrization, FSDP and replicate make one of another module."""
    return sys.modules[next(c.__module__ for c in type(module).__mro__ if c.__module__.startswith(written_by))]


def is_named(module: nn.Module, names: tuple[str, ...], written_by: str) -> bool:
    """Whether its class, or one that it derives from, has one of the names and is from there."""
    return any(c.__name__ in names and c.__module__.startswith(written_by) for c in type(module).__mro__)


def plain_tensors(*tensors: Tensor | None) -> Reason | None:
    """Why the op cannot read these in place; None where they are ordinary tensors."""
    for t in tensors:
        if t is not None and hasattr(t, "device_mesh"):
            return Reason("DTENSOR", "a weight is sharded (DTensor): the op would see one shard")
        if t is not None and type(t) not in (nn.Parameter, Tensor, FakeTensor):
            return Reason("TENSOR_TYPE", f"a weight is a {type(t).__name__}")
    return None


def whole_in_calls(module: nn.Module) -> bool:
    """Whether what is sharded of the module is so between calls alone: FSDP2 puts whole parameters in place before it runs.

    PyTorch offers no way to ask. FSDP2 leaves a hook of its own on each module whose parameter it shards. Both names are private: should they change,
    the answer is no. For patch and the report alone: a call looks at what it finds.
    """
    sharded = (m for m in module.modules() if any(hasattr(p, "device_mesh") for p in m._parameters.values()))
    hooks = (getattr(m, "_load_state_dict_post_hooks", {}).values() for m in sharded)
    return all(any(getattr(hook, "__qualname__", "").startswith("FSDPParam.") for hook in of_one) for of_one in hooks)


@contextlib.contextmanager
def _without_shards(module: nn.Module) -> Iterator[None]:
    """Whole parameters without values in place of the sharded ones, to find what else stands in the way. NF4 weights stay: no obstacle reads them."""
    held = [(m._parameters, name, p) for m in module.modules() for name, p in m._parameters.items() if hasattr(p, "device_mesh") and not holds_torchao(p)]
    try:
        for parameters, name, p in held:
            parameters[name] = nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta"), requires_grad=False)
        yield
    finally:
        for parameters, name, p in held:
            parameters[name] = p


def runs_on(module: nn.Module, options: Options) -> str:
    """What serves a module where it is, in words; "" where it has no tensors of its own."""
    device = device_of(module)
    return "" if device is None else backend_for(device, options.backend)


def random_like(t: Tensor, *shapes: tuple[int, ...]) -> list[Tensor]:
    """A tensor of each shape, on t's device in its dtype: the same ones every time, nobody's generator is asked."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator).to(t.device, t.dtype) for shape in shapes]
