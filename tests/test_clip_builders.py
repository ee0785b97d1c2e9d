"""CLIP's and Llama 3's builders, plain and with LoRA: values, random numbers, and which layer gets what."""

import copy

import pytest
import torch
from dense_vision import Dense, assert_formula, leaves, parameters, randomize
from numerics import assert_no_worse, assert_same
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


def check(model, **known):
    """Outputs against the formula in float64, and in fp32 no further from it than the formula in fp32."""
    pixels, known = images(), KNOWN | known
    assert_formula(model(pixels, RATIOS), model, "clip", pixels, RATIOS, **known)
    x, hidden = Dense(leaves(parameters(model), torch.float64), **known).clip(pixels.double(), RATIOS)
    got, got_hidden = copy.deepcopy(model).double()(pixels.double(), RATIOS)
    for a, b in zip([got, *got_hidden], [x, *hidden], strict=True):
        assert_no_worse(a.float(), b.float(), b, "in float64")


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
    check(randomize(make(**made)), **known)


def test_widths_and_dropout_that_are_left_out():
    assert plain().layers[0].mlp.w1.weight.shape == (4 * D, D) and plain(output_cls_projection=True).cls_projection.weight.shape == (D, 512)
    assert "layers.0.attn.q_proj.bias" not in lora().state_dict() and isinstance(lora(activation=nn.GELU).layers[1].mlp.activation, nn.GELU)
    assert all(isinstance(m.dropout, nn.Identity) for m in lora().modules() if isinstance(m, LoRALinear))


