// concat_mlp on CUDA, backward: one pass over the hidden layer that replays dropout; the two matrix products
// that need its result are torch's. No atomics: every sum is over a fixed set of rows in a fixed order.
#include "concat_mlp_device.cuh"
#include "device/reduce.cuh"

namespace mtfast::concat_mlp {
namespace {

// ---- backward: 256 columns and a chunk of rows a block, a row a warp at a time ----

constexpr int kWarps = 8;

template <class T, int kOutputs>
__global__ void __launch_bounds__(kWarps * 32)
    backward_kernel(const Layer layer, int64_t chunk_rows, const T* __restrict__ dy, const T* __restrict__ z,
                    const T* __restrict__ weight2, const int64_t* __restrict__ seed_at, T* __restrict__ dz,
                    float* __restrict__ partial, bool aligned) {
  const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * 256 + lane * 8;
  const int64_t begin = blockIdx.y * chunk_rows;
  const int64_t end = begin + chunk_rows < layer.batch ? begin + chunk_rows : layer.batch;
  const uint64_t seed = layer.threshold != 0 ? static_cast<uint64_t>(*seed_at) : 0;
  const float scale = static_cast<float>(layer.scale);
  float weight[kOutputs][8] = {};
  MTFAST_UNROLL
  for (int o = 0; o < kOutputs; ++o)
    if (o < layer.outputs) load8(weight2 + o * layer.inner, column, layer.inner, aligned, weight[o]);
  float sums[1 + kOutputs][8] = {};  // of dz, and of dy[o] * d
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    float dy_row[kOutputs], x[8], grad[8];
    MTFAST_UNROLL
    for (int o = 0; o < kOutputs; ++o)
      dy_row[o] = o < layer.outputs ? to_float(dy[row * layer.outputs + o]) : 0.f;
    load8(z + row * layer.inner, column, layer.inner, aligned, x);
    uint32_t kept = 0xff;
    if (layer.threshold != 0) kept = kept_of_eight(seed, row, column, layer.threshold);
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      float h, slope;
      activate(layer.activation, x[i], h, slope);
      const bool keep = kept >> i & 1;
      const float d = keep ? h * scale : 0.f;
      float dh = 0.f;
      MTFAST_UNROLL
      for (int o = 0; o < kOutputs; ++o) {
        dh += dy_row[o] * weight[o][i];
        sums[1 + o][i] += dy_row[o] * d;
      }
      grad[i] = keep ? dh * slope * scale : 0.f;
      sums[0][i] += grad[i];
    }
    if (dz != nullptr) store8(dz + row * layer.inner, column, layer.inner, aligned, grad);
  }

  float* of_warps = shared_memory<float>();  // [kWarps, 256]
  MTFAST_UNROLL
  for (int k = 0; k < 1 + kOutputs; ++k) {
    if (k > layer.outputs) break;
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) of_warps[warp * 256 + lane * 8 + i] = sums[k][i];
    __syncthreads();
    float sum = 0.f;
    for (int w = 0; w < kWarps; ++w) sum += of_warps[w * 256 + threadIdx.x];
    const int64_t at = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (at < layer.inner) partial[(blockIdx.y * (1 + layer.outputs) + k) * layer.inner + at] = sum;
    __syncthreads();
  }
}

// dbias1 and dweight2 from the chunks' sums, in order; the last `outputs` blocks add up dy for dbias2.
template <class T>
__global__ void __launch_bounds__(256)
    add_chunks_kernel(const Layer layer, int chunks, const float* __restrict__ partial,
                      const T* __restrict__ dy, T* __restrict__ dbias1, T* __restrict__ dweight2,
                      T* __restrict__ dbias2) {
  const int64_t size = (1 + layer.outputs) * layer.inner;
  const int column_blocks = static_cast<int>(gridDim.x) - layer.outputs;
  if (static_cast<int>(blockIdx.x) < column_blocks) {
    const int64_t i = static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x;
    if (i >= size) return;
    float sum = 0.f;
    for (int chunk = 0; chunk < chunks; ++chunk) sum += partial[chunk * size + i];
    round_to(i < layer.inner ? dbias1[i] : dweight2[i - layer.inner], sum);
    return;
  }
  const int o = static_cast<int>(blockIdx.x) - column_blocks;
  float sum = 0.f;
  for (int64_t row = threadIdx.x; row < layer.batch; row += 256) sum += to_float(dy[row * layer.outputs + o]);
  sum = warp_sum(sum);
  float* of_warps = shared_memory<float>();
  if ((threadIdx.x & 31) == 0) of_warps[threadIdx.x >> 5] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int w = 1; w < 8; ++w) sum += of_warps[w];
  round_to(dbias2[o], sum);
}

template <class T, int kOutputs>
int launch_pass(const Layer& layer, const T* dy, const T* z, const T* weight2, const int64_t* seed, T* dz,
                float* partial, void* stream) {
  const bool aligned = layer.inner % 8 == 0 && on_16_bytes(z) && on_16_bytes(weight2) && on_16_bytes(dz);
  return MTFAST_LAUNCH(dim3(blocks(layer.inner, 256), static_cast<unsigned>(backward_chunks(layer.batch))),
                       dim3(kWarps * 32), kWarps * 256 * sizeof(float), stream,
                       (backward_kernel<T, kOutputs>), layer, backward_chunk_rows(layer.batch), dy, z,
                       weight2, seed, dz, partial, aligned);
}

template <class T>
int launch_backward(const Layer& layer, const void* dy, const void* z, const void* weight2,
                    const int64_t* seed, void* dz, float* partial, void* dbias1, void* dweight2, void* dbias2,
                    void* stream) {
  const auto launch = layer.outputs == 1   ? launch_pass<T, 1>
                      : layer.outputs == 2 ? launch_pass<T, 2>
                      : layer.outputs <= 4 ? launch_pass<T, 4>
                                           : launch_pass<T, 8>;
  if (layer.batch > 0) {  // else there are no chunks, and their sums are 0
    if (const int error = launch(layer, static_cast<const T*>(dy), static_cast<const T*>(z),
                                 static_cast<const T*>(weight2), seed, static_cast<T*>(dz), partial, stream))
      return error;
  }
  return MTFAST_LAUNCH(dim3(blocks((1 + layer.outputs) * layer.inner, 256) + layer.outputs), dim3(256),
                       8 * sizeof(float), stream, add_chunks_kernel<T>, layer,
                       static_cast<int>(backward_chunks(layer.batch)), partial, static_cast<const T*>(dy),
                       static_cast<T*>(dbias1), static_cast<T*>(dweight2), static_cast<T*>(dbias2));
}

}  // namespace
}  // namespace mtfast::concat_mlp

using mtfast::Dtype;
using mtfast::concat_mlp::Layer;

extern "C" int mtfast_concat_mlp_backward(const Layer* layer, const void* dy, const void* z,
                                          const void* weight2, const int64_t* seed, void* dz, float* partial,
                                          void* dbias1, void* dweight2, void* dbias2, void* stream) {
  const auto launch = layer->dtype == Dtype::kBFloat16  ? mtfast::concat_mlp::launch_backward<__nv_bfloat16>
                      : layer->dtype == Dtype::kFloat16 ? mtfast::concat_mlp::launch_backward<__half>
                                                        : mtfast::concat_mlp::launch_backward<float>;
  return launch(*layer, dy, z, weight2, seed, dz, partial, dbias1, dweight2, dbias2, stream);
}
