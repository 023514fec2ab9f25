// concat_mlp on CUDA, forward: one pass of tensor cores over u and then v, with bias, activation, dropout and
// the output product done on the accumulators; for float32 only what follows the product. No atomics.
#include "concat_mlp_device.cuh"
#include "device/reduce.cuh"

namespace mtfast::concat_mlp {
namespace {

// ---- forward on tensor cores ----

constexpr int kDepth = 64;  // elements of a row in a stage: 128 bytes, eight 16-byte chunks
constexpr int kStages = 3;

__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kDepth + ((chunk ^ (row & 7)) * 8);
}

// The row of `from` that row `i` of the product reads; -1 where there is none.
__device__ __forceinline__ int64_t source_row(const Source& from, int64_t i, int64_t batch) {
  if (i >= batch) return -1;
  int64_t row = i;
  if (from.rows != nullptr)
    row = from.wide_rows ? static_cast<const int64_t*>(from.rows)[i]
                         : static_cast<const int32_t*>(from.rows)[i];
  return row >= 0 && row < from.count ? row : -1;
}

// Sixteen bytes of row `row` of `from` into shared memory, zeros beyond `columns` and where `row` is
// negative.
template <bool kAligned, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int64_t row, int64_t pitch, int64_t column,
                                           int64_t columns) {
  if constexpr (kAligned) {
    const bool there = row >= 0 && column < columns;
    ptx::cp_async_16(to, there ? from + row * pitch + column : from, there ? 16 : 0);
  } else {
    Eight<T> eight;
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      round_to(eight.x[i], 0.f);
      if (row >= 0 && column + i < columns) eight.x[i] = from[row * pitch + column + i];
    }
    uint4 word;
    memcpy(&word, &eight, sizeof word);
    *reinterpret_cast<uint4*>(to) = word;
  }
}

// Bias, activation and dropout on a warp's accumulators: z becomes d. z itself goes to shared memory, kPitch
// elements from one row to the next.
template <Activation activation, int kPitch, class T, int kTiles>
__device__ __forceinline__ void finish(float (&acc)[kTiles][4][4], const Layer& layer, uint64_t seed,
                                       int64_t row0, int64_t column0, const T* bias1, T* z) {
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  float bias[4][2];
  MTFAST_UNROLL
  for (int j = 0; j < 4; ++j) {
    MTFAST_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int64_t column = column0 + 8 * j + 2 * t + e;
      bias[j][e] = column < layer.inner ? to_float(bias1[column]) : 0.f;
    }
  }
  const float scale = static_cast<float>(layer.scale);
  MTFAST_UNROLL
  for (int i = 0; i < kTiles; ++i) {
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * i + 8 * r + g;
      Philox4 call = {};
      if (layer.threshold != 0) call = dropout_call(seed, row0 + row, column0, t);
      MTFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        float &x0 = acc[i][j][2 * r], &x1 = acc[i][j][2 * r + 1];
        x0 += bias[j][0];
        x1 += bias[j][1];
        *reinterpret_cast<uint32_t*>(z + row * kPitch + 8 * j + 2 * t) = pair_bits<T>(x0, x1);
        x0 = (call.word[j] & 0xffffu) >= layer.threshold ? activate<activation>(x0) * scale : 0.f;
        x1 = (call.word[j] >> 16) >= layer.threshold ? activate<activation>(x1) * scale : 0.f;
      }
    }
  }
}

