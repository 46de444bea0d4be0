"""klein-kv: references are computed in the first step, their keys and values seen in later ones."""

import pytest
import torch

import rfkernels
from rfkernels.integrations.accelerate import accelerated
from tests.models.cases.flux2 import CASES, KLEIN, case, ids
from tests.models.parity import cast, error, models, normal

REFERENCES = 12 + 6
STEPS = [
    case("klein-kv", KLEIN),
    case("a guided model", guided=True, batch=1),
]
STEPS_OF = {"ref_fixed_timestep": 0.125}


def two_steps(model, inputs, first: dict, later: dict):
    """The results of the step with references, and of one without them; what both got of the first."""
    reference_ids = torch.cat([ids(3, 4, 10), ids(2, 3, 20)])
    x, noise_ids = inputs["hidden_states"], inputs["img_ids"]
    references = normal(len(x), REFERENCES, x.shape[-1], seed=4).to(x.dtype)
    both = {
        "hidden_states": torch.cat([references, x], 1),
        "img_ids": torch.cat([reference_ids, noise_ids]),
        "num_ref_tokens": REFERENCES,
    }
    start = model(**inputs | both | first)
    return start, model(**inputs | {"timestep": inputs["timestep"] / 2} | later(start))


def with_processors(model):
    """Processors of klein-kv, as its pipeline puts them there."""
    from diffusers.models.transformers import transformer_flux2 as flux2

    for blocks, processor in [
        (model.transformer_blocks, flux2.Flux2KVAttnProcessor),
        (model.single_transformer_blocks, flux2.Flux2KVParallelSelfAttnProcessor),
    ]:
        for block in blocks:
            block.attn.set_processor(processor())
    return model


def theirs_of(model, inputs):
    first = STEPS_OF | {"kv_cache_mode": "extract", "return_dict": False}

    def later(start):
        return {"kv_cache": start[1], "kv_cache_mode": "cached", "return_dict": False}

    return [out[0] for out in two_steps(model, inputs, first, later)]


def ours_of(model, inputs):
    kept = {}
    return two_steps(model, inputs, STEPS_OF | {"kv_cache": kept}, lambda _: {"kv_cache": kept})


@pytest.mark.parametrize("case", STEPS, ids=str)
@torch.no_grad()
def test_both_steps(case):
    theirs, ours = models(case)
    exact = theirs_of(with_processors(theirs), case.inputs())
    for result, expected in zip(ours_of(ours, case.inputs()), exact, strict=True):
        assert result.shape == expected.shape
        assert error(result, expected) <= 4e-6
    theirs, ours = models(case, torch.bfloat16)
    inputs = cast(case.inputs(), torch.bfloat16)
    results = zip(ours_of(ours, inputs), theirs_of(with_processors(theirs), inputs), exact, strict=True)
    assert all(error(a, expected) <= 2 * error(b, expected) for a, b, expected in results)


@torch.no_grad()
def test_blocks_of_diffusers():
    inputs, model = STEPS[0].inputs(), with_processors(models(STEPS[0])[0])
    expected = theirs_of(model, inputs)
    for quant, bound in [(None, 4e-6), ({"method": "int8", "min_size": 0}, 0.05)]:
        rfkernels.accelerate(model, quant)
        for result, exact in zip(theirs_of(model, inputs), expected, strict=True):
            assert error(result, exact) <= bound
        assert all(site.calls == 2 and not site.declined for site in accelerated(model).sites.values())
        rfkernels.restore(model)


@torch.no_grad()
def test_errors():
    model, inputs = CASES[3].ours_class(**CASES[3].config), CASES[3].inputs()
    for arguments, match in [
        ({"num_ref_tokens": 3}, "must be 0 to 35, and 0 without a kv_cache, got 3"),
        ({"num_ref_tokens": 36, "kv_cache": {}}, "must be 0 to 35, and 0 without a kv_cache, got 36"),
        ({"num_ref_tokens": -1, "kv_cache": {}}, "got -1"),
        ({"kv_cache": {}}, "must be filled by a call with num_ref_tokens, got an empty one"),
    ]:
        with pytest.raises(ValueError, match=match):
            model(**inputs, **arguments)
