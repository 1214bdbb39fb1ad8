// What all kernels share: types, number formats, the fault word, activations. No header of CUDA's is
// included: NVRTC comes without any.
#pragma once
typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define NO_EXPERT 0xffffffffu
#define INFINITY_F __uint_as_float(0x7f800000u)

// ---- floats -------------------------------------------------------------------------------------
enum { F32 = 0, F16 = 1, BF16 = 2 };

__device__ __forceinline__ float bf16_to_f32(u32 bits) { return __uint_as_float(bits << 16); }
__device__ __forceinline__ u16 f32_to_bf16(float x) {
  u16 r;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
// `low` in bits 0..15
__device__ __forceinline__ u32 f32x2_to_bf16x2(float low, float high) {
  u32 r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
__device__ __forceinline__ float f16_to_f32(u16 bits) {
  float r;
  asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
  return r;
}
__device__ __forceinline__ u16 f32_to_f16(float x) {
  u16 r;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(x));
  return r;
}
__device__ __forceinline__ float load_float(const void* p, u32 type, u64 i) {
  if (type == F32) return ((const float*)p)[i];
  u16 bits = ((const u16*)p)[i];
  return type == F16 ? f16_to_f32(bits) : bf16_to_f32(bits);
}
__device__ __forceinline__ void store_float(void* p, u32 type, u64 i, float x) {
  if (type == F32) ((float*)p)[i] = x;
  else ((u16*)p)[i] = type == F16 ? f32_to_f16(x) : f32_to_bf16(x);
}
// sum[i] += w · (scale · value i) of eight values that tiles keep as 16-bit integers, each step rounded. 2^23 and an integer
// from 0 in the low bits of a float are its value after one subtraction.
__device__ __forceinline__ void add_scaled(float (&sum)[8], float w, float scale, uint4 values) {
  u32 words[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
  for (int k = 0; k < 4; k++) {
    u32 v = words[k] ^ 0x80008000u;
    float low = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7610)) - 8421376.f;
    float high = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7632)) - 8421376.f;
    sum[2 * k] = __fadd_rn(sum[2 * k], __fmul_rn(w, __fmul_rn(scale, low)));
    sum[2 * k + 1] = __fadd_rn(sum[2 * k + 1], __fmul_rn(w, __fmul_rn(scale, high)));
  }
}
__device__ __forceinline__ bool finite(float x) { return (__float_as_uint(x) & 0x7f800000u) != 0x7f800000u; }

// A strided matrix of floats; `stride` in elements.
struct Rows {
  void* data;
  u64 stride;
  u32 type;
  u32 rows, cols;
};

// ---- small floats: exact, every code ------------------------------------------------------------
// 1 sign, 4 exponent (bias 7), 3 mantissa; 0x7f and 0xff are NaN, nothing is infinite
__device__ __forceinline__ float e4m3_to_f32(u32 c) {
  if ((c & 0x7f) == 0x7f) return __uint_as_float(0x7fc00000u);
  // as the bits of a float that is too small by 2^120, subnormals included
  float v = __uint_as_float((c & 0x80) << 24 | (c & 0x7f) << 20);
  return v * __uint_as_float((127 + 120) << 23);
}
// 1 sign, 5 exponent (bias 15), 2 mantissa: the upper half of an f16
__device__ __forceinline__ float e5m2_to_f32(u32 c) { return f16_to_f32((u16)(c << 8)); }
// 0 .5 1 1.5 2 3 4 6 and their negatives
__device__ __forceinline__ float e2m1_to_f32(u32 c) {
  float v = __uint_as_float((c & 8) << 28 | (c & 7) << 22);
  return v * __uint_as_float((127 + 126) << 23);
}
// 2^(c-127); 0xff is NaN
__device__ __forceinline__ float e8m0_to_f32(u32 c) {
  if (c == 0xff) return __uint_as_float(0x7fc00000u);
  return __uint_as_float(c ? c << 23 : 0x400000u);
}
// to nearest, ties to even, saturating at 448; NaN stays. The value, not the code.
__device__ __forceinline__ float round_e4m3(float x) {
  float a = fminf(fabsf(x), 448.f);
  if (!(x == x)) return x;
  if (a > 448.f) return copysignf(448.f, x);
  // distance of neighbours: 2^(e-3), and 2^-9 below 2^-6
  u32 e = __float_as_uint(a) >> 23;
  if (e < 127 - 6) e = 127 - 6;
  // adding 1.5 * 2^23 times that distance rounds to a multiple of it
  float anchor = __uint_as_float((e - 3 + 23) << 23) * 1.5f;
  return copysignf(__fsub_rn(__fadd_rn(a, anchor), anchor), x);
}