template <class T, int kRows, int kColumns, bool kAligned>
__global__ void __launch_bounds__(kColumns * 2, kColumns == 64 ? 2 : 1)
    forward_kernel(const Layer layer, const Source u, const Source v, int64_t hidden,
                   const T* __restrict__ weight1, const T* __restrict__ bias1, const T* __restrict__ weight2,
                   const int64_t* __restrict__ seed_at, T* __restrict__ z, bool z_aligned,
                   float* __restrict__ partial) {
  constexpr int kThreads = kColumns * 2, kWarpsAcross = kColumns / 32, kTiles = kRows / 32;
  constexpr int kStep = kThreads / 8, kCopies = kRows / kStep;  // rows a thread copies, this far apart
  static_assert(kRows == kColumns, "one loop copies a row of each operand");
  T* shared = shared_memory<T>();  // kStages of [kRows, kDepth] inputs and [kColumns, kDepth] weights
  const int64_t row0 = static_cast<int64_t>(blockIdx.y) * kRows,
                column0 = static_cast<int64_t>(blockIdx.x) * kColumns;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int warp_row = warp / kWarpsAcross * (kRows / 2), warp_column = warp % kWarpsAcross * 32;

  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
  int u_row[kCopies], v_row[kCopies];
  MTFAST_UNROLL
  for (int i = 0; i < kCopies; ++i) {
    u_row[i] = static_cast<int>(source_row(u, row0 + first + i * kStep, layer.batch));
    v_row[i] = static_cast<int>(source_row(v, row0 + first + i * kStep, layer.batch));
  }
  const int half = static_cast<int>((hidden + kDepth - 1) / kDepth), steps = 2 * half;
  const auto copy = [&](int step) {
    if (step < steps) {
      const bool right = step >= half;
      const int64_t column = static_cast<int64_t>(right ? step - half : step) * kDepth + chunk * 8;
      const T* side = static_cast<const T*>(right ? v.data : u.data);
      const int64_t pitch = right ? v.pitch : u.pitch;
      T* inputs = shared + step % kStages * (2 * kRows * kDepth);
      MTFAST_UNROLL
      for (int i = 0; i < kCopies; ++i) {
        const int at = first + i * kStep, row = right ? v_row[i] : u_row[i];
        copy_chunk<kAligned>(inputs + swizzled(at, chunk), side, row, pitch, column, hidden);
        copy_chunk<kAligned>(inputs + kRows * kDepth + swizzled(at, chunk), weight1,
                             column0 + at < layer.inner ? (column0 + at) * 2 + right : -1, hidden, column,
                             hidden);
      }
    }
    ptx::cp_async_commit();
  };

  float acc[kTiles][4][4] = {};
  for (int step = 0; step < kStages - 1; ++step) copy(step);
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all have left the one that is refilled next
    copy(step + kStages - 1);
    const T* inputs = shared + step % kStages * (2 * kRows * kDepth);
    const T* weights = inputs + kRows * kDepth;
    MTFAST_UNROLL
    for (int k = 0; k < kDepth / 16; ++k) {
      uint32_t a[kTiles][4], b[2][4];
      MTFAST_UNROLL
      for (int i = 0; i < kTiles; ++i)
        ptx::ldmatrix_x4(a[i], inputs + swizzled(warp_row + 16 * i + (lane & 15), 2 * k + (lane >> 4)));
      MTFAST_UNROLL
      for (int p = 0; p < 2; ++p)
        ptx::ldmatrix_x4(b[p], weights + swizzled(warp_column + 16 * p + (lane & 7) + (lane >> 4) * 8,
                                                  2 * k + (lane >> 3 & 1)));
      MTFAST_UNROLL
      for (int i = 0; i < kTiles; ++i) MTFAST_UNROLL
      for (int j = 0; j < 4; ++j) mma<T>(acc[i][j], a[i], b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // The stages are done with: their memory now holds this block's columns of weight2, the warps' sums, and z.
  constexpr int kPitch = kColumns + 8;                   // so that a warp's stores meet no bank twice
  float* weight2_at = reinterpret_cast<float*>(shared);  // [outputs, kColumns]
  float* sums = weight2_at + kMaxOutputs * kColumns;     // [kWarpsAcross, kRows, outputs]
  T* z_at = reinterpret_cast<T*>(sums + kWarpsAcross * kRows * kMaxOutputs);
  for (int i = threadIdx.x; i < layer.outputs * kColumns; i += kThreads) {
    const int64_t column = column0 + i % kColumns;
    weight2_at[i] = column < layer.inner ? to_float(weight2[i / kColumns * layer.inner + column]) : 0.f;
  }
  const uint64_t seed = layer.threshold != 0 ? static_cast<uint64_t>(*seed_at) : 0;
  const int64_t warp_row0 = row0 + warp_row, warp_column0 = column0 + warp_column;
  T* warp_z = z_at + warp_row * kPitch + warp_column;
  if (layer.activation == Activation::kRelu)
    finish<Activation::kRelu, kPitch>(acc, layer, seed, warp_row0, warp_column0, bias1, warp_z);
  else if (layer.activation == Activation::kGelu)
    finish<Activation::kGelu, kPitch>(acc, layer, seed, warp_row0, warp_column0, bias1, warp_z);
  else
    finish<Activation::kTanh, kPitch>(acc, layer, seed, warp_row0, warp_column0, bias1, warp_z);
  __syncthreads();

  if (z != nullptr) {
    constexpr int kAcross = kColumns / 8;
    for (int i = threadIdx.x; i < kRows * kAcross; i += kThreads) {
      const int64_t row = row0 + i / kAcross, column = column0 + i % kAcross * 8;
      if (row >= layer.batch || column >= layer.inner) continue;
      const T* from = z_at + i / kAcross * kPitch + i % kAcross * 8;
      T* to = z + row * layer.inner + column;
      if (z_aligned)
        *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(from);
      else
        for (int e = 0; e < 8 && column + e < layer.inner; ++e) to[e] = from[e];
    }
  }
  const int g = lane >> 2, t = lane & 3;
  for (int o = 0; o < layer.outputs; ++o) {
    float weight[4][2];
    MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) MTFAST_UNROLL
    for (int e = 0; e < 2; ++e) weight[j][e] = weight2_at[o * kColumns + warp_column + 8 * j + 2 * t + e];
    MTFAST_UNROLL
    for (int i = 0; i < kTiles; ++i) MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      float sum = 0.f;
      MTFAST_UNROLL
      for (int j = 0; j < 4; ++j)
        sum += acc[i][j][2 * r] * weight[j][0] + acc[i][j][2 * r + 1] * weight[j][1];
      sum = warp_sum<4>(sum);
      const int row = warp_row + 16 * i + 8 * r + g;
      if (t == 0) sums[(warp % kWarpsAcross * kRows + row) * layer.outputs + o] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < kRows * layer.outputs; i += kThreads) {
    const int64_t row = row0 + i / layer.outputs;
    if (row >= layer.batch) break;
    float sum = 0.f;
    for (int w = 0; w < kWarpsAcross; ++w) sum += sums[w * kRows * layer.outputs + i];
    partial[(blockIdx.x * layer.batch + row0) * layer.outputs + i] = sum;
  }
}

// y = bias2 + the sums of all blocks across, in order.
template <class T>
__global__ void __launch_bounds__(256)
    add_partial_kernel(const Layer layer, const Source u, const Source v, const float* __restrict__ partial,
                       int across, const T* __restrict__ bias2, T* __restrict__ y) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x, size = layer.batch * layer.outputs;
  if (i >= size) return;
  const int64_t row = i / layer.outputs;
  float sum = to_float(bias2[i % layer.outputs]);
  for (int block = 0; block < across; ++block) sum += partial[block * size + i];
  if (source_row(u, row, layer.batch) < 0 || source_row(v, row, layer.batch) < 0) sum = NAN;
  round_to(y[i], sum);
}

