"""llama.cpp for bench_generation.py, through its batches of tokens."""

import sys
import time
from pathlib import Path
from typing import Any

import generation_models as shared
import llama_cpp
import numpy as np
from interleave import Run, serve

# Kept, since llama.cpp goes on calling it.
_SILENCE = llama_cpp.llama_log_callback(lambda *_: None)


class Context:
    """A loaded model with a cache for all sequences."""

    def __init__(self, model: Any, threads: int, flash: int) -> None:
        settings = llama_cpp.llama_context_default_params()
        sequences = max(shared.BATCHES)
        settings.n_ctx = sequences * (shared.PROMPT + shared.STEPS)
        settings.n_batch = settings.n_ubatch = shared.PROMPT
        settings.n_seq_max = sequences
        settings.n_threads = settings.n_threads_batch = threads
        settings.flash_attn_type = flash
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(shared.PROMPT, 0, 1)

    def run(self, ids: Any, sequences: Any, positions: Any, rows: Any) -> Any:
        """Compute tokens; return the logits of some."""
        batch, wanted = self.batch, set(np.asarray(rows).tolist())
        batch.n_tokens = len(ids)
        for i, (token, sequence, position) in enumerate(
            zip(ids.tolist(), sequences.tolist(), positions.tolist(), strict=True)
        ):
            batch.token[i], batch.pos[i] = token, position
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = i in wanted
        if llama_cpp.llama_decode(self.context, batch):
            raise SystemExit("llama.cpp has no room for these tokens")
        pointer = llama_cpp.llama_get_logits(self.context)
        return np.ctypeslib.as_array(pointer, (len(wanted), self.vocabulary))

    def forget(self, sequence: int, first: int) -> None:
        """Drop the cache of a sequence from a position on."""
        llama_cpp.llama_memory_seq_rm(self.memory, sequence, first, -1)


class Cases:
    """What the worker runs."""

    def __init__(self, file: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        llama_cpp.llama_log_set(_SILENCE, None)
        settings = llama_cpp.llama_model_default_params()
        self.model = llama_cpp.llama_model_load_from_file(str(file).encode(), settings)
        self.logits_file = file.with_name(f"llama.cpp-{file.stem}.npy")
        vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        self.ids = shared.prompt(llama_cpp.llama_vocab_n_tokens(vocabulary))
        self.context = self._faster(threads)

    def _faster(self, threads: int) -> Context:
        """Return a context with the faster of its two kinds of attention."""
        kinds = (
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED,
            llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED,
        )
        found = []
        for kind in kinds:
            self.context = Context(self.model, threads, kind)
            self.prompt(shared.CONTEXT, 0, [0])
            start = time.perf_counter()
            self.prompt(shared.CONTEXT, 0, [0])
            self.decode(1)()
            found.append((time.perf_counter() - start, kind))
            llama_cpp.llama_free(self.context.context)
        return Context(self.model, threads, min(found)[1])

    def prompt(self, length: int, sequence: int, rows: Any) -> Any:
        """Compute the prompt of a sequence afresh; return the logits of some rows."""
        self.context.forget(sequence, 0)
        places = np.arange(length)
        return self.context.run(self.ids[:length], np.full(length, sequence), places, rows)

    def decode(self, batch: int) -> Run:
        """Return what generates for so many sequences."""
        for sequence in range(batch):
            self.prompt(shared.CONTEXT, sequence, [0])

        def run() -> None:
            ids = self.ids[:batch]
            for step in range(shared.STEPS):
                position = np.full(batch, shared.CONTEXT + step)
                ids = self.context.run(ids, np.arange(batch), position, range(batch)).argmax(-1)
            for sequence in range(batch):
                self.context.forget(sequence, shared.CONTEXT)

        return run

    def check(self) -> None:
        """Write the logits of the last rows of the prompt."""
        rows = np.arange(shared.PROMPT - shared.CHECKED, shared.PROMPT)
        np.save(self.logits_file, self.prompt(shared.PROMPT, 0, rows))

    def make(self, case: str) -> Run:
        """Return what a case runs."""
        if case == "check":
            return self.check
        if case == "prefill":
            return lambda: self.prompt(shared.PROMPT, 0, [shared.PROMPT - 1])
        return self.decode(int(case.split()[1]))


if __name__ == "__main__":
    serve(Cases(Path(sys.argv[1]), int(sys.argv[2])).make)
