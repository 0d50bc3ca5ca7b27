"""Decoder layers on a mock mesh whose weights have shapes but no values, so that they take neither time nor memory."""

from typing import Any

import ttnn

from stages.batch_builder import BatchBuilder
from stages.capacity.chip_weights import ChipTensor, ChipWeights
from stages.capacity.deployment import Deployment
from stages.kv.page_tables import PageTables
from stages.models.deepseek_v3.decoder_block import DenseBlock, MoEBlock
from stages.models.deepseek_v3.mtp import MTP
from stages.models.deepseek_v3.rope import rope_tables
from stages.step import Admission, SamplingParams, Segment, Step
from weights.model_config import ModelConfig

LAYOUTS = {"tile": ttnn.TILE_LAYOUT, "row_major": ttnn.ROW_MAJOR_LAYOUT}
GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


def empty(tensor: ChipTensor, mesh: ttnn.MeshDevice) -> ttnn.Tensor:
    """Allocates `tensor` on every chip."""
    dtype, layout = getattr(ttnn, tensor.dtype), LAYOUTS[tensor.layout]
    return ttnn.empty(tensor.shape, dtype=dtype, layout=layout, device=mesh)


class EmptyBlock:
    """One layer of a stage of a deployment: a decoder layer, or with `drafts` the one that comes after all of them."""

    def __init__(
        self, config: ModelConfig, plan: Deployment, layer: int, mesh: ttnn.MeshDevice, *, drafts: bool = False
    ) -> None:
        self._mesh = mesh
        self._config = config
        decoder = MoEBlock if config.is_moe(layer) else DenseBlock
        self._block: Any = MTP if drafts else decoder
        self._inputs = 2 if drafts else 1
        self._cache = plan.cache
        self._state = self._block.create_state(config, mesh, plan.cache)
        self._rope = rope_tables(config, mesh, plan.cache.blocks_per_slot * plan.cache.block_size)
        self._files: dict[str, Any] = {}
        self._loaded: dict[str, ttnn.Tensor] = {}
        weights = ChipWeights(config, plan.dtypes, plan.rows_per_stage)
        for tensor in weights.draft() if drafts else weights.layer(layer):
            self._add(tensor)

    def prefill(self, tokens: int) -> list[dict[str, Any]]:
        """Runs a prompt of one request through the layer; returns ttnn's record of allocations."""
        tables = PageTables(self._cache)
        blocks = list(range(-(-tokens // self._cache.block_size)))
        segment = Segment(slot=0, start=0, tokens=[0] * tokens, new_blocks=blocks, sample=True)
        admission = Admission(slot=0, sampling=GREEDY, tokens=[0] * tokens, prompt_tokens=tokens)
        step = Step(epoch=1, step_id=1, mode="prefill", segments=[segment], admissions=[admission], ended=[])
        tables.apply(step)
        batch = BatchBuilder(self._config, self._mesh, tables, self._rope).prefill(step)
        config = self._run_config(self._block.prefill_model_config)
        inputs = [self._hidden(tokens, ttnn.DRAM_MEMORY_CONFIG) for _ in range(self._inputs)]
        _begin_record()
        self._block.forward_prefill(*inputs, config, batch)
        return _end_record()

    def decode_feed_forward(self, users_per_row: int) -> list[dict[str, Any]]:
        """Runs a token of each user through the feed-forward part, with results in L1; returns the same record."""
        config = self._run_config(self._block.decode_model_config)
        x = self._hidden(users_per_row, ttnn.L1_MEMORY_CONFIG)
        _begin_record()
        self._block.feed_forward.forward_decode(x, config["mlp"])
        return _end_record()

    def _add(self, tensor: ChipTensor) -> None:
        """Adds an allocated tensor in place of a weight file that has been loaded."""
        path = f"/nowhere/{tensor.name}.tensorbin"
        self._loaded[path] = empty(tensor, self._mesh)
        *modules, file = tensor.name.split("/")
        operation, operand = file.split(".")
        place = self._files
        for module in modules:
            place = place.setdefault(module, {})
        place.setdefault(operation, {})[operand] = path

    def _run_config(self, model_config: Any) -> Any:
        return self._block.run_config(model_config(self._config, self._mesh), self._files, self._state, self._loaded)

    def _hidden(self, tokens: int, memory_config: ttnn.MemoryConfig) -> ttnn.Tensor:
        shape = (1, 1, tokens, self._config.hidden_size // self._mesh.shape[1])
        return ttnn.empty(
            shape, dtype=ttnn.bfloat16, layout=ttnn.TILE_LAYOUT, device=self._mesh, memory_config=memory_config
        )


def _begin_record() -> None:
    ttnn.graph.begin_graph_capture(ttnn.graph.RunMode.NORMAL)


def _end_record() -> list[dict[str, Any]]:
    record: list[dict[str, Any]] = ttnn.graph.end_graph_capture()
    return record


def peak_bytes(record: list[dict[str, Any]], memory: str) -> int:
    """The most bytes of "DRAM" or "L1" that were allocated at once on each chip."""
    signs = {"buffer_allocate": 1, "buffer_deallocate": -1}
    held = peak = 0
    for node in record:
        if node["node_type"] in signs and node["params"]["type"] == memory:
            held += signs[node["node_type"]] * int(node["params"]["size"])
            peak = max(peak, held)
    return peak
