"""Where the ops' tests run: on the CPU and, marked `gpu`, on a GPU.

MTFAST_TEST_GPU=cpu puts the CPU in the GPU's place, to rehearse there what is run where there is one.
"""

import os

import pytest
import torch

GPU = os.environ.get("MTFAST_TEST_GPU", "cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
on_gpu = [pytest.mark.gpu, *([needs_cuda] if GPU == "cuda" else [])]
DEVICES = ["cpu", pytest.param(GPU, marks=on_gpu, id="cuda")]
