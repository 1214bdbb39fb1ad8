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
// FP8 weights meet rows that are quantised to E4M3 in groups of 128, before either product: their codes are
// kept as bf16, which holds them exactly, and each group's sum is multiplied by both scales.
//
// GATE 1: gate and routing come first, in the same launch: all warps share the gate's product, block t routes
// token t, and all wait for that.
#include "ptx.cuh"
#if GATE
#include "route.cuh"
#endif

enum { F_BF16 = 0, F_FP8, F_INT4, F_MXFP4 };
#define MAX_SLOTS 512
#define NATURAL (FORMAT == F_BF16 || FORMAT == F_FP8)
// Weights become bf16 that are too small by a power of two; rows are made too large by 2^100, exactly.
#define TO_LARGE 1.2676506002282294e30f
#define UNSCALE (FORMAT == F_MXFP4 ? 67108864.f : FORMAT == F_FP8 ? 1048576.f : 1.f)

#define RK (FORMAT == F_BF16 || FORMAT == F_MXFP4 ? 64 : 128)                 // columns of a record
#define TILE (NATURAL ? 2048 : FORMAT == F_INT4 ? 1056 : 544)                 // bytes of 16 rows x RK
#define STAGE (RECORDS * 2 * TILE)
#define STEPS (RECORDS * RK / 64)
#define THREADS (WARPS * 32)

