"""Run the whole server on a fake model: ``python fake_server.py '{"delay": 0.1}' --no_ui ...``.

The first argument is JSON for ``make_served``; ``load_seconds``, ``load_until`` (a file is there)
and ``load_error`` in it make loading slow or fail. The rest are the flags of server.py.
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
from llm.serving.service import log_to_stderr, serve
from llm.serving.steps import Loaded


def main() -> None:
    options = json.loads(sys.argv[1])
    (server,) = load((ServerArguments,), sys.argv[2:], prog="fake_server.py")
    seconds, error = options.pop("load_seconds", 0), options.pop("load_error", None)
    until = options.pop("load_until", None)
    options["tokenizer"] = FakeTokenizer()
    if "chat_template" in options:
        options["tokenizer"].chat_template = options.pop("chat_template")

    def open_served() -> Loaded:
        time.sleep(seconds)
        while until is not None and not Path(until).exists():
            time.sleep(0.02)
        if error is not None:
            raise UserError(error)
        return make_served(**options, max_sequences=server.max_num_seqs)

    log_to_stderr()
    serve(server, open_served, options["tokenizer"])


run_script(main)
