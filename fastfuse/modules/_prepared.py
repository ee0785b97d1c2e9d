"""A linear layer's next call, prepared by the last one: what has to be as it was then, and the launch.

A module's own checks remain the only truth. They take longer than the launch: so after a call that passed them, what they looked at is kept, by identity where it
is an object of Python's and by its kind where it is a tensor, and a call that finds all of it unchanged launches. Any other goes the whole way again.
Neither results nor addresses are kept, nor the weight: an old one would stay in memory when an adapter is merged.
"""

from collections.abc import Callable
from operator import attrgetter, is_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn

from fastfuse import tune
from fastfuse.kernels.arguments import NF4Weight, Operand
from fastfuse.ops import _op
from fastfuse.ops._fused_op import _misaligned, _new, leaves
from fastfuse.ops._linear_group import LinearArgs, factor_of
from fastfuse.ops.lora_row_norms import RowNormsArgs, row_norms
from fastfuse.ops.nf4_linear import linear
from fastfuse.quant.nf4 import Layout, NF4View

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_nn, name) for name in vars(_nn) if name.startswith("_global_") and isinstance(getattr(_nn, name), dict))
_requires_grad = attrgetter("requires_grad")
try:
    from torch._C._dynamo.guards import TensorGuards
except ImportError:  # private: without them every call compares by alike()
    TensorGuards = None
_C, _forward_ad = torch._C, torch.autograd.forward_ad
_SHAPES = 64  # of x, that a layer keeps a plan for


class Watch:
    """What must be as it was: entries of dicts (those of modules' attributes, mostly) the same objects, containers empty, children's classes and their forwards."""

    def __init__(self):
        self.holders: list[dict] = []
        self.keys: list[str] = []
        self.empty: list = list(_GLOBAL_HOOKS)
        self.children: list[tuple[nn.Module, type, Callable]] = []

    def same(self, holder: dict, *keys: str) -> None:
        self.holders += [holder] * len(keys)
        self.keys += keys

    def child(self, module: nn.Module) -> None:
        """A module that is read and not called: nothing may run when it is."""
        state = module.__dict__
        self.same(state, "_parameters", "_modules", "forward", "_hf_hook", "_old_forward", *_HOOKS)
        self.empty += [state[name] for name in _HOOKS]
        self.children.append((module, type(module), type(module).forward))
        if (hook := state.get("_hf_hook")) is not None:
            self.same(hook.__dict__, "offload", "io_same_device")


def is_special() -> bool:
    """Whether calls go another way for now: nothing that ordinary ones would do is learned from them."""
    if torch.compiler.is_compiling() or _op.launch_interceptor is not None or _op._backend != "auto" or tune._pinned or tune._assumed:
        return True
    watched = _C._len_torch_dispatch_stack() or _C._len_torch_function_stack() or _C._autograd._profiler_enabled()
    return bool(watched or _C._is_any_autocast_enabled())


def is_due(calls: int) -> bool:
    """Whether to prepare after this many calls that went the whole way since a prepared one served: the first, 2nd, 4th ... 32nd, and every 32nd then."""
    return calls & min(calls - 1, 31) == 0


def read_torchao(parameters: dict[str, Tensor | None], view: NF4View) -> Callable[[], list[Tensor] | None]:
    """Reads the tensors of the NF4Tensor under "weight", in an NF4Weight's order: None where it is of another shape, layout or class."""
    kind, alike = type(parameters["weight"]), (view.shape, (view.shape[1], 1), view.block_size, view.scale_block)

    def weight() -> list[Tensor] | None:
        held = parameters["weight"]
        if type(held) is not kind or (held.shape, held.stride(), held.block_size, held.scaler_block_size) != alike:
            return None
        return [held.quantized_data, held.nf4, held.quantized_scalers, held.quantization_factor, held.scaler_mean]

    return weight


def dora_factor(magnitude: Tensor, a: Tensor, b: Tensor, scaling: float, view: NF4View) -> Callable[[NF4Weight, Tensor], Tensor]:
    """Makes magnitude / ||W + scaling B A||, W decoded in x's dtype, at every call."""
    layout, shape = Layout.of(view), view.shape

    def factor(weight: NF4Weight, x: Tensor) -> Tensor:
        # no gradient flows through the norm, and autograd would keep W + scaling B A of it
        norms = row_norms(RowNormsArgs(weight, layout, shape, x.dtype, a.detach(), b.detach(), scaling, False))[0]
        return factor_of(magnitude, norms)

    return factor


