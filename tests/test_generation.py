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
from fastfuse.modules import TransformerDecoder, local_kv_cache
from fastfuse.modules.loss import LinearCrossEntropyLoss
from fastfuse.ops import EncoderMask

V = mllama.VOCAB


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


@pytest.fixture(scope="module")
def photos():
    """Prompts with 1, 2 and 0 images."""
    return mllama.as_fastfuse(mllama.batch([["coffee"], ["astronaut", "chelsea"], []]), mllama.config())


def text_of(model) -> TransformerDecoder:
    return model.decoder


def test_temperature_zero_takes_the_likeliest():
    logits = torch.tensor([[0.0, 3.0, 2.9], [1.0, 0.5, -1.0]])
    assert sample(logits, temperature=0).tolist() == [[1], [0]]
    assert sample(logits, temperature=0).dtype == torch.int32


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.2]).log().expand(40_000, 3)
    counts = sample(logits).flatten().bincount(minlength=3) / 40_000
    assert (counts - torch.tensor([0.5, 0.3, 0.2])).abs().max() < 0.0125  # five standard deviations
    sharper = torch.softmax(torch.tensor([0.5, 0.3, 0.2]).log() / 0.5, 0)
    counts = sample(logits, temperature=0.5).flatten().bincount(minlength=3) / 40_000
    assert (counts - sharper).abs().max() < 0.0125


def test_the_noise_given_decides():
    """argmax(probs / q): probs (0.5, 0.3, 0.2) over q (1, 0.5, 0.1) is largest at the last."""
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log()
    assert sample(logits, q=torch.tensor([[1.0, 0.5, 0.1]])).tolist() == [[2]]
    assert sample(logits, q=torch.tensor([[1.0, 0.5, 0.5]])).tolist() == [[1]]


def test_top_k_keeps_ties_and_nothing_below():
    logits = torch.tensor([1.0, 2.0, 2.0, 0.0]).expand(5_000, 4)
    assert set(sample(logits, top_k=1).flatten().tolist()) == {1, 2}
    assert set(sample(logits, top_k=3).flatten().tolist()) == {0, 1, 2}
    assert set(sample(logits, top_k=99).flatten().tolist()) == {0, 1, 2, 3}


@pytest.mark.parametrize("wrong, named", [({"temperature": -1.0}, "temperature is -1.0"), ({"top_k": 0}, "top_k is 0")])
def test_sample_refuses(wrong, named):
    with pytest.raises(ValueError, match=named):
        sample(torch.zeros(1, 4), **wrong)


def test_mask_and_positions_of_a_left_padded_row():
    padding = torch.tensor([[False, True, True], [True, True, True]])
    expected = torch.tensor(
        [[[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0]], [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]],
        dtype=torch.bool,
    )
    assert torch.equal(get_causal_mask_from_padding_mask(padding, 4), expected)
    assert torch.equal(get_causal_mask_from_padding_mask(padding), expected[:, :, :3])
    positions = get_position_ids_from_padding_mask(padding)
    assert positions.tolist() == [[0, 0, 1], [0, 1, 2]] and positions.dtype == torch.int32
    with pytest.raises(InvalidArgument, match="target_seq_len is 2, shorter than the sequence of padding_mask, 3"):
        get_causal_mask_from_padding_mask(padding, 2)


def test_stop_tokens_end_a_row_and_then_the_run():
    prompt = torch.tensor([[1, 2], [3, 6]])
    tokens, logits = generate(Scripted(), prompt, max_generated_tokens=6, stop_tokens=[8, 5], pad_id=0)
    # Row 0 makes 3 4 5 and stops; row 1 makes 7 8, stops, and is padded for one more.
    assert tokens.tolist() == [[1, 2, 3, 4, 5], [3, 6, 7, 8, 0]]
    assert logits.shape == (2, 3, 10)
    assert logits[1, 2].abs().max() == 0 and logits[0, 2].abs().max() > 0
    tokens, _ = generate(Scripted(), prompt, max_generated_tokens=3, pad_id=9)
    assert tokens.tolist() == [[1, 2, 3, 4, 5], [3, 6, 7, 8, 9]]


def test_one_prompt_without_a_batch_axis():
    tokens, _ = generate(Scripted(), torch.tensor([1, 2]), max_generated_tokens=2)
    assert tokens.tolist() == [[1, 2, 3, 4]]


