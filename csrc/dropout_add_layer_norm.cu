// dropout_add_layer_norm on CUDA, forward: one pass over the rows.
//
// Floor: x and residual are read and y is written, 6 bytes an element in 16 bits. An element takes about 55
// instructions with dropout, a Philox call for eight of them included; an H200's SM issues 37 in the time
// that its share of the memory needs for them, an H100's 53. ncu on an H200, 16,384 rows of 768: 70% of the
// issue slots taken, 38% of the memory's bandwidth.
//
// A thread has eight columns, which are one Philox call and, in 16 bits, one load; the warps beside each
// other a row of up to 4096, which stays in registers from its load to its end. A block has a few rows and
// reads the vectors once, into shared memory; several blocks are on an SM, and what the next row needs is
// asked for before this one is worked on. Longer rows, and those that do not begin on 16 bytes, are read
// element by element and again at each step.
#include <algorithm>

#include "dropout_add_layer_norm_rows.cuh"

namespace mtfast::dropout_add_layer_norm {
namespace {

// Rows of a block: few, but enough to be worth its reading the vectors, and that what may be on a large GPU
// at once, two blocks on an SM, is all of a small layer.
constexpr int64_t kLeastRows = 16, kMostRows = 32, kBlocksAtOnce = 256;
enum { kOfWeight, kOfBias, kOfXBias, kVectors };

// What memory has of a thread's columns of a row.
template <class T>
struct Given {
  Eight<T> x, residual;

  __device__ __forceinline__ Given(const Operands<T>& in, int64_t row, int64_t end, int column) {
    const int hidden = static_cast<int>(in.layer.hidden);
    x = columns_of(in.x + row * hidden, column, hidden, true, row < end);
    residual =
        columns_of(in.residual + row * hidden, column, hidden, true, in.residual != nullptr && row < end);
  }
};

// mean and rstd of a row from its sum's share, and the sums of the deviations from that and of their squares.
// The first of these is what rounding left the mean off by (see cpu_forward).
__device__ __forceinline__ float2 statistics(float mean, const float (&off)[2], float share,
                                             const Layer& layer) {
  const float shift = off[0] * share, spread = off[1] * share - shift * shift;
  return make_float2(mean + shift, rsqrtf((spread < 0.0f ? 0.0f : spread) + static_cast<float>(layer.eps)));
}

template <class T>
__global__ void __launch_bounds__(kMostThreads, 2)
    forward_kernel(const Operands<T> in, T* __restrict__ y, float* __restrict__ stats) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t begin = in.begin(), end = in.end();
  const Place place(in.warps);
  const int column = place.column;
  const bool is_column = column < hidden;  // of all eight columns, or of none
  const uint64_t seed = seed_of(layer);
  const float share = 1.0f / static_cast<float>(hidden);
  Given<T> next(in, begin + place.group, end, column);
  const Vectors<T> vectors{shared_memory<T>(), place.tile};
  float* of_warps = reinterpret_cast<float*>(vectors.shared + kVectors * place.tile);
  float* others_of_warps = of_warps + blockDim.x / 32;
  vectors.bring(kOfWeight, in.weight, hidden);
  vectors.bring(kOfBias, in.bias, hidden);
  vectors.bring(kOfXBias, in.x_bias, hidden);
  __syncthreads();
  MTFAST_NO_UNROLL
  for (int64_t first = begin; first < end; first += place.groups) {
    const int64_t row = first + place.group;
    float s[8];
    make_sums(s, layer, Draws(layer, seed, row, column), next.x, next.residual, vectors.at(kOfXBias, column));
    next = Given<T>(in, row + place.groups, end, column);
    float mean[1] = {};
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) mean[0] += s[e];
    place.row_sums(mean, of_warps);
    mean[0] *= share;
    float off[2] = {};  // the sums of the deviations from `mean` and of their squares
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float deviation = is_column ? s[e] - mean[0] : 0.0f;
      off[0] += deviation;
      off[1] += deviation * deviation;
    }
    place.row_sums(off, others_of_warps);
    if (row >= end) continue;
    const float2 of_row = statistics(mean[0], off, share, layer);
    if (stats != nullptr && column == 0) reinterpret_cast<float2*>(stats)[row] = of_row;
    float of_weight[8], of_bias[8];
    unpack(of_weight, vectors.at(kOfWeight, column));
    unpack(of_bias, vectors.at(kOfBias, column));
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) s[e] = (s[e] - of_row.x) * of_row.y * of_weight[e] + of_bias[e];
    store8(y + row * hidden, column, hidden, true, s);
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    forward_long_kernel(const Operands<T> in, T* __restrict__ y, float* __restrict__ stats) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t row = blockIdx.x;
  const Place place(in.warps);
  const uint64_t seed = seed_of(layer);
  const float share = 1.0f / static_cast<float>(hidden);
  float* of_warps = shared_memory<float>();
  const auto make = [&](float (&s)[8], int column) {
    make_long_sums(s, Draws(layer, seed, row, column), in, row, column);
  };
  float mean[1] = {};
  place.each_tile(hidden, [&](int column) {
    float s[8];
    make(s, column);
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) mean[0] += column + e < hidden ? s[e] : 0.0f;
  });
  place.row_sums(mean, of_warps);
  mean[0] *= share;
  float off[2] = {};
  place.each_tile(hidden, [&](int column) {
    float s[8];
    make(s, column);
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float deviation = column + e < hidden ? s[e] - mean[0] : 0.0f;
      off[0] += deviation;
      off[1] += deviation * deviation;
    }
  });
  place.row_sums(off, of_warps + blockDim.x / 32);
  const float2 of_row = statistics(mean[0], off, share, layer);
  if (stats != nullptr && threadIdx.x == 0) reinterpret_cast<float2*>(stats)[row] = of_row;
  place.each_tile(hidden, [&](int column) {
    float s[8], of_weight[8], of_bias[8];
    make(s, column);
    unpack(of_weight, columns_of(in.weight, column, hidden, false, true));
    unpack(of_bias, columns_of(in.bias, column, hidden, false, true));
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) s[e] = (s[e] - of_row.x) * of_row.y * of_weight[e] + of_bias[e];
    store8(y + row * hidden, column, hidden, false, s);
  });
}

