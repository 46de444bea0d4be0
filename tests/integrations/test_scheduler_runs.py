"""What `FlowScheduler` promises beyond diffusers' schedulers: methods, precision, beginnings, pipelines,
refusals.
"""

import inspect

import diffusers
import pytest
import torch

from rfkernels.integrations.schedulers import FlowScheduler
from rfkernels.samplers import METHODS, model_schedule, sample, schedule
from tests.integrations.models import made
from tests.samplers.golden import velocity

F64 = torch.float64
X = torch.linspace(-2.5, 2.5, 11, dtype=F64)[:, None]
PLANNED = [name for name, entry in METHODS.items() if not entry.adaptive]
DETERMINISTIC = [name for name in PLANNED if not METHODS[name].stochastic]
STOCHASTIC = [name for name in PLANNED if METHODS[name].stochastic]


def field(x, timestep, inverted=False):
    sigma = (timestep.double() / 1000).expand(len(x))
    v = velocity(x.double(), 1 - sigma if inverted else sigma).to(x.dtype)
    return -v if inverted else v


def drive(scheduler, x, change=lambda x: x, dtype=None, **options):
    inverted = scheduler.config.invert_sigmas
    for t in scheduler.timesteps:
        v = field(x, t, inverted)
        x = change(scheduler.step(v.to(dtype or v.dtype), t, x, return_dict=False, **options)[0])
    return x


def ready(*call, **config):
    scheduler = FlowScheduler(**config)
    scheduler.set_timesteps(*call)
    return scheduler


