// Host-side planning of batches: which bin (rank x micro-batch) takes which example of an optimizer step.
#pragma once

#include <cstdint>

namespace mtfast {

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
void balance(const int64_t* tokens, const int64_t* step_offsets, int64_t steps, int64_t bins, int64_t* bin);

}  // namespace mtfast
