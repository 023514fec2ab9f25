// What the kernels of packed attention have in common: lanes, dropout, the statistics of a row of scores.
#pragma once
#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "packed_attention.h"

namespace mtfast::attention {

constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
// Of a value that is the same in all lanes, so that the compiler knows it too.
template <class T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(kAllLanes, x, 0);
}
__device__ __forceinline__ int warp_index() { return uniform(static_cast<int>(threadIdx.x) >> 5); }

template <class T>
__device__ __forceinline__ T* head_of(const AttentionTensor& x, int head) {
  return static_cast<T*>(x.data) + head * x.head_stride;
}

// One head of a tensor.
template <class T>
struct HeadRows {
  T* data;
  int stride;

  __device__ __forceinline__ HeadRows(const AttentionTensor& x, int head)
      : data(head_of<T>(x, head)), stride(static_cast<int>(x.row_stride)) {}
  __device__ __forceinline__ T* row(int i) const { return data + static_cast<int64_t>(i) * stride; }
};

// Place and length of a sequence; those that cannot be (wrong cu_seqlens) are empty.
struct Sequence {
  int begin, length;

  __device__ __forceinline__ Sequence(const AttentionShape& shape, unsigned number) : begin(0), length(0) {
    if (number >= shape.sequences) return;
    begin = shape.cu_seqlens[number];
    const int end = shape.cu_seqlens[number + 1];
    length = begin >= 0 && end <= shape.total ? max(end - begin, 0) : 0;
  }
};

// Of what dropout keeps.
__device__ __forceinline__ float keep_scale(const AttentionShape& shape) {
  return 65536.0f / (65536.0f - shape.threshold);
}

struct Dropout {
  uint32_t limit;  // of draws in the upper half of a word
  uint32_t head;
  uint64_t seed;
  float scale;  // of what is kept

  __device__ __forceinline__ Dropout(const AttentionShape& shape, int head)
      : limit(shape.threshold << 16),
        head(static_cast<uint32_t>(head)),
        seed(shape.threshold ? static_cast<uint64_t>(*shape.seed) : 0),
        scale(keep_scale(shape)) {}

  __device__ __forceinline__ bool any() const { return limit != 0; }
  // The draws of rows `row` and row + 8, columns 2 * t and 2 * t + 1 and the same eight further, from tile
  // row and column (multiples of 16) on; `row` is counted in the batch.
  __device__ __forceinline__ Philox4 draws(int row, int column, int t) const {
    return philox(static_cast<uint32_t>(row), static_cast<uint32_t>(column / 4 + t), head,
                  static_cast<uint32_t>(Purpose::kAttentionDropout), seed);
  }
  __device__ __forceinline__ bool keeps(uint32_t word, int half) const {
    return (half ? word : word << 16) >= limit;
  }
};

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }
constexpr float kLowest =
    -3.402823466e+38f;  // where a running maximum begins: minus infinity less itself is no number

// A row of scores in powers of two, as the forward leaves it for the backward: the largest, and one over the
// sum of 2^(score - largest).
struct Statistics {
  float row_max, factor;

  // Of a row without scores: no weight but 0.
  __device__ __forceinline__ Statistics() : row_max(0.0f), factor(0.0f) {}
  __device__ __forceinline__ Statistics(const void* stats, int64_t number) {
    const float2 pair = static_cast<const float2*>(stats)[number];
    row_max = pair.x;
    factor = 1.0f / pair.y;
  }
  __device__ __forceinline__ static void store(void* stats, int64_t number, float row_max, float row_sum) {
    static_cast<float2*>(stats)[number] = float2{row_max, row_sum};
  }
  // The weight of a score before it is scaled. Product and difference are rounded apart, as the forward does
  // it, lest the rounding of a large score count twice.
  __device__ __forceinline__ float weight(float score, float scale) const {
    return ptx::exp2_approx(__fadd_rn(__fmul_rn(score, scale), -row_max)) * factor;
  }
};

// Of scores in powers of two, rounded once.
__device__ __forceinline__ float log2_scale(const AttentionShape& shape) {
  return static_cast<float>(shape.softmax_scale * 1.4426950408889634);
}

// Calls launch(integral head_dim), up to the largest that there are kernels for.
template <int kLargest, class F>
int by_head_dim(const AttentionShape& shape, F launch) {
  if (shape.head_dim == 32) return launch(std::integral_constant<int, 32>{});
  if (shape.head_dim == 64) return launch(std::integral_constant<int, 64>{});
  if (shape.head_dim == 128) return launch(std::integral_constant<int, 128>{});
  if constexpr (kLargest == 256)
    if (shape.head_dim == 256) return launch(std::integral_constant<int, 256>{});
  return static_cast<int>(cudaErrorInvalidValue);
}

}  // namespace mtfast::attention