def final(method, kind):
    """Options that choose the end of Runge-Kutta methods."""
    return {"final": kind} if "final" in inspect.signature(METHODS[method].build).parameters else {}


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_every_method_runs_as_in_sample(method):
    scheduler = ready(6, shift=3.0, method=method)
    assert len(scheduler.timesteps) == 6 * scheduler.order + METHODS[method].extra - (
        scheduler.order - 1 if method in ("heun", "rk4") else 0  # the methods that would ask at level 0
    )
    result = drive(scheduler, X)
    sigmas = schedule("shift", 6, shift=3.0)
    asked = scheduler.timesteps.double() / 1000  # float32 to the model; sample tells it exact levels
    expected = sample(velocity, X, sigmas, method=method, options=final(method, "euler"))
    assert result.dtype == F64 and scheduler.step_index == len(scheduler.timesteps) == len(asked)
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["heun", "rk4"])
def test_no_model_is_asked_at_zero_unless_it_is_wished(method):
    assert ready(4, method=method).timesteps.min() > 0
    exact = ready(4, method=method, method_options={"final": "exact"})
    assert exact.timesteps[-1] == 0 and len(exact.timesteps) == 4 * exact.order
    expected = sample(velocity, X, schedule("linear", 4), method=method)
    torch.testing.assert_close(drive(exact, X), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", DETERMINISTIC)
def test_time_that_runs_the_other_way_gives_the_same(method):
    inverted = ready(6, shift=2.0, method=method, invert_sigmas=True)
    plain = ready(6, shift=2.0, method=method)
    torch.testing.assert_close(inverted.timesteps, 1000 - plain.timesteps, rtol=1e-5, atol=1e-3)
    assert inverted.sigmas[0] == 0 and inverted.sigmas[-1] == 1
    torch.testing.assert_close(drive(inverted, X), drive(plain, X), rtol=0, atol=5e-6)


def test_stochastic_sampling_in_inverted_time_is_that_of_the_other():
    runs = [
        drive(
            ready(5, stochastic_sampling=True, invert_sigmas=i), X, generator=torch.Generator().manual_seed(1)
        )
        for i in (False, True)
    ]
    torch.testing.assert_close(*runs, rtol=0, atol=5e-6)


@pytest.mark.parametrize("method", STOCHASTIC)
def test_noise_within_the_launch_comes_from_the_generator(method):
    def run(seed):
        make = lambda s: torch.Generator().manual_seed(s)
        generator = [make(s) for s in seed] if isinstance(seed, list) else make(seed)
        return drive(ready(5, method=method), X, generator=generator)

    assert torch.equal(run(1), run(1)) and not torch.equal(run(1), run(2))
    several = run(list(range(len(X))))
    assert several.isfinite().all() and several.std() > 0.1
    other = run([0, *range(100, 100 + len(X) - 1)])
    assert torch.equal(several[0], other[0]) and not torch.equal(several[1], other[1])


def test_state_stays_exact_beside_a_16_bit_model():
    x = torch.linspace(-2.5, 2.5, 401).bfloat16()[:, None]
    exact = drive(ready(40), x.double())

    def error(**config):
        result = drive(ready(40, **config), x, dtype=torch.bfloat16)
        assert result.dtype == torch.bfloat16
        return (result.double() - exact).abs().mean().item()

    assert error() < 0.5 * error(compat="diffusers")


def test_a_sample_that_was_changed_is_taken():
    def run(change, **options):
        return drive(ready(5, method="ab2"), X.float().bfloat16(), change, dtype=torch.bfloat16, **options)

    plain, new = run(lambda x: x), run(lambda x: x + 0.5)
    in_place = run(lambda x: x.add_(0.5))
    assert torch.equal(new, in_place) and (new - plain).abs().min() > 0.3
    with torch.inference_mode():
        assert torch.equal(run(lambda x: x.add_(0.5)), new)


@pytest.mark.parametrize("method", sorted(set(DETERMINISTIC) - {"fireflow", "rfpp"}))
def test_image_to_image_begins_in_the_middle(method):
    scheduler = ready(8, shift=3.0, method=method)
    first = 3 * scheduler.order
    scheduler.set_begin_index(first)
    assert scheduler.begin_index == first and scheduler.step_index is None
    x = scheduler.scale_noise(X, scheduler.timesteps[first : first + 1], torch.ones_like(X))
    start = x
    for t in scheduler.timesteps[first:]:
        x = scheduler.step(field(x, t), t, x).prev_sample
    sigmas = schedule("shift", 8, shift=3.0)[3:]
    expected = sample(velocity, start, sigmas, method=method, options=final(method, "euler"))
    torch.testing.assert_close(x, expected, rtol=0, atol=2e-6)


def test_without_a_begin_index_the_timestep_says_where():
    heun = ready(6, method="heun")
    t = heun.timesteps[3]
    assert heun.timesteps[4] == t  # of equal ones the second begins a step
    heun.step(field(X, t), t, X)
    assert heun.step_index == 5


def test_equal_whole_timesteps_at_the_start_skip_no_step():
    scheduler = ready(100, shift=12.0, sigma_max=0.999, timestep_dtype="int64")
    assert scheduler.timesteps[0] == scheduler.timesteps[1] == 999
    drive(scheduler, X)
    assert scheduler.step_index == 100


@pytest.mark.parametrize("steps, options", [(50, {}), (20, {"shift": 3.0})])
def test_grid_of_wans_own_code(steps, options):
    scheduler = ready(steps, **{"shift": 5.0, "sigma_max": 0.999, "timestep_dtype": "int64", **options})
    model = "wan2.1-i2v-480p" if options else "wan2.1-t2v"
    torch.testing.assert_close(scheduler.sigmas, model_schedule(model, steps).float())
    if steps == 50:
        told = scheduler.timesteps.tolist()
        assert told[:3] == [999, 995, 991] and told[-1] == 92


def test_a_zero_at_the_end_of_sigmas_is_the_end():
    scheduler = FlowScheduler()
    scheduler.set_timesteps(sigmas=[1.0, 0.5, 0.0])
    assert scheduler.sigmas.tolist() == [1, 0.5, 0] and len(scheduler.timesteps) == 2


def test_configuration_is_that_of_diffusers(tmp_path):
    reference = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_beta_sigmas=True)
    scheduler = FlowScheduler.from_config(reference.config, method="heun")
    assert scheduler.config.shift == 3.0 and scheduler.config.use_beta_sigmas
    assert diffusers.FlowMatchEulerDiscreteScheduler in scheduler.compatibles
    back = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert back.config.shift == 3.0 and back.config.use_beta_sigmas
    scheduler.save_pretrained(tmp_path)
    again = FlowScheduler.from_pretrained(tmp_path)
    public = lambda config: {key: value for key, value in config.items() if not key.startswith("_")}
    assert public(again.config) == public(scheduler.config) and again.order == 2
    keys = inspect.signature(diffusers.FlowMatchEulerDiscreteScheduler.__init__).parameters
    assert set(keys) <= set(inspect.signature(FlowScheduler.__init__).parameters)
    assert len(scheduler) == 1000 and not hasattr(scheduler, "init_noise_sigma")
    assert torch.equal(scheduler.scale_model_input(X, 5), X)


def test_a_shift_that_is_set_holds_from_the_next_timesteps_on():
    scheduler = FlowScheduler()
    scheduler.set_shift(3.0)
    scheduler.set_timesteps(4)
    assert scheduler.shift == 3.0
    torch.testing.assert_close(scheduler.sigmas, schedule("shift", 4, shift=3.0).float())


def test_two_runs_at_once_do_not_meet():
    one, two = ready(4, method="ab2"), ready(4, method="ab2")
    x, y = X, 2 * X
    for t in one.timesteps:
        x, y = one.step(field(x, t), t, x).prev_sample, two.step(field(y, t), t, y).prev_sample
    assert torch.equal(x, drive(ready(4, method="ab2"), X))
    assert torch.equal(y, drive(ready(4, method="ab2"), 2 * X))


