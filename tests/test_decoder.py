"""The decoder: what it gives in place of logits, its layers, masks and positions, torchtune's values. Formulas, keys and refusals: test_modules.py."""

import copy
import warnings

import pytest
import reference
import torch
from numerics import assert_no_worse, assert_rounding_apart
from reference import FUSED, HEAD_DIM, HEADS, VOCAB, D, make_decoder, make_self_layer
from torch import nn

from fastfuse.modules import (
    FeedForward,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TanhGate,
    TiedLinear,
    TransformerCrossAttentionLayer,
    TransformerDecoder,
    TransformerSelfAttentionLayer,
    transformer,
)
from fastfuse.modules.model_fusion import FusionEmbedding, FusionLayer

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
    for indices in ([0], [1, 2], [0, 3], [3], [0, 1, 2, 3]):
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
    model.skip_output_layer = True
    assert torch.equal(model.output(model(tokens)[1]).float(), logits)


def test_chunking_warns_once(model, monkeypatch):
    monkeypatch.setattr(transformer, "_warned", set())
    calls = {"set_num_output_chunks": 2, "chunked_output": torch.randn(1, 4, D)}
    for name, value in calls.items():
        with pytest.warns(FutureWarning, match=f"{name} is deprecated"):
            getattr(model, name)(value)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, value in calls.items():
            getattr(model, name)(value)
        model(torch.zeros(1, 4, dtype=torch.long))


def test_embeddings_in_place_of_tokens(model, tokens):
    tables = list(model.tok_embeddings.parameters())
    runs = [model(tokens)] + [model(t, input_embeds=model.tok_embeddings(tokens)) for t in (None, tokens[:1, :1])]
    assert all(torch.equal(run, runs[0]) for run in runs)
    grads = [torch.autograd.grad(run.square().sum(), tables) for run in runs]
    assert all(torch.equal(a, b) and a.any() for own in grads for a, b in zip(own, grads[0], strict=True))


def test_a_tied_output(model):
    embedding, tokens = nn.Embedding(VOCAB, D), torch.randint(0, VOCAB, (B, S))
    model.tok_embeddings = embedding
    del model.output
    model.output, model.skip_output_layer = TiedLinear(embedding), True
    hidden, model.skip_output_layer = model(tokens), False
    assert torch.equal(model(tokens), hidden @ embedding.weight.T)
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
    assert isinstance(model.layers, nn.ModuleList) and all(a is b for a, b in zip(model.layers, layers, strict=True))
    assert (model.max_seq_len, model.num_heads, model.head_dim) == (16, HEADS, HEAD_DIM)
    assert (model.causal_mask, model.num_output_chunks, model.skip_output_layer) == (None, 0, False)
    assert model.encoder_max_cache_seq_len is None and model.decoder_max_cache_seq_len is None


def torchtune_model():
    """Built part by part in torchtune's order, so that the default initialisations draw the same numbers."""

    def linear(i, o):
        return nn.Linear(i, o, bias=False)

    def layer(cross, rope):
        attn = MultiHeadAttention(
            embed_dim=8, num_heads=4, num_kv_heads=2, head_dim=2, q_proj=linear(8, 8), k_proj=linear(8, 4), v_proj=linear(8, 4),
            output_proj=linear(8, 8), pos_embeddings=None if cross else rope, q_norm=RMSNorm(2) if cross else None,
            k_norm=RMSNorm(2) if cross else None, is_causal=not cross,
        )  # fmt: skip
        mlp = FeedForward(gate_proj=linear(8, 12), down_proj=linear(12, 8), up_proj=linear(8, 12))
        if cross:
            return TransformerCrossAttentionLayer(attn, mlp, ca_norm=RMSNorm(8), mlp_norm=RMSNorm(8), ca_scale=TanhGate(), mlp_scale=TanhGate())
        return TransformerSelfAttentionLayer(attn, mlp, sa_norm=RMSNorm(8), mlp_norm=RMSNorm(8))

    torch.manual_seed(7)
    rope = RotaryPositionalEmbeddings(2, 16)
    model = TransformerDecoder(
        tok_embeddings=FusionEmbedding(10, 2, 8),
        layers=[FusionLayer(layer(False, rope), layer(True, rope)), layer(False, rope)],
        max_seq_len=16,
        num_heads=4,
        head_dim=2,
        norm=RMSNorm(8),
        output=linear(8, 10),
    )
    for p in model.parameters():
        if p.numel() == 1:
            nn.init.constant_(p, 0.5)
    return model


def test_values_of_torchtune():
    """Logits of the same model built from the same seed in torchtune 0.6.1: token 1 of sample 0 sees no image, the other one does."""
    model, encoded = torchtune_model(), torch.randn(2, 3, 8)
    tokens = torch.tensor([[1, 10, 3, 9], [11, 0, 2, 5]])
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0], [0, 1, 1], [1, 1, 1]]]).bool().expand(2, -1, -1)
    out = model(tokens, encoder_input=encoded, encoder_mask=mask)
    blind = [0.5134376287460327, 0.17640481889247894, 0.1925799548625946, 0.0469261109828949, 0.7614755630493164]
    blind += [0.2276485711336136, -0.02660013735294342, -0.27946966886520386, 0.13803839683532715, 1.1496496200561523]
    seeing = [0.3843853771686554, -0.11416473984718323, 0.4472935199737549, 0.6377598643302917, -0.04730014503002167]
    seeing += [0.16759979724884033, 0.0693645179271698, 0.24179407954216003, 0.3263293504714966, 0.7023400068283081]
    assert_rounding_apart(out[0, 1], torch.tensor(blind), 12, products=10)
    assert_rounding_apart(out[1, 3], torch.tensor(seeing), 12, products=10)
