"""LoRALinear and the adapter utilities, against float64, and against values that torchtune 0.6.1 gave for the same seeds."""

import contextlib
import copy
import io
import threading

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from torch import nn
from torch.nn import functional as F

import fastfuse
from fastfuse.errors import InvalidArgument, Unsupported
from fastfuse.modules.peft import (
    AdapterModule,
    DoRALinear,
    LoRALinear,
    disable_adapter,
    get_adapter_params,
    get_adapter_state_dict,
    get_lora_module_names,
    get_merged_lora_ckpt,
    lora,
    set_trainable_params,
    validate_missing_and_unexpected_for_lora,
)
from fastfuse.ops import nf4_dequantize_ref
from fastfuse.ops.low_rank import keep_mask
from fastfuse.quant import NF4View

# name -> (N, K, arguments): 200 is what QLoRA of the vision encoder uses, whose block counts 256 does not divide.
BASES = {
    "dense": (96, 64, {}),
    "nf4": (256, 64, {"quantize_base": True}),
    "nf4 by 200": (200, 128, {"quantize_base": True, "scaler_block_size": 200}),
}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def layer(base="nf4", dtype=torch.float32, cls=LoRALinear, rank=8, **kwargs):
    """A layer whose adapter does something: B is zero after construction."""
    N, K, quantization = BASES[base]
    with default_dtype(dtype):
        m = cls(K, N, rank, 16.0, **{**quantization, **kwargs})
    with torch.no_grad():
        m.lora_b.weight.normal_(std=0.3)
        if cls is DoRALinear:
            m.initialize_dora_magnitude()
            m.magnitude.mul_(torch.linspace(0.5, 1.5, N))
    return m


def is_nf4(m):
    return type(m.weight).__name__ == "NF4Tensor"


def leaves_of(m, x):
    """What has a gradient: x, A, B, the bias, the magnitude, and a dense weight."""
    named = {"x": x} | {n: p for n, p in m.named_parameters() if n != "weight" or not is_nf4(m)}
    return {n: t for n, t in named.items() if t.requires_grad}


def eager(m, t, scaling, x):
    """torchtune's formula with its roundings, in the dtype of the tensors t."""
    y = F.linear(x, t["weight"], t.get("bias"))
    return y + scaling * F.linear(F.linear(x, t["lora_a.weight"]), t["lora_b.weight"])


def check_against_float64(m, x, formula=eager):
    """y and every gradient no worse than eager PyTorch's, against the formula in float64."""
    scaling = 16.0 / m.lora_a.weight.shape[0]
    x = x.detach().requires_grad_()
    results = []
    for dtype in (None, x.dtype, torch.float64):
        if dtype is None:
            y, leaves = m(x), leaves_of(m, x)
        else:
            t = {n: p.detach().to(dtype) for n, p in m.named_parameters() if n != "weight"}
            t["weight"] = nf4_dequantize_ref(NF4View.of(m.weight), dtype) if is_nf4(m) else m.weight.detach().to(dtype)
            t["x"] = x.detach().to(dtype)
            leaves = {n: t[n].requires_grad_() for n in leaves_of(m, x)}
            y = formula(m, t, scaling, t["x"])
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
        results.append({"y": y} | dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True)))
    for name in results[0]:
        assert_no_worse(*(r[name] for r in results), name)


# (arguments) -> (the next random number, A[0, :2], y[1, ::100], sum of y), seed 7: the layer below in torchtune 0.6.1
QUANTIZED = {"use_bias": True, "quantize_base": True, "block_size": 32, "scaler_block_size": 64}
TORCHTUNE = [
    ({}, 0.400817, [0.038981, 0.114064], [2.824215, 0.348011, -1.431585], 0.711),
    ({"use_bias": True}, 0.015317, [-0.024796, -0.045756], [-3.031559, -1.001164, 1.927453], -3.741),
    ({"quantize_base": True}, 0.400817, [0.038981, 0.114064], [2.840127, 0.298567, -1.443123], 0.579),
    (QUANTIZED, 0.015317, [-0.024796, -0.045756], [-3.030026, -1.034371, 1.916358], -4.198),
    ({"dropout": 0.25}, 0.400817, [0.038981, 0.114064], [2.824215, 0.348011, -1.431585], 0.711),
]


