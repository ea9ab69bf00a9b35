"""Serve a model: HTTP API (OpenAI's routes and /generate) and a chat page.

what export_generation_model.py wrote   --model_dir inference --model_prefix llama
a model directory                       --model_name_or_path DIR, with --lora_path or --prefix_path
what MindIE's config.json describes     --config mindie-service/conf/config.json

python server.py --model_dir inference --model_prefix llama --port 8010 --flask_port 8011

Processes share a directory that is too large for one device (tensor parallelism); the first serves:

python -m paddle.distributed.launch --nproc_per_node 2 server.py ...
"""

from common.ending import run_script  # isort: split

import logging
from functools import partial

from common.flags import load
from llm.config.scripts import SCRIPTS

_PROG = "server.py"


def main() -> None:
    """Read the arguments, then serve until SIGTERM or SIGINT."""
    server, place = load(SCRIPTS[_PROG], prog=_PROG, description=__doc__ or "")
    # After --help has been answered.
    from llm.engine.finding import find_model
    from llm.serving.service import log_to_stderr, open_served, serve

    found = find_model(place)  # complain before ports are bound
    log_to_stderr()
    opened = partial(open_served, place, found, server)
    if place.rank > 0:
        opened()  # executes rank 0's steps until that is done
    for line in server.without_effect():
        logging.getLogger(_PROG).warning("%s", line)
    serve(server, opened, found.tokenizer)


if __name__ == "__main__":
    run_script(main)
