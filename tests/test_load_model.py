"""From a folder of weights to a model that answers: config, builder and checkpoint together."""

import json
import re
import shutil
from functools import partial

import mllama
import pytest
import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration

from fastfuse.checkpoints import load_model, open_checkpoint, save_checkpoint
from fastfuse.models.llama3_2_vision import CONFIGS, Llama3VisionConfig, build, build_lora, llama3_vision_hf_to_tune
from fastfuse.models.llama3_2_vision._config import HF_DEFAULTS
from fastfuse.models.llama3_2_vision._convert_weights import llama3_vision_tune_to_peft_adapter_weights
from fastfuse.modules.peft import LoRALinear

SAMPLES = [["coffee"], ["astronaut", "chelsea"], []]
PARAMS = {  # params.json of the published 11B model
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
    "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vision_chunk_size": 560, "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random Mllama, and the folder transformers saved it into, in shards."""
    theirs = mllama.build(mllama.config((1, 3), 4))
    folder = tmp_path_factory.mktemp("mllama")
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return theirs, folder


def test_what_transformers_saves_gives_the_same_logits(saved):
    theirs, folder = saved
    ours = load_model(folder, profile="transformers")
    assert not ours.training
    batch = mllama.batch(SAMPLES)
    with torch.no_grad():
        got, expected = ours(**mllama.as_fastfuse(batch, theirs.config)), theirs(**batch).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_and_back_it_is_the_same_file_to_the_bit(saved, tmp_path):
    theirs, folder = saved
    ours = load_model(folder, profile="transformers")
    save_checkpoint(ours, tmp_path, config=json.loads((folder / "config.json").read_text()), max_shard_size=100_000)
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    want, got = theirs.state_dict(), again.state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_a_list_of_files_is_a_folder_of_them(saved):
    ours, again = load_model(saved[1], profile="transformers"), load_model(list(saved[1].glob("*.safetensors"))[::-1], profile="transformers")
    assert again.config == ours.config and all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


def test_rows_that_fit_no_grid_are_refused_with_the_profile_that_holds_them(saved):
    with pytest.raises(ValueError, match="the `transformers` profile"):
        load_model(saved[1])


@pytest.mark.parametrize("rows", [72, mllama.VOCAB + 8])
def test_embeddings_resized_in_transformers_are_refused_by_their_rows(saved, tmp_path, rows):
    """resize_token_embeddings makes vocab_size and the rows of the embedding equal; transformers itself cannot load that either."""
    theirs = MllamaForConditionalGeneration.from_pretrained(saved[1])
    theirs.resize_token_embeddings(rows)
    theirs.save_pretrained(tmp_path)
    message = f"language_model.model.embed_tokens.weight has {rows} rows, vocab_size + 8 = {rows + 8} are needed (resize_token_embeddings drops the last)"
    with pytest.raises(ValueError) as e:
        load_model(tmp_path, profile="transformers")
    assert str(e.value) == f"load_checkpoint: {tmp_path}: {message}"
    with pytest.raises(ValueError) as e:
        llama3_vision_hf_to_tune(dict(open_checkpoint(tmp_path)), 8, 2, 64, vocab_size=rows, encoder_dim=32)
    assert str(e.value) == message


def test_a_lora_model_starts_as_its_base(saved):
    theirs, folder = saved
    make = partial(build_lora, lora_attn_modules=["q_proj", "v_proj"], decoder_lora=True, apply_lora_to_mlp=True)
    ours = load_model(folder, profile="transformers", build=make)
    assert sum(isinstance(m, LoRALinear) for m in ours.modules()) > 20
    batch = mllama.batch(SAMPLES)
    with torch.no_grad():
        got, expected = ours(**mllama.as_fastfuse(batch, theirs.config)), theirs(**batch).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def dora_and_base(folder):
    """A DoRA model over all that has adapters, every adapter random; its adapters and base under torchtune's names."""
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    make = partial(build_lora, lora_attn_modules=modules, decoder_lora=True, apply_lora_to_mlp=True, apply_lora_to_output=True, lora_rank=2, lora_alpha=3)
    ours = load_model(folder, profile="transformers", build=partial(make, use_dora=True))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in ours.named_parameters():
            if "lora_" in name or "magnitude" in name:
                p += 0.2 * torch.randn(p.shape, generator=generator)
    state = ours.state_dict()
    adapters = {name: t for name, t in state.items() if "lora_" in name or "magnitude" in name}
    return ours, adapters, {name: t for name, t in state.items() if name not in adapters}


def test_a_dora_adapter_is_the_same_model_in_peft(saved, tmp_path):
    """torchtune's DoRA scales the biases of the vision encoder's MLPs and of the projection, PEFT's does not: the file brings them scaled."""
    theirs, folder = saved
    ours, adapters, base = dora_and_base(folder)
    converted = llama3_vision_tune_to_peft_adapter_weights(adapters, 8, 2, 64, None, [1, 3], 4, base=base, lora_alpha=3)
    assert sum(name.endswith("base_layer.bias") for name in converted) == (4 + 2) * 2 + 1  # layers of the encoder and the head, the projection
    targets = sorted({name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in converted if name.endswith("lora_A.weight")})
    LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True).save_pretrained(tmp_path)
    save_file({name: t.contiguous() for name, t in converted.items()}, tmp_path / "adapter_model.safetensors")
    tuned = PeftModel.from_pretrained(MllamaForConditionalGeneration.from_pretrained(folder, attn_implementation="eager"), tmp_path).eval()
    batch = mllama.batch(SAMPLES)
    with torch.no_grad():
        got, expected = tuned(**batch).logits, ours(**mllama.as_fastfuse(batch, theirs.config))
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_dora_over_a_bias_needs_the_base_to_go_to_peft(saved):
    _, adapters, base = dora_and_base(saved[1])
    sizes, module = (8, 2, 64, None, [1, 3], 4), "encoder.projection.output"
    own = {name: t for name, t in adapters.items() if name.startswith(module)}
    for given in ({}, {"base": base}, {"lora_alpha": 3}):
        with pytest.raises(ValueError, match=rf"{module}\.magnitude: torchtune's DoRA scales the layer's bias and PEFT's does not: base and lora_alpha"):
            llama3_vision_tune_to_peft_adapter_weights(own, *sizes, **given)
    with pytest.raises(ValueError, match=rf"{module}\.magnitude: base lacks {module}\.bias"):
        llama3_vision_tune_to_peft_adapter_weights(own, *sizes, base={f"{module}.weight": base[f"{module}.weight"]}, lora_alpha=3)
    with pytest.raises(ValueError, match=rf"{module}\.magnitude: the adapter lacks {module}\.lora_b\.weight"):
        llama3_vision_tune_to_peft_adapter_weights({k: t for k, t in own.items() if "lora_b" not in k}, *sizes, base=base, lora_alpha=3)
    without_bias = {name: t for name, t in adapters.items() if ".attn." in name}
    assert not any("bias" in name for name in llama3_vision_tune_to_peft_adapter_weights(without_bias, *sizes))


