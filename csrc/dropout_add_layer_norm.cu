// dropout_add_layer_norm on CUDA: one pass over the rows in each direction, and after the backward's the sums
// of its chunks of rows.
//
// Floor: forward reads x and residual and writes y, backward reads dy, x and residual and writes one gradient
// or, with dropout, two: 6 and 10 bytes an element in 16 bits. An element takes about 17 instructions in the
// forward and 25 in the backward, a Philox call for eight of them included: a bit more than half of what an
// SM of an H200 issues in the time that its share of the memory takes to bring the bytes.
//
// A thread has eight columns, the warps beside each other a row of up to 4096, and a few rows are under way
// at once, so that their loads wait together and so do their sums over columns: one barrier for all of them.
// Eight columns are one Philox call and, in 16 bits, one load. Beyond the sums in registers a row is held
// there from its load to the end. Shorter rows share a block with others. A block has a chunk of
// rows; its part of the vectors is read once, into shared memory, and its sums over rows are written once.
// Rows of more than 4096 columns are read again for each step, and their sums are kept in memory.
#include "device/column_sums.cuh"
#include "device/eight.cuh"
#include "device/reduce.cuh"
#include "dropout_add_layer_norm.h"

namespace mtfast::dropout_add_layer_norm {
namespace {

constexpr int kMostWarps = 16, kMostThreads = 32 * kMostWarps;
constexpr int64_t kHeldColumns = 8 * kMostThreads;

constexpr int kRows = 2;  // that a thread has under way: more would not leave registers for as many warps

struct Eights {
  float of[kRows][8];
};

template <class T>
struct Operands {
  Layer layer;
  const T *x, *residual, *weight, *bias, *x_bias;
  int64_t chunk_rows;
  int warps;  // beside each other in a row
};

// A thread's place: its first columns in a row, and which of the rows that a block has under way are its.
struct Place {
  int warps, group, groups;
  int column, tile;  // tile: columns that the warps beside each other have

  __device__ __forceinline__ explicit Place(int warps)
      : warps(warps),
        group(static_cast<int>(threadIdx.x) / (32 * warps)),
        groups(static_cast<int>(blockDim.x) / (32 * warps)),
        column(static_cast<int>(threadIdx.x) % (32 * warps) * 8),
        tile(256 * warps) {}

  // f(column) for the thread's columns: once where the row is held.
  template <bool kHeld, class F>
  __device__ __forceinline__ void each_tile(int hidden, const F& f) const {
    if constexpr (kHeld) {
      f(column);
    } else {
      MTFAST_NO_UNROLL
      for (int first = column; first < hidden; first += tile) f(first);
    }
  }

  // Each value's sum over the threads of a row, in all of them. of_warps is [warps of the block, kCount], and
  // not the same as the last time. The whole block calls.
  template <int kCount>
  __device__ __forceinline__ void row_sums(float (&values)[kCount], float* of_warps) const {
    const int warp = static_cast<int>(threadIdx.x) / 32, first = group * warps;
    MTFAST_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = warp_sum(values[i]);
    if (warps == 1) return;
    if (threadIdx.x % 32 == 0) {
      MTFAST_UNROLL
      for (int i = 0; i < kCount; ++i) of_warps[warp * kCount + i] = values[i];
    }
    __syncthreads();
    MTFAST_UNROLL
    for (int i = 0; i < kCount; ++i) values[i] = of_warps[first * kCount + i];
    for (int w = first + 1; w < first + warps; ++w) {
      MTFAST_UNROLL
      for (int i = 0; i < kCount; ++i) values[i] += of_warps[w * kCount + i];
    }
  }
};

// The vectors of a layer where a thread finds its columns of them: in shared memory, padded with zeros, where
// rows are held.
template <class T, bool kHeld>
struct Vectors {
  const Operands<T>& in;
  T* shared;  // [vectors, tile]
  int tile;

  // `which` in shared memory; the whole block calls, and a barrier must follow.
  __device__ __forceinline__ void bring(int which, const T* from) const {
    if constexpr (kHeld) {
      for (int c = static_cast<int>(threadIdx.x); c < tile && from != nullptr;
           c += static_cast<int>(blockDim.x)) {
        T value;
        round_to(value, 0.0f);
        if (c < in.layer.hidden) value = from[c];
        shared[which * tile + c] = value;
      }
    }
  }
  __device__ __forceinline__ void get(float (&to)[8], int which, const T* from, int column) const {
    if (kHeld)
      unpack(to, load8(shared + which * tile, column, tile, true));
    else
      unpack(to, load8(from, column, in.layer.hidden, kHeld));
  }
};

// Bit i: column + i is kept, column a multiple of 8.
__device__ __forceinline__ uint32_t kept_of_eight(const Layer& layer, uint64_t seed, int64_t row,
                                                  int column) {
  if (layer.threshold == 0) return 0xff;
  const Philox4 call = philox(static_cast<uint32_t>(column / 8), static_cast<uint32_t>(row), 0,
                              static_cast<uint32_t>(Purpose::kDropoutAddLayerNorm), seed);
  uint32_t kept = 0;
  MTFAST_UNROLL
  for (int i = 0; i < 8; ++i) {
    const uint32_t draw = i % 2 == 0 ? call.word[i / 2] & 0xffffu : call.word[i / 2] >> 16;
    kept |= static_cast<uint32_t>(draw >= layer.threshold) << i;
  }
  return kept;
}

__device__ __forceinline__ uint64_t seed_of(const Layer& layer) {
  return layer.threshold != 0 ? static_cast<uint64_t>(__ldg(layer.seed)) : 0;
}

// Eight columns of rows row .. row + kRows - 1, as they lie in memory; those from `end` on read 0.
template <class T, bool kHeld>
struct Loaded {
  Eight<T> row[kRows];

