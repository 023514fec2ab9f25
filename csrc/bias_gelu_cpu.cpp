// bias_gelu on the CPU: one vectorised, threaded pass in each direction.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <type_traits>
#include <vector>

#include "bias_gelu.h"
#include "gelu_simd.h"

namespace mtfast::bias_gelu {
namespace {

using namespace simd;

constexpr int64_t kGrain = 16384;    // elements that are worth a thread
constexpr int64_t kFewRows = 32;     // summed before the sum is carried on in double
constexpr int64_t kMostChunks = 64;  // of rows, each with sums of its own

// What a step takes of a row: two vectors. In bfloat16 they are the even and the odd columns, which a shift
// and a mask tell apart; sums and the widened bias keep the same order.
constexpr int64_t kStep = 2 * kLanes;

int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

template <class T>
using Scalar = typename Compute<T>::scalar;

template <class T>
using Vec = typename Compute<T>::vec;

template <class T>
MTFAST_INLINE void unpack_two(Vec<T> (&to)[2], const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    u32x16 both;
    std::memcpy(&both, p, sizeof both);
    to[0] = reinterpret_cast<f32x16>(both << 16);
    to[1] = reinterpret_cast<f32x16>(both & 0xffff0000u);
  } else {
    to[0] = unpack(p);
    to[1] = unpack(p + kLanes);
  }
}

// To nearest, ties to even, in the upper half. A NaN must have nothing in the lower one, which holds where it
// comes from arithmetic on 16 bits alone.
MTFAST_INLINE u32x16 rounded(f32x16 x) {
  const u32x16 w = reinterpret_cast<u32x16>(x);
  return w + 0x7fffu + (w >> 16 & 1u);
}

template <class T>
MTFAST_INLINE void pack_two(T* p, const Vec<T> (&from)[2]) {
  if constexpr (std::is_same_v<T, bf16>) {
    const u32x16 both = rounded(from[0]) >> 16 | (rounded(from[1]) & 0xffff0000u);
    std::memcpy(p, &both, sizeof both);
  } else {
    pack(p, from[0]);
    pack(p + kLanes, from[1]);
  }
}

// The same at the end of a row, as load and store of simd.h.
template <class T>
MTFAST_INLINE void load_two(Vec<T> (&to)[2], const T* p, int64_t count) {
  if (count >= kStep) return unpack_two(to, p);
  T tail[kStep] = {};
  std::memcpy(tail, p, static_cast<size_t>(count) * sizeof(T));
  unpack_two(to, tail);
}

template <class T>
MTFAST_INLINE void store_two(T* p, const Vec<T> (&from)[2], int64_t count) {
  if (count >= kStep) return pack_two(p, from);
  T tail[kStep];
  pack_two(tail, from);
  std::memcpy(p, tail, static_cast<size_t>(count) * sizeof(T));
}

// In the type of the arithmetic and the order of steps, with zeros up to a whole number of them; nothing of
// null.
template <class T>
std::vector<Scalar<T>> widened(const void* bias, int64_t columns) {
  if (bias == nullptr) return {};
  std::vector<Scalar<T>> to(padded(columns));
  for (int64_t i = 0; i < columns; i += kStep) {
    Vec<T> x[2];
    load_two(x, static_cast<const T*>(bias) + i, columns - i);
    pack_two(to.data() + i, x);
  }
  return to;
}

// kBias: whether there is one.
template <class T, bool kBias>
struct ForwardRows {
  template <Isa isa>
  MTFAST_INLINE void run(const T* x, const Scalar<T>* bias, T* y, int64_t rows, int64_t columns) {
    const gelu::Gelu<isa, T> gelu;
    for (int64_t row = 0; row < rows; ++row, x += columns, y += columns)
      for (int64_t i = 0; i < columns; i += kStep) {
        Vec<T> z[2];
        load_two(z, x + i, columns - i);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          if (kBias) z[n] += unpack(bias + i + n * kLanes);
          z[n] = gelu.value(gelu, z[n]);
        }
        store_two(y + i, z, columns - i);
      }
  }
};

// Adds dx's columns, before they are rounded, to `sums` where there is a bias.
template <class T, bool kBias>
struct BackwardRows {
  template <Isa isa>
  MTFAST_INLINE void run(const T* dy, const T* x, const Scalar<T>* bias, T* dx, Scalar<T>* sums, int64_t rows,
                         int64_t columns) {
    const gelu::Gelu<isa, T> gelu;
    for (int64_t row = 0; row < rows; ++row, dy += columns, x += columns, dx += columns)
      for (int64_t i = 0; i < columns; i += kStep) {
        Vec<T> z[2], grad[2];
        load_two(z, x + i, columns - i);
        load_two(grad, dy + i, columns - i);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const int64_t at = i + n * kLanes;
          if (kBias) z[n] += unpack(bias + at);
          grad[n] *= gelu.slope(gelu, z[n]);
          if (kBias) pack(sums + at, unpack(sums + at) + grad[n]);
        }
        store_two(dx + i, grad, columns - i);
      }
  }
};