def test_dtype_is_of_every_parameter_and_rotary_tables_stay_fp32(saved):
    ours = load_model(saved[1], profile="transformers", dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.decoder.layers[0].attn.pos_embeddings.cache.dtype == torch.float32
    with torch.no_grad():
        logits = ours(**mllama.as_fastfuse(mllama.batch([[]]), saved[0].config))
    assert logits.dtype == torch.float32 and logits.isfinite().all()


def mixed(theirs, folder, **config):
    """What prepare_model_for_kbit_training and a merge leave: norms, embedding and head in fp32, matrices in bf16."""
    theirs.save_pretrained(folder, max_shard_size="60KB")
    for file in folder.glob("*.safetensors"):
        wide = ("norm", "embed", "lm_head", "gate")
        save_file({n: t if any(w in n for w in wide) else t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    whole = json.loads((folder / "config.json").read_text())
    whole.pop("dtype")
    (folder / "config.json").write_text(json.dumps(whole | config))


@pytest.mark.parametrize(
    "config", [{"torch_dtype": "bfloat16"}, {"dtype": "bfloat16"}, {"dtype": "float16", "torch_dtype": "bfloat16"}, {"dtype": None}], ids=str
)
def test_a_file_of_several_dtypes_becomes_one_as_transformers_makes_it(tmp_path, config):
    made = mllama.config()
    mixed(mllama.build(made), tmp_path, **config)
    assert {checkpoint.meta(name).dtype for checkpoint in [open_checkpoint(tmp_path)] for name in checkpoint} == {torch.float32, torch.bfloat16}
    ours, theirs = load_model(tmp_path, profile="transformers"), MllamaForConditionalGeneration.from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()} == {theirs.dtype}
    sizes = {"num_heads": 8, "num_kv_heads": 2, "dim": 64, "vocab_size": mllama.VOCAB, "encoder_dim": 32, "tile_tables": "ratios"}
    want = llama3_vision_hf_to_tune(theirs.state_dict(), **sizes)
    assert want.keys() == ours.state_dict().keys() and all(torch.equal(t, want[name]) for name, t in ours.state_dict().items())
    batch = mllama.as_fastfuse(mllama.batch(SAMPLES), made)
    batch["encoder_input"]["images"] = batch["encoder_input"]["images"].to(theirs.dtype)
    with torch.no_grad():
        assert ours(**batch).isfinite().all()


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "auto", {"": "bfloat16"}], ids=str)
def test_a_config_whose_dtype_no_model_computes_in_is_refused(saved, tmp_path, dtype):
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    whole = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(whole | {"dtype": dtype}))
    with pytest.raises(ValueError, match=re.escape(f"config.json has dtype {dtype!r}, expected a floating point one such as 'bfloat16': pass dtype")):
        load_model(tmp_path, profile="transformers")
    assert {p.dtype for p in load_model(tmp_path, profile="transformers", dtype=torch.float32).parameters()} == {torch.float32}


