"""Text generation, with torchtune's names."""

from fastfuse.generation._generation import generate as generate
from fastfuse.generation._generation import generate_next_token as generate_next_token
from fastfuse.generation._generation import get_causal_mask_from_padding_mask as get_causal_mask_from_padding_mask
from fastfuse.generation._generation import get_position_ids_from_padding_mask as get_position_ids_from_padding_mask
from fastfuse.generation._generation import sample as sample
