"""Random model directories with tokenizers of every kind, for `tests/fuzz/tokenizers.py`."""

import base64
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data.corpus.stdlib_corpus import documentation_strings
from data.tokenization.training import train_sentencepiece

KINDS = ("sentencepiece", "tiktoken", "json")
# Names in use, and others at which searching goes wrong: one inside another, spaces, words, signs.
CONTENTS = (
    *("<think>", "</think>", "<|im_start|>", "<|im_end|>", "[INST]", "[/INST]", "<pad>", "[PAD]"),
    *("<think>\n", "<a>", "<a><b>", "a>", "word", "wor", "the", " the", "  ", "\t", "\n\n", "_x_"),
    *(
        "é",
        "中文",
        "😀",
        "\u2581\u2581",
        "\u2581a",
        "<|eot|>",
        "<tool_call>",
        "...",
        "'s",
        "\xa0",
        "#1",
    ),
)
PIECES = (
    *("a", "b", "the", "The word", "x1", "12345", "don't", "_", " ", "  ", "     ", "\n", "\n\n\n"),
    *(
        "\r\n",
        "\t",
        "\x0b",
        "\u3000",
        "\xa0",
        "\x85",
        "\u2028",
        "\u200b",
        "\u2581",
        "\x1c",
        "\u180e",
    ),
    *(
        ".",
        ",",
        "!!",
        "(",
        "</",
        "<",
        ">",
        "|",
        "<0x0A>",
        "中文",
        "你好，世界。",
        "日本語",
        "한국어",
    ),
    *(
        "é",
        "e\u0301",
        "ß",
        "ſ",
        "İ",
        "ﬁ",
        "½",
        "Ⅳ",
        "٣",
        "😀",
        "👨‍👩‍👧",
        "🇩🇪",
        "\U0010ffff",
        "\ufeff",
    ),
    *("\ufffd", "\x01", "\x7f", "[INST", "think>", "<think", "word_", "Ωmega", "ก็"),
)
TEMPLATE = (
    "{OPEN}{% for m in messages %}{BEGIN}{{ m['role'] }}{MID}{{ m['content'] }}{END}"
    "{% endfor %}{% if add_generation_prompt %}{BEGIN}assistant{MID}{% endif %}"
)


@dataclass(frozen=True)
class Added:
    """An added token as Hugging Face's files have it; written apart from the code under test."""

    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class World:
    """A directory, and what is known of it.

    Attributes:
        kind: of vocabulary file.
        directory: where it lies.
        added: its added tokens by id.
        template: of chats, with tokens of it.
        about: for messages.
    """

    kind: str
    directory: Path
    added: dict[int, Added]
    template: str
    about: str

    def asked(self) -> dict[str, Any]:
        """What the peer is told."""
        added = {str(number): asdict(token) for number, token in self.added.items()}
        return {"kind": self.kind, "directory": str(self.directory), "added": added}


def make_world(seed: int, root: Path) -> World:
    """Make the directory of a seed."""
    rng = random.Random(f"world {seed}")
    kind = KINDS[seed % len(KINDS)]
    directory = root / str(seed)
    directory.mkdir()
    config: dict[str, Any] = {"bos_token": "<s>", "eos_token": "</s>"}
    about, library = "", None
    if kind == "sentencepiece":
        content = _sentencepiece(root)
        (directory / "tokenizer.model").write_bytes(content)
        config |= {"unk_token": "<unk>", "legacy": rng.random() < 0.5}
        model = sentencepiece.SentencePieceProcessor(model_proto=content)
        pieces = {model.id_to_piece(n): n for n in range(700)}
        named, about = ("<unk>", "<s>", "</s>"), f"legacy {config['legacy']}"
    elif kind == "tiktoken":
        content = _tiktoken()
        (directory / "tokenizer.model").write_bytes(content)
        config = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
        ranks = [base64.b64decode(line.split()[0]) for line in content.splitlines()]
        # Texts that are spelled as their bytes are; another one is new to transformers.
        plain = (one.decode(errors="replace") for one in ranks)
        pieces = {one: rank for rank, one in enumerate(plain) if re.fullmatch("[!-~]+", one)}
        pieces |= {text: len(ranks) + n for n, text in enumerate(_llama3())}
        named = tuple(_llama3())
    else:
        about = rng.choice(list(SHAPES))
        library = tokenizers.Tokenizer.from_str(_trained(about))
        pieces, named = library.get_vocab(), ("<s>", "</s>")
    own = {pieces[text]: Added(text, special=True) for text in named}
    free, new = count(max(pieces.values()) + 1), {}
    for token in _tokens(rng, list(named)):
        new[pieces[token.content] if token.content in pieces else next(free)] = token
    if library is not None:
        ready = list(new.values())[: rng.randrange(7)]
        library.add_tokens([_library(token) for token in ready])
        library.save(str(directory / "tokenizer.json"))
    _declare(rng, directory, config, {**own, **new}, new)
    return World(kind, directory, {**own, **new}, _template(rng, {**own, **new}), about)


def _tokens(rng: random.Random, taken: list[str]) -> Iterator[Added]:
    plain = rng.random() < 0.3
    for content in rng.sample(CONTENTS, rng.randrange(7)):
        if content not in taken and (len(content) > 1 or content.isascii()):
            flags = [not plain and rng.random() < 0.25 for _ in range(3)]
            special = rng.random() < 0.5
            yield Added(content, special, *flags, normalized=not special and rng.random() < 0.5)


