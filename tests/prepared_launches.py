"""What is launched by calls that go the whole way and by prepared ones, without a GPU: the same kernels, grids, constants and arguments.

python tests/prepared_launches.py prints a line for each call, and fails at the first that differs. A process of its own: fastfuse is loaded for a GPU that is not
there, and the driver is a stub (bench/host.py). What both launch they compute to the bit.
"""

import functools
import gc
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

from bench.host import as_on_gpu  # noqa: E402

warnings.filterwarnings("ignore")
as_on_gpu()

import torch  # noqa: E402
from prepared_layers import LAYERS, forget, plan_of  # noqa: E402
from torch import Tensor  # noqa: E402

from bench import host_cases  # noqa: E402
from fastfuse.ops import _launch  # noqa: E402

BF16 = torch.bfloat16
OPS = {
    "cross_attention": (host_cases.op_attention, lambda: host_cases.heads(8, 512)),
    "cross_attention, 1 token": (functools.partial(host_cases.op_attention, 1), lambda: host_cases.heads(8, 1)),
    "cross_attention_decode": (host_cases.op_decode, lambda: host_cases.heads(8, 1)),
    "patch_embed": (host_cases.op_patch_embed, host_cases.images),
    "Mllama's attention": (lambda: host_cases.mllama(lora=True, patched=True), lambda: host_cases.x(1, host_cases.HIDDEN)),
}
launched: list[tuple] = []


def record():
    """Keeps what reaches Triton's C function, or its launcher in Python, of every kernel launched again."""
    direct = _launch._direct

    def watched(compiled):
        function, constants = direct(compiled)

        def launch(*args):
            x, y, z, stream, *middle, values = args
            launched.append((compiled.hash, (x, y, z), stream, repr(middle), values))
            return function(*args)

        return launch, constants

    _launch._direct = watched


def named(calls, known, recycled):
    """With a name in place of every address: of a tensor that was there before, or of one made on the way, by order of appearance. recycled: memory may
    serve twice in a call, so that a name holds for one launch."""
    made: dict[int, str] = {}

    def of(value):
        if isinstance(value, tuple):
            return tuple(map(of, value))
        address = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(value, Tensor) or (type(value) is int and value > 1 << 32):
            return known.get(address) or made.setdefault(address, f"made {len(made)}")
        return value

    found = []
    for call in calls:
        if recycled:
            made.clear()
        found.append((*call[:-1], of(call[-1])))
    return found


def launches(run, x, grad, known, recycled=False):
    """What a call launches, and which memory its result is."""
    launched.clear()
    with torch.set_grad_enabled(grad):
        out = run(x)
    result = out[0] if isinstance(out, tuple) else out
    return named([*launched, ("result", (result.data_ptr(),))], known, recycled)


def compare(name, run, whole, x, grad, served, recycled=False):
    """run(x), after whole() by the whole way, and again; served() tells whether it was prepared."""
    x = x.requires_grad_(grad)
    for _ in range(3):  # compiles, and keeps plans
        launches(run, x, grad, {})
    held = [t for t in gc.get_objects() if isinstance(t, Tensor) and type(t).__name__ != "NF4Tensor" and not t.is_meta and t.numel()]
    known = {t.data_ptr(): f"held {t.data_ptr()}" for t in held}
    whole()
    expected = launches(run, x, grad, known, recycled)
    for _ in range(2):  # the first prepared call finds what launches, the second may hand it addresses
        got = launches(run, x, grad, known, recycled)
        assert served() and len(got) > 1, f"{name}: not a prepared call"
        for one, other in zip(got, expected, strict=True):
            assert one == other, f"{name}:\n{one}\nand by the whole way\n{other}"
    print(f"{name}: {len(got) - 1} launches")


def main():
    record()
    for i, (kind, make) in enumerate(LAYERS.items()):
        for tokens, grad in ((1, i % 2 == 0), (17, i % 2 == 1)):
            layer, x = make(BF16), torch.randn(1, tokens, 128, dtype=BF16)
            name = f"{kind}, {tokens} tokens, {'with' if grad else 'without'} gradients"
            compare(name, layer, functools.partial(forget, layer), x, grad, lambda layer=layer: plan_of(layer).served)
    kept = [sys.modules[f"fastfuse.ops.{op}"].served for op in ("cross_attention", "patch_embed")]
    for name, (make, x) in OPS.items():
        run = make()

        def whole(run=run):
            for signatures in kept:
                signatures.clear()
            if hasattr(run, "func") and isinstance(run.func, torch.nn.Module):
                for part in run.func.modules():
                    if "_fastfuse" in part.__dict__:
                        forget(part)

        compare(name, run, whole, x(), False, lambda: any(map(len, kept)), recycled=name.startswith("Mllama"))


if __name__ == "__main__":
    main()
