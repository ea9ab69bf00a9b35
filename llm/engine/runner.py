"""What the engine runs: one step of packed tokens over a paged cache."""

from pathlib import Path
from typing import Any, Protocol

import numpy as np

from llm.engine.manifest import Manifest, load_manifest, program_files


class Runner(Protocol):
    """Executes steps and owns the cache's memory."""

    block_size: int
    max_model_len: int
    vocab_size: int
    eos_ids: tuple[int, ...]

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks."""

    def run(
        self,
        ids_T: np.ndarray,
        sequence_T: np.ndarray,
        position_T: np.ndarray,
        block_table_NM: np.ndarray,
        rows_n: np.ndarray,
    ) -> np.ndarray:
        """Return float32 logits ``[n, V]`` of the chosen rows; see ``forward_paged``."""


class PredictorRunner:
    """An exported program in Paddle Inference.

    Args:
        model_dir: directory of the export.
        prefix: its file prefix.
        device: ``cpu`` or ``gpu``.
        threads: CPU threads of the math library.

    Raises:
        UserError: a damaged or incomplete export, or one that needs native ops which are not there.
    """

    def __init__(self, model_dir: str | Path, prefix: str, *, device: str, threads: int) -> None:
        self.manifest: Manifest = load_manifest(model_dir, prefix)
        self.manifest.check_ops()
        self.block_size = self.manifest.block_size
        self.max_model_len = self.manifest.max_model_len
        self.cache_dtype = self.manifest.cache_dtype
        self.eos_ids = self.manifest.eos_ids
        self.config = self.manifest.architecture
        self.vocab_size = self.config.vocab_size
        program, weights, _ = program_files(model_dir, prefix)
        self._predictor = _create_predictor(program, weights, device, threads)
        self._caches: list[Any] = []

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks."""
        from llm.llama.cache import StepInputs, new_caches

        self._inputs = StepInputs()
        self._caches = new_caches(self.config, num_blocks, self.block_size, self.cache_dtype)

    def run(
        self,
        ids_T: np.ndarray,
        sequence_T: np.ndarray,
        position_T: np.ndarray,
        block_table_NM: np.ndarray,
        rows_n: np.ndarray,
    ) -> np.ndarray:
        """Return float32 logits ``[n, V]`` of the chosen rows."""
        inputs = self._inputs.fill((ids_T, sequence_T, position_T, block_table_NM, rows_n))
        # Paddle tensors share their memory with the program, which writes the caches in place.
        # The next run overwrites the result's buffer; `.numpy()` copies it out.
        results = self._predictor.run([*inputs, *self._caches])
        return results[0].numpy()


def _create_predictor(program: Path, weights: Path, device: str, threads: int) -> Any:
    from paddle import inference

    config = inference.Config(str(program), str(weights))
    if device == "gpu":
        config.enable_use_gpu(256, 0)
    else:
        config.disable_gpu()
        # oneDNN is slower with dynamic shapes, and its in-place pass has given wrong tokens when a
        # generation loop is inside the program (docs/log.md).
        config.disable_mkldnn()
        config.set_cpu_math_library_num_threads(threads)
    config.enable_new_ir(True)
    config.enable_new_executor(True)
    config.switch_ir_optim(True)
    config.enable_memory_optim()
    config.disable_glog_info()
    return inference.create_predictor(config)
