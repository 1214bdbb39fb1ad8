// Both products of the routed experts for many tokens, E4M3 by E4M3: grouped, persistent, on Hopper's warp-group tensor
// cores. One warp group fills a ring of stages, two multiply 64 rows each by 256 rows of weights.
//
// Rows are sorted by expert (sorted.cu), so that a tile's stand beside each other; what a tile reads beyond its expert's
// last row is another expert's, and is not stored. The first product has gate and up rows in one tile, 64 in turn, so
// that a thread has both of a feature, and four threads the 128 features of a row that are quantised together: there,
// without rounding before. K ascends in one order for every element. Every 128 columns the sums are multiplied by the
// scales of rows (one a row and 128 columns) and weights (128 x 128), and added up in f32: the tensor cores alone add
// with some 13 bits.
//
// Blocks take tiles of one expert at the same time, and find in the cache what a neighbour has just read: as long as
// they keep step. So the second team multiplies rows that it has not, unless the expert has no other tile.
#include "many.cuh"

#define BK 128     // columns of a stage: 128 bytes
#define LETTERS 8  // pieces that are announced: more than the ring has stages

// The row tile and the feature tile of piece `i` of the work.
struct Piece {
  u32 expert, first, rows, feature;
  bool half;  // only the first team has rows, and the expert no other tile
};
__device__ __forceinline__ Piece piece(const Many& p, u32 i, u32 row_tiles, u32 feature_tiles) {
  u32 in_group = GROUP * feature_tiles, g = i / in_group, first = g * GROUP;
  u32 size = row_tiles - first < GROUP ? row_tiles - first : GROUP, rest = i - g * in_group;
  uint2 tile = p.tiles[first + rest % size];
  u32 begin = p.offsets[tile.x], rows = p.offsets[tile.x + 1] - tile.y;
  return {tile.x, tile.y, rows < BM ? rows : BM, rest / size * STEP, begin == tile.y && rows <= BM / 2};
}

// Stages in shared memory, and where somebody who goes round them is.
struct Ring {
  u32 a, b, full, empty, stage, phase;
  __device__ __forceinline__ void next() {
    if (++stage == STAGES) stage = 0, phase ^= 1;
  }
};

// The copy engine is to bring the weights of columns from k BK on; rows are counted, too.
__device__ __forceinline__ void load_weights(const Many& p, const Piece& t, const Ring& ring, u32 stage, u32 k, const TensorMap& first, const TensorMap& second) {
  u32 a = t.expert * p.rows_a + t.feature, b = SECOND ? a + 64 : t.expert * p.rows_b + t.feature;
  u32 barrier = ring.full + 8 * stage, to = ring.b + stage * B_BYTES;
  barrier_expect(barrier, B_BYTES + (t.half ? A_BYTES / 2 : A_BYTES));
#pragma unroll
  for (int q = 0; q < 4; q++) copy_tile(to + q * (B_BYTES / 4), q % 2 ? &second : &first, barrier, k * BK, (q % 2 ? b : a) + q / 2 * (SECOND ? 128 : 64));
}

// Fills the ring with a piece's stages. Weights of the first `ahead` ones are on the way already.
__device__ __forceinline__ void load(const Many& p, const Piece& t, Ring& ring, u32 stages, u32 ahead, const TensorMap& rows, const TensorMap& first, const TensorMap& second) {
  for (u32 k = 0; k < stages; k++) {
    barrier_wait(ring.empty + 8 * ring.stage, ring.phase ^ 1);
    if (k >= ahead) load_weights(p, t, ring, ring.stage, k, first, second);
    u32 barrier = ring.full + 8 * ring.stage, to = ring.a + ring.stage * A_BYTES;
    copy_tile(to, &rows, barrier, k * BK, t.first);
    if (!t.half) copy_tile(to + A_BYTES / 2, &rows, barrier, k * BK, t.first + 64);
    ring.next();
  }
}

