"""patch(model): plan, then apply all or nothing, and give a report.

Only the instance is touched: a bound forward in the module's __dict__ and a small record beside it. No class is
changed, no module replaced, no parameter added; weights are read from the module at every call.
"""

import collections
import contextlib
import fnmatch
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import MethodType
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastfuse.errors import Unsupported
from fastfuse.ops._op import BACKENDS, INTERPRET, check, check_triton
from fastfuse.patching.hosts import host_for, hosts, registered
from fastfuse.patching.hosts._host import (
    Host,
    Names,
    Options,
    Probe,
    Reason,
    Record,
    bound_host,
    call_own,
    device_of,
    foreign_forward,
    forward_slot,
    host_of,
    runs_on,
)
from fastfuse.patching.report import Entry, PatchReport

_Test = str | Callable[[str, nn.Module], bool]
Filter = _Test | Iterable[_Test]
MASKED_ROWS = ("host", "zero", "uniform")
# What status could not find out from a module: why patch left it out, or who gave it back. None for one that a call of patch has patched.
# Weak references here, and not on the module: nothing is kept alive, copied or saved.
_noted: WeakKeyDictionary[nn.Module, Reason | None] = WeakKeyDictionary()


def patch(
    model: nn.Module,
    *,
    ops: str | Iterable[str] | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    on_unsupported: str = "skip",
    masked_rows: str = "host",
    backend: str = "auto",
    verify: bool = False,
    dry_run: bool = False,
) -> PatchReport:
    """Run the hot paths of a model through fused ops, in place. `unpatch` gives it back exactly.

    ops: op names ("nf4_linear", "nf4_lora_linear", "patch_embed", "cross_attention"), all where None.  include, exclude: a glob over
    module names, a function (name, module) -> bool, or several.  on_unsupported: "skip", "warn" or "raise" for a candidate that no fused
    op covers; "raise" changes nothing.  masked_rows: what text that sees no image gets from cross-attention, "host": as the
    model has it, "zero": nothing (Meta, torchtune), "uniform": attention over every image token (transformers).  backend: as fastfuse.backend.
    verify: run each patched module on random input both ways, and give it back where the two differ by more than rounding (code MISMATCH). Where it is the
    host library that is off, by a known fault, the module stays patched and the report says so (HOST_DECODE). Left out are modules
    without weights at hand (meta device, offloaded, sharded), with an obstacle for now, and those that only pass a mask on.
    dry_run: report what would be done.
    Patching twice changes nothing. copy.deepcopy keeps a model patched; copy.copy and nn.DataParallel's replicas share the original's forward: unpatch first.
    What a fused op does not cover at a call runs the module's own forward, counted in `status(model)`.
    FASTFUSE_DISABLE=1 in the environment makes patch leave everything alone, FASTFUSE_STRICT=1 makes such a call raise Unsupported.
    Raises ValueError for a bad option, Unsupported where the backend cannot run or as asked.
    """
    check_model("patch", model)
    check(on_unsupported in ("skip", "warn", "raise"), f"patch: on_unsupported is {on_unsupported!r}, not 'skip', 'warn' or 'raise'")
    check(masked_rows in MASKED_ROWS, f"patch: masked_rows is {masked_rows!r}, not one of {', '.join(MASKED_ROWS)}")
    check(backend in BACKENDS, f"patch: backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    options = Options(backend, masked_rows, os.environ.get("FASTFUSE_STRICT") == "1")
    plan = _plan(model, _op_names(ops), _matcher(include, "*"), _matcher(exclude, ()), options)
    refused = [p.entry for p in plan if p.entry.status == "skipped" and p.entry.code not in ("EXCLUDED", "DISABLED")]
    note = "" if plan else _nothing_found(model)
    if note:
        _complain(note, "NOTHING_FOUND", "raise" if on_unsupported == "raise" else "warn")
    elif refused:
        first = refused[0]
        _complain(f"{len(refused)} modules are not covered, the first: {first.name}: {first.code}: {first.reason}", first.code, on_unsupported)
    if not dry_run:
        _apply([p for p in plan if p.entry.status == "planned"], options, verify, on_unsupported)
        for p in plan:
            if p.entry.code in ("EXCLUDED", "MISMATCH"):
                _noted[p.module] = Reason(p.entry.code, p.entry.reason)
            elif p.module.__dict__.get("_fastfuse") is not None:
                _noted.setdefault(p.module, None)
    return PatchReport(type(model).__name__, tuple(p.entry for p in plan), note)


def unpatch(model: nn.Module, *, ops: str | Iterable[str] | None = None, include: Filter | None = None) -> PatchReport:
    """Give every patched module its own forward back, before or after other wrappers are taken off. ops, include: as patch."""
    check_model("unpatch", model)
    patched, included, entries = [c for c in candidates(model) if c.record is not None], _matcher(include, "*"), []
    ops = None if ops is None else _op_names(ops, "unpatch", {record.op for *_, record in patched})
    for names, module, _, record in patched:
        if (ops is None or record.op in ops) and included(names, module):
            restored, _noted[module] = _uninstall(module), Reason("RESTORED", "unpatch has given it back")
            code, reason = ("", "") if restored else ("WRAPPED", "another wrapper still calls through fastfuse, which now only passes on")
            entries.append(Entry(names[0], type(module).__name__, record.host, record.op, "restored", code, reason, fallbacks=dict(record.fallbacks)))
    for module in model.modules():
        if "_fastfuse" not in module.__dict__:
            _uninstall(module)  # a forward of ours that a wrapper put back after an earlier unpatch
    return PatchReport(type(model).__name__, tuple(entries), "" if entries else "nothing was patched")


@contextlib.contextmanager
def patched(model: nn.Module, **options) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches for the block alone, with patch's options. Earlier patches stay."""
    report, modules = patch(model, **options), dict(model.named_modules())
    mine = [modules[e.name] for e in report.entries if e.status == "patched"]
    try:
        yield report
    finally:
        for module in mine:
            _uninstall(module)
            if _noted.get(module) is None:  # else unpatch inside of the block, or an earlier patch, has more to say
                _noted[module] = Reason("RESTORED", "the block that it was patched for has ended")


def status(model: nn.Module) -> PatchReport:
    """What is patched now, how often each patched module ran its own forward instead, by reason, and why the others are not patched.

    A module that is not patched has the code and reason that patch would give it now. Three codes are remembered instead: EXCLUDED, MISMATCH (by verify)
    and RESTORED (by unpatch, or at the end of a `patched` block). A deepcopy and a saved model do not have these.
    UNSEEN: the module was added after patch was called, such as an adapter over patched layers. Call patch again.
    """
    check_model("status", model)
    options = next((record.options for *_, record in candidates(model) if record is not None), Options())
    known, entries = any(module in _noted for module in model.modules()), []
    for candidate in candidates(model):
        entry = _entry(candidate, options, _noted.get(candidate.module))
        if known and candidate.module not in _noted and entry.status == "unpatched" and not entry.code:
            entry = _with(entry, Reason("UNSEEN", "it has come since patch was called, or lies outside of what it was called on: call patch again"))
        entries.append(entry)
    return PatchReport(type(model).__name__, tuple(entries), "" if entries else _nothing_found(model))


class Registration:
    """What register_host gives back; remove() forgets the host. Models patched by it stay patched."""

    def __init__(self, host: Host):
        self._host = host

    def remove(self) -> None:
        if self._host in registered:
            registered.remove(self._host)


def register_host(name: str, op: str, matches: Callable[[nn.Module], bool], forward: Callable) -> Registration:
    """Let patch know modules of your own: those for which matches(module) is true run forward(module, *args, **kwargs) instead of their own.

    op: the name under which `ops=` and the report have it, one of fastfuse's or another. forward may raise fastfuse.Unsupported(words, code)
    before it has done anything: the module's own forward then runs, counted under that code. The latest registration comes first, before
    the hosts that fastfuse has.
    Raises TypeError for what is not callable, ValueError for a name that is taken.
    """
    for what, value in (("matches", matches), ("forward", forward)):
        check(callable(value), f"register_host: {what} is a {type(value).__name__}, not callable", TypeError)
    for what, value in (("name", name), ("op", op)):
        check(isinstance(value, str) and bool(value), f"register_host: {what} is {value!r}, not a name", TypeError)
    check(name not in [host.name for host in hosts()], f"register_host: the name {name!r} is taken")

    def fused(module: nn.Module, arguments: dict, options: Options):
        try:
            return forward(module, *arguments["args"], **arguments["kwargs"])
        except Unsupported as e:
            return Reason(e.code, str(e))

    host = Host(name=name, op=op, matches=matches, fused=fused, as_called=True)
    registered.insert(0, host)
    return Registration(host)


class Candidate(NamedTuple):
    """A module that fastfuse knows, or has patched, whatever has become of its weight since. A shared one has several names, and any of them may be asked for."""

    names: list[str]
    module: nn.Module
    host: Host | None
    record: Record | None


def candidates(model: nn.Module) -> Iterator[Candidate]:
    names = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[module].append(name)
    for module, known_as in names.items():
        # The host that has patched it, else the first that would.
        host, record = bound_host(module) or host_for(module), module.__dict__.get("_fastfuse")
        if host is not None or record is not None:
            yield Candidate(known_as, module, host, record)


@dataclass
class _Planned:
    module: nn.Module
    host: Host
    entry: Entry


def _plan(model: nn.Module, ops: set[str], include: Callable, exclude: Callable, options: Options) -> list[_Planned]:
    plan = []
    for candidate in candidates(model):
        names, module, host, _ = candidate
        if host is None:
            continue
        included = host.op in ops and include(names, module) and not exclude(names, module)
        entry = _entry(candidate, options, None if included else Reason("EXCLUDED", "not asked for"))
        if entry.status == "patched":
            entry = replace(entry, status="already", fallbacks={})
        elif entry.status == "unpatched":
            entry = replace(entry, status="skipped") if entry.code else _planned(host, module, entry, options)
        plan.append(_Planned(module, host, entry))
    return plan


def _planned(host: Host, module: nn.Module, entry: Entry, options: Options) -> Entry:
    device = device_of(module)
    if options.backend == "triton" and device is not None and device.type == "cpu":
        check_triton("patch")
        if not INTERPRET:
            raise Unsupported("patch: backend 'triton' on a CPU model needs TRITON_INTERPRET=1 set before import", "NO_GPU")
    return _described(host, module, replace(entry, status="planned"), options)


def _entry(candidate: Candidate, options: Options, noted: Reason | None) -> Entry:
    """The module as it is: "patched", "already" fused, or "unpatched". noted: a reason to leave it alone that the module itself does not show."""
    (name, *_), module, host, record = candidate
    kind, layout = type(module).__name__, "" if host is None or host.drift(module) else host.layout(module)
    if record is not None:
        entry = Entry(name, kind, record.host, record.op, "patched", layout=layout, fallbacks=dict(record.fallbacks))
        return entry if host is None else _described(host, module, entry, record.options)
    entry = Entry(name, kind, host.name, host.op, "unpatched", layout=layout)
    if host.native:
        return replace(entry, status="already", backend=runs_on(module, Options()))
    if os.environ.get("FASTFUSE_DISABLE") == "1":
        noted = Reason("DISABLED", "FASTFUSE_DISABLE is set")
    return _with(entry, noted or foreign_forward(host, module) or host.refused(module, options))


def _described(host: Host, module: nn.Module, entry: Entry, options: Options) -> Entry:
    """The entry with what would run, and what stands in the way of the fused op for now."""
    if reason := host.in_the_way(module, options):
        entry = _with(entry, Reason(reason.code, f"runs its own forward for now: {reason.words}"))
    return entry if host.drift(module) else replace(entry, backend=runs_on(module, options))


def _with(entry: Entry, reason: Reason | None) -> Entry:
    return entry if reason is None else replace(entry, code=reason.code, reason=reason.words)


def _complain(message: str, code: str, how: str, stacklevel: int = 3) -> None:
    if how == "raise":
        raise Unsupported(f"patch: {message}", code)
    if how == "warn":
        warnings.warn(f"fastfuse.patch: {message}", stacklevel=stacklevel)


def _apply(todo: list[_Planned], options: Options, verify: bool, on_unsupported: str) -> None:
    try:
        for p in todo:
            slot = forward_slot(p.module)
            before = p.module.__dict__.get(slot)
            if host_of(before) is not None:
                before = None  # ours, put back by a wrapper that outlived an unpatch
            p.module.__dict__["_fastfuse"] = Record(p.host.name, p.host.op, options, slot, before, Names.of(p.module, p.host.renamed), p.module)
            p.module.__dict__[slot] = p.host.bound(p.module)
            p.entry = replace(p.entry, status="patched")
        bad = []
        for p in todo:
            p.entry = _with(p.entry, _verified(p, options) if verify and not p.entry.code else None)
            if p.entry.code == "MISMATCH":
                _uninstall(p.module)
                p.entry = replace(p.entry, status="skipped")
                bad.append(p.entry)
        if bad:
            _complain(f"{len(bad)} modules are not covered, the first: {bad[0].name}: {bad[0].reason}", "MISMATCH", on_unsupported, stacklevel=4)
    except BaseException:
        for p in todo:
            _uninstall(p.module)
        raise


def _uninstall(module: nn.Module) -> bool:
    """Put back exactly what was there; False where a forward of ours was bound and another wrapper has hidden it."""
    record = module.__dict__.pop("_fastfuse", None)
    for slot in ("forward", "_old_forward"):
        if host_of(module.__dict__.get(slot)) is not None:
            if record is not None and slot == record.slot and record.original is not None:
                module.__dict__[slot] = record.original
            elif slot == "forward":
                del module.__dict__[slot]
            else:  # hooked by accelerate after the patch: its wrapper needs something to call
                module.__dict__[slot] = MethodType(type(module).forward, module)
            return True
    return record is None  # else one was bound, and is hidden


def _verified(p: _Planned, options: Options) -> Reason | None:
    """MISMATCH where on random input the fused path is further from the module's own forward than rounding explains; None where it is not.

    HOST_DECODE where it is the host library that is off, by a fault that is known (Host.corrected).
    """
    if any(w.is_meta or hasattr(w, "device_mesh") for w in p.module.parameters()):
        return None  # no values at hand: not there yet, offloaded, or in shards
    with undisturbed(p.module), torch.inference_mode(False), torch.enable_grad():  # some layers repack their weight for good where no gradient is wanted
        for m in p.module.modules():
            if isinstance(m, nn.Dropout):  # two masks would be two results
                m.training = False
        probe = p.host.probe(p.module)
        if probe is None:
            return None
        want = call_own(p.module, probe.arguments) if p.host.fallback is None else p.host.fallback(p.module, probe.arguments, options)
        got = p.host.fused(p.module, probe.arguments, options)  # without the hooks of the module itself
        if type(got) is Reason:
            return Reason("MISMATCH", f"does not run: {got.code}: {got.words}")
        apart = _apart(got, want, probe)
        if apart is None:
            return None
        if p.host.corrected is not None and _apart(got, p.host.corrected(p.module, probe.arguments), probe) is None:
            return Reason("HOST_DECODE", "the module's own forward is off, for its library decodes the weight wrongly row by row; the fused op is right")
    return Reason("MISMATCH", apart)


def _apart(got, want, probe: Probe) -> str | None:
    """How far two results of a forward are apart, where that is more than rounding.

    Two correct results differ by the rounding of weights and output to the dtype, about half its epsilon relative in
    2-norm, and by fp32 accumulation over K, about eps(fp32) * sqrt(K): the larger of eps and that is allowed for each step.
    """
    got, want = (_first_tensor(out).detach().double() for out in (got, want))
    if got.shape != want.shape:
        return f"gives {tuple(got.shape)} where its own forward gives {tuple(want.shape)}"
    alike = got.isnan() & want.isnan()
    got, want = got.masked_fill(alike, 0), want.masked_fill(alike, 0)
    allowed = probe.steps * max(torch.finfo(probe.dtype).eps, torch.finfo(torch.float32).eps * math.sqrt(probe.depth))
    err = ((got - want).norm() / want.norm().clamp_min(torch.finfo(probe.dtype).tiny)).item()
    # A NaN on one side alone must not pass.
    return None if err <= allowed else f"differs from its own forward by {err:.1e} relative, rounding explains {allowed:.1e}"


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Attributes are put back: a layer may settle its compute dtype, or cast its bias, by the first input it sees, which ours must not be."""
    settled = [(m, dict(m.__dict__)) for m in module.modules()]
    biases = [(b, b.data) for m in module.modules() if (b := getattr(m, "bias", None)) is not None]
    try:
        yield
    finally:
        for m, attributes in settled:
            m.__dict__.update(attributes)
        for b, data in biases:
            b.data = data


def _first_tensor(out) -> Tensor:
    """The result of a forward that returns a tensor, a tuple that starts with one, or transformers' output of named ones."""
    if isinstance(out, Tensor):
        return out
    return _first_tensor(next(iter(out.values())) if hasattr(out, "values") else out[0])


def check_model(function: str, model) -> None:
    check(isinstance(model, nn.Module), f"{function}: model is a {type(model).__name__}, not a torch.nn.Module", TypeError)


def _op_names(ops: str | Iterable[str] | None, function: str = "patch", more: Iterable[str] = ()) -> set[str]:
    known = {host.op for host in hosts()}.union(more)
    if ops is None:
        return known
    check(isinstance(ops, Iterable), f"{function}: ops is a {type(ops).__name__}, not a name or several", TypeError)
    names = {ops} if isinstance(ops, str) else set(ops)
    check(names <= known, f"{function}: ops has {', '.join(sorted(map(repr, names - known)))}, known are {', '.join(sorted(known))}")
    return names


def _matcher(chosen: Filter | None, default: Filter) -> Callable[[list[str], nn.Module], bool]:
    """Whether a module is wanted under one of its names."""
    chosen = default if chosen is None else chosen
    tests = list(chosen) if isinstance(chosen, Iterable) and not isinstance(chosen, str) else [chosen]
    for t in tests:
        what = f"patch: include and exclude take globs or functions (name, module) -> bool, not a {type(t).__name__}"
        check(isinstance(t, str) or callable(t), what, TypeError)
    return lambda names, module: any(t(name, module) if callable(t) else fnmatch.fnmatchcase(name, t) for name in names for t in tests)


def _nothing_found(model: nn.Module) -> str:
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kinds = sorted({f"{type(m.weight).__name__} of {m.weight.dtype}" for m in linear})
    held = f"its {len(linear)} linear layers hold {', '.join(kinds)}" if linear else "it has no linear layers"
    return f"found nothing to patch in {type(model).__name__}: no module holds an NF4 weight, none embeds patches or attends to images as fastfuse knows it; {held}"
