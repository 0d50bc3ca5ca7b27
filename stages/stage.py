"""One pipeline stage: it runs steps, keeps slots and caches, and returns hidden states or tokens."""

import hashlib
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec
import torch

from stages.backend import set_float_dtype, ttnn
from stages.batch import HIDDEN_DTYPE, DecodeBatch
from stages.batch_builder import BatchBuilder
from stages.candidates import DeviceCandidates
from stages.converted_weights import ConvertedWeights, stage_parts
from stages.errors import PlanError, StepError
from stages.kv.block_memory import BlockMemory
from stages.kv.block_store import BlockStore
from stages.kv.inventory import Inventory
from stages.kv.page_tables import PageTables
from stages.kv.record_file import SUFFIX
from stages.kv.tiers import Tiers
from stages.mesh_spec import HiddenShard, MeshHidden
from stages.model_slice import Batch, HiddenStates, ModelSlice, OnProgress
from stages.models.registry import architecture_of
from stages.options import TRACE_REGION_BYTES, StageOptions
from stages.output_head import OutputHead
from stages.pending import OnDevice, PendingResult
from stages.plan import StageSpec
from stages.run_config import TORCH_DTYPES
from stages.step import Step, StepResult
from stages.traces import DecodeTraces, eager_steps
from stages.wormhole import GALAXY_COLUMNS
from weights.cache.cache import WeightCache
from weights.checkpoint import open_weights
from weights.model_config import ModelConfig, directory_name


def open_mesh(rows: int, columns: int, *, enable_trace: bool) -> ttnn.MeshDevice:
    """Opens rows x columns chips."""
    if rows * columns > 1:
        # Before the mesh: collectives need the network between chips.
        ttnn.set_fabric_config(ttnn.FabricConfig.FABRIC_2D)
    trace_region = TRACE_REGION_BYTES if enable_trace else 0
    return ttnn.open_mesh_device(ttnn.MeshShape(rows, columns), trace_region_size=trace_region)


def close_mesh(mesh_device: ttnn.MeshDevice) -> None:
    """Closes the mesh and its network."""
    has_network = mesh_device.get_num_devices() > 1
    ttnn.close_mesh_device(mesh_device)
    if has_network:
        ttnn.set_fabric_config(ttnn.FabricConfig.DISABLED)


