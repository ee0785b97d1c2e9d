"""Speed, against what runs the same today."""

import argparse


def arguments(doc: str, **switches: str) -> argparse.ArgumentParser:
    """A command's, with its module's text as help; switches: what each is for."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, what in switches.items():
        p.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=what)
    return p
