"""Compile every kernel for every target ahead of time and read what the compiler made of it. Needs no GPU.

    python -m bench.codegen               a table: registers, stack, shared memory, matrix and load instructions
    python -m bench.codegen --json FILE   the same as JSON, for the tests

A kernel is specimen x tune row x target. Every one must have stack 0 (nothing spilled) and fit the chip's shared memory.
"""

import argparse
import collections
import concurrent.futures
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastfuse import tune
from fastfuse.kernels.nf4 import nf4_dequantize_kernel
from fastfuse.kernels.nf4_linear import nf4_linear_fwd_kernel

ARCHS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
# Shared memory one block may use: CUDA programming guide, technical specifications per compute capability; CDNA3 ISA.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
# absmax | index, code, absmax, offset | scaler, factor, mean
LAYOUTS = {"flat": ("*fp32",), "nested": ("*u8", "*fp32", "*fp32", "*fp32"), "torchao": ("*i8", "*{w}", "*{w}"), "torchao/200": ("*i8", "*{w}", "*{w}")}
# Blocks that share one factor: QLoRA of the vision encoder asks for 200, which is no shift.
SCALE_BLOCKS = {"torchao/200": 200}


@dataclass(frozen=True)
class Specimen:
    """One kernel with everything a launch would tell the compiler."""

    op: str
    name: str
    arch: str
    kernel: object
    signature: dict  # argument -> type, a tuple of types, or "constexpr"
    constants: dict
    options: dict
    weights: int = 0  # decoded per program and loop step, where the loop decodes


@dataclass
class Report:
    op: str
    name: str
    arch: str
    registers: int
    stack: int
    shared: int
    warps: int
    counts: dict = field(default_factory=dict)  # instruction -> how often, in the whole kernel
    per_weight: float | None = None  # instructions of the main loop per weight decoded

    def problems(self) -> list[str]:
        """Why this kernel must not ship: empty where it may."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers were spilled")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory, {self.arch} has {SHARED_LIMIT[self.arch]}")
        return found


def specimens() -> Iterator[Specimen]:
    for arch in ARCHS:
        yield from _dequantize(arch)
        yield from _linear(arch)


def _dequantize(arch: str) -> Iterator[Specimen]:
    for layout, types in LAYOUTS.items():
        for out in ("bf16", "fp16", "fp32"):
            signature = {"packed_ptr": "*u8", "code_ptr": _code(layout, out), "scales": _layout(types, out), "out_ptr": f"*{out}", "n_elements": "i32"}
            constants = {"BLOCK_SIZE": 64, "SCALE_BLOCK": SCALE_BLOCKS.get(layout, 256), "BLOCKS": 64, "DECODE": _branch(arch, layout, out)}
            yield Specimen("nf4_dequantize", f"{layout} {out}", arch, nf4_dequantize_kernel, signature, constants, {"num_warps": 4, "enable_fp_fusion": False})


def _linear(arch: str) -> Iterator[Specimen]:
    rows = [r for r in tune.table("nf4_linear") if r["arch"] == arch and r["tile"]]
    # (storage, x, adapters): PEFT keeps adapters in fp32; "-" is a plain linear with a bias
    variants = [
        ("flat", "bf16", "bf16"),
        ("nested", "bf16", "fp32"),
        ("nested", "bf16", "-"),
        ("torchao", "bf16", "fp32"),
        ("torchao", "bf16", "bf16"),
        ("torchao/200", "bf16", "bf16"),
        ("flat", "fp16", "fp16"),
    ]
    for row in rows:
        tile = row["tile"]
        for layout, x, adapter in variants:
            yield linear_specimen(arch, tile, layout, x, adapter)


def linear_specimen(arch: str, tile: dict, layout: str, x: str, adapter: str) -> Specimen:
    signature = {"x_ptr": f"*{x}", "packed_ptr": "*u8", "code_ptr": _code(layout, x), "scales": _layout(LAYOUTS[layout], x)}
    signature |= {"out_ptr": f"*{x}", "scaling": "fp32"}
    signature |= dict.fromkeys(("stride_xm", "M", "N", "K", "R"), "i32")
    constants = {"BLOCK_SIZE": 64, "SCALE_BLOCK": SCALE_BLOCKS.get(layout, 256), "DECODE": _branch(arch, layout, x), **tile["constants"]}
    if adapter == "-":
        constants["lora"] = None
        signature["bias_ptr"] = f"*{x}"
    else:
        constants["bias_ptr"] = None
        signature["lora"] = (f"*{adapter}", f"*{adapter}")
    size = "x".join(str(tile["constants"][f"BLOCK_{d}"]) for d in "MNK")
    name = f"{layout} {x} lora {adapter} {size} w{tile['num_warps']} s{tile['num_stages']}"
    options = {k: tile[k] for k in ("num_warps", "num_stages")}
    weights = tile["constants"]["BLOCK_N"] * tile["constants"]["BLOCK_K"]
    return Specimen("nf4_linear", name, arch, nf4_linear_fwd_kernel, signature, constants, options, weights)


def _layout(types: tuple, w: str) -> tuple:
    return tuple(t.format(w=w) for t in types)


def _code(layout: str, w: str) -> str:
    return f"*{w}" if layout.startswith("torchao") else "*fp32"


def _branch(arch: str, layout: str, out: str) -> str:
    return "prmt" if arch.startswith("sm_") and (out == "bf16" or (out == "fp16" and not layout.startswith("torchao"))) else "gather"


def compile_specimen(s: Specimen):
    """Triton's compiled kernel. Pointers and row strides are marked divisible by 16, as the launcher marks aligned ones."""
    names = s.kernel.arg_names
    signature = {n: s.signature.get(n, "constexpr") for n in names}
    attrs = {}
    for i, n in enumerate(names):
        kinds = signature[n] if isinstance(signature[n], tuple) else (signature[n],)
        for j, kind in enumerate(kinds):
            if kind.startswith("*") or n in ("stride_xm", "K", "N", "n_elements"):
                attrs[(i, j) if isinstance(signature[n], tuple) else (i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=s.kernel, signature=signature, constexprs=s.constants, attrs=attrs)
    return triton.compile(source, target=target(s.arch), options=s.options)


def target(arch: str) -> GPUTarget:
    return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)


