"""Added tokens of directories of every kind: found in text, shown or not, kept, and in chats."""

import json
import logging
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers

from common.errors import DataError
from data.conversations.chat_encoding import ConversationEncoder
from data.tokenization import model_files
from data.tokenization.split import SplitTokenizer
from data.tokenizer import Tokenizer, load_tokenizer
from llm.engine.opening import OpenedModel
from tests.fuzz.tokenizer_worlds import make_world, random_text
from tests.fuzz.tokenizers import sampled_ids, streamed

THINK = {"content": "<think>", "special": False}
TURN = {"content": "<|turn|>", "special": True, "normalized": False}


def token(content: str, **flags: bool) -> dict[str, Any]:
    return {"content": content, "special": False, "normalized": False, **flags}


def with_files(source: Path, directory: Path, **files: Any) -> Path:
    """A directory with a vocabulary and JSON files."""
    directory.mkdir(parents=True, exist_ok=True)
    target = directory / ("tokenizer.json" if source.suffix == ".json" else "tokenizer.model")
    target.write_bytes(source.read_bytes())
    for name, content in files.items():
        (directory / f"{name}.json").write_text(json.dumps(content))
    return directory


def declared(first: int, *tokens: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"added_tokens_decoder": {str(first + n): t for n, t in enumerate(tokens)}, **more}


# Flags, text, and the text with what is a token in brackets. White space that a token takes with it
# is gone.
CUTS: dict[str, tuple[list[dict[str, Any]], str, list[str | int]]] = {
    "in the middle": ([token("<t>")], "a <t> b", ["a ", 0, " b"]),
    "twice, touching": ([token("<t>")], "<t><t>", [0, 0]),
    "the longest at a place": ([token("<t"), token("<t>x")], "a<t>xb<t>", ["a", 1, "b", 0, ">"]),
    "the first place": ([token("qzj"), token("zjk")], "qzjk", [0, "k"]),
    "takes the space before": ([token("<t>", lstrip=True)], "a \n<t> b", ["a", 0, " b"]),
    "takes the space after": ([token("<t>", rstrip=True)], "a <t> \n b", ["a ", 0, "b"]),
    "takes it once": ([token("<t>", lstrip=True, rstrip=True)], "<t>  <t>", [0, 0]),
    "no word around it": ([token("tok", single_word=True)], "tok, tokx", [0, ", tokx"]),
    "no word, of any letters": (
        [token("tok", single_word=True)],
        "étok tok٣ tok",
        ["étok tok٣ ", 0],
    ),
    "normalized ones come after": ([token("qz", normalized=True), token("z>")], "qz>", ["q", 1]),
    "a space sign": ([token("\u2581\u2581x")], "\u2581\u2581x  x", [0, "  x"]),
    "only white space": ([token("\n\n")], "a\n\n\nb", ["a", 0, "\nb"]),
    "not in ASCII": ([token("思考")], "他思考了", ["他", 0, "了"]),
    "special ones are characters beside others": (
        [token("<s2>", special=True), token("<t>")],
        "a<s2>b<t>",
        ["a<s2>b", 1],
    ),
    "special ones are characters": ([token("<s2>", special=True)], "a<s2>b", ["a<s2>b"]),
}


@pytest.mark.parametrize("kind", ["sentencepiece", "sentencepiece first", "tiktoken"])
@pytest.mark.parametrize("name", CUTS)
def test_text_is_cut_at_added_tokens(
    kind: str, name: str, tiny_model: Path, tiny_tiktoken: Path, tmp_path: Path
) -> None:
    tokens, text, expected = CUTS[name]
    if kind == "tiktoken":
        source, first = tiny_tiktoken, load_tokenizer(tiny_tiktoken).vocab_size
    else:
        source, first = tiny_model / "tokenizer.model", 700
    config = declared(first, *tokens, legacy=kind != "sentencepiece first")
    tokenizer = load_tokenizer(with_files(source, tmp_path, tokenizer_config=config))
    alone = load_tokenizer(source)
    itself = sentencepiece.SentencePieceProcessor(model_file=str(tiny_model / "tokenizer.model"))
    ids: list[int] = []
    for part in expected:
        if isinstance(part, int):
            ids.append(first + part)
        elif kind == "tiktoken":
            ids += alone.encode(part)
        elif kind == "sentencepiece first" and ids:
            ids += itself.encode("\n" + part)[len(itself.encode("\n")) :]
        else:
            ids += itself.encode(part)
    assert tokenizer.encode(text) == ids
    packed, _ = tokenizer.packed_encoder("<i4").encode([text])
    assert packed.tolist() == ids


