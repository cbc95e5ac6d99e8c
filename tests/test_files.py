"""Files of samples: what is written reads back, and nothing is left half-written."""

import os
import stat
import wave
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastgen import files, media
from fastgen.errors import OutputError
from fastgen.heads import Bernoulli, Categorical, GaussianMixture, Head, LogisticMixture
from fastgen.spec import Spec

RATE = 8000
IMAGES = {
    "grey": Spec((1, 5, 6), LogisticMixture(2)),
    "colour": Spec((3, 5, 6), LogisticMixture(2)),
    "coarse": Spec((1, 5, 6), LogisticMixture(2, levels=7)),
    "indices": Spec((5, 6), Categorical(8), "HW"),
    "one-hot": Spec((4, 5, 6), Categorical(4, encode="onehot")),
    "binary": Spec((1, 5, 6), Bernoulli()),
    "signs": Spec((5, 6), Bernoulli("symmetric"), "HW"),
    "range": Spec((1, 5, 6), GaussianMixture(1, value_range=(0.0, 2.0))),
}
AUDIO = {
    "one-hot": Spec((16, 40), Categorical(16, encode="onehot"), "CT", "next", 7.0),
    "mulaw": Spec((1, 40), Categorical(256, encode="mulaw"), "CT"),
    "linear": Spec((40,), Categorical(64, encode="symmetric"), "T"),
    "continuous": Spec((1, 40), LogisticMixture(2, levels=None), "CT", "next", 0.0),
}


