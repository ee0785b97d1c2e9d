"""Cross-entropy in chunks: values, gradients, and what counts as a token."""

import copy
import math

import pytest
import torch
from numerics import assert_no_worse
from reference import DTYPES, VOCAB, D, assert_matches, make_decoder
from torch import nn
from torch.nn import functional as F

from fastfuse.modules.loss import CEWithChunkedOutputLoss, LinearCrossEntropyLoss

pytestmark = pytest.mark.filterwarnings("ignore:CEWithChunkedOutputLoss is deprecated", "ignore:set_num_output_chunks")
B, S, V = 3, 11, 9


class Model(nn.Module):
    """A projection where the losses look for it."""

    def __init__(self, bias: bool = True):
        super().__init__()
        self.output = nn.Linear(D, V, bias=bias)
        self.skip_output_layer = False
        self.chunks = 0

    def set_num_output_chunks(self, n):
        self.chunks = n


def some_labels(ignore: int = -100) -> torch.Tensor:
    """A third ignored, one sample almost wholly."""
    labels = torch.randint(0, V, (B, S))
    labels[torch.rand(B, S) < 0.33] = ignore
    labels[1, 1:] = ignore
    labels[0, 0] = 3
    return labels


def mean_of_negative_logs(logits: torch.Tensor, labels: torch.Tensor, ignore: int = -100) -> torch.Tensor:
    """-log softmax at the label, averaged over the labels that count, in the widest dtype given."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    picked = [logits[i].logsumexp(0) - logits[i, label] for i, label in enumerate(labels.flatten().tolist()) if label != ignore]
    return torch.stack(picked).mean()


def linear_loss(model, **kwargs):
    loss = LinearCrossEntropyLoss(**kwargs)
    loss.set_model_output(model)
    return loss


def test_by_hand():
    """Logits (0, ln 3): -log of 1/4 for label 0, of 3/4 for label 1; the ignored third token does not count."""
    model = Model()
    model.output = nn.Identity()
    hidden = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)], [5.0, 9.0]]])
    labels = torch.tensor([[0, 1, -100]])
    want = (math.log(4) + math.log(4 / 3)) / 2
    for chunks in (1, 2, 8):
        assert linear_loss(model, num_output_chunks=chunks)(hidden, labels).item() == pytest.approx(want, rel=1e-6)
        chunked = CEWithChunkedOutputLoss(num_output_chunks=chunks)(list(hidden.tensor_split(chunks, 1)), labels)
        assert chunked.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [1, 4, 8, 50])
@pytest.mark.parametrize("drop", [True, False])
def test_linear_loss_and_gradients(drop, chunks, dtype):
    labels = some_labels()
    assert_matches(
        Model(),
        lambda m, h: linear_loss(m, num_output_chunks=chunks, mask_ignored_tokens=drop)(h, labels)[None],
        lambda m, h: mean_of_negative_logs(F.linear(h, m.output.weight, m.output.bias), labels)[None],
        {"h": torch.randn(B, S, D)},
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunks", [1, 4, 8, 50])
def test_chunked_loss_and_gradients(chunks, dtype):
    labels = some_labels()
    assert_matches(
        nn.Identity(),
        lambda m, logits: CEWithChunkedOutputLoss(chunks)(list(logits.tensor_split(chunks, 1)), labels)[None],
        lambda m, logits: mean_of_negative_logs(logits, labels)[None],
        {"logits": torch.randn(B, S, V)},
        dtype,
    )


def test_ignored_tokens_get_exactly_no_gradient():
    labels, h = some_labels(), torch.randn(B, S, D, requires_grad=True)
    for drop in (True, False):
        h.grad = None
        linear_loss(Model(), mask_ignored_tokens=drop)(h, labels).backward()
        assert not h.grad[labels == -100].any() and h.grad[labels != -100].any(-1).all()


def test_another_ignore_index():
    labels = some_labels(ignore=7)
    model, h = Model(), torch.randn(B, S, D)
    exact = mean_of_negative_logs(copy.deepcopy(model.output).double()(h.double()), labels, 7)
    eager = mean_of_negative_logs(model.output(h), labels, 7)
    assert_no_worse(linear_loss(model, ignore_index=7)(h, labels)[None], eager[None], exact[None])
    logits = list(model.output(h).tensor_split(8, 1))
    assert_no_worse(CEWithChunkedOutputLoss(ignore_index=7)(logits, labels)[None], eager[None], exact[None])


def test_sums_are_fp32_for_a_bf16_model():
    model, h, labels = Model().bfloat16(), torch.randn(B, S, D).bfloat16(), some_labels()
    loss = linear_loss(model)(h, labels)
    want = mean_of_negative_logs(model.output(h).double(), labels)
    assert loss.dtype == torch.float32
    assert_no_worse(loss[None], mean_of_negative_logs(model.output(h), labels)[None], want[None])


def test_float64_stays_float64():
    model, h, labels = Model().double(), torch.randn(B, S, D, dtype=torch.float64), some_labels()
    want = mean_of_negative_logs(model.output(h), labels)
    for loss in (linear_loss(model)(h, labels), CEWithChunkedOutputLoss()(list(model.output(h).tensor_split(8, 1)), labels)):
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(want.item(), rel=1e-14)


def test_nothing_to_learn_from():
    """The linear loss is 0 with a graph, so that backward runs; the chunked one is 0 / 0, as torchtune's."""
    labels, model, h = torch.full((B, S), -100), Model(), torch.randn(B, S, D, requires_grad=True)
    for drop in (True, False):
        h.grad = None
        loss = linear_loss(model, mask_ignored_tokens=drop)(h, labels)
        assert loss.item() == 0.0 and loss.dtype == torch.float32
        loss.backward()
        assert h.grad.shape == h.shape and not h.grad.any()
    assert CEWithChunkedOutputLoss()(list(model.output(h).tensor_split(8, 1)), labels).isnan()


