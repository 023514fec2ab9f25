"""Builds mtfast/_C.abi3.so (the ops) and mtfast/_planner (batch planning).

The ops stand on the LibTorch stable ABI, so one build serves torch 2.10 and every later one. CUDA is compiled
when torch is a CUDA build and a toolkit of its major version is found; no GPU is needed for that.
Environment: CUDA_HOME, TORCH_CUDA_ARCH_LIST, MAX_JOBS, MTFAST_SKIP_CUDA_BUILD=1, MTFAST_FORCE_CUDA_BUILD=1.
"""

import os
import shutil
import sys
from glob import glob
from pathlib import Path

from setuptools import Extension, setup

sys.path.insert(0, str(Path(__file__).parent))  # which builds do not have there by themselves
from mtfast.packages import cannot_build
from mtfast.toolkit import toolkit

if why_not := cannot_build():
    raise SystemExit(f"mtfast: {why_not}")
if not shutil.which("ninja"):  # as where this Python's environment is not activated
    import ninja

    os.environ["PATH"] += os.pathsep + ninja.BIN_DIR

import pybind11
import torch

STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000ULL"  # torch 2.10


def cuda() -> tuple[Path | None, str]:
    """The CUDA toolkit to build with, or None and why there is none."""
    if os.environ.get("MTFAST_SKIP_CUDA_BUILD") == "1":
        return None, "MTFAST_SKIP_CUDA_BUILD=1"
    if not torch.version.cuda:
        return None, f"torch {torch.__version__} is not a CUDA build"
    return toolkit(int(torch.version.cuda.split(".")[0]))


home, why_not = cuda()
if home:
    os.environ["CUDA_HOME"] = str(home)  # read when torch.utils.cpp_extension is imported
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", "8.0+PTX;9.0a")
elif os.environ.get("MTFAST_FORCE_CUDA_BUILD") == "1":
    raise SystemExit(f"mtfast: MTFAST_FORCE_CUDA_BUILD=1, but the CUDA kernels cannot be built: {why_not}")
else:
    print(f"mtfast: building for the CPU only, the CUDA kernels are left out: {why_not}")

from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension  # noqa: E402

PLANNER = "csrc/planner.cpp"


class Build(BuildExtension):
    """torch's, but x.cpp and x.cu, which lie side by side, get object files of different names."""

    def build_extensions(self) -> None:
        plain = self.compiler.object_filenames

        def object_filenames(sources, strip_dir=0, output_dir=""):
            objects = plain(sources, strip_dir, output_dir)
            pairs = zip(sources, objects, strict=True)
            return [o.removesuffix(".o") + ".cu.o" if s.endswith(".cu") else o for s, o in pairs]

        self.compiler.object_filenames = object_filenames
        super().build_extensions()


cxx = ["-O3", "-std=c++17", "-fvisibility=hidden", "-g0"]
link = (
    ["-Wl,-z,defs"] if sys.platform == "linux" else []
)  # what is missing is told here, not when it is loaded
sources = sorted(set(glob("csrc/*.cpp")) - {PLANNER})
ops: Extension
if home:
    ops = CUDAExtension(
        "mtfast._C",
        sources + sorted(glob("csrc/*.cu")),
        py_limited_api=True,
        extra_link_args=link,
        extra_compile_args={
            "cxx": [*cxx, STABLE_ABI, "-DMTFAST_WITH_CUDA", "-DUSE_CUDA"],
            "nvcc": ["-O3", "-std=c++17", "-lineinfo", "--threads=2"],
        },
    )
else:
    ops = CppExtension(
        "mtfast._C",
        sources,
        py_limited_api=True,
        extra_link_args=link,
        extra_compile_args={"cxx": [*cxx, STABLE_ABI]},
    )

planner = Extension(
    "mtfast._planner",
    [PLANNER],
    include_dirs=[pybind11.get_include()],
    language="c++",
    extra_compile_args={"cxx": cxx},  # the form torch's BuildExtension reads
)

setup(ext_modules=[ops, planner], cmdclass={"build_ext": Build})
