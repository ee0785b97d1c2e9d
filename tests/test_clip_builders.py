"""CLIP's and Llama 3's builders, plain and with LoRA: values, random numbers, and which layer gets what."""

import pytest
import torch
from dense_vision import assert_formula, randomize
from numerics import assert_same
from torch import nn
from torch.nn import functional as F

from cases.weights import NF4Tensor
from fastfuse.models.clip import clip_mlp, clip_vision_encoder, lora_clip_attention, lora_clip_mlp, lora_clip_vision_encoder
from fastfuse.models.llama3_1 import llama3_mlp, lora_llama3_attention, lora_llama3_mlp, scale_hidden_dim_for_mlp
from fastfuse.modules import (
    Llama3ScaledRoPE,
    VisionRotaryPositionalEmbeddings,
)
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear

SIZES = {"tile_size": 9, "patch_size": 3, "embed_dim": 32, "num_layers": 2, "num_heads": 4}
D, N, T = 32, 10, 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
BLOCKS = {"block_size": 32, "scaler_block_size": 16}
RATIOS = torch.tensor([[[2, 2], [1, 3]]])
KNOWN = {"clip_heads": 4, "activation": F.silu}


def images():
    return torch.randn(1, 2, T, 3, 9, 9)


def plain(**kwargs):
    return randomize(clip_vision_encoder(**SIZES, **kwargs))


def lora(modules=ATTENTION, mlp=True, **kwargs):
    return lora_clip_vision_encoder(list(modules), mlp, **SIZES, **{"lora_rank": 2, "lora_alpha": 3, **kwargs})


@pytest.mark.parametrize(
    "make, made, known",
    [
        (plain, {}, {}),
        (plain, {"activation": nn.GELU, "attn_bias": False, "out_indices": [0, 1]}, {"activation": F.gelu, "out_indices": [0, 1]}),
        (plain, {"append_cls_token": True, "output_cls_projection": True, "cls_output_dim": 7}, {"append_cls": True}),
        (plain, {"hidden_dim": 24, "norm_eps": 1e-2}, {"clip_eps": 1e-2}),
        (plain, {"use_tile_pos_embed": False}, {}),
        (plain, {"max_num_tiles": 1}, {}),
        (plain, {"pad_tokens_to": 8, "states_after_layer": True, "out_indices": [1, 0]}, {"pad_to": 8, "states_after": True, "out_indices": [0, 1]}),
        (lora, {"modules": ["k_proj"], "mlp": False, "attn_bias": True}, {"scaling": 1.5}),
        (lora, {"use_dora": True, "causal_attention": True}, {"scaling": 1.5, "causal_vision": True}),
    ],
    ids=["defaults", "gelu", "cls", "widths", "no-tiles", "one-tile", "transformers", "lora of one", "causal dora"],
)
def test_values_are_the_formula_s(make, made, known):
    model, pixels = randomize(make(**made)), images()
    assert_formula(model(pixels, RATIOS), model, "clip", pixels, RATIOS, **KNOWN | known)


def test_widths_and_dropout_that_are_left_out():
    assert plain().layers[0].mlp.w1.weight.shape == (4 * D, D) and plain(output_cls_projection=True).cls_projection.weight.shape == (D, 512)
    assert "layers.0.attn.q_proj.bias" not in lora().state_dict() and isinstance(lora(activation=nn.GELU).layers[1].mlp.activation, nn.GELU)
    assert all(isinstance(m.dropout, nn.Identity) for m in lora().modules() if isinstance(m, LoRALinear))


