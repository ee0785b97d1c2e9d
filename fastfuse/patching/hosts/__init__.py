"""The ecosystems patch knows, one file each. The order does not matter: no module matches two."""

from fastfuse.patching.hosts import bitsandbytes, peft, torchao

HOSTS = (peft.HOST, bitsandbytes.HOST, torchao.HOST)
