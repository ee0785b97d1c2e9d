"""A photo through a QLoRA vision-language model with random weights, with and without the fused kernels."""

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from fastfuse._quiet import quiet_startup
from fastfuse.demo.image import DemoError as DemoError
from fastfuse.demo.image import load_image
from fastfuse.demo.show import CPU_SIZE, GPU_SIZE

ARCHS = ("mllama", "fastfuse")


def demo(image_path: str | None, tokens: int, interpret: bool, arch: str = "mllama") -> None:
    """Print the whole comparison. arch: whose model, transformers' Mllama to be patched or fastfuse's own DeepFusionModel.

    Raises DemoError for an image that cannot be used.
    """
    image, name = load_image(image_path)
    with quiet_startup():
        import fastfuse.quant.torchao  # noqa: F401, models of both kinds would import it later

        if arch == "mllama":
            from fastfuse.demo import mllama as chosen
        else:
            from fastfuse.demo import deep_fusion as chosen
    console = Console(width=160 if not Console().is_terminal else None, highlight=False, soft_wrap=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    size = GPU_SIZE if device.type == "cuda" else CPU_SIZE
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        chosen.run(console, progress, image, name, tokens, interpret, size, device)