def _kind(t: Tensor) -> tuple:
    return type(t), t.dtype, t.shape, t.device, t.is_contiguous(), t.is_neg() or t._is_zerotensor()


class PreparedLinear:
    """prepared(x) -> y of an NF4 layer, or None where something is not as it was, or somebody would see the call pass by."""

    def __init__(
        self,
        watch: Watch,
        x: Tensor,
        view: NF4View,
        weight: Callable[[], list[Tensor] | None],
        a: Tensor | None = None,
        b: Tensor | None = None,
        scaling: float = 1.0,
        bias: Tensor | None = None,
        factor: Callable[[NF4Weight, Tensor], Tensor] | None = None,
        active: tuple[dict, object] | None = None,
    ):
        """weight: the tensors of an NF4Weight in order, read anew; None where it is another one.  factor: (weight, x) -> what DoRA multiplies by, made at every
        call.  active: a module's __dict__, and what its _active_adapter must be equal to: it may be a list, which can be changed in place."""
        self.weight, self.factor, self.active = weight, factor, active
        self.holders, self.keys, self.values = watch.holders, watch.keys, [*map(dict.get, watch.holders, watch.keys)]
        self.empty, self.children = watch.empty, watch.children
        self.a, self.b, self.bias, self.scaling = a, b, bias, scaling
        self.others = [t for t in (a, b, bias) if t is not None]
        self.scales = type(view.tensors().scales)
        self.N, self.K = view.shape
        self.R, self.layout = 0 if a is None else a.shape[0], Layout.of(view)
        self.dtype, self.device, self.autocast = x.dtype, x.device, x.device.type
        with _C.DisableTorchFunctionSubclass():
            held = weight()
            self.kinds = [*map(_kind, (*held, *self.others))]
            tree = self.tree(held)
        self.by_launch = x.device.type == "cuda"
        ones = None if factor is None else torch.empty(self.N, dtype=torch.float32, device="meta")
        self.constants, self.keeping = (leaves(self.args(x, tree, ones, keep))[1] for keep in (False, True))
        self.guards: dict[tuple, TensorGuards] = {}
        self.plans: dict[tuple, Callable] = {}
        self.launches: dict[tuple, Callable | None] = {}
        self.served = False

    def tree(self, held: list[Tensor]) -> NF4Weight:
        """Plain tensors of what weight() gives: bitsandbytes' codes are a Parameter of its own kind, of any shape and dtype."""
        packed = held[0]
        if type(packed) is not Tensor:
            packed = packed.detach().view(-1)
            if packed.dtype is not torch.uint8:
                packed = packed.view(torch.uint8)
        return _new(NF4Weight, (packed, held[1], _new(self.scales, held[2:])))

    def args(self, x: Tensor, weight: NF4Weight, factor: Tensor | None, keep: bool) -> LinearArgs:
        operand = _new(Operand, (weight, self.a, self.b, factor, self.bias, None, None, self.N, self.R, self.scaling))
        return _new(LinearArgs, (x, (operand,), self.layout, self.K, None, 0.0, keep, False))

    def alike(self, key: tuple, tensors: list[Tensor]) -> bool:
        """Whether the tensors of a call, x first, are as they were. PyTorch's own guards compare in one call what takes eight for each tensor here; they tell
        apart more than this does (who asks for a gradient, inference mode), so for each such case they are made anew."""
        x = tensors[0]
        if x.dtype is not self.dtype or x.device != self.device or x.layout is not torch.strided or x.shape[-1:] != (self.K,):
            return False
        if self.factor is not None and x.dim() == 1:  # PEFT's DoRA gives a vector another dimension
            return False
        kinds = [*map(_kind, tensors)]
        if kinds[1:] != self.kinds or any(kind[4:] != (True, False) for kind in kinds):
            return False
        if len(self.guards) >= _SHAPES or len(self.plans) >= _SHAPES:
            for kept in (self.guards, self.plans, self.launches):
                kept.clear()
        if TensorGuards is None:
            return True
        self.guards[key] = TensorGuards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None)
        return True

    def __call__(self, x: Tensor = None, *args, **kwargs) -> Tensor | None:
        # Whoever looks on is asked for before x is touched: a mode of functions would see that.
        if _C._len_torch_function_stack() or _C._len_torch_dispatch_stack() or _C._get_tracing_state() is not None or _C._autograd._profiler_enabled():
            return None
        if _forward_ad._current_level >= 0 or _C._functorch.peek_interpreter_stack() is not None or torch.is_autocast_enabled(self.autocast):
            return None
        if _op.launch_interceptor is not None or _op._backend != "auto" or tune._pinned or tune._assumed or torch.compiler._is_compiling_flag:
            return None
        if args or kwargs or type(x) is not Tensor or x.is_nested or not all(map(is_, map(dict.get, self.holders, self.keys), self.values)) or any(self.empty):
            return None
        if self.active is not None and self.active[0]["_active_adapter"] != self.active[1]:
            return None
        for child, kind, forward in self.children:
            if type(child) is not kind or kind.forward is not forward:
                return None
        shape, may_record = x.shape, torch.is_grad_enabled()
        with _C.DisableTorchFunctionSubclass():
            held = self.weight()
            if held is None:
                return None
            tensors = [x, *held, *self.others]
            guards = self.guards.get(key := (shape, may_record, x.requires_grad))
            if (guards is None or not guards.check(*tensors)) and not self.alike(key, tensors):
                return None
            addresses = (*map(Tensor.data_ptr, tensors),)
            if any(map(_misaligned, addresses)) or (self.by_launch and self.device.index not in (None, _C._cuda_getDevice())):
                return None
            records = may_record and (self.factor is not None or True in map(_requires_grad, tensors))
            if not records and (launch := self.launches.get(shape)) is not None and (y := launch(x, addresses)) is not None:
                self.served = True
                return y
            weight = self.tree(held)
        return self.by_plan(x, weight, records)

    def by_plan(self, x: Tensor, weight: NF4Weight, records: bool) -> Tensor | None:
        factor, keep, constants = None, False, self.constants
        tensors = [x, weight.packed, weight.code, *weight.scales, *self.others]
        if self.factor is not None:
            factor = self.factor(weight, x)
            if factor.dtype is not torch.float32 or factor.shape != (self.N,):
                return None
            tensors.insert(len(tensors) - (self.bias is not None), factor)
            if factor.requires_grad:
                keep, constants = True, self.keeping
        self.served = True
        args, plan = self.args(x, weight, factor, keep), linear.cpu
        if self.by_launch and (plan := self.plans.get((x.shape, keep))) is None:
            plan = self.plans[x.shape, keep] = linear.launch.planned((args,), tensors, constants)
            self.launches[x.shape] = getattr(plan, "at_addresses", None) if factor is None else None
        if records and True in map(_requires_grad, tensors):
            return linear.differentiable(plan, args, tensors, constants)[0]
        return plan(args)[0]


