// The torch-free CPU kernels on buffers of exactly the size they say they need: once in order, once by several threads
// at the same time, and once plainly in double. For the address, undefined-behaviour and thread sanitizers.
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#define XSEP_CPU_INSTANCES
#include "cpu/depthwise_bprop.h"
#include "cpu/pack.h"
#include "cpu/plane_fprop.h"
#include "cpu/separable_fprop.h"
#include "cpu/separable_planes.h"
#include "cpu/separable_wgrad.h"

namespace {

using namespace xsep;
using namespace xsep::cpu;

constexpr int kThreads = 4;

struct Random {
  uint32_t state = 12345;
  float operator()() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / (1 << 23) - 1.0f;
  }
};

std::vector<float> random_values(int64_t count, Random& next) {
  std::vector<float> v(static_cast<size_t>(count));
  for (float& f : v) f = next();
  return v;
}

/// f(task, thread) for each task; on several threads, whoever is free takes the next one.
void run_tasks(int64_t tasks, int threads, const std::function<void(int64_t, int)>& f) {
  std::atomic<int64_t> next{0};
  std::vector<std::thread> pool;
  for (int i = 0; i < threads; ++i) {
    pool.emplace_back([&, i] {
      for (int64_t task = next++; task < tasks; task = next++) f(task, i);
    });
  }
  for (std::thread& t : pool) t.join();
}

struct Problem {
  const char* name;
  DepthwiseShape shape;
  int64_t c_out;
};

/// Value of relu(scale * x + shift) at an input position, or of x where there is no scale; zero in the padding.
double input_at(const Problem& problem, const std::vector<float>& x, const ChannelAffine& prologue, int64_t n,
                int64_t h, int64_t w, int64_t c) {
  const DepthwiseShape& s = problem.shape;
  if (h < 0 || h >= s.h || w < 0 || w >= s.w) return 0;
  const double value = x[static_cast<size_t>(((n * s.h + h) * s.w + w) * s.c + c)];
  return prologue.scale ? std::fmax(prologue.scale[c] * value + prologue.shift[c], 0) : value;
}

/// y [n * p * q, c_out] in double.
std::vector<double> plain(const Problem& problem, const std::vector<float>& x, const ChannelAffine& prologue,
                          const std::vector<float>& w_dw, const std::vector<float>& w_pw) {
  const DepthwiseShape& s = problem.shape;
  const Geometry& g = s.geometry;
  const int64_t c_mid = s.c * s.multiplier;
  std::vector<double> y;
  for (int64_t pixel = 0; pixel < s.pixels_out(); ++pixel) {
    const int64_t n = pixel / (s.p * s.q), p = pixel / s.q % s.p, q = pixel % s.q;
    std::vector<double> z(static_cast<size_t>(c_mid), 0.0);
    for (int64_t j = 0; j < c_mid; ++j) {
      for (int64_t t = 0; t < s.taps(); ++t) {
        const int64_t h = p * g.stride_h - g.pad_top + t / s.s * g.dilation_h;
        const int64_t w = q * g.stride_w - g.pad_left + t % s.s * g.dilation_w;
        z[static_cast<size_t>(j)] +=
            input_at(problem, x, prologue, n, h, w, j / s.multiplier) * w_dw[static_cast<size_t>(j * s.taps() + t)];
      }
    }
    for (int64_t o = 0; o < problem.c_out; ++o) {
      double sum = 0;
      for (int64_t j = 0; j < c_mid; ++j) sum += z[static_cast<size_t>(j)] * w_pw[static_cast<size_t>(o * c_mid + j)];
      y.push_back(sum);
    }
  }
  return y;
}

enum class Rows { kWhereTheyLie, kTurned, kWithPrologue };

/// [n, h, w, c] -> [n, c, h, w]
std::vector<float> in_planes(const DepthwiseShape& s, const std::vector<float>& x) {
  std::vector<float> turned(x.size());
  const int64_t plane = s.h * s.w;
  for (int64_t i = 0; i < s.pixels_in() * s.c; ++i) {
    const int64_t n = i / (plane * s.c), pixel = i / s.c % plane, c = i % s.c;
    turned[static_cast<size_t>((n * s.c + c) * plane + pixel)] = x[static_cast<size_t>(i)];
  }
  return turned;
}

