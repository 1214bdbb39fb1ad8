//! Matrices of every format, with every way to store it.

use half::{bf16, f16};

use crate::numerics::{DecodeScale, EncodeScale, ggml::BlockType};
pub(super) use crate::stored::View;
use crate::stored::{
    Blocks, Bytes, Codes, Element, FloatType, Floats, Global, Granularity, Packing, ScaleType,
    Scales, ZeroPoints, Zeros,
};

/// Random numbers of a generator of its own, so that a case is its seed (splitmix64).
pub(super) struct Numbers(pub(super) u64);

impl Numbers {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next() % end as u64) as usize
    }

    /// In [0, 1).
    fn unit(&mut self) -> f32 {
        (self.next() >> 40) as f32 / (1 << 24) as f32
    }

    /// About normal, with a few large ones.
    pub(super) fn normal(&mut self, count: usize) -> Vec<f32> {
        let mut one = || (0..6).map(|_| self.unit()).sum::<f32>() - 3.0;
        (0..count).map(|i| if i % 61 == 7 { 20.0 * one() } else { one() }).collect()
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.next() as u8).collect()
    }

    /// A scale of either sign, neither tiny nor huge.
    fn scale(&mut self) -> f32 {
        let sign = if self.below(5) == 0 { -1.0 } else { 1.0 };
        sign * (0.01 + self.unit())
    }
}

/// Every format, for matrices of about `n` × `k`. Of the codes, which have many scales, packings and
/// zero points, a third.
pub(super) fn cases(numbers: &mut Numbers, n: usize, k: usize) -> Vec<(String, View)> {
    let mut all = Vec::new();
    floats(numbers, [n, k], &mut all);
    let mut every = Vec::new();
    codes(numbers, [n, k], &mut every);
    all.extend(every.into_iter().filter(|_| numbers.below(3) == 0));
    blocks(numbers, [n, k], &mut all);
    let windows = windows(numbers, &all);
    all.extend(windows);
    // at the end, so that the others stay what they are
    let mut every = Vec::new();
    minima(numbers, [n, k], &mut every);
    let windows = self::windows(numbers, &every);
    all.extend(every);
    all.extend(windows);
    all
}

/// Of each, a window: every other row, some of the columns.
fn windows(numbers: &mut Numbers, of: &[(String, View)]) -> Vec<(String, View)> {
    of.iter()
        .filter_map(|(name, view)| {
            let first = numbers.below(view.rows());
            let rows = view.rows_of(first, 2, (view.rows() - first).div_ceil(2))?;
            let start = numbers.below(view.cols());
            let end = start + 1 + numbers.below(view.cols() - start);
            Some((format!("{name}, window {start}..{end}"), rows.cols_of(start..end)?))
        })
        .collect()
}

/// Integers with a least value for each group, of every number of bits: groups and types by turns.
fn minima(numbers: &mut Numbers, shape: [usize; 2], all: &mut Vec<(String, View)>) {
    use Element::{Uint1, Uint2, Uint3, Uint4, Uint5, Uint6, Uint8};
    let types =
        [(32, ScaleType::F16), (64, ScaleType::Bf16), (128, ScaleType::F32), (24, ScaleType::F16)];
    let first = numbers.below(types.len());
    for (i, element) in [Uint1, Uint2, Uint3, Uint4, Uint5, Uint6, Uint8].into_iter().enumerate() {
        let (size, stored) = types[(first + i) % types.len()];
        let block = (Granularity::Group, [1, size]);
        let [scales, minima] = [0; 2].map(|_| scales(numbers, stored, block, shape, false));
        let bytes = numbers.bytes(shape[0] * element.row_bytes(shape[1]).unwrap());
        let (packing, minima) = ((element, Packing::Rows), Zeros::Minima(minima));
        let codes = Codes::new(packing, bytes.into(), shape, scales, minima, None).unwrap();
        let view = View::new(codes);
        all.push((format!("{} {stored}", view.describe()), view));
    }
}

fn floats(numbers: &mut Numbers, shape: [usize; 2], all: &mut Vec<(String, View)>) {
    let values = numbers.normal(shape[0] * shape[1]);
    for float in [FloatType::F32, FloatType::F16, FloatType::Bf16] {
        let bytes: Vec<u8> = match float {
            FloatType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            FloatType::F16 => values.iter().flat_map(|v| f16::from_f32(*v).to_le_bytes()).collect(),
            FloatType::Bf16 => {
                values.iter().flat_map(|v| bf16::from_f32(*v).to_le_bytes()).collect()
            }
        };
        let rows = Floats::row_major(bytes.clone().into(), float, shape).unwrap();
        let columns = Floats::transposed(bytes.into(), float, shape).unwrap();
        all.push((format!("{float:?}"), View::new(rows)));
        all.push((format!("{float:?} transposed"), View::new(columns)));
    }
}

