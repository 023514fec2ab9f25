// concat_mlp's large products on the CPU in bfloat16: tasks of a panel of 64 columns and some of the rows,
// shared out to threads. No sum depends on who computes it.
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "bf16_product.h"
#include "concat_mlp.h"

namespace mtfast::concat_mlp {
namespace {

using namespace simd;

constexpr int64_t kTaskRows = 256;
constexpr int64_t kTaskInner = 384;  // rows of weight1's gradient in a task
constexpr int64_t kDepth = 512;      // pairs that a panel for weight1's gradient has at most

int64_t ceil_div(int64_t x, int64_t by) { return (x + by - 1) / by; }

// A worker's scratch. It holds the panel packed for the task before, which the next task often needs too.
struct Packed {
  Pairs* panel;
  int64_t which = -1;

  // Whether panel i must be packed now.
  bool turns_to(int64_t i) { return std::exchange(which, i) != i; }
};

// A panel of one of the sides, and some rows of those that it is multiplied by.
struct Task {
  int64_t side, column, columns, begin, end;
};

// Tasks that a worker takes from the front of its own range, and then of the others'.
struct alignas(64) Range {
  std::atomic<int64_t> next;
  int64_t past;
};

// Calls run(task, packed) for every panel of `sides` matrices of `columns` columns and every task_rows of the
// rows, or somewhat fewer. packed.panel has room for so many pairs.
template <class Run>
void share_out(int64_t sides, int64_t columns, int64_t rows, int64_t task_rows, int64_t pairs,
               const Run& run) {
  const int64_t panels = ceil_div(columns, kPanel), parts = ceil_div(rows, task_rows);
  const int64_t tasks = sides * panels * parts;
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks);
  const auto scratch = torch::stable::empty({workers * pairs * static_cast<int64_t>(sizeof(Pairs))},
                                            torch::headeronly::ScalarType::Byte);  // on 64 bytes
  auto* panels_of_workers = static_cast<Pairs*>(scratch.mutable_data_ptr());
  std::vector<Range> ranges(workers);
  for (int64_t w = 0; w < workers; ++w) {
    ranges[w].next = tasks * w / workers;
    ranges[w].past = tasks * (w + 1) / workers;
  }
  torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t past) {
    for (int64_t worker = first; worker < past; ++worker) {
      Packed packed{panels_of_workers + worker * pairs};
      for (int64_t i = 0; i < workers; ++i) {
        Range& range = ranges[(worker + i) % workers];
        for (int64_t task; (task = range.next.fetch_add(1)) < range.past;) {
          const int64_t part = task % parts, panel = task / parts, column = panel % panels * kPanel;
          run(Task{panel / panels, column, std::min<int64_t>(kPanel, columns - column), rows * part / parts,
                   rows * (part + 1) / parts},
              packed);
        }
      }
    }
  });
}

constexpr float kZeros[kPanel] = {};

}  // namespace

bool cpu_multiplies(const Layer& layer) {
  return has_bf16_product() && layer.dtype == Dtype::kBFloat16 && layer.hidden % 2 == 0 &&
         layer.inner % 2 == 0;
}

void cpu_hidden(const Inputs& in, int64_t begin, int64_t end, void* z) {
  const int64_t hidden = in.layer.hidden, inner = in.layer.inner;
  const Source weight1{in.weight1, 2 * hidden, inner};
  share_out(1, inner, end - begin, kTaskRows, hidden, [&](const Task& task, Packed& packed) {
    if (packed.turns_to(task.column)) pack_rows(packed.panel, weight1, task.column, task.columns, hidden);
    float bias[kPanel] = {};
    for (int64_t j = 0; j < task.columns; j += kLanes)
      pack(bias + j, load(static_cast<const bf16*>(in.bias1) + task.column + j, task.columns - j));
    PanelProduct product;
    product.begin = begin + task.begin, product.end = begin + task.end, product.columns = task.columns;
    product.a[0] = in.u, product.a[1] = in.v, product.parts = 2;
    product.pairs = hidden / 2, product.b = packed.panel, product.start = bias;
    product.to = static_cast<bf16*>(z) + task.begin * inner + task.column, product.to_pitch = inner;
    multiply(product);
  });
}

