"""transformers' Mllama with PEFT over bitsandbytes NF4, random weights: its own forward, then patched, then given back."""

import time
from collections.abc import Callable
from contextlib import nullcontext

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessorPil
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask

import fastfuse
from fastfuse._quiet import quiet_startup
from fastfuse.demo.image import DemoError
from fastfuse.demo.show import QUESTION, REPEATS, Answer, Size, print_backend, print_comparison, print_memory, print_model, print_slice, timed_answer

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]
RANK = 16


def run(console: Console, progress: Progress, image: Image.Image, name: str, tokens: int, interpret: bool, size: Size, device: torch.device) -> None:
    """Print the whole comparison."""
    held_before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    model = build(size, device, progress)
    batch = prepare(image, size, device)
    console.print(
        f"photo        {name}, {image.width} x {image.height}, {batch['tiles']} tiles of {size.tile} px, aspect ratio id {batch['aspect_ratio_ids'].item()}"
    )
    print_model(console, "Mllama", size, RANK)
    measured = torch.cuda.memory_allocated() - held_before if device.type == "cuda" else stored_bytes(model)
    print_memory(console, *predict_memory(model), measured)
    batch.pop("tiles")
    before = answer(model, batch, tokens, progress, "its own forward")
    report = fastfuse.patch(model, verify=device.type == "cpu")
    after = answer(model, batch, tokens, progress, "patched")
    fallbacks = fastfuse.status(model).fallbacks
    fastfuse.unpatch(model)
    back = answer(model, batch, 0, progress, "given back")
    sliced = _interpreted(model, batch, progress) if interpret and device.type == "cpu" else None
    console.print(str(report))
    print_comparison(console, before, after, back, "unpatch")
    if fallbacks:
        console.print(f"fallbacks    {fallbacks}")
    if sliced is not None:
        print_slice(console, before, sliced)
    print_backend(console, report.patched[0].backend == "triton")


def build(size: Size, device: torch.device, progress: Progress) -> nn.Module:
    """Mllama with NF4 linear layers by bitsandbytes and a random LoRA adapter by PEFT, weights made on the device."""
    cross = [i for i in range(size.text_layers) if i % 2]
    text = MllamaTextConfig(
        vocab_size=size.vocab, hidden_size=size.text_hidden, intermediate_size=size.text_mlp, num_hidden_layers=size.text_layers,
        num_attention_heads=size.text_heads, num_key_value_heads=size.text_kv_heads, cross_attention_layers=cross, pad_token_id=0,
        bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=size.vision_hidden, intermediate_size=size.vision_mlp, attention_heads=size.vision_heads, num_hidden_layers=size.vision_layers,
        num_global_layers=1, image_size=size.tile, patch_size=14, intermediate_layers_indices=[0], vision_output_dim=2 * size.vision_hidden,
    )  # fmt: skip
    config = MllamaConfig(vision_config=vision, text_config=text, image_token_index=size.vocab)
    default = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            model = MllamaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if "gate" in parameter_name and p.numel() == 1:
                p.fill_(0.5)  # zero in a fresh model: the photo would not reach the text
    targets = [
        (parent, key, child) for parent in model.modules() for key, child in parent.named_children() if isinstance(child, nn.Linear) and key in LORA_TARGETS
    ]
    for parent, key, linear in progress.track(targets, description="quantizing to NF4"):
        setattr(parent, key, _quantized(linear, size.dtype))
    model.is_loaded_in_4bit = True  # what transformers sets when it loads in 4 bit; PEFT looks for it
    lora = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LORA_TARGETS, init_lora_weights=False)
    with quiet_startup():  # PEFT asks transformers for is_gradient_checkpointing, by its old name
        return get_peft_model(model, lora).eval()


