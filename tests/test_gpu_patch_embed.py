"""On a GPU: patch embedding at Llama-3.2-Vision's shapes, every row of this chip, CUDA graphs, compile, no waiting."""

import pytest
import torch
from numerics import assert_no_worse
from suite import captured, check, rows_of_this_chip, without_waiting

from cases.patch_embed import make
from fastfuse import tune
from fastfuse.modules import TiledTokenPositionalEmbedding, TilePositionalEmbedding, VisionTransformer

pytestmark = pytest.mark.gpu
RATIOS = ((2, 2), (1, 3), (1, 1), (4, 1))


def full(images, patch=14, **options):
    """Pictures of 4 tiles of 560 x 560 pixels, which get no gradient."""
    call = make("cuda", RATIOS[:images], grid=(560 // patch,) * 2, patch=(patch, patch), D=1280, **{"dtype": torch.bfloat16} | options)
    return call.only(*{*call.leaves()} - {"images"})


@pytest.mark.parametrize("tile", [None, *rows_of_this_chip("patch_embed")], ids=lambda t: "library" if t is None else " ".join(map(str, t.constants.values())))
@pytest.mark.parametrize("dtype, patch", [(torch.bfloat16, 14), (torch.float16, 16)], ids=str)
@pytest.mark.parametrize("images, norm", [(1, False), (3, True)])
def test_every_row_of_this_chip(images, norm, dtype, patch, tile):
    with tune.pin("patch_embed", tile):
        check(full(images, patch, norm=norm, dtype=dtype))


@pytest.mark.parametrize("dtype, tables, patch", [(torch.float32, None, 14), (torch.float32, None, 16), (torch.bfloat16, torch.float32, 14)], ids=str)
@pytest.mark.parametrize("images, norm", [(1, False), (3, False), (3, True)])
def test_by_the_row_that_is_picked(images, norm, dtype, tables, patch):
    check(full(images, patch, norm=norm, dtype=dtype, tables=tables))


def test_a_graph_replays_on_new_pixels_and_ratios():
    call = full(4).only()
    graph, (y,) = captured(call)
    call.tensors["images"].copy_(torch.randn_like(call.tensors["images"]))
    call.tensors["aspect_ratio"].copy_(call.tensors["aspect_ratio"].flip(0))
    graph.replay()
    assert torch.equal(y, call()[0])


def test_no_host_synchronisation():
    for norm in (False, True):
        call = full(4, norm=norm)
        without_waiting(lambda call=call: call.grads(call()))


def test_deterministic():
    call = full(4)
    dy = torch.randn(4, 4, 1601, 1280, device="cuda", dtype=torch.bfloat16)
    first, second = ([y, *call.grads((y,), [dy]).values()] for (y,) in (call(), call()))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_vision_transformer_compiled_and_by_modules():
    layer = torch.nn.TransformerEncoderLayer(256, 4, batch_first=True)
    places = TiledTokenPositionalEmbedding(4, 256, 224, 14), TilePositionalEmbedding(4, 256)
    vit = VisionTransformer(14, 224, 1, 256, layer, *places).to("cuda", torch.bfloat16).eval()
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
