"""FrozenNF4Linear and the hooks that save NF4 weights as numbers."""

import copy
import re
import tempfile

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from reference import DTYPES
from test_peft import check_against_float64
from torch import nn
from torch.nn import functional as F

import fastfuse
from cases.weights import NF4Tensor, to_nf4
from fastfuse.errors import Unsupported
from fastfuse.modules.low_precision import (
    FrozenNF4Linear,
    _register_reparametrize_state_dict_hooks,
    _state_dict_hooks,
    reparametrize_as_dtype_state_dict_post_hook,
)

SIZES = {"256": (64, 256, {}), "200": (128, 200, {"scaler_block_size": 200}), "32, 64": (64, 64, {"block_size": 32, "scaler_block_size": 64})}


@pytest.mark.parametrize("bias, after, y", [(False, 0.270849, [0.210781, -0.268746, 0.051598]), (True, 0.717028, [0.153494, -0.366691, 0.114608])])
def test_torchtunes_values(bias, after, y):
    torch.manual_seed(7)
    m = FrozenNF4Linear(64, 256, bias=bias)
    assert torch.rand(1).item() == pytest.approx(after, abs=1e-6)
    torch.testing.assert_close(m(torch.linspace(-1, 1, 128).view(2, 64))[1, ::100], torch.tensor(y), atol=2e-6, rtol=0)


UNFIT = [  # shape (N, K), sizes, message: blocks of block_size, and the largest scaler_block_size up to 256 that divides them
    ((64, 64), {}, "has 64 scale blocks of 64, which scaler_block_size 256 does not divide: scaler_block_size=64 would do"),
    # SigLIP's MLP
    ((4304, 1152), {}, "has 77472 scale blocks of 64, which scaler_block_size 256 does not divide: scaler_block_size=144 would do"),
    ((64, 256), {"scaler_block_size": 200}, "has 256 scale blocks of 64, which scaler_block_size 200 does not divide: scaler_block_size=256 would do"),
    ((64, 256), {"scaler_block_size": 0}, "has 256 scale blocks of 64, which scaler_block_size 0 does not divide: scaler_block_size=256 would do"),
    ((100, 100), {}, "64 does not divide the 10000 elements of a weight of shape (100, 100): no size that the kernels cover (32, 64, 128, ...) does"),
    ((36, 8), {}, "64 does not divide the 288 elements of a weight of shape (36, 8): block_size=32 with scaler_block_size=9 would do"),
    ((36, 8), {"scaler_block_size": 3}, "block_size 64 does not divide the 288 elements of a weight of shape (36, 8): block_size=32 would do"),
    ((64, 256), {"block_size": 0}, "block_size 0 does not divide the 16384 elements of a weight of shape (64, 256): block_size=64 would do"),
    ((64, 256), {"block_size": 0, "scaler_block_size": 0}, "weight of shape (64, 256): block_size=64 with scaler_block_size=256 would do"),
    ((3, 5), {"block_size": 5}, "a weight of shape (3, 5) has 15 elements, an odd number: NF4 keeps two in a byte"),
]


@pytest.mark.parametrize("shape, sizes, message", UNFIT)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_sizes_that_do_not_divide_the_weight(shape, sizes, message, device):
    """What the message says would do, does."""
    N, K = shape
    with torch.device(device), pytest.raises(AssertionError) as error:  # what torchao raises
        FrozenNF4Linear(K, N, **sizes)
    assert isinstance(error.value, ValueError)
    assert message in str(error.value) and str(shape) in str(error.value) and "\n" not in str(error.value)
    if device == "cpu" and (fits := re.findall(r"(\w*block_size)=(\d+)", message)):
        m, x = FrozenNF4Linear(K, N, **sizes | {name: int(size) for name, size in fits}), torch.randn(2, K)
        assert_rounding_apart(m(x), F.linear(x, m.weight.get_original_weight()), K)


@pytest.mark.parametrize(
    "sizes, dtype, backend", [(name, dtype, ("auto", "triton")[(i + j) % 2]) for i, name in enumerate(SIZES) for j, dtype in enumerate(DTYPES)]
)
def test_values_and_input_gradient(sizes, dtype, backend, device):
    K, N, kwargs = SIZES[sizes]
    m = FrozenNF4Linear(K, N, bias=backend == "triton" or dtype == DTYPES[0], device=device, dtype=dtype, **kwargs)
    with fastfuse.backend(backend):
        check_against_float64(m, torch.randn(7, K, dtype=dtype, device=device))


@pytest.fixture
def m():
    """A layer whose output features are told apart by their bias."""
    m = FrozenNF4Linear(64, 256, bias=True)
    with torch.no_grad():
        m.bias.copy_(torch.arange(256.0))
    return m


def test_output_dtype_is_promotion(m):
    fp32, bf16, plain = torch.float32, torch.bfloat16, FrozenNF4Linear(64, 256)
    x, low = torch.randn(3, 64, dtype=bf16, requires_grad=True), FrozenNF4Linear(64, 256, bias=True, dtype=bf16)
    y = m(x)
    eager, exact = (x.to(dtype) @ m.weight.to(bf16).to(dtype).T + m.bias for dtype in (bf16, torch.float64))
    assert_no_worse(y, eager, exact)
    y.sum().backward()
    assert [t.dtype for t in (y, x.grad, plain(x), low(x), low(x.float()))] == [fp32, bf16, bf16, bf16, fp32]
    with torch.autocast("cpu", bf16):
        assert m(x.float()).dtype == fp32 and plain(x.float()).dtype == bf16


