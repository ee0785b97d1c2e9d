"""What every op promises, tried with the calls in cases/: the numbers of float64 on every route, and a life beside the rest of PyTorch."""

import sys
from itertools import chain, cycle, islice, product

import pytest
import torch
from suite import check
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from waiting import NoReading, NoWaiting

import fastfuse
from cases import Call, as_tuple, ops
from fastfuse.ops._fused_op import FusedOp, decoded, leaves

OPS = ops()
FUSED = {f.name: f for name, module in [*sys.modules.items()] if name.startswith("fastfuse.ops.") for f in vars(module).values() if isinstance(f, FusedOp)}
CUDA = torch.cuda.is_available()


def runs(op) -> list[tuple]:
    """(case, route, dtype): every case without kernels and on one of the other routes, the typical ones on every route in 16 bits and by the formula."""
    reference, *by_kernels, formula = op.routes
    once = [(case, route, None) for i, case in enumerate(op.cases) for route in (reference, by_kernels[i % len(by_kernels)])]
    low = zip(cycle(op.typical), product(op.routes, (torch.float16, torch.bfloat16)), strict=False) if op.in_16_bits else ()
    return [*once, *((case, formula, None) for case in op.typical), *((case, route, dtype) for case, (route, dtype) in low)]


def of(op, pairs, quick: int = 0):
    """quick: how many of the first run with `pytest -m quick`."""
    return [pytest.param(op, *pair, id="-".join([op.name, *map(str, pair)]), marks=[pytest.mark.quick] * (i < quick)) for i, pair in enumerate(pairs)]


def each(routes=lambda op: op.routes, where=lambda op: True, cases=lambda op: op.typical):
    """These cases and routes of every op, all of both at least once."""
    found = []
    for op in filter(where, OPS.values()):
        pairs = zip(cycle(cases(op)), cycle(routes(op)), strict=False)
        found += of(op, islice(pairs, max(len(cases(op)), len(routes(op)))))
    return pytest.mark.parametrize("op, case, route", found)


def kernels(op) -> list[str]:
    return [*op.routes][1:-1]


def one_of_each(op) -> list[str]:
    """Where tiles do not matter: without kernels, with them, and the formula."""
    return [*[*op.routes][:2], "torch"]


def registered(op) -> list[str]:
    return [*op.routes][:-1]


def looking_at_no_values(op) -> list[str]:
    return [route for route in op.routes if not (op.reads_on_cpu and route == registered(op)[0])]


def varied(op) -> list[str]:
    return [*op.typical, *op.varied]


def with_gradients(call: Call, **options) -> list[Tensor]:
    """Results and gradients."""
    ys = call(**options)
    return [*ys, *(call.grads(ys).values() if call.leaves() else ())]


def assert_close(got, want) -> None:
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def assert_equal(got, want) -> None:
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("op, case, route, dtype", list(chain.from_iterable(of(op, runs(op), quick=2) for op in OPS.values())))
def test_results_and_gradients(op, case, route, dtype, device):
    with op.routes[route]():
        check(op.call(case, device, **({} if dtype is None else {"dtype": dtype})), small_gradients=op.small_gradients)


def strided(t: Tensor) -> Tensor:
    return t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2] if t.dim() else t


def expanded(t: Tensor) -> Tensor:
    """Along the second dim: along most others some op has nothing left to do."""
    return t[:, :1].expand(t.shape) if t.dim() > 1 else t


def alike(dy: Tensor) -> Tensor:
    """The same vector everywhere: along the last dim too, a norm would make nothing of it."""
    return dy[(slice(1),) * (dy.dim() - 1)].expand(dy.shape)


@pytest.mark.parametrize("layout, of_upstream", [(strided, strided), (expanded, alike)], ids=["strided", "expanded"])
@each()
def test_any_strides_of_every_tensor_and_of_what_comes_back(op, case, route, layout, of_upstream, device):
    with op.routes[route]():
        check(op.call(case, device).mapped(layout), small_gradients=op.small_gradients, layout=of_upstream)


def cases_in_float64(op) -> list[str]:
    return [case for case in op.typical if "pixels" not in op.cases[case]]


@each(lambda op: [registered(op)[0], "torch"], lambda op: op.differentiable and op.in_float64, cases_in_float64)
def test_float64_by_the_references(op, case, route, device):
    """Pixels of another dtype than the weight's become fp32 first."""
    if CUDA and route != "torch":
        pytest.skip("kernels are for up to fp32")
    call = op.call(case, device).double()
    with op.routes[route]():
        ys = call()
    want = call.by_formula()
    for got, exact in zip([*ys, *call.grads(ys).values()], [*want, *call.grads(want).values()], strict=True):
        torch.testing.assert_close(got, exact, rtol=1e-11, atol=1e-11)


