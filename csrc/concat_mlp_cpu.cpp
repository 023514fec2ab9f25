// concat_mlp on the CPU: one vectorised, threaded pass over the hidden layer in each direction.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "concat_mlp.h"
#include "simd_isa.h"

namespace mtfast::concat_mlp {
namespace {

using namespace simd;

constexpr int kStrip = 128;  // columns that one vector of sixteen Philox calls serves
constexpr int kStripVectors = kStrip / kLanes;
constexpr int64_t kFewRows = 8;  // rows summed before the sum is carried on in double

// The 16-bit draws of columns first .. first + 127 of a row, in column order.
template <Isa isa>
MTFAST_INLINE void draw_strip(uint64_t seed, int64_t row, int64_t first, uint16_t (&draws)[kStrip]) {
  const u32x16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  u32x16 words[4];
  philox16<isa>(seed, lanes + static_cast<uint32_t>(first / 8), u32x16{} + static_cast<uint32_t>(row), 0,
                Purpose::kConcatMlpDropout, words);
  for (int group = 0; group < 4; ++group)   // 32 columns, from four calls
    for (int tile = 0; tile < 4; ++tile) {  // 8 columns of them: word `tile` of each call
      const char* from = reinterpret_cast<const char*>(&words[tile]) + group * 16;
      std::memcpy(reinterpret_cast<char*>(draws) + (group * 4 + tile) * 16, from, 16);
    }
}

template <class V>
MTFAST_INLINE V normal_cdf(V x) {
  return splat<V>(0.5) * (splat<V>(1) + erf(x * splat<V>(0.70710678118654752)));
}

// h = act(x) over a strip, and with kSlope dh/dx.
template <bool kSlope, class V>
MTFAST_INLINE void activate(Activation activation, V (&x)[kStripVectors], V (&slope)[kStripVectors]) {
  switch (activation) {
    case Activation::kRelu:
      for (int j = 0; j < kStripVectors; ++j) {
        if (kSlope) slope[j] = (x[j] <= V{}) ? V{} : splat<V>(1);
        x[j] = (x[j] < V{}) ? V{} : x[j];
      }
      break;
    case Activation::kGelu:
      for (int j = 0; j < kStripVectors; ++j) {
        const V cdf = normal_cdf(x[j]);
        if (kSlope) slope[j] = cdf + x[j] * exp(x[j] * x[j] * splat<V>(-0.5)) * splat<V>(0.39894228040143268);
        x[j] *= cdf;
      }
      break;
    default:  // kTanh
      for (int j = 0; j < kStripVectors; ++j) {
        x[j] = tanh(x[j]);
        if (kSlope) slope[j] = splat<V>(1) - x[j] * x[j];
      }
  }
}

// Rows whose sums are one term of the sum over the batch.
int64_t chunk_rows(int64_t batch) { return std::max<int64_t>(32, (batch + 63) / 64); }

int64_t padded(int64_t inner) { return (inner + kStrip - 1) / kStrip * kStrip; }

// The small operands in the type of the arithmetic, each row padded with zeros to whole strips.
template <class T>
struct Constants {
  using S = typename Compute<T>::scalar;
  std::vector<S> weight2, bias2;
  int64_t stride;

  Constants(const Layer& layer, const void* w2, const void* b2) : stride(padded(layer.inner)) {
    weight2.resize(stride * layer.outputs);
    for (int o = 0; o < layer.outputs; ++o)
      copy(static_cast<const T*>(w2) + o * layer.inner, layer.inner, weight2.data() + o * stride);
    if (b2 != nullptr) {
      bias2.resize(kLanes);
      copy(static_cast<const T*>(b2), layer.outputs, bias2.data());
    }
  }

