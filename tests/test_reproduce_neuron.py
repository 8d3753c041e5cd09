"""The replay of currents to the neuron."""

import numpy as np
import pytest
import torch

from pathline.control.problems import Neuron
from pathline.control.transcription import shoot
from pathline.reproduce.neuron import SHOCK, replay

CURRENTS = 20.0 * np.sin(np.arange(1501) / 40)


def test_no_stimulation_costs_what_is_known():
    """The pathological neuron fires twice; the figure is of forward Euler with 1500 steps."""
    found = replay(Neuron(), 0.0, np.zeros(100))
    assert found.cost == pytest.approx(3.399e6 + 15.4, rel=0.01)
    assert found.potential.max() == pytest.approx(112.3, abs=0.3)


def test_a_replay_is_what_shooting_finds():
    problem = Neuron()
    x = torch.tensor([10.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    with torch.no_grad():
        middles = torch.from_numpy(CURRENTS[1:] + CURRENTS[:-1])[:, None] / 2
        _, running, terminal = shoot(problem, x, middles)
    expected = (running + terminal).item()
    assert replay(problem, 10.0, CURRENTS[:-1]).cost == pytest.approx(expected, rel=1e-3)


def test_a_shock_moves_the_potential():
    found = replay(Neuron(), 0.0, np.zeros(100), shock=True)
    (jump,) = np.flatnonzero(np.diff(found.times) == 0)
    assert found.times[jump] == 2.0
    assert found.potential[jump + 1] - found.potential[jump] == pytest.approx(SHOCK[0])
