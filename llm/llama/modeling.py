"""The network: Llama 1 to 3.2 in one file, written for one process that holds all of it.

B batch, S sequence, T packed tokens, H query heads, G key/value heads, D head dimension, E hidden,
F feed-forward, V vocabulary. Parameter names are Hugging Face's; linear weights are ``[in, out]``,
as Paddle stores them.

Where others reach in is declared in two places: ``llm.llama.seams`` for what runs it differently
(parallelism, recomputation, prefixes, fused layers), ``llm.llama.layers`` for what takes the place
of its linears and its embedding (adapters, quantization, tensor parallelism).

How tokens attend is not a layer's business: each forward hands it an ``attend(layer, q, k, v)``
that is either causal attention over whole rows (training, scoring) or attention over a paged cache
(generation, exported programs), so one network serves both. Keys and values that come before every
document (prefix tuning) are inputs like any other.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import paddle
from paddle import Tensor, nn

from external_ops.backend import Ops
from external_ops.cross_entropy import Result, logit_losses
from external_ops.tensors import tensor_from
from llm.llama.config import LlamaConfig
from llm.llama.layers import Embedding, EmbeddingLike, Linear, LinearLike
from llm.llama.rope import inverse_frequencies
from llm.llama.seams import Attend, Prefix, Seams, Stage


class RMSNorm(nn.Layer):
    """Root-mean-square normalisation with a learned scale."""

    def __init__(self, size: int, eps: float, ops: Ops) -> None:
        super().__init__()
        self.weight = self.create_parameter(
            [size], default_initializer=nn.initializer.Constant(1.0)
        )
        self.eps = eps
        self.kernel = ops.rms_norm
        self.add_kernel = ops.add_rms_norm

    def forward(self, x: Tensor) -> Tensor:
        """Normalise ``[..., E]``."""
        return self.kernel(x, self.weight, self.eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the normalised sum of two ``[..., E]``, and the sum."""
        return self.add_kernel(x, residual, self.weight, self.eps)


def _linear(size_in: int, size_out: int, bias: bool, initializer: Any) -> Linear:
    return Linear(
        size_in,
        size_out,
        weight_attr=paddle.ParamAttr(initializer=initializer),
        bias_attr=None if bias else False,
    )


class LlamaAttention(nn.Layer):
    """Grouped-query attention with rotary positions."""

    def __init__(self, config: LlamaConfig, ops: Ops, index: int, initializer: Any) -> None:
        super().__init__()
        self.index = index
        self.head_dim = config.head_dim
        self.rotary = ops.rotary
        q_size = config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        linear = partial(_linear, bias=config.attention_bias, initializer=initializer)
        self.q_proj = linear(config.hidden_size, q_size)
        self.k_proj = linear(config.hidden_size, kv_size)
        self.v_proj = linear(config.hidden_size, kv_size)
        self.o_proj = linear(q_size, config.hidden_size)

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape([0] * (x.ndim - 1) + [-1, self.head_dim])

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *prefix: Tensor
    ) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        return self.o_proj(self.mix(x, cos, sin, attend, *prefix))

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *prefix: Tensor) -> Tensor:
        """Return ``[..., H * D]``, what all heads have read, side by side."""
        q = self.rotary(self._heads(self.q_proj(x)), cos, sin)
        k = self.rotary(self._heads(self.k_proj(x)), cos, sin)
        v = self._heads(self.v_proj(x))
        return attend(self.index, q, k, v, *prefix).flatten(-2)


class LlamaMLP(nn.Layer):
    """SwiGLU feed-forward (Shazeer 2020)."""

    def __init__(self, config: LlamaConfig, ops: Ops, initializer: Any) -> None:
        super().__init__()
        self.swiglu = ops.swiglu
        linear = partial(_linear, bias=config.mlp_bias, initializer=initializer)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        return self.down_proj(self.activate(x))

    def activate(self, x: Tensor) -> Tensor:
        """Return the ``[..., F]`` that the last linear reads."""
        return self.swiglu(self.gate_proj(x), self.up_proj(x))


