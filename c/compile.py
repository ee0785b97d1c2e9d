"""Compile the C library's kernels ahead of time: cubins, and tables of them in C. Needs Triton; no GPU, no driver, no torch.

    python c/compile.py --archs 90 100 --dtypes bf16 --variants full --out build/kernels

Not triton.tools.compile: in Triton 3.7 it asks for a driver, and declares fp32 scalars as double where the cubin reads 4 bytes.
What a cubin takes is read from the cubin itself; where it differs from the variant's signature nothing is written.
"""

import argparse
import concurrent.futures
import os
import struct
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[1]
os.environ.pop("TRITON_INTERPRET", None)  # kernels of the interpreter cannot be compiled
os.environ["TRITON_DISABLE_LINE_INFO"] = "1"  # where the sources lay is nobody's business, and most of a cubin
package = ModuleType("fastfuse")  # in place of the real one, which imports torch: kernels/ needs its name alone
package.__path__ = [str(ROOT / "fastfuse")]
sys.modules["fastfuse"] = package
sys.path.insert(0, str(Path(__file__).resolve().parent))

import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from variants import Variant, variants  # noqa: E402

SCRATCH = 2  # pointers that Triton 3.6 and 3.7 put behind a kernel's own parameters: global scratch, profile scratch
SIZES = {"i32": 4, "i64": 8, "fp32": 4}


@dataclass(frozen=True)
class Cubin:
    image: bytes
    entry: str
    threads: int
    shared: int
    parameters: tuple[int, ...]  # bytes of each, the scratch pointers among them


def source(v: Variant) -> tuple[ASTSource, list[tuple[str, int]]]:
    """What the compiler takes, and the (field, bytes) of every parameter that is left, in order."""
    signature, constants, attrs, fields = {}, dict(v.constants), {}, []

    def describe(leaf, path: tuple):
        if isinstance(leaf, tuple):
            parts = [describe(part, (*path, i)) for i, part in enumerate(leaf)]
            return leaf._make(parts) if hasattr(leaf, "_make") else tuple(parts)
        if not isinstance(leaf, str):
            constants[path] = leaf
            return "constexpr"
        name, kind = leaf.split()
        kind, _, hint = kind.partition("/")
        if hint == "16" or (kind.startswith("*") and not hint):
            attrs[path] = [["tt.divisibility", 16]]
        fields.append((name, 8 if kind.startswith("*") else SIZES[kind]))
        return kind

    for i, name in enumerate(v.kernel.arg_names):
        if name in v.constants:
            signature[name] = "constexpr"
        else:
            signature[name] = describe(v.signature[name], (i,))
    unknown = set(v.signature) - set(v.kernel.arg_names)
    if unknown:
        raise SystemExit(f"{v.id}: {v.kernel.fn.__name__} has no argument {', '.join(sorted(unknown))}")
    return ASTSource(fn=v.kernel, signature=signature, constexprs=constants, attrs=attrs), fields


def identity(v: Variant, arch: int) -> str:
    """Rows that differ in their conditions alone share a cubin."""
    return repr((arch, v.kernel.fn.__name__, v.signature, sorted(v.constants.items()), sorted(v.options.items())))


def build(v: Variant, arch: int) -> Cubin:
    src, fields = source(v)
    made = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=v.options)
    meta = made.metadata
    if meta.global_scratch_size or meta.profile_scratch_size or meta.num_ctas != 1:
        raise SystemExit(f"{v.id} {v.key}: scratch memory or clusters, which the launcher does not give")
    image = made.asm["cubin"]
    parameters = parameter_sizes(image, meta.name)
    expected = tuple(size for _, size in fields) + (8,) * SCRATCH
    if parameters != expected:
        raise SystemExit(f"{v.id} {v.key}: the cubin takes parameters of {parameters} bytes, the signature says {expected}")
    return Cubin(image, meta.name, 32 * meta.num_warps, meta.shared, parameters)


