#!/usr/bin/env bash
# torchao: a row of zeros in a weight becomes NaN as float8, where int8 keeps it.
#
# Expected: zero is a number that every format holds. A row of zeros (a pruned channel, the padding of a vocabulary to a round size)
#   quantizes to zeros and gives 0, as Int8WeightOnlyConfig does.
# Happens: Float8WeightOnlyConfig divides the row by a scale of 0 / 448 without a lower bound: 0 / 0. quantize_ says nothing, the row's
#   output is NaN for every input. One such row in a language model's head is the answer to every prompt: argmax takes NaN for the largest.
# Versions: torchao 0.18.0, torch 2.13.0, Python 3.11, CPU.
# Seen:
#   Int8WeightOnlyConfig:    0 NaN in the logits, next token 2
#   Float8WeightOnlyConfig:  1 NaN in the logits, next token 7
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet torch==2.13.0 torchao==0.18.0 2>/dev/null
"$folder/venv/bin/python" -W ignore - 2>/dev/null <<'PY'
import sys

import torch
from torch import nn
from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_

found = []
for config in (Int8WeightOnlyConfig(), Float8WeightOnlyConfig()):
    head = nn.Sequential(nn.Linear(64, 8, bias=False, dtype=torch.bfloat16))  # a vocabulary of 7 tokens, padded to 8
    torch.manual_seed(0)
    nn.init.normal_(head[0].weight)
    head[0].weight.data[7] = 0
    hidden = head[0].weight[2:3].detach().clone()  # points at token 2
    quantize_(head, config)
    logits = head(hidden)
    found.append((int(logits.isnan().sum()), int(logits.argmax())))
    print(f"{type(config).__name__ + ':':24} {found[-1][0]} NaN in the logits, next token {found[-1][1]}")
sys.exit(found != [(0, 2), (1, 7)])
PY
