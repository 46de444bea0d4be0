import pytest

from tests.emulator.build import load


@pytest.fixture(scope="session")
def emulated():
    """The module with the CUDA half of every op; its submodule `test` has the emulator's own kernels."""
    return load()
