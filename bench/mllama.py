"""Llama-3.2-Vision with random weights as QLoRA holds it: NF4 in every linear layer but the head, LoRA over the decoder's. And what it must cost.

Nothing is loaded: each weight is drawn on the device and quantized before the next, so that building takes little more memory than the model.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import Module

from bench.nf4_peers import random_layer
from fastfuse.ops import nf4_dequantize_ref
from fastfuse.ops._op import Cost
from fastfuse.quant.nf4 import NF4View
from tests.numerics import exactly

RANK, DTYPE = 16, torch.bfloat16
LORA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
PATCH, TILES, SQUARE = 14, 4, 6  # SQUARE: the id of the aspect ratio of 2 x 2 tiles


@dataclass(frozen=True)
class Size:
    """The architecture's numbers, named as transformers' config names them where it has them."""

    name: str
    hidden: int
    layers: int
    cross: tuple[int, ...]  # those decoder layers that attend to the image, in place of the text
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    image: int  # pixels of a tile's side
    vision_hidden: int
    vision_layers: int
    global_layers: int
    vision_heads: int
    vision_mlp: int
    taken: tuple[int, ...]  # vision layers whose outputs go to the decoder, beside the last one's

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    @property
    def tile_tokens(self) -> int:
        return (self.image // PATCH) ** 2 + 1

    @property
    def image_tokens(self) -> int:
        return TILES * self.tile_tokens

    @property
    def projected(self) -> int:
        return self.vision_hidden * (1 + len(self.taken))


FULL = Size("11b", 4096, 40, tuple(range(3, 40, 5)), 32, 8, 14336, 128256, 560, 1280, 32, 8, 16, 5120, (3, 7, 15, 23, 30))
QUICK = replace(FULL, name="11b, 8 layers", layers=8, cross=(3,), vision_layers=8, global_layers=2, taken=(1, 3, 4, 5, 6))
TINY = Size("tiny", 128, 4, (1, 3), 4, 2, 256, 256, 42, 64, 3, 1, 4, 128, (0, 2))
SIZES = {"11b": FULL, "quick": QUICK, "tiny": TINY}


def judged(size: Size) -> Size:
    """What results are judged on: of a large model a layer of each kind at full width, which a float64 truth of can be had."""
    return replace(size, layers=2, cross=(1,), vision_layers=1, global_layers=1, taken=(0,), vocab=1024) if size.hidden > TINY.hidden else size


def config(size: Size):
    """The MllamaConfig. The rest is Llama-3.2-11B-Vision's."""
    from transformers import MllamaConfig
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

    rope = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    text = MllamaTextConfig(
        vocab_size=size.vocab, hidden_size=size.hidden, intermediate_size=size.mlp, num_hidden_layers=size.layers, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, cross_attention_layers=list(size.cross), rope_parameters=rope, max_position_embeddings=131072,
        pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=size.vision_hidden, intermediate_size=size.vision_mlp, attention_heads=size.vision_heads, num_hidden_layers=size.vision_layers,
        num_global_layers=size.global_layers, image_size=size.image, patch_size=PATCH, max_num_tiles=TILES, intermediate_layers_indices=list(size.taken),
        vision_output_dim=size.projected,
    )  # fmt: skip
    return MllamaConfig(vision_config=vision, text_config=text, image_token_index=size.vocab)


def on_meta(size: Size) -> Module:
    """transformers' own model, shapes alone."""
    from transformers import MllamaForConditionalGeneration

    with torch.device("meta"):
        return MllamaForConditionalGeneration(config(size))


