"""Processes, devices and lines."""

import io

import pytest
import torch
from torch import nn

from fambav.engine.console import Console
from fambav.engine.distributed import Processes, processes
from fambav.engine.precision import Precision, determinism_settings

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


def test_without_a_launcher_there_is_one_process(alone):
    with processes("cpu") as group:
        assert (group.rank, group.world, group.device, group.main) == (0, 1, CPU, True)
        model, sums = nn.Linear(1, 1), torch.ones(2)
        assert group.wrap(model) is model
        assert group.total(sums) is sums
        group.wait()
    assert not torch.distributed.is_initialized()


def test_a_launcher_of_one_process_needs_no_group(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    with processes("cpu") as group:
        assert (group.rank, group.world) == (0, 1)


def test_a_launcher_that_says_nonsense_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'two' in the environment"), processes(None):
        pass


def test_only_the_first_process_is_the_main_one():
    assert [Processes(rank, 3, CPU).main for rank in range(3)] == [True, False, False]


def test_a_gpu_that_is_not_there_is_refused(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ValueError, match=r"device is cuda:0, expected cpu: .* --device cpu"):
        processes("cuda").__enter__()
    with processes(None) as group:
        assert group.device == CPU


def test_more_processes_than_gpus_are_refused(alone, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ValueError, match="device is cuda:2, expected a device below 2"):
        processes(None).__enter__()


def test_numerics_are_put_back():
    before = torch.get_float32_matmul_precision(), torch.are_deterministic_algorithms_enabled()
    threads = torch.get_num_threads()
    torch.use_deterministic_algorithms(mode=False)
    try:
        with determinism_settings(deterministic=True, matmul_precision="medium", threads=3):
            assert torch.get_num_threads() == 3
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.get_float32_matmul_precision() == "medium"
        assert not torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(mode=before[1])
    assert torch.get_float32_matmul_precision() == before[0]
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("dtype", "name", "scales"),
    [
        (None, "float32", False),
        (torch.bfloat16, "bfloat16", False),
        (torch.float16, "float16", True),
    ],
)
def test_only_fp16_scales_the_loss(dtype, name, scales):
    precision = Precision(CPU, dtype)
    assert precision.name == name
    assert precision.scaler.is_enabled() is scales
    with precision.autocast():
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == (dtype or torch.float32)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_a_silent_console_writes_nothing(monkeypatch, stream):
    out = stream()
    monkeypatch.setattr("sys.stdout", out)
    console = Console(silent=True)
    console.write("a")
    console.step("b", 1, 2, "c")
    assert out.getvalue() == ""


def test_off_a_terminal_steps_are_plain_lines(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr("sys.stdout", out)
    console = Console()
    console.step("Epoch: [0]", 10, 44, "loss 1.0")
    console.write("done")
    assert out.getvalue() == "Epoch: [0] [10/44] loss 1.0\ndone\n"


def test_on_a_terminal_steps_are_a_bar_that_lines_replace(monkeypatch):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    console = Console()
    console.step("Epoch: [0]", 10, 44, "loss 1.0")
    assert "10/44" in out.getvalue()
    assert "\n" not in out.getvalue()
    console.write("done")
    assert out.getvalue().endswith("done\n")


def test_on_a_terminal_the_last_step_leaves_its_line(monkeypatch):
    out = Terminal()
    monkeypatch.setattr("sys.stdout", out)
    console = Console()
    for done in (43, 44):
        console.step("Epoch: [0]", done, 44, "loss 1.0  lr 0.001")
    assert out.getvalue().endswith("Epoch: [0] [44/44] loss 1.0  lr 0.001\n")
