"""The ecosystems patch knows, one file each, and the modules that callers have registered."""

import torch
from torch import nn

from fastfuse.patching.hosts import _own, bitsandbytes, mllama, peft, torchao, torchtune, vision
from fastfuse.patching.hosts._host import Host

BUILT_IN = (*_own.HOSTS, *torchtune.HOSTS, peft.HOST, bitsandbytes.HOST, torchao.HOST, *mllama.HOSTS, *vision.HOSTS)
registered: list[Host] = []  # the latest first: a caller may take over what is built in


def hosts() -> tuple[Host, ...]:
    return (*registered, *BUILT_IN)


def host_for(module: nn.Module) -> Host | None:
    """The first host that recognises the module."""
    if isinstance(module, torch.jit.ScriptModule):  # compiled: there is nothing to bind a forward to
        return None
    return next((host for host in hosts() if host.recognises(module)), None)


def table() -> str:
    """Which libraries' modules run which op, and what of it is covered: a table in Markdown."""
    lines = ["| library | modules | op | covered |", "|---|---|---|---|"]
    lines += [f"| {host.name} | {host.modules} | `{host.op}` | {host.covers} |" for host in hosts() if host.covers]
    return "\n".join(lines)
