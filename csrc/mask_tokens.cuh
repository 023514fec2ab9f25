// What both kernels of mask_tokens do with a warp's tile: moving it, its draws, its words, its replacements.
#pragma once
#include <type_traits>

#include "device/reduce.cuh"
#include "device/vector.cuh"
#include "mask_tokens.h"

namespace mtfast::mask_tokens {

constexpr int kTokens = 4;  // of a lane in a tile
constexpr int kTile = 32 * kTokens;
constexpr uint64_t kEverything = ~uint64_t{0};  // above every key

// What orders the candidates of a sequence. No two are equal: of equal draws the first token's is smaller.
__device__ __forceinline__ uint64_t key(uint32_t draw, uint32_t token) {
  return uint64_t{draw} << 32 | token;
}

// A warp's tokens from `first`, a multiple of 4, on. A lane's token t is in vector t / kWide of its
// kVectors.
template <class Id>
struct Tile {
  static constexpr int kWide = Vector<Id>::kSize, kVectors = kTokens / kWide;
  uint32_t first;

  __device__ __forceinline__ uint32_t vector(int v) const {
    return first + (32u * v + threadIdx.x % 32) * kWide;
  }
  __device__ __forceinline__ uint32_t token(int t) const { return vector(t / kWide) + t % kWide; }
};

template <class Id>
struct Masking {
  Batch batch;
  Options options;
  Id* output;
  Id* labels;
  bool aligned;  // all tensors of tokens, to 16 bytes

  __device__ __forceinline__ const Id* ids() const { return static_cast<const Id*>(batch.input_ids); }

  // To be called before the threads of a warp go different ways: then uniform registers hold the seed and the
  // keys of Philox's rounds. "exact" has no others left for them.
  __device__ __forceinline__ uint64_t seed() const {
    return options.seed_tensor ? static_cast<uint64_t>(__ldg(options.seed_tensor)) : options.seed;
  }

  __device__ __forceinline__ void ordinary(const Id (&id)[kTokens], bool (&pred)[kTokens]) const {
    // The sign says it: an id of the vocabulary has 31 bits, so has its distance to any.
    int32_t in_run[kTokens] = {};
#pragma unroll 1
    for (int r = 0; r < options.special.count; ++r) {
      const int32_t begin = options.special.begin[r], end = options.special.end[r];
      MTFAST_UNROLL
      for (int t = 0; t < kTokens; ++t) {
        const uint32_t low = static_cast<uint32_t>(id[t]);
        in_run[t] |= static_cast<int32_t>((low - end) & ~(low - begin));
      }
    }
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) pred[t] = in_vocabulary(id[t]) && in_run[t] >= 0;
  }
  __device__ __forceinline__ bool in_vocabulary(Id id) const {
    using Unsigned = std::make_unsigned_t<Id>;
    return static_cast<Unsigned>(id) < static_cast<Unsigned>(options.vocab_size);
  }

  // Whether ordinary token i continues the word of the token before it; `begin` is its sequence's first
  // token.
  __device__ __forceinline__ bool goes_on(uint32_t i, uint32_t begin) const {
    if (i <= begin || !batch.subword[ids()[i]]) return false;
    const Id before = ids()[i - 1];
    return in_vocabulary(before) && !options.special.contains(before);
  }

  // Where sequence s begins or, for s = sequences, the last one ends. Offsets are moved into the batch: then
  // whatever they are, sequences cover all tokens from the first bound to the last one.
  __device__ __forceinline__ uint32_t bound(int64_t s) const {
    if (!batch.cu_seqlens) return static_cast<uint32_t>(s * batch.row_length);
    const int64_t at = batch.cu_seqlens[s];
    return static_cast<uint32_t>(at < 0 ? 0 : at < batch.total ? at : batch.total);
  }
  // Where the sequence of token i begins; i itself where offsets say that it begins later.
  __device__ __forceinline__ uint32_t sequence_begin(uint32_t i) const {
    if (!batch.cu_seqlens) return i - i % static_cast<uint32_t>(batch.row_length);
    // The last sequence that begins at or before i.
    int32_t low = 0, high = static_cast<int32_t>(batch.sequences);
    while (high - low > 1) {
      const int32_t middle = low + (high - low) / 2;
      (batch.cu_seqlens[middle] <= static_cast<int64_t>(i) ? low : high) = middle;
    }
    return min(bound(low), i);
  }

  __device__ __forceinline__ bool whole(const Tile<Id>& tile, uint32_t begin, uint32_t end) const {
    return aligned && tile.first >= begin && tile.first + kTile <= end;
  }

  // Where the batch has ended, ids are -1: no candidates.
  __device__ __forceinline__ void load_ids(const Tile<Id>& tile, Id (&id)[kTokens]) const {
    const uint32_t total = static_cast<uint32_t>(batch.total);
    if (whole(tile, 0, total)) {
      MTFAST_UNROLL
      for (int v = 0; v < tile.kVectors; ++v) {
        const Vector<Id> frag = load_streaming(ids() + tile.vector(v));
        memcpy(&id[v * tile.kWide], &frag, sizeof frag);
      }
    } else {
      MTFAST_UNROLL
      for (int t = 0; t < kTokens; ++t) id[t] = tile.token(t) < total ? ids()[tile.token(t)] : -1;
    }
  }

