"""Times a case of bench/tune_space.py with one tile."""

import concurrent.futures
import contextlib
import gc
import sys
from unittest import mock

import torch

import fastfuse
from bench import harness
from bench.all import _context_alive
from bench.tune_space import TuneCase
from bench.tune_table import name
from bench.tune_tiles import Tile
from fastfuse import tune
from fastfuse.ops._collect import collecting


class Refused(Exception):
    """This tile must not be used for this case, and why."""


class Unprepared(Exception):
    """This case cannot be run here at all."""


class Clock:
    """Times a case through its op, with the tile pinned, after its result passed the parity rule. The inputs of one case are kept."""

    def __init__(self, device: str):
        self.device, self._at, self._made = device, None, None

    def __call__(self, op: str, case: TuneCase, tile: Tile) -> float:
        with fastfuse.backend("triton"):  # on a CPU the interpreter
            if self._at is not case:
                self._prepare(case)
            with tune.pin(op, tune.tile_of(tile)), mock.patch.object(tune, "pick", wraps=tune.pick) as pick:
                row = harness.measure_provider(case.bench, harness.OURS, *self._made, harness.cuda_us if self.device == "cuda" else harness.cpu_us)
        asked = [call.kwargs for call in pick.call_args_list if call.args[0] == op]
        if "error" in row:
            if self.device == "cuda" and not _context_alive():
                sys.exit(f"bench.tune: the CUDA context is lost, {op} is not written: {name(tile)} at {case.bench.shape}: {row['error']}")
            raise Refused(row["error"])
        if any(shape != case.shape for shape in asked) or not asked:
            raise Unprepared(f"it asks for {asked[:1]}, the case is declared as {dict(case.shape)}")
        if not row["parity"]:
            raise Refused(
                f"wrong: its error is {row['error_over_limit']} times the limit" if row["error_over_limit"] else "wrong: not finite, or another shape"
            )
        if row["timing"] == "events":
            raise Refused("no CUDA graph could hold it: its time would include launch gaps")
        return row["us"]

    def compile_launches(self, op: str, case: TuneCase, tiles: list[Tile], chip: tuple, workers: int) -> None:
        """Side by side, into Triton's cache. What the specimens compile is not it: their integers are divisible by 16 or not as no call's need be."""
        if self._at is not case:
            self._prepare(case)
        run, inputs = case.bench.providers[harness.OURS], self._made[0].inputs
        with collecting(*chip) as found:
            for tile in tiles:
                with tune.pin(op, tune.tile_of(tile)), contextlib.suppress(Exception):  # whatever it is, timing the tile will meet it and name it
                    run(inputs)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            concurrent.futures.wait([pool.submit(compile_kernel) for compile_kernel in found.values()])

    def _prepare(self, case: TuneCase) -> None:
        self._at = self._made = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        try:
            parity = harness.Parity(case.bench, self.device)
            self._made = parity, harness.input_sets(case.bench, self.device, parity.inputs)
        except Exception as error:
            raise Unprepared(harness.describe_error(error)) from None
        self._at = case
