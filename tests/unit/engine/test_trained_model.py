"""A trained model under load: greedy answers and prompt scores are those of each request alone.

On random weights the likeliest token leads by little and means nothing; `make real-model` fetches
weights whose answers are text.
"""

import random
from pathlib import Path

import pytest

from llm.engine.offline import LLM
from llm.engine.request import SamplingParams

MODEL = Path(__file__).parents[3] / "outputs/real-model"
QUESTIONS = (
    "What is the capital of France?",
    "Name three primary colours.",
    "How many legs does a spider have?",
    "Write one sentence about the sea.",
    "What is 7 plus 5?",
    "Translate 'good morning' into Spanish.",
    "Who wrote Romeo and Juliet?",
    "List the days of the week.",
)

pytestmark = [
    pytest.mark.long,
    pytest.mark.usefixtures("native_ops"),
    pytest.mark.skipif(not (MODEL / "config.json").exists(), reason="`make real-model` writes it"),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_answers_and_scores_under_load_are_those_alone(dtype):
    greedy = SamplingParams(48, temperature=0, logprobs=2)
    scored = SamplingParams(1, temperature=0, prompt_logprobs=1)
    drawn = SamplingParams(64, temperature=1, seed=5)
    alone = LLM(str(MODEL), dtype=dtype, max_num_seqs=1, max_num_batched_tokens=4096)
    crowd = LLM(alone.model, max_num_seqs=16, max_num_batched_tokens=48, max_model_len=512)

    text = " ".join(one.__doc__ or "" for one in (random.Random, random.shuffle, Path, str.split))
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    prompts = [*chats, text, *chats, text[: len(text) // 2]]
    params = [*[greedy] * len(chats), scored, *[drawn] * len(chats), scored]
    found = crowd.generate(prompts, params)
    for number, (prompt, param) in enumerate(zip(prompts, params, strict=True)):
        (one,) = alone.generate([prompt], [param])
        assert found[number].completion == one.completion, number
    assert "Paris" in found[0].text
    scores = [token.logprob for token in found[len(chats)].completion.prompt]
    assert len(scores) > 100 and -6 < sum(scores) / len(scores) < -1  # a text that it can read
