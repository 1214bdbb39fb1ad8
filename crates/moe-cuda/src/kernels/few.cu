// The whole of the routed experts for few tokens, in one persistent launch: every weight byte is read once.
//
// Blocks of WARPS warps walk units of 16 gate and 16 up rows (phase 1) or 32 down rows a warp group
// (phase 2) of one entry: an expert with at most 8 of its rows. The weights are the 16-row side of
// mma.sync, the rows the 8-column side. A unit's K is split over the block's warps; each warp fills a ring
// of its own by the copy engine, and goes on into the down weights before the phase changes. A counter
// of finished units for each entry stands in for a barrier of the grid: down units wait for their own
// expert only. The slots of a token are added in slot order, in f32. Sums have one order, given by the shape.
//
// FORMAT 0 bf16 and 1 FP8 (128 x 128 scales): read where the checkpoint has them, by tensor maps.
// FORMAT 2 INT4 (groups of 128, zero 8) and 3 MXFP4: packed streams of pack.cu.
//
// FP8 weights meet rows that are quantised to E4M3 in groups of 128, before either product: codes of both are
// multiplied as f16, which holds them exactly, and each group's sum is multiplied by both scales.
//
// GATE 1: gate and routing come first, in the same launch: all warps share the gate's product and tell all blocks
// its logits. Where experts are chosen by their logits alone, each block chooses by itself and asks for weights;
// one block a token routes it meanwhile, for the weights of the sum. Else, or where rounding could decide, all wait
// for that.
#include "ptx.cuh"
#if GATE
#include "route.cuh"
#endif

enum { F_BF16 = 0, F_FP8, F_INT4, F_MXFP4 };
#define MAX_SLOTS 512
#define NATURAL (FORMAT == F_BF16 || FORMAT == F_FP8)
// MXFP4: weights become bf16 that are too small by a power of two; rows are made too large by 2^100, exactly.
#define TO_LARGE 1.2676506002282294e30f
#define UNSCALE (FORMAT == F_MXFP4 ? 67108864.f : 1.f)

#define RK (FORMAT == F_BF16 || FORMAT == F_MXFP4 ? 64 : 128)                 // columns of a record
#define TILE (NATURAL ? 2048 : FORMAT == F_INT4 ? 1056 : 544)                 // bytes of 16 rows x RK
#define STAGE (RECORDS * 2 * TILE)
#define STEPS (RECORDS * RK / 64)
#define THREADS (WARPS * 32)

// Sizes are constants, so that no division is left and little code is fetched: HIDDEN, INNER, EXPERTS; GRID blocks;
// SPLIT warps that share a unit's K in phase 2; behind a gate GATE_OUTPUTS and GATE_TOP_K.
#if GATE
#define CHOICES GATE_TOP_K
#else
#define CHOICES p.top_k
#endif

#define OWN_PLAN 128  // slots for which blocks make the plan by themselves; at most a block's threads
// Finished units of the first product for each entry; then units of the second product, blocks that have left, blocks
// that have done their part of the gate, routed tokens, groups of rows in codes.
// Each in a line of its own: blocks that wait for one are not in the way of those that count another.
enum { LINE = 32, DOWN = MAX_SLOTS * LINE, LEFT = DOWN + LINE, BEFORE = LEFT + LINE, ROUTED = BEFORE + LINE, CODES = ROUTED + LINE };
// Behind them: logits as blocks tell each other, [copies, tokens, logits], their bits inverted so that 0 is none.
enum { TOLD = CODES + LINE, MOST_TOLD = 256 };

// Where the time goes: with STAMPS defined, launch number STAMPS prints when each block passed each STAMP, in ns.
#ifdef STAMPS
extern "C" __device__ int vprintf(const char*, const char*);
__device__ u32 launches;
__device__ __forceinline__ u64 now_ns() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t)::"memory");
  return t;
}
#define STAMPS_BEGIN            \
  __shared__ u64 stamps[12];    \
  if (tid < 12) stamps[tid] = 0; \
  __syncthreads();
#define STAMP(i) do { if (threadIdx.x == 0) stamps[i] = now_ns(); } while (0)
#define STAMP_FIRST(i) do { if (threadIdx.x == 0 && !stamps[i]) stamps[i] = now_ns(); } while (0)
#define STAMPS_END                                                      \
  if (tid == 0 && *(volatile u32*)&launches == STAMPS) {                \
    u64 v[13] = {p.slots, blockIdx.x};                                  \
    for (int i = 0; i < 11; i++) v[2 + i] = stamps[i];                  \
    vprintf("stamps %llu %llu %llu %llu %llu %llu %llu %llu %llu %llu %llu %llu %llu\n", (const char*)v); \
  }
#define STAMPS_LAST if (tid == 0) launches++
#else
#define STAMPS_BEGIN
#define STAMP(i)
#define STAMP_FIRST(i)
#define STAMPS_END
#define STAMPS_LAST
#endif

struct Few {
  const u16* x;  // bf16
  u64 x_stride;
  const u32* ids;
  const float* weights;
  const u8 *first, *second;                                   // packed streams
  const float *gate_scales, *up_scales, *down_scales;         // FP8: [experts, rows / 128, K / 128]
  const float *gate_bias, *up_bias, *down_bias;               // or null
  void* h;             // [slots, inner], bf16; FP8: f32, quantised by those who read it
  u16* rows;           // FP8: [tokens, hidden], codes of x as f16
  float* row_scales;   // FP8: [tokens, hidden / 128]
  float* y;  // [slots, hidden]
  void* out;  // bf16, or f32
  u64 out_stride;
  u32* counters;  // [TOLD + OWN_PLAN * MOST_TOLD], zero
  u32* fault;
  const u32 *offsets, *order;  // a plan in tiles of 8, for more than OWN_PLAN slots
  const uint2* tiles;
  const u32* tile_count;
  u32 slots, top_k;
  u32 gate_rows, up_rows, down_rows;     // rows from one expert to the next in the tensor maps
  u32 gate_scale_step, down_scale_step;  // scales from one expert to the next
  u32 out_type;
  float factor;  // of all sums
  Activation activation;
};

#if GATE
struct Gate {
  Rows weight;  // [logits, hidden], bf16 or f32
  const float* bias;
  float* logits;          // [tokens, logits]
  float* shared_weights;  // as those of `route`
  u32* fault;             // of rows and logits
  Router router;
};
#endif

