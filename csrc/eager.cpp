// Eager calls in one crossing from Python: the checks, the operator, the autograd node.
//
// Compiled against the installed torch's full API, unlike the core, so it serves that torch alone.
// A function takes a call only where everything about it is ordinary; otherwise it has touched
// nothing, answers NotImplemented, and Python's path does the call and raises the errors of input.
// What is computed is defined there: here the same operators get the same arguments.
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/MemoryFormat.h>
#include <torch/csrc/autograd/forward_grad.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/InferenceMode.h>

#include <cmath>
#include <limits>

namespace normkit {
namespace {

using at::Tensor;
using c10::DispatchKey;
using c10::DispatchKeySet;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// ---- what Python hands over once

struct Python {
  PyObject* written;   // the ContextVar of functional_call
  PyObject* watching;  // the list of who watches the choice of a backend
  PyObject* backend;   // the namespace that holds BACKENDS
  PyObject* cpu;       // the backend that has to come first among them
  PyObject* backward;  // a backward that isn't ordinary
} python;

int64_t taken = 0;

#define NAME(text)                                                \
  ([]() -> PyObject* {                                            \
    static PyObject* const name = PyUnicode_InternFromString(text); \
    return name;                                                  \
  }())

// ---- what is ordinary

// No transform, tracer, mode of torch or forward-mode level is at work in this thread.
bool ordinary_thread() {
  // The raw bits: of two key sets, `-` keeps those of the backends.
  auto keys = c10::impl::tls_local_dispatch_key_set();
  auto included = c10::default_included_set, excluded = c10::default_excluded_set;
  if (c10::InferenceMode::is_enabled()) {
    included = included.remove(DispatchKey::ADInplaceOrView);
    excluded = excluded | c10::autograd_dispatch_keyset;
  }
  // Autocast takes bits out of the excluded ones; the CPU's norms heed none.
  return keys.included_.raw_repr() == included.raw_repr() &&
         (keys.excluded_.raw_repr() & ~excluded.raw_repr()) == 0 &&
         !at::impl::torch_function_mode_enabled() &&
         !torch::autograd::ForwardADLevel::try_get_by_idx(0);
}

bool own_values_are_used() {
  PyObject* written;
  if (PyContextVar_Get(python.written, nullptr, &written) < 0) return PyErr_Clear(), false;
  Py_DECREF(written);
  return written == Py_None;
}

bool cpu_is_chosen() {
  PyObject* backends = PyDict_GetItemString(python.backend, "BACKENDS");
  PyObject *first, *module;
  Py_ssize_t at = 0;
  return backends && PyDict_CheckExact(backends) && PyDict_Next(backends, &at, &first, &module) &&
         module == python.cpu && PyList_GET_SIZE(python.watching) == 0;
}

// Nor does a checkpoint, a hook on saved tensors or `functional_call` surround the call.
bool ordinary() {
  // Inside an autograd Function's forward, as a reentrant checkpoint's is, forward mode is off.
  const auto& mode = c10::AutogradState::get_tls_state();
  const auto& hooks = at::SavedTensorDefaultHooks::get_tls_state();
  return ordinary_thread() && (mode.get_fw_grad_mode() || mode.get_inference_mode()) &&
         torch::autograd::get_current_graph_task_id() == -1 && hooks.stack.empty() &&
         !hooks.is_tracing && own_values_are_used() && cpu_is_chosen();
}

bool ordinary(const Tensor& t) {
  constexpr DispatchKeySet known({DispatchKey::CPU, DispatchKey::ADInplaceOrView,
                                  DispatchKey::AutogradCPU, DispatchKey::AutocastCPU});
  return (t.key_set().raw_repr() & ~known.raw_repr()) == 0;
}

bool has_kernels(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

bool same_shape(const Tensor& t, const Tensor& x) {
  return t.sizes() == x.sizes() && t.scalar_type() == x.scalar_type();
}

// Strides of axes of size 1 say nothing.
bool same_strides(const Tensor& t, const Tensor& x) {
  auto sizes = x.sizes(), own = t.strides(), other = x.strides();
  for (size_t i = 0; i < sizes.size(); ++i)
    if (sizes[i] != 1 && own[i] != other[i]) return false;
  return true;
}

bool channels_last(const Tensor& x) {
  auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  auto fits = [&](size_t axis) {
    bool fit = sizes[axis] == 1 || strides[axis] == expected;
    expected *= sizes[axis];
    return fit;
  };
  if (sizes.size() < 3 || !fits(1)) return false;
  for (size_t axis = sizes.size() - 1; axis >= 2; --axis)
    if (!fits(axis)) return false;
  return fits(0);
}

// ---- the operators of the core

void push(torch::jit::Stack& stack, const Tensor& t) {
  if (t.defined())
    stack.emplace_back(t);
  else
    stack.emplace_back();
}

struct Formula {
  int64_t summed = 0, groups = 0, trailing = 0;
  double eps = 0;
  bool center = true;
  int64_t act = 0;
  bool given = false;
};

enum Summed : int64_t { kNS, kS, kKS, kK };
enum Act : int64_t { kNone, kRelu, kLeakyRelu };

void push(torch::jit::Stack& stack, const Formula& f) {
  for (int64_t number : {f.summed, f.groups, f.trailing}) stack.emplace_back(number);
  stack.emplace_back(f.eps);
  stack.emplace_back(f.center);
  stack.emplace_back(f.act);
}

// By the dispatcher, so that a profiler sees them.
void call(const c10::OperatorHandle& op, torch::jit::Stack& stack) {
  at::AutoDispatchBelowADInplaceOrView below;
  op.callBoxed(stack);
}

#define OPERATOR(name)                                                               \
  ([]() -> const c10::OperatorHandle& {                                              \
    static const auto op =                                                           \
        c10::Dispatcher::singleton().findSchemaOrThrow("normkit::" name, "");        \
    return op;                                                                       \
  }())

struct WithoutGil {
  PyThreadState* state = PyEval_SaveThread();
  ~WithoutGil() { PyEval_RestoreThread(state); }
};

struct WithGil {
  PyGILState_STATE state = PyGILState_Ensure();
  ~WithGil() { PyGILState_Release(state); }
};

struct Owned {
  PyObject* object;
  explicit Owned(PyObject* object) : object(object) {}
  Owned(const Owned&) = delete;
  ~Owned() { Py_XDECREF(object); }
};

// ---- the node

[[noreturn]] void throw_python_error() {
  python_error error;
  error.persist();
  throw std::move(error);
}

struct Saved {
  Tensor x, weight, bias, residual, mean, rstd, output;
};

// dy in x's memory format, so that the input gradient is too.
Tensor laid_out_like(const Tensor& dy, const Tensor& x) {
  for (auto [rank, format] : {std::pair{4, at::MemoryFormat::ChannelsLast},
                              std::pair{5, at::MemoryFormat::ChannelsLast3d}})
    if (x.dim() == rank && x.is_contiguous(format))
      return x.is_contiguous() ? dy : dy.contiguous(format);
  return dy;
}

Tensor like(const Tensor& t, const Tensor& x) {
  if (!t.defined() || same_strides(t, x)) return t;
  if (x.is_contiguous()) return t.contiguous();
  return t.movedim(1, -1).contiguous().movedim(-1, 1);
}

struct NormalizeBackward final : torch::autograd::Node {
  Formula f;
  bool has_residual, has_add;
  SavedVariable x, weight, bias, residual, mean, rstd, output;

  std::string name() const override { return "NormalizeBackward"; }

  // As `runtime.autograd._save`.
  void save(const Saved& s, const Tensor& y, bool x_is_output) {
    bool by_output = has_residual && (f.act == kRelu || f.act == kLeakyRelu);
    x = SavedVariable(s.x, x_is_output);
    weight = SavedVariable(s.weight, false);
    bias = SavedVariable(s.bias, false);
    if (!by_output && f.act != kNone) residual = SavedVariable(s.residual, false);
    if (by_output) output = SavedVariable(y, true);
    mean = SavedVariable(s.mean, false);
    rstd = SavedVariable(s.rstd, false);
  }

  variable_list apply(variable_list&& gradients) override {
    const Tensor& dy = gradients[0];
    Tensor dtotal = has_add ? gradients[1] : Tensor();
    if (!dy.defined()) return {dtotal, {}, {}, {}, dtotal};
    Saved s = unpack();
    if (at::GradMode::is_enabled() || !ordinary_thread() || !fits(dy, s.x) || !fits(s.x, s.x) ||
        (dtotal.defined() && !fits(dtotal, s.x)))
      return in_python(s, dy, dtotal);
    Tensor laid_out = laid_out_like(dy, s.x);
    torch::jit::Stack stack;
    stack.reserve(20);
    push(stack, like(laid_out, s.x));
    push(stack, s.x);
    for (Tensor* t : {&s.weight, &s.bias, &s.residual, &s.output}) push(stack, *t);
    stack.emplace_back();  // mask
    push(stack, s.mean);
    push(stack, s.rstd);
    stack.emplace_back();  // flat
    stack.emplace_back();  // steep
    push(stack, like(dtotal, s.x));
    push(stack, f);
    bool wants_dz = s.residual.defined() || s.output.defined();
    stack.emplace_back(f.given);
    stack.emplace_back(wants_dz);
    call(OPERATOR("normalize_backward"), stack);
    auto result = [&](size_t i) {
      return stack[i].isNone() ? Tensor() : std::move(stack[i]).toTensor();
    };
    variable_list found(5);
    for (size_t i = 0; i < 3; ++i) found[i] = result(i);
    if (has_residual) found[3] = wants_dz ? result(3) : laid_out;
    if (has_add) found[4] = found[0];
    return found;
  }

  void release_variables() override {
    std::lock_guard<std::mutex> lock(mutex_);
    each([](SavedVariable& v, bool) { v.reset_data(); });
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    const_cast<NormalizeBackward*>(this)->each(
        [&](SavedVariable& v, bool is_output) { args.collect(v, is_output); });
    for (int64_t number : {f.summed, f.groups, f.trailing, f.act}) args.collect(number);
    args.collect(f.eps);
    for (bool flag : {f.center, f.given, has_residual, has_add}) args.collect(flag);
  }

  variable_list apply_with_saved(const variable_list& gradients,
                                 torch::dynamo::autograd::SwapSavedVariables& saved) override {
    each([&](SavedVariable& v, bool) { saved.before(v); });
    variable_list result = apply(variable_list(gradients));
    each([&](SavedVariable& v, bool) { saved.after(v); });
    return result;
  }

 private:
  template <class F>
  void each(F f) {
    f(x, has_add);
    for (SavedVariable* v : {&weight, &bias, &residual, &mean, &rstd}) f(*v, false);
    f(output, true);
  }

  Saved unpack() {
    std::lock_guard<std::mutex> lock(mutex_);
    auto self = getptr();
    return {x.unpack(has_add ? self : nullptr), weight.unpack(), bias.unpack(), residual.unpack(),
            mean.unpack(), rstd.unpack(), output.unpack(self)};
  }

  static bool fits(const Tensor& t, const Tensor& x) { return ordinary(t) && same_shape(t, x); }

  // By the reference formula, which may be differentiated again, batched or traced.
  variable_list in_python(const Saved& s, const Tensor& dy, const Tensor& dtotal) const {
    WithGil gil;
    auto wrap = [](const Tensor& t) { return THPVariable_Wrap(t); };
    Owned result(PyObject_CallFunction(
        python.backward, "(LLLdOLO)(NNNNONNN)OONN", static_cast<long long>(f.summed),
        static_cast<long long>(f.groups), static_cast<long long>(f.trailing), f.eps,
        f.center ? Py_True : Py_False, static_cast<long long>(f.act),
        f.given ? Py_True : Py_False, wrap(s.x), wrap(s.weight), wrap(s.bias), wrap(s.residual),
        Py_None, wrap(s.mean), wrap(s.rstd), wrap(s.output), has_residual ? Py_True : Py_False,
        has_add ? Py_True : Py_False, wrap(dy), wrap(dtotal)));
    if (!result.object) throw_python_error();
    variable_list gradients;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(result.object); ++i) {
      PyObject* one = PyTuple_GET_ITEM(result.object, i);
      gradients.push_back(one == Py_None ? Tensor() : THPVariable_Unpack(one));
    }
    return gradients;
  }
};

// ---- one call

struct Call {
  Formula f;
  Tensor x, weight, bias, residual, add;
  Tensor mean, var;                                // given
  Tensor running_mean, running_var, batches;       // moved, where there are any
  double momentum = 0, unbias = 1;

