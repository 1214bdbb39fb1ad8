// Before and after the products of the routed experts for many tokens (many.cu, many8.cu): rows by expert, and the sum
// over slots.
#include "ptx.cuh"

#define SCALED (FORMAT == 0 ? 256 : 128)  // features of an output that share a scale, as in many.cuh

// Rows by sorted position: block i has row i, or rows[i] where rows are named, for the positions places[i k ..], or i
// itself. FP8: quantised, with one scale for 128 columns; a warp has 128 columns, or pieces of 16 bytes.
extern "C" __global__ void sort_rows(const void* x, u64 stride, const u32* rows, const u32* places, const u32* offsets, u32 experts, u32 top_k, u32 cols, void* to, float* scales) {
  wait_for_step_before();
  let_next_step_begin();
  u32 i = blockIdx.x, lane = threadIdx.x & 31;
  if (rows && i >= offsets[experts]) return;
  const u16* from = (const u16*)x + (rows ? rows[i] : i) * stride;
  for (u32 j0 = 0; j0 < top_k; j0 += 32) {
    u32 many = top_k - j0 < 32 ? top_k - j0 : 32, place = lane >= many ? NO_EXPERT : rows ? i : places[i * top_k + j0 + lane];
    if (!__any_sync(~0u, place != NO_EXPERT)) continue;
#if FORMAT == 0
    for (u32 c = threadIdx.x; c - lane < cols / 8; c += blockDim.x) {
      bool inside = c < cols / 8;
      uint4 v = load_global16_if(from + c * 8, inside);
      for (u32 j = 0; j < many; j++) {
        u32 at = __shfl_sync(~0u, place, j);
        if (inside && at != NO_EXPERT) ((uint4*)to)[(u64)at * (cols / 8) + c] = v;
      }
    }
#else
    for (u32 g = threadIdx.x / 32; g < cols / 128; g += blockDim.x / 32) {
      uint2 v = ((const uint2*)from)[g * 32 + lane];
      float f[4] = {bf16_to_f32(v.x & 0xffff), bf16_to_f32(v.x >> 16), bf16_to_f32(v.y & 0xffff), bf16_to_f32(v.y >> 16)};
      float scale = e4m3_scale(f);
      u32 codes = to_e4m3x4(f, scale);
      for (u32 j = 0; j < many; j++) {
        u32 at = __shfl_sync(~0u, place, j);
        if (at == NO_EXPERT) continue;
        ((u32*)to)[(u64)at * (cols / 4) + g * 32 + lane] = codes;
        if (lane == 0) scales[(u64)at * (cols / 128) + g] = scale;
      }
    }
#endif
  }
}

// out[t] = factor * sum over j of w[t, j] * y[t k + j], in slot order and f32, of the rows that the second product left.
// Slots whose id is no expert are left out; a sum that is not finite raises the fault. Eight columns a thread.
extern "C" __global__ void combine_slots(const uint4* y, const float* scales, const u32* ids, const float* weights, u32 experts, u32 top_k, float factor, Rows out, u32* fault) {
  const u32 ahead = 4;  // slots whose loads are on the way at once
  u32 pieces = out.cols / 8, tiles = (out.cols + SCALED - 1) / SCALED;
  u64 n = (u64)out.rows * pieces;
  wait_for_step_before();
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 t = (u32)(i / pieces), piece = (u32)(i - (u64)t * pieces), tile = piece * 8 / SCALED;
    float sum[8] = {};
    for (u32 j = 0; j < top_k; j += ahead) {
      u32 id[ahead];
      float w[ahead], scale[ahead];
      uint4 v[ahead];
#pragma unroll
      for (u32 a = 0; a < ahead; a++) {
        u64 slot = (u64)t * top_k + (j + a < top_k ? j + a : j);
        id[a] = j + a < top_k ? ids[slot] : NO_EXPERT, w[a] = weights[slot];
        scale[a] = scales[slot * tiles + tile], v[a] = y[slot * pieces + piece];
      }
#pragma unroll
      for (u32 a = 0; a < ahead; a++)
        if (id[a] < experts) add_scaled(sum, w[a], scale[a], v[a]);
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