// Lane 4g + t reads row(g) of 8. In the tensor maps' layout, rows g and g ^ 4 of a pair lie in different
// banks, rows g and g ^ 1 do not.
__device__ __forceinline__ u32 row_of(u32 g) { return NATURAL ? (g & 1) << 2 | g >> 1 : g; }
__device__ __forceinline__ u32 lane_row_of(u32 row) { return NATURAL ? (row & 3) << 1 | row >> 2 : row; }

// What a thread carries along of rows and scales for one stage, as the products take it.
struct Fragment {
  u32 x[STEPS][8];
#if FORMAT == 1
  float scale[2], row_scale[2];
#endif
};
#if FORMAT == 1
static_assert(RECORDS == 1, "FP8 has one record a stage");
// As it is loaded: the second product's rows are floats that are yet to be quantised.
struct Loaded {
  u32 x[STEPS][16];
  float scale[2], row_scale[2];
};
#else
typedef Fragment Loaded;
#endif

// One record (two tiles of 16 rows x RK columns) times 8 rows. Products are in such an order that one
// never waits for the one before it.
__device__ __forceinline__ void record(u32 at, const u32 (*x)[8], const float* scale, const float* row_scale, float (&acc)[2][4], u32 lane, u32 low, u32 magic) {
  u32 g = lane >> 2, t = lane & 3;
  if constexpr (FORMAT == F_BF16) {
    float sum[2][2][4] = {};
    uint4 w[2][2][2];  // tile, step of 32 columns, row g and g + 8
    u32 row = at + row_of(g) * 128, swizzle = row_of(g);
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) w[m][s][half] = load_shared16(row + m * TILE + half * 1024 + ((4 * s + t) ^ swizzle) * 16);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int m = 0; m < 2; m++) {
          uint4 a = w[m][s][0], b = w[m][s][1];
          mma(sum[s][m], i ? a.z : a.x, i ? b.z : b.x, i ? a.w : a.y, i ? b.w : b.y, x[0][4 * s + 2 * i], x[0][4 * s + 2 * i + 1]);
        }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int c = 0; c < 4; c++) acc[m][c] += sum[0][m][c] + sum[1][m][c];
  }
  if constexpr (FORMAT == F_FP8) {
    float sum[2][2][4] = {};
    uint4 w[2][2][2];  // tile, step of 64 columns, row g and g + 8
    u32 row = at + row_of(g) * 128, swizzle = row_of(g);
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int m = 0; m < 2; m++)
#pragma unroll
        for (int half = 0; half < 2; half++) w[m][s][half] = load_shared16(row + m * TILE + half * 1024 + ((4 * s + t) ^ swizzle) * 16);
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int m = 0; m < 2; m++) {
          uint4 a = w[m][s][0], b = w[m][s][1];
          uint2 top = e4m3x4_to_f16(i == 0 ? a.x : i == 1 ? a.y : i == 2 ? a.z : a.w);
          uint2 bottom = e4m3x4_to_f16(i == 0 ? b.x : i == 1 ? b.y : i == 2 ? b.z : b.w);
          mma_f16(sum[s][m], top.x, bottom.x, top.y, bottom.y, x[s][2 * i], x[s][2 * i + 1]);
        }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int c = 0; c < 4; c++) acc[m][c] += scale[m] * row_scale[c & 1] * (sum[0][m][c] + sum[1][m][c]);
  }
  if constexpr (FORMAT == F_INT4) {
    float sum[2][2][4] = {}, offset[2][4] = {};
    uint4 w[2][2];
    u32 scales[2];
#pragma unroll
    for (int s = 0; s < 2; s++)
#pragma unroll
      for (int m = 0; m < 2; m++) w[m][s] = load_shared16(at + m * TILE + s * 512 + lane * 16);
#pragma unroll
    for (int m = 0; m < 2; m++) scales[m] = load_shared4(at + m * TILE + 1024 + g * 4);
#pragma unroll
    for (int j = 0; j < 4; j++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
#pragma unroll
        for (int m = 0; m < 2; m++) {
          uint4 v = w[m][s];
          u32 q = j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w;
          // 128 + code, as bf16
          mma(sum[s][m], and_or(q, low, magic), and_or(q >> 4, low, magic), and_or(q >> 8, low, magic), and_or(q >> 12, low, magic), x[s][2 * j], x[s][2 * j + 1]);
        }
        // 136 times the sum of x: what 128 and the zero point have added
        mma(offset[s], 0x43084308u, 0x43084308u, 0x43084308u, 0x43084308u, x[s][2 * j], x[s][2 * j + 1]);
      }
#pragma unroll
    for (int m = 0; m < 2; m++) {
      float s0 = __uint_as_float(scales[m] << 16), s1 = __uint_as_float(scales[m] & 0xffff0000u);
#pragma unroll
      for (int c = 0; c < 4; c++) acc[m][c] += (c < 2 ? s0 : s1) * ((sum[0][m][c] - offset[0][c]) + (sum[1][m][c] - offset[1][c]));
    }
  }
  if constexpr (FORMAT == F_MXFP4) {
    float sum[2][2][4] = {};
    uint4 w[2];
    u32 scales[2];
#pragma unroll
    for (int m = 0; m < 2; m++) w[m] = load_shared16(at + m * TILE + lane * 16);
#pragma unroll
    for (int m = 0; m < 2; m++) scales[m] = load_shared4(at + m * TILE + 512 + g * 4);
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
      for (int s = 0; s < 2; s++)
#pragma unroll
        for (int m = 0; m < 2; m++) {
          int j = 2 * s + i;
          u32 v = j == 0 ? w[m].x : j == 1 ? w[m].y : j == 2 ? w[m].z : w[m].w;
          u32 a3 = ((v << 1) & 0x80008000u) | ((v >> 5) & 0x01000100u) | ((v >> 4) & 0x00C000C0u);
          mma(sum[s][m], v & 0x81C081C0u, (v << 3) & 0x81C081C0u, (v << 6) & 0x81C081C0u, a3, x[0][2 * j], x[0][2 * j + 1]);
        }
#pragma unroll
    for (int m = 0; m < 2; m++)
#pragma unroll
      for (int s = 0; s < 2; s++) {
        float s0 = __uint_as_float((s ? scales[m] << 15 : scales[m] << 23) & 0x7f800000u);
        float s1 = __uint_as_float((s ? scales[m] >> 1 : scales[m] << 7) & 0x7f800000u);
#pragma unroll
        for (int c = 0; c < 4; c++) acc[m][c] += (c < 2 ? s0 : s1) * sum[s][m][c];
      }
  }
}

// A block's plan: entries {expert, first of its rows in `order`, rows}; `order` holds slots.
struct Entries {
  u32 count;
  u16 expert[MAX_SLOTS], first[MAX_SLOTS], order[MAX_SLOTS];
  u8 rows[MAX_SLOTS];
};

