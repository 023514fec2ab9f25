// dropout_add_layer_norm on the CPU: one vectorised, threaded pass over the rows in each direction. What a
// pass has of a row it keeps in the first-level cache until it is through with it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dropout_add_layer_norm.h"
#include "row_draws.h"
#include "simd_pairs.h"

namespace mtfast::dropout_add_layer_norm {
namespace {

using namespace simd;

constexpr int kFewRows = 4;    // rows at a time: while one's sums are waited for, others go on
constexpr int kLongRow = 512;  // columns from which on a forward waits for memory instead, and takes one row
constexpr int kSumRows = 64;   // rows whose sums are one term of the sum over all

int64_t draws_of(int64_t hidden) {
  return (hidden + RowDraws::kColumns - 1) / RowDraws::kColumns * RowDraws::kColumns;
}

// scale * x where kept, 0 where dropped, whatever x is. The bits of the product are selected, so that it is
// rounded in both directions: of rows without variance they would otherwise see different sums.
template <Isa isa, class V>
MTFAST_INLINE V drop(const Layer& layer, i32x16 draw, V x) {
  using Bits = std::conditional_t<sizeof(V) == sizeof(i32x16), i32x16, i64x16>;
  const Bits scaled = reinterpret_cast<Bits>(x * splat<V>(layer.scale));
  return reinterpret_cast<V>(
      select<isa, Less>(draw, i32x16{} + static_cast<int32_t>(layer.threshold), Bits{}, scaled));
}

// Of two vectors of T, whose columns' draws these are.
template <Isa isa, class T>
MTFAST_INLINE void drop_two(const Layer& layer, const uint16_t* draws, Vec<T> (&x)[2]) {
  i32x16 draw[2];
  if constexpr (std::is_same_v<T, bf16>) {
    u32x16 both;
    std::memcpy(&both, draws, sizeof both);
    draw[0] = reinterpret_cast<i32x16>(both & 0xffffu);
    draw[1] = reinterpret_cast<i32x16>(both >> 16);
  } else {
    u16x16 part[2];
    std::memcpy(part, draws, sizeof part);
    draw[0] = __builtin_convertvector(part[0], i32x16);
    draw[1] = __builtin_convertvector(part[1], i32x16);
  }
  x[0] = drop<isa>(layer, draw[0], x[0]);
  x[1] = drop<isa>(layer, draw[1], x[1]);
}

// ---- what both directions read ----

template <class T>
struct Rows {
  using S = Scalar<T>;
  using V = Vec<T>;

  Layer layer;
  const RowDraws& row_draws;
  const T *x, *residual;
  const S *weight, *bias, *x_bias;  // as `widened` makes them

  // A step of s, of which `count` columns are there.
  template <Isa isa>
  MTFAST_INLINE void sum(const Rows& in, V (&s)[2], int64_t row, int64_t column, int64_t count,
                         const uint16_t* draws) {
    const int64_t at = row * in.layer.hidden + column;
    load_two(s, in.x + at, count);
    for (int n = 0; n < 2; ++n) s[n] += unpack(in.x_bias + column + n * kLanes);
    if (in.layer.threshold != 0) drop_two<isa, T>(in.layer, draws + column, s);
    if (in.residual == nullptr) return;
    V residual[2];
    load_two(residual, in.residual + at, count);
    for (int n = 0; n < 2; ++n) s[n] += residual[n];
  }
  // Asks for what a pass will read of a row: a row is too short for the processor to see where it goes on.
  MTFAST_HOST_DEVICE void prefetch(int64_t row, int64_t column) const {
    __builtin_prefetch(x + row * layer.hidden + column);
    if (residual != nullptr) __builtin_prefetch(residual + row * layer.hidden + column);
  }
};

// Room for kFewRows rows.
template <class T>
struct Scratch {
  Scalar<T>* values;  // [kFewRows, padded(hidden)]; twice that for a backward
  uint16_t* draws;    // [kFewRows, draws_of(hidden)]
};

// Sixteen of the columns that are there, from `column` on, in the order of steps: 0 where there is none.
template <Isa isa, class T>
MTFAST_INLINE Vec<T> if_there(Vec<T> x, int n, int64_t count) {
  if (count >= kStep) return x;
  const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const i32x16 column = std::is_same_v<T, bf16> ? lanes * 2 + n : lanes + n * kLanes;
  return select<isa, Less>(column, i32x16{} + static_cast<int32_t>(count), x, Vec<T>{});
}

// step(column, count) for each step of a row: a loop of whole ones, and what is left.
template <class F>
MTFAST_INLINE void for_steps(int64_t hidden, const F& step) {
  const int64_t whole = hidden / kStep * kStep;
  for (int64_t column = 0; column < whole; column += kStep) step(column, kStep);
  if (whole < hidden) step(whole, hidden - whole);
}

// ---- forward ----

template <class T>
struct ForwardRows {
  static constexpr bool kStoresBf16 = std::is_same_v<T, bf16>;
  template <Isa isa>
  MTFAST_INLINE void run(const Rows<T>& in, T* y, Scalar<T>* stats, const Scratch<T>& scratch, int64_t begin,
                         int64_t end) {
    if (in.layer.hidden < kLongRow)
      for (; begin + kFewRows <= end; begin += kFewRows) few<kFewRows, isa>(in, y, stats, scratch, begin);
    for (; begin < end; ++begin) few<1, isa>(in, y, stats, scratch, begin);
  }

