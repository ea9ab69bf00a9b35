"""Finetuning put together: the network with its adapter, what it saves, and answers to score."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import paddle
from paddle import Tensor, nn

from common.errors import UserError
from data.tokenizer import Tokenizer
from llm.config.finetune import (
    AdaptationArguments,
    FinetuneArguments,
    InstructArguments,
)
from llm.config.network import NetworkArguments
from llm.config.tools import QATArguments
from llm.engine.opening import open_network
from llm.engine.request import SamplingParams, requests
from llm.engine.texts import generate_texts
from llm.llama import build
from llm.llama.adapters.lora import (
    LoRAConfig,
    add_lora,
    load_lora,
    save_lora,
    trainable_parameters,
)
from llm.llama.adapters.prefix import PrefixConfig, add_prefix, load_prefix, save_prefix
from llm.llama.files.weights import load_weights
from llm.llama.modeling import LlamaForCausalLM
from llm.llama.quantization.network import check_trainable
from llm.llama.quantization.qat import prepare_qat, round_adapters
from llm.parallel.topology import Topology
from llm.runtime import return_large_memory
from llm.train.finetune_plan import FinetunePlan
from llm.train.objectives import Objective, next_token_objective
from llm.train.preference import DPOObjective, ReferencedPairs, reference_log_probs
from llm.train.processes import answer_scorer, network_options

REFERENCE_FILE = "reference_logps.npz"


def build_network(
    plan: FinetunePlan,
    network: NetworkArguments,
    qat: QATArguments,
    run: FinetuneArguments,
    topology: Topology,
) -> LlamaForCausalLM:
    """Load the model to start from, with rounding linears where asked for.

    Args:
        plan: of the run: the model directory, or the name of the built-in random model, and how its
            weights lie.
        network: which kernels run it.
        qat: quantization-aware training.
        run: says what layers recompute.
        topology: the running job; the network is this process's part.

    Raises:
        UserError: a missing or damaged checkpoint.
    """
    if plan.frozen.unusual:  # few bits are asked for where memory is short
        return_large_memory()
    options = network_options(network, run) | plan.frozen.options
    model = build.load_model(plan.base, **options, topology=topology)
    if qat.qat:
        prepare_qat(model, qat.qat_type)
    return model


def add_adapter(
    model: LlamaForCausalLM,
    adaptation: AdaptationArguments,
    *,
    start: Path | None,
    base_name: str,
    seed: int,
) -> None:
    """Freeze a network and give it the adapter to train, in place; nothing in full mode.

    Args:
        model: the network.
        adaptation: mode and sizes.
        start: adapter to go on from; a new one when not given.
        base_name: recorded in the adapter's configuration.
        seed: of a new adapter.

    Raises:
        UserError: targets that the network lacks, an adapter of another model, dropout in a network
            that rounds, or all of a quantized network.
    """
    if adaptation.mode == "full":
        check_trainable(model)
    if adaptation.lora and start is not None:
        load_lora(model, start, trainable=True)
    elif adaptation.lora:
        # The papers' scalings: 2, and 1 where the product starts as a part of the weight.
        usual = adaptation.lora_rank if adaptation.pissa else 2 * adaptation.lora_rank
        config = LoRAConfig(
            r=adaptation.lora_rank,
            lora_alpha=adaptation.lora_alpha or usual,
            lora_dropout=adaptation.lora_dropout,
            target_modules=adaptation.targets,
            use_rslora=adaptation.rslora,
            base_model_name_or_path=base_name,
            use_dora=adaptation.use_dora,
            init_lora_weights=adaptation.init_lora_weights,
            modules_to_save=tuple(adaptation.modules_to_save) or None,
        )
        add_lora(model, config, seed=seed)
    elif adaptation.prefix_tuning and start is not None:
        load_prefix(model, start, trainable=True)
    elif adaptation.prefix_tuning:
        prefix = PrefixConfig(
            num_virtual_tokens=adaptation.num_prefix_tokens,
            prefix_projection=adaptation.prefix_projection,
            encoder_hidden_size=adaptation.prefix_projection_hidden_size,
            base_model_name_or_path=base_name,
        )
        add_prefix(model, prefix, seed=seed)
    round_adapters(model)
    if adaptation.lora:
        set_rates(model, adaptation.lora_plus_scale)


def set_rates(model: LlamaForCausalLM, scale: float) -> None:
    """Let B, and whatever is a vector, learn faster than A (LoRA+, Hayou et al. 2024), in place.

    The same parameters as PEFT's ``create_loraplus_optimizer`` takes.

    Args:
        model: a network with a LoRA adapter.
        scale: their learning rate, as a multiple of the optimizer's.
    """
    for name, parameter in model.named_parameters():
        if not parameter.stop_gradient and (name.endswith("lora_B") or parameter.ndim == 1):
            parameter.optimize_attr["learning_rate"] = scale


def add_noise(model: LlamaForCausalLM, alpha: float | None, topology: Topology) -> None:
    """Have a network's embeddings be noisy in training (NEFTune, Jain et al. 2023), in place.

    Each number gets uniform noise of at most ``alpha / sqrt(tokens * hidden)``, tokens of a padded
    row, as in transformers' ``neftune_post_forward_hook``. Ranks that share a row's work draw the
    noise of one process and take their part of it.

    Args:
        model: the network, or this process's part of it.
        alpha: strength; None adds none.
        topology: the running job.
    """
    embedding: Any = model.model.embed_tokens
    layout = topology.layout
    if alpha is None or embedding is None:
        return
    shares = layout.tensor if layout.sequence_parallel else 1

    def noisy(layer: nn.Layer, _: Any, out: Tensor) -> Tensor | None:
        if not layer.training:
            return None
        batch, length, hidden = out.shape
        bound = alpha / math.sqrt(length * shares * layout.context * hidden)
        noise = paddle.uniform([batch, length * shares, hidden], "float32", -bound, bound)
        if shares > 1:
            first = topology.at.tensor * length
            noise = noise[:, first : first + length]
        return out + noise.astype(out.dtype)

    embedding.register_forward_post_hook(noisy)


def _load_full(model: LlamaForCausalLM, directory: Path, topology: Topology) -> None:
    load_weights(model, directory, tied=model.config.tie_word_embeddings, topology=topology)


def _load_lora(model: LlamaForCausalLM, directory: Path, **_: Any) -> None:
    load_lora(model, directory, trainable=True)


def _load_prefix(model: LlamaForCausalLM, directory: Path, **_: Any) -> None:
    load_prefix(model, directory, trainable=True)


def storage(
    mode: str,
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return how a mode's trained parameters are saved and loaded again.

    Args:
        mode: ``full``, ``lora`` or ``prefix``.
    """
    if mode == "lora":
        return save_lora, _load_lora
    if mode == "prefix":
        return save_prefix, _load_prefix
    return build.save_model, _load_full


