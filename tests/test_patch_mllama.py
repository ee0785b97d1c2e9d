"""patch(model) over transformers' Mllama: the same logits, gradients and tokens, without the dense mask, and nothing left behind."""

import copy
import inspect
import pickle
import types
import warnings

import mllama
import pytest
import torch
import transformers
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from numerics import assert_no_worse, in_several_orders
from peft import LoraConfig, get_peft_model
from reference import assert_gradients_no_worse, assert_results_no_worse
from torch import nn
from transformers import CompileConfig
from transformers.models.mllama import modeling_mllama
from waiting import Allocated

import fastfuse
from fastfuse.ops import EncoderMask
from fastfuse.patching import hosts

NAMES = [n for n in inspect.signature(modeling_mllama.MllamaModel.forward).parameters if n in ("cache", "past_key_values")]  # what transformers calls it
NAMES += ["past_key_values"] if NAMES == ["cache"] else []  # 5.24 takes the old name as well
SAMPLES = {"0, 1 and 2 images": [["coffee"], ["astronaut", "chelsea"], []], "one image": [["chelsea"]], "no image": [[], []]}


@pytest.fixture(scope="module")
def model():
    return mllama.build(mllama.config())


@pytest.fixture(autouse=True)
def given_back(request):
    """Whatever a test does to the shared model, the next one finds it as it was."""
    yield
    if "model" in request.fixturenames:
        shared = request.getfixturevalue("model")
        fastfuse.unpatch(shared)
        shared.eval()
        shared.zero_grad()
        shared.set_attn_implementation("eager")


EVERYTHING = {"cross_attention": 4, "patch_embed": 1}


def ops_of(report) -> dict[str, int]:
    return {op: sum(e.op == op for e in report.patched) for op in ("cross_attention", "patch_embed")}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_logits_and_every_gradient(model, samples, side, implementation):
    model.set_attn_implementation(implementation)
    given = mllama.padded(mllama.batch(samples), side)
    eager = in_several_orders(mllama.results, model, given)
    exact = mllama.results(mllama.exactly(model), given)
    report = fastfuse.patch(model)
    assert ops_of(report) == EVERYTHING
    got = mllama.results(model, given)
    assert fastfuse.status(model).fallbacks == {}
    whole = model(**given).logits
    assert_results_no_worse(got, eager, exact)
    fastfuse.unpatch(model)
    again = model(**given).logits
    torch.testing.assert_close(whole, again)
    assert torch.equal(again * given["attention_mask"][..., None], eager[0][0])


def test_half_precision(model):
    """bf16, with gradients: as close to float64 as transformers."""
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    half = copy.deepcopy(model).bfloat16()
    half.set_attn_implementation("sdpa")
    exact = mllama.results(mllama.exactly(half), given)
    eager = in_several_orders(mllama.results, half, given)
    fastfuse.patch(half)
    got = mllama.results(half, given)
    assert fastfuse.status(half).fallbacks == {}
    assert_results_no_worse(got, eager, exact)


def test_by_the_kernels(model):
    """Through Triton's interpreter (on a GPU on the GPU): one image, both kinds of padding rows, forward and backward."""
    given = mllama.padded(mllama.batch([["chelsea"], []]), "left")
    exact, eager = mllama.results(mllama.exactly(model), given), in_several_orders(mllama.results, model, given)
    fastfuse.patch(model, ops=["cross_attention", "patch_embed"], backend="triton")
    got = mllama.results(model, given)
    assert fastfuse.status(model).fallbacks == {}
    assert_results_no_worse(got, eager, exact)


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_generated_tokens(model, samples, side, cache):
    given = mllama.padded(mllama.batch(samples), side)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    want = model.generate(**given, **options)
    fastfuse.patch(model)
    assert torch.equal(model.generate(**given, **options), want)
    assert fastfuse.status(model).fallbacks == {}


def test_generate_without_a_cache(model):
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "use_cache": False}
    want = model.generate(**given, **options)
    fastfuse.patch(model)
    assert torch.equal(model.generate(**given, **options), want)


@pytest.mark.parametrize("how", ["beams", "sampling"])
def test_other_ways_to_generate(model, how):
    """Beams reorder what the cache holds, several sequences a prompt repeat its mask."""
    given = mllama.batch(SAMPLES["0, 1 and 2 images"])
    options = {"max_new_tokens": 4, "min_new_tokens": 4} | ({"num_beams": 3} if how == "beams" else {"do_sample": True, "num_return_sequences": 2})

    def run():
        torch.manual_seed(1)
        return model.generate(**given, **options)

    want = run()
    fastfuse.patch(model)
    assert torch.equal(run(), want)


def test_compiled_decoding_with_a_static_cache():
    """generate's own compilation, without a graph break: one graph for all steps."""
    model = mllama.build(mllama.config(cross=(1,), layers=2, vision_layers=(1, 1), taken=(0,)))
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(**given, **options)
    fastfuse.patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiling = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
    compiling._compile_all_devices = True  # else on an accelerator alone
    assert torch.equal(model.generate(**given, **options, compile_config=compiling), want)
    assert len(graphs) == 1 and "fastfuse" in graphs[0].code


