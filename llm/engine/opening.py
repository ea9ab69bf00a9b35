"""The one door to a trained model: whatever opens one for use comes in here.

``llm.engine.finding`` looks at a directory or an export and refuses what does not fit, before
paddle is loaded; :func:`open_model` makes something of it that generates and scores.
:func:`open_weights` is the part that ends with a network, for those who export, merge or quantize
it.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from data.tokenizer import Tokenizer
from llm import runtime
from llm.config.generation import OpenArguments, WeightsArguments
from llm.config.machine import DeviceArguments
from llm.engine.batch import Runner, TakesAdapters
from llm.engine.engine import Engine
from llm.engine.finding import Found
from llm.engine.model_tokens import ModelTokens
from llm.engine.speculation import Drafter, PromptLookup
from llm.llama.adapters.base_record import difference, read_record
from llm.llama.config import TINY_NAME
from llm.llama.files import peft
from llm.llama.manifest import Manifest
from llm.llama.quant_config import load_quantization
from llm.parallel import topology as topologies
from llm.parallel.topology import Topology

if TYPE_CHECKING:  # a model is found before paddle is loaded
    from external_ops.backend import Choice
    from llm.llama.adapters.per_request import RequestAdapters
    from llm.llama.modeling import LlamaForCausalLM

# Ops of steps and of scores; the others train.
_GENERATING = (
    *("decoder", "rms_norm", "add_rms_norm", "rotary", "swiglu"),
    *("low_rank", "paged_attention", "causal_attention", "sample"),
)

_log = logging.getLogger(__name__)


def start(args: DeviceArguments) -> int:
    """Load paddle on the device that flags name; return the number of CPU threads.

    Raises:
        UserError: a device that is not there.
    """
    threads = args.threads or runtime.cpu_count()
    if "paddle" not in sys.modules:  # a second model in one process keeps the settings
        threads = runtime.prepare(runtime.process_threads(args.threads), args.device)
    runtime.load_paddle(args.device)
    # What was chosen for a network is told when it is known what of it runs: OpenedModel.ops.
    logging.getLogger("external_ops").setLevel(logging.WARNING)
    return threads


def open_weights(
    model: str | Path,
    *,
    adapter: str | None = None,
    dtype: str = "float32",
    ops: Mapping[str, str] | None = None,
    topology: Topology | None = None,
    to_pack: bool = False,
    as_trained: bool = False,
) -> "LlamaForCausalLM":
    """Load a network and its adapter, which stays beside the weights; :func:`start` has run.

    Args:
        model: directory, or the name of the built-in random model; any layout of files, quantized
            or not.
        adapter: directory in PEFT's layout.
        dtype: of the weights.
        ops: how to choose kernels, by op.
        topology: of processes that share the network; None is one process.
        to_pack: the caller will pack it for generation.
        as_trained: a base that was rounded while an adapter was trained over it is rounded again.

    Raises:
        UserError: a damaged checkpoint, an adapter of another model, or a type that the device
            cannot compute in.
    """
    from llm.llama.adapters.opening import load_adapter
    from llm.llama.build import load_model
    from llm.llama.quantization.network import quantization_of

    # No flag of training's: each op takes the device's best form, the loss too.
    options: dict[str, Any] = {"use_fused_head_and_loss_fn": True, "ops": ops, "to_pack": to_pack}
    record = None if adapter is None else read_record(adapter)
    if as_trained and record is not None and record.rounded_by and not _holds_integers(model):
        options["round_to"] = record.quantization
    network = load_model(model, dtype=dtype, topology=topology, **options)
    if adapter is None:
        return network
    shared = network.seams.shard is not None and quantization_of(network) is not None
    if shared and peft.read_config(adapter)["peft_type"] == "LORA":
        raise UserError(
            f"the adapter {adapter} over integer weights works in one process, and several were "
            "launched; merge it (merge_lora.py), or start one process"
        )
    if other := difference(record, quantization_of(network)):
        _log.warning("%s: %s; answers differ from those in training", adapter, other)
    return load_adapter(network, adapter)


def _holds_integers(model: str | Path) -> bool:
    return str(model) != TINY_NAME and load_quantization(Path(model)) is not None


@dataclass(frozen=True)
class OpenedModel(ModelTokens):
    """Something that generates and scores, with its tokenizer.

    Args:
        name: what servers call it.
        tokenizer: the one the model was trained with.
        runner: executes steps of generation.
        network: the network behind the runner; None where that is an exported program.
        topology: of the processes that share the network, of which this one leads.
        cache_blocks: of engines; enough for their sequences when not given.
        manifest: of an exported program.
        drafter: guesses tokens for the engine.
    """

    name: str
    tokenizer: Tokenizer
    runner: Runner
    network: "LlamaForCausalLM | None" = None
    topology: Topology = field(default_factory=Topology)
    cache_blocks: int | None = None
    manifest: Manifest | None = None
    drafter: Drafter | None = None

    @property
    def num_logits(self) -> int:
        """See ``ModelTokens``."""
        return self.runner.vocab_size

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See ``ModelTokens``."""
        return tuple(dict.fromkeys((*self.tokenizer.eos_ids, *self.runner.eos_ids)))

    @property
    def ops(self) -> tuple["Choice", ...]:
        """Which form each op of generation takes, and why."""
        from external_ops import native
        from external_ops.backend import Choice

        if self.network is None:
            built_in = () if self.manifest is None else self.manifest.ops
            own = ("native", native.level() if built_in else "", "exported with it")
            plain = ("plain", "", "exported as operators of Paddle")
            return tuple(
                Choice(op, *(own if f"llama_ops_{op}" in built_in else plain))
                for op in _GENERATING
                # Whole rows are scored by networks that are not packed; programs take no adapters.
                if op not in ("causal_attention", "low_rank")
            )
        from llm.llama.fused import why_not, why_not_fused

        choices = {choice.op: choice for choice in self.network.ops.choices}
        why = why_not_fused(self.network)
        if self.network.seams.fused is None:
            why = why_not(self.network) or "the network is not packed"
        if why is not None and choices["decoder"].form != "reference":
            choices["decoder"] = Choice("decoder", "reference", "", f"op by op: {why}")
        return tuple(choices[op] for op in _GENERATING)

    @property
    def paddle_version(self) -> str:
        """Of the library that runs it."""
        from paddle import version

        return str(version.full_version)

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may come to."""
        return self.runner.longest

    def extend(self, tokens: int) -> None:
        """Take rows of so many tokens; see ``llm.engine.runners.DygraphRunner.extend``."""
        if self.network is not None:
            from llm.engine.runners import DygraphRunner

            assert isinstance(self.runner, DygraphRunner)
            self.runner.extend(tokens)

    def open_engine(
        self,
        max_sequences: int,
        max_tokens: int,
        *,
        max_step_tokens: int = 512,
        usual_tokens: int | None = None,
    ) -> Engine:
        """Return an engine over the runner, whose cache it allocates anew.

        Args:
            max_sequences: requests that run together.
            max_tokens: prompt plus answer of the longest one.
            max_step_tokens: tokens of a step.
            usual_tokens: prompt plus answer to expect of each, where not all are the longest; the
                cache holds at least one that is. The longest when not given.

        Raises:
            UserError: more tokens than the context.
        """
        num_blocks = self.cache_blocks
        # Prefixes of single requests take blocks too.
        behind = self.adapters.longest if isinstance(self.runner, TakesAdapters) else 0
        if num_blocks is None and usual_tokens is not None:
            tokens = max(max_tokens, max_sequences * min(usual_tokens, max_tokens)) + behind
            num_blocks = -(-tokens // self.runner.block_size)
        self.extend(max_tokens)
        if num_blocks is None and behind:
            num_blocks = max_sequences * -(-(behind + max_tokens) // self.runner.block_size)
        return Engine(
            self.runner,
            max_sequences=max_sequences,
            max_tokens=max_tokens,
            num_blocks=num_blocks,
            max_step_tokens=max_step_tokens,
            eos_ids=self.tokenizer.eos_ids,
            drafter=self.drafter,
            compile_grammar=lambda spec: self.grammars.compile(*spec),
        )

    @property
    def adapters(self) -> "RequestAdapters":
        """The adapters that single requests may name; they come and go while requests run.

        Raises:
            UserError: an exported program, which takes none.
        """
        if not isinstance(self.runner, TakesAdapters):
            raise UserError(
                f"{self.name} is an exported program, which takes no adapters for single requests; "
                "open the model directory (--model_name_or_path)"
            )
        return self.runner.adapters

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that requests may name now; none of an exported program."""
        return self.adapters.names if isinstance(self.runner, TakesAdapters) else ()

    def differing_ends(self) -> str:
        """Return a line about end tokens that only the tokenizer, or only the model, names."""
        sides = (self.tokenizer.eos_ids, self.runner.eos_ids)
        if set(sides[0]) == set(sides[1]) or not all(sides):
            return ""
        shown = [", ".join(map(str, ids)) for ids in sides]
        return (
            f"end tokens: {shown[0]} by the tokenizer, {shown[1]} by the model's config; each of "
            "them ends an answer"
        )


