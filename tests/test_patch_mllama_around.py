"""patch(model) over transformers' Mllama, beyond what test_hosts.py asks of it: who else looks at the mask, its vision model, other versions, QLoRA."""

import copy
import inspect
import warnings
from types import MethodType

import mllama
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from hosts import assert_as_before, attention_of, conversations, with_forward
from hosts import model as model
from hosts import shared as shared
from numerics import in_several_orders
from reference import assert_gradients_no_worse
from torch import nn
from transformers.models.mllama import modeling_mllama

import fastfuse
from fastfuse import patch, status
from fastfuse.ops import EncoderMask

TEXT = "model.language_model"
ATTENTION = f"{TEXT}.layers.1.cross_attn"
ONE = [["coffee"]]


@pytest.mark.parametrize("left_out", ["*language_model", "*layers.1.cross_attn", "model"])
def test_half_patched_is_dense_and_right(model, left_out):
    call = conversations(side="left")
    want = model(**call).logits
    patch(model, exclude=left_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(**call).logits, want)
    found = status(model).fallbacks
    assert found["DENSE_MASK"] == (1 if "cross_attn" in left_out else 2) and ("HALF_PATCHED" in found) == (left_out != "model")


# Who else looks at the mask


@pytest.mark.parametrize("path", [TEXT, f"{TEXT}.layers.0", f"{TEXT}.layers.1", ATTENTION])
def test_a_hook_that_gets_the_keywords_sees_a_tensor(model, path):
    """Wherever it sits, on a layer without cross-attention too, and what it makes of the mask is what the layers attend by. The report says so."""
    call, seen, key = conversations(ONE), [], "attention_mask" if path == ATTENTION else "cross_attention_mask"

    def halve(module, args, kwargs):
        mask = kwargs[key].clone()
        seen.append(mask)
        mask[..., ::2] = torch.finfo(mask.dtype).min
        return args, kwargs | {key: mask}

    plain = model(**call).logits
    patch(model)
    assert {e.code for e in status(model).entries} == {""}
    fastfuse.unpatch(model)
    handle = model.get_submodule(path).register_forward_pre_hook(halve, with_kwargs=True)
    try:
        assert ((model(**call).logits - plain).abs().max() > 1e-3) == (not path.endswith("layers.0"))
        assert_as_before(model, call, "HOOKED", HOOKED=1, DENSE_MASK=2)
        assert [(e.name, e.code) for e in status(model).entries if e.code] == [("model", "HOOKED")] and len(seen) == 3
    finally:
        handle.remove()


