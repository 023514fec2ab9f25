// Packed attention, backward. With P = softmax(S), D the dropout factors and delta = rowsum(dout * out):
//   dv = (P D)^T dout,  dP = (dout v^T) D,  dS = P (dP - delta),  dq = scale dS k,  dk = scale dS^T q.
// Query strips give dq, key strips dk and dv, each from recomputed scores and each written once: no atomics.
// Where all sequences are short one block does both on the tiles it holds; else queries come first and leave
// delta behind.
#include <type_traits>

#include "packed_attention.cuh"

namespace mtfast::attention {
namespace {

enum class Part { kBoth, kQueries, kKeys };

template <class T, int kDim>
struct Backward {
  using L = Launch<T, kDim>;
  static constexpr int kRows = Tile<T, kDim>::kMaxRows;
  static constexpr size_t kBytes = 4 * L::kTile + 2 * kRows * 4 + L::kPlan + L::kScratch;

  const AttentionBackward& args;
  Tile<T, kDim> q, k, v, dout;
  float *lse, *delta;  // of the tile's queries
  float* global_delta;
  Plan& plan;
  float* scratch;
  int head;
  Dropout dropout;
  float scale;

  __device__ Backward(const AttentionBackward& args, float* global_delta, unsigned char* shared, int head)
      : args(args),
        q{reinterpret_cast<T*>(shared)},
        k{reinterpret_cast<T*>(shared + L::kTile)},
        v{reinterpret_cast<T*>(shared + 2 * L::kTile)},
        dout{reinterpret_cast<T*>(shared + 3 * L::kTile)},
        lse(reinterpret_cast<float*>(shared + 4 * L::kTile)),
        delta(lse + kRows),
        global_delta(global_delta),
        plan(*reinterpret_cast<Plan*>(delta + kRows)),
        scratch(reinterpret_cast<float*>(shared + 4 * L::kTile + 2 * kRows * 4 + L::kPlan) +
                warp_index() * kScratchPerWarp),
        head(head),
        dropout(args.shape, head),
        scale(static_cast<float>(args.shape.softmax_scale) * kLog2E) {}

  __device__ __forceinline__ int64_t row_number(const Strip& strip, int place) const {
    return head * args.shape.total + strip.begin + place;
  }

  // dq of the strip in rows [16 * i, 16 * i + 16) of the tile.
  __device__ inline void query_strip(int i, bool mine, bool is_long) {
    const Strip strip = plan.strip[mine ? i : 0];
    const int length = uniform(strip.length);
    const int first_row = mine ? 16 * i : 0, g = lane_index() >> 2, t = lane_index() & 3;
    Rows16<T, kDim> queries(q, first_row), gradients(dout, first_row);
    Result16<kDim> dq;
    float row_lse[2], row_delta[2];
    MTFAST_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int place = strip.offset + g + 8 * r;
      const bool inside = place < strip.length;
      row_lse[r] = inside ? static_cast<const float*>(args.lse)[row_number(strip, place)] : 0.0f;
      const T* out =
          head_of<const T>(args.out, head) + (strip.begin + (inside ? place : 0)) * args.out.row_stride;
      float sum = 0.0f;
      MTFAST_UNROLL_2
      for (int n = 0; n < kDim / 8; ++n) {
        const float2 o = pair_of(out + 8 * n + 2 * t),
                     d = pair_of(dout.at(first_row + g + 8 * r, 8 * n + 2 * t));
        sum += o.x * d.x + o.y * d.y;
      }
      row_delta[r] = warp_sum<4>(sum);
      if (mine && t == 0) {
        lse[first_row + g + 8 * r] = row_lse[r];
        delta[first_row + g + 8 * r] = row_delta[r];
        if (inside && global_delta) global_delta[row_number(strip, place)] = row_delta[r];
      }
    }
    for (int from = 0; from < (is_long ? length : 1); from += kPiece) {
      if (is_long) {
        if (from > 0) __syncthreads();
        load_piece(k, head_of<const T>(args.k, head), args.k.row_stride, strip, from);
        load_piece(v, head_of<const T>(args.v, head), args.v.row_stride, strip, from);
        wait_for_loads();
      }
      const int keys = min(length - from, kPiece);
      MTFAST_NO_UNROLL
      for (int key = 0; key < keys && mine; key += 16) {
        Piece16 x, dx;
        queries.times(x, k, strip.first + key);
        gradients.times(dx, v, strip.first + key);
        const uint32_t kept =
            dropout.threshold ? dropout.kept(strip.begin + strip.offset, from + key) : 0xffu;
        MTFAST_UNROLL
        for (int n = 0; n < 2; ++n) MTFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          const bool exists = key + 8 * n + 2 * t + (j & 1) < keys;
          const float p = exists ? Log2(row_lse[j >> 1]).weight(x[n][j], scale) : 0.0f;
          const float dp = kept >> (4 * n + j) & 1 ? dx[n][j] * dropout.scale : 0.0f;
          x[n][j] = p * (dp - row_delta[j >> 1]);
        }
        add_product<T, kDim>(dq, x, k, strip.first + key, scratch);
      }
    }
    const float factor = static_cast<float>(args.shape.softmax_scale);
    if (mine) store_strip<T, kDim>(args.dq, head, strip, dq, factor, factor);
  }

