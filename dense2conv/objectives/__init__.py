"""The information objectives: pure mathematics, exact for features and samples that are spread."""

from dense2conv.objectives.efficient_coding import EfficientCoding, ObjectiveConfig, Terms
from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.objectives.rate_reduction import RateReduction, class_coding_rate, rate_reduction
from dense2conv.objectives.rates import (
    CodingRate,
    coding_rate,
    gaussian_information,
    limit_power,
    on_sphere,
)
from dense2conv.objectives.sparsity import soft_threshold
from dense2conv.objectives.whole_batch import accumulate_gradients, whole_batch

__all__ = [
    "CodingRate",
    "EfficientCoding",
    "ObjectiveConfig",
    "RateReduction",
    "Terms",
    "accumulate_gradients",
    "class_coding_rate",
    "coding_rate",
    "gaussian_information",
    "limit_power",
    "logdet_i_plus",
    "on_sphere",
    "rate_reduction",
    "soft_threshold",
    "whole_batch",
]
