"""CLIP's builders, plain and with LoRA: their defaults, values, random numbers, and which layer gets what."""

import copy
import inspect
import itertools

import pytest
import torch
from dense_vision import Dense, leaves, parameters, randomize
from numerics import assert_no_worse, in_several_orders
from torch import nn
from torch.nn import functional as F
from weights import NF4Tensor

from fastfuse.errors import InvalidArgument
from fastfuse.models.clip import clip_mlp, clip_vision_encoder, lora_clip_attention, lora_clip_mlp, lora_clip_vision_encoder
from fastfuse.models.llama3_1 import llama3_mlp, lora_llama3_attention, lora_llama3_mlp, scale_hidden_dim_for_mlp
from fastfuse.modules import (
    Fp32LayerNorm,
    Llama3ScaledRoPE,
    TiledTokenPositionalEmbedding,
    TilePositionalEmbedding,
    TokenPositionalEmbedding,
    VisionRotaryPositionalEmbeddings,
)
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear

SIZES = {"tile_size": 9, "patch_size": 3, "embed_dim": 32, "num_layers": 2, "num_heads": 4}
D, N, T = 32, 10, 4
ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
BLOCKS = {"block_size": 32, "scaler_block_size": 16}
RATIOS = torch.tensor([[[2, 2], [1, 3]]])
SUBSETS = [["q_proj"], ["k_proj", "output_proj"], ["v_proj", "q_proj"], ATTENTION]


def images(t=T, dtype=torch.float32):
    return torch.randn(1, 2, t, 3, 9, 9, dtype=dtype)


def dense(model, dtype=torch.float64, **kwargs) -> Dense:
    return Dense(leaves(parameters(model), dtype), clip_heads=4, **{"activation": F.silu, **kwargs})


def check(model, ratio=RATIOS, t=T, **kwargs):
    """Outputs against the formula in float64, and in fp32 no further from it than the formula in fp32."""
    pixels = images(t)
    want = dense(model, **kwargs).clip(pixels.double(), ratio)
    eager = in_several_orders(lambda: dense(model, torch.float32, **kwargs).clip(pixels, ratio))
    got, double = model(pixels, ratio), copy.deepcopy(model).double()(pixels.double(), ratio)
    assert len(got[1]) == len(want[1])
    got, want, double, *eager = ([x, *hidden] for x, hidden in (got, want, double, *eager))
    for a, b, c, d in zip(got, zip(*eager, strict=True), want, double, strict=True):
        assert_no_worse(a, b, c)
        assert_no_worse(d.float(), c.float(), c, "in float64")


def plain(**kwargs):
    return randomize(clip_vision_encoder(**SIZES, **kwargs))


def lora(modules=ATTENTION, mlp=True, **kwargs):
    return lora_clip_vision_encoder(list(modules), mlp, **SIZES, **{"lora_rank": 2, "lora_alpha": 3, **kwargs})


def adapted(model):
    """Random adapters in place of those that change nothing."""
    randomize(model)
    for m in model.modules():
        if isinstance(m, DoRALinear):
            m.initialize_dora_magnitude()
            m.magnitude.data *= 1 + 0.2 * torch.rand_like(m.magnitude)
    return model


def defaults(function) -> dict:
    return {name: p.default for name, p in inspect.signature(function).parameters.items() if p.kind != p.VAR_KEYWORD}


