"""Every kernel compiled for Ampere and Hopper: no spills, no local memory. Which instructions an op's kernels
must hold is in the op's own tests."""

import pytest
from cuda_on_cpu.harness import CSRC
from cuda_on_cpu.machine_code import ARCHITECTURES, compiled, table

SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))


@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source, capsys):
    kernels = compiled(source)
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    with capsys.disabled():
        print(f"\n{table(kernels)}")
    for kernel in kernels:
        assert kernel.count("LDL") == kernel.count("STL") == 0, f"{kernel.name} for {kernel.architecture}"
