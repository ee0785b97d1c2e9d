"""Generation: sampling, masks and positions of padded prompts, and whole runs with and without caches and images."""

import contextlib

import mllama
import pytest
import torch
import torch._dynamo.testing
from torch import nn

from fastfuse.errors import InvalidArgument
from fastfuse.generation import generate, generate_next_token, get_causal_mask_from_padding_mask, get_position_ids_from_padding_mask, sample
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build
from fastfuse.modules import local_kv_cache
from fastfuse.modules.loss import LinearCrossEntropyLoss
from fastfuse.ops import EncoderMask


class Scripted(nn.Module):
    """A model without caches that predicts (last token + 1) % 10 with certainty."""

    def __init__(self):
        super().__init__()
        self.output = nn.Linear(1, 10)

    def caches_are_enabled(self):
        return False

    def forward(self, tokens, *, mask, input_pos):
        return nn.functional.one_hot((tokens + 1) % 10, 10).float() * 1e4


@pytest.fixture(scope="module")
def model():
    config = Llama3VisionConfig.from_hf(mllama.config()).replace(cross_attention_layers=None, num_layers=4, fusion_interval=2)
    return mllama.randomize(build(config)).eval()


@pytest.fixture
def photos():
    """(prompts of 12 tokens with 1, 2 and 0 images, what the model is told of the images)"""
    given = mllama.as_fastfuse(mllama.batch(mllama.SAMPLES), mllama.config())
    return given.pop("tokens"), given


def caches(model, width=136, **changed):
    """As wide as the image tokens, or wider."""
    sizes = {"batch_size": 3, "device": "cpu", "dtype": torch.float32, "encoder_max_seq_len": width, "decoder_max_seq_len": 20}
    return local_kv_cache(model, **sizes | changed) if width else contextlib.nullcontext()


def greedy(model, prompt, n, **given):
    return generate(model, prompt, max_generated_tokens=n, temperature=0, **given)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_sampling_follows_the_probabilities(temperature):
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    counts = sample(logits.expand(40_000, 3), temperature=temperature).flatten().bincount(minlength=3) / 40_000
    assert (counts - torch.softmax(logits / temperature, 0)).abs().max() < 0.0125  # five standard deviations


def test_the_noise_given_decides():
    """argmax(probs / q): probs (0.5, 0.3, 0.2) over q (1, 0.5, 0.1) is largest at the last."""
    logits = torch.tensor([[0.5, 0.3, 0.2]] * 2).log()
    chosen = sample(logits, q=torch.tensor([[1.0, 0.5, 0.1], [1.0, 0.5, 0.5]]))
    assert chosen.tolist() == [[2], [1]] and chosen.dtype == torch.int32
    assert sample(logits, temperature=0).tolist() == [[0], [0]]


@pytest.mark.parametrize("top_k, possible", [(1, {1, 2}), (3, {0, 1, 2}), (99, {0, 1, 2, 3})])
def test_top_k_keeps_ties_and_nothing_below(top_k, possible):
    assert set(sample(torch.tensor([1.0, 2.0, 2.0, 0.0]).expand(5_000, 4), top_k=top_k).flatten().tolist()) == possible