// At most 32 slots: by one warp.
__device__ __forceinline__ void plan_warp(const Few& p, const u32* ids, Entries& e, u32 lane) {
  u32 id = lane < p.slots ? ids[lane] : NO_EXPERT;
  bool valid = id < EXPERTS;
#if GATE
  if (p.slots == CHOICES) {  // the router's choices of one token are all different
    u32 all = __ballot_sync(~0u, valid), entry = __popc(all & ((1u << lane) - 1));
    if (valid) e.expert[entry] = (u16)id, e.first[entry] = (u16)entry, e.rows[entry] = 1, e.order[entry] = (u16)lane;
    if (lane == 0) e.count = __popc(all);
    return;
  }
#endif
  u32 same = __match_any_sync(~0u, valid ? id : 0x80000000u | lane), leader = __ffs(same) - 1, rows = __popc(same);
  bool leads = valid && lane == leader;
  u32 tiles = leads ? (rows + 7) / 8 : 0, own = leads ? rows : 0, tile = tiles, row = own;
#pragma unroll
  for (u32 d = 1; d < 32; d <<= 1) {
    u32 a = __shfl_up_sync(~0u, tile, d), b = __shfl_up_sync(~0u, row, d);
    if (lane >= d) tile += a, row += b;
  }
  if (lane == 31) e.count = tile;
  tile -= tiles, row -= own;
  if (leads)
    for (u32 i = 0; i < tiles; i++) {
      e.expert[tile + i] = (u16)id;
      e.first[tile + i] = (u16)(row + 8 * i);
      e.rows[tile + i] = (u8)(rows - 8 * i < 8 ? rows - 8 * i : 8);
    }
  u32 base = __shfl_sync(~0u, row, leader);
  if (valid) e.order[base + __popc(same & ((1u << lane) - 1))] = (u16)lane;
}

// At most OWN_PLAN slots: sorted by expert, by the rank of (expert, slot) among all. One slot a thread.
__device__ __forceinline__ void plan_sorted(const Few& p, const u32* ids, Entries& e, u32* memory) {
  u32 *keys = memory, *sorted = keys + OWN_PLAN, *starts = sorted + OWN_PLAN, *firsts = starts + OWN_PLAN / 32;
  const u32 i = threadIdx.x, lane = i & 31, words = (p.slots + 31) / 32;
  u32 key = ~0u;
  if (i < OWN_PLAN) {
    u32 id = i < p.slots ? ids[i] : NO_EXPERT;
    if (id < EXPERTS) key = id << 7 | i;
    keys[i] = key, sorted[i] = ~0u;
  }
  __syncthreads();
  if (key != ~0u) {
    u32 rank = 0;
#pragma unroll 4
    for (u32 j = 0; j < words * 8; j++) {
      uint4 k = ((const uint4*)keys)[j];
      rank += (k.x < key) + (k.y < key) + (k.z < key) + (k.w < key);
    }
    sorted[rank] = key;
  }
  __syncthreads();
  // position i of the sorted slots from here on
  u32 id = NO_EXPERT;
  if (i < OWN_PLAN) {
    key = sorted[i];
    id = key == ~0u ? NO_EXPERT : key >> 7;
    u32 before = i ? sorted[i - 1] >> 7 : NO_EXPERT;
    // where the planned ones end, a start, too
    u32 start = __ballot_sync(~0u, key == ~0u || i == 0 || id != before);
    if (lane == 0) starts[i >> 5] = start;
    if (key != ~0u) e.order[i] = (u16)(key & 127);
  }
  __syncthreads();
  u32 rows = 0;
  if (i < OWN_PLAN) {
    // of the expert's slots: the first at or before this position, and the end
    u32 at = i >> 5, bits = starts[at] & (2u << lane) - 1, end = OWN_PLAN;
    while (!bits) bits = starts[--at];
    u32 first = at * 32 + 31 - __clz(bits);
    at = i >> 5, bits = starts[at] & ~((2u << lane) - 1);
    while (!bits && ++at < OWN_PLAN / 32) bits = starts[at];
    if (bits) end = at * 32 + __ffs(bits) - 1;
    if (id != NO_EXPERT && (i - first) % 8 == 0) rows = end - i < 8 ? end - i : 8;
    u32 own = __ballot_sync(~0u, rows != 0);
    if (lane == 0) firsts[i >> 5] = own;
  }
  __syncthreads();
  if (i < OWN_PLAN) {
    u32 entry = __popc(firsts[i >> 5] & (1u << lane) - 1);
    for (u32 w = 0; w < i >> 5; w++) entry += __popc(firsts[w]);
    if (rows) e.expert[entry] = (u16)id, e.first[entry] = (u16)i, e.rows[entry] = (u8)rows;
    if (i == OWN_PLAN - 1) e.count = entry + (rows != 0);
  }
}

// More slots: from the plan's kernel.
__device__ __forceinline__ void plan_block(const Few& p, Entries& e) {
  u32 total = *p.tile_count, planned = p.offsets[EXPERTS];
  for (u32 i = threadIdx.x; i < total; i += THREADS) {
    uint2 tile = p.tiles[i];
    u32 rows = p.offsets[tile.x + 1] - tile.y;
    e.expert[i] = (u16)tile.x;
    e.first[i] = (u16)tile.y;
    e.rows[i] = (u8)(rows < 8 ? rows : 8);
  }
  for (u32 i = threadIdx.x; i < planned; i += THREADS) e.order[i] = (u16)p.order[i];
  if (threadIdx.x == 0) e.count = total;
}

// The units of both phases, and how a block walks over them.
struct Units {
  u32 units[2], count[2], step_entry[2], step_group[2], start[2];
};
// A walk over them, the same for the filling and the emptying side of a ring.
struct Walk {
  u32 phase, unit, entry, group;  // phase 2: done

  __device__ __forceinline__ void enter(const Units& of, u32 to) {
    phase = to;
    if (phase == 0 && of.start[0] >= of.count[0]) phase = 1;
    if (phase == 1 && of.start[1] >= of.count[1]) phase = 2;
    if (phase == 2) return;
    // selected, not indexed: an index would put the arrays into memory
    u32 n = phase == 0 ? of.units[0] : of.units[1];
    unit = phase == 0 ? of.start[0] : of.start[1];
    entry = unit / n;
    group = unit - entry * n;
  }
  __device__ __forceinline__ void next(const Units& of) {
    bool one = phase == 0;
    unit += GRID;
    group += one ? of.step_group[0] : of.step_group[1];
    entry += one ? of.step_entry[0] : of.step_entry[1];
    u32 n = one ? of.units[0] : of.units[1];
    if (group >= n) group -= n, entry++;
    if (unit >= (one ? of.count[0] : of.count[1])) enter(of, phase + 1);
  }
};

