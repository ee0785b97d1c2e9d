"""Fusing a pretrained encoder and a pretrained decoder."""

from fastfuse.modules.model_fusion._deep_fusion import DeepFusionModel as DeepFusionModel
from fastfuse.modules.model_fusion._fusion_layers import FusionEmbedding as FusionEmbedding
from fastfuse.modules.model_fusion._fusion_layers import FusionLayer as FusionLayer
from fastfuse.modules.model_fusion._fusion_utils import get_fusion_params as get_fusion_params
from fastfuse.modules.model_fusion._fusion_utils import register_fusion_module as register_fusion_module
