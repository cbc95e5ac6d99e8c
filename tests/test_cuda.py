"""The CUDA executor's Python half without a GPU: torch.cuda and the native launch are stood in for, the launch by the same
interpreter on host threads, so that memory, words, progress, cancelling and errors are those of a run. With a GPU:
tests/gpu."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastgen import Sampler
from fastgen import planned as planned_module
from fastgen.backends import cuda, team
from fastgen.errors import Cancelled, FastgenError, UnsupportedError
from fastgen.native import native
from fastgen.placement import copied, on_cpu
from tests.cases import Case
from tests.conftest import Compiled
from tests.oracle import at_length, by_name

IMAGE, AUDIO = by_name("unet-pixelcnnpp")[0], at_length(by_name("wavenet-onehot")[0], 96)
H200 = dict(name="stand-in", major=9, minor=0, multiprocessors=132, shared_bytes=232448, memory=1 << 37)


class Stream:
    """Streams as torch hands them out: by priority, in turn."""

    made = 0

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        Stream.made += 1
        self.cuda_stream = 100 * -priority + 10 + Stream.made % 3
        self.waited_for: list[int] = []

    def wait_stream(self, other: Any) -> None:
        self.waited_for.append(other.cuda_stream)


class StandIn:
    """fastgen._native of a machine with an H200; its launches run on host threads, four CTAs a team."""

    has_cuda = True

    def __init__(self) -> None:
        self.real = native()
        self.limits = dict(ctas=132, clusters16=8, clusters8=16, cooperative=True)
        self.launches: list[dict[str, Any]] = []
        self.fail: Exception | None = None
        self.capturing: list[int] = []  # streams
        self.asked: list[str] = []

    def __getattr__(self, name: str) -> Any:
        self.asked.append(name)
        return getattr(self.real, name)

    def is_capturing(self, index: int | None, stream: int) -> bool:
        return stream in self.capturing

    def cuda_device(self, index: int) -> dict[str, Any]:
        if index > 0:
            raise self.real.CudaError(f"cuda:{index}: this machine has 1 CUDA devices")
        return H200

    def cuda_limits(self, index: int, precision: str, shared_bytes: int) -> dict[str, Any]:
        return self.limits

    def run_on_device(
        self, launch: dict[str, Any], index: int, stream: int, side: int, rung: dict[str, Any], precision: str,
        shared_bytes: int, callback: Callable[[int], bool] | None,
    ) -> int:  # fmt: skip
        assert stream != side and launch["teams"] == rung["teams"] <= launch["slots"]
        assert shared_bytes == H200["shared_bytes"]
        self.launches.append({**launch, "rung": rung["text"], "stream": stream})
        if self.fail is not None:
            raise self.fail
        self.real.run_on_host(launch, 4, 1)
        words = (ctypes.c_uint32 * (16 * rung["teams"])).from_address(launch["control"])
        done = min(words[::16])
        if callback is not None and callback(done // 2) is False:
            return done // 2
        if callback is not None:
            callback(done)
        return done


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A machine with a GPU, as far as Python can tell."""
    stand_in = StandIn()
    for module in (cuda, team):
        monkeypatch.setattr(module, "native", lambda: stand_in)
    zeros = torch.zeros
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "zeros", lambda *a, pin_memory=False, **k: zeros(*a, **k))
    current = threading.local()

    @contextlib.contextmanager
    def inside(stream: Stream) -> Iterator[None]:
        current.stream = stream
        yield
        del current.stream

    default = SimpleNamespace(cuda_stream=0)
    for name, value in {
        "is_available": lambda: True, "current_device": lambda: 0, "Stream": Stream,
        "current_stream": lambda device=None: getattr(current, "stream", default), "stream": inside,
        "mem_get_info": lambda device=None: (1 << 30, 1 << 30), "memory_reserved": lambda device=None: 0,
        "memory_allocated": lambda device=None: 0,
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    return stand_in


def on_stand_in(sampler: Sampler, wanted: str = "auto") -> cuda.CudaExecutor:
    """The CUDA executor with its tensors in host memory."""
    conditioning = sampler.conditioning
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "cuda_device", lambda device: (torch.device("cpu"), H200))
        return cuda.CudaExecutor(sampler.programs, conditioning, torch.float32, torch.device("cuda"), wanted)


@pytest.fixture
def samplers(machine: StandIn, compiled: Compiled) -> Callable[[Case], Sampler]:
    """A sampler of a case whose executor is the CUDA one on the stand-in."""

    def make(case: Case) -> Sampler:
        sampler = compiled(case)
        return sampler.with_executor(on_stand_in(sampler))

    return make


@pytest.mark.parametrize("case", [IMAGE, AUDIO], ids=str)
def test_sampling_and_verifying(case: Case, samplers: Any, compiled: Compiled, machine: StandIn) -> None:
    sampler = samplers(case)
    assert sampler.verify(3).ok
    assert machine.launches[-1]["rung"] == "3 clusters of 16 CTAs" and machine.launches[-1]["slots"] == 3
    drawn = sampler.sample(20, seed=4)
    theirs = compiled(case).sample(20, seed=4)
    assert float(((drawn - theirs).abs() < 1e-4).float().mean()) > 0.99
    assert torch.equal(sampler.sample(2, seed=4, first=5), drawn[5:7])


