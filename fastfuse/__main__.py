"""Command line: `python -m fastfuse demo`, `info` and `hosts`."""

import argparse
import os
import sys

import torch

import fastfuse
from fastfuse._quiet import quiet_startup


def main(argv: list[str] | None = None) -> int:
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a file name that the terminal cannot show is no reason to stop
    p = argparse.ArgumentParser(prog="fastfuse", description=fastfuse.__doc__)
    p.add_argument("--version", action="version", version=f"fastfuse {fastfuse.__version__}")
    commands = p.add_subparsers(dest="command", required=True)
    demo = commands.add_parser("demo", help="a photo through a small QLoRA vision-language model, before and after patch")
    demo.add_argument(
        "--arch", choices=("mllama", "fastfuse"), default="mllama", help="transformers' Mllama, patched (default), or fastfuse's own DeepFusionModel"
    )
    demo.add_argument("--image", metavar="PATH", help="your own photo; scikit-image's astronaut where left out")
    demo.add_argument("--tokens", type=_positive, default=16, metavar="N", help="tokens to generate (default 16)")
    demo.add_argument("--interpret", action="store_true", help="on a CPU, also run the Triton kernels themselves on one layer, through Triton's interpreter")
    commands.add_parser("info", help="versions, device, which kernels cover it, tuned rows found")
    commands.add_parser("hosts", help="which libraries' modules patch knows, and what it covers of them")
    a = p.parse_args(argv)
    if a.command == "info":
        from fastfuse.info import info

        print(info())
        return 0
    if a.command == "hosts":
        from fastfuse.patching.hosts import table

        print(table())
        return 0
    if a.interpret and torch.cuda.is_available():
        return _failed("--interpret is for machines without a GPU: here the kernels run as they are")
    if a.interpret and "TRITON_INTERPRET" not in os.environ:
        # Triton reads the switch when kernels are imported, which importing fastfuse has just done.
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "fastfuse", *(sys.argv[1:] if argv is None else argv)])
    try:
        with quiet_startup():
            from fastfuse.demo import DemoError, demo
    except ImportError as e:
        return _not_installed(e)
    try:
        demo(a.image, a.tokens, a.interpret, a.arch)
    except ImportError as e:  # what one architecture needs is imported when it is chosen
        return _not_installed(e)
    except (DemoError, fastfuse.Unsupported) as e:
        return _failed(str(e))
    except KeyboardInterrupt:
        return 130
    except OSError as e:
        return _failed(f"cannot write: {e.strerror or e}")
    return 0


def _failed(message: str) -> int:
    print(f"fastfuse demo: {message}", file=sys.stderr)
    return 1


def _not_installed(e: ImportError) -> int:
    what = f"needs {e.name}" if isinstance(e, ModuleNotFoundError) and e.name else " ".join(str(e).split())  # there, but too old or broken
    return _failed(f"{what}: pip install 'fastfuse[demo]'")


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
