"""vLLM on CPUs for bench_generation.py and bench_engine.py, in this process and step by step.

python benchmarks/generation_vllm.py MODEL THREADS STEP_TOKENS PREFIX_CACHE CHECK
"""

import os
from pathlib import Path
from typing import Any

import generation_models as shared
from generation_engines import LONGEST, MOST, serve_engine


def _settings(threads: int) -> None:
    """Set what vLLM reads from the environment when it is imported."""
    cores = sorted(os.sched_getaffinity(0))[:threads]
    os.environ |= {
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
        "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
    }


class Engine:
    """vLLM's engine, see ``generation_engines.Stepped``."""

    def __init__(self, model: Path, threads: int, step_tokens: int, prefix_cache: bool) -> None:
        _settings(threads)
        from vllm import EngineArgs, LLMEngine

        args = EngineArgs(
            model=str(model),
            dtype="bfloat16",
            skip_tokenizer_init=True,
            max_model_len=LONGEST,
            max_num_seqs=MOST,
            max_num_batched_tokens=step_tokens,
            enable_prefix_caching=prefix_cache,
        )
        self._engine = LLMEngine.from_engine_args(args)
        self.vocabulary = self._engine.model_config.get_vocab_size()
        self._count = 0

    def _add(self, ids: list[int], **params: Any) -> int:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        kind = RequestOutputKind.DELTA
        how = SamplingParams(
            temperature=0, ignore_eos=True, detokenize=False, output_kind=kind, **params
        )
        self._count += 1
        self._engine.add_request(str(self._count), {"prompt_token_ids": ids}, how)
        return self._count

    def add(self, ids: list[int], new: int) -> int:
        """Queue a request."""
        return self._add(ids, max_tokens=new)

    def step(self) -> dict[int, int]:
        """Run a step."""
        done = self._engine.step()
        counts = {int(one.request_id): len(one.outputs[0].token_ids) for one in done}
        return {key: count for key, count in counts.items() if count}

    def clear(self, sequences: int, tokens: int) -> None:
        """Drop all requests."""
        self._engine.abort_request([str(n + 1) for n in range(self._count)])
        while self._engine.has_unfinished_requests():
            self._engine.step()

    def write_logprobs(self, file: Path) -> None:
        """Write what it says of the prompt's last tokens: their log-probabilities."""
        import numpy as np

        ids = shared.prompt(self.vocabulary)[: shared.PROMPT].tolist()
        self._add(ids, max_tokens=1, prompt_logprobs=1)
        found = None
        while found is None:
            found = next((one.prompt_logprobs for one in self._engine.step()), None)
        told = [found[n][ids[n]].logprob for n in range(shared.PROMPT - shared.CHECKED, len(ids))]
        np.save(file, np.array(told, np.float32))


if __name__ == "__main__":
    serve_engine(Engine)
