// The operators: what Python calls. Everything is checked here, and nowhere after.
#include <sys/mman.h>

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#pragma GCC diagnostic pop

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <memory>
#include <optional>
#include <sstream>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

#include "call.h"
#include "cuts.h"

namespace normkit {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

void parallel(int64_t n, int64_t grain, Task task, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(0, n, grain, task, context));
}
int64_t threads() { return torch::stable::get_num_threads(); }

namespace {

// ---- the choice of instruction set

struct Choice {
  const char* name;
  Kernels kernels[4];

  Choice(const char* name, const Kernels (&of)[4]) : name(name) {
    std::copy(std::begin(of), std::end(of), kernels);
  }
};

std::vector<Choice> supported() {
  std::vector<Choice> found;
#if defined(__x86_64__)
  __builtin_cpu_init();
  bool base = __builtin_cpu_supports("f16c") && __builtin_cpu_supports("fma");
  if (base && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (__builtin_cpu_supports("avx512bf16")) {
      found.emplace_back("avx512_bf16", avx512::kernels);
      found.back().kernels[kBFloat16] = avx512_bf16::kernels;
    }
    found.emplace_back("avx512", avx512::kernels);
  }
  if (base && __builtin_cpu_supports("avx2")) found.emplace_back("avx2", avx2::kernels);
#endif
  found.emplace_back("portable", portable::kernels);
  return found;
}

const Choice& chosen() {
  static const Choice choice = [] {
    auto found = supported();
    const char* wanted = std::getenv("NORMKIT_CPU");
    if (!wanted || !*wanted) return found[0];
    std::string known;
    for (const auto& one : found) {
      if (std::strcmp(one.name, wanted) == 0) return one;
      known += std::string(known.empty() ? "" : ", ") + one.name;
    }
    STD_TORCH_CHECK(false, "NORMKIT_CPU=", wanted, ": this processor and build offer ", known);
    return found[0];
  }();
  return choice;
}

std::string instructions() { return chosen().name; }

// ---- the codes of pools and activations

template <class E>
struct Named {
  E code;
  const char* name;
};
constexpr Named<Summed> kSummed[] = {
    {Summed::ns, "ns"}, {Summed::s, "s"}, {Summed::ks, "ks"}, {Summed::k, "k"}};
constexpr Named<Act> kActs[] = {{Act::none, "None"},
                                {Act::relu, "relu"},
                                {Act::leaky_relu, "leaky_relu"},
                                {Act::silu, "silu"},
                                {Act::gelu, "gelu"}};

// The name of a code, or null where it has none.
template <class E, size_t N>
const char* name_of(const Named<E> (&names)[N], E code) {
  for (const auto& one : names)
    if (one.code == code) return one.name;
  return nullptr;
}

template <class E, size_t N>
void check_code(const char* op, const char* what, const Named<E> (&names)[N], E code) {
  STD_TORCH_CHECK(name_of(names, code), op, ": unknown ", what, " ", static_cast<int64_t>(code));
}

// As backend/cpu.py has them too, which compares.
std::string codes() {
  std::ostringstream out;
  auto list = [&](const auto& names) {
    for (const auto& [code, name] : names)
      out << (out.tellp() > 0 ? " " : "") << name << "=" << static_cast<int64_t>(code);
  };
  list(kSummed);
  list(kActs);
  return out.str();
}

// ---- checks

std::string shown(IntHeaderOnlyArrayRef sizes) {
  std::ostringstream out;
  out << "(";
  for (size_t i = 0; i < sizes.size(); ++i) out << (i ? ", " : "") << sizes[i];
  out << (sizes.size() == 1 ? ",)" : ")");
  return out.str();
}

enum class Layout { other, contiguous, channels_last };

bool strides_follow(const Tensor& x, const std::vector<int64_t>& order) {
  auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  for (int64_t axis : order) {
    if (sizes[axis] != 1 && strides[axis] != expected) return false;
    expected *= sizes[axis];
  }
  return true;
}

Layout layout_of(const Tensor& x) {
  int64_t n = x.dim();
  if (x.is_contiguous()) return Layout::contiguous;
  if (n < 3) return Layout::other;
  std::vector<int64_t> order{1};
  for (int64_t axis = n - 1; axis >= 2; --axis) order.push_back(axis);
  order.push_back(0);
  return strides_follow(x, order) ? Layout::channels_last : Layout::other;
}

int storage_of(const char* op, const char* name, const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return kFloat;
    case ScalarType::BFloat16:
      return kBFloat16;
    case ScalarType::Half:
      return kHalf;
    case ScalarType::Double:
      return kDouble;
    default:
      STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
                      torch::headeronly::toString(x.scalar_type()));
  }
  return 0;
}

