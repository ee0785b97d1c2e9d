"""The tables and plots of docs/benchmarks.md are what bench/results gives, and rows that must not be shown are refused. Needs no GPU and times nothing."""

import json
from dataclasses import replace

import pytest
import torch

from bench import harness, report, report_rows
from bench.bench_nf4_lora import LINEAR, layers_case
from bench.peaks import Peaks

NAMES = ("cpu", "gpu")
MARKED = "# title\n\n" + "\n".join(f"<!-- bench: {name} -->\n<!-- /bench: {name} -->\n" for name in NAMES) + "\nend\n"
TABLES = [{"title": "Layers", "cases": [{"op": "linear*"}]}]
NOT_PEERS = [{"provider": "* LoRA", "why": "decoded beforehand"}]
BASE = {"device": "a chip, 2 threads", "device_type": "cpu", "commit": "c" * 40, "dirty": False, "torch": "2.13", "date": "2026-01-02T00:00:00+00:00"}


def row(provider, us=100.0, shape="M1 N8 K8", **fields):
    measured = {"floor_us": 50.0, "parity": us and True, "us": us, "timing": "host clock", "provider": provider}
    return {"op": "linear", "shape": shape, "dtype": "float32"} | BASE | measured | fields


def both(fastfuse, eager, shape="M1 N8 K8", **fields):
    return row("fastfuse", fastfuse, shape, **fields), row("eager", eager, shape, **fields)


@pytest.fixture
def tree(tmp_path, monkeypatch):
    return Tree(tmp_path, monkeypatch)


class Tree:
    """A page, results and bars of its own."""

    def __init__(self, folder, monkeypatch):
        self.page, self.results, self.bars = folder / "benchmarks.md", folder / "results", folder / "bars.json"
        self.page.write_text(MARKED)
        self.results.mkdir()
        self.judge()
        monkeypatch.setattr(report_rows, "BARS", self.bars)

    def judge(self, bars=(), explained=()):
        self.bars.write_text(json.dumps({"tables": TABLES, "not_peers": NOT_PEERS, "bars": bars, "explained": explained}))

    def add(self, *rows):
        harness.append(rows, self.results)

    def run(self, *args):
        return report.main(["--page", str(self.page), "--results", str(self.results), *args])

    def files(self):
        return {path: path.read_bytes() for path in self.page.parent.rglob("*") if path.is_file()}

    def section(self, name):
        return self.page.read_text().split(f"<!-- bench: {name} -->")[1].split(f"<!-- /bench: {name} -->")[0].strip()

    def lines(self, name="cpu"):
        """The cells of the section's tables."""
        return [[cell.strip() for cell in line.strip("|").split("|")] for line in self.section(name).splitlines() if line.startswith("|")]

    def refuses(self, capsys, *words, args=()):
        before = self.files()
        assert self.run(*args) == 1
        assert self.files() == before
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(word in said for word in words), said


def test_the_page_is_what_the_committed_results_give(capsys):
    assert report.main(["--check"]) == 0, capsys.readouterr().err


def test_without_rows_the_sections_say_so_and_nothing_else(tree):
    assert tree.run() == 0
    assert [tree.section(name) for name in NAMES] == ["not measured on a CPU yet", "not measured on a GPU yet"]
    assert tree.page.read_text().endswith("\nend\n") and tree.run("--check") == 0
    assert not list(tree.results.iterdir())


def test_what_is_not_there_is_no_empty_result(tree, capsys):
    tree.results.rmdir()
    tree.refuses(capsys, "results: not there")


def test_a_table_of_peers(tree):
    tree.add(row("fastfuse", 200), row("eager", 500), row("peer", 300), row("fp32 LoRA", 100), row("fastfuse in place", 90))
    tree.add(row("wrong one", 10, parity=False, error_over_limit=7.0), row("broken", None, error="no"), row("absent", None, note="not installed"))
    assert tree.run() == 0
    head, _, line = tree.lines()
    cells = dict(zip(head, line, strict=True))
    assert cells["fastfuse, ms"] == "0.200" and cells["% of floor"] == "25" and cells["fastfuse is"] == "1.50x as fast as peer"
    assert [cells[name] for name in ("eager", "peer", "wrong one", "broken", "absent")] == ["2.50", "1.50", "off, 7.00 x the limit", "failed", "not installed"]
    assert cells["not counted"] == "fp32 LoRA 0.50" and "fp32 LoRA: decoded beforehand." in tree.section("cpu")
    assert "fastfuse in place" not in cells and "commit cccccccccc, 2026-01-02, torch 2.13" in tree.section("cpu")
    page = (tree.results / "a_chip_2_threads.md").read_text()
    assert all(name in page for name in ("fastfuse in place", "WRONG: error is 7.0", "ERROR no")) and "](results/a_chip_2_threads.md)" in tree.section("cpu")