def manual_greedy(model, tokens, n, **encoder):
    """The definition: the whole sequence through the model for every token."""
    for _ in range(n):
        if "encoder_mask" in encoder and encoder["encoder_mask"].shape[1] < tokens.shape[1]:
            encoder["encoder_mask"] = torch.cat([encoder["encoder_mask"], encoder["encoder_mask"][:, -1:]], 1)
        with torch.no_grad():
            tokens = torch.cat([tokens, model(tokens, **encoder)[:, -1:].argmax(-1)], 1)
    return tokens


def test_images_with_and_without_caches(model, photos):
    given = dict(photos)
    prompt = given.pop("tokens")
    expected = manual_greedy(model, prompt, 7, **given)
    assert len(set(expected[:, 12:].flatten().tolist())) > 4
    tokens, logits = generate(model, prompt, max_generated_tokens=7, temperature=0, **given)
    assert torch.equal(tokens, expected)
    with local_kv_cache(model, batch_size=3, device="cpu", dtype=torch.float32, encoder_max_seq_len=160, decoder_max_seq_len=32):
        cached, cached_logits = generate(model, prompt, max_generated_tokens=7, temperature=0, **given)
        again, _ = generate(model, prompt, max_generated_tokens=7, temperature=0, **given)
    assert torch.equal(cached, expected) and torch.equal(again, expected)
    assert (cached_logits - logits).abs().max() <= 1e-5 * logits.abs().max()


def test_prompts_of_different_lengths_with_images(model, photos):
    """Each row of a left-padded batch gives the tokens it gives alone."""
    given = dict(photos)
    lengths = (12, 7, 9)
    prompts = [row[:n] for row, n in zip(given["tokens"], lengths, strict=True)]
    alone = []
    for i, prompt in enumerate(prompts):
        images = {k: v[i : i + 1] for k, v in given["encoder_input"].items()}
        mask = given["encoder_mask"][i : i + 1, : lengths[i]]
        alone.append(manual_greedy(model, prompt[None], 6, encoder_input=images, encoder_mask=mask)[0, lengths[i] :])
    mask = torch.zeros_like(given["encoder_mask"])
    for i, n in enumerate(lengths):
        mask[i, 12 - n :] = given["encoder_mask"][i, :n]
    images = {"encoder_input": given["encoder_input"], "encoder_mask": mask}
    tokens, _ = generate(model, prompts, max_generated_tokens=6, temperature=0, **images)
    assert torch.equal(tokens[:, 12:], torch.stack(alone))
    padded = torch.stack([nn.functional.pad(p, (12 - len(p), 0), value=95) for p in prompts])
    assert not (given["tokens"] == 95).any()
    with local_kv_cache(model, batch_size=3, device="cpu", dtype=torch.float32, encoder_max_seq_len=136, decoder_max_seq_len=20):
        cached, _ = generate(model, padded, max_generated_tokens=6, temperature=0, pad_id=95, **images)
    assert torch.equal(cached[:, 12:], torch.stack(alone))


@pytest.mark.parametrize("kind", ["bits", "auto"])
def test_an_encoder_mask_in_place_of_a_tensor(model, photos, kind):
    """Prompts of different lengths, with caches and without; caches as wide as the images and wider."""
    given = dict(photos)
    prompts, dense = [row[12 - n :] for row, n in zip(given.pop("tokens"), (12, 7, 9), strict=True)], given.pop("encoder_mask").clone()
    for i, n in enumerate((12, 7, 9)):
        dense[i, : 12 - n] = False
    masks = dense, EncoderMask.from_dense(dense, kind=kind)
    for width in (None, 136, 200):
        with contextlib.ExitStack() as stack:
            if width:
                stack.enter_context(local_kv_cache(model, encoder_max_seq_len=width, **CACHES))
            (want, want_logits), (got, logits) = (generate(model, prompts, max_generated_tokens=6, temperature=0, encoder_mask=m, **given) for m in masks)
        assert torch.equal(got, want) and torch.equal(logits, want_logits)