@each(one_of_each, where=lambda op: op.differentiable)
def test_gradients_of_gradients(op, case, route, device):
    """A penalty on gradients; of all, and of the last two leaves alone, where the others are frozen."""
    call = op.call(case, device)

    def penalty(call, ys):
        given = call.leaves().values()
        found = torch.autograd.grad(sum(y.square().sum() for y in ys), given, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in found), given)

    for part in (call, call.only(*[*call.leaves()][-2:])):
        exact = part.double()
        with op.routes[route]():
            got = penalty(part, part())
        for name, g, w in zip(part.leaves(), got, penalty(exact, exact.by_formula()), strict=True):
            sums, terms = op.second_gradients
            assert (g - w).norm() / w.norm() < sums * 2**-23 * terms**0.5, name


class Recorded(TorchDispatchMode):
    """The calls of fastfuse's registered ops."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastfuse":
            self.calls.append((func, tree_map_only(Tensor, lambda t: t.detach().requires_grad_(t.requires_grad), args)))
        return func(*args, **(kwargs or {}))


def recorded(call: Call) -> list[tuple]:
    with Recorded() as mode:
        with_gradients(call)
    return mode.calls


@each(lambda op: registered(op)[:2], cases=varied)
def test_registered_ops_by_pytorchs_own_checks(op, case, route, device):
    """Schemas, strides of what is faked, of tensors in any layout; symbolic sizes and gradients of the forward on the first route."""
    call = op.call(case, device)
    with op.routes[route]():
        calls = recorded(call)
        assert calls
        for i, (func, args) in enumerate(calls):
            more = ("test_autograd_registration", "test_aot_dispatch_dynamic") if i == 0 and route == registered(op)[0] and case == op.typical[0] else ()
            torch.library.opcheck(func, args, test_utils=("test_schema", "test_faketensor", *more))
        for func, args in recorded(call.mapped(strided)):
            torch.library.opcheck(func, args, test_utils=("test_faketensor",))


@each(kernels, cases=varied)
def test_a_plan_serves_other_values(op, case, route, device):
    """A plan is made of shapes, strides, dtypes and constants: what the first call's tensors held must not be in it."""
    call = op.call(case, device).mapped(lambda t: t.contiguous())
    other = call.mapped(lambda t: t.flip(0) if t.dim() else t)
    with op.routes[route]():
        for (func, one), (_, two) in zip(recorded(call), recorded(other), strict=True):
            fused = FUSED.get(func.overloadpacket.__name__)
            if fused is not None:
                one, two = decoded(*one), decoded(*two)
                assert leaves(one)[1] == leaves(two)[1]
                with torch.no_grad():
                    plan, own = fused.launch.plan(one), fused.launch.plan(two)
                    plan(one)
                    assert_equal(plan(two), own(two))


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.dynamic], ids=lambda op: op.name)
def test_one_graph_for_every_size(op, device):
    torch._dynamo.reset()
    dims, sizes = op.dynamic
    counter, first = CompileCounterWithBackend("aot_eager"), op.make(device, **sizes[0])
    run = torch.compile(lambda tensors: first.run(tensors), fullgraph=True, backend=counter)
    for options in sizes:
        call = op.make(device, **options)
        for name, of_tensor in dims.items():
            for dim in of_tensor:
                torch._dynamo.mark_dynamic(call.tensors[name], dim)
        ys = as_tuple(run(call.tensors))
        assert_close([*ys, *(call.grads(ys).values() if call.leaves() else ())], with_gradients(call))
    assert counter.frame_count == 1


@pytest.mark.parametrize("op", [op for op in OPS.values() if op.dynamic], ids=lambda op: op.name)
def test_compiled_by_inductor(op, device):
    torch._dynamo.reset()
    call = op.call(op.typical[0], device)
    with torch._inductor.config.patch(force_disable_caches=True):  # which know an op by its name, whatever strides it had then
        ys = as_tuple(torch.compile(lambda tensors: call.run(tensors), fullgraph=True)(call.tensors))
        assert_close([*ys, *(call.grads(ys).values() if call.leaves() else ())], with_gradients(call))


@each(one_of_each, where=lambda op: op.autocast, cases=varied)
def test_autocast(op, case, route, device):
    call = op.call(case, device)
    cast = call.replaced(**{name: t.bfloat16() for name, t in call.tensors.items() if name in op.autocast and t is not None})
    with op.routes[route]():
        with torch.autocast(device, torch.bfloat16):
            ys = call()
        assert_equal(ys, cast())
        assert all(g.dtype == call.tensors[name].dtype and g.isfinite().all() for name, g in call.grads(ys).items())


@each(one_of_each, where=lambda op: op.differentiable)
def test_checkpointing(op, case, route, device):
    call = op.call(case, device)
    with op.routes[route]():
        again = as_tuple(checkpoint(call.run, call.tensors, use_reentrant=False))
        assert_equal([*again, *call.grads(again).values()], with_gradients(call))


