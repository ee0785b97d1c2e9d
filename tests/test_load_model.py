"""From a folder of weights to a model that answers: config, builder and checkpoint together."""

import json
import re
import shutil
from functools import partial

import mllama
import pytest
import torch
from numerics import assert_same
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file, save_file
from transformers import MllamaConfig, MllamaForConditionalGeneration

from fastfuse.checkpoints import load_model, open_checkpoint, save_checkpoint
from fastfuse.models.llama3_2_vision import CONFIGS, Llama3VisionConfig, build, build_lora
from fastfuse.models.llama3_2_vision._config import HF_DEFAULTS
from fastfuse.models.llama3_2_vision._convert_weights import llama3_vision_tune_to_peft_adapter_weights

PARAMS = {  # params.json of the published 11B model
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
    "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True, "vision_chunk_size": 560, "vision_max_num_chunks": 4,
    "vision_num_cross_attention_layers": 8,
}  # fmt: skip
from_hf = Llama3VisionConfig.from_hf
load = partial(load_model, profile="transformers")
from_pretrained = MllamaForConditionalGeneration.from_pretrained


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A random Mllama, and the folder transformers saved it into, in shards."""
    theirs = mllama.build(mllama.config((1, 3), 4))
    folder = tmp_path_factory.mktemp("mllama")
    theirs.save_pretrained(folder, max_shard_size="60KB")
    assert len(list(folder.glob("*.safetensors"))) > 3
    return theirs, folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def test_what_transformers_saves_gives_the_same_logits_and_comes_back_to_the_bit(saved, tmp_path):
    theirs, folder = saved
    ours = load(folder)
    assert not ours.training
    mllama.assert_same_logits(ours, theirs)
    save_checkpoint(ours, tmp_path, config=config_of(folder), max_shard_size=100_000)
    assert_same(from_pretrained(tmp_path), theirs)


@pytest.fixture(scope="module")
def dora(saved):
    """A DoRA model over all that has adapters, every adapter random; its adapters and base under torchtune's names."""
    modules = ["q_proj", "k_proj", "v_proj", "output_proj"]
    make = partial(build_lora, lora_attn_modules=modules, decoder_lora=True, apply_lora_to_mlp=True, apply_lora_to_output=True, lora_rank=2, lora_alpha=3)
    ours = load(saved[1], build=partial(make, use_dora=True))
    state = ours.state_dict()
    adapters = {name: t for name, t in state.items() if "lora_" in name or "magnitude" in name}
    for t in adapters.values():
        t += 0.2 * torch.randn(t.shape)
    return ours, adapters, {name: t for name, t in state.items() if name not in adapters}


to_peft = partial(
    llama3_vision_tune_to_peft_adapter_weights, num_heads=8, num_kv_heads=2, dim=64, head_dim=None, cross_attention_layers=[1, 3], num_hidden_layers=4
)


def test_a_dora_adapter_is_the_same_model_in_peft(saved, dora, tmp_path):
    """torchtune's DoRA scales the biases of the vision encoder's MLPs and of the projection, PEFT's does not: the file brings them scaled."""
    ours, adapters, base = dora
    assert not any("bias" in name for name in to_peft({name: t for name, t in adapters.items() if ".attn." in name}))
    found = to_peft(adapters, base=base, lora_alpha=3)
    assert sum(name.endswith("base_layer.bias") for name in found) == (4 + 2) * 2 + 1  # layers of the encoder and the head, the projection
    targets = sorted({name.removeprefix("base_model.model.").rsplit(".", 2)[0] for name in found if name.endswith("lora_A.weight")})
    LoraConfig(r=2, lora_alpha=3, target_modules=targets, use_dora=True).save_pretrained(tmp_path)
    save_file({name: t.contiguous() for name, t in found.items()}, tmp_path / "adapter_model.safetensors")
    mllama.assert_same_logits(ours, PeftModel.from_pretrained(from_pretrained(saved[1], attn_implementation="eager"), tmp_path).eval())


def test_dtype_is_of_every_parameter_and_rotary_tables_stay_fp32(saved):
    ours = load(saved[1], dtype=torch.bfloat16)
    assert {p.dtype for p in ours.parameters()} == {torch.bfloat16}
    assert ours.decoder.layers[0].attn.pos_embeddings.cache.dtype == torch.float32
    with torch.no_grad():
        logits = ours(**mllama.as_fastfuse(mllama.batch([[]]), saved[0].config))
    assert logits.dtype == torch.float32 and logits.isfinite().all()
    with pytest.raises(ValueError, match=r"dtype is 'bfloat16', expected a floating point torch\.dtype"):
        load(saved[1], dtype="bfloat16")


