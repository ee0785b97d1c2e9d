"""What bench.host calls: layers of the hosts, patched and as they are, fastfuse's own, and ops. Imported after as_on_gpu()."""

from collections.abc import Callable, Iterator
from functools import cache, partial

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn
from torch.nn import Module
from transformers import DynamicCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

import fastfuse
from bench.host_case import FORWARD, MODES, NO_GRAD, Case
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear
from fastfuse.ops import EncoderMask, StaticKVCache, cross_attention, cross_attention_decode, nf4_lora_linear, nf4_lora_linears, patch_embed
from fastfuse.quant.torchao import to_nf4

BF16 = torch.bfloat16
WIDTH, NARROW, R = 4096, 512, 16  # narrow: where a CPU would take seconds to compute what it is only to launch
DECODE = tuple(f"PEFT LoRA over bitsandbytes, 512 x 512, {way}, 1 token" for way in ("patched", "own"))


def cases() -> Iterator[Case]:
    once, one_token, narrow = (NO_GRAD,), partial(x, 1), partial(lora, NARROW)
    yield from both("PEFT LoRA over bitsandbytes, {}, 1 token", lora, one_token, quick=("patched", "own"))
    yield from both("PEFT LoRA over bitsandbytes, 512 x 512, {}, 1 token", narrow, partial(x, 1, NARROW), once)
    for kind, options in VARIANTS.items():
        yield from both(f"PEFT {kind} over bitsandbytes, {{}}, 1 token", partial(lora, **options), one_token, once)
    for M in (256, 2048):
        yield from both(f"PEFT LoRA over bitsandbytes, 512 x 512, {{}}, {M} tokens", narrow, partial(x, M, NARROW))
    yield from both("bare Linear4bit, {}, 1 token", bare, one_token, quick=("patched",))
    for name, function in {
        "PEFT LoRA over torchao, patched": partial(lora, base=torchao_linear, patched=True),
        "bare torchao linear, patched": lambda: patched_alone(torchao_linear(WIDTH)),
        "LoRALinear": partial(own_layer, LoRALinear, R, 32, quantize_base=True),
        "DoRALinear": partial(own_layer, DoRALinear, R, 32, quantize_base=True),
        "FrozenNF4Linear": partial(own_layer, FrozenNF4Linear),
        "op nf4_lora_linear": op_linear,
        "op nf4_lora_linears of 3 (q, k, v)": partial(op_linears, 3),
    }.items():
        yield Case(f"{name}, 1 token", function, one_token, quick=function is op_linear)
    yield Case("op cross_attention, 512 tokens", op_attention, partial(heads, 8, 512))
    yield Case("op cross_attention, 1 token", partial(op_attention, 1), partial(heads, 8, 1), once, quick=True)
    yield Case("op cross_attention_decode over a StaticKVCache", op_decode, partial(heads, 8, 1), once, quick=True)
    yield from both("Mllama cross-attention, decode, {}", mllama, partial(x, 1, HIDDEN), once, quick=("patched",))
    yield from both("Mllama cross-attention, decode, LoRA on q and o, {}", partial(mllama, lora=True), partial(x, 1, HIDDEN), once)
    yield Case("op patch_embed", op_patch_embed, images, (NO_GRAD, FORWARD), quick=True)


def both(name: str, layer: Callable, x: Callable, modes: tuple[str, ...] = MODES, quick: tuple[str, ...] = ()) -> Iterator[Case]:
    """A host's layer, patched and as it is."""
    for way in ("patched", "own"):
        yield Case(name.format(way), partial(layer, patched=way == "patched"), x, modes, quick=way in quick, own=way == "own")


def zeros(*shape: int) -> Tensor:
    return torch.zeros(shape, dtype=BF16)


def x(M: int, K: int = WIDTH) -> Tensor:
    return zeros(1, M, K)


# Linear layers

VARIANTS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA with bias": {"bias": True},
    "LoRA with dropout, eval": {"lora_dropout": 0.1},
}


def bnb_linear(K: int, bias: bool = False) -> Module:
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(K, K, bias=bias, compute_dtype=BF16, quant_type="nf4")
    codes = bnb.nn.Params4bit(zeros(K, K), requires_grad=False, quant_type="nf4", module=layer)
    layer.weight = codes.to("cpu")
    layer.bias = nn.Parameter(zeros(K)) if bias else None
    return layer


def torchao_linear(K: int, bias: bool = False) -> Module:
    layer = nn.Linear(K, K, bias=bias, device="meta", dtype=BF16)
    layer.weight = nn.Parameter(torchao_weight(K), requires_grad=False)
    return layer


@cache
def torchao_weight(K: int) -> Tensor:
    return to_nf4(zeros(K, K))


