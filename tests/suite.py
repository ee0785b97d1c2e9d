"""A call of an op held to the rule of numerics.py: what tests/test_ops.py does with every case, for tests with cases of their own."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from numerics import Orders, assert_no_worse
from reference import assert_gradients_no_worse
from torch import Tensor

from cases import Call
from fastfuse import tune


def check(call: Call, *, small_gradients: bool = False, layout: Callable[[Tensor], Tensor] = lambda dy: dy) -> None:
    """The results by the backend in force and every gradient, each by itself; whole numbers, and what is zero, to the bit.

    Gradients of one number may come out right by luck: they are taken for two upstream gradients and weighed together, with small_gradients all are.
    layout: of the upstream gradients."""
    upstream = []

    def results(call: Call, run: Callable) -> tuple:
        ys, leaves = run(), call.leaves()
        upstream.extend([torch.randn(y.shape, dtype=torch.float64, device=y.device).to(y.dtype) for y in ys] for _ in range(2 - len(upstream) if leaves else 0))
        found = {n: (g,) for n, g in call.grads(ys, [*map(layout, upstream[0])], retain_graph=True).items()} if leaves else {}
        single = [n for n, t in leaves.items() if t.numel() == 1]
        for dy in upstream[1:] if single else ():
            again = replace(call, tensors={n: leaves[n] for n in single}).grads(ys, dy, retain_graph=True)
            found |= {n: (*found[n], g) for n, g in again.items()}
        return [y.detach() for y in ys], found

    exact = call.double()
    (ys, got), (want, true) = results(call, call), results(exact, exact.by_formula)
    eager = Orders(results, call, call.by_formula) if any(y.is_floating_point() for y in ys) else []
    for i, (y, w) in enumerate(zip(ys, want, strict=True)):
        _compare(f"result {i}", y, (values[i] for values, _ in eager), w)
    together = {name for name, gradients in true.items() if small_gradients or gradients[0].numel() == 1}
    for name, (w, *_) in true.items():
        if name not in together:
            _compare(f"gradient of {name}", got[name][0], (found[name][0] for _, found in eager), w)
        elif not w.any():
            assert not got[name][0].any() and got[name][0].shape == w.shape, name
    if any(true[name][0].any() for name in together):
        weighed = {name: gradients for name, gradients in true.items() if gradients[0].any()}
        assert_gradients_no_worse(got, (found for _, found in eager), weighed)
    is_empty = any(not t.numel() for t in call.leaves().values())
    assert not true or is_empty or any(g[0].any() for g in true.values()) or not any(w.any() for w in want), "nothing is compared"


def _compare(what: str, got: Tensor, eager: Iterable[Tensor], exact: Tensor) -> None:
    if not exact.is_floating_point():
        assert got.dtype == exact.dtype and torch.equal(got, exact), f"{what}: {got} is not {exact}"
        return
    assert_no_worse(got, eager, exact, what)
    assert not got[exact == 0].any(), f"{what}: not zero where it should be"


def rows_of_this_chip(op: str, not_for: str | None = "fp32") -> list[tune.Tile]:
    """The tiles of this GPU's rows, but of those for one dtype; none without a GPU."""
    if not torch.cuda.is_available():
        return []
    arch = tune.covering_arch(op, tune.arch_of(torch.device("cuda", 0)))
    rows = [row for row in tune.table(op) if row["arch"] == arch and row["tile"] and (not_for is None or row["when"].get("dtype") != not_for)]
    return [tune.Tile(row["tile"]["constants"], row["tile"]["num_warps"], row["tile"]["num_stages"]) for row in rows]


def captured(call: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of the call, and its result there."""
    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        return graph, call()


def without_waiting(call: Callable[[], object]) -> None:
    """The second time, when everything is compiled."""
    call()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
