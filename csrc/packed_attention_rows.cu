// Packed attention row by row, without tensor cores: one query a sequence (`cls`), and all rows in float32 or
// of head_dim 256.
// With P = softmax(S), D the dropout factors and delta = rowsum(P D dP):
//   dv = (P D)^T dout,  dP = dout v^T,  dS = P (D dP - delta),  dq = scale dS k,  dk = scale dS^T q.
//
// Floor. One query: k and v are read once, backward dk and dv written once: 4 and 8 bytes for each 16-bit
// element of k, at about 1 operation a byte, so memory bounds it: 13 and 27 us for 16,384 tokens, 12 heads of
// 64 and 4 TB/s. All rows: 4 head_dim operations for each query and key forward, 14 backward, but each such
// pair also reads a row of k and of v, which lie in L1: its 128 bytes a clock bound it.
//
// A warp takes one row and one head and goes through the other side of its sequence in chunks of 32 rows. A
// row is spread over lanes, 16 bytes each (of 256 floats 32), so that a warp reads several at once, and four
// of them are asked for before the first is used. Products end up one in each lane, where what is
// done for each weight (2^x, dropout) costs one instruction for 32; then they are handed round for the second
// product. Sums are per chunk and then over chunks: long ones would round at every step. Blocks have few
// warps, all independent: for all rows they are neighbours, which read the same lines.
#include "packed_attention_rows.cuh"

