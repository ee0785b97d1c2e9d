"""Fusion layers, the fusion embedding, fusion parameters and the model of an encoder and a decoder."""

import copy
import itertools
import pickle
from collections import OrderedDict

import pytest
import reference
import torch
from numerics import assert_no_worse, assert_rounding_apart
from reference import DTYPES, FUSED, VOCAB, D, assert_matches, make_cross_layer, make_decoder, make_self_layer, shaken
from torch import nn

from fastfuse.errors import InvalidArgument
from fastfuse.modules import TransformerDecoder, delete_kv_caches, disable_kv_cache, local_kv_cache
from fastfuse.modules.loss import LinearCrossEntropyLoss
from fastfuse.modules.model_fusion import DeepFusionModel, FusionEmbedding, FusionLayer, get_fusion_params, register_fusion_module

B, S, S_E = 2, 7, 6


class Doubling(nn.Module):
    """x -> 2 x + shift, and what it was called with."""

    def __init__(self, shift: float):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([shift]))
        self.calls = []

    def forward(self, x, **kwargs):
        self.calls.append(kwargs)
        return 2 * x + self.weight


def test_the_fusion_layer_comes_first_or_last():
    """2 (2 x + 10) + 1 against 2 (2 x + 1) + 10; both get all keywords."""
    x = torch.tensor([3.0])
    for first, want in ((True, 33.0), (False, 24.0)):
        layer = FusionLayer(Doubling(1.0), Doubling(10.0), fusion_first=first)
        assert layer(x, mask=1, encoder_input=2).item() == want
        assert layer.layer.calls == layer.fusion_layer.calls == [{"mask": 1, "encoder_input": 2}]
    assert FusionLayer(Doubling(1.0), Doubling(10.0))(x).item() == 33.0, "first by default"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("fusion_first", [True, False])
def test_fusion_layer_forward_and_gradients(fusion_first, dtype):
    layer = FusionLayer(make_self_layer(), make_cross_layer(), fusion_first=fusion_first)
    mask = torch.rand(B, S, S_E) < 0.6
    mask[0, 2] = False

    def formula(m, x, y):
        if m.fusion_first:
            return reference.self_layer(m.layer, reference.cross_layer(m.fusion_layer, x, y, mask))
        return reference.cross_layer(m.fusion_layer, reference.self_layer(m.layer, x), y, mask)

    inputs = {"x": torch.randn(B, S, D), "y": torch.randn(B, S_E, D)}
    assert_matches(layer, lambda m, x, y: m(x, encoder_input=y, encoder_mask=mask), formula, inputs, dtype)


def test_keys_of_a_fusion_layer():
    """The layer keeps the keys it has alone, behind those of the fusion layer; parameter names keep the module's."""
    layer = FusionLayer(nn.Linear(2, 2), nn.Linear(2, 2))
    assert list(layer.state_dict()) == ["fusion_layer.weight", "fusion_layer.bias", "weight", "bias"]
    assert list(layer.state_dict(prefix="layers.3.")) == [f"layers.3.{k}" for k in ("fusion_layer.weight", "fusion_layer.bias", "weight", "bias")]
    assert [n for n, _ in layer.named_parameters()] == ["layer.weight", "layer.bias", "fusion_layer.weight", "fusion_layer.bias"]
    assert layer.state_dict()["weight"].data_ptr() == layer.layer.weight.data_ptr()
    assert layer.state_dict()["fusion_layer.weight"].data_ptr() == layer.fusion_layer.weight.data_ptr()
    layers = nn.Sequential(*(FusionLayer(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)) for _ in range(11)))
    assert list(layers.state_dict()) == [f"{i}.{k}" for i in range(11) for k in ("fusion_layer.weight", "weight")]
    assert [n for n, _ in layers.named_parameters()] == [f"{i}.{k}" for i in range(11) for k in ("layer.weight", "fusion_layer.weight")]


