"""A linear layer's next call, prepared by the last one: what has to be as it was then, and the launch.

A module's own checks remain the only truth. They take longer than the launch: so after a call that passed them, what they looked at is kept, by identity where it
is an object of Python's and by its kind where it is a tensor, and a call that finds all of it unchanged launches. Any other goes the whole way again.
Neither results nor addresses are kept, nor the weight: an old one would stay in memory when an adapter is merged.
"""

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_, not_

import torch
from torch import Tensor, nn
from torch.nn.modules import module as _nn

from fastfuse import tune
from fastfuse.kernels.arguments import NF4Weight, Operand, TorchaoScales
from fastfuse.ops import _op
from fastfuse.ops._fused_op import leaves
from fastfuse.ops._linear_group import LinearArgs, factor_of
from fastfuse.ops.lora_row_norms import RowNormsArgs, row_norms
from fastfuse.ops.nf4_linear import linear
from fastfuse.quant.nf4 import Layout, NF4View

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_GLOBAL_HOOKS = tuple(getattr(_nn, name) for name in vars(_nn) if name.startswith("_global_") and isinstance(getattr(_nn, name), dict))
_kind = attrgetter("dtype", "shape")
_new = tuple.__new__
_C, _forward_ad = torch._C, torch.autograd.forward_ad
_misaligned = (15).__and__
_SHAPES = 64  # of x, that a layer keeps a plan for


class Watch:
    """What must be as it was: entries of dicts (those of modules' attributes, mostly) the same objects, containers empty, classes' forwards the same."""

    def __init__(self):
        self.holders: list[dict] = []
        self.keys: list[str] = []
        self.empty: list = list(_GLOBAL_HOOKS)
        self.forwards: list[tuple[type, Callable]] = []

    def same(self, holder: dict, *keys: str) -> None:
        self.holders += [holder] * len(keys)
        self.keys += keys

    def child(self, module: nn.Module) -> None:
        """A module that is read and not called: nothing may run when it is."""
        state = module.__dict__
        self.same(state, "forward", "_hf_hook", "_old_forward", *_HOOKS)
        self.empty += [state[name] for name in _HOOKS]
        self.forwards.append((type(module), type(module).forward))
        if (hook := state.get("_hf_hook")) is not None:
            self.same(hook.__dict__, "offload", "io_same_device")


def is_special() -> bool:
    """Whether calls go another way for now: nothing that ordinary ones would do is learned from them."""
    if torch.compiler.is_compiling() or _op.stand_in is not None or _op._backend != "auto" or tune._pinned or tune._assumed:
        return True
    return bool(_C._is_any_autocast_enabled() or _C._len_torch_dispatch_stack() or _C._len_torch_function_stack())


def read_torchao(parameters: dict[str, Tensor | None], view: NF4View) -> Callable[[], NF4Weight | None]:
    """Reads the tensors of the NF4Tensor under "weight": None where it is of another shape, layout or class."""
    kind, alike = type(parameters["weight"]), (view.shape, (view.shape[1], 1), view.block_size, view.scale_block)

    def weight() -> NF4Weight | None:
        held = parameters["weight"]
        if type(held) is not kind or (held.shape, held.stride(), held.block_size, held.scaler_block_size) != alike:
            return None
        scales = _new(TorchaoScales, (held.quantized_scalers, held.quantization_factor, held.scaler_mean))
        return _new(NF4Weight, (held.quantized_data, held.nf4, scales))

    return weight


def dora_factor(magnitude: Tensor, a: Tensor, b: Tensor, scaling: float, view: NF4View) -> Callable[[NF4Weight, Tensor], Tensor]:
    """Makes magnitude / ||W + scaling B A||, W decoded in x's dtype, at every call."""
    layout, shape = Layout.of(view), view.shape

    def factor(weight: NF4Weight, x: Tensor) -> Tensor:
        norms = row_norms(RowNormsArgs(weight, layout, shape, x.dtype, a, b, scaling, False))[0]
        return factor_of(magnitude, norms)

    return factor


