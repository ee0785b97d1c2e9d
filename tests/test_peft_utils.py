"""What a training recipe does with adapters: find, freeze, disable, check, save and merge them."""

import contextlib

import pytest
import torch
from test_peft import BASES, is_nf4, layer
from torch import nn
from torch.nn import functional as F

from fastfuse.errors import InvalidArgument
from fastfuse.modules.peft import (
    AdapterModule,
    DoRALinear,
    LoRALinear,
    disable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    get_lora_module_names,
    get_merged_lora_ckpt,
    set_trainable_params,
    validate_missing_and_unexpected_for_lora,
)

KINDS = [LoRALinear, DoRALinear]


class Block(nn.Module):
    """Two adapted layers and a plain one; of plain ones alone without `cls`."""

    def __init__(self, cls=LoRALinear, **kwargs):
        super().__init__()
        adapter = (4, 8.0) if cls else ()
        made = cls or nn.Linear
        self.q_proj = made(32, 32, *adapter, **kwargs)
        self.k_proj = nn.Linear(32, 32)
        self.output = made(32, 16, *adapter, **kwargs)
        for m in (self.q_proj, self.output) if cls else ():
            nn.init.normal_(m.lora_b.weight)
            if cls is DoRALinear:
                m.initialize_dora_magnitude()
                nn.init.uniform_(m.magnitude, 0.5, 1.5)

    def forward(self, x):
        return self.output(self.q_proj(x) + self.k_proj(x))


def cloned(state):
    return {k: v.clone() for k, v in state.items()}


ADAPTER = ["q_proj.lora_a.weight", "q_proj.lora_b.weight", "output.lora_a.weight", "output.lora_b.weight"]


def test_get_adapter_params():
    model = Block()
    found = get_adapter_params(model)
    assert list(found) == ADAPTER and all(found[n] is p for n, p in model.named_parameters() if n in found)
    assert list(get_adapter_params(model.q_proj)) == ["lora_a.weight", "lora_b.weight"]
    assert get_adapter_params(nn.Linear(2, 2)) == {}
    model.q_proj.adapter_params().clear()
    assert model.q_proj.adapter_params() == ["lora_a.weight", "lora_b.weight"]
    assert isinstance(model.q_proj, AdapterModule) and not isinstance(model.k_proj, AdapterModule)


def test_get_adapter_params_of_a_name_that_is_not_there():
    model, root = Block(), LoRALinear(4, 4, 2, 1.0)
    model.k_proj.adapter_params = lambda: ["weight", "nothing"]
    with pytest.raises(AssertionError, match=r"Adapter params \['nothing'\] not converted: k_proj has no"):
        get_adapter_params(model)
    root.adapter_params = lambda: ["x"]
    with pytest.raises(InvalidArgument, match="the model has no"):
        get_adapter_params(root)


@pytest.mark.parametrize("kind", [dict, set])
def test_set_trainable_params(kind):
    model = Block(use_bias=True)
    for names in (get_adapter_params(model), dict.fromkeys(["k_proj.bias"])):
        set_trainable_params(model, kind(names))
        assert {n for n, p in model.named_parameters() if p.requires_grad} == set(names)


def test_get_adapter_state_dict():
    state = Block(DoRALinear).state_dict()
    got = get_adapter_state_dict(state)
    assert set(got) == {k for k in state if "lora" in k or "magnitude" in k} and len(got) == 6
    assert all(torch.equal(v, state[k]) for k, v in got.items())
    assert all(v.is_meta for v in get_adapter_state_dict(state, device="meta").values())


def test_get_lora_module_names():
    attn = ["q_proj", "v_proj"]
    assert get_lora_module_names(attn, False, True) == [*attn, "output"]
    assert get_lora_module_names(attn, True, False) == [*attn, "w1", "w2", "w3"]
    assert attn == ["q_proj", "v_proj"], "the caller's list stays as it is"


@pytest.mark.parametrize("cls", KINDS)
def test_merged_equals_unmerged(cls):
    """A model, and a layer that is the root."""
    for model, plain, *sizes in ((Block(cls), Block(None, bias=False), 4, 8.0), (layer("dense", cls=cls), nn.Linear(64, 96, bias=False), 8, 16.0)):
        state = cloned(model.state_dict())
        assert get_merged_lora_ckpt(state, *sizes) is state
        plain.load_state_dict(state)
        x = torch.randn(5, next(plain.parameters()).shape[1])
        torch.testing.assert_close(plain(x), model(x))


@pytest.mark.parametrize("dora", [False, True])
def test_what_a_merge_makes(dora):
    """LoRA's sum goes into the tensor itself, in its dtype; DoRA's is a new tensor in the adapter's."""
    weight, bias, a, b, magnitude = torch.randn(16, 8).bfloat16(), torch.randn(16), torch.randn(2, 8), torch.randn(16, 2), torch.rand(16)
    state, before = {"m.weight": weight, "m.bias": bias, "m.lora_a.weight": a, "m.lora_b.weight": b}, weight.clone()
    merged = get_merged_lora_ckpt(state | ({"m.magnitude": magnitude} if dora else {}), 2, 3.0)
    assert list(merged) == ["m.weight", "m.bias"] and merged["m.bias"] is bias and (merged["m.weight"] is weight) != dora
    assert merged["m.weight"].dtype == (torch.float32 if dora else torch.bfloat16)
    assert torch.equal(weight, before if dora else (before.float() + 1.5 * b @ a).bfloat16())


