"""The promises of a call on the GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import fastgen
from fastgen.models.wavenet import WaveNet
from tests.gpu.checks import settle
from tests.gpu.promises import check_calls, check_full
from tests.oracle import by_name, compile_case

pytestmark = pytest.mark.gpu
SEQUENCE_SITES = 1 << 13  # of the sequence that is cancelled on the way: some tenths of a second
FULL_SITES = 1 << 12  # of one of which there are many


def model() -> WaveNet:
    torch.manual_seed(0)
    made = WaveNet(
        layers=8, stacks=2, residual=32, gate=64, skip=32, output="softmax", classes=64, length=SEQUENCE_SITES
    )
    return made.eval()


def test_calls(first: str, record_property: Callable[[str, object], None]) -> None:
    sequence = fastgen.compile(model(), device="cuda", dtype=torch.bfloat16, team=first)
    image = compile_case(by_name("unet-pixelcnnpp")[0], device="cuda", threads=None, team=first)
    settle(check_calls(sequence, image), record_property)


def test_a_full_device(record_property: Callable[[str, object], None]) -> None:
    """Single CTAs, two samples each: the rung that leaves no multiprocessor free."""
    alone = fastgen.compile(model(), (64, FULL_SITES), device="cuda", dtype=torch.bfloat16, team="cta", verify=False)
    settle(check_full(alone, 2 * torch.cuda.get_device_properties(0).multi_processor_count), record_property)
