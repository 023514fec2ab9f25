// The one boundary between CUDA and the tests' emulation of it: a kernel includes this instead of CUDA
// headers, takes its shared memory from shared_memory<T>() and is launched by MTFAST_LAUNCH. With
// -DMTFAST_CUDA_ON_CPU, g++ compiles the same source against tests/cuda_on_cpu/cuda_on_cpu.h.
#pragma once
#include <cstdint>
#include <cstring>

#include "philox.cuh"

#ifdef MTFAST_CUDA_ON_CPU
#include "cuda_on_cpu.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace mtfast {

// The block's dynamic shared memory; there is no other, so that the emulation can watch all of it.
template <class T>
__device__ __forceinline__ T* shared_memory() {
  extern __shared__ __align__(1024) unsigned char mtfast_shared_memory[];
  return reinterpret_cast<T*>(mtfast_shared_memory);
}

}  // namespace mtfast

// MTFAST_LAUNCH(grid, block, shared_bytes, stream, (kernel<A, B>), arguments...): 0 or a cudaError_t.
// clang-format off
#define MTFAST_LAUNCH(grid, block, shared_bytes, stream, kernel, ...)                             \
  ((kernel)<<<(grid), (block), (shared_bytes), static_cast<cudaStream_t>(stream)>>>(__VA_ARGS__), \
   static_cast<int>(cudaGetLastError()))
// clang-format on

namespace mtfast {

// With `beside`, from Hopper on, the kernel may begin before the one before it on the stream has ended
// (programmatic dependent launch): that must be one of ours that says when, they must share nothing that one
// of them writes, and one block must wait_for_previous(), so that what comes after this kernel comes after
// both.
template <class... Parameters, class... Arguments>
int launch_beside(bool beside, dim3 grid, dim3 block, size_t shared_bytes, void* stream,
                  void (*kernel)(Parameters...), const Arguments&... arguments) {
  int device = 0, major = 0;
  if (const int error = cudaGetDevice(&device)) return error;
  if (const int error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))
    return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = beside && major >= 9 ? 1 : 0;
  const int error = cudaLaunchKernelEx(&config, kernel, arguments...);
  if (error != 0) cudaGetLastError();  // lest somebody else meets it
  return error;
}

}  // namespace mtfast

#define MTFAST_LAUNCH_BESIDE(beside, grid, block, shared_bytes, stream, kernel, ...) \
  mtfast::launch_beside(beside, grid, block, shared_bytes, stream, kernel, __VA_ARGS__)
#endif

namespace mtfast {

// Lets a kernel use more than 48 KiB of shared memory; 0 or a cudaError_t, which is taken from the runtime,
// so that nobody meets it again later.
template <class Kernel>
int allow_shared_memory(Kernel* kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return 0;
  const int error =
      cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                           static_cast<int>(bytes));
  if (error != 0) cudaGetLastError();
  return error;
}

}  // namespace mtfast
