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

}  // namespace mtfast::bias_gelu
