"""What commands show: plans, pipelines and caches, with tables that are folded where the console is narrow."""

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime, timezone
from typing import Literal

import msgspec
from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from api.messages.pipeline_view import DraftView, EngineView, PipelineView, StageView
from api.settings.planning import PREDICTED, Plan
from stages.capacity.chip_memory import StageMemory
from stages.wormhole import GALAXY_COLUMNS, GALAXY_ROWS
from weights.cache.inventory import CacheEntry
from weights.sizes import ceil_div, counted, in_words

GAP = 1
"""Characters between two columns."""

TEXT_WIDTH_MIN = 30
"""What a column of sentences keeps, where they go on in the next line, before a column goes below."""

MS = 1e3
MIB = 1 << 20

STYLES = {
    **dict.fromkeys(("running", "ready"), "green"),
    **dict.fromkeys(("blocked", "stopping"), "yellow"),
    **dict.fromkeys(("silent", "dead", "failed"), "red"),
}


class Column(msgspec.Struct, frozen=True):
    """A column of a table; the words of a sentence may go on in the next line, a figure stays whole."""

    name: str
    cells: list[Text]
    kind: Literal["figure", "name", "sentence"]

    @classmethod
    def of(cls, name: str, cells: Iterable[str | Text], kind: Literal["figure", "name", "sentence"]) -> "Column":
        """A column of texts."""
        return cls(name, [Text(cell) if isinstance(cell, str) else cell for cell in cells], kind)

    @property
    def width(self) -> int:
        """The characters that it takes at least."""
        widest = max(len(self.name), *(cell.cell_len for cell in self.cells), 1)
        return min(widest, TEXT_WIDTH_MIN) if self.kind == "sentence" else widest


class FoldedTable:
    """A table that any width holds: columns that do not fit go below, beside the first ones again, its keys."""

    def __init__(self, columns: Sequence[Column], keys: int = 1) -> None:
        self._keys, self._others = list(columns[:keys]), list(columns[keys:])

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        """The tables, one below the other."""
        for part, columns in enumerate(self._folded(options.max_width)):
            if part:
                yield Text()
            table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, GAP, 0, 0))
            for column in columns:
                table.add_column(
                    column.name,
                    justify="right" if column.kind == "figure" else "left",
                    no_wrap=column.kind != "sentence",
                    overflow="fold",
                )
            for cells in zip(*(column.cells for column in columns), strict=True):
                table.add_row(*cells)
            yield table

    def _folded(self, width: int) -> list[list[Column]]:
        parts = [[*self._keys]]
        for column in self._others:
            if len(parts[-1]) > len(self._keys) and _width([*parts[-1], column]) > width:
                parts.append([*self._keys])
            parts[-1].append(column)
        return parts


def _width(columns: Sequence[Column]) -> int:
    """What a table of these columns takes; the box has a character between two of them."""
    return sum(column.width for column in columns) + (GAP + 1) * (len(columns) - 1)


# Plans


def plan_text(plan: Plan) -> Group:
    """A plan that fits."""
    return Group(
        _plan_head(plan),
        *(Text(f"  assumed: {line}") for line in plan.assumptions),
        Text("DRAM of each chip of a stage:"),
        _memory_table(plan.memory),
        Text(f"Speed, {PREDICTED}; milliseconds of a step, by what they go to:"),
        _time_table(plan),
        *(Text(line) for line in _speed(plan)),
        *(Text(line) for line in _tiers(plan)),
    )


def _plan_head(plan: Plan) -> Text:
    deployment = plan.deployment
    galaxies = counted(ceil_div(deployment.rows, GALAXY_ROWS), "Galaxy")
    text = Text.assemble((plan.model, "bold"))
    text.append(
        f" fits {counted(deployment.rows, 'row')} of {GALAXY_COLUMNS} chips ({galaxies}): "
        f"{counted(deployment.stages, 'stage')} of {counted(deployment.rows_per_stage, 'row')}, "
        f"{deployment.users_per_row} users a row in each of {counted(deployment.steps_in_flight, 'microbatch')}, "
        f"{deployment.users} requests in flight."
    )
    return text


def _memory_table(memory: Sequence[StageMemory]) -> FoldedTable:
    parts = {
        "weights": "weights",
        "KV cache": "kv_cache",
        "tables": "tables",
        "activations": "activations",
        "trace": "trace",
        "total": "total",
        "of": "available",
    }
    return FoldedTable(
        [
            Column.of("stage", (str(stage.stage) for stage in memory), "figure"),
            Column.of("layers", map(_layers, memory), "figure"),
            *(
                Column.of(name, (in_words(getattr(stage, part)) for stage in memory), "figure")
                for name, part in parts.items()
            ),
            Column.of("full", (f"{stage.total / stage.available:.0%}" for stage in memory), "figure"),
        ]
    )


