"""The cases themselves: every provider computes what it is timed for, and every GPU case can be made from shapes alone."""

import math
import time

import pytest
import torch

from bench import bench_patch_embed, harness
from bench.bench_nf4_lora import DENSE, DROPOUT, LINEAR, LINEARS, PLAIN, SWIGLU, _cost, dequantize_case, layers_case
from bench.bench_patch_embed import ROUTES, conv_case, embed_case
from bench.nf4_peers import random_layer
from bench.patch_peers import Size
from bench.peaks import DATA_SHEET
from fastfuse import tune
from fastfuse.ops import nf4_linear_bwd_cost, nf4_linear_cost, patch_embed_bwd_cost, patch_embed_cost

DTYPES = [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")]
# torchao takes multiples of 64 * 256 elements.
SIZES = {"linear": (LINEAR, [(256, 128)]), "linears": (LINEARS, [(256, 128), (128, 128)]), "swiglu": (SWIGLU, [(256, 128), (256, 128), (128, 256)])}


def assert_all_right(case: harness.Case) -> None:
    parity = harness.Parity(case, "cpu")
    ratios = {name: parity.ratio(name) for name, run in case.providers.items() if run}
    assert max(ratios.values()) <= 1, ratios


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("kind", SIZES)
def test_every_provider_is_right(kind: str, backward: bool, dtype: torch.dtype) -> None:
    op, sizes = SIZES[kind]
    case = layers_case(op, 5, sizes, dtype=dtype, backward=backward)
    names = {"bitsandbytes + PEFT", "bitsandbytes", "dequantize + addmm", "torchao", "bf16 LoRA" if dtype == torch.bfloat16 else "fp32 LoRA"}
    assert names <= case.providers.keys()
    assert_all_right(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def test_other_weights_and_adapters_too(backward: bool, dtype: torch.dtype) -> None:
    assert_all_right(layers_case(LINEAR, 5, [(256, 128)], dtype=dtype, backward=backward, storage="torchao"))
    assert_all_right(layers_case(LINEAR, 5, [(256, 128)], dtype=dtype, backward=backward, lora_dtype=torch.float32))
    assert_all_right(layers_case(DROPOUT, 5, [(256, 128)], dtype=dtype, backward=backward))
    assert_all_right(layers_case(DENSE, 5, [(256, 128)], dtype=dtype, backward=backward))
    if not backward:
        assert_all_right(layers_case(PLAIN, 5, [(256, 128)], 0, dtype=dtype))
        for storage in ("bitsandbytes", "torchao"):
            assert_all_right(dequantize_case(256, 128, storage, dtype, compiled=False))


def test_compiled_providers_are_right() -> None:
    pytest.importorskip("torchao")
    case = layers_case(LINEAR, 16, [(256, 128)], dtype=torch.float32, backward=True, compiled=True)
    assert {"torchao compiled", "torch.compile"} <= case.providers.keys()
    assert_all_right(case)


# Four images, so that every ratio is there; tiles of 3 x 3 patches.
EMBEDDINGS = {
    "grid": Size(4, 4, 24, 8, 64),
    "norm": Size(4, 4, 24, 8, 64, norm=True),
    "ids": Size(4, 4, 24, 8, 64, tables="ids", norm=True, pad_tokens_to=8),
    "no tables": Size(4, 1, 24, 8, 64, tables=None, norm=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_every_patch_embedding_is_right(kind: str, backward: bool, dtype: torch.dtype) -> None:
    case = embed_case(EMBEDDINGS[kind], dtype, backward=backward)
    assert ("torchtune" in case.providers) == (EMBEDDINGS[kind].tables == "grid")
    assert_all_right(case)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def test_other_pixels_and_the_convolution_too(backward: bool, dtype: torch.dtype) -> None:
    for pixels in (torch.float32, torch.uint8):
        assert_all_right(embed_case(EMBEDDINGS["grid"], dtype, pixels, backward))
    case = conv_case(EMBEDDINGS["grid"], dtype, backward)
    assert harness.OURS not in case.providers  # so no speed-up over it is printed
    assert_all_right(case)


def test_a_compiled_patch_embedding_is_right_and_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    case = embed_case(EMBEDDINGS["grid"], torch.float32, backward=True, compiled=True)
    assert_all_right(case)
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    case.providers["torch.compile"](case.make("cpu", 1))  # other parameters of the same shapes


@pytest.mark.parametrize("quick", [False, True], ids=["all", "quick"])
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_cases_of_patch_embeddings_are_made_from_shapes_alone(device: str, quick: bool) -> None:
    for case in bench_patch_embed.cases(device, quick, compile_all=not quick):
        assert math.isfinite(harness.floor_us(case.cost(case.make("meta", 0)), DATA_SHEET["H200"], case.dtype))
        assert {f"fastfuse {name}" for name in ROUTES} <= case.providers.keys() or device == "cpu" or harness.OURS not in case.providers


def test_pinned_routes_have_the_constants_of_the_rows() -> None:
    row = next(row["tile"] for row in tune.table("patch_embed") if row["tile"])
    assert all(tile is None or tile.constants.keys() == row["constants"].keys() for tile in ROUTES.values())


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def test_cost_of_a_patch_embedding(backward: bool) -> None:
    case = embed_case(EMBEDDINGS["ids"], backward=backward)
    inputs = case.make("meta", 0)
    e = inputs["embedding"]
    tables = {name: t for name, t in e.tables().items() if name in ("local_pos", "global_pos", "pre_pos")}
    each = [cost(inputs["images"], e.conv.weight, e.cls.weight, **tables, pad_tokens_to=8) for cost in (patch_embed_cost, patch_embed_bwd_cost)]
    got = case.cost(inputs)
    assert (got.bytes, got.flops) == (sum(c.bytes for c in each[: 1 + backward]), sum(c.flops for c in each[: 1 + backward]))
    assert got.flops == (1 + backward) * 2 * 16 * 9 * 64 * 3 * 8 * 8


def test_peers_are_the_real_ones() -> None:
    bnb, peft, torchao = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft"), pytest.importorskip("torchao")
    layer = random_layer(256, 128, 16, "bitsandbytes", torch.bfloat16, "cpu", requires_grad=True)
    assert type(layer.peft) is peft.tuners.lora.bnb.Linear4bit and type(layer.peft.base_layer) is bnb.nn.Linear4bit
    assert layer.peft.base_layer.weight.quant_state.nested and layer.peft.scaling == {"default": layer.scaling}
    assert layer.peft.lora_A["default"].weight is layer.lora_a and layer.peft.lora_B["default"].weight is layer.lora_b
    assert type(layer.torchao).__name__ == "NF4Tensor" and type(layer.torchao).__module__.startswith(torchao.__name__)


@pytest.mark.parametrize("quick", [False, True], ids=["all", "quick"])
def test_gpu_cases_are_made_from_shapes_alone(quick: bool) -> None:
    cases = harness.all_cases("cuda", quick, compile_all=not quick)
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert math.isfinite(harness.floor_us(case.cost(case.make("meta", 0)), DATA_SHEET["H200"], case.dtype))
    first = [case.shape for case in cases[:3]]
    assert first == [f"M{M} N4096 K4096 R16 bitsandbytes" for M in ((1, 16, 256) if quick else (1, 16, 64))]


def test_costs_of_layers_together() -> None:
    meta = {
        name: random_layer(*size, 16, "bitsandbytes", torch.bfloat16, "meta") for name, size in zip("abc", [(256, 128), (256, 128), (128, 256)], strict=True)
    }
    x = torch.empty(5, 128, dtype=torch.bfloat16, device="meta")
    h = torch.empty(5, 256, dtype=torch.bfloat16, device="meta")
    a, b, c = meta.values()

    def both(x, layer):
        costs = [cost(x, layer.weight, layer.lora_a, layer.lora_b) for cost in (nf4_linear_cost, nf4_linear_bwd_cost)]
        return sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs)

    (xa, fa), (xb, fb), (_, fc) = both(x, a), both(x, b), both(h, c)
    one = _cost(LINEAR, True, {"x": x, "a": a})
    assert (one.bytes, one.flops) == (xa, fa)
    two = _cost(LINEARS, True, {"x": x, "a": a, "b": b})
    assert (two.bytes, two.flops) == (xa + xb - 3 * x.nbytes, fa + fb)
    mlp = _cost(SWIGLU, True, {"x": x, "a": a, "b": b, "c": c})
    # Left: x three times (x twice, dX), the output and its gradient, weights and adapters twice, gradients of the adapters.
    weights, adapters = (sum(f(layer) for layer in (a, b, c)) for f in (lambda t: t.weight.nbytes, lambda t: t.lora_a.nbytes + t.lora_b.nbytes))
    assert mlp.bytes == 5 * x.nbytes + 2 * weights + 3 * adapters
    assert mlp.flops == fa + fb + fc


def test_a_peer_is_judged_on_its_own_weight() -> None:
    case = layers_case(LINEAR, 2, [(128, 128)], dtype=torch.float32)
    if case.providers["torchao"] is None:
        pytest.skip("torchao is not installed")
    parity = harness.Parity(case, "cpu")
    assert parity.ratio("torchao") <= 1
    case.judged_on.clear()
    assert parity.ratio("torchao") > 1  # torchao's scales are not bitsandbytes'


def test_what_is_built_at_first_use_is_not_timed() -> None:
    built: list[int] = []

    def fn(inputs: dict) -> None:
        if inputs["n"] not in built:
            built.append(inputs["n"])
            time.sleep(0.05)

    sets = [{"n": n} for n in range(5)]
    fn(sets[0])  # as its parity check does
    us, _ = harness.cpu_us(fn, sets)
    assert len(built) == 5 and us < 5e3