// ---- the output product of a z that is there: a warp a row, eight columns a lane at a time ----

template <class T>
__global__ void __launch_bounds__(256)
    output_kernel(const Layer layer, const T* __restrict__ z, const T* __restrict__ weight2,
                  const T* __restrict__ bias2, const int64_t* __restrict__ seed_at, T* __restrict__ y,
                  bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  if (row >= layer.batch) return;
  const int lane = threadIdx.x & 31;
  const uint64_t seed = layer.threshold != 0 ? static_cast<uint64_t>(*seed_at) : 0;
  float sums[kMaxOutputs] = {};
  for (int64_t first = 0; first < layer.inner; first += 256) {
    const int64_t column = first + lane * 8;
    float d[8], weight[8];
    load8(z + row * layer.inner, column, layer.inner, aligned, d);
    uint32_t kept = 0xff;
    if (layer.threshold != 0) kept = kept_of_eight(seed, row, column, layer.threshold);
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      float h, slope;
      activate(layer.activation, d[i], h, slope);
      d[i] = kept >> i & 1 ? h * static_cast<float>(layer.scale) : 0.f;
    }
    MTFAST_UNROLL
    for (int o = 0; o < kMaxOutputs; ++o) {
      if (o >= layer.outputs) break;
      load8(weight2 + o * layer.inner, column, layer.inner, aligned, weight);
      MTFAST_UNROLL
      for (int i = 0; i < 8; ++i) sums[o] += d[i] * weight[i];
    }
  }
  MTFAST_UNROLL
  for (int o = 0; o < kMaxOutputs; ++o) {
    if (o >= layer.outputs) break;
    const float sum = warp_sum(sums[o]);
    if (lane == 0) round_to(y[row * layer.outputs + o], sum + to_float(bias2[o]));
  }
}