def _time_table(plan: Plan) -> FoldedTable:
    decode, prefill = plan.prediction.decode, plan.prediction.prefill
    seconds = {
        "decode": [step.total_s for step in decode],
        "memory": [step.memory_s for step in decode],
        "compute": [step.compute_s for step in decode],
        "network": [step.network_s for step in decode],
        "launches": [step.launch_s for step in decode],
        "prefill chunk": [step.total_s for step in prefill],
    }
    return FoldedTable(
        [
            Column.of("stage", (str(stage.stage) for stage in plan.memory), "figure"),
            *(Column.of(name, (f"{time * MS:.1f}" for time in times), "figure") for name, times in seconds.items()),
        ]
    )


def _speed(plan: Plan) -> Iterator[str]:
    prediction, options = plan.prediction, plan.options
    yield (
        f"{prediction.tokens_per_s_per_user:.2f} t/s/u (tokens per second for each user), "
        f"{prediction.tokens_per_s:.0f} tokens/s with all {prediction.users} requests in flight ({PREDICTED})"
    )
    yield (
        f"{prediction.ttft_s:.2f} s to the first token of a prompt of {options.prompt_tokens} tokens on an idle "
        f"pipeline ({PREDICTED})"
    )
    steps = "replayed from traces" if options.traced else "launched op by op"
    experts = "all experts of a chip run" if options.expert_kernel == "all" else "only chosen experts run"
    yield f"Decode steps are {steps}; {experts}; sampling and other work of the hosts is not in it."


def _tiers(plan: Plan) -> Iterator[str]:
    tiers, context = plan.tiers, plan.options.context
    held = {"chips": tiers.device_tokens, "hosts": tiers.host_tokens, "disks": tiers.disk_tokens}
    parts = [
        f"{where} {tokens:,} tokens ({tokens // context:,} conversations)" for where, tokens in held.items() if tokens
    ]
    yield f"KV cache of conversations of {context} tokens: {', '.join(parts)}."
    yield (
        f"{tiers.hit_ttft_s:.2f} s to the first token where that prompt is cached but for its last block ({PREDICTED})"
    )
    yield (
        f"{tiers.recovery_s:.1f} s from the replacement of a lost stage until all {plan.prediction.users} requests go "
        f"on, {tiers.recompute_s:.1f} s where no copy of the KV cache is kept ({PREDICTED})"
    )


def _layers(memory: StageMemory) -> str:
    last = memory.end_layer - 1
    return str(last) if memory.first_layer == last else f"{memory.first_layer}-{last}"


# Pipelines


def pipeline_text(view: PipelineView) -> Group:
    """What a server says of its pipelines."""
    parts: list[Text | FoldedTable]
    if len(view.replicas) == 1:
        parts = _engine_lines(view.model, view.phase, view.detail, view.engine)
    else:
        parts = [_head(view.model, view.phase)]
        for replica in view.replicas:
            parts += _engine_lines(f"replica {replica.replica}", replica.phase, replica.detail, replica.engine)
    if view.engine is not None:
        parts.append(_stage_table(view.stages, shows_replica=len(view.replicas) > 1))
    return Group(*parts)


def _engine_lines(name: str, phase: str, detail: str, engine: EngineView | None) -> list[Text | FoldedTable]:
    head = _head(name, phase)
    if detail:
        head.append(f". {detail}")
    if engine is None:
        return [head]
    return [head, _engine_line(engine), _prefix_line(engine), *_draft_lines(engine.drafts)]


def _head(name: str, phase: str) -> Text:
    return Text.assemble((name, "bold"), ": ", (phase, STYLES.get(phase, "yellow")))


def _engine_line(engine: EngineView) -> Text:
    return Text(
        f"{counted(engine.requests_running, 'request')} running, {engine.requests_waiting} waiting, "
        f"{counted(engine.preemptions, 'preemption')}; {engine.steps_in_flight} of "
        f"{counted(engine.microbatches, 'microbatch')} in flight; {engine.slots_used} of "
        f"{counted(engine.slots, 'slot')}, {engine.kv_cache_blocks_used} of {engine.kv_cache_blocks} KV blocks; "
        f"epoch {'-' if engine.epoch is None else engine.epoch}, engine pid {engine.pid}"
    )


