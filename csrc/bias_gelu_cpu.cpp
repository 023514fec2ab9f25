// bias_gelu on the CPU: one vectorised, threaded pass in each direction.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "bias_gelu.h"
#include "gelu_simd.h"
#include "simd_pairs.h"

namespace mtfast::bias_gelu {
namespace {

using namespace simd;

constexpr int64_t kGrain = 16384;    // elements that are worth a thread
constexpr int64_t kFewRows = 32;     // summed before the sum is carried on in double
constexpr int64_t kMostChunks = 64;  // of rows, each with sums of its own

// kBias: whether there is one.
template <class T, bool kBias>
struct ForwardRows {
  static constexpr bool kStoresBf16 = std::is_same_v<T, bf16>;
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
        store_two<isa>(y + i, z, columns - i);
      }
  }
};

// Adds dx's columns, before they are rounded, to `sums` where there is a bias.
template <class T, bool kBias>
struct BackwardRows {
  static constexpr bool kStoresBf16 = std::is_same_v<T, bf16>;
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
        store_two<isa>(dx + i, grad, columns - i);
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
      store_two<isa>(to + i, totals, columns - i);
    }
  }
};

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
