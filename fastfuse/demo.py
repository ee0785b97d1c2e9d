"""A photo through a QLoRA vision-language model with random weights: its own forward, then patched, then given back."""

import statistics
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes as bnb
import torch
import transformers
from peft import LoraConfig, get_peft_model
from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessorPil
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask

import fastfuse

LORA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "fc1", "fc2"]
RANK = 16
REPEATS = 3  # timed runs of the prompt; the median is shown
MAX_SIDE = 8192  # a longer image is reduced first: the model sees four tiles at most


class DemoError(Exception):
    """Something about the user's input, in one line."""


@dataclass(frozen=True)
class Size:
    """Llama 3.2 Vision's architecture at another size."""

    text_hidden: int
    text_mlp: int
    text_heads: int
    text_kv_heads: int
    text_layers: int
    vision_hidden: int
    vision_mlp: int
    vision_heads: int
    vision_layers: int
    tile: int
    vocab: int
    dtype: torch.dtype


CPU_SIZE = Size(256, 704, 4, 2, 4, 128, 512, 4, 2, 224, 1024, torch.float32)
GPU_SIZE = Size(4096, 14336, 32, 8, 4, 1280, 5120, 16, 4, 560, 128256, torch.bfloat16)  # the widths of the 11B model


def demo(image_path: str | None, tokens: int, interpret: bool) -> None:
    """Print the whole comparison. Raises DemoError for an image that cannot be used."""
    console = Console(width=160 if not Console().is_terminal else None, highlight=False, soft_wrap=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    image, name = load_image(image_path)
    held_before = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        model = build(size, device, progress)
        batch = prepare(image, size, device)
        console.print(
            f"photo        {name}, {image.width} x {image.height}, {batch['tiles']} tiles of {size.tile} px, aspect ratio id {batch['aspect_ratio_ids'].item()}"
        )
        console.print(
            f"model        Mllama, random weights: {size.text_layers} text layers of width {size.text_hidden}, {size.vision_layers} + 1 vision layers of width {size.vision_hidden}, LoRA rank {RANK}, {size.dtype}"
        )
        _print_memory(console, model, device, held_before)
        batch.pop("tiles")
        before = answer(model, batch, tokens, progress, "its own forward")
        report = fastfuse.patch(model, verify=device.type == "cpu")
        after = answer(model, batch, tokens, progress, "patched")
        fallbacks = fastfuse.status(model).fallbacks
        fastfuse.unpatch(model)
        back = answer(model, batch, 0, progress, "given back")
        sliced = _interpreted(model, batch, progress) if interpret and device.type == "cpu" else None
    console.print(str(report))
    print_comparison(console, before, after, back, fallbacks)
    if sliced is not None:
        _print_slice(console, before, sliced)
    ran = report.patched[0].backend
    console.print(f"backend      {'Triton kernels' if ran == 'triton' else 'the PyTorch reference: no GPU found, and nothing here was measured on one'}")


def load_image(path: str | None) -> tuple[Image.Image, str]:
    """An RGB image and its name. Transparency is laid over white, EXIF rotation is applied."""
    if path is None:
        from skimage import data

        return Image.fromarray(data.astronaut()), "scikit-image's astronaut"
    if Path(path).exists() and not (Path(path).is_file() or Path(path).is_dir()):
        raise DemoError(f"--image {path}: not a regular file")  # reading a pipe could wait for ever
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path) as opened:
                image = ImageOps.exif_transpose(opened)
                image.load()
    except FileNotFoundError:
        raise DemoError(f"--image {path}: no such file") from None
    except UnidentifiedImageError:
        raise DemoError(f"--image {path}: not an image that Pillow can read") from None
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise DemoError(f"--image {path}: more pixels than Pillow's limit of {Image.MAX_IMAGE_PIXELS}") from None
    except (OSError, SyntaxError, ValueError) as e:
        raise DemoError(f"--image {path}: cannot be read: {getattr(e, 'strerror', None) or str(e).splitlines()[0]}") from None
    if image.mode.startswith(("I;16", "I", "F")) and image.mode != "RGB":
        image = _to_eight_bits(image)
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB")
    if max(image.size) > MAX_SIDE:
        image.thumbnail((MAX_SIDE, MAX_SIDE))
    return image, path


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """16-bit and float greyscale, which Pillow would clip: stretched from its own darkest to its own brightest."""
    values = image.convert("F")
    low, high = values.getextrema()
    return values.point(lambda v: v * (255 / max(high - low, 1e-6)) - low * (255 / max(high - low, 1e-6))).convert("L")


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
    ids = [size.vocab, 1, *range(5, 17)]  # <|image|>, begin of text, a question
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


