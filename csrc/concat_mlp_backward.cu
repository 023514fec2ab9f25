// concat_mlp on CUDA, backward: one pass over the hidden layer that replays dropout, then the sums of its
// chunks of rows; the matrix products that need its result are torch's.
//
// Floor: z is read and dz written once, 6.3 MB at batch 2048 and 768 columns in 16 bits, 1.3 us at 4.8 TB/s;
// dropout and the activation take a warp about 300 instructions a row, 2 us of 132 SMs. At that size neither
// bounds the pass but the time until the first bytes are there. So a warp has all the rows it loads under way
// before it turns to the first, four of 512 bytes; eight warps are a block, and two blocks an SM hold all 192
// at once. A lane's 8 columns are 16 bytes and one exchange of dropout's words. The loop over rows is a loop:
// unrolled it is three times the code, and not all of that stays in the caches of instructions.
//
// Sums over rows: a thread's in float, at most 16 terms up to batch 16384, those of warps pairwise, those of
// chunks in double. dbias2, few numbers of many terms, is in double throughout: the exact sum, rounded once.
// No atomics: the order of no sum varies.
#include "concat_mlp_device.cuh"

namespace mtfast::concat_mlp {
namespace {

// ---- backward: 256 columns and a chunk of rows a block, four rows a warp at a time ----

constexpr int kWarps = 8, kThreads = kWarps * 32, kColumns = 256;
constexpr int kRows = kChunkRows / kWarps;
static_assert(kRows * kMaxOutputs <= 32, "a warp loads dy for its rows at once");

template <class T, int kOutputs>
__global__ void __launch_bounds__(kThreads, kOutputs <= 2 ? 2 : 1)
    backward_kernel(const Layer layer, int64_t chunk_rows, const T* __restrict__ dy, const T* __restrict__ z,
                    const T* __restrict__ weight2, T* __restrict__ dz, double* __restrict__ bias2_sums,
                    float* __restrict__ other_sums, bool aligned) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31, outputs = layer.outputs;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumns + lane * 8;
  const int64_t begin = blockIdx.y * chunk_rows;
  const int64_t end = begin + chunk_rows < layer.batch ? begin + chunk_rows : layer.batch;
  const uint64_t seed = seed_of(layer);
  const float scale = static_cast<float>(layer.scale);
  float weight[kOutputs][8] = {};
  MTFAST_UNROLL
  for (int o = 0; o < kOutputs; ++o) {
    if (o < outputs) unpack(weight[o], load8(weight2 + o * layer.inner, column, layer.inner, aligned));
  }
  float sums[1 + kOutputs][8] = {};  // of dz, and of dy[o] * d
  double dy_sum = 0;                 // of what this lane loads
  for (int64_t row0 = begin + warp * kRows; row0 < end; row0 += kChunkRows) {
    Eight<T> ahead[kRows];
    MTFAST_UNROLL
    for (int r = 0; r < kRows; ++r) {
      if (row0 + r < end) ahead[r] = load8(z + (row0 + r) * layer.inner, column, layer.inner, aligned);
    }
    const bool has_dy = lane < kRows * outputs && row0 * outputs + lane < end * outputs;
    const float dy_rows = has_dy ? to_float(dy[row0 * outputs + lane]) : 0.f;
    dy_sum += dy_rows;
    const int rows = row0 + kRows < end ? kRows : static_cast<int>(end - row0);
    for (int r = 0; r < rows; ++r) {  // not unrolled: that would not fit into the instruction cache
      const int64_t row = row0 + r;
      const uint32_t kept = kept_of_eight(layer.threshold, seed, row, column);
      float dy_row[kOutputs];
      MTFAST_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        const float of_row = __shfl_sync(0xffffffffu, dy_rows, (r * outputs + o) & 31);
        dy_row[o] = o < outputs ? of_row : 0.f;
      }
      float h[8], slope[8], grad[8];
      unpack(h, ahead[0]);
      MTFAST_UNROLL
      for (int next = 1; next < kRows; ++next) {
        ahead[next - 1] = ahead[next];
      }
      activate<T>(layer.activation, h, slope);
      MTFAST_UNROLL
      for (int i = 0; i < 8; ++i) {
        const bool keep = kept >> i & 1;
        const float d = keep ? h[i] * scale : 0.f;
        float dh = 0.f;
        MTFAST_UNROLL
        for (int o = 0; o < kOutputs; ++o) {
          dh += dy_row[o] * weight[o][i];
          sums[1 + o][i] += dy_row[o] * d;
        }
        grad[i] = keep ? dh * slope[i] * scale : 0.f;
        sums[0][i] += grad[i];
      }
      if (dz != nullptr) store8(dz + row * layer.inner, column, layer.inner, aligned, grad);
    }
  }