def test_merging_into_nf4_is_refused_before_anything_changes():
    model, x = nn.Sequential(layer("dense"), layer("nf4")), torch.randn(3, 64)
    state = model.state_dict()
    before = {k: v if "1." in k else v.clone() for k, v in state.items()}
    with pytest.raises(NotImplementedError, match=r"1\.weight is an NF4Tensor.*\.to\(torch\.bfloat16\)"):
        get_merged_lora_ckpt(state, 8, 16.0)
    assert list(state) == list(before) and torch.equal(state["0.weight"], before["0.weight"])
    state["1.weight"] = state["1.weight"].to(torch.float32)
    torch.testing.assert_close(F.linear(x, get_merged_lora_ckpt(state, 8, 16.0)["1.weight"]), model[1](x))
    dora = layer("nf4", cls=DoRALinear)  # gets a dense weight
    torch.testing.assert_close(F.linear(x, get_merged_lora_ckpt(dora.state_dict(), 8, 16.0)["weight"]), dora(x))


UNMERGED = [
    ("m.lora_b.weight", {}, 2, KeyError, "m.lora_a.weight is there without m.lora_b.weight"),
    ("m.weight", {}, 2, KeyError, "is there without m.weight"),
    (None, {"m.lora_gate_a": torch.ones(1)}, 2, KeyError, "m.lora_gate_a is no part of a LoRA or DoRA linear layer"),
    (None, {}, 0, ValueError, "rank is 0"),
    (None, {}, 3, ValueError, r"rank is 3, m\.lora_a\.weight has rank 2"),
]


@pytest.mark.parametrize("drop, add, rank, error, message", UNMERGED)
def test_a_merge_that_is_refused_changes_nothing(drop, add, rank, error, message):
    state = {"m.weight": torch.ones(4, 4), "m.lora_a.weight": torch.ones(2, 4), "m.lora_b.weight": torch.ones(4, 2)} | add
    state.pop(drop, None)
    before = cloned(state)
    with pytest.raises(error, match=message):
        get_merged_lora_ckpt(state, rank, 1.0)
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


def test_merging_with_barriers(monkeypatch):
    count = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: count.append(1))
    state = Block().state_dict()
    get_merged_lora_ckpt(state, 4, 8.0, use_distributed_barriers=True)
    assert len(count) == 3 and "q_proj.lora_a.weight" not in state


@pytest.mark.parametrize("cls", KINDS)
@pytest.mark.parametrize("base", BASES)
def test_disabled_is_the_base(base, cls):
    m = layer(base, cls=cls, use_bias=True, dropout=0.5)
    w, x = m.weight.get_original_weight() if is_nf4(m) else m.weight, torch.randn(4, m.in_dim)
    with disable_adapter(m):
        assert m.disabled is True
        torch.testing.assert_close(m(x), F.linear(x, w, m.bias))
    assert m.disabled is False


def test_disable_adapter_puts_back_what_was():
    model = Block()
    model.output.disabled = True
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(model):
        assert model.q_proj.disabled and model.output.disabled and not hasattr(model.k_proj, "disabled")
        with disable_adapter(model):
            pass
        assert model.q_proj.disabled, "the inner block must not switch the adapter on"
        raise RuntimeError("inside")
    assert model.q_proj.disabled is False and model.output.disabled is True


KEYS = ["q_proj.weight", "k_proj.weight", "q_proj.lora_a.weight", "q_proj.lora_b.weight", "q_proj.magnitude"]
BASE, ADAPTED = KEYS[:2], KEYS[2:]
REPORTED = [
    ({"base_missing": ADAPTED, "lora_missing": BASE}, None),
    ({}, None),
    ({"base_missing": [*ADAPTED, "k_proj.weight"], "lora_missing": BASE}, "Missing non-LoRA key k_proj.weight from base model dict"),
    ({"lora_missing": [*BASE, "q_proj.lora_b.weight"]}, "Missing LoRA key q_proj.lora_b.weight from adapter state dict"),
    ({"lora_missing": ["q_proj.magnitude"]}, "Missing LoRA key q_proj.magnitude"),
    ({"base_missing": ["q_proj.weight"], "lora_missing": ["q_proj.weight"]}, "Missing non-LoRA key q_proj.weight"),
    ({"base_unexpected": ["extra"]}, "Unexpected key loading base model: extra"),
    ({"lora_unexpected": ["extra"]}, "Unexpected key loading adapter: extra"),
]


@pytest.mark.parametrize("reported, message", REPORTED)
def test_validate(reported, message):
    """By the keys, and by the builder's arguments; the error is torchtune's last source's, and its last release's."""
    for args, kwargs in (((), {"state_dict_keys": KEYS}), ((["q_proj"], False, False), {})):
        deprecated = pytest.warns(FutureWarning, match="(lora_attn_modules|apply_lora_to_mlp|apply_lora_to_output) is deprecated")
        for kind in (RuntimeError, AssertionError):
            refused = pytest.raises(kind, match=message) if message else contextlib.nullcontext()
            with refused, deprecated if args else contextlib.nullcontext():
                validate_missing_and_unexpected_for_lora(*args, **kwargs, **reported)


def test_validate_names_every_key_and_what_is_unknown():
    with pytest.raises(RuntimeError) as e:
        validate_missing_and_unexpected_for_lora(state_dict_keys=KEYS, base_missing=BASE, lora_missing=ADAPTED)
    assert str(e.value).startswith("Missing keys when validating state dict: \n- ") and all(k in str(e.value) for k in KEYS)
    with pytest.raises(RuntimeError, match="Unexpected key found missing: other"):
        validate_missing_and_unexpected_for_lora(state_dict_keys=KEYS, base_missing=["other"], lora_missing=["other"])
    with pytest.raises(AssertionError, match="state_dict_keys is None, and so is apply_lora_to_mlp, apply_lora_to_output"), pytest.warns(FutureWarning):
        validate_missing_and_unexpected_for_lora(["q_proj"])
