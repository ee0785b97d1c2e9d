"""What cross-attention of whole models makes of a mask: it is prepared once, nothing of its dense size is made, compiled steps share a graph."""

import copy
import pickle
from functools import partial

import pytest
import reference
import torch
import torch._dynamo.testing
from numerics import assert_no_worse, assert_rounding_apart
from reference import HEADS, D, make_decoder
from test_fusion_attention import (
    BF16,
    DENSE,
    FORMS,
    FP16,
    FP32,
    IMAGES,
    LAYERS,
    N_CROSS,
    PICTURES,
    RULES,
    S_E,
    TEXT,
    TILES,
    B,
    Ops,
    S,
    causal_rows,
    draw_text,
    form_of,
    images_of,
    in_turn,
    make_model,
    make_small_model,
    rows_of,
    rule,
    steps_of,
)
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from waiting import Allocated

import fastfuse
from fastfuse.generation import generate, generate_next_token
from fastfuse.modules import local_kv_cache
from fastfuse.ops import EncoderMask

ONCE = in_turn(["tensor", "bits", "tiles"] * 2, RULES, ["auto"], [False, True, True, False])


@pytest.mark.parametrize(("form", "empty_rows", "backend", "wrapped"), [*ONCE, ("tensor", "zero", "triton", False), ("bits", "uniform", "triton", True)])
def test_the_mask_is_prepared_once(form, empty_rows, backend, wrapped, monkeypatch):
    """However many layers there are, backward included; torch's checkpoint_wrapper around layers hides nothing."""
    packed, from_dense, model, (_, mask) = [], EncoderMask.from_dense, make_model(empty_rows), form_of(form)
    monkeypatch.setattr(EncoderMask, "from_dense", lambda *args, **kwargs: packed.append(args) or from_dense(*args, **kwargs))
    if wrapped:
        model.decoder.layers = nn.ModuleList(map(checkpoint_wrapper, model.decoder.layers))
    with fastfuse.backend(backend), Ops() as ops:
        out = model(TEXT, **PICTURES, encoder_mask=mask)
        out.sum().backward()
    assert len(packed) == ops["pack_mask"] == (form == "tensor") and ops["mask_blocks"] == (backend == "triton")
    assert ops["cross_attention"] == N_CROSS * (1 + wrapped) and ops["cross_attention_bwd"] == N_CROSS
    assert not any("scaled_dot_product" in n for n in ops.names if ops.names[n] > N_CROSS * (1 + wrapped)), "self-attention's alone"
    assert_rounding_apart(out, model(TEXT, **PICTURES, encoder_mask=form_of(form)[0]), D, products=40)


def test_nothing_is_packed_where_nothing_attends():
    decoder = make_decoder(*LAYERS)
    with Ops() as ops:
        decoder(TEXT, encoder_mask=DENSE)
        with local_kv_cache(decoder, batch_size=B, device="cpu", dtype=FP32, encoder_max_seq_len=S_E, decoder_max_seq_len=S):
            decoder(TEXT, mask=causal_rows(S), encoder_mask=DENSE, input_pos=torch.arange(S))
    assert ops["pack_mask"] == 0


@pytest.mark.parametrize(("how", "form"), [("checkpoint", "tensor"), ("wrapper", "bits"), ("reentrant", "tiles"), ("reentrant", "tensor")])
def test_activation_checkpointing(how, form):
    model, mask = make_model(), form_of(form)[1]
    run = partial(model, **PICTURES, encoder_mask=mask)
    out = run(TEXT)
    upstream = torch.randn(out.shape)
    out.backward(upstream)
    want = [p.grad for p in model.parameters()]
    model.zero_grad()
    if how == "wrapper":
        model.decoder.layers = nn.ModuleList(map(checkpoint_wrapper, model.decoder.layers))
        again = run(TEXT)
    else:
        again = checkpoint(lambda tokens, _: run(tokens), TEXT, torch.zeros(1, requires_grad=True), use_reentrant=how == "reentrant")
    assert torch.equal(again, out)
    again.backward(upstream)
    assert all(torch.equal(a.grad, b) for a, b in zip(model.parameters(), want, strict=True))


def test_nothing_is_left_on_the_model():
    model = make_model()

    def state():
        return list(model.state_dict()), len(pickle.dumps(model)), {n: set(vars(m)) for n, m in model.named_modules()}

    before = state()
    outs = [model(TEXT, **PICTURES, encoder_mask=make()) for _, make in FORMS.values()]
    assert state() == before
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with Ops() as ops:
            assert torch.equal(twin(TEXT, **PICTURES, encoder_mask=DENSE), outs[0])
        assert (ops["pack_mask"], ops["cross_attention"]) == (1, N_CROSS), "a copy is as plain as the original"


LONG, LONG_TILE = 48, 50
SIZES = pytest.mark.parametrize(
    ("kind", "empty_rows", "dtype"), [("interval", "zero", FP32), ("bits", "uniform", BF16), ("interval", "uniform", FP16), ("bits", "zero", FP32)]
)


def long_case(kind, empty_rows, dtype):
    """48 tokens, 2 images of 2 tiles of 50 tokens: a model, its tokens, their mask, of tiles, and images."""
    tokens = draw_text(2, LONG, (0, 5), (1, 0), (1, 20))
    visible = rule(tokens, TILES)
    if kind == "bits":  # the last text of the second row sees one tile of the first image and one of the second, not its neighbour
        visible[1, 30:] = torch.tensor([[True, False], [True, False]])
    mask = EncoderMask.from_tiles(visible, LONG_TILE)
    assert mask.kind == kind and torch.equal(mask.to_dense(), visible.repeat_interleave(LONG_TILE, 3).flatten(2))
    return make_model(empty_rows).to(dtype), tokens, mask, torch.randn(B, mask.shape[2], 5).to(dtype)


