"""warmup(model): compile the kernels that a model will need before it needs them."""

import contextlib
import itertools
import os
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.ops._collect import collecting
from fastfuse.ops._op import HAS_TRITON, INTERPRET, check
from fastfuse.patching.engine import candidates, check_model, undisturbed
from fastfuse.patching.hosts._host import Host, Options, Reason, Sizes, device_of

if HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget

# Where there is no GPU to ask. A split over multiprocessors is a kernel of its own, and both sides of it are compiled.
_PROCESSORS = 132
_IMAGE = 4, 1601  # tiles and tokens of each, of Llama 3.2 Vision
_LINEAR = ("nf4_linear", "nf4_linear_dx", "lora_down", "lora_up", "lora_grad")


@dataclass(frozen=True)
class WarmupReport:
    """What warmup did. left_out: (module, why) of covered modules that it could not rehearse."""

    targets: tuple[str, ...]
    kernels: int
    compiled: int  # the others were in the cache
    seconds: float
    cache: str
    left_out: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        summary = f"{self.kernels} kernels for {', '.join(self.targets)}: {self.compiled} compiled, {self.kernels - self.compiled} were in {self.cache}"
        return "\n".join([f"fastfuse: {summary}, {self.seconds:.1f} s", *(f"  left out: {name}: {why}" for name, why in self.left_out)])


def warmup(
    model: nn.Module,
    *calls: Callable[[], object],
    backward: bool | None = None,
    autocast: torch.dtype | None = None,
    target: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> WarmupReport:
    """Compile what a patched model, or one of fastfuse's own modules, will launch: this process and later ones then start without compiling.

    Kernels go into Triton's cache on disk (TRITON_CACHE_DIR, ~/.triton/cache), which later processes of the same fastfuse, Triton and architecture read.
    Every patched module is rehearsed at every size its launch rows tell apart: any number of tokens, text and images of any length. Nothing is
    computed, no weight read or changed, no random number drawn.
    calls: functions that use the model, or fused ops, in their own way, run for what they would launch too. Inside them fused ops give zeros:
    lambda: model.generate(**inputs, max_new_tokens=2)
    A graph of CUDA captured in a call would hold those zeros: such a call is an error. Masks of intervals on a GPU, fp16 or fp32 input to a layer of
    another dtype and what else no module tells of itself are for calls.
    backward: training too, as well as inference; if None where the model is in training mode.  autocast: also under torch.autocast to this dtype.  target: "sm_90", for a GPU that is not here, as when an image is built;
    the model may then be on a CPU, and must be patched.  workers: threads, one per core and eight at most if None.  progress: a bar on stderr.
    Launch nothing in other threads meanwhile. Raises ValueError for a bad option, Unsupported where there is no Triton, no GPU and no target,
    or no kernels for it, RuntimeError where a kernel does not compile, after all others have.
    """
    check_model("warmup", model)
    for call in calls:
        check(callable(call), f"warmup: a call is a {type(call).__name__}, not a function", TypeError)
    check(workers is None or workers > 0, f"warmup: workers is {workers}, expected at least 1")
    if not HAS_TRITON:
        raise Unsupported("warmup: there is nothing to compile without the triton package", "NO_TRITON")
    if INTERPRET:
        raise Unsupported("warmup: TRITON_INTERPRET is set: interpreted kernels are not compiled", "INTERPRETED")
    start, launched, left_out = time.perf_counter(), {}, {}
    chips, devices = _chips(model, target), range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    for arch, (chip, processors) in chips.items():
        with collecting(chip, arch, processors) as kernels, torch.random.fork_rng(devices):
            left_out |= _rehearse(model, arch, model.training if backward is None else backward, autocast)
            for call in calls:
                call()
        launched |= kernels
    if not launched and not calls:
        warnings.warn(f"fastfuse.warmup: nothing in {type(model).__name__} runs a fused op: call patch(model) first", stacklevel=2)
    compiled = _compile(list(launched.values()), workers or min(8, os.cpu_count() or 1), progress)
    seconds = time.perf_counter() - start
    return WarmupReport(tuple(chips), len(launched), compiled, seconds, triton.knobs.cache.dir, tuple(left_out.items()))


def _chips(model: nn.Module, target: str | None) -> dict[str, tuple["GPUTarget", int]]:
    """For every architecture to compile for: Triton's target, and how many multiprocessors."""
    if target is not None:
        known = isinstance(target, str) and target.startswith("sm_") and target[3:].isdecimal()
        check(known, f"warmup: target is {target!r}, expected an NVIDIA architecture such as 'sm_90'")
        tune.covering_arch("nf4_linear", target)
        return {target: (GPUTarget("cuda", int(target[3:]), 32), _PROCESSORS)}
    devices = {t.device for t in (*model.parameters(), *model.buffers()) if t.device.type == "cuda"}
    if not devices and torch.cuda.is_available():
        devices = {torch.device("cuda", torch.cuda.current_device())}
    if not devices:
        raise Unsupported("warmup: there is no GPU to compile for: name one, target='sm_90'", "NO_GPU")
    chips = {}
    for device in devices:
        with torch.cuda.device(device):
            chips[tune.arch_of(device)] = triton.runtime.driver.active.get_current_target(), tune.processors_of(device)
    return chips


def _rehearse(model: nn.Module, arch: str, backward: bool, autocast: torch.dtype | None) -> dict[str, str]:
    """Have every covered module call its fused ops, once for all that are alike, in each mode. -> the modules that do not, and why."""
    left_out, seen, covered = {}, set(), [c for c in candidates(model) if c.host is not None]
    image = next((size for c in covered if (size := c.host.image(c.module))), _IMAGE)
    for (name, *_), module, host, record in covered:
        options = Options() if record is None else record.options
        if (record is None and not host.native) or options.backend == "torch":
            continue
        held = tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in module.named_parameters())
        for training, dtype in itertools.product(sorted({False, backward}), {None: 0, autocast: 0}):
            alike = host, options, repr(module), host.layout(module), held, training, dtype
            if alike not in seen and (reason := _rehearse_mode(module, host, options, training, dtype, _sizes(host.op, arch, image))):
                left_out[name] = f"{'training' if training else 'inference'}: {reason}"  # another one may have nothing in the way
            else:
                seen.add(alike)
    return left_out