InputRows input_rows(const DepthwiseShape& s, Rows how, const std::vector<float>& x, const ChannelAffine& prologue) {
  InputRows in{};
  in.nchw = how == Rows::kTurned;
  in.c = s.c, in.h = s.h, in.w = s.w;
  in.x = x.data();
  if (how == Rows::kWhereTheyLie) return in;
  in.prologue = prologue;
  const CpuRowsPlan plan = plan_cpu_rows(s, in.nchw);
  in.bring = bring_rows<float, float>;
  in.slots = plan.slots;
  in.at_once = plan.at_once;
  in.left = s.geometry.pad_left;
  in.row_columns = plan.columns;
  in.element_bytes = in.x_element_bytes = sizeof(float);
  in.pixel_step = brought_pixel_step(s.c, sizeof(float));
  return in;
}

bool forward(const Problem& problem, Rows how) {
  const DepthwiseShape& s = problem.shape;
  const int64_t c_mid = s.c * s.multiplier;
  const int64_t c_pad = table_row(s.c);
  const int64_t panels = ceil_div(problem.c_out, kPanelColumns);
  Random next;
  const std::vector<float> x = random_values(s.pixels_in() * s.c, next);
  const std::vector<float> w_dw = random_values(c_mid * s.taps(), next);
  const std::vector<float> w_pw = random_values(problem.c_out * c_mid, next);
  std::vector<float> w(static_cast<size_t>(s.multiplier * s.taps() * c_pad), 0.0f);
  pack_depthwise(w_dw.data(), s.c, s.multiplier, s.taps(), c_pad, w.data());
  const PointwisePacking packing{problem.c_out, s.c, s.multiplier, c_mid, false};
  std::vector<float> packed(static_cast<size_t>(panels * c_mid * kPanelColumns));
  for (int64_t i = 0; i < panels; ++i) pack_panel(packing, w_pw.data(), i, packed.data() + i * c_mid * kPanelColumns);

  const std::vector<float> scale = random_values(c_pad, next), shift = random_values(c_pad, next);
  const ChannelAffine prologue =
      how == Rows::kWithPrologue ? ChannelAffine{scale.data(), shift.data(), Activation::kRelu, 0} : ChannelAffine{};
  const std::vector<float> in_order = how == Rows::kTurned ? in_planes(s, x) : x;

  SeparableFprop p{};
  p.depthwise.shape = s;
  p.depthwise.c_pad = c_pad;
  p.depthwise.w = w.data();
  p.depthwise.input = input_rows(s, how, in_order, prologue);
  p.plan = plan_cpu_separable(s, problem.c_out, kThreads, 1 << 20, sizeof(float), true);
  p.pointwise.c_out = problem.c_out;
  p.pointwise.depth = c_mid;
  p.pointwise.z_stride = round_up(c_mid, 16);
  p.pointwise.w_packed = packed.data();

  const int64_t scratch = p.scratch_bytes();
  std::vector<float> results[2];
  for (int run = 0; run < 2; ++run) {
    const int threads = run == 0 ? 1 : kThreads;
    results[run].assign(static_cast<size_t>(s.pixels_out() * problem.c_out), std::nanf(""));
    p.pointwise.y = results[run].data();
    std::vector<std::vector<float>> mine(static_cast<size_t>(threads));
    std::vector<RowWindow> windows;
    for (auto& m : mine) {
      m.assign(static_cast<size_t>(ceil_div(scratch, 4)), std::nanf(""));
      windows.push_back(p.window(m.data()));
    }
    run_tasks(p.plan.tasks(), threads, [&](int64_t task, int thread) {
      const auto i = static_cast<size_t>(thread);
      separable_fprop_task<float, float>(p, task, windows[i], mine[i].data());
    });
  }
  const size_t bytes = results[0].size() * sizeof(float);
  bool good = std::memcmp(results[0].data(), results[1].data(), bytes) == 0;

  // All of z first: the same sums in the same order.
  p.plan.z_first = true;
  const int64_t row_bytes = p.pointwise.z_stride * p.pointwise.z_bytes();
  std::vector<float> z(static_cast<size_t>(s.pixels_out() * p.pointwise.z_stride));
  std::vector<float> z_first(results[0].size(), std::nanf(""));
  p.pointwise.y = z_first.data();
  char* const rows = reinterpret_cast<char*>(z.data());
  std::vector<std::vector<float>> row_memory(kThreads);
  std::vector<RowWindow> windows;
  for (auto& mine : row_memory) {
    mine.assign(static_cast<size_t>(ceil_div(p.depthwise.input.bytes(), 4)), std::nanf(""));
    windows.push_back({p.depthwise.input, mine.data()});
  }
  run_tasks(s.pixels_out(), kThreads, [&](int64_t pixel, int thread) {
    make_z<float>(p, {pixel, pixel + 1}, windows[static_cast<size_t>(thread)], rows + pixel * row_bytes);
  });
  std::vector<std::vector<float>> products(kThreads);
  for (auto& mine : products) mine.resize(static_cast<size_t>(ceil_div(p.products_bytes(), 4)));
  run_tasks(p.plan.tasks(), kThreads, [&](int64_t panel, int thread) {
    const Soon next = panel + 1 < panels ? Soon{p.pointwise.panel(panel + 1), p.pointwise.panel_bytes()} : Soon{};
    multiply_all_tiles<float>(p, panel, rows, p.pointwise.panel(panel), next,
                              products[static_cast<size_t>(thread)].data());
  });
  good = good && std::memcmp(results[0].data(), z_first.data(), bytes) == 0;
  const std::vector<double> truth = plain(problem, x, prologue, w_dw, w_pw);
  for (size_t i = 0; i < truth.size(); ++i) {
    good = good && std::fabs(results[0][i] - truth[i]) <= 1e-4 * (1 + std::fabs(truth[i]));
  }
  return good;
}

