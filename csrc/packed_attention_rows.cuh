// What a warp does that has one row of attention: it goes through the rows of the sequence, adds up products
// with them or the rows themselves, and knows which weights dropout keeps.
#pragma once
#include "packed_attention.cuh"

namespace mtfast::attention {

constexpr int kWarps = 4, kThreads = 32 * kWarps, kChunk = 32;

// The last sequence that begins at `token` or before it; any one if cu_seqlens is wrong.
__device__ __forceinline__ int sequence_of(const AttentionShape& shape, int token) {
  int low = 0, high = static_cast<int>(shape.sequences);
  while (high - low > 1) {
    const int step = (high - low + 31) / 32, at = low + lane_index() * step;
    const unsigned before = __ballot_sync(kAllLanes, at < high && shape.cu_seqlens[at] <= token);
    low += (31 - __clz(static_cast<int>(before | 1u))) * step;
    high = min(low + step, high);
  }
  return low;
}

// A warp's row, and how it goes through the rows of its sequence.
template <class T, int kDim, bool kCls>
struct Warp {
  // A lane has 16 bytes of a row, or 32 where a warp would not reach its end.
  static constexpr int kSize = Vector<T>::kSize, kVectors = kDim > 32 * kSize ? 2 : 1;
  static constexpr int kEach = kVectors * kSize, kLanes = kDim / kEach, kGroups = 32 / kLanes;
  static constexpr int kQuarter = kLanes / 4;
  using Numbers = float[kEach];
  struct Piece {
    Vector<T> vectors[kVectors];
  };

  int head, row;             // of q; for all rows the token
  int begin, length, place;  // of the sequence, and this row's place in it
  bool any;                  // is there anything to do?
  int group, column;         // this lane's group of lanes, and its first column of a row
  int own;                   // of a chunk's rows the one whose product this lane gets

  __device__ __forceinline__ Warp(const AttentionShape& shape) {
    const int task = static_cast<int>(blockIdx.x) * kWarps + warp_index();
    const int heads = static_cast<int>(shape.heads), total = static_cast<int>(shape.total);
    head = kCls ? task % heads : task / total;
    row = kCls ? task / heads : task % total;
    any = kCls ? row < shape.sequences : head < heads;
    begin = length = place = 0;
    if (any) {
      const Sequence sequence(shape, kCls ? row : sequence_of(shape, row));
      begin = sequence.begin;
      length = sequence.length;
      if constexpr (!kCls) {
        place = row - begin;
        any = place >= 0 && place < length;
      }
    }
    group = lane_index() / kLanes;
    const int lane = lane_index() % kLanes;
    column = lane * kEach;
    own = (4 * (lane % kQuarter) + lane / kQuarter) * kGroups + group;
  }

  __device__ __forceinline__ int64_t number(const AttentionShape& shape) const {
    return head * (kCls ? shape.sequences : shape.total) + row;
  }
  __device__ __forceinline__ static Piece piece(const T* from) {
    Piece piece;
    MTFAST_UNROLL
    for (int i = 0; i < kVectors; ++i) piece.vectors[i] = load(from + i * kSize);
    return piece;
  }
  __device__ __forceinline__ static void widen(Numbers& to, const Piece& from) {
    MTFAST_UNROLL
    for (int i = 0; i < kEach; ++i) to[i] = to_float(from.vectors[i / kSize].x[i % kSize]);
  }
  __device__ __forceinline__ void read(Numbers& to, const AttentionTensor& x) const {
    widen(to, piece(head_of<const T>(x, head) + row * x.row_stride + column));
  }
  __device__ __forceinline__ void write(const AttentionTensor& x, int64_t to, const Numbers& from,
                                        float factor) const {
    T* at = head_of<T>(x, head) + to * x.row_stride + column;
    MTFAST_UNROLL
    for (int n = 0; n < kVectors; ++n) {
      float scaled[kSize];
      MTFAST_UNROLL
      for (int i = 0; i < kSize; ++i) scaled[i] = from[n * kSize + i] * factor;
      store(at + n * kSize, round_to<T>(scaled));
    }
  }
  // What the groups of lanes have together, to this warp's row.
  __device__ __forceinline__ void write_sum(const AttentionTensor& x, Numbers& from, float factor) const {
    MTFAST_UNROLL
    for (int i = 0; i < kEach; ++i) {
      MTFAST_UNROLL
      for (int step = kLanes; step < 32; step *= 2) {
        from[i] += __shfl_xor_sync(kAllLanes, from[i], step);
      }
    }
    if (group == 0) write(x, row, from, factor);
  }

  // This lane's part of a product.
  __device__ __forceinline__ static float partial(const Numbers& a, const Numbers& b) {
    float sum = 0.0f;
    MTFAST_UNROLL
    for (int i = 0; i < kEach; ++i) sum += a[i] * b[i];
    return sum;
  }

  // Calls use(step, rows) for four steps at a time of each tensor's rows [from, from + count) of the
  // sequence; in a step each group of lanes has a row, those beyond the last that one again.
  template <int kTensors, class Use>
  __device__ __forceinline__ void go_through(const AttentionTensor (&x)[kTensors], int from, int count,
                                             Use use) const {
    for (int step = 0; step * kGroups < count; step += 4) {
      Piece rows[kTensors][4];
      MTFAST_UNROLL
      for (int n = 0; n < kTensors; ++n) {
        const T* at = head_of<const T>(x[n], head) + column;
        MTFAST_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int row = begin + from + min((step + i) * kGroups + group, count - 1);
          rows[n][i] = piece(at + row * x[n].row_stride);
        }
      }
      use(step, rows);
    }
  }

