// What the forward and the backward kernels of packed attention share: which tokens a block works on, tiles
// in shared memory, the products of 16 by 16 pieces, and dropout.
//
// Every sequence is laid out in the tile from a multiple of 16 rows on, so a strip of 16 query rows belongs
// to one sequence, short sequences fill tiles to 16 rows, and no result depends on what a sequence is packed
// with. A block owns the pieces that begin in its window of kWindow tokens: whole sequences of at most 64
// tokens, as many at once as the tile holds, or 64 rows of a longer one, alone.
#pragma once
#include "device/ptx.cuh"
#include "device/reduce.cuh"
#include "packed_attention.h"

// A loop that unrolled whole would hold more than the registers can.
#if defined(__CUDACC__)
#define MTFAST_UNROLL_2 _Pragma("unroll 2")
#define MTFAST_NO_UNROLL _Pragma("unroll 1")
#else
#define MTFAST_UNROLL_2
#define MTFAST_NO_UNROLL
#endif

namespace mtfast::attention {

constexpr int kWarps = 4;
constexpr int kThreads = 32 * kWarps;
constexpr int kWindow = 48;
constexpr int kPiece = 64;  // rows of a long sequence, and keys at a time
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr float kLog2E = 1.4426950408889634f, kLn2 = 0.6931471805599453f;
constexpr float kMinusInfinity = -1e30f;  // finite, so that differences are numbers

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) & 31; }
// Of a value that is the same in all lanes, so that the compiler knows it too.
template <class T>
__device__ __forceinline__ T uniform(T x) {
  return __shfl_sync(kAllLanes, x, 0);
}
__device__ __forceinline__ int warp_index() { return uniform(static_cast<int>(threadIdx.x) >> 5); }

// ---- what a block works on
// -------------------------------------------------------------------------------------

struct Strip {
  int begin;   // of its sequence, in the batch
  int length;  // of its sequence
  int offset;  // of its first row in the sequence
  int first;   // tile row where the keys of its sequence begin, when all of them are in the tile
};

constexpr int kMaxStrips = 6;

struct Plan {
  int strips;
  int is_long;  // one piece of a sequence of more than kPiece tokens
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
template <int kTileRows, bool kShortOnly>
__device__ inline void make_plan(Plan& plan, const int32_t* cu, int sequences, int total, int window_begin,
                                 int sequence) {
  const int lane = lane_index(), window_end = window_begin + kWindow;
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

// ---- tiles
// -----------------------------------------------------------------------------------------------------

// Rows of kDim elements in shared memory; 16-byte chunks of 16-bit tiles are swizzled so that ldmatrix meets
// no bank conflict, float rows are padded.
template <class T, int kDim>
struct Tile {
  static constexpr bool kWide = sizeof(T) == 4;
  static constexpr int kPerChunk = 16 / sizeof(T), kChunks = kDim / kPerChunk;
  static constexpr int kRow = kWide ? kDim + 4 : kDim;
  static constexpr int kMaxRows = kWide ? 64 : 96;
  static constexpr int kElements = kMaxRows * kRow;

  T* data;

  __device__ __forceinline__ T* chunk(int row, int c) const {
    const int swizzled = kWide ? c : c ^ (kChunks >= 8 ? row & 7 : (row >> 1) & 3);
    return data + row * kRow + swizzled * kPerChunk;
  }
  __device__ __forceinline__ T* at(int row, int column) const {
    if constexpr (kWide) return data + row * kRow + column;
    return chunk(row, column / kPerChunk) + column % kPerChunk;
  }
};

template <class T>
__device__ __forceinline__ T* head_of(const AttentionTensor& x, int head) {
  return static_cast<T*>(x.data) + head * x.head_stride;
}

// The strips' rows, in the background; rows past a sequence's end become 0.
template <class T, int kDim>
__device__ inline void load_strips(const Tile<T, kDim>& tile, const T* x, int64_t row_stride,
                                   const Plan& plan) {
  constexpr int kChunks = Tile<T, kDim>::kChunks;
  for (int i = threadIdx.x; i < plan.strips * 16 * kChunks; i += kThreads) {
    const int row = i / kChunks, c = i % kChunks;
    const Strip& strip = plan.strip[row / 16];
    const int place = strip.offset + row % 16;
    const bool inside = place < strip.length;
    const T* from = inside ? x + (strip.begin + place) * row_stride + c * Tile<T, kDim>::kPerChunk : x;
    ptx::cp_async_16(tile.chunk(row, c), from, inside ? 16 : 0);
  }
}

// kPiece rows of one sequence, from `offset` on.
template <class T, int kDim>
__device__ inline void load_piece(const Tile<T, kDim>& tile, const T* x, int64_t row_stride, const Strip& of,
                                  int offset) {
  constexpr int kChunks = Tile<T, kDim>::kChunks;
  for (int i = threadIdx.x; i < kPiece * kChunks; i += kThreads) {
    const int row = i / kChunks, c = i % kChunks;
    const bool inside = offset + row < of.length;
    const T* from = inside ? x + (of.begin + offset + row) * row_stride + c * Tile<T, kDim>::kPerChunk : x;
    ptx::cp_async_16(tile.chunk(row, c), from, inside ? 16 : 0);
  }
}

__device__ __forceinline__ void wait_for_loads() {
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
}

// ---- products
// --------------------------------------------------------------------------------------------------
//
// A 16 by 16 piece is spread over a warp as mma's accumulators are: lane = 4 * g + t holds x[n][j] at row
// g + 8 * (j / 2), column 8 * n + 2 * t + j % 2.

using Piece16 = float[2][4];

template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high);
template <>
__device__ __forceinline__ uint32_t pack<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}
template <>
__device__ __forceinline__ uint32_t pack<__half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, 4);
  return bits;
}

