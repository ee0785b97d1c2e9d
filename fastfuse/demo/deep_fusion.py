"""fastfuse's own DeepFusionModel in QLoRA, random weights: eager PyTorch, then the fused ops, on one photo."""

import contextlib
import time
from collections.abc import Callable

import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn

import fastfuse
from fastfuse.data import CLIPImageTransform, VisionCrossAttentionMask, padded_collate_tiled_images_and_mask
from fastfuse.demo.show import QUESTION, REPEATS, Answer, Size, print_backend, print_comparison, print_memory, print_model, print_slice, timed_answer
from fastfuse.generation import generate
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build_lora
from fastfuse.models.llama3_2_vision._transform import IMAGE_MEAN, IMAGE_STD
from fastfuse.modules import local_kv_cache
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.model_fusion import DeepFusionModel
from fastfuse.modules.peft import LoRALinear
from fastfuse.quant.nf4 import NF4View, is_torchao

RANK = 16


def run(console: Console, progress: Progress, image: Image.Image, name: str, tokens: int, interpret: bool, size: Size, device: torch.device) -> None:
    """Print the whole comparison."""
    held_before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    torch.manual_seed(0)
    model = build(size, device, progress)
    batch, ratio = prepare(image, size, device)
    h, w = ratio
    console.print(f"photo        {name}, {image.width} x {image.height}, {h * w} tiles of {size.tile} px, {h} high and {w} wide")
    print_model(console, "DeepFusionModel", size, RANK)
    measured = torch.cuda.memory_allocated() - held_before if device.type == "cuda" else stored_bytes(model)
    print_memory(console, *predict_memory(model), measured)
    with fastfuse.backend("torch"):
        before = answer(model, batch, tokens, progress, "eager PyTorch")
    after = answer(model, batch, tokens, progress, "fused ops")
    with fastfuse.backend("torch"):
        back = answer(model, batch, 0, progress, "eager PyTorch again")
    sliced = _interpreted(model, batch, progress) if interpret and device.type == "cpu" else None
    lora = sum(isinstance(m, LoRALinear) and is_torchao(m.weight) for m in model.modules())
    frozen = sum(isinstance(m, FrozenNF4Linear) for m in model.modules())
    console.print(f"fused ops    nf4_lora_linear in {lora} LoRALinear, nf4_linear in {frozen} FrozenNF4Linear")
    print_comparison(console, before, after, back, "eager")
    if sliced is not None:
        print_slice(console, before, sliced)
    print_backend(console, device.type == "cuda")


def build(size: Size, device: torch.device, progress: Progress) -> DeepFusionModel:
    """A Llama-3.2-Vision-shaped model with NF4 weights and random LoRA adapters everywhere, made on the device."""
    config = Llama3VisionConfig(
        tile_size=size.tile,
        clip_embed_dim=size.vision_hidden,
        clip_num_heads=size.vision_heads,
        clip_num_layers=size.vision_layers,
        clip_hidden_dim=size.vision_mlp,
        clip_hidden_states=(0,),
        num_layers_projection=1,
        vocab_size=size.vocab,
        num_layers=size.text_layers // 2,
        fusion_interval=1,
        num_heads=size.text_heads,
        num_kv_heads=size.text_kv_heads,
        embed_dim=size.text_hidden,
        intermediate_dim=size.text_mlp,
        max_seq_len=4096,
    )
    task = progress.add_task("building in NF4", total=None)
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            model = build_lora(
                config, ["q_proj", "k_proj", "v_proj", "output_proj"], decoder_lora=True, apply_lora_to_mlp=True, lora_rank=RANK, lora_alpha=RANK,
                quantize_base=True, scaler_block_size=200 if size.vision_hidden == 1280 else 256,
            ).eval()  # fmt: skip
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.numel() == 1:
                p.fill_(0.5)  # gates are zero in a fresh model: the photo would not reach the text
            elif parameter_name.endswith("lora_b.weight"):
                p.normal_(std=RANK**-0.5 * 0.1)
    progress.remove_task(task)
    return model


