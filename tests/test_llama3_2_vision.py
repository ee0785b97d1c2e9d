"""Llama 3.2 Vision: the published sizes key by key, small models against the formula in float64, and what is trained."""

import copy
import functools
import inspect
import itertools
import re
from pathlib import Path

import pytest
import torch
from dense_vision import Dense, leaves, parameters, randomize, rope_frequencies
from numerics import assert_no_worse, in_several_orders
from torch import nn
from weights import NF4Tensor

from fastfuse.models.llama3_2_vision import (
    CONFIGS,
    PROFILES,
    Llama3VisionConfig,
    Llama3VisionEncoder,
    Llama3VisionProjectionHead,
    Profile,
    TrainableParams,
    build,
    build_lora,
    llama3_2_vision_11b,
    llama3_2_vision_90b,
    llama3_2_vision_decoder,
    llama3_2_vision_encoder,
    llama3_2_vision_projection_head,
    lora_llama3_2_vision_11b,
    lora_llama3_2_vision_90b,
    lora_llama3_2_vision_decoder,
    lora_llama3_2_vision_encoder,
    lora_llama3_2_vision_projection_head,
    qlora_llama3_2_vision_11b,
    qlora_llama3_2_vision_90b,
)
from fastfuse.modules import Fp32LayerNorm, Llama3ScaledRoPE, RMSNorm, RotaryPositionalEmbeddings, TransformerCrossAttentionLayer, TransformerSelfAttentionLayer
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.model_fusion import DeepFusionModel, FusionLayer, get_fusion_params
from fastfuse.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params

ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]
SUPPORTED = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
KEYS = Path(__file__).parent / "data" / "llama3_2_vision_11b.txt"


@functools.cache
def keys_11b() -> dict[str, tuple[int, ...]]:
    """torchtune's state dict of the 11B model, keys and shapes in its order.

    A line is `key shape`; lines in a row that hold the same {a-b} are a block, written once for each number from a to b.
    """
    keys, lines = {}, KEYS.read_text().splitlines()
    for span, block in itertools.groupby(lines, lambda line: (re.findall(r"\{(\d+)-(\d+)\}", line) or [None])[0]):
        block = list(block)
        for k in range(int(span[0]), int(span[1]) + 1) if span else [0]:
            for line in block:
                key, shape = re.sub(r"\{.*?\}", str(k), line).split()
                keys[key] = tuple(map(int, shape.split("x")))
    return keys


def shapes(model: nn.Module) -> list[tuple[str, tuple[int, ...]]]:
    return [(name, tuple(t.shape)) for name, t in model.state_dict().items()]


def state_dict_key(name: str) -> str:
    """Of a parameter: FusionLayer and FusionEmbedding leave parts of its name out."""
    return name.replace(".layer.", ".").replace("tok_embeddings.embedding.", "tok_embeddings.")


def on_meta(function, *args, **kwargs):
    with torch.device("meta"):
        return function(*args, **kwargs)


def part_of(key: str) -> str:
    if ".fusion_layer." in key or ".fusion_embedding." in key or key.startswith("encoder.projection."):
        return "fusion"
    return key.split(".")[0]


def is_linear(key: str) -> bool:
    return bool(re.search(r"(attn\.\w+_proj|mlp\.w[123]|(decoder|projection)\.output)\.weight$", key))


def is_adapted(key: str, modules, parts, mlp: bool, output: bool) -> bool:
    if not is_linear(key) or part_of(key) not in parts:
        return False
    name = key.split(".")[-2]
    return name in modules or (mlp and ".mlp." in key) or (output and name == "output")


def with_adapters(keys: dict, modules, parts, mlp: bool, output: bool, rank: int, dora: bool) -> list:
    """The plain keys with a layer's adapter after its own parameters."""
    out, names = [], list(keys)
    for at, name in enumerate(names):
        out.append((name, keys[name]))
        layer = name.removesuffix(".bias") + ".weight" if name.endswith(".bias") else name
        ends = at + 1 == len(names) or names[at + 1] != name.removesuffix("weight") + "bias"
        if ends and is_adapted(layer, modules, parts, mlp, output):
            (n, k), layer = keys[layer], layer.removesuffix("weight")
            out += [(layer + "magnitude", (n,))] if dora else []
            out += [(layer + "lora_a.weight", (rank, k)), (layer + "lora_b.weight", (n, rank))]
    return out


def test_the_data_file_holds_all_907_keys():
    assert len(keys_11b()) == 907
    assert sum(torch.Size(shape).numel() for shape in keys_11b().values()) == 10_629_184_035
    assert KEYS.stat().st_size < 60_000


def test_11b_has_torchtune_s_keys_and_shapes_in_its_order():
    assert shapes(on_meta(llama3_2_vision_11b)) == list(keys_11b().items())


def test_11b_for_tiles_of_448_pixels_has_fewer_positions():
    want = [(name, tuple(1025 if n == 1601 else n for n in shape)) for name, shape in keys_11b().items()]
    assert shapes(on_meta(llama3_2_vision_11b, image_size=448)) == want


def test_90b_is_11b_with_a_wider_and_deeper_decoder():
    wider = {4096: 8192, 14336: 28672}
    blocks = {k: [(n, s) for n, s in keys_11b().items() if n.startswith(f"decoder.layers.{k}.")] for k in range(4)}
    want, rest = [], list(keys_11b().items())
    want += rest[:2]
    for k in range(80):
        want += [(name.replace(f"layers.{k % 4}.", f"layers.{k}."), shape) for name, shape in blocks[k % 4]]
    want += [(name, shape) for name, shape in rest[2:] if not name.startswith("decoder.layers.")]
    want = [(name, shape if name.startswith("encoder.clip") else tuple(wider.get(n, n) for n in shape)) for name, shape in want]
    model = on_meta(llama3_2_vision_90b)
    assert len(want) == 1495 and shapes(model) == want
    assert sum(p.numel() for p in model.parameters()) == 88_552_318_523


def test_11b_s_parameters_are_counted_per_part():
    model = on_meta(llama3_2_vision_11b)
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    clip, projection = model.encoder.clip, model.encoder.projection
    assert (count(model), count(model.decoder), count(model.encoder)) == (10_629_184_035, 9_775_192_080, 853_991_955)
    assert (count(clip), count(projection)) == (665_152_003, 188_839_952)
    fusion = get_fusion_params(model)
    assert (len(fusion), sum(p.numel() for p in fusion.values())) == (219, 1_933_770_784)
    assert {state_dict_key(name) for name in fusion} == {name for name in keys_11b() if part_of(name) == "fusion"}


