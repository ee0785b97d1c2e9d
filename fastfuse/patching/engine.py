"""patch(model): plan, then apply all or nothing, and give a report.

Only the instance is touched: a bound forward in the module's __dict__ and a small record beside it. No class is
changed, no module replaced, no parameter added; weights are read from the module at every call.
"""

import collections
import contextlib
import fnmatch
import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from types import MethodType

import torch
from torch import nn

from fastfuse.errors import Unsupported
from fastfuse.ops._op import BACKENDS, INTERPRET, backend_for, check, check_triton
from fastfuse.patching.hosts import HOSTS
from fastfuse.patching.hosts._host import Host, Record, foreign_forward, forward_slot, own_forward, readable
from fastfuse.patching.report import Entry, PatchReport

Filter = str | Callable[[str, nn.Module], bool] | Iterable[str | Callable[[str, nn.Module], bool]]


def patch(
    model: nn.Module,
    *,
    ops: str | Iterable[str] | None = None,
    include: Filter | None = None,
    exclude: Filter | None = None,
    on_unsupported: str = "skip",
    backend: str = "auto",
    verify: bool = False,
    dry_run: bool = False,
) -> PatchReport:
    """Run the hot paths of a model through fused ops, in place. `unpatch` gives it back exactly.

    ops: op names ("nf4_linear", "nf4_lora_linear"), all where None.  include, exclude: a glob over module names, a
    function (name, module) -> bool, or several.  on_unsupported: "skip", "warn" or "raise" for a candidate no fused op
    covers; "raise" changes nothing.  backend: as fastfuse.backend.  verify: run each module on random input before and
    after, and leave it alone where the two differ by more than rounding.  dry_run: report what would be done.
    Patching twice changes nothing. What a fused op does not cover at a call runs the module's own forward, counted in
    `status(model)`.  Raises ValueError for a bad option, Unsupported where the backend cannot run or as asked.
    """
    return _patch(model, ops, include, exclude, on_unsupported, backend, verify, dry_run)[0]


def _patch(model, ops, include, exclude, on_unsupported, backend, verify, dry_run) -> tuple[PatchReport, list[nn.Module]]:
    """The report, and the modules this call patched."""
    _check_model("patch", model)
    check(on_unsupported in ("skip", "warn", "raise"), f"patch: on_unsupported is {on_unsupported!r}, not 'skip', 'warn' or 'raise'")
    check(backend in BACKENDS, f"patch: backend is {backend!r}, not one of {', '.join(BACKENDS)}")
    plan = _plan(model, _op_names(ops), _matcher(include, True), _matcher(exclude, False), backend)
    todo = [p for p in plan if p.entry.status == "planned"]
    refused = [p.entry for p in plan if p.entry.status == "skipped" and p.entry.code != "EXCLUDED"]
    note = "" if plan else _nothing_found(model)
    if refused or not plan:
        message = note or f"{len(refused)} modules are not covered, the first: {refused[0].name}: {refused[0].code}: {refused[0].reason}"
        if on_unsupported == "raise":
            raise Unsupported(f"patch: {message}", refused[0].code if refused else "NOTHING_FOUND")
        if on_unsupported == "warn" or not plan:
            warnings.warn(f"fastfuse.patch: {message}", stacklevel=2)
    if not dry_run:
        _apply(todo, backend, verify)
        if on_unsupported == "raise" and (bad := [p.entry for p in todo if p.entry.code == "MISMATCH"]):
            for p in todo:
                _uninstall(p.module)
            raise Unsupported(f"patch: {bad[0].name}: {bad[0].reason}", "MISMATCH")
    report = PatchReport(type(model).__name__, tuple(p.entry for p in plan), note)
    return report, [p.module for p in plan if p.entry.status == "patched"]


