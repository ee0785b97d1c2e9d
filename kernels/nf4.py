"""NF4 decoding shared by the kernels: codebooks, block scales, and two ways from 4-bit codes to numbers.

A packed byte holds two codes, the even element in the high nibble. Two decode branches:
    "gather"  portable: look-up with tl.gather in the weight's own table, the scale multiplied in fp32. Runs in the interpreter.
    "prmt"    NVIDIA: one inline-asm block turns 4 bytes into 8 numbers with byte permutes, the table a constant of the code.

How a block scale is stored is told by the class of `scales`, FlatScales, NestedScales or TorchaoScales of arguments.py; inside a kernel by its length.
"""

import triton
import triton.language as tl


# What a kernel's compilation calls is a constexpr_function down to the last table: its source is then part of the compile cache's key. A constexpr of
# the module would be too, but Triton compares each of those at every launch, in about 11 Python calls.
@triton.constexpr_function
def codebook(torchao: bool) -> tuple[float, ...]:
    """The host library's 16 values. bitsandbytes keeps them in fp32; torchao writes them with four decimals and rounds them to the weight's dtype.

    In bf16 the two differ in code 6, so they are never interchangeable.
    """
    if torchao:
        return (
            -1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0,
            0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626, 0.723, 1.0,
        )  # fmt: skip
    return (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
        -0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0,
        0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
        0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    )  # fmt: skip


BITSANDBYTES, TORCHAO = codebook(False), codebook(True)


@triton.constexpr_function
def bits(value: float, dtype: str) -> int:
    """The bit pattern of value rounded to nearest even in dtype "fp32", "fp16" or "bf16"."""
    import struct  # here: of a module's globals, a function that kernels call may use no function but another of its kind

    if dtype == "fp16":
        return struct.unpack("<H", struct.pack("<e", value))[0]
    fp32 = struct.unpack("<I", struct.pack("<f", value))[0]
    return fp32 if dtype == "fp32" else (fp32 + 0x7FFF + (fp32 >> 16 & 1)) >> 16


@triton.constexpr_function
def codebook_values(torchao: bool, dtype: str) -> list[float]:
    """The 16 values the host library multiplies by: torchao's are rounded to the weight's dtype first."""
    import struct

    if not torchao:
        return list(codebook(False))
    shift, fmt = {"fp32": (0, "<f"), "fp16": (0, "<e"), "bf16": (16, "<f")}[dtype]
    width = "<H" if dtype == "fp16" else "<I"
    return [struct.unpack(fmt, struct.pack(width, bits(v, dtype) << shift))[0] for v in codebook(True)]


@triton.constexpr_function
def _byte_words(patterns: list[int], byte: int) -> list[str]:
    """Byte `byte` of 16 patterns as four 32-bit literals, entry 0 lowest."""
    words = [sum((patterns[4 * g + i] >> 8 * byte & 255) << 8 * i for i in range(4)) for g in range(4)]
    return [f"0x{word:08X}" for word in words]


@triton.constexpr_function
def _look_up(dst: str, words: list[str], select: str, merge: str) -> str:
    """dst = four bytes out of a 16-byte table: each half by the low three bits of a code, then the half by its top bit."""
    return f"prmt.b32 a, {words[0]}, {words[1]}, {select};\nprmt.b32 b, {words[2]}, {words[3]}, {select};\nprmt.b32 {dst}, a, b, {merge};\n"


@triton.constexpr_function
def scaled_asm(torchao: bool, w_dtype, out_dtype) -> str:
    """$0..$3 = eight scaled weights as pairs of out_dtype; $4 = four packed bytes, $5..$8 = the scale twice, per byte.

    torchao's weight rounds to its own dtype, so a constant table serves it only where that is the result's dtype. And only for bf16: a bf16 checkpoint
    loaded into an fp16 or fp32 weight leaves a bf16 table there, up to 2^-9 off, which a constant could not know of.
    The 16-bit table is split into a low-byte and a high-byte table; the multiplication stays packed. Multiplying the
    unpacked tensor instead makes the compiler swap halves, 30 to 40 more permutes per 32 weights. A product with a bf16
    table and a bf16 scale has 2.4e-3 relative error in y = x W^T where rounding the exact weight has 1.6e-3.
    """
    w_dtype, out_dtype = str(w_dtype), str(out_dtype)
    patterns = [bits(v, out_dtype) for v in codebook_values(torchao, w_dtype)]
    low, high = _byte_words(patterns, 0), _byte_words(patterns, 1)
    kind = {"bf16": "bf16x2", "fp16": "f16x2"}[out_dtype]
    asm = (
        "{\n.reg .b32 s0, s1, m0, m1, a, b, lo, hi, o, nz;\n"
        "mov.b32 nz, 0x80008000;\n"  # -0.0 twice: sm_80 has a packed fma but no packed multiply for bf16
        "and.b32 s0, $4, 0x77777777;\n"
        "shr.b32 m0, $4, 1;\n"
        "lop3.b32 m0, m0, 0x44444444, 0x32103210, 0xEA;\n"
        "shr.b32 s1, s0, 16;\n"
        "shr.b32 m1, m0, 16;\n"
    )
    for i in range(2):
        asm += _look_up("lo", low, f"s{i}", f"m{i}") + _look_up("hi", high, f"s{i}", f"m{i}")
        for j, pair in enumerate(("0x4051", "0x6273")):  # the high nibble's value lands in the low half
            asm += f"prmt.b32 o, lo, hi, {pair};\nfma.rn.{kind} ${2 * i + j}, o, ${5 + 2 * i + j}, nz;\n"
    return asm + "}\n"


