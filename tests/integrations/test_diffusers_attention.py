"""Transformers of diffusers with our attention give what they give with their own."""

import copy
import subprocess
import sys

import pytest
import torch
from diffusers.models import attention_dispatch as dispatch
from diffusers.models.attention_processor import Attention

import rfkernels
from rfkernels.integrations import diffusers as ours
from tests.integrations.models import CALLS, MODELS, made, run

F32, BF16 = torch.float32, torch.bfloat16
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def own_backend():
    """`set_attention_backend` of one model is that of all."""
    registry = dispatch._AttentionBackendRegistry
    before = registry.get_active_backend()[0]
    yield
    registry.set_active_backend(before)


@pytest.fixture
def calls(monkeypatch):
    """The calls of our op by a model."""
    noted, real = [], ours.attention

    def attention(q, k, v, **options):
        noted.append((q, k, v, options))
        return real(q, k, v, **options)

    monkeypatch.setattr(ours, "attention", attention)
    return noted


def error(result, truth):
    return ((result.double() - truth.double()).norm() / truth.double().norm()).item()


@every_model
def test_float32_output_is_their_own(name):
    assert error(run(name, F32, rfkernels.use_attention), run(name, F32)) < 1e-5


@every_model
def test_bfloat16_output_is_as_near_to_the_truth_as_their_own(name):
    truth = run(name, F32)
    theirs = error(run(name, BF16), truth)
    assert 1e-4 < theirs < 0.1 and error(run(name, BF16, rfkernels.use_attention), truth) <= 2 * theirs


@every_model
@pytest.mark.parametrize("precision", ["int8", "auto"])
def test_eight_bits_change_little(name, precision):
    result = run(name, F32, lambda model: rfkernels.use_attention(model, precision))
    assert error(result, run(name, F32)) < 0.03


@every_model
def test_every_attention_is_our_op(name, calls):
    run(name, F32, lambda model: rfkernels.use_attention(model, "auto"))
    assert len(calls) == CALLS[name]
    assert {options["precision"] for *_, options in calls} == {"auto"}
    assert {options["layout"] for *_, options in calls} == {"blhd"}


@every_model
def test_output_depends_on_the_attention(name, monkeypatch):
    """Else the tests above would say nothing."""
    real, change = ours.attention, torch.linspace(0.9, 1.1, 16)  # along d: a norm may follow
    monkeypatch.setattr(ours, "attention", lambda *args, **options: change * real(*args, **options))
    assert error(run(name, F32, rfkernels.use_attention), run(name, F32)) > 1e-3


@every_model
def test_model_gets_its_own_attention_back(name, calls):
    model, inputs = made(name, F32)
    processors = {
        key: module.processor for key, module in model.named_modules() if hasattr(module, "processor")
    }
    own = model(**inputs, return_dict=False)[0]
    for precision in ("int8", "full"):
        assert rfkernels.use_attention(model, precision) is model
    twin = copy.deepcopy(model)
    for restored in (model, twin):
        assert rfkernels.stop_using_attention(restored) is restored
        assert torch.equal(restored(**inputs, return_dict=False)[0], own)
    assert not calls
    assert all(model.get_submodule(key).processor is p for key, p in processors.items())
    rfkernels.stop_using_attention(model)  # a second time: nothing to do


def test_slices_of_one_projection_are_not_copied(calls):
    run("sd3_fused", F32, rfkernels.use_attention)
    assert calls
    for q, k, v, _ in calls:
        assert len({t.untyped_storage().data_ptr() for t in (q, k, v)}) == 1


