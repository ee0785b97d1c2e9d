"""The decoder: what it gives in place of logits, and its layers. Formulas, keys and refusals: test_modules.py; torchtune's values: test_llama3_2_vision.py."""

import copy
import warnings

import pytest
import reference
import torch
from numerics import assert_no_worse, assert_rounding_apart
from reference import FUSED, HEAD_DIM, HEADS, VOCAB, D, make_decoder, make_self_layer
from torch import nn

from fastfuse.modules import TiedLinear, TransformerDecoder, transformer

B, S, S_E = 3, 9, 7
BARE = {name: nn.Identity() for name in ("tok_embeddings", "norm", "output")} | {"max_seq_len": 16, "num_heads": HEADS, "head_dim": HEAD_DIM}


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB + FUSED, (B, S))


@pytest.fixture
def model():
    return make_decoder()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64], ids=str)
def test_logits_are_fp32_whatever_the_model_is(dtype, model, tokens):
    logits, model.skip_output_layer = model.to(dtype)(tokens), True
    hidden = model(tokens)
    assert hidden.dtype == dtype
    assert torch.equal(logits, model.output(hidden).to(torch.promote_types(dtype, torch.float32)))
    assert torch.equal(model.unembed(hidden), model.norm(hidden))


def test_hidden_states_are_the_inputs_of_layers(model, tokens):
    encoded, encoder_mask = torch.randn(B, S_E, D), torch.rand(B, S, S_E) < 0.5
    states = reference.decoder_states(copy.deepcopy(model).double(), tokens, None, encoded.double(), encoder_mask)
    eager = reference.decoder_states(model, tokens, None, encoded, encoder_mask)
    logits = model(tokens, encoder_input=encoded, encoder_mask=encoder_mask)
    assert model.output_hidden_states == []
    for indices in ([1, 2], [0, 3]):
        other = make_decoder(output_hidden_states=indices)
        other.load_state_dict(model.state_dict())
        *hidden, out = other(tokens, encoder_input=encoded, encoder_mask=encoder_mask)
        assert torch.equal(out, logits) and other.output_hidden_states == indices
        for i, h in zip(indices, hidden, strict=True):
            assert_no_worse(h, eager[i], states[i], f"hidden state {i} of {indices}")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("length", "sizes"), [(49, [7, 6, 6, 6, 6, 6, 6, 6]), (7, [1] * 7 + [0])])
def test_chunked_output(length, sizes):
    """In the model's dtype, hidden states beside it."""
    model, tokens = make_decoder(output_hidden_states=[2]).bfloat16(), torch.randint(0, VOCAB, (B, length))
    hidden, logits = model(tokens)
    model.set_num_output_chunks(8)
    again, chunks = model(tokens)
    assert torch.equal(again, hidden) and model.num_output_chunks == 8 and isinstance(chunks, list)
    assert [(c.shape[1], c.dtype) for c in chunks] == [(size, torch.bfloat16) for size in sizes]
    assert_rounding_apart(torch.cat(chunks, 1), logits.bfloat16(), D)
    normed = torch.randn(B, length, D).bfloat16()
    assert all(map(torch.equal, model.chunked_output(normed), map(model.output, normed.split(sizes, 1))))


def test_chunking_warns_once(model, monkeypatch):
    monkeypatch.setattr(transformer, "_warned", set())
    for name, value in {"set_num_output_chunks": 2, "chunked_output": torch.randn(1, 4, D)}.items():
        with pytest.warns(FutureWarning, match=f"{name} is deprecated"):
            getattr(model, name)(value)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            getattr(model, name)(value)
            model(torch.zeros(1, 4, dtype=torch.long))


def test_embeddings_in_place_of_tokens(model, tokens):
    tables = list(model.tok_embeddings.parameters())
    runs = [model(tokens)] + [model(t, input_embeds=model.tok_embeddings(tokens)) for t in (None, tokens[:1, :1])]
    assert all(torch.equal(run, runs[0]) for run in runs)
    grads = [torch.autograd.grad(run.square().sum(), tables) for run in runs]
    assert all(torch.equal(a, b) and a.any() for own in grads for a, b in zip(own, grads[0], strict=True))


def test_a_tied_output(model):
    """It reads the embedding at every call, and has no parameters of its own."""
    model.tok_embeddings, tokens = nn.Embedding(VOCAB, D), torch.randint(0, VOCAB, (B, S))
    del model.output
    model.output = TiedLinear(model.tok_embeddings)
    for weight in (model.tok_embeddings.weight, nn.Parameter(torch.randn(VOCAB, D))):
        model.tok_embeddings.weight, model.skip_output_layer = weight, True
        hidden, model.skip_output_layer = model(tokens), False
        assert torch.equal(model(tokens), hidden @ weight.T)
    assert not any(key.startswith("output") for key in model.state_dict())


def test_a_layer_is_copied_num_layers_times():
    layer, x = make_self_layer(), torch.randn(B, S, D)
    state = torch.get_rng_state()
    model = TransformerDecoder(layers=layer, num_layers=3, **BARE)
    assert torch.equal(torch.get_rng_state(), state), "copies draw nothing"
    assert len(model.layers) == 3 and isinstance(model.layers, nn.ModuleList)
    assert torch.equal(model(None, input_embeds=x), layer(layer(layer(x))))
    assert len({p.data_ptr() for m in (model, layer) for p in m.parameters()}) == 4 * len(list(layer.parameters()))


def test_lists_and_module_lists_are_kept():
    layers = nn.ModuleList([make_self_layer(), make_self_layer()])
    assert TransformerDecoder(layers=layers, **BARE).layers is layers
    model = TransformerDecoder(layers=list(layers), **BARE)
    assert isinstance(model.layers, nn.ModuleList) and list(model.layers) == list(layers)
    assert (model.max_seq_len, model.num_heads, model.head_dim) == (16, HEADS, HEAD_DIM)
    assert (model.causal_mask, model.num_output_chunks, model.skip_output_layer) == (None, 0, False)
    assert model.encoder_max_cache_seq_len is None and model.decoder_max_cache_seq_len is None
