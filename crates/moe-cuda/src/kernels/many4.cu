// Both products of the routed experts for many tokens, of 4-bit weights: grouped, persistent, on Hopper's warp-group
// tensor cores. The weights are the 64-row side: packed as few.cu reads them (pack.cu), their words become bf16 in
// the registers that the tensor cores read. The rows are the other side, in shared memory. One warp group fills a
// ring of stages by the copy engine, two unpack and multiply.
//
// FORMAT 2, INT4: codes less 8, as they are; the sums of each group of 128 columns are multiplied by its scales and
// added up in f32. The two teams share the weights, and have 64 rows each. FORMAT 3, MXFP4: values times scales,
// too small by 2^64 (scales from 2^-62 to 2^65 are exact); each team has weights of its own, and all 128 rows.
//
// Inside each 32 columns rows are stored in the order in which the packed weights come: see `position`.
#include "wgmma.cuh"

#define BM 128
#define RK (FORMAT == 2 ? 128 : 64)            // columns of a record, and of a stage
#define TILE (FORMAT == 2 ? 1056 : 544)        // bytes of 16 rows x RK
#define COLUMNS (FORMAT == 2 ? 64 : 128)       // rows of x that a team multiplies
#define GROUPS (FORMAT == 2 ? 4 : 8)           // groups of weights of a stage: each two tiles
#define STAGES (FORMAT == 2 ? 5 : 8)
#define ROW_BYTES (BM * RK * 2)
#define WEIGHT_BYTES (GROUPS * 2 * TILE)
#define UNSCALE (FORMAT == 2 ? 1.f : 18446744073709551616.f)
#define ROW_TILES 16  // row tiles that share weights while those are in the cache

struct Many4 {
  const u32 *offsets, *order;
  const uint2* tiles;
  const u32* tile_count;
  const u8* weights;             // [experts, groups, k / RK, 2, TILE]
  const float *bias_a, *bias_b;  // or null
  void* out;     // first: [sorted rows, features], bf16, in the order of `position`; second: [slots, features], f32
  const u64* homes;  // second, where not null: see many.cu
  u32 home_slots;
  u32 features, k;
  Activation activation;
};

// Where column c of a row stands: inside each 32, products of 16 columns take c = 8 t + 4 j + 2 half + i from
// 16 j + 8 half + 2 t + i.
__device__ __forceinline__ u32 position(u32 c) { return (c & ~31u) | (c & 4) << 2 | (c & 2) << 2 | (c & 24) >> 2 | (c & 1); }

__device__ __forceinline__ u32 less_136(u32 a) {
  u32 r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3F803F80u), "r"(0xC308C308u));
  return r;
}
template <int N> __device__ __forceinline__ void pin(float (&d)[N]) {
#pragma unroll
  for (int j = 0; j < N; j++) asm volatile("" : "+f"(d[j])::"memory");
}

// Words of two products of 16 columns, of both tiles, as fragments. MXFP4: `scales` has bytes for {row g, g + 8} x
// {first, second 32 columns}.
__device__ __forceinline__ void unpack(u32 (&a)[2][2][4], const u32 (&words)[2][2], const u32 (&scales)[2], u32 half, u32 low, u32 magic) {
#pragma unroll
  for (int m = 0; m < 2; m++) {
    u32 s0 = 0, s1 = 0;
    if (FORMAT == 3) {
      u32 e0 = (scales[m] >> 8 * half & 0xff) + 62, e1 = (scales[m] >> (16 + 8 * half) & 0xff) + 62;
      s0 = (e0 < 255 ? e0 : 255) * 0x00800080u, s1 = (e1 < 255 ? e1 : 255) * 0x00800080u;
    }
#pragma unroll
    for (int j = 0; j < 2; j++) {
      u32 v = words[m][j];
      if (FORMAT == 2) {
#pragma unroll
        for (int i = 0; i < 4; i++) a[m][j][i] = less_136(and_or(v >> 4 * i, low, magic));
      } else {
        u32 last = ((v << 1) & 0x80008000u) | ((v >> 5) & 0x01000100u) | ((v >> 4) & 0x00C000C0u);
        a[m][j][0] = times_bf16x2(v & 0x81C081C0u, s0);
        a[m][j][1] = times_bf16x2((v << 3) & 0x81C081C0u, s1);
        a[m][j][2] = times_bf16x2((v << 6) & 0x81C081C0u, s0);
        a[m][j][3] = times_bf16x2(last, s1);
      }
    }
  }
}

