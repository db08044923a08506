#include "cuda_launch.h"
#include "tensors.h"

namespace gs_d2 {

namespace {

Tensor group_subsample_cuda(const Tensor& match_labels, const Tensor& group_idxs, OptionalTensor losses,
                            OptionalTensor seed_tensor, int64_t seed, int64_t first_image, int64_t num_groups,
                            int64_t num_per_group, double positive_fraction, int64_t method) {
  const SubsampleShape shape = check_group_subsample(match_labels, group_idxs, losses, seed_tensor, first_image,
                                                     num_groups, num_per_group, positive_fraction, method);
  constexpr const char* op = "group_subsample";
  return on_current_stream(op, match_labels, [&](cudaStream_t stream) {
    const Tensor labels = packed(op, "match_labels", match_labels);
    const Tensor groups = packed(op, "group_idxs", group_idxs);
    const OptionalTensor packed_losses = packed_if_given(op, "losses", losses);
    Tensor sampled = new_tensor(op, "sampled labels", labels, shape_of(labels), ScalarType::Char);
    if (shape.num_images == 0 || shape.num_anchors == 0) return sampled;

    const int64_t scratch_bytes = group_subsample_scratch_bytes(shape.num_images, num_groups);
    Tensor scratch = new_tensor(op, "scratch", labels, {scratch_bytes}, ScalarType::Char);
    SubsampleBatch batch{};
    batch.match_labels = labels.const_data_ptr<int8_t>();
    batch.group_idxs = groups.const_data_ptr<int64_t>();
    batch.losses = packed_losses ? packed_losses->const_data_ptr<float>() : nullptr;
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
    check_cuda(op, launch_group_subsample(batch, scratch.mutable_data_ptr<int8_t>(), stream));
    return sampled;
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gs_d2, CUDA, m) {
  m.impl("group_subsample", TORCH_BOX(&group_subsample_cuda));
}

}  // namespace gs_d2
