// Between NCHW and NHWC: the operators xsep::cpu_to_nhwc and xsep::cpu_to_nchw.
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include "glue.h"
#include "transpose.h"

namespace xsep::cpu {
namespace {

/// Each picture [rows, columns] -> [columns, rows], in parallel over strips of columns.
void transpose_pictures(const Tensor& from, Tensor& to, int64_t n, int64_t rows, int64_t columns) {
  constexpr int64_t kStrip = 64;  // columns of one task: whole cache lines of what is read
  const int64_t strips = ceil_div(columns, kStrip);
  const auto run = [&](auto t) {
    using T = decltype(t);
    const T* in = static_cast<const T*>(from.const_data_ptr());
    T* out = static_cast<T*>(to.mutable_data_ptr());
    const int64_t grain = std::max<int64_t>(32768 / (rows * kStrip), 1);
    at::parallel_for(0, n * strips, grain, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; ++task) {
        const int64_t picture = task / strips * rows * columns;
        const int64_t first = task % strips * kStrip;
        const int64_t count = std::min(kStrip, columns - first);
        transpose_matrix(in + picture + first, rows, count, columns, out + picture + first * rows, rows);
      }
    });
  };
  with_storage(from.scalar_type(), run);
}

}  // namespace

Tensor to_nhwc(const Tensor& t) {
  if (t.is_contiguous(at::MemoryFormat::ChannelsLast) || !t.is_contiguous()) {
    return t.contiguous(at::MemoryFormat::ChannelsLast);
  }
  Tensor out = empty_image(t.sizes(), t, at::MemoryFormat::ChannelsLast);
  if (t.numel()) transpose_pictures(t, out, t.size(0), t.size(1), t.size(2) * t.size(3));
  return out;
}

Tensor to_nchw(const Tensor& t) {
  if (t.is_contiguous() || !t.is_contiguous(at::MemoryFormat::ChannelsLast)) return t.contiguous();
  Tensor out = empty_image(t.sizes(), t, at::MemoryFormat::Contiguous);
  if (t.numel()) transpose_pictures(t, out, t.size(0), t.size(2) * t.size(3), t.size(1));
  return out;
}

namespace {

/// As operators they always return a tensor of their own.
Tensor checked(const Tensor& t, const Tensor& result) { return result.is_same(t) ? t.clone() : result; }

}  // namespace

TORCH_LIBRARY_FRAGMENT(xsep, m) {
  m.def("cpu_to_nhwc(Tensor t) -> Tensor");
  m.def("cpu_to_nchw(Tensor t) -> Tensor");
}

TORCH_LIBRARY_IMPL(xsep, CPU, m) {
  m.impl("cpu_to_nhwc", [](const Tensor& t) { return checked(t, to_nhwc(t)); });
  m.impl("cpu_to_nchw", [](const Tensor& t) { return checked(t, to_nchw(t)); });
}

}  // namespace xsep::cpu