def _declare(
    rng: random.Random,
    directory: Path,
    config: dict[str, Any],
    added: dict[int, Added],
    new: dict[int, Added],
) -> None:
    """Say in the directory's files, in one of the ways in use, which tokens it has."""
    plain = all(
        token == Added(token.content, token.special, normalized=not token.special)
        for token in new.values()
    )
    if plain and not (directory / "tokenizer.json").exists():
        named = [token.content for token in new.values() if token.special]
        texts = {token.content: number for number, token in new.items()}
        (directory / "added_tokens.json").write_text(json.dumps(texts))
        special = {"additional_special_tokens": named, "eos_token": config["eos_token"]}
        (directory / "special_tokens_map.json").write_text(json.dumps(special))
    else:
        shown = {**added, **new} if rng.random() < 0.5 else new or added
        config["added_tokens_decoder"] = {str(one): asdict(token) for one, token in shown.items()}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def _template(rng: random.Random, added: dict[int, Added]) -> str:
    texts = [token.content for token in added.values() if token.special][:12]
    template = TEMPLATE
    for place in ("OPEN", "BEGIN", "MID", "END"):
        text = rng.choice([*texts, *texts, "\n", " ", ""]) + rng.choice(["", "", "\n", " ", "\n\n"])
        template = template.replace(f"{{{place}}}", "{{ " + json.dumps(text) + " }}")
    return template


def random_text(rng: random.Random, added: dict[int, Added], *, special: bool = True) -> str:
    """Return a text of hard characters, any characters, and the added tokens' texts."""
    contents = [token.content for token in added.values() if special or not token.special]
    contents = contents[:3] + contents[-8:]
    parts = []
    for _ in range(rng.randrange(14)):
        draw = rng.random()
        if contents and draw < 0.3:
            parts.append(rng.choice(contents))
        elif draw < 0.4:
            low, high = rng.choice([(0, 0x7F), (0x80, 0xD7FF), (0xE000, 0x10FFFF)])
            parts.append(chr(rng.randint(low, high)))
        else:
            parts.append(rng.choice(PIECES))
    return "".join(parts)


# Vocabularies, made once a run


@cache
def _prose() -> list[str]:
    return list(islice(documentation_strings(Path(os.__file__).parent), 120))


@cache
def _sentencepiece(root: Path) -> bytes:
    return train_sentencepiece(_prose(), 700, root / "tokenizer.model").read_bytes()


@cache
def _tiktoken() -> bytes:
    counts: Counter[bytes] = Counter()
    for text in _prose():
        content = text.encode()
        for size in (2, 3, 4):
            counts.update(content[at : at + size] for at in range(0, len(content) - size, 3))
    frequent = sorted((one for one, _ in counts.most_common(600)), key=lambda one: (len(one), one))
    every = [*(bytes([byte]) for byte in range(256)), *frequent]
    lines = [b"%s %d\n" % (base64.b64encode(one), rank) for rank, one in enumerate(every)]
    return b"".join(lines)


def _llama3() -> list[str]:
    """Return the control tokens of Meta's Llama 3.1, in order."""
    reserved = [f"<|reserved_special_token_{n}|>" for n in range(248)]
    return [
        *("<|begin_of_text|>", "<|end_of_text|>", *reserved[:2], "<|finetune_right_pad_id|>"),
        *(reserved[2], "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>", "<|eot_id|>"),
        *("<|python_tag|>", *reserved[3:]),
    ]


def _library(token: Added) -> tokenizers.AddedToken:
    fields = asdict(token)
    return tokenizers.AddedToken(fields.pop("content"), **fields)


@cache
def _trained(shape: str) -> str:
    model, make = SHAPES[shape]
    tokenizer = tokenizers.Tokenizer(model())
    make(tokenizer)
    options = {"special_tokens": ["<s>", "</s>"], "show_progress": False, "vocab_size": 700}
    if shape == "unigram":
        trainer = trainers.UnigramTrainer(unk_token="<unk>", **options)
    else:
        alphabet = pre_tokenizers.ByteLevel.alphabet() if "byte" in shape else []
        trainer = trainers.BpeTrainer(initial_alphabet=alphabet, **options)
    tokenizer.train_from_iterator(_prose(), trainer)
    if "byte" not in shape and shape != "unigram":
        text = json.loads(tokenizer.to_str())
        vocabulary = text["model"]["vocab"]
        for byte in range(256):
            vocabulary.setdefault(f"<0x{byte:02X}>", len(vocabulary))
        return json.dumps(text)
    return tokenizer.to_str()


def _llama_decoder(*, strip: bool) -> decoders.Decoder:
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if strip else steps)


def _llama3_like(tokenizer: tokenizers.Tokenizer) -> None:
    pattern = tokenizers.Regex(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(pattern, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()


def _gpt2_like(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()


def _prepending(tokenizer: tokenizers.Tokenizer) -> None:
    """As Llama 2's own tokenizer.json."""
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = _llama_decoder(strip=True)


def _metaspace(scheme: str) -> Callable[[tokenizers.Tokenizer], None]:
    def make(tokenizer: tokenizers.Tokenizer) -> None:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
        tokenizer.decoder = _llama_decoder(strip=scheme != "never")

    return make


def _unigram(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()


def _fallback() -> models.BPE:
    return models.BPE(byte_fallback=True, fuse_unk=True)


SHAPES: dict[str, tuple[Callable[[], Any], Callable[[tokenizers.Tokenizer], None]]] = {
    "byte level": (models.BPE, _llama3_like),
    "byte level, prefix space": (models.BPE, _gpt2_like),
    "prepend": (_fallback, _prepending),
    "metaspace first": (_fallback, _metaspace("first")),
    "metaspace always": (_fallback, _metaspace("always")),
    "metaspace never": (_fallback, _metaspace("never")),
    "unigram": (models.Unigram, _unigram),
}
