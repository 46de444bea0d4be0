"""Plans and states: pure steps, resumption, memory, levels per sample and frame, own stages."""

from dataclasses import replace

import pytest
import torch

from rfkernels import samplers
from rfkernels.ops import noise_keys
from rfkernels.samplers import APG, METHODS, Plan, Stage, init, plan_for, schedule, step

F64 = torch.float64
GRID = schedule("shift", 5, shift=2.0)
FIXED = [m for m in METHODS if not METHODS[m].adaptive]
every_method = pytest.mark.parametrize("method", FIXED)


def velocity(x, sigma):
    level = sigma.reshape(*sigma.shape, *[1] * (x.ndim - sigma.ndim))
    return torch.sin(3 * x) - level * x


def sample(v, x, grid, method, **options):
    return samplers.sample(v, x, grid, method=method, seeds=list(range(len(x))), **options)


def start(method, x, grid=GRID):
    return init(plan_for(method, grid), x, keys=noise_keys(list(range(len(x))), len(x)))


def finish(state, count=None):
    while not state.done and count != 0:
        state, count = step(state, velocity(state.x, state.sigma)), None if count is None else count - 1
    return state


@every_method
def test_stepping_is_sampling(method):
    x = torch.randn(2, 7)
    with torch.no_grad():
        assert torch.equal(finish(start(method, x)).x, sample(velocity, x, GRID, method))


@every_method
def test_a_step_changes_nothing_that_was(method):
    first = start(method, torch.randn(2, 7))
    while not first.done:
        before = {name: t.clone() for name, t in first.memory.items()}
        v = velocity(first.x, first.sigma)
        one, two = step(first, v), step(first, v)
        assert all(torch.equal(t, before[name]) for name, t in first.memory.items())
        assert one.memory.keys() == two.memory.keys()
        assert all(torch.equal(t, two.memory[name]) for name, t in one.memory.items())
        first = one


@every_method
def test_interleaved_requests_do_not_see_each_other(method):
    a, b = torch.randn(2, 7), torch.randn(2, 7)
    alone = [finish(start(method, x)).x for x in (a, b)]
    one, two = finish(start(method, a), 2), start(method, b)
    while not (one.done and two.done):
        one, two = finish(one, 1), finish(two, 1)
    assert torch.equal(one.x, alone[0]) and torch.equal(two.x, alone[1])


@every_method
def test_a_run_can_be_resumed_after_an_error(method):
    x = torch.randn(2, 7)
    expected = finish(start(method, x)).x
    state, failed = start(method, x), False
    while not state.done:
        try:
            new = step(state, velocity(state.x, state.sigma))
            if new.index == 3 and not failed:
                failed = True
                raise KeyboardInterrupt
            state = new
        except KeyboardInterrupt:
            continue
    assert failed and torch.equal(state.x, expected)


def test_a_callback_that_raises_ends_the_loop_and_another_run_is_not_disturbed():
    x = torch.randn(2, 7)

    def stop(info):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        sample(velocity, x, GRID, "lcm", callback=stop)
    assert torch.equal(sample(velocity, x, GRID, "lcm"), finish(start("lcm", x)).x)


def test_generators_step_purely_too():
    x = torch.randn(1, 5)
    state = init(plan_for("lcm", GRID), x, keys=[torch.Generator().manual_seed(3)])
    state = step(state, velocity(state.x, state.sigma))
    v = velocity(state.x, state.sigma)
    assert torch.equal(step(state, v).x, step(state, v).x)
    assert torch.equal(finish(state).x, finish(state).x)


@every_method
def test_nothing_is_remembered_that_nobody_reads(method):
    state = finish(start(method, torch.randn(2, 7)))
    assert state.memory.keys() <= {"x", "start"}
    most = {"rk4": 5, "unipc": 3, "ab3": 3, "ab4": 4, "taylor": 3, "dpmpp_3m": 3, "heun": 3, "ralston": 3}
    state, seen = start(method, torch.randn(2, 7)), 0
    while not state.done:
        state = finish(state, 1)
        seen = max(seen, len({t.data_ptr() for t in state.memory.values()}))
    assert seen <= most.get(method, 2)


def test_the_end_is_the_end():
    state = finish(start("euler", torch.randn(2, 7)))
    for ask in (lambda: step(state, state.x), lambda: state.sigma, lambda: state.stage):
        with pytest.raises(ValueError, match="the plan is done after its 5 evaluations"):
            ask()