@pytest.fixture
def metaspace(tmp_path: Path, prose: list[str]) -> Callable[[str], Path]:
    def make(scheme: str) -> Path:
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token="<unk>"))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
        tokenizer.decoder = tokenizers.decoders.Metaspace(prepend_scheme=scheme)
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=500, special_tokens=["<unk>", "<s>", "</s>"], show_progress=False
        )
        tokenizer.train_from_iterator(prose[:50], trainer)
        path = tmp_path / scheme / "tokenizer.json"
        path.parent.mkdir()
        tokenizer.save(str(path))
        return path

    return make


def test_tokens_that_are_not_special_are_shown(
    tiny_model: Path, tiny_tiktoken: Path, metaspace: Callable[[str], Path], tmp_path: Path
) -> None:
    for number, source in enumerate(
        (tiny_model / "tokenizer.model", tiny_tiktoken, metaspace("always"))
    ):
        first = load_tokenizer(source).vocab_size
        config = declared(first, THINK, TURN)
        tokenizer = load_tokenizer(
            with_files(source, tmp_path / str(number), tokenizer_config=config)
        )
        ids = [*tokenizer.encode("ab"), first, *tokenizer.encode("c"), first + 1]
        assert "<think>" in tokenizer.decode(ids)
        assert "<|turn|>" not in tokenizer.decode(ids)
        assert "<|turn|>" in tokenizer.decode(ids, skip_special=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)
        # Users' text makes the one that is not special, as in transformers, and not the other.
        assert first in tokenizer.encode("ab<think>c")
        assert first + 1 not in tokenizer.encode("<|turn|>")
        assert tokenizer.encode("<|turn|>", allow_special=True) == [first + 1]


def test_added_tokens_json_is_read_where_nothing_newer_is(tiny_model: Path, tmp_path: Path) -> None:
    source = tiny_model / "tokenizer.model"
    added = {"<|im_start|>": 700, "<|im_end|>": 701, "<x>": 702}
    names = {"additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>"}]}
    directory = with_files(
        source, tmp_path / "a", added_tokens=added, special_tokens_map=names, tokenizer_config={}
    )
    tokenizer = load_tokenizer(directory, chat_template="chatml")
    assert tokenizer.vocab_size == 703
    assert {"<|im_start|>", "<|im_end|>"} <= {*tokenizer.special.ids}
    assert "<x>" not in tokenizer.special.ids
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a <x>"}])
    assert [one for one in ids if one >= 700] == [700, 702, 701, 700]
    # transformers does not look at the file where tokenizer_config.json says it all.
    newer = with_files(
        source, tmp_path / "b", added_tokens=added, tokenizer_config=declared(700, THINK)
    )
    assert [one.content for i, one in load_tokenizer(newer).added.items() if i >= 700] == [
        "<think>"
    ]


def test_a_named_token_that_is_missing_takes_the_next_id(tiny_model: Path, tmp_path: Path) -> None:
    names = {"pad_token": "[PAD]", "eos_token": "</s>"}
    directory = with_files(tiny_model / "tokenizer.model", tmp_path, tokenizer_config=names)
    tokenizer = load_tokenizer(directory)
    assert (tokenizer.pad_id, tokenizer.vocab_size, tokenizer.eos_ids) == (700, 701, (2,))


