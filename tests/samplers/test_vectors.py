"""One step of the methods and guides on eight printed numbers, float64: sigma .6 -> .45, w = 4."""

import pytest
import torch

from rfkernels.samplers import (
    APG,
    CFG,
    CFGZeroStar,
    NormMatched,
    Rescaled,
    init,
    plan_for,
    sample,
    step,
    step_coefficients,
)

F64 = torch.float64
_I = torch.arange(8, dtype=F64)
X, U, Z = torch.sin(_I + 1)[None], torch.cos(0.7 * _I + 0.3)[None], torch.cos(3 * _I)[None]
C = (torch.cos(0.7 * _I + 0.5) + 0.1 * _I / 8)[None]
SIGMAS = torch.tensor([0.6, 0.45], dtype=F64)
CFG_EULER = [0.744822868, 0.927518812, 0.262113726, -0.596996415,
             -0.846047230, -0.280664796, 0.524561687, 0.766875023]  # fmt: skip
GRPO_MEAN = [0.600272295, 0.755751040, 0.183860184, -0.534250416,
             -0.695748760, -0.143348128, 0.584933288, 0.763591438]  # fmt: skip
GRPO_NEXT = [0.932311449, 0.427034769, 0.502674314, -0.836781338,
             -0.415556205, -0.395594260, 0.804184289, 0.581723878]  # fmt: skip
GUIDED = {
    CFG(4.0): [0.644320780, -0.121475900, -0.806624785, -1.065373867,
               -0.752513629, 0.008328652, 0.882832744, 1.483221490],
    CFGZeroStar(4.0, zero_steps=0): [0.832481361, -0.015059368, -0.832001660, -1.210609008,
                                     -0.949300680, -0.147458283, 0.841314954, 1.575499310],
    APG(4.0, eta=0.5, r=0.2): [0.828922231, 0.275443371, -0.398222315, -0.865880832,
                               -0.898226576, -0.470688344, 0.225014450, 0.871040407],
    Rescaled(4.0, phi=0.7): [0.538959117, -0.101611721, -0.674722584, -0.891160081,
                             -0.629459880, 0.006966721, 0.738468743, 1.240679751],
}  # fmt: skip
TOKENS = [0.559568537, -0.105497283, -0.700523503, -0.925237419,
          -0.529242250, 0.005857535, 0.620895582, 1.043148520]  # fmt: skip


def printed(values):
    return pytest.approx(values, abs=6e-10)


def test_euler_with_guidance():
    result = sample(lambda x, sigma: (U, C), X, SIGMAS, guidance=4.0)
    assert result.flatten().tolist() == printed(CFG_EULER)


@pytest.mark.parametrize("guide", GUIDED, ids=lambda g: type(g).__name__)
def test_guided_velocity(guide):
    result = (sample(lambda x, sigma: (U, C), X, SIGMAS, guidance=guide) - X) / -0.15
    assert result.flatten().tolist() == printed(GUIDED[guide])


def test_norm_matched_is_of_tokens():
    u, c, x = (t.view(1, 2, 4) for t in (U, C, X))
    result = (sample(lambda x, sigma: (u, c), x, SIGMAS, guidance=NormMatched(4.0)) - x) / -0.15
    assert result.flatten().tolist() == printed(TOKENS)


def coefficients(plan, index=-1):
    return {name: dict(form) for name, form in plan.stages[index].writes.items()}


@pytest.mark.parametrize("method, data, older", [
    ("dpmpp_2m_neglog", 0.375, -0.125), ("dpmpp_2m", 0.327247875, -0.077247875),
])  # fmt: skip
def test_coefficients_of_2m(method, data, older):
    found = coefficients(plan_for(method, torch.tensor([0.8, 0.6, 0.45], dtype=F64)))["x"]
    # x' = .75 x + data (x - .6 v) + older D_last
    assert [found["x"], found["v"], found["D1"]] == printed([0.75 + data, -0.6 * data, older])


def test_unipc_corrects_and_predicts_as_printed():
    """The step .6 -> .45 with history .8, then what the next evaluation makes of it."""
    sigmas = torch.tensor([0.8, 0.6, 0.45, 0.3], dtype=F64)
    m1, m0, mt = (torch.randn(1, 4, dtype=F64, generator=torch.manual_seed(i)) for i in range(3))
    x = torch.randn(1, 4, dtype=F64)
    state = init(plan_for("unipc", sigmas, lower_order_final=False), x)
    state = step(state, (x - m1) / 0.8)  # velocities whose estimates of the data are m1, m0, mt
    predicted = state.x  # of first order, at .6; corrected by order 1
    corrected = predicted + (1 - 0.6 / 0.8) / 2 * (m0 - m1)
    state = step(state, (state.x - m0) / 0.6)
    e, r1, rho1, rho2 = -0.454545455, -1.618167492, 0.063271336, 0.486933364
    predictor = 0.75 * corrected - 0.55 * e * m0 - 0.55 * e * 0.5 * (m1 - m0) / r1
    torch.testing.assert_close(state.x, predictor, rtol=0, atol=1e-8)
    state = step(state, (state.x - mt) / 0.45)
    corrected = 0.75 * corrected - 0.55 * e * m0
    corrected = corrected - 0.55 * e * (rho1 * (m1 - m0) / r1 + rho2 * (mt - m0))
    expected = sample(lambda x, sigma: (x - mt) / 0.45, corrected, sigmas[2:], method="euler")
    # the predictor to .3 continues from there, with mt and m0
    h = torch.logit(sigmas[2]) - torch.logit(sigmas[3])
    r = (torch.logit(sigmas[2]) - torch.logit(sigmas[1])) / h
    expected = corrected * (0.3 / 0.45) + (1 - 0.3 / 0.45) * (mt + 0.5 * (m0 - mt) / r)
    torch.testing.assert_close(state.x, expected, rtol=0, atol=1e-8)


def test_coefficients_of_ab2_with_steps_of_two_lengths():
    found = coefficients(plan_for("ab2", torch.tensor([0.8, 0.6, 0.45], dtype=F64)))["x"]
    assert [found["x"], found["v"], found["v1"]] == printed([1.0, -0.206250000, 0.056250000])


def test_flow_grpo_has_its_mean_and_next_state():
    plan = plan_for("euler_sde", SIGMAS)
    form = coefficients(plan)["x"]
    mean = form["x"] * X + form["v"] * C
    assert mean.flatten().tolist() == printed(GRPO_MEAN)
    result = mean + plan.stages[0].noise["x"] * Z
    assert result.flatten().tolist() == printed(GRPO_NEXT)
    assert plan.stages[0].noise["x"] == pytest.approx(0.857321410 * 0.15**0.5, abs=1e-9)


def test_coefficients_of_the_way_back_up():
    """Overshooting from .8 + h to .6 and up to .8 again: k = .5, std = .7416."""
    stage = plan_for("overshoot", torch.tensor([0.9, 0.8], dtype=F64), amount=2.0).stages[0]
    assert stage.writes["x"]["x"] == printed(0.5)
    assert stage.noise["x"] == printed(0.741619849)


@pytest.mark.parametrize("prediction, a, b", [
    ("eps", 1.187500000, -0.400250100), ("u", 0.901607071, -0.228714343), ("w", 0.947349940, -0.320200080),
])  # fmt: skip
def test_steps_of_the_vp_path(prediction, a, b):
    found = step_coefficients(prediction, 0.8, 0.6, 0.95, (1 - 0.95**2) ** 0.5)
    assert found == pytest.approx((a, b), abs=6e-10)
