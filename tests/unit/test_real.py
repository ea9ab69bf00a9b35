"""`make real`: what it calls equal, valid and broken, and that its guide quotes a stored run."""

import contextlib
import io
import json
import re
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO / "benchmarks"))
import real
import real_served
from real_asked import CALLS, FORMS, QUESTIONS, TOOLS, is_right
from real_parts import equal
from real_run import Figure, PartError, Run, broken, run_parts, table

sys.path.remove(str(REPO / "benchmarks"))


def run_in(place):
    """A run whose commands are this Python's."""
    return Run(*[place] * 5, None, Path(sys.executable), place)


def test_answers_are_equal_token_by_token_and_behind_equal_prompts():
    one = {"prompt_ids": [1, 2], "ids": [3, 4]}
    assert equal("x", [one, one], [one, dict(one)]) == Figure("x", "2 of 2", "all")
    for other in ({**one, "ids": [3]}, {**one, "prompt_ids": [2, 1]}):
        assert equal("x", [one, one], [one, other]) == Figure("x", "1 of 2", "all", held=False)


@pytest.mark.parametrize(
    ("answer", "right"),
    [("The capital is PARIS.", True), ("Comparison", False), ("Lyon", False)],
)
def test_right_answers(answer, right):
    assert QUESTIONS[0].is_right(answer) is right


def test_there_are_twenty_questions_all_of_them_different():
    assert len({one.text for one in QUESTIONS}) == len(QUESTIONS) == 20


def test_right_values_in_any_case_and_beside_others():
    assert is_right({"city": " Paris", "more": 1}, {"city": "paris"})
    assert not is_right({"city": "Lyon"}, {"city": "paris"})
    assert not is_right({}, {"a": 17}) and not is_right({"a": "17"}, {"a": 17})


def test_what_is_right_obeys_its_own_schema():
    import jsonschema

    for form in FORMS:
        assert set(form.right) <= set(form.schema["properties"])
        for key, value in form.right.items():
            jsonschema.validate(value, form.schema["properties"][key])
    schemas = {one["function"]["name"]: one["function"]["parameters"] for one in TOOLS}
    for call in CALLS:
        jsonschema.validate(call.arguments, schemas[call.name])


def said(content=None, ends="stop", calls=()):
    return {"message": {"content": content, "tool_calls": list(calls)}, "finish_reason": ends}


def test_json_is_valid_where_it_obeys_its_schema_and_has_ended():
    schema, text = FORMS[0].schema, '{"capital": "Paris"}'
    assert real_served.read_form(said(text), schema) == {"capital": "Paris"}
    for bad in (said(text, "length"), said("Paris"), said('{"capital": 1}'), said("{}")):
        assert real_served.read_form(bad, schema) is None


def call(name, arguments):
    return {"function": {"name": name, "arguments": arguments}}


def test_calls_are_valid_where_they_obey_their_tool():
    good = call("get_weather", '{"city": "Oslo"}')
    read = real_served.read_calls
    assert read(said(None, "tool_calls", [good])) == [("get_weather", {"city": "Oslo"})]
    assert read(said("It rains.")) == read(said("It rains and", "length")) == []
    for name, given in (
        ("get_weather", '{"town": "Oslo"}'),
        ("get_weather", '{"city": 1}'),
        ("get_weather", '{"city": "Os'),
        ("unknown", "{}"),
    ):
        assert read(said(None, "tool_calls", [call(name, given)])) is None
    assert read(said(None, "length", [good])) is None, "a last call may be cut"


def test_a_part_that_fails_is_told_and_the_others_run(tmp_path, capsys):
    def fails(run):
        run.say("something")
        run.suite("-c import(sys)")

    kept = {}
    found = run_parts(
        run_in(tmp_path),
        {
            "first": fails,
            "second": lambda run: [Figure("a", 0.123456789), Figure("b", 2, "3", False)],
        },
        kept.__setitem__,
    )
    (first,) = found["first"]
    assert not first.held and "ended with" in first.value and "SyntaxError" in first.value
    assert kept == {"second": found["second"]}
    assert [broken(figures) for figures in found.values()] == [["failed"], ["b"]]
    assert "[1/2] first: something (" in capsys.readouterr().err
    assert table(found).splitlines()[2:] == [
        line for line in table(found).splitlines() if line.startswith("second")
    ]
    assert "0.12346" in table(found) and table(found).endswith("BROKEN")
    assert table({"x": [Figure("a", 1, "all")]}).endswith("held")


def test_a_server_that_does_not_start_is_a_part_that_failed(tmp_path):
    with pytest.raises(PartError, match="did not start"):
        real_served.forms(run_in(tmp_path))


@pytest.mark.parametrize("flag", ["--model", "--gguf", "--text", "--alpaca", "--calibration_file"])
def test_what_is_missing_is_told_before_the_work(tmp_path, monkeypatch, capsys, flag):
    for place in ("model", "model-off-grid"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "config.json").touch()
    (tmp_path / "a.gguf").touch()
    words = {"--model": "model", "--gguf": "a.gguf"} | {flag: "absent"}
    given = [word for name, place in words.items() for word in (name, str(tmp_path / place))]
    given += ["--peers_python", sys.executable]
    monkeypatch.setattr(sys, "argv", ["real.py", *given])
    with pytest.raises(SystemExit) as stop:
        real.parse()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert str(tmp_path / "absent") in error and "is not there; " in error


# --- the guide ------------------------------------------------------------------------------------


def shown(value):
    return Figure("", value).shown()


def test_the_guide_quotes_stored_rows():
    """Of each part a whole row, none of it broken, and all of them of one file and one text."""
    guide = (REPO / "docs" / "real_model.md").read_text(encoding="utf-8")
    rows = (REPO / "benchmarks" / "results" / "real.jsonl").read_text(encoding="utf-8")
    stored = {
        (row["part"], *((name, shown(value)) for name, value in row["figures"].items())): row
        for row in map(json.loads, rows.splitlines())
    }
    quoted = {}
    for line in guide.partition("## Figures")[2].splitlines():
        if line.startswith(tuple(f"| {part} |" for part in real.PARTS)):
            part, *figure = (cell.strip() for cell in line.strip("|").split("|"))
            quoted.setdefault(part, []).append(tuple(figure))
    assert list(quoted) == list(real.PARTS)
    for part, figures in quoted.items():
        row = stored[part, *figures]
        assert row["broken"] == []
        for key in ("file_sha256", "weights_sha256", "text_sha256", "calibration_sha256"):
            assert row[key][:12] in guide, key
        for key in ("file", "text", "calibration", "lora_data", "date", "processor"):
            assert row[key] in guide, key


def test_the_file_is_the_pinned_one():
    from scripts import real_model

    guide = (REPO / "docs" / "real_model.md").read_text(encoding="utf-8")
    package, _, wheel = real_model.REQUIREMENT.partition(" --hash=sha256:")
    assert package in guide and wheel.strip()[:12] in guide
    assert Path(real_model.MEMBER).name in guide


def test_help_names_every_part():
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit):
        sys_argv, sys.argv = sys.argv, ["real.py", "--help"]
        try:
            real.parse()
        finally:
            sys.argv = sys_argv
    for part in real.PARTS:
        assert re.search(rf"^{part} ", out.getvalue(), re.M), part
