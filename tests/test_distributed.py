"""Two processes train like one on the same global batches, and one of them writes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import pathline as pl
from train_script import fit

SCRIPT = Path(__file__).with_name("train_script.py")


def launch(script, *options):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc_per_node", "2", script, *map(str, options)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("batch", [64, 63])  # the second does not divide by two
def test_two_processes_are_one(tmp_path, batch):
    options = {"double": True, "steps": 60, "batch": batch}
    alone, run = fit(tmp_path / "one", **options)
    launch(SCRIPT, tmp_path / "two", "--double", "--steps", 60, "--batch", batch)
    one, two = log(tmp_path / "one"), log(tmp_path / "two")
    assert [entry["step"] for entry in two] == list(range(1, 61))  # written once
    for name in ("loss", "nll", "transport", "hjb", "learning_rate"):
        want, got = ([entry[name] for entry in entries] for entries in (one, two))
        np.testing.assert_allclose(got, want, rtol=1e-9, atol=1e-12, err_msg=name)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    assert metrics["best_step"] == run.best_step
    assert abs(metrics["validation_loss"] - run.validation) < 1e-9
    together = pl.load(tmp_path / "two")
    for a, b in zip(alone.parameters(), together.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    config = json.loads((tmp_path / "two" / "config.json").read_text())
    assert config["processes"] == 2
    names = [path.name for path in (tmp_path / "two").rglob("*")]
    assert not [name for name in names if name.startswith(".")]
    assert sum(name.endswith(".safetensors") for name in names) == 2  # model and checkpoint


RANKS = """
import os, sys, builtins
from pathlib import Path
import torch
sys.path.insert(0, {tests!r})
from pathline.train import files
from train_script import fit
rank = int(os.environ["RANK"])
if rank:
    def refuse(*args, **kwargs):
        raise AssertionError("a second process writes")
    files.write_atomically = files.write_json = files.save = files.write_checkpoint = refuse
flow, run = fit({folder!r}, double=True, steps=20)
weights = torch.cat([p.detach().flatten() for p in flow.parameters()])
torch.save([weights, run.validation, run.steps], Path({out!r}) / f"rank{{rank}}.pt")
"""


def test_only_the_first_process_writes_and_all_agree(tmp_path):
    script = tmp_path / "script.py"
    paths = {"tests": str(SCRIPT.parent), "folder": str(tmp_path / "run"), "out": str(tmp_path)}
    script.write_text(RANKS.format(**paths))
    launch(script)
    ranks = [torch.load(tmp_path / f"rank{i}.pt", weights_only=True) for i in (0, 1)]
    assert torch.equal(ranks[0][0], ranks[1][0])
    assert ranks[0][1:] == ranks[1][1:]
