"""Jobs for test_faults.py: loops of a collective per step that something goes wrong in."""

import os
import signal
import sys
import time
from pathlib import Path

import paddle
import paddle.distributed as dist

from common.errors import UserError
from llm.parallel import faults, topology
from llm.parallel.layout import Layout

EVERY = -1
STEPS = 400
STEP_S = 0.01


def train(directory, mishap, rank, at_step=5, timeout_s=60.0):
    """Run steps; at one of them ``rank`` suffers a mishap. The last step, if it comes to that."""
    world = int(os.environ["PADDLE_TRAINERS_NUM"])
    running = topology.start(Layout(data=world))
    with faults.guard(running, directory, timeout_s) as watch:
        for step in range(STEPS):
            if step == at_step and rank in (running.rank, EVERY):
                MISHAPS[mishap]()
            time.sleep(STEP_S)
            if world > 1:
                dist.all_reduce(paddle.ones([2]))
            if watch.stop_requested():
                return step
    return STEPS


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def crashed():
    os.kill(os.getpid(), signal.SIGSEGV)


def raised():
    raise RuntimeError("planted: the disk is full\nsecond line")


def refused():
    raise UserError("planted: learning_rate=-1")


def stuck_in_python():
    time.sleep(600)


def unwatched():
    pid = os.getpid()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="utf-8").split():
        os.kill(int(child), signal.SIGKILL)
    time.sleep(600)


def told_to_stop():
    os.kill(os.getpid(), signal.SIGTERM)


ALL = (killed, crashed, raised, refused, stuck_in_python, unwatched, told_to_stop)
MISHAPS = {function.__name__: function for function in ALL}

if __name__ == "__main__":
    print("stopped at", train(sys.argv[1], sys.argv[2], int(sys.argv[3])))
