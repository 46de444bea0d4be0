"""A scheduler for diffusers' flow pipelines with the methods, schedules and kernels of `rfkernels.samplers`.

>>> pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, method="dpmpp_2m")

Importing this module imports diffusers.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rfkernels.integrations._levels import base_levels, shaped_levels
from rfkernels.integrations._run import Generators, Run, remaining
from rfkernels.ops import linear_combination
from rfkernels.samplers import METHODS, Plan, plan_for
from rfkernels.samplers.schedules import invert, time_shift, timesteps_for

try:
    from diffusers import ConfigMixin, SchedulerMixin
    from diffusers.configuration_utils import register_to_config
    from diffusers.utils import BaseOutput
    from diffusers.utils.torch_utils import randn_tensor
except ImportError as error:
    raise ImportError(f"rfkernels.integrations.schedulers requires diffusers: {error}") from error

__all__ = ["FlowScheduler", "FlowSchedulerOutput"]


@dataclass
class FlowSchedulerOutput(BaseOutput):
    """What `FlowScheduler.step` returns: `prev_sample` is where the model is to be evaluated next."""

    prev_sample: Tensor


class FlowScheduler(SchedulerMixin, ConfigMixin):
    r"""Any method of `rfkernels.samplers.METHODS` in the shape of diffusers' flow-matching schedulers.

    One call of `step` follows each evaluation of the model and is one launch. A method of several evaluations
    in a step has as many entries in `timesteps`, as `FlowMatchHeunDiscreteScheduler` has; `order` is how many
    a step has. `step` returns the point of the next evaluation. Coefficients are computed in float64.

    The state is kept in float32 between the steps (float64 for float64) while the pipeline hands back the
    tensor that `step` returned; a sample that has been changed in between, as inpainting does, is taken
    instead. With `compat="diffusers"` it is rounded to the dtype of the model's output each time.

    Levels are made in diffusers' order: `sigmas` of `set_timesteps`, or the uniform grid 1, ..., 1/N; shift,
    static or by `mu`; `shift_terminal`; one of `use_karras_sigmas`, `use_exponential_sigmas` and
    `use_beta_sigmas`; a 0 at the end. With `compat="diffusers"` the grid without `sigmas` is
    `schedules.double_shift`, and `timesteps` without `sigmas` are shifted but told to the model as they are;
    else they are the levels, unshifted.

    Args:
        num_train_timesteps: `timesteps` are as many times `sigmas`.
        shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len,
        shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type: as of
            `FlowMatchEulerDiscreteScheduler`.
        invert_sigmas: times rise to 1, and the model's output is dx/dt (Mochi).
        stochastic_sampling: every step makes fresh noise of the estimate of the data; `euler` only. With
            `FlowMatchLCMScheduler`'s configuration set it, that class does nothing else.
        flow_shift: of `UniPCMultistepScheduler` and `DPMSolverMultistepScheduler`, used where `shift` is 1.
        sigma_max: where the uniform grid starts, before the shift; 1 if None. Wan's and HiDream's own code
            has 0.999.
        method: a key of `METHODS`.
        method_options: of `plan_for`, such as `{"final": "exact"}`. Runge-Kutta methods end with `euler` by
            default, so that no model is asked at sigma = 0.
        timestep_dtype: "int64" for models told whole timesteps (Wan), cut off; see `timesteps_for`.
        compat: None, or "diffusers" for the levels and roundings of diffusers.
    """

    _compatibles = [  # noqa: RUF012
        "FlowMatchEulerDiscreteScheduler",
        "FlowMatchHeunDiscreteScheduler",
        "FlowMatchLCMScheduler",
        "UniPCMultistepScheduler",
        "DPMSolverMultistepScheduler",
    ]

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int = 256,
        max_image_seq_len: int = 4096,
        invert_sigmas: bool = False,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        stochastic_sampling: bool = False,
        flow_shift: float | None = None,
        sigma_max: float | None = None,
        method: str = "euler",
        method_options: dict[str, Any] | None = None,
        timestep_dtype: str = "float32",
        compat: str | None = None,
    ) -> None:
        respacings = (use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas)
        _require(sum(map(bool, respacings)) <= 1, f"one of karras, exponential and beta, got {respacings}")
        _require(sigma_max is None or 0 < sigma_max <= 1, f"sigma_max must be in (0, 1], got {sigma_max}")
        _require(
            time_shift_type in ("exponential", "linear"),
            f"time_shift_type must be exponential or linear, got {time_shift_type!r}",
        )
        _require(compat in (None, "diffusers"), f"compat must be None or 'diffusers', got {compat!r}")
        methods = [name for name, entry in METHODS.items() if not entry.adaptive]
        _require(method in methods, f"method must be one of {', '.join(methods)}, got {method!r}")
        _require(
            not stochastic_sampling or method == "euler",
            f"stochastic_sampling needs method 'euler', got {method!r}",
        )
        self._shift = flow_shift if flow_shift is not None and shift == 1 else shift
        static = 1.0 if use_dynamic_shifting else self._shift
        levels = time_shift(torch.arange(num_train_timesteps, 0, -1) / num_train_timesteps, static)
        self.sigmas = levels.float()
        self.sigma_min, self.sigma_max = levels[-1].item(), levels[0].item()
        self.timesteps = timesteps_for(levels, timestep_dtype, num_train_timesteps)
        self.num_inference_steps: int | None = None
        self._plan: Plan | None = None
        self._restart()

    @property
    def order(self) -> int:
        """How many evaluations a step has, and entries of `timesteps`."""
        return 1 if self.config.stochastic_sampling else METHODS[self.config.method].evaluations

    @property
    def shift(self) -> float:
        """k of the static shift."""
        return self._shift

    @property
    def step_index(self) -> int | None:
        """The evaluation that is next, counted in `timesteps`; None before the first."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """The evaluation that the pipeline begins at."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at that entry of `timesteps`: image to image from the middle. It must be the first of a
        step.
        """
        self._begin_index = begin_index

    def set_shift(self, shift: float) -> None:
        """Shift by that from the next `set_timesteps` on."""
        self._shift = shift

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Sequence[float] | Tensor | None = None,
        mu: float | None = None,
        timesteps: Sequence[float] | Tensor | None = None,
    ) -> None:
        """Makes `sigmas` (on the CPU, one for each evaluation and the last level) and `timesteps` (on
        `device`).

        Args:
            num_inference_steps: N; may be left out with `sigmas` or `timesteps`.
            sigmas: levels before the shift, falling, without the 0 at the end (one is taken for the end).
            mu: of the dynamic shift.
            timesteps: what the model is told. Alone they are also the levels, unshifted.

        Raises:
            ValueError: no number of steps, or one that does not agree; no mu where the shift is dynamic;
                levels that do not fall.
        """
        config = self.config
        lengths = [len(s) for s in (sigmas, timesteps) if s is not None]
        agree = lengths if num_inference_steps is None else [num_inference_steps, *lengths]
        _require(
            len(set(agree)) == 1,
            "set_timesteps: num_inference_steps, sigmas and timesteps must agree and one be given, "
            f"got {num_inference_steps} and lengths {lengths}",
        )
        told = None if timesteps is None else torch.as_tensor(timesteps, dtype=torch.float64, device="cpu")
        exact = told is not None and sigmas is None and config.compat is None
        if exact:
            levels = base_levels(len(told), told / config.num_train_timesteps)
        else:
            given = told / config.num_train_timesteps if sigmas is None and told is not None else sigmas
            ends = (config.sigma_max or 1.0, self.sigma_min if config.compat else None)
            base = base_levels(agree[0], given, *ends)
            levels = shaped_levels(base, config, self._shift, mu)
        plan = self._plan_along(torch.cat([levels, levels.new_zeros(1)]))
        evaluated = torch.tensor([*(stage.sigma for stage in plan.stages), 0.0], dtype=torch.float64)
        shown = invert(evaluated) if config.invert_sigmas else evaluated
        if told is None or config.invert_sigmas or (exact and len(told) != len(plan.stages)):
            told = shown[:-1] * config.num_train_timesteps
        _require(
            len(told) == len(plan.stages),
            f"timesteps must be one for each of {len(plan.stages)} evaluations, got {len(told)}",
        )
        self._plan, self.num_inference_steps, self.sigmas = plan, plan.steps, shown.float()
        self.timesteps = timesteps_for(told, config.timestep_dtype, 1).to(device)
        self._restart()

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        generator: Generators = None,
        per_token_timesteps: Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowSchedulerOutput | tuple[Tensor]:
        r"""The state after the evaluation at hand, in the dtype of `model_output`.

        Args:
            model_output: the velocity :math:`dx/d\sigma`, guided, at `sample`.
            timestep: the entry of `timesteps` at hand.
            sample: where the model was evaluated: what the last step returned, or noise.
            generator: of stochastic methods. `stochastic_sampling` draws as diffusers does; the others take a
                seed from it and make their noise within the launch.
            per_token_timesteps: `[batch, tokens]` beside a sample `[batch, tokens, channels]`, `euler` only:
                each token goes to the next level below its own. As in diffusers the step is
                :math:`x + (\sigma - \sigma') v` with the sign the other way round, so pass the negated
                velocity (LTX's pipeline does), and the result is not rounded to 16 bits.

        Raises:
            ValueError: whole numbers as timesteps (indices, as a rule), `set_timesteps` not called, a
                beginning in the middle of a step, a stochastic method without a generator, or more calls than
                timesteps.
        """
        _require(self._plan is not None, "step: set_timesteps must be called first")
        self._check_timestep(timestep)
        if self._step_index is None:
            self._begin(timestep)
        more = self._step_index < len(self._plan.stages)
        _require(more, f"step: there are {len(self._plan.stages)} timesteps, and this call is one more")
        if per_token_timesteps is not None:
            result = self._per_token(model_output, sample, per_token_timesteps)
        elif self.config.stochastic_sampling:
            result = self._renoised(model_output, sample, generator)
        else:
            result = self._run.planned(model_output, sample, generator)
        self._step_index += 1
        return FlowSchedulerOutput(prev_sample=result) if return_dict else (result,)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        r""":math:`(1 - \sigma) x_0 + \sigma\epsilon` with a level for each entry of `timestep`, `[batch]`.

        Once a pipeline has set the begin index, the level is that of the evaluation at hand instead.
        """
        timestep = torch.as_tensor(timestep).reshape(-1)
        if self._begin_index is None:
            indices = [self.index_for_timestep(t) for t in timestep]
        else:
            at = self._begin_index if self._step_index is None else self._step_index
            indices = [at] * len(timestep)
        sigma = self.sigmas[indices].double()
        sigma = 1 - sigma if self.config.invert_sigmas else sigma
        coefs = torch.stack([sigma, 1 - sigma])
        coefs = coefs[:, 0] if len(timestep) == 1 else coefs
        coefs = coefs.to(sample.device, torch.float64 if sample.dtype == torch.float64 else torch.float32)
        noise = noise.to(sample.device, sample.dtype).expand_as(sample)
        return linear_combination([noise.contiguous(), sample.contiguous()], coefs)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """`scale_noise` with the arguments of the schedulers that are not diffusers' flow-matching ones."""
        return self.scale_noise(original_samples, timesteps, noise)

    def scale_model_input(self, sample: Tensor, *_: object) -> Tensor:
        """The sample: flow models take it as it is."""
        return sample

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Which entry of `timesteps` it is; of equal ones the second, as in diffusers: there a step
        begins.
        """
        timesteps = self.timesteps if schedule_timesteps is None else schedule_timesteps
        # of timesteps that are equal from the first on, as cut ones may be, the first
        matches = (timesteps.cpu() == torch.as_tensor(timestep).cpu()).nonzero().flatten()
        _require(len(matches) > 0, f"timestep must be one of {timesteps.tolist()}, got {timestep}")
        return matches[1 if len(matches) > 1 and matches[0] > 0 else 0].item()

    def __len__(self) -> int:
        return self.config.num_train_timesteps

    def _plan_along(self, levels: Tensor) -> Plan:
        method = self.config.method
        options = METHODS[method].network_options | dict(self.config.method_options or {})
        return plan_for(method, levels, **options)

    def _restart(self) -> None:
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self._run: Run | None = None

    def _begin(self, timestep: float | Tensor) -> None:
        index = self.index_for_timestep(timestep) if self._begin_index is None else self._begin_index
        config = self.config
        self._run = Run(
            remaining(self._plan, index), inverted=config.invert_sigmas, rounding=config.compat is not None
        )
        self._step_index = index

    def _renoised(self, velocity: Tensor, sample: Tensor, generator: Generators) -> Tensor:
        stages, at = self._plan.stages, self._step_index
        after = stages[at + 1].sigma if at + 1 < len(stages) else 0.0
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        noise = randn_tensor(sample.shape, generator=generator, device=sample.device, dtype=dtype)
        return self._run.renoised(velocity, sample, noise, stages[at].sigma, after)

    def _per_token(self, velocity: Tensor, sample: Tensor, timesteps: Tensor) -> Tensor:
        _require(
            self.config.method == "euler" and not self.config.stochastic_sampling,
            f"per_token_timesteps need method 'euler' without noise, got {self.config.method!r}",
        )
        _require(
            sample.ndim == 3 and timesteps.shape == sample.shape[:2],
            "per_token_timesteps must be [batch, tokens] beside a sample [batch, tokens, channels], got "
            f"{list(timesteps.shape)} and {list(sample.shape)}",
        )
        return self._run.per_token(velocity, sample, timesteps / self.config.num_train_timesteps, self.sigmas)

    def _check_timestep(self, timestep: float | Tensor) -> None:
        whole = isinstance(timestep, int)
        if isinstance(timestep, Tensor) and self.config.timestep_dtype != "int64":
            whole = not timestep.is_floating_point()
        _require(not whole, f"step: timestep must be an entry of timesteps, not an index, got {timestep}")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
