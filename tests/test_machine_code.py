"""Every kernel compiled for Hopper: no spills, no local memory. Which instructions an op's kernels must hold
is in the op's own tests.

MTFAST_TEST_SWEEP=full compiles for Ampere too, here and there.
"""

import re

import pytest
from cuda_on_cpu.harness import CSRC
from cuda_on_cpu.machine_code import ARCHITECTURES, compiled, table

SOURCES = sorted(path.name for path in CSRC.glob("*.cu"))


@pytest.mark.sweep
@pytest.mark.parametrize("source", SOURCES)
def test_compiles_without_spills(source, capsys):
    kernels = compiled(source)
    assert {kernel.architecture for kernel in kernels} == set(ARCHITECTURES)
    with capsys.disabled():
        print(f"\n{table(kernels)}")
    for kernel in kernels:
        assert kernel.count("LDL") == kernel.count("STL") == 0, f"{kernel.name} for {kernel.architecture}"


def test_no_struct_is_left_to_value_initialization():
    """`Row{}` of a struct with a member that has a constructor: nvcc 13.0 leaves the others as they are, and
    g++ sets them to 0, so that no emulation sees it."""
    structs, used = set(), {}
    for path in sorted([*CSRC.glob("*.cu"), *CSRC.glob("*.cuh"), *CSRC.glob("device/*")]):
        text = path.read_text()
        structs |= set(re.findall(r"struct (?:alignas\(\d+\) )?([A-Z]\w+)", text))
        used |= dict.fromkeys(re.findall(r"\b([A-Z]\w+)(?:<[^<>;{}]*>)?\{\}", text), path.name)
    assert not structs & set(used), used
