"""This suite's models in lm-evaluation-harness (0.4.13): ``lm_eval --model paddle-llama``.

``--model_args pretrained=DIR[,lora_path=DIR]`` measures a checkpoint, ``program=DIR/llama`` an
exported program. Requests are encoded, truncated and windowed as the harness's Hugging Face
backend (``lm_eval/models/huggingface.py``) does, but for one thing: a rolling likelihood starts
from one BOS token, where that backend starts from two if the tokenizer adds one itself.
"""

import logging
from pathlib import Path
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs

from common.devices import AUTO, CPU
from common.errors import UserError
from llm import runtime
from llm.config.generation import OpenArguments
from llm.config.precision import SPELLINGS
from llm.engine.finding import find_model
from llm.engine.opening import open_model
from llm.engine.request import SamplingParams
from llm.engine.request import requests as as_requests
from llm.engine.texts import generate_texts
from llm.evaluation import report
from llm.evaluation.encoding import prefix_id
from llm.evaluation.scorer import checked_length, open_scorer

_logger = logging.getLogger(__name__)
_DEFAULT_BATCH = 8  # for batch_size=auto
_WARPING = {"top_k", "top_p", "repetition_penalty", "seed"}
_READ = {"until", "max_gen_toks", "do_sample", "temperature", *_WARPING}


