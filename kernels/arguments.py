"""What kernels take as tuples, by name: shared with the code that launches them, with bench/ and with c/. Needs neither Triton nor PyTorch.

A field is a tensor or a number, in a compiled kernel a pointer or a scalar, in a signature its type; None is what is absent. Triton finds a
compiled kernel again by the fields' types alone: two classes that agree in them would run each other's kernel, so an argument has one class, or
a constexpr beside it that tells which. Numbers that change from call to call are no fields: do_not_specialize does not reach into a tuple.
"""

from typing import Any, NamedTuple


class FlatScales(NamedTuple):
    """A block's scale as bitsandbytes keeps it."""

    absmax: Any  # fp32 [blocks]


class NestedScales(NamedTuple):
    """bitsandbytes' double quantization: scale = code[index] * absmax + offset, SCALE_BLOCK blocks sharing one absmax."""

    index: Any  # uint8 [blocks]
    code: Any  # fp32 [256]
    absmax: Any  # fp32 [blocks / SCALE_BLOCK]
    offset: Any  # fp32, one number


class TorchaoScales(NamedTuple):
    """torchao's: scale = scaler / factor + mean, each step rounded to the weight's dtype, SCALE_BLOCK blocks sharing one factor."""

    scaler: Any  # int8 [blocks]
    factor: Any  # the weight's dtype, [blocks / SCALE_BLOCK]
    mean: Any  # the weight's dtype, one number


class NF4Weight(NamedTuple):
    packed: Any  # uint8 [N * K / 2], the even element in the high nibble
    code: Any  # [16]; None where the table is a constant of the code
    scales: Any  # FlatScales, NestedScales or TorchaoScales


class Operand(NamedTuple):
    """One linear layer of a group: out = factor * (x W^T + scaling * (x A^T) B^T) + bias. What is None is so in the whole group; R may be 0."""

    weight: NF4Weight
    a: Any  # A [R, K]
    b: Any  # B [N, R]
    factor: Any  # [N]
    bias: Any  # [N]
    out: Any  # [M, N]; for dX the gradient of it
    pre_scale: Any  # [M, N], the value before factor and bias
    N: Any
    R: Any
    scaling: Any


class Strides(NamedTuple):
    """Elements from one batch row, head and token to the next, in a tensor whose last dim is contiguous."""

    batch: Any
    head: Any
    token: Any


class Shape(NamedTuple):
    """What cross-attention's masks are indexed by, put together inside its kernels."""

    s: Any
    s_e: Any
    masks: Any  # b, or 1 that serves all


class ForwardStrides(NamedTuple):
    """Strides of each of cross_attention_fwd_kernel's tensors."""

    q: Any
    k: Any
    v: Any
    o: Any


class DqStrides(NamedTuple):
    """Of cross_attention_dq_kernel's."""

    q: Any
    k: Any
    v: Any
    do: Any
    dq: Any


class DkDvStrides(NamedTuple):
    """Of cross_attention_dkdv_kernel's."""

    q: Any
    k: Any
    v: Any
    do: Any
    dk: Any
    dv: Any


class CacheStrides(NamedTuple):
    """Of kv_cache_write_kernel's k and v; the caches are contiguous."""

    k: Any
    v: Any


class RowSums(NamedTuple):
    """Of each row of q what cross-attention's backward goes by, fp32 [b * key heads, s, GP]."""

    lse: Any  # of the scores' exponentials, base 2
    delta: Any  # sum(o do) less the gradient of lse


class Lengths(NamedTuple):
    """The mask of KIND 0: a batch row sees the first tokens."""

    lengths: Any  # int32 [b]; None: all of s_e


class Mask(NamedTuple):
    """The mask of KIND 1, intervals, and of KIND 2, bits. masks is b, or 1 that serves all."""

    rows: Any  # int32 [masks, s, 2] of lo, hi; or [masks, s, W] of bits, 32 a word
    rows_empty: Any  # bool [masks, s]
    blocks: Any  # int32, the blocks of columns that each block of tokens sees, full ones first; for dK and dV those of tokens that see each of columns
    counts: Any  # int32, of each list: how many are full, how many there are


class Image(NamedTuple):
    """Where the pixels of [tiles, C, H, W] are."""

    stride_tile: Any
    stride_channel: Any
    stride_line: Any
    stride_pixel: Any
    across: Any  # patches in a line of them


class Geometry(NamedTuple):
    """Where patches and CLS stand among the rows of a tile."""

    padded: Any  # rows
    tokens: Any
    patches: Any
    first: Any  # the first patch's token
    cls_at: Any  # CLS's token, -1 without


class Placed(NamedTuple):
    """Everything that is added to a patch embedding's rows."""

    cls: Any = None  # [N]
    bias: Any = None  # [N]
    local_pos: Any = None  # [tokens, N]
    global_pos: Any = None  # [rows, tokens, N]
    pre_pos: Any = None  # [rows, N]
    rows: Any = None  # int32 [tiles], which row of global_pos and pre_pos each tile takes, -1 for none
    factors: Any = None  # fp32 [3]: what local_pos, global_pos and pre_pos are multiplied by
