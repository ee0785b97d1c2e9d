"""The decoder: logits, hidden states, chunks, masks, cached generation, what it refuses."""

import copy
import logging
import pickle
import warnings

import pytest
import reference
import torch
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from reference import DTYPES, FUSED, HEAD_DIM, HEADS, VOCAB, D, assert_matches, make_cross_layer, make_decoder, make_self_layer, shaken
from torch import nn

from fastfuse.errors import InvalidArgument
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
    disable_kv_cache,
    transformer,
)
from fastfuse.modules.model_fusion import FusionEmbedding, FusionLayer

B, S, S_E = 3, 9, 7


@pytest.fixture
def tokens():
    return torch.randint(0, VOCAB + FUSED, (B, S))


@pytest.fixture
def images():
    """Encoder tokens and a mask under which some tokens see nothing."""
    mask = torch.rand(B, S, S_E) < 0.5
    mask[:, :2] = False
    mask[1, 5] = False
    return torch.randn(B, S_E, D), mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_images", [False, True])
def test_logits_and_every_gradient(with_images, dtype, tokens, images):
    encoded, encoder_mask = images
    inputs = {"tokens": tokens, "encoded": encoded if with_images else None, "encoder_mask": encoder_mask if with_images else None}
    assert_matches(
        make_decoder(),
        lambda m, tokens, encoded, encoder_mask: m(tokens, encoder_input=encoded, encoder_mask=encoder_mask),
        lambda m, tokens, encoded, encoder_mask: reference.decoder(m, tokens, None, encoded, encoder_mask),
        inputs,
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed_samples(dtype, tokens):
    """Two samples in a row, positions that start again, a mask of two blocks: the second comes out as it does alone."""
    model = make_decoder().to(dtype)
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 2, 3, 4]).expand(B, S)
    mask = torch.block_diag(torch.ones(4, 4), torch.ones(5, 5)).tril().bool().expand(B, S, S)
    out = model(tokens, mask=mask, input_pos=positions)
    exact = torch.cat([reference.decoder(copy.deepcopy(model).double(), part) for part in (tokens[:, :4], tokens[:, 4:])], 1)
    assert_no_worse(out, torch.cat([model(tokens[:, :4]), model(tokens[:, 4:])], 1), exact)


def test_logits_are_fp32_whatever_the_model_is(tokens):
    for dtype, want in ((torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)):
        model = make_decoder().to(dtype)
        logits = model(tokens)
        assert logits.dtype == want
        model.skip_output_layer = True
        hidden = model(tokens)
        assert hidden.dtype == dtype
        assert torch.equal(logits, model.output(hidden).to(want))


def test_hidden_states_are_the_inputs_of_layers(tokens, images):
    encoded, encoder_mask = images
    plain = make_decoder()
    states = reference.decoder_states(copy.deepcopy(plain).double(), tokens, None, encoded.double(), encoder_mask)
    eager = reference.decoder_states(plain, tokens, None, encoded, encoder_mask)
    logits = plain(tokens, encoder_input=encoded, encoder_mask=encoder_mask)
    for indices in ([0], [1, 2], [0, 3], [3], [0, 1, 2, 3]):
        model = make_decoder(output_hidden_states=indices)
        model.load_state_dict(plain.state_dict())
        *hidden, out = model(tokens, encoder_input=encoded, encoder_mask=encoder_mask)
        assert torch.equal(out, logits)
        assert len(hidden) == len(indices)
        for i, h in zip(indices, hidden, strict=True):
            assert_no_worse(h, eager[i], states[i], f"hidden state {i} of {indices}")
    assert model.output_hidden_states == [0, 1, 2, 3] and plain.output_hidden_states == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(("length", "sizes"), [(49, [7, 6, 6, 6, 6, 6, 6, 6]), (7, [1] * 7 + [0])])
def test_chunked_output(length, sizes):
    model, tokens = make_decoder().bfloat16(), torch.randint(0, VOCAB, (B, length))
    logits = model(tokens)
    model.set_num_output_chunks(8)
    chunks = model(tokens)
    assert model.num_output_chunks == 8 and isinstance(chunks, list)
    assert [c.shape[1] for c in chunks] == sizes
    assert {c.dtype for c in chunks} == {torch.bfloat16}
    assert_rounding_apart(torch.cat(chunks, 1), logits.bfloat16(), D)
    normed = torch.randn(B, length, D).bfloat16()
    for got, part in zip(model.chunked_output(normed), normed.split(sizes, 1), strict=True):
        assert torch.equal(got, model.output(part))
    model.skip_output_layer = True
    assert torch.equal(model.output(model(tokens)).float(), logits)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_hidden_states_beside_chunks(tokens):
    model = make_decoder(output_hidden_states=[2])
    hidden, logits = model(tokens)
    model.set_num_output_chunks(2)
    again, chunks = model(tokens)
    assert torch.equal(again, hidden) and isinstance(chunks, list)
    assert_rounding_apart(torch.cat(chunks, 1), logits, D)


