// Kernels with one fault each, and without: what the checks must catch, so that they are known to
// be able to fail. Each block sums its 256 numbers by way of shared memory, twice over two tiles that are
// copied in turn.
#include "device/ptx.cuh"
#include "device/reduce.cuh"

namespace {

using namespace mtfast;

enum Fault {
  kNone,
  kNoWait,
  kNoBarrierBeforeRead,
  kNoBarrierBeforeRefill,
  kSharedOutOfBounds,
  kDivergentBarrier,
  kGlobalRace,
  kShuffleWithoutAll,
  kShuffleOnTwoBranches,
  kCopyFromShared,
  kGlobalStoreToShared
};

constexpr int kThreads = 64, kTile = 4 * kThreads;

__global__ void sum_tiles(const float* input, float* output, int tiles, Fault fault) {
  float* tile = shared_memory<float>();
  float* partial = tile + kTile;
  const int thread = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int t = 0; t < tiles; ++t) {
    ptx::cp_async_16(tile + 4 * thread, input + t * kTile + 4 * thread);
    ptx::cp_async_commit();
    if (fault != kNoWait) ptx::cp_async_wait<0>();
    if (fault != kNoBarrierBeforeRead) __syncthreads();
    for (int i = 0; i < 4; ++i) sum += tile[i * kThreads + thread];  // other threads' copies
    if (fault != kNoBarrierBeforeRefill) __syncthreads();
  }
  if (fault == kShuffleOnTwoBranches)
    sum = thread % 2 == 0 ? warp_sum(sum) : -warp_sum(-sum);
  else
    sum = warp_sum(sum);
  if (fault == kCopyFromShared) ptx::cp_async_16(tile + 4 * thread, tile);
  if (fault == kGlobalStoreToShared) ptx::store_16(tile + 4 * thread, {0, 0, 0, 0});
  if (thread % 32 == 0) partial[thread / 32 + (fault == kSharedOutOfBounds)] = sum;
  if (fault != kDivergentBarrier || thread < 32) __syncthreads();
  if (thread == 0) output[blockIdx.x] = partial[0] + partial[1];
  if (fault == kGlobalRace && thread == 1) output[0] = 0;
  if (fault == kShuffleWithoutAll && thread < 16) output[0] += __shfl_xor_sync(0xffffffffu, sum, 1);
}

}  // namespace

extern "C" int sum_tiles_launch(const float* input, float* output, int64_t tiles, int64_t blocks,
                                int64_t fault, void* stream) {
  return MTFAST_LAUNCH(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), (kTile + 2) * sizeof(float),
                       stream, sum_tiles, input, output, static_cast<int>(tiles), static_cast<Fault>(fault));
}

// One 16x16 by 16x8 product of a warp: c [16, 8] = a [16, 16] b^T, b [8, 16]; both in bf16 or both in fp16.
namespace {
__global__ void one_mma(const uint16_t* a, const uint16_t* b, float* c, int fp16) {
  uint16_t* shared = shared_memory<uint16_t>();
  const int lane = static_cast<int>(threadIdx.x);
  ptx::cp_async_16(shared + 8 * lane, a + 8 * lane);
  ptx::cp_async_16(shared + 256 + 8 * lane, lane < 16 ? b + 8 * lane : nullptr, lane < 16 ? 16 : 0);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncwarp();
  uint32_t fragment_a[4], fragment_b[4];
  ptx::ldmatrix_x4(fragment_a, shared + (lane % 16) * 16 + lane / 16 * 8);
  ptx::ldmatrix_x4(fragment_b, shared + 256 + (lane % 8) * 16 + lane / 8 % 2 * 8);
  float sum[4] = {};
  if (fp16)
    ptx::mma_fp16(sum, fragment_a, fragment_b[0], fragment_b[1]);
  else
    ptx::mma_bf16(sum, fragment_a, fragment_b[0], fragment_b[1]);
  for (int i = 0; i < 4; ++i) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sum[i];
}
}  // namespace

extern "C" int one_mma_launch(const uint16_t* a, const uint16_t* b, float* c, int64_t fp16, void* stream) {
  return MTFAST_LAUNCH(dim3(1), dim3(32), 512 * sizeof(uint16_t), stream, one_mma, a, b, c,
                       static_cast<int>(fp16));
}
