"""patch(model) over transformers' Mllama, beyond what test_hosts.py asks of it: batches, masks, generation and caches."""

import copy
import inspect
import warnings

import mllama
import pytest
import torch
import transformers
from hosts import MLLAMA_CROSS, SMALL, THREE, assert_as_before, attention_of, conversations
from hosts import model as model
from hosts import shared as shared
from numerics import Orders, assert_no_worse
from reference import assert_results_no_worse
from transformers import CompileConfig
from transformers.models.mllama import modeling_mllama
from waiting import Allocated

import fastfuse
from cases.linear import BF16, F32
from fastfuse import patch, status

NAMES = [n for n in inspect.signature(modeling_mllama.MllamaModel.forward).parameters if n in ("cache", "past_key_values")]  # what transformers calls it
NAMES += ["past_key_values"] if NAMES == ["cache"] else []  # 5.24 takes the old name as well


@pytest.mark.parametrize(
    "samples, side, implementation, dtype",
    [
        (THREE, "none", "sdpa", F32),
        (THREE, "left", "eager", F32),
        (THREE, "right", "sdpa", BF16),
        (THREE[:1], "none", "eager", F32),
        ([[], []], "none", "eager", F32),
        ([[], []], "left", "sdpa", F32),
        ([[], []], "right", "eager", BF16),
    ],
)
def test_logits_and_every_gradient(model, samples, side, implementation, dtype):
    """Of samples with 0, 1 and 2 images, with padding or without."""
    model.to(dtype).set_attn_implementation(implementation)
    call = conversations(samples, side)
    eager, exact = Orders(mllama.results, copy.deepcopy(model), call), mllama.results(mllama.exactly(model), call)
    assert patch(model).counts == {"patched": 5}
    assert_results_no_worse(mllama.results(model, call), eager, exact)
    assert status(model).fallbacks == {}


@pytest.mark.parametrize(
    "samples, side, n, options",
    [
        (THREE, "none", 6, {}),
        (THREE, "left", 6, {"cache_implementation": "static"}),
        (THREE, "right", 6, {}),
        (THREE[:1], "none", 6, {"cache_implementation": "static"}),
        ([[], []], "left", 6, {}),
        ([[], []], "right", 6, {"cache_implementation": "static"}),
        (THREE, "left", 3, {"use_cache": False}),
        (THREE, "none", 4, {"num_beams": 3}),  # beams reorder what the cache holds
        (THREE, "none", 4, {"do_sample": True, "num_return_sequences": 2}),  # several sequences a prompt repeat its mask
    ],
)
def test_generated_tokens(model, samples, side, n, options):
    def run():
        torch.manual_seed(1)
        return model.generate(**conversations(samples, side), **{"max_new_tokens": n, "min_new_tokens": n, "do_sample": False} | options)

    want = run()
    patch(model)
    assert torch.equal(run(), want)
    assert status(model).fallbacks == {}


def test_compiled_decoding_with_a_static_cache():
    """generate's own compilation, without a graph break: one graph for all steps."""
    model, call = mllama.build(mllama.config(**SMALL)), conversations(side="left")
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(**call, **options)
    patch(model)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiling = CompileConfig(fullgraph=True, dynamic=None, backend=backend, mode=None)
    compiling._compile_all_devices = True  # else on an accelerator alone
    assert torch.equal(model.generate(**call, **options, compile_config=compiling), want)
    assert len(graphs) == 1 and "fastfuse" in graphs[0].code


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_the_dense_mask_is_never_made(model, implementation):
    """Neither for one row of the batch nor for one head, forward, backward, prompt or step. Of its size there is nothing else: the text is long."""
    model.set_attn_implementation(implementation)
    s, s_e, call = 160, 4 * 17, conversations([["coffee"], ["astronaut"]])
    more = s - call["input_ids"].shape[1]
    call["input_ids"] = torch.cat([call["input_ids"], torch.randint(3, mllama.VOCAB, (2, more))], 1)
    call["attention_mask"] = torch.ones_like(call["input_ids"])
    tiles = call["cross_attention_mask"]
    call["cross_attention_mask"] = torch.cat([tiles, tiles[:, -1:].expand(-1, more, -1, -1)], 1)

    def dense(run):
        with Allocated() as mode:
            run()
        assert mode.made
        return [f for shape, f in mode.made if shape[-1:] == (s_e,) and torch.Size(shape).numel() >= s * s_e]

    def train():
        model(**call).logits.sum().backward()

    def decode():
        model.generate(**call, max_new_tokens=3, min_new_tokens=3, do_sample=False)

    assert dense(train) and dense(decode), "the count finds transformers' own"
    patch(model)
    assert dense(train) == [] and dense(decode) == []
    assert status(model).fallbacks == {}


