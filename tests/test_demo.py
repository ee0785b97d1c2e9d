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
import torch
from PIL import ExifTags, Image
from rich.progress import Progress
from skimage import data

import fastfuse
from fastfuse.__main__ import main
from fastfuse._quiet import STARTUP, quiet_startup
from fastfuse.demo import CPU_SIZE, deep_fusion, load_image, mllama
from fastfuse.demo.show import calls_per_token

ROOT = Path(__file__).parents[1]


def save(folder, name, array, **options):
    path = folder / name
    Image.fromarray(array).save(path, **options)
    return str(path)


PHOTOS = {
    "astronaut": lambda folder: None,  # the default
    "coffee": lambda folder: save(folder, "coffee.jpg", data.coffee()),
    "cat": lambda folder: save(folder, "cat.png", data.chelsea()),
}


def run(*args, **env):
    base = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, *args], cwd=ROOT, env={**base, **env}, capture_output=True, text=True)


@pytest.mark.parametrize("arch, photo, fused", [
    ("mllama", "astronaut", r"nf4_lora_linear +patched +46"),
    ("fastfuse", "coffee", "nf4_lora_linear in 46 LoRALinear"),
])  # fmt: skip
def test_a_photo_gives_equal_tokens_and_the_model_comes_back(arch, photo, fused, tmp_path):
    """And the first screen is the demo's own, with nothing of what other libraries say while they load: of CUDA libraries a CPU lacks,
    optional kernels, names of theirs that change. Without a GPU the interpreter runs the kernels too."""
    path, on_gpu = PHOTOS[photo](tmp_path), torch.cuda.is_available()
    options = [*(["--image", path] if path else []), *([] if on_gpu else ["--interpret"])]
    done = run("-m", "fastfuse", "demo", "--tokens", "6", "--arch", arch, *options)
    out = done.stdout
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert re.match(r"photo +(scikit-image's astronaut, 512 x 512|.*coffee.jpg, 600 x 400), 4 tiles of ", out)
    (_, before), (_, after) = re.findall(r"(before|after ) +\[([\d, ]+)\]", out)
    assert len(before.split(",")) == len(after.split(",")) == 6
    assert "logits equal to the bit again" in out and "fallbacks" not in out and re.search(fused, out)
    predicted, measured = re.search(r"predicted ([\d.]+) MiB of weights, measured ([\d.]+) MiB", out).groups()
    assert float(predicted) == pytest.approx(float(measured), rel=0.02)
    calls = re.search(r"^Python +a token costs (\d+) calls before, (\d+) after$", out, re.M).groups()
    assert min(map(int, calls)) > 1000
    if not on_gpu:  # there the model has other widths, and bf16 may turn a close choice: the margin is printed
        assert before == after and "equal, all 6" in out and re.search(r"backend +PyTorch(, NF4 in C \(\w+\))?: no GPU found", out)
        apart = re.search(r"14 modules of the first decoder layer as Triton kernels: logits ([\d.e+-]+) apart", out)
        assert apart and 0 < float(apart[1]) < 1e-4


def test_calls_are_counted_exactly():
    def generate(n):
        for _ in range(n):  # in each turn one call of a Python function and one of a function written in C
            one()

    def one():
        abs(-1)

    before = sys.getprofile()
    assert calls_per_token(generate) == 2 and sys.getprofile() is before
    with pytest.raises(ZeroDivisionError):
        calls_per_token(lambda n: 1 / 0)
    assert sys.getprofile() is before


def test_photos_reach_the_answer(tmp_path):
    """Two photos give different logits: the comparison is not between two models that ignore their input."""
    device = torch.device("cpu")
    with Progress(disable=True) as progress:
        torch.manual_seed(0)
        model = mllama.build(CPU_SIZE, device, progress)
        logits = []
        for photo in (PHOTOS["coffee"], PHOTOS["cat"]):
            batch = mllama.prepare(load_image(photo(tmp_path))[0], CPU_SIZE, device)
            batch.pop("tiles")
            logits.append(mllama.answer(model, batch, 0, progress, "").logits)
    assert (logits[0] - logits[1]).abs().max() > 1e-3


ODD = {
    "greyscale": lambda: data.camera(),
    "1 x 5000": lambda: np.zeros((5000, 1, 3), np.uint8),
    "one pixel": lambda: np.zeros((1, 1, 3), np.uint8),
}


