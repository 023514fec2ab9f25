// mask_tokens: argument checks and registration.
#include "mask_tokens.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "binding.h"

namespace mtfast::mask_tokens {
namespace {

constexpr const char* kOp = "mask_tokens";

SpecialIds runs_of(std::vector<int64_t> ids, int64_t vocab_size) {
  std::sort(ids.begin(), ids.end());
  ids.erase(std::unique(ids.begin(), ids.end()), ids.end());
  SpecialIds runs;
  for (const int64_t id : ids) {
    check(id >= 0 && id < vocab_size, kOp, ": special_ids must be in [0, vocab_size = ", vocab_size,
          "), found ", id);
    if (!runs.count || id > runs.end[runs.count - 1]) {
      check(runs.count < kMaxRuns, kOp, ": special_ids must form at most ", kMaxRuns,
            " runs of consecutive ids");
      runs.begin[runs.count++] = static_cast<int32_t>(id);
    }
    runs.end[runs.count - 1] = static_cast<int32_t>(id + 1);
  }
  runs.total = static_cast<int32_t>(ids.size());
  return runs;
}

uint64_t threshold(double probability) {
  return static_cast<uint64_t>(std::floor(probability * 4294967296.0 + 0.5));
}

Options options_of(std::vector<int64_t> special_ids, int64_t mask_token_id, int64_t vocab_size, int64_t seed,
                   double mlm_probability, double mask_fraction, double random_fraction) {
  check(vocab_size >= 1 && vocab_size <= INT32_MAX, kOp, ": vocab_size must be in [1, 2^31), found ",
        vocab_size);
  check(mask_token_id >= 0 && mask_token_id < vocab_size, kOp,
        ": mask_token_id must be in [0, vocab_size = ", vocab_size, "), found ", mask_token_id);
  const auto probability = [](const char* name, double p) {
    check(p >= 0 && p <= 1, kOp, ": ", name, " must be in [0, 1], found ", p);
  };
  probability("mlm_probability", mlm_probability);
  probability("mask_fraction", mask_fraction);
  probability("random_fraction", random_fraction);
  check(mask_fraction + random_fraction <= 1 + 1e-9, kOp,
        ": mask_fraction + random_fraction must be at most 1, found ", mask_fraction + random_fraction);
  Options options;
  options.special = runs_of(std::move(special_ids), vocab_size);
  options.vocab_size = vocab_size;
  options.mask_token_id = mask_token_id;
  options.seed = static_cast<uint64_t>(seed);
  options.seed_tensor = nullptr;
  options.mlm_probability = mlm_probability;
  options.choose_below = threshold(mlm_probability);
  options.mask_below = threshold(mask_fraction);
  options.random_below = std::min(options.mask_below + threshold(random_fraction), uint64_t{1} << 32);
  check(random_fraction == 0 || options.special.total < vocab_size, kOp,
        ": special_ids must leave an id to replace tokens with, but name all of vocab_size = ", vocab_size);
  const uint64_t ordinary = static_cast<uint64_t>(vocab_size - options.special.total);
  options.random_shift = 63;
  for (uint64_t left = ordinary; left; left >>= 1) --options.random_shift;
  const uint64_t range = std::max<uint64_t>(1, options.random_below - options.mask_below);
  options.random_scale = (ordinary << options.random_shift) / range;
  return options;
}

template <bool kCuda>
Batch batch_of(const Tensor& input_ids, const OptionalTensor& positions, const OptionalTensor& cu_seqlens,
               const OptionalTensor& subword, int64_t vocab_size) {
  const auto dtype = input_ids.scalar_type();
  check(dtype == ScalarType::Int || dtype == ScalarType::Long, kOp, ": input_ids must be int32 or int64");
  check(input_ids.dim() == 1 || input_ids.dim() == 2, kOp,
        ": input_ids must be [total] or [batch, length], found ", input_ids.dim(), " dimensions");
  check_contiguous(kOp, "input_ids", input_ids);
  Batch batch{};
  batch.input_ids = input_ids.const_data_ptr();
  batch.total = input_ids.numel();
  check(batch.total <= INT32_MAX, kOp, ": input_ids must have fewer than 2^31 tokens, found ", batch.total);
  batch.sequences = input_ids.dim() == 2 ? input_ids.size(0) : 1;
  batch.row_length = input_ids.dim() == 2 ? input_ids.size(1) : batch.total;
  if (positions) {
    check(positions->scalar_type() == ScalarType::Long, kOp, ": positions must be int64");
    check(positions->sizes().equals(input_ids.sizes()), kOp, ": positions must have the shape of input_ids");
    check_same_device(kOp, "positions", *positions, "input_ids", input_ids);
    check_contiguous(kOp, "positions", *positions);
    batch.positions = static_cast<const int64_t*>(positions->const_data_ptr());
  }
  if (cu_seqlens) {
    check(input_ids.dim() == 1, kOp, ": cu_seqlens goes with input_ids [total], found 2 dimensions");
    check_same_device(kOp, "cu_seqlens", *cu_seqlens, "input_ids", input_ids);
    check_cu_seqlens<kCuda>(kOp, *cu_seqlens, batch.total);
    batch.cu_seqlens = static_cast<const int32_t*>(cu_seqlens->const_data_ptr());
    batch.sequences = cu_seqlens->size(0) - 1;
  }
  if (subword) {
    check(subword->scalar_type() == ScalarType::Bool, kOp, ": subword must be bool");
    check(subword->dim() == 1 && subword->size(0) == vocab_size, kOp,
          ": subword must have the shape [vocab_size = ", vocab_size, "]");
    check_same_device(kOp, "subword", *subword, "input_ids", input_ids);
    check_contiguous(kOp, "subword", *subword);
    batch.subword = static_cast<const bool*>(subword->const_data_ptr());
  }
  return batch;
}

template <bool kCuda>
std::tuple<Tensor, Tensor> mask_tokens(const Tensor& input_ids, const OptionalTensor& positions,
                                       const OptionalTensor& cu_seqlens, const OptionalTensor& subword,
                                       std::vector<int64_t> special_ids, int64_t mask_token_id,
                                       int64_t vocab_size, int64_t seed, const OptionalTensor& seed_tensor,
                                       double mlm_probability, double mask_fraction, double random_fraction,
                                       bool exact) {
  Options options = options_of(std::move(special_ids), mask_token_id, vocab_size, seed, mlm_probability,
                               mask_fraction, random_fraction);
  const Batch batch = batch_of<kCuda>(input_ids, positions, cu_seqlens, subword, vocab_size);
  if (seed_tensor) {
    check_seed(kOp, seed_tensor, "input_ids", input_ids);
    const int64_t* there = static_cast<const int64_t*>(seed_tensor->const_data_ptr());
    if (kCuda)
      options.seed_tensor = there;
    else
      options.seed = static_cast<uint64_t>(*there);
  }
  Tensor output = torch::stable::empty_like(input_ids), labels = torch::stable::empty_like(input_ids);
  if (batch.total == 0) return {output, labels};
  const bool wide = input_ids.scalar_type() == ScalarType::Long;
  if constexpr (kCuda) {
#ifdef MTFAST_WITH_CUDA
    const OnDeviceOf device(input_ids);
    check_launch(kOp, mtfast_mask_tokens(&batch, &options, wide ? 8 : 4, exact, output.mutable_data_ptr(),
                                         labels.mutable_data_ptr(), device.stream()));
#endif
  } else {
    const auto parallel_for = [](int64_t count, int64_t grain, const Body& body) {
      torch::stable::parallel_for(0, count, grain, body);
    };
    const int64_t bad = mask_tokens_cpu(batch, options, wide, exact, output.mutable_data_ptr(),
                                        labels.mutable_data_ptr(), parallel_for);
    check(bad < 0, kOp, ": input_ids must be in [0, vocab_size = ", vocab_size, "), but token ", bad,
          " is not");
  }
  return {output, labels};
}

template <bool kCuda>
void register_all(Library& library) {
  library.impl("mask_tokens", TORCH_BOX(&mask_tokens<kCuda>));
}
MTFAST_REGISTER(register_all)

}  // namespace
}  // namespace mtfast::mask_tokens
