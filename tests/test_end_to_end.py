"""bench/bench_end_to_end.py: right models at the right size, honest rows, floors that count what is done."""

import contextlib
import itertools
import json
import sys
import weakref
from dataclasses import replace

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import fastfuse
from bench import bench_end_to_end, harness, mllama
from bench.mllama import FULL, RANK, TINY
from bench.peaks import Peaks

PEAKS = Peaks("chip", "measured", 1e12, {"bfloat16": 1e14, "float32": 1e13}, 0.0)
ENVIRONMENT = {"device": "a chip", "device_type": "cpu", "commit": "0" * 40}
COMPILED = "patched + torch.compile"
SMALL = replace(TINY, layers=2, cross=(1,), vision_layers=1, taken=(0,))
KINDS = {
    "step": lambda: bench_end_to_end.step_case(SMALL, 1, 12, False),
    "checkpointed": lambda: bench_end_to_end.step_case(SMALL, 1, 12, False, checkpointed=True),
    "decode": lambda: bench_end_to_end.decode_case(SMALL, 2, 6, 8, False),
}


def rows_of(case, device="cpu"):
    return {row["provider"]: row for row in harness.measure(case, device, PEAKS, ENVIRONMENT)}


def test_rows_of_the_command(tmp_path, monkeypatch, capsys):
    """Its own loop, over small cases; a second run would mix two."""
    cases = [make() for make in KINDS.values()]
    monkeypatch.setattr(bench_end_to_end, "cases_of", lambda size, compiled: iter(cases))
    monkeypatch.setattr("bench.peaks.measure", lambda device: PEAKS)
    monkeypatch.setattr(sys, "argv", ["bench_end_to_end", "--out", str(tmp_path), "--device", "cpu"])
    assert bench_end_to_end.main() == 0
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for row, (case, provider) in zip(rows, itertools.product(cases, ("unpatched", "patched")), strict=True):
        assert "error" not in row, row["error"]
        assert row["provider"] == provider and row["parity"] is True and 0 < row["error_over_limit"] <= 1
        assert row["us"] > 0 and row["tokens"] == (2 if row["op"] == "decode" else 12) and row["peak_bytes"] is None
        assert row["floor_us"] == pytest.approx(harness.floor_us(case.cost({}), PEAKS, torch.bfloat16), abs=1e-3)
    text = (tmp_path / "summary.txt").read_text()
    assert text in capsys.readouterr().out and all(words in text for words in ("x as fast", "tokens/s", "tiny b"))
    with pytest.raises(SystemExit):
        bench_end_to_end.main()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["step", "decode"])
def test_rows_on_a_gpu(kind):
    rows = rows_of(KINDS[kind](), "cuda")
    for row in rows.values():
        assert "error" not in row and row["parity"] is True and row["us"] > 0 and row["peak_bytes"] > 0, row


def compiled_alone(case):
    row = rows_of(replace(case, providers={way: case.providers[way] for way in ("unpatched", COMPILED)}))[COMPILED]
    assert row["parity"] is True and row["us"] > 0, row


def test_compiled_layers(monkeypatch):
    """By a compiler that only traces. What was compiled of the judged model's layers serves the timed one's."""
    made, compile_layer = [], nn.Module.compile

    def backend(graph, inputs):
        made.append(timed)
        return graph

    def timer(way, sets):
        nonlocal timed
        timed = way.compiled is not None
        return case.timer(way, sets)

    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: compile_layer(self, backend=backend, **options))
    case, timed = bench_end_to_end.step_case(replace(SMALL, layers=1, cross=(0,)), 1, 12, True), False
    assert list(case.providers) == ["unpatched", "patched", COMPILED, "unpatched + torch.compile"], "what compiles comes last"
    compiled_alone(replace(case, timer=timer))
    assert len(made) == 3 and not any(made), "a graph for each kind of layer"


def test_decoding_with_a_static_cache(monkeypatch):
    """As generate compiles it, but for the compiler."""
    compiled = []
    monkeypatch.setattr(torch, "compile", lambda fn, **options: compiled.append(options) or fn)
    compiled_alone(bench_end_to_end.decode_case(SMALL, 1, 6, 8, True))
    assert [options["mode"] for options in compiled] == ["reduce-overhead"] * 2  # for the model that is judged, and the one that is timed


