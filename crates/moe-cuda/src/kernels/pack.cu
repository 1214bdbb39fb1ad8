// Packs stored 4-bit codes for few.cu: records of two tiles of 16 rows x RK columns, in the order in which the
// lanes of a warp read them, followed by the tile's scales. [experts, groups, records, 2 tiles, TILE bytes]
#include "stored.cuh"

#define RK (FORMAT == 2 ? 128 : 64)
#define TILE (FORMAT == 2 ? 1056 : 544)

// First product: a group's tiles are 16 rows of `a` (gate) and the same of `b` (up). Second: 32 rows of `a`.
extern "C" __global__ void pack(Stored a, Stored b, u32 experts, u32 first, u8* out) {
  u32 groups = a.rows / (first ? 16 : 32), records = a.cols / RK;
  u64 count = (u64)experts * groups * records * 64;
  for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (u64)gridDim.x * blockDim.x) {
    u32 lane = i & 31, tile = i >> 5 & 1, g = lane >> 2, t = lane & 3;
    u64 at = i >> 6;
    u32 record = (u32)(at % records);
    at /= records;
    u32 group = (u32)(at % groups), expert = (u32)(at / groups);
    u8* to = out + ((((u64)expert * groups + group) * records + record) * 2 + tile) * TILE;
    const Stored& m = first && tile ? b : a;
    u32 row0 = first ? group * 16 : group * 32 + tile * 16, column0 = record * RK;
    // the code of half `half` of register `reg` of product j, of 16 columns, in step s of 64 columns
    auto code = [&](u32 s, u32 j, u32 reg, u32 half) -> u32 {
      u32 k = column0 + s * 64 + 32 * (j >> 1) + 8 * t + 4 * (j & 1) + (reg >> 1) * 2 + half;
      const u8* row = m.codes + expert * m.expert_bytes + (u64)(row0 + g + 8 * (reg & 1)) * m.row_bytes;
      return row[k >> 1] >> (4 * (k & 1)) & 15;
    };
    for (u32 s = 0; s < RK / 64; s++)
      for (u32 j = 0; j < 4; j++) {
        u32 word = 0;
        if (FORMAT == 2)
          for (u32 reg = 0; reg < 4; reg++) word |= code(s, j, reg, 0) << (4 * reg) | code(s, j, reg, 1) << (16 + 4 * reg);
        else
          // sign and three bits of four codes, so that a shift and a mask bring each to bits 15 and 8..6
          for (u32 half = 0; half < 2; half++) {
            u32 c[4];
            for (u32 reg = 0; reg < 4; reg++) c[reg] = code(s, j, reg, half);
            u32 z = (c[0] >> 3) << 15 | (c[0] & 7) << 6 | (c[1] >> 3) << 12 | (c[1] & 7) << 3 | (c[2] >> 3) << 9 | (c[2] & 7)
                    | (c[3] >> 3) << 14 | (c[3] >> 2 & 1) << 13 | (c[3] & 3) << 10;
            word |= z << (16 * half);
          }
        ((u32*)(to + s * 512 + lane * 16))[j] = word;
      }
    if (t == 0) {
      auto scale = [&](u32 row, u32 group) -> u32 {
        u64 at = expert * m.expert_scales + (u64)row * m.row_scales + group;
        return FORMAT == 2 ? ((const u16*)m.scales)[at] : ((const u8*)m.scales)[at];
      };
      u32 low = row0 + g, high = low + 8, word;
      if (FORMAT == 2) word = scale(low, record) | scale(high, record) << 16;
      else word = scale(low, 2 * record) | scale(low, 2 * record + 1) << 8 | scale(high, 2 * record) << 16 | scale(high, 2 * record + 1) << 24;
      ((u32*)(to + (FORMAT == 2 ? 1024 : 512)))[g] = word;
    }
  }
}
