"""Samplers: noise levels (`schedule`), methods as data (`METHODS`), and the one loop (`sample`)."""

from rfkernels.samplers.methods import METHODS, Method, nfe
from rfkernels.samplers.sample import StepInfo, sample
from rfkernels.samplers.schedules import SCHEDULES, schedule

__all__ = ["METHODS", "SCHEDULES", "Method", "StepInfo", "nfe", "sample", "schedule"]
