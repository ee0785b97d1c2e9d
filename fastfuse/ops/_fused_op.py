"""Ops over trees: a NamedTuple of arguments, in which nested tuples hold the tensors, goes through registration, launch, reference and backward as it is."""

import ast
import functools
import operator
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, compress
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from fastfuse import tune
from fastfuse.kernels import arguments
from fastfuse.kernels.arguments import NF4Weight
from fastfuse.ops import _op

_PLAIN = {Tensor, Parameter}
_PLANS = 1024  # of an op: one for every kind of arguments, mostly a token count
_nodes = {kind.__name__: kind for kind in vars(arguments).values() if isinstance(kind, type) and issubclass(kind, tuple)}
_TUPLES = {tuple, *_nodes.values()}
_new = tuple.__new__  # a NamedTuple's own constructor is a Python call more
_SCALARS = {int, float, bool, str, type(None), torch.dtype, torch.SymInt}
_kind, _requires_grad = attrgetter("shape", "dtype", "device"), attrgetter("requires_grad")


def fused_op(
    name: str,
    Args: type,
    *nodes: type,
    reference: Callable,
    launch: Callable,
    cpu: Callable | None = None,
) -> "FusedOp":
    """Register torch.ops.fastfuse.<name>, an opaque op for autograd and torch.compile, and return it as a function of one Args.

    Args: a NamedTuple class. Its fields, and those of the NamedTuples among them (`nodes` names those that kernels/arguments.py does not), hold tensors, None,
    numbers, bools, dtypes, or tuples of all that. A field `interpret` sends a CPU call through the launcher, in Triton's interpreter.
    reference: (args) -> tuple of tensors, eager. It is the CPU implementation too, unless `cpu` is a faster one, the fake kernel that torch.compile traces, and the
    truth the tests compare with.
    launch: (args) -> plan, decided by shapes, strides, dtypes, devices and everything that is no tensor; plan(args) -> tuple of tensors, for all arguments
    that are alike in these.
    """
    return FusedOp(name, Args, nodes, reference, launch, cpu or reference)


class Planned:
    """A function of tensors and constants in two steps: plan(*args), by shapes, strides, dtypes, devices and constants alone, gives what launches for all
    arguments like these; it is kept for the next call."""

    def __init__(self, plan: Callable):
        self.plan, self.kept = plan, {}
        functools.update_wrapper(self, plan)

    def __call__(self, *args) -> Any:
        return self.run(args, *leaves(args))

    def run(self, args: tuple, tensors: Sequence[Tensor], constants: tuple) -> Any:
        # A misaligned tensor needs another compiled kernel; what is pinned or collected must leave nothing behind.
        if _op.INTERPRET or _op.launch_interceptor is not None or tune._pinned or tune._assumed or any(map(_misaligned, map(Tensor.data_ptr, tensors))):
            return self.plan(*args)(*args)
        key = (constants, *map(_kind, tensors), *map(Tensor.stride, tensors))
        try:
            run = self.kept[key]
        except KeyError:
            run = self._planned(key, args)
        return run(*args)

    def planned(self, args: tuple, tensors: Sequence[Tensor], constants: tuple) -> Callable:
        """What launches for arguments like these, which are aligned."""
        key = (constants, *map(_kind, tensors), *map(Tensor.stride, tensors))
        return self.kept.get(key) or self._planned(key, args)

    def _planned(self, key: tuple, args: tuple) -> Callable:
        if len(self.kept) >= _PLANS:
            self.kept.clear()
        return self.kept.setdefault(key, self.plan(*args))