@pytest.mark.parametrize("kwargs, after, a, y, total", TORCHTUNE)
def test_torchtunes_values(kwargs, after, a, y, total):
    torch.manual_seed(7)
    m = LoRALinear(64, 256, 4, 16.0, **kwargs).eval()
    assert torch.rand(1).item() == pytest.approx(after, abs=1e-6)
    with torch.no_grad():
        m.lora_b.weight.copy_(torch.linspace(-1, 1, 1024).view(256, 4))
    got = m(torch.linspace(-1, 1, 128).view(2, 64))
    torch.testing.assert_close(m.lora_a.weight[0, :2], torch.tensor(a), atol=1e-6, rtol=0)
    torch.testing.assert_close(got[1, ::100], torch.tensor(y), atol=2e-6, rtol=0)
    assert got.sum().item() == pytest.approx(total, abs=2e-3)


def test_torchtunes_dropout_mask():
    torch.manual_seed(7)
    m = LoRALinear(64, 256, 4, 16.0, dropout=0.25)
    with torch.no_grad():
        m.lora_b.weight.copy_(torch.linspace(-1, 1, 1024).view(256, 4))
    torch.manual_seed(8)
    got = m(torch.linspace(-1, 1, 128).view(2, 64))
    torch.testing.assert_close(got[1, ::100], torch.tensor([3.849131, 0.567495, -2.017534]), atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("use_bias", [False, True])
@pytest.mark.parametrize("base", BASES)
def test_forward_and_gradients(base, use_bias, dtype):
    m = layer(base, dtype, use_bias=use_bias)
    check_against_float64(m, torch.randn(7, m.in_dim, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("base", ["nf4", "nf4 by 200"])
def test_kernels(base, dtype, kernels, device):
    m = layer(base, dtype, use_bias=True).to(device)
    check_against_float64(m, torch.randn(5, m.in_dim, dtype=dtype, device=device))


def test_dense_base_is_torchtunes_formula_to_the_bit():
    m = layer("dense", torch.bfloat16, use_bias=True)
    x = torch.randn(7, 64, dtype=torch.bfloat16)
    assert torch.equal(m(x), eager(m, dict(m.named_parameters()), 2.0, x))


@pytest.mark.parametrize("base", BASES)
def test_layouts_of_x(base):
    m = layer(base)
    K = m.in_dim
    x = torch.randn(6, K)
    cases = {
        "strided": torch.randn(6, 2 * K)[:, ::2],
        "row stride": torch.randn(6, 2, K)[:, 0],
        "leading dims": torch.randn(2, 3, K),
        "transposed": torch.randn(3, 2, K).transpose(0, 1),
        "expanded": x[:1].expand(6, K),
        "one row": x[0],
    }
    for name, case in cases.items():
        want = m(case.contiguous().view(-1, K)).view(*case.shape[:-1], -1)
        assert_rounding_apart(m(case), want, K, products=2)
        assert m(case).shape == (*case.shape[:-1], m.out_dim), name
    for shape in ((0, K), (2, 0, K)):
        empty = torch.empty(shape, requires_grad=True)
        y = m(empty)
        y.sum().backward()
        assert y.shape == (*shape[:-1], m.out_dim) and empty.grad.shape == shape and not m.lora_b.weight.grad.any()
        m.zero_grad()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_nf4_weight_gets_no_gradient(dtype):
    m = layer("nf4", dtype)
    assert m.weight.requires_grad
    m(torch.randn(3, 64, dtype=dtype)).sum().backward()
    assert m.weight.grad is None and m.lora_a.weight.grad.any() and m.lora_b.weight.grad.any()
    dense = layer("dense", dtype, use_bias=True)
    dense(torch.randn(3, 64, dtype=dtype)).sum().backward()
    assert dense.weight.grad.any() and dense.bias.grad.eq(3).all()


@pytest.mark.parametrize("use_bias", [False, True])
def test_bias_of_another_dtype_promotes(use_bias):
    """As torchtune: x W^T is bf16, adding an fp32 bias makes it fp32."""
    m = layer("nf4", torch.bfloat16, use_bias=use_bias)
    x = torch.randn(5, 64, dtype=torch.bfloat16)
    want = m(x)
    if use_bias:
        m.bias = nn.Parameter(m.bias.detach().float())
    got = m(x)
    assert got.dtype == (torch.float32 if use_bias else torch.bfloat16)
    assert_rounding_apart(got.bfloat16(), want, K=64, products=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(m(x.float()), got)


def test_random_base_not_quantized_twice():
    """quantize_base changes the storage, not the numbers: the dense layer of the same seed is within half a code of it."""
    torch.manual_seed(3)
    dense = LoRALinear(64, 256, 4, 16.0)
    torch.manual_seed(3)
    nf4 = LoRALinear(64, 256, 4, 16.0, quantize_base=True)
    assert torch.equal(dense.lora_a.weight, nf4.lora_a.weight)
    blocks = dense.weight.view(-1, 64)
    apart = (nf4.weight.get_original_weight().view(-1, 64) - blocks).abs().amax(1)
    assert (apart <= 0.2 * blocks.abs().amax(1)).all() and apart.max() > 0


# Dropout


def passing_through(base, p):
    """y = 1 / 1 * dropout(x): W = 0, A = B = I."""
    m = LoRALinear(64, 64, 64, 64.0, dropout=p, quantize_base=base == "nf4", **({"scaler_block_size": 64} if base == "nf4" else {}))
    with torch.no_grad():
        m.weight.copy_(torch.zeros(64, 64))
        m.lora_a.weight.copy_(torch.eye(64))
        m.lora_b.weight.copy_(torch.eye(64))
    return m


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_dropout_drops_elements_of_x_and_scales_the_rest(base):
    m = passing_through(base, 0.3)
    x = torch.rand(400, 64) + 0.5
    y = m(x)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / 0.7)
    n = x.numel()
    assert abs(kept.sum().item() - 0.7 * n) < 5 * (0.3 * 0.7 * n) ** 0.5
    assert not torch.equal(kept, m(x) != 0), "a new mask at every call"
    x.requires_grad_()
    y = m(x)
    (dx,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(dx, (y != 0) / 0.7)


@pytest.mark.parametrize("base", BASES)
def test_dropout_is_off_in_eval(base):
    m = layer(base, dropout=0.5).eval()
    twin = layer(base)
    twin.load_state_dict(m.state_dict())
    x = torch.randn(5, m.in_dim)
    state = torch.get_rng_state()
    assert torch.equal(m(x), twin(x)) and torch.equal(state, torch.get_rng_state())


def test_dropout_over_nf4_gradients():
    """The mask drawn in the forward is the mask of the gradients."""
    m = layer("nf4", dropout=0.4)
    x = torch.randn(9, 64, requires_grad=True)
    torch.manual_seed(5)
    y = m(x)
    torch.manual_seed(5)
    mask = keep_mask(torch.randint(2**62, (1,))[0], 0.4, 9, 64) / 0.6
    w = m.weight.get_original_weight()
    leaves = [x, m.lora_a.weight, m.lora_b.weight]
    want = F.linear(x, w) + 2.0 * F.linear(F.linear(x * mask, m.lora_a.weight), m.lora_b.weight)
    assert_rounding_apart(y, want, K=64, products=3)
    dy = torch.randn_like(y)
    for got, expected in zip(torch.autograd.grad(y, leaves, dy), torch.autograd.grad(want, leaves, dy), strict=True):
        assert_rounding_apart(got, expected, K=64, products=3)


# Which path runs


@pytest.fixture
def fused(monkeypatch):
    """The list of fused calls."""
    calls = []
    real = lora.nf4_lora_linear
    monkeypatch.setattr(lora, "nf4_lora_linear", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def test_fused_where_it_may_be(fused):
    x = torch.randn(2, 64)
    layer("nf4")(x)
    layer("nf4", dropout=0.5).eval()(x)
    zero = layer("nf4", dropout=0.5)
    zero.dropout.p = 0.0
    zero(x)
    layer("nf4", dropout=0.5)(x)
    assert len(fused) == 4
    layer("dense")(x)
    off = layer("nf4")
    off.disabled = True
    off(x)
    assert len(fused) == 4


def watched(kind):
    """A layer with something in its adapter that only calling it reaches, and what that does to x A^T."""
    m = layer("nf4")
    if kind == "forward hook":
        m.lora_a.register_forward_hook(lambda module, args, out: 3 * out)
    elif kind == "forward pre-hook":
        m.lora_a.register_forward_pre_hook(lambda module, args: (3 * args[0],))
    elif kind == "hook on lora_b":
        m.lora_b.register_forward_hook(lambda module, args, out: 3 * out)
    elif kind == "hook on dropout":
        m.dropout.register_forward_hook(lambda module, args, out: 3 * out)
    elif kind == "other module":
        m.lora_a = Tripled(m.lora_a)
    elif kind == "own forward":
        m.lora_a.forward = lambda x: 3 * F.linear(x, m.lora_a.weight)
    elif kind == "other dropout":
        m.dropout = Tripled(nn.Identity())
    elif kind == "bias":
        m.lora_b = nn.Linear(8, 256).requires_grad_(False)
    elif kind == "parametrization":
        torch.nn.utils.parametrize.register_parametrization(m.lora_a, "weight", Tripled(nn.Identity()))
    return m


class Tripled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 3 * self.inner(x)


KINDS = ["forward hook", "forward pre-hook", "hook on lora_b", "hook on dropout", "other module", "own forward", "other dropout", "parametrization"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_is_called_where_a_call_is_more_than_its_weights(kind, fused):
    m = watched(kind)
    x = torch.randn(4, 64)
    got = m(x)
    m.disabled = True
    base = m(x)
    a = m.lora_a.inner.weight if kind == "other module" else m.lora_a.parametrizations.weight.original if kind == "parametrization" else m.lora_a.weight
    torch.testing.assert_close(got, base + 3 * 2.0 * F.linear(F.linear(x, a), m.lora_b.weight))
    assert fused == []


def test_adapter_with_a_bias_of_its_own_is_called(fused):
    m = watched("bias")
    x = torch.randn(4, 64)
    want = F.linear(x, m.weight.get_original_weight()) + 2.0 * m.lora_b(m.lora_a(x))
    torch.testing.assert_close(m(x), want)
    assert fused == []


def test_backward_hooks_see_the_adapter(fused):
    m, seen = layer("nf4"), []
    m.lora_a.register_full_backward_hook(lambda module, din, dout: seen.append(dout[0]))
    x = torch.randn(4, 64, requires_grad=True)
    m(x).sum().backward()
    torch.testing.assert_close(seen[0], 2.0 * torch.ones(4, 256) @ m.lora_b.weight)
    assert fused == []


def test_global_hooks_see_the_adapter():
    m, seen = layer("nf4"), []
    with torch.nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(module)):
        m(torch.randn(4, 64))
    assert seen == [m.dropout, m.lora_a, m.lora_b, m]


def test_hooks_on_parameters_run_on_the_fused_path(fused):
    """An optimizer in the backward hangs on every parameter: its gradients arrive either way, so fusing may stay."""
    m, seen = layer("nf4"), {}
    for name, p in m.named_parameters():
        p.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    m.lora_a.weight.register_hook(lambda g: 2 * g)
    x = torch.randn(4, 64)
    m(x).sum().backward()
    assert fused == [1] and set(seen) == {"lora_a.weight", "lora_b.weight"}
    torch.testing.assert_close(seen["lora_a.weight"], 2 * 2.0 * (torch.ones(4, 256) @ m.lora_b.weight).T @ x)


def test_unsupported_is_not_silent():
    m = layer("nf4")
    with pytest.raises(Unsupported, match=r"x is torch\.float64"):
        m(torch.randn(2, 64, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"x has shape \(2, 63\), weight takes 64 features"):
        m(torch.randn(2, 63))


def test_dense_weight_in_a_quantized_layer():
    """load_state_dict(assign=True) puts a dense tensor where the NF4 one was: then it is a dense layer, as in torchtune."""
    m = layer("nf4", use_bias=True)
    w = m.weight.get_original_weight()
    m.load_state_dict(m.state_dict() | {"weight": w}, assign=True)
    assert not is_nf4(m)
    x = torch.randn(3, 64)
    torch.testing.assert_close(m(x), F.linear(x, w, m.bias) + 2.0 * F.linear(F.linear(x, m.lora_a.weight), m.lora_b.weight))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_sharded_weights_run_torchs_and_torchaos_own_ops(base):
    from torch import distributed
    from torch.distributed.tensor import DTensor, Replicate, init_device_mesh

    m = layer(base)
    x = torch.randn(3, 64)
    want = m(x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for module in (m, m.lora_a, m.lora_b):
            module.weight = nn.Parameter(DTensor.from_local(module.weight.detach(), mesh, [Replicate()], run_check=False))
        got = m(DTensor.from_local(x, mesh, [Replicate()])).to_local()
        if base == "dense":
            got.sum().backward()
            assert m.weight.grad is not None
    finally:
        distributed.destroy_process_group()
    assert_rounding_apart(got, want, K=64, products=2)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("case", ["dense", "nf4", "nf4 by 200", "nf4 dropout off", "nf4 dropout", "nf4 hook"])
def test_compile_fullgraph(case, backend):
    torch._dynamo.reset()
    base = case if case in BASES else "nf4"
    m = layer(base, use_bias=True, dropout=0.5 if "dropout" in case else 0.0)
    if case == "nf4 dropout off":
        m.eval()
    elif case == "nf4 hook":
        m.lora_a.register_forward_hook(lambda module, args, out: 3 * out)
    x = torch.randn(5, m.in_dim, requires_grad=True)
    leaves = leaves_of(m, x)
    dy = torch.randn(5, m.out_dim)
    compiled = torch.compile(m, fullgraph=True, backend=backend)
    if case == "nf4 dropout" and backend == "inductor":  # draws other random numbers than eager does, by design
        m.disabled = True
        base_y = m(x)
        m.disabled = False
        y = compiled(x)
        (db,) = torch.autograd.grad(y, m.lora_b.weight, dy)
        assert not torch.allclose(y, base_y) and db.any()
        return
    torch.manual_seed(2)
    want = m(x)
    want_grads = torch.autograd.grad(want, list(leaves.values()), dy)
    torch.manual_seed(2)
    y = compiled(x)
    torch.testing.assert_close(y, want)
    y.backward(dy)
    for (name, leaf), grad in zip(leaves.items(), want_grads, strict=True):
        torch.testing.assert_close(leaf.grad, grad, msg=lambda s, name=name: f"{name}: {s}")
    assert m.weight.grad is None or not is_nf4(m)


# State


@pytest.mark.parametrize("use_bias", [False, True])
def test_state_dict_keys(use_bias):
    m = layer("nf4", use_bias=use_bias)
    assert list(m.state_dict()) == ["weight", *["bias"] * use_bias, "lora_a.weight", "lora_b.weight"]
    assert [n for n, _ in m.named_parameters()] == list(m.state_dict())
    assert (m.bias is None) == (not use_bias) and "bias" in m._parameters
    assert m.in_dim == 64 and m.out_dim == 256 and m.rank == 8 and m.alpha == 16.0 and m.use_bias == use_bias
    assert m._quantize_base is True and m.disabled is False and m.merged is False
    assert type(m.dropout) is nn.Identity and type(layer(dropout=0.1).dropout) is nn.Dropout


@pytest.mark.parametrize("base", BASES)
def test_state_dict_round_trip(base):
    m, other = layer(base), layer(base)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    x = torch.randn(3, m.in_dim)
    assert not torch.equal(m(x), other(x))
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(m(x), other(x))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("into", DTYPES, ids=str)
def test_loading_dense_weights_quantizes_with_the_destinations_block_sizes(into, dtype):
    from weights import to_nf4

    m = layer("nf4 by 200", into)
    w = torch.randn(200, 128).to(dtype)
    m.load_state_dict({"weight": w}, strict=False)
    assert m.weight.block_size == 64 and m.weight.scaler_block_size == 200
    assert torch.equal(m.weight.quantized_data, to_nf4(w, 64, 200).quantized_data)
    x = torch.randn(4, 128, dtype=into)
    m.disabled = True
    want = F.linear(x, m.weight.get_original_weight())
    assert_rounding_apart(m(x), want, K=128)


def test_deepcopy():
    """torchao's own clone quantizes anew, with block sizes 64 and 256, or fails where those do not divide the weight."""
    m = layer("nf4 by 200", dropout=0.2, use_bias=True).eval()
    m.weight.requires_grad_(False)
    m.tied = m.weight
    m.lora_a.register_forward_hook(lambda module, args, out: 2 * out)
    twin = copy.deepcopy(m)
    x = torch.randn(3, 128)
    assert torch.equal(m(x), twin(x)) and twin.weight.scaler_block_size == 200
    assert type(twin) is LoRALinear and isinstance(twin.weight, nn.Parameter) and not twin.weight.requires_grad and twin.tied is twin.weight
    assert [n for n, _ in twin.named_parameters()] == [n for n, _ in m.named_parameters()]
    assert torch.equal(m.weight.quantized_data, twin.weight.quantized_data)
    with torch.no_grad():
        twin.lora_b.weight.zero_()
        twin.weight.copy_(torch.zeros(200, 128))
    assert m.lora_b.weight.any() and m.weight.get_original_weight().any()


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("base", BASES)
def test_meta_device_and_to_empty(base, cls):
    N, K, quantization = BASES[base]
    with torch.device("meta"):
        m = cls(K, N, 8, 16.0, use_bias=True, **quantization)
    assert all(p.is_meta for p in m.parameters()) and m(torch.empty(3, K, device="meta")).shape == (3, N)
    assert m.to_empty(device="cpu") is m
    assert {n for n, p in m.named_parameters() if p.is_meta} == {"weight", "bias"}
    m.initialize_parameters()
    assert m.lora_a.weight.isfinite().all() and m.lora_a.weight.abs().max() <= K**-0.5 and not m.lora_b.weight.any()


def test_none_is_the_default_block_size():
    torch.manual_seed(1)
    m = LoRALinear(64, 256, 4, 16.0, quantize_base=True, block_size=None, scaler_block_size=None)
    torch.manual_seed(1)
    want = LoRALinear(64, 256, 4, 16.0, quantize_base=True)
    assert m.weight.block_size == 64 and m.weight.scaler_block_size == 256
    assert torch.equal(m.weight.quantized_data, want.weight.quantized_data)
    assert type(LoRALinear(64, 64, 4, 16.0, scaler_block_size=None).weight) is nn.Parameter


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize(
    "args, kwargs, error, message",
    [
        ((64, 64, 4), {"block_size": 8}, ValueError, r"^``quantize_base`` is False, but received the following quantization arguments: {'block_size': 8}$"),
        (
            (64, 64, 4),
            {"quantize_base": True},
            InvalidArgument,
            r"^to_nf4: a weight of shape \(64, 64\) has 64 scale blocks of 64, which scaler_block_size 256 does not divide: scaler_block_size=64 would do$",
        ),
        ((64, 256, 4), {"quantize_base": True, "foo": 1}, TypeError, "foo"),
        ((64, 64, 4), {"dropout": 1.5}, ValueError, "dropout is 1.5, expected 0 to 1"),
        ((64, 64, 0), {}, InvalidArgument, "RALinear: rank is 0, expected at least 1"),
    ],
)
def test_refusals(cls, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        cls(*args, 16.0, **kwargs)


# Adapter utilities


class Block(nn.Module):
    def __init__(self, cls=LoRALinear, **kwargs):
        super().__init__()
        self.q_proj = cls(32, 32, 4, 8.0, **kwargs)
        self.k_proj = nn.Linear(32, 32)
        self.output = cls(32, 16, 4, 8.0, **kwargs)
        for m in (self.q_proj, self.output):
            nn.init.normal_(m.lora_b.weight)
            if cls is DoRALinear:
                m.initialize_dora_magnitude()
                nn.init.uniform_(m.magnitude, 0.5, 1.5)

    def forward(self, x):
        return self.output(self.q_proj(x) + self.k_proj(x))


ADAPTER = ["q_proj.lora_a.weight", "q_proj.lora_b.weight", "output.lora_a.weight", "output.lora_b.weight"]


def test_get_adapter_params():
    model = Block()
    found = get_adapter_params(model)
    assert list(found) == ADAPTER and all(found[n] is p for n, p in model.named_parameters() if n in found)
    assert list(get_adapter_params(model.q_proj)) == ["lora_a.weight", "lora_b.weight"]
    assert get_adapter_params(nn.Linear(2, 2)) == {}
    first = model.q_proj.adapter_params()
    first.clear()
    assert model.q_proj.adapter_params() == ["lora_a.weight", "lora_b.weight"]
    assert isinstance(model.q_proj, AdapterModule) and not isinstance(model.k_proj, AdapterModule)


def test_get_adapter_params_of_a_name_that_is_not_there():
    model = Block()
    model.k_proj.adapter_params = lambda: ["weight", "nothing"]
    with pytest.raises(AssertionError, match=r"Adapter params \['nothing'\] not converted: k_proj has no"):
        get_adapter_params(model)
    root = LoRALinear(4, 4, 2, 1.0)
    root.adapter_params = lambda: ["x"]
    with pytest.raises(InvalidArgument, match="the model has no"):
        get_adapter_params(root)


@pytest.mark.parametrize("kind", [dict, set])
def test_set_trainable_params(kind):
    model = Block(use_bias=True)
    found = get_adapter_params(model)
    set_trainable_params(model, kind(found))
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(ADAPTER)
    set_trainable_params(model, {"k_proj.bias"})
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["k_proj.bias"]


def test_set_trainable_params_freezes_nf4():
    m = layer("nf4")
    set_trainable_params(m, get_adapter_params(m))
    assert not m.weight.requires_grad and is_nf4(m)
    check_against_float64(m, torch.randn(3, 64))


def test_get_adapter_state_dict():
    state = Block(DoRALinear).state_dict()
    got = get_adapter_state_dict(state)
    assert set(got) == {k for k in state if "lora" in k or "magnitude" in k} and len(got) == 6
    assert all(torch.equal(v, state[k]) for k, v in got.items())
    assert all(v.is_meta for v in get_adapter_state_dict(state, device="meta").values())


def test_get_lora_module_names():
    attn = ["q_proj", "v_proj"]
    assert get_lora_module_names(attn, False, False) == ["q_proj", "v_proj"]
    assert get_lora_module_names(attn, True, False) == ["q_proj", "v_proj", "w1", "w2", "w3"]
    assert get_lora_module_names(attn, False, True) == ["q_proj", "v_proj", "output"]
    assert get_lora_module_names(attn, True, True) == ["q_proj", "v_proj", "w1", "w2", "w3", "output"]
    assert attn == ["q_proj", "v_proj"], "the caller's list stays as it is"


class Plain(nn.Module):
    def __init__(self, bias=False):
        super().__init__()
        self.q_proj = nn.Linear(32, 32, bias=bias)
        self.k_proj = nn.Linear(32, 32)
        self.output = nn.Linear(32, 16, bias=bias)

    forward = Block.forward


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_merged_equals_unmerged(cls):
    model, plain = Block(cls), Plain()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    merged = get_merged_lora_ckpt(state, 4, 8.0)
    assert merged is state
    plain.load_state_dict(merged)
    x = torch.randn(5, 32)
    torch.testing.assert_close(plain(x), model(x))


def test_merging_lora_is_in_place_and_keeps_dtypes():
    weight, bias = torch.randn(16, 8).bfloat16(), torch.randn(16)
    a, b = torch.randn(2, 8), torch.randn(16, 2)
    before = weight.clone()
    merged = get_merged_lora_ckpt({"m.weight": weight, "m.bias": bias, "m.lora_a.weight": a, "m.lora_b.weight": b}, 2, 3.0)
    assert list(merged) == ["m.weight", "m.bias"] and merged["m.weight"] is weight and merged["m.bias"] is bias
    assert torch.equal(weight, (before.float() + 1.5 * b @ a).bfloat16())


def test_merging_dora_makes_a_tensor_in_the_adapters_dtype():
    weight, a, b, magnitude = torch.randn(16, 8).bfloat16(), torch.randn(2, 8), torch.randn(16, 2), torch.rand(16)
    before = weight.clone()
    merged = get_merged_lora_ckpt({"m.weight": weight, "m.lora_a.weight": a, "m.lora_b.weight": b, "m.magnitude": magnitude}, 2, 3.0)["m.weight"]
    assert torch.equal(weight, before) and merged.dtype == torch.float32
    exact = before.double() + 1.5 * b.double() @ a.double()
    exact *= (magnitude.double() / exact.norm(dim=1))[:, None]
    torch.testing.assert_close(merged, exact.float())


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
def test_merging_a_layer_that_is_the_root(cls):
    m = layer("dense", cls=cls)
    merged = get_merged_lora_ckpt({k: v.clone() for k, v in m.state_dict().items()}, 8, 16.0)
    assert list(merged) == ["weight"]
    x = torch.randn(3, 64)
    torch.testing.assert_close(F.linear(x, merged["weight"]), m(x))


def test_merging_into_nf4_is_refused_before_anything_changes():
    model = nn.Sequential(layer("dense"), layer("nf4"))
    state = model.state_dict()
    before = {k: v if "1." in k else v.clone() for k, v in state.items()}
    with pytest.raises(NotImplementedError, match=r"1\.weight is an NF4Tensor.*\.to\(torch\.bfloat16\)"):
        get_merged_lora_ckpt(state, 8, 16.0)
    assert list(state) == list(before) and torch.equal(state["0.weight"], before["0.weight"])
    state["1.weight"] = state["1.weight"].to(torch.float32)
    merged = get_merged_lora_ckpt(state, 8, 16.0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(F.linear(x, merged["1.weight"]), model[1](x))


def test_merging_dora_over_nf4_gives_a_dense_weight():
    m = layer("nf4", cls=DoRALinear)
    merged = get_merged_lora_ckpt(m.state_dict(), 8, 16.0)
    x = torch.randn(3, 64)
    torch.testing.assert_close(F.linear(x, merged["weight"]), m(x))


@pytest.mark.parametrize(
    "drop, add, message",
    [
        ("m.lora_b.weight", None, "m.lora_a.weight is there without m.lora_b.weight"),
        ("m.weight", None, "is there without m.weight"),
        (None, "m.lora_gate_a", "m.lora_gate_a is no part of a LoRA or DoRA linear layer"),
    ],
)
def test_merging_a_torn_state_dict(drop, add, message):
    state = {"m.weight": torch.ones(4, 4), "m.lora_a.weight": torch.ones(2, 4), "m.lora_b.weight": torch.ones(4, 2)}
    state.pop(drop, None)
    if add:
        state[add] = torch.ones(1)
    before = dict(state)
    with pytest.raises(KeyError, match=message):
        get_merged_lora_ckpt(state, 2, 1.0)
    assert state == before
    with pytest.raises(ValueError, match="rank is 0"):
        get_merged_lora_ckpt(state, 0, 1.0)


def test_merging_with_barriers(monkeypatch):
    count = []
    monkeypatch.setattr(torch.distributed, "barrier", lambda: count.append(threading.get_ident()))
    state = Block().state_dict()
    get_merged_lora_ckpt(state, 4, 8.0, use_distributed_barriers=True)
    assert len(count) == 3 and "q_proj.lora_a.weight" not in state


@pytest.mark.parametrize("cls", [LoRALinear, DoRALinear])
@pytest.mark.parametrize("base", BASES)
def test_disabled_is_the_base(base, cls):
    m = layer(base, cls=cls, use_bias=True, dropout=0.5)
    w = m.weight.get_original_weight() if is_nf4(m) else m.weight
    x = torch.randn(4, m.in_dim)
    with disable_adapter(m):
        assert m.disabled is True
        torch.testing.assert_close(m(x), F.linear(x, w, m.bias))
    assert m.disabled is False


def test_disable_adapter_puts_back_what_was():
    model = Block()
    model.output.disabled = True
    with pytest.raises(RuntimeError, match="inside"), disable_adapter(model):
        assert model.q_proj.disabled and model.output.disabled and not hasattr(model.k_proj, "disabled")
        with disable_adapter(model):
            pass
        assert model.q_proj.disabled, "the inner block must not switch the adapter on"
        raise RuntimeError("inside")
    assert model.q_proj.disabled is False and model.output.disabled is True


KEYS = ["q_proj.weight", "k_proj.weight", "q_proj.lora_a.weight", "q_proj.lora_b.weight", "q_proj.magnitude"]
BASE, ADAPTED = KEYS[:2], KEYS[2:]


@pytest.mark.parametrize("how", ["keys", "builder arguments"])
@pytest.mark.parametrize(
    "reported, message",
    [
        ({"base_missing": ADAPTED, "lora_missing": BASE}, None),
        ({}, None),
        ({"base_missing": [*ADAPTED, "k_proj.weight"], "lora_missing": BASE}, "Missing non-LoRA key k_proj.weight from base model dict"),
        ({"lora_missing": [*BASE, "q_proj.lora_b.weight"]}, "Missing LoRA key q_proj.lora_b.weight from adapter state dict"),
        ({"lora_missing": ["q_proj.magnitude"]}, "Missing LoRA key q_proj.magnitude"),
        ({"base_missing": ["q_proj.weight"], "lora_missing": ["q_proj.weight"]}, "Missing non-LoRA key q_proj.weight"),
        ({"base_unexpected": ["extra"]}, "Unexpected key loading base model: extra"),
        ({"lora_unexpected": ["extra"]}, "Unexpected key loading adapter: extra"),
    ],
)
def test_validate(how, reported, message):
    def call():
        if how == "keys":
            validate_missing_and_unexpected_for_lora(state_dict_keys=KEYS, **reported)
        else:
            with pytest.warns(FutureWarning, match="(lora_attn_modules|apply_lora_to_mlp|apply_lora_to_output) is deprecated"):
                validate_missing_and_unexpected_for_lora(["q_proj"], False, False, **reported)

    if message is None:
        call()
    else:
        for kind in (RuntimeError, AssertionError):  # torchtune's last source, and its last release
            with pytest.raises(kind, match=message):
                call()


def test_validate_names_every_key_and_what_is_unknown():
    with pytest.raises(RuntimeError) as e:
        validate_missing_and_unexpected_for_lora(state_dict_keys=KEYS, base_missing=BASE, lora_missing=ADAPTED)
    assert str(e.value).startswith("Missing keys when validating state dict: \n- ") and all(k in str(e.value) for k in KEYS)
    with pytest.raises(RuntimeError, match="Unexpected key found missing: other"):
        validate_missing_and_unexpected_for_lora(state_dict_keys=KEYS, base_missing=["other"], lora_missing=["other"])
    with pytest.raises(AssertionError, match="state_dict_keys is None, and so is apply_lora_to_mlp, apply_lora_to_output"), pytest.warns(FutureWarning):
        validate_missing_and_unexpected_for_lora(["q_proj"])


def test_import_fastfuse_leaves_torchao_alone():
    import subprocess
    import sys

    code = "import sys, fastfuse, fastfuse.modules.peft, fastfuse.modules.low_precision; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=fastfuse.__path__[0] + "/..").returncode == 0


def test_merging_with_another_rank_is_refused_before_anything_changes():
    layer = LoRALinear(8, 6, rank=4, alpha=8.0)
    state = {f"layer.{k}": v.clone() for k, v in layer.state_dict().items()}
    before = {k: v.clone() for k, v in state.items()}
    with pytest.raises(ValueError, match=r"rank is 2, layer\.lora_a\.weight has rank 4"):
        get_merged_lora_ckpt(state, rank=2, alpha=8.0)
    assert state.keys() == before.keys() and all(torch.equal(state[k], before[k]) for k in before)


@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_dropout_is_a_probability(kind):
    with pytest.raises(ValueError, match=r"dropout is -1\.0, expected 0 to 1"):
        kind(8, 6, rank=2, alpha=4.0, dropout=-1.0)


def test_a_forgotten_magnitude_shows():
    assert DoRALinear(8, 6, rank=2, alpha=4.0)(torch.randn(1, 8)).isnan().all()