@torch._functorch.config.patch(donated_buffer=False)  # two backwards through one graph
def test_compiled_forward_and_backward():
    model = mllama.build(mllama.config(cross=(1,), layers=2, vision_layers=(1, 1), taken=(0,)))
    given = mllama.padded(mllama.batch([["coffee"], []]), "left")
    eager, exact = in_several_orders(mllama.results, model, given), mllama.results(mllama.exactly(model), given)
    fastfuse.patch(model)
    logits, grads = mllama.results(torch.compile(model, fullgraph=True, backend="aot_eager"), given)
    assert_results_no_worse((logits, {k.removeprefix("_orig_mod."): v for k, v in grads.items()}), eager, exact)


def long_text(tiles_of: list[list[str]], n: int = 160) -> dict:
    """A batch whose text is long: of the dense mask's size there is nothing else."""
    given = mllama.batch(tiles_of)
    more = n - given["input_ids"].shape[1]
    given["input_ids"] = torch.cat([given["input_ids"], torch.randint(3, mllama.VOCAB, (len(tiles_of), more))], 1)
    given["attention_mask"] = torch.ones_like(given["input_ids"])
    tiles = given["cross_attention_mask"]
    given["cross_attention_mask"] = torch.cat([tiles, tiles[:, -1:].expand(-1, more, -1, -1)], 1)
    return given


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_dense_mask_is_never_made(model, implementation):
    """Neither for one row of the batch nor for one head, forward, backward, prompt or step."""
    model.set_attn_implementation(implementation)
    given = long_text([["coffee"], ["astronaut"]])
    s, s_e = 160, 4 * 17

    def dense(run):
        with Allocated() as mode:
            run()
        assert mode.made
        return [f for shape, f in mode.made if shape[-1:] == (s_e,) and torch.Size(shape).numel() >= s * s_e]

    def train():
        model(**given).logits.sum().backward()

    def decode():
        model.generate(**given, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    assert dense(train) and dense(decode), "the count finds transformers' own"
    fastfuse.patch(model)
    assert dense(train) == [] and dense(decode) == []
    assert fastfuse.status(model).fallbacks == {}


def test_blind_text_by_each_rule(model):
    """Text before its image: transformers lets it see every image, Meta none. Two photos tell them apart."""
    one, other = ({k: v[:1] for k, v in mllama.batch([[name], ["astronaut", "chelsea"]]).items()} for name in ("coffee", "chelsea"))
    assert torch.equal(one["aspect_ratio_ids"], other["aspect_ratio_ids"])
    blind = 1  # the token before the image's

    @torch.no_grad()
    def leak():
        return (model(**one).logits - model(**(one | {"pixel_values": other["pixel_values"]})).logits)[:, :blind].abs().max().item()

    host = leak()
    assert host > 1e-3
    seen = {}
    for rule in ("host", "uniform", "zero"):
        with fastfuse.patched(model, masked_rows=rule):
            seen[rule] = leak()
    assert seen["zero"] == 0 and seen["host"] == seen["uniform"] == pytest.approx(host, rel=1e-3)


@torch.no_grad()
def test_zero_is_meta_s_rule(model):
    """Blind text is what it would be without any image; the others are as with transformers where nothing before them is blind."""
    given = mllama.batch([["coffee"]])
    text = {k: given[k][:, :1] for k in ("input_ids", "attention_mask")}
    with fastfuse.patched(model, masked_rows="zero"):
        got = model(**given).logits[:, :1]
        own = model(**text).logits
    torch.testing.assert_close(got, own)
    with fastfuse.patched(model, masked_rows="zero", backend="torch"):
        torch.testing.assert_close(model(**given).logits[:, :1], own)
    model.train()
    for layer in model.model.language_model.layers:
        if hasattr(layer, "cross_attn"):
            layer.cross_attn.dropout = 0.5
    try:
        with fastfuse.patched(model, masked_rows="zero"), pytest.warns(UserWarning, match="DROPOUT"):
            torch.testing.assert_close(model(**given).logits[:, :1], own)
    finally:
        for layer in model.model.language_model.layers:
            if hasattr(layer, "cross_attn"):
                layer.cross_attn.dropout = model.config.text_config.dropout


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_a_mask_the_host_s_own_answer(model, implementation):
    """transformers' sdpa is causal over image tokens there; what the host gives is what the patched model gives."""
    model.set_attn_implementation(implementation)
    given = mllama.batch([["coffee"]])
    del given["cross_attention_mask"]
    want, exact = mllama.results(model, given), mllama.results(mllama.exactly(model), given)
    fastfuse.patch(model)
    if implementation == "sdpa":
        with pytest.warns(UserWarning, match="NO_MASK"):
            got = model(**given).logits
        assert_no_worse(got, want[0], exact[0])
        assert fastfuse.status(model).fallbacks == {"NO_MASK": 2}
    else:
        torch.testing.assert_close(model(**given).logits, want[0])
        assert fastfuse.status(model).fallbacks == {}


@torch.no_grad()
def test_a_second_image_in_a_later_turn(model):
    """A dynamic cache grows by its tokens; the mask has both."""
    both = mllama.batch([["astronaut", "chelsea"]])
    first = {k: v[:, :5] if k in ("input_ids", "attention_mask") else v[:, :1] for k, v in both.items() if k != "cross_attention_mask"}
    first["cross_attention_mask"] = both["cross_attention_mask"][:, :5, :1]
    second = {k: v[:, 1:] for k, v in both.items() if k not in ("input_ids", "attention_mask", "cross_attention_mask")}
    second |= {"input_ids": both["input_ids"][:, 5:], "attention_mask": both["attention_mask"], "cross_attention_mask": both["cross_attention_mask"]}

    def turns():
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        model(**first, past_key_values=cache, use_cache=True)
        return model(**second, past_key_values=cache, use_cache=True).logits

    want = turns()
    fastfuse.patch(model)
    torch.testing.assert_close(turns(), want)
    assert fastfuse.status(model).fallbacks == {}


def step(module: nn.Module, given: dict, cache, by: str):
    """One call with the cache by one of its names, or positional."""
    if by != "positional":
        return module(**given, **{by: cache})
    names = list(inspect.signature(module.forward).parameters)
    first = names[: names.index(NAMES[0])]
    return module(*(given.get(name) for name in first), cache, **{k: v for k, v in given.items() if k not in first})


@torch.no_grad()
def two_steps(model: nn.Module, path: str, by: str, static: bool) -> list[torch.Tensor]:
    """A prompt with an image and a step without: what comes out, and what is in the cache after it."""
    dtype, module, given = model.dtype, model.get_submodule(path), mllama.batch(SAMPLES["0, 1 and 2 images"])
    if path == "model":
        images = {k: given[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        images["pixel_values"] = images["pixel_values"].to(dtype)
        steps = [{k: given[k][:, part] for k in ("input_ids", "cross_attention_mask")} for part in (slice(8), slice(8, 12))]
        steps[0] |= images
    else:  # one token: without a mask transformers' sdpa would be causal over the image tokens of more
        made = torch.Generator().manual_seed(0)
        states, x = (torch.randn(3, n, 64, generator=made).to(dtype) for n in (136, 2))
        text = [{"input_ids": given["input_ids"][:, i : i + 1]} if path.endswith("model") else {"hidden_states": x[:, i : i + 1]} for i in range(2)]
        steps = [text[0] | {"cross_attention_states": states}, text[1]]
    config = model.config.get_text_config()
    cache = transformers.StaticCache(config=config, max_cache_len=136) if static else transformers.DynamicCache(config=config)
    outs = [step(module, each, cache, by)[0] for each in steps]
    return [*outs, cache.layers[1].keys, cache.layers[1].values]


TEXT, ATTENTION = "model.language_model", "model.language_model.layers.1.cross_attn"


@pytest.mark.parametrize("by", [*NAMES, "positional"])
@pytest.mark.parametrize("path, static", [("model", False), (TEXT, False), (TEXT, True), (ATTENTION, False), (ATTENTION, True)])
def test_the_cache_by_each_of_its_names(model, path, static, by):
    model.set_attn_implementation("sdpa")
    want, exact = two_steps(model, path, by, static), two_steps(mllama.exactly(model), path, by, static)
    assert ops_of(fastfuse.patch(model)) == EVERYTHING
    for got, eager, true in zip(two_steps(model, path, by, static), want, exact, strict=True):
        assert_no_worse(got, eager, true)
    assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("newer", ["cache", None])
@pytest.mark.skipif(len(NAMES) == 1, reason="this transformers has one name for it")
@torch.no_grad()
def test_of_two_names_the_newer_counts(model, newer):
    """By presence, as in transformers: None under the newer name is no cache."""
    attn, config = model.model.language_model.layers[1].cross_attn, model.config.get_text_config()
    x, states = torch.randn(2, 1, 64), torch.randn(2, 8, 64)

    def held():
        caches = [transformers.DynamicCache(config=config) for _ in NAMES]
        attn(x, states, cache=caches[0] if newer else None, past_key_values=caches[1])
        return [cache.get_seq_length(1) for cache in caches]

    want = held()
    assert ops_of(fastfuse.patch(model)) == EVERYTHING
    assert held() == want == [8 if newer else 0, 0]
    assert fastfuse.status(model).fallbacks == {}


def test_a_cache_given_twice_is_transformers_own_error(model):
    attn, cache = model.model.language_model.layers[1].cross_attn, transformers.DynamicCache(config=model.config.get_text_config())
    fastfuse.patch(model)
    for name in NAMES:
        with pytest.warns(UserWarning, match="ARGUMENTS") if name == NAMES[0] else warnings.catch_warnings(), pytest.raises(TypeError, match="multiple values"):
            attn(torch.randn(2, 1, 64), torch.randn(2, 8, 64), cache, **{name: cache})
    assert fastfuse.status(model).fallbacks == {"ARGUMENTS": len(NAMES)}


@torch.no_grad()
def test_the_cache_gets_what_transformers_hands_it(model):
    """5.24 hands a cache the keywords of the call beside keys and values, versions before nothing."""
    seen = []

    class Watching(transformers.DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            seen.append((layer_idx, args, {k: sorted(v) for k, v in kwargs.items()}))
            return super().update(keys, values, layer_idx, *args, **kwargs)

    attn = model.model.language_model.layers[1].cross_attn
    given = mllama.batch([["coffee"]])

    def calls():
        seen.clear()
        config = model.config.get_text_config()
        attn(torch.randn(2, 1, 64), torch.randn(2, 8, 64), use_cache=True, position_ids=torch.zeros(2, 1), **{NAMES[0]: Watching(config=config)})
        model(**given, **{NAMES[0]: Watching(config=config)})
        return list(seen)

    want = calls()
    assert ops_of(fastfuse.patch(model)) == EVERYTHING
    assert calls() == want and want[0] == (1, (), {"kwargs": ["position_ids"]} if NAMES[0] == "cache" else {})
    assert fastfuse.status(model).fallbacks == {}


@torch.no_grad()
def test_a_name_of_a_later_version_is_nothing_to_an_older_one(model):
    """What the layer's own forward leaves out, the patched one does too."""
    made = copy.deepcopy(model)
    attn = made.model.language_model.layers[1].cross_attn
    own = inspect.unwrap(type(attn).forward)

    def forward(self, hidden_states, cross_attention_states=None, past_key_values=None, attention_mask=None, use_cache=None, **kwargs):
        return own(self, hidden_states, cross_attention_states, past_key_values, attention_mask, use_cache)

    with_forward(attn, forward)
    x, states, caches = torch.randn(2, 1, 64), torch.randn(2, 8, 64), [transformers.DynamicCache(config=made.config.get_text_config()) for _ in range(3)]
    want = attn(x, states, cache=caches[0])[0]
    assert not fastfuse.patch(made).skipped
    with pytest.warns(UserWarning, match="ARGUMENTS: called with cache, which its forward does not know"):
        assert torch.equal(attn(x, states, cache=caches[1])[0], want)
    attn(x, states, past_key_values=caches[2])
    assert [cache.get_seq_length(1) for cache in caches] == [0, 0, 8]
    assert fastfuse.status(made).fallbacks == {"ARGUMENTS": 1}


def everything(model: nn.Module) -> list[dict]:
    return [dict(m.__dict__) for m in model.modules()]


def globals_of_the_library() -> dict:
    kept = {name: value for name, value in vars(modeling_mllama).items() if not name.startswith("__")}
    classes = {c for c in kept.values() if isinstance(c, type)} | {nn.Module, nn.Linear, nn.LayerNorm, nn.Conv2d, nn.Embedding, transformers.PreTrainedModel}
    return {
        "module": kept,
        "classes": {c: dict(vars(c)) for c in classes},
        "functional": dict(vars(nn.functional)),
        "attention": dict(transformers.AttentionInterface._global_mapping),
    }


def test_nothing_is_left_and_nothing_else_is_touched(model):
    model.train()
    given = mllama.batch(SAMPLES["0, 1 and 2 images"])
    model(**given)
    before, state, library = everything(model), [(k, v.data_ptr(), v.shape, v.dtype) for k, v in model.state_dict().items()], globals_of_the_library()
    tree = [(name, id(m), m.training) for name, m in model.named_modules()]
    parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    fastfuse.patch(model, verify=True)
    touched = [set(now) ^ set(was) for now, was in zip(everything(model), before, strict=True)]
    assert sum(map(bool, touched)) == 5 and set().union(*touched) == {"forward", "_fastfuse"}
    model(**given).logits.sum().backward()
    model.zero_grad()
    assert [(k, v.data_ptr(), v.shape, v.dtype) for k, v in model.state_dict().items()] == state
    assert [(name, id(m), m.training) for name, m in model.named_modules()] == tree
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == parameters
    fastfuse.unpatch(model)
    assert everything(model) == before
    assert globals_of_the_library() == library


def test_an_error_in_the_middle_leaves_the_model_untouched(model, monkeypatch):
    before = everything(model)
    engine = fastfuse.patch.__globals__
    record, count = engine["Record"], iter(range(100))

    def broken(*args):
        if next(count) == 3:
            raise MemoryError("in the middle")
        return record(*args)

    monkeypatch.setitem(engine, "Record", broken)
    with pytest.raises(MemoryError):
        fastfuse.patch(model)
    assert everything(model) == before


@pytest.mark.parametrize("left_out", ["*language_model", "*layers.1.cross_attn", "model"])
def test_half_patched_is_dense_and_right(model, left_out):
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    want = model(**given).logits
    fastfuse.patch(model, exclude=left_out)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(model(**given).logits, want)
    found = fastfuse.status(model).fallbacks
    assert found["DENSE_MASK"] == (1 if "cross_attn" in left_out else 2) and ("HALF_PATCHED" in found) == (left_out != "model")


def test_whoever_looks_at_the_keywords_sees_a_tensor(model):
    given, seen = mllama.batch([["coffee"]]), []
    want = model(**given).logits
    handle = model.model.language_model.layers[1].cross_attn.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["attention_mask"]), with_kwargs=True
    )
    fastfuse.patch(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.testing.assert_close(model(**given).logits, want)
    handle.remove()
    assert isinstance(seen[0], torch.Tensor) and any("HOOKED" in str(w.message) for w in caught)


@pytest.mark.parametrize("how", ["rebound", "subclass"])
def test_somebody_else_s_layer_sees_a_tensor(model, how):
    made, given, seen = copy.deepcopy(model), mllama.batch([["coffee"]]), []
    want = made(**given).logits
    layer = made.model.language_model.layers[1]
    own = type(layer).forward

    def forward(self, hidden_states, cross_attention_mask=None, **kwargs):
        seen.append(cross_attention_mask)
        return own(self, hidden_states, cross_attention_mask=cross_attention_mask, **kwargs)

    if how == "rebound":
        layer.forward = types.MethodType(forward, layer)
    else:
        layer.__class__ = type("Layer", (type(layer),), {"forward": forward})
    fastfuse.patch(made)
    with pytest.warns(UserWarning, match="FOREIGN_FORWARD"):
        torch.testing.assert_close(made(**given).logits, want)
    assert isinstance(seen[0], torch.Tensor)


def test_attention_weights_and_hidden_states(model):
    given = mllama.batch([["coffee"]])
    want = model(**given, output_attentions=True, output_hidden_states=True)
    fastfuse.patch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*OUTPUTS")
        warnings.filterwarnings("ignore", message=".*DENSE_MASK")
        got = model(**given, output_attentions=True, output_hidden_states=True)
    assert len(got.attentions) == len(want.attentions) == 5 and len(got.hidden_states) == len(want.hidden_states)
    for g, w in zip((*got.attentions, *got.hidden_states), (*want.attentions, *want.hidden_states), strict=True):
        torch.testing.assert_close(g, w)
    hidden = model(**given, output_hidden_states=True).hidden_states
    for g, w in zip(hidden, want.hidden_states, strict=True):
        torch.testing.assert_close(g, w)
    vision = {k: given[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    states = model.model.vision_model(**vision, output_hidden_states=True)
    fastfuse.unpatch(model)
    assert len(states.hidden_states) == len(model.model.vision_model(**vision, output_hidden_states=True).hidden_states)


def test_another_attention_implementation_stays(model):
    """What a user has registered is what runs."""
    calls = []

    def mine(module, q, k, v, attention_mask, **kwargs):
        calls.append(attention_mask)
        return modeling_mllama.eager_attention_forward(module, q, k, v, attention_mask, kwargs["scaling"])

    transformers.AttentionInterface.register("mine", mine)
    try:
        model.set_attn_implementation({"text_config": "mine", "vision_config": "eager", "": "eager"})
        given = mllama.batch([["coffee"]])
        want = model(**given).logits
        report = fastfuse.patch(model)
        assert {e.code for e in report.entries if e.op == "cross_attention"} >= {"ATTENTION"}
        with pytest.warns(UserWarning, match="ATTENTION"):
            torch.testing.assert_close(model(**given).logits, want)
        assert all(isinstance(mask, torch.Tensor) for mask in calls if mask is not None)
    finally:
        transformers.AttentionInterface._global_mapping.pop("mine")


# The vision model's children


def vision_case(model, change):
    given = mllama.batch([["coffee"], ["astronaut", "chelsea"]])
    undo = change(model.model.vision_model)
    try:
        want = mllama.results(model, given)
        report = fastfuse.patch(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = mllama.results(model, given)
        torch.testing.assert_close(got[0], want[0])
        return report, fastfuse.status(model).fallbacks
    finally:
        fastfuse.unpatch(model)
        undo()


def test_a_hook_on_the_convolution_runs(model):
    seen = []

    def change(vision):
        return vision.patch_embedding.register_forward_hook(lambda m, args, out: seen.append(1)).remove

    assert vision_case(model, change)[1] == {"HOOKED": 1} and len(seen) == 2


def test_another_library_s_norm_is_called(model):
    """As liger-kernel binds one: the op does everything before it."""
    calls = []

    def change(vision):
        norm = vision.layernorm_pre

        def forward(self, x):
            calls.append(1)
            return nn.functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

        norm.forward = types.MethodType(forward, norm)
        return lambda: norm.__dict__.pop("forward")

    assert vision_case(model, change)[1] == {} and len(calls) == 2


def test_rebound_positions_run(model):
    def change(vision):
        positions = vision.gated_positional_embedding
        positions.forward = lambda x, ids: 2 * type(positions).forward(positions, x, ids)
        return lambda: positions.__dict__.pop("forward")

    report, fallbacks = vision_case(model, change)
    assert fallbacks == {"CHILD_TYPE": 1} and "CHILD_TYPE" in {e.code for e in report.entries}


def test_input_gradients_and_checkpointing():
    """What QLoRA recipes switch on: the hook that asks for gradients is honoured, not run away from."""
    model = mllama.build(mllama.config()).train()
    model.requires_grad_(False)
    for layer in model.model.language_model.layers:
        layer.requires_grad_(True)
    given = mllama.batch(SAMPLES["0, 1 and 2 images"])

    def grads():
        model.zero_grad()
        model(**given).logits.square().mean().backward()
        return {n: (p.grad.clone(),) for n, p in model.named_parameters() if p.requires_grad}

    plain = in_several_orders(grads)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    exact = mllama.exactly(model)
    exact(**(given | {"pixel_values": given["pixel_values"].double()})).logits.square().mean().backward()
    exact = {n: (p.grad,) for n, p in exact.named_parameters() if p.requires_grad}
    fastfuse.patch(model)
    assert_gradients_no_worse(grads(), plain, exact)
    assert fastfuse.status(model).fallbacks == {}


def test_an_adapter_on_the_convolution(model):
    made = copy.deepcopy(model)
    tuned = get_peft_model(made, LoraConfig(r=2, target_modules=["patch_embedding"], init_lora_weights=False))
    given = mllama.batch([["coffee"]])
    want = tuned(**given).logits
    report = fastfuse.patch(tuned)
    assert [e.code for e in report.entries if e.op == "patch_embed"] == ["CHILD_TYPE"]
    with pytest.warns(UserWarning, match="CHILD_TYPE"):
        torch.testing.assert_close(tuned(**given).logits, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(model, dtype):
    made = copy.deepcopy(model).to(dtype)
    made.set_attn_implementation("sdpa")
    given = mllama.padded(mllama.batch([["coffee"], []]), "left")
    exact = mllama.exactly(made)(**(given | {"pixel_values": given["pixel_values"].double()})).logits
    given["pixel_values"] = given["pixel_values"].to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = made(**given).logits
        fastfuse.patch(made)
        got = made(**given).logits
    assert_no_worse(got, want, exact)
    assert fastfuse.status(made).fallbacks == {}


def test_accelerate_moves_the_mask_along(model):
    """Hooks of a model spread over devices, before and after patch."""
    given = mllama.batch(SAMPLES["0, 1 and 2 images"])
    want = model(**given).logits
    for order in ("before", "after"):
        made = copy.deepcopy(model)
        parts = [made.model.vision_model, made.model.language_model, *made.model.language_model.layers]
        parts += [layer.cross_attn for layer in made.model.language_model.layers if hasattr(layer, "cross_attn")]
        if order == "after":
            fastfuse.patch(made)
        for part in parts:
            add_hook_to_module(part, AlignDevicesHook(execution_device="cpu", io_same_device=True))
        if order == "before":
            fastfuse.patch(made)
        torch.testing.assert_close(made(**given).logits, want)
        assert fastfuse.status(made).fallbacks == {}


# Another version of transformers


def renamed(module: nn.Module, old: str, new: str) -> None:
    module.__dict__["_modules"][new] = module.__dict__["_modules"].pop(old)


@pytest.mark.parametrize(
    "path, old, op", [("language_model.layers.1.cross_attn", "q_norm", "cross_attention"), ("vision_model", "pre_tile_positional_embedding", "patch_embed")]
)
def test_a_renamed_part_is_skipped_with_its_name(model, path, old, op):
    made = copy.deepcopy(model)
    renamed(made.model.get_submodule(path), old, f"other_{old}")
    report = fastfuse.patch(made)
    assert [(e.name, e.op, e.code) for e in report.skipped] == [(f"model.{path}", op, "STRUCTURE")] and f"no {old}" in report.skipped[0].reason


def with_forward(module: nn.Module, forward, *more: str) -> None:
    """Make it an instance of a class of the same name whose forward is another, as a later transformers would have. more: what it takes beside."""
    if inspect.getfullargspec(forward).varargs:
        *names, rest = inspect.signature(type(module).forward).parameters.values()
        names += [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None) for name in more]
        forward.__signature__ = inspect.Signature([*names, rest])
    forward.__module__ = modeling_mllama.__name__
    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward, "__module__": modeling_mllama.__name__})


def test_a_changed_signature_is_skipped_with_its_argument(model):
    made = copy.deepcopy(model)

    def forward(self, hidden_states, vision_states=None, past_key_values=None, attention_mask=None, **kwargs):
        raise AssertionError

    with_forward(made.model.language_model.layers[3].cross_attn, forward)
    report = fastfuse.patch(made)
    assert [(e.name, e.code) for e in report.skipped] == [("model.language_model.layers.3.cross_attn", "SIGNATURE")]
    assert "takes no cross_attention_states" in report.skipped[0].reason and report.skipped[0].reason in str(fastfuse.status(made))


def test_an_argument_that_nobody_knows_runs_the_own_forward(model):
    made, seen = copy.deepcopy(model), []
    layer = made.model.language_model.layers[1]
    own = type(layer.cross_attn).forward

    def forward(self, *args, softcap=None, **kwargs):
        seen.append(kwargs["attention_mask"])
        return own(self, *args, **kwargs)

    with_forward(layer.cross_attn, forward, "softcap")
    given = mllama.batch([["coffee"]])
    want = made(**given).logits
    fastfuse.patch(made)
    x, states, mask = torch.randn(1, 3, 64), torch.randn(1, 8, 64), EncoderMask.from_tiles(torch.tensor([[[[1, 0]], [[0, 0]], [[0, 1]]]]), 4)
    with pytest.warns(UserWarning, match="ARGUMENTS.*softcap"):
        got = layer.cross_attn(x, states, attention_mask=mask, softcap=3.0)[0]
    assert isinstance(seen[-1], torch.Tensor)
    torch.testing.assert_close(got, layer.cross_attn(x, states, attention_mask=mask)[0])
    torch.testing.assert_close(made(**given).logits, want)


def test_keywords_that_get_lost_are_an_error_not_a_wrong_answer(model):
    made = copy.deepcopy(model)
    own = inspect.unwrap(type(made.model).forward)

    def forward(self, *args, **kwargs):
        kwargs.pop("fastfuse_mask", None)
        return own(self, *args, **kwargs)

    with_forward(made.model, forward)
    fastfuse.patch(made)
    with pytest.raises(fastfuse.Unsupported, match="does not pass its keywords on"):
        made(**mllama.batch([["coffee"]]))


def test_verify_finds_a_version_that_computes_something_else(model):
    made = copy.deepcopy(model)
    layer, vision = made.model.language_model.layers[1].cross_attn, made.model.vision_model
    own, see = type(layer).forward, type(vision).forward

    def attend(self, hidden_states, cross_attention_states=None, past_key_values=None, attention_mask=None, **kwargs):
        out, weights = own(self, hidden_states, cross_attention_states, past_key_values, attention_mask, **kwargs)
        return out * 1.001, weights

    def embed(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask, **kwargs):
        return see(self, pixel_values * 1.01, aspect_ratio_ids, aspect_ratio_mask, **kwargs)

    with_forward(layer, attend)
    with_forward(vision, embed)
    report = fastfuse.patch(made, verify=True)
    assert {(e.op, e.code) for e in report.skipped} == {("cross_attention", "MISMATCH"), ("patch_embed", "MISMATCH")} and len(report.patched) == 3


def test_a_fork_is_left_alone(model):
    """A class of somebody's own that derives from Mllama's may compute anything."""
    made = copy.deepcopy(model)

    class Fork(modeling_mllama.MllamaTextCrossAttention):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    made.model.language_model.layers[1].cross_attn.__class__ = Fork
    report = fastfuse.patch(made)
    assert [(e.name, e.code) for e in report.skipped] == [("model.language_model.layers.1.cross_attn", "FOREIGN_FORWARD")]


def test_on_the_meta_device():
    made = mllama.config()
    with torch.device("meta"):
        model = transformers.MllamaForConditionalGeneration(made)
    report = fastfuse.patch(model)
    assert ops_of(report) == EVERYTHING and not report.skipped
    given = {k: v.to("meta") for k, v in mllama.batch([["coffee"]]).items() if k != "attention_mask"}  # whose values transformers reads
    assert model(**given).logits.shape == (1, 12, mllama.VOCAB)


def test_embeddings_in_place_of_tokens(model):
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    given["inputs_embeds"] = model.model.language_model.embed_tokens(given.pop("input_ids"))
    want = model(**given).logits
    fastfuse.patch(model)
    torch.testing.assert_close(model(**given).logits, want)
    assert fastfuse.status(model).fallbacks == {}


@torch.no_grad()
def test_a_mask_with_the_rows_of_the_cache(model):
    """A plain forward may pass the whole mask with a cache."""
    given = mllama.batch(SAMPLES["0, 1 and 2 images"])
    images = {k: given[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}

    def run():
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        first = {"input_ids": given["input_ids"][:, :8], "cross_attention_mask": given["cross_attention_mask"][:, :8]}
        model(**first, **images, past_key_values=cache, use_cache=True)
        return model(input_ids=given["input_ids"][:, 8:], cross_attention_mask=given["cross_attention_mask"], past_key_values=cache, use_cache=True).logits

    want = run()
    fastfuse.patch(model)
    torch.testing.assert_close(run(), want)
    assert fastfuse.status(model).fallbacks == {}


def test_a_mask_of_another_rank_is_the_host_s_business(model):
    given = mllama.batch([["coffee"]])
    given["cross_attention_mask"] = given["cross_attention_mask"][:, :, 0]
    with pytest.raises(Exception) as own:
        model(**given)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="MASK"), pytest.raises(type(own.value)):
        model(**given)


def test_our_own_models_are_patched_already():
    from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build

    report = fastfuse.patch(build(Llama3VisionConfig.from_hf(mllama.config())))
    assert set(report.counts) == {"already"} and {e.op for e in report.entries} == {"patch_embed", "cross_attention"} and report
    assert hosts.host_for(nn.Linear(2, 2)) is None


def test_copies_files_and_signatures(tmp_path):
    model, given = mllama.build(mllama.config()), mllama.batch([["coffee"], []])
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    fastfuse.patch(model)
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures
    copied, loaded = copy.deepcopy(model), pickle.loads(pickle.dumps(model))  # before a call: the hooks of transformers' outputs do not pickle
    assert fastfuse.status(copied).counts == {"patched": 5} and fastfuse.status(loaded).counts == {"unpatched": 5}
    fastfuse.unpatch(model)
    want = model(**given).logits
    torch.testing.assert_close(copied(**given).logits, want)
    assert torch.equal(loaded(**given).logits, want)
    fastfuse.patch(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(transformers.MllamaForConditionalGeneration.from_pretrained(tmp_path, attn_implementation="eager")(**given).logits, want)


def test_qlora_training():
    """All ops at once: three steps of an optimiser, losses and adapters as without patch."""
    model = mllama.qlora().train()
    twin = copy.deepcopy(model)
    report = fastfuse.patch(model)
    assert {e.op for e in report.patched} == {"cross_attention", "patch_embed", "nf4_linear", "nf4_lora_linear"} and not report.skipped
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "right")
    curves = [mllama.losses(m, given, 3) for m in (model, twin)]
    assert fastfuse.status(model).fallbacks == {}
    assert curves[0] == pytest.approx(curves[1], rel=1e-5) and curves[0][-1] < curves[0][0]
    for (name, a), b in zip(model.named_parameters(), twin.parameters(), strict=True):
        if a.requires_grad:
            torch.testing.assert_close(a, b, msg=lambda m, name=name: f"{name}: {m}")


def test_qlora_generation():
    model = mllama.qlora().eval()
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(**given, **options)
    with fastfuse.patched(model):
        assert torch.equal(model.generate(**given, **options), want)
    assert torch.equal(model.generate(**given, **options), want)


@pytest.mark.parametrize("where", ["language model", "cross-attention layer"])
def test_a_hook_that_changes_the_mask_does(model, where):
    """Wherever it sits, it gets the tensor, and what it makes of it is what the layers attend by."""
    given = mllama.batch([["coffee"]])
    target = model.model.language_model if where == "language model" else model.model.language_model.layers[1]

    def halve(module, args, kwargs):
        mask = kwargs["cross_attention_mask"].clone()
        mask[..., ::2] = torch.finfo(mask.dtype).min
        return args, kwargs | {"cross_attention_mask": mask}

    plain = model(**given).logits
    handles = [target.register_forward_pre_hook(halve, with_kwargs=True)]
    try:
        want = model(**given).logits
        assert (want - plain).abs().max() > 1e-3
        fastfuse.patch(model)
        with pytest.warns(UserWarning, match="HOOKED"):
            torch.testing.assert_close(model(**given).logits, want)
    finally:
        for handle in handles:
            handle.remove()


def test_a_hook_on_a_layer_without_cross_attention_sees_a_tensor(model):
    """It is called with the mask as well."""
    given, seen = mllama.batch([["coffee"]]), []
    want = model(**given).logits
    layer = model.model.language_model.layers[0]
    handle = layer.register_forward_pre_hook(lambda m, a, k: seen.append(k["cross_attention_mask"].float()), with_kwargs=True)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="HOOKED"):
        torch.testing.assert_close(model(**given).logits, want)
    handle.remove()
    assert len(seen) == 1


def test_hooks_of_pytorch_s_own_wrappers_pass_the_mask_on(model):
    """FSDP2 casts tensors among the keywords, and leaves the rest."""
    given = mllama.padded(mllama.batch(SAMPLES["0, 1 and 2 images"]), "left")
    want = model(**given).logits

    def cast(module, args, kwargs):
        return args, {k: v.to(v.dtype) if isinstance(v, torch.Tensor) else v for k, v in kwargs.items()}

    cast.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    layers = model.model.language_model.layers
    handles = [m.register_forward_pre_hook(cast, with_kwargs=True) for m in (*layers, model.model.language_model)]
    try:
        fastfuse.patch(model)
        torch.testing.assert_close(model(**given).logits, want)
        assert fastfuse.status(model).fallbacks == {}
    finally:
        for handle in handles:
            handle.remove()


def test_what_stands_in_the_way_is_in_the_report(model):
    fastfuse.patch(model)
    assert {e.code for e in fastfuse.status(model).entries} == {""}
    handle = model.model.language_model.layers[1].register_forward_pre_hook(lambda m, a, k: None, with_kwargs=True)
    assert [(e.name, e.code) for e in fastfuse.status(model).entries if e.code] == [("model", "HOOKED")]
    handle.remove()


def test_attention_weights_are_no_error_under_strict(model, monkeypatch):
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    given = mllama.batch([["coffee"]])
    fastfuse.patch(model)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*fastfuse")
        assert len(model(**given, output_attentions=True).attentions) == 5


def test_a_rule_that_cannot_be_kept_is_said(model, monkeypatch):
    given = mllama.batch([["coffee"]])
    fastfuse.patch(model, masked_rows="zero")
    with pytest.warns(UserWarning, match="MASKED_ROWS: masked_rows='zero' does not hold: attention weights are asked for"):
        model(**given, output_attentions=True)
    fastfuse.unpatch(model)
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    fastfuse.patch(model, masked_rows="zero")
    with pytest.raises(fastfuse.Unsupported, match="MASKED_ROWS"):
        model(**given, output_attentions=True)


@pytest.mark.parametrize("size", [(56, 61), (66, 56)])
def test_pixels_over_are_left_out(model, size):
    given = mllama.batch([["coffee"]])
    given["pixel_values"] = nn.functional.interpolate(given["pixel_values"].flatten(0, 2), size).unflatten(0, (1, 1, 4))
    want = model(**given).logits
    assert not fastfuse.patch(model, verify=True).skipped
    torch.testing.assert_close(model(**given).logits, want)
    assert fastfuse.status(model).fallbacks == {}


def test_wrong_calls_of_the_vision_model_are_its_own_errors(model):
    given = mllama.batch([["coffee"]])
    pixels, ids, mask = (given[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"))
    vision = model.model.vision_model
    fastfuse.patch(model)
    for args in ((pixels, ids), (pixels[..., :42], ids, mask), (pixels[:, :, :3], ids, mask)):
        with warnings.catch_warnings(), pytest.raises((TypeError, RuntimeError)):
            warnings.simplefilter("ignore")
            vision(*args)


def test_a_configuration_that_asks_for_tuples(model):
    vision, given = model.model.vision_model, mllama.batch([["coffee"]])
    vision.config.return_dict = False
    try:
        want = vision(given["pixel_values"], given["aspect_ratio_ids"], given["aspect_ratio_mask"])
        fastfuse.patch(model)
        got = vision(given["pixel_values"], given["aspect_ratio_ids"], given["aspect_ratio_mask"])
    finally:
        vision.config.return_dict = True
    assert type(got) is type(want) is tuple and torch.equal(got[0], want[0])


def test_verify_on_the_meta_device():
    with torch.device("meta"):
        made = transformers.MllamaForConditionalGeneration(mllama.config())
    assert not fastfuse.patch(made, verify=True).skipped