def _prefix_line(engine: EngineView) -> Text:
    text = f"prefix cache: {engine.prefix_cache_blocks:,} block{'' if engine.prefix_cache_blocks == 1 else 's'}"
    if engine.prefix_cache_queries:
        text += f", {engine.prefix_cache_hits / engine.prefix_cache_queries:.0%} of prompt tokens found"
    if engine.host_tier_bytes or engine.disk_tier_bytes:
        text += f"; {in_words(engine.host_tier_bytes)} in host memory, {in_words(engine.disk_tier_bytes)} on disk"
    return Text(text)


def _draft_lines(drafts: DraftView | None) -> Iterator[Text]:
    if drafts is None:
        return
    text = f"drafts: {'on' if drafts.are_on else 'off'}, up to {counted(drafts.num_speculative_tokens, 'token')}"
    if drafts.acceptance_rate is not None and drafts.tokens_per_draft is not None:
        text += (
            f"; {drafts.acceptance_rate:.0%} of {drafts.draft_tokens:,} accepted, {drafts.tokens_per_draft:.2f} tokens "
            "a step"
        )
    yield Text(text)


def _stage_table(stages: Sequence[StageView], *, shows_replica: bool) -> FoldedTable:
    replica = [Column.of("replica", (str(stage.replica) for stage in stages), "name")] if shows_replica else []
    return FoldedTable(
        [
            *replica,
            Column.of("stage", (str(stage.stage) for stage in stages), "name"),
            Column.of("host", (stage.host or "-" for stage in stages), "name"),
            Column.of("rows", (_rows(stage) for stage in stages), "name"),
            Column.of("layers", (f"{stage.first_layer}-{stage.end_layer - 1}" for stage in stages), "name"),
            Column.of("state", map(_state, stages), "sentence"),
            Column.of("steps", (str(stage.steps_done) for stage in stages), "figure"),
            Column.of("busy", (f"{stage.busy_share:.0%}" for stage in stages), "figure"),
            Column.of("restarts", (str(stage.restarts) for stage in stages), "figure"),
            Column.of("memory", map(_resident, stages), "figure"),
            Column.of("pid", ("-" if stage.pid is None else str(stage.pid) for stage in stages), "figure"),
        ],
        keys=len(replica) + 1,
    )


def _rows(stage: StageView) -> str:
    return "-" if stage.rows is None else ",".join(map(str, stage.rows))


def _resident(stage: StageView) -> str:
    return "-" if stage.resident_bytes is None else f"{stage.resident_bytes / MIB:.0f} MiB"


def _state(stage: StageView) -> Text:
    text = str(stage.state)
    if stage.state == "loading":
        text += f", {stage.layers_done} of {stage.end_layer - stage.first_layer} layers"
    if stage.step_id is not None:
        text += f", step {stage.step_id} for {stage.step_seconds:.1f} s"
    return Text(f"{text}: {stage.detail}" if stage.detail else text, style=STYLES.get(stage.state, ""))


# Caches


class EntryLine(msgspec.Struct, frozen=True, kw_only=True):
    """What is shown of an entry of a weight cache; `model` and the facts of its key are empty where not known."""

    part: str
    model: str = ""
    device: str = ""
    dtype: str = ""
    mesh: str = ""
    transform: str = ""
    fingerprint: str = ""
    bytes: int
    last_used: str
    state: str

    @classmethod
    def of(cls, entry: CacheEntry) -> "EntryLine":
        """The line of an entry."""
        used = datetime.fromtimestamp(entry.used, tz=timezone.utc).strftime("%Y-%m-%d %H:%M")
        key = entry.key
        if key is None:
            return cls(part=entry.path.name, bytes=entry.bytes, last_used=used, state="no cache entry")
        return cls(
            part=key.part,
            model=entry.model,
            device=key.device,
            dtype=key.dtype,
            mesh=f"{key.rows}x{key.columns}",
            transform=str(key.transform),
            fingerprint=key.fingerprint,
            bytes=entry.bytes,
            last_used=used,
            state=entry.state,
        )


def cache_table(entries: Sequence[CacheEntry]) -> FoldedTable:
    """The entries of a weight cache, a row each."""
    lines = [EntryLine.of(entry) for entry in entries]
    names = ("model", "device", "dtype", "mesh", "transform")
    return FoldedTable(
        [
            Column.of("part", (line.part for line in lines), "name"),
            *(Column.of(name, (getattr(line, name) for line in lines), "name") for name in names),
            Column.of("fingerprint", (line.fingerprint[:12] for line in lines), "name"),
            Column.of("size", (in_words(line.bytes) for line in lines), "figure"),
            Column.of("last used", (line.last_used for line in lines), "name"),
            Column.of("state", (line.state for line in lines), "name"),
        ]
    )
