"""Patch embedding against torchtune's loop over images, the eager modules and transformers' Mllama; what it costs, saves and refuses."""

import contextlib
import itertools
from collections import Counter

import mllama
import pytest
import torch
import torchtune_tiles
from numerics import assert_no_worse, in_several_orders, opcheck
from reference import assert_gradients_no_worse
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint
from transformers.models.mllama.modeling_mllama import MllamaPrecomputedAspectRatioEmbedding, MllamaPrecomputedPositionEmbedding
from waiting import Launched, NoReading

import fastfuse
from fastfuse import tune
from fastfuse.kernels.patch_embed import tile_rows_kernel
from fastfuse.modules import CLSEmbedding, Fp32LayerNorm, TiledTokenPositionalEmbedding, TilePositionalEmbedding, TokenPositionalEmbedding
from fastfuse.ops import _patch_tokens, patch_embed, patch_embed_bwd, patch_embed_bwd_cost, patch_embed_cost
from fastfuse.ops._op import Cost
from fastfuse.ops._patch_tokens import PatchEmbedArgs, Tables
from fastfuse.ops.patch_embed_bwd import PatchEmbedBwdArgs

MODULES = patch_embed.__globals__, vars(patch_embed_bwd), vars(_patch_tokens)  # fastfuse.ops.patch_embed names the function
OPS = {op.name: op for op in (MODULES[0]["patch_embed_op"], patch_embed_bwd.patch_embed_bwd)}
T = 4
BACKWARDS = ("reference", "library")  # the routes of the kernels share one
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
GEMM = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "SUBTILES": 2, "DIRECT": False, "FLATTEN": False})
GATHER = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 128, "SUBTILES": 4, "DIRECT": True, "FLATTEN": False})
ROUTES = {"reference": ("auto", None), "library": ("triton", None), "gemm": ("triton", GEMM), "gather": ("triton", GATHER)}
EVERYTHING = {"bias": True, "norm": True, "pad_tokens_to": 8, "scale": [1.5, 0.5, 2.0], "shift": [0.1, -0.2, 0.3]}
SMALL = {"ratios": ((1, 2), (1, 1)), "n_tiles": 2, "grid": (1, 2), "D": 8}


@pytest.fixture(autouse=True)
def few_programs(monkeypatch):
    """Several rows for each program of the norm's backward, as at real sizes; the interpreter takes 10 ms for a program."""
    monkeypatch.setattr(patch_embed_bwd, "_NORM_PROGRAMS", 5)


@contextlib.contextmanager
def routed(route: str):
    backend, tile = ROUTES[route]
    with fastfuse.backend(backend), tune.pin("patch_embed", tile):
        yield


class Given:
    """Leaves for one call, and what is not differentiated."""

    def __init__(
        self, device, ratios=((2, 2), (1, 3), (4, 1)), *, lead=None, n_tiles=T, grid=(3, 5), patch=(2, 3), C=3, D=20, dtype=torch.float32, tables=None,
        pixels=None, layout="plain", cls=True, local=True, table=True, pre=True, gates=True, bias=False, norm=False, ids=None, empty=(), **options,
    ):  # fmt: skip
        n, entries = grid[0] * grid[1] + cls, ids or T

        def leaf(there, *shape, size=1.0):
            return (torch.randn(shape, device=device) * size).to(tables or dtype).requires_grad_() if there else None

        lead = (len(ratios),) if lead is None else lead
        images = self.pixels((*lead, n_tiles, C, grid[0] * patch[0], grid[1] * patch[1]), pixels or dtype, layout, device)
        for image in empty:
            images[image] = 0
        self.tensors = {
            "images": images.requires_grad_(images.is_floating_point()),
            "weight": (torch.randn(D, C, *patch, device=device) * (C * patch[0] * patch[1]) ** -0.5).to(dtype).requires_grad_(),
            "cls": leaf(cls, D),
            "local_pos": leaf(local, n, D),
            "global_pos": leaf(table, entries, T, n, D),
            "gate": None,
            "pre_pos": leaf(pre, entries, T, 1, D),
            "pre_gate": None,
            "bias": leaf(bias, D),
            "norm_weight": leaf(norm, D),
            "norm_bias": leaf(norm, D),
        }
        for gate, there, value in (("gate", table, 0.7), ("pre_gate", pre, -0.4)):
            if there and gates:
                self.tensors[gate] = torch.full((1,), value, device=device, dtype=tables or dtype, requires_grad=True)
        self.ratio = torch.tensor(ratios, device=device).reshape((*lead, *([] if ids else [2]))) if ratios is not None else None
        self.eps, self.options = 1e-5 if norm else None, options

    @staticmethod
    def pixels(shape, dtype, layout, device) -> Tensor:
        if layout == "crop":  # of a larger batch, at an offset
            whole = Given.pixels((*shape[:-2], shape[-2] + 3, shape[-1] + 5), dtype, "plain", device)
            return whole[..., 2:-1, 1:-4]
        if layout == "transposed":
            return Given.pixels((*shape[:-2], shape[-1], shape[-2]), dtype, "plain", device).mT
        if layout == "expanded":
            return Given.pixels((1, *shape[1:]), dtype, "plain", device).expand(shape)
        if layout == "channels_last":
            return Given.pixels((*shape[:-3], *shape[-2:], shape[-3]), dtype, "plain", device).movedim(-1, -3)
        return torch.randint(256, shape, dtype=torch.uint8, device=device) if dtype == torch.uint8 else torch.randn(shape, device=device).to(dtype)

    def leaves(self) -> dict[str, Tensor]:
        return {n: t for n, t in self.tensors.items() if t is not None and t.requires_grad}

    def double(self) -> "Given":
        other = object.__new__(Given)
        other.__dict__ |= self.__dict__
        other.tensors = {
            n: t if t is None or not t.is_floating_point() else t.detach().double().requires_grad_(t.requires_grad) for n, t in self.tensors.items()
        }
        return other

    def only(self, *names: str) -> "Given":
        """The same values, where `names` alone are leaves."""
        other = object.__new__(Given)
        other.__dict__ |= self.__dict__
        other.tensors = {n: t if t is None else t.detach().requires_grad_(n in names) for n, t in self.tensors.items()}
        return other

    def __call__(self, fn=patch_embed, **more) -> Tensor:
        t = dict(self.tensors)
        norm = None if self.eps is None else (t["norm_weight"], t["norm_bias"], self.eps)
        places = (t["global_pos"], t["gate"], t["pre_pos"], t["pre_gate"])
        return fn(t["images"], t["weight"], t["cls"], self.ratio, t["local_pos"], *places, bias=t["bias"], norm=norm, **self.options, **more)

    def grads(self, y: Tensor, dy: Tensor | None = None, retain_graph: bool = False) -> dict[str, Tensor]:
        leaves = self.leaves()
        dy = torch.ones_like(y) if dy is None else dy.to(y.dtype)
        return dict(zip(leaves, torch.autograd.grad(y, leaves.values(), dy, retain_graph=retain_graph), strict=True))