def test_hooks_of_pytorch_s_own_wrappers_pass_the_mask_on(model):
    """FSDP2 casts tensors among the keywords, and leaves the rest."""

    def cast(module, args, kwargs):
        return args, {k: v.to(v.dtype) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    cast.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    for module in (model.model.language_model, *model.model.language_model.layers):
        module.register_forward_pre_hook(cast, with_kwargs=True)
    assert_as_before(model, conversations(side="left"))


@pytest.mark.parametrize("how", ["rebound", "subclass"])
def test_somebody_else_s_layer_sees_a_tensor(model, how):
    layer, seen = model.get_submodule(f"{TEXT}.layers.1"), []
    own = type(layer).forward

    def forward(self, hidden_states, cross_attention_mask=None, **kwargs):
        seen.append(cross_attention_mask)
        return own(self, hidden_states, cross_attention_mask=cross_attention_mask, **kwargs)

    if how == "rebound":
        layer.forward = MethodType(forward, layer)
    else:
        layer.__class__ = type("Layer", (type(layer),), {"forward": forward})
    assert_as_before(model, conversations(ONE), "FOREIGN_FORWARD", FOREIGN_FORWARD=1, DENSE_MASK=2)
    assert len(seen) == 2 and isinstance(seen[1], torch.Tensor)


@pytest.mark.parametrize("strict", [False, True])
def test_attention_weights_and_hidden_states(model, strict, monkeypatch):
    """Asked for, they are given, without a warning or an error."""
    if strict:
        monkeypatch.setenv("FASTFUSE_STRICT", "1")
    call = conversations(ONE)
    vision = {k: call[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def run():
        out, hidden = model(**call, output_attentions=True, output_hidden_states=True), model(**call, output_hidden_states=True).hidden_states
        return [out.attentions, out.hidden_states, hidden, model.model.vision_model(**vision, output_hidden_states=True).hidden_states]

    want = run()
    patch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fastfuse")
        got = run()
    assert len(got[0]) == 3
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_a_rule_that_cannot_be_kept_is_said(model, monkeypatch):
    call = conversations(ONE)
    patch(model, masked_rows="zero")
    with pytest.warns(UserWarning, match="MASKED_ROWS: masked_rows='zero' does not hold: attention weights are asked for"):
        model(**call, output_attentions=True)
    fastfuse.unpatch(model)
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    patch(model, masked_rows="zero")
    with pytest.raises(fastfuse.Unsupported, match="MASKED_ROWS"):
        model(**call, output_attentions=True)


def test_another_attention_implementation_stays(model):
    """What a user has registered is what runs."""
    calls = []

    def mine(module, q, k, v, attention_mask, **kwargs):
        calls.append(attention_mask)
        return modeling_mllama.eager_attention_forward(module, q, k, v, attention_mask, kwargs["scaling"])

    transformers.AttentionInterface.register("mine", mine)
    try:
        model.set_attn_implementation({"text_config": "mine", "vision_config": "eager", "": "eager"})
        report = assert_as_before(model, conversations(ONE), "ATTENTION", ATTENTION=3)
        assert {e.code for e in report.entries if e.op == "cross_attention"} >= {"ATTENTION"}
        assert all(isinstance(mask, torch.Tensor) for mask in calls if mask is not None)
    finally:
        transformers.AttentionInterface._global_mapping.pop("mine")


@pytest.mark.parametrize("order", ["patch, hook", "hook, patch"])
def test_accelerate_moves_the_mask_along(model, order):
    """Hooks of a model spread over devices, on each module that the mask passes."""
    want = model(**conversations()).logits
    layers = model.model.language_model.layers
    parts = [model.model.vision_model, model.model.language_model, *layers, *(layer.cross_attn for layer in layers if hasattr(layer, "cross_attn"))]
    for act in order.split(", "):
        if act == "patch":
            patch(model)
        for part in parts if act == "hook" else ():
            add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    torch.testing.assert_close(model(**conversations()).logits, want)
    assert status(model).fallbacks == {}


def test_input_gradients_and_checkpointing(model):
    """What QLoRA recipes switch on: the hook that asks for gradients is honoured, not run away from."""
    model.train().requires_grad_(False)
    model.model.language_model.layers.requires_grad_(True)

    def grads(model, dtype=torch.float32):
        model.zero_grad()
        call = conversations()
        model(**call | {"pixel_values": call["pixel_values"].to(dtype)}).logits.square().mean().backward()
        return {n: (p.grad.clone(),) for n, p in model.named_parameters() if p.requires_grad}

    plain, exact = in_several_orders(grads, model), grads(mllama.exactly(model), torch.float64)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    patch(model)
    assert_gradients_no_worse(grads(model), plain, exact)
    assert status(model).fallbacks == {}


# The vision model


def test_another_library_s_norm_is_called(model):
    """As liger-kernel binds one: the op does everything before it."""
    norm, calls = model.model.vision_model.layernorm_pre, []
    norm.forward = lambda x: calls.append(1) or nn.functional.layer_norm(x, norm.normalized_shape, norm.weight, norm.bias, norm.eps)
    assert_as_before(model, conversations())
    assert len(calls) == 2


@pytest.mark.parametrize("size", [(56, 61), (66, 56)])
def test_pixels_over_are_left_out(model, size):
    call = conversations(ONE)
    call["pixel_values"] = nn.functional.interpolate(call["pixel_values"].flatten(0, 2), size).unflatten(0, (1, 1, 4))
    assert_as_before(model, call)


def test_calls_of_the_vision_model(model):
    """Wrong ones are its own errors; a configuration that asks for tuples gets one."""
    vision, call = model.model.vision_model, conversations(ONE)
    pixels, ids, mask = (call[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
    vision.config.return_dict = False
    try:
        want = vision(pixels, ids, mask)
        patch(model)
        got = vision(pixels, ids, mask)
    finally:
        vision.config.return_dict = True
    assert type(got) is type(want) is tuple and torch.equal(got[0], want[0])
    for args in ((pixels, ids), (pixels[..., :42], ids, mask), (pixels[:, :, :3], ids, mask)):
        with warnings.catch_warnings(), pytest.raises((TypeError, RuntimeError)):
            warnings.simplefilter("ignore")
            vision(*args)


# Calls and versions of transformers


def test_embeddings_in_place_of_tokens(model):
    call = conversations(side="left")
    call["inputs_embeds"] = model.model.language_model.embed_tokens(call.pop("input_ids")).detach()
    assert_as_before(model, call)


def test_a_mask_of_another_rank_is_the_host_s_business(model):
    call = conversations(ONE)
    call["cross_attention_mask"] = call["cross_attention_mask"][:, :, 0]
    with pytest.raises(Exception) as own:
        model(**call)
    patch(model)
    with pytest.warns(UserWarning, match="MASK"), pytest.raises(type(own.value)):
        model(**call)


def with_later(module, forward, *more):
    """Its forward as a later transformers might have it. more: what it takes beside."""
    *names, rest = inspect.signature(type(module).forward).parameters.values()
    names += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
    forward.__signature__ = inspect.Signature([*names, rest])
    with_forward(module, forward, modeling_mllama.__name__)


def test_an_argument_that_nobody_knows_runs_the_own_forward(model):
    attn, seen = attention_of(model), []
    own = type(attn).forward

    def forward(self, *args, softcap=None, **kwargs):
        seen.append(kwargs["attention_mask"])
        return own(self, *args, **kwargs)

    with_later(attn, forward, "softcap")
    assert_as_before(model, conversations(ONE))
    x, states, mask = torch.randn(1, 3, 64), torch.randn(1, 8, 64), EncoderMask.from_tiles(torch.tensor([[[[1, 0]], [[0, 0]], [[0, 1]]]]), 4)
    with pytest.warns(UserWarning, match="ARGUMENTS.*softcap"):
        got = attn(x, states, attention_mask=mask, softcap=3.0)[0]
    assert isinstance(seen[-1], torch.Tensor)
    torch.testing.assert_close(got, attn(x, states, attention_mask=mask)[0])


def test_keywords_that_get_lost_are_an_error_not_a_wrong_answer(model):
    own = inspect.unwrap(type(model.model).forward)

    def forward(self, *args, **kwargs):
        kwargs.pop("fastfuse_mask", None)
        return own(self, *args, **kwargs)

    with_later(model.model, forward)
    patch(model)
    with pytest.raises(fastfuse.Unsupported, match="does not pass its keywords on"):
        model(**conversations(ONE))


def test_our_own_models_are_patched_already():
    from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build

    report = patch(build(Llama3VisionConfig.from_hf(mllama.config())))
    assert set(report.counts) == {"already"} and {e.op for e in report.entries} == {"patch_embed", "cross_attention"} and report


def test_qlora_training():
    """All ops at once: three steps of an optimiser, losses and adapters as without patch, and the tokens that are generated then."""
    model = mllama.qlora().train()
    twin = copy.deepcopy(model)
    report = patch(model)
    assert {e.op for e in report.patched} == {"cross_attention", "patch_embed", "nf4_linear", "nf4_lora_linear"} and not report.skipped
    curves = [mllama.losses(m, conversations(side="right"), 3) for m in (model, twin)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0][-1] < curves[0][0]
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    tokens = [m.eval().generate(**conversations(side="left"), **options) for m in (model, twin)]
    assert torch.equal(*tokens) and status(model).fallbacks == {}
