// Thirty-two stored elements at a time, in two vectors: of bfloat16 the even and the odd ones, which a shift
// and a mask tell apart. What is kept in the type of the arithmetic is in the same order.
#pragma once
#include <type_traits>
#include <vector>

#include "simd_isa.h"

namespace mtfast::simd {

constexpr int64_t kStep = 2 * kLanes;

inline int64_t padded(int64_t columns) { return (columns + kStep - 1) / kStep * kStep; }

template <class T>
using Scalar = typename Compute<T>::scalar;

template <class T>
using Vec = typename Compute<T>::vec;

template <class T>
MTFAST_INLINE void unpack_two(Vec<T> (&to)[2], const T* p) {
  if constexpr (std::is_same_v<T, bf16>) {
    u32x16 both;
    std::memcpy(&both, p, sizeof both);
    to[0] = reinterpret_cast<f32x16>(both << 16);
    to[1] = reinterpret_cast<f32x16>(both & 0xffff0000u);
  } else {
    to[0] = unpack(p);
    to[1] = unpack(p + kLanes);
  }
}

// To nearest, ties to even, in the upper half. A NaN must have nothing in the lower one, which holds where it
// comes from arithmetic on 16 bits alone.
MTFAST_INLINE u32x16 rounded(f32x16 x) {
  const u32x16 w = reinterpret_cast<u32x16>(x);
  return w + 0x7fffu + (w >> 16 & 1u);
}

template <Isa isa, class T>
MTFAST_INLINE void pack_two(T* p, const Vec<T> (&from)[2]) {
  if constexpr (std::is_same_v<T, bf16> && isa == Isa::kAvx512Bf16) {
    const u16x32 halves = to_bf16(from[0], from[1]);
    u16x32 order;
#pragma GCC unroll 32
    for (int i = 0; i < 2 * kLanes; ++i) order[i] = i / 2 + i % 2 * kLanes;
    const u16x32 both = __builtin_shuffle(halves, order);
    std::memcpy(p, &both, sizeof both);
  } else if constexpr (std::is_same_v<T, bf16>) {
    const u32x16 both = rounded(from[0]) >> 16 | (rounded(from[1]) & 0xffff0000u);
    std::memcpy(p, &both, sizeof both);
  } else {
    pack(p, from[0]);
    pack(p + kLanes, from[1]);
  }
}

// The same at the end of a row, as load and store of simd.h.
template <class T>
MTFAST_INLINE void load_two(Vec<T> (&to)[2], const T* p, int64_t count) {
  if (count >= kStep) return unpack_two(to, p);
  T tail[kStep] = {};
  std::memcpy(tail, p, static_cast<size_t>(count) * sizeof(T));
  unpack_two(to, tail);
}

template <Isa isa, class T>
MTFAST_INLINE void store_two(T* p, const Vec<T> (&from)[2], int64_t count) {
  if (count >= kStep) return pack_two<isa>(p, from);
  T tail[kStep];
  pack_two<isa>(tail, from);
  std::memcpy(p, tail, static_cast<size_t>(count) * sizeof(T));
}

// A vector in the type of the arithmetic and the order of steps, with zeros up to a whole number of them;
// zeros alone of null.
template <class T>
std::vector<Scalar<T>> widened(const void* vector, int64_t columns) {
  std::vector<Scalar<T>> to(padded(columns));
  for (int64_t i = 0; vector != nullptr && i < columns; i += kStep) {
    Vec<T> x[2];
    load_two(x, static_cast<const T*>(vector) + i, columns - i);
    pack(to.data() + i, x[0]);
    pack(to.data() + i + kLanes, x[1]);
  }
  return to;
}

}  // namespace mtfast::simd