 private:
  using S = Scalar<T>;
  using V = Vec<T>;

  // kRows rows from `row` on.
  template <int kRows, Isa isa>
  MTFAST_INLINE void few(const Rows<T>& from, T* y, S* stats, const Scratch<T>& scratch, int64_t row) {
    const Rows<T> in = from;  // which no store can change
    const int64_t hidden = in.layer.hidden, stride = padded(hidden), draws = draws_of(hidden);
    S* const values = scratch.values;
    const S size = static_cast<S>(hidden);
    if (in.layer.threshold != 0)
      for (int i = 0; i < kRows; ++i) RowDraws::draw<isa>(in.row_draws, row + i, scratch.draws + i * draws);
    V total[kRows] = {};
    const auto sum_up = [&](int64_t column, int64_t count) MTFAST_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        V s[2];
        Rows<T>::template sum<isa>(in, s, row + i, column, count, scratch.draws + i * draws);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          pack(values + i * stride + column + n * kLanes, s[n]);
          total[i] += if_there<isa, T>(s[n], n, count);
        }
      }
    };
    for_steps(hidden, sum_up);
    // Deviations from this mean give the variance, and what rounding left the mean itself off by (Chan,
    // Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
    S mean[kRows], rstd[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) mean[i] = simd::sum(total[i]) / size;
    V off[kRows] = {}, squares[kRows] = {};
    const auto deviate = [&](int64_t column, int64_t count) MTFAST_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        in.prefetch(row + i + kRows, column);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const V s = unpack(values + i * stride + column + n * kLanes);
          const V deviation = if_there<isa, T>(s - mean[i], n, count);
          off[i] += deviation;
          squares[i] += deviation * deviation;
        }
      }
    };
    for_steps(hidden, deviate);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const S shift = simd::sum(off[i]) / size, spread = simd::sum(squares[i]) / size - shift * shift;
      mean[i] += shift;
      rstd[i] = 1 / std::sqrt((spread < 0 ? 0 : spread) + static_cast<S>(in.layer.eps));
      if (stats != nullptr) stats[2 * (row + i)] = mean[i], stats[2 * (row + i) + 1] = rstd[i];
    }
    const auto write = [&](int64_t column, int64_t count) MTFAST_INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        V out[2];
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const int64_t at = column + n * kLanes;
          const V normal = (unpack(values + i * stride + at) - mean[i]) * rstd[i];
          out[n] = normal * unpack(in.weight + at) + unpack(in.bias + at);
        }
        store_two<isa>(y + (row + i) * hidden + column, out, count);
      }
    };
    for_steps(hidden, write);
  }
};

// ---- backward ----

