"""What is patch_embed's own: whole numbers, padding, what grows with the images, cost. test_ops.py has the rest, test_hosts.py transformers' front."""

import itertools

import pytest
import torch
from numerics import assert_no_worse
from waiting import Counted

import fastfuse
from cases.patch_embed import EVERYTHING, ROUTES, SMALL, T, make
from fastfuse.kernels.patch_embed import tile_rows_kernel
from fastfuse.ops import patch_embed_bwd_cost, patch_embed_cost
from fastfuse.ops._op import Cost


@pytest.mark.parametrize("route", ROUTES)
def test_in_whole_numbers_everything_is_exact(route, device):
    """Small integers have no rounding: each token is the sum of its parts to the bit, a padding tile without the tables."""
    call = make(device, ratios=((1, 2), (0, 0), (3, 1)), grid=(2, 2), gates=False, append_cls=True, pad_tokens_to=8, bias=True)
    call = call.mapped(lambda t: torch.randint(-4, 5, t.shape, device=device).float() if t.is_floating_point() else t)
    wide = call.double()
    (want,) = wide.by_formula()
    with ROUTES[route]():
        (y,) = call()
        assert torch.equal(y.double(), want) and not y[:, :, 5:].any()
        ones = torch.ones((), device=device).expand(y.shape)  # of y.sum()
        for dy in (torch.randint(-3, 4, y.shape, device=device).float(), ones):
            grads, exact = call.grads((y,), [dy], retain_graph=True), wide.grads((want,), [dy], retain_graph=True)
            assert [n for n in exact if not torch.equal(grads[n].double(), exact[n])] == []


@pytest.mark.parametrize("route", ["reference", "library", "torch"])
@pytest.mark.parametrize("norm", [False, True])
def test_the_gradient_of_padding_rows_goes_nowhere(norm, route, device):
    call = make(device, **SMALL, bias=True, norm=norm, pad_tokens_to=8)
    with ROUTES[route]():
        (y,) = call()
        dy = torch.randn_like(y)
        dy[:, :, 3:] = 0
        want = call.grads(call(), [dy])
        dy[:, :, 3:] = torch.nan
        got = call.grads((y,), [dy])
    assert [n for n in want if not torch.equal(got[n], want[n])] == []


