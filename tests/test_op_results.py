"""A frozen NF4 weight beside the backward: it passes through no hook of saved tensors, and may not change. What the caller may do with results: test_ops.py."""

import pytest
import torch

from cases.weights import STORAGES, quantize, random_weight
from fastfuse.ops import nf4_linear, nf4_lora_linear
from fastfuse.quant import NF4View


@pytest.mark.parametrize("storage", STORAGES)
def test_hooks_of_saved_tensors_see_activations_and_no_frozen_weight(storage):
    """Activation offloading would carry the whole 4-bit base to the host and back."""
    weight, x = NF4View.of(quantize(random_weight(512, 256), storage)), torch.randn(7, 256, requires_grad=True)
    a, b = torch.randn(8, 256, requires_grad=True), torch.randn(512, 8, requires_grad=True)
    want = torch.autograd.grad(nf4_lora_linear(x, weight, a, b, 2.0).sum(), [x, a, b])
    seen = []

    def pack(t):
        seen.append(t.numel() * t.element_size())
        return t.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = nf4_lora_linear(x, weight, a, b, 2.0)
    assert sum(seen) == 4 * (x.numel() + a.numel() + b.numel() + 7 * 8)  # the last one x A^T
    assert all(torch.equal(g, w) for g, w in zip(torch.autograd.grad(y.sum(), [x, a, b]), want, strict=True))


def test_a_frozen_weight_changed_before_the_backward_is_an_error():
    weight, x = NF4View.of(quantize(random_weight(64, 128), "nested")), torch.randn(7, 128, requires_grad=True)
    y = nf4_linear(x, weight)
    weight.packed.zero_()
    with pytest.raises(RuntimeError, match="nf4_linear: a frozen weight was changed in place"):
        y.sum().backward()
