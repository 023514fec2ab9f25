// Sixteen bytes of elements, which is what a thread moves at a time.
#pragma once
#include "element.cuh"

namespace mtfast {

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T x[kSize];
};

inline bool on_16_bytes(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <class T>
__device__ __forceinline__ Vector<T> load(const T* from) {
  const uint4 bits = *reinterpret_cast<const uint4*>(from);
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof vector);
  return vector;
}

template <class T>
__device__ __forceinline__ void store(T* to, const Vector<T>& vector) {
  uint32_t words[4];
  memcpy(words, &vector, sizeof words);
  ptx::store_16(to, words);
}

// Of what nobody reads again soon: it is not to drive anything else out of the caches.
template <class T>
__device__ __forceinline__ Vector<T> load_streaming(const T* from) {
  const uint4 bits = __ldcs(reinterpret_cast<const uint4*>(from));
  Vector<T> vector;
  memcpy(&vector, &bits, sizeof vector);
  return vector;
}

template <class T>
__device__ __forceinline__ void store_streaming(T* to, const Vector<T>& vector) {
  uint4 bits;
  memcpy(&bits, &vector, sizeof bits);
  __stcs(reinterpret_cast<uint4*>(to), bits);
}

template <class T>
__device__ __forceinline__ void to_float(float (&to)[Vector<T>::kSize], const Vector<T>& from) {
  MTFAST_UNROLL
  for (int i = 0; i < Vector<T>::kSize; ++i) to[i] = to_float(from.x[i]);
}

template <class T>
__device__ __forceinline__ Vector<T> round_to(const float (&from)[Vector<T>::kSize]) {
  uint32_t words[4];
  MTFAST_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (sizeof(T) == 2)
      words[i] = pair_bits<T>(from[2 * i], from[2 * i + 1]);
    else
      words[i] = __float_as_uint(from[i]);
  }
  Vector<T> vector;
  memcpy(&vector, words, sizeof vector);
  return vector;
}

}  // namespace mtfast