// Waits until others have counted to n.
__device__ __forceinline__ void wait_for(const u32* counter, u32 n) {
  if (threadIdx.x == 0)
    while (load_acquire(counter) < n) {}
  __syncthreads();
}

#if FORMAT == 1
// Four values as codes, in two registers of a fragment.
__device__ __forceinline__ uint2 quantised(const u32* x, float scale, float inverse) {
  float v[4];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    // the quotient, rounded once
    float f = __uint_as_float(x[c]), near = __fmul_rn(f, inverse);
    v[c] = __fmaf_rn(__fmaf_rn(-near, scale, f), inverse, near);
  }
  return e4m3x4_to_f16(e4m3x4(v));
}
// 8 rows x 128 columns of floats, each row by itself, as codes, with the scales of the two rows that this lane has sums of.
// `one`: all rows are the same, and each lane has four values of it, those of registers 2 g and 2 g + 1.
__device__ __forceinline__ void quantise(const u32 (&x)[2][16], bool one, Fragment& to, u32 lane) {
  u32 most = 0;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    u32 bits = x[0][i] & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
  if (one) {
    float scale = e4m3_scale_of(__reduce_max_sync(~0u, most));
    uint2 own = quantised(x[0], scale, __frcp_rn(scale));
#pragma unroll
    for (int i = 0; i < 8; i++) {
      to.x[i / 4][i % 4 * 2] = __shfl_sync(~0u, own.x, 4 * i + (lane & 3));
      to.x[i / 4][i % 4 * 2 + 1] = __shfl_sync(~0u, own.y, 4 * i + (lane & 3));
    }
    to.row_scale[0] = to.row_scale[1] = scale;
    return;
  }
#pragma unroll
  for (int i = 4; i < 32; i++) {
    u32 bits = x[i / 16][i % 16] & 0x7fffffffu;
    most = bits > most ? bits : most;
  }
#pragma unroll
  for (int d = 1; d < 4; d <<= 1) {
    u32 other = __shfl_xor_sync(~0u, most, d);
    most = other > most ? other : most;
  }
  float scale = e4m3_scale_of(most), inverse = __frcp_rn(scale);
#pragma unroll
  for (int i = 0; i < 8; i++) {
    uint2 w = quantised(&x[i / 4][i % 4 * 4], scale, inverse);
    to.x[i / 4][i % 4 * 2] = w.x, to.x[i / 4][i % 4 * 2 + 1] = w.y;
  }
#pragma unroll
  for (int c = 0; c < 2; c++) to.row_scale[c] = __shfl_sync(~0u, scale, 4 * (2 * (lane & 3) + c));
}
#endif

// 128 values of a row, four in each lane, as codes and their scale.
__device__ __forceinline__ void to_codes(const float (&v)[4], u16* to, float* scale_to, u32 lane) {
  float scale = e4m3_scale(v);
  *(uint2*)(to + 4 * lane) = e4m3x4_to_f16(to_e4m3x4(v, scale));
  if (lane == 0) *scale_to = scale;
}

#if GATE
// A logit of the gate, by one warp: as `linear` computes it. `copies` of it are told to all blocks.
__device__ __forceinline__ void logit(const Few& p, const Gate& g, u32 t, u32 o, u32 tokens, u32 copies, u32 lane) {
  const Rows& w = g.weight;
  const u16* row = p.x + (u64)t * p.x_stride;
  float sum[1][1] = {};
  if (w.type == BF16) {
    const u16* output = (const u16*)w.data + (u64)o * w.stride;
    // eight runs of 8 columns are on the way at once; what lies beyond the row adds nothing
#pragma unroll 1
    for (u32 k0 = lane * 8; k0 < HIDDEN; k0 += 2048) {
      uint4 xs[8], ws[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        u32 k = k0 + 256 * i;
        xs[i] = load_global16_if(row + k, k < HIDDEN), ws[i] = load_global16_if(output + k, k < HIDDEN);
      }
      for (u32 k = k0 + 2048; k < k0 + 4096 && k < HIDDEN; k += 256) prefetch(output + k);
#pragma unroll
      for (int i = 0; i < 8; i++) {
        u32 a[4] = {xs[i].x, xs[i].y, xs[i].z, xs[i].w}, b[4] = {ws[i].x, ws[i].y, ws[i].z, ws[i].w};
#pragma unroll
        for (int c = 0; c < 4; c++) {
          sum[0][0] = fmaf(bf16_to_f32(a[c] & 0xffff), bf16_to_f32(b[c] & 0xffff), sum[0][0]);
          sum[0][0] = fmaf(bf16_to_f32(a[c] >> 16), bf16_to_f32(b[c] >> 16), sum[0][0]);
        }
      }
    }
#pragma unroll
    for (int d = 16; d; d >>= 1) sum[0][0] += __shfl_xor_sync(~0u, sum[0][0], d);
  } else {
    Rows x = {(void*)p.x, p.x_stride, BF16, p.slots / CHOICES, HIDDEN}, wide = {w.data, w.stride, F32, GATE_OUTPUTS, w.cols};
    u64 rows[1] = {(u64)t * x.stride}, outputs[1] = {(u64)o * w.stride};
    dots<1, 1>(x, rows, wide, outputs, true, lane, sum);
  }
  float v = sum[0][0] + (g.bias ? g.bias[o] : 0.f);
  if (lane == 0) g.logits[(u64)t * GATE_OUTPUTS + o] = v;
  if (lane < copies) tell(p.counters + TOLD + (lane * tokens + t) * GATE_OUTPUTS + o, ~__float_as_uint(v));
  // a number that is not finite leaves no logit finite
  if (!finite(v))
    for (u32 c = lane; c < HIDDEN; c += 32) {
      float v = bf16_to_f32(row[c]);
      if (!finite(v)) raise_fault(g.fault, FAULT_HIDDEN, t, c, __float_as_uint(v));
    }
}

// The float of a key; see key_of.
__device__ __forceinline__ float of_key(u32 key) { return __uint_as_float(key >> 31 ? key ^ 0x80000000u : ~key); }

// Keys that a lane has.
enum { KEYS = (GATE_OUTPUTS + 31) / 32 };

