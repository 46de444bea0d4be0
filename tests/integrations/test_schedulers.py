"""`FlowScheduler` against diffusers' own schedulers: levels, timesteps and whole runs on the golden flow."""

import math
import warnings

import diffusers
import numpy as np
import pytest
import torch

from rfkernels.integrations.schedulers import FlowScheduler
from rfkernels.samplers import schedule
from rfkernels.samplers.schedules import double_shift
from tests.samplers.golden import velocity

X = torch.linspace(-2.5, 2.5, 41, dtype=torch.float32)[:, None]
UNIFORM = {n: np.linspace(1, 1 / n, n) for n in (1, 2, 4, 8)}


def model(x, timestep, inverted=False):
    """The golden velocity as a pipeline's model: float32, told a timestep of one number."""
    sigma = (timestep.double() / 1000).expand(len(x))
    v = velocity(x.double(), 1 - sigma if inverted else sigma).float()
    return -v if inverted else v


def drive(scheduler, x=X, **options):
    inverted = scheduler.config.get("invert_sigmas", False)
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t, inverted), t, x, return_dict=False, **options)[0]
    return x


def both(theirs, config, ours, *call, **options):
    """Their scheduler and ours with its configuration, both with set timesteps."""
    reference = theirs(**config)
    scheduler = FlowScheduler.from_config(reference.config, **ours)
    for s in (reference, scheduler):
        s.set_timesteps(*call, **options)
    return reference, scheduler


def same_levels(reference, scheduler):
    torch.testing.assert_close(scheduler.sigmas, reference.sigmas, rtol=2e-6, atol=2e-7)
    torch.testing.assert_close(scheduler.timesteps, reference.timesteps, rtol=2e-6, atol=2e-4)


def same_runs(reference, scheduler, atol=4e-6, **options):
    expected, result = (drive(s, **options) for s in (reference, scheduler))
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=atol)


CONFIGS = {
    "plain": {},
    "shift": {"shift": 3.0},
    "terminal": {"shift": 3.0, "shift_terminal": 0.02},
    "karras": {"shift": 3.0, "use_karras_sigmas": True},
    "exponential": {"shift": 3.0, "use_exponential_sigmas": True},
    "beta": {"shift": 3.0, "use_beta_sigmas": True},
    "terminal and karras": {"shift": 3.0, "shift_terminal": 0.1, "use_karras_sigmas": True},
    "inverted": {"shift": 2.0, "invert_sigmas": True},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic, FLUX.1": {"use_dynamic_shifting": True, "shift": 3.0},  # which is not used
    "dynamic linear": {"use_dynamic_shifting": True, "time_shift_type": "linear"},
    "dynamic terminal": {"use_dynamic_shifting": True, "shift_terminal": 0.02},
    "dynamic beta": {"use_dynamic_shifting": True, "use_beta_sigmas": True},
    "few timesteps": {"num_train_timesteps": 100, "shift": 3.0},
}


def mu_of(config):
    return {"mu": 1.15} if config.get("use_dynamic_shifting") else {}


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_compat_grid_is_that_of_euler(name, steps):
    config = CONFIGS[name]
    if "shift_terminal" in config and steps == 1:
        config = {key: value for key, value in config.items() if key != "shift_terminal"}  # theirs is NaN
    pair = both(
        diffusers.FlowMatchEulerDiscreteScheduler, config, {"compat": "diffusers"}, steps, **mu_of(config)
    )
    same_levels(*pair)
    if config.get("num_train_timesteps") != 100:
        same_runs(*pair)


@pytest.mark.parametrize("compat", [None, "diffusers"])
@pytest.mark.parametrize("name", CONFIGS)
def test_given_sigmas_are_shaped_as_by_euler(name, compat):
    config = CONFIGS[name]
    options = {"sigmas": UNIFORM[8], **mu_of(config)}
    same_levels(*both(diffusers.FlowMatchEulerDiscreteScheduler, config, {"compat": compat}, **options))


