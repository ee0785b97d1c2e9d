"""torchtune's import path for the transform of tiled images."""

from fastfuse.data import CLIPImageTransform as CLIPImageTransform
