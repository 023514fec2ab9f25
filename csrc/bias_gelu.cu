// bias_gelu on CUDA: one pass in each direction; backward, the bias's gradient is then the sum over chunks of
// rows.
//
// Floor: forward x is read and y written, backward x and dy are read and dx written: 25 and 38 MB at 4096
// rows of 1536 columns in 16 bits, 5 and 8 us at 4.8 TB/s. erff alone would take an H200 longer than that;
// with one exponential and a short polynomial an element is some 20 instructions forward, 25 backward. The
// sums' scratch is one part in 50 of what is moved. A lane has 16 bytes of columns and a warp two rows under
// way; eight warps are a block, and registers are few enough for four blocks on an SM.
//
// Sums over rows: a thread's in float, those of warps pairwise, those of chunks in double. No atomics: the
// order of no sum varies.
#include "bias_gelu.h"
#include "device/column_sums.cuh"
#include "device/gelu.cuh"
#include "device/vector.cuh"

namespace mtfast::bias_gelu {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * 32, kBlocks = 4;
constexpr int kAtOnce = 2;          // rows that a warp loads before it turns to the first
constexpr int kForwardRows = 64;    // of a block, or a multiple of them, so that it reads the bias seldom
constexpr int kMostBlocks = 65535;  // that a grid has in its second dimension

// Of a row, what a lane has.
template <class T>
constexpr int kWidth = Vector<T>::kSize;

// Columns column .. column + kWidth - 1 of a row; those beyond its end read 0. With kAligned all rows begin
// on 16 bytes, and so do a lane's columns.
template <bool kAligned, class T>
__device__ __forceinline__ Vector<T> load_row(const T* row, int64_t column, int64_t columns) {
  Vector<T> vector{};
  if constexpr (kAligned) {
    if (column < columns) vector = load(row + column);
  } else {
    MTFAST_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      if (column + i < columns) vector.x[i] = row[column + i];
    }
  }
  return vector;
}

template <bool kAligned, class T>
__device__ __forceinline__ void store_row(T* row, int64_t column, int64_t columns,
                                          const float (&from)[kWidth<T>]) {
  if constexpr (kAligned) {
    if (column < columns) store(row + column, round_to<T>(from));
  } else {
    MTFAST_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      if (column + i < columns) round_to(row[column + i], from[i]);
    }
  }
}

// value becomes gelu(x), slope its derivative there.
template <class T>
__device__ __forceinline__ void gelu_of(const Vector<T>& x, const float (&bias)[kWidth<T>],
                                        float (&value)[kWidth<T>], float (&slope)[kWidth<T>]) {
  float z[kWidth<T>];
  to_float(z, x);
  MTFAST_UNROLL
  for (int i = 0; i < kWidth<T>; ++i) {
    gelu::value_and_slope<sizeof(T) == 2>(z[i] + bias[i], value[i], slope[i]);
  }
}

// The matrix of a launch, and the part of it that a thread has.
template <class T, bool kAligned>
struct Part {
  int64_t columns, column, begin, end;  // rows
  float bias[kWidth<T>];

  __device__ __forceinline__ Part(const Inputs& in, int64_t each)
      : columns(in.columns),
        column((static_cast<int64_t>(blockIdx.x) * 32 + (threadIdx.x & 31)) * kWidth<T>),
        begin(blockIdx.y * each),
        end(begin + each < in.rows ? begin + each : in.rows),
        bias{} {
    if (in.bias != nullptr)
      to_float(bias, load_row<kAligned>(static_cast<const T*>(in.bias), column, columns));
  }

  __device__ __forceinline__ Vector<T> load_at(const T* from, int64_t row) const {
    return load_row<kAligned>(from + row * columns, column, columns);
  }
  __device__ __forceinline__ void store_at(T* to, int64_t row, const float (&x)[kWidth<T>]) const {
    store_row<kAligned>(to + row * columns, column, columns, x);
  }
};

// Rows that a warp has in registers: row0 first, the others every kWarps.
template <class T>
struct Ahead {
  Vector<T> rows[kAtOnce];

  template <bool kAligned>
  __device__ __forceinline__ void load(const Part<T, kAligned>& part, const T* from, int64_t row0) {
    MTFAST_UNROLL
    for (int r = 0; r < kAtOnce; ++r) {
      if (row0 + r * kWarps < part.end) rows[r] = part.load_at(from, row0 + r * kWarps);
    }
  }
  __device__ __forceinline__ Vector<T> take() {
    const Vector<T> first = rows[0];
    MTFAST_UNROLL
    for (int r = 1; r < kAtOnce; ++r) rows[r - 1] = rows[r];
    return first;
  }
};

// Calls load(row0) for every kAtOnce rows of this warp, then row(i) for each of them: a loop, since unrolled
// it is more code than a warp comes by twice.
template <class Part, class Load, class Row>
__device__ __forceinline__ void each_row(const Part& part, const Load& load, const Row& row) {
  constexpr int64_t kStep = kAtOnce * kWarps;
#pragma unroll 1
  for (int64_t row0 = part.begin + (threadIdx.x >> 5); row0 < part.end; row0 += kStep) {
    load(row0);
    const int64_t past = row0 + kStep < part.end ? row0 + kStep : part.end;
#pragma unroll 1
    for (int64_t i = row0; i < past; i += kWarps) row(i);
  }
}

