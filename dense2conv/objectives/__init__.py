"""The information objectives: pure mathematics, exact for features and samples that are spread."""

from dense2conv.objectives.bottleneck import (
    BottleneckTerms,
    VariationalInformationBottleneck,
    code_noise,
    reparameterised,
    vib_loss,
)
from dense2conv.objectives.efficient_coding import EfficientCoding, ObjectiveConfig, Terms
from dense2conv.objectives.entropy import (
    GaussianEntropy,
    GaussianTotalCorrelation,
    binned_mutual_information,
    gaussian_entropy,
    gaussian_mutual_information,
    gaussian_total_correlation,
    knn_entropy,
    marginal_entropies,
    total_correlation,
)
from dense2conv.objectives.ica import (
    RICA,
    InfoMaxICA,
    equal_norm_rows,
    infomax_loss,
    infomax_natural_gradient,
    rica_loss,
)
from dense2conv.objectives.logdet import logdet_i_plus
from dense2conv.objectives.rate_reduction import RateReduction, class_coding_rate, rate_reduction
from dense2conv.objectives.rates import (
    CodingRate,
    coding_rate,
    gaussian_information,
    limit_power,
    on_sphere,
)
from dense2conv.objectives.sparsity import (
    L1,
    PENALTIES,
    BetaLasso,
    GroupColumns,
    GroupRows,
    Penalty,
    hard_threshold,
    make_penalty,
    soft_threshold,
)
from dense2conv.objectives.variational import (
    VariationalRateReduction,
    variational_class_rate,
    variational_rate_reduction,
)
from dense2conv.objectives.whole_batch import accumulate_gradients, whole_batch

__all__ = [
    "L1",
    "PENALTIES",
    "RICA",
    "BetaLasso",
    "BottleneckTerms",
    "CodingRate",
    "EfficientCoding",
    "GaussianEntropy",
    "GaussianTotalCorrelation",
    "GroupColumns",
    "GroupRows",
    "InfoMaxICA",
    "ObjectiveConfig",
    "Penalty",
    "RateReduction",
    "Terms",
    "VariationalInformationBottleneck",
    "VariationalRateReduction",
    "accumulate_gradients",
    "binned_mutual_information",
    "class_coding_rate",
    "code_noise",
    "coding_rate",
    "equal_norm_rows",
    "gaussian_entropy",
    "gaussian_information",
    "gaussian_mutual_information",
    "gaussian_total_correlation",
    "hard_threshold",
    "infomax_loss",
    "infomax_natural_gradient",
    "knn_entropy",
    "limit_power",
    "logdet_i_plus",
    "make_penalty",
    "marginal_entropies",
    "on_sphere",
    "rate_reduction",
    "reparameterised",
    "rica_loss",
    "soft_threshold",
    "total_correlation",
    "variational_class_rate",
    "variational_rate_reduction",
    "vib_loss",
    "whole_batch",
]
