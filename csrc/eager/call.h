// A call as Python made it, read without a Python frame: which calls are ordinary, and what of one is looked at.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/Tensor.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/jit/frontend/tracer.h>

#include <array>
#include <cstdlib>
#include <optional>
#include <string>
#include <string_view>

namespace xsep::eager {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

/// The arguments of again(), in the order of separable_conv2d's. Those of depthwise_conv2d are fewer, in the same
/// order.
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
constexpr std::array kDepthwiseArguments{kX,        kWeightDw, kBias,     kStride, kPadding,
                                         kDilation, kPrologue, kEpilogue, kBackend};

/// Tensors of a call, in the order of the library op's schema. A depthwise convolution alone has no w_pw, and its bias
/// and epilogue in the places of the whole's.
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

inline bool contains(c10::DispatchKeySet all, c10::DispatchKeySet some) {
  return (some.raw_repr() & ~all.raw_repr()) == 0;
}

/// A dense tensor on the CPU or a GPU of which nothing but autograd and autocast takes notice.
inline bool is_plain(const Tensor& t) {
  using c10::DispatchKey;
  static const c10::DispatchKeySet cpu(
      {DispatchKey::CPU, DispatchKey::AutogradCPU, DispatchKey::AutocastCPU, DispatchKey::ADInplaceOrView});
  static const c10::DispatchKeySet cuda(
      {DispatchKey::CUDA, DispatchKey::AutogradCUDA, DispatchKey::AutocastCUDA, DispatchKey::ADInplaceOrView});
  return contains(t.is_cuda() ? cuda : cpu, t.key_set());
}

/// Nobody looks on in this thread: no mode of Python's, no transform.
inline bool unwatched() {
  return !c10::impl::TorchDispatchModeTLS::any_modes_set() && !torch::jit::tracer::isTracing() &&
         contains(c10::default_included_set, c10::impl::tls_local_dispatch_key_set().included_);
}

inline bool is_ordinary_thread() { return unwatched() && !at::impl::torch_function_mode_enabled(); }

/// Python's class ChannelAffine, by prepare().
inline PyObject* channel_affine = nullptr;

/// The arguments of a call as they came, if they are ordinary, and all that is looked at in them as bytes.
class Call {
 public:
  /// given: as many as either function has.
  bool read(PyObject* const* given, Py_ssize_t count) {
    std::array<PyObject*, kArguments> arguments;
    const bool alone = count == Py_ssize_t{kDepthwiseArguments.size()};
    TORCH_CHECK_TYPE(alone || count == kArguments, "a call has ", int{kArguments}, " arguments, or ",
                     kDepthwiseArguments.size(), " where it is depthwise, not ", count);
    arguments.fill(Py_None);
    for (Py_ssize_t i = 0; i < count; ++i) arguments[alone ? int{kDepthwiseArguments[i]} : i] = given[i];
    key_.reserve(512);
    const char* wish = std::getenv("XSEP_BACKEND");
    number(at::get_num_threads());
    text(wish ? wish : "");
    return image(arguments[kX], kPlaceX, false) && image(arguments[kWeightDw], kPlaceDw, false) &&
           image(arguments[kWeightPw], kPlacePw, alone) && image(arguments[kResidual], kPlaceResidual, true) &&
           vector(arguments[kBias], kPlaceBias) && option(arguments[kStride]) && option(arguments[kPadding]) &&
           option(arguments[kDilation]) && affine(arguments[kPrologue], kScaleP) &&
           affine(arguments[kMiddle], kScaleM) && affine(arguments[kEpilogue], kScaleE) &&
           option(arguments[kBackend]) && !at::autocast::is_autocast_enabled(tensors_[kPlaceX]->device().type());
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
    number(static_cast<int64_t>(t.device().type()));
    number(t.device().index());
    for (int64_t size : t.sizes()) {
      if (size == 0) return false;
      number(size);
    }
    for (int64_t stride : t.strides()) number(stride);
    kind(reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 ? 'a' : 'u');
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

}  // namespace xsep::eager
