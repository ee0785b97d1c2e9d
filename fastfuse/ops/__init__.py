"""The fused ops, each with its eager reference (<op>_ref) and its cost (<op>_cost)."""

from fastfuse.ops._scratch import freeing_scratch as freeing_scratch
from fastfuse.ops.lora_row_norms import lora_row_norms as lora_row_norms
from fastfuse.ops.lora_row_norms import lora_row_norms_cost as lora_row_norms_cost
from fastfuse.ops.lora_row_norms import lora_row_norms_ref as lora_row_norms_ref
from fastfuse.ops.nf4_dequantize import nf4_dequantize as nf4_dequantize
from fastfuse.ops.nf4_dequantize import nf4_dequantize_cost as nf4_dequantize_cost
from fastfuse.ops.nf4_dequantize import nf4_dequantize_ref as nf4_dequantize_ref
from fastfuse.ops.nf4_linear import Projection as Projection
from fastfuse.ops.nf4_linear import lora_linear as lora_linear
from fastfuse.ops.nf4_linear import nf4_linear as nf4_linear
from fastfuse.ops.nf4_linear import nf4_linear_bwd_cost as nf4_linear_bwd_cost
from fastfuse.ops.nf4_linear import nf4_linear_cost as nf4_linear_cost
from fastfuse.ops.nf4_linear import nf4_linear_ref as nf4_linear_ref
from fastfuse.ops.nf4_linear import nf4_lora_linear as nf4_lora_linear
from fastfuse.ops.nf4_linear import nf4_lora_linears as nf4_lora_linears
from fastfuse.ops.nf4_swiglu_mlp import nf4_swiglu_mlp as nf4_swiglu_mlp
from fastfuse.ops.nf4_swiglu_mlp import nf4_swiglu_mlp_bwd_cost as nf4_swiglu_mlp_bwd_cost
from fastfuse.ops.nf4_swiglu_mlp import nf4_swiglu_mlp_cost as nf4_swiglu_mlp_cost
from fastfuse.ops.nf4_swiglu_mlp import nf4_swiglu_mlp_ref as nf4_swiglu_mlp_ref
from fastfuse.ops.patch_embed import patch_embed as patch_embed
from fastfuse.ops.patch_embed import patch_embed_bwd_cost as patch_embed_bwd_cost
from fastfuse.ops.patch_embed import patch_embed_cost as patch_embed_cost
from fastfuse.ops.patch_embed import patch_embed_ref as patch_embed_ref
