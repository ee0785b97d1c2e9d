"""What every op is tried with, and how: a file per op. tests/test_ops.py holds all of them to the same promises.

An op's file lists one or more `Op`s in OPS. A case is a row of options, of which the op's `make` makes a Call: tensors, what runs the op on them, and the formula.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from importlib import import_module
from pkgutil import iter_modules
from unittest import mock

import torch
from torch import Tensor

import fastfuse
from fastfuse import tune

Tensors = dict[str, Tensor | None]
Results = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Call:
    """Tensors by the names of an op's arguments, None where there is none, and two functions of them that give the same.

    run: (tensors, **more) -> the public op's results; `more` are further arguments, backend="torch" for one.
    formula: (tensors) -> the results in plain PyTorch, in the tensors' own dtype; in float64 they are the truth.
    """

    run: Callable[..., Results]
    formula: Callable[[Tensors], Results]
    tensors: Tensors

    def __call__(self, **more) -> tuple[Tensor, ...]:
        return as_tuple(self.run(self.tensors, **more))

    def by_formula(self) -> tuple[Tensor, ...]:
        return as_tuple(self.formula(self.tensors))

    def leaves(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if t is not None and t.requires_grad}

    def mapped(self, change: Callable[[Tensor], Tensor]) -> "Call":
        """With change(t) in every tensor's place, a leaf where t was one."""
        return self.replaced(**{name: change(t) for name, t in self.tensors.items() if t is not None})

    def replaced(self, **tensors: Tensor | None) -> "Call":
        """With these tensors in the places of those of the same names, leaves where those were."""
        leaves = self.leaves()
        return replace(self, tensors=self.tensors | {name: t if t is None else t.detach().requires_grad_(name in leaves) for name, t in tensors.items()})

    def double(self) -> "Call":
        return self.mapped(lambda t: t.double() if t.is_floating_point() else t)

    def only(self, *names: str) -> "Call":
        """The same values, where `names` alone are leaves."""
        return replace(self, tensors={name: t if t is None else t.detach().requires_grad_(name in names) for name, t in self.tensors.items()})

    def grads(self, results: tuple[Tensor, ...], upstream: Sequence[Tensor] | None = None, **options) -> dict[str, Tensor]:
        """The leaves' gradients, of the sum of all results where upstream is None; zeros for what took no part. Not every result has to depend on a leaf."""
        leaves = self.leaves()
        upstream = [torch.ones_like(y) for y in results] if upstream is None else [dy.to(y.dtype) for y, dy in zip(results, upstream, strict=True)]
        ys, dys = zip(*((y, dy) for y, dy in zip(results, upstream, strict=True) if y.requires_grad), strict=True)
        return dict(zip(leaves, torch.autograd.grad(ys, leaves.values(), dys, materialize_grads=True, **options), strict=True))


def as_tuple(results: Results) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)


Route = Callable[[], AbstractContextManager]
Refusal = tuple[Callable[[], object], type[Exception], str]  # a call, and what it raises: the error and a pattern of its message


@dataclass(frozen=True)
class Op:
    """A public op and all that the suite needs to know of it."""

    name: str
    make: Callable[..., Call]  # (device, dtype=..., **options of a case)
    cases: Mapping[str, dict]
    typical: Sequence[str]  # a few small cases in which everything occurs: for promises about all calls alike
    varied: Sequence[str]  # more of them, for promises that strides, dtypes and what is there may break
    routes: Mapping[str, Route]  # the ways through the op: the registered op without kernels first, the formula last
    kernels: set[str]  # those that a call may launch
    backwards: Mapping[str, set[str]] = field(default_factory=dict)  # kernel: the tensors for whose gradients alone it is launched
    autocast: Sequence[str] = ()  # the tensors that follow autocast's dtype
    dynamic: tuple[Mapping[str, Sequence[int]], Sequence[dict]] | None = None  # dims that may change under torch.compile, by tensor; options that change them
    small_gradients: bool = False  # gradients of a few hundred numbers, whose largest error is a matter of luck: weighed together
    result_is_read_again: bool = False  # by the backward, so that nobody may change it in place
    second_gradients: tuple[int, int] = (12, 64)  # how many sums they are made of, and of how many terms
    reads_on_cpu: bool = False  # values, which are at hand there
    in_16_bits: bool = True  # whether `make` takes a dtype
    in_float64: bool = True  # whether the op takes it, on a CPU
    refusals: Sequence[Refusal] = ()

    def call(self, case: str, device: str, **more) -> Call:
        return self.make(device, **self.cases[case] | more)

    @cached_property
    def differentiable(self) -> bool:
        return bool(self.call(self.typical[0], "cpu").leaves())


@contextlib.contextmanager
def route(backend: str, tiles: Mapping[str, tune.Tile | None] | None = None, constants: Sequence[tuple[dict, dict]] = ()) -> Iterator[None]:
    """A backend; tiles to pin, by op; pairs of a module's namespace and what it holds meanwhile."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(fastfuse.backend(backend))
        for op, tile in (tiles or {}).items():
            stack.enter_context(tune.pin(op, tile))
        for namespace, values in constants:
            stack.enter_context(mock.patch.dict(namespace, values))
        yield


@cache
def ops() -> dict[str, Op]:
    """Of every file here."""
    modules = [import_module(f"cases.{file.name}") for file in iter_modules(__path__)]
    return {op.name: op for module in modules for op in getattr(module, "OPS", ())}
