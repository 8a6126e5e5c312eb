// xsep._repeated: a call of separable_conv2d on the CPU that has been checked once is made again from here, with a node
// of autograd in C++. Between two matrix products the caches hold neither Python's code nor its objects, so that checks
// and dispatch in Python take as long as a tenth of the convolution.
//
// What was checked is known by everything the checks and the choice of a backend look at: the options, and of each
// tensor its type, shape and strides. Whatever is out of the ordinary (subclasses, modes, transforms, tracing,
// autocast, tangents) is not for here: again() returns None, and Python takes the call.
#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/ops/add.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/mul.h>
#include <ATen/ops/sum.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

namespace xsep::eager {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

/// The arguments of again(), in the order of separable_conv2d's.
enum Argument {
  kX,
  kWeightDw,
  kWeightPw,
  kBias,
  kStride,
  kPadding,
  kDilation,
  kPrologue,
  kMiddle,
  kEpilogue,
  kResidual,
  kBackend,
  kArguments
};

/// Tensors of a call, in the order of the library op's schema.
enum Place {
  kPlaceX,
  kPlaceDw,
  kPlacePw,
  kPlaceBias,
  kPlaceResidual,
  kScaleP,
  kShiftP,
  kScaleM,
  kShiftM,
  kScaleE,
  kShiftE,
  kTensors
};

/// Who makes a call.
enum class Maker {
  kPython,
  kKernels,       // the CPU's
  kConvolutions,  // two of PyTorch's, with nothing but a bias around them
};

/// What the checks of a call came to.
struct Checked {
  Maker maker;     // where no gradient is wanted
  Maker training;  // where one is; kKernels: with nothing but a bias around the products, as cpu_separable_bprop has it
  std::array<int64_t, 8> geometry;
  std::array<int64_t, 3> activations;
  std::array<double, 3> alphas;
  at::MemoryFormat images;
};

// ---------------------------------------------------------------------------------------------------- the kernels

template <class Signature>
c10::TypedOperatorHandle<Signature> op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

Tensor run_fprop(const std::array<OptionalTensor, kTensors>& t, const Checked& checked, const OptionalTensor& packed) {
  using O = const OptionalTensor&;
  static const auto fprop = op<Tensor(const Tensor&, const Tensor&, const Tensor&, O, O, O, O, O, O, O, at::IntArrayRef,
                                      at::IntArrayRef, at::ArrayRef<double>, O)>("xsep::cpu_separable_fprop");
  // scale * (v + bias) + shift = scale * v + (scale * bias + shift)
  OptionalTensor shift = t[kShiftE];
  if (const OptionalTensor& bias = t[kPlaceBias]) {
    const Tensor moved = t[kScaleE] ? at::mul(*t[kScaleE], *bias) : *bias;
    shift = shift ? at::add(moved, *shift) : moved;
  }
  return fprop.call(*t[kPlaceX], *t[kPlaceDw], *t[kPlacePw], t[kPlaceResidual], t[kScaleP], t[kShiftP], t[kScaleM],
                    t[kShiftM], t[kScaleE], shift, checked.geometry, checked.activations, checked.alphas, packed);
}

/// Of as much padding on one side as on the other.
Tensor run_convolutions(const std::array<OptionalTensor, kTensors>& t, const Checked& checked) {
  const at::IntArrayRef g = checked.geometry;
  const std::array<int64_t, 2> padding{g[4], g[2]};
  const Tensor z =
      at::conv2d(*t[kPlaceX], *t[kPlaceDw], {}, g.slice(0, 2), padding, g.slice(6, 2), t[kPlaceX]->size(1));
  return at::conv2d(z, *t[kPlacePw], t[kPlaceBias]);
}

/// t with exactly the strides of a fresh tensor of that layout: those of dimensions of size 1 are else left to chance.
/// The same as conform in xsep/ops/layout.py.
Tensor conform(const Tensor& t, at::MemoryFormat format) {
  const auto sizes = t.sizes();
  std::array<int64_t, 4> strides;
  int64_t step = 1;
  const bool nhwc = format == at::MemoryFormat::ChannelsLast;
  for (int d : nhwc ? std::array<int, 4>{1, 3, 2, 0} : std::array<int, 4>{3, 2, 1, 0}) {
    strides[d] = step;
    step *= sizes[d];
  }
  if (t.strides() == at::IntArrayRef(strides)) return t;
  bool same = true;
  for (int d = 0; d < 4; ++d) same = same && (sizes[d] == 1 || t.stride(d) == strides[d]);
  return same ? t.as_strided(sizes, strides) : at::empty_like(t, t.options(), format).copy_(t);
}

// --------------------------------------------------------------------------------------- which calls are ordinary

bool contains(c10::DispatchKeySet all, c10::DispatchKeySet some) { return (some.raw_repr() & ~all.raw_repr()) == 0; }

/// A dense tensor on the CPU of which nothing but autograd and autocast takes notice.
bool is_plain(const Tensor& t) {
  static const c10::DispatchKeySet plain({c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                          c10::DispatchKey::AutocastCPU, c10::DispatchKey::ADInplaceOrView});
  return contains(plain, t.key_set());
}

/// Nobody looks on in this thread: no mode of Python's, no transform.
bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::jit::tracer::isTracing() &&
         contains(c10::default_included_set, c10::impl::tls_local_dispatch_key_set().included_);
}

