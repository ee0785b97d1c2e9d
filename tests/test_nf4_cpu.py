"""The CPU's way of decoding some rows at a time: equal to the bit to decoding all at once, wherever the chunks end."""

import pytest
import torch
from numerics import assert_no_worse

from cases.weights import STORAGES, quantize, random_weight
from fastfuse.ops import _cpu_library, _nf4_cpu, nf4_dequantize_ref
from fastfuse.quant import NF4View

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("library", [True, False])
@pytest.mark.parametrize("storage, block_size", [*((s, 64) for s in STORAGES), ("nested", 32), ("nested", 256), ("flat", 4096)])
def test_chunks_equal_the_whole(storage, block_size, library, monkeypatch):
    """Blocks within rows, and such that reach over several (256 and 4096 against K = 192)."""
    if not library:
        monkeypatch.setattr(_cpu_library, "library", lambda: None)
    for w_dtype in DTYPES:
        view = NF4View.of(quantize(random_weight(133, 192, w_dtype), storage, block_size))
        for dtype in DTYPES if storage == "torchao" else [w_dtype]:
            whole = nf4_dequantize_ref(view, dtype).float()
            for chunk in (1, 64 * 40, 1 << 20):
                monkeypatch.setattr(_nf4_cpu, "CHUNK", chunk)
                got = [(row, w.clone()) for row, w in _nf4_cpu.decoded_rows(view, dtype)]
                assert [row for row, _ in got] == [sum(len(w) for _, w in got[:i]) for i in range(len(got))]
                assert torch.equal(torch.cat([w for _, w in got]), whole), (w_dtype, dtype, chunk)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_over_several_chunks(dtype, monkeypatch):
    monkeypatch.setattr(_nf4_cpu, "CHUNK", 192 * 16)
    monkeypatch.setattr(_cpu_library, "library", lambda: None)
    view = NF4View.of(quantize(random_weight(100, 192, dtype), "nested"))
    w, exact = nf4_dequantize_ref(view, dtype), nf4_dequantize_ref(view, dtype).double()
    x, dy, bias = (torch.randn(*shape, dtype=dtype) for shape in ((7, 192), (7, 100), (100,)))
    assert_no_worse(_nf4_cpu.linear(x, view, bias), torch.nn.functional.linear(x, w, bias), x.double() @ exact.T + bias)
    assert_no_worse(_nf4_cpu.linear_dx(dy, view), dy @ w, dy.double() @ exact)
