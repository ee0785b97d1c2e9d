"""A load and a save never hold a second copy of the model: watched from outside, in a process of its own."""

import os
import select
import subprocess
import sys
from pathlib import Path

import pytest

MEMORY = """
import sys

import torch

from fastfuse.checkpoints import load_checkpoint, save_checkpoint
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, build
config = Llama3VisionConfig(tile_size=28, clip_embed_dim=32, clip_num_heads=2, clip_num_layers=2, clip_hidden_dim=32, clip_hidden_states=(1,), num_layers_projection=1,
    vocab_size=30_000, num_layers=4, num_heads=8, num_kv_heads=8, embed_dim=1024, intermediate_dim=2048, max_seq_len=64, encoder_max_seq_len=64)
def stage(name):
    print(name, flush=True)
    input()

model = build(config)
stage("save")
save_checkpoint(model, sys.argv[1])
stage("fill")
load_checkpoint(model, sys.argv[1])
stage("meta")
del model
with torch.device("meta"):
    model = build(config)
stage("load")
load_checkpoint(model, sys.argv[1])
stage(f"end {sum(p.nbytes for p in model.parameters())}")
"""


def anonymous(pid):
    """Bytes of a process's memory that no file is behind: mapped checkpoints do not count."""
    with open(f"/proc/{pid}/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("RssAnon"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_no_second_copy_in_memory(tmp_path):
    """Sampled from outside, a load into a model takes no memory to speak of, one into the meta device a model's worth, a save one tensor.

    The largest tensor is 123 MB and a load's largest copy, of a permuted q_proj, 4 MB; measured are 16, 463 (of a model of 456) and 152 MB; 64 MB are left to allocators and imports.
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    run = [sys.executable, "-W", "ignore", "-c", MEMORY, str(tmp_path / "checkpoint")]
    peaks, stage = {}, ""
    with subprocess.Popen(run, env=environment, text=True, stdin=-1, stdout=-1, stderr=subprocess.DEVNULL) as child:
        while not stage.startswith("end"):
            before = peak = anonymous(child.pid)
            while not select.select([child.stdout], [], [], 0.001)[0]:
                peak = max(peak, anonymous(child.pid))
            peaks[stage], stage = peak - before, child.stdout.readline().strip()
            print(file=child.stdin, flush=True)
        size = int(stage.split()[1])
    slack = 64_000_000
    assert size > 400_000_000
    assert peaks["fill"] < slack
    assert size - slack < peaks["load"] < size + slack
    assert peaks["save"] < 30_008 * 1024 * 4 + slack