def check(given: Given, formula=torchtune_tiles.patch_embed, gradients: bool = True, draws: int = 2, layout=lambda dy: dy) -> None:
    """patch_embed by the backend in force: its result and every gradient, by the rule. Gates are single numbers, which may come out right
    by luck: theirs are taken for `draws` upstream gradients and weighed against all others."""
    if not gradients:
        given = given.only()
    upstream = []

    def results(g, fn):
        y, leaves, found = g(fn), g.leaves() if gradients else {}, {}
        if gradients:
            upstream.extend(torch.randn(y.shape, dtype=torch.float64, device=y.device).to(given.tensors["weight"].dtype) for _ in range(draws - len(upstream)))
            found = {n: (d,) for n, d in g.grads(y, layout(upstream[0]), retain_graph=True).items()}
            gates = {n: t for n, t in leaves.items() if "gate" in n}
            for dy in upstream[1:] if gates else ():
                again = torch.autograd.grad(y, gates.values(), dy.to(y.dtype), retain_graph=True)
                found |= {n: (*found[n], d) for n, d in zip(gates, again, strict=True)}
        return y.detach(), found

    (y, got), eager, (exact_y, exact) = results(given, patch_embed), in_several_orders(results, given, formula), results(given.double(), formula)
    assert_no_worse(y, [value for value, _ in eager], exact_y)
    for name, want in exact.items():
        if "gate" not in name:
            assert not want[0].numel() or want[0].any(), f"{name}: nothing is compared"
            assert_no_worse(got[name][0], [found[name][0] for _, found in eager], want[0], f"gradient of {name}")
    if any("gate" in name for name in exact):
        assert_gradients_no_worse(got, [found for _, found in eager], exact)


def by_modules(images, weight, cls, ratio, local_pos, global_pos, gate, pre_pos, pre_gate, *, bias, norm, append_cls=False, pad_tokens_to=1):
    """fastfuse's eager modules, one after the other."""
    lead, (n_tiles, C) = images.shape[:-4], images.shape[-4:-2]
    D, _, *patch = weight.shape
    x = functional_call(
        nn.Conv2d(C, D, patch, patch, bias=bias is not None), {"weight": weight} | ({} if bias is None else {"bias": bias}), images.flatten(0, -4)
    )
    x, ratio = x.flatten(2).transpose(1, 2).unflatten(0, (-1, n_tiles)), ratio.reshape(-1, 2)
    x = functional_call(TilePositionalEmbedding(T, D), {"embedding": pre_pos, "gate": pre_gate}, (x, ratio))
    x = functional_call(CLSEmbedding(D, append_cls), {"weight": cls}, x)
    if global_pos is None:
        x = functional_call(TokenPositionalEmbedding(D, 1, 1), {"positional_embedding": local_pos}, x)
    else:
        tables = {"local_token_positional_embedding": local_pos, "global_token_positional_embedding": global_pos, "gate": gate}
        x = functional_call(TiledTokenPositionalEmbedding(T, D, 1, 1), tables, (x, ratio))
    if norm is not None:
        x = functional_call(Fp32LayerNorm(D, eps=norm[2]), {"weight": norm[0], "bias": norm[1]}, x)
    return F.pad(x, (0, 0, 0, -x.shape[2] % pad_tokens_to)).reshape(*lead, n_tiles, -1, D)


def by_mllama(images, weight, cls, ids, local_pos, global_pos, gate, pre_pos, pre_gate, *, bias, norm, pad_tokens_to=1):
    """transformers' modules, as MllamaVisionModel.forward puts them together."""
    lead, n_tiles, D = images.shape[:-4], images.shape[-4], weight.shape[0]
    vision = mllama.config().vision_config
    vision.hidden_size = D
    x = F.conv2d(images.flatten(0, -4), weight, stride=weight.shape[2:]).flatten(2).transpose(1, 2).unflatten(0, (-1, n_tiles))
    ids = ids.reshape(-1, 1)
    x = functional_call(MllamaPrecomputedAspectRatioEmbedding(vision), {"embedding.weight": pre_pos.flatten(1), "gate": pre_gate}, (x, ids))
    x = torch.cat([cls.expand(*x.shape[:2], 1, -1), x], 2)
    tables = {"embedding": local_pos, "gate": gate, "tile_embedding.weight": global_pos.flatten(1)}
    module = MllamaPrecomputedPositionEmbedding(vision)
    module.num_patches = x.shape[2]
    x = functional_call(module, tables, (x, ids))
    x = x if norm is None else F.layer_norm(x, (D,), *norm)
    return F.pad(x, (0, 0, 0, -x.shape[2] % pad_tokens_to)).reshape(*lead, n_tiles, -1, D)


CASES = {
    "norm": {"ratios": ((1, 1), (2, 1)), "n_tiles": 2, "norm": True, "append_cls": True},
    "norm, padded, uint8": {"ratios": ((1, 1), (2, 1)), "n_tiles": 2, "pixels": torch.uint8, **EVERYTHING, "scale": 1 / 64, "shift": -2.0},
    "norm without bias": {**SMALL, "norm": True, "no": ("norm_bias",)},
    "norm without weight": {**SMALL, "norm": True, "no": ("norm_weight",)},
    "padding images": {"ratios": ((0, 0), (1, 1), (2, 1)), "empty": (0, 1), "append_cls": True, "pad_tokens_to": 8, "bias": True},
    "uint8 by channel": {"pixels": torch.uint8, "scale": [0.02, 0.01, 0.03], "shift": [-2.0, -1.0, -2.5]},
    "uint8 as it is": {"pixels": torch.uint8, "ratios": ((2, 1),), "n_tiles": 3},
    "scale alone": {**SMALL, "scale": 3.0},
    "shift alone": {**SMALL, "shift": [1.0, 2.0, 3.0]},
    "scale by channel, one shift": {**SMALL, "scale": [1.0, 2.0, 3.0], "shift": 0.5, "pixels": torch.float16, "dtype": torch.bfloat16},
    "fp32 pixels": {"pixels": torch.float32, "dtype": torch.bfloat16},
    "bf16 pixels": {"pixels": torch.bfloat16, "dtype": torch.float16, **SMALL},
    "no CLS": {"cls": False},
    "no CLS, padded": {"cls": False, "pad_tokens_to": 8, "norm": True, **SMALL},
    "no tables": {"local": False, "table": False, "pre": False, "bias": True},
    "no tables, ratio given": {"local": False, "table": False, "pre": False, "cls": False, **SMALL},
    "local alone": {"table": False, "pre": False, "ratios": None, "lead": (2,)},
    "pre alone": {"table": False, "local": False},
    "pre and local": {"table": False, "bias": True},
    "global alone": {"local": False, "pre": False},
    "no gates": {"gates": False},
    "one tile without a ratio": {"ratios": None, "lead": (2,), "n_tiles": 1},
    "fewer tiles than the table": {"ratios": ((1, 1), (2, 1), (1, 2)), "n_tiles": 2},
    "more tiles than a side": {"ratios": ((2, 3), (3, 2)), "n_tiles": 6, "grid": (1, 2)},
    "a tile without height": {**SMALL, "ratios": ((0, 2), (1, 1), (3, 0))},
    "patch 14": {"patch": (14, 14), "ratios": ((2, 1),), "n_tiles": 2, "grid": (2, 2)},
    "patch 16, one channel": {"patch": (16, 16), "C": 1, "ratios": ((2, 1),), "n_tiles": 2, "grid": (1, 2), "scale": 2.0},
    "patch 32, uint8": {"patch": (32, 32), "ratios": ((1, 1),), "n_tiles": 1, "grid": (1, 2), "pixels": torch.uint8, "scale": 1 / 256},
    "patch 8 x 1": {"patch": (8, 1), **SMALL},
    "a pixel a patch": {"patch": (1, 1), **SMALL},
    "a tile a patch": {"patch": (6, 4), **SMALL, "grid": (1, 1)},
    "four channels": {"C": 4, "scale": [1.0, 2.0, 3.0, 4.0], "shift": [0.0, 1.0, 2.0, 3.0], **SMALL},
    "D 1": {**SMALL, "D": 1},
    "D 70": {**SMALL, "D": 70, "norm": True},
    "images of videos": {"lead": (2, 1, 2), "ratios": ((1, 1), (1, 2), (2, 1), (0, 0)), "n_tiles": 2},
    "4-D images": {"lead": (), "ratios": ((2, 2),)},
    "bf16 weight, fp32 tables": {"dtype": torch.bfloat16, "tables": torch.float32, "norm": True, **SMALL},
    "fp32 weight, fp16 tables": {"tables": torch.float16, "bias": True, **SMALL},
    "channels last": {"layout": "channels_last"},
    "crop": {"layout": "crop", "pixels": torch.uint8, "scale": 0.01},
    "expanded": {"layout": "expanded"},
    "transposed": {"layout": "transposed"},
    "ids": {"ids": 9, "ratios": (0, 8, 3), "pad_tokens_to": 8},
    "ids, fewer tiles": {"ids": 5, "ratios": (4, 1), "n_tiles": 3, "norm": True, "grid": (1, 2)},
    "ids, one image": {"ids": 5, "ratios": (2,), "lead": ()},
}


