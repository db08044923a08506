// Runs the CUDA launchers through the shim on random and nasty inputs and compares every result with the CPU kernels,
// bit for bit.  fuzz OP NUM_CASES SCHEDULE_SEED [small]
#include <cfloat>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <string>

#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cuda/kernels.h"

using namespace gs_d2;

namespace gs_shim {
__attribute__((weak)) void set_schedule(uint64_t seed);  // not there on a GPU
}

namespace {

std::mt19937_64 rng;
bool small;                                 // for the sanitizers, under which a block of threads is slow
bool cpu_only;                              // runs the CPU kernels alone, for their own sanitizer runs
uint64_t checksum = 14695981039346656037u;  // of all that the CPU kernels gave

template <class... T>
auto one_of(T... values) {
  const std::common_type_t<T...> all[] = {values...};
  return all[rng() % sizeof...(values)];
}

int64_t below(int64_t n) {
  return int64_t(rng() % uint64_t(n));
}

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(rng);
}

// Memory of exactly the size asked for, full of rubbish, so that a sanitizer sees every access outside and a comparison
// every element left out.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : size_(size), data_(static_cast<T*>(std::malloc(size_t(size) * sizeof(T)))) {
    if (size > 0) std::memset(static_cast<void*>(data_), 0xcd, size_t(size) * sizeof(T));
  }
  ~Buffer() {
    std::free(data_);
  }
  Buffer(const Buffer&) = delete;
  T* get() const {
    return data_;
  }
  T& operator[](int64_t i) {
    return data_[i];
  }
  int64_t size() const {
    return size_;
  }
  // Same bytes as what the CPU kernels gave.
  bool equals(const Buffer& want) const {
    const auto* bytes = reinterpret_cast<const unsigned char*>(want.data_);
    for (size_t i = 0; i < size_t(size_) * sizeof(T); ++i) checksum = (checksum ^ bytes[i]) * 1099511628211u;
    return cpu_only || size_ == 0 || std::memcmp(data_, want.data_, size_t(size_) * sizeof(T)) == 0;
  }

 private:
  int64_t size_;
  T* data_;
};

void require(cudaError_t error) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "a CUDA call failed with error %d\n", int(error));
  std::exit(4);
}

// Device memory of exactly a buffer's size.
template <class T>
class OnDevice {
 public:
  explicit OnDevice(int64_t size) : bytes_(size_t(size) * sizeof(T)) {
    require(cudaMalloc(&memory_, bytes_));
  }
  explicit OnDevice(const Buffer<T>& from) : OnDevice(from.size()) {
    require(cudaMemcpy(memory_, from.get(), bytes_, cudaMemcpyHostToDevice));
  }
  ~OnDevice() {
    cudaFree(memory_);
  }
  OnDevice(const OnDevice&) = delete;
  T* get() const {
    return static_cast<T*>(memory_);
  }
  void copy_to(Buffer<T>& to) const {
    require(cudaMemcpy(to.get(), memory_, bytes_, cudaMemcpyDeviceToHost));
  }

 private:
  size_t bytes_;
  void* memory_;
};

float nasty_coordinate() {
  constexpr float inf = std::numeric_limits<float>::infinity();
  return one_of(0.0f, -0.0f, 1.0f, 1e-20f, -1e-20f, 1e-45f, 1e10f, -1e10f, 1e19f, -1e19f, FLT_MAX, -FLT_MAX, inf, -inf,
                std::numeric_limits<float>::quiet_NaN(), 16777216.0f, 16777217.0f);
}

enum class Boxes { kGrid, kIntegers, kFree, kTiny, kNasty };

Box random_box(Boxes kind, int64_t i) {
  switch (kind) {
    case Boxes::kGrid: {  // anchors: two scales at each point of a grid, many ties
      const float x = float(i / 2 % 24) * 4, y = float(i / 48) * 4, half = i % 2 == 0 ? 8 : 16;
      return {x - half, y - half, x + half, y + half};
    }
    case Boxes::kIntegers: {
      const float x = float(below(20)), y = float(below(20));
      return {x, y, x + float(below(8)), y + float(below(8))};
    }
    case Boxes::kFree: {
      const float x = uniform(-50, 800), y = uniform(-50, 800), w = std::exp(uniform(0, 6)),
                  h = std::exp(uniform(0, 6));
      return {x, y, x + w, y + h};
    }
    case Boxes::kTiny: {
      const float unit = one_of(1e-20f, 1e-30f, 1e18f, 1.5e19f);
      return {uniform(0, unit), uniform(0, unit), uniform(unit, 2 * unit), uniform(unit, 2 * unit)};
    }
    case Boxes::kNasty:
      return {nasty_coordinate(), nasty_coordinate(), nasty_coordinate(), nasty_coordinate()};
  }
  return {};
}

