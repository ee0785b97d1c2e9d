"""fastfuse: fused Triton kernels for Llama-3.2-Vision-class models."""

from fastfuse.errors import Unsupported as Unsupported
from fastfuse.ops._op import backend as backend
from fastfuse.patching import PatchReport as PatchReport
from fastfuse.patching import patch as patch
from fastfuse.patching import patched as patched
from fastfuse.patching import register_host as register_host
from fastfuse.patching import status as status
from fastfuse.patching import unpatch as unpatch
from fastfuse.patching import warmup as warmup

__version__ = "0.1.0"
