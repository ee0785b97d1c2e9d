"""DoRALinear, against float64, and against values that torchtune 0.6.1 gave for the same seeds."""

import contextlib
import copy
import sys
import threading

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from reference import DTYPES
from test_peft import BASES, QUANTIZED, Tripled, check_against_float64, is_nf4, layer, leaves_of
from torch import nn
from torch.nn import functional as F

from fastfuse.modules.peft import DoRALinear, LoRALinear, dora, get_adapter_params, norms_kept
from fastfuse.ops.low_rank import keep_mask


def dora_layer(base="nf4", dtype=torch.float32, **kwargs) -> DoRALinear:
    return layer(base, dtype, cls=DoRALinear, **kwargs)


def tensors(m) -> dict[str, torch.Tensor]:
    """The layer's parameters with a dense weight."""
    return dict(m.named_parameters()) | {"weight": m.weight.get_original_weight() if is_nf4(m) else m.weight}


def merged(m, dtype: torch.dtype) -> torch.Tensor:
    t = {name: p.detach().to(dtype) for name, p in tensors(m).items()}
    return t["weight"] + 2.0 * t["lora_b.weight"] @ t["lora_a.weight"]


def eager(m, t, scaling, x):
    """torchtune's formula: the norm gets no gradient, m scales the bias too."""
    base = F.linear(x, t["weight"], t.get("bias"))
    delta = F.linear(F.linear(x, t["lora_a.weight"]), t["lora_b.weight"])
    length = (t["weight"] + scaling * (t["lora_b.weight"] @ t["lora_a.weight"])).norm(dim=1)
    m = t["magnitude"] / length.detach()
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


@pytest.mark.parametrize("base, use_bias, dtype", [(base, i > j, dtype) for i, base in enumerate(BASES) for j, dtype in enumerate(DTYPES)])
def test_forward_and_gradients(base, use_bias, dtype):
    m = dora_layer(base, dtype, use_bias=use_bias)
    check_against_float64(m, torch.randn(7, m.in_dim, dtype=dtype), eager)


@pytest.mark.parametrize("base, dtype", [("nf4", DTYPES[0]), ("nf4 by 200", DTYPES[1]), ("nf4", DTYPES[2])])
def test_kernels(base, dtype, kernels, device):
    m = dora_layer(base, dtype, use_bias=True).to(device)
    check_against_float64(m, torch.randn(5, m.in_dim, dtype=dtype, device=device), eager)


@pytest.mark.parametrize("base, dtype", [*zip(BASES, DTYPES, strict=True), ("nf4", torch.float32)])
def test_initial_magnitude_makes_it_lora(base, dtype):
    m, twin = dora_layer(base, dtype, use_bias=True), layer(base, dtype, use_bias=True)
    m.initialize_dora_magnitude()
    twin.load_state_dict({k: v for k, v in m.state_dict().items() if k != "magnitude"})
    x = torch.randn(5, m.in_dim, dtype=dtype)
    assert_no_worse(m.magnitude, merged(m, dtype).norm(dim=1), merged(m, torch.float64).norm(dim=1))
    assert_rounding_apart(m(x), twin(x), K=m.in_dim, products=3)


def test_norms_in_chunks_equal_norms_at_once(monkeypatch):
    m = dora_layer("dense")
    for chunk in (1, 64, 64 * 7, 1 << 22):
        monkeypatch.setattr(sys.modules["fastfuse.ops.lora_row_norms"], "_CHUNK", chunk)
        torch.testing.assert_close(m._norms(torch.float64), merged(m, torch.float64).norm(dim=1))


def test_hooked_factors_are_called_for_the_norm_too(monkeypatch):
    """FSDP gathers a factor's shards in a hook: the norm must be that of what calling gives, in any number of chunks."""
    plain, x = dora_layer(use_bias=True), torch.randn(5, 64)
    hooked = copy.deepcopy(plain)
    for m in (hooked.lora_a, hooked.lora_b):
        m.register_forward_pre_hook(lambda module, args: None)
    for chunk in (dora._CHUNK, 1, 256 * 5):
        monkeypatch.setattr(dora, "_CHUNK", chunk)
        assert_rounding_apart(hooked(x), plain(x), K=64, products=3)
    hooked.lora_a = Tripled(hooked.lora_a)
    with torch.no_grad():
        plain.lora_a.weight.mul_(3)
    assert_rounding_apart(hooked(x), plain(x), K=64, products=3)