  __device__ __forceinline__ Loaded(const Operands<T>& in, const T* from, int64_t first, int64_t end,
                                    int column) {
    const int hidden = static_cast<int>(in.layer.hidden);
    MTFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      row[i] = load8(from + (first + i) * hidden, first + i < end ? column : hidden, hidden, kHeld);
    }
  }
};

// s of these rows and columns, and what of them is kept. The product with `scale` is rounded, so that both
// directions see the same s.
template <class T, bool kHeld>
__device__ __forceinline__ void make_sums(Eights& s, uint32_t (&kept)[kRows], const Operands<T>& in,
                                          const Vectors<T, kHeld>& vectors, int x_bias_at, uint64_t seed,
                                          int64_t row, int64_t end, int column) {
  const float scale = static_cast<float>(in.layer.scale);
  const Loaded<T, kHeld> x(in, in.x, row, end, column);
  const Loaded<T, kHeld> residual(in, in.residual, in.residual != nullptr ? row : 0,
                                  in.residual != nullptr ? end : 0, column);
  float x_bias[8] = {};
  if (in.x_bias != nullptr) vectors.get(x_bias, x_bias_at, in.x_bias, column);
  MTFAST_UNROLL
  for (int i = 0; i < kRows; ++i) {
    kept[i] = kept_of_eight(in.layer, seed, row + i, column);
    float of_residual[8];
    unpack(s.of[i], x.row[i]);
    unpack(of_residual, residual.row[i]);
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      const float scaled = __fmul_rn(s.of[i][e] + x_bias[e], scale);
      s.of[i][e] = (kept[i] >> e & 1 ? scaled : 0.0f) + of_residual[e];
    }
  }
}

// ---- forward ----

template <class T, bool kHeld>
__global__ void __launch_bounds__(kMostThreads)
    forward_kernel(const Operands<T> in, T* __restrict__ y, float* __restrict__ stats) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t begin = blockIdx.x * in.chunk_rows;
  const int64_t end = begin + in.chunk_rows < layer.rows ? begin + in.chunk_rows : layer.rows;
  const Place place(in.warps);
  const uint64_t seed = seed_of(layer);
  const float size = static_cast<float>(hidden), eps = static_cast<float>(layer.eps);
  const Vectors<T, kHeld> vectors{in, shared_memory<T>(), place.tile};
  float* of_warps = reinterpret_cast<float*>(vectors.shared + (kHeld ? kSums * place.tile : 0));
  float* others_of_warps = of_warps + blockDim.x / 32 * kRows;
  vectors.bring(kWeight, in.weight);
  vectors.bring(kBias, in.bias);
  vectors.bring(kXBias, in.x_bias);
  __syncthreads();
  for (int64_t first = begin; first < end; first += kRows * place.groups) {
    const int64_t row = first + kRows * place.group;
    Eights s;
    uint32_t kept[kRows];
    float mean[kRows] = {}, rstd[kRows] = {};
    const auto make = [&](int column) { make_sums(s, kept, in, vectors, kXBias, seed, row, end, column); };
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
    for (int i = 0; i < kRows; ++i) mean[i] /= size;
    place.each_tile<kHeld>(hidden, [&](int column) {
      if (!kHeld) make(column);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) {
          const float deviation = column + e < hidden ? s.of[i][e] - mean[i] : 0.0f;
          rstd[i] += deviation * deviation;
        }
      }
    });
    place.row_sums(rstd, others_of_warps);
    MTFAST_UNROLL
    for (int i = 0; i < kRows; ++i) {
      rstd[i] = 1.0f / sqrtf(rstd[i] / size + eps);
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

// ---- backward ----

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
        for (int c = static_cast<int>(threadIdx.x); c < hidden; c += static_cast<int>(blockDim.x)) {
          float total = scratch[c];
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
  const float size = static_cast<float>(hidden), scale = static_cast<float>(layer.scale);
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
    uint32_t kept[kRows];
    float along[2 * kRows] = {};  // of dy * weight on the ones and on `normal`
    const auto make = [&](int column) {
      make_sums(normal, kept, in, vectors, 1, seed, row, end, column);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) normal.of[i][e] = (normal.of[i][e] - mean[i]) * rstd[i];
      }
    };
    Eight<T> given[kRows];
    place.each_tile<kHeld>(hidden, [&](int column) {
      const Loaded<T, kHeld> dy(in, back.dy, row, end, column);
      make(column);
      float weight[8];
      vectors.get(weight, 0, in.weight, column);
      sums.bring(kWeight, column, first == begin);
      sums.bring(kBias, column, first == begin);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float of_dy[8];
        given[i] = dy.row[i];
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
    for (int i = 0; i < 2 * kRows; ++i) along[i] /= size;
    place.each_tile<kHeld>(hidden, [&](int column) {
      if (!kHeld) make(column);
      float weight[8];
      vectors.get(weight, 0, in.weight, column);
      sums.bring(kXBias, column, first == begin);
      MTFAST_UNROLL
      for (int i = 0; i < kRows; ++i) {
        float grad[8];
        if (kHeld)
          unpack(grad, given[i]);
        else
          unpack(grad, load8(back.dy + (row + i) * hidden, row + i < end ? column : hidden, hidden, kHeld));
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
          grad[e] = kept[i] >> e & 1 ? grad[e] * scale : 0.0f;
          sums.of[kXBias][e] += grad[e];
        }
        if (back.dx != nullptr) store8(back.dx + (row + i) * hidden, column, hidden, kHeld, grad);
      }
      sums.put_back(kXBias, column);
    });
  }
  sums.finish(place, shared_memory<float>());
}

