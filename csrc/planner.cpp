// Host-side planning of batches: which bin (rank x micro-batch) takes which example of an optimizer step.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <string>
#include <vector>

namespace mtfast {
namespace {

struct Bin {
  int64_t load = 0;
  std::vector<int64_t> examples;  // longest first
};

// True if `a` should take the next example rather than `b`: the lighter, then the emptier, then the first.
struct Lighter {
  const std::vector<Bin>& bins;
  bool operator()(int64_t a, int64_t b) const {
    if (bins[a].load != bins[b].load) return bins[a].load < bins[b].load;
    if (bins[a].examples.size() != bins[b].examples.size()) {
      return bins[a].examples.size() < bins[b].examples.size();
    }
    return a < b;
  }
};

void insert(Bin& bin, int64_t example, const int64_t* tokens) {
  auto place = std::upper_bound(bin.examples.begin(), bin.examples.end(), example,
                                [tokens](int64_t a, int64_t b) { return tokens[a] > tokens[b]; });
  bin.examples.insert(place, example);
  bin.load += tokens[example];
}

void erase(Bin& bin, size_t place, const int64_t* tokens) {
  bin.load -= tokens[bin.examples[place]];
  bin.examples.erase(bin.examples.begin() + static_cast<std::ptrdiff_t>(place));
}

// Moves one example from the heavy bin to the light one, or exchanges two, whichever brings their difference
// nearest to zero. Returns false if nothing makes it smaller.
bool even_out(Bin& heavy, Bin& light, const int64_t* tokens) {
  const int64_t difference = heavy.load - light.load;
  int64_t best = difference;
  std::ptrdiff_t give = -1, take = -1;
  auto consider = [&](int64_t moved, size_t i, std::ptrdiff_t j) {
    const int64_t left = std::abs(difference - 2 * moved);
    if (left < best) {
      best = left;
      give = static_cast<std::ptrdiff_t>(i);
      take = j;
    }
  };
  size_t j = 0;
  for (size_t i = 0; i < heavy.examples.size(); ++i) {
    const int64_t size = tokens[heavy.examples[i]];
    if (heavy.examples.size() > 1) consider(size, i, -1);
    // Both lists fall, so the best partner of each example lies no earlier than that of the one before.
    while (j < light.examples.size() && 2 * (size - tokens[light.examples[j]]) < difference) ++j;
    if (j < light.examples.size())
      consider(size - tokens[light.examples[j]], i, static_cast<std::ptrdiff_t>(j));
    if (j > 0) consider(size - tokens[light.examples[j - 1]], i, static_cast<std::ptrdiff_t>(j) - 1);
  }
  if (give < 0) return false;
  const int64_t given = heavy.examples[give];
  erase(heavy, give, tokens);
  if (take >= 0) {
    const int64_t taken = light.examples[take];
    erase(light, take, tokens);
    insert(heavy, taken, tokens);
  }
  insert(light, given, tokens);
  return true;
}

void balance_step(const int64_t* tokens, int64_t begin, int64_t end, std::vector<Bin>& bins, int64_t* bin) {
  for (Bin& b : bins) {
    b.load = 0;
    b.examples.clear();
  }
  std::vector<int64_t> order(end - begin);
  std::iota(order.begin(), order.end(), begin);
  std::stable_sort(order.begin(), order.end(),
                   [tokens](int64_t a, int64_t b) { return tokens[a] > tokens[b]; });

  const Lighter lighter{bins};
  std::vector<int64_t> heap(bins.size());
  std::iota(heap.begin(), heap.end(), 0);
  auto heavier = [&](int64_t a, int64_t b) {
    return lighter(b, a);
  };  // std's heaps keep the largest in front
  for (int64_t example : order) {
    std::pop_heap(heap.begin(), heap.end(), heavier);
    Bin& lightest = bins[heap.back()];
    lightest.load += tokens[example];
    lightest.examples.push_back(example);
    std::push_heap(heap.begin(), heap.end(), heavier);
  }
  for (size_t round = 0; round < 4 * bins.size(); ++round) {
    auto [light, heavy] = std::minmax_element(bins.begin(), bins.end(),
                                              [](const Bin& a, const Bin& b) { return a.load < b.load; });
    if (heavy->load - light->load <= 1 || !even_out(*heavy, *light, tokens)) break;
  }
  for (size_t index = 0; index < bins.size(); ++index) {
    for (int64_t example : bins[index].examples) bin[example] = static_cast<int64_t>(index);
  }
}

// Deals every step's examples to `bins` bins so that the bins' token totals are as equal as a longest-first
// greedy choice and pairwise exchanges make them.
//
//   tokens        [n]          tokens of each example, >= 0; n of the largest make at most 2^61
//   step_offsets  [steps + 1]  step s owns examples step_offsets[s] .. step_offsets[s + 1]; first 0, last n
//   bin           [n]          out: the bin of each example, 0 .. bins - 1
//
// Within a step the totals of any two bins differ by at most its longest example, and no bin is empty if the
// step has at least `bins` examples. The result depends on the arguments alone.
// Graham 1969, "Bounds on multiprocessing timing anomalies" (longest processing time first).
void balance(const int64_t* tokens, const int64_t* step_offsets, int64_t steps, int64_t bins, int64_t* bin) {
  int64_t most = 1;  // examples of a step: that many bins are never empty
  for (int64_t step = 0; step < steps; ++step)
    most = std::max(most, step_offsets[step + 1] - step_offsets[step]);
  std::vector<Bin> work(std::min(bins, most));
  for (int64_t step = 0; step < steps; ++step) {
    balance_step(tokens, step_offsets[step], step_offsets[step + 1], work, bin);
  }
}

namespace py = pybind11;
using Int64Array = py::array_t<int64_t, py::array::c_style>;

Int64Array balance_arrays(const Int64Array& tokens, const Int64Array& step_offsets, int64_t bins) {
  if (tokens.ndim() != 1 || step_offsets.ndim() != 1) {
    throw py::value_error("tokens and step_offsets must have one dimension, found " +
                          std::to_string(tokens.ndim()) + " and " + std::to_string(step_offsets.ndim()));
  }
  if (bins < 1) throw py::value_error("bins must be at least 1, found " + std::to_string(bins));
  const int64_t examples = tokens.shape(0);
  const int64_t steps = step_offsets.shape(0) - 1;
  const int64_t* sizes = tokens.data();
  const int64_t* offsets = step_offsets.data();
  if (steps < 0 || offsets[0] != 0 || offsets[steps] != examples ||
      !std::is_sorted(offsets, offsets + steps + 1)) {
    throw py::value_error("step_offsets must rise from 0 to the number of tokens, " +
                          std::to_string(examples));
  }
  const int64_t* negative = std::find_if(sizes, sizes + examples, [](int64_t size) { return size < 0; });
  if (negative != sizes + examples) {
    throw py::value_error("tokens[" + std::to_string(negative - sizes) +
                          "] is negative: " + std::to_string(*negative));
  }
  const int64_t most = INT64_MAX / 4 / std::max<int64_t>(1, examples);
  const int64_t* large = std::find_if(sizes, sizes + examples, [=](int64_t size) { return size > most; });
  if (large != sizes + examples) {
    throw py::value_error("tokens[" + std::to_string(large - sizes) + "] must be at most " +
                          std::to_string(most) + ", so that sums fit, found " + std::to_string(*large));
  }
  Int64Array bin(examples);
  int64_t* out = bin.mutable_data();
  {
    py::gil_scoped_release release;
    balance(sizes, offsets, steps, bins, out);
  }
  return bin;
}

}  // namespace
}  // namespace mtfast

PYBIND11_MODULE(_planner, module) {
  using pybind11::arg;
  module.doc() = "Deals the examples of optimizer steps to ranks and micro-batches.";
  module.def(
      "balance", &mtfast::balance_arrays, arg("tokens"), arg("step_offsets"), arg("bins"),
      "The bin (int64 [n], 0 to bins - 1) of each example.\n\n"
      "tokens: int64 [n], the size of each example. step_offsets: int64 [steps + 1], where each step's\n"
      "examples begin. Within a step the totals of two bins differ by at most its longest example, and\n"
      "no bin is empty if there are enough examples. ValueError names an argument that is wrong.");
}
