"""What the documentation's Python blocks are given: small models and inputs in place of large ones, and folders in place of downloads."""

from pathlib import Path

import mllama
import torch
from rich.progress import Progress
from torch import Tensor, nn
from weights import quantize

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


def _nf4(N: int, K: int) -> Tensor:
    return quantize(torch.randn(N, K), "nested")


def linear_inputs(M: int = 3, K: int = 128, N: int = 64, H: int = 192, R: int = 4) -> dict:
    """For the ops over NF4 weights."""
    given = {"torch": torch, "x": torch.randn(M, K, requires_grad=True), "scaling": 2.0, "s": 2.0, "bias": torch.randn(N), "m": torch.rand(N)}
    for weight, a, b, n, k in (("weight", "lora_a", "lora_b", N, K), ("wq", "aq", "bq", N, K), ("wk", "ak", "bk", N, K), ("wv", "av", "bv", N, K)):
        given |= {weight: _nf4(n, k), a: torch.randn(R, k), b: torch.randn(n, R)}
    for name, n, k in (("gate", H, K), ("up", H, K), ("down", N, H)):
        given |= {name: _nf4(n, k), f"a{name[0]}": torch.randn(R, k), f"b{name[0]}": torch.randn(n, R)}
    return given | {"dense_weight": torch.randn(N, K)}


def image_inputs(b: int = 2, tiles: int = 4, size: int = 28, patch: int = 14, D: int = 32) -> dict[str, Tensor]:
    """For patch embedding, as torchtune holds its tables, and for a ViT of one tile."""
    n = (size // patch) ** 2 + 1
    tables = {
        "local_pos": (n, D),
        "global_pos": (tiles, tiles, n, D),
        "pre_pos": (tiles, tiles, 1, D),
        "gate": (1,),
        "pre_gate": (1,),
        "cls": (D,),
        "w": (D,),
        "b": (D,),
    }
    vit = {"vit_weight": (D, 3, patch, patch), "vit_cls": (D,), "positions": (n, D), "bias": (D,)}
    given = {name: torch.randn(shape) for name, shape in (tables | vit).items()}
    photos = torch.randint(256, (b, 1, 3, size, size), dtype=torch.uint8)
    given |= {"images": torch.randn(b, tiles, 3, size, size), "conv_weight": torch.randn(D, 3, patch, patch), "photos": photos}
    return given | {"aspect_ratio": torch.tensor([[2, 2], [1, 3]]), "scale": [1 / 255] * 3, "shift": [-0.5] * 3}


def attention_inputs(b: int = 2, hq: int = 4, hkv: int = 2, s: int = 5, d: int = 64, tokens_per_tile: int = 5) -> dict:
    """For cross-attention over an image of four tiles, of which three are real."""
    visible = torch.ones(b, s, 1, 4, dtype=torch.bool)
    visible[..., 3], visible[:, 0] = False, False
    heads = {
        name: torch.randn(b, h, n, d, dtype=torch.bfloat16) for name, h, n in (("q", hq, s), ("k", hkv, 4 * tokens_per_tile), ("v", hkv, 4 * tokens_per_tile))
    }
    sizes = {"b": b, "hkv": hkv, "d": d, "max_len": 4 * tokens_per_tile, "tokens_per_tile": tokens_per_tile}
    return heads | sizes | {"torch": torch, "visible": visible, "device": "cpu", "q_next": torch.randn(b, hq, 1, d, dtype=torch.bfloat16)}


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
