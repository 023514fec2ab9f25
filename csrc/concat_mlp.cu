// concat_mlp on CUDA, forward: one pass of tensor cores over u and then v, with bias, activation, dropout and
// the output product done on the tile; for float32 only what follows the product. No atomics.
//
// Floor at batch 2048, hidden = inner = 768, 16 bits: 4.8 GFLOP, 4.9 us of an H200's tensor cores; 11.8 MB,
// 2.5 us. So the product bounds it. mma.sync, which every architecture from Ampere on has, reaches about 62 %
// of what wgmma does on Hopper: 8 us. Forward and backward together cannot be 2.5 times as fast as eager
// PyTorch: when all but the products, which eager has too, cost nothing, 2.8 times is what is left.
//
// Tiles of 128 x 96 give 128 blocks there, one wave of 132 SMs, where 128 x 128 would leave 36 idle. Eight
// warps of 32 x 48, two for each tensor core, read 5 fragments from shared memory for 12 products; three
// stages of 64 columns (28 KB each) let two blocks share an SM. Fewer than 64 such tiles: 64 x 64 fill more
// SMs.
//
// The tile then goes through shared memory in float and is finished eight columns at a time by a loop: done
// on the accumulators, three activations by all registers are 150 KB of code, more than the caches of
// instructions hold.
#include "concat_mlp_device.cuh"
#include "device/reduce.cuh"

