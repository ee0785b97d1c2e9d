"""The fused ops, each with its eager reference (<op>_ref) and its cost (<op>_cost)."""

from fastfuse.ops.nf4_linear import nf4_dequantize as nf4_dequantize
from fastfuse.ops.nf4_linear import nf4_dequantize_cost as nf4_dequantize_cost
from fastfuse.ops.nf4_linear import nf4_dequantize_ref as nf4_dequantize_ref
from fastfuse.ops.nf4_linear import nf4_linear as nf4_linear
from fastfuse.ops.nf4_linear import nf4_linear_bwd_cost as nf4_linear_bwd_cost
from fastfuse.ops.nf4_linear import nf4_linear_cost as nf4_linear_cost
from fastfuse.ops.nf4_linear import nf4_linear_ref as nf4_linear_ref
from fastfuse.ops.nf4_linear import nf4_lora_linear as nf4_lora_linear
