"""What a launcher states in the environment of each process that it starts.

`torchrun` and `python -m torch.distributed.launch --use_env` set RANK, WORLD_SIZE, LOCAL_RANK,
MASTER_ADDR and MASTER_PORT.  Torch-free, so that the command line knows which process prints.
"""

from __future__ import annotations

import re
import reprlib
import socket
from collections.abc import Mapping
from typing import NamedTuple

_PORTS = 2**16


class LauncherError(ValueError):
    """A variable of a launcher is missing or wrong.  Every process that has it prints the error."""


class Place(NamedTuple):
    """A process among those that train one model together.

    Attributes:
        rank: Number of the process, 0 <= rank < world.
        world: Number of processes.
        local_rank: Number of the process among those of its machine.
    """

    rank: int
    world: int
    local_rank: int


def place(environment: Mapping[str, str]) -> Place:
    """Return the place of this process; without a launcher it is the only one.

    Raises:
        LauncherError: If the variables are malformed, or contradict each other.
    """
    rank, world = _whole(environment, "RANK", 0), _whole(environment, "WORLD_SIZE", 1)
    local_rank = _whole(environment, "LOCAL_RANK", 0)
    if world < 1:
        raise LauncherError(f"WORLD_SIZE is {world} in the environment, expected at least 1")
    if "RANK" not in environment and world > 1:
        raise LauncherError(f"RANK is missing in the environment, where WORLD_SIZE is {world}")
    if "WORLD_SIZE" not in environment and rank > 0:
        raise LauncherError(f"WORLD_SIZE is missing in the environment, where RANK is {rank}")
    if rank >= world:
        raise LauncherError(
            f"RANK is {rank} in the environment, expected less than WORLD_SIZE, {world}"
        )
    return Place(rank, world, local_rank)


def may_be_first(environment: Mapping[str, str]) -> bool:
    """Whether this is the one process of a launched run that prints; also where nobody can tell."""
    try:
        return place(environment).rank == 0
    except LauncherError:
        return True


def notes(environment: Mapping[str, str]) -> list[str]:
    """Return a warning where SLURM has started several tasks that do not know of each other."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if "RANK" in environment or tasks in ("", "1") or environment.get("SLURM_PROCID", "0") != "0":
        return []
    return [
        f"warning: SLURM_NTASKS is {tasks} and RANK is not set, so every task trains by itself;"
        " start one torchrun per node, as scripts/slurm/train.sbatch does"
    ]


def rendezvous_address(environment: Mapping[str, str]) -> tuple[str, int]:
    """Return the host and the port where the processes meet.

    Raises:
        LauncherError: If one of them is missing or cannot be, or the host is unknown.
    """
    host, port = environment.get("MASTER_ADDR", ""), _whole(environment, "MASTER_PORT", None)
    if not 0 < port < _PORTS:
        raise LauncherError(f"MASTER_PORT is {port} in the environment, expected 1 to {_PORTS - 1}")
    if not host:
        raise LauncherError("MASTER_ADDR is missing in the environment, expected a host")
    try:
        socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise LauncherError(
            f"MASTER_ADDR is {reprlib.repr(host)} in the environment, expected a host; {reason}"
        ) from None
    return host, port


def _whole(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name)
    if text is None:
        if default is None:
            raise LauncherError(f"{name} is missing in the environment, expected a whole number")
        return default
    if not re.fullmatch("[0-9]{1,9}", text):
        raise LauncherError(
            f"{name} is {reprlib.repr(text)} in the environment, expected a whole number"
        )
    return int(text)
