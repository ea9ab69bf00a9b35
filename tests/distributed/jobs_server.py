"""Jobs that show how the rank server behaves."""

import os
import sys
import time


def echo(value):
    """Return what came in, and what paddle's launcher would have set."""
    print("spoken by", os.environ["PADDLE_TRAINER_ID"])
    rank, ranks = os.environ["PADDLE_TRAINER_ID"], os.environ["PADDLE_TRAINERS_NUM"]
    return {
        "value": value,
        "rank": int(rank),
        "ranks": int(ranks),
        "paddle": "paddle" in sys.modules,
    }


def fail_on(rank):
    """Raise on one rank; the others would sleep for long."""
    if int(os.environ["PADDLE_TRAINER_ID"]) == rank:
        raise ValueError(f"planted on rank {rank}")
    time.sleep(120)


def sleep(seconds):
    """Be late."""
    time.sleep(seconds)
