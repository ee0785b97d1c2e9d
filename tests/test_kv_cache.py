"""The static cache, and turning caches off, on and away."""

import copy
import logging

import pytest
import reference
import torch
from numerics import assert_no_worse
from reference import VOCAB, make_decoder
from torch._dynamo.testing import CompileCounter

from fastfuse.errors import InvalidArgument
from fastfuse.modules import KVCache, delete_kv_caches, disable_kv_cache, local_kv_cache

B, H, LENGTH, DIM = 2, 3, 6, 4


def new_cache(dtype=torch.float32) -> KVCache:
    return KVCache(B, LENGTH, H, DIM, dtype)


def some(tokens: int, batch: int = B, dtype=torch.float32):
    return torch.randn(batch, H, tokens, DIM).to(dtype), torch.randn(batch, H, tokens, DIM).to(dtype)


def test_a_fresh_cache():
    cache = new_cache(torch.bfloat16)
    assert cache.k_cache.shape == cache.v_cache.shape == (B, H, LENGTH, DIM)
    assert cache.k_cache.dtype == cache.v_cache.dtype == torch.bfloat16
    assert not cache.k_cache.any() and not cache.v_cache.any()
    assert cache.cache_pos.tolist() == [0, 1, 2, 3, 4, 5] and cache.cache_pos.dtype == torch.int64
    assert cache.size == 0 and type(cache.size) is int and cache.batch_size == B
    assert cache.state_dict() == {} and callable(cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_tokens_are_written_one_after_another(dtype):
    cache, steps = new_cache(dtype), [some(n, dtype=dtype) for n in (3, 1, 2)]
    held = 0
    for k, v in steps:
        got_k, got_v = cache.update(k, v)
        held += k.shape[2]
        assert cache.size == held
        assert cache.cache_pos.tolist() == list(range(held, held + LENGTH))
        for got, index in ((got_k, 0), (got_v, 1)):
            want = torch.cat([s[index] for s in steps], 2)
            assert torch.equal(got[:, :, :held], want[:, :, :held])
            assert not got[:, :, held:].any()


def test_the_tensors_stay_where_they_are():
    cache = new_cache()
    before = {n: (b, b.data_ptr()) for n, b in cache.named_buffers()}
    k, v = cache.update(*some(2))
    assert k is cache.k_cache and v is cache.v_cache
    cache.reset()
    cache.update(*some(1))
    for name, (buffer, pointer) in before.items():
        assert getattr(cache, name) is buffer and buffer.data_ptr() == pointer


def test_reset_forgets_everything():
    cache = new_cache()
    cache.update(*some(4))
    cache.update(*some(1))
    cache.reset()
    assert cache.size == 0 and cache.cache_pos.tolist() == list(range(LENGTH))
    assert not cache.k_cache.any() and not cache.v_cache.any()
    k, v = some(LENGTH)
    cache.update(k, v)
    assert torch.equal(cache.k_cache, k) and torch.equal(cache.v_cache, v)


def test_one_sample_fills_every_row():
    cache, (k, v) = new_cache(), some(2, batch=1)
    cache.update(k, v)
    assert torch.equal(cache.k_cache[:, :, :2], k.expand(B, -1, -1, -1))
    assert torch.equal(cache.v_cache[:, :, :2], v.expand(B, -1, -1, -1))


def test_a_batch_that_does_not_fit():
    with pytest.raises(ValueError, match=r"^The current cache has been setup with a batch size of 2, but found new key tensors with batch size 5!$"):
        new_cache().update(*some(1, batch=5))
    with pytest.raises(RuntimeError, match="shape mismatch"):
        KVCache(4, LENGTH, H, DIM, torch.float32).update(*some(1, batch=2))


def test_more_tokens_than_the_cache_holds():
    cache = new_cache()
    k, v = some(4)
    cache.update(k, v)
    for error in (InvalidArgument, ValueError, AssertionError):
        with pytest.raises(error, match=r"3 tokens.*holds 4.*6"):
            cache.update(*some(3))
    assert cache.size == 4 and torch.equal(cache.k_cache[:, :, :4], k) and not cache.k_cache[:, :, 4:].any()
    cache.update(*some(2))
    with pytest.raises(InvalidArgument, match=r"1 tokens.*holds 6"):
        cache.update(*some(1))
    with pytest.raises(InvalidArgument, match=r"7 tokens"):
        new_cache().update(*some(7))


def test_another_dtype_is_refused():
    with pytest.raises(RuntimeError, match="Index put requires the source and destination dtypes match"):
        new_cache(torch.bfloat16).update(*some(1))


def test_one_graph_serves_every_position():
    cache, plain = new_cache(), new_cache()
    counter = CompileCounter()
    torch._dynamo.reset()
    update = torch.compile(cache.update, backend=counter, fullgraph=True)
    for _ in range(3):
        k, v = some(1)
        got, want = update(k, v), plain.update(k, v)
        assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1])
    assert counter.frame_count == 1
    assert cache.size == 3


