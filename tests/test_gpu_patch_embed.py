"""On a GPU: patch embedding at Llama-3.2-Vision's shapes, every row of this chip, CUDA graphs, compile, no waiting."""

import pytest
import torch
import torchtune_tiles
from numerics import assert_no_worse, in_several_orders
from reference import assert_results_no_worse

from fastfuse import tune
from fastfuse.modules import TiledTokenPositionalEmbedding, TilePositionalEmbedding, VisionTransformer
from fastfuse.ops import patch_embed

pytestmark = pytest.mark.gpu
RATIOS = [(2, 2), (1, 3), (1, 1), (4, 1)]


def chip() -> str:
    return tune.covering_arch("patch_embed", tune.arch_of(torch.device("cuda", 0)))


def rows() -> list:
    """The library's route and every row of this chip for 16-bit operands and results."""
    if not torch.cuda.is_available():
        return [None]
    mine = [r for r in tune.table("patch_embed") if r["arch"] == chip() and r["tile"] and r["when"].get("dtype") != "fp32"]
    return [None, *(tune.Tile(r["tile"]["constants"], r["tile"]["num_warps"], r["tile"]["num_stages"]) for r in mine)]


def given(images: int, dtype: torch.dtype, patch: int = 14, tables: torch.dtype | None = None, D: int = 1280, side: int = 560) -> dict:
    n = (side // patch) ** 2 + 1

    def leaf(*shape, scale=1.0):
        return (torch.randn(shape, device="cuda") * scale).to(tables or dtype).requires_grad_()

    weight = (torch.randn(D, 3, patch, patch, device="cuda") * (3 * patch**2) ** -0.5).to(dtype).requires_grad_()
    tensors = {"weight": weight, "cls": leaf(D), "local_pos": leaf(n, D), "global_pos": leaf(4, 4, n, D), "gate": leaf(1), "pre_pos": leaf(4, 4, 1, D)}
    tensors |= {"pre_gate": leaf(1)}
    return {"images": torch.randn(images, 4, 3, side, side, device="cuda", dtype=dtype)} | tensors


def run(given: dict, fn=patch_embed, norm=None, **options) -> torch.Tensor:
    ratio = torch.tensor([RATIOS[i % 4] for i in range(given["images"].shape[0])], device="cuda")
    rest = [given[name] for name in ("local_pos", "global_pos", "gate", "pre_pos", "pre_gate")]
    return fn(given["images"], given["weight"], given["cls"], ratio, *rest, norm=norm, bias=None, **options)


@pytest.mark.parametrize("tile", rows(), ids=lambda t: "library" if t is None else " ".join(map(str, t.constants.values())))
@pytest.mark.parametrize("dtype, patch", [(torch.bfloat16, 14), (torch.float16, 16)], ids=str)
@pytest.mark.parametrize("images, norm", [(1, False), (3, True)])
def test_forward_and_backward(images, norm, dtype, patch, tile):
    with tune.pin("patch_embed", tile):
        check(images, norm, dtype, None, patch)


@pytest.mark.parametrize("dtype, tables, patch", [(torch.float32, None, 14), (torch.float32, None, 16), (torch.bfloat16, torch.float32, 14)], ids=str)
@pytest.mark.parametrize("images, norm", [(1, False), (3, False), (3, True)])
def test_by_the_row_that_is_picked(images, norm, dtype, tables, patch):
    check(images, norm, dtype, tables, patch)


def check(images, norm, dtype, tables, patch):
    inputs = given(images, dtype, patch, tables)
    ln = (torch.rand(1280, device="cuda").to(dtype), torch.randn(1280, device="cuda").to(dtype), 1e-5) if norm else None
    leaves = [name for name in inputs if name != "images"]
    wide = {name: t.detach().double().requires_grad_(name != "images") for name, t in inputs.items()}
    wide_ln = None if ln is None else (ln[0].double(), ln[1].double(), 1e-5)
    got = run(inputs, norm=ln)
    upstream = torch.randn(got.shape, device="cuda").to(dtype)

    def results(y, of):
        grads = torch.autograd.grad(y, [of[name] for name in leaves], upstream.to(y.dtype))
        return y.detach(), {name: (g,) for name, g in zip(leaves, grads, strict=True)}

    eager = in_several_orders(lambda: results(run(inputs, torchtune_tiles.patch_embed, ln), inputs))
    assert_results_no_worse(results(got, inputs), eager, results(run(wide, torchtune_tiles.patch_embed, wide_ln), wide))


def test_a_graph_replays_on_new_pixels_and_ratios():
    inputs = {name: t.detach() for name, t in given(4, torch.bfloat16).items()}
    ratio = torch.tensor(RATIOS, device="cuda")
    rest = [inputs[name] for name in ("local_pos", "global_pos", "gate", "pre_pos", "pre_gate")]

    def call():
        return patch_embed(inputs["images"], inputs["weight"], inputs["cls"], ratio, *rest)

    with torch.no_grad():
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = call()
        inputs["images"].copy_(torch.randn_like(inputs["images"]))
        ratio.copy_(ratio.flip(0))
        graph.replay()
        assert torch.equal(y, call())


def test_no_host_synchronisation():
    inputs = given(4, torch.bfloat16)
    ln = (torch.ones(1280, device="cuda"), torch.zeros(1280, device="cuda"), 1e-5)
    for norm in (None, ln):
        run(inputs, norm=norm).sum().backward()
        torch.cuda.synchronize()
        ratio = torch.tensor(RATIOS, device="cuda")
        rest = [inputs[name] for name in ("local_pos", "global_pos", "gate", "pre_pos", "pre_gate")]
        torch.cuda.set_sync_debug_mode("error")
        try:
            patch_embed(inputs["images"], inputs["weight"], inputs["cls"], ratio, *rest, norm=norm).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_deterministic():
    inputs = given(4, torch.bfloat16)
    leaves = [t for name, t in inputs.items() if name != "images"]
    dy = torch.randn(4, 4, 1601, 1280, device="cuda", dtype=torch.bfloat16)
    first, second = ([y, *torch.autograd.grad(y, leaves, dy)] for y in (run(inputs), run(inputs)))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_vision_transformer_compiled_and_by_modules():
    vit = VisionTransformer(
        14,
        224,
        1,
        256,
        torch.nn.TransformerEncoderLayer(256, 4, batch_first=True),
        TiledTokenPositionalEmbedding(4, 256, 224, 14),
        TilePositionalEmbedding(4, 256),
    )
    vit = vit.to("cuda", torch.bfloat16).eval()
    with torch.no_grad():
        vit.token_pos_embedding.gate.fill_(0.5)
        vit.pre_tile_pos_embed.gate.fill_(0.5)
        images, ratio = torch.randn(2, 2, 4, 3, 224, 224, device="cuda", dtype=torch.bfloat16), torch.tensor([RATIOS[:2], RATIOS[2:]], device="cuda")
        flat = images.flatten(0, 1), ratio.flatten(0, 1)
        fused, one_by_one = vit._fused_embedding(*flat), vit._embedding(*flat)
        exact = vit.double()._embedding(flat[0].double(), flat[1])
        assert_no_worse(fused, one_by_one, exact)
        vit.to(torch.bfloat16)
        compiled = torch.compile(vit, fullgraph=True)
        torch.testing.assert_close(compiled(images, ratio)[0], vit(images, ratio)[0])