// The experts of a row, best first, by its logits alone, by one warp: once they are all told if it is to `wait`, else
// by those that are `there`.
// False where that may not be how the router chooses: a logit that is not finite, or two whose scores might be equal
// once rounded. The lowest 8 bits of a key make room for the lowest id; logits that differ in these alone are no sure
// choice.
__device__ __forceinline__ bool choose(const u32* told, float multiplier, u32* chosen, bool wait, bool& there, u32 lane) {
  const u32 logits = GATE_OUTPUTS, top_k = GATE_TOP_K;
  u32 keys[KEYS];
  bool fine = true, all;
  do {
    all = true;
#pragma unroll
    for (int i = 0; i < KEYS; i++) {
      u32 e = 32 * i + lane;
      keys[i] = listen_if(told + e, e < logits);
      all &= keys[i] != 0 || e >= logits;
    }
  } while (!__all_sync(~0u, all) && wait);
  there &= all;
#pragma unroll
  for (int i = 0; i < KEYS; i++) {
    u32 e = 32 * i + lane;
    float v = __uint_as_float(~keys[i]);
    if (SCORE == LOGITS) v = (float)((double)v * (double)multiplier);
    if (e < logits) fine &= finite(v);
    keys[i] = e < logits ? (key_of(v) & ~255u) | (255 - e) : 0;
  }
  u32 own = 0;  // the lane-th best
  const u32 rounds = top_k < logits ? top_k + 1 : top_k;
#pragma unroll 1
  for (u32 j = 0; j < rounds; j++) {
    u32 most = 0;
#pragma unroll
    for (int i = 0; i < KEYS; i++) most = keys[i] > most ? keys[i] : most;
    most = __reduce_max_sync(~0u, most);
#pragma unroll
    for (int i = 0; i < KEYS; i++)
      if (keys[i] == most) keys[i] = 0;
    if (lane == j) own = most;
  }
  if (lane < top_k) chosen[lane] = 255 - (own & 255);
  const u32 next = __shfl_down_sync(~0u, own, 1), best = __shfl_sync(~0u, own, 0);
  if (lane + 1 < rounds) {
    fine &= own >> 8 != next >> 8;
    if (SCORE == SOFTMAX) {
      // f32 scores differ if logits do by more than 2^-22, and are normal
      fine &= (of_key(own & ~255u) - of_key(next | 255)) * multiplier > 4.8e-7f;
      fine &= (of_key(best | 255) - of_key(next & ~255u)) * multiplier < 60.f;
    }
  }
  return __all_sync(~0u, fine);
}
#endif

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS)
    few(const __grid_constant__ Few p,
#if GATE
        const __grid_constant__ Gate g,
#endif
        const __grid_constant__ TensorMap gate, const __grid_constant__ TensorMap up, const __grid_constant__ TensorMap down) {
  extern __shared__ __align__(1024) u8 memory[];
  float* partial = (float*)(memory + WARPS * STAGES * STAGE);  // [2][WARPS][2 tiles][128]
  u64* barriers = (u64*)(partial + 2 * WARPS * 256);
  Entries& entries = *(Entries*)(barriers + WARPS * STAGES);
  const u32 tid = threadIdx.x, warp = tid >> 5, lane = tid & 31;
  const u32 ring = shared_address(memory) + warp * STAGES * STAGE, full = shared_address(barriers) + 8 * STAGES * warp;
  STAMPS_BEGIN
  STAMP(0);
  if (lane == 0) {
    for (int i = 0; i < STAGES; i++) barrier_init(full + 8 * i, 1);
    barrier_init_done();
    if (NATURAL) prefetch_map(&gate), prefetch_map(&up), prefetch_map(&down);
  }
  const u32 tokens = p.slots / CHOICES;
  __shared__ u32 chosen[OWN_PLAN];  // ids of slots, for a plan of one's own
#if GATE
  const bool by_logit = SELECTION == TOP_K && CORRECTION == NO_CORRECTION && !ROUTER_GROUPS && !SOFT_CAP &&
                        (SCORE == SOFTMAX || SCORE == LOGITS) && GATE_OUTPUTS <= MOST_TOLD && GATE_OUTPUTS == g.router.choices &&
                        CHOICES < 32 && tokens <= WARPS && g.router.multiplier > 0.f;
  const u32 copies = !by_logit ? 0 : tokens == 1 ? 4 : 1;  // of told logits, that not all blocks read the same lines
#endif
  __shared__ uint2 kept;  // tokens, and words that are told; looked up at the end, for want of registers
  if (tid == 0) {
    kept.x = tokens;
#if GATE
    kept.y = copies * tokens * GATE_OUTPUTS;
#endif
  }
#if GATE || FORMAT == 1
  {
    const u32 all = GRID * WARPS;
#if GATE
    // a warp has one output of the gate, and some of the rows
    const u32 outputs = GATE_OUTPUTS, together = tokens * outputs <= all ? 1 : (tokens * outputs + all - 1) / all;
    const u32 parts = together == 1 ? tokens : (tokens + together - 1) / together, logits = outputs * parts;
#else
    const u32 logits = 0;
#endif
    const u32 groups = FORMAT == F_FP8 ? HIDDEN / 128 : 0;
#pragma unroll 1
    for (u32 i = warp * GRID + blockIdx.x; i < logits + tokens * groups; i += all) {
#if GATE
      if (i < logits) {
        u32 part = parts == 1 ? 0 : i % parts, end = (part + 1) * together < tokens ? (part + 1) * together : tokens;
#pragma unroll 1
        for (u32 t = part * together; t < end; t++) logit(p, g, t, parts == 1 ? i : i / parts, tokens, copies, lane);
      }
#endif
#if FORMAT == 1
#if GATE
      if (i >= logits)
#endif
      {
        u32 t = (i - logits) / groups, group = (i - logits) % groups;
        uint2 v = *(const uint2*)(p.x + t * p.x_stride + group * 128 + lane * 4);
        float f[4] = {bf16_to_f32(v.x & 0xffff), bf16_to_f32(v.x >> 16), bf16_to_f32(v.y & 0xffff), bf16_to_f32(v.y >> 16)};
        to_codes(f, p.rows + (u64)t * HIDDEN + group * 128, p.row_scales + (u64)t * groups + group, lane);
        __syncwarp();
        if (lane == 0) add_release(p.counters + CODES);
      }
#endif
    }
    STAMP(1);
#if GATE
    __syncthreads();
    if (tid == THREADS - 32) add_release(p.counters + BEFORE);
#endif
  }
#endif
  // this warp's records: of all in phase 1, of those of its group in phase 2
  const u32 records1 = HIDDEN / RK, records2 = INNER / RK, teams = WARPS / SPLIT;
  const u32 part = warp % SPLIT, team = warp / SPLIT, groups2 = HIDDEN / 32;
  // Streams are cut into runs, one a warp. Of rows that lie where the checkpoint has them, warps take
  // every WARPS-th record: what they read at one time lies together.
  __shared__ uint2 runs[WARPS][2];  // first and end; looked up, for want of registers, as
  __shared__ u32 finished[WARPS];   // the units that a warp has finished
  if (lane == 0) {
    finished[warp] = 0;
    runs[warp][0] = NATURAL ? make_uint2(0, (records1 + WARPS - 1 - warp) / WARPS) : make_uint2(records1 * warp / WARPS, records1 * (warp + 1) / WARPS);
    runs[warp][1] = NATURAL ? make_uint2(0, (records2 + SPLIT - 1 - part) / SPLIT) : make_uint2(records2 * part / SPLIT, records2 * (part + 1) / SPLIT);
  }
  __syncwarp();
  auto record_at = [&](u32 r, bool one) { return !NATURAL ? r : one ? r * WARPS + warp : r * SPLIT + part; };
  Units of;
  of.units[0] = INNER / 16, of.units[1] = groups2 / teams;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    of.step_entry[i] = GRID / of.units[i];
    of.step_group[i] = GRID - of.step_entry[i] * of.units[i];
  }
  of.start[0] = blockIdx.x;
  Walk to, from;  // the emptying and the filling side
  to.phase = from.phase = 2;
  u32 filled = 0, slot_in = 0, room = STAGES;
  auto fill = [&]() {
    if (from.phase > 1) return;
    bool one = from.phase == 0;
    const uint2 run = runs[warp][one ? 0 : 1];
    u32 r = run.x + filled, end = run.y, n = end > r ? end - r : 0;
    n = n < RECORDS ? n : RECORDS;
    if (lane == 0) {
      const u64 once = read_once();  // code and rows of the next launch stay in the cache
      u32 barrier = full + 8 * slot_in, at = ring + slot_in * STAGE, expert = entries.expert[from.entry];
      barrier_expect(barrier, n * 2 * TILE);
      if constexpr (NATURAL) {
        for (u32 i = 0; i < n; i++) {
          u32 k = record_at(r + i, one) * RK;
          if (one) {
            copy_tile(at + i * 2 * TILE, &gate, barrier, k, expert * p.gate_rows + from.group * 16, once);
            copy_tile(at + i * 2 * TILE + TILE, &up, barrier, k, expert * p.up_rows + from.group * 16, once);
          } else copy_tile(at + i * 2 * TILE, &down, barrier, k, expert * p.down_rows + (from.group * teams + team) * 32, once);
        }
      } else {
        u32 groups = one ? of.units[0] : groups2, group = one ? from.group : from.group * teams + team;
        const u8* source = (one ? p.first : p.second) + (((u64)expert * groups + group) * (one ? records1 : records2) + r) * (2 * TILE);
        if (n) copy_bytes(at, source, n * 2 * TILE, barrier, once);
      }
    }
    if (++slot_in == STAGES) slot_in = 0;
    filled += RECORDS;
    if (r + RECORDS >= end) filled = 0, from.next(of);
  };
  u32* done = p.counters;
  u32 ready = NO_EXPERT;
  Loaded rows;          // of the next stage
  bool loaded = false;  // they are there, or on the way
  u32 r = 0, end = 0;
  const u16* row = 0;
  u32 scale_at = 0, row_scale_at[2] = {};  // numbers of scales: pointers would be too many registers
  bool single = false;  // the unit has one row
  // where this lane's row is read in the unit that `w` stands at; waits for the first product
  auto enter_unit = [&](const Walk& w) {
    const u32 rows = entries.rows[w.entry];
    single = rows == 1;
    if (w.phase == 1 && ready != w.entry) {
      if (lane == 0)
        while (load_acquire(done + w.entry * LINE) < of.units[0]) {}
      __syncwarp();
      ready = w.entry;
    }
    auto slot_of = [&](u32 c) -> u32 { return entries.order[entries.first[w.entry] + (c < rows ? c : rows - 1)]; };
    u32 s = slot_of(lane >> 2);
    if (w.phase == 1) row = (const u16*)p.h + (u64)s * INNER * (FORMAT == F_FP8 ? 2 : 1);
    else row = FORMAT == F_FP8 ? p.rows + (u64)(s / CHOICES) * HIDDEN : p.x + (u64)(s / CHOICES) * p.x_stride;
    if constexpr (FORMAT == F_FP8) {
#pragma unroll
      for (u32 c = 0; c < 2; c++) row_scale_at[c] = slot_of((lane & 3) * 2 + c) / CHOICES * records1;
      u32 expert = entries.expert[w.entry];
      if (w.phase == 0) scale_at = expert * p.gate_scale_step + w.group * 16 / 128 * records1;
      else scale_at = expert * p.down_scale_step + (w.group * teams + team) * 32 / 128 * records2;
    }
  };
  auto load_rows = [&](Loaded& f, u32 r, u32 end) {
    u32 t = lane & 3;
    bool one = to.phase == 0;
#if FORMAT == 1
    if (!one && single) {
      if (r < end) {
        u32 g = lane >> 2;
        uint4 v = load_global16((const float*)row + record_at(r, one) * RK + g / 4 * 64 + 16 * t + g % 4 * 4);
        f.x[0][0] = v.x, f.x[0][1] = v.y, f.x[0][2] = v.z, f.x[0][3] = v.w;
      }
    } else if (!one) {
#pragma unroll
      for (int i = 0; i < STEPS; i++)
        if (r + i / 2 < end) {
          const float* q = (const float*)row + record_at(r + i / 2, one) * RK + i % 2 * 64 + 16 * t;
#pragma unroll
          for (int j = 0; j < 4; j++) {
            uint4 v = load_global16(q + 4 * j);
            f.x[i][4 * j] = v.x, f.x[i][4 * j + 1] = v.y, f.x[i][4 * j + 2] = v.z, f.x[i][4 * j + 3] = v.w;
          }
        }
    } else
#endif
#pragma unroll
    for (int i = 0; i < STEPS; i++)
      if (r + i / (RK / 64) < end) {
        const u16* q = row + record_at(r + i / (RK / 64), one) * RK + i % (RK / 64) * 64 + (FORMAT == F_FP8 ? 16 : 8) * t;
        uint4 v0 = load_global16(q), v1 = load_global16(q + (FORMAT == F_FP8 ? 8 : 32));
        f.x[i][0] = v0.x, f.x[i][1] = v0.y, f.x[i][2] = v0.z, f.x[i][3] = v0.w;
        f.x[i][4] = v1.x, f.x[i][5] = v1.y, f.x[i][6] = v1.z, f.x[i][7] = v1.w;
      }
#if FORMAT == 1
    if (r < end) {
      u32 k = record_at(r, one);
      f.scale[0] = __ldg((one ? p.gate_scales : p.down_scales) + scale_at + k);
      f.scale[1] = one ? __ldg(p.up_scales + scale_at + k) : f.scale[0];
      if (one) f.row_scale[0] = load_global4(p.row_scales + row_scale_at[0] + k), f.row_scale[1] = load_global4(p.row_scales + row_scale_at[1] + k);
    }
#endif
  };
  // The plan of the ids in `chosen`, of at most OWN_PLAN slots, or of the plan's kernel; and the first rows.
  auto begin = [&]() {
    if (p.slots > OWN_PLAN) plan_block(p, entries);
    else if (p.slots > 32) plan_sorted(p, chosen, entries, (u32*)partial);
    else if (warp == 0) plan_warp(p, chosen, entries, lane);
#if FORMAT == 1 && !GATE
    if (tid == 32)
      while (load_acquire(p.counters + CODES) < tokens * (HIDDEN / 128)) {}
#endif
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) of.count[i] = of.units[i] * entries.count;
    // blocks that had one unit less in phase 1 begin phase 2
    of.start[1] = (blockIdx.x + GRID - of.count[0] % GRID) % GRID;
    to.enter(of, 0);
    from = to;
    if (to.phase == 2) return;
    r = runs[warp][to.phase].x, end = runs[warp][to.phase].y;
    // Rows are asked for ahead of the first weights: behind them they would wait for them all.
    loaded = to.phase == 0;
    if (loaded) enter_unit(to), load_rows(rows, r, end);
  };
  // What the first product waits for comes first: the second one's weights are asked for after a stage of it. (Of bf16
  // that is late.)
  auto ask = [&]() {
#pragma unroll 1
    for (; room && (FORMAT == F_BF16 || from.phase == to.phase); room--) fill();
    STAMP(4);
  };
  auto fetch_ids = [&]() {
    if (p.slots > OWN_PLAN) return;
    for (u32 i = tid; i < p.slots; i += THREADS) chosen[i] = __ldcg(p.ids + i);
    __syncthreads();
  };
