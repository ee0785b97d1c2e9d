"""Checkpoint layouts of Llama-3.2-Vision: fixed expectations, of which those marked so are torchtune 0.6.1's output, and exact round trips."""

import pytest
import torch
from numerics import assert_rounding_apart
from transformers import MllamaConfig, MllamaForConditionalGeneration

from fastfuse.models.llama3_2_vision import llama3_2_vision_11b
from fastfuse.models.llama3_2_vision._convert_weights import (
    ROWS,
    Layout,
    all_aspect_ratios,
    grid_to_rows,
    hf_plan,
    llama3_vision_hf_to_tune,
    llama3_vision_meta_to_tune,
    llama3_vision_tune_to_hf,
    llama3_vision_tune_to_meta,
    llama3_vision_tune_to_peft_adapter_weights,
    meta_plan,
    rows_to_grid,
    steps_from_tune,
    steps_to_tune,
    tune_plan,
)
from fastfuse.models.llama3_2_vision._layer_plan import LayerEntry, layer_plan
from fastfuse.quant.torchao import to_nf4

RATIOS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
SIZES = {"num_heads": 4, "num_kv_heads": 2, "dim": 32, "vocab_size": 40, "encoder_dim": 16, "num_tiles": 4, "supported_aspect_ratios": RATIOS}
CROSS = {
    "after every second": (6, [1, 4]),
    "first": (4, [0]),
    "last": (5, [1, 4]),
    "two in a row": (6, [1, 2, 4]),
    "none": (3, []),
    "alone": (2, [0, 1]),
}


def column(*values):
    return torch.tensor([[float(v)] for v in values])


def hf_config(layers=6, cross=(1, 4)):
    vision = {"hidden_size": 16, "num_hidden_layers": 2, "num_global_layers": 2, "attention_heads": 2, "intermediate_size": 24, "vision_output_dim": 32}
    vision |= {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [1]}
    text = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
    text |= {"cross_attention_layers": list(cross), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=40)


