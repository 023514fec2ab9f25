// concat_mlp on the CPU: one vectorised, threaded pass over the hidden layer in each direction.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "concat_mlp.h"
#include "gelu_simd.h"

namespace mtfast::concat_mlp {
namespace {

using namespace simd;

constexpr int kStrip = 128;  // columns that one vector of sixteen Philox calls serves
constexpr int kStripVectors = kStrip / kLanes;
constexpr int kFewRows = 8;  // rows summed before the sum is carried on in double

// The draws of columns first .. first + 127 of a row, each in the upper half of its lane.
template <Isa isa>
MTFAST_INLINE void draw_strip(uint64_t seed, int64_t row, int64_t first, u32x16 (&draws)[kStripVectors]) {
  const u32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  u32x16 words[4];
  philox16<isa>(seed, lanes + static_cast<uint32_t>(first / 8), u32x16{} + static_cast<uint32_t>(row), 0,
                Purpose::kConcatMlpDropout, words);
  // Four calls serve 32 columns, each with two neighbours of every 8.
  const u32x16 call = {0, 0, 1, 1, 2, 2, 3, 3, 16, 16, 17, 17, 18, 18, 19, 19};
  const u32x16 to_top = {16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0, 16, 0};
#pragma GCC unroll 8
  for (int j = 0; j < kStripVectors; ++j)
    draws[j] = __builtin_shuffle(words[j % 2 * 2], words[j % 2 * 2 + 1], call + j / 2 * 4u) << to_top;
}

// `scale` where kept, 0 where dropped.
template <Isa isa, class V>
MTFAST_INLINE V keep_factor(u32x16 draws, uint32_t threshold, V scale) {
  return select<isa, Less>(draws, u32x16{} + (threshold << 16), V{}, scale);
}

// h = act(x), and with kSlope dh/dx, as exactly as T can tell.
template <Isa isa, class T, bool kSlope, class V, int kCount>
MTFAST_INLINE void activate(Activation activation, const gelu::Gelu<isa, T>& gelu, V (&x)[kCount],
                            V (&slope)[kCount]) {
  switch (activation) {
    case Activation::kRelu:
      for (int j = 0; j < kCount; ++j) {
        if (kSlope) slope[j] = select<isa, LessEqual>(x[j], V{}, V{}, splat<V>(1));
        x[j] = select<isa, Less>(x[j], V{}, V{}, x[j]);
      }
      break;
    case Activation::kGelu:
      for (int j = 0; j < kCount; ++j) {
        if (kSlope) slope[j] = gelu.slope(gelu, x[j]);
        x[j] = gelu.value(gelu, x[j]);
      }
      break;
    default:  // kTanh
      for (int j = 0; j < kCount; ++j) {
        x[j] = tanh(x[j]);
        if (kSlope) slope[j] = splat<V>(1) - x[j] * x[j];
      }
  }
}

uint64_t seed_of(const Layer& layer) { return layer.threshold != 0 ? static_cast<uint64_t>(*layer.seed) : 0; }

// Rows whose sums are one term of the sum over the batch.
int64_t chunk_rows(int64_t batch) { return std::max<int64_t>(32, (batch + 63) / 64); }

int64_t padded(int64_t inner) { return (inner + kStrip - 1) / kStrip * kStrip; }

// weight2 in the type of the arithmetic, each row padded with zeros to whole strips.
template <class T>
auto widened(const Layer& layer, const void* weight2) {
  const int64_t inner = layer.inner, stride = padded(inner);
  std::vector<typename Compute<T>::scalar> to(layer.outputs * stride);
  for (int o = 0; o < layer.outputs; ++o)
    for (int64_t i = 0; i < inner; i += kLanes)
      pack(to.data() + o * stride + i, load(static_cast<const T*>(weight2) + o * inner + i, inner - i));
  return to;
}

// z: of row `begin` and those after it.
template <class T>
struct ForwardRows {
  using S = typename Compute<T>::scalar;
  template <Isa isa>
  MTFAST_INLINE void run(const Layer& layer, uint64_t seed, const S* weight2, const T* bias2, const T* z,
                         T* y, int64_t begin, int64_t end) {
    using V = typename Compute<T>::vec;
    const int64_t inner = layer.inner, stride = padded(inner);
    const gelu::Gelu<isa, T> gelu;
    u32x16 draws[kStripVectors];
    for (int64_t row = begin; row < end; ++row) {
      V total[kMaxOutputs] = {};
      for (int64_t first = 0; first < inner; first += kStrip) {
        V h[kStripVectors], unused[kStripVectors];
        for (int j = 0; j < kStripVectors; ++j) {
          const int64_t column = first + j * kLanes;
          h[j] = column < inner ? load(z + (row - begin) * inner + column, inner - column) : V{};
        }
        activate<isa, T, false>(layer.activation, gelu, h, unused);
        if (layer.threshold != 0) {
          draw_strip<isa>(seed, row, first, draws);
          for (int j = 0; j < kStripVectors; ++j)
            h[j] *= keep_factor<isa>(draws[j], layer.threshold, splat<V>(layer.scale));
        }
        for (int o = 0; o < layer.outputs; ++o) {
          const S* weight = weight2 + o * stride + first;
          V partial = total[o];
          for (int j = 0; j < kStripVectors; ++j) partial += h[j] * unpack(weight + j * kLanes);
          total[o] = partial;
        }
      }
      V result = load(bias2, layer.outputs);
      for (int o = 0; o < layer.outputs; ++o) result[o] += sum(total[o]);
      store(y + row * layer.outputs, result, layer.outputs);
    }
  }
};

// Rows begin .. end, at most kFewRows, whose sums are added to sums [1 + outputs, stride]: db1 and then the
// rows of dW2. dz: of row `begin` and those after it.
template <class T>
struct BackwardRows {
  template <Isa isa>
  MTFAST_INLINE void run(const Layer& layer, uint64_t seed, const T* weight2, const T* dy, const T* z, T* dz,
                         double* sums, int64_t begin, int64_t end) {
    using V = typename Compute<T>::vec;
    const int64_t inner = layer.inner, stride = padded(inner), rows = end - begin;
    const gelu::Gelu<isa, T> gelu;
    u32x16 draws[kFewRows][kStripVectors];
    V dy_rows[kFewRows] = {};
    for (int64_t i = 0; i < rows; ++i) dy_rows[i] = load(dy + (begin + i) * layer.outputs, layer.outputs);
    for (int64_t first = 0; first < inner; first += kStrip) {
      if (layer.threshold != 0)
        for (int64_t i = 0; i < rows; ++i) draw_strip<isa>(seed, begin + i, first, draws[i]);
      const int64_t past = std::min(inner, first + kStrip);
      for (int64_t column = first; column < past; column += kLanes) {
        V h[kFewRows], slope[kFewRows], grad[kFewRows] = {}, total = {};
        for (int64_t i = 0; i < kFewRows; ++i)
          h[i] = i < rows ? load(z + (begin + i) * inner + column, inner - column) : V{};
        activate<isa, T, true>(layer.activation, gelu, h, slope);
        if (layer.threshold != 0)
          for (int64_t i = 0; i < rows; ++i) {
            const V factor =
                keep_factor<isa>(draws[i][(column - first) / kLanes], layer.threshold, splat<V>(layer.scale));
            h[i] *= factor;
            slope[i] *= factor;
          }
        for (int o = 0; o < layer.outputs; ++o) {
          const V weight = load(weight2 + o * inner + column, inner - column);
          V dweight = {};
          for (int64_t i = 0; i < kFewRows; ++i) {
            grad[i] += dy_rows[i][o] * weight;
            dweight += dy_rows[i][o] * h[i];
          }
          add(sums + (1 + o) * stride + column, dweight);
        }
        for (int64_t i = 0; i < rows; ++i) {
          grad[i] *= slope[i];
          total += grad[i];
          if (dz != nullptr) store(dz + i * inner + column, grad[i], inner - column);
        }
        add(sums + column, total);
      }
    }
  }

