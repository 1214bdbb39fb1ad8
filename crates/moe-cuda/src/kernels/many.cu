// Both products of the routed experts for many tokens: grouped, persistent, on Hopper's warp-group tensor
// cores. One warp group fills a ring of tiles by the copy engine, two multiply 64 rows each.
//
// Rows come sorted by expert (gather), so a tile's rows stand beside each other; what a tile reads beyond
// its expert's last row belongs to another expert and is not stored. The first product has gate and up rows
// in one tile, so that the activation is local to a thread. K ascends in one order for every element.
//
// FORMAT 0: bf16. FORMAT 1: E4M3 by E4M3, in clusters of two blocks that each load half of the rows for
// both; every 128 columns the sums are multiplied by the scales of rows (one a row and 128 columns) and
// weights (128 x 128), and added up in f32: the tensor cores alone add with some 13 bits.
#include "wgmma.cuh"

#define BM 128
#if FORMAT == 0
#define BN 256   // features of a tile
#define BK 64    // columns of a stage: 128 bytes
#define STAGES 4
#define CLUSTER 1
#else
#define BN 128
#define BK 128
#define STAGES 6
#define CLUSTER 2  // blocks that take neighbouring features of the same rows, and share the loads of those
#endif
#define HALF (BN / 2)
#define A_BYTES (BM * 128)
#define B_BYTES (BN * 128)
#define GROUP 16  // row tiles that share weights while those are in the cache

