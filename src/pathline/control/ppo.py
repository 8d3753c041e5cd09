"""Reinforcement learning without a model of the problem, to compare `control.solve` with."""

import copy
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .environment import ControlEnv, hold, observe
from .problem import Problem

try:
    from gymnasium.spaces import Box
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.policies import ActorCriticPolicy
    from stable_baselines3.common.running_mean_std import RunningMeanStd
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize
except ImportError:
    raise ArgumentError(
        "Stable-Baselines3 is not installed; pip install 'pathline[control]'"
    ) from None

EPISODES = 64  # side by side, one for each round of collecting
JUDGES = 256  # held-out starts
SPREAD = -1.0  # log of the first standard deviation of actions, half as wide as the box
PER_STEP = 5  # evaluations of the dynamics in a step: four stages, one for the midpoint of L

Control = Callable[[Tensor | float, Tensor], Tensor]


@dataclass(frozen=True)
class PPORun:
    """How the cost fell with the evaluations of the dynamics in training; one row of states in
    `dynamics` is one evaluation."""

    evaluations: Tensor  # (points,)
    costs: Tensor  # (points,), mean over held-out starts, of the policy without exploration
    control: Control  # the best of these policies: (t, z (batch, dim)) -> (batch, control_dim)

    @property
    def cost(self) -> float:
        """The lowest mean cost."""
        return float(self.costs.min())


