// The CUDA planner for Python: the functions that csrc/cuda's launchers ask, for tests and xsep.explain.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>

#include "common/cuda_chain_plan.h"
#include "common/cuda_separable_plan.h"
#include "common/cuda_wgrad_plan.h"

namespace py = pybind11;

namespace {

using namespace xsep::cuda;

/// In the order of ConvShape's fields.
using Sizes = std::array<int, 15>;

ConvShape make_shape(const Sizes& v) {
  return {v[0], v[1], v[2], v[3], v[4], v[5], v[6], v[7], v[8], v[9], v[10], v[11], v[12], v[13], v[14]};
}

using DepthwisePlanner = DepthwisePlan (*)(const ConvShape&, int, bool, const DeviceProperties&);

void define_depthwise(py::module_& m, const char* name, DepthwisePlanner planner, const char* doc) {
  m.def(
      name,
      [planner](const Sizes& shape, int element_bytes, bool aligned, int multiprocessors, int shared_bytes,
                int l2_bytes) {
        return planner(make_shape(shape), element_bytes, aligned, {multiprocessors, shared_bytes, l2_bytes});
      },
      py::arg("shape"), py::kw_only(), py::arg("element_bytes"), py::arg("aligned") = true, py::arg("multiprocessors"),
      py::arg("shared_bytes"), py::arg("l2_bytes") = 0, doc);
}

using WgradPlanner = SeparableWgradPlan (*)(const ConvShape&, int, int, bool, const DeviceProperties&);

void define_wgrad(py::module_& m, const char* name, WgradPlanner planner, const char* doc) {
  m.def(
      name,
      [planner](const Sizes& shape, int c_out, int element_bytes, bool aligned, int multiprocessors, int shared_bytes,
                int l2_bytes) {
        return planner(make_shape(shape), c_out, element_bytes, aligned, {multiprocessors, shared_bytes, l2_bytes});
      },
      py::arg("shape"), py::kw_only(), py::arg("c_out"), py::arg("element_bytes"), py::arg("aligned") = true,
      py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("l2_bytes") = 0, doc);
}

}  // namespace

