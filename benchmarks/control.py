"""Training steps of control problems at the published settings, and what a whole training takes.

For each problem the network, the batch and the time steps are those that NeuralOC published (Onken
et al., arXiv 2104.03270, table of hyperparameters). A step, loss and gradient, is timed

- as here, with gradients of Phi in closed form,
- with the same network and loss but derivatives of Phi by automatic differentiation, as a network
  without closed forms needs them, and
- against a bare matrix product: three passes through the hidden matrices of the network for each
  evaluation of Phi, in the same run.

The published training is that step times the published number of iterations; ours is the time of
`pathline reproduce NAME`, of which the settings are beside it, and the figure in docs/control.md.

    python benchmarks/control.py [--threads 1] [--out FILE.json]
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from pathline.control import ValueFunction, ValueObjective
from pathline.control.problems import make, settings
from pathline.nets import AutodiffPotential


@dataclass(frozen=True)
class Published:
    width: int
    steps: int
    batch: int
    iterations: int


SETTINGS = {
    "corridor": Published(32, 20, 1024, 1800),
    "swap2": Published(16, 20, 1024, 4000),
    "swap12": Published(32, 20, 2048, 2400),
    "quadcopter": Published(128, 26, 1024, 6000),
}


def milliseconds(function: Callable[[], object], repeats: int = 5) -> float:
    """Median processor time of a call, after one that is not counted."""
    times = []
    for _ in range(repeats + 1):
        start = time.process_time()
        function()
        times.append(1e3 * (time.process_time() - start))
    return statistics.median(times[1:])


class Plain(nn.Module):
    """A value function as a network whose derivatives are not known."""

    def __init__(self, known: ValueFunction) -> None:
        super().__init__()
        self.known = known

    def forward(self, x: Tensor, t: Tensor, context: None = None) -> Tensor:
        return self.known(x, t)


def measure(name: str, at: Published) -> dict[str, float]:
    """ms of training steps, and of the products they stand on."""
    problem = make(name)
    policy = problem.policy(at.width, 2, generator=torch.Generator().manual_seed(0))
    x = problem.initial(at.batch, torch.Generator().manual_seed(0))
    policy.potential.initialise(x, torch.Generator().manual_seed(0))

    def step() -> None:
        objective = ValueObjective(policy, at.steps)
        policy.zero_grad()
        objective(x).total.backward()

    ours = milliseconds(step)
    closed = policy.potential
    policy.potential = AutodiffPotential(Plain(closed), problem.dim)
    policy.potential.unit = closed.unit  # by which a policy knows its precision
    automatic = milliseconds(step, 2)
    policy.potential = closed
    a, K = torch.randn(at.batch, at.width), torch.randn(at.width, at.width)
    # RK4's four stages and Simpson's middle, a forward and two backward passes, two layers.
    products = 5 * at.steps * 3 * 2

    def multiply() -> None:
        for _ in range(products):
            torch.mm(a, K)

    bare, chosen = milliseconds(multiply), settings(problem)
    return {
        "ms, closed form": ours,
        "ms, automatic": automatic,
        "automatic / closed form": automatic / ours,
        "closed form / bare products": ours / bare,
        "published iterations": at.iterations,
        "seconds of the published training with our step": at.iterations * ours / 1e3,
        "our batch": chosen.get("batch_size", 256),
        "our time steps": chosen.get("steps", 20),
        "our iterations": chosen["max_steps"],
        "published samples / ours": at.iterations
        * at.batch
        * at.steps
        / (chosen["max_steps"] * chosen.get("batch_size", 256) * chosen.get("steps", 20)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/control.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = {}
    for name, at in SETTINGS.items():
        found[name] = measure(name, at)
        print(name, *(f"{key}: {value:.3g}" for key, value in found[name].items()), sep="\n  ")
    arguments.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
