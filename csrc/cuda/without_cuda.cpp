// In place of launch.cu where there was no nvcc: every call for a device is refused by its name.
#include "launch.h"

namespace fastgen::team {
namespace {

[[noreturn]] void refuse(const std::string& call) {
  throw CudaError(call + ": this extension was built without CUDA (no nvcc that works, or FASTGEN_CUDA=OFF)");
}

}  // namespace

const bool kHasCuda = false;

Device device_info(int) { refuse("cuda_device"); }

Limits device_limits(int, Precision, int32_t) { refuse("cuda_limits"); }

bool is_capturing(int, uint64_t) { refuse("is_capturing"); }

int64_t run_on_device(Launch, const CudaRun&, const Progress&) { refuse("run_on_device"); }

}  // namespace fastgen::team
