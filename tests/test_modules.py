"""Every module of the decoder's side against its plain formula, its keys, its copies, and what it refuses: a row of a table each."""

import copy
import pickle
from collections.abc import Callable
from typing import NamedTuple

import dense_vision
import pytest
import reference
import torch
from reference import (
    DTYPES,
    FUSED,
    HEAD_DIM,
    HEADS,
    VOCAB,
    D,
    assert_matches,
    make_attention,
    make_cross_layer,
    make_decoder,
    make_mlp,
    make_model,
    make_self_layer,
)
from test_fusion_attention import infinite
from test_loss import Model, labels, linear_loss, mean_of_negative_logs
from torch import Tensor, nn

from fastfuse.errors import InvalidArgument
from fastfuse.modules import (
    Fp32LayerNorm,
    Llama3ScaledRoPE,
    MultiHeadAttention,
    RMSNorm,
    RotaryPositionalEmbeddings,
    TanhGate,
    TiedLinear,
    TransformerCrossAttentionLayer,
    TransformerDecoder,
    create_block_causal_mask,
)
from fastfuse.modules.loss import CEWithChunkedOutputLoss, LinearCrossEntropyLoss
from fastfuse.modules.model_fusion import FusionEmbedding, FusionLayer

pytestmark = pytest.mark.filterwarnings("ignore:CEWithChunkedOutputLoss is deprecated")
B, S, S_E = 2, 7, 6


class Case(NamedTuple):
    """make() gives the module, shapes its inputs, and run(module, *inputs) has to be formula(module, *inputs)."""

    make: Callable[[], nn.Module]
    formula: Callable[..., Tensor]
    shapes: tuple = ((B, S, D),)
    run: Callable[..., Tensor] = lambda m, *inputs: m(*inputs)


def drawn(draw, *shape, seed=1):
    return draw(shape, generator=torch.Generator().manual_seed(seed))


SELF, CROSS = drawn(torch.rand, B, S, S) < 0.6, drawn(torch.rand, B, S, S_E) < 0.5
CROSS[..., 3] = True
EMPTY = CROSS.index_fill(1, torch.tensor([2]), False)
POSITIONS, TOKENS = (drawn(torch.rand, B, S) * 60).long(), (drawn(torch.rand, B, S) * (VOCAB + FUSED)).long()
LABELS, BOTH = labels(), ((B, S, D), (B, S_E, D))


def rope():
    return RotaryPositionalEmbeddings(HEAD_DIM, max_seq_len=32)


def cast(mask, x):
    """SDPA takes a float mask of the query's dtype, and gives it no gradient here."""
    return mask.to(x.dtype) if mask is not None and mask.is_floating_point() else mask


def attention(mask):
    """Over another sequence."""
    return Case(
        lambda: make_attention(cross=True), lambda m, x, y: reference.attention(m, x, y, cast(mask, x)), BOTH, lambda m, x, y: m(x, y, mask=cast(mask, x))
    )


def self_attention(kv_heads, mask=None):
    """Causal without a mask; with one, the mask alone decides."""
    return Case(
        lambda: make_attention(rope=rope(), norms=True, num_kv_heads=kv_heads),
        lambda m, x: reference.attention(m, x, x, mask), run=lambda m, x: m(x, x, mask=mask),
    )  # fmt: skip


def self_layer(mask, positions=None):
    return Case(make_self_layer, lambda m, x: reference.self_layer(m, x, mask, positions), run=lambda m, x: m(x, mask=mask, input_pos=positions))


def cross_layer(mask):
    """By the rule of zero; by the other, and with an EncoderMask: test_fusion_attention.py."""
    return Case(
        make_cross_layer, lambda m, x, y: reference.cross_layer(m, x, y, cast(mask, x)), BOTH, lambda m, x, y: m(x, encoder_input=y, encoder_mask=cast(mask, x))
    )


