"""Samplers: noise levels (`schedule`), methods as data (`METHODS`), and the one loop (`sample`)."""

from rfkernels.samplers.boss import boss_schedule
from rfkernels.samplers.methods import METHODS, Method, nfe
from rfkernels.samplers.model_schedules import MODEL_SCHEDULES, model_schedule
from rfkernels.samplers.sample import StepInfo, sample
from rfkernels.samplers.schedules import SCHEDULES, schedule

__all__ = [
    "METHODS",
    "MODEL_SCHEDULES",
    "SCHEDULES",
    "Method",
    "StepInfo",
    "boss_schedule",
    "model_schedule",
    "nfe",
    "sample",
    "schedule",
]
