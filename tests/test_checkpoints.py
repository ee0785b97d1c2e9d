"""Whole checkpoints: what transformers saves and Meta's and torchtune's layouts, read and written a tensor at a time, or refused."""

import json
import os
import pickle
import select
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import MllamaConfig, MllamaForConditionalGeneration

from fastfuse.checkpoints import load_adapter, load_checkpoint, open_checkpoint, save, save_adapter, save_checkpoint
from fastfuse.models.llama3_2_vision import (
    Llama3VisionConfig,
    build,
    build_lora,
    llama3_vision_hf_to_tune,
    llama3_vision_tune_to_hf,
    llama3_vision_tune_to_meta,
)
from fastfuse.quant.nf4 import is_torchao

ROOT = Path(__file__).parents[1]
VISION = {"hidden_size": 128, "num_hidden_layers": 2, "num_global_layers": 1, "attention_heads": 4, "intermediate_size": 256, "vision_output_dim": 256}
VISION |= {"image_size": 28, "patch_size": 14, "intermediate_layers_indices": [1]}
TEXT = {"vocab_size": 48, "hidden_size": 128, "num_hidden_layers": 6, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 256}
TEXT |= {"cross_attention_layers": [1, 4], "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 64}
HF = MllamaConfig(vision_config=VISION, text_config=TEXT, image_token_index=48)
CONFIG = Llama3VisionConfig.from_hf(HF)
GQA = CONFIG.replace(num_kv_heads=2, num_layers=4, cross_attention_layers=(0, 2, 3, 7))  # two in a row, and one at the end
NF4 = {"quantize_base": True, "block_size": 32, "scaler_block_size": 8}


def tensors(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same(got, want):
    assert got.keys() == want.keys()
    for name in want:
        assert got[name].dtype == want[name].dtype and torch.equal(got[name], want[name]), name


@pytest.fixture(scope="module")
def saved_by_transformers(tmp_path_factory):
    torch.manual_seed(0)
    model = MllamaForConditionalGeneration(HF)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_()
    folder = tmp_path_factory.mktemp("transformers")
    model.save_pretrained(folder / "sharded", max_shard_size="200KB")
    model.save_pretrained(folder / "whole")
    assert len(list((folder / "sharded").glob("*.safetensors"))) > 5
    return folder, model.state_dict()


@pytest.fixture(scope="module")
def consistent(tmp_path_factory):
    """A model with a grid of tile positions, and its checkpoint with transformers' names."""
    torch.manual_seed(1)
    model = build(CONFIG)
    folder = tmp_path_factory.mktemp("consistent")
    save_checkpoint(model, folder, config=HF.to_dict(), max_shard_size=500_000)
    return model, folder


@pytest.mark.parametrize("kind", ["sharded", "whole", "file", "index", "torch", "sharded torch"])
def test_loads_what_transformers_saves(saved_by_transformers, tmp_path, kind):
    folder, state = saved_by_transformers
    if "torch" in kind:
        disk = dict(open_checkpoint(folder / "whole"))
        names, path = sorted(disk), tmp_path
        (tmp_path / "config.json").write_text((folder / "whole" / "config.json").read_text())
        if kind == "torch":
            torch.save(disk, tmp_path / "pytorch_model.bin")
        else:
            files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
            for i, file in enumerate(files):
                torch.save({name: disk[name].clone() for name in names[i::2]}, tmp_path / file)
            index = {"weight_map": {name: files[i % 2] for i, name in enumerate(names)}}
            (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        path = {"file": folder / "whole" / "model.safetensors", "index": folder / "sharded" / "model.safetensors.index.json"}.get(kind) or folder / kind
    model = build(CONFIG, profile="transformers")
    report = load_checkpoint(model, path)
    assert report.loaded == len(model.state_dict()) == len(state) + 1 and report.missing == report.unexpected == ()
    want = llama3_vision_hf_to_tune(state, 4, 4, 128, vocab_size=48, encoder_dim=128, tile_tables="ratios")
    assert_same(model.state_dict(), want | {})


def shards(folder, pattern, whole, count=3, start=1):
    """The tensors of a checkpoint dealt out to `count` files without an index, numbered from `start`."""
    disk, names = dict(open_checkpoint(whole)), [pattern.format(i, count) for i in range(start, start + count)]
    for i, name in enumerate(names):
        part = {key: disk[key].clone() for key in sorted(disk)[i::count]}
        save_file(part, folder / name) if name.endswith(".safetensors") else torch.save(part, folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize("given", ["folder", "list", "iterator of strings"])
@pytest.mark.parametrize(
    "pattern",
    ["hf_model_{:04}_0.pt", "hf_model_{:04}_1.safetensors", "model-{:05}-of-00012_0.safetensors", "ft-model-{:05}-of-00012.safetensors", "pytorch_model-{:05}-of-00012.bin"],
)  # fmt: skip
def test_shards_without_an_index(saved_by_transformers, tmp_path, pattern, given):
    """As torchtune writes them, the number of the epoch last; more than nine, so that order by name and by number may differ."""
    folder, state = saved_by_transformers
    files = shards(tmp_path, pattern, folder / "whole", 12)
    (tmp_path / "config.json").write_text((folder / "whole" / "config.json").read_text())
    torch.save({}, tmp_path / "adapter_0.pt")  # other files torchtune leaves there
    found = open_checkpoint({"folder": tmp_path, "list": files[::-1], "iterator of strings": iter(map(str, files))}[given])
    assert found.format == "hf" and found.config["model_type"] == "mllama"
    model = build(CONFIG, profile="transformers")
    assert load_checkpoint(model, found).loaded == len(state) + 1
    assert_same(model.state_dict(), llama3_vision_hf_to_tune(state, 4, 4, 128, vocab_size=48, encoder_dim=128, tile_tables="ratios"))


def test_files_of_any_name_and_folder(consistent, tmp_path):
    a, b = shards(tmp_path, "part{}.safetensors", consistent[1], 2)
    (tmp_path / "b").mkdir()
    b = b.rename(tmp_path / "b" / "model.safetensors")
    model = build(CONFIG)
    for files in ([a, b], [b, a]):
        found = open_checkpoint(files)
        assert found.path == tmp_path and found.config is None
        assert load_checkpoint(model, files).missing == ()
    assert torch.equal(model.decoder.norm.scale, consistent[0].decoder.norm.scale)
    (tmp_path / "b" / "config.json").write_text('{"found": 1}')
    assert open_checkpoint([a, b]).config == {"found": 1}


def test_shards_that_are_no_whole_set(consistent, tmp_path):
    _, folder = consistent
    torchtune = shards(tmp_path, "hf_model_{:04}_0.pt", folder)
    torchtune[1].rename(tmp_path / "away.pt")
    gap = f"{tmp_path}: 1 of 3 shards are missing: number 2 beside hf_model_0001_0.pt"
    with pytest.raises(ValueError) as e:
        open_checkpoint(tmp_path)
    assert str(e.value) == gap
    given = [torchtune[2], torchtune[0], tmp_path / "away.pt"]  # a list is what its files hold, whatever their names
    assert load_checkpoint(build(CONFIG), given).missing == ()
    with pytest.raises(ValueError, match=rf"load_checkpoint: {tmp_path} \(hf\) does not fit the model: \d+ missing"):
        load_checkpoint(build(CONFIG), given[:2])
    with pytest.raises(ValueError, match=r"hf_model_0002_0\.pt: language_model\..*\.\.\. of it are in away\.pt too") as e:
        (tmp_path / "hf_model_0002_0.pt").write_bytes((tmp_path / "away.pt").read_bytes())
        open_checkpoint([*torchtune, tmp_path / "away.pt"])
    assert "\n" not in str(e.value)
    torchtune[2].unlink()  # the name of a last file that is not there tells nothing, the model's missing tensors do
    with pytest.raises(ValueError, match=rf"load_checkpoint: {tmp_path} \(hf\) does not fit the model: \d+ missing") as e:
        load_checkpoint(build(CONFIG), tmp_path)
    assert "\n" not in str(e.value)
    shards(tmp_path, "hf_model_{:04}_1.pt", folder)
    with pytest.raises(ValueError, match=r"holds the shards of 2 checkpoints \(hf_model_0001_0\.pt, hf_model_0001_1\.pt\): give the list of files of one"):
        open_checkpoint(tmp_path)
    assert len(open_checkpoint(tmp_path.glob("hf_model_*_1.pt"))) == len(open_checkpoint(folder))
    counted = tmp_path / "counted"
    counted.mkdir()
    shards(counted, "model-{:05}-of-00003.safetensors", folder)[2].unlink()
    with pytest.raises(ValueError, match=r"1 of 3 shards are missing: number 3 beside model-00001-of-00003\.safetensors"):
        open_checkpoint(counted)
    with pytest.raises(ValueError, match="path is an empty list, expected files"):
        open_checkpoint([])
    with pytest.raises(ValueError, match=r"nowhere\.pt: no such file, it is one of 2 given"):
        open_checkpoint([tmp_path / "away.pt", tmp_path / "nowhere.pt"])
    with pytest.raises(ValueError) as e:
        open_checkpoint([tmp_path])
    assert str(e.value) == f"{tmp_path}: a folder, give it alone: it is one of 1 given"


@pytest.mark.parametrize("given", ["folder", "list"])
@pytest.mark.parametrize("pattern", ["model-{:05}-of-{:05}.safetensors", "hf_model_{:04}_0.pt"])
@pytest.mark.parametrize("count", [1, 3])
def test_shards_counted_from_zero(consistent, tmp_path, pattern, count, given):
    files = shards(tmp_path, pattern, consistent[1], count, start=0)
    assert load_checkpoint(build(CONFIG), tmp_path if given == "folder" else files).missing == ()
    if count == 3 and given == "folder":
        files[1].unlink()
        with pytest.raises(ValueError) as e:
            open_checkpoint(tmp_path)
        assert str(e.value) == f"{tmp_path}: 1 of 3 shards are missing: number 1 beside {files[0].name}"


def test_rows_of_ratios_that_disagree_need_the_transformers_profile(saved_by_transformers):
    model = build(CONFIG)
    before = tensors(model)
    with pytest.raises(ValueError, match=r"embedding\.weight: row 0, for padding images, is not zero: tile_tables=\"ratios\""):
        load_checkpoint(model, saved_by_transformers[0] / "whole")
    assert_same(model.state_dict(), before)


def test_transformers_loads_what_is_saved(saved_by_transformers, tmp_path):
    folder, state = saved_by_transformers
    model = build(CONFIG, profile="transformers")
    load_checkpoint(model, folder / "whole")
    written = save_checkpoint(model, tmp_path, config=HF.to_dict(), max_shard_size=500_000)
    assert {f.name for f in written} == set(os.listdir(tmp_path)) and len(written) > 4
    assert all(f.stat().st_size < 550_000 for f in written)
    assert_same(dict(open_checkpoint(tmp_path)), dict(open_checkpoint(folder / "whole")))
    assert_same(MllamaForConditionalGeneration.from_pretrained(tmp_path).state_dict(), state)


@pytest.mark.parametrize("format", ["hf", "meta", "tune"])
@pytest.mark.parametrize("path", ["folder", "file.safetensors", "file.pth"])
@pytest.mark.parametrize("profile", ["torchtune", "transformers"])
def test_round_trip(tmp_path, format, path, profile):
    """Everything but the grid cells that no aspect ratio uses comes back to the bit, from the model and from its state dict."""
    model = build(CONFIG, profile=profile)
    if profile == "transformers":  # rows that agree, so that Meta's grid can hold them
        load_checkpoint(model, save_checkpoint(build(CONFIG), tmp_path / "grid.safetensors")[0])
    save_checkpoint(model, tmp_path / path, format=format, max_shard_size=500_000)
    again = build(CONFIG, profile=profile)
    load_checkpoint(again, tmp_path / path)
    want = tensors(model)
    if format == "hf" and profile == "torchtune":
        sizes = {"num_heads": 4, "num_kv_heads": 4, "dim": 128, "vocab_size": 48, "encoder_dim": 128}
        want = llama3_vision_hf_to_tune(llama3_vision_tune_to_hf(want, **sizes), **sizes)
        assert sum(not torch.equal(want[name], t) for name, t in model.state_dict().items()) == 3
    assert_same(again.state_dict(), want)
    assert open_checkpoint(tmp_path / path).format == format
    save_checkpoint(model.state_dict(), tmp_path / f"again-{path}", format=format, config=HF.to_dict())
    assert_same(dict(open_checkpoint(tmp_path / f"again-{path}")), dict(open_checkpoint(tmp_path / path)))


def test_any_layers_and_grouped_heads(tmp_path):
    """Heads, layers and vocabulary come from the model: there is no config beside the file."""
    model, again = build(GQA, profile="transformers"), build(GQA, profile="transformers")
    save_checkpoint(model, tmp_path / "hf.safetensors")
    found = open_checkpoint(tmp_path / "hf.safetensors")
    assert found.config is None and found.shape("language_model.model.layers.1.self_attn.k_proj.weight") == (64, 128)
    assert [i for i in range(8) if f"language_model.model.layers.{i}.cross_attn_attn_gate" in found] == [0, 2, 3, 7]
    load_checkpoint(again, found)
    assert_same(again.state_dict(), tensors(model))
    assert [i for i in range(6) if f"decoder.layers.{i}.ca_norm.scale" in model.state_dict()] == [1, 5]


def test_meta_parameters_are_materialized(consistent):
    _, folder = consistent
    with torch.device("meta"):
        empty = build(CONFIG)
    trained = [p.requires_grad for p in empty.parameters()]
    load_checkpoint(empty, folder, dtype=torch.bfloat16)
    assert [p.requires_grad for p in empty.parameters()] == trained and 0 < sum(trained) < len(trained)
    assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    filled = build(CONFIG).to(torch.bfloat16)
    load_checkpoint(filled, folder)
    assert_same(empty.state_dict(), filled.state_dict())
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(empty(tokens), filled(tokens))
    with torch.device("meta"):
        kept = build(CONFIG, profile="transformers")
    load_checkpoint(kept, folder)
    assert {p.dtype for p in kept.parameters()} == {torch.float32} and not any(b.is_meta for b in kept.buffers())


def test_loaded_parameters_do_not_hang_on_the_file(consistent, tmp_path):
    model, _ = consistent
    file = save_checkpoint(model, tmp_path / "model.safetensors", format="tune")[0]
    with torch.device("meta"):
        empty = build(CONFIG)
    load_checkpoint(empty, file)
    with torch.no_grad():
        for p in empty.parameters():
            p.zero_()
    assert_same(load_file(file), tensors(model))


def test_tables_of_another_tile_size_are_interpolated(consistent):
    """As load_state_dict does it: the hooks of the modules run."""
    _, folder = consistent
    larger = CONFIG.replace(tile_size=56)
    source, want, got = build(CONFIG), build(larger), build(larger)
    load_checkpoint(source, folder)
    want.load_state_dict(source.state_dict())
    assert load_checkpoint(got, folder).missing == ()
    assert_same(got.state_dict(), tensors(want))
    with pytest.raises(ValueError, match=r"1 of another shape"):
        load_checkpoint(build(larger, profile="transformers"), folder)


@pytest.mark.parametrize("wrap", ["activation checkpointing", "compile"])
def test_wrapped_layers_keep_their_names(consistent, wrap):
    _, folder = consistent
    model, plain = build(CONFIG), build(CONFIG)
    if wrap == "compile":
        model = torch.compile(model)
    else:
        for i, layer in enumerate(model.decoder.layers):
            model.decoder.layers[i] = checkpoint_wrapper(layer)
    load_checkpoint(model, folder)
    load_checkpoint(plain, folder)
    assert_same(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)), tensors(plain))


@pytest.mark.parametrize("how", ["config", "top level, parts null", "argument", "not asked for", "not asked for, parts null"])
def test_tied_embeddings(consistent, tmp_path, how):
    model, folder = consistent
    disk = dict(open_checkpoint(folder))
    del disk["language_model.lm_head.weight"]
    save_file(disk, tmp_path / "model.safetensors")
    config = HF.to_dict()
    config["text_config"]["tie_word_embeddings"] = how == "config"
    config |= {"tie_word_embeddings": how.startswith("top"), "text_config": None, "vision_config": None} if how.endswith("null") else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = build(CONFIG)
    if how.startswith("not"):
        with pytest.raises(ValueError, match=r"1 missing \(decoder\.output\.weight\); a file without lm_head loads with tie_word_embeddings=True"):
            load_checkpoint(again, tmp_path)
        return
    load_checkpoint(again, tmp_path, tie_word_embeddings=True if how == "argument" else None)
    assert torch.equal(again.decoder.output.weight, model.decoder.tok_embeddings.embedding.weight)
    assert again.decoder.output.weight.data_ptr() != again.decoder.tok_embeddings.embedding.weight.data_ptr()


def lora(**options):
    return build_lora(CONFIG, ["q_proj", "v_proj"], decoder_lora=True, apply_lora_to_mlp=True, **options)


@pytest.mark.parametrize("base", [{}, NF4, {"use_dora": True}, {"use_dora": True, **NF4}], ids=["lora", "qlora", "dora", "qdora"])
def test_adapters_and_quantized_bases(consistent, tmp_path, base):
    """A base checkpoint fills the base, NF4 weights as load_state_dict quantizes them; a model on the meta device comes out the same."""
    _, folder = consistent
    model, by_torch = lora(**base), lora(**base)
    source = build(CONFIG)
    load_checkpoint(source, folder)
    by_torch.load_state_dict(source.state_dict(), strict=False)
    report = load_checkpoint(model, folder)
    is_adapter = [name for name in model.state_dict() if "lora" in name or "magnitude" in name]
    assert sorted(report.missing) == sorted(is_adapter) and report.unexpected == ()
    with torch.device("meta"):
        empty = lora(**base)
    load_checkpoint(empty, folder)
    assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert [is_torchao(p) for p in empty.parameters()] == [is_torchao(p) for p in model.parameters()]
    assert any(is_torchao(p) for p in empty.parameters()) == ("quantize_base" in base)
    for other in (model, empty):
        assert_same(*({n: t for n, t in m.state_dict().items() if n not in is_adapter} for m in (other, by_torch)))
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    save_adapter(model, tmp_path / "adapter.safetensors")
    torch.save({n: t for n, t in model.state_dict().items() if n in is_adapter}, tmp_path / "adapter.pt")  # torchtune's own
    tokens = torch.tensor([[1, 2, 3]])
    for file in ("adapter.safetensors", "adapter.pt"):
        assert sorted(open_checkpoint(tmp_path / file)) == sorted(is_adapter)
        with torch.no_grad():
            for p in empty.parameters():
                if not is_torchao(p) and p.requires_grad:
                    p.add_(0)
        assert load_adapter(empty, tmp_path / file).loaded == len(is_adapter)
        assert torch.equal(empty(tokens), model(tokens))
    save_checkpoint(model, tmp_path / "all.safetensors", format="tune")
    assert {t.dtype for t in open_checkpoint(tmp_path / "all.safetensors").values()} == {torch.float32}
    load_checkpoint(empty, tmp_path / "all.safetensors")
    by_torch.load_state_dict(load_file(tmp_path / "all.safetensors"))  # quantizing dequantized weights again rounds their scales
    assert_same(empty.state_dict(), tensors(by_torch))
    with pytest.raises(ValueError, match=r"format 'hf' has no place for \d+ tensors, .*: merge the adapters first, or use save_adapter"):
        save_checkpoint(model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_adapter_files_are_checked_first(consistent, tmp_path):
    model = lora()
    save_adapter(model, tmp_path / "adapter.safetensors")
    found = load_file(tmp_path / "adapter.safetensors")
    name = next(iter(found))
    before = tensors(model)
    wrong = {
        "missing": ({n: t + 1 for n, t in found.items() if n != name}, rf"load_adapter: .*1 missing \({name}\)"),
        "unexpected": ({n: t + 1 for n, t in found.items()} | {"decoder.norm.scale": torch.ones(128)}, r"1 unexpected \(decoder\.norm\.scale\)"),
        "rank": ({n: torch.cat([t, t]) + 1 if n == name else t + 1 for n, t in found.items()}, "1 of another shape"),
    }
    for content, message in wrong.values():
        save_file(content, tmp_path / "wrong.safetensors")
        with pytest.raises(ValueError, match=message):
            load_adapter(model, tmp_path / "wrong.safetensors")
        assert_same(model.state_dict(), before)
    assert load_adapter(model, tmp_path / "wrong.safetensors".replace("wrong", "adapter"), strict=False).loaded == len(found)
    with pytest.raises(ValueError, match="the model has no adapters"):
        save_adapter(consistent[0], tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda d: d.pop("vision_model.class_embedding"), r"1 missing \(encoder\.clip\.cls_token_embedding\.weight\)"),
        (lambda d: d.update({"vision_model.foo": torch.zeros(2)}), r"1 unexpected \(vision_model\.foo\)"),
        (lambda d: d.update({"language_model.model.norm.weight": torch.zeros(9)}), r"1 of another shape \(language_model\.model\.norm\.weight: \(9,\) for decoder\.norm\.scale \(128,\)\)"),
        (lambda d: d.update({"language_model.model.embed_tokens.weight": torch.zeros(57, 128)}), r"embed_tokens\.weight has 57 rows, vocab_size \+ 8 = 56 are needed$"),
        (lambda d: d.update({"language_model.model.layers.0.self_attn.q_proj.weight": torch.zeros(64, 128)}), "has 64 rows, 4 heads of 32 have 128"),
        (lambda d: [d.pop(n) for n in list(d) if "layers.5" in n], r"9 missing \(decoder\.layers\.3\.attn\.q_proj\.weight, .*, \.\.\.\)"),
        (lambda d: d.update({"vision_model.gated_positional_embedding.embedding": torch.zeros(4, 128)}), "grid_size that is not squared"),
        (lambda d: d.update({"decoder.norm.scale": torch.zeros(128)}), r"mixes the names of several formats: hf \(language_model\..*\), tune \(decoder\.norm\.scale\)"),
    ],
    ids=["missing", "unexpected", "shape", "special tokens", "heads", "a layer missing", "positions", "mixture"],
)  # fmt: skip
def test_misfits_change_nothing(consistent, tmp_path, change, message):
    disk = {name: t + 1 if "tile" not in name else t for name, t in open_checkpoint(consistent[1]).items()}
    change(disk)
    save_file(disk, tmp_path / "model.safetensors")
    model = build(CONFIG)
    before = tensors(model)
    with pytest.raises(ValueError, match=message) as e:
        load_checkpoint(model, tmp_path)
    assert str(tmp_path) in str(e.value)
    assert "\n" not in str(e.value)
    assert_same(model.state_dict(), before)


def test_not_strict(consistent, tmp_path):
    disk = dict(open_checkpoint(consistent[1]))
    del disk["vision_model.class_embedding"]
    save_file(disk | {"vision_model.foo": torch.zeros(2)}, tmp_path / "model.safetensors")
    model = build(CONFIG)
    kept = model.encoder.clip.cls_token_embedding.weight.clone()
    report = load_checkpoint(model, tmp_path, strict=False)
    assert report.missing == ("encoder.clip.cls_token_embedding.weight",) and report.unexpected == ("vision_model.foo",)
    assert torch.equal(model.encoder.clip.cls_token_embedding.weight, kept)
    assert torch.equal(model.decoder.norm.scale, consistent[0].decoder.norm.scale)


class Code:
    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def test_refused_files(consistent, tmp_path):
    """One line with the path, and no code of the file is run."""
    weights = dict(open_checkpoint(consistent[1]))
    whole = save_checkpoint(consistent[0], tmp_path / "whole.safetensors")[0].read_bytes()
    code = {"decoder.norm.scale": Code(tmp_path / "it_ran")}

    good = weights["language_model.model.norm.weight"]

    def file(name, content):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content) if isinstance(content, bytes) else content(tmp_path / name)
        return tmp_path / name

    def one(path):
        save_file({"language_model.model.norm.weight": good}, path)

    def folder(name, **files):
        for f, content in files.items():
            file(f"{name}/{f.replace('__', '.')}", content)
        return tmp_path / name

    (tmp_path / "empty").mkdir()
    index = {"weight_map": {"language_model.model.norm.weight": "a.safetensors", "language_model.lm_head.weight": "b.safetensors"}}
    traversal = json.dumps({"weight_map": {"language_model.model.norm.weight": "../whole.safetensors"}}).encode()
    name = "model__safetensors__index__json"
    for path, message in [
        (file("code.pt", lambda p: torch.save(code, p)), r"refused, it holds more than tensors and would run code when loaded \(GLOBAL posix\.system\)"),
        (file("code.bin", pickle.dumps(code)), "not a torch file that can be memory-mapped"),
        (file("module.pt", lambda p: torch.save(nn.Linear(2, 2), p)), "refused, it holds more than tensors"),
        (file("cut.pt", lambda p: (torch.save(weights, p), p.write_bytes(p.read_bytes()[:-5000]))), "not a readable torch file"),
        (file("nested.pt", lambda p: torch.save({"model": {"a": good}, "step": 3}, p)), "not a flat dict of names and tensors: a dict with model, step"),
        (file("list.pt", lambda p: torch.save([good], p)), "not a flat dict of names and tensors: a list"),
        (file("cut.safetensors", whole[:-1000]), "not a readable safetensors file: .*incomplete"),
        (file("cut2.safetensors", whole[:50]), "not a readable safetensors file"),
        (file("empty.safetensors", b""), "not a readable safetensors file"),
        (file("other.safetensors", lambda p: save_file({"lstm.weight": good}, p)), "no names of a Llama-3.2-Vision checkpoint; it has lstm.weight"),
        (file("text.txt", b"hello"), "not a checkpoint: a directory, "),
        (tmp_path / "nowhere", "no such file or directory"),
        (tmp_path / "empty", r"no model\.safetensors, .*; it has no files"),
        (folder("wrong", readme__md=b"hello"), r"no model\.safetensors, .*; it has readme\.md"),
        (folder("parallel", consolidated__00__pth=b"", consolidated__01__pth=b""), r"2 model-parallel files consolidated\.00\.pth"),
        (folder("no_shard", **{name: json.dumps(index).encode(), "a__safetensors": one}), "1 of 2 shards are missing: b.safetensors"),
        (folder("no_name", **{name: json.dumps(index).encode(), "a__safetensors": one, "b__safetensors": one}), r"b\.safetensors: lacks language_model\.lm_head\.weight"),
        (folder("outside", **{name: traversal}), r"names a file outside its directory: \.\./whole\.safetensors"),
        (folder("no_map", **{name: b"{}"}), "no index of a sharded checkpoint"),
        (folder("no_json", **{name: b"{"}), "not readable as JSON"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=message) as e:
            open_checkpoint(path)
        assert str(path) in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "it_ran").exists()
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "it_ran").exists()  # as it does where nobody refuses


