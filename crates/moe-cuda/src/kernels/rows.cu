// Rows of numbers: conversion, normalisation, quantisation, sums. One pass over memory each.
#include "common.cuh"

// to = from. With a fault word, values that are not finite raise it.
extern "C" __global__ void convert(Rows from, Rows to, u32* fault) {
  u64 n = (u64)from.rows * from.cols;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 r = (u32)(i / from.cols), c = (u32)(i - (u64)r * from.cols);
    float v = load_float(from.data, from.type, r * from.stride + c);
    if (fault && !finite(v)) raise_fault(fault, FAULT_HIDDEN, r, c, __float_as_uint(v));
    store_float(to.data, to.type, r * to.stride + c, v);
  }
}

// One block a row: to = from / sqrt(mean(from^2) + eps) * (w or 1 + w) * factor; with `first` of
// from * w in place of from, and no weight after.
extern "C" __global__ void rms_norm(Rows from, Rows to, const float* weight, float eps, u32 offset, u32 first, float factor) {
  __shared__ double part[32];
  u32 r = blockIdx.x;
  double sum = 0;
  for (u32 c = threadIdx.x; c < from.cols; c += blockDim.x) {
    float v = load_float(from.data, from.type, r * from.stride + c);
    if (first && weight) v *= weight[c] + (offset ? 1.f : 0.f);
    sum += (double)v * v;
  }
  for (int o = 16; o; o >>= 1) sum += __shfl_xor_sync(~0u, sum, o);
  if ((threadIdx.x & 31) == 0) part[threadIdx.x >> 5] = sum;
  __syncthreads();
  sum = 0;
  for (u32 i = 0; i < blockDim.x / 32; i++) sum += part[i];
  float scale = (float)(1.0 / sqrt(sum / from.cols + (double)eps));
  for (u32 c = threadIdx.x; c < from.cols; c += blockDim.x) {
    float w = weight ? weight[c] + (offset ? 1.f : 0.f) : 1.f;
    float v = load_float(from.data, from.type, r * from.stride + c);
    store_float(to.data, to.type, r * to.stride + c, v * scale * w * factor);
  }
}

// One warp a group: quantises and dequantises in place. (An integer is no negative zero: hence + 0.) kind 0: E4M3, 1: INT8 by given scale; 2: E4M3,
// 3: INT8 by the group's largest magnitude; 4: as 2 with the scale rounded up to a power of two;
// 5: as 2 for a whole row, whose scale is at least 1 / (448 * 512).
extern "C" __global__ void quantise_rows(Rows x, u32 kind, u32 group, float given) {
  u32 groups = (x.cols + group - 1) / group, lane = threadIdx.x & 31;
  u64 i = ((u64)blockIdx.x * blockDim.x + threadIdx.x) >> 5;
  if (i >= (u64)x.rows * groups) return;
  u32 r = (u32)(i / groups), g = (u32)(i - (u64)r * groups);
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

// One warp for each (8 rows, output): logits = x * w^T (+ bias). Lanes stride over k, so the order of a
// sum does not depend on the rows beside it.
#define LINEAR_ROWS 8
extern "C" __global__ void linear(Rows x, Rows w, const float* bias, Rows out) {
  u32 lane = threadIdx.x & 31;
  u32 o = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5);
  if (o >= w.rows) return;
  for (u32 r0 = blockIdx.y * LINEAR_ROWS; r0 < x.rows; r0 += gridDim.y * LINEAR_ROWS) {
    float acc[LINEAR_ROWS] = {};
    u32 n = x.rows - r0 < LINEAR_ROWS ? x.rows - r0 : LINEAR_ROWS;
    for (u32 k = lane; k < x.cols; k += 32) {
      float wv = load_float(w.data, w.type, o * w.stride + k);
#pragma unroll
      for (u32 r = 0; r < LINEAR_ROWS; r++)
        if (r < n) acc[r] = fmaf(load_float(x.data, x.type, (r0 + r) * x.stride + k), wv, acc[r]);
    }
#pragma unroll
    for (u32 r = 0; r < LINEAR_ROWS; r++) {
      if (r >= n) break;
      float s = acc[r];
#pragma unroll
      for (int d = 16; d; d >>= 1) s += __shfl_xor_sync(~0u, s, d);
      if (lane == 0) store_float(out.data, out.type, (r0 + r) * out.stride + o, s + (bias ? bias[o] : 0.f));
    }
  }
}

// out[t] = scale * sum over j of w[t, j] * y[t k + j], in slot order, f32. Slots whose id is no expert
// are left out. A sum that is not finite raises the fault.
extern "C" __global__ void combine(Rows y, const u32* ids, const float* weights, u32 experts, u32 top_k, float scale, Rows out, u32* fault) {
  u64 n = (u64)out.rows * out.cols;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 t = (u32)(i / out.cols), c = (u32)(i - (u64)t * out.cols);
    float sum = 0;
    for (u32 j = 0; j < top_k; j++) {
      u64 slot = (u64)t * top_k + j;
      if (ids[slot] >= experts) continue;
      float v = load_float(y.data, y.type, slot * y.stride + c);
      sum = weights ? __fadd_rn(sum, __fmul_rn(weights[slot], v)) : __fadd_rn(sum, v);
    }
    sum *= scale;
    if (!finite(sum)) raise_fault(fault, FAULT_OUTPUT, t, c, __float_as_uint(sum));
    store_float(out.data, out.type, t * out.stride + c, sum);
  }
}

// y = a * y + b * f[row] * x; without f the factor is b.
extern "C" __global__ void scale_add(Rows y, Rows x, const float* by_row, float a, float b) {
  u64 n = (u64)y.rows * y.cols;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < n; i += (u64)gridDim.x * blockDim.x) {
    u32 r = (u32)(i / y.cols), c = (u32)(i - (u64)r * y.cols);
    float v = load_float(y.data, y.type, r * y.stride + c) * a;
    if (x.data) v = __fadd_rn(v, __fmul_rn(by_row ? b * by_row[r] : b, load_float(x.data, x.type, r * x.stride + c)));
    store_float(y.data, y.type, r * y.stride + c, v);
  }
}

// f[t] = sum of the weights of a token's choices that are no expert with weights: identity experts.
extern "C" __global__ void identity_weights(const u32* ids, const float* weights, u32 experts, u32 choices, u32 tokens, u32 top_k, float* out) {
  u32 t = blockIdx.x * blockDim.x + threadIdx.x;
  if (t >= tokens) return;
  float sum = 0;
  for (u32 j = 0; j < top_k; j++) {
    u32 id = ids[(u64)t * top_k + j];
    if (id >= experts && id < choices) sum += weights[(u64)t * top_k + j];
  }
  out[t] = sum;
}
