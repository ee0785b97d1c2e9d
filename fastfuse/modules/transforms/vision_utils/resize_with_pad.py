from fastfuse.data.images import resize_with_pad as resize_with_pad