@torch.no_grad()
def test_blind_text_by_each_rule(model):
    """Text before its image: transformers lets it see every image, Meta none. Two photos tell them apart."""
    one, other = ({k: v[:1] for k, v in conversations([[name], ["astronaut", "chelsea"]]).items()} for name in ("coffee", "chelsea"))
    assert torch.equal(one["aspect_ratio_ids"], other["aspect_ratio_ids"])

    def leak():
        """By how much the token before the image's sees it."""
        return (model(**one).logits - model(**(one | {"pixel_values": other["pixel_values"]})).logits)[:, :1].abs().max().item()

    host, seen = leak(), {}
    assert host > 1e-3
    for rule in ("host", "uniform", "zero"):
        with fastfuse.patched(model, masked_rows=rule):
            seen[rule] = leak()
    assert seen["zero"] == 0 and seen["host"] == seen["uniform"] == pytest.approx(host, rel=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("how", ["auto", "torch", "dropout"])
def test_zero_is_meta_s_rule(model, how):
    """Blind text is what it would be without any image, also by transformers' own attention, where dropout asks for that."""
    call = conversations([["coffee"]])
    text = {k: call[k][:, :1] for k in ("input_ids", "attention_mask")}
    patch(model, masked_rows="zero", backend="torch" if how == "torch" else "auto")
    own = model(**text).logits
    if how == "dropout":
        model.train()
        for m in model.modules():
            if type(m).__name__ == MLLAMA_CROSS:
                m.dropout = 0.5
    with pytest.warns(UserWarning, match="DROPOUT") if how == "dropout" else warnings.catch_warnings():
        torch.testing.assert_close(model(**call).logits[:, :1], own)


@pytest.mark.parametrize("implementation, fallbacks", [("eager", {}), ("sdpa", {"NO_MASK": 2})])
def test_without_a_mask_the_host_s_own_answer(model, implementation, fallbacks):
    """transformers' sdpa is causal over image tokens there; what the host gives is what the patched model gives."""
    model.set_attn_implementation(implementation)
    call = conversations([["coffee"]])
    del call["cross_attention_mask"]
    assert_as_before(model, call, "NO_MASK" if fallbacks else "", **fallbacks)


@torch.no_grad()
@pytest.mark.parametrize("mask", ["a second image in a later turn", "the rows of the cache too"])
def test_turns_of_a_dynamic_cache(model, mask):
    """The cache grows by the tokens of a second image, and the mask has both; a plain forward may pass the whole mask with a cache."""
    if mask.startswith("a second"):
        both = conversations([["astronaut", "chelsea"]])
        first = {k: v[:, :5] if k in ("input_ids", "attention_mask") else v[:, :1] for k, v in both.items()}
        first["cross_attention_mask"] = both["cross_attention_mask"][:, :5, :1]
        second = {k: v if k in ("attention_mask", "cross_attention_mask") else v[:, 5 if k == "input_ids" else 1 :] for k, v in both.items()}
    else:
        both = conversations()
        del both["attention_mask"]
        first = {k: v[:, :8] if k in ("input_ids", "cross_attention_mask") else v for k, v in both.items()}
        second = {"input_ids": both["input_ids"][:, 8:], "cross_attention_mask": both["cross_attention_mask"]}

    def turns():
        cache = transformers.DynamicCache(config=model.config.get_text_config())
        model(**first, past_key_values=cache, use_cache=True)
        return model(**second, past_key_values=cache, use_cache=True).logits

    want = turns()
    patch(model)
    torch.testing.assert_close(turns(), want)
    assert status(model).fallbacks == {}


def step(module, call, cache, by):
    """One call with the cache by one of its names, or positional."""
    if by != "positional":
        return module(**call, **{by: cache})
    names = list(inspect.signature(module.forward).parameters)
    first = names[: names.index(NAMES[0])]
    return module(*(call.get(name) for name in first), cache, **{k: v for k, v in call.items() if k not in first})


@torch.no_grad()
def two_steps(model, path, by, static):
    """A prompt with an image and a step without: what comes out, and what is in the cache after it."""
    dtype, module, call = model.dtype, model.get_submodule(path), conversations()
    if path == "model":
        images = {k: call[k] for k in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
        images["pixel_values"] = images["pixel_values"].to(dtype)
        steps = [{k: call[k][:, part] for k in ("input_ids", "cross_attention_mask")} for part in (slice(8), slice(8, 12))]
        steps[0] |= images
    else:  # one token: without a mask transformers' sdpa would be causal over the image tokens of more
        made = torch.Generator().manual_seed(0)
        states, x = (torch.randn(3, n, 64, generator=made).to(dtype) for n in (136, 2))
        text = [{"input_ids": call["input_ids"][:, i : i + 1]} if path.endswith("model") else {"hidden_states": x[:, i : i + 1]} for i in range(2)]
        steps = [text[0] | {"cross_attention_states": states}, text[1]]
    config = model.config.get_text_config()
    cache = transformers.StaticCache(config=config, max_cache_len=136) if static else transformers.DynamicCache(config=config)
    outs = [step(module, each, cache, by)[0] for each in steps]
    return [*outs, cache.layers[1].keys, cache.layers[1].values]


TEXT, ATTENTION = "model.language_model", "model.language_model.layers.1.cross_attn"
WAYS = [*NAMES, "positional"]


@pytest.mark.parametrize(
    "path, static, by", [(path, (i + j) % 2 == 1 and path != "model", by) for i, path in enumerate(("model", TEXT, ATTENTION)) for j, by in enumerate(WAYS)]
)
def test_the_cache_by_each_of_its_names(model, path, static, by):
    model.set_attn_implementation("sdpa")
    want, exact = two_steps(model, path, by, static), two_steps(mllama.exactly(model), path, by, static)
    patch(model)
    for got, eager, true in zip(two_steps(model, path, by, static), want, exact, strict=True):
        assert_no_worse(got, eager, true)
    assert status(model).fallbacks == {}


def caches(model, n=2):
    return [transformers.DynamicCache(config=model.config.get_text_config()) for _ in range(n)]


def lengths(found):
    return [cache.get_seq_length(1) for cache in found]


@pytest.mark.parametrize("newer", ["cache", None])
@pytest.mark.skipif(len(NAMES) == 1, reason="this transformers has one name for it")
@torch.no_grad()
def test_of_two_names_the_newer_counts(model, newer):
    """By presence, as in transformers: None under the newer name is no cache."""
    attn, x, states = attention_of(model), torch.randn(2, 1, 64), torch.randn(2, 8, 64)

    def held():
        both = caches(model)
        attn(x, states, cache=both[0] if newer else None, past_key_values=both[1])
        return lengths(both)

    want = held()
    patch(model)
    assert held() == want == [8 if newer else 0, 0]
    assert status(model).fallbacks == {}


def test_a_cache_given_twice_is_transformers_own_error(model):
    attn, (cache,) = attention_of(model), caches(model, 1)
    patch(model)
    for name in NAMES:
        with pytest.warns(UserWarning, match="ARGUMENTS") if name == NAMES[0] else warnings.catch_warnings(), pytest.raises(TypeError, match="multiple values"):
            attn(torch.randn(2, 1, 64), torch.randn(2, 8, 64), cache, **{name: cache})
    assert status(model).fallbacks == {"ARGUMENTS": len(NAMES)}


@torch.no_grad()
def test_the_cache_gets_what_transformers_hands_it(model):
    """5.24 hands a cache the keywords of the call beside keys and values, versions before nothing."""
    seen = []

    class Watching(transformers.DynamicCache):
        def update(self, keys, values, layer_idx, *args, **kwargs):
            seen.append((layer_idx, args, {k: sorted(v) for k, v in kwargs.items()}))
            return super().update(keys, values, layer_idx, *args, **kwargs)

    attn, call, config = attention_of(model), conversations([["coffee"]]), model.config.get_text_config()

    def calls():
        seen.clear()
        attn(torch.randn(2, 1, 64), torch.randn(2, 8, 64), use_cache=True, position_ids=torch.zeros(2, 1), **{NAMES[0]: Watching(config=config)})
        model(**call, **{NAMES[0]: Watching(config=config)})
        return list(seen)

    want = calls()
    patch(model)
    assert calls() == want and want[0] == (1, (), {"kwargs": ["position_ids"]} if NAMES[0] == "cache" else {})
    assert status(model).fallbacks == {}
