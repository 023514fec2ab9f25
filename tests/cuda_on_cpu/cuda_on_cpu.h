// CUDA's execution model on one CPU thread, for tests: what a kernel sees in place of the CUDA headers.
//   g++ -x c++ -DMTFAST_CUDA_ON_CPU -Icsrc -Itests/cuda_on_cpu -isystem $CUDA_HOME/include kernel.cu
//   cuda_on_cpu.cpp cost.cpp race.cpp runtime.cpp warp.cpp
// Each CUDA thread is a fiber. Warp-wide operations wait for the lanes of their mask and then act for all of
// them.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>  // types only: nothing of the CUDA runtime is linked
#include <vector_functions.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <type_traits>

#undef __shared__
#undef __constant__
#undef __launch_bounds__
#undef __forceinline__
#define __shared__ only_shared_memory_from_mtfast_shared_memory_is_emulated
#define __constant__ static
#define __launch_bounds__(...)
// What a GPU's compiler must inline g++ need not, and compiles in half the time so.
#define __forceinline__ inline

namespace cuda_on_cpu {

struct Thread {
  uint3 thread, block;
  dim3 block_dim, grid_dim;
  int index, lane, warp;
};
extern Thread* current;

enum class Collective { kSync, kShuffle, kBallot, kMatrix, kMatrixTransposed, kMmaBf16, kMmaFp16 };

// One lane's part in a collective: what it brings, and afterwards what it gets.
struct Operands {
  const void* address;
  uint32_t word[6];
  float accumulator[4];
  int source;
};

// Whose call it is, for messages.
#define CUDA_ON_CPU_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()
// What ends in a collective is part of the code that calls it, so that each such place has an address of its
// own.
#define CUDA_ON_CPU_INLINE inline __attribute__((always_inline))

unsigned char* shared_memory();
void sync_threads(const char* file, int line);
void collective(Collective what, unsigned mask, Operands& operands, const char* file, int line);
void copy_async(void* shared, const void* global, int bytes, void* caller);
void copy_async_commit();
void copy_async_wait(int pending);
void refuse_shared(const void* address, const char* what);  // fails where it is in shared memory
struct Kernel {
  const void* address;
  const char* name;
};
int launch(dim3 grid, dim3 block, size_t shared_bytes, const Kernel& kernel,
           const std::function<void()>& body);
template <class... Arguments>
const void* address_of(void (*kernel)(Arguments...)) {
  return reinterpret_cast<const void*>(kernel);
}
void note_access(const void* address, size_t bytes, bool write, bool atomic, void* caller);
void note_atomic(const void* address, size_t bytes, void* caller);

template <class T, class F>
__attribute__((no_sanitize("thread"))) T atomic_update(T* address, F f) {
  note_atomic(address, sizeof(T), __builtin_return_address(0));
  const T old = *address;
  *address = f(old);
  return old;
}

}  // namespace cuda_on_cpu

#define threadIdx (cuda_on_cpu::current->thread)
#define blockIdx (cuda_on_cpu::current->block)
#define blockDim (cuda_on_cpu::current->block_dim)
#define gridDim (cuda_on_cpu::current->grid_dim)
#define warpSize 32

CUDA_ON_CPU_INLINE void __syncthreads(CUDA_ON_CPU_CALLER) { cuda_on_cpu::sync_threads(file, line); }
CUDA_ON_CPU_INLINE void __syncwarp(unsigned mask = ~0u, CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::Operands none{};
  cuda_on_cpu::collective(cuda_on_cpu::Collective::kSync, mask, none, file, line);
}
CUDA_ON_CPU_INLINE unsigned __ballot_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  cuda_on_cpu::Operands o{};
  o.word[0] = predicate != 0;
  cuda_on_cpu::collective(cuda_on_cpu::Collective::kBallot, mask, o, file, line);
  return o.word[0];
}
CUDA_ON_CPU_INLINE int __any_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
CUDA_ON_CPU_INLINE int __all_sync(unsigned mask, int predicate, CUDA_ON_CPU_CALLER) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

namespace cuda_on_cpu {
template <class T>
CUDA_ON_CPU_INLINE T shuffle(unsigned mask, T value, int source, const char* file, int line) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>);
  Operands o{};
  std::memcpy(o.word, &value, sizeof(T));
  o.source = source;
  collective(Collective::kShuffle, mask, o, file, line);
  std::memcpy(&value, o.word, sizeof(T));
  return value;
}
inline int lane_or_self(int source, int width) {
  const int lane = current->lane;
  return source >= 0 && source / width == lane / width ? source : lane;
}
}  // namespace cuda_on_cpu

template <class T>
CUDA_ON_CPU_INLINE T __shfl_sync(unsigned mask, T value, int source, int width = 32, CUDA_ON_CPU_CALLER) {
  const int lane = cuda_on_cpu::current->lane;
  return cuda_on_cpu::shuffle(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), file, line);
}
template <class T>
CUDA_ON_CPU_INLINE T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, CUDA_ON_CPU_CALLER) {
  const int source = cuda_on_cpu::lane_or_self(cuda_on_cpu::current->lane ^ bits, width);
  return cuda_on_cpu::shuffle(mask, value, source, file, line);
}
template <class T>
CUDA_ON_CPU_INLINE T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32, CUDA_ON_CPU_CALLER) {
  const int source = cuda_on_cpu::lane_or_self(cuda_on_cpu::current->lane + delta, width);
  return cuda_on_cpu::shuffle(mask, value, source, file, line);
}
template <class T>
CUDA_ON_CPU_INLINE T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32, CUDA_ON_CPU_CALLER) {
  const int source = cuda_on_cpu::lane_or_self(cuda_on_cpu::current->lane - delta, width);
  return cuda_on_cpu::shuffle(mask, value, source, file, line);
}