def test_published_sizes_from_either_config():
    assert Llama3VisionConfig.from_meta(PARAMS) == CONFIGS["11b"]
    large = PARAMS | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "vision_num_cross_attention_layers": 20}
    assert Llama3VisionConfig.from_meta(large) == CONFIGS["90b"]
    published = MllamaConfig().to_dict()  # transformers' defaults are 11B's base model, but for the rope scaling
    published["text_config"]["rope_parameters"] = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = Llama3VisionConfig.from_hf(published)
    scaling = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    cross = (3, 8, 13, 18, 23, 28, 33, 38)
    assert config == CONFIGS["11b"].replace(tile_size=448, encoder_max_seq_len=20 * 4100, rope_scaling=scaling, cross_attention_layers=cross)


@pytest.mark.parametrize("made", [Llama3VisionConfig.from_hf(mllama.config()), CONFIGS["11b"], CONFIGS["90b"]], ids=["small", "11b", "90b"])
def test_a_config_survives_the_way_to_transformers_and_back(made):
    back = Llama3VisionConfig.from_hf(MllamaConfig(**made.to_hf()))
    with torch.device("meta"):
        want, got = build(made).state_dict(), build(back).state_dict()
    assert {k: v.shape for k, v in got.items()} == {k: v.shape for k, v in want.items()}
    assert back.to_hf() == made.to_hf()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"vision_config": {"hidden_act": "relu"}}, "config: hidden_act is 'relu', covered: 'gelu'"),
        ({"text_config": {"hidden_act": "gelu"}}, "config: hidden_act is 'gelu', covered: 'silu'"),
        ({"text_config": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}}, "config: rope_type is 'yarn', covered: 'default', 'llama3'"),
        ({"text_config": {"head_dim": 48}}, "config: head_dim is 48, covered"),
        ({"vision_config": {"image_size": [448, 560]}}, r"config: image_size is \[448, 560\], tiles and patches are square here"),
        ({"vision_config": {"max_num_tiles": 2}}, "config: vision_config.max_num_tiles is 2, the default supported_aspect_ratios are for 4"),
        ({"text_config": {"hidden_size": None}}, "config: text_config.hidden_size is null, the default is 4096"),
        ({"vision_config": {"patch_size": None}}, "config: vision_config.patch_size is null, the default is 14"),
        ({"text_config": {"num_attention_heads": 0}}, "config: text_config.num_attention_heads is 0, expected a whole number, at least 1"),
        ({"text_config": {"hidden_size": "4096"}}, "config: text_config.hidden_size is '4096', expected a whole number, at least 1"),
        ({"text_config": {"num_hidden_layers": -1}}, "config: text_config.num_hidden_layers is -1, expected a whole number, at least 0"),
        ({"vision_config": {"patch_size": 0}}, "config: vision_config.patch_size is 0, expected a whole number, at least 1"),
        ({"vision_config": {"image_size": ["a", "a"]}}, r"config: vision_config.image_size is \['a', 'a'\], expected a whole number, at least 1"),
        ({"text_config": {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}}, "rope_type is 'llama3', low_freq_factor, high_freq_factor missing"),
    ],
)
def test_a_config_the_architecture_has_no_place_for_is_refused(change, message):
    whole = mllama.config().to_dict()
    for part, values in change.items():
        whole[part] |= values
    with pytest.raises(ValueError, match=message):
        Llama3VisionConfig.from_hf(whole)
    with pytest.raises(ValueError, match="config has model_type 'llama', expected 'mllama'"):
        Llama3VisionConfig.from_hf({"model_type": "llama"})
    with pytest.raises(ValueError, match="params: dim missing"):
        Llama3VisionConfig.from_meta({k: v for k, v in PARAMS.items() if k != "dim"})


