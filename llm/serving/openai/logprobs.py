"""Log-probabilities of tokens, in the shapes of OpenAI's two routes and of vLLM's prompts.

A chosen token's text is what it added to the answer: the texts joined are the answer. Tokens that
might have come instead have their own text, by which one compares them; the chosen one among them
has the same text as the chosen one.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from common.errors import DataError
from llm.engine.model_tokens import ModelTokens
from llm.engine.request import Token
from llm.serving.text import Piece

Top = Iterable[tuple[int, float]]


class TokenTexts:
    """What tokens are called.

    Args:
        model: whose tokens.
        as_ids: by ``token_id:N``, which is never two tokens' name (vLLM's
            ``return_tokens_as_token_ids``).
    """

    def __init__(self, model: ModelTokens, *, as_ids: bool = False) -> None:
        self._model = model
        self._tokenizer = model.tokenizer
        self._vocab_size = model.vocab_size
        self._as_ids = as_ids

    def content(self, token_id: int) -> bytes:
        """Return a token's bytes inside a text; of a control token those of its name."""
        if token_id >= self._vocab_size:  # of a vocabulary that was padded
            return b""
        special = self._tokenizer.special_text.get(token_id)
        if special is not None:
            return special.encode()
        try:
            return self._tokenizer.token_bytes(token_id)
        except DataError:  # its text hangs on its neighbours
            return self._tokenizer.decode([token_id]).encode()

    def own(self, token_id: int) -> str:
        """Return a token's text; where its bytes are none, these as OpenAI writes them."""
        content = self.content(token_id)
        if self._as_ids or not content:
            return f"token_id:{token_id}"
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def chosen(self, piece: Piece) -> str:
        """Return the text of a chosen token."""
        if self._as_ids or (piece.special and not piece.text):
            return self.own(piece.token_id)
        return piece.text

    def pieces_of(self, ids: Sequence[int], scores: Sequence[Token]) -> list[Piece]:
        """Return a prompt's tokens with their texts and scores; the first one's is nan."""
        decoder = self._model.decoder()
        pieces = [
            Piece(one, decoder.push(one), float("nan"), one in self._tokenizer.special_text)
            for one in ids
        ]
        for piece, token in zip(pieces[1:], scores, strict=True):
            piece.logprob, piece.top = token.logprob, token.top
        if rest := decoder.finish():
            pieces[-1].text += rest
        return pieces


def chat_logprobs(pieces: Iterable[Piece], texts: TokenTexts, count: int) -> dict[str, Any]:
    """Return ``logprobs`` of a chat's choice.

    Args:
        pieces: without control tokens.
        texts: of the model.
        count: of alternatives to tell.
    """
    content = []
    for piece in pieces:
        text = texts.chosen(piece)
        entry = _entry(text, piece.logprob, piece.text.encode())
        others = [
            entry
            if token_id == piece.token_id
            else _entry(texts.own(token_id), logprob, texts.content(token_id))
            for token_id, logprob in piece.top[:count]
        ]
        content.append({**entry, "top_logprobs": others})
    return {"content": content, "refusal": None}


def _entry(text: str, logprob: float, content: bytes) -> dict[str, Any]:
    return {"token": text, "logprob": logprob, "bytes": list(content)}


def completion_logprobs(
    pieces: Iterable[Piece], texts: TokenTexts, count: int, offset: int
) -> tuple[dict[str, Any], int]:
    """Return ``logprobs`` of a completion's choice, and where its text ends.

    A prompt's first token has no score. Control tokens are spelled out, without being in the text.

    Args:
        pieces: of prompt and answer, in order.
        texts: of the model.
        count: of alternatives to tell; 0 tells none.
        offset: where their text begins.
    """
    tokens, logprobs, tops, offsets = [], [], [], []
    for piece in pieces:
        name = texts.chosen(piece)
        scored = piece.logprob == piece.logprob
        tokens.append(name)
        logprobs.append(piece.logprob if scored else None)
        tops.append(_alternatives(piece, name, texts, count) if scored else None)
        offsets.append(offset)
        offset += len(piece.text)
    shown = {
        "tokens": tokens,
        "token_logprobs": logprobs,
        "top_logprobs": tops if count else None,
        "text_offset": offsets,
    }
    return shown, offset


def _alternatives(piece: Piece, name: str, texts: TokenTexts, count: int) -> dict[str, float]:
    found: dict[str, float] = {}
    for token_id, logprob in piece.top[:count]:
        found.setdefault(name if token_id == piece.token_id else texts.own(token_id), logprob)
    found.setdefault(name, piece.logprob)
    return found


def prompt_logprobs(
    scores: Sequence[Token], texts: TokenTexts, count: int
) -> list[dict[str, Any] | None]:
    """Return ``prompt_logprobs`` as vLLM does: by token id, the prompt's own token among them.

    The rank of the prompt's own is null where it is not among the likeliest.
    """
    found: list[dict[str, Any] | None] = [None]
    for token in scores:
        ranked = [(rank, *one) for rank, one in enumerate(token.top[:count], 1)]
        shown: dict[str, Any] = {
            str(token_id): {"logprob": p, "rank": rank, "decoded_token": texts.own(token_id)}
            for rank, token_id, p in ranked
        }
        mine = {"logprob": token.logprob, "rank": None, "decoded_token": texts.own(token.token_id)}
        found.append({str(token.token_id): mine} | shown)
    return found
