"""Small transformers Mllama models with every parameter random, and batches of real photos for them."""

import bitsandbytes as bnb
import torch
from numerics import exactly as exactly
from peft import LoraConfig, get_peft_model
from PIL import Image
from skimage import data
from torch import nn
from transformers import MllamaConfig, MllamaForConditionalGeneration, MllamaImageProcessorPil
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.processing_mllama import convert_sparse_cross_attention_mask_to_dense, get_cross_attention_token_mask

from cases.weights import quantize
from fastfuse.models.llama3_2_vision import llama3_vision_hf_to_tune

VOCAB, IMAGE, TILE = 96, 96, 56


def config(cross=(1, 3), layers=5, vision_layers=(4, 2), taken=(0, 2, 3), **text) -> MllamaConfig:
    text = {
        "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 112, "num_hidden_layers": layers, "num_attention_heads": 8,
        "num_key_value_heads": 2, "cross_attention_layers": list(cross), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
        "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 64},
    } | text  # fmt: skip
    vision = MllamaVisionConfig(
        hidden_size=32, intermediate_size=72, attention_heads=4, num_hidden_layers=vision_layers[0], num_global_layers=vision_layers[1], image_size=TILE,
        patch_size=14, intermediate_layers_indices=list(taken), vision_output_dim=32 * (1 + len(taken)),
    )  # fmt: skip
    return MllamaConfig(vision_config=vision, text_config=MllamaTextConfig(**text), image_token_index=IMAGE)


def build(made: MllamaConfig, seed: int = 0) -> MllamaForConditionalGeneration:
    torch.manual_seed(seed)
    made._attn_implementation = "eager"
    model = MllamaForConditionalGeneration(made).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "gate" in name and p.numel() == 1:
                p.fill_(torch.empty(1).uniform_(0.2, 0.8).item())
            elif "norm" in name and name.endswith("weight"):
                p.uniform_(0.5, 1.5)
            else:
                p.normal_(std=p.shape[-1] ** -0.5 if p.dim() > 1 else 0.2)
    return model


PHOTOS = {"coffee": data.coffee, "astronaut": data.astronaut, "chelsea": data.chelsea}


def batch(samples: list[list[str]], text: int = 12) -> dict[str, torch.Tensor]:
    """One row per sample, its photos by name; every image token is followed by a few words."""
    processor = MllamaImageProcessorPil(size={"height": TILE, "width": TILE}, max_image_tiles=4)
    generator = torch.Generator().manual_seed(1)
    ids = []
    for photos in samples:
        words = torch.randint(3, VOCAB, (text,), generator=generator).tolist()
        for i in range(len(photos)):
            words.insert(4 * i, IMAGE)
        ids.append([1, *words][:text])
    made = {"input_ids": torch.tensor(ids), "attention_mask": torch.ones(len(ids), text, dtype=torch.int64)}
    if any(samples):
        pixels = processor([[Image.fromarray(PHOTOS[name]()) for name in photos] for photos in samples], return_tensors="pt")
        sparse = [get_cross_attention_token_mask(row, IMAGE) for row in ids]
        dense = convert_sparse_cross_attention_mask_to_dense(sparse, pixels["num_tiles"], max_num_tiles=4, length=text)
        made |= {
            "pixel_values": pixels["pixel_values"],
            "aspect_ratio_ids": pixels["aspect_ratio_ids"],
            "aspect_ratio_mask": pixels["aspect_ratio_mask"],
            "cross_attention_mask": torch.as_tensor(dense),
        }
    return made


LENGTHS = (12, 9, 7)


def padded(given: dict, side: str) -> dict:
    """The batch with its rows cut to different lengths, and filled up on one side as a processor does: no mask, no image."""
    given = {k: v.clone() for k, v in given.items()}
    for name in given.keys() & ({"input_ids", "attention_mask", "cross_attention_mask"} if side != "none" else ()):
        for row, n in zip(given[name], LENGTHS, strict=False):
            kept = row[:n].clone()
            row.zero_()
            row[slice(-n, None) if side == "left" else slice(n)] = kept
    return given


