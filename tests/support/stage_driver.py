"""Drives stages as a pipeline would, in one process: steps with shuffled blocks through one stage after the other."""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from stages.kv.record_file import KEY_BYTES
from stages.options import CacheOptions, Dtype, ExecutionOptions, StageOptions, WeightOptions
from stages.pending import drawn
from stages.plan import StageSpec, plan_stages
from stages.stage import Stage
from stages.step import Admission, BlockLoad, Mode, SamplingParams, Segment, Step, StepResult
from weights.model_config import ModelConfig

GREEDY = SamplingParams(temperature=0.0, top_p=1.0, top_k=0, seed=0, choice=0)


def key_of(number: int) -> bytes:
    """The key of a block that is known by a number."""
    return number.to_bytes(KEY_BYTES, "little")


def cache_options(slots: int = 4, pools: int = 1, max_model_len: int = 256, block_size: int = 32) -> CacheOptions:
    """A cache with room for every slot at its longest."""
    blocks = -(-max_model_len // block_size) * (slots // pools)
    return CacheOptions(slots=slots, pools=pools, blocks=blocks, block_size=block_size, max_model_len=max_model_len)


def stage_options(
    model: Path, cache_dir: Path, *, dtype: Dtype = "float32", cache: CacheOptions | None = None, **changes: Any
) -> StageOptions:
    """Options of a stage that serves the checkpoint `model`."""
    weights = {name: changes.pop(name) for name in WeightOptions.__struct_fields__ if name in changes}
    execution = {name: changes.pop(name) for name in ExecutionOptions.__struct_fields__ if name in changes}
    return StageOptions(
        model_path=str(model),
        cache_dir=str(cache_dir),
        dtype=dtype,
        cache=cache or cache_options(),
        weights=WeightOptions(**weights),
        execution=ExecutionOptions(**execution),
        **{"seed": 0, **changes},
    )


class Driver:
    """Slots and blocks of a pipeline of `stages`, as its scheduler would keep them."""

    def __init__(self, stages: Sequence[Stage], cache: CacheOptions, seed: int = 0) -> None:
        self.stages = stages
        self.cache = cache
        self.epoch = 1
        self._step_id = 0
        self._random = random.Random(seed)
        self._free = [self._shuffled(cache.blocks) for _ in range(cache.pools)]
        self._held: dict[int, list[int]] = {}
        self._admissions: list[Admission] = []
        self._ended: list[int] = []

    @classmethod
    def load(
        cls, options: StageOptions, stages: int = 1, mesh_shape: tuple[int, int] | None = None, seed: int = 0
    ) -> "Driver":
        """Loads all stages of a model."""
        config = ModelConfig.from_file(Path(options.model_path) / "config.json").changed(options.changes)
        specs: list[StageSpec] = plan_stages(config, stages)
        loaded = [Stage.load(spec, options, lambda _done, _of: None, mesh_shape) for spec in specs]
        return cls(loaded, options.cache, seed)

    def admit(
        self,
        slot: int,
        sampling: SamplingParams = GREEDY,
        tokens: Sequence[int] = (),
        prompt_tokens: int | None = None,
        cached: Sequence[int] = (),
    ) -> None:
        """The next step admits a request to `slot`; without `prompt_tokens`, all its `tokens` are its prompt.

        Its first tokens are in the blocks `cached`, which others may hold too.
        """
        pool = self.cache.pool_of(slot)
        self._held[slot] = list(cached)
        self._free[pool] = [block for block in self._free[pool] if block not in cached]
        prompt = len(tokens) if prompt_tokens is None else prompt_tokens
        self._admissions.append(
            Admission(slot=slot, sampling=sampling, tokens=list(tokens), prompt_tokens=prompt, cached=list(cached))
        )

    def blocks(self, slot: int) -> list[int]:
        """The blocks of a slot, in order."""
        return self._held[slot].copy()

    def free(self, pool: int) -> list[int]:
        """The blocks of a pool that no slot holds."""
        return self._free[pool].copy()

    def end(self, slot: int) -> None:
        """The next step ends the request in `slot`; its blocks may be given away at once."""
        pool = self.cache.pool_of(slot)
        blocks = self._held.pop(slot)
        others = {block for other in self._held if self.cache.pool_of(other) == pool for block in self._held[other]}
        self._free[pool].extend(block for block in blocks if block not in others)
        self._ended.append(slot)

    def segment(
        self, slot: int, start: int, tokens: Sequence[int], sample: bool = True, keys: Sequence[bytes] = ()
    ) -> Segment:
        """A run of tokens, with the blocks it needs beyond those the slot holds, and keys of those that it fills."""
        held = self._held[slot]
        missing = -(-(start + len(tokens)) // self.cache.block_size) - len(held)
        new = [self._free[self.cache.pool_of(slot)].pop() for _ in range(max(missing, 0))]
        held.extend(new)
        return Segment(slot=slot, start=start, tokens=list(tokens), new_blocks=new, sample=sample, keys=list(keys))

    def step(self, mode: Mode, segments: Sequence[Segment], loads: Sequence[BlockLoad] = ()) -> Step:
        """A step of these segments or loads, with the admissions and ends that are due."""
        self._step_id += 1
        step = Step(
            epoch=self.epoch,
            step_id=self._step_id,
            mode=mode,
            segments=list(segments),
            admissions=self._admissions,
            ended=self._ended,
            loads=list(loads),
        )
        self._admissions, self._ended = [], []
        return step

    def run(self, mode: Mode, segments: Sequence[Segment]) -> torch.Tensor:
        """Logits of the segments that sample, through all stages."""
        step = self.step(mode, segments)
        hidden = None
        for stage in self.stages:
            hidden = stage.forward(step, hidden)
        if hidden is None:
            raise ValueError("no stages to run")
        return hidden

    def load_blocks(self, loads: Sequence[BlockLoad]) -> list[int]:
        """The indices of those loads that a stage could not bring."""
        step = self.step("load", [], loads)
        return sorted({index for stage in self.stages for index in stage.load_blocks(step)})

    def run_bytes(self, mode: Mode, segments: Sequence[Segment]) -> StepResult:
        """What the last stage sampled, with hidden states as bytes between stages."""
        step = self.step(mode, segments)
        hidden = memoryview(b"")
        for stage in self.stages[:-1]:
            output = stage.step(step, hidden)
            assert isinstance(output, memoryview)
            hidden = memoryview(bytearray(output))
        result = drawn(self.stages[-1].step(step, hidden))
        assert isinstance(result, StepResult)
        assert (result.epoch, result.step_id) == (step.epoch, step.step_id)
        return result

    def prefill(self, prompts: Mapping[int, Sequence[int]], chunk: int | None = None) -> torch.Tensor:
        """Prefills a prompt a slot, in chunks of at most `chunk` tokens; logits after each prompt's last token."""
        last: dict[int, torch.Tensor] = {}
        longest = max(len(prompt) for prompt in prompts.values())
        for start in range(0, longest, chunk or longest):
            end = start + (chunk or longest)
            parts = {slot: prompt for slot, prompt in prompts.items() if start < len(prompt)}
            segments = [
                self.segment(slot, start, prompt[start:end], sample=len(prompt) <= end)
                for slot, prompt in parts.items()
            ]
            logits = self.run("prefill", segments)
            sampled = [segment.slot for segment in segments if segment.sample]
            last.update(zip(sampled, logits, strict=True))
        return torch.stack([last[slot] for slot in prompts])

    def decode(self, tokens: Mapping[int, tuple[int, int]]) -> torch.Tensor:
        """One step of slot -> (position, token); logits in the order of `tokens`."""
        return self.run("decode", [self.segment(slot, at, [token]) for slot, (at, token) in tokens.items()])

    def close(self) -> None:
        """Gives up the stages. May be repeated."""
        for stage in self.stages:
            stage.close()
        self.stages = []

    def _shuffled(self, blocks: int) -> list[int]:
        order = list(range(blocks))
        self._random.shuffle(order)
        return order


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """norm(actual - expected) / norm(expected)."""
    return float((actual - expected).norm() / expected.norm())
