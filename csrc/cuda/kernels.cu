// The entry points: one kernel for each precision.
#include "interpreter.h"
#include "kernels.h"
#include "teams.cuh"

namespace fastgen::team {
namespace {

template <Precision P>
__global__ void __launch_bounds__(kThreads, 1) run_program(const __grid_constant__ Launch a, TeamKind kind, int ctas) {
  DeviceTeam team(a, kind, ctas);
  Interpreter<P, DeviceTeam>(team, a).run();
  team.leave();
}

}  // namespace

const void* kernel_of(Precision precision) {
  switch (precision) {
    case kFloat32: return reinterpret_cast<const void*>(&run_program<kFloat32>);
    case kBfloat16: return reinterpret_cast<const void*>(&run_program<kBfloat16>);
    default: return reinterpret_cast<const void*>(&run_program<kFloat16>);
  }
}

}  // namespace fastgen::team