void bind_cuda_plan(py::module_& m) {
  py::class_<DepthwisePlan>(m, "CudaDepthwisePlan")
      .def_readonly("sliding_window", &DepthwisePlan::sliding_window)
      .def_readonly("vec", &DepthwisePlan::vec)
      .def_readonly("vectors", &DepthwisePlan::vectors)
      .def_readonly("slices", &DepthwisePlan::slices)
      .def_readonly("strip_rows", &DepthwisePlan::strip_rows)
      .def_readonly("strips_down", &DepthwisePlan::strips_down)
      .def_readonly("strips_across", &DepthwisePlan::strips_across)
      .def_readonly("tiles_down", &DepthwisePlan::tiles_down)
      .def_readonly("tiles_across", &DepthwisePlan::tiles_across)
      .def_readonly("workers", &DepthwisePlan::workers)
      .def_readonly("shared_bytes", &DepthwisePlan::shared_bytes);
  py::class_<SeparablePlan>(m, "CudaSeparablePlan")
      .def_readonly("fused", &SeparablePlan::fused)
      .def_readonly("chunk_bytes", &SeparablePlan::chunk_bytes)
      .def_readonly("row_warps", &SeparablePlan::row_warps)
      .def_readonly("channel_warps", &SeparablePlan::channel_warps)
      .def_readonly("warps", &SeparablePlan::warps)
      .def_readonly("pixels", &SeparablePlan::pixels)
      .def_readonly("tile_rows", &SeparablePlan::tile_rows)
      .def_readonly("tile_columns", &SeparablePlan::tile_columns)
      .def_readonly("group_rows", &SeparablePlan::group_rows)
      .def_readonly("tiles_of_group", &SeparablePlan::tiles_of_group)
      .def_readonly("tiles_across", &SeparablePlan::tiles_across)
      .def_readonly("tiles", &SeparablePlan::tiles)
      .def_readonly("workers", &SeparablePlan::workers)
      .def_readonly("halo_rows", &SeparablePlan::halo_rows)
      .def_readonly("halo_columns", &SeparablePlan::halo_columns)
      .def_readonly("halos", &SeparablePlan::halos)
      .def_readonly("keeps_w_pw", &SeparablePlan::keeps_w_pw)
      .def_readonly("chunks", &SeparablePlan::chunks)
      .def_readonly("shared_bytes", &SeparablePlan::shared_bytes)
      .def_readonly("clocks", &SeparablePlan::clocks);
  py::class_<SeparableWgradPlan>(m, "CudaSeparableWgradPlan")
      .def_readonly("on_chip", &SeparableWgradPlan::on_chip)
      .def_readonly("walk", &SeparableWgradPlan::walk)
      .def_property_readonly("output_blocks", [](const SeparableWgradPlan& plan) { return plan.split.output_blocks; })
      .def_property_readonly("shares", [](const SeparableWgradPlan& plan) { return plan.split.shares; })
      .def_property_readonly("parts", [](const SeparableWgradPlan& plan) { return plan.split.parts; })
      .def_property_readonly("pays", &pays)
      .def_property_readonly("shared_bytes", [](const SeparableWgradPlan& plan) { return plan.extras.shared_bytes; })
      .def_readonly("clocks", &SeparableWgradPlan::clocks)
      .def_readonly("staged_clocks", &SeparableWgradPlan::staged_clocks);
  py::class_<ChainBackwardPlan>(m, "CudaChainBackwardPlan")
      .def_readonly("fused", &ChainBackwardPlan::fused)
      .def_readonly("tile_rows", &ChainBackwardPlan::tile_rows)
      .def_readonly("tiles_down", &ChainBackwardPlan::tiles_down)
      .def_readonly("tiles_across", &ChainBackwardPlan::tiles_across)
      .def_readonly("tiles", &ChainBackwardPlan::tiles)
      .def_readonly("workers", &ChainBackwardPlan::workers)
      .def_readonly("shares", &ChainBackwardPlan::shares)
      .def_readonly("shared_bytes", &ChainBackwardPlan::shared_bytes)
      .def_readonly("clocks", &ChainBackwardPlan::clocks)
      .def_readonly("staged_clocks", &ChainBackwardPlan::staged_clocks);
  define_depthwise(m, "plan_cuda_depthwise_fprop", &plan_depthwise_fprop,
                   "How the CUDA depthwise forward is cut into CTAs. shape: N, H, W, C_in, P, Q, C_mid, R, S, stride h "
                   "and w, padding top and left, dilation h and w.");
  define_depthwise(m, "plan_cuda_depthwise_bprop", &plan_depthwise_bprop,
                   "The same for the depthwise backward; workers is also the number of partial sums.");
  m.def(
      "plan_cuda_depthwise_statistics",
      [](const Sizes& shape, const DepthwisePlan& plan) { return fprop_statistics_tiles(plan, make_shape(shape)); },
      py::arg("shape"), py::arg("plan"), "Tiles of the statistics that come with a depthwise forward of this plan.");
  m.def(
      "plan_cuda_separable_fprop",
      [](const Sizes& shape, int c_out, int element_bytes, bool aligned, int multiprocessors, int shared_bytes,
         int l2_bytes) {
        return plan_separable_fprop(make_shape(shape), c_out, element_bytes, aligned,
                                    {multiprocessors, shared_bytes, l2_bytes});
      },
      py::arg("shape"), py::kw_only(), py::arg("c_out"), py::arg("element_bytes"), py::arg("aligned") = true,
      py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("l2_bytes") = 0,
      "How the fused CUDA forward is cut into CTAs, or a plan that is not fused. shape as for the depthwise planners.");
  define_wgrad(m, "plan_cuda_separable_wgrad", &plan_separable_wgrad,
               "How the pointwise weights' gradient is made with z on the chip, or a plan that is not on the chip.");
  define_wgrad(m, "plan_cuda_chain_wgrad", &plan_chain_wgrad,
               "The same in the training chain, with dr formed there too.");
  m.def(
      "plan_cuda_chain_slice",
      [](const Sizes& shape, int c_out, int element_bytes, int multiprocessors, int shared_bytes, int l2_bytes) {
        return plan_chain_slice(make_shape(shape), c_out, element_bytes, {multiprocessors, shared_bytes, l2_bytes});
      },
      py::arg("shape"), py::kw_only(), py::arg("c_out"), py::arg("element_bytes"), py::arg("multiprocessors"),
      py::arg("shared_bytes") = 0, py::arg("l2_bytes"), "Pictures at a time of a staged layer in the training chain.");
  m.def(
      "plan_cuda_chain_backward",
      [](const Sizes& shape, int c_out, int element_bytes, bool aligned, int multiprocessors, int shared_bytes,
         int l2_bytes) {
        return plan_chain_backward(make_shape(shape), c_out, element_bytes, aligned,
                                   {multiprocessors, shared_bytes, l2_bytes});
      },
      py::arg("shape"), py::kw_only(), py::arg("c_out"), py::arg("element_bytes"), py::arg("aligned") = true,
      py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("l2_bytes"),
      "How a layer's backward in the training chain is cut into the tiles of one pass, or a plan that is not fused.");
}
