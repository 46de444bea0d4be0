"""Builds rfkernels._C and librfkernels.so with CMake. Everything else about the package is in pyproject.toml.

Environment: RFK_CUDA=OFF skips the CUDA kernels; RFK_CUDA_ARCHS="89;90" chooses their architectures
(default: native where a GPU is present, otherwise all); CMAKE_BUILD_PARALLEL_LEVEL, CUDACXX and CXX as usual.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


def cmake() -> str:
    """The cmake of the build requirements, or the one on the PATH where they are absent."""
    try:
        from cmake import CMAKE_BIN_DIR
    except ImportError:
        return "cmake"
    return str(Path(CMAKE_BIN_DIR) / "cmake")


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path("build", f"cmake-{sys.implementation.cache_tag}").resolve()
        options = {
            "CMAKE_BUILD_TYPE": "Release",
            "RFK_OUTPUT_DIRECTORY": target,
            "RFK_VERSION": self.distribution.get_version(),
            "RFK_CUDA": os.environ.get("RFK_CUDA", "ON"),
            "RFK_CUDA_ARCHS": os.environ.get("RFK_CUDA_ARCHS", ""),
            "CMAKE_MAKE_PROGRAM": shutil.which("ninja"),  # an isolated build's ninja moves from run to run
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        flags = [f"-D{name}={value}" for name, value in options.items()]
        subprocess.run([cmake(), "-S", ".", "-B", build, "-G", "Ninja", *flags], check=True)
        subprocess.run([cmake(), "--build", build, "--target", "_C"], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install keeps the extension alone; the library that it links goes with it."""
        super().copy_extensions_to_source()
        library = Path("rfkernels", "librfkernels.so")
        self.copy_file(str(Path(self.build_lib) / library), str(library))


setup(ext_modules=[Extension("rfkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