def unpatch(model: nn.Module, *, ops: str | Iterable[str] | None = None, include: Filter | None = None) -> PatchReport:
    """Give every patched module its own forward back. The order relative to other wrappers does not matter."""
    _check_model("unpatch", model)
    names, wanted = _op_names(ops), _matcher(include, True)
    entries = []
    for name, module, record in _records(model):
        if record.op in names and wanted(name, module):
            found = _uninstall(module)
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
    backend: str = "auto",
    verify: bool = False,
) -> Iterator[PatchReport]:
    """`with patched(model) as report:` patches for the block alone, with patch's options. Earlier patches stay."""
    report, mine = _patch(model, ops, include, exclude, on_unsupported, backend, verify, dry_run=False)
    try:
        yield report
    finally:
        for module in mine:
            _uninstall(module)


def status(model: nn.Module) -> PatchReport:
    """What is patched now, and how often each patched module ran its own forward instead, by reason."""
    _check_model("status", model)
    hosts = {id(module): host for _, module, host in _candidates(model)}
    entries = []
    for name, module in model.named_modules():
        host, record = hosts.get(id(module)), module.__dict__.get("_fastfuse")
        if record is not None:
            entry = Entry(name, type(module).__name__, record.host, record.op, "patched", fallbacks=dict(record.fallbacks))
            if host is None:
                entry = replace(entry, code="NOT_NF4", reason="runs its own forward for now: the weight was replaced by one that is not NF4")
            else:
                entry = _with_obstacle(host, module, entry, record.backend)
        elif host is not None:
            entry = Entry(name, type(module).__name__, host.name, host.op, "unpatched")
        else:
            continue
        entries.append(entry if host is None else _with_layout(host, module, entry))
    return PatchReport(type(model).__name__, tuple(entries), "" if entries else _nothing_found(model))


@dataclass
class _Planned:
    module: nn.Module
    host: Host
    entry: Entry


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Host]]:
    for name, module in model.named_modules():
        for host in HOSTS:
            if host.matches(module):
                yield name, module, host


def _records(model: nn.Module) -> Iterator[tuple[str, nn.Module, Record]]:
    """What is patched, whatever has become of its weight since."""
    for name, module in model.named_modules():
        record = module.__dict__.get("_fastfuse")
        if record is not None:
            yield name, module, record


def _plan(model: nn.Module, ops: set[str], included: Callable, excluded: Callable, backend: str) -> list[_Planned]:
    aliases = collections.defaultdict(list)  # a shared module has several names, and any of them may be asked for
    for name, module in model.named_modules(remove_duplicate=False):
        aliases[id(module)].append(name)
    plan = []
    for name, module, host in _candidates(model):
        names = aliases[id(module)]
        entry = Entry(name, type(module).__name__, host.name, host.op, "planned")
        asked = host.op in ops and any(included(n, module) for n in names) and not any(excluded(n, module) for n in names)
        if (record := module.__dict__.get("_fastfuse")) is not None:
            entry = _with_obstacle(host, module, replace(entry, status="already"), record.backend)
        elif not asked:
            entry = replace(entry, status="skipped", code="EXCLUDED", reason="not asked for")
        elif (author := foreign_forward(host, module)) is not None:
            entry = replace(entry, status="skipped", code="FOREIGN_FORWARD", reason=f"its forward comes from {author}")
        elif (found := readable(host, module, backend)[1]) is not None:
            entry = replace(entry, status="skipped", code=found[0], reason=found[1])
        else:
            _check_interpreter(host, module, backend)
            entry = _with_obstacle(host, module, entry, backend)
        plan.append(_Planned(module, host, _with_layout(host, module, entry)))
    return plan


def _check_interpreter(host: Host, module: nn.Module, backend: str) -> None:
    if backend == "triton" and host.view(module).device.type == "cpu":
        check_triton("patch")
        if not INTERPRET:
            raise Unsupported("patch: backend 'triton' on a CPU model needs TRITON_INTERPRET=1 set before import", "NO_GPU")


def _with_obstacle(host: Host, module: nn.Module, entry: Entry, backend: str) -> Entry:
    """The entry with what would run, and what stands in the way of the fused op for now."""
    weight, found = readable(host, module, backend)
    found = host.obstacle(module, None) or found
    if weight is not None:
        entry = replace(entry, backend=backend_for(weight.device, backend))
    return entry if found is None else replace(entry, code=found[0], reason=f"runs its own forward for now: {found[1]}")


