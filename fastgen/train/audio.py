"""Speech that a Debian system has: the spoken prompts of alsa-utils, or sentences spoken by espeak-ng."""

import io
import shutil
import subprocess
import wave
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

PROMPTS = Path("/usr/share/sounds/alsa")
_SENTENCES = (
    "front left",
    "front centre",
    "front right",
    "rear left",
    "rear centre",
    "rear right",
    "side left",
)
_PEAK = 0.9


def speech(rate: int, prompts: Path = PROMPTS) -> list[Tensor]:
    """Mono utterances at `rate` samples per second, float32 [T] with peak 0.9, always in the same order.

    The wave files under `prompts` (noise excepted) if there are any, else espeak-ng's voice. Raises
    FileNotFoundError naming what to install if there is neither.
    """
    files = sorted(f for f in prompts.glob("*.wav") if f.stem != "Noise")
    if files:
        return [read_wave(f.read_bytes(), rate, str(f)) for f in files]
    if shutil.which("espeak-ng"):
        return [synthesise(text, rate) for text in _SENTENCES]
    raise FileNotFoundError(
        f"no speech to train on: {prompts} holds no wave files and espeak-ng is not installed; "
        "install the Debian package alsa-utils or espeak-ng"
    )


def synthesise(text: str, rate: int, voice: str = "en") -> Tensor:
    """`text` spoken by espeak-ng, float32 [T] at `rate`. Raises FileNotFoundError or CalledProcessError."""
    done = subprocess.run(["espeak-ng", "-v", voice, "--stdout", text], check=True, capture_output=True)
    return read_wave(done.stdout, rate, f"espeak-ng {text!r}")


def read_wave(data: bytes, rate: int, name: str) -> Tensor:
    """A 16-bit wave file as mono float32 [T] with peak 0.9, resampled to `rate`. ValueError names `name`."""
    from scipy.signal import resample_poly  # type: ignore[import-untyped,unused-ignore]

    try:
        with wave.open(io.BytesIO(data)) as file:
            width, channels, source = file.getsampwidth(), file.getnchannels(), file.getframerate()
            frames = file.readframes(2**30)  # a file written to a pipe does not know its length
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{name}: not a wave file ({error})") from error
    if width != 2:
        raise ValueError(f"{name}: {8 * width}-bit samples, expected 16-bit")
    signal = np.frombuffer(frames, dtype="<i2").reshape(-1, channels).mean(axis=1) / 32768.0
    common = int(np.gcd(rate, source))
    signal = resample_poly(signal, rate // common, source // common)
    peak = float(np.abs(signal).max(initial=0.0))
    if peak == 0.0:
        raise ValueError(f"{name}: silent")
    return torch.from_numpy((signal * (_PEAK / peak)).astype(np.float32))
