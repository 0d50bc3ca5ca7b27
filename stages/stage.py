"""One pipeline stage: takes steps in, keeps slots and caches, gives hidden states or tokens out."""

from pathlib import Path

import torch

from stages.backend import set_float_dtype, ttnn
from stages.batch import BatchBuilder
from stages.converted_weights import ConvertedWeights
from stages.deepseek_v3.rope import RopeTables
from stages.dtypes import TORCH_DTYPES
from stages.errors import PlanError, StepError
from stages.kv_cache import PageTables
from stages.last_stage import LastStage
from stages.model_slice import Batch, HiddenStates, ModelSlice, OnProgress
from stages.options import StageOptions
from stages.plan import StageSpec
from stages.step import Step, StepResult
from weights.cache import WeightCache
from weights.load import open_weights
from weights.model_config import ModelConfig

GALAXY_COLUMNS = 8
"""Chips in a row of a Wormhole Galaxy."""


class Stage:
    """Runs steps in the order in which it is given them."""

    def __init__(
        self,
        spec: StageSpec,
        options: StageOptions,
        model: ModelSlice,
        mesh_device: ttnn.MeshDevice,
        config: ModelConfig,
    ) -> None:
        """`model` has been loaded onto `mesh_device`, which `close` gives up."""
        self._spec = spec
        self._options = options
        self._model = model
        self._mesh_device = mesh_device
        self._config = config
        self._dtype = TORCH_DTYPES[options.dtype]
        self._epoch = 0
        cache = options.cache
        self._tables = PageTables(cache)
        rope = RopeTables.create(config, mesh_device, cache.blocks_per_slot * cache.block_size)
        self._batches = BatchBuilder(config, mesh_device, self._tables, rope)
        self._last = LastStage(config, mesh_device, model, self._batches) if spec.is_last else None

    @classmethod
    @torch.inference_mode()
    def load(
        cls, spec: StageSpec, options: StageOptions, on_progress: OnProgress, mesh_shape: tuple[int, int] | None = None
    ) -> "Stage":
        """Opens the mesh and loads the stage's weights, converting those that the weight cache does not have.

        `mesh_shape` is rows and columns; without it, what the pools of `options.cache` ask for: one chip for one
        pool, else rows of a Galaxy. Raises PlanError where mesh, pools and model do not fit each other,
        CheckpointError where the weights will not do, and CacheError where converted ones cannot be kept.
        """
        shape = mesh_shape or _mesh_shape(options.cache.pools)
        if shape[0] * shape[1] != options.cache.pools:
            raise PlanError(
                f"A mesh of {shape[0]} x {shape[1]} chips needs as many KV pools, not {options.cache.pools}."
            )
        source = open_weights(
            Path(options.model_path), load_format=options.load_format, seed=options.seed, changes=options.changes
        )
        set_float_dtype(TORCH_DTYPES[options.dtype])
        if options.cache.pools > 1:
            # Before the mesh is opened: collectives need the network between chips.
            ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
        mesh_device = ttnn.open_mesh_device(ttnn.MeshShape(*shape))
        weights = ConvertedWeights(source, WeightCache(Path(options.cache_dir)), options.dtype, mesh_device)
        model = ModelSlice.load(spec, weights, options.cache, on_progress)
        return cls(spec, options, model, mesh_device, source.config)

    @torch.inference_mode()
    def step(self, step: Step, hidden: memoryview) -> memoryview | StepResult:
        """Runs one step on bytes.

        `hidden` holds [step.token_count, hidden_size] in the stage's dtype, and nothing on the first stage. Returns
        the same for the next stage, in memory of its own, or on the last stage what was sampled. Raises StepError
        where the step contradicts the stage's state.
        """
        states = self._run(step, None if self._spec.is_first else self._from_bytes(step, hidden))
        if self._last is not None:
            return self._last.result(step, states)
        output = self._to_torch(states)
        if not output.numel():
            return memoryview(b"")
        return output.contiguous().view(torch.uint8).numpy().data.cast("B")

    @torch.inference_mode()
    def forward(self, step: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        """Runs one step on tensors.

        `hidden` [step.token_count, hidden_size] in the stage's dtype, None on the first stage. Returns the same for
        the next stage, or on the last stage float32 logits [segments that sample, vocabulary]. Raises as `step` does.
        """
        states = self._run(step, hidden)
        return self._to_torch(states) if self._last is None else self._last.logits(step, states)

    def close(self) -> None:
        """Gives up the mesh."""
        ttnn.close_mesh_device(self._mesh_device)

    def _run(self, step: Step, hidden: torch.Tensor | None) -> HiddenStates | None:
        """None for a step without segments, which changes slots only."""
        self._enter_epoch(step)
        self._tables.apply(step)
        if self._last is not None:
            self._last.apply(step)
        if not step.segments:
            return None
        batch = self._batches.prefill(step) if step.mode == "prefill" else self._batches.decode(step)
        return HiddenStates(self._model.forward(self._input(step, hidden, batch), batch), batch)

    def _enter_epoch(self, step: Step) -> None:
        if step.epoch < self._epoch:
            raise StepError(f"Step {step.step_id} is of epoch {step.epoch}, but epoch {self._epoch} has begun.")
        if step.epoch > self._epoch:
            self._tables.clear()
            if self._last is not None:
                self._last.clear()
            self._epoch = step.epoch

    def _input(self, step: Step, hidden: torch.Tensor | None, batch: Batch) -> ttnn.Tensor:
        if hidden is None:
            self._check_tokens(step)
            return self._model.embed(self._batches.ids(batch, step), batch)
        if hidden.shape != (step.token_count, self._config.hidden_size):
            raise StepError(
                f"Step {step.step_id} has {step.token_count} tokens of {self._config.hidden_size} values, but hidden "
                f"states of shape {tuple(hidden.shape)}."
            )
        return self._batches.hidden(batch.places, hidden)

    def _check_tokens(self, step: Step) -> None:
        for segment in step.segments:
            if min(segment.tokens) < 0 or max(segment.tokens) >= self._config.vocab_size:
                raise StepError(f"Slot {segment.slot} has a token outside the vocabulary of {self._config.vocab_size}.")

    def _to_torch(self, states: HiddenStates | None) -> torch.Tensor:
        """[tokens, hidden_size] of the step."""
        if states is None:
            return torch.empty(0, self._config.hidden_size)
        return self._batches.hidden_to_torch(states.batch.places, states.x)

    def _from_bytes(self, step: Step, hidden: memoryview) -> torch.Tensor:
        size = step.token_count * self._config.hidden_size * self._dtype.itemsize
        if hidden.nbytes != size:
            raise StepError(f"Step {step.step_id} needs {size} bytes of hidden states, but {hidden.nbytes} came.")
        if not size:
            return torch.empty(0, self._config.hidden_size, dtype=self._dtype)
        return torch.frombuffer(hidden, dtype=self._dtype).view(step.token_count, self._config.hidden_size)


def _mesh_shape(pools: int) -> tuple[int, int]:
    if pools == 1:
        return (1, 1)
    if pools % GALAXY_COLUMNS:
        raise PlanError(f"{pools} KV pools are neither one chip's nor whole rows of {GALAXY_COLUMNS} chips.")
    return (pools // GALAXY_COLUMNS, GALAXY_COLUMNS)
