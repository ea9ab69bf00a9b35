"""``make setup DEVICE=``: which wheels of Paddle an environment has, by an index of small fakes."""

import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from common.devices import KINDS
from common.errors import UserError
from scripts import setup_device
from scripts.setup_device import check, commands, constraints, kind_for, requirements

PINS = (setup_device.ROOT / "constraints.txt").read_text("utf-8")
LINES = (setup_device.ROOT / "requirements.txt").read_text("utf-8")
DRIVER = """
import sys, pathlib
sys.path.insert(0, {repo!r})
from scripts import setup_device
setup_device.ROOT = pathlib.Path({root!r})
setup_device.main()
"""


@pytest.mark.parametrize("device", KINDS)
def test_what_a_kind_asks_pip_for(device):
    kind = kind_for(device, None)
    *_, (word, wheel, flag, index, *_) = commands(kind, None, [])
    assert (word, flag) == ("install", "-i") and wheel.startswith(kind.wheel)
    assert index == f"https://www.paddlepaddle.org.cn/packages/stable/{kind.folder}/"
    pinned = re.findall(r"^(paddle\S*)==", constraints(kind, PINS), flags=re.M)
    own = ["paddlepaddle", kind.wheel] if kind.is_plugin else [kind.wheel]
    assert pinned == ["paddle2onnx", "paddlefsl", "paddlenlp", *own]
    assert ("\npaddlepaddle " in requirements(kind, LINES)) == kind.is_plugin


def test_cuda_is_a_folder_of_the_index():
    *_, step = commands(kind_for("gpu", "129"), None, ["paddlepaddle"])
    assert step[3].endswith("/cu129/")
    assert commands(None, None, []) == [commands(kind_for("gpu", None), None, [])[0]]
    assert commands(kind_for("gpu", None), None, ["paddlepaddle"])[0][2:] == ["paddlepaddle"]


@pytest.mark.parametrize(
    ("device", "cuda", "said"),
    [
        ("tpu", None, "DEVICE=tpu is not one of cpu, gpu, dcu, xpu, npu"),
        ("gpu", "128", "CUDA=128 is not one of 118, 126, 129, 130"),
        ("npu", "126", "CUDA=126 is of GPUs, and DEVICE=npu; drop CUDA"),
    ],
)
def test_what_there_is_no_wheel_for_is_refused(device, cuda, said):
    with pytest.raises(UserError, match=said):
        check(device, cuda)


def publish(index: Path, name: str, version: str) -> None:
    """Put a wheel without contents into an index, which is a folder."""
    stem = f"{name.replace('-', '_')}-{version}"
    folder = index / name
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        info = f"{stem}.dist-info"
        wheel.writestr(
            f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        )
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    links = "".join(f'<a href="{file.name}">{file.name}</a>\n' for file in folder.glob("*.whl"))
    (folder / "index.html").write_text(f"<!DOCTYPE html>\n{links}", encoding="utf-8")


@pytest.fixture
def environment(tmp_path, repo):
    """``environment(*words)``: run the script in a new environment; what it says, what is there."""
    publish(tmp_path / "pypi", "other", "1.0")
    publish(tmp_path / "paddle", "paddlepaddle-gpu", "3.3.1")
    (tmp_path / "requirements.txt").write_text("paddlepaddle  # tensors\nother\n", "utf-8")
    (tmp_path / "constraints.txt").write_text("other==1.0\npaddlepaddle==3.3.1\n", "utf-8")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (site,) = (tmp_path / "venv").glob("lib/python*/site-packages")
    pip = importlib.util.find_spec("pip").origin
    (site / "pip").symlink_to(Path(pip).parent)
    installed = site / "paddlepaddle-3.3.1.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Name: paddlepaddle\nVersion: 3.3.1\n", "utf-8")
    (installed / "RECORD").write_text(f"{installed.name}/METADATA,,\n{installed.name}/RECORD,,\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": f"file://{tmp_path / 'pypi'}"}

    def run(*words):
        driver = DRIVER.format(repo=str(repo), root=str(tmp_path))
        index = ["--index", f"file://{tmp_path / 'paddle'}"]
        done = subprocess.run(
            [tmp_path / "venv/bin/python", "-c", driver, *words, *index, "--quiet"],
            env=clean | settings,
            capture_output=True,
            text=True,
            check=False,
        )
        found = sorted(
            folder.name.removesuffix(".dist-info") for folder in site.glob("*.dist-info")
        )
        return done.returncode, done.stdout + done.stderr, found

    return run


def test_no_wheel_of_another_device_is_left(environment):
    """From an environment for CPUs to one for GPUs: what was installed, and what is remembered."""
    gpu = ["other-1.0", "paddlepaddle_gpu-3.3.1"]
    assert environment("--device", "gpu", "--cuda", "126")[::2] == (0, gpu)
    _, said, _ = environment("--dry_run")
    assert "uninstall" not in said and "pip install paddlepaddle-gpu==3.3.1 -i file://" in said
    _, said, _ = environment("--device", "npu", "--dry_run")
    assert said.startswith("pip uninstall --yes paddlepaddle-gpu\n")