class FusedOp:
    """Eager calls reach past the dispatcher: its way there and back, which torch.compile, modes and tracers need, takes 0.5 ms of Python with gradients."""

    def __init__(self, name: str, Args: type, nodes: tuple[type, ...], reference: Callable, launch: Callable, cpu: Callable):
        _nodes.update((kind.__name__, kind) for kind in (Args, *nodes))
        _TUPLES.update((Args, *nodes))
        self.name, self.reference, self.cpu, self.launch = name, reference, cpu, Planned(launch)
        self.backward = self.saved = self._function = None
        self.kept: dict[tuple, _Kept] = {}

        def kernel(tensors: Sequence[Tensor], sizes: Sequence[int], spec: str) -> list[Tensor]:
            return list(self.run(decoded(tensors, sizes, spec), tensors, (spec, *sizes)))

        def fake(tensors: Sequence[Tensor], sizes: Sequence[int], spec: str) -> list[Tensor]:
            return list(reference(decoded(tensors, sizes, spec)))

        op = torch.library.custom_op(f"fastfuse::{name}", kernel, mutates_args=(), device_types=("cuda", "cpu"))
        op.register_fake(fake)
        self._op, self.overload = op, op._opoverload

    def register_backward(self, backward: Callable, saved: Callable | None = None) -> None:
        """backward: (args, outs, grads, needs) -> Args with gradients in the tensors' places, None for what has none; whole branches may be None.

        grads: those of outs, None for one that took no part.  needs: args with a bool in the place of each tensor, None elsewhere.
        saved: (args, outs, needs) -> (args, outs), with None for what backward does not read.
        """
        self.backward, self.saved = backward, saved or (lambda args, outs, needs: (args, outs))
        self._function = _autograd_function(self)
        self._op.register_autograd(functools.partial(_registered_backward, self), setup_context=functools.partial(_setup_context, self))

    def __call__(self, args: tuple) -> tuple[Tensor, ...]:
        if torch.compiler.is_dynamo_compiling() or torch.compiler._is_compiling_flag:
            return tuple(self.overload(*encoded(args)))
        if _thread.inside:
            return self.launch.run((args,), *leaves(args)) if _thread.inside == "cuda" or args.interpret else self.cpu(args)
        tensors, constants = leaves(args)
        if not is_eager(tensors):
            return tuple(self.overload(*encoded(args)))
        if self._function is not None and torch.is_grad_enabled() and any(map(_requires_grad, tensors)):
            return self.differentiable(None, args, tensors, constants)
        return self.run(args, tensors, constants)

    def differentiable(self, plan: Callable | None, args: tuple, tensors: Sequence[Tensor], constants: tuple) -> tuple[Tensor, ...]:
        """With gradients. plan: what gives the results, where the caller knows."""
        needed = (*map(_requires_grad, tensors),)
        return self._function.apply((plan, args, constants, tensors, needed), *compress(tensors, needed))  # an argument of apply is two calls

    def run(self, args: tuple, tensors: Sequence[Tensor], constants: tuple) -> tuple[Tensor, ...]:
        """The op itself, whoever calls: no autograd, no dispatcher. constants: what args holds beside `tensors`, hashable."""
        device = tensors[0].device
        kind = device.type
        if kind != "meta" and torch.is_autocast_enabled(kind):  # dtypes were settled by the public function
            with torch.autocast(kind, enabled=False):
                return self.run(args, tensors, constants)
        if _op.launch_interceptor is not None:
            return _op.launch_interceptor(self._launched_once, (args,))
        if kind == "cpu" and not args.interpret:
            return self.cpu(args)
        if kind == "cuda" and device.index not in (None, torch._C._cuda_getDevice()):  # Triton launches on the current device
            with torch.cuda.device(device):
                return self.launch.run((args,), tensors, constants)
        return self.launch.run((args,), tensors, constants)

    def _launched_once(self, args: tuple) -> tuple[Tensor, ...]:
        return self.launch.plan(args)(args)


_misaligned = (15).__and__


_ask = types.BuiltinFunctionType.__call__
_WATCHERS = (
    torch._C._len_torch_dispatch_stack,
    torch._C._len_torch_function_stack,
    torch._C._get_tracing_state,
    torch._C._autograd._profiler_enabled,
    torch._C._functorch.peek_interpreter_stack,
)
_WATCHERS_AND_AUTOCAST = (*_WATCHERS, torch._C._is_any_autocast_enabled)


