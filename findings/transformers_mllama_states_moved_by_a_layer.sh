#!/usr/bin/env bash
# transformers: one Mllama folder is two models, by the version that reads it.
#
# Expected: a checkpoint gives the same logits in every release that loads it, as it does for text alone.
# Happens: the vision encoder hands five of its layers' states to the text beside its result (intermediate_layers_indices). Up to 4.49 state i
#   was the input of layer i, as in Meta's code, for which the weights were trained. In 4.57 and in 5.x it is the output: every one is a layer late.
#   The files, their names and their shapes are the same, nothing is said, and wherever text sees an image the logits are others.
# Versions: transformers 4.49.0 and 5.24.0, torch 2.13.0, Python 3.11, CPU.
# Seen:
#   4.49.0: state 0 is the input of layer 0: True, its output: False
#   5.24.0: state 0 is the input of layer 0: False, its output: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
bad=0
for version in 4.49.0 5.24.0; do
  python3 -m venv "$folder/venv-$version"
  "$folder/venv-$version/bin/python" -m pip install --quiet torch==2.13.0 transformers=="$version" 2>/dev/null
  "$folder/venv-$version/bin/python" -W ignore - <<'PY' || bad=1
import sys

import torch
import transformers
from transformers.models.mllama.configuration_mllama import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

torch.manual_seed(0)
config = MllamaVisionConfig(
    hidden_size=32, intermediate_size=64, attention_heads=4, num_hidden_layers=3, num_global_layers=1, image_size=28, patch_size=14, max_num_tiles=4,
    intermediate_layers_indices=[0], vision_output_dim=64,
)  # fmt: skip
model, layer = MllamaVisionModel(config).eval(), {}
first = model.transformer.layers[0]
first.register_forward_hook(lambda module, args, kwargs, out: layer.update(given=args or tuple(kwargs.values()), made=out), with_kwargs=True)
with torch.no_grad():
    out = model(torch.randn(1, 1, 4, 3, 28, 28), torch.ones(1, 1, dtype=torch.long), torch.ones(1, 1, 4, dtype=torch.long))
out = out[0] if isinstance(out, tuple) else out.last_hidden_state
state = out[..., 32:]  # beside the result itself
given, made = (t.view(1, 1, 4, -1, 32)[..., :5, :] for t in (layer["given"][0], layer["made"][0] if isinstance(layer["made"], tuple) else layer["made"]))
found = [torch.allclose(state, t, atol=1e-6) for t in (given, made)]
print(f"{transformers.__version__}: state 0 is the input of layer 0: {found[0]}, its output: {found[1]}")
sys.exit(found != ([True, False] if transformers.__version__ == "4.49.0" else [False, True]))
PY
done
exit "$bad"
