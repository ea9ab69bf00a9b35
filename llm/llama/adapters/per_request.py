"""Several adapters over one network: each request names its own, or none.

LoRA adapters lie beside the network's weights, which stay as they are, quantized ones too: a step
of packed tokens adds to each row what its request's adapter says (:mod:`external_ops.low_rank`). A
tuned prefix is written into the first cache blocks of its requests instead of being computed.
Adapters come and go while requests run.

T packed tokens, N sequences, n scored rows, P virtual tokens, W numbers of each in all layers,
G key/value heads, D head dimension.
"""

import re
import secrets
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from numpy.typing import NDArray
from paddle import Tensor, nn

from common.errors import UnknownNameError, UserError
from external_ops.low_rank import LowRank, LowRankStep, Piece
from llm.llama.adapters.lora import LoRAConfig, has_lora, without_base
from llm.llama.adapters.prefix import read_prefix
from llm.llama.config import LlamaConfig
from llm.llama.files import peft
from llm.llama.layers import SAME_INPUT
from llm.llama.modeling import LlamaForCausalLM

KINDS = ("LORA", "PREFIX_TUNING")
_PREFIX = "base_model.model."


@dataclass(eq=False, frozen=True)
class Adapter:
    """A loaded adapter; requests that run with it keep it after it was unloaded.

    Args:
        name: by which requests ask for it.
        number: among all that were ever loaded here, from 1 on; 0 stands for none.
        length: P, cache positions that its requests begin with; 0 of LoRA.
        nbytes: of memory.
        low_rank: products of a LoRA adapter.
        prefix: keys and values of a tuned prefix for each layer in turn, two tensors per layer,
            each ``[P, G, D]``.
        key: what names it in the prefix cache; another adapter of the same name has another.
    """

    name: str
    number: int
    length: int
    nbytes: int
    low_rank: LowRank | None = None
    prefix: tuple[Tensor, ...] = ()
    key: bytes = field(default_factory=lambda: secrets.token_bytes(16))


@dataclass(frozen=True)
class _Place:
    """Where a linear of the network lies: its number for kernels, its outputs, its inputs."""

    number: int
    first: int
    inputs: int
    outputs: int


def _places(config: LlamaConfig) -> dict[str, _Place]:
    """Return every linear of a network by name; those of one input follow one another."""
    heads, groups = (
        count * config.head_dim
        for count in (config.num_attention_heads, config.num_key_value_heads)
    )
    hidden, ffn = config.hidden_size, config.intermediate_size
    sizes = (
        (hidden, (heads, groups, groups)),
        (heads, (hidden,)),
        (hidden, (ffn, ffn)),
        (ffn, (hidden,)),
    )
    found, number = {}, 0
    for layer in range(config.num_hidden_layers):
        for names, (inputs, outputs) in zip(SAME_INPUT, sizes, strict=True):
            first = 0
            for name, size in zip(names, outputs, strict=True):
                found[f"model.layers.{layer}.{name}"] = _Place(number, first, inputs, size)
                first += size
            number += 1
    if not config.tie_word_embeddings:
        found["lm_head"] = _Place(number, 0, hidden, config.vocab_size)
    return found


def check_name(name: str) -> str:
    """Return a name that requests can ask for.

    Raises:
        UserError: another one.
    """
    if not re.fullmatch(r"[A-Za-z0-9][\w.:/-]{0,127}", name):
        raise UserError(
            f"adapter name {name!r} has to be up to 128 letters, digits and ._-:/, a letter or "
            "digit first"
        )
    return name