// -------------------------------------------------------------------------------------------------------- autograd

/// y = pw(dw(prologue(x))) + bias.
struct Separable : torch::autograd::Function<Separable> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w_dw, const Tensor& w_pw,
                        const OptionalTensor& bias, const OptionalTensor& scale_p, const OptionalTensor& shift_p,
                        const Checked& checked) {
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward(
        {x, w_dw, w_pw, bias.value_or(Tensor()), scale_p.value_or(Tensor()), shift_p.value_or(Tensor())});
    ctx->saved_data["geometry"] = c10::IValue(at::IntArrayRef(checked.geometry));
    ctx->saved_data["activation"] = checked.activations[0];
    ctx->saved_data["alpha"] = checked.alphas[0];
    ctx->saved_data["images"] = static_cast<int64_t>(checked.images);
    return conform(run_fprop({x, w_dw, w_pw, bias, {}, scale_p, shift_p, {}, {}, {}, {}}, checked, {}), checked.images);
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& gradients) {
    constexpr int kInputs = 7;  // of forward
    const variable_list saved = ctx->get_saved_variables();
    std::array<bool, 6> wanted{};
    size_t edge = 0;
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (saved[i].defined()) wanted[i] = ctx->needs_input_grad(edge++);
    }
    const Tensor& dy = gradients[0];
    variable_list out(kInputs);
    if (at::GradMode::is_enabled() || !is_plain(dy) || !unwatched()) {
      through_library_op(ctx, dy, saved, wanted, out);
    } else {
      straight_to_kernel(ctx, dy, saved, wanted, out);
    }
    return out;
  }

 private:
  static OptionalTensor present(const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; }

  static void straight_to_kernel(AutogradContext* ctx, const Tensor& dy, const variable_list& saved,
                                 const std::array<bool, 6>& wanted, variable_list& out) {
    using O = const OptionalTensor&;
    static const auto bprop = op<std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>(
        const Tensor&, const Tensor&, const Tensor&, const Tensor&, O, O, at::IntArrayRef, int64_t, double,
        std::array<bool, 5>)>("xsep::cpu_separable_bprop");
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto& data = ctx->saved_data;
    auto [dx, dw_dw, dw_pw, dscale, dshift] = bprop.call(
        dy, saved[0], saved[1], saved[2], present(saved[4]), present(saved[5]), data["geometry"].toIntVector(),
        data["activation"].toInt(), data["alpha"].toDouble(), {wanted[0], wanted[1], wanted[2], wanted[4], wanted[5]});
    if (wanted[0]) out[0] = conform(dx, static_cast<at::MemoryFormat>(data["images"].toInt()));
    if (wanted[1]) out[1] = dw_dw;
    if (wanted[2]) out[2] = dw_pw;
    if (wanted[3]) out[3] = at::sum(dy, {0, 2, 3}, false, at::kFloat).to(saved[3].scalar_type());
    if (wanted[4]) out[4] = dscale.to(saved[4].scalar_type());
    if (wanted[5]) out[5] = dshift.to(saved[5].scalar_type());
  }

  /// xsep::separable_conv2d_backward, which can itself be differentiated, transformed and watched.
  static void through_library_op(AutogradContext* ctx, const Tensor& dy, const variable_list& saved,
                                 const std::array<bool, 6>& wanted, variable_list& out) {
    static const auto backward = c10::Dispatcher::singleton().findSchemaOrThrow("xsep::separable_conv2d_backward", "");
    constexpr std::array<int, 6> places{kPlaceX, kPlaceDw, kPlacePw, kPlaceBias, kScaleP, kShiftP};
    auto& data = ctx->saved_data;
    std::array<c10::IValue, kTensors> tensors;
    c10::List<bool> all_wanted;
    all_wanted.resize(kTensors, false);
    for (size_t i = 0; i < places.size(); ++i) {
      if (saved[i].defined()) tensors[places[i]] = saved[i];
      all_wanted.set(places[i], wanted[i]);
    }
    torch::jit::Stack stack{dy, c10::IValue()};
    stack.insert(stack.end(), tensors.begin(), tensors.end());
    stack.emplace_back(data["geometry"]);
    stack.emplace_back(std::vector<int64_t>{data["activation"].toInt(), 0, 0});
    stack.emplace_back(std::vector<double>{data["alpha"].toDouble(), 0.0, 0.0});
    stack.emplace_back("cpu");
    stack.emplace_back(all_wanted);
    backward.callBoxed(stack);
    for (size_t i = 0; i < places.size(); ++i) {
      if (wanted[i]) out[i] = stack[places[i]].toTensor();
    }
  }
};

