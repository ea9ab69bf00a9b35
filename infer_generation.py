"""Answer prompts with an exported program in Paddle Inference; paddlenlp is never imported."""

from common.flags import load, run_script
from llm import runtime
from llm.config.generation import ProgramArguments, PromptArguments, SamplingArguments

_DESCRIPTION = """\
Generate with what export_generation_model.py wrote.

  python infer_generation.py --model_dir inference --model_prefix llama --prompt "The sky is" """


def main() -> None:
    """Read flags, open the program, answer."""
    program, asked, sampling = load(
        (ProgramArguments, PromptArguments, SamplingArguments),
        prog="infer_generation.py",
        description=_DESCRIPTION,
    )
    from data.tokenizer import load_tokenizer
    from llm.llama.manifest import load_manifest
    from llm.serving import terminal

    prompts = terminal.read_prompts(asked)
    manifest = load_manifest(program.model_dir, program.model_prefix)
    tokenizer = load_tokenizer(program.tokenizer_name_or_path or program.model_dir)
    manifest.check_tokenizer(tokenizer.name, tokenizer.fingerprint)
    threads = runtime.prepare(program.threads, program.device)
    runtime.load_paddle(program.device)
    from llm.engine.engine import Engine
    from llm.engine.runners import PredictorRunner

    runner = PredictorRunner(
        program.model_dir, program.model_prefix, device=program.device, threads=threads
    )

    def open_engine(max_sequences: int, max_tokens: int) -> Engine:
        return Engine(runner, max_sequences=max_sequences, max_tokens=max_tokens)

    able = terminal.Source(tokenizer, runner.vocab_size, runner.max_model_len, open_engine)
    if prompts:
        terminal.answer_prompts(able, prompts, asked, sampling)
    else:
        terminal.chat_on_stdin(able, sampling, asked.chat)


if __name__ == "__main__":
    run_script(main)