def _with_layout(host: Host, module: nn.Module, entry: Entry) -> Entry:
    weight, _ = readable(host, module, "torch")
    return entry if weight is None else replace(entry, layout=weight.layout)


def _apply(todo: list[_Planned], backend: str, verify: bool) -> None:
    try:
        for p in todo:
            slot = forward_slot(p.module)
            before = p.module.__dict__.get(slot)
            if getattr(before, "__func__", None) is p.host.forward:
                before = None  # ours, put back by a wrapper that outlived an unpatch
            p.module.__dict__["_fastfuse"] = Record(p.host.name, p.host.op, backend, slot, before)
            p.module.__dict__[slot] = MethodType(p.host.forward, p.module)
            p.entry = replace(p.entry, status="patched")
            if verify and not p.entry.code and (reason := _mismatch(p)):
                _uninstall(p.module)
                p.entry = replace(p.entry, status="skipped", code="MISMATCH", reason=reason)
    except BaseException:
        for p in todo:
            _uninstall(p.module)
        raise


def _uninstall(module: nn.Module) -> bool:
    """Put back exactly what was there; False where another wrapper has hidden our forward."""
    record = module.__dict__.pop("_fastfuse", None)
    ours = [host.forward for host in HOSTS]
    for slot in ("forward", "_old_forward"):
        if getattr(module.__dict__.get(slot), "__func__", None) in ours:
            if record is not None and slot == record.slot and record.original is not None:
                module.__dict__[slot] = record.original
            elif slot == "forward":
                del module.__dict__[slot]
            else:  # hooked by accelerate after the patch: its wrapper needs something to call
                module.__dict__[slot] = MethodType(type(module).forward, module)
            return True
    return record is None


@torch.no_grad()
def _mismatch(p: _Planned) -> str | None:
    """How far the fused path is from the module's own forward on random input, where that is more than rounding.

    Two correct results differ by the rounding of weights and output to the dtype, about half its epsilon relative in
    2-norm, and by fp32 accumulation over K, about eps(fp32) * sqrt(K): the larger of eps and that is allowed.
    """
    weight, dtype = p.host.view(p.module), p.host.probe_dtype(p.module)
    K = weight.shape[1]
    x = torch.randn(4, K, generator=torch.Generator().manual_seed(0)).to(weight.device, dtype)
    # A layer may settle its compute dtype, or cast its bias, by the first input it sees: the probe must not be that.
    settled = [(m, dict(m.__dict__)) for m in p.module.modules()]
    biases = [(b, b.data) for m in p.module.modules() if (b := getattr(m, "bias", None)) is not None]
    try:
        with torch.enable_grad():  # on a CPU bitsandbytes repacks its weight for good when the input needs no gradient
            want = own_forward(p.module)(x.requires_grad_()).double()
        got = p.host.forward(p.module, x).double()  # as bound, without the module's hooks
    finally:
        for m, attributes in settled:
            m.__dict__.update(attributes)
        for b, data in biases:
            b.data = data
    allowed = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps * math.sqrt(K))
    err = ((got - want).norm() / want.norm().clamp_min(torch.finfo(dtype).tiny)).item()
    return None if err <= allowed else f"differs from its own forward by {err:.1e} relative, rounding explains {allowed:.1e}"


def _check_model(function: str, model) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model is a {type(model).__name__}, not a torch.nn.Module")


def _op_names(ops: str | Iterable[str] | None) -> set[str]:
    known = {host.op for host in HOSTS}
    if ops is None:
        return known
    if not isinstance(ops, Iterable):
        raise TypeError(f"patch: ops is a {type(ops).__name__}, not a name or several")
    names = {ops} if isinstance(ops, str) else set(ops)
    check(names <= known, f"patch: ops has {', '.join(sorted(map(repr, names - known)))}, known are {', '.join(sorted(known))}")
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
    return f"found nothing to patch in {type(model).__name__}: no module holds an NF4 weight; {held}"