/// [n, c, plane] -> [n, plane, c]
std::vector<float> in_pixels(int64_t n, int64_t c, int64_t plane, const std::vector<float>& planes) {
  std::vector<float> turned(planes.size());
  for (int64_t i = 0; i < n * c * plane; ++i) {
    const int64_t picture = i / (c * plane), channel = i / plane % c, pixel = i % plane;
    turned[static_cast<size_t>((picture * plane + pixel) * c + channel)] = planes[static_cast<size_t>(i)];
  }
  return turned;
}

/// The depthwise forward of NCHW, plane by plane, alone and by several threads.
bool planes(const Problem& problem, bool with_affines) {
  const DepthwiseShape& s = problem.shape;
  const int64_t c_mid = s.c * s.multiplier;
  Random next;
  const std::vector<float> x = random_values(s.pixels_in() * s.c, next);
  const std::vector<float> w = random_values(c_mid * s.taps(), next);
  const std::vector<float> scale = random_values(c_mid, next), shift = random_values(c_mid, next);
  const std::vector<float> x_planes = in_planes(s, x);
  std::vector<float> identity(static_cast<size_t>(c_mid * c_mid), 0.0f);
  for (int64_t c = 0; c < c_mid; ++c) identity[static_cast<size_t>(c * c_mid + c)] = 1.0f;
  PlaneFprop p{};
  p.shape = s;
  p.x = x_planes.data();
  p.w = w.data();
  if (with_affines) {
    p.prologue = {scale.data(), shift.data(), Activation::kRelu, 0};
    p.output = {scale.data(), shift.data(), Activation::kIdentity, 0};
  }
  std::vector<double> truth = plain({"", s, c_mid}, x, p.prologue, w, identity);
  bool good = true;
  for (const int threads : {1, kThreads}) {
    p.plan = plan_cpu_planes(s, threads);
    p.rows = plane_rows(s, p.plan);
    std::vector<float> y(static_cast<size_t>(s.pixels_out() * c_mid), std::nanf(""));
    p.y = y.data();
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads));
    for (auto& mine : scratch) mine.assign(static_cast<size_t>(p.scratch_bytes() / 4), 0.0f);
    run_tasks(p.plan.units(), threads, [&](int64_t unit, int thread) {
      plane_fprop_unit<float>(p, unit, scratch[static_cast<size_t>(thread)].data());
    });
    y = in_pixels(s.n, c_mid, s.p * s.q, y);
    for (size_t i = 0; i < truth.size(); ++i) {
      const size_t c = i % static_cast<size_t>(c_mid);
      const double right =
          with_affines ? truth[i] * static_cast<double>(scale[c]) + static_cast<double>(shift[c]) : truth[i];
      good = good && std::fabs(static_cast<double>(y[i]) - right) <= 1e-4 * (1 + std::fabs(right));
    }
  }
  return good;
}