@pytest.mark.parametrize("config", [{"torch_dtype": "bfloat16"}, {"dtype": "float16", "torch_dtype": "bfloat16"}, {"dtype": None}], ids=str)
def test_a_file_of_several_dtypes_becomes_one_as_transformers_makes_it(saved, tmp_path, config):
    """What prepare_model_for_kbit_training and a merge leave: norms, embedding and head in fp32, matrices in bf16."""
    saved[0].save_pretrained(tmp_path, max_shard_size="60KB")
    for file in tmp_path.glob("*.safetensors"):
        wide = ("norm", "embed", "lm_head", "gate")
        save_file({n: t if any(w in n for w in wide) else t.bfloat16() for n, t in load_file(file).items()}, file, metadata={"format": "pt"})
    whole = config_of(tmp_path)
    whole.pop("dtype")
    (tmp_path / "config.json").write_text(json.dumps(whole | config))
    checkpoint = open_checkpoint(tmp_path)
    assert {checkpoint.meta(name).dtype for name in checkpoint} == {torch.float32, torch.bfloat16}
    ours, theirs = load(tmp_path), from_pretrained(tmp_path)
    assert {p.dtype for p in ours.parameters()} == {p.dtype for p in theirs.parameters()} == {theirs.dtype}
    assert_same(ours, mllama.converted(theirs))


