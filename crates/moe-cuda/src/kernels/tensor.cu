// What the tensor cores of a Hopper can do at most, on numbers that are not zeros: two warp groups a block
// multiply what lies in shared memory, four steps of 32 bytes a round.
#include "wgmma.cuh"

#define ROWS_B (FORMAT == 0 ? 256 : 128)

extern "C" __global__ void __launch_bounds__(256) tensor_peak(u32 rounds, float* out) {
  extern __shared__ u8 memory[];
  u32 base = (shared_address(memory) + 1023) & ~1023u, seed = threadIdx.x * 2654435769u + 1;
  u32 a = base, b = base + 2 * 64 * 128;
  // about one: signs and mantissas at random
  for (u32 i = threadIdx.x; i < (2 * 64 + ROWS_B) * 128 / 4; i += blockDim.x) {
    seed = seed * 1664525u + 1013904223u;
    u32 word = FORMAT == 0 ? 0x3f003f00u | (seed & 0x80ff80ffu) : 0x30303030u | (seed & 0x8f8f8f8fu);
    asm volatile("st.shared.u32 [%0], %1;" ::"r"(base + 4 * i), "r"(word) : "memory");
  }
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  a += threadIdx.x / 128 * 64 * 128;
  float d[ROWS_B / 2];
#pragma unroll
  for (int i = 0; i < ROWS_B / 2; i++) d[i] = 0;
  for (u32 r = 0; r < rounds; r++) {
    wgmma_begin();
#pragma unroll
    for (int j = 0; j < 4; j++) wgmma(d, descriptor(a + j * 32), descriptor(b + j * 32), 1);
    wgmma_commit();
    wgmma_wait<1>();
  }
  wgmma_wait<0>();
  float sum = 0;
#pragma unroll
  for (int i = 0; i < ROWS_B / 2; i++) sum += d[i];
  if (sum == 1.2345f) *out = sum;
}
