"""Answer prompts with a trained model: python predict_generation.py --model_name_or_path DIR."""

from data.errors import DataError
from llm import runtime
from llm.config.loader import load, run_script
from llm.config.schema import PromptArguments, SamplingArguments, SourceArguments

_DESCRIPTION = """\
Generate with a model directory in the Hugging Face layout.

  one prompt, streamed    --prompt "The sky is"
  many, in batches        --data_file prompts.jsonl --output_file answers.jsonl
  a chat on the terminal  --chat True (no prompt)"""


def main() -> None:
    """Read flags, load the model, answer."""
    source, asked, sampling = load(
        (SourceArguments, PromptArguments, SamplingArguments),
        prog="predict_generation.py",
        description=_DESCRIPTION,
    )
    from data.tokenizer import load_tokenizer
    from llm import prompting
    from llm.llama.config import load_config

    prompts = prompting.read_prompts(asked)
    config = load_config(source.model_name_or_path)
    tokenizer = load_tokenizer(source.tokenizer_name_or_path or source.model_name_or_path)
    prompting.check_vocabulary(tokenizer, config.vocab_size)
    runtime.prepare(source.threads, source.device)
    runtime.load_paddle(source.device)
    from llm.engine.engine import Engine
    from llm.llama.build import load_model
    from llm.llama.generation import DygraphRunner

    model = load_model(source.model_name_or_path, dtype=source.dtype)

    def open_engine(max_sequences: int, max_tokens: int) -> Engine:
        runner = DygraphRunner(model)
        return Engine(runner, max_sequences=max_sequences, max_tokens=max_tokens)

    able = prompting.Source(
        tokenizer, config.vocab_size, config.max_position_embeddings, open_engine
    )
    if prompts:
        prompting.answer_prompts(able, prompts, asked, sampling)
    else:
        prompting.chat_on_stdin(able, sampling, asked.chat)


if __name__ == "__main__":
    run_script(main, DataError)
