"""The information objectives: pure mathematics, exact for features and samples that are spread."""

from dense2conv.objectives.efficient_coding import EfficientCoding, ObjectiveConfig, Terms
from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.objectives.rates import coding_rate, gaussian_information
from dense2conv.objectives.sparsity import soft_threshold

__all__ = [
    "EfficientCoding",
    "ObjectiveConfig",
    "Terms",
    "coding_rate",
    "gaussian_information",
    "logdet_i_plus",
    "soft_threshold",
]