void fill(Buffer<Box>& boxes, int64_t period, Boxes kind) {
  for (int64_t i = 0; i < boxes.size(); ++i) {
    const bool odd_one_out = kind != Boxes::kGrid && below(16) == 0;
    boxes[i] = random_box(odd_one_out ? Boxes::kNasty : kind, i % period);
  }
}

Boxes any_kind() {
  return one_of(Boxes::kGrid, Boxes::kIntegers, Boxes::kFree, Boxes::kFree, Boxes::kTiny, Boxes::kNasty);
}

// Ground truth that has a chance to match: anchors, moved a little.
void fill_near(Buffer<Box>& boxes, Buffer<Box>& anchors) {
  for (int64_t j = 0; j < boxes.size(); ++j) {
    boxes[j] = anchors[below(anchors.size())];
    if (below(3) == 0) continue;
    boxes[j].x1 += uniform(-6, 6);
    boxes[j].y2 += uniform(-6, 6);
  }
}

bool box_iou_case() {
  const int64_t m = one_of(0, 1, 2, 7, 33, 100), n = one_of(0, 1, 3, 31, 32, 255, 256, 257, 700);
  Buffer<Box> boxes1(m), boxes2(n);
  fill(boxes1, m + 1, any_kind());
  fill(boxes2, n + 1, any_kind());
  Buffer<float> got(m * n), want(m * n);
  if (!cpu_only) {
    const OnDevice<Box> rows(boxes1), columns(boxes2);
    const OnDevice<float> ious(m * n);
    require(launch_box_iou(rows.get(), m, columns.get(), n, ious.get(), nullptr));
    ious.copy_to(got);
  }
  cpu_box_iou(boxes1.get(), boxes2.get(), n, 0, m, want.get());
  return got.equals(want);
}

// Rows of each image, ending at the number of rows.
void fill_offsets(Buffer<int64_t>& offsets, int64_t most) {
  offsets[0] = 0;
  for (int64_t b = 1; b < offsets.size(); ++b)
    offsets[b] = offsets[b - 1] + one_of<int64_t>(0, 1, 3, below(most), most);
}

