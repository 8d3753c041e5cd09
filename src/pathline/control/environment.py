"""Control problems as Gymnasium environments, for reinforcement learning."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ArgumentError, ShapeError, SolveError
from .problem import Problem
from .riccati import riccati_value
from .transcription import advance, transcribe

try:
    import gymnasium
except ImportError:
    raise ArgumentError("Gymnasium is not installed; pip install 'pathline[control]'") from None

STEPS = 50
ROOM = 2.0  # times the largest control of a rough solution
LEAST = 0.1  # of the largest coordinate of the controls


class ControlEnv(gymnasium.Env[np.ndarray, np.ndarray]):
    """A control problem, one time step at a time.

    An observation is the state and the time, (dim + 1,), and an action is the control,
    (control_dim,), held for the step; both are in the problem's units and in single precision. The
    reward is minus the running cost of the step, and at the horizon, where an episode always ends,
    minus the terminal cost, too. Times and costs are those of `transcribe` (RK4, Simpson's rule);
    with noise the step is Euler and Maruyama's, as in `rollout`.

    The action space is `control_bounds`, to which actions are clipped; where there are none, it is
    twice as wide as rough solutions need, and only a hint to the agent.

    `reset(seed=...)` draws the start from `problem.initial`, and
    `reset(options={"start": state})` sets it, (dim,).

    Args:
        problem: the control problem.
        steps: equal time steps of an episode.

    Raises:
        ArgumentError: `steps` is not a positive integer; an action is not finite; a step is asked
            for before `reset`.
        ShapeError: an action or a start has another shape.
        SolveError: a state is not finite after a step.
    """

    metadata = {"render_modes": []}  # noqa: RUF012 (Gymnasium's own form)
    action_space: gymnasium.spaces.Box

    def __init__(self, problem: Problem, steps: int = STEPS) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ArgumentError(f"`steps` must be a positive integer, got {steps!r}")
        self.problem, self.steps = problem, steps
        last = np.float32(problem.horizon)
        rest = np.full(problem.dim, np.inf, np.float32)
        self.observation_space = gymnasium.spaces.Box(
            np.append(-rest, np.float32(0)), np.append(rest, last), dtype=np.float32
        )
        lower, upper = (limit.float().numpy() for limit in control_box(problem))
        self.action_space = gymnasium.spaces.Box(lower, upper, dtype=np.float32)
        self.n = steps
        self.z = torch.zeros(1, problem.dim, dtype=torch.float64)
        self.generator = torch.Generator()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.generator.manual_seed(int(self.np_random.integers(2**62)))
        start = (options or {}).get("start")
        if start is None:
            self.z = self.problem.initial(1, self.generator).double()
        else:
            self.z = torch.as_tensor(start, dtype=torch.float64).reshape(1, -1)
            if self.z.shape[1] != self.problem.dim:
                raise ShapeError(
                    f"`start` must be ({self.problem.dim},), got {tuple(np.shape(start))}"
                )
        self.n = 0
        return self._observation(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        if self.n >= self.steps:
            raise ArgumentError("the episode is over; call `reset` before `step`")
        u = torch.as_tensor(action, dtype=torch.float64)
        if tuple(u.shape) != (self.problem.control_dim,):
            raise ShapeError(
                f"`action` must be ({self.problem.control_dim},), got {tuple(u.shape)}"
            )
        if not bool(torch.isfinite(u).all()):
            raise ArgumentError(f"`action` must be finite, got {u.tolist()}")
        self.z, cost = hold(self.problem, self.n, self.steps, self.z, u[None], self.generator)
        self.n += 1
        return self._observation(), -cost.item(), self.n == self.steps, False, {}

    def _observation(self) -> np.ndarray:
        return observe(self.problem, self.n / self.steps, self.z)[0]


def make_env(name: str, steps: int | None = None, **options: Any) -> ControlEnv:
    """The environment of a named problem with these options; see `control.problems.make`.

    By default it has 50 time steps, or more where training takes more. The neuron overflows under
    random currents unless they are limited and steps are short: `make_env("neuron", steps=1200,
    limit=100)`.

    Raises:
        ArgumentError: there is no such problem, or it has no such option.
    """
    from .problems import PROBLEMS, make  # a floor above: they are built on this package

    problem = make(name, **options)
    own = max(STEPS, PROBLEMS[name].settings.get("steps", STEPS))
    return ControlEnv(problem, own if steps is None else steps)


def observe(problem: Problem, share: float, z: Tensor) -> np.ndarray:
    """States and the time, which is `share` of the horizon, (batch, dim + 1)."""
    t = z.new_full((len(z), 1), share * problem.horizon)
    observation: np.ndarray = torch.cat([z, t], 1).float().numpy()
    return observation


@torch.no_grad()
def hold(
    problem: Problem, n: int, steps: int, z: Tensor, u: Tensor, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States (batch, dim) after step `n` of `steps` under the constant controls `u`,
    (batch, control_dim), and its costs, (batch,), with the terminal ones after the last step.

    Raises:
        SolveError: a state is not finite then.
    """
    h = problem.horizon / steps
    limits = problem.limits(u)
    u = u if limits is None else u.clamp(*limits)
    if problem.noise is None:
        after, cost = advance(problem, n * h, h, z, u)
    else:
        t, noise = z.new_tensor(n * h), problem.noise.to(z)
        draws = torch.randn(len(z), noise.shape[1], generator=generator, dtype=z.dtype)
        after = z + h * problem.dynamics(t, z, u) + h**0.5 * draws @ noise.mT
        cost = h * problem.running_cost(t, z, u)
    bad = ~torch.isfinite(after).all(1)
    if bool(bad.any()):
        raise SolveError(
            f"{problem.name}: the state is not finite at t = {(n + 1) * h:.4g}; before the step it "
            f"was {z[bad][0].tolist()} and the control {u[bad][0].tolist()}"
        )
    return after, cost if n + 1 < steps else cost + problem.terminal_cost(after)


def control_box(problem: Problem) -> tuple[Tensor, Tensor]:
    """Finite limits of the control, (control_dim,) each: `control_bounds`, or what rough solutions
    from two starts need, with room."""
    free = torch.full((problem.control_dim,), torch.inf, dtype=torch.float64)
    lower, upper = problem.limits(free) or (-free, free)
    if bool(torch.isfinite(lower).all() and torch.isfinite(upper).all()):
        return lower, upper
    # Where the nominal start is at rest, only another one shows how large controls are.
    generator = torch.Generator().manual_seed(0)
    other = problem.initial(1, generator)[0].double()
    if problem.noise is not None:
        kick = torch.randn(problem.noise.shape[1], generator=generator, dtype=torch.float64)
        other = other + problem.horizon**0.5 * problem.noise.double() @ kick
    size = _controls(problem, torch.stack([problem.nominal(), other])).abs().amax(0)
    most = size.amax() if size.amax() > 0 else torch.ones_like(size.amax())
    wide = ROOM * torch.maximum(size, LEAST * most)
    return torch.where(lower.isfinite(), lower, -wide), torch.where(upper.isfinite(), upper, wide)


def _controls(problem: Problem, starts: Tensor) -> Tensor:
    """Of rough solutions from the starts, or along the reference and from the starts back to it,
    (many, control_dim)."""
    t = torch.zeros((), dtype=torch.float64)
    if problem.reference(t) is None:
        rough = (transcribe(problem, x, steps=10, guesses=0, max_iterations=10) for x in starts)
        return torch.cat([path.controls for path in rough])
    value = riccati_value(problem)
    derivatives = value.bind()
    found = []
    for now, z in [(t, starts), *zip(value.times, value.path()[:, None], strict=True)]:
        p = derivatives(z, now).grad
        assert p is not None
        found.append(problem.feedback(now, z, p))
    return torch.cat(found)