template <class T>
int launch_forward(const Inputs& in, void* y, float* stats, void* stream) {
  const bool held = is_held(in, on_16_bytes(y));
  const int warps = held ? warps_of(in.layer) : kMostWarps;
  const int groups = warps == 1 ? 8 : warps <= 3 ? 4 : warps <= 6 ? 2 : 1;
  const int64_t wanted = (in.layer.rows + kBlocksAtOnce - 1) / kBlocksAtOnce;
  const int64_t rows = held ? std::clamp((wanted + 3) / 4 * 4, kLeastRows, kMostRows) : 1;
  const dim3 grid(static_cast<unsigned>((in.layer.rows + rows - 1) / rows)), block(32 * warps * groups);
  const size_t vectors = held ? kVectors * 256 * warps * sizeof(T) : 0;
  const size_t shared = vectors + warps * groups * (1 + 2) * sizeof(float);
  const auto kernel = held ? forward_kernel<T> : forward_long_kernel<T>;
  if (const int error = allow_shared_memory(kernel, shared)) return error;
  return MTFAST_LAUNCH(grid, block, shared, stream, kernel, operands_of<T>(in, rows, warps),
                       static_cast<T*>(y), stats);
}

}  // namespace

int mtfast_dropout_add_layer_norm_forward(const Inputs* in, void* y, float* stats, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kBFloat16  ? launch_forward<__nv_bfloat16>
                      : in->layer.dtype == Dtype::kFloat16 ? launch_forward<__half>
                                                           : launch_forward<float>;
  return launch(*in, y, stats, stream);
}

}  // namespace mtfast::dropout_add_layer_norm
