// Kernels whose costs are known by hand, and what wastes them: a row that is read twice, a serial scan.
#include "device/ptx.cuh"
#include "device/reduce.cuh"

namespace {

using namespace mtfast;

enum Waste { kNone, kReadTwice, kSerial };

constexpr int kThreads = 64;

// Each block's row of floats, times *scale, plus the sum of that. All lanes of a warp read the one scale at
// once.
__global__ void add_sum(const float* input, const float* scale, float* output, Waste waste) {
  float* shared = shared_memory<float>();
  const int thread = static_cast<int>(threadIdx.x);
  const float* row = input + blockIdx.x * kThreads;
  float x = row[thread] * scale[0], sum = 0;
  shared[thread] = x;
  __syncthreads();
  if (waste == kSerial) {
    for (int i = 0; i < kThreads; ++i) sum += shared[i];
  } else {
    sum = warp_sum(shared[thread] + shared[thread ^ 32]);
  }
  if (waste == kReadTwice) x = static_cast<const volatile float*>(row)[thread] * scale[0];
  output[blockIdx.x * kThreads + thread] = x + sum;
}

// A warp: tiles of 512 elements are copied, 16 bytes a lane twice, of which four lanes' are zeros; a product
// of each and a Philox call of each lane.
__global__ void multiply(const uint16_t* input, uint32_t* count, uint32_t* output, int tiles) {
  uint16_t* shared = shared_memory<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  uint32_t drawn = 0;
  float sum[4] = {};
  for (int t = 0; t < tiles; ++t) {
    ptx::cp_async_16(shared + 8 * lane, input + 512 * t + 8 * lane);
    ptx::cp_async_16(shared + 256 + 8 * lane, input + 512 * t + 256 + 8 * lane, lane < 28 ? 16 : 0);
    ptx::cp_async_commit();
    ptx::cp_async_wait<0>();
    __syncwarp();
    uint32_t a[4], b[4];
    ptx::ldmatrix_x4(a, shared + (lane % 16) * 16 + lane / 16 * 8);
    ptx::ldmatrix_x4_trans(b, shared + 256 + (lane % 16) * 16 + lane / 16 * 8);
    ptx::mma_bf16(sum, a, b[0], b[1]);
    drawn ^= philox(static_cast<uint32_t>(lane), static_cast<uint32_t>(t), 0, 0, 7).word[0];
    __syncwarp();
  }
  if (__any_sync(~0u, sum[0] > 0) && lane == 0) atomicAdd(count, 1u);
  output[lane] = drawn;
}

}  // namespace

extern "C" int add_sum_launch(const float* input, const float* scale, float* output, int64_t blocks,
                              int64_t waste, void* stream) {
  return MTFAST_LAUNCH(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), kThreads * sizeof(float), stream,
                       add_sum, input, scale, output, static_cast<Waste>(waste));
}

extern "C" int multiply_launch(const uint16_t* input, uint32_t* count, uint32_t* output, int64_t tiles,
                               int64_t launches, void* stream) {
  for (int64_t i = 0; i < launches; ++i)
    if (const int error = MTFAST_LAUNCH(dim3(1), dim3(32), 512 * sizeof(uint16_t), stream, multiply, input,
                                        count, output, static_cast<int>(tiles)))
      return error;
  return 0;
}
