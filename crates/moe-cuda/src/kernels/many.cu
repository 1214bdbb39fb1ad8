// Both products of the routed experts for many tokens, in bf16: grouped, persistent, on Hopper's warp-group tensor
// cores. One warp group fills a ring of stages by the copy engine, two multiply 64 rows each.
//
// Rows come sorted by expert (sorted.cu), so a tile's rows stand beside each other; what a tile reads beyond
// its expert's last row belongs to another expert and is not stored. The first product has gate and up rows
// in one tile, so that the activation is local to a thread. K ascends in one order for every element.
#include "many.cuh"

#define BK 64  // columns of a stage: 128 bytes
#define HALF (BN / 2)

// The row tile and the feature tile of piece `i` of the work.
struct Piece {
  u32 expert, first, rows, feature;
};
__device__ __forceinline__ Piece piece(const Many& p, u32 i, u32 row_tiles, u32 feature_tiles) {
  u32 in_group = GROUP * feature_tiles, g = i / in_group, first = g * GROUP;
  u32 size = row_tiles - first < GROUP ? row_tiles - first : GROUP, rest = i - g * in_group;
  uint2 tile = p.tiles[first + rest % size];
  u32 rows = p.offsets[tile.x + 1] - tile.y;
  return {tile.x, tile.y, rows < BM ? rows : BM, rest / size * STEP};
}

extern "C" __global__ void __launch_bounds__(384, 1) many(const __grid_constant__ Many p, const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second) {
  extern __shared__ __align__(1024) u8 memory[];
  u32 a_tiles = shared_address(memory), b_tiles = a_tiles + STAGES * A_BYTES, full = b_tiles + STAGES * B_BYTES, empty = full + 8 * STAGES;
  u32 team = threadIdx.x / 128, tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 2);
    barrier_init_done();
  }
  __syncthreads();
  const u32 row_tiles = *p.tile_count, feature_tiles = (p.features + STEP - 1) / STEP;
  const u32 pieces = row_tiles * feature_tiles, stages = (p.k + BK - 1) / BK;
  if (team == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (tid == 0) {
      u32 stage = 0, phase = 0;
      for (u32 i = blockIdx.x; i < pieces; i += gridDim.x) {
        Piece t = piece(p, i, row_tiles, feature_tiles);
        u32 a = t.expert * p.rows_a + t.feature, b = SECOND ? a + HALF : t.expert * p.rows_b + t.feature;
        for (u32 k = 0; k < stages; k++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          u32 barrier = full + 8 * stage, to = b_tiles + stage * B_BYTES;
          barrier_expect(barrier, A_BYTES + B_BYTES);
          copy_tile(a_tiles + stage * A_BYTES, &rows, barrier, k * BK, t.first);
          copy_tile(to, &first, barrier, k * BK, a);
          copy_tile(to + B_BYTES / 2, &second, barrier, k * BK, b);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
  } else {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    u32 half = team - 1, lane = tid % 32, row = half * 64 + tid / 32 * 16 + lane / 4, stage = 0, phase = 0;
    float d[BN / 2];
    for (u32 i = blockIdx.x; i < pieces; i += gridDim.x) {
      Piece t = piece(p, i, row_tiles, feature_tiles);
      // sums begin with the biases. d[4 j + c]: feature 8 j + lane % 4 * 2 + c % 2, row + c / 2 * 8
#pragma unroll
      for (int j = 0; j < BN / 8; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          const float* bias = !SECOND && j >= BN / 16 ? p.bias_b : p.bias_a;
          u32 f = t.feature + 8 * (SECOND ? j : j % (BN / 16)) + lane % 4 * 2 + c;
          d[4 * j + c] = d[4 * j + 2 + c] = load_if(bias + (u64)t.expert * p.features + f, bias && f < p.features);
        }
      pin(d);
      u32 before = STAGES;
      for (u32 k = 0; k < stages; k++) {
        barrier_wait(full + 8 * stage, phase);
        u32 a = a_tiles + stage * A_BYTES + half * 64 * 128, b = b_tiles + stage * B_BYTES;
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(d, descriptor(a + j * 32), descriptor(b + j * 32), 1);
        wgmma_commit();
        wgmma_wait<1>();
        if (before < STAGES && tid == 0) barrier_arrive(empty + 8 * before);
        before = stage;
        if (++stage == STAGES) stage = 0, phase ^= 1;
      }
      wgmma_wait<0>();
      pin(d);
      if (tid == 0) barrier_arrive(empty + 8 * before);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (SECOND) pin(d);  // or registers run out
        u32 r = row + h * 8, position = t.first + r;
        bool valid = r < t.rows;
        u64 target = SECOND && valid ? p.order[position] : position;
        u16* out = p.out;
        float* out_scales = p.out_scales;
        if (SECOND && p.homes && valid) {
          u32 home = (u32)target / p.home_slots;
          target -= home * p.home_slots;
          out = (u16*)p.homes[home], out_scales = (float*)(p.homes[home] + p.home_scales);
        }
        out += target * p.features;
        if constexpr (SECOND) {
          float most = 0;  // NaN stays
#pragma unroll
          for (int j = 0; j < BN / 8; j++)
#pragma unroll
            for (int c = 0; c < 2; c++)
              // what lies beyond the features is another expert's, and counts for nothing
              most = max_nan(most, t.feature + 8 * j < p.features ? fabsf(d[4 * j + 2 * h + c]) : 0.f);
          most = max_nan(most, __shfl_xor_sync(~0u, most, 1));
          most = max_nan(most, __shfl_xor_sync(~0u, most, 2));
          float scale = finite(most) ? most * (1.f / 32767.f) : __uint_as_float(0x7fc00000u);
          float inverse = scale > 0.f ? __fdiv_rn(32767.f, most) : 0.f;
          if (valid && t.feature < p.features && lane % 4 == 0) out_scales[target * feature_tiles + t.feature / BN] = scale;
          // pieces of 16 bytes, for memory that may be another GPU's
#pragma unroll
          for (int m = 0; m < BN / 32; m++) {
            u32 w[4];
#pragma unroll
            for (int i = 0; i < 4; i++) {
              int j = 4 * m + i;
              // 1.5 * 2^23 more: an integer in the low bits, rounded by the addition
              u32 q0 = __float_as_uint(fmaf(d[4 * j + 2 * h], inverse, 12582912.f)), q1 = __float_as_uint(fmaf(d[4 * j + 2 * h + 1], inverse, 12582912.f));
              w[i] = __byte_perm(q0, q1, 0x5410);
            }
            transpose4(w, lane);
            u32 f = t.feature + 8 * (4 * m + lane % 4);
            if (valid && f < p.features) *(uint4*)(out + f) = make_uint4(w[0], w[1], w[2], w[3]);
          }
        } else {
          Activation activation = p.activation;
          activation.kind = ACTIVATION, activation.gated = 1;
#pragma unroll
          for (int j = 0; j < BN / 16; j++) {
            u32 f = t.feature + 8 * j + lane % 4 * 2;
            if (!valid || f >= p.features) break;
            float v[2];
#pragma unroll
            for (int c = 0; c < 2; c++) {
              float g = d[4 * j + 2 * h + c], u = d[BN / 4 + 4 * j + 2 * h + c];
              v[c] = activate_16(activation, g, u);
            }
            *(u32*)(out + f) = f32x2_to_bf16x2(v[0], v[1]);
          }
        }
      }
    }
  }
}