def test_chunking_warns_once(monkeypatch):
    monkeypatch.setattr(transformer, "_warned", set())
    model = make_decoder()
    with pytest.warns(FutureWarning, match="set_num_output_chunks is deprecated"):
        model.set_num_output_chunks(2)
    with pytest.warns(FutureWarning, match="chunked_output is deprecated"):
        model.chunked_output(torch.randn(1, 4, D))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.set_num_output_chunks(2)
        model.chunked_output(torch.randn(1, 4, D))
        model(torch.zeros(1, 4, dtype=torch.long))


def test_embeddings_in_place_of_tokens(tokens):
    model = make_decoder()
    embeds = reference.embed(model.tok_embeddings, tokens)
    assert torch.equal(model(None, input_embeds=embeds), model(tokens))
    assert torch.equal(model(tokens[:1, :1], input_embeds=embeds), model(tokens))
    embeds = torch.randn(B, S, D, requires_grad=True)
    upstream = torch.randn(B, S, VOCAB)
    model(None, input_embeds=embeds).backward(upstream)
    with torch.enable_grad():
        double = copy.deepcopy(model).double()
        x = embeds.detach().double().requires_grad_()
        h = x
        for layer in double.layers:
            h = reference.self_layer(layer.layer if isinstance(layer, FusionLayer) else layer, h)
        (reference.rms(h, double.norm.scale, 1e-5) @ double.output.weight.T).backward(upstream.double())
    assert_rounding_apart(embeds.grad, x.grad.float(), D, products=3 * 10)


def test_the_norm_and_the_projection_alone(tokens):
    model, h = make_decoder(), torch.randn(B, S, D)
    want = nn.functional.linear(reference.rms(h.double(), model.norm.scale.double(), 1e-5), model.output.weight.double())
    assert_no_worse(model.unembed(h), nn.functional.linear(reference.rms(h, model.norm.scale, 1e-5), model.output.weight), want)


def test_a_tied_output():
    model = make_decoder()
    embedding = nn.Embedding(VOCAB, D)
    model.tok_embeddings, model.output = embedding, None
    del model.output
    model.output = TiedLinear(embedding)
    tokens = torch.randint(0, VOCAB, (B, S))
    model.skip_output_layer = True
    hidden = model(tokens)
    model.skip_output_layer = False
    assert torch.equal(model(tokens), hidden @ embedding.weight.T)
    assert not any(key.startswith("output") for key in model.state_dict())


def test_a_layer_is_copied_num_layers_times():
    layer = make_self_layer()
    state = torch.get_rng_state()
    model = TransformerDecoder(
        tok_embeddings=nn.Identity(), layers=layer, num_layers=3, max_seq_len=16, num_heads=HEADS, head_dim=HEAD_DIM, norm=nn.Identity(), output=nn.Identity()
    )
    assert torch.equal(torch.get_rng_state(), state), "copies draw nothing"
    assert len(model.layers) == 3 and isinstance(model.layers, nn.ModuleList)
    x = torch.randn(B, S, D)
    assert torch.equal(model(None, input_embeds=x), layer(layer(layer(x))))
    with torch.no_grad():
        model.layers[1].attn.q_proj.weight.zero_()
    assert model.layers[0].attn.q_proj.weight.any() and model.layers[2].attn.q_proj.weight.any() and layer.attn.q_proj.weight.any()
    assert len({p.data_ptr() for p in model.parameters()}) == 3 * len(list(layer.parameters()))


def test_lists_and_module_lists_are_kept():
    layers = [make_self_layer(), make_self_layer()]
    kwargs = {"tok_embeddings": nn.Identity(), "max_seq_len": 16, "num_heads": HEADS, "head_dim": HEAD_DIM, "norm": nn.Identity(), "output": nn.Identity()}
    module_list = nn.ModuleList(layers)
    assert TransformerDecoder(layers=module_list, **kwargs).layers is module_list
    model = TransformerDecoder(layers=layers, **kwargs)
    assert isinstance(model.layers, nn.ModuleList) and all(a is b for a, b in zip(model.layers, layers, strict=True))
    assert (model.max_seq_len, model.num_heads, model.head_dim) == (16, HEADS, HEAD_DIM)
    assert (model.causal_mask, model.num_output_chunks, model.skip_output_layer) == (None, 0, False)
    assert model.encoder_max_cache_seq_len is None and model.decoder_max_cache_seq_len is None
    for layers, num_layers, message in (
        (3, 2, "num_layers is defined, layers must be a module"),
        (make_self_layer(), None, "num_layers is not defined, layers must be a list"),
    ):
        for error in (InvalidArgument, AssertionError, ValueError):
            with pytest.raises(error, match=f"^{message}"):
                TransformerDecoder(layers=layers, num_layers=num_layers, **kwargs)


