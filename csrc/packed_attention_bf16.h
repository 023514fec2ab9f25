// Packed attention in bfloat16 with the dot product instruction of AVX-512 BF16: the tasks of
// packed_attention_cpu.cpp, for processors that have it (has_bf16_dot).
#pragma once
#include "packed_attention.h"

namespace mtfast::attention {

// Bytes of scratch that a task of a sequence of `length` tokens takes.
int64_t scratch_of_bf16(int64_t length, int64_t head_dim, bool backward);

void forward_bf16(const AttentionForward& args, int64_t sequence, int64_t head, char* scratch);
void backward_bf16(const AttentionBackward& args, int64_t sequence, int64_t head, char* scratch);

}  // namespace mtfast::attention