def open_model(args: OpenArguments, found: Found) -> OpenedModel:
    """Load paddle and open what ``find_model`` found; tell which form each op takes.

    A network is packed for generation where it can be. Of processes that share one, rank 0 gets it;
    the others execute its steps in here (``llm.engine.processes``).

    Raises:
        UserError: see :func:`open_weights`; an export that needs native ops which are not there; a
            prefix that fills the context; an adapter of another model.
        SystemExit: the leader is done.
    """
    threads = start(args)
    model = _open_program(args, found, threads) if found.manifest else _open_directory(args, found)
    model = replace(model, drafter=_open_drafter(args, found, model.runner))
    loaded = [model.adapters.load(*place) for place in found.adapters.items()]
    from external_ops.backend import table

    if not _log.hasHandlers():  # the server logs in a way of its own
        _log.addHandler(logging.StreamHandler())
        _log.setLevel(logging.INFO)
    _log.info("ops on %s:\n%s", args.device, table(model.ops))
    runner = model.runner
    size = f"{runner.block_bytes / 1e3:.1f} KB for {runner.block_size} tokens"
    _log.info("cache in %s: %s", runner.cache_dtype, size)
    for one in loaded:
        _log.info("adapter %s: %.1f MiB", one.name, one.nbytes / 2**20)
    if ends := model.differing_ends():
        _log.info("%s", ends)
    return model