  // dk and dv of the strip in rows [16 * i, 16 * i + 16) of the tile.
  __device__ inline void key_strip(int i, bool mine, bool is_long) {
    const Strip strip = plan.strip[mine ? i : 0];
    const int length = uniform(strip.length);
    const int first_row = mine ? 16 * i : 0, t = lane_index() & 3;
    Rows16<T, kDim> keys(k, first_row), values(v, first_row);
    Result16<kDim> dk, dv;
    for (int from = 0; from < (is_long ? length : 1); from += kPiece) {
      if (is_long) {
        if (from > 0) __syncthreads();
        load_piece(q, head_of<const T>(args.q, head), args.q.row_stride, strip, from);
        load_piece(dout, head_of<const T>(args.dout, head), args.dout.row_stride, strip, from);
        for (int row = threadIdx.x; row < kPiece; row += kThreads) read_statistics(strip, row, from + row);
        wait_for_loads();
      }
      const int queries = min(length - from, kPiece);
      MTFAST_NO_UNROLL
      for (int query = 0; query < queries && mine; query += 16) {
        const int row = strip.first + query;
        Piece16 x, dx;
        keys.times(x, q, row);
        values.times(dx, dout, row);
        const uint32_t kept =
            dropout.threshold ? dropout.kept_transposed(strip.begin + from + query, strip.offset) : 0xffu;
        MTFAST_UNROLL
        for (int n = 0; n < 2; ++n) MTFAST_UNROLL
        for (int j = 0; j < 4; ++j) {
          const int column = row + 8 * n + 2 * t + (j & 1);
          const float p = Log2(lse[column]).weight(x[n][j], scale);
          const bool keep = kept >> (4 * n + j) & 1;
          const float dp = keep ? dx[n][j] * dropout.scale : 0.0f;
          x[n][j] = keep ? p * dropout.scale : 0.0f;
          dx[n][j] = p * (dp - delta[column]);
        }
        add_product<T, kDim>(dv, x, dout, row, scratch);
        add_product<T, kDim>(dk, dx, q, row, scratch);
      }
    }
    const float factor = static_cast<float>(args.shape.softmax_scale);
    if (mine) {
      store_strip<T, kDim>(args.dk, head, strip, dk, factor, factor);
      store_strip<T, kDim>(args.dv, head, strip, dv, 1.0f, 1.0f);
    }
  }

  // lse and delta of tile row `row`, the strip's sequence's query `place`; zeros where there is none.
  __device__ __forceinline__ void read_statistics(const Strip& strip, int row, int place) {
    const bool inside = place < strip.length;
    const int64_t number = row_number(strip, inside ? place : 0);
    lse[row] = inside ? static_cast<const float*>(args.lse)[number] : 0.0f;
    delta[row] = inside ? global_delta[number] : 0.0f;
  }
};