def test_the_arguments_are_torchtune_s():
    required = inspect.Parameter.empty
    common = {"cls_output_dim": 512, "out_indices": None, "output_cls_projection": False, "max_num_tiles": 4, "in_channels": 3}
    want = dict.fromkeys(("tile_size", "patch_size", "embed_dim", "num_layers", "num_heads"), required) | {"activation": nn.SiLU}
    wanted_plain = want | common | {"attn_bias": True, "use_rope": False, "append_cls_token": False, "use_tile_pos_embed": True}
    wanted_lora = want | common | {"lora_modules": required, "apply_lora_to_mlp": False, "attn_bias": False, "lora_rank": 8, "lora_alpha": 16}
    wanted_lora |= {"lora_dropout": 0.0, "use_dora": False, "quantize_base": False}
    assert defaults(clip_vision_encoder).items() >= wanted_plain.items()
    assert defaults(lora_clip_vision_encoder).items() >= wanted_lora.items()
    assert list(defaults(clip_vision_encoder))[:15] == [
        "tile_size", "patch_size", "embed_dim", "num_layers", "num_heads", "activation", "cls_output_dim", "attn_bias", "use_rope", "out_indices",
        "output_cls_projection", "max_num_tiles", "in_channels", "append_cls_token", "use_tile_pos_embed",
    ]  # fmt: skip
    assert list(defaults(lora_clip_vision_encoder))[:2] == ["lora_modules", "apply_lora_to_mlp"]
    kinds = [p.kind for p in inspect.signature(lora_clip_vision_encoder).parameters.values()]
    assert kinds[2:-1] == [inspect.Parameter.KEYWORD_ONLY] * (len(kinds) - 3)
    assert not {"use_rope", "append_cls_token", "use_tile_pos_embed"} & set(defaults(lora_clip_vision_encoder))
    attention = {"attn_dropout": 0.0, "attn_bias": False, "lora_dropout": 0.0, "use_dora": False, "quantize_base": False}
    assert defaults(lora_clip_attention).items() >= attention.items()
    assert list(defaults(clip_mlp)) == ["in_dim", "out_dim", "hidden_dim", "activation", "quantize_base"]
    assert list(defaults(lora_clip_mlp))[:4] == ["in_dim", "out_dim", "hidden_dim", "activation"]


@pytest.mark.parametrize(
    "made, known",
    [
        ({}, {}),
        ({"activation": nn.GELU, "attn_bias": False, "out_indices": [0, 1]}, {"activation": F.gelu, "out_indices": [0, 1]}),
        ({"append_cls_token": True, "output_cls_projection": True, "cls_output_dim": 7}, {"append_cls": True}),
        ({"hidden_dim": 24, "norm_eps": 1e-2}, {"clip_eps": 1e-2}),
        ({"use_tile_pos_embed": False}, {}),
        ({"max_num_tiles": 1}, {}),
        ({"pad_tokens_to": 8, "states_after_layer": True, "out_indices": [1, 0]}, {"pad_to": 8, "states_after": True, "out_indices": [0, 1]}),
    ],
    ids=["defaults", "gelu", "cls", "widths", "no-tiles", "one-tile", "transformers"],
)
def test_values_are_the_formula_s(made, known):
    check(plain(**made), **known)


def test_the_defaults_are_silu_biases_and_a_mlp_of_four_widths():
    model = plain()
    assert list(model.state_dict())[7:11] == [
        "layers.0.attn.q_proj.weight",
        "layers.0.attn.q_proj.bias",
        "layers.0.attn.k_proj.weight",
        "layers.0.attn.k_proj.bias",
    ]
    assert model.layers[0].mlp.w1.weight.shape == (4 * D, D) and isinstance(model.layers[0].mlp.activation, nn.SiLU)
    assert not any(layer.attn.is_causal for layer in model.layers)
    assert plain(output_cls_projection=True).cls_projection.weight.shape == (D, 512)
    with_lora = lora()
    assert "layers.0.attn.q_proj.bias" not in with_lora.state_dict() and "layers.0.mlp.w1.bias" in with_lora.state_dict()
    assert "layers.0.attn.q_proj.bias" in lora(attn_bias=True).state_dict()
    assert isinstance(with_lora.layers[0].mlp.activation, nn.SiLU)
    assert isinstance(lora(activation=nn.GELU).layers[1].mlp.activation, nn.GELU)


def test_an_activation_is_made_by_calling_the_class_without_arguments():
    made = []

    class Doubled(nn.Module):
        def __init__(self):
            super().__init__()
            made.append(self)

        def forward(self, x):
            return 2 * x

    check(plain(activation=Doubled), activation=lambda x: 2 * x)
    assert len(made) == 1


