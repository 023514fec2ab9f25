// bias_gelu as plain functions: no torch types.
//
//   y = gelu(x + bias);   dx = dy * gelu'(x + bias),  dbias = the sum of dx over the rows, before rounding
//
// Every matrix is contiguous.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace mtfast::bias_gelu {

struct Inputs {
  int64_t rows, columns;
  Dtype dtype;
  const void* x;     // [rows, columns]
  const void* bias;  // [columns], or null
};

// ---- CPU ----

void cpu_forward(const Inputs& in, void* y);

// dbias: null where there is no bias.
void cpu_backward(const Inputs& in, const void* dy, void* dx, void* dbias);

// ---- CUDA; bfloat16, float16 and float32 ----

constexpr int kChunkRows = 64;    // of which a block sums dx, or a multiple of them
constexpr int kMostChunks = 256;  // about: more would write sums for as long as the rows take

inline int64_t backward_chunk_rows(int64_t rows) {
  const int64_t most = kChunkRows * kMostChunks;
  return kChunkRows * ((rows + most - 1) / most);
}
inline int64_t backward_chunks(int64_t rows) {
  return (rows + backward_chunk_rows(rows) - 1) / backward_chunk_rows(rows);
}

// Launch functions: 0 or a cudaError_t. There is at least one element.
extern "C" {

int mtfast_bias_gelu_forward(const Inputs* in, void* y, void* stream);

// partial: float [backward_chunks(rows), columns] of scratch; it and dbias are null where there is no bias.
int mtfast_bias_gelu_backward(const Inputs* in, const void* dy, void* dx, float* partial, void* dbias,
                              void* stream);
}

}  // namespace mtfast::bias_gelu
