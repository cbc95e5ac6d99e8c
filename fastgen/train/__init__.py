"""Reference training: the source of the shipped checkpoints. Needs the extra `train` (data and audio
packages)."""

from fastgen.train.loop import TrainReport, train
from fastgen.train.loss import bits_per_dim, nll
from fastgen.train.recipes import RECIPES, Recipe

__all__ = ["RECIPES", "Recipe", "TrainReport", "bits_per_dim", "nll", "train"]
