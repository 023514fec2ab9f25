// Packed attention, backward, of sequences too long for one pass: first by queries, which leave delta behind,
// then by keys. Each warp takes 16 rows of one side; the other side is in shared memory.
#pragma once
#include "packed_attention_blocks.cuh"

namespace mtfast::attention {

// 16 queries: what they bring, and their gradient.
template <class T, int kDim>
struct Queries {
  RowFrags<kDim> q, dout;
  Accumulators<kDim> dq = {};
  int rows;  // that exist, if fewer than 16
  float delta[2];
  Statistics stats[2];

  // With q and dout there: delta and the statistics of rows from `first` on, of which `count` exist. delta by
  // the product that gives dP: where one weight is 1 and the rest 0 they are the same bits.
  __device__ __forceinline__ void prepare(const AttentionBackward& args, int head, int first, int count) {
    rows = count;
    RowFrags<kDim> out;
    read_frags<T, kDim>(out, HeadRows<T>(args.out, head), first, count);
    row_dots<T, kDim>(delta, dout, out);
    const int g = lane_index() >> 2;
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (g + 8 * r < count) {
        stats[r] = Statistics(args.stats, head * args.shape.total + first + g + 8 * r);
      }
    }
  }

  // With the 16 keys from row `key` of the tiles on, of which those before `to` exist; the tiles' row 0 is
  // row `place` of the sequence. Adds to dq and gives P D and dS.
  __device__ __forceinline__ void attend(Frag& pd, Frag& ds, const Tile<T, kDim>& k, const Tile<T, kDim>& v,
                                         int key, int to, int place, float scale, const Dropout& dropout,
                                         int draw_row) {
    const int t = lane_index() & 3;
    Scores x, dx;
    multiply<T, kDim>(x, q, k, key);
    multiply<T, kDim>(dx, dout, v, key);
    Philox4 draws = {};
    if (dropout.any()) draws = dropout.draws(draw_row, place + key, t);
    for_each_held([&](int n, int j) {
      const bool keep = dropout.keeps(draws.word[2 * n + j / 2], j % 2);
      const float p = stats[j >> 1].weight(x[n][j], scale);
      // What is dropped is 0, also where the gradient is not finite.
      const float dp = keep ? dx[n][j] * dropout.scale : 0.0f;
      x[n][j] = keep ? p * dropout.scale : 0.0f;
      dx[n][j] = p * (dp - delta[j >> 1]);
    });
    // Scores of rows that are not there are 0 times what is, which need not be finite.
    if (key + 16 > to || rows < 16) {
      const int g = lane_index() >> 2;
      for_each_held([&](int n, int j) {
        const bool exists = key + 8 * n + 2 * t + (j & 1) < to && g + 8 * (j >> 1) < rows;
        if (!exists) x[n][j] = dx[n][j] = 0.0f;
      });
    }
    to_frag<T>(pd, x[0], x[1]);
    to_frag<T>(ds, dx[0], dx[1]);
    add_product<T, kDim>(dq, ds, k, key);
  }

  __device__ __forceinline__ void store(const AttentionBackward& args, int head, int first, int count,
                                        const Tile<T, kDim>& scratch) {
    const float factor = static_cast<float>(args.shape.softmax_scale);
    store_rows<T, kDim>({args.dq, head}, first, count, dq, {factor, factor}, scratch);
  }
};

constexpr int kLongWarps = 8;

// dq and delta.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * kLongWarps, 1)
    backward_queries_kernel(AttentionBackward args, WorkClass of, float* delta) {
  const LongBlock<T, kDim, kLongWarps> block(shared_memory<unsigned char>(), of.resident);
  const float scale = log2_scale(args.shape);
  block.run(args.shape, of, [&](const Sequence& sequence, int head, int row, bool is_active, bool fresh) {
    const int first = sequence.begin + row, count = sequence.length - row, g = lane_index() >> 2;
    const Dropout dropout(args.shape, head);
    Queries<T, kDim> queries;
    if (is_active) {
      read_frags<T, kDim>(queries.q, {args.q, head}, first, count);
      read_frags<T, kDim>(queries.dout, {args.dout, head}, first, count);
      queries.prepare(args, head, first, count);
      MTFAST_UNROLL
      for (int r = 0; r < 2; ++r) {
        if ((lane_index() & 3) == 0 && g + 8 * r < count) {
          delta[head * args.shape.total + first + g + 8 * r] = queries.delta[r];
        }
      }
    }
    block.other.run(
        {args.k, head}, {args.v, head}, sequence, fresh, [](int, int) {},
        [&](int from, int to, int place) {
          MTFAST_NO_UNROLL
          for (int key = from; key < to && is_active; key += 16) {
            Frag pd, ds;
            queries.attend(pd, ds, block.other.a, block.other.b, key, to, place, scale, dropout, first + g);
          }
        });
    if (is_active) queries.store(args, head, first, count, block.scratch);
  });
}

// Dropout's words for the transposed fragment whose rows are keys and whose columns are queries: that of
// x[n][j] is half n of word[j % 2][j / 2]. A call has the draws of keys 2 * i and 2 * i + 1, so lanes of
// neighbouring g make one each and halve them.
struct TransposedDraws {
  uint32_t word[2][2];

