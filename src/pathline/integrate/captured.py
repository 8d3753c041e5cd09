"""The parameters a velocity depends on, for the gradients that must be told of them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import ArgumentError
from .field import Field


def graph_leaves(output: Tensor, since: int) -> list[Tensor]:
    """The leaves of autograd's graph below `output`, a graph built after node number `since`.

    Raises:
        ArgumentError: the graph goes on into tensors computed earlier.
    """
    leaves: dict[int, Tensor] = {}
    seen = set()
    todo = [output.grad_fn] if output.grad_fn is not None else []
    while todo:
        node = todo.pop()
        if node in seen:
            continue
        seen.add(node)
        variable = getattr(node, "variable", None)
        if isinstance(variable, Tensor):
            leaves[id(variable)] = variable
        elif node._sequence_nr() < since:
            raise ArgumentError(
                "the velocity uses a tensor that was computed before the solve and needs a "
                f"gradient (by {node.name()}); name it in `adjoint_params`, or use "
                'gradient="discrete" or "checkpoint"'
            )
        todo += [below for below, _ in node.next_functions if below is not None]
    return list(leaves.values())


def sequence_number() -> int:
    """The number that autograd gives to its next node."""
    with torch.enable_grad():
        node = torch.zeros((), requires_grad=True).neg().grad_fn
    assert node is not None
    return node._sequence_nr()


class Captured:
    """All tensors but t and z that the velocity's gradient reaches.

    Explicit ones are taken at the user's word. Else they are the parameters of a module and what
    the graph of one evaluation at (t, z) shows, such as tensors held by a closure; `check` then
    looks at later evaluations, so that none is dropped silently.

    Raises:
        ArgumentError: the velocity uses a tensor that was computed before and needs a gradient.
    """

    def __init__(
        self, field: Field, t: Tensor, z: Tensor, explicit: Iterable[Tensor] | None
    ) -> None:
        self.closed = explicit is not None
        if explicit is not None:
            self.tensors = tuple(p for p in explicit if p.requires_grad)
            return
        module = field.func
        own = list(module.parameters()) if isinstance(module, nn.Module) else []
        found: dict[int, Tensor] = {id(p): p for p in own if p.requires_grad}
        torch.clear_autocast_cache()  # which holds casts of parameters made before
        with torch.enable_grad():
            z = z.detach().requires_grad_()
            since = sequence_number()
            for leaf in graph_leaves(field(t.detach(), z), since):
                if leaf is not z:
                    found[id(leaf)] = leaf
        self.tensors = tuple(found.values())

    def check(self, output: Tensor, since: int, inputs: Iterable[Tensor]) -> None:
        """Refuses an evaluation that reaches a tensor which was not found before.

        Raises:
            ArgumentError: it does.
        """
        if self.closed:
            return
        known = {id(p) for p in (*self.tensors, *inputs)}
        for leaf in graph_leaves(output, since):
            if id(leaf) not in known:
                raise ArgumentError(
                    f"the velocity uses a tensor of shape {tuple(leaf.shape)} that needs a "
                    "gradient at some times only; name all such tensors in `adjoint_params`"
                )
