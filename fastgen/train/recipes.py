"""What each trained model is trained on, and how. The shipped checkpoints come from these recipes."""

from dataclasses import dataclass
from typing import Any

from fastgen.heads import Categorical
from fastgen.models.base import ReferenceModel
from fastgen.train.data import Digits, Source, Speech


@dataclass(frozen=True)
class Recipe:
    """One training run.

    model: a name of fastgen.models.CONFIGS, or a configuration. data: "mnist" or "speech". steps: optimiser
    steps of the whole run, over which the learning rate falls. batch: examples a step. lr: peak of Adam's
    learning rate, after `warmup` steps. ema: decay of the averaged weights. clip: largest gradient norm.
    rate, crop: samples per second and samples per example of speech.
    """

    model: str | dict[str, Any]
    data: str
    steps: int
    batch: int
    lr: float
    warmup: int = 100
    ema: float = 0.999
    clip: float = 1.0
    rate: int = 8000
    crop: int = 4000

    @property
    def name(self) -> str:
        return self.model if isinstance(self.model, str) else str(self.model["model"])

    def source(self, model: ReferenceModel) -> Source:
        """The data in the form the model takes. Raises ImportError, FileNotFoundError or ValueError."""
        head = model.head
        classes = head.n if isinstance(head, Categorical) else None
        if self.data == "mnist":
            return Digits(classes, labelled=bool(model.example_cond()))
        if self.data == "speech":
            return Speech(self.rate, self.crop, classes)
        raise ValueError(f"recipe data {self.data!r}, expected 'mnist' or 'speech'")


RECIPES: dict[str, Recipe] = {
    "mnist-gated-pixelcnn-small": Recipe(
        "mnist-gated-pixelcnn-small", "mnist", steps=3200, batch=16, lr=2e-3
    ),
    "mnist-pixelcnnpp-small": Recipe("mnist-pixelcnnpp-small", "mnist", steps=3000, batch=16, lr=2e-3),
    "speech-wavenet-small": Recipe(
        "speech-wavenet-small", "speech", steps=4000, batch=4, lr=3e-3, crop=2000
    ),
}  # fmt: skip