@triton.constexpr_function
def exact_asm(torchao: bool, w_dtype, out_dtype) -> str:
    """As scaled_asm, from a fp32 table in four byte planes and a fp32 scale: round(code * scale), as the host library."""
    w_dtype, out_dtype = str(w_dtype), str(out_dtype)
    patterns = [bits(v, "fp32") for v in codebook_values(torchao, w_dtype)]
    planes = [_byte_words(patterns, p) for p in range(4)]
    kind = {"bf16": "bf16x2", "fp16": "f16x2"}[out_dtype]
    asm = "{\n.reg .b32 t, s, m, a, b, p0, p1, p2, p3, x0, x1, y0, y1, w0, w1, w2, w3;\n.reg .f32 f0, f1, f2, f3;\n"
    for half in range(2):
        asm += f"shr.b32 t, $4, {16 * half};\nand.b32 s, t, 0x7777;\nshr.b32 m, t, 1;\nlop3.b32 m, m, 0x4444, 0x3210, 0xEA;\n"
        for p in range(4):
            asm += _look_up(f"p{p}", planes[p], "s", "m")
        for i, pair in enumerate(("0x5140", "0x7362")):
            asm += f"prmt.b32 x{i}, p0, p1, {pair};\nprmt.b32 y{i}, p2, p3, {pair};\n"
        for i in range(4):
            asm += f"prmt.b32 w{i}, x{i // 2}, y{i // 2}, {('0x5410', '0x7632')[i % 2]};\n"
            asm += f"mov.b32 f{i}, w{i};\nmul.rn.f32 f{i}, f{i}, ${5 + 2 * half + i // 2};\n"
        for j in range(2):  # cvt packs its first source into the high half; codes come low nibble first
            asm += f"cvt.rn.{kind}.f32 ${2 * half + j}, f{2 * j}, f{2 * j + 1};\n"
    return asm + "}\n"


@triton.constexpr_function
def _log2(power):
    return power.bit_length() - 1


@triton.constexpr_function
def _interpreted():
    return triton.knobs.runtime.interpret


@triton.jit
def round_to(value, DTYPE: tl.constexpr):
    """fp32 value rounded to the nearest DTYPE, kept in fp32. The interpreter's bf16 cast truncates, so it is done there by hand."""
    if DTYPE == tl.float32:
        return value
    elif _interpreted() and DTYPE == tl.bfloat16:
        u = value.to(tl.uint32, bitcast=True)
        u = (u + 0x7FFF + ((u >> 16) & 1)) & 0xFFFF0000
        return u.to(tl.float32, bitcast=True)
    else:
        return value.to(DTYPE).to(tl.float32)


@triton.jit
def block_scale(scales, block, SCALE_BLOCK: tl.constexpr):
    """The fp32 scale of each block index, by the host library's own recipe, each step rounded where it rounds."""
    group = block // SCALE_BLOCK if SCALE_BLOCK & (SCALE_BLOCK - 1) else block >> _log2(SCALE_BLOCK)
    if len(scales) == 1:
        return tl.load(scales.absmax + block)
    elif len(scales) == 4:
        code = tl.load(scales.code + tl.load(scales.index + block).to(tl.int32))
        # The offset is loaded per element: a splat among the decode's inputs keeps the weight out of the
        # matrix unit's register operand (store to shared memory, barrier, load instead).
        return code * tl.load(scales.absmax + group) + tl.load(scales.offset + block * 0)
    else:
        DTYPE: tl.constexpr = scales.factor.dtype.element_ty
        scaler = tl.load(scales.scaler + block).to(tl.float32)
        factor = tl.load(scales.factor + group).to(tl.float32)
        mean = tl.load(scales.mean + block * 0).to(tl.float32)
        return round_to(round_to(tl.div_rn(scaler, factor), DTYPE) + mean, DTYPE)