def hf_state_dict(layers=6, cross=(1, 4), seed=0):
    """Names as in memory, every tensor random, the tile tables of two ratios as unlike as training them apart makes them."""
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(hf_config(layers, cross))
    random = torch.Generator().manual_seed(seed)
    return {name: torch.randn(t.shape, generator=random) for name, t in model.state_dict().items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert got[name].shape == value.shape and torch.equal(got[name], value), name


def test_layer_plan_of_11b_is_torchtunes():
    plan = layer_plan(40, [3, 8, 13, 18, 23, 28, 33, 38])
    assert [i for i, entry in enumerate(plan) if entry.kind == "fusion"] == [3, 7, 11, 15, 19, 23, 27, 31]
    assert len(plan) == 32 and {entry.kind for entry in plan} == {"self", "fusion"}
    assert plan[3] == LayerEntry(hf_cross=3, hf_self=4) and plan[31] == LayerEntry(38, 39) and plan[4] == LayerEntry(None, 5)
    assert meta_plan(32, 8) == plan


def test_layer_plan_of_any_positions():
    assert layer_plan(5, [1, 4]) == [LayerEntry(None, 0), LayerEntry(1, 2), LayerEntry(None, 3), LayerEntry(4)]
    assert layer_plan(5, [2, 1]) == [LayerEntry(None, 0), LayerEntry(1), LayerEntry(2, 3), LayerEntry(None, 4)]
    assert [entry.kind for entry in layer_plan(2, [0, 1])] == ["cross", "cross"]
    assert layer_plan(0, []) == []
    with pytest.raises(ValueError, match=r"cross_attention_layers has \[-1, 4\], the layers are 0 to 3"):
        layer_plan(4, [4, 0, -1])


def test_names_are_unambiguous():
    for form in ("tune", "meta"):
        names = [getattr(row, form) for row in ROWS]
        assert len(set(names)) == len(names)
    names = [(row.hf, row.part) for row in ROWS]
    assert len(set(names)) == len(names) - 1  # the text and the special embedding are one tensor


def test_heads_from_halves_to_pairs():
    """torchtune's output. Cross-attention has no RoPE and keeps its rows."""
    rows = column(*range(12))
    prefix = "language_model.model.layers."
    got = llama3_vision_hf_to_tune({prefix + "0.self_attn.q_proj.weight": rows}, num_heads=2, head_dim=6, dim=1)
    assert_same(got, {"decoder.layers.0.attn.q_proj.weight": column(0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11)})
    both = {prefix + "1.cross_attn.k_proj.weight": rows, prefix + "2.self_attn.k_proj.weight": rows}
    options = {"num_heads": 4, "num_kv_heads": 3, "head_dim": 4, "dim": 1, "cross_attention_layers": [1]}
    got = llama3_vision_hf_to_tune(both, **options)
    want = {"decoder.layers.1.fusion_layer.attn.k_proj.weight": rows}
    want["decoder.layers.1.attn.k_proj.weight"] = column(0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11)
    assert_same(got, want)
    assert_same(llama3_vision_tune_to_hf(got, **options), both)
    with pytest.raises(ValueError, match=r"2\.self_attn\.k_proj\.weight has 12 rows, 2 heads of 4 have 8"):
        llama3_vision_hf_to_tune(both, **{**options, "num_kv_heads": 2})


def test_layers_of_transformers_are_renumbered():
    at = {0: "self", 1: "cross", 2: "cross", 3: "self", 4: "self", 5: "cross"}
    prefix = "language_model.model.layers."
    hf = {f"{prefix}{i}.input_layernorm.weight": torch.tensor([float(i)]) for i in at}
    hf |= {f"{prefix}{i}.mlp.up_proj.weight": torch.tensor([10.0 + i]) for i in at}
    hf |= {f"{prefix}{i}.cross_attn_mlp_gate": torch.tensor([20.0 + i]) for i in (1, 2, 5)}
    tune = llama3_vision_hf_to_tune(hf, cross_attention_layers=[1, 2, 5])
    want = {"0.sa_norm.scale": 0, "1.ca_norm.scale": 1, "2.fusion_layer.ca_norm.scale": 2, "2.sa_norm.scale": 3, "3.sa_norm.scale": 4, "4.ca_norm.scale": 5}
    want |= {"0.mlp.w3.weight": 10, "1.mlp.w3.weight": 11, "2.fusion_layer.mlp.w3.weight": 12, "2.mlp.w3.weight": 13, "3.mlp.w3.weight": 14}
    want |= {"4.mlp.w3.weight": 15, "1.mlp_scale.scale": 21, "2.fusion_layer.mlp_scale.scale": 22, "4.mlp_scale.scale": 25}
    assert_same(tune, {f"decoder.layers.{name}": torch.tensor([float(value)]) for name, value in want.items()})
    assert_same(llama3_vision_tune_to_hf(tune, cross_attention_layers=[1, 2, 5]), hf)
    with pytest.raises(ValueError, match=r"decoder\.layers\.1 is a cross layer, cross_attention_layers \[1, 5\] make it fusion"):
        llama3_vision_tune_to_hf(tune, cross_attention_layers=[1, 5])


def test_meta_layers_and_convolution():
    """torchtune's output."""
    meta = {f"text_model.layers.{i}.attention_norm.weight": torch.tensor([float(i)]) for i in range(6)}
    meta |= {f"text_model.cross_attention_layers.{i}.gate_attn": torch.tensor([10.0 + i]) for i in range(2)}
    meta |= {"vision_model.vision_encoder.conv1._linear.weight": torch.arange(12.0)[None]}
    tune = {f"decoder.layers.{i}.sa_norm.scale": torch.tensor([float(i)]) for i in range(6)}
    tune |= {"decoder.layers.2.fusion_layer.ca_scale.scale": torch.tensor([10.0]), "decoder.layers.5.fusion_layer.ca_scale.scale": torch.tensor([11.0])}
    tune |= {"encoder.clip.conv.weight": torch.arange(12.0).view(1, 3, 2, 2)}
    assert_same(llama3_vision_meta_to_tune({**meta, "text_model.rope.freqs": torch.zeros(2)}), tune)
    assert_same(llama3_vision_tune_to_meta(tune), meta)


@pytest.mark.parametrize("error", [ValueError, AssertionError])
def test_meta_refusals(error):
    conv = {"vision_model.vision_encoder.conv1._linear.weight": torch.zeros(4, 13)}
    with pytest.raises(error, match="Conversion assumes 3 channel inputs and square patch size"):
        llama3_vision_meta_to_tune(conv)
    layers = {f"text_model.layers.{i}.attention_norm.weight": torch.zeros(1) for i in range(5)}
    layers |= {f"text_model.cross_attention_layers.{i}.gate_attn": torch.zeros(1) for i in range(2)}
    with pytest.raises(error, match="Conversion assumes cross attention is added at regular intervals"):
        llama3_vision_meta_to_tune(layers)
    uneven = {f"decoder.layers.{i}.sa_norm.scale": torch.zeros(1) for i in range(4)}
    with pytest.raises(error, match=r"regular intervals: it is at \[0, 3\], not \[1, 3\]"):
        llama3_vision_tune_to_meta(uneven | {f"decoder.layers.{i}.fusion_layer.ca_norm.scale": torch.zeros(1) for i in (0, 3)})
    with pytest.raises(error, match="at regular intervals"):  # a cross-attention layer that stands alone
        llama3_vision_tune_to_meta(uneven | {"decoder.layers.3.ca_norm.scale": torch.zeros(1)})


def test_tile_tables_of_torchtune():
    """torchtune's output: the grid holds the ratios of four tiles, and transformers' rows follow from the grid."""
    name, grid_name = "vision_model.pre_tile_positional_embedding.embedding.weight", "encoder.clip.pre_tile_pos_embed.embedding"
    rows = torch.tensor([[10.0 * ratio + tile for tile in range(4)] for ratio in range(9)])
    tune = llama3_vision_hf_to_tune({name: rows}, encoder_dim=1, supported_aspect_ratios=RATIOS)
    grid = torch.tensor([[80.0, 61, 42, 43], [81, 63, 0, 0], [82, 0, 0, 0], [83, 0, 0, 0]])
    assert_same(tune, {grid_name: grid[..., None, None]})
    want = [[0, 0, 0, 0], [80, 0, 0, 0], [80, 61, 0, 0], [80, 61, 42, 0], [80, 61, 42, 43], [80, 81, 0, 0], [80, 61, 81, 63], [80, 81, 82, 0]]
    back = llama3_vision_tune_to_hf(tune, encoder_dim=1, supported_aspect_ratios=RATIOS)
    assert_same(back, {name: torch.tensor([*want, [80, 81, 82, 83]], dtype=torch.float32)})
    assert_same(llama3_vision_hf_to_tune(back, encoder_dim=1, supported_aspect_ratios=RATIOS, check=True), tune)
    kept = llama3_vision_hf_to_tune({name: rows}, encoder_dim=1, tile_tables="ratios")
    assert_same(kept, {grid_name: rows[:, :, None, None]})
    assert_same(llama3_vision_tune_to_hf(kept, encoder_dim=1, tile_tables="ratios"), {name: rows})


def test_cells_of_smaller_ratios_are_kept():
    """torchtune reads the ratios of exactly num_tiles, which for five leave cell (1, 1) of (2, 2) out."""
    grid = torch.arange(1.0, 26.0).view(5, 5, 1, 1)
    ratios = all_aspect_ratios(5)
    used = torch.zeros(5, 5, dtype=torch.bool)
    for h, w in ratios:
        used[:h, :w] = True
    back = rows_to_grid(grid_to_rows(grid, ratios), ratios, check=True)
    assert torch.equal(back, torch.where(used[..., None, None], grid, 0)) and back[1, 1] == 7
    rows = torch.tensor([[0.0, 0.0], [10, 11], [20, 21], [30, 31]])[..., None, None]  # the smallest ratio is listed last
    assert rows_to_grid(rows, [(1, 2), (2, 1), (1, 1)])[..., 0, 0].tolist() == [[20, 11], [21, 0]]


def test_aspect_ratios_default_to_transformers():
    assert [list(ratio) for ratio in all_aspect_ratios(4)] == hf_config().vision_config.supported_aspect_ratios


@pytest.mark.parametrize(
    "spoil, message",
    [
        ((0, 2), "row 0, for padding images, is not zero"),
        ((2, 1), r"aspect ratio \(1, 2\) disagrees with a larger one"),
        ((1, 3), r"aspect ratio \(1, 1\) has padding tiles that are not zero"),
    ],
)
def test_rows_that_no_grid_holds_are_named(spoil, message):
    name = "vision_model.gated_positional_embedding.tile_embedding.weight"
    rows = grid_to_rows(torch.arange(1.0, 65.0).view(4, 4, 2, 2), RATIOS)
    options = {"encoder_dim": 2, "supported_aspect_ratios": RATIOS}
    llama3_vision_hf_to_tune({name: rows.flatten(1)}, **options, check=True)
    rows[spoil] += 1
    with pytest.raises(ValueError, match=rf'{name}: {message}.*tile_tables="ratios" \(the `transformers` profile\)'):
        llama3_vision_hf_to_tune({name: rows.flatten(1)}, **options, check=True)
    tune = llama3_vision_hf_to_tune({name: rows.flatten(1)}, **options, tile_tables="ratios", check=True)
    assert_same(llama3_vision_tune_to_hf(tune, **options, tile_tables="ratios"), {name: rows.flatten(1)})


@pytest.mark.parametrize(
    "change, message",
    [
        ({"supported_aspect_ratios": RATIOS[:3]}, "has rows for 8 aspect ratios and one for padding, supported_aspect_ratios has 3"),
        ({"num_tiles": 3}, "has 8 columns, not a multiple of 3 tiles x encoder_dim 2"),
        ({"supported_aspect_ratios": [*RATIOS[:-1], (5, 1)]}, r"has 4 tiles, too few for the aspect ratio \(5, 1\)"),
        ({"tile_tables": "rows"}, "tile_tables is 'rows', not 'grid' or 'ratios'"),
    ],
)
def test_tile_table_refusals(change, message):
    rows = {"vision_model.pre_tile_positional_embedding.embedding.weight": torch.zeros(9, 8)}
    with pytest.raises(ValueError, match=message):
        llama3_vision_hf_to_tune(rows, **{"encoder_dim": 2, **change})


@pytest.mark.parametrize("special", [8, 1])
def test_embedding_is_split_and_joined(special):
    hf = {"language_model.model.embed_tokens.weight": column(*range(5 + special))}
    tune = llama3_vision_hf_to_tune(hf, vocab_size=5)
    assert_same(
        tune,
        {
            "decoder.tok_embeddings.weight": column(0, 1, 2, 3, 4),
            "decoder.tok_embeddings.fusion_embedding.weight": column(*range(5, 5 + special)).view(special, 1),
        },
    )
    assert_same(llama3_vision_tune_to_hf(tune, vocab_size=5), hf)
    with pytest.raises(ValueError, match=r"needs both decoder\.tok_embeddings\.weight and"):
        llama3_vision_tune_to_hf({"decoder.tok_embeddings.weight": column(0)})
    for tie in (False, True):
        with pytest.raises(ValueError, match=rf"embed_tokens\.weight has {5 + special} rows, vocab_size \+ 8 = 107 are needed$"):
            llama3_vision_hf_to_tune(hf, vocab_size=99, tie_word_embeddings=tie)


def test_tied_output_is_a_copy_where_asked_for():
    hf = {"language_model.model.embed_tokens.weight": column(*range(7))}
    assert "decoder.output.weight" not in llama3_vision_hf_to_tune(hf, vocab_size=5)
    tune = llama3_vision_hf_to_tune(hf, vocab_size=5, tie_word_embeddings=True)
    assert torch.equal(tune["decoder.output.weight"], column(0, 1, 2, 3, 4))
    assert tune["decoder.output.weight"].data_ptr() != tune["decoder.tok_embeddings.weight"].data_ptr()
    own = llama3_vision_hf_to_tune(hf | {"lm_head.weight": column(9, 9, 9, 9, 9)}, vocab_size=5, tie_word_embeddings=True)
    assert torch.equal(own["decoder.output.weight"], column(9, 9, 9, 9, 9))


@pytest.mark.parametrize("convert", [llama3_vision_hf_to_tune, llama3_vision_tune_to_hf, llama3_vision_meta_to_tune, llama3_vision_tune_to_meta])
@pytest.mark.parametrize("key", ["foo.bar", "decoder.layers.0.attn.q_proj.lora_a.weight", "encoder.clip.layers.0.attn.q_proj.magnitude"])
def test_unexpected_key(convert, key):
    with pytest.raises(Exception, match=f'Error converting the state dict. Found unexpected key: "{key}". Please make sure'):
        convert({key: torch.zeros(1)})


def test_rope_tables_are_left_out():
    assert llama3_vision_hf_to_tune({"language_model.model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}) == {}


def test_one_tensor_under_two_names_is_refused():
    with pytest.raises(ValueError, match=r"lm_head\.weight are both decoder\.output\.weight"):
        llama3_vision_hf_to_tune({"lm_head.weight": column(1), "language_model.lm_head.weight": column(2)})


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "float64", "nf4"])
def test_the_bias_of_dora_for_peft(kind):
    """b m / ||W + s B A||, rounded once to the bias' dtype, W as the layer decodes it."""
    dtype = getattr(torch, kind, torch.bfloat16)
    a, b, magnitude, bias = (torch.randn(*size).to(dtype) for size in ((4, 64), (128, 4), (128,), (128,)))
    w = torch.randn(128, 64).to(dtype)
    w = to_nf4(w, block_size=32, scaler_block_size=32) if kind == "nf4" else w
    module = "encoder.projection.output."
    adapter = {module + "lora_a.weight": a, module + "lora_b.weight": b, module + "magnitude": magnitude}
    converted = llama3_vision_tune_to_peft_adapter_weights(adapter, base={module + "weight": w, module + "bias": bias}, lora_alpha=6)
    got = converted["base_model.model.model.multi_modal_projector.base_layer.bias"]
    want = bias.double() * magnitude.double() / (w.to(dtype).double() + 1.5 * b.double() @ a.double()).norm(dim=1)
    assert len(converted) == 4 and got.dtype == dtype
    steps = 80 * 2.0 ** (-53 if kind == "float64" else -24)  # fp32 sums of 64 + 4 products, and what follows
    assert ((got - want).abs() <= (steps + torch.finfo(dtype).eps / 2) * want.abs()).all()
    assert (want - bias).abs().max() > 0.5


@pytest.mark.parametrize("layers, cross", CROSS.values(), ids=CROSS)
@pytest.mark.parametrize("given", [True, False], ids=["positions given", "positions from the keys"])
def test_round_trip_hf(layers, cross, given):
    """Bit for bit with a row per ratio; the names in memory come back as the names on disk."""
    hf = hf_state_dict(layers, cross)
    options = SIZES | {"tile_tables": "ratios"} | ({"cross_attention_layers": cross, "num_hidden_layers": layers} if given else {})
    tune = llama3_vision_hf_to_tune(hf, **options)
    disk = llama3_vision_tune_to_hf(tune, **options)
    assert_same(llama3_vision_hf_to_tune(disk, **options), tune)
    assert len(disk) == len(hf) and all(torch.equal(a, b) for a, b in zip(disk.values(), (hf[_in_memory(n)] for n in disk), strict=True))
    assert tune_plan(tune) == hf_plan(hf) == layer_plan(layers, cross)
    assert tune_plan(tune, cross) == layer_plan(layers, cross)


def _in_memory(name):
    if name == "language_model.lm_head.weight":
        return "lm_head.weight"
    return "model." + name.replace("language_model.model.", "language_model.")


def test_round_trip_hf_in_grid_form():
    hf = llama3_vision_tune_to_hf(llama3_vision_hf_to_tune(hf_state_dict(), **SIZES), **SIZES)  # consistent tables
    tune = llama3_vision_hf_to_tune(hf, **SIZES, check=True)
    assert_same(llama3_vision_tune_to_hf(tune, **SIZES), hf)
    assert_same(llama3_vision_hf_to_tune(llama3_vision_tune_to_hf(tune, **SIZES), **SIZES), tune)


def test_round_trip_meta():
    tune = llama3_vision_hf_to_tune(hf_state_dict(), **SIZES)
    meta = llama3_vision_tune_to_meta(tune)
    assert all(name.startswith(("text_model.", "vision_model.vision_encoder.", "vision_model.vision_projection.")) for name in meta)
    assert_same(llama3_vision_meta_to_tune(meta), tune)
    assert_same(llama3_vision_tune_to_meta(llama3_vision_meta_to_tune(meta)), meta)


def test_meta_into_rows_of_ratios():
    """A model with a row per ratio takes Meta's grid, and gives it back where its rows agree."""
    name = "encoder.clip.pre_tile_pos_embed.embedding"
    meta = {"vision_model.vision_encoder.pre_tile_pos_embed.embedding": torch.arange(1.0, 17.0).view(4, 4, 1, 1)}
    layout = Layout(num_tiles=4, aspect_ratios=tuple(RATIOS), tile_tables="ratios", check=True)
    ((step,), ()) = (tuple(part) for part in steps_to_tune("meta", meta, layout))
    (rows,) = step.convert(*meta.values())
    assert step.targets == (name,) and rows[6].flatten().tolist() == [1, 2, 5, 6] and not rows[0].any()
    ((step,), ()) = (tuple(part) for part in steps_from_tune("meta", [name], layout))
    (grid,) = step.convert(rows)
    assert grid[..., 0, 0].tolist() == [[1, 2, 3, 4], [5, 6, 0, 0], [9, 0, 0, 0], [13, 0, 0, 0]]


def test_steps_stream():
    """Each source is in one step and each target too; shapes come from meta tensors; what need not move is a view."""
    hf = hf_state_dict()
    layout = Layout(layer_plan(6, [1, 4]), 4, 2, 8, 40, 16, 4, tuple(RATIOS), "ratios")
    steps, unknown = steps_to_tune("hf", hf, layout)
    assert not unknown and sorted(s for step in steps for s in step.sources) == sorted(hf)
    targets = [t for step in steps for t in step.targets]
    assert len(set(targets)) == len(targets) == len(hf) + 1
    assert [step.targets for step in steps if len(step.targets) > 1] == [("decoder.tok_embeddings.weight", "decoder.tok_embeddings.fusion_embedding.weight")]
    for step in steps:
        values = step.convert(*(hf[s] for s in step.sources))
        shapes = step.convert(*(hf[s].to("meta") for s in step.sources))
        assert [v.shape for v in values] == [s.shape for s in shapes]
        if step.kind not in ("q", "k"):
            assert all(v.untyped_storage().data_ptr() == hf[step.sources[0]].untyped_storage().data_ptr() for v in values), step
    back, unknown = steps_from_tune("hf", targets, layout)
    assert not unknown and [step.sources for step in back if len(step.sources) > 1] == [
        ("decoder.tok_embeddings.weight", "decoder.tok_embeddings.fusion_embedding.weight")
    ]


def test_every_tensor_of_11b_has_its_place():
    """transformers' default config against the builder's model, both on the meta device."""
    with torch.device("meta"):
        hf = MllamaForConditionalGeneration(MllamaConfig()).state_dict()
        model = llama3_2_vision_11b(image_size=448).state_dict()
    tune = llama3_vision_hf_to_tune(hf, num_kv_heads=8)
    assert len(tune) == 907 and {n: t.shape for n, t in tune.items()} == {n: t.shape for n, t in model.items()}
    assert len(llama3_vision_tune_to_hf(tune, num_kv_heads=8)) == len(hf) == 906
    assert len(llama3_vision_tune_to_meta(tune)) == 907


def test_peft_adapter_names_and_rows():
    """The names are those PEFT saves for transformers' model, and B A changes as the weight it updates does."""
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    modules = ["q_proj", "k_proj", "o_proj", "down_proj", "fc1"]
    model = get_peft_model(MllamaForConditionalGeneration(hf_config()), LoraConfig(r=2, target_modules=modules, use_dora=True, bias="lora_only"))
    saved = get_peft_model_state_dict(model)
    shapes = llama3_vision_hf_to_tune(hf_state_dict(), **SIZES, tile_tables="ratios")
    tails = ("q_proj.weight", "k_proj.weight", "output_proj.weight")
    adapted = [n for n in shapes if n.endswith(tails) or (n.endswith("w2.weight") and "decoder" in n) or (n.endswith("w1.weight") and "encoder" in n)]
    tune = {}
    for name in adapted:
        rows, columns = shapes[name].shape
        module = name.removesuffix("weight")
        tune |= {module + "lora_a.weight": torch.randn(2, columns), module + "lora_b.weight": torch.randn(rows, 2), module + "magnitude": torch.randn(rows)}
    weights = {name: torch.randn(t.shape) for name, t in shapes.items()}
    got = llama3_vision_tune_to_peft_adapter_weights(tune, 4, 2, 32, cross_attention_layers=[1, 4], num_hidden_layers=6, base=weights, lora_alpha=8)
    assert {name: t.shape for name, t in got.items()} == {name: t.shape for name, t in saved.items()}
    base = {n: tune[n.removesuffix("weight") + "lora_b.weight"] @ tune[n.removesuffix("weight") + "lora_a.weight"] for n in adapted}
    for name, delta in llama3_vision_tune_to_hf(base, 4, 2, 32, cross_attention_layers=[1, 4], num_hidden_layers=6).items():
        prefix = f"base_model.model.{_in_memory(name).removesuffix('weight')}"
        assert_rounding_apart(got[prefix + "lora_B.weight"] @ got[prefix + "lora_A.weight"], delta, K=2)
    with pytest.raises(ValueError, match="unexpected key"):
        llama3_vision_tune_to_peft_adapter_weights({"decoder.layers.0.attn.q_proj.weight": torch.zeros(1)})
