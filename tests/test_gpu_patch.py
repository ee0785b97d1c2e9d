"""patch(model) over transformers' Mllama on a GPU: as good as transformers there, no waiting for the device, compiled decoding."""

import copy

import mllama
import pytest
import torch
from numerics import assert_no_worse
from suite import without_waiting

import fastfuse
from cases.linear import BF16, F16, F32

pytestmark = pytest.mark.gpu


def batch(side="left", dtype=BF16):
    given = mllama.padded(mllama.batch([["coffee"], ["astronaut", "chelsea"], []]), side)
    return {k: (v.to(dtype) if v.is_floating_point() else v).cuda() for k, v in given.items()}


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [BF16, F16, F32])
def test_logits(dtype, implementation, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # cuDNN's default rounds fp32 convolutions to 10 bits
    model = mllama.build(mllama.config()).to(dtype)
    model.set_attn_implementation(implementation)
    exact = mllama.exactly(model).cuda()
    model, given = model.cuda(), batch(dtype=dtype)
    real = given["attention_mask"][..., None]
    with torch.no_grad():
        truth = exact(**(given | {"pixel_values": given["pixel_values"].double()})).logits * real
        eager = model(**given).logits * real
        report = fastfuse.patch(model)
        got = model(**given).logits * real
    assert {e.backend for e in report.patched} == {"triton"} and fastfuse.status(model).fallbacks == {}
    assert_no_worse(got, eager, truth)


def test_nothing_waits_for_the_device():
    model = mllama.build(mllama.config()).bfloat16().cuda()
    model.set_attn_implementation("sdpa")
    given = {k: v for k, v in batch().items() if k != "attention_mask"}  # whose values transformers reads
    fastfuse.patch(model)
    without_waiting(lambda: model(**given).logits.sum().backward())


@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens(cache):
    """A static cache is compiled with CUDA graphs by transformers itself."""
    model = mllama.build(mllama.config()).cuda()
    given = batch(dtype=F32)
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "cache_implementation": cache}
    want = model.generate(**given, **options)
    fastfuse.patch(model)
    assert torch.equal(model.generate(**given, **options), want)
    assert fastfuse.status(model).fallbacks == {}


def test_qlora_training():
    model = mllama.qlora().cuda().train()
    twin = copy.deepcopy(model)
    report = fastfuse.patch(model, verify=True)
    assert not report.skipped and {e.backend for e in report.patched} == {"triton"}
    given = batch("right", F32)
    curves = [mllama.losses(m, given, 5) for m in (model, twin)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-3) and curves[0][-1] < curves[0][0]


def test_a_warm_model_compiles_nothing(tmp_path, monkeypatch):
    """head_dim 32 is no other test's: nothing of its attention is in this process yet."""
    import triton

    misses = []
    model = mllama.qlora(mllama.config(hidden_size=256, intermediate_size=512), BF16).cuda()
    fastfuse.patch(model)
    with triton.knobs.cache.scope(), triton.knobs.compilation.scope():
        triton.knobs.cache.dir = str(tmp_path)
        report = fastfuse.warmup(model, backward=True, progress=False)
        assert report.kernels and report.left_out == ()
        triton.knobs.compilation.listener = lambda *, src, cache_hit, **rest: cache_hit or misses.append(src.name)
        model.train()(**batch()).logits.sum().backward()
        model.eval().generate(**{k: v[:1] for k, v in batch("none").items()}, max_new_tokens=3, do_sample=False)
    assert misses == []
