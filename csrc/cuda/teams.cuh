// A team of CTAs on a GPU, for the interpreter. Numbers pass between CTAs through the second-level cache; kinds of team
// differ in how their CTAs meet, which is decided at launch:
//   kCtaTeam      alone: __syncthreads
//   kClusterTeam  the hardware's cluster barrier (from compute_90 on). CTAs of a cluster are scheduled together, and
//                 threads that exit count as arrived; for a partner that never comes it would wait for ever
//   kGridTeam     a counter in memory. Its CTAs must all be resident (cooperative launch); a partner that does not come
//                 within `patience` is reported, and everybody leaves
// Every team has a pulse, by which the host sees that it stands still (wait.h).
#pragma once
#include "ladder.h"
#include "lowered.h"
#include "warp.h"

namespace fastgen::team {

FG_D uint32_t load_relaxed(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.gpu.global.u32 %0,[%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}

FG_D uint64_t nanoseconds() {
  uint64_t t;
  asm volatile("mov.u64 %0,%%globaltimer;" : "=l"(t));
  return t;
}

class DeviceTeam {
 public:
  FG_D DeviceTeam(const Launch& a, TeamKind kind, int ctas) : a_(a), kind_(kind), size_(ctas) { beat(1); }
  FG_D void leave() const { beat(kPulseOver); }

  FG_D int index() const { return blockIdx.x / size_; }
  FG_D int rank() const { return blockIdx.x % size_; }
  FG_D int size() const { return size_; }
  FG_D int warp() const { return threadIdx.x / kLanes; }
  FG_D int warps() const { return blockDim.x / kLanes; }
  FG_D int lane() const { return threadIdx.x % kLanes; }
  FG_D char* shared() const {
    extern __shared__ __align__(16) char memory[];
    return memory;
  }
  // A barrier stands before every step, and releasing it waits for what the draw stored: one word more is free.
  FG_D void at(int64_t step, int32_t op) {
    if (step != step_) beat(static_cast<uint32_t>(step) + 1);
    step_ = step, op_ = op;
  }

  FG_D void sync_warp() const { __syncwarp(); }
  FG_D void sync_cta() const { __syncthreads(); }
  FG_D bool sync() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
    if (kind_ == kClusterTeam) {
      asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
      return true;
    }
#endif
    if (kind_ == kGridTeam) return meet_in_memory();
    __syncthreads();
    return true;
  }

  FG_D uint32_t peek(const uint32_t* word) const { return *static_cast<const volatile uint32_t*>(word); }
  FG_D void post(uint32_t* word, uint32_t value) const { *static_cast<volatile uint32_t*>(word) = value; }
  FG_D void post_to_host(uint32_t* word, uint32_t value) const {
    __threadfence_system();
    post(word, value);
  }

 private:
  FG_D void beat(uint32_t pulse) const {
    if (threadIdx.x == 0 && rank() == 0) post(a_.pulse + index(), pulse);
  }

  FG_D bool meet_in_memory() {
    __syncthreads();
    int lost = 0;
    if (threadIdx.x == 0) {
      uint32_t* counter = a_.barrier + index() * kBarrierWords;
      goal_ += size_;
      asm volatile("red.release.gpu.global.add.u32 [%0],1;" ::"l"(counter) : "memory");
      const uint64_t start = nanoseconds();
      for (int look = 1; static_cast<int32_t>(load_relaxed(counter) - goal_) < 0; ++look) {
        if (look % 64 != 0) continue;
        lost = peek(&a_.fault->code) != kNoFault ? 1 : nanoseconds() - start > a_.patience ? report() : 0;
        if (lost != 0) break;
      }
      asm volatile("fence.acq_rel.gpu;" ::: "memory");
    }
    return __syncthreads_or(lost) == 0;
  }

  FG_D int report() const {
    if (atomicCAS(&a_.fault->code, static_cast<uint32_t>(kNoFault), static_cast<uint32_t>(kLostPartner)) == kNoFault)
      a_.fault->team = index(), a_.fault->rank = rank(), a_.fault->op = op_, a_.fault->step = step_;
    return 1;
  }

  const Launch& a_;
  const TeamKind kind_;
  const int size_;
  uint32_t goal_ = 0;
  int64_t step_ = 0;
  int32_t op_ = -1;
};

}  // namespace fastgen::team