__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1,
                                    __nv_bfloat16) {
  ptx::mma_bf16(c, a, b0, b1);
}
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, __half) {
  ptx::mma_fp16(c, a, b0, b1);
}

// Two neighbouring elements as floats.
__device__ __forceinline__ float2 pair_of(const __nv_bfloat16* p) {
  return {__bfloat162float(p[0]), __bfloat162float(p[1])};
}
__device__ __forceinline__ float2 pair_of(const __half* p) {
  return {__half2float(p[0]), __half2float(p[1])};
}
__device__ __forceinline__ float2 pair_of(const float* p) { return {p[0], p[1]}; }

// 16 rows of a tile as the left factor of x = a b^T. Kept in registers where they allow it.
template <class T, int kDim>
struct Rows16 {
  static constexpr bool kKept = kDim <= 64;
  const Tile<T, kDim>& tile;
  int row;
  uint32_t a[kKept ? kDim / 16 : 1][4];

  __device__ __forceinline__ Rows16(const Tile<T, kDim>& tile, int row) : tile(tile), row(row) {
    if constexpr (kKept) {
      MTFAST_UNROLL
      for (int k = 0; k < kDim / 16; ++k) read(a[k], k);
    }
  }
  __device__ __forceinline__ void read(uint32_t (&to)[4], int k) const {
    const int lane = lane_index();
    ptx::ldmatrix_x4(to, tile.chunk(row + (lane & 15), 2 * k + (lane >> 4)));
  }
  // x = these rows times 16 rows of `other`, transposed
  __device__ __forceinline__ void times(Piece16& x, const Tile<T, kDim>& other, int other_row) {
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] = 0.0f;
    if constexpr (kKept) {
      MTFAST_UNROLL
      for (int k = 0; k < kDim / 16; ++k) step(x, a[k], other, other_row, k);
    } else {
      MTFAST_UNROLL_2
      for (int k = 0; k < kDim / 16; ++k) {
        read(a[0], k);
        step(x, a[0], other, other_row, k);
      }
    }
  }
  __device__ __forceinline__ static void step(Piece16& x, const uint32_t (&a)[4], const Tile<T, kDim>& other,
                                              int other_row, int k) {
    const int lane = lane_index();
    uint32_t b[4];
    ptx::ldmatrix_x4(b, other.chunk(other_row + (lane & 7) + (lane >> 4) * 8, 2 * k + ((lane >> 3) & 1)));
    mma(x[0], a, b[0], b[1], T{});
    mma(x[1], a, b[2], b[3], T{});
  }
};

template <int kDim>
struct Rows16<float, kDim> {
  const Tile<float, kDim>& tile;
  int row;
  __device__ __forceinline__ Rows16(const Tile<float, kDim>& tile, int row) : tile(tile), row(row) {}
  __device__ __forceinline__ void times(Piece16& x, const Tile<float, kDim>& other, int other_row) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] = 0.0f;
    MTFAST_NO_UNROLL
    for (int d = 0; d < kDim; ++d) {
      const float a[2] = {*tile.at(row + g, d), *tile.at(row + g + 8, d)};
      MTFAST_UNROLL
      for (int n = 0; n < 2; ++n) MTFAST_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float b = *other.at(other_row + 8 * n + 2 * t + e, d);
        x[n][e] += a[0] * b;
        x[n][2 + e] += a[1] * b;
      }
    }
  }
};

