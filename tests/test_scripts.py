"""The scripts of the paper's table 1 and of SLURM, under launchers and schedulers that are made."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fambav.config import load, parse
from fambav.engine import checkpoint
from tests.data.made import made_cifar
from tests.made import go
from tests.trust.forked import run_two

ROOT = Path(__file__).resolve().parents[1]
ROWS = sorted((ROOT / "scripts/cifar100").glob("*.sh"))
BATCH_FILES = sorted((ROOT / "scripts/slurm").glob("*.sbatch"))
REMOVED = dict(none=0, all=168, interleaved=168, lower=171, upper=171)
FAKES = {
    # A scheduler of as many nodes as the job has, all of them here.
    "srun": """
        while [[ $1 == --* ]]; do shift; done
        for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do
            SLURM_NODEID=$n SLURM_PROCID=$n "$@" & echo $! >>"$FAKE/tasks"
        done
        status=0
        for ((n = 0; n < SLURM_JOB_NUM_NODES; n++)); do
            wait -n || { status=${failed:=$?}; kill $(cat "$FAKE/tasks"); }
        done 2>/dev/null
        exit $status""",
    "scancel": 'echo "$*" >>"$FAKE/scancel"; kill $(cat "$FAKE/tasks")',
    "scontrol": '[ "$1" = show ] && echo localhost || echo "$*" >>"$FAKE/scontrol"',
    # A run that says what it was started with, and ends by SIGTERM or with status $CODE.
    "torchrun": """
        echo "${SLURM_NODEID:--} $*" >>"$FAKE/runs"
        trap 'echo saved >>"$FAKE/runs"; exit 143' TERM
        while [ -z "${CODE:-}" ]; do sleep 0.05; done
        nodes=${SLURM_NODEID:+$SLURM_JOB_NUM_NODES} # each of them has started before one ends
        while [ "$(wc -l <"$FAKE/runs")" -lt "${nodes:-1}" ]; do sleep 0.05; done
        exit "$CODE\"""",
}
FAKES["python"] = FAKES["torchrun"]


