#!/usr/bin/env bash
# Triton: volatile=True and cache_modifier=".cv" of a load hold until the loop is pipelined.
#
# Expected: tl.load(..., volatile=True) reads memory again at every call and is not moved, as in CUDA; cache_modifier=".cv" asks for the same.
#   A load that may not be moved is left out of the software pipeline, or the compiler says that the two do not go together.
# Happens: with num_stages=1 the PTX has ld.volatile and ld.cv. With num_stages=3, all else equal, both are dropped without a word: the operands
#   of a tl.dot are copied ahead by cp.async.cg, two rounds before they are used, like any other load. Whether a load is volatile
#   thus depends on a tuning option of the launch.
# Versions: triton 3.9.0, Python 3.11, compiled for sm_80 and sm_90, no GPU. 3.7.1 drops volatile just so, and .cv with one stage as well.
# Seen:
#   sm_80 volatile num_stages=1: ld.volatile
#   sm_80 volatile num_stages=3: cp.async.cg
#   sm_80 .cv      num_stages=1: ld.cv
#   sm_80 .cv      num_stages=3: cp.async.cg
#   (sm_90: the same four)
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/python" -m pip install --quiet triton==3.9.0 2>/dev/null
cat >"$folder/loads.py" <<'PY'
import re
import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def product(a_ptr, b_ptr, o_ptr, K, VOLATILE: tl.constexpr, CACHE: tl.constexpr):
    rows, inner = tl.arange(0, 64), tl.arange(0, 64)
    acc = tl.zeros((64, 64), tl.float32)
    for k in range(0, K, 64):
        a = tl.load(a_ptr + rows[:, None] * K + k + inner[None, :], volatile=VOLATILE, cache_modifier=CACHE)
        b = tl.load(b_ptr + rows[None, :] * K + k + inner[:, None], volatile=VOLATILE, cache_modifier=CACHE)
        acc = tl.dot(a, b, acc)
    tl.store(o_ptr + rows[:, None] * 64 + inner[None, :], acc)


def loads(chip: int, volatile: bool, cache: str, stages: int) -> str:
    constants = {"VOLATILE": volatile, "CACHE": cache}
    signature = {"a_ptr": "*fp16", "b_ptr": "*fp16", "o_ptr": "*fp32", "K": "i32"} | dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(4)}
    source = ASTSource(fn=product, signature=signature, constexprs=constants, attrs=aligned)
    options = {"num_warps": 4, "num_stages": stages, "enable_fp_fusion": True}
    ptx = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options).asm["ptx"]
    return " ".join(sorted(set(re.findall(r"ld\.volatile|ld\.global\.cv|cp\.async\.c[ag]", ptx)))).replace("ld.global.cv", "ld.cv")


changed = False
for chip in (80, 90):
    for name, volatile, cache, kept in (("volatile", True, "", "ld.volatile"), (".cv", False, ".cv", "ld.cv")):
        for stages, expected in ((1, kept), (3, "cp.async.cg")):
            found = loads(chip, volatile, cache, stages)
            changed |= found != expected
            print(f"sm_{chip} {name:8} num_stages={stages}: {found}")
sys.exit(changed)
PY
TRITON_CACHE_DIR="$folder/cache" "$folder/venv/bin/python" "$folder/loads.py"
