"""A trace of a few steps, for chrome://tracing or Perfetto."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from dense2conv.training.run_folder import RunFolder

_WAIT, _WARM_UP, _TRACED = 3, 2, 3  # steps


def profiler(folder: RunFolder) -> profile:
    """A context that traces steps 6 to 8 into ``trace.json``; tell it ``step()`` after each."""
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    return profile(
        activities=activities,
        schedule=schedule(wait=_WAIT, warmup=_WARM_UP, active=_TRACED, repeat=1),
        on_trace_ready=lambda done: done.export_chrome_trace(str(folder.trace)),
        record_shapes=True,
    )