def test_a_config_whose_dtype_no_model_computes_in_is_refused(saved, tmp_path):
    shutil.copytree(saved[1], tmp_path, dirs_exist_ok=True)
    for dtype in ("int8", "float8_e4m3fn", "auto", {"": "bfloat16"}):
        (tmp_path / "config.json").write_text(json.dumps(config_of(saved[1]) | {"dtype": dtype}))
        with pytest.raises(ValueError, match=re.escape(f"config.json has dtype {dtype!r}, expected a floating point one such as 'bfloat16': pass dtype")):
            load(tmp_path)
    assert {p.dtype for p in load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


SCALING = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def test_published_sizes_from_either_config():
    assert Llama3VisionConfig.from_meta(PARAMS) == CONFIGS["11b"]
    large = PARAMS | {"dim": 8192, "n_layers": 80, "n_heads": 64, "multiple_of": 4096, "vision_num_cross_attention_layers": 20}
    assert Llama3VisionConfig.from_meta(large) == CONFIGS["90b"]
    published = MllamaConfig().to_dict()  # transformers' defaults are 11B's base model, but for the rope scaling
    published["text_config"]["rope_parameters"] = {"rope_type": "llama3", "rope_theta": 500000.0} | SCALING
    scaling = {"scale_factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "old_context_len": 8192}
    want = CONFIGS["11b"].replace(rope_scaling=scaling, cross_attention_layers=tuple(range(3, 40, 5)))
    for side in (448, 560):
        published["vision_config"]["image_size"] = side
        assert from_hf(published) == want.replace(tile_size=side, encoder_max_seq_len=20 * 4 * ((side // 14) ** 2 + 1))


@pytest.mark.parametrize("made", [from_hf(mllama.config()), CONFIGS["11b"], CONFIGS["90b"]], ids=["small", "11b", "90b"])
def test_a_config_survives_the_way_to_transformers_and_back(made):
    back = from_hf(MllamaConfig(**made.to_hf()))
    assert back.to_hf() == made.to_hf()
    assert back.replace(rope_scaling=made.rope_scaling, cross_attention_layers=made.cross_attention_layers) == made


REFUSED = [  # a part of a good config, what is changed in it, what is said
    ("vision_config", {"hidden_act": "relu"}, "config: hidden_act is 'relu', covered: 'gelu'"),
    ("text_config", {"hidden_act": "gelu"}, "config: hidden_act is 'gelu', covered: 'silu'"),
    ("text_config", {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}}, "config: rope_type is 'yarn', covered: 'default', 'llama3'"),
    ("text_config", {"head_dim": 48}, "config: head_dim is 48, covered: None, 8"),
    ("vision_config", {"image_size": [448, 560]}, "config: image_size is [448, 560], tiles and patches are square here"),
    ("vision_config", {"max_num_tiles": 2}, "config: vision_config.max_num_tiles is 2, the default supported_aspect_ratios are for 4"),
    ("text_config", {"hidden_size": None}, "config: text_config.hidden_size is null, the default is 4096: leave it out or give a value"),
    ("text_config", {"num_attention_heads": 0}, "config: text_config.num_attention_heads is 0, expected a whole number, at least 1"),
    ("text_config", {"hidden_size": "4096"}, "config: text_config.hidden_size is '4096', expected a whole number, at least 1"),
    ("text_config", {"num_hidden_layers": -1}, "config: text_config.num_hidden_layers is -1, expected a whole number, at least 0"),
    ("vision_config", {"image_size": ["a", "a"]}, "config: vision_config.image_size is ['a', 'a'], expected a whole number, at least 1"),
    (
        "text_config",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
        "config: rope_type is 'llama3', low_freq_factor, high_freq_factor missing",
    ),
    (None, "x", "config is 'x', expected transformers' MllamaConfig or the dict in config.json"),
    (None, {"model_type": "llama"}, "config has model_type 'llama', expected 'mllama'"),
    (None, {"model_type": "mllama", "text_config": "x"}, "config: text_config is 'x', expected a dict"),
    (None, {"model_type": "mllama", "vision_config": [1]}, "config: vision_config is [1], expected a dict"),
    (None, {"model_type": "mllama", "image_token_index": "x"}, "config: image_token_index is 'x', expected a whole number, at least 0"),
]


@pytest.mark.parametrize("part, change, message", REFUSED)
def test_a_config_the_architecture_has_no_place_for_is_refused(part, change, message):
    whole = mllama.config().to_dict()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        from_hf(whole | {part: whole[part] | change} if part else change)


def test_params_without_a_size_are_refused():
    with pytest.raises(ValueError, match="params: dim, n_heads, vocab_size, vision_chunk_size, vision_num_cross_attention_layers missing"):
        Llama3VisionConfig.from_meta({"n_layers": 32})


def test_a_null_beside_the_key_of_another_name():
    for vision in ({"attention_heads": None, "num_attention_heads": 8}, {"num_attention_heads": None, "attention_heads": 8}):
        assert from_hf({"model_type": "mllama", "vision_config": vision}).clip_num_heads == 8
    assert from_hf({"model_type": "mllama", "image_token_index": None, "image_token_id": 7}).image_token_id == 7


def test_what_a_config_leaves_out_is_transformers_default():
    """Every key that is read has the value transformers gives it where a file leaves it out."""
    theirs = MllamaConfig(vision_config={}, text_config={}).to_dict()
    theirs["text_config"]["rope_theta"] = theirs["text_config"]["rope_parameters"]["rope_theta"]  # its place until transformers 5
    for part in ("vision_config", "text_config"):
        assert {key: theirs[part][key] for key in HF_DEFAULTS[part]} == HF_DEFAULTS[part]
    assert theirs["image_token_index"] == HF_DEFAULTS["image_token_index"]
    as_449_writes_it = {"text_config": {"model_type": "mllama_text_model"}, "vision_config": {"model_type": "mllama_vision_model"}}
    for alone in (as_449_writes_it | {"image_token_index": 128256}, {"text_config": None, "vision_config": {}}, {}):
        assert from_hf({"model_type": "mllama"} | alone) == from_hf(MllamaConfig())


def test_a_config_that_leaves_defaults_out(tmp_path):
    """As transformers 4.45 to 4.49 write it."""
    theirs = mllama.build(mllama.config(cross=(1, 3), num_attention_heads=32, num_key_value_heads=8, rms_norm_eps=1e-6))
    alone = theirs.config.to_dict()
    for part, key in (("text_config", "num_attention_heads"), ("text_config", "num_key_value_heads"), ("vision_config", "patch_size")):
        assert alone[part].pop(key) == HF_DEFAULTS[part][key]
    assert from_hf(alone) == from_hf(theirs.config)
    theirs.save_pretrained(tmp_path)
    save_checkpoint(load(tmp_path).state_dict(), tmp_path / "again", config=alone)
    assert_same(from_pretrained(tmp_path / "again"), theirs)


@pytest.mark.parametrize("scaled", [True, False])
def test_a_saved_folder_names_its_rope_for_both_generations(tmp_path, scaled):
    """transformers 4.45 to 4.57 read rope_theta and rope_scaling, which they need for unscaled rotary embeddings too; 5 reads rope_parameters."""
    config = from_hf(mllama.config()).replace(rope_base=10_000.0, **({} if scaled else {"rope_scaling": None}))
    save_checkpoint(mllama.randomize(build(config)), tmp_path)
    scaling = {"rope_type": "llama3"} | SCALING | {"original_max_position_embeddings": 64} if scaled else {"rope_type": "default"}
    text = config_of(tmp_path)["text_config"]
    assert {key: value for key, value in text.items() if "rope" in key} == {
        "rope_theta": 10_000.0,
        "rope_scaling": scaling,
        "rope_parameters": scaling | {"rope_theta": 10_000.0},
    }
    assert all(type(value) is float for key, value in text["rope_scaling"].items() if "factor" in key)  # others are warned about
    mllama.assert_same_logits(load(tmp_path), from_pretrained(tmp_path, attn_implementation="eager").eval())


@pytest.mark.parametrize("old", ["4.45", "type", "theta beside rope_parameters", "both"])
def test_rope_under_the_names_of_every_version(old):
    """The same model from rope_theta and rope_scaling as from transformers 5's rope_parameters; what transformers makes of them too."""
    text = mllama.config().to_dict()["text_config"]
    rope = text.pop("rope_parameters") | {"rope_theta": 10_000.0}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    forms = {
        "4.45": {"rope_scaling": scaling},
        "type": {"rope_scaling": {"type" if key == "rope_type" else key: value for key, value in scaling.items()}},
        "theta beside rope_parameters": {"rope_parameters": scaling},
        "both": {"rope_scaling": scaling, "rope_parameters": {"rope_type": "default", "rope_theta": 2.0}},
    }
    given = text | {"rope_theta": 10_000.0} | forms[old]
    assert rope.items() <= MllamaConfig(text_config=given).text_config.rope_parameters.items()
    want = from_hf(MllamaConfig(text_config=text | {"rope_parameters": rope}))
    assert from_hf({"model_type": "mllama", "text_config": given}) == want
    assert want.rope_base == 10_000 and want.rope_scaling["scale_factor"] == 8


def test_a_saved_model_brings_its_config_and_weights_alone_need_one(saved, tmp_path):
    ours = load(saved[1])
    save_checkpoint(ours, tmp_path / "folder")
    save_checkpoint(ours, tmp_path / "model.safetensors", format="tune")
    with pytest.raises(ValueError, match=r"neither config\.json nor params\.json beside it: pass config"):
        load(tmp_path / "model.safetensors")
    for again in (load(tmp_path / "folder"), load(tmp_path / "model.safetensors", config=from_hf(saved[0].config))):
        assert_same(again, ours)
    for nothing in ({}, None):
        with pytest.raises(ValueError, match="save_checkpoint: model is"):
            save_checkpoint(nothing, tmp_path / "x", format="tune")


def test_to_empty_and_a_state_dict_make_a_whole_model():
    want, model = (build(from_hf(mllama.config()), profile="transformers").eval() for _ in range(2))
    mllama.randomize(want)
    model.to_empty(device="cpu").load_state_dict(want.state_dict())
    batch = mllama.as_fastfuse(mllama.batch(mllama.SAMPLES), mllama.config())
    with torch.no_grad():
        assert torch.equal(model(**batch), want(**batch))


def test_a_magnitude_alone_that_the_file_lacks_is_made_and_half_an_adapter_is_refused(saved, tmp_path):
    """A file of LoRA adapters, loaded into a DoRA model that is built on the meta device."""
    make = partial(build_lora, lora_attn_modules=["q_proj"], decoder_lora=True)
    lora, file, config = load(saved[1], build=make), tmp_path / "lora.safetensors", from_hf(saved[0].config)
    torch.nn.init.normal_(lora.decoder.layers[0].attn.q_proj.lora_b.weight)
    save_checkpoint(lora, file, format="tune")
    dora = load(file, config=config, build=partial(make, use_dora=True))
    batch = mllama.as_fastfuse(mllama.batch(mllama.SAMPLES), saved[0].config)
    with torch.no_grad():
        want, got = lora(**batch), dora(**batch)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # magnitude / norm is one in a new DoRA layer
    half = {k: v for k, v in lora.state_dict().items() if k != "decoder.layers.0.attn.q_proj.lora_b.weight"}
    save_checkpoint(half, file, format="tune")
    with pytest.raises(ValueError, match=r"the file has no decoder\.layers\.0\.attn\.q_proj\.lora_b\.weight, but other parts of that adapter"):
        load(file, config=config, build=make)
