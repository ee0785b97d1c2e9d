"""DoRALinear, against float64, and against values that torchtune 0.6.1 gave for the same seeds."""

import contextlib
import copy
import sys
import threading

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from test_peft import BASES, DTYPES, QUANTIZED, Tripled, check_against_float64, is_nf4, layer, leaves_of
from torch import nn
from torch.nn import functional as F

from fastfuse.modules.peft import DoRALinear, LoRALinear, dora, get_adapter_params, norms_kept
from fastfuse.ops.low_rank import keep_mask


def eager(m, t, scaling, x):
    """torchtune's formula: the norm gets no gradient, m scales the bias too."""
    base = F.linear(x, t["weight"], t.get("bias"))
    delta = F.linear(F.linear(x, t["lora_a.weight"]), t["lora_b.weight"])
    merged = t["weight"] + scaling * (t["lora_b.weight"] @ t["lora_a.weight"])
    m = t["magnitude"] / merged.norm(dim=1).detach()
    return (m - 1) * base + m * delta * scaling + base


TORCHTUNE = [
    ({}, 0.400817, [1.412108, 0.310481, -1.838605], -11.083),
    ({"use_bias": True}, 0.015317, [-1.51578, -0.893195, 2.475454], 49.66),
    ({"quantize_base": True}, 0.400817, [1.420063, 0.266369, -1.853422], -11.262),
    (QUANTIZED, 0.015317, [-1.515013, -0.922822, 2.461205], 49.23),
    ({"dropout": 0.25}, 0.400817, [1.412108, 0.310481, -1.838605], -11.083),
]