def describe(model: LlamaForCausalLM, topology: Topology) -> str:
    """Return how much of the network is trained; where ranks share it, of this one's part."""
    trained, total = trainable_parameters(model)
    if not trained:
        raise UserError("nothing is trainable: no adapter was added and all weights are frozen")
    shared = topology.layout.tensor * topology.layout.pipeline > 1
    of_what = " of this process's part" if shared else ""
    return f"trainable parameters: {trained:,} of {total:,}{of_what} ({trained / total:.2%})"


def referenced(
    model: LlamaForCausalLM, plan: FinetunePlan, run: FinetuneArguments, topology: Topology
) -> dict[str, Any]:
    """Give preference pairs the log-probabilities of the initial model.

    Args:
        model: the network before training.
        plan: of the run: its ``parts`` are the pairs, its ``collate`` makes batches of them, and
            the checkpoint in ``resume`` holds the scores already.
        run: says how many pairs are scored together.
        topology: the running job.

    Raises:
        UserError: pairs that cannot be scored, or scores of other pairs.
    """
    scores = {}
    if plan.resume is not None:
        with np.load(plan.resume.path / REFERENCE_FILE) as arrays:
            scores = dict(arrays)
    result: dict[str, Any] = {}
    for part, pairs in plan.parts.items():
        if pairs is None:
            result[part] = None
            continue
        if part not in scores:
            score = answer_scorer(model, topology)
            size = run.per_device_eval_batch_size
            scores[part] = reference_log_probs(model, pairs, plan.collate, size, score)
        result[part] = ReferencedPairs(pairs, scores[part], plan.collate)
    return result


