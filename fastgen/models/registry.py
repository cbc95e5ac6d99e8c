"""Models by name: `build` makes one from a configuration or from the name of a known one."""

import inspect
import types
import typing
from collections.abc import Mapping
from typing import Any

from fastgen.models.base import ReferenceModel
from fastgen.models.gated_pixelcnn import GatedPixelCNN
from fastgen.models.pixelcnnpp import PixelCNNpp
from fastgen.models.wavenet import WaveNet

CLASSES: dict[str, type[ReferenceModel]] = {
    "pixelcnnpp": PixelCNNpp,
    "gated-pixelcnn": GatedPixelCNN,
    "wavenet": WaveNet,
}

_NV = dict(model="wavenet", layers=20, stacks=2, kernel_size=2, input_kernel=2, output="softmax", scaled=False)

CONFIGS: dict[str, dict[str, Any]] = {
    "pixelcnnpp-cifar": dict(model="pixelcnnpp", nr_resnet=5, nr_filters=160, nr_mix=10, shape=[3, 32, 32]),
    "pixelcnnpp-mnist": dict(model="pixelcnnpp", nr_resnet=5, nr_filters=40, nr_mix=10, shape=[1, 28, 28]),
    "gated-pixelcnn-64": dict(model="gated-pixelcnn", levels=256, dim=64, layers=15, classes=10),
    "wavenet-nv": dict(_NV, residual=64, gate=128, skip=128, hidden=256),
    "wavenet-nv-large": dict(_NV, residual=128, gate=256, skip=256, hidden=256),
    "wavenet-mol": dict(model="wavenet", local_channels=80),
    # Small enough to train on one core; their trained weights are shipped (fastgen.pretrained).
    "mnist-gated-pixelcnn-small": dict(
        model="gated-pixelcnn", levels=8, dim=32, layers=12, classes=10, shape=[28, 28], hidden=64
    ),
    "mnist-pixelcnnpp-small": dict(
        model="pixelcnnpp", nr_resnet=1, nr_filters=32, nr_mix=5, shape=[1, 28, 28], dropout=0.0, classes=10
    ),
    "speech-wavenet-small": dict(
        model="wavenet", layers=18, stacks=2, residual=32, gate=64, skip=64, kernel_size=2, output="softmax",
        length=8000,
    ),
}  # fmt: skip


def build(config: str | Mapping[str, Any]) -> ReferenceModel:
    """A model with fresh weights from a name of CONFIGS, or from a configuration such as `model.config`.

    Raises ValueError for an unknown name, model or option; the model's own errors for impossible values.
    """
    if isinstance(config, str):
        if config not in CONFIGS:
            raise ValueError(f"unknown model {config!r}, expected one of {', '.join(CONFIGS)}")
        config = CONFIGS[config]
    options = dict(config)
    kind = options.pop("model", None)
    if kind not in CLASSES:
        raise ValueError(f"config['model'] is {kind!r}, expected one of {', '.join(CLASSES)}")
    known = inspect.signature(CLASSES[kind]).parameters
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(f"model {kind!r} has no option {', '.join(unknown)}; it has {', '.join(known)}")
    hints = typing.get_type_hints(CLASSES[kind].__init__)
    for name, value in options.items():
        if isinstance(value, list):
            options[name] = tuple(value)
        if not _fits(options[name], hints.get(name, Any)):
            expected = hints[name].__name__ if isinstance(hints[name], type) else hints[name]
            raise TypeError(f"model {kind!r}: option {name} is {value!r}, expected {expected}")
    return CLASSES[kind](**options)


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of a configuration is what an option takes: a number, a text, some of them, one of several."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if origin is typing.Literal:
        return value in args
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is tuple:
        inner = args[:1] * len(value) if isinstance(value, tuple) and args[1:] == (...,) else args
        return isinstance(value, tuple) and len(value) == len(inner) and all(map(_fits, value, inner))
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return not isinstance(hint, type) or isinstance(value, hint)
