"""What a kernel asks of an SM: its main loops by pipe, how many blocks are resident, and how fast that can be at best. Reads text alone.

A bound is the floor's cycles over those of the busiest pipe, as if all pipes worked side by side and no warp ever waited: a
kernel can be slower than its bound, never faster.
"""

import collections
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

PIPES = ("tensor", "alu", "fma", "imad", "mufu", "lsu", "bulk", "other")


@dataclass(frozen=True)
class Work:
    """What one program does in one step of its main loop, or in all where it has none, and the least the chip must do for it."""

    unit: str  # what instructions are counted by
    units: float
    products: int = 0  # multiply-adds of the matrix unit, one of 16-bit operands being one; tf32 takes twice that, tf32x3 six times
    bytes: float = 0  # of device memory that no other program shares
    loops: tuple[str, ...] = ("loop",)  # from the smallest to the largest; none: the whole kernel is one step
    decodes: bool = False  # the loop is the one that decodes


@dataclass(frozen=True)
class Chip:
    """One SM. Lanes are thread instructions a cycle."""

    warps: int
    blocks: int
    shared: int  # bytes for all blocks
    products: int = 0  # multiply-adds of 16-bit operands a cycle, dense, summed in fp32
    bytes: float = 0.0  # of device memory a cycle
    lanes: dict | None = None  # pipe -> lanes; a pipe whose rate is not published is not there, and bounds nothing
    reserved: int = 1024  # bytes of shared memory that each block takes besides what it asks for


# Resident warps, blocks and shared memory: CUDA programming guide, technical specifications per compute capability, and
# cuda_occupancy.h. Matrix rates and bandwidth: data sheets of A100 80GB (108 SMs, 1.41 GHz), H200 (132; 989 TFLOP/s are at 1.83 GHz,
# memory at 1.98), B200 (148; 2.25 PFLOP/s at 1.85, 1.965) and RTX PRO 6000 (188, 2.617), a GeForce having half its matrix rate.
# Lanes: the guide's throughput of arithmetic instructions: fp32 adds, products and fma; integer products; integers, logic, shifts and
# comparisons; special functions and conversions. Of 10.0 and 12.0 only those of fp32 and special functions are known here, so no
# integer pipe bounds a kernel there. Nobody publishes the rates of uniform, control and TMA instructions, nor that of HMMA on
# chips that have a faster matrix instruction: HMMA counts at the chip's best rate. wgmma's reads of shared memory are left out.
_SEPARATE_INTEGERS = {"alu": 64, "imad": 64}
CHIPS = {
    "sm_80": Chip(64, 32, 167_936, 1024, 2.039e12 / 108 / 1.41e9, {"fma": 64, "mufu": 16} | _SEPARATE_INTEGERS),
    "sm_90": Chip(64, 32, 233_472, 2048, 4.8e12 / 132 / 1.98e9, {"fma": 128, "mufu": 16} | _SEPARATE_INTEGERS),
    "sm_100": Chip(64, 32, 233_472, 4096, 8e12 / 148 / 1.965e9, {"fma": 128, "mufu": 16}),
    "sm_120": Chip(48, 24, 102_400, 512, 1.792e12 / 188 / 2.617e9, {"fma": 128, "mufu": 16}),
    "gfx942": Chip(32, 32, 65_536, reserved=0),  # eight waves a SIMD: LLVM's AMDGPU processors; no bound is drawn
}
_ISSUE = 4  # warp instructions a cycle: one of each of the four schedulers
_SHARED_BYTES = 128  # a cycle: 32 banks of 4 bytes
_TMEM_COLUMNS = 512  # tensor memory of sm_100

# By pipe as Nsight Compute's guide describes them. MOV and F2FP are the ALU's, conversions but F2FP the XU's, which is called mufu here.
_ALU = """BMSK F2FP FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HSETP2 IABS IADD IADD3 ICMP IMNMX ISETP LEA LOP LOP3 MOV P2R PLOP3 PRMT R2P SEL SGXT SHF
    VABSDIFF VIADD VIADDMNMX VIMNMX VIMNMX3"""
_FMA = "FADD FADD2 FFMA FFMA2 FHADD FHFMA FMUL FMUL2 HADD2 HFMA2 HMUL2"
_LSU = "ATOM ATOMG ATOMS LD LDG LDGSTS LDL LDS LDSM RED SHFL ST STG STL STS STSM"
_PIPE = {
    name: pipe
    for pipe, names in {"alu": _ALU, "fma": _FMA, "imad": "IDP IMAD IMUL", "mufu": "BREV F2F F2I FLO FRND I2F MUFU POPC", "lsu": _LSU}.items()
    for name in names.split()
}
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Za-z0-9_.]*)(.*?);")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_TARGET = re.compile(r"\.L_x_\d+")


