"""A trainer for people who want one."""

from stretto.train.trainer import Trainer

__all__ = ["Trainer"]