@every_method
@pytest.mark.parametrize("shape", [(3,), (3, 1, 4)])
def test_levels_of_rows_are_those_of_each_alone(method, shape):
    """Per sample and per frame, with rows that all move, at different levels."""
    x = torch.randn(3, 2, 4, dtype=F64) if len(shape) == 3 else torch.randn(3, 5, dtype=F64)
    factors = torch.linspace(0.4, 1.0, torch.Size(shape).numel(), dtype=F64).view(shape)
    if method == "rfpp":
        factors = torch.ones(shape, dtype=F64)
    levels = GRID.view(-1, *[1] * len(shape)) * factors
    plan = plan_for(method, levels)
    result = finish(init(plan, x, keys=noise_keys([1, 2, 3], 3))).x
    rows = [(b, f) for b in range(3) for f in range(shape[-1] if len(shape) == 3 else 1)]
    if plan.stochastic or method == "unipc":
        rows = rows[:1]
    for b, f in rows:
        index = (slice(b, b + 1), slice(None), slice(f, f + 1)) if len(shape) == 3 else (slice(b, b + 1),)
        alone = plan_for(method, levels[:, b, 0, f] if len(shape) == 3 else levels[:, b])
        if alone.stochastic:
            for one, many in zip(alone.stages, plan.stages, strict=True):
                row = many.writes["x"]
                for name, value in one.writes["x"].items():
                    found = torch.as_tensor(row[name]).expand(shape).reshape(-1)[0]
                    assert float(found) == pytest.approx(float(value), abs=1e-12)
            continue
        expected = finish(init(alone, x[index])).x
        torch.testing.assert_close(result[index], expected, rtol=0, atol=1e-12)


@every_method
def test_frames_that_rest_stay_and_the_others_do_not_notice(method):
    """One frame is data all along, one begins to move late, one stops early; PUSA's levels of frames."""
    grid = torch.tensor([1.0, 0.8, 0.6, 0.35, 0.1, 0.0], dtype=F64)
    late = torch.tensor([0.7, 0.7, 0.7, 0.4, 0.2, 0.0], dtype=F64)
    early = torch.tensor([1.0, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=F64)
    if method == "rfpp":
        late = torch.tensor([1.0, 1.0, 1.0, 0.4, 0.2, 0.0], dtype=F64)
    columns = [grid, torch.full_like(grid, 1.0 if method == "rfpp" else 0.0), late, early]
    levels = torch.stack(columns, -1).view(6, 1, 1, 4)
    x = torch.randn(1, 2, 4, dtype=F64)
    state = init(plan_for(method, levels), x, keys=noise_keys(0, 1))
    result = finish(state).x
    assert result.isfinite().all()
    assert torch.equal(result[:, :, 1], x[:, :, 1])
    if not state.plan.stochastic:
        for f, own in ((0, grid), (2, late[2:]), (3, early[:3])):
            alone = finish(init(plan_for(method, own), x[:, :, f : f + 1])).x
            tolerance = 1e-12 if method != "unipc" or f != 3 else 0.2  # its last step is lower there alone
            torch.testing.assert_close(result[:, :, f : f + 1], alone, rtol=0, atol=tolerance)


@pytest.mark.parametrize("method", ["ab2", "ab3", "ab4", "taylor"])
def test_weights_of_velocities_sum_to_the_step_where_a_level_rests_between_moves(method):
    levels = torch.tensor([1.0, 0.8, 0.8, 0.5, 0.2, 0.0], dtype=F64)[:, None] * torch.tensor(
        [1.0, 0.5], dtype=F64
    )
    levels[2, 1] = 0.35  # the second does not rest
    plan = plan_for(method, levels)
    for stage, h in zip(plan.stages, levels.diff(dim=0), strict=True):
        weights = [torch.as_tensor(w) for name, w in stage.writes["x"].items() if name != "x"]
        torch.testing.assert_close(sum(weights), h)


def test_rows_that_all_agree_are_the_plain_grid():
    x = torch.randn(2, 3, 4, dtype=F64)
    for method in FIXED:
        levels = GRID.view(-1, 1, 1, 1).expand(-1, 2, 1, 4)
        rows = finish(start(method, x, levels)).x
        torch.testing.assert_close(rows, finish(start(method, x)).x, rtol=0, atol=1e-13)


def test_a_frame_of_dirac_data_ends_there():
    """Conditioning frames with levels m sigma, from (1 - m) z + m eps with the exact velocity to z."""
    z, eps = torch.randn(2, 2, 3, 4, dtype=F64)
    m = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=F64)
    levels = GRID.view(-1, 1, 1, 1) * m
    exact = lambda x, sigma: (x - z) / torch.where(sigma == 0, 1.0, sigma)
    result = sample(exact, (1 - m) * z + m * eps, levels, "euler")
    torch.testing.assert_close(result, z, rtol=0, atol=1e-14)


