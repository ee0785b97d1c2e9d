"""What every op shares: registration with PyTorch, the backend in force, the cost of a call, argument checks and errors."""

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported

try:
    import triton
except ImportError:  # Triton ships for Linux alone; everywhere else the PyTorch references serve
    triton = None

HAS_TRITON = triton is not None
INTERPRET = HAS_TRITON and bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when fastfuse was imported
BACKENDS = ("auto", "triton", "torch")

_backend = "auto"
stand_in: Callable[[Callable, tuple], object] | None = None  # called in place of every launcher, with it and its arguments: see _collect.py


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
    if stand_in is not None and x.device.type != "cuda":  # asked first: a graph that torch.compile made now must not serve afterwards
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


def fused_op(name: str, reference: Callable, cpu: Callable | None = None) -> Callable:
    """Register a Triton launcher as torch.ops.fastfuse.<name>, an opaque op for autograd and torch.compile.

    The eager reference does three more jobs: it is the CPU implementation (unless `cpu` is a faster one), the fake kernel
    that torch.compile traces, and the truth the tests compare with. The first argument of all is a tensor or
    a list of them; the last is `interpret`, which sends a CPU call through the launcher, in Triton's interpreter.
    """

    def register(launch: Callable) -> FusedOp:
        launch = replaceable(launch)

        def on_cpu(*args):
            return (launch if args[-1] else cpu or reference)(*args)

        kernels = {"cuda": no_autocast(_on_device(launch)), "cpu": no_autocast(on_cpu), "meta": launch}
        op = torch.library.custom_op(f"fastfuse::{name}", kernels["cuda"], mutates_args=(), device_types="cuda")
        op.register_kernel("cpu")(kernels["cpu"])
        op.register_fake(reference)
        op.__class__ = FusedOp  # torch.library makes the object
        op._kernels, op._function = kernels, None
        op._gives_list = isinstance(op._opoverload._schema.returns[0].type, torch._C.ListType)
        return op

    return register


class FusedOp(torch.library.CustomOpDef):
    """A registered op that eager calls reach past the dispatcher: of PyTorch's way there and back, which torch.compile, modes and tracers need, one call
    of nf4_linear with gradients has 0.5 ms of Python, half of it to look for tensors in lists."""

    def register_autograd(self, backward: Callable, /, *, setup_context: Callable, **kwargs) -> None:
        super().register_autograd(backward, setup_context=setup_context, **kwargs)
        self._function = _autograd_function(self._name, self._kernels, backward, setup_context, self._gives_list)

    def __call__(self, *args):
        flat = [a for arg in args for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
        if not _is_eager(flat):
            return super().__call__(*args)
        if self._function is not None and torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in flat):
            made = self._function.apply(tuple(len(arg) if isinstance(arg, (list, tuple)) else None for arg in args), *flat)
            return list(made) if self._gives_list else made
        return self._kernels[_lead(args[0]).device.type](*args)


_PLAIN = (Tensor, torch.nn.Parameter)


def _is_eager(flat: list) -> bool:
    """Whether nobody would see the op go by: plain tensors on a device with kernels, no mode, transform, tracer or profiler."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
        return False
    if torch._C._get_tracing_state() is not None or torch.autograd._profiler_enabled() or forward_mode() or transformed():
        return False
    return all(_is_plain(a) for a in flat if isinstance(a, Tensor))


def _is_plain(t: Tensor) -> bool:
    """A tensor whose memory holds its values: the dispatcher would negate or fill in others."""
    if type(t) not in _PLAIN or t.is_neg() or t._is_zerotensor():
        return False
    return t.device.type in ("cuda", "cpu") or (stand_in is not None and t.is_meta)


def _autograd_function(name: str, kernels: dict[str, Callable], backward: Callable, setup_context: Callable, gives_list: bool) -> type[torch.autograd.Function]:
    """The op's backward as an autograd.Function of its arguments one after the other, lists taken apart."""

    def packed(flat: Sequence, sizes: tuple) -> list:
        it = iter(flat)
        return [next(it) if n is None else [next(it) for _ in range(n)] for n in sizes]

    def forward(ctx, sizes, *flat):
        args = packed(flat, sizes)
        ctx._sizes, ctx.needs_input_grad = sizes, packed(ctx.needs_input_grad[1:], sizes)
        out = kernels[_lead(args[0]).device.type](*args)
        setup_context(ctx, args, out)
        return tuple(out) if gives_list else out

    def run_backward(ctx, *grads):
        found = backward(ctx, list(grads)) if gives_list else backward(ctx, *grads)
        found = found if isinstance(found, tuple) else (found,)
        flat = [None]
        for g, n in zip(found, ctx._sizes, strict=True):
            flat += [g] if n is None else [None] * n if g is None else g
        return tuple(flat)

    members = {"forward": staticmethod(forward), "backward": staticmethod(run_backward)}
    return type(f"fastfuse_{name}", (torch.autograd.Function,), members)


def replaceable(launch: Callable) -> Callable:
    """The launcher, or what stands in for it."""

    @functools.wraps(launch)
    def run(*args):
        _settle_cache_keys()
        return launch(*args) if stand_in is None else stand_in(launch, args)

    return run


@functools.cache
def _settle_cache_keys() -> None:
    """Compute the kernels' cache keys in one order, before the first launch.

    Up to Triton 3.7 (triton-lang/triton#10494 mends it) a kernel's key depends on which kernels got theirs before it: a process that launches in another
    order than the one before compiles its NF4 kernels again. 0.2 s once, most of it to parse their source, which launching all of them would do too.
    """
    if not INTERPRET:
        for module in [sys.modules[name] for name in sorted(sys.modules) if name.startswith("fastfuse.kernels.")]:
            for value in vars(module).values():
                getattr(value, "cache_key", None)


def no_autocast(kernel: Callable) -> Callable:
    """Dtypes were settled by the public function: autocast must not reach the matrix products inside."""

    @functools.wraps(kernel)
    def run(x, *args):
        device = _lead(x).device.type
        if device == "meta" or not torch.is_autocast_enabled(device):
            return kernel(x, *args)
        with torch.autocast(device, enabled=False):
            return kernel(x, *args)

    return run


def _on_device(launch: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one the tensors are on."""

    @functools.wraps(launch)
    def run(x, *args):
        device = _lead(x).device
        if device.index in (None, torch.cuda.current_device()):
            return launch(x, *args)
        with torch.cuda.device(device):
            return launch(x, *args)

    return run


def _lead(x: Tensor | Sequence[Tensor]) -> Tensor:
    return x if isinstance(x, Tensor) else x[0]


def kernel_dtype(dtype: torch.dtype) -> torch.dtype:
    """What a kernel works in: bf16 arithmetic is wrong in the interpreter, fp32 rounded to bf16 afterwards is not."""
    return torch.float32 if INTERPRET and dtype == torch.bfloat16 else dtype


def triton_dtype(dtype: torch.dtype):
    """The same dtype, as a kernel's compile-time constant."""
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def precision() -> str:
    """How kernels multiply fp32: as three tf32 products on NVIDIA's matrix units, which keeps fp32's accuracy."""
    return "ieee" if INTERPRET or torch.version.hip else "tf32x3"


def rows(x: Tensor) -> Tensor:
    """x as [M, last dim] with a contiguous last dim: a view wherever the layout allows one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