def save_references(datasets: dict[str, Any], directory: Path) -> None:
    """Write the initial model's scores beside a checkpoint, since training changes the model."""
    np.savez(directory / REFERENCE_FILE, **{k: d.logps for k, d in datasets.items() if d})


def save_beside(plan: FinetunePlan, directory: Path) -> None:
    """Write what belongs to a checkpoint beside what was trained and the flags."""
    assert plan.tokenizer is not None
    plan.tokenizer.save(directory)
    plan.frozen.save(directory)
    if plan.referenced:
        save_references(plan.referenced, directory)


def objective(adaptation: AdaptationArguments) -> Objective:
    """Return what training minimises: next tokens of answers, or a loss on pairs."""
    if not adaptation.dpo:
        return next_token_objective
    return DPOObjective(
        adaptation.dpo_beta,
        label_smoothing=adaptation.dpo_label_smoothing,
        loss_type=adaptation.dpo_loss_type,
    )


def flops_per_token(model: LlamaForCausalLM, seq_length: int) -> float:
    """Return the operations of one training token: frozen weights have no gradient to compute."""
    trained, total = trainable_parameters(model)
    full = model.config.flops_per_token(seq_length)
    return full if trained == total else full * 2 / 3


class Answers:
    """Generates greedy answers to the validation prompts.

    Args:
        model: the network as it is being trained.
        dataset: with ``prompt_ids(i)`` and ``answers(i)``.
        tokenizer: decodes.
        max_new_tokens: longest answer.
        batch_size: prompts generated together.
    """

    def __init__(
        self,
        model: LlamaForCausalLM,
        dataset: Any,
        tokenizer: Tokenizer,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self.model, self.dataset, self.tokenizer = model, dataset, tokenizer
        self.count = len(dataset)
        self.max_new_tokens, self.batch_size = max_new_tokens, batch_size

    def __call__(self) -> list[tuple[str, tuple[str, ...]]]:
        """Return each generated answer with the acceptable ones."""
        prompts = [list(self.dataset.prompt_ids(index)) for index in range(self.count)]
        model = open_network(self.model, self.tokenizer)
        longest = max(map(len, prompts))
        room = model.context - longest
        if room < 1:
            raise UserError(
                f"eval_with_do_generation: a prompt of {longest} tokens leaves no room for an "
                f"answer in the context of {model.context}; lower src_length"
            )
        new = min(self.max_new_tokens, room)
        engine = model.open_engine(min(self.batch_size, self.count), longest + new)
        asked = requests(prompts, SamplingParams(max_new_tokens=new, temperature=0.0))
        texts = generate_texts(engine, asked, [model.decoder() for _ in asked])
        return [(text.strip(), self.dataset.answers(index)) for index, text in enumerate(texts)]


def answers(
    model: LlamaForCausalLM,
    dataset: Any,
    tokenizer: Tokenizer,
    data: InstructArguments,
    run: FinetuneArguments,
) -> Answers | None:
    """Return the generator of answers that a run's flags ask for; None without a dataset."""
    if dataset is None:
        return None
    return Answers(model, dataset, tokenizer, data.longest_answer, run.per_device_eval_batch_size)