NO_MASK = r"^KV-caches for self-attention layers are setup for inference mode, causal masks must be provided! Use the `mask` arg to provide a causal mask\.$"
NO_ENCODER_MASK = (
    "^KV-caches for cross-attention/fusion layers are setup for inference mode and you seem to be using encoder_input, causal masks must be provided! "
    r"Use the `encoder_mask` arg to provide a causal mask\.$"
)
NO_POSITIONS = "^KV-caches are setup for inference mode, input positions must be provided!"


def test_what_is_missing_is_said_in_this_order(tokens, images):
    encoded, encoder_mask = images
    model = make_decoder()
    with pytest.raises(ValueError, match=r"^seq_len \(65\) of input tensor should be smaller than max_seq_len \(64\)$"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match=r"^seq_len \(65\) of input"):
        model(None, input_embeds=torch.zeros(1, 65, D))
    with pytest.raises(ValueError, match=r"^Either tokens or input_embeds must be provided to the decoder\.$"):
        model(None)
    assert model(torch.zeros(1, 64, dtype=torch.long)).shape[1] == 64
    model.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=S)
    mask = torch.ones(1, S, S, dtype=torch.bool).tril()
    with pytest.raises(ValueError, match=r"^seq_len \(65\)"):
        model(torch.zeros(1, 65, dtype=torch.long))
    with pytest.raises(ValueError, match=NO_MASK):
        model(tokens, encoder_input=encoded)
    with pytest.raises(ValueError, match=NO_ENCODER_MASK):
        model(tokens, mask=mask, encoder_input=encoded)
    with pytest.raises(ValueError, match=NO_POSITIONS):
        model(tokens, mask=mask, encoder_input=encoded, encoder_mask=encoder_mask)
    with disable_kv_cache(model):
        model(tokens, encoder_input=encoded)


def test_positions_of_another_batch(tokens):
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        make_decoder()(tokens, input_pos=torch.arange(S).expand(B + 1, S))


def decode(model, tokens, encoded, encoder_mask, prompt, width, form):
    """Prefill of `prompt` tokens, then one by one; positions [s], [b, s], or [b] for one token."""
    rows = torch.ones(width, width, dtype=torch.bool).tril()
    for start, stop in ((0, prompt), *((i, i + 1) for i in range(prompt, tokens.shape[1]))):
        positions = torch.arange(start, stop)
        if form == "per sample":
            positions = positions.expand(B, -1) if start == 0 else positions.expand(B)
        out = model(
            tokens[:, start:stop],
            mask=rows[None, start:stop],
            encoder_input=encoded if start == 0 else None,
            encoder_mask=None if encoder_mask is None else encoder_mask[:, start:stop],
            input_pos=positions,
        )
        yield start, stop, out


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("form", ["shared", "per sample"])
@pytest.mark.parametrize("with_images", [False, True])
def test_cached_steps_equal_the_whole(with_images, form, dtype, tokens, images):
    encoded, encoder_mask = images
    encoded, encoder_mask = (encoded.to(dtype), encoder_mask) if with_images else (None, None)
    model = make_decoder().to(dtype)
    whole = in_several_orders(model, tokens, encoder_input=encoded, encoder_mask=encoder_mask)
    exact = reference.decoder(copy.deepcopy(model).double(), tokens, None, encoded.double() if with_images else None, encoder_mask)
    model.setup_caches(B, dtype, encoder_max_seq_len=S_E, decoder_max_seq_len=12)
    for _ in range(2):
        for start, stop, out in decode(model, tokens, encoded, encoder_mask, 4, 12, form):
            assert_no_worse(out, [w[:, start:stop] for w in whole], exact[:, start:stop], f"tokens {start}..{stop - 1}")
        model.reset_caches()
    with disable_kv_cache(model):
        assert torch.equal(model(tokens, encoder_input=encoded, encoder_mask=encoder_mask), whole[0])