#if GATE
  // One block routes a token: one of those that have the least to do.
  auto route = [&]() {
    for (u32 t = GRID - 1 - blockIdx.x; t < tokens; t += GRID) {
      wait_for(p.counters + BEFORE, GRID);
      // what is known when the kernel is compiled leaves little code to fetch
      Router r = g.router;
      r.score = SCORE, r.correction = CORRECTION, r.selection = SELECTION, r.weight_from = WEIGHT_FROM, r.renormalise = RENORMALISE;
      if (!ROUTER_GROUPS) r.groups = 0;
      if (!SOFT_CAP) r.soft_cap = 0.f;
      if (CORRECTION == NO_CORRECTION) r.bias = 0;
      if (!PER_EXPERT) r.per_expert = 0;
      if (WEIGHT_FROM != JOINT_SOFTMAX) r.logits = r.choices;
      // the sums' room is free until the first unit is done
      route_token(t, g.logits, GATE_OUTPUTS, r, 0, 0, (u32*)p.ids, (float*)p.weights, g.shared_weights, g.fault, (u8*)partial);
      __syncthreads();
      if (tid == 0) add_release(p.counters + ROUTED);
    }
  };
  // While logits are missing, all is done once with those that are there but asking for weights: so the code that does
  // it has been fetched when it counts. Each part stands once in the code.
  __shared__ u8 seen[WARPS];  // 1: a warp misses something; 2: its choice is not sure
  bool looking = by_logit, asked = false;
  bool tried = blockIdx.x < tokens * GATE_OUTPUTS;  // those that had a part of the gate would be late
