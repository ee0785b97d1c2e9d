#!/usr/bin/env bash
# PEFT: a weighted combination of rsLoRA adapters is several times too strong.
#
# Expected: add_weighted_adapter(["a", "b"], [0.5, 0.5], combination_type="cat") is the sum 0.5 a + 0.5 b, exactly, as it is for
#   plain LoRA: the factors are stacked, each with its own scaling folded in, and the new adapter's scaling is 1.
# Happens: for adapters with use_rslora=True the scaling is folded in as well, but the new adapter inherits use_rslora with alpha = rank,
#   so that its own scaling is sqrt(rank) and not 1. Two adapters of rank 8 stacked have rank 16: 4 times too strong.
#   The other kinds are off by sqrt(8). No warning, and the weights look as expected until one compares deltas.
# Versions: peft 0.21.2, transformers 5.24.0, torch 2.13.0, Python 3.11, CPU.
# Seen:
#   plain LoRA: scaling of the combination 1.000, size of its delta against 0.5 a + 0.5 b: 1.000
#   rsLoRA:     scaling of the combination 4.000, size of its delta against 0.5 a + 0.5 b: 4.000
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


def combined(rslora: bool) -> tuple[float, float]:
    """(the combination's scaling, the size of its delta against the sum that was asked for)."""
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["0"], use_rslora=rslora)
    model = get_peft_model(nn.Sequential(nn.Linear(64, 64)), config, "a")
    model.add_adapter("b", config)
    layer = model.base_model.model[0]
    for name in "ab":
        nn.init.normal_(layer.lora_B[name].weight)  # as after training
    model.add_weighted_adapter(["a", "b"], [0.5, 0.5], "sum", combination_type="cat")
    asked = 0.5 * layer.get_delta_weight("a") + 0.5 * layer.get_delta_weight("b")
    made = layer.get_delta_weight("sum")
    return layer.scaling["sum"], float((made * asked).sum() / asked.square().sum())


plain, rs = combined(False), combined(True)
print("plain LoRA: scaling of the combination %.3f, size of its delta against 0.5 a + 0.5 b: %.3f" % plain)
print("rsLoRA:     scaling of the combination %.3f, size of its delta against 0.5 a + 0.5 b: %.3f" % rs)
sys.exit(abs(plain[1] - 1) > 1e-3 or abs(rs[1] - 4) > 1e-3)
PY