def test_tile_embeddings_come_with_more_than_one_tile():
    kinds = (TilePositionalEmbedding, TilePositionalEmbedding, TiledTokenPositionalEmbedding)
    for build in (plain, lora):
        many, one = build(), build(max_num_tiles=1)
        assert tuple(type(m) for m in (many.pre_tile_pos_embed, many.post_tile_pos_embed, many.token_pos_embedding)) == kinds
        assert one.pre_tile_pos_embed is None and one.post_tile_pos_embed is None and type(one.token_pos_embedding) is TokenPositionalEmbedding
    off = plain(use_tile_pos_embed=False)
    assert off.pre_tile_pos_embed is None and off.post_tile_pos_embed is None and type(off.token_pos_embedding) is TokenPositionalEmbedding
    assert plain(max_num_tiles=9).pre_tile_pos_embed.embedding.shape == (9, 9, 1, D)


@pytest.mark.parametrize("append", [False, True])
def test_rope_turns_queries_and_keys_of_every_tile(append):
    model = plain(use_rope=True, append_cls_token=append, max_num_tiles=1)
    rope = model.layers[0].attn.pos_embeddings
    assert isinstance(rope, VisionRotaryPositionalEmbeddings) and rope.dim == D // 4 and rope.append_cls_token is append
    cos_sin = VisionRotaryPositionalEmbeddings(3, 9, D // 4, append_cls_token=append).cache  # its values: test_vision_transformer

    def turn(x):
        pairs = torch.view_as_complex(x.unflatten(1, (-1, N)).unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * torch.view_as_complex(cos_sin).to(pairs.dtype)).flatten(-2).flatten(1, 2)

    check(model, append_cls=append, turn_vision=turn)
    assert all(layer.attn.pos_embeddings is None for layer in plain().layers)


@pytest.mark.parametrize("build", [plain, lora])
def test_heads_must_divide_the_width(build, monkeypatch):
    monkeypatch.setitem(SIZES, "num_heads", 5)
    with pytest.raises(InvalidArgument, match=r"^embed_dim \(32\) must be divisible by num_heads \(5\)$"):
        build()


def test_lora_needs_a_projection_to_adapt():
    with pytest.raises(ValueError, match=r"Must pass one or more of typing\.Literal"):
        lora([])
    with pytest.raises(ValueError, match="'q_proj', 'k_proj', 'v_proj', 'output_proj'"):
        lora_clip_attention([], embed_dim=D, head_dim=8, num_heads=4, num_kv_heads=4, lora_rank=2, lora_alpha=4)


def test_quantization_arguments_need_quantize_base():
    with pytest.raises(ValueError, match="``quantize_base`` is False, but received the following quantization arguments"):
        lora(block_size=32)
    lora(scaler_block_size=None)


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_that_adds_nothing_leaves_the_bidirectional_model(dora):
    model, base = adapted(lora(use_dora=dora)), plain(attn_bias=False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_b" in name:
                p.zero_()
    for m in model.modules():
        if isinstance(m, DoRALinear):
            m.initialize_dora_magnitude()
    base.load_state_dict({name: p for name, p in model.state_dict().items() if "lora" not in name and "magnitude" not in name})
    pixels = images()
    x, y = model(pixels, RATIOS)[0], base(pixels, RATIOS)[0]
    if dora:
        assert_no_worse(x, in_several_orders(lambda: base(pixels, RATIOS)[0]), dense(base).clip(pixels.double(), RATIOS)[0])
    else:
        assert torch.equal(x, y)
    causal = lora(use_dora=dora, causal_attention=True)
    causal.load_state_dict(model.state_dict())
    assert (causal(pixels, RATIOS)[0] - y).abs().max() > 0.1


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_values_with_adapters_are_the_formula_s(dora, causal):
    check(adapted(lora(use_dora=dora, causal_attention=causal)), scaling=1.5, causal_vision=causal)


def kind_of(name: str, modules: list, mlp: bool, dora: bool, quantized: bool) -> type:
    if name.split(".")[-1] in modules or (mlp and ".mlp." in name):
        return DoRALinear if dora else LoRALinear
    return FrozenNF4Linear if quantized else nn.Linear


@pytest.mark.parametrize("modules, mlp, dora, quantized", itertools.product(SUBSETS, (False, True), (False, True), (False, True)))
def test_every_linear_layer_is_of_the_kind_the_flags_say(modules, mlp, dora, quantized):
    model = lora(modules, mlp, use_dora=dora, quantize_base=quantized, attn_bias=True, lora_dropout=0.25, **(BLOCKS if quantized else {}))
    names = [f"layers.{k}.{name}" for k in range(2) for name in [f"attn.{p}" for p in ATTENTION] + ["mlp.w1", "mlp.w2"]]
    for name in names:
        m, kind = model.get_submodule(name), kind_of(name, modules, mlp, dora, quantized)
        assert type(m) is kind, name
        assert isinstance(m.weight, NF4Tensor) == quantized, name
        assert m.bias is not None and not isinstance(m.bias, NF4Tensor)
        if quantized:
            assert (m.weight.block_size, m.weight.scaler_block_size) == (32, 16)
        if kind in (LoRALinear, DoRALinear):
            assert m.lora_a.weight.shape[0] == 2 and isinstance(m.dropout, nn.Dropout) and m.dropout.p == 0.25
            assert (m.scaling if dora else m.alpha / m.rank) == 1.5
    adapters = [n for n, m in model.named_modules() if isinstance(m, (LoRALinear, DoRALinear))]
    assert set(adapters) <= set(names) and len(adapters) == 2 * (len(modules) + 2 * mlp)


def test_without_dropout_adapters_have_none():
    assert all(isinstance(m.dropout, nn.Identity) for m in lora().modules() if isinstance(m, LoRALinear))


@pytest.mark.parametrize("mlp", [False, True])
def test_a_quantized_state_dict_holds_bf16_numbers_and_loads_back(mlp):
    model = lora(["q_proj"], mlp, quantize_base=True, **BLOCKS)
    state, weight = model.state_dict(), model.layers[1].mlp.w2.weight
    assert not any(isinstance(t, NF4Tensor) for t in state.values())
    assert state["layers.1.mlp.w2.weight"].dtype == torch.bfloat16 and state["layers.1.mlp.w2.bias"].dtype == torch.float32
    assert torch.equal(state["layers.1.mlp.w2.weight"], weight.to(torch.bfloat16))
    assert "layers.1.mlp.w2.weight" in lora(["q_proj"], mlp).state_dict()
    other = lora(["q_proj"], mlp, quantize_base=True, **BLOCKS)
    other.load_state_dict(state)
    assert torch.equal(other.layers[1].mlp.w2.weight.quantized_data, weight.quantized_data)


def test_a_quantized_model_computes_with_the_numbers_its_weights_stand_for():
    model = lora(["q_proj", "v_proj"], False, quantize_base=True, attn_bias=False, **BLOCKS)
    with torch.no_grad():
        for p in model.parameters():
            if not isinstance(p, NF4Tensor):
                p += (0.5 if p.numel() == 1 else 0.1) * torch.randn_like(p)
    numbers = {name: p.get_original_weight() if isinstance(p, NF4Tensor) else p for name, p in model.named_parameters()}
    pixels = images()
    formulas = [
        Dense({n: p.detach().to(dtype) for n, p in numbers.items()}, clip_heads=4, activation=F.silu, scaling=1.5) for dtype in (torch.float32, torch.float64)
    ]
    eager = in_several_orders(lambda: formulas[0].clip(pixels, RATIOS)[0])
    assert_no_worse(model(pixels, RATIOS)[0], eager, formulas[1].clip(pixels.double(), RATIOS)[0])


def drawn_linear(state, name, n, k, bias, rank=None):
    base = nn.Linear(k, n, bias=bias)
    state[name + ".weight"] = base.weight
    if bias:
        state[name + ".bias"] = base.bias
    if rank:
        nn.Linear(k, rank, bias=False), nn.Linear(rank, n, bias=False)  # drawn, then drawn again or cleared
        state[name + ".lora_a.weight"] = nn.init.kaiming_uniform_(torch.empty(rank, k), a=5**0.5)
        state[name + ".lora_b.weight"] = torch.zeros(n, rank)


@pytest.mark.parametrize("rank, cls", [(None, True), (2, True), (None, False)])
def test_random_numbers_are_drawn_in_torchtune_s_order(rank, cls):
    build = (lambda **kwargs: lora(**kwargs)) if rank else (lambda **kwargs: clip_vision_encoder(**SIZES, **kwargs))
    torch.manual_seed(4)
    state = build(attn_bias=True, output_cls_projection=cls, cls_output_dim=6).state_dict()
    after = torch.rand(3)
    torch.manual_seed(4)
    want, scale = {}, D**-0.5
    if cls:
        want["cls_projection.weight"] = scale * torch.randn(D, 6)
    for name in ATTENTION:
        drawn_linear(want, f"attn.{name}", D, D, True, rank)
    drawn_linear(want, "mlp.w1", 4 * D, D, True, rank)
    drawn_linear(want, "mlp.w2", D, 4 * D, True, rank)
    for name in list(want):
        if name.startswith(("attn", "mlp")):
            want["layers.0." + name] = want["layers.1." + name] = want.pop(name)
    want["pre_tile_pos_embed.embedding"] = scale * torch.randn(T, T, 1, D)
    want["post_tile_pos_embed.embedding"] = scale * torch.randn(T, T, 1, D)
    want["token_pos_embedding.local_token_positional_embedding"] = scale * torch.randn(N, D)
    want["token_pos_embedding.global_token_positional_embedding"] = scale * torch.randn(T, T, N, D)
    want["conv.weight"] = nn.Conv2d(3, D, 3, 3, bias=False).weight
    want["cls_token_embedding.weight"] = scale * torch.randn(D)
    assert torch.equal(torch.rand(3), after)
    for name, t in want.items():
        assert torch.equal(state[name], t), name
    rest = {name: t for name, t in state.items() if name not in want}
    assert all(name.endswith(("gate", "norm.weight", "norm.bias", "ln_pre.weight", "ln_pre.bias", "ln_post.weight", "ln_post.bias")) for name in rest)
    assert all(torch.equal(t, torch.full_like(t, float("weight" in name))) for name, t in rest.items())


def test_attention_and_mlp_builders_pass_on_what_they_are_given():
    attention = lora_clip_attention(
        ["v_proj"], embed_dim=24, head_dim=8, num_heads=3, num_kv_heads=1, attn_dropout=0.3, attn_bias=True, lora_rank=4, lora_alpha=2, lora_dropout=0.1
    )
    assert attention.attn_dropout == 0.3 and attention.is_causal is False
    assert attention.q_proj.weight.shape == (24, 24) and attention.k_proj.weight.shape == attention.v_proj.weight.shape == (8, 24)
    assert attention.v_proj.bias is not None and attention.v_proj.dropout.p == 0.1 and attention.v_proj.rank == 4 and attention.v_proj.alpha == 2
    mlp = lora_clip_mlp(in_dim=8, out_dim=6, hidden_dim=12, activation=nn.ReLU(), lora_rank=2, lora_alpha=4, lora_dropout=0.2)
    assert mlp.w1.weight.shape == (12, 8) and mlp.w2.weight.shape == (6, 12) and mlp.w3 is None
    assert mlp.w1.dropout.p == mlp.w2.dropout.p == 0.2 and mlp.w1.bias is not None and mlp.w2.bias is not None
    dense_mlp = clip_mlp(8, 6, 12, nn.ReLU(), block_size=3)  # quantization arguments are ignored without quantize_base
    x = torch.randn(4, 8)
    assert torch.equal(dense_mlp(x), dense_mlp.w2(F.relu(dense_mlp.w1(x)))) and type(dense_mlp.w1) is nn.Linear
    quantized = clip_mlp(32, 32, 64, nn.ReLU(), quantize_base=True, **BLOCKS)
    assert type(quantized.w1) is type(quantized.w2) is FrozenNF4Linear and quantized.w1.bias is not None
    assert quantized.w2.weight.scaler_block_size == 16


def test_norms_have_the_eps_they_are_given():
    for build in (plain, lora):
        for eps in (1e-5, 1e-3):
            layers = build(**({} if eps == 1e-5 else {"norm_eps": eps})).layers
            assert {m.eps for m in layers.modules() if isinstance(m, Fp32LayerNorm)} == {eps}


@pytest.mark.parametrize("dim, multiple, width", [(4096, 256, 11008), (64, 256, 256), (1024, 256, 2816), (100, 8, 264)])
def test_llama_s_mlp_width_is_rounded_up(dim, multiple, width):
    assert scale_hidden_dim_for_mlp(dim, multiple) == width
    assert scale_hidden_dim_for_mlp(4096) == 11008


@pytest.mark.parametrize("dora, quantized", itertools.product((False, True), (False, True)))
def test_llama_s_builders_put_layers_where_the_flags_say(dora, quantized):
    sizes = {"embed_dim": 256, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 16, "lora_rank": 2, "lora_alpha": 6}
    rope = Llama3ScaledRoPE(64, max_seq_len=16)
    attention = lora_llama3_attention(["k_proj"], rope, **sizes, lora_dropout=0.1, use_dora=dora, quantize_base=quantized)
    assert attention.is_causal and attention.pos_embeddings is rope and attention.max_seq_len == 16
    kind = DoRALinear if dora else LoRALinear
    for name in ATTENTION:
        m = getattr(attention, name)
        assert type(m) is (kind if name == "k_proj" else FrozenNF4Linear if quantized else nn.Linear)
        assert m.bias is None and isinstance(m.weight, NF4Tensor) == quantized
        assert m.weight.shape == ((128, 256) if name in ("k_proj", "v_proj") else (256, 256))
    assert attention.k_proj.dropout.p == 0.1
    mlp = lora_llama3_mlp(dim=256, hidden_dim=512, lora_rank=2, lora_alpha=6, lora_dropout=0.2, use_dora=dora, quantize_base=quantized)
    assert all(type(m) is kind and m.bias is None and m.dropout.p == 0.2 and isinstance(m.weight, NF4Tensor) == quantized for m in (mlp.w1, mlp.w2, mlp.w3))
    mlp = llama3_mlp(256, 512, quantized)
    assert {type(m) for m in (mlp.w1, mlp.w2, mlp.w3)} == {FrozenNF4Linear if quantized else nn.Linear}
    assert mlp.w1.weight.shape == mlp.w3.weight.shape == (512, 256) and mlp.w2.weight.shape == (256, 512)
    assert lora_llama3_attention([], rope, **sizes).q_proj.weight.shape == (256, 256)  # an empty list is allowed here


def test_llama_s_mlp_draws_gate_down_up_and_computes_swiglu():
    torch.manual_seed(2)
    mlp = llama3_mlp(8, 12)
    torch.manual_seed(2)
    w1, w2, w3 = nn.Linear(8, 12, bias=False), nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False)
    x = torch.randn(3, 8)
    assert torch.equal(mlp(x), w2(F.silu(w1(x)) * w3(x)))


@pytest.mark.parametrize("names", [["qproj"], ["q_proj", "w1"], "q_proj"])
def test_an_unknown_projection_is_refused(names):
    """It would silently get no adapter."""
    from fastfuse.models.llama3_1 import lora_llama3_attention

    with pytest.raises(ValueError, match=r"lora_modules is .*, expected a list of q_proj, k_proj, v_proj, output_proj"):
        lora_llama3_attention(names, embed_dim=8, num_heads=2, num_kv_heads=2, max_seq_len=4, lora_rank=2, lora_alpha=4)
