"""Checkpoints: what goes out comes back, and nothing damaged comes in."""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgen.errors import CheckpointError, OutputError
from fastgen.models import ReferenceModel, build
from fastgen.pretrained import from_pretrained, save_pretrained, shipped

CONFIG: dict[str, Any] = dict(model="gated-pixelcnn", levels=4, dim=4, layers=2, classes=3, shape=[6, 6], hidden=5)


@pytest.fixture
def model() -> ReferenceModel:
    torch.manual_seed(0)
    return build(CONFIG).eval()


@pytest.fixture
def saved(model: ReferenceModel, tmp_path: Path) -> Path:
    save_pretrained(model, tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def output(model: ReferenceModel) -> Tensor:
    x = torch.arange(36).reshape(1, 6, 6) % 4
    with torch.no_grad():
        y: Tensor = model(x, torch.tensor([2]))
    return y


def test_round_trip_is_exact(model: ReferenceModel, saved: Path) -> None:
    state = torch.get_rng_state()
    again = from_pretrained(saved)
    assert torch.equal(torch.get_rng_state(), state)
    assert not again.training
    assert again.config == model.config
    assert torch.equal(output(again), output(model))
    assert all(p.stat().st_mode & 0o444 == 0o444 for p in saved.iterdir())  # others may load it too
    assert sorted(p.name for p in saved.parent.iterdir()) == ["checkpoint"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_storage_loads_as_float32(model: ReferenceModel, tmp_path: Path, dtype: torch.dtype) -> None:
    save_pretrained(model, tmp_path / "half", dtype)
    again = from_pretrained(tmp_path / "half")
    for (name, given), expected in zip(again.state_dict().items(), model.state_dict().values(), strict=True):
        assert given.dtype == torch.float32, name
        assert torch.equal(given, expected.to(dtype).float()), name


def test_saving_again_replaces(model: ReferenceModel, saved: Path) -> None:
    with torch.no_grad():
        model.get_parameter("head_out.bias").add_(1.0)
    save_pretrained(model, saved)
    assert torch.equal(output(from_pretrained(saved)), output(model))
    assert sorted(p.name for p in saved.parent.iterdir()) == ["checkpoint"]


def change(path: Path, edit: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(path / "model.safetensors")
    edit(tensors)
    save_file(tensors, path / "model.safetensors")


def rewrite(path: Path, edit: Callable[[bytes], bytes]) -> None:
    file = path / "model.safetensors"
    file.write_bytes(edit(file.read_bytes()))


def relabel(data: bytes, old: str, new: str) -> bytes:
    """Edit the JSON header of a safetensors file, keeping its data."""
    length = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + length].replace(old.encode(), new.encode())
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated": (lambda p: rewrite(p, lambda d: d[:-5]), r"truncated: \d+ bytes given, expected \d+"),
    "cut in the header": (lambda p: rewrite(p, lambda d: d[:40]), r"truncated: 40 bytes given"),
    "cut in the length": (lambda p: rewrite(p, lambda d: d[:3]), r"truncated: 3 bytes given"),
    "empty": (lambda p: rewrite(p, lambda d: b""), r"truncated: 0 bytes given"),
    "oversized": (lambda p: rewrite(p, lambda d: d + bytes(7)), r"oversized: \d+ bytes given, expected \d+"),
    "a huge header length": (lambda p: rewrite(p, lambda d: b"\xff" * 8 + d[8:]), r"truncated"),
    "not JSON": (lambda p: rewrite(p, lambda d: d[:8] + b"#" + d[9:]), r"cannot read .*model\.safetensors"),
    "missing": (lambda p: change(p, lambda t: t.pop("embed.weight")), r"lacks embed\.weight"),
    "extra": (lambda p: change(p, lambda t: t.update(more=torch.zeros(3))), r"holds more"),
    "mis-shaped": (
        lambda p: change(p, lambda t: t.update({"head_out.bias": torch.zeros(9)})),
        r"head_out\.bias has shape \[9\], expected \[4\]",
    ),
    "integers": (
        lambda p: change(p, lambda t: t.update({"head_out.bias": torch.zeros(4, dtype=torch.int32)})),
        r"head_out\.bias has dtype 'I32', expected one of",
    ),
    "nan": (
        lambda p: change(p, lambda t: t["embed.weight"][1].fill_(torch.nan)),
        r"embed\.weight has 4 values",
    ),
    "infinite": (
        lambda p: change(p, lambda t: t["head_in.bias"][0].fill_(torch.inf)),
        r"head_in\.bias has 1 values",
    ),
    "overlapping": (
        lambda p: rewrite(p, lambda d: relabel(d, '"data_offsets":[0,', '"data_offsets":[4,')),
        r"model\.safetensors: ",
    ),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), r"cannot read .*model\.safetensors"),
    "no config": (lambda p: (p / "config.json").unlink(), r"cannot read .*config\.json"),
    "config of bytes": (lambda p: (p / "config.json").write_bytes(b"\xff{"), r"cannot read .*config\.json"),
    "config a list": (lambda p: (p / "config.json").write_text("[1]"), r"config\.json: holds a JSON list"),
    "unknown model": (lambda p: configure(p, model="vae"), r"config\['model'\] is 'vae', expected one of"),
    "unknown option": (lambda p: configure(p, size=3), r"no option size"),
    "wrong type": (lambda p: configure(p, dim="wide"), r"config\.json: "),
    "other size": (lambda p: configure(p, dim=8), r"embed\.weight has shape \[4, 4\], expected \[4, 8\]"),
    "absurd size": (lambda p: configure(p, dim=10**7), r"expected \[4, 10000000\]"),
    "absurd depth": (lambda p: configure(p, layers=10**6), r"config\.json: describes a model of far more tensors than"),
    "deep JSON": (lambda p: (p / "config.json").write_text("[" * 100_000), r"cannot read .*config\.json"),
    "a deep header": (
        lambda p: rewrite(p, lambda d: (100_000).to_bytes(8, "little") + b"[" * 100_000),
        r"cannot read .*model\.safetensors",
    ),
    "a shape that is a number": (lambda p: describe(p, shape=1), r"embed\.weight has shape 1, expected \[4, 4\]"),
    "a shape of texts": (lambda p: describe(p, shape=["4", "4"]), r"embed\.weight has shape \['4', '4'\], expected"),
    "a dtype that is a list": (lambda p: describe(p, dtype=[]), r"embed\.weight has dtype \[\], expected one of"),
    "an entry that is a text": (
        lambda p: rewrite(p, lambda d: rewritten(d, lambda h: h.update({"embed.weight": "x"}))),
        r"embed\.weight has shape None",
    ),
    "a shape of a model that is a text": (
        lambda p: configure(p, shape="x"),
        r"option shape is 'x', expected tuple\[int, int\]",
    ),
    "three axes for two": (
        lambda p: configure(p, shape=[6, 6, 6]),
        r"option shape is \[6, 6, 6\], expected tuple\[int, int\]",
    ),
    "half a layer": (lambda p: configure(p, layers=2.5), r"option layers is 2\.5, expected int"),
    "yes for a number": (lambda p: configure(p, kernel=True), r"option kernel is True, expected int"),
    "other depth": (lambda p: configure(p, layers=3), r"lacks layers\.2\."),
}


