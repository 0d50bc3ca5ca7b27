"""`python -m tests.silicon.run_model MODEL DIRECTORY OUT`: logits of a prefill in chunks and of decode steps.

The device is that of GALAXYLINE_DEVICE, so that the same program runs on chips and on the embedded device.
"""

import os
import subprocess
import sys
from pathlib import Path

import click
import torch

from stages.device import DEVICE_VARIABLE
from stages.tensor_dtypes import WeightDtypes
from tests import ROOT
from tests.support.stage_driver import Driver, cache_options, stage_options
from weights.model_config import ModelConfig

WIDE = WeightDtypes(attention="bfloat16", gate_up="bfloat16", down="bfloat16", head="bfloat16", kv_cache="bfloat16")
"""Weights without block floats, so that only the arithmetic differs between devices."""

LENGTHS = [70, 33, 5, 64]
STEPS = 6
CHUNK = 64
MAX_MODEL_LEN = 128
REPOSITORY = ROOT


def logits_on(
    device: str, model: Path, directory: Path, mesh: tuple[int, int], *, enable_trace: bool = False
) -> torch.Tensor:
    """Runs this program on a device in a process of its own; returns its logits.

    Raises CalledProcessError if it fails.
    """
    out = directory / f"{device}-{enable_trace}.pt"
    rows, columns = mesh
    options = ["--rows", str(rows), "--columns", str(columns), *(["--enable-trace"] if enable_trace else [])]
    subprocess.run(
        [sys.executable, "-m", "tests.silicon.run_model", str(model), str(directory), str(out), *options],
        env={**os.environ, DEVICE_VARIABLE: device, "PYTHONPATH": str(REPOSITORY)},
        check=True,
    )
    logits: torch.Tensor = torch.load(out)
    return logits


def run(model: Path, directory: Path, mesh: tuple[int, int], *, enable_trace: bool) -> torch.Tensor:
    """Float32 logits [prompts * (1 + STEPS), vocabulary] of four prompts, on several rows, columns and one pool."""
    pools = mesh[0] * mesh[1]
    cache = cache_options(slots=4 * pools, pools=pools, max_model_len=MAX_MODEL_LEN)
    options = stage_options(
        model, directory / "cache", dtype="bfloat16", cache=cache, weight_dtypes=WIDE, enable_trace=enable_trace
    )
    vocabulary = ModelConfig.from_file(model / "config.json").vocab_size
    driver = Driver.load(options, mesh_shape=mesh)
    slots = [0, pools, pools - 1, pools // 2] if pools > 2 else [0, 1, 2, 3]
    lengths = dict(sorted(zip(slots, LENGTHS, strict=True)))
    for slot in lengths:
        driver.admit(slot)
    prompts = {slot: [(7 * at + slot) % vocabulary for at in range(length)] for slot, length in lengths.items()}
    found = [driver.prefill(prompts, CHUNK)]
    for step in range(STEPS):
        tokens = {slot: (length + step, (11 * step + slot) % vocabulary) for slot, length in lengths.items()}
        found.append(driver.decode(tokens))
    driver.close()
    return torch.cat(found)


@click.command()
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("directory", type=click.Path(path_type=Path))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--rows", type=int, default=1)
@click.option("--columns", type=int, default=1)
@click.option("--enable-trace", is_flag=True)
def main(model: Path, directory: Path, out: Path, rows: int, columns: int, enable_trace: bool) -> None:
    """Run MODEL on rows x columns chips, with weights converted into DIRECTORY, and write its logits to OUT."""
    torch.save(run(model, directory, (rows, columns), enable_trace=enable_trace), out)


if __name__ == "__main__":
    main(prog_name="python -m tests.silicon.run_model")
