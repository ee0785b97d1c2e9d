"""LoRALinear and DoRALinear, against float64, and against values that torchtune 0.6.1 gave for the same seeds. DoRA's norms: test_dora.py."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from numerics import assert_rounding_apart
from prepared_layers import HOOKS
from suite import check
from torch import distributed, nn
from torch.distributed.tensor import DTensor, Replicate, init_device_mesh
from torch.nn import functional as F

import fastfuse
from cases import Call
from cases.weights import to_nf4
from fastfuse.errors import InvalidArgument, Unsupported
from fastfuse.modules.peft import DoRALinear, LoRALinear, get_adapter_params, lora
from fastfuse.ops import nf4_dequantize_ref
from fastfuse.quant import NF4View

# name -> (N, K, arguments): 200 is what QLoRA of the vision encoder uses, whose block counts 256 does not divide.
BASES = {
    "dense": (96, 64, {}),
    "nf4": (256, 64, {"quantize_base": True}),
    "nf4 by 200": (200, 128, {"quantize_base": True, "scaler_block_size": 200}),
}
F32, F16, BF16 = DTYPES = [torch.float32, torch.float16, torch.bfloat16]
BOTH = LoRALinear, DoRALinear
both = pytest.mark.parametrize("cls", BOTH)


def layer(base="nf4", dtype=F32, cls=LoRALinear, rank=8, **kwargs):
    """A layer whose adapter does something: B is zero after construction."""
    N, K, quantization = BASES[base]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        m = cls(K, N, rank, 16.0, **{**quantization, **kwargs})
    finally:
        torch.set_default_dtype(before)
    with torch.no_grad():
        m.lora_b.weight.normal_(std=0.3)
        if cls is DoRALinear:
            m.initialize_dora_magnitude()
            m.magnitude.mul_(torch.linspace(0.5, 1.5, N))
    return m


def is_nf4(m):
    return type(m.weight).__name__ == "NF4Tensor"


def tensors_of(m, x, dtype=None):
    """x and the parameters, but for NF4 weights; of a dtype, those too, as the numbers they stand for in it."""
    tensors = {"x": x} | {n: p for n, p in m.named_parameters() if n != "weight" or not is_nf4(m)}
    return tensors | ({"weight": nf4_dequantize_ref(NF4View.of(m.weight), dtype)} if dtype is not None and is_nf4(m) else {})


def leaves_of(m, x):
    return {n: t for n, t in tensors_of(m, x).items() if t.requires_grad}


def eager(t, scaling=2.0):
    """torchtune's formula with its roundings: DoRA's norm gets no gradient, its magnitude scales the bias too."""
    y = F.linear(t["x"], t["weight"], t.get("bias"))
    if "lora_a.weight" not in t:
        return y
    delta = scaling * F.linear(F.linear(t["x"], t["lora_a.weight"]), t["lora_b.weight"])
    if "magnitude" not in t:
        return y + delta
    m = t["magnitude"] / (t["weight"] + scaling * t["lora_b.weight"] @ t["lora_a.weight"]).norm(dim=1).detach()
    return (m - 1) * y + m * delta + y


def check_against_float64(m, x):
    """y and every gradient, by the rule."""
    check(Call(lambda t: m(t["x"]), lambda t: eager(tensors_of(m, t["x"], t["x"].dtype) | t), tensors_of(m, x.detach().requires_grad_())))


# Arguments, the next random number, and for each class y[1, ::100] and the sum of y, seed 7: the layer below in torchtune 0.6.1.
# None is the default, in eval no dropout happens, and W is quantized as drawn: after what the same seed gives a dense layer.
DENSE = 0.400817, ([2.824215, 0.348011, -1.431585], 0.711), ([1.412108, 0.310481, -1.838605], -11.083)
NF4 = 0.400817, ([2.840127, 0.298567, -1.443123], 0.579), ([1.420063, 0.266369, -1.853422], -11.262)
TORCHTUNE = [
    ({"scaler_block_size": None}, *DENSE),
    ({"use_bias": True}, 0.015317, ([-3.031559, -1.001164, 1.927453], -3.741), ([-1.51578, -0.893195, 2.475454], 49.66)),
    ({"quantize_base": True}, *NF4),
    ({"quantize_base": True, "block_size": None, "scaler_block_size": None, "dropout": 0.25}, *NF4),
    (
        {"use_bias": True, "quantize_base": True, "block_size": 32, "scaler_block_size": 64}, 0.015317,
        ([-3.030026, -1.034371, 1.916358], -4.198), ([-1.515013, -0.922822, 2.461205], 49.23),
    ),
    ({"dropout": 0.25}, *DENSE),
]  # fmt: skip


@both
@pytest.mark.parametrize("kwargs, after, lora, dora", TORCHTUNE)
def test_torchtunes_values(kwargs, after, lora, dora, cls):
    y, total = lora if cls is LoRALinear else dora
    torch.manual_seed(7)
    m, x = cls(64, 256, 4, 16.0, **kwargs).eval(), torch.linspace(-1, 1, 128).view(2, 64)
    assert torch.rand(1).item() == pytest.approx(after, abs=1e-6)
    m.lora_b.weight.data = torch.linspace(-1, 1, 1024).view(256, 4)
    if cls is DoRALinear:
        m.initialize_dora_magnitude()
        m.magnitude.data.mul_(torch.linspace(0.5, 1.5, 256))

    def assert_values(got, y):
        """Of six decimals. The sums over K = 64 round in another order on another machine."""
        torch.testing.assert_close(got[1, ::100], torch.tensor(y), atol=5e-7 + 64**0.5 * torch.finfo(F32).eps * max(map(abs, y)), rtol=0)

    state, got = torch.get_rng_state(), m(x)
    assert_values(got, y)
    assert got.sum().item() == pytest.approx(total, abs=2e-3) and torch.equal(state, torch.get_rng_state())
    if kwargs == {"dropout": 0.25} and cls is LoRALinear:  # torchtune's mask too
        torch.manual_seed(8)
        assert_values(m.train()(x), [3.849131, 0.567495, -2.017534])


# Every base in every dtype, the classes by turns; both by the kernels.
RUNS = [(BOTH[(i + j) % 2], base, dtype, i > j, "auto") for i, base in enumerate(BASES) for j, dtype in enumerate(DTYPES)]
RUNS += [(cls, base, dtype, True, "triton") for cls in BOTH for base, dtype in (("nf4", F32), ("nf4 by 200", F16), ("nf4", BF16))]


@pytest.mark.parametrize("cls, base, dtype, use_bias, backend", RUNS)
def test_values_and_gradients(cls, base, dtype, use_bias, backend, device):
    m = layer(base, dtype, cls, use_bias=use_bias).to(device)
    with fastfuse.backend(backend):
        check_against_float64(m, torch.randn(7, m.in_dim, dtype=dtype, device=device))


def test_dense_base_is_torchtunes_formula_to_the_bit():
    m = layer("dense", BF16, use_bias=True)
    x = torch.randn(7, 64, dtype=BF16)
    assert torch.equal(m(x), eager(tensors_of(m, x)))


def test_bias_of_another_dtype_promotes():
    """As torchtune: x W^T is bf16, adding an fp32 bias makes it fp32."""
    m, x = layer("nf4", BF16, use_bias=True), torch.randn(5, 64, dtype=BF16)
    want, m.bias = m(x), nn.Parameter(m.bias.detach().float())
    got = m(x)
    assert want.dtype == BF16 and got.dtype == F32
    assert_rounding_apart(got.bfloat16(), want, K=64, products=2)
    with torch.autocast("cpu", BF16):
        assert torch.equal(m(x.float()), got)


@pytest.mark.parametrize("quantization", [{}, {"quantize_base": True, "scaler_block_size": 64}], ids=str)
@both
def test_dropout_drops_elements_of_what_goes_into_the_adapter_and_scales_the_rest(cls, quantization):
    """Seen through W = A = B = I, scaling 1."""
    m = cls(64, 64, 64, 64.0, dropout=0.3, **quantization)
    with torch.no_grad():
        for part in (m, m.lora_a, m.lora_b):
            part.weight.copy_(torch.eye(64))
    if cls is DoRALinear:
        m.initialize_dora_magnitude()
    x = (torch.rand(400, 64) + 0.5).requires_grad_()
    y, n = m(x), x.numel()
    kept = y > 1.5 * x
    torch.testing.assert_close(y, x + kept * x / 0.7)
    assert abs(kept.sum().item() - 0.7 * n) < 5 * (0.3 * 0.7 * n) ** 0.5
    assert not torch.equal(kept, m(x) > 1.5 * x), "a new mask at every call"
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], 1 + kept / 0.7)
    torch.testing.assert_close(m.eval()(x), 2 * x)


@pytest.fixture
def fused(monkeypatch):
    """The list of fused calls."""
    calls = []
    real = lora.nf4_lora_linear
    monkeypatch.setattr(lora, "nf4_lora_linear", lambda *args, **kwargs: calls.append(1) or real(*args, **kwargs))
    return calls


def test_fused_where_it_may_be(fused):
    x = torch.randn(2, 64)
    zero, off = layer("nf4", dropout=0.5), layer("nf4")
    zero.dropout.p, off.disabled = 0.0, True
    for m in (layer("nf4"), layer("nf4", dropout=0.5).eval(), layer("nf4", dropout=0.5), zero):
        m(x)
    assert len(fused) == 4
    layer("dense")(x)
    off(x)
    assert len(fused) == 4


class Tripled(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return 3 * self.inner(x)


# What puts something in the adapter that only calling it reaches.
MORE_THAN_WEIGHTS = {
    "other module": lambda m: setattr(m, "lora_a", Tripled(m.lora_a)),
    "other dropout": lambda m: setattr(m, "dropout", Tripled(nn.Identity())),
    "bias": lambda m: setattr(m, "lora_b", nn.Linear(8, 256)),
    "parametrization": lambda m: nn.utils.parametrize.register_parametrization(m.lora_a, "weight", Tripled(nn.Identity())),
    **{f"{hook} on {part}": lambda m, h=hook, p=part: HOOKS[h](m.get_submodule(p)) for hook in HOOKS for part in ("lora_a", "lora_b", "dropout")},
}


@pytest.mark.parametrize("kind", MORE_THAN_WEIGHTS)
def test_the_adapter_is_called_where_a_call_is_more_than_its_weights(kind, fused):
    m, x = layer("nf4"), torch.randn(4, 64, requires_grad=True)
    MORE_THAN_WEIGHTS[kind](m)

    def run(call):
        y = call(x)
        return y, *torch.autograd.grad(y.square().sum(), list(leaves_of(m, x).values()))

    called = run(lambda x: F.linear(x, m.weight.get_original_weight()) + 2.0 * m.lora_b(m.lora_a(m.dropout(x))))
    for got, want in zip(run(m), called, strict=True):
        assert_rounding_apart(got, want, K=256, products=4)
    assert fused == []


def test_global_hooks_see_the_adapter(fused):
    m, called = layer("nf4"), []
    with nn.modules.module.register_module_forward_hook(lambda module, args, out: called.append(module)):
        m(torch.randn(4, 64))
    assert called == [m.dropout, m.lora_a, m.lora_b, m] and fused == []


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


def test_dense_weight_in_a_quantized_layer():
    """load_state_dict(assign=True) puts a dense tensor where the NF4 one was: then it is a dense layer, as in torchtune."""
    m, x = layer("nf4", use_bias=True), torch.randn(3, 64)
    w = m.weight.get_original_weight()
    m.load_state_dict(m.state_dict() | {"weight": w}, assign=True)
    assert not is_nf4(m)
    torch.testing.assert_close(m(x), F.linear(x, w, m.bias) + 2.0 * F.linear(F.linear(x, m.lora_a.weight), m.lora_b.weight))


@pytest.mark.parametrize("base", ["dense", "nf4"])
def test_sharded_weights_run_torchs_and_torchaos_own_ops(base):
    m, x = layer(base), torch.randn(3, 64)
    want = m(x)
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        whole = {"device_mesh": init_device_mesh("cpu", (1,)), "placements": [Replicate()], "run_check": False}
        for module in (m, m.lora_a, m.lora_b):
            module.weight = nn.Parameter(DTensor.from_local(module.weight.detach(), **whole))
        got = m(DTensor.from_local(x, **whole)).to_local()
        if base == "dense":
            got.sum().backward()
            assert m.weight.grad is not None
    finally:
        distributed.destroy_process_group()
    assert_rounding_apart(got, want, K=64, products=2)


COMPILED = [
    (LoRALinear, "dense", "aot_eager"),
    (DoRALinear, "dense", "aot_eager"),
    (LoRALinear, "nf4", "inductor"),
    (DoRALinear, "nf4", "inductor"),
    (LoRALinear, "nf4 by 200", "aot_eager"),
    (LoRALinear, "nf4 dropout off", "aot_eager"),
    (LoRALinear, "nf4 dropout", "aot_eager"),
    (LoRALinear, "nf4 dropout", "inductor"),
    (LoRALinear, "nf4 hook", "aot_eager"),
    (DoRALinear, "nf4 hook", "inductor"),
]


@pytest.mark.parametrize("cls, case, backend", COMPILED)
def test_compile_fullgraph(cls, case, backend):
    torch._dynamo.reset()
    m = layer(case if case in BASES else "nf4", cls=cls, use_bias=True, dropout=0.5 if "dropout" in case else 0.0).train(case != "nf4 dropout off")
    if case == "nf4 hook":
        HOOKS["forward hook"](m.lora_a)
    x, dy = torch.randn(5, m.in_dim, requires_grad=True), torch.randn(5, m.out_dim)

    def run(call):
        torch.manual_seed(2)
        y = call(x)
        return [y, *torch.autograd.grad(y, list(leaves_of(m, x).values()), dy)]

    got = run(torch.compile(m, fullgraph=True, backend=backend))
    if (case, backend) == ("nf4 dropout", "inductor"):  # draws other random numbers than eager does, by design
        m.disabled = True
        assert not torch.allclose(got[0], m(x)) and all(g.any() for g in got[1:])
        return
    torch.testing.assert_close(got, run(m))


@pytest.mark.parametrize("use_bias", [False, True])
@both
def test_keys_and_attributes(cls, use_bias):
    m, magnitude = layer("nf4", cls=cls, use_bias=use_bias), ["magnitude"] * (cls is DoRALinear)
    adapter, own = {"lora_a.weight", "lora_b.weight", *magnitude}, {"scaling": 2.0} if magnitude else {"rank": 8, "alpha": 16.0, "merged": False}
    names = ["weight", *["bias"] * use_bias, *magnitude, "lora_a.weight", "lora_b.weight"]
    assert list(m.state_dict()) == [n for n, _ in m.named_parameters()] == names and "bias" in m._parameters
    assert (m.in_dim, m.out_dim, m.use_bias, m._quantize_base, m.disabled) == (64, 256, use_bias, True, False)
    assert {name: getattr(m, name) for name in ("scaling", "rank", "alpha", "merged") if hasattr(m, name)} == own
    assert set(get_adapter_params(m)) == set(m.adapter_params()) == adapter and m.adapter_params() is not m.adapter_params()
    assert type(m.dropout) is nn.Identity and type(layer(dropout=0.1).dropout) is nn.Dropout


@pytest.mark.parametrize("base, dtype, of", [("dense", F32, BF16), ("nf4", BF16, F16), ("nf4 by 200", F16, F32)], ids=str)
@both
def test_loading(cls, base, dtype, of):
    """What was saved; and dense weights of another dtype, quantized with the destination's block sizes."""
    m, other, file = layer(base, dtype, cls), layer(base, dtype, cls), io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    x, w = torch.randn(3, m.in_dim, dtype=dtype), torch.randn(m.out_dim, m.in_dim).to(of)
    assert not torch.equal(m(x), other(x))
    other.load_state_dict(torch.load(file, weights_only=False))
    assert torch.equal(m(x), other(x))
    m.load_state_dict({"weight": w}, strict=False)
    want = m.weight
    if is_nf4(m):
        assert torch.equal(m.weight.quantized_data, to_nf4(w, 64, BASES[base][2].get("scaler_block_size", 256)).quantized_data)
        want = m.weight.get_original_weight()
    m.disabled = True
    assert_rounding_apart(m(x), F.linear(x, want), K=128)