// A strip of results: rows as in Piece16, column 8 * n + 2 * t + j % 2.
template <int kDim>
struct Result16 {
  float x[kDim / 8][4];
  __device__ __forceinline__ Result16() { scale(0.0f, 0.0f, true); }
  __device__ __forceinline__ void scale(float upper, float lower, bool clear = false) {
    MTFAST_UNROLL
    for (int n = 0; n < kDim / 8; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) x[n][j] = clear ? 0.0f : x[n][j] * (j < 2 ? upper : lower);
  }
};

constexpr int kScratchPerWarp = 16 * 17;  // floats, for the float kernels

// result += p times 16 rows of b
template <class T, int kDim>
__device__ __forceinline__ void add_product(Result16<kDim>& result, const Piece16& p, const Tile<T, kDim>& b,
                                            int b_row, float* scratch) {
  const int lane = lane_index();
  if constexpr (sizeof(T) == 2) {
    const uint32_t a[4] = {pack<T>(p[0][0], p[0][1]), pack<T>(p[0][2], p[0][3]), pack<T>(p[1][0], p[1][1]),
                           pack<T>(p[1][2], p[1][3])};
    MTFAST_UNROLL
    for (int n = 0; n < kDim / 8; n += 2) {
      uint32_t bits[4];
      ptx::ldmatrix_x4_trans(bits, b.chunk(b_row + (lane & 15), n + (lane >> 4)));
      mma(result.x[n], a, bits[0], bits[1], T{});
      mma(result.x[n + 1], a, bits[2], bits[3], T{});
    }
  } else {
    const int g = lane >> 2, t = lane & 3;
    __syncwarp();
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int j = 0; j < 4; ++j) scratch[(g + 8 * (j >> 1)) * 17 + 8 * n + 2 * t + (j & 1)] = p[n][j];
    __syncwarp();
    MTFAST_NO_UNROLL
    for (int k = 0; k < 16; ++k) {
      const float upper = scratch[g * 17 + k], lower = scratch[(g + 8) * 17 + k];
      MTFAST_UNROLL
      for (int n = 0; n < kDim / 8; ++n) MTFAST_UNROLL
      for (int e = 0; e < 2; ++e) {
        const float value = *b.at(b_row + k, 8 * n + 2 * t + e);
        result.x[n][e] += upper * value;
        result.x[n][2 + e] += lower * value;
      }
    }
  }
}

// Lane t of each quad gives v[i] to lane i and gets, as v[j], what lane j held for it.
__device__ __forceinline__ void quad_transpose(uint32_t (&v)[4]) {
  const int t = lane_index() & 3;
  MTFAST_UNROLL
  for (int i = 0; i < 4; i += 2) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, t & 1 ? v[i] : v[i + 1], 1);
    (t & 1 ? v[i] : v[i + 1]) = other;
  }
  MTFAST_UNROLL
  for (int i = 0; i < 2; ++i) {
    const uint32_t other = __shfl_xor_sync(kAllLanes, t & 2 ? v[i] : v[i + 2], 2);
    (t & 2 ? v[i] : v[i + 2]) = other;
  }
}

// Rows of the strip that exist, times a factor each for rows g and g + 8, 16 bytes at a time.
template <class T, int kDim>
__device__ inline void store_strip(const AttentionTensor& to, int head, const Strip& strip,
                                   const Result16<kDim>& result, float upper, float lower) {
  const int g = lane_index() >> 2, t = lane_index() & 3;
  T* base = head_of<T>(to, head);
  MTFAST_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int place = strip.offset + g + 8 * r;
    const bool inside = place < strip.length;
    T* row = base + (strip.begin + (inside ? place : 0)) * to.row_stride;
    const float factor = r ? lower : upper;
    if constexpr (sizeof(T) == 2) {
      MTFAST_UNROLL
      for (int n = 0; n < kDim / 8; n += 4) {
        uint32_t v[4];
        MTFAST_UNROLL
        for (int i = 0; i < 4; ++i)
          v[i] = pack<T>(result.x[n + i][2 * r] * factor, result.x[n + i][2 * r + 1] * factor);
        quad_transpose(v);
        if (inside) *reinterpret_cast<uint4*>(row + 8 * (n + t)) = uint4{v[0], v[1], v[2], v[3]};
      }
    } else {
      MTFAST_UNROLL
      for (int n = 0; n < kDim / 8; ++n)
        if (inside)
          *reinterpret_cast<float2*>(row + 8 * n + 2 * t) =
              float2{result.x[n][2 * r] * factor, result.x[n][2 * r + 1] * factor};
    }
  }
}

// ---- dropout
// ---------------------------------------------------------------------------------------------------

struct Dropout {
  uint32_t threshold;
  uint64_t seed;
  uint32_t head;
  float scale;