def test_options_and_models_that_do_not_fit(consistent, tmp_path):
    model, folder = consistent
    for call, message in [
        (lambda: load_checkpoint(model, folder, format="onnx"), "load_checkpoint: format is 'onnx', not 'auto', 'hf', 'meta', 'tune'"),
        (lambda: load_checkpoint(nn.Linear(2, 2), folder), r"Linear is no Llama-3\.2-Vision model: it has no decoder\.layers"),
        (lambda: save_checkpoint(model, tmp_path, format="onnx"), "save_checkpoint: format is 'onnx'"),
        (lambda: save_checkpoint(model.state_dict(), tmp_path), "does not tell the attention heads: give config, or the model itself"),
        (lambda: save_checkpoint(build(GQA), tmp_path, format="meta"), "stands alone"),
        (lambda: save_checkpoint({"decoder.norm.scale": torch.empty(2, device="meta")}, tmp_path), "is on the meta device and has no values"),
        (lambda: save_checkpoint({"decoder.norm.scale": torch.zeros(2, dtype=torch.complex64)}, tmp_path, format="tune"), "is of torch.complex64"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()
    assert not os.listdir(tmp_path)


def test_meta_as_meta_names_it(consistent, tmp_path):
    """consolidated.00.pth with RoPE's table in it, as Meta's files have."""
    model, _ = consistent
    meta = llama3_vision_tune_to_meta(model.state_dict()) | {"text_model.rope.freqs": torch.zeros(3)}
    torch.save(meta, tmp_path / "consolidated.00.pth")
    again = build(CONFIG)
    assert load_checkpoint(again, tmp_path).unexpected == ()
    assert_same(again.state_dict(), tensors(model))


@pytest.mark.parametrize("path", ["folder", "file.safetensors", "file.pt"])
@pytest.mark.parametrize("at", [1, 60, -1])
def test_an_interrupted_save_leaves_the_old_checkpoint(consistent, tmp_path, monkeypatch, path, at):
    model, _ = consistent
    save_checkpoint(model, tmp_path / path, max_shard_size=500_000)
    names = sorted(str(f) for f in tmp_path.rglob("*"))
    original, calls = save._Pending.value, []
    stop = at if at > 0 else 3 + len(open_checkpoint(tmp_path / path))  # the three tables of tiles are read twice

    def failing(self):
        calls.append(self)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(save._Pending, "value", failing)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(build(CONFIG), tmp_path / path, max_shard_size=500_000)
    assert sorted(str(f) for f in tmp_path.rglob("*")) == names
    again = build(CONFIG)
    load_checkpoint(again, tmp_path / path)
    assert torch.equal(again.decoder.norm.scale, model.decoder.norm.scale)
    assert torch.equal(again.decoder.output.weight, model.decoder.output.weight)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_save_that_dies_while_renaming_leaves_one_whole_checkpoint(consistent, tmp_path, monkeypatch, at):
    old, new = consistent[0], build(CONFIG)
    save_checkpoint(old, tmp_path, max_shard_size=500_000, config=HF.to_dict())
    original, calls = os.replace, []

    def failing(*args):
        calls.append(args)
        if len(calls) == at:
            raise OSError("disk on fire")
        original(*args)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OSError, match="disk on fire"):
        save_checkpoint(new, tmp_path, max_shard_size=500_000, config=HF.to_dict())
    again = build(CONFIG)
    load_checkpoint(again, tmp_path)
    assert torch.equal(again.decoder.output.weight, old.decoder.output.weight)
    monkeypatch.setattr(os, "replace", original)
    save_checkpoint(new, tmp_path, max_shard_size=500_000, config=HF.to_dict())
    load_checkpoint(again, tmp_path)
    assert torch.equal(again.decoder.output.weight, new.decoder.output.weight)


def test_saving_over_another_number_of_shards_leaves_no_old_ones(consistent, tmp_path):
    model, _ = consistent
    (tmp_path / "tokenizer.json").write_text("{}")
    for size in (500_000, 500_000, 10**9, 300_000, 500_000):
        written = save_checkpoint(model, tmp_path, max_shard_size=size)
        assert set(os.listdir(tmp_path)) == {"tokenizer.json", *(f.name for f in written)}
        assert len(open_checkpoint(tmp_path)) == len(model.state_dict()) - 1


MEMORY = """
import sys

import torch

from fastfuse.checkpoints import load_checkpoint, save_checkpoint
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build
config = Llama3VisionConfig(tile_size=28, clip_embed_dim=32, clip_num_heads=2, clip_num_layers=2, clip_hidden_dim=32, clip_hidden_states=(1,), num_layers_projection=1,
    vocab_size=30_000, num_layers=4, num_heads=8, num_kv_heads=8, embed_dim=1024, intermediate_dim=2048, max_seq_len=64, encoder_max_seq_len=64)
def stage(name):
    print(name, flush=True)
    input()

model = build(config)
stage("save")
save_checkpoint(model, sys.argv[1])
stage("fill")
load_checkpoint(model, sys.argv[1])
stage("meta")
del model
with torch.device("meta"):
    model = build(config)
stage("load")
load_checkpoint(model, sys.argv[1])
stage(f"end {sum(p.nbytes for p in model.parameters())}")
"""


def anonymous(pid):
    """Bytes of a process's memory that no file is behind: mapped checkpoints do not count."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_no_second_copy_in_memory(tmp_path):
    """Sampled from outside, a load into a model takes no memory to speak of, one into the meta device a model's worth, a save one tensor.

    The largest tensor is 123 MB and a load's largest copy, of a permuted q_proj, 4 MB; measured are 16, 463 (of a model of 456) and 152 MB; 64 MB are left to allocators and imports.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path / "checkpoint")]
    peaks, stage = {}, ""
    with subprocess.Popen(run, env=environment, text=True, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as child:
        while not stage.startswith("end"):
            before = peak = anonymous(child.pid)
            while not select.select([child.stdout], [], [], 0.001)[0]:
                peak = max(peak, anonymous(child.pid))
            peaks[stage], stage = peak - before, child.stdout.readline().strip()
            print(file=child.stdin, flush=True)
        size = int(stage.split()[1])
    slack = 64_000_000
    print({"model": size // 10**6} | {name: peak // 10**6 for name, peak in peaks.items()})
    assert size > 400_000_000
    assert peaks["fill"] < slack
    assert size - slack < peaks["load"] < size + slack
    assert peaks["save"] < 30_008 * 1024 * 4 + slack
