// What the forward and the backward kernels of packed attention share beside plan and tiles: dropout, a row's
// statistics, launches.
#pragma once
#include "packed_attention_tile.cuh"

namespace mtfast::attention {

constexpr float kLowest =
    -3.402823466e+38f;  // before the first score; finite, so that differences are numbers

struct Dropout {
  uint32_t threshold;
  uint64_t seed;
  uint32_t head;
  float scale;

  __device__ __forceinline__ Dropout(const AttentionShape& shape, int head)
      : threshold(shape.threshold),
        seed(shape.threshold ? static_cast<uint64_t>(*shape.seed) : 0),
        head(head),
        scale(65536.0f / (65536.0f - shape.threshold)) {}

  // Bit i: is column 8 * group + i of this row kept?
  __device__ __forceinline__ uint32_t group(int row, int group) const {
    const Philox4 draws = philox(static_cast<uint32_t>(row), static_cast<uint32_t>(group), head,
                                 static_cast<uint32_t>(Purpose::kAttentionDropout), seed);
    uint32_t kept = 0;
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i)
      kept |= static_cast<uint32_t>((draws.word[i / 2] >> (16 * (i % 2)) & 0xffffu) >= threshold) << i;
    return kept;
  }

  // Bit 4 * n + j: is this lane's x[n][j] kept, where x's rows are queries from `row` on and its columns keys
  // from `column`, a multiple of 8, on? Each lane makes one of the piece's 32 draws of eight.
  __device__ __forceinline__ uint32_t kept(int row, int column) const {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    uint32_t quad = group(row + g + 8 * (t >> 1), column / 8 + (t & 1)) << (8 * t);
    quad |= __shfl_xor_sync(kAllLanes, quad, 1);
    quad |= __shfl_xor_sync(kAllLanes, quad, 2);
    uint32_t bits = 0;  // byte 2 * r + n of quad is for rows g + 8 * r, columns from 8 * n on
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) bits |= (quad >> (8 * (2 * r + n) + 2 * t) & 3u) << (4 * n + 2 * r);
    return bits;
  }

  // The same of a transposed piece, whose rows are keys and whose columns are queries.
  __device__ __forceinline__ uint32_t kept_transposed(int row, int column) const {
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
    const uint32_t mine = group(row + (lane & 15), column / 8 + (lane >> 4));
    const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 16);
    const uint32_t both = lane < 16 ? mine | other << 8 : other | mine << 8;  // 16 keys of query lane % 16
    uint32_t bits = 0;
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t keys = __shfl_sync(kAllLanes, both, 8 * n + 2 * t + e);
      bits |= (keys >> g & 1u) << (4 * n + e) | (keys >> (g + 8) & 1u) << (4 * n + 2 + e);
    }
    return bits;
  }
};

__device__ __forceinline__ float minus_infinity() { return __uint_as_float(0xff800000u); }

// A row of scores in powers of two, as the forward leaves it for the backward: the largest, and one over the
// sum of 2^(score - largest).
struct Statistics {
  float most, factor;

  // Of a row without scores: no weight but 0.
  __device__ __forceinline__ Statistics() : most(0.0f), factor(0.0f) {}
  __device__ __forceinline__ Statistics(const void* stats, int64_t number) {
    const float2 pair = static_cast<const float2*>(stats)[number];
    most = pair.x;
    factor = 1.0f / pair.y;
  }
  __device__ __forceinline__ static void store(void* stats, int64_t number, float most, float sum) {
    static_cast<float2*>(stats)[number] = float2{most, sum};
  }
  // Of a score before it is scaled. Product and difference are rounded apart, as the forward does it, lest
  // the rounding of a large score count twice.
  __device__ __forceinline__ float weight(float x, float scale) const {
    return ptx::exp2_approx(__fadd_rn(__fmul_rn(x, scale), -most)) * factor;
  }
};

// Of scores in powers of two, rounded once.
__device__ __forceinline__ float log2_scale(const AttentionShape& shape) {
  return static_cast<float>(shape.softmax_scale * 1.4426950408889634);
}

// What the kernels of one launch have in common.
template <class T, int kDim>
struct Launch {
  static constexpr int kPiece = Tile<T, kDim>::kPiece, kWindow = attention::kWindow<kPiece>;
  static constexpr int kTile = Tile<T, kDim>::kElements * static_cast<int>(sizeof(T));
  static constexpr int kScratch = sizeof(T) == 4 ? kWarps * kScratchPerWarp * 4 : 0;
  static constexpr int kPlan = (sizeof(Plan) + 15) / 16 * 16;

  static dim3 grid(const AttentionShape& shape) {
    return dim3(static_cast<unsigned>((shape.total + kWindow - 1) / kWindow * shape.heads));
  }
};

// Calls launch(T{}, integral head_dim) for the shape's dtype and head_dim.
template <class F>
int dispatch(const AttentionShape& shape, F launch) {
  const auto by_dim = [&](auto element) {
    using T = decltype(element);
    switch (shape.head_dim) {
      case 32:
        return launch(T{}, std::integral_constant<int, 32>{});
      case 64:
        return launch(T{}, std::integral_constant<int, 64>{});
      case 128:
        return launch(T{}, std::integral_constant<int, 128>{});
      default:
        return static_cast<int>(cudaErrorInvalidValue);
    }
  };
  switch (shape.dtype) {
    case Dtype::kBFloat16:
      return by_dim(__nv_bfloat16{});
    case Dtype::kFloat16:
      return by_dim(__half{});
    case Dtype::kFloat32:
      return by_dim(float{});
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace mtfast::attention
