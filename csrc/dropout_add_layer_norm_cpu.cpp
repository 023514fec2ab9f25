// dropout_add_layer_norm on the CPU: one vectorised, threaded pass over the rows in each direction. What a
// pass has of a row it keeps in the first-level cache until it is through with it.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "dropout_add_layer_norm.h"
#include "simd_isa.h"

namespace mtfast::dropout_add_layer_norm {
namespace {

using namespace simd;

constexpr int kStrip = 128;   // columns that one vector of sixteen Philox calls serves
constexpr int kFewRows = 4;   // rows of a backward at a time, whose terms of a column's sums are added first
constexpr int kSumRows = 64;  // rows whose sums are one term of the sum over all

int64_t padded(int64_t hidden) { return (hidden + kStrip - 1) / kStrip * kStrip; }

// ---- dropout ----

typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x4 __attribute__((vector_size(16)));

// The four words of sixteen calls, each call's together: a transpose of every four lanes in vectors as wide
// as the machine's, whose call c is in the lane whose number lane_of(c) is.
template <class V>
struct Transpose {
  static constexpr int kWidth = sizeof(V) / sizeof(uint32_t), kQuads = kWidth / 4;

  MTFAST_INLINE u32x16 call_of_lane() {
    u32x16 call = {};
#pragma GCC unroll 16
    for (int i = 0; i < kLanes; ++i) call[i] = i / kWidth * kWidth + i % 4 * kQuads + i % kWidth / 4;
    return call;
  }

  MTFAST_INLINE void store(uint16_t* to, const u32x16 (&words)[4]) {
#pragma GCC unroll 4
    for (int part = 0; part < kLanes / kWidth; ++part) {
      V w[4];
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i)
        std::memcpy(&w[i], reinterpret_cast<const char*>(&words[i]) + part * sizeof(V), sizeof(V));
      V pairs, others, low, high;  // of two vectors a, b: a0 b0 a1 b1, a2 b2 a3 b3, a0 a1 b0 b1, a2 a3 b2 b3
#pragma GCC unroll 16
      for (int i = 0; i < kWidth; ++i) {
        const int first = i / 4 * 4;
        pairs[i] = first + i % 4 / 2 + i % 2 * kWidth;
        others[i] = pairs[i] + 2;
        low[i] = first + i % 2 + i % 4 / 2 * kWidth;
        high[i] = low[i] + 2;
      }
      const V a = __builtin_shuffle(w[0], w[1], pairs), b = __builtin_shuffle(w[2], w[3], pairs);
      const V c = __builtin_shuffle(w[0], w[1], others), d = __builtin_shuffle(w[2], w[3], others);
      const V out[4] = {__builtin_shuffle(a, b, low), __builtin_shuffle(a, b, high),
                        __builtin_shuffle(c, d, low), __builtin_shuffle(c, d, high)};
      std::memcpy(to + part * sizeof out / sizeof *to, out, sizeof out);
    }
  }
};

// The draws of a row, as many as `padded` says.
template <Isa isa>
MTFAST_INLINE void draw_row(uint64_t seed, int64_t row, int64_t hidden, uint16_t* draws) {
  using Words = Transpose<
      std::conditional_t<isa == Isa::kAvx512, u32x16, std::conditional_t<isa == Isa::kAvx2, u32x8, u32x4>>>;
  const u32x16 calls = Words::call_of_lane();
  for (int64_t first = 0; first < hidden; first += kStrip) {
    u32x16 words[4];
    philox16<isa>(seed, calls + static_cast<uint32_t>(first / 8), u32x16{} + static_cast<uint32_t>(row), 0,
                  Purpose::kDropoutAddLayerNorm, words);
    Words::store(draws + first, words);
  }
}

// scale * x where kept, 0 where dropped, whatever x is. The bits of the product are selected, so that it is
// rounded in both directions: of rows without variance they would otherwise see different sums.
template <Isa isa, class V>
MTFAST_INLINE V drop(const Layer& layer, const uint16_t* draws, V x) {
  using Bits = std::conditional_t<sizeof(V) == sizeof(i32x16), i32x16, i64x16>;
  u16x16 draw;
  std::memcpy(&draw, draws, sizeof draw);
  const Bits scaled = reinterpret_cast<Bits>(x * splat<V>(layer.scale));
  return reinterpret_cast<V>(select<isa, Less>(__builtin_convertvector(draw, i32x16),
                                               i32x16{} + static_cast<int32_t>(layer.threshold), Bits{},
                                               scaled));
}

// ---- what both directions read ----

template <class T>
struct Rows {
  using S = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;

