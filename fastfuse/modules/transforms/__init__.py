"""torchtune's import paths for the transforms of fastfuse.data."""

from fastfuse.data.transforms import VisionCrossAttentionMask as VisionCrossAttentionMask