def rewritten(data: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """A weight file with another header."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    change(header)
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[end:]


def describe(path: Path, **fields: Any) -> None:
    """Says otherwise of one tensor."""
    rewrite(path, lambda d: rewritten(d, lambda h: h["embed.weight"].update(fields)))


def configure(path: Path, **changes: Any) -> None:
    (path / "config.json").write_text(json.dumps(CONFIG | changes))


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_checkpoints_are_refused_by_name(saved: Path, damage: str) -> None:
    harm, message = DAMAGE[damage]
    harm(saved)
    with pytest.raises(CheckpointError, match=message):
        from_pretrained(saved)


def test_unknown_names_are_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint .*nothing: no such directory; shipped names: mnist-"):
        from_pretrained(tmp_path / "nothing")


def test_weights_that_are_not_finite_are_not_saved(model: ReferenceModel, tmp_path: Path) -> None:
    with torch.no_grad():
        model.get_parameter("embed.weight")[0, 0] = 1e6  # finite in float32, not in float16
    with pytest.raises(CheckpointError, match=r"embed\.weight .*float16"):
        save_pretrained(model, tmp_path / "half", torch.float16)
    assert not list(tmp_path.iterdir())


def test_unwritable_places_leave_nothing_behind(model: ReferenceModel, saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("mine")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    for target in (tmp_path / "file", tmp_path / "file" / "below", tmp_path / "work"):
        with pytest.raises(OutputError, match=f"cannot write {target}"):
            save_pretrained(model, target)
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


def test_a_failed_write_keeps_the_older_checkpoint(
    model: ReferenceModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = output(model)
    rename = os.rename

    def refuse(source: Any, target: Any) -> None:
        if Path(target) == saved and Path(source).name != "old":
            raise OSError(28, "No space left on device")
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse)
    with torch.no_grad():
        model.get_parameter("head_out.bias").add_(1.0)
    with pytest.raises(OutputError, match="No space left"):
        save_pretrained(model, saved)
    assert torch.equal(output(from_pretrained(saved)), expected)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["checkpoint"]


def test_shipped_checkpoints_load_and_are_small() -> None:
    root = Path(__file__).parents[1] / "fastgen" / "checkpoints"
    assert sum(p.stat().st_size for p in root.rglob("*") if p.is_file()) <= 5_000_000
    assert {"mnist-gated-pixelcnn-small", "mnist-pixelcnnpp-small", "speech-wavenet-small"} <= set(shipped())
    for name in shipped():
        assert from_pretrained(name).config == build(name).config