void check_cpu(const char* op, const char* name, const Tensor& t) {
  STD_TORCH_CHECK(t.is_cpu(), op, ": ", name, " must be on the CPU");
}

// t has x's shape, dtype (or a given one) and layout.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& x,
                Layout layout, ScalarType dtype) {
  check_cpu(op, name, t);
  bool same = t.dim() == x.dim();
  for (int64_t i = 0; same && i < x.dim(); ++i) same = t.size(i) == x.size(i);
  STD_TORCH_CHECK(same, op, ": ", name, " must have x's shape ", shown(x.sizes()), ", got ",
                  shown(t.sizes()));
  STD_TORCH_CHECK(t.scalar_type() == dtype, op, ": ", name, " must be ",
                  torch::headeronly::toString(dtype), ", got ",
                  torch::headeronly::toString(t.scalar_type()));
  bool dense = layout == Layout::contiguous ? t.is_contiguous()
                                            : t.numel() == 0 || layout_of(t) == layout;
  STD_TORCH_CHECK(dense, op, ": ", name, " must be laid out as x, with strides ",
                  shown(x.strides()), ", got ", shown(t.strides()));
}

template <class T, class F>
void each(const Tensor& t, int64_t n, F f) {
  const T* p = static_cast<const T*>(t.const_data_ptr());
  for (int64_t i = 0; i < n; ++i) f(i, p[i]);
}

void check_values(const char* op, const char* name, const Tensor& t, int64_t n) {
  check_cpu(op, name, t);
  STD_TORCH_CHECK(t.numel() == n, op, ": ", name, " must have ", n, " values, got shape ",
                  shown(t.sizes()));
  STD_TORCH_CHECK(t.is_contiguous(), op, ": ", name, " must be contiguous, got strides ",
                  shown(t.strides()));
}

// The n values of a small tensor, or one value n times.
template <class T>
std::vector<T> values(const char* op, const char* name, const Optional& t, int64_t n, T otherwise) {
  if (!t) return std::vector<T>(static_cast<size_t>(n), otherwise);
  check_values(op, name, *t, n);
  std::vector<T> out(static_cast<size_t>(n));
  auto put = [&](int64_t i, auto v) { out[static_cast<size_t>(i)] = static_cast<T>(v); };
  switch (storage_of(op, name, *t)) {
    case kFloat:
      each<float>(*t, n, put);
      break;
    case kDouble:
      each<double>(*t, n, put);
      break;
    case kBFloat16:
      each<torch::headeronly::BFloat16>(*t, n, [&](int64_t i, auto v) {
        put(i, static_cast<float>(v));
      });
      break;
    default:
      each<torch::headeronly::Half>(*t, n, [&](int64_t i, auto v) {
        put(i, static_cast<float>(v));
      });
  }
  return out;
}

constexpr int64_t kMost = int64_t{1} << 40;  // pools, or channels, of which an empty x may have any

// A call's geometry: where each of the formula's pools lies in memory.
struct Geometry {
  bool by_rows;
  Rows rows;
  Columns columns;
  int64_t entries;                  // of the affine
  std::vector<int64_t> statistics;  // the shape of mean, rstd and var

  // Beyond kMost, kMost + 1: the product may not fit.
  int64_t pools() const {
    int64_t n = 1;
    for (int64_t size : statistics) n = size > 0 && n > kMost / size ? kMost + 1 : n * size;
    return n;
  }
};

