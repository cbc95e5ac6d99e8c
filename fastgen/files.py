"""Files of samples: PNG grids, 16-bit WAV, .npy and .safetensors out; PNG, WAV, .npy and .safetensors in.

An output file appears complete or not at all: it is written beside its place under another name and renamed.
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import stat
import wave
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as save_tensors
from torch import Tensor

from fastgen import media
from fastgen.errors import OutputError
from fastgen.spec import Spec

IMAGE_FORMATS = (".png", ".npy", ".safetensors")
AUDIO_FORMATS = (".wav", ".npy", ".safetensors")
MASKS = ("top", "bottom", "left", "right")

_PCM = 32767.0  # full scale of 16-bit audio, the same on either side of zero
_SILENCE = 0.25  # seconds between the samples of a WAV file
_GAP = 2  # pixels between the samples of a grid
_PAPER = 255  # their grey
_SEEN = 64  # pixels: smaller images are enlarged up to this


# ---- writing -----------------------------------------------------------------------------------------------
def check_output(path: str | Path) -> Path:
    """The place that a file at `path` goes to, links followed. Raises OutputError if it cannot be written."""
    try:
        target = Path(os.path.realpath(path))
        if target.is_dir():
            raise OutputError(f"cannot write {path}: it is a directory")
        if target.exists() and not target.is_file():
            raise OutputError(f"cannot write {path}: it is not a regular file")
        if target.exists() and not os.access(target, os.W_OK):
            raise OutputError(f"cannot write {path}: the file there is read-only")
        if not target.parent.is_dir():
            raise OutputError(f"cannot write {path}: {target.parent} is not a directory")
        handle, temporary = _temporary(target)
        os.close(handle)
        temporary.unlink()
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    return target


def write_atomically(path: str | Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `write` fill a file beside `path`, then move it there. OutputError: nothing is left behind."""
    target = check_output(path)
    temporary: Path | None = None
    try:
        handle, temporary = _temporary(target)
        with os.fdopen(handle, "wb") as file:
            write(file)
        if target.exists():
            temporary.chmod(stat.S_IMODE(target.stat().st_mode))
        os.replace(temporary, target)
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _temporary(target: Path) -> tuple[int, Path]:
    """A new file beside `target`, with the rights that an ordinary new file has."""
    path = target.parent / f".fastgen-{secrets.token_hex(8)}"
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), path


