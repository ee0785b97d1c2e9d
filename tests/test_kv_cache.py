"""The static cache, and turning the caches of a model on, off and away."""

import copy
import logging

import pytest
import reference
import torch
from numerics import assert_no_worse
from reference import DTYPES, HEAD_DIM, VOCAB, make_decoder, make_model
from torch._dynamo.testing import CompileCounter

from fastfuse.errors import InvalidArgument
from fastfuse.modules import KVCache, MultiHeadAttention, delete_kv_caches, disable_kv_cache, local_kv_cache

B, H, LENGTH, DIM = 3, 2, 6, 4


def new_cache(dtype=torch.float32):
    return KVCache(B, LENGTH, H, DIM, dtype)


def some(tokens, batch=B, dtype=torch.float32, **kwargs):
    return [torch.randn(batch, H, tokens, DIM, **kwargs).to(dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_are_written_one_after_another_until_a_reset(dtype):
    """Into tensors that stay where they are."""
    cache, held = new_cache(dtype), 0
    buffers = dict(cache.named_buffers())
    assert cache.k_cache.shape == cache.v_cache.shape == (B, H, LENGTH, DIM) and cache.k_cache.dtype == cache.v_cache.dtype == dtype
    assert cache.cache_pos.dtype == torch.int64 and type(cache.size) is int and cache.batch_size == B and cache.state_dict() == {}
    for _ in range(2):
        assert cache.size == 0 and cache.cache_pos.tolist() == [*range(LENGTH)] and not cache.k_cache.any() and not cache.v_cache.any()
        steps = [some(n, dtype=dtype) for n in (3, 1, 2)]
        for step in steps:
            got = cache.update(*step)
            held = cache.size
            assert cache.cache_pos.tolist() == list(range(held, held + LENGTH))
            for kept, parts in zip(got, zip(*steps, strict=True), strict=True):
                assert torch.equal(kept[:, :, :held], torch.cat(parts, 2)[:, :, :held]) and not kept[:, :, held:].any()
        assert held == LENGTH
        cache.reset()
    assert all(getattr(cache, name) is buffer for name, buffer in buffers.items())


def test_one_sample_fills_every_row():
    cache, (k, v) = new_cache(), some(2, batch=1)
    cache.update(k, v)
    assert torch.equal(cache.k_cache[:, :, :2], k.expand(B, -1, -1, -1)) and torch.equal(cache.v_cache[:, :, :2], v.expand(B, -1, -1, -1))


BATCH = "^The current cache has been setup with a batch size of 3, but found new key tensors with batch size 5!$"
REFUSED = [  # tokens that it holds, and what does not fit then
    (0, some(1, batch=5), ValueError, BATCH),
    (0, some(1, batch=2), RuntimeError, "shape mismatch"),
    (0, some(7), InvalidArgument, r"7 tokens, the cache holds 0 of max_seq_len=6"),
    (4, some(3), InvalidArgument, r"3 tokens.*holds 4.*6"),
    (6, some(1), InvalidArgument, r"1 tokens.*holds 6"),
    (4, some(1, dtype=torch.bfloat16), RuntimeError, "Index put requires the source and destination dtypes match"),
    (4, [some(2)[0], some(1)[0]], ValueError, r"v_val has shape \(3, 2, 1, 4\), k_val \(3, 2, 2, 4\)"),
]


@pytest.mark.parametrize(("held", "values", "error", "message"), REFUSED)
def test_what_does_not_fit_is_refused_before_anything_is_written(held, values, error, message):
    cache = new_cache()
    cache.update(*some(held))
    before = [t.clone() for t in cache.buffers()]
    with pytest.raises(error, match=message):
        cache.update(*values)
    assert cache.size == held and all(map(torch.equal, cache.buffers(), before))


def test_one_graph_serves_every_position_and_notices_an_overflow():
    cache, plain, counter = new_cache(), new_cache(), CompileCounter()
    torch._dynamo.reset()
    update = torch.compile(cache.update, backend=counter, fullgraph=True)
    for _ in range(3):
        step = some(1)
        assert all(map(torch.equal, update(*step), plain.update(*step)))
    assert counter.frame_count == 1 and cache.size == 3
    update(*some(3))
    with pytest.raises(RuntimeError, match="more tokens than max_seq_len=6"):
        update(*some(3))


def test_update_reads_no_value_of_the_device():
    """On the meta device there are none to read."""
    with torch.device("meta"):
        cache = new_cache()
        k, _ = cache.update(*some(2))
        cache.reset()
    assert k is cache.k_cache and k.is_meta


def test_gradients_flow_through_a_cached_forward_and_reset_lets_go_of_the_graph():
    cache, (k, v) = new_cache(), some(2, requires_grad=True)
    keys, values = cache.update(k, v)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k)) and torch.equal(v.grad, torch.full_like(v, 2.0))
    cache.reset()
    assert all(not t.requires_grad and t.is_leaf for t in (cache.k_cache, cache.v_cache))


