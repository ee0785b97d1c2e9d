from fastfuse.data.images import pad_dim_to_size as pad_dim_to_size