@pytest.mark.parametrize(
    "config, message",
    [
        ("x", "config is 'x', expected transformers' MllamaConfig or the dict in config.json"),
        ({"model_type": "mllama", "text_config": "x"}, "config: text_config is 'x', expected a dict"),
        ({"model_type": "mllama", "vision_config": [1]}, "config: vision_config is [1], expected a dict"),
        ({"model_type": "mllama", "image_token_index": "x"}, "config: image_token_index is 'x', expected a whole number, at least 0"),
    ],
)
def test_what_is_no_config(config, message):
    with pytest.raises(ValueError) as e:
        Llama3VisionConfig.from_hf(config)
    assert str(e.value) == message


def test_a_null_beside_the_key_of_another_name():
    for vision in (
        {"attention_heads": None, "num_attention_heads": 8},
        {"num_attention_heads": 8, "attention_heads": None},
        {"num_attention_heads": None, "attention_heads": 8},
    ):
        assert Llama3VisionConfig.from_hf({"model_type": "mllama", "vision_config": vision}).clip_num_heads == 8
    assert Llama3VisionConfig.from_hf({"model_type": "mllama", "image_token_index": None, "image_token_id": 7}).image_token_id == 7


def differences(given, defaults):
    """What transformers 4.45 to 4.49 write: keys that have their class's default value are left out."""
    made = {key: differences(value, defaults.get(key, {})) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in made.items() if key in ("model_type", "image_token_index") or value not in (defaults.get(key), {})}


def test_defaults_are_transformers():
    """Every key that is read has the value transformers gives it where a file leaves it out."""
    theirs = MllamaConfig(vision_config={}, text_config={}).to_dict()
    theirs["text_config"]["rope_theta"] = theirs["text_config"]["rope_parameters"]["rope_theta"]  # its place until transformers 5
    for part in ("vision_config", "text_config"):
        assert {key: theirs[part][key] for key in HF_DEFAULTS[part]} == HF_DEFAULTS[part]
    assert theirs["image_token_index"] == HF_DEFAULTS["image_token_index"]