def hooked_with_the_patch(monkeypatch, hook):
    """While a model is patched, its layer 1 has the hook that hook(layer) registers."""
    own = fastfuse.patched

    @contextlib.contextmanager
    def patched(model, **options):
        with own(model, **options) as report, hook(model.get_submodule("base_model.model.model.language_model.layers.1")):
            yield report

    monkeypatch.setattr(fastfuse, "patched", patched)


@pytest.mark.parametrize("kind", ["step", "decode"])
def test_a_wrong_patch_gets_no_speed_up(kind, monkeypatch):
    hooked_with_the_patch(monkeypatch, lambda layer: layer.mlp.register_forward_hook(lambda m, args, out: out * 1.1))
    rows = rows_of(KINDS[kind]())
    assert rows["patched"]["parity"] is False and rows["unpatched"]["parity"] is True and rows["patched"]["us"] > 0
    text = harness.table(rows.values())
    assert "WRONG" in text and "as fast" not in text


def test_a_patch_that_does_nothing_is_an_error(monkeypatch):
    """Its time would be the unpatched model's."""
    hooked_with_the_patch(monkeypatch, lambda layer: layer.register_forward_pre_hook(lambda m, args, kwargs: None, with_kwargs=True))
    with pytest.warns(UserWarning, match="HOOKED"):
        row = rows_of(KINDS["step"]())["patched"]
    assert "ran their own forward" in row["error"] and row["us"] is None and row["parity"] is None


def test_every_way_starts_from_the_same_adapters(monkeypatch):
    case, seen = KINDS["step"](), []
    own = bench_end_to_end._step

    def step(i):
        if "optimizer" in i:  # of the model that is timed
            seen.append((i["model"], [p.detach().clone() for p in mllama.trainable(i["model"])]))
        return own(i)

    for way in case.providers.values():
        object.__setattr__(way, "run", step)
    rows_of(case)
    assert len({id(model) for model, _ in seen}) == 1
    same = [all(map(torch.equal, seen[0][1], adapters)) for _, adapters in seen]
    assert same.count(True) == 2 and not same[1], "one start for each of two ways, and AdamW moves on"


def test_the_real_model_has_its_size():
    model = mllama.on_meta(FULL)
    assert sum(p.numel() for p in model.parameters()) == 10_670_220_835  # what the published checkpoint has
    ratios = [tuple(r) for r in model.config.vision_config.supported_aspect_ratios]
    assert ratios[mllama.SQUARE - 1] == (2, 2)
    linears = {(m.out_features, m.in_features) for name, m in model.named_modules() if isinstance(m, nn.Linear) and name != "lm_head"}
    counted = [(N, K) for N, K, *_ in mllama.text_linears(FULL)]
    assert linears == {*counted, *mllama.vision_linears(FULL), (FULL.hidden, FULL.projected)}
    in_decoder = [m for m in model.model.language_model.modules() if isinstance(m, nn.Linear)]
    assert sorted(counted) == sorted((m.out_features, m.in_features) for m in in_decoder)


