"""OpenVINO GenAI for bench_generation.py and bench_engine.py: its continuous batching.

python benchmarks/generation_openvino.py MODEL THREADS STEP_TOKENS PREFIX_CACHE CHECK
"""

import json
from pathlib import Path
from typing import Any

import generation_models as shared
import numpy as np
import openvino
import openvino_genai
from generation_engines import MOST, serve_engine


class Engine:
    """OpenVINO's pipeline, see ``generation_engines.Stepped``."""

    def __init__(self, model: Path, threads: int, step_tokens: int, prefix_cache: bool) -> None:
        how = openvino_genai.SchedulerConfig()
        how.cache_size = 1  # GB
        how.max_num_seqs = MOST
        how.enable_prefix_caching = prefix_cache
        how.max_num_batched_tokens = step_tokens
        self._pipeline = openvino_genai.ContinuousBatchingPipeline(
            str(model), how, "CPU", {"INFERENCE_NUM_THREADS": threads}
        )
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
        self.vocabulary = config["vocab_size"]
        self._count, self._running = 0, dict[int, Any]()

    def _add(self, ids: list[int], how: Any) -> int:
        self._count += 1
        tensor = openvino.Tensor(np.array([ids], np.int64))
        self._running[self._count] = self._pipeline.add_request(self._count, tensor, how)
        return self._count

    def add(self, ids: list[int], new: int) -> int:
        """Queue a request."""
        how = openvino_genai.GenerationConfig(max_new_tokens=new, ignore_eos=True)
        return self._add(ids, how)

    def step(self) -> dict[int, int]:
        """Run a step."""
        self._pipeline.step()
        counts = {}
        for key, handle in self._running.items():
            if handle.can_read():
                counts[key] = sum(len(one.generated_ids) for one in handle.read().values())
        ended = openvino_genai.GenerationStatus.FINISHED
        self._running = {k: h for k, h in self._running.items() if h.get_status() != ended}
        return counts

    def clear(self, sequences: int, tokens: int) -> None:
        """Drop all requests."""
        for handle in self._running.values():
            handle.stop()
        self._running = {}
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()

    def write_logprobs(self, file: Path) -> None:
        """Write what it says of the prompt's last tokens: their log-probabilities."""
        ids = shared.prompt(self.vocabulary)[: shared.PROMPT].tolist()
        how = openvino_genai.GenerationConfig(max_new_tokens=0, echo=True, logprobs=1)
        handle = self._running[self._add(ids, how)]
        while self._pipeline.has_non_finished_requests():
            self._pipeline.step()
        (told,) = handle.read_all()
        self._running = {}
        np.save(file, np.array(told.generated_log_probs[-shared.CHECKED :], np.float32))


if __name__ == "__main__":
    serve_engine(Engine)