@torch.no_grad()
def test_samples_at_positions_of_their_own(tokens):
    """Left padding: the second sample starts two tokens late, which mask and positions say."""
    model = make_decoder()
    alone = model(tokens[1:2, 2:])
    exact = reference.decoder(copy.deepcopy(model).double(), tokens[1:2, 2:])
    model.setup_caches(B, torch.float32, decoder_max_seq_len=S)
    mask = torch.ones(S, S, dtype=torch.bool).tril().repeat(B, 1, 1)
    mask[1, :, :2] = False
    mask[1, [0, 1], [0, 1]] = True
    positions = torch.arange(S).repeat(B, 1)
    positions[1] = (positions[1] - 2).clamp(min=0)
    first = model(tokens[:, :5], mask=mask[:, :5], input_pos=positions[:, :5])
    assert_no_worse(first[1:2, 2:], alone[:, :3], exact[:, :3])
    for i in range(5, S):
        out = model(tokens[:, i : i + 1], mask=mask[:, i : i + 1], input_pos=positions[:, i])
        assert_no_worse(out[1:2], alone[:, i - 2 : i - 1], exact[:, i - 2 : i - 1], f"token {i}")


def cache_lengths(model):
    return {n: m.kv_cache.k_cache.shape[2] for n, m in model.named_modules() if isinstance(m, MultiHeadAttention)}


def test_lengths_of_the_caches(caplog):
    names = ["layers.0.attn", "layers.1.layer.attn", "layers.1.fusion_layer.attn", "layers.2.attn"]
    for kwargs, encoder, own in (
        ({"encoder_max_seq_len": 5, "decoder_max_seq_len": 9}, 5, 9),
        ({"decoder_max_seq_len": 9}, 64, 9),
        ({"encoder_max_seq_len": 5}, 5, 64),
        ({}, 64, 64),
    ):
        model = make_decoder()
        assert not model.caches_are_setup() and not model.caches_are_enabled()
        model.setup_caches(B, torch.bfloat16, **kwargs)
        assert cache_lengths(model) == dict(zip(names, (own, own, encoder, own), strict=True))
        assert (model.encoder_max_cache_seq_len, model.decoder_max_cache_seq_len) == (encoder, own)
        assert model.caches_are_setup() and model.caches_are_enabled()
    with caplog.at_level(logging.WARNING):
        model.setup_caches(B, torch.bfloat16)
    assert len(caplog.records) == 1
    assert not any("cache" in key for key in model.state_dict())


def test_a_decoder_of_one_kind_of_layers_has_one_length():
    kwargs = {"tok_embeddings": nn.Identity(), "max_seq_len": 16, "num_heads": HEADS, "head_dim": HEAD_DIM, "norm": nn.Identity(), "output": nn.Identity()}
    own = TransformerDecoder(layers=[make_self_layer()], **kwargs)
    own.setup_caches(B, torch.float32, encoder_max_seq_len=3)
    assert (own.encoder_max_cache_seq_len, own.decoder_max_cache_seq_len) == (None, 16)
    cross = TransformerDecoder(layers=[make_cross_layer()], **kwargs)
    cross.setup_caches(B, torch.float32, encoder_max_seq_len=3)
    assert (cross.encoder_max_cache_seq_len, cross.decoder_max_cache_seq_len) == (3, None)


def test_resetting_without_caches_is_an_error():
    model = make_decoder()
    message = r"^Key value caches are not setup\. Call model\.setup_caches first\.$"
    with pytest.raises(RuntimeError, match=message):
        model.reset_caches()
    model.setup_caches(B, torch.float32, decoder_max_seq_len=4)
    with disable_kv_cache(model), pytest.raises(RuntimeError, match=message):
        model.reset_caches()


@pytest.mark.filterwarnings("ignore")
def test_compiled_without_a_graph_break(tokens, images):
    encoded, encoder_mask = images
    model = make_decoder()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    args = {"encoder_input": encoded, "encoder_mask": encoder_mask}
    exact = reference.decoder(copy.deepcopy(model).double(), tokens, None, encoded.double(), encoder_mask)
    out, eager = compiled(tokens, **args), model(tokens, **args)
    assert_no_worse(out, eager, exact)
    upstream = torch.randn(out.shape)
    wanted = [p for p in model.parameters() if p.requires_grad]
    for got, want in zip(torch.autograd.grad(out, wanted, upstream), torch.autograd.grad(eager, wanted, upstream), strict=True):
        assert_rounding_apart(got, want, D * S, products=10)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")
