"""A trainer for people who want one, on one process or many."""

from stretto.train.parallel import Execution, parallelize
from stretto.train.trainer import Trainer

__all__ = ["Execution", "Trainer", "parallelize"]