def _rows(hidden_BSE: Tensor, rows_n: Tensor) -> Tensor:
    return paddle.gather(hidden_BSE.flatten(0, 1), rows_n)


class LlamaDecoderLayer(nn.Layer):
    """Attention and feed-forward, each behind a norm and a residual sum."""

    def __init__(
        self, config: LlamaConfig, ops: Ops, seams: Seams, index: int, initializer: Any
    ) -> None:
        super().__init__()
        self.seams = seams
        self.self_attn = LlamaAttention(config, ops, index, initializer)
        self.mlp = LlamaMLP(config, ops, initializer)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, *prefix: Tensor
    ) -> Tensor:
        """Map ``[..., E]`` to ``[..., E]``."""
        normed = self.input_layernorm(x)
        attended = self.seams.run_attention(self.self_attn, normed, cos, sin, attend, *prefix)
        normed, x = self.post_attention_layernorm.add(attended, x)
        return x + self.mlp(normed)


def _behind(prefix_1PGD: Tensor, x_BSGD: Tensor) -> Tensor:
    prefix = prefix_1PGD.astype(x_BSGD.dtype).expand([x_BSGD.shape[0], -1, -1, -1])
    return paddle.concat([prefix, x_BSGD], axis=1)


class DecoderLayers(nn.Layer):
    """Decoder layers by their number in the whole network, of which a stage holds some.

    Iterates over the layers in rising order; ``layers[7]`` is number 7 wherever it lies.
    """

    def __init__(self, layers: Iterable[LlamaDecoderLayer]) -> None:
        super().__init__()
        for layer in layers:
            self.add_sublayer(str(layer.self_attn.index), layer)

    def __getitem__(self, index: int) -> LlamaDecoderLayer:
        return self._sub_layers[str(index)]

    def __iter__(self) -> Iterator[LlamaDecoderLayer]:
        return iter(self._sub_layers.values())

    def __len__(self) -> int:
        return len(self._sub_layers)

    @property
    def numbers(self) -> list[int]:
        """Numbers of the layers that are held."""
        return [int(name) for name in self._sub_layers]


class LlamaModel(nn.Layer):
    """Embedding, decoder layers and the final norm; of a stage, those that it holds."""

    def __init__(self, config: LlamaConfig, ops: Ops, seams: Seams, initializer: Any) -> None:
        super().__init__()
        self.config, self.seams = config, seams
        stage = seams.stage
        first, last = stage is None or stage.first, stage is None or stage.last
        self.embed_tokens: EmbeddingLike | None = None
        if first or (last and config.tie_word_embeddings):
            self.embed_tokens = Embedding(
                config.vocab_size,
                config.hidden_size,
                weight_attr=paddle.ParamAttr(initializer=initializer),
            )
        chunks = [range(config.num_hidden_layers)] if stage is None else stage.layers
        self.layers = DecoderLayers(
            LlamaDecoderLayer(config, ops, seams, index, initializer)
            for chunk in chunks
            for index in chunk
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ops) if last else None

    def rotary_tables(self, positions: Tensor, length: int, dtype: Any) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[..., 1, D/2]`` of integer positions ``[...]``."""
        # A program that is traced takes them as constants.
        made = tensor_from if paddle.in_dynamic_mode() else paddle.to_tensor
        steps = made(inverse_frequencies(self.config, length))
        angles = positions.astype("float32").unsqueeze([-1, -2]) * steps
        cos, sin = paddle.cos(angles), paddle.sin(angles)
        scale = self.config.rope_scaling.cosine_scale
        if scale != 1:
            cos, sin = cos * scale, sin * scale
        return cos.astype(dtype), sin.astype(dtype)

    def decode(
        self,
        x: Tensor,
        numbers: Iterable[int],
        positions: Tensor,
        length: int,
        attend: Attend,
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Run the decoder layers of these numbers on hidden states ``[..., E]``.

        ``length`` is the context that dynamic rotary scaling should assume.
        """
        cos, sin = self.rotary_tables(positions, length, x.dtype)
        for number in numbers:
            # As inputs and not inside `attend`, so that recomputed layers give them gradients.
            before = () if prefix is None else prefix[number]
            x = self.seams.run_layer(self.layers[number], x, cos, sin, attend, *before)
        return x