def test_only_the_newest_run_at_the_newest_commit_is_shown(tree):
    old, later = {"commit": "a" * 40, "date": "2026-01-01T00:00:00+00:00"}, {"date": "2026-01-03T00:00:00+00:00"}
    tree.add(*both(1, 3, **later))  # files are not in order of time
    tree.add(row("fastfuse", 1, shape="M9 N8 K8", **old, dirty=True), row("fastfuse", None, error="no", **old), *both(1, 2))
    tree.add(*both(4, 20, "M2 N8 K8"))
    assert tree.run() == 0
    assert [(line[1], line[5]) for line in tree.lines()[2:]] == [("M1 N8 K8", "3.00x as fast as eager"), ("M2 N8 K8", "5.00x as fast as eager")]
    assert "commit cccccccccc, 2026-01-02 to 2026-01-03" in tree.section("cpu")


WRONG = row("fastfuse", parity=False, error_over_limit=3.0)
LATER = {"date": "2026-01-03T00:00:00+00:00"}


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row("eager", dirty=True)], ("linear M1 N8 K8 float32, eager", "changes")),
        ([row("eager", dirty=None, commit=None, **LATER)], ("eager", "no known commit")),
        ([WRONG], ("fastfuse", "wrong", "3.0 times")),
        ([WRONG, row("fastfuse", **LATER)], ("wrong", "2026-01-02")),  # once is enough at a commit
        ([row("fastfuse in place", parity=False)], ("fastfuse in place", "wrong")),
        ([row("patched", parity=False)], ("patched", "wrong")),
        ([row("fastfuse", None, error="RuntimeError: no")], ("fastfuse", "RuntimeError: no")),
        ([row("fastfuse", None)], ("fastfuse", "no time")),
        ([row("eager", torch="2.12")], ("eager", "torch 2.12", "2.13")),
        ([row("eager", device_type="tpu")], ("eager", "'tpu'", "cpu, cuda")),
        ([{k: v for k, v in row("eager").items() if k != "parity"}], ("a_chip_2_threads.jsonl", "'parity'")),
        (MARKED.replace("<!-- bench: gpu -->\n", ""), ("0 lines <!-- bench: gpu -->",)),
        (MARKED + MARKED, ("2 lines <!-- bench: cpu -->",)),
        (MARKED.replace("<!-- /bench: cpu -->", ""), ("0 lines <!-- /bench: cpu -->",)),
        ("<!-- /bench: cpu -->\n<!-- bench: cpu -->\n", ("before",)),
        ({"shapes": "M2 *", "fastest_peer": 1, "why": "x"}, ("bars.json", "'shapes'", "shape")),
        ({"fastest_peer": 1}, ("bars.json", "bars", "without 'why'")),
    ],
    ids=lambda given: " ".join(given) if isinstance(given, tuple) else "",
)
def test_what_must_not_be_shown_is_refused(tree, capsys, rows, words):
    """Rows, a page without its markers, bars that are misspelt."""
    tree.add(*both(100, 100, "M0 N8 K8"))
    if isinstance(rows, str):
        tree.page.write_text(rows)
    elif isinstance(rows, dict):
        tree.judge([rows])
    else:
        tree.add(*rows)
    tree.refuses(capsys, *words)


def test_check_names_the_first_difference_and_writes_nothing(tree, capsys):
    tree.add(*both(200, 300, bytes=64, flops=128), *both(200, 300, "M16 N8 K8", bytes=64, flops=128))
    assert tree.run() == 0 and tree.run("--check") == 0
    made, text = tree.files(), tree.page.read_text()
    line = next(n for n, line in enumerate(text.splitlines(), 1) if "M16" in line)
    plots = sorted(tree.page.parent.glob("plots/*.svg"))
    assert [path.stem for path in plots] == ["a_chip_2_threads_roofline", "a_chip_2_threads_speedup"]
    assert all(f"(plots/{path.name})" in text for path in plots)

    def differs(path, content, *words):
        path.unlink() if content is None else path.write_bytes(content)
        tree.refuses(capsys, *words, args=["--check"])
        assert tree.run() == 0 and tree.files() == made  # writing repairs it, and the same rows give the same bytes

    differs(tree.page, text.replace("0.200", "0.100", 2).encode(), "benchmarks.md:", "0.100", "0.200")
    differs(tree.page, text.replace("M16", "M17").encode(), f"benchmarks.md:{line}:", "M17", "M16")
    differs(tree.results / "a_chip_2_threads.md", None, "a_chip_2_threads.md:1:")
    differs(plots[1], None, plots[1].name, "not there")
    differs(plots[0], plots[0].read_bytes().replace(b"<dc:description>data ", b"<dc:description>data 0"), plots[0].name, "other data")
    differs(tree.page.parent / "plots" / "old.svg", b"<svg/>", "old.svg", "no result")
    differs(tree.results / "old.md", report.GENERATED.encode(), "old.md", "no result")

    (tree.results / "notes.md").write_text("of a person")
    tree.add(*both(100, 300, "M16 N8 K8", date="2026-02-02T00:00:00+00:00"))
    assert tree.run("--check") == 1 and tree.run() == 0
    assert all(path.read_bytes() != made[path] for path in plots) and (tree.results / "notes.md").exists()


