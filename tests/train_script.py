"""Trains a small flow, in a process of its own to be killed, interrupted or run twice.

Usage: train_script.py FOLDER [--double] [--steps N] [--batch N]
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import pathline as pl


def data() -> np.ndarray:
    generator = np.random.default_rng(0)
    x = generator.normal(size=(601, 2))
    x[:, 1] += x[:, 0] ** 2
    return x


def fit(folder, *, resume=False, double=False, steps=150, batch=64):
    flow = pl.flows.OTFlow(2, 8, generator=torch.Generator().manual_seed(0))
    if double:
        flow.double()
    run = pl.fit(
        flow,
        data(),
        out=folder,
        resume=resume,
        max_steps=steps,
        batch_size=batch,
        patience=1000,
        progress=False,
    )
    return flow, run


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--double", action="store_true")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch", type=int, default=64)
    torch.set_num_threads(1)
    fit(**vars(parser.parse_args()))