@each()
def test_two_runs_are_equal_to_the_bit(op, case, route, device):
    call = op.call(case, device)
    with op.routes[route]():
        assert_equal(with_gradients(call), with_gradients(call))


@each(lambda op: ["auto", "torch"], cases=varied)
def test_shapes_without_memory(op, case, route):
    call, mode = op.call(case, "cpu"), FakeTensorMode()

    def described(tensors):
        """Strides of dims that have more than one element: the others say nothing."""
        return [(t.shape, t.dtype, [stride for n, stride in zip(t.shape, t.stride(), strict=True) if n > 1 and t.numel()]) for t in tensors]

    with fastfuse.backend(route):
        ys = call()
        assert described(call.mapped(lambda t: t.to("meta"))()) == described(ys)
        fake = call.mapped(mode.from_tensor)
        with mode:
            found = fake()
            assert described(found) == described(ys)
            gradients = fake.grads(found).values() if call.leaves() else ()
        assert [(g.shape, g.dtype) for g in gradients] == [(t.shape, t.dtype) for t in call.leaves().values()]


@each(where=lambda op: op.differentiable)
def test_only_what_requires_a_gradient_is_computed_and_is_the_same(op, case, route, device, launches):
    call = op.call(case, device)
    with op.routes[route]():
        ys = call()
        every, plain = call.grads(ys), call.only()()
        assert not any(y.requires_grad for y in plain)
        for name in every:
            part = call.only(name)
            ys = part()
            launches.clear()
            (found,) = part.grads(ys).values()
            torch.testing.assert_close(found, every[name])  # the same but for the order of sums, which what else is computed may change
            launched = {kernel for kernel, _ in launches}
            for kernel, names in op.backwards.items():
                assert kernel not in launched or name in names, kernel
                assert kernel in launched or name not in names or route not in kernels(op), kernel


@each(one_of_each, where=lambda op: op.differentiable)
def test_nothing_is_saved_without_gradients(op, case, route, device):
    call, kept = op.call(case, device), []
    with op.routes[route](), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        call.only()()
        with torch.no_grad():
            call()
        assert not kept
        call()
        assert kept


@each(looking_at_no_values)
def test_nothing_waits_for_the_device(op, case, route, device, launches, values_on_a_device):
    call = op.call(case, device)
    with op.routes[route](), NoReading(), NoWaiting():
        with_gradients(call)
    launched = {kernel for kernel, _ in launches}
    assert launched <= op.kernels and bool(launched) == (route in kernels(op) or (CUDA and route != "torch"))


def test_waiting_is_found_out(device):
    t = torch.zeros(3, device=device)
    for call in (lambda: t[0].item(), lambda: t[t > 0], lambda: t.nonzero()):
        with pytest.raises(AssertionError, match="waits"), NoWaiting():
            call()
    for call in (Tensor.tolist, lambda t: bool(t[0]), lambda t: torch.tensor([1.0]), lambda t: t.cpu()):
        with pytest.raises(AssertionError, match="waits"), NoReading():
            call(t)


@each(one_of_each, where=lambda op: op.differentiable and not op.result_is_read_again)
def test_results_may_be_changed_in_place(op, case, route, device):
    call = op.call(case, device)
    with op.routes[route]():
        want = call.grads([(y * 2 + 1).relu() for y in call()])
        got = call.grads([y.mul_(2).add_(1).relu_() for y in call()])
    assert_close(got.values(), want.values())


@each(one_of_each, where=lambda op: op.differentiable)
def test_tensors_that_are_negated_when_they_are_read(op, case, route, device):
    """conj().imag is a view whose sign is in a flag: PyTorch's dispatcher resolves it, and so must a call that goes past it."""
    call = op.call(case, device).only()

    def negated(t):
        return torch.view_as_complex(torch.stack([t, -t], -1)).conj().imag if t.dtype == torch.float32 else t

    with op.routes[route]():
        assert_close(call.mapped(negated)(), call())


@each(registered, lambda op: op.differentiable)
def test_forward_mode_and_transforms_are_refused(op, case, route, device):
    call = op.call(case, device)
    with op.routes[route]():
        with torch.autograd.forward_ad.dual_level(), pytest.raises(fastfuse.Unsupported, match="forward-mode"):
            call()
        with pytest.raises(fastfuse.Unsupported, match=r"torch\.func"):
            torch.func.vmap(lambda _: call())(torch.zeros(2, device=device))


@pytest.mark.skipif(CUDA, reason="values are looked at on a CPU alone")
@pytest.mark.parametrize("call, error, message", [row for op in OPS.values() for row in op.refusals], ids=lambda x: x if isinstance(x, str) else "")
def test_refusals(call, error, message, launches):
    for backend in ("auto", "triton"):
        with fastfuse.backend(backend), pytest.raises(error, match=message) as e:
            call()
        assert type(e.value) is error and "\n" not in str(e.value)
    assert {kernel for kernel, _ in launches} <= {"tile_rows_kernel"}
