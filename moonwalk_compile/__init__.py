"""Train under a memory budget: a PyTorch graph compiler that inverts what it can and checkpoints the rest.

The public interface is `moonwalk_compile`, the backend `moonwalk` for `torch.compile`, `training_step`, the `Plan` and
the errors; `moonwalk_compile.measure` measures peaks, times and gradient errors.
"""

from .api import moonwalk_compile
from .backend import moonwalk
from .errors import BudgetError, CaptureError, MoonwalkError, OptionError, UsageError
from .report import Plan, Segment
from .step import TrainingStep, training_step

__version__ = "0.1.0"

__all__ = [
    "BudgetError",
    "CaptureError",
    "MoonwalkError",
    "OptionError",
    "Plan",
    "Segment",
    "TrainingStep",
    "UsageError",
    "moonwalk",
    "moonwalk_compile",
    "training_step",
]
