"""README and docs/ do what they say: every Python block runs, commands exist, links lead somewhere, and what is generated is up to date."""

import contextlib
import importlib.util
import io
import json
import re
import runpy
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from bench import draw_patch
from fastfuse.patching.hosts import table

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()
README, DOCS = ROOT / "README.md", sorted((ROOT / "docs").glob("*.md"))
TEXTS = [README, ROOT / "CONTRIBUTING.md", ROOT / "bench" / "README.md", ROOT / "findings" / "README.md", ROOT / "CHANGELOG.md", *DOCS]
PYTHON = re.compile(
    r"^(?:<!-- before: (?P<before>[^\n]*) -->\n)?```python\n(?P<code>.*?)^```$(?:\n<!-- after: (?P<after>[^\n]*) -->)?", re.MULTILINE | re.DOTALL
)


def name_of(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", [page for page in (README, *DOCS) if "```python" in page.read_text()], ids=name_of)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """In the order of the page, in one namespace; each between the code of the comments before and after it, which readers do not see."""
    monkeypatch.chdir(tmp_path)
    text, names = page.read_text(), {"__name__": "docs"}
    blocks = list(PYTHON.finditer(text))
    assert len(blocks) == text.count("```python")
    assert sum(len([c for c in (block["before"], block["after"]) if c]) for block in blocks) == text.count("<!-- before: ") + text.count("<!-- after: ")
    for block in blocks:
        exec(block["before"] or "", names)
        lines = "\n" * text.count("\n", 0, block.start("code"))  # an error then names the page's line
        exec(compile(lines + block["code"], str(page), "exec"), names)
        exec(block["after"] or "", names)


def shell_blocks(page):
    return re.findall(r"^```sh\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


def commands_in_prose(page):
    return [code for code in re.findall(r"`([^`\n]+)`", prose(page)) if code.startswith(("python ", "pytest ", "pip ", "cmake ", "mkdocs ", "bash "))]


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_commands_exist(page):
    """Each is parsed and asked for what it offers; none is run."""
    assert subprocess.run(["bash", "-n"], input="".join(shell_blocks(page)), text=True).returncode == 0
    commands = [line for script in shell_blocks(page) for line in script.splitlines()] + commands_in_prose(page)
    for line in commands:
        for command in re.split(r"\s+&&\s+", line.split(" #")[0]):
            check_command([word for word in shlex.split(command) if not word.startswith("TRITON_")])


def check_command(words):
    options = {word.split("=")[0] for word in words if word.startswith("--") and word != "--"}
    if words[0] == "python":
        subcommand = [word for word in words[3:4] if words[2] == "fastfuse" and not word.startswith("-")]
        assert options <= options_of(words[1 + (words[1] == "-m")], *subcommand), words
    elif words[0] == "pip":
        extras = re.findall(r"(?:\.|fastfuse)\[(.*)\]", " ".join(words))
        known = re.findall(r"^(\w+) = \[", PROJECT.split("[project.optional-dependencies]")[1].split("\n[")[0], re.MULTILINE)
        assert set(",".join(extras).split(",")) <= {"", *known}, words
        assert "-c" not in words or (ROOT / words[words.index("-c") + 1]).is_file()
    elif words[0] == "pytest":
        assert options <= pytest_options(), words
        assert all((ROOT / word).exists() for word in words[1:] if "/" in word), words
        assert "-m" not in words or f'"{words[words.index("-m") + 1]}:' in PROJECT
    elif words[0] in ("cmake", "ctest"):
        assert all(word[2:].split("=")[0] in (ROOT / "CMakeLists.txt").read_text() for word in words if word.startswith("-D")), words
    elif words[0] == "bash":
        assert "NAME" in words[1] or (ROOT / words[1]).is_file(), words
    else:
        assert words[0] in ("ruff", "mkdocs"), f"{words[0]}: a command that this test does not know"


@cache
def options_of(script, *subcommand):
    """What `--help` of a module, or of a file with a slash in its name, says that it takes."""
    out, argv = io.StringIO(), sys.argv
    sys.argv = [script, *subcommand, "--help"]
    try:
        with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / script) if "/" in script else file_of(script), run_name="__main__")
    finally:
        sys.argv = argv
    assert not stopped.value.code, f"{script} --help: {stopped.value.code}"
    return set(re.findall(r"--[a-z][a-z-]*", out.getvalue()))


def file_of(module):
    """That `python -m` runs."""
    spec = importlib.util.find_spec(module)
    return importlib.util.find_spec(f"{module}.__main__").origin if spec.submodule_search_locations else spec.origin


@cache
def pytest_options():
    """pytest's, its plugins' and bench/conftest.py's."""
    told = subprocess.run([sys.executable, "-m", "pytest", "--help", "bench"], cwd=ROOT, capture_output=True, text=True).stdout
    return set(re.findall(r"--[a-z][a-z-]*", told))


def prose(page):
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page):
    """Of its headings, as code hosts and mkdocs name them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", TEXTS, ids=name_of)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not link.startswith("http"):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), link
            assert not anchor or anchor in anchors(target), link


def test_what_is_generated_is_up_to_date(capsys):
    """The hosts, the picture of a patched Mllama, and the calls of a patched layer as they were counted. The README is for a newcomer, and short."""
    patching, benchmarks = ((ROOT / "docs" / page).read_text() for page in ("patching.md", "benchmarks.md"))
    assert table() in patching and len(README.read_bytes()) <= 8192
    assert draw_patch.main(["--check"]) == 0, capsys.readouterr().err
    rows = json.loads((ROOT / "bench" / "results" / "host.json").read_text())["triton 3.7.1"]["rows"]
    for who, shown in (("patched", "patched"), ("own", "PEFT + bitsandbytes themselves")):
        row = f"| {shown} | {rows[f'PEFT LoRA over bitsandbytes, {who}, 1 token, no grad'][1]} |"
        assert row in patching and row in benchmarks


@pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is not installed: pip install 'fastfuse[docs]'")
def test_the_site_builds_without_a_warning(tmp_path):
    """Links and anchors between pages, and every name in the API reference, are checked by mkdocs."""
    done = subprocess.run([sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in (tmp_path / "api" / "index.html").read_text() for name in ("nf4_lora_linear", "EncoderMask", "load_model"))
