#include "entry.h"
#include "separable/fprop.h"

using namespace xsep::cuda;

extern "C" {

int emulate_separable_fprop(const SeparableFpropParams* p, char* message, size_t bytes) {
  return guarded([&] { separable_fprop(*p, nullptr); }, message, bytes);
}

void emulate_plan_separable_fprop(const ConvShape* c, int c_out, int bytes, int aligned, const DeviceProperties* device,
                                  SeparablePlan* plan) {
  *plan = plan_separable_fprop(*c, c_out, bytes, aligned != 0, *device);
}

// A plan cut as the caller says, whether or not the planner would choose it; 0 where the kernel cannot count so far.
int emulate_cut_separable_fprop(const ConvShape* c, int c_out, int bytes, const int (*cut)[7], SeparablePlan* plan) {
  const auto [chunk_bytes, row_warps, columns, across_pictures, halos, keeps_w_pw, workers] = *cut;
  *plan = {};
  plan->chunk_bytes = chunk_bytes, plan->row_warps = row_warps, plan->tile_columns = columns;
  plan->group_rows = across_pictures != 0 ? c->n * c->p : c->p;
  if (!detail::complete_fused_plan(*plan, *c, c_out, bytes)) return 0;
  detail::lay_out_shared_memory(*plan, halos, keeps_w_pw != 0 ? plan->chunks : 2);
  plan->workers = workers;
  return 1;
}

int emulate_quotient(int i, int divisor) { return xsep::divisor_of(divisor).quotient(i); }

size_t emulate_sizeof_separable_fprop() { return sizeof(SeparableFpropParams); }
}