def write_png_grid(images: Tensor, path: str | Path, columns: int | None = None, upscale: int | None = None) -> None:
    """Write images, uint8 [n, C, H, W] with C 1 (grey) or 3 (RGB), as one PNG, row by row, 2 pixels apart.

    columns: images in a row; by default as many as make a square. upscale: side of the square that a pixel
    becomes; by default as large as leaves images within 64 pixels. Raises ValueError, TypeError, OutputError.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"images are {images.dtype}; expected torch.uint8")
    if images.dim() != 4 or images.shape[1] not in (1, 3) or not images.numel():
        raise ValueError(f"images have shape {list(images.shape)}; expected [n, 1 or 3, H, W], none of them 0")
    n, channels, rows, cols = images.shape
    columns = columns or math.ceil(math.sqrt(n))
    upscale = upscale or max(1, _SEEN // max(rows, cols))
    if columns < 1 or upscale < 1:
        raise ValueError(f"columns={columns}, upscale={upscale}: expected numbers >= 1")
    columns = min(columns, n)
    high, wide = rows * upscale, cols * upscale
    lines = -(-n // columns)
    page = np.full((lines * (high + _GAP) - _GAP, columns * (wide + _GAP) - _GAP, channels), _PAPER, np.uint8)
    large = images.permute(0, 2, 3, 1).cpu().numpy().repeat(upscale, 1).repeat(upscale, 2)
    for k, image in enumerate(large):
        y, x = (k // columns) * (high + _GAP), (k % columns) * (wide + _GAP)
        page[y : y + high, x : x + wide] = image
    picture = Image.fromarray(page[:, :, 0] if channels == 1 else page)
    write_atomically(path, lambda file: picture.save(file, format="PNG"))


def write_wav(samples: Tensor, path: str | Path, rate: int) -> None:
    """Write audio, float [T] or [n, T] in [-1, 1], as one mono 16-bit WAV of `rate` samples per second.

    Several samples follow each other with a quarter of a second of silence between. What lies outside [-1, 1]
    is clipped. Raises ValueError, OutputError.
    """
    if samples.dim() not in (1, 2) or not samples.numel() or not samples.is_floating_point():
        raise ValueError(f"audio is {samples.dtype} {list(samples.shape)}; expected floats [n, T]")
    if not 1 <= rate < 1 << 31:  # bytes per second are written in 32 bits
        raise ValueError(f"rate={rate}: expected samples per second, from 1 to {(1 << 31) - 1}")
    if not bool(samples.isfinite().all()):
        raise ValueError("audio holds values that are not finite")
    signal = samples.detach().cpu().double().reshape(-1, samples.shape[-1])
    pcm = (signal.clamp(-1.0, 1.0) * _PCM).round().to(torch.int16).numpy()
    gap = np.zeros(int(_SILENCE * rate), np.int16)
    parts = [part for row in pcm for part in (gap, row)][1:]
    data = np.concatenate(parts).astype("<i2").tobytes()

    def write(file: BinaryIO) -> None:
        with wave.open(file, "wb") as out:
            out.setnchannels(1)
            out.setsampwidth(2)
            out.setframerate(rate)
            out.writeframes(data)

    write_atomically(path, write)


def write_samples(
    samples: Tensor,
    spec: Spec,
    path: str | Path,
    rate: int,
    columns: int | None = None,
    upscale: int | None = None,
) -> None:
    """Write what `sample()` returned in the format of the name's ending; .npy and .safetensors as it is.

    rate: samples per second of a WAV. columns, upscale: see `write_png_grid`. Raises ValueError, OutputError.
    """
    ending = check_format(path, spec)
    if ending == ".png":
        write_png_grid(media.to_pixels(samples, spec), path, columns, upscale)
    elif ending == ".wav":
        write_wav(media.to_audio(samples, spec), path, rate)
    elif ending == ".npy":
        write_atomically(path, lambda file: np.save(file, samples.numpy()))
    else:
        write_atomically(path, lambda file: file.write(save_tensors({"samples": samples.contiguous()})))


def check_format(path: str | Path, spec: Spec) -> str:
    """The ending of an output file's name. Raises ValueError if samples of `spec` have no such format."""
    formats = AUDIO_FORMATS if spec.sequence else IMAGE_FORMATS
    ending = Path(path).suffix.lower()
    if ending not in formats:
        kind = "audio" if spec.sequence else "images"
        raise ValueError(f"output {path}: these samples are {kind}; expected a name in {', '.join(formats)}")
    return ending


