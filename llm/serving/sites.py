"""Which applications the HTTP process serves, and on which ports.

Another port is a socket in ``listening`` of :func:`llm.serving.service.serve`, and a site here.
"""

import os
import socket
from collections.abc import Mapping

from llm.config.serving import ServerArguments
from llm.serving.api import create_app
from llm.serving.loop import EngineWorker
from llm.serving.management import create_management_app
from llm.serving.metrics import Metrics
from llm.serving.requests import Limits
from llm.serving.settings import OperatorFiles
from llm.serving.web import ApiSettings
from llm.serving.wsgi import Site


def sites(
    arguments: ServerArguments,
    files: OperatorFiles,
    worker: EngineWorker,
    listening: Mapping[str, socket.socket],
) -> list[Site]:
    """Return the applications: the API, and behind it management where it has a port.

    Args:
        arguments: what the operator sets.
        files: what the operator's files say.
        worker: answers; it may still be loading.
        listening: sockets by the flag of their port.
    """
    settings = ApiSettings(
        Limits(arguments.src_length, arguments.max_length, arguments.tool_call_parser),
        arguments.max_body_bytes,
        files.keys,
        aliases=tuple(arguments.model_alias),
        any_names=arguments.any_names,
        cors_origins=tuple(arguments.cors_origins),
        access_log=files.access_log,
    )
    metrics = Metrics(worker, engine_pid=os.getppid())
    management = listening.get("management_port")
    api = create_app(worker, settings, metrics, shows_metrics=management is None)
    tls = None if files.tls is None else files.tls.context
    found = [Site(api, listening["flask_port"], tls)]
    if management is not None:
        app = create_management_app(worker, settings, metrics, arguments.adapter_dir)
        found.append(Site(app, management, tls))
    return found