def test_what_a_directory_says_is_saved(
    tiny_model: Path, tiny_tiktoken: Path, metaspace: Callable[[str], Path], tmp_path: Path
) -> None:
    for number, source in enumerate(
        (tiny_model / "tokenizer.model", tiny_tiktoken, metaspace("first"))
    ):
        first = load_tokenizer(source).vocab_size
        flags = token("<u>", lstrip=True, rstrip=True, single_word=True, normalized=True)
        config = declared(first, THINK, flags, TURN, legacy=False, model_max_length=77)
        place = with_files(source, tmp_path / f"{number}", tokenizer_config=config)
        (place / "additional_chat_templates").mkdir()
        (place / "additional_chat_templates" / "tool_use.jinja").write_text("{{ 'T' }}")
        (place / "chat_template.jinja").write_text("{{ 'D' }}")
        before = load_tokenizer(place)
        before.save(tmp_path / f"{number}-saved")
        after = load_tokenizer(tmp_path / f"{number}-saved")
        assert after.added[first + 1].fields() == flags
        text = "a <u> b<think>c <|turn|>"
        for name in ("vocab_size", "special", "added", "fingerprint", "templates", "prefix"):
            assert getattr(after, name) == getattr(before, name), name
        assert after.encode(text) == before.encode(text)
        saved = json.loads((tmp_path / f"{number}-saved/tokenizer_config.json").read_text())
        assert (saved["legacy"], saved["model_max_length"]) == (False, 77)
        without = load_tokenizer(source)
        assert without.fingerprint != before.fingerprint


def test_a_copy_in_another_process_forgets_nothing(
    tiny_tiktoken: Path, metaspace: Callable[[str], Path]
) -> None:
    """The libraries' own pickles lose that control tokens' texts are characters."""
    for source in (tiny_tiktoken, metaspace("always")):
        tokenizer = load_tokenizer(source)
        text = next(iter(tokenizer.special.ids)) + "a"
        copy = pickle.loads(pickle.dumps(tokenizer))
        assert copy.encode(text) == tokenizer.encode(text)
        assert not {*copy.encode(text)} & {*copy.special.ids.values()}


TURNS = [
    {"role": "user", "content": "Hello </s> there"},
    {"role": "assistant", "content": "Hi"},
    {"role": "user", "content": " two"},
]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.mark.parametrize("scheme", ["first", "always", "never"])
def test_turns_are_encoded_as_the_whole_rendering_is(
    scheme: str, metaspace: Callable[[str], Path]
) -> None:
    path = metaspace(scheme)
    tokenizer = load_tokenizer(path, chat_template=TEMPLATE)
    itself = tokenizers.Tokenizer.from_file(str(path))
    harmless = [{**turn, "content": turn["content"].replace("</s>", "")} for turn in TURNS]
    text = tokenizer.render_chat(harmless)
    ids = tokenizer.apply_chat_template(harmless)
    assert ids == itself.encode(text, add_special_tokens=False).ids
    # A control token's text in a message stays text.
    ends = tokenizer.apply_chat_template(TURNS).count(2)
    assert ends == tokenizer.apply_chat_template(harmless).count(2) == 3
    # What is learnt begins where serving's prompt ends.
    encoded = ConversationEncoder(tokenizer).encode(TURNS[:2])
    prompt = tokenizer.apply_chat_template(TURNS[:1])
    assert encoded.ids[: encoded.prompt].tolist() == prompt
    assert encoded.ids[-1] == 2
    answer = itself.encode("<s>Hi", add_special_tokens=False).ids[1:]
    spaced = scheme == "always"  # nothing but that space parts "assistant:" and "Hi"
    assert (encoded.ids[encoded.prompt : -1].tolist() == answer) is (spaced or scheme != "always")


def test_a_control_token_of_single_words_inside_a_word_is_spelled(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = declared(700, token("qturn", special=True, single_word=True))
    directory = with_files(tiny_model / "tokenizer.model", tmp_path, tokenizer_config=config)
    tokenizer = load_tokenizer(
        directory, chat_template="{{ 'xqturn qturn: ' + messages[0].content }}"
    )
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "a"}])
    assert ids == [*tokenizer.encode("xqturn "), 700, *tokenizer.encode(": a")]


