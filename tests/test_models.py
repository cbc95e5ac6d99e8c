"""Reference models: sizes, causality, receptive fields, conditioning, and weights of the PyTorch port."""

import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import fastgen
from fastgen.errors import CheckpointError, ShapeError
from fastgen.models import (
    CONFIGS,
    GatedPixelCNN,
    PixelCNNpp,
    ReferenceModel,
    WaveNet,
    build,
    convert_pclucas14,
)

PARAMETERS = {  # in millions, as published or counted by hand from the papers' layer sizes
    "pixelcnnpp-cifar": 53.66,
    "pixelcnnpp-mnist": 3.37,
    "gated-pixelcnn-64": 1.69,
    "wavenet-nv": 0.71,
    "wavenet-nv-large": 2.50,
    "wavenet-mol": 3.67,
}


def tiny(name: str, **changes: Any) -> ReferenceModel:
    """A small model with weights spread enough that every path matters, in eval mode."""
    pixels = dict(model="pixelcnnpp", nr_resnet=1, nr_filters=6, nr_mix=2)
    indices = dict(model="gated-pixelcnn", levels=5, dim=6, layers=4, first_kernel=5, hidden=8)
    audio = dict(model="wavenet", layers=6, stacks=2, residual=6, gate=8, skip=6, length=64)
    options: dict[str, dict[str, Any]] = {
        "pixelcnnpp": dict(pixels, shape=[3, 8, 8]),
        "pixelcnnpp-labelled": dict(pixels, shape=[1, 8, 8], classes=3),
        "gated": dict(indices, classes=3, cond_channels=2, shape=[9, 9]),
        "wavenet-mol": dict(audio, mixtures=2, local_channels=3, upsample_scales=[2, 4], global_channels=4, speakers=3),
        "wavenet-softmax": dict(audio, kernel_size=2, input_kernel=2, output="softmax", classes=7, scaled=False),
    }
    torch.manual_seed(1)
    model = build(options[name] | changes)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval()


NAMES = ["pixelcnnpp", "pixelcnnpp-labelled", "gated", "wavenet-mol", "wavenet-softmax"]


