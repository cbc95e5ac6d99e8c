"""Heads: how the parameters that forward returns become a value, its likelihood, and forward's next input."""

from fastgen.heads.base import LAYOUTS, Head
from fastgen.heads.bernoulli import Bernoulli
from fastgen.heads.categorical import Categorical
from fastgen.heads.gaussian_mixture import GaussianMixture
from fastgen.heads.logistic_mixture import LogisticMixture

__all__ = ["LAYOUTS", "Bernoulli", "Categorical", "GaussianMixture", "Head", "LogisticMixture"]