@triton.jit
def _gather(packed, scale, weight, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """round(code * scale) in fp32, [ROWS, 2 * BYTES], by look-up in the weight's own table."""
    TORCHAO_LAYOUT: tl.constexpr = len(weight.scales) == 3
    W_DTYPE: tl.constexpr = weight.scales.factor.dtype.element_ty if TORCHAO_LAYOUT else tl.float32
    table = tl.load(weight.code + tl.arange(0, 16)).to(tl.float32)
    codes = tl.join((packed >> 4).to(tl.int32), (packed & 15).to(tl.int32)).reshape(ROWS * BYTES * 2)
    w = tl.gather(table, codes, 0).reshape(ROWS, 2 * BYTES) * scale
    return round_to(w, W_DTYPE)


@triton.jit
def _spread(scale, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, GROUPS] -> [ROWS, WIDTH], each entry WIDTH / GROUPS times."""
    return tl.broadcast_to(scale[:, :, None], (ROWS, GROUPS, WIDTH // GROUPS)).reshape(ROWS, WIDTH)


@triton.jit
def _pairs(packed, scale, weight, OUT: tl.constexpr, EXACT: tl.constexpr):
    """Each byte's two scaled weights as OUT in an int32. scale: of each byte, in fp32 where EXACT, else twice in OUT."""
    TORCHAO_LAYOUT: tl.constexpr = len(weight.scales) == 3
    W_DTYPE: tl.constexpr = weight.scales.factor.dtype.element_ty if TORCHAO_LAYOUT else tl.float32
    tl.static_assert(not TORCHAO_LAYOUT or (W_DTYPE == tl.bfloat16 and OUT == tl.bfloat16))
    asm: tl.constexpr = exact_asm(TORCHAO_LAYOUT, W_DTYPE, OUT) if EXACT else scaled_asm(TORCHAO_LAYOUT, W_DTYPE, OUT)
    registers: tl.constexpr = "=r,=r,=r,=r,r,f,f,f,f" if EXACT else "=r,=r,=r,=r,r,r,r,r,r"
    return tl.inline_asm_elementwise(asm, registers, [packed, scale], dtype=tl.int32, is_pure=True, pack=4)


@triton.jit
def decode(packed, scale, weight, OUT: tl.constexpr, DECODE: tl.constexpr, ROWS: tl.constexpr, GROUPS: tl.constexpr, BYTES: tl.constexpr):
    """Scaled weights for a matrix product: packed uint8 [ROWS, BYTES], scale fp32 [ROWS, GROUPS] -> OUT [ROWS, 2 * BYTES]."""
    if DECODE == "prmt":
        half = scale.to(OUT).to(tl.uint16, bitcast=True).to(tl.uint32)
        twice = (half | (half << 16)).to(tl.int32, bitcast=True)
        pairs = _pairs(packed, _spread(twice, ROWS, GROUPS, BYTES), weight, OUT, False)
        even = pairs.to(tl.int16).to(OUT, bitcast=True)
        odd = (pairs >> 16).to(tl.int16).to(OUT, bitcast=True)
        return tl.join(even, odd).reshape(ROWS, 2 * BYTES)
    else:
        return _gather(packed, _spread(scale, ROWS, GROUPS, 2 * BYTES), weight, ROWS, BYTES).to(OUT)


@triton.jit
def nf4_dequantize_kernel(
    weight, out_ptr,
    n_elements,
    BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, BLOCKS: tl.constexpr, DECODE: tl.constexpr, CUT: tl.constexpr,
):  # fmt: skip
    """out[i] = round(codebook[code[i]] * scale[i // BLOCK_SIZE]), equal to the bit to the host library's.

    Program p writes BLOCKS quantization blocks, starting at block p * BLOCKS. CUT: the last program has fewer. Compile without floating-point fusion:
    a contracted multiply-add in the nested scale differs from bitsandbytes by one ulp.
    """
    BYTES: tl.constexpr = BLOCK_SIZE // 2
    OUT: tl.constexpr = out_ptr.dtype.element_ty
    # 64 bits for where the program starts, 32 within it. A block's number fits 32 bits for up to 2^36 weights.
    start = tl.program_id(0).to(tl.int64) * (BLOCKS * BYTES)
    byte = tl.arange(0, BLOCKS)[:, None] * BYTES + tl.arange(0, BYTES)[None, :]
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    if CUT:
        left = (n_elements - 2 * start).to(tl.int32) if n_elements - 2 * start < 2 * BLOCKS * BYTES else 2 * BLOCKS * BYTES
        packed = tl.load(weight.packed + start + byte, mask=byte < (left + 1) // 2, other=0)
        block = tl.minimum(block, ((n_elements - 1) // BLOCK_SIZE).to(tl.int32))
    else:
        packed = tl.load(weight.packed + start + byte)
    scale = block_scale(weight.scales, block, SCALE_BLOCK)[:, None]
    if DECODE == "prmt":
        pairs = _pairs(packed, tl.broadcast_to(scale, (BLOCKS, BYTES)), weight, OUT, True)
        out_ptrs = out_ptr.to(tl.pointer_type(tl.int32), bitcast=True) + start + byte
        tl.store(out_ptrs, pairs, mask=byte < left // 2 if CUT else None)
    else:
        offs = tl.arange(0, BLOCKS)[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
        w = _gather(packed, scale, weight, BLOCKS, BYTES).to(OUT)
        tl.store(out_ptr + 2 * start + offs, w, mask=offs < left if CUT else None)
