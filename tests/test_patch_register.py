"""register_host: patch for modules of one's own."""

import contextlib

import pytest
import torch
from numerics import assert_rounding_apart
from qlora import lora
from torch import nn

import fastfuse
from fastfuse import patch, status, unpatch
from fastfuse.patching import hosts
from fastfuse.patching.hosts import _host


class Squarer(nn.Module):
    """A module of the user's own."""

    def __init__(self, power=2):
        super().__init__()
        self.scale, self.power = nn.Parameter(torch.tensor(3.0)), power

    def forward(self, x, *, shift=0.0):
        return self.scale * x**self.power + shift


def squared(module, x, shift=0.0):
    if module.power != 2:
        raise fastfuse.Unsupported(f"power {module.power}", "POWER")
    return module.scale * x * x + shift


@contextlib.contextmanager
def registered(name, op, matches, forward):
    made = fastfuse.register_host(name, op, matches, forward)
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def registration():
    with registered("squarer", "square", lambda module: isinstance(module, Squarer), squared) as made:
        yield made


def test_a_module_of_ones_own(registration):
    model, x = nn.Sequential(Squarer(), Squarer(3), lora("bitsandbytes")), torch.randn(4, 128)
    want, twice = model(x), model[0](x, shift=2.0)
    report = patch(model, ops="square")
    assert [(e.name, e.host, e.op, e.backend) for e in report.patched] == [(name, "squarer", "square", "torch") for name in "01"]
    with pytest.warns(UserWarning, match="POWER: power 3"):
        assert_rounding_apart(model(x), want, K=256, products=3)
    assert_rounding_apart(model[0](x, shift=2.0), twice, K=1)
    assert [dict(e.fallbacks) for e in status(model).entries][:2] == [{}, {"POWER": 1}]
    patch(model)
    assert status(model).counts == {"patched": 6}
    assert unpatch(model).counts == {"restored": 6}
    assert torch.equal(model(x), want)


def test_what_a_removed_host_has_patched_stays_patched_until_it_is_given_back(registration):
    model, x = nn.Sequential(Squarer()), torch.randn(4)
    want = model(x)
    patch(model)
    registration.remove()
    registration.remove()  # nothing left to do
    assert "forward" in model[0].__dict__
    assert_rounding_apart(model(x), want, K=1)
    assert [(e.host, e.status, e.code) for e in status(model).entries] == [("squarer", "patched", "")]
    with pytest.raises(ValueError, match="ops has 'square', known are"):
        patch(model, ops="square")
    assert unpatch(model, ops="square").counts == {"restored": 1}
    assert "forward" not in model[0].__dict__ and "_fastfuse" not in model[0].__dict__
    with pytest.raises(ValueError, match="unpatch: ops has 'square'"):
        unpatch(model, ops="square")


def test_a_host_of_ones_own_comes_before_the_built_in_ones():
    """But does not take over what one of those has patched."""
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    up, want = model.base_model.model.up, model.base_model.model.up(x)
    mine = "doubled", "nf4_lora_linear", lambda module: module is up, lambda module, x: 2 * type(module).forward(module, x)
    for earlier in (False, True):
        if earlier:
            patch(model)
        with registered(*mine):
            entries = [e for e in patch(model, ops="nf4_lora_linear").entries if e.op == "nf4_lora_linear"]
            assert [(e.host, e.status) for e in entries] == ([("PEFT LoRA", "already")] * 2 if earlier else [("doubled", "patched"), ("PEFT LoRA", "patched")])
            assert earlier or torch.equal(up(x), 2 * want)
        unpatch(model)


UNREGISTERED = [
    ("squarer", "other", bool, squared, ValueError, "the name 'squarer' is taken"),
    ("PEFT LoRA", "other", bool, squared, ValueError, "the name 'PEFT LoRA' is taken"),
    ("mine", "other", "Squarer", squared, TypeError, "matches is a str, not callable"),
    ("mine", "other", bool, None, TypeError, "forward is a NoneType, not callable"),
    ("", "other", bool, squared, TypeError, "name is '', not a name"),
    ("mine", 3, bool, squared, TypeError, "op is 3, not a name"),
]


@pytest.mark.parametrize("name, op, matches, forward, error, message", UNREGISTERED)
def test_a_host_that_cannot_be_registered(name, op, matches, forward, error, message, registration):
    with pytest.raises(error, match=message):
        fastfuse.register_host(name, op, matches, forward)


def test_a_renamed_argument_that_only_a_keyword_gives(monkeypatch):
    """A host's module gets it by the name in its own forward's signature: its **others would swallow another one."""

    class Layer(nn.Module):
        def forward(self, x, *, past_key_values=None, **others):
            return x, past_key_values, others

    host = hosts.Host(
        name="renamed", op="renamed", matches=lambda module: isinstance(module, Layer), takes=("x", "cache"), renamed=(("cache", "past_key_values"),),
        fused=lambda module, given, options: _host.Reason("NEVER", "is not fused"), fallback=lambda module, given, options: _host.call_own(module, given),
    )  # fmt: skip
    monkeypatch.setattr(hosts, "BUILT_IN", (host,))
    layer = Layer()
    assert patch(layer).counts == {"patched": 1}
    with pytest.warns(UserWarning, match="NEVER"):
        assert layer(1, past_key_values=2) == (1, 2, {})
    with pytest.warns(UserWarning, match="called with cache, which its forward does not know"):
        assert layer(1, cache=2) == Layer()(1, cache=2) == (1, None, {"cache": 2})
    assert status(layer).fallbacks == {"NEVER": 1, "ARGUMENTS": 1}
