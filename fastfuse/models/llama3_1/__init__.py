"""The parts of Llama 3.1 that the vision models stand on."""

from fastfuse.models.llama3_1._component_builders import llama3_mlp as llama3_mlp
from fastfuse.models.llama3_1._component_builders import lora_llama3_attention as lora_llama3_attention
from fastfuse.models.llama3_1._component_builders import lora_llama3_mlp as lora_llama3_mlp
from fastfuse.models.llama3_1._component_builders import scale_hidden_dim_for_mlp as scale_hidden_dim_for_mlp
from fastfuse.modules.position_embeddings import Llama3ScaledRoPE as Llama3ScaledRoPE
