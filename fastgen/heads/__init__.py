"""Heads: how the parameters that forward returns become a value, its likelihood, and forward's next input."""

from fastgen.heads.base import LAYOUTS, Head
from fastgen.heads.bernoulli import Bernoulli
from fastgen.heads.categorical import Categorical
from fastgen.heads.gaussian_mixture import GaussianMixture
from fastgen.heads.logistic_mixture import LogisticMixture

HEADS: tuple[type[Head], ...] = (
    LogisticMixture,
    Categorical,
    Bernoulli,
    GaussianMixture,
)  # in the order of their kinds

__all__ = ["HEADS", "LAYOUTS", "Bernoulli", "Categorical", "GaussianMixture", "Head", "LogisticMixture"]