def make(device, no=(), **options) -> Given:
    given = Given(device, **options)
    given.tensors |= dict.fromkeys(no)
    return given


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", ["mixed ratios", "norm and all"])
def test_against_a_loop_over_images(case, dtype, route, device):
    options = {} if case == "mixed ratios" else {**SMALL, "append_cls": True, **EVERYTHING}
    with routed(route):
        check(Given(device, dtype=dtype, **options), gradients=route != "gather" or dtype == torch.float16)


@pytest.mark.parametrize("route", [*BACKWARDS, "gemm or gather"])
@pytest.mark.parametrize("case", CASES)
def test_cases(case, route, device):
    """One product in one kernel by the two ways of reading pixels: from patches, and from images where those are what the case is about."""
    if route not in ROUTES:
        route = "gather" if {"patch", "pixels", "layout", "C", "scale", "shift"} & set(CASES[case]) else "gemm"
    with routed(route):
        check(make(device, **CASES[case]), gradients=route in BACKWARDS)


@pytest.mark.parametrize("case", ["mixed ratios", "norm and all", "uint8 by channel", "pre and local", "ids"])
def test_eager_backend(case, device):
    with fastfuse.backend("torch"):
        check(make(device, **CASES.get(case, EVERYTHING if "all" in case else {})))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("append, local_alone", [(False, False), (True, False), (False, True)])
def test_against_the_eager_modules(append, local_alone, route, device):
    options = {"append_cls": append, "pad_tokens_to": 8, "norm": append, "bias": local_alone, "table": not local_alone}
    with routed(route):
        check(Given(device, ratios=((2, 2), (0, 0), (1, 3)), grid=(2, 2), **options), by_modules, gradients=route in BACKWARDS)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("norm", [False, True])
def test_against_transformers(norm, route, device):
    """Padding tiles take the rows of their ids too."""
    with routed(route):
        check(Given(device, ratios=(0, 6, 3), ids=9, grid=(2, 2), norm=norm, pad_tokens_to=8), by_mllama, gradients=route in BACKWARDS)


