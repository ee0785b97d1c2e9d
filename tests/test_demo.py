"""The command line, as a new user meets it: three photos, odd images, wrong input."""

import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import ExifTags, Image
from skimage import data

import fastfuse
from fastfuse.__main__ import main
from fastfuse._quiet import STARTUP, quiet_startup

ROOT = Path(__file__).parents[1]


def save(folder: Path, name: str, array, **options) -> str:
    path = folder / name
    Image.fromarray(array).save(path, **options)
    return str(path)


PHOTOS = {
    "astronaut": lambda folder: None,  # the default
    "coffee": lambda folder: save(folder, "coffee.jpg", data.coffee()),
    "cat": lambda folder: save(folder, "cat.png", data.chelsea()),
}


@pytest.mark.parametrize("photo", PHOTOS)
def test_a_photo_gives_equal_tokens_and_the_model_comes_back(photo, tmp_path, capsys):
    path = PHOTOS[photo](tmp_path)
    assert main(["demo", "--tokens", "6", *(["--image", path] if path else [])]) == 0
    out = capsys.readouterr().out
    tokens = re.findall(r"(before|after ) +\[([\d, ]+)\]", out)
    assert len(tokens) == 2 and len(tokens[0][1].split(",")) == len(tokens[1][1].split(",")) == 6
    assert "logits equal to the bit again" in out and "fallbacks" not in out
    predicted, measured = re.search(r"predicted ([\d.]+) MiB of weights, measured ([\d.]+) MiB", out).groups()
    assert float(predicted) == pytest.approx(float(measured), rel=0.02)
    if not _gpu():  # there the model has other widths, and bf16 may turn a close choice: the margin is printed
        assert tokens[0][1] == tokens[1][1] and "equal, all 6" in out
        assert re.search(r"nf4_lora_linear +patched +46", out) and re.search(r"backend +PyTorch(, NF4 in C \(\w+\))?: no GPU found", out)


@pytest.mark.parametrize("photo", PHOTOS)
def test_the_own_architecture_gives_equal_tokens(photo, tmp_path, capsys):
    path = PHOTOS[photo](tmp_path)
    assert main(["demo", "--arch", "fastfuse", "--tokens", "6", *(["--image", path] if path else [])]) == 0
    out = capsys.readouterr().out
    tokens = re.findall(r"(before|after ) +\[([\d, ]+)\]", out)
    assert len(tokens) == 2 and len(tokens[0][1].split(",")) == len(tokens[1][1].split(",")) == 6
    assert "logits equal to the bit again" in out and "nf4_lora_linear in 46 LoRALinear" in out
    predicted, measured = re.search(r"predicted ([\d.]+) MiB of weights, measured ([\d.]+) MiB", out).groups()
    assert float(predicted) == pytest.approx(float(measured), rel=0.02)
    if not _gpu():
        assert tokens[0][1] == tokens[1][1] and "equal, all 6" in out and re.search(r"backend +PyTorch(, NF4 in C \(\w+\))?: no GPU found", out)


@pytest.mark.parametrize("arch", ["mllama", "fastfuse"])
def test_the_calls_of_a_token_are_printed_and_do_not_depend_on_how_many(arch, capsys):
    shown = []
    for tokens in ("1", "4"):
        assert main(["demo", "--arch", arch, "--tokens", tokens]) == 0
        shown.append(re.search(r"^Python +a token costs (\d+) calls before, (\d+) after$", capsys.readouterr().out, re.M).groups())
    assert shown[0] == shown[1] and all(int(n) > 1000 for n in shown[0])


def test_calls_are_counted_exactly():
    from fastfuse.demo.show import calls_per_token

    def generate(n: int) -> None:
        for _ in range(n):  # in each turn one call of a Python function and one of a function written in C
            one()

    def one() -> None:
        abs(-1)

    before = sys.getprofile()
    assert calls_per_token(generate) == 2 and sys.getprofile() is before
    with pytest.raises(ZeroDivisionError):
        calls_per_token(lambda n: 1 / 0)
    assert sys.getprofile() is before


