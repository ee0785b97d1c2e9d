"""Python calls per call of a host, counted without a GPU, against those that are stored."""

import importlib.metadata
import json
import os
import shutil

import pytest
from processes import python

from bench.host import PACKAGES, STORED, Row, differences, versions

HOSTS = ("triton", "peft", "bitsandbytes", "transformers")


def test_calls_that_grew_by_more_than_a_tenth_are_named():
    stored = {"grows": [2, 100, 10.0], "within": [2, 100, 10.0], "launches": [2, 100, 10.0]}
    found = {"grows": Row(2, 111, None), "within": Row(2, 110, 99.0), "launches": Row(3, 50, None), "new": Row(1, 5, None)}
    assert differences(found, stored) == [
        "grows: 111 calls, stored are 100: over 10% more",
        "launches: 3 launches, stored are 2",
        "new: no such row is stored, run with --save",
    ]


def needs_a_stub() -> None:
    for package in HOSTS:
        pytest.importorskip(package)
    if shutil.which(os.environ.get("CC", "cc").split()[0]) is None:
        pytest.skip("no C compiler")


def stored_here() -> dict:
    """What is stored of the installed Triton; skips where counts would tell about other packages than fastfuse."""
    needs_a_stub()
    stored = json.loads(STORED.read_text()).get(f"triton {importlib.metadata.version('triton')}")
    if stored is None:
        pytest.skip("no rows of the installed Triton are stored")
    other = {p: v for p, v in versions().items() if p in PACKAGES and v != stored["versions"][p]}
    if other:
        pytest.skip(f"the stored rows are of other versions than {other}")
    return stored


def test_no_call_costs_more_python_than_stored():
    rows = stored_here()["rows"]
    lines = python("-m", "bench.host", "--check", "--quick").stdout.splitlines()
    assert sum(line.startswith(tuple(f"{name} " for name in rows)) for line in lines) >= 15, lines


def test_prepared_calls_launch_what_the_whole_way_does():
    needs_a_stub()
    assert sum(line.endswith(" launches") for line in python("tests/prepared_launches.py").stdout.splitlines()) >= 35