// to += sums, which become 0.
template <class S>
struct CarryOn {
  template <Isa isa>
  MTFAST_INLINE void run(S* sums, double* to, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kLanes) {
      const auto x = unpack(sums + i);
      pack(to + i, unpack(to + i) + __builtin_convertvector(x, f64x16));
      pack(sums + i, decltype(unpack(sums)){});
    }
  }
};

// to = the sum of `chunks` rows, [chunks, stride] from `sums` on, in order.
template <class T>
struct AddChunks {
  template <Isa isa>
  MTFAST_INLINE void run(const double* sums, int64_t chunks, int64_t stride, T* to, int64_t columns) {
    for (int64_t i = 0; i < columns; i += kStep) {
      Vec<T> totals[2];
      for (int n = 0; n < 2; ++n) {
        f64x16 total = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          total += unpack(sums + chunk * stride + i + n * kLanes);
        totals[n] = __builtin_convertvector(total, Vec<T>);
      }
      store_two(to + i, totals, columns - i);
    }
  }
};

template <class F>
void for_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kBFloat16:
      return f(bf16{});
    case Dtype::kFloat16:
      return f(f16{});
  }
}

template <class T>
void backward_with_bias(const Inputs& in, const T* dy, T* dx, T* dbias) {
  // Sums over fixed chunks of rows, added in order: the same bits for every number of threads.
  const int64_t columns = in.columns, stride = padded(columns);
  const int64_t groups = (in.rows + kFewRows - 1) / kFewRows;
  const int64_t chunk_rows = kFewRows * std::max<int64_t>(1, (groups + kMostChunks - 1) / kMostChunks);
  const int64_t chunks = (in.rows + chunk_rows - 1) / chunk_rows;
  const auto bias = widened<T>(in.bias, columns);
  std::vector<double> sums(chunks * stride);
  const int64_t grain = std::max<int64_t>(1, kGrain / (chunk_rows * columns));
  torch::stable::parallel_for(0, chunks, grain, [&](int64_t first, int64_t past) {
    std::vector<Scalar<T>> of_few(stride);
    for (int64_t chunk = first; chunk < past; ++chunk) {
      const int64_t last = std::min(in.rows, (chunk + 1) * chunk_rows);
      for (int64_t row = chunk * chunk_rows; row < last; row += kFewRows) {
        const int64_t at = row * columns, rows = std::min(kFewRows, last - row);
        call_best(BackwardRows<T, true>{}, dy + at, static_cast<const T*>(in.x) + at, bias.data(), dx + at,
                  of_few.data(), rows, columns);
        call_best(CarryOn<Scalar<T>>{}, of_few.data(), sums.data() + chunk * stride, stride);
      }
    }
  });
  call_best(AddChunks<T>{}, sums.data(), chunks, stride, dbias, columns);
}

}  // namespace

void cpu_forward(const Inputs& in, void* y) {
  for_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T* x = static_cast<const T*>(in.x);
    T* to = static_cast<T*>(y);
    const int64_t columns = in.columns;
    if (in.bias == nullptr) {  // then rows are of any length
      torch::stable::parallel_for(0, in.rows * columns, kGrain, [&](int64_t first, int64_t past) {
        call_best(ForwardRows<T, false>{}, x + first, nullptr, to + first, 1, past - first);
      });
      return;
    }
    const auto bias = widened<T>(in.bias, columns);
    const int64_t grain = std::max<int64_t>(1, kGrain / columns);
    torch::stable::parallel_for(0, in.rows, grain, [&](int64_t first, int64_t past) {
      const int64_t at = first * columns;
      call_best(ForwardRows<T, true>{}, x + at, bias.data(), to + at, past - first, columns);
    });
  });
}

void cpu_backward(const Inputs& in, const void* dy, void* dx, void* dbias) {
  for_dtype(in.dtype, [&](auto zero) {
    using T = decltype(zero);
    const T *x = static_cast<const T*>(in.x), *from = static_cast<const T*>(dy);
    T* to = static_cast<T*>(dx);
    if (in.bias != nullptr) return backward_with_bias(in, from, to, static_cast<T*>(dbias));
    torch::stable::parallel_for(0, in.rows * in.columns, kGrain, [&](int64_t first, int64_t past) {
      call_best(BackwardRows<T, false>{}, from + first, x + first, nullptr, to + first, nullptr, 1,
                past - first);
    });
  });
}

}  // namespace mtfast::bias_gelu
