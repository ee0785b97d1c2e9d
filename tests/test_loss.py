"""Cross-entropy in chunks: values, and what counts as a token. Gradients by the rule: test_modules.py."""

import copy

import pytest
import torch
from numerics import assert_no_worse
from reference import VOCAB, D, make_decoder
from torch import nn

from fastfuse.modules.loss import CEWithChunkedOutputLoss, LinearCrossEntropyLoss

pytestmark = pytest.mark.filterwarnings("ignore:CEWithChunkedOutputLoss is deprecated", "ignore:set_num_output_chunks")
B, S, V = 3, 11, 9


class Model(nn.Module):
    """A projection where the losses look for it."""

    def __init__(self):
        super().__init__()
        self.output, self.skip_output_layer = nn.Linear(D, V), False


def labels(ignore=-100):
    """A third ignored, one sample almost wholly."""
    generator = torch.Generator().manual_seed(2)
    made = torch.randint(0, V, (B, S), generator=generator)
    made[torch.rand(B, S, generator=generator) < 0.33] = ignore
    made[1, 1:] = ignore
    made[0, 0] = 3
    return made


def mean_of_negative_logs(logits, labels, ignore=-100):
    """-log softmax at the label, averaged over the labels that count, in the widest dtype given."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, 1)
    return torch.stack([logits[i].logsumexp(0) - logits[i, label] for i, label in enumerate(labels.flatten().tolist()) if label != ignore]).mean()


def linear_loss(model, **kwargs):
    loss = LinearCrossEntropyLoss(**kwargs)
    loss.set_model_output(model)
    return loss


def both(model, h, labels, chunks=8, **kwargs):
    """The two losses, of the model's projection."""
    yield linear_loss(model, num_output_chunks=chunks, **kwargs)(h, labels)
    yield CEWithChunkedOutputLoss(chunks, **kwargs)(list(model.output(h).tensor_split(chunks, 1)), labels)


@pytest.mark.parametrize(("dtype", "ignore"), [(torch.float32, 7), (torch.bfloat16, -100), (torch.float64, -100)], ids=str)
def test_sums_are_fp32_at_least_whatever_index_is_ignored(dtype, ignore):
    model, h, targets = Model().to(dtype), torch.randn(B, S, D).to(dtype), labels(ignore)
    exact = mean_of_negative_logs(copy.deepcopy(model.output).double()(h.double()) if dtype == torch.float32 else model.output(h).double(), targets, ignore)
    for loss in both(model, h, targets, ignore_index=ignore):
        assert_no_worse(loss[None], mean_of_negative_logs(model.output(h), targets, ignore)[None], exact[None])


@pytest.mark.parametrize("drop", [True, False])
def test_ignored_tokens_and_nothing_to_learn_from_give_exactly_no_gradient(drop):
    """Without any label the linear loss is 0 with a graph, so that backward runs; the chunked one is 0 / 0, as torchtune's."""
    nothing = torch.full((B, S), -100)
    for targets in (labels(), nothing):
        h = torch.randn(B, S, D, requires_grad=True)
        loss = linear_loss(Model(), mask_ignored_tokens=drop)(h, targets)
        loss.backward()
        assert not h.grad[targets == -100].any() and h.grad[targets != -100].any(-1).all()
    assert loss.item() == 0.0 and loss.dtype == torch.float32
    assert [*both(Model(), h, nothing)][1].isnan()


def test_the_losses_take_what_they_need_of_the_model():
    """The linear one its projection, the other one its output in chunks. What the linear one makes of it: test_fusion.py."""
    model, (tokens, targets) = make_decoder(), torch.randint(0, VOCAB, (2, B, S))
    whole, linear, chunked = model(tokens), LinearCrossEntropyLoss(), CEWithChunkedOutputLoss(num_output_chunks=5)
    eager, exact = (mean_of_negative_logs(logits, targets)[None] for logits in (whole, whole.double()))
    linear.set_model_output(model)
    assert model.skip_output_layer is True and linear.linear_projection is model.output and list(linear.state_dict()) == ["linear_projection.weight"]
    assert (linear.num_output_chunks, linear.ignore_index) == (8, -100)
    model.skip_output_layer = False
    chunked.set_model_output(model)
    chunks = model(tokens)
    assert model.num_output_chunks == 5 and len(chunks) == 5
    assert_no_worse(chunked(chunks, targets)[None], eager, exact)


def test_the_chunked_loss_is_deprecated():
    with pytest.warns(FutureWarning, match="CEWithChunkedOutputLoss is deprecated"):
        CEWithChunkedOutputLoss()


def test_one_chunk_sums():
    logits, targets = torch.randn(5, V), torch.tensor([0, 1, -100, 8, 2])
    eager, exact = (mean_of_negative_logs(wide[None], targets)[None] * 4 for wide in (logits, logits.double()))
    assert_no_worse(CEWithChunkedOutputLoss().compute_cross_entropy(logits, targets)[None], eager, exact)


@pytest.mark.filterwarnings("ignore")
def test_compiled_whole_or_by_chunks():
    torch._dynamo.reset()
    model, h, targets = Model(), torch.randn(B, S, D), labels()
    linear, chunked = linear_loss(model), CEWithChunkedOutputLoss()
    exact, plain = mean_of_negative_logs(copy.deepcopy(model.output).double()(h.double()), targets), linear(h, targets)
    for drop in (True, False):
        whole = torch.compile(linear_loss(model, num_output_chunks=3, mask_ignored_tokens=drop), fullgraph=True, backend="aot_eager")
        assert_no_worse(whole(h, targets)[None], plain[None], exact[None])
    for loss, given in ((linear, h), (chunked, list(model.output(h).tensor_split(8, 1)))):
        assert loss.apply_compile_strategy(backend="aot_eager") is loss
        assert_no_worse(loss(given, targets)[None], plain[None], exact[None])
