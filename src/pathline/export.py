"""Trained flows as files that run without Pathline: ONNX, or a program of `torch.export`."""

import copy
import importlib.util
import io
import logging
import platform
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._higher_order_ops.while_loop import while_loop_op
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing, make_fx
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import __version__, native
from .errors import ArgumentError, ModelError
from .flows import CNF, ConditionalOTFlow, Flow, OTFlow
from .nets import FreeVelocity, GradientVelocity, Potential
from .nets.trace import InnerTraces
from .train.files import write_atomically, write_json

__all__ = ["FORMATS", "TOLERANCE", "export_flow"]

FORMATS = {"onnx": "onnx", "torch-export": "pt2"}
TOLERANCE = 1e-5
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
ROWS = 257  # of the comparison; tracing sees another number

Run = Callable[..., Tensor]


@dataclass(frozen=True)
class _Function:
    """A function of points and perhaps a context that is exported."""

    name: str
    input: str
    output: str
    method: str  # of the flow
    start: float
    stop: float
    log_det: bool


FUNCTIONS = (
    _Function("log_prob", "x", "log_prob", "log_prob", 0.0, 1.0, True),
    _Function("sample", "z", "x", "from_reference", 1.0, 0.0, False),
)


def export_flow(
    flow: Flow,
    folder: str | Path,
    *,
    to: str = "onnx",
    columns: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Write `log_prob` and `sample` of a flow with fixed time steps as two files, and a
    description, export.json.

    `log_prob` maps x (batch, dim) to the log-densities (batch,). `sample` maps points z (batch,
    dim) of N(0, I), which the user draws, to samples x (batch, dim). Both work in the user's
    units, in the precision of the flow, with any batch size, and take the context (batch,
    context_dim) of a conditional flow as a second input. Each is run and compared with the flow
    before anything is written; memory grows with the batch, for there are no chunks in a graph.

    Args:
        flow: an `OTFlow`, a `ConditionalOTFlow`, or a `CNF` with a fixed-step method;
            `flow.double()` for a graph in double precision. Not a `PCPMap`, whose inverse takes
            as many steps as its points need.
        folder: made where missing; files of an earlier export are replaced.
        to: "onnx" (run by onnxruntime and others; needs the extra `export`) or "torch-export"
            (.pt2 files for `torch.export.load`).
        columns: names to keep in the description.

    Returns:
        What export.json holds: of each function its file, inputs, outputs, the largest
        `difference` to the flow, and the `rounding`: the flow's difference to itself in double
        precision. Both are relative to max(1, |log_prob|), or to the larger of a sample's value
        and the standard deviation of its column.

    Raises:
        ArgumentError: an unknown format, another model, an adaptive method, or a package is
            missing.
        ModelError: an exported function differs from the flow by more than `TOLERANCE` and
            than twice its rounding, or can't be traced.
    """
    _check(flow, to, columns)
    fixed = copy.deepcopy(flow).cpu().eval().requires_grad_(False)
    functions, graphs = {}, {}
    for function in FUNCTIONS:
        try:
            program = _program(fixed, function)
            graph, run = (_onnx if to == "onnx" else _torch_export)(program, function)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"`flow` can't be turned into a graph: {reason}") from error
        file = f"{function.name}.{FORMATS[to]}"
        graphs[file] = graph
        context = {"context": ["batch", flow.context_dim]} if flow.context_dim else {}
        functions[function.name] = {
            "file": file,
            "inputs": {function.input: ["batch", flow.dim]} | context,
            "outputs": {function.output: ["batch"] if function.log_det else ["batch", flow.dim]},
        } | _compared(fixed, function, run)
    packages = ("torch", *PACKAGES[: 3 if to == "onnx" else 0])
    content = {
        "format": to,
        "model": {"kind": type(flow).__name__, "dim": flow.dim, "context_dim": flow.context_dim}
        | {"steps": flow.steps},
        "dtype": str(_example(fixed, 1)[0].dtype).removeprefix("torch."),
        "columns": list(columns or (f"x{i}" for i in range(flow.dim))),
        "functions": functions,
        "tolerance": TOLERANCE,
        "versions": {"pathline": __version__, "python": platform.python_version()}
        | {package: version(package) for package in packages},
    }
    for file, graph in graphs.items():
        write_atomically(Path(folder) / file, partial(_write, graph))
    write_json(Path(folder) / "export.json", content)
    return content


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _check(flow: Flow, to: str, columns: Sequence[str] | None) -> None:
    if to not in FORMATS:
        raise ArgumentError(f"`to` must be one of {', '.join(FORMATS)}, got {to!r}")
    if type(flow) not in (OTFlow, ConditionalOTFlow, CNF):
        raise ArgumentError(f"`flow` must be an OTFlow or a CNF, got {type(flow).__name__}")
    if isinstance(flow, CNF) and flow.adaptive:
        raise ArgumentError(
            f"`flow` must have fixed time steps, got method {flow.method!r}, which chooses its "
            "own; a graph holds a fixed-step method, such as rk4"
        )
    if columns is not None and len(columns) != flow.dim:
        raise ArgumentError(f"`columns` must be {flow.dim} names, got {len(columns)}")
    lost = [name for name in PACKAGES if to == "onnx" and importlib.util.find_spec(name) is None]
    if lost:
        raise ArgumentError(
            f"ONNX needs {', '.join(lost)}, not installed; pip install 'pathline[export]'"
        )


def _program(flow: Flow, function: _Function) -> torch.export.ExportedProgram:
    """A function of the flow as a flat graph with a loop over the time steps."""
    step, constants = _step(copy.deepcopy(flow), function)
    looped = _whole(copy.deepcopy(flow))

    def move(z: Tensor, features: Tensor | None, **_: Any) -> tuple[Tensor, Tensor | None]:
        given = () if features is None else (features,)
        state: Any = z.new_zeros((), dtype=torch.int64), z, torch.zeros_like(z).sum(1)
        _, z, log_det = while_loop_op(
            lambda n, *rest: n < flow.steps, step, state, (*given, *constants)
        )
        return z, log_det if function.log_det else None

    looped.move = move  # type: ignore[method-assign]
    inputs = _example(flow, 7)
    with quietly():
        graph = _traced(getattr(looped, function.method), inputs)
        for node, name in zip(
            graph.graph.find_nodes(op="placeholder"), (function.input, "context"), strict=False
        ):
            node.target = node.name = name
        graph.recompile()
        batch = torch.export.Dim("batch")
        return torch.export.export(graph, inputs, dynamic_shapes=tuple({0: batch} for _ in inputs))


def _step(flow: Flow, function: _Function) -> tuple[nn.Module, list[Tensor]]:
    """One time step, (n, z, log_det, [features], *constants) to (n + 1, z, log_det), and the
    constants."""
    length = (function.stop - function.start) / flow.steps
    now = _Clock()
    _shift(_whole(flow), now)
    flow.steps = 1

    def step(n: Tensor, z: Tensor, total: Tensor, *features: Tensor) -> tuple[Tensor, ...]:
        now.time = (function.start + length * n.double()).to(z)
        z, log_det = flow.move(
            z, *(features or (None,)), start=0.0, stop=length, log_det=function.log_det
        )
        return n + 1, z, total.clone() if log_det is None else total + log_det

    z, *context = _example(flow, 7)
    features: list[Any] = [flow.features(c) for c in context]
    graph = _traced(step, (torch.tensor(0), z, z.sum(1), *features))
    # The body of a loop may hold no tensors of its own, so they become inputs.
    constants: dict[str, tuple[fx.Node, Tensor]] = {}
    *_, last = graph.graph.find_nodes(op="placeholder")
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in constants:
            with graph.graph.inserting_after(last):
                last = graph.graph.placeholder(name)
            constants[name] = last, getattr(graph, name)
        node.replace_all_uses_with(constants[name][0])
        graph.graph.erase_node(node)
    graph.recompile()
    return graph, [tensor for _, tensor in constants.values()]


def _example(flow: Flow, rows: int) -> tuple[Tensor, ...]:
    """Points and, of a conditional flow, contexts."""
    z = flow.reference_sample(rows, seed=0)
    generator = torch.Generator().manual_seed(1)
    context = torch.randn(rows, flow.context_dim, generator=generator).to(z)
    return (z, context) if flow.context_dim else (z,)


class _Clock:
    """When the time step at hand starts."""

    time: Tensor


class _Untiled(InnerTraces):
    """The traces without tiles, of which a graph with a free batch size can't know the number."""

    def _residual(self, T: Tensor, slope: Tensor, adjoint: Tensor | None) -> Tensor:
        P = (T[:, None, :] * self.columns()) @ self.weights[0].mT
        return (slope * P.square().sum(1)).sum(1)


def _whole(flow: Flow) -> Flow:
    """Let a flow, a copy, work on all rows at once."""

    def evaluate(
        function: Callable[..., tuple[Tensor, ...]], x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, ...]:
        context = None if context is None else context.to(flow.standardize.mean)
        return tuple(result.to(x.dtype) for result in function(x, context))

    flow._chunked = evaluate  # type: ignore[method-assign]
    for module in flow.modules():
        if isinstance(module, Potential):
            module.bind = _untiled(module)  # type: ignore[method-assign]
    return flow


def _untiled(potential: Potential) -> Callable[..., Any]:
    first = potential.get_parameter("layers.0.weight")[:, : potential.dim]
    traces = _Untiled(potential.inner_weights(), first, potential.h)
    evaluate = partial(potential._derivatives, traces, first, potential.A[:, : potential.dim])
    return lambda probe=None, trace_dtype=None, noise=None: evaluate


def _shift(flow: Flow, now: _Clock) -> None:
    """Let the velocity of a flow, a copy, see the times of a step that starts at `now`."""
    network: Any = flow.potential if isinstance(flow, OTFlow) else flow.network
    if isinstance(network, GradientVelocity):
        if network.static:
            return
        network = network.potential
    name, place = {Potential: ("_stack", 1), FreeVelocity: ("_conditions", 0)}.get(
        type(network), ("forward", 0)
    )
    function = getattr(network, name)

    def shifted(*args: Any) -> Any:
        return function(*args[:place], args[place] + now.time, *args[place + 1 :])

    setattr(network, name, shifted)


class _Fold(TorchFunctionMode):
    """Computes here and now what does not depend on the inputs of the graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        if any(isinstance(leaf, FakeTensor | torch.SymInt) for leaf in leaves):
            return func(*args, **kwargs)
        with disable_proxy_modes_tracing(), unset_fake_temporarily():
            return func(*args, **kwargs)


def _traced(function: Callable[..., Any], inputs: tuple[Tensor, ...]) -> fx.GraphModule:
    """The graph of a function with a free batch size, by PyTorch alone."""

    def folded(*inputs: Tensor) -> Any:
        with _Fold():
            return function(*inputs)

    with native.using(None), torch.no_grad():
        trace = make_fx(folded, tracing_mode="symbolic", _allow_non_fake_inputs=True)
        graph = trace(*inputs)
    graph.graph.eliminate_dead_code()
    for name in {str(node.target) for node in graph.graph.find_nodes(op="get_attr")}:
        tensor = getattr(graph, name)
        if isinstance(tensor, Tensor):  # each on its own, as views can't be inputs of a loop
            delattr(graph, name)
            graph.register_buffer(name, tensor.detach().clone(), persistent=True)
    graph.recompile()
    return graph


def _torch_export(program: torch.export.ExportedProgram, function: _Function) -> tuple[bytes, Run]:
    buffer = io.BytesIO()
    with quietly():
        torch.export.save(program, buffer)
        buffer.seek(0)
        module = torch.export.load(buffer).module()
    return buffer.getvalue(), module


def _onnx(program: torch.export.ExportedProgram, function: _Function) -> tuple[bytes, Run]:
    import onnxruntime

    with quietly():
        exported = torch.onnx.export(
            program,
            dynamo=True,
            external_data=False,
            dynamic_shapes=tuple({0: "batch"} for _ in program.example_inputs[0]),
            output_names=[function.output],
            verbose=False,
        )
        assert exported is not None
        exported.optimize()  # once more, for constants that the first round left unused
    graph = exported.model_proto.SerializeToString()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(*inputs: Tensor) -> Tensor:
        names = (function.input, "context")
        given = {name: x.numpy() for name, x in zip(names, inputs, strict=False)}
        return torch.from_numpy(np.asarray(session.run(None, given)[0]))

    return graph, run


@contextmanager
def quietly() -> Iterator[None]:
    """Without the exporters' remarks about themselves, and what they leave behind: they switch the
    checks of torch.distributions off."""
    logger = logging.getLogger("torch.onnx")
    before, checks = logger.level, torch.distributions.Distribution._validate_args
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
        torch.distributions.Distribution.set_default_validate_args(checks)


@torch.no_grad()
def _compared(flow: Flow, function: _Function, run: Run) -> dict[str, float]:
    """The largest difference of the exported function to the flow, which must be small, and of
    the flow to itself in double precision."""
    points, *context = _example(flow, ROWS)
    if function.log_det:
        points = flow.from_reference(points, *context)
        ends = torch.stack([flow.standardize.lower, flow.standardize.upper]).to(points)
        for end in ends:  # rows off the support
            outside = torch.where(end.isfinite(), end, points[:1])
            points = torch.cat([points, outside])
        context = [torch.cat([c, c[:2]]) for c in context]
    want = getattr(flow, function.method)(points, *context)
    scale = want.abs().clamp_min(1) if function.log_det else want.abs().maximum(want.std(0))

    def worst(got: Tensor, rows: slice) -> float:
        error = torch.where(got == want[rows], 0.0, (got - want[rows]).abs() / scale[rows])
        return error.nan_to_num(nan=torch.inf).max().item()

    difference, everything = 0.0, slice(None)
    for rows in (everything, slice(-1, None)):  # all at once, and a single one
        got = run(points[rows], *(c[rows] for c in context))
        if got.shape != want[rows].shape or got.dtype != want.dtype:
            raise ModelError(f"the exported {function.name} has another shape or precision")
        difference = max(difference, worst(got, rows))
    exact = copy.deepcopy(flow).double()
    inputs = (tensor.double() for tensor in (points, *context))
    rounding = worst(getattr(exact, function.method)(*inputs), everything)
    if not difference <= max(TOLERANCE, 2 * rounding):
        raise ModelError(
            f"the exported {function.name} differs from the flow's by {difference:.2g}, more than "
            f"{TOLERANCE} and than the flow's own rounding of {rounding:.2g}, so nothing was "
            "written"
        )
    return {"difference": difference, "rounding": rounding}
