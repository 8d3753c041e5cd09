"""The OT-Flow authors' checkpoints become flows with the same numbers; nothing is executed."""

import argparse
import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

import pathline as pl
from pathline import native
from pathline.cli import main
from pathline.convert import read_otflow
from pathline.errors import ModelError

DATA = Path(os.environ.get("PATHLINE_DATA", "/nowhere")) / "ckpt_otflow"
published = pytest.mark.skipif(
    not DATA.is_dir(), reason="set PATHLINE_DATA to a folder with ckpt_otflow"
)


def close(got, want, tolerance=1e-9):
    """Equal to `tolerance` of the largest number."""
    torch.testing.assert_close(
        got, want, rtol=0, atol=tolerance * max(1.0, want.abs().max().item())
    )


def augmented(potential):
    """Their ODE: d(z, l, L, R)/dt, of which they integrate all components by RK4."""

    def velocity(t, state):
        phi = potential.derivatives(state[0], t, value=False)
        L = 0.5 * phi.grad.square().sum(1)
        return -phi.grad, -phi.laplacian, L, (phi.dt - L).abs()

    return velocity


@published
@pytest.mark.parametrize("name", ["swissroll", "miniboone", "interp_mnist"])
def test_published_checkpoints(name):
    """The numbers of the authors' own code: the potential and its derivatives, the forward and
    the inverse flow, the integrals and the generated points."""
    flow, args = read_otflow(DATA / name)
    assert flow.potential.w.dtype == getattr(torch, args["stored_dtype"].removeprefix("torch."))
    assert (flow.train_steps, flow.steps) == (args["nt"], args["nt_val"])
    a_L, a_C, a_R = args["alph"]
    assert (flow.transport, flow.hjb) == (a_L / a_C, a_R / a_C)
    flow = flow.double().requires_grad_(False)
    with np.load(DATA / name / "oracle.npz") as file:
        oracle = {key: torch.from_numpy(file[key]).double() for key in file.files}
    s, x, dim = oracle["s"], oracle["x"], flow.dim
    got = flow.potential.derivatives(s[:, :dim], s[:, dim])
    close(got.value, oracle["phi"].flatten())
    close(torch.cat([got.grad, got.dt[:, None]], 1), oracle["grad"])
    close(got.laplacian, oracle["trHess"].flatten())
    for tag in ("nt", "nt_val"):
        flow.steps = steps = int(oracle[f"{tag}/steps"])
        close(flow.to_reference(x), oracle[f"{tag}/z"])
        close(flow.from_reference(oracle[f"{tag}/z"]), oracle[f"{tag}/x_back"])
        zeros = x.new_zeros(len(x))
        times = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
        path = pl.odeint(augmented(flow.potential), (x, zeros, zeros, zeros), times, method="rk4")
        for part, want in zip(path, ("z", "l", "L", "R"), strict=True):
            close(part[-1], oracle[f"{tag}/{want}"].reshape(part[-1].shape))
    close(flow.from_reference(oracle["y"]), oracle["gen_from_y_nt_val"])


