"""What a step of each kernel's main loop does, from what the kernel is compiled with: bytes, products and what they are counted by."""

import math
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

from bench.sass import Work

SIZE = {"bf16": 2, "fp16": 2, "fp32": 4, "i32": 4, "u8": 1, "i1": 1, "i8": 1}
# What a product of 16-bit operands is worth on the matrix unit; of fp32 ones it is three of tf32, each at half the rate.
PRODUCT = {"bf16": 1, "fp16": 1, "fp32": 6}
# Bytes of a weight by how many tensors its scales are. The scales of scales, 0.05% of that, are left out.
PACKED = {1: 0.5 + 4 / 64, 3: 0.5 + 1 / 64, 4: 0.5 + 1 / 64}
TUNED = {
    "nf4_linear_fwd": "nf4_linear", "nf4_skinny": "nf4_linear", "nf4_skinny_reduce": "nf4_linear", "nf4_linear_dx": "nf4_linear_dx",
    "nf4_row_norms": "lora_row_norms", "patch_embed_fwd": "patch_embed", "cross_attention_fwd": "cross_attention",
} | {op: op for op in ("lora_down", "lora_up", "lora_grad", "cross_attention_dq", "cross_attention_dkdv")}  # fmt: skip
"""Kernel -> the op whose rows say what tile it is compiled with."""


class Compiled(SimpleNamespace):
    """A kernel's arguments as the compiler is given them: c.BLOCK_M is a constant, c.dtype("x_ptr") what a pointer or a descriptor points at, "" of None."""

    def __init__(self, types: Mapping[str, Any], constants: Mapping[str, Any]):
        super().__init__(**constants)
        self.types, self.constants = types, constants

    def dtype(self, name: str) -> str:
        of = self.types[name]
        return "" if of == "constexpr" else of.removeprefix("tensordesc<").lstrip("*").split("[")[0]

    def size(self, *names: str) -> int:
        return sum(SIZE[self.dtype(name)] for name in names if self.dtype(name))

    def scales(self) -> int:
        return len((self.types["weight"] if "weight" in self.types else self.types["group"][0].weight).scales)


WorkOf = Callable[[Compiled], Work]


def work_of(kernel: str, c: Compiled) -> Work:
    """Of a kernel without a row in _WORK: a program."""
    return _WORK[kernel](c) if kernel in _WORK else Work("program", 1, loops=())


def _decoding(c: Compiled) -> Work:
    weights = c.BLOCK_N * c.BLOCK_K
    return Work("weight", weights, weights * c.constants.get("BLOCK_M", 0), weights * PACKED[c.scales()], decodes=True)


def _dequantize(c: Compiled) -> Work:
    weights = c.BLOCKS * c.BLOCK_SIZE
    return Work("weight", weights, bytes=weights * (PACKED[c.scales()] + c.size("out_ptr")), loops=())


def _low_rank(activation: str, lora: str, loops: tuple[str, ...] = ("loop",)) -> WorkOf:
    def work(c):
        elements = c.BLOCK_M * c.constants.get("BLOCK_K", c.constants.get("BLOCK_C"))
        results = sum(c.types.get(name, "constexpr") != "constexpr" for name in ("outer_ptr", "d_xa_ptr")) or 1
        products = elements * c.constants.get("BLOCK_R", 16) * PRODUCT[c.dtype(lora)] * results  # up: as of rank 16
        return Work("element", elements, products, elements * c.size(activation), loops)

    return work


def _patch_embed(c: Compiled) -> Work:
    products = math.prod((c.BLOCK_M, c.BLOCK_N, c.BLOCK_K))
    # Where the loop over K is one with that over tiles, a step holds what comes after a tile: no step's floor.
    return Work("1024 products", products / 1024, 0 if c.FLATTEN else products * PRODUCT[c.dtype("w_ptr")])


def _attention(products: int, column: str, loops: tuple[str, ...] = ("full", "masked")) -> WorkOf:
    def work(c):
        scores, dtype = c.BLOCK_M * c.BLOCK_N, c.dtype(column)
        # Few rows have one block of them, and a head's keys and values one reader.
        unshared = 2 * c.BLOCK_N * c.D * SIZE[dtype] if products == 2 and c.BLOCK_M == 16 and dtype != "fp32" else 0
        return Work("score", scores, scores * c.D * products * PRODUCT[dtype], unshared, loops)

    return work


def _moved(unit: str, count: Callable[[Compiled], int], *pointers: str, also: float = 0, loops: tuple[str, ...] = ("loop",)) -> WorkOf:
    """Elements that are read or written through each of the pointers; also: bytes of each besides."""

    def work(c):
        n = count(c)
        return Work(unit, n, bytes=n * (c.size(*pointers) + also), loops=loops)

    return work


def _width(c: Compiled) -> int:
    """Features of a token: blocks are the next power of two."""
    return min(c.BLOCK_N, 1280)


_WORK: dict[str, WorkOf] = {
    "nf4_dequantize": _dequantize,
    "nf4_linear_fwd": _decoding,
    "nf4_skinny": _decoding,
    "nf4_skinny_reduce": _moved("element", lambda c: c.BLOCK_M * c.BLOCK_N, loops=()),
    "nf4_linear_dx": _decoding,
    "nf4_row_norms": _decoding,
    "lora_down": _low_rank("x_ptr", "a_ptr"),
    "lora_up": _low_rank("out_ptr", "xa_ptr", ()),
    "lora_grad": _low_rank("activation_ptr", "xa_ptr"),
    "swiglu_fwd": _moved("element", lambda c: c.BLOCK, "e_ptr", "g_ptr", "h_ptr", loops=()),
    "swiglu_bwd": _moved("element", lambda c: c.BLOCK, "dh_ptr", "e_ptr", "g_ptr", "de_ptr", "dg_ptr", loops=()),
    "patch_embed_fwd": _patch_embed,
    "patchify": _moved("element", lambda c: c.BLOCK_M * c.BLOCK_K, "images_ptr", "a_ptr", loops=()),
    "place": _moved("element", lambda c: c.BLOCK_M * _width(c), "x_ptr", "y_ptr", "kept_ptr", loops=()),
    "norm_bwd": _moved("element", _width, "dy_ptr", "x_ptr", "dx_ptr"),
    "place_bwd": _moved("element", lambda c: c.BLOCK_T * c.BLOCK_N),
    "tile_rows": _moved("tile", lambda c: c.BLOCK),
    "cross_attention_fwd": _attention(2, "k"),
    "cross_attention_dq": _attention(3, "k"),
    "cross_attention_dkdv": _attention(4, "q", ("loop",)),
    "cross_attention_merge": _moved("element", lambda c: c.BLOCK_M * c.D, "parts_ptr"),
    "cross_attention_delta": _moved("element", lambda c: c.BLOCK_M * c.D, "o_ptr", "do_ptr", loops=()),
    "pack_mask": _moved("flag", lambda c: c.BLOCK_S * c.BLOCK_W * 32, also=9 / 8),
    "pack_tiles": _moved("word", lambda c: c.BLOCK_S * c.BLOCK_W),
    "block_states": _moved("row's block", lambda c: c.BLOCK_S * c.BLOCK_K),
    "block_list": _moved("block", lambda c: c.BLOCK),
    "kv_cache_write": _moved("element", lambda c: 2 * c.BLOCK_N * c.D, "k_ptr", "k_cache_ptr", loops=()),
}