class PaddleLlama(TemplateLM):
    """A model directory or an exported program behind the harness's interface.

    Args:
        pretrained: model directory in the Hugging Face layout.
        program: directory and file prefix of an exported program, instead.
        lora_path: LoRA adapter of the model.
        prefix_path: trained prefix of the model.
        tokenizer: directory or file; the one beside the model when not given.
        chat_template: built-in template or Jinja file, in place of the model's own.
        device: as the scripts' ``--device``; the harness's default, ``cuda:0``, is what ``auto``
            finds.
        dtype: type to compute in, float32 when not given; bfloat16 on CPU needs the native ops.
        threads: CPU threads; all cores when not given.
        batch_size: texts that run together; ``auto`` is 8.
        max_batch_size: accepted, without effect.
        max_length: context to use; the model's when not given.
        max_gen_toks: new tokens where a task does not say.
        add_bos_token: None adds a BOS where the tokenizer has one and does not say no.

    Raises:
        UserError: no model or two, a damaged one, or a value outside its range.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        program: str | None = None,
        lora_path: str | None = None,
        prefix_path: str | None = None,
        tokenizer: str | None = None,
        chat_template: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        threads: int | None = None,
        batch_size: int | str = _DEFAULT_BATCH,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
    ) -> None:
        super().__init__()
        args = OpenArguments(
            model_name_or_path=pretrained,
            lora_path=lora_path,
            prefix_path=prefix_path,
            model_dir=None if program is None else str(Path(program).parent),
            model_prefix="llama" if program is None else Path(program).name,
            tokenizer_name_or_path=tokenizer,
            chat_template=chat_template,
            device=_device(device),
            threads=threads,
            dtype=SPELLINGS.get(str(dtype), dtype),
        )
        args.validate()
        self.batch_size = _batch_size(batch_size)
        found = find_model(args)
        checked_length(max_length, found.context)
        self.tokenizer = found.tokenizer
        self._model = open_model(args, found)
        self._scorer = open_scorer(self._model, max_length=max_length, batch_size=self.batch_size)
        self.max_length = self._scorer.max_length
        self.max_gen_toks = max_gen_toks
        self._add_bos = add_bos_token
        self._dtype = args.dtype if found.manifest is None else found.manifest.dtype
        # Spelled control tokens count from the first templated prompt on.
        self._templated = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        eos = self.tokenizer.eos_id
        return prefix_id(self.tokenizer) if eos is None else eos

    @property
    def prefix_token_id(self) -> int:
        """The token that a text without context is predicted from."""
        return prefix_id(self.tokenizer)

    @property
    def tokenizer_name(self) -> str:
        """What makes two tokenizers, templates included, share cached requests or not."""
        return f"{self.tokenizer.name.replace('/', '__')}__{self.tokenizer.fingerprint[:16]}"

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Return a conversation as the template writes it.

        Without ``add_generation_prompt``, the last message is left open to be continued.

        Raises:
            DataError: no template, or one that refuses these messages.
        """
        self._templated = True
        text = self.tokenizer.render_chat(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Return the ids of a text; BOS comes first unless it is spelled or not wanted."""
        ids = self.tokenizer.encode(string, allow_special=self._templated)
        wanted = self._add_bos if add_special_tokens is None else add_special_tokens
        bos = self.tokenizer.bos_id
        if wanted is None:
            wanted = self.tokenizer.adds_bos
        if bos is None or not wanted or ids[:1] == [bos]:
            return ids
        return [bos, *ids]

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        before = self._scorer.truncated
        scores = self._scorer.loglikelihood([(one[1], one[2]) for one in requests])
        cut = self._scorer.truncated - before
        if cut:
            _logger.warning(
                "%d of %d contexts exceed %d tokens and lost their beginning",
                *(cut, len(requests), self.max_length),
            )
        answers = [(score.logprob, score.is_greedy) for score in scores]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request[0], answer)
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Return the log-likelihood of whole texts, in disjoint windows of the full context."""
        texts = [request.args[0] for request in requests]
        add_bos = bool(self._add_bos)
        documents = [self.tok_encode(text, add_special_tokens=add_bos) for text in texts]
        totals = self._scorer.rolling(documents, self.prefix_token_id)
        for text, total in zip(texts, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return answers, each cut before its first stop string.

        Raises:
            UserError: a setting that this suite does not have, or no room for a prompt.
        """
        if not requests:
            return []
        prompts, params, stops = [], [], []
        cut = 0
        for number, request in enumerate(requests):
            text, settings = request.args
            one, until = self._params(settings, number)
            room = self._model.context - one.max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={one.max_new_tokens} leaves no room for a prompt in the context "
                    f"of {self._model.context}; pass --gen_kwargs max_gen_toks=…"
                )
            ids = self.tok_encode(text)
            cut += len(ids) > room
            prompts.append(ids[-room:])
            params.append(one)
            stops.append(until)
        if cut:
            _logger.warning("%d of %d prompts lost their beginning", cut, len(requests))
        asked = as_requests(prompts, params)
        longest = max(request.max_length for request in asked)
        engine = self._model.open_engine(min(self.batch_size, len(asked)), longest)
        texts = generate_texts(engine, asked, [self._model.decoder() for _ in asked], stops)
        for request, answer in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return texts

    def _params(self, settings: dict[str, Any], number: int) -> tuple[SamplingParams, list[str]]:
        known = normalize_gen_kwargs(settings, self.max_gen_toks)
        if known.get("min_p") == 0:  # off, as some tasks write it
            del known["min_p"]
        unknown = sorted(known.keys() - _READ)
        if unknown:
            raise UserError(
                f"generation setting {unknown[0]!r} is not supported; known are "
                f"{', '.join(sorted(_READ))}"
            )
        temperature = float(known.get("temperature", 1.0)) if known["do_sample"] else 0.0
        warping = {"seed": number, **{k: v for k, v in known.items() if k in _WARPING}}
        params = SamplingParams(
            max_new_tokens=known["max_gen_toks"], temperature=temperature, **warping
        )
        return params, [stop for stop in known["until"] if stop]

    def get_model_info(self) -> dict[str, Any]:
        """Return what goes beside the results."""
        return {"model_dtype": self._dtype, "max_length": self.max_length, **report.environment()}


def _device(device: str | None) -> str:
    # The harness says cuda:0 unless told otherwise, and its own backend then takes what there is.
    name, _, number = (device or "cuda").partition(":")
    if name != "cuda":
        return str(device)
    found = runtime.resolve_device(AUTO)
    return f"{found}:{number}" if number not in ("", "0") and found != CPU else found


def _batch_size(value: int | str) -> int:
    text = str(value)
    if text.startswith("auto"):
        return _DEFAULT_BATCH
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"batch_size={value!r} has to be a whole number of at least 1, or auto")
    return int(text)
