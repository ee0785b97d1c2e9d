#!/usr/bin/env bash
# transformers: model.load_adapter() of a DoRA adapter loads its A and B and leaves its magnitudes behind.
#
# Expected: model.load_adapter(folder) and PeftModel.from_pretrained(model, folder) are two ways to one model, as they are for LoRA.
# Happens: PEFT saves a magnitude as ...lora_magnitude_vector and renames it when it loads. load_adapter looks for
#   ...lora_magnitude_vector.default.weight, finds it missing, and gives every layer the magnitude of an untrained adapter. There is no error:
#   a table of missing and unexpected keys is logged. The factors do load, so the model is neither the base nor the adapter.
# Versions: transformers 5.24.0, peft 0.21.2, torch 2.13.0, Python 3.11, CPU.
# Seen:
#   LoRA: logits off by 0.00 through PeftModel.from_pretrained, by 0.00 through load_adapter
#   DoRA: logits off by 0.00 through PeftModel.from_pretrained, by 0.57 through load_adapter; magnitudes as untrained: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 2>/dev/null
"$folder/venv/bin/python" -W ignore - "$folder/adapter" 2>/dev/null <<'PY'
import copy
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4, initializer_range=0.2
)
base, ids = LlamaForCausalLM(config).eval(), torch.arange(12)[None]


def off(dora: bool) -> tuple[float, float, bool]:
    """How far the logits are from the trained model's, relative, either way; whether load_adapter left untrained magnitudes."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=dora)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():  # as after training
            if "lora_B" in name:
                p.normal_(std=0.1)
            elif "magnitude" in name:
                p.mul_(1.5)
    model.save_pretrained(sys.argv[1])
    by_peft = PeftModel.from_pretrained(copy.deepcopy(base), sys.argv[1]).eval()
    by_transformers = copy.deepcopy(base)
    by_transformers.load_adapter(sys.argv[1])
    with torch.no_grad():
        want = model(ids).logits
        errors = [float((m.eval()(ids).logits - want).abs().max() / want.abs().max()) for m in (by_peft, by_transformers)]
    magnitudes = {n: p for n, p in by_transformers.named_parameters() if "magnitude" in n}
    norms = {n: by_transformers.get_submodule(n.split(".lora_magnitude")[0]).base_layer.weight.norm(dim=1) for n in magnitudes}
    return *errors, bool(magnitudes) and all(torch.allclose(p, norms[n], rtol=0.02) for n, p in magnitudes.items())


lora, dora = off(False), off(True)
print("LoRA: logits off by %.2f through PeftModel.from_pretrained, by %.2f through load_adapter" % lora[:2])
print("DoRA: logits off by %.2f through PeftModel.from_pretrained, by %.2f through load_adapter; magnitudes as untrained: %s" % dora)
sys.exit(not (max(lora[:2]) < 1e-5 and dora[0] < 1e-5 and dora[1] > 0.05))
PY
