"""The cases themselves: every provider computes what it is timed for, and every GPU case can be made from shapes alone."""

import math
import time
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.attention import SDPBackend

from bench import attention_peers, bench_cross_attention, bench_patch_embed, harness
from bench.attention_peers import Call
from bench.attention_peers import Size as Attention
from bench.bench_cross_attention import attention_case
from bench.bench_nf4_lora import DENSE, DROPOUT, LINEAR, LINEARS, PLAIN, SWIGLU, _cost, dequantize_case, layers_case
from bench.bench_patch_embed import ROUTES, conv_case, embed_case
from bench.nf4_peers import random_layer
from bench.peaks import DATA_SHEET
from cases.embedding import Size
from fastfuse import ops, tune
from fastfuse.ops import nf4_linear_bwd_cost, nf4_linear_cost, patch_embed_bwd_cost, patch_embed_cost
from fastfuse.ops._op import Cost

FP32, BF16 = torch.float32, torch.bfloat16


def layers(kind, *sizes, **options):
    """Of 5 tokens; torchao takes multiples of 64 * 256 elements."""
    return partial(layers_case, kind, 5, [*sizes] or [(256, 128)], **options)


LAYERS = {
    "linear": layers(LINEAR),
    "linears": layers(LINEARS, (256, 128), (128, 128)),
    "swiglu": layers(SWIGLU, (256, 128), (256, 128), (128, 256)),
    "torchao": layers(LINEAR, storage="torchao"),
    "fp32 adapters": layers(LINEAR, lora_dtype=FP32),
    "dropout": layers(DROPOUT),
    "dense": layers(DENSE),
}
GRID = Size(4, 4, 24, 8, 64)  # four images, so that every ratio is there; tiles of 3 x 3 patches
IDS = replace(GRID, tables="ids", norm=True, pad_tokens_to=8)
EMBEDDINGS = {"grid": GRID, "norm": replace(GRID, norm=True), "ids": IDS, "no tables": replace(GRID, tiles=1, tables=None, norm=True)}
attention = partial(Attention, hq=8, hkv=2, d=32, tile=61)
ATTENTIONS = {
    "one image": attention(24, shown=(3,)),
    "one tile": attention(24, tiles=1, shown=(1,)),
    "two images": attention(24, 2, (1,)),
    "in turn": attention(24, 2, (3,), in_turn=True),
    "batch": attention(24, batch=3, shown=(1, 4, 2)),
    "no mask": attention(24, masked=False),
}
SIZES = ATTENTIONS | {
    "step": attention(1, batch=4),
    "step over two images": attention(1, 2, (1,), batch=4),
    "step of a batch": attention(1, batch=4, shown=(1, 2, 3, 4)),
}
ON_CPU = {f"attention, {name}": partial(attention_case, size, device="cpu") for name, size in SIZES.items()}
FORWARD = {name: case for name, case in ON_CPU.items() if "step" in name} | {"plain": layers(PLAIN, rank=0)}
FORWARD |= {f"dequantize, {storage}": partial(dequantize_case, 256, 128, storage, compiled=False) for storage in ("bitsandbytes", "torchao")}
KINDS = LAYERS | {f"embedding, {name}": partial(embed_case, size) for name, size in EMBEDDINGS.items()}
KINDS |= {f"{dtype} pixels": partial(embed_case, GRID, pixels=dtype) for dtype in (FP32, torch.uint8)}
KINDS |= {"conv": partial(conv_case, GRID)} | {name: case for name, case in ON_CPU.items() if name not in FORWARD}
# Every kind in both dtypes and in both passes, and both passes in both dtypes.
PAIRS = [(kind, {"backward": backward, "dtype": (FP32, BF16)[(n + backward) % 2]}) for n, kind in enumerate(KINDS) for backward in (False, True)]
PAIRS += [(kind, {"dtype": dtype}) for kind in FORWARD for dtype in (FP32, BF16)]


def assert_all_right(case):
    """fastfuse by the rule. A peer that is off is named with its error: it is left out of every ranking, and what a peer computes is its own affair
    (bitsandbytes with AVX512-BF16 multiplies fp32 inputs in bf16). More than that would be a case that is set up wrongly."""
    parity = harness.Parity(case, "cpu")
    ratios = {name: parity.ratio(name) for name, run in case.providers.items() if run}
    ours = {name: ratio for name, ratio in ratios.items() if harness.is_ours(name) or name == harness.EAGER}
    assert max(ours.values()) <= 1, ours
    if off := {name: round(ratio, 1) for name, ratio in ratios.items() if ratio > 1}:
        warnings.warn(f"{' '.join(case.key)}: off, in times the limit: {off}", stacklevel=2)
    assert max(ratios.values()) <= max(16, torch.finfo(BF16).eps / torch.finfo(case.dtype).eps), ratios