def test_compiled_cached_steps_share_a_graph(tokens, images):
    encoded, encoder_mask = images
    model = make_decoder()
    whole = model(tokens, encoder_input=encoded, encoder_mask=encoder_mask)
    exact = reference.decoder(copy.deepcopy(model).double(), tokens, None, encoded.double(), encoder_mask)
    model.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=S)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    frames = []
    for start, stop, out in decode(compiled, tokens, encoded, encoder_mask, 4, S, "shared"):
        assert_no_worse(out, whole[:, start:stop], exact[:, start:stop], f"tokens {start}..{stop - 1}")
        frames.append(counter.frame_count)
    assert frames == [1] + [2] * (S - 4), "one graph for the prompt, one for all tokens after it"


def test_pickles_and_copies_are_equal_and_apart(tokens, images):
    encoded, encoder_mask = images
    model = make_decoder()
    out = model(tokens, encoder_input=encoded, encoder_mask=encoder_mask)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert list(twin.state_dict()) == list(model.state_dict())
        assert torch.equal(twin(tokens, encoder_input=encoded, encoder_mask=encoder_mask), out)
        twin.load_state_dict({k: torch.zeros_like(v) for k, v in model.state_dict().items()})
        assert not twin(tokens).any()
    assert torch.equal(model(tokens, encoder_input=encoded, encoder_mask=encoder_mask), out)


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


def test_state_dict_keys_in_order():
    own = [f"attn.{p}_proj.weight" for p in ("q", "k", "v", "output")]
    mlp = [f"mlp.w{i}.weight" for i in (1, 2, 3)]
    fusion = [*own, "attn.q_norm.scale", "attn.k_norm.scale", *mlp, "ca_norm.scale", "mlp_norm.scale", "ca_scale.scale", "mlp_scale.scale"]
    own = [*own, *mlp, "sa_norm.scale", "mlp_norm.scale"]
    keys = ["tok_embeddings.fusion_embedding.weight", "tok_embeddings.weight"]
    keys += [f"layers.0.fusion_layer.{k}" for k in fusion] + [f"layers.{i}.{k}" for i in range(2) for k in own]
    assert list(torchtune_model().state_dict()) == [*keys, "norm.scale", "output.weight"]


def test_a_token_attends_to_itself_and_to_what_came_before(tokens):
    model = make_decoder()
    changed = tokens.clone()
    changed[:, 5] = (changed[:, 5] + 1) % VOCAB
    same = torch.isclose(model(tokens), model(changed), rtol=0, atol=0).all(-1)
    assert same[:, :5].all() and not same[:, 5:].any()


def test_shaken_models_differ_from_fresh_ones():
    """The helpers of these tests leave no norm at one and no gate closed."""
    scales = [p for n, p in shaken(make_decoder()).named_parameters() if n.endswith("scale")]
    assert len(scales) == 13 and all(((p != 1) & (p != 0)).all() for p in scales)


def test_rows_that_would_broadcast_are_refused(tokens, images):
    """One row of text and three of images would give three rows of logits."""
    encoded, mask = images
    decoder = make_decoder()
    for wrong, message in (
        ({"encoder_input": encoded[:1], "encoder_mask": mask}, r"encoder_input has 1 rows, the batch has 3"),
        ({"encoder_input": encoded, "encoder_mask": mask[:2]}, r"encoder_mask has shape \(2, 9, 7\), expected \(3 or 1, 9, keys\)"),
        ({"encoder_input": encoded, "encoder_mask": mask[:, :1]}, r"encoder_mask has shape \(3, 1, 7\), expected \(3 or 1, 9, keys\)"),
        ({"mask": torch.ones(1, 1, S, dtype=torch.bool)}, r"mask has shape \(1, 1, 9\), expected \(3 or 1, 9, keys\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(tokens, **wrong)
    with pytest.raises(ValueError, match=r"encoder_input has 3 rows, the batch has 1"):
        decoder(tokens[:1], encoder_input=encoded, encoder_mask=mask[:1])
    with pytest.raises(ValueError, match=r"tokens has shape \(9,\), expected \(b, s\)"):
        decoder(tokens[0])


def test_a_second_setup_keeps_the_sizes_with_the_caches(caplog):
    decoder = make_decoder()
    decoder.setup_caches(2, torch.float32, encoder_max_seq_len=12, decoder_max_seq_len=10)
    decoder.setup_caches(2, torch.float32, encoder_max_seq_len=40, decoder_max_seq_len=30)
    assert (decoder.encoder_max_cache_seq_len, decoder.decoder_max_cache_seq_len) == (12, 10)
    assert "already setup" in caplog.text
