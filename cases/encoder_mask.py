"""EncoderMask from dense masks and from tiles, and its lists of blocks; loops over single rows, words and blocks as the formula."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from cases import Call, Op, Tensors, route
from fastfuse.ops import EncoderMask, _mask_ops
from fastfuse.ops._mask_ops import COLUMNS, Blocks


def words_by_loop(dense: Tensor) -> Tensor:
    b, s, s_e = dense.shape
    n_words = 4 * -(-s_e // 128)
    rows = []
    for row in dense.flatten(0, 1).tolist():
        words = [sum(1 << (n % 32) for n in range(32 * w, min(32 * w + 32, s_e)) if row[n]) for w in range(n_words)]
        rows.append([w - 2**32 if w >= 2**31 else w for w in words])
    return torch.tensor(rows, dtype=torch.int32).view(b, s, n_words)


def intervals_by_loop(dense: Tensor) -> Tensor | None:
    """[b, s, 2]; None where a row has a hole."""
    b, s, _ = dense.shape
    rows = []
    for row in dense.flatten(0, 1).tolist():
        seen = [n for n, visible in enumerate(row) if visible]
        if seen and seen != list(range(seen[0], seen[-1] + 1)):
            return None
        rows.append([seen[0], seen[-1] + 1] if seen else [0, 0])
    return torch.tensor(rows, dtype=torch.int32).view(b, s, 2)


def blocks_by_loop(dense: Tensor, tokens: int) -> Blocks:
    b, s, s_e = dense.shape
    nq, nk = -(-s // tokens), -(-s_e // COLUMNS)

    def state(i: int, q: int, k: int) -> str:
        rows = dense[i, q * tokens : (q + 1) * tokens]
        seeing = [row[k * COLUMNS : (k + 1) * COLUMNS] for row in rows if row.any()]
        if not any(part.any() for part in seeing):
            return "empty"
        return "full" if all(len(part) == COLUMNS and part.all() for part in seeing) else "partial"

    def lists(outer: int, inner: int, at: Callable) -> tuple[Tensor, Tensor]:
        listed, counts = [], []
        for i in range(b):
            for o in range(outer):
                states = [at(i, o, n) for n in range(inner)]
                full, partial = ([n for n in range(inner) if states[n] == what] for what in ("full", "partial"))
                listed.append(full + partial + [0] * (inner - len(full) - len(partial)))
                counts.append([len(full), len(full) + len(partial)])
        return torch.tensor(listed, dtype=torch.int32).view(b, outer, inner), torch.tensor(counts, dtype=torch.int32).view(b, outer, 2)

    return Blocks(*lists(nq, nk, state), *lists(nk, nq, lambda i, k, q: state(i, q, k)))


def tiles_by_loop(visible: Tensor, tokens_per_tile: int) -> Tensor:
    b, s, n_img, n_tiles = visible.shape
    dense = torch.zeros(b, s, n_img * n_tiles * tokens_per_tile, dtype=torch.bool)
    for image in range(n_img):
        for tile in range(n_tiles):
            first = (image * n_tiles + tile) * tokens_per_tile
            dense[:, :, first : first + tokens_per_tile] = visible[:, :, image, tile].cpu()[..., None] != 0
    return dense


def make(device, mask: Tensor, kind: str = "bits", tokens: int = 4, tokens_per_tile: int | None = None) -> Call:
    """mask: bool [b, s, s_e], or of tiles [b, s, n_img, n_tiles] with their tokens_per_tile. tokens: of a token block."""

    def run(t: Tensors):
        of_tiles = tokens_per_tile is not None
        em = EncoderMask.from_tiles(t["mask"], tokens_per_tile, kind=kind) if of_tiles else EncoderMask.from_dense(t["mask"], kind=kind)
        return em.rows, em.rows_empty, *em.blocks(tokens), em.filled().rows

    def formula(t: Tensors):
        dense = (t["mask"] if tokens_per_tile is None else tiles_by_loop(t["mask"], tokens_per_tile)).cpu()
        by_loop = words_by_loop if kind == "bits" else intervals_by_loop
        blind = ~dense.any(-1)
        return tuple(part.to(t["mask"].device) for part in (by_loop(dense), blind, *blocks_by_loop(dense, tokens), by_loop(dense | blind[..., None])))

    return Call(run, formula, {"mask": mask.to(device)})


def between(*bounds: tuple[int, int], s_e: int = 260) -> Tensor:
    """bool [1, s, s_e]: row i sees columns bounds[i][0] to bounds[i][1]."""
    n = torch.arange(s_e)
    return torch.stack([(lo <= n) & (n < hi) for lo, hi in bounds])[None]


def random(*shape: int) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.5


# A column more or less than a block, each in a token block of its own.
EDGES = between(
    (0, 128), (0, 127), (1, 128), (0, 129), (127, 129), (127, 128), (128, 129), (0, 1), (128, 256), (129, 256), (0, 255), (255, 260), (256, 260), (0, 260), (9, 9)
)  # fmt: skip
# Rows that see nothing have no say in what is full: 0 and 4 to 7 of these.
SOME = between((9, 9), (0, 128), (0, 256), (0, 128), *[(9, 9)] * 4)
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