@SIZES
def test_nothing_of_the_dense_mask_s_size_is_made(kind, empty_rows, dtype):
    """Not for one row of the batch, not for one head, forward or backward."""
    model, tokens, mask, images = long_case(kind, empty_rows, dtype)
    s_e = mask.shape[2]
    assert B * s_e * D < LONG * s_e, "else the images would be taken for it"
    with Allocated() as mode:
        model(tokens, **images_of(images), encoder_mask=mask).sum().backward()
    assert any("flash_attention_for_cpu_backward" in f for _, f in mode.made), "ops were looked into"
    assert mode.of(LONG * s_e, LONG, s_e) == []
    with Allocated() as dense:
        model(tokens, **images_of(images), encoder_mask=torch.zeros(mask.shape, dtype=dtype)).sum().backward()
    assert dense.of(LONG * s_e, LONG, s_e), "the count finds the dense way out"


@torch.no_grad()
@SIZES
def test_a_cached_step_makes_a_few_rows(kind, empty_rows, dtype):
    """Less than the keys of one head of one row of the batch, which any copy of keys, or scores of all heads, would be."""
    model, tokens, mask, images = long_case(kind, empty_rows, dtype)
    s_e = mask.shape[2]
    with local_kv_cache(model, batch_size=B, device="cpu", dtype=dtype, encoder_max_seq_len=s_e, decoder_max_seq_len=LONG):
        (_, start, prompt), (_, _, step) = steps_of(mask, LONG, [LONG - 1, 1])
        model(tokens[:, :start], **images_of(images), **prompt)
        step["encoder_mask"] = mask.last_row()
        with Allocated() as mode:
            model(tokens[:, start:], **step)
    assert mode.of(B * s_e * HEADS) == [], "scores of all heads"
    assert mode.of(B * s_e + 1) == [], "more than a mask"


def compiled_of(module):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    return torch.compile(module, fullgraph=True, backend=counter), counter


@torch.no_grad()
@pytest.mark.parametrize(("empty_rows", "form"), [("zero", "tensor"), ("uniform", "bits")])
def test_compiled_steps_share_a_graph(empty_rows, form):
    model, mask = make_small_model(empty_rows), form_of(form)[1]
    model.setup_caches(B, FP32, encoder_max_seq_len=S_E, decoder_max_seq_len=16)
    compiled, counter = compiled_of(model)
    tokens, last, frames = torch.cat([TEXT, TEXT[:, :4]], 1), rows_of(mask, S - 1, S), []
    results = []
    for run in (model, compiled):
        results.append([run(TEXT, **PICTURES, encoder_mask=mask, mask=causal_rows(16, 0, S), input_pos=torch.arange(S))])
        for i in range(S, S + 4):
            frames.append(counter.frame_count)
            results[-1].append(run(tokens[:, i : i + 1], encoder_mask=last, mask=causal_rows(16, i, i + 1).clone(), input_pos=torch.tensor([i])))
        model.reset_caches()
    for want, got in zip(*results, strict=True):
        assert_rounding_apart(got, want, D, products=40)
    assert [*frames[4:], counter.frame_count] == [1, 2, 2, 2, 2], "one graph for the prompt, one for the four steps"


@pytest.mark.parametrize(("empty_rows", "form"), [("zero", "tensor of any rows"), ("uniform", "intervals")])
def test_compiled_forward_and_backward(empty_rows, form):
    """One graph, for a second mask too."""
    model, (dense, mask) = make_small_model(empty_rows), form_of(form)
    compiled, counter = compiled_of(model)
    exact = reference.model(copy.deepcopy(model).double(), TEXT, IMAGES.double(), dense)
    for given in (mask, copy.deepcopy(mask)):
        out, eager = (m(TEXT, **PICTURES, encoder_mask=given) for m in (compiled, model))
        assert_no_worse(out, eager, exact)
        upstream = torch.randn(out.shape)
        for got, want in zip(*(torch.autograd.grad(y, list(model.parameters()), upstream) for y in (out, eager)), strict=True):
            assert_rounding_apart(got, want, D * S, products=40)
    assert counter.frame_count == 1


GENERATION = {"max_generated_tokens": 4, "temperature": 0, "pad_id": -1}


@pytest.mark.parametrize(("empty_rows", "form", "backend"), [("zero", "tensor", "triton"), ("uniform", "tiles", "auto")])
def test_generation_prepares_the_mask_once_and_is_one_graph_when_compiled(empty_rows, form, backend):
    """Twice, that is: for the prompt, and for all steps after it, complete before the first one: none changes it, which would be a graph of its own."""
    model, mask = make_small_model(empty_rows).eval(), form_of(form)[1]
    given = GENERATION | PICTURES | {"encoder_mask": mask}
    want, _ = generate(model, TEXT, **given)
    step, counter = compiled_of(generate_next_token)
    with local_kv_cache(model, batch_size=B, device="cpu", dtype=FP32, encoder_max_seq_len=S_E + 2, decoder_max_seq_len=16), fastfuse.backend(backend):
        with Ops() as ops:
            assert torch.equal(generate(model, TEXT, **given)[0], want)
        for _ in range(2):
            assert torch.equal(generate(model, TEXT, compiled_generate_next_token=step, **given)[0], want)
    assert ops["cross_attention"] == 4 * 2 and counter.frame_count == 1
    assert ops["pack_mask"] == (2 if form == "tensor" else 0) and ops["mask_blocks"] == (2 if backend == "triton" else 0)
