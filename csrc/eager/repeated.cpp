// xsep._repeated: a call of separable_conv2d or depthwise_conv2d that has been checked once is made again from here,
// with a node of autograd in C++. Between two matrix products a CPU's caches hold neither Python's code nor its
// objects, so that checks and dispatch in Python take as long as a tenth of the convolution; a GPU is done with a small
// one before Python has asked for the next.
//
// What was checked is known by everything the checks, the choice of a backend and its plan look at: the options, and of
// each tensor its type, device, shape, strides and whether it begins where 16-byte accesses can. Whatever is out of the
// ordinary (subclasses, modes, transforms, tracing, autocast, tangents) is not for here: again() returns None, and
// Python takes the call.
#include <ATen/ops/empty_like.h>
#include <ATen/ops/sum.h>
#include <torch/csrc/autograd/custom_function.h>

#include <array>
#include <optional>
#include <string>
#include <unordered_map>

#include "call.h"
#include "makers.h"

namespace xsep::eager {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

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

// -------------------------------------------------------------------------------------------------------- autograd

/// y = pw(dw(prologue(x))) + bias, or dw(prologue(x)) + bias where there is no w_pw.
struct Convolution : torch::autograd::Function<Convolution> {
  static Tensor forward(AutogradContext* ctx, const Tensor& x, const Tensor& w_dw, O w_pw, O bias, O scale_p, O shift_p,
                        const Checked& checked) {
    const Maker maker = checked.training;
    const at::AutoDispatchBelowADInplaceOrView below;
    ctx->save_for_backward({x, w_dw, w_pw.value_or(Tensor()), bias.value_or(Tensor()), scale_p.value_or(Tensor()),
                            shift_p.value_or(Tensor())});
    ctx->saved_data["geometry"] = c10::IValue(at::IntArrayRef(checked.geometry));
    ctx->saved_data["activation"] = checked.activations[0];
    ctx->saved_data["alpha"] = checked.alphas[0];
    ctx->saved_data["images"] = static_cast<int64_t>(checked.images);
    ctx->saved_data["maker"] = static_cast<int64_t>(maker);
    const Tensors t{x, w_dw, w_pw, bias, {}, scale_p, shift_p, {}, {}, {}, {}};
    return conform(fprop(maker, t, checked, {}), checked.images);
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

  static Maker maker_of(AutogradContext* ctx) { return static_cast<Maker>(ctx->saved_data["maker"].toInt()); }

  static void straight_to_kernel(AutogradContext* ctx, const Tensor& dy, const variable_list& saved,
                                 const std::array<bool, 6>& wanted, variable_list& out) {
    const at::AutoDispatchBelowADInplaceOrView below;
    const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    auto& data = ctx->saved_data;
    const std::vector<int64_t> geometry = data["geometry"].toIntVector();
    const OptionalTensor scale_p = present(saved[4]), shift_p = present(saved[5]);
    const Gradients g = bprop(maker_of(ctx), dy,
                              {saved[0], saved[1], saved[2], scale_p, shift_p, geometry, data["activation"].toInt(),
                               data["alpha"].toDouble()},
                              {wanted[0], wanted[1], wanted[2], wanted[4], wanted[5]});
    if (wanted[0]) out[0] = conform(g.x, static_cast<at::MemoryFormat>(data["images"].toInt()));
    if (wanted[1]) out[1] = g.w_dw;
    if (wanted[2]) out[2] = g.w_pw.to(saved[2].scalar_type());
    if (wanted[3]) out[3] = at::sum(dy, {0, 2, 3}, false, at::kFloat).to(saved[3].scalar_type());
    if (wanted[4]) out[4] = g.scale_p.to(saved[4].scalar_type());
    if (wanted[5]) out[5] = g.shift_p.to(saved[5].scalar_type());
  }

  /// The backward op of the library, which can itself be differentiated, transformed and watched.
  static void through_library_op(AutogradContext* ctx, const Tensor& dy, const variable_list& saved,
                                 const std::array<bool, 6>& wanted, variable_list& out) {
    struct Backward {
      c10::OperatorHandle op;
      std::array<int, 6> places;  // of what is saved among its tensors
      size_t tensors, affines;
    };
    const auto named = [](const char* name) { return c10::Dispatcher::singleton().findSchemaOrThrow(name, ""); };
    static const Backward separable{named("xsep::separable_conv2d_backward"),
                                    {kPlaceX, kPlaceDw, kPlacePw, kPlaceBias, kScaleP, kShiftP},
                                    kTensors,
                                    3};
    static const Backward depthwise{named("xsep::depthwise_conv2d_backward"), {0, 1, -1, 2, 3, 4}, 7, 2};
    const Backward& backward = saved[2].defined() ? separable : depthwise;
    auto& data = ctx->saved_data;
    std::vector<c10::IValue> tensors(backward.tensors);
    c10::List<bool> all_wanted;
    all_wanted.resize(backward.tensors, false);
    for (size_t i = 0; i < saved.size(); ++i) {
      if (!saved[i].defined()) continue;
      tensors[backward.places[i]] = saved[i];
      all_wanted.set(backward.places[i], wanted[i]);
    }
    std::vector<int64_t> activations(backward.affines, 0);
    std::vector<double> alphas(backward.affines, 0.0);
    activations[0] = data["activation"].toInt();
    alphas[0] = data["alpha"].toDouble();
    torch::jit::Stack stack{dy, c10::IValue()};
    stack.insert(stack.end(), tensors.begin(), tensors.end());
    stack.emplace_back(data["geometry"]);
    stack.emplace_back(std::move(activations));
    stack.emplace_back(std::move(alphas));
    stack.emplace_back(maker_of(ctx) == Maker::kCpu ? "cpu" : "cuda");
    stack.emplace_back(all_wanted);
    backward.op.callBoxed(stack);
    for (size_t i = 0; i < saved.size(); ++i) {
      if (wanted[i]) out[i] = stack[backward.places[i]].toTensor();
    }
  }
};

// ------------------------------------------------------------------------------------------------ calls as Python's

// Of Python, by prepare(): the function of a parameter and a multiplier that finds it among the weights that layers
// keep packed.
PyObject* find_packed = nullptr;

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

/// again(x, w_dw, w_pw, bias, stride, padding, dilation, prologue, middle, epilogue, residual, backend), or without
/// w_pw, middle and residual: y; None where the call is not for here; NotImplemented where it may be, but was not made
/// before.
PyObject* again(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  Call call;
  if (!is_ordinary_thread() || !call.read(arguments, count)) Py_RETURN_NONE;
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
  if (maker == Maker::kCpu && t[kPlacePw] && !at::GradMode::is_enabled()) {
    packed = packed_weights(arguments[kWeightPw], t[kPlaceDw]->size(0) / t[kPlaceX]->size(1));
  }
  Tensor y;
  {
    const py::gil_scoped_release others_may_run;
    if (gradient) {
      y = maker == Maker::kConvolutions ? convolutions(t, checked)
                                        : Convolution::apply(*t[kPlaceX], *t[kPlaceDw], t[kPlacePw], t[kPlaceBias],
                                                             t[kScaleP], t[kShiftP], checked);
    } else {
      const at::AutoDispatchBelowADInplaceOrView below;
      y = maker == Maker::kConvolutions ? convolutions(t, checked) : fprop(maker, t, checked, packed);
      y = conform(y, checked.images);
    }
  }
  return THPVariable_Wrap(std::move(y));
  END_HANDLE_TH_ERRORS
}

/// call: again()'s arguments.
void keep(const py::tuple& call, const Checked& checked) {
  Call read;
  if (!is_ordinary_thread() || !read.read(&PyTuple_GET_ITEM(call.ptr(), 0), PyTuple_GET_SIZE(call.ptr()))) return;
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
  m.doc() = "Calls that were checked once, made again.";
  m.add_object("again", py::reinterpret_steal<py::object>(PyCFunction_New(&kAgain, nullptr)));
  py::enum_<Maker>(m, "Maker", "Who makes a call.")
      .value("PYTHON", Maker::kPython)
      .value("CPU", Maker::kCpu)
      .value("CUDA", Maker::kCuda)
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
