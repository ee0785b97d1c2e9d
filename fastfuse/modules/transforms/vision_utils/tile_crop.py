from fastfuse.data.images import tile_crop as tile_crop
