#!/usr/bin/env bash
# PEFT: a weighted combination of DoRA adapters loses what they learned of the magnitudes.
#
# Expected: add_weighted_adapter of one DoRA adapter with weight 1 gives that adapter again, or the call says that DoRA cannot be combined.
# Happens: the new adapter is a DoRA adapter (use_dora in its config, a magnitude vector in its layers) with the factors A and B of the first.
#   Its magnitudes are those that a fresh adapter starts with, the norms of the base weight's rows: the trained ones are nowhere.
#   Nothing is said. Half of what was trained is gone, and the output belongs to neither the adapter nor the base model.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0, Python 3.11, CPU.
# Seen:
#   combination of one adapter with weight 1: use_dora True, A and B equal: True, magnitudes equal: False
#   its magnitudes are those of an untrained adapter: True
#   outputs differ by 0.5 of the largest; combining plain LoRA: by 0.0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 transformers==5.24.0 peft==0.21.2 2>/dev/null
"$folder/venv/bin/python" -W ignore - <<'PY'
import sys

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


def combined(dora: bool):
    """(the model, its adapted layer, how far the combination is from the one adapter it was made of)."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=8, target_modules=["0"], use_dora=dora)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64, bias=False)), config, "a")
    layer, x = model.base_model.model[0], torch.randn(16, 64)
    nn.init.normal_(layer.lora_B["a"].weight, std=0.1)  # as after training
    if dora:
        layer.lora_magnitude_vector["a"].weight.data *= 2
    model.add_weighted_adapter(["a"], [1.0], "again", combination_type="linear")
    outputs = {}
    for name in ("a", "again"):
        model.set_adapter(name)
        outputs[name] = model(x).detach()
    off = (outputs["a"] - outputs["again"]).abs().max() / outputs["a"].abs().max()
    return model, layer, float(off)


model, layer, dora_off = combined(True)
lora_off = combined(False)[2]
magnitudes = {name: layer.lora_magnitude_vector[name].weight.detach() for name in ("a", "again")}
delta = {name: layer.lora_B[name].weight @ layer.lora_A[name].weight for name in ("a", "again")}
use, factors = model.peft_config["again"].use_dora, torch.allclose(delta["a"], delta["again"], atol=1e-6)
same = torch.allclose(magnitudes["a"], magnitudes["again"])
fresh = torch.allclose(magnitudes["again"], layer.base_layer.weight.norm(dim=1), rtol=1e-4)
print(f"combination of one adapter with weight 1: use_dora {use}, A and B equal: {factors}, magnitudes equal: {same}")
print(f"its magnitudes are those of an untrained adapter: {fresh}")
print(f"outputs differ by {dora_off:.1f} of the largest; combining plain LoRA: by {lora_off:.1f}")
sys.exit(not (use and factors and fresh and not same and dora_off > 0.3 and lora_off < 1e-4))
PY