  double* dy_sums = shared_memory<double>();                          // [kWarps, 32]
  float* of_warps = reinterpret_cast<float*>(dy_sums + kWarps * 32);  // [1 + kOutputs, kWarps, kColumns]
  dy_sums[threadIdx.x] = dy_sum;
  MTFAST_UNROLL
  for (int k = 0; k < 1 + kOutputs; ++k) {
    float4* to = reinterpret_cast<float4*>(of_warps + (k * kWarps + warp) * kColumns + lane * 8);
    to[0] = make_float4(sums[k][0], sums[k][1], sums[k][2], sums[k][3]);
    to[1] = make_float4(sums[k][4], sums[k][5], sums[k][6], sums[k][7]);
  }
  __syncthreads();
  float* of_chunk = other_sums + blockIdx.y * backward_float_sums(layer);
  const int64_t at = static_cast<int64_t>(blockIdx.x) * kColumns + threadIdx.x;
  MTFAST_UNROLL
  for (int k = 0; k < 1 + kOutputs; ++k) {
    if (k > outputs || at >= layer.inner) break;
    const float* from = of_warps + k * kWarps * kColumns + threadIdx.x;
    const auto pair = [&](int w) { return from[w * kColumns] + from[(w + 1) * kColumns]; };
    of_chunk[k * layer.inner + at] = (pair(0) + pair(2)) + (pair(4) + pair(6));
  }
  if (blockIdx.x == 0 && static_cast<int>(threadIdx.x) < outputs) {
    double sum = 0;
    for (int w = 0; w < kWarps; ++w) {
      MTFAST_UNROLL
      for (int r = 0; r < kRows; ++r) {
        sum += dy_sums[w * 32 + r * outputs + threadIdx.x];
      }
    }
    bias2_sums[blockIdx.y * outputs + threadIdx.x] = sum;
  }
}

// The gradients from the chunks' sums: 32 columns a block, every eighth chunk a warp.
template <class T>
__global__ void __launch_bounds__(kThreads)
    add_chunks_kernel(const Layer layer, int chunks, const double* __restrict__ bias2_sums,
                      const float* __restrict__ other_sums, T* __restrict__ dbias1, T* __restrict__ dweight2,
                      T* __restrict__ dbias2) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 32 + lane;
  const int64_t others = backward_float_sums(layer), size = others + layer.outputs;
  double sum = 0;
  const auto add = [&](const auto* from, int64_t pitch) {
    MTFAST_UNROLL
    for (int chunk = warp; chunk < chunks; chunk += kWarps) {
      sum += from[chunk * pitch];
    }
  };
  if (column < others)
    add(other_sums + column, others);
  else if (column < size)
    add(bias2_sums + (column - others), layer.outputs);
  double* of_warps = shared_memory<double>();  // [kWarps, 32]
  of_warps[threadIdx.x] = sum;
  __syncthreads();
  if (warp != 0 || column >= size) return;
  for (int w = 1; w < kWarps; ++w) sum += of_warps[w * 32 + lane];
  const int64_t of_weight2 = column - layer.inner, of_bias2 = column - others;
  T& to = of_weight2 < 0 ? dbias1[column] : of_bias2 < 0 ? dweight2[of_weight2] : dbias2[of_bias2];
  round_to(to, static_cast<float>(sum));
}

template <class T, int kOutputs>
int launch_pass(const Inputs& in, const void* dy, const void* z, void* dz, double* bias2_sums,
                float* other_sums, void* stream) {
  constexpr size_t kShared = kWarps * (32 * sizeof(double) + (1 + kOutputs) * kColumns * sizeof(float));
  const Layer& layer = in.layer;
  const auto kernel = backward_kernel<T, kOutputs>;
  if (const int error = allow_shared_memory(kernel, kShared)) return error;
  const dim3 grid(blocks(layer.inner, kColumns), static_cast<unsigned>(backward_chunks(layer.batch)));
  const bool aligned = layer.inner % 8 == 0 && on_16_bytes(z) && on_16_bytes(in.weight2) && on_16_bytes(dz);
  return MTFAST_LAUNCH(grid, dim3(kThreads), kShared, stream, kernel, layer, backward_chunk_rows(layer.batch),
                       static_cast<const T*>(dy), static_cast<const T*>(z), static_cast<const T*>(in.weight2),
                       static_cast<T*>(dz), bias2_sums, other_sums, aligned);
}

template <class T>
int launch_backward(const Inputs& in, const void* dy, const void* z, void* dz, double* partial,
                    const Sums& sums, void* stream) {
  const Layer& layer = in.layer;
  const auto launch = layer.outputs == 1   ? launch_pass<T, 1>
                      : layer.outputs == 2 ? launch_pass<T, 2>
                      : layer.outputs <= 4 ? launch_pass<T, 4>
                                           : launch_pass<T, 8>;
  const int64_t chunks = backward_chunks(layer.batch);
  auto* other_sums = reinterpret_cast<float*>(partial + chunks * layer.outputs);
  if (layer.batch > 0) {  // else there are no chunks, and their sums are 0
    if (const int error = launch(in, dy, z, dz, partial, other_sums, stream)) return error;
  }
  return MTFAST_LAUNCH(dim3(blocks(backward_float_sums(layer) + layer.outputs, 32)), dim3(kThreads),
                       kThreads * sizeof(double), stream, add_chunks_kernel<T>, layer,
                       static_cast<int>(chunks), partial, other_sums, static_cast<T*>(sums.dbias1),
                       static_cast<T*>(sums.dweight2), static_cast<T*>(sums.dbias2));
}

}  // namespace

int mtfast_concat_mlp_backward(const Inputs* in, const void* dy, const void* z, void* dz, double* partial,
                               const Sums* sums, void* stream) {
  const auto launch = in->layer.dtype == Dtype::kBFloat16  ? launch_backward<__nv_bfloat16>
                      : in->layer.dtype == Dtype::kFloat16 ? launch_backward<__half>
                                                           : launch_backward<float>;
  return launch(*in, dy, z, dz, partial, *sums, stream);
}

}  // namespace mtfast::concat_mlp