Geometry geometry(const char* op, const Tensor& x, Layout layout, const Pool& pool) {
  const auto [summed, groups, trailing] = pool;
  Geometry g{};
  int64_t dim = x.dim();
  auto rows = [&](int64_t pools, int64_t segments, int64_t length, int64_t pool_stride,
                  int64_t segment_stride, int64_t period, int64_t pool_step, int64_t segment_step,
                  bool vector, int64_t jump = 0) {
    g.by_rows = true;
    g.rows = {pools, segments, length,    pool_stride,  segment_stride,
              jump,  period,   pool_step, segment_step, vector};
  };
  auto columns = [&](int64_t outer, int64_t rows, int64_t columns, int64_t group, int64_t repeat,
                     bool per_row) {
    g.by_rows = false;
    g.columns = {outer, rows, columns, group, repeat, per_row};
  };
  if (trailing > 0) {
    STD_TORCH_CHECK(summed == Summed::k, op,
                    ": only pools over axis 1 or the last axes take trailing, got ", trailing,
                    " with pool ", name_of(kSummed, summed));
    STD_TORCH_CHECK(trailing <= dim, op, ": trailing must be at most x's rank ", dim, ", got ",
                    trailing);
    STD_TORCH_CHECK(layout == Layout::contiguous, op,
                    ": x must be contiguous when its last axes are normalized, got strides ",
                    shown(x.strides()));
    int64_t length = 1, pools = 1;
    for (int64_t i = 0; i < dim; ++i) (i < dim - trailing ? pools : length) *= x.size(i);
    for (int64_t i = 0; i < dim - trailing; ++i) g.statistics.push_back(x.size(i));
    rows(pools, 1, length, length, length, 1, 0, 0, true);
    g.entries = length;
    return g;
  }
  STD_TORCH_CHECK(trailing == 0, op, ": trailing must be at least 0, got ", trailing);
  STD_TORCH_CHECK(dim >= 2, op, ": x must be (N, C, *), got shape ", shown(x.sizes()));
  int64_t n = x.size(0), channels = x.size(1), s = 1;
  for (int64_t i = 2; i < dim; ++i) s *= x.size(i);
  bool last = layout == Layout::channels_last || s == 1;
  g.entries = channels;
  switch (summed) {
    case Summed::ns: {
      // `groups` of batch norm is the number of ghost batches, 0 for one batch without that axis.
      int64_t ghosts = groups > 0 ? groups : 1, each = n / ghosts;
      STD_TORCH_CHECK(groups >= 0 && n % ghosts == 0, op, ": groups must be a number of equal ",
                      "parts of the ", n, " samples, got ", groups);
      g.statistics = {channels};
      if (groups > 0) g.statistics.insert(g.statistics.begin(), ghosts);
      if (last)
        columns(ghosts, each * s, channels, 1, 1, false);
      else if (s > 0 && s < kShortRun)
        columns(ghosts, each, channels * s, s, s, false);
      else
        rows(ghosts * channels, each, s, s, channels * s, channels, 1, 0, false,
             ghosts > 1 ? (each - 1) * channels * s : 0);
      break;
    }
    case Summed::s:
      g.statistics = {n, channels};
      if (last && s > 1)
        columns(n, s, channels, 1, 1, false);
      else
        rows(n * channels, 1, s, s, s, channels, 1, 0, false);
      break;
    case Summed::ks: {
      STD_TORCH_CHECK(groups > 0 && channels % groups == 0, op, ": groups must divide the ",
                      channels, " channels, got ", groups);
      int64_t k = channels / groups;
      g.statistics = {n, groups};
      if (s == 1)
        rows(n * groups, 1, k, k, k, groups, k, 0, true);
      else if (last)
        columns(n, s, channels, k, 1, false);
      else
        rows(n * groups, k, s, k * s, s, groups, k, 1, false);
      break;
    }
    case Summed::k:
      g.statistics = {n};
      for (int64_t i = 2; i < dim; ++i) g.statistics.push_back(x.size(i));
      if (last)
        rows(n * s, 1, channels, channels, channels, 1, 0, 0, true);
      else
        columns(n, channels, s, 1, 1, true);
  }
  return g;
}

// ---- memory

constexpr size_t kHuge = size_t{1} << 21;  // bytes of a huge page