@pytest.mark.parametrize("kind, given", PAIRS, ids=str)
def test_every_provider_is_right(kind, given):
    assert_all_right((KINDS | FORWARD)[kind](**given))


def names_of(size, backends):
    """backends: PyTorch's. The others follow from what is visible."""
    names = backends | {harness.OURS, harness.EAGER, "transformers"}
    names |= {"sliced flash"} if len(size.shown) == 1 else set()
    names |= {"fastfuse from_tiles", "fastfuse from_dense"} if size.masked and not size.decode else set()
    return names | ({"fastfuse in place"} if size.decode and set(size.shown) != {size.tiles} else set())


def test_every_peer_is_there():
    for dtype, name in ((BF16, "bf16 LoRA"), (FP32, "fp32 LoRA")):
        for kind in ("linear", "linears", "swiglu"):
            assert {"bitsandbytes + PEFT", "bitsandbytes", "dequantize + addmm", "torchao", name} <= LAYERS[kind](dtype=dtype).providers.keys()
    for size in EMBEDDINGS.values():
        assert ("torchtune" in embed_case(size).providers) == (size.tables == "grid")
    assert harness.OURS not in conv_case(GRID, BF16, False).providers  # so no speed-up over it is printed
    for size in SIZES.values():
        assert attention_case(size, device="cpu").providers.keys() == names_of(size, {"sdpa_flash", "sdpa_math"})


@pytest.mark.parametrize("size", SIZES.values(), ids=str)
def test_attention_peers_of_a_gpu_are_called_rightly(monkeypatch, size):
    """With the backend that a CPU has in place of theirs."""
    for name in ("sdpa_cudnn", "sdpa_efficient"):
        monkeypatch.setitem(attention_peers.SDPA, name, (SDPBackend.MATH, attention_peers.SDPA[name][1]))
    case = attention_case(size, FP32, "cuda", backward=not size.decode)
    names = {"sdpa_cudnn", "sdpa_efficient", "sdpa_math"} | (set() if size.masked else {"sdpa_flash"})
    assert case.providers.keys() == names_of(size, names | ({"fastfuse interval"} if size.masked and size.intervals and not size.decode else set()))
    assert_all_right(case)


@pytest.mark.parametrize(
    "case, names",
    [
        (partial(LAYERS["linear"], dtype=FP32, backward=True), ["torchao compiled", "torch.compile"]),
        (partial(embed_case, GRID, FP32, backward=True), ["torch.compile"]),
        (partial(attention_case, ATTENTIONS["one image"], FP32, "cpu"), ["torch.compile", "FlexAttention", "FlexAttention +mask"]),
    ],
    ids=["layer", "embedding", "attention"],
)
def test_compiled_providers_are_right_and_compiled_once(case, names):
    if "torchao compiled" in names:
        pytest.importorskip("torchao")
    case = case(compiled=True)
    assert list(case.providers)[-len(names) :] == names
    parity, others = harness.Parity(case, "cpu"), case.make("cpu", 1)
    for name in names:
        assert parity.ratio(name) <= 1, name
        if "torchao compiled" in names:
            continue
        with torch._dynamo.config.patch(error_on_recompile=True):
            case.providers[name](others)  # other parameters of the same shapes, another mask


@pytest.mark.parametrize("size", SIZES.values(), ids=str)
def test_exact_attention_is_the_formula_and_what_is_visible_is_what_is_counted(size):
    """Of which the limits of all others are drawn."""
    case = attention_case(size, torch.float64, "cpu", backward=not size.decode)
    inputs = case.make("cpu", 0)
    for got, want in zip(case.providers[harness.EAGER](inputs), case.truth(inputs), strict=True):
        assert got.shape == want.shape and harness.max_error(got, want) < 1e-13
    call = Call(size, FP32, "cpu")
    pairs = size.batch * size.tokens * size.s_e
    seen = pairs if call.dense is None else call.dense.sum().item()
    assert size.visible * pairs == pytest.approx(seen, abs=1e-6)
    assert call.encoder_mask is None or call.encoder_mask.visible_fraction == pytest.approx(seen / pairs)
    flops = attention_case(size).cost({"call": Call(size, FP32, "meta")}).flops
    assert flops == pytest.approx(4 * size.hq * size.d * seen, abs=1)
    shown = call.k.new_ones(call.k.shape[:3]) if call.dense is None else call.dense.any(1)[:, None].expand(call.k.shape[:3])
    assert call.nbytes == call.q.nbytes + 2 * 4 * size.d * shown.sum().item()


