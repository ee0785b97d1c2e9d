"""Learned positions of a vision transformer: of tokens in a tile, and of tiles in an image.

The tiled modules hold one entry per tile of a [max_num_tiles, max_num_tiles] grid, of which an image of h x w tiles uses
the upper left block. With `aspect_ratios` they hold one row per aspect ratio instead, row 0 for padding images: how
transformers stores Mllama, where the rows of two ratios may disagree.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional as F

from fastfuse.modules.position_embeddings import patch_grid
from fastfuse.ops._device_checks import assert_on_device, values_are_at_hand


class TokenPositionalEmbedding(nn.Module):
    """x + positional_embedding, [(tile_size / patch_size)^2 + 1, embed_dim], for images of one tile."""

    def __init__(self, embed_dim: int, tile_size: int, patch_size: int):
        super().__init__()
        self.positional_embedding = nn.Parameter(embed_dim**-0.5 * torch.randn(patch_grid(tile_size, patch_size) ** 2 + 1, embed_dim))

    def forward(self, x: Tensor, *args: object) -> Tensor:
        """x: (..., n_tokens, embed_dim); further arguments are ignored."""
        return x + self.positional_embedding


class _TileTable(nn.Module):
    """Where an (image, tile) finds its row: in a grid of tiles, or in a row per aspect ratio."""

    def __init__(self, max_num_tiles: int, aspect_ratios: Sequence[Sequence[int]] | None):
        super().__init__()
        self.max_num_tiles = max_num_tiles
        self.aspect_ratios = None if aspect_ratios is None else [tuple(r) for r in aspect_ratios]
        if self.aspect_ratios is not None:
            for h, w in self.aspect_ratios:
                if not (h > 0 and w > 0 and h * w <= max_num_tiles):
                    raise ValueError(f"aspect_ratios has ({h}, {w}), which is not 1 to max_num_tiles={max_num_tiles} tiles")
            self.register_buffer("ratio_ids", self._ratio_ids(), persistent=False)
        self._register_load_state_dict_pre_hook(self._load_state_dict_hook)

    def _ratio_ids(self) -> Tensor:
        """int64 [T + 1, T + 1]: (h, w) -> its row, -1 for a ratio that is not supported, 0 for (0, 0)."""
        ids = [[-1] * (self.max_num_tiles + 1) for _ in range(self.max_num_tiles + 1)]
        ids[0][0] = 0
        for i, (h, w) in enumerate(self.aspect_ratios):
            ids[h][w] = i + 1
        return torch.tensor(ids)

    def _apply(self, fn, recurse=True):
        before = getattr(self, "ratio_ids", None)
        super()._apply(fn, recurse)
        if before is not None and not self.ratio_ids.is_meta:  # memory from to_empty holds nothing
            self.ratio_ids = (self._ratio_ids() if before.is_meta else before).to(self.ratio_ids.device)
        return self

    def _table_shape(self) -> tuple[int, int]:
        T = self.max_num_tiles
        return (T, T) if self.aspect_ratios is None else (len(self.aspect_ratios) + 1, T)

    def _of_tiles(self, table: Tensor, aspect_ratio: Tensor, n_tiles: int) -> Tensor:
        """table: [*table shape, n, d], aspect_ratio: [images, 2]  ->  [images, n_tiles, n, d], zero for padding tiles."""
        T, (n, d) = self.max_num_tiles, table.shape[2:]
        self._check(aspect_ratio, n_tiles)
        h, w = aspect_ratio.long().unbind(-1)
        if self.aspect_ratios is not None:
            rows = F.embedding(self.ratio_ids[h, w].clamp(min=0), table.flatten(1))
            return rows.view(-1, T, n, d)[:, :n_tiles]
        tile = torch.arange(n_tiles, device=table.device)
        valid = tile < (h * w)[:, None]
        column = w.clamp(min=1)[:, None]  # (0, 0) is an image without tiles
        cell = torch.where(valid, tile // column * T + tile % column, 0)
        # embedding rather than indexing: its gradient has a deterministic kernel and is linear in the number of tiles.
        tiles = F.embedding(cell, table.reshape(T * T, n * d)).view(-1, n_tiles, n, d)
        return torch.where(valid[:, :, None, None], tiles, 0)

    def ids_of(self, aspect_ratio: Tensor, n_tiles: int) -> Tensor:
        """The table's row of each image, int64 [images], where it holds one per aspect ratio; -1 for a ratio that has none.

        Raises ValueError as forward, where the values are at hand.
        """
        self._check_dtype(aspect_ratio)
        if values_are_at_hand(aspect_ratio):
            self._check(aspect_ratio, n_tiles)
        ratio = aspect_ratio.long()
        h, w = ratio.clamp(0, self.max_num_tiles).unbind(-1)
        fits = (ratio >= 0).all(-1) & (ratio <= self.max_num_tiles).all(-1) & (h * w <= n_tiles)
        return torch.where(fits, self.ratio_ids[h, w], -1)

    @staticmethod
    def _check_dtype(aspect_ratio: Tensor) -> None:
        if aspect_ratio.is_floating_point() or aspect_ratio.dtype == torch.bool:
            raise ValueError(f"aspect_ratio is {aspect_ratio.dtype}, expected integers: tiles (h, w)")

    def _check(self, aspect_ratio: Tensor, n_tiles: int) -> None:
        self._check_dtype(aspect_ratio)
        h, w = aspect_ratio.unbind(-1)
        if self.aspect_ratios is not None and n_tiles > self.max_num_tiles:
            raise ValueError(f"images have {n_tiles} tiles, the position table holds max_num_tiles={self.max_num_tiles}")
        right = (h >= 0) & (w >= 0) & (h <= self.max_num_tiles) & (w <= self.max_num_tiles) & (h * w <= n_tiles)
        if not values_are_at_hand(aspect_ratio):
            assert_on_device(right.all(), f"aspect_ratio has an image of more than {n_tiles} tiles, or of a side over max_num_tiles={self.max_num_tiles}")
            if self.aspect_ratios is not None:
                row = self.ratio_ids[h.long().clamp(0, self.max_num_tiles), w.long().clamp(0, self.max_num_tiles)]
                assert_on_device((row >= 0).all(), f"aspect_ratio has an image (h, w) that is not among aspect_ratios={self.aspect_ratios}")
            return
        if not right.all():
            wrong = aspect_ratio[~right][0].tolist()
            raise ValueError(f"aspect_ratio has {wrong} (h, w), images have {n_tiles} tiles and max_num_tiles is {self.max_num_tiles}")
        if self.aspect_ratios is not None and (self.ratio_ids[h.long(), w.long()] < 0).any():
            unknown = aspect_ratio[self.ratio_ids[h.long(), w.long()] < 0][0].tolist()
            raise ValueError(f"aspect_ratio has {unknown} (h, w), which is not among aspect_ratios={self.aspect_ratios}")


class TilePositionalEmbedding(_TileTable):
    """x + tanh(gate) * embedding of the tile, the same for all its tokens; padding tiles stay as they are.

    embedding: [T, T, 1, embed_dim], T = max_num_tiles, or [len(aspect_ratios) + 1, T, 1, embed_dim].  gate: (1,), zero at first.
    Loading a table for another number of tiles interpolates it.
    """

    def __init__(self, max_num_tiles: int, embed_dim: int, *, aspect_ratios: Sequence[Sequence[int]] | None = None):
        super().__init__(max_num_tiles, aspect_ratios)
        self.embed_dim = embed_dim
        self.embedding = nn.Parameter(embed_dim**-0.5 * torch.randn(*self._table_shape(), 1, embed_dim))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, aspect_ratio: Tensor) -> Tensor:
        """x: [images, n_tiles, n_tokens, embed_dim], aspect_ratio: int [images, 2], tiles (h, w)  ->  a new tensor in x's dtype.

        Raises ValueError for a ratio that does not fit the tiles; on a GPU and under torch.compile that is an assertion
        on the device.
        """
        return (x + self._of_tiles(self.embedding, aspect_ratio, x.shape[1]) * self.gate.tanh()).to(x.dtype)

    @torch.no_grad()
    def _load_state_dict_hook(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        name = prefix + "embedding"
        loaded = state_dict.get(name)
        if loaded is None or self.aspect_ratios is not None:
            return
        if loaded.dim() != 4 or loaded.shape[2:] != self.embedding.shape[2:]:
            expected, shape = tuple(self.embedding.shape), tuple(loaded.shape)
            raise ValueError(f"Expected embedding shape to be (..., num_tokens, tgt_emb) to match but found shapes {expected} and {shape} for {name}")
        if loaded.shape[0] != loaded.shape[1]:
            x, y = loaded.shape[:2]
            raise ValueError(
                f"Expected max_num_tiles_x, max_num_tiles_y to be equal but found, but found(max_num_tiles_x, max_num_tiles_y) = {(x, y)} for {name}"
            )
        state_dict[name] = _gathered(loaded, lambda t: self._resize_position_embedding(t, self.max_num_tiles))

    @staticmethod
    def _resize_position_embedding(embedding: Tensor, tgt_max_num_tiles: int) -> Tensor:
        """[T, T, 1, d] -> [T', T', 1, d], bilinear, corners kept."""
        return _resize_grid(embedding.squeeze(2), tgt_max_num_tiles).unsqueeze(2).contiguous()


class TiledTokenPositionalEmbedding(_TileTable):
    """x + (1 - tanh(gate)) * the token's position in its tile + tanh(gate) * its position in the image.

    Padding tiles get the first part alone.  local_token_positional_embedding: [n_tokens, embed_dim];
    global_token_positional_embedding: [T, T, n_tokens, embed_dim], T = max_num_tiles, or [len(aspect_ratios) + 1, T, ...];
    gate: (1,), zero at first.  Loading tables for another tile size, patch size or number of tiles interpolates them.
    """

    def __init__(self, max_num_tiles: int, embed_dim: int, tile_size: int, patch_size: int, *, aspect_ratios: Sequence[Sequence[int]] | None = None):
        super().__init__(max_num_tiles, aspect_ratios)
        self.patch_grid_size = patch_grid(tile_size, patch_size)
        self.n_tokens_per_tile = self.patch_grid_size**2 + 1
        scale = embed_dim**-0.5
        self.local_token_positional_embedding = nn.Parameter(scale * torch.randn(self.n_tokens_per_tile, embed_dim))
        self.global_token_positional_embedding = nn.Parameter(scale * torch.randn(*self._table_shape(), self.n_tokens_per_tile, embed_dim))
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, aspect_ratio: Tensor) -> Tensor:
        """x: [images, n_tiles, n_tokens, embed_dim], aspect_ratio: int [images, 2], tiles (h, w)  ->  the same shape, in the
        wider dtype of x and the tables. Raises ValueError as TilePositionalEmbedding.forward."""
        gate = self.gate.tanh()
        x = x + self.local_token_positional_embedding * (1 - gate)
        return x + self._of_tiles(self.global_token_positional_embedding, aspect_ratio, x.shape[1]) * gate

    @torch.no_grad()
    def _load_state_dict_hook(self, state_dict: dict, prefix: str, *args: object, **kwargs: object) -> None:
        local, table = prefix + "local_token_positional_embedding", prefix + "global_token_positional_embedding"
        if local in state_dict:
            _check_square(state_dict[local].shape[0] - 1, state_dict[local])
            state_dict[local] = _gathered(state_dict[local], lambda t: self._resize_local_position_embedding(t, self.patch_grid_size))
            self._check_resized("local", state_dict[local], self.local_token_positional_embedding)
        if table in state_dict and self.aspect_ratios is None:
            _check_square(state_dict[table].shape[-2] - 1, state_dict[table])
            state_dict[table] = _gathered(state_dict[table], lambda t: self._resize_global_position_embedding(t, self.max_num_tiles, self.patch_grid_size))
            self._check_resized("global", state_dict[table], self.global_token_positional_embedding)

    @staticmethod
    def _check_resized(kind: str, resized: Tensor, expected: Tensor) -> None:
        if resized.shape != expected.shape:
            raise ValueError(
                f"Loaded {kind} positional embedding has shape {tuple(resized.shape)}, after interpolation. Expected shape {tuple(expected.shape)}"
            )

    @staticmethod
    def _resize_local_position_embedding(local_pos_embed: Tensor, tgt_patch_grid_size: int) -> Tensor:
        """[g^2 + 1, d] -> [g'^2 + 1, d]; the first row, CLS, stays."""
        cls, patches = local_pos_embed[:1], local_pos_embed[1:]
        grid = round(patches.shape[0] ** 0.5)
        resized = _resize_grid(patches.unflatten(0, (grid, grid)), tgt_patch_grid_size)
        return torch.cat([cls, resized.flatten(0, 1)]).contiguous()

    @staticmethod
    def _resize_global_position_embedding(global_pos_embed: Tensor, tgt_max_num_tiles: int, tgt_patch_grid_size: int) -> Tensor:
        """[T, T, g^2 + 1, d] -> [T', T', g'^2 + 1, d]: the patches of all tiles as one map, and the CLS rows as another."""
        cls, patches = global_pos_embed[:, :, 0], global_pos_embed[:, :, 1:]
        tiles, grid = patches.shape[0], round(patches.shape[2] ** 0.5)
        image = patches.unflatten(2, (grid, grid)).transpose(1, 2).reshape(tiles * grid, tiles * grid, -1)
        image = _resize_grid(image, tgt_max_num_tiles * tgt_patch_grid_size)
        size = (tgt_max_num_tiles, tgt_patch_grid_size)
        patches = image.unflatten(1, size).unflatten(0, size).transpose(1, 2).flatten(2, 3)
        return torch.cat([_resize_grid(cls, tgt_max_num_tiles)[:, :, None], patches], 2).contiguous()


def _resize_grid(grid: Tensor, side: int) -> Tensor:
    """[g, g, d] -> [side, side, d], bilinear, corners on corners; equal to the bit where side is g."""
    return F.interpolate(grid.movedim(-1, 0)[None], size=(side, side), mode="bilinear", align_corners=True)[0].movedim(0, -1)


def _check_square(n: int, loaded: Tensor) -> None:
    if round(max(n, 0) ** 0.5) ** 2 != n:
        raise ValueError(
            f"Loaded local positional embedding has shape inpt_n_tokens_per_tile={n + 1}, which indicates a grid_size that is not squared. "
            f"This is currently not supported. Its shape is {tuple(loaded.shape)}."
        )


def _gathered(t: Tensor, resize) -> Tensor:
    """resize(t); a DTensor is gathered before and sharded as it was after."""
    if not isinstance(t, DTensor):
        return resize(t)
    return distribute_tensor(resize(t.full_tensor()), device_mesh=t.device_mesh, placements=t.placements)