// d += a team's 64 rows by the weights of a piece. d[64 b + 4 j + c]: row of `lane` + c / 2 * 8, and row 128 b + 8 j +
// lane % 4 * 2 + c % 2 of the tile's weights.
__device__ __forceinline__ void multiply(const Many& p, const Piece& t, float (&d)[BN / 2], Ring& ring, u32 half, u32 tid, u32 stages, u32 row) {
  // rows beyond the tile's have the scales of its last one
  u32 last = t.rows - 1, r0 = (t.first + (row < last ? row : last)) * stages, r1 = (t.first + (row + 8 < last ? row + 8 : last)) * stages;
  // blocks of 128 features: of gate and up, or two of down; of the last one where there is none
  u32 block = t.feature / 128, w0 = t.expert * p.scale_step + block * stages, w1 = SECOND && block + 1 < p.features / 128 ? w0 + stages : w0;
  auto scales = [&](u32 k) { return make_float4(p.row_scales[r0 + k], p.row_scales[r1 + k], p.scales_a[w0 + k], (SECOND ? p.scales_a : p.scales_b)[w1 + k]); };
  float4 now = scales(0);
  float part[64];
  for (u32 k = 0; k < stages; k++) {
    float4 next = scales(k + 1 < stages ? k + 1 : k);
    barrier_wait(ring.full + 8 * ring.stage, ring.phase);
    float a0 = now.x * now.z, a1 = now.y * now.z, b0 = now.x * now.w, b1 = now.y * now.w;
#pragma unroll
    for (int h = 0; h < 2; h++) {
      u32 a = ring.a + ring.stage * A_BYTES + half * 64 * 128, b = ring.b + ring.stage * B_BYTES + h * (B_BYTES / 2);
      pin(part);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < 4; j++) wgmma(part, descriptor(a + j * 32), descriptor(b + j * 32), j != 0);
      wgmma_commit();
      wgmma_wait<0>();
      if (h == 1 && tid % 32 == 0) barrier_arrive(ring.empty + 8 * ring.stage);
      pin(part);
#pragma unroll
      for (int j = 0; j < 64; j++) {
        bool second = SECOND ? h : j >= 32;
        d[64 * h + j] = fmaf(part[j], second ? (j & 2 ? b1 : b0) : (j & 2 ? a1 : a0), d[64 * h + j]);
      }
    }
    now = next;
    ring.next();
  }
}

// v / scale, rounded as a division: by the reciprocal, and one correction (Markstein).
__device__ __forceinline__ float divide(float v, float scale, float inverse) {
  float q = v * inverse;
  return fmaf(fmaf(-q, scale, v), inverse, q);
}

// The activations of one of a lane's rows, which stands at `position` of the sorted ones: quantised, in pieces of 16 bytes.
template <int H> __device__ __forceinline__ void store_inner(const Many& p, const Piece& t, float (&d)[BN / 2], u32 position, bool valid, u32 lane) {
  Activation activation = p.activation;
  activation.kind = ACTIVATION, activation.gated = 1;
  auto value = [&](int b, int j, int c) -> float& { return d[64 * b + 4 * j + 2 * H + c]; };  // up stands eight j further
#pragma unroll
  for (int b = 0; b < 2; b++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) value(b, j, c) = activate_16(activation, value(b, j, c), value(b, j + 8, c));
  u32 most = 0;
#pragma unroll
  for (int b = 0; b < 2; b++)
#pragma unroll
    for (int j = 0; j < 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) most = max(most, __float_as_uint(value(b, j, c)) & 0x7fffffffu);
  most = max(most, __shfl_xor_sync(~0u, most, 1));
  most = max(most, __shfl_xor_sync(~0u, most, 2));
  float scale = e4m3_scale_of(most), inverse = __frcp_rn(scale);
  if (valid && lane % 4 == 0) p.out_scales[(u64)position * (p.features / 128) + t.feature / 128] = scale;
  u8* out = (u8*)p.out + (u64)position * p.features;
#pragma unroll
  for (int b = 0; b < 2; b++) {
    u32 w[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float q[4];
#pragma unroll
      for (int c = 0; c < 4; c++) q[c] = divide(value(b, 2 * i + c / 2, c % 2), scale, inverse);
      w[i] = e4m3x4(q);
    }
    transpose4(w, lane);
    // of each of four lanes two codes of this lane's first eight features, and two of the next eight
    uint4 codes = make_uint4(__byte_perm(w[0], w[1], 0x5410), __byte_perm(w[2], w[3], 0x5410), __byte_perm(w[0], w[1], 0x7632), __byte_perm(w[2], w[3], 0x7632));
    if (valid) *(uint4*)(out + t.feature + 64 * b + lane % 4 * 16) = codes;
  }
}

