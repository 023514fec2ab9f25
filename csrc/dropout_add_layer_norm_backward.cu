// dropout_add_layer_norm on CUDA, backward: one pass over the rows that makes s again, then the sums of its
// chunks of rows.
//
// Floor: dy, x and residual are read and one gradient or, with dropout, two are written, 10 bytes an element
// in 16 bits. An element takes about 55 instructions, a few less than an H200's SM issues in that time.
//
// Rows and columns are cut as in the forward. A thread's sums over rows are in registers, those of warps
// below each other are added in shared memory, those of chunks by a second kernel: no atomics, and the order
// of no sum varies. Rows that are not held have theirs in memory, each column its thread's own.
#include <algorithm>

#include "device/column_sums.cuh"
#include "dropout_add_layer_norm_rows.cuh"

namespace mtfast::dropout_add_layer_norm {
namespace {

template <class T>
struct Back {
  const T* dy;
  const float2* stats;
  T *dx, *dresidual;
  float* partial;  // null: no sums are wanted
};

// Sums over the rows of a chunk: eight columns' terms in registers or, of rows that are not held, in memory,
// where this thread alone has them.
template <bool kHeld>
struct ChunkSums {
  float of[kSums][8] = {};
  float* partial;
  int hidden;

  __device__ __forceinline__ ChunkSums(float* partial, int hidden) : partial(partial), hidden(hidden) {}

  __device__ __forceinline__ float* at(int which) const {
    return partial + (static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * hidden;
  }
  __device__ __forceinline__ void bring(int which, int column, bool none_yet) {
    if constexpr (!kHeld) {
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) {
        of[which][e] = none_yet || partial == nullptr || column + e >= hidden ? 0.0f : at(which)[column + e];
      }
    }
  }
  __device__ __forceinline__ void put_back(int which, int column) const {
    if constexpr (!kHeld) {
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (partial != nullptr && column + e < hidden) at(which)[column + e] = of[which][e];
      }
    }
  }
  // Those of the rows that the block had under way side by side, together; the whole block calls.
  __device__ __forceinline__ void finish(const Place& place, float* scratch) const {
    if constexpr (kHeld) {
      MTFAST_UNROLL
      for (int which = 0; which < kSums && partial != nullptr; ++which) {
        __syncthreads();
        float4* to = reinterpret_cast<float4*>(scratch + place.group * place.tile + place.column);
        to[0] = make_float4(of[which][0], of[which][1], of[which][2], of[which][3]);
        to[1] = make_float4(of[which][4], of[which][5], of[which][6], of[which][7]);
        __syncthreads();
        MTFAST_NO_UNROLL
        for (int c = static_cast<int>(threadIdx.x); c < hidden; c += static_cast<int>(blockDim.x)) {
          float total = scratch[c];
          MTFAST_NO_UNROLL
          for (int g = 1; g < place.groups; ++g) total += scratch[g * place.tile + c];
          at(which)[c] = total;
        }
      }
    }
  }
};

template <class T, bool kHeld>
__global__ void __launch_bounds__(kMostThreads) backward_kernel(const Operands<T> in, const Back<T> back) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t begin = blockIdx.x * in.chunk_rows;
  const int64_t end = begin + in.chunk_rows < layer.rows ? begin + in.chunk_rows : layer.rows;
  const Place place(in.warps);
  const uint64_t seed = seed_of(layer);
  const float share = 1.0f / static_cast<float>(hidden), scale = static_cast<float>(layer.scale);
  const Vectors<T, kHeld> vectors{in, shared_memory<T>(), place.tile};
  float* of_warps = reinterpret_cast<float*>(vectors.shared + (kHeld ? 2 * place.tile : 0));
  float* others_of_warps = of_warps + blockDim.x / 32 * 2 * kRows;
  vectors.bring(0, in.weight);
  vectors.bring(1, in.x_bias);
  __syncthreads();
  ChunkSums<kHeld> sums(back.partial, hidden);
  for (int64_t first = begin; first < end; first += kRows * place.groups) {
    const int64_t row = first + kRows * place.group;
    float mean[kRows], rstd[kRows];
    MTFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float2 of_row = row + i < end ? back.stats[row + i] : make_float2(0.0f, 0.0f);
      mean[i] = of_row.x, rstd[i] = of_row.y;
    }
    Eights normal;
    Draws draws(layer);
    float along[2 * kRows] = {};  // of dy * weight on the ones and on `normal`
    const auto make = [&](int column) {
      make_sums(normal, draws, in, vectors, 1, seed, row, end, column);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) normal.of[i][e] = (normal.of[i][e] - mean[i]) * rstd[i];
      }
    };
    Eight<T> given[kRows];
    place.each_tile<kHeld>(hidden, [&](int column) {
      load_rows<T, kHeld>(given, layer, back.dy, row, end, column);
      make(column);
      float weight[8];
      vectors.get(weight, 0, in.weight, column);
      sums.bring(kWeight, column, first == begin);
      sums.bring(kBias, column, first == begin);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float of_dy[8];
        unpack(of_dy, given[i]);
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) {
          const float to_normal = __fmul_rn(of_dy[e], weight[e]);
          sums.of[kWeight][e] += of_dy[e] * normal.of[i][e];
          sums.of[kBias][e] += of_dy[e];
          along[2 * i] += to_normal;
          along[2 * i + 1] += to_normal * normal.of[i][e];
        }
      }
      sums.put_back(kWeight, column);
      sums.put_back(kBias, column);
    });
    place.row_sums(along, (first - begin) / (kRows * place.groups) % 2 == 0 ? of_warps : others_of_warps);
    MTFAST_UNROLL
    for (int i = 0; i < 2 * kRows; ++i) along[i] *= share;
    place.each_tile<kHeld>(hidden, [&](int column) {
      if (!kHeld) {
        load_rows<T, kHeld>(given, layer, back.dy, row, end, column);
        make(column);
      }
      float weight[8];
      vectors.get(weight, 0, in.weight, column);
      sums.bring(kXBias, column, first == begin);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float grad[8];
        unpack(grad, given[i]);
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) {
          const float across = __fmul_rn(grad[e], weight[e]) - along[2 * i];
          grad[e] = (across - normal.of[i][e] * along[2 * i + 1]) * rstd[i];
        }
        if (row + i >= end) break;
        if (back.dresidual != nullptr)
          store8(back.dresidual + (row + i) * hidden, column, hidden, kHeld, grad);
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) {
          grad[e] = draws.keeps(i, e) ? grad[e] * scale : 0.0f;
          sums.of[kXBias][e] += grad[e];
        }
        if (back.dx != nullptr) store8(back.dx + (row + i) * hidden, column, hidden, kHeld, grad);
      }
      sums.put_back(kXBias, column);
    });
  }
  sums.finish(place, shared_memory<float>());
}