def test_rows_and_factors_of_the_kernel_are_the_loop_s(device):
    """The kernel that a GPU has no ValueError beside: every ratio that fits and every one that does not, more tiles than one block."""
    n_tiles, side = 6, T
    every = [*itertools.product(range(-1, side + 2), repeat=2), (2**32 + 1, 1), (1, 2**32)]  # int32 would see (1, 1) and (1, 0)
    ratios = every * 5
    fits = torch.empty((), dtype=torch.bool, device=device)
    factors, rows = torch.empty(3, device=device), torch.empty(len(ratios) * n_tiles, dtype=torch.int32, device=device)

    def right(h, w):
        return 0 <= h <= side and 0 <= w <= side and h * w <= n_tiles

    def launch(ratios, ids=False, entries=side):
        ratio = torch.tensor(ratios, device=device)
        tile_rows_kernel[(1,)](ratio, None, None, rows, factors, fits, len(ratios) * n_tiles, n_tiles, side, entries, IDS=ids, BLOCK=1024)
        return rows[: len(ratios) * n_tiles].tolist(), bool(fits)

    want = [t // w * side + t % w if right(h, w) and t < h * w else -1 for h, w in ratios for t in range(n_tiles)]
    assert len(want) > 1024 and launch(ratios) == (want, False) and factors.tolist() == [1, 1, 1]
    assert launch([r for r in ratios if right(*r)])[1]
    for ratio in every:
        assert launch([(1, 1), ratio])[1] == right(*ratio), ratio
    n_tiles = side
    assert launch([0, 8, 3], True, 9) == ([e * side + t for e in (0, 8, 3) for t in range(side)], True)
    assert [launch([1, e], True, 9)[1] for e in (-1, 0, 8, 9, 2**32)] == [False, True, True, False, False]


def test_gates_of_any_size_keep_their_digits(device):
    values = torch.tensor([0, 1e-30, 1e-8, -3e-4, 0.01, -0.1, 0.199, 0.201, -0.5, 1, -2, 5, 9, -9, 20, -50, 1e4], device=device)
    ratio, fits = torch.ones(1, 2, dtype=torch.int64, device=device), torch.empty((), dtype=torch.bool, device=device)
    got = torch.empty(len(values), 3, device=device)
    for value, row in zip(values, got, strict=True):
        rows = torch.empty(1, dtype=torch.int32, device=device)
        tile_rows_kernel[(1,)](ratio, value, value, rows, row, fits, 1, 1, T, T, IDS=False, BLOCK=1024)
    exact = values.double()
    for factor, eager, true in ((0, 1 - values.tanh(), 2 / (1 + (2 * exact).exp())), (1, values.tanh(), exact.tanh()), (2, values.tanh(), exact.tanh())):
        for g, *triple in zip(values, got[:, factor], eager, true, strict=True):
            assert_no_worse(*triple, f"factor {factor} of {g}")


def counted(call):
    with Counted() as seen:
        call.grads(call())
    return seen


FULL = {"ratios": ((2, 2),), "grid": (1, 2), "bias": True, "norm": True, "pad_tokens_to": 4}
BY_CHANNEL = {"ratios": ((2, 2),), "pixels": torch.uint8, "scale": [0.1, 0.2, 0.3]}


@pytest.mark.parametrize("options, route", [(FULL, "library"), (FULL, "torch"), ({"ratios": (3,), "ids": 9}, "reference"), (BY_CHANNEL, "library")])
def test_a_step_is_linear_in_the_number_of_images_and_its_ops_are_constant(options, route, device, launches):
    with ROUTES[route]():
        one, sixteen = (counted(make(device, **options | {"ratios": options["ratios"] * n})) for n in (1, 16))
    names = [name for name, _ in launches]
    assert sixteen.ops == one.ops
    assert len(names) % 2 == 0 and names[: len(names) // 2] == names[len(names) // 2 :]
    assert one.bytes < sixteen.bytes <= 16.5 * one.bytes


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion on the device ends its context")
@pytest.mark.parametrize("route", [*ROUTES, "compiled"])
def test_a_ratio_without_a_place_fails_an_assertion_where_nobody_looks_at_it(route, device, request):
    call = make(device, **SMALL).only().replaced(aspect_ratio=torch.tensor([[1, 2], [2, 2]]))
    if route == "compiled":
        run, route = torch.compile(lambda tensors: call.run(tensors), fullgraph=True, backend="eager"), "torch"
    else:
        run = call.run
        request.getfixturevalue("values_on_a_device")
    with ROUTES[route](), pytest.raises(RuntimeError, match="aspect_ratio"):
        run(call.tensors)


@pytest.mark.parametrize("route", ["reference", "library"])
def test_a_backward_multiplies_for_weight_and_pixels_alone(route, device, launches):
    call = make(device, **SMALL, **EVERYTHING)
    with ROUTES[route]():
        for names in (["weight"], ["images"], ["weight", "images"], ["gate", "bias"], ["norm_weight"], ["cls", "pre_pos"]):
            part = call.only(*names)
            y = part()
            launches.clear()
            with Counted() as seen:
                part.grads(y)
            assert sum(seen.ops[op] for op in ("matmul", "mm", "bmm", "convolution_backward")) == len({"weight", "images"} & {*names}), names
            assert ("norm_bwd_kernel" in dict(launches)) == (route == "library"), names


@pytest.mark.parametrize("route", ["reference", "library"])
@pytest.mark.parametrize("norm", [False, True])
def test_nothing_new_is_saved_but_what_the_norm_was_given(norm, route, device):
    call = make(device, norm=norm, pad_tokens_to=8, bias=True)
    own = {t.untyped_storage().data_ptr() for t in call.tensors.values() if t is not None}

    def saved(call):
        """(the result, the storages that are kept, the shapes of those that are no argument's). A number weighs nothing."""
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            (y,) = call()
        held = {t.untyped_storage().data_ptr(): tuple(t.shape) for t in kept if t.numel() and t.untyped_storage().nbytes() > 8}
        return y, held.keys(), [shape for at, shape in held.items() if at not in own]

    with ROUTES[route]():
        y, _, fresh = saved(call)
        assert fresh == ([(12, 16, 20), (2, y[..., 0].numel())] if norm else [])
        _, held, of_gate = saved(call.only("gate"))
    assert of_gate == fresh
    # 7 GB of pixels at the 90B's size: a gate's gradient needs none of them, and where there is a norm its own gradient does
    assert (call.tensors["images"].untyped_storage().data_ptr() in held) == norm


def test_vmap_over_parameters_by_the_formula(device):
    """An ensemble's positions in one call: the op has no rule of its own for it."""
    call = make(device, **SMALL).only()
    many = torch.randn(3, *call.tensors["local_pos"].shape, device=device)

    def one(local):
        return call.run(call.tensors | {"local_pos": local}, backend="torch")

    torch.testing.assert_close(torch.func.vmap(one)(many), torch.stack([one(local) for local in many]))


def test_cost_counts_each_tensor_once():
    images = torch.empty(5, 4, 3, 28, 42, dtype=torch.uint8, device="meta")
    weight = torch.empty(64, 3, 14, 14, dtype=torch.bfloat16, device="meta")
    cls, local = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64,), (7, 64)))
    table, pre = (torch.empty(4, 4, n, 64, dtype=torch.bfloat16, device="meta") for n in (7, 1))
    pixels, kernel, flops = 5 * 4 * 3 * 28 * 42, 2 * 64 * 588, 2 * 5 * 4 * 6 * 64 * 588
    assert patch_embed_cost(images, weight) == Cost(pixels + kernel + 2 * 20 * 6 * 64, flops)
    tables = {"local_pos": local, "global_pos": table, "pre_pos": pre}
    # Images of up to 4 tiles reach 8 of the 16 entries: the first row and column, and (1, 1). All of a gradient is written.
    held, whole = (2 * 64 * (1 + 7 + entries * (7 + 1)) for entries in (8, 16))
    assert patch_embed_cost(images, weight, cls, **tables, pad_tokens_to=8) == Cost(pixels + kernel + held + 2 * 20 * 8 * 64, flops)
    assert patch_embed_bwd_cost(images, weight, cls, **tables, pad_tokens_to=8) == Cost(pixels + kernel + held + 2 * 20 * 8 * 64 + whole, flops)
    two = 2 * 64 * (1 + 7 + 2 * 7 + 2)  # a pair of tiles takes two of the entries
    small = Cost(2 * 3 * 28 * 42 + kernel + two + 2 * 2 * 7 * 64, flops // 10)
    assert patch_embed_cost(images[:1, :2], weight, cls, **tables) == small
    wide = patch_embed_cost(images, weight, cls, local_pos=local.float())
    assert wide == Cost(pixels + kernel + 2 * 64 + 4 * 7 * 64 + 4 * 20 * 7 * 64, flops)


def test_a_call_that_passed_the_checks_lets_no_other_through(device):
    """What is kept of it must not equal a refused call: 1.0 equals 1, and modes, backends and dtypes change between calls."""
    call = make(device, **SMALL)
    options = {"pad_tokens_to": 1, "scale": 2.0, "append_cls": True}
    want = call(**options)[0]
    assert torch.equal(call(**options)[0], want)
    for more, error in (
        ({"pad_tokens_to": 1.0}, ValueError),
        ({"scale": 2 + 0j}, TypeError),
        ({"scale": [2.0, 2.0]}, ValueError),
        ({"backend": "no"}, ValueError),
    ):
        with pytest.raises(error):
            call(**options | more)
    wide = call.only().replaced(weight=call.tensors["weight"].double())
    with fastfuse.backend("triton"):
        with torch.autocast(device, torch.bfloat16):
            wide(**options)
        with pytest.raises(fastfuse.Unsupported, match=r"weight is torch\.float64"):
            wide(**options)
    with pytest.raises(ValueError, match=r"local_pos is torch\.int64"):
        call.only().replaced(local_pos=call.tensors["local_pos"].long())(**options)
    assert torch.equal(call(**options)[0], want)
