"""`galaxyline plan`: what it prints and writes, for R1 without a checkpoint, and how it refuses."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests import ROOT
from tests.support.checkpoints import config_keys
from tests.support.command_line import refused, run
from weights.presets import PRESETS, preset_config

HUB_ID = "deepseek-ai/DeepSeek-R1-0528"


def printed(*arguments: str, **environment: str) -> str:
    result = run("plan", *arguments, **environment)
    assert result.exit_code == 0, result.output
    return result.stdout


def write_config(directory: Path, **changes: int) -> Path:
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_keys(changes)), encoding="utf-8")
    return directory


def test_r1_without_options_is_planned_on_two_galaxies() -> None:
    lines = printed("r1").splitlines()
    assert " ".join(lines[:2]).startswith("r1 fits 8 rows of 8 chips (2 Galaxies): 2 stages of 4 rows, 32 users a row")
    assert "  assumed: 8 rows: the fewest whole Galaxies that fit (--rows)" in lines
    assert "  assumed: 4096 tokens of prompt and completion (--max-model-len)" in lines
    assert "  assumed: 3 microbatches: what keeps all stages busy (--microbatches)" in lines
    [first, last] = [line.split() for line in lines if line.strip().startswith(("0    0-30", "1   31-60"))]
    assert first[2:4] == ["8.4", "GiB"]
    assert last[-1] == "83%"


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_no_figure_is_cut_where_the_console_is_narrow(columns: int) -> None:
    wide = printed("r1", "--rows", "8", COLUMNS="200")
    narrow = printed("r1", "--rows", "8", COLUMNS=str(columns))
    assert max(map(len, narrow.splitlines())) <= columns
    assert "…" not in narrow
    figures = re.compile(r"\d+(?:\.\d+)?(?: [KMG]iB|%)?")
    assert set(figures.findall(" ".join(wide.split()))) == set(figures.findall(" ".join(narrow.split())))


def test_a_table_has_its_caption_above_and_its_unit_explained_once() -> None:
    lines = printed("r1", "--rows", "8").splitlines()
    place = lines.index("DRAM of each chip of a stage:")
    assert lines[place + 1].split()[:3] == ["stage", "layers", "weights"]
    assert sum("tokens per second for each user" in line for line in lines) == 1


@pytest.mark.parametrize(("given", "name"), [("R1", "r1"), ("V3", "v3"), ("DeepSeek-AI/deepseek-r1", None)])
def test_published_models_are_known_in_any_capitals(given: str, name: str | None, tmp_path: Path) -> None:
    first = printed(given, "--rows", "8", HF_HOME=str(tmp_path)).partition(" fits ")[0]
    assert first == (name or "deepseek-ai/DeepSeek-R1")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("deepseek-r1", "Did you mean deepseek-ai/DeepSeek-R1?"),
        ("deepseek-ai/DeepSeek-R1-528", "Did you mean deepseek-ai/DeepSeek-R1-0528?"),
        ("mine", "galaxyline-sample, r1, v3, v3.1 and the hub ids of DeepSeek's V3 and R1 models are known."),
    ],
)
def test_a_name_that_is_not_known_is_told_those_that_are(given: str, told: str, tmp_path: Path) -> None:
    assert refused("plan", given, HF_HOME=str(tmp_path)).endswith(told)


def test_what_is_predicted_is_called_so() -> None:
    text = printed("r1", "--rows", "8")
    speeds = [line for line in text.splitlines() if "t/s/u" in line or "first token" in line]
    assert len(speeds) == 3
    assert all(line.endswith("(predicted, not measured)") for line in speeds)
    assert "Speed, predicted, not measured" in text


@pytest.mark.parametrize(("rows", "split", "users"), [(8, [31, 30], 384), (16, [16, 15, 15, 15], 640)])
def test_r1_on_two_and_on_four_galaxies(rows: int, split: list[int], users: int, tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    printed("--model", HUB_ID, "--rows", str(rows), "--json", str(file), HF_HOME=str(tmp_path))
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert plan["model"] == HUB_ID
    assert (plan["deployment"]["layers_per_stage"], plan["deployment"]["users"]) == (split, users)
    assert plan["deployment"]["dtypes"]["gate_up"] == "bfloat4_b"
    parts = ("weights", "kv_cache", "tables", "activations", "trace")
    for stage in plan["memory"]:
        assert stage["total"] == sum(stage[part] for part in parts) <= stage["available"]
    prediction = plan["prediction"]
    assert prediction["kind"] == "predicted, not measured"
    assert prediction["tokens_per_s"] == pytest.approx(users * prediction["tokens_per_s_per_user"])
    assert len(prediction["decode"]) == len(split)


ONE_DRAFT = ("--num-speculative-tokens", "1")
EIGHT_STAGES = ("r1", "--stages", "8", "--rows-per-stage", "1", "--enable-trace")


def written(file: Path, *arguments: str) -> dict[str, Any]:
    printed(*EIGHT_STAGES, *arguments, "--json", str(file))
    content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return content


def test_drafts_are_shown_beside_what_there_is_without(tmp_path: Path) -> None:
    text = " ".join(printed(*EIGHT_STAGES, "--num-speculative-tokens", "1", "--acceptance", "0.8").split())
    plan = written(tmp_path / "plan.json", "--num-speculative-tokens", "1", "--acceptance", "0.8")
    prediction, drafts = plan["prediction"], plan["prediction"]["drafts"]
    assert plan["deployment"]["num_speculative_tokens"] == 1
    assert (drafts["tokens_per_step"], drafts["pays"]) == (1.8, True)
    assert drafts["tokens_per_s"] == pytest.approx(288 * drafts["tokens_per_s_per_user"])
    assert drafts["tokens_per_s_per_user"] == pytest.approx(1.8 / drafts["cycle_s"])
    for speed in (prediction, drafts):
        assert f"{speed['tokens_per_s_per_user']:.2f} t/s/u" in text
        assert f"{speed['tokens_per_s']:.0f} tokens/s" in text
    assert "with all 288 requests in flight and without drafts (predicted, not measured)" in text
    longer = drafts["cycle_s"] / prediction["cycle_s"]
    assert f"1.80 tokens in a step that takes {longer:.2f} times as long, which pays (predicted, not measured)" in text
    assert "with drafts" in text
    assert "assumed: drafts" not in text


def test_drafts_that_do_not_pay_are_said_to_be_left_out(tmp_path: Path) -> None:
    given = ("--num-speculative-tokens", "1", "--acceptance", "0.01")
    text = " ".join(printed(*EIGHT_STAGES, *given).split())
    assert "which does not pay, so `serve` would do without (predicted, not measured)" in text
    assert written(tmp_path / "plan.json", *given)["prediction"]["drafts"]["pays"] is False


def test_what_is_not_said_of_drafts_is_assumed(tmp_path: Path) -> None:
    guessed = printed(*EIGHT_STAGES, "--num-speculative-tokens", "1")
    assert "  assumed: drafts that are right with a probability of 0.8 (--acceptance)" in guessed.splitlines()
    one = printed(*EIGHT_STAGES, "--acceptance", "0.9")
    assert "  assumed: 1 draft of each request and step (--num-speculative-tokens)" in one.splitlines()
    alone, both = (written(tmp_path / "plan.json", "--acceptance", "0.9", *more) for more in ((), ONE_DRAFT))
    assert alone["prediction"] == both["prediction"]
    none = written(tmp_path / "plan.json")["prediction"]
    assert (none["drafts"], none["options"]["acceptance"]) == (None, None)
    assert written(tmp_path / "plan.json", "--num-speculative-tokens", "0")["prediction"] == none


def test_a_model_without_a_layer_for_drafts_has_none(tmp_path: Path) -> None:
    given = {"num_hidden_layers": 2, "num_attention_heads": 128, "num_nextn_predict_layers": 0}
    directory = write_config(tmp_path / "small", **given)
    sentence = refused("plan", str(directory), "--rows", "1", "--acceptance", "0.5")
    assert sentence == "Error: The model has no multi-token-prediction layer: leave out --num-speculative-tokens."


def test_r1_on_one_galaxy_is_refused_in_one_sentence() -> None:
    sentence = refused("plan", "r1", "--rows", "4")
    assert sentence.startswith("Error: Stage 1 of 4 (layers 17 to 31 on 1 row) needs 16.2 GiB of the 12.0 GiB of DRAM ")
    assert sentence.endswith(" on each chip: give 6 rows in place of 4 (--stages 3 --rows-per-stage 2).")


def test_the_change_that_a_refusal_names_is_accepted() -> None:
    arguments = ("r1", "--stages", "2", "--rows-per-stage", "4", "--max-model-len")
    sentence = refused("plan", *arguments, "40000")
    length = sentence.partition("(--max-model-len ")[2].partition(")")[0]
    assert "2 stages of 4 rows" in printed(*arguments, length)
    assert refused("plan", *arguments, str(int(length) + 32))


def test_every_option_reaches_the_plan(tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    given = {
        "layers-per-stage": "32,29",
        "rows-per-stage": "4",
        "users": "8",
        "microbatches": "5",
        "max-model-len": "1024",
        "block-size": "64",
        "prefill-chunk": "512",
        "trace-region": "1000000",
        "context": "512",
        "prompt": "100",
        "expert-kernel": "chosen",
        "num-speculative-tokens": "2",
        "acceptance": "0.7",
        "attention-dtype": "bfloat4_b",
        "gate-up-dtype": "bfloat8_b",
        "down-dtype": "bfloat4_b",
        "router-dtype": "bfloat16",
        "head-dtype": "bfloat16",
        "kv-cache-dtype": "bfloat16",
    }
    flags = [part for name, value in given.items() for part in (f"--{name}", value)]
    assert "assumed" not in printed("r1", *flags, "--enable-trace", "--json", str(file))
    plan = json.loads(file.read_text(encoding="utf-8"))
    assert plan["deployment"] == {
        "stages": 2,
        "rows_per_stage": 4,
        "rows": 8,
        "users_per_row": 8,
        "users": 160,
        "microbatches": 5,
        "max_model_len": 1024,
        "block_size": 64,
        "prefill_chunk": 512,
        "layers_per_stage": [32, 29],
        "trace_region_bytes": 1000000,
        "num_speculative_tokens": 2,
        "dtypes": {
            "embedding": "bfloat16",
            "attention": "bfloat4_b",
            "gate_up": "bfloat8_b",
            "down": "bfloat4_b",
            "router": "bfloat16",
            "head": "bfloat16",
            "kv_cache": "bfloat16",
        },
    }
    options: dict[str, object] = {"context": 512, "prompt_tokens": 100, "traced": True, "expert_kernel": "chosen"}
    options["acceptance"] = 0.7
    assert plan["prediction"]["options"] == options


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["r1", "--model", HUB_ID], "leave one out"),
        (["r1", "--users", "20"], "20 users a row cannot be shared evenly by its 8 chips: choose a multiple of 8."),
        (["r1", "--block-size", "33"], "Block size 33 is not a multiple of 32"),
        (["r1", "--max-model-len", "200000"], "--max-model-len 200000 is more than the model's 163840 positions."),
        (["r1", "--context", "5000"], "--context 5000 is more than the 4096 tokens of --max-model-len."),
        (["r1", "--layers-per-stage", "30,31", "--stages", "3"], "leave one of them out"),
        (
            ["r1", "--num-speculative-tokens", "0", "--acceptance", "0.5"],
            "leave it out, or give --num-speculative-tokens 1",
        ),
        (["r1", "--acceptance", "1.5"], "1.5 is not in the range 0<=x<=1."),
        (["r1", "--num-speculative-tokens", "9"], "9 is not in the range 0<=x<=8."),
        (["r1", "--rows", "8", "--stages", "3"], "8 rows cannot be shared evenly with 3 stages."),
        (["deepseek-ai/DeepSeek-R2"], "'deepseek-ai/DeepSeek-R2' is not a directory"),
        (["/nowhere/r1"], "Model path does not exist: '/nowhere/r1'."),
        (
            ["r1", "--json", "/dev/null/plan.json"],
            "Cannot write --json '/dev/null/plan.json': Not a directory.",
        ),
    ],
)
def test_what_cannot_be_followed_is_one_sentence(arguments: list[str], message: str, tmp_path: Path) -> None:
    assert message in refused("plan", *arguments, HF_HOME=str(tmp_path))


def predictions() -> list[list[str]]:
    """The cells of the table of predictions in the documents."""
    rows = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8").splitlines()
    return [row.strip("| ").split(" | ") for row in rows if row.startswith("| `--stages")]


@pytest.mark.parametrize("row", predictions(), ids=lambda row: row[0])
def test_the_documents_table_is_what_is_predicted(row: list[str], tmp_path: Path) -> None:
    flags, users, each, together, first = row
    file = tmp_path / "plan.json"
    printed("r1", "--enable-trace", *flags.strip("`").split(), "--json", str(file))
    prediction = json.loads(file.read_text(encoding="utf-8"))["prediction"]
    assert prediction["users"] == int(users)
    assert f"{prediction['tokens_per_s_per_user']:.2f}" == each
    assert f"{prediction['tokens_per_s']:.0f}" == together
    assert f"{prediction['ttft_s']:.1f}" == first


def draft_predictions() -> list[list[str]]:
    """The cells of the table of drafts in the documents."""
    rows = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8").splitlines()
    return [row.strip("| ").split(" | ") for row in rows if row.startswith("| `--num-speculative-tokens")]


@pytest.mark.parametrize("row", draft_predictions(), ids=lambda row: row[0])
def test_the_documents_table_of_drafts_is_what_is_predicted(row: list[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    printed("r1", "--enable-trace", *row[0].strip("`").split(), "--json", str(file))
    prediction = json.loads(file.read_text(encoding="utf-8"))["prediction"]
    drafts = prediction["drafts"]
    assert drafts["pays"]
    assert row[1:] == [
        str(prediction["users"]),
        f"{prediction['tokens_per_s_per_user']:.2f}",
        f"{prediction['tokens_per_s']:.0f}",
        f"{drafts['tokens_per_s_per_user']:.2f}",
        f"{drafts['tokens_per_s']:.0f}",
        f"{drafts['tokens_per_step']:.2f}",
        f"{drafts['cycle_s'] / prediction['cycle_s']:.2f}",
    ]


def test_the_documents_refusal_is_what_is_said() -> None:
    text = (ROOT / "docs" / "plan.md").read_text(encoding="utf-8")
    quoted = " ".join(line.removeprefix("> ") for line in text.splitlines() if line.startswith("> "))
    assert refused("plan", "r1", "--rows", "4") == quoted


def test_without_a_model_it_is_the_sample_whose_heads_are_too_few_for_chips() -> None:
    assert refused("plan").startswith("Error: 8 attention heads are 1 for each of 8 columns of chips")


def test_a_directory_needs_config_json_alone(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "small", num_hidden_layers=2, num_attention_heads=128)
    assert printed(str(directory), "--rows", "1").startswith("small fits 1 row of 8 chips")
    assert "config.json not found" in refused("plan", str(tmp_path))


def test_a_checkpoint_of_a_published_model_comes_before_what_is_known_of_it(tmp_path: Path) -> None:
    directory = write_config(tmp_path / "mine", num_hidden_layers=2, num_attention_heads=128)
    text = printed(HUB_ID, "--rows", "1", DEEPSEEK_V3_HF_MODEL=str(directory))
    assert text.startswith(f"{HUB_ID} fits 1 row of 8 chips")


@pytest.mark.parametrize("name", PRESETS)
def test_published_models_have_the_671_billion_weights_they_are_known_for(name: str) -> None:
    config = preset_config(name)
    experts = 58 * 257 * 3 * 7168 * 2048
    dense = 3 * 3 * 7168 * 18432
    attention = 61 * (7168 * 1536 + 1536 * 128 * 192 + 7168 * 576 + 512 * 128 * 256 + 128 * 128 * 7168)
    ends = 2 * 129280 * 7168 + 58 * 256 * 7168
    assert experts + dense + attention + ends == pytest.approx(671e9, rel=0.001)
    assert (config.num_hidden_layers, config.first_k_dense_replace, config.n_routed_experts) == (61, 3, 256)
    assert (config.hidden_size, config.intermediate_size, config.moe_intermediate_size) == (7168, 18432, 2048)
    assert (config.q_lora_rank, config.kv_lora_rank, config.num_attention_heads) == (1536, 512, 128)
    assert config.vocab_size == 129280
