"""Whole checkpoints: what transformers saves and Meta's and torchtune's layouts, read and written a tensor at a time, or refused."""

import itertools
import json
import os
import pickle
import shutil
from functools import partial

import mllama
import pytest
import torch
from numerics import assert_same
from safetensors.torch import load_file, save_file
from safetensors.torch import save as as_bytes
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import MllamaForConditionalGeneration

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

HF = mllama.config((1, 4), 6, (2, 1), (1,), hidden_size=128, intermediate_size=256, num_key_value_heads=8)  # weights that divide into NF4's blocks
CONFIG = Llama3VisionConfig.from_hf(HF)
GQA = CONFIG.replace(num_kv_heads=2, num_layers=4, cross_attention_layers=(0, 2, 3, 7))  # two in a row, and one at the end
NF4 = {"quantize_base": True, "block_size": 32, "scaler_block_size": 8}


def tensors(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def on_meta(make, *args, **options):
    with torch.device("meta"):
        return make(*args, **options)


def loaded(path, config=CONFIG, **options):
    """A new model with all that a checkpoint holds."""
    model = build(config, **options)
    report = load_checkpoint(model, path)
    assert report.loaded == len(model.state_dict()) and report.missing == report.unexpected == ()
    return model


def refuses(message, function, *args, **options):
    with pytest.raises(ValueError, match=message) as e:
        function(*args, **options)
    assert "\n" not in str(e.value)
    return str(e.value)


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
    return folder, mllama.converted(model)


@pytest.fixture(scope="module")
def consistent(tmp_path_factory):
    """A model with a grid of tile positions, and its checkpoint with transformers' names."""
    torch.manual_seed(1)
    model = build(CONFIG)
    folder = tmp_path_factory.mktemp("consistent")
    save_checkpoint(model, folder, config=HF.to_dict(), max_shard_size=500_000)
    return model, folder


@pytest.mark.parametrize("path", ["sharded", "whole", "whole/model.safetensors", "sharded/model.safetensors.index.json"])
def test_loads_what_transformers_saves(saved_by_transformers, path):
    folder, want = saved_by_transformers
    assert_same(loaded(folder / path, profile="transformers"), want)


def shards(folder, pattern, whole, count=3, start=1):
    """The tensors of a checkpoint dealt out to `count` files, numbered from `start`."""
    disk, names = dict(open_checkpoint(whole)), [pattern.format(i, count) for i in range(start, start + count)]
    for i, name in enumerate(names):
        part = {key: disk[key].clone() for key in sorted(disk)[i::count]}
        save_file(part, folder / name) if name.endswith(".safetensors") else torch.save(part, folder / name)
    return [folder / name for name in names]


@pytest.mark.parametrize(
    "pattern, start, count, given",
    [
        ("hf_model_{:04}_0.pt", 1, 12, "folder"),
        ("hf_model_{:04}_1.safetensors", 1, 12, "list"),
        ("model-{:05}-of-00012_0.safetensors", 1, 12, "folder"),
        ("ft-model-{:05}-of-00012.safetensors", 1, 12, "iterator of strings"),
        ("pytorch_model-{:05}-of-00012.bin", 1, 12, "folder"),
        ("model-{:05}-of-{:05}.safetensors", 0, 1, "folder"),
        ("model-{:05}-of-{:05}.safetensors", 0, 3, "list"),
        ("hf_model_{:04}_0.pt", 0, 1, "list"),
        ("hf_model_{:04}_0.pt", 0, 3, "folder"),
        ("pytorch_model.bin", 1, 1, "folder"),
        ("of any name{}.bin", 1, 2, "index"),
    ],
)
def test_shards_by_their_names_or_an_index(saved_by_transformers, tmp_path, pattern, start, count, given):
    """As torchtune writes them, the number of the epoch last; more than nine, so that order by name and by number may differ."""
    folder, want = saved_by_transformers
    files = shards(tmp_path, pattern, folder / "whole", count, start)
    shutil.copy(folder / "whole" / "config.json", tmp_path)
    torch.save({}, tmp_path / "adapter_0.pt")  # other files torchtune leaves there
    if given == "index":
        index = {"weight_map": {name: file.name for file in files for name in torch.load(file)}}
        (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    found = open_checkpoint({"list": files[::-1], "iterator of strings": iter(map(str, files))}.get(given, tmp_path))
    assert found.format == "hf" and found.config["model_type"] == "mllama"
    assert_same(loaded(found, profile="transformers"), want)
    if count == 3:
        files[1].unlink()
        refuses(f"^{tmp_path}: 1 of 3 shards are missing: number 1 beside {files[0].name}$", open_checkpoint, tmp_path)


def test_files_of_any_name_and_folder(consistent, tmp_path):
    a, b = shards(tmp_path, "part{}.safetensors", consistent[1], 2)
    (tmp_path / "b").mkdir()
    b = b.rename(tmp_path / "b" / "model.safetensors")
    for files in ([a, b], [b, a]):
        found = open_checkpoint(files)
        assert found.path == tmp_path and found.config is None
        assert torch.equal(loaded(files).decoder.norm.scale, consistent[0].decoder.norm.scale)
    (tmp_path / "b" / "config.json").write_text('{"found": 1}')
    assert open_checkpoint([a, b]).config == {"found": 1}


def test_shards_that_are_no_whole_set(consistent, tmp_path):
    _, folder = consistent
    torchtune = shards(tmp_path, "hf_model_{:04}_0.pt", folder)
    away, counted = tmp_path / "away.pt", tmp_path / "counted"
    torchtune[1].rename(away)
    counted.mkdir()
    shards(counted, "model-{:05}-of-00003.safetensors", folder)[2].unlink()
    loaded([torchtune[2], torchtune[0], away])  # a list is what its files hold, whatever their names
    incomplete = rf"^load_checkpoint: {tmp_path} \(hf\) does not fit the model: \d+ missing"

    refuses(rf"^{tmp_path}: 1 of 3 shards are missing: number 2 beside hf_model_0001_0\.pt$", open_checkpoint, tmp_path)
    refuses(r"1 of 3 shards are missing: number 3 beside model-00001-of-00003\.safetensors", open_checkpoint, counted)
    refuses(incomplete, loaded, [torchtune[2], torchtune[0]])
    refuses("path is an empty list, expected files", open_checkpoint, [])
    refuses(r"nowhere\.pt: no such file, it is one of 2 given", open_checkpoint, [away, tmp_path / "nowhere.pt"])
    refuses(f"^{tmp_path}: a folder, give it alone: it is one of 1 given$", open_checkpoint, [tmp_path])
    shutil.copy(away, torchtune[1])
    refuses(r"hf_model_0002_0\.pt: language_model\..*\.\.\. of it are in away\.pt too", open_checkpoint, [*torchtune, away])
    torchtune[2].unlink()  # the name of a last file that is not there tells nothing, the model's missing tensors do
    refuses(incomplete, loaded, tmp_path)
    shards(tmp_path, "hf_model_{:04}_1.pt", folder)
    both = r"holds the shards of 2 checkpoints \(hf_model_0001_0\.pt, hf_model_0001_1\.pt\): give the list of files of one"
    refuses(both, open_checkpoint, tmp_path)
    assert len(open_checkpoint(tmp_path.glob("hf_model_*_1.pt"))) == len(open_checkpoint(folder))


def test_rows_of_ratios_that_disagree_need_the_transformers_profile(saved_by_transformers):
    model = build(CONFIG)
    before = tensors(model)
    message = r"embedding\.weight: row 0, for padding images, is not zero: tile_tables=\"ratios\""
    refuses(message, load_checkpoint, model, saved_by_transformers[0] / "whole")
    assert_same(model, before)


PATHS = ("folder", "file.safetensors", "file.pth")


@pytest.mark.parametrize("profile, path", [(("torchtune", "transformers")[i % 2], path) for i, path in enumerate(PATHS)])
@pytest.mark.parametrize("format", ["hf", "meta", "tune"])
def test_round_trip(tmp_path, format, path, profile):
    """Everything but the grid cells that no aspect ratio uses comes back to the bit, from the model and from its state dict."""
    grid = build(CONFIG)  # rows that agree, so that Meta's grid can hold them
    model = loaded(save_checkpoint(grid, tmp_path / "grid.safetensors")[0], profile=profile) if profile == "transformers" else grid
    save_checkpoint(model, tmp_path / path, format=format, max_shard_size=500_000)
    want = tensors(model)
    if format == "hf" and profile == "torchtune":
        sizes = {"num_heads": 8, "num_kv_heads": 8, "dim": 128, "vocab_size": mllama.VOCAB, "encoder_dim": 32}
        want = llama3_vision_hf_to_tune(llama3_vision_tune_to_hf(want, **sizes), **sizes)
        assert sum(not torch.equal(want[name], t) for name, t in model.state_dict().items()) == 3
    assert_same(loaded(tmp_path / path, profile=profile), want)
    assert open_checkpoint(tmp_path / path).format == format
    save_checkpoint(model.state_dict(), tmp_path / f"again-{path}", format=format, config=HF.to_dict())
    assert_same(dict(open_checkpoint(tmp_path / f"again-{path}")), dict(open_checkpoint(tmp_path / path)))


def test_any_layers_and_grouped_heads(tmp_path):
    """Heads, layers and vocabulary come from the model: there is no config beside the file."""
    model = build(GQA, profile="transformers")
    save_checkpoint(model, tmp_path / "hf.safetensors")
    found = open_checkpoint(tmp_path / "hf.safetensors")
    assert found.config is None and found.shape("language_model.model.layers.1.self_attn.k_proj.weight") == (32, 128)
    assert [i for i in range(8) if f"language_model.model.layers.{i}.cross_attn_attn_gate" in found] == [0, 2, 3, 7]
    assert_same(loaded(found, GQA, profile="transformers"), model)


def test_meta_parameters_are_materialized(consistent):
    _, folder = consistent
    empty = on_meta(build, CONFIG)
    trained = [p.requires_grad for p in empty.parameters()]
    load_checkpoint(empty, folder, dtype=torch.bfloat16)
    assert [p.requires_grad for p in empty.parameters()] == trained and 0 < sum(trained) < len(trained)
    assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    filled = build(CONFIG).to(torch.bfloat16)
    load_checkpoint(filled, folder)
    assert_same(empty, filled)
    assert torch.equal(*(m(torch.tensor([[1, 2, 3]])) for m in (empty, filled)))


def test_loaded_parameters_do_not_hang_on_the_file(consistent, tmp_path):
    model, _ = consistent
    file = save_checkpoint(model, tmp_path / "model.safetensors", format="tune")[0]
    empty = on_meta(build, CONFIG)
    load_checkpoint(empty, file)
    for p in empty.parameters():
        torch.nn.init.zeros_(p)
    assert_same(load_file(file), model)


def test_tables_of_another_tile_size_are_interpolated(consistent):
    """As load_state_dict does it: the hooks of the modules run."""
    _, folder = consistent
    larger = CONFIG.replace(tile_size=112)
    want = build(larger)
    want.load_state_dict(loaded(folder).state_dict())
    assert_same(loaded(folder, larger), want)
    refuses("1 of another shape", loaded, folder, larger, profile="transformers")


def test_wrapped_layers_keep_their_names(consistent):
    plain, checkpointed = loaded(consistent[1]), build(CONFIG)
    checkpointed.decoder.layers = nn.ModuleList(map(checkpoint_wrapper, checkpointed.decoder.layers))
    for model in (checkpointed, torch.compile(build(CONFIG))):
        load_checkpoint(model, consistent[1])
        assert_same(dict(zip(plain.state_dict(), model.state_dict().values(), strict=True)), plain)


TIED, NULLS = {"tie_word_embeddings": True}, {"text_config": None, "vision_config": None}


@pytest.mark.parametrize(
    "config, argument, tied",
    [({"text_config": TIED}, None, True), (TIED | NULLS, None, True), ({}, True, True), ({}, None, False), (NULLS, None, False)],
)
def test_tied_embeddings(consistent, tmp_path, config, argument, tied):
    model, folder = consistent
    save_file({name: t for name, t in open_checkpoint(folder).items() if "lm_head" not in name}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(config))
    again = build(CONFIG)
    if not tied:
        refuses(r"1 missing \(decoder\.output\.weight\); a file without lm_head loads with tie_word_embeddings=True", load_checkpoint, again, tmp_path)
        return
    load_checkpoint(again, tmp_path, tie_word_embeddings=argument)
    output, text = again.decoder.output.weight, again.decoder.tok_embeddings.embedding.weight
    assert torch.equal(output, model.decoder.tok_embeddings.embedding.weight) and output.data_ptr() != text.data_ptr()


def lora(**options):
    return build_lora(CONFIG, ["q_proj", "v_proj"], decoder_lora=True, apply_lora_to_mlp=True, **options)


def adapters_of(model):
    return {n: t for n, t in model.state_dict().items() if "lora" in n or "magnitude" in n}


@pytest.mark.parametrize("base", [{}, NF4, {"use_dora": True}, {"use_dora": True, **NF4}], ids=["lora", "qlora", "dora", "qdora"])
def test_adapters_and_quantized_bases(consistent, tmp_path, base):
    """A base checkpoint fills the base, NF4 weights as load_state_dict quantizes them; a model on the meta device comes out the same."""
    model, by_torch, empty = lora(**base), lora(**base), on_meta(lora, **base)
    by_torch.load_state_dict(loaded(consistent[1]).state_dict(), strict=False)
    for other in (model, empty):
        report = load_checkpoint(other, consistent[1])
        assert sorted(report.missing) == sorted(adapters_of(model)) and report.unexpected == ()
        assert_same(*({n: t for n, t in m.state_dict().items() if n not in report.missing} for m in (other, by_torch)))
    assert not any(t.is_meta for t in [*empty.parameters(), *empty.buffers()])
    assert [is_torchao(p) for p in empty.parameters()] == [is_torchao(p) for p in model.parameters()]
    assert any(map(is_torchao, empty.parameters())) == ("quantize_base" in base)
    for module in model.modules():
        if hasattr(module, "initialize_dora_magnitude"):
            module.initialize_dora_magnitude()
    save_adapter(model, tmp_path / "adapter.safetensors")
    torch.save(adapters_of(model), tmp_path / "adapter.pt")  # torchtune's own
    for file in (tmp_path / "adapter.safetensors", tmp_path / "adapter.pt"):
        for t in adapters_of(empty).values():
            t.zero_()
        assert open_checkpoint(file).keys() == adapters_of(model).keys() and load_adapter(empty, file).loaded == len(adapters_of(model))
        assert_same(empty, model)
    file = save_checkpoint(model, tmp_path / "all.safetensors", format="tune")[0]
    assert {t.dtype for t in open_checkpoint(file).values()} == {torch.float32}
    load_checkpoint(empty, file)
    by_torch.load_state_dict(load_file(file))  # quantizing dequantized weights again rounds their scales
    assert_same(empty, by_torch)
    refuses(r"format 'hf' has no place for \d+ tensors, .*: merge the adapters first, or use save_adapter", save_checkpoint, model, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_adapter_files_are_checked_first(consistent, tmp_path):
    model = lora()
    save_adapter(model, tmp_path / "adapter.safetensors")
    other = {n: t + 1 for n, t in load_file(tmp_path / "adapter.safetensors").items()}
    name, before = next(iter(other)), tensors(model)
    for content, message in [
        ({n: t for n, t in other.items() if n != name}, rf"load_adapter: .*1 missing \({name}\)"),
        (other | {"decoder.norm.scale": torch.ones(128)}, r"1 unexpected \(decoder\.norm\.scale\)"),
        (other | {name: torch.cat([other[name]] * 2)}, "1 of another shape"),
    ]:
        save_file(content, tmp_path / "wrong.safetensors")
        refuses(message, load_adapter, model, tmp_path / "wrong.safetensors")
        assert_same(model, before)
    assert load_adapter(model, tmp_path / "adapter.safetensors", strict=False).loaded == len(other)
    refuses("the model has no adapters", save_adapter, consistent[0], tmp_path / "none.safetensors")


NORM, Q_PROJ = "language_model.model.norm.weight", "language_model.model.layers.0.self_attn.q_proj.weight"
MISFITS = [  # part of a name that goes away, a name and its new shape, what is said
    ("class_embedding", {}, r"1 missing \(encoder\.clip\.cls_token_embedding\.weight\)"),
    ("layers.5", {}, r"9 missing \(decoder\.layers\.3\.attn\.q_proj\.weight, .*, \.\.\.\)"),
    (None, {"vision_model.foo": (2,)}, r"1 unexpected \(vision_model\.foo\)"),
    (None, {NORM: (9,)}, r"1 of another shape \(language_model\.model\.norm\.weight: \(9,\) for decoder\.norm\.scale \(128,\)\)"),
    (None, {"language_model.model.embed_tokens.weight": (105, 128)}, r"embed_tokens\.weight has 105 rows, vocab_size \+ 8 = 104 are needed$"),
    (None, {Q_PROJ: (64, 128)}, "has 64 rows, 8 heads of 16 have 128"),
    (None, {"vision_model.gated_positional_embedding.embedding": (4, 32)}, "grid_size that is not squared"),
    (None, {"decoder.norm.scale": (128,)}, r"mixes the names of several formats: hf \(language_model\..*\), tune \(decoder\.norm\.scale\)"),
]


def test_misfits_change_nothing(consistent, tmp_path):
    whole = {name: t + 1 if "tile" not in name else t for name, t in open_checkpoint(consistent[1]).items()}
    model = build(CONFIG)
    before = tensors(model)
    for gone, new, message in MISFITS:
        kept = {name: t for name, t in whole.items() if gone is None or gone not in name}
        save_file(kept | {name: torch.zeros(shape) for name, shape in new.items()}, tmp_path / "model.safetensors")
        assert str(tmp_path) in refuses(message, load_checkpoint, model, tmp_path)
        assert_same(model, before)


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


def write(path, content):
    """A file of bytes, of what torch saves, or a folder of files."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix:
        torch.save(content, path)
    else:
        path.mkdir()
        for name, inside in content.items():
            write(path / name, inside)


def test_refused_files(consistent, tmp_path):
    """One line with the path, and no code of the file is run."""
    norm, index = "language_model.model.norm.weight", "model.safetensors.index.json"
    weights = dict(open_checkpoint(consistent[1]))
    write(tmp_path / "whole.pt", weights)
    in_torch, whole, one = (tmp_path / "whole.pt").read_bytes(), as_bytes(weights), as_bytes({norm: weights[norm]})
    code = {"decoder.norm.scale": Code(tmp_path / "it_ran")}
    two = json.dumps({"weight_map": {norm: "a.safetensors", "language_model.lm_head.weight": "b.safetensors"}}).encode()
    outside = json.dumps({"weight_map": {norm: "../whole.safetensors"}}).encode()
    for name, content, message in [
        ("code.pt", code, r"refused, it holds more than tensors and would run code when loaded \(GLOBAL posix\.system\)"),
        ("code.bin", pickle.dumps(code), "not a torch file that can be memory-mapped"),
        ("module.pt", nn.Linear(2, 2), "refused, it holds more than tensors"),
        ("cut.pt", in_torch[:-5000], "not a readable torch file"),
        ("nested.pt", {"model": {"a": weights[norm]}, "step": 3}, "not a flat dict of names and tensors: a dict with model, step"),
        ("list.pt", [weights[norm]], "not a flat dict of names and tensors: a list"),
        ("cut.safetensors", whole[:-1000], "not a readable safetensors file: .*incomplete"),
        ("empty.safetensors", b"", "not a readable safetensors file"),
        ("other.safetensors", as_bytes({"lstm.weight": weights[norm]}), "no names of a Llama-3.2-Vision checkpoint; it has lstm.weight"),
        ("text.txt", b"hello", "not a checkpoint: a directory, "),
        ("empty", {}, r"no model\.safetensors, .*; it has no files"),
        ("wrong", {"readme.md": b"hello"}, r"no model\.safetensors, .*; it has readme\.md"),
        ("parallel", {"consolidated.00.pth": b"", "consolidated.01.pth": b""}, r"2 model-parallel files consolidated\.00\.pth"),
        ("no_shard", {index: two, "a.safetensors": one}, "1 of 2 shards are missing: b.safetensors"),
        ("no_name", {index: two, "a.safetensors": one, "b.safetensors": one}, r"b\.safetensors: lacks language_model\.lm_head\.weight"),
        ("outside", {index: outside}, r"names a file outside its directory: \.\./whole\.safetensors"),
        ("no_map", {index: b"{}"}, "no index of a sharded checkpoint"),
        ("no_json", {index: b"{"}, "not readable as JSON"),
    ]:
        write(tmp_path / name, content)
        assert str(tmp_path / name) in refuses(message, open_checkpoint, tmp_path / name)
    refuses("nowhere: no such file or directory", open_checkpoint, tmp_path / "nowhere")
    assert not (tmp_path / "it_ran").exists()
    torch.load(tmp_path / "code.pt", weights_only=False)
    assert (tmp_path / "it_ran").exists()  # as it does where nobody refuses


def test_options_and_models_that_do_not_fit(consistent, tmp_path):
    model, folder = consistent
    no_values = {"decoder.norm.scale": torch.empty(2, device="meta")}
    complex_values = {"decoder.norm.scale": torch.zeros(2, dtype=torch.complex64)}
    for message, function, *args in [
        ("load_checkpoint: format is 'onnx', not 'auto', 'hf', 'meta', 'tune'", load_checkpoint, model, folder, "onnx"),
        (r"Linear is no Llama-3\.2-Vision model: it has no decoder\.layers", load_checkpoint, nn.Linear(2, 2), folder, "auto"),
        ("save_checkpoint: format is 'onnx'", save_checkpoint, model, tmp_path, "onnx"),
        ("does not tell the attention heads: give config, or the model itself", save_checkpoint, model.state_dict(), tmp_path, "hf"),
        ("stands alone", save_checkpoint, build(GQA), tmp_path, "meta"),
        ("is on the meta device and has no values", save_checkpoint, no_values, tmp_path, "hf"),
        ("is of torch.complex64", save_checkpoint, complex_values, tmp_path, "tune"),
    ]:
        refuses(message, function, *args[:2], format=args[2])
    assert not os.listdir(tmp_path)


def test_meta_as_meta_names_it(consistent, tmp_path):
    """consolidated.00.pth with RoPE's table in it, as Meta's files have."""
    model, _ = consistent
    meta = llama3_vision_tune_to_meta(model.state_dict()) | {"text_model.rope.freqs": torch.zeros(3)}
    torch.save(meta, tmp_path / "consolidated.00.pth")
    assert_same(loaded(tmp_path), model)


def failing_at(monkeypatch, owner, name, at, error):
    """The at-th call of owner.name fails, and no other."""
    original, calls = getattr(owner, name), itertools.count(1)

    def failing(*args):
        if next(calls) == at:
            raise error
        return original(*args)

    monkeypatch.setattr(owner, name, failing)


@pytest.mark.parametrize("path, at", [("folder", 1), ("folder", 60), ("folder", -1), ("file.safetensors", 60), ("file.pt", -1)])
def test_an_interrupted_save_leaves_the_old_checkpoint(consistent, tmp_path, monkeypatch, path, at):
    model, _ = consistent
    save_checkpoint(model, tmp_path / path, max_shard_size=500_000)
    names = sorted(tmp_path.rglob("*"))
    at = at if at > 0 else 3 + len(open_checkpoint(tmp_path / path))  # the three tables of tiles are read twice
    failing_at(monkeypatch, save._Pending, "value", at, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(build(CONFIG), tmp_path / path, max_shard_size=500_000)
    assert sorted(tmp_path.rglob("*")) == names
    again = loaded(tmp_path / path).decoder
    assert torch.equal(again.norm.scale, model.decoder.norm.scale) and torch.equal(again.output.weight, model.decoder.output.weight)


@pytest.mark.parametrize("at", range(1, 9))
def test_a_save_that_dies_while_renaming_leaves_one_whole_checkpoint(consistent, tmp_path, monkeypatch, at):
    old, new = consistent[0], build(CONFIG)
    save = partial(save_checkpoint, path=tmp_path, max_shard_size=500_000, config=HF.to_dict())
    save(old)
    failing_at(monkeypatch, os, "replace", at, OSError("disk on fire"))
    with pytest.raises(OSError, match="disk on fire"):
        save(new)
    assert_same(loaded(tmp_path).decoder.output, old.decoder.output)
    save(new)
    assert_same(loaded(tmp_path).decoder.output, new.decoder.output)


def test_saving_over_another_number_of_shards_leaves_no_old_ones(consistent, tmp_path):
    model, _ = consistent
    (tmp_path / "tokenizer.json").write_text("{}")
    for size in (500_000, 500_000, 10**9, 300_000, 500_000):
        written = save_checkpoint(model, tmp_path, max_shard_size=size)
        assert all(f.stat().st_size < size + 50_000 for f in written)
        assert set(os.listdir(tmp_path)) == {"tokenizer.json", *(f.name for f in written)}
        assert len(open_checkpoint(tmp_path)) == len(model.state_dict()) - 1