@dataclass(frozen=True)
class Answer:
    logits: Tensor  # of the prompt
    tokens: list[int]
    margin: float  # the smallest lead of a chosen token over the next best
    prefill_s: float
    decode_s: float


class _Ticks:
    """transformers' streamer interface, used to move the progress bar."""

    def __init__(self, tick):
        self.put, self.end = lambda value: tick(), lambda: None


@torch.no_grad()
def answer(model: nn.Module, batch: dict, tokens: int, progress: Progress, title: str) -> Answer:
    """Logits of the prompt, then greedy generation."""
    task = progress.add_task(title, total=tokens + 1 + REPEATS)
    synchronize = torch.cuda.synchronize if batch["input_ids"].is_cuda else lambda: None
    model(**batch)  # compiles the kernels on a GPU, settles allocations on a CPU
    progress.advance(task)
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        logits = model(**batch).logits
        synchronize()
        times.append(time.perf_counter() - start)
        progress.advance(task)
    prefill = statistics.median(times)
    made, margin, decode = [], float("inf"), 0.0
    if tokens:
        start = time.perf_counter()
        out = model.generate(
            **batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=_Ticks(lambda: progress.advance(task)),
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        synchronize()
        decode = (time.perf_counter() - start - prefill) / max(tokens - 1, 1)
        made = out.sequences[0, batch["input_ids"].shape[1] :].tolist()
        best = torch.stack(out.logits, 1).float().topk(2).values
        margin = (best[..., 0] - best[..., 1]).min().item()
    progress.remove_task(task)
    return Answer(logits.float(), made, margin, prefill, decode)


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


def print_comparison(console: Console, before: Answer, after: Answer, back: Answer, fallbacks: dict) -> None:
    console.print(f"tokens       before {before.tokens}")
    console.print(f"             after  {after.tokens}")
    apart = (after.logits - before.logits).abs().max().item()
    if before.tokens == after.tokens:
        verdict = f"equal, all {len(before.tokens)}"
    else:
        first = next(i for i, (p, q) in enumerate(zip(before.tokens, after.tokens, strict=True)) if p != q)
        verdict = f"differ from token {first + 1} of {len(before.tokens)}"
    console.print(f"             {verdict}; the closest choice led by {before.margin:.2e}")
    console.print(f"logits       at most {apart:.2e} apart on a scale of {before.logits.abs().max().item():.2f}")
    console.print(f"unpatch      logits {'equal to the bit again' if torch.equal(back.logits, before.logits) else 'DIFFER from before'}")
    if fallbacks:
        console.print(f"fallbacks    {fallbacks}")
    token = f", token {before.decode_s * 1e3:.1f} -> {after.decode_s * 1e3:.1f} ms" if len(before.tokens) > 1 else ""
    console.print(f"time         prompt {before.prefill_s * 1e3:.1f} -> {after.prefill_s * 1e3:.1f} ms{token}")


def _print_slice(console: Console, before: Answer, sliced: tuple[Answer, int]) -> None:
    answer, n = sliced
    apart = (answer.logits - before.logits).abs().max().item()
    console.print(f"interpreter  {n} modules of the first decoder layer as Triton kernels: logits {apart:.2e} apart, {answer.prefill_s:.1f} s")


def _print_memory(console: Console, model: nn.Module, device: torch.device, held_before: int) -> None:
    predicted, dense = predict_memory(model)
    measured = torch.cuda.memory_allocated() - held_before if device.type == "cuda" else stored_bytes(model)
    console.print(f"memory       predicted {predicted / 2**20:.1f} MiB of weights, measured {measured / 2**20:.1f} MiB; without NF4 {dense / 2**20:.1f} MiB")


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
