"""Answer prompts with a trained model: python predict_generation.py --model_name_or_path DIR."""

import sys

from common.errors import UserError
from common.flags import load, run_script
from llm import runtime
from llm.config.generation import (
    AdapterArguments,
    PackingArguments,
    PredictSharingArguments,
    PromptArguments,
    SamplingArguments,
    SourceArguments,
    check_adapted,
)

_DESCRIPTION = """\
Generate with a model directory: Hugging Face's layout, or PaddleNLP's model_state*.pdparams.

  one prompt, streamed    --prompt "The sky is"
  many, in batches        --data_file prompts.jsonl --output_file answers.jsonl
  a chat on the terminal  --chat True (no prompt)

An adapter goes on top: --lora_path DIR or --prefix_path DIR.
A model too large for one device is shared out over several (tensor parallelism):

  python -m paddle.distributed.launch --nproc_per_node 2 predict_generation.py ..."""


_GROUPS = (
    *(SourceArguments, AdapterArguments, PromptArguments, SamplingArguments),
    *(PackingArguments, PredictSharingArguments),
)


def _merge(source: str, target: str, adapter: str | None) -> None:
    """Write a checkpoint's complete tensors, whatever its layout."""
    if adapter is not None:
        raise UserError(
            f"--merge_tensor_parallel_path merges ranks, not the adapter {adapter}; merge_lora.py "
            "does that to the result"
        )
    from llm.llama.files.checkpoint import open_checkpoint
    from llm.llama.files.conversion import convert

    convert(open_checkpoint(source), target, threads=runtime.cpu_count())
    sys.stderr.write(f"wrote {target}\n")


def main() -> None:
    """Read flags, load the model, answer."""
    groups = load(_GROUPS, prog="predict_generation.py", description=_DESCRIPTION)
    source, adapter, asked, sampling, packing, sharing = groups
    if sharing.merge_tensor_parallel_path is not None:
        if sharing.rank == 0:
            merged = sharing.merge_tensor_parallel_path
            _merge(source.model_name_or_path, merged, adapter.path)
        return
    check_adapted(source.dtype, source.device, adapter.path)
    from data.tokenizer import check_vocabulary, load_tokenizer, tokenizer_place
    from llm.llama.config import load_config
    from llm.llama.files import peft
    from llm.parallel.rules import check_shape
    from llm.serving import terminal

    prompts = terminal.read_prompts(asked)
    config = load_config(source.model_name_or_path)
    check_shape(sharing.layout, config, seq_length=1, micro_batches=1)
    places = (source.tokenizer_name_or_path, adapter.path, source.model_name_or_path)
    tokenizer = load_tokenizer(tokenizer_place(*places))
    check_vocabulary(tokenizer, config.vocab_size)
    if adapter.path is not None:
        peft.read_config(adapter.path, adapter.kind)
    runtime.prepare(runtime.process_threads(source.threads), source.device)
    runtime.load_paddle(source.device)
    from llm.engine.engine import Engine
    from llm.engine.runners import DygraphRunner
    from llm.llama.adapters.opening import load_adapter
    from llm.llama.build import load_model
    from llm.llama.fused import pack_where_possible
    from llm.parallel.topology import start

    topology = start(sharing.layout, source.device)
    options = {"dtype": source.dtype, "ops": source.op_modes, "topology": topology}
    model = load_model(source.model_name_or_path, to_pack=True, **options)
    if adapter.path is not None:
        load_adapter(model, adapter.path)
    pack_where_possible(model, **packing.options)

    def open_engine(max_sequences: int, max_tokens: int) -> Engine:
        runner = DygraphRunner(model)
        return Engine(runner, max_sequences=max_sequences, max_tokens=max_tokens)

    context = DygraphRunner(model).max_model_len
    console = terminal.Console(topology.rank == 0, lambda line: topology.gather_objects(line)[0])
    able = terminal.Source(tokenizer, config.vocab_size, context, open_engine, console)
    if prompts:
        terminal.answer_prompts(able, prompts, asked, sampling)
    else:
        terminal.chat_on_stdin(able, sampling, asked.chat)


if __name__ == "__main__":
    run_script(main)
