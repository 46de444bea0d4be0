"""`rfkernels.ops.moments`, and the moments that `stochastic_step` leaves behind."""

import pytest
import torch

from rfkernels import _C, ops
from tests.emulator.build import load as load_emulator
from tests.ops.cases import F32, F64, KERNELS
from tests.ops.combine_calls import DTYPES, Call

every_kernel = pytest.mark.parametrize("device", KERNELS)


def _moments(device, tensors, coefs):
    if device != "emulated":
        return ops.moments([t.to(device) for t in tensors], coefs.to(device)).cpu()
    count = len(coefs)
    out = torch.full((len(tensors[0]), count + count * (count + 1) // 2), torch.nan, dtype=F64)
    workspace = torch.empty(max(16, _C.combine_workspace(tensors[0])), dtype=torch.uint8)
    load_emulator().moments(out, tensors, coefs, workspace)
    return out


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize(
    "count, shape", [(1, (1,)), (3, (2, 7)), (2, (3, 5, 64)), (1, (2, 4, 9, 11)), (3, (2, 20_011))]
)
def test_moments_match_reference(count, shape, dtypes, device):
    call = Call(shape, dtypes, tensors=4, outputs=count)
    got = _moments(device, call.tensors, call.coefs)
    expected = ops.moments_reference([t.double() for t in call.tensors], call.coefs.double())
    size = torch.Size(shape[1:]).numel()
    scale = ops.moments_reference([t.double().abs() for t in call.tensors], call.coefs.double().abs()) + size
    tolerance = 1e-13 if dtypes[0] == F64 else 1e-6
    assert ((got - expected).abs() <= tolerance * scale).all()
    assert torch.equal(got, _moments(device, call.tensors, call.coefs))


def test_moments_of_nothing_are_zero():
    assert torch.equal(ops.moments([torch.zeros(3, 0)], torch.ones(1, 1)), torch.zeros(3, 2, dtype=F64))


def test_moments_have_gradients():
    call = Call((2, 3, 4), (F64, F64), tensors=3, outputs=2)
    for t in (*call.tensors, call.coefs):
        t.requires_grad_()
    assert torch.autograd.gradcheck(lambda c, *t: ops.moments(t, c), (call.coefs, *call.tensors))


@every_kernel
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(1,), (2, 7), (3, 5, 64), (2, 20_011), (2, 4, 4096)], ids=str)
def test_stochastic_step_leaves_the_moments_of_what_it_stored(shape, dtypes, device):
    call = Call(shape, dtypes, tensors=2, noisy=True)
    (expected,) = call.run(device)
    rows = torch.cat([-call.coefs[:, :2], torch.ones_like(call.coefs[:, :1])], 1)
    if device == "emulated":
        x = call.tensors[0]
        out, sums = torch.full_like(x, torch.nan), torch.full((len(x), 2), torch.nan, dtype=F64)
        workspace = torch.empty(max(16, _C.combine_workspace(x)), dtype=torch.uint8)
        load_emulator().stochastic_step(out, sums, call.tensors, call.coefs, call.keys, workspace)
    else:
        args = [t.to(device) for t in call.tensors], call.coefs.to(device), call.keys.to(device)
        out, sums = (t.cpu() for t in ops.stochastic_step(*args))
    assert torch.equal(out, expected)
    assert torch.equal(sums, _moments(device, [*call.tensors, out], rows))
    _, reference = ops.stochastic_step_reference(
        [t.double() for t in call.tensors], call.coefs.double(), call.keys
    )
    if dtypes[0] in (F64, F32):
        torch.testing.assert_close(
            sums, reference, rtol=1e-4, atol=1e-4 * torch.Size(shape[1:]).numel() ** 0.5
        )


def test_stochastic_step_refuses_what_does_not_fit():
    x, keys = torch.zeros(2, 6), ops.noise_keys(0, 2)
    for tensors, coefs, message in (
        ([x], torch.zeros(1, 3), "1 outputs and 2 columns"),
        ([x] * 9, torch.zeros(1, 10), "1..8 tensors"),
        ([x, torch.zeros(2, 5)], torch.zeros(1, 3), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.stochastic_step(tensors, coefs, keys)
    with pytest.raises(ValueError, match="keys must be"):
        ops.stochastic_step([x], torch.zeros(1, 2), keys[:1])


def test_moments_refuses_what_does_not_fit():
    x = torch.zeros(2, 6)
    for tensors, coefs, message in (
        ([x, x], torch.zeros(1, 3), "2 columns"),
        ([x, x], torch.zeros(4, 2), "1..3"),
        ([], torch.zeros(1, 1), "1..8"),
        ([x, torch.zeros(2, 5)], torch.zeros(1, 2), "shape"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.moments(tensors, coefs)