#pragma unroll 1
  for (;;) {
    if (looking) {
      bool there = true, sure = true;
      for (u32 t = warp; t < tokens; t += WARPS)
        sure &= choose(p.counters + TOLD + (blockIdx.x % copies * tokens + t) * GATE_OUTPUTS, g.router.multiplier, chosen + t * CHOICES, tried, there, lane);
#if FORMAT == 1
      if (warp == 1 && lane == 0) {
        bool all;
        do all = load_acquire(p.counters + CODES) >= tokens * (HIDDEN / 128);
        while (!all && tried);
        there &= all;
      }
#endif
      u32 missed = __any_sync(~0u, !there);
      if (lane == 0) seen[warp] = (u8)(missed | (u32)!sure << 1);
      if (tokens > 1) __syncthreads();
      else __syncwarp();
    } else {
      route();
      if (asked) break;
      wait_for(p.counters + ROUTED, tokens);
      fetch_ids();
    }
    begin();
    u32 state = 0;
    if (looking) {
#pragma unroll
      for (int w = 0; w < WARPS; w++) state |= seen[w];
    }
    if (!state) {
      STAMP(3);
      ask();
      if (!looking) break;
      asked = true;
    }
    if (!(state & 1)) looking = false;  // to the router: for the weights, or as it is not sure
    else {
      tried = true;
      __syncthreads();  // all have read the plan
    }
  }
#else
  fetch_ids();
  begin();
  ask();
#endif

  u32 low, magic;  // kept in registers: with immediates every use becomes two instructions
  asm volatile("mov.u32 %0, 0x000f000f; mov.u32 %1, 0x43004300;" : "=r"(low), "=r"(magic));
  u32 slot_out = 0, parity = 0;
  if (to.phase < 2) {
    float acc[2][4] = {};
    // One stage with these rows; those of the next stage are loaded ahead. True at a unit's end. One copy of this code
    // for all stages costs a few moves, and is half as much to fetch.
    auto step = [&](u32 phase) -> bool {
      Fragment now;
#if FORMAT == 1
      static_assert(STEPS == 2, "a record of 128 columns");
      if (phase) quantise(rows.x, single, now, lane);
      else {
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int q = 0; q < 8; q++) now.x[s][q] = rows.x[s][q];
        now.row_scale[0] = rows.row_scale[0], now.row_scale[1] = rows.row_scale[1];
      }
      now.scale[0] = rows.scale[0], now.scale[1] = rows.scale[1];
#else
      now = rows;
      if (FORMAT == F_MXFP4 && phase == 0) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
          for (int q = 0; q < 8; q++) now.x[i][q] = times_bf16x2(now.x[i][q], 0x71807180u);
      }