template <class T, int kDim, Part kPart>
__global__ void __launch_bounds__(kThreads, 1) backward_kernel(AttentionBackward args, float* global_delta) {
  const AttentionShape& shape = args.shape;
  const int heads = static_cast<int>(shape.heads), head = static_cast<int>(blockIdx.x) % heads;
  const int window = static_cast<int>(blockIdx.x) / heads * kWindow;
  const int sequences = static_cast<int>(shape.sequences), total = static_cast<int>(shape.total);
  Backward<T, kDim> b(args, global_delta, shared_memory<unsigned char>(), head);
  const int warp = warp_index();
  int cursor = warp == 0 ? max(lower_bound(shape.cu_seqlens, sequences, window) - 1, 0) : 0;
  for (;;) {
    if (warp == 0)
      make_plan<Tile<T, kDim>::kMaxRows, kPart == Part::kBoth>(b.plan, shape.cu_seqlens, sequences, total,
                                                               window, cursor);
    __syncthreads();
    if (b.plan.strips == 0) return;
    cursor = b.plan.next;
    const bool is_long = kPart != Part::kBoth && uniform(b.plan.is_long);
    const int strips = uniform(b.plan.strips);
    if (!is_long || kPart == Part::kQueries) {
      load_strips(b.q, head_of<const T>(args.q, head), args.q.row_stride, b.plan);
      load_strips(b.dout, head_of<const T>(args.dout, head), args.dout.row_stride, b.plan);
    }
    if (!is_long || kPart == Part::kKeys) {
      load_strips(b.k, head_of<const T>(args.k, head), args.k.row_stride, b.plan);
      load_strips(b.v, head_of<const T>(args.v, head), args.v.row_stride, b.plan);
    }
    if (kPart == Part::kKeys && !is_long)
      for (int row = threadIdx.x; row < 16 * b.plan.strips; row += kThreads)
        b.read_statistics(b.plan.strip[row / 16], row, b.plan.strip[row / 16].offset + row % 16);
    wait_for_loads();
    // A long piece has one strip, or none, for each warp, and all warps go through the other side together.
    const int upto = is_long ? kWarps : strips;
    if constexpr (kPart != Part::kKeys) {
      MTFAST_NO_UNROLL
      for (int i = warp; i < upto; i += kWarps) b.query_strip(i, i < strips, is_long);
    }
    if (kPart == Part::kBoth) __syncthreads();
    if constexpr (kPart != Part::kQueries) {
      MTFAST_NO_UNROLL
      for (int i = warp; i < upto; i += kWarps) b.key_strip(i, i < strips, is_long);
    }
    __syncthreads();
  }
}

}  // namespace
}  // namespace mtfast::attention

extern "C" int mtfast_packed_attention_backward(const mtfast::AttentionBackward* args, float* delta,
                                                void* stream) {
  using namespace mtfast;
  using namespace mtfast::attention;
  if (args->shape.total == 0 || args->shape.heads == 0) return 0;
  return dispatch(args->shape, [&](auto element, auto dim) {
    using T = decltype(element);
    constexpr int kDim = dim.value;
    constexpr size_t kBytes = Backward<T, kDim>::kBytes;
    const auto launch = [&](auto kernel, float* global_delta) {
      if (const int error = allow_shared_memory(kernel, kBytes)) return error;
      return MTFAST_LAUNCH((Launch<T, kDim>::grid(args->shape)), dim3(kThreads), kBytes, stream, kernel,
                           *args, global_delta);
    };
    if (args->shape.max_seqlen <= kPiece) return launch(backward_kernel<T, kDim, Part::kBoth>, nullptr);
    if (const int error = launch(backward_kernel<T, kDim, Part::kQueries>, delta)) return error;
    return launch(backward_kernel<T, kDim, Part::kKeys>, delta);
  });
}