def is_eager(tensors: Sequence[Tensor], watchers: tuple[Callable, ...] = _WATCHERS) -> bool:
    """Whether nobody would see an op go by: plain tensors on a device with kernels, no mode, transform, tracer or profiler."""
    for t in tensors:
        if type(t) not in _PLAIN:
            return False
    # One call of Python's, in which C asks C; tensors last, as a mode would see it. Of negative and zero tensors the dispatcher would negate or fill in values.
    if any(chain(map(_ask, watchers), map(Tensor.is_neg, tensors), map(Tensor._is_zerotensor, tensors))) or torch.autograd.forward_ad._current_level >= 0:
        return False
    for t in tensors:  # noqa: SIM110  all() would be two Python calls more
        if t.device.type not in ("cuda", "cpu") and not (t.is_meta and _op.launch_interceptor is not None):
            return False
    return True


def signature(tensors: Sequence[Tensor], constants: tuple) -> tuple | None:
    """The key under which a public function finds in a dict of remember() what its op runs: all that the function's checks and the op's plan depend on.

    tensors, constants: the function's arguments, as they came. None where the call has to go the ordinary way: for autocast, modes, tracers, transforms,
    arguments of other kinds, misaligned ones, pinned tiles, another device than the current one.
    """
    if (
        torch.compiler.is_dynamo_compiling()
        or torch.compiler._is_compiling_flag
        or _op.launch_interceptor is not None
        or tune._pinned
        or tune._assumed is not None
    ):
        return None
    if not is_eager(tensors, _WATCHERS_AND_AUTOCAST):
        return None
    for c in constants:
        if type(c) not in _SCALARS:
            return None
    for past in map(_misaligned, map(Tensor.data_ptr, tensors)):
        if past:
            return None
    device = tensors[0].device
    if device.type == "cuda" and device.index not in (None, torch._C._cuda_getDevice()):
        return None
    needs_grad = True in map(_requires_grad, tensors) and torch.is_grad_enabled()
    return needs_grad, _op._backend, *constants, *map(_kind, tensors), *map(Tensor.stride, tensors)


def remember(signatures: dict, key: tuple | None, op: "FusedOp", args: tuple) -> None:
    """Keep by its signature what serves a call that has passed its checks, of which the op's `args` were made: a function of such args."""
    if key is None or args.interpret:
        return
    tensors, constants = leaves(args)
    if key[0]:
        run = op
    elif tensors[0].device.type == "cpu":
        run = op.cpu
    else:
        run = op.launch.kept.get((constants, *map(_kind, tensors), *map(Tensor.stride, tensors)))
    if run is not None:
        if len(signatures) >= _PLANS:
            signatures.clear()
        signatures[key] = run


def is_at_home(device: torch.device) -> bool:
    """Whether a launcher may run as things are: on the current device, without autocast, with nobody in its place."""
    if _op.launch_interceptor is not None or device.type not in ("cuda", "cpu") or torch.is_autocast_enabled(device.type):
        return False
    return device.type != "cuda" or device.index in (None, torch._C._cuda_getDevice())


def leaves(tree: tuple) -> tuple[list[Tensor], tuple]:
    """The tensors of a tree in order, and what else it holds, with the kinds of its nodes: hashable."""
    tensors, constants = [], (type(tree),)
    for node in tree:
        kind = type(node)
        if kind in _SCALARS:
            constants += (node,)
        elif kind in _TUPLES:
            more, inner = leaves(node)
            tensors += more
            constants += (inner,)
        else:  # a tensor, of a subclass perhaps
            tensors += (node,)
            constants += (Tensor,)
    return tensors, constants


def _autograd_function(op: FusedOp) -> type[torch.autograd.Function]:
    def forward(ctx, call, *_):
        plan, args, constants, tensors, needed = call
        outs = op.run(args, tensors, constants) if plan is None else plan(args)
        _keep(ctx, op, args, constants, outs, tensors, needed)
        return outs

    def backward(ctx, *grads):
        return None, *compress(_backward(ctx, op, grads), ctx.kept.needed)

    members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(f"fastfuse_{op.name}", (torch.autograd.Function,), members)