@pytest.mark.parametrize("kind", ODD)
def test_odd_images_work(kind, tmp_path):
    image, _ = load_image(save(tmp_path, "image.png", ODD[kind]()))
    assert image.mode == "RGB"
    batch = mllama.prepare(image, CPU_SIZE, torch.device("cpu"))
    assert batch["pixel_values"].shape == (1, 1, 4, 3, 224, 224) and batch["pixel_values"].isfinite().all()
    batch, ratio = deep_fusion.prepare(image, CPU_SIZE, torch.device("cpu"))
    tiles = batch["encoder_input"]["images"]
    assert tiles.shape == (1, 1, 4, 3, 224, 224) and tiles.isfinite().all()
    assert 1 <= ratio[0] * ratio[1] <= 4 and batch["encoder_mask"].sum() == 14 * ratio[0] * ratio[1] * 257


def test_pictures_are_read_as_they_are_seen(tmp_path):
    """As test_data_images.py says, so that 16 bits are not clipped, and a photo is turned upright."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6  # its first row is the right side
    rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for name, array, want, options in (
        ("grey.png", data.camera().astype(np.uint16) * 257, data.camera(), {}),
        ("turned.png", rows, [[3, 0], [4, 1], [5, 2]], {"exif": exif}),
    ):
        seen = np.asarray(load_image(save(tmp_path, name, array, **options))[0])[..., 0]
        assert np.abs(seen.astype(int) - want).max() <= (name == "grey.png")


def test_wrong_images_are_one_line(tmp_path, capsys):
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").touch()
    Image.fromarray(np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)).save(tmp_path / "floats.tiff")
    whole = Path(save(tmp_path, "whole.jpg", data.coffee())).read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    for name, message in {
        "missing.png": "no such file",
        "text.png": "not an image that Pillow can read",
        "empty.png": "not an image that Pillow can read",
        "cut.jpg": "cannot be read: image file is truncated",
        "floats.tiff": "Input image has mode F and values from 0 to 1: scale them to 0..255",
        "": "cannot be read: Is a directory",
    }.items():
        path = tmp_path / name
        assert main(["demo", "--image", str(path)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and err.startswith(f"fastfuse demo: --image {path}: {message}") and err.count("\n") == 1


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_refused_not_waited_for(tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    assert main(["demo", "--image", str(tmp_path / "pipe")]) == 1
    assert "not a regular file" in capsys.readouterr().err


def test_command_line(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--tokens", "0"])
    assert "'0' is not a whole number from 1" in capsys.readouterr().err
    done = run("-c", "from fastfuse.__main__ import main; assert main(['info']) == main(['hosts']) == 0")
    assert done.returncode == 0 and done.stderr == ""
    assert all(words in done.stdout for words in (f"fastfuse {fastfuse.__version__}", "nf4_linear", "sm_90", "`LoRALinear`"))


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


WITH_A_WEIGHT = """
import sys
sys.modules.update(dict({}))
sys.path.insert(0, "tests")
import torch, fastfuse
from cases.weights import quantize
w, x = quantize(torch.randn(64, 64), "nested"), torch.randn(3, 64, requires_grad=True)
for backend in ("auto", "triton"):
    try:
        with fastfuse.backend(backend):
            fastfuse.ops.nf4_linear(x, w).sum().backward()
            print(*x.grad.shape)
    except fastfuse.Unsupported as e:
        print(e)
"""


def test_works_without_triton():
    """Triton ships for Linux alone: elsewhere the references serve."""
    done = run("-c", WITH_A_WEIGHT.format("triton=None"))
    assert done.stdout == "3 64\nnf4_linear: backend 'triton' needs the triton package, which is not installed\n", done.stderr


def test_triton_on_a_cpu_needs_the_interpreter():
    done = run("-c", WITH_A_WEIGHT.format(""), PYTHONWARNINGS="ignore")
    assert "nf4_linear: backend 'triton' on a cpu tensor needs TRITON_INTERPRET=1" in done.stdout, done.stderr


def test_an_extra_that_is_only_half_there():
    """Absent, or too old for the demo."""
    absent = ["rich.console", "PIL", "skimage", "bitsandbytes", "transformers", "peft"]  # in the order in which they are asked for
    code = f"""
import sys, types
from fastfuse.__main__ import main
for name, found in [*dict.fromkeys({absent}).items(), ("peft", types.ModuleType("peft"))]:
    for imported in [m for m in sys.modules if m.startswith("fastfuse.demo")]:
        del sys.modules[imported]
    held, sys.modules[name] = sys.modules.get(name), found
    assert main(["demo", "--tokens", "1", "--arch", "fastfuse" if name == "rich.console" else "mllama"]) == 1
    if held is None:
        del sys.modules[name]
    else:
        sys.modules[name] = held
"""
    done = run("-c", code)
    *missing, old = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == "", done.stderr
    assert missing == [f"fastfuse demo: needs {name}: pip install 'fastfuse[demo]'" for name in absent]
    assert re.fullmatch(r"fastfuse demo: cannot import name 'LoraConfig' from 'peft' .*: pip install 'fastfuse\[demo\]'", old)