def test_set_model_output_takes_the_projection():
    model = make_decoder()
    loss = LinearCrossEntropyLoss()
    with pytest.raises(AttributeError, match=r"^forward called before update_model"):
        loss(torch.randn(1, 2, D), torch.zeros(1, 2, dtype=torch.long))
    loss.set_model_output(model)
    assert model.skip_output_layer is True and loss.linear_projection is model.output
    assert list(loss.state_dict()) == ["linear_projection.weight"]
    tokens, labels = torch.randint(0, VOCAB, (B, S)), torch.randint(0, VOCAB, (B, S))
    hidden = model(tokens)
    model.skip_output_layer = False
    exact = mean_of_negative_logs(hidden.double() @ model.output.weight.double().T, labels)
    assert_no_worse(loss(hidden, labels)[None], mean_of_negative_logs(model(tokens), labels)[None], exact[None])


def test_the_chunked_loss_asks_the_model_for_its_chunks():
    model, labels, tokens = make_decoder(), torch.randint(0, VOCAB, (B, S)), torch.randint(0, VOCAB, (B, S))
    whole = model(tokens)
    loss = CEWithChunkedOutputLoss(num_output_chunks=5)
    loss.set_model_output(model)
    chunks = model(tokens)
    assert model.num_output_chunks == 5 and len(chunks) == 5
    assert_no_worse(loss(chunks, labels)[None], mean_of_negative_logs(whole, labels)[None], mean_of_negative_logs(whole.double(), labels)[None])
    assert (LinearCrossEntropyLoss().num_output_chunks, LinearCrossEntropyLoss().ignore_index) == (8, -100)


def test_the_chunked_loss_is_deprecated():
    with pytest.warns(FutureWarning, match="CEWithChunkedOutputLoss is deprecated"):
        CEWithChunkedOutputLoss()


def test_one_chunk_sums():
    logits, labels = torch.randn(5, V), torch.tensor([0, 1, -100, 8, 2])
    exact = sum(logits.double()[i].logsumexp(0) - logits.double()[i, c] for i, c in enumerate(labels.tolist()) if c >= 0)
    eager = F.cross_entropy(logits, labels, reduction="sum")
    assert_no_worse(CEWithChunkedOutputLoss().compute_cross_entropy(logits, labels)[None], eager[None], exact[None])


@pytest.mark.filterwarnings("ignore")
def test_compiled_chunks():
    torch._dynamo.reset()
    model, h, labels = Model(), torch.randn(B, S, D), some_labels()
    plain = linear_loss(model)
    compiled = linear_loss(model)
    assert compiled.apply_compile_strategy(backend="aot_eager") is compiled
    exact = mean_of_negative_logs(copy.deepcopy(model.output).double()(h.double()), labels)
    assert_no_worse(compiled(h, labels)[None], plain(h, labels)[None], exact[None])
    chunked = CEWithChunkedOutputLoss()
    assert chunked.apply_compile_strategy(backend="aot_eager") is chunked
    assert_no_worse(chunked(list(model.output(h).tensor_split(8, 1)), labels)[None], plain(h, labels)[None], exact[None])


@pytest.mark.filterwarnings("ignore")
def test_the_whole_linear_loss_compiles():
    torch._dynamo.reset()
    model, h, labels = Model(), torch.randn(B, S, D), some_labels()
    loss = linear_loss(model, num_output_chunks=3)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    exact = mean_of_negative_logs(copy.deepcopy(model.output).double()(h.double()), labels)
    assert_no_worse(compiled(h, labels)[None], loss(h, labels)[None], exact[None])


def test_targets_of_another_shape_are_refused():
    loss = LinearCrossEntropyLoss()
    loss.set_model_output(Model())
    with pytest.raises(ValueError, match=r"outputs has shape \(3, 11, 16\), targets \(11, 3\)"):
        loss(torch.randn(B, S, D), some_labels().T)