namespace mtfast::concat_mlp {
namespace {

// ---- forward on tensor cores ----

constexpr int kTileK = 64;  // elements of a row in a stage: 128 bytes, eight 16-byte chunks
constexpr int kStages = 3;

template <int kTileM_, int kTileN_>
struct Tile {
  static constexpr int kTileM = kTileM_, kTileN = kTileN_;
  static constexpr int kWarpM = 32, kWarpN = kTileN / 2;  // what a warp has of it
  static constexpr int kThreads = kTileM / kWarpM * 2 * 32;
  static constexpr int kStage = (kTileM + kTileN) * kTileK;
  // The finished tile in float: no bank twice when a warp stores its fragments. Then the sums of 32 columns.
  static constexpr int kPitch = kTileN + 8, kSums = kTileM * kPitch;
  static constexpr size_t kStageBytes = size_t{kStages} * kStage * 2;
  static constexpr size_t kEndBytes = (kSums + kTileN / 32 * kTileM * kMaxOutputs) * sizeof(float);
  static constexpr size_t kConstantsAt = kStageBytes > kEndBytes ? kStageBytes : kEndBytes;
  static constexpr size_t kSharedBytes = kConstantsAt + (1 + kMaxOutputs) * kTileN * sizeof(float);
};

__device__ __forceinline__ int swizzled(int row, int chunk) {
  return row * kTileK + ((chunk ^ (row & 7)) * 8);
}

// Sixteen bytes of row `row` of `from` into shared memory, zeros beyond `columns` and where `row` is
// negative.
template <bool kAligned, class T>
__device__ __forceinline__ void copy_chunk(T* to, const T* from, int64_t row, int64_t pitch, int64_t column,
                                           int64_t columns) {
  if constexpr (kAligned) {
    const bool pred = row >= 0 && column < columns;
    ptx::cp_async_16(to, pred ? from + row * pitch + column : from, pred ? 16 : 0);
  } else {
    Vector<T> vector{};
    MTFAST_UNROLL
    for (int i = 0; i < Vector<T>::kSize; ++i) {
      if (row >= 0 && column + i < columns) vector.x[i] = from[row * pitch + column + i];
    }
    uint4 bits;
    memcpy(&bits, &vector, sizeof bits);
    *reinterpret_cast<uint4*>(to) = bits;
  }
}

template <class T, class Tile, bool kAligned>
__global__ void __launch_bounds__(Tile::kThreads, 2)
    forward_kernel(const Layer layer, const Source u, const Source v, const T* __restrict__ weight1,
                   const T* __restrict__ bias1, const T* __restrict__ weight2, T* __restrict__ z,
                   bool z_aligned, float* __restrict__ partial) {
  constexpr int kTileM = Tile::kTileM, kTileN = Tile::kTileN, kThreads = Tile::kThreads;
  constexpr int kPartsM = Tile::kWarpM / 16, kPartsN = Tile::kWarpN / 8;  // of a warp's tile: products
  constexpr int kStep = kThreads / 8;                                     // between the rows a thread copies
  T* smem = shared_memory<T>();  // kStages of [kTileM, kTileK] inputs and [kTileN, kTileK] weights
  const int64_t hidden = layer.hidden, row0 = static_cast<int64_t>(blockIdx.y) * kTileM,
                column0 = static_cast<int64_t>(blockIdx.x) * kTileN;
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int warp_m = warp / 2 * Tile::kWarpM, warp_n = warp % 2 * Tile::kWarpN;

  const int chunk = threadIdx.x & 7, first = threadIdx.x >> 3;
  int u_row[kTileM / kStep], v_row[kTileM / kStep];
  MTFAST_UNROLL
  for (int i = 0; i < kTileM / kStep; ++i) {
    u_row[i] = static_cast<int>(source_row(u, row0 + first + i * kStep, layer.batch));
    v_row[i] = static_cast<int>(source_row(v, row0 + first + i * kStep, layer.batch));
  }
  const int half = static_cast<int>((hidden + kTileK - 1) / kTileK), steps = 2 * half;
  const auto copy = [&](int step) {
    if (step < steps) {
      const bool right = step >= half;
      const int64_t column = static_cast<int64_t>(right ? step - half : step) * kTileK + chunk * 8;
      const T* side = static_cast<const T*>(right ? v.data : u.data);
      const int64_t pitch = right ? v.pitch : u.pitch;
      T *inputs = smem + step % kStages * Tile::kStage, *weights = inputs + kTileM * kTileK;
      MTFAST_UNROLL
      for (int i = 0; i < kTileM / kStep; ++i) {
        copy_chunk<kAligned>(inputs + swizzled(first + i * kStep, chunk), side, right ? v_row[i] : u_row[i],
                             pitch, column, hidden);
      }
      MTFAST_UNROLL
      for (int i = 0; i < kTileN / kStep; ++i) {
        const int64_t at = column0 + first + i * kStep;
        copy_chunk<kAligned>(weights + swizzled(first + i * kStep, chunk), weight1,
                             at < layer.inner ? at * 2 + right : -1, hidden, column, hidden);
      }
    }
    ptx::cp_async_commit();
  };

  for (int step = 0; step < kStages - 1; ++step) copy(step);
  // This block's columns of bias1 and of weight2's rows, under the first stages' way.
  float* smem_bias1 = reinterpret_cast<float*>(shared_memory<char>() + Tile::kConstantsAt);  // [kTileN]
  float* smem_weight2 = smem_bias1 + kTileN;  // [outputs, kTileN]
  for (int i = threadIdx.x; i < (1 + layer.outputs) * kTileN; i += kThreads) {
    const int64_t o = i / kTileN - 1, column = column0 + i % kTileN;
    const T* from = o < 0 ? bias1 : weight2 + o * layer.inner;
    smem_bias1[i] = column < layer.inner ? to_float(from[column]) : 0.f;
  }
  const uint64_t seed = seed_of(layer);

  float acc[kPartsM][kPartsN][4] = {};
  for (int step = 0; step < steps; ++step) {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();  // this stage has landed for all, and all have left the one that is refilled next
    copy(step + kStages - 1);
    const T *inputs = smem + step % kStages * Tile::kStage, *weights = inputs + kTileM * kTileK;
    MTFAST_UNROLL
    for (int k = 0; k < kTileK / 16; ++k) {
      uint32_t frag_a[kPartsM][4], frag_b[kPartsN / 2][4];
      MTFAST_UNROLL
      for (int i = 0; i < kPartsM; ++i) {
        ptx::ldmatrix_x4(frag_a[i], inputs + swizzled(warp_m + 16 * i + (lane & 15), 2 * k + (lane >> 4)));
      }
      MTFAST_UNROLL
      for (int j = 0; j < kPartsN / 2; ++j) {
        ptx::ldmatrix_x4(frag_b[j], weights + swizzled(warp_n + 16 * j + (lane & 7) + (lane >> 4) * 8,
                                                       2 * k + (lane >> 3 & 1)));
      }
      MTFAST_UNROLL
      for (int i = 0; i < kPartsM; ++i) {
        MTFAST_UNROLL
        for (int j = 0; j < kPartsN; ++j) {
          mma<T>(acc[i][j], frag_a[i], frag_b[j / 2][j % 2 * 2], frag_b[j / 2][j % 2 * 2 + 1]);
        }
      }
    }
  }
  ptx::cp_async_wait<0>();
  __syncthreads();

  // The stages are done with: their memory now holds the tile, and then its sums.
  float* smem_z = reinterpret_cast<float*>(smem);  // [kTileM, kPitch]
  float* smem_sums = smem_z + Tile::kSums;         // [kTileN / 32, kTileM, outputs]
  MTFAST_UNROLL
  for (int i = 0; i < kPartsM; ++i) {
    MTFAST_UNROLL
    for (int j = 0; j < kPartsN; ++j) {
      float* to = smem_z + (warp_m + 16 * i + lane / 4) * Tile::kPitch + warp_n + 8 * j + lane % 4 * 2;
      *reinterpret_cast<float2*>(to) = make_float2(acc[i][j][0], acc[i][j][1]);
      *reinterpret_cast<float2*>(to + 8 * Tile::kPitch) = make_float2(acc[i][j][2], acc[i][j][3]);
    }
  }
  __syncthreads();
  constexpr int kAcross = kTileN / 8;
  const int rows = layer.batch - row0 < kTileM ? static_cast<int>(layer.batch - row0) : kTileM;
  const int pieces = (rows * kAcross + 31) / 32 * 32;  // of eight columns; whole warps exchange words
  for (int i = threadIdx.x; i < pieces; i += kThreads) {
    const int at_row = i / kAcross, at = i % kAcross * 8;
    const int64_t row = row0 + at_row, column = column0 + at;
    float x[8];
    MTFAST_UNROLL
    for (int e = 0; e < 8; ++e) {
      x[e] = smem_z[at_row * Tile::kPitch + at + e] + smem_bias1[at + e];
    }
    if (z != nullptr && row < layer.batch) store8(z + row * layer.inner, column, layer.inner, z_aligned, x);
    activate_and_drop<T>(layer, seed, row, column, x);
    for (int o = 0; o < layer.outputs; ++o) {
      float sum = 0.f;
      MTFAST_UNROLL
      for (int e = 0; e < 8; ++e) {
        sum += x[e] * smem_weight2[o * kTileN + at + e];
      }
      sum = warp_sum<4>(sum);
      if (lane % 4 == 0) smem_sums[(at / 32 * kTileM + at_row) * layer.outputs + o] = sum;
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < rows * layer.outputs; i += kThreads) {
    float sum = 0.f;
    MTFAST_UNROLL
    for (int part = 0; part < kTileN / 32; ++part) {
      sum += smem_sums[part * kTileM * layer.outputs + i];
    }
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

__global__ void __launch_bounds__(256)
    output_kernel(const Layer layer, const float* __restrict__ z, const float* __restrict__ weight2,
                  const float* __restrict__ bias2, float* __restrict__ y, bool aligned) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * 8 + (threadIdx.x >> 5);
  if (row >= layer.batch) return;
  const int lane = threadIdx.x & 31;
  const uint64_t seed = seed_of(layer);
  float sums[kMaxOutputs] = {};
  for (int64_t first = 0; first < layer.inner; first += 256) {
    const int64_t column = first + lane * 8;
    float d[8], weight[8];
    unpack(d, load8(z + row * layer.inner, column, layer.inner, aligned));
    activate_and_drop<float>(layer, seed, row, column, d);
    MTFAST_UNROLL
    for (int o = 0; o < kMaxOutputs; ++o) {
      if (o >= layer.outputs) break;
      unpack(weight, load8(weight2 + o * layer.inner, column, layer.inner, aligned));
      MTFAST_UNROLL
      for (int i = 0; i < 8; ++i) {
        sums[o] += d[i] * weight[i];
      }
    }
  }
  MTFAST_UNROLL
  for (int o = 0; o < kMaxOutputs; ++o) {
    if (o >= layer.outputs) break;
    const float sum = warp_sum(sums[o]);
    if (lane == 0) y[row * layer.outputs + o] = sum + bias2[o];
  }
}

template <class T, class Tile, bool kAligned>
int launch_tiles(const Inputs& in, T* z, float* partial, void* y, void* stream) {
  const Layer& layer = in.layer;
  const auto kernel = forward_kernel<T, Tile, kAligned>;
  if (const int error = allow_shared_memory(kernel, Tile::kSharedBytes)) return error;
  const dim3 grid(blocks(layer.inner, Tile::kTileN), blocks(layer.batch, Tile::kTileM));
  if (const int error = MTFAST_LAUNCH(grid, dim3(Tile::kThreads), Tile::kSharedBytes, stream, kernel, layer,
                                      in.u, in.v, static_cast<const T*>(in.weight1),
                                      static_cast<const T*>(in.bias1), static_cast<const T*>(in.weight2), z,
                                      layer.inner % 8 == 0 && on_16_bytes(z), partial))
    return error;
  return MTFAST_LAUNCH(dim3(blocks(layer.batch * layer.outputs, 256)), dim3(256), 0, stream,
                       add_partial_kernel<T>, layer, in.u, in.v, partial, static_cast<int>(grid.x),
                       static_cast<const T*>(in.bias2), static_cast<T*>(y));
}

template <class T>
int launch_forward(const Inputs& in, void* z, float* partial, void* y, void* stream) {
  using Large = Tile<128, 96>;
  using Small = Tile<64, 64>;
  const Layer& layer = in.layer;
  const bool aligned = layer.hidden % 8 == 0 && in.u.pitch % 8 == 0 && in.v.pitch % 8 == 0 &&
                       on_16_bytes(in.u.data) && on_16_bytes(in.v.data) && on_16_bytes(in.weight1);
  const int64_t tiles = int64_t{blocks(layer.inner, Large::kTileN)} * blocks(layer.batch, Large::kTileM);
  const auto launch = !aligned     ? launch_tiles<T, Small, false>
                      : tiles < 64 ? launch_tiles<T, Small, true>
                                   : launch_tiles<T, Large, true>;
  return launch(in, static_cast<T*>(z), partial, y, stream);
}

}  // namespace

int mtfast_concat_mlp_forward(const Inputs* in, void* z, float* partial, void* y, void* stream) {
  const auto launch =
      in->layer.dtype == Dtype::kBFloat16 ? launch_forward<__nv_bfloat16> : launch_forward<__half>;
  return launch(*in, z, partial, y, stream);
}

int mtfast_concat_mlp_output(const Inputs* in, const void* z, void* y, void* stream) {
  const Layer& layer = in->layer;
  const bool aligned = layer.inner % 8 == 0 && on_16_bytes(z) && on_16_bytes(in->weight2);
  return MTFAST_LAUNCH(dim3(blocks(layer.batch, 8)), dim3(256), 0, stream, output_kernel, layer,
                       static_cast<const float*>(z), static_cast<const float*>(in->weight2),
                       static_cast<const float*>(in->bias2), static_cast<float*>(y), aligned);
}

}  // namespace mtfast::concat_mlp
