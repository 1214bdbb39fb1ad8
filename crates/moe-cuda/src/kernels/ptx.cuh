// Instructions that CUDA C++ has no name for: barriers of asynchronous copies, the copy engine, tensor cores.
#pragma once
#include "common.cuh"

// A tensor map as the driver makes it.
struct alignas(128) TensorMap {
  u8 bytes[128];
};

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// ---- mbarriers: without qualifiers beyond .cta, which would put fences into the loops -------------
__device__ __forceinline__ void barrier_init(u32 barrier, u32 count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count));
}
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void barrier_expect(u32 barrier, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_arrive(u32 barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_wait(u32 barrier, u32 phase) {
  asm volatile("{ .reg .pred p; L0: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @p bra L1; bra L0; L1: }" ::"r"(barrier), "r"(phase) : "memory");
}

// ---- kernels that begin while the one before them ends (Function::launch_early) ------------------------
// Until everything before is done, and seen. Its own end must not come sooner: whoever waits for it relies on that.
__device__ __forceinline__ void wait_for_step_before() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next one may begin when all blocks have come here.
__device__ __forceinline__ void let_next_step_begin() { asm volatile("griddepcontrol.launch_dependents;"); }

// ---- the copy engine ----------------------------------------------------------------------------
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier) : "memory");
}
__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, u32 barrier, u32 column, u32 row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row) : "memory");
}
// The same of what is read once: the first to leave the card's cache.
__device__ __forceinline__ u64 read_once() {
  u64 policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}
__device__ __forceinline__ void copy_bytes(u32 to, const void* from, u32 bytes, u32 barrier, u64 policy) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(barrier), "l"(policy) : "memory");
}
__device__ __forceinline__ void copy_tile(u32 to, const TensorMap* map, u32 barrier, u32 column, u32 row, u64 policy) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1, {%3, %4}], [%2], %5;" ::"r"(to), "l"(map), "r"(barrier), "r"(column), "r"(row), "l"(policy) : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap* map) { asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory"); }

// ---- memory -------------------------------------------------------------------------------------
__device__ __forceinline__ uint4 load_shared16(u32 a) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(a));
  return v;
}
__device__ __forceinline__ uint2 load_shared8(u32 a) {
  uint2 v;
  asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(a));
  return v;
}
__device__ __forceinline__ u32 load_shared4(u32 a) {
  u32 v;
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(a));
  return v;
}
// volatile: stays where it is put, ahead of its use
__device__ __forceinline__ uint4 load_global16(const void* p) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
  return v;
}
__device__ __forceinline__ float load_global4(const float* p) {
  float v;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(v) : "l"(p));
  return v;
}
__device__ __forceinline__ uint4 load_global16_if(const void* p, bool wanted) {
  uint4 v;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %5, 0; mov.u32 %0, 0; mov.u32 %1, 0; mov.u32 %2, 0; mov.u32 %3, 0; @p ld.global.v4.u32 {%0,%1,%2,%3}, [%4]; }" : "=&r"(v.x), "=&r"(v.y), "=&r"(v.z), "=&r"(v.w) : "l"(p), "r"((u32)wanted));
  return v;
}
// What other blocks have written; or 0.
__device__ __forceinline__ float load_fresh_if(const float* p, bool wanted) {
  float v;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.f32 %0, 0f00000000; @p ld.global.cg.f32 %0, [%1]; }" : "=&f"(v) : "l"(p), "r"((u32)wanted));
  return v;
}
// Into the card's cache.
__device__ __forceinline__ void prefetch(const void* p) { asm volatile("prefetch.global.L2 [%0];" ::"l"(p)); }
// *p, or 0; without a branch, which would end the asynchrony of the products around it
__device__ __forceinline__ float load_if(const float* p, bool wanted) {
  float v;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.f32 %0, 0f00000000; @p ld.global.nc.f32 %0, [%1]; }" : "=f"(v) : "l"(p), "r"((u32)wanted));
  return v;
}
__device__ __forceinline__ u32 load_acquire(const u32* p) {
  u32 v;
  asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
// A word that tells itself: nothing else is known to have been written before it.
__device__ __forceinline__ void tell(u32* p, u32 v) { asm volatile("st.relaxed.gpu.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory"); }
// Such a word; or 0.
__device__ __forceinline__ u32 listen_if(const u32* p, bool wanted) {
  u32 v;
  asm volatile("{ .reg .pred p; setp.ne.u32 p, %2, 0; mov.u32 %0, 0; @p ld.relaxed.gpu.global.u32 %0, [%1]; }" : "=&r"(v) : "l"(p), "r"((u32)wanted));
  return v;
}
__device__ __forceinline__ void add_release(u32* p) { asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(p) : "memory"); }

// ---- tensor cores of a warp: c += a (16 x 16, weights) * b (16 x 8, rows), bf16 ---------------------
__device__ __forceinline__ void mma(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// The same, of f16.
__device__ __forceinline__ void mma_f16(float (&c)[4], u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// ---- E4M3 of groups of 128, four values in each lane of a warp --------------------------------------
// Their scale: the largest magnitude over 448. NaN and infinities take their group along.
// Of the bits of the largest magnitude.
__device__ __forceinline__ float e4m3_scale_of(u32 most) {
  return most >= 0x7f800000u ? __uint_as_float(0x7fc00000u) : __fdiv_rn(fmaxf(__uint_as_float(most), 1e-10f), 448.f);
}
__device__ __forceinline__ float e4m3_scale(const float (&v)[4]) {
  u32 most = 0;
#pragma unroll
  for (int c = 0; c < 4; c++) {
    u32 bits = __float_as_uint(v[c]) & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  return e4m3_scale_of(__reduce_max_sync(~0u, most));
}
// v[0] in the lowest byte
__device__ __forceinline__ u32 e4m3x4(const float (&v)[4]) {
  u16 low, high;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(low) : "f"(v[1]), "f"(v[0]));
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(high) : "f"(v[3]), "f"(v[2]));
  return low | (u32)high << 16;
}
// Four codes as f16, exactly.
__device__ __forceinline__ uint2 e4m3x4_to_f16(u32 codes) {
  u32 low, high;
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(low) : "h"((u16)codes));
  asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(high) : "h"((u16)(codes >> 16)));
  return make_uint2(low, high);
}
__device__ __forceinline__ u32 to_e4m3x4(const float (&v)[4], float scale) {
  float q[4];
#pragma unroll
  for (int c = 0; c < 4; c++) q[c] = __fdiv_rn(v[c], scale);
  return e4m3x4(q);
}

// ---- codes of four bits in pairs ----------------------------------------------------------------
// a & mask | c
__device__ __forceinline__ u32 and_or(u32 a, u32 mask, u32 c) {
  u32 r;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(a), "r"(mask), "r"(c));
  return r;
}
__device__ __forceinline__ u32 times_bf16x2(u32 a, u32 b) {
  u32 r;
  asm("mul.rn.bf16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}