class LlamaForCausalLM(nn.Layer):
    """A Llama that scores the next token.

    Args:
        config: the architecture.
        ops: kernels from :func:`external_ops.backend.select_ops`.
        initializer: of every matrix; None draws from ``Normal(0, config.initializer_range)``.
        stage: what this part of a pipeline holds; None holds everything.

    ``seams`` is where others reach in (:class:`llm.llama.seams.Seams`).
    """

    def __init__(
        self, config: LlamaConfig, ops: Ops, initializer: Any = None, stage: Stage | None = None
    ) -> None:
        super().__init__()
        if initializer is None:
            initializer = nn.initializer.Normal(0.0, config.initializer_range)
        self.config, self.ops = config, ops
        self.seams = Seams(ops.causal_attention, stage)
        self.model = LlamaModel(config, ops, self.seams, initializer)
        self.lm_head: LinearLike | None = None
        if not config.tie_word_embeddings and (stage is None or stage.last):
            self.lm_head = _linear(config.hidden_size, config.vocab_size, False, initializer)

    def _logits(self, hidden: Tensor) -> Tensor:
        """Return float32 logits of the whole vocabulary."""
        shard = self.seams.shard
        if self.lm_head is None:
            entered = hidden if shard is None else shard.enter(hidden)
            logits = self.model.embed_tokens.scores(entered)
        else:
            logits = self.lm_head(hidden)
        logits = logits.astype("float32")
        return logits if shard is None else shard.gather(logits)

    def hidden(
        self,
        input_ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
    ) -> Tensor:
        """Return normed hidden states ``[B, S, E]``; arguments are those of :meth:`forward`."""
        x_BSE = self.decode(
            self.model.embed_tokens(input_ids_BS),
            self.model.layers.numbers,
            input_ids_BS.shape[1],
            positions_BS,
            segments_BS,
        )
        return self.model.norm(x_BSE)

    def decode(
        self,
        x_BSE: Tensor,
        numbers: Iterable[int],
        length: int,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
    ) -> Tensor:
        """Run the decoder layers of these numbers on the hidden states of whole rows.

        Args:
            x_BSE: embedded tokens, or what the layers before have made of them.
            numbers: of layers that this part of the network holds, in rising order.
            length: S, tokens of a row.
            positions_BS: as of :meth:`forward`.
            segments_BS: as of :meth:`forward`.
        """
        if positions_BS is None:
            positions_BS = paddle.arange(length, dtype="int64").unsqueeze(0)
        elif self.config.rope_scaling.rope_type == "dynamic":
            length = int(positions_BS.max()) + 1
        prefix = None if self.seams.prefix is None else self.seams.prefix()
        if prefix is not None:
            shift = prefix[0][0].shape[1]
            positions_BS, length = positions_BS + shift, length + shift

        def attend(_: int, q: Tensor, k: Tensor, v: Tensor, *before: Tensor) -> Tensor:
            if before:
                k, v = _behind(before[0], k), _behind(before[1], v)
            return self.seams.attention(q, k, v, segments_BS)

        return self.model.decode(x_BSE, numbers, positions_BS, length, attend, prefix)

    def forward(
        self,
        input_ids_BS: Tensor,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        rows_n: Tensor | None = None,
    ) -> Tensor:
        """Score every position of whole rows, or chosen positions.

        Args:
            input_ids_BS: int64 token ids.
            positions_BS: positions; ``0 … S-1`` when not given. Packed documents restart at 0. With
                a prefix of P, rotary positions are P later.
            segments_BS: document number of each token of a packed row; tokens attend within
                their document only. None: each row is one document.
            rows_n: int64 indices into the ``B * S`` positions whose logits are wanted.

        Returns:
            float32 logits ``[B, S, V]``, or ``[n, V]`` of the chosen positions.
        """
        hidden = self.hidden(input_ids_BS, positions_BS, segments_BS)
        return self._logits(hidden if rows_n is None else _rows(hidden, rows_n))

    def token_losses(
        self,
        input_ids_BS: Tensor,
        labels_n: Tensor,
        positions_BS: Tensor | None = None,
        segments_BS: Tensor | None = None,
        rows_n: Tensor | None = None,
    ) -> Result:
        """Return the cross-entropy of each label, and in evaluation whether it is the likeliest.

        Args:
            input_ids_BS, positions_BS, segments_BS: those of :meth:`forward`.
            labels_n: int64 tokens that follow the positions; those that are -100 do not count.
            rows_n: int64 indices into the ``B * S`` positions that the labels follow; all of them
                when not given. Training on answers spends nothing on the logits of prompts.

        Returns:
            float32 ``[n]``, 0 where a label does not count, and bool ``[n]``, None in training.
        """
        hidden = self.hidden(input_ids_BS, positions_BS, segments_BS)
        return self.hidden_losses(hidden, labels_n, rows_n)

    def hidden_losses(
        self, hidden_BSE: Tensor, labels_n: Tensor, rows_n: Tensor | None = None
    ) -> Result:
        """Return what :meth:`token_losses` returns, from the result of :meth:`hidden`."""
        hidden_nE = hidden_BSE.flatten(0, 1) if rows_n is None else _rows(hidden_BSE, rows_n)
        options = {"accuracy": not self.training, "shard": self.seams.shard}
        tied = self.lm_head is None
        head = self.model.embed_tokens if tied else self.lm_head
        if head.plain_weight is not None:
            weight = head.plain_weight
            return self.ops.cross_entropy(hidden_nE, weight, labels_n, tied=tied, **options)
        logits = head.scores(hidden_nE) if tied else head(hidden_nE)
        return logit_losses(logits.astype("float32"), labels_n, **options)

    def decode_step(
        self,
        x_TE: Tensor,
        sequence_T: Tensor,
        position_T: Tensor,
        block_table_NM: Tensor,
        caches: list[Tensor],
        length: int,
    ) -> Tensor:
        """Run all decoder layers of a packed step, op by op; see :meth:`forward_paged`."""

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values = caches[2 * layer], caches[2 * layer + 1]
            return self.ops.paged_attention(
                q, k, v, keys, values, block_table_NM, sequence_T, position_T
            )

        numbers = self.model.layers.numbers
        return self.model.decode(x_TE, numbers, position_T, length, attend)

    def forward_paged(
        self,
        ids_T: Tensor,
        sequence_T: Tensor,
        position_T: Tensor,
        block_table_NM: Tensor,
        rows_n: Tensor,
        caches: list[Tensor],
        max_model_len: int,
    ) -> Tensor:
        """Score chosen tokens of a packed step, reading and extending the paged cache.

        Args:
            ids_T: int64 token ids of all sequences, sequence after sequence.
            sequence_T: int32 sequence of each token, ascending.
            position_T: int32 position of each token in its sequence.
            block_table_NM: int32 cache blocks of each sequence.
            rows_n: int64 indices into the T tokens whose logits are wanted.
            caches: keys and values of each layer in turn; written in place.
            max_model_len: the context that dynamic rotary scaling assumes.

        Returns:
            float32 logits ``[n, V]``.
        """

        x_TE = self.model.embed_tokens.lookup(ids_T)
        decode = self.seams.fused or self.decode_step
        places = (sequence_T, position_T, block_table_NM)
        x_TE = decode(x_TE, *places, caches, max_model_len)
        return self._logits(self.model.norm(paddle.gather(x_TE, rows_n)))
