"""`pathline export` and `convert`: models that leave Pathline, and models that come to it."""

from pathlib import Path
from typing import Annotated, Literal

from cyclopts import Parameter

from .. import models
from ..control import Policy
from ..convert import read_otflow
from ..errors import ArgumentError
from .options import Flag, answer, recipe_of


def export(
    model: Path,
    /,
    *,
    to: Annotated[Literal["onnx", "torch-export"], Parameter(name="--to")],
    out: Path | None = None,
    double: Flag = False,
    json: Flag = False,
) -> None:
    """Write log-density and sampling of a flow, or the control of a policy, as files that run
    without Pathline.

    Each is compared with the model before it is written.

    Parameters
    ----------
    model
        A run folder, or the model inside it.
    to
        ONNX files, or .pt2 files of torch.export; of a policy only the latter.
    out
        Folder to write; the folder export in MODEL by default.
    double
        In double precision, whatever that of the model.
    json
        Print one JSON object on standard output.
    """
    from ..export import export_flow  # the exporters take seconds to import
    from ..export_policy import export_policy

    out = model / "export" if out is None else out
    found = models.load(model)
    found = found.double() if double else found
    if isinstance(found, Policy):
        if to != "torch-export":
            raise ArgumentError(f"--to must be torch-export for a policy, got {to}")
        content = export_policy(found, out)
    else:
        content = export_flow(found, out, to=to, columns=recipe_of(model, found).columns)
    lines = [
        f"{entry['file']}: {name}({', '.join(entry['inputs'])}), "
        f"largest difference to the model {entry['difference']:.2g}"
        for name, entry in content["functions"].items()
    ]
    answer(content | {"out": str(out)}, json, "\n".join([*lines, f"wrote {out}"]))


def convert(source: Path, /, *, out: Path, overwrite: Flag = False, json: Flag = False) -> None:
    """Convert a checkpoint of the OT-Flow authors' code to a model of Pathline.

    Nothing in the checkpoint is executed.

    Parameters
    ----------
    source
        A .pth file, or a folder with weights.npz and args.json.
    out
        Folder of the model; must be empty or missing.
    overwrite
        Replace the model in the folder.
    json
        Print one JSON object on standard output.
    """
    if out.exists() and not out.is_dir():
        raise ArgumentError(f"--out must be a folder, {out} is a file")
    if out.exists() and any(out.iterdir()) and not (overwrite and (out / "model.json").exists()):
        raise ArgumentError(
            f"--out must be empty or missing, {out} is not; --overwrite replaces a model in it"
        )
    flow, arguments = read_otflow(source)
    kept = {key: value for key, value in arguments.items() if _plain(value)}
    models.save(flow, out, metadata={"source": source.name, "arguments": kept})
    content = {"out": str(out), "dim": flow.dim, "width": flow.potential.width}
    content |= {"depth": flow.potential.depth, "steps": flow.steps}
    text = (
        f"wrote {out}: an OTFlow of {flow.dim} columns, width {flow.potential.width}, depth "
        f"{flow.potential.depth}, {flow.steps} time steps, in the units of its network"
    )
    answer(content, json, text)


def _plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_plain(entry) for entry in value)
    return value is None or isinstance(value, str | int | float)