// ---- faults: the first one stays until the host has read it --------------------------------------
enum { FAULT_HIDDEN = 1, FAULT_LOGIT = 2, FAULT_TOKEN = 3, FAULT_EXPERT = 4, FAULT_OUTPUT = 5, FAULT_CAPACITY = 6, FAULT_RANK = 7 };

__device__ __forceinline__ void raise_fault(u32* fault, u32 code, u32 row, u32 column, u32 bits) {
  if (atomicCAS(fault, 0u, code) == 0u) {
    fault[1] = row;
    fault[2] = column;
    fault[3] = bits;
  }
}

// ---- between the two products ------------------------------------------------------------------
enum { SILU = 0, GELU, GELU_TANH, RELU, RELU2, CLAMPED_SWIGLU, SWIGLU_STEP, SITU };
struct Activation {
  u32 kind;
  u32 gated;
  float a, b, c;  // ClampedSwiglu: alpha, beta, limit. SwigluStep: limit. Situ: beta, lambda or 0
};

// x / (1 + e^-z), for z where e^-z overflows too
__device__ __forceinline__ float times_sigmoid(float x, float z) {
  return z < -88.f ? x * expf(z) : x / (1.f + expf(-z));
}
// The same with the special function units, within 2^-20: for rows that are rounded to 16 bits.
__device__ __forceinline__ float times_sigmoid_16(float x, float z) { return z < -88.f ? 0.f : __fdividef(x, 1.f + __expf(-z)); }

// act(g) * u; without a gate projection u is 1. Infinities that come from g or u stay what the
// formula makes of them.
__device__ __forceinline__ float activate(const Activation& s, float g, float u) {
  switch (s.kind) {
    case SILU: return times_sigmoid(g, g) * u;
    case GELU: return (float)((double)g * 0.5 * erfc(-(double)g * 0.70710678118654752440) * (double)u);
    case GELU_TANH: {
      double x = g, z = 1.5957691216057307117 * (x + 0.044715 * x * x * x);
      return (float)(x / (1.0 + exp(-z)) * (double)u);
    }
    case RELU: return (g > 0.f ? g : g == g ? 0.f : g) * u;
    case RELU2: {
      float r = g > 0.f ? g : g == g ? 0.f : g;
      return r * r * u;
    }
    case CLAMPED_SWIGLU: {
      g = g > s.c ? s.c : g;
      u = u > s.c ? s.c : u < -s.c ? -s.c : u;
      // alpha may be any number: its product with g is not rounded before the exponential
      double z = (double)s.a * (double)g;
      return (float)((double)g / (1.0 + exp(-z))) * (s.gated ? u + s.b : 1.f);
    }
    case SWIGLU_STEP: {
      float r = times_sigmoid(g, g);
      r = r > s.a ? s.a : r;
      u = u > s.a ? s.a : u < -s.a ? -s.a : u;
      return r * (s.gated ? u : 1.f);
    }
    default: {
      double x = g, b = s.a, v = u;
      double r = b * tanh(x / b) / (1.0 + exp(-x));
      if (s.gated && s.b != 0.f) v = (double)s.b * tanh(v / (double)s.b);
      return (float)(r * v);
    }
  }
}
// As activate, gated, for rows that are rounded to 16 bits.
__device__ __forceinline__ float activate_16(const Activation& s, float g, float u) {
  if (s.kind == SILU) return times_sigmoid_16(g, g) * u;
  if (s.kind == CLAMPED_SWIGLU) {
    g = g > s.c ? s.c : g;
    u = u > s.c ? s.c : u < -s.c ? -s.c : u;
    return times_sigmoid_16(g, s.a * g) * (u + s.b);
  }
  return activate(s, g, u);
}
