"""Runs under torchrun's own agent, over ranks that are forked from one process which has imported everything.

python tests/elastic_runs.py '[{"ranks": 2, "restarts": 1, "argv": [...], "kills": [[RESTART, RANK, MOMENT], ...]}]'
A MOMENT is NAME:N, before the N-th call of a function, or a time in seconds after the rank's start. Then comes SIGKILL,
or after "stop " SIGSTOP, "sleep " a very long sleep, "full " a full disk, "nan " a NaN in the first gradient given.
Prints a line for each run: ended well, or not.
"""

import errno
import json
import math
import os
import shutil
import signal
import sys
import time
from typing import NoReturn, TypedDict

import safetensors.torch
import torch._dynamo
import torch.distributed
import torch.distributed.checkpoint
import torch.distributed.fsdp
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import dpo.checkpoint
import dpo.judge.__main__
import dpo.loop
import dpo.reference
import dpo.train
import models.checkpoint
from models.sharded import own_part

OWNERS = {
    "learning_rate": dpo.loop,
    "clip_gradients": dpo.loop,
    "save": safetensors.torch,
    "rename": os,
    "replace": os,
    "rmtree": shutil,
    "write_part": dpo.reference,
    "save_file": models.checkpoint,
    "all_gather_object": torch.distributed,
}


class Run(TypedDict):
    ranks: int
    restarts: int
    argv: list[str]
    kills: list[tuple[int, int, str]]


def kill(victim: int) -> None:
    os.write(2, f"here comes SIGKILL to {victim}\n".encode())  # torch may name the other rank, which ends for it
    os.kill(victim, signal.SIGKILL)


def fill_disk() -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


DEEDS = {  # of the victim, and of what the call was given
    "": lambda victim, *given: kill(victim),
    "stop": lambda victim, *given: os.kill(victim, signal.SIGSTOP),
    "sleep": lambda victim, *given: time.sleep(1e6),
    "full": lambda victim, *given: fill_disk(),
    "nan": lambda victim, parameters, *given: own_part(parameters[0].grad).values.fill_(math.nan),
}


def come_to_harm(moment: str) -> int | None:
    """Arranges it; the process that waits for a time, if it is one."""
    deed, _, when = moment.rpartition(" ")
    name, _, call = when.partition(":")
    victim = os.getpid()
    if not call:
        if waiting := os.fork():
            return waiting
        time.sleep(float(when))
        if os.getppid() == victim:
            DEEDS[deed](victim)
        os._exit(0)
    real, calls = OWNERS[name].__dict__[name], []

    def counting(*given: object, **named: object) -> object:
        calls.append(name)
        if len(calls) == int(call):
            DEEDS[deed](victim, *given)
        return real(*given, **named)

    setattr(OWNERS[name], name, counting)
    return None


def one_rank(argv: list[str], kills: list[tuple[int, int, str]]) -> None:
    here = int(os.environ["TORCHELASTIC_RESTART_COUNT"]), int(os.environ["RANK"])
    waiting = [come_to_harm(moment) for restart, rank, moment in kills if (restart, rank) == here]
    code = dpo.judge.__main__.main(argv[1:]) if argv[0] == "dpo.judge" else dpo.train.main(argv)
    if code:
        os._exit(code)
    for process in filter(None, waiting):  # for a rank killed while it waits to return torch waits for ever
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


if __name__ == "__main__":
    for run in json.loads(sys.argv[1]):
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=run["ranks"],
            max_restarts=run["restarts"],
            start_method="fork",
            monitor_interval=0.02,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id="test",
        )
        try:
            elastic_launch(config, one_rank)(run["argv"], run["kills"])
            print("ended well", flush=True)
        except ChildFailedError as error:
            print("failed", error.failures, flush=True)