def report(s: Specimen) -> Report:
    compiled = compile_specimen(s)
    made = Report(s.op, s.name, s.arch, 0, 0, compiled.metadata.shared, s.options["num_warps"])
    if "cubin" in compiled.asm:
        _read_sass(compiled.asm["cubin"], made, s.weights)
    else:
        _read_amdgcn(compiled.asm["amdgcn"], made)
    return made


def _tool(name: str) -> str:
    return str(Path(triton.__file__).parent / "backends/nvidia/bin" / name)


_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)(.*?);")
_LABEL = re.compile(r"^(\.L_x_\d+):")


def _read_sass(cubin: bytes, made: Report, weights: int) -> None:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        usage = subprocess.run([_tool("cuobjdump"), "--dump-resource-usage", f.name], capture_output=True, text=True, check=True).stdout
        text = subprocess.run([_tool("nvdisasm"), "-c", f.name], capture_output=True, text=True, check=True).stdout
    made.registers = int(re.search(r"REG:(\d+)", usage).group(1))
    made.stack = int(re.search(r"STACK:(\d+)", usage).group(1))
    ops, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := _LABEL.match(line.strip()):
            labels[label.group(1)] = len(ops)
        elif found := _INSTRUCTION.search(line):
            ops.append((found.group(1), found.group(2)))
            jump = re.search(r"\.L_x_\d+", found.group(2)) if found.group(1).startswith("BRA") else None
            if jump and jump.group() in labels:
                loops.append((labels[jump.group()], len(ops)))
    for op, operands in ops:
        # HGMMA with a register as its first source is what feeds a decoded weight to wgmma without shared memory.
        from_registers = op.startswith("HGMMA") and re.match(r"\s*R\d+", operands.split(",")[1])
        name = _family(op) + (" from registers" if from_registers else "")
        made.counts[name] = made.counts.get(name, 0) + 1
    main = [loop for loop in loops if any("MMA" in op for op, _ in ops[slice(*loop)])]
    if weights and main:
        start, end = max(main, key=lambda loop: sum(op == "PRMT" for op, _ in ops[slice(*loop)]))  # the LoRA epilogue loops too
        made.per_weight = round((end - start) * made.warps * 32 / weights, 2)


def _family(op: str) -> str:
    base = op.split(".")[0]
    return f"{base}.128" if base in ("LDG", "STG", "LDGSTS") and ".128" in op else base


def _read_amdgcn(text: str, made: Report) -> None:
    made.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
    made.stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1))
    made.counts = dict(collections.Counter(m for m in re.findall(r"^\s+(v_mfma|global_load_dwordx4|ds_read|ds_write)", text, re.M)))


def all_reports(workers: int = 2) -> list[Report]:
    todo = list(specimens())
    with concurrent.futures.ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_nth, range(len(todo)), chunksize=4))


def _nth(i: int) -> Report:
    return report(list(specimens())[i])


def table(reports: list[Report]) -> str:
    lines = [f"{'target':7} {'op':15} {'kernel':48} {'regs':>4} {'stack':>5} {'shared':>7} {'instr/weight':>12}  matrix, 16-byte loads and stores"]
    for r in reports:
        shown = {k: v for k, v in r.counts.items() if "MMA" in k or "mfma" in k or k.endswith((".128", "x4"))}
        made = " ".join(f"{k}:{v}" for k, v in sorted(shown.items()))
        per = "" if r.per_weight is None else f"{r.per_weight:.2f}"
        lines.append(f"{r.arch:7} {r.op:15} {r.name:48} {r.registers:4} {r.stack:5} {r.shared:7} {per:>12}  {made} {'; '.join(r.problems())}")
    return "\n".join(lines)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--json", type=Path, help="write the reports there instead of the table")
    a = p.parse_args()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.codegen: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    reports = all_reports()
    if a.json:
        a.json.write_text(json.dumps([{**asdict(r), "found": r.problems()} for r in reports]))
    else:
        print(table(reports))
    if any(r.problems() for r in reports):
        sys.exit(1)


if __name__ == "__main__":
    main()
