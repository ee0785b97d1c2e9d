"""From conversations and images to batches a vision model takes."""

from fastfuse.data.collate import CROSS_ENTROPY_IGNORE_IDX as CROSS_ENTROPY_IGNORE_IDX
from fastfuse.data.collate import left_pad_sequence as left_pad_sequence
from fastfuse.data.collate import padded_collate_sft as padded_collate_sft
from fastfuse.data.collate import padded_collate_tiled_images_and_mask as padded_collate_tiled_images_and_mask
from fastfuse.data.images import find_supported_resolutions as find_supported_resolutions
from fastfuse.data.images import get_canvas_best_fit as get_canvas_best_fit
from fastfuse.data.images import get_inscribed_size as get_inscribed_size
from fastfuse.data.images import pad_dim_to_size as pad_dim_to_size
from fastfuse.data.images import resize_with_pad as resize_with_pad
from fastfuse.data.images import tile_crop as tile_crop
from fastfuse.data.llama3_tokenizer import Llama3Tokenizer as Llama3Tokenizer
from fastfuse.data.llama3_tokenizer import TextTokenizer as TextTokenizer
from fastfuse.data.messages import Message as Message
from fastfuse.data.transforms import CLIPImageTransform as CLIPImageTransform
from fastfuse.data.transforms import VisionCrossAttentionMask as VisionCrossAttentionMask