  __device__ __forceinline__ Dropout(const AttentionShape& shape, int head)
      : threshold(shape.threshold),
        seed(shape.seed),
        head(head),
        scale(65536.0f / (65536.0f - shape.threshold)) {
    if (threshold && shape.seed_on_device) seed = static_cast<uint64_t>(*shape.seed_on_device);
  }

  // Bit i: is column 8 * group + i of this row kept?
  __device__ __forceinline__ uint32_t group(int row, int group) const {
    const Philox4 draws = philox(static_cast<uint32_t>(row), static_cast<uint32_t>(group), head,
                                 static_cast<uint32_t>(Purpose::kAttentionDropout), seed);
    uint32_t kept = 0;
    MTFAST_UNROLL
    for (int i = 0; i < 8; ++i)
      kept |= static_cast<uint32_t>((draws.word[i / 2] >> (16 * (i % 2)) & 0xffffu) >= threshold) << i;
    return kept;
  }

  // Bit 4 * n + j: is this lane's x[n][j] kept, where x's rows are queries from `row` on and its columns keys
  // from `column`, a multiple of 8, on? Each lane makes one of the piece's 32 draws of eight.
  __device__ __forceinline__ uint32_t kept(int row, int column) const {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    uint32_t quad = group(row + g + 8 * (t >> 1), column / 8 + (t & 1)) << (8 * t);
    quad |= __shfl_xor_sync(kAllLanes, quad, 1);
    quad |= __shfl_xor_sync(kAllLanes, quad, 2);
    uint32_t bits = 0;  // byte 2 * r + n of quad is for rows g + 8 * r, columns from 8 * n on
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) bits |= (quad >> (8 * (2 * r + n) + 2 * t) & 3u) << (4 * n + 2 * r);
    return bits;
  }

  // The same of a transposed piece, whose rows are keys and whose columns are queries.
  __device__ __forceinline__ uint32_t kept_transposed(int row, int column) const {
    const int lane = lane_index(), g = lane >> 2, t = lane & 3;
    const uint32_t mine = group(row + (lane & 15), column / 8 + (lane >> 4));
    const uint32_t other = __shfl_xor_sync(kAllLanes, mine, 16);
    const uint32_t both = lane < 16 ? mine | other << 8 : other | mine << 8;  // 16 keys of query lane % 16
    uint32_t bits = 0;
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) MTFAST_UNROLL
    for (int e = 0; e < 2; ++e) {
      const uint32_t keys = __shfl_sync(kAllLanes, both, 8 * n + 2 * t + e);
      bits |= (keys >> g & 1u) << (4 * n + e) | (keys >> (g + 8) & 1u) << (4 * n + 2 + e);
    }
    return bits;
  }
};

// A row's log-sum-exp in powers of two, in two parts so that float results lose nothing by the change of
// base.
struct Log2 {
  float high, low;
  __device__ __forceinline__ explicit Log2(float natural)
      : high(natural * kLog2E), low(fmaf(natural, kLog2E, -high) + natural * 1.925963033500e-8f) {}
  __device__ __forceinline__ float weight(float x, float scale) const {
    return ptx::exp2_approx(fmaf(x, scale, -high) - low);
  }
};

// What the kernels of one launch have in common.
template <class T, int kDim>
struct Launch {
  static constexpr int kTile = Tile<T, kDim>::kElements * static_cast<int>(sizeof(T));
  static constexpr int kScratch = sizeof(T) == 4 ? kWarps * kScratchPerWarp * 4 : 0;
  static constexpr int kPlan = (sizeof(Plan) + 15) / 16 * 16;

  static dim3 grid(const AttentionShape& shape) {
    return dim3(static_cast<unsigned>((shape.total + kWindow - 1) / kWindow * shape.heads));
  }
};

// Calls launch(T{}, integral head_dim) for the shape's dtype and head_dim.
template <class F>
int dispatch(const AttentionShape& shape, F launch) {
  const auto by_dim = [&](auto element) {
    using T = decltype(element);
    switch (shape.head_dim) {
      case 32:
        return launch(T{}, std::integral_constant<int, 32>{});
      case 64:
        return launch(T{}, std::integral_constant<int, 64>{});
      case 128:
        return launch(T{}, std::integral_constant<int, 128>{});
      default:
        return static_cast<int>(cudaErrorInvalidValue);
    }
  };
  switch (shape.dtype) {
    case AttentionDtype::kBFloat16:
      return by_dim(__nv_bfloat16{});
    case AttentionDtype::kHalf:
      return by_dim(__half{});
    case AttentionDtype::kFloat:
      return by_dim(float{});
    default:
      return static_cast<int>(cudaErrorInvalidValue);
  }
}

}  // namespace mtfast::attention
