"""What the engine runs: one step of packed tokens over a paged cache."""

import dataclasses
import logging
from collections.abc import Sequence as SequenceOf
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor

from common.devices import CPU, CUDA_LIKE, XPU, kind_of
from common.errors import UserError
from external_ops.backend import select_ops
from external_ops.paged_attention import to_stored
from external_ops.tensors import tensor_from
from llm.engine.batch import Batch
from llm.engine.device_sampler import sample_on_device
from llm.engine.sampler import Kernel, Outcome, sample_rows
from llm.engine.sequence import Row
from llm.llama.adapters.per_request import Adapter, RequestAdapters
from llm.llama.cache import (
    AUTO,
    StepInputs,
    block_bytes,
    choose_block_size,
    choose_cache_dtype,
    new_caches,
)
from llm.llama.config import LlamaConfig
from llm.llama.files.packed import read_packed
from llm.llama.fused_state import around
from llm.llama.manifest import Manifest, load_manifest, packed_file, program_files
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.seams import CacheLayout

_log = logging.getLogger(__name__)


class _Sampling:
    """What runners make of the logits of a step, wherever those lie."""

    _sample: Kernel  # for those on the host

    def _logits(self, batch: Batch) -> Any:
        """Return float32 logits ``[n, V]`` of the batch's rows as a tensor."""
        raise NotImplementedError

    def run(self, batch: Batch) -> NDArray[np.float32]:
        """Return float32 logits ``[n, V]`` of the batch's rows."""
        logits: NDArray[np.float32] = self._logits(batch).numpy()
        return logits

    def sample(self, batch: Batch, rows: SequenceOf[Row]) -> list[Outcome]:
        """See ``llm.engine.batch.ChoosesTokens``."""
        logits = self._logits(batch)
        if not rows:
            return []
        if logits.place.is_cpu_place():
            return sample_rows(logits, rows, self._sample)
        with paddle.no_grad():
            return sample_on_device(logits, rows)


