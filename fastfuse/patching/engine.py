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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastfuse.errors import Unsupported
from fastfuse.ops._op import BACKENDS, INTERPRET, check, check_triton
from fastfuse.patching.hosts import host_for, hosts, registered
from fastfuse.patching.hosts._host import Host, Names, Options, Probe, Reason, Record, call_own, device_of, foreign_forward, forward_slot, host_of, runs_on
from fastfuse.patching.report import Entry, PatchReport

Filter = str | Callable[[str, nn.Module], bool] | Iterable[str | Callable[[str, nn.Module], bool]]
MASKED_ROWS = ("host", "zero", "uniform")
_UNSEEN = Reason("UNSEEN", "it has come since patch was called, or lies outside of what it was called on: call patch again")
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
    return _patch(model, ops, include, exclude, on_unsupported, masked_rows, backend, verify, dry_run)[0]


def _patch(model, ops, include, exclude, on_unsupported, masked_rows, backend, verify, dry_run) -> tuple[PatchReport, list[nn.Module]]:
    """The report, and the modules this call patched."""
    check_model("patch", model)
    check(on_unsupported in ("skip", "warn", "raise"), f"patch: on_unsupported is {on_unsupported!r}, not 'skip', 'warn' or 'raise'")
    check(masked_rows in MASKED_ROWS, f"patch: masked_rows is {masked_rows!r}, not one of {', '.join(MASKED_ROWS)}")
    check(backend in BACKENDS, f"patch: backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    options = Options(backend, masked_rows, os.environ.get("FASTFUSE_STRICT") == "1")
    plan = _plan(model, _op_names(ops), _matcher(include, True), _matcher(exclude, False), options)
    todo = [p for p in plan if p.entry.status == "planned"]
    refused = [p.entry for p in plan if p.entry.status == "skipped" and p.entry.code not in ("EXCLUDED", "DISABLED")]
    note = "" if plan else _nothing_found(model)
    if refused or not plan:
        message = note or f"{len(refused)} modules are not covered, the first: {refused[0].name}: {refused[0].code}: {refused[0].reason}"
        if on_unsupported == "raise":
            raise Unsupported(f"patch: {message}", refused[0].code if refused else "NOTHING_FOUND")
        if on_unsupported == "warn" or not plan:
            warnings.warn(f"fastfuse.patch: {message}", stacklevel=3)
    if not dry_run:
        _apply(todo, options, verify)
        if bad := [p.entry for p in todo if p.entry.code == "MISMATCH"]:
            message = f"{bad[0].name}: {bad[0].reason}"
            if on_unsupported == "raise":
                for p in todo:
                    _uninstall(p.module)
                raise Unsupported(f"patch: {message}", "MISMATCH")
            if on_unsupported == "warn":
                warnings.warn(f"fastfuse.patch: {len(bad)} modules are not covered, the first: {message}", stacklevel=3)
        for p in plan:
            if p.entry.code in ("EXCLUDED", "MISMATCH"):
                _noted[p.module] = Reason(p.entry.code, p.entry.reason)
            elif p.module.__dict__.get("_fastfuse") is not None:
                _noted.setdefault(p.module, None)
    report = PatchReport(type(model).__name__, tuple(p.entry for p in plan), note)
    return report, [p.module for p in plan if p.entry.status == "patched"]


def unpatch(model: nn.Module, *, ops: str | Iterable[str] | None = None, include: Filter | None = None) -> PatchReport:
    """Give every patched module its own forward back, before or after other wrappers are taken off. ops, include: as patch."""
    check_model("unpatch", model)
    records, wanted, entries = list(_records(model)), _matcher(include, True), []
    ops = None if ops is None else _op_names(ops, "unpatch", {record.op for *_, record in records})
    for names, module, record in records:
        name = names[0]
        if (ops is None or record.op in ops) and any(wanted(n, module) for n in names):
            found, _noted[module] = _uninstall(module), Reason("RESTORED", "unpatch has given it back")
            code, reason = ("", "") if found else ("WRAPPED", "another wrapper still calls through fastfuse, which now only passes on")
            entries.append(Entry(name, type(module).__name__, record.host, record.op, "restored", code, reason, fallbacks=dict(record.fallbacks)))
    for module in model.modules():
        if "_fastfuse" not in module.__dict__:
            _uninstall(module)  # a forward of ours that a wrapper put back after an earlier unpatch
    return PatchReport(type(model).__name__, tuple(entries), "" if entries else "nothing was patched")


@contextlib.contextmanager
def patched(
    model: nn.Module,
    *,
    ops: str | Iterable[str] | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    on_unsupported: str = "skip",
    masked_rows: str = "host",
    backend: str = "auto",
    verify: bool = False,
) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches for the block alone, with patch's options. Earlier patches stay."""
    report, mine = _patch(model, ops, include, exclude, on_unsupported, masked_rows, backend, verify, dry_run=False)
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
    records, entries = [record for *_, record in _records(model)], []
    options, known = records[0].options if records else Options(), any(module in _noted for module in model.modules())
    for name, module in model.named_modules():
        host, record = host_of_module(module), module.__dict__.get("_fastfuse")
        if record is not None:
            entry = Entry(name, type(module).__name__, record.host, record.op, "patched", fallbacks=dict(record.fallbacks))
            entry = entry if host is None else _described(host, module, entry, record.options)
        elif host is None:
            continue
        elif host.native:
            entry = Entry(
                name, type(module).__name__, host.name, host.op, "already", layout=_layout(host, module), backend=runs_on(host.device(module), Options())
            )
        else:
            entry = Entry(name, type(module).__name__, host.name, host.op, "unpatched", layout=_layout(host, module))
            unseen = _UNSEEN if known and module not in _noted else None
            if found := _refused(host, module, options, _noted.get(module)) or unseen:
                entry = replace(entry, code=found.code, reason=found.words)
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
    for what, given in (("matches", matches), ("forward", forward)):
        check(callable(given), f"register_host: {what} is a {type(given).__name__}, not callable", TypeError)
    for what, given in (("name", name), ("op", op)):
        check(isinstance(given, str) and bool(given), f"register_host: {what} is {given!r}, not a name", TypeError)
    check(name not in [host.name for host in hosts()], f"register_host: the name {name!r} is taken")

    def fused(module: nn.Module, given: dict, options: Options):
        try:
            return forward(module, *given["args"], **given["kwargs"])
        except Unsupported as e:
            return Reason(e.code, str(e))

    host = Host(name=name, op=op, matches=matches, fused=fused, device=device_of, as_called=True)
    registered.insert(0, host)
    return Registration(host)


@dataclass
class _Planned:
    module: nn.Module
    host: Host
    entry: Entry


def _names(model: nn.Module) -> dict[int, list[str]]:
    """A shared module has several names, and any of them may be asked for."""
    names = collections.defaultdict(list)
    for name, module in model.named_modules(remove_duplicate=False):
        names[id(module)].append(name)
    return names


def _records(model: nn.Module) -> Iterator[tuple[list[str], nn.Module, Record]]:
    """What is patched, whatever has become of its weight since."""
    names = _names(model)
    for module in model.modules():
        record = module.__dict__.get("_fastfuse")
        if record is not None:
            yield names[id(module)], module, record


def host_of_module(module: nn.Module) -> Host | None:
    """The host that has patched the module, else the first that would."""
    bound = (host_of(module.__dict__.get(slot)) for slot in ("forward", "_old_forward"))
    return next((host for host in bound if host is not None), None) or host_for(module)


def _plan(model: nn.Module, ops: set[str], included: Callable, excluded: Callable, options: Options) -> list[_Planned]:
    aliases = _names(model)
    plan = []
    for name, module in model.named_modules():
        host = host_of_module(module)
        if host is None:
            continue
        names, record = aliases[id(module)], module.__dict__.get("_fastfuse")
        entry = Entry(name, type(module).__name__, host.name, host.op, "planned", layout=_layout(host, module))
        asked = host.op in ops and any(included(n, module) for n in names) and not any(excluded(n, module) for n in names)
        if record is not None:
            entry = _described(host, module, replace(entry, status="already"), record.options)
        elif host.native:
            entry = replace(entry, status="already", backend=runs_on(host.device(module), Options()))
        elif found := _refused(host, module, options, None if asked else Reason("EXCLUDED", "not asked for")):
            entry = _skipped(entry, found)
        else:
            _check_interpreter(host, module, options)
            entry = _described(host, module, entry, options)
        plan.append(_Planned(module, host, entry))
    return plan


def _refused(host: Host, module: nn.Module, options: Options, noted: Reason | None) -> Reason | None:
    """Why patch leaves the module alone. noted: a reason that the module itself does not show."""
    if os.environ.get("FASTFUSE_DISABLE") == "1":
        return Reason("DISABLED", "FASTFUSE_DISABLE is set")
    if noted is not None:
        return noted
    if (author := foreign_forward(host, module)) is not None:
        return Reason("FOREIGN_FORWARD", f"its forward comes from {author}")
    return host.drift(module) or host.refuses(module, options)


def _skipped(entry: Entry, reason: Reason) -> Entry:
    return replace(entry, status="skipped", code=reason.code, reason=reason.words)


def _check_interpreter(host: Host, module: nn.Module, options: Options) -> None:
    device = host.device(module)
    if options.backend == "triton" and device is not None and device.type == "cpu":
        check_triton("patch")
        if not INTERPRET:
            raise Unsupported("patch: backend 'triton' on a CPU model needs TRITON_INTERPRET=1 set before import", "NO_GPU")


def _described(host: Host, module: nn.Module, entry: Entry, options: Options) -> Entry:
    """The entry with what would run, and what stands in the way of the fused op for now."""
    drift = host.drift(module)
    found = drift or host.in_the_way(module, options)
    if drift is None:
        entry = replace(entry, layout=host.layout(module), backend=runs_on(host.device(module), options))
    if found is None:
        return entry
    return replace(entry, code=found.code, reason=f"runs its own forward for now: {found.words}")


def _layout(host: Host, module: nn.Module) -> str:
    return "" if host.drift(module) else host.layout(module)


def _apply(todo: list[_Planned], options: Options, verify: bool) -> None:
    try:
        for p in todo:
            slot = forward_slot(p.module)
            before = p.module.__dict__.get(slot)
            if host_of(before) is not None:
                before = None  # ours, put back by a wrapper that outlived an unpatch
            p.module.__dict__["_fastfuse"] = Record(p.host.name, p.host.op, options, slot, before, Names.of(p.module, p.host.renamed), p.module)
            p.module.__dict__[slot] = p.host.bound(p.module)
            p.entry = replace(p.entry, status="patched")
        for p in todo:
            found = _verified(p) if verify and not p.entry.code else None
            if found is not None and found.code == "MISMATCH":
                _uninstall(p.module)
                p.entry = _skipped(p.entry, found)
            elif found is not None:
                p.entry = replace(p.entry, code=found.code, reason=found.words)
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


def _verified(p: _Planned) -> Reason | None:
    """MISMATCH where on random input the fused path is further from the module's own forward than rounding explains; None where it is not.

    HOST_DECODE where it is the host library that is off, by a fault that is known (Host.corrected).
    """
    if any(w.device.type == "meta" or hasattr(w, "device_mesh") for w in p.module.parameters()):
        return None  # no values at hand: not there yet, offloaded, or in shards
    record = p.module.__dict__["_fastfuse"]
    own = p.host.fallback or (lambda module, given, options: call_own(module, given))
    with undisturbed(p.module), torch.inference_mode(False), torch.enable_grad():  # some layers repack their weight for good where no gradient is wanted
        for m in p.module.modules():
            if isinstance(m, nn.Dropout):  # two masks would be two results
                m.training = False
        probe = p.host.probe(p.module)
        if probe is None:
            return None
        want = own(p.module, probe.given, record.options)
        got = p.host.fused(p.module, probe.given, record.options)  # without the hooks of the module itself
        if type(got) is Reason:
            return Reason("MISMATCH", f"does not run: {got.code}: {got.words}")
        found = _apart(got, want, probe)
        if found is None:
            return None
        if p.host.corrected is not None and _apart(got, p.host.corrected(p.module, probe.given), probe) is None:
            return Reason("HOST_DECODE", "the module's own forward is off, for its library decodes the weight wrongly row by row; the fused op is right")
    return Reason("MISMATCH", found)


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
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}, not a torch.nn.Module")


