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
  float delta[2];
  Statistics stats[2];

  // With q and dout there: delta and the statistics of rows from `first` on, of which `count` exist. delta by
  // the product that gives dP: where one weight is 1 and the rest 0 they are the same bits.
  __device__ __forceinline__ void prepare(const AttentionBackward& args, int head, int first, int count) {
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
    MTFAST_UNROLL
    for (int n = 0; n < 2; ++n) {
      MTFAST_UNROLL
      for (int j = 0; j < 4; ++j) {
        const bool keep = dropout.keeps(draws.word[2 * n + j / 2], j % 2);
        const float p = stats[j >> 1].weight(x[n][j], scale);
        // What is dropped is 0, also where the gradient is not finite.
        const float dp = keep ? dx[n][j] * dropout.scale : 0.0f;
        x[n][j] = keep ? p * dropout.scale : 0.0f;
        dx[n][j] = p * (dp - delta[j >> 1]);
      }
    }
    if (key + 16 > to) {
      MTFAST_UNROLL
      for (int n = 0; n < 2; ++n) {
        MTFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          if (key + 8 * n + 2 * t + (j & 1) >= to) x[n][j] = dx[n][j] = 0.0f;
        }
      }
    }
    to_frag<T>(pd, x[0], x[1]);
    to_frag<T>(ds, dx[0], dx[1]);
    add_product<T, kDim>(dq, ds, k, key);
  }

  __device__ __forceinline__ void store(const AttentionBackward& args, int head, int first, int count,
                                        const Tile<T, kDim>& scratch) {
    const float factor = static_cast<float>(args.shape.softmax_scale);
    scale_rows<kDim>(dq, {factor, factor});
    store_rows<T, kDim>({args.dq, head}, first, count, dq, scratch);
  }
};

constexpr int kLongWarps = 8;