  Layer layer;
  uint64_t seed;
  const T *x, *residual;
  const S *weight, *bias, *x_bias;  // padded with zeros to whole strips

  // Sixteen columns of s, of which `count` are there; the others are 0.
  template <Isa isa>
  MTFAST_HOST_DEVICE V sum(int64_t row, int64_t column, int64_t count, const uint16_t* draws) const {
    const int64_t at = row * layer.hidden + column;
    V s = load(x + at, count) + unpack(x_bias + column);
    if (layer.threshold != 0) s = drop<isa>(layer, draws + column, s);
    return residual == nullptr ? s : s + load(residual + at, count);
  }
  // Asks for what a pass will read of a row: a row is too short for the processor to see where it goes on.
  MTFAST_HOST_DEVICE void prefetch(int64_t row, int64_t column) const {
    __builtin_prefetch(x + row * layer.hidden + column);
    if (residual != nullptr) __builtin_prefetch(residual + row * layer.hidden + column);
  }
};

// ---- forward ----

// `scratch` has room for a row, `draws` for its draws.
template <class T>
struct ForwardRows {
  using S = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  template <Isa isa>
  MTFAST_INLINE void run(const Rows<T>& from, T* y, S* stats, S* scratch, uint16_t* draws, int64_t begin,
                         int64_t end) {
    const Rows<T> in = from;  // which no store can change
    const int64_t hidden = in.layer.hidden, whole = hidden / kLanes * kLanes, rest = hidden - whole;
    const S size = static_cast<S>(hidden);
    for (int64_t row = begin; row < end; ++row) {
      if (in.layer.threshold != 0) draw_row<isa>(in.seed, row, hidden, draws);
      V total = {};
      for (int64_t column = 0; column < whole; column += kLanes)
        total += keep(scratch + column, in.template sum<isa>(row, column, kLanes, draws));
      if (rest > 0) total += keep(scratch + whole, in.template sum<isa>(row, whole, rest, draws));
      // Deviations from this mean give the variance, and what rounding left the mean itself off by (Chan,
      // Golub and LeVeque, "Algorithms for computing the sample variance", 1983).
      const S near = simd::sum(total) / size;
      V off = {}, squares = {};
      for (int64_t column = 0; column < whole; column += kLanes) {
        in.prefetch(row + 1, column);
        add_deviation(unpack(scratch + column) - near, off, squares);
      }
      if (rest > 0) add_deviation(first_lanes<isa>(rest, unpack(scratch + whole) - near), off, squares);
      const S shift = simd::sum(off) / size, spread = simd::sum(squares) / size - shift * shift;
      const S variance = spread < 0 ? 0 : spread, mean = near + shift;
      const S rstd = 1 / std::sqrt(variance + static_cast<S>(in.layer.eps));
      T* to = y + row * hidden;
      for (int64_t column = 0; column < whole; column += kLanes)
        pack(to + column, result(in, column, (unpack(scratch + column) - mean) * rstd));
      if (rest > 0) store(to + whole, result(in, whole, (unpack(scratch + whole) - mean) * rstd), rest);
      if (stats != nullptr) stats[2 * row] = mean, stats[2 * row + 1] = rstd;
    }
  }

