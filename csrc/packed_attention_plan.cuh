// Which tokens a block of packed attention works on.
//
// Every sequence is laid out in the tile from a multiple of 16 rows on, so a strip of 16 query rows belongs
// to one sequence, short sequences fill tiles to 16 rows, and no result depends on what a sequence is packed
// with. A block owns the pieces that begin in its window of tokens: whole sequences of at most kPiece tokens,
// as many at once as the tile holds, or kPiece rows of a longer one, alone.
#pragma once
#include "device/reduce.cuh"
#include "device/runtime.cuh"

namespace mtfast::attention {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
// Tokens of a block's window: fewer than a piece has, so that of each sequence at most one begins in it.
template <int kPiece>
constexpr int kWindow = kPiece / 4 * 3;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
// Of a value that is the same in all lanes, so that the compiler knows it too.
template <class T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(kAllLanes, x, 0);
}
__device__ __forceinline__ int warp_index() { return uniform(static_cast<int>(threadIdx.x) >> 5); }

struct Strip {
  int begin;   // of its sequence, in the batch
  int length;  // of its sequence
  int offset;  // of its first row in the sequence
  int first;   // tile row where the keys of its sequence begin, when all of them are in the tile
};

constexpr int kMaxStrips = 6;

struct Plan {
  int strips;
  int is_long;  // one piece of a sequence of more tokens than that
  int next;     // sequence to go on with
  Strip strip[kMaxStrips];
};

// Smallest s in [0, sequences] with cu[s] >= x; the whole warp searches.
__device__ inline int lower_bound(const int32_t* cu, int sequences, int x) {
  int low = 0, high = sequences;
  while (low < high) {
    const int step = (high - low + 31) / 32;
    const int probe = low + lane_index() * step;
    const bool before = probe < high && cu[probe] < x;
    const int count = __popc(__ballot_sync(kAllLanes, before));
    if (count == 0) return low;
    const int top = low + count * step;
    low += (count - 1) * step + 1;
    high = top < high ? top : high;
  }
  return low;
}

// The next group of the window, by one warp. kTileRows bounds a group of short sequences. Lengths and places
// that cannot be (wrong cu_seqlens) are passed over, as are long sequences where the caller promised there
// are none.
template <int kPiece, int kTileRows, bool kShortOnly>
__device__ inline void make_plan(Plan& plan, const int32_t* cu, int sequences, int total, int window_begin,
                                 int sequence) {
  const int lane = lane_index(), window_end = window_begin + kWindow<kPiece>;
  int strips = 0, is_long = 0;
  while (strips == 0) {
    const int s = sequence + lane;
    int begin = 0, length = 0, offset = 0, rows = 0;
    bool past = s >= sequences;
    if (!past) {
      begin = cu[s];
      const int end = cu[s + 1];
      past = begin >= window_end;
      if (begin >= 0 && end <= total && end > begin && !past) {
        length = end - begin;
        if (begin < window_begin)  // its piece that begins in the window, if one does
          offset = (window_begin - begin + kPiece - 1) / kPiece * kPiece;
        const bool mine = begin + offset < window_end && offset < length;
        const bool allowed = length <= kPiece ? offset == 0 : !kShortOnly;
        if (mine && allowed) rows = (min(length - offset, kPiece) + 15) / 16 * 16;
      }
    }
    const unsigned some = __ballot_sync(kAllLanes, rows > 0);
    const unsigned done = __ballot_sync(kAllLanes, past);
    if (some == 0) {
      if (done != 0) break;
      sequence += 32;
      continue;
    }
    const int lead = __ffs(static_cast<int>(some)) - 1;
    const bool piece = rows > 0 && length > kPiece;
    const unsigned pieces = __ballot_sync(kAllLanes, piece);
    const int upto = warp_inclusive_sum(rows);
    const unsigned stops = pieces | __ballot_sync(kAllLanes, upto > kTileRows);
    int stop;
    if (pieces >> lead & 1) {
      stop = lead + 1;
      is_long = 1;
    } else {
      stop = stops ? __ffs(static_cast<int>(stops)) - 1 : 32;
    }
    const bool taken = lane >= lead && lane < stop && rows > 0;
    const int first = upto - rows;  // rows before lead are 0
    if (taken)
      for (int i = 0; i < rows / 16; ++i)
        plan.strip[first / 16 + i] = Strip{begin, length, offset + 16 * i, is_long ? 0 : first};
    strips = __shfl_sync(kAllLanes, upto, stop - 1) / 16;
    sequence += stop;
  }
  if (lane == 0) {
    plan.strips = strips;
    plan.is_long = is_long;
    plan.next = sequence;
  }
}

}  // namespace mtfast::attention
