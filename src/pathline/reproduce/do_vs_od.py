"""Trainings by discretize-optimize (DO) and by optimize-discretize (OD).

DO differentiates a scheme of few steps exactly. OD solves adaptively, forgets the solution, and
integrates the adjoint equation backward beside a reconstruction of the state.

Source: Onken, Ruthotto, Discretize-Optimize vs. Optimize-Discretize for Time-Series Regression
and Continuous Normalizing Flows, 2020 (arXiv 2005.13420); the spiral is that of torchdiffeq's
ode_demo.
"""

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..data import TOYS, load_electricity, load_published
from ..errors import ArgumentError
from ..flows import CNF
from ..integrate import odeint
from ..report import Section, plane
from ..train import Rows, files
from ..train.recipe import optimizers
from .experiment import Outcome, RunArguments
from .published import FREE, OT_FLOW
from .race import DO, OD, RunFolder, Training, race

DOUBLE = torch.float64


# The time series


MATRIX = ((-0.1, 2.0), (-2.0, -0.1))
TIMES, SPAN = 1000, 25.0
STARTS = {"train": (2.0, 0.0), "test": (0.0, 1.5)}
WINDOWS, WINDOW = 20, 10  # in a batch; times in each
SERIES_STEPS = {"small": 500, "full": 2000}
FINE: dict[str, Any] = {"method": "dopri5", "rtol": 1e-9, "atol": 1e-9}


def spiral(start: Sequence[float], times: Tensor) -> Tensor:
    """The solution of u' = A^T u^3 at `times`, (times, 2)."""
    A = torch.tensor(MATRIX, dtype=DOUBLE)
    u0 = torch.tensor(start, dtype=DOUBLE)
    return odeint(lambda t, u: u**3 @ A, u0, times, method="dopri5", rtol=1e-11, atol=1e-11)


class CubicNet(nn.Module):
    """v(t, u) = W tanh(K u^3 + b) + c with 50 neurons, the network of torchdiffeq's ode_demo."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2)).to(DOUBLE)
        for name, parameter in self.named_parameters():
            nn.init.zeros_(parameter) if name.endswith("bias") else nn.init.normal_(
                parameter, std=0.1, generator=generator
            )

    def forward(self, t: Tensor, u: Tensor) -> Tensor:
        """du/dt, (batch, 2)."""
        return self.layers(u**3)


def _windows(path: Tensor, starts: Tensor) -> Tensor:
    """Pieces (WINDOW, windows, 2) of a path (times, 2)."""
    return path[starts + torch.arange(WINDOW)[:, None]]


def run_time_series(arguments: RunArguments, size: str) -> Outcome:
    """Learn a spiral from windows of ten times: RK4 with one step from each time to the next,
    against dopri5 (rtol 1e-7, atol 1e-9) with the continuous adjoint."""
    iterations = arguments.max_steps or SERIES_STEPS[size]
    folder = RunFolder.open("do-vs-od-time-series", arguments, size, iterations=iterations)
    if folder.done:
        return folder.done
    from ..plots import curves

    times = torch.linspace(0, SPAN, TIMES, dtype=DOUBLE)
    paths = {name: spiral(start, times) for name, start in STARTS.items()}
    held_out = _windows(paths["test"], torch.arange(TIMES - WINDOW + 1))
    ways: dict[str, dict[str, Any]] = {
        DO: {"method": "rk4", "gradient": "discrete"},
        OD: {"method": "dopri5", "gradient": "adjoint", "rtol": 1e-7, "atol": 1e-9},
    }
    trainings, nets = {}, {}
    for name, how in ways.items():
        nets[name] = net = CubicNet(torch.Generator().manual_seed(arguments.seed))
        batches = torch.Generator().manual_seed(arguments.seed + 1000)

        def loss(net: nn.Module = net, how: Any = how, batches: Any = batches) -> Tensor:
            starts = torch.randint(TIMES - WINDOW + 1, (WINDOWS,), generator=batches)
            seen = _windows(paths["train"], starts)
            return (odeint(net, seen[0], times[:WINDOW], **how) - seen).square().sum(2).mean()

        optimiser = torch.optim.RMSprop(net.parameters(), lr=1e-3)
        trainings[name] = Training(loss, [optimiser], net)
    race(trainings, iterations)
    figures, drawn = {}, {"truth": paths["train"]}
    for name, net in nets.items():
        with torch.no_grad():
            fine = odeint(net, held_out[0], times[:WINDOW], **FINE)
            own = odeint(net, held_out[0], times[:WINDOW], **ways[name])
            drawn[name] = odeint(net, paths["train"][0], times, **FINE)
        figures[name] = {
            "test_mse": (fine - held_out).square().sum(2).mean().item(),
            "test_mse_own_steps": (own - held_out).square().sum(2).mean().item(),
            "whole_path_mse": (drawn[name] - paths["train"]).square().sum(1).mean().item(),
        }
    labels = {
        "test_mse": "test MSE",
        "test_mse_own_steps": "on its own steps",
        "whole_path_mse": "MSE of the whole path",
    }
    pictures = [
        Section(
            "The spiral",
            f"From the first point of the training path over {SPAN:g} units of time; training saw "
            "windows of ten times.",
            figure=curves(
                {name: (path[:, 0], path[:, 1]) for name, path in drawn.items()},
                *("u1", "u2", "The spiral and what was learned of it"),
                equal=True,
            ),
        )
    ]
    told = (
        "The test MSE is over all windows of ten times of a path from another start, of the "
        "learned velocity solved with a tolerance of 1e-9; on its own steps: as in training."
    )
    title = "A spiral, learned by DO and by OD"
    return folder.compare(title, trainings, figures, labels, told, pictures, logarithmic=True)


# The continuous normalizing flows


@dataclass(frozen=True)
class Setting:
    """Of the flow and its training; `steps` are those of DO's RK4."""

    width: int
    depth: int
    steps: int
    batch: int
    iterations: int
    rate: float