def test_dropout():
    m, x = dora_layer(dropout=0.5, use_bias=True), torch.randn(6, 64)
    torch.manual_seed(5)
    got = m(x)
    torch.manual_seed(5)
    mask = keep_mask(torch.randint(2**62, (1,))[0], 0.5, 6, 64) / 0.5
    scale, base = m.magnitude / m._norms(torch.float32), F.linear(x, m.weight.get_original_weight(), m.bias)
    for y, dropped in ((got, x * mask), (m.eval()(x), x)):
        assert_rounding_apart(y, scale * (base + 2.0 * m.lora_b(m.lora_a(dropped))), K=64, products=3)


@pytest.fixture
def norms_computed(monkeypatch):
    calls, real = [], dora.lora_row_norms
    monkeypatch.setattr(dora, "lora_row_norms", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def test_norms_are_kept_while_nothing_moves(norms_computed):
    m, other, x = dora_layer(), dora_layer(), torch.randn(3, 64)
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
            assert_rounding_apart(got, eager(m, tensors(m), m.scaling, x), K=64, products=3)


@pytest.mark.parametrize("case", ["outside", "with gradients", "another thread"])
def test_norms_are_computed_anew(case, norms_computed):
    """What writes through .data leaves no trace: only who says so has norms kept."""
    m, x, results = dora_layer(), torch.randn(3, 64), []

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
    assert_rounding_apart(results[0], eager(m, tensors(m), m.scaling, x), K=64, products=3)


def test_state():
    m, other, x = dora_layer(use_bias=True), dora_layer(use_bias=True), torch.randn(3, 64)
    adapter = {"lora_a.weight", "lora_b.weight", "magnitude"}
    assert set(m.state_dict()) == {"weight", "bias", *adapter} and set(get_adapter_params(m)) == adapter == set(m.adapter_params())
    assert m.magnitude.shape == (256,) and m.scaling == 2.0 and not any(hasattr(m, name) for name in ("rank", "alpha", "merged"))
    assert m.adapter_params() is not m.adapter_params() and not isinstance(m, LoRALinear)
    other.load_state_dict(m.state_dict())
    for twin in (copy.deepcopy(m), other):
        assert torch.equal(m(x), twin(x))


@pytest.mark.parametrize("requires_grad", [True, False])
def test_to_empty_keeps_the_magnitude_object(requires_grad):
    with torch.device("meta"):
        m = DoRALinear(64, 96, 4, 8.0)
    magnitude = m.magnitude.requires_grad_(requires_grad)
    assert m.to_empty(device="cpu") is m and m.magnitude is magnitude and m.weight.is_meta
    assert not magnitude.is_meta and magnitude.requires_grad == requires_grad and isinstance(magnitude, nn.Parameter)


@pytest.mark.parametrize("on_meta", ["weight", "lora_a", "lora_b"])
def test_magnitude_of_weights_on_meta(on_meta):
    m = DoRALinear(64, 96, 4, 8.0)
    if on_meta == "weight":
        m.weight = nn.Parameter(m.weight.detach().to("meta"))
    else:
        getattr(m, on_meta).to("meta")
    with pytest.raises(RuntimeError, match="Cannot initialize DoRA magnitude if base or LoRA parameters are still on meta device"):
        m.initialize_dora_magnitude()


@pytest.mark.parametrize("case, backend", [("dense", "aot_eager"), ("nf4", "inductor"), ("nf4 by 200", "aot_eager"), ("nf4 hook", "inductor")])
def test_compile_fullgraph(case, backend):
    torch._dynamo.reset()
    m = dora_layer(case.removesuffix(" hook"), use_bias=True)
    if case == "nf4 hook":
        m.lora_a.register_forward_hook(lambda module, args, out: 3 * out)
    x, dy = torch.randn(5, m.in_dim, requires_grad=True), torch.randn(5, m.out_dim)
    results = []
    for run in (torch.compile(m, fullgraph=True, backend=backend), m):
        y = run(x)
        results.append((y, *torch.autograd.grad(y, list(leaves_of(m, x).values()), dy)))
    for got, want in zip(*results, strict=True):
        assert_rounding_apart(got, want, m.in_dim, products=3)