#define OWN_PLAN 128  // slots for which blocks make the plan by themselves; at most a block's threads
// Finished units of the first product for each entry; then units of the second product, blocks that have left, blocks
// that have done their part before the plan, routed tokens.
// Each in a line of its own: blocks that wait for one are not in the way of those that count another.
enum { LINE = 32, DOWN = MAX_SLOTS * LINE, LEFT = DOWN + LINE, BEFORE = LEFT + LINE, ROUTED = BEFORE + LINE };

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
  u16* rows;           // FP8: [tokens, hidden], codes of x
  float* row_scales;   // FP8: [tokens, hidden / 128]
  float* y;  // [slots, hidden]
  void* out;  // bf16, or f32
  u64 out_stride;
  u32* counters;  // [ROUTED + LINE], zero
  u32* fault;
  const u32 *offsets, *order;  // a plan in tiles of 8, for more than OWN_PLAN slots
  const uint2* tiles;
  const u32* tile_count;
  u32 slots, top_k, experts, hidden, inner;
  u32 split;                             // warps that share a unit's K in phase 2
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
      for (int s = 0; s < 2; s++) {
        // four columns: bytes 0 and 2 are one pair, 1 and 3 the other
        u32 b0 = __byte_perm(x[s][2 * i], x[s][2 * i + 1], 0x5410), b1 = __byte_perm(x[s][2 * i], x[s][2 * i + 1], 0x7632);
#pragma unroll
        for (int m = 0; m < 2; m++) {
          u32 a[4];
#pragma unroll
          for (int half = 0; half < 2; half++) {
            uint4 q = w[m][s][half];
            u32 v = i == 0 ? q.x : i == 1 ? q.y : i == 2 ? q.z : q.w, v8 = v << 8;
            a[half] = (v8 & 0x80008000u) | ((v8 >> 4) & 0x07F007F0u);
            a[2 + half] = (v & 0x80008000u) | ((v >> 4) & 0x07F007F0u);
          }
          mma(sum[s][m], a[0], a[1], a[2], a[3], b0, b1);
        }
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
__device__ __forceinline__ void plan_warp(const Few& p, Entries& e, u32 lane) {
  u32 id = lane < p.slots ? __ldcg(p.ids + lane) : NO_EXPERT;
  bool valid = id < p.experts;
#if GATE
  if (p.slots == p.top_k) {  // the router's choices of one token are all different
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
__device__ __forceinline__ void plan_sorted(const Few& p, Entries& e, u32* memory) {
  u32 *keys = memory, *sorted = keys + OWN_PLAN, *starts = sorted + OWN_PLAN, *firsts = starts + OWN_PLAN / 32;
  const u32 i = threadIdx.x, lane = i & 31, words = (p.slots + 31) / 32;
  u32 key = ~0u;
  if (i < OWN_PLAN) {
    u32 id = i < p.slots ? __ldcg(p.ids + i) : NO_EXPERT;
    if (id < p.experts) key = id << 7 | i;
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
  u32 total = *p.tile_count, planned = p.offsets[p.experts];
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

// A walk over the units of both phases, the same for the filling and the emptying side of a ring.
struct Walk {
  u32 units[2], count[2], step_entry[2], step_group[2], start[2], grid;
  u32 phase, unit, entry, group;  // phase 2: done

  __device__ __forceinline__ void enter(u32 to) {
    phase = to;
    if (phase == 0 && start[0] >= count[0]) phase = 1;
    if (phase == 1 && start[1] >= count[1]) phase = 2;
    if (phase == 2) return;
    // selected, not indexed: an index would put the arrays into memory
    u32 n = phase == 0 ? units[0] : units[1];
    unit = phase == 0 ? start[0] : start[1];
    entry = unit / n;
    group = unit - entry * n;
  }
  __device__ __forceinline__ void next() {
    bool one = phase == 0;
    unit += grid;
    group += one ? step_group[0] : step_group[1];
    entry += one ? step_entry[0] : step_entry[1];
    u32 n = one ? units[0] : units[1];
    if (group >= n) group -= n, entry++;
    if (unit >= (one ? count[0] : count[1])) enter(phase + 1);
  }
};

// Waits until others have counted to n.
__device__ __forceinline__ void wait_for(const u32* counter, u32 n) {
  if (threadIdx.x == 0)
    while (load_acquire(counter) < n) {}
  __syncthreads();
}

#if FORMAT == 1
// Four values as codes in the places of two registers of a fragment.
__device__ __forceinline__ uint2 quantised(const u32* x, float scale, float inverse) {
  float v[4];
#pragma unroll
  for (int c = 0; c < 4; c++) {
    // the quotient, rounded once
    float f = __uint_as_float(x[c]), near = __fmul_rn(f, inverse);
    v[c] = __fmaf_rn(__fmaf_rn(-near, scale, f), inverse, near);
  }
  u32 codes = e4m3x4(v), w[2];
#pragma unroll
  for (int half = 0; half < 2; half++) {
    // a code in the upper byte of each half becomes a bf16 that is too small by 2^120; it is to be too large by 2^100
    w[half] = __byte_perm(codes, 0, half ? 0x3424 : 0x1404);
    w[half] = (w[half] & 0x80008000u) | ((w[half] >> 4) & 0x07F007F0u);
    w[half] = times_bf16x2(times_bf16x2(w[half], 0x7F007F00u), 0x6E006E00u);
  }
  return make_uint2(w[0], w[1]);
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
  float scale = e4m3_scale(v), q[4];
  u32 codes = to_e4m3x4(v, scale);
#pragma unroll
  for (int c = 0; c < 4; c++) q[c] = e4m3_to_f32(codes >> 8 * c & 0xff) * TO_LARGE;
  *(uint2*)(to + 4 * lane) = make_uint2(f32x2_to_bf16x2(q[0], q[1]), f32x2_to_bf16x2(q[2], q[3]));
  if (lane == 0) *scale_to = scale;
}

#if GATE
// A logit of the gate, by one warp: as `linear` computes it.
__device__ __forceinline__ void logit(const Few& p, const Gate& g, u32 t, u32 o, u32 lane) {
  const Rows& w = g.weight;
  const u16* row = p.x + (u64)t * p.x_stride;
  float sum[1][1] = {};
  if (w.type == BF16) {
    const u16* output = (const u16*)w.data + (u64)o * w.stride;
    // eight runs of 8 columns are on the way at once; what lies beyond the row adds nothing
#pragma unroll 1
    for (u32 k0 = lane * 8; k0 < p.hidden; k0 += 2048) {
      uint4 xs[8], ws[8];
#pragma unroll
      for (int i = 0; i < 8; i++) {
        u32 k = k0 + 256 * i;
        xs[i] = load_global16_if(row + k, k < p.hidden), ws[i] = load_global16_if(output + k, k < p.hidden);
      }
      for (u32 k = k0 + 2048; k < k0 + 4096 && k < p.hidden; k += 256) prefetch(output + k);
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
    Rows x = {(void*)p.x, p.x_stride, BF16, p.slots / p.top_k, p.hidden}, wide = {w.data, w.stride, F32, w.rows, w.cols};
    u64 rows[1] = {(u64)t * x.stride}, outputs[1] = {(u64)o * w.stride};
    dots<1, 1>(x, rows, wide, outputs, true, lane, sum);
  }
  float v = sum[0][0] + (g.bias ? g.bias[o] : 0.f);
  if (lane == 0) g.logits[(u64)t * w.rows + o] = v;
  // a number that is not finite leaves no logit finite
  if (!finite(v))
    for (u32 c = lane; c < p.hidden; c += 32) {
      float v = bf16_to_f32(row[c]);
      if (!finite(v)) raise_fault(g.fault, FAULT_HIDDEN, t, c, __float_as_uint(v));
    }
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
  const u32 tokens = p.slots / p.top_k;
#if GATE || FORMAT == 1
  {
    const u32 all = gridDim.x * WARPS;
#if GATE
    // a warp has one output of the gate, and some of the rows
    const u32 outputs = g.weight.rows, together = tokens * outputs <= all ? 1 : (tokens * outputs + all - 1) / all;
    const u32 parts = together == 1 ? tokens : (tokens + together - 1) / together, logits = outputs * parts;
#else
    const u32 logits = 0;
#endif
    const u32 groups = FORMAT == F_FP8 ? p.hidden / 128 : 0;
#pragma unroll 1
    for (u32 i = warp * gridDim.x + blockIdx.x; i < logits + tokens * groups; i += all) {
#if GATE
      if (i < logits) {
        u32 part = parts == 1 ? 0 : i % parts, end = (part + 1) * together < tokens ? (part + 1) * together : tokens;
#pragma unroll 1
        for (u32 t = part * together; t < end; t++) logit(p, g, t, parts == 1 ? i : i / parts, lane);
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
        to_codes(f, p.rows + (u64)t * p.hidden + group * 128, p.row_scales + (u64)t * groups + group, lane);
      }
#endif
    }
    STAMP(1);
    __syncthreads();
    if (tid == 0) add_release(p.counters + BEFORE);
#if GATE
    // the sums' room is free until the first unit is done
    for (u32 t = blockIdx.x; t < tokens; t += gridDim.x) {
      wait_for(p.counters + BEFORE, gridDim.x);
      STAMP(2);
      // what is known when the kernel is compiled leaves little code to fetch
      Router r = g.router;
      r.score = SCORE, r.correction = CORRECTION, r.selection = SELECTION, r.weight_from = WEIGHT_FROM, r.renormalise = RENORMALISE;
      if (!ROUTER_GROUPS) r.groups = 0;
      if (!SOFT_CAP) r.soft_cap = 0.f;
      if (CORRECTION == NO_CORRECTION) r.bias = 0;
      if (!PER_EXPERT) r.per_expert = 0;
      if (WEIGHT_FROM != JOINT_SOFTMAX) r.logits = r.choices;
      route_token(t, g.logits, outputs, r, 0, 0, (u32*)p.ids, (float*)p.weights, g.shared_weights, g.fault, (u8*)partial);
      __syncthreads();
      if (tid == 0) add_release(p.counters + ROUTED);
    }
    wait_for(p.counters + ROUTED, tokens);
#else
    wait_for(p.counters + BEFORE, gridDim.x);
#endif
  }
#endif
  STAMP(3);
  if (p.slots > OWN_PLAN) plan_block(p, entries);
  else if (p.slots > 32) plan_sorted(p, entries, (u32*)partial);
  else if (warp == 0) plan_warp(p, entries, lane);
  __syncthreads();
  STAMP(4);
  const u32 total = entries.count;

  // this warp's records: of all in phase 1, of those of its group in phase 2
  const u32 records1 = p.hidden / RK, records2 = p.inner / RK, teams = WARPS / p.split;
  const u32 part = warp % p.split, team = warp / p.split, groups2 = p.hidden / 32;
  // Streams are cut into runs, one a warp. Of rows that lie where the checkpoint has them, warps take
  // every WARPS-th record: what they read at one time lies together.
  __shared__ uint2 runs[WARPS][2];  // first and end; looked up, for want of registers
  if (lane == 0) {
    runs[warp][0] = NATURAL ? make_uint2(0, (records1 + WARPS - 1 - warp) / WARPS) : make_uint2(records1 * warp / WARPS, records1 * (warp + 1) / WARPS);
    runs[warp][1] = NATURAL ? make_uint2(0, (records2 + p.split - 1 - part) / p.split) : make_uint2(records2 * part / p.split, records2 * (part + 1) / p.split);
  }
  __syncwarp();
  auto record_at = [&](u32 r, bool one) { return !NATURAL ? r : one ? r * WARPS + warp : r * p.split + part; };
  Walk to;  // the emptying side
  to.grid = gridDim.x;
  to.units[0] = p.inner / 16, to.units[1] = groups2 / teams;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    to.count[i] = to.units[i] * total;
    to.step_entry[i] = to.grid / to.units[i];
    to.step_group[i] = to.grid - to.step_entry[i] * to.units[i];
  }
  to.start[0] = blockIdx.x;
  // blocks that had one unit less in phase 1 begin phase 2
  to.start[1] = (blockIdx.x + to.grid - to.count[0] % to.grid) % to.grid;
  to.enter(0);
  Walk from = to;  // the filling side
  u32 filled = 0, slot_in = 0;
  auto fill = [&]() {
    if (from.phase > 1) return;
    bool one = from.phase == 0;
    const uint2 run = runs[warp][one ? 0 : 1];
    u32 r = run.x + filled, end = run.y, n = end > r ? end - r : 0;
    n = n < RECORDS ? n : RECORDS;
    if (lane == 0) {
      u32 barrier = full + 8 * slot_in, at = ring + slot_in * STAGE, expert = entries.expert[from.entry];
      barrier_expect(barrier, n * 2 * TILE);
      if constexpr (NATURAL) {
        for (u32 i = 0; i < n; i++) {
          u32 k = record_at(r + i, one) * RK;
          if (one) {
            copy_tile(at + i * 2 * TILE, &gate, barrier, k, expert * p.gate_rows + from.group * 16);
            copy_tile(at + i * 2 * TILE + TILE, &up, barrier, k, expert * p.up_rows + from.group * 16);
          } else copy_tile(at + i * 2 * TILE, &down, barrier, k, expert * p.down_rows + (from.group * teams + team) * 32);
        }
      } else {
        u32 groups = one ? to.units[0] : groups2, group = one ? from.group : from.group * teams + team;
        const u8* source = (one ? p.first : p.second) + (((u64)expert * groups + group) * (one ? records1 : records2) + r) * (2 * TILE);
        if (n) copy_bytes(at, source, n * 2 * TILE, barrier);
      }
    }
    if (++slot_in == STAGES) slot_in = 0;
    filled += RECORDS;
    if (r + RECORDS >= end) filled = 0, from.next();
  };
  // What the first product waits for comes first: the second one's weights are asked for after a stage of it. (Of
  // bf16 that is late.)
  u32 room = STAGES;
  const u32 begins = from.phase;
#pragma unroll 1
  for (; room && (FORMAT == F_BF16 || from.phase == begins); room--) fill();

  u32 low, magic;  // kept in registers: with immediates every use becomes two instructions
  asm volatile("mov.u32 %0, 0x000f000f; mov.u32 %1, 0x43004300;" : "=r"(low), "=r"(magic));
  u32* done = p.counters;
  u32 units = 0, slot_out = 0, parity = 0, ready = NO_EXPERT;
  if (to.phase < 2) {
    Loaded a;
#if FORMAT != 1
    Loaded b;
#endif
    u32 r = runs[warp][to.phase].x, end = runs[warp][to.phase].y;
    const u16* row = 0;
    const float *scales[2] = {}, *row_scales[2] = {};
    bool single = false;  // the unit has one row
    // where this lane's row is read in the unit that `w` stands at; waits for the first product
    auto enter_unit = [&](const Walk& w) {
      const u32 rows = entries.rows[w.entry];
      single = rows == 1;
      if (w.phase == 1 && ready != w.entry) {
        if (lane == 0)
          while (load_acquire(done + w.entry * LINE) < to.units[0]) {}
        __syncwarp();
        ready = w.entry;
      }
      auto slot_of = [&](u32 c) -> u32 { return entries.order[entries.first[w.entry] + (c < rows ? c : rows - 1)]; };
      u32 s = slot_of(lane >> 2);
      if (w.phase == 1) row = (const u16*)p.h + (u64)s * p.inner * (FORMAT == F_FP8 ? 2 : 1);
      else row = FORMAT == F_FP8 ? p.rows + (u64)(s / p.top_k) * p.hidden : p.x + (u64)(s / p.top_k) * p.x_stride;
      if constexpr (FORMAT == F_FP8) {
#pragma unroll
        for (u32 c = 0; c < 2; c++) row_scales[c] = p.row_scales + (u64)(slot_of((lane & 3) * 2 + c) / p.top_k) * records1;
        u32 expert = entries.expert[w.entry];
        if (w.phase == 0) {
          u64 at = (u64)expert * p.gate_scale_step + w.group * 16 / 128 * records1;
          scales[0] = p.gate_scales + at, scales[1] = p.up_scales + at;
        } else scales[0] = scales[1] = p.down_scales + (u64)expert * p.down_scale_step + (w.group * teams + team) * 32 / 128 * records2;
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
        f.scale[0] = __ldg(scales[0] + k), f.scale[1] = __ldg(scales[1] + k);
        if (one) f.row_scale[0] = load_global4(row_scales[0] + k), f.row_scale[1] = load_global4(row_scales[1] + k);
      }
#endif
    };
    enter_unit(to);
    load_rows(a, r, end);
    float acc[2][4] = {};
    // One stage with the rows in `loaded`; those of the next stage are loaded ahead into `ahead`. True at a unit's end.
    auto step = [&](Loaded& loaded, Loaded& ahead, u32 phase) -> bool {
#if FORMAT == 1
      static_assert(STEPS == 2, "a record of 128 columns");
      // into other registers: these are for the next ones
      Fragment now;
      if (phase) quantise(loaded.x, single, now, lane);
      else {
#pragma unroll
        for (int s = 0; s < 2; s++)
#pragma unroll
          for (int q = 0; q < 8; q++) now.x[s][q] = loaded.x[s][q];
        now.row_scale[0] = loaded.row_scale[0], now.row_scale[1] = loaded.row_scale[1];
      }
      now.scale[0] = loaded.scale[0], now.scale[1] = loaded.scale[1];
#else
      Fragment& now = loaded;
#endif
      const bool last = r + RECORDS >= end;
      u32 r_next = r + RECORDS, end_next = end;
      if (last) {
        to.next();
        const uint2 run = runs[warp][to.phase != 0];
        r_next = run.x, end_next = run.y;
        // A block publishes its own last unit before it waits for others: no look ahead over the change.
        if (to.phase == phase) {
          enter_unit(to);
          load_rows(ahead, r_next, end_next);
        }
      } else load_rows(ahead, r_next, end_next);
      barrier_wait(full + 8 * slot_out, parity);
      STAMP_FIRST(5);
      if (FORMAT == F_MXFP4 && phase == 0) {
#pragma unroll
        for (int i = 0; i < STEPS; i++)
#pragma unroll
          for (int q = 0; q < 8; q++) now.x[i][q] = times_bf16x2(now.x[i][q], 0x71807180u);
      }
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
    auto finish = [&](Loaded& next, u32 phase, u32 entry, u32 group) {
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
            if (p.gate_bias) g += p.gate_bias[(u64)expert * p.inner + feature];
            if (p.up_bias) u += p.up_bias[(u64)expert * p.inner + feature];
            float v = activate_16(activation, g, u);
            u64 at_h = (u64)entries.order[first + column] * p.inner + feature;
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
              for (u32 w = 0; w < p.split; w++) sum += all[((i >> 5) * p.split + w) * 256 + at];
              sum *= UNSCALE;
              if (p.down_bias) sum += p.down_bias[(u64)expert * p.hidden + feature];
              p.y[(u64)entries.order[first + column] * p.hidden + feature] = sum;
            }
          __syncwarp();
          if (lane == 0) add_release(done + DOWN);
        }
      }
      units++;
      if (to.phase == 1 && phase == 0) {
        STAMP(6);
        enter_unit(to);
        load_rows(next, r, end);
        STAMP(7);
      }
    };
#if FORMAT == 1
    do {
      const u32 phase = to.phase, entry = to.entry, group = to.group;
      while (!step(a, a, phase)) {}
      finish(a, phase, entry, group);
    } while (to.phase < 2);
#else
    u32 phase = to.phase, entry = to.entry, group = to.group;
    auto turn = [&](Loaded& now, Loaded& ahead) -> bool {
      if (step(now, ahead, phase)) {
        finish(ahead, phase, entry, group);
        phase = to.phase, entry = to.entry, group = to.group;
      }
      return to.phase < 2;
    };
    while (turn(a, b) && turn(b, a)) {}
#endif
  }
  STAMP(8);
  // Combine, once every down unit is there.
  wait_for(done + DOWN, to.count[1]);
  STAMP(9);
  for (u32 i = blockIdx.x * THREADS + tid; i < tokens * p.hidden; i += gridDim.x * THREADS) {
    u32 t = i / p.hidden, c = i - t * p.hidden;
    float sum = 0;
#pragma unroll 8
    for (u32 j = 0; j < p.top_k; j++) {
      u64 s = (u64)t * p.top_k + j;
      bool there = __ldcg(p.ids + s) < p.experts;
      float v = load_fresh_if(p.y + s * p.hidden + c, there), w = __ldcg(p.weights + s);
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
  if (others != gridDim.x - 1) return;
  STAMPS_LAST;
  for (u32 i = tid; i < total; i += THREADS) done[i * LINE] = 0;
  if (tid < 4) done[DOWN + LINE * tid] = 0;
}
