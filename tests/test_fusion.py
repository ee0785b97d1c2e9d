"""Fusion layers, the fusion embedding, fusion parameters and the model of an encoder and a decoder. Formulas, copies and refusals: test_modules.py."""

import copy
import pickle

import pytest
import torch
from numerics import assert_rounding_apart
from reference import VOCAB, D, make_decoder, make_model, shaken
from torch import nn

from fastfuse.errors import InvalidArgument
from fastfuse.modules import KVCache
from fastfuse.modules.loss import LinearCrossEntropyLoss
from fastfuse.modules.model_fusion import DeepFusionModel, FusionEmbedding, FusionLayer, get_fusion_params, register_fusion_module

B, S, S_E = 2, 7, 6


@pytest.fixture
def model():
    return make_model()


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB, (B, S))


@pytest.fixture
def images():
    return {"images": torch.randn(B, S_E, 5)}


class Doubling(nn.Module):
    """x -> 2 x + shift, and what it was called with."""

    def __init__(self, shift):
        super().__init__()
        self.shift, self.calls = shift, []

    def forward(self, x, **kwargs):
        self.calls.append(kwargs)
        return 2 * x + self.shift


def test_the_fusion_layer_comes_first_or_last():
    """2 (2 x + 10) + 1 against 2 (2 x + 1) + 10; both get all keywords."""
    for order, want in (({}, 33.0), ({"fusion_first": True}, 33.0), ({"fusion_first": False}, 24.0)):
        layer = FusionLayer(Doubling(1.0), Doubling(10.0), **order)
        assert layer(torch.tensor([3.0]), mask=1, encoder_input=2).item() == want
        assert layer.layer.calls == layer.fusion_layer.calls == [{"mask": 1, "encoder_input": 2}]


KEYS = ["fusion_layer.weight", "fusion_layer.bias", "weight", "bias"]


def two_linears():
    return FusionLayer(nn.Linear(2, 2), nn.Linear(2, 2))


def test_keys_of_a_fusion_layer():
    """The layer keeps the keys it has alone, behind those of the fusion layer; parameter names keep the module's."""
    layer, layers = two_linears(), nn.Sequential(*(two_linears() for _ in range(11)))
    assert list(layer.state_dict()) == KEYS
    assert list(layers.state_dict(prefix="layers.")) == [f"layers.{i}.{key}" for i in range(11) for key in KEYS]
    assert [n for n, _ in layer.named_parameters()] == ["layer.weight", "layer.bias", "fusion_layer.weight", "fusion_layer.bias"]
    assert layer.state_dict()["weight"].data_ptr() == layer.layer.weight.data_ptr()
    assert layer.state_dict()["fusion_layer.weight"].data_ptr() == layer.fusion_layer.weight.data_ptr()


def test_loading_a_fusion_layer():
    layer = two_linears()
    state = {k: torch.full_like(v, i) for i, (k, v) in enumerate(layer.state_dict().items())}
    assert str(layer.load_state_dict(state)) == "<All keys matched successfully>"
    assert list(state) == KEYS, "the caller's dict stays as it was"
    assert [p.flatten()[0].item() for p in (*layer.fusion_layer.parameters(), *layer.layer.parameters())] == [0, 1, 2, 3]
    report = layer.load_state_dict({"weight": torch.full((2, 2), 7.0), "foo": torch.zeros(1)}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["layer.bias", "fusion_layer.weight", "fusion_layer.bias"], ["layer.foo"])
    assert layer.layer.weight[0, 0] == 7 and layer.fusion_layer.weight[0, 0] == 0
    with pytest.raises(RuntimeError, match=r"fusion_layer\.bias"):
        layer.load_state_dict({k: state[k] for k in ("weight", "bias", "fusion_layer.weight")})


def test_a_text_decoders_checkpoint_loads_into_the_fused_one(tokens):
    """Only the fusion parts are missing, and the values are the text decoder's."""
    fused, text = make_decoder(), make_decoder("self", "self", "self")
    text.tok_embeddings = nn.Embedding(VOCAB, D)
    report = fused.load_state_dict(text.state_dict(), strict=False)
    fusion = [n for n, _ in fused.named_parameters() if "fusion" in n]
    assert report.unexpected_keys == [] and sorted(report.missing_keys) == sorted(fusion) and len(fusion) == 14
    assert torch.equal(fused(tokens), text(tokens))


@pytest.fixture
def embedding():
    return FusionEmbedding(5, 3, 4)


def test_ids_from_vocab_size_on_read_the_fusion_table(embedding):
    """A row that no token read gets exactly no gradient, row 0 included."""
    assert (embedding.dim, embedding.num_embeddings) == (4, 8) and not hasattr(embedding, "weight")
    assert embedding(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 4)
    out = embedding(torch.tensor([[4, 5, 7, 5], [7, 3, 7, 2]]))
    assert torch.equal(out[0, 0], embedding.embedding.weight[4]) and torch.equal(out[0, 1], embedding.fusion_embedding.weight[0])
    out.sum().backward()
    grad = torch.cat([embedding.embedding.weight.grad, embedding.fusion_embedding.weight.grad])
    assert grad.tolist() == [[n] * 4 for n in (0, 0, 1, 1, 1, 2, 0, 3)]


def test_a_table_that_is_not_read_cannot_poison_the_result(embedding):
    with torch.no_grad():
        embedding.fusion_embedding.weight.fill_(torch.nan)
        embedding.embedding.weight[0] = torch.inf
    assert torch.equal(embedding(torch.tensor([[1, 4]]))[0], embedding.embedding.weight[[1, 4]])