def _open_program(args: OpenArguments, found: Found, threads: int) -> OpenedModel:
    from llm.engine.runners import PredictorRunner

    program = (str(args.model_dir), args.model_prefix)
    runner = PredictorRunner(*program, device=args.device, threads=threads)
    return OpenedModel(
        found.name,
        found.tokenizer,
        runner,
        cache_blocks=args.cache_blocks,
        manifest=found.manifest,
    )


def open_packed(
    args: WeightsArguments, topology: Topology | None = None, *, to_export: bool = False
) -> "LlamaForCausalLM":
    """Load the network that flags name, packed for generation where it can be.

    Args:
        args: model, adapter and how to compute; :func:`start` has run.
        topology: of processes that share the network; None is one process.
        to_export: steps will be traced for an exported program, of which an adapter becomes a part.

    Raises:
        UserError: see :func:`open_weights`, or options that only packed networks can have.
    """
    from llm.llama.fused import pack_where_possible
    from llm.llama.merging import merge_lora
    from llm.llama.packed_cache import load_packed

    model, dtype = str(args.model_name_or_path), args.dtype or "float32"
    alone = topology is None or topology.layout.world_size == 1
    if args.path is None and alone:
        return load_packed(
            model,
            dtype=dtype,
            ops=args.op_modes,
            place=args.packed_cache,
            traced=to_export,
            packing=args.packing,
        )
    network = open_weights(
        model, adapter=args.path, dtype=dtype, ops=args.op_modes, topology=topology, to_pack=True
    )
    if to_export:
        merge_lora(network)
    pack_where_possible(network, to_export, **args.packing)
    return network


def _open_directory(args: OpenArguments, found: Found) -> OpenedModel:
    topology = topologies.start(args.layout, args.device)
    if topology.layout.world_size > 1:
        return _open_shared(args, found, topology)
    network = open_packed(args, topology)
    options: dict[str, Any] = {"cache_blocks": args.cache_blocks, "cache_dtype": args.cache_dtype}
    return open_network(network, found.tokenizer, found.name, **options)


def _open_shared(args: OpenArguments, found: Found, topology: Topology) -> OpenedModel:
    """Open the leader's model; a follower ends here, when the leader does."""
    from llm.engine.processes import Team, share

    team = Team(topology)
    with team.opening():
        network = open_packed(args, topology)
        runner = share(team, network, cache_dtype=args.cache_dtype)
    if runner is None:
        team.close()
        raise SystemExit(0)
    return OpenedModel(
        found.name, found.tokenizer, runner, network, topology, cache_blocks=args.cache_blocks
    )


def _open_drafter(args: OpenArguments, found: Found, runner: Runner) -> Drafter | None:
    if args.prompt_lookup_num_tokens is not None:
        return PromptLookup(args.prompt_lookup_num_tokens)
    if found.draft is None:
        return None
    from llm.engine.draft_model import DraftModel
    from llm.engine.runners import DygraphRunner
    from llm.llama.packed_cache import load_packed

    dtype = args.dtype or "float32"
    if found.manifest is not None:
        dtype = found.manifest.dtype
    network = load_packed(
        str(args.draft_model_name_or_path),
        dtype=dtype,
        ops=args.op_modes,
        place=args.packed_cache,
        packing=args.packing,
    )
    small = DygraphRunner(network, block_size=runner.block_size)
    return DraftModel(small, args.num_speculative_tokens)


def open_network(
    network: "LlamaForCausalLM",
    tokenizer: Tokenizer,
    name: str = "network",
    cache_blocks: int | None = None,
    cache_dtype: str = "auto",
) -> OpenedModel:
    """Open a network that is in memory, such as one in training.

    Raises:
        UserError: a prefix that fills the context, or a type of cache that the network's kernels
            have no form for.
    """
    from llm.engine.runners import DygraphRunner

    runner = DygraphRunner(network, cache_dtype=cache_dtype)
    return OpenedModel(name, tokenizer, runner, network, cache_blocks=cache_blocks)
