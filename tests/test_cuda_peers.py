"""The script that builds the packages we are compared with: how it edits and what it refuses."""

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETUP = """
cc_flag = []
cc_flag.append("-gencode")
cc_flag.append("arch=compute_75,code=sm_75")
if cc_flag:
    cc_flag.append("-gencode")
    cc_flag.append("arch=compute_90,code=sm_90")
"""


@pytest.fixture
def build(tmp_path):
    """Calls the script, where nvcc is an empty program."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/nvcc").write_text("#!/bin/sh\n")
    (tmp_path / "bin/nvcc").chmod(0o755)
    path = os.pathsep.join([str(tmp_path / "bin"), os.environ["PATH"]])

    def call(*words, **settings):
        return subprocess.run(
            ["bash", ROOT / "scripts/build_cuda_peers.sh", *words],
            capture_output=True,
            text=True,
            env=dict(os.environ, PATH=path, TMPDIR=str(tmp_path), CUDA_ARCH="90") | settings,
            cwd=tmp_path,
        )

    return call


def pack(folder, package, setup=SETUP):
    source = folder / package
    source.mkdir(parents=True)
    (source / "setup.py").write_text(setup)
    with tarfile.open(folder / f"{package}-1.0.tar.gz", "w:gz") as archive:
        archive.add(source, f"{package}-1.0")


@pytest.fixture
def sdists(tmp_path):
    for package in ("mamba_ssm", "causal_conv1d"):
        pack(tmp_path / "sdists", package)
    return "sdists"


def test_a_dry_run_edits_a_scratch_copy_and_shows_what_would_run(build, sdists, tmp_path):
    done = build("--dry-run", sdists, "out")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "mamba_ssm: 2 architectures in setup.py become sm_90"
    assert lines[1] == "causal_conv1d: 2 architectures in setup.py become sm_90"
    for line, package in zip(lines[2:4], ["mamba_ssm", "causal_conv1d"], strict=True):
        assert "pip wheel --no-index --no-deps --no-build-isolation" in line
        assert line.endswith(f"SCRATCH/{package} &")
    assert f"--target {tmp_path}/out SCRATCH/wheels/*.whl" in lines[4]
    assert (tmp_path / "sdists/mamba_ssm/setup.py").read_text() == SETUP
    assert {path.name for path in tmp_path.iterdir()} == {"bin", "sdists"}


def test_the_edited_file_names_one_architecture(build, sdists, tmp_path):
    (tmp_path / "python").write_text('#!/bin/sh\n[ "$2" = py_compile ] && cat "$3"\n')
    (tmp_path / "python").chmod(0o755)
    done = build("--dry-run", sdists, "out", CUDA_ARCH="100", PYTHON=str(tmp_path / "python"))
    shown = {}
    exec(done.stdout.split("mamba_ssm: ")[0], shown)
    assert shown["cc_flag"] == ["-gencode", "arch=compute_100,code=sm_100"]


@pytest.mark.parametrize(
    ("words", "settings", "message"),
    [
        ([], {}, "arguments are missing, expected [--dry-run] SDIST_DIR OUT_DIR"),
        (["no", "out"], {}, "SDIST_DIR is no, expected a folder that exists"),
        (["bin", "out"], {}, "expected one mamba_ssm-*.tar.gz in it"),
        (["sdists", "out"], {"CUDA_ARCH": "sm_90"}, "CUDA_ARCH is sm_90, expected a number"),
        (["sdists", "out"], {"PYTHON": "no-such"}, "PYTHON is no-such, expected an interpreter"),
        (["sdists", "out"], {}, "build failed of mamba_ssm causal_conv1d, expected wheels; see"),
    ],
    ids=str,
)
def test_what_cannot_be_built_is_one_line(build, sdists, words, settings, message):
    done = build(*words, **settings)
    assert done.returncode == 2
    *_, last = done.stderr.splitlines()
    assert last.startswith("error: ")
    assert message in last


def test_a_setup_without_architectures_is_refused(build, tmp_path):
    for package in ("mamba_ssm", "causal_conv1d"):
        pack(tmp_path / "sdists", package, setup="cc_flag = []\n")
    done = build("sdists", "out")
    assert done.returncode == 2
    assert "names no architecture, expected lines cc_flag.append" in done.stderr
