"""What is served, as the HTTP process knows it: plain data about the model and its engine."""

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, NamedTuple

from data.tokenizer import Tokenizer
from llm.engine.model_tokens import ModelTokens

if TYPE_CHECKING:
    from llm.engine.opening import OpenedModel

CONTEXT = "the model's context"


@dataclass(frozen=True)
class ModelFacts:
    """What crosses from the engine's process, but for the tokenizer, which both have.

    Args:
        name: what requests call the model.
        num_logits: ids that the network has logits for.
        end_ids: tokens that end an answer.
        adapter_names: adapters that requests may name now.
        ops: which form each op takes, and why; the fields of ``external_ops.backend.Choice``.
        paddle: the version that runs it.
    """

    name: str
    num_logits: int
    end_ids: tuple[int, ...]
    adapter_names: tuple[str, ...] = ()
    ops: tuple[dict[str, str], ...] = ()
    paddle: str = ""

    @classmethod
    def of(cls, model: "OpenedModel") -> "ModelFacts":
        """Describe an opened model."""
        ops = tuple(asdict(choice) for choice in model.ops)
        return cls(
            model.name,
            model.num_logits,
            model.end_ids,
            model.adapter_names,
            ops,
            model.paddle_version,
        )


class ServedModel(ModelTokens):
    """A model that is open in the engine's process.

    Args:
        facts: about it.
        tokenizer: its tokenizer.
    """

    def __init__(self, facts: ModelFacts, tokenizer: Tokenizer) -> None:
        self.facts, self.tokenizer = facts, tokenizer

    @property
    def name(self) -> str:
        """What requests call the model."""
        return self.facts.name

    @property
    def num_logits(self) -> int:
        """See ``ModelTokens``."""
        return self.facts.num_logits

    @property
    def end_ids(self) -> tuple[int, ...]:
        """See ``ModelTokens``."""
        return self.facts.end_ids

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Adapters that requests may name now."""
        return self.facts.adapter_names


class EngineLimits(NamedTuple):
    """What an engine has room for.

    Args:
        max_model_len: tokens of prompt and answer.
        max_sequences: requests that run together.
        limited_by: what sets ``max_model_len``, as messages name it.
    """

    max_model_len: int
    max_sequences: int
    limited_by: str = CONTEXT
