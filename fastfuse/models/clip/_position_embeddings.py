"""torchtune's import path for the position embeddings of tiled images."""

from fastfuse.modules.tile_position_embeddings import TiledTokenPositionalEmbedding as TiledTokenPositionalEmbedding
from fastfuse.modules.tile_position_embeddings import TilePositionalEmbedding as TilePositionalEmbedding
from fastfuse.modules.tile_position_embeddings import TokenPositionalEmbedding as TokenPositionalEmbedding
