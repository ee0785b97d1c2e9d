"""Checkpoint layouts of Llama-3.2-Vision: fixed expectations, of which those marked so are torchtune 0.6.1's output, and exact round trips."""

import mllama
import pytest
import torch
from numerics import assert_same
from torch import zeros
from transformers import MllamaConfig, MllamaForConditionalGeneration

from fastfuse.errors import InvalidArgument
from fastfuse.models.llama3_2_vision import llama3_2_vision_11b
from fastfuse.models.llama3_2_vision._convert_weights import (
    all_aspect_ratios,
    grid_to_rows,
    hf_plan,
    llama3_vision_tune_to_peft_adapter_weights,
    rows_to_grid,
    tune_plan,
)
from fastfuse.models.llama3_2_vision._convert_weights import llama3_vision_hf_to_tune as hf_to_tune
from fastfuse.models.llama3_2_vision._convert_weights import llama3_vision_meta_to_tune as meta_to_tune
from fastfuse.models.llama3_2_vision._convert_weights import llama3_vision_tune_to_hf as tune_to_hf
from fastfuse.models.llama3_2_vision._convert_weights import llama3_vision_tune_to_meta as tune_to_meta
from fastfuse.models.llama3_2_vision._layer_plan import layer_plan
from fastfuse.quant.torchao import to_nf4

RATIOS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
SIZES = {"num_heads": 8, "num_kv_heads": 2, "dim": 64, "vocab_size": mllama.VOCAB, "encoder_dim": 32, "supported_aspect_ratios": RATIOS}
LAYERS, EMBEDDING, TILES = (
    "language_model.model.layers.",
    "language_model.model.embed_tokens.weight",
    "vision_model.pre_tile_positional_embedding.embedding.weight",
)
CONV, GRID = "vision_model.vision_encoder.conv1._linear.weight", "encoder.clip.pre_tile_pos_embed.embedding"


def column(*values):
    return torch.tensor([[float(v)] for v in values])


def hf_state_dict(layers=6, cross=(1, 4)):
    """Names as in memory, every tensor random, the tile tables of two ratios as unlike as training them apart makes them."""
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(mllama.config(cross, layers))
    return {name: torch.randn(t.shape) for name, t in model.state_dict().items()}


def assert_both_ways(hf, tune, **options):
    assert_same(hf_to_tune(hf, **options), tune)
    assert_same(tune_to_hf(tune, **options), hf)


def test_tile_tables_of_torchtune():
    """torchtune's output: the grid holds the ratios of four tiles, and transformers' rows follow from the grid."""
    rows = torch.tensor([[10.0 * ratio + tile for tile in range(4)] for ratio in range(9)])
    options = {"encoder_dim": 1, "supported_aspect_ratios": RATIOS}
    tune = hf_to_tune({TILES: rows}, **options)
    grid = torch.tensor([[80.0, 61, 42, 43], [81, 63, 0, 0], [82, 0, 0, 0], [83, 0, 0, 0]])
    assert_same(tune, {GRID: grid[..., None, None]})
    want = [[0, 0, 0, 0], [80, 0, 0, 0], [80, 61, 0, 0], [80, 61, 42, 0], [80, 61, 42, 43], [80, 81, 0, 0], [80, 61, 81, 63], [80, 81, 82, 0]]
    back = {TILES: torch.tensor([*want, [80, 81, 82, 83]], dtype=torch.float32)}
    assert_both_ways(back, tune, **options)
    assert_same(hf_to_tune(back, **options, check=True), tune)
    assert_both_ways({TILES: rows}, {GRID: rows[:, :, None, None]}, encoder_dim=1, tile_tables="ratios")
    assert [list(ratio) for ratio in all_aspect_ratios(4)] == MllamaConfig().vision_config.supported_aspect_ratios  # the default


def test_cells_of_smaller_ratios_are_kept():
    """torchtune reads the ratios of exactly num_tiles, which for five leave cell (1, 1) of (2, 2) out."""
    grid, kept, ratios = torch.arange(1.0, 26.0).view(5, 5, 1, 1), zeros(5, 5, 1, 1), all_aspect_ratios(5)
    for h, w in ratios:
        kept[:h, :w] = grid[:h, :w]
    assert torch.equal(rows_to_grid(grid_to_rows(grid, ratios), ratios, check=True), kept) and kept[1, 1] == 7
    rows = torch.tensor([[0.0, 0.0], [10, 11], [20, 21], [30, 31]])[..., None, None]  # the smallest ratio is listed last
    assert rows_to_grid(rows, [(1, 2), (2, 1), (1, 1)])[..., 0, 0].tolist() == [[20, 11], [21, 0]]


