"""The rows of tests.matrix, how it counts, and the page it writes. No environment is made here."""

import json
import sys

import matrix
import pytest
from matrix import ROOT, ROWS, TIERS, Row, cell, page, read_codegen, read_junit

JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_patch" name="test_a[one]"/>
<testcase classname="tests.test_patch" name="test_b"><failure message="no"/></testcase>
<testcase classname="tests.test_patch" name="test_c"><error message="teardown"/></testcase>
<testcase classname="tests.test_patch" name="test_c"><failure message="no"/></testcase>
<testcase classname="" name="tests.test_peft"><error message="collection failure"/></testcase>
<testcase classname="tests.test_patch" name="test_d"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""

VERSIONS = {
    "python": "3.11.7",
    "torch": "2.13.0+cpu",
    "triton": "3.9.0",
    "transformers": "5.24.0",
    "peft": "0.21.2",
    "bitsandbytes": "0.50.2",
    "torchao": "0.18.0",
}
GOOD = {"passed": 12, "failed": [], "skipped": 0, "seconds": 3}
ROW = Row("a row", "an example", {"triton": "3.9.0"}, ("hosts", "launches"))


def ran(**tiers):
    return {"a row": {"date": "2026-11-29", "commit": "abc1234", "versions": VERSIONS, "tiers": tiers}}


def test_rows_pin_what_the_tested_set_holds_and_run_tests_that_exist():
    assert len({row.name for row in ROWS}) == len(ROWS)
    tested = matrix.tested_set()
    assert tested["torch"] and tested["pytest"], "constraints.txt was not understood"
    for row in ROWS:
        assert row.tiers and set(row.tiers) <= TIERS.keys() and set(row.pins) <= tested.keys(), row
        assert all(version.count(".") == 2 for version in row.pins.values()), row
    files = [arg.split("::")[0] for tier in TIERS.values() for arg in tier.args if arg.startswith("tests/")]
    assert files and all((ROOT / file).exists() for file in files)


def test_the_releases_that_must_be_tried_are_rows():
    pinned = {(package, version) for row in ROWS for package, version in row.pins.items()} | set(matrix.tested_set().items())
    assert {("triton", v) for v in ("3.6.0", "3.7.1", "3.8.0", "3.9.0")} <= pinned
    assert {("transformers", v) for v in ("5.18.0", "5.23.0")} <= pinned
    assert {row.python for row in ROWS} == {"3.10", "3.11", "3.12", "3.13"}
    assert sum(row.pins == {} and row.name == "tested" for row in ROWS) == 1


def test_a_base_is_shared_by_the_rows_of_one_torch_and_another_torch_brings_its_triton():
    tested, newer = (matrix.base_requirements(ROW._replace(pins=pins)) for pins in ({"triton": "3.9.0"}, {"torch": "2.14.1", "triton": "3.8.0"}))
    assert tested == sorted(f"{package}=={version}" for package, version in matrix.tested_set().items())
    assert "torch==2.14.1" in newer and not any(r.startswith("triton==") for r in newer)
    old = matrix.base_requirements(ROW._replace(pins={}, python="3.10"))  # transformers has left this Python
    assert "transformers==5.20.2" in old and len(old) == len(tested)


def test_counts_are_those_of_pytest():
    assert read_junit(JUNIT) == {"passed": 1, "failed": ["tests/test_patch.py::test_b", "tests/test_patch.py::test_c", "tests.test_peft"], "skipped": 1}
    reports = [{"arch": "sm_90", "op": "swiglu", "name": "bf16", "found": []}, {"arch": "sm_90", "op": "lora_up", "name": "x", "found": ["8 bytes of stack"]}]
    assert read_codegen(json.dumps(reports)) == {"passed": 1, "failed": ["sm_90 lora_up x: 8 bytes of stack"], "skipped": 0}


