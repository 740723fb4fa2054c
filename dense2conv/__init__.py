"""dense2conv: dense networks that become convolutions, trained model-parallel."""

__version__ = "0.1.0"