class PredictorRunner(_Sampling):
    """An exported program in Paddle Inference.

    Args:
        model_dir: directory of the export.
        prefix: its file prefix.
        device: as ``--device`` takes it.
        threads: CPU threads of the math library.

    Raises:
        UserError: a damaged or incomplete export, or one that needs native ops which are not there.
    """

    def __init__(self, model_dir: str | Path, prefix: str, *, device: str, threads: int) -> None:
        self.manifest: Manifest = load_manifest(model_dir, prefix)
        self.manifest.check_ops()
        self.block_size = self.manifest.block_size
        self.max_model_len = self.longest = self.manifest.max_model_len
        self.cache_dtype = self.manifest.cache_dtype
        self.eos_ids = self.manifest.eos_ids
        self.config = self.manifest.architecture
        self.block_bytes = block_bytes(self.config, self.block_size, self.cache_dtype)
        self.vocab_size = self.config.vocab_size
        program, weights, _ = program_files(model_dir, prefix)
        self._predictor = _create_predictor(program, weights, device, threads)
        self._sample = select_ops(device=kind_of(device)).sample
        self._weights = self._packed(packed_file(model_dir, prefix))
        self._caches: list[Any] = []

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks."""
        self._inputs = StepInputs()
        self._caches = new_caches(self.config, num_blocks, self.block_size, self.cache_dtype)

    def clear(self, blocks: SequenceOf[int]) -> None:
        """Set cache blocks to zero."""
        _clear(self._caches, blocks)

    def _logits(self, batch: Batch) -> Any:
        inputs = self._inputs.fill(batch.arrays())
        # Paddle tensors share their memory with the program, which writes the caches in place.
        # The next run overwrites the result's buffer: nobody keeps it.
        return self._predictor.run([*inputs, *self._caches, *self._weights])[0]

    def _packed(self, file: Path) -> list[Any]:
        """Map the weights that the program takes like the arrays of a step."""
        if not self.manifest.packed_bytes:
            return []
        found = read_packed(file, self.manifest.described)
        if found is None:
            raise UserError(f"{file} is damaged, or of another export; export again")
        arrays, contents = found
        return [around(arrays[name]) for name in contents["order"]]


def _clear(caches: list[Any], blocks: SequenceOf[int]) -> None:
    index = tensor_from(np.array(list(blocks), np.int64))
    for cache in caches:
        cache[index] = 0


def _create_predictor(program: Path, weights: Path, device: str, threads: int) -> Any:
    from paddle import inference

    config = inference.Config(str(program), str(weights))
    kind = kind_of(device)
    # The card that Paddle computes on: the flag's, the launcher's, or the first.
    number = int(paddle.device.get_device().partition(":")[2] or 0)
    if kind in CUDA_LIKE:
        config.enable_use_gpu(256, number)
    elif kind == XPU:
        config.enable_xpu()
        config.set_xpu_device_id(number)
    elif kind != CPU:
        config.enable_custom_device(kind, number)
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


def _unstretched(config: LlamaConfig) -> int:
    """Return the context that takes no decision about rotary frequencies."""
    dynamic = config.rope_scaling.rope_type == "dynamic"
    return config.max_position_embeddings if dynamic else config.context


class DygraphRunner(_Sampling):
    """Implements ``llm.engine.batch.Runner`` with a network in dygraph.

    A prefix (``llm.llama.adapters.prefix``) is computed once, when the cache is allocated, into
    blocks that all sequences share; callers go on counting positions from 0. Where tensor parallel
    ranks share the network, each has a runner, caches its own heads and gets all logits; their
    callers have to run the same steps.

    Args:
        model: the network; switched to evaluation.
        block_size: tokens per cache block; the nearest size that the network's kernels take and,
            with a prefix, that divides it. None leaves the choice to them.
        max_model_len: longest prefix plus prompt plus answer; the trained context when not given.
            Dynamic rotary scaling assumes this length throughout, from the trained one on.
        cache_dtype: type of the cache's numbers, ``auto`` for the network's.

    Raises:
        UserError: a prefix that fills the context, or a type of cache that the network's kernels
            have no form for.

    ``max_model_len`` of the runner is what the prefix leaves for prompt and answer; ``longest`` is
    what :meth:`extend` can make of it.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        *,
        block_size: int | None = None,
        max_model_len: int | None = None,
        cache_dtype: str = AUTO,
    ) -> None:
        model.eval()
        self.model = model
        self._sample = model.ops.sample
        self._given = max_model_len
        self._context = max_model_len or _unstretched(model.config)
        prefix = model.seams.prefix
        self._prefix = 0 if prefix is None else prefix.length
        if self._prefix >= self._context:
            raise UserError(
                f"a prefix of {self._prefix} tokens fills the context of {self._context}; use a "
                "shorter one"
            )
        fused = model.seams.fused
        self._layout = CacheLayout() if fused is None else fused.layout
        table = model.model.embed_tokens
        assert table is not None, "stages of a pipeline do not generate"
        self.cache_dtype = choose_cache_dtype(self._layout, cache_dtype, table.type_name)
        self.block_size = choose_block_size(self._layout, block_size, self._prefix)
        self._parts = 1 if model.seams.shard is None else model.seams.shard.parts
        whole = block_bytes(model.config, self.block_size, self.cache_dtype)
        self.block_bytes = whole // self._parts
        self.max_model_len = self._context - self._prefix
        self.longest = (max_model_len or model.config.context) - self._prefix
        self.vocab_size = model.config.vocab_size
        self.eos_ids = model.config.eos_token_id
        self._caches: list[Any] = []
        self._inputs = StepInputs()
        self._shared = np.zeros([0], np.int32)
        self.adapters = RequestAdapters(model)

    def extend(self, tokens: int) -> None:
        """Take rows of so many tokens, as far as rotary scaling allows; before a cache is filled.

        Dynamic scaling has other frequencies for each length, and keys in the cache keep those that
        they were written with: one length holds for all rows of a cache, short ones too.
        """
        if self._given is not None or tokens <= self.max_model_len:
            return
        self._context = min(tokens + self._prefix, self.model.config.context)
        self.max_model_len = self._context - self._prefix
        _log.warning("dynamic rotary scaling assumes %d tokens for all rows", self._context)

    def allocate(self, num_blocks: int) -> None:
        """Take memory for that many cache blocks, and for the prefix's."""
        shared = self._prefix // self.block_size
        self._shared = np.arange(num_blocks, num_blocks + shared, dtype=np.int32)
        config = self.model.config
        seams = self.model.seams
        sizes = num_blocks + shared, self.block_size, self.cache_dtype, self._parts
        self._caches = new_caches(config, *sizes, layout=self._layout)
        if seams.prefix is None:
            return
        with paddle.no_grad():
            flat = [tensor for layer in seams.prefix() for tensor in layer]
            for cache, tensor in zip(self._caches, flat, strict=True):
                cache[num_blocks:] = self._in_blocks(tensor, cache.dtype)

    def clear(self, blocks: SequenceOf[int]) -> None:
        """Set cache blocks to zero."""
        _clear(self._caches, blocks)

    def _logits(self, batch: Batch) -> Any:
        if self._prefix:
            batch = self._behind_prefix(batch)
        fused = self.model.seams.fused
        if fused is not None:
            places = batch.sequence_T, batch.position_T, batch.block_table_NM
            fused.prepare(*places, self.block_size)
        step = [*self._inputs.fill(batch.arrays()), self._caches, self._context]
        with paddle.no_grad(), self._with_adapters(batch):
            return self.model.forward_paged(*step)

    def _with_adapters(self, batch: Batch) -> AbstractContextManager[None]:
        if batch.adapter_N is None:
            return nullcontext()
        owners = batch.adapter_N, batch.sequence_T
        for sequence, adapter in self.adapters.beginnings(*owners, batch.position_T):
            self._write(adapter, batch.block_table_NM[sequence])
        return self.adapters.running(*owners, batch.rows_n)

    def _write(self, adapter: Adapter, blocks_M: NDArray[np.int32]) -> None:
        """Put a tuned prefix into the first blocks of a sequence; its tokens follow in the last."""
        count = -(-adapter.length // self.block_size)
        index = tensor_from(blocks_M[:count].astype(np.int64))
        rest = count * self.block_size - adapter.length
        for cache, tensor in zip(self._caches, adapter.prefix, strict=True):
            full = paddle.concat([tensor, paddle.zeros([rest, *tensor.shape[1:]], tensor.dtype)])
            cache[index] = self._in_blocks(full, cache.dtype)

    def _in_blocks(self, heads_PGD: Tensor, dtype: paddle.dtype) -> Tensor:
        """Return keys or values of whole blocks as the cache has them."""
        stored = to_stored(heads_PGD, dtype)
        return self._layout.filled(stored.reshape([-1, self.block_size, *stored.shape[-2:]]))

    def _behind_prefix(self, batch: Batch) -> Batch:
        """Return the batch as it stands behind the prefix's blocks."""
        table_NM = batch.block_table_NM
        shared = np.broadcast_to(self._shared, [len(table_NM), len(self._shared)])
        return dataclasses.replace(
            batch,
            position_T=batch.position_T + np.int32(self._prefix),
            block_table_NM=np.concatenate([shared, table_NM], axis=1),
        )