def test_11b_s_settings_that_no_key_shows():
    model = on_meta(llama3_2_vision_11b)
    clip, head, decoder = model.encoder.clip, model.encoder.projection, model.decoder
    assert clip.out_indices == [3, 7, 15, 23, 30] and head.num_hidden == 5 and clip.get_image_tokens_per_tile() == 1601
    assert {(m.attn.num_heads, m.attn.head_dim, m.attn.is_causal) for m in [*clip.layers, *head.layers]} == {(16, 80, False)}
    assert all(isinstance(m.mlp.activation, nn.GELU) and m.mlp.activation.approximate == "none" for m in [*clip.layers, *head.layers])
    assert [k for k, m in enumerate(decoder.layers) if isinstance(m, FusionLayer)] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert all(m.fusion_first for m in decoder.layers if isinstance(m, FusionLayer))
    assert (decoder.max_seq_len, decoder.num_heads, decoder.head_dim) == (131_072, 32, 128)
    attention = [m.attn for m in decoder.modules() if isinstance(m, TransformerSelfAttentionLayer)]
    cross = [m.attn for m in decoder.modules() if isinstance(m, TransformerCrossAttentionLayer)]
    assert {(a.num_heads, a.num_kv_heads, a.head_dim, a.is_causal, a.max_seq_len) for a in attention} == {(32, 8, 128, True, 131_072)}
    assert {(a.num_heads, a.num_kv_heads, a.head_dim, a.is_causal, a.max_seq_len) for a in cross} == {(32, 8, 128, False, 128_080)}
    (rope,) = {a.pos_embeddings for a in attention}
    assert isinstance(rope, Llama3ScaledRoPE) and (rope.dim, rope.base, rope.max_seq_len) == (128, 500_000, 131_072)
    assert (rope.scale_factor, rope.low_freq_factor, rope.high_freq_factor, rope.old_context_len) == (8, 1, 4, 8192)
    assert {a.pos_embeddings for a in cross} == {None}


