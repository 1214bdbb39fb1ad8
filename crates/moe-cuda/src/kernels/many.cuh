// What the products of the routed experts for many tokens share: bf16 (many.cu) and FP8 (many8.cu).
#pragma once
#include "wgmma.cuh"

#define BM 128    // rows of a tile
#define BN 256    // rows of weights of a tile
#define STAGES 4  // of A_BYTES of rows and B_BYTES of weights
#define A_BYTES (BM * 128)
#define B_BYTES (BN * 128)
#define STEP (SECOND ? BN : BN / 2)         // features of a tile
#define SCALED (FORMAT == 0 ? 256 : 128)    // features of an output that share a scale
#define GROUP 16                            // row tiles that share weights while those are in the cache

struct Many {
  const u32 *offsets, *order;
  const uint2* tiles;
  const u32* tile_count;
  const float* row_scales;           // FP8: [sorted rows, k / 128]
  const float *scales_a, *scales_b;  // FP8: [experts, features / 128, k / 128] of gate and up, or down
  const float *bias_a, *bias_b;      // or null
  u16* out;           // first: [sorted rows, features], bf16 or codes; second: [slots, features], of out_scales
  float* out_scales;  // first: of FP8, [sorted rows, features / 128]; second: [slots, features / SCALED]
  // second, where not null: the outputs of each `home_slots` slots go to an address of their own, scales behind that
  const u64* homes;
  u64 home_scales;
  u32 home_slots;
  u32 features, k;        // features: of gate alone in the first product
  u32 rows_a, rows_b;     // rows from one expert to the next in the tensor maps
  u32 scale_step;         // scales from one expert to the next
  Activation activation;
};

__device__ __forceinline__ float max_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
// Nothing that uses the sums is moved across this.
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int j = 0; j < N; j++) asm volatile("" : "+f"(d[j])::"memory");
}

// A matrix of four words in each of four neighbouring lanes, transposed: word i of lane l was word l of lane i.
__device__ __forceinline__ void transpose4(u32 (&w)[4], u32 lane) {
  bool one = lane & 1, two = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    u32 other = __shfl_xor_sync(~0u, one ? w[i] : w[i + 1], 1);
    w[i] = one ? other : w[i], w[i + 1] = one ? w[i + 1] : other;
  }
#pragma unroll
  for (int i = 0; i < 2; i++) {
    u32 other = __shfl_xor_sync(~0u, two ? w[i] : w[i + 2], 2);
    w[i] = two ? other : w[i], w[i + 2] = two ? w[i + 2] : other;
  }
}
