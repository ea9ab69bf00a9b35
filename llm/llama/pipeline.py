"""Pieces of the network for a pipeline: what a stage runs, and what it shares with other stages.

B batch, S sequence, E hidden, n scored positions.
"""

from paddle import Tensor

from external_ops.cross_entropy import Result
from llm.llama.modeling import LlamaForCausalLM


def mark_stage_shared(model: LlamaForCausalLM) -> None:
    """Mark the parameters that other stages hold too as ``stage_shared``.

    Those are a tied embedding, which the first and the last stage hold, and a prefix, which every
    stage holds. Their gradients have to be summed over these stages before an update.
    """
    stage, prefix = model.seams.stage, model.seams.prefix
    if stage is None or (stage.first and stage.last):
        return
    if model.config.tie_word_embeddings and (stage.first or stage.last):
        model.model.embed_tokens.weight.stage_shared = True
    if prefix is not None:
        for parameter in prefix.parameters():
            parameter.stage_shared = True


class LlamaPieces:
    """What a stage runs, for ``llm.parallel.pipeline``.

    Args:
        model: a network that was built with a stage.
    """

    def __init__(self, model: LlamaForCausalLM) -> None:
        self._model, self._stage = model, model.seams.stage

    def shape(self, batch: dict[str, Tensor]) -> tuple[int, int]:
        """Return rows and tokens per row of a micro-batch."""
        rows, length = batch["input_ids"].shape
        return rows, length

    def run(self, chunk: int, x_BSE: Tensor | None, batch: dict[str, Tensor]) -> Tensor:
        """Run a chunk of layers; the first one embeds, and behind the last one is the norm.

        Args:
            chunk: 0 … chunks of this stage - 1.
            x_BSE: what the piece before returned; None at the beginning of the network.
            batch: ``input_ids``, and ``positions`` and ``segments`` of packed rows.
        """
        model, stage = self._model, self._stage
        ids = batch["input_ids"]
        if x_BSE is None:
            x_BSE = model.model.embed_tokens(ids)
        x_BSE = model.decode(
            x_BSE, stage.layers[chunk], ids.shape[1], batch.get("positions"), batch.get("segments")
        )
        if stage.last and chunk == len(stage.layers) - 1:
            return model.model.norm(x_BSE)
        return x_BSE

    def view(self, hidden_BSE: Tensor) -> "LastStage":
        """Return the network as objectives know it, for a batch that went through all stages."""
        return LastStage(self._model, hidden_BSE)


class LastStage:
    """The network, to an objective: it has the hidden states of the batch already.

    Args:
        model: the last stage's part.
        hidden_BSE: normed hidden states of the batch.
    """

    def __init__(self, model: LlamaForCausalLM, hidden_BSE: Tensor) -> None:
        self._model, self._hidden_BSE = model, hidden_BSE

    @property
    def training(self) -> bool:
        """Whether the network is being trained."""
        return self._model.training

    def token_losses(
        self,
        input_ids_BS: Tensor,
        labels_n: Tensor,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        rows_n: Tensor | None = None,
    ) -> Result:
        """Score labels; arguments and results are those of ``LlamaForCausalLM.token_losses``."""
        return self._model.hidden_losses(self._hidden_BSE, labels_n, rows_n)