def _gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def test_photos_reach_the_answer(tmp_path):
    """Two photos give different logits: the comparison is not between two models that ignore their input."""
    import torch
    from rich.progress import Progress

    from fastfuse.demo import CPU_SIZE, load_image, mllama

    device = torch.device("cpu")
    with Progress(disable=True) as progress:
        torch.manual_seed(0)
        model = mllama.build(CPU_SIZE, device, progress)
        logits = []
        for photo in PHOTOS.values():
            batch = mllama.prepare(load_image(photo(tmp_path))[0], CPU_SIZE, device)
            batch.pop("tiles")
            logits.append(mllama.answer(model, batch, 0, progress, "").logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3 and (logits[1] - logits[2]).abs().max() > 1e-3


ODD = {
    "greyscale": lambda: data.camera(),
    "16-bit greyscale": lambda: data.camera().astype(np.uint16) * 257,
    "with alpha": lambda: np.dstack([data.astronaut(), np.full((512, 512), 128, np.uint8)]),
    "1 x 5000": lambda: np.zeros((5000, 1, 3), np.uint8),
    "5000 x 1": lambda: np.zeros((1, 5000, 3), np.uint8),
    "one pixel": lambda: np.zeros((1, 1, 3), np.uint8),
    "black and white": lambda: data.camera() > 100,
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_work(kind, tmp_path):
    import torch

    from fastfuse.demo import CPU_SIZE, deep_fusion, load_image, mllama

    image, _ = load_image(save(tmp_path, "image.png", ODD[kind]()))
    assert image.mode == "RGB"
    batch = mllama.prepare(image, CPU_SIZE, torch.device("cpu"))
    assert batch["pixel_values"].shape == (1, 1, 4, 3, 224, 224) and batch["pixel_values"].isfinite().all()
    batch, ratio = deep_fusion.prepare(image, CPU_SIZE, torch.device("cpu"))
    tiles = batch["encoder_input"]["images"]
    assert tiles.shape == (1, 1, 4, 3, 224, 224) and tiles.isfinite().all()
    assert 1 <= ratio[0] * ratio[1] <= 4 and batch["encoder_mask"].sum() == 14 * ratio[0] * ratio[1] * 257


def test_sixteen_bits_are_not_clipped(tmp_path):
    from fastfuse.demo import load_image

    grey = np.asarray(load_image(save(tmp_path, "grey.png", data.camera().astype(np.uint16) * 257))[0])[..., 0]
    assert np.abs(grey.astype(int) - data.camera().astype(int)).max() <= 1


def test_transparent_is_white(tmp_path):
    from fastfuse.demo import load_image

    clear = np.zeros((8, 8, 4), np.uint8)
    assert np.asarray(load_image(save(tmp_path, "clear.png", clear))[0]).min() == 255


def test_a_photo_is_turned_upright(tmp_path):
    from fastfuse.demo import load_image

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its first row is the right side
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
    image, _ = load_image(save(tmp_path, "turned.png", rows, exif=exif))
    assert np.asarray(image)[..., 0].tolist() == np.rot90(rows, -1).tolist() == [[3, 0], [4, 1], [5, 2]]


def wrong_images(folder: Path) -> dict[str, str]:
    (folder / "text.png").write_text("not an image")
    (folder / "empty.png").touch()
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(folder / "floats.tiff")
    whole = Path(save(folder, "whole.jpg", data.coffee())).read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    return {
        str(folder / "missing.png"): "no such file",
        str(folder / "text.png"): "not an image that Pillow can read",
        str(folder / "empty.png"): "not an image that Pillow can read",
        str(folder / "cut.jpg"): "cannot be read: image file is truncated",
        str(folder / "floats.tiff"): "Input image has mode F and values from 0 to 1: scale them to 0..255",
        str(folder): "cannot be read: Is a directory",
    }


def test_wrong_images_are_one_line(tmp_path, capsys):
    for path, message in wrong_images(tmp_path).items():
        assert main(["demo", "--image", path]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"fastfuse demo: --image {path}: {message}") and err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["demo", "--image", str(tmp_path / "pipe")]) == 1
    assert "not a regular file" in capsys.readouterr().err


def run(*args: str, **env: str) -> subprocess.CompletedProcess:
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env={**base, **env}, capture_output=True, text=True)


def test_command_line():
    done = run("-m", "fastfuse", "demo", "--tokens", "0")
    assert done.returncode == 2 and "'0' is not a whole number from 1" in done.stderr
    done = run("-m", "fastfuse", "info")
    assert done.returncode == 0 and f"fastfuse {fastfuse.__version__}" in done.stdout
    assert "nf4_linear" in done.stdout and "sm_90" in done.stdout and done.stderr == ""
    done = run("-m", "fastfuse", "hosts")
    assert done.returncode == 0 and "`LoRALinear`" in done.stdout and done.stderr == ""


@pytest.mark.parametrize("arch", ["mllama", "fastfuse"])
def test_the_first_screen_is_the_demos_own(arch):
    """Nothing of what other libraries say while they load: of CUDA libraries a CPU lacks, optional kernels, names of theirs that change."""
    done = run("-m", "fastfuse", "demo", "--tokens", "1", "--arch", arch)
    assert done.returncode == 0 and done.stderr == ""
    assert re.fullmatch(r"photo +scikit-image's astronaut, 512 x 512, 4 tiles of .*", done.stdout.splitlines()[0])


def test_a_wrong_image_is_one_line_on_a_fresh_screen():
    done = run("-m", "fastfuse", "demo", "--image", "README.md")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "fastfuse demo: --image README.md: not an image that Pillow can read\n"