def checkpoint(dim=3, width=5, depth=2, dtype=torch.float32, **changes):
    """What their training code gives to torch.save."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    state = {
        "A": normal(min(10, dim + 1), dim + 1),
        "c.weight": normal(1, dim + 1),
        "c.bias": normal(1),
        "w.weight": normal(1, width),
    }
    for i in range(depth):
        state[f"N.layers.{i}.weight"] = normal(width, width if i else dim + 1)
        state[f"N.layers.{i}.bias"] = normal(width)
    args = argparse.Namespace(nt=6, nt_val=10, alph=[1.0, 100.0, 15.0], data="toy", resume=None)
    return {"args": args, "state_dict": state} | changes


def theirs(state, s):
    """Phi(s) as their src/Phi.py has it."""

    def act(x):
        return x.abs() + torch.log(1 + torch.exp(-2 * x.abs()))

    depth = sum(name.startswith("N.layers") for name in state) // 2
    u = act(s @ state["N.layers.0.weight"].T + state["N.layers.0.bias"])
    for i in range(1, depth):
        K, b = state[f"N.layers.{i}.weight"], state[f"N.layers.{i}.bias"]
        u = u + act(u @ K.T + b) / (depth - 1)
    quadratic = 0.5 * ((s @ state["A"].T @ state["A"]) * s).sum(1)
    return u @ state["w.weight"][0] + quadratic + s @ state["c.weight"][0] + state["c.bias"]


@pytest.mark.parametrize("depth", [2, 3])
def test_a_pth_file(tmp_path, depth):
    content = checkpoint(depth=depth, dtype=torch.float64)
    torch.save(content, tmp_path / "theirs.pth")
    flow, args = read_otflow(tmp_path / "theirs.pth")
    s = torch.randn(20, 4, dtype=torch.float64, requires_grad=True)
    phi = theirs(content["state_dict"], s)
    close(flow.potential(s[:, :3], s[:, 3]), phi, 1e-13)
    (grad,) = torch.autograd.grad(phi.sum(), s)
    at = flow.velocity(s[:, 3], s[:, :3])
    close(at, -grad[:, :3], 1e-13)
    assert args["data"] == "toy"
    assert flow.config() == pl.flows.OTFlow(
        3, 5, depth, rank=4, transport=0.01, hjb=0.15, train_steps=6, steps=10,
        standardize=False, trace="exact",
    ).config()  # fmt: skip
    assert flow.prepared  # so that training goes on from these weights


def test_arrays_and_pickle_agree(tmp_path):
    content = checkpoint()
    torch.save(content, tmp_path / "theirs.pth")
    folder = tmp_path / "arrays"
    folder.mkdir()
    np.savez(folder / "weights.npz", **{k: v.numpy() for k, v in content["state_dict"].items()})
    (folder / "args.json").write_text(json.dumps(vars(content["args"])))
    flows = [read_otflow(path)[0] for path in (folder, tmp_path / "theirs.pth")]
    states = [flow.state_dict() for flow in flows]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


def test_command(tmp_path, capsys):
    """A converted model is saved, and samples are drawn from it."""
    torch.save(checkpoint(), tmp_path / "theirs.pth")
    out = tmp_path / "model"
    arguments = ["convert", str(tmp_path / "theirs.pth"), "--out", str(out)]
    assert main([*arguments, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["dim"], shown["width"], shown["depth"], shown["steps"]) == (3, 5, 2, 10)
    flow = read_otflow(tmp_path / "theirs.pth")[0]
    x = torch.randn(5, 3)
    with native.using(None):
        assert torch.equal(pl.load(out).log_prob(x), flow.log_prob(x))
    assert pl.models.metadata(out)["arguments"]["alph"] == [1.0, 100.0, 15.0]
    assert main(["sample", str(out), "-n", "10", "--out", str(tmp_path / "s.csv")]) == 0
    lines = (tmp_path / "s.csv").read_text().splitlines()
    assert lines[0] == "x0,x1,x2" and len(lines) == 11
    assert main(arguments) == 2  # a model is there
    assert "--overwrite" in capsys.readouterr().err
    assert main([*arguments, "--overwrite"]) == 0


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch '{self.path}'",)


@pytest.mark.parametrize("legacy", [False, True])
def test_no_code_is_executed(tmp_path, capsys, legacy):
    mark = tmp_path / "executed"
    content = checkpoint()
    content["args"].data = Malicious(mark)
    file = tmp_path / "theirs.pth"
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    assert main(["convert", str(file), "--out", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and "system" in error and "refused" in error
    assert not mark.exists()
    assert not (tmp_path / "model").exists()


def test_array_files_are_not_unpickled(tmp_path):
    mark, folder = tmp_path / "executed", tmp_path / "arrays"
    folder.mkdir()
    np.savez(folder / "weights.npz", A=np.array([Malicious(mark)], dtype=object))
    (folder / "args.json").write_text("{}")
    with pytest.raises(ModelError, match="can't be read"):
        read_otflow(folder)
    assert not mark.exists()


def altered(**weights):
    content = checkpoint()
    content["state_dict"] |= weights
    content["state_dict"] = {k: v for k, v in content["state_dict"].items() if v is not None}
    return content


def with_args(**changes):
    content = checkpoint()
    vars(content["args"]).update(changes)
    return content


REFUSED = {
    "no_dict": (torch.zeros(3), "is no checkpoint of OT-Flow"),
    "no_args": ({"state_dict": {}}, "is no checkpoint of OT-Flow"),
    "foreign": (altered(**{"conv.weight": torch.zeros(2, 2)}), "conv.weight"),
    "lacking": (altered(A=None), r"lack \['A'\]"),
    "not_finite": (altered(A=torch.full((4, 4), torch.nan)), "not finite"),
    "no_tensor": (altered(A=[1.0]), "must be a tensor"),
    "integers": (altered(A=torch.ones(4, 4, dtype=torch.int64)), "precision"),
    "two_precisions": (altered(A=torch.ones(4, 4, dtype=torch.float64)), "one precision"),
    "axes": (altered(A=torch.ones(4)), "unexpected shape"),
    "shapes": (altered(**{"w.weight": torch.ones(1, 7)}), "do not fit"),
    "steps": (with_args(nt=0), "nt_val"),
    "weights": (with_args(alph=[1.0, 0.0, 1.0]), "alph"),
    "no_weights": (with_args(alph=None), "alph"),
}


@pytest.mark.parametrize("content, words", REFUSED.values(), ids=REFUSED)
def test_foreign_files_are_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "theirs.pth")
    with pytest.raises(ModelError, match=words) as caught:
        read_otflow(tmp_path / "theirs.pth")
    assert "\n" not in str(caught.value)


def test_damaged_files_are_refused(tmp_path):
    buffer = io.BytesIO()
    torch.save(checkpoint(), buffer)
    whole = buffer.getvalue()
    with zipfile.ZipFile(tmp_path / "archive.pth", "w") as archive:
        archive.writestr("hello", "world")
    for name, content in (("empty", b""), ("cut", whole[:-200]), ("text", b"a,b\n1,2\n")):
        (tmp_path / f"{name}.pth").write_bytes(content)
    for name in ("empty", "cut", "text", "archive"):
        with pytest.raises(ModelError, match=r"damaged or no file of torch\.save"):
            read_otflow(tmp_path / f"{name}.pth")
    with pytest.raises(ModelError, match="does not exist"):
        read_otflow(tmp_path / "nothing.pth")
    with pytest.raises(ModelError, match=r"lacks weights\.npz"):
        read_otflow(tmp_path)


@published
def test_a_cut_archive_of_arrays_is_refused(tmp_path):
    folder = tmp_path / "cut"
    shutil.copytree(DATA / "swissroll", folder)
    folder.chmod(0o755)
    file = folder / "weights.npz"
    content = file.read_bytes()
    file.unlink()
    file.write_bytes(content[:1000])
    with pytest.raises(ModelError, match="can't be read"):
        read_otflow(folder)