/// The fused forward of NCHW, plane by plane, alone and by several threads; the affines come with a residual.
bool fused_planes(const Problem& problem, bool with_affines) {
  const DepthwiseShape& s = problem.shape;
  const int64_t c_mid = s.c * s.multiplier, c_out = problem.c_out;
  Random next;
  const std::vector<float> x = random_values(s.pixels_in() * s.c, next);
  const std::vector<float> w_dw = random_values(c_mid * s.taps(), next), w_pw = random_values(c_out * c_mid, next);
  const std::vector<float> scale = random_values(std::max(s.c, c_out), next);
  const std::vector<float> shift = random_values(std::max(s.c, c_out), next);
  const std::vector<float> residual = random_values(s.pixels_out() * c_out, next);
  const std::vector<float> x_planes = in_planes(s, x);
  SeparableOfPlanes p{};
  p.depthwise.shape = s;
  p.depthwise.x = x_planes.data();
  p.depthwise.w = w_dw.data();
  p.c_out = c_out;
  p.w_pw = w_pw.data();
  if (with_affines) {
    p.depthwise.prologue = {scale.data(), shift.data(), Activation::kRelu, 0};
    p.epilogue = {scale.data(), shift.data(), Activation::kIdentity, 0};
    p.residual = residual.data();
  }
  const std::vector<double> truth = plain(problem, x, p.depthwise.prologue, w_dw, w_pw);
  const std::vector<float> added = in_pixels(s.n, c_out, s.p * s.q, residual);
  bool good = true;
  for (const int threads : {1, kThreads}) {
    p.plan = plan_cpu_separable_planes(s, threads, 64 * 1024);
    p.depthwise.plan.group_rows = p.plan.group_rows;
    p.depthwise.rows = plane_rows(s, p.depthwise.plan);
    std::vector<float> y(static_cast<size_t>(s.pixels_out() * c_out), std::nanf(""));
    p.y = y.data();
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads));
    for (auto& mine : scratch) {
      mine.assign(static_cast<size_t>(p.scratch_bytes() / 4), 0.0f);
      std::fill(mine.begin(), mine.begin() + p.z_bytes() / 4, std::nanf(""));
    }
    run_tasks(p.plan.tasks(), threads, [&](int64_t task, int thread) {
      separable_planes_task<float>(p, task, scratch[static_cast<size_t>(thread)].data());
    });
    y = in_pixels(s.n, c_out, s.p * s.q, y);
    for (size_t i = 0; i < truth.size(); ++i) {
      const size_t c = i % static_cast<size_t>(c_out);
      const double affine = truth[i] * static_cast<double>(scale[c]) + static_cast<double>(shift[c]);
      const double right = with_affines ? affine + static_cast<double>(added[i]) : truth[i];
      good = good && std::fabs(static_cast<double>(y[i]) - right) <= 1e-4 * (1 + std::fabs(right));
    }
  }
  return good;
}