@pytest.mark.parametrize("kwargs, after, y, total", TORCHTUNE)
def test_torchtunes_values(kwargs, after, y, total):
    torch.manual_seed(7)
    m = DoRALinear(64, 256, 4, 16.0, **kwargs).eval()
    assert torch.rand(1).item() == pytest.approx(after, abs=1e-6)
    with torch.no_grad():
        m.lora_b.weight.copy_(torch.linspace(-1, 1, 1024).view(256, 4))
        m.initialize_dora_magnitude()
        m.magnitude.mul_(torch.linspace(0.5, 1.5, 256))
    got = m(torch.linspace(-1, 1, 128).view(2, 64))
    # y has six decimals; the sums over K = 64 round in another order on another machine.
    torch.testing.assert_close(got[1, ::100], torch.tensor(y), atol=5e-7 + 64**0.5 * torch.finfo(torch.float32).eps * max(map(abs, y)), rtol=0)
    assert got.sum().item() == pytest.approx(total, abs=2e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_forward_and_gradients(base, use_bias, dtype):
    m = layer(base, dtype, cls=DoRALinear, use_bias=use_bias)
    check_against_float64(m, torch.randn(7, m.in_dim, dtype=dtype), eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["nf4", "nf4 by 200"])
def test_kernels(base, dtype, kernels, device):
    m = layer(base, dtype, cls=DoRALinear, use_bias=True).to(device)
    check_against_float64(m, torch.randn(5, m.in_dim, dtype=dtype, device=device), eager)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", BASES)
def test_initial_magnitude_makes_it_lora(base, dtype):
    m = layer(base, dtype, cls=DoRALinear, use_bias=True)
    m.initialize_dora_magnitude()
    twin = layer(base, dtype, use_bias=True)
    twin.load_state_dict({k: v for k, v in m.state_dict().items() if k != "magnitude"})
    x = torch.randn(5, m.in_dim, dtype=dtype)
    w = m.weight.get_original_weight() if is_nf4(m) else m.weight
    scaled = 2.0 * m.lora_b.weight @ m.lora_a.weight
    eager_norm = (w + scaled).norm(dim=1)
    assert_no_worse(m.magnitude, eager_norm, (w.double() + 2.0 * m.lora_b.weight.double() @ m.lora_a.weight.double()).norm(dim=1))
    assert_rounding_apart(m(x), twin(x), K=m.in_dim, products=3)


def test_norms_in_chunks_equal_norms_at_once(monkeypatch):
    m = layer("dense", cls=DoRALinear)
    want = m._norms(torch.float64)
    for chunk in (1, 64, 64 * 7, 1 << 22):
        monkeypatch.setattr(sys.modules["fastfuse.ops.lora_row_norms"], "_CHUNK", chunk)
        torch.testing.assert_close(m._norms(torch.float64), want)
    exact = m.weight.double() + 2.0 * m.lora_b.weight.double() @ m.lora_a.weight.double()
    torch.testing.assert_close(want, exact.norm(dim=1).detach())


def test_hooked_factors_are_called_for_the_norm_too(monkeypatch):
    """FSDP gathers a factor's shards in a hook: the norm must be that of what calling gives, in any number of chunks."""
    plain, hooked = layer("nf4", cls=DoRALinear, use_bias=True), None
    hooked = copy.deepcopy(plain)
    for m in (hooked.lora_a, hooked.lora_b):
        m.register_forward_pre_hook(lambda module, args: None)
    x = torch.randn(5, 64)
    want = plain(x)
    assert_rounding_apart(hooked(x), want, K=64, products=3)
    for chunk in (1, 256 * 5):
        monkeypatch.setattr(dora, "_CHUNK", chunk)
        assert_rounding_apart(hooked(x), want, K=64, products=3)
    hooked.lora_a = Tripled(hooked.lora_a)
    with torch.no_grad():
        plain.lora_a.weight.mul_(3)
    assert_rounding_apart(hooked(x), plain(x), K=64, products=3)


def test_no_gradient_through_the_norm():
    """d magnitude alone sees the norm: scaling magnitude scales y, and dy/dA is m s B^T dy x."""
    m = layer("dense", cls=DoRALinear)
    x, dy = torch.randn(5, 64), torch.randn(5, 96)
    (da,) = torch.autograd.grad(m(x), m.lora_a.weight, dy)
    scale = (m.magnitude / m._norms(torch.float32)).detach()
    torch.testing.assert_close(da, 2.0 * ((dy * scale) @ m.lora_b.weight).T @ x)


def test_dropout():
    m = layer("nf4", cls=DoRALinear, dropout=0.5, use_bias=True)
    x = torch.randn(6, 64)
    torch.manual_seed(5)
    got = m(x)
    torch.manual_seed(5)
    mask = keep_mask(torch.randint(2**62, (1,))[0], 0.5, 6, 64) / 0.5
    scale = m.magnitude / m._norms(torch.float32)
    base = F.linear(x, m.weight.get_original_weight(), m.bias)
    assert_rounding_apart(got, scale * (base + 2.0 * m.lora_b(m.lora_a(x * mask))), K=64, products=3)
    m.eval()
    assert_rounding_apart(m(x), scale * (base + 2.0 * m.lora_b(m.lora_a(x))), K=64, products=3)


@pytest.fixture
def norms_computed(monkeypatch):
    calls, real = [], dora.lora_row_norms
    monkeypatch.setattr(dora, "lora_row_norms", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def test_norms_are_kept_while_nothing_moves(norms_computed):
    m, other, x = layer("nf4", cls=DoRALinear), layer("nf4", cls=DoRALinear), torch.randn(3, 64)
    norms_computed.clear()  # of the magnitude's first values
    with torch.no_grad(), norms_kept():
        first = m(x)
        assert torch.equal(m(x), first) and len(norms_computed) == 1
        m(x.half())
        assert len(norms_computed) == 2  # W is decoded in x's dtype
        m(x)
        for change in (
            lambda: m.lora_a.weight.mul_(1.5),
            lambda: m.lora_b.weight.add_(0.5),
            lambda: setattr(m, "scaling", 3.0),
            lambda: setattr(m.lora_a, "weight", nn.Parameter(m.lora_a.weight * 2)),
            lambda: setattr(m, "weight", other.weight),
        ):
            before = len(norms_computed)
            change()
            got = m(x)
            assert len(norms_computed) == before + 1
            t = dict(m.named_parameters()) | {"weight": m.weight.get_original_weight()}
            assert_rounding_apart(got, eager(m, t, m.scaling, x), K=64, products=3)


@pytest.mark.parametrize("case", ["outside", "with gradients", "another thread"])
def test_norms_are_computed_anew(case, norms_computed):
    """What writes through .data leaves no trace: only who says so has norms kept."""
    m, x, results = layer("nf4", cls=DoRALinear), torch.randn(3, 64), []

    def twice():
        with contextlib.nullcontext() if case == "with gradients" else torch.no_grad():
            m(x)
            m.lora_b.weight.data.mul_(3.0)
            results.append(m(x))

    with contextlib.nullcontext() if case == "outside" else norms_kept():
        if case == "another thread":
            thread = threading.Thread(target=twice)
            thread.start()
            thread.join()
        else:
            twice()
    t = dict(m.named_parameters()) | {"weight": m.weight.get_original_weight()}
    assert_rounding_apart(results[0], eager(m, t, m.scaling, x), K=64, products=3)


def test_layouts_of_x():
    for base in BASES:
        m = layer(base, cls=DoRALinear)
        K = m.in_dim
        for x in (torch.randn(6, 2 * K)[:, ::2], torch.randn(2, 3, K), torch.randn(1, K).expand(6, K), torch.randn(K)):
            want = m(x.contiguous().view(-1, K)).view(*x.shape[:-1], -1)
            assert_rounding_apart(m(x), want, K, products=2)
            assert m(x).shape == (*x.shape[:-1], m.out_dim)
        assert m(torch.empty(2, 0, K)).shape == (2, 0, m.out_dim)


def test_state():
    m = layer("nf4", cls=DoRALinear, use_bias=True)
    assert set(m.state_dict()) == {"weight", "bias", "magnitude", "lora_a.weight", "lora_b.weight"}
    assert m.magnitude.shape == (256,) and m.scaling == 2.0 and not hasattr(m, "rank") and not hasattr(m, "alpha") and not hasattr(m, "merged")
    assert set(get_adapter_params(m)) == {"lora_a.weight", "lora_b.weight", "magnitude"} == set(m.adapter_params())
    assert m.adapter_params() is not m.adapter_params()
    assert not isinstance(m, LoRALinear)
    twin = copy.deepcopy(m)
    x = torch.randn(3, 64)
    assert torch.equal(m(x), twin(x))
    other = layer("nf4", cls=DoRALinear, use_bias=True)
    other.load_state_dict(m.state_dict())
    assert torch.equal(m(x), other(x))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_to_empty_keeps_the_magnitude_object(requires_grad):
    with torch.device("meta"):
        m = DoRALinear(64, 96, 4, 8.0)
    m.magnitude.requires_grad_(requires_grad)
    magnitude = m.magnitude
    assert m.to_empty(device="cpu") is m
    assert m.magnitude is magnitude and not magnitude.is_meta and magnitude.requires_grad == requires_grad and isinstance(magnitude, nn.Parameter)
    assert m.weight.is_meta


@pytest.mark.parametrize("on_meta", ["weight", "lora_a", "lora_b"])
def test_magnitude_of_weights_on_meta(on_meta):
    m = DoRALinear(64, 96, 4, 8.0)
    if on_meta == "weight":
        m.weight = nn.Parameter(m.weight.detach().to("meta"))
    else:
        getattr(m, on_meta).to("meta")
    with pytest.raises(RuntimeError, match="Cannot initialize DoRA magnitude if base or LoRA parameters are still on meta device"):
        m.initialize_dora_magnitude()


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", ["dense", "nf4", "nf4 by 200", "nf4 hook"])
def test_compile_fullgraph(case, backend):
    torch._dynamo.reset()
    m = layer(case if case in BASES else "nf4", cls=DoRALinear, use_bias=True)
    if case == "nf4 hook":
        m.lora_a.register_forward_hook(lambda module, args, out: 3 * out)
    x = torch.randn(5, m.in_dim, requires_grad=True)
    leaves = leaves_of(m, x)
    dy = torch.randn(5, m.out_dim)
    want = m(x)
    want_grads = torch.autograd.grad(want, list(leaves.values()), dy)
    y = torch.compile(m, fullgraph=True, backend=backend)(x)
    assert_rounding_apart(y, want, m.in_dim, products=3)
    y.backward(dy)
    for leaf, grad in zip(leaves.values(), want_grads, strict=True):
        assert_rounding_apart(leaf.grad, grad, m.in_dim, products=3)
