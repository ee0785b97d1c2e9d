"""Llama 3.2 Vision: the published sizes key by key, small models against the formula in float64, seeds, and what gets an adapter or NF4."""

import copy
import functools
import itertools
import re
from pathlib import Path

import pytest
import torch
from dense_vision import Dense, assert_formula, parameters, randomize
from numerics import assert_no_worse
from reference import assert_matches
from small_vision import (
    ATTENTION,
    DECODER,
    ENCODER,
    KNOWN,
    PARTS,
    RATIOS,
    SMALL,
    SUPPORTED,
    N,
    call,
    in_float64,
    inputs,
    is_adapted,
    is_linear,
    is_nf4,
    part_of,
    shapes,
    small,
    small_lora,
    state_dict_key,
    trained,
    with_adapters,
)
from torch import nn

from cases.weights import NF4Tensor
from fastfuse.models.llama3_2_vision import (
    CONFIGS,
    PROFILES,
    Llama3VisionConfig,
    Llama3VisionProjectionHead,
    Profile,
    build,
    build_lora,
    llama3_2_vision_11b,
    llama3_2_vision_90b,
    llama3_2_vision_decoder,
    llama3_2_vision_encoder,
    lora_llama3_2_vision_11b,
    lora_llama3_2_vision_90b,
    lora_llama3_2_vision_decoder,
    lora_llama3_2_vision_encoder,
    qlora_llama3_2_vision_11b,
    qlora_llama3_2_vision_90b,
)
from fastfuse.modules import Fp32LayerNorm, Llama3ScaledRoPE, RMSNorm, RotaryPositionalEmbeddings, TransformerCrossAttentionLayer, TransformerSelfAttentionLayer
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.model_fusion import DeepFusionModel, FusionLayer, get_fusion_params
from fastfuse.modules.peft import DoRALinear, LoRALinear, get_adapter_params, set_trainable_params

KEYS = Path(__file__).parent / "data" / "llama3_2_vision_11b.txt"
TILE_TABLES = ("pre_tile_pos_embed.embedding", "post_tile_pos_embed.embedding", "token_pos_embedding.global_token_positional_embedding")


@functools.cache
def keys_11b():
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


def resized(sizes, but="nothing"):
    """11B's keys with other numbers in their shapes."""
    return {name: shape if name.startswith(but) else tuple(sizes.get(n, n) for n in shape) for name, shape in keys_11b().items()}


def keys_90b():
    wider = resized({4096: 8192, 14336: 28672}, but="encoder.clip")
    layers = {k: [name for name in wider if name.startswith(f"decoder.layers.{k}.")] for k in range(4)}
    places = [(name.replace(f"layers.{k % 4}.", f"layers.{k}."), name) for k in range(80) for name in layers[k % 4]]
    rest = [(name, name) for name in wider if not name.startswith("decoder.layers.")]
    return {new: wider[name] for new, name in [*rest[:2], *places, *rest[2:]]}


def on_meta(function, *args, **kwargs):
    with torch.device("meta"):
        return function(*args, **kwargs)


@functools.cache
def published_11b():
    return on_meta(llama3_2_vision_11b)