def test_nan_of_a_row_that_sees_nothing_is_a_wrong_result():
    case = attention_case(ATTENTIONS["one image"], FP32, "cpu", backward=True)

    def broken(inputs, peer, output):
        outputs = case.providers[peer](inputs)
        outputs[output][(0,) * outputs[output].dim()] = torch.nan
        return outputs

    spoilt = {f"{peer} {n}": partial(broken, peer=peer, output=n) for peer in ("transformers", "sdpa_math") for n in range(4)}  # y, dq, dk, dv
    own = {name: case.judged_on[name.split()[0]] for name in spoilt if name.split()[0] in case.judged_on}
    parity = harness.Parity(replace(case, providers=case.providers | spoilt, judged_on={**case.judged_on, **own}), "cpu")
    assert {name: parity.ratio(name) for name in spoilt} == dict.fromkeys(spoilt, math.inf)


@pytest.mark.parametrize("device, quick", [("cuda", False), ("cuda", True), ("cpu", False), ("cpu", True)])
def test_cases_are_made_from_shapes_alone(device, quick):
    families = (bench_patch_embed, bench_cross_attention)
    of_cpu = [case for family in families for case in family.cases("cpu", quick, not quick)]
    cases = harness.all_cases("cuda", quick, compile_all=not quick) if device == "cuda" else of_cpu
    assert len({case.key for case in cases}) == len(cases)
    for case in cases:
        assert math.isfinite(harness.floor_us(case.cost(case.make("meta", 0)), DATA_SHEET["H200"], case.dtype))
        if case.op.startswith("patch_embed"):
            assert {f"fastfuse {name}" for name in ROUTES} <= case.providers.keys() or device == "cpu"
        if case.op.startswith("cross_attention"):  # FlexAttention has no backward on a CPU
            assert len(case.shape) <= 48 and (quick or (device == "cpu" and "bwd" in case.op) or "FlexAttention" in case.providers)
    if device == "cuda":
        first = [case.shape for case in cases if case.op == "nf4_lora_linear"][:3]
        assert first == [f"M{M} N4096 K4096 R16 bitsandbytes" for M in ((1, 16, 256) if quick else (1, 16, 64))]


def test_pinned_routes_have_the_constants_of_the_rows():
    row = next(row["tile"] for row in tune.table("patch_embed") if row["tile"])
    assert all(tile is None or tile.constants.keys() == row["constants"].keys() for tile in ROUTES.values())


def test_cross_attention_is_timed_at_the_shapes_of_the_model():
    keys = {case.key[:2] for case in bench_cross_attention.cases("cuda", False, False)}
    for op in ("cross_attention", "cross_attention fwd+bwd"):
        for s in (256, 1024, 4096):
            assert (op, f"s{s} s_e1601 H32/8 d128 1/1 tiles") in keys
            assert {(op, f"s{s} s_e{n} H32/8 d128 {shown}/4 tiles") for n in (6404, 12808) for shown in (4, 3, 1)} <= keys
    for b in (1, 4, 16, 64):
        assert {("cross_attention_decode", f"b{b} s_e{n} H32/8 d128 {shown}/4 tiles") for n in (6404, 12808) for shown in (4, 1)} <= keys


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "fwd+bwd"])
def test_costs_are_those_of_the_passes(backward):
    def both(case, *costs):
        inputs = case.make("meta", 0)
        each, got = [cost(inputs) for cost in costs[: 1 + backward]], case.cost(inputs)
        assert (got.bytes, got.flops) == (sum(c.bytes for c in each), sum(c.flops for c in each))

    def embedding(inputs, cost):
        e, places = inputs["embedding"], ("local_pos", "global_pos", "pre_pos")
        return cost(inputs["images"], e.conv.weight, e.cls.weight, **{name: t for name, t in e.tables().items() if name in places}, pad_tokens_to=8)

    case = embed_case(IDS, backward=backward)
    both(case, partial(embedding, cost=patch_embed_cost), partial(embedding, cost=patch_embed_bwd_cost))
    assert case.cost(case.make("meta", 0)).flops == (1 + backward) * 2 * 16 * 9 * 64 * 3 * 8 * 8
    size, passes = ATTENTIONS["one image"], (ops.cross_attention_cost, ops.cross_attention_bwd_cost)
    both(attention_case(size, backward=backward), *(lambda i, cost=cost: cost(i["call"].q, i["call"].k, i["call"].v, visible=size.visible) for cost in passes))