@pytest.mark.parametrize("name", ["flux", "sd35", "hidream", "wan_i2v"])
def test_model_compiles_without_a_break(name):
    model, inputs = made(name, F32)
    rfkernels.use_attention(model)
    with torch.no_grad():
        expected = model(**inputs, return_dict=False)[0]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs, return_dict=False)[0], expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_their_own():
    def gradients(change):
        model, inputs = made("sd35", F32)
        change(model)
        model(**inputs, return_dict=False)[0].square().sum().backward()
        return {key: p.grad for key, p in model.named_parameters() if p.grad is not None}

    theirs, own = gradients(lambda model: None), gradients(rfkernels.use_attention)
    assert theirs.keys() == own.keys()
    for key, grad in theirs.items():
        torch.testing.assert_close(own[key], grad, rtol=1e-3, atol=1e-4 * grad.abs().max().item() + 1e-6)


def test_backends_are_registered_once(calls):
    names = ours.register_attention_backend()
    members = list(dispatch.AttentionBackendName)
    assert names == ("rfkernels", "rfkernels_int8", "rfkernels_fp8", "rfkernels_auto")
    functions = dict(dispatch._AttentionBackendRegistry._backends)
    assert ours.register_attention_backend() == names and list(dispatch.AttentionBackendName) == members
    assert dispatch._AttentionBackendRegistry._backends == functions
    assert [m.value for m in members].count("rfkernels") == 1
    member = dispatch.AttentionBackendName("rfkernels_int8")
    assert member is dispatch.AttentionBackendName["RFKERNELS_INT8"] is copy.deepcopy(member)
    assert member.name == "RFKERNELS_INT8" and member == "rfkernels_int8"


def test_backends_are_set_as_diffusers_does(calls):
    ours.register_attention_backend()
    expected = run("flux", F32)
    result = run("flux", F32, lambda model: model.set_attention_backend("rfkernels_auto"))
    assert error(result, expected) < 0.03 and [c[-1]["precision"] for c in calls] == ["auto"] * 2
    dispatch._AttentionBackendRegistry.set_active_backend(dispatch.AttentionBackendName.NATIVE)
    with dispatch.attention_backend("rfkernels"):
        assert error(run("flux", F32), expected) < 1e-5
    assert len(calls) == 4


def test_another_dispatcher_is_named(monkeypatch):
    monkeypatch.delattr(dispatch, "_AttentionBackendRegistry")
    with pytest.raises(RuntimeError, match=r"required a diffusers \(as 0.42\).*without register, _backends"):
        ours.register_attention_backend()


def test_diffusers_is_asked_for_where_it_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers.models.attention_dispatch", None)
    with pytest.raises(ImportError, match=r"pip install diffusers"):
        rfkernels.use_attention(torch.nn.Linear(2, 2))


def test_diffusers_is_not_imported_with_the_package():
    code = "import sys, rfkernels; rfkernels.use_attention; print('diffusers' in sys.modules)"
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed == "False\n"


class OtherProcessor:
    def __call__(self, attn, hidden_states, **_):
        return hidden_states


def test_models_that_are_not_known_stay_as_they_are():
    model, _ = made("sd35", F32)
    model.transformer_blocks[2].attn.processor = OtherProcessor()
    with pytest.raises(
        ValueError, match=r"SD3Transformer2DModel has the processor OtherProcessor; expected Attn"
    ):
        rfkernels.use_attention(model)
    assert type(model.transformer_blocks[0].attn.processor).__name__ == "JointAttnProcessor2_0"
    with pytest.raises(ValueError, match="Linear has no attention processor"):
        rfkernels.use_attention(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="precision must be one of full, int8, fp8, auto, got 'int4'"):
        rfkernels.use_attention(model, "int4")


@pytest.mark.parametrize("cross", [False, True])
def test_plain_processor_has_the_options_of_a_unet(cross):
    """An image with a norm of groups and a residual; a norm of the other tokens."""
    options = {"cross_attention_dim": 24, "cross_attention_norm": "layer_norm"} if cross else {}
    torch.manual_seed(0)
    attn = Attention(
        32,
        heads=2,
        dim_head=16,
        norm_num_groups=4,
        residual_connection=True,
        rescale_output_factor=2,
        **options,
    )
    x, others = draw(2, 32, 3, 5), {"encoder_hidden_states": draw(2, 6, 24)} if cross else {}
    expected = attn(x, **others)
    torch.testing.assert_close(rfkernels.use_attention(attn)(x, **others), expected, rtol=1e-5, atol=1e-5)


