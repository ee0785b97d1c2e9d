"""transformers' Mllama with every parameter random, in fastfuse under the profile "transformers": the same logits on real photos."""

import mllama
import pytest
import torch
from mllama import SAMPLES, assert_same_logits

from fastfuse.generation import generate
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build
from fastfuse.modules import local_kv_cache


def in_fastfuse(theirs):
    """fastfuse's model with transformers' weights."""
    ours = build(Llama3VisionConfig.from_hf(theirs.config), profile="transformers").eval()
    ours.load_state_dict(mllama.converted(theirs))
    return ours


@pytest.fixture(scope="module")
def models():
    theirs = mllama.build(mllama.config())
    return theirs, in_fastfuse(theirs)


@pytest.mark.parametrize(
    "samples", [[["coffee"]], SAMPLES, [["chelsea", "chelsea"], ["astronaut", "coffee"]], [[], []]], ids=["1", "1, 2 and 0", "2 each", "0"]
)
def test_logits_equal_transformers(models, samples):
    theirs, ours = models
    assert_same_logits(ours, theirs, samples)


def test_the_photos_reach_the_text(models):
    """Else equal logits would say nothing of the encoder."""
    theirs, ours = models
    one, other = (mllama.as_fastfuse(mllama.batch([[name]]), theirs.config) for name in ("coffee", "chelsea"))
    with torch.no_grad():
        assert (ours(**one | {"tokens": other["tokens"]}) - ours(**other)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "cross, layers, text",
    [
        ((0, 2), 4, {"num_key_value_heads": 8}),
        ((1, 3), 4, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),  # the last layer is cross-attention: it stands alone
        ((1, 2, 4), 6, {"rms_norm_eps": 1e-2}),  # two in a row
    ],
)
def test_other_shapes_of_the_decoder(cross, layers, text):
    theirs = mllama.build(mllama.config(cross, layers, **text))
    assert_same_logits(in_fastfuse(theirs), theirs)


def test_generation_equals_transformers(models):
    """Greedy tokens of a batch with 1, 2 and 0 images, with caches wider than the image tokens; without them: test_generation."""
    theirs, ours = models
    batch = mllama.batch(SAMPLES)
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(**batch, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    given = mllama.as_fastfuse(batch, theirs.config)
    assert len(set(expected[:, 12:].flatten().tolist())) > 5
    with local_kv_cache(ours, batch_size=3, device="cpu", dtype=torch.float32, encoder_max_seq_len=200, decoder_max_seq_len=40):
        tokens, _ = generate(ours, given.pop("tokens"), max_generated_tokens=10, temperature=0, **given)
    assert torch.equal(tokens, expected)