def test_keys_of_the_fusion_embedding(embedding):
    assert [n for n, _ in embedding.named_parameters()] == ["embedding.weight", "fusion_embedding.weight"]
    assert embedding.state_dict(prefix="a.")["a.weight"].data_ptr() == embedding.embedding.weight.data_ptr()
    plain, ones = nn.Embedding(5, 4), {"fusion_embedding.weight": torch.ones(3, 4)}
    for state, missing in (
        (plain.state_dict(), ["fusion_embedding.weight"]),
        (ones, ["embedding.weight"]),
        ({}, ["embedding.weight", "fusion_embedding.weight"]),
    ):
        report = embedding.load_state_dict(state, strict=False)
        assert (report.missing_keys, report.unexpected_keys) == (missing, [])
    assert embedding.fusion_embedding.weight.eq(1).all() and torch.equal(embedding.embedding.weight, plain.weight)
    with pytest.raises(RuntimeError, match="Missing key"):
        embedding.load_state_dict(ones)


def is_fusion(name):
    return "fusion" in name or name.startswith("encoder.projection.")


def test_fusion_parameters_by_name(model):
    params, named = get_fusion_params(model), dict(model.named_parameters())
    assert sorted(params) == sorted(filter(is_fusion, named)) and len(params) == 14 + 2
    assert all(params[n] is named[n] for n in params)
    layer = model.decoder.layers[1]
    assert layer.fusion_params() == [f"fusion_layer.{n}" for n, _ in layer.fusion_layer.named_parameters()]
    assert model.decoder.tok_embeddings.fusion_params() == ["fusion_embedding.weight"]
    assert model.encoder.projection.fusion_params() == ["weight", "bias"]


def test_a_registered_root_module_and_a_wrong_name():
    linear = nn.Linear(2, 2)
    assert get_fusion_params(linear) == {}
    register_fusion_module(linear)
    assert sorted(get_fusion_params(linear)) == ["bias", "weight"]
    linear.fusion_params = lambda: ["foo"]
    with pytest.raises(InvalidArgument, match=r"^Fusion params \['foo'\] not converted"):
        get_fusion_params(linear)


@pytest.mark.parametrize(
    ("decoder", "encoder", "fusion"), [(False, False, False), (False, True, True), (True, False, True), (True, True, False), (None, None, None)]
)
def test_what_is_trainable(decoder, encoder, fusion, tokens, images):
    """Only the fusion by default."""
    flags = {"decoder_trainable": decoder, "encoder_trainable": encoder, "fusion_trainable": fusion}
    model = make_model(**{name: flag for name, flag in flags.items() if flag is not None})
    part = {"decoder": decoder, "encoder": encoder}
    want = [n for n, _ in model.named_parameters() if (fusion is not False if is_fusion(n) else part[n.split(".")[0]])]
    assert [n for n, p in model.named_parameters() if p.requires_grad] == want
    if want:
        tokens[0, 0] = VOCAB
        model(tokens, encoder_input=images).sum().backward()
        assert [n for n, p in model.named_parameters() if p.grad is not None] == want


def test_without_an_encoder_input_the_encoder_does_not_run(model, tokens):
    model.encoder.forward = lambda **kwargs: pytest.fail("the encoder ran")
    for more in ({}, {"mask": torch.ones(B, S, S, dtype=torch.bool).tril(), "input_pos": torch.arange(S).flip(0)}):
        assert torch.equal(model(tokens, **more), model.decoder(tokens, **more))


@torch.no_grad()
def test_caches_of_both_parts_are_filled_and_reset(model, tokens, images):
    model.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=S)
    masks = {"mask": torch.ones(1, S, S, dtype=torch.bool).tril(), "encoder_mask": torch.ones(1, S, S_E, dtype=torch.bool)}
    model(tokens, encoder_input=images, input_pos=torch.arange(S), **masks)
    caches = [m for m in model.modules() if isinstance(m, KVCache)]
    assert [c.size for c in caches] == [S, S, S_E, S]
    model.reset_caches()
    assert not any(c.size or c.k_cache.any() or c.v_cache.any() for c in caches)


def test_any_two_modules_can_be_fused():
    """A decoder that only takes tokens by keyword."""

    class Echo(nn.Module):
        def forward(self, *, tokens, mask, encoder_input, encoder_mask, input_pos):
            return tokens, mask, encoder_mask, input_pos, encoder_input

    model, x = DeepFusionModel(Echo(), nn.Linear(3, 2)), torch.randn(1, 3)
    *rest, encoded = model(1, mask=2, encoder_input={"input": x}, encoder_mask=3, input_pos=4)
    assert rest == [1, 2, 3, 4] and torch.equal(encoded, model.encoder(x)) and not model.encoder.weight.requires_grad


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_output_chunks_and_hidden_states_for_a_loss_are_the_decoder_s(model, tokens):
    logits = model(tokens)
    assert model.output is model.decoder.output and model.skip_output_layer is False
    model.set_num_output_chunks(3)
    chunks = model(tokens)
    assert [c.shape[1] for c in chunks] == [3, 2, 2]
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(model)
    assert model.decoder.skip_output_layer is True and loss.linear_projection is model.decoder.output
    for got in (torch.cat(chunks, 1), model.output(model(tokens))):
        assert_rounding_apart(got, logits, D)


def test_pickles_and_copies_own_their_fusion_parameters(model):
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        twin.encoder.projection.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        assert set(get_fusion_params(twin)) - set(get_fusion_params(model)) == {"encoder.projection.extra"}


def test_distributed_checkpointing_knows_the_keys():
    """torch.distributed.checkpoint walks modules by key, and the keys leave `layer.` and `embedding.` out."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = make_decoder(), shaken(make_decoder())
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys() and not torch.equal(state["norm.scale"], other.norm.scale)
    set_model_state_dict(other, state)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())