def _setup_context(op: FusedOp, ctx, inputs: tuple, output: Sequence[Tensor]) -> None:
    args, tensors = decoded(*inputs), tuple(inputs[0])
    _keep(ctx, op, args, leaves(args)[1], tuple(output), tensors, tuple([t.requires_grad for t in tensors]))


def _registered_backward(op: FusedOp, ctx, grads: Sequence[Tensor | None]) -> tuple:
    return list(_backward(ctx, op, tuple(grads))), None, None


def _keep(ctx, op: FusedOp, args: tuple, constants: tuple, outs: tuple, tensors: tuple, needed: tuple[bool, ...]) -> None:
    """Keeps on ctx what the backward reads: as saved tensors, but for frozen weights. Hooks that carry saved tensors to the host and back, as
    activation offloading does, would carry the whole 4-bit base of a model: 6 bytes for every one of activations."""
    ctx.set_materialize_grads(False)
    key = constants, needed, (*map(type, tensors),)
    try:
        kept = op.kept[key]
    except KeyError:
        if len(op.kept) >= _PLANS:
            op.kept.clear()
        kept = _Kept(op, args, outs, tensors, needed)
        if len({*map(id, (*tensors, *outs))}) == len(tensors) + len(
            outs
        ):  # where one tensor is two arguments, what is kept would take the first for both in other calls too
            op.kept[key] = kept
    except TypeError:  # symbols, which torch.compile has for whole numbers, have no hash
        kept = _Kept(op, args, outs, tensors, needed)
    all_of_them = (*tensors, *outs)
    if kept.adds:  # op.saved makes a tensor
        all_of_them = (*all_of_them, *_added(op.saved(args, outs, kept.needs), all_of_them))
    ctx.kept, ctx.frozen = kept, frozen = kept, kept.frozen(all_of_them)
    try:
        ctx.versions = [*map(_version, frozen)]
    except RuntimeError:  # tensors of inference mode have none
        ctx.versions = None
    ctx.save_for_backward(*kept.saved(all_of_them))