 private:
  MTFAST_INLINE V keep(S* to, V x) {
    pack(to, x);
    return x;
  }
  MTFAST_INLINE void add_deviation(V deviation, V& sum, V& squares) {
    sum += deviation;
    squares += deviation * deviation;
  }
  template <Isa isa>
  MTFAST_INLINE V first_lanes(int64_t count, V x) {
    const i32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return select<isa, Less>(lanes, i32x16{} + static_cast<int32_t>(count), x, V{});
  }
  MTFAST_INLINE V result(const Rows<T>& in, int64_t column, V normal) {
    return normal * unpack(in.weight + column) + unpack(in.bias + column);
  }
};

// ---- backward ----

// What a backward reads besides, and writes. `sums` is [kSums, stride] of a chunk of rows, `scratch` has room
// for two values of kFewRows rows, `draws` for those rows' draws.
template <class T>
struct Back {
  using S = typename Compute<T>::scalar;
  const T* dy;
  const S* stats;
  T *dx, *dresidual;
  S *sums, *scratch;
  uint16_t* draws;
};

// kRows rows from `row` on: first what is summed over their columns, then, with that, their gradients.
template <class T, int kRows>
struct FewRows {
  using S = typename Compute<T>::scalar;
  using V = typename Compute<T>::vec;
  const Rows<T> in;
  const Back<T> back;
  const int64_t row, stride;
  S mean[kRows], rstd[kRows];
  V along_one[kRows], along_normal[kRows];  // of dy * weight, sums
  S mean_one[kRows], mean_normal[kRows];    // and means

  template <Isa isa>
  MTFAST_HOST_DEVICE void run() {
    const int64_t hidden = in.layer.hidden, whole = hidden / kLanes * kLanes, rest = hidden - whole;
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      if (in.layer.threshold != 0) draw_row<isa>(in.seed, row + i, hidden, back.draws + i * stride);
      mean[i] = back.stats[2 * (row + i)], rstd[i] = back.stats[2 * (row + i) + 1];
      along_one[i] = along_normal[i] = V{};
    }
    for (int64_t column = 0; column < whole; column += kLanes) add_up<isa>(column, kLanes);
    if (rest > 0) add_up<isa>(whole, rest);
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      mean_one[i] = sum(along_one[i]) / static_cast<S>(hidden);
      mean_normal[i] = sum(along_normal[i]) / static_cast<S>(hidden);
    }
    for (int64_t column = 0; column < whole; column += kLanes) write<isa>(column, kLanes);
    if (rest > 0) write<isa>(whole, rest);
  }

 private:
  MTFAST_HOST_DEVICE S* normals(int i) const { return back.scratch + 2 * i * stride; }
  MTFAST_HOST_DEVICE S* to_normals(int i) const { return normals(i) + stride; }

  template <Isa isa>
  MTFAST_HOST_DEVICE void add_up(int64_t column, int64_t count) {
    const V weight = unpack(in.weight + column);
    V dweight = {}, dbias = {};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const V s = in.template sum<isa>(row + i, column, count, back.draws + i * stride);
      const V dy = load(back.dy + (row + i) * in.layer.hidden + column, count);
      const V normal = (s - mean[i]) * rstd[i], to_normal = dy * weight;
      pack(normals(i) + column, normal);
      pack(to_normals(i) + column, to_normal);
      dweight += dy * normal;
      dbias += dy;
      along_one[i] += to_normal;
      along_normal[i] += to_normal * normal;
    }
    add(kWeight, column, dweight);
    add(kBias, column, dbias);
  }

  template <Isa isa>
  MTFAST_HOST_DEVICE void write(int64_t column, int64_t count) {
    V dx_bias = {};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      const int64_t at = (row + i) * in.layer.hidden + column;
      in.prefetch(row + i + kRows, column);
      __builtin_prefetch(back.dy + at + kRows * in.layer.hidden);
      const V normal = unpack(normals(i) + column), to_normal = unpack(to_normals(i) + column);
      V grad = (to_normal - mean_one[i] - normal * mean_normal[i]) * rstd[i];
      if (back.dresidual != nullptr) store(back.dresidual + at, grad, count);
      if (in.layer.threshold != 0) grad = drop<isa>(in.layer, back.draws + i * stride + column, grad);
      if (back.dx != nullptr) store(back.dx + at, grad, count);
      dx_bias += grad;
    }
    add(kXBias, column, dx_bias);
  }

  MTFAST_HOST_DEVICE void add(Sum which, int64_t column, V x) const {
    S* to = back.sums + which * stride + column;
    pack(to, unpack(to) + x);
  }
};

