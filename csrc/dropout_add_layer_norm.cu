// dropout_add_layer_norm on CUDA, forward: one pass over the rows.
//
// Floor: x and residual are read and y is written, 6 bytes an element in 16 bits. An element takes about 40
// instructions with dropout, a Philox call for eight of them included; an H200's SM issues 37 in the time
// that its share of the memory needs for them, an H100's 53.
//
// A thread has eight columns, the warps beside each other a row of up to 4096, and two rows are under way at
// once, so that their loads wait together and so do their sums over columns, at one barrier. A row stays in
// registers from its load to its end. Eight columns are one Philox call and, in 16 bits, one load. Shorter
// rows lie below each other in a block, which has a chunk of rows and reads the vectors once, into shared
// memory. Longer rows, and those that do not begin on 16 bytes, are read element by element and again at each
// step.
#include "dropout_add_layer_norm_rows.cuh"

namespace mtfast::dropout_add_layer_norm {
namespace {

template <class T, bool kHeld>
__global__ void __launch_bounds__(kMostThreads)
    forward_kernel(const Operands<T> in, T* __restrict__ y, float* __restrict__ stats) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t begin = blockIdx.x * in.chunk_rows;
  const int64_t end = begin + in.chunk_rows < layer.rows ? begin + in.chunk_rows : layer.rows;
  const Place place(in.warps);
  const uint64_t seed = seed_of(layer);
  const float share = 1.0f / static_cast<float>(hidden), eps = static_cast<float>(layer.eps);
  const Vectors<T, kHeld> vectors{in, shared_memory<T>(), place.tile};
  float* of_warps = reinterpret_cast<float*>(vectors.shared + (kHeld ? kSums * place.tile : 0));
  float* others_of_warps = of_warps + blockDim.x / 32 * 2 * kRows;
  vectors.bring(kWeight, in.weight);
  vectors.bring(kBias, in.bias);
  vectors.bring(kXBias, in.x_bias);
  __syncthreads();
  for (int64_t first = begin; first < end; first += kRows * place.groups) {
    const int64_t row = first + kRows * place.group;
    Eights s;
    Draws draws(layer);
    float mean[kRows] = {}, rstd[kRows];
    float off[2 * kRows] = {};  // of each row the sums of its deviations from `mean` and of their squares
    const auto make = [&](int column) { make_sums(s, draws, in, vectors, kXBias, seed, row, end, column); };
    place.each_tile<kHeld>(hidden, [&](int column) {
      make(column);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) mean[i] += s.of[i][e];
      }
    });
    place.row_sums(mean, of_warps);
    MTFAST_UNROLL
    for (int i = 0; i < kRows; ++i) mean[i] *= share;
    place.each_tile<kHeld>(hidden, [&](int column) {
      if (!kHeld) make(column);
      if (column >= hidden) return;
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) {
          // Of rows that are held all eight columns are there or none.
          const float deviation = kHeld || column + e < hidden ? s.of[i][e] - mean[i] : 0.0f;
          off[2 * i] += deviation;
          off[2 * i + 1] += deviation * deviation;
        }
      }
    });
    place.row_sums(off, others_of_warps);
    MTFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      // The first sum is what rounding left the mean off by (see cpu_forward).
      const float shift = off[2 * i] * share, spread = off[2 * i + 1] * share - shift * shift;
      mean[i] += shift;
      rstd[i] = rsqrtf((spread < 0.0f ? 0.0f : spread) + eps);
      if (stats != nullptr && place.column == 0 && row + i < end) {
        reinterpret_cast<float2*>(stats)[row + i] = make_float2(mean[i], rstd[i]);
      }
    }
    place.each_tile<kHeld>(hidden, [&](int column) {
      if (!kHeld) make(column);
      float weight[8], bias[8];
      vectors.get(weight, kWeight, in.weight, column);
      vectors.get(bias, kBias, in.bias, column);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float out[8];
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) out[e] = (s.of[i][e] - mean[i]) * rstd[i] * weight[e] + bias[e];
        if (row + i < end) store8(y + (row + i) * hidden, column, hidden, kHeld, out);
      }
    });
  }
}

template <class T>
int launch_forward(const Inputs& in, void* y, float* stats, void* stream) {
  const Block block(in, on_16_bytes(y));
  const auto kernel = block.held ? forward_kernel<T, true> : forward_kernel<T, false>;
  const size_t shared = block.shared_bytes(sizeof(T), kSums);
  if (const int error = allow_shared_memory(kernel, shared)) return error;
  return MTFAST_LAUNCH(dim3(static_cast<unsigned>(chunks(in.layer.rows))), dim3(block.threads()), shared,
                       stream, kernel, operands_of<T>(in, block), static_cast<T*>(y), stats);
}

}  // namespace

int mtfast_dropout_add_layer_norm_forward(const Inputs* in, void* y, float* stats, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kBFloat16  ? launch_forward<__nv_bfloat16>
                      : in->layer.dtype == Dtype::kFloat16 ? launch_forward<__half>
                                                           : launch_forward<float>;
  return launch(*in, y, stats, stream);
}

}  // namespace mtfast::dropout_add_layer_norm