// Straight to the allocator: an operator of torch would cost a microsecond more through the stack.
Tensor new_strided(int64_t dim, const int64_t* sizes, const int64_t* strides, ScalarType dtype) {
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      dim, sizes, strides, static_cast<int32_t>(dtype), aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

// A tensor like x. A fresh large allocation costs a page fault every 4 KiB; huge pages cost one
// every 2 MiB. Below 32 MiB malloc keeps what was freed, and nothing is gained.
Tensor new_like(const Tensor& x) {
  Tensor t = new_strided(x.dim(), x.sizes().data(), x.strides().data(), x.scalar_type());
  size_t bytes = static_cast<size_t>(t.numel()) * t.element_size();
  if (bytes >= kHugeFrom) {
    auto begin = reinterpret_cast<uintptr_t>(t.mutable_data_ptr());
    auto from = (begin + kHuge - 1) / kHuge * kHuge, to = (begin + bytes) / kHuge * kHuge;
    if (to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
  }
  return t;
}

Tensor new_tensor(const std::vector<int64_t>& sizes, ScalarType dtype) {
  std::vector<int64_t> strides(sizes.size(), 1);
  for (size_t i = sizes.size(); i-- > 1;) strides[i - 1] = strides[i] * (sizes[i] ? sizes[i] : 1);
  return new_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), dtype);
}

void put_values(Tensor& t, const std::vector<double>& values) {
  void* p = t.mutable_data_ptr();
  switch (t.scalar_type()) {
    case ScalarType::Float:
      for (size_t i = 0; i < values.size(); ++i)
        static_cast<float*>(p)[i] = static_cast<float>(values[i]);
      break;
    case ScalarType::Double:
      if (!values.empty()) std::memcpy(p, values.data(), values.size() * sizeof(double));
      break;
    case ScalarType::BFloat16:
      for (size_t i = 0; i < values.size(); ++i)
        static_cast<torch::headeronly::BFloat16*>(p)[i] = static_cast<float>(values[i]);
      break;
    default:
      for (size_t i = 0; i < values.size(); ++i)
        static_cast<torch::headeronly::Half*>(p)[i] = static_cast<float>(values[i]);
  }
}

Tensor parameter_like(const Tensor& like, const std::vector<double>& values) {
  Tensor t = new_strided(like.dim(), like.sizes().data(), like.strides().data(), like.scalar_type());
  put_values(t, values);
  return t;
}

const void* data(const Optional& t) { return t ? t->const_data_ptr() : nullptr; }

// What both directions check and set up alike.
struct Prepared {
  Layout layout;
  int storage;
  ScalarType compute;
  Geometry geometry;
  std::vector<double> weight, bias;  // where they have to be converted; room for either dtype
  Call call{};

  Prepared(const char* op, const Tensor& x, const Optional& weight_, const Optional& bias_,
           const Optional& residual, const Optional& mask, const Formula& formula) {
    check_cpu(op, "x", x);
    check_code(op, "pool", kSummed, formula.pool.summed);
    check_code(op, "act", kActs, formula.act);
    storage = storage_of(op, "x", x);
    compute = storage == kDouble ? ScalarType::Double : ScalarType::Float;
    layout = layout_of(x);
    STD_TORCH_CHECK(layout != Layout::other, op,
                    ": x must be contiguous or channels_last, got strides ", shown(x.strides()));
    STD_TORCH_CHECK(formula.eps >= 0 && std::isfinite(formula.eps), op,
                    ": eps must be finite and >= 0, got ", formula.eps);
    geometry = normkit::geometry(op, x, layout, formula.pool);
    STD_TORCH_CHECK(geometry.pools() <= kMost && geometry.entries <= kMost, op,
                    ": x must have at most ", kMost, " pools and channels, got shape ",
                    shown(x.sizes()));
    call.formula = formula;
    if (residual) check_like(op, "residual", *residual, x, layout, x.scalar_type());
    if (mask) check_like(op, "mask", *mask, x, layout, ScalarType::Bool);
    if (x.numel() > 0 || weight_) call.weight = affine(op, "weight", weight_, 1, weight);
    if (x.numel() > 0 || bias_) call.bias = affine(op, "bias", bias_, 0, bias);
    call.x = x.const_data_ptr();
    call.residual = data(residual);
    call.mask = static_cast<const uint8_t*>(data(mask));
    call.stream = static_cast<size_t>(x.numel()) * x.element_size() >= kStreamFrom;
  }

