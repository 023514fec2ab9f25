// The last step of sums over rows: a kernel before has left those of each chunk of rows in float, and this
// one adds them up in an order that does not vary. No atomics.
#pragma once
#include "element.cuh"

namespace mtfast {

// Where the sums of each of kVectors matrices go; null: not wanted.
template <class T, int kVectors>
struct ColumnSums {
  T* to[kVectors];
};

constexpr int kColumnSumsWarps = 8;

// 32 columns of one matrix a block, every eighth chunk a warp; in double, so that only float's own rounding
// is left.
template <class T, int kVectors>
__global__ void __launch_bounds__(kColumnSumsWarps * 32)
    column_sums_kernel(const float* __restrict__ partial, int64_t chunks, int64_t columns,
                       const ColumnSums<T, kVectors> sums) {
  T* to = sums.to[0];
  MTFAST_UNROLL
  for (int v = 1; v < kVectors; ++v) {  // not equal to: an index that the compiler sees goes to memory
    if (v <= static_cast<int>(blockIdx.y)) to = sums.to[v];
  }
  if (to == nullptr) return;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  double sum = 0;
  if (column < columns) {
    const float* from = partial + blockIdx.y * chunks * columns + column;
    MTFAST_UNROLL
    for (int64_t chunk = warp; chunk < chunks; chunk += kColumnSumsWarps) {
      sum += from[chunk * columns];
    }
  }
  double* of_warps = shared_memory<double>();  // [kColumnSumsWarps, 32]
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= columns) return;
  for (int w = 1; w < kColumnSumsWarps; ++w) sum += of_warps[w * 32 + lane];
  round_to(to[column], static_cast<float>(sum));
}

// to[v][c] = sum over k < chunks of partial[(v * chunks + k) * columns + c]; 0 or a cudaError_t.
template <class T, int kVectors>
int launch_column_sums(const float* partial, int64_t chunks, int64_t columns,
                       const ColumnSums<T, kVectors>& sums, void* stream) {
  const dim3 grid(static_cast<unsigned>((columns + 31) / 32), kVectors);
  return MTFAST_LAUNCH(grid, dim3(kColumnSumsWarps * 32), kColumnSumsWarps * 32 * sizeof(double), stream,
                       (column_sums_kernel<T, kVectors>), partial, chunks, columns, sums);
}

}  // namespace mtfast