/// Scales of a type, in the values that formats have.
fn scales(
    numbers: &mut Numbers,
    stored: ScaleType,
    (granularity, block): (Granularity, [usize; 2]),
    shape: [usize; 2],
    odd: bool,
) -> Scales {
    let (down, across) = match granularity {
        Granularity::Tensor => (1, 1),
        Granularity::Channel => (shape[0], 1),
        _ => (shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])),
    };
    let bytes: Vec<u8> = (0..down * across)
        .flat_map(|i| match stored {
            ScaleType::F32 => numbers.scale().to_le_bytes().to_vec(),
            ScaleType::F16 => f16::from_f32(numbers.scale()).to_le_bytes().to_vec(),
            ScaleType::Bf16 => bf16::from_f32(numbers.scale()).to_le_bytes().to_vec(),
            // NaN and the smallest of all, some negative ones.
            ScaleType::E8m0 if odd && i % 7 == 3 => vec![[0, 255][i / 7 % 2]],
            ScaleType::E8m0 => vec![122 + numbers.below(8) as u8],
            ScaleType::E4m3 if odd && i % 7 == 3 => vec![[0x7F, 0xB4][i / 7 % 2]],
            ScaleType::E4m3 => vec![numbers.below(0x7E) as u8],
        })
        .collect();
    Scales::new(bytes.into(), stored, granularity, block, shape).unwrap()
}

fn codes(numbers: &mut Numbers, shape: [usize; 2], all: &mut Vec<(String, View)>) {
    use Granularity::{Block, Channel, Group, Tensor};
    let groups = [(Tensor, 0), (Channel, 0), (Group, 32), (Group, 128), (Group, 16), (Group, 24)];
    for element in Element::ALL {
        let small_float = matches!(element, Element::E2m1 | Element::E2m3 | Element::E3m2);
        if small_float {
            for odd in [false, true] {
                let powers = scales(numbers, ScaleType::E8m0, (Group, [1, 32]), shape, odd);
                push(numbers, (element, powers), Zeros::None, shape, all);
            }
        }
        if element == Element::E2m1 {
            for odd in [false, true] {
                let eighths = scales(numbers, ScaleType::E4m3, (Group, [1, 16]), shape, odd);
                push(numbers, (element, eighths), Zeros::None, shape, all);
            }
        }
        if element == Element::E4m3 {
            let powers = scales(numbers, ScaleType::E8m0, (Group, [1, 32]), shape, true);
            push(numbers, (element, powers), Zeros::None, shape, all);
        }
        if small_float {
            continue;
        }
        // those have minima alone
        if matches!(element.bits(), 1 | 2 | 3 | 5) || element == Element::Uint6 {
            continue;
        }
        let types = [ScaleType::F32, ScaleType::F16, ScaleType::Bf16, ScaleType::E8m0];
        for ((granularity, size), stored) in groups.into_iter().zip(types.into_iter().cycle()) {
            let scales = scales(numbers, stored, (granularity, [1, size]), shape, false);
            let middle = match element {
                Element::Uint4 => 8,
                Element::Uint8 => 128,
                _ => 0,
            };
            let zeros = if middle == 0 { Zeros::None } else { Zeros::Same(middle) };
            push(numbers, (element, scales.clone()), zeros, shape, all);
            if !matches!(element, Element::E4m3 | Element::E5m2) {
                let points = zero_points(numbers, element, scales.shape());
                push(numbers, (element, scales), points, shape, all);
            }
        }
        let blocks = scales(numbers, ScaleType::F32, (Block, [48, 64]), shape, false);
        push(numbers, (element, blocks), Zeros::None, shape, all);
    }
}

fn zero_points(numbers: &mut Numbers, element: Element, shape: [usize; 2]) -> Zeros {
    let zeros: Vec<i16> = (0..shape[0] * shape[1])
        .map(|_| match element {
            Element::Uint4 => numbers.below(17) as i16,
            Element::Uint8 => numbers.below(257) as i16,
            Element::Int4 => numbers.below(16) as i16 - 8,
            _ => numbers.below(256) as i16 - 128,
        })
        .collect();
    Zeros::Each(ZeroPoints::from_i16(&zeros, shape).unwrap())
}