def test_update_reads_no_value_of_the_device():
    """On the meta device there are none to read."""
    with torch.device("meta"):
        cache = new_cache()
        k, _ = cache.update(torch.zeros(B, H, 2, DIM), torch.zeros(B, H, 2, DIM))
        cache.reset()
    assert k is cache.k_cache and k.is_meta


def test_overflow_is_an_error_under_compile_too():
    cache = new_cache()
    torch._dynamo.reset()
    update = torch.compile(cache.update, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        update(*some(3))
    with pytest.raises(RuntimeError, match="more tokens than max_seq_len=6"):
        update(*some(3))


def prompt_and_mask(length: int):
    tokens = torch.randint(0, VOCAB, (B, length))
    return tokens, torch.ones(1, length, 8, dtype=torch.bool).tril(), torch.arange(length)


def caches(model):
    return [m for m in model.modules() if isinstance(m, KVCache)]


def test_disabled_caches_are_neither_read_nor_written():
    """Inside, the forward is that of a model without caches, causal by itself; afterwards decoding goes on."""
    model = make_decoder()
    without = copy.deepcopy(model)
    tokens, mask, positions = prompt_and_mask(6)
    model.setup_caches(B, torch.float32, decoder_max_seq_len=8)
    model(tokens[:, :4], mask=mask[:, :4], input_pos=positions[:4])
    held = [c.k_cache.clone() for c in caches(model)]
    with disable_kv_cache(model):
        assert model.caches_are_setup() and not model.caches_are_enabled()
        inside = model(tokens)
    assert torch.equal(inside, without(tokens)), "causal, as without caches"
    assert model.caches_are_enabled()
    assert all(torch.equal(a, b.k_cache) for a, b in zip(held, caches(model), strict=True))
    step = model(tokens[:, 4:5], mask=mask[:, 4:5], input_pos=positions[4:5])
    exact = reference.decoder(copy.deepcopy(without).double(), tokens)
    assert_no_worse(step, without(tokens)[:, 4:5], exact[:, 4:5])


def test_caches_are_enabled_again_after_an_error():
    model = make_decoder()
    model.setup_caches(B, torch.float32, decoder_max_seq_len=8)
    with pytest.raises(ZeroDivisionError), disable_kv_cache(model):
        raise ZeroDivisionError
    assert all(layer.caches_are_enabled() for layer in model.layers)


def test_disabling_disabled_caches_warns(caplog):
    model = make_decoder()
    model.setup_caches(B, torch.float32, decoder_max_seq_len=8)
    with caplog.at_level(logging.WARNING), disable_kv_cache(model):
        assert not caplog.records
        with disable_kv_cache(model):
            assert len(caplog.records) == 1
        assert model.caches_are_enabled()


def test_deleted_caches_leave_the_model_as_it_was():
    model = make_decoder()
    tokens, mask, positions = prompt_and_mask(4)
    before = model(tokens)
    model.setup_caches(B, torch.float32, decoder_max_seq_len=8)
    model(tokens, mask=mask, input_pos=positions)
    delete_kv_caches(model)
    assert caches(model) == [] and not model.caches_are_setup() and not model.caches_are_enabled()
    assert torch.equal(model(tokens), before)


def test_local_caches():
    model = make_decoder()
    tokens, mask, positions = prompt_and_mask(4)
    with local_kv_cache(model, batch_size=B, device=torch.device("cpu"), dtype=torch.float64, encoder_max_seq_len=5, decoder_max_seq_len=8):
        assert {(c.k_cache.shape[2], c.k_cache.dtype) for c in caches(model)} == {(5, torch.float64), (8, torch.float64)}
        assert len(caches(model)) == 4
        with (
            pytest.raises(ValueError, match="Model caches must be not setup prior to entering this context manager!"),
            local_kv_cache(model, batch_size=B, device="cpu", dtype=torch.float32),
        ):
            pass
        model.double()
        cached = model(tokens, mask=mask, input_pos=positions)
    assert caches(model) == [] and not model.caches_are_setup()
    want = reference.decoder(model, tokens)
    assert (cached - want).abs().max() < 1e-6, "the rotation's factors are fp32"
    with pytest.raises(ZeroDivisionError), local_kv_cache(model, batch_size=B, device="cpu", dtype=torch.float32):
        raise ZeroDivisionError
    assert caches(model) == []


def test_what_needs_caches_says_so():
    model = make_decoder()
    with pytest.raises(ValueError, match=r"You have tried to delete model caches, but model\.caches_are_setup\(\) is False!"):
        delete_kv_caches(model)
    with (
        pytest.raises(ValueError, match=r"Model caches must be setup before calling disable_kv_cache! Please use model\.setup_caches\(\)"),
        disable_kv_cache(model),
    ):
        pass


def test_reset_lets_go_of_a_graph():
    """A forward with gradients writes tensors with a graph; after reset the cache is as new."""
    cache = KVCache(1, 4, 1, 2, torch.float32)
    k = torch.randn(1, 1, 2, 2, requires_grad=True)
    cache.update(k, k)
    assert cache.k_cache.requires_grad and cache.v_cache.requires_grad
    cache.reset()
    assert not cache.k_cache.requires_grad and cache.k_cache.is_leaf and not cache.v_cache.requires_grad


def test_values_of_another_shape_are_refused_before_keys_are_written():
    cache = KVCache(1, 4, 1, 2, torch.float32)
    with pytest.raises(ValueError, match=r"v_val has shape \(1, 1, 1, 2\), k_val \(1, 1, 2, 2\)"):
        cache.update(torch.ones(1, 1, 2, 2), torch.ones(1, 1, 1, 2))
    assert cache.size == 0 and cache.k_cache.abs().max() == 0


def test_deleted_caches_leave_no_lengths():
    decoder = make_decoder()
    decoder.setup_caches(2, torch.float32, encoder_max_seq_len=12, decoder_max_seq_len=10)
    delete_kv_caches(decoder)
    assert decoder.encoder_max_cache_seq_len is None and decoder.decoder_max_cache_seq_len is None


def test_a_setup_that_fails_leaves_no_caches(monkeypatch):
    """Out of memory at the third layer: half a set of caches could neither be used nor set up again."""
    decoder, made = make_decoder(), []

    def failing(*args, **kwargs):
        made.append(1)
        if len(made) == 3:
            raise MemoryError
        return KVCache(*args, **kwargs)

    monkeypatch.setattr("fastfuse.modules.attention.KVCache", failing)
    with pytest.raises(MemoryError):
        decoder.setup_caches(2, torch.float32, encoder_max_seq_len=12, decoder_max_seq_len=10)
    assert not any(getattr(m, "kv_cache", None) is not None or getattr(m, "cache_enabled", False) for m in decoder.modules())
    assert decoder.decoder_max_cache_seq_len is None
    monkeypatch.undo()
    decoder.setup_caches(2, torch.float32, encoder_max_seq_len=12, decoder_max_seq_len=10)
    assert decoder.caches_are_setup()


def test_gradients_flow_through_a_cached_forward():
    cache = KVCache(1, 4, 1, 2, torch.float32)
    k, v = torch.randn(1, 1, 2, 2, requires_grad=True), torch.randn(1, 1, 2, 2, requires_grad=True)
    keys, values = cache.update(k, v)
    (keys.sum() + 2 * values.sum()).backward()
    assert torch.equal(k.grad, torch.ones_like(k)) and torch.equal(v.grad, torch.full_like(v, 2.0))