def example(model: ReferenceModel, batch: int = 2) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Random input and conditioning of the right kinds."""
    shape = (batch, *model.sample_shape)
    if model.layout == "HW":
        x = torch.randint(0, model.head.n, shape)
    elif model.head.discrete:
        x = F.one_hot(torch.randint(0, model.head.n, (batch, shape[-1])), model.head.n).transpose(1, 2).float()
    else:
        x = torch.rand(shape) * 2.0 - 1.0
    cond = model.example_cond(batch)
    return x, tuple(torch.randn_like(c) if c.is_floating_point() else c + 1 for c in cond)


@pytest.mark.parametrize("name", PARAMETERS)
def test_named_configurations_have_the_published_sizes(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(PARAMETERS[name], abs=0.005)


@pytest.mark.parametrize("name", CONFIGS)
def test_config_makes_the_same_model_again(name: str) -> None:
    with torch.device("meta"):
        model = build(name)
        again = build(json.loads(json.dumps(model.config)))
    assert again.config == model.config
    assert again.sample_shape == model.sample_shape
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}


@pytest.mark.parametrize("name", NAMES)
def test_parameters_fit_the_head(name: str) -> None:
    model = tiny(name)
    x, cond = example(model)
    sites = tuple(x.shape[1:]) if model.layout == "HW" else tuple(x.shape[2:])
    channels = 1 if model.head.discrete else x.shape[1]
    params = model.head.parameters_of(model(x, *cond), channels, sites)
    assert params.shape == (2, *sites, 1, model.head.num_params(channels))


@pytest.mark.parametrize("name", NAMES)
def test_causal_and_without_blind_spot(name: str) -> None:
    """Parameters of a site depend on every earlier site within reach, and on no other."""
    model = tiny(name)
    x, cond = example(model, 1)
    for site in (0, 13, 38) if x.dim() < 4 and model.layout == "CT" else (0, 1, 12, 13, 30, 36):
        seen = _seen(model, x, cond, site)
        last = site if model.predicts == "next" else site - 1
        assert not seen[last + 1 :].any(), f"site {site} reads {seen.nonzero().flatten().tolist()}"
        if model.layout == "CT":
            assert isinstance(model, WaveNet)
            reach = min(site + 1, model.receptive_field)
            assert seen[site + 1 - reach : site + 1].all()
            assert not seen[: site + 1 - reach].any()
        elif model.layout == "CHW":
            assert seen[: last + 1].all()  # three resolutions see the whole 8x8 image
        else:
            _check_window(seen, site)


def _seen(model: ReferenceModel, x: Tensor, cond: tuple[Tensor, ...], site: int) -> Tensor:
    """Which sites (raster order) the parameters at a site depend on, by changing one at a time: bool."""
    sites = x[0].numel() if model.layout == "HW" else x[0, 0].numel()
    flat = x.reshape(-1) if model.layout == "HW" else x.reshape(x.shape[1], -1)
    batch = flat.expand(sites, *flat.shape).clone()
    for s in range(sites):
        batch[s, ..., s] = (flat[..., s] + 1) % model.head.n if model.layout == "HW" else -flat[..., s] + 0.3
    many = tuple(c.expand(sites, *c.shape[1:]) for c in cond)
    with torch.no_grad():
        reference = model.double()(*_doubles(x, cond)).flatten(2)[0, :, site]
        outputs = model(*_doubles(batch.reshape(sites, *x.shape[1:]), many)).flatten(2)[:, :, site]
    different: Tensor = (outputs != reference).any(dim=1)
    return different


def _doubles(x: Tensor, cond: tuple[Tensor, ...]) -> list[Tensor]:
    return [t.double() if t.is_floating_point() else t for t in (x, *cond)]


def _check_window(seen: Tensor, site: int, width: int = 9, reach: int = 2 + 3) -> None:
    """Gated PixelCNN of kernel 5 then three of 3: five columns to either side, five rows above."""
    row, col = divmod(site, width)
    for other in range(site):
        r, c = divmod(other, width)
        near = row - r <= reach and abs(col - c) <= reach
        assert bool(seen[other]) == near, f"site {(row, col)} and {(r, c)}"


@pytest.mark.parametrize("name", NAMES)
def test_stepping_equals_forward(name: str) -> None:
    model = tiny(name)
    _, cond = example(model, 1)
    report = fastgen.compile(model, cond=cond, verify=False).verify()
    assert report.ok, report


@pytest.mark.parametrize("name", ["pixelcnnpp-labelled", "gated", "wavenet-mol"])
def test_every_conditioning_input_matters(name: str) -> None:
    model = tiny(name)
    x, cond = example(model)
    base = model(x, *cond)
    for i, c in enumerate(cond):
        changed = [*cond]
        changed[i] = c + 1.0 if c.is_floating_point() else c - 1
        assert (model(x, *changed) - base).abs().max() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_wrong_inputs_are_named(name: str) -> None:
    model = tiny(name)
    x, cond = example(model)
    with pytest.raises(ShapeError, match=rf"{type(model).__name__}: x is .*expected"):
        model(x[0], *cond)
    with pytest.raises(ShapeError, match=r"conditioning given: .*expected"):
        model(x, *cond, torch.zeros(2))
    if cond:
        with pytest.raises(ShapeError, match=r"given: none; expected: (label|local)"):
            model(x)


def test_impossible_configurations_are_refused() -> None:
    with pytest.raises(ShapeError, match="divisible by 4"):
        PixelCNNpp(shape=(3, 30, 32))
    with pytest.raises(ValueError, match="stacks=4"):
        WaveNet(layers=10, stacks=4)
    with pytest.raises(ValueError, match="output='gauss'"):
        WaveNet(output="gauss")
    with pytest.raises(ValueError, match="speakers=0"):
        WaveNet(global_channels=8)
    with pytest.raises(ValueError, match=r"unknown model 'pixelcnn'.*pixelcnnpp-cifar"):
        build("pixelcnn")
    with pytest.raises(ValueError, match="no option filters"):
        build({"model": "pixelcnnpp", "filters": 3})


def test_wavenet_takes_any_length() -> None:
    model = tiny("wavenet-mol")
    x, (local, speaker) = example(model)
    with torch.no_grad():
        whole = model(x, local, speaker)
        part = model(x[:, :, :13], local[:, :, :2], speaker)
    # The smoothing of local features reads a frame ahead, so the last frame differs.
    assert torch.allclose(part[:, :, :4], whole[:, :, :4], atol=1e-6)


def test_masks_are_applied_without_touching_weights() -> None:
    model = tiny("gated")
    assert isinstance(model, GatedPixelCNN)
    x, cond = example(model)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model(x, *cond).sum().backward()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    first = model.layers[0].vertical
    assert first.weight[:, :, -1].abs().min() > 0  # type: ignore[union-attr,index]
    assert first.weight.grad[:, :, -1].abs().max() == 0  # type: ignore[union-attr,index]


# ---- trained weights of pclucas14/pixel-cnn-pp ----
# Its layers as facts: names of parameters, and what is computed with them, restated here as one function of
# the state_dict, so that the mapping is checked against something other than our module.


def port_state(resnets: int, dim: int, mixtures: int, colours: int) -> dict[str, Tensor]:
    """Random tensors under the port's names, old weight-norm spelling."""
    g = torch.Generator().manual_seed(5)
    state: dict[str, Tensor] = {}

    def add(name: str, *shape: int, outputs: int | None = None) -> None:
        state[f"{name}.bias"] = torch.randn(outputs or shape[0], generator=g) * 0.3
        state[f"{name}.weight_g"] = torch.rand(shape[0], *[1] * (len(shape) - 1), generator=g) + 0.5
        state[f"{name}.weight_v"] = torch.randn(shape, generator=g)

    add("u_init.conv", dim, colours + 1, 2, 3)
    add("ul_init.0.conv", dim, colours + 1, 1, 3)
    add("ul_init.1.conv", dim, colours + 1, 2, 1)
    for i in range(3):
        for way, blocks in (("up", resnets), ("down", resnets + (i > 0))):
            for j in range(blocks):
                for stream, width, skip in (("u", 3, way == "down"), ("ul", 2, 1 + (way == "down"))):
                    stem = f"{way}_layers.{i}.{stream}_stream.{j}"
                    add(f"{stem}.conv_input.conv", dim, 2 * dim, 2, width)
                    add(f"{stem}.conv_out.conv", 2 * dim, 2 * dim, 2, width)
                    if skip:
                        add(f"{stem}.nin_skip.lin_a", dim, 2 * int(skip) * dim)
        if i < 2:
            for stream, width in (("u", 3), ("ul", 2)):
                add(f"downsize_{stream}_stream.{i}.conv", dim, dim, 2, width)
                add(f"upsize_{stream}_stream.{i}.deconv", dim, dim, 2, width)
    add("nin_out.lin_a", (10 if colours == 3 else 3) * mixtures, dim)
    return state