def flux_pipeline(scheduler):
    """A FLUX pipeline of random weights, without text encoders."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=1,
        block_out_channels=(4,),
        layers_per_block=1,
        norm_num_groups=1,
        use_quant_conv=False,
        use_post_quant_conv=False,
        shift_factor=0.0,
        scaling_factor=1.0,
    )
    pipe = diffusers.FluxPipeline(scheduler, vae, None, None, None, None, made("flux", torch.float32)[0])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def generated(pipe, steps=4):
    generator = torch.Generator().manual_seed(0)
    embeds = torch.randn(1, 5, 32, generator=generator), torch.randn(1, 32, generator=generator)
    return pipe(
        prompt_embeds=embeds[0],
        pooled_prompt_embeds=embeds[1],
        height=8,
        width=8,
        num_inference_steps=steps,
        generator=generator,
        output_type="latent",
        return_dict=False,
    )[0]


def test_a_pipeline_takes_the_scheduler():
    reference = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    pipe = flux_pipeline(reference)
    expected = generated(pipe)
    pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config)
    torch.testing.assert_close(generated(pipe), expected, rtol=1e-5, atol=1e-5)
    fine = generated(pipe, 64)
    for method in ("heun", "ab2"):
        pipe.scheduler = FlowScheduler.from_config(pipe.scheduler.config, method=method)
        better = generated(pipe, 16)
        assert (better - fine).norm() < (expected - fine).norm()


def stepped(scheduler, v=X, t=None, x=X, **options):
    return scheduler.step(v, scheduler.timesteps[0] if t is None else t, x, **options)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: FlowScheduler(method="dpm9"), "method must be one of euler, .*, got 'dpm9'"),
        (lambda: FlowScheduler(time_shift_type="log"), "must be exponential or linear, got 'log'"),
        (lambda: FlowScheduler(compat="comfy"), "compat must be None or 'diffusers', got 'comfy'"),
        (lambda: FlowScheduler(sigma_max=1.5), r"sigma_max must be in \(0, 1\], got 1.5"),
        (lambda: FlowScheduler(stochastic_sampling=True, method="heun"), "needs method 'euler', got 'heun'"),
        (lambda: FlowScheduler(use_beta_sigmas=True, use_karras_sigmas=True), "one of karras, exponential"),
        (lambda: FlowScheduler(timestep_dtype="int8"), "kind must be one of float64"),
        (lambda: ready(4, method="heun", method_options={"finally": 1}), "heun takes .*got finally"),
        (lambda: ready(), "must agree and one be given, got None and lengths"),
        (lambda: ready(0), "steps must be a whole number of at least 1, got 0"),
        (lambda: ready(4, None, [1.0, 0.5]), r"got 4 and lengths \[2\]"),
        (lambda: ready(None, None, [1.0, 0.5], None, [1000.0]), r"got None and lengths \[2, 1\]"),
        (lambda: ready(None, None, [0.5, 1.0]), "finite and strictly monotone|fall"),
        (lambda: ready(None, None, [1.5, 1.0]), "above 0 and up to 1"),
        (lambda: ready(None, None, [1.0, float("nan")]), "above 0 and up to 1"),
        (lambda: ready(4, use_dynamic_shifting=True), "mu must be given .*got None"),
        (lambda: ready(None, None, [1.0, 0.5], None, [9.0, 3.0], method="heun"), "of 3 evaluations, got 2"),
        (lambda: FlowScheduler().step(X, torch.tensor(1000.0), X), "set_timesteps must be called first"),
        (lambda: stepped(ready(4), t=0), "not an index, got 0"),
        (lambda: stepped(ready(4), t=torch.tensor(0)), "not an index, got 0"),
        (lambda: stepped(ready(4, timestep_dtype="int64"), t=3), "not an index, got 3"),
        (lambda: stepped(ready(4), t=torch.tensor(123.0)), r"timestep must be one of \[1000.*, got 123.0"),
        (lambda: stepped(ready(4, method="heun"), t=torch.tensor(1000.0), v=X[:2]), "have the shape of x"),
        (lambda: stepped(ready(4), per_token_timesteps=torch.ones(1, 2)), r"\[batch, tokens, channels\]"),
        (lambda: stepped(ready(4, method="ab2"), per_token_timesteps=X), "'euler' without noise, got 'ab2'"),
    ],
)  # fmt: skip
def test_scheduler_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_call_more_than_timesteps_is_refused():
    scheduler = ready(2)
    drive(scheduler, X)
    with pytest.raises(ValueError, match="there are 2 timesteps, and this call is one more"):
        stepped(scheduler)


def test_a_beginning_within_a_step_is_refused():
    scheduler = ready(4, method="heun")
    scheduler.set_begin_index(1)
    with pytest.raises(ValueError, match="first evaluation of a step, got 1 of 7 timesteps"):
        stepped(scheduler)


@pytest.mark.parametrize("method", ["fireflow", "rfpp"])
def test_methods_that_need_their_beginning_say_so(method):
    scheduler = ready(4, method=method)
    scheduler.set_begin_index(2)
    with pytest.raises(
        ValueError, match=r"cannot begin in the middle|first evaluation|first level must be 1"
    ):
        stepped(scheduler)


def test_one_generator_for_each_sample_or_one():
    for method in STOCHASTIC[:1]:
        with pytest.raises(ValueError, match="one for each of 11 samples, got 2"):
            stepped(ready(4, method=method), generator=[torch.Generator(), torch.Generator()])
