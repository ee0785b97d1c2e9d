"""Read and write whole checkpoints a tensor at a time: transformers', Meta's and torchtune's, in safetensors or torch files.

Files are memory-mapped and copied straight into the model, and written from it, so that a second copy of the model is never
in memory. A load is checked against the file's header before the first copy; a save replaces old files only when complete.
"""

from fastfuse.checkpoints.files import Checkpoint as Checkpoint
from fastfuse.checkpoints.files import open_checkpoint as open_checkpoint
from fastfuse.checkpoints.layout import layout_of as layout_of
from fastfuse.checkpoints.load import LoadReport as LoadReport
from fastfuse.checkpoints.load import load_adapter as load_adapter
from fastfuse.checkpoints.load import load_checkpoint as load_checkpoint
from fastfuse.checkpoints.load import load_model as load_model
from fastfuse.checkpoints.save import save_adapter as save_adapter
from fastfuse.checkpoints.save import save_checkpoint as save_checkpoint