class PreparedLinear:
    """prepared(x) -> y of an NF4 layer, or None where something is not as it was, or somebody would see the call pass by."""

    def __init__(
        self,
        watch: Watch,
        x: Tensor,
        view: NF4View,
        weight: Callable[[], NF4Weight | None],
        a: Tensor | None = None,
        b: Tensor | None = None,
        scaling: float = 1.0,
        bias: Tensor | None = None,
        factor: Callable[[NF4Weight, Tensor], Tensor] | None = None,
        active: tuple[dict, object] | None = None,
    ):
        """weight: the weight's tensors, read anew; None where it is another one.  factor: (weight, x) -> what DoRA multiplies by, made at every call.
        active: a module's __dict__, and what its _active_adapter must be equal to: it may be a list, which can be changed in place."""
        self.watch, self.weight, self.factor, self.active = watch, weight, factor, active
        self.holders, self.keys, self.values = watch.holders, watch.keys, [*map(dict.get, watch.holders, watch.keys)]
        self.empty, self.forwards = watch.empty, watch.forwards
        self.a, self.b, self.bias, self.scaling = a, b, bias, scaling
        self.N, self.K = view.shape
        self.R, self.layout = 0 if a is None else a.shape[0], Layout.of(view)
        self.dtype, self.device, self.autocast = x.dtype, x.device, x.device.type
        self.by_launch = x.device.type == "cuda"
        with _C.DisableTorchFunctionSubclass():
            args = self.args(x, weight())
        tensors, self.constants = leaves(args)
        self.kinds, self.types, self.devices = self._kinds(tensors[1:])
        self.covered = all(t.is_contiguous() for t in tensors[1:])
        self.plans: dict[tuple, Callable] = {}

    def args(self, x: Tensor, weight: NF4Weight) -> LinearArgs:
        factor = None if self.factor is None else self.factor(weight, x)
        operand = _new(Operand, (weight, self.a, self.b, factor, self.bias, None, None, self.N, self.R, self.scaling))
        return _new(LinearArgs, (x, (operand,), self.layout, self.K, None, 0.0, False, False))

    @staticmethod
    def _kinds(tensors: list[Tensor]) -> tuple[list, list, list]:
        return [*map(_kind, tensors)], [*map(type, tensors)], [*map(Tensor.get_device, tensors)]

    def __call__(self, x: Tensor = None, *args, **kwargs) -> Tensor | None:
        # Whoever looks on is asked for before x is touched: a mode of functions would see that.
        if _C._len_torch_function_stack() or _C._len_torch_dispatch_stack() or _C._get_tracing_state() is not None or _C._autograd._profiler_enabled():
            return None
        if _forward_ad._current_level >= 0 or _C._functorch.peek_interpreter_stack() is not None or torch.is_autocast_enabled(self.autocast):
            return None
        if _op.stand_in is not None or _op._backend != "auto" or tune._pinned or tune._assumed or torch.compiler._is_compiling_flag:
            return None
        if (
            args
            or kwargs
            or type(x) is not Tensor
            or x.dtype is not self.dtype
            or x.device != self.device
            or not all(map(is_, map(dict.get, self.holders, self.keys), self.values))
        ):
            return None
        if self.active is not None and self.active[0]["_active_adapter"] != self.active[1]:
            return None
        for kind, forward in self.forwards:
            if kind.forward is not forward:
                return None
        shape = x.shape
        if shape[-1:] != (self.K,):
            return None
        with _C.DisableTorchFunctionSubclass():
            weight = self.weight()
        if weight is None:
            return None
        a, b, bias = self.a, self.b, self.bias
        args = self.args(x, weight) if self.factor is not None else None
        tensors = [weight.packed, weight.code, *weight.scales]
        if a is not None:
            tensors += (a, b)
        if args is not None:
            tensors += (args.operands[0].factor,)
        if bias is not None:
            tensors += (bias,)
        if [*map(_kind, tensors)] != self.kinds or [*map(type, tensors)] != self.types or [*map(Tensor.get_device, tensors)] != self.devices:
            return None
        tensors = [x, *tensors]
        unlike = map(not_, map(Tensor.is_contiguous, tensors)), map(Tensor.is_neg, tensors), map(Tensor._is_zerotensor, tensors)
        if any(chain(self.empty, *unlike, map(_misaligned, map(Tensor.data_ptr, tensors)))):
            return None
        if args is None:
            operand = _new(Operand, (weight, a, b, None, bias, None, None, self.N, self.R, self.scaling))
            args = _new(LinearArgs, (x, (operand,), self.layout, self.K, None, 0.0, False, False))
        plan = linear.cpu
        if self.by_launch:
            if self.device.index not in (None, _C._cuda_getDevice()):
                return None
            try:
                plan = self.plans[shape]
            except KeyError:
                if len(self.plans) >= _SHAPES:
                    self.plans.clear()
                plan = self.plans[shape] = linear.launch.planned((args,), tensors, self.constants)
        if torch.is_grad_enabled():
            for t in (x, a, b, bias):
                if t is not None and t.requires_grad:
                    return None if self.factor is not None else linear.differentiable(plan, args, tensors, self.constants)[0]
        return plan(args)[0]

    def __deepcopy__(self, memo: dict) -> None:
        """A copy of a module prepares its own."""

    def __reduce__(self):
        return type(None), ()


class Prepares:
    """A module of fastfuse's over an NF4Tensor that keeps its next call."""

    _prepared: PreparedLinear | None = None
    _unprepared = 0

    def _prepare(self, x: Tensor, scaling: float = 1.0, factor: Callable[[NF4Weight, Tensor], Tensor] | None = None, children: tuple[str, ...] = ()) -> None:
        """After a fused call. children: what the forward reads in place of calling it: lora_a, lora_b and the like. What cannot be prepared is tried
        again after 1, 2, 4, 8 ... calls."""
        if is_special() or type(x) is not Tensor or x.is_meta or _op.route("nf4_linear", x, None) != "op":
            return
        self._unprepared += 1
        if self._unprepared & (self._unprepared - 1):
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
        self._unprepared = 0
