"""Loading a stage takes no more memory of its own than its weights and one tensor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT
from tests.support.checkpoints import write_checkpoint

pytestmark = pytest.mark.slow

LARGE = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "moe_intermediate_size": 512,
    "num_hidden_layers": 5,
    "num_attention_heads": 16,
    "q_lora_rank": 384,
    "kv_lora_rank": 256,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 32,
    "v_head_dim": 64,
    "n_routed_experts": 32,
}
WEIGHTS_BYTES_MIN = 500e6

MEASURE = """
import json, sys, threading
from pathlib import Path
import torch
from tests.support.stage_driver import Driver, cache_options, stage_options

torch.set_num_threads(1)


def anonymous_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


class Peak(threading.Thread):
    def __init__(self):
        super().__init__(daemon=True)
        self.highest = 0
        self.done = threading.Event()

    def run(self):
        while not self.done.wait(0.002):
            self.highest = max(self.highest, anonymous_bytes())


model, cache = Path(sys.argv[1]), Path(sys.argv[2])
torch.randn(256, 256) @ torch.randn(256, 256)
before = anonymous_bytes()
peak = Peak()
peak.start()
driver = Driver.load(stage_options(model, cache, dtype="bfloat16", cache=cache_options(slots=1, max_model_len=128)))
loaded = peak.highest
driver.admit(0)
driver.prefill({0: list(range(128))[:100]})
driver.decode({0: (100, 7)})
peak.done.set()
peak.join()
print(json.dumps({"load": loaded - before, "run": peak.highest - before}))
"""


def measure(model: Path, cache: Path) -> dict[str, int]:
    completed = subprocess.run(
        [sys.executable, "-c", MEASURE, str(model), str(cache)],
        check=True,
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )
    rises: dict[str, int] = json.loads(completed.stdout)
    return rises


def test_memory_of_loading(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", overrides=LARGE)
    weights = (model / "model.safetensors").stat().st_size
    assert weights > WEIGHTS_BYTES_MIN
    first = measure(model, tmp_path / "cache")
    second = measure(model, tmp_path / "cache")
    for rises in (first, second):
        assert rises["load"] < 1.2 * weights
        assert rises["run"] < 1.2 * weights
