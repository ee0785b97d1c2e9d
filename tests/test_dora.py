"""What is DoRALinear's own: its magnitude and the norms that this is divided by. What it shares with LoRALinear: test_peft.py."""

import contextlib
import copy
import sys
import threading

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from reference import DTYPES
from test_peft import BASES, Tripled, eager, layer, tensors_of
from torch import nn

from fastfuse.modules.peft import DoRALinear, dora, norms_kept


def dora_layer(base="nf4", dtype=torch.float32, **kwargs):
    return layer(base, dtype, cls=DoRALinear, **kwargs)


def merged(m, dtype):
    t = {name: p.detach().to(dtype) for name, p in tensors_of(m, m.magnitude, m.magnitude.dtype).items()}
    return t["weight"] + 2.0 * t["lora_b.weight"] @ t["lora_a.weight"]


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
            assert_rounding_apart(got, eager(tensors_of(m, x, x.dtype), m.scaling), K=64, products=3)


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
    assert_rounding_apart(results[0], eager(tensors_of(m, x, x.dtype), m.scaling), K=64, products=3)


@pytest.mark.parametrize("requires_grad", [True, False])
def test_to_empty_keeps_the_magnitude_object(requires_grad):
    magnitude = (m := DoRALinear(64, 96, 4, 8.0).to("meta")).magnitude.requires_grad_(requires_grad)
    assert m.to_empty(device="cpu").magnitude is magnitude and isinstance(magnitude, nn.Parameter)
    assert not magnitude.is_meta and magnitude.requires_grad == requires_grad


def test_magnitude_of_weights_on_meta():
    for part in ("weight", "lora_a.weight", "lora_b.weight"):
        m = DoRALinear(64, 96, 4, 8.0)
        owner = m.get_submodule(part.removesuffix("weight").strip("."))
        owner.weight = nn.Parameter(owner.weight.detach().to("meta"))
        with pytest.raises(RuntimeError, match="Cannot initialize DoRA magnitude if base or LoRA parameters are still on meta device"):
            m.initialize_dora_magnitude()


def test_a_forgotten_magnitude_shows():
    assert DoRALinear(8, 6, rank=2, alpha=4.0)(torch.randn(1, 8)).isnan().all()
