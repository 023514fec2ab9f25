// dropout_add_layer_norm on CUDA, backward: one pass over the rows that makes s again, then the sums of its
// chunks of rows.
//
// Floor: dy, x and residual are read and one gradient or, with dropout, two are written, 10 bytes an element
// in 16 bits. An element takes about 55 instructions, a few less than an H200's SM issues in that time.
//
// Rows and columns are cut as in the forward, but a block has a chunk of rows, an SM one block of up to 24
// warps: more chunks would be more sums to write and to read. What is wanted of memory for the next rows is
// asked for before these are worked on. A thread's sums over rows are in registers, those of warps below each
// other are added in shared memory, those of chunks by a second kernel: no atomics, and the order of no sum
// varies. Long rows have theirs in memory, each column its thread's own.
#include <algorithm>

#include "device/column_sums.cuh"
#include "dropout_add_layer_norm_rows.cuh"

namespace mtfast::dropout_add_layer_norm {
namespace {

template <class T>
constexpr int kBackwardWarps = sizeof(T) == 2 ? 24 : 16;  // eight floats take twice the registers
constexpr int kMostGroups = 8;

template <class T>
struct Back {
  const T* dy;
  const float2* stats;
  T *dx, *dresidual;
  float* partial;  // [kSums, chunks, hidden]; null: no sums are wanted
};

// What memory has of a thread's columns of a row.
template <class T>
struct Given {
  Eight<T> dy, x, residual;
  float2 stats;  // mean and rstd

  __device__ __forceinline__ Given(const Operands<T>& in, const Back<T>& back, int64_t row, int64_t end,
                                   int column) {
    const int hidden = static_cast<int>(in.layer.hidden);
    const int64_t at = row * hidden;
    const bool exists = row < end;
    dy = columns_of(back.dy + at, column, hidden, true, exists);
    x = columns_of(in.x + at, column, hidden, true, exists);
    residual = columns_of(in.residual + at, column, hidden, true, in.residual != nullptr && exists);
    stats = exists ? back.stats[row] : make_float2(0.0f, 0.0f);
  }
};

// Where the sums of this block's chunk go.
template <class T>
__device__ __forceinline__ float* sums_at(const Back<T>& back, int which, int hidden) {
  return back.partial + (static_cast<int64_t>(which) * gridDim.x + blockIdx.x) * hidden;
}

// s becomes (s - mean) * rstd.
__device__ __forceinline__ void normalise(float (&s)[8], float2 stats) {
  MTFAST_UNROLL
  for (int e = 0; e < 8; ++e) s[e] = (s[e] - stats.x) * stats.y;
}

template <class T>
__global__ void __launch_bounds__(32 * kBackwardWarps<T>, 1)
    backward_kernel(const Operands<T> in, const Back<T> back) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t begin = in.begin(), end = in.end();
  const Place place(in.warps);
  const int column = place.column;
  const uint64_t seed = seed_of(layer);
  const float share = 1.0f / static_cast<float>(hidden), scale = static_cast<float>(layer.scale);
  Given<T> next(in, back, begin + place.group, end, column);
  const Vectors<T> vectors{shared_memory<T>(), place.tile};  // weight and x_bias
  float* of_warps = reinterpret_cast<float*>(vectors.shared + 2 * place.tile);
  float* others_of_warps = of_warps + blockDim.x / 32 * 2;
  vectors.bring(0, in.weight, hidden);
  vectors.bring(1, in.x_bias, hidden);
  __syncthreads();
  float sums[kSums][8] = {};
  MTFAST_NO_UNROLL
  for (int64_t first = begin; first < end; first += place.groups) {
    const int64_t row = first + place.group, at = row * hidden;
    const Draws draws(layer, seed, row, column);
    const float rstd = next.stats.y;
    float normal[8], of_dy[8], of_weight[8];
    make_sums(normal, layer, draws, next.x, next.residual, vectors.at(1, column));
    normalise(normal, next.stats);
    unpack(of_dy, next.dy);
    next = Given<T>(in, back, row + place.groups, end, column);
    unpack(of_weight, vectors.at(0, column));
    float along[2] = {};  // of dy * weight on the ones and on `normal`
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      sums[kWeight][e] += of_dy[e] * normal[e];
      sums[kBias][e] += of_dy[e];
      of_dy[e] = __fmul_rn(of_dy[e], of_weight[e]);
      along[0] += of_dy[e];
      along[1] += of_dy[e] * normal[e];
    }
    place.row_sums(along, of_warps);
    const float on_ones = along[0] * share, on_normal = along[1] * share;
    float* used = of_warps;  // in turn, so that nobody writes what another still reads
    of_warps = others_of_warps;
    others_of_warps = used;
    float (&grad)[8] = of_dy;
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) grad[e] = (grad[e] - on_ones - normal[e] * on_normal) * rstd;
    if (row >= end) continue;
    if (back.dresidual != nullptr) store8(back.dresidual + at, column, hidden, true, grad);
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      grad[e] = draws.keeps(e) ? grad[e] * scale : 0.0f;
      sums[kXBias][e] += grad[e];
    }
    if (back.dx != nullptr) store8(back.dx + at, column, hidden, true, grad);
  }
  if (back.partial == nullptr) return;
  float* scratch = shared_memory<float>();  // [groups, tile]
  MTFAST_UNROLL
  for (int which = 0; which < kSums; ++which) {
    if (which == kXBias && in.x_bias == nullptr) break;
    __syncthreads();
    float4* to = reinterpret_cast<float4*>(scratch + place.group * place.tile + column);
    to[0] = make_float4(sums[which][0], sums[which][1], sums[which][2], sums[which][3]);
    to[1] = make_float4(sums[which][4], sums[which][5], sums[which][6], sums[which][7]);
    __syncthreads();
    MTFAST_NO_UNROLL
    for (int c = static_cast<int>(threadIdx.x); c < hidden; c += static_cast<int>(blockDim.x)) {
      float total = scratch[c];
      MTFAST_NO_UNROLL
      for (int g = 1; g < place.groups; ++g) total += scratch[g * place.tile + c];
      sums_at(back, which, hidden)[c] = total;
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kMostThreads)
    backward_long_kernel(const Operands<T> in, const Back<T> back) {
  const Layer& layer = in.layer;
  const int hidden = static_cast<int>(layer.hidden);
  const int64_t begin = in.begin(), end = in.end();
  const Place place(in.warps);
  const uint64_t seed = seed_of(layer);
  const float share = 1.0f / static_cast<float>(hidden), scale = static_cast<float>(layer.scale);
  float* of_warps = shared_memory<float>();
  float* others_of_warps = of_warps + blockDim.x / 32 * 2;
  MTFAST_NO_UNROLL
  for (int64_t row = begin; row < end; ++row) {
    const float2 stats = back.stats[row];
    // Calls f(column, draws, normal, dy, dy * weight) for the thread's columns.
    const auto each = [&](const auto& f) {
      place.each_tile(hidden, [&](int column) {
        const Draws draws(layer, seed, row, column);
        float normal[8], dy[8], weighted[8];
        make_long_sums(normal, draws, in, row, column);
        normalise(normal, stats);
        unpack(dy, columns_of(back.dy + row * hidden, column, hidden, false, true));
        unpack(weighted, columns_of(in.weight, column, hidden, false, true));
        MTFAST_UNROLL
        for (int e = 0; e < 8; ++e) weighted[e] = __fmul_rn(dy[e], weighted[e]);
        f(column, draws, normal, dy, weighted);
      });
    };
    const auto add = [&](int which, int column, const float (&terms)[8]) {
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) {
        if (back.partial == nullptr || column + e >= hidden) continue;
        float& sum = sums_at(back, which, hidden)[column + e];
        sum = (row == begin ? 0.0f : sum) + terms[e];
      }
    };
    float along[2] = {};
    each([&](int column, const Draws&, const float (&normal)[8], const float (&dy)[8],
             const float (&weighted)[8]) {
      float terms[8];
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) {
        terms[e] = dy[e] * normal[e];
        along[0] += weighted[e];
        along[1] += weighted[e] * normal[e];
      }
      add(kWeight, column, terms);
      add(kBias, column, dy);
    });
    place.row_sums(along, (row - begin) % 2 == 0 ? of_warps : others_of_warps);
    const float on_ones = along[0] * share, on_normal = along[1] * share;
    each([&](int column, const Draws& draws, const float (&normal)[8], const float (&)[8],
             const float (&weighted)[8]) {
      float grad[8];
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) grad[e] = (weighted[e] - on_ones - normal[e] * on_normal) * stats.y;
      if (back.dresidual != nullptr) store8(back.dresidual + row * hidden, column, hidden, false, grad);
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) grad[e] = draws.keeps(e) ? grad[e] * scale : 0.0f;
      if (back.dx != nullptr) store8(back.dx + row * hidden, column, hidden, false, grad);
      add(kXBias, column, grad);
    });
  }
}

