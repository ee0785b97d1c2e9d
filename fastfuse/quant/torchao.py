"""torchao's NF4 weights, from wherever the installed torchao keeps them. Not imported by `import fastfuse`: torchao takes seconds."""

import math

from fastfuse.errors import InvalidArgument

try:
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import NF4Tensor as NF4Tensor
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import linear_nf4 as linear_nf4
    from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4 as _to_nf4
except ModuleNotFoundError:  # torchao 0.17 and before
    from torchao.dtypes.nf4tensor import NF4Tensor as NF4Tensor
    from torchao.dtypes.nf4tensor import linear_nf4 as linear_nf4
    from torchao.dtypes.nf4tensor import to_nf4 as _to_nf4


def to_nf4(weight, **sizes) -> NF4Tensor:
    """weight [N, K] in NF4. sizes: block_size and scaler_block_size as torchao's to_nf4 takes them, its defaults (64, 256) where None.

    Raises InvalidArgument (a ValueError and an AssertionError) where the sizes do not divide the weight, TypeError for another keyword.
    """
    sizes = {name: size for name, size in sizes.items() if size is not None}
    _check_sizes(tuple(weight.shape), sizes.get("block_size", 64), sizes.get("scaler_block_size", 256))
    return _to_nf4(weight, **sizes)


def _check_sizes(shape: tuple[int, ...], block_size: int, scaler_block_size: int) -> None:
    """torchao keeps a scale for every block_size elements and a factor for every scaler_block_size scales, with nothing left over."""
    n = math.prod(shape)
    if n % 2:
        raise InvalidArgument(f"to_nf4: a weight of shape {shape} has {n} elements, an odd number: NF4 keeps two in a byte")
    if not _divides(block_size, n):
        size = next((size for size in (64, 32) if n % size == 0), None)
        if size is None:
            fits = "no size that the kernels cover (32, 64, 128, ...) does"
        elif _divides(scaler_block_size, n // size):
            fits = f"block_size={size} would do"
        else:
            fits = f"block_size={size} with scaler_block_size={_largest(n // size)} would do"
        raise InvalidArgument(f"to_nf4: block_size {block_size} does not divide the {n} elements of a weight of shape {shape}: {fits}")
    blocks = n // block_size
    if not _divides(scaler_block_size, blocks):
        raise InvalidArgument(
            f"to_nf4: a weight of shape {shape} has {blocks} scale blocks of {block_size}, which scaler_block_size {scaler_block_size} does not divide: "
            f"scaler_block_size={_largest(blocks)} would do"
        )


def _divides(size: int, n: int) -> bool:
    return size >= 1 and n % size == 0


def _largest(blocks: int) -> int:
    """The largest scaler_block_size up to 256 that divides so many scale blocks."""
    return max(size for size in range(1, 257) if blocks % size == 0)
