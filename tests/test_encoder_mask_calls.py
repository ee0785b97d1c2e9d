"""EncoderMask beside the rest of PyTorch: what it refuses, allocates and waits for, copies, torch.compile and fake tensors."""

from functools import partial

import pytest
import torch
from test_encoder_mask import DEVICE, IMAGE, routed, some_masks
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close
from waiting import Counted, NoReading, NoWaiting

from fastfuse.ops.encoder_mask import KINDS, Blocks, EncoderMask

CUDA = torch.cuda.is_available()
DENSE, TILES, TOKENS = torch.ones(2, 3, 4, dtype=torch.bool), torch.ones(2, 3, 1, 4, dtype=torch.bool), torch.tensor([[IMAGE, IMAGE, 1], [1, 1, 1]])
MASK, NO_ROWS, META, ONE = EncoderMask.from_dense(DENSE), EncoderMask.from_dense(DENSE[:, :0]), TOKENS.to("meta"), torch.ones(2, 1, dtype=torch.int64)
HOLE, TILE_HOLE = DENSE & ~torch.eye(24)[21].view(2, 3, 4).bool(), TILES & ~torch.eye(24)[5].view(2, 3, 1, 4).bool()


def narrower(s, s_e):
    return EncoderMask.from_dense(torch.ones(2, s, s_e, dtype=torch.bool))


REFUSED = [  # (method, arguments, message); the last argument of a constructor may be a kind
    ("from_dense", (DENSE.float(),), "mask is torch.float32, expected torch.bool"),
    ("from_dense", (DENSE[:, None],), r"mask has shape \(2, 1, 3, 4\), expected \[b, s, s_e\]"),
    ("from_dense", (DENSE, "dense"), "kind is 'dense', not one of auto, interval, bits"),
    ("from_tiles", (TILES, 5, "dense"), "kind is 'dense', not one of"),
    ("from_tokens", (TOKENS, IMAGE, TOKENS, 9, 5, "x"), "kind is 'x', not one of"),
    ("from_tiles", (TILES.float(), 5), "visible is torch.float32, expected bool or integers"),
    ("from_tiles", (DENSE, 5), r"visible has shape \(2, 3, 4\), expected \[b, s, n_img, n_tiles\]"),
    ("from_tiles", (TILES, 0), "tokens_per_tile is 0, expected 1 or more"),
    ("from_tiles", (TILES, 5.0), "tokens_per_tile is a float, expected a whole number"),
    ("from_intervals", (torch.ones(1, 2, 2), 4), "intervals is torch.float32, expected integers"),
    ("from_intervals", (DENSE[..., :2], 4), "intervals is torch.bool, expected integers"),
    ("from_intervals", (TOKENS, 4), r"intervals has shape \(2, 3\), expected \[b, s, 2\]"),
    ("from_intervals", (DENSE.long(), 4), r"intervals has shape \(2, 3, 4\), expected \[b, s, 2\]"),
    ("from_intervals", (ONE.view(1, 1, 2), -1), "s_e is -1, expected 0 or more"),
    ("from_tokens", (TOKENS.float(), 7, TOKENS, 9, 5), "tokens is torch.float32, expected integers"),
    ("from_tokens", (DENSE.long(), 7, TOKENS, 9, 5), r"tokens has shape \(2, 3, 4\), expected \[b, s\]"),
    ("from_tokens", (TOKENS, 7, TOKENS[0], 9, 5), r"tiles has shape \(3,\), expected \[b, n_img\]"),
    ("from_tokens", (TOKENS, 7, TOKENS[:1], 9, 5), "tokens has 2 rows, tiles 1"),
    ("from_tokens", (TOKENS, 7, META, 9, 5), "tokens is on cpu, tiles on meta"),
    ("from_tokens", (TOKENS, 7, TOKENS, 0, 5), "n_tiles is 0, expected 1 or more"),
    ("blocks", (0,), "tokens is 0, expected 1 or more"),
    ("filled", (5,), "length is 5, the mask has 4 columns"),
    ("filled", (-1,), "length is -1, expected 0 or more"),
    ("filled", (torch.ones(2),), "length is torch.float32, expected integers"),
    ("filled", (TOKENS[0],), r"length has shape \(3,\), expected \(\) or \(2,\)"),
    ("filled", (META[:, 0],), "length is on meta, the mask on cpu"),
    ("narrow", (2, 2), "rows 2 to 4 of a mask of 3"),
    ("narrow", (-1, 1), "rows -1 to 0 of a mask of 3"),
    ("extended", (2,), "s is 2, the mask has 3 rows"),
    ("widened", (3,), "s_e is 3, the mask has 4 columns"),
    ("cat", ([],), "masks is empty, expected one or more"),
    ("cat", ([MASK, narrower(2, 4)],), r"masks have \(s, s_e\) \(3, 4\) and \(2, 4\)"),
    ("cat", ([MASK, narrower(3, 5)],), r"masks have \(s, s_e\) \(3, 4\) and \(3, 5\)"),
    ("cat", ([MASK, MASK.to("meta")],), "masks are on cpu and meta"),
]
REFUSED_BY_VALUE = [  # what a host cannot see of tensors on a device
    ("from_dense", (HOLE, "interval"), r"kind is 'interval', row \(1, 2\) of mask is not one interval"),
    ("from_tiles", (TILE_HOLE, 5, "interval"), r"kind is 'interval', row \(0, 1\) of visible is not one interval"),
    ("from_intervals", (torch.tensor([[[0, 5]]]), 4), "intervals has 5, expected 0 to s_e, which is 4"),
    ("from_intervals", (torch.tensor([[[-1, 2]]]), 4), "intervals has -1, expected 0 to s_e, which is 4"),
    ("from_intervals", (torch.tensor([[[-1, 2]]], dtype=torch.int16), 70000), "intervals has -1, expected 0 to s_e, which is 70000"),
    ("from_tokens", (TOKENS, IMAGE, ONE, 4, 5), "tokens has 2 image tokens in a row, tiles has 1 images"),
    ("from_tokens", (TOKENS, IMAGE, TOKENS, 4, 5), "tiles has 7, expected 0 to n_tiles, which is 4"),
    ("filled", (torch.tensor([1, 5]),), "length has 5, expected 0 to s_e, which is 4"),
]