  bool moves() const { return running_mean.defined(); }

  // Copies, differentiably, what lies in memory as the kernels don't know it.
  void make_dense() {
    if (!x.is_contiguous() && (f.trailing || !channels_last(x))) x = x.contiguous();
    residual = like(residual, x);
    add = like(add, x);
  }
};

PyObject* run(Call& c) {
  {
    WithoutGil free;
    c.make_dense();
  }
  c10::intrusive_ptr<NormalizeBackward> node;
  if (torch::autograd::compute_requires_grad(c.x, c.weight, c.bias, c.residual, c.add)) {
    node = c10::make_intrusive<NormalizeBackward>();
    node->set_next_edges(
        torch::autograd::collect_next_edges(c.x, c.weight, c.bias, c.residual, c.add));
    node->f = c.f;
    node->has_residual = c.residual.defined();
    node->has_add = c.add.defined();
  }
  torch::jit::Stack stack;
  {
    WithoutGil free;
    stack.reserve(13);
    push(stack, c.x);
    if (c.add.defined()) push(stack, c.add);
    push(stack, c.weight);
    push(stack, c.bias);
    if (!c.add.defined()) push(stack, c.residual);
    stack.emplace_back();  // mask
    if (!c.add.defined()) push(stack, c.mean), push(stack, c.var);
    push(stack, c.f);
    call(c.add.defined()     ? OPERATOR("add_normalize")
         : node || c.moves() ? OPERATOR("normalize")
                             : OPERATOR("output"),
         stack);
    if (c.moves()) {
      torch::jit::Stack move;
      move.reserve(7);
      for (const Tensor* t : {&c.running_mean, &c.running_var, &c.batches}) push(move, *t);
      push(move, stack[1].toTensor());
      push(move, stack[3].toTensor());
      move.emplace_back(c.momentum);
      move.emplace_back(c.unbias);
      call(OPERATOR("move"), move);
    }
  }
  for (const Tensor* t : {&c.running_mean, &c.running_var, &c.batches})
    if (t->defined() && !t->is_inference()) torch::autograd::impl::bump_version(*t);
  Tensor y = stack[0].toTensor(), total = c.add.defined() ? stack[4].toTensor() : Tensor();
  if (node) {
    torch::autograd::set_history(y, node);
    if (total.defined()) torch::autograd::set_history(total, node);
    node->save({total.defined() ? total : c.x, c.weight, c.bias, c.residual, stack[1].toTensor(),
                stack[2].toTensor(), Tensor()},
               y, total.defined());
  }
  ++taken;
  if (!total.defined()) return THPVariable_Wrap(std::move(y));
  return Py_BuildValue("(NN)", THPVariable_Wrap(std::move(y)), THPVariable_Wrap(std::move(total)));
}

// ---- arguments

// A tensor of torch's own class or None, which leaves t undefined.
bool read(PyObject* object, Tensor& t) {
  if (object == Py_None) return true;
  if (!object || !THPVariable_CheckExact(object)) return false;
  t = THPVariable_Unpack(object);
  return ordinary(t);
}

bool read(PyObject* object, double& number) {
  if (!object || !PyFloat_CheckExact(object)) return false;
  number = PyFloat_AS_DOUBLE(object);
  return true;
}

bool read(PyObject* object, bool& flag) {
  flag = object == Py_True;
  return flag || object == Py_False;
}

bool read(PyObject* object, int64_t& number) {
  if (!object || !PyLong_CheckExact(object)) return false;
  int overflow;
  number = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow;
}

bool read_act(PyObject* object, int64_t& act) {
  if (object == Py_None) return act = kNone, true;
  if (!object || !PyUnicode_CheckExact(object)) return false;
  PyObject* names[] = {NAME("relu"), NAME("leaky_relu"), NAME("silu"), NAME("gelu")};
  for (act = 1; act <= 4; ++act)
    if (object == names[act - 1] || PyUnicode_Compare(object, names[act - 1]) == 0) return true;
  return false;
}

bool read_eps(PyObject* object, double& eps) {
  return read(object, eps) && eps >= 0 && std::isfinite(eps);
}

bool absent(PyObject* object) { return object == Py_None; }

// A weight, bias, running mean or variance that all samples share.
bool is_plain(const Tensor& t, at::IntArrayRef sizes) {
  return !t.defined() || (t.sizes() == sizes && t.is_contiguous() && has_kernels(t.scalar_type()));
}

bool read_input(PyObject* object, Call& c) {
  return object != Py_None && read(object, c.x) && has_kernels(c.x.scalar_type()) &&
         c.x.numel() > 0;
}

bool read_channels(PyObject* input, PyObject* weight, PyObject* bias, PyObject* residual, Call& c) {
  if (!read_input(input, c) || c.x.dim() < 2) return false;
  if (!(read(weight, c.weight) && read(bias, c.bias) && read(residual, c.residual))) return false;
  if (c.residual.defined() && !same_shape(c.residual, c.x)) return false;
  int64_t channels[] = {c.x.size(1)};
  return is_plain(c.weight, channels) && is_plain(c.bias, channels);
}

// Running statistics, which have to be there.
bool read_running(PyObject* mean, PyObject* var, const Tensor& x, Tensor& to_mean, Tensor& to_var) {
  int64_t channels[] = {x.size(1)};
  return mean != Py_None && var != Py_None && read(mean, to_mean) && read(var, to_var) &&
         is_plain(to_mean, channels) && is_plain(to_var, channels);
}

// Running statistics that are constants of the call.
bool read_given(PyObject* mean, PyObject* var, Call& c) {
  return read_running(mean, var, c.x, c.mean, c.var) && !c.mean.requires_grad() &&
         !c.var.requires_grad();
}

// A layer's attributes, read where nn.Module keeps them: borrowed, null where there are none.
class Layer {
 public:
  explicit Layer(PyObject* self)
      : type_(Py_TYPE(self)),
        dict_(PyObject_GenericGetDict(self, nullptr)),
        parameters_(get(NAME("_parameters"))),
        buffers_(get(NAME("_buffers"))) {}

