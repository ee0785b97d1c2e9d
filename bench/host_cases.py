"""What bench.host calls: layers of the hosts, patched and as they are, fastfuse's own, and ops. Imported after as_on_gpu()."""

import functools
from collections.abc import Callable, Iterator

import bitsandbytes as bnb
import peft
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention

import fastfuse
from bench.host_case import FORWARD, NO_GRAD, Case
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear
from fastfuse.ops import EncoderMask, StaticKVCache, cross_attention, cross_attention_decode, nf4_lora_linear, nf4_lora_linears, patch_embed
from fastfuse.quant.torchao import to_nf4

BF16 = torch.bfloat16
WIDTH, NARROW, R = 4096, 512, 16  # narrow: where a CPU would take seconds to compute what it is only to launch
DECODE = ("PEFT LoRA over bitsandbytes, 512 x 512, patched, 1 token", "PEFT LoRA over bitsandbytes, 512 x 512, own, 1 token")


def cases() -> Iterator[Case]:
    once = (NO_GRAD,)
    yield Case("PEFT LoRA over bitsandbytes, patched, 1 token", lambda: (lora(patched=True), x(1)), quick=True)
    yield Case("PEFT LoRA over bitsandbytes, own, 1 token", lambda: (lora(), x(1)), quick=True, own=True)
    yield Case(DECODE[0], lambda: (lora(NARROW, patched=True), x(1, NARROW)), once)
    yield Case(DECODE[1], lambda: (lora(NARROW), x(1, NARROW)), once, own=True)
    for kind, options in VARIANTS.items():
        for patched in (True, False):
            name = f"PEFT {kind} over bitsandbytes, {'patched' if patched else 'own'}, 1 token"
            yield Case(name, functools.partial(lambda patched, options: (lora(patched=patched, **options), x(1)), patched, options), once, own=not patched)
    for M in (256, 2048):
        for patched in (True, False):
            name = f"PEFT LoRA over bitsandbytes, 512 x 512, {'patched' if patched else 'own'}, {M} tokens"
            make = functools.partial(lambda M, patched: (lora(NARROW, patched=patched), x(M, NARROW)), M, patched)
            yield Case(name, make, own=not patched)
    yield Case("bare Linear4bit, patched, 1 token", lambda: (bare(patched=True), x(1)), quick=True)
    yield Case("bare Linear4bit, own, 1 token", lambda: (bare(), x(1)), own=True)
    yield Case("PEFT LoRA over torchao, patched, 1 token", lambda: (lora(base=torchao_linear, patched=True), x(1)))
    yield Case("bare torchao linear, patched, 1 token", lambda: (patched_alone(torchao_linear(WIDTH)), x(1)))
    yield Case("LoRALinear, 1 token", lambda: (own_layer(LoRALinear, R, 32, quantize_base=True), x(1)))
    yield Case("DoRALinear, 1 token", lambda: (own_layer(DoRALinear, R, 32, quantize_base=True), x(1)))
    yield Case("FrozenNF4Linear, 1 token", lambda: (own_layer(FrozenNF4Linear), x(1)))
    yield Case("op nf4_lora_linear, 1 token", lambda: (op_linear(), x(1)), quick=True)
    yield Case("op nf4_lora_linears of 3 (q, k, v), 1 token", lambda: (op_linears(3), x(1)))
    yield Case("op cross_attention, 512 tokens", lambda: (op_attention(), heads(8, 512)))
    yield Case("op cross_attention, 1 token", lambda: (op_attention(1), heads(8, 1)), once, quick=True)
    yield Case("op cross_attention_decode over a StaticKVCache", lambda: (op_decode(), heads(8, 1)), once, quick=True)
    yield Case("Mllama cross-attention, decode, patched", lambda: (mllama(patched=True), x(1, HIDDEN)), once, quick=True)
    yield Case("Mllama cross-attention, decode, own", lambda: (mllama(), x(1, HIDDEN)), once, own=True)
    yield Case("Mllama cross-attention, decode, LoRA on q and o, patched", lambda: (mllama(lora=True, patched=True), x(1, HIDDEN)), once)
    yield Case("Mllama cross-attention, decode, LoRA on q and o, own", lambda: (mllama(lora=True), x(1, HIDDEN)), once, own=True)
    yield Case("op patch_embed", lambda: (op_patch_embed(), images()), (NO_GRAD, FORWARD), quick=True)


def x(M: int, K: int = WIDTH) -> Tensor:
    return torch.zeros(1, M, K, dtype=BF16)


# Linear layers

VARIANTS = {
    "rsLoRA": {"use_rslora": True},
    "DoRA": {"use_dora": True},
    "LoRA with bias": {"bias": True},
    "LoRA with dropout, eval": {"lora_dropout": 0.1},
}


class Holder(nn.Module):
    """Something for PEFT to look for names in."""

    def __init__(self, **layers: nn.Module):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)


