"""Our blocks are diffusers' blocks."""

import pytest
import torch

from tests.blocks import image_problems, problems
from tests.blocks.parity import errors, run

PROBLEMS = [*problems.PROBLEMS, *image_problems.PROBLEMS]
every_block = pytest.mark.parametrize("problem", PROBLEMS, ids=str)


@every_block
def test_outputs_and_gradients_in_float32(problem):
    exact = run(problem, problem.theirs, torch.float32)
    found = errors(problem, run(problem, problem.ours, torch.float32), exact)
    assert {name: error for name, error in found.items() if not error <= 1e-5} == {}


@every_block
def test_no_less_exact_than_diffusers_in_bfloat16(problem):
    exact = run(problem, problem.theirs, torch.float32)
    ours = errors(problem, run(problem, problem.ours, torch.bfloat16), exact)
    theirs = errors(problem, run(problem, problem.theirs, torch.bfloat16), exact)
    noise = {f"gradient of {name}" for name in problem.flat}
    worse = {
        name: (ours[name], theirs[name]) for name in ours.keys() - noise if not ours[name] <= 2 * theirs[name]
    }
    assert worse == {}


@pytest.mark.parametrize("name", ["flux-double-64", "wan-per-token", "lumina2", "flux3"])
def test_a_block_is_one_graph(name):
    (problem,) = (p for p in PROBLEMS if p.name == name)
    compiled = torch.compile(problem.ours, fullgraph=True, backend="aot_eager")
    eager = run(problem, problem.ours, torch.float32)
    found = errors(problem, run(problem, compiled, torch.float32), eager)
    assert max(found.values()) <= 1e-5