@pytest.mark.parametrize(
    "spoil, message",
    [
        ((0, 2), "row 0, for padding images, is not zero"),
        ((2, 1), r"aspect ratio \(1, 2\) disagrees with a larger one"),
        ((1, 3), r"aspect ratio \(1, 1\) has padding tiles that are not zero"),
    ],
)
def test_rows_that_no_grid_holds_are_named(spoil, message):
    rows = grid_to_rows(torch.arange(1.0, 65.0).view(4, 4, 2, 2), RATIOS)
    options = {"encoder_dim": 2, "supported_aspect_ratios": RATIOS}
    hf_to_tune({TILES: rows.flatten(1)}, **options, check=True)
    rows[spoil] += 1
    with pytest.raises(ValueError, match=rf'{TILES}: {message}.*tile_tables="ratios" \(the `transformers` profile\)'):
        hf_to_tune({TILES: rows.flatten(1)}, **options, check=True)
    assert_same(hf_to_tune({TILES: rows.flatten(1)}, **options, tile_tables="ratios", check=True), {GRID: rows})


@pytest.mark.parametrize("special", [8, 1])
def test_embedding_is_split_and_joined(special):
    hf = {EMBEDDING: column(*range(5 + special))}
    text, rest = column(*range(5)), column(*range(5, 5 + special))
    assert_both_ways(hf, {"decoder.tok_embeddings.weight": text, "decoder.tok_embeddings.fusion_embedding.weight": rest}, vocab_size=5)
    tune = hf_to_tune(hf, vocab_size=5, tie_word_embeddings=True)
    assert torch.equal(tune["decoder.output.weight"], text)
    assert tune["decoder.output.weight"].data_ptr() != tune["decoder.tok_embeddings.weight"].data_ptr()
    own = hf_to_tune(hf | {"lm_head.weight": column(9, 9, 9, 9, 9)}, vocab_size=5, tie_word_embeddings=True)
    assert torch.equal(own["decoder.output.weight"], column(9, 9, 9, 9, 9))


UNEVEN = {f"decoder.layers.{i}.sa_norm.scale": zeros(1) for i in range(4)}
META_LAYERS = {f"text_model.layers.{i}.attention_norm.weight": zeros(1) for i in range(5)}
META_LAYERS |= {f"text_model.cross_attention_layers.{i}.gate_attn": zeros(1) for i in range(2)}
REGULAR = "Conversion assumes cross attention is added at regular intervals"
UNKNOWN = ["foo.bar", "decoder.layers.0.attn.q_proj.lora_a.weight", "encoder.clip.layers.0.attn.q_proj.magnitude"]
OUTPUT, ALONE = "encoder.projection.output.", "torchtune's DoRA scales the layer's bias and PEFT's does not: base and lora_alpha are needed"
ADAPTER, BASE = ({OUTPUT + part: zeros(1) for part in parts} for parts in (("lora_a.weight", "lora_b.weight", "magnitude"), ("weight", "bias")))
REFUSALS = [
    (meta_to_tune, {CONV: zeros(4, 13)}, {}, "Conversion assumes 3 channel inputs and square patch size"),
    (meta_to_tune, META_LAYERS, {}, REGULAR),
    (tune_to_meta, UNEVEN | {f"decoder.layers.{i}.fusion_layer.ca_norm.scale": zeros(1) for i in (0, 3)}, {}, REGULAR + r": it is at \[0, 3\], not \[1, 3\]"),
    (tune_to_meta, UNEVEN | {"decoder.layers.3.ca_norm.scale": zeros(1)}, {}, REGULAR),  # a cross-attention layer that stands alone
    (hf_to_tune, {LAYERS + "2.self_attn.k_proj.weight": zeros(12, 1)}, {"num_kv_heads": 2, "head_dim": 4}, r"2\.self_attn\.k_proj\.weight has 12 rows, 2 heads of 4 have 8"),
    (hf_to_tune, {TILES: zeros(9, 8)}, {"encoder_dim": 2, "supported_aspect_ratios": RATIOS[:3]}, "has rows for 8 aspect ratios and one for padding, supported_aspect_ratios has 3"),
    (hf_to_tune, {TILES: zeros(9, 8)}, {"encoder_dim": 2, "num_tiles": 3}, "has 8 columns, not a multiple of 3 tiles x encoder_dim 2"),
    (hf_to_tune, {TILES: zeros(9, 8)}, {"encoder_dim": 2, "supported_aspect_ratios": [*RATIOS[:-1], (5, 1)]}, r"has 4 tiles, too few for the aspect ratio \(5, 1\)"),
    (hf_to_tune, {TILES: zeros(9, 8)}, {"tile_tables": "rows"}, "tile_tables is 'rows', not 'grid' or 'ratios'"),
    (tune_to_hf, {GRID: zeros(9, 4, 1, 1)}, {}, r"is \(9, 4, 1, 1\), no grid of tiles: for rows of ratios the form is tile_tables='ratios'"),
    (tune_to_hf, {"decoder.layers.1.ca_norm.scale": zeros(1)}, {"cross_attention_layers": [1, 5]}, r"decoder\.layers\.1 is a cross layer, cross_attention_layers \[1, 5\] make it fusion"),
    (tune_to_hf, {"decoder.tok_embeddings.weight": column(0)}, {}, r"needs both decoder\.tok_embeddings\.weight and"),
    (hf_to_tune, {EMBEDDING: zeros(13, 1)}, {"vocab_size": 99, "tie_word_embeddings": True}, r"embed_tokens\.weight has 13 rows, vocab_size \+ 8 = 107 are needed$"),
    (hf_to_tune, {EMBEDDING: zeros(72, 1)}, {"vocab_size": 72}, r"has 72 rows, vocab_size \+ 8 = 80 are needed \(resize_token_embeddings drops the last\)$"),
    (hf_to_tune, {"lm_head.weight": column(1), "language_model.lm_head.weight": column(2)}, {}, r"lm_head\.weight are both decoder\.output\.weight"),
    (llama3_vision_tune_to_peft_adapter_weights, {"decoder.layers.0.attn.q_proj.weight": zeros(1)}, {}, "unexpected key"),
    *((llama3_vision_tune_to_peft_adapter_weights, ADAPTER, options, rf"output\.magnitude: {ALONE}") for options in ({}, {"base": BASE}, {"lora_alpha": 3})),
    (llama3_vision_tune_to_peft_adapter_weights, ADAPTER, {"base": {OUTPUT + "weight": zeros(1)}, "lora_alpha": 3}, rf"output\.magnitude: base lacks {OUTPUT}bias"),
    (llama3_vision_tune_to_peft_adapter_weights, {OUTPUT + "magnitude": zeros(1)}, {"base": BASE, "lora_alpha": 3}, f"the adapter lacks {OUTPUT}lora_a.weight"),
    *(
        (convert, {key: zeros(1)}, {}, f'Error converting the state dict. Found unexpected key: "{key}". Please make sure')
        for convert in (hf_to_tune, tune_to_hf, meta_to_tune, tune_to_meta) for key in UNKNOWN
    ),
]  # fmt: skip