// All CUDA threads are fibers of one CPU thread: a plain read and write is atomic.
template <class T>
CUDA_ON_CPU_INLINE T atomicAdd(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return static_cast<T>(old + value); });
}
template <class T>
CUDA_ON_CPU_INLINE T atomicMax(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return std::max<T>(old, value); });
}
template <class T>
CUDA_ON_CPU_INLINE T atomicMin(T* address, std::common_type_t<T> value) {
  return cuda_on_cpu::atomic_update(address, [=](T old) { return std::min<T>(old, value); });
}

template <class T>
T __ldg(const T* address) {
  return *address;
}
template <class T>
T __ldcs(const T* address) {
  return *address;
}
template <class T>
void __stcs(T* address, T value) {
  *address = value;
}
inline float __uint_as_float(unsigned x) {
  float y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __float_as_uint(float x) {
  unsigned y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }
// Never contracted to one rounding, as they would be to the compiler's eyes.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm("" : "+x"(product));
  return product;
}
inline float __fadd_rn(float a, float b) {
  float sum = a + b;
  asm("" : "+x"(sum));
  return sum;
}
inline float __fdividef(float a, float b) { return a / b; }
inline float __expf(float x) { return std::exp(x); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
using std::max;
using std::min;

namespace mtfast {

template <class T>
T* shared_memory() {
  return reinterpret_cast<T*>(cuda_on_cpu::shared_memory());
}
namespace ptx {

namespace detail {
CUDA_ON_CPU_INLINE void matrix(cuda_on_cpu::Collective what, uint32_t (&r)[4], const void* row,
                               const char* file, int line) {
  cuda_on_cpu::Operands o{};
  o.address = row;
  cuda_on_cpu::collective(what, ~0u, o, file, line);
  std::memcpy(r, o.word, sizeof r);
}
CUDA_ON_CPU_INLINE void mma(cuda_on_cpu::Collective what, float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                            uint32_t b1, const char* file, int line) {
  cuda_on_cpu::Operands o{};
  std::memcpy(o.word, a, sizeof a);
  o.word[4] = b0;
  o.word[5] = b1;
  std::memcpy(o.accumulator, c, sizeof c);
  cuda_on_cpu::collective(what, ~0u, o, file, line);
  std::memcpy(c, o.accumulator, sizeof c);
}
}  // namespace detail

CUDA_ON_CPU_INLINE void ldmatrix_x4(uint32_t (&r)[4], const void* row, CUDA_ON_CPU_CALLER) {
  detail::matrix(cuda_on_cpu::Collective::kMatrix, r, row, file, line);
}
CUDA_ON_CPU_INLINE void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, CUDA_ON_CPU_CALLER) {
  detail::matrix(cuda_on_cpu::Collective::kMatrixTransposed, r, row, file, line);
}
CUDA_ON_CPU_INLINE void mma_bf16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 CUDA_ON_CPU_CALLER) {
  detail::mma(cuda_on_cpu::Collective::kMmaBf16, c, a, b0, b1, file, line);
}
CUDA_ON_CPU_INLINE void mma_fp16(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                 CUDA_ON_CPU_CALLER) {
  detail::mma(cuda_on_cpu::Collective::kMmaFp16, c, a, b0, b1, file, line);
}
// Not inlined: the return address is the kernel's line in a race report.
__attribute__((noinline)) inline void cp_async_16(void* shared, const void* global, int bytes = 16) {
  cuda_on_cpu::copy_async(shared, global, bytes, __builtin_return_address(0));
}
inline void store_16(void* global, const uint32_t (&words)[4]) {
  cuda_on_cpu::refuse_shared(global, "st.global: the address");
  *static_cast<uint4*>(global) = uint4{words[0], words[1], words[2], words[3]};
}
inline void cp_async_commit() { cuda_on_cpu::copy_async_commit(); }
template <int kPending>
void cp_async_wait() {
  cuda_on_cpu::copy_async_wait(kPending);
}
inline void let_next_begin() {}
inline void wait_for_previous() {}
inline float exp2_approx(float x) { return x < -126.0f ? 0.0f : std::exp2(x); }

}  // namespace ptx
}  // namespace mtfast

// Parameters are not read from global memory: their copies are not to be seen as loads.
#define MTFAST_LAUNCH_BESIDE(beside, ...) MTFAST_LAUNCH(__VA_ARGS__)
#define MTFAST_LAUNCH(grid, block, shared_bytes, stream, kernel, ...)                          \
  cuda_on_cpu::launch(grid, block, shared_bytes, {cuda_on_cpu::address_of((kernel)), #kernel}, \
                      [&]() __attribute__((no_sanitize("thread"))) { (kernel)(__VA_ARGS__); })
