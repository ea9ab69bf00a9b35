"""Texts that an engine generates, cut at stop strings."""

from collections.abc import Sequence

from tqdm import tqdm

from data.tokenizer import Tokenizer
from llm.engine.engine import Engine
from llm.engine.sequence import SamplingParams


def generate_texts(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams | Sequence[SamplingParams],
    stops: Sequence[Sequence[str]] | None = None,
) -> list[str]:
    """Answer prompts together; each ends at its first stop string, which is left out.

    Args:
        engine: with room for every prompt and its answer.
        tokenizer: of the model.
        prompts: ids of each prompt.
        params: for all, or one per prompt.
        stops: texts that end each prompt's answer.

    Raises:
        UserError: a prompt that the engine refuses; raised before any runs.
    """
    each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
    for prompt, one in zip(prompts, each, strict=True):
        engine.check(prompt, one)
    ends = stops or [()] * len(prompts)
    handles = [engine.add(prompt, one) for prompt, one in zip(prompts, each, strict=True)]
    decoders = [tokenizer.stream() for _ in prompts]
    texts = [""] * len(prompts)
    running = set(range(len(prompts)))
    with tqdm(total=len(prompts), desc="answers", disable=None, leave=False) as bar:
        while running:
            engine.step()
            for number in sorted(running):
                finished = False
                while handles[number].produced and not finished:
                    step = handles[number].produced.popleft()
                    finished = step.finish_reason is not None
                    if step.finish_reason != "stop":
                        texts[number] += decoders[number].push(step.token_id)
                    if finished:
                        texts[number] += decoders[number].finish()
                    cut = cut_at(texts[number], ends[number])
                    if cut != texts[number]:
                        texts[number], finished = cut, True
                if finished:
                    engine.abort(handles[number])
                    running.discard(number)
                    bar.update()
    return texts


def cut_at(text: str, stops: Sequence[str]) -> str:
    """Return a text up to the earliest of the stop strings in it; empty ones do not count."""
    found = [text.find(stop) for stop in stops if stop]
    return text[: min((place for place in found if place >= 0), default=len(text))]