def prepare(image: Image.Image, size: Size, device: torch.device) -> tuple[dict, list[int]]:
    """(the model's inputs, the tiles (h, w)): fastfuse.data from the photo on, and a prompt of fixed token ids."""
    transform = CLIPImageTransform(image_mean=IMAGE_MEAN, image_std=IMAGE_STD, tile_size=size.tile, max_num_tiles=4, dtype=torch.float32)
    see = VisionCrossAttentionMask(tile_size=size.tile, patch_size=14, image_token_id=size.vocab)
    tiles = transform({"image": image})
    sample = {
        "tokens": [size.vocab, 1, *QUESTION],  # <|image|>, begin of text, a question
        "encoder_input": {"images": [tiles["image"].to(size.dtype)], "aspect_ratio": [tiles["aspect_ratio"]]},
    }
    batch = padded_collate_tiled_images_and_mask([see(sample)], pad_direction="left", pad_max_tiles=4)
    ratio = tiles["aspect_ratio"].tolist()
    return _to(batch, device), ratio


def _to(value, device: torch.device):
    return {k: _to(v, device) for k, v in value.items()} if isinstance(value, dict) else value.to(device)


def answer(model: nn.Module, batch: dict, tokens: int, progress: Progress, title: str) -> Answer:
    """Logits of the prompt, then greedy generation with key-value caches."""
    b, s, s_e = batch["encoder_mask"].shape
    images = {k: batch[k] for k in ("encoder_input", "encoder_mask")}
    sizes = {"batch_size": b, "encoder_max_seq_len": s_e, "decoder_max_seq_len": s + max(tokens, 3)}
    dtype = model.decoder.norm.scale.dtype  # keys and values are computed in it

    def generated(n: int, tick: Callable | None):
        out, chosen = generate(model, batch["tokens"], max_generated_tokens=n, temperature=0, **images)
        return out[0, s:].tolist(), chosen

    caches = local_kv_cache(model, **sizes, device=batch["tokens"].device, dtype=dtype)
    return timed_answer(lambda: model(**batch), generated, tokens, caches, progress, title, REPEATS + 2)


@torch.no_grad()
def _interpreted(model: DeepFusionModel, batch: dict, progress: Progress) -> tuple[Answer, int]:
    """The prompt's logits with the first decoder layer run by the Triton kernels, in the interpreter."""
    first = model.decoder.layers[0]
    n = sum(isinstance(m, (LoRALinear, FrozenNF4Linear)) for m in first.modules())
    task = progress.add_task("Triton interpreter, one layer", total=None)
    with contextlib.ExitStack() as inside:
        enter = first.register_forward_pre_hook(lambda *_: inside.enter_context(fastfuse.backend("triton")) and None)
        leave = first.register_forward_hook(lambda *_: inside.close())
        start = time.perf_counter()
        try:
            logits = model(**batch)
        finally:
            enter.remove()
            leave.remove()
    progress.remove_task(task)
    return Answer(logits.float(), [], 0.0, time.perf_counter() - start, 0.0), n


def predict_memory(model: nn.Module) -> tuple[int, int]:
    """(bytes of weights, the same with the NF4 layers in their own dtype), from shapes alone."""
    nested = dense = 0
    for p in [*model.parameters(), *model.buffers()]:
        size = p.element_size() if not is_torchao(p) else p.dtype.itemsize
        dense += p.numel() * size
        if is_torchao(p):
            blocks = p.numel() // p.block_size
            # half a byte a weight, a byte a block, a factor a scaler block, the mean and the codebook
            nested += p.numel() // 2 + blocks + size * (blocks // p.scaler_block_size + 1 + 16)
        else:
            nested += p.numel() * size
    return nested, dense


def stored_bytes(model: nn.Module) -> int:
    """Bytes the model really holds, every storage once."""
    held = []
    for p in [*model.parameters(), *model.buffers()]:
        if is_torchao(p):
            view = NF4View.of(p)
            held += [view.packed, view.code, *view.scales]
        else:
            held.append(p)
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