# Tokens and a template: control tokens that mind what is beside them. The fuzz found them.
NEIGHBOURS: dict[str, tuple[list[dict[str, Any]], str]] = {
    "white space that the one before takes": (
        [
            token("  ", special=True, rstrip=True),
            token("\n\t", special=True, lstrip=True),
        ],
        "{{ 'a  \n\tb' + messages[0].content + '\n\t' }}",
    ),
    "white space that the one before takes, and that is found all the same": (
        [token(" \t", special=True, rstrip=True), token("\n\t", special=True)],
        "{{ 'a \\t\\n\\t\\n\\tb' + messages[0].content + ' \\t \\t' }}",
    ),
    "a token of words beside one of single words": (
        [token("#1", single_word=True), token("_x_", special=True)],
        "{{ messages[0].content + '#1_x_#1 _x_' }}",
    ),
    "no word beside one of single words": (
        [token("#1", single_word=True), token("<x>", special=True)],
        "{{ messages[0].content + '<x>#1<x>' }}",
    ),
    "a letter that only a newer Unicode has beside one of single words": (
        [token("#1", special=True, single_word=True)],
        "{{ messages[0].content + '\U00032244#1 #1' }}",
    ),
    "a symbol that is one of words beside one of single words": (
        [token("#1", special=True, single_word=True)],
        "{{ messages[0].content + '\u24b6#1 #1' }}",
    ),
    "no white space for the library, though for Python": (
        [token("  ", special=True, rstrip=True), token("\x1c", special=True, lstrip=True)],
        "{{ messages[0].content + ' a  \x1cb' }}",
    ),
    "takes the space of texts on both sides": (
        [token("<x>", special=True, lstrip=True, rstrip=True)],
        "{{ messages[0].content + ' <x> ' + messages[0].content }}",
    ),
}


