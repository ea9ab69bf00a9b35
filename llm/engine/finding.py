"""What lies at the places that flags name; what does not fit is refused before paddle is loaded.

``llm.engine.opening`` goes on from there.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from common.errors import UserError
from common.gguf import SUFFIX, gguf_file
from data.tokenizer import Tokenizer, check_vocabulary, load_tokenizer, tokenizer_place
from llm.config.generation import OpenArguments
from llm.llama.config import LlamaConfig, load_config
from llm.llama.files import peft
from llm.llama.manifest import Manifest, load_manifest
from llm.parallel.rules import check_shape


@dataclass(frozen=True)
class Found:
    """What lies at a place; nothing is loaded yet.

    Args:
        name: what servers call the model.
        tokenizer: checked to belong to it.
        config: the architecture.
        context: tokens that prompt and answer may come to, any prefix included.
        manifest: of an exported program; None where it is a directory.
        draft: of a smaller model that is to guess for it.
        adapters: directories of those that single requests may name.
    """

    name: str
    tokenizer: Tokenizer
    config: LlamaConfig
    context: int
    manifest: Manifest | None = None
    draft: "Found | None" = None
    adapters: Mapping[str, str] = field(default_factory=dict)


def find_weights(
    model: str | Path,
    *,
    tokenizer: str | None = None,
    adapter: str | None = None,
    kind: str = "LORA",
    chat_template: str | None = None,
    add_bos_token: bool | None = None,
) -> Found:
    """Look at a model directory and what belongs to it.

    Args:
        model: directory, GGUF file, or the name of the built-in random model.
        tokenizer: directory or file; beside the adapter or the model when not given.
        adapter: directory in PEFT's layout.
        kind: the ``peft_type`` that the adapter has to have.
        chat_template: takes the place of the model's own, see ``load_tokenizer``.
        add_bos_token: likewise.

    Raises:
        UserError: no model, adapter or tokenizer there, a damaged one, or some that do not belong
            together.
    """
    config = load_config(model)
    place = tokenizer_place(tokenizer, adapter, str(model))
    found = load_tokenizer(place, chat_template=chat_template, add_bos_token=add_bos_token)
    check_vocabulary(found, config.vocab_size)
    if adapter is not None:
        peft.read_config(adapter, kind)
    name = (gguf_file(model) or Path(model)).resolve().name.removesuffix(SUFFIX)
    return Found(name, found, config, config.context)


def find_model(args: OpenArguments) -> Found:
    """Look at the directory or export that flags name.

    Raises:
        UserError: no flag names one; see :func:`find_weights`; an export that is damaged or has
            another tokenizer; a network that the launched processes cannot share; a draft model
            with other tokens; no adapter where flags name one.
    """
    found = _find_directory(args) if args.model_dir is None else _find_program(args)
    for name, directory in args.adapter_places.items():
        try:
            peft.read_config(directory)
        except UserError as error:
            raise UserError(f"adapters: {name}: {error}") from error
    found = replace(found, adapters=args.adapter_places)
    if args.draft_model_name_or_path is None:
        return found
    draft = find_weights(args.draft_model_name_or_path)
    same = draft.tokenizer.fingerprint == found.tokenizer.fingerprint
    if not same or draft.config.vocab_size != found.config.vocab_size:
        sides = [f"{one.tokenizer.name} of {one.config.vocab_size}" for one in (draft, found)]
        raise UserError(
            f"--draft_model_name_or_path {args.draft_model_name_or_path} has another vocabulary "
            f"({sides[0]} ids, the model {sides[1]}), so its tokens mean others; take a smaller "
            "model of the same family, or --prompt_lookup_num_tokens 10, which needs none"
        )
    return replace(found, draft=draft)


def _find_directory(args: OpenArguments) -> Found:
    if args.model_name_or_path is None:
        raise UserError(
            "a model is needed: --model_name_or_path DIR, or --model_dir DIR of an exported program"
        )
    found = find_weights(
        args.model_name_or_path,
        tokenizer=args.tokenizer_name_or_path,
        adapter=args.path,
        kind=args.kind,
        chat_template=args.chat_template,
        add_bos_token=args.add_bos_token,
    )
    check_shape(args.layout, found.config, seq_length=1, micro_batches=1)
    return found


def _find_program(args: OpenArguments) -> Found:
    assert args.model_dir is not None
    manifest = load_manifest(args.model_dir, args.model_prefix)
    place = args.tokenizer_name_or_path or args.model_dir
    tokenizer = load_tokenizer(
        place, chat_template=args.chat_template, add_bos_token=args.add_bos_token
    )
    manifest.check_tokenizer(tokenizer.name, tokenizer.fingerprint)
    check_vocabulary(tokenizer, manifest.architecture.vocab_size)
    return Found(
        manifest.model_name, tokenizer, manifest.architecture, manifest.max_model_len, manifest
    )
