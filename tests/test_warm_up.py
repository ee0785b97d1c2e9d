"""warmup(model): a second process starts without compiling, and nothing else happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastfuse
from fastfuse import Unsupported

ROOT = Path(__file__).parents[1]

pytest.importorskip("triton", reason="Triton ships for Linux alone")


def process(cache: Path, *args: str) -> dict:
    """A process of its own: here kernels were loaded for the interpreter, which cannot be compiled."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = subprocess.run([sys.executable, "-m", "tests.warm_up", *args], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("model", ["mllama", "autocast", "own"])
def test_a_second_process_starts_without_compiling(model, tmp_path):
    """Training and generating with 12, 40 and 700 tokens, one sequence and two, after a warm-up in eval mode that was told none of it."""
    warm = process(tmp_path, "warm", model)
    assert warm["left out"] == [] and warm["untouched"]
    assert warm["compiled"] == [warm["kernels"], 0] and warm["kernels"] > 30
    use = process(tmp_path, "use", model)
    assert use["not in the cache"] == 0 and use["used"] >= 20, use
    placed = "patch_embed_fwd_kernel" if model == "autocast" else "place_kernel"  # whose norm is PyTorch's own
    assert {"nf4_skinny_kernel", "nf4_linear_dx_kernel", placed, "cross_attention_dkdv_kernel"} <= set(use["kernels"])


def test_calls_of_the_users_own_are_collected_and_give_zeros(tmp_path):
    """With a static cache, which no module's rehearsal knows of. One wrong kernel, and the others are compiled first."""
    made = process(tmp_path, "calls", "mllama")
    assert made["zeros"] and made["kernels of the call"] == ["cross_attention_fwd_kernel", "cross_attention_merge_kernel", "kv_cache_write_kernel"]
    assert made["after"] == "launches again"
    assert "1 of 2 kernels do not compile, the first:" in made["error"] and made["compiled before the error"] == 1


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        pytest.param({"target": "gfx942"}, ValueError, "target is 'gfx942', expected an NVIDIA architecture", id="target"),
        pytest.param({"target": "sm_75"}, Unsupported, "no kernel covers sm_75", id="old"),
        pytest.param({"workers": 0, "target": "sm_90"}, ValueError, "workers is 0, expected at least 1", id="workers"),
    ],
)
def test_refusals(options, error, words, monkeypatch):
    monkeypatch.setattr("fastfuse.patching.warm_up.INTERPRET", False)
    with pytest.raises(error, match=words):
        fastfuse.warmup(nn.Linear(2, 2), **options)


def test_refuses_what_it_cannot_compile_for(monkeypatch):
    monkeypatch.setattr("fastfuse.patching.warm_up.INTERPRET", False)
    with pytest.warns(UserWarning, match="nothing in Linear runs a fused op: call patch"):
        assert fastfuse.warmup(nn.Linear(2, 2), target="sm_90", progress=False).kernels == 0
    monkeypatch.undo()
    with pytest.raises(TypeError, match="warmup: model is a int"):
        fastfuse.warmup(3)
    with pytest.raises(TypeError, match="warmup: a call is a Tensor, not a function"):
        fastfuse.warmup(nn.Linear(2, 2), torch.zeros(1))
    if os.environ.get("TRITON_INTERPRET"):
        with pytest.raises(Unsupported, match="TRITON_INTERPRET is set"):
            fastfuse.warmup(nn.Linear(2, 2), target="sm_90")
    if not torch.cuda.is_available():
        monkeypatch.setattr("fastfuse.patching.warm_up.INTERPRET", False)
        with pytest.raises(Unsupported, match="there is no GPU to compile for: name one, target='sm_90'"):
            fastfuse.warmup(nn.Linear(2, 2))