def test_more_samples_than_memory_holds(samplers: Any, machine: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = samplers(IMAGE)
    whole = sampler.sample(7, seed=1)
    each = 4 * sampler.executor.lowered(None).arena
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (int(3.5 * each / cuda.MEMORY_SHARE), 0))
    machine.launches.clear()
    assert torch.equal(sampler.sample(7, seed=1), whole)
    assert [launch["slots"] for launch in machine.launches] == [3, 3, 1]
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (each // 2, 0))
    with pytest.raises(FastgenError, match=r"one sample needs \d+ bytes of state"):
        sampler.sample(7)


def test_progress_and_cancelling(samplers: Any) -> None:
    sampler = samplers(IMAGE)
    seen: list[tuple[int, int]] = []
    sampler.sample(2, callback=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] == 2 * sampler.spec.steps and len(seen) == 2
    with pytest.raises(Cancelled):
        sampler.sample(2, callback=lambda done, total: False)
    with pytest.raises(Cancelled):  # at the last step too, as on the CPU
        sampler.sample(2, callback=lambda done, total: done < total)


@pytest.mark.parametrize("case", [IMAGE, AUDIO], ids=str)
def test_streaming(case: Case, samplers: Any, machine: StandIn) -> None:
    sampler = samplers(case)
    axis = 2 if case is IMAGE else -1
    assert torch.equal(torch.cat(list(sampler.stream(2, seed=3)), axis), sampler.sample(2, seed=3))
    streamed, sampled = machine.launches
    assert sampled["stream"] == 0 != streamed["stream"]  # whoever reads the stream goes on using the default one


def test_known_values(samplers: Any, compiled: Compiled) -> None:
    given = compiled(IMAGE).sample(2, seed=8)
    mask = torch.zeros(given.shape, dtype=torch.bool)
    mask[..., :3, :] = True
    drawn: Tensor = samplers(IMAGE).sample(2, seed=1, given=given, mask=mask)
    assert torch.equal(drawn[mask], given[mask])


def test_errors_of_the_device_name_it(samplers: Any, machine: StandIn) -> None:
    sampler = samplers(IMAGE)
    for error in (
        machine.real.CudaError("launch of 1 CTA: cudaErrorX"),
        machine.real.LostPartner("team 0, CTA 3: op 5"),
    ):
        machine.fail = error
        with pytest.raises(FastgenError, match=str(error).split(":")[0]):
            sampler.sample(1)


def test_a_capture_is_refused_before_anything_is_touched(
    samplers: Any, machine: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither memory nor weights nor the device, and the captured graph stays whole; afterwards all goes on."""
    sampler = samplers(IMAGE)
    request = sampler.planned.request(2, 0, None, 1.0, None, None, 0, None)
    machine.capturing = [0]
    machine.asked.clear()
    with monkeypatch.context() as nothing:
        for module, name in (
            (planned_module.Fingerprint, "changed"),
            (torch, "zeros"),
            (torch, "empty"),
            (torch.cuda, "mem_get_info"),
        ):
            nothing.setattr(module, name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
        for use in (
            lambda: sampler.sample(2), lambda: sampler.stream(2), lambda: sampler.verify(2),
            lambda: sampler.executor.run(request), lambda: cuda.cuda_device(torch.device("cuda")),
        ):  # fmt: skip
            with pytest.raises(FastgenError, match="current stream is being captured into a CUDA graph.*sample before"):
                use()
    assert set(machine.asked) <= {"CudaError"} and not machine.launches
    machine.capturing = [77]  # another stream than this thread's
    assert sampler.sample(2).shape == (2, *IMAGE.shape) and machine.launches


def test_what_a_lost_kernel_writes_to_stays(samplers: Any, machine: StandIn) -> None:
    sampler = samplers(IMAGE)
    machine.fail = machine.real.NeverEnded("1 cluster of 16 CTAs: no step was finished in 60 s")
    with pytest.raises(FastgenError, match=r"no step was finished.*this process can use the device no more"):
        list(sampler.stream(1))
    try:
        kept = {t.data_ptr() for t in cuda._lost}
        assert {machine.launches[-1][name] for name in ("control", "out")} <= kept
    finally:
        cuda._lost.clear()


def test_a_rung_that_the_device_lacks(compiled: Compiled, machine: StandIn) -> None:
    machine.limits["clusters16"] = 0
    assert on_stand_in(compiled(IMAGE)).rung(1)["text"] == "1 cluster of 8 CTAs"
    with pytest.raises(ValueError, match="cannot hold such a team"):
        on_stand_in(compiled(IMAGE), wanted="cluster16")


def test_devices(machine: StandIn) -> None:
    assert cuda.cuda_device(torch.device("cuda"))[0] == torch.device("cuda", 0)
    with pytest.raises(UnsupportedError, match=r"device='cuda:1'.*this machine has 1"):
        cuda.cuda_device(torch.device("cuda:1"))


def test_a_copy_on_the_cpu() -> None:
    """Of a module whose attributes have a history (weight norm by hooks) or are tensors by themselves."""

    class Masked(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.utils.weight_norm(torch.nn.Conv2d(1, 3, 3, padding=1))
            self.mask = torch.ones(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.conv(x)
            return out * self.mask.sum()

    model, x = Masked(), torch.randn(2, 1, 4, 4)
    before = model(x)  # leaves a weight with a history
    other = copied(model)
    assert torch.equal(other(x), before)
    assert other.mask is not model.mask and other.conv.weight_g is not model.conv.weight_g
    assert on_cpu(model) is model