// ------------------------------------------------------------------------------------------------ calls as Python's

// Of Python, by prepare(): the class ChannelAffine, and the function of a parameter and a multiplier that finds it
// among the weights that layers keep packed.
PyObject* channel_affine = nullptr;
PyObject* find_packed = nullptr;

/// The arguments of a call as they came, if they are ordinary, and all that is looked at in them as bytes.
class Call {
 public:
  bool read(PyObject* const* arguments) {
    key_.reserve(512);
    const char* wish = std::getenv("XSEP_BACKEND");
    number(at::get_num_threads());
    text(wish ? wish : "");
    return image(arguments[kX], kPlaceX, false) && image(arguments[kWeightDw], kPlaceDw, false) &&
           image(arguments[kWeightPw], kPlacePw, false) && image(arguments[kResidual], kPlaceResidual, true) &&
           vector(arguments[kBias], kPlaceBias) && option(arguments[kStride]) && option(arguments[kPadding]) &&
           option(arguments[kDilation]) && affine(arguments[kPrologue], kScaleP) &&
           affine(arguments[kMiddle], kScaleM) && affine(arguments[kEpilogue], kScaleE) && option(arguments[kBackend]);
  }
  const std::string& key() const { return key_; }
  const std::array<OptionalTensor, kTensors>& tensors() const { return tensors_; }

 private:
  void number(int64_t value) { key_.append(reinterpret_cast<const char*>(&value), sizeof value); }
  void text(std::string_view value) {
    number(static_cast<int64_t>(value.size()));
    key_.append(value);
  }
  /// Tells apart what follows, and says that something is not there.
  void kind(char value) { key_.push_back(value); }