def test_every_output_feature_is_its_own_and_nothing_is_trainable(m):
    """Not shifted: feature n is row n of the weight, for one-hot inputs that read single elements, and gets bias n."""
    plain = FrozenNF4Linear(64, 256)
    w = plain.weight.get_original_weight()
    assert torch.equal(plain(torch.eye(64)), w.T) and not torch.equal(w[:-1], w[1:])
    assert torch.equal(m(torch.zeros(2, 64)), torch.arange(256.0).expand(2, 256))
    for layer, names in ((m, ["weight", "bias"]), (plain, ["weight"])):
        assert [n for n, _ in layer.named_parameters()] == names == list(layer.state_dict())
        assert not any(p.requires_grad for p in layer.parameters()) and not layer(torch.randn(2, 64)).requires_grad
    assert plain.bias is None and isinstance(m.weight, NF4Tensor) and isinstance(m.weight, nn.Parameter) and isinstance(m, nn.Linear)


def test_none_is_the_default_block_size_and_refusals(m):
    default = FrozenNF4Linear(64, 256, block_size=None, scaler_block_size=None).weight
    assert (default.block_size, default.scaler_block_size) == (64, 256)
    with pytest.raises(TypeError, match="foo"):
        FrozenNF4Linear(64, 256, foo=1)
    with pytest.raises(Unsupported, match=r"x is torch\.float64"):
        m(torch.randn(2, 64, dtype=torch.float64))


@pytest.mark.parametrize("sizes", SIZES)
def test_state_dict_round_trips(sizes):
    K, N, kwargs = SIZES[sizes]
    m, other = (FrozenNF4Linear(K, N, bias=True, **kwargs) for _ in range(2))
    x, dense = torch.randn(3, K), torch.randn(N, K)
    other.load_state_dict(m.state_dict())
    for twin in (other, copy.deepcopy(m)):
        assert torch.equal(twin(x), m(x)) and torch.equal(twin.weight.quantized_data, m.weight.quantized_data)
        assert twin.weight.scaler_block_size == m.weight.scaler_block_size
    other.load_state_dict({"weight": dense, "bias": m.bias})
    want = to_nf4(dense, m.weight.block_size, m.weight.scaler_block_size)
    assert isinstance(other.weight, NF4Tensor) and torch.equal(other.weight.quantized_data, want.quantized_data)
    assert_rounding_apart(other(x), F.linear(x, want.get_original_weight(), m.bias), K)


def test_compile_fullgraph(m):
    torch._dynamo.reset()
    x, dy = torch.randn(5, 64, requires_grad=True), torch.randn(5, 256)
    y = torch.compile(m, fullgraph=True)(x)
    torch.testing.assert_close(y, m(x))
    torch.testing.assert_close(torch.autograd.grad(y, x, dy)[0], dy @ m.weight.get_original_weight())


class Model(nn.Module):
    def __init__(self, dtype=torch.bfloat16):
        super().__init__()
        self.frozen = FrozenNF4Linear(64, 256, bias=True, dtype=dtype)
        self.norm = nn.LayerNorm(64)
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("step", torch.tensor(3))


@pytest.mark.parametrize("low_ram", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hook_saves_numbers(dtype, low_ram, monkeypatch):
    """The model itself keeps its NF4 weight."""
    monkeypatch.setattr(_state_dict_hooks, "_use_low_cpu_ram", low_ram)
    model, other = Model(dtype), Model(dtype)
    plain = model.state_dict()
    _register_reparametrize_state_dict_hooks(model, dtype=dtype)
    state = model.state_dict()
    assert list(state) == list(plain)
    for name, value in state.items():
        want = plain[name].get_original_weight() if name == "frozen.weight" else plain[name]
        assert not isinstance(value, NF4Tensor) and value.dtype == want.dtype and torch.equal(value, want) and value.device.type == "cpu", name
    other.load_state_dict(state)
    assert isinstance(model.frozen.weight, NF4Tensor) and torch.equal(other.frozen.weight.quantized_data, model.frozen.weight.quantized_data)


def test_hook_edits_in_place_and_leaves_other_values():
    model, hook = Model(), reparametrize_as_dtype_state_dict_post_hook
    state = model.state_dict() | {"extra": "text"}
    norm = state["norm.weight"]
    assert hook(model, state, "prefix", dtype=torch.float32, offload_to_cpu=False, other=1) is None
    assert state["norm.weight"] is norm and state["extra"] == "text"
    for dtype, kwargs in ((torch.bfloat16, {}), (torch.float32, {"dtype": torch.float32}), (torch.float64, {"dtype": torch.float64})):
        state = model.state_dict()
        hook(model, state, **kwargs)
        assert state["frozen.weight"].dtype == dtype and torch.equal(state["frozen.weight"], model.frozen.weight.to(dtype))


def test_low_ram_hook_maps_files_that_have_no_name(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model, hook = Model(), _state_dict_hooks._low_ram_reparametrize_as_dtype_state_dict_post_hook
    state, kept = model.state_dict() | {"extra": "text"}, model.state_dict()
    hook(model, state)
    assert state["extra"] == "text" and state["norm.weight"].is_shared() and list(tmp_path.iterdir()) == []
    weight = kept["norm.weight"]
    hook(model, kept, offload_to_cpu=False)
    assert kept["norm.weight"] is weight and torch.equal(kept["frozen.weight"], model.frozen.weight.get_original_weight())


def test_low_ram_hook_is_refused_on_windows(monkeypatch):
    monkeypatch.setattr(_state_dict_hooks, "_use_low_cpu_ram", True)
    monkeypatch.setattr(_state_dict_hooks.sys, "platform", "win32")
    with pytest.raises(RuntimeError, match="Windows"):
        _register_reparametrize_state_dict_hooks(nn.Linear(2, 2))
