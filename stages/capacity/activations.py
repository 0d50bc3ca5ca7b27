"""The tensors of a forward pass that are alive at once, on each chip: the most that a layer holds beside its weights.

They follow the bodies of `forward_prefill` and `forward_decode` in stages/models/deepseek_v3/, where a result lives
until the function that made it returns. Buffers that ttnn makes and frees within an op are not among them.
"""

from collections.abc import Iterator

from stages.capacity.chip_tensor import ChipTensor
from stages.options import TOKENS_AT_ONCE
from stages.tensor_dtypes import TensorDtype
from stages.wormhole import GALAXY_COLUMNS
from weights.model_config import ModelConfig


class Activations:
    """Of layers on a stage of `rows` x `columns` chips, for steps of `tokens` on every row."""

    def __init__(self, config: ModelConfig, rows: int, tokens: int, columns: int = GALAXY_COLUMNS) -> None:
        self._config = config
        self._columns = columns
        self._local_experts = config.n_routed_experts // (rows * columns)
        self._tokens = tokens
        self._all_tokens = rows * tokens

    def attention(self) -> list[ChipTensor]:
        """Of a prefill of one lane, at the end of its round: every column borrows the lane, and one keeps it."""
        config = self._config
        heads, tokens, lanes = config.num_attention_heads, self._tokens, self._tokens * self._columns
        share, wide, narrow = heads // self._columns, config.kv_dim, config.kv_lora_rank
        return [
            *self._residual(),
            _float("q", (1, tokens, share, wide)),
            _float("kv", (1, 1, tokens, wide)),
            _float("kv_lanes", (1, 1, lanes, wide)),
            _float("own_kv", (1, 1, tokens, wide)),
            _float("q_lanes", (1, lanes, share, wide)),
            _float("own_q", (1, tokens, heads, wide)),
            _float("attended", (1, heads, tokens, narrow)),
            _float("attended_by_token", (1, tokens, heads, narrow)),
            _float("attended_lanes", (1, lanes, share, narrow)),
        ]

    def feed_forward(self, layer: int) -> list[ChipTensor]:
        """Of a layer's feed-forward part, before its results are added."""
        return self._mixture() if self._config.is_moe(layer) else self._dense()

    def experts(self) -> list[ChipTensor]:
        """What a pass through the chip's routed experts makes of its tokens."""
        config = self._config
        tokens = min(self._all_tokens, TOKENS_AT_ONCE)
        inner = (1, self._local_experts, tokens, config.moe_intermediate_size)
        outer = (1, self._local_experts, tokens, config.hidden_size)
        return [
            *(_float(name, inner) for name in ("gate", "up", "product")),
            *(_float(name, outer) for name in ("output", "weighted")),
        ]

    def _mixture(self) -> list[ChipTensor]:
        config = self._config
        tokens = min(self._all_tokens, TOKENS_AT_ONCE)
        return [
            *self._residual(),
            _float("own", (1, 1, self._tokens, config.hidden_size)),
            _float("every", (1, 1, self._all_tokens, config.hidden_size)),
            _float("logits", (1, 1, self._all_tokens, config.n_routed_experts), "float32"),
            _float("weights", (1, 1, self._all_tokens, config.num_experts_per_tok)),
            _float("indices", (1, 1, self._all_tokens, config.num_experts_per_tok)),
            _float("dense", (1, 1, tokens, config.n_routed_experts)),
            _float("local", (1, 1, tokens, self._local_experts)),
            _float("local_by_expert", (1, self._local_experts, tokens, 1)),
            *self.experts(),
            *self._former_pass(tokens),
            _float("routed", (1, 1, self._all_tokens, config.hidden_size)),
        ]

    def _former_pass(self, tokens: int) -> Iterator[ChipTensor]:
        """What is left of one pass through the experts when the next comes to its end, and that one's own tokens."""
        if self._all_tokens > TOKENS_AT_ONCE:
            yield _float("former_weighted", (1, self._local_experts, tokens, self._config.hidden_size))
            yield _float("some", (1, 1, tokens, self._config.hidden_size))

    def _dense(self) -> list[ChipTensor]:
        config = self._config
        inner = (1, 1, self._tokens, config.intermediate_size // self._columns)
        return [
            *self._residual(),
            *(_float(name, (1, 1, self._tokens, config.hidden_size)) for name in ("whole", "partial")),
            *(_float(name, inner) for name in ("gate", "up", "product")),
        ]

    def _residual(self) -> Iterator[ChipTensor]:
        """The layer's own input and its normalised form, and the cosines and sines of the step."""
        shape = (1, 1, self._tokens, self._config.hidden_size // self._columns)
        yield from (_float(name, shape) for name in ("x", "normed"))
        rope = (1, 1, self._tokens, self._config.qk_rope_head_dim)
        yield from (_float(name, rope) for name in ("cos", "sin"))


def _float(name: str, shape: tuple[int, ...], dtype: TensorDtype = "bfloat16") -> ChipTensor:
    return ChipTensor(name=name, shape=shape, dtype=dtype)
