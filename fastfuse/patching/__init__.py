"""patch(model): the fused ops inside a model people already have, and back again."""

from fastfuse.patching.engine import patch as patch
from fastfuse.patching.engine import patched as patched
from fastfuse.patching.engine import register_host as register_host
from fastfuse.patching.engine import status as status
from fastfuse.patching.engine import unpatch as unpatch
from fastfuse.patching.report import Entry as Entry
from fastfuse.patching.report import PatchReport as PatchReport
from fastfuse.patching.warm_up import WarmupReport as WarmupReport
from fastfuse.patching.warm_up import warmup as warmup