@pytest.mark.parametrize(
    "alone",
    [
        {"model_type": "mllama", "image_token_index": 128256, "text_config": {"model_type": "mllama_text_model"}, "vision_config": {"model_type": "mllama_vision_model"}},
        {"model_type": "mllama", "text_config": None, "vision_config": {}},
        {"model_type": "mllama"},
    ],
    ids=["as 4.49 writes it", "null", "absent"],
)  # fmt: skip
def test_a_config_of_nothing_but_defaults(alone):
    assert Llama3VisionConfig.from_hf(alone) == Llama3VisionConfig.from_hf(MllamaConfig())


def test_a_config_of_differences_alone(tmp_path):
    made = mllama.config(cross=(1, 3), num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-6)
    theirs = mllama.build(made)
    theirs.save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "config.json").read_text())
    alone = differences(whole, MllamaConfig().to_dict())
    assert not {"num_attention_heads", "num_key_value_heads"} & alone["text_config"].keys() and "patch_size" not in alone["vision_config"]
    assert Llama3VisionConfig.from_hf(alone) == Llama3VisionConfig.from_hf(whole)
    (tmp_path / "config.json").write_text(json.dumps(alone))
    ours = load_model(tmp_path, profile="transformers")
    batch = mllama.batch(SAMPLES)
    with torch.no_grad():
        got, expected = ours(**mllama.as_fastfuse(batch, made)), theirs(**batch).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()
    save_checkpoint(ours.state_dict(), tmp_path / "again", config=alone)
    again = MllamaForConditionalGeneration.from_pretrained(tmp_path / "again").state_dict()
    assert all(torch.equal(again[name], t) for name, t in theirs.state_dict().items())


@pytest.mark.parametrize("scaled", [True, False])
def test_a_saved_folder_names_its_rope_for_both_generations(tmp_path, scaled):
    """transformers 4.45 to 4.57 read rope_theta and rope_scaling, which they need for unscaled rotary embeddings too; 5 reads rope_parameters."""
    config = Llama3VisionConfig.from_hf(mllama.config()).replace(rope_base=10_000.0, **({} if scaled else {"rope_scaling": None}))
    ours = mllama.randomize(build(config)).eval()
    save_checkpoint(ours, tmp_path)
    scaling = {"rope_type": "default"}
    if scaled:
        scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    text = json.loads((tmp_path / "config.json").read_text())["text_config"]
    assert {key: value for key, value in text.items() if "rope" in key} == {
        "rope_theta": 10_000.0,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": 10_000.0},
    }
    assert all(type(value) is float for key, value in scaling.items() if "factor" in key)  # others are warned about
    theirs, ours = MllamaForConditionalGeneration.from_pretrained(tmp_path).eval(), load_model(tmp_path, profile="transformers")
    theirs.set_attn_implementation("eager")
    batch = mllama.batch(SAMPLES)
    with torch.no_grad():
        got, expected = ours(**mllama.as_fastfuse(batch, mllama.config())), theirs(**batch).logits
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("old", ["4.45", "type", "theta beside rope_parameters", "both"])
def test_rope_under_the_names_of_every_version(old):
    """The same model from rope_theta and rope_scaling as from transformers 5's rope_parameters; what transformers makes of them too."""
    text = mllama.config().to_dict()["text_config"]
    rope = text.pop("rope_parameters") | {"rope_theta": 10_000.0}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    forms = {
        "4.45": {"rope_theta": 10_000.0, "rope_scaling": scaling},
        "type": {"rope_theta": 10_000.0, "rope_scaling": {"type" if key == "rope_type" else key: value for key, value in scaling.items()}},
        "theta beside rope_parameters": {"rope_theta": 10_000.0, "rope_parameters": scaling},
        "both": {"rope_theta": 10_000.0, "rope_scaling": scaling, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}},
    }
    theirs = MllamaConfig(text_config=text | forms[old]).text_config.rope_parameters
    assert {key: theirs[key] for key in rope} == rope
    want = Llama3VisionConfig.from_hf(MllamaConfig(text_config=text | {"rope_parameters": rope}))
    assert Llama3VisionConfig.from_hf({"model_type": "mllama", "text_config": text | forms[old]}) == want
    assert want.rope_base == 10_000 and want.rope_scaling["scale_factor"] == 8