// The row tile and the first group of piece `i` of the work.
struct Piece {
  u32 expert, first, rows, group;
};
__device__ __forceinline__ Piece piece(const Many4& p, u32 i, u32 row_tiles, u32 feature_tiles) {
  u32 together = ROW_TILES * feature_tiles, at = i / together * ROW_TILES;
  u32 size = row_tiles - at < ROW_TILES ? row_tiles - at : ROW_TILES, rest = i % together;
  uint2 tile = p.tiles[at + rest % size];
  u32 rows = p.offsets[tile.x + 1] - tile.y;
  return {tile.x, tile.y, rows < BM ? rows : BM, rest / size * GROUPS};
}

// Where a team's warp stands.
struct Team {
  u32 rows, weights, full, empty;  // rings in shared memory
  u32 own;                         // this warp's group of a stage
  u32 row0;                        // this team's rows of a tile
  u32 stage, phase, lane, low, magic;
};

// A tile of which the team has at most N rows.
template <int N> __device__ __forceinline__ void multiply(const Many4& p, const Piece& t, Team& o, u32 stages) {
  const u32 lane = o.lane, g = lane / 4, low = o.low, magic = o.magic;
  // sums[m][4 j + 2 h + c]: row g + 8 h of this warp's tile m, and row 8 j + lane % 4 * 2 + c of x
  float sums[2][N / 2];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int j = 0; j < N / 2; j++) sums[m][j] = 0.f;
  auto rows_of = [&](u32 step) { return o.rows + o.stage * ROW_BYTES + step / 4 * BM * 128 + o.row0 * 128 + step % 4 * 32; };
  u32 a[2][2][2][4];  // two halves of 32 columns, in turn
#if FORMAT == 3
  pin(sums[0]), pin(sums[1]);
  u32 before = STAGES;
  for (u32 k = 0; k < stages; k++) {
    barrier_wait(o.full + 8 * o.stage, o.phase);
    u32 at = o.weights + o.stage * WEIGHT_BYTES + o.own * 2 * TILE, scales[2];
    uint4 w[2];
#pragma unroll
    for (int m = 0; m < 2; m++) w[m] = load_shared16(at + m * TILE + lane * 16), scales[m] = load_shared4(at + m * TILE + 512 + g * 4);
#pragma unroll
    for (int half = 0; half < 2; half++) {
      u32 words[2][2] = {{half ? w[0].z : w[0].x, half ? w[0].w : w[0].y}, {half ? w[1].z : w[1].x, half ? w[1].w : w[1].y}};
      // the products that read this half's registers are done; those of the other half may still run
      wgmma_wait<1>();
      if (half && before < STAGES && lane == 0) barrier_arrive(o.empty + 8 * before);
      unpack(a[half], words, scales, half, low, magic);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int m = 0; m < 2; m++) wgmma(sums[m], a[half][m][j], descriptor(rows_of(2 * half + j)), 1);
      wgmma_commit();
    }
    before = o.stage;
    if (++o.stage == STAGES) o.stage = 0, o.phase ^= 1;
  }
  wgmma_wait<0>();
  pin(sums[0]), pin(sums[1]);
  if (lane == 0) barrier_arrive(o.empty + 8 * before);