def ask(method, args):
    kind = {"kind": args[-1]} if isinstance(args[-1], str) else {}
    getattr(MASK, method)(*args[: len(args) - len(kind)], **kind)


@pytest.mark.parametrize("method, args, message", [*REFUSED, *([] if CUDA else REFUSED_BY_VALUE)], ids=lambda x: x if isinstance(x, str) else "")
def test_refusals(method, args, message):
    error = TypeError if "expected a whole number" in message else ValueError
    with pytest.raises(error, match=f"^EncoderMask.{method}: {message}") as e:
        ask(method, args)
    assert type(e.value) is error and "\n" not in str(e.value)


def test_a_mask_without_rows_refuses():
    with pytest.raises(ValueError, match=r"last_row: the mask has shape \(2, 0, 4\), no row"):
        NO_ROWS.last_row()
    with pytest.raises(ValueError, match="extended: s is 2, the mask has 0 rows"):
        NO_ROWS.extended(2)


@pytest.mark.skipif(CUDA, reason="an assertion on the device ends its context")
@pytest.mark.parametrize("method, args, message", REFUSED_BY_VALUE)
def test_what_the_host_cannot_see_fails_an_assertion_of_the_device(method, args, message, values_on_a_device):
    """A CPU's assertions are at once."""
    with pytest.raises(RuntimeError, match=f"EncoderMask.{method}"):
        ask(method, args)


