#!/usr/bin/env bash
# transformers: from_pretrained(folder, dtype=...) keeps the file's dtype where the folder was saved in 4 bits.
#
# Expected: dtype=torch.float16 (for a GPU without bf16, say) gives fp16 norms, embeddings and head. So it is for a dense folder, and for a dense
#   folder that is quantized to 4 bits while it is loaded.
# Happens: of a folder that was saved in 4 bits every tensor that is not quantized keeps the dtype it has in the file. No warning, and
#   model.config.dtype says float16 while model.dtype says bfloat16.
# Versions: transformers 5.24.0, bitsandbytes 0.50.2, accelerate 1.15.0, torch 2.13.0, Python 3.11, CPU.
# Seen (asked for float16 each time):
#   dense folder:                   float16,         config.dtype float16
#   dense folder, 4 bits on load:   float16, uint8,  config.dtype float16
#   folder saved in 4 bits:         bfloat16, uint8, config.dtype float16
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 bitsandbytes==0.50.2 accelerate==1.15.0 2>/dev/null
cd "$folder"
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import sys

import torch
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
LlamaForCausalLM(LlamaConfig(vocab_size=96, **sizes)).bfloat16().save_pretrained("dense")
nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
LlamaForCausalLM.from_pretrained("dense", quantization_config=nf4, device_map="cpu").save_pretrained("nf4")


def dtypes(folder: str, **how) -> tuple[str, str]:
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cpu", **how)
    names = sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})
    return ", ".join(names), str(model.config.dtype).removeprefix("torch.")


found = [dtypes("dense"), dtypes("dense", quantization_config=nf4), dtypes("nf4")]
for name, (held, said) in zip(("dense folder", "dense folder, 4 bits on load", "folder saved in 4 bits"), found, strict=True):
    print(f"{name + ':':31} {held + ',':16} config.dtype {said}")
sys.exit(found != [("float16", "float16"), ("float16, uint8", "float16"), ("bfloat16, uint8", "float16")])
PY
