// The rotation as a custom op of ONNX Runtime: bfmoe::RotateRows, each row by its expert's angles.
//
//   y = RotateRows(x, ids, angles, scales)    attributes d, inverse
//
// x (rows, d) float; ids (rows) int64; angles (experts, stages, d / 2) in natural order, as float,
// float16 or int8 codes, or (experts, stages, bytes) uint8 with two 4-bit codes a byte; scales
// (experts, stages) float16 beside codes, else empty. A row whose expert is out of range becomes
// NaN. `session_options.register_custom_ops_library(<this library>)` finds RegisterCustomOps below.
//
// No header of ONNX Runtime is needed. Its C interface is a table of functions, whose first 102
// places are fixed for good since version 1; the few that are called here are declared by place.

#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <mutex>
#include <numeric>
#include <utility>
#include <vector>

#include "common.h"
#include "rotate.h"

EXPORT const void* bfmoe_plan(int64_t d, int64_t stages);

namespace bfmoe {
namespace {

#if defined(_WIN32)
#define ORT_CALL __stdcall
#else
#define ORT_CALL
#endif

using Status = void;  // null: success
using Api = const void* const*;

struct ApiBase {
  Api(ORT_CALL* get_api)(uint32_t version);
  const char*(ORT_CALL* get_version)();
};

// The op as ONNX Runtime sees it, up to the fields that version 8 of the interface has.
struct CustomOp {
  uint32_t version;
  void*(ORT_CALL* create)(const CustomOp*, Api, const void* info);
  const char*(ORT_CALL* name)(const CustomOp*);
  const char*(ORT_CALL* provider)(const CustomOp*);
  int(ORT_CALL* input_type)(const CustomOp*, size_t);
  size_t(ORT_CALL* inputs)(const CustomOp*);
  int(ORT_CALL* output_type)(const CustomOp*, size_t);
  size_t(ORT_CALL* outputs)(const CustomOp*);
  void(ORT_CALL* compute)(void* kernel, void* context);
  void(ORT_CALL* destroy)(void* kernel);
  int(ORT_CALL* input_kind)(const CustomOp*, size_t);
  int(ORT_CALL* output_kind)(const CustomOp*, size_t);
};
constexpr uint32_t kVersion = 8;

enum Place {
  kCreateDomain = 26,
  kDomainAdd = 27,
  kAddDomain = 28,
  kTensorData = 51,
  kElementType = 60,
  kRank = 61,
  kSizes = 62,
  kShape = 65,
  kAttribute = 86,
  kInput = 90,
  kOutput = 91,
  kReleaseShape = 99,
};

template <typename... Args>
Status* call(Api api, Place place, Args... args) {
  return reinterpret_cast<Status*(ORT_CALL*)(Args...)>(const_cast<void*>(api[place]))(args...);
}

enum Type { kAny = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kInt64 = 7, kHalf = 10 };

struct Tensor {
  const void* data = nullptr;
  int type = 0;
  std::vector<int64_t> sizes;
};

bool input(Api api, void* context, size_t index, Tensor& to) {
  const void* value = nullptr;
  void *info = nullptr, *data = nullptr;
  size_t rank = 0;
  if (call(api, kInput, context, index, &value) || !value) return false;
  if (call(api, kShape, value, &info)) return false;
  call(api, kElementType, static_cast<const void*>(info), &to.type);
  call(api, kRank, static_cast<const void*>(info), &rank);
  to.sizes.resize(rank);
  call(api, kSizes, static_cast<const void*>(info), to.sizes.data(), rank);
  reinterpret_cast<void(ORT_CALL*)(void*)>(const_cast<void*>(api[kReleaseShape]))(info);
  call(api, kTensorData, const_cast<void*>(value), &data);
  to.data = data;
  return true;
}

const Plan& plan_of(int64_t d, int64_t stages) {
  static std::mutex mutex;
  static std::map<std::pair<int64_t, int64_t>, const Plan*> plans;
  const std::lock_guard<std::mutex> lock(mutex);
  const Plan*& plan = plans[{d, stages}];
  if (!plan) plan = static_cast<const Plan*>(bfmoe_plan(d, stages));
  return *plan;
}

// One expert's angles in float32, (stages, pairs).
void decode(const Tensor& angles, const Tensor& scales, int64_t expert, int64_t pairs, float* to) {
  const int64_t stages = angles.sizes[1], width = angles.sizes[2], size = stages * width;
  if (angles.type == kFloat) {
    std::memcpy(to, static_cast<const float*>(angles.data) + expert * size, size * sizeof(float));
    return;
  }
  if (angles.type == kHalf) {
    widen(static_cast<const uint16_t*>(angles.data) + expert * size, to, size);
    return;
  }
  std::vector<float> scale(stages);
  widen(static_cast<const uint16_t*>(scales.data) + expert * stages, scale.data(), stages);
  const auto* codes = static_cast<const int8_t*>(angles.data) + expert * size;
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes);
  for (int64_t s = 0; s < stages; ++s, codes += width, bytes += width, to += pairs) {
    if (angles.type == kInt8)
      for (int64_t j = 0; j < pairs; ++j) to[j] = codes[j] * scale[s];
    else
      for (int64_t j = 0; j < pairs; ++j)
        to[j] = ((j % 2 ? bytes[j / 2] >> 4 : bytes[j / 2] & 15) - 8) * scale[s];
  }
}

struct Kernel {
  Api api;
  int64_t d, inverse;