template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? kBlocks : 2)
    forward_kernel(const Inputs in, int64_t rows, T* __restrict__ y) {
  const Part<T, kAligned> part(in, rows);
  Ahead<T> x;
  const auto load = [&](int64_t row0) { x.load(part, static_cast<const T*>(in.x), row0); };
  each_row(part, load, [&](int64_t row) {
    float value[kWidth<T>], slope[kWidth<T>];
    gelu_of<T>(x.take(), part.bias, value, slope);
    part.store_at(y, row, value);
  });
}

// partial [chunks, columns]: sums of dx over each chunk of rows, before it is rounded.
template <class T, bool kAligned>
__global__ void __launch_bounds__(kThreads, kAligned ? kBlocks : 2)
    backward_kernel(const Inputs in, int64_t chunk_rows, const T* __restrict__ dy, T* __restrict__ dx,
                    float* __restrict__ partial) {
  constexpr int kColumns = 32 * kWidth<T>;
  const Part<T, kAligned> part(in, chunk_rows);
  Ahead<T> x, of_y;
  float sums[kWidth<T>] = {};
  const auto load = [&](int64_t row0) {
    x.load(part, static_cast<const T*>(in.x), row0);
    of_y.load(part, dy, row0);
  };
  each_row(part, load, [&](int64_t row) {
    float value[kWidth<T>], slope[kWidth<T>], grad[kWidth<T>];
    gelu_of<T>(x.take(), part.bias, value, slope);
    to_float(grad, of_y.take());
    MTFAST_UNROLL
    for (int i = 0; i < kWidth<T>; ++i) {
      grad[i] *= slope[i];
      sums[i] += grad[i];
    }
    part.store_at(dx, row, grad);
  });
  if (partial == nullptr) return;

  const int warp = static_cast<int>(threadIdx.x) >> 5, lane = threadIdx.x & 31;
  float* of_warps = shared_memory<float>();  // [kWarps, kColumns]
  MTFAST_UNROLL
  for (int i = 0; i < kWidth<T>; i += 4) {
    *reinterpret_cast<float4*>(of_warps + warp * kColumns + lane * kWidth<T> + i) =
        make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]);
  }
  __syncthreads();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  if (static_cast<int>(threadIdx.x) >= kColumns || column >= part.columns) return;
  const auto pair = [&](int w) {
    return of_warps[w * kColumns + threadIdx.x] + of_warps[(w + 1) * kColumns + threadIdx.x];
  };
  partial[blockIdx.y * part.columns + column] = (pair(0) + pair(2)) + (pair(4) + pair(6));
}

// ---- launches ----

template <class T>
bool is_aligned(const Inputs& in, const void* a, const void* b) {
  return in.columns % kWidth<T> == 0 && on_16_bytes(in.x) && on_16_bytes(in.bias) && on_16_bytes(a) &&
         on_16_bytes(b);
}

template <class T>
dim3 grid_of(const Inputs& in, int64_t each) {
  const int64_t width = 32 * kWidth<T>;
  return dim3(static_cast<unsigned>((in.columns + width - 1) / width),
              static_cast<unsigned>((in.rows + each - 1) / each));
}

template <class T>
int launch_forward(const Inputs& in, void* y, void* stream) {
  constexpr int64_t kMost = int64_t{kForwardRows} * kMostBlocks;
  const int64_t rows = kForwardRows * ((in.rows + kMost - 1) / kMost);
  const auto kernel = is_aligned<T>(in, y, nullptr) ? forward_kernel<T, true> : forward_kernel<T, false>;
  return MTFAST_LAUNCH(grid_of<T>(in, rows), dim3(kThreads), 0, stream, kernel, in, rows, static_cast<T*>(y));
}

template <class T>
int launch_backward(const Inputs& in, const void* dy, void* dx, float* partial, void* dbias, void* stream) {
  const int64_t chunk_rows = backward_chunk_rows(in.rows);
  const auto kernel = is_aligned<T>(in, dy, dx) ? backward_kernel<T, true> : backward_kernel<T, false>;
  if (const int error = MTFAST_LAUNCH(grid_of<T>(in, chunk_rows), dim3(kThreads),
                                      kWarps * 32 * kWidth<T> * sizeof(float), stream, kernel, in, chunk_rows,
                                      static_cast<const T*>(dy), static_cast<T*>(dx), partial))
    return error;
  if (partial == nullptr) return 0;
  const ColumnSums<T, 1> sums{{static_cast<T*>(dbias)}};
  return launch_column_sums(partial, backward_chunks(in.rows), in.columns, sums, stream);
}

}  // namespace

int mtfast_bias_gelu_forward(const Inputs* in, void* y, void* stream) {
  const auto launch = in->dtype == Dtype::kBFloat16  ? launch_forward<__nv_bfloat16>
                      : in->dtype == Dtype::kFloat16 ? launch_forward<__half>
                                                     : launch_forward<float>;
  return launch(*in, y, stream);
}

int mtfast_bias_gelu_backward(const Inputs* in, const void* dy, void* dx, float* partial, void* dbias,
                              void* stream) {
  const auto launch = in->dtype == Dtype::kBFloat16  ? launch_backward<__nv_bfloat16>
                      : in->dtype == Dtype::kFloat16 ? launch_backward<__half>
                                                     : launch_backward<float>;
  return launch(*in, dy, dx, partial, dbias, stream);
}

}  // namespace mtfast::bias_gelu
