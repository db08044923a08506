// The schemas of every op, once. Backends register their kernels in <op>_cpu.cpp and <op>_cuda.cpp.
#include <Python.h>
#include <torch/csrc/stable/library.h>

// Python imports gs_d2._C only to run the registrations of this library; the module itself is empty.
PyMODINIT_FUNC PyInit__C() {
  static PyModuleDef module = {PyModuleDef_HEAD_INIT, "_C", nullptr, -1, nullptr, nullptr, nullptr, nullptr, nullptr};
  return PyModule_Create(&module);
}

STABLE_TORCH_LIBRARY(gs_d2, m) {
  m.def("box_iou(Tensor boxes1, Tensor boxes2) -> Tensor");

  // Without gt_offsets: one image, results [N]. With gt_offsets [B + 1]: results [B, N] and anchors [N, 4] (shared) or
  // [B, N, 4]. second_pass: 0 none, 1 best, 2 all.
  m.def(
      "two_pass_match(Tensor gt_boxes, Tensor anchors, Tensor? gt_offsets, Tensor? ignore_boxes, "
      "Tensor? ignore_offsets, float low, float high, int second_pass, float ignore_thresh) "
      "-> (Tensor matched_idxs, Tensor match_labels, Tensor max_ious)");

  // match_labels [N] or [B, N]; group_idxs [N] or of match_labels' shape; losses of match_labels' shape.
  // seed_tensor, where given, replaces seed. method: 0 random, 1 wrs, 2 ohem, 3 ohem_all.
  m.def(
      "group_subsample(Tensor match_labels, Tensor group_idxs, Tensor? losses, Tensor? seed_tensor, int seed, "
      "int first_image, int num_groups, int num_per_group, float positive_fraction, int method) -> Tensor");
}