def trained(model) -> set[str]:
    return {state_dict_key(name) for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("flags", itertools.product((False, True), repeat=3))
def test_the_flags_say_which_parts_of_11b_are_trained(flags):
    parts = {part for part, flag in zip(("decoder", "encoder", "fusion"), flags, strict=True) if flag}
    assert trained(on_meta(llama3_2_vision_11b, *flags)) == {name for name in keys_11b() if part_of(name) in parts}


def test_by_default_encoder_and_fusion_are_trained():
    assert trained(on_meta(llama3_2_vision_11b)) == {name for name in keys_11b() if part_of(name) != "decoder"}
    names = ["decoder_trainable", "encoder_trainable", "fusion_trainable", "image_size"]
    for builder in (llama3_2_vision_11b, llama3_2_vision_90b):
        found = inspect.signature(builder).parameters
        assert list(found)[:4] == names and [found[n].default for n in names] == [False, True, True, 560]
    want = {
        "lora_attn_modules": inspect.Parameter.empty, "decoder_trainable": "frozen", "encoder_trainable": "lora", "fusion_trainable": "lora",
        "apply_lora_to_mlp": False, "apply_lora_to_output": False, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "use_dora": False,
        "quantize_base": False, "image_size": 560,
    }  # fmt: skip
    for builder in (lora_llama3_2_vision_11b, lora_llama3_2_vision_90b):
        found = inspect.signature(builder).parameters
        assert [(n, found[n].default) for n in list(found)[:12]] == list(want.items())


LORA_CASES = [
    # decoder, encoder, fusion, modules, mlp, output, rank
    ("frozen", "lora", "lora", ["q_proj", "v_proj"], False, False, 8),
    ("LoRA", "Lora", "lora", ATTENTION, True, True, 8),
    ("lora", "frozen", "frozen", ["k_proj"], True, True, 4),
    ("lora", "frozen", "LORA", ["output_proj"], False, True, 16),
    ("frozen", "lora", "frozen", ["q_proj"], True, True, 8),
]


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("case", LORA_CASES)
def test_11b_with_adapters_has_the_plain_keys_and_the_adapters(case, dora):
    decoder, encoder, fusion, modules, mlp, output, rank = case
    parts = {part for part, word in (("decoder", decoder), ("encoder", encoder), ("fusion", fusion)) if word.lower() == "lora"}
    model = on_meta(lora_llama3_2_vision_11b, modules, decoder, encoder, fusion, mlp, output, rank, 16, use_dora=dora)
    want = with_adapters(keys_11b(), modules, parts, mlp, output, rank, dora)
    assert shapes(model) == want
    assert trained(model) == {name for name, _ in want if part_of(name) in parts}  # base weights as well
    adapters = {name for name, _ in want if "lora" in name or "magnitude" in name}
    found = get_adapter_params(model)
    assert {state_dict_key(name) for name in found} == adapters
    set_trainable_params(model, found)
    assert trained(model) == adapters


@pytest.mark.parametrize("case", LORA_CASES[:2])
def test_qlora_11b_quantizes_adapted_parts_and_every_mlp_of_the_decoder(case):
    decoder, encoder, fusion, modules, mlp, output, rank = case
    parts = {part for part, word in (("decoder", decoder), ("encoder", encoder), ("fusion", fusion)) if word.lower() == "lora"}
    model = on_meta(qlora_llama3_2_vision_11b, modules, decoder, encoder, fusion, mlp, output, rank)
    own = {state_dict_key(name): p for name, p in model.named_parameters()}
    want = dict(with_adapters(keys_11b(), modules, parts, mlp, output, rank, False))
    assert {name: tuple(p.shape) for name, p in own.items()} == want
    quantized = {name for name in keys_11b() if is_linear(name) and "output.weight" not in name and part_of(name) in parts}
    quantized |= {name for name in keys_11b() if name.startswith("decoder") and ".mlp.w" in name}
    assert {name for name, p in own.items() if isinstance(p, NF4Tensor)} == quantized
    for name in quantized:
        blocks = (own[name].block_size, own[name].scaler_block_size)
        assert blocks == ((64, 200) if name.startswith("encoder") else (64, 256)), name
    for name, m in model.named_modules():
        if isinstance(m, (LoRALinear, DoRALinear)):
            assert m._quantize_base == (not name.endswith(".output")), name
        elif isinstance(getattr(m, "weight", None), NF4Tensor):
            assert type(m) is FrozenNF4Linear


def test_qlora_builders_are_the_lora_builders_with_quantize_base():
    for q, full in ((qlora_llama3_2_vision_11b, lora_llama3_2_vision_11b), (qlora_llama3_2_vision_90b, lora_llama3_2_vision_90b)):
        assert isinstance(q, functools.partial) and q.func is full and q.args == () and q.keywords == {"quantize_base": True}


def test_dora_11b_and_lora_90b_have_the_layers_their_names_promise():
    model = on_meta(lora_llama3_2_vision_11b, ["q_proj"], use_dora=True, lora_dropout=0.5)
    adapters = [m for m in model.modules() if isinstance(m, (LoRALinear, DoRALinear))]
    assert len(adapters) == 48 and all(type(m) is DoRALinear and m.dropout.p == 0.5 and m.scaling == 2 for m in adapters)  # 32 CLIP, 8 head, 8 cross
    model = on_meta(lora_llama3_2_vision_90b, ["q_proj"], "lora", "frozen", "frozen", lora_rank=4, lora_alpha=4, lora_dropout=0.1)
    adapters = [m for m in model.modules() if isinstance(m, (LoRALinear, DoRALinear))]
    assert len(adapters) == 80 and all(type(m) is LoRALinear and (m.in_dim, m.rank, m.alpha, m.dropout.p) == (8192, 4, 4, 0.1) for m in adapters)


def test_how_a_part_is_trained_is_one_of_three_words():
    assert {p.name: p.value for p in TrainableParams} == {"FULL": "full", "LORA": "lora", "FROZEN": "frozen"}
    for place in range(3):
        words = ["frozen"] * 3
        words[place] = "foo"
        with pytest.raises(ValueError, match="'foo' is not a valid TrainableParams"):
            lora_llama3_2_vision_11b(["q_proj"], *words)
        words[place] = "Full"
        for error in (AssertionError, ValueError):
            with pytest.raises(error, match=r"We've temporarily removed support for mixed LoRA \+ Full Finetuning yet"):
                lora_llama3_2_vision_11b(["q_proj"], *words)


@pytest.mark.parametrize("profile", ["meta", "transformers"])
def test_profiles_change_no_key_and_only_transformers_three_shapes(profile):
    model = on_meta(llama3_2_vision_11b, profile=profile)
    want = dict(keys_11b())
    if profile == "transformers":
        for name in ("pre_tile_pos_embed.embedding", "post_tile_pos_embed.embedding", "token_pos_embedding.global_token_positional_embedding"):
            name = "encoder.clip." + name
            want[name] = (9, *want[name][1:])
    assert shapes(model) == list(want.items())


ENCODER = {"patch_size": 4, "num_heads": 2, "clip_embed_dim": 16, "clip_num_layers": 3, "clip_hidden_states": [0, 2], "num_layers_projection": 2}
ENCODER |= {"decoder_embed_dim": 32, "tile_size": 12}
DECODER = {"vocab_size": 24, "num_layers": 4, "fusion_interval": 2, "num_special_tokens": 2, "num_heads": 4, "num_kv_heads": 2, "embed_dim": 32}
DECODER |= {"max_seq_len": 32, "encoder_max_seq_len": 80, "intermediate_dim": 48}
N = 10
RATIOS = torch.tensor([[[2, 2], [1, 3]], [[4, 1], [1, 1]]])
KNOWN = {"clip_heads": 2, "heads": 4, "kv_heads": 2, "out_indices": (0, 2)}
LORA = {"lora_attn_modules": ["q_proj", "output_proj"], "apply_lora_to_mlp": True, "apply_lora_to_output": True, "lora_rank": 2, "lora_alpha": 3}
PROFILE_FACTS = {
    "torchtune": {},
    "meta": {"cross_eps": 1e-5, "pad_to": 8},
    "transformers": {"cross_eps": 1e-5, "pad_to": 8, "states_after": True, "uniform_rows": True, "supported": SUPPORTED},
}


def small(**kwargs) -> DeepFusionModel:
    return DeepFusionModel(llama3_2_vision_decoder(**DECODER, **kwargs), llama3_2_vision_encoder(**ENCODER, **kwargs), encoder_trainable=True)


def small_lora(decoder=True, encoder=True, fusion=True, encoder_kwargs=None, **kwargs) -> DeepFusionModel:
    made_encoder = lora_llama3_2_vision_encoder(encoder, fusion, **{**LORA, **kwargs}, **ENCODER, **(encoder_kwargs or {}))
    return DeepFusionModel(lora_llama3_2_vision_decoder(decoder, fusion, **{**LORA, **kwargs}, **DECODER), made_encoder)


def inputs(dtype=torch.float32, s=7):
    images = torch.randn(2, 2, 4, 3, 12, 12).to(dtype)
    tokens = torch.randint(0, 26, (2, s))
    mask = torch.rand(2, s, 2 * 4 * N) > 0.5
    mask[0, :3] = False
    mask[1, 4] = False
    return tokens, images, mask


def call(model, tokens, images, mask, ratio=RATIOS):
    return model(tokens, encoder_input={"images": images, "aspect_ratio": ratio}, encoder_mask=mask)


def in_float64(model) -> nn.Module:
    """A copy whose rotary tables, which stay fp32 in any model, hold the exact angles too."""
    model = copy.deepcopy(model).double()
    for m in model.modules():
        if isinstance(m, RotaryPositionalEmbeddings):
            scaled = {"scale": 8} if isinstance(m, Llama3ScaledRoPE) else {"scale": 1}
            angle = torch.outer(torch.arange(m.cache.shape[0]).double(), torch.tensor(rope_frequencies(m.dim, m.base, **scaled)).double())
            assert torch.allclose(m.cache.double(), torch.stack([angle.cos(), angle.sin()], -1), rtol=0, atol=angle.max().item() * 2**-22)
            m.cache = torch.stack([angle.cos(), angle.sin()], -1)
    return model


def check(model, dtype=torch.float32, gradients=True, **known):
    """Logits in dtype are as near to float64 as the formula in dtype; in float64 they and all gradients are the formula's."""
    model = model.to(dtype)
    tokens, images, mask = inputs(dtype)
    exact, same = leaves(parameters(model), torch.float64), leaves(parameters(model), dtype)
    want = Dense(exact, **KNOWN | known).logits(tokens, images.double(), RATIOS, mask)
    eager = in_several_orders(Dense(same, **KNOWN | known).logits, tokens, images, RATIOS, mask)
    got = call(model, tokens, images, mask)
    assert got.dtype == torch.float32 and got.shape == (2, 7, 24)
    assert_no_worse(got, eager, want, "logits")
    double = in_float64(model).requires_grad_(True)
    logits = call(double, tokens, images.double(), mask).double()
    assert_no_worse(logits.float(), want.float(), want, "logits in float64")
    if gradients:
        dy = torch.randn(want.shape)
        names = list(exact)
        got_g = torch.autograd.grad(logits, list(parameters(double).values()), dy.double())
        want_g = torch.autograd.grad(want, list(exact.values()), dy.double())
        for name, a, b in zip(names, got_g, want_g, strict=True):
            assert b.abs().max() > 0, f"{name} gets no gradient"
            assert_no_worse(a.float(), b.float(), b, f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("profile", list(PROFILE_FACTS))
def test_logits_and_gradients_of_the_whole_model_are_the_formula_s(profile, dtype):
    check(randomize(small(profile=profile)), dtype, gradients=dtype == torch.float32, **PROFILE_FACTS[profile])


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_with_adapters_are_the_formula_s(dora, dtype):
    model = randomize(small_lora(use_dora=dora))
    for m in model.modules():
        if isinstance(m, DoRALinear):
            m.initialize_dora_magnitude()
            m.magnitude.data *= 1 + 0.2 * torch.rand_like(m.magnitude)
    check(model, dtype, gradients=dtype == torch.float32, scaling=1.5)


@pytest.mark.parametrize("parts", [(True, False), (False, True)])
def test_with_causal_attention_the_adapted_parts_alone_are_as_torchtune_leaves_them(parts):
    encoder, fusion = parts
    made = randomize(lora_llama3_2_vision_encoder(encoder, fusion, ["v_proj"], **ENCODER, causal_attention=True))
    _, images, _ = inputs()
    assert {m.attn.is_causal for m in made.clip.layers} == {encoder} and {m.attn.is_causal for m in made.projection.layers} == {fusion}
    same = randomize(lora_llama3_2_vision_encoder(encoder, fusion, ["v_proj"], **ENCODER))
    assert not any(m.attn.is_causal for m in [*same.clip.layers, *same.projection.layers])
    same.load_state_dict(made.state_dict())
    known = Dense(leaves(parameters(made), torch.float64), **KNOWN, scaling=2)
    want = known.encoder(images.double(), RATIOS)
    fp32 = in_several_orders(Dense(leaves(parameters(made), torch.float32), **KNOWN, scaling=2).encoder, images, RATIOS)
    assert_no_worse(same(images, RATIOS), fp32, want)
    assert (made(images, RATIOS) - want).abs().max() > 0.01


def test_adapters_that_add_nothing_leave_the_plain_model():
    adapted, plain = small_lora(), randomize(small())
    adapted.load_state_dict(plain.state_dict(), strict=False)
    assert all(not p.any() for name, p in adapted.named_parameters() if "lora_b" in name)
    tokens, images, mask = inputs()
    assert torch.equal(call(adapted, tokens, images, mask), call(plain, tokens, images, mask))


def test_the_projection_s_input_is_its_output_then_the_states_feature_by_feature():
    head = llama3_2_vision_projection_head(num_layers=0, num_heads=2, decoder_embed_dim=5, clip_embed_dim=4, num_hidden_inputs=3)
    with torch.no_grad():
        head.output.bias.zero_()
    x, states = torch.randn(2, 1, 2, 3, 4), [torch.randn(2, 1, 2, 3, 4) for _ in range(3)]
    w = head.output.weight.detach().double()
    want = torch.zeros(2, 1, 2, 3, 5, dtype=torch.float64)
    for j in range(4):
        want += x[..., j : j + 1].double() * w[:, j]
        for k, state in enumerate(states):
            want += state[..., j : j + 1].double() * w[:, 4 + 3 * j + k]
    features = torch.cat([x, *(s[..., j : j + 1] for j in range(4) for s in states)], -1)
    got = head(x, states)
    assert got.shape == (2, 6, 5)
    assert_no_worse(got, head.output(features).flatten(1, 3), want.flatten(1, 3))


def test_a_new_projection_head_s_layers_change_nothing():
    head = llama3_2_vision_projection_head(num_layers=2, num_heads=2, decoder_embed_dim=8, clip_embed_dim=8, num_hidden_inputs=0)
    x = torch.randn(1, 2, 3, 4, 8)
    assert torch.equal(head(x), head.output(x).flatten(1, 3))
    nn.init.constant_(head.layers[0].sa_scale.scale, 0.5)
    nn.init.constant_(head.layers[1].mlp_scale.scale, 0.5)
    assert not torch.isclose(head(x), head.output(x).flatten(1, 3)).all()


def test_a_head_that_expects_hidden_states_says_so():
    head = Llama3VisionProjectionHead([], nn.Linear(12, 4), num_hidden_inputs=2)
    x = torch.randn(1, 1, 1, 3, 4)
    assert head.num_hidden == 2 and list(head.state_dict()) == ["output.weight", "output.bias"]
    with pytest.raises(TypeError, match="hidden_states is None, the projection head takes num_hidden_inputs=2"):
        head(x)
    with pytest.raises(ValueError, match="hidden_states has 1 tensors, the projection head takes num_hidden_inputs=2"):
        head(x, [x])


def test_the_encoder_is_its_head_over_its_clip_and_the_head_is_fusion():
    class Clip(nn.Module):
        def forward(self, images, aspect_ratio):
            return images + 1, [aspect_ratio]

    class Head(nn.Linear):
        def forward(self, x, hidden_states):
            return x, hidden_states

    encoder = Llama3VisionEncoder(Clip(), Head(2, 3))
    x, states = encoder(torch.zeros(1), "ratio")
    assert torch.equal(x, torch.ones(1)) and states == ["ratio"] and encoder(torch.zeros(1))[1] == [None]
    assert encoder.projection.fusion_params() == ["weight", "bias"] and list(encoder.state_dict()) == ["projection.weight", "projection.bias"]
    assert list(get_fusion_params(encoder)) == ["projection.weight", "projection.bias"]


@pytest.mark.parametrize("states", [None, [], [2], [3], [2, 0, 1]])
def test_any_choice_of_hidden_states_reaches_the_projection(states):
    encoder = randomize(llama3_2_vision_encoder(**ENCODER | {"clip_hidden_states": states}))
    assert encoder.projection.num_hidden == len(states or []) and encoder.projection.output.weight.shape == (32, 16 * (1 + len(states or [])))
    _, images, _ = inputs()
    args = {"clip_heads": 2, "out_indices": tuple(states or ())}
    want = Dense(leaves(parameters(encoder), torch.float64), **args).encoder(images.double(), RATIOS)
    eager = in_several_orders(Dense(leaves(parameters(encoder), torch.float32), **args).encoder, images, RATIOS)
    assert_no_worse(encoder(images, RATIOS), eager, want)


def test_without_an_image_the_decoder_is_llama():
    model = randomize(small())
    tokens, _, _ = inputs()
    args = (tokens, None, None, "decoder.")
    exact, fp32 = (Dense(leaves(parameters(model), dtype), **KNOWN).decoder for dtype in (torch.float64, torch.float32))
    assert_no_worse(model(tokens), in_several_orders(fp32, *args), exact(*args))
    rows = inputs()[2]
    rows[:] = False  # tokens that may see no image
    assert torch.equal(call(model, tokens, inputs()[1], rows), model(tokens))


def test_a_missing_aspect_ratio_is_named_through_the_whole_model():
    tokens, images, mask = inputs()
    with pytest.raises(ValueError, match="aspect_ratio was not provided, but found n_tiles>1"):
        small()(tokens, encoder_input={"images": images}, encoder_mask=mask)
    with pytest.raises(ValueError, match=r"\[3, 2\] \(h, w\), images have 4 tiles"):
        call(small(), tokens, images, mask, torch.tensor([[[2, 2], [1, 3]], [[3, 2], [1, 1]]]))


# Numbers from torchtune 0.6.1, seed 0, decoder first: the last three of each weight.
TUNE_ENCODER = {"patch_size": 4, "num_heads": 4, "clip_embed_dim": 32, "clip_num_layers": 4, "clip_hidden_states": [1, 3], "num_layers_projection": 2}
TUNE_ENCODER |= {"decoder_embed_dim": 64, "tile_size": 12, "max_num_tiles": 4, "in_channels": 3}
TUNE_DECODER = {"vocab_size": 128, "num_layers": 4, "fusion_interval": 2, "num_special_tokens": 2, "num_heads": 8, "num_kv_heads": 4, "embed_dim": 64}
TUNE_DECODER |= {"max_seq_len": 64, "encoder_max_seq_len": 160}
TUNE_WEIGHTS = {
    "decoder.layers.0.attn.q_proj.weight": [0.054342836, 0.029824317, -0.10910276],
    "decoder.layers.1.fusion_layer.mlp.w2.weight": [-0.045913689, 0.0098762438, -0.0096520931],
    "decoder.layers.3.mlp.w3.weight": [0.025767028, 0.080594048, -0.11960061],
    "decoder.tok_embeddings.weight": [2.4372303, 0.51501793, -0.80289495],
    "decoder.tok_embeddings.fusion_embedding.weight": [1.0900038, -0.2162862, 1.1070191],
    "decoder.output.weight": [0.12310085, -0.055426002, -0.075223237],
    "encoder.clip.layers.3.attn.v_proj.weight": [-0.15205032, 0.077866152, -0.10661795],
    "encoder.clip.token_pos_embedding.global_token_positional_embedding": [-0.12470318, 0.077914611, -0.0047649918],
    "encoder.clip.conv.weight": [0.042675517, 0.053911008, -0.010633628],
    "encoder.clip.cls_token_embedding.weight": [-0.33271363, -0.23153304, 0.055641189],
    "encoder.projection.layers.1.mlp.w1.bias": [-0.15515149, 0.080240771, -0.1244415],
    "encoder.projection.output.weight": [-0.03001252, 0.049941298, -0.090227894],
}
TUNE_LOGITS = {  # (sample, token): the first four, plain and with adapters
    (0, 2): ([-0.48747599, -0.30581582, -0.68894571, -0.48525068], [-4.5081863, 0.7083534, 7.4509807, 2.5974209]),
    (0, 9): ([0.03516667, -0.051970728, -0.18723673, -1.0108321], [-5.6911402, 1.2397593, -2.8929687, 3.5797415]),
    (1, 9): ([-0.010253613, -0.62204516, 0.061472394, -0.081655011], [2.1389458, -3.0346365, 0.1807473, -2.239881]),
}


def open_gates(model):
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gate", "scale")) and p.numel() == 1:
                p.fill_(0.3)


def tune_inputs():
    torch.manual_seed(1)
    images, ratio = torch.randn(2, 2, 4, 3, 12, 12), RATIOS
    tokens, mask = torch.randint(0, 130, (2, 10)), torch.rand(2, 10, 80) > 0.5
    mask[0, :3] = False
    return tokens, images, mask, ratio


def test_a_seed_gives_torchtune_s_weights_and_logits():
    torch.manual_seed(0)
    model = DeepFusionModel(llama3_2_vision_decoder(**TUNE_DECODER), llama3_2_vision_encoder(**TUNE_ENCODER))
    torch.testing.assert_close(torch.rand(3), torch.tensor([0.41705245, 0.93246692, 0.62118024]))
    for name, want in TUNE_WEIGHTS.items():
        torch.testing.assert_close(model.state_dict()[name].flatten()[-3:], torch.tensor(want), msg=name)
    open_gates(model)
    args = tune_inputs()
    encoded = model.encoder(args[1], args[3])
    torch.testing.assert_close(encoded[1, -1, :4].detach(), torch.tensor([0.16454254, -0.033715345, 0.72657907, 0.12898336]))
    logits = call(model, *args).detach()
    for (b, s), (want, _) in TUNE_LOGITS.items():
        torch.testing.assert_close(logits[b, s, :4], torch.tensor(want))


def test_a_seed_gives_torchtune_s_logits_with_adapters_once_its_encoder_is_bidirectional():
    torch.manual_seed(0)
    flags = {"apply_lora_to_mlp": True, "apply_lora_to_output": True}
    decoder = lora_llama3_2_vision_decoder(True, True, ["q_proj", "v_proj"], **flags, **TUNE_DECODER)
    model = DeepFusionModel(decoder, lora_llama3_2_vision_encoder(True, True, ["q_proj", "output_proj"], **flags, **TUNE_ENCODER))
    open_gates(model)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_b" in name:
                p.normal_()
    args = tune_inputs()
    logits = call(model, *args).detach()
    for (b, s), (_, want) in TUNE_LOGITS.items():
        torch.testing.assert_close(logits[b, s, :4], torch.tensor(want))


@pytest.mark.parametrize("adapted", [False, True])
def test_the_projection_head_and_decoder_draw_in_torchtune_s_order(adapted):
    rank = 2 if adapted else None

    def linear(n, k, bias, lora=adapted):
        weights = list(nn.Linear(k, n, bias=bias).parameters())
        if lora:
            nn.Linear(k, rank, bias=False), nn.Linear(rank, n, bias=False)
            weights.append(nn.init.kaiming_uniform_(torch.empty(rank, k), a=5**0.5))
        return weights

    torch.manual_seed(8)
    head_args = {"num_layers": 2, "num_heads": 2, "decoder_embed_dim": 12, "clip_embed_dim": 8, "num_hidden_inputs": 1}
    if adapted:
        lora = {"apply_lora_to_mlp": True, "apply_lora_to_output": True, "lora_rank": 2, "lora_alpha": 4}
        head = lora_llama3_2_vision_projection_head(ATTENTION, **head_args, **lora)
        decoder = lora_llama3_2_vision_decoder(True, True, ATTENTION, True, True, lora_rank=2, **DECODER)
    else:
        head, decoder = llama3_2_vision_projection_head(**head_args), llama3_2_vision_decoder(**DECODER)
    after = torch.rand(2)
    torch.manual_seed(8)
    want = []
    for _ in range(2):
        want += [w for _ in ATTENTION for w in linear(8, 8, False)] + linear(32, 8, True) + linear(8, 32, True)
    want += linear(12, 16, True)
    layer = [(32, 32), (16, 32), (16, 32), (32, 32), (48, 32), (32, 48), (48, 32)]  # q, k, v, output; gate, down, up
    for k in range(4):
        for _ in range(2 if k % 2 else 1):  # self, then cross
            want += [w for n, m in layer for w in linear(n, m, False)]
    want += [nn.Embedding(24, 32).weight, nn.Embedding(2, 32).weight]
    want += linear(24, 32, False)
    assert torch.equal(torch.rand(2), after)
    drawn = [p for m in (head, decoder) for name, p in m.named_parameters() if not re.search(r"norm|scale|lora_b", name)]
    assert len(drawn) == len(want)
    drawn_by_number = sorted(drawn, key=lambda t: t.sum().item())
    assert all(torch.equal(a, b) for a, b in zip(drawn_by_number, sorted(want, key=lambda t: t.sum().item()), strict=True))
    per_layer = len(layer) * (2 if adapted else 1)
    first = sum(1 for name, _ in head.named_parameters() if not re.search(r"norm|scale|lora_b", name))
    assert torch.equal(decoder.layers[1].layer.attn.q_proj.weight, want[first + per_layer])
    assert torch.equal(decoder.layers[1].fusion_layer.attn.q_proj.weight, want[first + 2 * per_layer])
    assert torch.equal(decoder.layers[0].mlp.w2.weight, want[first + per_layer - (4 if adapted else 2)])


def test_build_makes_the_encoder_first():
    config = small_config()
    torch.manual_seed(3)
    model = build(config)
    torch.manual_seed(3)
    encoder, decoder = llama3_2_vision_encoder(**ENCODER, clip_hidden_dim=64), llama3_2_vision_decoder(**DECODER)
    assert all(torch.equal(a, b) for a, b in zip(model.encoder.parameters(), encoder.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(model.decoder.parameters(), decoder.parameters(), strict=True))


def small_config(**changes) -> Llama3VisionConfig:
    return Llama3VisionConfig(
        tile_size=12, patch_size=4, clip_embed_dim=16, clip_num_heads=2, clip_num_layers=3, clip_hidden_dim=64, clip_hidden_states=(0, 2),
        num_layers_projection=2, vocab_size=24, num_special_tokens=2, num_layers=4, fusion_interval=2, num_heads=4, num_kv_heads=2, embed_dim=32,
        intermediate_dim=48, max_seq_len=32, encoder_max_seq_len=80, **changes,
    )  # fmt: skip


def norms(model):
    return {name: m.eps for name, m in model.named_modules() if isinstance(m, (RMSNorm, Fp32LayerNorm))}


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("profile", list(PROFILES))
def test_every_norm_has_the_profile_s_eps(profile, lora):
    model = small_lora(profile=profile) if lora else small(profile=profile)
    found = norms(model)
    cross = {name for name in found if re.search(r"fusion_layer\.(ca|mlp)_norm", name)}
    assert len(cross) == 4 and len(found) == 4 + 8 + 1 + 4 + 2 + 6 + 4  # cross (own, of heads), self, last; head, clip's ends, layers
    assert {found[name] for name in cross} == {1e-6 if profile == "torchtune" else 1e-5}
    assert {eps for name, eps in found.items() if name not in cross} == {1e-5}


def test_other_eps_reach_every_norm_but_clip_s_ends_and_torchtune_s_cross_norms():
    for profile in PROFILES:
        found = norms(DeepFusionModel(llama3_2_vision_decoder(**DECODER, norm_eps=1e-3, profile=profile), llama3_2_vision_encoder(**ENCODER, norm_eps=1e-2)))
        for name, eps in found.items():
            if re.search(r"ln_(pre|post)", name):
                assert eps == 1e-5
            elif name.startswith("encoder"):
                assert eps == 1e-2
            elif re.search(r"fusion_layer\.(ca|mlp)_norm", name):
                assert eps == (1e-6 if profile == "torchtune" else 1e-3)
            else:
                assert eps == 1e-3


def test_profiles_are_rows_and_unknown_names_are_refused():
    assert PROFILES["torchtune"] == Profile("torchtune", 1e-6, 1, False, "zero", "grid")
    assert PROFILES["meta"] == Profile("meta", None, 8, False, "zero", "grid")
    assert PROFILES["transformers"] == Profile("transformers", None, 8, True, "uniform", "ratios")
    for builder, sizes in ((llama3_2_vision_encoder, ENCODER), (llama3_2_vision_decoder, DECODER)):
        with pytest.raises(ValueError, match=r"profile is 'hf', expected one of \['torchtune', 'meta', 'transformers'\]"):
            builder(**sizes, profile="hf")
    own = Profile("own", 1e-4, 4, True, "zero", "grid")
    check(randomize(small(profile=own)), gradients=False, cross_eps=1e-4, pad_to=4, states_after=True)


@pytest.mark.parametrize("interval, cross", [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (4, [3]), (5, [4]), (6, [])])
def test_every_interval_th_layer_is_a_fusion_layer_with_cross_attention_first(interval, cross):
    for decoder in (
        llama3_2_vision_decoder(**DECODER | {"fusion_interval": interval, "num_layers": 5}),
        lora_llama3_2_vision_decoder(True, True, ["q_proj"], **DECODER | {"fusion_interval": interval, "num_layers": 5}),
    ):
        assert [k for k, m in enumerate(decoder.layers) if isinstance(m, FusionLayer)] == cross
        for k, m in enumerate(decoder.layers):
            inner = m.layer if k in cross else m
            assert type(inner) is TransformerSelfAttentionLayer and inner.attn.is_causal and inner.attn.q_norm is None
            if k in cross:
                assert m.fusion_first and type(m.fusion_layer) is TransformerCrossAttentionLayer
                attn = m.fusion_layer.attn
                assert not attn.is_causal and attn.pos_embeddings is None and attn.max_seq_len == 80 and attn.q_norm is not attn.k_norm
                assert attn.q_norm.scale.shape == attn.k_norm.scale.shape == (8,)


def test_one_scaled_rope_is_shared_by_all_self_attention_layers():
    for decoder in (llama3_2_vision_decoder(**DECODER), lora_llama3_2_vision_decoder(True, True, ["q_proj"], **DECODER)):
        ropes = [m.pos_embeddings for m in decoder.modules() if getattr(m, "pos_embeddings", None) is not None]
        assert len(ropes) == 4 and all(rope is ropes[0] for rope in ropes)
        assert type(ropes[0]) is Llama3ScaledRoPE and (ropes[0].dim, ropes[0].max_seq_len, ropes[0].base) == (8, 32, 500_000)
        angle = torch.outer(torch.arange(32).double(), torch.tensor(rope_frequencies(8, 500_000.0)).double())
        unscaled = torch.outer(torch.arange(32).double(), torch.tensor(rope_frequencies(8, 500_000.0, scale=1)).double())
        torch.testing.assert_close(ropes[0].cache, torch.stack([angle.cos(), angle.sin()], -1).float())
        assert not torch.allclose(ropes[0].cache, torch.stack([unscaled.cos(), unscaled.sin()], -1).float(), rtol=0, atol=1e-3)


def test_rope_scaling_may_be_other_or_none():
    model = DeepFusionModel(llama3_2_vision_decoder(**DECODER, rope_scaling=None, rope_base=100.0), llama3_2_vision_encoder(**ENCODER))
    assert type(model.decoder.layers[0].attn.pos_embeddings) is RotaryPositionalEmbeddings
    check(randomize(model), gradients=False, rope={"base": 100.0, "scale": 1})
    scaling = {"scale_factor": 4, "low_freq_factor": 1, "high_freq_factor": 2, "old_context_len": 64}
    decoder = randomize(llama3_2_vision_decoder(**DECODER, rope_scaling=scaling, rope_base=1000.0))
    tokens, _, _ = inputs(s=20)
    known = {"rope": {"base": 1000.0, "scale": 4, "low": 1, "high": 2, "old": 64}}
    exact, fp32 = (Dense(leaves(parameters(decoder), dtype), **KNOWN | known).decoder for dtype in (torch.float64, torch.float32))
    assert_no_worse(decoder(tokens), in_several_orders(fp32, tokens, None, None), exact(tokens, None, None))


@pytest.mark.parametrize("nothing", [None, 0])
def test_left_out_widths_and_heads_are_derived(nothing):
    decoder = llama3_2_vision_decoder(**DECODER | {"num_kv_heads": nothing, "intermediate_dim": nothing})
    assert decoder.layers[0].attn.k_proj.weight.shape == (32, 32) and decoder.layers[0].attn.num_kv_heads == 4
    assert decoder.layers[0].mlp.w1.weight.shape == (256, 32)  # 4 * floor(64 / 3) = 84, up to a multiple of 256


def test_fusion_tokens_have_embeddings_and_no_logits():
    decoder = llama3_2_vision_decoder(**DECODER)
    assert decoder.tok_embeddings.num_embeddings == 26 and decoder.output.weight.shape == (24, 32) and decoder.output.bias is None


def test_cross_attention_may_be_placed_as_transformers_counts():
    """Seven layers of which 1, 4 and 6 attend to the image: 1 and 4 go before the layer after them, 6 stands alone."""
    decoder = llama3_2_vision_decoder(**DECODER, cross_attention_layers=[1, 4, 6])
    kinds = [type(m) for m in decoder.layers]
    assert kinds == [TransformerSelfAttentionLayer, FusionLayer, TransformerSelfAttentionLayer, FusionLayer, TransformerCrossAttentionLayer]
    for place in ([1, 4], (1, 4)):
        same = llama3_2_vision_decoder(**DECODER, cross_attention_layers=place)
        assert list(same.state_dict()) == list(llama3_2_vision_decoder(**DECODER).state_dict())
    with pytest.raises(ValueError, match=r"cross_attention_layers has \[9\]"):
        llama3_2_vision_decoder(**DECODER, cross_attention_layers=[9])


FLAGS = list(itertools.product((False, True), repeat=3))


def nf4_blocks(quantized):
    return {"encoder_kwargs": {"block_size": 32, "scaler_block_size": 4}, "quantize_base": True} if quantized else {}


@pytest.fixture
def wide(monkeypatch):
    """Weights that divide into NF4 blocks of 64 in groups of 256."""
    for key, value in {"embed_dim": 256, "intermediate_dim": 256}.items():
        monkeypatch.setitem(DECODER, key, value)
    monkeypatch.setitem(DECODER, "num_kv_heads", 4)
    monkeypatch.setitem(DECODER, "num_layers", 2)
    monkeypatch.setitem(ENCODER, "decoder_embed_dim", 256)


@pytest.mark.parametrize("decoder, encoder, fusion", FLAGS)
@pytest.mark.parametrize("quantized, dora", [(False, False), (False, True), (True, False), (True, True)])
@pytest.mark.parametrize("mlp, output", [(False, False), (True, True)])
def test_every_linear_layer_is_of_the_kind_the_flags_say(decoder, encoder, fusion, quantized, dora, mlp, output, wide):
    modules = ["k_proj", "output_proj"]
    flags = {"lora_attn_modules": modules, "apply_lora_to_mlp": mlp, "apply_lora_to_output": output, "use_dora": dora, "lora_dropout": 0.25}
    model = small_lora(decoder, encoder, fusion, **flags, **nf4_blocks(quantized))
    parts = {part for part, flag in (("decoder", decoder), ("encoder", encoder), ("fusion", fusion)) if flag}
    seen = 0
    for name, m in model.named_modules():
        key = state_dict_key(name + ".weight")
        if not is_linear(key):
            continue
        seen += 1
        nf4 = quantized and not name.endswith("output") and (part_of(key) in parts or (key.startswith("decoder") and ".mlp." in key))
        if is_adapted(key, modules, parts, mlp, output):
            assert type(m) is (DoRALinear if dora else LoRALinear), name
            assert m.dropout.p == 0.25 and m.lora_a.weight.shape[0] == 2 and (m.scaling if dora else m.alpha / m.rank) == 1.5
        else:
            assert type(m) is (FrozenNF4Linear if nf4 else nn.Linear), name
        assert isinstance(m.weight, NF4Tensor) == nf4, name
        if nf4:
            assert (m.weight.block_size, m.weight.scaler_block_size) == ((32, 4) if name.startswith("encoder") else (64, 256))
        assert (m.bias is not None) == (name.startswith("encoder") and ".attn." not in name)
    assert seen == 5 * 6 + 1 + 3 * 7 + 1
    state = model.state_dict()
    assert not any(isinstance(t, NF4Tensor) for t in state.values())
    for name, p in parameters_with_nf4(model).items():
        assert state[name].dtype == torch.bfloat16 and state[name].device.type == "cpu" and torch.equal(state[name], p.to(torch.bfloat16))


def parameters_with_nf4(model):
    return {state_dict_key(name): p for name, p in model.named_parameters() if isinstance(p, NF4Tensor)}


def test_a_quantized_part_saves_numbers_on_its_own_too(wide):
    model = small_lora(**nf4_blocks(True))
    for part in (model.encoder, model.encoder.clip, model.decoder):
        assert parameters_with_nf4(part) and not any(isinstance(t, NF4Tensor) for t in part.state_dict().values())


def test_adapters_are_counted_by_part():
    """4 layers of CLIP, of the projection and of the decoder with cross-attention in 2: as torchtune's own test pins them."""
    encoder_sizes = ENCODER | {"clip_num_layers": 4, "num_layers_projection": 4}
    counts, names = [], []
    for decoder, encoder, fusion in ((False, True, False), (True, False, False), (False, False, True)):
        model = DeepFusionModel(
            lora_llama3_2_vision_decoder(decoder, fusion, ATTENTION, **DECODER), lora_llama3_2_vision_encoder(encoder, fusion, ATTENTION, **encoder_sizes)
        )
        names.append(set(get_adapter_params(model)))
        counts.append(len(names[-1]))
    assert counts == [32, 32, 48]
    assert not (names[0] & names[1] or names[0] & names[2] or names[1] & names[2])


def test_lora_builders_defaults_are_torchtune_s():
    encoder, decoder = (inspect.signature(f).parameters for f in (lora_llama3_2_vision_encoder, lora_llama3_2_vision_decoder))
    assert list(encoder)[:5] == ["encoder_lora", "fusion_lora", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"]
    assert list(decoder)[:5] == ["decoder_lora", "fusion_lora", "lora_attn_modules", "apply_lora_to_mlp", "apply_lora_to_output"]
    shared = {"apply_lora_to_mlp": False, "apply_lora_to_output": False, "lora_rank": 8, "lora_alpha": 16, "lora_dropout": 0.0, "use_dora": False}
    shared |= {"quantize_base": False}
    for found, own in ((encoder, {"max_num_tiles": 4, "in_channels": 3}), (decoder, {"rope_base": 500_000.0, "intermediate_dim": None})):
        assert {name: found[name].default for name in shared | own} == shared | own
        assert all(p.kind is p.KEYWORD_ONLY for name, p in list(found.items())[5:] if p.kind is not p.VAR_KEYWORD)


def test_unused_quantization_arguments_may_be_empty_and_not_more():
    lora_llama3_2_vision_encoder(True, True, ["q_proj"], **ENCODER, scaler_block_size=None)
    lora_llama3_2_vision_encoder(False, False, ["q_proj"], **ENCODER, scaler_block_size=200)  # nothing here could be quantized
    with pytest.raises(ValueError, match="``quantize_base`` is False, but received the following quantization arguments"):
        lora_llama3_2_vision_encoder(True, False, ["q_proj"], **ENCODER, scaler_block_size=200)
    with pytest.raises(TypeError, match="scaler_block_size"):
        lora_llama3_2_vision_decoder(True, True, ["q_proj"], **DECODER, scaler_block_size=200)


def test_adapters_need_projections_to_adapt_in_the_encoder_but_not_in_the_decoder():
    with pytest.raises(ValueError, match="Must pass one or more of"):
        lora_llama3_2_vision_encoder(True, False, [], **ENCODER)
    with pytest.raises(ValueError, match="Must pass one or more of"):
        lora_llama3_2_vision_encoder(False, True, [], **ENCODER)
    lora_llama3_2_vision_encoder(False, False, [], **ENCODER)
    assert not get_adapter_params(lora_llama3_2_vision_decoder(True, True, [], **DECODER))


def test_dropout_of_adapters_acts_in_training_alone():
    torch.manual_seed(0)
    model = randomize(small_lora(lora_dropout=0.5)).eval()
    args = inputs()
    assert torch.equal(call(model, *args), call(model, *args))
    model.train()
    assert not torch.equal(call(model, *args), call(model, *args))


def test_a_step_of_training_moves_adapters_and_nothing_else():
    model = randomize(small_lora())
    set_trainable_params(model, get_adapter_params(model))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    call(model, *inputs()).square().mean().backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0).step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != ("lora" in name), name
        assert (p.grad is not None) == ("lora" in name), name


def test_in_a_new_model_closed_gates_hide_the_image_and_get_the_first_gradient():
    model = small()
    tokens, images, mask = inputs()
    assert torch.equal(call(model, tokens, images, mask), model(tokens))
    call(model, tokens, images, mask).square().sum().backward()
    cross = {name: p.grad for name, p in model.named_parameters() if "fusion_layer" in name}
    assert all(bool(g.any()) == name.endswith(("ca_scale.scale", "mlp_scale.scale")) for name, g in cross.items())


def cached(model):
    model.setup_caches(2, torch.float32, encoder_max_seq_len=80, decoder_max_seq_len=12)
    return model


def test_prefill_and_decoding_with_caches_equal_the_whole_forward():
    model = randomize(small()).eval()
    tokens, images, mask = inputs(s=8)
    with torch.no_grad():
        whole = in_several_orders(call, model, tokens, images, mask)
        exact = call(in_float64(model), tokens, images.double(), mask)
        causal = torch.ones(12, 12, dtype=torch.bool).tril()
        cached(model)
        pos = torch.arange(8).expand(2, 8)
        encoder_input = {"images": images, "aspect_ratio": RATIOS}
        steps = [model(tokens[:, :5], mask=causal[:5].expand(2, 5, 12), encoder_input=encoder_input, encoder_mask=mask[:, :5], input_pos=pos[:, :5])]
        for k in range(5, 8):
            steps.append(model(tokens[:, k : k + 1], mask=causal[k : k + 1].expand(2, 1, 12), encoder_mask=mask[:, k : k + 1], input_pos=pos[:, k : k + 1]))
    assert_no_worse(torch.cat(steps, 1), whole, exact)


def shallow(monkeypatch):
    """One layer of each kind: tracing takes most of the time."""
    monkeypatch.setitem(DECODER, "num_layers", 2)
    for name, value in {"num_layers_projection": 1, "clip_num_layers": 1, "clip_hidden_states": [0]}.items():
        monkeypatch.setitem(ENCODER, name, value)


@pytest.mark.parametrize("made", [small, small_lora], ids=["plain", "lora"])
def test_compiled_the_model_is_one_graph_with_the_same_logits(made, monkeypatch):
    shallow(monkeypatch)
    model, (tokens, images, mask) = randomize(made()), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(call(compiled, tokens, images, mask), call(model, tokens, images, mask))


def test_compiled_with_caches_the_model_is_one_graph_with_the_same_logits(monkeypatch):
    shallow(monkeypatch)
    source = randomize(small()).eval()
    tokens, images, mask = inputs()
    causal, pos = torch.ones(12, 12, dtype=torch.bool).tril(), torch.arange(7).expand(2, 7)
    results = []
    torch._dynamo.reset()
    for wrap in (lambda m: m, functools.partial(torch.compile, fullgraph=True, backend="aot_eager")):
        model = cached(copy.deepcopy(source))
        run = wrap(model)
        with torch.no_grad():
            encoder_input = {"images": images, "aspect_ratio": RATIOS}
            prefill = run(tokens[:, :6], mask=causal[:6].expand(2, 6, 12), encoder_input=encoder_input, encoder_mask=mask[:, :6], input_pos=pos[:, :6])
            step = run(tokens[:, 6:], mask=causal[6:7].expand(2, 1, 12), encoder_mask=mask[:, 6:], input_pos=pos[:, 6:])
        results.append((prefill, step))
    for got, want in zip(*reversed(results), strict=True):
        assert torch.equal(got, want)


def test_a_config_s_model_is_the_builders_model():
    config = small_config(aspect_ratios=tuple(SUPPORTED))
    assert config.tokens_per_tile == N
    assert shapes(build(config)) == shapes(small())
    assert trained(build(config)) == {n for n in dict(shapes(small())) if part_of(n) != "decoder"}
    assert trained(build(config, decoder_trainable=True, encoder_trainable=False, fusion_trainable=False)) == {
        n for n in dict(shapes(small())) if part_of(n) == "decoder"
    }
    made = build_lora(config, ["q_proj"], decoder_lora=True, encoder_lora=False, lora_rank=3, causal_attention=True)
    assert shapes(made) == with_adapters(dict(shapes(small())), ["q_proj"], {"decoder", "fusion"}, False, False, 3, False)
    assert {m.attn.is_causal for m in made.encoder.projection.layers} == {True} and {m.attn.is_causal for m in made.encoder.clip.layers} == {False}


def hf_config() -> dict:
    """What transformers' config.json of the 11B Instruct model says."""
    rope = {"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"}
    text = {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40, "num_attention_heads": 32,
        "num_key_value_heads": 8, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0, "rope_scaling": rope, "max_position_embeddings": 131072,
    }  # fmt: skip
    vision = {
        "attention_heads": 16, "hidden_act": "gelu", "hidden_size": 1280, "image_size": 560, "intermediate_layers_indices": [3, 7, 15, 23, 30],
        "intermediate_size": 5120, "max_num_tiles": 4, "norm_eps": 1e-05, "num_channels": 3, "num_global_layers": 8, "num_hidden_layers": 32,
        "patch_size": 14, "supported_aspect_ratios": [[1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1]],
    }  # fmt: skip
    return {"model_type": "mllama", "image_token_index": 128256, "text_config": text, "vision_config": vision}


def test_transformers_config_of_11b_is_ours():
    got = Llama3VisionConfig.from_hf(hf_config())
    assert got.cross_attention_layers == (3, 8, 13, 18, 23, 28, 33, 38)
    assert got.rope_scaling == {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    assert got.replace(cross_attention_layers=None, rope_scaling={}) == CONFIGS["11b"]
    assert shapes(on_meta(build, got)) == list(keys_11b().items())


@pytest.mark.parametrize(
    "part, key, value, message",
    [
        ("vision_config", "hidden_act", "quick_gelu", "hidden_act is 'quick_gelu', covered: 'gelu'"),
        ("text_config", "hidden_act", "relu", "hidden_act is 'relu', covered: 'silu'"),
        ("text_config", "head_dim", 64, "head_dim is 64, covered"),
        ("vision_config", "image_size", [560, 448], r"image_size is \[560, 448\], tiles and patches are square here"),
        ("text_config", "rope_scaling", {"rope_type": "yarn"}, "rope_type is 'yarn', covered: 'default', 'llama3'"),
    ],
)
def test_a_config_that_this_architecture_does_not_cover_is_refused(part, key, value, message):
    config = hf_config()
    config[part][key] = value
    with pytest.raises(ValueError, match=message):
        Llama3VisionConfig.from_hf(config)
