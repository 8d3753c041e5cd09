"""The times of fixed steps."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .field import real_dtype


def time_dtype(device: torch.device) -> torch.dtype:
    """Times are kept in double precision wherever the device has it."""
    return torch.float32 if device.type == "mps" else torch.float64


def beside(times: Tensor, z: Tensor) -> Tensor:
    """(..., batch) times in the shape that broadcasts against z, (..., batch, 1, ..., 1)."""
    return times.view(*times.shape, *(1,) * (z.ndim - 1))


def nudged(t: Tensor, toward: Tensor | float) -> Tensor:
    """The next time after `t` in its dtype, toward an infinity, with the same gradient."""
    ahead = torch.as_tensor(toward, dtype=t.dtype, device=t.device)
    return t + (torch.nextafter(t.detach(), ahead) - t.detach())


class Grid:
    """The lengths of the steps between `nodes`, and the times of their stages.

    Times come from one table in double precision, so they do not drift in a state of low
    precision. The lengths are floats where nothing is differentiated or traced, else tensors.

    Args:
        nodes: (steps + 1,), or (steps + 1, batch) where each sample has its own.
        offsets: the stages' times as shares of a step, c of the tableau.
        z: the state, for its dtype and device.
        perturb: look at times just inside the step in place of its ends, for velocities that
            jump at a node.
    """

    def __init__(
        self,
        nodes: Tensor,
        offsets: Sequence[float],
        z: Tensor,
        *,
        perturb: bool = False,
        traced: bool = False,
    ) -> None:
        self.nodes, self.offsets, self.perturb = nodes, tuple(offsets), perturb
        dtype = real_dtype(z)
        steps = nodes.diff(dim=0)
        stages = [
            nodes[:-1] if c == 0.0 else nodes[1:] if c == 1.0 else nodes[:-1] + c * steps
            for c in offsets
        ]
        stages = [stage.to(z.device, dtype) for stage in stages]
        if perturb:
            ahead = torch.where(steps < 0, -torch.inf, torch.inf).to(z.device, dtype)
            inward = {0.0: ahead, 1.0: -ahead}
            stages = [
                nudged(stage, inward[c]) if c in inward else stage
                for c, stage in zip(offsets, stages, strict=True)
            ]
        table = torch.stack(stages, 1)  # (steps, stages) or (steps, stages, batch)
        samples = nodes.ndim == 2
        self.stages = (beside(table, z) if samples else table).unbind(0)
        self.ends = nodes.to(z.device, dtype)
        if samples:
            self.ends = beside(self.ends, z)
            self.lengths: Sequence[Tensor | float] = beside(steps.to(z.device, dtype), z).unbind(0)
        elif traced or nodes.requires_grad:
            self.lengths = steps.to(z.device, dtype).unbind(0)
        else:
            self.lengths = steps.tolist()

    def __len__(self) -> int:
        return len(self.lengths)
