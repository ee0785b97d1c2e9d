#!/usr/bin/env bash
# Triton: from three stages on (the default) a loop reads memory before the store that comes before it in the program.
#
# Expected: a program's loads and stores through one pointer keep their order. A loop that writes a state to memory and reads it again in the next
#   round (a recurrence x W, x W W, ...) either is not pipelined, as C compilers refuse it, or the compiler says that it cannot be.
# Happens: the pipeliner asks for no dependence between memory operations. With num_stages=3, the default, the states of rounds 0 AND 1 are fetched before
#   the loop begins, where round 0 has not stored what round 1 reads; from then on each round fetches two ahead. Results depend on num_stages,
#   which an autotuner is free to choose, and nothing warns. A tl.debug_barrier() in the loop turns its pipelining off.
# Versions: triton 3.9.0 (3.7.1 the same), Python 3.11, compiled for sm_80 and sm_90, no GPU.
# Seen (sm_90 the same):
#   sm_80 num_stages=1:               states fetched before the first store: 0
#   sm_80 num_stages=3:               states fetched before the first store: 2
#   sm_80 default:                    states fetched before the first store: 2
#   sm_80 num_stages=3 with barrier:  states fetched before the first store: 0
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet triton==3.9.0 2>/dev/null
cat >"$folder/recurrence.py" <<'PY'
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def recurrence(state_ptr, w_ptr, steps, BARRIER: tl.constexpr):
    """state[i + 1] = state[i] W, for a state of 64 x 64 in memory."""
    tile = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    w = tl.load(w_ptr + tile)
    for i in range(steps):
        state = tl.load(state_ptr + i * 4096 + tile)
        tl.store(state_ptr + (i + 1) * 4096 + tile, tl.dot(state, w).to(tl.float16))
        if BARRIER:
            tl.debug_barrier()


def fetched_ahead(chip: int, barrier: bool, options: dict) -> int:
    """Copies of a state that are under way before the loop, and so before its first store."""
    signature = {"state_ptr": "*fp16", "w_ptr": "*fp16", "steps": "i32", "BARRIER": "constexpr"}
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(2)}
    source = ASTSource(fn=recurrence, signature=signature, constexprs={"BARRIER": barrier}, attrs=aligned)
    made = triton.compile(source, target=GPUTarget("cuda", chip, 32), options={"enable_fp_fusion": True} | options)
    before, loop = made.asm["ttgir"].split("scf.for", 1)
    assert "tt.store" not in before and "tt.store" in loop
    return before.count("ttg.async_copy_global_to_local ")


changed = False
cases = (("num_stages=1", False, {"num_stages": 1}, 0), ("num_stages=3", False, {"num_stages": 3}, 2), ("default", False, {}, 2))
for chip in (80, 90):
    for name, barrier, options, expected in (*cases, ("num_stages=3 with barrier", True, {"num_stages": 3}, 0)):
        found = fetched_ahead(chip, barrier, options)
        changed |= found != expected
        print(f"sm_{chip} {name + ':':27} states fetched before the first store: {found}")
sys.exit(changed)
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/recurrence.py"