def _backward(ctx, op: FusedOp, grads: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """The gradients of the op's tensors, in order."""
    kept, frozen = ctx.kept, ctx.frozen
    if ctx.versions is not None and [*map(_version, frozen)] != ctx.versions:
        raise RuntimeError(f"{op.name}: a frozen weight was changed in place between a forward and its backward")
    args, outs = kept.build(ctx.saved_tensors, frozen)
    given = [*filter(_is_given, grads)]
    found = None
    if given and not torch.is_grad_enabled() and is_eager(given) and is_at_home(given[0].device):
        _thread.inside = given[0].device.type  # the ops that the formula calls need not ask again, nor record anything
        try:
            found = op.backward(args, outs, grads, kept.needs)
        finally:
            _thread.inside = ""
    elif given:
        found = op.backward(args, outs, grads, kept.needs)
    flat = ()
    for path in kept.paths:
        node = found
        for at in path:
            node = node if node is None else node[at]
        flat += (node,)
    return flat


class _Thread(threading.local):
    inside = ""  # the type of device of a backward that nobody sees and nobody differentiates


_thread = _Thread()
_is_given = functools.partial(operator.is_not, None)


_version = attrgetter("_version")


class _Kept:
    """Which of an op's tensors its backward reads, for all calls of one kind, and how the trees are made of them again.

    saved, frozen: (arguments and results in order) -> those that autograd saves, and the weights that it need not.  needs: args with a bool in each tensor's
    place, None elsewhere.  build: (saved, frozen) -> (args, outs) as op.saved gives them.
    """

    def __init__(self, op: FusedOp, args: tuple, outs: tuple, tensors: tuple[Tensor, ...], needed: tuple[bool, ...]):
        names: dict[str, Any] = {"_new": _new}
        self.needed = needed
        flags = iter(needed)
        self.needs = eval(_source(args, names, lambda t, of_weight: str(next(flags)), constants=False), names)
        self.paths = [*_paths(args)]
        tree, held = op.saved(args, outs, self.needs), [*tensors, *outs]
        added = _added(tree, held)
        self.adds, places, saved, frozen = bool(added), [*map(id, [*held, *added])], [], []

        def name(t: Tensor, of_weight: bool) -> str:
            kept = frozen if of_weight or (type(t) is Parameter and not t.requires_grad) else saved
            kept.append(places.index(id(t)))
            return f"{'frozen' if kept is frozen else 'saved'}[{len(kept) - 1}]"

        self.build = eval(f"lambda saved, frozen: {_source(tree, names, name)}", names)
        self.saved, self.frozen = _getter(saved), _getter(frozen)


def _paths(tree: tuple) -> Iterator[tuple[int, ...]]:
    """The indices that lead to each tensor."""
    for i, node in enumerate(tree):
        if isinstance(node, Tensor):
            yield (i,)
        elif isinstance(node, tuple):
            yield from ((i, *path) for path in _paths(node))


def _added(tree: tuple, held: Sequence[Tensor]) -> list[Tensor]:
    known = {*map(id, held)}
    return [t for t in leaves(tree)[0] if id(t) not in known]


def _getter(places: list[int]) -> Callable[[tuple], tuple]:
    """Takes the elements at these places."""
    if len(places) < 2:  # itemgetter of one gives no tuple
        return lambda elements: tuple([elements[i] for i in places])
    return itemgetter(*places)


def _source(node: Any, names: dict[str, Any], name: Callable[[Tensor, bool], str], constants: bool = True, of_weight: bool = False) -> str:
    """An expression that makes the tree: name(tensor, whether it belongs to an NF4 weight) for its tensors, None in place of its constants or not."""
    if isinstance(node, Tensor):
        return name(node, of_weight)
    if not isinstance(node, tuple):
        names[constant := f"_{len(names)}"] = node
        return constant if constants else "None"
    of_weight = of_weight or isinstance(node, NF4Weight)
    inner = "".join([f"{_source(child, names, name, constants, of_weight)}, " for child in node])
    names[kind := f"_{len(names)}"] = type(node)
    return f"({inner})" if type(node) is tuple else f"_new({kind}, ({inner}))"


def encoded(tree: tuple) -> tuple[list[Tensor], list[int], str]:
    """A tree as the schema's (Tensor[] tensors, SymInt[] sizes, str spec).

    Whole numbers travel apart, as torch.compile may have symbols for them. No list is ever empty: AOTInductor hands an op None for one that is.
    """
    tensors, sizes = [], [0]
    return tensors, sizes, _written(tree, tensors, sizes)


def _written(node: Any, tensors: list, sizes: list) -> str:
    if isinstance(node, Tensor):
        tensors.append(node)
        return "'t'"
    if isinstance(node, tuple):
        inner = "".join([_written(child, tensors, sizes) + "," for child in node])
        return f"('{type(node).__name__}',{inner})"
    if isinstance(node, torch.dtype):
        return f"'{node}'"
    if isinstance(node, str):
        return f"'={node}'"
    if node is None or isinstance(node, (bool, float)):
        return repr(node)
    sizes.append(node)
    return "'n'"


def decoded(tensors: Sequence[Tensor], sizes: Sequence[int], spec: str) -> tuple:
    """What encoded() is of."""
    return _read(_parsed(spec), iter(tensors), iter(sizes[1:]))


_parsed = functools.lru_cache(maxsize=4096)(ast.literal_eval)


def _read(node: Any, tensors: Iterator, sizes: Iterator) -> Any:
    if isinstance(node, tuple):
        kind, *children = node
        return _new(_nodes.get(kind, tuple), [_read(child, tensors, sizes) for child in children])
    if not isinstance(node, str):
        return node
    if node == "t":
        return next(tensors)
    if node == "n":
        return next(sizes)
    return node[1:] if node[0] == "=" else getattr(torch, node.removeprefix("torch."))