bool match_case() {
  const int64_t images = one_of(1, 1, 2, 3), n = small ? one_of(1, 33, 257, 300) : one_of(1, 31, 32, 33, 256, 257, 700);
  const int64_t most = small ? 20 : one_of(4, 40, 300);
  Buffer<int64_t> gt_offsets(images + 1), ignore_offsets(images + 1);
  fill_offsets(gt_offsets, most);
  fill_offsets(ignore_offsets, below(2) * most / 2 + 1);
  const int64_t num_gts = gt_offsets[images], num_ignores = ignore_offsets[images];
  const bool anchors_per_image = below(2) == 1;
  const Boxes kind = any_kind();
  Buffer<Box> gts(num_gts), anchors((anchors_per_image ? images : 1) * n), ignores(num_ignores);
  fill(anchors, n, kind);
  if (below(3) > 0) {
    fill_near(gts, anchors);
  } else {
    fill(gts, num_gts + 1, kind);
  }
  fill(ignores, num_ignores + 1, kind);
  const float low = one_of(0.4f, 0.5f, 0.1f, 1e-6f, FLT_MIN), high = one_of(0.6f, 0.5f, 1.0f);
  const SecondPass second_pass = one_of(SecondPass::kNone, SecondPass::kBest, SecondPass::kBest, SecondPass::kAll);
  const float ignore_thresh = one_of(0.5f, 1.0f, 0.01f);
  const bool offsets_given = images > 1 || below(2) == 1;

  Buffer<uint64_t> want_offers(num_gts);
  Buffer<int64_t> idxs(images * n), want_idxs(images * n);
  Buffer<int8_t> labels(images * n), want_labels(images * n);
  Buffer<float> ious(images * n), want_ious(images * n);
  const auto run = [&](const Buffer<int64_t>& gt_rows, const Buffer<int64_t>& ignore_rows) {
    const OnDevice<Box> gpu_gts(gts), gpu_anchors(anchors), gpu_ignores(ignores);
    const OnDevice<int64_t> gpu_gt_rows(gt_rows), gpu_ignore_rows(ignore_rows), gpu_idxs(images * n);
    const OnDevice<uint64_t> offers(num_gts);
    const OnDevice<int8_t> gpu_labels(images * n);
    const OnDevice<float> gpu_ious(images * n);
    MatchBatch batch{};
    batch.gt_boxes = gpu_gts.get();
    batch.num_gts = num_gts;
    batch.gt_offsets = offsets_given ? gpu_gt_rows.get() : nullptr;
    batch.anchors = gpu_anchors.get();
    batch.num_anchors = n;
    batch.anchors_per_image = anchors_per_image;
    batch.ignore_boxes = gpu_ignores.get();
    batch.num_ignore_boxes = num_ignores;
    batch.ignore_offsets = offsets_given ? gpu_ignore_rows.get() : nullptr;
    batch.num_images = images;
    batch.low = low;
    batch.high = high;
    batch.ignore_thresh = ignore_thresh;
    batch.second_pass = second_pass;
    batch.offers = offers.get();
    batch.matched_idxs = gpu_idxs.get();
    batch.match_labels = gpu_labels.get();
    batch.max_ious = gpu_ious.get();
    require(launch_two_pass_match(batch, nullptr));
    gpu_idxs.copy_to(idxs);
    gpu_labels.copy_to(labels);
    gpu_ious.copy_to(ious);
  };
  if (!cpu_only) run(gt_offsets, ignore_offsets);

  for (int64_t b = 0; b < images; ++b) {
    const MatchProblem problem{gts.get() + gt_offsets[b],
                               gt_offsets[b + 1] - gt_offsets[b],
                               anchors.get() + (anchors_per_image ? b * n : 0),
                               n,
                               ignores.get() + ignore_offsets[b],
                               ignore_offsets[b + 1] - ignore_offsets[b],
                               low,
                               high,
                               ignore_thresh,
                               second_pass,
                               want_offers.get() + gt_offsets[b],
                               want_idxs.get() + b * n,
                               want_labels.get() + b * n,
                               want_ious.get() + b * n};
    for (int64_t j = 0; j < problem.num_gts; ++j) problem.offers[j] = kUnmatched;
    cpu_match_first_pass(problem, 0, problem.num_blocks());
    cpu_match_second_pass(problem);
  }
  const bool same_idxs = idxs.equals(want_idxs), same_labels = labels.equals(want_labels);
  if (!(ious.equals(want_ious) && same_idxs && same_labels)) return false;
  if (cpu_only) return true;

  // Offsets that lie: any result of the right kind will do, as long as it stays inside the memory it was given.
  Buffer<int64_t> lies(images + 1);
  for (int64_t b = 0; b <= images; ++b) lies[b] = one_of(int64_t(rng()), below(num_gts + 2) - 1, INT64_MIN, INT64_MAX);
  run(lies, lies);
  bool sane = true;
  for (int64_t i = 0; i < images * n; ++i) {
    sane = sane && idxs[i] >= 0 && (idxs[i] < num_gts || idxs[i] == 0) && labels[i] >= -1 && labels[i] <= 1;
  }
  return sane;
}

float random_loss(int kind) {
  constexpr float inf = std::numeric_limits<float>::infinity();
  switch (kind) {
    case 0:
      return uniform(0, 10);
    case 1:
      return 0.25f;
    case 2:
      return std::exp(uniform(-40, 16));
    case 3:
      return one_of(0.0f, -0.0f, -1.0f, inf, -inf, std::numeric_limits<float>::quiet_NaN(), 1e6f, 2e6f, 1e-45f,
                    FLT_MAX);
    default:
      return 1.0f + float(below(4)) * FLT_EPSILON;  // one bin, few keys
  }
}

