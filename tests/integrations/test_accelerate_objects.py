"""`accelerate` on what is made of a model: copies, pickles, compiled ones; and on a block alone."""

import copy
import pickle

import pytest
import torch

import rfkernels
from rfkernels.integrations.accelerate import accelerated
from tests.integrations.test_accelerate import CASE, run
from tests.models.parity import error, models


@pytest.fixture
def model():
    with torch.no_grad():
        yield models(CASE)[0]


def test_what_torch_compile_made_of_it(model):
    expected = run(model)
    compiled = torch.compile(model, backend="eager")
    assert rfkernels.accelerate(compiled) is compiled
    assert error(run(compiled), expected) <= 4e-6 and accelerated(model) is not None
    rfkernels.restore(compiled)
    assert torch.equal(run(model), expected)


def test_copies_are_models_of_their_own(model):
    rfkernels.accelerate(model)
    expected = run(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(run(other), expected)
        for parameter in other.parameters():
            parameter.zero_()
        assert not run(other).any() and torch.equal(run(model), expected)
        rfkernels.restore(other)
        assert accelerated(model) is not None


def test_one_graph(model):
    expected = run(model)
    rfkernels.accelerate(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert error(run(compiled), expected) <= 4e-6


def test_a_block_alone(model):
    block = model.transformer_blocks[0]
    tokens, text, temb = (
        torch.randn(2, *s, generator=torch.Generator().manual_seed(i))
        for i, s in enumerate([(5, 72), (3, 72), (72,)])
    )
    expected = block(tokens, text, temb)
    rfkernels.accelerate(block)
    result = block(tokens, text, temb)
    assert accelerated(block).sites[""].calls == 1
    assert max(error(a, b) for a, b in zip(result, expected, strict=True)) <= 4e-6
    rfkernels.restore(block)
    assert "forward" not in block.__dict__