def test_levels_reach_the_velocity_in_the_shape_of_rows():
    seen = []
    x = torch.randn(2, 3, 4)
    levels = GRID.view(-1, 1, 1, 1).expand(-1, 1, 1, 4)
    sample(lambda x, sigma: seen.append(sigma) or velocity(x, sigma), x, levels, "heun")
    assert all(s.shape == (2, 1, 4) and s.dtype == x.dtype for s in seen)


def test_stages_of_ones_own():
    """A plan by hand: x' = x + h v + y, with the velocity before as a memory, and noise."""
    stages = (
        Stage(1.0, {"x": {"x": 1.0, "v": -0.5, "y": 2.0}}, keeps={"old": "v"}, step=0),
        Stage(0.5, {"x": {"x": 0.0, "v": 3.0, "old": 1.0}}, noise={"x": 0.0}, step=1),
    )
    plan = Plan("mine", 1, (1.0, 0.5, 0.0), stages)
    x, y, v, w = torch.randn(4, 2, 3, dtype=F64)
    state = step(step(init(plan, x, memory={"y": y}), v), w)
    torch.testing.assert_close(state.x, 3 * w + v)


@pytest.mark.parametrize("stages, message", [
    ((Stage(1.0, {"x": {"x": 1.0, "w": 1.0}}),), r"mine: step 0 reads \['w'\], which nothing wrote"),
    ((Stage(1.0, {"x": {f"y{i}": 1.0 for i in range(9)}}),), "step 0 combines 10 tensors, at most 8"),
])  # fmt: skip
def test_plans_refuse(stages, message):
    memory = {f"y{i}": torch.zeros(1, 1).half() for i in range(9)}
    with pytest.raises(ValueError, match=message):
        init(Plan("mine", 1, (1.0, 0.0), stages), torch.zeros(1, 1), memory=memory)


def test_more_than_three_results_take_two_launches():
    """With momentum, a kept velocity and a preview: four results, in the values of one."""
    pair = lambda x, sigma: (velocity(x, sigma), torch.cos(x))
    seen = []
    x = torch.randn(2, 7, dtype=F64)
    guide = APG(2.0, 0.5, 1.0, -0.3)
    result = sample(pair, x, GRID, "ab2", guidance=guide, callback=seen.append)
    assert torch.equal(result, sample(pair, x, GRID, "ab2", guidance=guide)) and len(seen) == 5
    with torch.no_grad():
        assert torch.equal(result, sample(pair, x, GRID, "ab2", guidance=guide))


@pytest.mark.parametrize("call, message", [
    (lambda: init(plan_for("euler", GRID), torch.zeros(2, 3).long()), "and floating"),
    (lambda: init(plan_for("lcm", GRID), torch.zeros(2, 3)), "lcm draws noise: pass seeds="),
    (lambda: init(plan_for("lcm", GRID), torch.zeros(2, 3), keys=noise_keys(1, 3)), r"must be int64\[2, 3\]"),
    (lambda: plan_for("ab4", GRID, order=5), "order of Adams-Bashforth must be 1 to 4, got 5"),
    (lambda: plan_for("ab4", GRID, start="heun"), "start must be one of euler, midpoint, rk4, got 'heun'"),
    (lambda: plan_for("taylor", GRID, order=1), "must be 2, 3 or 4, got 1"),
    (lambda: plan_for("unipc", GRID, order=4), "order of UniPC must be 1, 2 or 3, got 4"),
    (lambda: plan_for("heun", GRID, final="heun"), "final must be one of exact, euler, got 'heun'"),
    (lambda: plan_for("dpmpp_2m", GRID, lambda_="t"), "lambda_ must be one of logsnr, neg_log_sigma"),
    (lambda: plan_for("dpmpp_3m", GRID, compat="wan"), "compat must be diffusers, got 'wan'"),
    (lambda: plan_for("dpmpp_2m", GRID * 2), r"dpmpp_2m needs noise levels in 0 \.\. 1, got 0 \.\. 2"),
    (lambda: plan_for("euler", GRID[:1]), "at least one step"),
    (lambda: plan_for("euler", GRID[:, None] * torch.tensor([1.0, -1.0])), "strictly monotone"),
    (lambda: plan_for("euler", torch.ones(3, 2)), "strictly monotone"),
    (lambda: plan_for("euler", torch.empty(0)), "at least one step"),
])  # fmt: skip
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_a_state_of_another_plan_is_what_its_fields_say():
    state = start("ab2", torch.randn(2, 7))
    assert replace(state, index=0).x is state.x and state.velocities == ("cond",)
