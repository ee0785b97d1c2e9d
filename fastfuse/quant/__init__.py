from fastfuse.quant.nf4 import NF4View as NF4View