  // The values of weight or bias in the compute dtype: their own memory where that is their dtype.
  const void* affine(const char* op, const char* name, const Optional& t, double otherwise,
                     std::vector<double>& room) const {
    int64_t n = geometry.entries;
    if (t && t->scalar_type() == compute) {
      check_values(op, name, *t, n);
      return t->const_data_ptr();
    }
    room.resize(static_cast<size_t>(n));
    if (storage == kDouble) {
      room = values<double>(op, name, t, n, otherwise);
    } else {
      auto narrow = values<float>(op, name, t, n, static_cast<float>(otherwise));
      if (n > 0) std::memcpy(room.data(), narrow.data(), narrow.size() * sizeof(float));
    }
    return room.data();
  }

  void forward() const {
    const Kernels& kernels = chosen().kernels[storage];
    if (geometry.by_rows)
      kernels.rows_forward(geometry.rows, call);
    else
      kernels.columns_forward(geometry.columns, call);
  }

  void backward() const {
    const Kernels& kernels = chosen().kernels[storage];
    if (geometry.by_rows)
      kernels.rows_backward(geometry.rows, call);
    else
      kernels.columns_backward(geometry.columns, call);
  }

  void put(void* p, int64_t i, double value) const {
    if (storage == kDouble)
      static_cast<double*>(p)[i] = value;
    else
      static_cast<float*>(p)[i] = static_cast<float>(value);
  }
};

// y; and mean, rstd and variance, where these are wanted besides.
struct Statistics {
  Tensor mean, rstd, var;
};

Tensor forward(const char* op, const Tensor& x, const Optional& weight, const Optional& bias,
               const Optional& residual, const Optional& add, Optional& total,
               const Optional& mask, const Optional& given_mean, const Optional& given_var,
               Formula formula, std::optional<Statistics>* statistics) {
  const bool given = formula.given = given_mean.has_value();
  const double eps = formula.eps;
  Prepared p(op, x, weight, bias, residual, mask, formula);
  STD_TORCH_CHECK(given_mean.has_value() == given_var.has_value(), op,
                  ": mean and var go together");
  Call& c = p.call;
  int64_t pools = p.geometry.pools();
  std::vector<double> mean, var;
  if (given) {
    mean = values<double>(op, "mean", given_mean, pools, 0);
    var = values<double>(op, "var", given_var, pools, 0);
  }
  Tensor y = new_like(x);
  if (x.numel() == 0 && !statistics) return y;
  c.y = y.mutable_data_ptr();
  std::unique_ptr<double[]> room;
  if (statistics) {
    const auto& sizes = p.geometry.statistics;
    statistics->emplace(Statistics{new_tensor(sizes, ScalarType::Double),
                                   new_tensor(sizes, p.compute), new_tensor(sizes, p.compute)});
    c.mean = static_cast<double*>((*statistics)->mean.mutable_data_ptr());
    c.rstd = (*statistics)->rstd.mutable_data_ptr();
    c.var = (*statistics)->var.mutable_data_ptr();
  } else {
    room.reset(new double[static_cast<size_t>(3 * pools)]);
    c.mean = room.get();
    c.rstd = room.get() + pools;
    c.var = room.get() + 2 * pools;
  }
  if (add) {
    check_like(op, "add", *add, x, p.layout, x.scalar_type());
    total = new_like(x);
    c.base = c.x;
    c.add = add->const_data_ptr();
    c.x = total->mutable_data_ptr();
  }
  for (int64_t i = 0; i < pools && given; ++i) {
    double v = var[static_cast<size_t>(i)];
    c.mean[i] = formula.center ? mean[static_cast<size_t>(i)] : 0;
    p.put(c.var, i, v);
    p.put(c.rstd, i, 1 / std::sqrt(v + eps));
  }
  if (x.numel() == 0) {
    for (int64_t i = 0; i < pools && !given; ++i) {
      c.mean[i] = 0;
      p.put(c.var, i, 0);
      p.put(c.rstd, i, 1 / std::sqrt(eps));
    }
    return y;
  }
  p.forward();
  return y;
}