  void compute(void* context) const {
    Tensor x, ids, angles, scales;
    for (auto [index, tensor] : {std::pair{0, &x}, {1, &ids}, {2, &angles}, {3, &scales}})
      if (!input(api, context, index, *tensor)) return;
    const int64_t rows = x.sizes[0], experts = angles.sizes[0], pairs = d / 2;
    void *value = nullptr, *data = nullptr;
    const int64_t shape[] = {rows, d};
    if (call(api, kOutput, context, size_t{0}, shape, size_t{2}, &value)) return;
    call(api, kTensorData, value, &data);
    auto* y = static_cast<float*>(data);
    const auto* from = static_cast<const float*>(x.data);
    const auto* expert = static_cast<const int64_t*>(ids.data);
    const Plan& plan = plan_of(d, angles.sizes[1]);
    std::vector<int64_t> order(rows);  // rows of one expert follow one another: decoded once
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(),
                     [&](int64_t a, int64_t b) { return expert[a] < expert[b]; });
    float* table = kept<float, 8>(plan.stages * pairs);
    int64_t decoded = -1;
    for (const int64_t row : order) {
      float* to = y + row * d;
      if (expert[row] < 0 || expert[row] >= experts) {
        std::fill(to, to + d, std::numeric_limits<float>::quiet_NaN());
        continue;
      }
      if (expert[row] != decoded) decode(angles, scales, decoded = expert[row], pairs, table);
      rotate_rows(plan, from + row * d, to, 1, table, inverse != 0);
    }
  }
};

void* ORT_CALL create(const CustomOp*, Api api, const void* info) {
  auto kernel = std::make_unique<Kernel>(Kernel{api, 0, 0});
  if (call(api, kAttribute, info, "d", &kernel->d) ||
      call(api, kAttribute, info, "inverse", &kernel->inverse) || kernel->d < 2)
    return nullptr;
  return kernel.release();
}

constexpr int kInputTypes[] = {kFloat, kInt64, kAny, kHalf};

CustomOp rotate_op{
    kVersion,
    create,
    [](const CustomOp*) { return "RotateRows"; },
    [](const CustomOp*) -> const char* { return nullptr; },  // the CPU
    [](const CustomOp*, size_t i) { return kInputTypes[i]; },
    [](const CustomOp*) { return size_t{4}; },
    [](const CustomOp*, size_t) { return int{kFloat}; },
    [](const CustomOp*) { return size_t{1}; },
    [](void* kernel, void* context) { static_cast<const Kernel*>(kernel)->compute(context); },
    [](void* kernel) { delete static_cast<Kernel*>(kernel); },
    [](const CustomOp*, size_t) { return 0; },  // required
    [](const CustomOp*, size_t) { return 0; },
};

}  // namespace
}  // namespace bfmoe

// What ONNX Runtime calls when the library is registered; the domain lives as long as the process.
EXPORT void* ORT_CALL RegisterCustomOps(void* session_options, const bfmoe::ApiBase* base) {
  using namespace bfmoe;
  const Api api = base->get_api(kVersion);
  if (!api) return nullptr;  // the graph will then name the op that is missing
  static void* domain = [api] {
    void* made = nullptr;
    if (!call(api, kCreateDomain, "bfmoe", &made))
      call(api, kDomainAdd, made, static_cast<const CustomOp*>(&rotate_op));
    return made;
  }();
  return call(api, kAddDomain, session_options, domain);
}
