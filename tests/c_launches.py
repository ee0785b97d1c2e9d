"""The C library's launches, run: recorded by the driver that launches nothing, then interpreted on a CPU. Run by test_c_library.py.

    TRITON_INTERPRET=1 python -m tests.c_launches BUILD

An interpreted launch gets its arguments from the recorded bytes alone, so that a pointer, size or grid that C has wrong makes wrong numbers. The
interpreter's bf16 is no bf16: the library thinks that it is, and both sides keep fp16, which is as wide.
"""

import ctypes as C
import re
import sys
from dataclasses import replace
from pathlib import Path

BUILD = Path(sys.argv[1])
fake_library = C.CDLL(str(BUILD / "c/tests/libcuda.so.1"))  # before anything else could load the real one
library = C.CDLL(str(BUILD / "libfastfuse.so"))
library.ffs_last_error.restype = C.c_char_p
sys.path.insert(0, str(Path(__file__).parents[1] / "c"))

import torch  # noqa: E402
from torch.nn import functional  # noqa: E402
from variants import variants  # noqa: E402

from cases.linear import F16, layer  # noqa: E402
from cases.linear import linear as formula  # noqa: E402
from cases.patch_embed import make as make_patches  # noqa: E402
from fastfuse.kernels.nf4 import BITSANDBYTES  # noqa: E402
from fastfuse.ops import EncoderMask, Projection, cross_attention, nf4_dequantize  # noqa: E402
from tests.numerics import assert_no_worse  # noqa: E402

BF16, P, I64 = 1, C.c_void_p, C.c_int64
TYPES = {"bf16": F16, "fp32": torch.float32, "u8": torch.uint8, "i8": torch.int8, "i1": torch.bool, "i32": torch.int32, "i64": torch.int64}


class Launch(C.Structure):
    _fields_ = [("image", P), ("entry", C.c_char * 96), ("grid", C.c_uint * 3), ("block", C.c_uint * 3), ("shared", C.c_uint), ("stream", P),
                ("allowed_shared", C.c_int), ("count", C.c_int), ("size", C.c_uint * 64), ("value", C.c_ubyte * 8 * 64)]  # fmt: skip


class State(C.Structure):
    _fields_ = [(name, C.c_int) for name in ("ordinal", "major", "minor", "processors", "next_error", "loads", "launches")] + [("launch", Launch * 64)]


def struct(name):
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


def made(t):
    """t in the arena."""
    global used
    place = arena[used : used + t.numel() * t.element_size()].view(t.dtype).view(t.shape)
    used += -(-t.numel() * t.element_size() // 256) * 256
    return place.copy_(t)


def nan(*shape, dtype=F16):
    return made(torch.full(shape, float("nan"), dtype=dtype))


def memory(n):
    return P(made(torch.full((n,), 0xFF, dtype=torch.uint8)).data_ptr() if n else None), C.c_size_t(n)


def table():
    """(cubin, variant), numbered as c/compile.py numbers them."""
    found = {}
    for v in variants(90, ["bf16"], True):
        found.setdefault(repr((v.kernel.__name__, v.signature, sorted(v.constants.items()), sorted(v.options.items()))), v)
    return [((BUILD / f"kernels/{i}.cubin").read_bytes(), v) for i, v in enumerate(found.values())]


def argument(leaf, values):
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


def call(function, *args):
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


def workspace(function, *args):
    n = C.c_size_t()
    if getattr(library, function)(*args, C.byref(n)):
        raise SystemExit(library.ffs_last_error().decode())
    return memory(n.value)


def pointer(t):
    return P(None if t is None else t.data_ptr())


def half(*shape, size=1.0):
    return made(torch.randn(shape).mul(size).half())


def linear(M, N, K, R, biased):
    p = layer(N, K, R, dtype=F16, bias=biased)
    view = replace(p.weight, packed=made(p.weight.packed), code=TABLE_OF_CODES, scales=tuple(map(made, p.weight.scales)))
    x, out, (a, b, bias) = half(M, K + 16), nan(M, N), (t if t is None else made(t.detach()) for t in (p.lora_a, p.lora_b, p.bias))
    weight = Weight(N, K, *(t.data_ptr() for t in (view.packed, *view.scales)))
    lora = C.byref(Lora(R, p.scaling, BF16, a.data_ptr(), b.data_ptr())) if R else None
    given = workspace("ffs_nf4_linear_workspace", BF16, I64(M), C.byref(weight), lora)
    call("ffs_nf4_linear", None, BF16, I64(M), pointer(x), I64(K + 16), C.byref(weight), lora, pointer(bias), pointer(out), *given)

    def reference(dtype):
        low, high, added = (t if t is None else t.to(dtype) for t in (a, b, bias))
        return formula(x[:, :K].to(dtype), Projection(view, low, high, p.scaling, added), lambda x: x)

    assert_no_worse(out, reference(F16), reference(torch.float64))
    decoded = nan(N, K)
    call("ffs_nf4_dequantize", None, BF16, C.byref(weight), pointer(decoded))
    assert torch.equal(decoded, nf4_dequantize(view, F16))


def patches(normed):
    D, H, W = 48, 28, 42
    options = {"ratios": ((2, 2), (1, 2)), "grid": (2, 3), "patch": (14, 14), "D": D, "norm": normed, "pad_tokens_to": 8}
    taken = make_patches("cpu", dtype=F16, **options).only().mapped(made)
    t = {name: None if t is None else t.data_ptr() for name, t in taken.tensors.items()}
    rows, out, fits = made(functional.pad(taken.tensors["weight"].flatten(1), (0, 640 - 588))), nan(2, 4, 8, D), made(torch.tensor([7], dtype=torch.uint8))
    args = Patches(
        dtype=BF16, image_dtype=BF16, images=2, tiles=4, height=H, width=W, patch=14, D=D, pixels=t["images"], stride_tile=3 * H * W,
        stride_channel=H * W, stride_line=W, weight=rows.data_ptr(), cls=t["cls"], local_pos=t["local_pos"], global_pos=t["global_pos"],
        pre_pos=t["pre_pos"], gate=t["gate"], pre_gate=t["pre_gate"], aspect_ratio=t["aspect_ratio"], entries=4, side=4, fits=fits.data_ptr(),
        norm_weight=t["norm_weight"], norm_bias=t["norm_bias"], eps=1e-5, pad_tokens_to=8, out=out.data_ptr(),
    )  # fmt: skip
    call("ffs_patch_embed", None, C.byref(args), *workspace("ffs_patch_embed_workspace", C.byref(args)))
    assert fits.item() == 1
    assert_no_worse(out, taken.by_formula()[0], taken.double().by_formula()[0])


def attention(b, s, s_e, kind):
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

    assert_no_worse(out, reference(F16), reference(torch.float64))


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
