"""warmup(model): a second process starts without compiling, and nothing else happens."""

import pytest
import torch
from conftest import GPU
from processes import python
from torch import nn

import fastfuse
from fastfuse import Unsupported

MODEL = nn.Linear(2, 2)

pytest.importorskip("triton", reason="Triton ships for Linux alone")


def process(cache, *args):
    python("-m", "tests.warm_up", *args, TRITON_CACHE_DIR=str(cache))


@pytest.mark.parametrize("model", ["mllama", "own"])
def test_a_second_process_starts_without_compiling(model, tmp_path):
    """Training and generating with 12, 40 and 700 tokens, one sequence and two, after a warm-up in eval mode that was told none of it."""
    process(tmp_path, "warm", model)
    process(tmp_path, "use", model)


def test_calls_of_the_users_own_are_collected_and_give_zeros(tmp_path):
    """With a static cache, which no module's rehearsal knows of. One wrong kernel, and the others are compiled first."""
    process(tmp_path, "calls")


REFUSED = [
    ((3,), {}, TypeError, "warmup: model is a int"),
    ((MODEL, torch.zeros(1)), {}, TypeError, "warmup: a call is a Tensor, not a function"),
    ((MODEL,), {"target": "gfx942"}, ValueError, "target is 'gfx942', expected an NVIDIA architecture"),
    ((MODEL,), {"target": "sm_75"}, Unsupported, "no kernel covers sm_75"),
    ((MODEL,), {"workers": 0, "target": "sm_90"}, ValueError, "workers is 0, expected at least 1"),
    *([] if GPU else [((MODEL,), {}, Unsupported, "there is no GPU to compile for: name one, target='sm_90'")]),
]


@pytest.mark.parametrize("args, options, error, words", REFUSED)
def test_refusals(args, options, error, words, monkeypatch):
    monkeypatch.setattr("fastfuse.patching.warm_up.INTERPRET", False)
    with pytest.raises(error, match=words):
        fastfuse.warmup(*args, **options)


def test_where_there_is_nothing_to_compile(monkeypatch):
    monkeypatch.setattr("fastfuse.patching.warm_up.INTERPRET", False)
    with pytest.warns(UserWarning, match="nothing in Linear runs a fused op: call patch"):
        assert fastfuse.warmup(MODEL, target="sm_90", progress=False).kernels == 0
    monkeypatch.setattr("fastfuse.patching.warm_up.INTERPRET", True)
    with pytest.raises(Unsupported, match="TRITON_INTERPRET is set"):
        fastfuse.warmup(MODEL, target="sm_90")