  __device__ __forceinline__ TransposedDraws(const Dropout& dropout, int row, int column) {
    const int g = lane_index() >> 2, t = lane_index() & 3;
    const bool odd = g & 1;
    const Philox4 mine = dropout.draws(row + 2 * t + odd, column, g / 2);
    MTFAST_UNROLL
    for (int i = 0; i < 2; ++i) {
      const uint32_t first = mine.word[2 * i], second = mine.word[2 * i + 1];
      const uint32_t low = (first & 0xffffu) | second << 16, high = first >> 16 | (second & 0xffff0000u);
      const uint32_t kept = odd ? high : low;
      const uint32_t other = __shfl_xor_sync(kAllLanes, odd ? low : high, 4);
      word[0][i] = odd ? other : kept;
      word[1][i] = odd ? kept : other;
    }
  }
};

// From column `count` on: products of what is not there are 0 times what is, which need not be finite.
__device__ __forceinline__ void zero_columns(Scores& x, int count) {
  if (count >= 16) return;
  const int t = lane_index() & 3;
  for_each_held([&](int n, int j) {
    if (8 * n + 2 * t + (j & 1) >= count) x[n][j] = 0.0f;
  });
}

// A query's part in the second pass.
struct Row {
  Statistics stats;
  float delta;
};

// dk and dv, by 16 keys a warp; the queries' side is in shared memory.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * kLongWarps, 1)
    backward_keys_kernel(AttentionBackward args, WorkClass of, const float* delta) {
  const LongBlock<T, kDim, kLongWarps> block(shared_memory<unsigned char>(), of.resident);
  const Tile<T, kDim>& scratch = block.scratch;
  const auto& queries = block.other;
  Row* rows = reinterpret_cast<Row*>(block.extra);
  const float scale = log2_scale(args.shape), factor = static_cast<float>(args.shape.softmax_scale);
  block.run(args.shape, of, [&](const Sequence& sequence, int head, int key, bool is_active, bool fresh) {
    const int first = sequence.begin + key, count = sequence.length - key, t = lane_index() & 3;
    const Dropout dropout(args.shape, head);
    RowFrags<kDim> k, v;  // v is read again for each product: beside two results registers are short
    if (is_active) {
      read_frags<T, kDim>(k, {args.k, head}, first, count);
      read_frags<T, kDim>(v, {args.v, head}, first, count);
      MTFAST_UNROLL
      for (int i = 0; i < kDim / 16; ++i) write_frag(scratch, 0, 16 * i, v[i]);
      __syncwarp();
    }
    Accumulators<kDim> dk = {}, dv = {};
    queries.run(
        {args.q, head}, {args.dout, head}, sequence, fresh,
        [&](int place, int copied) {
          const int64_t at = head * args.shape.total + sequence.begin + place;
          for (int row = static_cast<int>(threadIdx.x); row < (copied + 15) / 16 * 16;
               row += block.kThreads) {
            rows[row] = row < copied ? Row{Statistics(args.stats, at + row), delta[at + row]}
                                     : Row{Statistics(), 0.0f};
          }
        },
        [&](int from, int to, int place) {
          MTFAST_NO_UNROLL
          for (int row = from; row < to && is_active; row += 16) {
            Scores x, dx;
            multiply<T, kDim>(x, k, queries.a, row);
            const TransposedDraws draws(dropout, sequence.begin + place + row, key);
            for_each_held([&](int n, int j) {
              const bool keep = dropout.keeps(draws.word[j % 2][j / 2], n);
              x[n][j] = rows[row + 8 * n + 2 * t + (j & 1)].stats.weight(x[n][j], scale);
              dx[n][j] = keep ? x[n][j] * dropout.scale : 0.0f;
            });
            zero_columns(dx, to - row);
            Frag weights;
            to_frag<T>(weights, dx[0], dx[1]);
            add_product<T, kDim>(dv, weights, queries.b, row);
            read_frags<T, kDim>(v, scratch, 0);
            multiply<T, kDim>(dx, v, queries.b, row);
            for_each_held([&](int n, int j) {
              const bool keep = dropout.keeps(draws.word[j % 2][j / 2], n);
              const float dp = keep ? dx[n][j] * dropout.scale : 0.0f;
              dx[n][j] = x[n][j] * (dp - rows[row + 8 * n + 2 * t + (j & 1)].delta);
            });
            zero_columns(dx, to - row);
            to_frag<T>(weights, dx[0], dx[1]);
            add_product<T, kDim>(dk, weights, queries.a, row);
          }
        });
    if (!is_active) return;
    __syncwarp();
    store_rows<T, kDim>({args.dk, head}, first, count, dk, {factor, factor}, scratch);
    store_rows<T, kDim>({args.dv, head}, first, count, dv, {1.0f, 1.0f}, scratch);
  });
}

// The two passes of sequences of more than `beyond` tokens. The second needs what the first leaves.
template <class T, int kDim>
int launch_two_passes(const AttentionBackward& args, int beyond, float* delta, void* stream) {
  using Block = LongBlock<T, kDim, kLongWarps>;
  const int64_t longest = args.shape.max_seqlen;
  if (const int error = launch_long<Block>(args, beyond, longest, kMostResident, false, stream, 0,
                                           backward_queries_kernel<T, kDim>, delta))
    return error;
  return launch_long<Block>(args, beyond, longest, kMostResident, false, stream, sizeof(Row),
                            backward_keys_kernel<T, kDim>, static_cast<const float*>(delta));
}

}  // namespace mtfast::attention