/// The matrix in every packing that can hold it.
fn push(
    numbers: &mut Numbers,
    (element, scales): (Element, Scales),
    zeros: Zeros,
    [n, k]: [usize; 2],
    all: &mut Vec<(String, View)>,
) {
    use Packing::{Awq, Gptq, Rows, Transposed, TransposedPairs};
    for packing in [Rows, Transposed, TransposedPairs, Gptq, Awq] {
        let len = match packing {
            Packing::Rows => n * element.row_bytes(k).unwrap(),
            _ => n * k * element.bits() / 8,
        };
        let mut bytes = numbers.bytes(len);
        let odd = numbers.below(2) == 0;
        if element == Element::E5m2 || element == Element::E4m3 && !odd {
            // Finite: neither infinities nor NaN.
            let max = if element == Element::E4m3 { 0x7E } else { 0x7B };
            bytes.iter_mut().for_each(|code| *code = *code & 0x80 | (*code & 0x7F).min(max));
        }
        let globals = [
            None,
            Some(Global::Multiply(DecodeScale(0.37))),
            Some(Global::Divide(EncodeScale(1.9))),
        ];
        let global = globals[numbers.below(3)];
        let bytes: Bytes = bytes.into();
        let made =
            Codes::new((element, packing), bytes, [n, k], scales.clone(), zeros.clone(), global);
        // Some packings need whole words.
        let Ok(codes) = made else { continue };
        let name =
            format!("{} {packing:?} {element:?} {global:?}", View::new(codes.clone()).describe());
        all.push((name, View::new(codes.clone())));
        let [_, groups] = scales.shape();
        if scales.granularity() == Granularity::Group && groups > 1 {
            let group_of = (0..k).map(|_| numbers.below(groups) as u32).collect();
            let codes = codes.with_groups(group_of).unwrap();
            all.push((
                format!("{} {packing:?}", View::new(codes.clone()).describe()),
                View::new(codes),
            ));
        }
    }
}

fn blocks(numbers: &mut Numbers, [n, k]: [usize; 2], all: &mut Vec<(String, View)>) {
    for block in BlockType::ALL {
        let cols = k.next_multiple_of(block.block_len());
        let row_bytes = block.row_bytes(cols).unwrap();
        for odd in [false, true] {
            if odd && block != BlockType::Mxfp4 {
                continue;
            }
            let mut bytes = numbers.bytes(n * row_bytes);
            for (i, block_bytes) in bytes.chunks_exact_mut(block.block_bytes()).enumerate() {
                match block {
                    BlockType::Mxfp4 if odd && i % 5 == 2 => block_bytes[0] = [0, 255][i / 5 % 2],
                    BlockType::Mxfp4 => block_bytes[0] = 122 + numbers.below(8) as u8,
                    // the f16 lies in the high nibbles of four words
                    BlockType::Iq1M => {
                        let scale = f16::from_f32(numbers.scale()).to_bits();
                        for i in 0..4 {
                            let high = (scale >> (4 * i) & 15) as u8;
                            let byte = &mut block_bytes[49 + 2 * i];
                            *byte = *byte & 15 | high << 4;
                        }
                    }
                    _ => f16_fields(block).iter().for_each(|at| {
                        let scale = f16::from_f32(numbers.scale());
                        block_bytes[*at..*at + 2].copy_from_slice(&scale.to_le_bytes());
                    }),
                }
            }
            let blocks = Blocks::new(block, bytes.into(), [n, cols]).unwrap();
            all.push((format!("{} odd {odd}", block.name()), View::new(blocks)));
        }
    }
}

/// Where a block has f16 numbers.
fn f16_fields(block: BlockType) -> &'static [usize] {
    match block {
        BlockType::Q4_1 | BlockType::Q5_1 | BlockType::Q4K | BlockType::Q5K => &[0, 2],
        BlockType::Q2K => &[80, 82],
        BlockType::Q3K => &[108],
        BlockType::Q6K => &[208],
        BlockType::Tq1_0 => &[52],
        BlockType::Tq2_0 => &[64],
        BlockType::Mxfp4 | BlockType::Nvfp4 | BlockType::Iq1M => &[],
        _ => &[0],
    }
}
