"""Training with the fused layers: the same losses, gradients and samples as plain torch, and in every way of training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen.models import ReferenceModel, build
from fastgen.nn.choice import Deciding
from fastgen.ops import KernelChoice
from fastgen.pretrained import from_pretrained, save_pretrained
from fastgen.train import bits_per_dim
from tests import ddp_steps

ROOT = Path(__file__).parent.parent
MODELS: dict[str, dict[str, Any]] = {
    "pixelcnnpp": dict(
        model="pixelcnnpp", nr_resnet=1, nr_filters=6, nr_mix=2, shape=[3, 8, 8], classes=3, dropout=0.2
    ),
    "gated-pixelcnn": dict(
        model="gated-pixelcnn", levels=4, dim=6, layers=3, classes=3, cond_channels=2, shape=[8, 8], hidden=8
    ),
    "wavenet": dict(
        model="wavenet", layers=4, stacks=2, residual=6, gate=8, skip=6, mixtures=2, local_channels=3,
        upsample_scales=[2, 4], global_channels=4, speakers=3, length=32,
    ),
    "wavenet-softmax": dict(
        model="wavenet", layers=4, stacks=1, residual=6, gate=8, skip=6, kernel_size=2, output="softmax", classes=8,
        length=32,
    ),
}  # fmt: skip


def made(name: str, fused: bool) -> ReferenceModel:
    """The same weights either way; fused: every layer with a kernel runs its op, as on a GPU."""
    torch.manual_seed(2)
    model = build(MODELS[name])
    return to_ops(model) if fused else model


def to_ops(model: ReferenceModel) -> ReferenceModel:
    changed = 0
    for m in model.modules():
        if isinstance(m, Deciding) and "NVIDIA" in m._fastgen_kernel.reason:
            m._fastgen_kernel = KernelChoice("triton", "this test")
            changed += 1
    assert changed >= 4
    return model


def batch(model: ReferenceModel, step: int) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Data with some structure, other at every step."""
    g = torch.Generator().manual_seed(step)
    shape = (4, *model.sample_shape)
    cond = tuple(
        torch.randn(c.shape, generator=g) if c.is_floating_point() else torch.randint(0, 3, c.shape, generator=g)
        for c in model.example_cond(4)
    )
    if model.layout == "HW":
        return torch.randint(0, model.head.n // 2, shape, generator=g), cond
    if model.head.discrete:
        codes = torch.randint(0, model.head.n // 2, (4, shape[-1]), generator=g)
        return F.one_hot(codes, model.head.n).transpose(1, 2).float(), cond
    return (torch.randn(shape, generator=g) * 0.3).clamp(-1, 1), cond


@pytest.mark.parametrize("name", MODELS)
def test_fifty_steps_agree(name: str, tmp_path: Path) -> None:
    """Losses, gradients and weights, dropout included; then a checkpoint of either is sampled with the other."""
    models = [made(name, fused) for fused in (False, True)]
    optimisers = [torch.optim.SGD(m.parameters(), lr=0.02) for m in models]
    for step in range(50):
        losses, gradients = [], []
        for model, optimiser in zip(models, optimisers, strict=True):
            x, cond = batch(model, step)
            torch.manual_seed(step)
            loss = bits_per_dim(model, x, cond).mean()
            optimiser.zero_grad()
            loss.backward()
            gradients.append(
                [p.grad.clone() if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
            )
            optimiser.step()
            losses.append(loss.item())
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), step
        scale = max(float(g.abs().max()) for g in gradients[0])
        for a, b in zip(*gradients, strict=True):
            assert (a - b).abs().max() <= 1e-3 * scale, step
    assert losses[0] < 0.98 * bits_per_dim(made(name, False), *batch(models[0], 49)).mean().item()
    for trained, other in (models, models[::-1]):
        save_pretrained(trained, tmp_path / name)
        loaded = from_pretrained(tmp_path / name)
        other.load_state_dict(loaded.state_dict())
        x, cond = batch(trained, 50)
        with torch.no_grad():
            a, b = trained.eval()(x, *cond), other.eval()(x, *cond)
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * float(a.abs().max()))
        one = tuple(c[:1] for c in cond)
        sampler = fastgen.compile(loaded, cond=one)  # verifies that stepping equals forward
        assert sampler.sample(2, seed=3, cond=cond_of(one)).isfinite().all()


def cond_of(one: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The same conditioning for two samples."""
    return tuple(torch.cat((c, c)) for c in one)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("fused", [False, True])
def test_autocast_and_compiled(name: str, fused: bool) -> None:
    """bfloat16 autocast, and the whole model as one graph, give the likelihood of plain float32."""
    model = made(name, fused).eval()
    x, cond = batch(model, 0)
    expected = bits_per_dim(model, x, cond)
    with torch.autocast("cpu", torch.bfloat16):
        given = bits_per_dim(model, x, cond)
    given.mean().backward()
    assert given.dtype == torch.float32
    assert torch.allclose(given, expected, rtol=0.02, atol=0.02)
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.allclose(bits_per_dim(model, x, cond, compiled), expected, rtol=1e-5)


def test_data_parallel_equals_one_process(tmp_path: Path) -> None:
    """Two processes under torchrun with gloo, half the batch each, end with the weights of one with all of it."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "tests.ddp_steps", str(tmp_path / "two.pt")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    two = torch.load(tmp_path / "two.pt", weights_only=True)
    for key, found in two.items():
        config = ddp_steps.IMAGES if key.startswith("pixelcnnpp") else ddp_steps.AUDIO
        one = ddp_steps.steps(config, key.endswith("True"), 0, 1)
        assert found.keys() == one.keys()
        for name, value in one.items():
            assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), (key, name)


def test_a_training_step_through_the_kernels() -> None:
    """Whole models, forward and backward, by the Triton kernels in the interpreter, which a process must start with."""
    pytest.importorskip("triton", reason="Triton has packages for Linux alone")
    done = subprocess.run(
        [sys.executable, "-m", "tests.interpreted_models"], capture_output=True, text=True, cwd=ROOT, timeout=300,
        env=os.environ | {"TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[0] for line in lines] == ["pixelcnnpp", "gated-pixelcnn", "wavenet"]
    for name, loss, gradient in lines:
        assert float(loss) < 1e-5, name
        assert float(gradient) < 1e-5, name
