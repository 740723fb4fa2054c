"""What to say of a process that ran out of memory: its largest tensors, and the keys that change them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from dense2conv.models.dense_stack import layer_name
from dense2conv.planner.config import PlanConfig
from dense2conv.planner.share import Share
from dense2conv.training.config import Config

_SHOWN = 4
_FP64 = 8
_SAYS = ("out of memory", "can't allocate memory", "not enough memory")  # CUDA, Linux, others


class Held(NamedTuple):
    """A tensor of one process, and what would make it smaller."""

    name: str
    shape: tuple[int, ...]
    num_bytes: int
    remedy: str

    def __str__(self) -> str:
        return f"{self.name} {list(self.shape)}, {self.num_bytes / 2**20:,.1f} MiB"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; on the host torch has no type of its own for it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAYS)


def shortage(error: BaseException, config: Config, stage: int, phase: str) -> str:
    """What was asked for, the largest tensors of a process of that pipeline stage, and the remedy."""
    said = (str(error).strip().splitlines() or ["no memory left"])[0]
    held = sorted(tensors(config, stage, phase), key=lambda one: -one.num_bytes)[:_SHOWN]
    remedies = dict.fromkeys(one.remedy for one in held)
    return (
        f"out of memory ({said.removesuffix('.')}); the largest tensors here are "
        f"{', '.join(map(str, held))}; {', or '.join(remedies)} (dense2conv plan says what fits)"
    )


def tensors(config: Config, stage: int, phase: str = "train") -> Iterator[Held]:
    """The tensors that the first process of a stage holds at once, by name, those of a layer each."""
    share = Share(PlanConfig(**vars(config)), config.parallel, stage)
    number, rows = share.precision, share.num_rows
    spread = "raise parallel.tp" + (" or parallel.pp" if len(config.model.widths) > 1 else "")
    if config.engine == "deepspeed":
        spread = "raise parallel.dp with deepspeed.zero=3"
    fewer = "lower train.batch or raise parallel.dp"
    for layer in share.layers:
        name, shape = layer_name(layer.index), (layer.num_kept, layer.num_inputs)
        weights = layer.num_kept_weights
        yield Held(f"weights of {name}", shape, weights * number.master, spread)
        if phase == "extract":
            continue
        yield Held(f"momenta of {name}", *_momenta(share, shape, weights), spread)
        if phase == "train":
            yield Held(f"gradient of {name}", shape, weights * number.master, spread)
            held = rows * layer.num_held * number.compute
            yield Held(f"output of {name}", (rows, layer.num_held), held, fewer)
    if phase == "extract":
        samples, inputs = config.extract.samples, share.layers[0].num_inputs
        held = samples * inputs * number.compute
        yield Held("sample of images", (samples, inputs), held, "lower extract.samples")
    if phase == "train":
        yield from _whole(share, fewer)


def _momenta(share: Share, shape: tuple[int, ...], weights: int) -> tuple[tuple[int, ...], int]:
    states = share.states_per_weight
    return (states, *shape), states * weights * share.precision.master


def _whole(share: Share, fewer: str) -> Iterator[Held]:
    """What does not get smaller with parallel.tp: images, inputs, and the matrices of the rates."""
    rows, number = share.num_rows, share.precision
    for layer in share.layers:
        what = "images" if layer.index == 0 else f"inputs of {layer_name(layer.index)}"
        held = rows * layer.num_inputs * number.compute
        yield Held(what, (rows, layer.num_inputs), held, fewer)
    for layer in share.coded:
        for rate in share.rates(layer):
            side = rate.small_side
            remedy = "lower train.batch" if rate.is_dual else "narrow model.widths"
            yield Held(f"Gram matrix, {rate.purpose}", (side, side), _FP64 * side**2, remedy)
