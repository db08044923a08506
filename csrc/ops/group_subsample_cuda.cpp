#include "cuda_launch.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

Tensor group_subsample_cuda(const Tensor& match_labels, const Tensor& group_idxs, OptionalTensor losses,
                            OptionalTensor seed_tensor, int64_t seed, int64_t first_image, int64_t num_groups,
                            int64_t num_per_group, double positive_fraction, int64_t method) {
  const SubsampleShape shape = check_group_subsample(match_labels, group_idxs, losses, seed_tensor, first_image,
                                                     num_groups, num_per_group, positive_fraction, method);
  const DeviceGuard guard(match_labels.get_device_index());
  const Tensor labels = packed(match_labels);
  const Tensor groups = packed(group_idxs);
  const OptionalTensor weights = contiguous_if_given(losses);
  Tensor sampled = torch::stable::empty_like(labels);
  if (shape.num_images == 0 || shape.num_anchors == 0) return sampled;

  const int64_t scratch_bytes = group_subsample_scratch_bytes(shape.num_images, num_groups);
  Tensor scratch = new_tensor(labels, {scratch_bytes}, ScalarType::Char);
  SubsampleBatch batch{};
  batch.match_labels = labels.const_data_ptr<int8_t>();
  batch.group_idxs = groups.const_data_ptr<int64_t>();
  batch.losses = weights ? weights->const_data_ptr<float>() : nullptr;
  batch.num_images = shape.num_images;
  batch.num_anchors = shape.num_anchors;
  batch.num_groups = num_groups;
  batch.groups_per_image = shape.groups_per_image;
  batch.quota = make_quota(num_per_group, positive_fraction);
  batch.method = SampleMethod(method);
  batch.seed_tensor = seed_tensor ? seed_tensor->const_data_ptr<int64_t>() : nullptr;
  batch.seed = seed;
  batch.first_image = first_image;
  batch.sampled_labels = sampled.mutable_data_ptr<int8_t>();
  check_launch("group_subsample",
               launch_group_subsample(batch, scratch.mutable_data_ptr<int8_t>(), current_stream(match_labels)));
  return sampled;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CUDA, m) {
  m.impl("group_subsample", TORCH_BOX(&group_subsample_cuda));
}

}  // namespace gs_d2