class RequestAdapters:
    """The adapters that requests over one network may name.

    Loading takes memory and changes nothing for requests that run. Unloading refuses new requests
    at once; those that run keep the adapter, whose memory goes with the last of them.

    Args:
        model: the network, packed or not; it keeps its weights.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model = model
        self._by_name: dict[str, Adapter] = {}
        # Those that were unloaded and still have requests are here as long as somebody holds them.
        self._by_number: weakref.WeakValueDictionary[int, Adapter] = weakref.WeakValueDictionary()
        self._loaded = 0
        self._hooked = False
        self._scored: LowRankStep | None = None  # of the rows that go through the output matrix

    @property
    def names(self) -> tuple[str, ...]:
        """Adapters that requests may name, in the order in which they were loaded."""
        return tuple(self._by_name)

    @property
    def longest(self) -> int:
        """Virtual tokens of the longest tuned prefix."""
        return max((one.length for one in self._by_name.values()), default=0)

    def get(self, name: str) -> Adapter:
        """Return an adapter.

        Raises:
            UnknownNameError: none is loaded under that name.
        """
        found = self._by_name.get(name)
        if found is None:
            there = ", ".join(self._by_name) or "none"
            raise UnknownNameError(f"no adapter {name!r} is loaded; loaded: {there}")
        return found

    def load(self, name: str, directory: str | Path, *, replace: bool = False) -> Adapter:
        """Read an adapter: LoRA, or a tuned prefix.

        Args:
            name: by which requests will ask for it; not that of another one.
            directory: in PEFT's layout.
            replace: it takes the place of the one that has the name, if there is one; requests
                that run with that go on to their end.

        Raises:
            UserError: a name that is taken or none; no adapter there, a damaged one, another
                model's, or a kind that is not supported; a network that has an adapter of its own
                or is shared by processes.
        """
        check_name(name)
        if name in self._by_name and not replace:
            raise UserError(f"an adapter {name!r} is loaded already; unload it first")
        self._check_network()
        raw = peft.read_config(directory)
        kind = raw.get("peft_type")
        if kind not in KINDS:
            raise UserError(
                f"{Path(directory) / peft.CONFIG_NAME}: peft_type={kind!r} is not supported; "
                f"supported: {', '.join(KINDS)}"
            )
        made: dict[str, Any]
        made = (
            self._read_lora(Path(directory), raw)
            if kind == "LORA"
            else self._read_prefix(directory)
        )
        self._loaded += 1
        adapter = Adapter(name, self._loaded, **made)
        if adapter.low_rank is not None and not self._hooked:
            self._hook()
            self._hooked = True
        self._by_name[name] = self._by_number[adapter.number] = adapter
        return adapter

    def unload(self, name: str) -> None:
        """Forget an adapter; requests that run with it go on to their end.

        Raises:
            UnknownNameError: none is loaded under that name.
        """
        self.get(name)
        del self._by_name[name]

    def _check_network(self) -> None:
        seams = self._model.seams
        if seams.shard is not None or seams.stage is not None:
            raise UserError(
                "adapters for single requests need the whole network in one process; start one, or "
                "merge the adapter (merge_lora.py)"
            )
        if seams.prefix is not None or has_lora(self._model):
            raise UserError(
                "the model has an adapter for all requests (lora_path or prefix_path), and takes "
                "no others beside it; open the model without it"
            )

    def _read_lora(self, directory: Path, raw: dict[str, Any]) -> dict[str, Any]:
        config = LoRAConfig.from_peft(raw, str(directory / peft.CONFIG_NAME))
        _check_plain(config, directory)
        places = _places(self._model.config)
        names = config.targets(places, strict=False)
        expected = {}
        for name in names:
            rank = config.rank(name)
            expected[f"{_PREFIX}{name}.lora_A.weight"] = (rank, places[name].inputs)
            expected[f"{_PREFIX}{name}.lora_B.weight"] = (places[name].outputs, rank)
        layers = {"lm_head": self._model.lm_head} if "lm_head" in places else {}
        tensors = without_base(directory, peft.read_tensors(directory), layers)
        peft.check_tensors(directory, tensors, expected, config.base_model_name_or_path)
        short = all(tensor.dtype == "BF16" for tensor in tensors.values())
        values = peft.read_values(tensors)
        pieces = [
            Piece(
                places[name].number,
                places[name].first,
                values[f"{_PREFIX}{name}.lora_A.weight"],
                values[f"{_PREFIX}{name}.lora_B.weight"].T,
                config.scaling(name),
            )
            for name in names
        ]
        low_rank = LowRank(pieces, "bfloat16" if short else "float32")
        return {"length": 0, "nbytes": low_rank.nbytes, "low_rank": low_rank}

    def _read_prefix(self, directory: str | Path) -> dict[str, Any]:
        config, values_PW = read_prefix(self._model, directory)
        architecture = self._model.config
        table = self._model.model.embed_tokens
        assert table is not None, "stages of a pipeline do not generate"
        heads = [2 * architecture.num_hidden_layers, architecture.num_key_value_heads]
        shape = [config.num_virtual_tokens, *heads, architecture.head_dim]
        whole = paddle.to_tensor(values_PW.reshape(shape)).astype(table.type_name)
        prefix = tuple(one.contiguous() for one in whole.unbind(axis=1))
        nbytes = whole.element_size() * int(whole.size)
        return {"length": config.num_virtual_tokens, "nbytes": nbytes, "prefix": prefix}

    def _hook(self) -> None:
        """Have linears add the products of a step's adapters, but for those that a kernel runs."""
        model, places = self._model, _places(self._model.config)
        # Packing makes a head of tied embeddings, too, and no adapter has products for that.
        if model.lm_head is not None and "lm_head" in places:
            self._after(model.lm_head, places["lm_head"], lambda: self._scored)
        if model.seams.fused is not None and model.seams.fused.adds_low_rank:
            return
        for number in model.model.layers.numbers:
            layer, prefix = model.model.layers[number], f"model.layers.{number}"
            held = dict(layer.named_sublayers())
            for names, joined in zip(SAME_INPUT, ("qkv", "o", "gate_up", "down"), strict=True):
                if joined in held:
                    names_here = {joined: f"{prefix}.{names[0]}"}
                else:
                    names_here = {name: f"{prefix}.{name}" for name in names}
                for own, name in names_here.items():
                    self._after(held[own], places[name], lambda: model.seams.low_rank)

    def _after(self, linear: nn.Layer, place: _Place, step: Any) -> None:
        kernel = self._model.ops.low_rank

        def add(_: nn.Layer, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor | None:
            now = step()
            if now is None:
                return None
            return kernel(inputs[0], out, now, linear=place.number, first=place.first)

        linear.register_forward_post_hook(add)

    @contextmanager
    def running(
        self,
        adapter_N: NDArray[np.int32],
        sequence_T: NDArray[np.int32],
        rows_n: NDArray[np.int64],
    ) -> Iterator[None]:
        """Have the network add what a step's adapters say, for as long as the context lasts.

        Args:
            adapter_N: number of each sequence's adapter, 0 for none.
            sequence_T: sequence of each token.
            rows_n: tokens whose logits are wanted.
        """
        found = [self._by_number[number] for number in np.unique(adapter_N[adapter_N > 0]).tolist()]
        used = [one for one in found if one.low_rank is not None]
        if not used:
            yield
            return
        local_N = np.full(adapter_N.shape, -1, np.int32)
        for index, one in enumerate(used):
            local_N[adapter_N == one.number] = index
        local_T = local_N[sequence_T]
        self._model.seams.low_rank = _step(used, local_T)
        self._scored = _step(used, local_T[rows_n])
        try:
            yield
        finally:
            self._model.seams.low_rank = self._scored = None

    def beginnings(
        self,
        adapter_N: NDArray[np.int32],
        sequence_T: NDArray[np.int32],
        position_T: NDArray[np.int32],
    ) -> Iterator[tuple[int, Adapter]]:
        """Yield sequences whose first tokens stand right behind a tuned prefix, with that."""
        for sequence in np.flatnonzero(adapter_N).tolist():
            adapter = self._by_number[int(adapter_N[sequence])]
            first = position_T[np.searchsorted(sequence_T, sequence)]
            if adapter.length and first == adapter.length:
                yield sequence, adapter


def _check_plain(config: LoRAConfig, directory: Path) -> None:
    """Refuse what is more than a product beside a linear.

    Raises:
        UserError: says what, and how the adapter is served.
    """
    more = {
        "use_dora": config.use_dora,
        "modules_to_save": config.modules_to_save is not None,
        "init_lora_weights": config.is_pissa,
    }
    for name, there in more.items():
        if there:
            raise UserError(
                f"{directory}: {name}={getattr(config, name)!r} changes the base's own weights, "
                "which requests share: give the adapter as lora_path, for all requests, or make a "
                "model of both (merge_lora.py)"
            )


def _step(used: list[Adapter], adapter_T: NDArray[np.int32]) -> LowRankStep | None:
    """Return the adapters that rows have; None where no row has one."""
    there = [index for index in range(len(used)) if (adapter_T == index).any()]
    if not there:
        return None
    numbers = np.full(len(used) + 1, -1, np.int32)  # the last one is that of rows without
    numbers[there] = np.arange(len(there), dtype=np.int32)
    products = [one for index in there if (one := used[index].low_rank) is not None]
    return LowRankStep(products, numbers[adapter_T])
