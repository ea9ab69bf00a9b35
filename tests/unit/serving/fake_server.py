"""Run the whole server on a fake model: ``python fake_server.py '{"delay": 0.1}' --no_ui ...``.

The first argument is JSON for ``make_served``; ``load_seconds`` and ``load_error`` in it make
loading slow or fail. The rest are the flags of server.py.
"""

import json
import sys
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[3]), str(Path(__file__).resolve().parent)]

from fakes import FakeTokenizer, make_served

from common.ending import run_script
from common.errors import UserError
from common.flags import load
from llm.config.serving import ServerArguments
from llm.serving.loop import Served
from llm.serving.service import log_to_stderr, serve


def main() -> None:
    options = json.loads(sys.argv[1])
    (server,) = load((ServerArguments,), sys.argv[2:], prog="fake_server.py")
    seconds, error = options.pop("load_seconds", 0), options.pop("load_error", None)
    if "chat_template" in options:
        options["tokenizer"] = FakeTokenizer(chat_template=options.pop("chat_template"))

    def open_served() -> Served:
        time.sleep(seconds)
        if error is not None:
            raise UserError(error)
        return make_served(**options, max_sequences=server.max_num_seqs)

    log_to_stderr()
    serve(server, open_served)


run_script(main)
