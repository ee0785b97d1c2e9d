"""warmup(model): a second process starts without compiling, and nothing else happens."""

import json

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
    return json.loads(python("-m", "tests.warm_up", *args, TRITON_CACHE_DIR=str(cache)).stdout.splitlines()[-1])


# Under autocast, where a norm is PyTorch's own, Mllama's patches go another way.
@pytest.mark.parametrize("model, more", [("mllama", {"patch_embed_fwd_kernel"}), ("own", set())])
def test_a_second_process_starts_without_compiling(model, more, tmp_path):
    """Training and generating with 12, 40 and 700 tokens, one sequence and two, after a warm-up in eval mode that was told none of it."""
    warm = process(tmp_path, "warm", model)
    assert warm["left out"] == [] and warm["untouched"]
    assert warm["compiled"] == [warm["kernels"], 0] and warm["kernels"] > 30
    use = process(tmp_path, "use", model)
    assert use["not in the cache"] == 0 and use["used"] >= 20, use
    assert {"nf4_skinny_kernel", "nf4_linear_dx_kernel", "place_kernel", "cross_attention_dkdv_kernel"} | more <= set(use["kernels"])


def test_calls_of_the_users_own_are_collected_and_give_zeros(tmp_path):
    """With a static cache, which no module's rehearsal knows of. One wrong kernel, and the others are compiled first."""
    made = process(tmp_path, "calls")
    assert made["zeros"] and made["kernels of the call"] == ["cross_attention_fwd_kernel", "cross_attention_merge_kernel", "kv_cache_write_kernel"]
    assert made["after"] == "launches again"
    assert "1 of 2 kernels do not compile, the first:" in made["error"] and made["compiled before the error"] == 1


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
