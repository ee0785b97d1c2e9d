"""The examples run, and do what they say."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from fastfuse.checkpoints import open_checkpoint

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_finetune_qlora_learns(tmp_path):
    """On a fresh screen, which shows nothing but the example."""
    adapter = tmp_path / "adapter.safetensors"
    command = [sys.executable, str(EXAMPLES / "finetune_qlora.py"), "--steps", "12", "--adapter", str(adapter)]
    done = subprocess.run(command, cwd=EXAMPLES.parent, env=os.environ | {"PYTHONPATH": str(EXAMPLES.parent)}, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(r"(step +\d+  loss [\d.]+\n)+(.* -> '.*\n){3}wrote .*\n", done.stdout)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.5 * losses[0]
    assert all("lora" in name for name in open_checkpoint(adapter)) and len(open_checkpoint(adapter)) > 50


@pytest.mark.parametrize("example", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_imports_nothing_private(example):
    """It is there to be copied."""
    imports = [node for node in ast.walk(ast.parse(example.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = [f"{getattr(node, 'module', '')}.{alias.name}" for node in imports for alias in node.names]
    assert any("fastfuse" in name for name in names)
    assert not [name for name in names if "fastfuse" in name and "._" in name]
