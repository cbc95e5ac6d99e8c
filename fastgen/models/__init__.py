"""Reference models over the layers of `fastgen.nn`, each from its paper. They know nothing of incremental sampling.

Every model carries what `fastgen.sample` needs: `sample_shape` (one sample as forward takes it), `head` (how
parameters become a value), `predicts`, `start` and `layout` (see `fastgen.compile`), `example_cond()`, and
`config`, from which `build` makes the same model again.
"""

from fastgen.models.base import ReferenceModel
from fastgen.models.gated_pixelcnn import GatedPixelCNN
from fastgen.models.pixelcnnpp import PixelCNNpp, convert_pclucas14
from fastgen.models.registry import CLASSES, CONFIGS, build
from fastgen.models.wavenet import WaveNet

__all__ = [
    "CLASSES",
    "CONFIGS",
    "GatedPixelCNN",
    "PixelCNNpp",
    "ReferenceModel",
    "WaveNet",
    "build",
    "convert_pclucas14",
]