 private:
  template <class V>
  MTFAST_INLINE void add(double* to, V x) {
    pack(to, unpack(to) + __builtin_convertvector(x, f64x16));
  }
};

}  // namespace

void cpu_forward(const Inputs& in, int64_t begin, int64_t end, const void* z, void* y) {
  const Layer& layer = in.layer;
  for_dtype(layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    const auto weight2 = widened<T>(layer, in.weight2);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, layer.inner));
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t past) {
      call_best(ForwardRows<T>{}, layer, seed_of(layer), weight2.data(), static_cast<const T*>(in.bias2),
                static_cast<const T*>(z) + (first - begin) * layer.inner, static_cast<T*>(y), first, past);
    });
  });
}

int64_t cpu_backward_rows(int64_t batch) {
  const int64_t rows = chunk_rows(batch), half = ((batch + 1) / 2 + rows - 1) / rows * rows;
  return batch < 512 ? batch : half;
}

void cpu_backward(const Inputs& in, const void* dy, const void* z, void* dz,
                  const std::function<void(int64_t begin, int64_t end)>& done, const Sums& to) {
  const Layer& layer = in.layer;
  for_dtype(layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    using V = typename Compute<T>::vec;
    // Sums over fixed chunks of rows, added in order: the same bits for every number of threads. Eight rows
    // at a time in the type of the arithmetic, beyond that in double.
    const int64_t rows = chunk_rows(layer.batch), chunks = (layer.batch + rows - 1) / rows;
    const int64_t stride = padded(layer.inner), size = (1 + layer.outputs) * stride;
    std::vector<double> sums(std::max<int64_t>(1, chunks) * size);
    const T* dy_rows = static_cast<const T*>(dy);
    const int64_t block = cpu_backward_rows(layer.batch);
    for (int64_t first = 0; first < layer.batch; first += block) {
      const int64_t past = std::min(layer.batch, first + block);
      torch::stable::parallel_for(first / rows, (past + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t last = std::min(past, (chunk + 1) * rows);
          for (int64_t row = chunk * rows; row < last; row += kFewRows) {
            T* dz_row = dz == nullptr ? nullptr : static_cast<T*>(dz) + (row - first) * layer.inner;
            call_best(BackwardRows<T>{}, layer, seed_of(layer), static_cast<const T*>(in.weight2), dy_rows,
                      static_cast<const T*>(z), dz_row, sums.data() + chunk * size, row,
                      std::min(last, row + kFewRows));
          }
        }
      });
      done(first, past);
    }
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[chunk * size + i];
    for (int64_t row = 0; row <= layer.outputs; ++row) {
      T* out = row == 0 ? static_cast<T*>(to.dbias1) : static_cast<T*>(to.dweight2) + (row - 1) * layer.inner;
      for (int64_t i = 0; i < layer.inner; i += kLanes)
        store(out + i, __builtin_convertvector(unpack(sums.data() + row * stride + i), V), layer.inner - i);
    }
    f64x16 total = {};
    for (int64_t row = 0; row < layer.batch; ++row)
      total += __builtin_convertvector(load(dy_rows + row * layer.outputs, layer.outputs), f64x16);
    store(static_cast<T*>(to.dbias2), __builtin_convertvector(total, V), layer.outputs);
  });
}

}  // namespace mtfast::concat_mlp