def fusion_layer(first):
    return Case(
        lambda: FusionLayer(make_self_layer(), make_cross_layer(), fusion_first=first), lambda m, x, y: reference.fusion_layer(m, x, y, EMPTY), BOTH,
        lambda m, x, y: m(x, encoder_input=y, encoder_mask=EMPTY),
    )  # fmt: skip


def loss(chunks, drop):
    return Case(
        Model, lambda m, h: mean_of_negative_logs(reference.linear(m.output, h), LABELS)[None], ((*LABELS.shape, D),),
        lambda m, h: linear_loss(m, num_output_chunks=chunks, mask_ignored_tokens=drop)(h, LABELS)[None],
    )  # fmt: skip


def chunked_loss(chunks):
    return Case(
        nn.Identity, lambda m, logits: mean_of_negative_logs(logits, LABELS)[None], ((*LABELS.shape, 9),),
        lambda m, logits: CEWithChunkedOutputLoss(chunks)(list(logits.tensor_split(chunks, 1)), LABELS)[None],
    )  # fmt: skip


def layer_norm(m, x):
    return dense_vision.layer_norm(x, m.weight, m.bias, m.eps)


CASES = {
    "gate": Case(TanhGate, lambda m, x: x * torch.tanh(m.scale)),
    "rms norm": Case(lambda: RMSNorm(D, eps=1e-5), lambda m, x: reference.rms(x, m.scale, 1e-5)),
    "layer norm": Case(lambda: Fp32LayerNorm(D, eps=1e-3), layer_norm),
    "layer norm without bias": Case(lambda: Fp32LayerNorm(D, bias=False), layer_norm),
    "layer norm of nothing": Case(lambda: Fp32LayerNorm(D, elementwise_affine=False), layer_norm),
    "mlp": Case(make_mlp, reference.mlp),
    "rotation": Case(
        lambda: RotaryPositionalEmbeddings(8, max_seq_len=16, base=100),
        lambda m, x: reference.rotate(x, torch.arange(S)[None], reference.plain_thetas(8, 100)), ((B, S, 3, 8),),
    ),
    "fusion embedding": Case(lambda: FusionEmbedding(VOCAB, FUSED, D), lambda m: reference.embed(m, TOKENS), (), lambda m: m(TOKENS)),
    "attention": attention(None),
    "attention, bool": attention(CROSS),
    "attention, one for the batch": attention(CROSS[:1]),
    "attention, an empty row": attention(EMPTY),
    "attention, float": attention(drawn(torch.randn, B, S, S_E)),
    "attention, float zeros and ones": attention(torch.ones(B, S, S_E).tril()),
    "attention, minus infinity": attention(infinite(CROSS)),
    "attention, minus infinity, an empty row": attention(infinite(EMPTY)),
    "self-attention of one key head": self_attention(1),
    "self-attention, masked": self_attention(2, SELF),
    "self-attention of as many key heads": self_attention(4),
    "heads wider than their share": Case(
        lambda: MultiHeadAttention(
            embed_dim=D, num_heads=2, num_kv_heads=1, head_dim=6, q_proj=nn.Linear(D, 12), k_proj=nn.Linear(D, 6, bias=False),
            v_proj=nn.Linear(D, 6), output_proj=nn.Linear(12, D),
        ),
        lambda m, x: reference.attention(m, x, x), run=lambda m, x: m(x, x),
    ),
    "self-attention layer": self_layer(None),
    "self-attention layer, masked": self_layer(SELF, POSITIONS),
    "self-attention layer, gated": Case(lambda: make_self_layer(sa_scale=TanhGate(), mlp_scale=TanhGate()), reference.self_layer),
    "cross-attention layer": cross_layer(None),
    "cross-attention layer, float": cross_layer(drawn(torch.randn, B, S, S_E)),
    "cross-attention layer, minus infinity": cross_layer(infinite(EMPTY)),
    "fusion layer": fusion_layer(True),
    "fusion layer, last": fusion_layer(False),
    "decoder of text": Case(make_decoder, lambda m: reference.decoder(m, TOKENS), (), lambda m: m(TOKENS)),
    "decoder": Case(
        make_decoder, lambda m, y: reference.decoder(m, TOKENS, None, y, EMPTY), ((B, S_E, D),),
        lambda m, y: m(TOKENS, encoder_input=y, encoder_mask=EMPTY),
    ),
    "model": Case(
        lambda: make_model(decoder_trainable=True, encoder_trainable=True), lambda m, images: reference.model(m, TOKENS, images, EMPTY, 2.0), ((B, S_E, 5),),
        lambda m, images: m(TOKENS, encoder_input={"images": images, "scale": 2.0}, encoder_mask=EMPTY),
    ),
    **{f"loss of {chunks} chunks": loss(chunks, drop) for chunks, drop in ((1, True), (4, False), (50, False), (50, True))},
    **{f"loss of logits in {chunks} chunks": chunked_loss(chunks) for chunks in (1, 4, 50)},
}  # fmt: skip