def test_a_case_below_its_bar_is_named_with_its_reason(tree, capsys):
    tree.add(*both(100, 90))
    tree.add(*both(200, 199.5, "M2 N8 K8"))  # 1.00 as shown
    bar, why = {"fastest_peer": 1, "why": "else the peer serves better"}, {"op": "linear", "fastest_peer": 0.85, "why": "It is an example."}

    tree.judge([bar], [why])
    assert tree.run() == 0
    assert "1 of 2 cases are below" in tree.section("cpu")
    assert "- It is an example.\n    - linear M1 N8 K8 float32: 0.90x as fast as eager, bar 1x\n" in tree.section("cpu")

    for explained in ([], [why | {"fastest_peer": 0.95}], [why | {"device_type": "cuda"}], [{"percent_of_floor": 0, "why": "no"}]):
        tree.judge([bar], explained)
        for args in ((), ("--check",)):  # written all the same
            assert tree.run(*args) == 1
            said = capsys.readouterr().err
            assert "linear M1 N8 K8 float32: 0.90x" in said and "M2" not in said
        assert "- **not explained**\n    - linear M1" in tree.section("cpu")

    tree.judge([{"shape": "M2 *", "percent_of_floor": 80, "why": "bandwidth"}], [{"percent_of_floor": 20, "why": "It waits."}])
    assert tree.run() == 0
    assert "- It waits.\n    - linear M2 N8 K8 float32: 25% of the floor, bar 80%\n" in tree.section("cpu")

    tree.judge()
    assert tree.run() == 0 and "All 2 cases reach their bar" in tree.section("cpu")


def test_whole_models(tree):
    model = {"op": "decode", "shape": "b2 model", "dtype": "bfloat16", "tokens": 64, "device": "GPU", "device_type": "cuda"}
    tree.add(row("unpatched", 4000, **model, peak_bytes=3 * 2**30), row("patched", 1000, **model, peak_bytes=2**30))
    tree.add(row("patched + torch.compile", 500, **model, peak_bytes=2**31), row("other", 100, **model, parity=False, error_over_limit=2.0))
    tree.judge([{"fastest_peer": 5, "why": "x"}])
    assert tree.run() == 1  # 4 times unpatched: neither the wrong one nor patched itself, compiled, is a peer
    expected = [
        ["unpatched", "4.00", "16000", "3.00", "1", "1.00"],
        ["patched", "1.00", "64000", "1.00", "5", "4.00"],
        ["patched + torch.compile", "0.500", "128000", "2.00", "10", "8.00"],
        ["other", "off, 2.00 x the limit", "", "", "", ""],
    ]
    assert [line[3:] for line in tree.lines("gpu")[2:]] == expected
    assert "4.00x as fast as unpatched, bar 5x" in tree.section("gpu") and tree.section("cpu") == "not measured on a CPU yet"
    assert [path.stem for path in tree.page.parent.glob("plots/*.svg")] == ["GPU_tokens"]


def test_devices_are_kept_apart(tree):
    tree.add(*both(100, 200), *both(10, 1, device="another", torch="2.12", commit="b" * 40))
    assert tree.run() == 0
    first, second = tree.section("cpu").split("**another**")
    assert "2.00x as fast" in first and "0.10x" not in first and "torch 2.13" in first
    assert "0.10x as fast" in second and "torch 2.12" in second


def test_rows_of_the_harness_are_taken_as_they_are(tree):
    case, peaks = layers_case(LINEAR, 2, [(128, 128)], dtype=torch.float32), Peaks("chip", "measured", 1e12, {"float32": 1e12}, 0.0)
    case = replace(case, op="linear", providers={name: case.providers[name] for name in (harness.OURS, harness.EAGER)})
    tree.add(*harness.measure(case, "cpu", peaks, harness.environment("cpu") | {"dirty": False, "commit": "d" * 40}))
    assert tree.run() == 0 and tree.run("--check") == 0
    assert tree.lines()[2][:3] == ["linear", case.shape, "float32"] and list(tree.page.parent.glob("plots/*_roofline.svg"))