template <class T, int kTile, bool kAligned>
int launch_tiles(const Layer& layer, const Source& u, const Source& v, int64_t hidden, const T* weight1,
                 const T* bias1, const T* weight2, const int64_t* seed, T* z, float* partial, void* stream) {
  constexpr size_t kShared = size_t{kStages} * 2 * kTile * kDepth * sizeof(T);
  const auto kernel = forward_kernel<T, kTile, kTile, kAligned>;
  if (const int error = allow_shared_memory(kernel, kShared)) return error;
  return MTFAST_LAUNCH(dim3(blocks(layer.inner, kTile), blocks(layer.batch, kTile)), dim3(2 * kTile), kShared,
                       stream, kernel, layer, u, v, hidden, weight1, bias1, weight2, seed, z,
                       layer.inner % 8 == 0 && on_16_bytes(z), partial);
}

template <class T>
int launch_forward(const Layer& layer, const Source& u, const Source& v, int64_t hidden, const void* weight1,
                   const void* bias1, const void* weight2, const void* bias2, const int64_t* seed, void* z,
                   float* partial, void* y, void* stream) {
  const bool aligned = hidden % 8 == 0 && u.pitch % 8 == 0 && v.pitch % 8 == 0 && on_16_bytes(u.data) &&
                       on_16_bytes(v.data) && on_16_bytes(weight1);
  // Large tiles read less, small ones fill the machine when there are few.
  const bool large = aligned && int64_t{blocks(layer.inner, 128)} * blocks(layer.batch, 128) >= 64;
  const auto launch = large     ? launch_tiles<T, 128, true>
                      : aligned ? launch_tiles<T, 64, true>
                                : launch_tiles<T, 64, false>;
  if (const int error =
          launch(layer, u, v, hidden, static_cast<const T*>(weight1), static_cast<const T*>(bias1),
                 static_cast<const T*>(weight2), seed, static_cast<T*>(z), partial, stream))
    return error;
  return MTFAST_LAUNCH(dim3(blocks(layer.batch * layer.outputs, 256)), dim3(256), 0, stream,
                       add_partial_kernel<T>, layer, u, v, partial,
                       static_cast<int>(blocks(layer.inner, large ? 128 : 64)), static_cast<const T*>(bias2),
                       static_cast<T*>(y));
}

template <class T>
int launch_output(const Layer& layer, const void* z, const void* weight2, const void* bias2,
                  const int64_t* seed, void* y, void* stream) {
  const bool aligned = layer.inner % 8 == 0 && on_16_bytes(z) && on_16_bytes(weight2);
  return MTFAST_LAUNCH(dim3(blocks(layer.batch, 8)), dim3(256), 0, stream, output_kernel<T>, layer,
                       static_cast<const T*>(z), static_cast<const T*>(weight2), static_cast<const T*>(bias2),
                       seed, static_cast<T*>(y), aligned);
}

}  // namespace
}  // namespace mtfast::concat_mlp

using mtfast::Dtype;
using mtfast::concat_mlp::Layer;
using mtfast::concat_mlp::Source;

extern "C" int mtfast_concat_mlp_forward(const Layer* layer, const Source* u, const Source* v, int64_t hidden,
                                         const void* weight1, const void* bias1, const void* weight2,
                                         const void* bias2, const int64_t* seed, void* z, float* partial,
                                         void* y, void* stream) {
  const auto launch = layer->dtype == Dtype::kBFloat16 ? mtfast::concat_mlp::launch_forward<__nv_bfloat16>
                                                       : mtfast::concat_mlp::launch_forward<__half>;
  return launch(*layer, *u, *v, hidden, weight1, bias1, weight2, bias2, seed, z, partial, y, stream);
}

extern "C" int mtfast_concat_mlp_output(const Layer* layer, const void* z, const void* weight2,
                                        const void* bias2, const int64_t* seed, void* y, void* stream) {
  return mtfast::concat_mlp::launch_output<float>(*layer, z, weight2, bias2, seed, y, stream);
}
