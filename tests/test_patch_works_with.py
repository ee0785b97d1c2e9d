"""patch(model) together with what people train with: transformers, accelerate, checkpointing, other patchers; and the environment."""

import copy
import warnings
from types import MethodType

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from numerics import assert_rounding_apart
from peft import LoraConfig, get_peft_model
from qlora import assert_same, in_nf4, in_order, lora, said
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import fastfuse
from cases.linear import BF16, F32
from fastfuse import patch, status

LINEARS = 14  # of the two layers below, q, k, v, o, gate, up and down each
CONFIG = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, vocab_size=97)


def adapted(model):
    return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))


def llama(dtype=F32):
    """A Llama of two layers in NF4 by bitsandbytes, with LoRA adapters on every linear layer."""
    model = LlamaForCausalLM(CONFIG).to(dtype)
    for layer in model.model.layers:
        for part in (layer.self_attn, layer.mlp):
            for name, linear in list(part.named_children()):
                if isinstance(linear, nn.Linear):
                    setattr(part, name, in_nf4(linear))
    model.is_loaded_in_4bit = True
    return adapted(model)


def tokens(*shape):
    return torch.randint(0, 97, shape)


def step(model, ids):
    """The loss, and its gradients for all that is trained."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()  # reentrant checkpointing knows no autograd.grad
    return loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]


def assert_same_step(got, want):
    """Through the two layers and back: 14 products of three factors each way, with their adapters."""
    assert_same(got, want, K=128, products=2 * LINEARS)


def assert_all_fused(model):
    assert status(model).counts == {"patched": 2 * LINEARS} and status(model).fallbacks == {}


def test_a_model_loaded_by_transformers(tmp_path):
    """from_pretrained(quantization_config=...) as in every QLoRA recipe."""
    LlamaForCausalLM(CONFIG).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=F32)
    model, ids = adapted(LlamaForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map="cpu").train()), tokens(2, 11)
    want = step(model, ids)
    patch(model, verify=True)
    assert_same_step(step(model, ids), want)
    assert_all_fused(model)


# Training loops


@pytest.fixture
def fresh_accelerator():
    """accelerate keeps the first precision that it was asked for."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def assert_same_curve(want, got, dtype=F32):
    """Three steps, there and back."""
    assert len(got) == len(set(got.tolist())) == 3
    assert_rounding_apart(got.to(dtype), want.to(dtype), K=128, products=3 * 4 * LINEARS)


TRAINED = [
    (F32, {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}),
    (F32, {"optim": "sgd", "max_grad_norm": 0.1}),
    (BF16, {"bf16": True, "gradient_checkpointing": True}),
]


@pytest.mark.parametrize("dtype, options", TRAINED, ids=str)
def test_trainer(dtype, options, tmp_path, fresh_accelerator):
    model, data, curves = llama(dtype), [{"input_ids": ids, "labels": ids} for ids in tokens(6, 11)], []
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, per_device_train_batch_size=2, use_cpu=True, report_to=[], save_strategy="no", logging_steps=1,
        disable_tqdm=True, learning_rate=1e-2, seed=0, **options,
    )  # fmt: skip
    for m in (copy.deepcopy(model), model):
        if m is model:
            patch(m)
        m.enable_input_require_grads()  # as reentrant checkpointing needs it
        trainer = Trainer(model=m, args=arguments, train_dataset=data)
        trainer.train()
        curves.append(torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry]))
    assert_same_curve(*curves, dtype)
    assert_all_fused(model)


def rms_norm(self, hidden):
    return 1.5 * self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def swiglu(self, x):
    return self.down_proj(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)) / 2


def bind_forwards(model):
    """As Liger does (its kernels need a GPU): methods on the instances of norms and MLPs, which call the patched projections."""
    for layer in model.base_model.model.model.layers:
        layer.mlp.__dict__["forward"] = MethodType(swiglu, layer.mlp)
        for norm in (layer.input_layernorm, layer.post_attention_layernorm):
            norm.__dict__["forward"] = MethodType(rms_norm, norm)


@pytest.mark.parametrize("order", ["patch, prepare, bind", "bind, prepare, patch"])
def test_forwards_that_another_library_binds(order, fresh_accelerator):
    """They outlive an unpatch, and a model that accelerate has prepared is patched like any other."""
    model, ids = llama(), tokens(2, 11)
    twin = copy.deepcopy(model)
    bind_forwards(twin)
    want = step(twin, ids)
    in_order(order, patch=lambda: patch(model), prepare=lambda: Accelerator(cpu=True).prepare(model), bind=lambda: bind_forwards(model))
    assert_same_step(step(model, ids), want)
    assert_all_fused(model)
    fastfuse.unpatch(model)
    assert model.base_model.model.model.layers[0].mlp.forward.__func__ is swiglu


# The environment


def test_disabled_by_the_environment(monkeypatch):
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    want, before = model(x), [dict(m.__dict__) for m in model.modules()]
    monkeypatch.setenv("FASTFUSE_DISABLE", "1")
    report = patch(model, on_unsupported="raise")  # asked for: nothing to raise
    assert said(report) == [("skipped", "DISABLED")] * 4 and not report and "FASTFUSE_DISABLE" in str(report)
    assert {e.code for e in status(model).entries} == {"DISABLED"}
    with fastfuse.patched(model):
        assert torch.equal(model(x), want)
    assert [dict(m.__dict__) for m in model.modules()] == before
    monkeypatch.setenv("FASTFUSE_DISABLE", "0")
    assert patch(model).counts == {"patched": 4}


def test_strict_by_the_environment(monkeypatch):
    """An error where the fused op cannot run, and none where it was asked not to."""
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    model.add_adapter("rs", LoraConfig(r=4, target_modules=["up"], init_lora_weights=False))
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    patch(model)
    monkeypatch.delenv("FASTFUSE_STRICT")  # what counts is how it was patched
    with model.disable_adapter():
        model(x)
    model.set_adapter("rs")
    model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.merge_adapter()
        model(x)
        model.unmerge_adapter()
    assert set(status(model).fallbacks) == {"ADAPTERS_DISABLED", "NO_ADAPTER", "MERGED"}
    model.base_model.model.up.lora_A["rs"].register_forward_hook(lambda m, args, out: None)
    with pytest.raises(fastfuse.Unsupported, match="FASTFUSE_STRICT is set: HOOKED") as raised:
        model(x)
    assert raised.value.code == "HOOKED"