@pytest.fixture
def decoder():
    return make_decoder()


def prompt(length):
    return torch.randint(0, VOCAB, (B, length)), torch.ones(1, length, 8, dtype=torch.bool).tril(), torch.arange(length)


def caches(model):
    return [m for m in model.modules() if isinstance(m, KVCache)]


def lengths(model):
    return {name: m.kv_cache.k_cache.shape[2] for name, m in model.named_modules() if isinstance(m, MultiHeadAttention)}


@pytest.mark.parametrize(
    ("kwargs", "encoder", "own"),
    [({"encoder_max_seq_len": 5, "decoder_max_seq_len": 9}, 5, 9), ({"decoder_max_seq_len": 9}, 64, 9), ({"encoder_max_seq_len": 5}, 5, 64), ({}, 64, 64)],
)
def test_lengths_of_the_caches(kwargs, encoder, own, decoder, caplog):
    """A second setup changes nothing, with a warning; deleted caches leave no lengths."""
    assert not decoder.caches_are_setup() and not decoder.caches_are_enabled()
    keys = list(decoder.state_dict())
    decoder.setup_caches(B, torch.bfloat16, **kwargs)
    kept = caches(decoder)
    with caplog.at_level(logging.WARNING):
        decoder.setup_caches(3, torch.float32, encoder_max_seq_len=40, decoder_max_seq_len=30)
        decoder.layers[0].attn.setup_cache(B, torch.float32, max_seq_len=9)
    assert len(caplog.records) == 2 and "already setup" in caplog.text and all(a is b for a, b in zip(caches(decoder), kept, strict=True))
    assert lengths(decoder) == {"layers.0.attn": own, "layers.1.layer.attn": own, "layers.1.fusion_layer.attn": encoder, "layers.2.attn": own}
    assert {c.k_cache.dtype for c in kept} == {torch.bfloat16} and kept[0].k_cache.shape == (B, 2, own, HEAD_DIM)
    assert (decoder.encoder_max_cache_seq_len, decoder.decoder_max_cache_seq_len) == (encoder, own)
    assert decoder.caches_are_setup() and decoder.caches_are_enabled() and list(decoder.state_dict()) == keys
    delete_kv_caches(decoder)
    assert decoder.encoder_max_cache_seq_len is None and decoder.decoder_max_cache_seq_len is None


@pytest.mark.parametrize(("kind", "encoder", "own"), [("self", None, 64), ("cross", 3, None)])
def test_a_decoder_of_one_kind_of_layers_has_one_length(kind, encoder, own):
    decoder = make_decoder(kind)
    decoder.setup_caches(B, torch.float32, encoder_max_seq_len=3)
    assert (decoder.encoder_max_cache_seq_len, decoder.decoder_max_cache_seq_len) == (encoder, own)


def test_disabled_caches_are_neither_read_nor_written(decoder):
    """Inside, the forward is that of a model without caches, causal by itself; afterwards decoding goes on."""
    without, (tokens, mask, positions) = copy.deepcopy(decoder), prompt(6)
    whole = without(tokens)
    decoder.setup_caches(B, torch.float32, decoder_max_seq_len=8)
    decoder(tokens[:, :4], mask=mask[:, :4], input_pos=positions[:4])
    held = [c.k_cache.clone() for c in caches(decoder)]
    with disable_kv_cache(decoder):
        assert decoder.caches_are_setup() and not decoder.caches_are_enabled()
        assert torch.equal(decoder(tokens), whole)
        with pytest.raises(RuntimeError, match=r"^Key value caches are not setup\. Call model\.setup_caches first\.$"):
            decoder.reset_caches()
    assert decoder.caches_are_enabled() and all(torch.equal(a, b.k_cache) for a, b in zip(held, caches(decoder), strict=True))
    step = decoder(tokens[:, 4:5], mask=mask[:, 4:5], input_pos=positions[4:5])
    assert_no_worse(step, whole[:, 4:5], reference.decoder(without.double(), tokens)[:, 4:5])
    delete_kv_caches(decoder)
    assert caches(decoder) == [] and not decoder.caches_are_setup() and not decoder.caches_are_enabled()
    assert torch.equal(decoder(tokens), whole)


def test_caches_are_enabled_again_after_an_error_and_after_disabling_twice(decoder, caplog):
    decoder.setup_caches(B, torch.float32, decoder_max_seq_len=8)
    with pytest.raises(ZeroDivisionError), disable_kv_cache(decoder):
        raise ZeroDivisionError
    assert all(layer.caches_are_enabled() for layer in decoder.layers)
    with caplog.at_level(logging.WARNING), disable_kv_cache(decoder):
        assert not caplog.records
        with disable_kv_cache(decoder):
            assert len(caplog.records) == 1
        assert decoder.caches_are_enabled()


