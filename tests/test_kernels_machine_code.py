"""Every kernel compiled for Ampere and Hopper: no spills, no local memory, the right instructions."""

import pytest
from cuda_on_cpu.harness import CSRC
from cuda_on_cpu.machine_code import ARCHITECTURES, compiled, disassembler, table

SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source, architecture, capsys):
    kernels = compiled(source, architecture)
    assert kernels
    with capsys.disabled():
        print(f"\n{table(kernels)}")
    for kernel in kernels:
        assert kernel.count("LDL") == kernel.count("STL") == 0, kernel.name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_bernoulli_moves_16_bytes_at_a_time(architecture):
    if disassembler() is None:
        pytest.skip("no nvdisasm: install nvidia-cuda-nvdisasm or the CUDA toolkit's")
    kernels = [k for k in compiled("mask_tokens.cu", architecture) if k.name.startswith("bernoulli")]
    assert kernels
    for kernel in kernels:
        ids = 2 if "long" in kernel.name else 1
        assert kernel.count(r"LDG\.E\.128") >= ids, kernel.name
        assert kernel.count(r"STG\.E\.128") >= 2 * ids, kernel.name
