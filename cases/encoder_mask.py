"""EncoderMask from dense masks and from tiles, and its lists of blocks, against the dense mask."""

from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from cases import Call, Op, Tensors, route
from fastfuse.ops import EncoderMask, _mask_ops
from fastfuse.ops._mask_ops import COLUMNS, WORD, Blocks


def words_of(dense: Tensor) -> Tensor:
    """int32 [b, s, W]"""
    b, s, s_e = dense.shape
    n = -(-s_e // COLUMNS) * COLUMNS
    flags = F.pad(dense, (0, n - s_e)).reshape(b, s, n // WORD, WORD)
    return (flags.long() << torch.arange(WORD)).sum(-1).to(torch.int32)  # the last bit is the sign


def intervals_of(dense: Tensor) -> Tensor | None:
    """int32 [b, s, 2]; None where a row has a hole."""
    n = torch.arange(dense.shape[2])
    past = F.pad(torch.where(dense, n + 1, 0), (0, 1)).amax(-1)
    rows = torch.stack([past - dense.sum(-1), past], -1).to(torch.int32)
    return rows if torch.equal(between(rows, dense.shape[2]), dense) else None


def between(rows: Tensor, s_e: int) -> Tensor:
    """bool [b, s, s_e]: row t sees columns rows[:, t, 0] to rows[:, t, 1]."""
    n = torch.arange(s_e)
    return (rows[..., :1] <= n) & (n < rows[..., 1:])


def blocks_of(dense: Tensor, tokens: int) -> Blocks:
    b, s, s_e = dense.shape
    nq, nk = -(-s // tokens), -(-s_e // COLUMNS)
    seen = F.pad(dense, (0, nk * COLUMNS - s_e, 0, nq * tokens - s)).reshape(b, nq, tokens, nk, COLUMNS)
    sees_nothing = ~seen.any(-1).any(-1, keepdim=True)
    some, full = seen.any(-1).any(2), (seen.all(-1) | sees_nothing).all(2)

    def lists(some: Tensor, full: Tensor) -> tuple[Tensor, Tensor]:
        listed, counts = torch.zeros(some.shape, dtype=torch.int32), torch.zeros(*some.shape[:2], 2, dtype=torch.int32)
        for i, o in product(*map(range, some.shape[:2])):
            whole, cut = (some[i, o] & full[i, o]).nonzero().flatten(), (some[i, o] & ~full[i, o]).nonzero().flatten()
            listed[i, o, : len(whole) + len(cut)] = torch.cat([whole, cut])
            counts[i, o] = torch.tensor([len(whole), len(whole) + len(cut)])
        return listed, counts

    return Blocks(*lists(some, full), *lists(some.mT, full.mT))


def from_tiles(visible: Tensor, tokens_per_tile: int) -> Tensor:
    return (visible.flatten(2) != 0).repeat_interleave(tokens_per_tile, 2)


def make(device, mask: Tensor, kind: str = "bits", tokens: int = 4, tokens_per_tile: int | None = None) -> Call:
    """mask: bool [b, s, s_e], or of tiles [b, s, n_img, n_tiles] with their tokens_per_tile. tokens: of a token block."""

    def run(t: Tensors):
        if tokens_per_tile is None:
            em = EncoderMask.from_dense(t["mask"], kind=kind)
        else:
            em = EncoderMask.from_tiles(t["mask"], tokens_per_tile, kind=kind)
        return em.rows, em.rows_empty, *em.blocks(tokens), em.filled().rows

    def formula(t: Tensors):
        dense = (t["mask"] if tokens_per_tile is None else from_tiles(t["mask"], tokens_per_tile)).cpu()
        rows, blind = words_of if kind == "bits" else intervals_of, ~dense.any(-1)
        return tuple(part.to(t["mask"].device) for part in (rows(dense), blind, *blocks_of(dense, tokens), rows(dense | blind[..., None])))

    return Call(run, formula, {"mask": mask.to(device)})


def seeing(*bounds: tuple[int, int]) -> Tensor:
    """bool [1, s, 260]: row i sees columns bounds[i][0] to bounds[i][1]."""
    return between(torch.tensor([bounds]), 260)


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


# A column more or less than a block, each in a token block of its own.
EDGES = seeing(
    (0, 128), (0, 127), (1, 128), (0, 129), (127, 129), (127, 128), (128, 129), (0, 1), (128, 256), (129, 256), (0, 255), (255, 260), (256, 260), (0, 260), (9, 9)
)  # fmt: skip
# Rows that see nothing have no say in what is full: 0 and 4 to 7 of these.
SOME = seeing((9, 9), (0, 128), (0, 256), (0, 128), *[(9, 9)] * 4)
HOLES = torch.cat([random(2, 7, 300), torch.zeros(2, 1, 300, dtype=torch.bool)], 1)
CASES = {
    "holes": {"mask": HOLES},
    "tiles": {"mask": random(2, 3, 2, 4), "tokens_per_tile": 33},
    "intervals": {"mask": SOME.expand(2, -1, -1), "kind": "interval"},
    "edges": {"mask": EDGES, "tokens": 1},
    "edges of intervals": {"mask": EDGES, "tokens": 1, "kind": "interval"},
    "some rows see nothing": {"mask": SOME},
    "a few rows see something": {"mask": SOME[:, :3], "kind": "interval"},
    "the columns cut the last block": {"mask": torch.ones(1, 1, 130, dtype=torch.bool)},
    "tiles of 1601 tokens": {"mask": random(1, 3, 1, 4), "tokens_per_tile": 1601},
    "tiles of intervals": {"mask": torch.arange(3).view(1, 3, 1, 1) > torch.arange(4), "tokens_per_tile": 33, "kind": "interval"},
    "no batch": {"mask": random(0, 3, 130)},
    "no rows": {"mask": random(2, 0, 130)},
    "no columns": {"mask": random(1, 3, 0)},
    "no tiles": {"mask": random(1, 3, 0, 4), "tokens_per_tile": 5},
}
# Blocks so small that every loop of a kernel is taken, and its carried counts matter, at sizes a loop in Python can check.
SMALL = {"_PACK_ROWS": 4, "_PACK_WORDS": 4, "_TILES_ROWS": 4, "_TILES_WORDS": 4, "_STATE_ROWS": 2, "_STATE_BLOCKS": 2, "_LIST_BLOCK": 2}
ROUTES = {
    "reference": partial(route, "auto"),
    "kernels": partial(route, "triton"),
    "small blocks": partial(route, "triton", None, [(vars(_mask_ops), SMALL)]),
    "torch": partial(route, "torch"),
}
OPS = [
    Op(
        "encoder_mask", make, CASES, ("holes", "tiles", "intervals"), ("no batch", "no rows", "no columns"), ROUTES, {n for n in vars(_mask_ops) if n.endswith("_kernel")},
        in_16_bits=False,
        dynamic=({"mask": (0, 1, 2)}, [{"mask": random(*shape), "tokens": 32} for shape in ((2, 40, 300), (4, 96, 1024))]),
    )
]  # fmt: skip