def test_rope_is_for_queries_and_keys_of_every_layer_where_asked_for():
    """What it turns: test_rope."""
    assert all(layer.attn.pos_embeddings is None for layer in plain().layers)
    for append in (False, True):
        for layer in plain(use_rope=True, append_cls_token=append, max_num_tiles=1).layers:
            rope = layer.attn.pos_embeddings
            assert isinstance(rope, VisionRotaryPositionalEmbeddings) and rope.append_cls_token is append
            assert torch.equal(rope.cache, VisionRotaryPositionalEmbeddings(3, 9, D // 4, append_cls_token=append).cache)


def test_a_quantized_model_computes_with_its_numbers_and_loads_back_what_it_saves():
    """What it saves: test_llama3_2_vision."""
    model, other = (lora(["q_proj", "v_proj"], quantize_base=True, **BLOCKS) for _ in range(2))
    check_inputs = images()
    assert_formula(randomize(model)(check_inputs, RATIOS), model, "clip", check_inputs, RATIOS, **KNOWN, scaling=1.5)
    other.load_state_dict(model.state_dict())
    for name, p in model.named_parameters():
        assert not isinstance(p, NF4Tensor) or torch.equal(other.get_parameter(name).quantized_data, p.quantized_data)


@pytest.mark.parametrize("build", [lora, lambda **options: clip_vision_encoder(**SIZES, **options)], ids=["lora", "plain"])
def test_a_seed_draws_the_cls_projection_first(build):
    """As torchtune; the order of the rest: test_llama3_2_vision."""
    torch.manual_seed(4)
    whole = build(output_cls_projection=True, cls_output_dim=6, attn_bias=True).state_dict()
    torch.manual_seed(4)
    want = {"cls_projection.weight": D**-0.5 * torch.randn(D, 6)}
    assert_same(whole, build(attn_bias=True).state_dict() | want)


def test_attention_and_mlp_builders_pass_on_what_they_are_given():
    sizes = {"embed_dim": 24, "head_dim": 8, "num_heads": 3, "num_kv_heads": 1, "attn_bias": True, "attn_dropout": 0.3}
    attention = lora_clip_attention(["v_proj"], **sizes, lora_rank=4, lora_alpha=2, lora_dropout=0.1)
    assert (attention.attn_dropout, attention.is_causal) == (0.3, False)
    assert [getattr(attention, name).weight.shape for name in ATTENTION] == [(24, 24), (8, 24), (8, 24), (24, 24)]
    v = attention.v_proj
    assert v.bias is not None and (v.dropout.p, v.rank, v.alpha) == (0.1, 4, 2)
    x, mlp_sizes = torch.randn(4, 32), {"in_dim": 32, "out_dim": 64, "hidden_dim": 96, "activation": nn.ReLU()}
    adapted = lora_clip_mlp(**mlp_sizes, lora_rank=2, lora_alpha=4, lora_dropout=0.2)
    ignored = clip_mlp(**mlp_sizes, block_size=3)  # quantization arguments are, without quantize_base
    quantized = clip_mlp(**mlp_sizes, quantize_base=True, **BLOCKS)
    assert adapted.w1.dropout.p == adapted.w2.dropout.p == 0.2 and quantized.w2.weight.scaler_block_size == 16
    for mlp, kind in ((adapted, LoRALinear), (ignored, nn.Linear), (quantized, FrozenNF4Linear)):
        for m, shape in ((mlp.w1, (96, 32)), (mlp.w2, (64, 96))):
            assert (type(m), m.weight.shape, m.bias is None) == (kind, shape, False)
        assert mlp.w3 is None and torch.equal(mlp.eval()(x), mlp.w2(F.relu(mlp.w1(x))))


@pytest.mark.parametrize("dim, multiple, width", [(4096, 256, 11008), (64, 256, 256), (1024, 256, 2816), (100, 8, 264)])
def test_llama_s_mlp_width_is_rounded_up(dim, multiple, width):
    assert scale_hidden_dim_for_mlp(dim, multiple) == width
    assert multiple != 256 or scale_hidden_dim_for_mlp(dim) == width


@pytest.mark.parametrize("dora, quantized", [(False, True), (True, False)])
def test_llama_s_builders_pass_on_what_they_are_given(dora, quantized):
    """Their shapes, and in which order they draw: test_llama3_2_vision."""
    rope, sizes = Llama3ScaledRoPE(64, max_seq_len=16), {"embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 16}
    flags = {"lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.1, "use_dora": dora, "quantize_base": quantized}
    adapted, frozen = DoRALinear if dora else LoRALinear, FrozenNF4Linear if quantized else nn.Linear
    attention = lora_llama3_attention(["k_proj"], rope, **sizes, **flags)
    assert attention.is_causal and attention.pos_embeddings is rope and attention.max_seq_len == 16
    want = {getattr(attention, name): adapted if name == "k_proj" else frozen for name in ATTENTION}
    for mlp, kind in ((lora_llama3_mlp(dim=256, hidden_dim=512, **flags), adapted), (llama3_mlp(256, 512, quantized), frozen)):
        want |= dict.fromkeys((mlp.w1, mlp.w2, mlp.w3), kind)
    for m, kind in want.items():
        assert (type(m), m.bias, isinstance(m.weight, NF4Tensor)) == (kind, None, quantized) and (kind is frozen or m.dropout.p == 0.1)