#else
  for (u32 k = 0; k < stages; k++) {
    barrier_wait(o.full + 8 * o.stage, o.phase);
    u32 at = o.weights + o.stage * WEIGHT_BYTES + o.own * 2 * TILE, scales[2];
    float part[2][N / 2];
#pragma unroll
    for (int m = 0; m < 2; m++) scales[m] = load_shared4(at + m * TILE + 1024 + g * 4);
    pin(part[0]), pin(part[1]);
#pragma unroll
    for (int half = 0; half < 4; half++) {
      uint2 w[2];
#pragma unroll
      for (int m = 0; m < 2; m++) w[m] = load_shared8(at + m * TILE + half / 2 * 512 + lane * 16 + half % 2 * 8);
      u32 words[2][2] = {{w[0].x, w[0].y}, {w[1].x, w[1].y}};
      if (half > 1) wgmma_wait<1>();
      unpack(a[half % 2], words, scales, 0, low, magic);
      wgmma_begin();
#pragma unroll
      for (int j = 0; j < 2; j++)
#pragma unroll
        for (int m = 0; m < 2; m++) wgmma(part[m], a[half % 2][m][j], descriptor(rows_of(2 * half + j)), half + j > 0);
      wgmma_commit();
    }
    wgmma_wait<0>();
    pin(part[0]), pin(part[1]);
    if (lane == 0) barrier_arrive(o.empty + 8 * o.stage);
#pragma unroll
    for (int m = 0; m < 2; m++) {
      float s0 = __uint_as_float(scales[m] << 16), s1 = __uint_as_float(scales[m] & 0xffff0000u);
#pragma unroll
      for (int j = 0; j < N / 2; j++) sums[m][j] = fmaf(part[m][j], j & 2 ? s1 : s0, sums[m][j]);
    }
    if (++o.stage == STAGES) o.stage = 0, o.phase ^= 1;
  }
#endif
  const u32 group = t.group + o.own;
  if (group >= p.features / (SECOND ? 32 : 16)) return;
  float bias[2][2];
#pragma unroll
  for (int m = 0; m < 2; m++)
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const float* from = !SECOND && m ? p.bias_b : p.bias_a;
      u32 f = (SECOND ? group * 32 + m * 16 : group * 16) + g + 8 * h;
      bias[m][h] = from ? from[(u64)t.expert * p.features + f] : 0.f;
    }
  if constexpr (SECOND) {
#pragma unroll
    for (int j = 0; j < N / 8; j++)
#pragma unroll
      for (int c = 0; c < 2; c++) {
        u32 r = o.row0 + 8 * j + lane % 4 * 2 + c;
        if (r >= t.rows) continue;
        u32 slot = p.order[t.first + r];
        float* to = (float*)p.out;
        if (p.homes) to = (float*)p.homes[slot / p.home_slots], slot %= p.home_slots;
        to += (u64)slot * p.features + group * 32 + g;
#pragma unroll
        for (int m = 0; m < 2; m++)
#pragma unroll
          for (int h = 0; h < 2; h++) to[m * 16 + 8 * h] = fmaf(sums[m][4 * j + 2 * h + c], UNSCALE, bias[m][h]);
      }
  } else {
    Activation activation = p.activation;
    activation.kind = ACTIVATION, activation.gated = 1;
    const u32 mine = g & 1;  // lanes of rows g and g ^ 1 each take one of two rows of x
    u16* to = (u16*)p.out + position(group * 16 + (g & 6));
#pragma unroll
    for (int j = 0; j < N / 8; j++) {
      u32 pair[2];
#pragma unroll
      for (int c = 0; c < 2; c++) {
        float v[2];
#pragma unroll
        for (int h = 0; h < 2; h++)
          v[h] = activate_16(activation, fmaf(sums[0][4 * j + 2 * h + c], UNSCALE, bias[0][h]), fmaf(sums[1][4 * j + 2 * h + c], UNSCALE, bias[1][h]));
        pair[c] = f32x2_to_bf16x2(v[0], v[1]);
      }
      u32 kept = mine ? pair[1] : pair[0], other = __shfl_xor_sync(~0u, mine ? pair[0] : pair[1], 4);
      u32 even = mine ? other : kept, odd = mine ? kept : other;
      u32 r = o.row0 + 8 * j + lane % 4 * 2 + mine;
      if (r < t.rows) *(uint2*)(to + (u64)(t.first + r) * p.features) = make_uint2(__byte_perm(even, odd, 0x5410), __byte_perm(even, odd, 0x7632));
    }
  }
}