void cpu_input_gradients(const Inputs& in, const void* dz, int64_t begin, int64_t end, void* du, void* dv) {
  const int64_t hidden = in.layer.hidden, inner = in.layer.inner, sides = (du != nullptr) + (dv != nullptr);
  const Source weight1{in.weight1, 2 * hidden, inner}, rows_of_dz{dz, inner, end - begin};
  share_out(sides, hidden, end - begin, kTaskRows, inner / 2, [&](const Task& task, Packed& packed) {
    const bool to_u = du != nullptr && task.side == 0;
    const int64_t first = to_u ? 0 : hidden;  // of weight1's columns
    if (packed.turns_to(first + task.column))
      interleave(packed.panel, weight1, 0, inner, first + task.column, task.columns);
    PanelProduct product;
    product.begin = task.begin, product.end = task.end, product.columns = task.columns;
    product.a[0] = rows_of_dz, product.pairs = inner / 2;
    product.b = packed.panel, product.start = kZeros;
    product.to = static_cast<bf16*>(to_u ? du : dv) + (begin + task.begin) * hidden + task.column;
    product.to_pitch = hidden;
    multiply(product);
  });
}

void cpu_weight1_gradient(const Inputs& in, void* dz, int64_t begin, int64_t end, void* dweight1) {
  const int64_t hidden = in.layer.hidden, inner = in.layer.inner, rows = end - begin;
  if (inner == 0) return;
  auto* dz_at = static_cast<bf16*>(dz);
  // Of each two rows of dz, the elements of a column side by side.
  const Source rows_of_dz{dz, inner, rows};
  share_out(1, 1, ceil_div(rows, 2), kTaskRows / 2, ceil_div(inner, kPanel),
            [&](const Task& task, Packed& packed) {
              for (int64_t row = 2 * task.begin; row < 2 * task.end; row += 2) {
                interleave(packed.panel, rows_of_dz, row, std::min(row + 2, rows), 0, inner);
                std::memcpy(dz_at + row * inner, packed.panel, static_cast<size_t>(2 * inner) * sizeof(bf16));
              }
            });
  static_assert(sizeof(Pairs) == kPanel * sizeof(float), "room for pairs is room for as many rows of sums");
  const int64_t room = kDepth + (rows > 2 * kDepth ? kTaskInner : 0);
  share_out(2, hidden, inner, kTaskInner, room, [&](const Task& task, Packed& packed) {
    const int64_t column = task.side * hidden + task.column;  // of dweight1
    auto* sums = reinterpret_cast<float*>(packed.panel + kDepth);
    for (int64_t row = 0; row < rows || row == 0; row += 2 * kDepth) {  // an empty sum is one too
      const int64_t past = std::min(rows, row + 2 * kDepth);
      if (packed.turns_to(column + row * 2 * hidden))
        interleave(packed.panel, task.side == 0 ? in.u : in.v, begin + row, begin + past, task.column,
                   task.columns);
      PanelProduct product;
      product.begin = task.begin, product.end = task.end, product.columns = task.columns;
      product.a[0] = {dz_at + row * inner, 2, inner}, product.step = 2 * inner;
      product.pairs = ceil_div(past - row, 2), product.b = packed.panel;
      product.to = static_cast<bf16*>(dweight1) + task.begin * 2 * hidden + column;
      product.to_pitch = 2 * hidden;
      if (row > 0)
        product.start = sums, product.start_pitch = kPanel;
      else if (begin == 0)
        product.start = kZeros;
      if (past < rows) product.sums = sums;
      multiply(product);
    }
  });
}

}  // namespace mtfast::concat_mlp
