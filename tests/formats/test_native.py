"""Files of `save_quantized`: what comes back, and what is refused."""

import pytest
import torch
from torch import nn

from rfkernels.formats import read
from rfkernels.formats.native import load_quantized, save_quantized
from rfkernels.nn import FORMATS, QuantLinear
from rfkernels.quantization.model import quantize
from tests.quantization.models import Odd, flux, formats, run, shared


@pytest.mark.parametrize("method", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_files_round_trip(method, dtype, tmp_path):
    model = flux(dtype)
    quantize(model, method, modulation="w4a16")
    path = tmp_path / "flux.safetensors"
    save_quantized(model, path)
    for target in (flux, flux(seed=1)):
        loaded = load_quantized(target, path).eval()
        assert formats(loaded) == formats(model)
        ours, theirs = loaded.state_dict(), model.state_dict()
        assert list(ours) == list(theirs)
        for name, tensor in theirs.items():
            assert ours[name].dtype == tensor.dtype
            assert torch.equal(ours[name].reshape(-1).view(torch.uint8), tensor.reshape(-1).view(torch.uint8))
        if dtype == torch.float32:
            assert torch.equal(run(loaded), run(model))


def test_files_keep_ties(tmp_path):
    model = Odd()
    quantize(model, "int8", min_size=0)
    save_quantized(model, tmp_path / "odd.safetensors")
    size = (tmp_path / "odd.safetensors").stat().st_size
    loaded = load_quantized(Odd(), tmp_path / "odd.safetensors")
    assert shared(loaded.second.weight, loaded.first.weight)
    assert shared(loaded.last.weight, loaded.table.weight)
    stored = {t.data_ptr(): t.nbytes for t in model.state_dict().values()}
    assert size < sum(stored.values()) + 8000


def test_files_are_read_like_others(tmp_path):
    """Layers and tensors by name, shared ones under each name; a prefix of all names is taken off."""
    model = Odd()
    quantize(model, "int8", min_size=0)
    for whole in (model, nn.ModuleDict({"transformer": model})):
        save_quantized(whole, tmp_path / "a")
        items = dict(read(tmp_path / "a"))
        for name, tensor in model.state_dict().items():
            layer, _, leaf = name.rpartition(".")
            found = getattr(items[layer], leaf) if layer in items else items[name]
            assert torch.equal(found, tensor), name
        assert {n for n, m in model.named_modules() if isinstance(m, QuantLinear)} <= set(items)


def test_file_refusals(tmp_path):
    path = tmp_path / "a.safetensors"
    with pytest.raises(FileNotFoundError, match=r"a.safetensors: a safetensors file is required, found none"):
        load_quantized(flux, path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="a safetensors file is required, got"):
        load_quantized(flux, path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="a file of save_quantized is required"):
        load_quantized(flux, path)
    model = flux()
    quantize(model, "int8")
    save_quantized(model, path)
    with pytest.raises(ValueError, match="a FluxTransformer2DModel is required, got a Linear"):
        load_quantized(nn.Linear(2, 2), path)
    wide = flux()
    wide.proj_out = nn.Linear(128, 65)
    with pytest.raises(ValueError, match=r"proj_out\.\w+ must be \[65.*got \[64"):
        load_quantized(wide, path)
    other = flux()
    other.extra = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"missing \['extra.bias', 'extra.weight'\]"):
        load_quantized(other, path)
