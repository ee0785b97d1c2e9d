"""The C library's launches, run: recorded by the driver that launches nothing, then interpreted on a CPU. Run by test_c_library.py.

    TRITON_INTERPRET=1 python -m tests.c_launches BUILD

An interpreted launch gets its arguments from the recorded bytes alone, so that a pointer, size or grid that C has wrong makes wrong numbers. The
interpreter's bf16 is no bf16: the library thinks that it is, and both sides keep fp16, which is as wide.
"""

import ctypes as C
import re
import sys
from collections.abc import Iterator
from pathlib import Path

BUILD = Path(sys.argv[1])
fake_library = C.CDLL(str(BUILD / "c/tests/libcuda.so.1"))  # before anything else could load the real one
library = C.CDLL(str(BUILD / "libfastfuse.so"))
library.ffs_last_error.restype = C.c_char_p
sys.path.insert(0, str(Path(__file__).parents[1] / "c"))

import torch  # noqa: E402
from variants import variants  # noqa: E402

from fastfuse.kernels.nf4 import BITSANDBYTES  # noqa: E402
from fastfuse.ops import EncoderMask, cross_attention, nf4_dequantize, nf4_linear, nf4_lora_linear, patch_embed  # noqa: E402
from fastfuse.quant.nf4 import NF4View  # noqa: E402
from tests.numerics import assert_no_worse  # noqa: E402

BF16, P, I64 = 1, C.c_void_p, C.c_int64
TYPES = {"bf16": torch.float16, "fp32": torch.float32, "u8": torch.uint8, "i8": torch.int8, "i1": torch.bool, "i32": torch.int32, "i64": torch.int64}


class Launch(C.Structure):
    _fields_ = [("image", P), ("entry", C.c_char * 96), ("grid", C.c_uint * 3), ("block", C.c_uint * 3), ("shared", C.c_uint), ("stream", P),
                ("allowed_shared", C.c_int), ("count", C.c_int), ("size", C.c_uint * 64), ("value", C.c_ubyte * 8 * 64)]  # fmt: skip


class State(C.Structure):
    _fields_ = [(name, C.c_int) for name in ("ordinal", "major", "minor", "processors", "next_error", "loads", "launches")] + [("launch", Launch * 64)]


def struct(name: str) -> type[C.Structure]:
    """As the header declares it."""
    body, fields = re.search(rf"typedef struct {{([^}}]*)}} {name};", HEADER)[1], []
    for kind, names in re.findall(r"(?:const )?(\w+) ([^;]+);", body):
        for field in names.split(", "):
            field, _, length = field.removesuffix("]").partition("[")
            of = P if field[0] == "*" else KINDS[kind]
            fields.append((field.lstrip("*"), of * int(length) if length else of))
    return type(name, (C.Structure,), {"_fields_": fields})


HEADER = re.sub(r"/\*.*?\*/", "", (Path(__file__).parents[1] / "c/fastfuse.h").read_text(), flags=re.DOTALL)
KINDS = {"int64_t": I64, "float": C.c_float, "int": C.c_int, "ffs_dtype": C.c_int}
Weight, Lora, Patches, Mask, Attention = map(struct, ("ffs_nf4", "ffs_lora", "ffs_patches", "ffs_mask", "ffs_attention"))
fake = State.in_dll(fake_library, "fake")
arena = torch.full((16 << 20,), 0xFF, dtype=torch.uint8)  # all memory that kernels see: NaN where nobody wrote
used = -arena.data_ptr() % 256


