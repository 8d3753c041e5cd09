"""Trained policies as files that run without Pathline."""

import copy
import io
import platform
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import __version__
from .control import Policy, Problem
from .errors import ArgumentError, ModelError
from .export import TOLERANCE, quietly
from .train.files import write_atomically, write_json

__all__ = ["export_policy"]

FILE = "control.pt2"
ROWS = 101  # of the comparison; tracing sees another number


class _Control(nn.Module):
    """The arguments in the order of deployment, and nothing but the control."""

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, t: Tensor, z: Tensor) -> Tensor:
        return self.policy.control(t, z)


def export_policy(policy: Policy, folder: str | Path) -> dict[str, Any]:
    """Write the control of a policy as a program of `torch.export`, and a description,
    export.json.

    The program maps a time (), and states z (batch, dim), to controls (batch, control_dim), in the
    precision of the policy, with any batch size. It is run and compared with the policy before
    anything is written.

    Args:
        policy: of a problem whose `feedback` is a formula.
        folder: made where missing; files of an earlier export are replaced.

    Returns:
        What export.json holds, with the largest `difference` to the policy, relative to the
        standard deviation of the controls.

    Raises:
        ArgumentError: not a policy.
        ModelError: the feedback is no formula, or can't be traced; or the exported control differs
            by more than `TOLERANCE`.
    """
    if not isinstance(policy, Policy):
        raise ArgumentError(f"`policy` must be a Policy, got {type(policy).__name__}")
    if type(policy.problem).feedback is Problem.feedback:
        raise ModelError(
            f"the feedback of {policy.problem.name} is a minimisation, whose iterations no graph "
            "holds; write `feedback` as a formula"
        )
    fixed = _Control(copy.deepcopy(policy).cpu().eval().requires_grad_(False))
    generator = torch.Generator().manual_seed(0)
    z = policy.problem.initial(ROWS, generator).to(fixed.policy.like)
    t = torch.tensor(0.3 * policy.problem.horizon).to(z)
    with torch.no_grad(), quietly():
        try:
            program = torch.export.export(
                fixed, (t, z[:7]), dynamic_shapes=(None, {0: torch.export.Dim("batch")})
            )
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"`policy` can't be turned into a graph: {reason}") from error
        buffer = io.BytesIO()
        torch.export.save(program, buffer)
        buffer.seek(0)
        run = torch.export.load(buffer).module()
        want, got = fixed(t, z), run(t, z)
        scale = want.std(0).clamp_min(1e-6)
        difference = ((got - want).abs() / scale).nan_to_num(nan=torch.inf).max().item()
    if not difference <= TOLERANCE:
        raise ModelError(
            f"the exported control differs from the policy's by {difference:.2g}, more than "
            f"{TOLERANCE}, so nothing was written"
        )
    content = {
        "format": "torch-export",
        "model": {"kind": "Policy", "dim": policy.problem.dim, "problem": policy.problem.made},
        "dtype": str(z.dtype).removeprefix("torch."),
        "functions": {
            "control": {
                "file": FILE,
                "inputs": {"t": [], "z": ["batch", policy.problem.dim]},
                "outputs": {"control": ["batch", policy.problem.control_dim]},
                "difference": difference,
            }
        },
        "tolerance": TOLERANCE,
        "versions": {"pathline": __version__, "python": platform.python_version()}
        | {"torch": torch.__version__},
    }
    graph = buffer.getvalue()
    write_atomically(Path(folder) / FILE, partial(_write, graph))
    write_json(Path(folder) / "export.json", content)
    return content


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)