def test_imports_are_quieted_narrowly(caplog, recwarn):
    for name, message in STARTUP.items():
        logger = logging.getLogger(name)
        with quiet_startup():
            logger.warning(f"{message} and more")
            logger.warning("about the user's own call")
            logger.error("another failure")
            logging.getLogger("someone.else").warning(f"{message} and more")
            warnings.warn("an old name", DeprecationWarning, stacklevel=1)
            warnings.warn("about the user's own call", UserWarning, stacklevel=1)
        logger.warning(f"{message} afterwards")
        warnings.warn("afterwards", DeprecationWarning, stacklevel=1)
        said = [record.getMessage() for record in caplog.records]
        assert said == ["about the user's own call", "another failure", f"{message} and more", f"{message} afterwards"]
        assert [str(w.message) for w in recwarn.list] == ["about the user's own call", "afterwards"]
        assert logger.level == logging.NOTSET and not logger.filters
        caplog.clear()
        recwarn.clear()


def test_importing_fastfuse_leaves_logging_and_warnings_alone():
    code = """
import logging, warnings
import torch._dynamo, triton  # which brings a filter of sympy's
def state():
    loggers = {name: logger for name, logger in logging.root.manager.loggerDict.items() if isinstance(logger, logging.Logger)}
    theirs = {name: (l.level, l.filters[:], l.handlers[:]) for name, l in loggers.items() if not name.startswith("fastfuse")}
    return warnings.filters[:], logging.root.level, logging.root.handlers[:], theirs
before = state()
import fastfuse, fastfuse._quiet, fastfuse.modules.peft, fastfuse.models.llama3_2_vision, fastfuse.data, fastfuse.checkpoints, fastfuse.generation
after = state()
print(before[:3] == after[:3], all(after[3][name] == found for name, found in before[3].items()), not any(f for _, f, _ in after[3].values()))
"""
    done = run("-c", code)
    assert done.stdout == "True True True\n" and done.stderr == "", done


@pytest.mark.skipif(_gpu(), reason="the interpreter is for machines without a GPU")
@pytest.mark.parametrize("arch", ["mllama", "fastfuse"])
def test_interpret_runs_the_kernels(arch):
    done = run("-m", "fastfuse", "demo", "--interpret", "--tokens", "1", "--arch", arch)
    assert done.returncode == 0, done.stderr
    apart = re.search(r"14 modules of the first decoder layer as Triton kernels: logits ([\d.e+-]+) apart", done.stdout)
    assert apart and 0 < float(apart.group(1)) < 1e-4
    assert done.stderr == ""


def test_works_without_triton():
    """Triton ships for Linux alone: elsewhere the references serve."""
    code = """
import sys
sys.modules["triton"] = None
sys.path.insert(0, "tests")
import torch, fastfuse
from weights import quantize
from fastfuse.ops import nf4_linear
w = quantize(torch.randn(64, 64), "nested")
x = torch.randn(3, 64, requires_grad=True)
nf4_linear(x, w).sum().backward()
assert x.grad.shape == (3, 64)
try:
    with fastfuse.backend("triton"):
        nf4_linear(x, w)
except fastfuse.Unsupported as e:
    print(e)
"""
    done = run("-c", code)
    assert done.stdout == "nf4_linear: backend 'triton' needs the triton package, which is not installed\n", done.stderr


@pytest.mark.parametrize(
    "absent, arch",
    [("bitsandbytes", "mllama"), ("peft", "mllama"), ("transformers", "mllama"), ("skimage", "mllama"), ("PIL", "mllama"), ("rich.console", "fastfuse")],
)
def test_an_extra_that_is_only_half_there(absent, arch):
    code = f"import sys; sys.modules[{absent!r}] = None; from fastfuse.__main__ import main; sys.exit(main(['demo', '--tokens', '1', '--arch', {arch!r}]))"
    done = run("-c", code)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", f"fastfuse demo: needs {absent}: pip install 'fastfuse[demo]'\n")


def test_a_library_that_is_too_old_for_the_demo():
    code = "import sys, types; sys.modules['peft'] = types.ModuleType('peft'); from fastfuse.__main__ import main; sys.exit(main(['demo']))"
    done = run("-c", code)
    assert done.returncode == 1 and done.stdout == ""
    assert re.fullmatch(r"fastfuse demo: cannot import name 'LoraConfig' from 'peft' .*: pip install 'fastfuse\[demo\]'\n", done.stderr), done.stderr


def test_triton_on_a_cpu_needs_the_interpreter():
    code = """
import sys
sys.path.insert(0, "tests")
import torch, fastfuse
from weights import quantize
try:
    fastfuse.patch(torch.nn.Sequential(torch.nn.Linear(4, 4)), backend="triton")
    with fastfuse.backend("triton"):
        fastfuse.ops.nf4_linear(torch.randn(1, 64), quantize(torch.randn(64, 64), "flat"))
except fastfuse.Unsupported as e:
    print(e)
"""
    done = run("-c", code, PYTHONWARNINGS="ignore")
    assert "backend 'triton' on a cpu tensor needs TRITON_INTERPRET=1" in done.stdout, done.stderr
