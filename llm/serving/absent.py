"""Routes of other servers that this one does not have, with why and what to do instead."""

_NO_EMBEDDINGS = (
    "this server generates text; it has no embeddings, scores of pairs or classes, as Llama's "
    "generating weights are not trained for them: serve an embedding model beside it"
)
_TEXT_ONLY = "the model reads and writes text only, no images, audio or video"
_NOTHING_STORED = (
    "this server stores nothing between requests: send the whole conversation with each"
)
_NO_TRAINING = "training is a script of its own: finetune_generation.py (docs/finetune.md)"
_OFFLINE = (
    "batches are run offline: python -m llm.serving.batch reads OpenAI's batch files, or send "
    "the requests at once, they are answered together"
)

# By how the path begins, the first that fits.
_WHY = {
    "/v1/embeddings": _NO_EMBEDDINGS,
    "/v2/embed": _NO_EMBEDDINGS,
    "/embed": _NO_EMBEDDINGS,
    "/v1/rerank": _NO_EMBEDDINGS,
    "/v2/rerank": _NO_EMBEDDINGS,
    "/rerank": _NO_EMBEDDINGS,
    "/v1/score": _NO_EMBEDDINGS,
    "/score": _NO_EMBEDDINGS,
    "/pooling": _NO_EMBEDDINGS,
    "/classify": _NO_EMBEDDINGS,
    "/v1/moderations": _NO_EMBEDDINGS,
    "/v1/audio": _TEXT_ONLY,
    "/v1/images": _TEXT_ONLY,
    "/v1/videos": _TEXT_ONLY,
    "/v1/realtime": _TEXT_ONLY,
    "/v1/responses/compact": "nothing is compacted here: leave the oldest items of input out",
    "/v1/responses/": _NOTHING_STORED,
    "/v1/conversations": _NOTHING_STORED,
    "/v1/assistants": _NOTHING_STORED,
    "/v1/threads": _NOTHING_STORED,
    "/v1/vector_stores": _NOTHING_STORED,
    "/v1/chat/completions/": _NOTHING_STORED,
    "/v1/fine_tuning": _NO_TRAINING,
    "/v1/messages/batches": _OFFLINE,
    "/v1/batches": _OFFLINE,
    "/v1/files": _OFFLINE,
    "/v1/uploads": _OFFLINE,
}


def why_absent(path: str) -> str | None:
    """Return why there is no such route, where another server has it."""
    return next((why for begin, why in _WHY.items() if path.startswith(begin)), None)