def test_mask_and_positions_of_a_left_padded_row():
    padding = torch.tensor([[False, True, True], [True, True, True]])
    expected = torch.tensor([[[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]], dtype=torch.bool)
    assert torch.equal(get_causal_mask_from_padding_mask(padding, 4), expected)
    assert torch.equal(get_causal_mask_from_padding_mask(padding), expected[:, :, :3])
    positions = get_position_ids_from_padding_mask(padding)
    assert positions.tolist() == [[0, 0, 1], [0, 1, 2]] and positions.dtype == torch.int32


@pytest.mark.parametrize("stops", [[8, 5], {8, 5}, (8, 5), torch.tensor([8, 5])], ids=lambda stops: type(stops).__name__)
def test_stop_tokens_end_a_row_and_then_the_run(stops):
    tokens, logits = generate(Scripted(), torch.tensor([[1, 2], [3, 6]]), max_generated_tokens=6, stop_tokens=stops, pad_id=0)
    # Row 0 makes 3 4 5 and stops; row 1 makes 7 8, stops, and is padded for one more.
    assert tokens.tolist() == [[1, 2, 3, 4, 5], [3, 6, 7, 8, 0]]
    assert logits.shape == (2, 3, 10) and not logits[1, 2].any() and logits[0, 2].any()


@pytest.mark.parametrize("width", [136, 160])
def test_images_with_and_without_caches(model, photos, width):
    """Without them the whole sequence goes through the model for every token. What is generated: test_transformers_parity."""
    prompt, given = photos
    expected, logits = greedy(model, prompt, 7, **given)
    assert len(set(expected[:, 12:].flatten().tolist())) > 4
    with caches(model, width):
        for _ in range(2):
            tokens, got = greedy(model, prompt, 7, **given)
            assert torch.equal(tokens, expected) and (got - logits).abs().max() <= 1e-5 * logits.abs().max()
    given["encoder_mask"] = torch.zeros(given["encoder_mask"].shape).masked_fill(~given["encoder_mask"], -torch.inf)
    with caches(model, width):  # a float mask hides the tail of wider caches
        assert (greedy(model, prompt, 7, **given)[1] - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_prompts_of_different_lengths_with_images(model, photos):
    """Each row of a left-padded batch gives the tokens it gives alone, without a batch axis; an EncoderMask gives what the tensor does."""
    rows, given = photos
    prompts = [row[:n] for row, n in zip(rows, mllama.LENGTHS, strict=True)]
    mask, alone = torch.zeros_like(given["encoder_mask"]), []
    for i, prompt in enumerate(prompts):
        n, images = len(prompt), {k: v[i : i + 1] for k, v in given["encoder_input"].items()}
        mask[i, 12 - n :] = given["encoder_mask"][i, :n]
        alone.append(greedy(model, prompt, 6, encoder_input=images, encoder_mask=mask[i : i + 1, 12 - n :])[0][0, n:])
    padded = torch.stack([nn.functional.pad(p, (12 - len(p), 0), value=95) for p in prompts])
    assert not (rows == 95).any()
    for width, prompt in ((None, prompts), (136, padded), (200, prompts)):
        with caches(model, width):
            masks = (mask, EncoderMask.from_dense(mask, kind="bits"), EncoderMask.from_dense(mask, kind="auto"))
            (tokens, logits), *others = (greedy(model, prompt, 6, pad_id=95, **given | {"encoder_mask": m}) for m in masks)
        assert torch.equal(tokens[:, 12:], torch.stack(alone))
        assert all(torch.equal(other[0], tokens) and torch.equal(other[1], logits) for other in others)


def test_padding_is_what_leads_in_a_tensor_and_nothing_in_a_list(model):
    """In a list a token equal to pad_id counts."""
    prompt = torch.tensor([[5, 0, 7, 9], [0, 0, 7, 9]])
    first, second, short = (greedy(model.decoder, row, 3, pad_id=95)[0] for row in (prompt[0], prompt[1], prompt[1, 2:]))
    padded = greedy(model.decoder, prompt, 3, pad_id=0)[0]
    assert torch.equal(padded[:1], first) and torch.equal(padded[1:, 2:], short)
    assert torch.equal(greedy(model.decoder, [prompt[1]], 3, pad_id=0)[0], second)


def test_a_seeded_generator_repeats_and_another_does_not(model, photos):
    prompt, given = photos
    first, same, other = (generate(model, prompt, max_generated_tokens=8, rng=torch.Generator().manual_seed(s), top_k=50, **given)[0] for s in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)
    assert first[:, 12:].max() < mllama.VOCAB


def test_a_compiled_step_is_one_graph_and_gives_the_same(model, photos):
    prompt, given = photos
    expected, _ = greedy(model, prompt, 5, **given)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(generate_next_token, fullgraph=True, backend=graphs)
    with caches(model):
        tokens, _ = greedy(model, prompt, 5, compiled_generate_next_token=step, **given)
    assert torch.equal(tokens, expected)
    assert graphs.frame_count == 1


def test_what_does_not_fit_is_refused_before_anything_runs(model, photos):
    prompt, given = photos
    mask = given["encoder_mask"]
    exact = EncoderMask.from_dense(mask)
    one = {k: v[:1] for k, v in given["encoder_input"].items()}
    short = r"encoder_mask has shape \(3, 5, 136\), the prompt has 3 rows of 12 tokens"
    narrow = "encoder_mask has 136 image tokens, encoder_max_seq_len of the caches is 100"
    for width, tokens, n, changed, message in [
        (136, prompt, 9, {}, "21 tokens, decoder_max_seq_len of the caches is 20"),
        (136, prompt[:2], 2, None, "prompt has 2 rows, the caches are set up for a batch of 3"),
        (100, prompt, 2, {}, narrow),
        (100, prompt, 2, {"encoder_mask": exact}, narrow),
        (None, prompt, 2, {"encoder_input": None}, "only encoder_mask is given"),
        (None, prompt, 2, {"encoder_mask": mask[:, :5]}, short),
        (None, prompt, 2, {"encoder_mask": exact.narrow(0, 5)}, short),
        (None, prompt, 2, {"encoder_mask": exact.widened(137)}, "encoder_mask has 137 columns, encoder_input has 136 tokens"),
        *((width, prompt, 2, {"encoder_mask": mask[:, :, :17]}, "encoder_mask has 17 columns, encoder_input has 136 tokens") for width in (None, 200)),
        *((width, prompt, 2, {"encoder_input": one}, "encoder_input has 1 rows, the prompt has 3") for width in (None, 200)),
        (None, prompt, 0, None, "max_generated_tokens is 0"),
        (None, torch.ones(1, 500, dtype=torch.int64), 13, None, "are 513 tokens, max_seq_len of the model is 512"),
        (None, prompt[0, :0], 1, None, r"prompt has shape \(1, 0\)"),
        (None, [prompt[:2, :2]], 1, None, r"found shapes \[\(2, 2\)\]"),
        (None, torch.tensor([[5, 6, 7], [5, 0, 0]]), 1, None, "prompt row 1 ends in pad_id=0: pad on the left"),
    ]:
        with caches(model, width), pytest.raises(ValueError, match=message):
            greedy(model, tokens, n, **({} if changed is None else given | changed))
    for wrong, message in (({"temperature": -1.0}, "temperature is -1.0"), ({"temperature": float("nan")}, "temperature is nan"), ({"top_k": 0}, "top_k is 0")):
        with pytest.raises(ValueError, match=message):
            sample(torch.zeros(1, 4), **wrong)
    with pytest.raises(InvalidArgument, match="target_seq_len is 2, shorter than the sequence of padding_mask, 3"):
        get_causal_mask_from_padding_mask(torch.ones(1, 3, dtype=torch.bool), 2)


def test_between_training_steps_generate_still_gives_tokens(model, photos):
    """A loss that projects by itself, and hidden states asked for, stay as they were."""
    prompt, given = photos
    want, _ = greedy(model, prompt, 3, **given)
    LinearCrossEntropyLoss().set_model_output(model)
    model.decoder.output_hidden_states, model.decoder.num_output_chunks = [1], 2
    try:
        got, _ = greedy(model, prompt, 3, **given)
        assert model.skip_output_layer and model.decoder.output_hidden_states == [1] and model.decoder.num_output_chunks == 2
    finally:
        model.skip_output_layer, model.decoder.output_hidden_states, model.decoder.num_output_chunks = False, [], 0
    assert torch.equal(got, want)


def test_caches_under_autocast(model, photos):
    """k_norm leaves fp32 keys, the projection bf16 values: the cache has one dtype."""
    prompt, given = photos
    with torch.autocast("cpu", torch.bfloat16):
        _, want = greedy(model, prompt, 1, **given)
        with caches(model, dtype=torch.bfloat16):
            _, got = greedy(model, prompt, 1, **given)
    _, exact = greedy(model, prompt, 1, **given)
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()