def test_given_timesteps_are_those_of_euler_in_compat():
    timesteps = [1000.0, 600.0, 250.0, 40.0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pair = both(
            diffusers.FlowMatchEulerDiscreteScheduler,
            {"shift": 3.0},
            {"compat": "diffusers"},
            timesteps=timesteps,
        )
    same_levels(*pair)
    both_given = both(
        diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {}, timesteps=timesteps, sigmas=UNIFORM[4]
    )
    same_levels(*both_given)


def test_given_timesteps_alone_are_the_levels():
    scheduler = FlowScheduler(shift=3.0)
    scheduler.set_timesteps(timesteps=[1000.0, 600.0, 250.0, 40.0])
    assert scheduler.timesteps.tolist() == [1000, 600, 250, 40]
    assert scheduler.sigmas.tolist() == pytest.approx([1, 0.6, 0.25, 0.04, 0])


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_default_grid_is_shifted_once(shift):
    scheduler = FlowScheduler(shift=shift)
    scheduler.set_timesteps(4)
    torch.testing.assert_close(scheduler.sigmas, schedule("shift", 4, shift=shift).float())
    compat = FlowScheduler(shift=3.0, compat="diffusers")
    compat.set_timesteps(4)
    torch.testing.assert_close(compat.sigmas, double_shift(4, 3.0).float())
    assert compat.sigmas[-2] < 0.01 < 0.2 < scheduler.sigmas[-2]


def test_one_step_goes_all_the_way():
    for config in ({"shift": 3.0}, {"shift": 3.0, "shift_terminal": 0.1}):
        scheduler = FlowScheduler(**config)
        scheduler.set_timesteps(1)
        assert scheduler.sigmas.tolist() == [1, 0]
        torch.testing.assert_close(drive(scheduler), X - model(X, torch.tensor(1000.0)))


@pytest.mark.parametrize("name", ["shift", "karras", "dynamic", "dynamic linear", "terminal"])
def test_runs_are_those_of_euler(name):
    config = CONFIGS[name]
    options = {"sigmas": UNIFORM[8], **mu_of(config)}
    same_runs(*both(diffusers.FlowMatchEulerDiscreteScheduler, config, {}, **options))


@pytest.mark.parametrize("several", [False, True])
def test_stochastic_runs_draw_as_diffusers(several):
    def generator():
        make = lambda seed: torch.Generator().manual_seed(seed)
        return [make(i) for i in range(len(X))] if several else make(0)

    config = {"shift": 3.0, "stochastic_sampling": True}
    pair = both(diffusers.FlowMatchEulerDiscreteScheduler, config, {"compat": "diffusers"}, 6)
    expected, result = (drive(s, generator=generator()) for s in pair)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=4e-6)


def test_stochastic_runs_are_those_of_lcm():
    ours = {"compat": "diffusers", "stochastic_sampling": True}
    pair = both(diffusers.FlowMatchLCMScheduler, {"shift": 3.0}, ours, 6)
    same_levels(*pair)
    expected, result = (drive(s, generator=torch.Generator().manual_seed(3)) for s in pair)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=4e-6)


@pytest.mark.parametrize("steps", [1, 2, 8])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_runs_are_those_of_heun(shift, steps):
    ours = {"method": "heun", "compat": "diffusers"}
    pair = both(diffusers.FlowMatchHeunDiscreteScheduler, {"shift": shift}, ours, steps)
    same_levels(*pair)
    assert pair[1].order == pair[0].order == 2
    same_runs(*pair, atol=3e-5)  # theirs makes (x - (x - s v)) / s in float32, down to s = .001


def noise_like(x, seed=0):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)


def test_noise_is_scaled_as_by_euler():
    pair = both(diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 3.0}, {"compat": "diffusers"}, 8)
    x, noise = noise_like(torch.empty(3, 2, 4)), noise_like(torch.empty(3, 2, 4), 1)
    expected, result = (s.scale_noise(x, s.timesteps[[1, 4, 7]], noise) for s in pair)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    again = pair[1].add_noise(x, noise, pair[1].timesteps[[1, 4, 7]])
    assert torch.equal(again, result)
    for s in pair:
        s.set_begin_index(5)
    expected, result = (s.scale_noise(x, s.timesteps[5:6], noise) for s in pair)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
    for s in pair:
        s.step(x, s.timesteps[5], x)
    expected, result = (s.scale_noise(x, s.timesteps[6:7], noise) for s in pair)
    torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)


def test_noise_of_training_is_scaled_by_the_whole_table():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler = FlowScheduler.from_config(reference.config)
    torch.testing.assert_close(scheduler.sigmas, reference.sigmas)
    x, noise = noise_like(torch.empty(2, 4)), noise_like(torch.empty(2, 4), 1)
    chosen = [100, 900]
    expected = reference.scale_noise(x, reference.timesteps[chosen], noise)
    torch.testing.assert_close(scheduler.scale_noise(x, scheduler.timesteps[chosen], noise), expected)


