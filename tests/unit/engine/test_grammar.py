"""Answers that obey a grammar, held by jsonschema and by regular expressions of Python."""

import json
import random
import re
import time

import jsonschema
import numpy as np
import pytest

from common.errors import UserError
from data.tokenization.added_tokens import Region
from data.tokenizer import load_tokenizer
from external_ops import native
from llm.engine.draft_model import DraftModel
from llm.engine.engine import Engine
from llm.engine.grammar import Grammars, check
from llm.engine.opening import open_network
from llm.engine.request import GrammarSpec, Request, SamplingParams
from llm.engine.runners import DygraphRunner
from llm.engine.speculation import PromptLookup
from llm.llama.build import build_model
from llm.llama.config import PRESETS, TINY_NAME
from llm.llama.fused import pack
from tests.fuzz.schema_cases import whole

CONFIG = PRESETS["tiny-random-llama"].replace(num_hidden_layers=1)


@pytest.fixture(scope="module")
def model():
    network = build_model(CONFIG, seed=3, to_pack=True)
    network = pack(network) if native.available() else network
    return open_network(network, load_tokenizer(TINY_NAME))


def drafters():
    yield None
    yield PromptLookup(5)
    yield DraftModel(DygraphRunner(build_model(CONFIG, seed=4)), 3)


def test_answers_obey_their_schemas_and_end_by_themselves(model, eager):
    """At temperature 1 on random weights; guesses change no answer."""
    rng = random.Random(5)
    schemas = [whole(rng) for _ in range(70)]
    grammars = [model.grammars.compile("json_schema", one) for one in schemas]
    requests = [
        Request([5, 6, n], SamplingParams(max_new_tokens=400, seed=n), grammar=grammar)
        for n, grammar in enumerate(grammars)
    ]
    answers = []
    for drafter in drafters():
        engine = Engine(
            model.runner, max_sequences=24, max_tokens=403, num_blocks=900, drafter=drafter
        )
        answers.append(engine.generate(requests))
        assert (engine.num_drafted > 0) == (drafter is not None)
    for one, answer in zip(schemas, answers[0], strict=True):
        text = model.text(answer.ids)
        assert answer.finish_reason == "stop", f"{text!r} of {one} does not end"
        jsonschema.validate(json.loads(text), one)
    if native.available():
        assert answers[1] == answers[0] and answers[2] == answers[0]


@pytest.mark.parametrize(
    ("kind", "source", "pattern"),
    [
        ("regex", r"[0-9]{3}-[a-f]{2}", r"[0-9]{3}-[a-f]{2}"),
        ("choice", ["yes", 'n"o', "vielleicht – ja"], 'yes|n"o|vielleicht – ja'),
        ("lark", 'start: "a"+ NUM\nNUM: /[0-9]{2}/', r"a{1,}[0-9]{2}"),
        ("gbnf", 'root ::= ("x" | "y") "-" [0-9]', r"[xy]-[0-9]"),
        ("json_object", None, r"\{.*"),
    ],
)
def test_kinds(model, kind, source, pattern):
    grammar = model.grammars.compile(kind, source)
    params = SamplingParams(max_new_tokens=60, seed=1, temperature=0.8, repetition_penalty=1.2)
    requests = [Request([7], params, choice, grammar=grammar) for choice in range(6)]
    for answer in model.open_engine(4, 70).generate(requests):
        text = model.text(answer.ids)
        if answer.finish_reason == "length" and kind in ("lark", "json_object"):
            continue
        assert re.fullmatch(pattern, text, re.DOTALL), text


def test_engines_compile_what_requests_bring_as_text(model):
    """Plain data gives the answer of the compiled grammar; each text is compiled once."""
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}
    spec = GrammarSpec("json_schema", json.dumps(schema))
    params = SamplingParams(30, seed=6)
    engine = model.open_engine(4, 40)
    (told,) = engine.generate([Request([7], params, grammar=spec)])
    compiled = model.grammars.compile("json_schema", schema)
    (found,) = engine.generate([Request([7], params, grammar=compiled)])
    assert told == found and jsonschema.validate(json.loads(model.text(told.ids)), schema) is None
    again = model.grammars.compile(*GrammarSpec("choice", ("a", "b")))
    assert model.grammars.compile("choice", ["a", "b"]) is again
    with pytest.raises(UserError, match="this engine compiles no grammars"):
        Engine(model.runner).add(Request([7], grammar=spec))


def test_a_grammar_beside_plain_requests_changes_none_of_them(model):
    params = SamplingParams(max_new_tokens=12, seed=4, ignore_eos=True)
    plain = [Request([n, 9], params) for n in range(3, 6)]
    expected = model.open_engine(4, 40).generate(plain)
    bound = Request([9], SamplingParams(12), grammar=model.grammars.compile("regex", "[ab]{9}"))
    assert model.open_engine(4, 40).generate([*plain, bound])[:3] == expected


