"""The progress of a run on its terminal."""

from __future__ import annotations

import sys

from tqdm import tqdm

from dense2conv.bar import Bar


class Progress:
    """A bar on a terminal, a line now and then elsewhere."""

    def __init__(self, first_step: int, num_steps: int) -> None:
        self._live = sys.stderr.isatty()
        self._bar = Bar(
            total=num_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not self._live,
            dynamic_ncols=True,
        )
        self._step, self._num_steps = first_step, num_steps
        self._next_line = first_step
        self._values: dict[str, float] = {}

    def at(self, step: int) -> None:
        """That many steps are done."""
        self._bar.update(step - self._step)
        self._step = step

    def show(self, step: int, values: dict[str, float]) -> None:
        """What is known of a step, and was not when the bar was there."""
        self._values |= {
            k: values[k] for k in ("rate", "objective", "sparsity", "radius") if k in values
        }
        if self._live:
            self._bar.set_postfix({k: f"{v:.3f}" for k, v in self._values.items()}, refresh=False)
        elif step >= self._next_line or step == self._num_steps:
            self._next_line = step + max(1, self._num_steps // 10)
            figures = "  ".join(f"{k} {v:.3f}" for k, v in self._values.items())
            self.say(f"step {step}/{self._num_steps}  {figures}")

    def say(self, text: str) -> None:
        tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        self._bar.close()