def inputs(case):
    return [torch.randn(shape) for shape in case.shapes]


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *(pytest.param(name, DTYPES[0], marks=pytest.mark.quick) for name in CASES),
        *((name, DTYPES[1 + i % 2]) for i, name in enumerate(CASES) if "fusion layer" not in name and "decoder" not in name and name != "model"),
    ],
)
def test_value_and_every_gradient(case, dtype):
    """In fp32 and, by turns, in bf16 or fp16; models of several layers in those: test_fusion_attention.py."""
    case = CASES[case]
    names = [f"input {i}" for i in range(len(case.shapes))]
    run, formula = ((lambda m, f=f, **given: f(m, *given.values())) for f in (case.run, case.formula))
    assert_matches(reference.shaken(case.make()), run, formula, dict(zip(names, inputs(case), strict=True)), dtype)


ATTN, MLP = "attn.q_proj.weight attn.k_proj.weight attn.v_proj.weight attn.output_proj.weight", "mlp.w1.weight mlp.w2.weight mlp.w3.weight"
OWN = f"{ATTN} {MLP} sa_norm.scale mlp_norm.scale"
CROSS_KEYS = f"{ATTN} attn.q_norm.scale attn.k_norm.scale {MLP} ca_norm.scale mlp_norm.scale ca_scale.scale mlp_scale.scale"


def behind(prefix, keys):
    return [prefix + key for key in keys.split()]


DECODER_KEYS = behind("tok_embeddings.", "fusion_embedding.weight weight") + behind("layers.0.", OWN) + behind("layers.1.fusion_layer.", CROSS_KEYS)
DECODER_KEYS += behind("layers.1.", OWN) + behind("layers.2.", OWN) + ["norm.scale", "output.weight"]
KEYS = {
    "gate": ["scale"],
    "rms norm": ["scale"],
    "layer norm": ["weight", "bias"],
    "layer norm without bias": ["weight"],
    "mlp": behind("w", "1.weight 2.weight 3.weight"),
    "rotation": [],
    "fusion embedding": ["fusion_embedding.weight", "weight"],
    "attention": [key.removeprefix("attn.") for key in CROSS_KEYS.split()[:6]],
    "self-attention layer": OWN.split(),
    "cross-attention layer": CROSS_KEYS.split(),
    "fusion layer": behind("fusion_layer.", CROSS_KEYS) + OWN.split(),
    "decoder": DECODER_KEYS,
    "model": [f"decoder.{key}" for key in DECODER_KEYS] + behind("encoder.", "backbone.weight backbone.bias projection.weight projection.bias"),
}


