"""Samplers: noise levels (`schedule`), methods as data (`METHODS`), plans, and the loop (`sample`)."""

from rfkernels.samplers.boss import boss_schedule
from rfkernels.samplers.guidance import (
    APG,
    CFG,
    CFGZeroStar,
    Guide,
    Interval,
    NormMatched,
    Perpendicular,
    Rescaled,
    SkipLayer,
)
from rfkernels.samplers.methods import METHODS, Method, nfe, plan_for
from rfkernels.samplers.model_schedules import MODEL_SCHEDULES, model_schedule
from rfkernels.samplers.paths import PATHS, PREDICTIONS, as_velocity, convert, step_coefficients
from rfkernels.samplers.plan import Plan, Stage, State, init, step
from rfkernels.samplers.sample import StepInfo, sample
from rfkernels.samplers.schedules import SCHEDULES, schedule

__all__ = [
    "APG",
    "CFG",
    "METHODS",
    "MODEL_SCHEDULES",
    "PATHS",
    "PREDICTIONS",
    "SCHEDULES",
    "CFGZeroStar",
    "Guide",
    "Interval",
    "Method",
    "NormMatched",
    "Perpendicular",
    "Plan",
    "Rescaled",
    "SkipLayer",
    "Stage",
    "State",
    "StepInfo",
    "as_velocity",
    "boss_schedule",
    "convert",
    "init",
    "model_schedule",
    "nfe",
    "plan_for",
    "sample",
    "schedule",
    "step",
    "step_coefficients",
]