// The outputs of one of a lane's rows, the slot `slot`: 16-bit integers with a scale, in pieces of 16 bytes, for memory
// that may be another GPU's.
template <int H> __device__ __forceinline__ void store_output(const Many& p, const Piece& t, const float (&d)[BN / 2], u32 slot, bool valid, u32 lane) {
  u16* out = p.out;
  float* scales = p.out_scales;
  if (p.homes && valid) {
    u32 home = slot / p.home_slots;
    slot -= home * p.home_slots;
    out = (u16*)p.homes[home], scales = (float*)(p.homes[home] + p.home_scales);
  }
  out += (u64)slot * p.features, scales += (u64)slot * ((p.features + SCALED - 1) / SCALED);
#pragma unroll
  for (int u = 0; u < BN / SCALED; u++) {
    u32 feature = t.feature + u * SCALED;
    float parts[4] = {};  // NaN stays
#pragma unroll
    for (int j = 0; j < SCALED / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) parts[2 * (j % 2) + c] = max_nan(parts[2 * (j % 2) + c], fabsf(d[u * SCALED / 2 + 4 * j + 2 * H + c]));
    float most = max_nan(max_nan(parts[0], parts[1]), max_nan(parts[2], parts[3]));
    most = max_nan(most, __shfl_xor_sync(~0u, most, 1));
    most = max_nan(most, __shfl_xor_sync(~0u, most, 2));
    float scale = finite(most) ? most * (1.f / 32767.f) : __uint_as_float(0x7fc00000u);
    float inverse = scale > 0.f ? __fdiv_rn(32767.f, most) : 0.f;
    if (valid && feature < p.features && lane % 4 == 0) scales[feature / SCALED] = scale;
#pragma unroll
    for (int m = 0; m < SCALED / 32; m++) {
      u32 w[4], f = feature + 32 * m + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* v = d + u * SCALED / 2 + 4 * (4 * m + i) + 2 * H;
        // 1.5 * 2^23 more: an integer in the low bits, rounded by the addition
        w[i] = __byte_perm(__float_as_uint(fmaf(v[0], inverse, 12582912.f)), __float_as_uint(fmaf(v[1], inverse, 12582912.f)), 0x5410);
      }
      transpose4(w, lane);
      if (valid && f < p.features) *(uint4*)(out + f) = make_uint4(w[0], w[1], w[2], w[3]);
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) many8(const __grid_constant__ Many p, const __grid_constant__ TensorMap rows, const __grid_constant__ TensorMap first, const __grid_constant__ TensorMap second) {
  extern __shared__ __align__(1024) u8 memory[];
  Ring ring = {shared_address(memory)};
  ring.b = ring.a + STAGES * A_BYTES, ring.full = ring.b + STAGES * B_BYTES, ring.empty = ring.full + 8 * STAGES;
  Piece* letters = (Piece*)(memory + STAGES * (A_BYTES + B_BYTES + 16));
  u32 team = threadIdx.x / 128, tid = threadIdx.x % 128, lane = tid % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(ring.full + 8 * i, 1), barrier_init(ring.empty + 8 * i, 8);
    barrier_init_done();
  }
  __syncthreads();
  // the plan is there, as the step before has waited for it; weights are there anyway
  if (team) wait_for_step_before();
  let_next_step_begin();
  const u32 row_tiles = *p.tile_count, feature_tiles = (p.features + STEP - 1) / STEP, pieces = row_tiles * feature_tiles, stages = (p.k + BK - 1) / BK;
  if (team == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (tid) return;
    u32 ahead = 0, letter = 0;
    for (u32 i = blockIdx.x; i < pieces; i += gridDim.x) {
      Piece t = piece(p, i, row_tiles, feature_tiles);
      letters[letter++ % LETTERS] = t;
      if (i == blockIdx.x) {
        for (; ahead < STAGES && ahead < stages; ahead++) load_weights(p, t, ring, ahead, ahead, first, second);
        wait_for_step_before();
      }
      load(p, t, ring, stages, ahead, rows, first, second);
      ahead = 0;
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  u32 half = team - 1, row = half * 64 + tid / 32 * 16 + lane / 4, letter = 0;
  for (u32 i = blockIdx.x; i < pieces; i += gridDim.x) {
    barrier_wait(ring.full + 8 * ring.stage, ring.phase);
    const Piece t = letters[letter++ % LETTERS];
    if (half && t.half) {
      for (u32 k = 0; k < stages; k++) {
        barrier_wait(ring.full + 8 * ring.stage, ring.phase);
        if (lane == 0) barrier_arrive(ring.empty + 8 * ring.stage);
        ring.next();
      }
      continue;
    }
    // sums begin with the biases
    float d[BN / 2] = {};
    u64 bias = (u64)t.expert * p.features + t.feature + lane % 4 * 2;
    if (p.bias_a || p.bias_b)
#pragma unroll
      for (int j = 0; j < BN / 8; j++) {
        const float* from = !SECOND && j / 8 % 2 ? p.bias_b : p.bias_a;
        const int f = 8 * (SECOND ? j : j / 16 * 8 + j % 8);
        bool there = from && t.feature + f < p.features;
#pragma unroll
        for (int c = 0; c < 2; c++) d[4 * j + c] = d[4 * j + 2 + c] = load_if(from + bias + f + c, there);
      }
    pin(d);
    multiply(p, t, d, ring, half, tid, stages, row);
    u32 position = t.first + row;
    bool valid[2] = {row < t.rows, row + 8 < t.rows};
    if constexpr (SECOND) {
      u32 slot[2] = {valid[0] ? p.order[position] : 0, valid[1] ? p.order[position + 8] : 0};
      store_output<0>(p, t, d, slot[0], valid[0], lane);
      pin(d);  // or registers run out
      store_output<1>(p, t, d, slot[1], valid[1], lane);
    } else {
      store_inner<0>(p, t, d, position, valid[0], lane);
      pin(d);
      store_inner<1>(p, t, d, position + 8, valid[1], lane);
    }
  }
}
