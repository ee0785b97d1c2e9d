"""Position embeddings of tiles and tokens: against a loop over images, their interpolation, and what they never do on a device."""

import pytest
import torch
from numerics import assert_no_worse
from reference import assert_matches
from small_vision import SUPPORTED
from torch import nn
from waiting import NoWaiting

from cases.patch_embed import place_ids, place_images
from fastfuse.models import clip
from fastfuse.models.clip import _position_embeddings
from fastfuse.modules import TiledTokenPositionalEmbedding, TilePositionalEmbedding, TokenPositionalEmbedding, tile_position_embeddings

T, TILE, PATCH, D = 4, 9, 3, 6
N = (TILE // PATCH) ** 2 + 1
RATIOS = [*SUPPORTED[4:], (0, 0), *SUPPORTED[:4]]
LOCAL, GLOBAL = "local_token_positional_embedding", "global_token_positional_embedding"


def tile_module(gate=0.7, **kwargs):
    module = TilePositionalEmbedding(T, D, **kwargs)
    nn.init.constant_(module.gate, gate)
    return module


def token_module(gate=0.7, **kwargs):
    module = TiledTokenPositionalEmbedding(T, D, TILE, PATCH, **kwargs)
    nn.init.constant_(module.gate, gate)
    return module


def loop(x, p, ratios, supported=None):
    """What either module computes, by its parameters p."""
    table = p.get("embedding", p.get(GLOBAL))
    if LOCAL in p:
        x = x + p[LOCAL] * (1 - torch.tanh(p["gate"]))
    if supported is None:
        return place_images(x.clone(), table, p["gate"], ratios)
    return place_ids(x.clone(), table, p["gate"], [[(0, 0), *supported].index(ratio) for ratio in ratios])


MAKE = {"tile": tile_module, "token": token_module}
BOTH = pytest.mark.parametrize("make", MAKE.values(), ids=MAKE)
FORMS = pytest.mark.parametrize("supported", [None, SUPPORTED], ids=["grid", "ratios"])


@pytest.fixture
def on_device(monkeypatch):
    """As on a device, where the ratios' values are not looked at."""
    monkeypatch.setattr(tile_position_embeddings, "values_are_at_hand", lambda t: False)


@BOTH
@FORMS
@pytest.mark.parametrize(
    "gate, dtype, x_dtype", [(0.4, torch.float32, torch.float32), (0.7, torch.bfloat16, torch.bfloat16), (-1.3, torch.float32, torch.bfloat16)]
)
def test_values_and_gradients_equal_a_loop_over_images(make, gate, dtype, x_dtype, supported):
    def cast(x):
        return x if x.dtype == torch.float64 else x.to(x_dtype)

    assert_matches(
        make(gate, aspect_ratios=supported),
        lambda m, x: m(cast(x), torch.tensor(RATIOS)),
        lambda m, x: loop(cast(x), dict(m.named_parameters()), RATIOS, supported),
        {"x": torch.randn(len(RATIOS), T, N, D).bfloat16().float()},
        dtype,
    )


@BOTH
@pytest.mark.parametrize("gate, tiles, ratios", [(0.0, T, RATIOS), (0.7, 2, [(1, 1), (2, 1), (1, 2), (0, 0)]), (-1.3, 16, [(2, 3), (3, 2), (4, 4), (3, 4)])])
def test_in_float64_every_value_is_the_loop_s_to_the_bit(make, gate, tiles, ratios):
    """For fewer tiles than the table holds and for more than a grid's side; ratios of any integer type; x is not written."""
    module, x = make(gate).double(), torch.randn(len(ratios), tiles, N, D, dtype=torch.float64, requires_grad=True)
    before, want = x.detach().clone(), loop(x, dict(module.named_parameters()), ratios)
    for dtype in (torch.int32, torch.int64):
        assert torch.equal(module(x, torch.tensor(ratios, dtype=dtype)), want)
    module(x, torch.tensor(ratios)).sum().backward()
    assert torch.equal(x, before) and torch.equal(x.grad, torch.ones_like(x))


def test_shapes_and_starting_values():
    torch.manual_seed(3)
    tile, token, plain = TilePositionalEmbedding(T, D), TiledTokenPositionalEmbedding(T, D, TILE, PATCH), TokenPositionalEmbedding(D, TILE, PATCH)
    torch.manual_seed(3)
    for p, shape in (
        (tile.embedding, (T, T, 1, D)),
        (token.get_parameter(LOCAL), (N, D)),
        (token.get_parameter(GLOBAL), (T, T, N, D)),
        (plain.positional_embedding, (N, D)),
    ):
        assert torch.equal(p, torch.randn(shape) * D**-0.5)
    assert torch.equal(tile.gate, torch.zeros(1)) and torch.equal(token.gate, torch.zeros(1)) and token.n_tokens_per_tile == N
    assert list(token_module(aspect_ratios=SUPPORTED).state_dict()) == [LOCAL, GLOBAL, "gate"]
    # a row per ratio, and one for padding images
    assert tile_module(aspect_ratios=SUPPORTED).embedding.shape == (9, T, 1, D)
    assert token_module(aspect_ratios=SUPPORTED).get_parameter(GLOBAL).shape == (9, T, N, D)


def test_torchtune_s_import_paths_name_the_same_classes():
    for name in ("TilePositionalEmbedding", "TiledTokenPositionalEmbedding", "TokenPositionalEmbedding"):
        assert getattr(clip, name) is getattr(_position_embeddings, name) is getattr(tile_position_embeddings, name)


def place(make, ratio, tiles=T, **kwargs):
    make(**kwargs)(torch.zeros(2, tiles, N, D), torch.tensor([(1, 1), ratio]))


TWO = [(1, 1), (2, 2)]
REFUSED = [
    *((rf"\[{h}, {w}\] \(h, w\), images have 4 tiles and max_num_tiles is 4", (h, w), {}) for h, w in ((5, 1), (2, 3), (-1, 1), (0, 5))),
    (r"\[1, 2\] \(h, w\), which is not among aspect_ratios=\[\(1, 1\), \(2, 2\)\]", (1, 2), {"aspect_ratios": TWO}),
    ("images have 5 tiles, the position table holds max_num_tiles=4", (1, 1), {"aspect_ratios": SUPPORTED, "tiles": 5}),
    *(
        (rf"aspect_ratios has \({h}, {w}\), which is not 1 to max_num_tiles=4 tiles", (1, 1), {"aspect_ratios": [(1, 1), (h, w)]})
        for h, w in ((0, 0), (0, 1), (2, 3), (5, 1))
    ),
]


@BOTH
@pytest.mark.parametrize(("message", "ratio", "kwargs"), REFUSED)
def test_a_ratio_without_a_place_is_named(make, message, ratio, kwargs):
    with pytest.raises(ValueError, match=message):
        place(make, ratio, **kwargs)


TOO_MANY = "aspect_ratio has an image of more than 4 tiles, or of a side over max_num_tiles=4"
NOT_AMONG = r"aspect_ratio has an image \(h, w\) that is not among aspect_ratios=\[\(1, 1\), \(2, 2\)\]"


@BOTH
@pytest.mark.parametrize(
    ("message", "ratio", "kwargs"), [(TOO_MANY, (2, 3), {}), (TOO_MANY, (2, 3), {"aspect_ratios": SUPPORTED}), (NOT_AMONG, (1, 2), {"aspect_ratios": TWO})]
)
def test_on_a_device_it_fails_there(make, message, ratio, kwargs, on_device):
    with pytest.raises(RuntimeError, match=message):
        place(make, ratio, **kwargs)


def bilinear(grid, side):
    """[g, g, d] -> [side, side, d] in float64: a product with the weights of the two neighbours along each side; target corners lie on source corners."""
    g = grid.shape[0]
    at = torch.arange(side, dtype=torch.float64) * ((g - 1) / (side - 1) if side > 1 else 0.0)
    weights = (1 - (at[:, None] - torch.arange(g)).abs()).clamp(min=0)
    return torch.einsum("rh,cw,hwd->rcd", weights, weights, grid.double())


def resized_local(t, grid):
    g = round((t.shape[0] - 1) ** 0.5)
    return torch.cat([t[:1].double(), bilinear(t[1:].reshape(g, g, -1), grid).reshape(grid * grid, -1)])


def resized_global(t, tiles, grid):
    """The patches of all tiles are one image."""
    g = round((t.shape[2] - 1) ** 0.5)
    image = bilinear(torch.cat([torch.cat([*row], 1) for row in t[:, :, 1:].unflatten(2, (g, g))]), tiles * grid)
    patches = torch.stack([torch.stack([tile.flatten(0, 1) for tile in row.split(grid, 1)]) for row in image.split(grid)])
    return torch.cat([bilinear(t[:, :, 0], tiles)[:, :, None], patches], 2)


RESIZE_LOCAL = TiledTokenPositionalEmbedding._resize_local_position_embedding
RESIZE_GLOBAL = TiledTokenPositionalEmbedding._resize_global_position_embedding
RESIZE_TILES = TilePositionalEmbedding._resize_position_embedding


@pytest.mark.parametrize(
    "old, new, old_tiles, tiles", [(1, 4, 4, 2), (2, 3, 2, 4), (3, 5, 1, 3), (5, 3, 3, 1), (4, 1, 3, 3), (3, 3, 4, 2), (3, 3, 2, 4), (4, 1, 2, 4)]
)
def test_tables_are_interpolated(old, new, old_tiles, tiles):
    """By loading, which leaves the caller's dict alone. CLS of the local positions is kept, global positions are one map over all tiles."""

    def made(tiles, grid):
        parts = {"token": TiledTokenPositionalEmbedding(tiles, D, PATCH * grid, PATCH), "tile": TilePositionalEmbedding(tiles, D)}
        return nn.ModuleDict(parts).double()

    loaded, target = made(old_tiles, old).state_dict(), made(tiles, new)
    before = {name: (t, t.clone()) for name, t in loaded.items()}
    assert not any(target.load_state_dict(loaded))
    assert loaded.keys() == before.keys() and all(loaded[name] is t and torch.equal(t, copy) for name, (t, copy) in before.items())
    local, table, tile = (loaded[name] for name in (f"token.{LOCAL}", f"token.{GLOBAL}", "tile.embedding"))
    want = [resized_local(local, new), resized_global(table, tiles, new), torch.zeros(1), bilinear(tile[:, :, 0], tiles)[:, :, None], torch.zeros(1)]
    for got, exact in zip(target.state_dict().values(), want, strict=True):
        assert_no_worse(got.float(), exact.float(), exact)
    assert torch.equal(target["token"].get_parameter(LOCAL)[0], local[0])


@pytest.mark.parametrize("dtype, tiles, grid", [(torch.float32, 4, 3), (torch.bfloat16, 2, 7), (torch.float64, 4, 40)])
def test_equal_sizes_load_to_the_bit(dtype, tiles, grid):
    for resize, shape, sizes in (
        (RESIZE_LOCAL, (grid**2 + 1, D), [grid]),
        (RESIZE_GLOBAL, (tiles, tiles, grid**2 + 1, D), [tiles, grid]),
        (RESIZE_TILES, (tiles, tiles, 1, D), [tiles]),
    ):
        t = torch.randn(shape, dtype=dtype)
        got = resize(t, *sizes)
        assert torch.equal(got, t) and got.dtype == dtype and got.is_contiguous()


def test_the_hook_edits_the_dict_it_is_given_keeps_its_dtype_and_touches_its_own_keys_alone():
    """A bf16 checkpoint is interpolated in bf16 and cast into the parameter."""
    module, state = tile_module(), {"a.embedding": torch.randn(2, 2, 1, D).bfloat16(), "a.gate": torch.ones(1), "b.embedding": torch.randn(2, 2, 1, D)}
    before = dict(state)
    module._load_state_dict_hook(state, "a.")
    resized = RESIZE_TILES(before["a.embedding"], T)
    assert torch.equal(state["a.embedding"], resized) and resized.dtype == torch.bfloat16
    assert state["a.gate"] is before["a.gate"] and state["b.embedding"] is before["b.embedding"]
    module.load_state_dict({"embedding": before["a.embedding"], "gate": torch.zeros(1)})
    assert module.embedding.dtype == torch.float32 and torch.equal(module.embedding, resized.float())
    state = {LOCAL: torch.randn(5, D, requires_grad=True), GLOBAL: torch.randn(2, 2, 5, D, requires_grad=True)}
    token_module()._load_state_dict_hook(state, "")
    assert [(v.shape, v.requires_grad) for v in state.values()] == [((N, D), False), ((T, T, N, D), False)]


@BOTH
def test_missing_keys_are_left_to_load_state_dict(make):
    with pytest.raises(RuntimeError, match="Missing key"):
        make().load_state_dict({})
    assert make().load_state_dict({}, strict=False).missing_keys == [name for name, _ in make().named_parameters()]


NO_SQUARE = (
    "Loaded local positional embedding has shape inpt_n_tokens_per_tile=7, which indicates a grid_size that is not squared. This is currently not supported."
)
ANOTHER = r"Loaded {} positional embedding has shape \({}\), after interpolation. Expected shape \({}\)".format
TILE_SHAPES = r"Expected embedding shape to be \(..., num_tokens, tgt_emb\) to match but found shapes"
TILE_SIDES = r"Expected max_num_tiles_x, max_num_tiles_y to be equal but found, but found\(max_num_tiles_x, max_num_tiles_y\) = \(2, 3\)"


@pytest.mark.parametrize(
    ("message", "make", "name", "shape"),
    [
        (NO_SQUARE, token_module, LOCAL, (7, D)),
        (NO_SQUARE, token_module, GLOBAL, (T, T, 7, D)),
        (ANOTHER("local", "10, 7", "10, 6"), token_module, LOCAL, (N, D + 1)),
        (ANOTHER("global", "4, 4, 10, 7", "4, 4, 10, 6"), token_module, GLOBAL, (T, T, N, D + 1)),
        (TILE_SHAPES, tile_module, "embedding", (T, T, 1, D + 1)),
        (TILE_SHAPES, tile_module, "embedding", (T, T, 2, D)),
        (TILE_SIDES, tile_module, "embedding", (2, 3, 1, D)),
    ],
)
def test_tables_that_cannot_be_interpolated_are_refused(message, make, name, shape):
    with pytest.raises(ValueError, match=message):
        make()._load_state_dict_hook({name: torch.zeros(shape)}, "")


@pytest.fixture
def mesh():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("dim", [0, None])
def test_sharded_tables_are_interpolated_whole_and_sharded_again(mesh, dim):
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    placements = [Replicate() if dim is None else Shard(dim)]
    state = {"tile.embedding": torch.randn(2, 2, 1, D), f"token.{LOCAL}": torch.randn(5, D), f"token.{GLOBAL}": torch.randn(2, 2, 5, D)}
    sharded = {name: distribute_tensor(t, mesh, placements) for name, t in state.items()}
    for name, make in MAKE.items():
        for found in (state, sharded):
            make()._load_state_dict_hook(found, f"{name}.")
    for name, t in sharded.items():
        assert isinstance(t, DTensor) and t.device_mesh == mesh and list(t.placements) == placements and torch.equal(t.full_tensor(), state[name])


@BOTH
@FORMS
def test_nothing_waits_for_the_device_and_the_work_is_not_cut_by_image(make, supported, on_device):
    module, counts = make(aspect_ratios=supported), []
    for n in (1, 9):
        x, ratio, dy = torch.randn(n, T, N, D, requires_grad=True), torch.tensor(RATIOS[:n]), torch.randn(n, T, N, D)
        module.zero_grad()
        with NoWaiting() as recorded:
            module(x, ratio).backward(dy)
        counts.append(recorded.ops)
    assert counts[0] == counts[1]
    assert sum(counts[0].values()) > 10  # the recording did see forward and backward


@BOTH
@FORMS
def test_a_module_made_on_meta_works_after_to_empty(make, supported):
    """A table of ratios loads as it is."""
    source, x, ratio = make(aspect_ratios=supported), torch.randn(len(RATIOS), T, N, D), torch.tensor(RATIOS)
    with torch.device("meta"):
        module = make(aspect_ratios=supported)
    module.to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(module(x, ratio), source(x, ratio)) and all(map(torch.equal, module.parameters(), source.parameters()))
