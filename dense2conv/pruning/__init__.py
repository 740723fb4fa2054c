"""Pruning without gathering: exact magnitude thresholds and the masks they give."""

from dense2conv.pruning.threshold import PruneConfig, magnitude_mask

__all__ = ["PruneConfig", "magnitude_mask"]