  // Stores what of the tile is in [begin, end).
  __device__ __forceinline__ void store_ids(Id* to, const Tile<Id>& tile, uint32_t begin, uint32_t end,
                                            const Id (&id)[kTokens]) const {
    if (whole(tile, begin, end)) {
      MTFAST_UNROLL
      for (int v = 0; v < tile.kVectors; ++v) {
        Vector<Id> frag;
        memcpy(&frag, &id[v * tile.kWide], sizeof frag);
        store_streaming(to + tile.vector(v), frag);
      }
    } else {
      MTFAST_UNROLL
      for (int t = 0; t < kTokens; ++t)
        if (tile.token(t) >= begin && tile.token(t) < end) to[tile.token(t)] = id[t];
    }
  }

  // Leaves [begin, end) as it is; the whole block calls.
  __device__ __forceinline__ void keep(uint32_t begin, uint32_t end) const {
    for (uint32_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      output[i] = ids()[i];
      labels[i] = static_cast<Id>(-100);
    }
  }

  // The draws of the tokens whose pred is set; the whole warp calls.
  __device__ __forceinline__ void draws(uint64_t seed, Purpose purpose, const Tile<Id>& tile,
                                        const bool (&pred)[kTokens], uint32_t (&draw)[kTokens]) const {
    if (batch.positions) return draws_by_position(seed, purpose, tile, pred, draw);
    // Where a vector holds two tokens, two lanes share the Philox calls of two vectors: each makes one.
    constexpr bool kShared = Tile<Id>::kVectors == 2;
    const uint32_t lane = threadIdx.x % 32, odd = lane % 2;
    const uint32_t group = tile.first / 4 + (kShared ? 16 * odd + lane / 2 : lane);
    const Philox4 own = draw4(seed, purpose, group);
    MTFAST_UNROLL
    for (int w = 0; w < 2; ++w) {
      const uint32_t low = own.word[w], high = own.word[w + 2];
      const uint32_t other = kShared ? __shfl_xor_sync(0xffffffffu, odd ? low : high, 1) : 0;
      draw[w] = kShared && odd ? other : low;
      draw[w + 2] = kShared && !odd ? other : high;
    }
  }

  __device__ __forceinline__ void draws_by_position(uint64_t seed, Purpose purpose, const Tile<Id>& tile,
                                                    const bool (&pred)[kTokens],
                                                    uint32_t (&draw)[kTokens]) const {
    int64_t position[kTokens];
    uint32_t needed = 0;
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      position[t] = pred[t] ? batch.positions[tile.token(t)] : 0;
      needed |= uint32_t{pred[t]} << t;
    }
    Philox4 four{};
    int64_t group = INT64_MAX;  // of no position
#pragma unroll 1                // the registers move past one Philox call, which is long
    for (int t = 0; t < kTokens; ++t) {
      if (needed >> t & 1 && position[0] >> 2 != group) {
        group = position[0] >> 2;
        four = draw4(seed, purpose, static_cast<uint64_t>(group));
      }
      const uint32_t here = four.at(position[0]);
      MTFAST_UNROLL
      for (int u = 0; u + 1 < kTokens; ++u) {
        position[u] = position[u + 1];
        draw[u] = draw[u + 1];
      }
      draw[kTokens - 1] = here;
    }
  }

  // Whether the word of ordinary token i is chosen: whether the key of its first token is below the cutoff.
  __device__ __forceinline__ bool word_chosen(uint64_t seed, uint32_t i, uint32_t begin,
                                              uint64_t cutoff) const {
    while (goes_on(i, begin)) --i;
    const int64_t at = batch.positions ? batch.positions[i] : i;
    const Philox4 four = draw4(seed, Purpose::kMaskChoose, static_cast<uint64_t>(at >> 2));
    return key(four.at(at), i) < cutoff;
  }

  // Writes what of the tile is in [begin, end); the tokens whose pred is set are the chosen ones.
  __device__ __forceinline__ void write(uint64_t seed, const Tile<Id>& tile, uint32_t begin, uint32_t end,
                                        Id (&id)[kTokens], const bool (&pred)[kTokens]) const {
    Id label[kTokens];
    bool any = false;
    MTFAST_UNROLL
    for (int t = 0; t < kTokens; ++t) {
      label[t] = pred[t] ? id[t] : static_cast<Id>(-100);
      any |= pred[t];
    }
    store_ids(labels, tile, begin, end, label);
    if (__any_sync(0xffffffffu, any)) {
      uint32_t draw[kTokens];
      draws(seed, Purpose::kMaskReplace, tile, pred, draw);
      MTFAST_UNROLL
      for (int t = 0; t < kTokens; ++t)
        if (pred[t]) id[t] = static_cast<Id>(replacement(options, draw[t], id[t]));
    }
    store_ids(output, tile, begin, end, id);
  }
};

}  // namespace mtfast::mask_tokens