def test_loading_a_fusion_layer():
    layer = FusionLayer(nn.Linear(2, 2), nn.Linear(2, 2))
    state = {k: torch.full_like(v, i) for i, (k, v) in enumerate(layer.state_dict().items())}
    given = dict(state)
    assert str(layer.load_state_dict(state)) == "<All keys matched successfully>"
    assert state.keys() == given.keys(), "the caller's dict stays as it was"
    assert layer.fusion_layer.weight[0, 0] == 0 and layer.fusion_layer.bias[0] == 1 and layer.layer.weight[0, 0] == 2 and layer.layer.bias[0] == 3
    report = layer.load_state_dict({"weight": torch.full((2, 2), 7.0), "foo": torch.zeros(1)}, strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["layer.bias", "fusion_layer.weight", "fusion_layer.bias"], ["layer.foo"])
    assert layer.layer.weight[0, 0] == 7 and layer.fusion_layer.weight[0, 0] == 0
    with pytest.raises(RuntimeError, match=r"fusion_layer\.bias"):
        layer.load_state_dict({k: state[k] for k in ("weight", "bias", "fusion_layer.weight")})


def test_a_text_decoders_checkpoint_loads_into_the_fused_one():
    """Only the fusion parts are missing, and the values are the text decoder's."""
    fused = make_decoder()
    text = TransformerDecoder(
        tok_embeddings=nn.Embedding(VOCAB, D), layers=[make_self_layer() for _ in range(3)], max_seq_len=64, num_heads=4, head_dim=4,
        norm=shaken(copy.deepcopy(fused.norm)), output=nn.Linear(D, VOCAB, bias=False),
    )  # fmt: skip
    report = fused.load_state_dict(text.state_dict(), strict=False)
    assert report.unexpected_keys == []
    fusion = [n for n, _ in fused.named_parameters() if "fusion" in n]
    assert sorted(report.missing_keys) == sorted(fusion) and len(fusion) == 14
    tokens = torch.randint(0, VOCAB, (B, S))
    assert torch.equal(fused(tokens), text(tokens))


def test_a_round_trip_through_the_state_dict():
    model, twin, tokens, y = make_decoder(), make_decoder(), torch.randint(0, VOCAB + FUSED, (B, S)), torch.randn(B, S_E, D)
    assert not torch.equal(twin(tokens, encoder_input=y), model(tokens, encoder_input=y))
    for assign in (False, True):
        twin.load_state_dict(copy.deepcopy(model.state_dict()), assign=assign)
        assert torch.equal(twin(tokens, encoder_input=y), model(tokens, encoder_input=y))


def test_caches_of_a_fusion_layer():
    layer = FusionLayer(make_self_layer(), make_cross_layer())
    assert not layer.caches_are_setup() and not layer.caches_are_enabled()
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=9)
    own, cross = layer.layer.attn.kv_cache, layer.fusion_layer.attn.kv_cache
    assert own.k_cache.shape[2] == 9 and cross.k_cache.shape[2] == S_E
    assert layer.caches_are_setup() and layer.caches_are_enabled()
    with torch.no_grad():
        layer(torch.randn(B, 3, D), encoder_input=torch.randn(B, 4, D), mask=torch.ones(1, 3, 9, dtype=torch.bool))
    assert (own.size, cross.size) == (3, 4)
    layer.reset_cache()
    assert (own.size, cross.size) == (0, 0) and not own.k_cache.any() and not cross.k_cache.any()
    layer.layer.attn.cache_enabled = False
    assert layer.caches_are_setup() and not layer.caches_are_enabled()