class Prepares:
    """A module of fastfuse's over an NF4Tensor that keeps its next call."""

    _prepared: PreparedLinear | None = None
    _unprepared = 0  # calls that went the whole way since a prepared one served

    def __getstate__(self) -> dict:
        """Without what is prepared: it would serve a copy with what the module itself holds."""
        return {name: held for name, held in self.__dict__.items() if name != "_prepared"}

    def _prepare(self, x: Tensor, scaling: float = 1.0, factor: Callable[[NF4Weight, Tensor], Tensor] | None = None, children: tuple[str, ...] = ()) -> None:
        """After a fused call. children: what the forward reads in place of calling it: lora_a, lora_b and the like."""
        if is_special() or type(x) is not Tensor or x.is_meta or _op.route("nf4_linear", x, None) != "op":
            return
        self._unprepared = 1 if self._prepared is not None and self._prepared.served else self._unprepared + 1
        if not is_due(self._unprepared):
            return
        watch, state, parameters, view = Watch(), self.__dict__, self._parameters, NF4View.of(self.weight)
        watch.same(parameters, "bias")
        watch.same(state, "disabled", "alpha", "rank", "scaling")
        watch.same(self._modules, *children)
        for name in children:
            child = self._modules[name]
            watch.child(child)
            watch.same(child.__dict__, "training", "p")
            watch.same(child._parameters, "weight", "bias")
        a, b = (self.lora_a.weight, self.lora_b.weight) if children else (None, None)
        state["_prepared"] = PreparedLinear(watch, x, view, read_torchao(parameters, view), a, b, scaling, parameters["bias"], factor)