class Held(TorchDispatchMode):
    """Bytes of CPU tensors made inside that are alive, and the most there ever were."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor) and t.device.type == "cpu" and (storage := t.untyped_storage()) not in self.known:
                self.known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._gone, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _gone(self, n):
        self.now -= n


def test_building_takes_one_layer_more_than_the_model():
    over = []
    for layers in (2, 6):
        with Held() as held:
            model = mllama.build(replace(SMALL, layers=layers, mlp=512), "cpu")
        assert not [n for n, t in [*model.named_parameters(), *model.named_buffers()] if t.is_meta]
        over.append(held.peak - held.now)
    dense = sum(2 * N * K for N, K, *_ in mllama.text_linears(replace(SMALL, layers=4, mlp=512)))  # four more layers in bf16
    assert over[1] - over[0] < 0.1 * dense


def test_what_is_quantized_and_what_is_trained():
    model = mllama.build(TINY, "cpu")
    adapters = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(adapters) == 2 * len(list(mllama.text_linears(TINY))) and not [n for n in adapters if "vision" in n or "lora" not in n]
    assert {p.dtype for p in mllama.trainable(model)} == {torch.bfloat16}
    dense = {name for name, m in model.named_modules() if type(m) is nn.Linear and "lora" not in name}
    assert dense == {"base_model.model.lm_head"}
    read = sum(mllama.layer_bytes(N, K) for N, K, *_ in mllama.text_linears(TINY))
    held = sum(
        fastfuse.quant.nf4.NF4View.of(m.weight).nbytes for n, m in model.named_modules() if type(m).__module__.startswith("bitsandbytes") and "language" in n
    )
    assert read == held + sum(p.nbytes for p in mllama.trainable(model))


def test_flops_are_those_of_a_dense_copy():
    """FlopCounterMode over the same architecture, unquantized, its attention as matrix products."""
    b, text = 2, 11
    model = transformers.MllamaForConditionalGeneration(mllama.config(TINY))
    model.set_attn_implementation("eager")
    model = get_peft_model(model, LoraConfig(r=RANK, target_modules=mllama.LORA, exclude_modules=".*vision_model.*"))
    given = mllama.batch(TINY, b, text, "cpu")
    given["pixel_values"] = given["pixel_values"].float()
    with FlopCounterMode(display=False) as counter:
        model(**given, labels=given["input_ids"].clamp(max=TINY.vocab - 1), use_cache=False).loss.backward()
    padded = -(-TINY.tile_tokens // 8) * 8  # transformers pads tiles, and computes every pair of texts, masked or not: no floor counts that
    assert padded > TINY.tile_tokens
    attention = 3 * mllama.attention_flops(b * text * ((TINY.layers - 2) * text + 2 * TINY.image_tokens), TINY.hidden)
    done = mllama.decoder_flops(TINY, b, text) + mllama.vision_flops(TINY, b, padded) + attention
    mask, rotary = 2 * b * (4 * padded) ** 2, b * text * TINY.hidden // TINY.heads  # made as products: the tiles' mask, in some versions the angles
    assert mask <= counter.get_total_flops() - done <= mask + rotary
    unseen = b * ((TINY.layers - 2) * text * (text - 1) // 2 + 2 * TINY.image_tokens)
    less = 3 * mllama.attention_flops(unseen, TINY.hidden) + mllama.vision_flops(TINY, b, padded) - mllama.vision_flops(TINY, b, TINY.tile_tokens)
    assert mllama.step_cost(TINY, b, text).flops == done - less

    with torch.no_grad():
        cache = model(**given, use_cache=True).past_key_values
        with FlopCounterMode(display=False) as counter:
            sees = torch.cat([given["cross_attention_mask"], given["cross_attention_mask"][:, -1:]], 1)
            model(input_ids=torch.ones(b, 1, dtype=torch.int64), cross_attention_mask=sees, past_key_values=cache, use_cache=True)
    assert 0 <= counter.get_total_flops() - mllama.decode_cost(TINY, b, text + 1).flops <= rotary // text


def test_bytes_by_hand():
    """The published model, a text of 80 tokens: 8.7e9 weights of 4.127 bits, adapters, the head, and keys and values of 128 in bf16."""
    self_layer = 2 * 4096 * 4096 + 2 * 1024 * 4096 + 3 * 14336 * 4096
    weights = 40 * self_layer - 8 * 2 * 1024 * 4096  # the image's keys and values are cached
    codes = weights // 2 + weights // 64 + 4 * weights // 64 // 256
    adapters = 2 * 16 * (40 * (4 * 4096 + 2 * (4096 + 1024) + 3 * (4096 + 14336)) - 8 * 2 * (4096 + 1024))
    tables = 4 * (256 + 16 + 1) * (40 * 7 - 8 * 2)
    head, norms = 2 * 128256 * 4096, 2 * (81 * 4096 + 8 * 128)
    caches = 2 * 2 * 1024 * (32 * 80 + 8 * 4 * 1601)
    assert mllama.decode_cost(FULL, 1, 80).bytes == codes + adapters + tables + head + norms + caches
    assert mllama.decode_cost(FULL, 8, 80).bytes - mllama.decode_cost(FULL, 1, 80).bytes == 7 * caches


def test_each_part_of_the_step_moves_its_floor():
    one, two = (mllama.step_cost(FULL, b, 512) for b in (1, 2))
    weights = sum(N * K for N, K, *_ in mllama.text_linears(FULL))
    assert one.flops > 4 * 512 * weights and one.bytes > 2 * weights / 2 + mllama.head_bytes(FULL) * 2
    assert two.bytes == one.bytes and two.flops == 2 * one.flops