PUBLISHED = {
    "11b": (published_11b, {}, keys_11b),
    "11b, tiles of 448 pixels": (llama3_2_vision_11b, {"image_size": 448}, lambda: resized({1601: 1025})),
    "11b, Meta's profile": (llama3_2_vision_11b, {"profile": "meta"}, keys_11b),
    "11b, transformers' profile": (
        llama3_2_vision_11b,
        {"profile": "transformers"},
        lambda: {name: (9, *shape[1:]) if name.endswith(TILE_TABLES) else shape for name, shape in keys_11b().items()},
    ),
    "11b from transformers' config": (build, {"config": Llama3VisionConfig.from_hf(CONFIGS["11b"].to_hf())}, keys_11b),
    "90b": (llama3_2_vision_90b, {}, keys_90b),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_model_has_torchtune_s_keys_and_shapes_in_its_order(name):
    make, given, want = PUBLISHED[name]
    assert list(shapes(on_meta(make, **given)).items()) == list(want().items())


def test_the_keys_are_907_and_1495_and_their_numbers_are_counted_per_part():
    numel = lambda keys: sum(torch.Size(shape).numel() for shape in keys.values())  # noqa: E731
    assert (len(keys_11b()), numel(keys_11b())) == (907, 10_629_184_035) and KEYS.stat().st_size < 60_000
    assert (len(keys_90b()), numel(keys_90b())) == (1495, 88_552_318_523)
    model = published_11b()
    counts = [sum(p.numel() for p in m.parameters()) for m in (model, model.decoder, model.encoder, model.encoder.clip, model.encoder.projection)]
    assert counts == [10_629_184_035, 9_775_192_080, 853_991_955, 665_152_003, 188_839_952]
    fusion = get_fusion_params(model)
    assert (len(fusion), sum(p.numel() for p in fusion.values())) == (219, 1_933_770_784)
    assert {state_dict_key(name) for name in fusion} == {name for name in keys_11b() if part_of(name) == "fusion"}


def test_11b_s_settings_that_no_key_shows():
    model = published_11b()
    clip, head, decoder = model.encoder.clip, model.encoder.projection, model.decoder
    vision = [*clip.layers, *head.layers]
    assert clip.out_indices == [3, 7, 15, 23, 30] and head.num_hidden == 5 and clip.get_image_tokens_per_tile() == 1601
    assert {(m.attn.num_heads, m.attn.head_dim, m.attn.is_causal) for m in vision} == {(16, 80, False)}
    assert all(isinstance(m.mlp.activation, nn.GELU) and m.mlp.activation.approximate == "none" for m in vision)
    assert [k for k, m in enumerate(decoder.layers) if isinstance(m, FusionLayer)] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert (decoder.max_seq_len, decoder.num_heads, decoder.head_dim) == (131_072, 32, 128)
    of_kind = lambda kind: [m.attn for m in decoder.modules() if isinstance(m, kind)]  # noqa: E731
    attention, cross = of_kind(TransformerSelfAttentionLayer), of_kind(TransformerCrossAttentionLayer)
    for layers, causal, length in ((attention, True, 131_072), (cross, False, 128_080)):
        assert {(a.embed_dim, a.num_heads, a.num_kv_heads, a.head_dim, a.is_causal, a.max_seq_len) for a in layers} == {(4096, 32, 8, 128, causal, length)}
    (rope,) = {a.pos_embeddings for a in attention}
    assert isinstance(rope, Llama3ScaledRoPE) and (rope.dim, rope.base, rope.max_seq_len) == (128, 500_000, 131_072)
    assert (rope.scale_factor, rope.low_freq_factor, rope.high_freq_factor, rope.old_context_len) == (8, 1, 4, 8192)


@pytest.mark.parametrize("flags", [(), (False, False, False), (True, False, True), (True, True, False)], ids=str)
def test_the_flags_say_which_parts_of_11b_are_trained(flags):
    """By default the encoder and fusion."""
    parts = {part for part, flag in zip(PARTS, flags or (False, True, True), strict=True) if flag}
    assert trained(on_meta(llama3_2_vision_11b, *flags)) == {name for name in keys_11b() if part_of(name) in parts}


def assert_kinds(model, parts, modules, mlp, output, dora, quantized, of_encoder):
    """Every linear layer is adapted, in NF4 or plain, as the flags say; of_encoder: block sizes there. Gives the layers."""
    layers = {key: m for name, m in model.named_modules() if is_linear(key := state_dict_key(name + ".weight"))}
    for key, m in layers.items():
        nf4, adapted = bool(quantized) and is_nf4(key, parts), is_adapted(key, modules, parts, mlp, output)
        kind = (DoRALinear if dora else LoRALinear) if adapted else FrozenNF4Linear if nf4 else nn.Linear
        has_bias = key.startswith("encoder") and ".attn." not in key
        assert (type(m), isinstance(m.weight, NF4Tensor), m.bias is not None) == (kind, nf4, has_bias), key
        if nf4:
            assert (m.weight.block_size, m.weight.scaler_block_size) == (of_encoder if key.startswith("encoder") else (64, 256)), key
    return layers


@pytest.mark.parametrize(
    "builder, words, modules, mlp, output, rank, dora",
    [
        (qlora_llama3_2_vision_11b, ("frozen", "lora", "lora"), ["q_proj", "v_proj"], False, False, 8, False),
        (lora_llama3_2_vision_11b, ("LoRA", "Lora", "lora"), ATTENTION, True, True, 8, True),
        (lora_llama3_2_vision_11b, ("lora", "frozen", "frozen"), ["k_proj"], True, True, 4, False),
        (lora_llama3_2_vision_11b, ("lora", "frozen", "LORA"), ["output_proj"], False, True, 16, True),
        (lora_llama3_2_vision_90b, ("frozen", "lora", "frozen"), ["q_proj"], True, True, 8, False),
    ],
)
def test_with_adapters_a_published_model_has_the_plain_keys_and_the_adapters(builder, words, modules, mlp, output, rank, dora):
    parts = {part for part, word in zip(PARTS, words, strict=True) if word.lower() == "lora"}
    nf4, keys = builder is qlora_llama3_2_vision_11b, keys_90b() if builder is lora_llama3_2_vision_90b else keys_11b()
    model = on_meta(builder, modules, *words, mlp, output, rank, 12, 0.5, use_dora=dora)
    want = with_adapters(keys, modules, parts, mlp, output, rank, dora)
    own = {state_dict_key(name): p for name, p in model.named_parameters()}
    assert {name: tuple(p.shape) for name, p in own.items()} == dict(want)
    if not nf4:
        assert list(shapes(model).items()) == want
        assert trained(model) == {name for name, _ in want if part_of(name) in parts}  # base weights as well
    for m in assert_kinds(model, parts, modules, mlp, output, dora, nf4, (64, 200)).values():
        if isinstance(m, (LoRALinear, DoRALinear)):
            assert m.dropout.p == 0.5 and (m.scaling if dora else m.alpha / m.rank) == 12 / rank
    adapters = {name for name, _ in want if "lora" in name or "magnitude" in name}
    found = get_adapter_params(model)
    assert {state_dict_key(name) for name in found} == adapters
    set_trainable_params(model, found)
    assert trained(model) == adapters


def test_qlora_builders_are_the_lora_builders_with_quantize_base():
    for q, full in ((qlora_llama3_2_vision_11b, lora_llama3_2_vision_11b), (qlora_llama3_2_vision_90b, lora_llama3_2_vision_90b)):
        assert isinstance(q, functools.partial) and q.func is full and q.args == () and q.keywords == {"quantize_base": True}


FACTS = {  # what a profile means to the formula
    "torchtune": {},
    "meta": {"cross_eps": 1e-5, "pad_to": 8},
    "transformers": {"cross_eps": 1e-5, "pad_to": 8, "states_after": True, "uniform_rows": True, "supported": SUPPORTED},
    "own": {"cross_eps": 1e-4, "pad_to": 4, "states_after": True},
}
OWN = Profile("own", 1e-4, 4, True, "zero", "grid")


@pytest.mark.parametrize(
    "profile, dtype, adapters",
    [
        ("torchtune", torch.float32, None),
        ("torchtune", torch.bfloat16, "dora"),
        ("meta", torch.float32, "lora"),
        ("meta", torch.bfloat16, None),
        ("transformers", torch.float32, "dora"),
        ("transformers", torch.bfloat16, "lora"),
        (OWN, torch.float32, None),
    ],
)
def test_logits_and_gradients_of_the_whole_model_are_the_formula_s(profile, dtype, adapters):
    """Logits in float64 too. In bf16 a few gradients of the plain model are nothing but rounding: of that one the images' alone."""
    model = randomize(small_lora(profile=profile, use_dora=adapters == "dora") if adapters else small(profile=profile))
    known = KNOWN | FACTS[getattr(profile, "name", profile)] | ({"scaling": 1.5} if adapters else {})
    tokens, images, mask = inputs()

    def run(m, images):
        return call(m, tokens, images, mask)

    def formula(m, images):
        return Dense(parameters(m), **known).logits(tokens, images, RATIOS, mask)

    model.requires_grad_(adapters is not None or dtype == torch.float32)
    assert_matches(model, run, formula, {"images": images}, dtype, draws=1)
    if dtype == torch.float32:
        with torch.no_grad():
            got, want = (way(in_float64(model), images.double()) for way in (run, formula))
        assert_no_worse(got.float(), want.float(), want, "logits in float64")


@pytest.mark.parametrize("parts", [(True, False), (False, True)])
def test_with_causal_attention_the_adapted_parts_alone_are_as_torchtune_leaves_them(parts):
    """What that computes: test_clip_builders."""
    for causal in (True, False):
        made = lora_llama3_2_vision_encoder(*parts, ["v_proj"], **ENCODER, causal_attention=causal)
        assert [{m.attn.is_causal for m in part.layers} for part in (made.clip, made.projection)] == [{causal and adapted} for adapted in parts]


def test_a_head_that_expects_hidden_states_says_so():
    head, x = Llama3VisionProjectionHead([], nn.Linear(12, 4), num_hidden_inputs=2), torch.randn(1, 1, 1, 3, 4)
    with pytest.raises(TypeError, match="hidden_states is None, the projection head takes num_hidden_inputs=2"):
        head(x)
    with pytest.raises(ValueError, match="hidden_states has 1 tensors, the projection head takes num_hidden_inputs=2"):
        head(x, [x])


@pytest.mark.parametrize("states", [None, [3], [2, 0, 1]])
def test_any_choice_of_hidden_states_reaches_the_projection(states):
    encoder = randomize(llama3_2_vision_encoder(**ENCODER | {"clip_hidden_states": states}))
    assert encoder.projection.num_hidden == len(states or []) and encoder.projection.output.weight.shape == (32, 16 * (1 + len(states or [])))
    _, images, _ = inputs()
    assert_formula(encoder(images, RATIOS), encoder, "encoder", images, RATIOS, clip_heads=2, out_indices=tuple(states or ()))


def test_without_an_image_the_decoder_is_llama():
    model = randomize(small())
    tokens, images, rows = inputs()
    assert_formula(model(tokens), model, "decoder", tokens, None, None, "decoder.", **KNOWN)
    assert torch.equal(call(model, tokens, images, rows & False), model(tokens))  # tokens that may see no image


# Numbers from torchtune 0.6.1, seed 0, decoder first; every weight has a part in them.
TUNE_ENCODER = ENCODER | {"num_heads": 4, "clip_embed_dim": 32, "clip_num_layers": 4, "clip_hidden_states": [1, 3], "decoder_embed_dim": 64}
TUNE_DECODER = {"vocab_size": 128, "num_heads": 8, "num_kv_heads": 4, "embed_dim": 64, "max_seq_len": 64, "encoder_max_seq_len": 160, "intermediate_dim": None}
TUNE_DECODER = DECODER | TUNE_DECODER
TUNE_LOGITS = {  # (sample, token): the first four, plain and with adapters
    (0, 2): ([-0.48747599, -0.30581582, -0.68894571, -0.48525068], [-4.5081863, 0.7083534, 7.4509807, 2.5974209]),
    (0, 9): ([0.03516667, -0.051970728, -0.18723673, -1.0108321], [-5.6911402, 1.2397593, -2.8929687, 3.5797415]),
    (1, 9): ([-0.010253613, -0.62204516, 0.061472394, -0.081655011], [2.1389458, -3.0346365, 0.1807473, -2.239881]),
}


@pytest.mark.parametrize("adapted", [False, True])
def test_a_seed_gives_torchtune_s_logits(adapted):
    """With adapters once torchtune's encoder is bidirectional."""
    torch.manual_seed(0)
    if adapted:
        flags = {"apply_lora_to_mlp": True, "apply_lora_to_output": True}
        decoder = lora_llama3_2_vision_decoder(True, True, ["q_proj", "v_proj"], **flags, **TUNE_DECODER)
        model = DeepFusionModel(decoder, lora_llama3_2_vision_encoder(True, True, ["q_proj", "output_proj"], **flags, **TUNE_ENCODER))
    else:
        model = DeepFusionModel(llama3_2_vision_decoder(**TUNE_DECODER), llama3_2_vision_encoder(**TUNE_ENCODER))
        torch.testing.assert_close(torch.rand(3), torch.tensor([0.41705245, 0.93246692, 0.62118024]))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith(("gate", "scale")) and p.numel() == 1:
                p.fill_(0.3)
            elif "lora_b" in name:
                p.normal_()
    torch.manual_seed(1)
    images, tokens, mask = torch.randn(2, 2, 4, 3, 12, 12), torch.randint(0, 130, (2, 10)), torch.rand(2, 10, 80) > 0.5
    mask[0, :3] = False
    if not adapted:
        encoded = model.encoder(images, RATIOS)
        torch.testing.assert_close(encoded[1, -1, :4].detach(), torch.tensor([0.16454254, -0.033715345, 0.72657907, 0.12898336]))
    logits = call(model, tokens, images, mask).detach()
    for (b, s), want in TUNE_LOGITS.items():
        torch.testing.assert_close(logits[b, s, :4], torch.tensor(want[adapted]))


@pytest.mark.parametrize("make", [small, small_lora])
@pytest.mark.parametrize("profile", list(PROFILES))
def test_every_norm_has_the_eps_it_is_given_but_torchtune_s_cross_norms_and_clip_s_ends(profile, make):
    for given in ({}, {"norm_eps": 1e-3}):
        found = {name: m.eps for name, m in make(profile=profile, **given).named_modules() if isinstance(m, (RMSNorm, Fp32LayerNorm))}
        cross = {name for name in found if re.search(r"fusion_layer\.(ca|mlp)_norm", name)}
        assert len(cross) == 4 and len(found) == 4 + 8 + 1 + 4 + 2 + 6 + 4  # cross (own, of heads), self, last; head, clip's ends, layers
        eps = given.get("norm_eps", 1e-5)
        for name, its_own in found.items():
            fixed = 1e-6 if name in cross and profile == "torchtune" else 1e-5 if re.search(r"ln_(pre|post)", name) else None
            assert its_own == (fixed or eps), name


@pytest.mark.parametrize("interval, cross", [(1, [0, 1, 2, 3, 4]), (2, [1, 3]), (3, [2]), (5, [4]), (6, [])])
def test_every_interval_th_layer_is_a_fusion_layer(interval, cross):
    sizes = DECODER | {"fusion_interval": interval, "num_layers": 5}
    for decoder in (llama3_2_vision_decoder(**sizes), lora_llama3_2_vision_decoder(True, True, ["q_proj"], **sizes)):
        assert [k for k, m in enumerate(decoder.layers) if isinstance(m, FusionLayer)] == cross
        assert {type(m) for k, m in enumerate(decoder.layers) if k not in cross} <= {TransformerSelfAttentionLayer}


def test_cross_attention_may_be_placed_as_transformers_counts():
    """Seven layers of which 1, 4 and 6 attend to the image: 1 and 4 go before the layer after them, 6 stands alone."""
    decoder = llama3_2_vision_decoder(**DECODER, cross_attention_layers=[1, 4, 6])
    kinds = [type(m) for m in decoder.layers]
    assert kinds == [TransformerSelfAttentionLayer, FusionLayer, TransformerSelfAttentionLayer, FusionLayer, TransformerCrossAttentionLayer]
    same = llama3_2_vision_decoder(**DECODER, cross_attention_layers=(1, 4))
    assert list(same.state_dict()) == list(llama3_2_vision_decoder(**DECODER).state_dict())


@pytest.mark.parametrize(
    "scaling, known",
    [
        (None, {"base": 100.0, "scale": 1}),
        (
            {"scale_factor": 4, "low_freq_factor": 1, "high_freq_factor": 2, "old_context_len": 64},
            {"base": 1000.0, "scale": 4, "low": 1, "high": 2, "old": 64},
        ),
    ],
    ids=["none", "other"],
)
def test_rope_scaling_may_be_other_or_none(scaling, known):
    decoder = randomize(llama3_2_vision_decoder(**DECODER, rope_scaling=scaling, rope_base=known["base"]))
    assert type(decoder.layers[0].attn.pos_embeddings) is (Llama3ScaledRoPE if scaling else RotaryPositionalEmbeddings)
    tokens, _, _ = inputs(s=20)
    assert_formula(decoder(tokens), decoder, "decoder", tokens, None, None, **KNOWN, rope=known)


@pytest.mark.parametrize("nothing", [None, 0])
def test_left_out_widths_and_heads_are_derived(nothing):
    decoder = llama3_2_vision_decoder(**DECODER | {"num_kv_heads": nothing, "intermediate_dim": nothing})
    assert decoder.layers[0].attn.k_proj.weight.shape == (32, 32) and decoder.layers[0].attn.num_kv_heads == 4
    assert decoder.layers[0].mlp.w1.weight.shape == (256, 32)  # 4 * floor(64 / 3) = 84, up to a multiple of 256
    assert decoder.tok_embeddings.num_embeddings == 26 and decoder.output.weight.shape == (24, 32)  # fusion tokens have no logits


@pytest.mark.parametrize(
    "decoder, encoder, fusion, quantized, dora, mlp_and_output",  # every pair of values is met
    [(0, 0, 0, 1, 0, 1), (1, 0, 0, 0, 1, 1), (0, 1, 0, 0, 1, 0), (1, 1, 0, 1, 0, 0), (0, 0, 1, 1, 1, 0), (1, 0, 1, 0, 0, 0), (0, 1, 1, 0, 0, 1), (1, 1, 1, 1, 1, 1)],
)  # fmt: skip
def test_every_linear_layer_is_of_the_kind_the_flags_say(decoder, encoder, fusion, quantized, dora, mlp_and_output, monkeypatch):
    for sizes, changed in ((DECODER, {"embed_dim": 256, "intermediate_dim": 256, "num_kv_heads": 4, "num_layers": 2}), (ENCODER, {"decoder_embed_dim": 256})):
        for key, value in changed.items():  # weights that divide into NF4 blocks of 64 in groups of 256
            monkeypatch.setitem(sizes, key, value)
    modules, mlp = ["k_proj", "output_proj"], bool(mlp_and_output)
    flags = {"lora_attn_modules": modules, "apply_lora_to_mlp": mlp, "apply_lora_to_output": mlp, "use_dora": bool(dora)}
    blocks = {"encoder_kwargs": {"block_size": 32, "scaler_block_size": 4}, "quantize_base": True} if quantized else {}
    model = small_lora(bool(decoder), bool(encoder), bool(fusion), **flags, **blocks)
    parts = {part for part, flag in zip(PARTS, (decoder, encoder, fusion), strict=True) if flag}
    linear = assert_kinds(model, parts, modules, mlp, mlp, dora, quantized, (32, 4))
    assert len(linear) == 5 * 6 + 1 + 3 * 7 + 1
    for prefix in ("", "encoder.", "encoder.clip.", "decoder."):  # a quantized part saves numbers on its own too
        state = model.get_submodule(prefix[:-1]).state_dict()
        assert not any(isinstance(t, NF4Tensor) for t in state.values())
        for key, m in linear.items():
            if key.startswith(prefix) and isinstance(m.weight, NF4Tensor):
                saved = state[key.removeprefix(prefix)]
                assert saved.dtype == torch.bfloat16 and saved.device.type == "cpu" and torch.equal(saved, m.weight.to(torch.bfloat16))


def test_unused_quantization_arguments_may_be_empty_and_not_more():
    lora_llama3_2_vision_encoder(True, True, ["q_proj"], **ENCODER, scaler_block_size=None)
    lora_llama3_2_vision_encoder(False, False, ["q_proj"], **ENCODER, scaler_block_size=200)  # nothing here could be quantized
    with pytest.raises(TypeError, match="scaler_block_size"):
        lora_llama3_2_vision_decoder(True, True, ["q_proj"], **DECODER, scaler_block_size=200)


def test_adapters_need_projections_to_adapt_in_the_encoder_but_not_in_the_decoder():
    for parts in ((True, False), (False, True)):
        with pytest.raises(ValueError, match="Must pass one or more of"):
            lora_llama3_2_vision_encoder(*parts, [], **ENCODER)
    lora_llama3_2_vision_encoder(False, False, [], **ENCODER)
    lora_llama3_2_vision_encoder(False, True, [], **ENCODER | {"num_layers_projection": 0})
    assert not get_adapter_params(lora_llama3_2_vision_decoder(True, True, [], **DECODER))


def test_in_a_new_model_closed_gates_hide_the_image_and_get_the_first_gradient():
    model, (tokens, images, mask) = small(), inputs()
    logits = call(model, tokens, images, mask)
    assert torch.equal(logits, model(tokens))
    logits.square().sum().backward()
    cross = {name: p.grad for name, p in model.named_parameters() if "fusion_layer" in name}
    assert all(bool(g.any()) == name.endswith(("ca_scale.scale", "mlp_scale.scale")) for name, g in cross.items())


@pytest.mark.parametrize("caches", [False, True])
def test_compiled_the_model_is_one_graph_with_the_same_logits(caches, monkeypatch):
    """With adapters, and with caches without; one layer of each kind: tracing takes most of the time. Steps after the prompt: test_generation."""
    monkeypatch.setitem(DECODER, "num_layers", 2)
    for name, value in {"num_layers_projection": 1, "clip_num_layers": 1, "clip_hidden_states": [0]}.items():
        monkeypatch.setitem(ENCODER, name, value)
    model, args, given = randomize(small() if caches else small_lora()), inputs(), {}
    if caches:
        given = {"mask": torch.ones(2, 7, 12, dtype=torch.bool).tril(), "input_pos": torch.arange(7).expand(2, 7)}
    torch._dynamo.reset()
    results = []
    for wrap in (lambda m: m, functools.partial(torch.compile, fullgraph=True, backend="aot_eager")):
        own = copy.deepcopy(model)
        if caches:
            own.setup_caches(2, torch.float32, encoder_max_seq_len=80, decoder_max_seq_len=12)
        with torch.set_grad_enabled(not caches):
            results.append(call(wrap(own), *args, **given))
    assert torch.equal(*results)


def test_a_config_s_model_is_the_builders_model():
    assert SMALL.tokens_per_tile == N
    torch.manual_seed(3)
    model = build(SMALL)
    torch.manual_seed(3)
    encoder, decoder = llama3_2_vision_encoder(**ENCODER, clip_hidden_dim=64), llama3_2_vision_decoder(**DECODER)  # the encoder first
    for made, want in ((model.encoder, encoder), (model.decoder, decoder)):
        assert shapes(made) == shapes(want) and all(torch.equal(a, b) for a, b in zip(made.parameters(), want.parameters(), strict=True))
    plain = shapes(model)
    made = build_lora(SMALL, ["q_proj"], decoder_lora=True, encoder_lora=False, lora_rank=3, causal_attention=True)
    assert list(shapes(made).items()) == with_adapters(plain, ["q_proj"], {"decoder", "fusion"}, False, False, 3, False)
    assert {m.attn.is_causal for m in made.encoder.projection.layers} == {True} and {m.attn.is_causal for m in made.encoder.clip.layers} == {False}