@pytest.mark.parametrize(
    "report, code, broke",
    [
        ('<testsuite><testcase classname="t" name="a"/></testsuite>', 0, None),
        ("<testsuite/>", 5, "ended with 5: no tests ran"),  # nothing collected is not green
        (None, 4, "ended with 4: no tests ran"),
        ('<testsuite><testcase classname="t" name="a"/></testsuite>', 1, "ended with 1 and named no failure"),
        ('<testsuite><testcase classname="t" name="a"/></testsuite>', -9, "ended with -9: no tests ran"),  # killed half-way
    ],
)
def test_a_run_that_did_not_come_to_its_end_says_so(tmp_path, report, code, broke):
    """The row's Python is a script that leaves this report behind, if any, and ends so."""
    python = tmp_path / "python"
    end = "kill -9 $$" if code < 0 else f"exit {code}"
    write = f"""for a in "$@"; do case $a in --junitxml=*) printf '%s' '{report}' > "${{a#--junitxml=}}";; esac; done\n""" if report else ""
    python.write_text(f"#!/bin/sh\n{write}echo no tests ran >&2\n{end}\n")
    python.chmod(0o755)
    found = matrix.run_tier(python, TIERS["launches"], 1)
    assert found.get("broke") == broke


def test_another_version_than_the_row_names_is_no_row(tmp_path):
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\necho '{json.dumps(VERSIONS | {'transformers': '4.0.0'})}'\n")
    python.chmod(0o755)
    with pytest.raises(matrix.NotRun, match=r"imports transformers 4\.0\.0, .* was asked for"):
        matrix.imported_versions(python, ROW)


def test_cells_never_show_passes_alone_where_something_went_wrong():
    assert cell(None) == "-"
    assert cell(GOOD) == "12 passed"
    assert cell(GOOD | {"failed": ["a", "b"], "skipped": 3}) == "12 passed, **2 failed**, 3 skipped"
    assert cell(GOOD | {"broke": "ended with 2"}) == "12 passed, **did not finish**"


def table_row(text):
    (line,) = (line for line in text.splitlines() if line.startswith("| a row |"))
    return [c.strip() for c in line.strip("|").split("|")]


def test_the_page_shows_versions_as_imported_and_names_every_failure():
    text = page(ran(hosts=GOOD | {"failed": ["tests/test_peft.py::test_x"]}, launches=GOOD), (ROW,))
    assert table_row(text) == [
        "a row", "3.11.7", "2.13.0+cpu", "3.9.0", "5.24.0", "0.21.2", "0.50.2", "0.18.0", "12 passed, **1 failed**", "12 passed", "2026-11-29", "abc1234",
    ]  # fmt: skip
    assert "- **a row**, hosts: `tests/test_peft.py::test_x`" in text.splitlines()
    assert "What failed" not in page(ran(hosts=GOOD, launches=GOOD), (ROW,))


def test_the_page_says_what_did_not_run():
    assert table_row(page(ran(hosts=GOOD), (ROW,)))[8:10] == ["12 passed", "not run"]
    never = page({}, (ROW,))
    assert table_row(never)[8:10] == ["not run", "not run"] and "- **a row** did not run: not tried yet." in never
    refused = page({"a row": {"date": "2026-11-29", "commit": "abc1234", "not run": "there is no python3.11 here"}}, (ROW,))
    assert table_row(refused)[8:10] == ["not run", "not run"] and "passed" not in refused
    assert "- **a row** did not run: there is no python3.11 here." in refused


def test_what_pip_says_is_shown_and_not_kept(tmp_path, monkeypatch, capfd):
    def no_environment(row, folder):
        matrix._run([sys.executable, "-c", "import sys; sys.exit('ERROR: only torch up to 2.14 here')"])

    monkeypatch.setattr(matrix, "environment", no_environment)
    assert matrix.run_row(ROW, tmp_path, 1)["not run"] == "its environment could not be made"
    assert capfd.readouterr().err == "ERROR: only torch up to 2.14 here\n"


def test_refreshing_one_row_keeps_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(matrix, "RESULTS", tmp_path / "docs/compatibility.json")
    monkeypatch.setattr(matrix, "PAGE", tmp_path / "docs/compatibility.md")
    matrix.store({"tested": ran(hosts=GOOD)["a row"]})
    monkeypatch.setattr("sys.argv", ["matrix", "--row", "triton-3.9", "--envs", str(tmp_path)])
    monkeypatch.setattr(matrix, "run_row", lambda row, envs, workers: ran(launches=GOOD)["a row"])
    matrix.main()
    assert set(matrix.load()) == {"tested", "triton-3.9"} and matrix.PAGE.read_text() == page(matrix.load())


def test_the_committed_page_is_that_of_the_committed_results():
    assert matrix.PAGE.read_text() == page(matrix.load())
