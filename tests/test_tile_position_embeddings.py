"""Position embeddings of tiles and tokens: against a loop over images, their interpolation, and what they never do on a device."""

from collections import Counter

import numpy as np
import pytest
import torch
from dense_vision import place_rows, place_tiles
from numerics import assert_no_worse, in_several_orders
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse.models import clip
from fastfuse.models.clip import _position_embeddings
from fastfuse.modules import TiledTokenPositionalEmbedding, TilePositionalEmbedding, TokenPositionalEmbedding, tile_position_embeddings

T, TILE, PATCH, D = 4, 9, 3, 6
N = (TILE // PATCH) ** 2 + 1
RATIOS = [(1, 1), (2, 2), (1, 3), (4, 1), (0, 0), (1, 4), (2, 1), (3, 1), (1, 2)]
SUPPORTED = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
GATES = [0.0, 0.7, -1.3]


def tile_module(gate=0.7, **kwargs) -> TilePositionalEmbedding:
    return gated(TilePositionalEmbedding(T, D, **kwargs), gate)


def token_module(gate=0.7, **kwargs) -> TiledTokenPositionalEmbedding:
    return gated(TiledTokenPositionalEmbedding(T, D, TILE, PATCH, **kwargs), gate)


def gated(module, gate):
    nn.init.constant_(module.gate, gate)
    return module


def tile_loop(x, p, ratios, supported=None):
    place = place_tiles if supported is None else lambda *args: place_rows(*args, supported)
    return place(x, p["embedding"], p["gate"], ratios).to(x.dtype)


def token_loop(x, p, ratios, supported=None):
    place = place_tiles if supported is None else lambda *args: place_rows(*args, supported)
    x = x + p["local_token_positional_embedding"] * (1 - torch.tanh(p["gate"]))
    return place(x, p["global_token_positional_embedding"], p["gate"], ratios)


BOTH = pytest.mark.parametrize("make, loop", [(tile_module, tile_loop), (token_module, token_loop)], ids=["tile", "token"])
FORMS = pytest.mark.parametrize("supported", [None, SUPPORTED], ids=["grid", "ratios"])


def run(forward, x, params, dy):
    y = forward(x, params)
    leaves = [x, *params.values()]
    return y, torch.autograd.grad(y, leaves, dy.to(y.dtype))


def check(module, loop, x_dtype, table_dtype, ratios, supported):
    module = module.to(table_dtype)
    x = torch.randn(len(ratios), T, N, D, dtype=x_dtype, requires_grad=True)
    dy = torch.randn(x.shape, dtype=x_dtype).double()
    ratio = torch.tensor(ratios)
    own = dict(module.named_parameters())
    copy = {name: p.detach().clone().requires_grad_() for name, p in own.items()}
    exact = {name: p.detach().double().requires_grad_() for name, p in own.items()}
    got = run(lambda x, p: module(x, ratio), x, own, dy)
    eager = in_several_orders(run, lambda x, p: loop(x, p, ratios, supported), x, copy, dy)
    want = run(lambda x, p: loop(x, p, ratios, supported), x.detach().double().requires_grad_(), exact, dy)
    assert_no_worse(got[0], [y for y, _ in eager], want[0], "y")
    for name, *gradients in zip(["x", *own], got[1], zip(*(found for _, found in eager), strict=True), want[1], strict=True):
        if name != "gate":
            assert_no_worse(*gradients, f"gradient of {name}")
    # One number out of thousands of terms: product, sum, 1 - tanh^2 (two) and their product round it by eps / 2 each.
    size = {name: p.detach().abs() for name, p in exact.items()}
    ends = [loop(torch.zeros(x.shape).double(), size | {"gate": torch.tensor(end).double()}, ratios, supported) for end in (0.0, torch.inf)]
    terms = (dy.abs() * sum(ends)).sum() * (1 - size["gate"].tanh() ** 2)
    gate = list(own).index("gate") + 1
    assert (got[1][gate].double() - want[1][gate]).abs() <= 2.5 * torch.finfo(table_dtype).eps * terms


@BOTH
@FORMS
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("x_dtype, table_dtype", [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_values_and_gradients_equal_a_loop_over_images(make, loop, gate, x_dtype, table_dtype, supported):
    check(make(gate, aspect_ratios=supported), loop, x_dtype, table_dtype, RATIOS, supported)


@BOTH
def test_in_float64_every_value_is_the_loop_s_to_the_bit(make, loop):
    module = make().double()
    x = torch.randn(len(RATIOS), T, N, D, dtype=torch.float64)
    assert torch.equal(module(x, torch.tensor(RATIOS)), loop(x, dict(module.named_parameters()), RATIOS))


@BOTH
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_ratios_may_be_of_any_integer_type(make, loop, dtype):
    module, x = make(), torch.randn(len(RATIOS), T, N, D)
    assert torch.equal(module(x, torch.tensor(RATIOS, dtype=dtype)), module(x, torch.tensor(RATIOS)))


@BOTH
def test_fewer_tiles_than_the_table_holds_are_placed_alike(make, loop):
    ratios = [(1, 1), (2, 1), (1, 2), (0, 0)]
    module, x = make().double(), torch.randn(4, 2, N, D, dtype=torch.float64)
    assert torch.equal(module(x, torch.tensor(ratios)), loop(x, dict(module.named_parameters()), ratios))


@BOTH
def test_more_tiles_than_a_grid_s_side_are_placed_alike(make, loop):
    ratios = [(2, 3), (3, 2), (4, 4), (3, 4)]
    module, x = make().double(), torch.randn(4, 16, N, D, dtype=torch.float64)
    assert torch.equal(module(x, torch.tensor(ratios)), loop(x, dict(module.named_parameters()), ratios))


def test_a_closed_gate_leaves_tiles_as_they_are_and_tokens_with_their_local_position():
    x, ratio = torch.randn(len(RATIOS), T, N, D), torch.tensor(RATIOS)
    tokens = token_module(0.0)
    assert torch.equal(tile_module(0.0)(x, ratio), x)
    assert torch.equal(tokens(x, ratio), x + tokens.local_token_positional_embedding)


def test_padding_tiles_and_images_get_the_local_position_alone():
    module = token_module().double()
    x = torch.zeros(2, T, N, D, dtype=torch.float64)
    y = module(x, torch.tensor([(1, 2), (0, 0)]))
    local = module.local_token_positional_embedding * (1 - torch.tanh(module.gate))
    assert torch.equal(y[0, 2:], local.expand(2, N, D))
    assert torch.equal(y[1], local.expand(T, N, D))
    assert not torch.isclose(y[0, :2], local).any()


@BOTH
def test_x_is_not_written_and_may_be_a_leaf_that_requires_a_gradient(make, loop):
    x = torch.randn(1, T, N, D, requires_grad=True)
    before = x.detach().clone()
    y = make()(x, torch.tensor([(2, 2)]))
    y.sum().backward()
    assert torch.equal(x, before)
    assert torch.equal(x.grad, torch.ones_like(x))


def test_tiles_keep_x_s_dtype_and_tokens_take_the_wider_one():
    x, ratio = torch.randn(1, T, N, D, dtype=torch.bfloat16), torch.tensor([(2, 2)])
    assert tile_module()(x, ratio).dtype == torch.bfloat16
    assert token_module()(x, ratio).dtype == torch.float32
    assert token_module().bfloat16()(x, ratio).dtype == torch.bfloat16
    assert token_module().bfloat16()(x.float(), ratio).dtype == torch.float32


@pytest.mark.parametrize("make, table", [(tile_module, "embedding"), (token_module, "global_token_positional_embedding")])
def test_only_the_used_block_of_a_table_gets_a_gradient(make, table):
    module = make()
    used = [(1, 3), (2, 1)]
    module(torch.randn(2, T, N, D), torch.tensor(used)).square().sum().backward()
    cells = {(r, c) for h, w in used for r in range(h) for c in range(w)}
    gradient = getattr(module, table).grad
    for r in range(T):
        for c in range(T):
            assert bool(gradient[r, c].all()) == bool(gradient[r, c].any()) == ((r, c) in cells), (r, c)


def test_a_table_of_ratios_equals_the_grid_it_was_made_from():
    """Rows take the grid's tiles row by row; their padding is the zeros that a grid does not add."""
    for make, table in ((tile_module, "embedding"), (token_module, "global_token_positional_embedding")):
        grid, rows = make(), make(aspect_ratios=SUPPORTED)
        with torch.no_grad():
            rows.load_state_dict({name: p for name, p in grid.state_dict().items() if name != table}, strict=False)
            getattr(rows, table).zero_()
            for row, (h, w) in enumerate(SUPPORTED, 1):
                for tile in range(h * w):
                    getattr(rows, table)[row, tile] = getattr(grid, table)[tile // w, tile % w]
        x = torch.randn(len(RATIOS), T, N, D)
        assert torch.equal(grid(x, torch.tensor(RATIOS)), rows(x, torch.tensor(RATIOS)))


def test_shapes_keys_and_starting_values():
    torch.manual_seed(3)
    tile, token, plain = TilePositionalEmbedding(T, D), TiledTokenPositionalEmbedding(T, D, TILE, PATCH), TokenPositionalEmbedding(D, TILE, PATCH)
    torch.manual_seed(3)
    scale = D**-0.5
    assert torch.equal(tile.embedding, torch.randn(T, T, 1, D) * scale)
    assert torch.equal(token.local_token_positional_embedding, torch.randn(N, D) * scale)
    assert torch.equal(token.global_token_positional_embedding, torch.randn(T, T, N, D) * scale)
    assert torch.equal(plain.positional_embedding, torch.randn(N, D) * scale)
    assert list(tile.state_dict()) == ["embedding", "gate"]
    assert list(token.state_dict()) == ["local_token_positional_embedding", "global_token_positional_embedding", "gate"]
    assert list(plain.state_dict()) == ["positional_embedding"]
    assert torch.equal(tile.gate, torch.zeros(1)) and torch.equal(token.gate, torch.zeros(1))
    assert token.n_tokens_per_tile == N
    assert list(token_module(aspect_ratios=SUPPORTED).state_dict()) == list(token.state_dict())


def test_a_ratio_table_has_a_row_per_ratio_and_one_for_padding_images():
    assert tile_module(aspect_ratios=SUPPORTED).embedding.shape == (9, T, 1, D)
    assert token_module(aspect_ratios=SUPPORTED).global_token_positional_embedding.shape == (9, T, N, D)


def test_torchtune_s_import_paths_name_the_same_classes():
    for name in ("TilePositionalEmbedding", "TiledTokenPositionalEmbedding", "TokenPositionalEmbedding"):
        assert getattr(clip, name) is getattr(_position_embeddings, name) is getattr(tile_position_embeddings, name)


def test_positions_of_tokens_in_single_tiles_are_added_whatever_else_is_passed():
    module = TokenPositionalEmbedding(D, TILE, PATCH)
    x = torch.randn(2, 3, N, D)
    assert torch.equal(module(x, torch.tensor([(9, 9)]), None), x + module.positional_embedding)


def test_patches_that_do_not_fill_the_tile_are_left_out():
    assert TokenPositionalEmbedding(D, 49, 9).positional_embedding.shape == (26, D)
    assert TiledTokenPositionalEmbedding(T, D, 49, 9).local_token_positional_embedding.shape == (26, D)


@BOTH
@pytest.mark.parametrize("ratio", [(5, 1), (1, 5), (2, 3), (4, 4), (-1, 1), (0, 5)])
def test_a_ratio_that_does_not_fit_is_named(make, loop, ratio):
    h, w = ratio
    with pytest.raises(ValueError, match=rf"\[{h}, {w}\] \(h, w\), images have 4 tiles and max_num_tiles is 4"):
        make()(torch.zeros(2, T, N, D), torch.tensor([(1, 1), ratio]))


@BOTH
def test_a_ratio_without_a_row_is_named(make, loop):
    module = make(aspect_ratios=[(1, 1), (2, 2)])
    with pytest.raises(ValueError, match=r"\[1, 2\] \(h, w\), which is not among aspect_ratios=\[\(1, 1\), \(2, 2\)\]"):
        module(torch.zeros(2, T, N, D), torch.tensor([(1, 1), (1, 2)]))


@BOTH
def test_a_table_of_ratios_has_no_place_for_more_tiles(make, loop):
    with pytest.raises(ValueError, match="images have 5 tiles, the position table holds max_num_tiles=4"):
        make(aspect_ratios=SUPPORTED)(torch.zeros(1, 5, N, D), torch.tensor([(1, 1)]))


@BOTH
@pytest.mark.parametrize("ratio", [(0, 0), (0, 1), (2, 3), (5, 1)])
def test_a_table_of_ratios_refuses_rows_it_cannot_hold(make, loop, ratio):
    with pytest.raises(ValueError, match=rf"aspect_ratios has \({ratio[0]}, {ratio[1]}\), which is not 1 to max_num_tiles=4 tiles"):
        make(aspect_ratios=[(1, 1), ratio])


def bilinear(grid: Tensor, side: int) -> Tensor:
    """[g, g, d] -> [side, side, d] in float64: target corners lie on source corners."""
    source = grid.double().numpy()
    g = source.shape[0]
    out = np.zeros((side, side, source.shape[2]))
    for r in range(side):
        for c in range(side):
            y, x = ((k * (g - 1) / (side - 1) if side > 1 else 0.0) for k in (r, c))
            y0, x0 = min(int(y), g - 1), min(int(x), g - 1)
            y1, x1, dy, dx = min(y0 + 1, g - 1), min(x0 + 1, g - 1), y - y0, x - x0
            top = (1 - dx) * source[y0, x0] + dx * source[y0, x1]
            bottom = (1 - dx) * source[y1, x0] + dx * source[y1, x1]
            out[r, c] = (1 - dy) * top + dy * bottom
    return torch.from_numpy(out)


def resized_local(t: Tensor, grid: int) -> Tensor:
    g = round((t.shape[0] - 1) ** 0.5)
    return torch.cat([t[:1].double(), bilinear(t[1:].reshape(g, g, -1), grid).reshape(grid * grid, -1)])


def resized_global(t: Tensor, tiles: int, grid: int) -> Tensor:
    old, n, d = t.shape[0], t.shape[2], t.shape[3]
    g = round((n - 1) ** 0.5)
    image = torch.zeros(old * g, old * g, d, dtype=torch.float64)
    for tr in range(old):
        for tc in range(old):
            for patch in range(g * g):
                image[tr * g + patch // g, tc * g + patch % g] = t[tr, tc, 1 + patch]
    image = bilinear(image, tiles * grid)
    out = torch.zeros(tiles, tiles, grid * grid + 1, d, dtype=torch.float64)
    out[:, :, 0] = bilinear(t[:, :, 0], tiles)
    for tr in range(tiles):
        for tc in range(tiles):
            for patch in range(grid * grid):
                out[tr, tc, 1 + patch] = image[tr * grid + patch // grid, tc * grid + patch % grid]
    return out


def assert_interpolated(got: Tensor, want: Tensor) -> None:
    assert got.is_contiguous() and got.shape == want.shape and got.dtype == torch.float64
    assert_no_worse(got.float(), want.float(), want)


GRIDS = [(1, 4), (2, 3), (3, 5), (5, 3), (4, 1), (3, 3)]


@pytest.mark.parametrize("old, new", GRIDS)
def test_local_positions_are_interpolated_and_cls_kept(old, new):
    t = torch.randn(old * old + 1, D, dtype=torch.float64)
    got = TiledTokenPositionalEmbedding._resize_local_position_embedding(t, new)
    assert_interpolated(got, resized_local(t, new))
    assert torch.equal(got[0], t[0])


@pytest.mark.parametrize("old, new", GRIDS)
@pytest.mark.parametrize("old_tiles, tiles", [(4, 2), (2, 4), (1, 3), (3, 1), (3, 3)])
def test_global_positions_are_interpolated_as_one_map_over_all_tiles(old, new, old_tiles, tiles):
    t = torch.randn(old_tiles, old_tiles, old * old + 1, D, dtype=torch.float64)
    assert_interpolated(TiledTokenPositionalEmbedding._resize_global_position_embedding(t, tiles, new), resized_global(t, tiles, new))


@pytest.mark.parametrize("old, new", GRIDS)
def test_tile_positions_are_interpolated(old, new):
    t = torch.randn(old, old, 1, D, dtype=torch.float64)
    assert_interpolated(TilePositionalEmbedding._resize_position_embedding(t, new), bilinear(t[:, :, 0], new)[:, :, None])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("tiles, grid", [(4, 3), (2, 7), (4, 40)])
def test_equal_sizes_load_to_the_bit(dtype, tiles, grid):
    local, table, tile = (
        torch.randn(grid**2 + 1, D, dtype=dtype),
        torch.randn(tiles, tiles, grid**2 + 1, D, dtype=dtype),
        torch.randn(tiles, tiles, 1, D, dtype=dtype),
    )
    for got, want in (
        (TiledTokenPositionalEmbedding._resize_local_position_embedding(local, grid), local),
        (TiledTokenPositionalEmbedding._resize_global_position_embedding(table, tiles, grid), table),
        (TilePositionalEmbedding._resize_position_embedding(tile, tiles), tile),
    ):
        assert torch.equal(got, want) and got.dtype == dtype and got.is_contiguous()


def test_loading_interpolates_into_the_module_and_leaves_the_caller_s_dict_alone():
    source = nn.ModuleDict({"token": TiledTokenPositionalEmbedding(2, D, 8, 4), "tile": TilePositionalEmbedding(2, D)}).double()
    for module in source.values():
        gated(module, 0.25)
    target = nn.ModuleDict({"token": token_module(), "tile": tile_module()}).double()
    loaded = source.state_dict()
    objects, copies = dict(loaded), {name: t.clone() for name, t in loaded.items()}
    assert not any(target.load_state_dict(loaded))
    assert all(loaded[name] is objects[name] and torch.equal(loaded[name], copies[name]) for name in objects) and len(loaded) == len(objects)
    assert_interpolated(target["token"].local_token_positional_embedding.detach(), resized_local(copies["token.local_token_positional_embedding"], 3))
    assert_interpolated(target["token"].global_token_positional_embedding.detach(), resized_global(copies["token.global_token_positional_embedding"], 4, 3))
    assert_interpolated(target["tile"].embedding.detach(), bilinear(copies["tile.embedding"][:, :, 0], 4)[:, :, None])
    assert target["token"].gate == target["tile"].gate == 0.25


def test_the_hook_edits_the_dict_it_is_given_keeps_its_dtype_and_touches_its_own_keys_alone():
    state = {"a.embedding": torch.randn(2, 2, 1, D, dtype=torch.bfloat16), "a.gate": torch.ones(1), "b.embedding": torch.randn(2, 2, 1, D)}
    before = dict(state)
    tile_module()._load_state_dict_hook(state, "a.")
    assert state["a.embedding"].shape == (T, T, 1, D) and state["a.embedding"].dtype == torch.bfloat16 and state["a.embedding"].is_contiguous()
    assert state["a.gate"] is before["a.gate"] and state["b.embedding"] is before["b.embedding"]
    state = {"local_token_positional_embedding": torch.randn(5, D), "global_token_positional_embedding": torch.randn(2, 2, 5, D)}
    token_module()._load_state_dict_hook(state, "")
    assert [v.shape for v in state.values()] == [(N, D), (T, T, N, D)]
    assert not any(v.requires_grad for v in state.values())


def test_a_bf16_checkpoint_is_interpolated_in_bf16_and_cast_into_the_parameter():
    module, state = tile_module(), {"embedding": torch.randn(2, 2, 1, D, dtype=torch.bfloat16), "gate": torch.zeros(1)}
    resized = TilePositionalEmbedding._resize_position_embedding(state["embedding"], T)
    module.load_state_dict(state)
    assert module.embedding.dtype == torch.float32 and torch.equal(module.embedding, resized.float())


@BOTH
def test_missing_keys_are_left_to_load_state_dict(make, loop):
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict({})
    assert make().load_state_dict({}, strict=False).missing_keys == [name for name, _ in make().named_parameters()]


def test_a_table_of_ratios_loads_as_it_is():
    for make in (tile_module, token_module):
        source, target = make(0.1, aspect_ratios=SUPPORTED), make(0.2, aspect_ratios=SUPPORTED)
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))


@pytest.mark.parametrize("name, shape", [("local_token_positional_embedding", (7, D)), ("global_token_positional_embedding", (T, T, 7, D))])
def test_patches_that_form_no_square_are_refused(name, shape):
    message = "Loaded local positional embedding has shape inpt_n_tokens_per_tile=7, which indicates a grid_size that is not squared. This is currently not supported."
    with pytest.raises(ValueError) as error:
        token_module()._load_state_dict_hook({name: torch.zeros(shape)}, "")
    assert message in str(error.value)


@pytest.mark.parametrize("kind, shape", [("local", (N, D + 1)), ("global", (T, T, N, D + 1))])
def test_another_width_is_refused(kind, shape):
    name = f"{kind}_token_positional_embedding"
    module = token_module()
    with pytest.raises(ValueError) as error:
        module._load_state_dict_hook({name: torch.zeros(shape)}, "")
    assert f"Loaded {kind} positional embedding has shape {shape}, after interpolation. Expected shape {tuple(getattr(module, name).shape)}" in str(error.value)


@pytest.mark.parametrize("shape", [(T, T, 1, D + 1), (T, T, 2, D)])
def test_a_tile_table_of_another_width_is_refused(shape):
    with pytest.raises(ValueError, match=r"Expected embedding shape to be \(..., num_tokens, tgt_emb\) to match but found shapes"):
        tile_module()._load_state_dict_hook({"embedding": torch.zeros(shape)}, "")


def test_a_tile_table_that_is_not_square_is_refused():
    with pytest.raises(
        ValueError, match=r"Expected max_num_tiles_x, max_num_tiles_y to be equal but found, but found\(max_num_tiles_x, max_num_tiles_y\) = \(2, 3\)"
    ):
        tile_module()._load_state_dict_hook({"embedding": torch.zeros(2, 3, 1, D)}, "")


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, None])
def test_sharded_tables_are_interpolated_whole_and_sharded_again(mesh, dim):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [Replicate() if dim is None else Shard(dim)]
    state = {
        "tile.embedding": torch.randn(2, 2, 1, D),
        "token.local_token_positional_embedding": torch.randn(5, D),
        "token.global_token_positional_embedding": torch.randn(2, 2, 5, D),
    }
    sharded = {name: distribute_tensor(t, mesh, placements) for name, t in state.items()}
    for hook, prefix in ((tile_module()._load_state_dict_hook, "tile."), (token_module()._load_state_dict_hook, "token.")):
        hook(state, prefix)
        hook(sharded, prefix)
    for name, t in sharded.items():
        assert isinstance(t, DTensor) and t.device_mesh == mesh and list(t.placements) == placements
        assert torch.equal(t.full_tensor(), state[name])


class Recorded(TorchDispatchMode):
    """Counts the operators that run; those that wait for the device to know a value or a size raise."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "item", "is_nonzero", "equal")

    def __init__(self):
        super().__init__()
        self.ops = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not any(name.startswith(waits) for waits in self.WAITS), f"{name} waits for the device"
        if name.startswith("index"):
            indices = [i for a in args if isinstance(a, (list, tuple)) for i in a if isinstance(i, Tensor)]
            assert all(i.dtype != torch.bool for i in indices), "an index of bools waits for the device"
        self.ops[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(make, supported, monkeypatch, images) -> Counter:
    """Of forward and backward, as on a device, where the ratios' values are not looked at."""
    monkeypatch.setattr(tile_position_embeddings, "values_are_at_hand", lambda t: False)
    module = make(aspect_ratios=supported)
    x = torch.randn(images, T, N, D, requires_grad=True)
    ratio, dy = torch.tensor((RATIOS * images)[:images]), torch.randn(images, T, N, D)
    with Recorded() as recorded:
        module(x, ratio).backward(dy)
    return recorded.ops


@BOTH
@FORMS
def test_nothing_waits_for_the_device_and_the_work_is_not_cut_by_image(make, loop, supported, monkeypatch):
    one, many = (operators(make, supported, monkeypatch, images) for images in (1, 9))
    assert one == many
    assert sum(one.values()) > 10  # the recording did see forward and backward


@BOTH
@FORMS
def test_on_a_device_a_ratio_that_does_not_fit_fails_there(make, loop, supported, monkeypatch):
    monkeypatch.setattr(tile_position_embeddings, "values_are_at_hand", lambda t: False)
    with pytest.raises(RuntimeError, match="aspect_ratio has an image of more than 4 tiles, or of a side over max_num_tiles=4"):
        make(aspect_ratios=supported)(torch.zeros(1, T, N, D), torch.tensor([(2, 3)]))


@BOTH
def test_on_a_device_a_ratio_without_a_row_fails_there(make, loop, monkeypatch):
    monkeypatch.setattr(tile_position_embeddings, "values_are_at_hand", lambda t: False)
    with pytest.raises(RuntimeError, match=r"aspect_ratio has an image \(h, w\) that is not among aspect_ratios=\[\(1, 1\), \(2, 2\)\]"):
        make(aspect_ratios=[(1, 1), (2, 2)])(torch.zeros(2, T, N, D), torch.tensor([(1, 1), (1, 2)]))


@BOTH
@FORMS
def test_forward_and_backward_need_no_values_at_all(make, loop, supported):
    with FakeTensorMode():  # shapes alone: whatever asks for a value raises
        module, x, ratio = make(aspect_ratios=supported), torch.randn(3, T, N, D, requires_grad=True), torch.ones(3, 2, dtype=torch.int64)
        y = module(x, ratio)
        y.sum().backward()
    assert y.shape == x.shape
    assert all(p.grad.shape == p.shape for p in [x, *module.parameters()])


@BOTH
@FORMS
def test_a_module_made_on_meta_works_after_to_empty(make, loop, supported):
    source = make(aspect_ratios=supported)
    with torch.device("meta"):
        module = make(aspect_ratios=supported)
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    x, ratio = torch.randn(len(RATIOS), T, N, D), torch.tensor(RATIOS)
    assert torch.equal(module(x, ratio), source(x, ratio))