@pytest.mark.parametrize(
    ("kind", "source", "message"),
    [
        ("json_schema", {"type": "foo"}, "json_schema cannot be followed: Invalid type: foo"),
        ("json_schema", "[1", "the json_schema is no JSON object"),
        ("regex", "((", "the regex cannot be followed"),
        ("choice", [], r"choice=\[\] has to be a list of texts"),
        ("choice", ["a", ""], "has to be a list of texts that are not empty"),
        ("lark", "start: missing", "the lark cannot be followed: .*unknown name"),
        ("gbnf", "x", "the gbnf cannot be read"),
        ("json_schema", {"$ref": "#"}, "the json_schema allows no answer at all"),
        ("regex", r"[^\s\S]", "the regex allows no answer at all"),
        ("lark", "start: start", "the lark allows no answer at all"),
        ("gbnf", 'root ::= root "a"', "the gbnf allows no answer at all"),
        ("json_schema", {"type": "integer", "multipleOf": 999983}, "999983 takes too many"),
        ("json_schema", {"type": "integer", "multipleOf": 2**30}, "1073741824 takes too many"),
        ("json_schema", {"type": "number", "multipleOf": 0.99983}, "0.99983 takes too many"),
        ("json_schema", '{"multiple\\u004ff" : 99998.3e1}', "999983.0* takes too many"),
        ("json_schema", {"multipleOf": 10**19 + 1}, "takes too many states"),
        ("json_schema", {"allOf": [{"multipleOf": 331}, {"multipleOf": 337}]}, "337 takes too"),
        ("json_schema", {"allOf": [{"multipleOf": 0.001}, {"multipleOf": 97}]}, "97 takes too"),
        ("lark", 'start: %json {"multipleOf"\n:\n 999983}', "999983 takes too many"),
        ("xml", "x", "a grammar of kind 'xml' is not known; there are json_schema, "),
    ],
)
def test_bad_grammars_are_refused(model, kind, source, message):
    for refuse in (model.grammars.compile, check):
        with pytest.raises(UserError, match=message):
            refuse(kind, source)
    with pytest.raises(UserError, match=message):
        model.open_engine(1, 200).check(Request([1], grammar=GrammarSpec(kind, source)))


@pytest.mark.parametrize(
    "schema",
    [
        *({"multipleOf": step} for step in (7, 0.01, 0.25, 86.4, 3600, 8192, 9973, 10_000, 1e9)),
        {"properties": {"a": {"multipleOf": 9973}, "b": {"multipleOf": 0.01}}},
        {"allOf": [{"multipleOf": 0.01}, {"multipleOf": 97}]},
        {"properties": {"multipleOf": {"type": "integer"}}},
    ],
)
def test_multiples_that_are_held_in_time(schema):
    begin = time.process_time()
    check("json_schema", schema)
    assert time.process_time() - begin < 2


def test_what_cannot_be_together(model):
    grammar = model.grammars.compile("choice", ["a"])
    engine = model.open_engine(1, 40)
    with pytest.raises(UserError, match="ignore_eos has the answer go on past its end"):
        engine.add(Request([1], SamplingParams(ignore_eos=True), grammar=grammar))
    bans = tuple((token, -100.0) for token in range(CONFIG.vocab_size))
    request = Request([1], SamplingParams(9, logit_bias=bans), grammar=grammar)
    with pytest.raises(UserError, match="the grammar rule out every token"):
        engine.generate([request])
    with pytest.raises(UserError, match="needs a token that ends an answer"):
        Grammars(model.tokenizer, 1024, [])


@pytest.mark.parametrize("name", ["llama2.tokenizer.model", "llama3.tokenizer.model", TINY_NAME])
def test_tokens_are_the_bytes_that_they_decode_to(name, shared_data):
    """In the middle of a text, whatever the tokenizer does at its beginning."""
    tokenizer = load_tokenizer(name if name == TINY_NAME else shared_data / name)
    text = 'a {"naïve": [1, 2.5e3],\n\t"汉字 😀": " x  y "} end'
    (row,) = tokenizer.encode_regions([Region((text,), "bare")])
    assert b"".join(map(tokenizer.token_bytes, row.ids)).decode() == text
    assert all(tokenizer.token_bytes(one) == b"" for one in tokenizer.special_text)


def test_looking_ahead_copies_nothing_and_is_where_a_copy_would_be(model):
    """Guesses, right and wrong, some of which come: llguidance's own copies are the oracle."""
    rng = random.Random(1)
    nested = {"type": "array", "items": {"type": "integer"}, "maxItems": 3}
    sources = [
        ("json_schema", nested),
        ("regex", "[a-z]{1,4}( [0-9]+)?"),
        ("choice", ["no", "now"]),
    ]
    grammars = [model.grammars.compile(*source) for source in sources]

    def allowed(copy):
        bits = np.frombuffer(copy.compute_bitmask(), np.uint8)
        return np.unpackbits(bits, count=model.vocab_size, bitorder="little").view(bool)

    ended = 0
    for _ in range(30):
        matcher = rng.choice(grammars).start()
        oracle = matcher._matcher.deep_copy()
        for _ in range(12):
            for _ in range(rng.randrange(1, 4)):
                ahead, guesses = oracle.deep_copy(), []
                for _ in range(rng.randrange(5)):
                    fits = rng.choice(np.flatnonzero(allowed(ahead)).tolist())
                    guesses.append(fits if rng.random() < 0.9 else rng.randrange(model.vocab_size))
                    if ahead.is_stopped() or not ahead.try_consume_tokens(guesses[-1:]):
                        break
                assert (matcher.allowed(guesses) == allowed(ahead)).all()
            fits = np.flatnonzero(allowed(oracle)).tolist()
            token = guesses[0] if guesses and guesses[0] in fits else rng.choice(fits)
            matcher.take(token)
            if not oracle.is_stopped():
                assert oracle.consume_token(token)
            ended += oracle.is_stopped()
    assert ended