def _quantized(linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, bias=linear.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
    made.weight = bnb.nn.Params4bit(linear.weight.detach(), requires_grad=False, quant_type="nf4", module=made).to(linear.weight.device)
    made.bias = linear.bias
    # On CPUs with AVX512 bitsandbytes repacks a weight for good at its first inference, in a layout only it reads.
    made.support_avx512bf16_for_cpu = False
    return made


def prepare(image: Image.Image, size: Size, device: torch.device) -> dict:
    """Model inputs: transformers' own image processor, its own mask builders, and a prompt of fixed token ids."""
    processor = MllamaImageProcessorPil(size={"height": size.tile, "width": size.tile}, max_image_tiles=4)
    try:
        pixels = processor([[image]], return_tensors="pt")
    except (ValueError, ZeroDivisionError) as e:
        raise DemoError(f"transformers' image processor refuses an image of {image.width} x {image.height}: {str(e).splitlines()[0]}") from None
    ids = [size.vocab, 1, *QUESTION]  # <|image|>, begin of text, a question
    mask = convert_sparse_cross_attention_mask_to_dense(
        [get_cross_attention_token_mask(ids, size.vocab)], pixels["num_tiles"], max_num_tiles=4, length=len(ids)
    )
    return {
        "input_ids": torch.tensor([ids], device=device),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64, device=device),
        "pixel_values": pixels["pixel_values"].to(device, size.dtype),
        "aspect_ratio_ids": pixels["aspect_ratio_ids"].to(device),
        "aspect_ratio_mask": pixels["aspect_ratio_mask"].to(device),
        "cross_attention_mask": torch.as_tensor(mask, device=device),
        "tiles": pixels["num_tiles"][0][0],
    }


class _Ticks:
    """transformers' streamer interface, used to move the progress bar."""

    def __init__(self, tick):
        self.put, self.end = lambda value: tick(), lambda: None


def answer(model: nn.Module, batch: dict, tokens: int, progress: Progress, title: str) -> Answer:
    """Logits of the prompt, then greedy generation."""

    def generate(n: int, tick: Callable | None):
        watched = {} if tick is None else {"streamer": _Ticks(tick), "return_dict_in_generate": True, "output_logits": True}
        out = model.generate(**batch, max_new_tokens=n, min_new_tokens=n, do_sample=False, **watched)
        return tick and (out.sequences[0, batch["input_ids"].shape[1] :].tolist(), torch.stack(out.logits, 1))

    return timed_answer(lambda: model(**batch).logits, generate, tokens, nullcontext(), progress, title, tokens + 1 + REPEATS)


def _interpreted(model: nn.Module, batch: dict, progress: Progress) -> tuple[Answer, int]:
    """The prompt's logits with the first decoder layer's linear layers run by the Triton kernels, in the interpreter."""
    with fastfuse.patched(model, include="*language_model.layers.0.*", backend="triton") as report:
        n = len(report.patched)
        task = progress.add_task("Triton interpreter, one layer", total=None)
        start = time.perf_counter()
        with torch.no_grad():
            logits = model(**batch).logits
        progress.remove_task(task)
    return Answer(logits.float(), [], 0.0, time.perf_counter() - start, 0.0), n


def predict_memory(model: nn.Module) -> tuple[int, int]:
    """(bytes of weights, the same with the NF4 layers in their compute dtype), from shapes alone."""
    nested = dense = 0
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            n = module.in_features * module.out_features
            blocks = -(-n // 64)
            # half a byte a weight, a byte a block, a float per 256 blocks, two tables and the offset
            nested += n // 2 + blocks + 4 * -(-blocks // 256) + 4 * (256 + 16 + 1)
            dense += n * module.compute_dtype.itemsize
        for key, p in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if not (isinstance(module, bnb.nn.Linear4bit) and key == "weight"):
                nested += p.numel() * p.element_size()
                dense += p.numel() * p.element_size()
    return nested, dense


def stored_bytes(model: nn.Module) -> int:
    """Bytes the model really holds: every storage once, the NF4 tables included."""
    held = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            held += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in held}.values())
