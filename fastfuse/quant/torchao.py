"""torchao's NF4 weights, from wherever the installed torchao keeps them. Not imported by `import fastfuse`: torchao takes seconds."""

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

    Raises torchao's AssertionError where the sizes do not divide the weight, TypeError for another keyword.
    """
    return _to_nf4(weight, **{name: size for name, size in sizes.items() if size is not None})
