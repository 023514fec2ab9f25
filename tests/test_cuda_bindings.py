"""The ops' CUDA bindings without a GPU, over the emulated kernels: the ops' own tests, where they are about
more than arithmetic, and what bindings must do besides.

MTFAST_TEST_SWEEP=full also runs those that hold of the emulated kernels already, or that are about tracing.
"""

import pytest
from cuda_on_cpu.binding import run_bound

OPS = ("packed_attention", "concat_mlp", "bias_gelu", "dropout_add_layer_norm", "mask_tokens")
FILES = [*(f"tests/test_{op}.py" for op in OPS), "tests/test_packed_attention_arguments.py"]
# Left out is what is slow on the emulation and is tested on it elsewhere, float64, which is for the CPU,
# and values that a GPU is not waited for to check.
LEFT_OUT = (
    "random", "one_query_a", "twice", "million", "independent", "uniform", "200", "seeds", "large",
    "thousands", "documented", "reference_says", "exact_chooses", "threads", "notice", "gradcheck",
    "without_gradients", "wrong_arguments", "any_head_dim", "out_of_range", "every_number", "float64",
    "40000",
)  # fmt: skip
FOR_THE_SWEEP = ("inf_and_nan", "order_ranks", "whole_words", "around_tiles", "compile", "export")


@pytest.mark.sweep
def test_the_ops_own_tests_hold(full_sweep):
    left_out = LEFT_OUT if full_sweep else (*LEFT_OUT, *FOR_THE_SWEEP)
    run_bound(*FILES, "-k", " and ".join(f"not {word}" for word in left_out))


def test_what_bindings_must_do():
    run_bound("tests/cuda_bindings_cases.py")