@dataclass(frozen=True)
class Instruction:
    op: str
    operands: str
    guarded: bool

    @property
    def family(self) -> str:
        return self.op.split(".")[0]

    @property
    def pipe(self) -> str:
        name = self.family
        if "MMA" in name:
            return "tensor"
        if name.startswith(("UTMA", "UBLK", "UTC", "LDTM", "STTM")):
            return "bulk"
        return _PIPE.get(name, "other")

    def lsu_cycles(self) -> int:
        """Of the SM's one LSU, without bank conflicts: a warp's bytes of shared memory by 128, of all else a warp a cycle."""
        words = 4 if ".128" in self.op else 2 if ".64" in self.op else 1
        if self.family in ("LDSM", "STSM"):
            return int(self.op[-1]) if self.op[-2:] in (".2", ".4") else 1
        return words * 4 * 32 // _SHARED_BYTES if self.family in ("LDS", "STS", "LDGSTS") else 1

    def products(self) -> int | None:
        """Multiply-adds for a warp, counted as in Work; None of a matrix instruction whose shape is not in its name."""
        if shape := re.search(r"HGMMA\.(\d+)x(\d+)x(\d+)", self.op):
            size = math.prod(int(n) for n in shape.groups()) // 4  # four warps share it
        elif shape := re.search(r"HMMA\.(16)(8)(16|8|4)\b", self.op):
            size = math.prod(int(n) for n in shape.groups())
        else:
            return None
        return size * (2 if "TF32" in self.op else 1)


def parse(text: str) -> tuple[list[Instruction], dict[str, int]]:
    """nvdisasm's listing: instructions, and which one each label stands before."""
    found, labels = [], {}
    for line in text.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(found)
        elif match := _INSTRUCTION.search(line):
            found.append(Instruction(match[2], match[3], match[1] is not None))
    return found, labels


def loops(code: list[Instruction], labels: dict[str, int]) -> list[set[int]]:
    """The instructions of each loop, without those of loops inside it.

    A loop is natural: its head is on every way to its end. A jump back is not enough, for the wait of a TMA barrier stands behind
    the kernel's end and jumps back into the middle of a loop.
    """
    starts = sorted({0, *labels.values()} | {i + 1 for i, c in enumerate(code) if c.family in ("BRA", "EXIT", "RET")})
    starts = [s for s in starts if s < len(code)]
    ends = dict(zip(starts, [*starts[1:], len(code)], strict=True))
    after = {s: [t for t in _successors(code, labels, ends[s]) if t in ends] for s in starts}
    before = {s: [p for p in starts if s in after[p]] for s in {t for ts in after.values() for t in ts}}
    bodies = {}
    for end in starts:
        for head in after[end]:
            if head <= end and end in _reach(0, after) and end not in _reach(0, after, head):
                bodies.setdefault(head, {head}).update(_reach(end, before, head))
    own = [body - {b for other in bodies.values() if other < body for b in other} for body in bodies.values()]
    return [{i for s in body for i in range(s, ends[s])} for body in own]


def _successors(code: list[Instruction], labels: dict[str, int], end: int) -> Iterator[int]:
    last = code[end - 1]
    target = _TARGET.search(last.operands) if last.family == "BRA" else None
    if target and target[0] in labels:
        yield labels[target[0]]
    always = not last.guarded and (last.family in ("EXIT", "RET") or (last.family == "BRA" and last.operands.strip().startswith("`(")))
    if not always:
        yield end


def _reach(start: int, edges: dict[int, list[int]], without: int | None = None) -> set[int]:
    """Everything `start` leads to, itself included, on ways that do not pass `without`."""
    seen, todo = set(), [start]
    while todo:
        at = todo.pop()
        if at not in seen and at != without:
            seen.add(at)
            todo += edges.get(at, ())
    return seen


def main_loops(code: list[Instruction], labels: dict[str, int], work: Work) -> dict[str, list[Instruction]]:
    """The loops that the work names. A kernel that lacks them, or has none by design, is one step."""
    if not work.loops:
        return {"whole": code}
    found = sorted(([code[i] for i in sorted(loop)] for loop in loops(code, labels)), key=lambda loop: _rank(loop, work))
    largest = sorted(found[-len(work.loops) :], key=len)
    return dict(zip(work.loops[-len(largest) :], largest, strict=True)) if largest else {"whole": code}


def _rank(loop: list[Instruction], work: Work) -> tuple[float, int]:
    """Orders a kernel's loops, the main one last."""
    if work.decodes:  # the adapters' loops multiply too, in fp32 at length
        first = sum(c.family == "PRMT" for c in loop)
    elif work.products:  # the densest: a tile's first step may be peeled into the loop over tiles
        first = sum(c.pipe == "tensor" for c in loop) / len(loop)
    else:
        first = 0
    return first, len(loop)


