"""Commands in processes of their own, where kernels are not loaded for the interpreter, which cannot be compiled."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command, fails=False, **env):
    """At the root of the repository. fails: it may."""
    path = f"{ROOT}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": path} | env
    done = subprocess.run([*map(str, command)], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert fails or done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done


python = partial(run, sys.executable)