class Port:
    """The port's forward, as a function of its state_dict."""

    def __init__(self, state: dict[str, Tensor], resnets: int) -> None:
        self.state, self.resnets = state, resnets

    def weight(self, name: str) -> tuple[Tensor, Tensor]:
        v, g = self.state[f"{name}.weight_v"], self.state[f"{name}.weight_g"]
        return v * (g / v.flatten(1).norm(dim=1).reshape(g.shape)), self.state[f"{name}.bias"]

    def conv(self, name: str, x: Tensor, stride: int = 1) -> Tensor:
        w, b = self.weight(f"{name}.conv")
        kh, kw = w.shape[2:]
        sides = ((kw - 1) // 2, (kw - 1) // 2) if kw == 3 else (kw - 1, 0)
        return F.conv2d(F.pad(x, (*sides, kh - 1, 0)), w, b, stride=stride)

    def deconv(self, name: str, x: Tensor) -> Tensor:
        w, b = self.weight(f"{name}.deconv")
        y = F.conv_transpose2d(x, w, b, stride=2, output_padding=1)
        rows, cols = y.shape[2] - 1, y.shape[3]
        return y[:, :, :rows, 1 : cols - 1] if w.shape[3] == 3 else y[:, :, :rows, : cols - 1]

    def nin(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x.movedim(1, -1), *self.weight(f"{name}.lin_a")).movedim(-1, 1)

    def block(self, name: str, x: Tensor, other: Tensor | None = None) -> Tensor:
        y = self.conv(f"{name}.conv_input", _both(x))
        if other is not None:
            y = y + self.nin(f"{name}.nin_skip", _both(other))
        a, b = self.conv(f"{name}.conv_out", _both(y)).chunk(2, 1)
        return x + a * b.sigmoid()

    def __call__(self, x: Tensor) -> Tensor:
        x = torch.cat((x, torch.ones_like(x[:, :1])), 1)
        us = [F.pad(self.conv("u_init", x), (0, 0, 1, -1))]
        uls = [F.pad(self.conv("ul_init.0", x), (0, 0, 1, -1)) + F.pad(self.conv("ul_init.1", x), (1, -1))]
        for i in range(3):
            for j in range(self.resnets):
                us.append(self.block(f"up_layers.{i}.u_stream.{j}", us[-1]))
                uls.append(self.block(f"up_layers.{i}.ul_stream.{j}", uls[-1], us[-1]))
            if i < 2:
                us.append(self.conv(f"downsize_u_stream.{i}", us[-1], 2))
                uls.append(self.conv(f"downsize_ul_stream.{i}", uls[-1], 2))
        u, ul = us.pop(), uls.pop()
        for i in range(3):
            for j in range(self.resnets + (i > 0)):
                u = self.block(f"down_layers.{i}.u_stream.{j}", u, us.pop())
                ul = self.block(f"down_layers.{i}.ul_stream.{j}", ul, torch.cat((u, uls.pop()), 1))
            if i < 2:
                u, ul = self.deconv(f"upsize_u_stream.{i}", u), self.deconv(f"upsize_ul_stream.{i}", ul)
        return self.nin("nin_out", F.elu(ul))


def _both(x: Tensor) -> Tensor:
    return torch.cat((F.elu(x), F.elu(-x)), 1)


@pytest.mark.parametrize("colours", [1, 3])
@pytest.mark.parametrize("spelling", ["old", "module", "parametrized", "fused"])
def test_weights_of_the_pytorch_port_load(colours: int, spelling: str) -> None:
    state = port_state(2, 6, 3, colours)
    port = Port(state, 2)
    given = dict(state)
    if spelling == "module":
        given = {f"module.{k}": v for k, v in state.items()}
    elif spelling == "parametrized":
        new = {
            "weight_g": "parametrizations.weight.original0",
            "weight_v": "parametrizations.weight.original1",
        }
        for old, name in new.items():
            given = {k.replace(old, name): v for k, v in given.items()}
    elif spelling == "fused":
        stems = [k.removesuffix(".bias") for k in state if k.endswith(".bias")]
        given = {f"{s}.bias": state[f"{s}.bias"] for s in stems} | {f"{s}.weight": port.weight(s)[0] for s in stems}
    model = PixelCNNpp(2, 6, 3, (colours, 8, 12)).eval()
    model.load_state_dict(convert_pclucas14(given))
    x = torch.rand(2, colours, 8, 12, generator=torch.Generator().manual_seed(2)) * 2 - 1
    with torch.no_grad():
        expected = port(x)
        assert (model(x) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_port_weights_given_twice_are_refused() -> None:
    state = port_state(1, 4, 2, 1)
    with pytest.raises(CheckpointError, match=r"two tensors for params\.bias"):
        convert_pclucas14(state | {"module.nin_out.lin_a.bias": state["nin_out.lin_a.bias"]})


def test_models_have_no_step_methods() -> None:
    for name in NAMES:
        model = tiny(name)
        assert not [a for m in model.modules() for a in dir(type(m)) if a in ("step", "incremental_forward")]