def made(t: torch.Tensor) -> torch.Tensor:
    """t in the arena."""
    global used
    place = arena[used : used + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
    used += -(-t.numel() * t.element_size() // 256) * 256
    return place.copy_(t)


def nan(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return made(torch.full(shape, float("nan"), dtype=dtype))


def memory(n: int) -> tuple[P, C.c_size_t]:
    return P(made(torch.full((n,), 0xFF, dtype=torch.uint8)).data_ptr() if n else None), C.c_size_t(n)


def table() -> list[tuple[bytes, object]]:
    """(cubin, variant), numbered as c/compile.py numbers them."""
    found = {}
    for v in variants(90, ["bf16"], True):
        found.setdefault(repr((v.kernel.__name__, v.signature, sorted(v.constants.items()), sorted(v.options.items()))), v)
    return [((BUILD / f"kernels/{i}.cubin").read_bytes(), v) for i, v in enumerate(found.values())]


def argument(leaf, values: Iterator[bytes]):
    """What the interpreter takes for a leaf of a signature, out of the next of the recorded values."""
    if isinstance(leaf, tuple):
        parts = [argument(part, values) for part in leaf]
        return leaf._make(parts) if hasattr(leaf, "_make") else tuple(parts)
    if not isinstance(leaf, str):
        return leaf
    kind, value = leaf.split()[1].partition("/")[0], next(values)
    if kind.startswith("*"):
        start, dtype = int.from_bytes(value, "little") - arena.data_ptr(), TYPES[kind[1:]]
        return arena[start : start + (arena.numel() - start) // dtype.itemsize * dtype.itemsize].view(dtype)
    if kind == "fp32":
        return C.c_float.from_buffer_copy(value).value
    return int.from_bytes(value[: 8 if kind == "i64" else 4], "little", signed=True)


def call(function: str, *args) -> None:
    """Calls it, and interprets what it launched."""
    fake.launches = 0
    if getattr(library, function)(*args):
        raise SystemExit(library.ffs_last_error().decode())
    for launch in fake.launch[: fake.launches]:
        v = next(v for image, v in TABLE if C.string_at(launch.image, len(image)) == image)
        values = iter(bytes(value) for value in launch.value[: launch.count])
        constants = dict(v.constants)
        given = {name: argument(v.signature[name], values) for name in v.kernel.arg_names if name not in constants}
        assert [*values] == [bytes(8)] * 2, f"{launch.entry}: more parameters than the signature has"
        if constants.get("DECODE") == "prmt":  # byte permutes are assembly: the portable decode takes the table
            constants["DECODE"] = "gather"
            if "weight" in given:
                given["weight"] = given["weight"]._replace(code=TABLE_OF_CODES)
            else:
                (layer,) = given["group"]
                given["group"] = (layer._replace(weight=layer.weight._replace(code=TABLE_OF_CODES)),)
        v.kernel[tuple(launch.grid)](**given, **constants)


def workspace(function: str, *args) -> tuple[P, C.c_size_t]:
    n = C.c_size_t()
    if getattr(library, function)(*args, C.byref(n)):
        raise SystemExit(library.ffs_last_error().decode())
    return memory(n.value)


def pointer(t: torch.Tensor | None) -> P:
    return P(None if t is None else t.data_ptr())


def half(*shape: int, size: float = 1.0) -> torch.Tensor:
    return made(torch.randn(shape).mul(size).half())


def linear(M: int, N: int, K: int, R: int, biased: bool) -> None:
    blocks = N * K // 64
    scales = torch.randint(256, (blocks,), dtype=torch.uint8), torch.rand(256), torch.rand(-(-blocks // 256)) * 0.1, torch.tensor([0.02])
    scales = tuple(made(t) for t in scales)
    view = NF4View(made(torch.randint(256, (N * K // 2,), dtype=torch.uint8)), TABLE_OF_CODES, scales, 64, (N, K), torch.float16)
    weight = Weight(N, K, *(t.data_ptr() for t in (view.packed, *scales)))
    x, out, bias = half(M, K + 16), nan(M, N), half(N) if biased else None
    a, b = (half(R, K, size=0.05), half(N, R)) if R else (None, None)
    lora = C.byref(Lora(R, 0.5, BF16, a.data_ptr(), b.data_ptr())) if R else None
    given = workspace("ffs_nf4_linear_workspace", BF16, I64(M), C.byref(weight), lora)
    call("ffs_nf4_linear", None, BF16, I64(M), pointer(x), I64(K + 16), C.byref(weight), lora, pointer(bias), pointer(out), *given)

    def reference(dtype):
        w, xs = nf4_dequantize(view, torch.float32).to(dtype), x[:, :K].to(dtype)
        y = xs @ w.T + (0 if bias is None else bias.to(dtype))
        return y + 0.5 * (xs @ a.to(dtype).T) @ b.to(dtype).T if R else y

    eager = nf4_lora_linear(x[:, :K], view, a, b, 0.5, bias=bias, backend="torch") if R else nf4_linear(x[:, :K], view, bias, backend="torch")
    assert_no_worse(out, eager, reference(torch.float64))
    decoded = nan(N, K)
    call("ffs_nf4_dequantize", None, BF16, C.byref(weight), pointer(decoded))
    assert torch.equal(decoded, nf4_dequantize(view, torch.float16))


def patches(normed: bool) -> None:
    D, H, W = 48, 28, 42
    images, weight, cls, local, gates = half(2, 4, 3, H, W), half(D, 3, 14, 14, size=0.05), half(D), half(7, D), half(2)
    table, pre, ratio = half(4, 4, 7, D), half(4, 4, 1, D), made(torch.tensor([[2, 2], [1, 2]]))
    rows, out, fits = made(torch.nn.functional.pad(weight.flatten(1), (0, 640 - 588))), nan(2, 4, 8, D), made(torch.tensor([7], dtype=torch.uint8))
    norm = (half(D), half(D)) if normed else (None, None)
    args = Patches(
        dtype=BF16, image_dtype=BF16, images=2, tiles=4, height=H, width=W, patch=14, D=D, pixels=images.data_ptr(), stride_tile=3 * H * W,
        stride_channel=H * W, stride_line=W, weight=rows.data_ptr(), cls=cls.data_ptr(), local_pos=local.data_ptr(), global_pos=table.data_ptr(),
        pre_pos=pre.data_ptr(), gate=gates.data_ptr(), pre_gate=gates.data_ptr() + 2, aspect_ratio=ratio.data_ptr(), entries=4, side=4, fits=fits.data_ptr(),
        norm_weight=pointer(norm[0]), norm_bias=pointer(norm[1]), eps=1e-5, pad_tokens_to=8, out=out.data_ptr(),
    )  # fmt: skip
    call("ffs_patch_embed", None, C.byref(args), *workspace("ffs_patch_embed_workspace", C.byref(args)))

    def reference(dtype):
        i, w, c, lo, t, p, g = (x.to(dtype) for x in (images, weight, cls, local, table, pre, gates))
        options = {"norm": (norm[0].to(dtype), norm[1].to(dtype), 1e-5)} if normed else {}
        return patch_embed(i, w, c, ratio, lo, t, g[:1], p, g[1:], pad_tokens_to=8, backend="torch", **options)

    assert fits.item() == 1
    assert_no_worse(out, reference(torch.float16), reference(torch.float64))


def attention(b: int, s: int, s_e: int, kind: str) -> None:
    q, k, v, out = half(b, s, 8, 128), half(b, 2, s_e, 128), half(b, 2, s_e, 128), nan(b, s, 8, 128)
    text, cache = (I64 * 3)(s * 1024, 128, 1024), (I64 * 3)(2 * s_e * 128, s_e * 128, 128)
    args = Attention(BF16, b, 8, 2, s, s_e, 128, *(t.data_ptr() for t in (q, k, v, out)), text, cache, cache, text, scale=0.125)
    mask, n = Mask(), C.c_size_t()
    if kind == "lengths":
        lengths = made(torch.tensor([s_e - 37, 0, 5], dtype=torch.int32)[:b].contiguous())
        args.lengths = lengths.data_ptr()
        visible = (torch.arange(s_e) < lengths[:, None])[:, None].expand(b, s, s_e)
    else:
        args.mask = C.addressof(mask)
        library.ffs_mask_memory(I64(b), I64(s), I64(s_e), I64(4), int(kind == "tiles"), C.byref(n))
    if kind == "intervals":
        lo = torch.randint(s_e, (b, s), dtype=torch.int32)
        hi = torch.where(torch.rand(b, s) < 0.2, lo, torch.full_like(lo, s_e))
        rows, empty = made(torch.stack([lo, hi], -1)), made(lo >= hi)
        call("ffs_mask_intervals", None, I64(b), I64(s), I64(s_e), I64(4), pointer(rows), pointer(empty), *memory(n.value), C.byref(mask))
        visible = EncoderMask.from_intervals(rows, s_e).to_dense()
    elif kind == "tiles":
        tiles = made((torch.rand(b, s, s_e // 101) < 0.5).to(torch.uint8))
        call("ffs_mask_tiles", None, I64(b), I64(s), I64(s_e // 101), I64(101), I64(4), pointer(tiles), *memory(n.value), C.byref(mask))
        visible = tiles.bool().repeat_interleave(101, 2)
    call("ffs_cross_attention", None, C.byref(args), *workspace("ffs_cross_attention_workspace", C.byref(args)))

    def reference(dtype):
        return cross_attention(q.to(dtype).transpose(1, 2), k.to(dtype), v.to(dtype), visible, scale=0.125, backend="torch").transpose(1, 2)

    assert_no_worse(out, reference(torch.float16), reference(torch.float64))


TABLE, TABLE_OF_CODES = table(), made(torch.tensor(BITSANDBYTES))
torch.manual_seed(0)
for case in [
    lambda: linear(3, 192, 512, 8, True),
    lambda: linear(16, 80, 128, 0, False),
    lambda: linear(40, 208, 192, 20, True),
    lambda: linear(70, 192, 128, 0, False),
    lambda: patches(False),
    lambda: patches(True),
    lambda: attention(3, 1, 700, "lengths"),
    lambda: attention(2, 40, 200, "lengths"),
    lambda: attention(2, 40, 303, "intervals"),
    lambda: attention(1, 40, 707, "tiles"),
    lambda: attention(2, 40, 202, "tiles"),
]:
    before = used
    case()
    arena[before:] = 0xFF
    used = before
print("ok")