def test_local_caches(decoder):
    tokens, mask, positions = prompt(4)
    with local_kv_cache(decoder, batch_size=B, device=torch.device("cpu"), dtype=torch.float64, encoder_max_seq_len=5, decoder_max_seq_len=8):
        assert [(c.k_cache.shape[2], c.k_cache.dtype) for c in caches(decoder)] == [(n, torch.float64) for n in (8, 8, 5, 8)]
        with (
            pytest.raises(ValueError, match="Model caches must be not setup prior to entering this context manager!"),
            local_kv_cache(decoder, batch_size=B, device="cpu", dtype=torch.float32),
        ):
            pass
        cached = decoder.double()(tokens, mask=mask, input_pos=positions)
    assert caches(decoder) == [] and not decoder.caches_are_setup()
    assert (cached - reference.decoder(decoder, tokens)).abs().max() < 1e-6, "the rotation's factors are fp32"
    with pytest.raises(ZeroDivisionError), local_kv_cache(decoder, batch_size=B, device="cpu", dtype=torch.float32):
        raise ZeroDivisionError
    assert caches(decoder) == []


@torch.no_grad()
def test_the_helpers_take_a_model_of_an_encoder_and_a_decoder():
    model, images, tokens = make_model(), {"images": torch.randn(B, 5, 5)}, prompt(8)[0]
    whole = model(tokens, encoder_input=images)
    with local_kv_cache(model, batch_size=B, device="cpu", dtype=torch.float32, encoder_max_seq_len=5, decoder_max_seq_len=8):
        assert model.caches_are_setup() and model.caches_are_enabled()
        assert (model.encoder_max_cache_seq_len, model.decoder_max_cache_seq_len, model.max_seq_len) == (5, 8, 64)
        with disable_kv_cache(model):
            assert not model.caches_are_enabled() and torch.equal(model(tokens, encoder_input=images), whole)
    assert not model.caches_are_setup()


@pytest.mark.parametrize("make", [make_decoder, make_model])
def test_what_needs_caches_says_so(make):
    model = make()
    with pytest.raises(ValueError, match=r"You have tried to delete model caches, but model\.caches_are_setup\(\) is False!"):
        delete_kv_caches(model)
    with pytest.raises(ValueError, match=r"Model caches must be setup before calling disable_kv_cache! Please use model\.setup_caches\(\)"):
        disable_kv_cache(model).__enter__()
    with pytest.raises(RuntimeError, match=r"^Key value caches are not setup\. Call model\.setup_caches first\.$"):
        model.reset_caches()
    with pytest.raises(RuntimeError, match=r"^Key value caches are not setup\. Call ``setup_caches\(\)`` first\.$"):
        reference.make_attention().reset_cache()


SETUP = "^KV-caches for self-attention layers are setup for inference mode, causal masks must be provided! Use the `mask` arg to provide a causal mask.$"
CROSS = "^KV-caches for cross-attention/fusion layers are setup for inference mode and you seem to be using encoder_input, causal masks must be provided! "
POSITIONS = "^KV-caches are setup for inference mode, input positions must be provided!"


def test_what_cached_calls_need_is_said_in_this_order(decoder):
    decoder.setup_caches(B, torch.float32, encoder_max_seq_len=5, decoder_max_seq_len=8)
    tokens, mask, _ = prompt(8)
    given = {"encoder_input": torch.randn(B, 5, reference.D)}
    with pytest.raises(ValueError, match=r"^seq_len \(65\)"):
        decoder(torch.zeros(1, 65, dtype=torch.long))
    for message, name, more in ((SETUP, "mask", mask), (CROSS, "encoder_mask", torch.ones(B, 8, 5, dtype=torch.bool)), (POSITIONS, None, None)):
        with pytest.raises(ValueError, match=message):
            decoder(tokens, **given)
        given[name] = more


def test_a_setup_that_fails_leaves_no_caches(decoder, monkeypatch):
    """Out of memory at the third layer: half a set of caches could neither be used nor set up again."""
    made = []

    def failing(*args, **kwargs):
        made.append(1)
        if len(made) == 3:
            raise MemoryError
        return KVCache(*args, **kwargs)

    monkeypatch.setattr("fastfuse.modules.attention.KVCache", failing)
    with pytest.raises(MemoryError):
        decoder.setup_caches(B, torch.float32)
    assert not any(getattr(m, "kv_cache", None) is not None or getattr(m, "cache_enabled", False) for m in decoder.modules())
    assert decoder.decoder_max_cache_seq_len is None
    monkeypatch.undo()
    decoder.setup_caches(B, torch.float32)
    assert decoder.caches_are_setup()