 private:
  static void copy(const T* from, int64_t count, S* to) {
    for (int64_t i = 0; i < count; i += kLanes) pack(to + i, load(from + i, count - i));
  }
};

// z: of row `begin` and those after it.
template <class T>
struct ForwardRows {
  template <Isa isa>
  MTFAST_INLINE void run(const Layer& layer, uint64_t seed, const Constants<T>& constants, const T* z, T* y,
                         int64_t begin, int64_t end) {
    using V = typename Compute<T>::vec;
    using M = typename Compute<T>::mask;
    const int64_t inner = layer.inner, stride = constants.stride;
    alignas(64) uint16_t draws[kStrip];
    for (int64_t row = begin; row < end; ++row) {
      V total[kMaxOutputs] = {};
      for (int64_t first = 0; first < inner; first += kStrip) {
        V h[kStripVectors], unused[kStripVectors];
        for (int j = 0; j < kStripVectors; ++j) {
          const int64_t column = first + j * kLanes;
          h[j] = column < inner ? load(z + (row - begin) * inner + column, inner - column) : V{};
        }
        activate<false>(layer.activation, h, unused);
        if (layer.threshold != 0) {
          draw_strip<isa>(seed, row, first, draws);
          for (int j = 0; j < kStripVectors; ++j)
            h[j] *= keep_factor<V, M>(draws + j * kLanes, layer.threshold, splat<V>(layer.scale));
        }
        for (int o = 0; o < layer.outputs; ++o) {
          const auto* weight = constants.weight2.data() + o * stride + first;
          V partial = total[o];
          for (int j = 0; j < kStripVectors; ++j) partial += h[j] * unpack(weight + j * kLanes);
          total[o] = partial;
        }
      }
      V result = {};
      for (int o = 0; o < layer.outputs; ++o) result[o] = sum(total[o]) + constants.bias2[o];
      store(y + row * layer.outputs, result, layer.outputs);
    }
  }
};

// sums: [1 + outputs, stride], db1 and then the rows of dW2, added to. dz: of row `begin` and those after it.
template <class T>
struct BackwardRows {
  template <Isa isa>
  MTFAST_INLINE void run(const Layer& layer, uint64_t seed, const Constants<T>& constants, const T* dy,
                         const T* z, T* dz, typename Compute<T>::scalar* sums, int64_t begin, int64_t end) {
    using V = typename Compute<T>::vec;
    using M = typename Compute<T>::mask;
    const int64_t inner = layer.inner, stride = constants.stride;
    alignas(64) uint16_t draws[kStrip];
    for (int64_t row = begin; row < end; ++row) {
      const V dy_row = load(dy + row * layer.outputs, layer.outputs);
      for (int64_t first = 0; first < inner; first += kStrip) {
        V h[kStripVectors], slope[kStripVectors], grad[kStripVectors] = {};
        for (int j = 0; j < kStripVectors; ++j) {
          const int64_t column = first + j * kLanes;
          h[j] = column < inner ? load(z + row * inner + column, inner - column) : V{};
        }
        activate<true>(layer.activation, h, slope);
        if (layer.threshold != 0) {
          draw_strip<isa>(seed, row, first, draws);
          for (int j = 0; j < kStripVectors; ++j) {
            const V factor = keep_factor<V, M>(draws + j * kLanes, layer.threshold, splat<V>(layer.scale));
            h[j] *= factor;
            slope[j] *= factor;
          }
        }
        for (int o = 0; o < layer.outputs; ++o) {
          const auto* weight = constants.weight2.data() + o * stride + first;
          auto* dweight = sums + (1 + o) * stride + first;
          for (int j = 0; j < kStripVectors; ++j) {
            grad[j] += dy_row[o] * unpack(weight + j * kLanes);
            pack(dweight + j * kLanes, unpack(dweight + j * kLanes) + dy_row[o] * h[j]);
          }
        }
        for (int j = 0; j < kStripVectors; ++j) {
          const int64_t column = first + j * kLanes;
          if (column >= inner) break;
          grad[j] *= slope[j];
          pack(sums + column, unpack(sums + column) + grad[j]);
          if (dz != nullptr) store(dz + (row - begin) * inner + column, grad[j], inner - column);
        }
      }
    }
  }
};

template <class F>
void for_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::kFloat32:
      return f(float{});
    case Dtype::kFloat64:
      return f(double{});
    case Dtype::kBFloat16:
      return f(bf16{});
    case Dtype::kFloat16:
      return f(f16{});
  }
}

}  // namespace