// ---- launches ----

// How a block's threads lie: warps beside each other in a row, and rows below each other.
struct Block {
  bool held;
  int warps, groups;

  Block(const Inputs& in, bool aligned) {
    const int64_t hidden = in.layer.hidden;
    held = aligned && hidden <= kHeldColumns && hidden % 8 == 0 && on_16_bytes(in.x) &&
           on_16_bytes(in.residual) && on_16_bytes(in.weight) && on_16_bytes(in.bias) &&
           on_16_bytes(in.x_bias);
    warps = static_cast<int>(hidden <= kHeldColumns ? (hidden + 255) / 256 : kMostWarps);
    groups = !held ? 1 : warps <= 2 ? 8 : warps <= 4 ? 4 : warps <= 8 ? 2 : 1;
  }

  int threads() const { return 32 * warps * groups; }
  // Of `vectors` in the dtype, of twice `count` sums of each warp and, in their place, of the chunk's sums.
  size_t shared_bytes(size_t element, int vectors, int count, bool sums) const {
    const size_t tile = 256 * static_cast<size_t>(warps), floats = sizeof(float);
    const size_t here = (held ? vectors * tile * element : 0) + 2 * warps * groups * count * floats;
    const size_t there = sums && held ? groups * tile * floats : 0;
    return here > there ? here : there;
  }
};

template <class T>
Operands<T> operands_of(const Inputs& in, const Block& block) {
  return {in.layer,
          static_cast<const T*>(in.x),
          static_cast<const T*>(in.residual),
          static_cast<const T*>(in.weight),
          static_cast<const T*>(in.bias),
          static_cast<const T*>(in.x_bias),
          chunk_rows(in.layer.rows),
          block.warps};
}

template <class T>
int launch_forward(const Inputs& in, void* y, float* stats, void* stream) {
  const Block block(in, on_16_bytes(y));
  const auto kernel = block.held ? forward_kernel<T, true> : forward_kernel<T, false>;
  const size_t shared = block.shared_bytes(sizeof(T), kSums, kRows, false);
  if (const int error = allow_shared_memory(kernel, shared)) return error;
  return MTFAST_LAUNCH(dim3(static_cast<unsigned>(chunks(in.layer.rows))), dim3(block.threads()), shared,
                       stream, kernel, operands_of<T>(in, block), static_cast<T*>(y), stats);
}

template <class T>
int launch_backward(const Inputs& in, const void* dy, const float* stats, const Gradients& to, float* partial,
                    void* stream) {
  const Block block(in, on_16_bytes(dy) && on_16_bytes(to.dx) && on_16_bytes(to.dresidual));
  const auto kernel = block.held ? backward_kernel<T, true> : backward_kernel<T, false>;
  const size_t shared = block.shared_bytes(sizeof(T), 2, 2 * kRows, true);
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

int mtfast_dropout_add_layer_norm_forward(const Inputs* in, void* y, float* stats, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kBFloat16  ? launch_forward<__nv_bfloat16>
                      : in->layer.dtype == Dtype::kFloat16 ? launch_forward<__half>
                                                           : launch_forward<float>;
  return launch(*in, y, stats, stream);
}

int mtfast_dropout_add_layer_norm_backward(const Inputs* in, const void* dy, const float* stats,
                                           const Gradients* to, float* partial, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kBFloat16  ? launch_backward<__nv_bfloat16>
                      : in->layer.dtype == Dtype::kFloat16 ? launch_backward<__half>
                                                           : launch_backward<float>;
  return launch(*in, dy, stats, *to, partial, stream);
}

}  // namespace mtfast::dropout_add_layer_norm