def test_ids_from_vocab_size_on_read_the_fusion_table():
    """Every id of a vocabulary of 5 and 3 fusion tokens, the edges 4 | 5 among them."""
    emb = FusionEmbedding(5, 3, 4)
    ids = torch.tensor([[0, 4, 5, 7], [6, 3, 2, 1]])
    tables = torch.cat([emb.embedding.weight, emb.fusion_embedding.weight])
    assert torch.equal(emb(ids), tables[ids])
    assert torch.equal(emb(ids)[0, 2], emb.fusion_embedding.weight[0])
    assert (emb.dim, emb.num_embeddings) == (4, 8) and not hasattr(emb, "weight")
    assert emb(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, 4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_of_the_fusion_embedding(dtype):
    """A row gets the sum over the tokens that read it, and a row that no token read exactly nothing, row 0 included."""
    emb = FusionEmbedding(5, 3, 4).to(dtype)
    ids = torch.tensor([[4, 5, 7, 5], [7, 3, 7, 2]])
    upstream = torch.randn(2, 4, 4).to(dtype)
    assert emb(ids).dtype == dtype
    emb(ids).backward(upstream)
    exact = torch.zeros(8, 4, dtype=torch.float64).index_add(0, ids.flatten(), upstream.double().flatten(0, 1))
    grad = torch.cat([emb.embedding.weight.grad, emb.fusion_embedding.weight.grad])
    eager = torch.zeros(8, 4, dtype=dtype).index_add(0, ids.flatten(), upstream.flatten(0, 1))
    assert_no_worse(grad, eager, exact)
    assert not grad[[0, 1, 6]].any() and grad[[2, 3, 4, 5, 7]].all()


def test_a_table_that_is_not_read_cannot_poison_the_result():
    emb = FusionEmbedding(5, 3, 4)
    with torch.no_grad():
        emb.fusion_embedding.weight.fill_(torch.nan)
        emb.embedding.weight[0] = torch.inf
    assert torch.equal(emb(torch.tensor([[1, 4]]))[0], emb.embedding.weight[[1, 4]])


def test_ids_that_are_in_neither_table():
    emb = FusionEmbedding(5, 3, 4)
    for bad in (8, -1):
        with pytest.raises(IndexError):
            emb(torch.tensor([[0, bad]]))
    with pytest.raises(ValueError):
        emb(torch.tensor([0, 1]))
    with pytest.raises(ValueError):
        emb(torch.zeros(1, 1, 1, dtype=torch.long))


def test_the_fusion_embedding_draws_the_main_table_first():
    torch.manual_seed(0)
    emb = FusionEmbedding(3, 2, 4)
    after = torch.rand(1)
    torch.manual_seed(0)
    main, fusion = nn.Embedding(3, 4), nn.Embedding(2, 4)
    assert torch.equal(emb.embedding.weight, main.weight) and torch.equal(emb.fusion_embedding.weight, fusion.weight)
    assert torch.equal(after, torch.rand(1))
    assert emb.fusion_embedding.weight[1].tolist() == pytest.approx(
        [-0.5663174986839294, 0.3731146454811096, -0.8919953107833862, -1.5091077089309692], rel=1e-6
    )


def test_keys_of_the_fusion_embedding():
    emb = FusionEmbedding(5, 3, 4)
    assert list(emb.state_dict()) == ["fusion_embedding.weight", "weight"]
    assert [n for n, _ in emb.named_parameters()] == ["embedding.weight", "fusion_embedding.weight"]
    assert emb.state_dict(prefix="a.")["a.weight"].data_ptr() == emb.embedding.weight.data_ptr()
    plain = nn.Embedding(5, 4)
    report = emb.load_state_dict(plain.state_dict(), strict=False)
    assert (report.missing_keys, report.unexpected_keys) == (["fusion_embedding.weight"], [])
    assert torch.equal(emb.embedding.weight, plain.weight)
    report = emb.load_state_dict({"fusion_embedding.weight": torch.ones(3, 4)}, strict=False)
    assert report.missing_keys == ["embedding.weight"] and report.unexpected_keys == []
    assert emb.fusion_embedding.weight.eq(1).all() and torch.equal(emb.embedding.weight, plain.weight)
    assert len(emb.load_state_dict({}, strict=False).missing_keys) == 2
    with pytest.raises(RuntimeError, match="Missing key"):
        emb.load_state_dict({"fusion_embedding.weight": torch.ones(3, 4)})


class Encoder(nn.Module):
    """images [b, s_e, 5] -> [b, s_e, D], through a backbone and a projection, the fusion part."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Linear(5, 8)
        self.projection = nn.Linear(8, D)
        register_fusion_module(self.projection)

    def forward(self, images, scale=1.0):
        return self.projection(torch.tanh(self.backbone(images))) * scale


def make_model(**kwargs) -> DeepFusionModel:
    return DeepFusionModel(make_decoder(), Encoder(), **kwargs)


def encode(m, images, scale=1.0):
    return reference.linear(m.projection, torch.tanh(reference.linear(m.backbone, images))) * scale


ENCODER = ["encoder.backbone.weight", "encoder.backbone.bias"]
ENCODER_FUSION = ["encoder.projection.weight", "encoder.projection.bias"]
ATTN = [f"attn.{p}_proj.weight" for p in ("q", "k", "v", "output")]
MLP = [f"mlp.w{i}.weight" for i in (1, 2, 3)]
CROSS = [*ATTN, "attn.q_norm.scale", "attn.k_norm.scale", *MLP, "ca_norm.scale", "mlp_norm.scale", "ca_scale.scale", "mlp_scale.scale"]
DECODER_FUSION = ["decoder.tok_embeddings.fusion_embedding.weight", *(f"decoder.layers.1.fusion_layer.{k}" for k in CROSS)]
DECODER = ["decoder.tok_embeddings.embedding.weight", "decoder.norm.scale", "decoder.output.weight"]
DECODER += [f"decoder.{layer}.{k}" for layer in ("layers.0", "layers.1.layer", "layers.2") for k in [*ATTN, *MLP, "sa_norm.scale", "mlp_norm.scale"]]


def test_fusion_parameters_by_name():
    model = make_model()
    params = get_fusion_params(model)
    assert sorted(params) == sorted(DECODER_FUSION + ENCODER_FUSION)
    named = dict(model.named_parameters())
    assert sorted(named) == sorted(DECODER_FUSION + ENCODER_FUSION + DECODER + ENCODER)
    assert all(params[n] is named[n] for n in params)
    assert not set(params) & set(model.decoder.state_dict())
    assert model.decoder.layers[1].fusion_params() == [f"fusion_layer.{n}" for n, _ in model.decoder.layers[1].fusion_layer.named_parameters()]
    assert model.decoder.tok_embeddings.fusion_params() == ["fusion_embedding.weight"]
    assert model.encoder.projection.fusion_params() == ["weight", "bias"]
    assert get_fusion_params(nn.Linear(2, 2)) == {}


def test_a_registered_root_module_and_a_wrong_name():
    linear = nn.Linear(2, 2)
    register_fusion_module(linear)
    assert sorted(get_fusion_params(linear)) == ["bias", "weight"]
    linear.fusion_params = lambda: ["foo"]
    for error in (InvalidArgument, AssertionError, ValueError):
        with pytest.raises(error, match=r"^Fusion params \['foo'\] not converted"):
            get_fusion_params(linear)


@pytest.mark.parametrize(("decoder", "encoder", "fusion"), list(itertools.product([False, True], repeat=3)))
def test_what_is_trainable(decoder, encoder, fusion):
    model = make_model(decoder_trainable=decoder, encoder_trainable=encoder, fusion_trainable=fusion)
    want = DECODER * decoder + ENCODER * encoder + (DECODER_FUSION + ENCODER_FUSION) * fusion
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(want)


def test_only_the_fusion_is_trained_by_default():
    model = make_model()
    model(torch.randint(0, VOCAB + FUSED, (B, S)), encoder_input={"images": torch.randn(B, S_E, 5)}).sum().backward()
    assert sorted(n for n, p in model.named_parameters() if p.grad is not None) == sorted(DECODER_FUSION + ENCODER_FUSION)
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(DECODER_FUSION + ENCODER_FUSION)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_whole_model_and_every_gradient(dtype):
    """Through the encoder's keyword arguments, its parameters and its images."""
    mask = torch.rand(B, S, S_E) < 0.6
    mask[:, 0] = False
    inputs = {"tokens": torch.randint(0, VOCAB + FUSED, (B, S)), "images": torch.randn(B, S_E, 5)}

    def run(m, tokens, images):
        return m(tokens, encoder_input={"images": images, "scale": 2.0}, encoder_mask=mask)

    def formula(m, tokens, images):
        return reference.decoder(m.decoder, tokens, None, encode(m.encoder, images, 2.0), mask)

    model = make_model(decoder_trainable=True, encoder_trainable=True)
    assert_matches(model, run, formula, inputs, dtype)


def test_without_an_encoder_input_the_encoder_does_not_run():
    model, tokens = make_model(), torch.randint(0, VOCAB, (B, S))
    model.encoder.forward = lambda **kwargs: pytest.fail("the encoder ran")
    mask, positions = torch.ones(B, S, S, dtype=torch.bool).tril(), torch.arange(S).flip(0)
    assert torch.equal(model(tokens), model.decoder(tokens))
    assert torch.equal(model(tokens, mask=mask, input_pos=positions), model.decoder(tokens, mask=mask, input_pos=positions))
    assert not torch.equal(model(tokens, mask=mask, input_pos=positions), model(tokens))


def test_any_two_modules_can_be_fused():
    """A decoder that only takes tokens by keyword."""

    class Echo(nn.Module):
        def forward(self, *, tokens, mask, encoder_input, encoder_mask, input_pos):
            return tokens, mask, encoder_input, encoder_mask, input_pos

    model = DeepFusionModel(Echo(), nn.Linear(3, 2))
    images = torch.randn(1, 3)
    tokens, mask, encoded, encoder_mask, positions = model(1, mask=2, encoder_input={"input": images}, encoder_mask=3, input_pos=4)
    assert (tokens, mask, encoder_mask, positions) == (1, 2, 3, 4) and torch.equal(encoded, model.encoder(images))
    assert not model.encoder.weight.requires_grad
    with pytest.raises(TypeError):
        model(1, None)


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_steps_equal_the_whole(dtype):
    """The images come with the prompt; later tokens repeat the last row of the encoder mask and bring no images."""
    model = make_model().to(dtype)
    tokens, images = torch.randint(0, VOCAB + FUSED, (B, S)), {"images": torch.randn(B, S_E, 5).to(dtype)}
    encoder_mask = torch.rand(B, S, S_E) < 0.6
    encoder_mask[0, :2] = False
    encoder_mask[:, 4:] = encoder_mask[:, 3:4]
    whole = model(tokens, encoder_input=images, encoder_mask=encoder_mask)
    double = copy.deepcopy(model).double()
    exact = reference.decoder(double.decoder, tokens, None, encode(double.encoder, images["images"].double()), encoder_mask)
    model.setup_caches(B, dtype, encoder_max_seq_len=S_E + 2, decoder_max_seq_len=10)
    rows = torch.ones(1, 10, 10, dtype=torch.bool).tril()
    wide = torch.cat([encoder_mask, torch.zeros(B, S, 2, dtype=torch.bool)], -1)
    for _ in range(2):
        out = model(tokens[:, :4], mask=rows[:, :4], encoder_input=images, encoder_mask=wide[:, :4], input_pos=torch.arange(4))
        assert_no_worse(out, whole[:, :4], exact[:, :4], "prompt")
        for i in range(4, S):
            out = model(tokens[:, i : i + 1], mask=rows[:, i : i + 1], encoder_mask=wide[:, 3:4], input_pos=torch.tensor([i]))
            assert_no_worse(out, whole[:, i : i + 1], exact[:, i : i + 1], f"token {i}")
        model.reset_caches()
    assert all(not m.kv_cache.k_cache.any() and m.kv_cache.size == 0 for m in model.modules() if getattr(m, "kv_cache", None) is not None)


@torch.no_grad()
def test_the_cache_helpers_take_the_model():
    model, tokens = make_model(), torch.randint(0, VOCAB, (B, S))
    images = {"images": torch.randn(B, S_E, 5)}
    whole = model(tokens, encoder_input=images)
    with local_kv_cache(model, batch_size=B, device="cpu", dtype=torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=9):
        assert model.caches_are_setup() and model.caches_are_enabled()
        assert (model.encoder_max_cache_seq_len, model.decoder_max_cache_seq_len, model.max_seq_len) == (S_E, 9, 64)
        with disable_kv_cache(model):
            assert not model.caches_are_enabled()
            assert torch.equal(model(tokens, encoder_input=images), whole)
        with pytest.raises(ValueError, match="causal masks must be provided"):
            model(tokens)
    assert not model.caches_are_setup()
    with pytest.raises(RuntimeError, match="Key value caches are not setup"):
        model.reset_caches()
    with pytest.raises(ValueError, match="You have tried to delete"):
        delete_kv_caches(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_output_chunks_and_hidden_states_are_the_decoders():
    model, tokens = make_model(), torch.randint(0, VOCAB, (B, S))
    logits = model(tokens)
    assert model.output is model.decoder.output and model.skip_output_layer is False
    model.set_num_output_chunks(3)
    chunks = model(tokens)
    assert [c.shape[1] for c in chunks] == [3, 2, 2]
    assert_rounding_apart(torch.cat(chunks, 1), logits, D)
    model.skip_output_layer = True
    assert model.decoder.skip_output_layer is True
    hidden = model(tokens)
    assert_rounding_apart(model.output(hidden), logits, D)


def test_the_loss_projects_for_the_model():
    model, tokens, labels = make_model(decoder_trainable=True), torch.randint(0, VOCAB, (B, S)), torch.randint(0, VOCAB, (B, S))
    labels[0, :3] = -100
    logits = model(tokens)
    want = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    want.backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    loss = LinearCrossEntropyLoss(num_output_chunks=4)
    loss.set_model_output(model)
    got = loss(model(tokens), labels)
    got.backward()
    assert_rounding_apart(got[None].detach(), want[None].detach(), D)
    for n, p in model.named_parameters():
        assert (p.grad is None) == (n not in grads)
        if p.grad is not None and grads[n].any():
            assert_rounding_apart(p.grad, grads[n], D * S, products=20)


def test_keys_of_the_model():
    model = make_model()
    want = [f"decoder.{k}" for k in model.decoder.state_dict()] + [f"encoder.{k}" for k in model.encoder.state_dict()]
    assert list(model.state_dict()) == want
    assert not any(".layer." in k or "embedding.weight" in k.replace("fusion_embedding", "") for k in want)
    encoder = OrderedDict((k.removeprefix("encoder."), torch.zeros_like(v)) for k, v in model.state_dict().items() if k.startswith("encoder."))
    assert str(model.encoder.load_state_dict(encoder)) == "<All keys matched successfully>"


def test_pickles_and_copies_own_their_fusion_parameters():
    model, tokens, images = make_model(), torch.randint(0, VOCAB + FUSED, (B, S)), {"images": torch.randn(B, S_E, 5)}
    out = model(tokens, encoder_input=images)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens, encoder_input=images), out)
        assert [n for n, p in twin.named_parameters() if p.requires_grad] == [n for n, p in model.named_parameters() if p.requires_grad]
        twin.encoder.projection.register_parameter("extra", nn.Parameter(torch.zeros(1)))
        assert set(get_fusion_params(twin)) - set(get_fusion_params(model)) == {"encoder.projection.extra"}
        del twin.encoder.projection.extra
        twin.load_state_dict({k: torch.zeros_like(v) for k, v in twin.state_dict().items()})
        assert not twin(tokens).any() and torch.equal(model(tokens, encoder_input=images), out)


def test_distributed_checkpointing_knows_the_keys():
    """torch.distributed.checkpoint walks modules by key, and the keys leave `layer.` and `embedding.` out."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

    model, other = make_decoder(), make_decoder()
    state = get_model_state_dict(model)
    assert state.keys() == model.state_dict().keys()
    assert any("fusion_layer" in k for k in state) and not any(".layer." in k for k in state)
    assert not all(torch.equal(a, b) for a, b in zip(state.values(), other.state_dict().values(), strict=True))
    set_model_state_dict(other, state)
    assert all(torch.equal(other.state_dict()[k], v) for k, v in state.items())


def test_images_come_as_the_encoders_keywords():
    model = DeepFusionModel(make_decoder(), Doubling(0.0))
    with pytest.raises(TypeError, match="encoder_input is a Tensor, expected a dict of the encoder's keyword arguments"):
        model(torch.zeros(1, 2, dtype=torch.int64), encoder_input=torch.zeros(1, 3, D))