#endif
      const bool last = r + RECORDS >= end;
      u32 r_next = r + RECORDS, end_next = end;
      if (last) {
        to.next(of);
        const uint2 run = runs[warp][to.phase != 0];
        r_next = run.x, end_next = run.y;
        // A block publishes its own last unit before it waits for others: no look ahead over the change.
        if (to.phase == phase) {
          enter_unit(to);
          load_rows(rows, r_next, end_next);
        }
      } else load_rows(rows, r_next, end_next);
      barrier_wait(full + 8 * slot_out, parity);
      STAMP_FIRST(5);
#pragma unroll
      for (int i = 0; i < RECORDS; i++)
        if (r + i < end) {
#if FORMAT == 1
          const float *scale = now.scale, *row_scale = now.row_scale;
#else
          const float *scale = 0, *row_scale = 0;
#endif
          record(ring + slot_out * STAGE + i * 2 * TILE, &now.x[i * (RK / 64)], scale, row_scale, acc, lane, low, magic);
        }
      if (++slot_out == STAGES) slot_out = 0, parity ^= 1;
      __syncwarp();
#pragma unroll 1
      for (room++; room; room--) fill();
      r = r_next, end = end_next;
      return last;
    };
    auto finish = [&](u32 phase, u32 entry, u32 group) {
      const u32 units = finished[warp];
      float* mine = partial + (units % 2 * WARPS + warp) * 256;
#pragma unroll
      for (int m = 0; m < 2; m++) {
        *(float4*)(mine + m * 128 + lane * 4) = make_float4(acc[m][0], acc[m][1], acc[m][2], acc[m][3]);
        acc[m][0] = acc[m][1] = acc[m][2] = acc[m][3] = 0.f;
      }
      __syncthreads();
      if (units % WARPS == warp) {  // one warp finishes the unit, in turn; the others go on
        const float* all = partial + units % 2 * WARPS * 256;
        const u32 expert = entries.expert[entry], first = entries.first[entry], rows_now = entries.rows[entry];
        // where row and column of a tile lie in a warp's accumulators
        auto place = [&](u32 row, u32 column) { return lane_row_of(row & 7) * 16 + (column >> 1) * 4 + (row >> 3) * 2 + (column & 1); };
        if (phase == 0) {
          Activation activation = p.activation;
          activation.kind = ACTIVATION, activation.gated = 1;
          for (u32 i = lane; i < 16 * rows_now; i += 32) {
            u32 column = i >> 4, feature = group * 16 + (i & 15), at = place(i & 15, column);
            float g = 0, u = 0;
#pragma unroll
            for (int w = 0; w < WARPS; w++) g += all[w * 256 + at], u += all[w * 256 + 128 + at];
            g *= UNSCALE, u *= UNSCALE;
            if (p.gate_bias) g += p.gate_bias[(u64)expert * INNER + feature];
            if (p.up_bias) u += p.up_bias[(u64)expert * INNER + feature];
            float v = activate_16(activation, g, u);
            u64 at_h = (u64)entries.order[first + column] * INNER + feature;
            if (FORMAT == F_MXFP4) v *= TO_LARGE;
            if (FORMAT == F_FP8) ((float*)p.h)[at_h] = v;
            else ((u16*)p.h)[at_h] = f32_to_bf16(v);
          }
          __syncwarp();
          if (lane == 0) add_release(done + entry * LINE);
        } else {
          u32 features = teams * 32;
          for (u32 column = 0; column < rows_now; column++)
            for (u32 i = lane; i < features; i += 32) {
              u32 feature = group * features + i, at = (i >> 4 & 1) * 128 + place(i & 15, column);
              float sum = 0;
              for (u32 w = 0; w < SPLIT; w++) sum += all[((i >> 5) * SPLIT + w) * 256 + at];
              sum *= UNSCALE;
              if (p.down_bias) sum += p.down_bias[(u64)expert * HIDDEN + feature];
              p.y[(u64)entries.order[first + column] * HIDDEN + feature] = sum;
            }
          __syncwarp();
          if (lane == 0) add_release(done + DOWN);
        }
      }
      __syncwarp();
      if (lane == 0) finished[warp] = units + 1;
      if (to.phase == 1 && phase == 0) {
        STAMP(6);
        loaded = false;  // what the first product makes
      }
    };
    do {
      const u32 phase = to.phase, entry = to.entry, group = to.group;
      if (!loaded) {  // of the second product, once the first one has made them
        enter_unit(to);
        load_rows(rows, r, end);
        loaded = true;
        STAMP(7);
      }
      while (!step(phase)) {}
      finish(phase, entry, group);
    } while (to.phase < 2);
  }
  STAMP(8);
  // Combine, once every down unit is there, and the weights.
#if GATE
  if (tid == 32)
    while (load_acquire(p.counters + ROUTED) < kept.x) {}
#endif
  wait_for(done + DOWN, of.count[1]);
  STAMP(9);
  for (u32 i = blockIdx.x * THREADS + tid; i < kept.x * HIDDEN; i += GRID * THREADS) {
    u32 t = i / HIDDEN, c = i - t * HIDDEN;
    float sum = 0;
#pragma unroll 8
    for (u32 j = 0; j < CHOICES; j++) {
      u64 s = (u64)t * CHOICES + j;
      bool there = (p.slots > OWN_PLAN ? __ldcg(p.ids + s) : chosen[s]) < EXPERTS;
      float v = load_fresh_if(p.y + s * HIDDEN + c, there), w = __ldcg(p.weights + s);
      if (there) sum = __fadd_rn(sum, __fmul_rn(w, v));
    }
    sum *= p.factor;
    if (!finite(sum)) raise_fault(p.fault, FAULT_OUTPUT, t, c, __float_as_uint(sum));
    store_float(p.out, p.out_type, t * p.out_stride + c, sum);
  }
  STAMP(10);
  STAMPS_END
  // The last block to come here leaves the counters as it found them.
  __syncthreads();
  __shared__ u32 others;
  if (tid == 0) others = atomicAdd(done + LEFT, 1u);
  __syncthreads();
  if (others != GRID - 1) return;
  STAMPS_LAST;
  for (u32 i = tid; i < entries.count; i += THREADS) done[i * LINE] = 0;
#if GATE
  for (u32 i = tid; i < kept.y; i += THREADS) p.counters[TOLD + i] = 0;
#endif
  if (tid < 5) done[DOWN + LINE * tid] = 0;
}