def test_deepcopy():
    """torchao's own clone quantizes anew, with block sizes 64 and 256, or fails where those do not divide the weight."""
    m, x = layer("nf4 by 200", dropout=0.2, use_bias=True).eval(), torch.randn(3, 128)
    m.weight.requires_grad_(False)
    m.tied = m.weight
    HOOKS["forward hook"](m.lora_a)
    twin, want = copy.deepcopy(m), m(x)
    assert torch.equal(twin(x), want) and twin.tied is twin.weight and not twin.weight.requires_grad and isinstance(twin.weight, nn.Parameter)
    with torch.no_grad():
        twin.lora_b.weight.zero_()
        twin.weight.copy_(torch.zeros(200, 128))
    assert torch.equal(m(x), want)


@both
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


UNDIVIDED = r"^to_nf4: a weight of shape \(64, 64\) has 64 scale blocks of 64, which scaler_block_size 256 does not divide: scaler_block_size=64 would do$"
UNQUANTIZED = r"^``quantize_base`` is False, but received the following quantization arguments: {'block_size': 8}$"
REFUSED = [
    ((64, 64, 4), {"block_size": 8}, ValueError, UNQUANTIZED),
    ((64, 64, 4), {"quantize_base": True}, InvalidArgument, UNDIVIDED),
    ((64, 256, 4), {"quantize_base": True, "foo": 1}, TypeError, "foo"),
    ((64, 64, 4), {"dropout": 1.5}, ValueError, "dropout is 1.5, expected 0 to 1"),
    ((64, 64, 4), {"dropout": -1.0}, ValueError, r"dropout is -1\.0, expected 0 to 1"),
    ((64, 64, 0), {}, InvalidArgument, "RALinear: rank is 0, expected at least 1"),
]


@both
@pytest.mark.parametrize("args, kwargs, error, message", REFUSED)
def test_refusals(cls, args, kwargs, error, message):
    with pytest.raises(error, match=message):
        cls(*args, 16.0, **kwargs)


def test_unsupported_is_not_silent():
    for x, error, message in (
        (torch.randn(2, 64, dtype=torch.float64), Unsupported, r"x is torch\.float64"),
        (torch.randn(2, 63), ValueError, r"x has shape \(2, 63\), weight takes 64 features"),
    ):
        with pytest.raises(error, match=message):
            layer("nf4")(x)


def test_import_fastfuse_leaves_torchao_alone():
    code = "import sys, fastfuse, fastfuse.modules.peft, fastfuse.modules.low_precision; sys.exit('torchao' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=fastfuse.__path__[0] + "/..").returncode == 0