extern "C" __global__ void __launch_bounds__(384, 1) many4(const __grid_constant__ Many4 p, const __grid_constant__ TensorMap rows) {
  extern __shared__ __align__(1024) u8 memory[];
  const u32 row_tiles_at = shared_address(memory), weights_at = row_tiles_at + STAGES * ROW_BYTES;
  const u32 full = weights_at + STAGES * WEIGHT_BYTES, empty = full + 8 * STAGES;
  const u32 team = threadIdx.x / 128, tid = threadIdx.x % 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1), barrier_init(empty + 8 * i, 8);
    barrier_init_done();
  }
  __syncthreads();
  const u32 groups = p.features / (SECOND ? 32 : 16), feature_tiles = (groups + GROUPS - 1) / GROUPS;
  const u32 row_tiles = *p.tile_count, pieces = row_tiles * feature_tiles, stages = p.k / RK;
  if (team == 0) {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (tid == 0) {
      u32 stage = 0, phase = 0;
      for (u32 i = blockIdx.x; i < pieces; i += gridDim.x) {
        Piece t = piece(p, i, row_tiles, feature_tiles);
        u32 count = groups - t.group < GROUPS ? groups - t.group : GROUPS, boxes = (t.rows + 31) / 32;
        const u8* from = p.weights + ((u64)t.expert * groups + t.group) * stages * (2 * TILE);
        for (u32 k = 0; k < stages; k++) {
          barrier_wait(empty + 8 * stage, phase ^ 1);
          u32 barrier = full + 8 * stage, to = weights_at + stage * WEIGHT_BYTES;
          barrier_expect(barrier, boxes * 32 * RK * 2 + count * 2 * TILE);
          for (u32 b = 0; b < boxes; b++)
#pragma unroll
            for (int c = 0; c < RK / 64; c++) copy_tile(row_tiles_at + stage * ROW_BYTES + c * BM * 128 + b * 32 * 128, &rows, barrier, k * RK + c * 64, t.first + 32 * b);
          for (u32 g = 0; g < count; g++) copy_bytes(to + g * 2 * TILE, from + ((u64)g * stages + k) * (2 * TILE), 2 * TILE, barrier);
          if (++stage == STAGES) stage = 0, phase ^= 1;
        }
      }
    }
    return;
  }
  asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
  const u32 warp = tid / 32;
  Team o = {row_tiles_at, weights_at, full, empty};
  o.own = (FORMAT == 2 ? 0 : (team - 1) * 4) + warp;
  o.row0 = FORMAT == 2 ? (team - 1) * COLUMNS : 0;
  o.lane = tid % 32, o.stage = o.phase = 0;
  asm volatile("mov.u32 %0, 0x000f000f; mov.u32 %1, 0x43004300;" : "=r"(o.low), "=r"(o.magic));
  for (u32 i = blockIdx.x; i < pieces; i += gridDim.x) {
    Piece t = piece(p, i, row_tiles, feature_tiles);
    // few rows take few columns of the tensor cores
    if (t.rows <= o.row0) {
      for (u32 k = 0; k < stages; k++) {
        barrier_wait(full + 8 * o.stage, o.phase);
        if (o.lane == 0) barrier_arrive(empty + 8 * o.stage);
        if (++o.stage == STAGES) o.stage = 0, o.phase ^= 1;
      }
    } else if (t.rows - o.row0 <= COLUMNS / 2) multiply<COLUMNS / 2>(p, t, o, stages);
    else multiply<COLUMNS>(p, t, o, stages);
  }
}

// Rows by sorted position, to[i] = x[order[i] / top_k], in the order of `position`. One warp a row; 8 columns a lane
// and turn.
extern "C" __global__ void gather4(const uint4* x, u64 stride, const u32* order, const u32* offsets, u32 experts, u32 top_k, u32 pieces, u32* to) {
  u32 i = blockIdx.x * (blockDim.x >> 5) + (threadIdx.x >> 5), lane = threadIdx.x & 31;
  if (i >= offsets[experts]) return;
  const uint4* from = x + (u64)(order[i] / top_k) * stride;
  u32* row = to + (u64)i * pieces * 4;
  for (u32 c = lane; c < pieces; c += 32) {
    uint4 v = from[c];
    u32 at = position(8 * c) / 2;  // then 8 more columns for each 4, 4 for each 2
    row[at] = v.x, row[at + 4] = v.y, row[at + 8] = v.z, row[at + 12] = v.w;
  }
}
