"""Every launch of cases/launches.py for sm_90 through Triton's own argument binder, and what it asks the compiler for. Run by test_codegen.py, without the
interpreter."""

import json
import sys
import warnings
from functools import partial

import torch
import triton
from triton.runtime.jit import JITFunction

from bench import codegen
from bench.tune_compile import run_case
from bench.tune_space import OPS, sweeps
from bench.work import TUNED
from cases.launches import attend, decode, empty, launches
from fastfuse import ops, tune

ARCH = "sm_90"
unnamed: set[str] = set()


def watched(self, *args, grid, **options):
    assert all(0 < n < 2**31 for n in grid), grid
    if "enable_fp_fusion" not in options:
        unnamed.add(self.__name__)
    return real(self, *args, grid=grid, **options)


def texts(tokens, s_e, batch):
    for kind in ("bits", "interval", "none"):
        attend(tokens, kind, s_e=s_e, b=batch)
    ops.EncoderMask.from_dense(empty(batch, tokens, s_e, dtype=torch.bool))
    for compact in (True, False):
        decode(batch, s_e, compact=compact, device="cpu")


def cases_without_a_kernel():
    """Those of bench.tune that launch nothing of their op even with a tile of it: what is timed is what is compiled before."""
    found = []
    for op in OPS:
        tile = next(row["tile"] for row in tune.table(op) if row["arch"] == ARCH and row["tile"])
        for words in dict.fromkeys(case.words for sweep in sweeps(op, ARCH) for case in map(sweep.at, sweep.counts)):
            builds = codegen.collect(ARCH, [(words, partial(run_case, ARCH, op, words, tile))])
            found += [] if any(TUNED.get(build.op) == op for build in builds) else [f"{op} {words}"]
    return found


def main():
    every = [(each.run, n) for each in launches(ARCH) for n in each.counts]
    calls = [("", lambda run=run, n=n: run(n)) for run, n in every]
    calls += [("", lambda s_e=s_e: texts(37, s_e, 2)) for s_e in (300, 1601, 6404)]
    calls += [("other count", lambda run=run, n=n: run(n - 1)) for run, n in every if n > 2]
    calls += [("other text", lambda s=s, s_e=s_e: texts(s, s_e, 3)) for s, s_e in ((38, 300), (64, 512), (33, 333))]
    builds = codegen.collect(ARCH, calls)
    found = {
        "unnamed": sorted(unnamed),
        "fused": {op: sorted({b.options["enable_fp_fusion"] for b in builds if b.op == op}) for op in {b.op for b in builds}},
        "compiled by others": [f"{b.op} {b.name}" for b in builds if b.name.startswith("other")],
        "cases without a kernel": cases_without_a_kernel(),
        "Triton warned": sorted({str(w.message) for w in warned if "triton" in w.filename}),
    }
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    real, JITFunction.run = JITFunction.run, watched
    triton.knobs.language.default_fp_fusion = False  # as from Triton 3.10 on: what a launch does not name is off
    warned = warnings.catch_warnings(record=True).__enter__()
    warnings.simplefilter("always")
    main()
