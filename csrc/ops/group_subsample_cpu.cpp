#include <mutex>
#include <vector>

#include "../cpu/kernels.h"
#include "check.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

Tensor group_subsample_cpu(const Tensor& match_labels, const Tensor& group_idxs, OptionalTensor losses,
                           OptionalTensor seed_tensor, int64_t seed, int64_t first_image, int64_t num_groups,
                           int64_t num_per_group, double positive_fraction, int64_t method) {
  const SubsampleShape shape = check_group_subsample(match_labels, group_idxs, losses, seed_tensor, first_image,
                                                     num_groups, num_per_group, positive_fraction, method);
  constexpr const char* op = "group_subsample";
  const Tensor labels = packed(op, "match_labels", match_labels);
  const Tensor groups = packed(op, "group_idxs", group_idxs);
  const OptionalTensor packed_losses = packed_if_given(op, "losses", losses);
  Tensor sampled = new_tensor(op, "sampled labels", labels, shape_of(labels), ScalarType::Char);
  const int64_t n = shape.num_anchors;
  if (n == 0) return sampled;

  for (int64_t i = 0; i < shape.num_images; ++i) {
    const SubsampleProblem problem{labels.const_data_ptr<int8_t>() + i * n,
                                   groups.const_data_ptr<int64_t>() + (shape.groups_per_image ? i * n : 0),
                                   packed_losses ? packed_losses->const_data_ptr<float>() + i * n : nullptr,
                                   n,
                                   num_groups,
                                   make_quota(num_per_group, positive_fraction),
                                   SampleMethod(method),
                                   uint64_t(seed_tensor ? *seed_tensor->const_data_ptr<int64_t>() : seed),
                                   uint32_t(first_image + i),
                                   sampled.mutable_data_ptr<int8_t>() + i * n};
    Reservoirs merged(2 * num_groups);
    std::mutex merging;
    constexpr int64_t kGrain = 32;
    parallel_for(0, problem.num_chunks(), kGrain, [&](int64_t begin, int64_t end) {
      const Reservoirs part = cpu_subsample_collect(problem, begin, end);
      const std::lock_guard<std::mutex> lock(merging);
      for (size_t s = 0; s < merged.size(); ++s) merged[s].insert(merged[s].end(), part[s].begin(), part[s].end());
    });
    // Groups are apart from each other; for few anchors other threads would take longer to start than to help.
    const int64_t group_grain = problem.num_chunks() > kGrain ? 1 : num_groups;
    parallel_for(0, num_groups, group_grain,
                 [&](int64_t begin, int64_t end) { cpu_subsample_draw(problem, merged, begin, end); });
  }
  return sampled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CPU, m) {
  m.impl("group_subsample", TORCH_BOX(&group_subsample_cpu));
}

}  // namespace gs_d2