class Stage:
    """A pipeline stage, which runs steps in the order of its calls."""

    def __init__(
        self,
        spec: StageSpec,
        options: StageOptions,
        model: ModelSlice,
        mesh_device: ttnn.MeshDevice,
        config: ModelConfig,
        weights_id: str = "",
    ) -> None:
        """Takes a model that has been loaded onto `mesh_device`, which `close` closes. Callers only read both.

        `weights_id` differs wherever the weights do, or how they are held.
        """
        self._spec = spec
        self._options = options
        self.model = model
        self.mesh_device = mesh_device
        self._config = config
        self._dtype = TORCH_DTYPES[options.dtype]
        self._epoch = 0
        cache = options.cache
        self._tables = PageTables(cache)
        self._weights_id = weights_id
        rope_tables = architecture_of(config).load_modules().rope_tables
        rope = rope_tables(config, mesh_device, cache.blocks_per_slot * cache.block_size)
        eager = eager_steps(options.execution)
        self._batches = BatchBuilder(config, mesh_device, self._tables, rope, is_static=eager is not None)
        self._traces = None if eager is None else DecodeTraces(self._decode, mesh_device, eager)
        self._head: OutputHead | None = None
        if spec.is_last:
            self._head = OutputHead(config, mesh_device, model, self._batches, options.vocabulary, eager)
        self._prepared: tuple[Step, Batch | None] | None = None
        memory = BlockMemory(model.kv_caches, mesh_device, cache, self._dtype)
        # Last, as nobody would close them if something else failed.
        self._tiers = Tiers.open(options.tiers, _file_name(spec, options), memory.record_bytes)
        self._blocks = BlockStore(memory, self._tables, self._tiers)

    @classmethod
    @torch.inference_mode()
    def load(
        cls, spec: StageSpec, options: StageOptions, on_progress: OnProgress, mesh_shape: tuple[int, int] | None = None
    ) -> "Stage":
        """Opens the mesh and loads the stage's weights, converting those that the weight cache does not have.

        `mesh_shape` is rows and columns; without it, the mesh follows from the pools of `options.cache`: one chip for
        one pool, else rows of a Galaxy. Raises PlanError where mesh, pools and model do not fit each other,
        CheckpointError where the weights cannot be used, and CacheError where converted ones cannot be kept.
        """
        shape = mesh_shape or _mesh_shape(options.cache.pools)
        if shape[0] * shape[1] != options.cache.pools:
            raise PlanError(
                f"A mesh of {shape[0]} x {shape[1]} chips needs as many KV pools, not {options.cache.pools}."
            )
        source = open_weights(
            Path(options.model_path),
            load_format=options.weights.load_format,
            seed=options.seed,
            changes=options.changes,
        )
        set_float_dtype(TORCH_DTYPES[options.dtype])
        mesh_device = open_mesh(*shape, enable_trace=options.execution.enable_trace)
        with ExitStack() as undo:
            undo.callback(close_mesh, mesh_device)
            weights = ConvertedWeights(
                source,
                WeightCache(Path(options.cache_dir)),
                options.dtype,
                mesh_device,
                options.weights.weight_dtypes,
                directory_name(Path(options.model_path)),
            )
            drafts = options.drafts.num_speculative_tokens > 0
            model = ModelSlice.load(spec, weights, options.cache, on_progress, drafts=drafts)
            parts = [str(weights.cache_key(part)) for part in stage_parts(source.config, spec, drafts=drafts)]
            stage = cls(spec, options, model, mesh_device, source.config, _digest(parts))
            undo.pop_all()
        return stage

    @torch.inference_mode()
    def step(self, step: Step, hidden: memoryview) -> memoryview | PendingResult:
        """Runs one step on bytes.

        `hidden` holds [step.token_count, hidden_size] in the stage's dtype, and nothing on the first stage. Returns
        the same for the next stage, in memory of its own, or on the last stage what is to be sampled. Raises StepError
        where the step contradicts the stage's state.
        """
        states = self._run(step, None if self._spec.is_first else self._from_bytes(step, hidden))
        if self._head is not None:
            return self._pending(self._head, step, states)
        self._blocks.end(step)
        output = self._to_torch(states)
        if not output.numel():
            return memoryview(b"")
        return output.contiguous().view(torch.uint8).numpy().data.cast("B")

    @torch.inference_mode()
    def forward(self, step: Step, hidden: torch.Tensor | None) -> torch.Tensor:
        """Runs one step on tensors.

        `hidden` [step.token_count, hidden_size] in the stage's dtype, None on the first stage. Returns the same for
        the next stage, or on the last stage float32 logits [tokens after which one is sampled, vocabulary]. Raises as
        `step` does.
        """
        states = self._run(step, hidden)
        self._blocks.end(step)
        if self._head is None:
            return self._to_torch(states)
        self._head.pass_over(step)
        return self._head.logits(step, states)

    @torch.inference_mode()
    def load_blocks(self, step: Step) -> list[int]:
        """Brings the blocks of a load step back; returns the indices of those that are not to be had.

        Raises StepError where the step contradicts the stage's state.
        """
        self._prepare(step)
        return self._blocks.load(step.loads)

    def inventory(self, version: int) -> Inventory:
        """Returns what the tiers have, or what changed of it since a version. May be called from any thread."""
        return self._tiers.inventory(version, self._weights_id)

    def hidden_spec(self) -> MeshHidden:
        """The mesh and the hidden states on it: bfloat16 [1, 1, tokens, hidden / columns] on each chip."""
        rows, columns = self.mesh_device.shape
        lanes = (
            self._options.cache.slots // self._options.cache.pools * (1 + self._options.drafts.num_speculative_tokens)
        )
        users = columns * self._batches.users(lanes)
        return MeshHidden((rows, columns), prefill=self._shard(0), decode=self._shard(users))

    @torch.inference_mode()
    def step_hidden_spec(self, step: Step) -> HiddenShard | None:
        """Returns the step's hidden states on each chip; None without tokens. Raises StepError as `step` does."""
        batch = self._batch_of(step)
        return None if batch is None else self._shard(batch.layout.width)

    @torch.inference_mode()
    def step_on_mesh(self, step: Step, hidden: ttnn.Tensor | None) -> ttnn.Tensor | PendingResult | None:
        """Runs one step on tensors of the mesh, as `step_hidden_spec` gives them, `hidden` None on the first stage."""
        batch = self._batch_of(step)
        states = None
        if batch is not None:
            states = self._compute(self._input(step, None, batch) if hidden is None else hidden, batch)
        if self._head is not None:
            return self._pending(self._head, step, states)
        self._blocks.end(step)
        return None if states is None else states.x

    def close(self) -> None:
        """Releases the traces and closes the mesh."""
        if self._traces is not None:
            self._traces.release()
        if self._head is not None:
            self._head.close()
        self._tiers.close()
        close_mesh(self.mesh_device)

    def _pending(self, head: OutputHead, step: Step, states: HiddenStates | None) -> PendingResult:
        """What is to be sampled. What the step has filled is kept then, as it counts only once the last stage is done.

        It is read before the next step overwrites it, and after the draft layer has run, whose cache is in it too.
        """
        pending = head.begin(step, states)
        filled = None if pending.needs_device else self._blocks.filled(step)

        @torch.inference_mode()
        def draw(on_device: OnDevice) -> StepResult:
            result = pending.draw(on_device)
            self._blocks.keep(self._blocks.filled(step) if filled is None else filled)
            return result

        return PendingResult(draw, pending.needs_device)

    def _run(self, step: Step, hidden: torch.Tensor | None) -> HiddenStates | None:
        """Runs a step; None for one without segments, which changes slots only."""
        batch = self._prepare(step)
        return None if batch is None else self._compute(self._input(step, hidden, batch), batch)

    def _prepare(self, step: Step) -> Batch | None:
        """Applies the step to slots and page tables and makes its inputs; None without segments."""
        self._enter_epoch(step)
        self._tables.apply(step)
        self._blocks.begin(step)
        if self._head is not None:
            self._head.note(step)
        if not step.segments:
            return None
        return self._batches.decode(step) if step.mode == "decode" else self._batches.prefill(step)

    def _batch_of(self, step: Step) -> Batch | None:
        """Prepares the step, unless `step_hidden_spec` has done so just before."""
        if self._prepared is None or self._prepared[0] is not step:
            self._prepared = step, self._prepare(step)
        return self._prepared[1]

    def _compute(self, inputs: ttnn.Tensor, batch: Batch) -> HiddenStates:
        if self._traces is not None and isinstance(batch, DecodeBatch):
            x, *made = self._traces.run([inputs], batch)
            logits, found = (made[0], made[1:]) if made else (None, [])
            return HiddenStates(x, batch, logits, DeviceCandidates(*found) if found else None)
        return HiddenStates(self.model.forward(self.model.enter(inputs, batch), batch), batch)

    def _decode(self, inputs: Sequence[ttnn.Tensor], batch: DecodeBatch) -> list[ttnn.Tensor]:
        """The pass that a trace records: hidden states of all lanes, and on the last stage logits and candidates."""
        [entering] = inputs
        x = self.model.forward(self.model.enter(entering, batch), batch)
        if self._head is None:
            return [x]
        logits = self.model.logits(x, batch, None)
        return [x, logits, *self._head.candidates(logits)]

    def _shard(self, tokens: int) -> HiddenShard:
        return HiddenShard((1, 1, tokens, self._config.hidden_size // self.mesh_device.shape[1]), HIDDEN_DTYPE)

    def _enter_epoch(self, step: Step) -> None:
        if step.epoch < self._epoch:
            raise StepError(f"Step {step.step_id} is of epoch {step.epoch}, but epoch {self._epoch} has begun.")
        if step.epoch > self._epoch:
            self._tables.clear()
            self._blocks.enter_epoch()
            if self._head is not None:
                self._head.enter_epoch()
            self._epoch = step.epoch

    def _input(self, step: Step, hidden: torch.Tensor | None, batch: Batch) -> ttnn.Tensor:
        """Puts token ids on the mesh on the first stage, hidden states on the others."""
        if hidden is None:
            self._check_tokens(step)
            return self._batches.ids(batch.layout, [token for segment in step.segments for token in segment.tokens])
        if hidden.shape != (step.token_count, self._config.hidden_size):
            raise StepError(
                f"Step {step.step_id} has {step.token_count} tokens of {self._config.hidden_size} values, but hidden "
                f"states of shape {tuple(hidden.shape)}."
            )
        return self._batches.hidden(batch.layout, hidden)

    def _check_tokens(self, step: Step) -> None:
        for segment in step.segments:
            if min(segment.tokens) < 0 or max(segment.tokens) >= self._config.vocab_size:
                raise StepError(f"Slot {segment.slot} has a token outside the vocabulary of {self._config.vocab_size}.")

    def _to_torch(self, states: HiddenStates | None) -> torch.Tensor:
        """Returns [tokens, hidden_size] of the step, in the stage's dtype."""
        if states is None:
            return torch.empty(0, self._config.hidden_size)
        return self._batches.hidden_to_torch(states.batch.layout, states.x).to(self._dtype)

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


def _file_name(spec: StageSpec, options: StageOptions) -> str:
    """The name of the stage's files in the tiers: that of all plans with the same records."""
    facts = [str(spec.stages), str(options.cache.pools), options.dtype, options.model_path]
    if spec.is_last and options.drafts.num_speculative_tokens:
        facts.append("drafts")
    return f"layers-{spec.first_layer}-{spec.end_layer}-{_digest(facts)[:8]}{SUFFIX}"


def _digest(facts: list[str]) -> str:
    return hashlib.blake2b(msgspec.json.encode(facts), digest_size=16).hexdigest()