@torch.no_grad()
@pytest.mark.parametrize("case", KEYS)
def test_copies_and_loaded_modules_are_equal_and_apart(case):
    case = CASES[case]
    given, module = inputs(case), reference.shaken(case.make())
    want = case.run(module, *given)
    with torch.device("meta"):
        empty = case.make()
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), reference.shaken(case.make()), empty.to_empty(device="cpu")):
        twin.load_state_dict(copy.deepcopy(module.state_dict()), assign=twin is empty)
        assert list(twin.state_dict()) == list(module.state_dict()) and torch.equal(case.run(twin, *given), want)
        twin.load_state_dict({name: torch.zeros_like(t) for name, t in module.state_dict().items()})
        assert not module.state_dict() or not torch.equal(case.run(twin, *given), want)
    assert torch.equal(case.run(module, *given), want)
    assert [p.requires_grad for p in copy.deepcopy(module).parameters()] == [p.requires_grad for p in module.parameters()]


@pytest.mark.parametrize("case", KEYS)
def test_keys_are_torchtunes_in_its_order(case):
    assert list(CASES[case].make().state_dict()) == KEYS[case]


def new_attention(**wrong):
    parts = {name: nn.Identity() for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    return MultiHeadAttention(**{"embed_dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2, **parts, **wrong})


def new_decoder(**wrong):
    parts = {name: nn.Identity() for name in ("tok_embeddings", "norm", "output")}
    return TransformerDecoder(max_seq_len=16, num_heads=HEADS, head_dim=HEAD_DIM, **parts, **wrong)


def decode(tokens, rows=B, **keywords):
    """Of shapes: encoder_input [rows, S_E, D] and masks of ones."""
    given = {name: torch.ones(shape, dtype=torch.bool) if "mask" in name else torch.zeros(shape) for name, shape in keywords.items()}
    return make_decoder()(tokens, **given)


def meta_rope():
    with torch.device("meta"):
        return Llama3ScaledRoPE(8, 12)


X, TEXT = torch.ones(3, 6, 2, 8), torch.zeros(B, S, dtype=torch.long)
LONG = r"^seq_len \(65\) of input tensor should be smaller than max_seq_len \(64\)$"
INDEX, RUNTIME, VALUE = IndexError, RuntimeError, ValueError
REFUSED = [
    (r"^attn_dropout \(-0.1\) must be between 0.0 and 1.0$", VALUE, lambda: new_attention(attn_dropout=-0.1)),
    ("^q and k norm must be set together", VALUE, lambda: new_attention(q_norm=nn.Identity())),
    ("^q and k norm must be set together", VALUE, lambda: new_attention(k_norm=nn.Identity())),
    ("^Must provide y input or use kv_cache to enable streaming decoding$", VALUE, lambda: make_attention()(torch.ones(1, 2, D))),
    ("too many indices", INDEX, lambda: make_attention()(*[torch.ones(1, 2, D)] * 2, mask=torch.ones(2, 2, dtype=torch.bool))),
    (r"seq_lens has rows of \[2, 3\] tokens", VALUE, lambda: create_block_causal_mask([torch.tensor([2]), torch.tensor([3])])),
    (
        "^Doesn't support positional embeddings for cross attention, ",
        InvalidArgument,
        lambda: TransformerCrossAttentionLayer(make_attention(rope=rope()), make_mlp()),
    ),
    ("empty_rows is 'none', expected 'zero' or 'uniform'", VALUE, lambda: make_cross_layer(empty_rows="none")),
    ("^num_layers is defined, layers must be a module", InvalidArgument, lambda: new_decoder(layers=3, num_layers=2)),
    ("^num_layers is not defined, layers must be a list", InvalidArgument, lambda: new_decoder(layers=make_self_layer())),
    (LONG, VALUE, lambda: decode(torch.zeros(1, 65, dtype=torch.long))),
    (LONG, VALUE, lambda: decode(None, input_embeds=(1, 65, D))),
    (r"^Either tokens or input_embeds must be provided to the decoder\.$", VALUE, lambda: decode(None)),
    (r"tokens has shape \(7,\), expected \(b, s\)", VALUE, lambda: decode(TEXT[0])),
    # One row of text and two of images would broadcast to two rows of logits.
    ("encoder_input has 1 rows, the batch has 2", VALUE, lambda: decode(TEXT, encoder_input=(1, S_E, D), encoder_mask=(B, S, S_E))),
    ("encoder_input has 2 rows, the batch has 1", VALUE, lambda: decode(TEXT[:1], encoder_input=(B, S_E, D), encoder_mask=(1, S, S_E))),
    (r"encoder_mask has shape \(3, 7, 6\), expected \(2 or 1, 7, keys\)", VALUE, lambda: decode(TEXT, encoder_input=(B, S_E, D), encoder_mask=(3, S, S_E))),
    (r"encoder_mask has shape \(2, 1, 6\), expected \(2 or 1, 7, keys\)", VALUE, lambda: decode(TEXT, encoder_input=(B, S_E, D), encoder_mask=(B, 1, S_E))),
    (r"mask has shape \(1, 1, 7\), expected \(2 or 1, 7, keys\)", VALUE, lambda: decode(TEXT, mask=(1, 1, S))),
    ("The size of tensor a", RUNTIME, lambda: make_decoder()(TEXT, input_pos=torch.arange(S).expand(B + 1, S))),
    (
        "encoder_input is a Tensor, expected a dict of the encoder's keyword arguments",
        TypeError,
        lambda: make_model()(TEXT, encoder_input=torch.zeros(1, 3, D)),
    ),
    ("positional argument", TypeError, lambda: make_model()(TEXT, None)),
    ("index out of range", INDEX, lambda: FusionEmbedding(5, 3, 4)(torch.tensor([[0, 8]]))),
    ("index out of range", INDEX, lambda: FusionEmbedding(5, 3, 4)(torch.tensor([[0, -1]]))),
    (r"input has shape \(2,\), expected \(b, s\)", VALUE, lambda: FusionEmbedding(5, 3, 4)(torch.tensor([0, 1]))),
    (r"input has shape \(1, 1, 1\), expected \(b, s\)", VALUE, lambda: FusionEmbedding(5, 3, 4)(torch.zeros(1, 1, 1, dtype=torch.long))),
    ("ReLU.*no attribute 'weight'", AttributeError, lambda: TiedLinear(nn.ReLU())),
    ("^forward called before update_model", AttributeError, lambda: LinearCrossEntropyLoss()(torch.ones(1, 2, D), TEXT[:1, :2])),
    (r"outputs has shape \(3, 11, 16\), targets \(11, 3\)", VALUE, lambda: linear_loss(Model())(torch.ones(*LABELS.shape, D), LABELS.T)),
    (r"shape '\[-1, 6, 1, 4, 2\]' is invalid", RUNTIME, lambda: RotaryPositionalEmbeddings(8, 5)(X)),
    ("index out of range", INDEX, lambda: RotaryPositionalEmbeddings(8, 5)(X[:, :1], input_pos=torch.tensor([5]))),
    # Indexing would take a negative position from the end of the table.
    ("index out of range", INDEX, lambda: RotaryPositionalEmbeddings(8, 20)(X, input_pos=torch.arange(6) - 1)),
    ("The size of tensor a", RUNTIME, lambda: RotaryPositionalEmbeddings(8, 9)(X, input_pos=torch.zeros(2, 6, dtype=torch.long))),
    (
        r"a \(1\) must match .* b \(4\).*x has 1 rows, input_pos 4",
        RUNTIME,
        lambda: RotaryPositionalEmbeddings(8, 9)(X[:1], input_pos=torch.arange(6).expand(4, 6)),
    ),
    (r"RoPE cache is not built\. Please call rope_init\(\) first\.", RUNTIME, lambda: meta_rope()(X)),
]


@pytest.mark.parametrize(("message", "error", "call"), REFUSED)
def test_what_does_not_fit_is_refused(message, error, call):
    with pytest.raises(error, match=message):
        call()


def test_what_torchtune_asserts_is_a_value_error_too():
    assert issubclass(InvalidArgument, AssertionError) and issubclass(InvalidArgument, ValueError)