template <class T>
struct BackwardRows {
  template <Isa isa>
  MTFAST_INLINE void run(const Rows<T>& in, const Back<T>& back, int64_t begin, int64_t end) {
    const int64_t stride = padded(in.layer.hidden);
    for (; begin + kFewRows <= end; begin += kFewRows)
      FewRows<T, kFewRows>{in, back, begin, stride}.template run<isa>();
    for (; begin < end; ++begin) FewRows<T, 1>{in, back, begin, stride}.template run<isa>();
  }
};

// to [hidden] = the sum of `chunks` vectors, each `size` after the one before, made in double.
template <class T>
struct AddChunks {
  using V = typename Compute<T>::vec;
  template <Isa isa>
  MTFAST_INLINE void run(const typename Compute<T>::scalar* sums, int64_t chunks, int64_t size, T* to,
                         int64_t hidden) {
    for (int64_t column = 0; column < hidden; column += kLanes) {
      f64x16 total = {};
      for (int64_t chunk = 0; chunk < chunks; ++chunk)
        total += __builtin_convertvector(unpack(sums + chunk * size + column), f64x16);
      store(to + column, __builtin_convertvector(total, V), hidden - column);
    }
  }
};

// ---- all rows ----

// A vector in the type of the arithmetic, or zeros, padded with zeros to whole strips.
template <class T>
auto widened(int64_t hidden, const void* from) {
  std::vector<typename Compute<T>::scalar> to(padded(hidden));
  for (int64_t i = 0; from != nullptr && i < hidden; i += kLanes)
    pack(to.data() + i, load(static_cast<const T*>(from) + i, hidden - i));
  return to;
}

template <class T>
struct Widened {
  std::vector<typename Compute<T>::scalar> weight, bias, x_bias;
  Rows<T> rows;

  explicit Widened(const Inputs& in)
      : weight(widened<T>(in.layer.hidden, in.weight)),
        bias(widened<T>(in.layer.hidden, in.bias)),
        x_bias(widened<T>(in.layer.hidden, in.x_bias)),
        rows{in.layer,
             in.layer.threshold != 0 ? static_cast<uint64_t>(*in.layer.seed) : 0,
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
    using S = typename Compute<T>::scalar;
    const Widened<T> from(in);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, in.layer.hidden));
    torch::stable::parallel_for(0, in.layer.rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<S> scratch(padded(in.layer.hidden));
      std::vector<uint16_t> draws(scratch.size());
      call_best(ForwardRows<T>{}, from.rows, static_cast<T*>(y), static_cast<S*>(stats), scratch.data(),
                draws.data(), begin, end);
    });
  });
}

void cpu_backward(const Inputs& in, const void* dy, const void* stats, const Gradients& to) {
  for_dtype(in.layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = typename Compute<T>::scalar;
    const Widened<T> from(in);
    // Sums over fixed chunks of rows, added in order: the same bits for every number of threads.
    const int64_t hidden = in.layer.hidden, stride = padded(hidden), size = kSums * stride;
    const int64_t chunks = (in.layer.rows + kSumRows - 1) / kSumRows;
    std::vector<S> sums(chunks * size);
    torch::stable::parallel_for(0, chunks, 1, [&](int64_t begin, int64_t end) {
      std::vector<S> scratch(2 * kFewRows * stride);
      std::vector<uint16_t> draws(kFewRows * stride);
      for (int64_t chunk = begin; chunk < end; ++chunk) {
        const Back<T> back{static_cast<const T*>(dy),
                           static_cast<const S*>(stats),
                           static_cast<T*>(to.dx),
                           static_cast<T*>(to.dresidual),
                           sums.data() + chunk * size,
                           scratch.data(),
                           draws.data()};
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
