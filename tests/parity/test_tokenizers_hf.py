"""A short stretch of `make fuzz FUZZ=tokenizers`: every kind of tokenizer beside transformers."""

from collections.abc import Callable

import pytest

from tests.fuzz.tokenizers import main


@pytest.mark.parametrize("seed", [0, 40_000])
def test_random_tokenizers(
    seed: int, peer: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    del peer  # skips where there is none
    status = main(["--seed", str(seed), "--cases", "240", "--seconds", "240"])
    assert status == 0, capsys.readouterr().out