// What a backward reads besides, and writes. `sums` is [kSums, padded(hidden)] of a chunk of rows.
template <class T>
struct Back {
  const T* dy;
  const Scalar<T>* stats;
  T *dx, *dresidual;
  Scalar<T>* sums;
  Scratch<T> scratch;
};

template <class T>
struct BackwardRows {
  static constexpr bool kStoresBf16 = std::is_same_v<T, bf16>;
  template <Isa isa>
  MTFAST_INLINE void run(const Rows<T>& in, const Back<T>& back, int64_t begin, int64_t end) {
    for (; begin + kFewRows <= end; begin += kFewRows) few<kFewRows, isa>(in, back, begin);
    for (; begin < end; ++begin) few<1, isa>(in, back, begin);
  }

 private:
  using S = Scalar<T>;
  using V = Vec<T>;
  // dy * weight is then made again rather than kept: fused into a sum, it is still what the means are of.
  static constexpr bool kProductIsExact = sizeof(T) == 2;

  // kRows rows from `row` on: first what is summed over their columns, then, with that, their gradients. The
  // rows' terms of a column's sums are added first.
  template <int kRows, Isa isa>
  MTFAST_INLINE void few(const Rows<T>& from, const Back<T>& given, int64_t row) {
    const Rows<T> in = from;
    const Back<T> back = given;  // which no store can change
    const int64_t hidden = in.layer.hidden, stride = padded(hidden), draws = draws_of(hidden);
    S mean[kRows], rstd[kRows];
    for (int i = 0; i < kRows; ++i) {
      if (in.layer.threshold != 0) RowDraws::draw<isa>(in.row_draws, row + i, back.scratch.draws + i * draws);
      mean[i] = back.stats[2 * (row + i)], rstd[i] = back.stats[2 * (row + i) + 1];
    }
    V along_one[kRows] = {}, along_normal[kRows] = {};  // of dy * weight
    const auto add_up = [&](int64_t column, int64_t count) MTFAST_INLINE_LAMBDA {
      V dweight[2] = {}, dbias[2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        V s[2], dy[2];
        Rows<T>::template sum<isa>(in, s, row + i, column, count, back.scratch.draws + i * draws);
        load_two(dy, back.dy + (row + i) * hidden + column, count);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const int64_t at = column + n * kLanes;
          const V normal = (s[n] - mean[i]) * rstd[i], to_normal = dy[n] * unpack(in.weight + at);
          pack(back.scratch.values + i * stride + at, normal);
          if (!kProductIsExact) pack(back.scratch.values + (kRows + i) * stride + at, to_normal);
          dweight[n] += dy[n] * normal;
          dbias[n] += dy[n];
          along_one[i] += to_normal;
          along_normal[i] += to_normal * normal;
        }
      }
      add_two(back.sums + kWeight * stride + column, dweight);
      add_two(back.sums + kBias * stride + column, dbias);
    };
    for_steps(hidden, add_up);
    S mean_one[kRows], mean_normal[kRows];
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      mean_one[i] = sum(along_one[i]) / static_cast<S>(hidden);
      mean_normal[i] = sum(along_normal[i]) / static_cast<S>(hidden);
    }
    const auto write = [&](int64_t column, int64_t count) MTFAST_INLINE_LAMBDA {
      V dx_bias[2] = {};
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) {
        const int64_t at = (row + i) * hidden + column;
        in.prefetch(row + i + kRows, column);
        __builtin_prefetch(back.dy + at + kRows * hidden);
        V grad[2];
        load_two(grad, back.dy + at, count);
#pragma GCC unroll 2
        for (int n = 0; n < 2; ++n) {
          const int64_t lanes = column + n * kLanes;
          const V normal = unpack(back.scratch.values + i * stride + lanes);
          const V to_normal = kProductIsExact ? grad[n] * unpack(in.weight + lanes)
                                              : unpack(back.scratch.values + (kRows + i) * stride + lanes);
          grad[n] = (to_normal - mean_one[i] - normal * mean_normal[i]) * rstd[i];
        }
        if (back.dresidual != nullptr) store_two<isa>(back.dresidual + at, grad, count);
        if (in.layer.threshold != 0)
          drop_two<isa, T>(in.layer, back.scratch.draws + i * draws + column, grad);
        if (back.dx != nullptr) store_two<isa>(back.dx + at, grad, count);
        for (int n = 0; n < 2; ++n) dx_bias[n] += grad[n];
      }
      add_two(back.sums + kXBias * stride + column, dx_bias);
    };
    for_steps(hidden, write);
  }

  MTFAST_INLINE void add_two(S* to, const V (&x)[2]) {
    for (int n = 0; n < 2; ++n) pack(to + n * kLanes, unpack(to + n * kLanes) + x[n]);
  }
};