// dq and delta.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * kLongWarps, 1)
    backward_queries_kernel(AttentionBackward args, float* delta, WorkClass of, LongPlan plan) {
  constexpr int kWarps = kLongWarps;
  using Keys = Resident<32 * kWarps, T, kDim>;
  unsigned char* memory = shared_memory<unsigned char>();
  const WorkList<kWarps> work(memory);
  memory += WorkList<kWarps>::kBytes;
  const Tile<T, kDim> scratch(memory + warp_index() * 16 * Tile<T, kDim>::kRowBytes);
  const Keys keys(memory + kWarps * 16 * Tile<T, kDim>::kRowBytes, plan.resident);
  const float scale = log2_scale(args.shape);
  work.run(args.shape, of, [&](const Sequence& sequence, int head, int part) {
    const int begin = sequence.begin, length = sequence.length, g = lane_index() >> 2;
    const int first = part * plan.group, last = min(first + plan.group, length);
    const Dropout dropout(args.shape, head);
    for (int base = first; base < last; base += 16 * kWarps) {
      const int row = base + 16 * warp_index();
      Queries<T, kDim> queries;
      if (row < last) {
        read_frags<T, kDim>(queries.q, HeadRows<T>(args.q, head), begin + row, length - row);
        read_frags<T, kDim>(queries.dout, HeadRows<T>(args.dout, head), begin + row, length - row);
        queries.prepare(args, head, begin + row, length - row);
        MTFAST_UNROLL
        for (int r = 0; r < 2; ++r) {
          if ((lane_index() & 3) == 0 && row + g + 8 * r < length) {
            delta[head * args.shape.total + begin + row + g + 8 * r] = queries.delta[r];
          }
        }
      }
      keys.run(
          {args.k, head}, {args.v, head}, begin, length, base == first, [](int, int) {},
          [&](int from, int to, int place) {
            MTFAST_NO_UNROLL
            for (int key = from; key < to && row < last; key += 16) {
              Frag pd, ds;
              queries.attend(pd, ds, keys.a, keys.b, key, to, place, scale, dropout, begin + row + g);
            }
          });
      if (row < last) queries.store(args, head, begin + row, length - row, scratch);
    }
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

// A query's part in the second pass.
struct Row {
  Statistics stats;
  float delta;
};

// dk and dv, by 16 keys a warp; the queries' side is in shared memory.
template <class T, int kDim>
__global__ void __launch_bounds__(32 * kLongWarps, 1)
    backward_keys_kernel(AttentionBackward args, const float* delta, WorkClass of, LongPlan plan) {
  constexpr int kWarps = kLongWarps, kRowBytes = Tile<T, kDim>::kRowBytes;
  using QuerySide = Resident<32 * kWarps, T, kDim>;
  unsigned char* memory = shared_memory<unsigned char>();
  const WorkList<kWarps> work(memory);
  memory += WorkList<kWarps>::kBytes;
  const Tile<T, kDim> scratch(memory + warp_index() * 16 * kRowBytes);
  memory += kWarps * 16 * kRowBytes;
  const QuerySide queries(memory, plan.resident);
  Row* rows = reinterpret_cast<Row*>(memory + 2 * plan.resident * kRowBytes);
  const float scale = log2_scale(args.shape), factor = static_cast<float>(args.shape.softmax_scale);
  work.run(args.shape, of, [&](const Sequence& sequence, int head, int part) {
    const int begin = sequence.begin, length = sequence.length, t = lane_index() & 3;
    const int first = part * plan.group, last = min(first + plan.group, length);
    const int64_t numbered = head * args.shape.total + begin;
    const Dropout dropout(args.shape, head);
    for (int base = first; base < last; base += 16 * kWarps) {
      const int key = base + 16 * warp_index();
      RowFrags<kDim> k, v;  // v is read again for each product: beside two results registers are short
      if (key < last) {
        read_frags<T, kDim>(k, HeadRows<T>(args.k, head), begin + key, length - key);
        read_frags<T, kDim>(v, HeadRows<T>(args.v, head), begin + key, length - key);
        MTFAST_UNROLL
        for (int i = 0; i < kDim / 16; ++i) write_frag(scratch, 0, 16 * i, v[i]);
        __syncwarp();
      }
      Accumulators<kDim> dk = {}, dv = {};
      queries.run(
          {args.q, head}, {args.dout, head}, begin, length, base == first,
          [&](int place, int count) {
            for (int row = static_cast<int>(threadIdx.x); row < (count + 15) / 16 * 16; row += 32 * kWarps) {
              const int64_t at = numbered + place + row;
              rows[row] = row < count ? Row{Statistics(args.stats, at), delta[at]} : Row{Statistics(), 0.0f};
            }
          },
          [&](int from, int to, int place) {
            MTFAST_NO_UNROLL
            for (int row = from; row < to && key < last; row += 16) {
              Scores x, dx;
              multiply<T, kDim>(x, k, queries.a, row);
              const TransposedDraws draws(dropout, begin + place + row, key);
              MTFAST_UNROLL
              for (int n = 0; n < 2; ++n) {
                MTFAST_UNROLL
                for (int j = 0; j < 4; ++j) {
                  const bool keep = dropout.keeps(draws.word[j % 2][j / 2], n);
                  x[n][j] = rows[row + 8 * n + 2 * t + (j & 1)].stats.weight(x[n][j], scale);
                  dx[n][j] = keep ? x[n][j] * dropout.scale : 0.0f;
                }
              }
              Frag weights;
              to_frag<T>(weights, dx[0], dx[1]);
              add_product<T, kDim>(dv, weights, queries.b, row);
              read_frags<T, kDim>(v, scratch, 0);
              multiply<T, kDim>(dx, v, queries.b, row);
              MTFAST_UNROLL
              for (int n = 0; n < 2; ++n) {
                MTFAST_UNROLL
                for (int j = 0; j < 4; ++j) {
                  const bool keep = dropout.keeps(draws.word[j % 2][j / 2], n);
                  const float dp = keep ? dx[n][j] * dropout.scale : 0.0f;
                  dx[n][j] = x[n][j] * (dp - rows[row + 8 * n + 2 * t + (j & 1)].delta);
                }
              }
              to_frag<T>(weights, dx[0], dx[1]);
              add_product<T, kDim>(dk, weights, queries.a, row);
            }
          });
      if (key >= last) continue;
      __syncwarp();
      scale_rows<kDim>(dk, {factor, factor});
      store_rows<T, kDim>({args.dk, head}, begin + key, length - key, dk, scratch);
      store_rows<T, kDim>({args.dv, head}, begin + key, length - key, dv, scratch);
    }
  });
}

// The two passes of sequences of more than `beyond` tokens. The second needs what the first leaves.
template <class T, int kDim>
int launch_long(const AttentionBackward& args, int64_t beyond, float* delta, void* stream) {
  const int64_t longest = args.shape.max_seqlen;
  const auto launch = [&](auto kernel, auto* to_delta, size_t each_row) {
    const auto bytes = [each_row](int rows) {
      return WorkList<kLongWarps>::kBytes + rows * each_row +
             static_cast<size_t>(16 * kLongWarps + 2 * rows) * Tile<T, kDim>::kRowBytes;
    };
    LongPlan plan;
    if (const int error = plan_long(plan, args.shape, longest, kernel, bytes)) return error;
    const WorkClass of{static_cast<int>(beyond), static_cast<int>(longest),
                       static_cast<int>((longest + plan.group - 1) / plan.group)};
    return MTFAST_LAUNCH(work_grid(args.shape, of), dim3(32 * kLongWarps), bytes(plan.resident), stream,
                         kernel, args, to_delta, of, plan);
  };
  if (const int error = launch(backward_queries_kernel<T, kDim>, delta, 0)) return error;
  return launch(backward_keys_kernel<T, kDim>, static_cast<const float*>(delta), sizeof(Row));
}

}  // namespace mtfast::attention