@pytest.mark.parametrize("route", ROUTES)
def test_the_front_of_transformers_vision_model(route, device):
    batch = mllama.batch([["coffee"], ["chelsea", "astronaut"]])
    inputs = {n: batch[n].to(device) for n in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")}
    results = []
    for dtype in (None, torch.float32, torch.float64):
        model = mllama.build(mllama.config()).model.vision_model.to(device, dtype)
        if dtype is None:
            places, pre = model.gated_positional_embedding, model.pre_tile_positional_embedding
            D, n = model.hidden_size, model.num_patches
            tables = (places.embedding, places.tile_embedding.weight.view(-1, 4, n, D), places.gate, pre.embedding.weight.view(-1, 4, 1, D), pre.gate)
            norm = (model.layernorm_pre.weight, model.layernorm_pre.bias, model.layernorm_pre.eps)
            given = (inputs["pixel_values"], model.patch_embedding.weight, model.class_embedding, inputs["aspect_ratio_ids"], *tables)
            with routed(route):
                results.append(patch_embed(*given, norm=norm, pad_tokens_to=8).flatten(0, 1).flatten(1, 2))
        else:
            model.transformer.register_forward_pre_hook(lambda module, args: results.append(args[0]))
            with torch.no_grad():
                model(inputs["pixel_values"].to(dtype), inputs["aspect_ratio_ids"], inputs["aspect_ratio_mask"])
    assert_no_worse(*results)


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_a_padding_tile_has_its_patches_local_positions_and_cls(route, device):
    given = Given(device, ratios=((1, 2), (0, 0)), grid=(2, 2), D=16).only()
    t = given.tensors
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        y, bare = given(), patch_embed(t["images"], t["weight"])
    local = t["local_pos"] * (1 - t["gate"].tanh())
    tokens = torch.cat([t["cls"].expand(2, T, 1, -1), bare], 2)
    for image, tile in [(0, 2), (0, 3), *((1, i) for i in range(T))]:
        torch.testing.assert_close(y[image, tile], tokens[image, tile] + local, rtol=0, atol=2**-21)
    assert not torch.isclose(y[0, :2], tokens[0, :2] + local).all(-1).any()


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_in_whole_numbers_everything_is_exact(route, device):
    """Small integers have no rounding: each token is the sum of its parts to the bit, a padding tile without the tables."""
    given = Given(device, ratios=((1, 2), (0, 0), (3, 1)), grid=(2, 2), gates=False, append_cls=True, pad_tokens_to=8, bias=True)
    given.tensors = {n: None if t is None else torch.randint(-4, 5, t.shape, device=device).float().requires_grad_() for n, t in given.tensors.items()}
    wide = given.double()
    want = wide(torchtune_tiles.patch_embed)
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        y = given()
        assert torch.equal(y.double(), want) and not y[:, :, 5:].any()
        ones = torch.ones((), device=device).expand(y.shape)  # of y.sum()
        for dy in (torch.randint(-3, 4, y.shape, device=device).float(), ones):
            grads, exact = given.grads(y, dy, retain_graph=True), wide.grads(want, dy.double(), retain_graph=True)
            assert [n for n in exact if not torch.equal(grads[n].double(), exact[n])] == []


@pytest.mark.parametrize("route", [*BACKWARDS, "gemm", "torch"])
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("value", [3.0, torch.nan])
def test_padding_rows_are_zero_and_their_gradient_goes_nowhere(value, norm, route, device):
    given = Given(device, **SMALL, bias=True, norm=norm, pad_tokens_to=8)
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        y = given()
        dy = torch.randn_like(y)
        dy[:, :, 3:] = 0
        want = given.grads(given(), dy)
        dy[:, :, 3:] = value
        got = given.grads(y, dy)
    assert y.shape[2] == 8 and not y[:, :, 3:].any()
    assert [n for n in want if not torch.equal(got[n], want[n])] == []


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("norm", [False, True])
def test_float64_by_the_references(norm, backend, device):
    if device == "cuda" and backend == "auto":
        pytest.skip("kernels are for up to fp32")
    given = Given(device, dtype=torch.float64, norm=norm, bias=True)
    with fastfuse.backend(backend):
        y = given()
        got = [y, *given.grads(y).values()]
    want = given(torchtune_tiles.patch_embed)
    for g, w in zip(got, [want, *given.grads(want).values()], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("route", ["reference", "library", "gemm"])
@pytest.mark.parametrize("what", ["weight", "tables", "vectors and norm", "upstream"])
def test_any_strides_of_parameters_and_upstream(what, route, device):
    given = Given(device, **SMALL, **EVERYTHING)
    strided = {"tables": ("local_pos", "global_pos", "pre_pos"), "vectors and norm": ("cls", "bias", "norm_weight", "norm_bias")}.get(what, ())
    for name in strided:
        t = given.tensors[name].detach()
        given.tensors[name] = (t.mT.contiguous().mT if t.dim() > 1 else t.repeat_interleave(2)[::2]).requires_grad_()
    if what == "weight":
        given.tensors["weight"] = given.tensors["weight"].detach().to(memory_format=torch.channels_last).requires_grad_()
    if what == "tables":
        given.ratio = given.ratio.to(torch.int32).repeat_interleave(2, -1)[..., ::2]
    with routed(route):
        check(given, gradients=route in BACKWARDS, layout=lambda dy: dy.mT.contiguous().mT if what == "upstream" else dy)


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
@pytest.mark.parametrize("shape", ["images", "tiles"])
def test_nothing_to_embed(shape, route, device):
    given = Given(device, **SMALL, norm=True, bias=True)
    if shape == "images":
        given.tensors["images"] = given.tensors["images"].detach()[:0].requires_grad_()
        given.ratio = given.ratio[:0]
    if shape == "tiles":
        given.tensors["images"] = given.tensors["images"].detach()[:, :0].requires_grad_()
        given.ratio = torch.zeros_like(given.ratio)
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        y = given()
        grads = given.grads(y)
    assert y.shape == {"images": (0, 2, 3, 8), "tiles": (2, 0, 3, 8)}[shape]
    assert all(g.shape == given.tensors[n].shape and not g.any() for n, g in grads.items())


def test_rows_and_factors_of_the_kernel_are_the_loop_s(device):
    """The kernel that a GPU has no ValueError beside: every ratio that fits and every one that does not, more tiles than one block."""
    n_tiles, side = 6, T
    every = [*itertools.product(range(-1, side + 2), repeat=2), (2**32 + 1, 1), (1, 2**32)]  # int32 would see (1, 1) and (1, 0)
    ratios = every * 5
    fits = torch.empty((), dtype=torch.bool, device=device)
    factors, rows = torch.empty(3, device=device), torch.empty(len(ratios) * n_tiles, dtype=torch.int32, device=device)

    def right(h, w):
        return 0 <= h <= side and 0 <= w <= side and h * w <= n_tiles

    def launch(ratios, ids=False, entries=side):
        ratio = torch.tensor(ratios, device=device)
        tile_rows_kernel[(1,)](ratio, None, None, rows, factors, fits, len(ratios) * n_tiles, n_tiles, side, entries, IDS=ids, BLOCK=1024)
        return rows[: len(ratios) * n_tiles].tolist(), bool(fits)

    want = [t // w * side + t % w if right(h, w) and t < h * w else -1 for h, w in ratios for t in range(n_tiles)]
    assert len(want) > 1024 and launch(ratios) == (want, False) and factors.tolist() == [1, 1, 1]
    assert launch([r for r in ratios if right(*r)])[1]
    for ratio in every:
        assert launch([(1, 1), ratio])[1] == right(*ratio), ratio
    n_tiles = side
    assert launch([0, 8, 3], True, 9) == ([e * side + t for e in (0, 8, 3) for t in range(side)], True)
    assert [launch([1, e], True, 9)[1] for e in (-1, 0, 8, 9, 2**32)] == [False, True, True, False, False]


def test_gates_of_any_size_keep_their_digits(device):
    values = torch.tensor([0, 1e-30, 1e-8, -3e-4, 0.01, -0.1, 0.199, 0.201, -0.5, 1, -2, 5, 9, -9, 20, -50, 1e4], device=device)
    ratio, fits = torch.ones(1, 2, dtype=torch.int64, device=device), torch.empty((), dtype=torch.bool, device=device)
    got = torch.empty(len(values), 3, device=device)
    for value, row in zip(values, got, strict=True):
        rows = torch.empty(1, dtype=torch.int32, device=device)
        tile_rows_kernel[(1,)](ratio, value, value, rows, row, fits, 1, 1, T, T, IDS=False, BLOCK=1024)
    exact = values.double()
    for factor, eager, true in ((0, 1 - values.tanh(), 2 / (1 + (2 * exact).exp())), (1, values.tanh(), exact.tanh()), (2, values.tanh(), exact.tanh())):
        for g, *triple in zip(values, got[:, factor], eager, true, strict=True):
            assert_no_worse(*triple, f"factor {factor} of {g}")


class Counted(TorchDispatchMode):
    """Ops that run, inside of fastfuse's too, and the bytes of their results: what a step writes. Views write nothing."""

    def __init__(self):
        super().__init__()
        self.ops, self.bytes = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "fastfuse":
            with self:
                return inside(func)(*args)
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.ops[func.overloadpacket.__name__] += 1
            self.bytes += sum(t.numel() * t.element_size() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
        return out


def inside(func):
    """What an op of fastfuse runs here, as Python: a dispatch mode would see one op instead of those in it."""
    op = OPS[func._schema.name.removeprefix("fastfuse::")]
    return op._op._backend_fns["cuda" if torch.cuda.is_available() else "cpu"]


class NoWaiting(Counted):
    """Fails where a result's size or a value of a tensor has to reach the host."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index") and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in torch.utils._pytree.tree_leaves(args[1])
        )
        assert name not in self.WAITING and not by_mask, f"{func} waits for the device"
        return super().__torch_dispatch__(func, types, args, kwargs)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    """The names of the kernels that were launched. What the interpreter does inside of one is out of every mode's sight."""
    names = []

    for module in MODULES:
        for name in [n for n in module if n.endswith("_kernel")]:
            monkeypatch.setitem(module, name, Launched(module[name], name, lambda name, grid: names.append(name)))
    return names


def step(given: Given, mode, fn=patch_embed):
    with mode:
        y = fn(given) if fn is not patch_embed else given()
        torch.autograd.grad(y, given.leaves().values(), torch.ones_like(y))
    return mode


def loop(given: Given) -> Tensor:
    return given(torchtune_tiles.patch_embed)


FULL = {"ratios": ((2, 2),), "grid": (1, 2), "bias": True, "norm": True, "pad_tokens_to": 4}


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("options", [FULL, {"ratios": (3,), "ids": 9}, {"ratios": ((2, 2),), "pixels": torch.uint8, "scale": [0.1, 0.2, 0.3]}])
def test_a_step_is_linear_in_the_number_of_images_and_its_ops_are_constant(options, backend, device, launches):
    with fastfuse.backend(backend), tune.pin("patch_embed", None):
        one, sixteen = (step(Given(device, **options | {"ratios": options["ratios"] * n}), Counted()) for n in (1, 16))
    assert sixteen.ops == one.ops
    assert len(launches) % 2 == 0 and launches[: len(launches) // 2] == launches[len(launches) // 2 :]
    assert one.bytes < sixteen.bytes <= 16.5 * one.bytes


def test_the_count_finds_torchtunes_loop_out(device):
    one, sixteen = (step(Given(device, **FULL | {"ratios": ((2, 2),) * n}), Counted(), loop) for n in (1, 16))
    assert sixteen.ops.total() > 5 * one.ops.total() and sixteen.bytes > 40 * one.bytes


def values_are_at_hand(monkeypatch, so: bool) -> None:
    for module in (MODULES[0], MODULES[2]):
        monkeypatch.setitem(module, "values_are_at_hand", lambda t: so)


@pytest.mark.parametrize("route", [*BACKWARDS, "gemm", "gather", "torch"])
@pytest.mark.parametrize(
    "options", [FULL, {"ratios": (3, 0), "ids": 9}, {"pixels": torch.uint8, "scale": [0.1, 0.2, 0.3], "shift": 1.0}, {**SMALL, "local": False, "norm": True}]
)
def test_nothing_waits_for_the_device(options, route, device, launches, monkeypatch):
    """Without the look at the ratios that a CPU's values allow."""
    values_are_at_hand(monkeypatch, False)
    given = Given(device, **options)
    with fastfuse.backend("torch") if route == "torch" else routed(route), NoReading():
        assert step(given, NoWaiting()).ops["_assert_async"] > 0


def test_waiting_is_found_out(device, launches, monkeypatch):
    given = Given(device, **SMALL)
    with pytest.raises(AssertionError, match=r"_local_scalar_dense.* waits"):
        step(given, NoWaiting(), loop)
    for call in (Tensor.tolist, bool, lambda t: torch.tensor([1.0]), lambda t: t.cpu()):
        with pytest.raises(AssertionError, match="waits"), NoReading():
            call(torch.zeros(()))
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        given.tensors["bias"] = given.ratio[given.ratio > 1]
    values_are_at_hand(monkeypatch, True)
    for backend in ("auto", "torch"):
        with pytest.raises(AssertionError, match="waits"), fastfuse.backend(backend), NoReading():
            step(given, NoWaiting())


@pytest.mark.parametrize("route", BACKWARDS)
@pytest.mark.parametrize("options", [{"gates": True}, EVERYTHING, {"gates": False, "local": False}, {"cls": False, "pre": False}])
def test_only_what_requires_a_gradient_is_computed_and_is_the_same(options, route, device, launches):
    given = Given(device, **SMALL | options)
    with routed(route):
        y = given()
        dy = torch.randn_like(y)
        every = given.grads(y, dy)
        alone = ["weight", "cls", "norm_bias"] if "norm" in options else every
        for names in [[n] for n in alone] + [["gate", "bias"], ["pre_gate", "cls"], ["norm_weight", "images"], ["weight", "global_pos"]]:
            if not set(names) <= set(every):
                continue
            part = given.only(*names)
            y = part()
            launches.clear()
            mode = Counted()
            with mode:
                found = part.grads(y, dy)
            for n in names:  # the same but for the order of sums, which what else is computed may change
                torch.testing.assert_close(found[n], every[n])
            products = sum(mode.ops[op] for op in ("matmul", "mm", "bmm", "convolution_backward"))
            assert products == len({"weight", "images"} & set(names)), names
            assert ("patchify_kernel" in launches) == (route != "reference" and "weight" in names), names
            by_row = {"gate", "pre_gate", "global_pos", "pre_pos"} & set(names)
            assert ("place_bwd_kernel" in launches) == bool(route != "reference" and by_row), names
            assert ("norm_bwd_kernel" in launches) == ("norm" in options and route != "reference"), names
        assert not given.only()().requires_grad


@pytest.mark.parametrize("route", BACKWARDS)
@pytest.mark.parametrize("norm", [False, True])
def test_nothing_new_is_saved_but_what_the_norm_was_given(norm, route, device):
    given = Given(device, norm=norm, pad_tokens_to=8, bias=True)

    def saved(given):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            y = given()
        own = {t.untyped_storage().data_ptr() for t in (*given.tensors.values(), given.ratio) if t is not None}
        fresh = [tuple(t.shape) for t in kept if t.numel() and t.untyped_storage().data_ptr() not in own and t.untyped_storage().nbytes() > 8]
        return y, kept, fresh

    with routed(route):
        y, _, fresh = saved(given)
        assert fresh == ([(12, 16, 20), (2, y[..., 0].numel())] if norm else [])
        y, kept, _ = saved(given.only())
        assert not kept and not y.requires_grad
        assert saved(given.only("gate"))[2] == fresh
        held = {t.untyped_storage().data_ptr() for t in saved(given.only("gate"))[1] if t.untyped_storage().nbytes() > 8}
        # 7 GB of pixels at the 90B's size: a gate's gradient needs none of them, and where there is a norm its own gradient does
        assert (given.tensors["images"].untyped_storage().data_ptr() in held) == norm
        with torch.no_grad():
            assert not saved(given)[1]


SAMPLES = {
    "norm without CLS": {**SMALL, "cls": False, "norm": True, "pad_tokens_to": 8, "dtype": torch.bfloat16},
    "everything": {**SMALL, **EVERYTHING, "layout": "crop"},
    "ids, uint8": {**SMALL, "ratios": (1, 0), "ids": 3, "pixels": torch.uint8, "scale": 0.1},
    "no tables": {**SMALL, "local": False, "table": False, "pre": False, "cls": False, "dtype": torch.float16},
    "local alone": {**SMALL, "table": False, "pre": False},
    "no images": {**SMALL, "ratios": (), "norm": True},
}


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("sample", SAMPLES)
def test_ops(sample, interpret, device):
    given = Given(device, **SAMPLES[sample])
    t, options = given.tensors, dict(given.options)
    for name in ("scale", "shift"):
        values = options.get(name)
        options[name] = values if values is None else tuple(values) if isinstance(values, list) else (values,)
    ratio, tables, keep = given.ratio if t["global_pos"] is not None else None, Tables(*[t[n] for n in Tables._fields]), given.eps is not None
    args = PatchEmbedArgs(t["images"], t["weight"], ratio, tables, given.eps, **options, keep=keep, interpret=interpret)
    with tune.pin("patch_embed", None if keep else GEMM):
        checks = (
            "test_schema",
            "test_faketensor",
            *(("test_autograd_registration", "test_aot_dispatch_dynamic") if sample == "ids, uint8" and not interpret else ()),
        )
        opcheck(MODULES[0]["patch_embed_op"], args, checks=checks)
        args = tree_map_only(Tensor, Tensor.detach, args)
        y, *kept = MODULES[0]["patch_embed_op"](args)
        needs = tree_map_only(Tensor, Tensor.is_floating_point, args)
        dy = torch.ones((), device=device).to(y.dtype).expand(y.shape)
        opcheck(patch_embed_bwd.patch_embed_bwd, PatchEmbedBwdArgs(dy, args, *(kept or (None, None)), needs, interpret), checks=checks[:3])


def test_compiled_by_inductor(device):
    given = Given(device, **SMALL, **EVERYTHING)
    with torch._inductor.config.patch(force_disable_caches=True):  # which know an op by its name, whatever strides it had then
        y, want = torch.compile(Given.__call__, fullgraph=True)(given), given()
        torch.testing.assert_close(y, want)
        for a, b in zip(given.grads(y).values(), given.grads(want).values(), strict=True):
            torch.testing.assert_close(a, b)


def test_one_graph_for_every_number_of_images(device):
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(Given.__call__, fullgraph=True, backend=counter)
    for n in (2, 5, 7):
        given = Given(device, **SMALL | {"ratios": (3,) * n}, ids=9, pixels=torch.uint8, scale=0.1, norm=True, pad_tokens_to=8)
        for t in (given.tensors["images"], given.ratio):
            torch._dynamo.mark_dynamic(t, 0)
        y, want = run(given), given()
        torch.testing.assert_close(y, want)
        for a, b in zip(given.grads(y).values(), given.grads(want).values(), strict=True):
            torch.testing.assert_close(a, b)
    assert counter.frame_count == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="an assertion on the device ends its context")
def test_compiled_a_ratio_without_a_place_is_an_error_too(device):
    given = Given(device, **SMALL).only()
    given.ratio = torch.tensor([[1, 2], [2, 2]])
    with fastfuse.backend("torch"), pytest.raises(RuntimeError, match="aspect_ratio"):
        torch.compile(Given.__call__, fullgraph=True, backend="eager")(given)


@pytest.mark.parametrize("route", [*BACKWARDS, "gemm", "torch"])
@pytest.mark.parametrize("options", [{"local": False, "table": False, "pre": False}, {}, {"tables": torch.bfloat16}, {"norm": True, "table": False}])
def test_autocast(options, route, device):
    given = Given(device, **SMALL | {"lead": (2,)} | options)
    with torch.autocast(device, torch.bfloat16), fastfuse.backend("torch") if route == "torch" else routed(route):
        y = given()
        conv = F.conv2d(given.tensors["images"].flatten(0, 1), given.tensors["weight"])
        tables = [given.tensors[n].dtype for n in ("local_pos", "global_pos") if given.tensors[n] is not None]
        assert conv.dtype == torch.bfloat16 and y.dtype == (torch.promote_types(conv.dtype, tables[0]) if tables else conv.dtype)
    outside = given.only()
    outside.tensors["weight"] = outside.tensors["weight"].bfloat16()
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        assert torch.equal(y, outside())
    assert all(g.dtype == given.tensors[n].dtype and g.isfinite().all() for n, g in given.grads(y).items())


@pytest.mark.parametrize("route", [*BACKWARDS, "torch"])
def test_checkpointing(route, device):
    given = Given(device, **SMALL, **EVERYTHING)
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        plain, again = given(), checkpoint(given, use_reentrant=False)
        dy = torch.randn_like(plain)
        assert torch.equal(plain, again)
        for a, b in zip(given.grads(plain, dy).values(), given.grads(again, dy).values(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("route", ["reference", "library", "gemm"])
def test_two_runs_are_equal_to_the_bit(route, device):
    given = Given(device, **SMALL | EVERYTHING)
    with routed(route):
        runs = [[y := given(), *given.grads(y, y.detach()).values()] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("options", [EVERYTHING, {"ids": 9, "ratios": (3, 0)}, {"dtype": torch.bfloat16, "tables": torch.float32, "norm": True}])
def test_shapes_without_memory(options, backend):
    want = Given("cpu", **options)
    y = want(backend=backend)
    meta = want.only()
    meta.tensors = {n: None if t is None else t.to("meta") for n, t in meta.tensors.items()}
    meta.ratio = want.ratio.to("meta")
    got = meta(backend=backend)
    assert (got.shape, got.dtype) == (y.shape, y.dtype)
    mode, given = FakeTensorMode(), want.only()
    given.tensors = {n: t if t is None else mode.from_tensor(t.detach()).requires_grad_(t.requires_grad) for n, t in want.tensors.items()}
    given.ratio = mode.from_tensor(want.ratio)
    with mode:
        got = given(backend=backend)
        assert (got.shape, got.dtype) == (y.shape, y.dtype)
        assert [(g.shape, g.dtype) for g in given.grads(got).values()] == [(t.shape, t.dtype) for t in want.leaves().values()]


@pytest.mark.parametrize("backend", ["auto", "torch", "triton"])
@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_gradients(norm, backend, device):
    """A penalty on gradients."""
    given = Given(device, **SMALL, bias=True, norm=norm)

    def penalty(y):
        grads = torch.autograd.grad(y.square().sum(), given.leaves().values(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given.leaves().values())

    with fastfuse.backend(backend):
        got = penalty(given())
    want = penalty(loop(given))
    for name, g, w in zip(given.leaves(), got, want, strict=True):
        assert ((g - w).norm() / w.norm()) < 12 * 2**-23 * 64**0.5, name  # a dozen sums of tens of terms, in fp32


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_gradients_of_a_frozen_patch_layer(backend, device):
    """With weight and pixels frozen the second derivative of what lies behind the norm still needs them."""
    given = Given(device, **SMALL, norm=True).only("gate", "local_pos", "norm_weight")

    def penalty(y):
        grads = torch.autograd.grad(y.square().sum(), given.leaves().values(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), given.leaves().values())

    with fastfuse.backend(backend):
        got = penalty(given())
    for g, w in zip(got, penalty(loop(given)), strict=True):
        assert ((g - w).norm() / w.norm()) < 12 * 2**-23 * 64**0.5


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_padding_beside_a_norm_without_eps(route, device):
    """The deviation of a padding row is 0: nothing of 1 / 0 may reach a result or a gradient."""
    given = Given(device, **SMALL, bias=True, norm=True, pad_tokens_to=8)
    given.eps = 0.0
    with fastfuse.backend("torch") if route == "torch" else routed(route):
        check(given, gradients=route in (*BACKWARDS, "torch"))  # which no inf or NaN passes
        assert not given()[:, :, 3:].any()


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_vmap_over_parameters(backend, device):
    """An ensemble's positions in one call, by the formula: the op has no rule of its own for it."""
    given = Given(device, **SMALL).only()
    t = given.tensors
    many = torch.randn(3, *t["local_pos"].shape, device=device)

    def one(local):
        return patch_embed(t["images"], t["weight"], t["cls"], given.ratio, local, t["global_pos"], t["gate"], t["pre_pos"], t["pre_gate"], backend=backend)

    if backend == "auto":
        with pytest.raises(Exception, match=r"vmap|batching"):
            torch.func.vmap(one)(many)
        return
    torch.testing.assert_close(torch.func.vmap(one)(many), torch.stack([one(local) for local in many]))


@pytest.mark.parametrize(
    "arch, shape, want",
    [
        ("sm_90", {}, (128, 256, False)),
        ("sm_90", {"M": 4096}, (128, 128, False)),
        ("sm_90", {"norm": 1}, None),
        ("sm_90", {"norm": 1, "PW": 16}, (128, 256, True)),
        ("sm_90", {"PW": 32, "dtype": "fp32", "out": "fp32"}, (128, 128, False)),
        ("gfx942", {"out": "fp32"}, (64, 128, False)),
    ],
)
def test_the_row_that_shapes_pick(arch, shape, want):
    """As the kernels' rows stand before they are measured; the library multiplies where a norm follows anyway."""
    tile = tune.pick("patch_embed", arch, **{"dtype": "16-bit", "out": "16-bit", "norm": 0, "M": 64 * 1601, "N": 1280, "K": 588, "PW": 14} | shape)
    assert (None if tile is None else (tile["BLOCK_M"], tile["BLOCK_N"], tile["DIRECT"])) == want


def test_cost_counts_each_tensor_once():
    images = torch.empty(5, 4, 3, 28, 42, dtype=torch.uint8, device="meta")
    weight = torch.empty(64, 3, 14, 14, dtype=torch.bfloat16, device="meta")
    cls, local = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in ((64,), (7, 64)))
    table, pre = (torch.empty(4, 4, n, 64, dtype=torch.bfloat16, device="meta") for n in (7, 1))
    pixels, kernel, flops = 5 * 4 * 3 * 28 * 42, 2 * 64 * 588, 2 * 5 * 4 * 6 * 64 * 588
    assert patch_embed_cost(images, weight) == Cost(pixels + kernel + 2 * 20 * 6 * 64, flops)
    tables = {"local_pos": local, "global_pos": table, "pre_pos": pre}
    # Images of up to 4 tiles reach 8 of the 16 entries: the first row and column, and (1, 1). All of a gradient is written.
    held, whole = (2 * 64 * (1 + 7 + entries * (7 + 1)) for entries in (8, 16))
    assert patch_embed_cost(images, weight, cls, **tables, pad_tokens_to=8) == Cost(pixels + kernel + held + 2 * 20 * 8 * 64, flops)
    assert patch_embed_bwd_cost(images, weight, cls, **tables, pad_tokens_to=8) == Cost(pixels + kernel + held + 2 * 20 * 8 * 64 + whole, flops)
    two = 2 * 64 * (1 + 7 + 2 * 7 + 2)  # a pair of tiles takes two of the entries
    small = Cost(2 * 3 * 28 * 42 + kernel + two + 2 * 2 * 7 * 64, flops // 10)
    assert patch_embed_cost(images[:1, :2], weight, cls, **tables) == small
    wide = patch_embed_cost(images, weight, cls, local_pos=local.float())
    assert wide == Cost(pixels + kernel + 2 * 64 + 4 * 7 * 64 + 4 * 20 * 7 * 64, flops)


def refusals():
    ok = {"ratios": ((2, 2), (1, 1)), "grid": (2, 2)}

    def call(change=None, ratio=False, given=None, **more):
        def run():
            g = Given("cpu", **ok | (given or {}))
            if change:
                g.tensors |= {n: f(g.tensors[n]) for n, f in change.items()}
            if ratio is not False:
                g.ratio = ratio
            g.options |= more
            return g()

        return run

    def ratios(*r):
        return torch.tensor(r)

    def norm(value):
        g = Given("cpu", **ok)
        return lambda: patch_embed(g.tensors["images"], g.tensors["weight"], norm=value)

    V, Ty = ValueError, TypeError
    bare = dict.fromkeys(("local_pos", "global_pos", "gate", "pre_pos", "pre_gate"), lambda t: None)
    return {
        "height": (call({"images": lambda t: t[..., :3, :]}), V, "tiles are 3 x 6 pixels, patches 2 x 3: patches must divide tiles"),
        "width": (call({"images": lambda t: t[..., :4]}), V, "tiles are 4 x 4 pixels, patches 2 x 3"),
        "no pixels": (call({"images": lambda t: t[..., :0]}), V, "tiles are 4 x 0 pixels"),
        "three dims": (call({"images": lambda t: t[0, 0]}), V, r"images has shape \(3, 4, 6\), expected \(..., n_tiles, C, H, W\)"),
        "weight dims": (call({"weight": lambda t: t.flatten(1)}), V, r"weight has shape \(20, 18\), expected \(D, C, ph, pw\)"),
        "channels": (call({"images": lambda t: t[:, :, :2]}), V, "images have 2 channels, weight takes 3"),
        "int images": (call({"images": lambda t: t.detach().int()}), V, "images is torch.int32, expected uint8 or floating point"),
        "bool images": (call({"images": lambda t: t.detach() > 0}), V, "images is torch.bool, expected uint8"),
        "too wide": (call(ratio=ratios((1, 1), (1, 5))), V, r"aspect_ratio has \[1, 5\].*, images have 4 tiles and max_num_tiles is 4"),
        "too many": (call(ratio=ratios((3, 2), (1, 1))), V, r"aspect_ratio has \[3, 2\].*, images have 4 tiles"),
        "negative": (call(ratio=ratios((1, 1), (-2, -2))), V, r"aspect_ratio has \[-2, -2\].*, images have 4 tiles"),
        "huge": (call(ratio=ratios((1, 1), (2**32 + 1, 1))), V, r"aspect_ratio has \[4294967297, 1\].*, images have 4 tiles"),
        "no ratio": (call(ratio=None), V, "aspect_ratio is None, images have 4 tiles that pre_pos places"),
        "no ratio, global": (
            call({"pre_pos": lambda t: None, "pre_gate": lambda t: None}, None),
            V,
            "aspect_ratio is None, images have 4 tiles that global_pos places",
        ),
        "float ratio": (call(ratio=ratios((1.0, 1.0), (1.0, 1.0))), V, "aspect_ratio is torch.float32, expected integers"),
        "bool ratio": (call(ratio=ratios((True, True), (True, True))), V, "aspect_ratio is torch.bool, expected integers"),
        "ratio's lead": (call(ratio=ratios((1, 1))), V, r"aspect_ratio has shape \(1, 2\), images need \(2, 2\) of \(h, w\), or \(2,\) of ids"),
        "ratio of three": (call(ratio=ratios((1, 1, 1), (1, 1, 1))), V, r"aspect_ratio has shape \(2, 3\), images need \(2, 2\)"),
        "ratio unused": (call(bare, ratios((1, 1))), V, r"aspect_ratio has shape \(1, 2\), images need \(2, 2\)"),
        "ratio a list": (call(ratio=[[1, 1], [1, 1]]), Ty, "aspect_ratio is a list, not a tensor"),
        "local": (call({"local_pos": lambda t: t[:4]}), V, r"local_pos has shape \(4, 20\), expected \(5, 20\)"),
        "global": (call({"global_pos": lambda t: t[:, :, :4]}), V, r"global_pos has shape \(4, 4, 4, 20\), expected \[T, T, 5, 20\] or \[ids, T, 5, 20\]"),
        "global dims": (call({"global_pos": lambda t: t[0]}), V, r"global_pos has shape \(4, 5, 20\), expected \[T, T, 5, 20\]"),
        "pre": (call({"pre_pos": lambda t: t[..., :19]}), V, r"pre_pos has shape \(4, 4, 1, 19\), expected \[T, T, 1, 20\]"),
        "pre and global": (call({"pre_pos": lambda t: t[:3, :3]}), V, r"global_pos is for \(4, 4\) tiles, pre_pos for \(3, 3\)"),
        "oblong": (
            call({"pre_pos": lambda t: t[:3], "global_pos": lambda t: t[:3]}),
            V,
            r"tables are for \[3, 4\] tiles, aspect_ratio in \(h, w\) needs \[T, T\]",
        ),
        "cls": (call({"cls": lambda t: t[:4]}), V, r"cls has shape \(4,\), expected \(20,\)"),
        "bias": (call({"bias": lambda t: torch.ones(4)}), V, r"bias has shape \(4,\), expected \(20,\)"),
        "norm weight": (norm((torch.ones(4), None, 1e-5)), V, r"norm_weight has shape \(4,\), expected \(20,\)"),
        "norm of two": (norm((torch.ones(20), torch.ones(20))), Ty, r"norm is .*expected \(weight, bias, eps\)"),
        "norm of matrices": (norm((torch.ones(3, 20), torch.ones(3, 20), None)), Ty, r"norm is .*expected \(weight, bias, eps\)"),
        "eps": (norm((None, None, "1e-5")), Ty, r"expected \(weight, bias, eps\) with a number for eps"),
        "norm a module": (norm(nn.LayerNorm(20)), Ty, r"norm is .*LayerNorm.*expected \(weight, bias, eps\)"),
        "gate of two": (call({"gate": lambda t: torch.ones(2)}), V, r"gate has shape \(2,\), expected one number"),
        "pre_gate of two": (call({"pre_gate": lambda t: torch.ones(2)}), V, r"pre_gate has shape \(2,\), expected one number"),
        "gate alone": (call({"global_pos": lambda t: None}), V, "gate is given, global_pos is None: there is nothing to gate"),
        "pre_gate alone": (call({"pre_pos": lambda t: None}), V, "pre_gate is given, pre_pos is None"),
        "gate a number": (call({"gate": lambda t: 0.5}), Ty, "gate is a float, not a tensor"),
        "id": (call(given={"ids": 9, "ratios": (3, 9)}), V, "aspect_ratio has 9, tables have ids 0 to 8"),
        "negative id": (call(given={"ids": 9, "ratios": (-1, 3)}), V, "aspect_ratio has -1, tables have ids 0 to 8"),
        "tiles of an id": (call(given={"ids": 9, "ratios": (1, 3), "n_tiles": 5}), V, "images have 5 tiles, tables for ids hold 4"),
        "scale of two": (call(scale=[1.0, 2.0]), V, "scale has 2 numbers, images have 3 channels"),
        "shift of four": (call(shift=(1.0, 2.0, 3.0, 4.0)), V, "shift has 4 numbers, images have 3 channels"),
        "scale a tensor": (call(scale=torch.ones(3)), Ty, "scale is a tensor, expected a number or one for each channel"),
        "scale of tensors": (call(scale=[torch.ones(())] * 3), Ty, "scale"),
        "scale a word": (call(scale="much"), Ty, "scale is 'much', expected a number"),
        "no padding": (call(pad_tokens_to=0), V, "pad_tokens_to is 0, expected a whole number >= 1"),
        "padding by half": (call(pad_tokens_to=1.5), V, "pad_tokens_to is 1.5"),
        "device": (call({"weight": lambda t: t.to("meta")}), V, "images is on cpu, weight on meta"),
        "table's device": (call({"pre_pos": lambda t: t.to("meta")}), V, "images is on cpu, pre_pos on meta"),
        "weight's dtype": (call({"weight": lambda t: t.detach().to(torch.int8)}), V, "weight is torch.int8, expected floating point"),
        "backend": (call(backend="cuda"), V, "backend is 'cuda', not one of"),
        "float64": (call({"weight": lambda t: t.double()}, backend="triton"), fastfuse.Unsupported, "weight is torch.float64, covered are bf16, fp16 and fp32"),
        "float64 table": (call({"local_pos": lambda t: t.double()}, backend="triton"), fastfuse.Unsupported, "local_pos is torch.float64, covered are"),
        "float64 images": (call({"images": lambda t: t.double()}, backend="triton"), fastfuse.Unsupported, "images is torch.float64, covered are uint8"),
        "fp8 weight": (call({"weight": lambda t: t.detach().to(torch.float8_e4m3fn)}, backend="triton"), fastfuse.Unsupported, "weight is torch.float8_e4m3fn"),
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="values are looked at on a CPU alone")
@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", refusals())
def test_refusals(case, backend, launches):
    call, error, message = refusals()[case]
    with fastfuse.backend(backend), pytest.raises(error, match=message) as e:
        call()
    assert "\n" not in str(e.value)
    assert set(launches) <= {"tile_rows_kernel"}


@pytest.mark.parametrize("route", ["library", "gemm", "gather"])
@pytest.mark.parametrize(
    "options", [EVERYTHING, {"ids": 9, "ratios": (3, 0, 1), "layout": "crop"}, {"dtype": torch.float16, "pre": False, "layout": "expanded"}]
)
def test_a_plan_serves_other_values(options, route, device):
    """A plan is made of shapes, strides, dtypes and constants: what the first call's tensors held must not be in it."""
    calls, forward, backward = [], MODULES[0]["patch_embed_op"].launch.plan, patch_embed_bwd.patch_embed_bwd.launch.plan
    options = {"ratios": ((2, 2), (1, 3), (4, 1))} | options
    for ratios in (options["ratios"], options["ratios"][::-1]):
        given = Given(device, **options | {"ratios": ratios}).only()
        t, more = given.tensors, {n: (v,) if isinstance(v, float) else tuple(v) if isinstance(v, list) else v for n, v in given.options.items()}
        tables = Tables(*[t[n] for n in Tables._fields])
        calls.append(PatchEmbedArgs(t["images"], t["weight"], given.ratio, tables, given.eps, **more, keep=given.eps is not None, interpret=True))
    first, second = calls
    with routed(route):
        plan, own = forward(first), forward(second)
        plan(first)
        y, *kept = own(second)
        assert all(torch.equal(a, b) for a, b in zip(plan(second), (y, *kept), strict=True))
        needs = tree_map_only(Tensor, lambda t: t.is_floating_point(), first)
        first, second = (PatchEmbedBwdArgs(torch.randn_like(y), args, *(kept or (None, None)), needs, True) for args in calls)
        plan, own = backward(first), backward(second)
        plan(first)
        assert all(torch.equal(a, b) for a, b in zip(plan(second), own(second), strict=True))


def test_a_call_that_passed_the_checks_lets_no_other_through(device):
    """What is kept of it must not equal a refused call: 1.0 equals 1, and modes, backends and dtypes change between calls."""
    given = Given(device, **SMALL)
    options = {"pad_tokens_to": 1, "scale": 2.0, "append_cls": True}
    want = given(**options)
    assert torch.equal(given(**options), want)
    for more, error in (
        ({"pad_tokens_to": 1.0}, ValueError),
        ({"scale": 2 + 0j}, TypeError),
        ({"scale": [2.0, 2.0]}, ValueError),
        ({"backend": "no"}, ValueError),
    ):
        with pytest.raises(error):
            given(**options | more)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fastfuse.Unsupported, match="forward-mode"):
        given(**options)
    with pytest.raises(fastfuse.Unsupported, match=r"torch\.func"):
        torch.func.vmap(lambda _: given(**options))(torch.zeros(2, device=device))
    wide = given.only()
    wide.tensors["weight"] = wide.tensors["weight"].double()
    with fastfuse.backend("triton"):
        with torch.autocast(device, torch.bfloat16):
            wide(**options)
        with pytest.raises(fastfuse.Unsupported, match=r"weight is torch\.float64"):
            wide(**options)
    integers = given.only()
    integers.tensors["local_pos"] = integers.tensors["local_pos"].long()
    with pytest.raises(ValueError, match=r"local_pos is torch\.int64"):
        integers(**options)
    assert torch.equal(given(**options), want)