def test_cost_of_a_step():
    case = attention_case(SIZES["step of a batch"])
    inputs = case.make("meta", 0)
    c, got = inputs["call"], case.cost(inputs)
    assert got == ops.cross_attention_decode_cost(c.q, c.empty_cache(), tokens=10 * 61)  # 1 + 2 + 3 + 4 tiles
    assert got.bytes == pytest.approx(2 * 10 * 61 * 2 * 32 * 2 + 2 * c.q.nbytes, abs=64)  # and a few lengths


def test_attention_peers_are_the_real_ones():
    mllama = pytest.importorskip("transformers.models.mllama.modeling_mllama")
    for name in ("in turn", "batch", "step of a batch"):
        call = Call(SIZES[name], BF16, "cpu")
        bias, _ = mllama._prepare_cross_attention_mask(call.seen_tiles.int(), SIZES[name].tile, BF16)
        assert torch.equal(call.bias, bias)
    one, two = (Call(ATTENTIONS[kind], BF16, "cpu") for kind in ("one image", "two images"))
    assert one.shown(slice(None))[0].data_ptr() == one.k.data_ptr() and one.shown(slice(None))[0].shape[2] == 3 * 61  # nothing is copied
    assert torch.equal(two.shown(slice(None))[1], two.v[:, :, two.dense[0, -1]])


def test_masks_that_can_be_intervals():
    """On a CPU the mask finds out itself."""
    kinds = {name: Call(size, BF16, "cpu").encoder_mask.kind for name, size in ATTENTIONS.items() if size.masked}
    assert kinds == {name: "interval" if ATTENTIONS[name].intervals else "bits" for name in kinds} and "bits" in kinds.values()


def test_peers_are_the_real_ones():
    bnb, peft, torchao = pytest.importorskip("bitsandbytes"), pytest.importorskip("peft"), pytest.importorskip("torchao")
    layer = random_layer(256, 128, 16, "bitsandbytes", BF16, "cpu", requires_grad=True)
    assert type(layer.peft) is peft.tuners.lora.bnb.Linear4bit and type(layer.peft.base_layer) is bnb.nn.Linear4bit
    assert layer.peft.base_layer.weight.quant_state.nested and layer.peft.scaling == {"default": layer.scaling}
    assert layer.peft.lora_A["default"].weight is layer.lora_a and layer.peft.lora_B["default"].weight is layer.lora_b
    assert type(layer.torchao).__name__ == "NF4Tensor" and type(layer.torchao).__module__.startswith(torchao.__name__)


def test_costs_of_layers_together():
    a, b, c = together = [random_layer(*size, 16, "bitsandbytes", BF16, "meta") for size in ((256, 128), (256, 128), (128, 256))]
    x, h = (torch.empty(5, K, dtype=BF16, device="meta") for K in (128, 256))

    def both(x, layer):
        costs = [cost(x, layer.weight, layer.lora_a, layer.lora_b) for cost in (nf4_linear_cost, nf4_linear_bwd_cost)]
        return sum(cost.bytes for cost in costs), sum(cost.flops for cost in costs)

    (xa, fa), (xb, fb), (_, fc) = both(x, a), both(x, b), both(h, c)
    assert _cost(LINEAR, True, {"x": x, "a": a}) == Cost(xa, fa)
    assert _cost(LINEARS, True, {"x": x, "a": a, "b": b}) == Cost(xa + xb - 3 * x.nbytes, fa + fb)
    # Left: x three times (x twice, dX), the output and its gradient, layers twice, gradients of the adapters.
    gradients = sum(layer.lora_a.nbytes + layer.lora_b.nbytes for layer in together)
    assert _cost(SWIGLU, True, {"x": x, "a": a, "b": b, "c": c}) == Cost(5 * x.nbytes + 2 * sum(t.nbytes for t in together) + gradients, fa + fb + fc)


def test_a_peer_is_judged_on_its_own_weight():
    case = layers_case(LINEAR, 2, [(128, 128)], dtype=FP32)
    if case.providers["torchao"] is None:
        pytest.skip("torchao is not installed")
    parity = harness.Parity(case, "cpu")
    assert parity.ratio("torchao") <= 1
    case.judged_on.clear()
    assert parity.ratio("torchao") > 1  # torchao's scales are not bitsandbytes'


def test_what_is_built_at_first_use_is_not_timed():
    built: list[int] = []

    def fn(inputs):
        if inputs["n"] not in built:
            built.append(inputs["n"])
            time.sleep(0.05)

    sets = [{"n": n} for n in range(5)]
    fn(sets[0])  # as its parity check does
    us, _ = harness.cpu_us(fn, sets)
    assert len(built) == 5 and us < 5e3
