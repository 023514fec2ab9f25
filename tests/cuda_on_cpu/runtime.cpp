// What kernels' launch functions ask of the CUDA runtime: limits, attributes and errors.
#include <map>
#include <set>
#include <utility>

#include "machine.h"

namespace cuda_on_cpu {

Config config;

namespace {

std::map<const void*, size_t> allowed_shared;  // by kernel: cudaFuncSetAttribute
std::set<const void*> launched;                // kernels, since it was last asked
cudaError_t last_error = cudaSuccess;

}  // namespace

bool may_launch(dim3 grid, dim3 block_dim, size_t shared_bytes, const void* kernel) {
  const size_t threads = size_t{block_dim.x} * block_dim.y * block_dim.z;
  const size_t allowed = std::max<size_t>(48 * 1024, allowed_shared[kernel]);
  if (threads == 0 || threads > 1024 || !grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu ||
      grid.y > 65535 || grid.z > 65535 || shared_bytes > allowed) {
    fail(
        "invalid launch configuration: %zu threads, a grid of %u x %u x %u, %zu bytes of shared memory where "
        "%zu are allowed",
        threads, grid.x, grid.y, grid.z, shared_bytes, allowed);
    return false;
  }
  launched.insert(kernel);
  return true;
}

}  // namespace cuda_on_cpu

using namespace cuda_on_cpu;

extern "C" {
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  if (static_cast<size_t>(bytes) > config.shared_limit) return last_error = cudaErrorInvalidValue;
  allowed_shared[kernel] = static_cast<size_t>(bytes);
  return cudaSuccess;
}
cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "invalid argument" : cuda_on_cpu_error();
}

void cuda_on_cpu_configure(int order, unsigned seed, int late_copies, int races, int64_t shared_limit) {
  if (shared_limit != static_cast<int64_t>(config.shared_limit)) allowed_shared.clear();
  config = {static_cast<Order>(order), seed, late_copies != 0, races != 0, static_cast<size_t>(shared_limit)};
}
int cuda_on_cpu_last_error() { return last_error; }
// How many kernels were launched since it was last asked.
int64_t cuda_on_cpu_take_launched() { return static_cast<int64_t>(std::exchange(launched, {}).size()); }
}
