"""What the documentation's Python blocks are given: small models and inputs in place of large ones, and folders in place of downloads."""

from pathlib import Path

import mllama
import torch
from rich.progress import Progress
from torch import Tensor, nn

from cases.weights import quantize
from fastfuse.checkpoints import save_checkpoint
from fastfuse.demo.mllama import build
from fastfuse.demo.show import Size

MLLAMA = Size(64, 112, 4, 2, 2, 32, 64, 4, 2, mllama.TILE, mllama.VOCAB, torch.bfloat16)


def peft_mllama() -> nn.Module:
    """transformers' Mllama with PEFT LoRA over bitsandbytes, bf16, a layer of each kind."""
    return build(MLLAMA, torch.device("cpu"), Progress(disable=True))


def _batch() -> dict[str, Tensor]:
    made = mllama.batch([["coffee"], ["coffee"]])
    return made | {"labels": made["input_ids"] % mllama.VOCAB, "pixel_values": made["pixel_values"].bfloat16()}


batch = _batch()


def checkpoint(name: str) -> None:
    """A folder in the working directory, which transformers takes before it looks for a download of that name."""
    made = mllama.build(mllama.config(cross=(1,), layers=2, vision_layers=(1, 1), taken=(0,)))
    made.bfloat16().save_pretrained(Path(name))


def torchao_linear(K: int, N: int) -> nn.Linear:
    """In NF4."""
    linear = nn.Linear(K, N, bias=False).requires_grad_(False)
    linear.weight = nn.Parameter(quantize(linear.weight, "torchao"), requires_grad=False)
    return linear


def linear_inputs(M: int = 3, K: int = 128, N: int = 64, H: int = 192, R: int = 4) -> dict:
    """For the ops over NF4 weights."""
    given = {"torch": torch, "x": torch.randn(M, K, requires_grad=True), "scaling": 2.0, "s": 2.0, "bias": torch.randn(N), "m": torch.rand(N)}
    shapes = {("weight", "lora_a", "lora_b"): (N, K), ("gate", "ag", "bg"): (H, K), ("up", "au", "bu"): (H, K), ("down", "ad", "bd"): (N, H)}
    shapes |= {(f"w{name}", f"a{name}", f"b{name}"): (N, K) for name in "qkv"}
    for (weight, a, b), (n, k) in shapes.items():
        given |= {weight: quantize(torch.randn(n, k), "nested"), a: torch.randn(R, k), b: torch.randn(n, R)}
    return given | {"dense_weight": torch.randn(N, K)}


def image_inputs(b: int = 2, tiles: int = 4, size: int = 28, patch: int = 14, D: int = 32) -> dict[str, Tensor]:
    """For patch embedding, as torchtune holds its tables, and for a ViT of one tile."""
    n = (size // patch) ** 2 + 1
    shapes = {"local_pos": (n, D), "global_pos": (tiles, tiles, n, D), "pre_pos": (tiles, tiles, 1, D), "positions": (n, D)}
    shapes |= dict.fromkeys(("gate", "pre_gate"), (1,)) | dict.fromkeys(("cls", "w", "b", "vit_cls", "bias"), (D,))
    shapes |= dict.fromkeys(("conv_weight", "vit_weight"), (D, 3, patch, patch)) | {"images": (b, tiles, 3, size, size)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given["photos"] = torch.randint(256, (b, 1, 3, size, size), dtype=torch.uint8)
    return given | {"aspect_ratio": torch.tensor([[2, 2], [1, 3]]), "scale": [1 / 255] * 3, "shift": [-0.5] * 3}


def attention_inputs(b: int = 2, hq: int = 4, hkv: int = 2, s: int = 5, d: int = 64, tokens_per_tile: int = 5) -> dict:
    """For cross-attention over an image of four tiles, of which three are real."""
    visible = torch.ones(b, s, 1, 4, dtype=torch.bool)
    visible[..., 3], visible[:, 0] = False, False
    s_e = 4 * tokens_per_tile
    shapes = {"q": (b, hq, s, d), "q_next": (b, hq, 1, d), "k": (b, hkv, s_e, d), "v": (b, hkv, s_e, d)}
    given = {name: torch.randn(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    sizes = {"b": b, "hkv": hkv, "d": d, "max_len": s_e, "tokens_per_tile": tokens_per_tile}
    return given | sizes | {"torch": torch, "visible": visible, "device": "cpu"}


def fastfuse_checkpoint(model: nn.Module, name: str) -> None:
    """A folder of Meta's weights as Hugging Face has them."""
    save_checkpoint(model, Path(name), format="hf")


def _images(config, b: int) -> dict[str, Tensor]:
    return {"images": torch.randn(b, 1, 1, 3, config.tile_size, config.tile_size), "aspect_ratio": torch.ones(b, 1, 2, dtype=torch.int64)}


def _tokens_per_tile(config) -> int:
    return (config.tile_size // 14) ** 2 + 1


def fastfuse_prompt(config, s: int = 4) -> dict:
    """A prompt over one image of one tile, in bf16."""
    images = _images(config, 1)
    mask = torch.ones(1, s, _tokens_per_tile(config), dtype=torch.bool)
    return {"tiles": images["images"].bfloat16(), "ratios": images["aspect_ratio"], "prompt": torch.arange(1, s + 1)[None], "mask": mask}


def fastfuse_batch(config, b: int = 2, s: int = 6) -> dict:
    """As the collate function makes it."""
    tokens = torch.randint(1, config.vocab_size, (b, s))
    return {
        "tokens": tokens,
        "labels": tokens.roll(-1, 1),
        "encoder_input": _images(config, b),
        "encoder_mask": torch.ones(b, s, _tokens_per_tile(config), dtype=torch.bool),
    }
