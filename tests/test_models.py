"""Saving and loading: bit for bit, never a pickle, and whole or not at all."""

import json
import shutil

import pytest
import torch
from safetensors.torch import save_file

import pathline as pl
from pathline.errors import ModelError
from pathline.models import metadata
from pathline.train.files import write_atomically, write_json

SUPPORT = [(0.0, None), (None, 3.0), (-1.0, 2.0)]


def some_flow(seed=0, **kwargs):
    """A flow away from every default."""
    generator = torch.Generator().manual_seed(seed)
    flow = pl.flows.OTFlow(3, 8, depth=3, rank=2, **kwargs, generator=generator)
    with torch.no_grad():
        for parameter in flow.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        flow.potential.c.fill_(0.7)
        flow.standardize.mean.copy_(torch.randn(3, generator=generator))
        flow.standardize.scale.add_(0.2 * torch.randn(3, 3, generator=generator))
        flow.prepared.fill_(True)
    return flow


OPTIONS = {
    "single": {},
    "support": {"support": SUPPORT},
    "settings": {"transport": 0.3, "hjb": 0.0, "train_steps": 7, "steps": 5, "standardize": False},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_is_bit_for_bit(tmp_path, options, dtype):
    flow = some_flow(**options)
    flow.potential.to(dtype)
    pl.save(flow, tmp_path / "model", metadata={"columns": ["a", "b", "ç"], "n": 3})
    again = pl.load(tmp_path / "model")
    assert type(again) is pl.flows.OTFlow
    before, after = flow.state_dict(), again.state_dict()
    assert list(before) == list(after)
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        assert torch.equal(tensor, after[name]), name
    assert again.config() == flow.config()
    assert again.potential.w.dtype == dtype
    assert all(p.requires_grad for p in again.parameters())
    x = torch.rand(6, 3) + 0.5
    assert torch.equal(again.log_prob(x), flow.log_prob(x))
    assert torch.equal(again.sample(5, seed=1), flow.sample(5, seed=1))
    assert metadata(tmp_path / "model") == {"columns": ["a", "b", "ç"], "n": 3}


def test_files_hold_no_pickle(tmp_path):
    pl.save(some_flow(), tmp_path / "model")
    files = sorted(path.name for path in (tmp_path / "model").iterdir())
    assert len(files) == 2
    assert files[0] == "model.json" and files[1].endswith(".safetensors")
    content = (tmp_path / "model" / files[1]).read_bytes()  # length, JSON header, raw numbers
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    assert len(content) == 8 + size + max(ends)
    assert json.loads((tmp_path / "model" / "model.json").read_text())["kind"] == "OTFlow"


def test_saved_again_replaces(tmp_path):
    for seed in (1, 2):
        pl.save(some_flow(seed), tmp_path)
    assert torch.equal(pl.load(tmp_path).potential.A, some_flow(2).potential.A)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_load_takes_a_run_folder(tmp_path):
    pl.save(some_flow(), tmp_path / "model", metadata={"a": 1})
    assert torch.equal(pl.load(tmp_path).potential.A, pl.load(tmp_path / "model").potential.A)
    assert torch.equal(pl.load(str(tmp_path)).potential.A, some_flow().potential.A)
    assert metadata(tmp_path) == {"a": 1}


def test_loaded_model_does_not_depend_on_the_file(tmp_path):
    pl.save(some_flow(), tmp_path)
    again = pl.load(tmp_path)
    weights = next(tmp_path.glob("*.safetensors"))
    weights.write_bytes(b"\0" * weights.stat().st_size)
    assert torch.equal(again.potential.A, some_flow().potential.A)


def edit(folder, **changes):
    path = folder / "model.json"
    description = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del description[name]
        else:
            description[name] = value
    path.write_text(json.dumps(description))


def weights_of(folder):
    return next(folder.glob("*.safetensors"))


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def drop_a_tensor(folder):
    state = {name: tensor for name, tensor in some_flow().state_dict().items()}
    del state["potential.b"]
    save_file(state, weights_of(folder))


DAMAGE = {
    "truncated weights": (lambda f: truncate(weights_of(f)), "is damaged"),
    "empty weights": (lambda f: weights_of(f).write_bytes(b""), "is damaged"),
    "weights of text": (lambda f: weights_of(f).write_text("hello, world"), "is damaged"),
    "no weights": (lambda f: weights_of(f).unlink(), "does not exist"),
    "a tensor missing": (drop_a_tensor, "weights and description differ"),
    "truncated description": (lambda f: truncate(f / "model.json"), "can't be read as JSON"),
    "description is a list": (lambda f: (f / "model.json").write_text("[1]"), "JSON object"),
    "no description": (lambda f: (f / "model.json").unlink(), "holds no model.json"),
    "another JSON": (lambda f: (f / "model.json").write_text("{}"), "does not describe"),
    "format of text": (lambda f: edit(f, format="one"), "does not describe"),
    "newer format": (lambda f: edit(f, format=99), "newer than 1.*upgrade"),
    "another kind": (lambda f: edit(f, kind="Oracle"), "'Oracle'.*does not know.*OTFlow"),
    "a kind of its own": (lambda f: edit(f, kind=["a"]), "does not know"),
    "wrong width": (
        lambda f: edit(f, config=some_flow().config() | {"width": 9}),
        "weights and description differ",
    ),
    "unknown argument": (lambda f: edit(f, config={"dim": 3, "speed": 9}), "is damaged.*speed"),
    "config of text": (lambda f: edit(f, config="dim 3"), "is damaged|does not describe"),
    "negative width": (
        lambda f: edit(f, config=some_flow().config() | {"width": -1}),
        "is damaged.*`width`",
    ),
    "weights elsewhere": (lambda f: edit(f, weights="../../secret.safetensors"), "does not exist"),
    "weights null": (lambda f: edit(f, weights=3), "does not exist"),
}


@pytest.mark.parametrize("harm, text", DAMAGE.values(), ids=DAMAGE)
def test_damage_is_a_model_error(tmp_path, harm, text):
    pl.save(some_flow(), tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(ModelError, match=text) as caught:
        pl.load(tmp_path / "model")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "make, text",
    [
        (lambda path: None, "there is no such folder"),
        (lambda path: path.mkdir(), "holds no model.json"),
        (lambda path: path.write_text("a,b"), "is not a model"),
    ],
    ids=["missing", "empty", "a file"],
)
def test_not_a_model(tmp_path, make, text):
    make(tmp_path / "place")
    with pytest.raises(ModelError, match=text):
        pl.load(tmp_path / "place")
    with pytest.raises(ModelError, match=text):
        metadata(tmp_path / "place")


def full(*args, **kwargs):
    raise OSError(28, "No space left on device")


def half(tensors, path, **kwargs):
    path.write_bytes(b"\0" * 10)
    full()


@pytest.mark.parametrize(
    "target, failure",
    [
        ("pathline.train.files.os.replace", full),
        ("pathline.train.files.os.fsync", full),
        ("pathline.train.files.save_file", full),
        ("pathline.train.files.save_file", half),
        ("pathline.train.files.write_json", full),
    ],
    ids=["replace", "fsync", "save_file", "half a file", "description"],
)
def test_failed_write_keeps_the_previous_model(tmp_path, monkeypatch, target, failure):
    pl.save(some_flow(1), tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(target, failure)
        with pytest.raises(OSError, match="No space left"):
            pl.save(some_flow(2), tmp_path)
    assert torch.equal(pl.load(tmp_path).potential.A, some_flow(1).potential.A)
    assert not list(tmp_path.glob(".*"))  # no temporary file stays
    pl.save(some_flow(2), tmp_path)
    assert torch.equal(pl.load(tmp_path).potential.A, some_flow(2).potential.A)


def test_saving_needs_no_more_than_the_folder(tmp_path):
    """A model may be moved, and a saved one may be saved again elsewhere."""
    pl.save(some_flow(), tmp_path / "a" / "b")
    shutil.move(tmp_path / "a" / "b", tmp_path / "c")
    pl.save(pl.load(tmp_path / "c"), tmp_path / "d")
    assert weights_of(tmp_path / "c").name == weights_of(tmp_path / "d").name
    assert weights_of(tmp_path / "c").read_bytes() == weights_of(tmp_path / "d").read_bytes()


def test_json_is_strict(tmp_path):
    """Not-a-number has no JSON: it becomes null instead of breaking every other reader."""
    write_json(tmp_path / "a.json", {"a": [float("nan"), 1.5], "b": {"c": float("inf")}})

    def refuse(constant):
        raise AssertionError(constant)

    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=refuse) == {"a": [None, 1.5], "b": {"c": None}}


def test_atomic_write(tmp_path):
    path = tmp_path / "deep" / "file"
    write_atomically(path, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("new")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, fail)
    assert path.read_text() == "old"
    assert [entry.name for entry in path.parent.iterdir()] == ["file"]
