// Eight neighbouring elements of a row, which a thread has at a time: one vector in 16 bits, two in 32.
#pragma once
#include "vector.cuh"

namespace mtfast {

template <class T>
struct Eight {
  static constexpr int kSize = Vector<T>::kSize;
  Vector<T> parts[8 / kSize];
};

// Columns column .. column + 7 of a row that has `size`; those beyond read 0. Whole rows start on 16 bytes
// when `aligned`, and then so do eight columns.
template <class T>
__device__ __forceinline__ Eight<T> load8(const T* row, int64_t column, int64_t size, bool aligned) {
  constexpr int kSize = Eight<T>::kSize;
  Eight<T> eight;
  MTFAST_UNROLL
  for (int i = 0; i < 8; i += kSize) {
    Vector<T>& part = eight.parts[i / kSize];
    if (aligned) {
      uint4 bits = make_uint4(0, 0, 0, 0);  // not element by element, which would stay 16-bit pieces
      if (column < size) bits = *reinterpret_cast<const uint4*>(row + column + i);
      memcpy(&part, &bits, sizeof bits);
    } else {
      MTFAST_UNROLL
      for (int e = 0; e < kSize; ++e) {
        round_to(part.x[e], 0.0f);
        if (column + i + e < size) part.x[e] = row[column + i + e];
      }
    }
  }
  return eight;
}

template <class T>
__device__ __forceinline__ void unpack(float (&to)[8], const Eight<T>& from) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // in one instruction each, where the compiler takes two
    uint32_t words[4];
    memcpy(words, &from, sizeof words);
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      to[i] = __uint_as_float(i % 2 == 0 ? words[i / 2] << 16 : words[i / 2] & 0xffff0000u);
    }
  } else {
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i) {
      to[i] = to_float(from.parts[i / Eight<T>::kSize].x[i % Eight<T>::kSize]);
    }
  }
}

template <class T>
__device__ __forceinline__ void store8(T* row, int64_t column, int64_t size, bool aligned,
                                       const float (&in)[8]) {
  constexpr int kSize = Eight<T>::kSize;
  MTFAST_UNROLL
  for (int i = 0; i < 8; i += kSize) {
    if (aligned) {
      float part[kSize];
      memcpy(part, in + i, sizeof part);
      if (column < size) store(row + column + i, round_to<T>(part));
    } else {
      MTFAST_UNROLL
      for (int e = 0; e < kSize; ++e) {
        if (column + i + e < size) round_to(row[column + i + e], in[i + e]);
      }
    }
  }
}

}  // namespace mtfast
