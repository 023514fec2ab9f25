"""The CUDA source run on the CPU under AddressSanitizer and UndefinedBehaviorSanitizer: small shapes.

For MTFAST_TEST_SWEEP=full: it takes minutes to compile.
"""

import pytest
import test_bias_gelu_kernels
import test_concat_mlp_kernels
import test_cuda_on_cpu
import test_dropout_add_layer_norm_kernels
import test_mask_tokens_kernels
import test_packed_attention_kernels
from cuda_on_cpu.harness import run_sanitized

FUNCTIONS = {
    "test_cuda_on_cpu:sum_tiles": [test_cuda_on_cpu.SOURCE],
    "test_bias_gelu_kernels:small_shapes": [test_bias_gelu_kernels.SOURCE],
    "test_concat_mlp_kernels:small_shapes": test_concat_mlp_kernels.SOURCES,
    "test_dropout_add_layer_norm_kernels:small_shapes": test_dropout_add_layer_norm_kernels.SOURCES,
    "test_mask_tokens_kernels:small_shapes": [test_mask_tokens_kernels.SOURCE],
    "test_packed_attention_kernels:small_shapes": test_packed_attention_kernels.SOURCES,
}


@pytest.mark.sweep
@pytest.mark.parametrize("function", FUNCTIONS)
def test_sanitizers_are_silent(function, full_sweep):
    if not full_sweep:
        pytest.skip("takes minutes to compile: for MTFAST_TEST_SWEEP=full")
    run_sanitized(function, *FUNCTIONS[function])
