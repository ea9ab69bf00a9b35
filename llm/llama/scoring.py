"""How likely a network finds a text."""

import math

import numpy as np
import paddle
from paddle.nn import functional as F
from tqdm import tqdm

from llm.errors import UserError
from llm.llama.modeling import LlamaForCausalLM


def perplexity(
    model: LlamaForCausalLM, ids: np.ndarray, *, seq_length: int, batch_size: int = 8
) -> float:
    """Return ``exp`` of the mean negative log-likelihood per predicted token.

    The ids are cut into windows of ``seq_length`` predictions that do not overlap; within a window
    each token is predicted from those before it. A last, shorter window counts too.

    Args:
        model: the network.
        ids: one-dimensional token ids of all text.
        seq_length: predictions per window.
        batch_size: windows per forward pass.

    Raises:
        UserError: fewer than two ids, or ids beyond the vocabulary.
    """
    if len(ids) < 2:
        raise UserError(f"{len(ids)} tokens are too few for a perplexity; two are the least")
    if int(ids.max()) >= model.config.vocab_size:
        raise UserError(
            f"token id {int(ids.max())} is outside the model's vocabulary of "
            f"{model.config.vocab_size}"
        )
    starts = range(0, len(ids) - 1, seq_length)
    windows = [ids[start : start + seq_length + 1].astype(np.int64) for start in starts]
    full = [window for window in windows if len(window) == seq_length + 1]
    batches = [np.stack(full[i : i + batch_size]) for i in range(0, len(full), batch_size)]
    if len(windows) > len(full):
        batches.append(windows[-1][None])
    model.eval()
    total = 0.0
    with paddle.no_grad():
        for batch in tqdm(batches, "scoring", disable=None, leave=False):
            logits = model(paddle.to_tensor(batch[:, :-1]))
            labels = paddle.to_tensor(batch[:, 1:].flatten())
            logits = logits.reshape([-1, logits.shape[-1]])
            total += float(F.cross_entropy(logits, labels, reduction="sum"))
    return math.exp(total / (len(ids) - 1))
