"""Every test starts from the same seeds on one thread, and must leave torch as it found it."""

import random

import numpy as np
import pytest
import torch
from torch.distributions import Distribution


def torch_globals() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "grad mode": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn deterministic": torch.backends.cudnn.deterministic,
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "validation of distributions": torch.distributions.Distribution._validate_args,
        "anomaly detection": torch.is_anomaly_enabled(),
    }


@pytest.fixture(autouse=True)
def same_torch():
    """Seeds everything, and fails a test that leaves a torch global changed."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    before, checks = torch_globals(), Distribution._validate_args
    yield
    after = torch_globals()
    Distribution.set_default_validate_args(checks)  # torch.compile switches them off
    torch.set_default_dtype(before["default dtype"])
    torch.set_grad_enabled(before["grad mode"])
    torch.set_num_threads(before["threads"])
    torch.use_deterministic_algorithms(before["deterministic algorithms"])
    changed = [name for name in before if before[name] != after[name]]
    assert not changed, f"the test left torch globals changed: {changed}"
