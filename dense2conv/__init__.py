"""dense2conv: dense networks that become convolutions, trained model-parallel.

The whole path, from images to a convolution that is checked, without the command line::

    import os

    from dense2conv import Config, load, run

    config = Config(seed=1, then=["prune", "extract", "report"])
    config.run.name = "small"
    config.data.side = 8  # of patches of photographs; your own: kind = "folder", root = "/my/images"
    config.model.widths = [64]
    config.train.steps, config.train.batch = 1500, 512
    config.objective.l1 = 0.03
    config.prune.sparsity = 0.8
    config.parallel.tp = int(os.environ.get("WORLD_SIZE", "1"))  # torchrun --nproc-per-node=2 …
    summary = run(config)  # what is in runs/small/summary.json, the same on every process

    layer = summary["layers"][0]
    print(f"{layer['num_kernels']} kernels explain {layer['conv_r2']:.0%} of the dense layer")
    network = load("runs/small/extracted").float()  # ExtractedStack: Conv2d, gains, left-over rows
    print(network)

``Config`` has the keys that ``dense2conv train --help`` explains; what cannot be is an ``InputError``.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dense2conv.phases import run
    from dense2conv.shapes import InputError
    from dense2conv.structure import load
    from dense2conv.training.config import Config

__version__ = "0.1.0"
__all__ = ["Config", "InputError", "__version__", "load", "run"]

# Found when they are asked for: the package itself, and its command line, start without torch.
_HOMES = {
    "Config": "dense2conv.training.config",
    "InputError": "dense2conv.shapes",
    "load": "dense2conv.structure",
    "run": "dense2conv.phases",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return __all__
