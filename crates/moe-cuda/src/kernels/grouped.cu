// Both products of the routed experts for weights in any stored format: each value is decoded to f32 and
// multiplied in f32, k ascending, one sum an element. The right one, not the fast one.
#include "stored.cuh"

#define BM 32
#define BN 64
#define BK 32

struct Work {
  const u32* offsets;      // [experts + 1]
  const u32* order;        // sorted position -> slot
  const uint2* tiles;      // {expert, first sorted position}, of BM rows
  const u32* tile_count;
  u32 top_k;               // 0: rows of x stand in sorted order
};

// One tile of BM rows x BN features; `gate` is read where MATS is 2.
template <int MATS>
__device__ __forceinline__ void product(const Rows& x, const u32 (&source)[BM], const float* factor, u32 rows, const Stored& a, const Stored& b,
                                        u32 expert, u32 n0, float (&acc)[MATS][2][4]) {
  __shared__ float xs[BK][BM + 1];
  __shared__ float ws[MATS][BK][BN + 1];
  u32 tid = threadIdx.x, ty = tid / 16, tx = tid % 16;
#pragma unroll
  for (int m = 0; m < MATS; m++)
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) acc[m][i][j] = 0;
  for (u32 k0 = 0; k0 < a.cols; k0 += BK) {
    __syncthreads();
    for (u32 i = tid; i < BM * BK; i += 256) {
      u32 r = i / BK, k = i % BK;
      float v = 0;
      if (r < rows && k0 + k < a.cols) {
        v = load_float(x.data, x.type, source[r] * x.stride + k0 + k);
        if (factor) v *= factor[r];
      }
      xs[k][r] = v;
    }
#pragma unroll
    for (int m = 0; m < MATS; m++) {
      float v[8];
      u32 n = tid / 4, k = tid % 4 * 8;
      decode<ELEMENT, 8>(m ? b : a, expert, n0 + n, k0 + k, v);
#pragma unroll
      for (int i = 0; i < 8; i++) ws[m][k + i][n] = v[i];
    }
    __syncthreads();
#pragma unroll 8
    for (int k = 0; k < BK; k++) {
      float v0 = xs[k][2 * ty], v1 = xs[k][2 * ty + 1];
#pragma unroll
      for (int m = 0; m < MATS; m++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
          float w = ws[m][k][tx + 16 * j];
          acc[m][0][j] = fmaf(v0, w, acc[m][0][j]);
          acc[m][1][j] = fmaf(v1, w, acc[m][1][j]);
        }
    }
  }
}

// h[sorted position] = act(gate * x, up * x), or act(up * x) where not gated. With `factors`, [T, k], a
// row of x is multiplied by its slot's first.
extern "C" __global__ void __launch_bounds__(256) grouped_first(Rows x, Stored gate, Stored up, Activation act, Work work, const float* factors, Rows h) {
  __shared__ u32 source[BM];
  __shared__ float factor[BM];
  u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16, n0 = blockIdx.x * BN;
  for (u32 t = blockIdx.y; t < *work.tile_count; t += gridDim.y) {
    uint2 tile = work.tiles[t];
    u32 rows = work.offsets[tile.x + 1] - tile.y;
    if (rows > BM) rows = BM;
    __syncthreads();
    if (threadIdx.x < BM) {
      u32 slot = threadIdx.x < rows ? work.order[tile.y + threadIdx.x] : 0;
      source[threadIdx.x] = work.top_k ? slot / work.top_k : tile.y + (threadIdx.x < rows ? threadIdx.x : 0);
      factor[threadIdx.x] = factors ? factors[slot] : 1;
    }
    __syncthreads();
    float acc[2][2][4];
    if (act.gated) product<2>(x, source, factors ? factor : 0, rows, gate, up, tile.x, n0, acc);
    else {
      float one[1][2][4];
      product<1>(x, source, factors ? factor : 0, rows, up, up, tile.x, n0, one);
      for (int i = 0; i < 2; i++)
        for (int j = 0; j < 4; j++) acc[0][i][j] = one[0][i][j];
    }
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 4; j++) {
        u32 r = 2 * ty + i, n = n0 + tx + 16 * j;
        if (r >= rows || n >= up.rows) continue;
        const float* bg = act.gated ? gate.bias : up.bias;
        float g = acc[0][i][j] + (bg ? bg[(u64)tile.x * up.rows + n] : 0.f);
        float u = act.gated ? acc[1][i][j] + (up.bias ? up.bias[(u64)tile.x * up.rows + n] : 0.f) : 1.f;
        store_float(h.data, h.type, (u64)(tile.y + r) * h.stride + n, activate(act, g, u));
      }
  }
}

// y[slot] = down * h[sorted position] (+ bias)
extern "C" __global__ void __launch_bounds__(256) grouped_second(Rows h, Stored down, Work work, Rows y) {
  __shared__ u32 source[BM], slots[BM];
  u32 ty = threadIdx.x / 16, tx = threadIdx.x % 16, n0 = blockIdx.x * BN;
  for (u32 t = blockIdx.y; t < *work.tile_count; t += gridDim.y) {
    uint2 tile = work.tiles[t];
    u32 rows = work.offsets[tile.x + 1] - tile.y;
    if (rows > BM) rows = BM;
    __syncthreads();
    if (threadIdx.x < BM) {
      slots[threadIdx.x] = threadIdx.x < rows ? work.order[tile.y + threadIdx.x] : 0;
      source[threadIdx.x] = tile.y + (threadIdx.x < rows ? threadIdx.x : 0);
    }
    __syncthreads();
    float acc[1][2][4];
    product<1>(h, source, 0, rows, down, down, tile.x, n0, acc);
    for (int i = 0; i < 2; i++)
      for (int j = 0; j < 4; j++) {
        u32 r = 2 * ty + i, n = n0 + tx + 16 * j;
        if (r >= rows || n >= down.rows) continue;
        float v = acc[0][i][j] + (down.bias ? down.bias[(u64)tile.x * down.rows + n] : 0.f);
        store_float(y.data, y.type, (u64)slots[r] * y.stride + n, v);
      }
  }
}