def test_lumina2_scale_grows_with_the_tokens():
    model, _ = made("lumina2", F32)
    attn, x = model.layers[0].attn, draw(2, 20, 96)
    own = [attn(x, encoder_hidden_states=x, base_sequence_length=n) for n in (None, 5)]
    rfkernels.use_attention(model)
    for n, expected in zip((None, 5), own, strict=True):
        result = attn(x, encoder_hidden_states=x, base_sequence_length=n)
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(*own, rtol=1e-2)


def draw(*shape, seed=0, dtype=F32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both(q, k, v, **options):
    """Our back end and diffusers' own; the layout is that of the dispatcher."""
    ours.register_attention_backend()
    result = dispatch.dispatch_attention_fn(q, k, v, backend="rfkernels", **options)
    return result, dispatch.dispatch_attention_fn(q, k, v, backend="native", **options)


def masks():
    seen = draw(2, 4, 5, 7) > -0.5
    seen[..., 0] = True  # torch's own gives no number where nothing is seen
    return {
        "none": None,
        "keys of a sample": seen[:, 0, 0],
        "keys of a sample, additive": draw(2, 7),
        "bool": seen,
        "bool for all heads": seen[:, :1],
        "bool for all queries": seen[:, :1, :1],
        "bool of two axes": seen[0, 0],
        "additive": draw(2, 4, 5, 7),
        "additive of three axes": draw(4, 5, 7),
        "additive of rows": draw(2, 4, 5, 1),
        "additive, keys apart": draw(2, 4, 7, 5).transpose(2, 3),
    }


@pytest.mark.parametrize("dtype", [F32, BF16, torch.float64])
@pytest.mark.parametrize("kind", masks())
def test_masks_are_those_of_torch(kind, dtype):
    mask = masks()[kind]
    if mask is not None and mask.is_floating_point():
        mask = mask.to(dtype)
    q, k, v = (
        draw(2, 5, 4, 8, dtype=dtype),
        draw(2, 7, 4, 8, seed=1, dtype=dtype),
        draw(2, 7, 4, 8, seed=2, dtype=dtype),
    )
    result, expected = both(q, k, v, attn_mask=mask, scale=0.5)
    tolerance = 2e-2 if dtype == BF16 else 1e-5
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


def test_masks_of_float32_go_with_float64():
    q, mask = draw(1, 5, 2, 8, dtype=torch.float64), draw(1, 2, 5, 5)
    torch.testing.assert_close(*both(q, q, q, attn_mask=mask), rtol=1e-6, atol=1e-6)


def test_causal_and_grouped_heads_are_those_of_torch():
    q, k, v = draw(2, 5, 6, 8), draw(2, 7, 2, 8, seed=1), draw(2, 7, 2, 8, seed=2)
    torch.testing.assert_close(*both(q, k, v, enable_gqa=True, is_causal=True), rtol=1e-5, atol=1e-5)


def test_options_that_are_not_ours_are_refused(monkeypatch):
    attend, q = ours._backend("full"), draw(1, 5, 2, 8)
    for options in ({"dropout_p": 0.1}, {"return_lse": True}, {"_parallel_config": object()}):
        with pytest.raises(ValueError, match="no dropout, context parallelism or return_lse here"):
            attend(q, q, q, **options)
    with pytest.raises(ValueError, match="is_causal goes without attn_mask"):
        attend(q, q, q, is_causal=True, attn_mask=torch.ones(5, 5, dtype=torch.bool))
    monkeypatch.setattr(ours, "_MOST_CAUSAL", 24)
    with pytest.raises(ValueError, match="up to 24 queries times keys, got 5 and 5 without"):
        attend(q, q, q, is_causal=True)