template <class T>
int launch_backward(const Inputs& in, const void* dy, const float* stats, const Gradients& to, float* partial,
                    void* stream) {
  const Layer& layer = in.layer;
  const bool held = is_held(in, on_16_bytes(dy) && on_16_bytes(to.dx) && on_16_bytes(to.dresidual));
  const int warps = held ? warps_of(layer) : kMostWarps;
  const int groups = std::min(kMostGroups, kBackwardWarps<T> / warps);
  const Back<T> back{static_cast<const T*>(dy), reinterpret_cast<const float2*>(stats),
                     static_cast<T*>(to.dx), static_cast<T*>(to.dresidual), to.any_sum() ? partial : nullptr};
  if (layer.rows > 0) {  // else there are no chunks, and their sums are 0
    const size_t of_warps = 2 * warps * groups * 2 * sizeof(float), tile = held ? 256 * warps : 0;
    const size_t shared = std::max(2 * tile * sizeof(T) + of_warps, groups * tile * sizeof(float));
    if (const int error =
            MTFAST_LAUNCH(dim3(static_cast<unsigned>(chunks(layer.rows))), dim3(32 * warps * groups), shared,
                          stream, (held ? backward_kernel<T> : backward_long_kernel<T>),
                          operands_of<T>(in, chunk_rows(layer.rows), warps), back))
      return error;
  }
  if (!to.any_sum()) return 0;
  const ColumnSums<T, kSums> sums{
      {static_cast<T*>(to.dweight), static_cast<T*>(to.dbias), static_cast<T*>(to.dx_bias)}};
  return launch_column_sums(partial, chunks(layer.rows), layer.hidden, sums, stream);
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