def results(model: nn.Module, given: dict):
    """Logits of real text, and the gradients of everything for two upstream gradients of them.

    What a row of padding gets that may attend to nothing at all is another thing in each of PyTorch's kernels.
    """
    dtype, real = next(model.parameters()).dtype, given["attention_mask"][..., None]
    given = given | ({"pixel_values": given["pixel_values"].to(dtype)} if "pixel_values" in given else {})
    logits = model(**given).logits * real
    leaves = dict(model.named_parameters())
    ups = [torch.randn(logits.shape, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(2)]
    grads = [torch.autograd.grad(logits, list(leaves.values()), up, retain_graph=True, allow_unused=True) for up in ups]
    return logits.detach(), {name: (None,) if a is None else (a, b) for name, a, b in zip(leaves, *grads, strict=True)}


SAMPLES = [["coffee"], ["astronaut", "chelsea"], []]


def assert_same_logits(ours: nn.Module, theirs: nn.Module, samples: list[list[str]] = SAMPLES, given: dict | None = None) -> None:
    """Of fastfuse's model and of transformers' on the same photos; fp32 through two implementations: 1e-5 of the logits' scale."""
    given = given or batch(samples)
    with torch.no_grad():
        got, want = ours(**as_fastfuse(given, theirs.config)), theirs(**given).logits
    assert got.shape == want.shape and got.dtype == want.dtype and (got - want).abs().max() <= 1e-5 * want.abs().max()


def converted(theirs: MllamaForConditionalGeneration) -> dict[str, torch.Tensor]:
    """Its state dict with torchtune's names, with a row per aspect ratio."""
    text, vision = theirs.config.text_config, theirs.config.vision_config
    return llama3_vision_hf_to_tune(
        theirs.state_dict(), text.num_attention_heads, text.num_key_value_heads, text.hidden_size, vocab_size=text.vocab_size,
        cross_attention_layers=text.cross_attention_layers, encoder_dim=vision.hidden_size, num_tiles=vision.max_num_tiles,
        supported_aspect_ratios=vision.supported_aspect_ratios, num_hidden_layers=text.num_hidden_layers, tile_tables="ratios",
    )  # fmt: skip


def as_fastfuse(given: dict[str, torch.Tensor], made: MllamaConfig) -> dict:
    """The same batch as fastfuse's models take it."""
    if "pixel_values" not in given:
        return {"tokens": given["input_ids"]}
    ratios = torch.tensor([[0, 0], *made.vision_config.supported_aspect_ratios])
    n = (TILE // 14) ** 2 + 1
    mask = given["cross_attention_mask"].bool().repeat_interleave(n, dim=3).flatten(2)
    return {
        "tokens": given["input_ids"],
        "encoder_input": {"images": given["pixel_values"], "aspect_ratio": ratios[given["aspect_ratio_ids"]]},
        "encoder_mask": mask,
    }


def randomize(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random values for every parameter of a fastfuse model, gates open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:  # gates, norms, biases
                p.copy_(torch.rand(p.shape, generator=generator) + (0.2 if p.numel() == 1 else 0.5))
            else:
                p.copy_(torch.randn(p.shape, generator=generator) * 2 * p.shape[-1] ** -0.5)
    return model


def in_nf4(linear: nn.Linear, dtype: torch.dtype = torch.float32) -> nn.Module:
    made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, False, compute_dtype=dtype, quant_type="nf4", device="meta")
    made.weight = quantize(linear.weight.detach(), "nested")
    made.support_avx512bf16_for_cpu = False  # else the unpatched layer repacks its weight for good in eval mode
    return made


def qlora(made: MllamaConfig | None = None, dtype: torch.dtype = torch.float32, **lora) -> nn.Module:
    """What people train: NF4 in the language model, adapters over it, the rest as it is. Rows of whole blocks: see weights.host_dequantize."""
    model = build(made or config(intermediate_size=128)).to(dtype)
    for name, linear in list(model.model.language_model.named_modules()):
        if isinstance(linear, nn.Linear):
            model.model.language_model.set_submodule(name, in_nf4(linear, dtype))
    model.is_loaded_in_4bit = True
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, exclude_modules=".*vision_model.*", init_lora_weights=False, **lora))


def losses(model: nn.Module, given: dict[str, torch.Tensor], steps: int) -> list[float]:
    """The loss before each step of training on the text that is neither padding nor an image."""
    labels = given["input_ids"].masked_fill((given["attention_mask"] == 0) | (given["input_ids"] == IMAGE), -100)
    optimizer, curve = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05), []
    for _ in range(steps):
        loss = model(**given, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve
