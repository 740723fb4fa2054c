"""Images in, standardised pixels out; every batch is a pure function of (seed, step)."""

from dense2conv.data.config import DataConfig
from dense2conv.data.source import Images, ImageSource
from dense2conv.data.sources import add_input_noise, open_source
from dense2conv.data.whitening import Moments, moments

__all__ = [
    "DataConfig",
    "ImageSource",
    "Images",
    "Moments",
    "add_input_noise",
    "moments",
    "open_source",
]