def test_weights_without_a_config_need_one(saved, tmp_path):
    ours = load_model(saved[1], profile="transformers")
    save_checkpoint(ours, tmp_path / "model.safetensors", format="tune")
    with pytest.raises(ValueError, match=r"neither config\.json nor params\.json beside it: pass config"):
        load_model(tmp_path / "model.safetensors", profile="transformers")
    config = Llama3VisionConfig.from_hf(saved[0].config)
    again = load_model(tmp_path / "model.safetensors", profile="transformers", config=config)
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))


def test_a_saved_model_brings_its_config(saved, tmp_path):
    ours = load_model(saved[1], profile="transformers")
    save_checkpoint(ours, tmp_path)
    again = load_model(tmp_path, profile="transformers")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), ours.state_dict().values(), strict=True))
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16', expected a floating point torch\.dtype"):
        load_model(tmp_path, profile="transformers", dtype="bfloat16")
    for nothing in ({}, None):
        with pytest.raises(ValueError, match="save_checkpoint: model is"):
            save_checkpoint(nothing, tmp_path / "x", format="tune")


@pytest.mark.parametrize("start", ["meta", "cpu"])
@pytest.mark.parametrize("profile", ["torchtune", "transformers"])
def test_to_empty_and_a_state_dict_make_a_whole_model(start, profile):
    config = Llama3VisionConfig.from_hf(mllama.config())
    want = mllama.randomize(build(config, profile=profile)).eval()
    with torch.device(start):
        model = build(config, profile=profile).eval()
    model.to_empty(device="cpu").load_state_dict(want.state_dict())
    batch = mllama.as_fastfuse(mllama.batch(SAMPLES), mllama.config())
    with torch.no_grad():
        assert torch.equal(model(**batch), want(**batch))


def test_a_magnitude_alone_that_the_file_lacks_is_made(saved, tmp_path):
    """A file of LoRA adapters, loaded into a DoRA model that is built on the meta device."""
    config = Llama3VisionConfig.from_hf(saved[0].config)
    make = partial(build_lora, lora_attn_modules=["q_proj"], decoder_lora=True)
    lora = load_model(saved[1], profile="transformers", build=make)
    torch.nn.init.normal_(lora.decoder.layers[0].attn.q_proj.lora_b.weight)
    save_checkpoint(lora, tmp_path / "lora.safetensors", format="tune")
    dora = load_model(tmp_path / "lora.safetensors", profile="transformers", config=config, build=partial(make, use_dora=True))
    assert not any(p.is_meta for p in dora.parameters())
    batch = mllama.as_fastfuse(mllama.batch(SAMPLES), saved[0].config)
    with torch.no_grad():
        want, got = lora(**batch), dora(**batch)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # magnitude / norm is one in a new DoRA layer


def test_half_an_adapter_is_refused(saved, tmp_path):
    config = Llama3VisionConfig.from_hf(saved[0].config)
    make = partial(build_lora, lora_attn_modules=["q_proj"], decoder_lora=True)
    state = load_model(saved[1], profile="transformers", build=make).state_dict()
    half = {k: v for k, v in state.items() if k != "decoder.layers.0.attn.q_proj.lora_b.weight"}
    save_checkpoint(half, tmp_path / "half.safetensors", format="tune")
    with pytest.raises(ValueError, match=r"the file has no decoder\.layers\.0\.attn\.q_proj\.lora_b\.weight, but other parts of that adapter"):
        load_model(tmp_path / "half.safetensors", profile="transformers", config=config, build=make)