def test_an_encoder_mask_that_does_not_fit_is_refused(model, photos):
    given = dict(photos)
    prompt, mask = given.pop("tokens"), EncoderMask.from_dense(given.pop("encoder_mask"))
    with pytest.raises(ValueError, match=r"encoder_mask has shape \(3, 5, 136\), the prompt has 3 rows of 12 tokens"):
        generate(model, prompt, max_generated_tokens=2, encoder_mask=mask.narrow(0, 5), **given)
    with pytest.raises(ValueError, match="encoder_mask has 137 columns, encoder_input has 136 tokens"):
        generate(model, prompt, max_generated_tokens=2, encoder_mask=mask.widened(137), **given)
    with (
        local_kv_cache(model, encoder_max_seq_len=100, **CACHES),
        pytest.raises(ValueError, match="encoder_mask has 136 image tokens, encoder_max_seq_len of the caches is 100"),
    ):
        generate(model, prompt, max_generated_tokens=2, encoder_mask=mask, **given)


def test_a_token_equal_to_pad_id_counts_in_a_list(model):
    """In a tensor pad_id is padding wherever it stands; a list needs no such convention."""
    prompt = torch.tensor([5, 0, 0, 7])
    tokens, _ = generate(text_of(model), [prompt], max_generated_tokens=3, temperature=0, pad_id=0)
    assert torch.equal(tokens, manual_greedy(text_of(model), prompt[None], 3))


def test_a_seeded_generator_repeats_and_another_does_not(model, photos):
    given = dict(photos)
    prompt = given.pop("tokens")

    def run(seed):
        return generate(model, prompt, max_generated_tokens=8, rng=torch.Generator().manual_seed(seed), top_k=50, **given)[0]

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    assert run(0)[:, 12:].max() < V


def test_a_compiled_step_is_one_graph_and_gives_the_same(model, photos):
    given = dict(photos)
    prompt = given.pop("tokens")
    expected, _ = generate(model, prompt, max_generated_tokens=5, temperature=0, **given)
    torch._dynamo.reset()
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(generate_next_token, fullgraph=True, backend=graphs)
    with local_kv_cache(model, batch_size=3, device="cpu", dtype=torch.float32, encoder_max_seq_len=136, decoder_max_seq_len=20):
        tokens, _ = generate(model, prompt, max_generated_tokens=5, temperature=0, compiled_generate_next_token=step, **given)
    assert torch.equal(tokens, expected)
    assert graphs.frame_count == 1


def test_what_does_not_fit_is_refused_before_anything_runs(model, photos):
    given = dict(photos)
    prompt = given.pop("tokens")
    caches = {"batch_size": 3, "device": "cpu", "dtype": torch.float32, "encoder_max_seq_len": 136, "decoder_max_seq_len": 16}
    with local_kv_cache(model, **caches):
        with pytest.raises(ValueError, match="17 tokens, decoder_max_seq_len of the caches is 16"):
            generate(model, prompt, max_generated_tokens=5, **given)
        with pytest.raises(ValueError, match="prompt has 2 rows, the caches are set up for a batch of 3"):
            generate(model, prompt[:2], max_generated_tokens=2)
    with (
        local_kv_cache(model, **caches | {"encoder_max_seq_len": 100}),
        pytest.raises(ValueError, match="encoder_mask has 136 image tokens, encoder_max_seq_len of the caches is 100"),
    ):
        generate(model, prompt, max_generated_tokens=2, **given)
    with pytest.raises(ValueError, match="only encoder_mask is given"):
        generate(model, prompt, max_generated_tokens=2, encoder_mask=given["encoder_mask"])
    with pytest.raises(ValueError, match=r"encoder_mask has shape \(3, 5, 136\), the prompt has 3 rows of 12 tokens"):
        generate(model, prompt, max_generated_tokens=2, encoder_input=given["encoder_input"], encoder_mask=given["encoder_mask"][:, :5])
    with pytest.raises(ValueError, match="max_generated_tokens is 0"):
        generate(model, prompt, max_generated_tokens=0)
    with pytest.raises(ValueError, match=r"prompt has shape \(0,\)|prompt has shape \(1, 0\)"):
        generate(model, torch.empty(0, dtype=torch.int64), max_generated_tokens=1)
    with pytest.raises(ValueError, match=r"found shapes \[\(2, 2\)\]"):
        generate(model, [torch.ones(2, 2, dtype=torch.int64)], max_generated_tokens=1)


CACHES = {"batch_size": 3, "device": "cpu", "dtype": torch.float32, "decoder_max_seq_len": 20}