@pytest.fixture
def fake(tmp_path):
    """Return a function that starts a script, where some programs are the fake ones."""
    started = []

    def start(script, *words, fakes=("srun", "scancel", "scontrol", "torchrun"), **variables):
        for name in fakes:
            program = tmp_path / "bin" / name
            program.parent.mkdir(exist_ok=True)
            program.write_text(f"#!/usr/bin/env bash\n{FAKES[name]}\n")
            program.chmod(0o755)
        paths = [str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]]
        own = dict(FAKE=str(tmp_path), PATH=":".join(paths), PYTHONPATH=str(ROOT))
        job = dict(SLURM_JOB_ID="7", SLURM_JOB_NUM_NODES="2", SLURM_JOB_NODELIST="n[1-2]")
        process = subprocess.Popen(
            ["bash", str(script), *map(str, words)],
            cwd=ROOT,
            env={**os.environ, **own, **job, "OMP_NUM_THREADS": "1", **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with process:
            process.kill()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()


def text(path):
    return path.read_text() if path.exists() else ""


@pytest.mark.parametrize("script", [*ROWS, *BATCH_FILES], ids=lambda path: path.name)
def test_a_script_is_well_formed_and_claims_no_measurement(script):
    subprocess.run(["bash", "-n", script], check=True)
    assert "GPU hours: not yet measured." in script.read_text()


def test_every_row_of_table_1_has_its_script():
    wanted = {f"{model}_{row}" for model in ("vim_tiny", "vim_small") for row in REMOVED}
    assert {path.stem for path in ROWS} == wanted


@pytest.mark.parametrize("gpus", [1, 4])
@pytest.mark.parametrize("script", ROWS, ids=lambda path: path.stem)
def test_a_row_is_the_run_of_its_config_on_any_number_of_gpus(script, gpus, fake, tmp_path):
    process = fake(script, "--seed", "3", CODE="0", GPUS=str(gpus))
    assert process.communicate()[0] == ""
    assert process.returncode == 0
    _, *words = text(tmp_path / "runs").split()
    place = words.index("main.py")
    assert words[:place] == ["--standalone", "--nproc-per-node", str(gpus)]
    config = ROOT / f"configs/cifar100/{script.stem.removesuffix('_none')}.yaml"
    told = re.search(r"nproc-per-node=(\d+) main.py .* -b (\d+)\n", config.read_text())
    assert int(told[1]) * int(told[2]) == 128, "one recipe: 128 images in an update"
    expected = load(config).replace(batch_size=128 // gpus, seed=3)
    assert parse(words[place + 1 :]).flat() == expected.flat()


def test_a_row_on_gpus_that_do_not_share_an_update_evenly_is_refused(fake, tmp_path):
    process = fake(ROWS[0], CODE="0", GPUS="3")
    assert process.communicate()[0] == "error: GPUS is 3, expected a divisor of 128\n"
    assert (process.returncode, text(tmp_path / "runs")) == (2, "")


@pytest.mark.parametrize("script", ROWS, ids=lambda path: path.stem)
def test_a_row_is_shown_by_a_dry_run(script, tmp_path, monkeypatch):
    flags = re.search(r"main\.py (.*)\"\$@\"", script.read_text(), re.DOTALL)[1]
    words = flags.replace("\\\n", " ").replace("$((128 / GPUS))", "128").split()
    monkeypatch.chdir(tmp_path)
    shown = go(*words, "--dry-run")
    assert (shown.status, shown.err) == (0, "")
    removed = REMOVED[script.stem.rpartition("_")[2]]
    assert f"total removed: {removed} of 197 tokens" in shown.out
    assert "images per update: 128 = 128 x 1 " in shown.out
    assert not list(tmp_path.iterdir())


def test_a_job_starts_a_launcher_on_every_node_and_passes_its_status_on(fake, tmp_path):
    process = fake(BATCH_FILES[1], "--epochs", "3", CODE="5", SLURM_GPUS_ON_NODE="4")
    assert process.wait() == 5
    # One that has not ended is ended by the scheduler.
    launched = text(tmp_path / "runs").replace("saved\n", "").splitlines()
    assert {line[0] for line in launched} == {"0", "1"}
    wanted = "--nnodes 2 --nproc-per-node 4 --rdzv-backend c10d --rdzv-endpoint localhost:29500"
    for line in launched:
        assert line[2:] == f"{wanted} --rdzv-id 7 main.py --resume auto --epochs 3"
    assert text(tmp_path / "scontrol") == ""


def test_a_job_near_its_time_limit_saves_and_is_queued_again(fake, tmp_path):
    process = fake(BATCH_FILES[1])
    until(lambda: text(tmp_path / "runs").count("main.py") == 2)
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert text(tmp_path / "scancel") == "--signal=TERM 7\n"
    assert text(tmp_path / "runs").count("saved") == 2
    assert text(tmp_path / "scontrol") == "requeue 7\n"


def test_a_job_of_an_array_trains_its_row_and_is_queued_again(fake, tmp_path):
    given = dict(SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="9", fakes=("python", "scontrol"))
    process = fake(BATCH_FILES[0], "--seed", "1", **given)
    until(lambda: "main.py" in text(tmp_path / "runs"))
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=60) == 0
    assert text(tmp_path / "runs").splitlines() == [
        "- main.py --config configs/cifar100/vim_small_upper.yaml"
        " --output_dir output/table1/vim_small_upper --resume auto --seed 1",
        "saved",
    ]
    assert text(tmp_path / "scontrol") == "requeue 7_9\n"


RECIPE = """--model vim_micro --input-size 16 --data-set CIFAR --num_workers 0 --epochs 4
    --warmup-epochs 1 --opt sgd --lr 0.05 --unscale-lr --mixup 0 --cutmix 0 --no-repeated-aug
    --log_every 1 --fusion-strategy upper --fusion-layer 4 --fusion-token 3"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_on_two_nodes_of_which_one_is_lost_ends_with_the_weights_of_one_process(
    fake, tmp_path
):
    made_cifar(tmp_path, train=40, test=37)
    words = [*RECIPE.split(), "--device", "cpu", "--data-path", tmp_path]
    with socket.create_server(("localhost", 0)) as free:
        port = str(free.getsockname()[1])
    given = dict(fakes=("srun", "scancel", "scontrol"), PORT=port, PYTHONWARNINGS="ignore")
    job = (BATCH_FILES[1], *words, "-b", "4", "--output_dir", tmp_path / "two")
    with fake(*job, **given) as process:
        for line in process.stdout:
            if line.startswith("Epoch: [1]"):
                break
        os.kill(int(text(tmp_path / "tasks").split()[1]), signal.SIGKILL)
        process.stdout.read()
    assert process.returncode != 0
    lost = checkpoint.load(tmp_path / "two/checkpoint.pth")
    assert lost["world"] == 2
    assert 0 < lost["epoch"] + 1 < 4
    again = run_two([*words, "-b", "4", "--resume", "auto"], tmp_path / "two")
    assert again.status == [0, 0], again.out + again.other
    assert again.out.count("going on from") == again.out.count("Training time") == 1
    assert go(*words, "-b", "8", "--output_dir", tmp_path / "one").status == 0
    one, two = (checkpoint.load(tmp_path / f"{n}/checkpoint.pth") for n in ("one", "two"))
    assert two["epoch"] == 3
    for name, weight in one["model"].items():
        torch.testing.assert_close(two["model"][name], weight, rtol=1e-4, atol=1e-6, msg=name)