template <class T>
int launch_backward(const Inputs& in, const void* dy, const float* stats, const Gradients& to, float* partial,
                    void* stream) {
  const Block block(in, on_16_bytes(dy) && on_16_bytes(to.dx) && on_16_bytes(to.dresidual));
  const auto kernel = block.held ? backward_kernel<T, true> : backward_kernel<T, false>;
  const size_t sums_bytes = block.held ? block.groups * 256 * block.warps * sizeof(float) : 0;
  const size_t shared = std::max(block.shared_bytes(sizeof(T), 2), sums_bytes);
  if (const int error = allow_shared_memory(kernel, shared)) return error;
  const Back<T> back{static_cast<const T*>(dy), reinterpret_cast<const float2*>(stats),
                     static_cast<T*>(to.dx), static_cast<T*>(to.dresidual), to.any_sum() ? partial : nullptr};
  if (in.layer.rows > 0) {  // else there are no chunks, and their sums are 0
    const dim3 grid(static_cast<unsigned>(chunks(in.layer.rows)));
    if (const int error = MTFAST_LAUNCH(grid, dim3(block.threads()), shared, stream, kernel,
                                        operands_of<T>(in, block), back))
      return error;
  }
  if (!to.any_sum()) return 0;
  const ColumnSums<T, kSums> sums{
      {static_cast<T*>(to.dweight), static_cast<T*>(to.dbias), static_cast<T*>(to.dx_bias)}};
  return launch_column_sums(partial, chunks(in.layer.rows), in.layer.hidden, sums, stream);
}

}  // namespace

int mtfast_dropout_add_layer_norm_backward(const Inputs* in, const void* dy, const float* stats,
                                           const Gradients* to, float* partial, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kBFloat16  ? launch_backward<__nv_bfloat16>
                      : in->layer.dtype == Dtype::kFloat16 ? launch_backward<__half>
                                                           : launch_backward<float>;
  return launch(*in, dy, stats, *to, partial, stream);
}

}  // namespace mtfast::dropout_add_layer_norm