// Count, mean and biased variance of each pool, in float64.
Tensor moments(const Tensor& x, const Optional& mask, const Formula& formula) {
  Optional none;
  Prepared p("normkit::moments", x, none, none, none, mask, formula);
  int64_t pools = p.geometry.pools();
  auto sizes = p.geometry.statistics;
  sizes.insert(sizes.begin(), 3);
  Tensor out = new_tensor(sizes, ScalarType::Double);
  Call& c = p.call;
  c.count = static_cast<double*>(out.mutable_data_ptr());
  c.mean = c.count + pools;
  c.variance = c.mean + pools;
  if (x.numel() > 0)
    p.forward();
  else
    for (int64_t i = 0; i < 3 * pools; ++i) c.count[i] = 0;
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> normalize(
    const Tensor& x, const Optional& weight, const Optional& bias, const Optional& residual,
    const Optional& mask, const Optional& mean, const Optional& var, const Formula& formula) {
  Optional none, total;
  std::optional<Statistics> statistics;
  Tensor y = forward("normkit::normalize", x, weight, bias, residual, none, total, mask, mean, var,
                     formula, &statistics);
  return {y, statistics->mean, statistics->rstd, statistics->var};
}

// As normalize, y alone.
Tensor output(const Tensor& x, const Optional& weight, const Optional& bias,
              const Optional& residual, const Optional& mask, const Optional& mean,
              const Optional& var, const Formula& formula) {
  Optional none, total;
  return forward("normkit::output", x, weight, bias, residual, none, total, mask, mean, var,
                 formula, nullptr);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> add_normalize(
    const Tensor& x, const Tensor& add, const Optional& weight, const Optional& bias,
    const Optional& mask, const Formula& formula) {
  Optional none, total;
  std::optional<Statistics> statistics;
  STD_TORCH_CHECK(formula.pool.summed == Summed::k,
                  "normkit::add_normalize: only row norms take add");
  Tensor y = forward("normkit::add_normalize", x, weight, bias, none, Optional(add), total, mask,
                     none, none, formula, &statistics);
  return {y, statistics->mean, statistics->rstd, statistics->var, *total};
}

// running <- (1 - momentum) * running + momentum * batch, of mean and variance, the latter times
// `unbias`; batches counts up by one.
void move(Tensor running_mean, Tensor running_var, Optional batches, const Tensor& mean,
          const Tensor& var, double momentum, double unbias) {
  const char* op = "normkit::move";
  int64_t n = running_mean.numel();
  auto moved = [&](const char* name, Tensor& running, const char* of, const Tensor& batch,
                   double factor) {
    auto now = values<double>(op, name, running, n, 0), then = values<double>(op, of, batch, n, 0);
    for (size_t i = 0; i < now.size(); ++i) now[i] = (1 - momentum) * now[i] + factor * then[i];
    return now;
  };
  auto new_mean = moved("running_mean", running_mean, "mean", mean, momentum);
  auto new_var = moved("running_var", running_var, "var", var, momentum * unbias);
  if (batches) {
    check_values(op, "batches", *batches, 1);
    STD_TORCH_CHECK(batches->scalar_type() == ScalarType::Long, op, ": batches must be int64, got ",
                    torch::headeronly::toString(batches->scalar_type()));
    ++*static_cast<int64_t*>(batches->mutable_data_ptr());
  }
  put_values(running_mean, new_mean);
  put_values(running_var, new_var);
}

// What both verbs of a backward check and set up alike.
struct PreparedBackward : Prepared {
  std::vector<double> means;

  PreparedBackward(const char* op, const Tensor& dy, const Tensor& x, const Optional& weight,
                   const Optional& bias, const Optional& residual, const Optional& output,
                   const Optional& mask, const Tensor& mean, const Tensor& rstd,
                   const Formula& formula)
      : Prepared(op, x, weight, bias, residual, mask, formula) {
    check_like(op, "dy", dy, x, layout, x.scalar_type());
    if (output) check_like(op, "output", *output, x, layout, x.scalar_type());
    int64_t pools = geometry.pools();
    means = values<double>(op, "mean", mean, pools, 0);
    STD_TORCH_CHECK(rstd.scalar_type() == compute, op, ": rstd must be ",
                    torch::headeronly::toString(compute), ", got ",
                    torch::headeronly::toString(rstd.scalar_type()));
    check_values(op, "rstd", rstd, pools);
    call.mean = means.data();
    call.rstd = const_cast<void*>(rstd.const_data_ptr());
    call.dy = dy.const_data_ptr();
    call.output = data(output);
  }
};

// Of batch norm, the sums of dz and of dz * x̂ over each channel, in float64.
Tensor sums(const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& bias,
            const Optional& residual, const Optional& output, const Optional& mask,
            const Tensor& mean, const Tensor& rstd, Formula formula) {
  const char* op = "normkit::sums";
  STD_TORCH_CHECK(formula.pool.summed == Summed::ns && formula.pool.trailing == 0, op,
                  ": only batch norm is summed by itself");
  formula.given = true;
  PreparedBackward p(op, dy, x, weight, bias, residual, output, mask, mean, rstd, formula);
  int64_t entries = p.geometry.entries;
  Tensor out = new_tensor({2, entries}, ScalarType::Double);
  Call& c = p.call;
  c.dbias = static_cast<double*>(out.mutable_data_ptr());
  c.dweight = c.dbias + entries;
  if (x.numel() > 0)
    p.backward();
  else
    for (int64_t i = 0; i < 2 * entries; ++i) c.dbias[i] = 0;
  return out;
}

std::tuple<Tensor, Optional, Optional, Optional> normalize_backward(
    const Tensor& dy, const Tensor& x, const Optional& weight, const Optional& bias,
    const Optional& residual, const Optional& output, const Optional& mask, const Tensor& mean,
    const Tensor& rstd, const Optional& mean_g, const Optional& mean_gx, const Optional& dtotal,
    Formula formula, bool given, bool wants_dz) {
  const char* op = "normkit::normalize_backward";
  formula.given = given;
  PreparedBackward p(op, dy, x, weight, bias, residual, output, mask, mean, rstd, formula);
  Call& c = p.call;
  if (dtotal) check_like(op, "dtotal", *dtotal, x, p.layout, x.scalar_type());
  c.dtotal = data(dtotal);
  STD_TORCH_CHECK(mean_g.has_value() == mean_gx.has_value(), op,
                  ": mean_g and mean_gx go together");
  STD_TORCH_CHECK(!mean_g || (given && formula.pool.trailing == 0), op,
                  ": mean_g and mean_gx need given statistics of batch, instance or group norm");
  std::vector<double> means_g, means_gx;
  if (mean_g) {
    means_g = values<double>(op, "mean_g", mean_g, p.geometry.pools(), 0);
    means_gx = values<double>(op, "mean_gx", mean_gx, p.geometry.pools(), 0);
    c.mean_g = means_g.data();
    c.mean_gx = means_gx.data();
  }
  Tensor dx = new_like(x);
  c.dx = dx.mutable_data_ptr();
  Optional dz, dweight, dbias;
  if (wants_dz) {
    dz = new_like(x);
    c.dz = dz->mutable_data_ptr();
  }
  std::vector<double> weight_sums, bias_sums;
  const bool wants = (weight || bias) && !mean_g;  // `sums` has given them already
  if (wants) {
    weight_sums.resize(static_cast<size_t>(p.geometry.entries));
    bias_sums.resize(static_cast<size_t>(p.geometry.entries));
    c.dweight = weight_sums.data();
    c.dbias = bias_sums.data();
  }
  if (x.numel() > 0) p.backward();
  if (wants && weight) dweight = parameter_like(*weight, weight_sums);
  if (wants && bias) dbias = parameter_like(*bias, bias_sums);
  return {dx, dweight, dbias, dz};
}

// ---- from a schema's arguments to a function's

using torch::stable::detail::from;
using torch::stable::detail::to;

// What of a schema's arguments stands for one of a function's: one, or the six of a formula.
template <class T>
constexpr uint64_t kWidth = std::is_same_v<T, Formula> ? 6 : 1;

template <class T>
T take(const StableIValue*& at) {
  if constexpr (std::is_same_v<T, Formula>) {
    Pool pool{static_cast<Summed>(take<int64_t>(at)), take<int64_t>(at), take<int64_t>(at)};
    return {pool, take<double>(at), take<bool>(at), static_cast<Act>(take<int64_t>(at))};
  } else {
    return to<T>(*at++);
  }
}

void give(StableIValue* stack, const Tensor& result) { *stack = from(result); }
template <class... T>
void give(StableIValue* stack, const std::tuple<T...>& results) {
  std::apply([&](const auto&... each) { ((*stack++ = from(each)), ...); }, results);
}

template <class R, class... T>
void call(R (*function)(T...), StableIValue* stack, uint64_t given) {
  constexpr uint64_t wanted = (kWidth<std::decay_t<T>> + ...);
  STD_TORCH_CHECK(given == wanted, "normkit: the schema has ", given,
                  " arguments where the operator takes ", wanted);
  const StableIValue* at = stack;
  std::tuple<std::decay_t<T>...> arguments{take<std::decay_t<T>>(at)...};
  give(stack, std::apply(function, arguments));
}

// As TORCH_BOX, of a function that takes a formula.
template <auto function>
void boxed(StableIValue* stack, uint64_t arguments, uint64_t) {
  call(function, stack, arguments);
}

}  // namespace
}  // namespace normkit

