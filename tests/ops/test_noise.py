"""What `rfkernels.ops.noise` promises beyond the claims of every op."""

import hashlib
import math

import pytest
import torch
from scipy import stats

from rfkernels.ops import OPS, noise_keys, philox_normal, philox_normal_reference, renoise
from rfkernels.ops.noise import _philox4x32
from tests.ops.cases import every_device

# Known answers of Philox4x32-10 (Random123 distribution, kat_vectors): counter, key, words.
KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize("counter, key, words", KNOWN_ANSWERS)
def test_reference_is_philox(counter, key, words):
    tensors = [torch.tensor(w) for w in counter]
    assert [int(w) for w in _philox4x32(tensors, *map(torch.tensor, key))] == words


@every_device
@pytest.mark.parametrize("shape", [(1,), (3, 1), (2, 7), (2, 1024), (3, 5, 1001), (1, 40_003)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_philox_normal_matches_reference(shape, dtype, device):
    # A seed above 2^32, the largest sample and step: all words of key and counter take part.
    keys = noise_keys(2**40 + 17, shape[0], step=2**32 - 1, first_sample=2**32 - shape[0], device=device)
    expected = philox_normal_reference(shape, keys, torch.float64)
    noise = philox_normal(shape, keys, dtype=dtype)
    unit = {torch.float16: 2**-11, torch.bfloat16: 2**-8}.get(dtype, 1e-6)
    torch.testing.assert_close(noise.double(), expected, rtol=unit, atol=2e-6)
    assert torch.equal(noise, philox_normal(shape, keys, dtype=torch.float32).to(dtype))


@every_device
def test_philox_normal_has_the_same_bits_everywhere(device):
    noise = philox_normal((4, 100_003), noise_keys(2024, 4, step=5, device=device))
    digest = hashlib.sha256(noise.cpu().numpy().tobytes()).hexdigest()
    assert digest == "84468ab1e4baa43bc35d2dba31327260ff76e27e06916eb5c80cd107546cf81f"


def test_philox_normal_is_normal():
    z = philox_normal((4, 500_000), noise_keys(1, 4)).double().flatten()
    n = len(z)
    assert abs(z.mean()) < 4 / math.sqrt(n)
    assert abs(z.var() - 1) < 4 * math.sqrt(2 / n)
    assert stats.kstest(z.numpy(), "norm").pvalue > 1e-3
    assert abs((z[:-1] * z[1:]).mean()) < 4 / math.sqrt(n)  # neighbours share a Box-Muller radius
    assert abs(((z[:-1] ** 2 - 1) * (z[1:] ** 2 - 1)).mean()) < 8 / math.sqrt(n)
    assert (z.abs() > 4).sum() == pytest.approx(n * 2 * stats.norm.sf(4), abs=4 * math.sqrt(n * 6.4e-5))


def test_extreme_words_stay_finite():
    # u = 1 (radius 0) and u = 2^-33 (the largest radius) are both within reach of the formula.
    z = philox_normal((1, 4_000_000), noise_keys(3, 1))
    assert z.isfinite().all() and z.abs().max() < 6.8


@every_device
def test_noise_of_a_sample_does_not_depend_on_its_batch(device):
    keys = noise_keys([11, 5, 7], 3, device=device)
    together = philox_normal((3, 1000), keys)
    alone = philox_normal((1, 1000), noise_keys([7], 1, device=device))
    assert torch.equal(together[2:], alone)
    numbered = philox_normal((4, 1000), noise_keys(9, 4, device=device))
    later = philox_normal((2, 1000), noise_keys(9, 2, first_sample=2, device=device))
    assert torch.equal(numbered[2:], later)


def test_seed_sample_and_step_each_make_new_noise():
    base = {"seed": 1, "batch": 1, "step": 1, "first_sample": 1}
    changes = [{}, {"seed": 2}, {"seed": 2**32 + 1}, {"step": 2}, {"first_sample": 2}]
    draws = [philox_normal((1, 5000), noise_keys(**(base | change))).flatten() for change in changes]
    correlation = torch.corrcoef(torch.stack(draws)) - torch.eye(len(draws))
    assert correlation.abs().max() < 5 / math.sqrt(5000)


@every_device
def test_philox_normal_obeys_torch(device):
    keys = noise_keys(1, 2, device=device)
    torch.library.opcheck(OPS["philox_normal"].functional, ([2, 5], keys, torch.float32))
    compiled = torch.compile(lambda k: philox_normal((2, 5), k), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(keys), philox_normal((2, 5), keys))


@every_device
def test_renoise_adds_the_noise_of_its_keys(device):
    keys = noise_keys(4, 3, device=device)
    x, z = torch.zeros(3, 50, device=device), philox_normal((3, 50), keys)
    assert torch.equal(renoise(x, 1.0, 2.0, keys), 2 * z)
    c = torch.tensor([0.0, 1.0, 3.0], device=device)
    assert torch.equal(renoise(x, 1.0, c, keys), c[:, None] * z)


def test_renoise_travels_from_one_noise_level_to_another():
    # N(.7, .5^2) data at sigma .6 renoised to .8 has the spread of the path at .8 (specs 0.3).
    a, b, n = 0.6, 0.8, 400_000
    keys = [noise_keys(seed, 1) for seed in (1, 2, 3)]
    data = 0.7 + 0.5 * philox_normal((1, n), keys[0], dtype=torch.float64)
    at_a = (1 - a) * data + a * philox_normal((1, n), keys[1], dtype=torch.float64)
    k = (1 - b) / (1 - a)
    at_b = renoise(at_a, k, math.sqrt(b**2 - k**2 * a**2), keys[2])
    assert at_b.std().item() == pytest.approx(math.sqrt(((1 - b) * 0.5) ** 2 + b**2), abs=4e-3)
    assert at_b.mean().item() == pytest.approx((1 - b) * 0.7, abs=6e-3)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: philox_normal((2, 5), torch.zeros(3, 3, dtype=torch.int64)), r"keys must be i64\[2, 3\]"),
        (lambda: philox_normal((2, 5), torch.zeros(2, 3)), r"keys must be i64\[2, 3\].*got f32\[2, 3\]"),
        (
            lambda: philox_normal((), torch.zeros(1, 3, dtype=torch.int64)),
            r"expected \[batch, \.\.\.\], got f32\[\]",
        ),
        (
            lambda: philox_normal((2,), noise_keys(1, 2), dtype=torch.int64),
            "expected a floating dtype, got i64",
        ),
        (lambda: renoise(torch.zeros(2, 5), 1.0, 1.0, noise_keys(1, 3)), r"keys must be i64\[2, 3\]"),
        (lambda: noise_keys(-1, 1), r"seed must be in 0 \.\. 2\*\*63 - 1, got -1"),
        (lambda: noise_keys(2**63, 1), "seed must be in"),
        (lambda: noise_keys(1, 1, step=2**32), "step must be in"),
        (lambda: noise_keys(1, 2, first_sample=2**32 - 1), "sample must be in"),
        (lambda: noise_keys([1, 2, 3], 2), "expected one seed or 2 seeds, got 3"),
    ],
)
def test_noise_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
