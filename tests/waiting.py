"""What a GPU would wait for, the kernels it would launch and the tensors it would make, seen on a CPU."""

import sys
from collections import Counter

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import fastfuse.ops  # noqa: F401


class NoReading(TorchFunctionMode):
    """Fails on ways between host and device that are no op on a CPU."""

    NAMES = ("tolist", "item", "numpy", "cpu", "tensor", "as_tensor", "__bool__", "__index__", "__int__", "__float__", "__array__", "__contains__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.NAMES, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


class Launched:
    """A kernel whose launches go to note(name, grid). What the interpreter does inside of one is out of every mode's sight."""

    def __init__(self, kernel, name, note):
        self.kernel, self.name, self.note = kernel, name, note

    def __getitem__(self, grid):
        def run(*args, **options):
            self.note(self.name, grid)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                self.kernel[grid](*args, **options)

        return run


OPS = {
    op._name: op
    for module in list(sys.modules.values())
    if getattr(module, "__name__", "").startswith("fastfuse.ops.")
    for op in [getattr(value, "_op", value) for value in vars(module).values()]
    if isinstance(op, torch.library.CustomOpDef)
}


class Counted(TorchDispatchMode):
    """Ops that run, inside of fastfuse's too, and of their results the bytes and the number of elements, apart. Views make nothing."""

    def __init__(self):
        super().__init__()
        self.ops, self.bytes, self.sizes = Counter(), 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "fastfuse":  # as Python: a dispatch mode would see one op instead of those in it
            self.ops[name] += 1
            with self:
                return OPS[name]._backend_fns["cuda" if torch.cuda.is_available() else "cpu"](*args)
        out = func(*args, **(kwargs or {}))
        self.note(func, (args, kwargs), [t for t in tree_leaves(out) if isinstance(t, Tensor)])
        return out

    def note(self, func, given, made):
        if not func.is_view:
            self.ops[func.overloadpacket.__name__] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in made)
            self.sizes += [t.numel() for t in made]


class Allocated(Counted):
    """Shapes of all tensors that are made, inside of fastfuse's ops too; views and results in place make none."""

    def __init__(self):
        super().__init__()
        self.made = []

    def note(self, func, given, made):
        old = {t.untyped_storage().data_ptr() for t in tree_leaves(given) if isinstance(t, Tensor)}
        self.made += [(tuple(t.shape), str(func)) for t in made if t.untyped_storage().data_ptr() not in old]

    def of(self, elements, *last):
        """Those of `elements` or more, and those whose shapes end in `last`."""
        return [(s, f) for s, f in self.made if torch.Size(s).numel() >= elements or (last and s[-len(last) :] == last)]


class NoWaiting(Counted):
    """Fails where a result's size or a value of a tensor has to reach the host."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put", "_unsafe_index")) and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in tree_leaves(args[1])
        )
        assert name not in self.WAITING and not by_mask, f"{func} waits for the device"
        return super().__torch_dispatch__(func, types, args, kwargs)