def train_ppo(
    problem: Problem, *, evaluations: int = 5_000_000, steps: int = 20, seed: int = 0
) -> PPORun:
    """Train Stable-Baselines3's PPO on the `ControlEnv` of a problem.

    States and rewards are normalised as they come (`VecNormalize`), actions are scaled to the
    environment's box, and 64 episodes run side by side as one batch. Costs are those of
    `problem.evaluation()` on held-out starts, as for `control.solve`.

    Args:
        problem: what to solve.
        evaluations: of the dynamics in training, at most; the evaluation of policies is not
            counted.
        steps: time steps of an episode.
        seed: of everything random; global random states are left as they were.

    Raises:
        ArgumentError: `evaluations` does not suffice for one batch of episodes, or `steps` is not
            a positive integer.
        SolveError: a state is not finite.

    Source: Schulman et al., Proximal policy optimization algorithms, 2017 (arXiv 1707.06347).
    """
    space = ControlEnv(problem, steps)
    per_round = EPISODES * steps * evaluations_per_step(problem)
    if evaluations < per_round:
        raise ArgumentError(
            f"`evaluations` must be at least {per_round}, for one batch of {EPISODES} episodes, "
            f"got {evaluations}"
        )
    with _own_randomness(seed):
        normalised = VecNormalize(_Batch(space, seed), gamma=1.0)
        model = PPO(
            "MlpPolicy", normalised, n_steps=steps, batch_size=EPISODES * steps // 4, gamma=1.0,
            gae_lambda=0.98, policy_kwargs={"log_std_init": SPREAD}, seed=seed, device="cpu",
        )  # fmt: skip
        judge = _Judge(space, per_round, seed)
        model.learn(evaluations // per_round * EPISODES * steps, callback=judge)
    return PPORun(torch.tensor(judge.evaluations), torch.tensor(judge.costs), judge.best)


def evaluations_per_step(problem: Problem) -> int:
    """Evaluations of the dynamics in a time step of one path."""
    return PER_STEP if problem.noise is None else 1


def solve_evaluations(
    problem: Problem, *, max_steps: int, steps: int = 20, batch_size: int = 256
) -> int:
    """Evaluations of the dynamics in the training of `control.solve` with these settings.

    Its open-loop solution, its first guesses and the evaluation of policies are not counted, nor
    are the derivatives of the dynamics, which PPO does without.
    """
    ends = 0 if problem.noise is not None else 1  # where the last step's costs are read
    return max_steps * batch_size * (steps * evaluations_per_step(problem) + ends)


class _Batch(VecEnv):
    """Episodes of one environment side by side: all start and end together."""

    def __init__(self, env: ControlEnv, seed: int) -> None:
        self.env, self.generator = env, torch.Generator().manual_seed(seed)
        actions = Box(-1.0, 1.0, env.action_space.shape)
        super().__init__(EPISODES, env.observation_space, actions)

    def reset(self) -> np.ndarray:
        self.n, self.z = 0, self.env.problem.initial(EPISODES, self.generator).double()
        return observe(self.env.problem, 0.0, self.z)

    def step_async(self, actions: np.ndarray) -> None:
        self.u = _controls(self.env, torch.from_numpy(actions))

    def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
        problem, steps = self.env.problem, self.env.steps
        self.z, costs = hold(problem, self.n, steps, self.z, self.u, self.generator)
        self.n += 1
        seen, over = observe(problem, self.n / steps, self.z), self.n == steps
        infos: list[dict[str, Any]] = [{} for _ in range(EPISODES)]
        if over:
            for info, last in zip(infos, seen, strict=True):
                info["terminal_observation"] = last
            seen = self.reset()
        return seen, -costs.float().numpy(), np.full(EPISODES, over), infos

    def close(self) -> None:
        pass

    def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
        return [getattr(self.env, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
        raise NotImplementedError("all episodes share one environment")

    def env_method(
        self, method_name: str, *args: Any, indices: Any = None, **kwargs: Any
    ) -> list[Any]:
        raise NotImplementedError("all episodes share one environment")

    def env_is_wrapped(self, wrapper_class: type, indices: Any = None) -> list[bool]:
        return [False] * len(list(self._get_indices(indices)))


class _Judge(BaseCallback):
    """Keeps the best policy, by its cost on held-out starts before each round of collecting and
    at the end."""

    def __init__(self, env: ControlEnv, per_round: int, seed: int) -> None:
        super().__init__()
        self.env, self.per_round = env, per_round
        self.evaluations: list[int] = []
        self.costs: list[float] = []
        self.exam = env.problem.evaluation()
        # Not the seed of the training starts, whose first ones would be these.
        own_seed = int(np.random.default_rng(seed).integers(2**62))
        self.generator = torch.Generator().manual_seed(own_seed)
        self.starts = self.exam.initial(JUDGES, self.generator).double()
        self.noise = self.generator.get_state()
        self.best: Control

    def _on_rollout_start(self) -> None:
        self._judge()

    def _on_training_end(self) -> None:
        self._judge()

    def _on_step(self) -> bool:
        return True

    def _judge(self) -> None:
        control = self._control()
        self.generator.set_state(self.noise)
        z, steps, total = self.starts, self.env.steps, torch.zeros(JUDGES, dtype=torch.float64)
        for n in range(steps):
            u = control(n / steps * self.exam.horizon, z)
            z, costs = hold(self.exam, n, steps, z, u, self.generator)
            total = total + costs
        mean = total.mean().item()
        if not self.costs or mean < min(self.costs):
            self.best = control
        self.costs.append(mean)
        self.evaluations.append(len(self.evaluations) * self.per_round)

    def _control(self) -> Control:
        """The policy as it is now, without exploration."""
        env, normalised, policy = self.env, self.training_env, self.model.policy
        assert isinstance(normalised, VecNormalize) and isinstance(policy, ActorCriticPolicy)
        seen = normalised.obs_rms
        assert isinstance(seen, RunningMeanStd)
        net = copy.deepcopy(nn.Sequential(policy.mlp_extractor.policy_net, policy.action_net))
        mean, scale = seen.mean.copy(), np.sqrt(seen.var + normalised.epsilon)
        most = normalised.clip_obs

        @torch.no_grad()
        def control(t: Tensor | float, z: Tensor) -> Tensor:
            share = float(t) / env.problem.horizon
            inputs = (observe(env.problem, share, z.detach()) - mean) / scale
            actions = net(torch.from_numpy(inputs).float().clamp(-most, most))
            return _controls(env, actions).to(z)

        return control


def _controls(env: ControlEnv, actions: Tensor) -> Tensor:
    """The controls (batch, control_dim) of actions between -1 and 1, in double precision."""
    low, high = torch.from_numpy(env.action_space.low), torch.from_numpy(env.action_space.high)
    half = (high.double() - low) / 2
    return (low.double() + high) / 2 + actions.double().clamp(-1, 1) * half


@contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Stable-Baselines3 draws from the global generators: seeded here, and put back after."""
    before = random.getstate(), np.random.get_state()
    with torch.random.fork_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(before[0])
            np.random.set_state(before[1])