def _rehearse_mode(module: nn.Module, host: Host, options: Options, training: bool, autocast: torch.dtype | None, sizes: list[Sizes]) -> str | None:
    """Why it could not be done; None where it was."""
    device = device_of(module) or torch.device("cpu")
    casting = contextlib.nullcontext() if autocast is None or device.type == "meta" else torch.autocast(device.type, autocast)
    with undisturbed(module), torch.inference_mode(False), torch.set_grad_enabled(training), casting:
        for m in module.modules():
            m.training = training
        for of_one_call in sizes:
            try:
                rehearsed = host.rehearse(module, of_one_call, options)
            except Unsupported as e:
                return f"{e.code}: {e}"
            if isinstance(rehearsed, Reason):
                return f"{rehearsed.code}: {rehearsed.words}"
            if rehearsed is not None and training:
                _gradients(*rehearsed, [p for p in module.parameters() if p.requires_grad])
    return None


def _sizes(op: str, arch: str, image: tuple[int, int]) -> list[Sizes]:
    """A call on either side of each boundary that the rows of the op draw: of the smallest number of tokens for each kind of launch."""
    kernels = [op] if op in ("patch_embed", "cross_attention") else _LINEAR
    rows = [row["when"] for kernel in kernels for row in tune.table(kernel) if row["arch"] == tune.covering_arch(kernel, arch)]
    lengths = sorted({1} | {when["M_max"] + 1 for when in rows if "M_max" in when})
    if op != "cross_attention":
        return [Sizes(1, tokens, *image) for tokens in lengths]
    # Few programs share the columns of the mask, many do not: of one sequence, and of so many that every multiprocessor has its own. A split takes
    # 512 columns; whether their number divides by 4 is a kernel of its own in packing a mask.
    tiles, n = image
    counts = sorted({1, tiles, max(tiles, -(-512 // n))})
    return [Sizes(batch, tokens, count, n) for batch in (1, 256) for tokens in lengths for count in counts]


def _gradients(out: Tensor, inputs: list[Tensor], weights: list[Tensor]) -> None:
    """Of everything, of each input alone and of the weights alone: what nobody asks for, kernels leave out."""
    if not out.requires_grad:
        return
    for leaves in ([*inputs, *weights], *([x] for x in inputs), weights):
        if leaves:
            torch.autograd.grad(out, leaves, torch.zeros_like(out), retain_graph=True, allow_unused=True)


def _compile(kernels: list[Callable], workers: int, progress: bool) -> int:
    """Into Triton's cache; how many were not there."""
    hits, before = [], triton.knobs.compilation.listener

    def listen(*, cache_hit: bool, **rest) -> None:
        hits.append(cache_hit)
        if before is not None:
            before(cache_hit=cache_hit, **rest)

    bar = tqdm(total=len(kernels), desc="fastfuse: compiling", unit="kernel", disable=not progress)
    with triton.knobs.compilation.scope(), bar, ThreadPoolExecutor(workers) as pool:
        triton.knobs.compilation.listener = listen
        futures = [pool.submit(kernel) for kernel in kernels]
        try:
            for _ in as_completed(futures):
                bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    failed = [error for future in futures if (error := future.exception())]
    if failed:
        raise RuntimeError(f"warmup: {len(failed)} of {len(kernels)} kernels do not compile, the first: {failed[0]}") from failed[0]
    return hits.count(False)
