"""From a demo's options to the model and the engine that it runs on."""

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import msgspec

from actors.log import LateLogger
from api.demo.files import ResultsLog, read_prompts_file
from api.demo.options import DemoOptions
from api.engine.options import EngineOptions
from api.errors import OptionError
from api.settings.engine import DEFAULT_STAGES, EngineSettings
from api.settings.model import source_for
from api.text.chat_template import ChatTemplate
from api.text.model_source import ModelSource, check_model_files
from api.text.served_model import ServedModel
from api.text.tokenizer import has_tokenizer
from stages.plan import default_microbatches
from weights.model_config import ConfigChanges, ModelConfig
from weights.sizes import counted

log = LateLogger(__name__)

RESULT_PARAMS = (
    "model",
    "layers",
    "dense_layers",
    "weights",
    "dtype",
    "max_new_tokens",
    "chat_template",
    "sampling",
)
"""The `model_params` that a completion depends on."""

DENSE_LAYERS = {None: None, "mlp": 1, "moe": 0}
"""Dense layers of a run by --single-layer; None leaves what the model has."""


class DemoSetup(msgspec.Struct, frozen=True, kw_only=True):
    """Everything about a demo that is decided before its pipeline starts.

    `model` is None without a tokenizer, `chat_template` where prompts are completed as they are.
    """

    options: DemoOptions
    prompts: list[str]
    engine: EngineOptions
    start_timeout_s: float
    model: ServedModel | None
    chat_template: ChatTemplate | None
    vocab_size: int
    seed: int
    model_params: dict[str, Any]

    @classmethod
    def of(
        cls,
        options: DemoOptions,
        settings: EngineSettings,
        model_path: str | None,
        environment: Mapping[str, str] = os.environ,
    ) -> "DemoSetup":
        """Reads config, tokenizer and prompts. Raises GalaxylineError where something is missing or does not fit."""
        source = source_for(settings.cluster.device, model_path, environment)
        check_model_files(source, needs_weights=settings.needs_weights and not options.random_weights)
        changes = _changes(options)
        whole = ModelConfig.from_file(source.path / "config.json")
        config = whole.changed(changes)
        settings = _engine_settings(options, settings, config)
        if settings.drafts.count and config.num_hidden_layers < whole.num_hidden_layers:
            raise OptionError(
                f"Tokens are drafted behind the last of the model's {counted(whole.num_hidden_layers, 'layer')}, and "
                f"{config.num_hidden_layers} of them are to run: leave out --mtp on, or run them all."
            )
        engine = settings.engine_options(source, config, changes)
        model = _served_model(options, source, config, engine.pipeline.stage.cache.max_model_len)
        return cls(
            options=options,
            prompts=options.prompts
            if options.prompts_file is None
            else read_prompts_file(options.prompts_file, options.num_prompts),
            engine=engine,
            start_timeout_s=settings.cluster.start_timeout_s,
            model=model,
            chat_template=ChatTemplate.of(model.tokenizer) if options.chat_template and model is not None else None,
            vocab_size=config.vocab_size,
            seed=settings.seed or 0,
            model_params=_model_params(options, source, config, engine),
        )

    @property
    def max_model_len(self) -> int:
        """Tokens that a prompt and its completion may have together."""
        return self.engine.pipeline.stage.cache.max_model_len

    def results_log(self) -> AbstractContextManager[ResultsLog | None]:
        """The file of --checkpoint-jsonl, opened; None where none is asked for. Raises OptionError."""
        path = self.options.checkpoint_jsonl
        return nullcontext() if path is None else ResultsLog(path)

    @property
    def results_settings(self) -> str:
        """Everything that the completion of a prompt depends on beside the prompt, as JSON."""
        settings = {name: self.model_params[name] for name in RESULT_PARAMS}
        settings |= {"stop_at_eos": self.options.stop_at_eos, "seed": self.seed}
        return msgspec.json.encode(settings, order="deterministic").decode()


def _changes(options: DemoOptions) -> ConfigChanges:
    """Random weights are a single dense layer unless layers are asked for, as in the tt-metal demo."""
    layers, single = options.override_num_layers, options.single_layer
    if options.random_weights and layers is None:
        layers, single = 1, single or "mlp"
    return ConfigChanges(num_hidden_layers=layers, first_k_dense_replace=DENSE_LAYERS[single])


def _engine_settings(options: DemoOptions, settings: EngineSettings, config: ModelConfig) -> EngineSettings:
    split, capacity = settings.split, settings.capacity
    if options.generator == "bp":
        if split.stages not in {None, 1} or split.layers_per_stage is not None:
            raise OptionError("--generator bp is a single stage: add --generator pp for more.")
        stages = 1
    else:
        stages = split.count or min(DEFAULT_STAGES, config.num_hidden_layers)
    microbatches = settings.schedule.microbatches or default_microbatches(stages)
    return settings.but(
        stages=stages,
        max_num_seqs=capacity.max_num_seqs or options.max_users_per_row * microbatches,
        load_format="dummy" if options.random_weights else settings.weights.load_format,
        # A demo is over before the imports of a spare would be of use.
        spare=False,
        # It measures prefill, so every prompt is computed, also one that fills the batch with copies of another.
        enable_prefix_caching=False,
        kv_host_memory="0",
        kv_dir=None,
        num_speculative_tokens=_drafts(options, settings),
        speculative_config=None,
    )


def _drafts(options: DemoOptions, settings: EngineSettings) -> int:
    """Tokens to draft for each step. None under teacher forcing, as in the tt-metal demo."""
    asked = settings.drafts.count
    if options.mtp == "off" and asked:
        raise OptionError(f"--mtp off drafts nothing, and --num-speculative-tokens is {asked}: leave one of them out.")
    drafts = max(asked, 1) if options.mtp == "on" else asked
    if drafts and options.token_accuracy:
        log.info("no tokens are drafted with --token-accuracy", asked=drafts)
        return 0
    return drafts


def _served_model(
    options: DemoOptions, source: ModelSource, config: ModelConfig, max_model_len: int
) -> ServedModel | None:
    if not has_tokenizer(source.tokenizer or source.path):
        if options.random_weights:
            return None
        if options.token_accuracy:
            raise OptionError("--token-accuracy requires a tokenizer. Ensure model path has tokenizer files.")
    return ServedModel.load(source, config, max_model_len)


def _model_params(
    options: DemoOptions, source: ModelSource, config: ModelConfig, engine: EngineOptions
) -> dict[str, Any]:
    pipeline = engine.pipeline
    return {
        "model": source.root,
        "layers": config.num_hidden_layers,
        "dense_layers": min(config.first_k_dense_replace, config.num_hidden_layers),
        "weights": "random" if options.random_weights else "checkpoint",
        "dtype": pipeline.stage.dtype,
        "device": pipeline.cluster.device,
        "generator": options.generator,
        "stages": len(pipeline.specs),
        "microbatches": engine.scheduler.steps_in_flight,
        "users": pipeline.stage.cache.slots,
        "max_model_len": pipeline.stage.cache.max_model_len,
        "num_speculative_tokens": pipeline.stage.drafts.num_speculative_tokens,
        "max_new_tokens": options.max_new_tokens,
        "chat_template": options.chat_template,
        "sampling": {
            "temperature": options.sampling_temperature,
            "top_k": options.sampling_top_k,
            "top_p": options.sampling_top_p,
        },
    }
