"""Images in, standardised pixels out; every batch is a pure function of (seed, step)."""

from dense2conv.data.config import DataConfig
from dense2conv.data.sources import ImageSource, add_input_noise, open_source

__all__ = ["DataConfig", "ImageSource", "add_input_noise", "open_source"]
