"""What every op shares: registration with PyTorch, the backend in force, the cost of a call, argument checks and errors."""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from fastfuse import tune
from fastfuse.errors import Unsupported

try:
    import triton
except ImportError:  # Triton ships for Linux alone; everywhere else the PyTorch references serve
    triton = None

HAS_TRITON = triton is not None
INTERPRET = HAS_TRITON and bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when fastfuse was imported
BACKENDS = ("auto", "triton", "torch")
Plan = Callable[[tuple], tuple[Tensor, ...]]  # what launches for arguments of one kind: see fused_op()

_backend = "auto"
launch_interceptor: Callable[[Callable, tuple], object] | None = None  # called in place of every launcher, with it and its arguments: see _collect.py


@dataclass(frozen=True)
class Cost:
    """What a call cannot avoid: bytes moved to and from device memory, each tensor once, and matrix-unit flops."""

    bytes: int
    flops: int = 0


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check(ok: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise before any launch: a bad argument must never reach the device."""
    if not ok:
        raise error(message)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose what runs inside the block: "auto", "triton" or "torch".

    auto: Triton kernels on a GPU, the PyTorch reference on a CPU. triton: the kernels, on a CPU through Triton's
    interpreter (slow; needs TRITON_INTERPRET=1 before fastfuse is imported). torch: the eager reference everywhere.
    The choice is process-wide while the block lasts, other threads included; the argument backend= of an op is not.
    Raises ValueError for another name; a call raises Unsupported where the choice cannot run.
    """
    global _backend
    check(name in BACKENDS, f"backend: {name!r} is none of {', '.join(BACKENDS)}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def route(op: str, x: Tensor, name: str | None) -> str:
    """Where a call goes: "reference" (the eager formula), "op" (the registered op) or "interpreter" (the op's kernels, on a CPU).

    name: the caller's choice of backend, the one in force where None. Raises ValueError or Unsupported where it cannot run.
    """
    name = name or _backend
    if name not in BACKENDS:
        raise ValueError(f"{op}: backend is {name!r}, not one of {', '.join(BACKENDS)}")
    if name == "torch":
        return "reference"
    if forward_mode():  # the op would silently drop the tangent
        raise Unsupported(f"{op}: forward-mode differentiation is not covered: use fastfuse.backend('torch')", "FORWARD_AD")
    if transformed():
        raise Unsupported(f"{op}: torch.func transforms (grad, vmap, ...) are not covered: use fastfuse.backend('torch')", "FUNCTORCH")
    if launch_interceptor is not None and x.device.type != "cuda":  # asked first: a graph that torch.compile made now must not serve afterwards
        return "interpreter"  # the launcher's way, wherever the tensor is
    if x.device.type == "cuda":
        check_triton(op)
    elif x.device.type not in ("cpu", "meta") and name == "auto":
        return "reference"  # a device without kernels of ours: eager PyTorch runs wherever PyTorch does
    elif name == "triton":
        check_triton(op)
        if not INTERPRET:
            raise Unsupported(f"{op}: backend 'triton' on a {x.device.type} tensor needs TRITON_INTERPRET=1 set before import", "NO_GPU")
        return "interpreter"
    return "op"


def forward_mode() -> bool:
    return torch.autograd.forward_ad._current_level >= 0


def transformed() -> bool:
    """Whether a torch.func transform is under way."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def check_triton(op: str) -> None:
    if not HAS_TRITON:
        raise Unsupported(f"{op}: backend 'triton' needs the triton package, which is not installed", "NO_TRITON")


def check_device(op: str, device: torch.device, name: str) -> None:
    """Raise Unsupported where backend `name` has no kernel of `op` for this device."""
    if device.type == "cuda" and name != "torch":
        check_triton(op)
        tune.covering_arch(op, tune.arch_of(device))


def backend_for(device: torch.device, name: str = "auto") -> str:
    """What backend `name` runs on this device, in words."""
    if name == "torch" or (device.type != "cuda" and name == "auto"):
        return "torch"
    return "triton" if device.type == "cuda" else "triton (interpreter)"


def replaceable(launch: Callable) -> Callable:
    """The launcher, on the device of its first tensor, which need not be Triton's current one; or what stands in for it."""

    @functools.wraps(launch)
    def run(x, *args):
        if launch_interceptor is not None:
            return launch_interceptor(launch, (x, *args))
        if x.device.index is None or x.device.index == torch.cuda.current_device():
            return launch(x, *args)
        with torch.cuda.device(x.device):
            return launch(x, *args)

    return run


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes in on this device, None where it is off."""
    return torch.get_autocast_dtype(device.type) if device.type != "meta" and torch.is_autocast_enabled(device.type) else None


def no_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Dtypes were settled by the public function: autocast must not reach the matrix products inside."""
    return contextlib.nullcontext() if autocast_dtype(device) is None else torch.autocast(device.type, enabled=False)


def differentiated_twice(args: tuple, first: Callable, grads: Sequence[Tensor | None]) -> tuple:
    """The gradient of an op that is a gradient, rare enough to be left to autograd: args with gradients in the tensors' places.

    first: (args) -> (results of a formula, what comes back to them, its inputs that the op gives the gradients of). grads: those of these gradients.
    """
    args = tree_map_only(Tensor, lambda t: t.detach().requires_grad_() if t.is_floating_point() else t, args)
    with torch.enable_grad():
        outs, upstream, inputs = first(args)
        asked = [(t, g) for t, g in zip(inputs, grads, strict=True) if g is not None]
        once = torch.autograd.grad(outs, [t for t, _ in asked], upstream, create_graph=True)
        leaves = [t for t in tree_leaves(args) if isinstance(t, Tensor) and t.requires_grad]
        twice = iter(torch.autograd.grad(once, leaves, [g for _, g in asked], allow_unused=True))
    return tree_map_only(Tensor, lambda t: next(twice) if t.requires_grad else None, args)


def number(value: float, like: Tensor) -> float | Tensor:
    """A number as ops take it. torch.compile has symbols for floats that change from call to call; a custom op would make a constant of one, and a graph of its
    own for every value. So a symbol becomes a tensor, by a product: of the ways to do so the one that keeps it a symbol."""
    if isinstance(value, Tensor):  # it has been here
        return value
    return torch.ones((), dtype=torch.float32, device=like.device) * value if is_symbol(value) else float(value)


def is_symbol(value: float) -> bool:
    """Whether torch.compile has a symbol for the number: one that is asked nothing about serves all values."""
    if not torch.compiler.is_dynamo_compiling():
        return False
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # takes sympy along

    # No constant is this number, a symbol might be. It is written here, as of a global one there would be a symbol too.
    return not statically_known_true(value != 1.2345e30)


def constant(value: float) -> float:
    """A number that kernels are made for: where torch.compile has a symbol for it, the graph becomes one for this value alone."""
    if torch.compiler.is_dynamo_compiling() and -math.inf < value < math.inf:
        numerator, denominator = float(value).as_integer_ratio()  # of the ways to ask for the value the one that gives it back as it was
        return numerator / denominator
    return float(value)


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel works in: bf16 arithmetic is wrong in the interpreter, fp32 rounded to bf16 afterwards is not."""
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


def triton_dtype(dtype: torch.dtype):
    """The same dtype, as a kernel's compile-time constant."""
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def precision() -> str:
    """How kernels multiply fp32: as three tf32 products on NVIDIA's matrix units, which keeps fp32's accuracy."""
    return "ieee" if INTERPRET or tune.on_amd() else "tf32x3"


def rows(x: Tensor) -> Tensor:
    """x as [M, last dim] with a contiguous last dim: a view wherever the layout allows one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
