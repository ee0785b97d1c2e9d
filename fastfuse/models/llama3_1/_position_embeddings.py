"""torchtune's import path for the rotary embedding with Llama 3.1's scaling."""

from fastfuse.modules.position_embeddings import Llama3ScaledRoPE as Llama3ScaledRoPE