  bool image(PyObject* o, Place place, bool may_lack) { return tensor(o, place, 4, may_lack); }
  bool vector(PyObject* o, int place) { return tensor(o, place, 1, true); }

  bool tensor(PyObject* o, int place, int64_t dim, bool may_lack) {
    if (o == Py_None) {
      kind('-');
      return may_lack;
    }
    if (!THPVariable_CheckExact(o)) return false;
    const Tensor& t = THPVariable_Unpack(o);
    if (!is_plain(t) || t.dim() != dim || t._fw_grad(0).defined()) return false;
    kind('t');
    number(static_cast<int64_t>(t.scalar_type()));
    for (int64_t size : t.sizes()) {
      if (size == 0) return false;
      number(size);
    }
    for (int64_t stride : t.strides()) number(stride);
    tensors_[place] = t;
    return true;
  }

  bool integer(PyObject* o) {
    if (!PyLong_CheckExact(o)) return false;  // True is an int too, and no stride
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(o, &overflow);
    number(value);
    return overflow == 0;
  }

  bool string(PyObject* o) {
    Py_ssize_t length = 0;
    const char* data = PyUnicode_AsUTF8AndSize(o, &length);
    if (!data) {
      PyErr_Clear();
      return false;
    }
    text({data, static_cast<size_t>(length)});
    return true;
  }

  /// None, an int, a string, or a list or tuple of ints.
  bool option(PyObject* o) {
    if (o == Py_None) {
      kind('-');
      return true;
    }
    if (PyUnicode_CheckExact(o)) {
      kind('s');
      return string(o);
    }
    if (!PyTuple_CheckExact(o) && !PyList_CheckExact(o)) {
      kind('i');
      return integer(o);
    }
    kind('l');
    const Py_ssize_t size = PySequence_Fast_GET_SIZE(o);
    number(size);
    for (Py_ssize_t i = 0; i < size; ++i) {
      if (!integer(PySequence_Fast_GET_ITEM(o, i))) return false;
    }
    return true;
  }

  /// None, or a ChannelAffine (scale, shift, activation, alpha).
  bool affine(PyObject* o, int place) {
    if (o == Py_None) {
      kind('-');
      return true;
    }
    if (reinterpret_cast<PyObject*>(Py_TYPE(o)) != channel_affine) return false;
    kind('a');
    if (!vector(PyTuple_GET_ITEM(o, 0), place) || !vector(PyTuple_GET_ITEM(o, 1), place + 1)) return false;
    PyObject* const activation = PyTuple_GET_ITEM(o, 2);
    if (activation != Py_None && !PyUnicode_CheckExact(activation)) return false;
    if (!option(activation)) return false;
    PyObject* const alpha = PyTuple_GET_ITEM(o, 3);
    if (alpha == Py_None) {
      kind('-');
      return true;
    }
    if (!PyFloat_CheckExact(alpha)) return false;
    kind('f');
    const double value = PyFloat_AS_DOUBLE(alpha);
    key_.append(reinterpret_cast<const char*>(&value), sizeof value);
    return true;
  }

  std::string key_;
  std::array<OptionalTensor, kTensors> tensors_;
};

/// All calls checked so far. Whoever makes more different ones than this has them checked anew. Under Python's lock.
constexpr size_t kMost = 4096;
std::unordered_map<std::string, Checked>& known() {
  static auto* const calls = new std::unordered_map<std::string, Checked>;
  return *calls;
}

OptionalTensor packed_weights(PyObject* w_pw, int64_t multiplier) {
  if (!find_packed || Py_TYPE(w_pw) != reinterpret_cast<PyTypeObject*>(ParameterClass)) return std::nullopt;
  const py::object found = py::reinterpret_borrow<py::object>(find_packed)(py::handle(w_pw), multiplier);
  if (found.is_none()) return std::nullopt;
  return THPVariable_Unpack(found.ptr());
}