bool subsample_case() {
  const bool crowded = !small && below(12) == 0;                  // more rivals than a list holds
  const bool many_groups = !small && !crowded && below(60) == 0;  // more images than one set of launches takes
  const int64_t images = many_groups ? 2 : one_of(1, 1, 2, 3);
  const int64_t groups = many_groups ? 1024 : (crowded || small ? one_of(1, 2) : one_of(1, 2, 3, 4, 7));
  int64_t n = small ? one_of(1, 257, 400) : one_of(1, 2, 31, 255, 256, 257, 1000, 3001);
  if (crowded || many_groups) n = crowded ? 9001 : 5000;
  int64_t per_group = one_of<int64_t>(0, 1, 2, 5, 64, 256, 1000, n / (2 * groups), INT32_MAX);
  if (small || many_groups) per_group = small ? one_of<int64_t>(1, 5, 64, n / (2 * groups), INT32_MAX) : 2;
  const double fraction = one_of(0.25, 0.25, 0.0, 0.5, 1.0, 0.1);
  // Equal losses leave rivals to order even where there are few anchors.
  const SampleMethod often = small || crowded ? SampleMethod::kOhem : SampleMethod::kWrs;
  SampleMethod method = one_of(SampleMethod::kRandom, SampleMethod::kWrs, SampleMethod::kOhem, often, often);
  const bool groups_per_image = below(2) == 1;
  const int loss_kind = crowded || (small && below(2) == 0) ? one_of(1, 4) : int(below(5));
  const int64_t one_in = one_of(1, 2, 10, 50);  // share of positives

  Buffer<int8_t> labels(images * n), sampled(images * n), want(images * n);
  Buffer<int64_t> group_idxs((groups_per_image ? images : 1) * n), seed_tensor(1);
  Buffer<float> losses(method == SampleMethod::kRandom ? 0 : images * n);
  for (int64_t i = 0; i < images * n; ++i) labels[i] = below(one_in) == 0 ? kPositive : kNegative;
  for (int64_t i = 0; i < images * n / 8; ++i) labels[below(images * n)] = int8_t(one_of(-1, -1, 2, -128, 127));
  for (int64_t i = 0; i < group_idxs.size(); ++i) {
    group_idxs[i] = below(20) == 0 ? one_of(int64_t{-1}, groups, INT64_MIN, INT64_MAX) : below(groups);
  }
  for (int64_t i = 0; i < losses.size(); ++i) losses[i] = random_loss(loss_kind);
  seed_tensor[0] = one_of(int64_t(rng()), int64_t{0}, int64_t{-1}, INT64_MIN, INT64_MAX);
  const bool seed_on_device = below(2) == 1;
  const int64_t first_image = one_of<int64_t>(0, 5, INT32_MAX - 3);
  if (method == SampleMethod::kOhem && below(2) == 0) method = SampleMethod::kOhemAll;

  const float* loss_ptr = method == SampleMethod::kRandom ? nullptr : losses.get();
  const Quota quota = make_quota(per_group, fraction);
  if (!cpu_only) {
    const OnDevice<int8_t> gpu_labels(labels), gpu_sampled(images * n);
    const OnDevice<int64_t> gpu_groups(group_idxs), gpu_seed(seed_tensor);
    const OnDevice<float> gpu_losses(losses);
    const OnDevice<uint8_t> scratch(group_subsample_scratch_bytes(images, groups));
    SubsampleBatch batch{};
    batch.match_labels = gpu_labels.get();
    batch.group_idxs = gpu_groups.get();
    batch.losses = method == SampleMethod::kRandom ? nullptr : gpu_losses.get();
    batch.num_images = images;
    batch.num_anchors = n;
    batch.num_groups = groups;
    batch.groups_per_image = groups_per_image;
    batch.quota = quota;
    batch.method = method;
    batch.seed_tensor = seed_on_device ? gpu_seed.get() : nullptr;
    batch.seed = seed_on_device ? 12345 : seed_tensor[0];
    batch.first_image = first_image;
    batch.sampled_labels = gpu_sampled.get();
    require(launch_group_subsample(batch, scratch.get(), nullptr));
    gpu_sampled.copy_to(sampled);
  }

  for (int64_t b = 0; b < images; ++b) {
    const SubsampleProblem problem{labels.get() + b * n,
                                   group_idxs.get() + (groups_per_image ? b * n : 0),
                                   loss_ptr == nullptr ? nullptr : loss_ptr + b * n,
                                   n,
                                   groups,
                                   quota,
                                   method,
                                   uint64_t(seed_tensor[0]),
                                   uint32_t(first_image + b),
                                   want.get() + b * n};
    Reservoirs reservoirs = cpu_subsample_collect(problem, 0, problem.num_chunks());
    for (int64_t g = 0; g < problem.num_groups; ++g) cpu_subsample_draw(problem, reservoirs, g, g + 1);
  }
  return sampled.equals(want);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) {
    std::fprintf(stderr, "usage: fuzz box_iou|two_pass_match|group_subsample NUM_CASES SCHEDULE_SEED [small | cpu]\n");
    return 2;
  }
  const std::string op = argv[1];
  const long num_cases = std::atol(argv[2]);
  const std::string mode = argc > 4 ? argv[4] : "";
  small = mode == "small";
  cpu_only = mode == "cpu";
  if (gs_shim::set_schedule != nullptr) gs_shim::set_schedule(uint64_t(std::atoll(argv[3])));
  long mismatches = 0;
  for (long c = 0; c < num_cases; ++c) {
    rng.seed(uint64_t(c));  // the same cases under every schedule
    const bool equal = op == "box_iou" ? box_iou_case() : (op == "two_pass_match" ? match_case() : subsample_case());
    if (!equal && ++mismatches <= 5) std::fprintf(stderr, "%s: case %ld differs from the CPU\n", op.c_str(), c);
  }
  std::printf("%s: %ld cases, schedule %s, %ld mismatches, checksum %016llx\n", op.c_str(), num_cases, argv[3],
              mismatches, static_cast<unsigned long long>(checksum));
  return mismatches == 0 ? 0 : 1;
}