def _op_names(ops: str | Iterable[str] | None, function: str = "patch", more: Iterable[str] = ()) -> set[str]:
    known = {host.op for host in hosts()}.union(more)
    if ops is None:
        return known
    if not isinstance(ops, Iterable):
        raise TypeError(f"{function}: ops is a {type(ops).__name__}, not a name or several")
    names = {ops} if isinstance(ops, str) else set(ops)
    check(names <= known, f"{function}: ops has {', '.join(sorted(map(repr, names - known)))}, known are {', '.join(sorted(known))}")
    return names


def _matcher(wanted: Filter | None, default: bool) -> Callable[[str, nn.Module], bool]:
    if wanted is None:
        return lambda name, module: default
    tests = list(wanted) if isinstance(wanted, Iterable) and not isinstance(wanted, str) else [wanted]
    for t in tests:
        if not isinstance(t, str) and not callable(t):
            raise TypeError(f"patch: include and exclude take globs or functions (name, module) -> bool, not a {type(t).__name__}")
    return lambda name, module: any(t(name, module) if callable(t) else fnmatch.fnmatchcase(name, t) for t in tests)


def _nothing_found(model: nn.Module) -> str:
    linear = [m for m in model.modules() if isinstance(m, nn.Linear)]
    kinds = sorted({f"{type(m.weight).__name__} of {m.weight.dtype}" for m in linear})
    held = f"its {len(linear)} linear layers hold {', '.join(kinds)}" if linear else "it has no linear layers"
    return f"found nothing to patch in {type(model).__name__}: no module holds an NF4 weight, none embeds patches or attends to images as fastfuse knows it; {held}"