STABLE_TORCH_LIBRARY(normkit, m) {
  m.def(
      "normalize(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
      "Tensor? mean, Tensor? var, int summed, int groups, int trailing, float eps, bool center, "
      "int act) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "output(Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? mask, "
      "Tensor? mean, Tensor? var, int summed, int groups, int trailing, float eps, bool center, "
      "int act) -> Tensor");
  m.def(
      "add_normalize(Tensor x, Tensor add, Tensor? weight, Tensor? bias, Tensor? mask, "
      "int summed, int groups, int trailing, float eps, bool center, int act) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "moments(Tensor x, Tensor? mask, int summed, int groups, int trailing, float eps, "
      "bool center, int act) -> Tensor");
  m.def(
      "sums(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, Tensor? output, "
      "Tensor? mask, Tensor mean, Tensor rstd, int summed, int groups, int trailing, float eps, "
      "bool center, int act) -> Tensor");
  m.def(
      "normalize_backward(Tensor dy, Tensor x, Tensor? weight, Tensor? bias, Tensor? residual, "
      "Tensor? output, Tensor? mask, Tensor mean, Tensor rstd, Tensor? mean_g, Tensor? mean_gx, "
      "Tensor? dtotal, int summed, int groups, int trailing, float eps, bool center, int act, "
      "bool given, bool wants_dz) "
      "-> (Tensor, Tensor?, Tensor?, Tensor?)");
  m.def(
      "move(Tensor(a!) running_mean, Tensor(b!) running_var, Tensor(c!)? batches, Tensor mean, "
      "Tensor var, float momentum, float unbias) -> ()");
  m.def("instructions() -> str");
  m.def("codes() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(normkit, CPU, m) {
  m.impl("normalize", normkit::boxed<&normkit::normalize>);
  m.impl("output", normkit::boxed<&normkit::output>);
  m.impl("move", TORCH_BOX(&normkit::move));
  m.impl("add_normalize", normkit::boxed<&normkit::add_normalize>);
  m.impl("moments", normkit::boxed<&normkit::moments>);
  m.impl("sums", normkit::boxed<&normkit::sums>);
  m.impl("normalize_backward", normkit::boxed<&normkit::normalize_backward>);
}
STABLE_TORCH_LIBRARY_IMPL(normkit, CompositeExplicitAutograd, m) {
  m.impl("instructions", TORCH_BOX(&normkit::instructions));
  m.impl("codes", TORCH_BOX(&normkit::codes));
}
