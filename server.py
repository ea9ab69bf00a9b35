"""Serve an exported model: HTTP API (OpenAI's routes and /generate) and a chat page.

python server.py --model_dir inference --model_prefix llama --port 8010 --flask_port 8011
"""

from common.flags import load, run_script
from llm import runtime
from llm.config.generation import ProgramArguments, ServerArguments


def main() -> None:
    """Read the arguments, then serve until SIGTERM or SIGINT."""
    server, program = load(
        (ServerArguments, ProgramArguments), prog="server.py", description=__doc__ or ""
    )
    threads = runtime.prepare(program.threads, program.device)

    # After prepare(), and after --help has been answered.
    from llm.engine.opening import load_backend
    from llm.llama.manifest import load_manifest
    from llm.serving.service import log_to_stderr, serve

    load_manifest(program.model_dir, program.model_prefix)  # complain before ports are bound
    log_to_stderr()
    serve(
        server,
        lambda: load_backend(
            program,
            threads=threads,
            max_tokens=server.src_length + server.max_length,
            model_id=server.model_id,
            chat_template=server.chat_template,
        ),
    )


if __name__ == "__main__":
    run_script(main)
