"""A progress bar that does not mind what happens to the wall clock."""

from __future__ import annotations

import time
from typing import Any

from tqdm import tqdm


class Bar(tqdm):
    """tqdm on the monotonic clock: set back by an hour, the other one would stand still that long."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if not self.disable:
            self._time = time.monotonic
            self.start_t = self.last_print_t = time.monotonic()
