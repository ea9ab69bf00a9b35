"""llama.cpp for bench_generation.py and bench_engine.py, through its batches of tokens.

It schedules nothing by itself: prompts and answers share steps in the plainest way, and no prompt's
beginning is kept.
"""

import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import generation_models as shared
import llama_cpp
import numpy as np
from generation_engines import serve_engine

# A sequence's part of the cache is a multiple of this.
_PAD = 256
# Kept, since llama.cpp goes on calling it.
_SILENCE = llama_cpp.llama_log_callback(lambda *_: None)


@dataclass(frozen=True)
class _How:
    threads: int
    step_tokens: int
    flash: int


class Context:
    """A loaded model with a cache of its own for each sequence."""

    def __init__(self, model: Any, how: _How, sequences: int, tokens: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = sequences
        settings.n_ctx = sequences * -(-tokens // _PAD) * _PAD
        settings.n_batch = settings.n_ubatch = how.step_tokens
        settings.n_threads = settings.n_threads_batch = how.threads
        settings.flash_attn_type = how.flash
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._memory = llama_cpp.llama_get_memory(self.context)
        self._batch = llama_cpp.llama_batch_init(how.step_tokens, 0, 1)

    def run(self, parts: list[tuple[int, int, list[int], int]]) -> Any:
        """Compute tokens; return the logits of some.

        Args:
            parts: sequence, position of the first token, tokens, how many of the last give logits.
        """
        batch, at, rows = self._batch, 0, 0
        for sequence, position, ids, wanted in parts:
            for n, token in enumerate(ids):
                batch.token[at], batch.pos[at] = token, position + n
                batch.n_seq_id[at], batch.seq_id[at][0] = 1, sequence
                batch.logits[at] = n >= len(ids) - wanted
                at += 1
            rows += wanted
        batch.n_tokens = at
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp has no room for these tokens")
        if not rows:
            return np.empty((0, self.vocabulary), np.float32)
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (rows, self.vocabulary))

    def forget(self, sequence: int) -> None:
        """Drop the cache of a sequence."""
        llama_cpp.llama_memory_seq_rm(self._memory, sequence, 0, -1)

    def free(self) -> None:
        """Give the memory back."""
        llama_cpp.llama_batch_free(self._batch)
        llama_cpp.llama_free(self.context)


@dataclass
class _Running:
    """A request in a step: its place, tokens that are not computed yet, and how far it is."""

    sequence: int
    pending: list[int]
    left: int
    done: int = 0


class Engine:
    """A loop around llama.cpp, see ``generation_engines.Stepped``."""

    def __init__(self, model: Path, threads: int, step_tokens: int, prefix_cache: bool) -> None:
        del prefix_cache  # there is none
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENCE, None)
        settings = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(model).encode(), settings)
        self._how = self._faster(threads, step_tokens)
        self._context = Context(self._model, self._how, 1, shared.CONTEXT)
        self.vocabulary = self._context.vocabulary

    def _faster(self, threads: int, step_tokens: int) -> _How:
        """Return the faster of the two kinds of attention."""
        kinds = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        )
        found = []
        for kind in kinds:
            how = _How(threads, step_tokens, kind)
            context = Context(self._model, how, 1, 2 * shared.CONTEXT)
            ids = [3] * shared.CONTEXT
            context.run([(0, 0, ids, 1)])
            context.forget(0)
            start = time.perf_counter()
            context.run([(0, 0, ids, 1)])
            context.run([(0, shared.CONTEXT, [3], 1)])
            found.append((time.perf_counter() - start, kind, how))
            context.free()
        return min(found)[2]

    def add(self, ids: list[int], new: int) -> int:
        """Queue a request."""
        self._count += 1
        self._waiting.append((self._count, ids, new))
        return self._count

    def step(self) -> dict[int, int]:
        """Run a step: a token of each answer, and of prompts as much as there is room for."""
        while self._waiting and self._free:
            key, ids, new = self._waiting.popleft()
            self._running[key] = _Running(self._free.pop(), list(ids), new)
        room, parts, complete = self._how.step_tokens, [], []
        for key, one in sorted(self._running.items(), key=lambda item: len(item[1].pending) > 1):
            now, one.pending = one.pending[:room], one.pending[room:]
            if now:
                parts.append((one.sequence, one.done, now, int(not one.pending)))
                room, one.done = room - len(now), one.done + len(now)
                if not one.pending:
                    complete.append(key)
        logits = self._context.run(parts)
        for key, token in zip(complete, logits.argmax(-1).tolist(), strict=True):
            one = self._running[key]
            one.pending, one.left = [token], one.left - 1
            if not one.left:
                self._context.forget(one.sequence)
                self._free.append(one.sequence)
                del self._running[key]
        return dict.fromkeys(complete, 1)

    def clear(self, sequences: int, tokens: int) -> None:
        """Drop all requests."""
        self._context.free()
        self._context = Context(self._model, self._how, sequences, tokens)
        self._count, self._free = 0, list(range(sequences))
        self._waiting = deque[tuple[int, list[int], int]]()
        self._running = dict[int, _Running]()

    def write_logprobs(self, file: Path) -> None:
        """Write the logits of the prompt's last tokens, of which log-probabilities can be made."""
        ids = shared.prompt(self.vocabulary)[: shared.PROMPT].tolist()
        np.save(file, self._context.run([(0, 0, ids, shared.CHECKED)]))


if __name__ == "__main__":
    serve_engine(Engine)