def sources(s, n_img, tokens_per_tile):
    """(visible, intervals, tokens, tiles) of a batch of two: an image begins every 8 tokens."""
    place, n_tiles = torch.arange(s), 4
    visible = (place[:, None] // 8 == torch.arange(n_img)).long()[None, ..., None].repeat(2, 1, 1, n_tiles)
    intervals = torch.randint(n_img * n_tiles * tokens_per_tile, (2, s, 2))
    tokens = torch.where((place % 8 == 0) & (place < 8 * n_img), IMAGE, 1).repeat(2, 1)
    return tuple(t.to(DEVICE) for t in (visible, intervals, tokens, torch.full((2, n_img), n_tiles)))


def build_all(visible, intervals, tokens, tiles, tokens_per_tile, length):
    """Every way to a mask that sees no dense one."""
    by_tiles = partial(EncoderMask.from_tiles, visible, tokens_per_tile)
    by_intervals = partial(EncoderMask.from_intervals, intervals, visible.shape[2] * visible.shape[3] * tokens_per_tile)
    by_tokens = partial(EncoderMask.from_tokens, tokens, IMAGE, tiles, visible.shape[3], tokens_per_tile)
    return {
        "bits": partial(by_tiles, kind="bits"),
        "tiles": partial(by_tiles, kind="interval"),
        "intervals": by_intervals,
        "tokens": by_tokens,
        "filled": lambda: by_tiles(kind="bits").filled(),
        "filled to": lambda: by_tokens(kind="bits").filled(length),
        "cat": lambda: EncoderMask.cat([by_intervals(), by_tiles(kind="bits")]),
    }


@pytest.mark.parametrize("tokens_per_tile, route", [(1601, "auto"), (100, "torch"), (100, "triton")])  # 200 lists are 4 s to the interpreter
def test_nothing_of_the_dense_masks_size_is_made(tokens_per_tile, route, launches):
    """launches: what the interpreter makes inside of a kernel does not count."""
    s, n_img = 32, 2
    given, length = sources(s, n_img, tokens_per_tile), torch.tensor([3, 700], device=DEVICE)
    dense = 2 * s * n_img * 4 * tokens_per_tile
    with routed(route):
        for name, build in build_all(*given, tokens_per_tile, length).items():
            with Counted() as mode:
                em = build()
                em.blocks(16)
                em.last_row().extended(4).widened(em.shape[2] + 1)
            assert 0 < max(mode.sizes) <= dense // 8, name
        with Counted() as mode:
            em.to_dense()
        assert max(mode.sizes) >= dense  # the count finds one out


@pytest.mark.parametrize("route", ["auto", "torch"])
def test_nothing_waits_for_the_device(route, values_on_a_device):
    """Without the look at the values that a CPU allows."""
    length, dense = torch.tensor([3, 300], device=DEVICE), torch.ones(2, 8, 200, dtype=torch.bool, device=DEVICE)
    builds = build_all(*sources(8, 1, 100), 100, length) | {f"dense {kind}": lambda kind=kind: EncoderMask.from_dense(dense, kind=kind) for kind in KINDS}
    kinds = {}
    with routed(route), NoReading():
        for name, build in builds.items():
            with NoWaiting():
                em = build()
                em.blocks(4)
                em.filled(length.clamp(max=200)[:1].expand(em.shape[0])).filled(5).filled().blocks(4)
                EncoderMask.cat([em.last_row().extended(3).widened(900), em.narrow(1, 3).widened(900)]).to_dense()
                em.to(DEVICE), repr(em)
            kinds[name] = em.kind
    assert [name for name, kind in kinds.items() if kind == "interval"] == ["tiles", "intervals", "dense interval"]


def everything(em):
    blocks, again, filled = em.blocks(32), em.blocks(32), em.filled()
    return [em.rows, em.rows_empty, *blocks, *again, filled.rows, filled.rows_empty, *filled.blocks(16), em.narrow(1, 3).rows]


@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_a_mask_made_outside_of_what_is_compiled(kind):
    run = torch.compile(lambda em, x: [x + em.rows_empty.sum(), *everything(em)], fullgraph=True, backend="aot_eager")
    x = torch.ones(3, dtype=torch.int64, device=DEVICE)
    em, dense = some_masks(2, 40)[kind]
    fresh = EncoderMask.from_dense(dense.to(DEVICE), kind=kind)
    for _ in range(2):  # the second time with the lists that the first one left
        first, *rest = run(em, x)
        assert torch.equal(first, x + em.rows_empty.sum()) and first[0] > 1
        assert_close(rest, everything(fresh))
    assert list(em._blocks) == [32] and type(em.blocks(32)) is Blocks and em.filled().rows is rest[10]


def test_compiled_from_tokens_tiles_and_intervals():
    visible, intervals, tokens, tiles = sources(32, 2, 100)

    def build(**kind):
        by_tokens = EncoderMask.from_tokens(tokens, IMAGE, tiles, 4, 100, **kind)
        made = EncoderMask.from_tiles(visible, 100, **kind), by_tokens, EncoderMask.from_intervals(intervals, 800)
        return made, [t for em in made for t in everything(em)]

    made, got = torch.compile(build, fullgraph=True, backend="aot_eager")()
    assert [(type(em), em.kind) for em in made] == [(EncoderMask, kind) for kind in ("bits", "bits", "interval")]
    assert_close(got, build(kind="bits")[1])


@pytest.mark.skipif(CUDA, reason="an assertion on the device ends its context")
def test_compiled_a_bound_out_of_range_is_an_error_too():
    run = torch.compile(lambda x: EncoderMask.from_intervals(x, 4).rows, fullgraph=True, backend="eager")
    assert run(torch.tensor([[[1, 4]]])).tolist() == [[[1, 4]]]
    with pytest.raises(RuntimeError, match="intervals has a value outside 0 to s_e"):
        run(torch.tensor([[[1, 5]]]))


def test_shapes_without_memory(values_on_a_device):
    """from_tokens would look where it can, and take intervals."""
    given = *sources(32, 2, 100), torch.tensor([3, 700], device=DEVICE), torch.ones(2, 32, 800, dtype=torch.bool, device=DEVICE)

    def described(visible, intervals, tokens, tiles, length, dense):
        made = [build() for build in build_all(visible, intervals, tokens, tiles, 100, length).values()]
        made += [EncoderMask.from_dense(dense, kind=kind) for kind in ("bits", "interval")]
        found = [t for em in made for t in (*everything(em), em.to_dense(), em.last_row().rows, em.filled(length.max()).rows)]
        return [(tuple(t.shape), t.dtype, t.stride()) for t in found]

    want, mode = described(*given), FakeTensorMode()
    assert described(*(t.to("meta") for t in given)) == want
    fakes = [mode.from_tensor(t) for t in given]
    with mode:
        assert described(*fakes) == want