def build(size: Size, device: str, seed: int = 0) -> Module:
    """The PeftModel: NF4 with nested scales as load_in_4bit chooses layers, adapters in bf16 with both halves random, vision tower frozen."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)  # PEFT draws adapters from the CPU's generator
    generator = torch.Generator(device).manual_seed(seed)
    model = on_meta(size)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child is not model.lm_head:
                setattr(parent, name, _quantized(child, generator))
            elif hasattr(child, "inv_freq"):  # computed, not learned
                with torch.device(device):
                    setattr(parent, name, type(child)(child.config))
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if p.is_meta:
                setattr(module, name, nn.Parameter(_random(name if p.numel() > 1 else "gate", p, module, generator), requires_grad=False))
    model.is_loaded_in_4bit = True  # as transformers sets it; PEFT chooses its class by it
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA, exclude_modules=".*vision_model.*", init_lora_weights=False)
    model = get_peft_model(model, lora, autocast_adapter_dtype=False).eval()
    for p in trainable(model):
        p.data = p.data.to(DTYPE)  # beside packed weights PEFT leaves them in fp32
    return model


def trainable(model: Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def _quantized(linear: nn.Linear, generator: torch.Generator) -> Module:
    import bitsandbytes as bnb

    bias = linear.bias is not None
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias, compute_dtype=DTYPE, quant_type="nf4", device="meta")
    weight = _random("weight", linear.weight, linear, generator)
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=made).to(generator.device)
    if bias:
        made.bias = nn.Parameter(_random("bias", linear.bias, linear, generator), requires_grad=False)
    made.support_avx512bf16_for_cpu = False  # else it repacks its weight for good at the first inference on some CPUs
    return made


def _random(name: str, like: Tensor, parent: Module, generator: torch.Generator) -> Tensor:
    """Products keep their input's size at any width: 0.016 at 4096, near transformers' 0.02. Gates, closed in a fresh model, are half open."""
    made = torch.empty(like.shape, dtype=DTYPE, device=generator.device)
    if name == "gate":
        return made.fill_(0.5)
    if name == "weight" and "Norm" in type(parent).__name__:
        return made.fill_(1)
    std = like[0].numel() ** -0.5 if isinstance(parent, (nn.Linear, nn.Conv2d)) and name == "weight" else 0.02
    return made.normal_(0, std, generator=generator)


def batch(size: Size, b: int, text: int, device: str, seed: int = 0) -> dict[str, Tensor]:
    """b texts of `text` tokens, the second of which is an image of 2 x 2 tiles."""
    torch.manual_seed(seed)
    ids = torch.randint(2, size.vocab, (b, text))
    ids[:, 0], ids[:, 1] = 1, size.vocab
    sees = torch.ones(b, text, 1, TILES, dtype=torch.int64)
    sees[:, 0] = 0
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(b, 1, TILES, 3, size.image, size.image).to(DTYPE),
        "aspect_ratio_ids": torch.full((b, 1), SQUARE),
        "aspect_ratio_mask": torch.ones(b, 1, TILES, dtype=torch.int64),
        "cross_attention_mask": sees,
    }
    return {name: t.to(device) for name, t in made.items()}


def exact(model: Module) -> Module:
    """A copy in float64, its NF4 weights decoded without a rounding. Only the loss is fp32, as transformers takes it."""
    import bitsandbytes as bnb

    made = exactly(model)
    for name, module in list(made.named_modules()):
        if isinstance(module, bnb.nn.Linear4bit):  # PEFT's class of that name is another
            linear = nn.Linear(module.in_features, module.out_features, device="meta")
            linear.weight = nn.Parameter(nf4_dequantize_ref(NF4View.of(module.weight), torch.float64), requires_grad=False)
            linear.bias = module.bias
            made.set_submodule(name, linear)
    return made


def text_linears(size: Size) -> Iterator[tuple[int, int, bool, bool]]:
    """Of every linear layer of the decoder: N, K, whether it reads the image's tokens, whether its input needs a gradient.

    Nothing that is trained lies before the image's tokens, or before the first layer's projections.
    """
    h, kv, mlp = size.hidden, size.kv, size.mlp
    for i in range(size.layers):
        image = i in size.cross
        yield h, h, False, i > 0
        yield from [(kv, h, image, i > 0 and not image)] * 2
        yield from [(N, K, False, True) for N, K in ((h, h), (mlp, h), (mlp, h), (h, mlp))]


def vision_linears(size: Size) -> list[tuple[int, int]]:
    v, mlp = size.vision_hidden, size.vision_mlp
    return [*[(v, v)] * 4, (mlp, v), (v, mlp)] * (size.vision_layers + size.global_layers)


def attention_flops(pairs: int, width: int) -> int:
    """Of two products over `pairs` of tokens that see each other, all heads together `width` wide."""
    return 4 * pairs * width


def vision_flops(size: Size, images: int, tile_tokens: int) -> int:
    """The encoder and its projection, forward alone: it is frozen. tile_tokens: patches, the class token, and padding where it is counted."""
    tokens, width = TILES * tile_tokens, size.vision_hidden
    layers = sum(2 * tokens * N * K for N, K in vision_linears(size)) + (size.vision_layers + size.global_layers) * attention_flops(tokens**2, width)
    patches = 2 * TILES * (size.tile_tokens - 1) * 3 * PATCH**2 * width
    return images * (patches + layers + 2 * size.image_tokens * size.projected * size.hidden)


def decoder_flops(size: Size, b: int, text: int) -> int:
    """Linear layers of the decoder with their adapters, and the head, forward and backward."""
    total = 4 * b * text * size.hidden * size.vocab
    for N, K, image, dx in text_linears(size):
        M = b * (size.image_tokens if image else text)
        # W for y and dx; A for y, dA and dx; B for y, dB and the gradient that goes on to A.
        total += 2 * M * ((1 + dx) * N * K + (2 + dx) * RANK * K + 3 * RANK * N)
    return total


def step_cost(size: Size, b: int, text: int) -> Cost:
    """One step of training. Bytes are those of weights, read forward and backward, and of what AdamW reads and writes.

    What checkpointing computes a second time saves memory, and is no part of the step's flops.
    """
    cross = len(size.cross)
    causal, seen = b * text * (text + 1) // 2, b * (text - 1) * size.image_tokens
    attention = 3 * attention_flops((size.layers - cross) * causal + cross * seen, size.hidden)  # a backward has four products to a forward's two
    read = sum(2 * layer_bytes(N, K) for N, K, *_ in text_linears(size)) + 2 * head_bytes(size)
    read += sum(layer_bytes(N, K, 0) for N, K in [*vision_linears(size), (size.hidden, size.projected)])
    adapters = sum(RANK * (N + K) for N, K, *_ in text_linears(size)) * DTYPE.itemsize
    adamw = 8 * adapters  # a gradient written and read; a weight and its two moments read and written
    return Cost(read + adamw, decoder_flops(size, b, text) + attention + vision_flops(size, b, size.tile_tokens))


def decode_cost(size: Size, b: int, context: int) -> Cost:
    """One token for each of b texts that have `context` tokens and an image behind them. Bytes are weights and caches, activations are not counted."""
    cross = len(size.cross)
    used = [(N, K) for N, K, image, _ in text_linears(size) if not image]  # keys and values of the image are cached
    cached = (size.layers - cross) * context + cross * size.image_tokens
    norms = ((2 * size.layers + 1) * size.hidden + cross * size.hidden // size.heads) * DTYPE.itemsize
    n_bytes = sum(layer_bytes(N, K) for N, K in used) + head_bytes(size) + norms + b * 2 * cached * size.kv * DTYPE.itemsize
    flops = sum(2 * (N * K + RANK * (N + K)) for N, K in used) + 2 * size.hidden * size.vocab + attention_flops(cached, size.hidden)
    return Cost(n_bytes, b * flops)


@functools.cache
def layer_bytes(N: int, K: int, rank: int = RANK) -> int:
    """Codes, nested scales and adapter of one layer."""
    return random_layer(N, K, rank, "bitsandbytes", DTYPE, "meta").nbytes


def head_bytes(size: Size) -> int:
    return size.vocab * size.hidden * DTYPE.itemsize