/// The depthwise backward with all it can give: dx, dw and the prologue's gradients. The same of x and to dx in NCHW,
/// in any combination.
bool backward(const Problem& problem) {
  const DepthwiseShape& s = problem.shape;
  const int64_t c_mid = s.c * s.multiplier;
  Random next;
  DepthwiseBprop p{};
  p.shape = s;
  p.plan = plan_cpu_backward(s);
  p.c_pad = table_row(s.c);
  const std::vector<float> x = random_values(s.pixels_in() * s.c, next);
  const std::vector<float> x_planes = in_planes(s, x);
  const std::vector<float> dz = random_values(s.pixels_out() * c_mid, next);
  const std::vector<float> w = random_values(s.multiplier * s.taps() * p.c_pad, next);
  const std::vector<float> scale = random_values(p.c_pad, next), shift = random_values(p.c_pad, next);
  p.dz = dz.data();
  p.w = w.data();
  p.prologue = {scale.data(), shift.data(), Activation::kSilu, 0};
  std::vector<float> first_dx;
  std::vector<double> first_sums;
  bool good = true;
  for (int run = 0; run < 5; ++run) {
    const int threads = run == 0 ? 1 : kThreads;
    p.x_planes = run == 2 || run == 3;
    p.dx_planes = run == 3 || run == 4;
    std::vector<float> dx(x.size(), std::nanf(""));
    std::vector<double> sums(static_cast<size_t>(p.plan.row_groups * (s.multiplier * s.taps() + 2) * p.c_pad), 0.0);
    p.x = p.x_planes ? x_planes.data() : x.data();
    p.dx = dx.data();
    p.dw = sums.data();
    p.daffine = p.dw + p.plan.row_groups * s.multiplier * s.taps() * p.c_pad;
    std::vector<std::vector<float>> scratch(static_cast<size_t>(threads));
    for (auto& mine : scratch) {
      mine.assign(static_cast<size_t>(p.scratch_bytes(sizeof(float)) / 4), std::nanf(""));
    }
    run_tasks(p.plan.units(), threads, [&](int64_t unit, int thread) {
      depthwise_bprop_unit<float>(p, unit, scratch[static_cast<size_t>(thread)].data());
    });
    if (p.dx_planes) dx = in_pixels(s.n, s.c, s.h * s.w, dx);
    if (run == 0) first_dx = dx, first_sums = sums;
    good = good && first_dx.size() == dx.size() && first_sums == sums;
    for (size_t i = 0; i < dx.size(); ++i) good = good && dx[i] == first_dx[i];
  }
  return good;
}

/// The pointwise weights' gradient of dv in NHWC and in NCHW: the same sums in the same order.
bool weight_gradient(const Problem& problem) {
  const DepthwiseShape& s = problem.shape;
  if (s.multiplier != 1) return true;
  const int64_t c_pad = table_row(s.c);
  Random next;
  const std::vector<float> x = random_values(s.pixels_in() * s.c, next);
  const std::vector<float> w_dw = random_values(s.c * s.taps(), next);
  const std::vector<float> planes = random_values(s.pixels_out() * problem.c_out, next);
  const std::vector<float> pixels = in_pixels(s.n, problem.c_out, s.p * s.q, planes);
  std::vector<float> w(static_cast<size_t>(s.taps() * c_pad), 0.0f);
  pack_depthwise(w_dw.data(), s.c, 1, s.taps(), c_pad, w.data());
  SeparableWgrad p{};
  p.depthwise.shape = s;
  p.depthwise.c_pad = c_pad;
  p.depthwise.w = w.data();
  p.depthwise.input = input_rows(s, Rows::kWhereTheyLie, x, {});
  p.plan = plan_cpu_wgrad(s, problem.c_out, kThreads, sizeof(float));
  p.c_out = problem.c_out;
  p.dw_row = round_up(s.c, 16);
  std::vector<float> results[2];
  for (int run = 0; run < 2; ++run) {
    p.plane = run == 0 ? 0 : s.p * s.q;
    p.dv = run == 0 ? pixels.data() : planes.data();
    results[run].assign(static_cast<size_t>(p.plan.pixel_groups * p.c_out * p.dw_row), 0.0f);
    p.dw = results[run].data();
    std::vector<std::vector<float>> scratch(kThreads);
    std::vector<RowWindow> windows;
    for (auto& mine : scratch) {
      mine.assign(static_cast<size_t>(p.scratch_bytes() / 4), std::nanf(""));
      windows.push_back(p.window(mine.data()));
    }
    run_tasks(p.plan.tasks(), kThreads, [&](int64_t task, int thread) {
      const auto i = static_cast<size_t>(thread);
      separable_wgrad_task<float, float>(p, task, windows[i], scratch[i].data());
    });
  }
  const std::vector<double> truth = [&] {
    std::vector<float> identity(static_cast<size_t>(s.c * s.c), 0.0f);
    for (int64_t c = 0; c < s.c; ++c) identity[static_cast<size_t>(c * s.c + c)] = 1.0f;
    const std::vector<double> z = plain({"", s, s.c}, x, {}, w_dw, identity);
    std::vector<double> dw(static_cast<size_t>(problem.c_out * s.c), 0.0);
    for (int64_t pixel = 0; pixel < s.pixels_out(); ++pixel) {
      for (int64_t o = 0; o < problem.c_out; ++o) {
        for (int64_t c = 0; c < s.c; ++c) {
          dw[static_cast<size_t>(o * s.c + c)] +=
              static_cast<double>(pixels[static_cast<size_t>(pixel * problem.c_out + o)]) *
              z[static_cast<size_t>(pixel * s.c + c)];
        }
      }
    }
    return dw;
  }();
  bool good = true;
  for (int64_t o = 0; o < problem.c_out; ++o) {
    for (int64_t c = 0; c < s.c; ++c) {
      double sum = 0;
      for (int64_t group = 0; group < p.plan.pixel_groups; ++group) {
        const auto at = static_cast<size_t>((group * p.c_out + o) * p.dw_row + c);
        good = good && results[0][at] == results[1][at];
        sum += results[0][at];
      }
      good = good && std::fabs(sum - truth[static_cast<size_t>(o * s.c + c)]) <= 1e-3;
    }
  }
  return good;
}

}  // namespace

