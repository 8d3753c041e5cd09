"""Trained potentials of the OT-Flow authors' code as flows of Pathline."""

import argparse
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import ModelError
from .flows import OTFlow

__all__ = ["read_otflow"]


def read_otflow(path: str | Path) -> tuple[OTFlow, dict[str, Any]]:
    """The flow in a checkpoint of the OT-Flow authors' code, and their arguments of training.

    Their Phi(s) = w.N(s) + 1/2 s.(A^T A) s + c.weight s + c.bias is our `Potential` with b =
    c.weight and c = c.bias; the velocity is -grad Phi in both, and the weights alph = (a_L, a_C,
    a_R) of transport, likelihood and HJB residual become `transport` = a_L/a_C and `hjb` =
    a_R/a_C. The flow works in the coordinates of their network (no standardisation), with their
    time steps for validation, `nt_val`, and in the stored precision.

    Args:
        path: a `.pth` file of theirs (a dict with `args` and `state_dict`), or a folder with the
            same as `weights.npz` and `args.json`. Nothing in it is executed: a pickle that names
            anything but tensors and `argparse.Namespace` is refused.

    Raises:
        ModelError: the file can't be read, is no such checkpoint, or would execute code.

    Source: Onken, Wu Fung, Li, Ruthotto, OT-Flow, AAAI 2021 (arXiv 2006.00104), and the
    authors' code, src/Phi.py and src/OTFlowProblem.py.
    """
    path = Path(path)
    if not path.exists():
        raise ModelError(f"{path} does not exist")
    weights, args = _read_arrays(path) if path.is_dir() else _read_pickle(path)
    state = _state(path, weights)
    steps, train_steps, transport, hjb = _settings(path, args)
    width, inputs = state["layers.0.weight"].shape
    depth = sum(name.endswith(".weight") for name in state)
    flow = OTFlow(
        inputs - 1,
        width,
        depth,
        rank=len(state["A"]),
        transport=transport,
        hjb=hjb,
        train_steps=train_steps,
        steps=steps,
        standardize=False,
        trace="exact",
    )
    flow.to(state["A"].dtype)
    try:
        flow.potential.load_state_dict(state)
    except RuntimeError as error:
        reason = " ".join(str(error).split("\n\t")[1:2])
        raise ModelError(f"{path} holds weights of shapes that do not fit: {reason}") from None
    flow.prepared.fill_(True)
    return flow, args


def _read_pickle(path: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        if "GLOBAL" in str(error):
            name = str(error).partition("GLOBAL ")[2].split()[0]
            raise ModelError(
                f"{path} is refused: it names {name}, which unpickling would call; a checkpoint "
                "of OT-Flow holds tensors and argparse.Namespace only"
            ) from None
        raise ModelError(f"{path} is damaged or no file of torch.save") from None
    except Exception as error:  # a damaged file may fail anywhere
        raise ModelError(f"{path} is damaged or no file of torch.save ({error})") from None
    args = content.get("args") if isinstance(content, dict) else None
    weights = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(args, argparse.Namespace) or not isinstance(weights, dict):
        raise ModelError(
            f"{path} is no checkpoint of OT-Flow, which is a dict with `args`, an "
            "argparse.Namespace, and `state_dict`"
        )
    return weights, vars(args)


def _read_arrays(folder: Path) -> tuple[Mapping[str, Any], dict[str, Any]]:
    for name in ("weights.npz", "args.json"):
        if not (folder / name).exists():
            raise ModelError(f"{folder} must hold weights.npz and args.json, it lacks {name}")
    try:
        with np.load(folder / "weights.npz", allow_pickle=False) as file:
            weights = {name: torch.from_numpy(file[name]) for name in file.files}
        args = json.loads((folder / "args.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ModelError(f"{folder} can't be read: {error}") from None
    if not isinstance(args, dict):
        raise ModelError(f"{folder / 'args.json'} must hold an object")
    return weights, args


def _state(path: Path, weights: Mapping[str, Any]) -> dict[str, Tensor]:
    """Their weights by our names."""
    names = {"A": "A", "c.weight": "b", "c.bias": "c", "w.weight": "w"}
    depth = 0
    while f"N.layers.{depth}.weight" in weights:
        for part in ("weight", "bias"):
            names[f"N.layers.{depth}.{part}"] = f"layers.{depth}.{part}"
        depth += 1
    lost, extra = names.keys() - weights.keys(), weights.keys() - names.keys()
    if lost or extra or not depth:
        raise ModelError(
            f"{path} holds no potential of OT-Flow: its weights lack {sorted(lost) or 'nothing'} "
            f"and have {sorted(map(str, extra)) or 'nothing'} besides"
        )
    found = {}
    for theirs, ours in names.items():
        tensor = weights[theirs]
        if not isinstance(tensor, Tensor) or tensor.dtype not in (torch.float32, torch.float64):
            raise ModelError(f"{path}: {theirs} must be a tensor in single or double precision")
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: {theirs} has values that are not finite")
        want = 2 if theirs.endswith("weight") or theirs == "A" else 1
        if tensor.ndim != want or 0 in tensor.shape:
            raise ModelError(f"{path}: {theirs} has an unexpected shape {tuple(tensor.shape)}")
        row = theirs in ("c.weight", "c.bias", "w.weight")  # (1, n), or (1,) for the constant
        found[ours] = tensor.detach()[0] if row else tensor.detach()
    if len({tensor.dtype for tensor in found.values()}) > 1:
        raise ModelError(f"{path}: the weights must have one precision")
    if found["A"].shape[1] < 2 or len(found["A"]) > found["A"].shape[1]:
        raise ModelError(f"{path}: A has an unexpected shape {tuple(found['A'].shape)}")
    return found


def _settings(path: Path, args: dict[str, Any]) -> tuple[int, int, float, float]:
    """Time steps, those of training, and the weights of transport and HJB residual."""
    try:
        steps, train_steps = int(args["nt_val"]), int(args["nt"])
        a_L, a_C, a_R = (float(weight) for weight in args["alph"])
        if min(steps, train_steps) < 1 or not (a_L >= 0 and a_C > 0 and a_R >= 0):
            raise ValueError("they must be positive")
        return steps, train_steps, a_L / a_C, a_R / a_C
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(
            f"{path}: its arguments must have nt, nt_val and three weights alph ({error})"
        ) from None