void cpu_forward(const Layer& layer, uint64_t seed, int64_t begin, int64_t end, const void* z,
                 const void* weight2, const void* bias2, void* y) {
  for_dtype(layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    const Constants<T> constants(layer, weight2, bias2);
    const int64_t grain = std::max<int64_t>(1, 32768 / std::max<int64_t>(1, layer.inner));
    torch::stable::parallel_for(begin, end, grain, [&](int64_t first, int64_t past) {
      call_best(ForwardRows<T>{}, layer, seed, constants,
                static_cast<const T*>(z) + (first - begin) * layer.inner, static_cast<T*>(y), first, past);
    });
  });
}

int64_t cpu_backward_rows(int64_t batch) {
  const int64_t rows = chunk_rows(batch), half = ((batch + 1) / 2 + rows - 1) / rows * rows;
  return batch < 512 ? batch : half;
}

void cpu_backward(const Layer& layer, uint64_t seed, const void* dy, const void* z, const void* weight2,
                  void* dz, const std::function<void(int64_t begin, int64_t end)>& done, void* dbias1,
                  void* dweight2, void* dbias2) {
  for_dtype(layer.dtype, [&](auto zero) {
    using T = decltype(zero);
    using S = typename Compute<T>::scalar;
    using V = typename Compute<T>::vec;
    const Constants<T> constants(layer, weight2, nullptr);
    // Sums over fixed chunks of rows, added in order: the same bits for every number of threads. Eight rows
    // at a time in the type of the arithmetic, beyond that in double.
    const int64_t rows = chunk_rows(layer.batch), chunks = (layer.batch + rows - 1) / rows;
    const int64_t size = (1 + layer.outputs) * constants.stride;
    std::vector<double> sums(std::max<int64_t>(1, chunks) * size);
    const T* dy_rows = static_cast<const T*>(dy);
    const int64_t block = cpu_backward_rows(layer.batch);
    for (int64_t first = 0; first < layer.batch; first += block) {
      const int64_t past = std::min(layer.batch, first + block);
      torch::stable::parallel_for(first / rows, (past + rows - 1) / rows, 1, [&](int64_t begin, int64_t end) {
        std::vector<S> few(size);
        for (int64_t chunk = begin; chunk < end; ++chunk) {
          const int64_t last = std::min(past, (chunk + 1) * rows);
          for (int64_t row = chunk * rows; row < last; row += kFewRows) {
            std::fill(few.begin(), few.end(), S{0});
            T* dz_row = dz == nullptr ? nullptr : static_cast<T*>(dz) + (row - first) * layer.inner;
            call_best(BackwardRows<T>{}, layer, seed, constants, dy_rows, static_cast<const T*>(z), dz_row,
                      few.data(), row, std::min(last, row + kFewRows));
            for (int64_t i = 0; i < size; ++i) sums[chunk * size + i] += few[i];
          }
        }
      });
      done(first, past);
    }
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
      for (int64_t i = 0; i < size; ++i) sums[i] += sums[chunk * size + i];
    const auto write = [&](const double* from, void* to, int64_t offset) {
      for (int64_t i = 0; i < layer.inner; i += kLanes)
        store(static_cast<T*>(to) + offset + i, __builtin_convertvector(unpack(from + i), V),
              layer.inner - i);
    };
    write(sums.data(), dbias1, 0);
    for (int o = 0; o < layer.outputs; ++o)
      write(sums.data() + (1 + o) * constants.stride, dweight2, o * layer.inner);
    f64x16 total = {};
    for (int64_t row = 0; row < layer.batch; ++row)
      total += __builtin_convertvector(load(dy_rows + row * layer.outputs, layer.outputs), f64x16);
    store(static_cast<T*>(dbias2), __builtin_convertvector(total, V), layer.outputs);
  });
}

}  // namespace mtfast::concat_mlp
