"""A model warmed up in one process and used in another. Run by test_warm_up.py, without the interpreter.

python -m tests.warm_up warm MODEL     warmup(model) for sm_90, twice
python -m tests.warm_up use MODEL      calls of it, every launch through Triton's own binder and compiler, for a GPU that is not there
python -m tests.warm_up calls MODEL    warmup with calls of one's own, and with a kernel that does not compile
"""

import contextlib
import json
import sys
from types import SimpleNamespace

import torch
import triton
import triton.language as tl
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

import fastfuse
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


def listen(*, src, cache_hit: bool, **rest) -> None:
    hits.append(cache_hit)
    names.add(src.name)


def mllama():
    """(transformers' Mllama in QLoRA with dropout, patched; what a user does with it for so many sequences of so many tokens)."""
    model = qlora(config(hidden_size=128, intermediate_size=256), torch.bfloat16, lora_dropout=0.1)
    fastfuse.patch(model)

    def call(sequences: int, tokens: int) -> None:
        given = batch([["coffee"]] * sequences, tokens)
        given["pixel_values"] = given["pixel_values"].bfloat16()
        model.train()
        model(**given).logits.sum().backward()
        model.eval()
        with torch.no_grad():
            seen = model(**given, use_cache=True)
            mask = given["cross_attention_mask"][:, -1:]
            more = torch.ones(sequences, tokens + 1, dtype=torch.int64)
            model(input_ids=given["input_ids"][:, -1:], attention_mask=more, cross_attention_mask=mask, past_key_values=seen.past_key_values)

    return model, call


def autocast():
    """mllama in training under autocast, with adapters in fp32 as PEFT has them."""
    model, call = mllama()

    def cast(sequences: int, tokens: int) -> None:
        if tokens < 700:
            with torch.autocast("cpu", torch.bfloat16):
                call(sequences, tokens)

    return model, cast


def own():
    """The same of fastfuse's DeepFusionModel, whose masks are of image tokens and whose caches have a fixed size."""
    config = Llama3VisionConfig(
        tile_size=56, clip_embed_dim=128, clip_num_heads=4, clip_num_layers=2, clip_hidden_dim=256, clip_hidden_states=(0,), num_layers_projection=1,
        vocab_size=96, num_layers=2, fusion_interval=1, num_heads=8, num_kv_heads=4, embed_dim=256, intermediate_dim=512, max_seq_len=1024,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = build_lora(config, ["q_proj", "v_proj"], decoder_lora=True, lora_rank=8, lora_alpha=8, quantize_base=True)
    torch.set_default_dtype(torch.float32)

    def call(sequences: int, tokens: int) -> None:
        images = {
            "images": torch.zeros(sequences, 1, tiles := 4 if sequences == 1 else 1, 3, 56, 56, dtype=torch.bfloat16),
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
    _op.stand_in = lambda launch, args: launch(*args)
    try:
        with tune.assume("sm_90", 132):
            yield
    finally:
        JITFunction.run, triton.runtime.driver._active, _op.stand_in = real, driver, None


def calls() -> dict:
    triton.knobs.compilation.listener = listen
    q, k = torch.ones(1, 8, 1, 64, dtype=torch.bfloat16), torch.ones(1, 2, 600, 64, dtype=torch.bfloat16)
    seen = []

    def decode() -> None:
        cache = StaticKVCache(1, 2, 64, 600, torch.bfloat16, "cpu")
        cache.fill(k, k)
        seen.append(cross_attention_decode(q, cache))

    fastfuse.warmup(nn.Linear(2, 2), decode, target="sm_90", progress=False)
    found, of_call = {"zeros": not seen[0].any().item()}, sorted(names)
    with launching():
        hits.clear()
        EncoderMask.from_tiles(torch.zeros(1, 3, 1, 4, dtype=torch.bool), 17)
    after = "launches again" if hits == [False] else str(hits)
    hits.clear()

    def wrong() -> None:
        two = torch.empty(2)
        _op.replaceable(lambda x: _wrong_kernel[(1,)](x, BLOCK=4))(two)
        EncoderMask.from_tiles(torch.zeros(1, 3, 1, 4, dtype=torch.bool), 40)

    try:
        fastfuse.warmup(nn.Linear(2, 2), wrong, target="sm_90", progress=False)
        error = ""
    except RuntimeError as e:
        error = str(e)
    return found | {"kernels of the call": of_call, "after": after, "error": error, "compiled before the error": len(hits)}


@triton.jit
def _wrong_kernel(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.zeros([2 * BLOCK], tl.float32))


if __name__ == "__main__":
    what, kind = sys.argv[1:]
    model, call = {"mllama": mllama, "autocast": autocast, "own": own}[kind]()
    if what == "warm":
        before = {name: p.clone() for name, p in model.state_dict().items()}
        state = torch.get_rng_state()
        dtype = torch.bfloat16 if kind == "autocast" else None
        model.eval()
        first, again = (fastfuse.warmup(model, target="sm_90", backward=True, autocast=dtype) for _ in range(2))
        same = all(torch.equal(p, before[name]) for name, p in model.state_dict().items()) and torch.equal(torch.get_rng_state(), state)
        json.dump({"kernels": first.kernels, "compiled": [first.compiled, again.compiled], "left out": first.left_out, "untouched": same}, sys.stdout)
    elif what == "use":
        triton.knobs.compilation.listener = listen
        with launching():
            for sequences, tokens in ((1, 12), (2, 40), (1, 700)):
                call(sequences, tokens)
        json.dump({"used": len(hits), "not in the cache": hits.count(False), "kernels": sorted(names)}, sys.stdout)
    else:
        json.dump(calls(), sys.stdout)