# ---- reading -----------------------------------------------------------------------------------------------
def read_known(path: str | Path, spec: Spec, rate: int, where: str | None = None) -> tuple[Tensor, Tensor]:
    """What `Sampler.sample` takes as given and mask, [m, ...] each, from a file.

    Images: a PNG of one image, or a tensor as sample() returns it; `where` names the half that is kept, one
    of `MASKS` (default top). Audio: a WAV or a tensor, all of which is kept, in front of what is drawn.
    Raises ValueError, ShapeError, OSError.
    """
    known = _read(path, spec, rate)  # [m, sites, channels]
    rows, cols = spec.grid
    keep = torch.zeros(rows, cols, dtype=torch.bool)
    if spec.sequence:
        if where is not None:
            raise ValueError(f"mask {where!r}: audio is continued where the given file ends; masks are for images")
        if known.shape[1] > cols:
            raise ValueError(f"{path}: {known.shape[1]} audio samples given; expected at most the length, {cols}")
        keep[:, : known.shape[1]] = True
        known = torch.nn.functional.pad(known, (0, 0, 0, cols - known.shape[1]))
    else:
        half = {
            "top": keep[: rows // 2], "bottom": keep[rows // 2 :],
            "left": keep[:, : cols // 2], "right": keep[:, cols // 2 :],
        }  # fmt: skip
        if (where or "top") not in half:
            raise ValueError(f"mask {where!r}: expected one of {', '.join(MASKS)}")
        half[where or "top"][:] = True
    mask = keep.reshape(1, -1, 1).expand(known.shape)
    return spec.result(known), spec.result(mask.float()) != 0


def _read(path: str | Path, spec: Spec, rate: int) -> Tensor:
    """Values [m, sites, channels] of a file."""
    ending = Path(path).suffix.lower()
    allowed = AUDIO_FORMATS if spec.sequence else IMAGE_FORMATS
    if ending not in allowed:
        raise ValueError(f"given file {path}: expected one of {', '.join(allowed)}")
    if ending == ".png":
        return media.from_pixels(_read_png(path, spec), spec)
    if ending == ".wav":
        return media.from_audio(read_wav(path, rate), spec)
    x = _read_tensor(path, ending)
    like = spec.result(torch.zeros(1, math.prod(spec.grid), spec.channels))
    x = x[None] if x.dim() == like.dim() - 1 else x
    if x.dim() != like.dim() or not x.numel():
        raise ValueError(f"{path}: shape {list(x.shape)}; expected [m, {', '.join(map(str, like.shape[1:]))}]")
    values = spec.as_long_as(x).values(x)
    fault = spec.head.fault_of(values)
    if fault:
        raise ValueError(f"{path}: holds {fault}; expected samples as sample() returns them")
    return values


def _read_tensor(path: str | Path, ending: str) -> Tensor:
    if ending == ".npy":
        try:
            return torch.from_numpy(np.load(path, allow_pickle=False))
        except (ValueError, TypeError, EOFError) as error:
            raise ValueError(f"{path}: {error}") from error
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: {error}") from error
    if "samples" not in tensors:
        raise ValueError(f"{path}: holds {', '.join(sorted(tensors)) or 'no tensor'}; expected a tensor 'samples'")
    return tensors["samples"]


def _read_png(path: str | Path, spec: Spec) -> Tensor:
    """uint8 [C, H, W]; the picture must have the size of one sample."""
    with Image.open(path) as picture:
        if picture.size != spec.grid[::-1]:
            raise ValueError(
                f"{path}: {picture.size[0]} x {picture.size[1]} pixels; expected one image of "
                f"{spec.grid[1]} x {spec.grid[0]}"
            )
        if picture.mode.startswith("I;16"):  # convert() would cut it off at 255
            grey = np.rint(np.array(picture, dtype=np.float64) / 257).astype(np.uint8)
            pixels = grey if spec.channels == 1 else np.stack([grey] * 3, -1)
        elif picture.mode in ("I", "F"):
            raise ValueError(f"{path}: pixels of mode {picture.mode}; expected 1, 8 or 16 bits a colour")
        else:
            pixels = np.array(picture.convert("L" if spec.channels == 1 else "RGB"))
    return torch.from_numpy(pixels.reshape(*spec.grid, -1)).permute(2, 0, 1)


def read_wav(path: str | Path, rate: int) -> Tensor:
    """A 16-bit WAV of `rate` samples per second as float32 [T] in [-1, 1], channels averaged. ValueError."""
    try:
        with wave.open(str(path), "rb") as file:
            width, channels, given = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(file.getnframes())
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: not a WAV file ({error})") from error
    if width != 2 or given != rate:
        raise ValueError(f"{path}: {8 * width}-bit at {given} Hz; expected 16-bit at {rate} Hz")
    pcm = np.frombuffer(frames[: len(frames) // (2 * channels) * (2 * channels)], "<i2")
    return torch.from_numpy((pcm.reshape(-1, channels).mean(1) / _PCM).clip(-1, 1).astype(np.float32))