def lora(K: int = WIDTH, *, base: Callable = bnb_linear, patched: bool = False, bias: bool = False, **options) -> Module:
    """A PEFT layer with A and B in fp32, as PEFT keeps them, in eval."""
    model = adapted(nn.ModuleDict({"q_proj": base(K, bias)}), ["q_proj"], **options)
    if patched:
        fastfuse.patch(model)
    return model.base_model.model.q_proj


def adapted(model: Module, targets: list[str], **options) -> Module:
    config = peft.LoraConfig(r=R, target_modules=targets, **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True).eval()


def bare(patched: bool = False) -> Module:
    return patched_alone(bnb_linear(WIDTH)) if patched else bnb_linear(WIDTH)


def patched_alone(layer: Module) -> Module:
    fastfuse.patch(nn.ModuleDict({"layer": layer}))
    return layer


def own_layer(kind: type, *sizes, **options) -> Module:
    torch.set_default_dtype(BF16)
    try:
        layer = kind(WIDTH, WIDTH, *sizes, **options).eval()
    finally:
        torch.set_default_dtype(torch.float32)
    if kind is DoRALinear:
        layer.magnitude.data.fill_(1)
    return layer


def projection() -> tuple:
    return bnb_linear(WIDTH).weight, nn.Parameter(torch.zeros(R, WIDTH)), nn.Parameter(torch.zeros(WIDTH, R)), 2.0


def op_linear() -> Callable:
    weight, a, b, scaling = projection()
    return partial(nf4_lora_linear, weight=weight, lora_a=a, lora_b=b, scaling=scaling)


def op_linears(n: int) -> Callable:
    return partial(nf4_lora_linears, projections=[projection() for _ in range(n)])


# Cross-attention: 8 query heads of 32 over 2, which a CPU can compute; an image of one tile

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, IMAGE = 256, 8, 2, 32, 1601


def heads(n: int, tokens: int) -> Tensor:
    return zeros(1, n, tokens, HEAD_DIM)


def one_tile(tokens: int) -> EncoderMask:
    return EncoderMask.from_tiles(torch.ones(1, tokens, 1, 1, dtype=torch.bool), IMAGE)


def op_attention(tokens: int = 512) -> Callable:
    k, v = (heads(KEY_HEADS, IMAGE).requires_grad_() for _ in range(2))
    return partial(cross_attention, k=k, v=v, mask=one_tile(tokens))


def op_decode() -> Callable:
    cache = StaticKVCache(1, KEY_HEADS, HEAD_DIM, IMAGE, BF16)
    cache.fill(heads(KEY_HEADS, IMAGE), heads(KEY_HEADS, IMAGE))
    return partial(cross_attention_decode, cache=cache)


def mllama(lora: bool = False, patched: bool = False) -> Callable:
    """A layer's decode step: keys and values come from its cache. What masks is the model's: made once a step, for all layers."""
    config = MllamaTextConfig(
        hidden_size=HIDDEN, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, num_hidden_layers=1, cross_attention_layers=[0],
        intermediate_size=HIDDEN, vocab_size=64, bos_token_id=0, eos_token_id=1, pad_token_id=2,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    layer = MllamaTextCrossAttention(config, 0).to(BF16).eval()
    cache = DynamicCache(config=config)
    with torch.no_grad():
        layer(zeros(1, 1, HIDDEN), zeros(1, IMAGE, HIDDEN), past_key_values=cache, attention_mask=None)
    model = nn.ModuleDict({"attention": layer})
    if lora:
        layer.q_proj, layer.o_proj = bnb_linear(HIDDEN), bnb_linear(HIDDEN)
        model = adapted(model, ["q_proj", "o_proj"])
    if patched:
        fastfuse.patch(model)
    mask = one_tile(1) if patched else zeros(1, 1, 1, IMAGE)
    return partial(layer, cross_attention_states=None, past_key_values=cache, attention_mask=mask)


# Patch embedding: one image of 4 tiles of 56 pixels, 128 features

FEATURES, PATCHES = 128, 16


def images() -> Tensor:
    return zeros(1, 4, 3, 56, 56)


def op_patch_embed() -> Callable:
    n = PATCHES + 1
    tables = {
        "cls": (FEATURES,), "local_pos": (n, FEATURES), "gate": (1,), "pre_gate": (1,),
        "global_pos": (9, 4, n, FEATURES), "pre_pos": (9, 4, 1, FEATURES),
    }  # fmt: skip
    tensors = {name: nn.Parameter(zeros(*shape)) for name, shape in tables.items()}
    weight, norm = nn.Parameter(zeros(FEATURES, 3, 14, 14)), (torch.ones(FEATURES, dtype=BF16), zeros(FEATURES), 1e-5)
    return partial(patch_embed, weight=weight, aspect_ratio=torch.ones(1, dtype=torch.int64), norm=norm, pad_tokens_to=8, **tensors)