struct Many {
  const u32 *offsets, *order;
  const uint2* tiles;
  const u32* tile_count;
  const float* row_scales;           // FP8: [sorted rows, k / 128]
  const float *scales_a, *scales_b;  // FP8: [experts, features / 128, k / 128] of gate and up, or down
  const float *bias_a, *bias_b;      // or null
  u16* out;           // first: [sorted rows, features], bf16, or f32 in FP8; second: [slots, features], of out_scales
  float* out_scales;  // second: [slots, features / BN]
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

// The row tile and the feature tile of piece `i` of the work.
struct Piece {
  u32 expert, first, rows, feature;
};
__device__ __forceinline__ Piece piece(const Many& p, u32 i, u32 row_tiles, u32 pairs, u32 rank) {
  u32 in_group = GROUP * pairs, g = i / in_group, first = g * GROUP;
  u32 size = row_tiles - first < GROUP ? row_tiles - first : GROUP, rest = i - g * in_group;
  uint2 tile = p.tiles[first + rest % size];
  u32 rows = p.offsets[tile.x + 1] - tile.y;
  return {tile.x, tile.y, rows < BM ? rows : BM, (rest / size * CLUSTER + rank) * (SECOND ? BN : HALF)};
}

extern "C" __global__ void __launch_bounds__(384, 1)
#if CLUSTER > 1
    __cluster_dims__(CLUSTER, 1, 1)
#endif
    many(const __grid_constant__ Many p, const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second) {
  extern __shared__ __align__(1024) u8 memory[];
  u32 a_tiles = shared_address(memory), b_tiles = a_tiles + STAGES * A_BYTES, full = b_tiles + STAGES * B_BYTES, empty = full + 8 * STAGES;
  u32 team = threadIdx.x / 128, tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 2 * CLUSTER);
    barrier_init_done();
  }
  __syncthreads();
  if constexpr (CLUSTER > 1) cluster_sync();
  const u32 row_tiles = *p.tile_count, step = SECOND ? BN : HALF, feature_tiles = (p.features + step - 1) / step;
  const u32 rank = CLUSTER > 1 ? cluster_rank() : 0, pairs = (feature_tiles + CLUSTER - 1) / CLUSTER;
  const u32 pieces = row_tiles * pairs, stages = (p.k + BK - 1) / BK;
  if (team == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (tid == 0) {
      u32 stage = 0, phase = 0;
      for (u32 i = blockIdx.x / CLUSTER; i < pieces; i += gridDim.x / CLUSTER) {
        Piece t = piece(p, i, row_tiles, pairs, rank);
        u32 a = t.expert * p.rows_a + t.feature, b = SECOND ? a + HALF : t.expert * p.rows_b + t.feature;
        for (u32 k = 0; k < stages; k++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          u32 barrier = full + 8 * stage, to = b_tiles + stage * B_BYTES;
          barrier_expect(barrier, A_BYTES + B_BYTES);
          if constexpr (CLUSTER == 1) copy_tile(a_tiles + stage * A_BYTES, &rows, barrier, k * BK, t.first);
          else copy_tile_to(a_tiles + stage * A_BYTES + rank * (A_BYTES / CLUSTER), &rows, barrier, k * BK, t.first + rank * (BM / CLUSTER), (1 << CLUSTER) - 1);
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
    for (u32 i = blockIdx.x / CLUSTER; i < pieces; i += gridDim.x / CLUSTER) {
      Piece t = piece(p, i, row_tiles, pairs, rank);
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
#if FORMAT == 0
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
#else
      // rows beyond the tile's have scales of others, or none
      u32 last = t.rows - 1, r0 = row < last ? row : last, r1 = row + 8 < last ? row + 8 : last;
      u32 s0 = (t.first + r0) * stages, s1 = (t.first + r1) * stages;
      u32 w = t.expert * p.scale_step + (t.feature < p.features ? t.feature : p.features - 1) / 128 * stages;
      u32 released = stage;
      auto multiply = [&](float(&part)[BN / 2]) {
        barrier_wait(full + 8 * stage, phase);
        u32 a = a_tiles + stage * A_BYTES + half * 64 * 128, b = b_tiles + stage * B_BYTES;
        pin(part);
        wgmma_begin();
#pragma unroll
        for (int j = 0; j < 4; j++) wgmma(part, descriptor(a + j * 32), descriptor(b + j * 32), j != 0);
        wgmma_commit();
        if (++stage == STAGES) stage = 0, phase ^= 1;
      };
      // while one part is added up, the tensor cores work on the other
      auto scales = [&](u32 k) { return make_float4(p.row_scales[s0 + k], p.row_scales[s1 + k], p.scales_a[w + k], SECOND ? 0.f : p.scales_b[w + k]); };
      auto add = [&](float(&part)[BN / 2], float4 s) {
        pin(part);
        if (tid < CLUSTER) barrier_arrive_at(empty + 8 * released, tid);
        if (++released == STAGES) released = 0;
        float a0 = s.x * s.z, a1 = s.y * s.z, b0 = SECOND ? a0 : s.x * s.w, b1 = SECOND ? a1 : s.y * s.w;
#pragma unroll
        for (int j = 0; j < BN / 2; j++) d[j] = fmaf(part[j], j < BN / 4 ? (j & 2 ? a1 : a0) : (j & 2 ? b1 : b0), d[j]);
      };
      float even[BN / 2], odd[BN / 2];
      float4 now = scales(0);
      multiply(even);
      u32 k = 0;
      for (; k + 2 < stages; k += 2) {
        float4 next = scales(k + 1);
        multiply(odd);
        wgmma_wait<1>();
        add(even, now);
        now = scales(k + 2);
        multiply(even);
        wgmma_wait<1>();
        add(odd, next);
      }
      if (k + 1 < stages) {
        float4 next = scales(k + 1);
        multiply(odd);
        wgmma_wait<1>();
        add(even, now);
        wgmma_wait<0>();
        add(odd, next);
      } else {
        wgmma_wait<0>();
        add(even, now);
      }
#endif
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
            // what is quantised next is not rounded before
            if constexpr (FORMAT == 1) *(float2*)((float*)p.out + target * p.features + f) = make_float2(v[0], v[1]);
            else *(u32*)(out + f) = f32x2_to_bf16x2(v[0], v[1]);
          }
        }
      }
    }
  }
  if constexpr (CLUSTER > 1) cluster_sync();  // nobody leaves while others may still arrive at his barriers
}

