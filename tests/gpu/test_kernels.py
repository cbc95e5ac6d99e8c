"""The Triton kernels on a GPU: values and gradients against float64, draws against the reference, and torch.compile.

The most wanted come first: a call on a GPU takes them in this order, as far as its time goes."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch

from bench.configs import DTYPES
from fastgen import ops
from tests.kernel_compare import (
    check_class_draws,
    check_layer,
    check_log_prob,
    check_mixture_draws,
    check_whole_graph,
    mixture_case,
)
from tests.kernel_shapes import LAYERS, Layer

pytestmark = pytest.mark.gpu
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
SOME = [LAYERS[1], LAYERS[-2], LAYERS[-1]]  # a convolution, a layer of a WaveNet, a product


@pytest.fixture(autouse=True)
def _exact_products() -> Iterator[None]:
    """No TF32, ours or torch's; and the kernels are Triton's, or nothing here says anything."""
    assert ops.kernel_for("cuda", torch.bfloat16).name == "triton"
    before = torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    yield
    torch.backends.cudnn.allow_tf32 = before[0]
    torch.set_float32_matmul_precision(before[1])


@every_layer
def test_layer(layer: Layer, record_property: Callable[[str, object], None]) -> None:
    record_property("errors", check_layer(layer, torch.bfloat16, "cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [256, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_log_prob(channels: int, levels: int | None, dtype: str) -> None:
    torch.manual_seed(0)
    for lead in ((2, 33), (4, 32, 32)):
        params, x = mixture_case(lead, channels, 10, levels, 2.0)
        check_log_prob(params.to("cuda", DTYPES[dtype]), x.cuda(), levels, -7.0)
        moved = params.to("cuda", DTYPES[dtype]).movedim(-1, 1).contiguous().movedim(1, -1)  # as a model returns them
        check_log_prob(moved, x.cuda(), levels, -7.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [256, None])
@pytest.mark.parametrize("channels", [1, 3])
def test_mixture_draws(channels: int, levels: int | None, dtype: str) -> None:
    torch.manual_seed(0)
    for lead in ((150,), (4, 300)):
        check_mixture_draws(lead, 10, channels, levels, DTYPES[dtype], "cuda")


@pytest.mark.parametrize("dtype", DTYPES)
def test_class_draws(dtype: str) -> None:
    torch.manual_seed(0)
    for classes, *lead in ((2, 70), (256, 3, 20), (1500, 9)):
        check_class_draws(lead, classes, DTYPES[dtype], "cuda")


@pytest.mark.parametrize("layer", SOME[:2], ids=lambda layer: layer.name)
def test_one_graph(layer: Layer) -> None:
    check_whole_graph(layer, "cuda")


@every_layer
def test_layer_of_contiguous_tensors(layer: Layer) -> None:
    check_layer(layer, torch.bfloat16, "cuda", channels_last=False)


@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "contiguous"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("layer", SOME, ids=lambda layer: layer.name)
def test_layer_in_other_dtypes(layer: Layer, dtype: str, channels_last: bool) -> None:
    check_layer(layer, DTYPES[dtype], "cuda", channels_last)


@pytest.mark.parametrize("channels_last", [True, False], ids=["last", "contiguous"])
def test_bytes_do_not_depend_on_the_batch(channels_last: bool) -> None:
    torch.manual_seed(0)
    form = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(5, 6, 9, 7, device="cuda").contiguous(memory_format=form)
    weight = torch.randn(8, 12, 2, 3, device="cuda")
    whole = ops.gated_conv2d(x, weight, residual=x[:, :4].contiguous(memory_format=form), pads=(1, 1, 1, 0), elu=True)
    for i in range(5):
        alone = x[i : i + 1].contiguous(memory_format=form)
        again = ops.gated_conv2d(
            alone, weight, residual=alone[:, :4].contiguous(memory_format=form), pads=(1, 1, 1, 0), elu=True
        )
        assert torch.equal(again[0], whole[i])
