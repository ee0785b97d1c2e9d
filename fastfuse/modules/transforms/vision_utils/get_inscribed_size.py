from fastfuse.data.images import get_inscribed_size as get_inscribed_size
