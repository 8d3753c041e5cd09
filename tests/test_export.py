"""Exported flows give what the flow gives, for any batch, without Pathline."""

import importlib.util
import json

import numpy as np
import pytest
import torch

import pathline as pl
from pathline import export
from pathline.cli import main
from pathline.data import Recipe
from pathline.errors import ArgumentError, ModelError
from pathline.export import FORMATS, export_flow
from pathline.flows import CNF, FFJORD, RNODE, MongeAmpere, OTFlow, PotentialFlow

BOUNDS = [(0.0, None), (None, 3.0), (-1.0, 2.0), (None, None)]


def flow_of(make, dim=2, **options):
    """A flow that moves points, with coordinates of its own."""
    generator = torch.Generator().manual_seed(0)
    flow = make(dim, generator=generator, **options).requires_grad_(False)
    inputs = torch.randn(100, dim + flow.context_dim, generator=generator)
    for module in flow.modules():
        if isinstance(module, pl.nets.Potential):
            module.random_features(inputs, 0.5, generator)
    flow.standardize.mean.copy_(torch.randn(dim, generator=generator))
    flow.standardize.scale.add_(0.2 * torch.randn(dim, dim, generator=generator))
    return flow


def loaded(folder, name):
    """An exported function as users run it."""
    description = json.loads((folder / "export.json").read_text())
    entry = description["functions"][name]
    if description["format"] == "torch-export":
        return torch.export.load(folder / entry["file"]).module()
    session = pytest.importorskip("onnxruntime").InferenceSession(folder / entry["file"])

    def run(*inputs):
        given = {key: x.numpy() for key, x in zip(entry["inputs"], inputs, strict=True)}
        (result,) = session.run(list(entry["outputs"]), given)
        return torch.from_numpy(np.asarray(result))

    return run


def compare(flow, folder, tolerance=1e-5):
    """The exported functions on batches of other sizes than those of the export."""
    functions = {name: loaded(folder, name) for name in ("log_prob", "sample")}
    for rows in (1, 2, 400):
        z = flow.reference_sample(rows, seed=5)
        context = [torch.randn(rows, flow.context_dim).to(z)] if flow.context_dim else []
        x = flow.from_reference(z, *context)
        torch.testing.assert_close(
            functions["sample"](z, *context), x, rtol=tolerance, atol=tolerance
        )
        torch.testing.assert_close(
            functions["log_prob"](x, *context),
            flow.log_prob(x, *context),
            rtol=tolerance,
            atol=tolerance,
        )


def test_torch_export(tmp_path):
    """User's units with bounded columns and a context; -inf off the support; one small loop."""
    flow = flow_of(OTFlow, 4, width=5, support=BOUNDS, context_dim=2, steps=5)
    told = export_flow(flow, tmp_path / "out", to="torch-export", columns=list("abcd"))
    assert told == json.loads((tmp_path / "out/export.json").read_text())
    assert told["columns"] == list("abcd") and told["dtype"] == "float32"
    assert told["functions"]["log_prob"]["inputs"] == {"x": ["batch", 4], "context": ["batch", 2]}
    assert all(f["difference"] <= told["tolerance"] == 1e-5 for f in told["functions"].values())
    assert all(0 < f["rounding"] < 1e-5 for f in told["functions"].values())
    compare(flow, tmp_path / "out")
    x, context = flow.sample(6, torch.zeros(2), seed=0), torch.zeros(6, 2)
    x[0, 0], x[1, 1], x[2, 2], x[3, 2], x[4, 3] = 0.0, 3.5, -1.0, 2.0, torch.nan
    got = loaded(tmp_path / "out", "log_prob")(x, context)
    assert got[:4].isneginf().all() and got[4].isnan() and got[5].isfinite()
    program = torch.export.load(tmp_path / "out/log_prob.pt2")
    kinds = [
        node.target.namespace
        for node in program.graph.nodes
        if isinstance(node.target, torch._ops.OperatorBase)
    ]
    assert kinds.count("higher_order") == 1
    assert set(kinds) <= {"aten", "higher_order"}