@pytest.mark.parametrize("name", NEIGHBOURS)
def test_control_tokens_of_templates_beside_others(
    name: str, metaspace: Callable[[str], Path], tmp_path: Path
) -> None:
    tokens, template = NEIGHBOURS[name]
    source = metaspace("first")
    first = load_tokenizer(source).vocab_size
    directory = with_files(source, tmp_path / "d", tokenizer_config=declared(first, *tokens))
    tokenizer = load_tokenizer(directory, chat_template=template)
    messages = [{"role": "user", "content": "some words"}]
    text = tokenizer.render_chat(messages)
    expected = library_of(directory).encode(text, add_special_tokens=False).ids
    assert tokenizer.apply_chat_template(messages) == expected


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "a text that the vocabulary has": (
        {"tokenizer_config": declared(700, token("<s>"))},
        r"calls id 700 '<s>', the model file has it as id 1",
    ),
    "a flag that is no flag": (
        {"tokenizer_config": declared(700, {"content": "<t>", "lstrip": 1})},
        "lstrip must be true or false, got 1",
    ),
    "no ids": ({"added_tokens": {"<t>": "700"}}, r'added_tokens.json must look like \{"<pad>"'),
    "a setting that changes text": (
        {"tokenizer_config": {"do_lower_case": True}},
        "do_lower_case is True, which would change how text is read and is not done here: remove",
    ),
    "templates that are none": (
        {"tokenizer_config": {"chat_template": [{"name": "default"}]}},
        "chat_template must be a text or look like",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_directory_is_refused(name: str, tiny_model: Path, tmp_path: Path) -> None:
    files, message = MISTAKES[name]
    with pytest.raises(DataError, match=message):
        load_tokenizer(with_files(tiny_model / "tokenizer.model", tmp_path, **files))


def test_keys_that_mean_nothing_are_named_once(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = {"author": "me", "image_size": 3, "padding_side": "left"}
    directory = with_files(tiny_model / "tokenizer.model", tmp_path, tokenizer_config=config)
    model_files._tell.cache_clear()
    with caplog.at_level(logging.WARNING):
        load_tokenizer(directory)
        load_tokenizer(directory)
    (record,) = caplog.records
    assert record.getMessage().endswith("author, image_size mean nothing here and are left aside")


# Templates

NAMED = [{"name": "rag", "template": "{{ 'R' }}"}, {"name": "tool_use", "template": "{{ 'T' }}"}]


def test_templates_without_a_default_are_named(tiny_model: Path, tmp_path: Path) -> None:
    config = {"chat_template": NAMED}
    directory = with_files(tiny_model / "tokenizer.model", tmp_path, tokenizer_config=config)
    tokenizer = load_tokenizer(directory)
    message = r"has the chat templates rag, tool_use and none called 'default': choose one .*--chat"
    with pytest.raises(DataError, match=message):
        tokenizer.render_chat([TURNS[0]])
    # The cure, and what has tools needs none.
    assert load_tokenizer(directory, chat_template="rag").render_chat([TURNS[0]]) == "R"
    assert tokenizer.render_chat([TURNS[0]], tools=[{"name": "f"}]) == "T"
    with pytest.raises(
        DataError, match="unknown chat template 'rog': choose rag, tool_use, llama2"
    ):
        load_tokenizer(directory, chat_template="rog")
    # Files come before the list, as in transformers.
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "short.jinja").write_text("{{ 'S' }}")
    assert {*load_tokenizer(directory).templates} == {"short"}
    (directory / "chat_template.jinja").write_text("{{ 'D' }}")
    assert load_tokenizer(directory).render_chat([TURNS[0]]) == "D"


def test_tools_get_the_template_for_tools(tiny_model: Path, tmp_path: Path) -> None:
    default = {"name": "default", "template": "{{ 'D' }}"}
    config = {"chat_template": [default, *NAMED]}
    directory = with_files(tiny_model / "tokenizer.model", tmp_path, tokenizer_config=config)
    tokenizer = load_tokenizer(directory)
    assert tokenizer.render_chat([TURNS[0]]) == "D"
    assert tokenizer.render_chat([TURNS[0]], tools=[]) == "D"
    tools = [{"name": "f"}]
    assert tokenizer.decode(tokenizer.apply_chat_template([TURNS[0]], tools=tools)) == "T"


# Streams


@pytest.fixture
def falling_back(tmp_path: Path) -> Tokenizer:
    """Llama 2's decoder on a vocabulary of bytes and "a", in which broken bytes break their run."""
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)} | {"a": 256, "\u2581": 257}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], byte_fallback=True))
    steps = [tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    tokenizer.decoder = tokenizers.decoders.Sequence(steps)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    return load_tokenizer(tmp_path)


def test_bytes_in_a_row_wait_for_what_ends_them(falling_back: Tokenizer) -> None:
    ids = [*"中".encode(), 0xFF, 256, *"é".encode()]
    assert falling_back.decode(ids) == "\ufffd\ufffd\ufffd\ufffdaé"
    assert streamed(falling_back, ids) == falling_back.decode(ids)


def test_a_prompt_of_bytes_is_not_in_the_answer(falling_back: Tokenizer) -> None:
    model = OpenedModel("m", falling_back, runner=None)
    prompt = [256, *"中".encode()]
    assert model.text([256], prompt) == "a"
    assert model.text([*"文".encode(), 256], prompt) == "文a"
    assert model.text([0xAD, 256], prompt[:-1]) == "中a"


# A slice of `make fuzz FUZZ=tokenizers`, beside the library instead of transformers


def library_of(directory: Path) -> tokenizers.Tokenizer:
    itself = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    config = json.loads((directory / "tokenizer_config.json").read_text())
    for _, fields in sorted(config["added_tokens_decoder"].items(), key=lambda item: int(item[0])):
        content = {**fields}.pop("content")
        flags = {name: flag for name, flag in fields.items() if name != "content"}
        itself.add_tokens([tokenizers.AddedToken(content, **flags)])
    return itself


def check_case(tokenizer: Tokenizer, itself: tokenizers.Tokenizer | None, text: str) -> None:
    rng = random.Random(text)
    for special in (True, False):
        ids = tokenizer.encode(text, allow_special=special)
        if itself is not None:
            itself.encode_special_tokens = not special
            assert ids == itself.encode(text, add_special_tokens=False).ids
            assert tokenizer.decode(ids) == itself.decode(ids)
    sample = sampled_ids(rng, tokenizer, text)
    assert streamed(tokenizer, sample) == tokenizer.decode(sample)
    packed, _ = tokenizer.packed_encoder("<i4").encode([text])
    assert packed.tolist() == tokenizer.encode(text)


@pytest.mark.parametrize("seed", [0, 1, 2, 3, 4, 5])
def test_random_tokens_and_texts(seed: int, tmp_path: Path) -> None:
    world = make_world(seed, tmp_path)
    tokenizer = load_tokenizer(world.directory)
    itself = None if isinstance(tokenizer, SplitTokenizer) else library_of(world.directory)
    for case in range(25):
        check_case(tokenizer, itself, random_text(random.Random(f"{seed} {case}"), world.added))
