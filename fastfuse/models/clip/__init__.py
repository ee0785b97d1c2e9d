"""CLIP's vision transformer over tiled images, plain and with LoRA."""

from fastfuse.data import CLIPImageTransform as CLIPImageTransform
from fastfuse.models.clip._component_builders import clip_attention as clip_attention
from fastfuse.models.clip._component_builders import clip_mlp as clip_mlp
from fastfuse.models.clip._component_builders import clip_vision_encoder as clip_vision_encoder
from fastfuse.models.clip._component_builders import lora_clip_attention as lora_clip_attention
from fastfuse.models.clip._component_builders import lora_clip_mlp as lora_clip_mlp
from fastfuse.models.clip._component_builders import lora_clip_vision_encoder as lora_clip_vision_encoder
from fastfuse.modules.tile_position_embeddings import TiledTokenPositionalEmbedding as TiledTokenPositionalEmbedding
from fastfuse.modules.tile_position_embeddings import TilePositionalEmbedding as TilePositionalEmbedding
from fastfuse.modules.tile_position_embeddings import TokenPositionalEmbedding as TokenPositionalEmbedding