def pixels_of(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.array(picture)


def values_of(spec: Spec, n: int) -> Tensor:
    """Samples of a specification that cover its range of values."""
    head: Head = spec.head
    u = torch.rand(n, spec.grid[0] * spec.grid[1], spec.channels, generator=torch.Generator().manual_seed(3))
    if head.indices or head.discrete:
        return spec.result((u * head.n).floor())
    low, high = head.clip or (-1.0, 1.0)
    if head.grid_levels:
        u = (u * (head.grid_levels - 1)).round() / (head.grid_levels - 1)
    return spec.result(low + u * (high - low))


# ---- PNG ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("channels", [1, 3])
def test_png_pixels_come_back(tmp_path: Path, channels: int) -> None:
    images = torch.randint(0, 256, (5, channels, 4, 6), dtype=torch.uint8)
    files.write_png_grid(images, tmp_path / "x.png", columns=2, upscale=3)
    page = pixels_of(tmp_path / "x.png").reshape(3 * 12 + 2 * 2, 2 * 18 + 2, channels)
    for k in range(5):
        y, x = k // 2 * 14, k % 2 * 20
        for part in (page[y : y + 12 : 3, x : x + 18 : 3], page[y + 2 : y + 12 : 3, x + 2 : x + 18 : 3]):
            assert np.array_equal(part, images[k].permute(1, 2, 0).numpy())
    assert (page[12:14] == 255).all()
    assert (page[28:, 20:] == 255).all()


@pytest.mark.parametrize(
    ("n", "side", "size"), [(16, 28, 4 * 56 + 3 * 2), (1, 6, 60), (4, 100, 2 * 100 + 2), (9, 64, 3 * 64 + 4)]
)
def test_png_is_square_and_enlarged_by_default(tmp_path: Path, n: int, side: int, size: int) -> None:
    files.write_png_grid(torch.zeros(n, 1, side, side, dtype=torch.uint8), tmp_path / "x.png")
    assert pixels_of(tmp_path / "x.png").shape == (size, size)


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(1, 1, 2, 2), TypeError, "float32; expected torch.uint8"),
        (torch.zeros(1, 2, 2, 2, dtype=torch.uint8), ValueError, r"\[1, 2, 2, 2\]; expected \[n, 1 or 3"),
        (torch.zeros(0, 1, 2, 2, dtype=torch.uint8), ValueError, r"\[0, 1, 2, 2\]"),
    ],
)
def test_png_refuses(tmp_path: Path, images: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        files.write_png_grid(images, tmp_path / "x.png")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", IMAGES)
def test_images_survive_a_png(tmp_path: Path, name: str) -> None:
    spec = IMAGES[name]
    samples = values_of(spec, 1)
    files.write_samples(samples, spec, tmp_path / "x.png", RATE, upscale=1)
    shown = pixels_of(tmp_path / "x.png")
    assert shown.min() < 30
    assert shown.max() > 225
    given, mask = files.read_known(tmp_path / "x.png", spec, RATE, "left")
    assert given.dtype == samples.dtype
    # Values on a grid of at most 256 levels come back as they were, others to the nearest of 256.
    torch.testing.assert_close(given, samples, rtol=0, atol=2.0 / 510 if name == "range" else 1e-6)
    kept = spec.values(mask.float())[:, :, 0].reshape(5, 6)
    assert torch.equal(kept[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    assert bool((kept == kept[0]).all())


@pytest.mark.parametrize(("where", "rows"), [("top", [0, 1]), ("bottom", [2, 3, 4]), (None, [0, 1])])
def test_masks_keep_rows(tmp_path: Path, where: str | None, rows: list[int]) -> None:
    spec = IMAGES["indices"]
    files.write_samples(values_of(spec, 3), spec, tmp_path / "x.npy", RATE)
    given, mask = files.read_known(tmp_path / "x.npy", spec, RATE, where)
    assert torch.equal(given, values_of(spec, 3))
    assert mask.shape == given.shape
    assert mask.any(2).nonzero()[:, 1].tolist() == rows * 3
    assert torch.equal(mask.any(2), mask.all(2))


# ---- WAV ---------------------------------------------------------------------------------------------------
def test_wav_header_and_samples_come_back(tmp_path: Path) -> None:
    signal = torch.linspace(-1, 1, 1001)
    files.write_wav(signal, tmp_path / "x.wav", RATE)
    with wave.open(str(tmp_path / "x.wav")) as file:
        assert file.getparams()[:4] == (1, 2, RATE, 1001)
        pcm = np.frombuffer(file.readframes(1001), "<i2")
    assert (pcm[0], pcm[500], pcm[-1]) == (-32767, 0, 32767)
    torch.testing.assert_close(files.read_wav(tmp_path / "x.wav", RATE), signal, rtol=0, atol=0.51 / 32767)


def test_wav_clips_and_puts_silence_between(tmp_path: Path) -> None:
    files.write_wav(torch.tensor([[2.0, 0.5], [-2.0, -0.5]]), tmp_path / "x.wav", 8)
    torch.testing.assert_close(
        files.read_wav(tmp_path / "x.wav", 8), torch.tensor([1.0, 0.5, 0, 0, -1.0, -0.5]), rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("signal", "rate"),
    [(torch.tensor([float("nan")]), 8), (torch.zeros(2), 0), (torch.zeros(0), 8), (torch.ones(2).int(), 8)],
)
def test_wav_refuses(tmp_path: Path, signal: Tensor, rate: int) -> None:
    with pytest.raises(ValueError, match=r"finite|rate=0|expected floats"):
        files.write_wav(signal, tmp_path / "x.wav", rate)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", AUDIO)
def test_audio_survives_a_wav(tmp_path: Path, name: str) -> None:
    spec = AUDIO[name]
    samples = values_of(spec, 1)
    files.write_samples(samples, spec, tmp_path / "x.wav", RATE)
    given, mask = files.read_known(tmp_path / "x.wav", spec, RATE)
    assert given.dtype == samples.dtype
    torch.testing.assert_close(given, samples, rtol=0, atol=0.51 / 32767 if name == "continuous" else 0)
    assert bool(mask.all())


def test_one_hot_classes_sound_as_mulaw() -> None:
    samples = torch.tensor([[0, 7, 8, 15]])
    heard = media.to_audio(samples, AUDIO["one-hot"])
    assert heard.tolist()[0] == pytest.approx([-1.0, -0.0135, 0.0135, 1.0], abs=1e-3)  # (16^(1/15) - 1) / 15


def test_shorter_audio_is_continued(tmp_path: Path) -> None:
    spec = AUDIO["continuous"]
    files.write_wav(torch.full((10,), 0.5), tmp_path / "x.wav", RATE)
    given, mask = files.read_known(tmp_path / "x.wav", spec, RATE)
    assert given.shape == mask.shape == (1, 1, 40)
    assert mask[0, 0].tolist() == [True] * 10 + [False] * 30
    np.save(tmp_path / "x.npy", np.full((10,), 3))
    given, mask = files.read_known(tmp_path / "x.npy", AUDIO["one-hot"], RATE)
    assert given[mask].tolist() == [3] * 10
    with pytest.raises(ValueError, match="10 audio samples given; expected at most the length, 8"):
        files.read_known(tmp_path / "x.npy", AUDIO["one-hot"].at_length(8), RATE)
    with pytest.raises(ValueError, match="16-bit at 8000 Hz; expected 16-bit at 16000 Hz"):
        files.read_known(tmp_path / "x.wav", spec, 16000)
    with pytest.raises(ValueError, match="masks are for images"):
        files.read_known(tmp_path / "x.wav", spec, RATE, "top")


# ---- tensors -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("spec", [*IMAGES.values(), *AUDIO.values()])
@pytest.mark.parametrize("ending", [".npy", ".safetensors"])
def test_tensors_come_back(tmp_path: Path, spec: Spec, ending: str) -> None:
    samples, path = values_of(spec, 2), tmp_path / f"x{ending}"
    files.write_samples(samples, spec, path, RATE)
    plain = torch.from_numpy(np.load(path)) if ending == ".npy" else load_file(path)["samples"]
    assert plain.dtype == samples.dtype
    assert torch.equal(plain, samples)
    assert torch.equal(files.read_known(path, spec, RATE)[0], samples)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.png", b"no picture", "cannot identify image"),
        ("x.wav", b"RIFF", "not a WAV file"),
        ("x.npy", b"\x93NUMPY", "x.npy: "),
        ("x.npy", b"", "x.npy: No data left"),
        ("x.safetensors", b"12345678", "x.safetensors"),
        ("x.jpg", b"", "expected one of"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises((ValueError, OSError), match=message):
        files.read_known(tmp_path / name, AUDIO["mulaw"] if name == "x.wav" else IMAGES["grey"], RATE)


def test_given_of_another_size_is_refused(tmp_path: Path) -> None:
    files.write_png_grid(torch.zeros(1, 1, 6, 5, dtype=torch.uint8), tmp_path / "x.png", upscale=1)
    with pytest.raises(ValueError, match=r"5 x 6 pixels; expected one image of 6 x 5"):
        files.read_known(tmp_path / "x.png", IMAGES["grey"], RATE)
    np.save(tmp_path / "x.npy", np.zeros(3))
    with pytest.raises(ValueError, match=r"shape \[3\]; expected \[m, 5, 6\]"):
        files.read_known(tmp_path / "x.npy", IMAGES["indices"], RATE)


def test_sixteen_bits_of_grey_are_kept(tmp_path: Path) -> None:
    grey = np.arange(30, dtype=np.uint16).reshape(5, 6) * 8
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray(grey * 257).save(tmp_path / "16.png")
    eight, sixteen = (files.read_known(tmp_path / f"{k}.png", IMAGES["grey"], RATE)[0] for k in (8, 16))
    assert torch.equal(eight, sixteen) and len(eight.unique()) > 3


def test_a_tensor_of_no_samples_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.full((1, 5, 6), 0.9))
    with pytest.raises(ValueError, match=r"x\.npy: holds 0.9, which is none"):
        files.read_known(tmp_path / "x.npy", IMAGES["grey"], RATE)


@pytest.mark.parametrize(("name", "spec"), [("x.wav", IMAGES["grey"]), ("x.png", AUDIO["mulaw"])])
def test_format_must_suit_the_samples(name: str, spec: Spec) -> None:
    with pytest.raises(ValueError, match=rf"output {name}: these samples are (audio|images); expected"):
        files.check_format(name, spec)


# ---- places ------------------------------------------------------------------------------------------------
def test_unwritable_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    os.mkfifo(tmp_path / "pipe.png")
    for path, message in [
        (tmp_path / "missing" / "x.png", "missing is not a directory"),
        (tmp_path / "file" / "x.png", "file is not a directory"),
        (tmp_path, "it is a directory"),
        (tmp_path / "pipe.png", "not a regular file"),
        (tmp_path / ("x" * 300), "File name too long"),
    ]:
        with pytest.raises(OutputError, match=message):
            files.check_output(path)
        with pytest.raises(OutputError, match=message):
            files.write_atomically(path, lambda file: file.write(b"x"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "pipe.png"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_places_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.png").write_text("mine")
    (tmp_path / "x.png").chmod(0o400)
    with pytest.raises(OutputError, match="read-only"):
        files.check_output(tmp_path / "x.png")
    tmp_path.chmod(0o500)
    with pytest.raises(OutputError, match="Permission denied"):
        files.check_output(tmp_path / "y.png")
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_failure_leaves_the_old_file(tmp_path: Path, error: BaseException) -> None:
    (tmp_path / "x").write_text("old")

    def write(file: BinaryIO) -> None:
        file.write(b"new")
        raise error

    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected, match="No space left" if isinstance(error, OSError) else None):
        files.write_atomically(tmp_path / "x", write)
    assert [p.name for p in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_links_and_rights_are_kept(tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "real").chmod(0o640)
    (tmp_path / "link").symlink_to("real")
    files.write_atomically(tmp_path / "link", lambda file: file.write(b"new"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "new"
    assert stat.S_IMODE((tmp_path / "real").stat().st_mode) == 0o640
    (tmp_path / "plain").write_text("")
    files.write_atomically(tmp_path / "fresh", lambda file: file.write(b"new"))
    assert (tmp_path / "fresh").stat().st_mode == (tmp_path / "plain").stat().st_mode