def parameter_sizes(image: bytes, entry: str) -> tuple[int, ...]:
    """Bytes of every parameter, in order, out of the section .nv.info of a cubin (64-bit ELF)."""
    offset, count, names_at = struct.unpack_from("<Q", image, 0x28)[0], *struct.unpack_from("<HH", image, 0x3C)
    headers = [struct.unpack_from("<IIQQQQIIQQ", image, offset + 64 * i) for i in range(count)]
    names = headers[names_at][4]
    sections = {image[names + h[0] : image.index(b"\0", names + h[0])].decode(): h[4:6] for h in headers}
    if f".nv.info.{entry}" not in sections:
        raise SystemExit(f"{entry}: the cubin has no .nv.info")
    start, size = sections[f".nv.info.{entry}"]
    sizes, at = {}, start
    while at < start + size:
        form, attribute, value = struct.unpack_from("<BBH", image, at)
        at += 4
        if form == 4:  # the value is a size, and that many bytes follow
            if attribute == 0x17:  # one parameter
                _, ordinal, _, packed = struct.unpack_from("<IHHI", image, at)
                sizes[ordinal] = packed >> 18
            at += value
    return tuple(sizes[i] for i in range(len(sizes)))


def _built(task: tuple) -> Cubin:
    arch, dtypes, small, index = task
    return build(list(variants(arch, dtypes, small))[index], arch)


def write(out: Path, rows: list[tuple[int, Variant, str]], cubins: dict[str, Cubin]) -> None:
    number = {key: i for i, key in enumerate(cubins)}
    assembly, images, tables, entries = [".section .rodata\n"], [], [], []
    described = {identity(v, arch): v for arch, v, _ in rows}
    for key, cubin in cubins.items():
        i, v = number[key], described[key]
        path = out / f"{i}.cubin"
        path.write_bytes(cubin.image)
        # A symbol of its own, hidden: nothing of it is part of the library's interface.
        assembly.append(f'.balign 16\n.global ffs_image_{i}\n.hidden ffs_image_{i}\nffs_image_{i}: .incbin "{path.name}"\n')
        images.append(f"extern const unsigned char ffs_image_{i}[];\n")
        fields = source(v)[1]
        tables.append(f"static const struct parameter parameters_{i}[] = {{{', '.join(f'FIELD({v.arguments}, {name})' for name, _ in fields)}}};\n")
        tables += [f"SIZE({v.arguments}, {name}, {size});\n" for name, size in fields]
        entries.append(f'  {{.image = ffs_image_{i}, .entry = "{cubin.entry}", .threads = {cubin.threads}, .shared = {cubin.shared}, PARAMETERS({i})}},\n')
    assembly.append('.section .note.GNU-stack,"",%progbits\n')
    lines = []
    for arch, v, key in rows:
        when = ", ".join(f".{name} = {n}" for name, n in sorted(v.when.items()))
        tile = ", ".join(f".{n} = {int(v.constants[n])}" for n in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R", "SPLIT_K", "FLATTEN") if n in v.constants)
        lines.append(f"  {{{v.id}, {arch}, {{{', '.join(map(str, v.key)) or 0}}}, {number[key]}, {{{when or 0}}}, {{{tile or 0}}}}},\n")
    archs = "".join(f" sm_{arch}" for arch in dict.fromkeys(arch for arch, *_ in rows))
    (out / "cubins.S").write_text("".join(assembly))
    (out / "table.inc").write_text(
        f'#define ARCHS "{archs.strip()}"\n'
        + "".join(images + list(dict.fromkeys(tables)))
        + f"static struct cubin cubins[] = {{\n{''.join(entries)}}};\n"
        + f"static const struct kernel kernels[] = {{\n{''.join(lines)}}};\n"
    )


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--archs", type=int, nargs="+", required=True, help="compute capabilities: 80 90 100 120")
    p.add_argument("--dtypes", nargs="+", choices=("bf16", "fp16"), default=["bf16"])
    p.add_argument("--variants", choices=("small", "full"), default="full")
    p.add_argument("--jobs", type=int, default=1)
    p.add_argument("--out", type=Path, required=True)
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    small = a.variants == "small"
    rows, tasks = [], {}
    for arch in a.archs:
        for i, v in enumerate(variants(arch, a.dtypes, small)):
            key = identity(v, arch)
            rows.append((arch, v, key))
            tasks.setdefault(key, (arch, a.dtypes, small, i))
    with concurrent.futures.ProcessPoolExecutor(a.jobs) as pool:
        cubins = dict(zip(tasks, pool.map(_built, tasks.values()), strict=True))
    write(a.out, rows, cubins)
    print(f"{len(cubins)} cubins, {sum(len(c.image) for c in cubins.values()) / 1e6:.1f} MB, {len(rows)} rows")


if __name__ == "__main__":
    main()
