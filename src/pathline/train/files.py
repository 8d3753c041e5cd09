"""Files that are either whole or not there: saved models, checkpoints, run folders."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from .. import __version__
from ..errors import ArgumentError, ModelError

FORMAT = 1
RUN_ENTRIES = (
    "config.json", "model", "checkpoint", "log.jsonl", "metrics.json", "report.html",
    "held_out.npy", "samples.csv", "pictures.npz", "autoencoder", "export", "tensorboard",
    "ranks.png", "coverage.png", "posterior.png", "animation.gif", "open_loop.npz",
)  # fmt: skip


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a temporary file beside `path`, then rename it: a full disk or a kill at
    any moment leaves the previous file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def finite(content: Any) -> Any:
    """`content` with null in place of infinite and undefined numbers, which JSON lacks."""
    if isinstance(content, dict):
        return {key: finite(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content


def write_json(path: Path, content: object) -> None:
    """Write `content` as indented JSON, atomically; infinite and undefined numbers become null."""
    text = json.dumps(finite(content), indent=2, allow_nan=False) + "\n"
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a `ModelError` that says what is wrong with it."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} can't be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def has_report(run: Path) -> bool:
    """Whether a run has figures and a report of them, to which a check can be added."""
    return (run / "metrics.json").exists() and (run / "report.html").exists()


def save(model: nn.Module, folder: str | Path, *, metadata: dict[str, Any] | None = None) -> None:
    """Save `model` into `folder`: its weights as safetensors, the rest as JSON, never a pickle.

    Args:
        model: a Pathline model (one with `config()`).
        folder: made where missing; a model that is there is replaced in one instant.
        metadata: anything JSON-safe to keep beside the model, such as column names.
    """
    folder = Path(folder)
    state = {
        name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()
    }
    digest = hashlib.sha256()
    for name in sorted(state):
        digest.update(name.encode() + state[name].numpy().tobytes())
    weights = f"weights-{digest.hexdigest()[:12]}.safetensors"
    description = {
        "format": FORMAT,
        "pathline": __version__,
        "kind": type(model).__name__,
        "config": model.config(),  # type: ignore[operator]
        "weights": weights,
        "metadata": metadata or {},
    }
    # The JSON names the weights, so replacing it switches from the old model to the new one.
    write_atomically(folder / weights, lambda temporary: save_file(state, temporary))
    write_json(folder / "model.json", description)
    for old in folder.glob("weights-*.safetensors"):
        if old.name != weights:
            old.unlink(missing_ok=True)


def read_model(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The description and the weights of a saved model; `folder` may be the run around it."""
    folder = Path(folder)
    if (folder / "model" / "model.json").exists():
        folder = folder / "model"
    if not folder.is_dir():
        raise ModelError(f"{folder} is not a model: there is no such folder")
    if not (folder / "model.json").exists():
        raise ModelError(f"{folder} is not a model: it holds no model.json")
    description = read_json(folder / "model.json")
    version = description.get("format")
    if not isinstance(version, int) or {"kind", "config", "weights"} - description.keys():
        raise ModelError(f"{folder / 'model.json'} does not describe a Pathline model")
    if version > FORMAT:
        raise ModelError(
            f"{folder} has model format {version}, newer than {FORMAT}, the newest that "
            f"Pathline {__version__} reads; please upgrade Pathline"
        )
    return description, read_tensors(folder / Path(str(description["weights"])).name)[0]


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and text entries of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            # Copies: a mapped file must not change under the model when it is replaced.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except FileNotFoundError:
        raise ModelError(f"{path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged or not a safetensors file ({error})") from None


def write_checkpoint(path: Path, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """One file with all that training needs to go on."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    header = {"state": json.dumps(state), "format": str(FORMAT)}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What `write_checkpoint` wrote, or None where there is no checkpoint."""
    if not path.exists():
        return None
    tensors, header = read_tensors(path)
    if "state" not in header:
        raise ModelError(f"{path} is not a checkpoint")
    return tensors, json.loads(header["state"])


def open_run(folder: str | Path, *, resume: bool, overwrite: bool) -> Path:
    """Make the folder of a run ready.

    Raises:
        ArgumentError: it exists and is not empty, and neither `resume` nor `overwrite` is given,
            it holds no run that could be overwritten, or it can't be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ArgumentError(f"the output folder {folder} is a file")
    entries = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
    if entries and not (resume or overwrite):
        raise ArgumentError(
            f"the output folder {folder} exists and is not empty; --resume goes on with the run "
            "in it, --overwrite replaces it"
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe.{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ArgumentError(f"the output folder {folder} can't be written: {error}") from None
    if overwrite and not resume:
        for name in RUN_ENTRIES:  # and nothing that is not ours
            entry = folder / name
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink(missing_ok=True)
    return folder


def flatten(prefix: str, state: dict[int, dict[str, Any]]) -> dict[str, Tensor]:
    """An optimiser's state as a flat dict of tensors."""
    return {
        f"{prefix}.{index}.{name}": torch.as_tensor(value)
        for index, entries in state.items()
        for name, value in entries.items()
    }


def unflatten(prefix: str, flat: dict[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """The inverse of `flatten`."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in flat.items():
        head, _, name = key.rpartition(".")
        if head.startswith(prefix + "."):
            state.setdefault(int(head.removeprefix(prefix + ".")), {})[name] = value.clone()
    return state