SMALL = {
    "8gaussians": Setting(32, 3, 4, 256, 300, 0.02),
    "moons": Setting(32, 3, 4, 256, 300, 0.02),
    "electricity": Setting(64, 2, 6, 256, 200, 0.02),
    "power": Setting(64, 2, 6, 256, 200, 0.02),
    "miniboone": Setting(64, 2, 4, 256, 150, 0.01),
    "bsds300": Setting(64, 2, 4, 256, 150, 0.01),
}
TOY_FULL = Setting(64, 3, 8, 100, 10_000, 1e-3)
TOY_ROWS = (50_000, 10_000)  # to train and to test with
FINE_STEPS = 16
FEW = 500  # rows, for what takes more than one solve


def _setting(name: str, dim: int, size: str) -> Setting:
    if size == "small":
        return SMALL[name]
    if name in TOYS:
        return TOY_FULL
    if name not in FREE:
        raise ArgumentError(
            f"do-vs-od-cnf-{name} has no published setting; --size full does not exist"
        )
    factor, depth, batch = FREE[name]
    return Setting(factor * dim, depth, 10, batch, OT_FLOW[name][-1], 1e-3)


def _tables(name: str, seed: int, size: str) -> tuple[Tensor, Tensor, str]:
    """Rows to train and to test with, and their source."""
    if name in TOYS:
        generator = torch.Generator().manual_seed(seed + 1000)
        train_rows, test_rows = (TOYS[name].sample(rows, generator) for rows in TOY_ROWS)
        return train_rows, test_rows, f"the toy density {name}"
    splits = (
        load_electricity() if name == "electricity" else load_published(name, fetch=size == "full")
    )
    # Exact traces cost as many products as there are columns.
    test = splits.test[: 10_000 if splits.test.shape[1] < 10 else 1_000]
    return torch.from_numpy(splits.train), torch.from_numpy(test), splits.source