def test_onnx(tmp_path, capfd):
    """By the command, from a saved model with named columns; onnxruntime has no complaints."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    flow = flow_of(OTFlow, width=4, depth=1, support=[(0.0, None), (None, None)], steps=3)
    recipe = Recipe.untouched(2, ["height", "income"]).to_dict()
    pl.save(flow, tmp_path / "run" / "model", metadata={"recipe": recipe})
    assert main(["export", str(tmp_path / "run"), "--to", "onnx", "--json"]) == 0
    shown = capfd.readouterr()
    told = json.loads(shown.out)
    assert shown.err == ""
    folder = tmp_path / "run" / "export"
    assert {entry.name for entry in folder.iterdir()} == {
        *("log_prob.onnx", "sample.onnx", "export.json")
    }
    assert told["columns"] == ["height", "income"] and told["format"] == "onnx"
    assert {"pathline", "torch", "onnx", "onnxruntime"} <= told["versions"].keys()
    compare(flow, folder)
    assert capfd.readouterr().err == ""
    got = loaded(folder, "log_prob")(torch.tensor([[-1.0, 0.0], [1.0, 0.0]]))
    assert got[0].isneginf() and got[1].isfinite()
    model = onnx.load(folder / "log_prob.onnx")
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    shape = model.graph.input[0].type.tensor_type.shape
    assert (shape.dim[0].dim_param, shape.dim[1].dim_value) == ("batch", 2)
    assert [node.op_type for node in model.graph.node].count("Loop") == 1


KINDS = {
    "bounded": (OTFlow, {"dim": 4, "support": BOUNDS}),
    "narrow": (OTFlow, {"dim": 5, "width": 3, "steps": 64}),
    "deep": (OTFlow, {"depth": 4, "context_dim": 3}),
    "potential": (PotentialFlow, {}),
    "static": (MongeAmpere, {"steps": 4}),
    "free": (RNODE, {"dim": 3}),
    "euler": (CNF, {"method": "euler", "velocity": "potential", "context_dim": 1}),
    "free_context": (RNODE, {"method": "heun2", "context_dim": 1}),
    "one_column": (OTFlow, {"dim": 1, "support": [(0.0, 1.0)]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("to", FORMATS)
@pytest.mark.parametrize("make, options", KINDS.values(), ids=KINDS)
def test_every_fixed_step_flow(tmp_path, make, options, to):
    for package in export.PACKAGES if to == "onnx" else ():
        pytest.importorskip(package)
    flow = flow_of(make, **options)
    export_flow(flow, tmp_path, to=to)
    compare(flow, tmp_path)


class Swirl(torch.nn.Module):
    """A velocity of the user's own, whose divergence autograd finds."""

    def __init__(self):
        super().__init__()
        self.matrix = torch.nn.Parameter(torch.tensor([[0.1, 1.0], [-1.0, 0.2]]))

    def forward(self, t, z):
        return torch.tanh(z @ self.matrix.mT) * torch.cos(3 * t)


@pytest.mark.slow
@pytest.mark.parametrize("to, tolerance", [("torch-export", 1e-12), ("onnx", 1e-6)])
def test_own_velocity_in_double_precision(tmp_path, to, tolerance):
    """ONNX files keep the numbers of the time stepping in single precision."""
    for package in export.PACKAGES if to == "onnx" else ():
        pytest.importorskip(package)
    flow = CNF(2, velocity=Swirl(), method="midpoint").double().requires_grad_(False)
    assert export_flow(flow, tmp_path, to=to)["dtype"] == "float64"
    compare(flow, tmp_path, tolerance)


def test_refused(tmp_path, monkeypatch):
    out = tmp_path / "out"
    flow = OTFlow(2)
    with pytest.raises(ArgumentError, match="fixed time steps, got method 'dopri5'"):
        export_flow(FFJORD(2), out)
    with pytest.raises(ArgumentError, match="`to` must be one of onnx, torch-export, got 'tflite'"):
        export_flow(flow, out, to="tflite")
    with pytest.raises(ArgumentError, match="must be an OTFlow or a CNF, got Linear"):
        export_flow(torch.nn.Linear(2, 2), out)
    with pytest.raises(ArgumentError, match="`columns` must be 2 names, got 3"):
        export_flow(flow, out, columns=list("abc"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ArgumentError, match=r"pip install 'pathline\[export\]'"):
        export_flow(flow, out, to="onnx")
    assert not out.exists()


def test_the_command_refuses(tmp_path, capsys):
    pl.save(FFJORD(2), tmp_path / "model")
    assert main(["export", str(tmp_path / "model"), "--to", "torch-export"]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "dopri5" in error
    assert main(["export", str(tmp_path / "nothing"), "--to", "onnx"]) == 2
    assert not (tmp_path / "model" / "export").exists()


def test_a_function_that_differs_is_not_written(tmp_path, monkeypatch):
    """The files are compared with the flow itself, and nothing is left of a wrong export."""
    flow = flow_of(OTFlow, width=3, depth=1, steps=2)
    monkeypatch.setattr(export, "_shift", lambda flow, now: None)  # all steps start at time zero
    with pytest.raises(ModelError, match=r"differs from the flow's by .*, so nothing was"):
        export_flow(flow, tmp_path / "out", to="torch-export")
    assert not (tmp_path / "out").exists()
