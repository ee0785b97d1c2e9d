"""transformers' Mllama with every parameter random, in fastfuse under the profile "transformers": the same logits on real photos."""

import mllama
import pytest
import torch

from fastfuse.generation import generate
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build, llama3_vision_hf_to_tune
from fastfuse.modules import local_kv_cache

SAMPLES = {
    "one image": [["coffee"]],
    "1, 2 and 0 images": [["coffee"], ["astronaut", "chelsea"], []],
    "two images each": [["chelsea", "chelsea"], ["astronaut", "coffee"]],
    "no image": [[], []],
}


def pair(cross=(1, 3), layers=5, **text):
    """(transformers' model, fastfuse's with its weights, the config)"""
    made = mllama.config(cross, layers, **text)
    theirs = mllama.build(made)
    ours = build(Llama3VisionConfig.from_hf(made), profile="transformers").eval()
    ours.load_state_dict(converted(theirs, made))
    return theirs, ours, made


def converted(theirs, made, tile_tables="ratios"):
    text, vision = made.text_config, made.vision_config
    return llama3_vision_hf_to_tune(
        theirs.state_dict(), text.num_attention_heads, text.num_key_value_heads, text.hidden_size, vocab_size=text.vocab_size,
        cross_attention_layers=text.cross_attention_layers, encoder_dim=vision.hidden_size, num_tiles=vision.max_num_tiles,
        supported_aspect_ratios=vision.supported_aspect_ratios, num_hidden_layers=text.num_hidden_layers, tile_tables=tile_tables,
    )  # fmt: skip


def assert_same_logits(ours, theirs):
    """fp32 through two implementations: 1e-5 of the logits' scale."""
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@pytest.fixture(scope="module")
def models():
    return pair()


@pytest.mark.parametrize("samples", SAMPLES.values(), ids=SAMPLES)
def test_logits_equal_transformers(models, samples):
    theirs, ours, made = models
    batch = mllama.batch(samples)
    with torch.no_grad():
        assert_same_logits(ours(**mllama.as_fastfuse(batch, made)), theirs(**batch).logits)


def test_the_photos_reach_the_text(models):
    """Else equal logits would say nothing of the encoder."""
    _, ours, made = models
    one, other = (mllama.as_fastfuse(mllama.batch([[name]]), made) for name in ("coffee", "chelsea"))
    one["tokens"] = other["tokens"]
    with torch.no_grad():
        assert (ours(**one) - ours(**other)).abs().max() > 1e-2


@pytest.mark.parametrize(
    "cross, layers, text",
    [
        ((0, 2), 4, {}),
        ((1, 3), 4, {}),  # the last layer is cross-attention: it stands alone
        ((1, 2, 4), 6, {}),  # two in a row
        ((1,), 3, {"num_key_value_heads": 8}),
        ((1,), 3, {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}}),
        ((1,), 3, {"rms_norm_eps": 1e-2}),
    ],
)
def test_other_shapes_of_the_decoder(cross, layers, text):
    theirs, ours, made = pair(cross, layers, **text)
    batch = mllama.batch(SAMPLES["1, 2 and 0 images"])
    with torch.no_grad():
        assert_same_logits(ours(**mllama.as_fastfuse(batch, made)), theirs(**batch).logits)


def test_gradients_equal_transformers(models):
    theirs, ours, made = models
    batch = mllama.batch(SAMPLES["1, 2 and 0 images"])
    weight = torch.randn(3, 12, mllama.VOCAB)
    names = ["encoder.clip.conv.weight", "encoder.projection.output.weight", "decoder.layers.1.fusion_layer.attn.k_proj.weight", "decoder.norm.scale"]
    their_names = ["model.vision_model.patch_embedding.weight", "model.multi_modal_projector.weight",
                   "model.language_model.layers.1.cross_attn.k_proj.weight", "model.language_model.norm.weight"]  # fmt: skip
    for model in (theirs, ours):
        model.requires_grad_(True)
    keyed = ours.state_dict(keep_vars=True)
    mine = torch.autograd.grad((ours(**mllama.as_fastfuse(batch, made)) * weight).sum(), [keyed[n] for n in names])
    others = torch.autograd.grad((theirs(**batch).logits * weight).sum(), [dict(theirs.named_parameters())[n] for n in their_names])
    for name, a, b in zip(names, mine, others, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


def test_generation_equals_transformers(models):
    """Greedy tokens of a batch with 1, 2 and 0 images, uncached and with caches wider than the image tokens."""
    theirs, ours, made = models
    batch = mllama.batch(SAMPLES["1, 2 and 0 images"])
    theirs.generation_config.eos_token_id = None
    expected = theirs.generate(**batch, max_new_tokens=10, min_new_tokens=10, do_sample=False)
    given = mllama.as_fastfuse(batch, made)
    prompt = given.pop("tokens")
    assert len(set(expected[:, 12:].flatten().tolist())) > 5
    tokens, logits = generate(ours, prompt, max_generated_tokens=10, temperature=0, **given)
    assert torch.equal(tokens, expected)
    with local_kv_cache(ours, batch_size=3, device="cpu", dtype=torch.float32, encoder_max_seq_len=200, decoder_max_seq_len=40):
        cached, cached_logits = generate(ours, prompt, max_generated_tokens=10, temperature=0, **given)
    assert torch.equal(cached, expected)
    assert_same_logits(cached_logits, logits)


@pytest.mark.parametrize("profile", ["torchtune", "meta"])
def test_the_other_profiles_differ_where_they_should(profile):
    """Padding, hidden states and empty rows are transformers' own: other profiles give other logits from the same weights."""
    made = mllama.config()
    consistent = _with_one_grid(mllama.build(made), made)
    other = build(Llama3VisionConfig.from_hf(made), profile=profile).eval()
    other.load_state_dict(converted(consistent, made, "grid"))
    batch = mllama.batch([["coffee"]])
    with torch.no_grad():
        apart = (other(**mllama.as_fastfuse(batch, made)) - consistent(**batch).logits).abs().max()
    assert apart > 1e-3


def test_meta_profile_is_transformers_but_for_states_and_empty_rows():
    """With the hidden states' indices moved by one, and all text seeing the image, Meta's profile is transformers' model."""
    made = mllama.config()
    theirs = _with_one_grid(mllama.build(made), made)
    config = Llama3VisionConfig.from_hf(made)
    moved = config.replace(clip_hidden_states=tuple(i + 1 for i in config.clip_hidden_states))
    ours = build(moved, profile="meta").eval()
    ours.load_state_dict(converted(theirs, made, "grid"))
    batch = mllama.batch([["coffee"]])
    batch["input_ids"][:, :2] = torch.tensor([mllama.IMAGE, 1])
    batch["cross_attention_mask"][:] = batch["cross_attention_mask"][:, -1:]
    with torch.no_grad():
        assert_same_logits(ours(**mllama.as_fastfuse(batch, made)), theirs(**batch).logits)


def _with_one_grid(theirs, made):
    """The model with tile tables that agree with one grid of tiles, as real checkpoints have them."""
    T = made.vision_config.max_num_tiles
    vision = theirs.model.vision_model
    for table in (vision.pre_tile_positional_embedding.embedding, vision.post_tile_positional_embedding.embedding,
                  vision.gated_positional_embedding.tile_embedding):  # fmt: skip
        grid = torch.randn(T, T, table.weight.shape[1] // T) * 0.2
        table.weight.data.zero_()
        for i, (h, w) in enumerate(made.vision_config.supported_aspect_ratios):
            table.weight.data[i + 1].view(T, -1)[: h * w] = grid[:h, :w].flatten(0, 1)
    return theirs
