// What kernels on rows share: sums over a block, the factor of a norm, the quantisation of a group.
#pragma once
#include "common.cuh"

// The sum over all threads of the block, the same in each.
__device__ __forceinline__ double block_sum(double v, double* part) {
  for (int o = 16; o; o >>= 1) v += __shfl_xor_sync(~0u, v, o);
  __syncthreads();
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = v;
  __syncthreads();
  v = 0;
  for (u32 i = 0; i < blockDim.x / 32; i++) v += part[i];
  return v;
}

// 1 / sqrt(mean(x^2) + eps) of a row; with `first` of x * weight in place of x. By the whole block.
__device__ __forceinline__ float rms_scale(const Rows& x, u32 row, const float* weight, float eps, u32 offset, u32 first, double* part) {
  double sum = 0;
  for (u32 c = threadIdx.x; c < x.cols; c += blockDim.x) {
    float v = load_float(x.data, x.type, (u64)row * x.stride + c);
    if (first && weight) v *= weight[c] + (offset ? 1.f : 0.f);
    sum += (double)v * v;
  }
  return (float)(1.0 / sqrt(block_sum(sum, part) / x.cols + (double)eps));
}

// Quantises and dequantises group `g` of row `r` in place, by one warp. (An integer is no negative zero: hence
// + 0.) kind 0: E4M3, 1: INT8 by given scale; 2: E4M3, 3: INT8 by the group's largest magnitude; 4: as 2 with the
// scale rounded up to a power of two; 5: as 2 for a whole row, whose scale is at least 1 / (448 * 512); 6: the
// same, at least the least normal number.
__device__ __forceinline__ void quantise_group(const Rows& x, u32 r, u32 g, u32 kind, u32 group, float given, u32 lane) {
  u32 begin = g * group, end = begin + group < x.cols ? begin + group : x.cols;
  u64 row = r * x.stride;
  bool int8 = kind == 1 || kind == 3;
  float scale = given;
  if (kind >= 2) {
    u32 most = 0;  // magnitudes order as their bits do, NaN above all
    for (u32 c = begin + lane; c < end; c += 32) {
      u32 bits = __float_as_uint(load_float(x.data, x.type, row + c)) & 0x7fffffffu;
      most = bits > most ? bits : most;
    }
    most = __reduce_max_sync(~0u, most);
    float amax = __uint_as_float(most);
    if (most >= 0x7f800000u) scale = __uint_as_float(0x7fc00000u);
    else if (kind == 5) scale = fmaxf(__fdiv_rn(amax, 448.f), 1.f / (448.f * 512.f));
    else if (kind == 6) scale = fmaxf(__fdiv_rn(amax, 448.f), __uint_as_float(0x00800000u));
    else scale = __fdiv_rn(fmaxf(amax, 1e-10f), int8 ? 127.f : 448.f);
    if (kind == 4 && scale == scale) {
      u32 bits = __float_as_uint(scale);
      scale = __uint_as_float((bits + 0x7fffffu) & 0x7f800000u);
    }
  }
  for (u32 c = begin + lane; c < end; c += 32) {
    float v = __fdiv_rn(load_float(x.data, x.type, row + c), scale);
    float q = int8 ? (v == v ? fminf(fmaxf(rintf(v), -128.f), 127.f) + 0.f : v) : round_e4m3(v);
    store_float(x.data, x.type, row + c, __fmul_rn(q, scale));
  }
}

// Columns k .. k + 8 of a row that begins at number `row`; 0 beyond it. `whole`: all such runs lie inside and
// are aligned to 16 bytes.
__device__ __forceinline__ void load8(const Rows& m, u64 row, u32 k, bool whole, float (&v)[8]) {
  if (!whole) {
#pragma unroll
    for (u32 i = 0; i < 8; i++) v[i] = k + i < m.cols ? load_float(m.data, m.type, row + k + i) : 0.f;
  } else if (m.type == F32) {
    const float4* from = (const float4*)((const float*)m.data + row + k);
    float4 a = from[0], b = from[1];
    v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
  } else {
    uint4 words = *(const uint4*)((const u16*)m.data + row + k);
    u32 w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (u32 i = 0; i < 4; i++) {
      v[2 * i] = m.type == F16 ? f16_to_f32((u16)w[i]) : bf16_to_f32(w[i] & 0xffff);
      v[2 * i + 1] = m.type == F16 ? f16_to_f32((u16)(w[i] >> 16)) : bf16_to_f32(w[i] >> 16);
    }
  }
}

// Sums of products of rows of x and of w that begin at these numbers, by one warp, the same in each lane. Lanes
// take runs of 8 columns in turn, and their sums are added in one order: an element does not depend on the rows
// and outputs beside it, nor on how many a warp takes.
template <int ROWS, int OUTPUTS>
__device__ __forceinline__ void dots(const Rows& x, const u64 (&rows)[ROWS], const Rows& w, const u64 (&outputs)[OUTPUTS], bool whole, u32 lane, float (&acc)[ROWS][OUTPUTS]) {
#pragma unroll
  for (u32 r = 0; r < ROWS; r++)
#pragma unroll
    for (u32 o = 0; o < OUTPUTS; o++) acc[r][o] = 0.f;
#pragma unroll(ROWS * OUTPUTS == 1 ? 8 : 1)
  for (u32 k = lane * 8; k < x.cols; k += 256) {
    float wv[OUTPUTS][8];
#pragma unroll
    for (u32 o = 0; o < OUTPUTS; o++) load8(w, outputs[o], k, whole, wv[o]);
#pragma unroll
    for (u32 r = 0; r < ROWS; r++) {
      float xv[8];
      load8(x, rows[r], k, whole, xv);
#pragma unroll
      for (u32 o = 0; o < OUTPUTS; o++)
#pragma unroll
        for (u32 i = 0; i < 8; i++) acc[r][o] = fmaf(xv[i], wv[o][i], acc[r][o]);
    }
  }
#pragma unroll
  for (u32 r = 0; r < ROWS; r++)
#pragma unroll
    for (u32 o = 0; o < OUTPUTS; o++)
#pragma unroll
      for (int d = 16; d; d >>= 1) acc[r][o] += __shfl_xor_sync(~0u, acc[r][o], d);
}
