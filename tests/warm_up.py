"""A model warmed up in one process and used in another, each of which fails where it is not as promised. Run by test_warm_up.py, without the interpreter.

python -m tests.warm_up warm MODEL     warmup(model) for sm_90, twice
python -m tests.warm_up use MODEL      calls of it, every launch through Triton's own binder and compiler, for a GPU that is not there
python -m tests.warm_up calls          warmup with calls of one's own, and with a kernel that does not compile
"""

import contextlib
import sys
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

import fastfuse
from cases.linear import BF16
from fastfuse import tune
from fastfuse.generation import generate
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build_lora
from fastfuse.ops import EncoderMask, StaticKVCache, _op, cross_attention_decode
from tests.mllama import batch, config, qlora

hits, names = [], set()


class NoDevice:
    """A driver that says sm_90 and has nothing to launch on."""

    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_device_interface = staticmethod(lambda: SimpleNamespace(current_device=lambda: 0, set_device=lambda device: None))
    get_active_torch_device = staticmethod(lambda: torch.device("cpu"))


def listen(*, src, cache_hit, **rest):
    hits.append(cache_hit)
    names.add(src.name)


def by_the_front_end():
    """From now on Triton compiles to its own IR and no further: the rest, which takes most of the time, is bench.codegen's to watch."""
    add_stages = CUDABackend.add_stages

    def shortened(self, stages, *args):
        add_stages(self, stages, *args)
        stages.update(dict.fromkeys(stages, lambda module, metadata: metadata.update(name="kernel", shared=0) or b""))

    CUDABackend.add_stages = shortened


def mllama():
    """(transformers' Mllama in QLoRA with dropout, patched, its adapters in fp32 as PEFT has them; what a user does with it for so many sequences of so many
    tokens, under autocast too)."""
    model = qlora(config(hidden_size=128, intermediate_size=256), BF16, lora_dropout=0.1)
    fastfuse.patch(model)

    def call(sequences, tokens):
        given = batch([["coffee"]] * sequences, tokens)
        given["pixel_values"] = given["pixel_values"].bfloat16()
        more = torch.ones(sequences, tokens + 1, dtype=torch.int64)
        for cast in (False, True):
            with torch.autocast("cpu", BF16, enabled=cast):
                model.train()(**given).logits.sum().backward()
                with torch.no_grad():
                    seen = model.eval()(**given, use_cache=True)
                    mask = given["cross_attention_mask"][:, -1:]
                    model(input_ids=given["input_ids"][:, -1:], attention_mask=more, cross_attention_mask=mask, past_key_values=seen.past_key_values)

    return model, call


def own():
    """The same of fastfuse's DeepFusionModel, whose masks are of image tokens and whose caches have a fixed size."""
    config = Llama3VisionConfig(
        tile_size=56, clip_embed_dim=128, clip_num_heads=4, clip_num_layers=2, clip_hidden_dim=256, clip_hidden_states=(0,), num_layers_projection=1,
        vocab_size=96, num_layers=2, fusion_interval=1, num_heads=8, num_kv_heads=4, embed_dim=256, intermediate_dim=512, max_seq_len=1024,
    )  # fmt: skip
    torch.set_default_dtype(BF16)
    model = build_lora(config, ["q_proj", "v_proj"], decoder_lora=True, lora_rank=8, lora_alpha=8, quantize_base=True)
    torch.set_default_dtype(torch.float32)

    def call(sequences, tokens):
        images = {
            "images": torch.zeros(sequences, 1, tiles := 4 if sequences == 1 else 1, 3, 56, 56, dtype=BF16),
            "aspect_ratio": torch.full((sequences, 1, 2), 2 if tiles == 4 else 1),
        }
        given = {"encoder_input": images, "encoder_mask": torch.ones(sequences, tokens, tiles * 17, dtype=torch.bool)}
        prompt = torch.full((sequences, tokens), 5)
        model.train()
        model(prompt, **given).sum().backward()
        model.eval()
        generate(model, prompt, max_generated_tokens=2, temperature=0, **given)

    return model, call


@contextlib.contextmanager
def launching():
    """Launchers run on a CPU's tensors; kernels are compiled for their arguments and not launched."""
    real, driver = JITFunction.run, triton.runtime.driver._active
    JITFunction.run = lambda self, *args, grid, warmup=False, **options: real(self, *args, grid=grid, warmup=True, **options)
    triton.runtime.driver.set_active(NoDevice())
    _op.launch_interceptor = lambda launch, args: launch(*args)
    try:
        with tune.assume("sm_90", 132):
            yield
    finally:
        JITFunction.run, triton.runtime.driver._active, _op.launch_interceptor = real, driver, None


def calls():
    triton.knobs.compilation.listener = listen
    q, k = torch.ones(1, 8, 1, 64, dtype=BF16), torch.ones(1, 2, 600, 64, dtype=BF16)
    seen = []

    def decode():
        cache = StaticKVCache(1, 2, 64, 600, BF16, "cpu")
        cache.fill(k, k)
        seen.append(cross_attention_decode(q, cache))

    fastfuse.warmup(nn.Linear(2, 2), decode, target="sm_90", progress=False)
    assert not seen[0].any() and names == {"cross_attention_fwd_kernel", "cross_attention_merge_kernel", "kv_cache_write_kernel"}
    hits.clear()
    with launching():
        EncoderMask.from_tiles(torch.zeros(1, 3, 1, 4, dtype=torch.bool), 17)
    assert hits == [False], "it launches again"
    hits.clear()

    def wrong():
        two = torch.empty(2)
        _op.replaceable(lambda x: _wrong_kernel[(1,)](x, BLOCK=4))(two)
        EncoderMask.from_tiles(torch.zeros(1, 3, 1, 4, dtype=torch.bool), 40)

    with pytest.raises(RuntimeError, match="1 of 2 kernels do not compile, the first:"):
        fastfuse.warmup(nn.Linear(2, 2), wrong, target="sm_90", progress=False)
    assert len(hits) == 1, "the other one first"


@triton.jit
def _wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([2 * BLOCK], tl.float32))


def warm(model, autocast):
    before, state = {name: p.clone() for name, p in model.state_dict().items()}, torch.get_rng_state()
    model.eval()
    first, again = (fastfuse.warmup(model, target="sm_90", backward=True, autocast=autocast) for _ in range(2))
    assert first.left_out == () and first.compiled == first.kernels > 30 and again.compiled == 0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and torch.equal(torch.get_rng_state(), state)


def use(call, more):
    triton.knobs.compilation.listener = listen
    with launching():
        for sequences, tokens in ((1, 12), (2, 40), (1, 700)):
            call(sequences, tokens)
    assert len(hits) >= 20 and all(hits)
    assert {"nf4_skinny_kernel", "nf4_linear_dx_kernel", "place_kernel", "cross_attention_dkdv_kernel", *more} <= names


# Under autocast, where a norm is PyTorch's own, Mllama's patches go another way.
MODELS = {"mllama": (mllama, BF16, ["patch_embed_fwd_kernel"]), "own": (own, None, [])}

if __name__ == "__main__":
    what, *kind = sys.argv[1:]
    if what == "calls":
        calls()
    else:
        by_the_front_end()
        make, autocast, more = MODELS[kind[0]]
        model, call = make()
        warm(model, autocast) if what == "warm" else use(call, more)
