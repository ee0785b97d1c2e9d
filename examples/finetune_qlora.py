"""QLoRA on three photos: a small Llama-3.2-Vision-shaped model with NF4 weights learns to say what each one shows.

python examples/finetune_qlora.py                            # a random small model on a CPU, a quarter of a minute on two cores
python examples/finetune_qlora.py --checkpoint DIR --device cuda     # the real one, with DIR/tokenizer.model
"""

import argparse
import logging
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from skimage import data

from fastfuse.checkpoints import load_model, save_adapter
from fastfuse.data import padded_collate_tiled_images_and_mask
from fastfuse.generation import generate
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, Llama3VisionTransform, build_lora, llama3_2_vision_transform
from fastfuse.modules import local_kv_cache
from fastfuse.modules.loss import LinearCrossEntropyLoss
from fastfuse.modules.peft import get_adapter_params, set_trainable_params

for name in ("torchao", "torch.utils._pytree"):  # NF4 weights need torchao, which while it loads warns of CUDA libraries that a CPU lacks
    logging.getLogger(name).setLevel(logging.ERROR)

PHOTOS = {"a cup of coffee": data.coffee, "an astronaut": data.astronaut, "a cat": data.chelsea}
LORA = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "decoder_lora": True, "apply_lora_to_mlp": True, "lora_rank": 16, "lora_alpha": 32}


class Bytes:
    """A tokenizer of plain text: one token a byte, the chat format's special tokens behind them."""

    def __init__(self):
        names = ["begin_of_text", "end_of_text", "finetune_right_pad_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image"]
        self.special_tokens = {f"<|{name}|>": 256 + i for i, name in enumerate(names)}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        return bytes(token_ids).decode(errors="replace")


def small_model(device: str):
    config = Llama3VisionConfig(
        tile_size=112, clip_embed_dim=128, clip_num_heads=4, clip_num_layers=2, clip_hidden_dim=512, clip_hidden_states=(0,), num_layers_projection=1,
        vocab_size=264, num_layers=2, fusion_interval=1, num_heads=4, num_kv_heads=4, embed_dim=128, intermediate_dim=256, max_seq_len=256,
    )  # fmt: skip
    with torch.device(device):
        model = build_lora(config, **LORA, apply_lora_to_output=True, quantize_base=True, scaler_block_size=256)
    for gate in (p for p in model.parameters() if p.numel() == 1):
        torch.nn.init.constant_(gate, 0.5)  # zero in a fresh model, which hides the photo from the text; a real one has learned them
    return model, Llama3VisionTransform(Bytes(), tile_size=112, patch_size=14, image_mean=(0.5,) * 3, image_std=(0.5,) * 3)


def conversation(photo, caption: str) -> dict:
    question = {"role": "user", "content": [{"type": "image", "content": Image.fromarray(photo)}, {"type": "text", "content": "?"}], "masked": True}
    return {"messages": [question, {"role": "assistant", "content": caption}]}


def training_sample(transform, photo, caption: str) -> dict:
    """Labels are the next token, where it is the assistant's."""
    sample = transform(conversation(photo, caption))
    sample["labels"] = [t if not masked else -100 for t, masked in zip(sample["tokens"][1:], sample["mask"][1:], strict=True)] + [-100]
    return sample


def to(value, device: str, dtype: torch.dtype):
    if isinstance(value, dict):
        return {k: to(v, device, dtype) for k, v in value.items()}
    return value.to(device, dtype if value.is_floating_point() else None)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--checkpoint", type=Path, help="a folder with Llama 3.2 Vision's weights and tokenizer.model")
    p.add_argument("--device", default="cpu")
    p.add_argument("--steps", type=int, default=50)
    p.add_argument("--lr", type=float, default=None, help="default: 3e-3, with --checkpoint 2e-4")
    p.add_argument("--adapter", type=Path, help="where to write the adapter")
    a = p.parse_args()
    torch.manual_seed(0)
    if a.checkpoint:
        make = partial(build_lora, **LORA, quantize_base=True, scaler_block_size=200)
        model = load_model(a.checkpoint, profile="meta", build=make, dtype=torch.bfloat16, device=a.device)
        transform = llama3_2_vision_transform(a.checkpoint / "tokenizer.model")
    else:
        model, transform = small_model(a.device)
    dtype = model.decoder.norm.scale.dtype
    batch = padded_collate_tiled_images_and_mask([training_sample(transform, photo(), caption) for caption, photo in PHOTOS.items()])
    batch = to(batch, a.device, dtype)
    labels = batch.pop("labels")

    set_trainable_params(model, get_adapter_params(model))
    loss_of = LinearCrossEntropyLoss()
    loss_of.set_model_output(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=a.lr or (2e-4 if a.checkpoint else 3e-3), weight_decay=0.0)
    model.train()
    for step in range(a.steps):
        loss = loss_of(model(**batch), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step + 1 == a.steps:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    model.eval()
    model.skip_output_layer = False
    for caption, photo in PHOTOS.items():
        sample = transform({"messages": [*conversation(photo(), "")["messages"][:1], {"role": "assistant", "content": ""}]}, inference=True)
        prompt = to(padded_collate_tiled_images_and_mask([sample], pad_direction="left", pad_max_tiles=4), a.device, dtype)
        tokens = prompt.pop("tokens")
        caches = {"encoder_max_seq_len": transform.image_seq_len, "decoder_max_seq_len": tokens.shape[1] + 24}
        with local_kv_cache(model, batch_size=1, device=a.device, dtype=dtype, **caches):
            out, _ = generate(model, tokens, max_generated_tokens=24, temperature=0, stop_tokens=transform.stop_tokens, **prompt)
        print(f"{caption:16} -> {transform.decode(out[0, tokens.shape[1] :].tolist())!r}")
    if a.adapter:
        print(f"wrote {save_adapter(model, a.adapter)[0]}")


if __name__ == "__main__":
    main()