def test_noise_of_an_inverted_time_is_that_of_its_path():
    scheduler = FlowScheduler(invert_sigmas=True)
    scheduler.set_timesteps(4)
    x, noise = noise_like(torch.empty(1, 4)), noise_like(torch.empty(1, 4), 1)
    assert torch.equal(scheduler.scale_noise(x, scheduler.timesteps[:1], noise), noise)  # time 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_of_their_own_times_go_as_in_euler(dtype):
    pair = both(diffusers.FlowMatchEulerDiscreteScheduler, {"shift": 2.0}, {"compat": "diffusers"}, 6)
    x, v = noise_like(torch.empty(2, 5, 3)).to(dtype), noise_like(torch.empty(2, 5, 3), 1).to(dtype)
    for t in pair[0].timesteps[:4]:
        tokens = (t * torch.tensor([0.0, 0.3, 0.7, 1.0, 1.0])).expand(2, 5)
        expected, result = (s.step(v, t, x, per_token_timesteps=tokens).prev_sample for s in pair)
        assert result.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(result, expected, rtol=1e-6, atol=1e-6)
        x = result


def test_the_sign_of_tokens_is_the_other_one():
    # The trap of LTX: with one time for all tokens the velocity has to be negated.
    scheduler = FlowScheduler()
    scheduler.set_timesteps(4)
    x, v = noise_like(torch.empty(2, 5, 3)), noise_like(torch.empty(2, 5, 3), 1)
    plain = scheduler.step(v, scheduler.timesteps[0], x).prev_sample
    scheduler.set_timesteps(4)
    tokens = torch.full((2, 5), 1000.0)
    per_token = scheduler.step(-v, scheduler.timesteps[0], x, per_token_timesteps=tokens).prev_sample
    torch.testing.assert_close(per_token, plain)


@pytest.mark.parametrize("steps", [10, 50])
def test_whole_timesteps_are_those_of_wan(steps):
    config = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 5.0}
    reference = diffusers.UniPCMultistepScheduler(**config)
    reference.set_timesteps(steps)
    scheduler = FlowScheduler.from_config(reference.config, timestep_dtype="int64")
    assert scheduler.shift == 5.0
    scheduler.set_timesteps(sigmas=np.linspace(1 - 2e-7, 0.001, steps + 1)[:-1])
    assert scheduler.timesteps.dtype == torch.int64
    assert torch.equal(scheduler.timesteps, reference.timesteps)
    x = X
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t), t, x).prev_sample
    assert torch.isfinite(x).all() and scheduler.step_index == steps


@pytest.mark.parametrize("mu", [0.5, 1.15])
def test_dynamic_shift_is_that_of_its_exponential(mu):
    dynamic, static = FlowScheduler(use_dynamic_shifting=True), FlowScheduler(shift=math.exp(mu))
    dynamic.set_timesteps(8, mu=mu)
    static.set_timesteps(8)
    torch.testing.assert_close(dynamic.sigmas, static.sigmas)


THIRD = {"solver_order": 3, "lower_order_final": False}
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


def multistep(theirs, ours, steps, **config):
    """A multistep scheduler of diffusers and ours on its levels."""
    reference = theirs(**FLOW, **config)
    with warnings.catch_warnings():  # of numpy's, in diffusers
        warnings.simplefilter("ignore", DeprecationWarning)
        reference.set_timesteps(steps)
    scheduler = FlowScheduler(**ours)
    scheduler.set_timesteps(sigmas=reference.sigmas[:-1].double())
    torch.testing.assert_close(scheduler.sigmas, reference.sigmas, rtol=1e-7, atol=0)
    reference.timesteps = scheduler.timesteps  # theirs are whole numbers, which the exact flow would feel
    return reference, scheduler


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("flow_shift", [1.0, 5.0])
@pytest.mark.parametrize(
    "ours, config",
    [
        ({"method": "dpmpp_2m"}, {"solver_order": 2}),
        ({"method": "dpmpp_3m", "method_options": {"compat": "diffusers"}}, THIRD),
        ({"method": "euler"}, {"solver_order": 1}),
    ],
)  # fmt: skip
def test_runs_are_those_of_dpmsolver(ours, config, flow_shift, steps):
    same_runs(*multistep(diffusers.DPMSolverMultistepScheduler, ours, steps, flow_shift=flow_shift, **config))


@pytest.mark.parametrize("steps", [2, 5, 20])
@pytest.mark.parametrize("flow_shift", [1.0, 5.0])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_runs_are_those_of_unipc(order, flow_shift, steps):
    ours = {"method": "unipc", "method_options": {"order": order}}
    same_runs(
        *multistep(diffusers.UniPCMultistepScheduler, ours, steps, solver_order=order, flow_shift=flow_shift)
    )