@torch.no_grad()
def _judge(flow: CNF, test: Tensor) -> tuple[CNF, dict[str, float]]:
    """A copy that solves finely in double precision, and the figures by it."""
    fine = copy.deepcopy(flow).double()
    fine.method, fine.gradient, fine.steps = "rk4", "discrete", FINE_STEPS
    few = test[:FEW]
    _, errors = fine.log_prob(few, return_error=True)
    own = copy.deepcopy(flow).double()
    own.steps = flow.train_steps
    gap = (own.log_prob(few) - fine.log_prob(few)).mean().item()
    return fine, {
        "test_nll": -fine.log_prob(test).mean().item(),
        "grid_error": errors.mean().item(),
        "own_steps_gap": gap,
        "inverse_error": fine.inverse_error(few),
    }


def run_cnf(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Train the same free flow with one probe by RK4 with few steps and its exact gradient, and
    by dopri5 (tolerance 1e-5) with the continuous adjoint, on the same batches and probes.

    Size full has network, batch, rate and number of steps of FFJORD's toys, and FFJORD's networks
    on the whole benchmark tables.
    """
    experiment = f"do-vs-od-cnf-{name}"
    rows, test, source = _tables(name, arguments.seed, size)
    setting = _setting(name, rows.shape[1], size)
    iterations = arguments.max_steps or setting.iterations
    folder = RunFolder.open(
        experiment, arguments, size, **asdict(setting) | {"iterations": iterations, "data": source}
    )
    if folder.done:
        return folder.done
    ways: dict[str, dict[str, Any]] = {
        DO: {"method": "rk4", "train_steps": setting.steps, "gradient": "discrete"},
        OD: {"method": "dopri5", "gradient": "adjoint", "rtol": 1e-5, "atol": 1e-5},
    }
    trainings, flows = {}, {}
    for way, how in ways.items():
        start = torch.Generator().manual_seed(arguments.seed)
        flows[way] = flow = CNF(
            rows.shape[1],
            width=setting.width,
            depth=setting.depth,
            trace="probe",
            generator=start,
            **how,
        )
        objective = flow.objective()
        batches = torch.Generator().manual_seed(arguments.seed + 2000)
        objective.prepare(Rows(rows), batches)

        def loss(objective: Any = objective, batches: Any = batches) -> Tensor:
            chosen = torch.randint(len(rows), (setting.batch,), generator=batches)
            return objective(rows[chosen]).total

        # Velocities and products with their Jacobians pass the first layer alike.
        first = flow.network.get_submodule("layers.0")
        trainings[way] = Training(
            loss, optimizers(objective, objective.inner_weights()), first, setting.rate
        )
    race(trainings, iterations)
    figures, pictures = {}, []
    for way, flow in flows.items():
        fine, figures[way] = _judge(flow, test)
        if way == DO:
            flow.steps = FINE_STEPS
            files.save(flow, arguments.out / "model", metadata={"experiment": experiment})
        if name in TOYS:
            samples = fine.sample(len(test), seed=arguments.seed).numpy()
            picture = plane(fine, test.numpy(), samples, ("x1", "x2"))
            pictures.append(replace(picture, title=f"Density by {way}"))
    labels = {
        "test_nll": "test NLL",
        "grid_error": "error of its time grid",
        "own_steps_gap": "moved by finer steps",
        "inverse_error": "inverse error",
    }
    entropy = TOYS[name].entropy if name in TOYS else None
    truth = "" if entropy is None else f" The entropy of the truth is {entropy:.4f} nats."
    told = (
        f"Data: {source}. Each evaluation is a pass through the network, for the velocity or for "
        f"the trace. The test NLL is over {len(test):,} rows, in nats and the units of the "
        f"data, with exact traces and {FINE_STEPS} steps of RK4 in double precision; moved by "
        f"finer steps: by how much the time steps of training claim less.{truth}"
    )
    title = f"The flow of {name}, trained by DO and by OD"
    return folder.compare(title, trainings, figures, labels, told, pictures)