// to [hidden] = the sum of `chunks` vectors, each `size` after the one before, made in double.
template <class T>
struct AddChunks {
  template <Isa isa>
  MTFAST_INLINE void run(const Scalar<T>* sums, int64_t chunks, int64_t size, T* to, int64_t hidden) {
    for (int64_t column = 0; column < hidden; column += kStep) {
      Vec<T> out[2];
      for (int n = 0; n < 2; ++n) {
        f64x16 total = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk)
          total += __builtin_convertvector(unpack(sums + chunk * size + column + n * kLanes), f64x16);
        out[n] = __builtin_convertvector(total, Vec<T>);
      }
      store_two<isa>(to + column, out, hidden - column);
    }
  }
};

// ---- all rows ----

template <class T>
struct Widened {
  RowDraws draws;
  std::vector<Scalar<T>> weight, bias, x_bias;
  Rows<T> rows;

  explicit Widened(const Inputs& in)
      : draws(in.layer.threshold != 0 ? RowDraws(*in.layer.seed, in.layer.hidden) : RowDraws(0, 0)),
        weight(widened<T>(in.weight, in.layer.hidden)),
        bias(widened<T>(in.bias, in.layer.hidden)),
        x_bias(widened<T>(in.x_bias, in.layer.hidden)),
        rows{in.layer,
             draws,
             static_cast<const T*>(in.x),
             static_cast<const T*>(in.residual),
             weight.data(),
             bias.data(),
             x_bias.data()} {}
};

}  // namespace

void cpu_forward(const Inputs& in, void* y, void* stats) {
  for_dtype(in.layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const Widened<T> from(in);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, in.layer.hidden));
    torch::stable::parallel_for(0, in.layer.rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<S> values(kFewRows * padded(in.layer.hidden));
      std::vector<uint16_t> draws(kFewRows * draws_of(in.layer.hidden));
      call_best(ForwardRows<T>{}, from.rows, static_cast<T*>(y), static_cast<S*>(stats),
                Scratch<T>{values.data(), draws.data()}, begin, end);
    });
  });
}

void cpu_backward(const Inputs& in, const void* dy, const void* stats, const Gradients& to) {
  for_dtype(in.layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = Scalar<T>;
    const Widened<T> from(in);
    // Sums over fixed chunks of rows, added in order: the same bits for every number of threads.
    const int64_t hidden = in.layer.hidden, stride = padded(hidden), size = kSums * stride;
    const int64_t chunks = (in.layer.rows + kSumRows - 1) / kSumRows;
    std::vector<S> sums(chunks * size);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<S> values(2 * kFewRows * stride);
      std::vector<uint16_t> draws(kFewRows * draws_of(hidden));
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const Back<T> back{static_cast<const T*>(dy),  static_cast<const S*>(stats),
                           static_cast<T*>(to.dx),     static_cast<T*>(to.dresidual),
                           sums.data() + chunk * size, {values.data(), draws.data()}};
        call_best(BackwardRows<T>{}, from.rows, back, chunk * kSumRows,
                  std::min(in.layer.rows, (chunk + 1) * kSumRows));
      }
    });
    void* const vectors[kSums] = {to.dweight, to.dbias, to.dx_bias};
    for (int v = 0; v < kSums; ++v)
      if (vectors[v] != nullptr)
        call_best(AddChunks<T>{}, sums.data() + v * stride, chunks, size, static_cast<T*>(vectors[v]),
                  hidden);
  });
}

}  // namespace mtfast::dropout_add_layer_norm