bool is_ordinary_thread() {
  return unwatched() && !at::impl::torch_function_mode_enabled() && !at::autocast::is_autocast_enabled(at::kCPU);
}

/// again(x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual, backend): y; None where
/// the call is not for here; NotImplemented where it may be, but was not made before.
PyObject* again(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == kArguments, "again takes ", int{kArguments}, " arguments, not ", count);
  Call call;
  if (!is_ordinary_thread() || !call.read(arguments)) Py_RETURN_NONE;
  const auto found = known().find(call.key());
  if (found == known().end()) Py_RETURN_NOTIMPLEMENTED;
  const Checked checked = found->second;
  const auto& t = call.tensors();
  bool gradient = false;
  if (at::GradMode::is_enabled()) {
    for (const OptionalTensor& one : t) gradient = gradient || (one && one->requires_grad());
  }
  const Maker maker = gradient ? checked.training : checked.maker;
  const auto excluded = c10::impl::tls_local_dispatch_key_set().excluded_;
  if (maker == Maker::kPython || (gradient && excluded.has_any(c10::autograd_dispatch_keyset))) Py_RETURN_NONE;
  OptionalTensor packed;
  if (maker == Maker::kKernels && !at::GradMode::is_enabled()) {
    packed = packed_weights(arguments[kWeightPw], t[kPlaceDw]->size(0) / t[kPlaceX]->size(1));
  }
  Tensor y;
  {
    const py::gil_scoped_release others_may_run;
    if (gradient) {
      y = maker == Maker::kConvolutions ? run_convolutions(t, checked)
                                        : Separable::apply(*t[kPlaceX], *t[kPlaceDw], *t[kPlacePw], t[kPlaceBias],
                                                           t[kScaleP], t[kShiftP], checked);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      y = maker == Maker::kKernels ? run_fprop(t, checked, packed) : run_convolutions(t, checked);
      y = conform(y, checked.images);
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

/// call: again()'s arguments.
void keep(const py::tuple& call, const Checked& checked) {
  TORCH_CHECK_TYPE(call.size() == kArguments, "a call has ", int{kArguments}, " arguments, not ", call.size());
  Call read;
  if (!is_ordinary_thread() || !read.read(&PyTuple_GET_ITEM(call.ptr(), 0))) return;
  if (known().size() >= kMost) known().clear();
  known()[read.key()] = checked;
}

void remember(const py::tuple& call, const std::array<int64_t, 8>& geometry, const std::array<int64_t, 3>& activations,
              const std::array<double, 3>& alphas, bool channels_last, Maker maker, Maker training) {
  const auto images = channels_last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  keep(call, {maker, training, geometry, activations, alphas, images});
}

PyMethodDef kAgain{"again", reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&again)), METH_FASTCALL,
                   "y of a call that was remembered; None if it is not for here, NotImplemented if it is not known."};

}  // namespace

PYBIND11_MODULE(_repeated, m) {
  m.doc() = "Calls on the CPU that were checked once, made again.";
  m.add_object("again", py::reinterpret_steal<py::object>(PyCFunction_New(&kAgain, nullptr)));
  py::enum_<Maker>(m, "Maker", "Who makes a call.")
      .value("PYTHON", Maker::kPython)
      .value("KERNELS", Maker::kKernels)
      .value("CONVOLUTIONS", Maker::kConvolutions);
  m.def("remember", &remember, "Keeps what the checks of a call came to, if it is ordinary.");
  m.def("forget", [] { known().clear(); }, "Has every call checked anew.");
  m.def("count", [] { return known().size(); }, "How many calls are known.");
  m.def(
      "prepare",
      [](const py::object& affine, const py::object& find) {
        channel_affine = py::object(affine).release().ptr();
        find_packed = py::object(find).release().ptr();
      },
      "The class ChannelAffine, and the function of a parameter and a multiplier that gives its packed weights or "
      "None.");
}

}  // namespace xsep::eager