int main() {
  const int64_t one = 1;
  std::vector<Problem> problems = {
      {"3x3", {2, 37, 9, 11, 0, 0, 3, 3, one, {1, 1, 1, 1, 1, 1, 1, 1}}, 70},
      {"3x3 at stride 2, TensorFlow's padding", {1, 65, 8, 10, 0, 0, 3, 3, one, {2, 2, 0, 1, 0, 1, 1, 1}}, 5},
      {"5x5 with a depth multiplier", {2, 5, 7, 8, 0, 0, 5, 5, 2, {1, 1, 2, 2, 2, 2, 1, 1}}, 33},
      {"7x7 wider than the picture", {1, 16, 3, 2, 0, 0, 7, 7, one, {1, 1, 3, 3, 3, 3, 1, 1}}, 64},
      {"3x3, taken apart", {1, 70, 8, 23, 0, 0, 3, 3, one, {3, 1, 2, 0, 1, 1, 2, 3}}, 17},
      {"2x3, dilated", {1, 19, 8, 9, 0, 0, 2, 3, one, {3, 1, 2, 0, 1, 1, 2, 3}}, 17},
      {"3x3, wider than one turning", {2, 21, 7, 70, 0, 0, 3, 3, one, {1, 1, 1, 1, 1, 1, 1, 1}}, 30},
      {"3x3, each picture once for every group of panels",
       {1, 65, 9, 9, 0, 0, 3, 3, one, {1, 1, 1, 1, 1, 1, 1, 1}},
       512},
      {"3x3 at stride 3, in planes of several units", {1, 2, 90, 100, 0, 0, 3, 3, one, {3, 3, 1, 1, 1, 1, 1, 1}}, 3},
      {"3x3, over so many pixels that a weight's gradient is a sum of sums",
       {1, 19, 71, 61, 0, 0, 3, 3, one, {1, 1, 1, 1, 1, 1, 1, 1}},
       5},
      {"one channel", {3, 1, 5, 1, 0, 0, 3, 3, one, {1, 1, 1, 1, 1, 1, 1, 1}}, 1},
  };
  int wrong = 0;
  for (Problem& problem : problems) {
    problem.shape.set_output_size();
    const bool there = forward(problem, Rows::kWhereTheyLie) && forward(problem, Rows::kTurned) &&
                       forward(problem, Rows::kWithPrologue) && planes(problem, false) && planes(problem, true) &&
                       fused_planes(problem, false) && fused_planes(problem, true);
    const bool back = backward(problem) && weight_gradient(problem);
    std::printf("%s: forward %s, backward %s\n", problem.name, there ? "right" : "WRONG", back ? "right" : "WRONG");
    wrong += !there + !back;
  }
  return wrong;
}