def test_rope_is_for_queries_and_keys_of_every_layer_where_asked_for():
    """What it turns: test_vision_transformer."""
    assert all(layer.attn.pos_embeddings is None for layer in plain().layers)
    for append in (False, True):
        for layer in plain(use_rope=True, append_cls_token=append, max_num_tiles=1).layers:
            rope = layer.attn.pos_embeddings
            assert isinstance(rope, VisionRotaryPositionalEmbeddings) and rope.append_cls_token is append
            assert torch.equal(rope.cache, VisionRotaryPositionalEmbeddings(3, 9, D // 4, append_cls_token=append).cache)


def test_dora_that_adds_nothing_leaves_the_plain_model():
    model, base, pixels = lora(use_dora=True), plain(attn_bias=False), images()
    model.load_state_dict(base.state_dict(), strict=False)
    for m in model.modules():
        if isinstance(m, DoRALinear):
            m.initialize_dora_magnitude()
    assert_formula(model(pixels, RATIOS), base, "clip", pixels, RATIOS, **KNOWN)


def test_a_quantized_model_computes_with_its_numbers_and_loads_back_what_it_saves():
    model, other = (lora(["q_proj", "v_proj"], quantize_base=True, **BLOCKS) for _ in range(2))
    check_inputs = images()
    assert_formula(randomize(model)(check_inputs, RATIOS), model, "clip", check_inputs, RATIOS, **KNOWN, scaling=1.5)
    state = model.state_dict()
    assert state.keys() == lora(["q_proj", "v_proj"]).state_dict().keys() and not any(isinstance(t, NF4Tensor) for t in state.values())
    assert state["layers.1.mlp.w2.weight"].dtype == torch.bfloat16 and state["layers.1.mlp.w2.bias"].dtype == torch.float32
    other.load_state_dict(state)
    for name, p in model.named_parameters():
        if isinstance(p, NF4Tensor):
            assert torch.equal(state[name], p.to(torch.bfloat16)) and torch.equal(other.get_parameter(name).quantized_data, p.quantized_data)


@pytest.mark.parametrize("build", [lora, lambda **options: clip_vision_encoder(**SIZES, **options)], ids=["lora", "plain"])
def test_a_seed_draws_the_cls_projection_first(build):
    """As torchtune; the order of the rest: test_llama3_2_vision."""
    torch.manual_seed(4)
    whole = build(output_cls_projection=True, cls_output_dim=6, attn_bias=True).state_dict()
    torch.manual_seed(4)
    want = {"cls_projection.weight": D**-0.5 * torch.randn(D, 6)}
    assert_same(whole, build(attn_bias=True).state_dict() | want)


def test_attention_and_mlp_builders_pass_on_what_they_are_given():
    sizes = {"embed_dim": 24, "head_dim": 8, "num_heads": 3, "num_kv_heads": 1, "attn_bias": True}
    attention = lora_clip_attention(["v_proj"], **sizes, attn_dropout=0.3, lora_rank=4, lora_alpha=2, lora_dropout=0.1)
    assert attention.attn_dropout == 0.3 and attention.is_causal is False
    assert [getattr(attention, name).weight.shape for name in ATTENTION] == [(24, 24), (8, 24), (8, 24), (24, 24)]
    v = attention.v_proj
    assert v.bias is not None and (v.dropout.p, v.rank, v.alpha) == (0.1, 4, 2)
    mlps = {
        lora_clip_mlp(in_dim=32, out_dim=64, hidden_dim=96, activation=nn.ReLU(), lora_rank=2, lora_alpha=4, lora_dropout=0.2): LoRALinear,
        clip_mlp(32, 64, 96, nn.ReLU(), block_size=3): nn.Linear,  # quantization arguments are ignored without quantize_base
        clip_mlp(32, 64, 96, nn.ReLU(), quantize_base=True, **BLOCKS): FrozenNF4Linear,
    }
    x = torch.randn(4, 32)
    for mlp, kind in mlps.items():
        assert type(mlp.w1) is type(mlp.w2) is kind and mlp.w1.bias is not None and mlp.w2.bias is not None and mlp.w3 is None
        assert mlp.w1.weight.shape == (96, 32) and mlp.w2.weight.shape == (64, 96)
        assert mlp.w1.dropout.p == mlp.w2.dropout.p == 0.2 if kind is LoRALinear else torch.equal(mlp(x), mlp.w2(F.relu(mlp.w1(x))))
    assert mlp.w2.weight.scaler_block_size == 16


@pytest.mark.parametrize("dim, multiple, width", [(4096, 256, 11008), (64, 256, 256), (1024, 256, 2816), (100, 8, 264)])
def test_llama_s_mlp_width_is_rounded_up(dim, multiple, width):
    assert scale_hidden_dim_for_mlp(dim, multiple) == width
    assert multiple != 256 or scale_hidden_dim_for_mlp(dim) == width


@pytest.mark.parametrize("dora, quantized", [(False, True), (True, False)])
def test_llama_s_builders_put_layers_where_the_flags_say(dora, quantized):
    sizes, adapter = {"embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 16}, {"lora_rank": 2, "lora_alpha": 6, "lora_dropout": 0.1}
    rope, flags = Llama3ScaledRoPE(64, max_seq_len=16), adapter | {"use_dora": dora, "quantize_base": quantized}
    adapted, frozen = DoRALinear if dora else LoRALinear, FrozenNF4Linear if quantized else nn.Linear
    attention = lora_llama3_attention(["k_proj"], rope, **sizes, **flags)
    assert attention.is_causal and attention.pos_embeddings is rope and attention.max_seq_len == 16
    wide, narrow = (256, 512), (128, 256)
    want = [(attention, name, adapted if name == "k_proj" else frozen, narrow if name in ("k_proj", "v_proj") else (256, 256)) for name in ATTENTION]
    for mlp, kind in ((lora_llama3_mlp(dim=256, hidden_dim=512, **flags), adapted), (llama3_mlp(256, 512, quantized), frozen)):
        want += [(mlp, name, kind, wide if name == "w2" else wide[::-1]) for name in ("w1", "w2", "w3")]
    for owner, name, kind, shape in want:
        m = getattr(owner, name)
        assert (type(m), m.bias, m.weight.shape, isinstance(m.weight, NF4Tensor)) == (kind, None, shape, quantized), name
        assert kind is frozen or m.dropout.p == 0.1
    assert type(lora_llama3_attention([], rope, **sizes, **adapter).q_proj) is nn.Linear  # an empty list is allowed here


def test_llama_s_mlp_draws_gate_down_up_and_computes_swiglu():
    torch.manual_seed(2)
    mlp = llama3_mlp(8, 12)
    torch.manual_seed(2)
    w1, w2, w3 = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False)
    x = torch.randn(3, 8)
    assert torch.equal(mlp(x), w2(F.silu(w1(x)) * w3(x)))
