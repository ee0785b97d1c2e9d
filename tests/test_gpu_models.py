"""The architecture on a GPU: the CPU's results, no waiting for the device, and decode steps as one CUDA graph."""

import copy

import mllama
import pytest
import torch
from numerics import assert_no_worse
from suite import without_waiting
from torch.utils._pytree import tree_map

from cases.linear import BF16, F32
from fastfuse.generation import generate, generate_next_token
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build, build_lora
from fastfuse.modules import local_kv_cache

pytestmark = pytest.mark.gpu

CONFIG = Llama3VisionConfig.from_hf(mllama.config()).replace(cross_attention_layers=None, num_layers=4, fusion_interval=2)
QLORA = CONFIG.replace(clip_embed_dim=128, clip_hidden_dim=512, embed_dim=256, num_kv_heads=8, intermediate_dim=512)


def photos(device, dtype):
    given = mllama.as_fastfuse(mllama.batch(mllama.SAMPLES), mllama.config())
    given["encoder_input"]["images"] = given["encoder_input"]["images"].to(dtype)
    return tree_map(lambda t: t.to(device), given)


@pytest.mark.parametrize("profile", ["torchtune", "meta", "transformers"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_logits_are_as_good_as_the_cpus(profile, dtype, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # cuDNN's default rounds fp32 convolutions to 10 bits
    model = mllama.randomize(build(CONFIG, profile=profile)).eval().to(dtype)
    exact = copy.deepcopy(model).double()
    with torch.no_grad():
        eager = model(**photos("cpu", dtype))
        truth = exact(**photos("cpu", torch.float64))
        got = copy.deepcopy(model).cuda()(**photos("cuda", dtype))
    assert_no_worse(got.cpu(), eager, truth)


def qlora():
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = build_lora(
            QLORA, ["q_proj", "k_proj", "v_proj", "output_proj"], decoder_lora=True, apply_lora_to_mlp=True, quantize_base=True, scaler_block_size=256
        )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.numel() == 1:
                p.fill_(0.5)
            elif name.endswith("lora_b.weight"):
                p.normal_(std=0.1)
    return model


def test_nothing_waits_for_the_device():
    model, batch = qlora(), photos("cuda", F32)
    without_waiting(lambda: model(**batch).square().mean().backward())


def test_decode_steps_are_one_cuda_graph():
    model = qlora().eval()
    given = photos("cuda", F32)
    prompt = given.pop("tokens")
    expected, _ = generate(model, prompt, max_generated_tokens=8, temperature=0, **given)
    step = torch.compile(generate_next_token, mode="reduce-overhead", fullgraph=True)
    with local_kv_cache(model, batch_size=3, device="cuda", dtype=F32, encoder_max_seq_len=160, decoder_max_seq_len=32):
        tokens, _ = generate(model, prompt, max_generated_tokens=8, temperature=0, compiled_generate_next_token=step, **given)
    assert torch.equal(tokens, expected)