@pytest.mark.parametrize("convert, given, options, message", REFUSALS)
def test_what_cannot_be_converted_is_refused(convert, given, options, message):
    with pytest.raises(InvalidArgument, match=message):  # a ValueError and an AssertionError
        convert(given, **options)


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "nf4"])
def test_the_bias_of_dora_for_peft(kind):
    """b m / ||W + s B A||, rounded once to the bias' dtype, W as the layer decodes it."""
    dtype = getattr(torch, kind, torch.bfloat16)
    a, b, magnitude, bias = (torch.randn(*size).to(dtype) for size in ((4, 64), (128, 4), (128,), (128,)))
    w = torch.randn(128, 64).to(dtype)
    w = to_nf4(w, block_size=32, scaler_block_size=32) if kind == "nf4" else w
    adapter, base = dict(zip(ADAPTER, (a, b, magnitude), strict=True)), dict(zip(BASE, (w, bias), strict=True))
    converted = llama3_vision_tune_to_peft_adapter_weights(adapter, base=base, lora_alpha=6)
    got = converted["base_model.model.model.multi_modal_projector.base_layer.bias"]
    want = bias.double() * magnitude.double() / (w.to(dtype).double() + 1.5 * b.double() @ a.double()).norm(dim=1)
    assert len(converted) == 4 and got.dtype == dtype
    steps = 80 * 2.0 ** (-53 if kind == "float64" else -24)  # fp32 sums of 64 + 4 products, and what follows
    assert ((got - want).abs() <= (steps + torch.finfo(dtype).eps / 2) * want.abs()).all()
    assert (want - bias).abs().max() > 0.5


@pytest.mark.parametrize(
    "layers, cross",
    [(6, [1, 4]), (4, [0]), (5, [1, 4]), (6, [1, 2, 4]), (3, []), (2, [0, 1])],
    ids=["second", "first", "last", "two in a row", "none", "alone"],
)
def test_round_trip_hf(layers, cross):
    """Bit for bit with a row per ratio; the names in memory come back as the names on disk."""
    hf = hf_state_dict(layers, cross)
    assert hf_to_tune({LAYERS + "0.self_attn.rotary_emb.inv_freq": zeros(2)}) == {}
    for options in ({"cross_attention_layers": cross, "num_hidden_layers": layers}, {}):  # positions given, and from the keys
        options |= SIZES | {"tile_tables": "ratios"}
        tune = hf_to_tune(hf, **options)
        disk = tune_to_hf(tune, **options)
        assert_same(hf_to_tune(disk, **options), tune)
        assert_same({_in_memory(name): t for name, t in disk.items()}, hf)
    assert tune_plan(tune) == tune_plan(tune, cross) == hf_plan(hf) == layer_plan(layers, cross)


def _in_memory(name):
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def test_every_tensor_of_11b_has_its_place():
    """transformers' default config against the builder's model, both on the meta device."""
    with torch.device("meta"):
        hf = MllamaForConditionalGeneration(MllamaConfig()).state_dict()
        model = llama3_2_vision_11b(image_size=448).state_dict()
    tune = hf_to_tune(hf, num_kv_heads=8)
    assert len(tune) == len(tune_to_meta(tune)) == 907 and {n: t.shape for n, t in tune.items()} == {n: t.shape for n, t in model.items()}
    assert len(tune_to_hf(tune, num_kv_heads=8)) == len(hf) == 906
