// xsep._C: build info and planners for Python. Knows nothing of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <string>
#include <vector>

#include "common/cpu_plan.h"

namespace py = pybind11;

void bind_cuda_plan(py::module_& m);

namespace {

using Sizes = std::vector<int64_t>;

#if defined(__x86_64__)
/// Clang's __builtin_cpu_supports does not know this one.
bool has_f16c() {
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

/// Levels that this chip and its operating system can run, worst first.
std::vector<std::string> cpu_levels_here() {
  std::vector<std::string> levels{"default"};
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2) levels.push_back("avx2");
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    levels.push_back("avx512");
  }
#endif
  return levels;
}

/// x [n, c, h, w], filter [r, s] and geometry int[8], as the operators take them.
xsep::DepthwiseShape make_shape(const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry) {
  if (x.size() != 4 || filter.size() != 2 || geometry.size() != 8) {
    throw py::value_error("expected 4 sizes of x, 2 of the filter and 8 numbers of geometry");
  }
  for (int i : {0, 1, 6, 7}) {
    if (geometry[i] <= 0) throw py::value_error("stride and dilation must be positive");
  }
  xsep::DepthwiseShape s{};
  s.n = x[0], s.c = x[1], s.h = x[2], s.w = x[3];
  s.r = filter[0], s.s = filter[1];
  s.multiplier = multiplier;
  s.geometry = {geometry[0], geometry[1], geometry[2], geometry[3], geometry[4], geometry[5], geometry[6], geometry[7]};
  s.set_output_size();
  return s;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build info and planners of xsep's compiled backends.";
#if defined(__clang__)
  m.attr("compiler") = __VERSION__;
#else
  m.attr("compiler") = "g++ " __VERSION__;
#endif
  m.attr("cpu_levels_built") = XSEP_CPU_LEVELS;
  m.def("cpu_levels_here", &cpu_levels_here, "CPU levels that this chip can run, worst first.");

  py::class_<xsep::CpuTilePlan>(m, "CpuTilePlan")
      .def_readonly("tile_pixels", &xsep::CpuTilePlan::tile_pixels)
      .def_readonly("tiles", &xsep::CpuTilePlan::tiles)
      .def_readonly("panels", &xsep::CpuTilePlan::panels)
      .def_readonly("panel_groups", &xsep::CpuTilePlan::panel_groups)
      .def_readonly("z_first", &xsep::CpuTilePlan::z_first)
      .def_property_readonly("tasks", &xsep::CpuTilePlan::tasks)
      .def("tile", [](const xsep::CpuTilePlan& plan, int64_t i) {
        const xsep::Range range = plan.tile(i);
        return std::pair(range.begin, range.end);
      });
  py::class_<xsep::CpuDepthwisePlan>(m, "CpuDepthwisePlan")
      .def_readonly("run_pixels", &xsep::CpuDepthwisePlan::run_pixels)
      .def_readonly("tasks", &xsep::CpuDepthwisePlan::tasks)
      .def_readonly("plane_pixels", &xsep::CpuDepthwisePlan::plane_pixels);
  py::class_<xsep::CpuPlanesPlan>(m, "CpuPlanesPlan")
      .def_readonly("group_rows", &xsep::CpuPlanesPlan::group_rows)
      .def_readonly("row_groups", &xsep::CpuPlanesPlan::row_groups)
      .def_property_readonly("units", &xsep::CpuPlanesPlan::units);
  py::class_<xsep::CpuSeparablePlanesPlan>(m, "CpuSeparablePlanesPlan")
      .def_readonly("group_rows", &xsep::CpuSeparablePlanesPlan::group_rows)
      .def_readonly("row_groups", &xsep::CpuSeparablePlanesPlan::row_groups)
      .def_readonly("z_step", &xsep::CpuSeparablePlanesPlan::z_step)
      .def_property_readonly("tasks", &xsep::CpuSeparablePlanesPlan::tasks);
  py::class_<xsep::CpuBackwardPlan>(m, "CpuBackwardPlan")
      .def_readonly("group_rows", &xsep::CpuBackwardPlan::group_rows)
      .def_readonly("row_groups", &xsep::CpuBackwardPlan::row_groups)
      .def_readonly("group_channels", &xsep::CpuBackwardPlan::group_channels)
      .def_readonly("channel_groups", &xsep::CpuBackwardPlan::channel_groups)
      .def_property_readonly("units", &xsep::CpuBackwardPlan::units);

  py::class_<xsep::CpuWgradPlan>(m, "CpuWgradPlan")
      .def_readonly("tile_pixels", &xsep::CpuWgradPlan::tile_pixels)
      .def_readonly("group_pixels", &xsep::CpuWgradPlan::group_pixels)
      .def_readonly("pixel_groups", &xsep::CpuWgradPlan::pixel_groups)
      .def_readonly("group_columns", &xsep::CpuWgradPlan::group_columns)
      .def_readonly("column_groups", &xsep::CpuWgradPlan::column_groups)
      .def_property_readonly("tasks", &xsep::CpuWgradPlan::tasks);

  m.def(
      "plan_cpu_separable",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int64_t c_out, int threads,
         int64_t z_bytes, bool weights_packed, int64_t l2_bytes) {
        const auto shape = make_shape(x, filter, multiplier, geometry);
        return xsep::plan_cpu_separable(shape, c_out, threads, l2_bytes ? l2_bytes : xsep::l2_cache_bytes(), z_bytes,
                                        weights_packed);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("c_out"),
      py::arg("threads"), py::arg("z_bytes"), py::arg("weights_packed") = false, py::arg("l2_bytes") = 0,
      "How the fused forward is cut into tasks. x [N, C, H, W]; filter [R, S]; geometry as in the operators; z_bytes "
      "of one value of z; weights_packed, as in repeated inference; l2_bytes of second-level cache, 0 for this "
      "machine's.");
  m.def(
      "plan_cpu_depthwise",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int threads) {
        return xsep::plan_cpu_depthwise(make_shape(x, filter, multiplier, geometry), threads);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("threads"),
      "How the depthwise forward is cut into tasks.");
  m.def(
      "cpu_brings_rows",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, bool nchw, int threads,
         int64_t visits, int64_t element_bytes) {
        return xsep::cpu_brings_rows(make_shape(x, filter, multiplier, geometry), nchw, threads, visits, element_bytes);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("nchw"),
      py::arg("threads"), py::arg("visits"), py::arg("element_bytes"),
      "Whether rows of an input that is NCHW, or has a prologue, are brought into NHWC with the prologue applied as "
      "the "
      "kernels come to them, or all of them beforehand; visits: how often each is read, once for every group of "
      "panels.");
  m.def(
      "cpu_spreads_pixels",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int threads, int64_t visits,
         int lanes, int64_t element_bytes) {
        const auto shape = make_shape(x, filter, multiplier, geometry);
        return xsep::cpu_spreads_pixels(shape, threads, visits, lanes, element_bytes);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("threads"),
      py::arg("visits"), py::arg("lanes"), py::arg("element_bytes"),
      "Whether rows of an input that is NHWC and has no prologue are brought as the kernels come to them, because its "
      "pixels share sets of the first-level cache where they lie; lanes: floats of a vector.");
  m.def(
      "cpu_turns_in_units",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry) {
        return xsep::cpu_turns_in_units(make_shape(x, filter, multiplier, geometry));
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"),
      "Whether the backward turns NCHW tensors round in its tiles and units, or as a whole.");
  m.def(
      "cpu_leaves_lanes_idle",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, bool nchw, bool training) {
        return xsep::cpu_leaves_lanes_idle(make_shape(x, filter, multiplier, geometry), nchw, training);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("nchw"),
      py::arg("training"),
      "Whether PyTorch's own convolutions do better, since the kernels' vectors would be all but empty; training: "
      "forward and backward together.");
  m.def(
      "cpu_pairs_leave_lanes_idle",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int64_t c_out, bool nchw,
         bool training) {
        return xsep::cpu_pairs_leave_lanes_idle(make_shape(x, filter, multiplier, geometry), c_out, nchw, training);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("c_out"),
      py::arg("nchw"), py::arg("training"), "The same of bfloat16 on a chip with AVX512_BF16.");
  m.def(
      "cpu_depthwise_leaves_lanes_idle",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, bool nchw, bool training,
         int threads, int lanes) {
        return xsep::cpu_depthwise_leaves_lanes_idle(make_shape(x, filter, multiplier, geometry), nchw, training,
                                                     threads, lanes);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("nchw"),
      py::arg("training"), py::arg("threads"), py::arg("lanes"), "The same of a depthwise convolution alone.");
  m.def(
      "cpu_takes_planes",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, bool nchw, int lanes) {
        return xsep::cpu_takes_planes(make_shape(x, filter, multiplier, geometry), nchw, lanes);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("nchw"),
      py::arg("lanes"), "Whether the depthwise forward takes NCHW plane by plane, with so many lanes in a vector.");
  m.def(
      "cpu_separates_planes",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, bool nchw, bool pairs,
         int threads, int lanes, int64_t l2_bytes) {
        return xsep::cpu_separates_planes(make_shape(x, filter, multiplier, geometry), nchw, pairs, threads, lanes,
                                          l2_bytes ? l2_bytes : xsep::l2_cache_bytes());
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("nchw"),
      py::arg("pairs"), py::arg("threads"), py::arg("lanes"), py::arg("l2_bytes") = 0,
      "Whether the fused forward takes an NCHW input plane by plane; pairs: BFloat16 would else be multiplied in "
      "pairs; "
      "lanes: floats of a vector; l2_bytes of second-level cache, 0 for this machine's.");
  m.def(
      "plan_cpu_separable_planes",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int threads,
         int64_t l2_bytes) {
        return xsep::plan_cpu_separable_planes(make_shape(x, filter, multiplier, geometry), threads,
                                               l2_bytes ? l2_bytes : xsep::l2_cache_bytes());
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("threads"),
      py::arg("l2_bytes") = 0, "How the fused forward by planes is cut into tasks: some rows of a picture each.");
  m.def(
      "plan_cpu_planes",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int threads) {
        return xsep::plan_cpu_planes(make_shape(x, filter, multiplier, geometry), threads);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("threads"),
      "How the depthwise forward is cut into units where it goes plane by plane.");
  m.def(
      "plan_cpu_backward",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry) {
        return xsep::plan_cpu_backward(make_shape(x, filter, multiplier, geometry));
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"),
      "How the depthwise backward is cut into units, whatever the number of threads.");
  m.def(
      "plan_cpu_wgrad",
      [](const Sizes& x, const Sizes& filter, int64_t multiplier, const Sizes& geometry, int64_t c_out, int threads,
         int64_t z_bytes) {
        return xsep::plan_cpu_wgrad(make_shape(x, filter, multiplier, geometry), c_out, threads, z_bytes);
      },
      py::arg("x"), py::arg("filter"), py::arg("multiplier"), py::arg("geometry"), py::kw_only(), py::arg("c_out"),
      py::arg("threads"), py::arg("z_bytes"), "How the pointwise weights' gradient is cut into tasks.");
  m.def("plan_cpu_product", &xsep::plan_cpu_product, py::arg("pixels"), py::arg("depth"), py::arg("panels"),
        py::kw_only(), py::arg("threads"), py::arg("bytes"),
        "How a product of NHWC pixels by panels of weights is cut into tasks; bytes of one value.");

  bind_cuda_plan(m);
}
