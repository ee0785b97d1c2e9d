"""What the documentation's Python blocks are given: small models and inputs in place of large ones, and folders in place of downloads."""

from pathlib import Path

import mllama
import torch
from rich.progress import Progress
from torch import nn

from cases.weights import quantize
from fastfuse.checkpoints import save_checkpoint
from fastfuse.demo.mllama import build
from fastfuse.demo.show import Size

MLLAMA = Size(64, 112, 4, 2, 2, 32, 64, 4, 2, mllama.TILE, mllama.VOCAB, torch.bfloat16)


def peft_mllama():
    """transformers' Mllama with PEFT LoRA over bitsandbytes, bf16, a layer of each kind."""
    return build(MLLAMA, torch.device("cpu"), Progress(disable=True))


batch = mllama.batch([["coffee"], ["coffee"]])
batch |= {"labels": batch["input_ids"] % mllama.VOCAB, "pixel_values": batch["pixel_values"].bfloat16()}


def checkpoint(name):
    """A folder in the working directory, which transformers takes before it looks for a download of that name."""
    made = mllama.build(mllama.config(cross=(1,), layers=2, vision_layers=(1, 1), taken=(0,)))
    made.bfloat16().save_pretrained(Path(name))


def torchao_linear(K, N):
    """In NF4."""
    linear = nn.Linear(K, N, bias=False).requires_grad_(False)
    linear.weight = nn.Parameter(quantize(linear.weight, "torchao"), requires_grad=False)
    return linear


def linear_inputs(M=3, K=128, N=64, H=192, R=4):
    """For the ops over NF4 weights."""
    given = {"torch": torch, "x": torch.randn(M, K, requires_grad=True), "scaling": 2.0, "s": 2.0, "bias": torch.randn(N), "m": torch.rand(N)}
    shapes = {("weight", "lora_a", "lora_b"): (N, K), ("gate", "ag", "bg"): (H, K), ("up", "au", "bu"): (H, K), ("down", "ad", "bd"): (N, H)}
    shapes |= {(f"w{name}", f"a{name}", f"b{name}"): (N, K) for name in "qkv"}
    for (weight, a, b), (n, k) in shapes.items():
        given |= {weight: quantize(torch.randn(n, k), "nested"), a: torch.randn(R, k), b: torch.randn(n, R)}
    return given | {"dense_weight": torch.randn(N, K)}


def image_inputs(b=2, tiles=4, size=28, patch=14, D=32):
    """For patch embedding, as torchtune holds its tables, and for a ViT of one tile."""
    n = (size // patch) ** 2 + 1
    shapes = {"local_pos": (n, D), "global_pos": (tiles, tiles, n, D), "pre_pos": (tiles, tiles, 1, D), "positions": (n, D)}
    shapes |= dict.fromkeys(("gate", "pre_gate"), (1,)) | dict.fromkeys(("cls", "w", "b", "vit_cls", "bias"), (D,))
    shapes |= dict.fromkeys(("conv_weight", "vit_weight"), (D, 3, patch, patch)) | {"images": (b, tiles, 3, size, size)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given["photos"] = torch.randint(256, (b, 1, 3, size, size), dtype=torch.uint8)
    return given | {"aspect_ratio": torch.tensor([[2, 2], [1, 3]]), "scale": [1 / 255] * 3, "shift": [-0.5] * 3}


def attention_inputs(b=2, hq=4, hkv=2, s=5, d=64, tokens_per_tile=5):
    """For cross-attention over an image of four tiles, of which three are real."""
    visible = torch.ones(b, s, 1, 4, dtype=torch.bool)
    visible[..., 3], visible[:, 0] = False, False
    s_e = 4 * tokens_per_tile
    shapes = {"q": (b, hq, s, d), "q_next": (b, hq, 1, d), "k": (b, hkv, s_e, d), "v": (b, hkv, s_e, d)}
    given = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    sizes = {"b": b, "hkv": hkv, "d": d, "max_len": s_e, "tokens_per_tile": tokens_per_tile}
    return given | sizes | {"torch": torch, "visible": visible, "device": "cpu"}


def fastfuse_checkpoint(model, name):
    """A folder of Meta's weights as Hugging Face has them."""
    save_checkpoint(model, Path(name), format="hf")


def fastfuse_batch(config, b=2, s=6):
    """As the collate function makes it, with an image of one tile."""
    tokens, images = torch.randint(1, config.vocab_size, (b, s)), torch.randn(b, 1, 1, 3, config.tile_size, config.tile_size)
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "encoder_input": {"images": images, "aspect_ratio": torch.ones(b, 1, 2, dtype=torch.int64)},
        "encoder_mask": torch.ones(b, s, config.tokens_per_tile, dtype=torch.bool),
    }


def fastfuse_prompt(config):
    """A prompt over one image, in bf16."""
    made = fastfuse_batch(config, 1, 4)
    images = made["encoder_input"]
    return {"tiles": images["images"].bfloat16(), "ratios": images["aspect_ratio"], "prompt": made["tokens"], "mask": made["encoder_mask"]}