  // As Python reads it; none where a property stands before the instance's own.
  PyObject* operator[](PyObject* name) const {
    PyObject* of_type = _PyType_Lookup(type_, name);
    if (of_type && Py_TYPE(of_type)->tp_descr_set) return nullptr;
    PyObject* own = get(name);
    return own ? own : of_type;
  }

  // A parameter or a buffer; none where it is parametrized, or hidden by another attribute.
  PyObject* tensor(PyObject* name) const {
    if (_PyType_Lookup(type_, name) || get(name)) return nullptr;
    PyObject* own = get(parameters_, name);
    return own ? own : get(buffers_, name);
  }

  PyObject* given_or(PyObject* given, PyObject* name) const {
    return given == Py_None ? tensor(name) : given;
  }

 private:
  static PyObject* get(PyObject* dict, PyObject* name) {
    return dict && PyDict_Check(dict) ? PyDict_GetItemWithError(dict, name) : nullptr;
  }
  PyObject* get(PyObject* name) const { return get(dict_.object, name); }

  PyTypeObject* type_;
  Owned dict_;
  PyObject *parameters_, *buffers_;
};

bool has_rank(PyObject* ranks, const Tensor& x) {
  if (ranks == Py_None) return true;
  if (!ranks || !PyTuple_CheckExact(ranks)) return false;
  int64_t rank;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(ranks); ++i)
    if (read(PyTuple_GET_ITEM(ranks, i), rank) && rank == x.dim()) return true;
  return false;
}

// ---- the norms

struct BatchArguments {
  PyObject *input, *running_mean, *running_var, *weight, *bias, *momentum, *eps, *batches,
      *residual, *act, *ranks;
  bool by_running;
};

bool batch(const BatchArguments& a, Call& c) {
  c.f.summed = kNS;
  c.f.given = a.by_running;
  if (!(read_channels(a.input, a.weight, a.bias, a.residual, c) && has_rank(a.ranks, c.x) &&
        read_eps(a.eps, c.f.eps) && read_act(a.act, c.f.act)))
    return false;
  bool averaged = a.momentum == Py_None;
  if (!averaged && !(read(a.momentum, c.momentum) && c.momentum >= 0 && c.momentum <= 1))
    return false;
  if (a.by_running) return read_given(a.running_mean, a.running_var, c);
  int64_t n = c.x.numel() / c.x.size(1);
  if (n < 2 || c.f.eps == 0) return false;
  if (absent(a.running_mean) && absent(a.running_var)) return absent(a.batches);
  c.unbias = static_cast<double>(n) / static_cast<double>(n - 1);
  return !averaged && read_running(a.running_mean, a.running_var, c.x, c.running_mean,
                                   c.running_var) &&
         !c.running_mean.requires_grad() && !c.running_var.requires_grad() &&
         read(a.batches, c.batches) &&
         (!c.batches.defined() || (c.batches.scalar_type() == at::kLong && c.batches.dim() == 0));
}

// layer, input, mask, residual, weight, bias
bool batch_layer(PyObject* const* args, Call& c) {
  Layer layer(args[0]);
  bool training, tracking, frozen, by_batch;
  int64_t micro_batches;
  if (!absent(args[2]) || !read(layer[NAME("training")], training) ||
      !read(layer[NAME("track_running_stats")], tracking) ||
      !read(layer[NAME("frozen")], frozen) || !read(layer[NAME("by_batch")], by_batch) ||
      !read(layer[NAME("micro_batches")], micro_batches))
    return false;
  PyObject *mean = layer.tensor(NAME("running_mean")), *var = layer.tensor(NAME("running_var")),
           *batches = layer.tensor(NAME("num_batches_tracked"));
  if (!mean || !var || !batches) return false;
  bool tracked = !absent(mean) && !absent(var);
  if (frozen && !tracked) return false;
  bool by_running = tracked && (frozen || !training);
  bool moving = training && tracking && !by_running;
  // Of a synchronized layer ranks hear in evaluation too.
  if (!absent(layer[NAME("merge")])) return false;
  if (!by_running && training && !by_batch) return false;
  if (moving && micro_batches > 1) return false;
  bool read = by_running || moving;
  return batch({args[1], read ? mean : Py_None, read ? var : Py_None,
                layer.given_or(args[4], NAME("weight")), layer.given_or(args[5], NAME("bias")),
                layer[NAME("momentum")], layer[NAME("eps")], moving ? batches : Py_None, args[3],
                layer[NAME("_act")], layer[NAME("ranks")], by_running},
               c);
}

// input, running_mean, running_var, weight, bias, training, momentum, eps, num_batches_tracked,
// ghost_size, pending, mask, residual, act, ranks, merge
bool batch_norm(PyObject* const* args, Call& c) {
  bool training;
  return read(args[5], training) && absent(args[9]) && absent(args[10]) && absent(args[11]) &&
         absent(args[15]) &&
         batch({args[0], args[1], args[2], args[3], args[4], args[6], args[7], args[8], args[12],
                args[13], args[14], !training},
               c);
}

struct InstanceArguments {
  PyObject *input, *running_mean, *running_var, *weight, *bias, *momentum, *eps, *residual, *act,
      *features;
  int64_t rank;  // 0: any with positions
  bool by_running;
};

bool instance(const InstanceArguments& a, Call& c) {
  c.f.summed = a.by_running ? kNS : kS;
  c.f.given = a.by_running;
  if (!(read_channels(a.input, a.weight, a.bias, a.residual, c) && read_eps(a.eps, c.f.eps) &&
        read_act(a.act, c.f.act)))
    return false;
  if (a.rank ? c.x.dim() != a.rank : c.x.dim() < 3) return false;
  int64_t features;
  if (!absent(a.features) && !(read(a.features, features) && features == c.x.size(1))) return false;
  if (!absent(a.momentum) && !(read(a.momentum, c.momentum) && c.momentum >= 0 && c.momentum <= 1))
    return false;
  if (a.by_running) return read_given(a.running_mean, a.running_var, c);
  return absent(a.running_mean) && absent(a.running_var) &&
         c.x.numel() > c.x.size(0) * c.x.size(1);
}

// layer, input, mask, residual, weight, bias
bool instance_layer(PyObject* const* args, Call& c) {
  Layer layer(args[0]);
  bool training, tracking;
  int64_t unbatched = -1;
  PyObject* rank = layer[NAME("unbatched_rank")];
  if (!absent(args[2]) || !read(layer[NAME("training")], training) ||
      !read(layer[NAME("track_running_stats")], tracking) ||
      !(rank == Py_None || read(rank, unbatched)))
    return false;
  return instance({args[1], layer.tensor(NAME("running_mean")), layer.tensor(NAME("running_var")),
                   layer.given_or(args[4], NAME("weight")), layer.given_or(args[5], NAME("bias")),
                   layer[NAME("momentum")], layer[NAME("eps")], args[3], layer[NAME("_act")],
                   layer[NAME("num_features")], unbatched + 1, !training && tracking},
                  c);
}

// input, running_mean, running_var, weight, bias, use_input_stats, momentum, eps, mask, residual,
// act, ranks, num_features
bool instance_norm(PyObject* const* args, Call& c) {
  bool by_input;
  int64_t rank = 0;
  PyObject* ranks = args[11];
  if (!read(args[5], by_input) || !absent(args[8])) return false;
  if (!absent(ranks) && !(PyTuple_CheckExact(ranks) && PyTuple_GET_SIZE(ranks) == 2 &&
                          read(PyTuple_GET_ITEM(ranks, 1), rank)))
    return false;
  return instance({args[0], args[1], args[2], args[3], args[4], args[6], args[7], args[9], args[10],
                   args[12], rank, !by_input},
                  c);
}

bool group(PyObject* input, PyObject* groups, PyObject* weight, PyObject* bias, PyObject* eps,
           PyObject* residual, PyObject* act, Call& c) {
  c.f.summed = kKS;
  return read_channels(input, weight, bias, residual, c) && read(groups, c.f.groups) &&
         c.f.groups > 0 && c.x.size(1) % c.f.groups == 0 && c.x.numel() > c.f.groups &&
         read_eps(eps, c.f.eps) && read_act(act, c.f.act);
}

// layer, input, mask, residual, weight, bias
bool group_layer(PyObject* const* args, Call& c) {
  Layer layer(args[0]);
  return absent(args[2]) && group(args[1], layer[NAME("num_groups")],
                                  layer.given_or(args[4], NAME("weight")),
                                  layer.given_or(args[5], NAME("bias")), layer[NAME("eps")],
                                  args[3], layer[NAME("_act")], c);
}

// input, num_groups, weight, bias, eps, mask, residual, act
bool group_norm(PyObject* const* args, Call& c) {
  return absent(args[5]) &&
         group(args[0], args[1], args[2], args[3], args[4], args[6], args[7], c);
}

bool read_shape(PyObject* object, c10::SmallVector<int64_t, 4>& shape) {
  shape.resize(1);
  if (object && PyLong_CheckExact(object)) return read(object, shape[0]);
  if (!object || !(PyTuple_Check(object) || PyList_Check(object))) return false;
  shape.resize(static_cast<size_t>(PySequence_Fast_GET_SIZE(object)));
  for (size_t i = 0; i < shape.size(); ++i)
    if (!read(PySequence_Fast_GET_ITEM(object, static_cast<Py_ssize_t>(i)), shape[i])) return false;
  return !shape.empty();
}

// Whether what is computed in float32 is rounded to x's dtype.
bool rounds(const Tensor& x) {
  return x.scalar_type() == at::kBFloat16 || x.scalar_type() == at::kHalf;
}

bool is_channels_last(PyObject* format) {
  return THPMemoryFormat_Check(format) && reinterpret_cast<THPMemoryFormat*>(format)->memory_format ==
                                              at::MemoryFormat::ChannelsLast;
}

// x as `functional.layer_norm` lays it out for that format; differentiable.
bool to_channels_last(Call& c) {
  if (c.f.trailing || c.x.dim() != 4 || c.add.defined()) return false;
  c.x = c.x.contiguous(at::MemoryFormat::ChannelsLast);
  return true;
}

struct RowArguments {
  PyObject *input, *shape, *weight, *bias, *eps, *zero_centered, *channels_first, *add, *act;
  bool center;
};

bool rows(const RowArguments& a, Call& c) {
  c10::SmallVector<int64_t, 4> shape;
  bool channels_first, zero_centered = false;
  if (!(read_input(a.input, c) && read_shape(a.shape, shape) &&
        read(a.channels_first, channels_first) && read(a.weight, c.weight) &&
        read(a.bias, c.bias) && read(a.add, c.add) && read_act(a.act, c.f.act)))
    return false;
  if (!a.center && !read(a.zero_centered, zero_centered)) return false;
  auto sizes = c.x.sizes();
  if (channels_first ? shape.size() != 1 || sizes.size() < 2 || sizes[1] != shape[0]
                     : sizes.size() < shape.size() ||
                           sizes.slice(sizes.size() - shape.size()) != at::IntArrayRef(shape))
    return false;
  // Python's path keeps the layout of these.
  if (!channels_first && !c.x.is_contiguous() && channels_last(c.x)) return false;
  c.f.summed = kK;
  c.f.groups = 1;
  c.f.trailing = channels_first ? 0 : static_cast<int64_t>(shape.size());
  c.f.center = a.center;
  if (!is_plain(c.weight, shape) || !is_plain(c.bias, shape)) return false;
  if (c.add.defined() && !same_shape(c.add, c.x)) return false;
  bool is_double = c.x.scalar_type() == at::kDouble;
  if (!a.center && absent(a.eps))
    c.f.eps = is_double ? std::numeric_limits<double>::epsilon()
                        : std::numeric_limits<float>::epsilon();
  else if (!read_eps(a.eps, c.f.eps))
    return false;
  if (zero_centered && c.weight.defined())
    c.weight = c.weight.to(c.weight.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).add(1);
  return true;
}

// layer, input, mask, add, weight, bias
template <bool center>
bool row_layer(PyObject* const* args, Call& c) {
  Layer layer(args[0]);
  bool cast, zero_centered = false;
  PyObject* bias = args[5];
  if (center) bias = layer.given_or(bias, NAME("bias"));
  PyObject* format = layer[NAME("memory_format")];
  if (!(read(layer[NAME("cast_before_affine")], cast) && format &&
        (absent(format) || is_channels_last(format)) &&
        (center || read(layer[NAME("zero_centered_weight")], zero_centered))) ||
      (cast && zero_centered))
    return false;
  return absent(args[2]) &&
         rows({args[1], layer[NAME("normalized_shape")], layer.given_or(args[4], NAME("weight")),
               bias, layer[NAME("eps")], center ? nullptr : layer[NAME("zero_centered_weight")],
               layer[NAME("channels_first")], args[3], layer[NAME("_act")], center},
              c) &&
         !(cast && rounds(c.x)) && (absent(format) || to_channels_last(c));
}

// input, normalized_shape, weight, bias, eps, channels_first, mask, add, act
bool layer_norm(PyObject* const* args, Call& c) {
  return absent(args[6]) && rows({args[0], args[1], args[2], args[3], args[4], nullptr, args[5],
                                  args[7], args[8], true},
                                 c);
}

// input, normalized_shape, weight, eps, bias, zero_centered_weight, channels_first, mask, add, act
bool rms_norm(PyObject* const* args, Call& c) {
  return absent(args[7]) && rows({args[0], args[1], args[2], args[4], args[3], args[5], args[6],
                                  args[8], args[9], false},
                                 c);
}

// ---- the module

template <bool (*reads)(PyObject* const*, Call&), Py_ssize_t count>
PyObject* take(PyObject*, PyObject* const* args, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(given == count, "expected ", count, " arguments, got ", given);
  Call c;
  if (ordinary() && reads(args, c)) return run(c);
  PyErr_Clear();
  Py_RETURN_NOTIMPLEMENTED;
  END_HANDLE_TH_ERRORS
}

PyObject* connect(PyObject*, PyObject* args) {
  if (!PyArg_ParseTuple(args, "OO!O!OO", &python.written, &PyList_Type, &python.watching,
                        &PyDict_Type, &python.backend, &python.cpu, &python.backward))
    return nullptr;
  Py_INCREF(args);  // and with it what it holds
  Py_RETURN_NONE;
}

PyObject* count(PyObject*, PyObject*) { return PyLong_FromLongLong(taken); }

template <bool (*reads)(PyObject* const*, Call&), Py_ssize_t count>
PyMethodDef method(const char* name) {
  auto function = reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&take<reads, count>));
  return {name, function, METH_FASTCALL, nullptr};
}

PyMethodDef methods[] = {
    method<batch_layer, 6>("batch_layer"),
    method<batch_norm, 16>("batch_norm"),
    method<instance_layer, 6>("instance_layer"),
    method<instance_norm, 13>("instance_norm"),
    method<group_layer, 6>("group_layer"),
    method<group_norm, 8>("group_norm"),
    method<row_layer<true>, 6>("layer_norm_layer"),
    method<layer_norm, 9>("layer_norm"),
    method<row_layer<false>, 6>("rms_norm_layer"),
    method<rms_norm, 10>("rms_norm"),
    {"connect", connect, METH_VARARGS, "What the functions look at and call back, once."},
    {"taken", count, METH_NOARGS, "The number of calls taken so far."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_eager", nullptr, -1, methods,
                          nullptr,               nullptr,  nullptr, nullptr};

}  // namespace
}  // namespace normkit

PyMODINIT_FUNC PyInit__eager() { return PyModule_Create(&normkit::definition); }