  // The products of a[n] and row `own` of the chunk of x[n]. Added up in the order of warp_sum.
  template <int kTensors>
  __device__ __forceinline__ void products(float (&mine)[kTensors], const Numbers (&a)[kTensors],
                                           const AttentionTensor (&x)[kTensors], int from, int count) const {
    go_through(x, from, count, [&](int step, const Piece(&rows)[kTensors][4]) {
      MTFAST_UNROLL
      for (int n = 0; n < kTensors; ++n) {
        float sums[4];
        MTFAST_UNROLL
        for (int i = 0; i < 4; ++i) {
          Numbers numbers;
          widen(numbers, rows[n][i]);
          sums[i] = partial(a[n], numbers);
        }
        const float sum = one_of(sums);
        mine[n] = lane_index() % kQuarter == step / 4 ? sum : mine[n];
      }
    });
  }

  // The sum over the group's lanes of number lane / kQuarter: each lane keeps two of the four, then one.
  __device__ __forceinline__ static float one_of(const float (&x)[4]) {
    const bool upper = lane_index() & kLanes / 2, odd = lane_index() & kLanes / 4;
    float kept[2];
    MTFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      kept[i] = (upper ? x[2 + i] : x[i]) + __shfl_xor_sync(kAllLanes, upper ? x[i] : x[2 + i], kLanes / 2);
    }
    const float sum =
        (odd ? kept[1] : kept[0]) + __shfl_xor_sync(kAllLanes, odd ? kept[0] : kept[1], kLanes / 4);
    return warp_sum<kQuarter>(sum);
  }

  // Lane `own`'s number for the row that this lane's group has in this step.
  __device__ __forceinline__ static float handed(float x, int step) {
    return __shfl_sync(kAllLanes, x, step % 4 * kQuarter + step / 4, kLanes);
  }

  // to[n] = to[n] * shrink + sum of the chunk's rows of x[n] by their weights: this group's share.
  template <int kTensors>
  __device__ __forceinline__ void add(Numbers (&to)[kTensors], float shrink, const float (&weights)[kTensors],
                                      const AttentionTensor (&x)[kTensors], int from, int count) const {
    Numbers part[kTensors] = {};
    go_through(x, from, count, [&](int step, const Piece(&rows)[kTensors][4]) {
      MTFAST_UNROLL
      for (int n = 0; n < kTensors; ++n) {
        MTFAST_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float weight = handed(weights[n], step + i);
          Numbers numbers;
          widen(numbers, rows[n][i]);
          MTFAST_UNROLL
          for (int e = 0; e < kEach; ++e) part[n][e] += weight * numbers[e];
        }
      }
    });
    MTFAST_UNROLL
    for (int n = 0; n < kTensors; ++n) {
      MTFAST_UNROLL
      for (int e = 0; e < kEach; ++e) to[n][e] = to[n][e] * shrink + part[n][e];
    }
  }
};

// What dropout keeps of a row's 128 keys, or of a column's 64 queries, from one call in each lane.
template <bool kColumn>
class Kept {
 public:
  const Dropout dropout;

  template <class Warp>
  __device__ __forceinline__ Kept(const AttentionShape& shape, const Warp& w)
      : dropout(shape, w.head), begin_(w.begin), place_(w.place) {}

  // The factor of number `own` of the chunk from `from` on.
  __device__ __forceinline__ float factor(int from, int own) {
    if (!dropout.any()) return 1.0f;
    if (from / kSpan != span_) {
      span_ = from / kSpan;
      bits_ = kColumn ? of_column(span_ * kSpan) : of_row(span_ * kSpan);
    }
    const uint32_t chunk = __shfl_sync(kAllLanes, bits_, from % kSpan * 32 / kSpan);
    return chunk >> own & 1u ? dropout.scale : 0.0f;
  }

 private:
  static constexpr int kSpan = kColumn ? 64 : 128;

  // The bits of keys from + 32 * i on in lanes from 8 * i on.
  __device__ __forceinline__ uint32_t of_row(int from) const {
    const int lane = lane_index(), t = lane % 4, lower = place_ % 16 / 8;
    const Philox4 draws = dropout.draws(begin_ + place_ / 16 * 16 + place_ % 8, from + lane / 4 * 16, t);
    uint32_t bits = 0;
    MTFAST_UNROLL
    for (int i = 0; i < 4; ++i) {
      const bool keep = dropout.keeps(draws.at(i / 2 * 2 + lower), i % 2);
      bits |= uint32_t{keep} << (i / 2 * 8 + i % 2);
    }
    return together<8>(bits << (2 * t + lane / 4 % 2 * 16));
  }
  // The bits of queries from + 32 * i on in lanes from 16 * i on.
  __device__ __forceinline__ uint32_t of_column(int from) const {
    const int lane = lane_index(), row = from + lane / 8 * 16 + lane % 8, right = place_ % 16 / 8;
    const Philox4 draws = dropout.draws(begin_ + row, place_ / 16 * 16, place_ % 8 / 2);
    const bool upper = dropout.keeps(draws.at(2 * right), place_ % 2);
    const bool lower = dropout.keeps(draws.at(2 * right + 1), place_ % 2);
    return together<16>((uint32_t{upper} | uint32_t{lower} << 8) << (lane % 8 + lane / 8 % 2 * 16));
  }
  template <int kLanes>
  __device__ __forceinline__ static uint32_t together(uint32_t bits) {
    MTFAST_UNROLL
    for (int step = kLanes / 2; step > 0; step /= 2) bits |= __shfl_xor_sync(kAllLanes, bits, step);
    return bits;
  }

  int begin_, place_, span_ = -1;
  uint32_t bits_ = 0;
};

}  // namespace mtfast::attention