// Rows by sorted position: to[i] = x[order[i] / top_k], of `pieces` times 16 bytes.
extern "C" __global__ void gather(const uint4* x, u64 stride, const u32* order, const u32* offsets, u32 experts, u32 top_k, u32 pieces, uint4* to) {
  u32 i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (i >= offsets[experts]) return;
  const uint4* from = x + (u64)(order[i] / top_k) * stride;
  for (u32 c = lane; c < pieces; c += 32) to[(u64)i * pieces + c] = from[c];
}

// As gather, quantised to E4M3 with one scale for 128 columns; where `order` is null x is f32, and sorted
// already. One warp a row; four columns a lane and turn.
extern "C" __global__ void gather_fp8(const void* x, u64 stride, const u32* order, const u32* offsets, u32 experts, u32 top_k, u32 cols, u32* codes, float* scales) {
  u32 i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (i >= offsets[experts]) return;
  const uint2* from = (const uint2*)((const u16*)x + (u64)(order ? order[i] / top_k : i) * stride);
  const float4* sorted = (const float4*)((const float*)x + (u64)i * stride);
#pragma unroll 4
  for (u32 g = 0; g < cols / 128; g++) {
    float f[4];
    if (order) {
      uint2 v = from[g * 32 + lane];
      f[0] = bf16_to_f32(v.x & 0xffff), f[1] = bf16_to_f32(v.x >> 16), f[2] = bf16_to_f32(v.y & 0xffff), f[3] = bf16_to_f32(v.y >> 16);
    } else {
      float4 v = sorted[g * 32 + lane];
      f[0] = v.x, f[1] = v.y, f[2] = v.z, f[3] = v.w;
    }
    float scale = e4m3_scale(f);
    codes[((u64)i * cols + g * 128) / 4 + lane] = to_e4m3x4(f, scale);
    if (lane == 0) scales[(u64)i * (cols / 128) + g] = scale;
  }
}

// out[t] = factor * sum over j of w[t, j] * y[t k + j], in slot order and f32, of the rows that the second product left.
// Slots whose id is no expert are left out; a sum that is not finite raises the fault. Eight columns a thread.
extern "C" __global__ void combine_slots(const uint4* y, const float* scales, const u32* ids, const float* weights, u32 experts, u32 top_k, float factor, Rows out, u32* fault) {
  u32 pieces = out.cols / 8, tiles = (out.cols + BN - 1) / BN;
  u64 n = (u64)out.rows * pieces;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 t = (u32)(i / pieces), piece = (u32)(i - (u64)t * pieces), tile = piece * 8 / BN;
    float sum[8] = {};
#pragma unroll 4
    for (u32 j = 0; j < top_k; j++) {
      u64 slot = (u64)t * top_k + j;
      if (ids[slot] >= experts) continue;
      float w = weights[slot], scale = scales[slot * tiles + tile];
      add_scaled(sum, w, scale, y[slot * pieces + piece]);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) {
      sum[k] *= factor;
      if (!finite(sum[k])) raise_fault(fault, FAULT_OUTPUT, t, piece * 8 + k, __float_as_uint(sum[k]));
    }
    if (out.type == F32) {
      float4* to = (float4*)((float*)out.data + t * out.stride + piece * 8);
      to[0] = make_float4(sum[0], sum[1], sum[2], sum[3]);
      to[1] = make_float4(sum[4], sum[5], sum[6], sum[7]);
      continue;
    }
    uint4 r = make_uint4(f32x2_to_bf16x2(sum[0], sum[1]), f32x2_to_bf16x2(sum[2], sum[3]), f32x2_to_bf16x2(sum[4], sum[5]), f32x2_to_bf16x2(sum[6], sum[7]));
    *(uint4*)((u16*)out.data + t * out.stride + piece * 8) = r;
  }
}
