"""What changes from call to call under torch.compile, and makes no graph of its own: the number of tokens, LoRA's scaling."""

import pytest
import torch
from numerics import assert_rounding_apart
from qlora import HOSTS, lora
from weights import quantize, random_weight

import fastfuse
from fastfuse.modules.peft import LoRALinear
from fastfuse.ops import nf4_lora_linear
from fastfuse.quant import NF4View


def counted(function, backend, dynamic):
    torch.compiler.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=counter), counter


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)])
def test_the_op(dynamic, graphs, backend):
    """dynamic=None: the first change of each makes PyTorch's second graph, none after it does."""
    weight = NF4View.of(quantize(random_weight(64, 128), "nested"))
    a, b = torch.randn(8, 128, requires_grad=True), torch.randn(64, 8, requires_grad=True)

    def function(x, scaling):
        return nf4_lora_linear(x, weight, a, b, scaling)

    compiled, counter = counted(function, backend, dynamic)
    for i in range(10):
        x = torch.randn(5 + 3 * i, 128, requires_grad=True)
        results = [[y := f(x, 0.5 + i), *torch.autograd.grad(y.square().sum(), [x, a, b])] for f in (compiled, function)]
        for got, want in zip(*results, strict=True):
            assert_rounding_apart(got, want, K=128, products=4)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("dynamic, graphs", [(True, 1), (None, 2)])
@pytest.mark.parametrize("host", [*HOSTS, "fastfuse"])
def test_layers(host, dynamic, graphs):
    if host == "fastfuse":
        layer = LoRALinear(128, 256, rank=8, alpha=8.0, quantize_base=True)
        torch.nn.init.normal_(layer.lora_b.weight)
    else:
        model = lora(host)
        fastfuse.patch(model)
        layer = model.base_model.model.up
    compiled, counter = counted(layer, "aot_eager", dynamic)
    for i in range(10):
        if host == "fastfuse":
            layer.alpha = 8.0 + i
        else:
            layer.scale_layer(1.25)
        x = torch.randn(5 + i, 128)
        torch.testing.assert_close(compiled(x), layer(x))
    assert counter.frame_count == graphs
