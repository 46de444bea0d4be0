"""The bindings: other frameworks' tensors, older frameworks, errors, the layout of DLPack."""

import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from rfkernels import _C

HAS_TABLE = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


@pytest.fixture
def without_table():
    _C.use_exchange_api(False)
    yield
    _C.use_exchange_api(True)


def test_numpy_arrays_are_tensors():
    out, x, v = np.zeros(5), np.arange(5.0), np.ones(5)
    _C.affine_step(out, x, v, np.array(2.0), np.array(-1.0))
    assert out.tolist() == [-1, 1, 3, 5, 7]


def test_frameworks_mix_in_one_call():
    out, x, v = torch.zeros(5), np.arange(5, dtype=np.float32), torch.ones(5)
    _C.affine_step(out, x, v, torch.tensor(2.0), np.array(-1.0, dtype=np.float32))
    assert out.tolist() == [-1, 1, 3, 5, 7]


def test_older_torch_goes_through_dlpack(without_table):
    out, x = torch.zeros(5), torch.arange(5.0, requires_grad=True)
    _C.linear_combination(out, [x, torch.ones(5)], torch.tensor([2.0, -1.0]))
    assert out.tolist() == [-1, 1, 3, 5, 7]


def test_views_with_offsets_and_parameters_are_read_in_place(without_table):
    base = torch.arange(10.0)
    _C.affine_step(
        base[2:4], base[4:6], torch.nn.Parameter(torch.ones(2)), torch.tensor(10.0), torch.tensor(0.5)
    )
    assert base.tolist()[:5] == [0, 1, 40.5, 50.5, 4]


@pytest.mark.skipif(not HAS_TABLE, reason="this torch has no DLPack C table")
def test_table_and_protocol_see_the_same_tensor():
    x = torch.randn(2, 3, 4, dtype=torch.bfloat16)
    outs = [torch.zeros_like(x), torch.zeros_like(x)]
    for out, on in zip(outs, (True, False), strict=True):
        _C.use_exchange_api(on)
        _C.linear_combination(out, [x], torch.tensor([3.0]))
    _C.use_exchange_api(True)
    assert torch.equal(*outs)


@pytest.mark.parametrize("wrong", [None, 3, "x", [1.0]])
def test_other_objects_are_refused_by_type(wrong):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _C.affine_step(torch.zeros(1), wrong, torch.zeros(1), torch.tensor(1.0), torch.tensor(1.0))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.int16, torch.bool, torch.float8_e4m3fn])
def test_other_dtypes_are_refused_by_name(dtype):
    error, message = ValueError, "expected float64, float32, float16, bfloat16, int64, int32, int8 or uint8"
    if (
        dtype.itemsize == 1
        and dtype.is_floating_point
        and not hasattr(torch.Tensor, "__dlpack_c_exchange_api__")
    ):
        error, message = RuntimeError, "not supported by dlpack"  # an older torch refuses to hand it over
    with pytest.raises(error, match=message):
        _C.linear_combination(torch.zeros(1), [torch.zeros(1).to(dtype)], torch.tensor([1.0]))


def test_other_devices_are_refused():
    meta = torch.zeros(1, device="meta")
    with pytest.raises((ValueError, RuntimeError, BufferError, TypeError)):
        _C.linear_combination(meta, [meta], torch.tensor([1.0]))


def test_nine_dimensions_are_refused():
    x = torch.zeros([1] * 9)
    with pytest.raises(ValueError, match="at most 8 dimensions, got 9"):
        _C.linear_combination(x, [x], torch.tensor([1.0]))


def test_threads_call_at_once():
    def work(k):
        x = torch.full((100_000,), float(k))
        for _ in range(20):
            _C.affine_step(x, x, x, torch.tensor(0.5), torch.tensor(0.5))
        results[k] = bool((x == k).all())

    results = {}
    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == dict.fromkeys(range(4), True)


def test_dlpack_layout_is_that_of_torchs_header():
    header = Path(torch.__file__).parent / "include/ATen/dlpack.h"
    if not header.exists() or not HAS_TABLE:
        pytest.skip("this torch ships no DLPack 1.3 header")
    text = re.sub(r"/\*.*?\*/", "", header.read_text(), flags=re.S)

    def fields(struct):
        body = re.search(rf"typedef struct (?:{struct} )?\{{([^{{}}]*)\}} {struct};", text).group(1)
        body = re.sub(r"//.*", "", body)
        return re.findall(r"(\w+)\s*(?:\)\s*\([^)]*\))?;", body)

    assert fields("DLDevice")[-1] == "device_id"
    assert fields("DLTensor") == ["data", "device", "ndim", "dtype", "shape", "strides", "byte_offset"]
    assert fields("DLManagedTensor") == ["dl_tensor", "manager_ctx", "deleter"]
    assert fields("DLDataType") == ["code", "bits", "lanes"]
    assert fields("DLPackExchangeAPIHeader") == ["version", "prev_api"]
    assert fields("DLPackExchangeAPI") == [
        "header",
        "managed_tensor_allocator",
        "managed_tensor_from_py_object_no_sync",
        "managed_tensor_to_py_object_no_sync",
        "dltensor_from_py_object_no_sync",
        "current_work_stream",
    ]