def bnb_linear(K: int, bias: bool = False) -> nn.Module:
    with torch.device("meta"):
        layer = bnb.nn.Linear4bit(K, K, bias=bias, compute_dtype=BF16, quant_type="nf4", compress_statistics=True)
    codes = bnb.nn.Params4bit(torch.zeros(K, K, dtype=BF16), requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer)
    layer.weight = codes.to("cpu")
    layer.bias = nn.Parameter(torch.zeros(K, dtype=BF16)) if bias else None
    return layer


def torchao_linear(K: int, bias: bool = False) -> nn.Module:
    layer = nn.Linear(K, K, bias=bias, device="meta", dtype=BF16)
    layer.weight = nn.Parameter(torchao_weight(K), requires_grad=False)
    return layer


@functools.cache
def torchao_weight(K: int) -> Tensor:
    return to_nf4(torch.zeros(K, K, dtype=BF16))


def lora(K: int = WIDTH, *, base: Callable = bnb_linear, patched: bool = False, bias: bool = False, **options) -> nn.Module:
    """A PEFT layer with A and B in fp32, as PEFT keeps them, in eval."""
    model = adapted(Holder(q_proj=base(K, bias)), ["q_proj"], **options)
    if patched:
        fastfuse.patch(model)
    return model.base_model.model.q_proj


def adapted(model: nn.Module, targets: list[str], **options) -> nn.Module:
    config = peft.LoraConfig(r=R, target_modules=targets, **options)
    return peft.get_peft_model(model, config, autocast_adapter_dtype=True).eval()


def bare(patched: bool = False) -> nn.Module:
    return patched_alone(bnb_linear(WIDTH)) if patched else bnb_linear(WIDTH)


def patched_alone(layer: nn.Module) -> nn.Module:
    fastfuse.patch(Holder(layer=layer))
    return layer


def own_layer(kind: type, *sizes, **options) -> nn.Module:
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
    return functools.partial(nf4_lora_linear, weight=weight, lora_a=a, lora_b=b, scaling=scaling)


def op_linears(n: int) -> Callable:
    return functools.partial(nf4_lora_linears, projections=[projection() for _ in range(n)])


# Cross-attention: 8 query heads of 32 over 2, which a CPU can compute; an image of one tile

HIDDEN, HEADS, KEY_HEADS, HEAD_DIM, IMAGE = 256, 8, 2, 32, 1601


def heads(n: int, tokens: int) -> Tensor:
    return torch.zeros(1, n, tokens, HEAD_DIM, dtype=BF16)


def one_tile(tokens: int) -> EncoderMask:
    return EncoderMask.from_tiles(torch.ones(1, tokens, 1, 1, dtype=torch.bool), IMAGE)


def op_attention(tokens: int = 512) -> Callable:
    k, v = (heads(KEY_HEADS, IMAGE).requires_grad_() for _ in range(2))
    return functools.partial(cross_attention, k=k, v=v, mask=one_tile(tokens))


def op_decode() -> Callable:
    cache = StaticKVCache(1, KEY_HEADS, HEAD_DIM, IMAGE, BF16)
    cache.fill(heads(KEY_HEADS, IMAGE), heads(KEY_HEADS, IMAGE))
    return functools.partial(cross_attention_decode, cache=cache)


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
        layer(torch.zeros(1, 1, HIDDEN, dtype=BF16), torch.zeros(1, IMAGE, HIDDEN, dtype=BF16), past_key_values=cache, attention_mask=None)
    model = Holder(attention=layer)
    if lora:
        layer.q_proj, layer.o_proj = bnb_linear(HIDDEN), bnb_linear(HIDDEN)
        model = adapted(model, ["q_proj", "o_proj"])
    if patched:
        fastfuse.patch(model)
    mask = one_tile(1) if patched else torch.zeros(1, 1, 1, IMAGE, dtype=BF16)
    return functools.partial(layer, cross_attention_states=None, past_key_values=cache, attention_mask=mask)


# Patch embedding: one image of 4 tiles of 56 pixels, 128 features

FEATURES, PATCHES = 128, 16


def images() -> Tensor:
    return torch.zeros(1, 4, 3, 56, 56, dtype=BF16)


def op_patch_embed() -> Callable:
    n = PATCHES + 1
    tables = {
        "cls": (FEATURES,), "local_pos": (n, FEATURES), "gate": (1,), "pre_gate": (1,),
        "global_pos": (9, 4, n, FEATURES), "pre_pos": (9, 4, 1, FEATURES),
    }  # fmt: skip
    tensors = {name: nn.Parameter(torch.zeros(shape, dtype=BF16)) for name, shape in tables.items()}
    weight, norm = nn.Parameter(torch.zeros(FEATURES, 3, 14, 14, dtype=BF16)), (torch.ones(FEATURES, dtype=BF16), torch.zeros(FEATURES, dtype=BF16), 1e-5)
    return functools.partial(patch_embed, weight=weight, aspect_ratio=torch.ones(1, dtype=torch.int64), norm=norm, pad_tokens_to=8, **tensors)