def test_a_float_mask_hides_the_tail_of_wider_caches(model, photos):
    given = dict(photos)
    prompt = given.pop("tokens")
    _, want = generate(model, prompt, max_generated_tokens=4, temperature=0, **given)
    given["encoder_mask"] = torch.zeros(given["encoder_mask"].shape).masked_fill(~given["encoder_mask"], -torch.inf)
    with local_kv_cache(model, encoder_max_seq_len=200, **CACHES):
        _, got = generate(model, prompt, max_generated_tokens=4, temperature=0, **given)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_a_mask_or_images_that_do_not_fit_each_other_are_refused(model, photos):
    given = dict(photos)
    prompt, mask = given.pop("tokens"), given.pop("encoder_mask")
    one = {k: v[:1] for k, v in given["encoder_input"].items()}
    for cached in (False, True):
        with contextlib.ExitStack() as stack:
            if cached:
                stack.enter_context(local_kv_cache(model, encoder_max_seq_len=200, **CACHES))
            with pytest.raises(ValueError, match="encoder_mask has 17 columns, encoder_input has 136 tokens"):
                generate(model, prompt, max_generated_tokens=2, encoder_mask=mask[:, :, :17], **given)
            with pytest.raises(ValueError, match="encoder_input has 1 rows, the prompt has 3"):
                generate(model, prompt, max_generated_tokens=2, encoder_mask=mask, encoder_input=one)


def test_between_training_steps_generate_still_gives_tokens(model, photos):
    """A loss that projects by itself, and hidden states asked for, stay as they were."""
    given = dict(photos)
    prompt = given.pop("tokens")
    want, _ = generate(model, prompt, max_generated_tokens=3, temperature=0, **given)
    LinearCrossEntropyLoss().set_model_output(model)
    model.decoder.output_hidden_states, model.decoder.num_output_chunks = [1], 2
    try:
        got, _ = generate(model, prompt, max_generated_tokens=3, temperature=0, **given)
        assert model.skip_output_layer and model.decoder.output_hidden_states == [1] and model.decoder.num_output_chunks == 2
    finally:
        model.skip_output_layer, model.decoder.output_hidden_states, model.decoder.num_output_chunks = False, [], 0
    assert torch.equal(got, want)


def test_only_leading_pad_ids_are_padding(model):
    decoder = text_of(model)
    prompt = torch.tensor([[5, 0, 7, 9], [0, 0, 7, 9]])
    tokens, _ = generate(decoder, prompt, max_generated_tokens=3, temperature=0, pad_id=0)
    assert torch.equal(tokens[:1], manual_greedy(decoder, prompt[:1], 3))
    assert torch.equal(tokens[1:, 2:], manual_greedy(decoder, prompt[1:, 2:], 3))
    with pytest.raises(ValueError, match="prompt row 1 ends in pad_id=0: pad on the left"):
        generate(decoder, torch.tensor([[5, 6, 7], [5, 0, 0]]), max_generated_tokens=1)


def test_the_model_s_own_length_is_a_limit(model):
    with pytest.raises(ValueError, match="are 513 tokens, max_seq_len of the model is 512"):
        generate(model, torch.ones(1, 500, dtype=torch.int64), max_generated_tokens=13)


def test_caches_under_autocast(model, photos):
    """k_norm leaves fp32 keys, the projection bf16 values: the cache has one dtype."""
    given = dict(photos)
    prompt = given.pop("tokens")
    with torch.autocast("cpu", torch.bfloat16):
        _, want = generate(model, prompt, max_generated_tokens=1, temperature=0, **given)
        with local_kv_cache(model, encoder_max_seq_len=136, **CACHES | {"dtype": torch.bfloat16}):
            _, got = generate(model, prompt, max_generated_tokens=1, temperature=0, **given)
    _, exact = generate(model, prompt, max_generated_tokens=1, temperature=0, **given)
    assert (got - exact).abs().max() <= 2 * (want - exact).abs().max()


def test_stop_tokens_in_any_collection():
    for stops in ([8, 5], {8, 5}, (8, 5), torch.tensor([8, 5])):
        tokens, _ = generate(Scripted(), torch.tensor([1, 2]), max_generated_tokens=6, stop_tokens=stops)
        assert tokens.tolist() == [[1, 2, 3, 4, 5]]
    with pytest.raises(ValueError, match="temperature is nan"):
        sample(torch.zeros(1, 3), temperature=float("nan"))