namespace mtfast::attention {
namespace {

template <class T, int kDim, bool kCls>
__global__ void __launch_bounds__(kThreads) rows_forward_kernel(AttentionForward args) {
  using W = Warp<T, kDim, kCls>;
  const AttentionShape& shape = args.shape;
  const W w(shape);
  if (!w.any) return;
  Kept<false> kept(shape, w);
  const float scale = log2_scale(shape);
  typename W::Numbers q[1], out[1] = {};
  w.read(q[0], args.q);
  float row_max = kLowest, row_sum = 0.0f;  // the sum is each lane's own
  for (int from = 0; from < w.length; from += kChunk) {
    const int count = min(w.length - from, kChunk);
    float product[1] = {};
    w.products(product, q, {args.k}, from, count);
    const float score = w.own < count ? __fmul_rn(product[0], scale) : minus_infinity();
    const float before = row_max;
    row_max = warp_max(fmaxf(row_max, score));
    const float shrink = ptx::exp2_approx(before - row_max), weight = ptx::exp2_approx(score - row_max);
    row_sum = row_sum * shrink + weight;
    const bool keeps = kept.factor(from, w.own) != 0.0f;
    w.add(out, shrink, {keeps ? weight : 0.0f}, {args.v}, from, count);
  }
  row_sum = warp_sum(row_sum);
  w.write_sum(args.out, out[0], w.length ? kept.dropout.scale / row_sum : 0.0f);
  if (lane_index() == 0)
    Statistics::store(args.stats, w.number(shape), w.length ? row_max : minus_infinity(), row_sum);
}

// Blocks of the backward on an SM at a time: left to itself, the compiler wants more and spills.
template <class T, int kDim>
constexpr int kTogether = kDim * sizeof(T) > 512 ? 3 : 5;

// dq of a query's row; with one query a sequence also dk and dv, else it leaves delta behind.
template <class T, int kDim, bool kCls>
__global__ void __launch_bounds__(kThreads, kTogether<T, kDim>)
    rows_backward_kernel(AttentionBackward args, float* deltas) {
  using W = Warp<T, kDim, kCls>;
  const AttentionShape& shape = args.shape;
  const W w(shape);
  if (!w.any) return;
  Kept<false> kept(shape, w);
  const float scale = static_cast<float>(shape.softmax_scale), scale_2 = log2_scale(shape);
  typename W::Numbers row[2], dq[1] = {};  // q and dout
  w.read(row[0], args.q);
  w.read(row[1], args.dout);
  const Statistics softmax(args.stats, w.number(shape));
  float weight = 0.0f, dp = 0.0f, factor = 0.0f, delta = 0.0f;
  const auto differentiate = [&](int from) {
    const int count = min(w.length - from, kChunk);
    float product[2] = {};
    w.products(product, row, {args.k, args.v}, from, count);
    factor = kept.factor(from, w.own);
    const bool exists = w.own < count;
    weight = exists ? softmax.weight(product[0], scale_2) : 0.0f;
    dp = exists ? product[1] * factor : 0.0f;
  };
  if constexpr (kCls) {
    // Twice through the keys, first for delta, since out is rounded. Then backwards from the last chunk,
    // which is at hand: most sequences have no other.
    for (int from = 0; from < w.length; from += kChunk) {
      differentiate(from);
      delta += weight * dp;
    }
    delta = warp_sum(delta);
  } else {
    // By the order of sums that gives dP: where one weight is 1 and the rest 0 they are the same bits.
    typename W::Numbers out;
    w.read(out, args.out);
    delta = warp_sum<W::kLanes>(W::partial(row[1], out));
    if (lane_index() == 0) deltas[w.number(shape)] = delta;
  }
  const int last = (w.length + kChunk - 1) / kChunk * kChunk - kChunk;
  for (int from = last; from >= 0; from -= kChunk) {
    if (!kCls || from != last) differentiate(from);
    const int count = min(w.length - from, kChunk);
    const float ds = weight * (dp - delta) * scale;
    w.add(dq, 1.0f, {ds}, {args.k}, from, count);
    if constexpr (kCls) {
      const float used = weight * factor;
      for (int step = 0; step * W::kGroups < count; ++step) {
        const float row_ds = W::handed(ds, step), row_used = W::handed(used, step);
        const int key = step * W::kGroups + w.group;
        if (key < count) {
          w.write(args.dk, w.begin + from + key, row[0], row_ds);
          w.write(args.dv, w.begin + from + key, row[1], row_used);
        }
      }
    }
  }
  w.write_sum(args.dq, dq[0], 1.0f);
}

// dk and dv of a key's row, from statistics and delta of its sequence's queries.
template <class T, int kDim>
__global__ void __launch_bounds__(kThreads, kTogether<T, kDim>)
    rows_keys_backward_kernel(AttentionBackward args, const float* deltas) {
  using W = Warp<T, kDim, false>;
  const AttentionShape& shape = args.shape;
  const W w(shape);
  if (!w.any) return;
  Kept<true> kept(shape, w);
  const float scale = static_cast<float>(shape.softmax_scale), scale_2 = log2_scale(shape);
  typename W::Numbers row[2], grads[2] = {};  // k and v
  w.read(row[0], args.k);
  w.read(row[1], args.v);
  for (int from = 0; from < w.length; from += kChunk) {
    const int count = min(w.length - from, kChunk);
    float product[2] = {};
    w.products(product, row, {args.q, args.dout}, from, count);
    const float factor = kept.factor(from, w.own);
    float ds = 0.0f, used = 0.0f;
    if (w.own < count) {
      const int64_t query = w.head * shape.total + w.begin + from + w.own;
      const float weight = Statistics(args.stats, query).weight(product[0], scale_2);
      ds = weight * (product[1] * factor - deltas[query]) * scale;
      used = weight * factor;
    }
    w.add(grads, 1.0f, {ds, used}, {args.q, args.dout}, from, count);
  }
  w.write_sum(args.dk, grads[0], 1.0f);
  w.write_sum(args.dv, grads[1], 1.0f);
}

// All rows in 16 bits are for tensor cores, but of head_dim 256: their tiles would not fit.
template <class T, int kDim>
constexpr bool kAllRows = sizeof(T) == 4 || kDim == 256;

// Calls launch(T{}, integral head_dim, whether one query a sequence, grid), unless there is nothing to do:
// rows that belong to no sequence are left as they are.
template <class F>
int dispatch(const AttentionShape& shape, bool cls, F launch) {
  const int64_t tasks = (cls ? shape.sequences : shape.total) * shape.heads;
  if (shape.sequences == 0 || tasks == 0) return 0;
  const dim3 grid(static_cast<unsigned>((tasks + kWarps - 1) / kWarps));
  return by_head_dim<256>(shape, [&](auto dim) {
    const auto with = [&](auto element) {
      if (cls) return launch(element, dim, std::true_type{}, grid);
      if constexpr (kAllRows<decltype(element), dim.value>)
        return launch(element, dim, std::false_type{}, grid);
      else
        return static_cast<int>(cudaErrorInvalidValue);
    };
    if (shape.dtype == Dtype::kFloat32) return with(float{});
    if (shape.dtype == Dtype::kBFloat16) return with(__nv_bfloat16{});
    if (shape.dtype == Dtype::kFloat16) return with(__half{});
    return static_cast<int>(cudaErrorInvalidValue);
  });
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_rows_forward(const mtfast::AttentionForward* args, int cls,
                                                    void* stream) {
  using namespace mtfast::attention;
  return dispatch(args->shape, cls, [&](auto element, auto dim, auto one_query, dim3 grid) {
    return MTFAST_LAUNCH(grid, dim3(kThreads), 0, stream,
                         (rows_forward_kernel<decltype(element), dim.value, one_query.value>), *args);
  });
}

extern "C" int mtfast_packed_attention_rows_backward(const mtfast::AttentionBackward* args, int cls,
                                                     float* delta, void* stream) {
  using namespace mtfast::attention;
  return dispatch(args->shape, cls, [&](auto element, auto dim, auto one_query, dim3 grid) {
    int error =
        MTFAST_LAUNCH(grid, dim3(kThreads), 0, stream,
                      (rows_backward_kernel<decltype(element), dim.value, one_query.value>), *args, delta);
    if constexpr (!one_query.value) {
      if (error == 0)
        error = MTFAST_LAUNCH(grid, dim3(kThreads), 0, stream,
                              (rows_keys_backward_kernel<decltype(element), dim.value>), *args, delta);
    }
    return error;
  });
}