def figures(code: list[Instruction], work: Work, arch: str, warps: int) -> dict[str, float | str]:
    """Thread instructions a unit, by pipe; matrix instructions by name. Where there is a floor, the bound in percent of it and the pipe that sets it."""
    code = [c for c in code if c.family != "NOP"]
    scale = warps * 32 / work.units
    by_pipe = {pipe: sum(c.pipe == pipe for c in code) for pipe in PIPES}
    made = {"total": len(code) * scale} | {pipe: n * scale for pipe, n in by_pipe.items() if n and pipe != "tensor"}
    for name in sorted({c.family for c in code if c.pipe == "tensor"}):
        made[name] = sum(c.family == name for c in code) * scale
    chip = CHIPS[arch]
    floor = max(work.products / chip.products, work.bytes / chip.bytes)
    if floor:
        cycles = {pipe: by_pipe[pipe] * 32 / lanes for pipe, lanes in chip.lanes.items()}
        cycles["fma"] += by_pipe["imad"] * 32 / chip.lanes["fma"]  # integer products go through a half of it
        cycles |= {"issue": len(code) / _ISSUE, "lsu": sum(c.lsu_cycles() for c in code if c.pipe == "lsu")}
        cycles["tensor"] = sum(c.products() or 0 for c in code if c.pipe == "tensor") / chip.products
        busiest = max(cycles, key=cycles.get)
        made |= {"bound": 100 * min(1.0, floor / (cycles[busiest] * warps)), "by": busiest}
        if cycles[busiest] * warps <= floor:
            made["by"] = "floor"
    return made


def blocks(arch: str, registers: int, shared: int, warps: int, tmem: int = 0) -> int:
    """Resident blocks of an SM. Registers are given to warps by eights, and each of its four parts has 512 a lane."""
    chip = CHIPS[arch]
    fits = [chip.blocks, chip.warps // warps, 4 * (512 // (-(-max(registers, 1) // 8) * 8)) // warps]
    if shared + chip.reserved:
        fits.append(chip.shared // (shared + chip.reserved))
    if tmem:
        fits.append(_TMEM_COLUMNS // tmem)
    return min(fits)


@dataclass
class Report:
    """What the compiler made of a kernel."""

    arch: str
    op: str  # the kernel
    name: str
    key: str  # of everything that it was compiled from
    shared: int
    warps: int
    unit: str  # of work, by which the figures of the loops are counted
    registers: int = 0
    stack: int = 0
    blocks: int = 0  # resident on an SM
    code: int = 0  # instructions of the whole kernel
    loops: dict = field(default_factory=dict)  # main loop -> its figures; AMD: counts of the whole kernel
    counts: dict = field(default_factory=dict)  # instruction that moves or multiplies much -> how often, in the whole kernel

    def problems(self) -> list[str]:
        """Why this kernel must not ship: empty where it may."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack: registers were spilled")
        limit = CHIPS[self.arch].shared - CHIPS[self.arch].reserved
        if self.shared > limit:
            found.append(f"{self.shared} bytes of shared memory, {self.arch} has {limit}")
        return found

    def read_nvidia(self, usage: str, text: str, work: Work) -> None:
        """Of cuobjdump's resource usage and nvdisasm's listing."""
        self.registers = int(re.search(r"REG:(\d+)", usage).group(1))
        self.stack = int(re.search(r"STACK:(\d+)", usage).group(1))
        code, labels = parse(text)
        self.code = sum(c.family != "NOP" for c in code)
        self.counts = dict(collections.Counter(name for c in code if _COUNTED.match(name := _counted_as(c))))
        main = main_loops(code, labels, work)
        self.loops = {name: figures(loop, work, self.arch, self.warps) for name, loop in main.items()}
        if loop := main.get("loop"):
            own = {"HGMMA in loop": sum(c.family == "HGMMA" for c in loop)}
            own["full waits in loop"] = sum(c.op.startswith("WARPGROUP.DEPBAR") and "0x0" in c.operands for c in loop)
            self.counts |= {name: n for name, n in own.items() if own["HGMMA in loop"]}

    def read_amd(self, text: str) -> None:
        self.registers = int(re.search(r"\.vgpr_count:\s+(\d+)", text).group(1))
        self.stack = int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", text).group(1))
        self.counts = dict(collections.Counter(re.findall(r"^\s+(v_mfma|global_load_dwordx4|ds_read|ds_write)", text, re.M)))
        ops = [op for op in re.findall(r"^\s+([a-z]+_[a-z0-9_]+)", text, re.M) if op != "s_nop"]
        kinds = collections.Counter(next((kind for kind, start in _AMD.items() if re.match(start, op)), "other") for op in ops)
        self.code, self.loops = kinds.total(), {"whole": dict(sorted(kinds.items()))}


_COUNTED = re.compile(r"(LDG|STG|LDGSTS|STS|UTMALDG)\b|.*MMA")
_AMD = {
    "mfma": r"v_mfma",
    "valu": r"v_",
    "salu": r"s_",
    "lds": r"ds_",
    "memory": r"(global|buffer|flat|scratch)_",
}  # by what executes them; the first match counts


def _counted_as(c: Instruction) -> str:
    if c.family in ("LDG", "STG", "LDGSTS") and ".128" in c.op:
        return f"{c.family}.128"
    # HGMMA with a register as its first source is what feeds a decoded weight to wgmma without shared memory.
    return c.family + (" from registers" if c.family == "HGMMA" and re.match(r"\s*R\d+", c.operands.split(",")[1]) else "")
